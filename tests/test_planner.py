"""The planner's time, prices and plans: against measurements, and as commands that really start."""

import argparse
import json
import subprocess
import sys
from dataclasses import replace

import pytest
from launching import ROOT

from launch import check
from launch.estimate import ERRORS, estimate, main, make_parser, make_request
from launch.measure import DEFAULTS, POINTS, name_of, write_measurements
from launch.plan import Request, command, price_of, prices, rank, scaling, search
from launch.speed import MEASUREMENTS, Setup, collective_time, constants, measured, step_time
from model.config import get_preset
from train.config import TrainConfig, add_flags, make_config, make_plan
from train.hardware import get_gpu, load_gpus
from train.memory import Zero

README = (ROOT / "README.md").read_text()
# What the README names as misses. One that is mended must leave the list, and a new one must be named.
TIME_MISSES: set[str] = set()
PUBLISHED_MISSES = {("Llama-3.1 8B", 8), ("Llama-3.1 8B", 128), ("Bamba 9B", 192)}


def request_of(*flags):
    return make_request(make_parser().parse_args(list(flags)))


def test_step_times_are_within_a_tenth_of_an_h200s_but_for_those_named():
    checked = [p for p in measured()["points"] if p["use"] == "checks"]
    misses = {p["id"] for p in checked if abs(check.compare(p)[3]) > check.TIME_WITHIN}
    assert misses == TIME_MISSES
    assert len(checked) - len(misses) >= 9
    for point in checked:
        assert abs(check.compare(point)[3]) < ERRORS["h200"], point["id"]


def test_a_point_that_calibrates_is_not_counted():
    for point in measured()["points"]:
        counted = check.compare(point)[3] is not None
        assert counted == (point["use"] == "checks")
        assert point["source"]


def test_published_figures_are_within_a_quarter_but_for_those_named():
    misses = set()
    for figure in measured()["published"]:
        if figure["use"] == "checks":
            error = check.predict_published(figure) / figure["tokens_per_s_per_gpu"] - 1
            if abs(error) > check.PUBLISHED_WITHIN:
                misses.add((figure["model"], figure["n_gpus"]))
    assert misses == PUBLISHED_MISSES


@pytest.mark.parametrize("rows", [check.point_rows, check.published_rows, check.claim_rows, check.scaling_rows])
def test_readme_shows_what_the_planner_says_today(rows):
    """After a change to the planner: python -m launch.check prints the README's tables."""
    for row in rows():
        assert row in README


def test_readme_counts_hits_and_misses_as_they_are():
    text = " ".join(README.split())
    (memory, points), (times, timed), (published, figures) = check.counts()
    assert f"memory within 5 % at {memory} of {points} points" in text
    assert f"time within 10 % at {times} of the {timed} points that count" in text
    assert f"{published} of {figures} within 25 %" in text


def test_every_constant_says_what_it_is_and_where_from():
    for group in measured()["constants"].values():
        for name, entry in group.items():
            assert entry["value"] > 0 and entry["what"] and entry["from"], name


def test_every_price_has_a_gpu_a_date_and_a_source():
    for price in prices():
        assert price["gpu"] in load_gpus() and price["kind"] in ("spot", "on-demand", "own")
        assert price["dollars_per_gpu_hour"] > 0 and price["date"] and price["source"]
    assert (
        price_of(get_gpu("h100"), spot=True)["dollars_per_gpu_hour"]
        < price_of(get_gpu("h100"))["dollars_per_gpu_hour"]
    )


@pytest.mark.parametrize(
    "flags",
    [
        ("--size", "6.7B", "--gpus", "16", "--gpu", "h100", "--tokens", "100B"),
        ("--size", "13B", "--gpus", "8", "--gpu", "a100-40", "--tokens", "20B"),
        ("--size", "1.3B", "--gpus", "6", "--gpu", "a100-80", "--seq-len", "4096", "--optimizer", "muon"),
        ("--size", "lab", "--gpus", "1", "--gpu", "rtx4060", "--layer-pattern", "MMMA", "--tokens", "1B"),
        ("--size", "2.7B", "--gpus", "1024", "--gpu", "h200", "--tokens", "1T", "--recompute", "layer"),
        ("--size", "6.7B", "--gpus", "8", "--gpu", "h200", "--tokens", "100B", "--fp8"),
    ],
)
def test_the_command_is_one_that_training_takes(flags):
    request = request_of(*flags)
    choice = rank(request, request.gpu, request.n_gpus)[0][0]
    words = command(request, choice).split()
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_flags(parser, TrainConfig)
    config, _ = make_config(vars(parser.parse_args(words[words.index("train/launch.py") + 1 :])))
    plan = make_plan(config, vocab_size=request.model.vocab_size, n_tokens=10**13, world_size=request.n_gpus)
    setup = choice.setup
    assert (plan.micro_batch, plan.grad_accum, plan.model) == (setup.micro_batch, setup.grad_accum, request.model)
    assert (config.recompute, config.optimizer, config.fp8) == (setup.recompute, setup.optimizer, setup.fp8)
    assert plan.steps * setup.batch_tokens <= request.tokens < (plan.steps + 1) * setup.batch_tokens
    assert (ROOT / config.ds_config).is_file()


def test_search_keeps_to_the_budget_and_the_days():
    result = estimate(request_of("--size", "1.3B", "--tokens", "20B", "--budget", "2000", "--days", "3"))
    assert result["within"] and result["dollars"] <= 2000 and result["days"] <= 3
    fastest = result["fastest"]
    assert fastest["dollars"] <= 2000 and fastest["days"] <= result["days"]
    assert result["dollars"] <= fastest["dollars"]


def test_impossible_budget_says_by_how_much():
    result = estimate(request_of("--size", "6.7B", "--tokens", "1T", "--budget", "1000", "--days", "0.2"))
    assert not result["within"]
    assert any("dollars more: " in line for line in result["would_fit"])
    assert any("days more: " in line for line in result["would_fit"])
    assert "or fewer tokens: " in result["would_fit"][-1]


def test_fewer_tokens_that_are_offered_do_keep_to_the_budget():
    flags = ("--size", "2.7B", "--gpu", "h100", "--gpus", "8", "--budget", "500")
    line = estimate(request_of(*flags, "--tokens", "100B"))["would_fit"][-1]
    offered = float(line.split("fewer tokens: ")[1].split("B")[0]) * 0.99  # it is rounded
    assert estimate(request_of(*flags, "--tokens", f"{offered}B"))["within"]


def test_model_that_does_not_fit_says_what_would_have_to_give():
    request = request_of("--size", "13B", "--gpus", "8", "--gpu", "a100-40", "--ds-config", "zero2")
    result = estimate(request)
    assert not result["fits"] and result["short_by_gib"] > 0
    text = "\n".join(result["would_fit"])
    for what in ("adamw8bit", "ZeRO-3: fits", "zero2_offload", " GPUs: fits", "--gpu h100: fits"):
        assert what in text, text


def test_activations_that_no_number_of_gpus_would_share_are_named():
    flags = ("--size", "1.3B", "--seq-len", "16384", "--gpus", "2", "--gpu", "rtx4090", "--recompute", "none")
    result = estimate(request_of(*flags))
    assert not result["fits"]
    assert any(line.startswith("--recompute layer: fits with ") for line in result["would_fit"])
    assert any(line.startswith("more GPUs: not even on 1,024") for line in result["would_fit"])


def test_every_micro_batch_can_be_listed_with_its_memory():
    request = request_of("--size", "1.3B", "--gpus", "8", "--gpu", "h200")
    few, many = estimate(request)["set_ups"], estimate(request, every=True)["set_ups"]
    rows = [r for r in many if (r["ds_config"], r["recompute"]) == ("ds_configs/zero2.json", "none")]
    assert [r["micro_batch"] for r in sorted(rows, key=lambda r: r["memory_gib_per_gpu"])] == [1, 2, 4, 8, 16]
    assert [r["fits"] for r in sorted(rows, key=lambda r: r["memory_gib_per_gpu"])] == [True] * 4 + [False]
    assert len(few) < len(many)
    for row in rows:
        assert sum(row["memory_gib_by_part"].values()) == pytest.approx(row["memory_gib_per_gpu"])


def test_what_fits_has_room_for_the_allocator():
    result = estimate(request_of("--size", "1.3B", "--gpus", "8", "--gpu", "a100-40"))
    assert result["fits"]
    assert result["memory_gib_per_gpu"] < result["memory_gib_needed"] <= result["gpu_memory_gib"]
    assert sum(result["memory_gib_by_part"].values()) == pytest.approx(result["memory_gib_per_gpu"])


def test_twice_the_tokens_take_twice_as_long_and_cost_twice():
    once, twice = (estimate(request_of("--size", "1.3B", "--tokens", t)) for t in ("10B", "20B"))
    for name in ("days", "gpu_hours", "dollars"):
        assert twice[name] == pytest.approx(2 * once[name])
    low, high = once["range"]["days"]
    assert low < once["days"] < high and once["range"]["reasons"]


def test_a_step_is_no_faster_than_its_products():
    model = get_preset("6.7B")
    setup = Setup(model=model, gpu=get_gpu("h100"), n_gpus=8, micro_batch=1, grad_accum=4)
    assert sum(step_time(setup).values()) > 4 * 8192 * model.flops_per_token / 989e12
    parts = step_time(replace(setup, recompute="layer"))
    assert parts["products"] == pytest.approx(step_time(setup)["products"] * 4 / 3)


def test_collectives_slow_down_where_they_leave_the_node():
    gpu = get_gpu("a100-80")
    inside, outside = (collective_time(gpu, n, 1e9, 1, constants(gpu)) for n in (8, 16))
    assert outside > inside > 1e9 / (gpu.link_gb_s * 1e9)
    assert collective_time(gpu, 1, 1e9, 1, constants(gpu)) == 0


def test_stage_2_communicates_for_every_micro_batch_and_stage_1_once():
    setup = Setup(model=get_preset("6.7B"), gpu=get_gpu("h100"), n_gpus=64, micro_batch=1, grad_accum=8)
    one, two = (step_time(replace(setup, zero=Zero(stage=s)))["communication"] for s in (1, 2))
    many = step_time(replace(setup, grad_accum=16))["communication"]
    assert many > 1.9 * two
    assert step_time(replace(setup, zero=Zero(stage=1), grad_accum=16))["communication"] == pytest.approx(one)


def test_scaling_reaches_1024_gpus_and_loses_on_the_way():
    rows = scaling(request_of("--size", "6.7B", "--gpu", "h100", "--gpus", "8"), get_gpu("h100"))
    assert [row["gpus"] for row in rows] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
    assert rows[0]["best"] is None  # 6.7B does not fit into one
    best = {row["gpus"]: row["tokens_per_s_per_gpu"][row["best"]] for row in rows[3:]}
    assert best[16] > best[64] > best[256] > best[1024] > 0.7 * best[8]
    assert {row["best"] for row in rows[1:]} >= {"zero1", "zero2", "zero3_hpz"}  # each leads somewhere


def test_search_leaves_out_gpus_without_a_price():
    request = Request(size="nano", model=get_preset("nano"), tokens=1e9, provider="packet.ai", budget=1e6)
    assert {c.setup.gpu.name for c in search(request)} == {"h200", "b200"}


@pytest.mark.parametrize(
    "text",
    [
        "[",
        '{"prices": [{"gpu": "h100"}]}',
        '{"prices": [{"gpu": "h100", "kind": "on-demand", "dollars_per_gpu_hour": -1}]}',
    ],
)
def test_edited_prices_that_are_wrong_are_refused_in_one_line(tmp_path, text):
    path = tmp_path / "prices.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"^.*prices\.json is not a list of prices: [^\n]*$"):
        prices(path)


@pytest.mark.parametrize("n_gpus", [3, 7, 12, 1000])
def test_any_number_of_gpus_gets_a_plan_that_divides_its_batch(n_gpus):
    request = request_of("--size", "1.3B", "--gpus", str(n_gpus), "--gpu", "h100", "--tokens", "1T")
    setup = rank(request, request.gpu, n_gpus)[0][0].setup
    assert setup.batch_tokens % (n_gpus * setup.micro_batch * 8192) == 0
    assert setup.batch_tokens >= 1 << 20


def test_electricity_of_an_own_machine_is_not_taken_for_a_price():
    assert price_of(get_gpu("rtx4090"))["provider"] == "RunPod"
    assert price_of(get_gpu("rtx4060"))["kind"] == "own"
    found = search(Request(size="nano", model=get_preset("nano"), tokens=1e9, budget=1e6))
    assert "rtx4060" not in {c.setup.gpu.name for c in found}


def test_page_of_pictures_needs_no_network(tmp_path, capsys):
    page = tmp_path / "plan.html"
    assert main(["--size", "1.3B", "--tokens", "10B", "--budget", "1000", "--plot", str(page)]) == 0
    text = page.read_text()
    assert "GiB on each GPU" in text and "cost against time" in text
    assert "<script src" not in text
    for part in ("weights", "optimizer states", "activations", "h100", "b200"):
        assert f'"name":"{part}"' in text


def test_points_to_measure_have_names_of_their_own_and_cover_the_choices():
    points = [DEFAULTS | point for point in POINTS]
    assert len({name_of(point) for point in points}) == len(points) >= 12
    for name in ("size", "zero_file", "recompute", "seq_len", "micro_batch"):
        assert len({point[name] for point in points}) > 1, name


def test_measurements_are_written_as_they_were_read(tmp_path):
    copy = tmp_path / "measurements.json"
    write_measurements(measured(), copy)
    assert copy.read_text() == MEASUREMENTS.read_text()
    assert json.loads(copy.read_text()) == measured()


def test_a_point_is_measured_through_the_training_engine():
    point = DEFAULTS | {"size": "tiny", "seq_len": 64, "micro_batch": 2, "vocab_size": 512, "recompute": "layer"}
    command = [
        sys.executable,
        "-m",
        "launch.measure",
        "--point",
        json.dumps(point),
        "--ds-config",
        "ds_configs/cpu.json",
    ]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stderr
    figures = json.loads(ran.stdout.splitlines()[-1])
    assert figures["gpu"] == "cpu" and figures["step_ms"] > 0


def test_measuring_without_a_gpu_is_refused_in_one_line():
    ran = subprocess.run(
        [sys.executable, "-m", "launch.measure"], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert ran.returncode == 2
    assert ran.stderr.splitlines()[-1].startswith("error: no CUDA GPU is visible")
