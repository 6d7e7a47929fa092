"""The count of a GPU's memory: against what autograd keeps, what ZeRO splits, and what an H200 held."""

import argparse
import json

import pytest
from launching import ROOT

from launch.check import MEMORY_WITHIN, compare
from launch.speed import measured
from model.config import get_preset
from train.config import TrainConfig, add_flags, make_plan
from train.memory import GIB, Zero, largest_micro_batch, memory_needed, peak_memory, zero_of


@pytest.mark.parametrize("n", [1, 8, 128])
@pytest.mark.parametrize(
    "stage, whole, shared", [(1, 2 + 4, 12), (2, 2, 16), (3, 0, 18)], ids=["stage 1", "stage 2", "stage 3"]
)
def test_what_zero_splits_is_divided_by_the_processes(stage, whole, shared, n):
    """Bytes a parameter, ZeRO (arXiv:1910.02054, figure 1) with float32 gradients; stage 1 adds them up whole."""
    model = get_preset("2.7B")
    parts = peak_memory(model, world_size=n, micro_batch=1, zero=Zero(stage=stage), recompute="layer")
    standing = sum(parts.get(part, 0) for part in ("weights", "float32 weights", "optimizer states", "gradients"))
    assert standing == pytest.approx((whole + shared / n) * model.n_parameters)


def test_hpz_keeps_a_second_copy_within_a_node():
    model = get_preset("6.7B")
    flat, hpz = (peak_memory(model, world_size=64, micro_batch=1, zero=Zero(stage=3, hpz=h)) for h in (1, 8))
    assert hpz["weights"] - flat["weights"] == pytest.approx(2 * model.n_parameters / 8)


def test_offload_leaves_weights_and_gradients_on_the_gpu():
    model = get_preset("2.7B")
    parts = peak_memory(model, micro_batch=1, zero=Zero(offload=True), recompute="layer")
    assert parts["float32 weights"] == parts["optimizer states"] == 0
    assert parts["gradients"] == 4 * model.n_parameters  # DeepSpeed 0.19.8 adds them up there


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_more_rows_need_more_and_recomputation_less(stage):
    def peak(rows, recompute):
        parts = peak_memory(
            get_preset("1.3B"), world_size=8, micro_batch=rows, zero=Zero(stage=stage), recompute=recompute
        )
        return sum(parts.values())

    assert peak(1, "layer") < peak(1, "none") < peak(2, "none") < peak(4, "none")
    assert peak(4, "layer") < peak(4, "none") / 2


def test_every_ds_config_can_be_counted():
    for path in sorted((ROOT / "ds_configs").glob("*.json")):
        zero = zero_of(json.loads(path.read_text()))
        parts = peak_memory(get_preset("nano"), world_size=2, micro_batch=4, zero=zero)
        assert sum(parts.values()) > 0, path
        assert (zero.bf16, zero.offload, zero.hpz > 1) == (
            "bf16" in path.read_text(), "offload" in path.name, "hpz" in path.name,
        )  # fmt: skip


@pytest.mark.parametrize("point", measured()["points"], ids=lambda point: point["id"])
def test_peak_is_what_an_h200_held(point):
    gib, error, *_ = compare(point)
    assert abs(error) <= MEMORY_WITHIN, f"{gib:.2f} GiB planned, {point['peak_gib']} measured"


def test_largest_micro_batch_fits_and_the_next_does_not():
    model = get_preset("1.3B")
    rows = largest_micro_batch(
        model, batch_tokens=1 << 20, world_size=4, zero=Zero(), recompute="none", optimizer="adamw", memory_gib=79.1
    )
    assert (1 << 20) % (4 * rows * model.seq_len) == 0

    def needed(n):
        return memory_needed(peak_memory(model, world_size=4, micro_batch=n, zero=Zero()), 4) / GIB

    assert needed(rows) <= 79.1 < needed(2 * rows)


def test_micro_batch_that_cannot_fit_is_refused_by_how_much():
    with pytest.raises(ValueError, match=r"^--micro-batch auto: one sequence of 8,192 tokens .*: [\d.]+ too few; .*$"):
        largest_micro_batch(
            get_preset("6.7B"), batch_tokens=1 << 21, world_size=1, zero=Zero(), recompute="none", optimizer="adamw",
            memory_gib=39.4,
        )  # fmt: skip


def test_auto_takes_the_planners_micro_batch():
    config = TrainConfig(size="1.3B", data="data", run="runs/x", steps=10, micro_batch="auto", batch_tokens=1 << 20)
    plan = make_plan(config, vocab_size=50304, n_tokens=10**10, world_size=4, zero=Zero(stage=2), gpu_memory_gib=79.1)
    assert plan.micro_batch == largest_micro_batch(
        plan.model, batch_tokens=1 << 20, world_size=4, zero=Zero(), recompute="none", optimizer="adamw",
        memory_gib=79.1,
    )  # fmt: skip
    assert plan.micro_batch * plan.grad_accum * 4 * 8192 == 1 << 20


def test_batch_that_no_micro_batch_divides_is_refused_as_such():
    config = TrainConfig(size="1.3B", data="data", run="runs/x", steps=10, micro_batch="auto", batch_tokens=1_000_000)
    with pytest.raises(ValueError, match=r"^--batch-tokens 1,000,000 is not a multiple of 32,768 "):
        make_plan(config, vocab_size=50304, n_tokens=10**10, world_size=4, zero=Zero(), gpu_memory_gib=79.1)


def test_micro_batch_is_a_number_or_auto():
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_flags(parser, TrainConfig)

    def parse(text):
        return parser.parse_args(["--data", "x", "--micro-batch", text]).micro_batch

    assert (parse("auto"), parse("4")) == ("auto", 4)
    with pytest.raises(argparse.ArgumentError, match="invalid int value: 'four'"):
        parse("four")


def test_auto_without_a_gpu_is_refused_in_one_line():
    config = TrainConfig(size="nano", data="data", run="runs/x", steps=10, micro_batch="auto")
    with pytest.raises(ValueError, match=r"^--micro-batch auto counts .*; give a number$"):
        make_plan(config, vocab_size=4096, n_tokens=10**7, world_size=1)
