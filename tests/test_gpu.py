"""The fused kernels on a CUDA GPU: each equals its plain PyTorch twin, and documents stay apart. Run: make test-gpu

The twin in float32, on the same inputs, is the truth. Errors are measured against its largest value:
- float32: 5e-5, sums in another order, with factors split into three TF32 parts (24 bits of about 2^-22 each);
- bfloat16: 2e-2, five times the 2^-8 of one rounding, since a scan rounds states and products on the way; or half as
  much again as the twin's own error in bfloat16, where sums cancel.
Uninitialised memory is filled with NaN (torch's deterministic mode), so that a value never written would show.
"""

import dataclasses
import math
import os
from functools import partial
from importlib import import_module

import pytest
import torch
from remembered_operations import OPERATIONS, WITH_FP8, Drawn, assert_same_bits, assert_same_from_its_tape

from model import fp8, reference
from model.config import ModelConfig
from model.decode import ROOM, Decoder
from model.generate import prefill
from model.hybrid import HybridLM
from model.layers import Packing
from model.ops import load_ops
from train.checkpoint import Piece
from train.optim import AdamW8bit

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts: products repeat themselves

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: make test-gpu"),
    pytest.mark.filterwarnings("ignore"),  # deterministic mode warns of each operation that has no such form
]

LENGTHS = [1, 2, 63, 64, 65, 255, 256, 257, 1000]  # around multiples of 64, a chunk of the scan
STARTS = [[0, 5, 64, 70, 256, 300, 511, 700], [0, 63, 65, 255, 257, 768]]  # of documents, on and off chunk edges
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 2e-2}
SHAPE = ModelConfig(
    d_model=256, layer_pattern="MAM", n_heads=4, n_kv_heads=2, d_ff=256, seq_len=1000, vocab_size=512,
    d_state=128, mamba_head_dim=64, n_groups=2, chunk_size=256,
)  # fmt: skip


@pytest.fixture(scope="session")
def fused():
    return load_ops("fused")


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def exact(deterministic, monkeypatch):
    """Runs that repeat themselves bit for bit, so that any difference is a leak."""

    def for_dtype(dtype):
        if dtype == torch.float32:  # its attention has no other form, and repeats itself as it is
            return
        # FlashAttention adds in a fixed order only where nothing else is let through; the cumulative sums of rows,
        # which torch lists as if they did not, always do
        for place, name in ((torch, "cumsum"), (torch.Tensor, "cumsum")):
            monkeypatch.setattr(place, name, let_through(getattr(place, name)))
        torch.use_deterministic_algorithms(True)

    def let_through(function):
        def call(*arguments, **settings):
            torch.use_deterministic_algorithms(True, warn_only=True)
            result = function(*arguments, **settings)
            torch.use_deterministic_algorithms(True)
            return result

        return call

    return for_dtype


def document_ids(l):
    index = torch.arange(l)
    rows = [sum((index >= start).long() for start in starts) for starts in STARTS]
    return torch.stack(rows).cuda()


def draw(*shape, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to("cuda", dtype)


def results(function, inputs, dtype):
    """What a function gives for inputs of a dtype, and their gradients, for fixed gradients of what it gives."""
    inputs = [t.detach().to(dtype if t.dtype == torch.bfloat16 else t.dtype).requires_grad_() for t in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    seeds = [draw(*t.shape, seed=1).to(t.dtype) for t in outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs, seeds)]


def assert_same(function, twin, inputs, dtype, steps=1):
    """function in dtype = twin in float32, outputs and gradients. Inputs in bfloat16 are those that follow dtype.

    steps: operations one after another, each of which may err.
    """
    plain, truth = results(twin, inputs, dtype), results(twin, inputs, torch.float32)
    for got, same, want in zip(results(function, inputs, dtype), plain, truth, strict=True):
        size = want.abs().max().clamp(min=1e-2)  # a gradient may be nothing but rounding: that of a softmax of one
        error, allowed = ((t.float() - want).abs().max() / size for t in (got, same))
        assert error <= max(steps * TOLERANCE[dtype], 1.5 * allowed), (
            f"{tuple(want.shape)}: {error:.2e}, twin {allowed:.2e}"
        )


def assert_twins(fused, name, inputs, dtype, **settings):
    assert_same(*(partial(getattr(ops, name), **settings) for ops in (fused, reference)), inputs, dtype)


def scan_inputs(l, g, b=2, h=4, p=64, n=128):
    dt = draw(b, l, h, seed=2).sigmoid() * math.log(100)
    x, B, C = (
        draw(*shape, dtype=torch.bfloat16, seed=i)
        for i, shape in enumerate([(b, l, h, p), (b, l, g, n), (b, l, g, n)])
    )
    return [x, dt.exp() / 1000, -draw(h, seed=3).exp() * 4, B, C, draw(h, seed=4)]


@pytest.mark.parametrize("g", [1, 2])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("l", LENGTHS)
def test_scan_equals_its_twin(fused, deterministic, l, dtype, packed, g):
    ids = Packing(document_ids(l)).document_ids if packed else None
    inputs = [*scan_inputs(l, g), draw(2, 4, 128, 64, seed=5)]

    def scan(ops):
        return lambda x, dt, A, B, C, D, start: ops.ssd(x, dt, A, B, C, D, 256, ids, start)

    assert_same(scan(fused), scan(reference), inputs, dtype)
    without_start = [lambda *t, ops=ops: ops.ssd(*t, 256, ids)[0] for ops in (fused, reference)]
    assert_same(*without_start, inputs[:-1], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p, n", [(16, 16), (128, 48), (48, 256)])
def test_scan_of_other_widths_equals_its_twin(fused, deterministic, p, n, dtype):
    ids = Packing(document_ids(257)).document_ids
    scans = [lambda *t, ops=ops: ops.ssd(*t[:6], 256, ids, t[6]) for ops in (fused, reference)]
    assert_same(*scans, [*scan_inputs(257, 2, p=p, n=n), draw(2, 4, n, p, seed=5)], dtype)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("l", LENGTHS)
def test_convolution_equals_its_twin(fused, deterministic, l, dtype, packed):
    ids = Packing(document_ids(l)).document_ids if packed else None
    sizes = [(2, l, 96), (96, 4), (96,), (2, 3, 96)]
    inputs = [draw(*size, dtype=torch.bfloat16, seed=i) for i, size in enumerate(sizes)]
    assert_twins(fused, "causal_conv1d", inputs[:3], dtype, document_ids=ids)
    convolutions = [lambda x, w, b, s, ops=ops: ops.causal_conv1d(x, w, b, ids, s) for ops in (fused, reference)]
    assert_same(*convolutions, inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("l", LENGTHS)
def test_norms_equal_their_twins(fused, deterministic, l, dtype):
    x, z, weight = (
        draw(*size, dtype=torch.bfloat16, seed=i) for i, size in enumerate([(2, l, 256), (2, l, 256), (256,)])
    )
    assert_twins(fused, "rms_norm", [x, weight], dtype, eps=1e-5)
    assert_twins(fused, "add_rms_norm", [x, z, weight], dtype, eps=1e-5, multiplier=0.5)
    assert_twins(fused, "rms_norm", [x.unflatten(-1, (4, 64)), weight[:64]], dtype, eps=1e-5)  # a norm of each head
    for g in (1, 2):
        assert_twins(fused, "gated_rms_norm", [x, z, weight], dtype, n_groups=g, eps=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("l", LENGTHS)
def test_gates_equal_their_twins(fused, deterministic, l, dtype):
    wide, x = draw(2, l, 2 * 1400, dtype=torch.bfloat16), draw(2, l, 1000, dtype=torch.bfloat16, seed=1)
    assert_twins(fused, "swiglu", [wide], dtype)
    on_a_slice = [lambda x, wide, ops=ops: ops.sigmoid_gate(x, wide[..., -1000:]) for ops in (fused, reference)]
    assert_same(*on_a_slice, [x, wide], dtype)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("l", LENGTHS)
def test_rotation_equals_its_twin(fused, deterministic, l, dtype, packed):
    product = draw(2, l, 128 + 6 * 128, dtype=torch.bfloat16)
    far = torch.arange(l, device="cuda")[None] + 130_000  # enough for a cosine's slow path
    positions = Packing(document_ids(l)).positions if packed else far
    frequencies = 10000.0 ** (-torch.arange(0, 128, 2, device="cuda") / 128)

    def turned(ops):
        return lambda t: ops.rotary(t[..., 128:].unflatten(-1, (6, 128)), positions, frequencies, 1.1)

    assert_same(turned(fused), turned(reference), [product], dtype)


@pytest.mark.parametrize("g", [1, 2])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("l", LENGTHS)
def test_mixer_equals_its_twin(fused, deterministic, l, packed, g, h=4, p=64, n=128):
    ids = Packing(document_ids(l)).document_ids if packed else None
    d_inner, channels = h * p, h * p + 2 * g * n
    sizes = [(2, l, d_inner + channels + h), (channels, 4), (channels,), (h,), (h,), (h,), (d_inner,)]
    inputs = [draw(*size, seed=i) for i, size in enumerate(sizes)]
    mixers = [lambda *t, ops=ops: ops.mixer(*t, g, 256, 1e-5, ids)[0] for ops in (fused, reference)]
    assert_same(*mixers, inputs, torch.float32, steps=3)  # convolution, scan, norm


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("l", LENGTHS[1:])
def test_mixer_is_its_parts(fused, deterministic, monkeypatch, l, packed):
    ids = Packing(document_ids(l)).document_ids if packed else None
    sizes = [(2, l, 256 + 512 + 4), (512, 4), (512,), (4,), (4,), (4,), (256,)]
    inputs = [draw(*size, dtype=torch.bfloat16, seed=i) for i, size in enumerate(sizes)]
    whole = results(lambda *t: fused.mixer(*t, 1, 256, 1e-5, ids)[0], inputs, torch.bfloat16)
    for name in ("causal_conv1d", "ssd", "gated_rms_norm"):
        monkeypatch.setattr(reference, name, getattr(fused, name))
    parts = results(lambda *t: reference.mixer(*t, 1, 256, 1e-5, ids)[0], inputs, torch.bfloat16)
    for got, want in zip(whole, parts, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-3 * want.abs().max().item())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("l", LENGTHS)
def test_attention_equals_its_twin(fused, l, dtype, packed):
    sizes = [(2, l, 4, 128), (2, l, 2, 128), (2, l, 2, 128)]
    inputs = [draw(*size, dtype=torch.bfloat16, seed=i) for i, size in enumerate(sizes)]
    for settings in ({}, {"scale": 0.2}, {"slopes": draw(4, seed=9).abs() / 10}):
        packing = Packing(document_ids(l)) if packed else None
        assert_twins(fused, "attention", inputs, dtype, packing=packing, **settings)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("l, m", [(1, 70), (37, 113), (96, 960), (70, 70)])
@torch.no_grad()
def test_attention_without_gradients_equals_its_twin(fused, l, m, padded):
    """A cache is the front of a buffer with room for more, and its rows may begin anywhere before the queries."""
    q = draw(3, l, 4, 128, dtype=torch.bfloat16)
    k, v = (draw(3, m + 50, 2, 128, dtype=torch.bfloat16, seed=i)[:, :m] for i in (1, 2))
    start = torch.tensor([0, m - l, (m - l) // 2], device="cuda") if padded else None
    got, want = (ops.attention(q, k, v, start, scale=0.1).float() for ops in (fused, reference))
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("l", LENGTHS)
@pytest.mark.parametrize("h, k, p", [(4, 4, 64), (8, 2, 128), (6, 2, 128), (4, 1, 64)])
def test_packed_attention_equals_its_twin(fused, deterministic, h, k, p, l):
    product = draw(2, l, 8 + (h + 2 * k) * p, dtype=torch.bfloat16)

    def attention(ops):
        def call(product):
            q, k_, v = (t.unflatten(-1, (-1, p)) for t in product[..., 8:].split([h * p, k * p, k * p], dim=-1))
            return ops.attention(q, k_, v, packing=Packing(document_ids(l)))

        return call

    assert_same(attention(fused), attention(reference), [product], torch.bfloat16)


def test_packed_attention_repeats_itself_bit_for_bit(fused):
    q, k, v = (draw(2, 1000, h, 128, dtype=torch.bfloat16, seed=h) for h in (16, 4, 5))
    packing = Packing(document_ids(1000))
    inputs = [q, k, v[:, :, :4]]
    first = results(partial(fused.attention, packing=packing), inputs, torch.bfloat16)
    for _ in range(5):
        again = results(partial(fused.attention, packing=packing), inputs, torch.bfloat16)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("vocab", [512, 50304])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [1, 63, 5000])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_cross_entropy_equals_its_twin(fused, deterministic, t, dtype, vocab, z_loss):
    targets = torch.randint(0, vocab, (t,), generator=torch.Generator().manual_seed(t))
    targets[1::3] = reference.IGNORED_TARGET
    inputs = [draw(t, 64, dtype=torch.bfloat16), draw(vocab, 64, dtype=torch.bfloat16, scale=0.3)]
    assert_twins(fused, "cross_entropy", inputs, dtype, targets=targets.cuda(), z_loss=z_loss)
    with torch.no_grad():
        got, want = (ops.cross_entropy(*inputs, targets.cuda(), z_loss) for ops in (fused, reference))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=0)  # the same bfloat16 logits, float32 sums


def test_cross_entropy_never_holds_the_logits(fused):
    hidden, weight = draw(16384, 64, dtype=torch.bfloat16), draw(50304, 64, dtype=torch.bfloat16)
    targets = torch.zeros(16384, dtype=torch.long, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fused.cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), targets).backward()
    logits = 16384 * 50304 * 4
    assert torch.cuda.max_memory_allocated() - before < logits / 4


@pytest.mark.parametrize("begins", [0, 700])  # within its matrix, whose blocks may be cut
def test_adamw_with_8_bit_moments_follows_adamw_and_goes_on_bit_for_bit(begins):
    pytest.importorskip("bitsandbytes")
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "fused": True}
    start = draw(100_003)  # no whole number of blocks, as ZeRO's pieces may be
    target = draw(100_003, seed=1)

    def optimize(weight, optimizer, first, last):
        for step in range(first, last):
            weight.grad = weight.detach() - target + draw(100_003, seed=2 + step)
            optimizer.step()

    def eight_bit(weight):
        small = torch.nn.Parameter(torch.zeros(1, device="cuda"))
        groups = ({"params": [p], "weight_decay": 0.1, "lr": 1e-2} for p in (weight, small))
        optimizer = AdamW8bit(*groups, **settings)
        optimizer.shard([weight], [Piece("weight", begins, weight.numel(), weight, 0, weight.shape)])
        return optimizer

    plain, packed = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimize(plain, torch.optim.AdamW([plain], weight_decay=0.1, **settings), 0, 10)
    optimizer = eight_bit(packed)
    optimize(packed, optimizer, 0, 10)
    assert (packed - plain).norm() < 0.05 * (plain - start).norm()

    again = torch.nn.Parameter(packed.detach().clone())
    resumed, state = eight_bit(again), optimizer.state[packed]
    assert state["exp_avg"].codes.dtype == torch.uint8
    in_float32 = {kind: state[kind].unpack(0, len(start)) for kind in ("exp_avg", "exp_avg_sq")}
    resumed.state[again] |= {"step": torch.tensor(10.0), **in_float32}  # as train.checkpoint.restore_optimizer does
    optimize(packed, optimizer, 10, 15)
    optimize(again, resumed, 10, 15)
    assert torch.equal(packed, again)


# ---- operations from their tapes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("l", [9, 300])  # with and without tiles by the copy engine
def test_operation_from_its_tape_is_the_operation(name, dtype, l, deterministic):
    assert_same_from_its_tape(name, dtype, "cuda", l)


def test_operation_from_its_tape_is_captured_in_a_graph():
    function, make = OPERATIONS["packed mixer"]
    args = make(Drawn(torch.bfloat16, "cuda", 300))
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # taped, and played on a stream that is not the usual one
            result = function(*args)
    torch.cuda.current_stream().wait_stream(stream)
    assert_same_bits(result, function.__wrapped__(*args))
    with torch.cuda.graph(graph):
        result = function(*args)
    others = make(Drawn(torch.bfloat16, "cuda", 300, seed=1))
    for there, other in zip(args, others, strict=True):
        if isinstance(there, torch.Tensor):
            there.copy_(other)
    graph.replay()
    assert_same_bits(result, function.__wrapped__(*others))


# ---- 8-bit floats

with_fp8 = pytest.mark.skipif(bool(fp8.why_not_fp8()), reason=str(fp8.why_not_fp8()))
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def on_kernels_and_twin(name, seen, *args):
    """[(the kernel's, its twin's)] of what they return, and last of the largest magnitude that they have seen."""
    results = []
    for kernels in ("model.fp8_kernels", "model.fp8_reference"):
        own = seen.clone()
        result = getattr(import_module(kernels), name)(*(own if arg is seen else arg for arg in args))
        results.append([*(result if isinstance(result, tuple) else (result,)), own])
    return list(zip(*results, strict=True))


def bits(x):
    return x.contiguous().view(torch.uint8)


@with_fp8
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wanted", [E4M3, E5M2])
@pytest.mark.parametrize("shape", [(16, 16), (2000, 8512), (4096, 64)])
def test_cast_to_8_bits_equals_its_twin(shape, wanted, dtype):
    n, m = shape
    x = draw(n, m + 16, dtype=dtype, scale=60.0)[:, 16:]  # rows at a stride
    x[3, 5], x[4, 4], x[5, 6] = -1e9, 0, 1e-6
    if n > 16:
        x[20, 8], x[21, 9], x[22, 10] = torch.nan, torch.inf, -torch.inf

    zero = draw(1)[0] * 0
    for dim, parts in ((0, [x]), (0, [x[:16], x]), (1, [x[:, :16], x])):
        *written, seen = on_kernels_and_twin("cast", zero, zero + 2, zero, wanted, dim, *parts)
        for got, want in written:
            nan = want.float().isnan()
            assert torch.equal(got.float().isnan(), nan)
            assert torch.equal(bits(got)[~nan], bits(want)[~nan])
        assert torch.equal(*seen)


@with_fp8
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(16, 16), (2000, 4608), (144, 272)])
def test_swiglu_in_8_bits_equals_its_twin(shape, dtype):
    n, f = shape
    gate_up, dh = draw(n, 2 * f, dtype=dtype, scale=3.0), draw(n, f, dtype=dtype, seed=1)
    gate_up[2, 3], gate_up[2, f + 3] = -200.0, 30.0
    scale, zero = draw(1)[0] * 0 + 8, draw(1)[0] * 0
    there = on_kernels_and_twin("swiglu", zero, gate_up, scale, zero, E4M3)
    back = on_kernels_and_twin("swiglu_backward", zero, dh, gate_up, scale, scale * 64, zero, E4M3, E5M2)
    for got, want in (*there, *back):
        # where the sigmoid's last bit differs, a value may round the other way
        assert got.dim() == 0 or (got.float() != want.float()).float().mean() < 0.01
        torch.testing.assert_close(got.float(), want.float(), rtol=0.26, atol=1e-3)
    (h, _), (h_turned, _), (d, _), (d_turned, _) = there[0], *back[:3]
    assert torch.equal(bits(h_turned).t(), bits(h))
    assert torch.equal(bits(d).t(), bits(d_turned))


@with_fp8
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WITH_FP8)
def test_operation_in_8_bits_from_its_tape_is_the_operation(name, dtype):
    assert_same_from_its_tape(name, dtype, "cuda")


@with_fp8
@pytest.mark.parametrize("recompute", ["none", "layer"])
@pytest.mark.parametrize("steps", [0, fp8.CURRENT_STEPS])
def test_model_in_8_bits_equals_itself_on_the_twins(fused, deterministic, monkeypatch, steps, recompute):
    """But for a last bit here and there. Products are exact in both: a noise of 2^-20 on them turns so many 8-bit
    numbers, and those others behind them, that gradients come out three quarters as far apart as from bfloat16's."""
    monkeypatch.setattr(fp8, "multiply", fp8.exact_product)
    results = []
    for twin in (False, True):
        if twin:
            monkeypatch.setattr(fp8, "kernels_for", lambda x: import_module("model.fp8_reference"))
        model = make_model("fused", recompute=recompute)
        model.scales = fp8.use_fp8(model)
        for _ in range(2):
            gradients = run(model, tokens(), document_ids(1000), tokens(1))
            model.scales.end_step()
            model.scales.steps = max(model.scales.steps, steps)
        results.append(gradients)
    plain = run(make_model("fused", torch.bfloat16), tokens(), document_ids(1000), tokens(1))
    for got, want, without in zip(*results, plain, strict=True):
        assert (got - want).norm() <= 0.05 * (got - without).norm() + 1e-6


@with_fp8
@pytest.mark.parametrize("fast, tolerance", [(True, 1e-2), (False, 1e-3)])
@pytest.mark.parametrize("k", [16, 2048, 32768])
def test_product_in_8_bits_equals_the_exact_one(k, fast, tolerance):
    a, b = draw(256, k, scale=8.0).to(E4M3), draw(512, k, scale=8.0, seed=1).to(E5M2)
    inverses = [draw(1, seed=seed)[0].abs() for seed in (2, 3)]  # each in memory of its own, as cuBLASLt wants them
    got, want = (product(a, b, *inverses, torch.float32, fast) for product in (fp8.multiply, fp8.exact_product))
    assert (got - want).norm() <= tolerance * want.norm()


# ---- checkpoints


def test_a_save_holds_what_was_on_the_gpu_when_it_began(tmp_path, monkeypatch):
    from saving import begin, differing, fill, join_group, toy_engine

    import train.checkpoint
    from model.weights import load_checkpoint
    from train.run_dir import RunDir

    monkeypatch.setattr(train.checkpoint, "HOST_BLOCK", 1024)
    join_group(0, 1, tmp_path / "store")
    (tmp_path / "tokenizer").write_bytes(b"x")
    save, engine, run_dir = train.checkpoint.BackgroundSave(), toy_engine("cuda"), RunDir(tmp_path)
    for step in (1, 2):
        begin(save, engine, run_dir, step)
        fill(engine, 9)  # the next steps
        save.finish()
        assert all(block.is_pinned() for block in save.host_copy.blocks)
        assert differing(load_checkpoint(run_dir.checkpoint(step))) == []
    torch.distributed.destroy_process_group()


# ---- the whole model


def make_model(kernels, dtype=torch.float32, recompute="none"):
    torch.manual_seed(0)
    model = HybridLM(SHAPE, kernels=kernels, recompute=recompute)
    with torch.no_grad():  # larger than at the start, so that a leak or an error would show
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    return model.to("cuda", torch.bfloat16).to(dtype)  # the same weights, whatever the dtype


def tokens(seed=0):
    return torch.randint(0, SHAPE.vocab_size, (2, 1000), generator=torch.Generator().manual_seed(seed)).cuda()


def run(model, inputs, ids, targets=None):
    """Logits or loss, and the gradient that reaches the embedded tokens and each parameter."""
    kept = []
    handle = model.embedding.register_forward_hook(lambda module, given, x: kept.append(x))
    output = model(inputs, targets=targets, document_ids=ids)
    handle.remove()
    loss = output if targets is not None else (output * draw(*output.shape, seed=3)).sum()
    gradients = torch.autograd.grad(loss, [kept[0], *model.parameters()])
    return [output.detach().float(), *(t.float() for t in gradients)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [False, True])
def test_model_equals_the_plain_one(fused, packed, dtype):
    ids = document_ids(1000) if packed else None
    for targets in (None, tokens(1)):
        truth = run(make_model("torch"), tokens(), ids, targets)
        plain = run(make_model("torch", dtype), tokens(), ids, targets)
        got = run(make_model("fused", dtype), tokens(), ids, targets)
        for want, twin, mine in zip(truth, plain, got, strict=True):
            size = want.norm() + 1e-30
            error, twins = (mine - want).norm() / size, (twin - want).norm() / size
            tolerance = 2e-4 if dtype == torch.float32 else TOLERANCE[dtype]  # float32: rounding, through three layers
            assert error <= twins + tolerance, f"{tuple(want.shape)}: {error:.2e}, twin {twins:.2e}"


def test_packed_loss_equals_the_loss_of_each_document_alone(fused):
    torch.manual_seed(0)
    model = HybridLM(SHAPE, kernels="fused").cuda()
    ids, inputs, targets = document_ids(1000)[:1], tokens()[:1], tokens(1)[:1]
    with torch.no_grad():
        packed = model(inputs, targets=targets, document_ids=ids)
        alone = 0
        for document in ids.unique():
            here = ids[0] == document
            alone += model(inputs[:, here], targets=targets[:, here]) * here.sum() / here.numel()
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recompute", ["none", "layer"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_document_changes_nothing_in_another(fused, exact, compiled, recompute, dtype):
    exact(dtype)
    model = make_model("fused", dtype, recompute)
    if compiled:
        for layer in model.layers:
            layer.compile()
    ids, first, second = document_ids(1000), tokens(), tokens()
    changed = ids == 3  # from 64 to 69, and from 65 to 254
    second[changed] = tokens(2)[changed]
    targets = tokens(1).masked_fill(changed, reference.IGNORED_TARGET)
    logits, dlogits, *_ = run(model, first, ids)
    other_logits, other_dlogits, *_ = run(model, second, ids)
    assert torch.equal(logits[~changed], other_logits[~changed]) and not torch.equal(logits, other_logits)
    assert torch.equal(dlogits[~changed], other_dlogits[~changed])
    _, dx, *_ = run(model, first, ids, targets)
    assert not dx[changed].any() and dx[~changed].any()  # the loss of the other documents


@pytest.mark.parametrize("dtype", DTYPES)
def test_recomputation_changes_no_bit(fused, exact, dtype):
    exact(dtype)
    for whole, again in zip(
        *(run(make_model("fused", dtype, r), tokens(), document_ids(1000), tokens(1)) for r in ("none", "layer")),
        strict=True,
    ):
        assert torch.equal(whole, again)


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="Hopper on")
def test_gradients_of_the_model_repeat_themselves_bit_for_bit(fused):
    model = make_model("fused", torch.bfloat16)
    first, again = (run(model, tokens(), document_ids(1000), tokens(1)) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_decoding_equals_the_forward_pass(fused):
    model = make_model("fused").eval()
    inputs = tokens()[:, :300]
    with torch.inference_mode():
        want = model(inputs)
        state, got = model.new_state(), []
        for stretch in inputs.split([257, 1, 2, 1, 39], dim=1):
            logits, state = model.step(stretch, state)
            got.append(logits)
    torch.testing.assert_close(torch.cat(got, dim=1), want, rtol=0, atol=1e-4 * want.abs().max().item())


# ---- one new token a row


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_products_of_few_rows(fused, rows, dtype):
    x = draw(rows, 1, 2000).to(dtype)
    weights = [draw(width, 2000, seed=width).to(dtype) for width in (700, 64, 129, 8)]
    with torch.no_grad():
        want, got = reference.products(x.float(), [w.float() for w in weights]), fused.products(x, weights)
    assert got.dtype == dtype
    assert (got.float() - want).norm() <= (2e-6 if dtype == torch.float32 else TOLERANCE[dtype]) * want.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        dict(layer_pattern="MAM", attention_gate=True, qk_norm=True),
        dict(layer_pattern="AM", positions="alibi"),
        dict(layer_pattern="AM", positions="none", n_kv_heads=1),
        dict(layer_pattern="MM", n_groups=2),
    ],
    ids=str,
)
def test_decoding_by_a_graph_equals_the_steps_of_the_plain_model(fused, options, dtype):
    config = dataclasses.replace(SHAPE, **options)
    models = []
    for kernels, kind in (("torch", torch.float32), ("torch", dtype), ("fused", dtype)):
        torch.manual_seed(0)
        model = HybridLM(config, kernels=kernels)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(3)
        models.append(model.to("cuda", torch.bfloat16).to(kind).eval())
    truth, twin, model = models
    prompts = [tokens()[0, :n].tolist() for n in (250, 1, 70, 70)]  # the longest outgrows its cache
    with torch.no_grad():
        states = [prefill(m, prompts)[1] for m in (truth, twin)]
        decoder = Decoder(model)
        decoder.start(prefill(model, prompts)[1], room=1)
        assert decoder.graph is not None
        for t in range(12):
            new = tokens()[0, t : t + 4, None]
            want, states[0] = truth.step(new, states[0])
            plain, states[1] = twin.step(new, states[1])
            error, twins = ((got.squeeze() - want[:, 0]).norm() for got in (decoder.step(new[:, 0]), plain))
            tolerance = 2e-4 if dtype == torch.float32 else TOLERANCE[dtype]
            assert error <= twins + tolerance * want.norm()
        assert decoder.capacity == (2 * ROOM if "A" in config.layer_pattern else ROOM)
        decoder.take([2, 0])
        got = decoder.step(tokens()[0, :2])
        want = truth.step(tokens()[0, :2, None], truth.take_rows(states[0], [2, 0]))[0][:, 0]
        assert (got - want).norm() <= (2e-4 if dtype == torch.float32 else 3 * TOLERANCE[dtype]) * want.norm()
