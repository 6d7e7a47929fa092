"""What one training run is: a frozen dataclass whose fields are the flags of train/launch.py.

Needs no torch. This file leaves annotations as types (no `from __future__ import annotations`): add_flags reads them.
"""

import argparse
import dataclasses
import math
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, get_args

from model.config import FP8_MULTIPLE, ModelConfig, get_preset
from train.memory import largest_micro_batch

OPTIMIZERS = ("adamw", "adamw8bit", "muon")
SCHEDULES = ("cosine", "wsd")
WSD_SHAPES = ("1-sqrt", "linear")


def option(default=dataclasses.MISSING, *, least=None, word=None, help):
    """A field that is a flag. least: the smallest value allowed, checked by make_plan; word: allowed besides numbers."""
    return field(default=default, metadata={"help": help, "least": least, "word": word})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run. Every field is a flag, and every flag is a field; None means "from the size's defaults" or as it says."""

    # fmt: off
    preset: str | None = option(None, help="a set-up of train.config.RUN_PRESETS: quick_test, small_scale, medium_scale, large_scale, single_gpu, laptop_8gb, lab, muon; every other flag overrides it (default: none)")
    size: str | None = option(None, help="a name in model.config.PRESETS: nano, nano-gated, 1.3B, 2.7B, 6.7B, 13B ... (default: the preset's)")
    layer_pattern: str | None = option(None, help="one letter a layer, M (Mamba-2) or A (attention), of any length, such as AMAMAMAM (default: the size's)")
    seq_len: int | None = option(None, least=1, help="tokens in a sequence (default: the size's)")
    rope_scaling: str | None = option(None, help="linear, ntk or yarn: stretch the rotary positions by --seq-len / the size's own (default: as the size is)")
    data: str = option(help="a data folder, made by curation.pipeline; or stream:RECIPE.json, to read Hugging Face datasets as they stream (train/stream.py)")
    tokenizer: str | None = option(None, help="with --data stream:...: a tokenizer.model, or the folder that holds it (default: the data folder's own)")
    mixture: str | None = option(None, help="weights by source, such as code=0.5,docs=0.3,web=0.2, or `recipe`: as the data was curated for; other sources are left out (default: every source, in proportion to its tokens)")
    max_epochs: str | None = option(None, help="with --mixture: how often a source may be repeated at most, such as code=4,docs=1.5 (default: as often as its weight takes)")
    run: str | None = option(None, help="the run's folder (default: runs/ and the preset's or the size's name)")
    steps: int | None = option(None, least=1, help="optimizer steps; the length of the learning-rate schedule (default: one pass over the data)")
    tokens: float | None = option(None, help="instead of --steps: how many tokens to train on, rounded down to whole steps (default: as --steps says)")
    epochs: float | None = option(None, help="instead of --steps: how many passes over the data, rounded down to whole steps (default: as --steps says)")
    stop_after: int | None = option(None, least=1, help="save and stop after this step, short of the schedule's end (default: go to the end)")
    batch_tokens: int | None = option(None, least=1, help="tokens in one optimizer step, over all GPUs (default: the size's)")
    micro_batch: int | str | None = option(None, least=1, word="auto", help="sequences a GPU works on at a time; auto: as many as fit, by the planner's count of its memory (default: the size's)")
    lr: float | None = option(None, help="peak learning rate (default: the size's)")
    min_lr: float = option(0.1, help="the last learning rate, as a part of the peak")
    schedule: str = option("cosine", help="after the warm-up: cosine, down to --min-lr over all steps; or wsd, level and then down to --min-lr in the last --decay-steps")
    decay_steps: int | None = option(None, least=1, help="with --schedule wsd: steps of the decay at the end (default: a fifth of the steps)")
    wsd_shape: str | None = option(None, help="with --schedule wsd: how the rate falls, by one minus the square root of the part done, or linear (default: 1-sqrt)")
    warmup_steps: int | None = option(None, least=0, help="steps of linear warm-up (default: 2000, at most a tenth of the steps)")
    weight_decay: float = option(0.1, least=0, help="AdamW's decoupled decay, on the weight matrices of the layers and the head")
    optimizer: str = option("adamw", help="adamw; adamw8bit: its moments of the matrices in 8 bits (bitsandbytes, on GPUs); or muon: Muon for the matrices of the layers, AdamW for the rest")
    muon_lr: float | None = option(None, help="with --optimizer muon: peak learning rate of its matrices (default: --lr, since its updates are scaled to AdamW's size)")
    muon_momentum: float | None = option(None, help="with --optimizer muon: decay rate of its mean of the gradients (default: 0.95)")
    beta1: float = option(0.9, help="AdamW's first decay rate")
    beta2: float = option(0.95, help="AdamW's second decay rate")
    z_loss: float = option(0.0, least=0, help="weight of the square of log Z, the softmax's denominator, in the training loss, which then includes it; 1e-4 is PaLM's; 0 leaves it out")
    clip: float = option(1.0, least=0, help="largest norm of the whole gradient; 0 switches clipping off")
    seed: int = option(1234, least=0, help="of the first weights and of the order of the data")
    ds_config: str | None = option(None, help="a DeepSpeed JSON (default: ds_configs/zero2.json, or cpu.json where there is no GPU)")
    kernels: str = option("auto", help="which operations run: fused (Triton), torch (PyTorch alone), or auto: fused where Triton and a GPU are present")
    fp8: bool = option(False, help="the layers' matrix products in 8-bit floats, forward and backward (model/fp8.py); weights, optimizer and everything else as without. Needs a GPU that has them (Hopper, Ada, Blackwell); without a GPU they are worked out in float32, slowly")
    recompute: str = option("none", help="layer: keep only each layer's input for the backward pass and run the layer again there (less memory, more work); none: keep everything")
    save_every: int = option(1000, least=0, help="steps between checkpoints; 0 saves only at the end")
    save: bool = option(True, help="write checkpoints; --no-save leaves none, not even at the end, for runs that only measure")
    keep: int = option(5, least=0, help="checkpoints to keep, and the one of lowest held-out loss beside them; older ones are deleted; 0 keeps all")
    eval_every: int = option(500, least=0, help="steps between measurements of the held-out loss; 0 leaves them out")
    eval_tokens: int = option(1_000_000, least=0, help="held-out tokens that a measurement reads, spread over the sources; 0 reads all")
    eval_data: str | None = option(None, help="a folder of benchmark files (make eval-data), or hub: some of their questions are asked with every measurement (default: the held-out loss alone)")
    eval_tasks: str | None = option(None, help="with --eval-data: which, such as piqa,mmlu (default: all but HumanEval)")
    eval_items: int | None = option(None, least=1, help="with --eval-data: questions of each, the same every time (default: 100)")
    timeout_minutes: float = option(10.0, least=0.1, help="minutes that a process waits for another before it fails; make it longer than the slowest save")
    skip_sigma: float = option(6.0, least=0, help="a step whose loss or gradient norm is this many standard deviations above those of the last 128 steps is skipped; 0 skips only what is not a number")
    rollback_after: int = option(5, least=0, help="steps skipped in a row after which the run goes back to its last good checkpoint and passes over the data in between; 0 never goes back")
    init_from: str | None = option(None, help="a checkpoint whose weights the run starts from, of another run or of model.import_hf; optimizer, schedule and data begin anew (default: random weights)")
    resume: bool = option(False, help="go on from the run's newest whole checkpoint")
    verify_data: bool = option(True, help="compare the sha256 of every shard with the manifest before training")
    norms_every: int = option(10, least=0, help="steps between measurements of the gradient's norm by part of the network; 0 leaves them out")
    profile_steps: str | None = option(None, help="FIRST:LAST, such as 10:12: record these steps of rank 0, kernel by kernel, in profile/ of the run's folder, and say where their time went (default: none)")
    wandb: str | None = option(None, help="send what metrics.jsonl says to Weights & Biases, to the project of this name; WANDB_MODE=offline keeps it in the run's folder (default: do not)")
    tensorboard: bool = option(False, help="write what metrics.jsonl says for TensorBoard, to tensorboard/ in the run's folder")
    clearml: str | None = option(None, help="send what metrics.jsonl says to ClearML, to the project of this name; CLEARML_OFFLINE_MODE=1 keeps it on this machine (default: do not)")
    # fmt: on


# Batch and rate follow GPT-3 (arXiv:2005.14165, table 2.1), the batch rounded to a power of two; micro-batches are a
# start, to be raised until memory is full. tiny and nano are for small machines and were found by trial (BENCHMARKS.md).
# 1.3B-gated takes the 512k tokens that its own recipe names. The laboratory, 50M, 100M and 150M are for little text:
# GPT-3's rate at a smaller batch, since a run of few tokens needs the steps (the critical batch is small early on,
# arXiv:1812.06162). Mamba sizes: the batch of 0.5M tokens and five times GPT-3's rate of the Mamba papers' own recipe
# (arXiv:2312.00752, appendix E.2).
# With recompute "none" and ZeRO-2, 13B would not train on eight GPUs of 80 GB (95 GiB, train/memory.py); 6.7B would, on
# four even (70 GiB), but not on one of any kind.
# fmt: off
SIZE_DEFAULTS = {
    "tiny":       dict(batch_tokens=512,     micro_batch=4, lr=3e-3),
    "nano":       dict(batch_tokens=2048,    micro_batch=4, lr=6e-3),

    "1.3B":       dict(batch_tokens=1 << 20, micro_batch=4, lr=2e-4),
    "2.7B":       dict(batch_tokens=1 << 20, micro_batch=2, lr=1.6e-4),
    "6.7B":       dict(batch_tokens=1 << 21, micro_batch=1, lr=1.2e-4, recompute="layer"),
    "13B":        dict(batch_tokens=1 << 21, micro_batch=1, lr=1e-4, recompute="layer"),

    "nano-gated": dict(batch_tokens=2048,    micro_batch=4, lr=6e-3),
    "32M-gated":  dict(batch_tokens=1 << 19, micro_batch=8, lr=6e-4),
    "125M-gated": dict(batch_tokens=1 << 19, micro_batch=8, lr=6e-4),
    "350M-gated": dict(batch_tokens=1 << 19, micro_batch=8, lr=3e-4),
    "760M-gated": dict(batch_tokens=1 << 19, micro_batch=4, lr=2.5e-4),
    "1.3B-gated": dict(batch_tokens=1 << 19, micro_batch=4, lr=2e-4),

    "lab":        dict(batch_tokens=1 << 17, micro_batch=32, lr=3e-4),

    "50M":        dict(batch_tokens=1 << 16, micro_batch=4, lr=6e-4),
    "100M":       dict(batch_tokens=1 << 16, micro_batch=4, lr=6e-4),
    "150M":       dict(batch_tokens=1 << 16, micro_batch=4, lr=6e-4),

    "mamba-130M": dict(batch_tokens=1 << 19, micro_batch=16, lr=3e-3),
    "mamba-370M": dict(batch_tokens=1 << 19, micro_batch=8, lr=1.5e-3),
    "mamba-1.3B": dict(batch_tokens=1 << 19, micro_batch=4, lr=1e-3),
}
# fmt: on


# The set-ups of `--preset`: flags and nothing else. Rates, batches and micro-batches that are not here are the size's.
# Without a length the run is one pass over the data. Those for few GPUs take the JSON that fits their number.
ZERO2 = "ds_configs/zero2.json"
RUN_PRESETS = {
    # a hundred steps on a small text: does everything work?
    "quick_test": dict(size="nano", steps=100, eval_every=50, eval_tokens=50_000, save_every=50, keep=2),
    # four GPUs, 10 billion tokens
    "small_scale": dict(size="1.3B", steps=10_000, batch_tokens=1 << 20, ds_config=ZERO2, recompute="layer"),
    # eight GPUs, 105 billion tokens: about one pass over the corpus of eight sources
    "medium_scale": dict(size="2.7B", steps=100_000, batch_tokens=1 << 20, ds_config=ZERO2, recompute="layer"),
    # eight to sixteen GPUs, 157 billion tokens: half the size's usual batch, so that the corpus is not read three times
    "large_scale": dict(size="6.7B", steps=150_000, batch_tokens=1 << 20, ds_config=ZERO2, recompute="layer"),
    # one GPU of 80 GB, 100 billion tokens in batches of 512k
    "single_gpu": dict(size="1.3B-gated", tokens=100e9, batch_tokens=1 << 19, weight_decay=0.1, beta1=0.9, beta2=0.95, clip=1.0, save_every=1000, keep=5),
    # a card of 8 GB and one's own text; the batch is reached by accumulation
    "laptop_8gb": dict(size="100M", batch_tokens=1 << 16, micro_batch=4, recompute="layer", keep=2),
    # layer patterns side by side: the same text once for each --layer-pattern
    "lab": dict(size="lab", seq_len=512, epochs=1.0, batch_tokens=1 << 17, eval_every=200),
    # no attention; Muon for the matrices, AdamW for the rest
    "muon": dict(size="mamba-130M", epochs=1.0, optimizer="muon", weight_decay=0.1),
}  # fmt: skip
LENGTHS = ("steps", "tokens", "epochs")


def make_config(given):
    """A TrainConfig of the flags that were given, upon their preset, and where each value came from.

    given: {field: value}, of the flags on the command line alone. Returns (config, {field: "flag", "preset lab",
    "size 13B" or "default"}). Raises ValueError for an unknown preset, and without a size.
    """
    preset = given.get("preset")
    if preset is not None and preset not in RUN_PRESETS:
        raise ValueError(f"unknown preset {preset!r}; choose one of {', '.join(RUN_PRESETS)}")
    beneath = dict(RUN_PRESETS[preset]) if preset else {}
    if any(name in given for name in LENGTHS):
        beneath = {name: value for name, value in beneath.items() if name not in LENGTHS}
    size = given.get("size", beneath.get("size"))
    if size is None:
        raise ValueError("neither --size nor --preset is given; one of them must be")
    named = {"run": f"runs/{preset or size}"}
    by_size = {name: value for name, value in SIZE_DEFAULTS.get(size, {}).items() if name == "recompute"}
    origins = dict.fromkeys((f.name for f in dataclasses.fields(TrainConfig)), "default")
    origins |= dict.fromkeys(by_size, f"size {size}") | dict.fromkeys(beneath, f"preset {preset}")
    return TrainConfig(**(named | by_size | beneath | given)), origins | dict.fromkeys(given, "flag")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run with nothing left open: the numbers that the loop works with, all of them worked out from the flags."""

    model: ModelConfig
    steps: int
    last_step: int  # where this start of the program ends
    batch_sequences: int  # sequences in one optimizer step, over all processes
    micro_batch: int
    grad_accum: int  # micro-batches a process works through in one optimizer step
    lr: float
    min_lr: float  # as a rate, not as a part
    warmup_steps: int
    decay_steps: int | None = None  # of the wsd schedule's end; None: cosine
    wsd_shape: str | None = None  # one of WSD_SHAPES; None: the first
    muon_lr: float | None = None  # peak; None: AdamW alone
    profile_steps: tuple[int, int] | None = None  # the first and the last to record


def make_plan(config, *, vocab_size, n_tokens, world_size, zero=None, gpu_memory_gib=None):
    """Work out a Plan for data of n_tokens and a tokenizer of vocab_size on world_size processes.

    zero, gpu_memory_gib: for --micro-batch auto, DeepSpeed's arrangement (a train.memory.Zero) and what each GPU has;
    None where there is no GPU or no fused kernels, whose memory alone is known.
    Raises ValueError for anything that cannot be, before a GPU is taken.
    """
    model = get_preset(
        config.size, layer_pattern=config.layer_pattern, seq_len=config.seq_len, rope_scaling=config.rope_scaling
    )
    # the next multiple of 128: the head's matrix product then fills whole tiles
    model = dataclasses.replace(model, vocab_size=-(-vocab_size // 128) * 128)
    for f in dataclasses.fields(config):
        value, least = getattr(config, f.name), f.metadata["least"]
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{flag(f.name)} {value} is not a number to train with; give a finite one")
        if least is not None and isinstance(value, int | float) and value < least:
            raise ValueError(f"{flag(f.name)} {value} is too small; allowed: {least} or more")
    defaults = SIZE_DEFAULTS[config.size]
    batch_tokens, micro_batch, lr = (
        defaults[name] if getattr(config, name) is None else getattr(config, name)
        for name in ("batch_tokens", "micro_batch", "lr")
    )
    for name, value in (("--beta1", config.beta1), ("--beta2", config.beta2)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} {value} is out of range; allowed: 0 <= {name[2:]} < 1")
    if lr <= 0 or not 0 <= config.min_lr <= 1:
        raise ValueError(
            f"--lr {lr} and --min-lr {config.min_lr}: allowed are lr > 0 and 0 <= min-lr <= 1 (a part of lr)"
        )

    if micro_batch == "auto":
        if gpu_memory_gib is None:
            raise ValueError(
                "--micro-batch auto counts the memory of the fused kernels on a GPU, and there is none here, or no fused "
                "kernels; give a number"
            )
        micro_batch = largest_micro_batch(
            model, batch_tokens=batch_tokens, world_size=world_size, zero=zero, recompute=config.recompute,
            optimizer=config.optimizer, fp8=config.fp8, memory_gib=gpu_memory_gib,
        )  # fmt: skip
    if config.fp8 and micro_batch * model.seq_len % FP8_MULTIPLE:
        raise ValueError(
            f"--fp8 needs micro-batches of a multiple of {FP8_MULTIPLE} tokens, not {micro_batch} x {model.seq_len}: in others no "
            "product would be in 8 bits"
        )
    per_round = world_size * micro_batch * model.seq_len
    if batch_tokens % per_round:
        lower = max(batch_tokens // per_round, 1) * per_round
        raise ValueError(
            f"--batch-tokens {batch_tokens:,} is not a multiple of {per_round:,} ({world_size} processes x "
            f"{micro_batch} sequences x {model.seq_len} tokens); nearest: {lower:,} or {lower + per_round:,}"
        )
    batch_sequences = batch_tokens // model.seq_len
    if n_tokens <= batch_tokens:
        raise ValueError(
            f"the training split of {config.data} has {n_tokens:,} tokens, which do not fill one batch of "
            f"{batch_tokens:,}; curate more text or lower --batch-tokens"
        )
    steps = plan_steps(config, batch_tokens, (n_tokens - 1) // model.seq_len / batch_sequences)
    warmup_steps = min(2000, steps // 10) if config.warmup_steps is None else config.warmup_steps
    decay_steps, muon_lr = _decay_steps(config, steps), _muon_lr(config, lr)
    for name in ("eval_tasks", "eval_items"):
        if getattr(config, name) is not None and config.eval_data is None:
            raise ValueError(f"{flag(name)} {getattr(config, name)} acts with --eval-data alone, and there is none")
    if config.eval_data is not None and not config.eval_every:
        raise ValueError(f"--eval-data {config.eval_data} is asked at every --eval-every steps, and that is 0")
    if warmup_steps >= steps:
        raise ValueError(f"--warmup-steps {warmup_steps} leaves no step of the {steps} to train at the full rate")
    if decay_steps is not None and warmup_steps + decay_steps > steps:
        raise ValueError(
            f"--decay-steps {decay_steps} and --warmup-steps {warmup_steps} are more than the {steps} steps of the run"
        )
    last_step = min(steps, config.stop_after or steps)
    return Plan(
        model=model,
        steps=steps,
        last_step=last_step,
        batch_sequences=batch_sequences,
        micro_batch=micro_batch,
        grad_accum=batch_tokens // per_round,
        lr=lr,
        min_lr=lr * config.min_lr,
        warmup_steps=warmup_steps,
        decay_steps=decay_steps,
        wsd_shape=config.wsd_shape,
        muon_lr=muon_lr,
        profile_steps=_profile_steps(config.profile_steps, last_step),
    )


def _profile_steps(text, last_step):
    """(10, 12) of "10:12"; None of None. Raises ValueError for what is no range of the run's steps."""
    if text is None:
        return None
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last) <= last_step):
        raise ValueError(f"--profile-steps {text!r} is not FIRST:LAST within the run's steps, 1 to {last_step}")
    return int(first), int(last)


def _one_of(name, value, allowed):
    if value not in allowed:
        raise ValueError(f"{flag(name)} {value!r} is unknown; choose one of {', '.join(allowed)}")


def _muon_lr(config, lr):
    """Muon's peak rate, or None without Muon. Raises ValueError for flags that do not go together."""
    _one_of("optimizer", config.optimizer, OPTIMIZERS)
    for name in ("muon_lr", "muon_momentum"):
        if config.optimizer != "muon" and getattr(config, name) is not None:
            raise ValueError(f"{flag(name)} acts with --optimizer muon alone, and the optimizer is {config.optimizer}")
    if config.muon_lr is not None and config.muon_lr <= 0:
        raise ValueError(f"--muon-lr {config.muon_lr} is out of range; allowed: more than 0")
    if config.muon_momentum is not None and not 0 <= config.muon_momentum < 1:
        raise ValueError(f"--muon-momentum {config.muon_momentum} is out of range; allowed: 0 <= muon-momentum < 1")
    if config.optimizer == "muon":
        return lr if config.muon_lr is None else config.muon_lr
    return None


def _decay_steps(config, steps):
    """Steps of the wsd schedule's decay, or None for cosine. Raises ValueError for flags that do not go together."""
    _one_of("schedule", config.schedule, SCHEDULES)
    if config.wsd_shape is not None:
        _one_of("wsd_shape", config.wsd_shape, WSD_SHAPES)
    if config.schedule == "wsd":
        return max(1, steps // 5) if config.decay_steps is None else config.decay_steps
    for name in ("decay_steps", "wsd_shape"):
        if getattr(config, name) is not None:
            raise ValueError(f"{flag(name)} acts with --schedule wsd alone, and the schedule is {config.schedule}")
    return None


def plan_steps(config, batch_tokens, steps_per_epoch):
    """Optimizer steps, from whichever of --steps, --tokens and --epochs was given; without any, one epoch."""
    given = [name for name in LENGTHS if getattr(config, name) is not None]
    if len(given) > 1:
        values = " and ".join(f"{flag(name)} {getattr(config, name)}" for name in given)
        raise ValueError(f"{values} are given; the length of a run is one of --steps, --tokens and --epochs")
    if config.steps is not None:
        return config.steps
    if config.tokens is not None:
        wanted, steps = f"--tokens {config.tokens:,.0f}", config.tokens / batch_tokens
    else:
        epochs = 1.0 if config.epochs is None else config.epochs
        wanted, steps = f"--epochs {epochs}", epochs * steps_per_epoch
    if steps < 1:
        raise ValueError(
            f"{wanted} is not a step of {batch_tokens:,} tokens (--batch-tokens); allowed: a step or more"
        )
    return int(steps)


def flag(name):
    """micro_batch -> --micro-batch"""
    return "--" + name.replace("_", "-")


def number_or(word):
    """A parser of whole numbers that also takes one word."""

    def parse(text):
        return word if text == word else int(text)

    parse.__name__ = "int"  # as argparse names it in "invalid int value"
    return parse


def add_flags(parser, config_class):
    """One flag for each field of a frozen dataclass: --like-this, with the field's help and default.

    A flag that is not given is not among the parsed ones, so that a preset can stand beneath (see make_config).
    """
    for f in dataclasses.fields(config_class):
        required = f.default is dataclasses.MISSING
        shown = f.metadata["help"]
        if not required and f.default is not None:
            shown += f" (default: {f.default})"
        arguments: dict[str, Any] = {"dest": f.name, "help": shown.replace("%", "%%"), "required": required}
        if not required:
            arguments["default"] = argparse.SUPPRESS
        if f.type is bool:
            arguments["action"] = argparse.BooleanOptionalAction
        else:
            value_type = (
                next(t for t in get_args(f.type) if t is not type(None)) if isinstance(f.type, UnionType) else f.type
            )
            word, metavar = f.metadata["word"], value_type.__name__.upper()
            arguments |= {"type": number_or(word) if word else value_type}
            arguments |= {"metavar": f"{metavar}|{word}" if word else metavar}
        parser.add_argument(flag(f.name), **arguments)
