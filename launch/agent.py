"""Starts and watches one host's ranks for launch.supervise, and sees to it that none of them outlives the job.

Standard library alone. It speaks JSON, an object a line. Orders come on stdin:

    {"do": "start", "mark": str, "cwd": str, "command": [...], "env": {...}, "ranks": [...], "lease_s", "frozen_s"}
    {"do": "alive"}                      the supervisor is there; without a word for lease_s every rank is killed
    {"do": "signal", "number": 15}       to every rank
    {"do": "end", "grace_s": 3}          SIGTERM to every rank now, SIGKILL to all that is left after grace_s

and reports go to stdout:

    {"kind": "ready", "host", "port", "address"}   port is free here; address is where ssh reached this host, or None
    {"kind": "alive", "ranks": [[rank, state, cpu seconds], ...]}    every second; state as in /proc/PID/stat
    {"kind": "out", "rank", "text"}                a line that a rank wrote
    {"kind": "frozen", "rank", "pid", "seconds"}   stopped (SIGSTOP) for that long
    {"kind": "ended", "rank", "pid", "code"}       an exit code; -9: killed by signal 9
    {"kind": "over", "killed"}                     no rank is left; how many processes had to be killed

The end of stdin means that the supervisor is gone: SIGTERM at once, SIGKILL after ten seconds or the lease.
"""

import ctypes
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

MARK = "BRAID_JOB"  # in the environment of every process of a job: who is found by it belongs to the job
TICK_S = 0.1
ALIVE_EVERY_S = 1.0
FIRST_LEASE_S = 60.0  # until the start order names another
GONE_GRACE_S = 10.0  # for a save, when stdin has ended
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
libc = ctypes.CDLL(None)


class Agent:
    def __init__(self):
        self.orders = queue.SimpleQueue()
        self.reports = queue.SimpleQueue()
        self.lease_s, self.frozen_s = FIRST_LEASE_S, 5.0
        self.mark = None
        self.ranks = {}  # rank: (process, the thread that reads its output)
        self.stopped_since = {}  # rank: when it was first seen stopped
        self.frozen = set()  # ranks that were reported so
        self.last_word = self.last_alive = time.monotonic()
        self.kill_at = None
        self.supervised = self.is_over = False

    def report(self, kind, **more):
        self.reports.put({"kind": kind, **more})

    def run(self):
        """Obey until the job is over and stdin has ended."""
        self.supervised = True
        while self.supervised or self.ranks:
            try:
                order = self.orders.get(timeout=TICK_S)
            except queue.Empty:
                pass
            else:
                self.last_word = time.monotonic()
                getattr(self, f"do_{order.pop('do')}")(**order)
            now = time.monotonic()
            self.watch(now)
            if now - self.last_alive >= ALIVE_EVERY_S:
                self.last_alive = now
                self.report("alive", ranks=[[rank, *vitals(p.pid)] for rank, (p, _) in self.ranks.items()])
            if now - self.last_word > self.lease_s or (self.kill_at is not None and now >= self.kill_at):
                self.kill_at = None
                self.finish()
                if now - self.last_word > self.lease_s:
                    return

    def watch(self, now):
        """Report ranks that ended and ranks that are frozen."""
        for rank, (process, reader) in list(self.ranks.items()):
            if process.poll() is not None:
                reader.join(1)  # its last words first
                del self.ranks[rank]
                self.report("ended", rank=rank, pid=process.pid, code=process.returncode)
            elif vitals(process.pid)[0] != "T":
                self.stopped_since.pop(rank, None)
            else:
                seconds = now - self.stopped_since.setdefault(rank, now)
                if seconds > self.frozen_s and rank not in self.frozen:
                    self.frozen.add(rank)
                    self.report("frozen", rank=rank, pid=process.pid, seconds=round(seconds, 1))
        if self.mark and not self.ranks and not self.is_over:
            self.finish()

    def finish(self):
        """Kill whatever is left of the job on this host."""
        killed = kill_all(self.mark) if self.mark else 0
        for rank, (process, _) in list(self.ranks.items()):
            process.kill()
            process.wait()
            del self.ranks[rank]
            self.report("ended", rank=rank, pid=process.pid, code=process.returncode)
        self.is_over = True
        self.report("over", killed=killed)

    def do_alive(self):
        pass

    def do_gone(self):
        self.supervised = False
        self.do_end(grace_s=min(self.lease_s, GONE_GRACE_S))

    def do_signal(self, number):
        for process, _ in self.ranks.values():
            process.send_signal(number)

    def do_end(self, grace_s):
        self.do_signal(signal.SIGTERM)
        self.kill_at = time.monotonic() + grace_s

    def do_start(self, mark, cwd, command, env, ranks, lease_s, frozen_s):
        self.mark, self.lease_s, self.frozen_s = mark, lease_s, frozen_s
        left = kill_all(mark)
        if left:
            self.report("out", rank=None, text=f"killed {left} processes that an earlier attempt had left here")
        for local_rank, rank in enumerate(ranks):
            own = {MARK: mark, "RANK": str(rank), "LOCAL_RANK": str(local_rank)}
            # pipes, not a terminal: the ranks must not be in reach of its Ctrl-C, which the supervisor handles
            process = subprocess.Popen(
                command, cwd=cwd, env=os.environ | env | own, start_new_session=True, preexec_fn=die_with(os.getpid()),
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            reader = threading.Thread(target=self.forward, args=(rank, process.stdout), daemon=True)
            reader.start()
            self.ranks[rank] = (process, reader)

    def forward(self, rank, pipe):
        """A rank's output, a line at a time; a progress line that is written over itself counts as lines."""
        rest = b""
        while chunk := pipe.read1(1 << 16):
            *lines, rest = re.split(rb"[\r\n]+", rest + chunk)
            for line in lines:
                if line.strip():
                    self.report("out", rank=rank, text=line.decode(errors="replace").rstrip())
        if rest.strip():
            self.report("out", rank=rank, text=rest.decode(errors="replace").rstrip())


def die_with(parent):
    """For the child of a fork: be killed when the agent dies, however it dies."""

    def prepare():
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


def vitals(pid):
    """(state letter, CPU seconds) of a process; ("?", 0) if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "?", 0.0
    return fields[0], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def processes_of(mark):
    """Living processes of a job on this host, whatever became of their parents."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # gone, or another user's
            continue
        if wanted in environment and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


def kill_all(mark, patience_s=10.0):
    """SIGKILL every process of a job on this host until none is left; how many there were."""
    killed, until = set(), time.monotonic() + patience_s
    while (found := processes_of(mark)) and time.monotonic() < until:
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            killed.add(pid)
        time.sleep(0.02)
    return len(killed)


def read_orders(orders):
    for line in sys.stdin.buffer:
        orders.put(json.loads(line))
    orders.put({"do": "gone"})


def write_reports(reports):
    """In a thread of its own: a connection that is stuck must not keep the agent from watching."""
    try:
        while report := reports.get():
            sys.stdout.buffer.write(json.dumps(report).encode() + b"\n")
            sys.stdout.buffer.flush()
    except OSError:  # nobody listens any more; stdin tells so too
        pass


def free_port():
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def main():
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    agent = Agent()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):  # a scheduler's word to this host is for the ranks
        signal.signal(number, lambda number, _: agent.orders.put({"do": "signal", "number": number}))
    signal.signal(signal.SIGHUP, lambda *_: agent.orders.put({"do": "gone"}))
    threading.Thread(target=read_orders, args=(agent.orders,), daemon=True).start()
    writer = threading.Thread(target=write_reports, args=(agent.reports,), daemon=True)
    writer.start()
    address = os.environ.get("SSH_CONNECTION", "").split()[2:3]
    agent.report("ready", host=socket.gethostname(), port=free_port(), address=address[0] if address else None)
    try:
        agent.run()
    except Exception:
        agent.report("out", rank=None, text=f"the agent failed: {traceback.format_exc()}")
    finally:
        if agent.mark:
            kill_all(agent.mark)
        agent.reports.put(None)
        writer.join(2)
        os._exit(0)  # the thread that reads stdin may be waiting for ever


if __name__ == "__main__":
    main()
