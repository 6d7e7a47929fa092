"""Our scorer beside lm-eval's stock `hf` model: the same weights, the same tasks and files, on the same device.

    python -m eval.bench runs/demo/checkpoints/step_0001600 --data data/evals --limit 200
    python -m eval.bench --random 1.3B --tokenizer data/local --data data/evals --dtype bfloat16 --hf-limit 20

Prints the seconds and tokens of ours, task by task; then, of the items that `hf` is asked too (--hf-limit), how many
it answers differently and its seconds, from the export of the same weights. Exits 1 if an answer differs in float32;
in bfloat16 close choices may. `hf` is not asked HumanEval, for which lm-eval needs the Hub.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from curation.tokenizer import load_tokenizer
from eval.harness import run_tasks
from eval.models import DTYPES, OwnModel, load_model
from eval.task_data import BENCHMARKS, check_names, load_tasks
from model.config import PRESETS
from model.export import export
from model.hybrid import HybridLM
from model.scorer import BATCH_SIZE
from model.weights import load_checkpoint, write_weights


def different_answers(name, ours, theirs):
    """How many of our samples lm-eval answered otherwise; it has no rule for ties, so those do not count."""
    n = 0
    for sample, nats in zip(ours, theirs, strict=True):
        if sample["choices"] is None:
            n += sample["greedy"] != bool(nats[0][1])
        elif not sample["metrics"]["tie"]:
            n += sample["prediction"] != int(np.argmax([float(value) for value, _ in nats]))
    return n


def ask_hf(lm, name, data, limit):
    """([[(nats, greedy)] of each item], seconds) of lm-eval's own evaluator with its model."""
    from lm_eval.evaluator import evaluate

    begun = time.monotonic()
    tasks = {task.config.task: task for _, task in load_tasks(name, data)}
    samples = evaluate(lm, tasks, limit=limit, bootstrap_iters=0, log_samples=True)["samples"]
    rows = [sample for task in tasks for sample in sorted(samples[task], key=lambda sample: sample["doc_id"])]
    return [row["filtered_resps"] for row in rows], time.monotonic() - begun


def score_ours(model, names, *, data, limit, device, batch_size, folder):
    """Score the tasks and print a line as each is done; {task: our row of run_tasks}."""
    print(f"{'ours':15} {'items':>6} {'seconds':>8} {'tokens':>11} {'of hf':>12} {'share':>6}", flush=True)
    rows, totals = {}, np.zeros(4)
    for name in names:
        rows[name] = run_tasks(
            model, [name], data=data, device=device, limit=limit, batch_size=batch_size, out=folder
        )["tasks"][name]  # fmt: skip
        row = [rows[name][key] for key in ("n", "seconds", "forward_tokens", "forward_tokens_hf")]
        totals += row
        show(name, *row)
    show("all", *totals)
    return rows


def show(name, n, seconds, tokens, hf_tokens):
    share = tokens / hf_tokens
    print(f"{name:15} {n:6,.0f} {seconds:8.1f} {tokens:11,.0f} {hf_tokens:12,.0f} {share:6.1%}", flush=True)


def ask_both(rows, lm, *, data, limit, folder):
    """Ask lm-eval's model the first `limit` items of each task (or subject), print a line each; how many differ."""
    print(f"{'hf':15} {'items':>6} {'different':>9} {'seconds':>8} {'whole set':>10} {'ours':>8}", flush=True)
    total = 0
    for name in rows:
        lines = (folder / "samples" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        ours = [json.loads(line) for line in lines]
        asked = [sample for sample in ours if limit is None or sample["doc_id"] < limit]
        theirs, seconds = ask_hf(lm, name, data, limit)
        # where we drop shots, lm-eval cuts the prompt's beginning off: other questions
        pairs = [(a, b) for a, b in zip(asked, theirs, strict=True) if not a["dropped_shots"]]
        different = different_answers(name, *zip(*pairs, strict=True)) if pairs else 0
        whole = seconds * len(ours) / len(asked)
        total += different
        print(
            f"{name:15} {len(asked):6,} {different:9,} {seconds:8.1f} {whole:10.1f} {rows[name]['seconds']:8.1f}",
            flush=True,
        )
    return total


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m eval.bench", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("checkpoint", nargs="?", help="a checkpoint folder")
    parser.add_argument("--random", choices=PRESETS, help="random weights of this size instead, to time them")
    parser.add_argument("--tokenizer", help="of the random weights: a tokenizer file, or the folder that holds it")
    parser.add_argument("--data", help="folder of the tasks' files; default: the Hub")
    parser.add_argument("--tasks", nargs="+", help=f"of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--limit", type=int, help="items of each task, or subject")
    parser.add_argument("--hf-limit", type=int, help="how many of them hf is asked; 0: none (default: all)")
    parser.add_argument("--batch-size", type=int, help="texts in a forward pass (default: ours as suits it, hf 64)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    flags = parser.parse_args(argv)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    different = 0
    try:
        if (flags.checkpoint is None) == (flags.random is None) or (flags.random and not flags.tokenizer):
            raise ValueError("give a checkpoint, or --random SIZE with --tokenizer FILE")
        if flags.hf_limit is not None and flags.hf_limit < 0:
            raise ValueError(f"--hf-limit {flags.hf_limit} is less than none; 0 leaves hf out")
        names, hf_limit = check_names(flags.tasks), flags.limit if flags.hf_limit is None else flags.hf_limit
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
                export(load_checkpoint(checkpoint), folder / "hf")
            rows = score_ours(
                model, names, data=flags.data, limit=flags.limit, device=flags.device, batch_size=flags.batch_size,
                folder=folder,
            )  # fmt: skip
            if hf_limit != 0:
                from lm_eval.models.huggingface import HFLM

                del model  # a GPU may not hold both
                lm = HFLM(
                    pretrained=str(folder / "hf"), device=flags.device, dtype=flags.dtype,
                    batch_size=flags.batch_size or BATCH_SIZE,
                )  # fmt: skip
                rows = {name: row for name, row in rows.items() if not BENCHMARKS[name].get("written")}
                different = ask_both(rows, lm, data=flags.data, limit=hf_limit, folder=folder)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if different and flags.dtype == "float32" else 0


def random_model(size, device):
    with torch.device(device):
        model = HybridLM(PRESETS[size], kernels="torch" if torch.device(device).type == "cpu" else "auto")
    return model.eval()


if __name__ == "__main__":
    sys.exit(main())
