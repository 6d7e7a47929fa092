"""An operation played from its tape does what it did when it was taped, to other tensors. In Triton's interpreter."""

from threading import Thread

import interpreted  # noqa: F401  # before any kernel
import pytest
import torch
import triton
import triton.language as tl

from model import gating, launching, mixer, norm, rotary
from model.launching import launch, remembered


@triton.jit
def _scale_kernel(x_ptr, y_ptr, n, stride, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at * stride, mask=at < n, other=0.0)
    tl.store(y_ptr + at, x * FACTOR, mask=at < n)


def scaled(x, factor):
    y = torch.empty(x.shape, dtype=x.dtype)
    launch(_scale_kernel, (triton.cdiv(len(x), 4),), x, y, len(x), x.stride(0), FACTOR=factor, BLOCK=4)
    return y


def sums(x):
    """A view, two temporary tensors, an operation of PyTorch on one of them, and two results, one of them an input."""
    half = x[: len(x) // 2]
    twice = scaled(half, 2)
    return x, None, scaled(twice, 3).sum(0, keepdim=True, dtype=torch.float64) + twice[-1]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_tape_works_on_the_tensors_it_is_given():
    played = remembered(sums)
    for seed in range(3):
        x = draw(10, seed=seed)
        same, nothing, total = played(x)
        assert same is x and nothing is None
        torch.testing.assert_close(total, sums(x)[2], rtol=0, atol=0)
    (tape,) = played.tapes.values()
    assert [type(step).__name__ for step in tape.steps].count("Allocation") == 1  # both temporary tensors


@pytest.mark.parametrize(
    "other", [draw(9), draw(20)[::2], draw(11)[1:], draw(10).double()], ids=["length", "stride", "alignment", "dtype"]
)
def test_other_kinds_of_tensors_have_tapes_of_their_own(other):
    played = remembered(sums)
    for x in (draw(10), other, other + 1, draw(10, seed=1)):
        x = other.clone() if x is other else x
        torch.testing.assert_close(played(x)[2], sums(x)[2], rtol=0, atol=0)
    torch.testing.assert_close(played(other)[2], sums(other)[2], rtol=0, atol=0)
    assert len(played.tapes) >= 2


def reads(x):
    return scaled(x, 2.0 if x.sum().item() > 0 else 3.0)


def finds(x):
    return scaled(x[x.nonzero().flatten()], 2.0)


def takes_one_of_its_own(x, kept=torch.ones(4)):  # noqa: B008
    return scaled(kept, 2.0) + x[0]


@pytest.mark.parametrize("function", [reads, finds, takes_one_of_its_own])
def test_what_depends_on_more_than_kinds_is_not_played(function):
    played = remembered(function)
    for x in (torch.tensor([1.0, 2.0, 0.0, 4.0]), torch.tensor([-1.0, -2.0, 3.0, -4.0])):
        torch.testing.assert_close(played(x), function(x), rtol=0, atol=0)
    assert not any(tape.steps for tape in played.tapes.values())


def test_tensors_that_overlap_are_not_taken_for_those_that_do_not():
    @remembered
    def both(x, y):
        return scaled(x, 2), scaled(y, 3)

    x, y = draw(8), draw(8, seed=1)
    for a, b in ((x, x), (x, y), (y, y)):
        for got, want in zip(both(a, b), (a * 2, b * 3), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_neighbours_in_one_storage_are_told_apart():
    @remembered
    def both(x, y):
        return scaled(x, 2), scaled(y, 3)

    flat, other = draw(16), draw(16, seed=1)
    for a, b in ((flat[:8], flat[8:]), (flat[:8], other[8:]), (other[8:], flat[:8])):
        for got, want in zip(both(a, b), (a * 2, b * 3), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert all(tape.steps for tape in both.tapes.values())


def test_tapes_are_few(monkeypatch):
    monkeypatch.setattr(launching, "MOST_TAPES", 3)
    played = remembered(sums)
    for l in range(2, 12):
        played(draw(l))
        assert len(played.tapes) <= 3


def test_an_error_ends_the_recording():
    @remembered
    def fails(x):
        raise ValueError

    for _ in range(2):
        with pytest.raises(ValueError):
            fails(draw(2))
    played = remembered(sums)
    played(draw(4))
    assert played.tapes


def test_threads_record_and_play_side_by_side():
    def squares(x):  # without a kernel, since the interpreter itself is for one thread
        kept = torch.empty_like(x)
        return torch.mul(x, x, out=kept).sum(0)

    played, right = remembered(squares), []

    def work(seed):
        for i in range(300):
            x = draw(4 + i % 30, seed=seed + i)
            right.append(torch.equal(played(x), squares(x)))

    threads = [Thread(target=work, args=(100 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(right) == 4 * 300 and all(right)


B, L, H, P, N, G = 2, 40, 2, 16, 16, 1
D_INNER = H * P
CHANNELS = D_INNER + 2 * G * N


def a_mixer(dtype, seed):
    shapes = (B, L, D_INNER + CHANNELS + H), (CHANNELS, 4), (CHANNELS,), (H,), (H,), (H,), (D_INNER,)
    return [draw(*shape, seed=seed + i).to(dtype) for i, shape in enumerate(shapes)]


def documents(packed):
    return (torch.arange(L) // 16).int().expand(B, L).contiguous() if packed else None


def backward_of_a_mixer(dtype, packed, seed):
    inputs = a_mixer(dtype, seed)
    _, _, *kept = mixer.mixer_forward.__wrapped__(*inputs, G, 1e-5, documents(packed), None, None)
    return draw(B, L, D_INNER, seed=seed).to(dtype), *inputs, *kept, documents(packed), None, None


def rows(dtype, seed, n):
    return [draw(3, 5, 32, seed=seed + i).to(dtype) for i in range(n)]


CASES = {
    "mixer": (mixer.mixer_forward, lambda t, s: (*a_mixer(t, s), G, 1e-5, documents(False), None, None)),
    "packed mixer": (mixer.mixer_forward, lambda t, s: (*a_mixer(t, s), G, 1e-5, documents(True), None, None)),
    "mixer backward": (mixer.mixer_backward, lambda t, s: backward_of_a_mixer(t, False, s)),
    "packed mixer backward": (mixer.mixer_backward, lambda t, s: backward_of_a_mixer(t, True, s)),
    "norm": (norm.norm_forward, lambda t, s: (*rows(t, s, 2), draw(32, seed=s).to(t), 1e-5, 0.5)),
    "first norm": (norm.norm_forward, lambda t, s: (*rows(t, s, 1), None, draw(32, seed=s).to(t), 1e-5, 1.0)),
    "norm backward": (
        norm.norm_backward, lambda t, s: (rows(t, s, 1)[0], draw(32, seed=s).to(t), draw(15).abs(), *rows(t, s + 1, 2))
    ),
    "swiglu": (gating.swiglu_forward, lambda t, s: (*rows(t, s, 1),)),
    "swiglu backward": (gating.swiglu_backward, lambda t, s: (rows(t, s, 1)[0], rows(t, s + 1, 1)[0][..., :16])),
    "gate": (gating.gate_forward, lambda t, s: (*rows(t, s, 2),)),
    "gate backward": (gating.gate_backward, lambda t, s: (*rows(t, s, 3),)),
    "rotation": (
        rotary.turn, lambda t, s: (draw(2, 5, 2, 8, seed=s).to(t), torch.arange(5)[None], draw(4, seed=s), 1.0, False)
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_operation_from_its_tape_is_the_operation(name, dtype):
    function, make = CASES[name]
    function.tapes.clear()
    for seed in (0, 50):
        got, want = function(*make(dtype, seed)), function.__wrapped__(*make(dtype, seed))
        for ours, theirs in zip(*((r if isinstance(r, tuple) else (r,)) for r in (got, want)), strict=True):
            if theirs is None:
                assert ours is None
                continue
            assert ours.dtype == theirs.dtype and ours.stride() == theirs.stride()
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    (tape,) = function.tapes.values()
    assert tape.steps
