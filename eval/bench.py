"""Our scorer beside lm-eval's stock `hf` model: the same checkpoint, the same tasks and files, on the same device.

    python -m eval.bench runs/demo/checkpoints/step_0001600 --data data/evals --limit 200
    python -m eval.bench --random 1.3B --tokenizer data/local/tokenizer.model --data data/evals --device cuda

The checkpoint is exported, and lm-eval loads the folder. Prints, task by task, the seconds and tokens of both and how
many items they answer differently, and exits 1 if there is one. HumanEval is left out: lm-eval's needs the Hub.
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

from eval.harness import run_tasks
from eval.models import DTYPES
from eval.task_data import BENCHMARKS, check_names, load_tasks
from model.config import PRESETS
from model.export import export
from model.hybrid import HybridLM
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


def compare(checkpoint, names, *, data, limit, device, dtype, batch_size, folder):
    """Yield (task, items, different answers, our row of run_tasks, lm-eval's seconds)."""
    from lm_eval.models.huggingface import HFLM

    results = run_tasks(
        checkpoint, names, data=data, device=device, limit=limit, batch_size=batch_size, out=folder, dtype=dtype
    )
    export(load_checkpoint(checkpoint), folder / "hf")
    lm = HFLM(pretrained=str(folder / "hf"), device=device, dtype=dtype, batch_size=batch_size)
    for name in names:
        lines = (folder / "samples" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        ours = [json.loads(line) for line in lines]
        theirs, seconds = ask_hf(lm, name, data, limit)
        # where we drop shots, lm-eval cuts the prompt's beginning off: other questions
        pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if not a["dropped_shots"]]
        asked, answered = zip(*pairs, strict=True) if pairs else ((), ())
        yield name, len(pairs), different_answers(name, asked, answered), results["tasks"][name], seconds


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m eval.bench", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("checkpoint", nargs="?", help="a checkpoint folder")
    parser.add_argument("--random", choices=PRESETS, help="random weights of this size instead, to time them")
    parser.add_argument("--tokenizer", help="of the random weights: a tokenizer.model")
    parser.add_argument("--data", help="folder of the tasks' files; default: the Hub")
    parser.add_argument("--tasks", nargs="+", help="default: all but humaneval")
    parser.add_argument("--limit", type=int, help="items of each task, or subject")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    flags = parser.parse_args(argv)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        if (flags.checkpoint is None) == (flags.random is None) or (flags.random and not flags.tokenizer):
            raise ValueError("give a checkpoint, or --random SIZE with --tokenizer FILE")
        names = check_names(flags.tasks or [name for name in BENCHMARKS if not BENCHMARKS[name].get("written")])
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = flags.checkpoint
            if flags.random:
                checkpoint = Path(folder) / "random"
                model = HybridLM(PRESETS[flags.random], kernels="torch")
                write_weights(checkpoint, model.config, dict(model.named_parameters()), source="random weights",
                              tokenizer=flags.tokenizer)  # fmt: skip
                del model
            rows = compare(
                checkpoint, names, data=flags.data, limit=flags.limit, device=flags.device, dtype=flags.dtype,
                batch_size=flags.batch_size, folder=Path(folder),
            )  # fmt: skip
            heads = ("task", "items", "different", "seconds", "hf", "tokens", "hf", "share")
            print("{:15} {:>6} {:>9} {:>8} {:>8} {:>11} {:>12} {:>6}".format(*heads))
            totals = np.zeros(6)
            for name, n, different, ours, hf_seconds in rows:
                row = n, different, ours["seconds"], hf_seconds, ours["forward_tokens"], ours["forward_tokens_hf"]
                totals += row
                show(name, *row)
            show("all", *totals)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if totals[1] else 0


def show(name, n, different, seconds, hf_seconds, tokens, hf_tokens):
    print(
        f"{name:15} {n:6,.0f} {different:9,.0f} {seconds:8.1f} {hf_seconds:8.1f} {tokens:11,.0f} {hf_tokens:12,.0f} "
        f"{tokens / hf_tokens:6.1%}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
