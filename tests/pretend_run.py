"""Plays train/launch.py for tests/test_supervise.py: counts steps instead of training, and fails as it is told.

    pretend_run.py MODE -- flags of train/launch.py

It writes metrics.jsonl and an empty checkpoint at every fifth step, and goes on from the newest. MODE, in its first
attempt (a file in the run's folder remembers): kill, fail or bad makes rank 1 end at step 7, freeze stops it there,
silent stops all output, child leaves a detached process behind, ok nothing; kill-always does it in every attempt.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

mode, _, *flags = sys.argv[1:]
run, rank = Path(flags[flags.index("--run") + 1]), int(os.environ["RANK"])
steps = int(flags[flags.index("--steps") + 1])
asked: list[int] = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: asked.append(number))
saved = sorted((run / "checkpoints").glob("step_*"))
start = int(saved[-1].name.removeprefix("step_")) if saved else 0
been = run / f"been{rank}"
first = not been.exists()
been.touch()
(run / "at").write_text("0")
(run / "stop").unlink(missing_ok=True)
(run / f"pid{rank}").write_text(str(os.getpid()))
(run / "flags").write_text(" ".join(flags))
if mode == "child":
    # neither in this process's group nor its child
    subprocess.run([sys.executable, "-c", "import os, time; os.fork() and os._exit(0); os.setsid(); time.sleep(600)"])
if rank == 0:
    print(f"{run} goes on from step {start}, to {steps}: tiny", flush=True)
for step in range(start + 1, steps + 1):
    time.sleep(0.05)
    if step == 7 and rank == 1 and (first or mode == "kill-always"):
        if mode.startswith("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        elif mode == "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif mode in ("fail", "bad"):
            print("error: no such thing", flush=True)
            sys.exit(1 if mode == "fail" else 2)
    if mode == "silent" and step == 7 and first:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(600)
    if rank == 1:
        (run / "at").write_text(str(step))
        if asked and (run / "stop").exists():
            break
        continue
    waited = time.monotonic()
    while int((run / "at").read_text() or 0) < step:  # as in a collective
        time.sleep(0.01)
        if asked and time.monotonic() - waited > 0.5:
            sys.exit(1)
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": step, "loss": 1.0}) + "\n")
    if step % 5 == 0 or asked or step == steps:
        (run / f"checkpoints/step_{step:07d}").mkdir(parents=True, exist_ok=True)
    if asked:
        (run / "stop").touch()
        break
if asked:
    sys.exit(75 if asked[0] == signal.SIGTERM else 130)
