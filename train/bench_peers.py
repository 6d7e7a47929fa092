"""This network beside other projects' hybrids of the same shape, on the same machine, batch and optimizer.

    python -m train.bench_peers                                  # 1.3B at 4096 tokens, on a GPU
    python -m train.bench_peers --size tiny --seq-len 64 --kernels torch      # what a CPU can do

The peers are transformers' BambaForCausalLM and mamba_ssm's MambaLMHeadModel, each with its own fused kernels and its
own loss; one whose package is missing is left out, and says so. All compute in bf16 on a GPU, rows are one document
each, weights are random. Two things are timed, as medians after a warm-up: forward and backward of one micro-batch,
and a whole optimizer step of --grad-accum of them in DeepSpeed with the file of --ds-config, clipping and AdamW too.
Neither peer has a gate on its attention, so sizes that have one cannot be compared. Bamba turns half of each head's
channels; mamba_ssm turns them only where flash-attn is installed. With --compile each network is timed under
torch.compile too, forward and backward alone.
"""

import argparse
import gc
import importlib.util
import json
import os
import shlex
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import profile

from model.bench_decode import take_mamba_ssm_bare
from model.config import get_preset
from model.stock import GRANITE, stock_class
from train.bench import machine
from train.bench_data import print_table
from train.exit_codes import leave
from train.hardware import gpu_of
from train.profiler import kernel_times, read_trace, wait_for_gpu
from train.run_dir import git_commit, write_json

WARM_UP = 2


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m train.bench_peers", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--size", default="1.3B", help="a name in model.config.PRESETS (default: 1.3B)")
    parser.add_argument("--seq-len", type=int, default=4096, help="tokens in a row (default: 4096)")
    parser.add_argument("--micro-batch", type=int, default=4, help="rows in a pass (default: 4)")
    parser.add_argument("--grad-accum", type=int, default=4, help="passes in a step (default: 4)")
    parser.add_argument("--passes", type=int, default=5, help="passes, and steps, that count (default: 5)")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS, help="default: all")
    parser.add_argument("--kernels", default="auto", help="of this network, as train/launch.py's (default: auto)")
    parser.add_argument("--ds-config", help="a DeepSpeed JSON (default: as train/launch.py's)")
    parser.add_argument("--compile", action="store_true", help="time forward and backward under torch.compile too")
    parser.add_argument("--json", type=Path, help="write all figures there")
    flags = parser.parse_args(argv)
    os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")
    try:
        result = compare(flags)
    except (ValueError, FileNotFoundError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(result)
    if flags.json:
        write_json(flags.json, result)
    return 0


# ---- the networks: each function takes a ModelConfig and returns (module, function of tokens that gives the loss)


def ours(shape, kernels):
    from model.hybrid import HybridLM
    from model.reference import IGNORED_TARGET

    model = HybridLM(shape, kernels=kernels)

    def loss(tokens):
        targets = tokens.roll(-1, dims=1)
        targets[:, -1] = IGNORED_TARGET
        return model(tokens, targets=targets)

    return model, loss


def bamba(shape, kernels):
    take_mamba_ssm_bare()  # before transformers looks for its kernels
    from transformers import BambaConfig, BambaForCausalLM

    config = BambaConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.d_model, intermediate_size=shape.d_ff,
        num_hidden_layers=shape.n_layers, num_attention_heads=shape.n_heads, num_key_value_heads=shape.n_kv_heads,
        attn_layer_indices=attention_layers(shape), max_position_embeddings=shape.seq_len,
        tie_word_embeddings=shape.tied_embeddings, rms_norm_eps=shape.norm_eps, mamba_n_heads=shape.n_mamba_heads,
        mamba_d_head=shape.mamba_head_dim, mamba_n_groups=shape.n_groups, mamba_d_state=shape.d_state,
        mamba_d_conv=shape.d_conv, mamba_expand=shape.expand, mamba_chunk_size=shape.chunk_size, use_cache=False,
        attn_implementation="flash_attention_2" if importlib.util.find_spec("flash_attn") else "sdpa",
    )  # fmt: skip
    model = BambaForCausalLM(config)
    return model, lambda tokens: model(input_ids=tokens, labels=tokens, use_cache=False).loss


def mamba_lm(shape, kernels):
    take_mamba_ssm_bare()
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    from mamba_ssm.modules.mha import RotaryEmbedding

    config = MambaConfig(
        d_model=shape.d_model, d_intermediate=shape.d_ff, n_layer=shape.n_layers, vocab_size=shape.vocab_size,
        ssm_cfg=dict(
            layer="Mamba2", d_state=shape.d_state, d_conv=shape.d_conv, expand=shape.expand,
            headdim=shape.mamba_head_dim, ngroups=shape.n_groups, chunk_size=shape.chunk_size,
        ),
        attn_layer_idx=attention_layers(shape),
        attn_cfg=dict(
            causal=True, num_heads=shape.n_heads, num_heads_kv=shape.n_kv_heads, head_dim=shape.head_dim,
            qkv_proj_bias=False, out_proj_bias=False, rotary_emb_dim=shape.head_dim if RotaryEmbedding else 0,
        ),
        residual_in_fp32=False, pad_vocab_size_multiple=1, tie_embeddings=shape.tied_embeddings,
    )  # fmt: skip
    model = MambaLMHeadModel(config)

    def loss(tokens):
        logits = model(tokens).logits[:, :-1].float()
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    return model, loss


OURS = "this repository"
NETWORKS = {OURS: ours, "transformers": bamba, "mamba-ssm": mamba_lm}  # peers by what pip calls their package
PEERS = [name for name in NETWORKS if name != OURS]


def attention_layers(shape):
    return [i for i, kind in enumerate(shape.layer_pattern) if kind == "A"]


# ---- timing


def compare(flags):
    """All figures. A peer that fails has its error in their place. Raises ValueError for flags that cannot be."""
    for name in ("micro_batch", "grad_accum", "passes"):
        if getattr(flags, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(flags, name)} is too small; allowed: 1 or more")
    shape = get_preset(flags.size, seq_len=flags.seq_len)
    family, why_not = stock_class(shape)
    if family != GRANITE:
        raise ValueError(
            f"{flags.size} has no peer of its shape ({why_not or 'layers without attention or a SwiGLU'})"
        )
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from train.processes import start_processes

    start_processes(0, 1, timeout_minutes=10)
    rows = []
    for name in (OURS, *flags.peers):
        print(f"{name} ...", file=sys.stderr, flush=True)
        rows.append({"name": name} | figures(name, shape, flags))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    gpu = machine()
    return {
        "size": flags.size, "seq_len": shape.seq_len, "micro_batch": flags.micro_batch, "grad_accum": flags.grad_accum,
        "gflop_per_token": shape.flops_per_token / 1e9, "rows": rows,
        "command": shlex.join([sys.executable, "-m", "train.bench_peers", *sys.argv[1:]]),
        "git_commit": git_commit(), "day": time.strftime("%Y-%m-%d", time.gmtime()), **gpu,
    }  # fmt: skip


def figures(name, shape, flags):
    """One network's, as a dict; with "problem", a line, where a peer cannot run, or not all of it."""
    if name != OURS and importlib.util.find_spec(name.replace("-", "_")) is None:
        return {"problem": f"left out: {name} is not installed (pip install {name})"}
    found = {}
    try:
        add_figures(found, name, shape, flags)
    except Exception as error:  # whatever another project's code may raise: the others are still timed
        if name == OURS:
            raise
        found["problem"] = f"failed: {first_line(error)}"
    return found


def add_figures(found, name, shape, flags):
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    torch.manual_seed(0)
    with torch.device(device):
        model, loss = NETWORKS[name](shape, flags.kernels)
    module = WithLoss(model.train(), loss).to(dtype)
    tokens = torch.randint(shape.vocab_size, (flags.micro_batch, shape.seq_len), device=device)
    found["version"] = None if name == OURS else version(name)
    found["parameters"] = sum(weight.numel() for weight in model.parameters())
    found |= forward_and_backward(module, tokens, flags.passes, "")
    found["groups"] = groups(module, tokens)
    if flags.compile:
        try:
            found |= forward_and_backward(torch.compile(module), tokens, flags.passes, "compiled_")
        except Exception as error:  # whatever the compiler raises: the eager figures stand
            found["compiled_problem"] = first_line(error)
        torch.compiler.reset()
    found |= whole_steps(module, tokens, flags)


class WithLoss(nn.Module):
    """Tokens to loss: one forward for DeepSpeed and torch.compile, whatever the network's own looks like."""

    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, tokens):
        return self.loss(tokens)


def forward_and_backward(module, tokens, passes, prefix):
    seconds = []
    for _ in range(WARM_UP + passes):
        began = time.perf_counter()
        module.zero_grad(set_to_none=True)
        module(tokens).backward()
        wait_for_gpu()
        seconds.append(time.perf_counter() - began)
    module.zero_grad(set_to_none=True)
    typical = median(seconds[WARM_UP:])
    return {
        f"{prefix}pass_ms": 1e3 * typical, f"{prefix}pass_tokens_per_s": tokens.numel() / typical,
        **peak(f"{prefix}pass_"),
    }  # fmt: skip


def groups(module, tokens):
    """Milliseconds by kernel group of one pass."""
    with profile() as recorder:
        module(tokens).backward()
        wait_for_gpu()
    module.zero_grad(set_to_none=True)
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        recorder.export_chrome_trace(file.name)
        return {group["group"]: group["ms"] for group in kernel_times(read_trace(file.name))["groups"]}


def whole_steps(module, tokens, flags):
    """Steps of the same DeepSpeed settings, AdamW and clipping for every network."""
    import deepspeed

    from train.engine import default_ds_config, read_ds_config

    settings = read_ds_config(flags.ds_config or default_ds_config(1)) | {
        "train_micro_batch_size_per_gpu": flags.micro_batch,
        "gradient_accumulation_steps": flags.grad_accum,
        "gradient_clipping": 1.0,
    }
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, weight_decay=0.1, fused=tokens.is_cuda)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    seconds = []
    for _ in range(WARM_UP + flags.passes):
        began = time.perf_counter()
        for _ in range(flags.grad_accum):
            loss = engine(tokens)
            engine.backward(loss)
            engine.step()
        wait_for_gpu()
        seconds.append(time.perf_counter() - began)
    found = {"loss": loss.item()} | peak("step_")
    engine.destroy()
    typical = median(seconds[WARM_UP:])
    return found | {
        "step_ms": 1e3 * typical, "step_tokens_per_s": flags.grad_accum * tokens.numel() / typical
    }  # fmt: skip


def peak(prefix):
    """The most memory of the GPU since the last call."""
    if not torch.cuda.is_available():
        return {}
    most = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return {prefix + "memory_gib": most}


def first_line(error):
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"


def show(result):
    rows, gpu = [row for row in result["rows"] if "groups" in row], gpu_of(result["gpu"])
    first = rows[0]

    def cells(row, kind):
        """Rate, MFU, memory, and this repository's rate to that one's, of a "pass" or a whole "step"."""
        rate = row.get(f"{kind}_tokens_per_s")
        if rate is None:
            return "-", "-", "-", "-"
        mfu = f"{rate * result['gflop_per_token'] / (1e3 * gpu.dense_tflops['bf16']):.1%}" if gpu else "-"
        memory = f"{row[f'{kind}_memory_gib']:.1f}" if f"{kind}_memory_gib" in row else "-"
        return f"{rate:,.0f}", mfu, memory, f"{first[f'{kind}_tokens_per_s'] / rate:.2f}"

    print_table(
        f"{result['size']}, {result['micro_batch']} x {result['seq_len']} tokens a pass, {result['grad_accum']} a "
        f"step, {result['gpu']}; ratio: this repository's rate to that one's",
        ("", "parameters", "pass tok/s", "MFU", "GiB", "ratio", "compiled", "step tok/s", "MFU", "GiB", "ratio"),
        [(
            f"{row['name']} {row['version'] or ''}", f"{row['parameters']:,}", *cells(row, "pass"),
            f"{row['compiled_pass_tokens_per_s']:,.0f}" if "compiled_pass_tokens_per_s" in row else "-",
            *cells(row, "step"),
        ) for row in rows],
    )  # fmt: skip
    names = sorted({group for row in rows for group in row["groups"]}, key=lambda name: -first["groups"].get(name, 0))
    print_table(
        "ms of a pass by kernel group",
        ("group", *(row["name"] for row in rows)),
        [(name, *(f"{row['groups'].get(name, 0):.1f}" for row in rows)) for name in names],
    )
    for row in result["rows"]:
        for key, what in (("problem", ""), ("compiled_problem", ", compiled")):
            if key in row:
                print(f"{row['name']}{what}: {row[key]}")
    print(f"commit {result['git_commit']}, {result['day']}, {json.dumps(result['versions'])}")


if __name__ == "__main__":
    leave(main())
