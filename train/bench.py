"""What training a size takes on this machine: tokens/s, MFU, memory, start-up, and where the time goes.

    python -m train.bench --size 1.3B
    python -m train.bench --size 6.7B --gpus 2 --json bench.json -- --ds-config ds_configs/zero3.json --micro-batch 2

It starts train/launch.py itself, loader, clipping, optimizer and log included, with the flags behind `--`, on
documents of random tokens or on --data, and reads what that run leaves. A step is --grad-accum micro-batches on each
GPU. Its time is the median of the --steps after --warm-up, each from one line of the log to the next. One more step
is then recorded (train/profiler.py), since recording slows it; the gap is what a step that counts takes beyond the
time in which kernels ran in the recorded one. Start-up counts from the command to the end of the first step.
"""

import argparse
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np

from curation.shards import ShardHeader, file_sha256, write_manifest, write_source
from model.config import ModelConfig, get_preset
from train.bench_data import print_table
from train.config import SIZE_DEFAULTS, TrainConfig, add_flags
from train.hardware import gpu_of
from train.run_dir import RunDir, read_json, read_metrics, write_json

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT_TOKENS = 1024  # on average, of random documents
MOST_TOKENS = 1 << 26  # of them; a longer run reads them again
PACKAGES = ("torch", "triton", "deepspeed", "transformers", "mamba-ssm", "causal-conv1d", "flash-attn", "torchao")
NO_PRODUCTS = ("attention_scores", "mamba_conv", "mamba_scan")  # of flops_per_token_by_part


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m train.bench", usage="%(prog)s [flags] -- [flags of train/launch.py]", description=__doc__,
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--size", default="1.3B", help="a name in model.config.PRESETS (default: 1.3B)")
    parser.add_argument("--gpus", type=int, default=1, help="processes, one a GPU (default: 1)")
    parser.add_argument("--data", help="a data folder (default: random tokens, made for this)")
    parser.add_argument("--grad-accum", type=int, default=8, help="micro-batches in a step (default: 8)")
    parser.add_argument(
        "--warm-up", type=int, default=5, help="steps before those that count; 8-bit scales take four (default: 5)"
    )
    parser.add_argument("--steps", type=int, default=5, help="steps that count (default: 5)")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--keep", type=Path, help="a new folder for the run, its trace included (default: deleted)")
    words = sys.argv[1:] if argv is None else list(argv)
    at = words.index("--") if "--" in words else len(words)
    flags = parser.parse_args(words[:at])
    try:
        with tempfile.TemporaryDirectory(prefix="bench_") as folder:
            result = measure(flags, words[at + 1 :], Path(folder))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"error: the run failed with code {error.returncode}; its own message is above", file=sys.stderr)
        return 1
    show(result)
    if flags.json:
        write_json(flags.json, result)
    return 0


def measure(flags, run_flags, folder):
    """All figures, of a run made for them. Raises ValueError for wrong flags, CalledProcessError if the run fails."""
    for name in ("gpus", "grad_accum", "warm_up", "steps"):
        if getattr(flags, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(flags, name)} is too small; allowed: 1 or more")
    run_dir = RunDir(flags.keep or folder / "run")
    last = flags.warm_up + flags.steps + 1
    arguments = [
        "--size", flags.size, "--data", flags.data or str(folder / "data"), "--run", str(run_dir.path), "--no-save",
        "--steps", str(last), "--eval-every", "0", "--profile-steps", f"{last}:{last}", *run_flags,
    ]  # fmt: skip
    batch_tokens = tokens_of_a_step(arguments, flags)
    arguments += ["--batch-tokens", str(batch_tokens)]
    if not flags.data:
        vocab_size = get_preset(flags.size).vocab_size
        make_random_data(
            folder / "data", vocab_size, min(batch_tokens * (last + 1), max(MOST_TOKENS, 2 * batch_tokens))
        )
    port = free_port()
    command = [sys.executable, str(ROOT / "train/launch.py"), *arguments]
    if flags.gpus > 1:
        launcher = ["-m", "deepspeed.launcher.runner", f"--num_gpus={flags.gpus}", f"--master_port={port}"]
        command[1:1] = launcher
    began = time.time()
    subprocess.run(command, env=os.environ | {"MASTER_PORT": str(port)}, check=True)
    return figures(run_dir, flags, began) | {
        "command": shlex.join([sys.executable, "-m", "train.bench", *sys.argv[1:]]),
        "run": shlex.join(command),
    }  # fmt: skip


def tokens_of_a_step(arguments, flags):
    parser = argparse.ArgumentParser(prog="train/launch.py", allow_abbrev=False, add_help=False)
    add_flags(parser, TrainConfig)
    given = parser.parse_args(arguments)
    shape = get_preset(flags.size, seq_len=getattr(given, "seq_len", None))
    if hasattr(given, "batch_tokens"):
        return given.batch_tokens
    micro_batch = getattr(given, "micro_batch", SIZE_DEFAULTS[flags.size]["micro_batch"])
    if micro_batch == "auto":
        raise ValueError("--micro-batch auto is chosen for a batch: give --batch-tokens too, behind the `--`")
    return flags.gpus * flags.grad_accum * micro_batch * shape.seq_len


def make_random_data(folder, vocab_size, n_tokens):
    """A data folder of n_tokens random tokens, or a few more, in documents of about DOCUMENT_TOKENS."""
    random = np.random.default_rng(0)
    n_documents = -(-n_tokens // DOCUMENT_TOKENS)
    lengths = random.permutation(np.linspace(DOCUMENT_TOKENS // 2, 3 * DOCUMENT_TOKENS // 2, n_documents).astype(int))
    folder.mkdir()
    tokenizer = folder / "tokenizer.model"
    tokenizer.write_bytes(b"random tokens have no tokenizer")
    header = ShardHeader(
        source="random", split="train", vocab_size=vocab_size, separator_id=0, tokenizer_sha256=file_sha256(tokenizer)
    )
    documents = ((str(i), random.integers(1, vocab_size, n)) for i, n in enumerate(lengths))
    source = write_source(folder, header, documents, text_bytes=0)
    counts = {name: source[name] for name in ("documents", "tokens", "text_bytes")}
    described = {
        "file": tokenizer.name,
        "sha256": header.tokenizer_sha256,
        "vocab_size": vocab_size,
        "separator_id": 0,
    }
    splits = {"train": {**counts, "sources": {"random": source}}}
    write_manifest(folder, {"tokenizer": described, "splits": splits})


def figures(run_dir, flags, began):
    """What a finished run's folder says. began: when its command started, as time.time() tells."""
    record, rows = read_json(run_dir.config), read_metrics(run_dir.metrics)
    plan, shape = record["plan"], ModelConfig(**record["model"])
    batch_tokens = plan["batch_sequences"] * shape.seq_len
    steps_ms = [1e3 * (b["seconds"] - a["seconds"]) for a, b in pairwise(rows)]  # from the second on, the log included
    step_ms = median(steps_ms[flags.warm_up - 1 : flags.warm_up - 1 + flags.steps])
    rate = 1e3 * batch_tokens / step_ms
    times = read_json(run_dir.path / "profile" / "times.json")
    at = {event["event"]: event["time"] - began for event in map(json.loads, run_dir.events.read_text().splitlines())}
    gpu = machine()
    known = gpu_of(gpu["gpu"])
    floor_ms = {}
    if known and record["run"]["recompute"] == "none":
        floor_ms = floors(shape, batch_tokens / flags.gpus, flags.gpus, known, {g["group"] for g in times["groups"]})
    return {
        "size": flags.size, "parameters": record["parameters"], "n_gpus": flags.gpus,
        "micro_batch": plan["micro_batch"], "grad_accum": plan["grad_accum"], "seq_len": shape.seq_len,
        "batch_tokens": batch_tokens, "zero_stage": record["deepspeed"]["zero_optimization"]["stage"],
        "kernels": record["kernels"], "recompute": record["run"]["recompute"], "optimizer": record["run"]["optimizer"],
        "fp8": record["run"].get("fp8", False),
        "tokens_per_s": rate, "tokens_per_s_per_gpu": rate / flags.gpus,
        "gflop_per_token": shape.flops_per_token / 1e9,
        "mfu": rate * shape.flops_per_token / (flags.gpus * known.dense_tflops["bf16"] * 1e12) if known else None,
        "memory_gib": max(row["memory_gib"] for row in rows),
        "memory_reserved_gib": max(row.get("memory_reserved_gib", 0.0) for row in rows) or None,
        "start_up_s": at["start"] + rows[0]["seconds"],
        "start_up": {"processes_joined_s": at["start"], "kernels_ready_s": at.get("kernels")},
        "step_ms": step_ms, "steps_ms": [round(ms, 1) for ms in steps_ms],
        "losses": [row["loss"] for row in rows],
        "busy_ms": times["busy_ms"], "gap_ms": step_ms - times["busy_ms"],
        "groups": [group | {"floor_ms": floor_ms.get(group["group"])} for group in times["groups"]],
        "longest_kernels": times["kernels"],
        "git_commit": record["git_commit"], "versions": record["versions"] | gpu.pop("versions"), **gpu,
        "day": time.strftime("%Y-%m-%d", time.gmtime()),
    }  # fmt: skip


def floors(shape, tokens, n_gpus, gpu, groups):
    """{group: the ms a step that its work takes at the peaks of the GPU's data sheet}, for those easily counted.

    tokens: of one GPU in a step; groups: those that ran. Products count FLOPs, the head's in bf16 and the others in
    fp8 where fp8 products ran. The others count bytes: each activation (bf16) that a fused operation must read or
    write in the forward and the backward pass, once; AdamW 30 bytes a parameter. Real kernels reach 0.7 to 0.9 of it.
    """
    d, inner, n_layers = shape.d_model, shape.d_inner, shape.n_layers
    n_mamba = shape.layer_pattern.count("M")
    n_attention, bc = n_layers - n_mamba, 2 * shape.n_groups * shape.d_state
    activations = {  # read or written, forward + backward, a token
        "norms": (n_layers * (2 if shape.d_ff else 1) + 1) * (2 + 3) * d + n_mamba * (3 + 5) * inner,
        "convolution": n_mamba * (2 + 3) * shape.d_conv_channels,
        "scan": n_mamba * (2 * inner + bc + 3 * inner + 2 * bc),
        "element-wise": n_layers * (3 + 5) * shape.d_ff + n_attention * shape.attention_gate * (3 + 5) * d,
        "cross entropy": 2 * shape.vocab_size,
    }
    peak = {kind: tflops * 1e9 for kind, tflops in gpu.dense_tflops.items()}  # FLOP a ms
    flops = shape.flops_per_token_by_part
    products = sum(count for part, count in flops.items() if part not in NO_PRODUCTS)
    result = {group: 2 * count * tokens / (gpu.bandwidth_gb_s * 1e6) for group, count in activations.items()}
    result["attention"] = flops["attention_scores"] * tokens / peak["bf16"]
    result["optimizer"] = 30 * shape.n_parameters / n_gpus / (gpu.bandwidth_gb_s * 1e6)
    in_fp8 = products - flops["head"] if "products, fp8" in groups else 0
    result["products"] = (products - in_fp8) * tokens / peak["bf16"]
    if in_fp8:
        result["products, fp8"] = in_fp8 * tokens / peak["fp8"]
    return {group: round(ms, 2) for group, ms in result.items()}


def machine():
    """The GPU and what runs on it: {"gpu", "gpu_memory_gib", "host", "versions"}."""
    import torch  # after the run: this process takes no GPU while it is measured

    found = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    here = {"gpu": "none", "gpu_memory_gib": None, "host": socket.gethostname()}
    if torch.cuda.is_available():
        found["cuda"] = torch.version.cuda
        here["gpu"] = torch.cuda.get_device_name()
        here["gpu_memory_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
    return here | {"versions": found}


def show(result):
    """The figures as two tables."""
    dash = "-"
    print_table(
        f"{result['size']}, {result['parameters']:,} parameters, {result['n_gpus']} x {result['gpu']}, ZeRO-"
        f"{result['zero_stage']}, {result['grad_accum']} x {result['micro_batch']} x {result['seq_len']} tokens a GPU",
        ("tokens/s", "a GPU", "MFU", "memory GiB", "reserved", "start-up s", "step ms", "busy ms", "gap ms"),
        [(
            f"{result['tokens_per_s']:,.0f}", f"{result['tokens_per_s_per_gpu']:,.0f}",
            f"{result['mfu']:.1%}" if result["mfu"] else dash, f"{result['memory_gib']:.1f}",
            f"{result['memory_reserved_gib']:.1f}" if result["memory_reserved_gib"] else dash,
            f"{result['start_up_s']:.1f}", f"{result['step_ms']:.0f}", f"{result['busy_ms']:.0f}",
            f"{result['gap_ms']:.0f}",
        )],
    )  # fmt: skip
    print_table(
        "time of a step by kernel group; the floor is the work at the data sheet's peaks",
        ("group", "ms", "of busy", "launches", "floor ms", "x floor"),
        [(
            group["group"], f"{group['ms']:.1f}", f"{group['ms'] / (result['busy_ms'] or 1):.1%}",
            f"{group['launches']:,.0f}", f"{group['floor_ms']:.1f}" if group["floor_ms"] else dash,
            f"{group['ms'] / group['floor_ms']:.2f}" if group["floor_ms"] else dash,
        ) for group in result["groups"]],
    )  # fmt: skip
    joined, kernels = result["start_up"]["processes_joined_s"], result["start_up"]["kernels_ready_s"]
    print(
        f"start-up: processes joined after {joined:.1f} s, "
        + (f"kernels ready after {kernels:.1f} s, " if kernels else "")
        + f"first step done after {result['start_up_s']:.1f} s"
    )
    print(f"commit {result['git_commit']}, {result['day']}, {json.dumps(result['versions'])}")
    print(f"run: {result['run']}")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
