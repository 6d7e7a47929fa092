"""How fast a model writes by how much it has read: a hybrid, a pure Mamba-2 and a pure attention model of one size.

    python -m model.bench_decode --contexts 256 1024 4096
    python -m model.bench_decode --size 1.3B --dtype bfloat16 --contexts 1024 8192 65536    # on a GPU

--peer: beside the class of transformers that the export is of, with the same weights:

    python -m model.bench_decode --size 1.3B --dtype bfloat16 --batch 1 64 --peer --contexts

The weights are random, and so are the tokens: neither changes the cost.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from importlib.util import find_spec, module_from_spec
from itertools import pairwise
from types import ModuleType

import torch
from rich.console import Console
from rich.table import Table

from model.config import PRESETS, get_preset
from model.decode import Decoder
from model.export import join
from model.hybrid import HybridLM
from model.stock import parameter_names, stock_class, stock_config
from model.weights import check_device

PEER_MODES = ("eager", "compiled")

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
    """{seconds of a row's prompt, seconds to start the decoder, tokens/s after it, bytes of a row's state}.

    The tokens of the prompt are random, and every row has the same. tokens/s is that of the median token; each is the
    likeliest, and is there before the next begins.
    """
    device = next(model.parameters()).device
    tokens = torch.randint(0, model.config.vocab_size, (1, context), device=device)
    started = now(device)
    logits, state = model.step(tokens, model.new_state(), last=True)
    times = [started, now(device)]
    state_bytes = sum(tensor_bytes(value) for layer in state for value in layer.values())
    decoder, chosen = Decoder(model), logits[:, -1].argmax(-1).expand(batch)
    decoder.start(model.take_rows(state, [0] * batch), room=new_tokens)
    times.append(now(device))
    for _ in range(new_tokens):
        chosen = decoder.step(chosen).argmax(-1)
        times.append(now(device))
    return {
        "prompt_s": times[1] - times[0],
        "start_s": times[2] - times[1],
        "tokens_per_s": batch / median(times[2:]),
        "state_bytes": state_bytes,
    }


def now(device):
    """Seconds by the clock, when the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def median(times):
    """Of the differences between points in time."""
    return statistics.median(after - before for before, after in pairwise(times))


def stock_model(model):
    """transformers' own class with the weights of a HybridLM, as model.export writes it. ValueError if none fits."""
    take_mamba_ssm_bare()  # before transformers looks for its kernels
    from transformers import AutoConfig, AutoModelForCausalLM

    config, weight = model.config, model.embedding.weight
    family, why_not = stock_class(config)
    if not family:
        raise ValueError(f"--peer needs a shape that transformers has: {why_not}; 1.3B is one")
    content = stock_config(config, family)
    with torch.device(weight.device):
        theirs = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(content.pop("model_type"), **content), dtype=weight.dtype
        )
    ours = model.state_dict()
    names = parameter_names(config, family)
    theirs.load_state_dict(
        {name: join(name, [ours[part] for part in parts]) for name, parts in names.items()},
        strict=not config.tied_embeddings,  # the head is no weight of its own
    )
    theirs.generation_config.eos_token_id = theirs.config.eos_token_id = None  # every text as long as asked for
    return theirs.eval()


def take_mamba_ssm_bare():
    """Make mamba_ssm's Triton kernels importable where its CUDA extension, which is Mamba-1's, was not built."""
    found = find_spec("mamba_ssm")
    if found and "selective_scan_cuda" not in sys.modules and not find_spec("selective_scan_cuda"):
        sys.modules["selective_scan_cuda"] = ModuleType("selective_scan_cuda")
        sys.modules.setdefault("mamba_ssm", module_from_spec(found))  # without its own __init__


@torch.inference_mode()
def measure_peer(theirs, mode, context, new_tokens, batch):
    """tokens/s of transformers' generate, counted as in `measure`: of the median token.

    mode: "eager"; "compiled": with its static cache, which it compiles for on a GPU.
    """
    tokens = torch.randint(0, theirs.config.vocab_size, (batch, context), device=theirs.device)
    times = []

    def tick(input_ids, scores, **kwargs):  # asked after each token whether a row has ended
        times.append(now(theirs.device))
        return torch.zeros(batch, dtype=torch.bool, device=theirs.device)

    options = {"cache_implementation": "static"} if mode == "compiled" else {}
    for _ in range(2):  # the first time compiles
        times.clear()
        theirs.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new_tokens + 1, do_sample=False,
            stopping_criteria=[tick], **options,
        )  # fmt: skip
    return batch / median(times)


def compare(model, modes, context, new_tokens, batches):
    """Yield a row {batch, mode, tokens_per_s, ratio: ours over theirs, or error} for ours and for each of theirs.

    kernels: what transformers finds for its Mamba layers.
    """
    theirs = stock_model(model)
    kernels = ", ".join(name for name in ("mamba_ssm", "causal_conv1d") if find_spec(name)) or "PyTorch's own"
    for batch in batches:
        measure(model, 8, 4, batch)
        ours = measure(model, context, new_tokens, batch)["tokens_per_s"]
        common = {"class": type(theirs).__name__, "kernels": kernels, "context": context, "batch": batch}
        yield {**common, "mode": "ours", "tokens_per_s": ours}
        for mode in modes:
            row = {**common, "mode": mode}
            try:
                speed = measure_peer(theirs, mode, context, new_tokens, batch)
                yield {**row, "tokens_per_s": speed, "ratio": ours / speed}
            except (
                Exception
            ) as error:  # another project's code under a compiler: whatever it is, the rest still counts
                yield {**row, "error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"[:200]}


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
        "--contexts", type=int, nargs="*", default=[256, 1024, 4096, 8192], help="tokens read before (%(default)s)"
    )
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens timed (default %(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="sequences side by side (default 1)")
    parser.add_argument(
        "--peer", nargs="*", choices=PEER_MODES, help="beside transformers' own class, in these of its modes (all)"
    )
    parser.add_argument("--peer-context", type=int, default=1024, help="tokens read before (default %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default=device, help="torch device (default here: %(default)s)")
    parser.add_argument("--kernels", default="auto", help="auto, torch or fused (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print a JSON object a line instead of tables")
    flags = parser.parse_args(argv)
    title = f"{flags.device}, {flags.dtype}, torch {torch.__version__}"
    try:
        if min(*flags.contexts, flags.new_tokens - 1, *flags.batch, flags.peer_context, 1) < 1:
            raise ValueError("--contexts, --batch and --peer-context must be at least 1, --new-tokens at least 2")
        check_device(flags.device)
        config = get_preset(flags.size) if flags.size else BENCH
        if flags.peer is not None:
            rows = []
            for row in compare(
                new_model(config, flags), flags.peer or PEER_MODES, flags.peer_context, flags.new_tokens, flags.batch
            ):
                rows.append(row)
                if flags.json:
                    print(json.dumps(row), flush=True)
            if not flags.json:
                Console().print(peer_table(rows, title))
        if flags.contexts:
            rows = list(by_context(same_size(config), flags))
            if not flags.json:
                Console().print(context_table(rows, title, flags.contexts[-1]))
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def new_model(config, flags):
    torch.manual_seed(0)
    with torch.device(flags.device):
        model = HybridLM(config, kernels=flags.kernels)
    return model.to(getattr(torch, flags.dtype)).eval()


def by_context(shapes, flags):
    """Yield the rows of the table by context; as JSON, they are printed as they come."""
    for name, config in shapes.items():
        model = new_model(config, flags)
        for batch in flags.batch:
            measure(model, 8, 4, batch)
            for context in flags.contexts:
                result = measure(model, context, flags.new_tokens, batch)
                row = {"model": name, "parameters": config.n_parameters, "batch": batch, "context": context, **result}
                if flags.json:
                    print(json.dumps(row), flush=True)
                yield row


def peer_table(rows, title):
    what = f"{rows[0]['class']}, its Mamba kernels {rows[0]['kernels']}, context {rows[0]['context']:,}"
    table = Table(title=f"decoding beside {what}, {title}")
    for column in ("batch", "", "tokens/s", "ours / theirs"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        ours = row["mode"] == "ours"
        speed = row["error"] if "error" in row else f"{row['tokens_per_s']:,.1f}"
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
        table.add_row(str(row["batch"]), "ours" if ours else f"theirs, {row['mode']}", speed, ratio)
    return table


def context_table(rows, title, last):
    table = Table(title=f"decoding by context, {title}")
    for column in ("model", "parameters", "batch", "context", "prompt, s", "tokens/s", "state, MiB"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        table.add_row(
            row["model"],
            f"{row['parameters'] / 1e6:,.1f}M",
            str(row["batch"]),
            f"{row['context']:,}",
            f"{row['prompt_s']:.2f}",
            f"{row['tokens_per_s']:,.1f}",
            f"{row['state_bytes'] / 2**20:,.2f}",
            end_section=row["context"] == last,
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
