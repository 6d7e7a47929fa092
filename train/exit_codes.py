"""How a training process ends, for whoever starts it: a scheduler's script, launch.supervise, a person."""

import os
import sys

DONE = 0
FAILED = 1  # something broke; the last checkpoint is whole, so --resume may go on
BAD_INPUT = 2  # a flag or a file is wrong: starting again would end the same way
REQUEUE = 75  # asked to leave (SIGTERM, SIGUSR1): saved; go on with --resume (sysexits.h: EX_TEMPFAIL)
HUNG = 76  # the watchdog ended a process that waited too long for another; go on with --resume
INTERRUPTED = 130  # Ctrl-C: saved, and a person wants it to stay stopped


def leave(code):
    """End the process at once, without taking the interpreter apart.

    A thread of gloo that frees its last tensor just then needs the interpreter, and the process aborts: a finished run
    would look like a crashed one, about once in a hundred times (torch 2.13).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
