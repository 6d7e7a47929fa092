"""Which set-ups fit, how fast and at what price: the search behind launch/estimate.py. Needs no torch.

best, others = rank(request)          # set-ups of one machine that fit, the fastest first
cheapest, fastest = search(request)   # over GPUs and their number, within a budget and a time
"""

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from launch.speed import Setup, step_time
from model.config import PRESETS, ModelConfig
from train.config import SIZE_DEFAULTS
from train.hardware import Gpu, load_gpus
from train.memory import GIB, memory_needed, peak_memory, zero_of

ROOT = Path(__file__).resolve().parents[1]
PRICES = Path(__file__).with_name("prices.json")
ZERO_FILES = ("zero2", "zero1", "zero3", "zero3_hpz", "zero2_offload")  # the fastest first, where times are equal
SCALING_FILES = ("zero1", "zero2", "zero3", "zero3_hpz")
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
KINDS = ("on-demand", "spot", "own")
MOST_ROWS = 64  # of a micro-batch
HOURS_A_DAY = 24
LARGEST_BATCH = 2  # times the size's: above, more GPUs need more tokens for the same loss (arXiv:1812.06162)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for. None: the search may choose."""

    # fmt: off
    size: str
    model: ModelConfig
    tokens: float
    gpu: Gpu | None = None
    n_gpus: int | None = None
    batch_tokens: int | None = None
    micro_batch: int | None = None
    zero_file: str | None = None      # one of ZERO_FILES
    recompute: str | None = None
    optimizer: str = "adamw"
    fp8: bool = False
    document_tokens: float = 1024
    budget: float | None = None       # dollars
    days: float | None = None
    provider: str | None = None
    spot: bool = False
    others: bool = False              # as other trainers' kernels would run it
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A set-up with what it costs."""

    setup: Setup
    zero_file: str
    parts: dict  # bytes by part, on each GPU
    needed: float  # bytes on each GPU, the allocator's and CUDA's own included
    seconds: dict  # of one step, by part
    tokens: float
    price: dict | None  # of prices.json; None: nobody is known to let this GPU

    @property
    def fits(self):
        return self.needed <= self.setup.gpu.memory_gib * GIB

    @property
    def tokens_per_s(self):
        return self.setup.batch_tokens / sum(self.seconds.values())

    @property
    def days(self):
        return self.tokens / self.tokens_per_s / 86400

    @property
    def gpu_hours(self):
        return self.days * HOURS_A_DAY * self.setup.n_gpus

    @property
    def dollars(self):
        return None if self.price is None else self.gpu_hours * self.price["dollars_per_gpu_hour"]

    @property
    def mfu(self):
        flops = self.tokens_per_s / self.setup.n_gpus * self.setup.model.flops_per_token
        return flops / (self.setup.gpu.dense_tflops["bf16"] * 1e12)

    @property
    def with_whole_rows(self):
        """The same set-up on documents as long as a row, whose attention the MFU counts, in training too."""
        setup = replace(self.setup, document_tokens=self.setup.model.seq_len)
        return replace(self, setup=setup, seconds=step_time(setup))


@cache
def zero_settings(name):
    return zero_of(json.loads((ROOT / f"ds_configs/{name}.json").read_text()))


@cache
def prices(path=PRICES):
    """[{"provider", "gpu", "kind", "dollars_per_gpu_hour", "date", "source"}]. Raises ValueError, in one line."""
    gpus = load_gpus()
    try:
        found = json.loads(Path(path).read_text())["prices"]
        for price in found:
            if not price["dollars_per_gpu_hour"] > 0 or price["gpu"] not in gpus or price["kind"] not in KINDS:
                raise ValueError(
                    f"{json.dumps(price)} needs a price above 0, a GPU of train/gpus.json and a kind of {KINDS}"
                )
            price["provider"], price["date"], price["source"]  # noqa: B018 - they must be there
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a list of prices: {error!r}") from None
    return found


def price_of(gpu, *, spot=False, provider=None):
    """The lowest price of a GPU: on demand, or spot; where nobody lets it, an own machine's electricity; else None."""
    found = [p for p in prices() if p["gpu"] == gpu.name]
    found = [p for p in found if provider is None or p["provider"].lower() == provider.lower()]
    let = [p for p in found if p["kind"] == ("spot" if spot else "on-demand")]
    own = [p for p in found if p["kind"] == "own"]
    return min(let or own, key=lambda p: p["dollars_per_gpu_hour"], default=None)


def batch_of(request, n_gpus):
    """Tokens in a step: what was asked for, or the size's, raised to whole rows (or micro-batches asked for)."""
    if request.batch_tokens is not None:
        return request.batch_tokens
    per_round = n_gpus * (request.micro_batch or 1) * request.model.seq_len
    return -(-SIZE_DEFAULTS[request.size]["batch_tokens"] // per_round) * per_round


def choices(request, gpu, n_gpus):
    """Yield a Choice for every arrangement, kind of recomputation and micro-batch that the request leaves open."""
    if request.fp8 and "fp8" not in gpu.dense_tflops:
        have = ", ".join(name for name, other in load_gpus().items() if "fp8" in other.dense_tflops)
        raise ValueError(f"--fp8: {gpu.title} has no 8-bit products; these have: {have}")
    price = price_of(gpu, spot=request.spot, provider=request.provider)
    batch = batch_of(request, n_gpus)
    for zero_file in [request.zero_file] if request.zero_file else ZERO_FILES:
        zero = zero_settings(zero_file)
        reason = why_not(request, zero_file, zero, gpu, n_gpus)
        if reason and request.zero_file:
            raise ValueError(f"--ds-config {zero_file}: {reason}")
        if reason:
            continue
        for recompute in [request.recompute] if request.recompute else ("none", "layer"):
            for rows in [request.micro_batch] if request.micro_batch else range(1, MOST_ROWS + 1):
                if batch % (n_gpus * rows * request.model.seq_len):
                    continue
                setup = Setup(
                    model=request.model, gpu=gpu, n_gpus=n_gpus, micro_batch=rows,
                    grad_accum=batch // (n_gpus * rows * request.model.seq_len), zero=zero, recompute=recompute,
                    optimizer=request.optimizer, fp8=request.fp8, others=request.others,
                    document_tokens=request.document_tokens,
                )  # fmt: skip
                parts = memory_of(setup)
                choice = Choice(
                    setup=setup, zero_file=zero_file, parts=parts, needed=memory_needed(parts, n_gpus),
                    seconds=step_time(setup), tokens=request.tokens, price=price,
                )  # fmt: skip
                yield choice
                if not choice.fits:
                    break  # more rows need more


def memory_of(setup):
    """train.memory.peak_memory of a Setup."""
    return peak_memory(
        setup.model, world_size=setup.n_gpus, micro_batch=setup.micro_batch, zero=setup.zero,
        recompute=setup.recompute, optimizer=setup.optimizer, fp8=setup.fp8,
    )  # fmt: skip


def why_not(request, zero_file, zero, gpu, n_gpus):
    """Why a file of ds_configs/ is not for these GPUs, in one line; None if it is."""
    if zero.hpz > 1 and (n_gpus <= zero.hpz or n_gpus % zero.hpz or gpu.gpus_per_node != zero.hpz):
        return (
            f"its groups of {zero.hpz} are for several whole nodes of {zero.hpz} GPUs, not for {n_gpus} {gpu.name} in "
            f"nodes of {gpu.gpus_per_node}"
        )
    if zero.offload and request.optimizer == "adamw8bit":
        return "the optimizer steps on the CPU, and adamw8bit on the GPU alone"
    if zero.offload and n_gpus > gpu.gpus_per_node and not request.zero_file:
        return "several nodes have room without offloading"
    return None


def rank(request, gpu, n_gpus):
    """(set-ups that fit, the fastest first; those that do not, the smallest first).

    Raises ValueError if no micro-batch divides the batch that was asked for.
    """
    found = list(choices(request, gpu, n_gpus))
    if not found:
        rows = request.micro_batch or 1
        per_round = n_gpus * rows * request.model.seq_len
        lower = max(request.batch_tokens // per_round, 1) * per_round
        raise ValueError(
            f"--batch-tokens {request.batch_tokens:,} is not a multiple of {per_round:,} ({n_gpus} GPUs x {rows} "
            f"sequences x {request.model.seq_len} tokens); nearest: {lower:,} or {lower + per_round:,}"
        )
    fitting = sorted((c for c in found if c.fits), key=lambda c: -c.tokens_per_s)
    return fitting, sorted((c for c in found if not c.fits), key=lambda c: c.needed)


def search(request):
    """Every GPU and count that the request leaves open: [(the fastest Choice of each that fits)], cheapest first."""
    counts = [request.n_gpus] if request.n_gpus else COUNTS
    most = LARGEST_BATCH * SIZE_DEFAULTS[request.size]["batch_tokens"]
    found = []
    for gpu in [request.gpu] if request.gpu else load_gpus().values():
        price = price_of(gpu, spot=request.spot, provider=request.provider)
        if not request.gpu and (price is None or price["kind"] == "own"):
            continue
        if not request.gpu and request.fp8 and "fp8" not in gpu.dense_tflops:
            continue
        for n_gpus in counts:
            if n_gpus > gpu.gpus_per_node and gpu.network_gb_s < 1:
                continue  # consumer cards have no network to speak of
            if not request.n_gpus and batch_of(request, n_gpus) > most:
                continue
            if batch_of(request, n_gpus) <= request.tokens:
                found += rank(request, gpu, n_gpus)[0][:1]
    return sorted(found, key=lambda c: (c.dollars is None, c.dollars or c.days))


def within(request, found):
    """The choices that keep to the budget and the days."""
    return [
        c for c in found
        if (request.budget is None or (c.dollars is not None and c.dollars <= request.budget))
        and (request.days is None or c.days <= request.days)
    ]  # fmt: skip


def scaling(request, gpu):
    """[{"gpus", "batch_tokens", "tokens_per_s_per_gpu": {DeepSpeed file: rate}, "best", "efficiency"}] for 1 to 1,024
    GPUs, each file at its fastest micro-batch and kind of recomputation; None where it does not fit.

    efficiency: the best file's rate a GPU beside that of the fewest GPUs on which any fits.
    """
    rows, first = [], None
    for n_gpus in COUNTS:
        rates = {}
        for zero_file in SCALING_FILES:
            one = replace(request, zero_file=zero_file, n_gpus=n_gpus)
            reason = why_not(one, zero_file, zero_settings(zero_file), gpu, n_gpus)
            fitting, _ = ([], []) if reason else rank(one, gpu, n_gpus)
            rates[zero_file] = fitting[0].tokens_per_s / n_gpus if fitting else None
        known = {name: rate for name, rate in rates.items() if rate}
        best = max(known, key=lambda name: known[name]) if known else None
        first = first or (known[best] if best else None)
        rows.append(
            {
                "gpus": n_gpus, "batch_tokens": batch_of(request, n_gpus), "tokens_per_s_per_gpu": rates, "best": best,
                "efficiency": known[best] / first if best else None,
            }
        )  # fmt: skip
    return rows


def what_would_give(request, gpu, n_gpus):
    """Lines: what would make the model fit into this GPU, and what each leaves to be found."""
    lines, room = [], gpu.memory_gib
    tries = [
        ("--recompute layer", {"recompute": "layer"}),
        ("--micro-batch 1", {"micro_batch": 1}),
        ("--micro-batch 1 --recompute layer", {"micro_batch": 1, "recompute": "layer"}),
        ("--optimizer adamw8bit", {"optimizer": "adamw8bit"}),
        ("ZeRO-3", {"zero_file": "zero3"}),
        ("ZeRO-3 --micro-batch 1 --recompute layer", {"zero_file": "zero3", "micro_batch": 1, "recompute": "layer"}),
        ("ZeRO-3 --micro-batch 1 --recompute layer --optimizer adamw8bit",
         {"zero_file": "zero3", "micro_batch": 1, "recompute": "layer", "optimizer": "adamw8bit"}),
        ("ds_configs/zero2_offload.json --micro-batch 1 --recompute layer",
         {"zero_file": "zero2_offload", "micro_batch": 1, "recompute": "layer", "optimizer": "adamw"}),
    ]  # fmt: skip
    for what, changes in tries:
        if all(getattr(request, name) == value for name, value in changes.items()):
            continue
        relaxed = replace(request, **({"batch_tokens": None} | changes))
        fitting, _ = rank(relaxed, gpu, n_gpus)
        if fitting:
            best = fitting[0]
            size = f"{best.needed / GIB:.1f} of {room:.1f} GiB, {best.tokens_per_s:,.0f} tokens/s"
            with_file = "" if "zero_file" in changes else f" with ds_configs/{best.zero_file}.json"
            lines.append(f"{what}: fits{with_file}, {size}")
    for more in COUNTS:
        if more > n_gpus:
            fitting, _ = rank(replace(request, batch_tokens=None), gpu, more)
            if fitting:
                lines.append(f"{more} GPUs: fits, {fitting[0].needed / GIB:.1f} of {room:.1f} GiB")
                break
    else:
        lines.append(f"more GPUs: not even on {COUNTS[-1]:,}, as they share all but what a micro-batch holds")
    for other in sorted(load_gpus().values(), key=lambda g: g.memory_gib):
        if other.memory_gib > gpu.memory_gib:
            if request.fp8 and "fp8" not in other.dense_tflops:
                continue
            fitting, _ = rank(replace(request, batch_tokens=None), other, n_gpus)
            if fitting:
                lines.append(f"--gpu {other.name}: fits, {fitting[0].needed / GIB:.1f} of {other.memory_gib:.1f} GiB")
                break
    return lines


def command(request, choice, data="data/eight"):
    """The line that starts the run."""
    setup, model = choice.setup, request.model
    nodes = -(-setup.n_gpus // setup.gpu.gpus_per_node)
    start = "deepspeed --hostfile=hostfile" if nodes > 1 else f"deepspeed --num_gpus={setup.n_gpus}"
    words = [
        start, "train/launch.py", f"--size {request.size}", f"--data {data}", f"--run runs/{request.size}",
        f"--tokens {request.tokens:.0f}", f"--batch-tokens {setup.batch_tokens}", f"--micro-batch {setup.micro_batch}",
        f"--recompute {setup.recompute}", f"--ds-config ds_configs/{choice.zero_file}.json",
    ]  # fmt: skip
    preset = PRESETS[request.size]
    if model.layer_pattern != preset.layer_pattern:
        words.append(f"--layer-pattern {model.layer_pattern}")
    if model.seq_len != preset.seq_len:
        words.append(f"--seq-len {model.seq_len}")
    if setup.optimizer != "adamw":
        words.append(f"--optimizer {setup.optimizer}")
    if setup.fp8:
        words.append("--fp8")
    return " ".join(words)
