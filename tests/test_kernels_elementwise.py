"""Norms, gates, rotation and loss: the Triton kernels equal their plain twins, outputs and gradients; no GPU needed.

Triton's interpreter runs them on the CPU, so sizes are small. The twin in float32 is the truth: float32 sums differ by
their order, bfloat16 by one rounding of the result. A GPU rounds to the nearest, the interpreter cuts off: 2^-7.
"""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import interpreted  # noqa: F401  # isort: skip  # before the kernels
import pytest
import torch
from random_models import SHAPE, random_tokens, sharpened

from model import fused, reference
from model.cross_entropy import _cross_entropy_kernel, cross_entropy
from model.gating import sigmoid_gate, swiglu
from model.layers import as_one
from model.norm import add_rms_norm, rms_norm
from model.rotary import rotary

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}


def draw(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).bfloat16().to(dtype)  # the same numbers in both dtypes


def results(function, inputs, dtype=None):
    """What a function gives, and the gradients of its inputs, for fixed gradients of what it gives."""
    inputs = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    seeds = [draw(*t.shape, seed=1 + i, dtype=t.dtype) for i, t in enumerate(outputs)]
    return [*outputs, *torch.autograd.grad(outputs, inputs, seeds)]


def assert_same(kernel, twin, inputs, dtype):
    truth, plain = results(twin, inputs, torch.float32), results(twin, inputs)
    for got, want, same in zip(results(kernel, inputs), truth, plain, strict=True):
        assert got.dtype == same.dtype and got.shape == same.shape
        size = want.abs().max()
        error, allowed = ((t.float() - want).abs().max() / size for t in (got, same))
        assert error <= max(TOLERANCE[dtype], 1.1 * allowed), f"{tuple(want.shape)}: {error:.2e}, twin {allowed:.2e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 9, 64), (1, 3, 5), (3, 4, 640), (2, 1, 2100), (7, 8192)])
def test_norms_equal_their_twins(shape, weight_dtype, dtype):
    x, update = (draw(*shape, seed=i, dtype=dtype) for i in range(2))
    weight = draw(shape[-1], dtype=weight_dtype)
    assert_same(lambda *t: rms_norm(*t, 1e-5), lambda *t: reference.rms_norm(*t, 1e-5), [x, weight], dtype)
    for multiplier in (1.0, 0.22):
        settings = dict(eps=1e-5, multiplier=multiplier)
        kernel, twin = (partial(norm, **settings) for norm in (add_rms_norm, reference.add_rms_norm))
        assert_same(kernel, twin, [x, update, weight], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_with_nothing_to_add_passes_its_input_on(dtype):
    kernel, twin = (
        lambda x, weight, norm=norm: norm(x, None, weight, 1e-5) for norm in (add_rms_norm, reference.add_rms_norm)
    )
    inputs = [draw(2, 3, 64, dtype=dtype), draw(64, dtype=dtype)]
    assert torch.equal(kernel(*inputs)[0], inputs[0])
    assert_same(kernel, twin, inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_heads_reads_them_where_they_lie(dtype):
    product, weight = draw(2, 5, 7 * 16, dtype=dtype), draw(16, dtype=dtype)

    def norm_of_slice(norm):
        return lambda product, weight: norm(product[..., 16:80].unflatten(-1, (4, 16)), weight, 1e-5)

    assert_same(norm_of_slice(rms_norm), norm_of_slice(reference.rms_norm), [product, weight], dtype)


@pytest.mark.parametrize("unused", ["the sum", "the norm"])
def test_norm_passes_on_what_gradient_there_is(unused):
    inputs = [draw(2, 3, 64), draw(2, 3, 64, seed=1), draw(64, seed=2)]

    def one_output(norm):
        return lambda *t: norm(*t, 1e-5)[int(unused == "the sum")]

    def gradients(norm):
        leaves = [t.clone().requires_grad_() for t in inputs]
        y = one_output(norm)(*leaves)
        return torch.autograd.grad(y, leaves, draw(2, 3, 64, seed=3), materialize_grads=True)

    for got, want in zip(gradients(add_rms_norm), gradients(reference.add_rms_norm), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 2), (1, 5, 96), (2, 2, 2 * 1030), (3, 4096)])
def test_swiglu_equals_its_twin_and_keeps_its_input_alone(shape, dtype):
    gate_up = draw(*shape, dtype=dtype) * 4
    assert_same(swiglu, reference.swiglu, [gate_up], dtype)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        swiglu(gate_up.requires_grad_())
    assert kept == [gate_up.data_ptr()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [6, 64, 1100])
def test_output_gate_equals_its_twin_on_a_slice(d, dtype):
    x, product = draw(2, 3, d, dtype=dtype), draw(2, 3, 2 * d + 8, seed=1, dtype=dtype)

    def gated(gate):
        return lambda x, product: gate(x, product[..., 8 : 8 + d])

    assert_same(gated(sigmoid_gate), gated(reference.sigmoid_gate), [x, product], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "p"), [(4, 16), (3, 10), (17, 8), (2, 128)])
@pytest.mark.parametrize("packed", [False, True])
def test_rotation_equals_its_twin_on_a_slice(packed, heads, p, dtype):
    product = draw(2, 6, 8 + heads * p, dtype=dtype)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 4095]]) if packed else torch.arange(6)[None]
    frequencies = 10000.0 ** (-torch.arange(0, p, 2) / p)
    frequencies[-1] = 0  # a pair that stands still

    def turned(rotation):
        return lambda t: rotation(t[..., 8:].unflatten(-1, (heads, p)), positions, frequencies, 1.2)

    assert_same(turned(rotary), turned(reference.rotary), [product], dtype)


def test_gradient_of_the_rotation_is_read_where_attention_left_it():
    x, positions, frequencies = draw(2, 6, 4, 16), torch.arange(6)[None], torch.rand(8)
    dy = draw(2, 4, 6, 16).transpose(1, 2)
    for gradient in (dy, dy[..., :1].expand_as(dy)):
        got, want = (
            torch.autograd.grad(turn(leaf, positions, frequencies), leaf, gradient)[0]
            for turn, leaf in ((rotary, x.clone().requires_grad_()), (reference.rotary, x.clone().requires_grad_()))
        )
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("recompute", ["none", "layer"])
def test_model_on_these_kernels_equals_the_plain_one(monkeypatch, recompute):
    options = dict(attention_gate=True, qk_norm=True, embedding_norm=True, residual_multiplier=0.5)
    config = replace(SHAPE, layer_pattern="MAA", **options)
    kernels = dict(
        rms_norm=rms_norm, add_rms_norm=add_rms_norm, swiglu=swiglu, sigmoid_gate=sigmoid_gate, rotary=rotary,
        cross_entropy=cross_entropy,
    )  # fmt: skip
    tokens, ids = random_tokens(2, 9), (torch.arange(9) // 5).expand(2, -1)
    found = []
    for ops in (vars(reference) | kernels, vars(reference)):
        monkeypatch.setattr("model.hybrid.load_ops", lambda name, ops=ops: SimpleNamespace(**ops))
        model = sharpened(config, recompute=recompute)
        loss = model(tokens, targets=tokens.roll(-1, dims=1), document_ids=ids)
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize(("t", "vocab"), [(1, 30), (11, 700), (5, 9001)])
def test_loss_equals_its_twin(monkeypatch, t, vocab, z_loss):
    monkeypatch.setattr("model.cross_entropy.CHUNK_TOKENS", 4)
    targets = torch.randint(0, vocab, (t,), generator=torch.Generator().manual_seed(t))
    targets[1::3] = reference.IGNORED_TARGET
    settings = dict(targets=targets, z_loss=z_loss)
    kernel, twin = (partial(loss, **settings) for loss in (cross_entropy, reference.cross_entropy))
    assert_same(kernel, twin, [draw(t, 16), draw(vocab, 16)], torch.float32)
    with torch.no_grad():
        inputs = draw(t, 16, dtype=torch.bfloat16), draw(vocab, 16, dtype=torch.bfloat16)
        torch.testing.assert_close(kernel(*inputs), twin(*inputs), rtol=1e-5, atol=0)


def test_gradient_of_the_logits_in_bfloat16_is_that_of_their_mean_loss():
    logits = draw(6, 300, dtype=torch.bfloat16)
    targets = torch.tensor([3, 299, -100, 0, 17, 3])
    leaf = logits.float().requires_grad_()
    torch.nn.functional.cross_entropy(leaf, targets).backward()
    losses, count = torch.empty(6), torch.tensor(5)
    _cross_entropy_kernel[(6,)](logits, targets, count, losses, 300, 300, -100, 0.0, WITH_GRADIENTS=True, BLOCK=128)
    torch.testing.assert_close(logits.float(), leaf.grad, rtol=2**-7, atol=1e-9)


def matrices(layout, widths=(8, 24, 16), k=16):
    """Weights, each in memory of its own, or behind each other as DeepSpeed lays them, or so but with a gap."""
    weights = [draw(width, k, seed=width) for width in widths]
    if layout == "apart":
        return weights
    gap = 16 if layout == "with a gap" else 0
    flat = torch.cat([torch.cat([weight.flatten(), torch.zeros(gap)]) for weight in weights])
    starts = [sum(widths[:i]) * k + i * gap for i in range(len(widths))]
    return [flat[at : at + weight.numel()].view_as(weight) for at, weight in zip(starts, weights, strict=True)]


@pytest.mark.parametrize("layout", ["apart", "behind each other", "with a gap"])
def test_matrices_behind_each_other_are_one_without_a_copy(layout):
    weights = matrices(layout)
    one = as_one(weights)
    assert (one is not None) == (layout == "behind each other")
    if one is not None:
        assert torch.equal(one, torch.cat(weights)) and one.data_ptr() == weights[0].data_ptr()


def test_neighbours_in_memory_of_their_own_are_not_one():
    flat = matrices("behind each other")
    halves = [torch.empty(0).set_(part.untyped_storage(), part.storage_offset(), part.shape) for part in flat]
    assert as_one(halves) is not None  # one storage
    short = torch.from_numpy(flat[0].numpy())  # ends where the next begins
    assert short.data_ptr() == flat[0].data_ptr() and as_one([short, *flat[1:]]) is None


@pytest.mark.parametrize("layout", ["apart", "behind each other"])
def test_product_with_several_weights_is_that_with_all_of_them(layout):
    x, dy = draw(2, 3, 16), draw(2, 3, 48, seed=1)
    weights = [weight.detach().requires_grad_() for weight in matrices(layout)]
    x.requires_grad_()
    for inputs in ([x, *weights], weights, [x]):  # what needs a gradient
        results = []
        for products in (fused.products, reference.products):
            args = [t if any(t is wanted for wanted in inputs) else t.detach() for t in (x, *weights)]
            y = products(args[0], args[1:])
            results.append([y, *torch.autograd.grad(y, inputs, dy)])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
