"""Runs in which something goes wrong: bad steps are skipped, a lost run goes back, hung ranks are named."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from launching import ROOT, free_port

from model.weights import MANIFEST, load_checkpoint, write_manifest
from train.exit_codes import FAILED, HUNG
from train.guard import LEAST, Guard
from train.processes import Told
from train.run_dir import RunDir, read_json, read_metrics
from train.stragglers import STEPS, Stragglers


def start(data, run, faults, *flags, processes=2):
    """The ranks of a run with faults, without a launcher that would end the others for us."""
    command = [
        sys.executable, str(ROOT / "tests/faulty_run.py"), "--size", "tiny", "--data", data, "--run", run,
        "--micro-batch", 4, "--eval-every", 0, "--save-every", 0, "--lr", 1e-3, *flags,
    ]  # fmt: skip
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    common |= {"FAULTS": json.dumps(faults), "LOCAL_SIZE": str(processes)}
    return [
        subprocess.Popen(
            list(map(str, command)), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]  # fmt: skip


def finish(started, timeout=120):
    """[(exit code, stderr)] of the ranks; whatever still runs at the time-out is ended."""
    try:
        return [
            (process.returncode, text) for process in started for text in [process.communicate(timeout=timeout)[1]]
        ]
    finally:
        for process in started:
            process.kill()


def events(run, kind):
    rows = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == kind]


def test_a_step_is_skipped_for_what_is_no_number_and_for_what_is_far_above_the_last_ones():
    guard = Guard(sigma=6)
    for i in range(LEAST):
        guard.loss = 3 + (0.01 if i % 2 else -0.01)
        assert guard.note(1.0 + 0.01 * (i % 2)) is None
    guard.loss = 3.05  # five sigma
    assert guard.why_not(1.0) is None
    guard.loss = 3.07
    assert guard.why_not(1.0) == "the loss 3.07 is 7.0 sigma above the 3 of the last 64 steps"
    guard.loss = 3.0
    assert "gradient norm 2 is" in guard.why_not(2.0)
    assert guard.why_not(math.inf) == "the gradient norm is inf"
    guard.loss = math.nan
    assert guard.note(1.0) == "the loss is nan"
    assert (guard.skipped_steps, guard.in_a_row) == (1, 1)
    again = Guard(sigma=6, state=json.loads(json.dumps(guard.state())))
    assert again.state() == guard.state()


def test_early_steps_and_sigma_zero_skip_only_what_is_no_number():
    for guard, steps in ((Guard(sigma=6), LEAST - 1), (Guard(sigma=0), 3 * LEAST)):
        for _ in range(steps):
            guard.loss = 3.0
            guard.note(1.0)
        guard.loss = 300.0
        assert guard.why_not(1.0) is None
        assert guard.why_not(math.nan)


def test_a_slow_rank_is_named_once_with_what_is_slow():
    stragglers = Stragglers()
    slow = Told(loss=1.0, stop=0, written=True, forward_seconds=[0.1, 0.1, 0.1, 0.15], data_seconds=[0.0] * 4)
    found = [stragglers.note(slow) for _ in range(3 * STEPS)]
    assert [f for f in found if f] == [{3: "its forward pass takes 150 ms a step, 100 ms is usual"}]


@pytest.fixture(scope="module")
def skipping(data, tmp_path_factory):
    """90 steps on two ranks: step 70 is not a number on rank 1, step 80 spikes, both are skipped; rank 1 is slow."""
    run = tmp_path_factory.mktemp("faults") / "skipping"
    faults = [["nan", 70, 1, 1], ["spike", 80, 1, 0], ["sleep", 10, 50, 1]]
    results = finish(start(data, run, faults, "--steps", 90, "--save-every", 75))
    assert [code for code, _ in results] == [0, 0], results
    return run


def test_bad_steps_are_skipped_and_named_and_the_run_goes_on(skipping):
    rows = read_metrics(skipping / "metrics.jsonl")
    assert len(rows) == 90
    assert [row["step"] for row in rows if "skipped" in row] == [70, 80]
    assert math.isnan(rows[69]["loss"]) and rows[79]["loss"] > 50 and rows[89]["loss"] < rows[0]["loss"]
    assert [row["step"] for row in events(skipping, "saved")] == [75, 90]
    first, second = events(skipping, "skip")
    assert first["text"] == "step 70 is skipped: the loss is nan"
    assert second["text"].startswith("step 80 is skipped: the loss ") and "sigma above" in second["text"]
    (slow,) = events(skipping, "slow_rank")
    assert slow["rank"] == 1 and slow["text"].startswith(f"rank 1 on {socket.gethostname()} is slow: its forward pass")
    assert load_checkpoint(RunDir(skipping).checkpoint(90)).optimizer_steps == 88


def test_a_resumed_run_remembers_its_skips_bit_for_bit(skipping, data, tmp_path):
    run = tmp_path / "run"
    faults = [["nan", 70, 1, 1], ["spike", 80, 1, 0]]
    assert [c for c, _ in finish(start(data, run, faults[:1], "--steps", 90, "--stop-after", 75))] == [0, 0]
    shifted = [["spike", 80 - 75, 1, 0]]
    assert [c for c, _ in finish(start(data, run, shifted, "--steps", 90, "--resume"))] == [0, 0]
    ours, whole = read_metrics(run / "metrics.jsonl"), read_metrics(skipping / "metrics.jsonl")
    assert [row["loss"] for row in ours[70:]] == [row["loss"] for row in whole[70:]]
    assert ours[79]["skipped"] == whole[79]["skipped"]


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_skipped_step_leaves_every_weight_and_moment_as_it_was(data, tmp_path, stage):
    run = tmp_path / "run"
    ds_config = tmp_path / "ds.json"
    settings = read_json(ROOT / "ds_configs/cpu.json")
    settings["zero_optimization"] = {"stage": stage}
    ds_config.write_text(json.dumps(settings))
    flags = ("--ds-config", ds_config, "--steps", 6, "--micro-batch", 4, "--keep", 0, "--save-every", 1)
    assert [code for code, _ in finish(start(data, run, [["nan", 4, 1, 0]], *flags))] == [0, 0]
    before, skipped, after = (load_checkpoint(RunDir(run).checkpoint(step)) for step in (3, 4, 5))
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        old, same, new = before.tensors(kind), skipped.tensors(kind), after.tensors(kind)
        assert all(bool((same[name] == old[name]).all()) for name in old)
        assert any(bool((new[name] != old[name]).any()) for name in old)


def test_a_run_that_does_not_recover_goes_back_and_passes_over_the_data(data, tmp_path):
    run = tmp_path / "run"
    faults = [["nan", 13, 3, 1]]
    flags = ("--steps", 20, "--save-every", 5, "--rollback-after", 3, "--keep", 0)
    results = finish(start(data, run, faults, *flags))
    assert [code for code, _ in results] == [0, 0], results
    (back,) = events(run, "rollback")
    assert (back["step"], back["to_step"]) == (15, 10)
    assert "back to step 10, and past the data of steps 11 to 15" in back["text"]
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert load_checkpoint(RunDir(run).checkpoint(20)).run["passed_over"] == 5

    # the same as a run that went to step 10 and goes on with the data of step 16
    other = tmp_path / "other"
    assert [c for c, _ in finish(start(data, other, [], *flags, "--stop-after", 10))] == [0, 0]
    at_10 = load_checkpoint(RunDir(other).checkpoint(10))
    shifted = {"run": at_10.run | {"passed_over": 5}}
    fields = {name: getattr(at_10, name) for name in ("step", "tokens", "shapes", "files")}
    (at_10.path / MANIFEST).unlink()
    write_manifest(at_10.path, **fields | shifted)
    assert [c for c, _ in finish(start(data, other, [], *flags, "--resume"))] == [0, 0]
    assert [r["loss"] for r in read_metrics(other / "metrics.jsonl")[10:]] == [r["loss"] for r in rows[10:]]


def test_a_run_without_a_checkpoint_to_go_back_to_ends_with_one_line(data, tmp_path):
    results = finish(start(data, tmp_path / "run", [["nan", 3, 50, 0]], "--steps", 30, "--rollback-after", 2))
    assert [code for code, _ in results] == [FAILED, FAILED]
    line = "error: 2 steps in a row, to step 4, could not be taken (the loss is nan), and there is no checkpoint from"
    assert line in results[0][1]


def test_a_frozen_rank_is_named_by_the_others_which_write_their_stacks_and_end(data, tmp_path):
    run = tmp_path / "run"
    ranks = start(data, run, [], "--steps", 100_000, "--timeout-minutes", 0.25)
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(read_metrics(run / "metrics.jsonl")) > 3, ranks)
    frozen = time.monotonic()
    ranks[1].send_signal(signal.SIGSTOP)
    _, stderr = ranks[0].communicate(timeout=60)
    ranks[1].kill()
    assert ranks[0].returncode == HUNG
    assert time.monotonic() - frozen < 15 + 10  # the collectives' own time-out is 15 s
    assert f"watchdog: rank 1 on {socket.gethostname()}: no sign of life (step " in stderr
    assert 'train/loop.py", line' in (run / "log/rank00000.stacks.txt").read_text()  # where its main thread waits
    assert len(events(run, "hang")) == 1


def test_a_rank_that_does_not_get_on_is_named_with_where_it_stands(data, tmp_path):
    run = tmp_path / "run"
    ranks = start(data, run, [["hang", 4, 1, 1]], "--steps", 100, "--timeout-minutes", 0.25)
    (code, stderr), (other_code, other_stderr) = finish(ranks, timeout=60)
    assert (code, other_code) == (HUNG, HUNG)
    where = f"rank 1 on {socket.gethostname()} (step 4, forward): has not got on for 8 s"
    assert where in stderr and where in other_stderr
    assert "faulty" in (run / "log/rank00001.stacks.txt").read_text()  # the function that hangs


def test_a_rank_that_dies_is_named_by_the_others(data, tmp_path):
    ranks = start(data, tmp_path / "run", [["die", 4, 1, 1]], "--steps", 100)
    (code, stderr), (other_code, _) = finish(ranks, timeout=60)
    assert (code, other_code) == (FAILED, -signal.SIGKILL)
    assert f"silent: rank 1 on {socket.gethostname()}; go on with --resume" in stderr


def wait_for(condition, ranks, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and all(rank.poll() is None for rank in ranks)
        time.sleep(0.2)
