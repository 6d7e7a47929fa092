"""The processes of a run: how they join, what they tell one another each step, and how they are asked to stop."""

import json
import os
import signal
from datetime import timedelta
from typing import NamedTuple

import deepspeed
import torch
import torch.distributed as dist

from train.exit_codes import INTERRUPTED, REQUEUE
from train.run_dir import flatten


def start_processes(rank, world_size, timeout_minutes, agreed=None):
    """Join the process group that the launcher's environment describes; alone, a group of one.

    timeout_minutes: without a limit of its own a lost process stalls the others for half an hour.
    agreed: what all processes of a run must say alike, nested dicts of what JSON knows. ValueError where one does not,
    as a process of another run on this machine, or where another run has the port.
    """
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500" if world_size > 1 else "0")  # alone: any that is free
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        # DeepSpeed would compile a shared-memory all-reduce at the first start: g++ is needed, a stale lock hangs it
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # each process would take all cores, and the processes of a machine would wait for one another
        cores = len(os.sched_getaffinity(0)) // processes_on_this_host()
        torch.set_num_threads(max(1, min(torch.get_num_threads(), cores)))
    timeout = timedelta(minutes=timeout_minutes)
    store = meet(rank, world_size, timeout, agreed) if world_size > 1 else None
    deepspeed.init_distributed(timeout=timeout, verbose=False)
    del store  # till here: the process group goes on with its server


def meet(rank, world_size, timeout, agreed):
    """The store at the run's address and port, once this process and rank 0 are known to be of one run."""
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    ports = "two runs on a machine need ports of their own: deepspeed --master_port=29501, or MASTER_PORT"
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            raise ValueError(f"{place} is taken, by another run perhaps; {ports}") from None
        raise ConnectionError(f"rank 0 does not answer at {place}: {str(error).splitlines()[0]}") from None
    own = json.dumps(agreed, default=str)
    if rank == 0:
        store.set("agreed", own)
    there, here = (flatten(json.loads(text)) for text in (store.get("agreed"), own))
    apart = [f"{k}: {there.get(k)!r} there, {here.get(k)!r} here" for k in there | here if there.get(k) != here.get(k)]
    if apart:
        raise ValueError(
            f"rank {rank} and the rank 0 at {place} are of two runs, or were not started alike: "
            f"{'; '.join(apart[:3])}; {ports}; the processes of one need the same flags, files and GPUs"
        )
    return store


def processes_on_this_host():
    """Of this run, as DeepSpeed's launcher or torchrun tells; 1 without them."""
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE", 1))


class Stop:
    """Notes the signals that ask a run to leave: it saves and leaves after the step that it is in.

    SIGTERM and SIGUSR1 come from a scheduler that wants the machine back, and may come twice, from it and from what
    started us; SIGINT (Ctrl-C) comes from a person, whose second one ends the process at once.
    """

    CODES = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: REQUEUE, signal.SIGUSR1: REQUEUE}

    def __init__(self):
        self.code = 0  # the exit code that was asked for
        for number in self.CODES:
            signal.signal(number, self._note)

    def _note(self, number, frame):
        self.code = self.CODES[number]
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)


class Told(NamedTuple):
    """What the processes know of one another in a step, the same on all of them. Lists have an entry a rank."""

    loss: float  # nats a token, averaged over the ranks
    stop: int  # 0, or the exit code with which the run was asked to leave
    written: bool  # every rank has its part of the pending checkpoint on disk
    forward_seconds: list
    data_seconds: list


def tell(loss, stop, written, forward_seconds, data_seconds):
    """Exchange a few numbers between all ranks, which all call it; one small all-reduce.

    loss: this rank's, a tensor; the others are plain numbers. Returns a Told.
    """
    table = torch.zeros(dist.get_world_size(), 5, dtype=torch.float64, device=loss.device)
    row = table[dist.get_rank()]
    row[0] = loss
    row[1:] = torch.tensor([float(stop), float(written), forward_seconds, data_seconds])
    dist.all_reduce(table)
    losses, stops, writtens, forwards, datas = table.T.tolist()
    return Told(sum(losses) / len(losses), int(max(stops)), all(writtens), forwards, datas)
