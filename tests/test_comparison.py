"""Verdicts: by the interval, against a model of the same size under the same protocol, or not at all."""

import json
import random

import numpy as np
import pytest
from scipy.stats import binom
from small_scores import make_items, result_of, write_items

from eval import comparison, diff
from eval.comparison import BASELINES, compare, make_board, make_row, nearest, read_samples, score_items
from eval.intervals import difference, holm, mcnemar, paired_bootstrap, share, verdict_of, wilson

SIZES = {"1.3B": 1_450_000_000, "2.7B": 2_550_000_000, "6.7B": 5_920_000_000, "13B": 10_670_000_000}


# ---- intervals


def coverage(p, n, make_interval):
    """The probability, exactly, that the interval of a share of n items holds the true share p."""
    counts = np.arange(n + 1)
    inside = [low <= p <= high for low, high in (make_interval(count / n, n) for count in counts)]
    return binom.pmf(counts, n, p)[inside].sum()


@pytest.mark.parametrize("p", [0.02, 0.25, 0.5, 0.77])
@pytest.mark.parametrize("n", [164, 817])
def test_wilsons_interval_holds_the_truth_19_times_in_20(p, n):
    assert 0.93 < coverage(p, n, wilson) < 0.98


@pytest.mark.parametrize("n", [2, 40, 164, 10042])
def test_interval_of_all_or_none_ends_where_shares_do(n):
    (low, high), (_, other_high) = wilson(0.0, n), wilson(1.0, n)
    assert f"{low:.1f}" == "0.0" and 0 < high < 1 and f"{other_high:.1f}" == "1.0" and other_high <= 1


def test_interval_of_a_difference_holds_the_truth_19_times_in_20():
    rng = np.random.default_rng(0)
    for p, q, n in ((0.3, 0.3, 500), (0.72, 0.7, 1838), (0.05, 0.01, 164)):
        a, b = rng.binomial(n, p, 2000) / n, rng.binomial(n, q, 2000) / n
        ends = [difference(x, n, y, n) for x, y in zip(a, b, strict=True)]
        held = np.mean([low <= p - q <= high for low, high in ends])
        assert 0.93 < held < 0.98, (p, q, n, held)  # 2,000 draws: 0.5 % of noise, one sigma


def test_models_that_are_equal_are_called_level_19_times_in_20():
    rng = np.random.default_rng(1)
    scores = rng.binomial(2000, 0.6, (2000, 2)) / 2000
    level = np.mean([verdict_of(difference(a, 2000, b, 2000)) == "level" for a, b in scores])
    assert 0.93 < level < 0.98


def test_bootstrap_interval_of_paired_answers_holds_the_truth():
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(150):
        a = rng.random(300) < 0.5
        b = np.where(rng.random(300) < 0.3, rng.random(300) < 0.7, a)  # true difference 0.3 * (0.7 - 0.5)
        low, high = paired_bootstrap(a, b)
        held += low <= 0.06 <= high
    assert 0.89 < held / 150 <= 1  # 150 draws: 1.8 % of noise, one sigma


def test_bootstrap_is_the_same_for_the_same_seed_and_nothing_where_nothing_differs():
    a, b = [1, 0, 1, 1, 0, 0, 1], [1, 1, 1, 0, 1, 0, 1]
    assert paired_bootstrap(a, b, seed=3) == paired_bootstrap(a, b, seed=3)
    assert paired_bootstrap(a, a) == [0, 0]


def test_mcnemar_is_the_binomial_test_of_the_items_that_one_has_right():
    # 1 against 8 of 9: p = 2 * (1 + 9) / 2**9, from the textbook's table of the sign test
    a = [True] * 5 + [True] * 1 + [False] * 8 + [False] * 6
    b = [True] * 5 + [False] * 1 + [True] * 8 + [False] * 6
    assert mcnemar(a, b) == {"only_a": 1, "only_b": 8, "p": pytest.approx(20 / 512)}
    assert mcnemar(a, a)["p"] == 1.0


def test_holm_multiplies_the_smallest_by_the_number_of_tests_and_keeps_the_order():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.9]) == [1.0, 1.0]


# ---- baselines


def test_every_published_number_has_source_protocol_shots_metric_and_how_sure():
    seen = set()
    for row in BASELINES["numbers"]:
        assert row.keys() >= {"model", "task", "metric", "shots", "value", "protocol", "source", "sure"}, row
        assert row.keys() <= {
            "model",
            "task",
            "metric",
            "shots",
            "value",
            "protocol",
            "source",
            "sure",
            "comparable",
            "note",
        }
        assert row["task"] in BASELINES["tasks"] and row["model"] in BASELINES["models"]
        assert row["source"] in BASELINES["sources"] and row["protocol"] in BASELINES["protocols"]
        assert row["sure"] in BASELINES["sure"] and 0 <= row["value"] <= 100
        key = tuple(row[name] for name in ("model", "task", "metric", "shots", "protocol"))
        assert key not in seen, key
        seen.add(key)
    used = {row["model"] for row in BASELINES["numbers"]}
    assert used == set(BASELINES["models"])
    for source in BASELINES["sources"].values():
        assert source["url"].startswith("https://") and source["title"] and source["checked"]


def test_gpt3s_zero_shot_numbers_are_those_of_its_table():
    table = {row["task"]: {} for row in BASELINES["numbers"]}
    for row in BASELINES["numbers"]:
        if row["model"].startswith("GPT-3") and row["shots"] == 0:
            table[row["task"]][row["model"].removeprefix("GPT-3 ")] = row["value"]
    assert [table["hellaswag"][size] for size in SIZES] == [54.7, 62.8, 67.4, 70.9]
    assert [table["lambada"][size] for size in SIZES] == [63.6, 67.1, 70.3, 72.5]
    assert [table["arc_easy"][size] for size in SIZES] == [53.8, 58.2, 60.2, 63.8]
    assert [table["openbookqa"][size] for size in SIZES] == [46.8, 53.0, 50.4, 55.6]
    # the table's own means over a task never fall by much from one size to the next: a misread digit would show
    for task in ("hellaswag", "lambada", "winogrande", "piqa", "arc_easy", "arc_challenge"):
        values = [table[task][size] for size in ("125M", "350M", "760M", *SIZES, "175B")]
        assert values == sorted(values), task


def test_a_175b_model_stands_in_no_same_size_column():
    for parameters in (*SIZES.values(), 70_000_000_000, 175_000_000_000, 10**12):
        name, same_size = nearest("GPT-3", parameters)
        assert "175B" not in name
        assert same_size is (parameters in SIZES.values())


@pytest.mark.parametrize("size", SIZES)
def test_each_of_our_sizes_meets_gpt3_opt_and_pythia_of_its_own(size):
    assert nearest("GPT-3", SIZES[size]) == (f"GPT-3 {size}", True)
    assert nearest("OPT", SIZES[size]) == (f"OPT-{size}", True)
    assert nearest("Pythia", SIZES[size])[1] is True


# ---- verdicts


def cell(task, skill, n, parameters=SIZES["1.3B"], family="GPT-3", **given):
    return make_row(task, make_items(task, n, skill, **given), parameters)["columns"][family]


def test_verdict_is_ahead_level_or_behind_by_the_interval():
    assert cell("hellaswag", 0.60, 10_042)["verdict"] == "ahead"
    assert cell("hellaswag", 0.50, 10_042)["verdict"] == "behind"
    near = cell("hellaswag", 0.547, 10_042)
    assert near["verdict"] == "level" and near["interval"][0] < 0 < near["interval"][1]
    # three points above the published share of 1,267 items say nothing when ours are 200
    assert cell("winogrande", 0.62, 200)["verdict"] == "level"


def test_arc_and_openbookqa_meet_gpt3_by_its_own_normalisation_and_the_others_by_lm_evals():
    row = make_row("arc_easy", make_items("arc_easy", 2376, 0.7), SIZES["1.3B"])
    assert row["metric"] == "acc_uncond"
    assert row["columns"]["GPT-3"]["metric"] == "acc_uncond" and row["columns"]["GPT-3"]["verdict"] == "ahead"
    assert row["columns"]["OPT"]["metric"] in ("acc", "acc_norm")
    items = make_items("arc_easy", 2376, 0.7)
    for item in items:
        del item["metrics"]["acc_uncond"]
    lacking = make_row("arc_easy", items, SIZES["1.3B"])["columns"]
    assert lacking["GPT-3"]["verdict"] == "not comparable" and "Answer:" in lacking["GPT-3"]["why"]
    assert lacking["OPT"]["verdict"] != "not comparable"


def test_what_cannot_be_compared_says_why():
    assert "no number of GPT-3 1.3B: of GPT-3 only 175B is published" in cell("truthfulqa_mc1", 0.3, 817)["why"]
    assert "shots" in cell("hellaswag", 0.6, 500, shots=3)["why"]
    hybrid = cell("hellaswag", 0.7, 10_042, family="Mamba-2 hybrid")
    assert (
        hybrid["verdict"] == "not comparable"
        and "another size" in hybrid["why"]
        and hybrid["value"] == pytest.approx(0.678)
    )
    small = cell("hellaswag", 0.3, 500, parameters=2_500_000)
    assert small["verdict"] == "not comparable" and small["model"] == "GPT-3 125M"
    assert "another protocol" in cell("mmlu", 0.3, 500, family="Pythia")["why"]
    assert cell("mmlu", 0.3, 14_042, parameters=SIZES["2.7B"])["verdict"] == "ahead"
    human = comparison.compare("humaneval", score_items(make_items("humaneval", 164, 0.1)), "OPT", SIZES["1.3B"])
    assert human["verdict"] == "not comparable"


def test_chance_and_ties_are_those_of_the_items():
    items = make_items("truthfulqa_mc1", 40, 0.5)
    for item in items[:10]:
        item["loglikelihoods"] = [-3.0] * 5
    for item in items[10:20]:
        item["choices"], item["loglikelihoods"] = item["choices"][:2], item["loglikelihoods"][:2]
    scores = score_items(items)
    assert scores["tie_rate"]["acc"] == 0.25
    assert scores["chance"] == pytest.approx((30 / 5 + 10 / 2) / 40)
    assert score_items(make_items("lambada", 10, 0.5))["tie_rate"] == {}
    uneven = make_items("piqa", 4, 0.5)
    for item in uneven:
        item["choices"], item["loglikelihoods"] = ["ab", "abcd"], [-1.0, -2.0]
    assert score_items(uneven)["tie_rate"] == {"acc": 0.0, "acc_norm": 1.0}


def test_board_counts_its_verdicts_and_says_them(tmp_path):
    tasks = {"hellaswag": make_items("hellaswag", 5000, 0.7), "piqa": make_items("piqa", 1838, 0.6),
             "truthfulqa_mc1": make_items("truthfulqa_mc1", 100, 0.2)}  # fmt: skip
    board = make_board(result_of(tasks, SIZES["1.3B"]), write_items(tmp_path, tasks))
    assert [row["task"] for row in board["rows"]] == list(tasks)
    assert board["verdicts"]["GPT-3"] == {"ahead": 1, "level": 0, "behind": 1, "not comparable": 1}
    assert comparison.headline(board) == (
        "Against GPT-3 1.3B: ahead on 1 of 2 comparable tasks, level on 0, behind on 1; 1 not comparable."
    )
    tiny = make_board(result_of(tasks, 2_500_000), tmp_path)
    assert "no GPT-3 of about" in comparison.headline(tiny)
    assert board["rows"][0]["partial"] is True and board["rows"][1]["partial"] is False
    json.dumps(board)
    (tmp_path / "piqa.jsonl").write_text('{"task": "piqa"')
    with pytest.raises(ValueError, match="piqa.jsonl, line 1"):
        make_board(result_of(tasks, 1), tmp_path)
    (tmp_path / "piqa.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="no samples of piqa"):
        make_board(result_of(tasks, 1), tmp_path)


# ---- two models


@pytest.fixture
def two(tmp_path):
    """Samples of A, and of B, which has 60 more of 400 items right and 20 wrong that A had right."""
    a = make_items("hellaswag", 400, 0.5)
    b = [json.loads(json.dumps(item)) for item in a]
    wrong = [item for item in b if not item["metrics"]["acc_norm"]][:60]
    right = [item for item in b if item["metrics"]["acc_norm"]][:20]
    for item in (*wrong, *right):
        value = 1.0 - item["metrics"]["acc_norm"]
        item["metrics"] = dict.fromkeys(item["metrics"], value)
        picked = item["gold"] if value else (item["gold"] + 1) % 4
        item["prediction"], item["loglikelihoods"] = picked, [-5.0 - (j != picked) for j in range(4)]
    same = make_items("piqa", 50, 0.5)
    random.Random(0).shuffle(b)  # the order of the items must not matter
    a_folder = write_items(tmp_path / "a/samples", {"hellaswag": a, "piqa": same, "boolq": same})
    return a_folder, write_items(tmp_path / "b/samples", {"hellaswag": b, "piqa": same})


def test_changed_items_are_found_and_tested(two):
    result = diff.compare_runs(two[0].parent, two[1])
    row = result["tasks"]["hellaswag"]
    metric = row["metrics"]["acc_norm"]
    assert (metric["only_a"], metric["only_b"]) == (20, 60)
    assert metric["difference"] == pytest.approx(0.1) and metric["p"] < 1e-4 and metric["verdict"] == "ahead"
    assert metric["p_holm"] == pytest.approx(2 * metric["p"])
    low, high = metric["interval"]
    assert 0.05 < low < 0.1 < high < 0.15
    assert [item["better"] for item in row["changed"]].count("B") == 60 and len(row["changed"]) == 80
    assert all((item["a"] == item["gold"]) is (item["better"] == "A") for item in row["changed"])
    assert result["tasks"]["piqa"]["metrics"]["acc_norm"]["p"] == 1.0 and result["tasks"]["piqa"]["changed"] == []
    assert result["left_out"] == ["boolq"]


def test_few_items_prove_nothing(tmp_path):
    a, b = make_items("piqa", 6, 1.0), make_items("piqa", 6, 1.0)
    for item in b[:3]:
        item["metrics"] = dict.fromkeys(item["metrics"], 0.0)
    result = diff.compare_task("piqa", a, b)
    assert result["metrics"]["acc"]["p"] == pytest.approx(0.25) and result["metrics"]["acc"]["verdict"] == "level"


def test_difference_is_shown_and_written(two, tmp_path, capsys):
    assert diff.main([str(two[0]), str(two[1]), "--out", str(tmp_path / "diff.json"), "--items", "1"]) == 0
    out = capsys.readouterr().out
    assert "+10.0" in out and "ahead" in out and "only B is right" in out and "left out" in out
    written = json.loads((tmp_path / "diff.json").read_text())
    assert len(written["tasks"]["hellaswag"]["changed"]) == 80


def test_other_items_or_no_samples_get_one_line(two, tmp_path, capsys):
    items = read_samples(two[1] / "hellaswag.jsonl")
    items[3]["item_sha256"] = "f" * 64
    write_items(two[1], {"hellaswag": items})
    assert diff.main([str(two[0]), str(two[1])]) == 2
    assert "were asked different questions" in capsys.readouterr().err
    assert diff.main([str(two[0]), str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.startswith("error: ") and not capsys.readouterr().err
    (tmp_path / "bare").mkdir()
    assert diff.main([str(two[0]), str(tmp_path / "bare")]) == 2
    assert "has no samples" in capsys.readouterr().err


def test_share_of_equal_values_still_has_an_interval():
    assert share([1.0] * 50)["interval"][0] < 0.95
    assert compare("piqa", score_items(make_items("piqa", 50, 1.0)), "GPT-3", SIZES["1.3B"])["verdict"] == "ahead"
