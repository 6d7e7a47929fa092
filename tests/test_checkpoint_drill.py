"""Savers killed with kill -9 at random moments, and what they left damaged: the newest good checkpoint comes back.

A small network is trained by one to three processes that save after every step. Each case is a life of theirs: they
take the newest whole checkpoint, go on, and are killed, one or all of them; then bits of the newest checkpoints are
flipped, files are cut, deleted, emptied or lengthened. The next life must find the newest one that was left alone,
name each damaged file, and have the losses of a run that nothing happened to.

40 cases; BRAID_LONG_DRILL=1 makes it 200, and BRAID_DRILL_SEED=n others.
"""

import os
import random
import select
import signal
import time
from collections import Counter

import torch
from saving import join_group, run_ranks, training_engine

import train.checkpoint
from model.weights import load_checkpoint
from train.checkpoint import BackgroundSave, delete_old, newest_whole, restore_optimizer
from train.run_dir import RunDir, remove_unfinished

CASES = 200 if float(os.environ.get("BRAID_LONG_DRILL", 0)) else 40
SEED = int(os.environ.get("BRAID_DRILL_SEED", 0))
KEEP = 4
LAST_STEP = 100_000
DAMAGES = ("flip", "flip", "cut", "cut", "delete", "empty", "lengthen", "zeros")


def live(rank, run_dir, say, last_step):
    """One rank's life: recover, train, save after every step; `say` tells the test what it does."""
    engine, save = training_engine(), BackgroundSave()
    checkpoint = newest_whole(run_dir, lambda line: say("skipped", line))
    start = checkpoint.step if checkpoint else 0
    if checkpoint:
        with torch.no_grad():
            for name, weight in checkpoint.tensors().items():
                engine.module.get_parameter(name).copy_(weight)
        restore_optimizer(engine, checkpoint)
    if rank == 0:
        remove_unfinished(run_dir)
    say("recovered", start)
    for step in range(start + 1, last_step + 1):
        say("loss", step, train_step(engine, step))
        if save.pending:
            say("saved", int(save.finish().name.removeprefix("step_")))
            if rank == 0:
                delete_old(run_dir, KEEP, {})
        save.begin(
            engine, run_dir.checkpoint(step), step=step, tokens=step, run={"seed": SEED},
            tokenizer=run_dir.path / "tokenizer",
        )  # fmt: skip
    if save.pending:
        save.finish()


def train_unbroken(rank, last_step):
    engine = training_engine()
    return {step: train_step(engine, step) for step in range(1, last_step + 1)}


def train_step(engine, step):
    """The loss of a step, exactly."""
    batch = torch.randn(16, 64, generator=torch.Generator().manual_seed(step))
    loss = engine.module(batch).square().mean()
    engine.optimizer.zero_grad()
    loss.backward()
    engine.optimizer.step()
    return loss.item().hex()


class Life:
    """Processes that save together, and the lines that they have written so far."""

    def __init__(self, run_dir, world_size, store, last_step=LAST_STEP):
        self.pids, self.reader, self.text = [], None, ""
        self.reader, writer = os.pipe()
        for rank in range(world_size):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    os.setpgid(0, 0)

                    def say(*words, rank=rank):
                        os.write(writer, (" ".join(map(str, (rank, *words))) + "\n").encode())

                    join_group(rank, world_size, store, timeout_s=10)
                    live(rank, run_dir, say, last_step)
                    code = 0
                except RuntimeError:  # another rank was killed
                    code = 3
                finally:
                    os._exit(code)
            self.pids.append(pid)
        os.close(writer)

    def read(self, seconds, until=None):
        """Take in what they write for some seconds, or until a word comes up, or to the end."""
        ends = time.monotonic() + seconds
        while (left := ends - time.monotonic()) > 0 and not (until and f" {until} " in self.text):
            if select.select([self.reader], [], [], left)[0]:
                text = os.read(self.reader, 1 << 16).decode()
                if not text:
                    return
                self.text += text

    def kill(self, ranks):
        """kill -9 of these ranks, then of whoever does not end by itself. Returns the ranks' exit codes."""
        for rank in ranks:
            os.kill(self.pids[rank], signal.SIGKILL)
        self.read(0.3)  # the others meet a lost connection
        codes = []
        for pid in self.pids:
            found, status = os.waitpid(pid, os.WNOHANG)
            if not found:
                os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
            codes.append(os.waitstatus_to_exitcode(status))
        self.read(5)
        os.close(self.reader)
        return codes

    def said(self, word):
        """[(rank, [words after it])] of the whole lines that begin with a word."""
        lines = [line.split(" ") for line in self.text.split("\n")[:-1]]
        return [(int(line[0]), line[2:]) for line in lines if line[1] == word]


def damage(path, how, draw):
    """Damage one file of a checkpoint, so that it differs. Returns its name."""
    file = draw.choice(sorted(path.iterdir()))
    content = bytearray(file.read_bytes())
    if how == "flip":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif how == "cut":
        del content[draw.randrange(len(content)) :]
    elif how == "empty":
        content.clear()
    elif how == "lengthen":
        content += bytes(draw.randrange(1, 9))
    elif how == "zeros":  # a page that never reached the disk
        first = draw.randrange(len(content))
        page = content[first : first + 4096]
        content[first : first + 4096] = bytes(len(page)) if any(page) else b"x" * len(page)
    if how == "delete":
        file.unlink()
    else:
        file.write_bytes(content)
    return file.name


def test_killed_and_damaged_runs_recover_to_the_newest_good_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(train.checkpoint, "HOST_BLOCK", 5000)  # many writes a file: many moments to be killed at
    draw = random.Random(SEED)
    run_dir = RunDir(tmp_path / "run")
    run_dir.path.mkdir()
    (run_dir.path / "tokenizer").write_bytes(b"tokens" * 50)
    losses, hurt, counts = {}, {}, Counter()  # hurt: {step: (damaged file, inode)}
    expected = 0  # the step that the next life must go on from
    for case in range(CASES):
        world_size = draw.choice((1, 1, 2, 3))
        life = Life(run_dir, world_size, tmp_path / f"store{case}")
        if draw.random() < 0.1:
            life.read(draw.uniform(0, 0.05))  # killed while it recovers
        else:
            life.read(30, until="recovered")
            life.read(draw.uniform(0, 0.25))
        one = world_size > 1 and draw.random() < 0.3
        codes = life.kill([draw.randrange(world_size)] if one else range(world_size))
        counts["one of several killed" if one else "all killed"] += 1
        assert set(codes) <= {-signal.SIGKILL, 3}, life.text

        recovered = {int(step) for _, [step] in life.said("recovered")}
        assert recovered <= {expected}, (case, recovered, expected)
        if recovered:
            counts["recoveries"] += 1
            lines = [" ".join(words) for _, words in life.said("skipped")]
            for step, (name, _) in hurt.items():
                assert any(f"step_{step:07d}" in line and name in line for line in lines), (step, name, lines)
        for _, [step, loss] in life.said("loss"):
            assert losses.setdefault(int(step), loss) == loss, (case, step)
        newest_saved = max([int(step) for _, [step] in life.said("saved")], default=expected)
        there = {int(path.name.removeprefix("step_")): path.stat().st_ino for path in run_dir.checkpoints()}
        hurt = {step: (name, inode) for step, (name, inode) in hurt.items() if there.get(step) == inode}
        good = sorted(there.keys() - hurt.keys(), reverse=True)
        assert max(good, default=0) >= newest_saved, case
        counts["killed in the middle of a save"] += bool(run_dir.unfinished())

        for step in good[: draw.choice((0, 1, 1, 1, 2, 3))]:
            how = draw.choice(DAMAGES)
            hurt[step] = damage(run_dir.checkpoint(step), how, draw), there[step]
            counts[how] += 1
        expected = max([step for step in good if step not in hurt], default=0)

    last_step = max(losses) + 1
    life = Life(run_dir, 2, tmp_path / "store", last_step)
    life.read(60)
    assert life.kill([]) == [0, 0], life.text
    assert {int(step) for _, [step] in life.said("recovered")} == {expected}
    losses |= {int(step): loss for _, [step, loss] in life.said("loss")}
    [unbroken] = run_ranks(1, train_unbroken, tmp_path, last_step)
    assert losses == unbroken
    assert load_checkpoint(run_dir.checkpoint(last_step)).step == last_step
    print(dict(counts), f"{last_step} steps")
