"""The run as a whole against datatrove's executors, its check of a data set, and its steps one after the other.

Scheduling, bad input, killed workers, changed inputs, checking of shards, memory, and the way from text to shards.
Where a tokenizer is needed, both sides use one tokenizer.json, trained here.
"""

import gzip
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import zstandard
from datatrove.data import Document
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from curation.contests.measure import Contest, cpu_seconds, measure
from curation.executors import Group, Share, Stage, pending, run_local
from curation.filters import FINEWEB, GopherQuality, Language, Url, stock_of
from curation.inputs import find_pieces
from curation.recipe import RECIPES, Settings
from curation.shards import (
    SHARD,
    ShardHeader,
    file_entry,
    id_hash,
    open_shard,
    read_manifest,
    verify,
    write_manifest,
    write_shard,
)
from curation.sources import MB, OWN, list_files, make_pieces
from curation.stages import Run, build, run_stage
from curation.steps import TABLE, Ledger, PieceReader
from curation.tokenizer import SEPARATOR, load_tokenizer
from curation.work import Task, task_folder
from curation.workers import Worker, run_task, worker_processes

PEER = f"datatrove {version('datatrove')}"
VOCABULARY = 8192
SCHEDULED_MB = 16  # of text that two workers share, most of it in one file
MB_PER_SECOND = 1.0  # of a worker there
N_LINES = 2_000
PATIENCE_S = 20.0  # with a run that goes on without its killed worker
VERIFIED_MB = 1024
DAMAGED_TOKENS = 40_000
LONG_MB, N_SHORT = 20, 2_000  # of one document, and how many others there are beside it
OURS_MB, STOCK_MB = 20, 2  # from text to shards: the peer takes a part of the same documents
# What both have: the lists of addresses and the model of languages are other contests.
CHAIN = tuple(rule for rule in FINEWEB if not isinstance(rule, Url | Language))


def contests(corpus: Path) -> list[Contest]:
    """corpus: folder of <kind>/*.jsonl.zst with a column "text"."""
    texts = texts_of(corpus, 64)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = folder / "tokenizer.json"
        train_tokenizer_json(texts[:600], tokenizer)
        return [
            uneven_files(folder / "uneven", texts),
            bad_lines(folder / "bad", texts),
            all_bad_input(folder / "damaged", texts),
            killed_worker(folder / "killed", texts),
            changes(folder / "changes", texts),
            nothing_to_do(folder / "nothing", texts),
            verifying(folder / "verify", tokenizer),
            damage(folder / "damage", tokenizer),
            memory(folder / "memory", texts, tokenizer),
            from_text_to_shards(folder / "whole", texts, tokenizer),
        ]


# ---- what they work on


def texts_of(corpus: Path, n_mb: float) -> list[str]:
    """About so much text: every so-manieth document of all files, shuffled."""
    files = sorted(corpus.glob("*/*.jsonl.zst"))
    texts = []
    for path in files:
        with zstandard.open(path, "rb") as file:
            texts += [orjson.loads(line)["text"] for line in file.read().splitlines()]
    random.Random(0).shuffle(texts)
    return taken(texts, n_mb)


def taken(texts: Sequence[str], n_mb: float) -> list[str]:
    """The first documents that hold so much."""
    room, n = n_mb * MB, 0
    while room > 0 and n < len(texts):
        room -= len(texts[n].encode())
        n += 1
    return list(texts[:n])


def megabytes(texts: Sequence[str]) -> float:
    return sum(len(text.encode()) for text in texts) / MB


def lines_of(texts: Sequence[str]) -> list[bytes]:
    return [orjson.dumps({"text": text}, option=orjson.OPT_APPEND_NEWLINE) for text in texts]


def write_rows(path: Path, texts: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(lines_of(texts)))


def train_tokenizer_json(texts: Sequence[str], path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))


def quiet() -> None:
    """Both sides' logs and lines go nowhere: for the processes of a measurement."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.dup2(nowhere, sys.stderr.fileno())


def do_all(steps: Sequence[Any], logs: Path, tasks: int = 1) -> None:
    """All tasks of a pipeline, in this process."""
    executor = LocalPipelineExecutor(list(steps), tasks=tasks, logging_dir=str(logs), skip_completed=False)
    for rank in range(tasks):
        run_task(executor, rank)


def own_run(texts: Path, work: Path, **chosen: Any) -> Run:
    settings = Settings.chosen("own", input=str(texts), **chosen)
    return Run(settings=settings, work=work, pieces=find_pieces(settings, None, work))


def do_stage(run: Run, stage: Stage) -> None:
    for group, plan, tasks in pending(stage, run.work, Share()):
        do_all(group.pipeline(plan), run.work / "log", len(tasks))


# ---- scheduling


class Paced(PipelineStep):
    """Takes its time for each document, by its size, without the processor; notes when a task began and ended.

    `dies`: a file; the first process that comes to the 50th document of a task makes it, and kills itself.
    """

    type = "bench"
    name = "paced"

    def __init__(self, log: Path, mb_per_second: float, dies: Path | None = None):
        super().__init__()
        self.log = log
        self.mb_per_second = mb_per_second
        self.dies = dies

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> None:
        started = due = time.monotonic()
        n = 0
        for n, document in enumerate(data, 1):
            due += len(document.text.encode()) / MB / self.mb_per_second
            if (rest := due - time.monotonic()) > 0.01:
                time.sleep(rest)
            if self.dies is not None and n == 50 and not self.dies.exists():
                self.dies.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        with open(self.log, "a") as log:
            log.write(f"{started} {time.monotonic()} {n}\n")


def paced_ours(texts: Path, piece_bytes: int, work: Path, dies: Path | None) -> None:
    source = replace(OWN, folder=str(texts))
    pieces = make_pieces(source, list_files(source), piece_bytes)
    tasks = [
        Task(key=piece.key, size_bytes=piece.size_bytes, values={"piece": piece.values(), "name": piece.name})
        for piece in pieces
    ]

    def stage(log: Path, some: list[Task], mb_per_second: float, dies: Path | None) -> Stage:
        def steps(plan: Path) -> list[PipelineStep]:
            return [PieceReader(source, work, plan, Ledger(False)), Paced(log, mb_per_second, dies)]

        return Stage(name="paced", groups=[Group(name="all", tasks=some, pipeline=steps)])

    quiet()
    with worker_processes(2, work) as workers:  # they live through all stages: the first tasks' imports do not count
        run_local(stage(work / "first", tasks[:2], 1000, None), work, Share(), workers)
        run_local(stage(work / "times", tasks, MB_PER_SECOND, dies), work, Share(), workers)
        for worker in workers:
            worker.pool.shutdown()


def paced_stock(texts: Path, tasks: int, work: Path, dies: Path | None) -> None:
    from datatrove.pipeline.readers import JsonlReader

    quiet()
    steps = [JsonlReader(str(texts)), Paced(work / "times", MB_PER_SECOND, dies)]
    LocalPipelineExecutor(steps, tasks=tasks, workers=2, logging_dir=str(work / "log")).run()


def makespan(work: Path) -> tuple[float, int]:
    """Seconds from the first task's beginning to the last one's end, and documents of the tasks that ended."""
    rows = [line.split() for line in (work / "times").read_text().splitlines()]
    ends = [float(end) for _, end, n in rows if int(n)]
    return max(ends) - min(float(start) for start, _, n in rows if int(n)), sum(int(n) for _, _, n in rows)


def uneven_files(folder: Path, texts: Sequence[str]) -> Contest:
    """One file with more than nine tenths of the bytes, three small ones."""
    some = taken(texts, SCHEDULED_MB)
    edges = [0, *(len(some) * percent // 100 for percent in (94, 96, 98, 100))]
    for i, (first, last) in enumerate(zip(edges, edges[1:], strict=False)):
        write_rows(folder / f"in/{i}.jsonl", some[first:last])
    sizes = [megabytes(some[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    for name in ("ours", "stock"):
        (folder / name).mkdir()
    measure(paced_ours, folder / "in", int(sum(sizes) * MB / 32), folder / "ours", None)
    measure(paced_stock, folder / "in", 16, folder / "stock", None)
    (fast, n), (slow, n_stock) = makespan(folder / "ours"), makespan(folder / "stock")
    ideal = sum(sizes) / MB_PER_SECOND / 2
    return Contest(
        step=f"one file with {max(sizes) / sum(sizes):.0%} of the bytes, three small ones, two workers",
        metric=f"seconds of a step that takes {1 / MB_PER_SECOND:g} s for each MB, first to last",
        peer=f"{PEER} LocalPipelineExecutor(tasks=16, workers=2)",
        ours=fast,
        theirs=slow,
        target="within 10 % of the ideal, 1.7 times sooner",
        reached=fast <= 1.1 * ideal and slow >= 1.7 * fast and n == n_stock == len(some),
        note=f"ideal {ideal:.2f} s, ours {fast / ideal - 1:+.1%}; {slow / fast:.2f} times sooner; pieces of "
        f"{sum(sizes) / 32:.1f} MB; the step sleeps, so that other users of the machine do not count",
    )


# ---- bad input


def read_ours(texts: Path, work: Path) -> dict[str, Any]:
    """The ledger of a run's first stage."""
    quiet()
    run = own_run(texts, work)
    run_stage(run, "read", partial(do_stage, run))
    (ledgers,) = run.ledgers().values()
    dropped: dict[str, int] = {}
    for ledger in ledgers:
        for rule, counts in ledger["dropped"].items():
            dropped[rule] = dropped.get(rule, 0) + counts["documents"]
    return {
        "in": sum(ledger["documents_in"] for ledger in ledgers),
        "kept": sum(ledger["kept"]["documents"] for ledger in ledgers),
        "dropped": dict(sorted(dropped.items())),
    }


def read_stock(texts: Path) -> tuple[int, list[str]]:
    """Documents that JsonlReader gives, each file a task of its own, and the errors that ended tasks."""
    from datatrove.pipeline.readers import JsonlReader

    quiet()
    reader = JsonlReader(str(texts), glob_pattern="*.jsonl*")
    n, errors = 0, []
    tasks = len(list(texts.iterdir()))
    for rank in range(tasks):
        try:
            for _ in reader.run(None, rank, tasks):
                n += 1
        except Exception as error:
            errors.append(type(error).__name__)
    return n, errors


def survival(step: str, folder: Path, good: int, problems: dict[str, int]) -> Contest:
    ours = measure(read_ours, folder / "in", folder / "work").result
    stock, errors = measure(read_stock, folder / "in").result
    adds_up = ours["in"] == ours["kept"] + sum(ours["dropped"].values())
    counted = ", ".join(f"{rule} {n}" for rule, n in ours["dropped"].items())
    died = f"; {PEER} ends {len(errors)} tasks with {', '.join(sorted(set(errors)))}" if errors else ""
    return Contest(
        step=step,
        metric="good documents that are read",
        peer=f"{PEER} JsonlReader",
        ours=ours["kept"],
        theirs=stock,
        target=f"all {good:,}, and every other one counted by its kind",
        reached=ours["kept"] == good and ours["dropped"] == problems and adds_up,
        note=f"{ours['in']:,} read = {ours['kept']:,} kept + {counted}{died}",
    )


def bad_lines(folder: Path, texts: Sequence[str]) -> Contest:
    lines = lines_of([text[:400] for text in texts[:N_LINES]])
    lines[490] = lines[490].replace(b'"text":"', b'"text":"\xff')
    (folder / "in").mkdir(parents=True)
    (folder / "in/a.jsonl").write_bytes(b"".join(lines))
    return survival("one invalid byte in 2,000 lines", folder, N_LINES - 1, {"invalid_utf8": 1})


def all_bad_input(folder: Path, texts: Sequence[str]) -> Contest:
    """Ten files of 200 lines: four good ones and six with something wrong, each in another way."""
    parts = [lines_of([text[:400] for text in texts[i * 200 : i * 200 + 200]]) for i in range(10)]
    parts[1][20] = parts[1][20].replace(b'"text":"', b'"text":"\xff')
    parts[2][30] = parts[2][30][:-5] + b"\n"
    parts[3][40] = parts[3][40].replace(b'"text":', b'"body":')
    gz = gzip.compress(b"".join(parts[4]))
    gz = gz[: len(gz) * 3 // 4]
    zst = b"".join(zstandard.compress(b"".join(parts[5][i : i + 50])) for i in range(0, 200, 50))  # four frames
    files = {f"{i}.jsonl": b"".join(part) for i, part in enumerate(parts) if i not in (4, 5)}
    files |= {"4.jsonl.gz": gz, "5.jsonl.zst": zst[:-100], "empty.jsonl": b""}
    (folder / "in").mkdir(parents=True)
    for name, data in files.items():
        (folder / "in" / name).write_bytes(data)
    good = 8 * 200 - 3 + zlib.decompressobj(wbits=31).decompress(gz).count(b"\n") + 150
    problems = ("broken_json", "empty_file", "invalid_utf8", "truncated_gzip", "truncated_zstd", "wrong_column")
    step = "an invalid byte, broken JSON, a wrong column, cut gzip, cut zstd, an empty file, among good ones"
    return survival(step, folder, good, dict.fromkeys(problems, 1))


# ---- killed workers, changes, nothing to do


def killed_worker(folder: Path, texts: Sequence[str]) -> Contest:
    """One worker of two is killed, as the system does when memory is short."""
    some = taken(texts, 4)
    for i in range(4):
        write_rows(folder / f"in/{i}.jsonl", some[i::4])
    for name in ("ours", "stock"):
        (folder / name).mkdir()
    done = measure(paced_ours, folder / "in", MB, folder / "ours", folder / "ours/died")
    _, n = makespan(folder / "ours")
    process = multiprocessing.get_context("spawn").Process(
        target=in_own_session, args=(paced_stock, folder / "in", 4, folder / "stock", folder / "stock/died")
    )
    process.start()
    process.join(PATIENCE_S)
    hangs = process.is_alive()
    if hangs:
        os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
    _, n_stock = makespan(folder / "stock")
    waited = f"still waits after {PATIENCE_S:g} s" if hangs else f"ended with {process.exitcode}"
    return Contest(
        step="one of two workers is killed",
        metric="documents that are done in the end",
        peer=f"{PEER} LocalPipelineExecutor(tasks=4, workers=2)",
        ours=n,
        theirs=n_stock,
        target=f"all {len(some):,}",
        reached=n == len(some) and (folder / "ours/died").exists(),
        note=f"ours took {done.wall_s:.1f} s; {PEER} {waited}",
    )


def in_own_session(work: Callable[..., None], *arguments: Any) -> None:
    os.setsid()
    work(*arguments)


CHANGES = ("another option", "a file more", "a file less", "another number of tasks")


def change(name: str, texts: Path, more: Sequence[str]) -> None:
    if name == "a file more":
        write_rows(texts / "0-more.jsonl", more)
    elif name == "a file less":
        (texts / "1.jsonl").unlink()


def ours_after(name: str, folder: Path, more: Sequence[str], tokenizer: Path) -> bool:
    """Whether the data folder of a run before and after the change is that of a run that saw the latter alone."""
    quiet()

    def result(out: Path, piece_mb: float, heldout_percent: float) -> dict[str, bytes]:
        RECIPES["own"] = replace(RECIPES["own"], piece_mb=piece_mb)
        run = own_run(folder / "in", out / "work", tokenizer=str(tokenizer), heldout_percent=heldout_percent)
        build(run, out, partial(do_stage, run))
        return {
            path.relative_to(out).as_posix(): path.read_bytes()
            for path in out.rglob("*")
            if path.is_file() and path.name != "manifest.json" and "work" not in path.relative_to(out).parts
        }

    after = (0.02 if name == CHANGES[3] else 16, 9.0 if name == CHANGES[0] else 3.0)
    before = result(folder / "ours", 16, 3.0)
    change(name, folder / "in", more)
    wanted = result(folder / "fresh", *after)
    return wanted == result(folder / "ours", *after) and (wanted == before) == (name == CHANGES[3])


def stock_after(name: str, folder: Path, more: Sequence[str]) -> bool:
    from datatrove.pipeline.filters import LambdaFilter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    quiet()

    def result(out: Path, tasks: int, longest: int) -> list[str]:
        steps = [
            JsonlReader(str(folder / "in")),
            LambdaFilter(lambda document: len(document.text) < longest),
            JsonlWriter(str(out / "out"), compression=None),
        ]
        LocalPipelineExecutor(steps, tasks=tasks, workers=1, logging_dir=str(out / "log")).run()
        return sorted(
            json.loads(line)["text"] for path in (out / "out").iterdir() for line in path.read_bytes().splitlines()
        )

    after = (4 if name == CHANGES[3] else 2, 500 if name == CHANGES[0] else 10**9)
    result(folder / "stock", 2, 10**9)
    change(name, folder / "in", more)
    return result(folder / "stock", *after) == result(folder / "fresh", *after)


def changes(folder: Path, texts: Sequence[str]) -> Contest:
    some = [text[:2000] for text in texts[:500]]
    tokenizer = folder.parent / "tokenizer.json"
    right: dict[str, list[str]] = {"ours": [], "stock": []}
    for side, after in (("ours", partial(ours_after, tokenizer=tokenizer)), ("stock", stock_after)):
        for i, name in enumerate(CHANGES):
            place = folder / f"{side}-{i}"
            for n in range(4):
                write_rows(place / f"in/{n}.jsonl", some[n * 100 : n * 100 + 100])
            if measure(after, name, place, some[400:]).result:
                right[side].append(name)
    wrong = [name for name in CHANGES if name not in right["stock"]]
    return Contest(
        step="run again in the same folder after a change",
        metric="changes of 4 after which the output is that of a run from nothing",
        peer=f"{PEER} LocalPipelineExecutor, same logging_dir",
        ours=len(right["ours"]),
        theirs=len(right["stock"]),
        target="all 4",
        reached=len(right["ours"]) == 4,
        note=f"changes: {', '.join(CHANGES)}; {PEER} is wrong after: {', '.join(wrong) or 'none'}",
    )


STOCK_COPY = """
import sys
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
steps = [JsonlReader(sys.argv[1]), JsonlWriter(sys.argv[2] + "/out")]
LocalPipelineExecutor(steps, tasks=2, workers=1, logging_dir=sys.argv[2] + "/log").run()
"""


def nothing_to_do(folder: Path, texts: Sequence[str]) -> Contest:
    for n in range(2):
        write_rows(folder / f"in/{n}.jsonl", taken(texts[n::2], 1))
    ours = [sys.executable, "-m", "curation.pipeline", "--recipe", "own", "--input", str(folder / "in")]
    ours += ["--out", str(folder / "ours"), "--tokenizer", str(folder.parent / "tokenizer.json"), "--workers", "2"]
    stock = [sys.executable, "-c", STOCK_COPY, str(folder / "in"), str(folder / "stock")]
    for command in (ours, stock):
        run_command(command)
    again = [measure(run_command, command) for command in (ours, stock)]
    return Contest(
        step="run again with nothing to do",
        metric="CPU seconds, imports included",
        peer=f"{PEER} LocalPipelineExecutor",
        ours=again[0].cpu_s,
        theirs=again[1].cpu_s,
        target="under 2 s, by the clock too",
        reached=again[0].wall_s < 2 and "nothing to do" in again[0].result,
        note=f"by the clock {again[0].wall_s:.2f} s against {again[1].wall_s:.2f} s",
    )


def run_command(command: Sequence[str]) -> str:
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout


# ---- checking shards


def write_data_folder(folder: Path, tokenizer: Path, shards: Sequence[np.ndarray], n_documents: int) -> None:
    """A data folder whose shards hold these tokens, cut into documents of equal length by separators (0)."""
    loaded = load_tokenizer(tokenizer)
    header = ShardHeader(
        source="web",
        split="train",
        vocab_size=loaded.vocab_size,
        separator_id=loaded.separator_id,
        tokenizer_sha256=loaded.sha256,
    )
    (folder / "train").mkdir(parents=True)
    names = []
    for i, tokens in enumerate(shards):
        rows = tokens.reshape(n_documents, -1)
        rows[:, 0] = loaded.separator_id
        ids = np.stack([id_hash(f"web/{i}/{n}") for n in range(n_documents)])
        names.append(f"train/web-{i:05d}{SHARD}")
        write_shard(folder / names[-1], header, ids, np.full(n_documents, rows.shape[1]), iter(rows))
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    sign(folder, names, n_documents, sum(tokens.size for tokens in shards), header)


def sign(folder: Path, names: Sequence[str], n_documents: int, n_tokens: int, header: ShardHeader) -> None:
    """A manifest of what is in the folder now."""
    counts = {"documents": n_documents * len(names), "tokens": n_tokens, "text_bytes": 4 * n_tokens}
    none = {"documents": 0, "tokens": 0, "text_bytes": 0}
    content = {
        "tokenizer": {
            "file": "tokenizer.json",
            "sha256": header.tokenizer_sha256,
            "vocab_size": header.vocab_size,
            "separator_id": header.separator_id,
        },
        "splits": {
            "train": counts | {"sources": {"web": counts | {"shards": list(names)}}},
            "heldout": none | {"sources": {}},
        },
    }
    files = {name: file_entry(folder / name) for name in ("tokenizer.json", *names) if (folder / name).exists()}
    write_manifest(folder, content, files)


def write_stock_folder(folder: Path, tokens: np.ndarray, n_documents: int, separator_id: int) -> None:
    """The same tokens as datatrove keeps them: the separator behind each document, an index of ends."""
    folder.mkdir(parents=True)
    rows = tokens.reshape(n_documents, -1)
    rows[:, -1] = separator_id
    rows.tofile(folder / "web.ds")
    (np.arange(1, n_documents + 1, dtype="<u8") * rows.shape[1]).tofile(folder / "web.ds.index")


def verify_ours(folder: Path) -> float:
    """CPU seconds of checking everything with one thread."""
    quiet()
    start = cpu_seconds()
    verify(folder, 1)
    return cpu_seconds() - start


def verify_stock(folder: Path, tokenizer: Path) -> float:
    from datatrove.io import get_datafolder
    from datatrove.tools.check_dataset import check_dataset

    quiet()
    start = cpu_seconds()
    check_dataset(get_datafolder(str(folder)), str(tokenizer), SEPARATOR)
    return cpu_seconds() - start


def made_tokens(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, VOCABULARY, n, np.uint16)


def verifying(folder: Path, tokenizer: Path) -> Contest:
    n_documents, length = 1 << 17, 1 << 10
    shards = [made_tokens(n_documents * length, seed) for seed in range(VERIFIED_MB * (1 << 20) // 2 // (1 << 27))]
    write_data_folder(folder / "ours", tokenizer, shards, n_documents)
    write_stock_folder(folder / "stock", np.concatenate(shards), n_documents * len(shards), 0)
    n_mb = sum(path.stat().st_size for path in (folder / "ours").rglob("*") if path.is_file()) / MB
    stock_mb = sum(path.stat().st_size for path in (folder / "stock").iterdir()) / MB
    ours = n_mb / measure(verify_ours, folder / "ours").result
    stock = stock_mb / measure(verify_stock, folder / "stock", tokenizer).result
    shutil.rmtree(folder)
    return Contest(
        step="check shards",
        metric="MB per CPU second, one thread, files in memory",
        peer=f"{PEER} check_dataset",
        ours=ours,
        theirs=stock,
        target="at least 500 MB/s",
        reached=ours >= 500,
        note=f"{n_mb:,.0f} MB; ours hashes every byte and looks at every document, the peer at the last token of each",
    )


def flip_bit(data: bytes) -> bytes:
    middle = len(data) * 3 // 5
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "bit flip": flip_bit,
    "truncation": lambda data: data[:-1000],
    "empty shard": lambda data: b"",
}


def found_ours(folder: Path) -> bool:
    quiet()
    try:
        verify(folder, 1)
    except (ValueError, FileNotFoundError):
        return True
    return False


def found_stock(folder: Path, tokenizer: Path) -> bool:
    try:
        verify_stock(folder, tokenizer)
    except Exception:
        return True
    return False


def damage(folder: Path, tokenizer: Path) -> Contest:
    """Each kind of damage, to files of the same tokens.

    Tokens of another width or another tokenizer are as their writer left them, and signed for in our manifest.
    """
    kinds = (*DAMAGES, "wrong dtype", "wrong tokenizer")
    tokens = made_tokens(DAMAGED_TOKENS, 0)
    n_documents = 100
    found: dict[str, list[str]] = {"ours": [], "stock": []}
    for name in ("nothing", *kinds):
        ours, stock = folder / name / "ours", folder / name / "stock"
        write_data_folder(ours, tokenizer, [tokens.copy(), made_tokens(DAMAGED_TOKENS, 1)], n_documents)
        write_stock_folder(stock, tokens.copy(), n_documents, 0)
        shard, peer_shard, peer_tokenizer = ours / f"train/web-00000{SHARD}", stock / "web.ds", tokenizer
        if name in DAMAGES:
            for path in (shard, peer_shard):
                path.write_bytes(DAMAGES[name](path.read_bytes()))
        elif name == "wrong dtype":
            header = ShardHeader(**{**vars(open_shard(shard).header), "vocab_size": 100_000})
            rows = tokens.reshape(n_documents, -1).astype("<u4")
            rows[:, 0] = header.separator_id
            ids = open_shard(shard).ids.copy()
            write_shard(shard, header, ids, np.full(n_documents, rows.shape[1]), iter(rows))
            np.fromfile(peer_shard, "<u2").astype("<u4").tofile(peer_shard)
            sign_again(ours)
        elif name == "wrong tokenizer":
            peer_tokenizer = ours / "tokenizer.json"
            train_tokenizer_json(["other text than before, and little of it"] * 50, peer_tokenizer)
            sign_again(ours)
        found["ours"] += [name] * measure(found_ours, ours).result
        found["stock"] += [name] * measure(found_stock, stock, peer_tokenizer).result

    write_stock_folder(folder / "wide", tokens.astype("<u4"), n_documents, 0)
    refused = measure(found_stock, folder / "wide", tokenizer).result
    missed = [name for name in kinds if name not in found["stock"]]
    return Contest(
        step="find damaged shards: " + ", ".join(kinds),
        metric="kinds of damage of 5 that are found",
        peer=f"{PEER} check_dataset",
        ours=len(found["ours"]),
        theirs=len([name for name in found["stock"] if name in kinds]),
        target="all 5",
        reached=found["ours"] == list(kinds),
        note=f"the peer misses: {', '.join(missed) or 'none'}; whole files pass both: "
        f"{'nothing' not in found['ours'] + found['stock']}; the peer refuses whole files of 4-byte tokens: {refused}",
    )


def sign_again(folder: Path) -> None:
    """The manifest for the files that are in the folder now."""
    manifest = read_manifest(folder)
    content = {name: value for name, value in manifest.items() if name not in ("files", "sha256")}
    files = {name: file_entry(folder / name) for name in manifest["files"]}
    content["tokenizer"]["sha256"] = files["tokenizer.json"]["sha256"]
    write_manifest(folder, content, files)


# ---- memory


class Peak:
    """The most memory that any of some processes has held, in MB, as far as a look every few milliseconds sees it."""

    def __init__(self, pids: Callable[[], list[int]]):
        self.pids = pids
        self.mb = 0.0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch)

    def watch(self) -> None:
        while not self.ended.wait(0.005):
            for pid in self.pids():
                try:
                    status = Path(f"/proc/{pid}/status").read_text()
                except OSError:
                    continue
                found = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")]
                self.mb = max([self.mb, *(kib * 1024 / MB for kib in found)])

    def __enter__(self) -> "Peak":
        self.thread.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.ended.set()
        self.thread.join()


def pids_of(workers: Sequence[Worker]) -> list[int]:
    return [pid for worker in workers for pid in list(worker.pool._processes or ())]


def memory_ours(texts: Path, tokenizer: Path, work: Path) -> dict[str, Any]:
    """Peaks of a worker's memory, each with a worker of its own: stage tokens, and stage read with FineWeb's rules."""
    quiet()
    RECIPES["own"] = replace(RECIPES["own"], piece_mb=1000)
    peaks: dict[str, Any] = {}

    def measured(run: Run, name: str) -> float:
        with worker_processes(1, run.work) as workers, Peak(partial(pids_of, workers)) as peak:
            run_local(run.stage(name), run.work, Share(), workers)
        return peak.mb

    run = own_run(texts, work, tokenizer=str(tokenizer))
    for name in ("read", "duplicates", "tokens"):
        peaks[name] = measured(run, name)
    (task,) = run.token_tasks["own"]
    table = np.load(task_folder(work, "tokens", task.key) / "table.npy")
    peaks["longest"] = int(table[TABLE.index("text_bytes")].max())
    # All of them look at the long document, but for the limit of words that would end its way.
    rules = tuple(replace(rule, max_words=None) if isinstance(rule, GopherQuality) else rule for rule in CHAIN)
    RECIPES["own"] = replace(RECIPES["own"], rules={"own": rules})
    peaks["rules"] = measured(own_run(texts, work, tokenizer=str(tokenizer)), "read")
    return peaks


def tokenize_stock(texts: Path, tokenizer: Path, out: Path) -> None:
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    quiet()
    writer = DocumentTokenizer(str(out / "tokens"), str(tokenizer), eos_token=SEPARATOR, seed=0)
    do_all([JsonlReader(str(texts)), writer], out / "log")


def memory(folder: Path, texts: Sequence[str], tokenizer: Path) -> Contest:
    long = "\n\n".join(taken(texts, LONG_MB))
    short = list(texts[-N_SHORT:])
    write_rows(folder / "in/a.jsonl", [*short[: N_SHORT // 2], long, *short[N_SHORT // 2 :]])
    ours = measure(memory_ours, folder / "in", tokenizer, folder / "work").result
    stock = measure(tokenize_stock, folder / "in", tokenizer, folder / "stock")
    return Contest(
        step=f"one document of {megabytes([long]):.0f} MB and {N_SHORT:,} others of {megabytes(short):.0f} MB: tokens",
        metric="MB of memory of a worker, at its highest",
        peer=f"{PEER} DocumentTokenizer",
        ours=ours["tokens"],
        theirs=stock.peak_rss_mb,
        target="under 300 MB",
        reached=ours["tokens"] < 300 and ours["longest"] >= LONG_MB * MB,
        note=f"stage read with the rules of recipe own {ours['read']:.0f} MB, of FineWeb {ours['rules']:.0f} MB",
    )


# ---- from text to shards


def whole_ours(_: Any, texts: Path, tokenizer: Path, out: Path) -> int:
    RECIPES["own"] = replace(RECIPES["own"], rules={"own": CHAIN}, keep_dropped=False)
    run = own_run(texts, out / "work", tokenizer=str(tokenizer))
    manifest = build(run, out, partial(do_stage, run))
    return manifest["funnel"]["own"]["kept"]["documents"]


def ready_stock() -> tuple[Any, ...]:
    quiet()
    import spacy  # noqa: F401  the time of imports is no part of the work
    from datatrove.pipeline.tokens import DocumentTokenizer

    return (*stock_of(CHAIN), DocumentTokenizer)


def whole_stock(ready: tuple[Any, ...], texts: Path, tokenizer: Path, out: Path) -> int:
    """FineWeb's scripts, in one process: filters, four stages of MinHash, tokens; no merging of their files."""
    import xxhash
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    *filters, tokens = ready
    logs, passed = out / "log", str(out / "passed")
    do_all([JsonlReader(str(texts)), *filters, JsonlWriter(passed)], logs / "0")
    signature = MinhashDedupSignature(str(out / "signatures"))
    signature._hash_func = lambda gram: xxhash.xxh64_intdigest(gram.encode())  # xxhash 4 takes bytes alone
    do_all([JsonlReader(passed), signature], logs / "1")
    do_all([MinhashDedupBuckets(str(out / "signatures"), str(out / "buckets"))], logs / "2", 14)
    do_all([MinhashDedupCluster(str(out / "buckets"), str(out / "remove"))], logs / "3")
    writer = tokens(str(out / "tokens"), str(tokenizer), eos_token=SEPARATOR, seed=0)
    do_all([JsonlReader(passed), MinhashDedupFilter(str(out / "remove")), writer], logs / "4")
    (index,) = (out / "tokens").glob("*.index")
    return index.stat().st_size // 8


def from_text_to_shards(folder: Path, texts: Sequence[str], tokenizer: Path) -> Contest:
    some, fewer = taken(texts, OURS_MB), taken(texts, STOCK_MB)
    write_rows(folder / "in/a.jsonl", some)
    write_rows(folder / "few/a.jsonl", fewer)
    ours = measure(whole_ours, folder / "in", tokenizer, folder / "ours", prepare=quiet)
    same = measure(whole_ours, folder / "few", tokenizer, folder / "ours-few", prepare=quiet)
    stock = measure(whole_stock, folder / "few", tokenizer, folder / "stock", prepare=ready_stock)
    fast, slow = megabytes(some) / ours.cpu_s, megabytes(fewer) / stock.cpu_s
    return Contest(
        step="from text to shards: rules of FineWeb without address and language, duplicates, tokens",
        metric="MB of text per CPU second",
        peer=f"{PEER}, its own steps one after the other",
        ours=fast,
        theirs=slow,
        target="at least 5 times",
        reached=fast >= 5 * slow,
        note=f"{fast / slow:.1f} times; ours {megabytes(some):.0f} MB, the peer {megabytes(fewer):.1f} MB of them, of "
        f"which it keeps {stock.result:,} of {len(fewer):,} documents, ours {same.result:,} "
        f"({megabytes(fewer) / same.cpu_s:.1f} MB/s on so little); ours also writes held-out text, items and manifest",
    )
