"""Checkpoints: written behind training, whole or not at all; and what is said when a disk or a process fails."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from launching import ROOT, free_port
from safetensors import safe_open
from saving import KINDS, SHAPES, begin, differing, fill, join_group, run_ranks, toy_engine, values

import model.weights
import train.checkpoint
from model.weights import load_checkpoint
from train.checkpoint import BackgroundSave, newest_whole, restore_optimizer
from train.run_dir import RunDir, remove_unfinished, write_json


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "tokenizer").write_bytes(b"tokens")
    return RunDir(tmp_path)


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    join_group(0, 1, tmp_path / "store")
    yield
    torch.distributed.destroy_process_group()


def save_steps(rank, run_dir, *steps):
    save, engine = BackgroundSave(), toy_engine()
    for step in steps:
        begin(save, engine, run_dir, step)
        save.finish()


# ---- writing


def test_ranks_share_the_writing_and_any_reader_of_safetensors_can_read_it(run_dir, monkeypatch):
    monkeypatch.setattr(train.checkpoint, "HOST_BLOCK", 1000)  # pieces that cross blocks, and blocks that hold several
    assert run_ranks(3, save_steps, run_dir.path, run_dir, 4) == [None] * 3
    checkpoint = load_checkpoint(run_dir.checkpoint(4))
    assert (checkpoint.step, checkpoint.tokens, checkpoint.optimizer_steps) == (4, 4, 2)
    assert checkpoint.has_moments
    assert differing(checkpoint) == []
    assert checkpoint.tokenizer_path.read_bytes() == b"tokens"
    stored = []
    for rank in range(3):
        with safe_open(checkpoint.path / f"rank{rank:05d}.safetensors", framework="np") as file:
            stored.append(sum(file.get_tensor(key).size for key in file.keys()))  # noqa: SIM118
    assert sum(stored) == 3 * sum(torch.Size(shape).numel() for shape in SHAPES.values())  # each element is there once
    assert max(stored) - min(stored) <= 9
    assert not run_dir.unfinished()


def test_training_goes_on_while_the_writer_works_and_what_was_begun_is_saved(run_dir, alone, monkeypatch):
    may_write = threading.Event()

    def slowly(*arguments):
        assert may_write.wait(30)
        return model.weights.write_pieces(*arguments)

    monkeypatch.setattr(train.checkpoint, "write_pieces", slowly)
    save, engine = BackgroundSave(), toy_engine()
    assert save.written
    fill(engine, 1)
    run = {"stream": {"at": [5]}}
    save.begin(engine, run_dir.checkpoint(1), step=1, tokens=1, run=run, tokenizer=run_dir.path / "tokenizer")
    fill(engine, 2)  # the optimizer has stepped, the data went on
    run["stream"]["at"][0] = 6
    assert save.pending
    assert not save.written
    assert run_dir.checkpoints() == []
    with pytest.raises(AssertionError):
        save.begin(engine, run_dir.checkpoint(2), step=2, tokens=2, run=run, tokenizer=run_dir.path / "tokenizer")
    may_write.set()
    assert save.finish() == run_dir.checkpoint(1)
    assert save.written
    assert not save.pending
    checkpoint = load_checkpoint(run_dir.checkpoint(1))
    assert differing(checkpoint) == []
    assert checkpoint.run == {"stream": {"at": [5]}}


def test_host_memory_is_kept_for_the_next_save(run_dir, alone):
    save, engine = BackgroundSave(), toy_engine()
    places = set()
    for step in (1, 2, 3):
        begin(save, engine, run_dir, step)
        save.finish()
        places.add(tuple(block.data_ptr() for block in save.host_copy.blocks))
    assert len(places) == 1
    assert [differing(load_checkpoint(path)) for path in run_dir.checkpoints()] == [[], [], []]


def test_other_threads_run_while_pieces_are_written(tmp_path):
    data = torch.zeros(1 << 26)  # 256 MiB
    done = threading.Event()

    def write():
        model.weights.write_pieces(tmp_path / "file", {"weight/a": (0, data.numel())}, [data.numpy()])
        done.set()

    writer = threading.Thread(target=write)
    began = last = time.perf_counter()
    longest = 0.0
    writer.start()
    while not done.is_set():
        time.sleep(0.001)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    writer.join()
    assert longest < 0.5 * (last - began)


def test_a_save_of_the_same_step_takes_the_place_of_the_earlier(run_dir, alone):
    run_dir.checkpoint(5).mkdir(parents=True)
    (run_dir.checkpoint(5) / "damaged").write_text("x")
    save_steps(0, run_dir, 5)
    assert differing(load_checkpoint(run_dir.checkpoint(5))) == []
    assert [path.name for path in run_dir.checkpoint(5).parent.iterdir()] == ["step_0000005"]


def test_a_save_before_the_optimizers_first_step_can_be_gone_on_from(run_dir, alone):
    engine, again = toy_engine(), toy_engine()
    save = BackgroundSave()
    save.begin(
        engine, run_dir.checkpoint(1), step=1, tokens=1, run={"skipped_steps": 1}, tokenizer=run_dir.path / "tokenizer"
    )
    save.finish()
    restore_optimizer(again, load_checkpoint(run_dir.checkpoint(1)))
    for one in (engine, again):
        for parameter in one.module.parameters():
            parameter.grad = torch.ones_like(parameter)
        one.optimizer.step()
    for first, second in zip(engine.module.parameters(), again.module.parameters(), strict=True):
        assert torch.equal(first, second)


def test_skipped_steps_do_not_count_for_adamws_bias(run_dir, alone):
    save_steps(0, run_dir, 9)
    engine = toy_engine()
    restore_optimizer(engine, load_checkpoint(run_dir.checkpoint(9)))
    assert {float(state["step"]) for state in engine.optimizer.state.values()} == {7.0}
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(engine.optimizer.state[parameter]["exp_avg"], values(9)[f"exp_avg/{name}"])


# ---- disks that fail


def failing_save(rank, run_dir, where, limit=None):
    """Save into a run whose folder cannot take it, then into one that can. Returns the message."""
    if limit and rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    save, engine, bad = BackgroundSave(), toy_engine(), RunDir(where)
    fill(engine, 8)
    save.begin(engine, bad.checkpoint(8), step=8, tokens=8, run={}, tokenizer=run_dir.path / "tokenizer")
    with pytest.raises(OSError, match="checkpoint of step 8 was not saved") as raised:
        save.finish()
    if limit and rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    begin(save, engine, run_dir, 9)
    save.finish()
    return str(raised.value)


def check_failure(run_dir, where, message, limit=None):
    """Two ranks fail with one line, that line; nothing is left behind, and their next save works."""
    lines = run_ranks(2, failing_save, run_dir.path, run_dir, where, limit)
    assert lines[0] == lines[1]
    assert "\n" not in lines[0]
    assert re.search(message, lines[0]), lines[0]
    assert f"on {socket.gethostname()} could not write" in lines[0]
    assert re.search(r"\([\d.]+ GB free, [\d.]+ GB needed\); .*; earlier checkpoints are whole", lines[0])
    assert differing(load_checkpoint(run_dir.checkpoint(9))) == []


@pytest.fixture
def mounted(tmp_path):
    """mounted(arguments of mount) gives a folder with that mounted on it."""
    folder = tmp_path / "mounted"

    def mount(*arguments):
        folder.mkdir(exist_ok=True)
        if os.getuid() or subprocess.run(["mount", *arguments, str(folder)], capture_output=True).returncode:
            pytest.skip("this process may not mount")
        return folder

    yield mount
    while subprocess.run(["umount", str(folder)], capture_output=True).returncode == 0:
        pass


def test_a_full_disk_is_said_by_all_ranks_and_earlier_checkpoints_stay(run_dir, mounted):
    where = mounted("-t", "tmpfs", "-o", "size=64k", "tmpfs")
    good = RunDir(where)
    run_ranks(1, save_steps, run_dir.path, run_dir, 1)
    shutil.copytree(run_dir.checkpoint(1), good.checkpoint(1))
    check_failure(
        run_dir, where,
        r"rank [01] on .*step_0000008.part/rank0000[01].safetensors: No space left on device .*"
        r"; make room there, or keep fewer checkpoints \(--keep\)",
    )  # fmt: skip
    assert not good.unfinished()  # what it took of the full disk is given back
    assert differing(load_checkpoint(good.checkpoint(1))) == []


def test_a_full_disk_at_the_manifest_is_said_by_all_ranks(run_dir, monkeypatch):
    def full(folder, **fields):
        raise OSError(errno.ENOSPC, "No space left on device")

    def fails_once(rank):
        with monkeypatch.context() as patch:
            patch.setattr(train.checkpoint, "write_manifest", full)
            save, engine = BackgroundSave(), toy_engine()
            begin(save, engine, run_dir, 8)
            with pytest.raises(OSError) as raised:
                save.finish()
        return str(raised.value)

    lines = run_ranks(2, fails_once, run_dir.path)
    assert lines[0] == lines[1]
    assert re.search(r"rank 0 .*step_0000008.part/checkpoint.json: No space left on device", lines[0])
    assert not run_dir.unfinished()


def test_a_read_only_folder_is_said_by_all_ranks(run_dir, mounted):
    source = run_dir.path / "source"
    source.mkdir()
    where = mounted("--bind", str(source))
    mounted("-o", "remount,bind,ro")
    check_failure(run_dir, where, "rank 0 .*Read-only file system .*; make that folder writable")


def test_a_limit_on_the_size_of_files_is_said_by_all_ranks_with_the_rank_that_met_it(run_dir, tmp_path):
    check_failure(run_dir, tmp_path / "run", r"rank 1 .*rank00001.*: File too large .*; raise the limit", limit=5000)


def test_a_folder_that_cannot_be_made_is_said_by_all_ranks(run_dir, tmp_path):
    (tmp_path / "file").write_text("x")
    check_failure(run_dir, tmp_path / "file", "rank 0 .*: (Not a directory|File exists)")


def test_a_folder_that_other_hosts_do_not_see_is_explained(run_dir, monkeypatch):
    def saves(rank):
        if rank == 1:  # its own disk, where rank 0 has made nothing
            monkeypatch.setattr(BackgroundSave, "_part", lambda self: run_dir.path / "elsewhere" / "x.part")
        save, engine = BackgroundSave(), toy_engine()
        begin(save, engine, run_dir, 3)
        with pytest.raises(OSError) as raised:
            save.finish()
        return str(raised.value)

    lines = run_ranks(2, saves, run_dir.path)
    assert lines[0] == lines[1]
    assert "rank 1 on" in lines[0]
    assert "must lie on a file system that all hosts share" in lines[0]


# ---- processes that fail


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_lost_in_the_middle_of_a_save_leaves_the_earlier_checkpoints(run_dir, monkeypatch, number):
    pids = torch.zeros(1, dtype=torch.int64).share_memory_()

    def lost(*arguments):
        os.kill(os.getpid(), number)

    def saves(rank):
        save, engine = BackgroundSave(), toy_engine()
        begin(save, engine, run_dir, 1)
        save.finish()
        if rank == 1:
            pids[0] = os.getpid()
            monkeypatch.setattr(train.checkpoint, "write_pieces", lost)
        began = time.monotonic()
        begin(save, engine, run_dir, 2)
        try:
            save.finish()
        except RuntimeError:
            if number == signal.SIGSTOP:  # so that the test ends; a supervisor's task
                os.kill(int(pids[0]), signal.SIGKILL)
            return time.monotonic() - began

    seconds, nothing = run_ranks(2, saves, run_dir.path, timeout_s=2)
    assert nothing is None
    assert seconds < 8
    assert [path.name for path in run_dir.unfinished()] == ["step_0000002.part"]
    said = []
    assert differing(newest_whole(run_dir, said.append)) == []
    assert said == [f"skipping {run_dir.checkpoint(2)}.part: unfinished, it has no checkpoint.json"]
    remove_unfinished(run_dir)
    assert [path.name for path in (run_dir.path / "checkpoints").iterdir()] == ["step_0000001"]


# ---- reading


def test_each_rank_reads_its_share_of_the_files_and_all_pass_over_the_same_ones(run_dir, monkeypatch):
    run_ranks(4, save_steps, run_dir.path, run_dir, 1, 2, 3)
    file = run_dir.checkpoint(3) / "rank00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)
    hashed = []
    plain = model.weights.file_sha256
    monkeypatch.setattr(model.weights, "file_sha256", lambda path: hashed.append(path) or plain(path))

    def reads(rank):
        said = []
        checkpoint = newest_whole(run_dir, said.append)
        return checkpoint.step, said, [f"{path.parent.name}/{path.name}" for path in hashed]

    answers = run_ranks(2, reads, run_dir.path)
    assert {step for step, _, _ in answers} == {2}
    assert answers[0][1] == answers[1][1]
    assert len(answers[0][1]) == 1
    assert "step_0000003 is damaged: the content of rank00002.safetensors has changed" in answers[0][1][0]
    both = answers[0][2] + answers[1][2]
    assert len([name for name in both if name.startswith("step_0000002")]) == 5  # four ranks' files and the tokenizer
    assert len(both) == len(set(both))


def test_any_bit_of_the_manifest_is_missed(run_dir, alone):
    save_steps(0, run_dir, 6)
    file = run_dir.checkpoint(6) / "checkpoint.json"
    content = file.read_bytes()
    for place in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"checkpoint\.json is (damaged|not the manifest)"):
            load_checkpoint(run_dir.checkpoint(6))
    file.write_bytes(content)
    assert load_checkpoint(run_dir.checkpoint(6)).step == 6


def test_a_manifest_of_the_first_format_is_read(run_dir, alone):
    save_steps(0, run_dir, 6)
    file = run_dir.checkpoint(6) / "checkpoint.json"
    manifest = json.loads(file.read_bytes())
    del manifest["sha256"]
    write_json(file, manifest | {"format": 1})
    assert differing(load_checkpoint(run_dir.checkpoint(6))) == []
    write_json(file, manifest)
    with pytest.raises(ValueError, match="is not the manifest of a checkpoint that this version reads"):
        load_checkpoint(run_dir.checkpoint(6))


def test_the_readmes_way_to_read_a_checkpoint_needs_numpy_and_safetensors_alone(run_dir, alone):
    save_steps(0, run_dir, 7)
    [snippet] = re.findall(r"```python\n(.*?)```", (ROOT / "train/README.md").read_text(), re.DOTALL)
    assert "runs/demo/checkpoints/step_0001600" in snippet
    program = snippet.replace("runs/demo/checkpoints/step_0001600", str(run_dir.checkpoint(7)))
    program += "\nimport sys; assert not {'torch', 'deepspeed'} & set(sys.modules)"
    program += f"\nnp.savez({str(run_dir.path / 'read.npz')!r}, **tensors)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=run_dir.path)
    import numpy as np

    read = np.load(run_dir.path / "read.npz")
    assert set(read) == {f"{kind}/{name}" for kind in KINDS for name in SHAPES}
    for key, value in values(7).items():
        assert torch.equal(torch.from_numpy(read[key]), value)


# ---- what a save costs


def bench(*flags):
    command = [sys.executable, str(ROOT / "train/bench_save.py"), *map(str, flags)]
    environment = os.environ | {"MASTER_PORT": str(free_port())}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)


def test_bench_save_measures_and_leaves_nothing(tmp_path):
    done = bench("--size", "tiny", "--saves", 2, "--steps", 2, "--folder", tmp_path / "new")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "a save every 30 minutes holds training up for" in done.stdout
    saves = json.loads(done.stdout.splitlines()[-1])["saves"]
    assert len(saves) == 2
    for row in saves:
        assert row["held_up_s"] >= row["begin_s"] + row["finish_s"] > 0
        assert row["share_percent"] == pytest.approx(row["held_up_s"] / 18)
        assert row["steps_meanwhile"] >= 1
    assert list(tmp_path.iterdir()) == []


def test_bench_save_keeps_its_hands_off_a_folder_that_is_there(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    done = bench("--size", "tiny", "--folder", tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"error: --folder {tmp_path} exists, and would be deleted at the end; give a new one\n"
    assert (tmp_path / "thesis.tex").exists()
