"""An operation played from its tape does what it did when it was taped, to other tensors. In Triton's interpreter."""

from dataclasses import replace
from threading import Thread

import interpreted  # noqa: F401  # before any kernel
import pytest
import torch
import triton
import triton.language as tl
from random_models import SHAPE, random_tokens, sharpened
from remembered_operations import OPERATIONS, WITH_FP8, assert_same_bits, assert_same_from_its_tape

from model import fused, gating, hybrid, launching, mixer, norm, rotary
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
    assert tape.room == 2 * launching.ALIGNMENT  # both temporary tensors


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
    assert not any(tape.alike for tape in played.tapes.values())


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
    assert all(tape.alike for tape in both.tapes.values())


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATIONS | WITH_FP8)
def test_operation_from_its_tape_is_the_operation(name, dtype):
    assert_same_from_its_tape(name, dtype)


def test_memory_that_was_freed_comes_back_for_other_sizes():
    """Addresses come back with other shapes and numbers: nothing of before may be found there."""
    for i in range(12):
        n = (4, 6, 5)[i % 3]
        x, update = draw(n, 7, 32, seed=i), draw(n, 7, 32, seed=100 + i)
        got = norm.norm_forward(x, update, torch.ones(32), 1e-5, 0.5)
        assert_same_bits(got, norm.norm_forward.__wrapped__(x, update, torch.ones(32), 1e-5, 0.5))
        del x, update, got


@pytest.mark.parametrize("recompute", ["none", "layer"])
def test_model_from_its_tapes_is_the_model(recompute, monkeypatch):
    """Gradients of a step without tapes, one that is taped and one that is played; layers that run again, too."""
    monkeypatch.setattr(hybrid, "load_ops", lambda name: fused)
    model = sharpened(replace(SHAPE, layer_pattern="MA"), recompute=recompute)
    tokens = random_tokens(1, 12)
    documents = (torch.arange(12) // 5).expand_as(tokens)

    def gradients():
        model.zero_grad()
        model(tokens, targets=tokens.roll(-1, 1), document_ids=documents).backward()
        return tuple(parameter.grad.clone() for parameter in model.parameters())

    with monkeypatch.context() as without:
        for module in (gating, mixer, norm, rotary):
            for name, function in vars(module).items():
                if hasattr(function, "tapes"):
                    without.setattr(module, name, function.__wrapped__)
        want = gradients()
    for _ in range(2):
        assert_same_bits(gradients(), want)
