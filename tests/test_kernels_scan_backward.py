"""The scan's backward kernels, run by Triton's interpreter on the CPU, against autograd through the plain twin."""

import math

import interpreted  # noqa: F401  # before any kernel
import pytest
import torch
from einops import rearrange

from model import reference
from model.scan_backward import scan_backward

NAMES = ["dx", "dlog", "dsteps", "dB", "dC", "dD", "dinitial"]


def make(b=1, l=70, h=1, p=16, g=1, n=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    inputs = {
        "x": draw(b, l, h, p), "dt": (draw(b, l, h).sigmoid() * math.log(100)).exp() / 1000, "A": -draw(h).exp() * 4,
        "B": draw(b, l, g, n), "C": draw(b, l, g, n), "D": draw(h), "initial": draw(b, h, n, p),
        "dy": draw(b, l, h, p), "dlast": draw(b, h, n, p),
    }  # fmt: skip
    return {name: t.to(dtype) if name in ("x", "B", "C", "dy") else t for name, t in inputs.items()}


def documents(l, *starts):
    """Of one row: the numbers of documents that begin at 0 and at these places."""
    return sum((torch.arange(l) >= start).int() for start in starts)[None]


def decays(dt, A, chunk, ids):
    """dt in chunks and the decays summed up, as the forward pass keeps them."""
    l = dt.shape[1]
    steps = rearrange(torch.nn.functional.pad(dt, (0, 0, 0, -l % chunk)), "b (c q) h -> b h c q", q=chunk).contiguous()
    logs = steps * A[:, None, None]
    if ids is None:
        return steps, logs.cumsum(-1)
    ids = torch.cat([ids, ids[:, -1:].expand(-1, -l % chunk)], dim=1)
    return steps, reference.cumsum_by_document(logs, rearrange(ids, "b (c q) -> b 1 c q", q=chunk))


def entering(inputs, chunk, ids):
    """The state at each chunk's start, (b, c, h, p, n)."""
    x, dt, B, C = (inputs[name] for name in ("x", "dt", "B", "C"))
    states, state = [], inputs["initial"]
    for start in range(0, x.shape[1], chunk):
        here = slice(start, start + chunk)
        states.append(state)
        before = max(start - 1, 0)
        now = None if ids is None else ids[:, [before, *range(start, min(start + chunk, x.shape[1]))]]
        # a first token of the document before, which adds nothing
        pad = lambda t, here=here: torch.cat([torch.zeros_like(t[:, :1]), t[:, here]], dim=1)  # noqa: E731
        _, state = reference.ssd(
            *(pad(t) for t in (x, dt)), inputs["A"], pad(B), pad(C), inputs["D"], chunk, now, state
        )
    return rearrange(torch.stack(states, 1), "b c h n p -> b c h p n").to(x.dtype).contiguous()


def backward(inputs, chunk, ids=None, **settings):
    steps, cum = decays(inputs["dt"], inputs["A"], chunk, ids)
    dlast = inputs["dlast"]
    if dlast is not None:
        dlast = rearrange(dlast, "b h n p -> b h p n")
    x, A, B, C, D, dy = (inputs[name] for name in ("x", "A", "B", "C", "D", "dy"))
    state = entering(inputs, chunk, ids)
    return scan_backward(dy, dlast, x, steps, cum, B, C, D, ids, state, **settings)


def truth(inputs, ids=None):
    """Autograd through the recurrence in float64, where dt as a step and as a decay are told apart."""
    leaves = {name: t.double().requires_grad_() for name, t in inputs.items() if name not in ("dy", "dlast")}
    x, dt, A, B, C, D, state = leaves.values()
    steps, logs = dt.detach().requires_grad_(), (dt * A).detach().requires_grad_()
    ys, last = [], state
    for t in range(x.shape[1]):
        decay = logs[:, t].exp()
        if ids is not None and t > 0:
            decay = decay * (ids[:, t] == ids[:, t - 1])[:, None]
        now = [m[:, t].repeat_interleave(x.shape[2] // m.shape[2], dim=1) for m in (B, C)]  # (b, h, n)
        fed = now[0][..., None] * (steps[:, t, :, None] * x[:, t])[:, :, None]
        last = decay[..., None, None] * last + fed
        ys.append((now[1][..., None] * last).sum(2) + D[:, None] * x[:, t])
    found = torch.autograd.grad(
        [torch.stack(ys, 1), last], [x, logs, steps, B, C, D, state], [inputs["dy"].double(), inputs["dlast"].double()]
    )
    return *found[:-1], rearrange(found[-1], "b h n p -> b h p n")


def assert_gradients(got, want, tolerance):
    for name, mine, true in zip(NAMES, got, want, strict=True):
        error = (mine.double() - true).abs().max() / true.abs().max()
        assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("chunk", [64, 128])
@pytest.mark.parametrize("starts", [None, (5, 63, 64, 100), (33, 40, 96)])
def test_gradients_equal_those_of_the_recurrence(chunk, starts):
    inputs = make(l=133)
    ids = starts and documents(133, *starts)
    assert_gradients(backward(inputs, chunk, ids), truth(inputs, ids), 2e-6)


@pytest.mark.parametrize(
    "shape",
    [{"l": 2}, {"b": 2, "l": 33, "h": 4, "g": 2}, {"l": 40, "h": 3, "n": 48, "p": 32}, {"l": 17, "h": 1, "p": 128}],
    ids=str,
)
def test_shapes(shape):
    inputs = make(**shape)
    assert_gradients(backward(inputs, 64), truth(inputs), 2e-6)


def test_state_of_256_in_float32_and_bfloat16():
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2e-2)):
        inputs = make(l=20, h=1, n=256, dtype=dtype)
        assert_gradients(backward(inputs, 64), truth(inputs), tolerance)


@pytest.mark.parametrize("chunk", [64, 128])
def test_bfloat16_is_a_rounding_away(chunk):
    inputs = make(l=130, n=32, dtype=torch.bfloat16)
    ids = documents(130, 50, 64)
    assert_gradients(backward(inputs, chunk, ids), truth(inputs, ids), 2e-2)


def test_no_last_state():
    inputs = make(l=40)
    with_zeros = backward(inputs | {"dlast": torch.zeros_like(inputs["dlast"])}, 64)
    for one, other in zip(backward(inputs | {"dlast": None}, 64), with_zeros, strict=True):
        assert torch.equal(one, other)


def test_gradients_go_into_slices_of_one_buffer():
    inputs = make(l=40, g=2, h=4)
    want = backward(inputs, 64)
    wide = torch.full((1, 40, 8 + 4 * 16 + 2 * 2 * 16), torch.nan)
    dx, dB, dC = wide[..., 8:].split([64, 32, 32], dim=-1)
    x, B, C = torch.cat([inputs[name].flatten(2) for name in ("x", "B", "C")], dim=-1).split([64, 32, 32], dim=-1)
    split = lambda t, width: t.unflatten(-1, (-1, width))  # noqa: E731
    slices = {"x": split(x, 16), "B": split(B, 16), "C": split(C, 16)}
    outs = {"dx_out": split(dx, 16), "dB_out": split(dB, 16), "dC_out": split(dC, 16)}
    for one, other in zip(backward(inputs | slices, 64, **outs), want, strict=True):
        assert torch.equal(one, other)
    assert wide[..., :8].isnan().all() and not wide[..., 8:].isnan().any()


@pytest.mark.parametrize("dtype, start", [(torch.float32, 20), (torch.float32, 64), (torch.bfloat16, 40)])
def test_a_document_leaves_no_trace_in_the_gradients_of_another(dtype, start):
    inputs, other = make(l=80, dtype=dtype), make(l=80, dtype=dtype, seed=1)
    ids = documents(80, start)
    first = ids[0] == 0

    def mixed(here, others, *more):
        """The inputs, with those of other where here is False, and these others."""
        both = {name: inputs[name].clone() for name in ("x", "dt", "B", "C", "dy")}
        for name, t in both.items():
            t[:, ~here] = others[name][:, ~here]
        return inputs | both | {name: others[name] for name in more}

    got = backward(inputs, 128, ids)
    second_changed = backward(mixed(first, other, "dlast"), 128, ids)
    first_changed = backward(mixed(~first, other, "initial"), 128, ids)
    for i in range(5):  # of each token
        assert torch.equal(got[i][:, first], second_changed[i][:, first])
        assert torch.equal(got[i][:, ~first], first_changed[i][:, ~first])
        assert not torch.equal(got[i][:, first], first_changed[i][:, first])
    assert torch.equal(got[6], second_changed[6])  # the row begins with the first document's state


def test_decay_gradients_that_cancel_are_exact_in_float32():
    inputs = make(l=128)
    inputs["A"].fill_(-1e-3)  # hardly any decay: every pair in the chunk counts
    _, dlog, *_ = backward(inputs, 128)
    _, true, *_ = truth(inputs)
    assert ((dlog - true).norm() / true.norm()) < 2e-6


def test_pointers_give_what_the_copy_engine_gives(monkeypatch):
    inputs = make(l=70, h=2)
    want = backward(inputs, 64)
    monkeypatch.setattr("model.scan_backward.has_copy_engine", lambda device: False)
    for one, other in zip(backward(inputs, 64), want, strict=True):
        assert torch.equal(one, other)
