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


def both(name, make):
    """What the kernel and its twin write: make() gives their arguments, those that are written to first."""
    results = []
    for kernels in (fp8_kernels, fp8_reference):
        written, rest = make()
        arguments = {**written, **rest}
        getattr(kernels, name)(**arguments)
        results.append(written)
    return [(key, results[0][key], results[1][key]) for key in results[0]]


def bits(x):
    return x.view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wanted", [E4M3, E5M2])
@pytest.mark.parametrize("shape", [(16, 16), (144, 80), (32, 208)])
def test_cast_equals_its_twin(shape, wanted, dtype):
    n, m = shape
    x = draw(n, m + 16, dtype=dtype)[:, :m] * 60  # rows at a stride
    x[3, 5], x[4, 4], x[5, 6], x[6, 7] = -1e9, 0, 1e-6, 3e-4

    def make():
        out, turned = torch.zeros(n, m + 32, dtype=wanted), torch.zeros(m, n + 48, dtype=wanted)
        written = {"out": out[:, 16:-16], "turned": turned[:, 32:-16], "seen": torch.tensor(1.0)}
        return written, {"x": x, "scale": torch.tensor(2.0)}

    for name, got, want in both("cast", make):
        assert torch.equal(bits(got), bits(want)) if name != "seen" else got == want == x.abs().max(), name
    x[7, 8], x[8, 9], x[9, 10] = torch.nan, torch.inf, -torch.inf
    (_, out, _), (_, turned, _), (_, seen, same) = both("cast", make)
    assert out.isnan().nonzero().tolist() == [[7, 8], [8, 9], [9, 10]] and turned.isnan().sum() == 3
    assert seen == same == torch.inf


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(16, 16), (80, 144)])
def test_swiglu_equals_its_twin(shape, dtype):
    n, f = shape
    gate_up, dh = draw(n, 2 * f, dtype=dtype) * 3, draw(n, f, dtype=dtype, seed=1)
    gate_up[2, 3], gate_up[2, f + 3] = -200.0, 30.0
    scale = torch.tensor(8.0)

    def forward():
        return {"out": torch.zeros(n, f, dtype=E4M3), "seen": torch.zeros(())}, {"gate_up": gate_up, "scale": scale}

    def backward():
        written = {
            "h_turned": torch.zeros(f, n, dtype=E4M3), "out": torch.zeros(n, 2 * f, dtype=E5M2),
            "turned": torch.zeros(2 * f, n, dtype=E5M2), "seen": torch.zeros(()),
        }  # fmt: skip
        return written, {"dh": dh, "gate_up": gate_up, "h_scale": scale, "scale": torch.tensor(512.0)}

    h = None
    for direction, make in (("swiglu", forward), ("swiglu_backward", backward)):
        found = {key: (got, want) for key, got, want in both(direction, make)}
        for key, (got, want) in found.items():  # the sigmoid's last bit may round another way
            assert key == "seen" or (got.float() != want.float()).float().mean() < 0.01, key
            torch.testing.assert_close(got.float(), want.float(), rtol=0.26, atol=1e-3, msg=key)
        if h is None:
            h = found["out"][0]
    assert torch.equal(bits(found["h_turned"][0]).t(), bits(h))
    assert torch.equal(bits(found["out"][0]).t(), bits(found["turned"][0]))


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
