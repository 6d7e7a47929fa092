"""Real runs through DeepSpeed's launcher on CPU processes: resume bit for bit, stages alike, stopping, refusals."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from launching import ROOT, free_port, launch
from safetensors import safe_open

from train.checkpoint import load_checkpoint, newest_whole
from train.exit_codes import INTERRUPTED, REQUEUE
from train.launch import main
from train.loop import Stopped
from train.run_dir import RunDir, read_metrics

FLAGS = ["--size", "tiny", "--steps", 12, "--save-every", 4, "--eval-every", 6, "--eval-tokens", 2000]


def train(data, run, *flags, processes=2):
    result = launch(*FLAGS, "--data", data, "--run", run, *flags, processes=processes)
    assert result.returncode == 0, result.stderr[-3000:]
    return read_metrics(run / "metrics.jsonl")


def numbers(rows):
    """What a run computed, without what it measured of the machine."""
    measured = ("tokens_per_s", "seconds", "memory_gib", "eval_s")
    return [{k: v for k, v in row.items() if k not in measured} for row in rows]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run of twelve steps on two processes, without a break."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    return run, train(data, run)


@pytest.fixture(scope="module")
def half(data, tmp_path_factory):
    """The same run, stopped after six steps."""
    run = tmp_path_factory.mktemp("runs") / "half"
    result = launch(*FLAGS, "--data", data, "--run", run, "--stop-after", 6, processes=2)
    assert result.returncode == 0, result.stderr[-3000:]
    return run


def test_run_leaves_metrics_checkpoints_and_its_configuration(whole):
    run, rows = whole
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert {"step", "loss", "tokens", "tokens_per_s", "lr", "grad_norm"} <= set(rows[0])
    assert rows[-1]["tokens"] == 12 * 512
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert set(rows[5]["heldout_bits_per_byte_by_source"]) == {"one", "two"}
    assert [path.name for path in RunDir(run).checkpoints()] == ["step_0000004", "step_0000008", "step_0000012"]
    config = json.loads((run / "config.json").read_text())
    assert config["run"]["size"] == "tiny"
    assert config["deepspeed"]["zero_optimization"]["stage"] == 2
    assert config["world_size"] == 2
    assert config["parameters"] == 56140


def test_resumed_run_has_the_losses_of_an_unbroken_one_bit_for_bit(data, whole, half, tmp_path):
    run = shutil.copytree(half, tmp_path / "run")
    assert numbers(train(data, run, "--resume")) == numbers(whole[1])
    final = RunDir(run).checkpoint(12)
    one, other = load_checkpoint(final), load_checkpoint(RunDir(whole[0]).checkpoint(12))
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        for name, tensor in one.tensors(kind).items():
            assert torch.equal(tensor, other.tensors(kind)[name]), (kind, name)


def test_run_goes_on_with_another_number_of_processes_and_another_zero_stage(data, whole, half, tmp_path):
    run = shutil.copytree(half, tmp_path / "run")
    rows = train(data, run, "--resume", "--ds-config", stage_config(tmp_path, 3), "--stop-after", 9, processes=1)
    assert numbers(rows)[:6] == numbers(whole[1])[:6]
    rows = train(data, run, "--resume", "--ds-config", stage_config(tmp_path, 1), processes=2)
    for row, expected in zip(rows, whole[1], strict=True):  # sums in another order, float32
        assert abs(row["loss"] - expected["loss"]) < 1e-5
        assert abs(row["grad_norm"] - expected["grad_norm"]) < 1e-5


def test_stage_1_in_bf16_goes_on_bit_for_bit(data, tmp_path):
    """DeepSpeed has an optimizer of its own for this pair, with other maps of the weights."""
    flags = ["--steps", 4, "--save-every", 2, "--eval-every", 0, "--ds-config", "ds_configs/zero1.json"]
    unbroken = train(data, tmp_path / "run", *flags)
    shutil.rmtree(RunDir(tmp_path / "run").checkpoint(4))
    assert numbers(train(data, tmp_path / "run", *flags, "--resume")) == numbers(unbroken)


def test_run_goes_on_in_stage_0_and_from_there(data, whole, half, tmp_path):
    run = shutil.copytree(half, tmp_path / "run")
    train(data, run, "--resume", "--ds-config", "ds_configs/zero0.json", "--stop-after", 9)
    for row, expected in zip(train(data, run, "--resume", processes=1), whole[1], strict=True):
        assert abs(row["loss"] - expected["loss"]) < 1e-5
        assert abs(row["grad_norm"] - expected["grad_norm"]) < 1e-5


def stage_config(folder, stage):
    settings = json.loads((ROOT / "ds_configs/cpu.json").read_text())
    settings["zero_optimization"]["stage"] = stage
    path = folder / f"stage{stage}.json"
    path.write_text(json.dumps(settings))
    return path


def test_zero_on_two_processes_equals_plain_pytorch(data, whole):
    """The same twelve steps in a loop of plain PyTorch, on one process, without DeepSpeed."""
    from curation.shards import open_stream
    from model.hybrid import HybridLM
    from train.config import TrainConfig, make_plan
    from train.data import training_batches
    from train.optim import make_optimizer
    from train.schedule import learning_rate

    config = TrainConfig(size="tiny", data=str(data), run="unused", steps=12, micro_batch=8)
    stream = open_stream(data, "train")
    plan = make_plan(config, vocab_size=512, n_tokens=stream.n_tokens, world_size=1)
    torch.manual_seed(config.seed)
    model = HybridLM(plan.model)
    optimizer = make_optimizer(model, config)
    batches = training_batches(stream, plan, config.seed, rank=0, world_size=1, first_step=1, device="cpu")
    for step, expected in enumerate(whole[1], start=1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, plan)
        batch = next(batches)
        loss = model(batch.tokens, targets=batch.targets, document_ids=batch.document_ids)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        assert abs(loss.item() / expected["loss"] - 1) < 1e-5
        assert abs(norm.item() / expected["grad_norm"] - 1) < 1e-4


def test_weights_of_another_run_are_where_a_run_may_start(data, whole, tmp_path):
    checkpoint = RunDir(whole[0]).checkpoint(12)
    rows = train(data, tmp_path / "run", "--init-from", checkpoint, "--lr", 1e-4, "--stop-after", 2)
    assert rows[0]["step"] == 1
    assert rows[0]["loss"] < whole[1][0]["loss"] - 0.1  # it has learnt something
    result = launch(*FLAGS, "--data", data, "--run", tmp_path / "x", "--size", "nano", "--init-from", checkpoint)
    assert "is of another shape than --size: it has d_model 32 and not 128" in result.stderr
    result = launch(*FLAGS, "--data", data, "--run", tmp_path / "x", "--init-from", tmp_path / "nowhere")
    assert "nowhere does not exist" in result.stderr
    assert not (tmp_path / "x").exists()


def test_only_the_newest_checkpoints_are_kept(data, half, tmp_path):
    run = shutil.copytree(half, tmp_path / "run")
    train(data, run, "--resume", "--keep", 2)
    assert [path.name for path in RunDir(run).checkpoints()] == ["step_0000008", "step_0000012"]


def test_finished_run_started_again_does_nothing(data, whole, tmp_path):
    run = shutil.copytree(whole[0], tmp_path / "run")
    assert train(data, run, "--resume", processes=1) == whole[1]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, REQUEUE), (signal.SIGUSR1, REQUEUE), (signal.SIGINT, INTERRUPTED)]
)
def test_run_that_is_asked_to_leave_saves_and_says_by_its_code_whether_to_start_it_again(data, tmp_path, number, code):
    run = tmp_path / "run"
    command = [
        sys.executable, str(ROOT / "train/launch.py"), "--size", "tiny", "--data", data, "--run", run,
        "--steps", 4000, "--eval-every", 0,
    ]  # fmt: skip
    alone = os.environ | {"MASTER_PORT": str(free_port())}
    started = subprocess.Popen(list(map(str, command)), cwd=tmp_path, env=alone, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(read_metrics(run / "metrics.jsonl")) < 5:
        assert time.monotonic() < deadline and started.poll() is None
        time.sleep(0.2)
    started.send_signal(number)
    _, stderr = started.communicate(timeout=60)
    assert started.returncode == code
    step = load_checkpoint(RunDir(run).checkpoints()[-1]).step
    assert f"stopped at step {step} of 4000; go on with --resume" in stderr
    assert read_metrics(run / "metrics.jsonl")[-1]["step"] == step


@pytest.mark.parametrize(("rank", "said"), [(0, "stopped at step 5\n"), (1, "")])
def test_of_a_stop_the_first_rank_speaks_and_the_others_leave_at_once(monkeypatch, capsys, rank, said):
    def stopped(*args):
        raise Stopped("stopped at step 5", REQUEUE)

    def wait(seconds):
        raise AssertionError(f"rank {rank} waits {seconds} s")

    monkeypatch.setattr("train.loop.train", stopped)
    monkeypatch.setattr("train.launch.time.sleep", wait)
    monkeypatch.setenv("RANK", str(rank))
    assert main(["--size", "tiny", "--data", "data/x"]) == REQUEUE
    assert capsys.readouterr().err == said


STRANGERS = """
import sys
from torch import distributed as dist
from train.exit_codes import leave
from train.processes import start_processes

run, rank = sys.argv[1:]
try:
    start_processes(int(rank), 2, 1, {"run": {"run": run, "seed": 7}})
    dist.barrier()
except ValueError as error:
    print(error)
leave(0)
"""


def test_runs_that_were_given_one_port_do_not_mix():
    environment = os.environ | {"MASTER_PORT": str(free_port()), "PYTHONPATH": str(ROOT)}

    def start(run, rank):
        command = [sys.executable, "-c", STRANGERS, run, str(rank)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    first = start("one", 0)
    deadline = time.monotonic() + 60
    while True:  # until it listens
        with socket.socket() as knock:
            if not knock.connect_ex(("127.0.0.1", int(environment["MASTER_PORT"]))):
                break
        assert time.monotonic() < deadline
        time.sleep(0.1)
    told = [process.communicate(timeout=60)[0] for process in (start("two", 0), start("two", 1))]
    assert f"127.0.0.1:{environment['MASTER_PORT']} is taken" in told[0] and "--master_port" in told[0]
    assert "run.run: 'one' there, 'two' here; two runs on a machine need ports of their own" in told[1]
    assert start("one", 1).communicate(timeout=60)[0] == first.communicate(timeout=60)[0] == ""


@pytest.fixture
def copied(whole, tmp_path):
    return RunDir(shutil.copytree(whole[0], tmp_path / "run"))


def test_checkpoint_reads_without_deepspeed_by_name_and_shape(copied):
    checkpoint = load_checkpoint(copied.checkpoint(12))
    assert (checkpoint.step, checkpoint.tokens) == (12, 12 * 512)
    model = checkpoint.load_model()
    assert {name: list(p.shape) for name, p in model.named_parameters()} == checkpoint.shapes
    pieces = 0
    for rank in range(2):
        with safe_open(copied.checkpoint(12) / f"rank{rank:05d}.safetensors", framework="np") as file:
            pieces += sum(file.get_tensor(key).size for key in file.keys() if key.startswith("weight/"))  # noqa: SIM118
    assert pieces == checkpoint.model_config.n_parameters  # each element is stored once


def test_damaged_checkpoint_is_refused_by_name_and_passed_over_on_resume(copied):
    newest = copied.checkpoint(12)
    file = newest / "rank00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"the content of rank00001.safetensors has changed"):
        load_checkpoint(newest)
    file.write_bytes(content[:-7])
    with pytest.raises(ValueError, match=r"rank00001.safetensors has [\d,]+ bytes, not [\d,]+"):
        load_checkpoint(newest)
    file.unlink()
    with pytest.raises(ValueError, match=r"rank00001.safetensors is missing"):
        load_checkpoint(newest)
    said = []
    assert newest_whole(copied, said.append).step == 8
    assert len(said) == 1
    assert "step_0000012 is damaged: rank00001.safetensors is missing" in said[0]


def test_what_is_not_a_checkpoint_is_refused(tmp_path, copied):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_checkpoint(tmp_path / "none")
    with pytest.raises(ValueError, match="is not a checkpoint: it has no checkpoint.json"):
        load_checkpoint(copied.path)
    (copied.checkpoint(12) / "checkpoint.json").write_text("{}")
    with pytest.raises(ValueError, match="is not the manifest of a checkpoint"):
        load_checkpoint(copied.checkpoint(12))


def refusal(*flags, processes=1):
    """The exit code of a launch that must be refused, and the lines that are ours."""
    result = launch(*flags, processes=processes)
    assert "Traceback" not in result.stderr
    return result.returncode, [line for line in result.stderr.splitlines() if line.startswith("error:")]


def test_bad_input_gets_one_line_and_exit_code_2_from_two_processes(tmp_path):
    run = tmp_path / "run"
    code, lines = refusal("--size", "nano", "--data", tmp_path / "none", "--run", run, processes=2)
    assert code == 2
    assert lines == [
        f"error: data folder {tmp_path}/none does not exist; make it with: make curate OUT={tmp_path}/none"
    ]
    assert not run.exists()


def test_damaged_shard_is_refused_by_name(data, tmp_path):
    folder = shutil.copytree(data, tmp_path / "damaged")
    shard = folder / "train/two-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    code, lines = refusal("--size", "tiny", "--data", folder, "--run", tmp_path / "run")
    assert code == 2
    assert len(lines) == 1
    assert str(shard) in lines[0]


def test_occupied_run_folder_is_refused(data, whole):
    code, lines = refusal(*FLAGS, "--data", data, "--run", whole[0])
    assert (code, len(lines)) == (2, 1)
    assert "holds a run already; go on with --resume" in lines[0]


def test_unknown_flag_is_refused():
    code = launch("--size", "tiny", "--data", "d", "--run", "r", "--step", "3").returncode
    assert code == 2
