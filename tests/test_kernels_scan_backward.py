"""The scan's backward kernels, run by Triton's interpreter on the CPU, against autograd through the plain twin."""

import math
import os

import pytest
import torch

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
pytest.importorskip("triton")

from einops import rearrange  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from model import reference, scan_backward  # noqa: E402

patch_tensor = interpreter._patch_lang_tensor


def patch_tensor_for_numpy(tensor, scope):
    """Triton 3.6 takes a loop's bound for a number, which NumPy 2.4 no longer does: it is an array of one."""
    patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = patch_tensor_for_numpy

NAMES = ["dx", "dlog", "dsteps", "dB", "dC", "dD", "dinitial"]


def make(b=1, l=70, h=2, p=16, g=1, n=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    inputs = {
        "x": draw(b, l, h, p), "dt": (draw(b, l, h).sigmoid() * math.log(100)).exp() / 1000, "A": -draw(h).exp() * 4,
        "B": draw(b, l, g, n), "C": draw(b, l, g, n), "D": draw(h), "initial": draw(b, h, n, p),
        "dy": draw(b, l, h, p), "dlast": draw(b, h, n, p),
    }  # fmt: skip
    return {name: t.to(dtype) if name in ("x", "B", "C", "dy") else t for name, t in inputs.items()}


def documents(l, *starts):
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
        _, state = reference.ssd(*(pad(t) for t in (x, dt)), inputs["A"], pad(B), pad(C), inputs["D"], chunk, now, state)
    return rearrange(torch.stack(states, 1), "b c h n p -> b c h p n").to(x.dtype).contiguous()


def backward(inputs, chunk, ids=None, **settings):
    steps, cum = decays(inputs["dt"], inputs["A"], chunk, ids)
    dlast = rearrange(inputs["dlast"], "b h n p -> b h p n")
    x, A, B, C, D, dy = (inputs[name] for name in ("x", "A", "B", "C", "D", "dy"))
    state = entering(inputs, chunk, ids)
    return scan_backward.scan_backward(dy, dlast, x, steps, cum, A, B, C, D, ids, state, **settings)


def truth(inputs, ids=None):
    """Autograd through the twin in float64, where dt's gradient as a step and as a decay are told apart."""
    leaves = {name: t.double().requires_grad_() for name, t in inputs.items() if name not in ("dy", "dlast")}
    x, dt, A, B, C, D, initial = leaves.values()
    steps, logs = dt.detach().requires_grad_(), (dt * A).detach().requires_grad_()
    cast, torch.Tensor.float = torch.Tensor.float, torch.Tensor.double  # the twin computes in float32 on purpose
    try:
        # x * dt in the place of x, with a step of 1 and the log decays themselves; D's part on its own
        ys, lasts = [], []
        for head in range(x.shape[2]):
            group = head // (x.shape[2] // B.shape[2])
            y, last = recurrence(
                x[:, :, head], steps[:, :, head], logs[:, :, head], B[:, :, group], C[:, :, group], initial[:, head], ids
            )
            ys.append(y + D[head] * x[:, :, head])
            lasts.append(last)
    finally:
        torch.Tensor.float = cast
    outputs = [torch.stack(ys, 2), torch.stack(lasts, 1)]
    dx, dlog, dsteps, dB, dC, dD, dinitial = torch.autograd.grad(
        outputs, [x, logs, steps, B, C, D, initial], [inputs["dy"].double(), inputs["dlast"].double()]
    )
    return dx, dlog, dsteps, dB, dC, dD, rearrange(dinitial, "b h n p -> b h p n")


def recurrence(x, steps, logs, B, C, state, ids):
    ys = []
    for t in range(x.shape[1]):
        decay = logs[:, t].exp()
        if ids is not None and t > 0:
            decay = decay * (ids[:, t] == ids[:, t - 1])
        state = decay[:, None, None] * state + B[:, t, :, None] * (steps[:, t, None] * x[:, t])[:, None]
        ys.append((C[:, t, :, None] * state).sum(1))
    return torch.stack(ys, 1), state


def assert_gradients(got, want, tolerance):
    for name, mine, true in zip(NAMES, got, want, strict=True):
        error = (mine.double() - true).abs().max() / true.abs().max()
        assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("chunk", [64, 128])
@pytest.mark.parametrize("starts", [None, (0, 5, 63, 64, 100), (0, 33, 40, 96)])
def test_gradients_equal_those_of_the_recurrence(chunk, starts):
    inputs = make(l=150)
    ids = starts and documents(150, *starts)
    assert_gradients(backward(inputs, chunk, ids), truth(inputs, ids), 1e-5)
