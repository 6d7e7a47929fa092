"""What a run is: presets beneath flags, the length in steps, tokens or epochs, and the JSON files of DeepSpeed."""

import dataclasses
import json
import re

import pytest
from test_train import config, plan
from torch import distributed as dist

from model.config import PRESETS
from model.hybrid import HybridLM
from train.config import LENGTHS, RUN_PRESETS, SIZE_DEFAULTS, TrainConfig, flag, make_config, make_plan
from train.engine import ROOT, complete_ds_config, read_ds_config
from train.launch import main

FILES = sorted((ROOT / "ds_configs").glob("*.json"))
GIVEN = {"data": "data/x", "run": "runs/x"}


def ds_json(folder, name="cpu", **changes):
    """A copy of a shipped JSON; keys with a double underscore are changed one level down, None takes a key out."""
    settings = json.loads((ROOT / f"ds_configs/{name}.json").read_text())
    for key, value in changes.items():
        *outer, key = key.split("__")
        target = settings.setdefault(outer[0], {}) if outer else settings
        target.pop(key, None)
        if value is not None:
            target[key] = value
    path = folder / "ds.json"
    path.write_text(json.dumps(settings))
    return path


# ---- presets and flags


@pytest.mark.parametrize("preset", RUN_PRESETS)
def test_every_preset_makes_a_plan_for_the_gpus_it_is_meant_for(preset):
    made, origins = make_config(GIVEN | {"preset": preset})
    worlds = {"small_scale": [4], "medium_scale": [8], "large_scale": [8, 16]}.get(preset, [1])
    for world_size in worlds:
        p = make_plan(made, vocab_size=50_257, n_tokens=10**11, world_size=world_size)
        assert p.batch_sequences == p.micro_batch * p.grad_accum * world_size
    assert {name for name, origin in origins.items() if origin == f"preset {preset}"} == set(RUN_PRESETS[preset])
    assert set(RUN_PRESETS[preset]) <= {f.name for f in dataclasses.fields(TrainConfig)}


def test_presets_carry_the_numbers_of_their_set_ups():
    def made(preset, world_size):
        return make_plan(make_config(GIVEN | {"preset": preset})[0], vocab_size=50_257, n_tokens=10**11,
                         world_size=world_size)  # fmt: skip

    assert made("quick_test", 2).steps == 100
    assert [made(f"{s}_scale", 8).steps for s in ("small", "medium", "large")] == [10_000, 100_000, 150_000]
    single = made("single_gpu", 1)
    assert (single.steps, single.warmup_steps) == (int(100e9 / 2**19), 2000)
    assert single.batch_sequences * single.model.seq_len == 512 * 1024


def test_a_flag_overrides_a_preset_and_each_value_knows_where_it_came_from():
    made, origins = make_config(GIVEN | {"preset": "lab", "size": "nano", "lr": 0.5})
    assert (made.size, made.lr, made.batch_tokens, made.seed) == ("nano", 0.5, 1 << 17, 1234)
    assert [origins[name] for name in ("size", "lr", "batch_tokens", "seed")] == [
        "flag", "flag", "preset lab", "default"
    ]  # fmt: skip


@pytest.mark.parametrize(("length", "value"), [("steps", 7), ("tokens", 1e6), ("epochs", 2.0)])
def test_a_length_on_the_command_line_replaces_that_of_the_preset(length, value):
    for preset in RUN_PRESETS:
        made, _ = make_config(GIVEN | {"preset": preset, length: value})
        assert {name: getattr(made, name) for name in LENGTHS} == dict.fromkeys(LENGTHS) | {length: value}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"preset": "huge"}, "unknown preset 'huge'; choose one of quick_test, small_scale"),
        ({}, "neither --size nor --preset is given"),
    ],
)
def test_an_unknown_preset_and_no_size_at_all_are_refused(given, words):
    with pytest.raises(ValueError) as caught:
        make_config(GIVEN | given)
    assert words in str(caught.value)


def test_tokens_and_epochs_are_rounded_down_to_whole_steps():
    assert plan(tokens=512 * 10 + 511).steps == 10
    assert plan(n_tokens=100_001, epochs=2.0).steps == int(2 * (100_000 // 64) / 8)
    assert plan(n_tokens=100_001, epochs=0.5).steps == int(0.5 * (100_000 // 64) / 8)
    assert plan(n_tokens=100_001, epochs=1.0).steps == plan(n_tokens=100_001).steps


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 5, "tokens": 1e6}, "--steps 5 and --tokens 1000000.0 are given; the length of a run is one of"),
        ({"epochs": 1.0, "tokens": 1e6}, "--tokens 1000000.0 and --epochs 1.0 are given"),
        ({"tokens": 100.0}, "--tokens 100 is not a step of 512 tokens (--batch-tokens)"),
        ({"epochs": -1.0}, "--epochs -1.0 is not a step"),
        ({"tokens": float("nan")}, "--tokens nan is not a number to train with"),
        ({"lr": float("nan")}, "--lr nan is not a number to train with"),
        ({"lr": float("inf")}, "--lr inf is not"),
        ({"lr": -1e-3}, "allowed are lr > 0"),
        ({"timeout_minutes": 0.05}, "--timeout-minutes 0.05 is too small; allowed: 0.1 or more"),
    ],
)
def test_lengths_that_cannot_be_are_refused(changes, words):
    with pytest.raises(ValueError) as caught:
        plan(**changes)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_size_works_with_its_defaults_alone_on_eight_gpus():
    assert SIZE_DEFAULTS.keys() == PRESETS.keys()
    for size in SIZE_DEFAULTS.keys() - {"tiny", "nano", "nano-gated"}:
        made, _ = make_config(GIVEN | {"size": size})
        assert make_plan(made, vocab_size=50_257, n_tokens=10**11, world_size=8).grad_accum >= 1


def test_a_size_and_data_are_enough_and_the_run_is_named_after_them():
    made, origins = make_config({"size": "6.7B", "data": "data/eight"})
    assert (made.run, made.recompute, origins["recompute"]) == ("runs/6.7B", "layer", "size 6.7B")
    assert make_config({"size": "6.7B", "data": "d", "recompute": "none"})[0].recompute == "none"
    assert make_config({"preset": "lab", "data": "d"})[0].run == "runs/lab"
    assert make_config({"preset": "lab", "size": "1.3B", "data": "d", "run": "r"})[0].run == "r"


# ---- DeepSpeed's JSON


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_key_of_a_shipped_json_is_explained_in_the_readme(file):
    readme = (ROOT / "ds_configs/README.md").read_text()
    assert f"`{file.name}`" in readme
    settings = read_ds_config(file)
    for key, value in settings.items():
        for inner in value if isinstance(value, dict) else [None]:
            name = key if inner is None else inner
            assert f"`{name}`" in readme, name


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shipped_json_writes_the_hidden_defaults_out(file):
    settings = read_ds_config(file)
    assert settings["data_types"]["grad_accum_dtype"] == settings["communication_data_type"] == "fp32"
    zero = settings["zero_optimization"]
    assert zero["stage"] == 0 or "overlap_comm" in zero
    merged = complete_ds_config(settings, plan(), config(clip=0.7))
    assert merged["gradient_clipping"] == (0.7 if zero["stage"] else 0.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"elasticity": {"enabled": True}}, "sets 'elasticity', which DeepSpeed no longer has: Elastic training"),
        ({"nebula": {}}, "checkpoints would silently fall back"),
        ({"zero_optimization__mics_shard_size": 8}, "MiCS ZeRO-3 sharding has been removed"),
        ({"fp16": {"enabled": True}}, "sets 'fp16', which belongs to bf16.enabled"),
        ({"torch_autocast": {"enabled": True}}, "sets 'torch_autocast'"),
        ({"aio": {}}, "offloading to NVMe, which our checkpoints cannot read"),
        ({"zero_optimization__cpu_offload": True}, "it is the old name of offload_optimizer"),
        ({"zero_optimization__zero_quantized_gradients": True}, "rounded to 4 bits"),
        ({"zero_optimization__compute_grad_norm": False}, "without the norm nothing is clipped"),
        ({"zero_optimization__zero_hpz_partition_size": 8}, "acts in stage 3 alone, and the stage is 2"),
        ({"zero_optimization__stage3_max_live_parameters": 1}, "acts in stage 3 alone"),
        ({"zero_optimization__stage": 0, "bf16": {"enabled": True}}, "stage 0 keeps no float32 copy of bf16 weights"),
        ({"bf16": {"enabled": True}, "data_types": None}, "adds micro-batches up in bf16"),
        ({"zero_optimization__stage": 1, "bf16": {"enabled": True}}, "immediate_grad_update must be true in stage 1"),
        ({"bf16": {"enabled": True, "immediate_grad_update": True}}, "acts in no other; the stage is 2"),
        ({"bf16": {"enabled": "perhaps"}}, 'bf16.enabled "perhaps": Input should be a valid boolean'),
        ({"bf16__bf16_optimizer_states": True}, "lose small updates"),
        ({"communication_data_type": "fp16"}, "overflows"),
        ({"gradient_allreduce_op": "sum"}, "makes the gradient grow with the number of processes"),
        ({"gradient_predivide_factor": 2.0}, "does nothing without prescale_gradients"),
        ({"zero_allow_untested_optimizer": None}, "zero_allow_untested_optimizer must be true"),
        ({"zero_optimization__offload_optimizer": {"device": "nvme"}}, "offload_optimizer to nvme is refused"),
        ({"zero_optimization__offload_optimizer": {"device": "cpu", "fast_init": True}}, "takes device and"),
        ({"zero_optimization__offload_optimizer": {"device": "cpu"}, "zero_force_ds_cpu_optimizer": None},
         "zero_force_ds_cpu_optimizer must be false"),
    ],
)  # fmt: skip
def test_removed_keys_and_wrong_combinations_are_refused_with_the_reason(tmp_path, changes, words):
    with pytest.raises(ValueError) as caught:
        read_ds_config(ds_json(tmp_path, **changes))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps_per_print": 0}, "steps_per_print 0: Input should be greater than or equal to 1"),
        ({"steps_per_print": "often"}, 'steps_per_print "often": Input should be a valid integer'),
        ({"communication_data_type": "fp64"}, "communication_data_type \"fp64\": Input should be 'fp32', 'bf16'"),
        ({"data_types__grad_accum_dtype": "int8"}, "data_types.grad_accum_dtype \"int8\": Input should be 'fp32'"),
        ({"prescale_gradients": "no"}, 'prescale_gradients "no" would be taken for false; write that'),
        ({"zero_optimization__stage": "2"}, 'zero_optimization.stage "2" would be taken for 2; write that'),
        ({"zero_optimization__stage": True}, "zero_optimization.stage true would be taken for 1; write that"),
        ({"zero_optimization__reduce_bucket_size": "5000000"}, '"5000000" would be taken for 5000000; write that'),
        ({"zero_optimization__reduce_bucket_size": "auto"}, 'reduce_bucket_size "auto" would be taken for 500000000'),
        ({"zero_optimization__max_live_parameters": 5}, "did you mean 'stage3_max_live_parameters'?"),
    ],
)
def test_values_of_a_wrong_type_are_refused(tmp_path, changes, words):
    with pytest.raises(ValueError) as caught:
        read_ds_config(ds_json(tmp_path, **changes))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_whole_number_may_be_written_as_a_float(tmp_path):
    read_ds_config(ds_json(tmp_path, zero_optimization__reduce_bucket_size=5e8, steps_per_print=1e9))


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = ds_json(tmp_path)
    path.write_text(path.read_text().replace('"stage": 2', '"stage": 2, "stage": 1'))
    with pytest.raises(ValueError, match="the key 'stage' stands twice in one object"):
        read_ds_config(path)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_bucket_holds_the_largest_gradient(stage):
    """DeepSpeed frees a larger one while another stream still reads it."""
    settings = read_ds_config(f"ds_configs/zero{stage}.json")
    for size in ("1.3B", "6.7B", "13B"):
        made = make_plan(config(size=size), vocab_size=50_304, n_tokens=10**11, world_size=1)
        bucket = complete_ds_config(settings, made, config())["zero_optimization"]["reduce_bucket_size"]
        assert bucket == max(200_000_000, 50_304 * made.model.d_model)
    zero = {"stage": stage}  # DeepSpeed's own default
    completed = complete_ds_config(settings | {"zero_optimization": zero}, plan(), config())
    assert completed["zero_optimization"]["reduce_bucket_size"] == 500_000_000
    network = HybridLM(PRESETS["tiny"])
    assert PRESETS["tiny"].largest_parameter == max(p.numel() for p in network.parameters())


def test_hierarchical_partitions_must_divide_the_processes():
    settings = read_ds_config("ds_configs/zero3_hpz.json")
    for world_size in (1, 4, 8, 16):
        complete_ds_config(settings, plan(), config(), world_size)
    with pytest.raises(ValueError, match="zero_hpz_partition_size 8 does not divide 12 processes"):
        complete_ds_config(settings, plan(), config(), 12)


def test_a_shipped_json_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_ds_config("ds_configs/zero2.json")["zero_optimization"]["stage"] == 2


# ---- --explain


def explained(output):
    """{first column: (value, from)} of the tables; the cells are set apart by two blanks or more."""
    cells = [re.split(r"\s{2,}", line.strip()) for line in output.splitlines()]
    return {row[0]: tuple(row[1:]) for row in cells if len(row) == 3}


def test_explain_shows_each_value_and_its_origin_and_starts_nothing(data, tmp_path, capsys):
    run = tmp_path / "run"
    flags = ["--size", "tiny", "--preset", "quick_test", "--lr", "0.5", "--tokens", "20480", "--batch-tokens", "2048"]
    assert main([*flags, "--data", str(data), "--run", str(run), "--explain", "--world-size", "4"]) == 0
    rows = explained(capsys.readouterr().out)
    assert rows["--lr"] == ("0.5", "flag")
    assert rows["--eval-every"] == ("50", "preset quick_test")
    assert rows["--micro-batch"] == ("4", "size tiny")
    assert rows["--seed"] == ("1234", "default")
    assert rows["--steps"] == ("10", "derived: --tokens")
    assert rows["gradient accumulation"] == ("2", "derived")
    assert rows["vocab_size"][0] == "512"
    assert rows["gradient_clipping"] == ("1.0", "--clip")
    assert rows["zero_optimization.stage"][0] == "2"
    assert rows["zero_optimization.stage"][1].endswith("ds_configs/cpu.json")
    assert rows["managed_gradient_accumulation"] == ("True", "DeepSpeed's default")
    assert not run.exists()
    assert not dist.is_initialized()
    for field in dataclasses.fields(TrainConfig):
        assert flag(field.name) in rows


def test_explain_refuses_what_a_run_would_refuse(data, capsys):
    flags = ["--size", "tiny", "--data", str(data), "--run", "r"]
    assert main([*flags, "--explain", "--world-size", "3"]) == 2
    assert "512 is not a multiple of 768 (3 processes" in capsys.readouterr().err
    assert main([*flags, "--world-size", "2"]) == 2
    assert "--world-size 2 is for --explain alone" in capsys.readouterr().err
    assert main(["--data", str(data), "--run", "r", "--preset", "huge", "--explain"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown preset 'huge'; choose one of quick_test")


def test_every_shipped_json_is_explained(data, capsys):
    for file in FILES:
        flags = ["--size", "tiny", "--data", str(data), "--run", "r", "--ds-config", str(file), "--explain"]
        assert main(flags) == 0, file
        rows = explained(capsys.readouterr().out)
        stage = json.loads(file.read_text())["zero_optimization"]["stage"]
        assert rows["zero_optimization.stage"][0] == str(stage)
        assert rows["communication_data_type"][0] == "torch.float32"
