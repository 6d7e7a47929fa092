"""Break a training job in every way that a month on many nodes would, and see whether it goes on as if nothing was.

    make drill                              (or: python -m launch.drill [--short] [--only NAME] [--keep FOLDER])

On this machine, without GPUs: two hosts are made as network namespaces, each with a process table, a name and an sshd
of its own, joined by a switch; launch.supervise trains a tiny model across them; one fault at a time is put in, from
outside (a signal, a cable pulled, a disk filled) or in the worker (launch/drill_worker.py). Each run must notice
within the stated time, name the rank and the host, go on by itself, and end with the losses of a run that nothing
happened to. Needs root, iproute2, util-linux, openssh-server and openssh-client. Ends with a table; exit code 1 if
any row failed.
"""

import argparse
import contextlib
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics

from launch.agent import die_with, processes_of, vitals
from train.exit_codes import BAD_INPUT, DONE, FAILED, REQUEUE
from train.run_dir import RunDir, read_metrics

ROOT = Path(__file__).resolve().parents[1]
HOSTS = {"hostA": "10.79.0.1", "hostB": "10.79.0.2"}
NETWORK, SWITCH_ADDRESS, SSH_PORT = "10.79.0.0/24", "10.79.0.254", 2222
NEEDED = {
    "ip": "iproute2", "unshare": "util-linux", "mount": "mount", "hostname": "hostname", "ssh": "openssh-client",
    "ssh-keygen": "openssh-client", "sshd": "openssh-server",
}  # fmt: skip
STEPS, SAVE_EVERY, BREAK_AT = 30, 10, 14  # a fault from outside comes after step 14, four after a checkpoint
SPIKE_STEPS, SPIKE_AT = 80, 72  # the guard compares with at least 64 steps
NAN_AT = 12
PACE_S = 0.1  # a step takes at least this long, so that the fault comes in the middle
HOST_TIMEOUT_S, FROZEN_S, STUCK_MINUTES = 15.0, 4.0, 0.5
OWN_S = 8.0  # what a loaded machine may add to a stated time
LIMIT_S = 600.0  # a row that takes longer has failed
DISK_MB, ROOM_KB = 24, 40  # the disk that fills; what is left on it, enough for lines and too little for a checkpoint


@dataclass(frozen=True, kw_only=True)
class Fault:
    name: str
    play: Callable  # (fault, cluster, job, row): puts the fault in, and writes down what the job does about it
    within_s: float  # the stated time in which it is noticed
    named: str = "-"  # who must be named, "rank 1, hostB", or the step that must
    after: str = "both hosts"  # what the job must go on with
    worker: tuple = ()  # flags of drill_worker.py
    unbroken: tuple = ()  # those of the run that it is compared with
    left_out: int = 0  # the step whose own loss is not compared: it was not taken
    difference: float = 0.0  # the largest loss difference allowed
    steps: int = STEPS
    timeout_minutes: float = 5.0
    on_small_disk: bool = False
    short: bool = False


@dataclass(kw_only=True)
class Row:
    """What happened."""

    fault: Fault
    noticed_s: float | None = None
    named: str = "-"
    said: str = ""
    went_on: str = "-"
    steps_lost: int | None = None
    difference: float | None = None
    problems: list[str] = field(default_factory=list)


class Cluster:
    """Two hosts and a switch, made on entry and gone on exit, with every process that ran on them.

    The names hold this process's number: what a drill that was killed left behind, the next one removes.
    """

    def __init__(self, folder):
        self.folder, self.prefix = folder, f"drill{os.getpid()}-"
        self.shells: dict[str, subprocess.Popen] = {}  # host: the process whose end ends the host
        self.disk = folder / "small_disk"

    def namespace(self, name):
        return self.prefix + name

    def __enter__(self):
        try:
            self.make()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, *_):
        self.remove()

    def make(self):
        remove_leftovers()
        self.disk.mkdir()
        call("mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", f"{self.prefix}disk", str(self.disk))
        switch = self.namespace("switch")
        call("ip", "netns", "add", switch)
        call("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        call("ip", "-n", switch, "addr", "add", f"{SWITCH_ADDRESS}/24", "dev", "bridge")
        for name in ("lo", "bridge"):
            call("ip", "-n", switch, "link", "set", name, "up")
        for key in ("host_key", "key"):
            call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key))
        Path("/run/sshd").mkdir(exist_ok=True)
        for name, address in HOSTS.items():
            self.make_host(name, address)
        (self.folder / "ssh_config").write_text(
            "".join(f"Host {name}\n    HostName {address}\n" for name, address in HOSTS.items())
            + f"Host *\n    Port {SSH_PORT}\n    IdentityFile {self.folder}/key\n    IdentitiesOnly yes\n"
            "    StrictHostKeyChecking no\n    UserKnownHostsFile /dev/null\n    LogLevel ERROR\n"
        )
        (self.folder / "hostfile").write_text("".join(f"{name} slots=1\n" for name in HOSTS))

    def make_host(self, name, address):
        host, switch = self.namespace(name), self.namespace("switch")
        call("ip", "netns", "add", host)
        call("ip", "link", "add", "eth0", "netns", host, "type", "veth", "peer", "name", name, "netns", switch)
        call("ip", "-n", switch, "link", "set", name, "master", "bridge")
        call("ip", "-n", switch, "link", "set", name, "up")
        call("ip", "-n", host, "addr", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            call("ip", "-n", host, "link", "set", device, "up")
        config = self.folder / f"sshd_{name}.conf"
        config.write_text(
            f"Port {SSH_PORT}\nListenAddress {address}\nHostKey {self.folder}/host_key\nPidFile none\n"
            f"AuthorizedKeysFile {self.folder}/key.pub\nPasswordAuthentication no\nStrictModes no\nUsePAM no\n"
            "PermitRootLogin prohibit-password\nPrintMotd no\n"
        )
        sshd = shlex.join([find("sshd"), "-D", "-f", str(config), "-E", str(self.folder / f"sshd_{name}.log")])
        # With a process table of its own the host ends with its first process, and nothing of it is left.
        self.shells[name] = subprocess.Popen(
            ["ip", "netns", "exec", host, "unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc",
             "sh", "-c", f"hostname {name}; {sshd}; wait"],
            stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=die_with(os.getpid()),
        )  # fmt: skip

    def remove(self):
        for shell in self.shells.values():
            shell.kill()
            shell.wait()
        for name in (*HOSTS, "switch"):
            end_namespace(self.namespace(name))
        subprocess.run(["umount", "-l", str(self.disk)], capture_output=True)

    def link(self, name, state):
        call("ip", "-n", self.namespace(name), "link", "set", "eth0", state)

    def command(self, run, data, fault, worker):
        """launch.supervise on the switch, as on a login node that trains nothing itself."""
        once = ["--once", str(run.with_suffix(".once"))]
        program = [str(ROOT / "launch/drill_worker.py"), "--pace", str(PACE_S), *once, *worker, "--"]
        supervise = [
            sys.executable, "-m", "launch.supervise", "--hostfile", str(self.folder / "hostfile"),
            "--ssh-args", f"-F {self.folder}/ssh_config", "--program", shlex.join(program),
            "--host-timeout", str(HOST_TIMEOUT_S), "--frozen-seconds", str(FROZEN_S), "--grace-seconds", "60",
        ]  # fmt: skip
        for name, value in (("GLOO_SOCKET_IFNAME", "eth0"), ("OMP_NUM_THREADS", "1"), ("DS_ACCELERATOR", "cpu")):
            supervise += ["--env", f"{name}={value}"]
        supervise += ["--env", "CUDA_VISIBLE_DEVICES=", "--"]
        train = {
            "size": "tiny", "data": data, "run": run, "steps": fault.steps, "batch-tokens": 256, "micro-batch": 2,
            "lr": 1e-3, "save-every": SAVE_EVERY, "eval-every": 0, "keep": 3, "timeout-minutes": fault.timeout_minutes,
        }  # fmt: skip
        supervise += [word for name, value in train.items() for word in (f"--{name}", str(value))]
        return ["ip", "netns", "exec", self.namespace("switch"), *supervise]


class Job:
    """One supervised run: started, watched, broken."""

    def __init__(self, cluster, run, data, fault, worker):
        self.run_dir, self.log, self.mark = RunDir(run), run.parent / f"{run.name}.log", f"{run.resolve()}@"
        self.command = cluster.command(run, data, fault, worker)
        self.process = None
        self.until = time.monotonic() + LIMIT_S

    def __enter__(self):
        self.start()
        return self

    def start(self):
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                preexec_fn=die_with(os.getpid()),
            )  # fmt: skip

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for name in HOSTS:
            for pid in processes_of(self.mark + name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def wait(self, what, condition):
        """Wait until condition() is true, and return it. Raises TimeoutError, or RuntimeError if the job has ended."""
        while not (found := condition()):
            if time.monotonic() > self.until:
                raise TimeoutError(f"waited in vain for {what}")
            if self.process.poll() is not None and not (found := condition()):
                raise RuntimeError(f"the job ended with {self.process.returncode}, before {what}")
            if found:
                break
            time.sleep(0.05)
        return found

    def finish(self):
        """The exit code."""
        try:
            return self.process.wait(max(1.0, self.until - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise TimeoutError("the job did not end") from None

    def step(self):
        rows = self.rows()
        return rows[-1]["step"] if rows else 0

    def rows(self):
        return read_metrics(self.run_dir.metrics) if self.run_dir.metrics.exists() else []

    def said(self, event, since=0.0):
        """The first entry of supervise.jsonl or events.jsonl of a kind, after a time."""
        for name in ("supervise.jsonl", "events.jsonl"):
            path = self.run_dir.path / name
            for entry in read_metrics(path) if path.exists() else []:
                if entry["event"] == event and entry["time"] >= since:
                    return entry
        return None

    def worker(self, host):
        """The process of the rank on a host."""
        for pid in processes_of(self.mark + host):
            if b"drill_worker.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        raise RuntimeError(f"no worker on {host}")


def play(fault, cluster, folder, data, unbroken):
    """Run one fault; returns its Row. unbroken: the metrics of the run to compare with."""
    row = Row(fault=fault)
    run = (cluster.disk if fault.on_small_disk else folder) / fault.name.replace(" ", "_")
    with Job(cluster, run, data, fault, fault.worker) as job:
        try:
            fault.play(fault, cluster, job, row)
            code = job.finish()
            if code != DONE:
                row.problems.append(f"the job ended with exit code {code}")
        except (TimeoutError, RuntimeError) as error:
            row.problems.append(str(error))
        finally:
            cluster.link("hostB", "up")
        compare(row, job.rows(), unbroken)
        if row.problems:
            say(f"drill: the end of {job.log}: {last_lines(job.log)}")
    if row.noticed_s is not None and row.noticed_s > fault.within_s + OWN_S:
        row.problems.append(f"noticed after {row.noticed_s:.1f} s, and not within {fault.within_s:g} s")
    for what, got, wanted in (("went on with", row.went_on, fault.after), ("named", row.named, fault.named)):
        if got != wanted:
            row.problems.append(f"{what} {got}, and not {wanted}")
    return row


def kill_worker(fault, cluster, job, row):
    break_host_b(cluster, job, row, lambda worker: os.kill(worker, signal.SIGKILL))


def freeze_worker(fault, cluster, job, row):
    break_host_b(cluster, job, row, lambda worker: os.kill(worker, signal.SIGSTOP))


def cut_host_off(fault, cluster, job, row):
    break_host_b(cluster, job, row, lambda worker: cluster.link("hostB", "down"))


def break_host_b(cluster, job, row, harm):
    """Wait for step BREAK_AT, harm the worker of hostB, and see the job noticing and going on."""
    job.wait(f"step {BREAK_AT}", lambda: job.step() >= BREAK_AT)
    worker, began = job.worker("hostB"), time.time()
    harm(worker)
    note_failure(job, row, began, worker)


def note_failure(job, row, began, worker):
    failure = job.wait("the failure to be noticed", lambda: job.said("failure", since=began))
    row.noticed_s, row.said = failure["time"] - began, failure["text"]
    row.named = f"rank {failure['rank']}, {failure['host']}"
    job.wait("the restart", lambda: job.said("start", since=failure["time"]))
    if vitals(worker)[0] not in "?ZX":
        row.problems.append("the old rank on hostB still ran when the others started again")
    note_restart(job, row, failure["time"], failure["step"])


def note_restart(job, row, since, step):
    """Write down with what and from where the job goes on that had come to `step`; returns the entry that says so."""
    resumed = job.wait("the run to go on", lambda: job.said("resumed", since=since))
    row.went_on = "both hosts" if len(resumed["hosts"]) == len(HOSTS) else resumed["hosts"][0]
    row.steps_lost = step - resumed["step"]
    if resumed["step"] == 0:
        row.problems.append("it began anew, and not from a checkpoint")
    return resumed


def lose_host_and_find_it_again(fault, cluster, job, row):
    """Cut hostB off; when the job has gone on without it, mend the link and kill the worker of hostA."""
    cut_host_off(fault, cluster, job, row)
    first, lost = row.went_on, row.steps_lost
    cluster.link("hostB", "up")
    again = BREAK_AT + SAVE_EVERY
    job.wait(f"step {again}", lambda: job.step() >= again)
    began = time.time()
    os.kill(job.worker("hostA"), signal.SIGKILL)
    note_restart(job, row, began, job.wait("a failure", lambda: job.said("failure", since=began))["step"])
    row.went_on, row.steps_lost = f"{first}, then {row.went_on}", row.steps_lost + lost


def get_stuck(fault, cluster, job, row):
    """A worker does not begin its next step: every process lives, none gets on."""
    once = job.run_dir.path.with_suffix(".once")
    job.wait("the worker to get stuck", once.exists)
    note_failure(job, row, once.stat().st_mtime, job.worker("hostB"))


def ask_to_stop(fault, cluster, job, row):
    """SIGTERM, and the start again that a scheduler makes."""
    job.wait(f"step {BREAK_AT}", lambda: job.step() >= BREAK_AT)
    began = time.time()
    job.process.terminate()
    entry = job.wait("the job to say that it stops", lambda: job.said("stopping"))
    row.noticed_s, row.said = entry["time"] - began, entry["text"]
    if (code := job.finish()) != REQUEUE:
        row.problems.append(f"ended with exit code {code}, and not {REQUEUE}")
    stopped = job.step()
    job.start()
    note_restart(job, row, entry["time"], stopped)


def take_a_bad_step(fault, cluster, job, row):
    """The worker breaks the step by itself; the job must leave that step out, and nothing else."""
    entry = job.wait("the bad step to be skipped", lambda: job.said("skip"))
    row.noticed_s, row.said, row.named, row.steps_lost = 0.0, entry["text"], f"step {entry['step']}", 1
    note_same_process(job, row)


def fill_disk(fault, cluster, job, row):
    """Fill the disk of the run's folder but for a little, until a save has failed."""
    job.wait(f"step {BREAK_AT}", lambda: job.step() >= BREAK_AT)
    began, free, filler = time.time(), os.statvfs(cluster.disk), cluster.disk / "filler"
    with open(filler, "wb") as file:
        file.write(bytes(free.f_bavail * free.f_frsize - ROOM_KB * 1024))
    entry = job.wait("the failed save", lambda: job.said("save_failed"))
    filler.unlink()
    row.noticed_s, row.said, row.steps_lost = entry["time"] - began, entry["text"], 0
    if found := re.search(r"(rank \d+) on (\w+)", entry["text"]):
        row.named = f"{found[1]}, {found[2]}"
    note_same_process(job, row)
    if not job.run_dir.checkpoint(fault.steps).exists():
        row.problems.append("the last checkpoint is missing")


def note_same_process(job, row):
    job.finish()
    row.went_on = "a restart" if job.said("failure") else "the same processes"


FEWER_HOSTS = 1e-5  # largest loss difference where a part of the steps was taken by other processes
FAULTS = (
    Fault(name="worker killed", play=kill_worker, within_s=2, named="rank 1, hostB", short=True),
    Fault(
        name="host cut off", play=cut_host_off, within_s=HOST_TIMEOUT_S + 2, named="rank 1, hostB", after="hostA",
        difference=FEWER_HOSTS,
    ),
    Fault(
        name="host cut off and back", play=lose_host_and_find_it_again, within_s=HOST_TIMEOUT_S + 2,
        named="rank 1, hostB", after="hostA, then both hosts", difference=FEWER_HOSTS,
    ),
    Fault(name="worker frozen", play=freeze_worker, within_s=FROZEN_S + 2, named="rank 1, hostB"),
    Fault(
        name="worker stuck", play=get_stuck, within_s=60 * STUCK_MINUTES + 5, named="rank 1, hostB",
        worker=("--fault", f"stuck:{BREAK_AT}:1"), timeout_minutes=STUCK_MINUTES,
    ),
    Fault(name="SIGTERM", play=ask_to_stop, within_s=2, short=True),
    Fault(
        name="NaN", play=take_a_bad_step, within_s=0, named=f"step {NAN_AT}", after="the same processes", short=True,
        worker=("--fault", f"nan:{NAN_AT}:1"), unbroken=("--skip", str(NAN_AT)), left_out=NAN_AT,
    ),
    Fault(
        name="spike", play=take_a_bad_step, within_s=0, named=f"step {SPIKE_AT}", after="the same processes",
        worker=("--fault", f"spike:{SPIKE_AT}:1"), unbroken=("--skip", str(SPIKE_AT)), left_out=SPIKE_AT,
        steps=SPIKE_STEPS,
    ),
    Fault(
        name="full disk", play=fill_disk, within_s=5, named="rank 0, hostA", after="the same processes",
        on_small_disk=True,
    ),
)  # fmt: skip


def compare(row, rows, unbroken):
    """The largest loss difference from the unbroken run, over all steps but one that was not taken."""
    fault = row.fault
    wanted = {r["step"]: r["loss"] for r in unbroken if r["step"] <= fault.steps}
    got = {r["step"]: r["loss"] for r in rows}
    if list(got) != list(range(1, fault.steps + 1)) or len(rows) != fault.steps:
        row.problems.append(f"metrics.jsonl has {len(rows)} rows, to step {max(got, default=0)} of {fault.steps}")
    steps = [step for step in got if step in wanted and step != fault.left_out]
    row.difference = max((abs(got[step] - wanted[step]) for step in steps), default=math.nan)
    if not row.difference <= fault.difference:
        row.problems.append(f"losses differ by {row.difference:.2g}, and not by {fault.difference:g} at most")


def make_data(folder):
    """A data folder of the standard library's documentation topics, made as a user makes one."""
    texts = folder / "texts"
    texts.mkdir()
    for name in sorted(topics)[:40]:
        (texts / f"{name}.txt").write_text(topics[name])
    command = [sys.executable, "-m", "curation.pipeline", "--recipe", "own", "--input", str(texts)]
    command += ["--out", str(folder / "data"), "--vocab-size", "512", "--workers", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=die_with(os.getpid()))
    if done.returncode:
        raise RuntimeError(f"the drill's data could not be made: {(done.stderr or done.stdout).strip()[-300:]}")
    return folder / "data"


def train_unbroken(fault, cluster, folder, data):
    """Metrics of a run to which nothing happens, on both hosts."""
    run = folder / f"unbroken_{'_'.join(fault.unbroken).strip('-') or 'run'}"
    with Job(cluster, run, data, fault, fault.unbroken) as job:
        code = job.finish()
        if code != DONE or job.said("failure"):
            raise RuntimeError(f"the unbroken run failed with {code}: {last_lines(job.log)}")
        return job.rows()


def last_lines(path, n=4):
    return " / ".join(path.read_text(errors="replace").splitlines()[-n:])


def call(*command):
    """Run a system command. Raises RuntimeError with its words."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`{shlex.join(command)}` failed: {(done.stderr or done.stdout).strip()}")


def find(program):
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def remove_leftovers():
    """Hosts and disks of drills that were killed, and could not remove them."""

    def is_left(name):
        return not Path("/proc", re.findall(r"\d+", name)[0]).exists()

    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    for name in filter(is_left, re.findall(r"^drill\d+-\w+", listed, re.MULTILINE)):
        end_namespace(name)
    for name, place in re.findall(r"^(drill\d+-disk) (\S+)", Path("/proc/mounts").read_text(), re.MULTILINE):
        if is_left(name):
            subprocess.run(["umount", "-l", place], capture_output=True)


def end_namespace(name):
    for pid in subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)


def check_machine():
    """Raise ValueError for a machine that cannot play two hosts."""
    missing = sorted({package for program, package in NEEDED.items() if find(program) is None})
    if os.geteuid():
        raise ValueError("the drill makes network namespaces, which needs root; run it with sudo, or in a container")
    if missing:
        raise ValueError(f"the drill needs {', '.join(missing)}; on Debian: apt-get install {' '.join(missing)}")


def noticed(row):
    if row.noticed_s is None:
        return "-"
    return "in the step" if row.fault.left_out else f"{row.noticed_s:.1f} s ({row.fault.within_s:g} s)"


def table(rows):
    """The rows as a Markdown table."""
    heads = (
        "fault",
        "noticed after (stated)",
        "named",
        "went on with",
        "steps lost",
        "largest loss difference",
        "verdict",
    )
    lines = [heads, ("---",) * len(heads)]
    for row in rows:
        lines.append((
            row.fault.name,
            noticed(row),
            row.named,
            row.went_on,
            "-" if row.steps_lost is None else str(row.steps_lost),
            "-" if row.difference is None else f"{row.difference:.1g}",
            "FAILED" if row.problems else "as expected",
        ))  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def say(text):
    print(text, file=sys.stderr, flush=True)


def drill(faults, folder):
    """Play the faults in a new cluster; returns the rows."""
    rows, unbroken = [], {}
    say("drill: making the data and two hosts")
    data = make_data(folder)
    with Cluster(folder) as cluster:
        for number, fault in enumerate(faults, 1):
            key = fault.unbroken
            if key not in unbroken:
                say(f"drill: an unbroken run {' '.join(key)}")
                unbroken[key] = train_unbroken(fault, cluster, folder, data)
            say(f"drill: {number} of {len(faults)}: {fault.name}")
            began = time.monotonic()
            row = play(fault, cluster, folder, data, unbroken[key])
            rows.append(row)
            verdict = "; ".join(row.problems) or "as expected"
            say(f"drill: {fault.name}: {row.said or 'nothing was said'} [{time.monotonic() - began:.0f} s]: {verdict}")
    return rows


def main(argv=None):
    names = [fault.name for fault in FAULTS]
    parser = argparse.ArgumentParser(
        prog="python -m launch.drill", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--short", action="store_true", help="three faults: about two minutes on two busy cores")
    parser.add_argument("--only", action="append", choices=names, help="one fault; may be given again")
    parser.add_argument("--keep", type=Path, help="a new folder for the runs and their logs, which stays")
    options = parser.parse_args(argv)
    faults = [f for f in FAULTS if (not options.only or f.name in options.only) and (f.short or not options.short)]
    try:
        check_machine()
        if options.keep:
            options.keep.mkdir(parents=True)
    except (ValueError, OSError) as error:
        say(f"error: {error}")
        return BAD_INPUT
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # an end like Ctrl-C: everything is removed
    with contextlib.ExitStack() as stack:
        folder = (options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="drill")))).resolve()
        try:
            rows = drill(faults, folder)
        except RuntimeError as error:
            say(f"error: {error}")
            return FAILED
        except KeyboardInterrupt:
            say("drill: interrupted; the hosts and their processes are removed")
            return 130
    print(table(rows))
    return FAILED if any(row.problems for row in rows) else DONE


if __name__ == "__main__":
    sys.exit(main())
