"""The public benchmarks: lm-eval's own answers, from local files alone, however the work is cut up or interrupted."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from launching import ROOT, free_port
from lm_eval.evaluator import evaluate
from small_benchmarks import make_benchmarks
from small_run import make_data, make_model, make_run

from curation.tokenizer import load_tokenizer
from eval import bench, harness, task_data
from eval.answers import AnswerFile
from eval.harness import run_tasks
from eval.models import OwnModel, load_model
from eval.task_data import BENCHMARKS, check_pins, fetch, load_tasks
from model.export import export
from model.scorer import Scorer
from model.weights import load_checkpoint

SMALL = ["hellaswag", "winogrande", "arc_easy", "truthfulqa_mc1", "humaneval"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return make_benchmarks(tmp_path_factory.mktemp("evals"))


@pytest.fixture(scope="module")
def checkpoint(folder, tmp_path_factory):
    """Of a window that holds every prompt but the longest of MMLU."""
    return make_run(tmp_path_factory.mktemp("run") / "run", folder, make_model(seq_len=640, layer_pattern="MAM"))


@pytest.fixture(scope="module")
def scored(checkpoint, questions, tmp_path_factory):
    """(results, folder) of all benchmarks, in one process."""
    out = tmp_path_factory.mktemp("scored")
    return run_tasks(checkpoint, None, data=questions, device="cpu", limit=2, batch_size=8, out=out), out


def score(model, questions, out, tasks=SMALL, **more):
    return run_tasks(model, tasks, data=questions, device="cpu", out=out, **{"batch_size": 8} | more)


def samples(out, task):
    return [json.loads(line) for line in (out / "samples" / f"{task}.jsonl").read_text().splitlines()]


# ---- the answers


def test_lm_evals_stock_model_gives_the_same_answers_task_by_task(scored, checkpoint, questions, tmp_path):
    pytest.importorskip("accelerate", reason="lm-eval's Hugging Face model needs it")
    from lm_eval.models.huggingface import HFLM

    results, out = scored
    export(load_checkpoint(checkpoint), tmp_path / "hf")
    lm = HFLM(pretrained=str(tmp_path / "hf"), device="cpu", dtype="float32", batch_size=16)
    for name in (name for name in BENCHMARKS if name != "humaneval"):
        # two of MMLU's 57 subjects take lm-eval's model long enough
        tasks = [task for _, task in load_tasks(name, questions)][:2]
        theirs = evaluate(lm, {task.config.task: task for task in tasks}, limit=2, bootstrap_iters=0, log_samples=True)
        n = 0
        for ours in samples(out, name)[: 2 * len(tasks)]:
            subject = next(task for task in tasks if ours["group"] in (None, task.config.dataset_name))
            [sample] = [s for s in theirs["samples"][subject.config.task] if s["doc_id"] == ours["doc_id"]]
            assert ours["dropped_shots"] == 0
            nats = [float(nats) for nats, _ in sample["filtered_resps"]]
            assert ours["loglikelihoods"] == pytest.approx(nats, abs=2e-4)
            metrics = {metric for metric in BENCHMARKS[name]["metrics"] if metric in ("acc", "acc_norm")}
            assert {metric: ours["metrics"][metric] for metric in metrics} == {m: sample[m] for m in metrics}
            assert ours["context"] == sample["arguments"][0][0]
            n += 1
        assert n == 2 * len(tasks)
        if name == "lambada":
            expected = theirs["results"]["lambada_openai"]["perplexity,none"]
            assert results["tasks"]["lambada"]["perplexity"] == pytest.approx(expected, rel=1e-4)


def test_samples_hold_what_the_scoreboard_reads(scored):
    results, out = scored
    assert list(results["tasks"]) == list(BENCHMARKS)
    for name, row in results["tasks"].items():
        lines = samples(out, name)
        assert len(lines) == row["n"] == (114 if name == "mmlu" else 2)
        for sample in lines:
            assert set(sample) == {
                "task", "doc_id", "item_sha256", "group", "shots", "dropped_shots", "choices", "loglikelihoods",
                "unconditional", "bytes", "tokens", "gold", "prediction", "greedy", "generation", "metrics", "context",
            }  # fmt: skip
            n = len(sample["choices"] or sample["loglikelihoods"])
            assert len(sample["loglikelihoods"]) == len(sample["bytes"]) == len(sample["tokens"]) == n
            asked_alone = name in ("arc_easy", "arc_challenge", "openbookqa")
            assert (sample["unconditional"] is not None) == asked_alone == ("acc_uncond" in sample["metrics"])
        assert len({(sample["group"], sample["item_sha256"]) for sample in lines}) == row["n"]
    assert {sample["shots"] for sample in samples(out, "mmlu")} == {5}
    assert len(results["tasks"]["mmlu"]["groups"]) == 57
    [text, _] = [sample["generation"] for sample in samples(out, "humaneval")]
    assert isinstance(text, str) and "\ndef" not in text
    assert results["model"]["parameters"] > 0 and len(results["model"]["sha256"]) == 64
    assert results["forward_tokens"] < 0.6 * results["forward_tokens_hf"]  # with two questions a subject


def test_gpt3s_rule_divides_by_the_likelihood_after_answer_alone(scored, checkpoint):
    _, out = scored
    scorer = Scorer(load_model(checkpoint, device="cpu"))
    for sample in samples(out, "arc_easy"):
        alone = [answer.nats for answer in scorer.loglikelihoods([("Answer:", " " + c) for c in sample["choices"]])]
        assert sample["unconditional"] == pytest.approx(alone, abs=1e-4)
        gains = [nats - other for nats, other in zip(sample["loglikelihoods"], alone, strict=True)]
        assert sample["metrics"]["acc_uncond"] == float(gains.index(max(gains)) == sample["gold"])


def test_every_batch_size_gives_the_same_predictions(checkpoint, questions, tmp_path):
    runs = {}
    for n in (1, 8, 64):
        score(checkpoint, questions, tmp_path / str(n), batch_size=n)
        runs[n] = [
            (sample["prediction"], sample["metrics"], sample["generation"])
            for task in SMALL for sample in samples(tmp_path / str(n), task)
        ]  # fmt: skip
    assert runs[1] == runs[8] == runs[64]


def test_constant_model_scores_chance_on_every_task(folder, questions, tmp_path):
    model = make_model(seq_len=640)
    with torch.no_grad():
        model.head.weight.zero_()
    tasks = [name for name in BENCHMARKS if name not in ("humaneval", "lambada")]
    model = OwnModel(model, load_tokenizer(folder), sha256="0")
    score(model, questions, tmp_path, tasks, limit=2)
    for name in tasks:
        for sample in samples(tmp_path, name):
            # a choice of fewer tokens is likelier; among those of as many, each is as likely as the others
            shortest = [i for i, n in enumerate(sample["tokens"]) if n == min(sample["tokens"])]
            expected = (sample["gold"] in shortest) / len(shortest)
            assert sample["metrics"]["acc"] == pytest.approx(expected), name
    assert {sample["metrics"]["acc"] for sample in samples(tmp_path, "mmlu")} == {0.25}


def test_broken_model_is_refused(folder, questions, tmp_path):
    model = make_model(seq_len=640)
    with torch.no_grad():
        model.layers[1].mlp.out_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        score(OwnModel(model, load_tokenizer(folder), sha256="0"), questions, tmp_path, ["truthfulqa_mc1"])
    assert not (tmp_path / "samples").exists()


def test_prompts_that_do_not_fit_lose_shots_and_are_counted(folder, questions, tmp_path):
    model = OwnModel(make_model(seq_len=330), load_tokenizer(folder), sha256="0")
    results = score(model, questions, tmp_path, ["mmlu"], limit=1)["tasks"]["mmlu"]
    lines = samples(tmp_path, "mmlu")
    assert 0 < results["dropped_shots"] == sum(sample["dropped_shots"] > 0 for sample in lines)
    assert results["n_truncated"] == 0
    for sample in lines:
        assert sample["shots"] + sample["dropped_shots"] == 5
        assert sample["context"].count("Answer:") == sample["shots"] + 1
        assert sample["context"].startswith("The following are multiple choice questions")
        assert len(model.encode(sample["context"] + " A")) <= 331
    fewer = next(sample for sample in lines if sample["dropped_shots"])
    _, task = next(pair for pair in load_tasks("mmlu", questions) if pair[0] == fewer["group"])
    longer = task.fewshot_context(task.eval_docs[0], num_fewshot=fewer["shots"] + 1)
    assert len(model.encode(longer + " A")) > 331


# ---- the files


def test_all_of_it_runs_with_the_network_cut(checkpoint, questions, tmp_path, monkeypatch):
    def refuse(*args, **_):
        raise AssertionError(f"the network was asked for {args}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    results = score(checkpoint, questions, tmp_path, None, limit=1)
    assert [row["n"] for row in results["tasks"].values()] == [57 if name == "mmlu" else 1 for name in BENCHMARKS]
    assert len(results["data"]["sha256"]) == 10 + 2 * 57


def test_files_are_pinned_and_an_altered_one_is_refused(questions, tmp_path, capsys, checkpoint):
    data = tmp_path / "evals"
    assert task_data.main([str(data), "--source", str(questions), "--tasks", "piqa", "boolq"]) == 0
    assert sorted(check_pins(data, ["piqa", "boolq"])) == ["boolq/validation.jsonl", "piqa/validation.jsonl"]
    assert task_data.main([str(data), "--tasks", "piqa", "--check"]) == 0
    file = data / "piqa/validation.jsonl"
    whole = file.read_text()
    file.write_text(whole.replace('"label": 0', '"label": 1'))
    assert refusal(capsys, checkpoint, "--data", data, "--tasks", "piqa", "--out", tmp_path).count("was altered") == 1
    fetch(data, ["piqa"], questions)  # a damaged file is made again
    assert file.read_text() == whole
    (tmp_path / "other/piqa").mkdir(parents=True)
    (tmp_path / "other/piqa/validation.jsonl").write_text(whole + whole)
    file.unlink()
    with pytest.raises(ValueError, match="gives another piqa/validation.jsonl .* than is pinned"):
        fetch(data, ["piqa"], tmp_path / "other")


def test_lm_evals_definitions_are_unchanged_but_for_where_the_rows_are(questions):
    for name in ("hellaswag", "arc_challenge", "mmlu"):
        for (_, task), definition in zip(load_tasks(name, questions), task_data.definitions(name), strict=True):
            config = task.config.to_dict(keep_callable=True)
            for key in ("doc_to_text", "doc_to_target", "doc_to_choice", "output_type", "process_docs", "description"):
                assert config.get(key) == definition.get(key, config.get(key)), (name, key)
            assert {m["metric"] for m in config["metric_list"]} == {m["metric"] for m in definition["metric_list"]}


def refusal(capsys, *flags):
    capsys.readouterr()
    assert harness.main([str(flag) for flag in flags]) == 2
    [error] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return error


def test_what_is_wrong_or_missing_gets_one_line(checkpoint, questions, tmp_path, capsys):
    flags = [checkpoint, "--out", tmp_path / "out"]
    assert "there is no task 'piga'; tasks: hellaswag" in refusal(capsys, *flags, "--tasks", "piga")
    assert "does not exist; `make eval-data" in refusal(capsys, *flags, "--data", tmp_path / "none")
    assert "piqa needs" in refusal(capsys, *flags, "--data", tmp_path, "--tasks", "piqa")
    wrong = refusal(capsys, *flags, "--data", questions, "--tasks", "piqa", "--size", "1.3B")
    assert "parameters, but size 1.3B has" in wrong
    assert "at least 1" in refusal(capsys, *flags, "--data", questions, "--limit", 0)
    missing = refusal(capsys, *flags, "--tasks", "piqa")  # no network here
    assert "not to be had from the Hub" in missing and "without one, SOURCE=FOLDER copies it" in missing
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa/validation.jsonl").write_text("{")
    assert "line 1 is not JSON" in refusal(capsys, *flags, "--data", tmp_path, "--tasks", "piqa")
    assert not (tmp_path / "out/samples").exists()


# ---- cut up and interrupted


def in_process(target, *args):
    """The exit code of a forked process, which has all modules already."""
    process = multiprocessing.get_context("fork").Process(target=target, args=args)
    process.start()
    return process


def one_rank(rank, n_ranks, store, checkpoint, questions, out):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=n_ranks)
    results = score(checkpoint, questions, out, batch_size=1)  # many jobs, so that every rank has some
    (out / f"rank{rank}.json").write_text(json.dumps({k: v for k, v in results.items() if k == "forward_tokens"}))
    dist.barrier()
    os._exit(0)


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_several_processes_give_the_scores_of_one(n_ranks, checkpoint, questions, tmp_path):
    expected = score(checkpoint, questions, tmp_path / "one", batch_size=1)
    out = tmp_path / "many"
    out.mkdir()
    ranks = [
        in_process(one_rank, rank, n_ranks, tmp_path / "store", checkpoint, questions, out) for rank in range(n_ranks)
    ]
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    for task in SMALL:
        assert (out / f"samples/{task}.jsonl").read_bytes() == (tmp_path / f"one/samples/{task}.jsonl").read_bytes()
    counts = {json.loads((out / f"rank{rank}.json").read_text())["forward_tokens"] for rank in range(n_ranks)}
    assert counts == {expected["forward_tokens"]}
    wrote = [path.stat().st_size > 0 for path in out.glob("answers/*/hellaswag-*.jsonl")]
    assert wrote == [True] * n_ranks  # all of them had a part


def test_torchrun_starts_them(checkpoint, questions, tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}",
        "-m", "eval.harness", checkpoint, "--data", questions, "--tasks", "piqa", "--out", tmp_path, "--device", "cpu",
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1
    assert json.loads((tmp_path / "results.json").read_text())["tasks"]["piqa"]["n"] == 4


def killed_after(n, checkpoint, questions, out):
    add, left = AnswerFile.add, [n]

    def add_and_die(self, key, result):
        left[0] -= 1
        if left[0] < 0:
            self.file.write('["torn')
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, key, result)

    AnswerFile.add = add_and_die
    score(checkpoint, questions, out, batch_size=1)


def test_a_killed_run_goes_on_where_it_was(checkpoint, questions, tmp_path, monkeypatch):
    expected = score(checkpoint, questions, tmp_path / "whole", batch_size=1)
    process = in_process(killed_after, 7, checkpoint, questions, tmp_path / "killed")
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    asked = []
    read = OwnModel.read
    monkeypatch.setattr(OwnModel, "read", lambda self, *args, **more: asked.append(1) or read(self, *args, **more))
    results = score(checkpoint, questions, tmp_path / "killed", batch_size=1)
    n_first = len(asked)
    for task in SMALL:
        written = (tmp_path / f"killed/samples/{task}.jsonl").read_bytes()
        assert written == (tmp_path / f"whole/samples/{task}.jsonl").read_bytes()
    assert results["forward_tokens"] == expected["forward_tokens"]
    score(checkpoint, questions, tmp_path / "killed", batch_size=1)
    assert len(asked) == n_first > 0  # all is known now
    score(checkpoint, questions, tmp_path / "fresh", batch_size=1)
    assert len(asked) > 2 * n_first  # what was known was not asked again


def test_another_model_never_finds_the_answers(folder, checkpoint, questions, tmp_path):
    score(checkpoint, questions, tmp_path / "shared", ["piqa"])
    first = samples(tmp_path / "shared", "piqa")
    other = make_run(tmp_path / "other", folder, make_model(seed=1, seq_len=640, layer_pattern="MAM"))
    score(other, questions, tmp_path / "shared", ["piqa"])
    score(other, questions, tmp_path / "alone", ["piqa"])
    assert samples(tmp_path / "shared", "piqa") == samples(tmp_path / "alone", "piqa") != first
    assert len(list(tmp_path.glob("shared/answers/*/model.json"))) == 2


def test_the_contest_with_lm_evals_model_finds_a_different_answer(
    checkpoint, questions, tmp_path, capsys, monkeypatch
):
    pytest.importorskip("accelerate", reason="lm-eval's Hugging Face model needs it")
    flags = [str(checkpoint), "--data", str(questions), "--tasks", "piqa", "lambada", "--device", "cpu"]
    assert bench.main(flags) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["all", "8"] in [line[:2] for line in lines]
    assert [line[:3] for line in lines[-3:]] == [["piqa", "4", "0"], ["lambada", "4", "0"], ["all", "8", "0"]]
    kept = tmp_path / "bench.json"
    assert bench.main([*flags, "--hf-limit", "3", "--json", str(kept)]) == 0
    found = json.loads(kept.read_text())
    assert [(row["items"], row["different"]) for row in found["hf"].values()] == [(3, 0), (3, 0)]
    for name, row in found["hf"].items():  # of four items, three were drawn
        assert row["tokens"] < found["ours"][name]["forward_tokens_hf"]
        assert row["whole_set"] > row["seconds"]
    ask = bench.ask_hf

    def other_way_round(*args):
        answers, *cost = ask(*args)
        return [[(-float(nats), greedy) for nats, greedy in item] for item in answers], *cost

    monkeypatch.setattr(bench, "ask_hf", other_way_round)
    assert bench.main(flags) == 1
