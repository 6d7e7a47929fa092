"""One measurement of a curation benchmark: a piece of work run in a process of its own, and the row it gives.

CPU seconds, not wall time, because a shared machine's clock says more about its other users than about the code.
"""

import multiprocessing
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Measured:
    cpu_s: float  # user and system time of the process and its children, set-up (`prepare`) left out
    wall_s: float
    peak_rss_mb: float  # of the whole process, imports included
    result: Any


@dataclass(frozen=True, kw_only=True)
class Contest:
    """One row of `make bench-curation`: ours against a peer on the same input in the same run."""

    step: str  # "tokenize, 32k BPE"
    metric: str  # what is compared, with its unit: "MB of text per CPU second"
    peer: str  # "datatrove 0.10.1 DocumentTokenizer"
    ours: float
    theirs: float | None  # None: the peer cannot do it, `note` says how that showed
    target: str  # "at least 4 times"
    reached: bool
    note: str = ""  # agreement, mismatches, memory, spread: what the number alone does not say


def cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(used.ru_utime + used.ru_stime for used in usage)


def peak_rss_mb() -> float:
    """The most memory this process has held, in MB. (ru_maxrss would be that of the parent, if it was higher.)"""
    with open("/proc/self/status") as status:
        kib = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    return kib * 1024 / 1e6


def measure(work: Callable[..., Any], *arguments: Any, prepare: Callable[[], Any] | None = None) -> Measured:
    """Run work(*arguments), or work(prepare(), *arguments), in a new process and time it there.

    `work`, `prepare` and the result go through pickle. Raises what the work raised, as a RuntimeError with its text.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(sender, work, arguments, prepare))
    process.start()
    sender.close()
    try:
        outcome = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{work.__name__} died with exit code {process.exitcode}") from None
    process.join()
    if isinstance(outcome, str):
        raise RuntimeError(outcome)
    return outcome


def _measured(sender: Any, work: Callable[..., Any], arguments: tuple[Any, ...], prepare: Any) -> None:
    try:
        given = () if prepare is None else (prepare(),)
        cpu, wall = cpu_seconds(), time.perf_counter()
        result = work(*given, *arguments)
        cpu, wall = cpu_seconds() - cpu, time.perf_counter() - wall
        sender.send(Measured(cpu_s=cpu, wall_s=wall, peak_rss_mb=peak_rss_mb(), result=result))
    except Exception as error:
        sender.send(f"{type(error).__name__}: {error}")
