"""The parts of a run: schedule, order of the data, flags, DeepSpeed JSON, checkpoints that are damaged, the record."""

import argparse
import json
import math
import re
import shutil

import numpy as np
import pytest

from curation.shards import open_stream
from train.config import SIZE_DEFAULTS, TrainConfig, add_flags, make_plan
from train.data import n_sequences, read_sequences, sequence_indices
from train.engine import ROOT, complete_ds_config, read_ds_config
from train.order import shuffled
from train.run_dir import RunDir, check_new_or_resumed, cut_metrics, differences, read_metrics, write_json
from train.schedule import learning_rate


def config(**changes):
    return TrainConfig(**{"size": "tiny", "data": "data/x", "run": "runs/x", **changes})


def plan(world_size=1, n_tokens=100_000, **changes):
    return make_plan(config(**changes), vocab_size=500, n_tokens=n_tokens, world_size=world_size)


# ---- schedule


def test_learning_rate_warms_up_peaks_and_ends_at_its_minimum():
    p = plan(steps=100, warmup_steps=10, lr=1e-3, min_lr=0.1)
    rates = [learning_rate(step, p) for step in range(1, 101)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == pytest.approx(1e-3)
    assert max(rates) == rates[9]
    assert rates[54] == pytest.approx((1e-3 + 1e-4) / 2)  # half-way down the cosine
    assert rates[99] == pytest.approx(1e-4)
    assert all(a > b for a, b in zip(rates[9:], rates[10:], strict=False))


def test_learning_rate_is_the_same_wherever_the_run_stops():
    whole, short = plan(steps=100), plan(steps=100, stop_after=40)
    assert short.last_step == 40
    assert [learning_rate(s, whole) for s in range(1, 41)] == [learning_rate(s, short) for s in range(1, 41)]


def test_no_warmup_begins_at_the_peak():
    assert learning_rate(1, plan(steps=1000, warmup_steps=0, lr=1.0)) == pytest.approx(1.0, rel=1e-5)


# ---- the order of the data

FIRST_OF_SEED_0 = [3558, 8198, 3071, 4337]  # an order is a promise to runs under way


@pytest.mark.parametrize("n", [1, 2, 3, 17, 256, 1000])
def test_shuffle_is_a_permutation(n):
    assert sorted(shuffled(np.arange(n), n, 5)) == list(range(n))


def test_shuffle_differs_by_seed_leaves_little_in_place_and_does_not_change():
    a, b = shuffled(np.arange(10_000), 10_000, 0), shuffled(np.arange(10_000), 10_000, 1)
    assert (a == b).sum() < 10  # one place in common is expected
    assert (a == np.arange(10_000)).sum() < 10
    assert abs(np.corrcoef(a, np.arange(10_000))[0, 1]) < 0.05
    assert shuffled(np.arange(4), 10_000, 0).tolist() == FIRST_OF_SEED_0


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 8), (2, 2), (4, 1), (2, 4)])
def test_every_sequence_comes_once_an_epoch_over_all_ranks(world_size, micro_batch):
    p = plan(world_size=world_size, micro_batch=micro_batch, batch_tokens=8 * 64, steps=30)
    n = 100  # 8 does not divide it: steps straddle epochs
    seen = []
    for step in range(1, 26):
        ranks = [sequence_indices(step, n, p, seed=3, rank=rank, world_size=world_size) for rank in range(world_size)]
        step_order = np.stack(ranks, axis=1).reshape(-1)  # as one process would have read them
        seen += step_order.tolist()
    assert sorted(seen[:100]) == list(range(100))
    assert sorted(seen[100:200]) == list(range(100))
    assert seen[:100] != seen[100:200]
    one = plan(micro_batch=8, batch_tokens=8 * 64, steps=30)
    alone = [sequence_indices(step, n, one, seed=3, rank=0, world_size=1).reshape(-1) for step in range(1, 26)]
    assert seen == np.concatenate(alone).tolist()


def test_one_epoch_serves_every_token_once_as_a_target(data):
    stream = open_stream(data, "train")
    n, seq_len = n_sequences(stream, 64), 64
    batch = read_sequences(stream, np.arange(n), seq_len, "cpu")
    whole, _ = stream.read(0, stream.n_tokens)
    assert batch.targets.flatten().tolist() == whole[1 : n * seq_len + 1].tolist()
    assert batch.tokens.flatten().tolist() == whole[: n * seq_len].tolist()
    assert stream.n_tokens - 1 - n * seq_len < seq_len


def test_document_ids_change_where_a_separator_stands(data):
    stream = open_stream(data, "train")
    batch = read_sequences(stream, np.arange(200), 64, "cpu")
    begins = batch.tokens[:, 1:] == stream.separator_id
    assert begins.any()
    assert (batch.document_ids.diff(dim=1) == begins).all()


def test_an_empty_row_counts_for_nothing(data):
    batch = read_sequences(open_stream(data, "train"), [3, -1], 64, "cpu")
    assert (batch.targets[1] == -100).all()
    assert (batch.targets[0] >= 0).all()


# ---- flags and plan


def test_every_field_is_a_flag_with_help_and_default():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser, TrainConfig)
    flags = vars(parser.parse_args(["--size", "nano", "--data", "d", "--run", "r", "--no-verify-data", "--lr", "0.5"]))
    assert TrainConfig(**flags) == TrainConfig(size="nano", data="d", run="r", verify_data=False, lr=0.5)
    shown = parser.format_help()
    for name in TrainConfig.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in shown
    assert shown.count("(default") == len(TrainConfig.__dataclass_fields__) - 1  # all but --data


def test_real_sizes_have_defaults_that_divide_over_eight_gpus():
    for size in SIZE_DEFAULTS.keys() - {"tiny", "nano", "nano-gated"}:
        assert make_plan(config(size=size), vocab_size=50_257, n_tokens=10**11, world_size=8).steps > 0


def test_vocabulary_is_padded_to_a_multiple_of_128():
    assert plan().model.vocab_size == 512
    assert make_plan(config(), vocab_size=513, n_tokens=10**6, world_size=1).model.vocab_size == 640


def test_steps_default_to_one_pass_over_the_data():
    assert plan(n_tokens=100_001, batch_tokens=512).steps == math.floor(100_000 / 64) // 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": "7B"}, "unknown size '7B'; choose one of"),
        ({"batch_tokens": 1000}, "1,000 is not a multiple of 512 (2 processes x 4 sequences x 64 tokens); "
                                 "nearest: 512 or 1,024"),
        ({"batch_tokens": 100}, "nearest: 512 or 1,024"),
        ({"steps": 0}, "--steps 0 is too small; allowed: 1 or more"),
        ({"micro_batch": 0}, "--micro-batch 0 is too small"),
        ({"keep": -1}, "--keep -1 is too small; allowed: 0 or more"),
        ({"lr": 0.0}, "allowed are lr > 0"),
        ({"min_lr": 2.0}, "0 <= min-lr <= 1"),
        ({"beta2": 1.0}, "--beta2 1.0 is out of range"),
        ({"steps": 10, "warmup_steps": 10}, "--warmup-steps 10 leaves no step"),
        ({"batch_tokens": 1 << 17}, "do not fill one batch"),
    ],
)  # fmt: skip
def test_flags_that_cannot_be_are_refused(changes, words):
    with pytest.raises(ValueError) as caught:
        plan(world_size=2, **changes)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- DeepSpeed's JSON


def test_every_shipped_ds_config_is_accepted():
    files = sorted((ROOT / "ds_configs").glob("*.json"))
    assert len(files) >= 3
    for file in files:
        merged = complete_ds_config(read_ds_config(file), plan(), config(clip=0.7))
        assert merged["gradient_clipping"] == (0.7 if merged["zero_optimization"]["stage"] else 0.0)
        assert merged["train_micro_batch_size_per_gpu"] == 4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gradient_cliping": 1.0}, "'gradient_cliping'"),
        ({"gradient_clipping": 1.0}, "sets 'gradient_clipping', which belongs to --clip; take it out of the file"),
        ({"train_batch_size": 8}, "belongs to --batch-tokens"),
        ({"optimizer": {"type": "Adam"}}, "belongs to --lr"),
        ({"zero_optimisation": {"stage": 2}}, "did you mean 'zero_optimization'?"),
        (
            {"zero_optimization": {"stage": 2, "overlap_com": True}},
            "unknown key 'overlap_com'; did you mean 'overlap_comm'?",
        ),
        ({"zero_optimization": {"stage": 7}}, "zero_optimization.stage 7: Input should be 0, 1, 2"),
        ({"zero_optimization": {}}, "no zero_optimization.stage; allowed: 0, 1, 2 or 3"),
        ({"bf16": {"enable": True}}, "'bf16', has an unknown key 'enable'; did you mean 'enabled'?"),
        ({"bf16": True}, "'bf16' must be an object"),
        ([1], "must be one JSON object"),
    ],
)
def test_wrong_ds_configs_are_refused(tmp_path, settings, words):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError) as caught:
        read_ds_config(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_or_broken_ds_config_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape("ds_configs/zero2.json")):
        read_ds_config(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_ds_config(tmp_path / "bad.json")


# ---- the run's folder


def record(**run):
    return {"run": {"seed": 1, "steps": 10, "micro_batch": 2, **run}, "data": {"manifest_sha256": "a"}, "argv": ["x"]}


def test_resume_is_refused_when_the_run_would_change(tmp_path):
    run_dir = RunDir(tmp_path / "run")
    check_new_or_resumed(run_dir, False, record())
    write_json(run_dir.config, record())
    check_new_or_resumed(run_dir, True, record(micro_batch=4))  # how the work is laid out may change
    with pytest.raises(ValueError, match="holds a run already; go on with --resume"):
        check_new_or_resumed(run_dir, False, record())
    with pytest.raises(ValueError, match="run.seed: 1 before, 2 now"):
        check_new_or_resumed(run_dir, True, record(seed=2))
    assert differences(record(), {**record(), "argv": ["y"]}) == []
    assert differences(record(), {**record(), "data": {"manifest_sha256": "b"}}) == [
        "data.manifest_sha256: 'a' before, 'b' now"
    ]


def test_a_run_from_before_a_field_of_the_model_goes_on_with_its_default():
    earlier = {**record(), "model": {"d_model": 32}}
    assert differences(earlier, {**record(), "model": {"d_model": 32, "positions": "rope", "rope_dim": None}}) == []
    assert differences(earlier, {**record(), "model": {"d_model": 32, "positions": "alibi"}}) == [
        "model.positions: 'rope' before, 'alibi' now"
    ]


def test_a_folder_with_other_files_is_not_taken_for_a_run(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="a folder with other files in it"):
        check_new_or_resumed(RunDir(tmp_path), False, record())


@pytest.mark.parametrize("name", ["thesis.tex", "thesis.tex/run"])
def test_a_file_is_not_taken_for_a_run(tmp_path, name):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"thesis\.tex is a file; give the name of a new or empty folder"):
        check_new_or_resumed(RunDir(tmp_path / name), False, record())


def test_metrics_after_the_checkpoint_are_cut_and_a_torn_line_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s, "loss": 1.0}) + "\n" for s in range(1, 6)) + '{"step": 6, "lo')
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5]
    cut_metrics(path, 3)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]


def test_unfinished_checkpoints_do_not_count(tmp_path):
    run_dir = RunDir(tmp_path)
    for name in ("step_0000010", "step_0000002", "step_0000020.part", "other"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [path.name for path in run_dir.checkpoints()] == ["step_0000002", "step_0000010"]
    assert run_dir.checkpoint(2).name == "step_0000002"
    shutil.rmtree(tmp_path / "checkpoints")
    assert run_dir.checkpoints() == []


def test_parameters_that_must_not_decay_do_not():
    from model.config import PRESETS
    from model.hybrid import HybridLM
    from train.optim import parameter_groups

    model = HybridLM(PRESETS["tiny"])
    decayed, kept = parameter_groups(model, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    kept_names = {names[id(p)] for p in kept["params"]}
    assert {name.split(".")[-1] for name in kept_names if "embedding" not in name} == {
        "A_log", "D", "dt_bias", "norm_weight", "conv1d_weight", "conv1d_bias", "weight",
    }  # fmt: skip
    assert all("norm" in name or "embedding" in name for name in kept_names if name.endswith(".weight"))
    assert len(decayed["params"]) + len(kept["params"]) == len(names)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
