"""Attention within packed documents: the Triton kernels equal the plain twin, outputs and gradients; no GPU needed.

Triton's interpreter runs them on the CPU, with tiles of 16. The twin in float32 is the truth: in bfloat16 the shares
and their gradients are rounded before a product, by 2^-8 each (the interpreter cuts off: 2^-7), and cancel in part.
"""

import interpreted  # noqa: F401  # isort: skip  # before the kernels
import pytest
import torch

from model import fused, reference
from model.layers import Packing
from model.packed_attention import Plan, Tile, packed_attention

TILE = Tile(16, 16, 4, 2)
PLAN = Plan(TILE, TILE, TILE)
ONE, SHORT, LONG = [0], [0, 1, 2, 10, 16, 30], [0, 5, 33]  # where documents begin: on and off the edges of tiles
TOLERANCE = 2e-2


def packed(l, *rows):
    index = torch.arange(l)
    return Packing(torch.stack([sum((index >= start).long() for start in starts) for starts in rows]))


def draw(b, l, h, k, p, dtype=torch.bfloat16):
    """Queries, keys and values as slices of one product, and a gradient."""
    generator = torch.Generator().manual_seed(l)
    product = torch.randn(b, l, (h + 2 * k) * p + 8, generator=generator).to(dtype)
    inputs = [t.unflatten(-1, (-1, p)).detach() for t in product[..., 8:].split([h * p, k * p, k * p], dim=-1)]
    return inputs, torch.randn(b, l, h, p, generator=generator).to(dtype)


def results(function, inputs, dy, **settings):
    inputs = [t.detach().requires_grad_() for t in inputs]
    y = function(*inputs, **settings)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy.to(y.dtype))]


def assert_equals_its_twin(inputs, dy, plan=PLAN, **settings):
    truth = results(reference.attention, [t.float() for t in inputs], dy, **settings)
    for got, want in zip(results(packed_attention, inputs, dy, plan=plan, **settings), truth, strict=True):
        assert got.dtype == inputs[0].dtype and got.shape == want.shape and got.is_contiguous()
        size = want.abs().max().clamp(min=0.5)  # the gradient of a token alone is nothing but rounding
        error = (got.float() - want).abs().max() / size
        assert error <= TOLERANCE, f"{tuple(want.shape)}: {error:.2e}"


@pytest.mark.parametrize("rows", [(ONE,), (SHORT, LONG), (LONG, SHORT)], ids=["one", "short", "long"])
@pytest.mark.parametrize("h, k", [(1, 1), (4, 2), (4, 1), (3, 1)])
def test_packed_attention_equals_its_twin(h, k, rows):
    inputs, dy = draw(len(rows), 37, h, k, 64)
    assert_equals_its_twin(inputs, dy, packing=packed(37, *rows))


@pytest.mark.parametrize("l", [1, 15, 16, 40])
def test_rows_of_any_length_equal_their_twins(l):
    inputs, dy = draw(2, l, 4, 2, 64)
    assert_equals_its_twin(inputs, dy, packing=packed(l, SHORT, LONG), scale=0.2)
    assert_equals_its_twin(inputs, dy)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_tiles_of_other_shapes_equal_their_twins(heads):
    inputs, dy = draw(1, 40, 8, 2, 128, torch.float16)
    plan = Plan(Tile(32, 16, 4, 2, heads), Tile(16, 32, 4, 2, heads), Tile(32, 16, 4, 2, heads))
    assert_equals_its_twin(inputs, dy, plan, packing=packed(40, LONG))


def test_rows_that_the_copy_engine_cannot_read_equal_their_twins():
    inputs, dy = draw(2, 20, 4, 2, 64)
    wide = [torch.cat([t[..., :1], t], dim=-1)[..., 1:] for t in inputs]  # an odd number of channels from row to row
    assert_equals_its_twin(wide, dy, packing=packed(20, SHORT, LONG))


def test_a_document_changes_nothing_in_another():
    inputs, dy = draw(2, 37, 4, 2, 64)
    packing = packed(37, SHORT, LONG)
    changed = packing.document_ids == 1
    others, other_dy = [t.clone() for t in inputs], dy.clone()
    for t in (*others, other_dy):
        t[changed] *= -100
    before = results(packed_attention, inputs, dy, packing=packing, plan=PLAN)
    after = results(packed_attention, others, other_dy, packing=packing, plan=PLAN)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[~changed], other[~changed]) and not torch.equal(one, other)


def test_fused_attention_takes_packed_rows_to_it(monkeypatch):
    monkeypatch.setattr("model.packed_attention.HOPPER", PLAN)
    inputs, dy = draw(1, 20, 4, 2, 64)
    packing = packed(20, LONG)
    want = results(packed_attention, inputs, dy, packing=packing, scale=0.1)
    for one, other in zip(results(fused.attention, inputs, dy, packing=packing, scale=0.1), want, strict=True):
        assert torch.equal(one, other)
    assert "cu_seqlens" not in vars(packing)  # which waits for the GPU
