"""Runs a program that a model wrote where it can do no harm: in a process of its own, alone in Linux namespaces.

What holds it: a user namespace in which it has no capability (and, started by root, is nobody); a file system of its
own in memory with Python's library in it, read-only, and no program, no device, no /proc and no other file of this
machine; no network, not even a loopback; no other process to see or to signal; limits on each process's memory and CPU
time, on processes, open files and what it writes; and a clock, at whose end all that it started is killed. What does
not hold it: no filter of system calls stands before the kernel, so a program that breaks the kernel breaks out; and
memory is counted by process, so the most that it takes is the limit times the processes.

Needs Linux 5.12 and user namespaces, which take no root. Where the kernel, a container or AppArmor forbids them,
SandboxError says so and nothing is run.
"""

import contextlib
import ctypes
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

PASSED, FAILED, TIMED_OUT = "passed", "failed", "timed out"
NOBODY = 65534
DETAIL = 500  # characters that are kept of what went wrong
FILES_MIB = 16  # of the program's own file system
REFUSED = "no sandbox can be made on this machine, so nothing is run"


class SandboxError(ValueError):
    """There is no sandbox here, and so the program was not run."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    status: str  # passed: ran to its end; failed: raised, exited, or was killed; timed out
    detail: str  # what went wrong, "" when it passed


def run_program(source, *, seconds=10.0, memory_mib=1024, processes=8):
    """Run Python source in a sandbox of its own and say how it ended.

    seconds: by the clock; memory_mib: address space of each process; processes: at once, up to
    three of them the sandbox's own. Raises SandboxError where no sandbox can be made.
    """
    order = {"source": source, "seconds": seconds, "memory": memory_mib << 20, "processes": processes,
             "word": secrets.token_hex(8), "root": os.geteuid() == 0}  # fmt: skip
    # a session of its own, so that all of it can be killed; -I -S and no environment: it imports nothing of ours
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", Path(__file__).resolve()], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, bufsize=0, env={}, cwd="/", start_new_session=True,
    )  # fmt: skip
    try:
        if child.stdout.readline() == b"unshared\n":
            map_users(child.pid)
            out, err = child.communicate(json.dumps(order).encode() + b"\n", timeout=seconds + 20)
        else:
            out, err = child.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        raise SandboxError(
            "the sandbox did not answer within 20 s of its time limit: the machine is overloaded"
        ) from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
    try:
        return Outcome(**json.loads(out))
    except ValueError:
        said = err.decode(errors="replace").strip().splitlines() or [f"it ended with exit code {child.returncode}"]
        raise SandboxError(f"{REFUSED}: {said[-1]}{apparmor()}") from None


def check_sandbox():
    """Raise SandboxError, with one line that says why, where no sandbox can be made."""
    if sys.platform != "linux":
        raise SandboxError(f"{REFUSED}: it is {sys.platform}, and it takes Linux")
    outcome = run_program("import collections, math, random, re")
    if outcome.status != PASSED:
        raise SandboxError(f"{REFUSED}: an empty program {outcome.status} in it ({outcome.detail})")


def apparmor():
    """What to do about Ubuntu's restriction, where it stands."""
    name = "kernel.apparmor_restrict_unprivileged_userns"
    path = Path("/proc/sys") / name.replace(".", "/")
    return f" ({name} is 1: set it to 0, or run as root)" if path.is_file() and path.read_text().strip() == "1" else ""


def map_users(pid):
    """Name the users of the sandbox: its root, who sets it up, is us; where we are root it has a nobody, too."""
    more = f"{NOBODY} {NOBODY} 1\n" if os.geteuid() == 0 else ""
    try:
        if not more:
            write_at_once(f"/proc/{pid}/setgroups", "deny")
        write_at_once(f"/proc/{pid}/uid_map", f"0 {os.geteuid()} 1\n{more}")
        write_at_once(f"/proc/{pid}/gid_map", f"0 {os.getegid()} 1\n{more}")
    except OSError as error:
        raise SandboxError(f"{REFUSED}: the kernel refuses to map users ({error.strerror}){apparmor()}") from None


def write_at_once(path, text):
    """Write to a file of /proc, which takes what it takes in one call."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


# ---- inside: run by path in the child, with nothing but the standard library


CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000  # linux/sched.h
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18  # linux/mount.h
MNT_DETACH, AT_FDCWD, AT_RECURSIVE, READ_ONLY_NOSUID_NODEV = 2, -100, 0x8000, 1 | 2 | 4
SYS_MOUNT_SETATTR = 442  # the same number on all architectures
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 24, 38  # linux/prctl.h
CAPABILITY_VERSION_3 = 0x20080522  # linux/capability.h


def kernel(name, *arguments):
    """Call a function of libc. Raises OSError that names it and gives the kernel's reason."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(f"{name}: {os.strerror(ctypes.get_errno())}")


def inside():
    """Build the sandbox around this process and run the ordered program in it; the answer is a line on stdout."""
    kernel("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    write_at_once("/proc/self/oom_score_adj", "1000")  # short of memory, the kernel ends this first
    try:
        kernel("unshare", CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS)
    except OSError as error:
        raise OSError(f"the kernel, or the container around us, forbids user namespaces ({error})") from None
    os.write(1, b"unshared\n")
    order = json.loads(sys.stdin.buffer.readline())
    with contextlib.suppress(OSError):  # one fence more, where /proc/sys can be written: no namespaces in ours
        write_at_once("/proc/sys/user/max_user_namespaces", "0")
    null = os.open("/dev/null", os.O_RDWR)
    make_root()
    first = os.fork()  # is process 1 of the namespace: when it ends, the kernel kills all others in there
    if first == 0:
        watch(order, null)
    os.waitpid(first, 0)


def make_root():
    """Exchange this machine's file system for one in memory with Python's library, read-only, and an empty /tmp."""
    kernel("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    size = f"size={FILES_MIB}m,nr_inodes=4096,mode=755".encode()
    kernel("mount", b"sandbox", b"/tmp", b"tmpfs", MS_NOSUID | MS_NODEV, size)
    os.mkdir("/tmp/old")
    kernel("pivot_root", b"/tmp", b"/tmp/old")
    os.chdir("/")
    library = {*sys.path, f"{sys.base_prefix}/lib", "/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache"}
    for path in sorted(library):  # a folder before what is in it
        there = f"/old{path}"
        if os.path.lexists(path) or not os.path.lexists(there):
            continue
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if os.path.islink(there):
            os.symlink(os.readlink(there), path)
            continue
        if os.path.isdir(there):
            os.mkdir(path)
        else:
            os.close(os.open(path, os.O_CREAT))
        show_read_only(there, path)
    os.mkdir("/tmp")
    os.chmod("/tmp", 0o777)
    kernel("umount2", b"/old", MNT_DETACH)
    os.rmdir("/old")
    os.chdir("/tmp")


def show_read_only(there, path):
    """Mount a folder or file, and what is mounted in it, in a second place, where nobody can write to it."""
    kernel("mount", there.encode(), path.encode(), None, MS_BIND | MS_REC, None)
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY_NOSUID_NODEV, 0, 0, 0)  # struct mount_attr
    try:
        kernel(
            "syscall", SYS_MOUNT_SETATTR, AT_FDCWD, path.encode(), AT_RECURSIVE, attributes, ctypes.sizeof(attributes)
        )
    except OSError as error:
        raise OSError(f"{path} cannot be made read-only, which takes Linux 5.12 ({error})") from None


def watch(order, null):
    """As process 1: start the program, wait for its word or for the clock, and answer. Does not return."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        try:
            confine(order, null, writing)
            run(order["source"], order["word"], writing)
        finally:
            os._exit(1)
    os.close(writing)
    said, deadline = b"", time.monotonic() + order["seconds"]
    answer = {"status": TIMED_OUT, "detail": f"not finished after {order['seconds']:g} s"}
    while (left := deadline - time.monotonic()) > 0:
        if select.select([reading], [], [], left)[0]:
            piece = os.read(reading, 4096)
            said = (said + piece)[: 4 * DETAIL]
            if not piece:  # the program, and all that it started, is gone
                answer = {"status": FAILED, "detail": "it ended before its end was reached"}
                break
            if said.endswith(b"\n") or len(said) == 4 * DETAIL:
                last = said.decode(errors="replace").strip()
                passed = last == order["word"]
                answer = {"status": PASSED if passed else FAILED, "detail": "" if passed else last[:DETAIL]}
                break
    os.write(1, json.dumps(answer).encode() + b"\n")
    os._exit(0)


def confine(order, null, writing):
    """In the program's own process: no way to this machine but `writing`, no privilege, and limits on what it uses."""
    import resource

    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.closerange(3, writing)
    os.closerange(writing + 1, 1024)
    limits = {
        "AS": order["memory"], "NPROC": order["processes"], "CPU": int(order["seconds"]) + 1,
        "FSIZE": FILES_MIB << 20, "NOFILE": 64, "CORE": 0, "MEMLOCK": 0, "MSGQUEUE": 0,
    }  # fmt: skip
    for name, limit in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    with contextlib.suppress(OSError):  # until the kernel knows no more of them
        for capability in range(64):
            kernel("prctl", PR_CAPBSET_DROP, capability, 0, 0, 0)
    if order["root"]:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    kernel("capset", header, (ctypes.c_uint32 * 6)())
    kernel("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def run(source, word, writing):
    """Run the program and write the word behind it, or else what it raised. Does not return."""
    write, leave, own = os.write, os._exit, os.getpid()  # which the program might replace
    try:
        exec(compile(source, "program", "exec"), {"__name__": "program"})
        said = word
    except BaseException as error:  # SystemExit too: a program that leaves early has not passed
        said = (
            f"raised {type(error).__name__}: {str(error)[:DETAIL]!r}"
            if str(error)
            else f"raised {type(error).__name__}"
        )
    if os.getpid() == own:
        write(writing, said.replace("\n", " ").encode(errors="replace") + b"\n")
    leave(0)


if __name__ == "__main__":
    try:
        inside()
    except OSError as error:
        sys.exit(str(error))
