"""Reading files against datatrove's readers: MB of text per CPU second, what one bad byte or a cut file costs, and how
long two workers take for one large file among small ones.
"""

import gzip
import heapq
import json
import random
import tempfile
import time
import zlib
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from curation.contests.measure import Contest, Measured, measure
from curation.filters import GopherQuality, GopherRepetition
from curation.readers import read_piece
from curation.sources import MB, OWN, list_files, make_pieces

EVERY = 5  # documents of the corpus: about 32 MB
ROUNDS = 3
N_LINES = 2_000
BAD_LINE = 490  # of them
PEER = f"datatrove {version('datatrove')}"
WORK = (GopherQuality(), GopherRepetition())
FORMATS = {"jsonl": "JsonlReader", "jsonl.gz": "JsonlReader", "jsonl.zst": "JsonlReader", "parquet": "ParquetReader"}


def write_files(corpus: Path, folder: Path) -> float:
    """One file of each format, with the same documents, each in a folder of its own; MB of text."""
    rows = []
    for path in sorted(corpus.glob("*/*.jsonl.zst")):
        with zstandard.open(path, "rt", encoding="utf-8") as lines:
            found = (json.loads(line) for number, line in enumerate(lines) if number % EVERY == 0)
            rows += [{"id": row["id"], "text": row["text"], "url": row.get("url") or ""} for row in found]
    random.Random(0).shuffle(rows)
    data = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
    for suffix in FORMATS:
        (folder / suffix).mkdir()
    (folder / "jsonl/a.jsonl").write_bytes(data)
    (folder / "jsonl.gz/a.jsonl.gz").write_bytes(gzip.compress(data, 6))
    (folder / "jsonl.zst/a.jsonl.zst").write_bytes(zstandard.compress(data))
    pq.write_table(pa.Table.from_pylist(rows), folder / "parquet/a.parquet", row_group_size=1000, compression="zstd")
    return sum(len(row["text"].encode()) for row in rows) / MB


def read_ours(folder: Path) -> list[int]:
    """Characters of every document that was read as meant."""
    source = replace(OWN, folder=str(folder), id_column="id", metadata_columns=("url",))
    pieces = make_pieces(source, list_files(source), 4 * MB)
    return [len(raw.text) for piece in pieces for raw in read_piece(source, piece) if raw.problem is None]


def ready_ours() -> None:
    import pyarrow.parquet  # noqa: F401  the time of imports is no part of reading


def ready_stock(folder: Path) -> Any:
    from datatrove.pipeline.readers import JsonlReader, ParquetReader
    from loguru import logger

    logger.remove()
    if next(folder.iterdir()).suffix == ".parquet":
        return ParquetReader(str(folder))
    compression: Any = {".gz": "gzip", ".zst": "zstd"}.get(next(folder.iterdir()).suffix)
    return JsonlReader(str(folder), compression=compression)


def read_stock(reader: Any) -> tuple[list[int], str]:
    """Characters of every document that was read, and the error that ended the task, or ""."""
    lengths = []
    try:
        for document in reader.run(None, 0, 1):
            lengths.append(len(document.text))
    except Exception as error:
        return lengths, type(error).__name__
    return lengths, ""


def ours_of(_: None, folder: Path) -> tuple[list[int], str]:
    return read_ours(folder), ""


def speed(folder: Path, n_mb: float) -> Contest:
    ours: list[Measured] = []
    stock: list[Measured] = []
    for _ in range(ROUNDS):
        ours.append(measure(ours_of, folder, prepare=ready_ours))
        stock.append(measure(read_stock, prepare=partial(ready_stock, folder)))
    fast, slow = (n_mb / median(run.cpu_s for run in runs) for runs in (ours, stock))
    same = all(run.result == ours[0].result for run in ours + stock)
    return Contest(
        step=f"read .{folder.name}",
        metric="MB of text per CPU second",
        peer=f"{PEER} {FORMATS[folder.name]}",
        ours=fast,
        theirs=slow,
        target="not slower, the same documents",
        reached=fast >= slow and same,
        note=f"{len(ours[0].result[0]):,} documents, {'the same' if same else 'NOT the same'}",
    )


def survivors(folder: Path, name: str, data: bytes, n_good: int, what: str) -> Contest:
    folder.mkdir()
    (folder / name).write_bytes(data)
    ours = len(measure(read_ours, folder).result)
    stock, error = measure(read_stock, prepare=partial(ready_stock, folder)).result
    return Contest(
        step=what,
        metric="good documents that are read",
        peer=f"{PEER} JsonlReader",
        ours=ours,
        theirs=len(stock),
        target=f"all {n_good:,}",
        reached=ours == n_good,
        note=f"then its task ends with {error}" if error else "",
    )


def seconds_of_pieces(folder: Path, piece_bytes: int) -> list[float]:
    """CPU seconds of reading each piece and asking the rules about its documents."""
    source = replace(OWN, folder=str(folder))
    seconds = []
    for piece in make_pieces(source, list_files(source), piece_bytes):
        start = time.process_time()
        for raw in read_piece(source, piece):
            for rule in WORK:
                rule.check(raw.text, {})
        seconds.append(time.process_time() - start)
    return seconds


def makespan(seconds: list[float], n_workers: int) -> float:
    """Seconds until the last worker is done, when each takes the longest piece that is left."""
    busy = [0.0] * n_workers
    for duration in sorted(seconds, reverse=True):
        heapq.heapreplace(busy, busy[0] + duration)
    return max(busy)


def uneven_files(folder: Path, data: bytes) -> Contest:
    """One file with nine tenths of the bytes and three small ones. datatrove gives whole files to its tasks."""
    folder.mkdir()
    lines = data.splitlines(keepends=True)
    for i, (first, last) in enumerate(((0, 90), (90, 93), (93, 96), (96, 100))):
        part = lines[len(lines) * first // 100 : len(lines) * last // 100]
        (folder / f"{i}.jsonl").write_bytes(b"".join(part))
    size = max(path.stat().st_size for path in folder.iterdir())
    ours = measure(seconds_of_pieces, folder, size // 24).result
    whole = measure(seconds_of_pieces, folder, size).result
    ideal = sum(ours) / 2
    fast, slow = makespan(ours, 2), makespan(whole, 2)
    return Contest(
        step="one file with 90 % of the bytes, three small ones, two workers",
        metric="seconds until both are done (of CPU seconds a piece, longest first)",
        peer=f"whole files, as {PEER} gives them to its tasks",
        ours=fast,
        theirs=slow,
        target="1.7 times sooner, within 10 % of the ideal",
        reached=slow >= 1.7 * fast and fast <= 1.1 * ideal,
        note=f"{len(ours)} pieces; {slow / fast:.2f} times sooner, {fast / ideal - 1:.1%} above the ideal",
    )


def contests(corpus: Path) -> list[Contest]:
    lines = [json.dumps({"id": str(i), "text": f"document {i} " * 20, "url": ""}).encode() for i in range(N_LINES)]
    broken = lines[BAD_LINE].replace(b"document", b"d\xffcument", 1)
    bad = b"\n".join([*lines[:BAD_LINE], broken, *lines[BAD_LINE + 1 :]])
    packed = gzip.compress(b"\n".join(lines) + b"\n")
    cut = packed[: len(packed) * 3 // 4]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        n_mb = write_files(corpus, folder)
        rows = [speed(folder / suffix, n_mb) for suffix in FORMATS]
        rows.append(survivors(folder / "bad", "a.jsonl", bad, N_LINES - 1, "one invalid byte in 2,000 lines"))
        rows.append(uneven_files(folder / "uneven", (folder / "jsonl/a.jsonl").read_bytes()))
        rows.append(survivors(folder / "cut", "a.jsonl.gz", cut, whole_lines(cut), "gzip cut at three quarters"))
    return rows


def whole_lines(cut: bytes) -> int:
    """Whole lines in what is left of a gzip stream."""
    return zlib.decompressobj(wbits=31).decompress(cut).count(b"\n")
