"""Training without a staged corpus: Hugging Face datasets, read as they stream, interleaved, shuffled and packed.

    deepspeed train/launch.py --data stream:recipe.json --tokenizer data/local --steps 1000 ...

    {"buffer": 1000, "heldout": "data/local",
     "sources": {"web": {"weight": 0.7, "path": "HuggingFaceFW/fineweb", "name": "sample-10BT"},
                 "mine": {"weight": 0.3, "path": "json", "data_files": "texts/*.jsonl", "text": "body"}}}

A source is what datasets.load_dataset takes (path, name, split, data_files, data_dir, revision), its weight in
documents, and the column of its text. "buffer" documents of a source are read at a time and given out shuffled; a
source that ends begins again. "heldout" is a data folder of the same tokenizer whose held-out split --eval-every
measures; it may be left out with --eval-every 0. Documents are packed end to end behind their separators, as in the
shards.

Every process reads the whole stream and keeps its own rows of each batch, so that the order does not depend on their
number; the position (a few numbers for each source, and the tokens that wait for their row) goes into the checkpoints,
and a resumed run continues with the very next row. A process must tokenize as fast as all of them train.
"""

import copy
import json
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from zlib import crc32

import numpy as np
import torch

from curation.shards import document_ids, file_sha256, read_manifest
from curation.tokenizer import load_tokenizer
from train.data import Batch
from train.order import deal, shuffled

PREFIX = "stream:"
KEYS = {"buffer", "heldout", "sources"}
LOAD_KEYS = {"path", "name", "split", "data_files", "data_dir", "revision"}
PARTS = 1_000_000
ENDLESS = 1 << 62  # tokens of a stream, for what asks whether they suffice


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe file, checked."""

    path: Path
    sha256: str
    buffer: int  # documents
    heldout: str | None  # a data folder
    sources: dict  # name -> its entry, by name
    weights: tuple[int, ...]  # in parts of a million, in the order of `sources`


def read_recipe(path):
    """The recipe in a file. Raises FileNotFoundError or ValueError in one line."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"recipe {path} of --data {PREFIX}{path} does not exist")
    try:
        given = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"recipe {path} is not JSON: {error}") from None
    if not isinstance(given, dict) or not isinstance(given.get("sources"), dict) or not given["sources"]:
        raise ValueError(f'recipe {path} has no "sources"; expected {{"sources": {{name: {{"weight", "path"}}}}}}')
    if unknown := sorted(given.keys() - KEYS):
        raise ValueError(f"recipe {path} has an unknown key {unknown[0]!r}; allowed: {', '.join(sorted(KEYS))}")
    buffer = given.get("buffer", 1000)
    if type(buffer) is not int or buffer < 1:
        raise ValueError(f'recipe {path}: "buffer" {buffer!r} is not a number of documents, 1 or more')
    if not isinstance(given.get("heldout"), str | None):
        raise ValueError(f'recipe {path}: "heldout" {given["heldout"]!r} is not the name of a data folder')
    sources = dict(sorted(given["sources"].items()))
    for name, entry in sources.items():
        where = f"recipe {path}, source {name!r}"
        if not isinstance(entry, dict) or "path" not in entry:
            raise ValueError(f'{where}: no "path", which names a data set or a format such as json or parquet')
        allowed = LOAD_KEYS | {"weight", "text"}
        if unknown := sorted(entry.keys() - allowed):
            raise ValueError(f"{where}: unknown key {unknown[0]!r}; allowed: {', '.join(sorted(allowed))}")
        weight = entry.get("weight")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise ValueError(f'{where}: "weight" {weight!r} is not a number above 0')
        for key in entry.keys() - {"weight"}:
            if not _names(entry[key], several=key == "data_files"):
                may_be = (
                    "a string, a list of them, or an object of either by split" if key == "data_files" else "a string"
                )
                raise ValueError(f'{where}: "{key}" {entry[key]!r} is not {may_be}')
    total = sum(entry["weight"] for entry in sources.values())
    return Recipe(
        path=path,
        sha256=file_sha256(path),
        buffer=buffer,
        heldout=given.get("heldout"),
        sources=sources,
        weights=tuple(max(1, round(entry["weight"] / total * PARTS)) for entry in sources.values()),
    )


def _names(value, several):
    """Whether a value of a source names something; several: in a list, too, or in an object by split."""
    if several and isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return bool(value) and all(_names(v, isinstance(value, dict)) for v in inner)
    return isinstance(value, str) and bool(value)


def open_recipe(config):
    """The recipe and the tokenizer that a run's flags name. Raises ValueError or FileNotFoundError in one line."""
    if config.data == PREFIX:
        raise ValueError(
            f"--data {PREFIX} names no recipe; write its file behind the colon, as in {PREFIX}recipe.json"
        )
    if config.tokenizer is None:
        raise ValueError(f"--data {config.data} needs --tokenizer, a tokenizer.model or the folder that holds it")
    if config.steps is None and config.tokens is None:
        raise ValueError(f"--data {config.data} has no end; say how long the run is with --steps or --tokens")
    if config.mixture is not None or config.max_epochs is not None:
        raise ValueError(f"--mixture and --max-epochs are for data folders; the weights of {config.data} are its own")
    recipe, tokenizer = read_recipe(config.data.removeprefix(PREFIX)), load_tokenizer(config.tokenizer)
    if recipe.heldout is None:
        if config.eval_every:
            raise ValueError(f'recipe {recipe.path} names no data folder as "heldout"; add one, or set --eval-every 0')
    else:
        of_heldout = Path(recipe.heldout) / read_manifest(recipe.heldout)["tokenizer"]["file"]
        if file_sha256(of_heldout) != file_sha256(tokenizer.path):
            raise ValueError(f"--tokenizer {config.tokenizer} is not that of the held-out folder {recipe.heldout}")
    return recipe, tokenizer


class Source:
    """The texts of one source without end, shuffled within blocks of `buffer` documents."""

    def __init__(self, name, entry, buffer, seed, state=None):
        self.name, self.entry, self.buffer = name, entry, buffer
        self.key = (crc32(name.encode()) << 32) ^ (seed << 20)
        self.block_number, self.given, self.upstream = state or (0, 0, None)
        self._open(self.upstream)
        self.block = self._read_block()

    def _open(self, upstream):
        from datasets import load_dataset  # here, so that a run on a data folder does not wait for it

        arguments = {"split": "train"} | {key: self.entry[key] for key in LOAD_KEYS & self.entry.keys()}
        with self._named_in_errors():
            self.dataset = load_dataset(**arguments, streaming=True)
        if upstream is not None:
            self.dataset.load_state_dict(copy.deepcopy(upstream))
        self.rows = iter(self.dataset)

    def _read_block(self):
        """The next texts in their shuffled order; `upstream` is the data set's own state before them."""
        for _ in range(2):  # the second time from the beginning of the data
            with self._named_in_errors():
                rows = list(islice(self.rows, self.buffer))
            texts = [self._text(row) for row in rows]
            if texts:
                return [texts[i] for i in shuffled(np.arange(len(texts)), len(texts), self.key ^ self.block_number)]
            self.upstream = None
            self._open(None)
        raise ValueError(f"source {self.name!r} of the recipe has no documents")

    @contextmanager
    def _named_in_errors(self):
        """Errors of datasets in one line with the source's name. OSError: a network may be back at the next start."""
        where = f"source {self.name!r} of the recipe cannot be read"
        try:
            yield
        except StopIteration:  # of datasets' own look at the first file
            raise ValueError(f"{where}: its data_files match no file, or empty ones alone") from None
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"{where}: {str(error).splitlines()[0]}") from None
        except OSError as error:
            raise OSError(f"{where}: {str(error).splitlines()[0]}") from None

    def _text(self, row):
        column = self.entry.get("text", "text")
        if not isinstance(row.get(column), str):
            raise ValueError(f"source {self.name!r} has no text in its column {column!r}; it has: {', '.join(row)}")
        return row[column]

    def next(self):
        if self.given == len(self.block):
            self.upstream = copy.deepcopy(self.dataset.state_dict())
            self.block_number, self.given = self.block_number + 1, 0
            self.block = self._read_block()
        self.given += 1
        return self.block[self.given - 1]

    def state(self):
        return [self.block_number, self.given, self.upstream]


class PackedStream:
    """Rows of tokens from the sources of a recipe, from the beginning or from a saved state."""

    def __init__(self, recipe, tokenizer, seed, state=None):
        self.recipe, self.tokenizer, self.seed = recipe, tokenizer, seed
        saved = state or {"document": 0, "waiting": [], "sources": {}}
        self.document = saved["document"]
        self.waiting = np.array(saved["waiting"], np.int64)  # tokens that no row has ended with
        self.sources = [
            Source(name, entry, recipe.buffer, seed, saved["sources"].get(name))
            for name, entry in recipe.sources.items()
        ]

    def state(self):
        """What a later PackedStream needs to go on: plain values, for JSON."""
        sources = {source.name: source.state() for source in self.sources}
        return {"document": self.document, "waiting": self.waiting.tolist(), "sources": copy.deepcopy(sources)}

    def read_rows(self, n, seq_len):
        """The next n rows (n, seq_len + 1), int64; a row begins with the token that the one before ended with."""
        parts, filled = [self.waiting], len(self.waiting)
        while filled < n * seq_len + 1:
            numbers, _ = deal(np.arange(self.document, self.document + 64), self.recipe.weights, self.seed)
            for number in numbers:
                if filled >= n * seq_len + 1:
                    break
                ids = self.tokenizer.encode(self.sources[number].next())
                parts.append(np.array([self.tokenizer.separator_id, *ids], np.int64))
                filled += len(parts[-1])
                self.document += 1
        tokens = np.concatenate(parts)
        self.waiting = tokens[n * seq_len :].copy()
        return np.lib.stride_tricks.sliding_window_view(tokens, seq_len + 1)[: n * seq_len : seq_len]

    def batches(self, plan, rank, world_size, device):
        """Yield process `rank`'s micro-batches without end; state() is that after the whole step."""
        seq_len, shape = plan.model.seq_len, (plan.grad_accum, world_size, plan.micro_batch, -1)
        while True:
            for rows in self.read_rows(plan.batch_sequences, seq_len).reshape(shape)[:, rank]:
                tokens, targets = rows[:, :-1].copy(), rows[:, 1:].copy()
                parts = (tokens, targets, document_ids(tokens, self.tokenizer.separator_id))
                yield Batch(*(torch.from_numpy(part).to(device) for part in parts))
