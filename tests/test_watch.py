"""`python -m train.watch`: what it says of running, ended and broken runs; how little it reads; how it leaves."""

import dataclasses
import io
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time

import pytest
from launching import ROOT
from rich.console import Console
from small_run import write_lines

from model.config import PRESETS
from train import watch
from train.watch import Rows, Run, bars, draw, duration, find_runs, main


def row_of(step, **more):
    values = {"loss": 10 - 8 * step / (step + 20), "tokens": 512 * step, "tokens_per_s": 12345.6, "seconds": step / 2}
    return {"step": step, **values, "lr": 1e-3, "grad_norm": 1.0, "memory_gib": 61.5} | more


def make_run(folder, steps=100, done=50, events=("start",), age=0):
    """A run's folder: `done` steps of `steps`, the last written `age` seconds ago, and three checkpoints."""
    folder.mkdir(parents=True)
    now = time.time()
    record = {"run": {"size": "tiny"}, "plan": {"steps": steps, "last_step": steps}, "world_size": 2}
    record["model"] = dataclasses.asdict(PRESETS["tiny"])
    (folder / "config.json").write_text(json.dumps(record))
    readings = {"mfu": 0.4321, "gpu_temperature_c": 71, "gpu_power_w": 5321, "gpu_utilization_percent": 97}
    rows = [row_of(step, **readings, **({"heldout_loss": 3.25} if step == 25 else {})) for step in range(1, done + 1)]
    write_lines(folder / "metrics.jsonl", rows)
    lines = [{"time": now - age, "step": done, "event": kind, "text": f"the text of {kind}"} for kind in events]
    write_lines(folder / "events.jsonl", lines)
    for name in ("metrics.jsonl", "events.jsonl"):
        os.utime(folder / name, (now - age, now - age))
    for step in (10, 20, 30):
        checkpoint = folder / f"checkpoints/step_{step:07d}"
        checkpoint.mkdir(parents=True)
        files = {f"rank{rank:05d}.safetensors": bytes(1 << 20) for rank in range(2)}
        for name, content in files.items():
            (checkpoint / name).write_bytes(content)
        manifest = {"step": step, "files": {name: {"bytes": len(content)} for name, content in files.items()}}
        (checkpoint / "checkpoint.json").write_text(json.dumps(manifest))
    (folder / "best.json").write_text(json.dumps({"checkpoint": "step_0000020", "heldout_loss": 3.25}))
    return folder


def printed(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def line_with(text, word):
    (line,) = [line for line in text.splitlines() if word in line]
    return " ".join(line.split())


def test_snapshot_of_a_running_run_says_all_that_it_measures(tmp_path, capsys):
    run = make_run(tmp_path / "demo", events=("start", "saved"))
    text = printed(capsys, run)
    line = line_with(text, "running")
    for value in ("50/100", "4.2857", "3.2500", "12,346", "43.2%", "61.5 GiB", "71 °C", "5,321 W", "0:00:25"):
        assert value in line  # 50 steps of half a second are left
    assert line.endswith("saved: the text of saved")
    assert "2.0 MiB whole, best held-out loss" in line_with(text, "step_0000020")
    assert line_with(text, "step_0000030").endswith("2.0 MiB whole")
    assert "the text of start" in text
    assert "█" in text


@pytest.mark.parametrize(
    ("events", "done", "age", "expected"),
    [
        (("start",), 50, 0, "running"),
        (("start", "finished"), 100, 500, "finished"),
        (("start", "stop"), 50, 500, "stopped"),
        (("start", "stop", "resume"), 50, 0, "running"),
        (("start",), 50, 500, "silent since 0:08:"),
        (("start",), 0, 500, "silent since 0:08:"),
        (("start", "hang"), 50, 500, "silent since 0:08:"),
        ((), 100, 500, "finished"),  # a run from before there were events
        ((), 0, 500, "silent since 0:08:"),
    ],
)
def test_state_of_a_run(tmp_path, events, done, age, expected):
    run = Run(make_run(tmp_path / "run", done=done, events=events, age=age), "run")
    run.refresh()
    assert run.state[1].startswith(expected)
    assert (run.left_s is not None) == (expected == "running")


def test_run_that_hangs_is_called_so_until_it_makes_another_step(tmp_path):
    folder = make_run(tmp_path / "run", events=("start", "hang"))
    os.utime(folder / "metrics.jsonl", (time.time() - 60, time.time() - 60))
    run = Run(folder, "run")
    run.refresh()
    assert run.state[1] == "hung"
    os.utime(folder / "metrics.jsonl", (time.time() + 1, time.time() + 1))
    assert run.state[1] == "running"


def test_damaged_and_unfinished_checkpoints_are_told_from_whole_ones(tmp_path, capsys):
    checkpoints = make_run(tmp_path / "run") / "checkpoints"
    os.truncate(checkpoints / "step_0000010/rank00001.safetensors", 1000)
    (checkpoints / "step_0000020/rank00000.safetensors").unlink()
    (checkpoints / "step_0000030/checkpoint.json").write_text("{")
    (checkpoints / "step_0000040.part").mkdir()
    (checkpoints / "step_0000040.part/rank00000.safetensors").write_bytes(bytes(1 << 19))
    text = printed(capsys, tmp_path)
    assert line_with(text, "step_0000010").endswith("damaged: rank00001.safetensors is cut short or too long")
    assert "damaged: rank00000.safetensors is missing" in line_with(text, "step_0000020")
    assert line_with(text, "step_0000030").endswith("damaged: checkpoint.json")
    assert line_with(text, "step_0000040").endswith("0.5 MiB unfinished")


def test_benchmarks_of_the_last_measurement_are_shown(tmp_path, capsys):
    scores = {"piqa": {"n": 100, "acc": 0.52}, "mmlu": {"n": 100, "acc": 0.25}}
    with (make_run(tmp_path / "run") / "metrics.jsonl").open("a") as rows:
        rows.write(json.dumps(row_of(51, heldout_loss=3.2, eval=scores)) + "\n")
    assert line_with(printed(capsys, tmp_path), "piqa") == "step 51: piqa 52%, mmlu 25%"


def test_all_runs_below_a_folder_stand_side_by_side(tmp_path, capsys):
    for name in ("b/second", "first", "third"):
        make_run(tmp_path / name)
    (tmp_path / "export").mkdir()
    (tmp_path / "export/config.json").write_text('{"architectures": []}')
    assert list(find_runs([tmp_path]).values()) == ["b/second", "first", "third"]
    text = printed(capsys, tmp_path, "--once")
    assert text.count("running") == 3 and "export" not in text


def test_narrow_window_has_fewer_columns_and_a_low_one_fewer_details(tmp_path):
    runs = [Run(make_run(tmp_path / name), name) for name in ("first", "second")]
    for run in runs:
        run.refresh()
    for width, columns in ((70, {"state", "loss", "left"}), (100, {"MFU", "temp"}), (160, {"power", "last event"})):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(draw(runs, 14, width))
        text = console.export_text()
        assert columns <= set(re.split(r"\s{2,}", text.splitlines()[1].strip())) and "…" not in text.splitlines()[3]
        assert max(map(len, text.splitlines())) <= width and len(text.splitlines()) <= 14
        assert "more of second in a taller window" in text


def test_folder_without_a_run_gets_one_line(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(
        f"error: {tmp_path} is not a run, and there is none below it; give a run"
    )
    assert main([str(tmp_path / "gone")]) == 2
    assert "gone does not exist" in capsys.readouterr().err


def test_long_file_is_not_read_whole_and_then_only_what_is_new(tmp_path, monkeypatch):
    path, parsed = tmp_path / "metrics.jsonl", []
    write_lines(path, [row_of(step) for step in range(1, 20_001)])
    monkeypatch.setattr(watch, "TAIL_BYTES", 100_000)
    monkeypatch.setattr(json, "loads", lambda text, load=json.loads: parsed.append(text) or load(text))
    rows = Rows(path)
    rows.refresh()
    assert rows.last["step"] == 20_000
    steps = [step for step, _ in rows.curve.points]
    assert steps[0] < 10 and steps[-1] > 19_900 and len(steps) > 200  # the curve is of the whole run
    assert max(b - a for a, b in zip(steps, steps[1:], strict=False)) < 200
    assert sum(map(len, parsed)) < 300_000 < os.path.getsize(path) / 5
    parsed.clear()
    rows.refresh()
    assert parsed == []
    with open(path, "a") as file:
        file.write(json.dumps(row_of(20_001)) + "\n" + '{"step": 20')
    rows.refresh()
    assert rows.last["step"] == 20_001 and len(parsed) == 1


def test_curve_of_a_run_that_is_watched_from_its_start_stays_short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.touch()
    rows = Rows(path)
    for start in range(1, 20_000, 500):
        with open(path, "a") as file:
            file.writelines(json.dumps(row_of(step)) + "\n" for step in range(start, start + 500))
        rows.refresh()
    steps = [step for step, _ in rows.curve.points]
    assert len(steps) <= watch.MAX_POINTS and steps[0] == 1 and steps[-1] > 19_800
    assert rows.seconds_per_step == pytest.approx(0.5)


def test_run_that_went_back_is_shown_as_it_is_now(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [row_of(step) for step in range(1, 31)])
    rows = Rows(path)
    rows.refresh()
    write_lines(tmp_path / "new", [row_of(step) for step in range(1, 11)])
    os.replace(tmp_path / "new", path)
    rows.refresh()
    assert rows.last["step"] == 10 and rows.curve.points[-1][0] == 10
    with open(path, "a") as file:  # in one file, too
        file.write(json.dumps(row_of(8)) + "\n" + json.dumps(row_of(9, seconds=0)) + "\n")
    rows.refresh()
    assert [row["step"] for row in rows.recent] == list(range(1, 10))
    assert rows.seconds_per_step is None  # one step since the last start


def test_bars_show_the_shape_and_cut_off_the_first_losses():
    points = [(1, 100.0), (2, float("nan"))] + [(step, 10.0 - step / 100) for step in range(20, 1000)]
    low, high, (line,) = bars(points, 10, 1)
    assert (low, line[0], line[-1]) == (pytest.approx(0.5, abs=0.1), "█", "▁") and high < 10
    _, _, lines = bars(points, 10, 4)
    assert [len(line) for line in lines] == [10] * 4 and lines[0][-1] == " " and lines[-1][0] == "█"
    assert bars([(1, 2.0)], 10, 1)[2] == []
    assert duration(3 * 86400 + 75) == "3 days, 0:01:15"


def test_watching_needs_no_torch(tmp_path):
    run = make_run(tmp_path / "run")
    code = "import sys; sys.modules['torch'] = None; from train.watch import main; sys.exit(main(sys.argv[1:]))"
    result = subprocess.run([sys.executable, "-c", code, run], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "50/100" in result.stdout


def in_terminal(*arguments, until, then):
    """Start train.watch on a terminal; press a key once `until` says so of its output. (exit status, output)"""
    child, terminal = pty.fork()
    if not child:
        os.chdir(ROOT)
        os.environ.update(TERM="xterm", COLUMNS="120", LINES="40")
        os.execv(sys.executable, [sys.executable, "-m", "train.watch", *map(str, arguments)])
    output, deadline, pressed = b"", time.monotonic() + 10, False
    while True:
        assert time.monotonic() < deadline, output[-1500:]
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                output += os.read(terminal, 1 << 16)
            except OSError:  # it has left
                break
        if not pressed and until(output.decode(errors="replace")):
            os.write(terminal, then)
            pressed = True
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output.decode(errors="replace")


@pytest.mark.parametrize("key", [b"q", b"\x03"])
def test_live_view_follows_a_run_and_leaves_the_terminal_as_it_was(tmp_path, key):
    run = make_run(tmp_path / "run")

    def until(output):
        if "50/100" in output and "51/100" not in output:
            with open(run / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row_of(51)) + "\n")
        return "51/100" in output

    status, output = in_terminal(run, until=until, then=key)
    assert status == 0
    assert "Traceback" not in output
    assert output.rindex("\x1b[?1049l") > output.rindex("51/100")  # back from the other screen


def test_run_that_is_deleted_while_it_is_watched_ends_with_one_line(tmp_path):
    run = make_run(tmp_path / "run")

    def until(output):
        if "50/100" in output:
            shutil.rmtree(run, ignore_errors=True)
        return False

    status, output = in_terminal(run, until=until, then=b"")
    assert status == 2 and "error: " in output and "Traceback" not in output
