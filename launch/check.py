"""The planner beside what was measured: our points, others' published figures, earlier systems' claims.

python -m launch.check            # the tables of the README
"""

import argparse
import sys
from dataclasses import replace

from launch.plan import SCALING_FILES, Request, memory_of, rank, scaling, zero_settings
from launch.speed import Setup, measured, step_time
from model.config import ModelConfig, get_preset
from train.hardware import get_gpu
from train.memory import GIB

MEMORY_WITHIN, TIME_WITHIN, PUBLISHED_WITHIN = 0.05, 0.10, 0.25
SCALED = (("6.7B", "h100"), ("13B", "a100-80"))
TOKENS_A_GPU = 32768  # in a step, of published figures: an assumption, as most do not name their batch


def setup_of(point):
    """The Setup of one of measurements.json's points."""
    model = replace(get_preset(point["size"], seq_len=point["seq_len"]), vocab_size=point["vocab_size"])
    return Setup(
        model=model, gpu=get_gpu(point["gpu"]), n_gpus=point["n_gpus"], micro_batch=point["micro_batch"],
        grad_accum=point["grad_accum"], zero=zero_settings(point["zero_file"]), recompute=point["recompute"],
        optimizer=point["optimizer"], fp8=point["fp8"], document_tokens=point["document_tokens"],
    )  # fmt: skip


def compare(point):
    """(predicted GiB, its error; predicted ms, its error) of a point; an error is None where it does not count."""
    setup = setup_of(point)
    gib, ms = sum(memory_of(setup).values()) / GIB, sum(step_time(setup).values()) * 1e3
    counts = point["use"] == "checks"
    return gib, gib / point["peak_gib"] - 1, ms, ms / point["step_ms"] - 1 if counts else None


def published_model(name, seq_len):
    return ModelConfig(**measured()["published_models"][name], seq_len=seq_len)


def predict_published(figure):
    """Tokens/s and GPU of the planner's best set-up for another's model, GPUs and rows."""
    model = published_model(figure["model"], figure["seq_len"])
    request = Request(
        size="6.7B", model=model, tokens=1e9, recompute=figure["recompute"], document_tokens=figure["seq_len"],
        batch_tokens=figure["n_gpus"] * TOKENS_A_GPU, others=True,
    )  # fmt: skip
    fitting, _ = rank(request, get_gpu(figure["gpu"]), figure["n_gpus"])
    return fitting[0].tokens_per_s / figure["n_gpus"] if fitting else None


def mark(error, limit):
    return "" if error is None else f"{error:+.1%}" + ("" if abs(error) <= limit else " (miss)")


def point_rows():
    yield "| size | rows x tokens | step | GiB | planner | | ms | planner | |"
    yield "|---|---|---|---:|---:|---|---:|---:|---|"
    for point in measured()["points"]:
        gib, memory_error, ms, time_error = compare(point)
        step = [point["zero_file"], point["optimizer"]] + ["recomputed"] * (point["recompute"] == "layer")
        step += ["fp8"] * point["fp8"] + [f"{point['n_gpus']} GPUs"] * (point["n_gpus"] > 1)
        timed = mark(time_error, TIME_WITHIN) if point["use"] == "checks" else "calibrates"
        yield (
            f"| {point['size']} | {point['micro_batch']} x {point['seq_len']:,} | {', '.join(step)} | "
            f"{point['peak_gib']} | {gib:.1f} | {mark(memory_error, MEMORY_WITHIN)} | {point['step_ms']:,.0f} | "
            f"{ms:,.0f} | {timed} |"
        )


def published_rows():
    yield "| model | GPUs | row | published tokens/s and GPU | planner | | source |"
    yield "|---|---|---:|---:|---:|---|---|"
    for figure in measured()["published"]:
        found = predict_published(figure)
        error = None if found is None else found / figure["tokens_per_s_per_gpu"] - 1
        verdict = "calibrates" if figure["use"] == "calibrates" else mark(error, PUBLISHED_WITHIN)
        again = ", recomputed" if figure["recompute"] else ""
        ours = "does not fit | (miss)" if found is None else f"{found:,.0f} | {verdict}"
        yield (
            f"| {figure['model']} | {figure['n_gpus']} {figure['gpu']} | {figure['seq_len']:,}{again} | "
            f"{figure['tokens_per_s_per_gpu']:,} | {ours} | {figure['source']} |"
        )


def claim_rows():
    yield "| claim | planner | |"
    yield "|---|---|---|"
    for claim in measured()["claims"]:
        model, gpu = get_preset(claim["size"]), get_gpu(claim["gpu"])
        tokens = claim["tokens"] or 20 * model.n_parameters
        fitting, _ = rank(Request(size=claim["size"], model=model, tokens=tokens), gpu, claim["n_gpus"])
        best, high = fitting[0], claim["days"][1]
        in_time = best.tokens_per_s * 86400 * high
        yield (
            f"| {claim['claim']} | {tokens / 1e9:,.0f}B tokens: {best.days:,.1f} days at {best.tokens_per_s:,.0f} "
            f"tokens/s ({best.mfu:.0%} MFU) | {in_time / 1e9:,.1f}B tokens in {high} days |"
        )


def scaling_rows():
    """Rates a GPU from one node to 1,024 GPUs, of the two SCALED."""
    pairs = [scaling(Request(size=s, model=get_preset(s), tokens=1e12), get_gpu(g)) for s, g in SCALED]
    pairs = [[row for row in rows if row["gpus"] >= 8] for rows in pairs]
    heads = " | ".join(f"{s}, {g}: {' | '.join(SCALING_FILES)} | efficiency" for s, g in SCALED)
    yield f"| GPUs | tokens a step | {heads} |"
    yield "|---:|---:|" + ("---:|" * len(SCALING_FILES) + "---|") * len(SCALED)
    for together in zip(*pairs, strict=True):
        cells = []
        for row, first in zip(together, (rows[0] for rows in pairs), strict=True):
            rates = row["tokens_per_s_per_gpu"]
            cells += [f"{rates[f]:,.0f}" if rates[f] else "no" for f in SCALING_FILES]
            cells.append(f"{row['efficiency'] / first['efficiency']:.0%}, {row['best']}")
        yield f"| {together[0]['gpus']:,} | {together[0]['batch_tokens']:,} | " + " | ".join(cells) + " |"


def counts():
    """(within, counted) of memory, of time, and of published figures."""
    points, figures = measured()["points"], [f for f in measured()["published"] if f["use"] == "checks"]
    memory = [abs(compare(p)[1]) <= MEMORY_WITHIN for p in points]
    times = [abs(compare(p)[3]) <= TIME_WITHIN for p in points if p["use"] == "checks"]
    published = [
        abs(predict_published(f) / f["tokens_per_s_per_gpu"] - 1) <= PUBLISHED_WITHIN for f in figures
    ]  # fmt: skip
    return [(sum(hits), len(hits)) for hits in (memory, times, published)]


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(argv)
    for rows in (point_rows, published_rows, claim_rows, scaling_rows):
        print("\n".join(rows()), end="\n\n")
    memory, times, published = (f"{within} of {counted}" for within, counted in counts())
    print(f"within 5 % of the memory: {memory}; 10 % of the time: {times}; 25 % of published rates: {published}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
