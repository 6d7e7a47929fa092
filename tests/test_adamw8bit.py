"""8-bit moments: how they are packed, and where they are refused. The kernel's own step: tests/test_gpu.py."""

import pytest
import torch
from launching import launch

from train.checkpoint import Piece
from train.config import TrainConfig
from train.engine import complete_ds_config
from train.optim import BLOCK, EightBit, block_runs, check_optimizer

# as bitsandbytes' levels: uneven, finer towards zero, with a zero, and with ends of exactly -1 (or above 0) and 1
FINE = torch.logspace(-6, 0, 128, dtype=torch.float64).float()
SIGNED = torch.cat([-FINE[1:].flip(0), torch.zeros(1), FINE])
UNSIGNED = torch.cat([torch.zeros(1), torch.logspace(-7, 0, 255)])


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("n", [1, BLOCK - 1, BLOCK, 10 * BLOCK + 17])
def test_what_is_packed_again_does_not_change_by_a_bit(signed, n):
    values = torch.randn(n, generator=torch.Generator().manual_seed(n)) * torch.logspace(-9, 3, n)
    if not signed:
        values = values.square()
    values[n // 2 :: 3] *= -1 if signed else 1
    once, twice = (EightBit(n, SIGNED if signed else UNSIGNED) for _ in range(2))
    once.pack(values)
    unpacked = once.unpack(0, n)
    twice.pack(unpacked)
    assert torch.equal(twice.unpack(0, n), unpacked)
    assert torch.equal(twice.scales, once.scales)
    assert torch.equal(twice.codes, once.codes)
    largest = values.abs().view(-1) == values.abs().max()
    assert torch.equal(unpacked[largest], values[largest])


def test_a_part_is_unpacked_as_in_the_whole():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    packed = EightBit(1000, SIGNED)
    assert not packed.unpack(0, 1000).any()  # before the first step
    packed.pack(values)
    assert torch.equal(packed.unpack(300, 900), packed.unpack(0, 1000)[300:900])
    error = (packed.unpack(0, 1000) - values).abs() / values.abs().view(-1, 8).amax()
    assert error.max() < 0.06  # half the widest step of these levels, 10 ** (6 / 127) - 1


def test_blocks_are_counted_from_the_start_of_a_matrix_wherever_a_process_begins():
    """Two matrices of 1,000 and 600 on one process, and cut at element 700 of them: the same but for the block cut."""
    values = torch.randn(1600, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 1600)

    def pieces(*places):  # (start in its matrix, length)
        offsets = [sum(length for _, length in places[:i]) for i in range(len(places))]
        return [Piece("x", start, n, None, offset, None) for (start, n), offset in zip(places, offsets, strict=True)]

    def rounded(values, *places):
        packed = EightBit(len(values), SIGNED, block_runs(pieces(*places)))
        packed.pack(values)
        return packed.unpack(0, len(values))

    whole = rounded(values, (0, 1000), (0, 600))
    for i, matrix in enumerate(values.split([1000, 600])):
        assert torch.equal(whole.split([1000, 600])[i], rounded(matrix, (0, len(matrix))))
    cut = torch.cat([rounded(values[:700], (0, 700)), rounded(values[700:], (700, 300), (0, 600))])
    same = cut == whole
    assert same[:512].all() and same[768:].all()
    assert not same[512:768].all()


def test_a_machine_without_a_gpu_is_told_before_anything_starts(data, tmp_path):
    done = launch("--size", "tiny", "--data", data, "--run", tmp_path / "x", "--steps", 2, "--optimizer", "adamw8bit")
    assert "error: --optimizer adamw8bit runs on NVIDIA GPUs alone" in done.stderr
    assert not (tmp_path / "x").exists()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("train.optim.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs bitsandbytes, which is not installed: pip install"):
        check_optimizer(TrainConfig(size="tiny", data="x", optimizer="adamw8bit"))


def test_offloading_is_refused():
    settings = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    with pytest.raises(ValueError, match="take offload_optimizer out"):
        complete_ds_config(settings, None, TrainConfig(size="tiny", data="x", optimizer="adamw8bit"))
