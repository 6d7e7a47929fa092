"""The datatrove steps of the pipeline. What they do is elsewhere (readers, filters, dedup, heldout, shards).

Each step does one task of a plan (work.py): rank r of the executor is task r. The steps run under any datatrove
executor; the first step of a pipeline reads the plan, the last one makes the task's folder appear whole.
"""

import functools
import gzip
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import zstandard
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.readers.base import BaseReader

from curation.dedup import fingerprint, rank, similarities, sketch, survivors
from curation.heldout import choose_heldout, continuation_items, last_word_items
from curation.mixture import HIGHEST, cut, plan_mixture, settle
from curation.quality import Quality
from curation.readers import read_piece
from curation.recipe import MinHash
from curation.shards import SHARD, ShardHeader, file_entry, id_hash, token_dtype, write_shard
from curation.sources import Source, piece_of
from curation.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from curation.work import Progress, Task, committed, planned, read_attempts, task_folder

Documents = Iterator[Document]

BATCH_ROWS = 1000  # read at once
EXAMPLES = 3  # of what each rule dropped in a piece
EXAMPLE_CHARACTERS = 500
SCORES = ("language_score", "quality")  # metadata whose histograms are kept, between 0 and 1
SCORE_BINS = 20
CHUNK_TOKENS = 1 << 20  # written at once
POISONOUS = "poisonous"  # the rule that drops documents that killed or broke a worker twice

# What becomes of a document that passed its rules.
TRAIN, HELDOUT, EXACT, NEAR = range(4)
FATES = ("train", "heldout", "exact_duplicate", "near_duplicate")


# ---- files of a task


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    with open(path, "wb") as file:
        file.writelines(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE) for record in records)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file:
        yield from map(orjson.loads, file)


def read_packed(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a .jsonl.zst, a few at a time in memory."""
    with zstandard.open(path, "rb") as stream, io.BufferedReader(stream) as file:
        yield from map(orjson.loads, file)


def add_counts(entry: dict[str, Any], counts: Mapping[str, Any]) -> None:
    for name in ("documents", "text_bytes"):
        entry[name] += counts[name]


def write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, sort_keys=True))


def read_json(path: Path) -> Any:
    return json.loads(path.read_bytes())


# ---- stage "read": from files to documents that passed the rules of their kind


class Ledger:
    """What came in from one piece, what each rule dropped, and what is left. One for all steps of a pipeline."""

    def __init__(self, keep_dropped: bool):
        self.keep_dropped = keep_dropped
        self.dropped_file: Any = None  # takes a line for each document that is dropped, where they are kept
        self.begin()

    def begin(self) -> None:
        self.documents_in = self.text_bytes_in = 0
        self.dropped: dict[str, dict[str, Any]] = {}
        self.kept = {"documents": 0, "text_bytes": 0}
        self.benchmarks: Counter[str] = Counter()  # of the evaluation items that were found
        self.lengths: Counter[int] = Counter()
        self.scores: dict[str, list[int]] = {}

    def drop(self, document: Document, rule: str, evidence: Any = None) -> None:
        entry = self.dropped.setdefault(rule, {"documents": 0, "text_bytes": 0, "examples": []})
        entry["documents"] += 1
        entry["text_bytes"] += document.metadata["text_bytes"]
        record = {"id": document.id, "rule": rule} | ({"evidence": evidence} if evidence else {})
        if isinstance(evidence, dict) and "benchmark" in evidence:
            self.benchmarks[evidence["benchmark"]] += 1
        if len(entry["examples"]) < EXAMPLES:
            entry["examples"].append({**record, "text": document.text[:EXAMPLE_CHARACTERS]})
        if self.dropped_file is not None:
            line = {**record, "text": document.text}
            self.dropped_file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))

    def keep(self, document: Document) -> None:
        self.kept["documents"] += 1
        self.kept["text_bytes"] += len(document.text.encode())
        self.lengths[len(document.text).bit_length()] += 1
        for name in SCORES:
            score = document.metadata.get(name)
            if isinstance(score, int | float):
                bins = self.scores.setdefault(name, [0] * SCORE_BINS)
                bins[min(max(int(score * SCORE_BINS), 0), SCORE_BINS - 1)] += 1

    def values(self, source: str, piece: str) -> dict[str, Any]:
        dropped = sum(entry["documents"] for entry in self.dropped.values())
        if self.documents_in != dropped + self.kept["documents"]:
            raise RuntimeError(f"{piece}: {self.documents_in} documents in, {dropped} + {self.kept['documents']} out")
        return {
            "source": source,
            "piece": piece,
            "documents_in": self.documents_in,
            "text_bytes_in": self.text_bytes_in,
            "dropped": self.dropped,
            "kept": self.kept,
            "benchmarks": dict(sorted(self.benchmarks.items())),
            "length_histogram": {str(bits): n for bits, n in sorted(self.lengths.items())},
            "scores": self.scores,
        }

    # datatrove's own filters hand what they drop to a writer

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *exception: Any) -> None:
        pass

    def write(self, document: Document, rank: int = 0, **_: Any) -> None:
        self.drop(document, str(document.metadata.get("filter_reason") or "stock_filter"))


class PieceReader(BaseReader):
    """Reads the documents of one piece; those that could not be read as meant are dropped here, by their problem."""

    name = "documents of a piece"

    def __init__(self, source: Source, work: Path, plan: Path, ledger: Ledger):
        super().__init__()
        self.source = source
        self.work = work
        self.plan = plan
        self.ledger = ledger

    def run(self, data: Documents | None = None, rank: int = 0, world_size: int = 1) -> Documents:
        task = planned(self.plan, rank, world_size)
        attempts = read_attempts(self.work, task.key)
        self.ledger.begin()
        progress = Progress()
        piece = piece_of(task.values["piece"])
        for raw in read_piece(self.source, piece, attempts.smaller(BATCH_ROWS)):
            if raw.problem == "network":  # nothing is wrong with the input: the piece is read again later
                raise ConnectionError(
                    f"{task.values['name']} could not be read: the network or the Hub did not answer"
                )
            n_bytes = len(raw.text.encode())
            self.ledger.documents_in += 1
            self.ledger.text_bytes_in += n_bytes
            self.stat_update("documents")
            self.stat_update("text_bytes", value=n_bytes)
            document = Document(text=raw.text, id=raw.id, metadata={**raw.metadata, "text_bytes": n_bytes})
            if problem := raw.problem or (POISONOUS if raw.id in attempts.quarantined else None):
                self.ledger.drop(document, problem)
                continue
            progress.at(raw.id, n_bytes)
            yield document
            progress.done()  # what happens while the next one is read is not this one's fault


class ApplyRules(PipelineStep):
    """Asks the rules of filters.py one after the other; the first that is broken drops the document by its name.

    A rule that breaks on a document is tried once more; then the document is dropped as poisonous.
    """

    type = "filter"
    name = "rules"

    def __init__(self, rules: Sequence[Any], ledger: Ledger):
        super().__init__()
        self.rules = tuple(rules)
        self.ledger = ledger

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> Documents:
        for document in data:
            try:
                broken = self.apply(document)
            except Exception:
                try:
                    broken = self.apply(document)
                except Exception as error:
                    broken = POISONOUS, f"{type(error).__name__}: {error}"
            if broken is None:
                yield document
            else:
                self.ledger.drop(document, *broken)

    def apply(self, document: Document) -> tuple[str, Any] | None:
        """The broken rule and its evidence, or None; rewrites the text on the way."""
        for rule in self.rules:
            if hasattr(rule, "rewrite"):
                document.text = rule.rewrite(document.text, document.metadata)
                if not document.text:
                    return "empty", None
                continue
            if isinstance(rule, Quality):
                document.metadata["quality"] = rule.score(document.text)
            if broken := rule.check(document.text, document.metadata):
                return broken, rule.explain(document.text) if hasattr(rule, "explain") else None
        return None


class PieceWriter(PipelineStep):
    """Writes documents, their fingerprints and the ledger of one piece.

    documents.jsonl.zst   id and text
    fingerprints.npz      ids (n, 2), digests (n, 2), sketches (n, 2) uint64; sizes (n,) bytes of text
    keys.npy              (bands, n) uint64, by themselves: one band of all pieces is read at a time
    dropped.jsonl.zst     what was dropped, if the recipe keeps it
    ledger.json
    """

    type = "writer"
    name = "piece"

    def __init__(self, work: Path, plan: Path, minhash: MinHash, ledger: Ledger):
        super().__init__()
        self.work = work
        self.plan = plan
        self.minhash = minhash
        self.ledger = ledger

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> None:
        task = planned(self.plan, rank, world_size)
        m = self.minhash
        ids, digests, keys, sketches, sizes = [], [], [], [], []
        with committed(task_folder(self.work, "read", task.key)) as folder:
            with ExitStack() as stack:
                file = stack.enter_context(zstandard.open(folder / "documents.jsonl.zst", "wb"))
                if self.ledger.keep_dropped:
                    dropped = zstandard.open(folder / "dropped.jsonl.zst", "wb")
                    self.ledger.dropped_file = stack.enter_context(dropped)
                for document in data:
                    digest, bands = fingerprint(document.text, m.ngram_words, m.bands, m.rows)
                    ids.append(id_hash(document.id))
                    digests.append(digest)
                    keys.append(bands)
                    sketches.append(sketch(document.text, m.ngram_words, m.bands, m.rows))
                    sizes.append(len(document.text.encode()))
                    self.ledger.keep(document)
                    record = {"id": document.id, "text": document.text}
                    file.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
            np.savez(
                folder / "fingerprints.npz",
                ids=np.array(ids, np.uint64).reshape(-1, 2),
                digests=np.array(digests, np.uint64).reshape(-1, 2),
                sketches=np.array(sketches, np.uint64).reshape(-1, 2),
                sizes=np.array(sizes, np.int64),
            )
            np.save(folder / "keys.npy", np.ascontiguousarray(np.array(keys, np.uint64).reshape(-1, m.bands).T))
            self.ledger.dropped_file = None
            source = task.values["piece"]["source"]
            write_json(folder / "ledger.json", self.ledger.values(source, task.values["name"]))


# ---- stage "duplicates": what becomes of each document


class DecideFates(PipelineStep):
    """Finds the duplicates among all pieces and holds out a part of the rest.

    Writes for each piece <key>.npz with fates (n,) uint8 and, for duplicates, stays (n, 2), the hash of the id of the
    document that stays; and summary.json. Pieces are named by the keys of their read tasks.
    """

    type = "dedup"
    name = "duplicates and held-out split"

    def __init__(
        self,
        work: Path,
        plan: Path,
        minhash: MinHash,
        across: bool,
        heldout_percent: float,
        min_heldout: int,
        sources: Sequence[str],
    ):
        super().__init__()
        self.work = work
        self.plan = plan
        self.minhash = minhash
        self.across = across
        self.heldout_percent = heldout_percent
        self.min_heldout = min_heldout
        self.sources = tuple(sources)

    def run(self, data: Documents | None = None, rank: int = 0, world_size: int = 1) -> None:
        task = planned(self.plan, rank, world_size)
        with committed(task_folder(self.work, "duplicates", task.key)) as folder:
            self.decide(task, folder)

    def decide(self, task: Task, folder: Path) -> None:
        pieces: list[tuple[str, str]] = [tuple(piece) for piece in task.values["pieces"]]  # (source, read key)
        ids, digests, sketches, sizes = (
            np.concatenate([read_prints(self.work, key, name) for _, key in pieces])
            for name in ("ids", "digests", "sketches", "sizes")
        )
        counts = [len(read_prints(self.work, key, "sizes")) for _, key in pieces]
        of_source = np.repeat([self.sources.index(source) for source, _ in pieces], counts)
        exact, stays = self.survivors(task, folder, of_source, digests, sketches, ranks(of_source, ids, digests))

        here = np.arange(len(ids))
        fates = np.where(exact != here, EXACT, np.where(stays != here, NEAR, TRAIN)).astype(np.uint8)
        for number in range(len(self.sources)):
            left = np.flatnonzero((of_source == number) & (fates == TRAIN))
            chosen = choose_heldout(digests[left, 0], self.heldout_percent, self.min_heldout)
            fates[left[chosen]] = HELDOUT
        duplicate = fates >= EXACT
        kept = np.where(duplicate[:, None], ids[stays], 0)

        sizes_of = [np.bincount(fates[of_source == n], sizes[of_source == n], 4) for n in range(len(self.sources))]
        counts_of = [np.bincount(fates[of_source == n], minlength=4) for n in range(len(self.sources))]
        clusters: Any = np.bincount(np.unique(stays[duplicate], return_counts=True)[1] + 1) if duplicate.any() else []
        edges = np.cumsum([0, *counts])
        hashes = {}
        for (_, key), start, stop in zip(pieces, edges[:-1], edges[1:], strict=True):
            path = folder / f"{key}.npz"
            np.savez(path, fates=fates[start:stop], stays=kept[start:stop])
            hashes[key] = file_entry(path)["sha256"]
        summary = {
            "fates": hashes,
            "sources": {
                source: {
                    fate: {"documents": int(counts_of[n][f]), "text_bytes": int(sizes_of[n][f])}
                    for f, fate in enumerate(FATES)
                }
                for n, source in enumerate(self.sources)
            },
            "clusters": {str(size): int(n) for size, n in enumerate(clusters) if n},
            "examples": example_pairs(pieces, edges, fates, stays),
        }
        write_json(folder / "summary.json", summary)

    def survivors(
        self,
        task: Task,
        folder: Path,
        of_source: np.ndarray,
        digests: np.ndarray,
        sketches: np.ndarray,
        order: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """What `survivors` of dedup.py gives for all documents, in the order of the pieces. `folder` is the task's."""
        files = [task_folder(self.work, "read", key) / "keys.npy" for _, key in task.values["pieces"]]
        m = self.minhash

        def keys_of(band: int) -> np.ndarray:
            return np.concatenate([load_row(file, band) for file in files])

        def is_near(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return similarities(sketches[a], sketches[b], m.bands * m.rows) >= m.min_similarity

        return survivors(
            digests,
            map(keys_of, range(m.bands)),
            order,
            None if self.across else of_source,
            is_near,
        )


def read_prints(work: Path, key: str, name: str) -> np.ndarray:
    """One array of the fingerprints of a piece."""
    with np.load(task_folder(work, "read", key) / "fingerprints.npz") as arrays:
        array: np.ndarray = arrays[name]
    return array


def load_row(path: Path, row: int) -> np.ndarray:
    """One row of an .npy file; nothing else of it is read, and it does not stay open."""
    return np.array(np.load(path, mmap_mode="r")[row])


def ranks(of_source: np.ndarray, ids: np.ndarray, digests: np.ndarray) -> np.ndarray:
    """The order in which documents stay, all different: the source's priority, then the hash of the id.

    Two documents of one source with one id (nobody keeps a source from having them) are told apart by their texts.
    """
    order = rank(of_source, ids[:, 0])
    ordered = np.sort(order)
    if not (ordered[1:] == ordered[:-1]).any():
        return order
    return np.argsort(np.lexsort((np.arange(len(ids)), digests[:, 0], ids[:, 1], order))).astype(np.uint64)


def example_pairs(
    pieces: Sequence[tuple[str, str]], edges: np.ndarray, fates: np.ndarray, stays: np.ndarray
) -> list[dict[str, Any]]:
    """Where to find a few near duplicates and what stays for them: [piece, place in it] of both."""

    def place(number: int) -> list[Any]:
        piece = int(np.searchsorted(edges, number, side="right")) - 1
        return [pieces[piece][1], int(number - edges[piece])]

    near = np.flatnonzero(fates == NEAR)
    return [{"duplicate": place(int(i)), "kept": place(int(stays[i]))} for i in near[:: max(1, len(near) // 8)][:8]]


# ---- stage "tokenizer"


class TrainTokenizer(PipelineStep):
    """Trains the tokenizer on training documents of the pieces in the plan: a sample by the hash of the text."""

    type = "tokenizer"
    name = "train"

    def __init__(self, work: Path, plan: Path, vocab_size: int, sample_bytes: float, file_name: str):
        super().__init__()
        self.work = work
        self.plan = plan
        self.vocab_size = vocab_size
        self.sample_bytes = sample_bytes
        self.file_name = file_name

    def run(self, data: Documents | None = None, rank: int = 0, world_size: int = 1) -> None:
        task = planned(self.plan, rank, world_size)
        total, pieces = 0, []
        for key in task.values["pieces"]:
            prints, fates = piece_prints(self.work, task.values["fates"], key)
            training = fates == TRAIN
            total += int(prints["sizes"][training].sum())
            pieces.append((key, prints["digests"][:, 1], training))
        limit = np.uint64(min(self.sample_bytes / max(total, 1), 1) * (2**64 - 2**11))
        sample: list[tuple[int, str]] = []
        for key, order, training in pieces:
            chosen = training & (order <= limit)
            documents = read_packed(task_folder(self.work, "read", key) / "documents.jsonl.zst")
            sample += [(int(n), d["text"]) for n, d, is_in in zip(order, documents, chosen, strict=True) if is_in]
        sample.sort()  # so that the model does not depend on how files were cut into pieces
        with committed(task_folder(self.work, "tokenizer", task.key)) as folder:
            train_tokenizer([text for _, text in sample], self.vocab_size, folder / self.file_name)


def piece_prints(work: Path, fates_key: str, key: str) -> tuple[Any, np.ndarray]:
    """Fingerprints and fates of the documents of a piece."""
    prints = np.load(task_folder(work, "read", key) / "fingerprints.npz")
    return prints, np.load(task_folder(work, "duplicates", fates_key) / f"{key}.npz")["fates"]


# ---- stage "tokens": the tokens of each piece


class FateReader(BaseReader):
    """Reads the documents of one piece that stay, with what is known of them in the metadata."""

    name = "documents that stay"

    def __init__(self, work: Path, plan: Path):
        super().__init__()
        self.work = work
        self.plan = plan

    def run(self, data: Documents | None = None, rank: int = 0, world_size: int = 1) -> Documents:
        task = planned(self.plan, rank, world_size)
        key = task.values["read"]
        quarantined = read_attempts(self.work, task.key).quarantined
        prints, fates = piece_prints(self.work, task.values["fates"], key)
        order = prints["digests"][:, 1]
        progress = Progress()
        documents = read_packed(task_folder(self.work, "read", key) / "documents.jsonl.zst")
        for n, fate, record in zip(order, fates, documents, strict=True):
            if fate in (TRAIN, HELDOUT):
                n_bytes = len(record["text"].encode())
                poisonous = record["id"] in quarantined
                metadata = {"fate": int(fate), "order": int(n), "text_bytes": n_bytes, "poisonous": poisonous}
                progress.at(record["id"], n_bytes)
                yield Document(text=record["text"], id=record["id"], metadata=metadata)
                progress.done()


# Columns of a piece's table of documents: start and length in its tokens.bin, first and second half of the id's hash.
TABLE = ("fate", "order", "id_first", "id_second", "start", "length", "text_bytes")


def open_table(work: Path, key: str, fate: int) -> dict[str, np.ndarray]:
    """The columns of the documents of one fate, sorted by order and memory-mapped: what is not used is not read."""
    columns = np.load(task_folder(work, "tokens", key) / "table.npy", mmap_mode="r").view(np.ndarray)
    first, end = np.searchsorted(columns[0], np.array([fate, fate + 1], np.uint64))
    return dict(zip(TABLE, columns[:, first:end], strict=True))


class TokenTable:
    """Where the tokens of each document of a piece are; files as in TokenWriter."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, ...]] = []
        self.heldout: list[dict[str, Any]] = []
        self.lost: dict[str, dict[str, int]] = {}

    def add(self, document: Document, start: int, length: int) -> None:
        fate, order, n_bytes = (document.metadata[name] for name in ("fate", "order", "text_bytes"))
        self.rows.append((fate, order, *id_hash(document.id).tolist(), start, length, n_bytes))
        if fate == HELDOUT:
            self.heldout.append({"order": order, "id": document.id, "text": document.text})

    def lose(self, document: Document, rule: str) -> None:
        counts = {"documents": 1, "text_bytes": document.metadata["text_bytes"]}
        add_counts(self.lost.setdefault(rule, {"documents": 0, "text_bytes": 0}), counts)

    def write(self, folder: Path) -> None:
        self.rows.sort()
        columns = np.array(self.rows, np.uint64).reshape(-1, len(TABLE)).T
        np.save(folder / "table.npy", np.ascontiguousarray(columns))
        write_lines(folder / "heldout.jsonl", sorted(self.heldout, key=lambda entry: (entry["order"], entry["id"])))
        write_json(folder / "lost.json", self.lost)


class TokenWriter(PipelineStep):
    """Writes the tokens of one piece in the order of its documents, and the table to find them by.

    tokens.bin      uint16 or uint32, a separator before each document
    table.npy       the columns of TABLE, uint64, (7, documents), sorted by (fate, order)
    heldout.jsonl   id and text of the held-out documents, in that order
    lost.json       {rule: {"documents", "text_bytes"}} of those that are not in the table, as the poisonous ones, that
                    killed or broke a worker twice
    """

    type = "writer"
    name = "tokens"

    def __init__(self, work: Path, plan: Path, tokenizer_file: Path):
        super().__init__()
        self.work = work
        self.plan = plan
        self.tokenizer_file = tokenizer_file

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> None:
        task = planned(self.plan, rank, world_size)
        tokenizer = tokenizer_at(self.tokenizer_file)
        dtype = token_dtype(tokenizer.vocab_size)
        table = TokenTable()
        n_tokens = 0
        with committed(task_folder(self.work, "tokens", task.key)) as folder:
            with open(folder / "tokens.bin", "wb") as file:
                for document in data:
                    ids = None if document.metadata["poisonous"] else encode_or_none(tokenizer, document.text)
                    if ids is None:
                        table.lose(document, POISONOUS)
                        continue
                    file.write(np.array([tokenizer.separator_id], dtype).data)
                    file.write(np.asarray(ids, dtype).data)
                    table.add(document, n_tokens, 1 + len(ids))
                    n_tokens += 1 + len(ids)
            table.write(folder)


@functools.lru_cache(maxsize=1)
def tokenizer_at(path: Path) -> Tokenizer:
    """The tokenizer of this stage, loaded and compared with its library once in a process."""
    return load_tokenizer(path)


def encode_or_none(tokenizer: Tokenizer, text: str) -> np.ndarray | None:
    """The ids of a text; None if the tokenizer breaks on it twice."""
    for _ in range(2):
        try:
            return tokenizer.encode_array(text)
        except Exception:
            continue
    return None


# ---- stage "mixture": how much of each source, and which documents go into which shard


class PlanShards(PipelineStep):
    """Reads the tables of all pieces and decides the cut of each source and its shards; writes mixture.json.

    sources: {source: {split: {"documents", "tokens", "text_bytes", "edges", "last"}, "over_budget": {...}}}, where
    shard i of a split holds the documents with edges[i] <= order < edges[i + 1], and its last one up to `last`.
    mixture, messages: as they go into the manifest (mixture.py); empty for a recipe without token budgets.
    """

    type = "writer"
    name = "plan of the shards"

    def __init__(self, work: Path, plan: Path, shard_tokens: int):
        super().__init__()
        self.work = work
        self.plan = plan
        self.shard_tokens = shard_tokens

    def run(self, data: Documents | None = None, rank: int = 0, world_size: int = 1) -> None:
        task = planned(self.plan, rank, world_size)
        budgets = {source: budget for source, (budget, _) in task.values["budgets"].items()}
        columns = {source: self.columns(keys) for source, keys in task.values["pieces"].items()}
        mixture = None
        if budgets:
            available = {s: int(columns[s][TRAIN]["lengths"].sum()) for s in budgets}
            caps = {source: cap for source, (_, cap) in task.values["budgets"].items()}
            mixture = plan_mixture(available, budgets, caps, task.values["on_short"])
        sources = {}
        for source, by_fate in columns.items():
            train, over = by_fate[TRAIN], {"documents": 0, "text_bytes": 0}
            if source in budgets and len(train["order"]):
                share = mixture.shares.get(source) if mixture else None
                below = cut(train["order"], train["lengths"], share.tokens) if share else np.uint64(0)
                stays = (train["order"] < below) | (below == HIGHEST)
                over = {"documents": int((~stays).sum()), "text_bytes": int(train["text_bytes"][~stays].sum())}
                train = {name: column[stays] for name, column in train.items()}
            sources[source] = {
                "train": self.shards_of(train),
                "heldout": self.shards_of(by_fate[HELDOUT]),
                "over_budget": over,
            }
        result: dict[str, Any] = {"mixture": {}, "messages": []}
        if mixture:
            result = settle(mixture, {source: sources[source]["train"]["tokens"] for source in mixture.shares})
        with committed(task_folder(self.work, "mixture", task.key)) as folder:
            write_json(folder / "mixture.json", {"sources": sources, **result})

    def columns(self, keys: Sequence[str]) -> dict[int, dict[str, np.ndarray]]:
        """order, lengths and text_bytes of all documents of these pieces, by fate."""

        def column(fate: int, name: str, dtype: type) -> np.ndarray:
            # copies, so that no file stays open
            of_pieces: Any = (open_table(self.work, key, fate)[name].astype(dtype) for key in keys)
            return np.concatenate([np.zeros(0, dtype), *of_pieces])

        return {
            fate: {
                "order": column(fate, "order", np.uint64),
                "lengths": column(fate, "length", np.int64),
                "text_bytes": column(fate, "text_bytes", np.int64),
            }
            for fate in (TRAIN, HELDOUT)
        }

    def shards_of(self, documents: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Counts, and where each shard begins in the order: a shard ends after `shard_tokens`."""
        order, lengths = documents["order"], documents["lengths"]
        by_order = np.argsort(order, kind="stable")
        ordered, ends = order[by_order], np.cumsum(lengths[by_order])
        marks = np.arange(self.shard_tokens, int(ends[-1]) if len(ends) else 0, self.shard_tokens)
        edges = np.unique(np.concatenate([ordered[:1], ordered[np.searchsorted(ends, marks)]]))
        return {
            "documents": len(order),
            "tokens": int(lengths.sum()),
            "text_bytes": int(documents["text_bytes"].sum()),
            "edges": edges.tolist(),
            "last": int(ordered[-1]) if len(ordered) else 0,
        }


# ---- stage "shards"


class ShardWriter(PipelineStep):
    """Gathers the documents of one shard from all pieces of its source, in the order of the hash of their texts."""

    type = "writer"
    name = "shards"

    def __init__(self, work: Path, plan: Path, header: ShardHeader):
        super().__init__()
        self.work = work
        self.plan = plan
        self.header = header

    def run(self, data: Documents | None = None, rank: int = 0, world_size: int = 1) -> None:
        task = planned(self.plan, rank, world_size)
        values = task.values
        header = ShardHeader(**{**vars(self.header), "source": values["source"], "split": values["split"]})
        fate = FATES.index(values["split"])
        found: list[np.ndarray] = []
        span = np.array([values["from"], values["to"]], np.uint64)
        for key in values["pieces"]:
            table = open_table(self.work, key, fate)
            begin = np.searchsorted(table["order"], span[0], side="left")
            end = np.searchsorted(table["order"], span[1], side="right")
            columns = ("order", "id_first", "id_second", "start", "length")
            found.append(np.stack([table[name][begin:end] for name in columns]))
        order, first, second, starts, lengths = np.concatenate(found, axis=1)
        by = np.lexsort((second, first, order))
        places = np.empty(len(by), np.int64)  # of each document in the shard
        places[by] = np.cumsum(lengths[by]) - lengths[by]

        # a piece at a time: there are more of them than files may be open at once
        progress = Progress()
        dtype = token_dtype(header.vocab_size)
        tokens = np.empty(int(lengths.sum()), dtype)
        edges = np.cumsum([0, *(columns.shape[1] for columns in found)]).tolist()
        for key, here, there in zip(values["pieces"], edges[:-1], edges[1:], strict=True):
            if here == there:
                continue
            path = task_folder(self.work, "tokens", key) / "tokens.bin"
            of_piece = np.memmap(path, dtype, "r").view(np.ndarray)  # slicing a np.memmap takes ten times as long
            for i in range(here, there):
                place, start, length = int(places[i]), int(starts[i]), int(lengths[i])
                tokens[place : place + length] = of_piece[start : start + length]
                progress.at("", length * dtype.itemsize)
                progress.tokens += length

        with committed(task_folder(self.work, "shards", task.key)) as folder:
            ids = np.stack([first[by], second[by]], axis=1)
            chunks = (tokens[start : start + CHUNK_TOKENS] for start in range(0, len(tokens), CHUNK_TOKENS))
            write_shard(folder / f"shard{SHARD}", header, ids, lengths[by].astype(np.int64), chunks)
            write_json(folder / "entry.json", file_entry(folder / f"shard{SHARD}"))


# ---- stage "texts": held-out text, evaluation items, what was dropped


class TextWriter(PipelineStep):
    """Writes heldout/<source>.jsonl, tasks/*.jsonl and, if the recipe keeps it, dropped/<source>/<rule>.jsonl.gz."""

    type = "writer"
    name = "held-out text, evaluation items, dropped documents"

    def __init__(self, work: Path, plan: Path, n_items: int, documents_for_items: int):
        super().__init__()
        self.work = work
        self.plan = plan
        self.n_items = n_items
        self.documents_for_items = documents_for_items

    def run(self, data: Documents | None = None, rank: int = 0, world_size: int = 1) -> None:
        task = planned(self.plan, rank, world_size)
        with committed(task_folder(self.work, "texts", task.key)) as folder:
            for name in ("heldout", "tasks", "dropped"):
                (folder / name).mkdir()
            documents: dict[str, list[tuple[str, str]]] = {}
            for source, keys in task.values["tokens"].items():
                held = [d for key in keys for d in read_jsonl(task_folder(self.work, "tokens", key) / "heldout.jsonl")]
                held.sort(key=lambda document: (document["order"], document["id"]))
                if held:
                    records = [{"id": document["id"], "text": document["text"]} for document in held]
                    write_lines(folder / f"heldout/{source}.jsonl", records)
                    documents[source] = [(r["id"], r["text"]) for r in records[: self.documents_for_items]]
            for name, make in (("continuation", continuation_items), ("last_word", last_word_items)):
                write_lines(folder / f"tasks/{name}.jsonl", make(documents, self.n_items))
            for source, keys in task.values["dropped"].items():
                self.write_dropped(folder / "dropped" / source, keys, task.values["fates"])

    def write_dropped(self, folder: Path, keys: Sequence[str], fates_key: str) -> None:
        by_rule: dict[str, list[dict[str, Any]]] = {}
        for key in keys:
            read = task_folder(self.work, "read", key)
            for record in read_packed(read / "dropped.jsonl.zst"):
                by_rule.setdefault(record.pop("rule"), []).append(record)
            decided = np.load(task_folder(self.work, "duplicates", fates_key) / f"{key}.npz")
            for fate, stays, record in zip(
                decided["fates"], decided["stays"], read_packed(read / "documents.jsonl.zst"), strict=True
            ):
                if fate in (EXACT, NEAR):
                    by_rule.setdefault(FATES[fate], []).append({**record, "duplicate_of": stays.tobytes().hex()})
        for rule, records in by_rule.items():
            folder.mkdir(exist_ok=True)
            records.sort(key=lambda record: record["id"])
            lines = b"".join(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE) for record in records)
            # no time in it: the same text gives the same bytes
            (folder / f"{rule}.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
