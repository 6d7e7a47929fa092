"""The supervisor and its agents, with ranks that count instead of training (tests/pretend_run.py)."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from launching import ROOT

from launch.agent import processes_of, vitals
from launch.supervise import FIRST_WAIT_S, lay_out, main, read_hostfile
from train.config import TrainConfig
from train.exit_codes import BAD_INPUT, DONE, FAILED, INTERRUPTED, REQUEUE

PRETEND = ROOT / "tests/pretend_run.py"
TRAIN = ["--size", "tiny", "--data", "nowhere", "--steps"]


def command(run, mode, *options, steps=20):
    return [
        sys.executable, "-m", "launch.supervise", "--processes", "2", "--frozen-seconds", "0.5", *options,
        "--program", shlex.join([str(PRETEND), mode, "--"]), "--", "--run", str(run), *TRAIN, str(steps),
    ]  # fmt: skip


def supervise(run, mode, *options, steps=20):
    return subprocess.run(
        command(run, mode, *options, steps=steps), cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def start(run, mode, *options, steps=1000):
    """A supervisor in the background, once its ranks have come to step 3."""
    process = subprocess.Popen(
        command(run, mode, *options, steps=steps),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for(lambda: (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= 3)
    return process


def wait_for(condition, seconds=20):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def entries(run, event):
    rows = [json.loads(line) for line in (run / "supervise.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == event]


def left(run):
    return processes_of(f"{run.resolve()}@localhost")


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("kill", "rank 1 on localhost was killed by SIGKILL"),
        ("fail", "rank 1 on localhost ended with exit code 1 (failed): error: no such thing"),
        ("freeze", "rank 1 on localhost is frozen: process "),
    ],
)
def test_a_rank_that_dies_or_freezes_is_named_and_the_job_goes_on_from_its_checkpoint(tmp_path, mode, said):
    done = supervise(tmp_path, mode)
    assert done.returncode == DONE, done.stdout + done.stderr
    (failure,) = entries(tmp_path, "failure")
    assert failure["text"].startswith(said) and f"supervise: {failure['text']}" in done.stderr
    assert (failure["rank"], failure["host"], failure["resumed_from"]) == (1, "localhost", 0)
    assert failure["noticed_after_s"] < 1
    assert [entry["step"] for entry in entries(tmp_path, "resumed")] == [0, 5]
    first, second = entries(tmp_path, "start")
    assert first["master"] != second["master"]
    assert not left(tmp_path)
    assert "[localhost 0] " in done.stdout and "--steps 20 --resume" in (tmp_path / "flags").read_text()


def test_a_job_that_comes_no_further_is_given_up_with_one_line(tmp_path):
    done = supervise(tmp_path, "kill-always", steps=7)
    assert done.returncode == FAILED
    (line,) = [line for line in done.stderr.splitlines() if "gives up" in line]
    assert "3 attempts in a row came no further than step 6; the last reason: rank 1 on localhost was killed" in line
    assert len(entries(tmp_path, "start")) == 3
    waits = [entry["text"] for entry in entries(tmp_path, "restart")]
    assert waits[0].startswith(f"starts again in {FIRST_WAIT_S:.0f} s")


def test_bad_input_is_not_tried_again(tmp_path):
    done = supervise(tmp_path, "bad")
    assert done.returncode == BAD_INPUT
    assert len(entries(tmp_path, "start")) == 1 and "error: no such thing" in entries(tmp_path, "failure")[0]["text"]


def test_a_job_without_a_step_or_a_word_is_started_again(tmp_path):
    done = supervise(tmp_path, "silent", "--stall-minutes", "0.02")
    assert done.returncode == DONE, done.stderr
    (failure,) = entries(tmp_path, "failure")
    assert (
        failure["text"].startswith("nothing new for 0.0 minutes") and "rank 1 on localhost: state S" in failure["text"]
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, REQUEUE), (signal.SIGINT, INTERRUPTED)])
def test_a_signal_reaches_the_ranks_which_save_and_its_exit_code_says_what_to_do(tmp_path, number, code):
    process = start(tmp_path, "ok")
    process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == code, output
    saved = max(path.name for path in (tmp_path / "checkpoints").iterdir())
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert saved == f"step_{last:07d}"
    assert not left(tmp_path)


def test_no_rank_outlives_a_killed_supervisor(tmp_path):
    process = start(tmp_path, "child")
    assert len(left(tmp_path)) == 4  # two ranks, and the process that each has left behind
    process.kill()
    wait_for(lambda: not left(tmp_path))


def test_no_rank_outlives_a_killed_agent_and_the_job_goes_on(tmp_path):
    process = start(tmp_path, "ok", "--host-timeout", "2", steps=40)
    rank = int((tmp_path / "pid0").read_text())
    os.kill(parent(rank), signal.SIGKILL)
    wait_for(lambda: vitals(rank)[0] in "?Z", seconds=2)
    output, _ = process.communicate(timeout=40)
    assert process.returncode == DONE, output
    assert "host localhost (ranks 0 to 1) is gone: its agent is gone" in output


def parent(pid):
    return int((open(f"/proc/{pid}/stat").read().rpartition(")")[2]).split()[1])


def test_an_agent_that_hears_nothing_for_its_lease_kills_its_ranks(tmp_path):
    agent = subprocess.Popen(
        [sys.executable, "-m", "launch.agent"], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert json.loads(agent.stdout.readline())["kind"] == "ready"
    order = {
        "do": "start", "mark": str(tmp_path), "cwd": str(tmp_path), "command": ["sleep", "600"], "env": {},
        "ranks": [4, 5], "lease_s": 1.0, "frozen_s": 5.0,
    }  # fmt: skip
    agent.stdin.write(json.dumps(order) + "\n")
    agent.stdin.flush()  # and stays open
    reports = [json.loads(line) for line in agent.stdout]
    assert agent.wait(5) == 0
    ended = {report["rank"]: report["code"] for report in reports if report["kind"] == "ended"}
    assert ended == {4: -signal.SIGKILL, 5: -signal.SIGKILL}
    assert reports[-1] == {"kind": "over", "killed": 2}
    assert not processes_of(str(tmp_path))


def test_a_run_has_one_supervisor_at_a_time(tmp_path):
    process = start(tmp_path, "ok")
    second = supervise(tmp_path, "ok")
    assert second.returncode == BAD_INPUT and "is supervised already" in second.stderr
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == REQUEUE


def test_fewer_hosts_are_used_only_as_far_as_the_batch_divides():
    config = TrainConfig(size="tiny", data="d", run="r", batch_tokens=64 * 24, micro_batch=4)
    assert lay_out(config, {"a": 2, "b": 2, "c": 2}, 1) == (["a", "b", "c"], 4)
    assert lay_out(config, {"a": 4, "b": 4}, 1) == (["a", "b"], 3)
    assert lay_out(config, {"a": 2, "b": 5, "c": 1}, 1) == (["a", "b", "c"], 3)
    assert lay_out(config, {"a": 2, "b": 5}, 1) == (["a"], 4)
    assert lay_out(replace(config, micro_batch="auto"), {"a": 2, "b": 2}, 1) == (["a", "b"], "auto")
    with pytest.raises(ValueError, match="24 sequences must divide over their processes"):
        lay_out(config, {"a": 2, "b": 5}, 2)


def test_a_hostfile_is_read_as_deepspeed_reads_it_and_bad_lines_are_named(tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("# two hosts\nnode1 slots=8\n\nnode2 slots=4  # smaller\n")
    assert read_hostfile(path) == {"node1": 8, "node2": 4}
    for text, said in (
        ("node1\n", "line 1: 'node1'"),
        ("node1 slots=8\nnode1 slots=8\n", "line 2"),
        ("", "names no host"),
        ("node1 slots=8\nlocalhost slots=8", "localhost is another host"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=said):
            read_hostfile(path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no flags of train/launch.py"),
        (
            ["--hostfile", "nowhere", "--", "--size", "tiny", "--data", "d"],
            "--hostfile nowhere cannot be read: No such ",
        ),
        (["--hostfile", sys.executable, "--", "--size", "tiny", "--data", "d"], "each line is `name slots=8`"),
        (
            ["--", "--size", "tiny", "--data", "d", "--run", __file__],
            f"--run {__file__} cannot be written: File exists; ",
        ),
        (["--min-hosts", "2", "--", "--size", "tiny", "--data", "d"], "--min-hosts 2 of 1 hosts"),
        (["--processes", "0", "--", "--size", "tiny", "--data", "d"], "--processes 0; allowed: 1 or more"),
        (["--processes", "-2", "--", "--size", "tiny", "--data", "d"], "--processes -2; allowed: 1 or more"),
        (["--env", "A", "--", "--size", "tiny", "--data", "d"], "--env A is not NAME=VALUE"),
        (["--", "--size", "9B", "--data", "d"], "9B"),
        (["--", "--data", "d"], "neither --size nor --preset"),
    ],
)
def test_wrong_flags_end_with_one_line(arguments, said, capsys):
    assert main(arguments) == BAD_INPUT
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1
