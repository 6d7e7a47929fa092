"""The kernels of a Mamba-2 mixer equal their plain twins, forward and backward, on the CPU: Triton's interpreter runs
them, which checks what they compute, not that they compile (tests/test_gpu.py does)."""

import os
from functools import partial

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported

import pytest
import torch

pytest.importorskip("triton")

from model import convolution, gated_norm, mixer, reference

# documents and rows begin and end in and between programs
CONV = {"ROWS": 4, "GROUP": 2, "BLOCK_D": 8, "num_warps": 1}
LENGTHS = [1, 2, 3, 5, 11]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}  # of the largest value: sums in another order; one rounding


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def document_ids(l):
    index = torch.arange(l)
    return torch.stack([(index >= 1).int() + (index >= 5) + (index >= 6), (index >= 4).int()])


def results(function, inputs, dtype=None):
    inputs = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    seeds = [draw(*t.shape, seed=1).to(inputs[0].dtype).to(t.dtype) for t in outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs, seeds)]


def assert_same(function, twin, inputs):
    """Outputs and gradients of `function` are those of its twin in float32."""
    for got, want in zip(results(function, inputs), results(twin, inputs, torch.float32), strict=True):
        assert got.dtype in (inputs[0].dtype, torch.float32) and got.shape == want.shape
        atol = TOLERANCE[inputs[0].dtype] * want.abs().max().item()
        torch.testing.assert_close(got.float(), want, rtol=0, atol=atol)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    for function in (convolution.conv_forward, convolution.conv_backward):
        monkeypatch.setattr(function, "__defaults__", (*function.__defaults__[:-1], CONV))
    monkeypatch.setattr(gated_norm, "CHANNELS", 64)  # of a tile: several rows
    for function in (gated_norm.norm_forward, gated_norm.norm_backward):
        monkeypatch.setitem(function.__defaults__[-1], "TILES", 2)


def in_wider_rows(x):
    """x, its rows apart as those of a slice."""
    return torch.cat([draw(*x.shape[:-1], 3, seed=9).to(x), x, x], dim=-1)[..., 3 : 3 + x.shape[-1]]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("l", LENGTHS)
def test_convolution_equals_its_twin(l, packed, dtype):
    ids = document_ids(l) if packed else None
    for width in (2, 4) if l == 5 else (4,):
        inputs = [draw(*size, dtype=dtype) for size in [(2, l, 10), (10, width), (10,), (2, width - 1, 10)]]
        for given in (inputs[:3], inputs):
            twins = [
                lambda x, w, b, *start, ops=ops: ops.causal_conv1d(in_wider_rows(x), w, b, ids, *start)
                for ops in (convolution, reference)
            ]
            assert_same(*twins, given)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n_groups, d", [(1, 24), (2, 32)])
def test_gated_norm_equals_its_twin(n_groups, d, dtype):
    inputs = [draw(*size, dtype=dtype, seed=i) for i, size in enumerate([(2, 7, d), (2, 7, d), (d,)])]
    for slices in (lambda x: x, in_wider_rows):
        twins = [
            lambda x, z, weight, ops=ops, slices=slices: ops.gated_rms_norm(slices(x), slices(z), weight, n_groups, 1e-5)
            for ops in (gated_norm, reference)
        ]
        assert_same(*twins, inputs)


def mixer_inputs(l, dtype, h=2, p=16, g=1, n=16):
    d_inner, channels = h * p, h * p + 2 * g * n
    sizes = [(2, l, d_inner + channels + h), (channels, 4), (channels,), (h,), (h,), (h,), (d_inner,)]
    return [draw(*size, dtype=dtype, seed=i) for i, size in enumerate(sizes)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("packed", [False, True])
def test_mixer_equals_its_twin(packed, dtype):
    l = 21
    ids = document_ids(l) if packed else None
    twins = [lambda *inputs, ops=ops: ops.mixer(*inputs, 1, 16, 1e-5, ids)[0] for ops in (mixer, reference)]
    assert_same(*twins, mixer_inputs(l, dtype))
