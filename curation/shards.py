"""The data folder: token shards on disk, the manifest that describes them, and how they are read.

    data/local/
        manifest.json                   written last: a folder without it is unfinished
        tokenizer.model                 or tokenizer.json
        train/<source>-00000.safetensors
        heldout/...                     the same for the held-out split, and <source>.jsonl with its text
        tasks/*.jsonl                   evaluation items made from the held-out documents
        dropped/<source>/<rule>.jsonl.gz

A shard is a safetensors file, which any reader of that format opens and which is memory-mapped here:
    ids     (documents, 2) uint64   blake2b-128 of each document's id
    starts  (documents,) uint64     where in `tokens` each document begins
    tokens  (tokens,) uint16|32     each document is the separator, then its tokens
and its header says which tokens they are: source, split, vocabulary size, sha256 of the tokenizer, separator id.
The manifest holds the sha256 of every other file, and of itself. Nothing here needs torch or datatrove.

    python -m curation.shards verify data/local
    python -m curation.shards inspect data/local --source stdlib_docs
"""

import argparse
import hashlib
import json
import os
import resource
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

FORMAT = 2
MANIFEST = "manifest.json"
SETTINGS = "work/settings.json"  # of what a data folder is being made; says that the folder is ours
SPLITS = ("train", "heldout")
HASHING_THREADS = 16  # of verify_files: one core hashes 0.5 to 1.5 GB/s, less than many disks read
KEYS = {"format", "tokenizer", "token_dtype", "splits", "files", "sha256"}  # what reading needs of a manifest
SHARD = ".safetensors"
DTYPES: dict[str, np.dtype[Any]] = {
    "U16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "U64": np.dtype("<u8"),
}  # safetensors' names
LONGEST_HEADER = 1 << 16  # bytes; ours are a few hundred


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
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def id_hash(document_id: str) -> np.ndarray:
    """How a shard names a document: blake2b-128 of its id, (2,) uint64."""
    return np.frombuffer(hashlib.blake2b(document_id.encode(), digest_size=16).digest(), "<u8")


@dataclass(frozen=True, kw_only=True)
class ShardHeader:
    """Which tokens a shard holds; stands in the shard itself."""

    source: str
    split: str
    vocab_size: int
    separator_id: int
    tokenizer_sha256: str


def write_shard(
    path: str | Path,
    header: ShardHeader,
    ids: np.ndarray,
    lengths: Sequence[int] | np.ndarray,
    tokens: Iterable[np.ndarray],
) -> dict[str, int]:
    """Write one shard and return {"documents", "tokens"}; memory does not grow with the shard.

    ids: (documents, 2) uint64 of `id_hash`; lengths: (documents,) tokens of each with its separator; tokens: all of
    them in pieces of any length, each document behind its separator.
    Raises ValueError if there is no document, the tokens do not add up to the lengths, an id does not fit the
    vocabulary, or a separator is missing or stands inside a document.
    """
    dtype = token_dtype(header.vocab_size)
    lengths = np.asarray(lengths, np.int64)
    if not len(lengths) or len(lengths) != len(ids):
        raise ValueError(f"{path}: {len(lengths)} documents with {len(ids)} ids; a shard needs at least one document")
    n_tokens = int(lengths.sum())
    starts = np.cumsum(lengths) - lengths
    tables = {"ids": np.asarray(ids, "<u8").reshape(-1, 2), "starts": starts.astype("<u8")}
    n_written = n_separators = 0
    with new_file(path) as file:
        file.write(shard_prefix(header, {name: array.shape for name, array in tables.items()}, n_tokens))
        for array in tables.values():
            file.write(array.data)
        for piece in tokens:
            if piece.size and (piece.min() < 0 or piece.max() >= header.vocab_size):
                raise ValueError(f"{path}: token ids {piece.min()} to {piece.max()} are not below {header.vocab_size}")
            places = np.flatnonzero(piece == header.separator_id) + n_written
            expected = starts[n_separators : n_separators + len(places)]
            if not np.array_equal(places, expected):
                wrong = int(np.argmin(places[: len(expected)] == expected)) if len(expected) else 0
                raise ValueError(f"{path}: document {n_separators + wrong - 1} contains the separator")
            n_separators += len(places)
            n_written += piece.size
            file.write(np.ascontiguousarray(piece, dtype).data)
        if (n_written, n_separators) != (n_tokens, len(lengths)):
            raise ValueError(f"{path}: {n_written} tokens in {n_separators} documents came, not {n_tokens}")
    return {"documents": len(lengths), "tokens": n_tokens}


def shard_prefix(header: ShardHeader, tables: dict[str, tuple[int, ...]], n_tokens: int) -> bytes:
    """Everything of a shard that stands before its arrays: safetensors' length and JSON header."""
    dtype = token_dtype(header.vocab_size)
    described: dict[str, Any] = {
        "__metadata__": {"format": str(FORMAT)} | {k: str(v) for k, v in asdict(header).items()}
    }
    offset = 0
    shapes = {**tables, "tokens": (n_tokens,)}
    for name, shape in shapes.items():
        kind = next(k for k, v in DTYPES.items() if v == (dtype if name == "tokens" else np.dtype("<u8")))
        end = offset + int(np.prod(shape)) * DTYPES[kind].itemsize
        described[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def pack(
    documents: Iterable[Sequence[int] | np.ndarray], separator_id: int, dtype: Any
) -> tuple[list[int], np.ndarray]:
    """Lengths and tokens of documents that fit in memory, as `write_shard` takes them; a separator before each."""
    parts = [np.concatenate(([separator_id], np.asarray(document, np.int64))) for document in documents]
    lengths = [len(part) for part in parts]
    tokens = np.concatenate(parts or [np.zeros(0, np.int64)])
    if tokens.size and (tokens.min() < 0 or tokens.max() > np.iinfo(dtype).max):
        raise ValueError(f"token ids {tokens.min()} to {tokens.max()} do not fit {np.dtype(dtype)}")
    return lengths, tokens.astype(dtype)


def write_source(
    folder: str | Path,
    header: ShardHeader,
    documents: Iterable[tuple[str, Sequence[int] | np.ndarray]],
    text_bytes: int,
    shard_tokens: int = 1 << 26,
) -> dict[str, Any]:
    """Write all documents (id, tokens without separator) of one source and split; returns their entry of the manifest.

    A new shard begins after `shard_tokens`; one shard is held in memory. Raises ValueError as `write_shard` does.
    """
    folder, dtype = Path(folder), token_dtype(header.vocab_size)
    entry: dict[str, Any] = {"documents": 0, "tokens": 0, "text_bytes": text_bytes, "shards": []}
    ids: list[np.ndarray] = []
    waiting: list[Sequence[int] | np.ndarray] = []
    n_waiting = 0

    def write() -> None:
        name = f"{header.split}/{header.source}-{len(entry['shards']):05d}{SHARD}"
        lengths, tokens = pack(waiting, header.separator_id, dtype)
        counts = write_shard(folder / name, header, np.array(ids), lengths, [tokens])
        entry["documents"] += counts["documents"]
        entry["tokens"] += counts["tokens"]
        entry["shards"].append(name)
        ids.clear()
        waiting.clear()

    for document_id, tokens in documents:
        ids.append(id_hash(document_id))
        waiting.append(tokens)
        n_waiting += 1 + len(tokens)
        if n_waiting >= shard_tokens:
            write()
            n_waiting = 0
    if waiting:
        write()
    return entry


def write_manifest(folder: str | Path, content: dict[str, Any], files: dict[str, Any] | None = None) -> None:
    """Finish a data folder: its manifest with the size and sha256 of every file, written last.

    content: the manifest; "format", "token_dtype", "files" and "sha256" are set here; files: what is known already of
    {name: {"bytes", "sha256"}}, else every file of the folder is read.
    """
    folder = Path(folder)
    if files is None:
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST]
        files = {path.relative_to(folder).as_posix(): file_entry(path) for path in paths}
    manifest = {
        **content,
        "format": FORMAT,
        "token_dtype": token_dtype(content["tokenizer"]["vocab_size"]).name,
        "files": files,
    }
    with new_file(folder / MANIFEST) as file:
        file.write(json.dumps(manifest | {"sha256": manifest_checksum(manifest)}, indent=1).encode() + b"\n")


def file_entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """sha256 of the manifest's other values: a flipped bit in the manifest itself is found too."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


# ---- manifest and verification


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a finished data folder.

    Raises FileNotFoundError if the folder is missing, unfinished or something else, ValueError if its manifest is not
    ours.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"data folder {folder} does not exist; make it with: make curate OUT={folder}")
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(why_no_manifest(folder))
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: not JSON ({error}); make the folder again") from None
    if isinstance(manifest, dict) and manifest.get("format", FORMAT) != FORMAT:
        raise ValueError(f"{path} has format {manifest['format']}; this version reads {FORMAT}; make the folder again")
    if not isinstance(manifest, dict) or not set(manifest) >= KEYS:
        raise ValueError(f"{path} is not the manifest of a data folder; make one with: make curate OUT={folder}")
    if manifest["sha256"] != manifest_checksum(manifest):
        raise ValueError(f"{path} was altered: its own sha256 does not fit; make the folder again")
    return manifest


def why_no_manifest(folder: Path) -> str:
    if not (folder / SETTINGS).is_file():
        return (
            f"{folder} is not a data folder: it has no {MANIFEST}; "
            f"of text, one is made with: make curate RECIPE=own INPUT={folder} OUT=data/own"
        )
    begun = json.loads((folder / SETTINGS).read_bytes())
    of = f"recipe {begun['recipe']}" + (f", input {begun['input']}" if begun.get("input") else "")
    return f"data folder {folder} is unfinished: it has no {MANIFEST}; run the command that began it again ({of})"


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
    folder, names = Path(folder), list(names)
    files = read_manifest(folder)["files"]
    for name in names:
        if name not in files:
            raise ValueError(f"{folder / name} is not listed in {folder / MANIFEST}; listed: {len(files)} files")
    with ThreadPoolExecutor(min(HASHING_THREADS, len(os.sched_getaffinity(0)))) as threads:
        for problem in threads.map(lambda name: file_problem(folder, name, files[name]), names):
            if problem:
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
class Shard:
    """One shard, memory-mapped: nothing of it is read before it is used."""

    header: ShardHeader
    ids: np.ndarray  # (documents, 2) uint64
    starts: np.ndarray  # (documents,) uint64
    tokens: np.ndarray  # (tokens,) uint16 or uint32


def open_shard(path: str | Path) -> Shard:
    """Map one shard. ValueError in one line when it is cut off or not a shard of this format."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            n = int.from_bytes(file.read(8), "little")
            described: dict[str, Any] = json.loads(file.read(n)) if n <= LONGEST_HEADER else {}
        metadata = described.pop("__metadata__")
        if metadata.pop("format") != str(FORMAT):
            raise ValueError("another format")
        header = ShardHeader(
            **metadata | {"vocab_size": int(metadata["vocab_size"]), "separator_id": int(metadata["separator_id"])}
        )
        # still mapped as a plain array; slicing a np.memmap takes ten times as long
        data = np.memmap(path, np.uint8, "r", offset=8 + n).view(np.ndarray)
        arrays = {}
        for name in ("ids", "starts", "tokens"):
            start, end = described[name]["data_offsets"]
            arrays[name] = data[start:end].view(DTYPES[described[name]["dtype"]]).reshape(described[name]["shape"])
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError):
        raise ValueError(f"{path} is damaged or not a shard of format {FORMAT}; make the folder again") from None
    return Shard(header=header, **arrays)


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


def allow_open_files() -> None:
    """Let this process have as many files open as the system allows: each memory-mapped shard holds one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def open_stream(folder: str | Path, split: str, sources: Sequence[str] | None = None) -> TokenStream:
    """Open one split of a finished data folder; sources: only these of its sources, default all.

    Sizes, headers and lengths are compared with the manifest; contents are not (that is `verify`).
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

    allow_open_files()
    shards: list[np.ndarray] = []
    for source in chosen:
        opened = list(open_shards(folder, manifest, split, source))
        shards += [shard.tokens for shard in opened]
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


def open_shards(folder: Path, manifest: dict[str, Any], split: str, source: str) -> Iterator[Shard]:
    """The shards of one source, compared with what the manifest says of them. ValueError names the file."""
    entry, tokenizer = manifest["splits"][split]["sources"][source], manifest["tokenizer"]
    expected = ShardHeader(
        source=source,
        split=split,
        vocab_size=tokenizer["vocab_size"],
        separator_id=tokenizer["separator_id"],
        tokenizer_sha256=tokenizer["sha256"],
    )
    documents = tokens = 0
    for name in entry["shards"]:
        if name not in manifest["files"]:
            raise ValueError(f"{folder / name} is used but not listed in {folder / MANIFEST}; make the folder again")
        if problem := file_problem(folder, name, manifest["files"][name], read=False):
            raise ValueError(f"{problem}; make the folder again")
        shard = open_shard(folder / name)
        for field, value in asdict(expected).items():
            if (there := getattr(shard.header, field)) != value:
                raise ValueError(f"{folder / name} says {field} {there}, the manifest {value}; make the folder again")
        if shard.tokens.dtype.name != manifest["token_dtype"]:
            said = manifest["token_dtype"]
            raise ValueError(
                f"{folder / name} holds {shard.tokens.dtype}, the manifest says {said}; make the folder again"
            )
        documents += len(shard.starts)
        tokens += len(shard.tokens)
        yield shard
    if (documents, tokens) != (entry["documents"], entry["tokens"]):
        raise ValueError(
            f"{folder}/{split}/{source} has {tokens:,} tokens in {documents:,} documents, the manifest says "
            f"{entry['tokens']:,} in {entry['documents']:,}; make the folder again"
        )


def shard_problem(shard: Shard) -> str | None:
    """What is wrong inside a shard: its starts are not exactly the places of its separators. Reads all its tokens."""
    if np.array_equal(np.flatnonzero(shard.tokens == shard.header.separator_id), shard.starts):
        return None
    return "its document table does not fit its separators"


# ---- command line


def verify(folder: Path, n_threads: int) -> None:
    """Check every file, a line each; ValueError names the damaged ones."""
    manifest = read_manifest(folder)
    names = file_names(manifest)
    damaged = []
    # reading and hashing release the interpreter's lock, so threads are enough
    with ThreadPoolExecutor(n_threads) as pool:
        problems = pool.map(lambda name: file_problem(folder, name, manifest["files"][name]), names)
        for name, problem in zip(names, problems, strict=True):
            print(
                f"{'BAD' if problem else 'ok '} {manifest['files'][name]['bytes']:>14,}  {problem or name}", flush=True
            )
            if problem:
                damaged.append(problem)
    if damaged:
        summary = f"{len(damaged)} of {len(names)} files are damaged"
        raise ValueError(f"{summary}: {'; '.join(damaged)}; make the folder again")
    if manifest["files"][manifest["tokenizer"]["file"]]["sha256"] != manifest["tokenizer"]["sha256"]:
        raise ValueError(f"{folder} was made with another tokenizer than the one in it; make the folder again")
    for split in SPLITS:
        for source in manifest["splits"][split]["sources"]:
            for number, shard in enumerate(open_shards(folder, manifest, split, source)):
                if problem := shard_problem(shard):
                    raise ValueError(f"{folder}/{split}/{source}, shard {number}: {problem}; make the folder again")
    streams = [open_stream(folder, split) for split in SPLITS if manifest["splits"][split]["sources"]]
    held = ", ".join(f"{s.split} {s.n_tokens:,} tokens in {s.n_documents:,} documents" for s in streams)
    print(f"{folder} is whole: {len(names)} files, {held}")


def inspect(
    folder: Path, split: str, source: str | None, document: int, n: int, document_id: str | None, characters: int
) -> None:
    """Print documents of a data folder as text: n of them from number `document` on, or the one of an id."""
    from curation.tokenizer import load_tokenizer  # which imports this file

    if n < 1:
        raise ValueError(f"--n {n} is not a number of documents; give 1 or more")
    manifest = read_manifest(folder)
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; allowed: {', '.join(SPLITS)}")
    sources = manifest["splits"][split]["sources"]
    if source is not None and source not in sources:
        raise ValueError(f"{folder}/{split} has no source {source!r}; it has: {', '.join(sorted(sources))}")
    tokenizer = load_tokenizer(folder / manifest["tokenizer"]["file"])
    wanted = None if document_id is None else id_hash(document_id)
    left = n
    for name in [source] if source is not None else sorted(sources):
        first = 0
        for path, shard in zip(sources[name]["shards"], open_shards(folder, manifest, split, name), strict=True):
            if wanted is None:
                places = np.arange(max(document - first, 0), len(shard.starts))[:left]
            else:
                places = np.flatnonzero((shard.ids == wanted).all(axis=1))
            ends = np.append(shard.starts[1:], len(shard.tokens))
            for place in places.tolist():
                tokens = shard.tokens[int(shard.starts[place]) + 1 : int(ends[place])].tolist()
                text = tokenizer.decode(tokens[: 2 * characters])
                more = (
                    f" [... of {len(tokens):,} tokens]"
                    if len(text) > characters or len(tokens) > 2 * characters
                    else ""
                )
                print(f"==== {path} document {first + place:,}, id hash {shard.ids[place].tobytes().hex()}")
                print(text[:characters] + more)
                left -= 1
            first += len(shard.starts)
            if left <= 0:
                return
    if left == n:
        what = f"no document {document:,}" if wanted is None else f"no document with the id {document_id!r}"
        raise ValueError(f"{folder}/{split} has {what}; it has {manifest['splits'][split]['documents']:,} documents")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m curation.shards", description="Check a data folder, or read in it.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("verify", help="size and sha256 of every file; exit code 0 if all are right, else 2")
    command.add_argument("folder", type=Path, help="a data folder, such as data/local")
    command.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="files read at once")
    command = commands.add_parser("inspect", help="documents as text")
    command.add_argument("folder", type=Path, help="a data folder, such as data/local")
    command.add_argument("--split", default="train", help=f"one of {', '.join(SPLITS)}")
    command.add_argument("--source", help="of this source; default: of all")
    command.add_argument("--document", type=int, default=0, help="begin with this one of each source")
    command.add_argument("--n", type=int, default=3, help="print so many")
    command.add_argument("--id", dest="document_id", help="the document of this id, wherever it is")
    command.add_argument("--characters", type=int, default=500, help="print at most so much of each")
    flags = vars(parser.parse_args(argv))
    try:
        if flags.pop("command") == "verify":
            verify(flags["folder"], max(1, flags["threads"]))
        else:
            inspect(**flags)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
