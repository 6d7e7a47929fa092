"""How fast a model writes by how much it has read: a hybrid, a pure Mamba-2 and a pure attention model of one size.

    python -m model.bench_decode --contexts 256 1024 4096
    python -m model.bench_decode --size 1.3B --dtype bfloat16 --contexts 1024 8192 65536    # on a GPU

The weights are random, and so are the tokens: neither changes the cost.
"""

import argparse
import json
import sys
import time
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table

from model.config import PRESETS, get_preset
from model.hybrid import HybridLM

BENCH = replace(
    PRESETS["nano"], d_model=256, n_heads=4, n_kv_heads=4, d_ff=640, d_state=64, mamba_head_dim=64, vocab_size=4096
)  # for CPUs


def same_size(config):
    """{name: ModelConfig} of the shape itself and of its pure forms, d_ff changed to bring back the parameters."""
    if set(config.layer_pattern) != {"M", "A"}:
        raise ValueError(
            f"layer pattern {config.layer_pattern!r} is no hybrid; choose a --size with both M and A layers"
        )
    shapes, n = {"hybrid": config}, config.n_layers
    for name, letter in (("Mamba-2", "M"), ("attention", "A")):
        options = dict(attention_gate=False, qk_norm=False, positions="rope") if letter == "M" else {}
        pure = replace(config, layer_pattern=letter * n, **options)
        missing = config.n_parameters - pure.n_parameters
        width = pure.d_ff + missing / (3 * n * config.d_model)
        shapes[name] = replace(pure, d_ff=max(0, round(width / 16) * 16))  # of 16, or GPU products would be slower
    return shapes


@torch.inference_mode()
def measure(model, context, new_tokens, batch=1):
    """{seconds of the prompt, tokens/s after it, bytes of the state at its end} for a context of random tokens.

    tokens/s is that of the fastest token, as timeit's is of the fastest run: other work on the machine only adds.
    """
    device = next(model.parameters()).device

    def now():
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    tokens = torch.randint(0, model.config.vocab_size, (batch, context), device=device)
    started = now()
    logits, state = model.step(tokens, model.new_state(), last=True)
    read = now() - started
    state_bytes = sum(tensor_bytes(value) for layer in state for value in layer.values())
    seconds = []
    for _ in range(new_tokens):
        started = now()
        logits, state = model.step(logits[:, -1].argmax(-1, keepdim=True), state)
        seconds.append(now() - started)
    return {
        "prompt_s": read,
        "tokens_per_s": batch / min(seconds),
        "state_bytes": state_bytes // batch,
    }


def tensor_bytes(value):
    """Of a tensor, or of what a cache holds."""
    tensors = (value,) if isinstance(value, torch.Tensor) else (value.keys, value.values)
    return sum(t.numel() * t.element_size() for t in tensors)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m model.bench_decode", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--size", help="a name in model.config.PRESETS (default: a small one for CPUs)")
    parser.add_argument(
        "--contexts", type=int, nargs="+", default=[256, 1024, 4096, 8192], help="tokens read before (%(default)s)"
    )
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens timed (default %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="sequences side by side (default %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default=device, help="torch device (default here: %(default)s)")
    parser.add_argument("--kernels", default="auto", help="auto, torch or fused (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print a JSON object a line instead of a table")
    flags = parser.parse_args(argv)
    try:
        if min(*flags.contexts, flags.new_tokens, flags.batch, 1) < 1:
            raise ValueError("--contexts, --new-tokens and --batch must be at least 1")
        shapes = same_size(get_preset(flags.size) if flags.size else BENCH)
        rows = []
        for name, config in shapes.items():
            torch.manual_seed(0)
            model = HybridLM(config, kernels=flags.kernels).to(flags.device, getattr(torch, flags.dtype)).eval()
            measure(model, 8, 4, flags.batch)
            for context in flags.contexts:
                result = measure(model, context, flags.new_tokens, flags.batch)
                rows.append({"model": name, "parameters": config.n_parameters, "context": context, **result})
            del model
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if flags.json:
        for row in rows:
            print(json.dumps(row))
        return 0
    table = Table(title=f"decoding on {flags.device}, {flags.dtype}, batch {flags.batch}, torch {torch.__version__}")
    for column in ("model", "parameters", "context", "prompt, s", "tokens/s", "state, MiB"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        table.add_row(
            row["model"],
            f"{row['parameters'] / 1e6:,.1f}M",
            f"{row['context']:,}",
            f"{row['prompt_s']:.2f}",
            f"{row['tokens_per_s']:,.1f}",
            f"{row['state_bytes'] / 2**20:,.2f}",
            end_section=row["context"] == flags.contexts[-1],
        )
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
