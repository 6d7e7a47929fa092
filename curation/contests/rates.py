"""How much text each step does in a CPU second on this machine: the numbers that plan.py holds as RATES.

    python -m curation.contests.rates --corpus ../shared/data/corpus

The texts of each kind are those of the corpus folder that is most like it. One core: MB of text per CPU second, MB of
files for `tables`, `gather` and `hash`.
"""

import argparse
import gzip
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from curation.contests.tokenizer import train_json
from curation.decontaminate import Decontaminate, Item, build_index
from curation.dedup import fingerprint, sketch
from curation.quality import Quality, train_model
from curation.readers import read_piece
from curation.recipe import RECIPES, MinHash
from curation.shards import ShardHeader, file_sha256, id_hash, write_shard
from curation.sources import LOCAL, MB, OWN, Piece, choose_files, list_files, make_pieces
from curation.steps import read_packed
from curation.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

FOLDERS = {
    "clean_web": ("web_edu",), "web": ("web_general",), "long": ("books", "science"), "wiki": ("wiki",), "qa": ("qa",),
    "code": ("code",), "math": ("math",), "prose": ("web_edu",), "questions": ("qa",), "synthetic": ("web_edu",),
    "own": ("web_general",),
}  # fmt: skip
SAMPLE_MB = 8.0  # of text of each kind
TRAINING_MB = 8.0  # of text that the tokenizer is trained on
ROUNDS = 3  # of each step

Rows = list[dict[str, Any]]


def rows_of(corpus: Path, folders: Iterable[str], megabytes: float) -> Rows:
    """Documents of these folders of the corpus, evenly from all files, of about so much text."""
    found = []
    for path in sorted(path for folder in folders for path in (corpus / folder).glob("*.jsonl.zst")):
        with zstandard.open(path, "rt", encoding="utf-8") as lines:
            found += [json.loads(line) for line in lines]
    total = sum(len(row["text"].encode()) for row in found) / MB
    return found[:: max(round(total / megabytes), 1)]


def megabytes_of(rows: Rows) -> float:
    return sum(len(row["text"].encode()) for row in rows) / MB


def rate(n_mb: float, work: Callable[[], Any]) -> float:
    """MB per CPU second of this process, all its threads."""
    start = time.process_time()
    work()
    return n_mb / (time.process_time() - start)


def fresh_rate(rows: Rows, work: Callable[[Rows], Any]) -> float:
    """The same, the median of some runs, each on texts that the step has not met; the first only fills its caches."""
    parts = [rows[i :: ROUNDS + 1] for i in range(ROUNDS + 1)]
    return median([rate(megabytes_of(part), partial(work, part)) for part in parts][1:])


def asked(rules: Iterable[Any], rows: Rows) -> None:
    """As ApplyRules does: the first rule that is broken ends it."""
    for row in rows:
        text, metadata = row["text"], {"url": row.get("url") or ""}
        for rule in rules:
            if hasattr(rule, "rewrite"):
                text = rule.rewrite(text, metadata)
            elif rule.check(text, metadata):
                break


def reading(folder: Path, rows: Rows) -> dict[str, float]:
    plain = [{"id": row["id"], "text": row["text"], "url": row.get("url") or ""} for row in rows]
    data = b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in plain)
    table = pa.Table.from_pylist(plain)
    rates = {}
    for name in ("parquet", "jsonl", "jsonl.gz", "jsonl.zst"):
        path = folder / name / f"a.{name}"
        path.parent.mkdir()
        if name == "parquet":
            pq.write_table(table, path, row_group_size=1000, compression="zstd")
        else:
            pack: Any = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress}[name]
            path.write_bytes(pack(data))
        pieces = make_pieces(OWN, list_files(replace(OWN, folder=str(path.parent))), 64 * MB)
        rates[f"read .{name}"] = rate(megabytes_of(rows), partial(read_all, pieces))
    return rates


def read_all(pieces: Iterable[Piece]) -> int:
    return sum(len(raw.text) for piece in pieces for raw in read_piece(OWN, piece))


def extracting() -> dict[str, float]:
    """Text of what this machine has: docstrings, manuals, pages of documentation."""
    sources = [replace(source, budget_mb=0.5) for source in LOCAL]
    pieces = [(s, piece) for s in sources for piece in make_pieces(s, choose_files(s, list_files(s)), MB)]
    start = time.process_time()
    n_bytes = sum(len(raw.text.encode()) for source, piece in pieces for raw in read_piece(source, piece))
    return {"extract": n_bytes / MB / (time.process_time() - start)}


def judging(folder: Path, corpus: Path, rows: Rows) -> dict[str, float]:
    """The rules of each kind, and the two rules that need a file."""
    rates = {}
    for kind, rules in dict(chain.from_iterable(recipe.rules.items() for recipe in RECIPES.values())).items():
        own = rows_of(corpus, FOLDERS[kind], SAMPLE_MB)
        rates[f"rules of {kind}"] = fresh_rate(own, partial(asked, rules))
    items = [
        Item(benchmark="corpus", file="", row=i, stems=(row["text"][:300],))
        for i, row in enumerate(rows_of(corpus, FOLDERS["own"], SAMPLE_MB))
    ]
    build_index(items, folder / "evals.index")
    texts = [row["text"] for row in rows]
    train_model(texts, np.arange(len(texts)) % 2, 0.1, folder / "quality.npz")
    for name, rule in (
        ("decontaminate", Decontaminate(index_file=str(folder / "evals.index"))),
        ("quality", Quality(model_file=str(folder / "quality.npz"))),
    ):
        rates[name] = fresh_rate(rows, partial(asked, (rule,)))
    return rates


def writing(folder: Path, rows: Rows) -> dict[str, float]:
    n_mb, m = megabytes_of(rows), MinHash()
    path = folder / "documents.jsonl.zst"

    def prints(rows: Rows) -> None:
        for row in rows:
            id_hash(row["id"])
            fingerprint(row["text"], m.ngram_words, m.bands, m.rows)
            sketch(row["text"], m.ngram_words, m.bands, m.rows)

    def pack(rows: Rows) -> None:
        with zstandard.open(path, "wb") as file:
            for row in rows:
                record = {"id": row["id"], "text": row["text"]}
                file.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))

    rates = {"fingerprint": fresh_rate(rows, prints), "pack": fresh_rate(rows, pack)}
    pack(rows)
    rates["unpack"] = rate(n_mb, lambda: sum(1 for _ in read_packed(path)))
    print(f"  documents.jsonl.zst has {path.stat().st_size / n_mb / MB:.3f} bytes for a byte of text", file=sys.stderr)
    return rates


def tokenizing(folder: Path, corpus: Path, rows: Rows) -> dict[str, float]:
    texts = [row["text"] for row in rows]
    training = texts[:: max(round(megabytes_of(rows) / TRAINING_MB), 1)]
    n_mb = sum(len(text.encode()) for text in training) / MB
    path = folder / "tokenizer.model"
    rates = {"train tokenizer": rate(n_mb, lambda: train_tokenizer(training, 16_384, path))}
    train_json(corpus, "49k BPE as SmolLM's", folder / "tokenizer.json")
    for name in ("tokenizer.model", "tokenizer.json"):
        tokenizer = load_tokenizer(folder / name)
        rates[f"tokenize by a {name}"] = fresh_rate(rows, partial(encode_all, tokenizer))
    return rates


def encode_all(tokenizer: Tokenizer, rows: Rows) -> int:
    return sum(len(tokenizer.encode_array(row["text"])) for row in rows)


def gathering(folder: Path) -> dict[str, float]:
    """A shard of documents that lie anywhere in a file of tokens; what is written is measured."""
    random = np.random.default_rng(0)
    lengths = random.integers(200, 1800, 8000)
    ends = np.cumsum(lengths)
    tokens = random.integers(1, 50_000, int(ends[-1])).astype(np.uint16)
    tokens[ends - lengths] = 0
    tokens.tofile(folder / "tokens.bin")
    mapped = np.memmap(folder / "tokens.bin", np.uint16, "r").view(np.ndarray)
    header = ShardHeader(source="a", split="train", vocab_size=50_304, separator_id=0, tokenizer_sha256="")
    order = random.permutation(len(lengths))
    ids = random.integers(0, 1 << 63, (len(lengths), 2)).astype(np.uint64)
    parts = [(int(ends[i] - lengths[i]), int(ends[i])) for i in order]

    def write() -> None:
        gathered, n = np.empty(len(tokens), np.uint16), 0
        for start, stop in parts:
            gathered[n : n + stop - start] = mapped[start:stop]
            n += stop - start
        write_shard(folder / "shard", header, ids, lengths[order], np.array_split(gathered, 8))

    rates = {"gather": rate(tokens.nbytes / MB, write)}
    np.save(folder / "table.npy", np.sort(random.integers(0, 1 << 63, (7, 20_000)).astype(np.uint64)))

    def look() -> None:
        for _ in range(20):
            columns = np.load(folder / "table.npy", mmap_mode="r").view(np.ndarray)
            first = np.searchsorted(columns[1], np.uint64(1 << 62))
            columns[:, first : first + 10].sum()

    rates["tables"] = rate(20 * 7 * 8 * 20_000 / MB, look)
    rates["hash"] = rate(20 * tokens.nbytes / MB, lambda: [file_sha256(folder / "tokens.bin") for _ in range(20)])
    return rates


def measure_rates(corpus: Path) -> dict[str, float]:
    rows = [row for folders in set(FOLDERS.values()) for row in rows_of(corpus, folders, SAMPLE_MB / 3)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        return {
            **reading(folder, rows),
            **extracting(),
            **judging(folder, corpus, rows),
            **writing(folder, rows),
            **tokenizing(folder, corpus, rows),
            **gathering(folder),
        }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m curation.contests.rates", allow_abbrev=False)
    parser.add_argument("--corpus", type=Path, required=True, metavar="DIR")
    flags = parser.parse_args(argv)
    if not list(flags.corpus.glob("*/*.jsonl.zst")):
        print(f"error: --corpus {flags.corpus} has no <kind>/*.jsonl.zst in it", file=sys.stderr)
        return 2
    for name, value in measure_rates(flags.corpus).items():
        print(f"    {json.dumps(name)}: {value:.3g},")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
