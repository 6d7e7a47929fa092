"""What 100 billion tokens mean for the parts that see all of a run at once: on sparse or made-up files of that size.

The manifest and its shards, the plans of the stages, the duplicates among all documents, the cut of a source and its
shards, and one shard gathered from many pieces: seconds and memory. There are no peers; each has a limit to keep.
"""

import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np

from curation.contests.measure import Contest, Measured, measure, peak_rss_mb
from curation.dedup import mixed, survivors
from curation.executors import Group, Share, Stage, pending
from curation.mixture import cut
from curation.recipe import MinHash
from curation.shards import SHARD, ShardHeader, open_stream, read_manifest, shard_prefix, write_manifest
from curation.sources import FilePart, InputFile, Piece
from curation.steps import TABLE, TRAIN, DecideFates, PlanShards, ShardWriter
from curation.work import Task, key_of, planned, task_folder, write_plan

N_SHARDS, SHARD_TOKENS, SHARD_DOCUMENTS = 1500, 1 << 26, 54_000
N_PIECES = 5000  # of all sources, and
SOURCE_PIECES = 3000  # of one
N_DOCUMENTS = 10**7  # of the duplicates and of the cut; what 100 billion tokens have is ten times that
TIMES = 10
PIECES, PIECE_DOCUMENTS = 250, 17_000  # of which one shard is gathered
DECIDED = 600  # documents in each of N_PIECES whose fates are decided
OPEN_FILES = 1024  # at once, what most systems allow a process
BANDS = MinHash().bands
HASH = "0" * 64
HEADER = ShardHeader(source="web", split="train", vocab_size=50_304, separator_id=0, tokenizer_sha256=HASH)


def contests(corpus: Path) -> list[Contest]:
    """The corpus is not needed: sizes are what counts."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        return [
            *opening(folder / "data"),
            *planning(folder / "work"),
            duplicates(),
            fates_of_pieces(folder / "fates"),
            *cutting(),
            gathering(folder / "gather"),
        ]


def row(step: str, metric: str, ours: float, limit: float, note: str) -> Contest:
    return Contest(
        step=step, metric=metric, peer="", ours=ours, theirs=None, target=f"at most {limit:g}", reached=ours <= limit,
        note=note,
    )  # fmt: skip


# ---- the data folder


def sparse_folder(folder: Path) -> None:
    """N_SHARDS shards that are only as long as they say, and their manifest."""
    (folder / "train").mkdir(parents=True)
    names = [f"train/web-{i:05d}{SHARD}" for i in range(N_SHARDS)]
    tables = {"ids": (SHARD_DOCUMENTS, 2), "starts": (SHARD_DOCUMENTS,)}
    prefix = shard_prefix(HEADER, tables, SHARD_TOKENS)
    size = len(prefix) + SHARD_DOCUMENTS * 24 + SHARD_TOKENS * 2
    for name in names:
        with open(folder / name, "wb") as file:
            file.write(prefix)
            file.truncate(size)
    counts = {"documents": N_SHARDS * SHARD_DOCUMENTS, "tokens": N_SHARDS * SHARD_TOKENS, "text_bytes": 1}
    tokenizer = {"file": "tokenizer.model", "sha256": HASH, "vocab_size": 50_304, "separator_id": 0}
    splits = {"train": {**counts, "sources": {"web": {**counts, "shards": names}}}}
    files = {name: {"bytes": size, "sha256": HASH} for name in names}
    write_manifest(folder, {"tokenizer": tokenizer, "splits": splits}, files)


def open_folder(folder: Path) -> tuple[float, float, float, float]:
    """Seconds of the manifest, of the stream, of a first batch, and MB that all of it took."""
    before, start = peak_rss_mb(), time.perf_counter()
    read_manifest(folder)
    read = time.perf_counter()
    stream = open_stream(folder, "train")
    opened = time.perf_counter()
    stream.read_rows(np.random.default_rng(0).integers(0, stream.n_tokens - 4096, 64), 4096)
    return read - start, opened - read, time.perf_counter() - opened, peak_rss_mb() - before


def opening(folder: Path) -> list[Contest]:
    sparse_folder(folder)
    manifest_s, stream_s, batch_s, n_mb = measure(open_folder, folder).result
    size = (folder / "manifest.json").stat().st_size
    what = f"{N_SHARDS:,} shards, {N_SHARDS * SHARD_TOKENS / 1e9:.0f} billion tokens"
    return [
        row(f"read the manifest of {what}", "seconds", manifest_s, 0.2, f"{size / 1e6:.2f} MB"),
        row(f"open {what}", "seconds", stream_s, 2, f"{n_mb:.0f} MB, 64 rows of 4,096 tokens in {batch_s:.3f} s"),
    ]


# ---- plans


def piece_of(number: int) -> Piece:
    file = InputFile(name=f"sample/100BT/{number:05d}.parquet", path=f"hf://{number}", size_bytes=2**31, digest=HASH)
    return Piece(source="web", parts=(FilePart(file=file, start=0, stop=40, size_bytes=64_000_000 + number),))


def plan_pieces(work: Path) -> tuple[float, float]:
    """Seconds to make and write the plan of the stage `read`, and for each task to find its own in it."""
    start = time.perf_counter()
    pieces = [piece_of(i) for i in range(N_PIECES)]
    tasks = [
        Task(key=key_of(["read", p.key]), size_bytes=p.size_bytes, values={"piece": p.values(), "name": p.name})
        for p in pieces
    ]
    stage = Stage(name="read", groups=[Group(name="web", tasks=tasks, pipeline=lambda plan: [])])
    [(_, plan, left)] = pending(stage, work, Share())
    made = time.perf_counter()
    for rank in range(20):
        planned(plan, rank, len(left))
    return made - start, (time.perf_counter() - made) / 20


def plan_shards(work: Path) -> tuple[float, float]:
    """MB of the plan of the stage `shards`, each of whose tasks names every piece, and seconds to read it."""
    keys = [key_of(i) for i in range(SOURCE_PIECES)]
    common = {"source": "web", "split": "train", "pieces": keys, "from": 0, "to": 1}
    path = work / "plans" / "shards.json"
    write_plan(path, [Task(key=keys[i], size_bytes=1 << 27, values=common) for i in range(N_SHARDS // 2)])
    start = time.perf_counter()
    planned(path, 0, N_SHARDS // 2)
    return path.stat().st_size / 1e6, time.perf_counter() - start


def planning(work: Path) -> list[Contest]:
    made, found = measure(plan_pieces, work).result
    shards = measure(plan_shards, work)
    n_mb, read = shards.result
    return [
        row(f"plan {N_PIECES:,} pieces", "seconds", made, 2, f"each task finds its own in {found * 1e3:.0f} ms"),
        row(
            f"plan {N_SHARDS // 2} shards of {SOURCE_PIECES:,} pieces", "seconds for each task to read it", read, 5,
            f"{n_mb:.0f} MB, {shards.peak_rss_mb:.0f} MB of memory",
        ),
    ]  # fmt: skip


# ---- duplicates


def made_up() -> tuple[np.ndarray, np.ndarray]:
    """Digests and ranks of N_DOCUMENTS, of which a twentieth are exact duplicates."""
    numbers = np.arange(N_DOCUMENTS, dtype=np.uint64)
    numbers[::20] = numbers[7]
    numbers[::20] += np.arange(len(numbers[::20]), dtype=np.uint64) * np.uint64(20) + np.uint64(1)
    return np.stack([mixed(numbers), mixed(numbers + np.uint64(1))], axis=1), mixed(
        np.arange(N_DOCUMENTS, dtype="<u8")
    )


def bands_of() -> Iterator[np.ndarray]:
    """In each band a tenth of the documents share a key with the one before."""
    for band in range(BANDS):
        numbers = np.arange(N_DOCUMENTS, dtype=np.uint64)
        numbers[1::10] -= np.uint64(1)
        yield mixed(numbers + np.uint64(band << 40))


def find_survivors(given: tuple[np.ndarray, np.ndarray]) -> tuple[int, float]:
    before = peak_rss_mb()
    _, stays = survivors(given[0], bands_of(), given[1])
    return int((stays != np.arange(len(stays))).sum()), peak_rss_mb() - before


def duplicates() -> Contest:
    run = measure(find_survivors, prepare=made_up)
    found, n_mb = run.result
    each = n_mb * 1e6 / N_DOCUMENTS
    return row(
        f"duplicates among {N_DOCUMENTS * TIMES:.0e} documents (of {N_DOCUMENTS:.0e})", "CPU minutes",
        TIMES * run.cpu_s / 60, 15,
        f"{found:,} found; {N_DOCUMENTS / run.cpu_s:,.0f} documents a CPU second; {each:.0f} bytes a document beside "
        f"digests and ranks: {TIMES * n_mb / 1e3:.1f} GB",
    )  # fmt: skip


def write_prints(folder: Path) -> None:
    random = np.random.default_rng(0)
    tasks = []
    for number in range(N_PIECES):
        key = key_of(number)
        place = task_folder(folder, "read", key)
        place.mkdir(parents=True)
        columns = {name: random.integers(0, 1 << 63, (DECIDED, 2)).astype(np.uint64) for name in ("ids", "sketches")}
        digests = random.integers(0, 1 << 63, (DECIDED, 2)).astype(np.uint64)
        np.savez(place / "fingerprints.npz", digests=digests, sizes=np.full(DECIDED, 4000), **cast(Any, columns))
        np.save(place / "keys.npy", random.integers(0, 1 << 63, (BANDS, DECIDED)).astype(np.uint64))
        tasks.append(("web", key))
    write_plan(folder / "plan.json", [Task(key=key_of("all"), size_bytes=1, values={"pieces": tasks})])


def decide(folder: Path) -> float:
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
    before = peak_rss_mb()
    DecideFates(folder, folder / "plan.json", MinHash(), True, 0.05, 20, ("web",)).run()
    return peak_rss_mb() - before


def fates_of_pieces(folder: Path) -> Contest:
    """The whole step; what it costs a piece, not a document."""
    write_prints(folder)
    try:
        run = measure(decide, folder)
    except RuntimeError as error:
        return row(f"fates of the documents of {N_PIECES:,} pieces", "seconds", np.inf, 60, str(error))
    n = N_PIECES * DECIDED
    return row(
        f"fates of the documents of {N_PIECES:,} pieces", "CPU seconds", run.cpu_s, 60,
        f"{n:,} documents; {run.result * 1e6 / n:.0f} bytes of memory for each",
    )  # fmt: skip


# ---- the cut of a source and its shards


def source_columns() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    lengths = random.integers(100, 2400, N_DOCUMENTS)
    return {"order": mixed(np.arange(N_DOCUMENTS, dtype=np.uint64)), "lengths": lengths, "text_bytes": 4 * lengths}


def find_cut(columns: dict[str, np.ndarray]) -> float:
    before = peak_rss_mb()
    cut(columns["order"], columns["lengths"], int(columns["lengths"].sum()) * 9 // 10)
    return peak_rss_mb() - before


def find_shards(columns: dict[str, np.ndarray]) -> tuple[int, float]:
    before = peak_rss_mb()
    shards = PlanShards(Path(), Path(), SHARD_TOKENS).shards_of(columns)
    return len(shards["edges"]), peak_rss_mb() - before


def cutting() -> list[Contest]:
    what = f"of {N_DOCUMENTS * TIMES:.0e} documents (of {N_DOCUMENTS:.0e})"
    by_cut: Measured = measure(find_cut, prepare=source_columns)
    by_shards: Measured = measure(find_shards, prepare=source_columns)
    n_shards, n_mb = by_shards.result
    return [
        row(
            f"cut a source {what}", "CPU seconds", TIMES * by_cut.cpu_s, 30,
            f"{TIMES * by_cut.result / 1e3:.1f} GB beside its columns",
        ),
        row(
            f"the shards of a source {what}", "CPU seconds", TIMES * by_shards.cpu_s, 60,
            f"{TIMES * n_shards:,} shards; {TIMES * n_mb / 1e3:.1f} GB beside its columns",
        ),
    ]  # fmt: skip


# ---- one shard from many pieces


def write_pieces(folder: Path) -> None:
    """The tokens of a piece under the names of all of them, and a table of its own for each."""
    random = np.random.default_rng(0)
    lengths = random.integers(200, 1800, PIECE_DOCUMENTS)
    starts = np.cumsum(lengths) - lengths
    tokens = random.integers(1, 50_000, int(lengths.sum())).astype(np.uint16)
    tokens[starts] = 0
    keys = [key_of(number) for number in range(PIECES)]
    first = task_folder(folder, "tokens", keys[0]) / "tokens.bin"
    for number, key in enumerate(keys):
        place = task_folder(folder, "tokens", key)
        place.mkdir(parents=True)
        if number:
            (place / "tokens.bin").hardlink_to(first)
        else:
            tokens.tofile(first)
        columns = {
            "fate": np.full(PIECE_DOCUMENTS, TRAIN),
            "order": np.sort(random.integers(0, 1 << 63, PIECE_DOCUMENTS)),
            "id_first": random.integers(0, 1 << 63, PIECE_DOCUMENTS),
            "id_second": random.integers(0, 1 << 63, PIECE_DOCUMENTS),
            "start": starts,
            "length": lengths,
            "text_bytes": 4 * lengths,
        }
        np.save(place / "table.npy", np.stack([columns[name] for name in TABLE]).astype(np.uint64))
    stop = (1 << 63) * SHARD_TOKENS // (PIECES * len(tokens))
    values = {"source": "web", "split": "train", "pieces": keys, "from": 0, "to": stop}
    write_plan(folder / "plan.json", [Task(key=key_of("shard"), size_bytes=1, values=values)])


def gather(folder: Path) -> float:
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
    before = peak_rss_mb()
    ShardWriter(folder, folder / "plan.json", HEADER).run()
    return peak_rss_mb() - before


def gathering(folder: Path) -> Contest:
    write_pieces(folder)
    run = measure(gather, folder)
    shard = task_folder(folder, "shards", key_of("shard")) / f"shard{SHARD}"
    n_mb = shard.stat().st_size / 1e6
    return row(
        f"gather a shard from {PIECES} pieces", "CPU seconds", run.cpu_s, 10,
        f"{n_mb:.0f} MB, {n_mb / run.cpu_s:.0f} MB/s with its sha256; {run.result:.0f} MB of memory",
    )  # fmt: skip
