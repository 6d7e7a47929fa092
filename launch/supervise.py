"""Run a training job and keep it alive: what dies, hangs or loses its network is noticed, named and gone on from.

    python -m launch.supervise --processes 2 -- --size nano --data data/local --run runs/mine
    python -m launch.supervise --hostfile hostfile --env GLOO_SOCKET_IFNAME=eth0 -- --size 13B --data ... --run ...

Behind the -- stand flags of train/launch.py. On each host of the hostfile (DeepSpeed's format: `name slots=8`) an
agent is started over ssh (launch/agent.py), which starts that host's ranks and ends them when it hears nothing more.
After a failure every rank is ended, and the job goes on with --resume from its newest whole checkpoint, on the hosts
that answer; a host that comes back is used again at the next restart. What happened is in supervise.jsonl in the
run's folder. Exit codes are those of train/exit_codes.py: 75 after SIGTERM, so that a scheduler's script can requeue
the job.
"""

import argparse
import contextlib
import fcntl
import json
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from launch.run_flags import parse_run, split_words
from model.config import get_preset
from train.config import SIZE_DEFAULTS
from train.exit_codes import BAD_INPUT, DONE, FAILED, HUNG, INTERRUPTED, REQUEUE
from train.run_dir import RunDir

ROOT = Path(__file__).resolve().parents[1]
TRAIN = str(ROOT / "train/launch.py")
LOG = "supervise.jsonl"  # in the run's folder
LOCAL = "localhost"  # the one host of a job without a hostfile: no ssh
NO_LEASE_S = 1e9  # the agent of this machine hears of a dead supervisor by the end of its stdin
CONNECT_S = 20.0
END_GRACE_S = 3.0  # after a failure, for last words: without all ranks nothing can be saved
AGENT_S = 0.1  # how often an agent looks (launch/agent.py)
WITHOUT_PROGRESS = 3  # attempts in a row that come no further, after which the supervisor gives up
WITHOUT_HOSTS = 60  # attempts in a row, which is about an hour: a network that is repaired by then ends no run
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0  # before a restart; doubles while there is no progress
SETTLE_S = 1.0  # after the first sign of a failure: the reason may arrive after its consequences
FORWARDED = ("NCCL", "GLOO", "TORCH", "DS_", "OMP_", "PYTHON", "LD_LIBRARY_PATH", "PATH", "CUDA_DEVICE", "TRITON")
SSH = ["ssh", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"]
MEANING = {
    DONE: "done",
    FAILED: "failed",
    BAD_INPUT: "bad input",
    REQUEUE: "asked to leave",
    HUNG: "hung",
    INTERRUPTED: "interrupted",
}
HANG_LINE = re.compile(r"watchdog: (rank \d+ on .*)")
NAME = re.compile(r"rank (\d+) on ([^\s:;]+)")
START_LINE = re.compile(r"(?:goes on from step ([\d,]+)|starts), to [\d,]+")
EXIT_OF = {signal.SIGTERM: REQUEUE, signal.SIGUSR1: REQUEUE, signal.SIGINT: INTERRUPTED}


class Asked(Exception):
    """The supervisor was told to stop; argument: by which signal."""


class Failure(Exception):
    """Why an attempt ended.

    weight: of several reasons that come at once the greatest is the cause, the others its consequences.
    host, rank: the culprit's, where known. noticed_after_s: since it happened, as far as it can be told from here.
    """

    def __init__(self, text, weight, *, host=None, rank=None, noticed_after_s=None, code=FAILED):
        super().__init__(text)
        self.weight, self.host, self.rank = weight, host, rank
        self.noticed_after_s, self.code = noticed_after_s, code


class TooFewHosts(Failure):
    """Not enough hosts answer for the job to go on."""


class Host:
    """One host's agent, as the supervisor knows it during one attempt."""

    def __init__(self, name, slots, ssh_args, connect_s, inbox):
        self.name, self.slots = name, slots
        agent = [sys.executable, "-u", "-m", "launch.agent"]
        if name != LOCAL:
            remote = f"cd {shlex.quote(str(ROOT))} && exec {shlex.join(agent)}"
            agent = [*SSH, "-o", f"ConnectTimeout={max(1, int(connect_s))}", *ssh_args, name, remote]
        self.process = subprocess.Popen(
            agent, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,  # out of reach of the terminal's Ctrl-C, which is handled here
        )  # fmt: skip
        self.heard = time.monotonic()
        self.ready = None  # the agent's first report
        self.ranks = range(0)  # that were started here
        self.codes: dict = {}  # rank: exit code, of those that have ended
        self.last_lines: dict = {}  # rank: what it wrote last, None: what ssh or the agent did ...
        self.last_errors: dict = {}  # ... and the last line of it that tells of an error
        self.vitals: list = []  # [rank, state, CPU seconds]
        self.over = self.lost = False
        threading.Thread(target=self._read, args=(inbox,), daemon=True).start()

    def _read(self, inbox):
        for line in self.process.stdout:
            try:
                report = json.loads(line)
                report["kind"]
            except (ValueError, TypeError, KeyError):  # ssh's own words
                report = {"kind": "out", "rank": None, "text": line.decode(errors="replace").rstrip()}
            inbox.put((self, report))
        inbox.put((self, {"kind": "closed"}))

    def order(self, do, **more):
        with contextlib.suppress(OSError):  # a connection that broke is reported by _read
            self.process.stdin.write(json.dumps({"do": do, **more}).encode() + b"\n")
            self.process.stdin.flush()

    def close(self):
        """Let go of the agent, which ends by itself, and its ranks with it."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(0.1 if self.lost else 5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Supervisor:
    def __init__(self, options, flags, config):
        self.options, self.flags, self.config = options, flags, config
        self.run_dir = RunDir(Path(config.run))
        self.inbox: queue.SimpleQueue = queue.SimpleQueue()  # (Host, report), or (None, signal number)
        self.hosts: list[Host] = []
        self.failures: list[Failure] = []
        self.signals: list[int] = []
        self.attempt = 0
        self.resumed_from = None
        self.hang = None  # the watchdog's words on who hangs
        self.safe_at = self.last_word = 0.0
        for number in EXIT_OF:
            signal.signal(number, lambda number, _: self.inbox.put((None, number)))

    def run(self):
        """Attempts until the job is done or will not be. Returns the exit code."""
        furthest, idle, absent = last_step(self.run_dir), 0, 0  # idle: attempts in a row that came no further
        wait = 0.0
        while True:
            try:
                self.listen_for(wait)
                self.attempt += 1
                self.connect()
                code = self.watch()
                self.log("finished" if code == DONE else "stop", f"the job ended: {MEANING[code]}", code=code)
                return code
            except Asked as asked:
                code = EXIT_OF[asked.args[0]]
                self.log("stop", f"{signal.Signals(asked.args[0]).name} while no rank was running", code=code)
                return code
            except Failure as caught:
                failure = caught
            finally:
                self.let_go()
            step = last_step(self.run_dir)
            if failure.code == BAD_INPUT:
                return BAD_INPUT
            absent = absent + 1 if isinstance(failure, TooFewHosts) else 0
            if not absent:
                idle = 1 if step > furthest else idle + 1
                furthest = max(furthest, step)
            if why := self.why_give_up(idle, absent, furthest):
                self.log("gives_up", f"gives up: {why}; the last reason: {failure}", step=step)
                return FAILED
            wait = min(FIRST_WAIT_S * 2 ** ((absent or idle) - 1), LONGEST_WAIT_S)
            wait = max(wait, self.safe_at - time.monotonic())
            self.log("restart", f"starts again in {wait:.0f} s; newest checkpoint: {newest(self.run_dir) or 'none'}")

    def why_give_up(self, idle, absent, furthest):
        if idle >= WITHOUT_PROGRESS:
            return f"{idle} attempts in a row came no further than step {furthest}"
        if absent >= WITHOUT_HOSTS:
            return f"too few hosts answered {absent} times in a row"
        if self.attempt > self.options.max_restarts:
            return f"--max-restarts {self.options.max_restarts} is reached"
        return None

    def connect(self):
        """Start an agent on every host, and the ranks on as many of those that answer as the batch divides over.

        Raises Failure if there are too few, Asked if a signal comes.
        """
        self.resumed_from, self.hang = None, None
        timeout = self.options.host_timeout
        self.hosts = [
            Host(name, slots, self.options.ssh_args, min(timeout, CONNECT_S), self.inbox)
            for name, slots in self.options.hosts.items()
        ]
        self.listen_for(min(timeout, CONNECT_S), until=lambda: all(h.ready or h.lost for h in self.hosts))
        answering = [host for host in self.hosts if host.ready and not host.lost]
        for host in self.hosts:
            if host not in answering:
                why = host.last_lines.get(None, "no word")
                self.log("host_missing", f"host {host.name} does not answer ({why}): on without it", host=host.name)
        complete = len(answering) == len(self.hosts)
        flags = []
        try:
            if not answering:
                raise ValueError(f"none of the hosts answers: {', '.join(self.options.hosts)}")
            if not complete:  # else train/launch.py judges the user's own numbers
                names, micro_batch = lay_out(self.config, {h.name: h.slots for h in answering}, self.options.min_hosts)
                answering = [host for host in answering if host.name in names]
                flags = ["--micro-batch", str(micro_batch)]
        except ValueError as error:
            # at the first attempt the hostfile is wrong; later the network is
            failure = TooFewHosts(str(error), 0, code=BAD_INPUT if self.attempt == 1 else FAILED)
            self.log_failure(failure)
            raise failure from None
        for host in self.hosts:
            if host not in answering:
                host.close()
        self.hosts, self.failures = answering, []
        self.start_ranks([sys.executable, "-u", *self.options.program, *self.flags, *flags, "--resume"])

    def start_ranks(self, command):
        """The same command on every host, with the environment that DeepSpeed's own launcher would give."""
        address, port = master_address(self.hosts), str(self.hosts[0].ready["port"])
        world_size = sum(host.slots for host in self.hosts)
        common = {name: value for name, value in os.environ.items() if name.startswith(FORWARDED)} | self.options.env
        common |= {"MASTER_ADDR": address, "MASTER_PORT": port, "WORLD_SIZE": str(world_size)}
        common |= {"CROSS_SIZE": str(len(self.hosts))}
        text = f"{world_size} process{'es' if world_size > 1 else ''} on {', '.join(host.name for host in self.hosts)}"
        self.log("start", text, world_size=world_size, master=f"{address}:{port}")
        first = 0
        for number, host in enumerate(self.hosts):
            host.ranks = range(first, first + host.slots)
            first += host.slots
            host.order(
                "start", mark=f"{self.run_dir.path.resolve()}@{host.name}", cwd=os.getcwd(), command=command,
                env=common | {"LOCAL_SIZE": str(host.slots), "CROSS_RANK": str(number)}, ranks=list(host.ranks),
                lease_s=NO_LEASE_S if host.name == LOCAL else self.options.host_timeout / 2,
                frozen_s=self.options.frozen_seconds,
            )  # fmt: skip

    def watch(self):
        """Follow the ranks until none is left. Returns the exit code; raises Failure if the job should go on."""
        seen, moved = None, time.monotonic()
        while not (self.failures or self.signals or self.all_over()):
            self.listen()
            if self.progress() != seen:
                seen, moved = self.progress(), time.monotonic()
            silent = time.monotonic() - moved
            if silent > 60 * self.options.stall_minutes:
                self.failures.append(self.stalled(silent))
        settled = time.monotonic() + SETTLE_S
        while self.failures and not self.signals and not self.all_over() and time.monotonic() < settled:
            self.listen()
        if self.signals:
            return self.stop()
        if not self.failures:
            return DONE
        cause = max(self.failures, key=lambda failure: failure.weight)  # of equal ones the first
        self.log_failure(cause)
        self.end(END_GRACE_S)
        raise cause

    def stop(self):
        """Pass a signal on to the ranks and wait for their save. Returns the exit code."""
        number = self.signals[0]
        self.log("stopping", f"{signal.Signals(number).name}: the ranks finish their step and save")
        for host in self.hosts:
            host.order("signal", number=number)
        until = time.monotonic() + self.options.grace_seconds
        broken: list[Failure] = []
        while not (self.all_over() or broken or len(self.signals) > 1) and time.monotonic() < until:
            self.listen()
            broken = [failure for failure in self.failures if failure.code not in EXIT_OF.values()]
        if broken:
            self.log("failure", f"while stopping: {max(broken, key=lambda failure: failure.weight)}")
        elif not self.all_over():
            self.log("failure", f"the ranks did not leave within {self.options.grace_seconds:g} s, and are killed")
        codes = {code for host in self.hosts for code in host.codes.values()}
        self.end(0)
        return DONE if codes == {DONE} else EXIT_OF[number]

    def end(self, grace_s):
        """End every rank that is left: SIGTERM now, SIGKILL after grace_s; returns when none is left within reach."""
        if not self.all_over():
            for host in self.hosts:
                host.order("end", grace_s=grace_s)
            until = time.monotonic() + grace_s + self.options.host_timeout
            while not self.all_over() and time.monotonic() < until:
                self.listen()

    def all_over(self):
        return all(host.over or host.lost for host in self.hosts)

    def let_go(self):
        for host in self.hosts:
            with contextlib.suppress(OSError):
                host.process.stdin.close()  # all at once, then wait for each
        for host in self.hosts:
            host.close()
        self.hosts = []

    def listen_for(self, seconds, until=lambda: False):
        """Listen for so long, or until a condition holds. Raises Asked if a signal comes."""
        end = time.monotonic() + seconds
        while not until() and time.monotonic() < end:
            self.listen()
            if self.signals:
                raise Asked(self.signals[0])

    def listen(self):
        """Take what has come, a tenth of a second long; keep the agents alive, and miss those that are not."""
        with contextlib.suppress(queue.Empty):
            host, report = self.inbox.get(timeout=0.1)
            while True:
                if host is None:
                    self.signals.append(report)
                elif host in self.hosts:
                    self.take(host, report)
                host, report = self.inbox.get_nowait()
        now, timeout = time.monotonic(), self.options.host_timeout
        if now - self.last_word >= 1:
            self.last_word = now
            for host in self.hosts:
                # An agent kills its ranks timeout / 2 after the last word; a host that has been silent gets none. So
                # its ranks are dead before the time-out, when the others may start again.
                if now - host.heard < timeout / 6 and not host.lost:
                    host.order("alive")
        for host in self.hosts:
            silent = now - host.heard
            if silent > timeout and not host.lost and host.name != LOCAL:
                self.lose(host, f"no sign of life for {silent:.0f} s", silent)

    def lose(self, host, why, seconds):
        host.lost = True
        first, last = (host.ranks[0], host.ranks[-1]) if host.ranks else (None, None)
        ranks = f" (rank {first})" if first == last else f" (ranks {first} to {last})"
        text = f"host {host.name}{ranks if host.ranks else ''} is gone: {why}"
        self.failures.append(Failure(text, 8, host=host.name, rank=first, noticed_after_s=round(seconds, 1)))

    def take(self, host, report):
        """Note one report of an agent."""
        kind, rank = report["kind"], report.get("rank")
        host.heard = time.monotonic()
        if kind == "ready":
            host.ready = report
        elif kind == "alive":
            host.vitals = report["ranks"]
        elif kind == "over":
            host.over = True
        elif kind == "closed":
            if not (host.over or host.lost):
                if host.ranks:  # they may live as long
                    self.safe_at = time.monotonic() + self.options.host_timeout / 2 + 1
                self.lose(host, f"its agent is gone; {host.last_lines.get(None, 'it said nothing')}", 0)
        elif kind == "out":
            host.last_lines[rank] = report["text"]
            if "rror" in report["text"]:
                host.last_errors[rank] = report["text"]
            print(f"[{host.name}{'' if rank is None else f' {rank}'}] {report['text']}", flush=True)
            if hang := HANG_LINE.search(report["text"]):
                self.hang = self.hang or hang[1]
            if self.resumed_from is None and (begun := START_LINE.search(report["text"])):
                self.resumed_from = int((begun[1] or "0").replace(",", ""))
                self.log("resumed", f"goes on from step {self.resumed_from}", step=self.resumed_from)
        elif kind == "frozen":
            text = f"rank {rank} on {host.name} is frozen: process {report['pid']} stopped for {report['seconds']:g} s"
            self.failures.append(Failure(text, 7, host=host.name, rank=rank, noticed_after_s=report["seconds"]))
        elif kind == "ended":
            host.codes[rank] = report["code"]
            if report["code"] != DONE:
                self.failures.append(self.death(host, rank, report["code"]))

    def death(self, host, rank, code):
        """A Failure that says how a rank ended."""
        if code < 0:
            text = f"rank {rank} on {host.name} was killed by {signal.Signals(-code).name}"
            return Failure(
                text, 7 if -code == signal.SIGKILL else 6, host=host.name, rank=rank, noticed_after_s=AGENT_S
            )
        if code in (HUNG, FAILED) and self.hang:  # it knows better than a collective that gave up
            names = NAME.findall(self.hang)
            rank, name = names[0] if len(names) == 1 else (None, None)
            return Failure(f"the job hung: {self.hang}", 5, host=name, rank=rank and int(rank))
        text = f"rank {rank} on {host.name} ended with exit code {code} ({MEANING.get(code, 'unknown')})"
        if code in (FAILED, BAD_INPUT) and (line := host.last_errors.get(rank, host.last_lines.get(rank))):
            text += f": {line}"
        weight = {BAD_INPUT: 4, HUNG: 3, REQUEUE: 1, INTERRUPTED: 1}.get(code, 2)
        return Failure(text, weight, host=host.name, rank=rank, noticed_after_s=AGENT_S, code=code)

    def progress(self):
        """Changes whenever the run gets on, or a rank says something."""
        lines = [tuple(host.last_lines.items()) for host in self.hosts]
        try:
            found = self.run_dir.metrics.stat()
        except OSError:
            return lines
        return lines, found.st_size, found.st_mtime_ns

    def stalled(self, seconds):
        states = [f"rank {rank} on {h.name}: state {state}, {cpu:.0f} s of CPU" for h in self.hosts
                  for rank, state, cpu in h.vitals]  # fmt: skip
        text = f"nothing new for {seconds / 60:.1f} minutes (--stall-minutes); {'; '.join(states[:8])}"
        return Failure(text, 5, noticed_after_s=round(seconds, 1))

    def log_failure(self, failure):
        self.log(
            "failure", str(failure), host=failure.host, rank=failure.rank, step=last_step(self.run_dir),
            noticed_after_s=failure.noticed_after_s, resumed_from=self.resumed_from,
        )  # fmt: skip

    def log(self, event, text, **more):
        """One line to stderr and to the run's supervise.jsonl."""
        print(f"supervise: {text}", file=sys.stderr, flush=True)
        entry = {"time": round(time.time(), 3), "attempt": self.attempt, "event": event, "text": text,
                 "hosts": [host.name for host in self.hosts], **more}  # fmt: skip
        try:
            with open(self.run_dir.path / LOG, "a") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:  # a full disk must not end the supervisor
            print(f"supervise: {LOG} was not written: {error}", file=sys.stderr, flush=True)


def lay_out(config, slots, min_hosts):
    """(names of the hosts to use, micro-batch) on the hosts {name: slots} that are left.

    The most hosts, in order, whose processes the batch divides over; the micro-batch is lowered where it must be.
    Raises ValueError if no min_hosts of them will do.
    """
    defaults = SIZE_DEFAULTS[config.size]
    seq_len = config.seq_len or get_preset(config.size, layer_pattern=config.layer_pattern).seq_len
    batch_tokens = config.batch_tokens or defaults["batch_tokens"]
    sequences = batch_tokens // seq_len
    for n_hosts in range(len(slots), min_hosts - 1, -1):
        names = list(slots)[:n_hosts]
        world_size = sum(slots[name] for name in names)
        if sequences % world_size == 0:
            largest = config.micro_batch or defaults["micro_batch"]
            share = sequences // world_size
            if largest == "auto":  # worked out again for so many processes
                return names, largest
            return names, next(m for m in range(min(largest, share), 0, -1) if share % m == 0)
    raise ValueError(
        f"{len(slots)} of the hosts answer ({', '.join(slots)}), --min-hosts is {min_hosts}, and a batch of "
        f"{sequences} sequences must divide over their processes ({', '.join(map(str, slots.values()))})"
    )


def master_address(hosts):
    """Where the other hosts reach the first: the address at which ssh did, unless that is the host's own loopback."""
    first = hosts[0]
    if first.name == LOCAL:
        return "127.0.0.1"
    address = first.ready["address"]
    return first.name if address is None or address.startswith("127.") or address == "::1" else address


def read_hostfile(path):
    """{name: slots} of a hostfile in DeepSpeed's format, a line `name slots=8` each."""
    hosts: dict[str, int] = {}
    try:
        text = Path(path).read_text(errors="replace")
    except OSError as error:
        raise ValueError(
            f"--hostfile {path} cannot be read: {error.strerror}; give a file with a line `name slots=8` for each host"
        ) from None
    for number, line in enumerate(text.splitlines(), 1):
        line = line.split("#")[0].strip()
        if not line:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", line)
        if match is None or match[1] in hosts:
            raise ValueError(f"--hostfile {path}, line {number}: {line!r}; each line is `name slots=8`, a name once")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise ValueError(f"--hostfile {path} names no host; each line is `name slots=8`")
    if len(hosts) > 1 and LOCAL in hosts:
        raise ValueError(f"--hostfile {path}: {LOCAL} is another host on each of them; give it the name of its own")
    return hosts


def last_step(run_dir):
    """The last step in metrics.jsonl, 0 before the first; reads its end alone."""
    try:
        with open(run_dir.metrics, "rb") as file:
            file.seek(max(0, os.path.getsize(run_dir.metrics) - (1 << 16)))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, TypeError, KeyError):  # cut short, or the middle of one
            continue
    return 0


def newest(run_dir):
    """The name of the newest finished checkpoint, or None."""
    found = run_dir.checkpoints()
    return found[-1].name if found else None


def count_gpus():
    """GPUs of this machine, or 1 process where there is none."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return 1
    return max(1, sum(line.startswith("GPU") for line in listed.splitlines()))


def lock(run_dir):
    """Keep a second supervisor from the same run; the lock ends with this process. Raises ValueError."""
    try:
        run_dir.path.mkdir(parents=True, exist_ok=True)
        file = open(run_dir.path / LOG, "a")  # noqa: SIM115 - held until the process ends
    except OSError as error:
        raise ValueError(f"--run {run_dir.path} cannot be written: {error.strerror}; give a folder") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"--run {run_dir.path} is supervised already, by another launch.supervise") from None
    except OSError:  # a file system without locks
        pass
    return file


def parse(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m launch.supervise", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--hostfile", help="hosts, a line `name slots=8` each (default: this machine alone)")
    add("--processes", type=int, help="without a hostfile: ranks on this machine (default: its GPUs, or 1)")
    add("--ssh-args", default="", type=shlex.split, help="more arguments of ssh, such as '-p 2222 -i key'")
    add("--env", action="append", default=[], metavar="NAME=VALUE", help="for every rank; may be given again")
    add("--min-hosts", type=int, default=1, help="with fewer the job does not go on (default: 1)")
    add("--max-restarts", type=int, default=1000, help="in all; three without progress always end it (default: 1000)")
    add("--host-timeout", type=float, default=30.0, help="seconds of silence: the host is gone (default: 30)")
    add("--frozen-seconds", type=float, default=10.0, help="a rank stopped (SIGSTOP) so long is ended (default: 10)")
    add("--stall-minutes", type=float, default=30.0, help="no step and no word from any rank: restart (default: 30)")
    add("--grace-seconds", type=float, default=120.0, help="for the save after SIGTERM or Ctrl-C (default: 120)")
    add("--program", type=shlex.split, default=[TRAIN], help="what the ranks run (default: train/launch.py)")
    return parser.parse_args(arguments)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    ours, flags = split_words(argv)
    options = parse(ours)
    try:
        if not flags:
            raise ValueError("no flags of train/launch.py are given; they stand behind --, such as -- --size nano ...")
        if options.processes is not None and options.processes < 1:
            raise ValueError(f"--processes {options.processes}; allowed: 1 or more; without it, this machine's GPUs")
        if options.hostfile and options.processes:
            raise ValueError("--processes is for one machine; with --hostfile its slots say how many")
        if options.hostfile and shutil.which("ssh") is None:
            raise ValueError("--hostfile needs ssh; on Debian: apt-get install openssh-client")
        wrong = [pair for pair in options.env if "=" not in pair]
        if wrong:
            raise ValueError(f"--env {wrong[0]} is not NAME=VALUE")
        options.env = dict(pair.split("=", 1) for pair in options.env)
        options.hosts = (
            read_hostfile(options.hostfile) if options.hostfile else {LOCAL: options.processes or count_gpus()}
        )
        if not 1 <= options.min_hosts <= len(options.hosts):
            raise ValueError(f"--min-hosts {options.min_hosts} of {len(options.hosts)} hosts; allowed: 1 to all")
        config = parse_run([flag for flag in flags if flag != "--preflight"])  # which is no field of it
        get_preset(config.size)  # before the run's folder is made
        held = lock(RunDir(Path(config.run)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    with held:
        return Supervisor(options, flags, config).run()


if __name__ == "__main__":
    sys.exit(main())
