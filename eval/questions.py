"""A few questions of each benchmark, as token ids, for a run to ask while it trains (train/quiz.py starts this):

    python -m eval.questions --data data/evals --tokenizer data/local --seq-len 2048 --out questions.json

The questions of a benchmark are drawn by a seed of their own: the same wherever and whenever this runs.
"""

import argparse
import hashlib
import json
import logging
import random
import sys
from pathlib import Path

import datasets

from curation.shards import new_file
from curation.tokenizer import load_tokenizer
from eval.command import check_out, run_command
from eval.harness import SEED, ask_items
from eval.models import OwnText
from eval.task_data import BENCHMARKS, check_names, check_pins, load_tasks
from model.scorer import Scorer

FORMAT = 1


def make_questions(names, n_items, *, data, tokenizer, seq_len):
    """{"tasks": {name: {"metrics", "of", "chance", "items"}}, "sha256" of that, ...} of n_items of each benchmark.

    An item: group, doc_id, gold, choices (None: a word), dropped_shots, texts, alone (after "Answer:" alone). A text
    is [ids, how many of the last ones are scored]. data: a folder, None: the Hub.
    """
    tasks = {name: questions_of(name, n_items, data, OwnText(tokenizer, seq_len)) for name in names}
    return {
        "format": FORMAT,
        "settings": {
            "data": None if data is None else str(data), "items": n_items, "seq_len": seq_len,
            "tokenizer_sha256": tokenizer.sha256,
        },
        "prefix_id": tokenizer.separator_id,
        "sha256": hashlib.sha256(json.dumps(tasks).encode()).hexdigest(),
        "tasks": tasks,
    }  # fmt: skip


def questions_of(name, n_items, data, text):
    scorer, tasks = Scorer(text, batch_size=1), load_tasks(name, data)
    every = [(group, doc_id) for group, task in tasks for doc_id in range(len(task.eval_docs))]
    chosen = set(random.Random(f"{SEED} {name}").sample(every, min(n_items, len(every))))
    items = []
    for item in ask_items(name, scorer, tasks, chosen=chosen):
        texts, alone = scorer.pieces(item.requests), scorer.pieces(item.unconditional)
        if any(len(windows) > 1 for windows in texts + alone):
            continue  # a choice longer than what the model reads at once
        items.append({
            "group": item.group, "doc_id": item.doc_id, "gold": item.gold if item.choices else None,
            "choices": item.choices, "dropped_shots": item.dropped_shots,
            "texts": [whole(*windows) for windows in texts], "alone": [whole(*windows) for windows in alone],
        })  # fmt: skip
    if not items:
        raise ValueError(f"{name} has no question whose choices fit into {text.seq_len} tokens; leave it out")
    chance = sum(1 / len(item["choices"]) if item["choices"] else 0 for item in items) / len(items)
    return {"metrics": BENCHMARKS[name]["metrics"], "of": len(every), "chance": chance, "items": items}


def whole(piece):
    """[ids, how many of the last ones are scored]"""
    inputs, targets = piece
    return [inputs + targets[-1:], len(targets)]


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m eval.questions", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", help="folder of the tasks' files (make eval-data); default: the Hub")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a tokenizer file, or the folder that holds it")
    parser.add_argument("--seq-len", type=int, required=True, help="tokens that the model reads at most")
    parser.add_argument("--tasks", nargs="+", help="default: all that need no writing")
    parser.add_argument("--items", type=int, default=100, help="questions of each (default %(default)s)")
    parser.add_argument("--out", type=Path, required=True)
    flags = parser.parse_args(argv)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        names = check_names(flags.tasks or [name for name in BENCHMARKS if not BENCHMARKS[name].get("written")])
        if written := [name for name in names if BENCHMARKS[name].get("written")]:
            raise ValueError(f"{written[0]} is written, not scored, which takes too long in training; leave it out")
        if flags.items < 1:
            raise ValueError(f"--items {flags.items} is too small; allowed: 1 or more")
        check_out(flags.out)
        if flags.data is not None:
            check_pins(flags.data, names)
        tokenizer = load_tokenizer(flags.tokenizer)
        questions = make_questions(names, flags.items, data=flags.data, tokenizer=tokenizer, seq_len=flags.seq_len)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with new_file(flags.out) as file:
        file.write(json.dumps(questions, separators=(",", ":")).encode())
    return 0


if __name__ == "__main__":
    run_command(main)
