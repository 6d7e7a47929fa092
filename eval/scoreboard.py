"""Score a checkpoint with lm-eval on its data folder's held-out text and tasks, offline:

    python -m eval.scoreboard runs/demo/checkpoints/step_0000400

Prints two tables and writes runs/demo/eval/step_0000400.json.
"""

import argparse
import json
import logging
import platform
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from lm_eval.evaluator import evaluate
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from curation.shards import file_sha256, manifest_sha256, read_manifest, verify_files
from curation.tokenizer import load_tokenizer
from eval.harness import TASKS, HarnessLM, build_tasks, task_name
from eval.intervals import perplexity, ratio, share
from eval.yardsticks import gzip_bits_per_byte, unigram_bits_per_byte
from model.weights import load_checkpoint
from train.run_dir import write_json

FORMAT = 1
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# ---- scoring


def score_checkpoint(checkpoint, data=None, *, limit=None, batch_tokens=8192, device="cpu"):
    """The score file's content (its keys are listed in eval/README.md) for a loaded checkpoint.

    data: a data folder with the checkpoint's tokenizer; None means the folder it was trained on, unchanged.
    limit: only the first so many items of each task. Raises FileNotFoundError or ValueError with one line.
    """
    started = time.monotonic()
    folder = Path(data or checkpoint.data["path"])
    manifest = open_data(checkpoint, folder, given=data is not None)
    tokenizer = load_tokenizer(checkpoint.tokenizer_path)
    documents = read_documents(folder, manifest, limit)
    lm = HarnessLM(checkpoint.load_model(device), tokenizer, batch_tokens=batch_tokens)
    samples = run_lm_eval(lm, documents)
    sha256 = manifest_sha256(folder)
    return {
        "format": FORMAT,
        "checkpoint": {
            "path": str(checkpoint.path),
            "step": checkpoint.step,
            "tokens_seen": checkpoint.tokens,
            "sha256": checkpoint.sha256,
        },
        "data": {
            "path": str(folder),
            "manifest_sha256": sha256,
            "is_training_data": sha256 == checkpoint.data["manifest_sha256"],
        },
        "bits_per_byte": score_heldout(documents, samples, tokenizer),
        "tasks": {task: score_task(task, samples[task]) for task, source in documents if source is None},
        "settings": {
            "limit": limit,
            "batch_tokens": batch_tokens,
            "seq_len": lm.seq_len,
            "device": device,
            "n_truncated": lm.n_truncated,
        },
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "lm-eval", "datasets", "numpy")},
        },
        "created_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - started, 1),
    }


def open_data(checkpoint, folder, given):
    """The manifest of the data folder, once it is sure that it fits the checkpoint and is whole where we read it."""
    other = "" if given else f" (the folder that {checkpoint.path} was trained on; give another with --data)"
    try:
        manifest = read_manifest(folder)
        names = [source["text"] for source in manifest["splits"]["heldout"]["sources"].values()]
        verify_files(folder, names + [task["file"] for task in manifest["tasks"].values()])
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{error}{other}") from None
    trained, here = checkpoint.data["manifest_sha256"], manifest_sha256(folder)
    if not given and here != trained:
        raise ValueError(
            f"data folder {folder} was made again since {checkpoint.path} was trained on it (manifest {here[:12]}, "
            f"then {trained[:12]}); to score on it all the same, add: --data {folder}"
        )
    ours, theirs = file_sha256(checkpoint.tokenizer_path), manifest["tokenizer"]["sha256"]
    if ours != theirs:
        raise ValueError(
            f"data folder {folder} has another tokenizer (sha256 {theirs[:12]}) than {checkpoint.path} ({ours[:12]}); "
            "give a folder made with the checkpoint's tokenizer"
        )
    return manifest


def read_documents(folder, manifest, limit):
    """{(task, source): documents} of all that can be scored; source is None where a task has one set of items."""
    files = {}
    for task, definition in TASKS.items():
        if definition["documents"] == "heldout":
            sources = manifest["splits"]["heldout"]["sources"]
            files |= {(task, source): entry["text"] for source, entry in sorted(sources.items())}
        elif task in manifest["tasks"]:
            files[task, None] = manifest["tasks"][task]["file"]
    documents = {}
    for key, name in files.items():
        with (folder / name).open("rb") as lines:
            items = [json.loads(line) for line in islice(lines, limit)]
        if items:
            documents[key] = items
    return documents


def run_lm_eval(lm, documents):
    """{task name: lm-eval's sample records, one an item}: what it asked, what the model answered, and each metric."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns about settings that we mean
    with patch("lm_eval.api.task.tqdm", lambda items, **_: items):  # a bar a task, for milliseconds
        # bootstrap_iters=0: lm-eval has no error for bits per byte, and starts processes for perplexity's
        return evaluate(lm, build_tasks(documents), bootstrap_iters=0, log_samples=True)["samples"]


# ---- own tasks


def score_heldout(documents, samples, tokenizer):
    """Bits per byte of each held-out source and of all of them, beside what gzip and token frequencies need."""
    parts = {
        source: ([sample["bits_per_byte"] for sample in samples[task_name(task, source)]], [d["text"] for d in docs])
        for (task, source), docs in documents.items()
        if source is not None
    }
    parts[None] = tuple(list(chain(*columns)) for columns in zip(*parts.values(), strict=True))  # all sources together
    rows = {}
    for source, (pairs, texts) in parts.items():
        nats, n_bytes = zip(*pairs, strict=True)
        encoded = tokenizer.encode_batch(texts)
        rows[source] = {
            **ratio(np.array(nats) / -np.log(2), n_bytes),
            "documents": len(texts),
            "tokens": sum(map(len, encoded)),
            "text_bytes": sum(n_bytes),
            "gzip": gzip_bits_per_byte(texts),
            "unigram": unigram_bits_per_byte(encoded, sum(n_bytes)),
        }
        rows[source]["below_gzip"] = rows[source]["value"] < rows[source]["gzip"]
    return {"overall": rows.pop(None), "sources": rows}


def score_task(task, samples):
    """The metrics of one task with standard errors, the number of items, and what guessing would score."""
    metrics = {m["metric"]: [sample[m["metric"]] for sample in samples] for m in TASKS[task]["config"]["metric_list"]}
    scores = {name: (perplexity if name == "perplexity" else share)(values) for name, values in metrics.items()}
    return {"n": len(samples), "chance": TASKS[task]["chance"], "metrics": scores, "about": TASKS[task]["about"]}


# ---- showing and keeping


def show(scores, console):
    """Print the two tables and the verdict on gzip."""
    held_out, checkpoint = scores["bits_per_byte"], scores["checkpoint"]
    console.print(f"{checkpoint['path']}: step {checkpoint['step']:,}, {checkpoint['tokens_seen']:,} tokens seen")
    if not scores["data"]["is_training_data"]:
        console.print(f"scored on {scores['data']['path']}, which is not the data that it was trained on")
    table = Table(
        title="held-out bits per byte (lower is better)", title_justify="left", box=SIMPLE_HEAD, pad_edge=False
    )
    for name in ("source", "docs", "model", "gzip -9", "unigram", "below gzip"):
        table.add_column(name, justify="left" if name == "source" else "right", no_wrap=True)
    for source, row in [*held_out["sources"].items(), ("all", held_out["overall"])]:
        table.add_row(
            source,
            f"{row['documents']:,}",
            with_error(row),
            f"{row['gzip']:.3f}",
            f"{row['unigram']:.3f}",
            "yes" if row["below_gzip"] else "no",
            style="bold" if source == "all" else None,
        )
    console.print(table)
    table = Table(title="tasks (mean and standard error)", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("task", "metric", "items", "score", "chance"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right", no_wrap=True)
    for task, result in scores["tasks"].items():
        for metric, score in result["metrics"].items():
            chance = f"{result['chance'][metric]:.3f}" if metric in result["chance"] else ""
            table.add_row(task, metric, f"{result['n']:,}", with_error(score), chance)
    console.print(table)
    console.print(verdict(held_out["overall"]))


def shown(number):
    """ "0.450"; large numbers, such as a young model's perplexity, with three digits."""
    return f"{number:.3f}" if abs(number) < 1000 else f"{number:.2e}"


def with_error(score):
    return shown(score["value"]) + ("" if score["stderr"] is None else f" ± {shown(score['stderr'])}")


def verdict(row):
    """One sentence: does the model need fewer bits than gzip."""
    relation = f"{'below' if row['below_gzip'] else 'NOT below'} gzip -9 ({row['gzip']:.3f})"
    return f"Held-out bits per byte: {with_error(row)}, {relation}; unigram {row['unigram']:.3f}"


def eval_folder(checkpoint):
    """runs/<run>/eval of a checkpoint that lies in runs/<run>/checkpoints."""
    folder = Path(checkpoint.path).resolve().parent
    if folder.name != "checkpoints":
        raise ValueError(
            f"{checkpoint.path} is not in the checkpoints/ folder of a run; say where to write with --out"
        )
    return folder.parent / "eval"


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m eval.scoreboard", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("checkpoint", help="a checkpoint folder: runs/<run>/checkpoints/step_...")
    parser.add_argument("--data", help="data folder; default: the one that the checkpoint was trained on")
    parser.add_argument("--out", type=Path, help="JSON file; default: runs/<run>/eval/<checkpoint>.json")
    parser.add_argument("--limit", type=int, help="only the first so many items of each task, for a quick look")
    parser.add_argument(
        "--batch-tokens", type=int, default=8192, help="positions a forward pass (default %(default)s)"
    )
    parser.add_argument("--device", default=DEVICE, help="torch device (default here: %(default)s)")
    flags = parser.parse_args(argv)
    try:
        if min(flags.batch_tokens, 1 if flags.limit is None else flags.limit) < 1:
            raise ValueError(f"--batch-tokens {flags.batch_tokens} --limit {flags.limit}: both must be at least 1")
        checkpoint = load_checkpoint(flags.checkpoint)
        # a limited run must not stand where the report looks for the full one
        suffix = "" if flags.limit is None else f".limit{flags.limit}"
        out = flags.out or eval_folder(checkpoint) / f"{Path(checkpoint.path).name}{suffix}.json"
        scores = score_checkpoint(
            checkpoint, flags.data, limit=flags.limit, batch_tokens=flags.batch_tokens, device=flags.device
        )
        write_json(out, scores)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(scores, Console())
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
