"""Token shards as Megatron's .bin and .idx or datatrove's .ds, and back.

    python -m curation.interchange export data/eight --to megatron --out megatron/
    python -m curation.interchange import --source web=web/*.ds --source code=code_text_document.idx \\
        --tokenizer tokenizer.json --out data/imported

Our documents begin with the separator, theirs end with it: a shard goes out shifted by one token. What comes in may
have separators at the ends of its documents or none. Neither format says whose tokens it holds, so an import is told
the tokenizer; the documents' ids are made of file name and number, and their text is not there: an imported folder
trains, but holds nothing out.
"""

import argparse
import shutil
import struct
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from humanize import metric

from curation.shards import (
    MANIFEST,
    SHARD,
    ShardHeader,
    id_hash,
    new_file,
    open_shards,
    read_manifest,
    token_dtype,
    write_manifest,
    write_shard,
)
from curation.tokenizer import FILE_NAME, JSON_NAME, load_tokenizer

COPY_TOKENS = 1 << 22  # at a time
SHARD_TOKENS = 1 << 25  # of an imported shard, which is held in memory

# megatron/core/datasets/indexed_dataset.py: header, version, then the code of the token type
MAGIC = b"MMIDIDX\0\0"
VERSION = 1
CODES: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}


# ---- export


def export_megatron(folder: str | Path, split: str, out: str | Path) -> list[Path]:
    """Write one split as `<out>/<source>.bin` and `.idx`, all shards of a source together; returns the .idx files.

    Raises FileNotFoundError or ValueError where `open_shards` does.
    """
    folder, out = Path(folder), Path(out)
    manifest = read_manifest(folder)
    # Megatron has no uint32; int32 holds every id
    dtype = np.dtype("<u2") if manifest["token_dtype"] == "uint16" else np.dtype("<i4")
    code = next(code for code, known in CODES.items() if known == dtype)
    written = []
    for source in sorted(manifest["splits"][split]["sources"]):
        lengths = []
        with new_file(out / f"{source}.bin") as file:
            for shard in open_shards(folder, manifest, split, source):
                lengths.append(shard_lengths(shard.starts, shard.tokens))
                for piece in shifted(shard.tokens):
                    file.write(piece.astype(dtype, copy=False).tobytes())
        n_tokens = np.concatenate(lengths)
        pointers = (np.cumsum(n_tokens) - n_tokens) * dtype.itemsize
        with new_file(out / f"{source}.idx") as file:
            file.write(MAGIC + struct.pack("<QBQQ", VERSION, code, len(n_tokens), len(n_tokens) + 1))
            file.write(n_tokens.astype("<i4").tobytes())
            file.write(pointers.astype("<i8").tobytes())
            file.write(np.arange(len(n_tokens) + 1, dtype="<i8").tobytes())  # each document is one sequence
        written.append(out / f"{source}.idx")
    return written


def export_datatrove(folder: str | Path, split: str, out: str | Path) -> list[Path]:
    """Write one split as `<out>/<source>_<number>.ds`, each with .index and .metadata; returns the .ds files.

    Raises FileNotFoundError or ValueError where `open_shards` does.
    """
    folder, out = Path(folder), Path(out)
    manifest = read_manifest(folder)
    written = []
    for source in sorted(manifest["splits"][split]["sources"]):
        for number, shard in enumerate(open_shards(folder, manifest, split, source)):
            path = out / f"{source}_{number:05d}.ds"
            with new_file(path) as file:
                for piece in shifted(shard.tokens):
                    file.write(piece.tobytes())
            with new_file(f"{path}.index") as file:  # where each document ends
                file.write(np.cumsum(shard_lengths(shard.starts, shard.tokens)).astype("<u8").tobytes())
            with new_file(f"{path}.metadata") as file:
                n_tokens = len(shard.tokens)
                name = f"{manifest['tokenizer']['file']}|{shard.tokens.dtype.itemsize}"
                file.write(f"{name}\n{n_tokens}\n{metric(n_tokens, unit='T')}".encode())
            written.append(path)
    return written


def shard_lengths(starts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Tokens of each document, its separator included: (documents,) int64."""
    return np.diff(starts.astype(np.int64), append=len(tokens))


def shifted(tokens: np.ndarray) -> Iterator[np.ndarray]:
    """A shard's tokens with each document's separator behind it instead of before it, in pieces."""
    for start in range(1, len(tokens), COPY_TOKENS):
        yield tokens[start : start + COPY_TOKENS]
    yield tokens[:1]


# ---- import


def read_megatron(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of all documents, memory-mapped, and where each ends (documents,) int64, from an .idx and its .bin.

    Raises FileNotFoundError or ValueError in one line when one of the two is missing or they do not fit together.
    """
    data = path.read_bytes()
    bin_path = path.with_suffix(".bin")
    if not bin_path.is_file():
        raise FileNotFoundError(f"{path} has no {bin_path.name} beside it")
    try:
        if not data.startswith(MAGIC):
            raise ValueError("another header")
        version, code, n_sequences, n_documents = struct.unpack_from("<QBQQ", data, len(MAGIC))
        start = len(MAGIC) + struct.calcsize("<QBQQ")
        lengths = np.frombuffer(data, "<i4", n_sequences, start).astype(np.int64)
        pointers = np.frombuffer(data, "<i8", n_sequences, start + 4 * n_sequences)
        documents = np.frombuffer(data, "<i8", n_documents, start + 12 * n_sequences)
        dtype = CODES[code]
    except (ValueError, KeyError, struct.error):
        raise ValueError(f"{path} is damaged or not a Megatron index of whole numbers") from None
    if version != VERSION or not n_sequences or n_documents < 2:
        raise ValueError(f"{path} has version {version}, {n_sequences} sequences and {n_documents} document marks")
    sequence_ends = np.cumsum(lengths)
    if documents[0] != 0 or documents[-1] != n_sequences or (np.diff(documents) < 0).any() or lengths.min() < 0:
        raise ValueError(f"{path} is damaged: its documents are not a partition of its sequences")
    if not np.array_equal(pointers, (sequence_ends - lengths) * dtype.itemsize):
        raise ValueError(f"{path} does not say that its sequences follow each other; rebuild it with Megatron's merge")
    if bin_path.stat().st_size != sequence_ends[-1] * dtype.itemsize:
        said = f"{path.name} says {sequence_ends[-1] * dtype.itemsize:,}"
        raise ValueError(f"{bin_path} has {bin_path.stat().st_size:,} bytes, {said}; one of them is damaged")
    ends = np.concatenate(([0], sequence_ends))[documents[1:]]
    return np.memmap(bin_path, dtype, "r"), ends


def read_datatrove(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The same from a .ds and its .ds.index. The width of a token follows from the two sizes."""
    index = Path(f"{path}.index")
    if not index.is_file():
        raise FileNotFoundError(f"{path} has no {index.name} beside it (save_index=True writes it)")
    data, n_bytes = index.read_bytes(), path.stat().st_size
    ends = np.frombuffer(data[: len(data) // 8 * 8], "<u8").astype(np.int64)
    widths = {2: "<u2", 4: "<u4"}
    n_tokens = int(ends[-1]) if len(ends) else 0
    if len(data) % 8 or not n_tokens or (np.diff(ends) < 0).any() or n_bytes / n_tokens not in widths:
        raise ValueError(f"{path} has {n_bytes:,} bytes and its index {n_tokens:,} tokens; one of them is damaged")
    return np.memmap(path, widths[n_bytes // n_tokens], "r"), ends


READERS: dict[str, Callable[[Path], tuple[np.ndarray, np.ndarray]]] = {".idx": read_megatron, ".ds": read_datatrove}


def import_tokens(
    sources: Mapping[str, Sequence[Path]],
    tokenizer_file: str | Path,
    out: str | Path,
    shard_tokens: int = SHARD_TOKENS,
) -> dict[str, Any]:
    """Make a data folder of the .idx and .ds files of each source, all as training data; returns its manifest.

    Raises FileNotFoundError or ValueError in one line, naming the file, for what is missing, damaged, or holds tokens
    that the tokenizer does not have or separators inside documents.
    """
    out = Path(out)
    if (out / MANIFEST).exists():
        raise ValueError(f"{out} holds a data folder already; give another --out")
    tokenizer = load_tokenizer(tokenizer_file)
    n_text_bytes = np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)])
    entries: dict[str, Any] = {}
    for source, paths in sorted(sources.items()):
        header = ShardHeader(
            source=source,
            split="train",
            vocab_size=tokenizer.vocab_size,
            separator_id=tokenizer.separator_id,
            tokenizer_sha256=tokenizer.sha256,
        )
        entry: dict[str, Any] = {"documents": 0, "tokens": 0, "text_bytes": 0, "shards": []}
        for path in paths:
            if path.suffix not in READERS:
                raise ValueError(f"{path} is neither an .idx nor a .ds file")
            tokens, ends = READERS[path.suffix](path)
            for first, last in document_ranges(ends, shard_tokens):
                name = f"train/{source}-{len(entry['shards']):05d}{SHARD}"
                begin = int(ends[first - 1]) if first else 0
                piece, lengths = separators_first(
                    np.asarray(tokens[begin : ends[last - 1]]), ends[first:last] - begin, tokenizer.separator_id
                )
                if piece.min() < 0 or piece.max() >= tokenizer.vocab_size:
                    raise ValueError(f"{path} holds the token {piece.max()}; the tokenizer has {tokenizer.vocab_size}")
                ids = np.array([id_hash(f"{source}/{path.name}#{number}") for number in range(first, last)])
                piece = piece.astype(token_dtype(tokenizer.vocab_size))
                try:
                    counts = write_shard(out / name, header, ids, lengths, [piece])
                except ValueError as error:
                    raise ValueError(f"{path}, documents {first} to {last}: {error}") from None
                entry["documents"] += counts["documents"]
                entry["tokens"] += counts["tokens"]
                entry["text_bytes"] += int(n_text_bytes[piece].sum())
                entry["shards"].append(name)
        entries[source] = entry
    totals = {key: sum(entry[key] for entry in entries.values()) for key in ("documents", "tokens", "text_bytes")}
    name = JSON_NAME if tokenizer.path.suffix == ".json" else FILE_NAME
    shutil.copyfile(tokenizer.path, out / name)
    content = {
        "recipe": "import",
        "tokenizer": {
            "file": name,
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "separator_id": tokenizer.separator_id,
        },
        "splits": {"train": totals | {"sources": entries}, "heldout": dict.fromkeys(totals, 0) | {"sources": {}}},
    }
    write_manifest(out, content)
    return read_manifest(out)


def document_ranges(ends: np.ndarray, shard_tokens: int) -> Iterator[tuple[int, int]]:
    """Documents first to last (exclusive) of each shard: as many as fit into `shard_tokens`, but at least one."""
    first = 0
    while first < len(ends):
        begin = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, begin + shard_tokens, side="right")))
        yield first, last
        first = last


def separators_first(tokens: np.ndarray, ends: np.ndarray, separator_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens with a separator before each document and none behind it, and the documents' lengths with it."""
    lengths = np.diff(ends, prepend=0)
    closed = np.zeros(len(ends), bool)
    closed[lengths > 0] = tokens[ends[lengths > 0] - 1] == separator_id
    bare = np.delete(tokens, ends[closed] - 1)
    lengths = lengths - closed
    return np.insert(bare, np.cumsum(lengths) - lengths, separator_id), lengths + 1


# ---- commands


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m curation.interchange", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("export", help="write a split of a data folder for other projects", allow_abbrev=False)
    out.add_argument("folder", type=Path)
    out.add_argument("--to", choices=("megatron", "datatrove"), required=True)
    out.add_argument("--split", choices=("train", "heldout"), default="train")
    out.add_argument("--out", type=Path, required=True)
    into = commands.add_parser("import", help="make a data folder of .idx or .ds files", allow_abbrev=False)
    into.add_argument("--source", action="append", required=True, metavar="NAME=FILES", help="a pattern is allowed")
    into.add_argument("--tokenizer", type=Path, required=True, help="the file that made the tokens")
    into.add_argument("--out", type=Path, required=True)
    flags = parser.parse_args(argv)
    try:
        if flags.command == "export":
            export = export_megatron if flags.to == "megatron" else export_datatrove
            for path in export(flags.folder, flags.split, flags.out):
                print(path)
        else:
            manifest = import_tokens(dict(map(source_files, flags.source)), flags.tokenizer, flags.out)
            train = manifest["splits"]["train"]
            print(f"{flags.out}: {train['documents']:,} documents, {train['tokens']:,} tokens")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def source_files(text: str) -> tuple[str, list[Path]]:
    """("web", the files in order) of "web=folder/*.ds"."""
    name, equals, pattern = text.partition("=")
    place = Path(pattern)
    paths = sorted(place.parent.glob(place.name)) if place.name else []
    if not name or not equals or not paths:
        raise ValueError(f"--source {text} names no file; give NAME=FILES, such as web=tokens/web*.ds")
    return name, paths


if __name__ == "__main__":
    sys.exit(main())
