"""Notices a run that hangs, says which rank on which host, and ends it before it wastes an hour.

A thread of each rank says every two seconds where the rank is, into a store of the run's own that rank 0 keeps. Rank 0
looks for ranks that have gone silent (frozen, dead, cut off) and, when nobody gets on, for those that are behind; what
it finds, all ranks print, and each writes the Python stacks of its threads. The others watch rank 0 in the same way.
The store is not the collectives': it answers while they hang.

With the time-out T of --timeout-minutes: a silent rank is named after min(T / 3, 60 s), and the run ends after twice
that; a run of which every rank speaks and none gets on is named after T / 2, and ends after 0.9 T, before the
collectives give up.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from train.exit_codes import HUNG

BEAT_SECONDS = 2.0
SILENT_SECONDS = 60.0


class LostContact(Exception):
    """Another process of the run is gone, or does not answer."""


def is_lost_contact(error):
    """Whether a RuntimeError of a collective says that another process is gone or silent."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error) or "Gloo" in str(error)


class Watchdog:
    """All ranks make one, after the process group is up, and close it at the end.

    timeout_seconds: T above. stacks: the file for this rank's stacks. metrics: rank 0's, None on the others.

    with Watchdog(...) as watchdog: the run's steps. Raises LostContact there for a collective that fails because
    another process is gone, and says which.
    """

    def __init__(self, rank, world_size, timeout_seconds, stacks, metrics):
        self.rank, self.world_size, self.stacks, self.metrics = rank, world_size, stacks, metrics
        self.stall_seconds = timeout_seconds / 2
        self.silent_seconds = min(timeout_seconds / 3, SILENT_SECONDS)
        self.place = {"host": socket.gethostname(), "pid": os.getpid(), "count": 0, "step": 0, "phase": "start"}
        self.store = self._open_store()
        self.keys = [f"beat/{r}" for r in range(world_size)]
        self.beats: list[Any] = [None] * world_size  # rank 0: the last beat of each rank ...
        self.heard = [time.monotonic()] * world_size  # ... and when it last changed; other ranks: of rank 0
        self.advanced = time.monotonic()  # rank 0: when any rank last got on
        self.verdict, self.over = ["", False], threading.Event()
        self._beat()
        dist.barrier()  # every rank has beaten once,
        if rank == 0:
            self._beat(-1)  # and rank 0 has heard it, so that it can name each of them from the first step on
        self.rank_0 = f"rank 0 on {json.loads(self.store.get(self.keys[0]))['host']}"
        for target in (self._beat_on, self._judge_on):
            threading.Thread(target=target, daemon=True).start()

    def _open_store(self):
        port = [0]
        if self.rank == 0:
            store = dist.TCPStore(os.environ["MASTER_ADDR"], 0, None, True, timedelta(seconds=20), False)
            store.set("verdict", json.dumps(["", False]))
            port[0] = store.port
        dist.broadcast_object_list(port, src=0)
        if self.rank:
            store = dist.TCPStore(os.environ["MASTER_ADDR"], port[0], None, False, timedelta(seconds=20), False)
        return store

    def note(self, step, phase):
        """This rank begins a phase ("data", "save" ...) of a step. Cheap: the thread sends it on."""
        self.place = {**self.place, "count": self.place["count"] + 1, "step": step, "phase": phase}

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, RuntimeError) and is_lost_contact(error):
            silent = ", ".join(self._who_is_silent()) or "none, every process still beats"
            reason = str(error).strip().splitlines()[0]
            raise LostContact(
                f"step {self.place['step']}: lost contact with another process ({reason}); silent: {silent}; "
                "go on with --resume"
            ) from None
        faulthandler.cancel_dump_traceback_later()
        self.over.set()

    def _who_is_silent(self):
        """Names of the ranks that do not beat, after listening for three beats."""
        try:
            before = self.store.multi_get(self.keys)
            time.sleep(3 * BEAT_SECONDS)
            after = self.store.multi_get(self.keys)
        except RuntimeError:
            return [self.rank_0]
        silent = [
            json.loads(new) | {"rank": r} for r, (old, new) in enumerate(zip(before, after, strict=True)) if old == new
        ]
        return [f"rank {beat['rank']} on {beat['host']}" for beat in silent if beat["rank"] != self.rank]

    def _beat_on(self):
        beats = 0
        while not self.over.wait(BEAT_SECONDS):
            # where Python code never lets go of the interpreter this thread stands still too; a timer in C sees that
            faulthandler.dump_traceback_later(2 * self.silent_seconds, file=sys.stderr)
            beats += 1
            try:
                self._beat(beats)
            except RuntimeError:  # rank 0 is gone, or cut off: _judge_on sees that nothing is heard
                time.sleep(BEAT_SECONDS)

    def _beat(self, beats=0):
        """Say where this rank is, and hear: rank 0 of all, the others rank 0's verdict."""
        self.store.set(f"beat/{self.rank}", json.dumps(self.place | {"beats": beats}))
        if self.rank:
            self.verdict = json.loads(self.store.get("verdict"))
            self.heard[0] = time.monotonic()
            return
        for rank, text in enumerate(self.store.multi_get(self.keys) if beats else ()):
            beat = json.loads(text)
            if beat != self.beats[rank]:
                if not self.beats[rank] or beat["count"] != self.beats[rank]["count"]:
                    self.advanced = time.monotonic()
                self.beats[rank], self.heard[rank] = beat, time.monotonic()

    def _judge_on(self):
        said = ""
        while not self.over.wait(1.0):
            trouble, ends = self._judge()
            if trouble and trouble != said:
                said = trouble
                if self.metrics:
                    self.metrics.event("hang", self.place["step"], f"watchdog: {trouble}")
                else:
                    self._say(trouble)
                self._dump_stacks()
            if self.rank == 0 and [trouble, ends] != self.verdict:
                self.verdict = [trouble, ends]
                self.store.set("verdict", json.dumps(self.verdict))
            if ends and not self.over.wait(2 * BEAT_SECONDS if self.rank == 0 else 0):  # till the others have heard it
                self._say(f"rank {self.rank} ends, after waiting in vain; go on with --resume")
                os._exit(HUNG)

    def _judge(self):
        """[what is wrong or "", whether to end this process]"""
        now = time.monotonic()
        if self.rank:
            silence = now - self.heard[0]
            if silence > self.silent_seconds:
                return [f"{self.rank_0}: no sign of life", silence > 2 * self.silent_seconds]
            return self.verdict
        silences = {rank: now - heard for rank, heard in enumerate(self.heard) if rank and self.beats[rank]}
        silent = {rank: seconds for rank, seconds in silences.items() if seconds > self.silent_seconds}
        if silent:
            names = "; ".join(f"{self.name(rank)}: no sign of life {self._where(rank)}" for rank in silent)
            return [names, max(silent.values()) > 2 * self.silent_seconds]
        waited = now - self.advanced
        least = min(beat["count"] if beat else 0 for beat in self.beats)
        if waited > self.stall_seconds and least:  # before its first step a rank may take long to load
            behind = [rank for rank, beat in enumerate(self.beats) if beat["count"] == least]
            which = "all are there" if len(behind) == self.world_size else "the others wait for it"
            names = "; ".join(f"{self.name(rank)} {self._where(rank)}" for rank in behind[:8])
            return [
                f"{names}: has not got on for {self.stall_seconds:,.0f} s; {which}",
                waited > 2 * self.stall_seconds,
            ]
        return ["", False]

    def name(self, rank):
        """On rank 0: "rank 3 on node7"."""
        return f"rank {rank} on {self.beats[rank]['host']}"

    def _where(self, rank):
        return f"(step {self.beats[rank]['step']}, {self.beats[rank]['phase']})"

    def _say(self, text):
        print(f"watchdog: {text}", file=sys.stderr, flush=True)

    def _dump_stacks(self):
        try:
            self.stacks.parent.mkdir(parents=True, exist_ok=True)
            with open(self.stacks, "a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {self.rank} {self.place}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            self._say(f"the stacks of rank {self.rank} could not be written: {error}")
