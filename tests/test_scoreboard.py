"""`make eval` with benchmarks: a real model on small files, the tables, the score file, the page and its samples."""

import json
import re
import subprocess
import sys

import pytest
from launching import ROOT, free_port
from small_run import make_data, make_model, make_run
from small_scores import make_items, result_of, write_items

from eval import report_scores, scoreboard
from eval.comparison import BASELINES, make_board
from eval.report import build_report
from eval.report_scores import SHOWN, build_page, embedded, pick_samples

SECTIONS = ["headline", "scoreboard", "differences", "reasons", "metrics", "contamination", "samples", "published",
            "provenance"]  # fmt: skip
SKILL = {"hellaswag": 0.7, "lambada": 0.6, "winogrande": 0.6, "piqa": 0.7, "arc_easy": 0.55, "arc_challenge": 0.2,
         "boolq": 0.6, "mmlu": 0.26, "truthfulqa_mc1": 0.2, "humaneval": 0.05, "openbookqa": 0.45}  # fmt: skip


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """(board, samples folder, tasks) of seeded answers on all tasks by a model of 1.45 billion parameters."""
    tasks = {task: make_items(task, 300, skill) for task, skill in SKILL.items()}
    tasks["piqa"][5]["context"] = "</script><script>alert(1)</script> & 'quotes'"
    folder = write_items(tmp_path_factory.mktemp("scores") / "samples", tasks)
    unclean = {task: {(items[0]["group"], 0), (items[1]["group"], 1)} for task, items in tasks.items()}
    return make_board(result_of(tasks, 1_450_000_000), folder, unclean), folder, tasks


@pytest.fixture(scope="module")
def page(scored):
    """The page without the plotting library's own code."""
    html = build_page(scored[0], scored[1])
    assert html.count(report_scores.get_plotlyjs()) == 1
    return html.replace(report_scores.get_plotlyjs(), "")


# ---- the page


def test_page_holds_every_section_picture_and_task(page):
    assert re.findall(r'<(?:section|div class="tiles") id="(\w+)"', page) == SECTIONS
    figures = ["scores", "differences", "groups_mmlu"]
    assert sorted(re.findall(r'<div id="figure-(\w+)"', page)) == sorted(figures)
    for task in SKILL:
        assert f"<td>{BASELINES['tasks'][task]['title']}</td>" in page


def test_page_loads_nothing_from_anywhere(page):
    assert not re.findall(r"""(?:src|action|data)\s*=\s*["']?\s*(?:https?:)?//""", page)
    assert not re.findall(r"@import|url\(|<link|<iframe|<img|fetch\(|XMLHttp", page)


def test_page_shows_no_175b_beside_a_score_but_only_among_the_published(page):
    board = page[page.index('<section id="scoreboard">') : page.index('<section id="reasons">')]
    assert board.count("175B") == board.count("GPT-3 175B never is") == 1
    assert "GPT-3 175B" in page[page.index('<section id="published">') :]


def test_texts_of_items_cannot_break_out_of_the_page(scored, page):
    assert "<script>alert" not in page
    assert json.loads(embedded(pick_samples(scored[0], scored[1]))) == pick_samples(scored[0], scored[1])


def test_browser_of_samples_has_right_and_wrong_ones_of_every_task(scored):
    picked = pick_samples(scored[0], scored[1])
    assert list(picked) == [row["title"] for row in scored[0]["rows"]]
    for items in picked.values():
        assert len(items) == SHOWN
        assert 0 < sum(item["right"] for item in items) < SHOWN
    choices = picked["HellaSwag"][0]["choices"]
    assert sum(choice["gold"] for choice in choices) == sum(choice["said"] for choice in choices) == 1


def test_clean_items_are_scored_apart(scored):
    board, _, tasks = scored
    row = next(row for row in board["rows"] if row["task"] == "piqa")
    expected = sum(item["metrics"]["acc_norm"] for item in tasks["piqa"][2:]) / 298
    assert row["clean"]["left_out"] == 2 and row["clean"]["n"] == 298
    assert row["clean"]["metrics"]["acc_norm"]["value"] == pytest.approx(expected)
    everything = {"piqa": {(None, i) for i in range(300)}}
    only = make_board({**result_of({"piqa": tasks["piqa"]}, 10**9)}, scored[1], everything)
    assert only["rows"][0]["clean"] == {"n": 0, "left_out": 300, "metrics": {}}
    build_page(only, scored[1])


# ---- make eval


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory):
    """Files of three benchmarks, a few short items each."""
    folder = tmp_path_factory.mktemp("evals")
    write_rows(folder / "piqa/validation.jsonl", [
        {"goal": f"the model {i}", "sol1": "reads one", "sol2": "keeps what", "label": i % 2} for i in range(6)
    ])  # fmt: skip
    write_rows(folder / "openbookqa/test.jsonl", [
        {"id": str(i), "question_stem": f"a token {i}", "answerKey": "AB"[i % 2],
         "choices": {"text": ["small", "state"], "label": ["A", "B"]}} for i in range(4)
    ])  # fmt: skip
    write_rows(folder / "humaneval/test.jsonl", [
        {"task_id": "own/0", "prompt": "def f(x):\n", "entry_point": "f", "canonical_solution": "    return x\n",
         "test": "def check(f):\n    assert f(1) == 1\n"}
    ])  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("scoreboard")
    return make_run(root / "run", make_data(root / "data"), make_model(seq_len=64))


def test_eval_prints_the_scoreboard_and_writes_scores_page_and_samples(checkpoint, benchmarks, capsys):
    flags = ["--benchmarks", str(benchmarks), "--tasks", "piqa", "openbookqa", "--contamination"]
    assert scoreboard.main([str(checkpoint), *flags]) == 0
    out = capsys.readouterr().out
    assert "held-out bits per byte" in out and "PIQA" in out and "OpenBookQA" in out and "no GPT-3 of about" in out
    folder = checkpoint.parents[1] / "eval"
    scores = json.loads((folder / "step_0000007.json").read_text())
    assert scores["tasks"].keys() == {"continuation", "last_word"}
    rows = {row["task"]: row for row in scores["benchmarks"]["rows"]}
    assert rows.keys() == {"piqa", "openbookqa"} and rows["piqa"]["n"] == 6
    assert rows["openbookqa"]["metrics"].keys() == {"acc", "acc_norm", "acc_uncond"}
    assert rows["piqa"]["clean"] is not None
    assert rows["piqa"]["columns"]["GPT-3"]["verdict"] == "not comparable"
    html = (folder / "step_0000007.html").read_text()
    assert 'id="samples"' in html and "make eval-data" not in html
    assert sorted(path.name for path in (folder / "step_0000007/samples").iterdir()) == [
        "openbookqa.jsonl",
        "piqa.jsonl",
    ]
    assert (folder / "step_0000007/contamination.json").is_file()
    report = build_report(checkpoint.parents[1])
    assert "<td>PIQA</td>" in report and "eval/step_0000007.html" in report


def test_what_the_model_wrote_for_humaneval_is_run_in_the_sandbox(checkpoint, benchmarks, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "model.scorer.Scorer.generate_until", lambda self, requests, **_: ["    return x" for _ in requests]
    )
    try:
        scoreboard.check_sandbox()
    except scoreboard.SandboxError as error:
        pytest.skip(str(error))
    out = tmp_path / "scores.json"
    flags = ["--benchmarks", str(benchmarks), "--tasks", "humaneval", "--out", str(out)]
    assert scoreboard.main([str(checkpoint), *flags]) == 0
    [row] = json.loads(out.read_text())["benchmarks"]["rows"]
    assert row["metrics"]["pass@1"]["value"] == 1.0 and row["metric"] == "pass@1"
    [item] = [json.loads(line) for line in (tmp_path / "scores/samples/humaneval.jsonl").read_text().splitlines()]
    assert item["outcome"] == "passed"


def test_humaneval_without_a_sandbox_is_refused_before_anything_is_scored(checkpoint, benchmarks, monkeypatch, capsys):
    def refuse():
        raise scoreboard.SandboxError("no sandbox can be made on this machine, so nothing is run: no namespaces")

    monkeypatch.setattr(scoreboard, "check_sandbox", refuse)
    monkeypatch.setattr(scoreboard, "HarnessLM", lambda *_, **__: pytest.fail("scored all the same"))
    flags = ["--benchmarks", str(benchmarks), "--tasks", "piqa", "humaneval", "--batch-tokens", "64"]
    assert scoreboard.main([str(checkpoint), *flags]) == 2
    [error] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert error.endswith("no namespaces; leave it out with --tasks piqa")


def test_wrong_flags_get_one_line_before_anything_is_scored(checkpoint, benchmarks, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scoreboard, "HarnessLM", lambda *_, **__: pytest.fail("scored all the same"))
    (tmp_path / "file").touch()
    for flags, words in (
        (["--tasks", "trivia"], "there is no task 'trivia'"),
        (["--benchmarks", str(tmp_path / "none")], "does not exist"),
        (["--benchmarks", str(benchmarks), "--tasks", "boolq"], "boolq"),
        (["--own-only", "--tasks", "piqa"], "--own-only"),
        (["--contamination", "--tasks", "piqa"], "--benchmarks FOLDER"),
        (["--benchmarks", str(benchmarks), "--tasks", "piqa", "--size", "1.3B"], "1.3B"),
        (["--own-only", "--out", str(tmp_path / "file/x.json")], "file is not a folder; give another place"),
        (["--own-only", "--out", str(tmp_path)], f"it is a folder; give the name of a file, such as {tmp_path}/"),
        (["--tasks", "piqa", "--out", "x"], "--out x must end in .json"),
    ):
        assert scoreboard.main([str(checkpoint), "--out", str(tmp_path / "x.json"), *flags]) == 2, flags
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(errors) == 1 and words in errors[0], errors
    assert not (tmp_path / "x.json").exists()


def test_own_scores_are_kept_when_the_benchmarks_fail(checkpoint, benchmarks, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise ValueError("piqa cannot be scored")

    monkeypatch.setattr(scoreboard, "run_tasks", fail)
    out = tmp_path / "scores.json"
    flags = ["--benchmarks", str(benchmarks), "--tasks", "piqa", "--out", str(out)]
    assert scoreboard.main([str(checkpoint), *flags]) == 2
    assert "bits_per_byte" in json.loads(out.read_text())
    assert "held-out bits per byte" in capsys.readouterr().out


def test_without_benchmarks_the_own_scores_are_written_and_the_way_to_them_is_said(
    checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "own.json"
    assert scoreboard.main([str(checkpoint), "--out", str(out)]) == 0
    assert "make eval-data" in capsys.readouterr().out
    assert "benchmarks" not in json.loads(out.read_text())
    assert scoreboard.main([str(checkpoint), "--out", str(out), "--own-only"]) == 0
    assert "make eval-data" not in capsys.readouterr().out


def test_model_of_hugging_face_is_scored_by_the_same_command(checkpoint, benchmarks, tmp_path):
    from model.export import main as export

    folder = tmp_path / "exported"
    assert export([str(checkpoint), str(folder)]) == 0
    flags = ["--benchmarks", str(benchmarks), "--tasks", "piqa", "openbookqa", "--out", str(tmp_path / "hf.json")]
    assert scoreboard.main([str(folder), *flags]) == 0
    ours = tmp_path / "ours.json"
    assert scoreboard.main([str(checkpoint), *flags[:-1], str(ours)]) == 0
    rows = [json.loads(path.read_text())["benchmarks"]["rows"] for path in (tmp_path / "hf.json", ours)]
    for theirs, own in zip(*rows, strict=True):
        assert {m: s["value"] for m, s in theirs["metrics"].items()} == {
            m: s["value"] for m, s in own["metrics"].items()
        }


def test_two_processes_give_the_scoreboard_of_one(checkpoint, benchmarks, tmp_path):
    tasks = ["--benchmarks", str(benchmarks), "--tasks", "piqa", "openbookqa"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
    ]
    both = [*command, "-m", "eval.scoreboard", str(checkpoint), *tasks, "--out", str(tmp_path / "two.json")]
    result = subprocess.run(both, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("held-out bits per byte") == result.stdout.count("benchmarks, in percent") == 1
    assert scoreboard.main([str(checkpoint), *tasks, "--out", str(tmp_path / "one.json")]) == 0
    one, two = (json.loads((tmp_path / name).read_text())["benchmarks"]["rows"] for name in ("one.json", "two.json"))
    assert one == two
