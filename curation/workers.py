"""Runs datatrove pipelines on a pool of processes that notices when one of them is killed."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

from datatrove.executor.local import LocalPipelineExecutor
from tqdm import tqdm


class PoolPipelineExecutor(LocalPipelineExecutor):
    """datatrove's local executor (tasks, logs, statistics, completion marks) on a pool that is given to it.

    The stock one waits for ever when the system kills a worker, for example because memory ran out.
    """

    def submit(self, pool: ProcessPoolExecutor) -> list[Future[None]]:
        """Queue every task that has no completion mark yet."""
        return [pool.submit(run_task, self, rank) for rank in self.get_incomplete_ranks(range(self.tasks))]


def run_task(executor: LocalPipelineExecutor, rank: int) -> None:
    executor._run_for_rank(rank, local_rank=1)  # 1: only errors go to stderr, which is the log file here


def run_executors(pool: ProcessPoolExecutor, executors: Sequence[PoolPipelineExecutor], label: str) -> None:
    """Run all tasks of these executors at once, with a progress bar on a terminal. The first error ends the run.

    Raises what a task raised, or ChildProcessError in one line when a worker died.
    """
    futures = [future for executor in executors for future in executor.submit(pool)]
    total = sum(executor.tasks for executor in executors)
    with tqdm(total=total, initial=total - len(futures), desc=label, unit="task", leave=False, disable=None) as bar:
        try:
            for future in as_completed(futures):
                future.result()
                bar.update()
        except BrokenProcessPool:
            raise ChildProcessError(
                f"a worker process died while at '{label}' (was it killed, or out of memory?); "
                "run the same command to go on, with fewer --workers if memory is short"
            ) from None


@contextmanager
def worker_pool(n_workers: int, log_file: Path) -> Iterator[ProcessPoolExecutor]:
    """A pool whose processes write their messages to log_file and never outlive this process."""
    pool = ProcessPoolExecutor(
        n_workers, multiprocessing.get_context("forkserver"), initializer=start_worker, initargs=(str(log_file),)
    )
    try:
        yield pool
    except BaseException:
        for process in multiprocessing.active_children():  # not worth waiting for: the next run does their tasks again
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker(log_file: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent answers it
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    threading.Thread(target=die_with_parent, daemon=True).start()


def die_with_parent() -> None:
    """A worker that outlived a killed parent would write into the folder of the next run."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
