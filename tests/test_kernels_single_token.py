"""The kernels for one new token against their plain twins, through Triton's interpreter: no GPU needed."""

import interpreted  # noqa: F401  # first
import pytest
import torch

from model import reference, single_token
from model.attention import alibi_slopes


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# the interpreter cuts bfloat16's digits off, 0.8 % each time
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def near(got, want, dtype):
    """want: the twin's, in float32 from the same numbers; the twin in bfloat16 rounds more often than the kernel."""
    assert got.shape == want.shape
    error = (got.float() - want).abs().max() / want.abs().max()
    assert error <= TOLERANCE[dtype], f"{error:.1e}"


def floats(*tensors):
    return [t.float() for t in tensors]


@pytest.mark.parametrize(
    ("shape", "widths", "dtype"),
    [
        ((1, 1, 48), [19, 8, 3, 1, 40], torch.float32),
        ((1, 1, 48), [19, 8, 3, 1, 40], torch.bfloat16),
        ((1, 70), [21], torch.bfloat16),
        ((1, 33), [5, 6], torch.float32),
        ((5, 1, 48), [19, 8], torch.float16),  # tensor cores
        ((20, 1, 70), [67, 1, 2], torch.float16),
    ],
    ids=str,
)
def test_products(shape, widths, dtype):
    x = draw(*shape, dtype=dtype)
    weights = [draw(width, shape[-1], seed=width, dtype=dtype) for width in widths]
    got = single_token.products(x, weights, block_n=16, block_k=32)
    assert got.dtype == dtype
    near(got, reference.products(x.float(), floats(*weights)), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_mamba_step(groups, dtype):
    b, h, n, p, w = 2, 4, 24, 20, 4
    channels = h * p + 2 * groups * n
    weight, bias = draw(channels, w, seed=1, dtype=dtype), draw(channels, seed=2, dtype=dtype)
    A_log, D, dt_bias = (draw(h, seed=seed, dtype=dtype) for seed in (3, 4, 5))
    norm = draw(h * p, seed=6, dtype=dtype), groups, 1e-5
    lengths = torch.tensor([0, 6])
    buffers = [draw(b, w, channels, seed=6, dtype=dtype), draw(b, h, n, p, seed=7)]
    twins, parameters = floats(*(t.clone() for t in buffers)), (weight, bias, A_log, D, dt_bias)
    for t in range(5):
        projected = draw(b, 1, h * p + channels + h, seed=10 + t, dtype=dtype)
        projected[..., -h:] *= 8  # either side of softplus's cut
        z, xBC, dt = projected.split([h * p, channels, h], dim=-1)
        y = single_token.mamba_step(xBC, dt, *parameters, *buffers, lengths, block_p=8)
        assert y.dtype == dtype
        want = reference.mixer_step(*floats(projected, *parameters, norm[0]), *norm[1:], *twins, lengths)
        near(reference.gated_rms_norm(y.float(), z.float(), *norm), want, dtype)
        assert torch.equal(buffers[0].float(), twins[0])
        near(buffers[1], twins[1], dtype)
        lengths += 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [(4, 2, 16), (3, 3, 24)], ids=str)
@pytest.mark.parametrize("positions", ["rope", "alibi", "none"])
def test_attention_step(positions, heads, dtype):
    (h, n_kv, p), b, capacity = heads, 3, 150
    cache = torch.full((2, b, capacity, n_kv, p), torch.nan, dtype=dtype)
    lengths = torch.tensor([0, 31, 128])
    for row, n in enumerate(lengths.tolist()):
        cache[:, row, :n] = draw(2, n, n_kv, p, seed=row, dtype=dtype)
    options = {"scale": 0.3}
    if positions == "rope":
        options |= {"frequencies": 0.5 ** torch.arange(p // 2), "magnitude": 1.1}
    elif positions == "alibi":
        options["slopes"] = alibi_slopes(h, "cpu")
    twin = cache.float().nan_to_num()
    for t in range(3):
        projected = draw(b, 1, (h + 2 * n_kv) * p, seed=10 + t, dtype=dtype)
        q, k, v = (part.unflatten(2, (-1, p)) for part in projected.split([h * p, n_kv * p, n_kv * p], dim=-1))
        y = single_token.attention_step(q, k, v, *cache, lengths, **options, block=16)
        assert y.dtype == dtype
        near(y, reference.attention_step(*floats(q, k, v), *twin, lengths, **options), dtype)
        lengths += 1
    near(cache.nan_to_num(), twin, dtype)  # what was written, and nothing else
