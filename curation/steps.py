"""The datatrove steps of the pipeline. What they do is elsewhere (sources, filters, dedup, heldout, shards)."""

import gzip
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.readers.base import BaseReader
from datatrove.pipeline.writers.jsonl import JsonlWriter

from curation.dedup import band_keys, find_duplicates, text_digest
from curation.filters import Rule
from curation.heldout import choose_heldout, continuation_items, last_word_items
from curation.recipe import MinHash, Recipe
from curation.shards import new_file, token_dtype, write_shard
from curation.sources import InputFile, Source, read_documents
from curation.tokenizer import load_tokenizer, train_tokenizer

Documents = Iterator[Document]


def jsonl(records: Any) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        yield from map(json.loads, file)


# ---- stage "read": from files to documents that passed the rules of their kind


class SourceReader(BaseReader):
    """Reads one source's files: task r of n takes every n-th of the list, until its share of the budget is full."""

    name = "files of a source"

    def __init__(self, source: Source, inputs_file: Path, budget_bytes: float):
        super().__init__()
        self.source = source
        self.inputs_file = inputs_file
        self.budget_bytes = budget_bytes

    def run(self, data: Documents | None = None, rank: int = 0, world_size: int = 1) -> Documents:
        inputs = json.loads(self.inputs_file.read_bytes())
        text_bytes = 0
        for name, path, size_bytes in inputs[rank::world_size]:
            if text_bytes >= self.budget_bytes / world_size:
                break
            for raw in read_documents(self.source, InputFile(name=name, path=path, size_bytes=size_bytes)):
                n = len(raw.text.encode())
                text_bytes += n
                self.stat_update("documents")
                self.stat_update("text_bytes", value=n)
                yield Document(text=raw.text, id=raw.id, metadata={"problem": raw.problem} if raw.problem else {})


class ProblemFilter(BaseFilter):
    """Drops what the reader could not read as meant, by the name of the problem."""

    name = "readable files"

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        problem = doc.metadata.get("problem")
        return (False, problem) if problem else True


class RuleFilter(BaseFilter):
    """Drops what breaks a rule of filters.py, by the name that the rule gives."""

    def __init__(self, rule: Rule, exclusion_writer: JsonlWriter):
        super().__init__(exclusion_writer)
        self.rule = rule
        self.name = type(rule).__name__

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        broken = self.rule.check(doc.text)
        return (False, broken) if broken else True


class Fingerprints(PipelineStep):
    """Writes digest, MinHash keys and size of every document that passes; the documents go on unchanged."""

    type = "dedup"
    name = "fingerprints"

    def __init__(self, folder: Path, minhash: MinHash):
        super().__init__()
        self.folder = folder
        self.minhash = minhash

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> Documents:
        m = self.minhash
        ids, digests, keys, sizes = [], [], [], []
        for document in data:
            ids.append(document.id)
            digests.append(text_digest(document.text))
            keys.append(band_keys(document.text, m.ngram_words, m.bands, m.rows))
            sizes.append(len(document.text.encode()))
            yield document
        with new_file(self.folder / f"{rank:05d}.npz") as file:
            np.savez(
                file,
                ids=np.array(ids, np.str_),
                digests=np.array(digests, np.uint64).reshape(-1, 2),
                keys=np.array(keys, np.uint64).reshape(-1, m.bands),
                sizes=np.array(sizes, np.int64),
            )


def read_steps(
    recipe: Recipe, source: Source, inputs_file: Path, budget_bytes: float, out: Path
) -> list[PipelineStep]:
    """The pipeline of stage "read" for one source."""

    def dropped() -> JsonlWriter:
        name = "${rank}/${filter_reason}.jsonl"
        return JsonlWriter(str(out / "dropped" / source.name), output_filename=name, compression=None)

    return [
        SourceReader(source, inputs_file, budget_bytes),
        ProblemFilter(dropped()),
        *[RuleFilter(rule, dropped()) for rule in recipe.rules[source.kind]],
        Fingerprints(out / "fingerprints" / source.name, recipe.minhash),
        JsonlWriter(str(out / "documents" / source.name), output_filename="${rank}.jsonl", compression=None),
    ]


# ---- stage "split": one table that says what becomes of each document


class DecideFates(PipelineStep):
    """Finds the duplicates among all sources and holds out a part of the rest.

    Writes fates.json: {source: {id: {"fate": "train", "heldout" or the rule that drops it, "order": number in the
    shards, "duplicate_of": id}}}.
    """

    type = "dedup"
    name = "duplicates and held-out split"

    def __init__(self, recipe: Recipe, heldout_percent: float, fingerprints: Path, fates_file: Path):
        super().__init__()
        self.recipe = recipe
        self.heldout_percent = heldout_percent
        self.fingerprints = fingerprints
        self.fates_file = fates_file

    def run(self, data: Documents | None = None, rank: int = 0, world_size: int = 1) -> None:
        sources = [source.name for source in self.recipe.sources]
        parts = [
            (priority, np.load(path))
            for priority, source in enumerate(sources)
            for path in sorted((self.fingerprints / source).glob("*.npz"))
        ]
        ids = np.concatenate([part["ids"] for _, part in parts]).tolist()
        digests = np.concatenate([part["digests"] for _, part in parts])
        priorities = np.concatenate([np.full(len(part["ids"]), priority) for priority, part in parts])
        exact, near = find_duplicates(ids, priorities, digests, np.concatenate([part["keys"] for _, part in parts]))

        fates: dict[str, dict[str, Any]] = {}
        is_dropped = np.array([i in exact or i in near for i in ids], bool)
        for priority, source in enumerate(sources):
            stays = np.flatnonzero((priorities == priority) & ~is_dropped)
            heldout = choose_heldout(digests[stays, 0], self.heldout_percent, self.recipe.min_heldout_documents)
            fates[source] = {
                ids[i]: {"fate": "heldout" if is_heldout else "train", "order": int(digests[i, 1])}
                for i, is_heldout in zip(stays, heldout, strict=True)
            }
        for rule, duplicates in (("exact_duplicate", exact), ("near_duplicate", near)):
            for document_id, kept_id in duplicates.items():
                fates[document_id.split("/")[0]][document_id] = {"fate": rule, "duplicate_of": kept_id}
        with new_file(self.fates_file) as file:
            file.write(json.dumps(fates, sort_keys=True).encode())


class FateReader(BaseReader):
    """Reads the documents of some sources in their final order, each with its fate in the metadata."""

    name = "documents with their fate"

    def __init__(self, sources: list[str], read_folder: Path, fates_file: Path):
        super().__init__()
        self.sources = sources
        self.read_folder = read_folder
        self.fates_file = fates_file

    def run(self, data: Documents | None = None, rank: int = 0, world_size: int = 1) -> Documents:
        all_fates = json.loads(self.fates_file.read_bytes())
        for source in self.sources[rank::world_size]:
            fates = all_fates[source]
            documents = []
            for path in (self.read_folder / "documents" / source).glob("*.jsonl"):
                for record in read_jsonl(path):
                    metadata = {"source": source, **fates[record["id"]]}
                    documents.append(Document(text=record["text"], id=record["id"], metadata=metadata))
            for path in (self.read_folder / "dropped" / source).glob("*/*.jsonl"):
                for record in read_jsonl(path):
                    metadata = {"source": source, "fate": path.stem}
                    documents.append(Document(text=record.get("text", ""), id=record["id"], metadata=metadata))
            # the numbers come from hashes of the texts, so the order in a shard is a fixed random one
            yield from sorted(documents, key=lambda document: (document.metadata.get("order", 0), document.id))


# ---- stage "tokenizer"


class TrainTokenizer(PipelineStep):
    """Trains the tokenizer on the training documents: all, or a sample by the hash of the text."""

    type = "tokenizer"
    name = "train"

    def __init__(self, vocab_size: int, sample_bytes: float, path: Path):
        super().__init__()
        self.vocab_size = vocab_size
        self.sample_bytes = sample_bytes
        self.path = path

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> None:
        training = [document for document in data if document.metadata["fate"] == "train"]
        total_bytes = sum(len(document.text.encode()) for document in training)
        if not total_bytes:
            raise ValueError("no text is left to train on; read more of it (--limit-mb), or loosen the recipe's rules")
        limit = self.sample_bytes / total_bytes * 2**64
        sample = [document.text for document in training if document.metadata["order"] < limit]
        train_tokenizer(sample, self.vocab_size, self.path)


# ---- stage "pack": tokens, held-out text, and what was dropped


class Packer(PipelineStep):
    """Writes the shards, the held-out text and the dropped documents of the sources that pass, and their counts."""

    type = "writer"
    name = "shards"

    def __init__(self, tokenizer_file: Path, shard_tokens: int, out: Path):
        super().__init__()
        self.tokenizer_file = tokenizer_file
        self.shard_tokens = shard_tokens
        self.out = out

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> None:
        tokenizer = load_tokenizer(self.tokenizer_file)
        dtype = token_dtype(tokenizer.vocab_size)
        counts: dict[str, dict[str, int]] = defaultdict(lambda: {"documents": 0, "tokens": 0, "text_bytes": 0})
        waiting: dict[str, list[np.ndarray]] = defaultdict(list)  # of each split, the shard that is being filled
        n_waiting: Counter[str] = Counter()  # tokens in it
        shards: dict[str, list[dict[str, str]]] = defaultdict(list)
        heldout: list[dict[str, str]] = []
        dropped: dict[str, list[dict[str, str]]] = defaultdict(list)
        source = ""

        def write(split: str) -> None:
            stem = f"{split}/{source}-{len(shards[split]):05d}"
            write_shard(self.out / stem, waiting[split], tokenizer.separator_id, dtype)
            shards[split].append({"tokens": f"{stem}.npy", "starts": f"{stem}.starts.npy"})
            waiting[split].clear()
            n_waiting[split] = 0

        for document in data:
            source, fate = document.metadata["source"], document.metadata["fate"]
            tokens = np.array(tokenizer.encode(document.text), dtype)
            counts[fate]["documents"] += 1
            counts[fate]["tokens"] += 1 + len(tokens)  # with its separator, as in a shard
            counts[fate]["text_bytes"] += len(document.text.encode())
            record = {"id": document.id, "text": document.text}
            if fate in ("train", "heldout"):
                waiting[fate].append(tokens)
                n_waiting[fate] += 1 + len(tokens)
                if n_waiting[fate] >= self.shard_tokens:
                    write(fate)
                if fate == "heldout":
                    heldout.append(record)
            else:
                kept = document.metadata.get("duplicate_of")
                dropped[fate].append(record | ({"duplicate_of": kept} if kept else {}))
        for split in [split for split, documents in waiting.items() if documents]:
            write(split)
        if heldout:
            with new_file(self.out / f"heldout/{source}.jsonl") as file:
                file.write(jsonl(heldout))
        for rule, records in dropped.items():
            records.sort(key=lambda record: record["id"])
            with new_file(self.out / f"dropped/{source}/{rule}.jsonl.gz") as file:
                file.write(gzip.compress(jsonl(records), mtime=0))  # no time in it: the same text gives the same bytes
        if source:
            with new_file(self.out / f"counts/{source}.json") as file:
                file.write(json.dumps({"counts": counts, "shards": shards}, sort_keys=True).encode())


# ---- stage "tasks"


class TaskWriter(PipelineStep):
    """Writes the evaluation items that are made from the held-out documents."""

    type = "writer"
    name = "evaluation items"

    def __init__(self, n_items: int, out: Path):
        super().__init__()
        self.n_items = n_items
        self.out = out

    def run(self, data: Documents | None = None, rank: int = 0, world_size: int = 1) -> None:
        documents: Mapping[str, list[tuple[str, str]]] = {
            path.stem: [(record["id"], record["text"]) for record in read_jsonl(path)]
            for path in sorted((self.out / "heldout").glob("*.jsonl"))
        }
        for name, make in (("continuation", continuation_items), ("last_word", last_word_items)):
            with new_file(self.out / f"tasks/{name}.jsonl") as file:
                file.write(jsonl(make(documents, self.n_items)))
