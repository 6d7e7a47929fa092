"""Our scorer beside lm-eval's stock `hf` model: the same weights, the same tasks and files, on the same device.

    python -m eval.bench runs/demo/checkpoints/step_0001600 --data data/evals --limit 200
    python -m eval.bench --random 1.3B --tokenizer data/local --data data/evals --dtype bfloat16 --hf-limit 100

Prints the seconds and tokens of ours, task by task, HumanEval's programs run in their sandbox. Then `hf` is asked
some of the items (--hf-limit of each task, drawn by a seed), from the export of the same weights: how many it answers
otherwise, the seconds of its model, and what these come to for the whole set, in proportion to tokens; its start, and
what lm-eval does around its model, are left out. Exits 1 if an answer differs in float32; in bfloat16 close choices
may. `hf` is not asked HumanEval, for which lm-eval needs the Hub. It runs on mamba-ssm and causal-conv1d where they
are installed.
"""

import argparse
import logging
import random
import sys
import tempfile
import time
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from curation.tokenizer import load_tokenizer
from eval.command import check_out, run_command
from eval.comparison import read_samples
from eval.harness import SEED, run_tasks
from eval.humaneval import judge
from eval.models import DTYPES, OwnModel, load_model
from eval.sandbox import SandboxError
from eval.task_data import BENCHMARKS, check_names, load_tasks
from model.bench_decode import take_mamba_ssm_bare
from model.config import PRESETS
from model.export import export
from model.hybrid import HybridLM
from model.scorer import BATCH_SIZE
from model.weights import check_device, load_checkpoint, write_weights
from train.run_dir import write_json


def different_answers(ours, theirs):
    """How many of our samples lm-eval answered otherwise; it has no rule for ties, so those do not count."""
    n = 0
    for sample, nats in zip(ours, theirs, strict=True):
        if sample["choices"] is None:
            n += sample["greedy"] != bool(nats[0][1])
        elif not sample["metrics"]["tie"]:
            n += sample["prediction"] != int(np.argmax([float(value) for value, _ in nats]))
    return n


def ask_hf(lm, name, data, samples):
    """([[(nats, greedy)] of each of our samples], tokens, seconds) of lm-eval's own evaluator with its model.

    tokens: of each different context and continuation but the last, once; seconds: of the model alone.
    """
    from lm_eval.evaluator import evaluate

    tasks, wanted = dict(load_tasks(name, data)), defaultdict(list)
    names = {group: task.config.task for group, task in tasks.items()}
    for sample in samples:
        wanted[names[sample["group"]]].append(sample["doc_id"])
    read, tokens, seconds = lm._loglikelihood_tokens, 0, 0.0

    def timed(requests, **options):
        nonlocal tokens, seconds
        begun = time.monotonic()
        answers = read(requests, **options)  # on the host, so the device is done
        seconds += time.monotonic() - begun
        tokens += sum(map(len, {tuple((context + target)[:-1]) for _, context, target in requests}))
        return answers

    asked = {task.config.task: task for task in tasks.values() if task.config.task in wanted}
    with patch.object(lm, "_loglikelihood_tokens", timed):
        found = evaluate(lm, asked, samples=dict(wanted), bootstrap_iters=0, log_samples=True)["samples"]
    rows = {(task, row["doc_id"]): row["filtered_resps"] for task in found for row in found[task]}
    return [rows[names[sample["group"]], sample["doc_id"]] for sample in samples], tokens, seconds


def score_ours(model, names, *, data, limit, device, batch_size, folder):
    """Score the tasks and print a line as each is done; {task: our row of run_tasks}."""
    print(f"{'ours':15} {'items':>6} {'seconds':>8} {'tokens':>11} {'of hf':>12} {'share':>6}", flush=True)
    rows, totals = {}, np.zeros(4)
    for name in names:
        rows[name] = run_tasks(
            model, [name], data=data, device=device, limit=limit, batch_size=batch_size, out=folder
        )["tasks"][name]  # fmt: skip
        if BENCHMARKS[name].get("written"):
            judged(rows[name], folder / "samples" / f"{name}.jsonl")
        row = [rows[name][key] for key in ("n", "seconds", "forward_tokens", "forward_tokens_hf")]
        totals += row
        show(name, *row)
    show("all", *totals)
    return rows


def judged(row, path):
    """Run what was written, and add to the row its seconds and how it ended, {outcome: programs}."""
    begun, samples = time.monotonic(), read_samples(path)
    try:
        judge(samples)
    except SandboxError as error:
        print(f"not judged: {error}")
        return
    row["seconds"] = round(row["seconds"] + time.monotonic() - begun, 1)
    outcomes = [sample["outcome"].partition(":")[0] for sample in samples]
    row["outcomes"] = {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))}


def show(name, n, seconds, tokens, hf_tokens):
    share = tokens / hf_tokens
    print(f"{name:15} {n:6,.0f} {seconds:8.1f} {tokens:11,.0f} {hf_tokens:12,.0f} {share:6.1%}", flush=True)


def ask_both(rows, lm, *, data, limit, folder):
    """Ask lm-eval's model `limit` items of each task, print a line each; {task: {"items", "different" ...}}.

    It is asked twice, and the second time counts: at first, kernels are compiled and plans made for each shape.
    """
    print(f"{'hf':15} {'items':>6} {'different':>9} {'seconds':>8} {'tokens':>9} {'whole set':>10} {'ours':>8}")
    found = {}
    for name, row in rows.items():
        ours = read_samples(folder / "samples" / f"{name}.jsonl")
        if limit is not None and limit < len(ours):
            ours = [ours[i] for i in sorted(random.Random(f"{SEED} {name}").sample(range(len(ours)), limit))]
        for _ in range(2):
            theirs, tokens, seconds = ask_hf(lm, name, data, ours)
        # where we drop shots, lm-eval cuts the prompt's beginning off: other questions
        pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if not a["dropped_shots"]]
        found[name] = {
            "items": len(ours), "different": different_answers(*zip(*pairs, strict=True)) if pairs else 0,
            "seconds": seconds, "tokens": tokens, "whole_set": seconds * row["forward_tokens_hf"] / max(tokens, 1),
            "ours": row["seconds"],
        }  # fmt: skip
        show_both(name, **found[name])
    total = {key: sum(line[key] for line in found.values()) for key in next(iter(found.values()))}
    show_both("all", **total)
    return found


def show_both(name, *, items, different, seconds, tokens, whole_set, ours):
    print(f"{name:15} {items:6,} {different:9,} {seconds:8.1f} {tokens:9,} {whole_set:10.1f} {ours:8.1f}", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m eval.bench", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("checkpoint", nargs="?", help="a checkpoint folder")
    parser.add_argument("--random", choices=PRESETS, help="random weights of this size instead, to time them")
    parser.add_argument("--tokenizer", help="of the random weights: a tokenizer file, or the folder that holds it")
    parser.add_argument("--data", help="folder of the tasks' files; default: the Hub")
    parser.add_argument("--tasks", nargs="+", help=f"of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--limit", type=int, help="items of each task, or subject")
    parser.add_argument("--hf-limit", type=int, help="how many items of each task hf is asked; 0: none (default: all)")
    parser.add_argument("--batch-size", type=int, help="texts in a forward pass (default: ours as suits it, hf 64)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--json", type=Path, help="also write what was measured into this file")
    flags = parser.parse_args(argv)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    results = {"model": flags.random or flags.checkpoint, "dtype": flags.dtype, "device": flags.device, "hf": {}}
    try:
        if (flags.checkpoint is None) == (flags.random is None) or (flags.random and not flags.tokenizer):
            raise ValueError("give a checkpoint, or --random SIZE with --tokenizer FILE")
        if flags.hf_limit is not None and flags.hf_limit < 0:
            raise ValueError(f"--hf-limit {flags.hf_limit} is less than none; 0 leaves hf out")
        check_device(flags.device)
        if flags.json:
            check_out(flags.json)
        names, hf_limit = check_names(flags.tasks), flags.hf_limit
        with tempfile.TemporaryDirectory() as folder:
            folder, checkpoint = Path(folder), flags.checkpoint
            if flags.random:
                tokenizer = load_tokenizer(flags.tokenizer)
                weights = random_model(flags.random, flags.device)
                if hf_limit != 0:
                    checkpoint = folder / "random"
                    write_weights(
                        checkpoint, weights.config, dict(weights.named_parameters()), source="random weights",
                        tokenizer=tokenizer.path,
                    )  # fmt: skip
                model = OwnModel(weights, tokenizer, dtype=flags.dtype, name=flags.random)
                del weights
            else:
                model = load_model(checkpoint, device=flags.device, dtype=flags.dtype)
            if hf_limit != 0:
                export(load_checkpoint(checkpoint), folder / "hf", dtype=flags.dtype)
            rows = results["ours"] = score_ours(
                model, names, data=flags.data, limit=flags.limit, device=flags.device, batch_size=flags.batch_size,
                folder=folder,
            )  # fmt: skip
            keep(flags.json, results)
            rows = {name: row for name, row in rows.items() if not BENCHMARKS[name].get("written")}
            if hf_limit != 0 and rows:
                take_mamba_ssm_bare()  # before transformers looks for its kernels
                from lm_eval.models.huggingface import HFLM

                del model  # a GPU may not hold both
                lm = HFLM(
                    pretrained=str(folder / "hf"), device=flags.device, dtype=flags.dtype,
                    batch_size=flags.batch_size or BATCH_SIZE,
                )  # fmt: skip
                found = [name for name in ("mamba_ssm", "causal_conv1d") if find_spec(name)]
                results |= {"hf_class": type(lm.model).__name__, "hf_kernels": found}
                print(f"hf is {results['hf_class']} on {', '.join(found) or 'PyTorch alone'}", flush=True)
                results["hf"] = ask_both(rows, lm, data=flags.data, limit=hf_limit, folder=folder)
                keep(flags.json, results)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    different = sum(row["different"] for row in results["hf"].values())
    return 1 if different and flags.dtype == "float32" else 0


def keep(path, results):
    if path is not None:
        write_json(path, results)


def random_model(size, device):
    with torch.device(device):
        model = HybridLM(PRESETS[size], kernels="torch" if torch.device(device).type == "cpu" else "auto")
    return model.eval()


if __name__ == "__main__":
    run_command(main)
