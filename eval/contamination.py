"""Which items of the benchmarks are in the text that a model was trained on?

    python -m eval.contamination data/local data/evals --out contamination.json

Goes through every document of the training split once and looks for each item in two ways, over the words that the
curation's decontamination makes of text (letters and digits, lower case, without accents). First, any run of WORDS of
the item's words, as GPT-3's authors did: of its question with the right answer, or with the choices, and of its
passage; where these are shorter, the whole of them, so that an item of few words counts as found wherever its sentence
stands. Runs that more than MAX_ITEMS items have in common do not count. Second, by the curation's index, which weighs
shorter runs by their rarity and so finds a question that is followed by its answer in other words. An item that is
found in either way is contaminated. What neither can look for is counted as too short, and not as clean.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from string import ascii_lowercase

import numpy as np
from tqdm import tqdm

from curation.decontaminate import (
    BENCHMARKS,
    MIN_EVIDENCE,
    OTHER,
    RATIO,
    Index,
    benchmark_of,
    build_index,
    chunks,
    make_item,
    read_rows,
    split_words,
    words_of,
)
from curation.dedup import mixed
from curation.shards import manifest_sha256, open_shard, read_manifest
from curation.tokenizer import load_tokenizer
from eval.command import check_out, run_command
from eval.task_data import BENCHMARKS as TASK_FILES
from eval.task_data import check_names, definitions, file_name, subject
from train.run_dir import write_json

FORMAT = 1
WORDS = 13  # Brown et al. 2020, appendix C
FEWEST = 3  # words of a question with its answer; they used 8, and so could not tell of shorter items
MAX_ITEMS = 16  # a run that more items have is the form of a question; ten of MMLU may share a passage
SMALL = 5_000_000  # tokens, which take less time than starting a process
BITS = 27  # 16 MiB say of nearly every run of the training text that no item has it


@dataclass(frozen=True, kw_only=True)
class Question:
    """An item, and how a model's samples name it."""

    task: str
    group: str | None
    doc_id: int
    item: object  # curation.decontaminate.Item


def benchmark_files(folder, tasks=None):
    """{(task, group): path} of the items that are scored, in a folder as `make eval-data` makes it."""
    files = {}
    for task in check_names(tasks):
        split = TASK_FILES[task]["splits"][-1]
        for definition in definitions(task):
            path = Path(folder) / file_name(task, definition, split)
            if not path.is_file():
                raise FileNotFoundError(
                    f"{task} needs {path}, which is not there; `make eval-data` makes such a folder"
                )
            files[task, subject(task, definition)] = path
    return files


def read_questions(files):
    """[Question] of {(task, group): path of its file}; the place of a row in its file is its doc_id."""
    questions = []
    for (task, group), path in files.items():
        benchmark = benchmark_of(("", task))
        columns = BENCHMARKS.get(benchmark, OTHER)
        for number, row in enumerate(read_rows(path)):
            item = make_item(benchmark, columns, path.name, len(questions), row)
            questions.append(Question(task=task, group=group, doc_id=number, item=item))
            if not (item.stems or item.passages):
                raise ValueError(f"{path}, row {number}: no text of {benchmark} in the columns that it has")
    return questions


# ---- runs of words


def word_sequences(item):
    """The words (hashes) of an item in each order in which it may stand in a text."""
    sequences = [words_of(passage) for passage in item.passages]
    if item.stems:
        stem = words_of(item.stems[-1])
        listed = "\n".join(f"{letter} {choice}" for letter, choice in zip(ascii_lowercase, item.choices, strict=False))
        tails = dict.fromkeys((item.answer, "\n".join(item.choices), listed))
        sequences += [np.concatenate([stem, words_of(tail)]) for tail in tails if tail or not any(tails)]
    return sequences


def run_hashes(words, lengths):
    """{n: hashes (m - n + 1,) of the runs of n words} for the n of `lengths` that fit; words (m,) uint64."""
    found, keys = {}, words
    for n in range(1, min(max(lengths, default=0), len(words)) + 1):
        if n > 1:
            keys = keys[:-1] * np.uint64(RATIO) + words[n - 1 :]
        if n in lengths:
            found[n] = mixed(keys.copy())
    return found


@dataclass(frozen=True, kw_only=True)
class RunTable:
    """The runs of all items, by their length n."""

    keys: dict  # {n: (k,) uint64, sorted}
    owned: dict  # {n: (m, 2) int64: the place of a key, the number of an item that has it}
    bits: np.ndarray  # (2**BITS / 8,) uint8: says quickly of most runs that they are none of these

    def find(self, text):
        """{n: the places of the keys that are in a text}."""
        found = {}
        for _, chunk in chunks(text):
            for n, runs in run_hashes(split_words(chunk).hashes, self.keys.keys()).items():
                at = runs & np.uint64((1 << BITS) - 1)
                maybe = runs[(self.bits[at >> np.uint64(3)] >> (at & np.uint64(7)).astype(np.uint8)) & 1 > 0]
                places = np.minimum(np.searchsorted(self.keys[n], maybe), len(self.keys[n]) - 1)
                if len(places := places[self.keys[n][places] == maybe]):
                    found.setdefault(n, []).append(places)
        return {n: np.unique(np.concatenate(places)) for n, places in found.items()}

    def overlaps(self, found, n_items):
        """The share of each item's runs that were found, (n_items,), NaN where it has none; found {n: (k,) bool}."""
        hits, runs = np.zeros(n_items), np.zeros(n_items)
        for n, owned in self.owned.items():
            runs += np.bincount(owned[:, 1], minlength=n_items)
            hits += np.bincount(owned[:, 1], found[n][owned[:, 0]], minlength=n_items)
        return np.divide(hits, runs, out=np.full(n_items, np.nan), where=runs > 0)


def make_table(items):
    """The RunTable of the items: runs of WORDS words, and sequences of fewer, down to FEWEST, as a whole."""
    parts = {}
    for number, item in enumerate(items):
        for words in word_sequences(item):
            n = min(WORDS, len(words))
            if n >= FEWEST:
                parts.setdefault(n, []).append((run_hashes(words, {n})[n], number))
    keys, owned = {}, {}
    bits = np.zeros((1 << BITS) // 8, np.uint8)
    for n, runs in sorted(parts.items()):
        hashes = np.concatenate([part for part, _ in runs])
        owners = np.repeat([number for _, number in runs], [len(part) for part, _ in runs])
        distinct, places = np.unique(hashes, return_inverse=True)
        pairs = np.unique(np.stack([places, owners], axis=1), axis=0)
        # what many items have in common is a form, such as "For which of these two scenarios does the main character"
        special = np.bincount(pairs[:, 0]) <= MAX_ITEMS
        pairs = pairs[special[pairs[:, 0]]]
        keys[n] = distinct[special]
        owned[n] = np.stack([(np.cumsum(special) - 1)[pairs[:, 0]], pairs[:, 1]], axis=1)
        at = keys[n] & np.uint64((1 << BITS) - 1)
        np.bitwise_or.at(bits, at >> np.uint64(3), np.left_shift(1, at & np.uint64(7)).astype(np.uint8))
    return RunTable(keys=keys, owned=owned, bits=bits)


# ---- the training text


STATE = {}  # of a worker process


def start_worker(table, index, tokenizer):
    STATE.update(table=table, index=Index(index), tokenizer=load_tokenizer(tokenizer))


def search_shard(path):
    """What one shard holds: ({n: places of keys}, {number of an item: (evidence, document, matched text)})."""
    shard = open_shard(path)
    ends = np.append(shard.starts[1:], len(shard.tokens)).astype(np.int64)
    keys, matches = {}, {}
    for document, (start, end) in enumerate(zip(shard.starts.astype(np.int64).tolist(), ends.tolist(), strict=True)):
        text = STATE["tokenizer"].decode(shard.tokens[start + 1 : end].tolist())
        for n, places in STATE["table"].find(text).items():
            keys.setdefault(n, []).append(places)
        for match in STATE["index"].find(text, MIN_EVIDENCE):
            number = int(match.item.rpartition(":")[2])
            if number not in matches or match.evidence > matches[number][0]:
                matches[number] = (match.evidence, document, text[match.start : match.stop][:500])
    return {n: np.unique(np.concatenate(places)) for n, places in keys.items()}, matches


def search(data, items, workers=None):
    """(overlap of each item (items,), {number of an item: (evidence, shard, document, text)}, {numbers in the index}).

    workers: processes; default: one a core, or one where the text is small.
    """
    data = Path(data)
    manifest = read_manifest(data)
    sources = manifest["splits"]["train"]["sources"]
    shards = [name for source in sorted(sources) for name in sources[source]["shards"]]
    table = make_table(items)
    found = {n: np.zeros(len(keys), bool) for n, keys in table.keys.items()}
    matches = {}
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder) / "items.index"
        build_index(items, index)
        given = (table, index, data / manifest["tokenizer"]["file"])
        is_small = manifest["splits"]["train"]["tokens"] < SMALL
        workers = min(workers or (1 if is_small else len(os.sched_getaffinity(0))), len(shards))
        pool = None
        if workers > 1:
            spawn = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=start_worker, initargs=given)
        else:
            start_worker(*given)
        try:
            answers = (pool.map if pool else map)(search_shard, [data / name for name in shards])
            bar = tqdm(answers, total=len(shards), desc="searching the training text", unit="shard", disable=None)
            for name, (keys, in_shard) in zip(shards, bar, strict=True):
                for n, places in keys.items():
                    found[n][places] = True
                for number, (evidence, document, text) in in_shard.items():
                    if number not in matches or evidence > matches[number][0]:
                        matches[number] = (evidence, name, document, text)
        finally:
            STATE.clear()
            if pool:
                pool.shutdown(cancel_futures=True)
        indexed = set(Index(index).arrays["unit_items"].tolist())
    return table.overlaps(found, len(items)), matches, indexed


def check_contamination(data, files, workers=None):
    """The report on which items of `files` ({(task, group): path}) are in the training split of a data folder.

    {"format", "data", "words", "tasks": {task: {"items", "contaminated", "too_short"}}, "items": {task: [...]}}; items
    are those that are not clean, each with group, doc_id, overlap (share of its runs that were found), evidence (nats,
    null without) and, of the surest match, shard, document and matched text.
    """
    questions = read_questions(files)
    overlaps, matches, indexed = search(data, [question.item for question in questions], workers)
    tasks, unclean, first = {}, {}, {}
    for place, (question, overlap) in enumerate(zip(questions, overlaps.tolist(), strict=True)):
        item = question.item
        # the index knows the same text once, whatever items have it
        number = first.setdefault((item.stems, item.answer, item.choices, item.passages), place)
        counts = tasks.setdefault(question.task, {"items": 0, "contaminated": 0, "too_short": 0})
        counts["items"] += 1
        evidence, shard, document, text = matches.get(number, (None, None, None, None))
        too_short = isnan(overlap) and number not in indexed
        contaminated = overlap > 0 or evidence is not None
        counts["contaminated"] += contaminated
        counts["too_short"] += too_short and not contaminated
        if contaminated or too_short:
            unclean.setdefault(question.task, []).append({
                "group": question.group, "doc_id": question.doc_id, "contaminated": contaminated,
                "overlap": None if isnan(overlap) else overlap,
                "evidence": evidence, "shard": shard, "document": document, "matched": text,
            })  # fmt: skip
    described = {"path": str(data), "manifest_sha256": manifest_sha256(data)}
    return {"format": FORMAT, "data": described, "words": WORDS, "fewest": FEWEST, "tasks": tasks, "items": unclean}


def unclean_items(report, task):
    """{(group, doc_id)} of a task's items that are contaminated or too short to tell."""
    return {(item["group"], item["doc_id"]) for item in report["items"].get(task, [])}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m eval.contamination", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("data", type=Path, help="the data folder that the model was trained on")
    parser.add_argument(
        "benchmarks", type=Path, help="the folder of the benchmarks' files that `make eval-data` makes"
    )
    parser.add_argument("--tasks", nargs="+", help="benchmarks; default: all")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--workers", type=int, help="processes; default: one a core, or one for little text")
    flags = parser.parse_args(argv)
    try:
        check_out(flags.out)
        report = check_contamination(flags.data, benchmark_files(flags.benchmarks, flags.tasks), flags.workers)
        write_json(flags.out, report)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for task, counts in report["tasks"].items():
        share = counts["contaminated"] / counts["items"]
        found = f"{counts['contaminated']:>6,} of {counts['items']:>6,} items ({share:.2%}) are in the training text"
        print(f"{task:<16} {found}; {counts['too_short']:,} too short to tell")
    print(f"written to {flags.out}")
    return 0


if __name__ == "__main__":
    run_command(main)
