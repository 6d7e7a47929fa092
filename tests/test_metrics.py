"""What a run writes while it goes: rows, a table and events, whole after a kill; MFU, memory, GPU readings."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pandas
import pytest
import torch
from launching import ROOT
from pynvml import NVML_ERROR_GPU_IS_LOST, NVMLError

from model.config import PRESETS
from train import gpu_readings
from train.config import TrainConfig, make_plan
from train.metrics import Metrics
from train.run_dir import RunDir, cut_metrics, read_metrics
from train.tail import Tail, flat_row

CONFIG = TrainConfig(size="tiny", data="unused", run="unused", steps=100)
PLAN = make_plan(CONFIG, vocab_size=512, n_tokens=100_000, world_size=2)
IN_BF16 = {"deepspeed": {"bf16": {"enabled": True}}}


def make_metrics(folder, first_step=1, record=IN_BF16):
    return Metrics(RunDir(folder), CONFIG, PLAN, first_step, world_size=2, record=record)


def row_of(step, **more):
    row = {
        "step": step,
        "loss": 6 - step / 10,
        "tokens": 512 * step,
        "tokens_per_s": 1e6,
        "lr": 1e-3,
        "grad_norm": 0.5,
    }
    return row | more


def check_alike(run_dir):
    """metrics.csv, read by pandas, says what metrics.jsonl says, number for number."""
    table = pandas.read_csv(run_dir.metrics_csv, float_precision="round_trip")
    rows = [flat_row(row, ".") for row in read_metrics(run_dir.metrics)]
    assert len(table) == len(rows)
    for found, row in zip(table.to_dict("records"), rows, strict=True):
        assert {key: value for key, value in found.items() if value == value} == row
    return table


def test_table_says_what_the_rows_say_and_takes_columns_that_come_later(tmp_path):
    metrics, run_dir = make_metrics(tmp_path), RunDir(tmp_path)
    for step in range(1, 6):
        metrics.log(row_of(step))
        check_alike(run_dir)  # at any moment
    metrics.log(row_of(6, heldout_loss=5.5, heldout_bits_per_byte_by_source={"one": 1.5, "two, too": 2.5}))
    metrics.log(row_of(7, seconds_by_part={"data": 0.25}))
    metrics.log(row_of(8))
    metrics.close()
    table = check_alike(run_dir)
    assert list(table["step"]) == list(range(1, 9))
    assert table["heldout_bits_per_byte_by_source.two, too"].count() == 1
    assert table["memory_gib"].min() > 0.01  # this process's


def test_run_that_goes_on_has_rows_and_table_cut_back_to_where_it_goes_on(tmp_path):
    run_dir, metrics = RunDir(tmp_path), make_metrics(tmp_path)
    for step in range(1, 10):
        metrics.log(row_of(step))
    metrics.close()
    cut_metrics(run_dir.metrics, 6)  # as the loop does
    metrics = make_metrics(tmp_path, first_step=7)
    assert list(check_alike(run_dir)["step"]) == list(range(1, 7))  # before another step is made
    metrics.log(row_of(7, mfu=0.4))
    metrics.log(row_of(8, mfu=0.5))
    metrics.go_back(7)
    metrics.log(row_of(8, mfu=0.25))
    metrics.close()
    assert list(check_alike(run_dir)["mfu"].dropna()) == [0.4, 0.25]
    cut_metrics(run_dir.metrics, 0)
    make_metrics(tmp_path).close()
    assert not run_dir.metrics_csv.exists()


WRITER = """
import sys
sys.path[:0] = ["tests", "."]
from test_metrics import make_metrics, row_of
from pathlib import Path
metrics = make_metrics(Path(sys.argv[1]))
for step in range(1, 1_000_000):
    metrics.log(row_of(step, heldout_loss=2.0) if step % 50 == 0 else row_of(step))
    metrics.event("saved", step, "saved")
"""


def test_files_of_a_killed_run_are_whole_up_to_a_last_line(tmp_path):
    for attempt in range(2):
        run_dir = RunDir(tmp_path / str(attempt))
        writer = subprocess.Popen([sys.executable, "-c", WRITER, run_dir.path], cwd=ROOT, stderr=subprocess.DEVNULL)
        while not run_dir.events.exists() or run_dir.events.stat().st_size < 10_000:
            assert writer.poll() is None
            time.sleep(0.01)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        steps = [row["step"] for row in Tail(run_dir.metrics).rows()]
        assert steps == list(range(1, len(steps) + 1)) and len(steps) > 50
        table = pandas.read_csv(run_dir.metrics_csv)
        assert list(table["step"]) == steps[: len(table)] and len(steps) - len(table) <= 1
        cut_metrics(run_dir.metrics, 40)
        metrics = make_metrics(run_dir.path, first_step=41)
        metrics.log(row_of(41))
        metrics.close()
        assert len(check_alike(run_dir)) == 41


def test_events_are_said_and_kept_even_after_half_a_line(tmp_path, capfd):
    RunDir(tmp_path).events.write_text('{"time": 1, "st')  # a crash
    metrics = make_metrics(tmp_path)
    metrics.event("slow_rank", 7, "rank 1 on host b is slow", rank=1)
    metrics.close()
    assert "rank 1 on host b is slow" in capfd.readouterr().err
    (event,) = Tail(RunDir(tmp_path).events).rows()
    assert time.time() - event.pop("time") < 60
    assert event == {"step": 7, "event": "slow_rank", "text": "rank 1 on host b is slow", "rank": 1}


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU, as far as Metrics asks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 << 30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 5 << 30)


def test_mfu_is_model_flops_by_the_dense_peak_of_all_gpus(tmp_path, gpu, capfd):
    metrics = make_metrics(tmp_path)
    metrics.log(row_of(1))
    metrics.close()
    (row,) = read_metrics(RunDir(tmp_path).metrics)
    by_hand = 1e6 * replace(PRESETS["tiny"], vocab_size=512).flops_per_token / (2 * 989e12)
    assert row["mfu"] == pytest.approx(by_hand, abs=1e-5) and row["mfu"] > 0
    assert (row["memory_gib"], row["memory_reserved_gib"]) == (3, 5)
    said = capfd.readouterr().err
    assert "(2 x 989 TFLOP/s, the dense bf16 peak of NVIDIA H200)" in said
    assert "MFU 0.0%, 3.0 GiB" in said


@pytest.mark.parametrize(
    ("name", "record", "line"),
    [
        ("Abacus 9000", IN_BF16, "MFU is left out: the peak of Abacus 9000 is not known; add it to train/gpus.json"),
        ("NVIDIA H200", {"deepspeed": {}}, "MFU is left out: it is a part of the GPU's bf16 peak, and this run"),
    ],
)
def test_mfu_is_left_out_with_one_line_where_there_is_no_peak_to_compare_with(
    tmp_path, gpu, monkeypatch, capfd, name, record, line
):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    metrics = make_metrics(tmp_path, record=record)
    metrics.log(row_of(1))
    metrics.close()
    assert capfd.readouterr().err.count(line) == 1
    assert "mfu" not in read_metrics(RunDir(tmp_path).metrics)[0]


def test_readings_are_the_worst_or_the_sum_over_the_run_s_gpus(monkeypatch):
    lost = False

    def power_draw(gpu):
        if lost:
            raise NVMLError(NVML_ERROR_GPU_IS_LOST)
        return (652_400, 120_300, 75_000)[gpu]  # milliwatts

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "utilization", lambda gpu: (99, 40, 0)[gpu])
    monkeypatch.setattr(torch.cuda, "temperature", lambda gpu: (71, 45, 80)[gpu])
    monkeypatch.setattr(torch.cuda, "power_draw", power_draw)
    monkeypatch.setattr(gpu_readings, "SECONDS", 0.01)
    readings = gpu_readings.GpuReadings(2)  # the third is another run's
    assert readings.latest == {"gpu_utilization_percent": 40, "gpu_temperature_c": 71, "gpu_power_w": 773}
    lost = True
    time.sleep(0.2)
    assert readings.latest == {}
    readings.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: pytest --gpu tests/test_metrics.py")
def test_real_gpus_give_plausible_readings(tmp_path):
    torch.ones(1 << 20, device="cuda")
    metrics = make_metrics(tmp_path)
    metrics.log(row_of(1))
    metrics.close()
    (row,) = read_metrics(RunDir(tmp_path).metrics)
    assert 0 <= row["gpu_utilization_percent"] <= 100
    assert 10 < row["gpu_temperature_c"] < 110
    assert 10 < row["gpu_power_w"] < 1500 * torch.cuda.device_count()
    assert 0 < row["memory_gib"] <= row["memory_reserved_gib"] < 1


def test_machine_without_nvidia_driver_has_no_readings_and_no_warning(capfd):
    if not os.path.exists("/dev/nvidiactl"):
        readings = gpu_readings.GpuReadings(1)
        assert readings.latest == {}
        assert capfd.readouterr() == ("", "")


def test_tail_waits_for_the_end_of_a_line_and_sees_that_a_file_was_cut(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    tail = Tail(path)
    assert [row["step"] for row in tail.rows()] == [1, 2]
    assert list(tail.rows()) == [] and not tail.replaced
    with open(path, "a") as file:
        file.write('ep": 3}\nnot JSON\n{"step": 4}\n')
    assert [row["step"] for row in tail.rows()] == [3, 4]
    (tmp_path / "new").write_text(json.dumps({"step": 1}) + "\n")
    os.replace(tmp_path / "new", path)
    assert tail.replaced and list(tail.rows()) == []
