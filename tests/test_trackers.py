"""W&B, TensorBoard and ClearML, offline, their files read back; and what happens to a run when one of them fails."""

import json
import os
import struct
import subprocess
import sys
import time
import zipfile

import pytest
from launching import ROOT, free_port
from small_run import write_lines

from train import trackers
from train.config import TrainConfig
from train.run_dir import RunDir, read_metrics
from train.trackers import Tracker, check_trackers

OFFLINE = {"WANDB_MODE": "offline", "CLEARML_OFFLINE_MODE": "1"}
FLAGS = ["--size", "tiny", "--steps", "10", "--eval-every", "5", "--eval-tokens", "500", "--norms-every", "5"]


def row_of(step):
    return {
        "step": step,
        "loss": 5.0 - step / 10,
        "tokens": 100 * step,
        "heldout_bits_per_byte_by_source": {"one": 2.5},
    }


@pytest.fixture
def run_dir(tmp_path):
    """A run's folder with three steps, as trackers see it."""
    (tmp_path / "config.json").write_text(json.dumps({"run": {"size": "tiny"}, "model": {"d_model": 32}}))
    write_lines(tmp_path / "metrics.jsonl", [row_of(step) for step in (1, 2, 3)])
    return RunDir(tmp_path)


@pytest.fixture
def broken_wandb(tmp_path_factory, monkeypatch):
    """In the trackers' programs, a wandb that fails as one does without a network."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "wandb.py").write_text(
        "Settings = dict\ndef init(**_):\n    raise OSError('no way to\\napi.wandb.ai')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder))


def of_wandb(run_dir):
    """[(run id, [{key: value} of each row])] of the offline files, in the order in which they were written."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted((run_dir.path / "trackers/wandb").glob("offline-run-*/*.wandb")):
        rows, run_id = [], None
        for message in messages_of(path.read_bytes()):
            record = Record.FromString(message)
            if record.HasField("run"):
                run_id = record.run.run_id
            if record.HasField("history"):
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                rows.append({key: json.loads(value) for key, value in items.items() if not key.startswith("_")})
        found.append((run_id, rows))
    return found


def messages_of(data):
    """The messages of W&B's file: seven bytes, then LevelDB's log format, in blocks of 32 KiB."""
    place, message = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # no room for another header in this block
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<4xHB", data[place : place + 7])
        message += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield message
            message = b""


def of_tensorboard(run_dir):
    """{key: [(step, value)]}"""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir.path / "tensorboard")).Reload()
    return {key: [(event.step, event.value) for event in events.Scalars(key)] for key in events.Tags()["scalars"]}


def train(data, run, *flags):
    command = [sys.executable, str(ROOT / "train/launch.py"), *FLAGS, "--data", data, "--run", run, *flags]
    environment = os.environ | OFFLINE | {"MASTER_PORT": str(free_port())}
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=120)


def test_run_that_is_resumed_goes_on_in_the_same_tracker_runs(data, tmp_path):
    run_dir, both = RunDir(tmp_path / "run"), ("--wandb", "braid", "--tensorboard")
    for more in (["--stop-after", 4, *both], ["--resume", *both]):
        result = train(data, run_dir.path, *more)
        assert result.returncode == 0, result.stderr[-2000:]
        assert "has stopped" not in result.stderr
    rows = read_metrics(run_dir.metrics)
    assert len(rows) == 10
    (first_id, first), (second_id, second) = of_wandb(run_dir)
    assert first_id == second_id == (run_dir.path / "trackers/wandb.id").read_text().strip()
    assert [row["step"] for row in first + second] == list(range(1, 11))
    for row, sent in zip(rows, first + second, strict=True):
        assert (sent["loss"], sent["lr"]) == (row["loss"], row["lr"])
    assert second[0]["grad_norm_by_part/mamba"] == rows[4]["grad_norm_by_part"]["mamba"]
    shown = of_tensorboard(run_dir)
    assert shown["loss"] == [(row["step"], pytest.approx(row["loss"])) for row in rows]
    assert [step for step, _ in shown["heldout_bits_per_byte_by_source/one"]] == [4, 5, 10]


def test_clearml_keeps_an_offline_session(run_dir, tmp_path_factory):
    cache = tmp_path_factory.mktemp("clearml")
    command = [sys.executable, "-m", "train.trackers", run_dir.path, "--clearml", "braid", "--from-step", "2"]
    environment = os.environ | OFFLINE | {"CLEARML_CACHE_DIR": str(cache)}
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=60, check=True)
    (session,) = (cache / "offline").glob("*.zip")
    assert session.stem == (run_dir.path / "trackers/clearml.id").read_text().strip()
    with zipfile.ZipFile(session) as opened:
        events = [event for line in opened.read("metrics.jsonl").splitlines() for event in json.loads(line)]
        assert json.loads(opened.read("task.json"))["project_name"] == "braid"
    losses = [(event["iter"], event["value"]) for event in events if event["metric"] == "loss"]
    assert sorted(losses) == [(2, 4.8), (3, 4.7)]
    assert ("heldout_bits_per_byte_by_source", "one") in {(event["metric"], event["variant"]) for event in events}


def test_tensorboard_forgets_the_steps_that_a_run_went_back_behind(run_dir):
    assert trackers.main([str(run_dir.path), "--tensorboard"]) == 0
    time.sleep(1.1)  # TensorBoard's files are named by the second
    write_lines(run_dir.metrics, [row_of(1), row_of(2) | {"loss": 1.0}])
    assert trackers.main([str(run_dir.path), "--tensorboard", "--from-step", "2"]) == 0
    assert of_tensorboard(run_dir)["loss"] == [(1, pytest.approx(4.9)), (2, 1.0)]


def test_rows_of_a_file_that_was_cut_while_it_was_followed_are_sent_again_from_there(run_dir):
    tracker = Tracker(run_dir, "tensorboard", True, 1)
    while not list((run_dir.path / "tensorboard").glob("*")):
        assert tracker.problem() is None
        time.sleep(0.1)
    time.sleep(2)  # it looks every second
    new = run_dir.path / "new"
    write_lines(new, [row_of(1), row_of(2) | {"loss": 1.0}])
    os.replace(new, run_dir.metrics)
    tracker.go_back(2)
    assert tracker.close() is None
    assert [loss for _, loss in of_tensorboard(run_dir)["loss"]] == pytest.approx([4.9, 4.8, 4.7, 1.0])


@pytest.mark.parametrize("name", trackers.NAMES)
def test_tracker_that_is_not_installed_is_one_line_with_the_command(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    config = TrainConfig(data="x", **{name: True if name == "tensorboard" else "braid"})
    with pytest.raises(ValueError, match=f"--{name} needs {name}, which is not installed: pip install {name}"):
        check_trackers(config)
    check_trackers(TrainConfig(data="x"))


def test_tracker_that_is_not_installed_ends_the_run_before_it_begins(data, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['clearml'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = train(data, tmp_path / "run", "--clearml", "braid")
    assert result.returncode == 2
    assert "error: --clearml needs clearml, which is not installed: pip install clearml" in result.stderr
    assert not (tmp_path / "run").exists()


def test_tracker_that_fails_is_one_line_and_the_run_goes_on(data, tmp_path, broken_wandb):
    result = train(data, tmp_path / "run", "--wandb", "braid")
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stderr.count("wandb has stopped, and the run goes on without it: no way to api.wandb.ai") == 1
    assert f"python -m train.trackers {tmp_path}/run --wandb braid" in result.stderr
    assert len(read_metrics(tmp_path / "run/metrics.jsonl")) == 10


def test_tracker_ends_by_itself_when_the_run_is_killed(run_dir):
    tracker = Tracker(run_dir, "tensorboard", True, 1)
    tracker.process.stdin.close()  # as the system does for a process that is killed
    assert tracker.process.wait(60) == 0
    assert [step for step, _ in of_tensorboard(run_dir)["loss"]] == [1, 2, 3]


def test_tracker_that_hangs_does_not_keep_the_run_from_ending(run_dir, tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("slow")
    (folder / "wandb.py").write_text("import time\ntime.sleep(100)\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setattr(trackers, "WAIT_S", 0.5)
    tracker = Tracker(run_dir, "wandb", "braid", 1)
    assert tracker.problem() is None
    assert "wandb has not sent everything yet" in tracker.close()
    tracker.process.kill()
    tracker.process.wait()


def test_folder_that_is_no_run_gets_one_line(tmp_path, capsys):
    assert trackers.main([str(tmp_path), "--tensorboard"]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path} is not a run folder: it has no config.json\n"
