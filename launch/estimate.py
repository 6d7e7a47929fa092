"""What a run needs, costs and takes, and what to change, before anything is spent. Needs no torch.

python launch/estimate.py --size 6.7B --gpus 16 --gpu h100 --tokens 100B
python launch/estimate.py --size 2.7B --tokens 50B --budget 20000 --days 14
"""

import argparse
import json
import math
import signal
import sys
from itertools import pairwise
from pathlib import Path

if __spec__ is None:  # run by path: import from the repo root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.plan import (
    ZERO_FILES,
    Request,
    batch_of,
    command,
    price_of,
    prices,
    rank,
    scaling,
    search,
    what_would_give,
    within,
)
from model.config import get_preset
from train.config import OPTIMIZERS
from train.hardware import get_gpu, load_gpus
from train.memory import GIB, optimizer_bytes

TOKENS_A_PARAMETER = 20  # compute-optimal for dense transformers (Chinchilla, arXiv:2203.15556)
TEXT_BYTES = 4.3  # of text a token, English with a vocabulary of 50,304
CHECKPOINTS = 6  # --keep 5, and the best one
# How far off the time may be. H200: every point of `python -m launch.check` is within 10 %; H100 and A100: most
# published figures within 25 %; nothing is known of the others. Evaluation, checkpoints and restarts add a tenth at
# most, as large runs report goodputs of 91 to 97 %.
ERRORS = {"h200": 0.10, "h100": 0.25, "a100-80": 0.25, "a100-40": 0.25}
ERROR_UNCHECKED, DOWNTIME = 0.4, 0.10
WORTH_SAYING = 0.10  # by how much attention over whole rows slows a step
# Energy: a GPU in training draws most of its board power; the machine around it and the cooling add to it. CO2: the
# world's electricity, 2023 (Ember, Global Electricity Review 2024).
POWER_PART, MACHINE, COOLING, CO2_KG_PER_KWH = 0.85, 1.3, 1.2, 0.48


def number(text):
    """100B, 1.5T, 20M, 300K or a plain number."""
    scale = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1:].upper(), 1)
    try:
        value = float(text[:-1] if scale > 1 else text) * scale
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0; write it as 100B, 300M, 20K or in digits")
    return value


def count(text):
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number; allowed: 1 or more")
    return int(text)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message}\n")


def make_parser():
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    # fmt: off
    parser.add_argument("--size", required=True, help="a name in model.config.PRESETS: nano, 1.3B, 6.7B ...")
    parser.add_argument("--layer-pattern", help="one letter a layer, M or A, such as AMAMAMAM (default: the size's)")
    parser.add_argument("--seq-len", type=count, help="tokens in a sequence (default: the size's)")
    parser.add_argument("--gpu", help=f"{', '.join(load_gpus())} (default: h100; with --budget or --days: any)")
    parser.add_argument("--gpus", type=count, help="how many (default: 8; with --budget or --days: any)")
    parser.add_argument("--tokens", type=number, help="to train on: 100B, 300M ... (default: 20 a parameter)")
    parser.add_argument("--budget", type=number, help="dollars at most: search the cheapest and the fastest set-up")
    parser.add_argument("--days", type=number, help="days at most: the same search")
    parser.add_argument("--provider", help="a provider of launch/prices.json (default: the cheapest)")
    parser.add_argument("--spot", action="store_true", help="spot prices (default: on demand)")
    parser.add_argument("--ds-config", choices=ZERO_FILES, help="of ds_configs/ (default: the fastest that fits)")
    parser.add_argument("--batch-tokens", type=count, help="tokens in an optimizer step (default: the size's)")
    parser.add_argument("--micro-batch", type=count, help="sequences of a GPU at a time (default: the fastest)")
    parser.add_argument("--recompute", choices=("none", "layer"), help="(default: the faster one that fits)")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="(default: adamw)")
    parser.add_argument("--fp8", action="store_true", help="the layers' products in 8-bit floats")
    parser.add_argument("--document-tokens", type=number, default=1024, help="mean length of a document (1024)")
    parser.add_argument("--data", default="data/eight", help="the folder in the launch command (default: data/eight)")
    parser.add_argument("--all", action="store_true", help="list every micro-batch, not the fastest ones alone")
    parser.add_argument("--scaling", action="store_true", help="also the rate of a GPU for 1 to 1,024 of them")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--plot", metavar="FILE", help="write a page of pictures: memory by part; cost against time")
    # fmt: on
    return parser


def make_request(flags):
    model = get_preset(flags.size, layer_pattern=flags.layer_pattern, seq_len=flags.seq_len)
    providers = sorted({p["provider"] for p in prices()})
    if flags.provider and flags.provider.lower() not in (p.lower() for p in providers):
        raise ValueError(
            f"unknown provider {flags.provider!r}; launch/prices.json has {', '.join(map(repr, providers))}"
        )
    searching = flags.budget is not None or flags.days is not None
    gpu = None if searching and not flags.gpu else get_gpu(flags.gpu or "h100")
    if gpu and (flags.provider or flags.spot) and price_of(gpu, spot=flags.spot, provider=flags.provider) is None:
        offers = "; ".join(f"{p['provider']} ({p['kind']})" for p in prices() if p["gpu"] == gpu.name)
        raise ValueError(
            f"launch/prices.json has no {'spot' if flags.spot else 'on-demand'} price of {gpu.name} from "
            f"{flags.provider or 'anybody'}; add it there, or take one of: {offers or 'none'}"
        )
    return Request(
        size=flags.size, model=model, tokens=flags.tokens or TOKENS_A_PARAMETER * model.n_parameters, gpu=gpu,
        n_gpus=flags.gpus or (None if searching else 8), batch_tokens=flags.batch_tokens,
        micro_batch=flags.micro_batch, zero_file=flags.ds_config, recompute=flags.recompute,
        optimizer=flags.optimizer, fp8=flags.fp8, document_tokens=flags.document_tokens, budget=flags.budget,
        days=flags.days, provider=flags.provider, spot=flags.spot,
    )  # fmt: skip


def describe(request, choice, data):
    """What a set-up is, needs and costs, as a dict that JSON takes."""
    setup, model, whole = choice.setup, request.model, choice.with_whole_rows
    error = ERRORS.get(setup.gpu.name, ERROR_UNCHECKED)
    checked = "as where it was checked" if setup.gpu.name in ERRORS else "it was never checked on this GPU"
    low, high = 1 - error, (1 + error) * (1 + DOWNTIME)
    kwh = choice.gpu_hours * setup.gpu.watts * POWER_PART * MACHINE * COOLING / 1000
    offers = [p for p in prices() if p["gpu"] == setup.gpu.name]
    checkpoint = 4 * model.n_parameters + optimizer_bytes(model, "muon" if setup.optimizer == "muon" else "adamw")
    return {
        "gpu": setup.gpu.name, "gpus": setup.n_gpus, "ds_config": f"ds_configs/{choice.zero_file}.json",
        "zero_stage": setup.zero.stage, "optimizer": setup.optimizer, "recompute": setup.recompute,
        "micro_batch": setup.micro_batch, "grad_accum": setup.grad_accum, "batch_tokens": setup.batch_tokens,
        "memory_gib_per_gpu": sum(choice.parts.values()) / GIB,
        "memory_gib_by_part": {part: size / GIB for part, size in choice.parts.items() if size},
        "memory_gib_needed": choice.needed / GIB, "gpu_memory_gib": setup.gpu.memory_gib, "fits": choice.fits,
        "cpu_memory_gib_per_node": (
            16 * model.n_parameters / setup.n_gpus * min(setup.n_gpus, setup.gpu.gpus_per_node) / GIB
            if setup.zero.offload else 0.0
        ),
        "step_s": sum(choice.seconds.values()), "step_s_by_part": choice.seconds,
        "tokens_per_s": choice.tokens_per_s, "tokens_per_s_per_gpu": choice.tokens_per_s / setup.n_gpus,
        "mfu": choice.mfu, "document_tokens": setup.document_tokens,
        "whole_rows": {"tokens_per_s": whole.tokens_per_s, "mfu": whole.mfu, "days": whole.days},
        "tokens": request.tokens, "days": choice.days, "gpu_hours": choice.gpu_hours,
        "dollars": choice.dollars, "price": choice.price,
        "dollars_by_offer": {
            f"{p['provider']}, {p['kind']}, {p['date']}": choice.gpu_hours * p["dollars_per_gpu_hour"] for p in offers
        },
        "range": {
            "days": [choice.days * low, choice.days * high],
            "dollars": None if choice.dollars is None else [choice.dollars * low, choice.dollars * high],
            "reasons": [
                f"the time model: {error:.0%} either way, {checked}",
                f"evaluation, checkpoints and restarts: up to {DOWNTIME:.0%} more",
                "prices are lists of the date given: launch/prices.json is yours to edit",
            ],
        },
        "storage_gb": {
            "raw text": request.tokens * TEXT_BYTES / 1e9,
            "tokens": request.tokens * (2 if model.vocab_size <= 1 << 16 else 4) / 1e9,
            "one checkpoint": checkpoint / 1e9,
            f"{CHECKPOINTS} checkpoints": CHECKPOINTS * checkpoint / 1e9,
        },
        "energy_kwh": kwh, "co2_kg": kwh * CO2_KG_PER_KWH,
        "command": command(request, choice, data) if choice.fits else None,
    }  # fmt: skip


def estimate(request, data="data/eight", every=False):
    """Everything that is known about a request, as a dict that JSON takes. Raises ValueError for an impossible one.

    every: list every micro-batch, not the fastest of each DeepSpeed file and kind of recomputation alone.
    """
    model = request.model
    result = {
        "size": request.size, "layer_pattern": model.layer_pattern, "seq_len": model.seq_len,
        "parameters": model.n_parameters, "parameters_by_part": model.parameters_by_part,
        "flops_per_token": model.flops_per_token, "flops_per_token_by_part": model.flops_per_token_by_part,
    }  # fmt: skip
    if request.budget is not None or request.days is not None:
        return result | plans(request, data)
    batch = batch_of(request, request.n_gpus)
    if request.tokens < batch:
        raise ValueError(f"--tokens {request.tokens:,.0f} do not fill one step of {batch:,} tokens; give that or more")
    fitting, rest = rank(request, request.gpu, request.n_gpus)
    if fitting:
        return result | describe(request, fitting[0], data) | {"set_ups": table(fitting, rest, every)}
    smallest = rest[0]
    return result | describe(request, smallest, data) | {
        "short_by_gib": smallest.needed / GIB - request.gpu.memory_gib, "set_ups": table(fitting, rest, every),
        "would_fit": what_would_give(request, request.gpu, request.n_gpus),
    }  # fmt: skip


def table(fitting, rest, every):
    """The best micro-batch of each DeepSpeed file and kind of recomputation (where none fits, the least), or all."""
    rows = {}
    for choice in fitting + rest:
        rows.setdefault((choice.zero_file, choice.setup.recompute, choice.setup.micro_batch if every else 0), choice)
    return [
        {
            "ds_config": f"ds_configs/{name}.json", "recompute": recompute, "micro_batch": c.setup.micro_batch,
            "memory_gib_per_gpu": sum(c.parts.values()) / GIB, "memory_gib_needed": c.needed / GIB, "fits": c.fits,
            "tokens_per_s": c.tokens_per_s, "days": c.days, "dollars": c.dollars,
            "memory_gib_by_part": {part: size / GIB for part, size in c.parts.items() if size},
        }
        for (name, recompute, _), c in rows.items()
    ]  # fmt: skip


def plans(request, data):
    """The cheapest and the fastest set-up within the budget and the days; or by how much none is."""
    found = search(request)
    if not found:
        raise ValueError(
            f"{request.size} fits into no set-up of {request.gpu.name if request.gpu else 'any GPU with a price'}"
            f"{f' x {request.n_gpus}' if request.n_gpus else ''}; without --budget and --days the planner says what "
            "would make it fit"
        )
    good = within(request, found)
    if good:
        cheapest, fastest = good[0], min(good, key=lambda c: c.days)
        return describe(request, cheapest, data) | {
            "within": True, "fastest": describe(request, fastest, data), "set_ups": frontier(good),
        }  # fmt: skip
    misses = []
    if request.budget is not None:
        in_time = [c for c in found if request.days is None or c.days <= request.days] or found
        c = min(in_time, key=lambda c: math.inf if c.dollars is None else c.dollars)
        if c.dollars is None:
            misses.append(f"no price is known: {say(c)}")
        elif c.dollars > request.budget:
            misses.append(f"{c.dollars - request.budget:,.0f} dollars more: {say(c)}")
    if request.days is not None:
        in_budget = [c for c in found if request.budget is None or (c.dollars or math.inf) <= request.budget] or found
        c = min(in_budget, key=lambda c: c.days)
        if c.days > request.days:
            misses.append(f"{c.days - request.days:,.1f} days more: {say(c)}")
    # dollars and days grow with the tokens: by what part the best set-up misses both
    nearest = max(found, key=lambda c: least_part(request, c))
    tokens = least_part(request, nearest) * request.tokens
    where = f"{nearest.setup.n_gpus} x {nearest.setup.gpu.name}"
    misses.append(f"or fewer tokens: {tokens / 1e9:,.1f}B of the {request.tokens / 1e9:,.1f}B, on {where}")
    return describe(request, nearest, data) | {"within": False, "would_fit": misses, "set_ups": frontier(found)}


def least_part(request, choice):
    """What part of the tokens a set-up trains on within the budget and the days."""
    days = 1.0 if request.days is None else request.days / choice.days
    if request.budget is None:
        return min(1.0, days)
    return min(1.0, days, request.budget / (choice.dollars or math.inf))


def frontier(found):
    """The set-ups that no other is both cheaper and faster than, cheapest first."""
    kept = []
    for choice in found:
        if not kept or choice.days < kept[-1].days:
            kept.append(choice)
    return [
        {
            "gpu": c.setup.gpu.name, "gpus": c.setup.n_gpus, "ds_config": f"ds_configs/{c.zero_file}.json",
            "recompute": c.setup.recompute, "micro_batch": c.setup.micro_batch, "days": c.days, "dollars": c.dollars,
            "tokens_per_s": c.tokens_per_s,
        }
        for c in kept
    ]  # fmt: skip


def say(c):
    dollars = "no price known" if c.dollars is None else f"{c.dollars:,.0f} dollars"
    return f"{c.setup.n_gpus} x {c.setup.gpu.name}, {c.days:,.1f} days, {dollars}"


def print_counts(result):
    print(f"{result['size']}: {result['layer_pattern']}, sequences of {result['seq_len']:,} tokens")
    for title, total, parts in (
        ("parameters", result["parameters"], result["parameters_by_part"]),
        ("FLOPs a token, forward and backward", result["flops_per_token"], result["flops_per_token_by_part"]),
    ):
        print(f"{title}: {total:,}")
        for part, n in parts.items():
            print(f"  {part:<22}{n:>18,}  {n / total:6.1%}")


def print_set_up(r):
    print(
        f"{r['gpus']} x {get_gpu(r['gpu']).title}, {r['tokens'] / 1e9:,.4g}B tokens: {r['ds_config']}, "
        f"{r['optimizer']}, recompute {r['recompute']}, micro-batch {r['micro_batch']} x {r['grad_accum']} "
        f"accumulated = {r['batch_tokens']:,} tokens a step"
    )
    verdict = "fits" if r["fits"] else f"does not fit: {r['memory_gib_needed'] - r['gpu_memory_gib']:.1f} GiB too few"
    print(
        f"  memory of a GPU: {r['memory_gib_per_gpu']:.1f} GiB allocated, {r['memory_gib_needed']:.1f} with CUDA, "
        f"NCCL and the allocator's slack, of {r['gpu_memory_gib']:.1f}: {verdict}"
    )
    for part, gib in sorted(r["memory_gib_by_part"].items(), key=lambda item: -item[1]):
        print(f"    {part:<22}{gib:>9.2f} GiB")
    if r["cpu_memory_gib_per_node"]:
        print(f"    on the CPU of a node{r['cpu_memory_gib_per_node']:>11.1f} GiB")
    days, reasons = r["range"]["days"], r["range"]["reasons"]
    print(
        f"  speed: {r['tokens_per_s']:,.0f} tokens/s, {r['tokens_per_s_per_gpu']:,.0f} a GPU, {r['mfu']:.0%} of the "
        f"dense bf16 peak; a step {r['step_s']:.2f} s, on documents of {r['document_tokens']:,.0f} tokens on average "
        "(--document-tokens)"
    )
    whole = r["whole_rows"]
    if r["tokens_per_s"] > (1 + WORTH_SAYING) * whole["tokens_per_s"]:
        print(
            f"    documents as long as a row: {whole['tokens_per_s']:,.0f} tokens/s, {whole['mfu']:.0%}, "
            f"{whole['days']:,.2f} days; the part of the peak counts attention over whole rows, as training's MFU "
            "does, the time within documents alone"
        )
    for part, seconds in sorted(r["step_s_by_part"].items(), key=lambda item: -item[1]):
        if seconds > 0.005 * r["step_s"]:
            print(f"    {part:<22}{seconds / r['step_s']:>9.1%}")
    print(f"  time: {r['days']:,.2f} days ({days[0]:,.2f} to {days[1]:,.2f}), {r['gpu_hours']:,.0f} GPU-hours")
    for offer, dollars in sorted(r["dollars_by_offer"].items(), key=lambda item: item[1]):
        print(f"  {dollars:>12,.0f} dollars  {offer}")
    if not r["dollars_by_offer"]:
        print("  no price of this GPU in launch/prices.json")
    print(f"  why a range: {'; '.join(reasons)}")
    storage = ", ".join(f"{name} {size:,.1f} GB" for name, size in r["storage_gb"].items())
    print(f"  storage: {storage}")
    print(f"  energy: some {r['energy_kwh']:,.0f} kWh, {r['co2_kg']:,.0f} kg of CO2 (order of magnitude)")
    if r["command"]:
        print(f"  start it with:\n    {r['command']}")


def print_tables(result):
    print_counts(result)
    print()
    if "within" in result:
        print("the cheapest that keeps to it:" if result["within"] else "nothing keeps to it; the nearest:")
    print_set_up(result)
    if result.get("fastest"):
        print("\nthe fastest that keeps to it:")
        print_set_up(result["fastest"])
    if result.get("would_fit"):
        print("\nwhat would have to give:")
        for line in result["would_fit"]:
            print(f"  {line}")
    print("\nother set-ups:")
    for row in result["set_ups"]:
        what = row["ds_config"].removeprefix("ds_configs/").removesuffix(".json")
        where = f"{row['gpus']:>5} x {row['gpu']:<13}" if "gpu" in row else ""
        gib = f"{row['memory_gib_per_gpu']:>7.1f} GiB {'fits' if row['fits'] else 'no  '}" if "fits" in row else ""
        dollars = "" if row["dollars"] is None else f"{row['dollars']:>12,.0f} dollars"
        print(
            f"  {where}{what:<14} recompute {row['recompute']:<6} micro-batch {row['micro_batch']:>3} {gib} "
            f"{row['tokens_per_s']:>12,.0f} tokens/s {row['days']:>9,.2f} days {dollars}"
        )


def print_scaling(rows):
    print("\ntokens/s of a GPU, by number of GPUs (efficiency: beside the fewest that it fits on):")
    print(f"  {'GPUs':>5} {'tokens a step':>14} " + "".join(f"{name:>11}" for name in rows[0]["tokens_per_s_per_gpu"]))
    for row in rows:
        rates = "".join(f"{rate:>11,.0f}" if rate else f"{'no':>11}" for rate in row["tokens_per_s_per_gpu"].values())
        best = f"  {row['best']}, {row['efficiency']:.0%}" if row["best"] else ""
        print(f"  {row['gpus']:>5} {row['batch_tokens']:>14,} {rates}{best}")
    known = [row for row in rows if row["best"]]
    turns = [b for a, b in pairwise([{"best": None}, *known]) if a["best"] != b["best"]]
    print("  the fastest: " + ", ".join(f"{row['best']} from {row['gpus']}" for row in turns))


def draw(path, request, result):
    """launch.picture.write_page. Raises ValueError, in one line."""
    try:
        from launch.picture import write_page  # plotly, which the planner alone does not need, takes a second to load

        write_page(path, request, result)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--plot needs {error.name}, which this Python does not have: pip install plotly, or use .venv/bin/python "
            "(make setup)"
        ) from None
    except OSError as error:
        raise ValueError(f"--plot {path} cannot be written: {error.strerror}; its folder must be there") from None


def main(argv=None):
    try:
        flags = make_parser().parse_args(argv)
        request = make_request(flags)
        result = estimate(request, flags.data, flags.all)
        if flags.scaling:
            result["scaling"] = scaling(request, get_gpu(result["gpu"]))
        if flags.plot:
            draw(Path(flags.plot), request, result)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if flags.json:
        print(json.dumps(result, indent=2))
    else:
        print_tables(result)
        if flags.scaling:
            print_scaling(result["scaling"])
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` stops listening, and that is no error
    sys.exit(main())
