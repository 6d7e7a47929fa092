"""The kernels of a Mamba-2 mixer equal their plain twins, forward and backward, and keep documents apart. Triton's
interpreter runs them on the CPU: that checks what they compute, not that they compile (tests/test_gpu.py does)."""

import interpreted  # noqa: F401  # before any kernel
import pytest
import torch

from model import convolution, gated_norm, mixer, reference, scan

# documents begin and end in and between programs
CONV = {"ROWS": 4, "GROUP": 2, "STAGES": 1, "BLOCK_D": 8, "num_warps": 1}
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}  # of the largest value: sums in another order; one rounding


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    for function in (convolution.conv_forward, convolution.conv_backward):
        monkeypatch.setattr(function, "__defaults__", (*function.__defaults__[:-1], CONV))
    monkeypatch.setattr(gated_norm, "CHANNELS", 64)  # of a tile: several rows
    monkeypatch.setattr(gated_norm, "PROGRAMS", 2)  # of several tiles
    monkeypatch.setitem(gated_norm.FORWARD, "TILES", 2)


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def document_ids(l):
    index = torch.arange(l)
    return torch.stack([(index >= 1).int() + (index >= 5) + (index >= 6), (index >= 4).int()])


def results(function, inputs, dtype=None):
    """What a function gives, and the gradients of its inputs for fixed gradients of what it gives."""
    inputs = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    seeds = [draw(*t.shape, seed=1).to(t.dtype) for t in outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs, seeds)]


def assert_same(function, twin, inputs):
    """Outputs and gradients of `function` are those of its twin in float32."""
    for got, want in zip(results(function, inputs), results(twin, inputs, torch.float32), strict=True):
        assert got.dtype == inputs[0].dtype and got.shape == want.shape
        atol = TOLERANCE[got.dtype] * want.abs().max().item()
        torch.testing.assert_close(got.float(), want, rtol=0, atol=atol)


def in_wider_rows(x):
    """x, its rows apart as those of a slice."""
    return torch.cat([x, x], dim=-1)[..., x.shape[-1] :]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("l", [1, 3, 11])
def test_convolution_equals_its_twin(l, packed, dtype):
    ids = document_ids(l) if packed else None
    for width, carried in ((4, True), (2, False)):
        inputs = [draw(*size, dtype=dtype) for size in [(2, l, 10), (10, width), (10,), (2, width - 1, 10)]]
        twins = [
            lambda x, *rest, ops=ops: ops.causal_conv1d(in_wider_rows(x), *rest[:2], ids, *rest[2:])
            for ops in (convolution, reference)
        ]
        assert_same(*twins, inputs if carried else inputs[:3])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n_groups, d", [(1, 24), (2, 32)])
def test_gated_norm_equals_its_twin(n_groups, d, dtype):
    inputs = [draw(*size, dtype=dtype, seed=i) for i, size in enumerate([(2, 7, d), (2, 7, d), (d,)])]
    twins = [
        lambda x, z, weight, ops=ops: ops.gated_rms_norm(x, in_wider_rows(z), weight, n_groups, 1e-5)
        for ops in (gated_norm, reference)
    ]
    assert_same(*twins, inputs)


def mixer_inputs(l, dtype=torch.float32, h=2, p=8, g=1, n=8):
    d_inner, channels = h * p, h * p + 2 * g * n
    sizes = [(2, l, d_inner + channels + h), (channels, 4), (channels,), (h,), (h,), (h,), (d_inner,)]
    return [draw(*size, dtype=dtype, seed=i) for i, size in enumerate(sizes)]


def run_mixer(ops, *inputs, ids=None, states=()):
    return ops.mixer(*inputs, 1, 16, 1e-5, ids, *states)


def test_mixer_equals_its_twin():
    twins = [lambda *inputs, ops=ops: run_mixer(ops, *inputs, ids=document_ids(9))[0] for ops in (mixer, reference)]
    inputs = mixer_inputs(9)
    inputs[0][..., -2:] *= 10  # steps that are far below 1, and far above
    assert_same(*twins, inputs)


def test_mixer_is_its_parts(monkeypatch):
    inputs = mixer_inputs(9, torch.bfloat16)
    whole = results(lambda *inputs: run_mixer(mixer, *inputs)[0], inputs)
    for module, name in ((convolution, "causal_conv1d"), (scan, "ssd"), (gated_norm, "gated_rms_norm")):
        monkeypatch.setattr(reference, name, getattr(module, name))
    parts = results(lambda *inputs: run_mixer(reference, *inputs)[0], inputs)
    for got, want in zip(whole, parts, strict=True):  # the steps' logarithm is another, so that some roundings differ
        torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-3 * want.abs().max().item())


def test_mixer_goes_on_from_its_states():
    zxbcdt, *weights = mixer_inputs(9)
    whole = run_mixer(mixer, zxbcdt, *weights)
    parts, states = [], ()
    for part in zxbcdt.split([5, 1, 3], dim=1):
        y, *states = run_mixer(mixer, part, *weights, states=states)
        parts.append(y)
    for got, want in zip([torch.cat(parts, dim=1), *states], whole, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_a_document_changes_no_bit_of_another():
    ids, (zxbcdt, *weights) = document_ids(9)[:1], mixer_inputs(9)
    zxbcdt, changed = zxbcdt[:1], ids == 1  # from 1 to 4
    other = torch.where(changed[..., None], draw(*zxbcdt.shape, seed=7), zxbcdt)
    dy = draw(1, 9, 16, seed=8).masked_fill(changed[..., None], 0)
    outputs = []
    for inputs in (zxbcdt, other):
        inputs = inputs.clone().requires_grad_()
        y = run_mixer(mixer, inputs, *weights, ids=ids)[0]
        outputs.append((y.detach(), *torch.autograd.grad(y, inputs, dy)))
    (y, dzxbcdt), (other_y, other_dzxbcdt) = outputs
    assert torch.equal(y[~changed], other_y[~changed]) and not torch.equal(y, other_y)
    assert torch.equal(dzxbcdt[~changed], other_dzxbcdt[~changed])
    assert not dzxbcdt[changed].any() and dzxbcdt[~changed].any()
