"""Runs the tasks of datatrove executors on local processes that are watched: one that dies or hangs costs one task."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from datatrove.executor.local import LocalPipelineExecutor
from tqdm import tqdm

from curation.work import Pulse, Task, note_death, start_pulse

DEATHS = 6  # of processes over one task, until the run gives up
UNREACHED = 3  # times that a task finds no network, until the run gives up
HANGING_S = 600.0  # at one document, until its process is killed
WATCH_S = 0.5
LINE_S = 60.0  # between two lines of progress where there is no terminal


@dataclass(frozen=True, kw_only=True)
class Job:
    """One task: `executor` runs it as its rank `rank`."""

    executor: LocalPipelineExecutor
    rank: int
    task: Task


class Worker:
    """One process, and the task it is at. A process of its own: when it dies, it is known over what."""

    def __init__(self, number: int, work: Path):
        self.pulse_file = work / "pulse" / f"{number}"
        self.log_file = work / "log.txt"
        self.job: Job | None = None
        self.start()

    def start(self) -> None:
        self.pulse = Pulse(self.pulse_file)
        self.pulse.show(0, 0, 0, "")
        self.pool = ProcessPoolExecutor(
            1,
            multiprocessing.get_context("forkserver"),
            initializer=start_worker,
            initargs=(str(self.log_file), self.pulse_file),
        )

    def submit(self, job: Job) -> Future[None]:
        self.job = job
        self.pulse.show(0, 0, 0, "")
        self.seen, self.seen_at = self.pulse.read(), time.monotonic()
        return self.pool.submit(run_task, job.executor, job.rank)

    def stop(self) -> None:
        """Ends the process when it has done its task: the present one, not one that died before."""
        self.pool.shutdown(cancel_futures=True)

    def kill(self) -> None:
        for process in list((self.pool._processes or {}).values()):
            process.kill()

    def kill_if_hanging(self) -> None:
        now = self.pulse.read()
        if now != self.seen or not now[3]:
            self.seen, self.seen_at = now, time.monotonic()
        elif time.monotonic() - self.seen_at > HANGING_S:
            self.kill()


def run_task(executor: LocalPipelineExecutor, rank: int) -> None:
    executor._run_for_rank(rank, local_rank=1)  # 1: only errors go to stderr, which is the log file here


def run_jobs(workers: Sequence[Worker], work: Path, jobs: Sequence[Job], label: str) -> None:
    """Run the jobs in this order, with a progress bar on a terminal, elsewhere with a line of it every minute.

    A task whose process died is tried again, smaller, and without the document that two died over (work.Attempts); one
    that found no network is tried again after all others. What else a task raises ends the run. Raises
    ChildProcessError in one line when a task kills process after process, ConnectionError when there is no network.
    """
    waiting = list(reversed(jobs))
    running: dict[Future[None], Worker] = {}
    done = documents = tokens = 0
    unreached: Counter[str] = Counter()
    total = sum(job.task.size_bytes for job in jobs)
    with ExitStack() as stack:
        is_terminal = sys.stderr.isatty()
        screen = sys.stderr if is_terminal else stack.enter_context(open(os.devnull, "w"))
        bar = stack.enter_context(tqdm(total=total, desc=label, unit="B", unit_scale=True, leave=False, file=screen))
        said_at = time.monotonic()
        while waiting or running:
            for worker in workers:
                if worker.job is None and waiting:
                    running[worker.submit(waiting.pop())] = worker
            finished, _ = wait(running, timeout=WATCH_S, return_when=FIRST_COMPLETED)
            for future in finished:
                worker = running.pop(future)
                job, worker.job = worker.job, None
                assert job is not None
                try:
                    future.result()
                except BrokenProcessPool:
                    attempts = note_death(work, job.task.key, worker.pulse.read()[3])
                    worker.pool.shutdown(wait=False)
                    worker.start()
                    if attempts.deaths >= DEATHS:
                        raise ChildProcessError(
                            f"{attempts.deaths} worker processes died over one task of '{label}' (killed, or out of "
                            "memory?); run the same command to go on, with fewer --workers if memory is short"
                        ) from None
                    waiting.append(job)
                    continue
                except ConnectionError:
                    unreached[job.task.key] += 1
                    if unreached[job.task.key] >= UNREACHED:
                        raise
                    waiting.insert(0, job)
                    continue
                done += job.task.size_bytes
                counts = worker.pulse.read()
                documents, tokens = documents + counts[0], tokens + counts[2]
                worker.pulse.show(0, 0, 0, "")
            now = [worker.pulse.read() for worker in running.values()]
            for worker in running.values():
                worker.kill_if_hanging()
            at = [min(w.job.task.size_bytes, c[1]) for w, c in zip(running.values(), now, strict=True) if w.job]
            bar.n = done + sum(at)
            counted = {"documents": f"{documents + sum(counts[0] for counts in now):,}"}
            if n_tokens := tokens + sum(counts[2] for counts in now):
                counted["tokens"] = f"{n_tokens:,}"
            bar.set_postfix(counted)
            if not is_terminal and time.monotonic() - said_at > LINE_S:
                print(bar, file=sys.stderr, flush=True)
                said_at = time.monotonic()


@contextmanager
def worker_processes(n: int, work: Path) -> Iterator[list[Worker]]:
    """n processes that write their messages to work/log.txt and never outlive this one."""
    with ExitStack() as stack:
        workers: list[Worker] = []
        try:
            for number in range(n):
                workers.append(Worker(number, work))
                stack.callback(workers[-1].stop)
            yield workers
        except BaseException:
            for worker in workers:  # not worth waiting for: the next run does their tasks again
                worker.kill()
            raise


def start_worker(log_file: str, pulse_file: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent answers it
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    start_pulse(pulse_file)
    threading.Thread(target=die_with_parent, daemon=True).start()


def die_with_parent() -> None:
    """A worker that outlived a killed parent would write into the folder of the next run."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
