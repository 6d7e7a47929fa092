"""The kernels that write 8-bit floats equal their twins in plain PyTorch; here in Triton's interpreter."""

import interpreted  # isort: skip  # before the kernels
import numpy as np
import pytest
import torch

from model import fp8, fp8_kernels, fp8_reference
from model.fp8 import CURRENT_STEPS

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@pytest.fixture(autouse=True)
def conversion_of_the_gpu(monkeypatch):
    """The interpreter of Triton 3.6 makes 16 of 31.05, and a number of NaN, where a GPU rounds and saturates."""
    builder, dtypes = interpreted.interpreter.InterpreterBuilder, {"fp8e4nv": E4M3, "fp8e5": E5M2}
    convert = builder.create_fp_to_fp

    def create_fp_to_fp(self, source, wanted, rounding):
        dtype = dtypes.get(wanted.scalar.name)
        if dtype is None:
            return convert(self, source, wanted, rounding)
        most = torch.finfo(dtype).max
        values = torch.from_numpy(np.array(source.data, dtype=np.float32)).clamp(-most, most).to(dtype)
        return interpreted.interpreter.TensorHandle(values.view(torch.uint8).numpy(), wanted.scalar)

    monkeypatch.setattr(builder, "create_fp_to_fp", create_fp_to_fp)


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def both(name, seen, *args):
    """[(the kernel's, its twin's)] of what they return, and last of the largest magnitude that they have seen."""
    results = []
    for kernels in (fp8_kernels, fp8_reference):
        own = seen.clone()
        result = getattr(kernels, name)(*(own if arg is seen else arg for arg in args))
        results.append([*(result if isinstance(result, tuple) else (result,)), own])
    return list(zip(*results, strict=True))


def bits(x):
    return x.view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wanted", [E4M3, E5M2])
@pytest.mark.parametrize("shape", [(16, 16), (144, 80), (32, 208)])
def test_cast_equals_its_twin(shape, wanted, dtype):
    n, m = shape
    x = draw(n, m + 16, dtype=dtype)[:, :m] * 60  # rows at a stride
    x[3, 5], x[4, 4], x[5, 6], x[6, 7] = -1e9, 0, 1e-6, 3e-4

    seen, scale = torch.tensor(1.0), torch.tensor(2.0)
    for dim, parts in ((0, [x]), (0, [x, x[:16]]), (1, [x[:, :16], x])):
        *written, seens = both("cast", seen, scale, seen, wanted, dim, *parts)
        assert all(torch.equal(bits(got), bits(want)) for got, want in written)
        assert seens[0] == seens[1] == x.abs().max()
        assert torch.equal(bits(written[0][0]).t(), bits(written[1][0]))
    x[7, 8], x[8, 9], x[9, 10] = torch.nan, torch.inf, -torch.inf
    (out, _), (turned, _), seens = both("cast", seen, scale, seen, wanted, 0, x)
    assert out.isnan().nonzero().tolist() == [[7, 8], [8, 9], [9, 10]] and turned.isnan().sum() == 3
    assert seens[0] == seens[1] == torch.inf


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(16, 16), (80, 144)])
def test_swiglu_equals_its_twin(shape, dtype):
    n, f = shape
    gate_up, dh = draw(n, 2 * f, dtype=dtype) * 3, draw(n, f, dtype=dtype, seed=1)
    gate_up[2, 3], gate_up[2, f + 3] = -200.0, 30.0
    scale, seen = torch.tensor(8.0), torch.tensor(0.0)
    forward = both("swiglu", seen, gate_up, scale, seen, E4M3)
    backward = both("swiglu_backward", seen, dh, gate_up, scale, torch.tensor(512.0), seen, E4M3, E5M2)
    for got, want in (*forward, *backward):  # the sigmoid's last bit may round another way
        assert got.dim() == 0 or (got.float() != want.float()).float().mean() < 0.01
        torch.testing.assert_close(got.float(), want.float(), rtol=0.26, atol=1e-3)
    (h, _), (h_turned, _), (d, _), (d_turned, _) = forward[0], *backward[:3]
    assert torch.equal(bits(h_turned).t(), bits(h))
    assert torch.equal(bits(d).t(), bits(d_turned))


@pytest.mark.parametrize("steps", [0, CURRENT_STEPS])
def test_layers_on_the_kernels_are_those_on_their_twins(steps, monkeypatch):
    from test_fp8 import SHAPE, backward, make_model

    results = []
    for kernels in (fp8_kernels, fp8_reference):
        monkeypatch.setattr(fp8, "kernels_for", lambda x, kernels=kernels: kernels)
        model = make_model(config=SHAPE)
        backward(model)
        model.scales.end_step()
        model.scales.steps = steps
        results.append([*backward(model, seed=1), model.scales.seen])
    for one, other in zip(*results, strict=True):
        assert (one - other).norm() <= 0.01 * other.norm()
