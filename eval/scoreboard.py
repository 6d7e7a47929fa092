"""Score a checkpoint on its data folder's held-out text and tasks, and on the public benchmarks, beside GPT-3:

    python -m eval.scoreboard runs/demo/checkpoints/step_0000400
    python -m eval.scoreboard runs/demo/checkpoints/step_0000400 --benchmarks data/evals --tasks hellaswag piqa
    python -m eval.scoreboard EleutherAI/pythia-1.4b --benchmarks data/evals

Prints tables and writes runs/demo/eval/step_0000400.json; with benchmarks, also step_0000400.html, a page with
pictures and samples, and the samples themselves under step_0000400/samples. The benchmarks are run where --benchmarks
or --tasks is given, or data/evals is there. A model that is no checkpoint of ours has no held-out text, and what is
written about it goes into scores/. Under torchrun several processes share the benchmarks.
"""

import argparse
import json
import logging
import os
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
import torch.distributed as dist
from lm_eval.evaluator import evaluate
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from curation.shards import file_sha256, manifest_sha256, new_file, read_manifest, verify_files
from curation.tokenizer import load_tokenizer
from eval.command import check_out, run_command
from eval.comparison import headline, make_board, read_samples
from eval.contamination import benchmark_files, check_contamination, unclean_items
from eval.harness import TASKS, HarnessLM, build_tasks, join_processes, run_tasks, task_name
from eval.humaneval import judge
from eval.intervals import NOT_COMPARABLE, perplexity, ratio, share
from eval.models import DTYPES, check_size
from eval.report_scores import build_page
from eval.sandbox import SandboxError, check_sandbox
from eval.task_data import BENCHMARKS, check_names, check_pins
from eval.yardsticks import gzip_bits_per_byte, unigram_bits_per_byte
from model.weights import MANIFEST, check_device, load_checkpoint
from train.run_dir import write_json

FORMAT = 1
BENCHMARK_DATA = Path("data/evals")  # where `make eval-data` writes
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
    if not any(source for _, source in documents):
        raise ValueError(
            f"data folder {folder} holds nothing out, so there is no text to score on; give one that does, made with "
            "the same tokenizer: --data FOLDER (the benchmarks alone: python -m eval.harness)"
        )
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


def show_board(board, console):
    """Print the scoreboard: ours, chance, and what is published for GPT-3 and others of about this size."""
    model = board["model"]
    console.print(f"{model['name']}: {model['parameters']:,} parameters")
    table = Table(title="benchmarks, in percent", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("task", "metric", "items", "score", "95 %", "chance", "ties"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right", no_wrap=True)
    for peer in board["peers"].values():
        table.add_column(peer["model"] + ("" if peer["same_size"] else " *"), justify="right")
    for row in board["rows"]:
        score, tie = row["metrics"][row["metric"]], row["tie_rate"].get(row["metric"])
        ends = " to ".join(f"{100 * end:.1f}" for end in score["interval"] or ())
        table.add_row(
            row["title"], row["metric"], f"{row['n']:,}", f"{100 * score['value']:.1f}", ends,
            f"{100 * row['chance']:.0f}", "" if tie is None else f"{100 * tie:.1f}",
            *(cell_text(cell, row["metric"]) for cell in row["columns"].values()),
        )  # fmt: skip
    console.print(table)
    if not all(peer["same_size"] for peer in board["peers"].values()):
        console.print("* of another size: shown, but not compared with")
    for row in board["rows"]:
        if row["clean"] and row["clean"]["left_out"]:
            score = row["clean"]["metrics"].get(row["metric"])
            clean = f"{100 * score['value']:.1f} on the other {row['clean']['n']:,}" if score else "no other is left"
            console.print(f"{row['title']}: {row['clean']['left_out']:,} of the items not clean, {clean}")
    console.print(headline(board))


def cell_text(cell, metric):
    """'54.7 ahead', with the metric where it is not the row's; the number alone where there is no verdict on it."""
    number = f"{100 * cell['value']:.1f}" if "value" in cell else "-"
    if cell["verdict"] == NOT_COMPARABLE:
        return number
    return f"{number} {cell['verdict']}" + ("" if cell["metric"] == metric else f" ({cell['metric']})")


# ---- benchmarks


def score_benchmarks(model, out, flags, data=None):
    """Run the benchmarks, all ranks; on rank 0 the scoreboard (see eval.comparison.make_board), on others None.

    out: folder for samples and kept answers. data: the data folder that the model was trained on, to look for the
    items in; None: nobody looks.
    """
    result = run_tasks(
        model, flags.tasks, data=flags.benchmarks, device=flags.device, limit=flags.limit, batch_size=flags.batch_size,
        out=out, dtype=flags.dtype, size=flags.size,
    )  # fmt: skip
    if dist.is_initialized() and dist.get_rank() > 0:
        return None
    if "humaneval" in flags.tasks:
        path = out / "samples/humaneval.jsonl"
        items = read_samples(path)
        judge(items)
        with new_file(path) as file:
            file.writelines((json.dumps(item, ensure_ascii=False) + "\n").encode() for item in items)
    unclean = None
    if data is not None:
        report = check_contamination(data, benchmark_files(flags.benchmarks, flags.tasks))
        write_json(out / "contamination.json", report)
        unclean = {name: unclean_items(report, name) for name in flags.tasks}
    board = make_board(result, out / "samples", unclean)
    return board | {key: result[key] for key in ("data", "settings") if key in result}


# ---- command line


def eval_folder(checkpoint):
    """runs/<run>/eval of a checkpoint that lies in runs/<run>/checkpoints."""
    folder = Path(checkpoint.path).resolve().parent
    if folder.name != "checkpoints":
        raise ValueError(
            f"{checkpoint.path} is not in the checkpoints/ folder of a run; say where to write with --out"
        )
    return folder.parent / "eval"


def check_flags(flags):
    """Fill in what depends on the machine; whether benchmarks are run. ValueError or FileNotFoundError for what would
    end the scoring later on: a number or a combination that means nothing, an unknown task, files that are not there.
    """
    if any(number is not None and number < 1 for number in (flags.batch_tokens, flags.batch_size, flags.limit)):
        raise ValueError(
            f"--batch-tokens {flags.batch_tokens} --batch-size {flags.batch_size} --limit {flags.limit}: all must be "
            "at least 1"
        )
    flags.device = flags.device or ("cpu" if DEVICE == "cpu" else f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    check_device(flags.device)
    if flags.own_only and (flags.benchmarks or flags.tasks or flags.contamination):
        raise ValueError(
            "--own-only leaves the benchmarks out, so --benchmarks, --tasks and --contamination say nothing"
        )
    if flags.benchmarks is None and not flags.own_only and BENCHMARK_DATA.is_dir():
        flags.benchmarks = BENCHMARK_DATA
    with_benchmarks = not flags.own_only and bool(flags.benchmarks or flags.tasks)
    if flags.contamination and not flags.benchmarks:
        raise ValueError(
            "--contamination looks for the benchmarks' items, so it needs their files: --benchmarks FOLDER"
        )
    if with_benchmarks:
        flags.tasks = check_names(flags.tasks)
        if flags.benchmarks is not None:
            check_pins(flags.benchmarks, flags.tasks)
        if "humaneval" in flags.tasks:
            try:
                check_sandbox()
            except SandboxError as error:
                others = " ".join(name for name in flags.tasks if name != "humaneval")
                raise SandboxError(f"humaneval: {error}; leave it out with --tasks {others}") from None
    return with_benchmarks


def run(flags):
    """Score what the flags say; all ranks. Rank 0 writes and prints."""
    with_benchmarks = check_flags(flags)
    rank = int(os.environ.get("RANK", 0))
    is_ours = (Path(flags.checkpoint) / MANIFEST).is_file() or not with_benchmarks
    checkpoint = load_checkpoint(flags.checkpoint) if is_ours else None
    if is_ours:
        check_size(flags.checkpoint, flags.size, checkpoint.model_config.n_parameters, exact=True)
    # a limited run must not stand where the report looks for the full one
    suffix = "" if flags.limit is None else f".limit{flags.limit}"
    if flags.out:
        out = flags.out
    elif is_ours:
        out = eval_folder(checkpoint) / f"{Path(checkpoint.path).name}{suffix}.json"
    else:
        out = Path("scores") / f"{Path(flags.checkpoint).name}{suffix}.json"
    check_out(out)
    folder = out.with_name(out.name.removesuffix(".json"))
    if with_benchmarks and folder == out:
        raise ValueError(f"--out {out} must end in .json: the folder of samples beside it has the name without")
    if flags.contamination and not (is_ours or flags.data):
        raise ValueError(
            f"--contamination needs the data folder that {flags.checkpoint} was trained on: --data FOLDER"
        )
    scores, console = {"format": FORMAT}, Console(width=None if sys.stdout.isatty() else 150)
    if is_ours and rank == 0:  # before the processes are joined: it is small, and one process does it
        scores = score_checkpoint(
            checkpoint, flags.data, limit=flags.limit, batch_tokens=flags.batch_tokens, device=flags.device
        )
        write_json(out, scores)  # the benchmarks may take hours
        show(scores, console)
        if with_benchmarks:
            print(f"written to {out}; the benchmarks follow", flush=True)
    if with_benchmarks:
        join_processes()
        data = (flags.data or checkpoint.data["path"]) if flags.contamination else None
        board = score_benchmarks(flags.checkpoint, folder, flags, data)
    if rank > 0:
        return
    if with_benchmarks:
        scores["benchmarks"] = board
        write_json(out, scores)
        show_board(board, console)
        page = folder.with_name(f"{folder.name}.html")
        with new_file(page) as file:
            file.write(build_page(board, folder / "samples", scores).encode())
        print(f"page with pictures and samples: {page}")
    elif not flags.own_only:
        print(f"the public benchmarks were left out: there is no {BENCHMARK_DATA}; `make eval-data` makes it")
    print(f"written to {out}")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m eval.scoreboard", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("checkpoint", help="a checkpoint folder: runs/<run>/checkpoints/step_...; or a Hugging Face "
                        "folder or name, for the benchmarks alone")  # fmt: skip
    parser.add_argument("--data", help="data folder; default: the one that the checkpoint was trained on")
    parser.add_argument("--benchmarks", type=Path, help="folder of the benchmarks' files (make eval-data); default: "
                        f"{BENCHMARK_DATA}, if it is there; with --tasks alone, and without it: the Hub")  # fmt: skip
    parser.add_argument("--tasks", nargs="+", help=f"benchmarks, of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--own-only", action="store_true", help="held-out text and own tasks, no benchmarks")
    parser.add_argument("--contamination", action="store_true",
                        help="look for the items in the training text, and score the clean ones apart")  # fmt: skip
    parser.add_argument("--out", type=Path, help="JSON file; default: runs/<run>/eval/<checkpoint>.json")
    parser.add_argument("--limit", type=int, help="only the first so many items of each task, for a quick look")
    parser.add_argument(
        "--batch-tokens", type=int, default=8192, help="positions a forward pass (default %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, help="of the benchmarks: texts a pass (default: as suits the model)")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the benchmarks; default: float32 on a CPU, bfloat16 on a GPU"
    )
    parser.add_argument("--size", help="refuse a model that is not of this size, such as 1.3B")
    parser.add_argument("--device", help="torch device (default: this process's GPU, else cpu)")
    flags = parser.parse_args(argv)
    try:
        run(flags)
    except (FileNotFoundError, ValueError) as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    run_command(main, "run the same command again; the benchmarks' answers so far are kept")
