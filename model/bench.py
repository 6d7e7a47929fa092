"""What the operations, and a forward and backward pass, cost on this machine's GPU.

python -m model.bench ops --size 1.3B --micro-batch 2
python -m model.bench step --size 1.3B 2.7B --kernels torch fused --recompute none layer

Times are medians, after warm-up, of passes in bfloat16 over rows of `--documents` equal documents each.
"""

import argparse
import sys

import torch

from model import reference
from model.config import get_preset
from model.hybrid import RECOMPUTE, HybridLM
from model.layers import Packing
from model.ops import KERNELS, load_ops

WARM_UP, PASSES = 2, 5
OPS_HEADER = """| size | tokens | operation | torch ms | fused ms | times faster | torch GiB | fused GiB |
|---|---|---|---|---|---|---|---|"""
STEP_HEADER = """| size | tokens | kernels | recompute | ms | tokens/s | model TFLOP/s | peak GiB |
|---|---|---|---|---|---|---|---|"""


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["ops", "step"])
    parser.add_argument("--size", nargs="+", default=["1.3B"], help="names in model.config.PRESETS (default: 1.3B)")
    parser.add_argument("--seq-len", type=int, help="tokens in a row (default: the size's)")
    parser.add_argument("--micro-batch", type=int, default=1, help="rows in a pass (default: 1)")
    parser.add_argument("--documents", type=int, default=8, help="documents in a row (default: 8)")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=["torch", "fused"])
    parser.add_argument("--recompute", nargs="+", choices=RECOMPUTE, default=["none"])
    flags = parser.parse_args(argv)
    try:
        shapes = {size: get_preset(size, seq_len=flags.seq_len) for size in flags.size}
        if not torch.cuda.is_available():
            raise ValueError("no CUDA GPU is visible; run this on a machine that has one")
        header, rows = (OPS_HEADER, ops_rows) if flags.what == "ops" else (STEP_HEADER, step_rows)
        print(header)
        for size, config in shapes.items():
            for row in rows(config, flags):
                print(f"| {size} | {config.seq_len} x {flags.micro_batch} | {row} |", flush=True)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def even_documents(config, flags):
    row = torch.arange(config.seq_len, device="cuda") * flags.documents // config.seq_len
    return row.expand(flags.micro_batch, -1)


def milliseconds(call):
    """The median time of a call on the GPU, and the most memory it holds beyond what was there, in GiB."""
    for _ in range(WARM_UP):
        call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, times = torch.cuda.memory_allocated(), []
    for _ in range(PASSES):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[PASSES // 2], (torch.cuda.max_memory_allocated() - before) / 2**30


def step_rows(config, flags):
    """A row for each choice: forward and backward of the whole model, without an optimizer."""
    tokens = torch.randint(0, config.vocab_size, (flags.micro_batch, config.seq_len), device="cuda")
    ids, targets = even_documents(config, flags), tokens.roll(-1, dims=1)
    for kernels in flags.kernels:
        with torch.device("cuda"):
            model = HybridLM(config, kernels=kernels).bfloat16()
        for recompute in flags.recompute:
            model.recompute = recompute

            def forward_and_backward(model=model):
                model.zero_grad(set_to_none=True)
                model(tokens, targets=targets, document_ids=ids).backward()

            try:
                ms, _ = milliseconds(forward_and_backward)
            except torch.OutOfMemoryError:
                yield f"{kernels} | {recompute} | out of memory | | |"
                continue
            finally:
                model.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
            rate = tokens.numel() / ms * 1000
            peak = torch.cuda.max_memory_allocated() / 2**30
            tflops = rate * config.flops_per_token / 1e12
            yield f"{kernels} | {recompute} | {ms:.0f} | {rate:,.0f} | {tflops:.0f} | {peak:.1f}"
        del model, forward_and_backward
        torch.cuda.empty_cache()


def ops_rows(config, flags):
    """A row for each operation at the size's shape: forward and backward, plain and fused."""
    fused = load_ops("fused")
    for name, call in operations(config, flags).items():
        (plain, plain_gib), (fast, fast_gib) = (milliseconds(lambda: call(ops)) for ops in (reference, fused))  # noqa: B023
        yield f"{name} | {plain:.2f} | {fast:.2f} | {plain / fast:.1f} | {plain_gib:.2f} | {fast_gib:.2f}"


def operations(config, flags):
    """{name: function of the operations' module}, each a forward and a backward pass."""
    b, l, d = flags.micro_batch, config.seq_len, config.d_model
    h, p, g, n = config.n_mamba_heads, config.mamba_head_dim, config.n_groups, config.d_state
    packing = Packing(even_documents(config, flags))
    ids = packing.document_ids

    def draw(*shape, dtype=torch.bfloat16):
        return torch.randn(shape, device="cuda", dtype=dtype).requires_grad_()

    def both_ways(function, *inputs):
        def call(ops):
            y = function(ops, *inputs)
            y = y[0] if isinstance(y, tuple) else y
            torch.autograd.grad(y, inputs, torch.ones_like(y))

        return call

    x, B, C = draw(b, l, h, p), draw(b, l, g, n), draw(b, l, g, n)
    dt = torch.rand(b, l, h, device="cuda").div(10).requires_grad_()
    A, D = torch.rand(h, device="cuda").add(1).neg().requires_grad_(), draw(h, dtype=torch.float32)
    q, k, v = (draw(b, l, heads, config.head_dim) for heads in (config.n_heads, config.n_kv_heads, config.n_kv_heads))
    targets = torch.randint(0, config.vocab_size, (b * l,), device="cuda")
    wide = [draw(b, l, config.d_inner), draw(b, l, config.d_inner), draw(config.d_inner)]
    channels = config.d_conv_channels
    convolution = [draw(b, l, channels), draw(channels, config.d_conv), draw(channels)]
    scan = [x, dt, A, B, C, D]
    per_head = [draw(h), draw(h), draw(h)]
    mixer = [draw(b, l, config.d_inner + channels + h), *convolution[1:], *per_head, wide[2]]
    return {
        "ssd": both_ways(lambda ops, *t: ops.ssd(*t, config.chunk_size), *scan),
        "ssd, documents": both_ways(lambda ops, *t: ops.ssd(*t, config.chunk_size, ids), *scan),
        "causal_conv1d": both_ways(lambda ops, *t: ops.causal_conv1d(*t), *convolution),
        "causal_conv1d, documents": both_ways(lambda ops, *t: ops.causal_conv1d(*t, ids), *convolution),
        "rms_norm": both_ways(lambda ops, *t: ops.rms_norm(*t, 1e-5), draw(b, l, d), draw(d)),
        "gated_rms_norm": both_ways(lambda ops, *t: ops.gated_rms_norm(*t, g, 1e-5), *wide),
        "mixer, documents": both_ways(lambda ops, *t: ops.mixer(*t, g, config.chunk_size, 1e-5, ids), *mixer),
        "attention": both_ways(lambda ops, *t: ops.attention(*t), q, k, v),
        "attention, documents": both_ways(lambda ops, *t: ops.attention(*t, packing=packing), q, k, v),
        "cross_entropy": both_ways(
            lambda ops, *t: ops.cross_entropy(*t, targets), draw(b * l, d), draw(config.vocab_size, d)
        ),
    }


if __name__ == "__main__":
    sys.exit(main())
