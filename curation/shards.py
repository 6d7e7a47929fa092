"""The data folder: token shards on disk, the manifest that describes them, and how they are read.

    data/local/
        manifest.json                   written last: a folder without it is unfinished
        tokenizer.model
        train/<source>-00000.npy        tokens of one shard: each document is the separator, then its tokens
        train/<source>-00000.starts.npy where in that shard each document begins
        heldout/...                     the same for the held-out split, and <source>.jsonl with its text
        tasks/*.jsonl                   evaluation items made from the held-out documents
        dropped/<source>/<rule>.jsonl.gz

Both kinds of .npy are plain numpy files and are memory-mapped; nothing here needs torch or datatrove.

    python -m curation.shards verify data/local
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

FORMAT = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "heldout")
KEYS = {"format", "tokenizer", "token_dtype", "splits", "files"}  # what reading needs of a manifest


# ---- writing


@contextmanager
def new_file(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that appears under its name whole or not at all: written beside it, synced, then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the renames inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest of uint16 and uint32 that holds every id of the vocabulary."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


@dataclass(frozen=True, kw_only=True)
class ShardCounts:
    documents: int
    tokens: int  # separators included


def write_shard(
    path_stem: str | Path, documents: Iterable[Sequence[int] | np.ndarray], separator_id: int, dtype: Any
) -> ShardCounts:
    """Write `<path_stem>.npy` and `<path_stem>.starts.npy`. The shard is held in memory: the caller bounds its size.

    documents: the token ids of each document, without the separator, which is put before each of them here.
    Raises ValueError if there is no document, an id does not fit the dtype, or a document contains the separator.
    """
    dtype = np.dtype(dtype)
    parts: list[np.ndarray] = []
    starts: list[int] = []
    n_tokens = 0
    separator = np.array([separator_id], dtype)
    for document in documents:
        tokens = np.asarray(document, dtype=np.int64)
        if tokens.size and (tokens.min() < 0 or tokens.max() > np.iinfo(dtype).max):
            raise ValueError(f"{path_stem}: token ids {tokens.min()} to {tokens.max()} do not fit {dtype}")
        if (tokens == separator_id).any():
            raise ValueError(f"{path_stem}: document {len(starts)} contains the separator, id {separator_id}")
        starts.append(n_tokens)
        parts += [separator, tokens.astype(dtype)]
        n_tokens += 1 + tokens.size
    if not parts:
        raise ValueError(f"{path_stem}: a shard needs at least one document")
    with new_file(f"{path_stem}.npy") as file:
        np.save(file, np.concatenate(parts))
    with new_file(f"{path_stem}.starts.npy") as file:
        np.save(file, np.array(starts, np.uint64))
    return ShardCounts(documents=len(starts), tokens=n_tokens)


# ---- manifest and verification


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a finished data folder.

    Raises FileNotFoundError if the folder is missing or unfinished, ValueError if its manifest is not ours.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"data folder {folder} does not exist; make it with: make curate OUT={folder}")
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"data folder {folder} is unfinished: it has no {MANIFEST}; go on with: make curate OUT={folder}"
        )
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: not JSON ({error}); make the folder again") from None
    if not isinstance(manifest, dict) or not set(manifest) >= KEYS:
        raise ValueError(f"{path} is not the manifest of a data folder; make one with: make curate OUT={folder}")
    if manifest["format"] != FORMAT:
        raise ValueError(f"{path} has format {manifest['format']}; this version reads {FORMAT}; make the folder again")
    return manifest


def manifest_sha256(folder: str | Path) -> str:
    """Identity of a data folder: the sha256 of its manifest, which holds the sha256 of every other file."""
    return file_sha256(Path(folder) / MANIFEST)


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_names(manifest: dict[str, Any]) -> list[str]:
    """Every file of the folder but the manifest, as sorted paths relative to it."""
    return sorted(manifest["files"])


def verify_files(folder: str | Path, names: Iterable[str]) -> None:
    """Compare size and sha256 of the named files with the manifest; ValueError names the first that differs."""
    folder = Path(folder)
    files = read_manifest(folder)["files"]
    for name in names:
        if name not in files:
            raise ValueError(f"{folder / name} is not listed in {folder / MANIFEST}; listed: {len(files)} files")
        if problem := file_problem(folder, name, files[name]):
            raise ValueError(f"{problem}; make the folder again")


def file_problem(folder: Path, name: str, entry: dict[str, Any], read: bool = True) -> str | None:
    """What is wrong with one file, or None; with read=False only its presence and size are looked at."""
    path = folder / name
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    if size != entry["bytes"]:
        change = "truncated" if size < entry["bytes"] else "too long"
        return f"{path} is {change}: {size:,} bytes, the manifest says {entry['bytes']:,}"
    if read and file_sha256(path) != entry["sha256"]:
        return f"{path} was altered: its sha256 is not the one in the manifest"
    return None


# ---- reading


@dataclass(frozen=True, kw_only=True)
class TokenStream:
    """All shards of one split, by source name and shard number, as one long sequence of tokens."""

    folder: Path
    split: str
    sources: tuple[str, ...]
    shards: tuple[np.ndarray, ...]  # memory-mapped, 1-D
    edges: np.ndarray  # (number of shards + 1,): where each shard begins in the stream, and the end of the last
    source_edges: np.ndarray  # (number of sources + 1,): the same for the sources
    separator_id: int
    n_documents: int
    text_bytes: int  # UTF-8 bytes of the documents' text, for bits per byte

    @property
    def n_tokens(self) -> int:
        return int(self.edges[-1])

    def read(self, start: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens `start` to `start + n` of the stream, across shard edges, and the document that each belongs to.

        Both are int64 (n,). The ids count 0, 1, 2... within this slice, one more at each separator; a document that
        began before `start` has id 0. Raises ValueError when the slice does not lie inside the stream.
        """
        rows = self.read_rows([start], n)
        return rows[0].astype(np.int64), self.document_ids(rows)[0]

    def read_rows(self, starts: Sequence[int] | np.ndarray, n: int) -> np.ndarray:
        """Tokens `start` to `start + n` for each of `starts`, as an array (rows, n) of the shards' dtype."""
        starts = np.asarray(starts, np.int64)
        if n < 1 or starts.size and not 0 <= starts.min() <= starts.max() <= self.n_tokens - n:
            bad = next(int(start) for start in starts if n < 1 or not 0 <= start <= self.n_tokens - n)
            asked = f"tokens {bad:,} to {bad + n:,} of {self.folder}/{self.split}"
            raise ValueError(f"{asked} were asked for; it has {self.n_tokens:,}")
        tokens = np.empty((len(starts), n), self.shards[0].dtype)
        first = np.searchsorted(self.edges, starts, side="right") - 1
        for row, shard, offset in zip(tokens, first.tolist(), (starts - self.edges[first]).tolist(), strict=True):
            piece = self.shards[shard][offset : offset + n]
            row[: len(piece)] = piece
            filled = len(piece)
            while filled < n:  # the rest lies in the next shards
                shard += 1
                piece = self.shards[shard][: n - filled]
                row[filled : filled + len(piece)] = piece
                filled += len(piece)
        return tokens

    def document_ids(self, rows: np.ndarray) -> np.ndarray:
        """Which document each token of rows (rows, n) belongs to: int64, counted from 0 in each row as `read` does."""
        return document_ids(rows, self.separator_id)


def document_ids(rows: np.ndarray, separator_id: int) -> np.ndarray:
    """The document of each token of rows (rows, n) as int64: 0, 1, 2... in each row, one more at each separator."""
    begins = rows == separator_id
    begins[:, 0] = True  # each row counts for itself
    places = np.flatnonzero(begins)  # few, so that repeating is faster than a sum over all tokens
    first = np.searchsorted(places, np.arange(len(rows)) * rows.shape[1])  # of each row, among `places`
    of_place = np.arange(len(places))
    of_place -= np.repeat(first, np.diff(first, append=len(places)))
    return np.repeat(of_place, np.diff(places, append=rows.size)).reshape(rows.shape)


def open_stream(folder: str | Path, split: str, sources: Sequence[str] | None = None) -> TokenStream:
    """Open one split of a finished data folder; sources: only these of its sources, default all.

    Sizes, dtypes and lengths are compared with the manifest; contents are not (that is `verify`), and the starts are
    not opened: with a hundred billion tokens they would be half of the start-up, and nothing reads them here.
    Raises FileNotFoundError or ValueError with one line that names the file.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; allowed: {', '.join(SPLITS)}")
    available = manifest["splits"][split]["sources"]
    chosen = tuple(sorted(available if sources is None else sources))
    if missing := [source for source in chosen if source not in available]:
        raise ValueError(f"{folder}/{split} has no source {missing[0]!r}; it has: {', '.join(sorted(available))}")

    shards: list[np.ndarray] = []
    for source in chosen:
        entry = available[source]
        n_tokens = 0
        for shard in entry["shards"]:
            tokens = open_array(folder, manifest, shard["tokens"], manifest["token_dtype"])
            shards.append(tokens.view(np.ndarray))  # still mapped; slicing a np.memmap takes ten times as long
            n_tokens += len(tokens)
        if n_tokens != entry["tokens"]:
            raise ValueError(
                f"{folder}/{split}/{source} has {n_tokens:,} tokens, the manifest says {entry['tokens']:,}; "
                "make the folder again"
            )
    if not shards:
        raise ValueError(f"{folder}/{split} has no tokens; make the folder again with more text")
    return TokenStream(
        folder=folder,
        split=split,
        sources=chosen,
        shards=tuple(shards),
        edges=np.cumsum([0, *map(len, shards)]),
        source_edges=np.cumsum([0, *(available[source]["tokens"] for source in chosen)]),
        separator_id=manifest["tokenizer"]["separator_id"],
        n_documents=sum(available[source]["documents"] for source in chosen),
        text_bytes=sum(available[source]["text_bytes"] for source in chosen),
    )


def check_starts(folder: Path, manifest: dict[str, Any], split: str) -> None:
    """Raise ValueError unless the starts of a split point into their shards and are as many as its documents."""
    for source, entry in manifest["splits"][split]["sources"].items():
        n_documents = 0
        for shard in entry["shards"]:
            tokens = open_array(folder, manifest, shard["tokens"], manifest["token_dtype"])
            starts = open_array(folder, manifest, shard["starts"], "uint64")
            if starts[0] != 0 or starts[-1] >= len(tokens):
                raise ValueError(f"{folder / shard['starts']} points outside its shard; make the folder again")
            n_documents += len(starts)
        if n_documents != entry["documents"]:
            raise ValueError(
                f"{folder}/{split}/{source} has {n_documents:,} documents, the manifest says {entry['documents']:,}; "
                "make the folder again"
            )


def open_array(folder: Path, manifest: dict[str, Any], name: str, dtype: str) -> np.ndarray:
    """Memory-map one .npy of the folder after checking its size, dtype and shape."""
    if name not in manifest["files"]:
        raise ValueError(f"{folder / name} is used but not listed in {folder / MANIFEST}; make the folder again")
    if problem := file_problem(folder, name, manifest["files"][name], read=False):
        raise ValueError(f"{problem}; make the folder again")
    try:
        array: np.ndarray = np.load(folder / name, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{folder / name} is damaged: {error}; make the folder again") from None
    if array.dtype != np.dtype(dtype) or array.ndim != 1 or not len(array):
        raise ValueError(
            f"{folder / name} holds {array.dtype} of shape {array.shape}; expected {dtype} in one dimension; "
            "make the folder again"
        )
    return array


# ---- command line


def verify(folder: Path) -> None:
    """Check every file, a line each; ValueError names the damaged ones."""
    manifest = read_manifest(folder)
    names = file_names(manifest)
    damaged = []
    for name in names:
        problem = file_problem(folder, name, manifest["files"][name])
        print(f"{'BAD' if problem else 'ok '} {manifest['files'][name]['bytes']:>12,}  {problem or name}", flush=True)
        if problem:
            damaged.append(problem)
    if damaged:
        summary = f"{len(damaged)} of {len(names)} files are damaged"
        raise ValueError(f"{summary}: {'; '.join(damaged)}; make the folder again")
    for split in SPLITS:
        check_starts(folder, manifest, split)
    streams = [open_stream(folder, split) for split in SPLITS]
    held = ", ".join(f"{s.split} {s.n_tokens:,} tokens in {s.n_documents:,} documents" for s in streams)
    print(f"{folder} is whole: {len(names)} files, {held}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m curation.shards", description="Check a data folder against its manifest.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("verify", help="size and sha256 of every file; exit code 0 if all are right, else 2")
    command.add_argument("folder", type=Path, help="a data folder, such as data/local")
    arguments = parser.parse_args(argv)
    try:
        verify(arguments.folder)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
