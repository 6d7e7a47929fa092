"""Benchmarks while a run trains: a checkpoint's scores, in every ZeRO stage, and training that does not notice."""

import pytest
import torch
from launching import launch
from small_benchmarks import make_benchmarks

from curation.tokenizer import load_tokenizer
from eval import questions as eval_questions
from eval.harness import run_tasks
from eval.models import OwnModel
from eval.report import benchmark_figures
from model.hybrid import HybridLM
from model.scorer import Scorer
from train.config import TrainConfig, make_plan
from train.quiz import Cost, score_task
from train.run_dir import RunDir, read_json, read_metrics

TASKS = ["piqa", "arc_easy", "lambada", "mmlu"]
RANKS = 3  # the jobs do not divide evenly


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory):
    return make_benchmarks(tmp_path_factory.mktemp("benchmarks"), 3)


def ask_for(benchmarks, data, out, *flags):
    arguments = ["--data", benchmarks, "--tokenizer", data, "--seq-len", 64, "--out", out, *flags]
    return eval_questions.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def questions(benchmarks, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("questions") / "questions.json"
    assert ask_for(benchmarks, data, path, "--items", 20, "--tasks", *TASKS) == 0
    return path


@pytest.fixture(scope="module")
def stages(data, questions, tmp_path_factory):
    """What tests/quiz_worker.py found, {stage: [of each rank]}."""
    out = tmp_path_factory.mktemp("stages") / "found.json"
    done = launch(data, questions, out, processes=RANKS, program="tests/quiz_worker.py")
    assert done.returncode == 0, done.stderr[-3000:]
    return read_json(out)


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_losses_weights_and_random_states_are_those_of_a_run_that_asks_nothing(stages, stage):
    for rank in stages[stage]:
        assert rank["asked"] == rank["plain"]
        assert rank["kept"] is True


def test_three_ranks_score_in_every_stage_what_one_process_does(stages, questions, data):
    content, tokenizer = read_json(questions), load_tokenizer(data)
    config = TrainConfig(size="tiny", data=str(data), steps=4)
    torch.manual_seed(config.seed)
    model = HybridLM(make_plan(config, vocab_size=512, n_tokens=100_000, world_size=1).model, kernels="torch")
    pieces = [
        (ids[:-1], ids[len(ids) - n :])
        for task in content["tasks"].values() for item in task["items"] for ids, n in (*item["texts"], *item["alone"])
    ]  # fmt: skip
    answers = iter(Scorer(OwnModel(model.eval(), tokenizer), max_positions=2 * 64).score(pieces))
    alone = {name: score_task(task, answers) for name, task in content["tasks"].items()}
    assert alone["arc_easy"]["n"] == 3 and alone["mmlu"]["n"] == 20
    for ranks in stages.values():
        for rank in ranks:
            assert rank["eval"][0] == alone
            assert rank["eval"] == ranks[0]["eval"]
            assert rank["eval"][-1]["lambada"]["perplexity"] != alone["lambada"]["perplexity"]  # it has learned


def test_a_network_that_is_not_a_number_has_no_scores_and_stops_nobody(stages):
    assert all(rank["broken"] == {} for ranks in stages.values() for rank in ranks)


@pytest.fixture(scope="module")
def run(data, benchmarks, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    result = launch(
        "--size", "tiny", "--steps", 4, "--save-every", 0, "--eval-every", 2, "--eval-tokens", 2000, "--data", data,
        "--run", run, "--eval-data", benchmarks, "--eval-tasks", ",".join(TASKS), "--eval-items", 500, processes=2,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert "questions of 4 benchmarks are asked: piqa, arc_easy, lambada, mmlu" in result.stderr
    return run


def test_last_scores_of_a_run_are_those_of_its_last_checkpoint(run, benchmarks, tmp_path):
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows if "eval" in row] == [2, 4]
    assert all(("eval_s" in row) == ("eval" in row) for row in rows)
    offline = run_tasks(RunDir(run).checkpoint(4), TASKS, data=benchmarks, device="cpu", out=tmp_path / "scores")
    for name, scores in rows[-1]["eval"].items():
        expected = offline["tasks"][name]
        assert scores == pytest.approx({key: expected[key] for key in scores}, rel=1e-6)


def test_report_draws_a_curve_of_each_benchmark(run):
    titles, pictures = zip(*benchmark_figures(read_metrics(run / "metrics.jsonl"), {}), strict=True)
    assert [title.split(",")[0] for title in titles] == ["PIQA", "ARC-Easy", "LAMBADA", "MMLU"]
    assert titles[0].endswith("acc_norm, 3 questions")
    assert all("error_y" in picture for picture in pictures)


def test_questions_are_drawn_the_same_every_time(questions, benchmarks, data, tmp_path):
    assert ask_for(benchmarks, data, tmp_path / "again.json", "--items", 20, "--tasks", *TASKS) == 0
    assert (tmp_path / "again.json").read_bytes() == questions.read_bytes()
    mmlu = read_json(questions)["tasks"]["mmlu"]
    assert (len(mmlu["items"]), mmlu["of"], mmlu["chance"]) == (20, 3 * 57, 0.25)
    assert len({item["group"] for item in mmlu["items"]}) > 5


def test_questions_whose_choices_are_longer_than_the_window_are_left_out(questions, benchmarks, data, tmp_path):
    longest = [max(n for _, n in item["texts"]) for item in read_json(questions)["tasks"]["piqa"]["items"]]
    window = sorted(longest)[0]
    assert ask_for(benchmarks, data, tmp_path / "some.json", "--tasks", "piqa", "--seq-len", window) == 0
    some = read_json(tmp_path / "some.json")["tasks"]["piqa"]
    assert len(some["items"]) == sum(n <= window for n in longest) < some["of"] == 3
    assert all(n <= window and len(ids) <= window + 1 for item in some["items"] for ids, n in item["texts"])


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--tasks", "trivia"], "error: there is no task 'trivia'; tasks: hellaswag"),
        (["--tasks", "humaneval"], "error: humaneval is written, not scored"),
        (["--items", "0"], "error: --items 0 is too small"),
        (["--seq-len", "1", "--tasks", "piqa"], "error: piqa has no question whose choices fit into 1 tokens"),
        (["--data", "nowhere"], "error: data folder nowhere does not exist"),
    ],
)
def test_wrong_flags_are_one_line(benchmarks, data, tmp_path, capsys, flags, problem):
    assert ask_for(benchmarks, data, tmp_path / "questions.json", *flags) == 2
    said = capsys.readouterr().err
    assert said.startswith(problem) and said.count("\n") == 1
    assert not (tmp_path / "questions.json").exists()


def test_run_with_missing_benchmarks_stops_with_one_line_before_it_starts(data, tmp_path):
    result = launch(
        "--size", "tiny", "--steps", 4, "--data", data, "--run", tmp_path / "run", "--eval-data", "nowhere"
    )
    assert result.returncode != 0
    assert "error: --eval-data nowhere: data folder" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"eval_items": 5}, "--eval-items 5 acts with --eval-data alone"),
        ({"eval_tasks": "piqa"}, "--eval-tasks piqa acts with --eval-data alone"),
        ({"eval_data": "x", "eval_every": 0}, "--eval-data x is asked at every --eval-every steps, and that is 0"),
        ({"eval_data": "x", "eval_items": 0}, "--eval-items 0 is too small"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(flags, problem):
    with pytest.raises(ValueError, match=problem):
        make_plan(TrainConfig(size="tiny", data="data/x", **flags), vocab_size=512, n_tokens=10_000, world_size=1)


def test_measuring_that_takes_too_long_is_said_once_with_what_would_be_right(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("train.quiz.time.perf_counter", lambda: now[0])
    cost, lines = Cost(), []
    for ended in (0.0, 110.0, 220.0, 330.0):  # 100 steps of 1 s, then 10 s of measuring
        now[0] = ended + 110.0
        lines.append(cost.line(ended + 100.0, 100))
    assert lines == [None, "measuring took 10.0 s, 9.1% of the time; --eval-every 490 would make it 2%", None, None]
    now[0] = 0.0
    cost = Cost()
    for ended in (0.0, 101.0, 202.0):
        now[0] = ended + 101.0
        assert cost.line(ended + 100.0, 100) is None
