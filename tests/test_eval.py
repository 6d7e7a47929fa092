"""Scores: every token once, the same at any batch size, chance for a constant model and none for a broken one."""

import argparse
import gzip
import json
import math
import runpy
import shutil
import sys

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import bits_per_byte, mean_stderr
from lm_eval.evaluator import evaluate
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from small_run import make_data, make_model, make_run, make_text

from curation.shards import file_sha256, read_manifest, write_manifest
from curation.tokenizer import load_tokenizer, train_tokenizer
from eval import bench, contamination, diff, harness, questions, report, sample, scoreboard, task_data
from eval.harness import HarnessLM, build_tasks, score_choices
from eval.yardsticks import gzip_bits_per_byte, unigram_bits_per_byte
from model import bench_decode
from model.scorer import windows
from model.weights import check_device
from train.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture
def checkpoint(folder, tmp_path):
    """The folder of a checkpoint of a random model in a run of its own."""
    return make_run(tmp_path / "run", folder, make_model())


@pytest.fixture(autouse=True)
def no_benchmarks(monkeypatch, tmp_path):
    """The benchmarks' files that a developer has fetched are not scored with."""
    monkeypatch.setattr(scoreboard, "BENCHMARK_DATA", tmp_path / "evals")


def rolling(text):
    return Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)


def request(context, continuation):
    return Instance(request_type="loglikelihood", doc={}, arguments=(context, continuation), idx=0)


@torch.inference_mode()
def log_probs(model, ids):
    """Log-probabilities (len(ids) - 1,) of ids[1:], each after all that come before it: one plain forward pass."""
    logits = model(torch.tensor([ids[:-1]]))[0].double()
    return logits.log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]


def test_rolling_score_of_a_short_text_is_the_full_forward_pass(tokenizer):
    model = make_model()
    text = make_text(3, 5)
    ids = [tokenizer.separator_id, *tokenizer.encode(text)]
    assert len(ids) <= model.config.seq_len
    [score] = HarnessLM(model, tokenizer, batch_tokens=64).loglikelihood_rolling([rolling(text)])
    assert score == pytest.approx(log_probs(model, ids).sum().item(), rel=1e-6)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 32, 33, 100])
def test_windows_predict_every_token_once_as_lm_evals_do(n):
    ids = list(range(100, 101 + n))
    ours = list(windows(ids, 1, 16))
    assert [token for _, targets in ours for token in targets] == ids[1:]
    assert all(len(inputs) <= 16 and ids[ids.index(targets[-1]) - 1] == inputs[-1] for inputs, targets in ours)
    theirs = map(make_disjoint_window, get_rolling_token_windows(ids[1:], ids[0], 16, context_len=1))
    assert ours == [((context + targets)[:-1], targets) for context, targets in theirs]


def test_rolling_score_of_a_long_text_is_the_sum_over_its_windows(tokenizer):
    model = make_model()
    text = make_text(4, 60)
    ids = [tokenizer.separator_id, *tokenizer.encode(text)]
    expected = sum(
        log_probs(model, [*inputs, targets[-1]])[-len(targets) :].sum().item()
        for inputs, targets in windows(ids, 1, 16)
    )
    assert len(ids) > 3 * 16
    [score] = HarnessLM(model, tokenizer, batch_tokens=64).loglikelihood_rolling([rolling(text)])
    assert score == pytest.approx(expected, rel=1e-6)


def test_continuation_score_is_the_sum_after_separator_and_context(tokenizer):
    model = make_model()
    context, continuation = "the model", " reads"
    ids = [tokenizer.separator_id, *tokenizer.encode(context + continuation)]
    n = len(ids) - 1 - len(tokenizer.encode(context))
    assert 1 <= n < len(ids) <= 17
    expected = log_probs(model, ids)[-n:].sum().item()
    [(score, greedy)] = HarnessLM(model, tokenizer, batch_tokens=64).loglikelihood([request(context, continuation)])
    assert score == pytest.approx(expected, rel=1e-6)
    assert greedy is False


def test_tied_and_scaled_logits_are_the_scored_ones(tokenizer):
    model = make_model(tied_embeddings=True, logits_scaling=0.25)
    ids = [tokenizer.separator_id, *tokenizer.encode("the model")]
    [score] = HarnessLM(model, tokenizer, batch_tokens=64).loglikelihood_rolling([rolling("the model")])
    assert score == pytest.approx(log_probs(model, ids).sum().item(), rel=1e-6)


def test_greedy_is_true_for_the_models_own_first_choice(tokenizer):
    model = make_model()
    logits = model(torch.tensor([[tokenizer.separator_id, *tokenizer.encode("the")]]))[0, -1]
    best = logits[: tokenizer.vocab_size].argmax()
    with torch.no_grad():
        model.head.weight[tokenizer.vocab_size :] = 0  # the head's spare rows must not win
    lm = HarnessLM(model, tokenizer, batch_tokens=64)
    [(_, greedy)] = lm._loglikelihood_tokens([(("the", "?"), lm.tok_encode("the"), [int(best)])])
    assert greedy is True


def test_prompt_longer_than_the_window_loses_its_beginning_and_is_counted(tokenizer):
    model = make_model()
    context, continuation = make_text(5, 40).strip(), " state"
    ids = tokenizer.encode(context + continuation)
    n = len(ids) - len(tokenizer.encode(context))
    lm = HarnessLM(model, tokenizer, batch_tokens=64)
    [(score, _)] = lm.loglikelihood([request(context, continuation)])
    assert score == pytest.approx(log_probs(model, ids[-17:])[-n:].sum().item(), rel=1e-6)
    assert lm.n_truncated == 1


def test_scores_are_the_same_at_every_batch_size_with_prompts_of_many_lengths(folder, tokenizer):
    model = make_model()
    documents = scoreboard.read_documents(folder, read_manifest(folder), None)
    one, many = (
        scoreboard.run_lm_eval(HarnessLM(model, tokenizer, batch_tokens=budget), documents) for budget in (1, 10_000)
    )
    for task in one:
        for a, b in zip(one[task], many[task], strict=True):
            assert all(a[metric] == b[metric] for metric in ("acc", "acc_norm", "tie") if metric in a)
            np.testing.assert_allclose(*(np.array(x["filtered_resps"], float) for x in (a, b)), rtol=1e-5)


def test_constant_model_scores_chance_although_the_first_choice_is_always_right(tokenizer):
    model = make_model()
    with torch.no_grad():
        model.head.weight.zero_()
    lm = HarnessLM(model, tokenizer, batch_tokens=64)
    choices = ["1", "2", "3", "4"]  # as many tokens each
    items = [{"id": str(i), "source": "x", "context": "the", "choices": choices, "answer": 0} for i in range(8)]
    samples = scoreboard.run_lm_eval(lm, {("continuation", None): items})
    metrics = scoreboard.score_task("continuation", samples["continuation"])["metrics"]
    assert metrics["acc"]["value"] == metrics["acc_norm"]["value"] == 0.25
    assert metrics["tie"]["value"] == 1.0
    [(score, greedy)] = lm.loglikelihood([request("the", " 1")])
    assert greedy is False
    n_tokens = len(tokenizer.encode("the 1")) - len(tokenizer.encode("the"))
    assert score == pytest.approx(-n_tokens * math.log(model.config.vocab_size))


def test_credit_of_a_tie_is_shared_among_the_best_only():
    doc = {"choices": ["aa", "bb", "cc", "dddd"], "answer": 1}
    results = [(-2.0, False), (-2.0, False), (-3.0, False), (-9.0, False)]
    assert score_choices(doc, results) == {"acc": 0.5, "acc_norm": 0.5, "tie": 1.0}
    assert score_choices({**doc, "answer": 2}, results)["acc"] == 0.0
    # a character of "dddd" costs 2.0 / 4, the least of all
    results = [(-2.5, False), (-1.5, False), (-3.0, False), (-2.0, False)]
    assert score_choices(doc, results) == {"acc": 1.0, "acc_norm": 0.0, "tie": 0.0}


def test_model_with_a_nan_is_refused_in_one_line(folder, tmp_path, capsys):
    model = make_model()
    with torch.no_grad():
        model.layers[1].mlp.out_proj.weight[0, 0] = math.nan
    checkpoint = make_run(tmp_path / "run", folder, model)
    assert scoreboard.main([str(checkpoint)]) == 2
    [error] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "not finite" in error
    assert not (tmp_path / "run" / "eval").exists()


def test_written_text_stops_at_the_given_string(tokenizer, monkeypatch):
    ids = tokenizer.encode("one token after another")
    monkeypatch.setattr("eval.models.OwnModel.write", lambda *_: [ids])
    lm = HarnessLM(make_model(), tokenizer, batch_tokens=64)
    asked = Instance(request_type="generate_until", doc={}, arguments=("the", {"until": [" after"]}), idx=0)
    assert lm.generate_until([asked]) == ["one token"]


def test_scores_hold_every_task_with_errors_yardsticks_and_lm_evals_own_values(checkpoint, folder, tokenizer):
    scores = scoreboard.score_checkpoint(load_checkpoint(checkpoint))
    assert scores["data"]["is_training_data"] is True
    documents = scoreboard.read_documents(folder, read_manifest(folder), None)
    lm = HarnessLM(make_model(), tokenizer, batch_tokens=8192)
    theirs = evaluate(lm, build_tasks(documents), bootstrap_iters=0)["results"]
    sources = scores["bits_per_byte"]["sources"]
    assert sorted(sources) == ["code", "prose"]
    for source, row in sources.items():
        assert row["value"] == pytest.approx(theirs[f"heldout_{source}"]["bits_per_byte,none"], rel=1e-9)
        assert row["text_bytes"] == sum(len(document["text"].encode()) for document in documents["heldout", source])
        assert row["stderr"] > 0 and row["gzip"] > 0 and row["unigram"] > 0
        assert row["below_gzip"] is (row["value"] < row["gzip"])
    overall = scores["bits_per_byte"]["overall"]
    bits = sum(row["value"] * row["text_bytes"] for row in sources.values())
    assert overall["value"] == pytest.approx(bits / overall["text_bytes"])
    for task, metrics in {"continuation": ("acc", "acc_norm", "tie"), "last_word": ("acc", "perplexity")}.items():
        for metric in metrics:
            ours = scores["tasks"][task]["metrics"][metric]["value"]
            assert ours == pytest.approx(theirs[task][f"{metric},none"], rel=1e-9)
    assert scores["tasks"]["continuation"]["chance"]["acc"] == 0.25
    assert (scores["tasks"]["continuation"]["n"], scores["tasks"]["last_word"]["n"]) == (12, 10)


def test_items_are_asked_with_the_space_that_stood_between(folder, tokenizer):
    lm = HarnessLM(make_model(), tokenizer, batch_tokens=8192)
    documents = scoreboard.read_documents(folder, read_manifest(folder), None)
    samples = scoreboard.run_lm_eval(lm, documents)
    item = documents["continuation", None][0]
    assert samples["continuation"][0]["arguments"] == [(item["context"], " " + choice) for choice in item["choices"]]
    item = documents["last_word", None][0]
    assert samples["last_word"][0]["arguments"] == [(item["context"], " " + item["target"])]


def test_errors_of_means_and_ratios_are_those_of_resampling():
    values = np.random.default_rng(0).random(40)
    assert scoreboard.share(values)["stderr"] == pytest.approx(mean_stderr(list(values)))
    rng = np.random.default_rng(1)
    n_bytes = rng.integers(100, 5000, 300)
    bits = n_bytes * rng.normal(2.0, 0.3, 300)
    draws = rng.integers(0, 300, (2000, 300))
    resampled = bits[draws].sum(1) / n_bytes[draws].sum(1)
    score = scoreboard.ratio(bits, n_bytes)
    assert score["value"] == pytest.approx(bits_per_byte(list(zip(-bits * math.log(2), n_bytes, strict=True))))
    assert score["stderr"] == pytest.approx(resampled.std(), rel=0.08)  # 2000 draws: 1.6 % of noise, one sigma
    nothing = {"stderr": None, "interval": None}
    assert scoreboard.share([1.0]) == {"value": 1.0, **nothing}
    assert scoreboard.ratio([1.0], [2.0]) == {"value": 0.5, **nothing}
    assert scoreboard.perplexity([-math.log(8)]) == {"value": pytest.approx(8), **nothing}


def test_intervals_of_accuracies_stay_between_0_and_1_and_say_something_at_the_ends():
    # Wilson's interval of 0 of 100 is 0 to z^2 / (n + z^2), and of 50 of 100 it is 0.5 -+ 0.0962
    assert scoreboard.share([0.0] * 100)["interval"] == pytest.approx([0, 1.96**2 / (100 + 1.96**2)])
    assert scoreboard.share([0.0, 1.0] * 50)["interval"] == pytest.approx([0.4038, 0.5962], abs=1e-4)
    low, high = scoreboard.share([1.0] * 20)["interval"]
    assert 0.8 < low < high == pytest.approx(1)
    low, high = scoreboard.perplexity([-1.0, -9.0, -12.0])["interval"]
    assert 0 < low < math.exp(22 / 3) < high


def test_yardsticks_equal_hand_computed_values():
    texts = [make_text(1, 400), "é" * 40]
    sizes = [len(gzip.compress(text.encode(), 9)) for text in texts]
    assert sizes[0] < len(gzip.compress(texts[0].encode(), 1))
    assert gzip_bits_per_byte(texts) == 8 * sum(sizes) / (len(texts[0]) + 80)
    # frequencies 1/2, 1/4, 1/4: 1.5 bits a token, eight tokens, twelve bytes
    assert unigram_bits_per_byte([[1, 1, 2, 3], [1, 1, 3, 2]], 12) == pytest.approx(1.5 * 8 / 12)
    assert unigram_bits_per_byte([[4, 4, 4]], 5) == 0


def test_scoreboard_writes_its_file_into_the_run_and_says_how_it_stands_to_gzip(checkpoint, capsys):
    assert scoreboard.main([str(checkpoint)]) == 0
    out = capsys.readouterr().out
    scores = json.loads((checkpoint.parents[1] / "eval" / "step_0000007.json").read_text())
    assert scores["checkpoint"]["sha256"] == file_sha256(checkpoint / "checkpoint.json")
    assert scoreboard.verdict(scores["bits_per_byte"]["overall"]) in " ".join(out.split())
    assert "continuation" in out and "prose" in out
    assert [path.name for path in (checkpoint.parents[1] / "eval").iterdir()] == ["step_0000007.json"]


def test_verdict_says_below_or_not_below_gzip():
    row = {"value": 2.5, "stderr": 0.02, "gzip": 2.4, "unigram": 3.0, "below_gzip": False}
    assert scoreboard.verdict(row) == "Held-out bits per byte: 2.500 ± 0.020, NOT below gzip -9 (2.400); unigram 3.000"
    assert "2.300 ± 0.020, below gzip -9" in scoreboard.verdict({**row, "value": 2.3, "below_gzip": True})


def test_limited_scores_do_not_replace_the_full_ones(checkpoint):
    assert scoreboard.main([str(checkpoint), "--limit", "2"]) == 0
    [path] = (checkpoint.parents[1] / "eval").iterdir()
    assert path.name == "step_0000007.limit2.json"
    assert json.loads(path.read_text())["tasks"]["continuation"]["n"] == 2


def refusal(capsys, *flags):
    assert scoreboard.main([str(flag) for flag in flags]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
    return error


def test_what_is_not_a_checkpoint_or_not_its_data_gets_one_line(checkpoint, folder, tmp_path, capsys):
    assert "does not exist" in refusal(capsys, tmp_path / "nothing")
    assert "not a checkpoint" in refusal(capsys, folder)
    assert f"data folder {tmp_path / 'none'} does not exist" in refusal(
        capsys, checkpoint, "--data", tmp_path / "none"
    )
    assert "at least 1" in refusal(capsys, checkpoint, "--limit", 0)
    assert refusal(capsys, checkpoint.parents[1]).endswith(f"it has no checkpoint.json; give {checkpoint}")
    shutil.copytree(checkpoint, tmp_path / "elsewhere")
    assert "--out" in refusal(capsys, tmp_path / "elsewhere")


def test_data_that_was_altered_remade_or_tokenized_otherwise_is_refused(folder, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    checkpoint = make_run(tmp_path / "run", data, make_model())
    text = (data / "heldout/code.jsonl").read_text()
    (data / "heldout/code.jsonl").write_text(text.replace("model", "nodel"))
    assert "heldout/code.jsonl was altered" in refusal(capsys, checkpoint)
    (data / "heldout/code.jsonl").write_text(text)
    manifest = read_manifest(data)
    write_manifest(data, {**manifest, "created_utc": "later"})
    assert f"add: --data {data}" in refusal(capsys, checkpoint)
    assert scoreboard.main([str(checkpoint), "--data", str(data)]) == 0
    scores = json.loads((tmp_path / "run/eval/step_0000007.json").read_text())
    assert scores["data"]["is_training_data"] is False
    capsys.readouterr()
    train_tokenizer([make_text(1, 500)], 290, data / "tokenizer.model")
    manifest["tokenizer"]["sha256"] = file_sha256(data / "tokenizer.model")
    write_manifest(data, manifest)
    assert "another tokenizer" in refusal(capsys, checkpoint, "--data", data)


def test_data_that_holds_nothing_out_is_refused_before_the_model_is_loaded(folder, tmp_path, monkeypatch, capsys):
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    manifest = read_manifest(data)
    manifest["splits"]["heldout"] = {"documents": 0, "tokens": 0, "text_bytes": 0, "sources": {}}
    write_manifest(data, manifest)
    checkpoint = make_run(tmp_path / "run", data, make_model())
    monkeypatch.setattr(scoreboard, "HarnessLM", lambda *_, **__: pytest.fail("loaded all the same"))
    assert f"data folder {data} holds nothing out" in refusal(capsys, checkpoint)


def test_sample_goes_on_to_the_separator_and_no_further(folder, tokenizer, tmp_path, monkeypatch, capsys):
    model = make_model()
    checkpoint = make_run(tmp_path / "run", folder, model)
    given = []

    def write(model, prompt_ids, max_tokens, *, stop_ids, decoder, **settings):
        given.append((prompt_ids, max_tokens, stop_ids, settings))
        yield from tokenizer.encode(" state")

    monkeypatch.setattr(sample, "generate", write)
    assert sample.main([str(checkpoint), "--prompt", "the small", "--max-tokens", "50", "--top-k", "3"]) == 0
    assert given[0][0] == [tokenizer.separator_id, *tokenizer.encode("the small")]
    assert given[0][1:3] == (50, (tokenizer.separator_id,))
    assert given[0][3] == {
        "temperature": 0.8,
        "top_p": 0.95,
        "top_k": 3,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "seed": 0,
        "vocab_size": tokenizer.vocab_size,
    }
    assert "the small state" in capsys.readouterr().out
    [written] = json.loads((tmp_path / "run/eval/sample_0000007.json").read_text())["samples"]
    assert written["text"] == " state" and written["ended"] is True


def test_sample_of_a_real_model_is_the_same_for_the_same_seed(checkpoint, capsys):
    texts = []
    for seed in (1, 1, 2):
        assert sample.main([str(checkpoint), "--max-tokens", "12", "--seed", str(seed)]) == 0
        texts.append(json.loads((checkpoint.parents[1] / "eval/sample_0000007.json").read_text())["samples"])
    texts = [[(written["prompt"], written["text"]) for written in samples] for samples in texts]
    assert texts[0] == texts[1] != texts[2]
    assert [prompt for prompt, _ in texts[0]] == list(sample.PROMPTS)
    assert sample.main([str(checkpoint), "--top-p", "0"]) == 2
    assert "top_p 0.0" in capsys.readouterr().err


# ---- wrong input, by every command


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (harness, ["CKPT", "--out", "FILE"]),
        (sample, ["CKPT", "--out", "FILE/x.json"]),
        (diff, ["a", "b", "--out", "FILE/x.json"]),
        (contamination, ["data", "evals", "--out", "FILE/x.json"]),
        (questions, ["--tokenizer", "data", "--seq-len", "16", "--out", "FILE/x.json"]),
        (task_data, ["FILE", "--source", "evals"]),
        (bench, ["CKPT", "--json", "FILE/x.json"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_place_that_cannot_be_written_gets_one_line(command, flags, checkpoint, tmp_path, capsys):
    (tmp_path / "file").touch()
    places = {"CKPT": str(checkpoint), "FILE": str(tmp_path / "file")}
    for name, place in places.items():
        flags = [flag.replace(name, place) for flag in flags]
    assert command.main(flags) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: cannot write {tmp_path}/file/") and error.endswith(
        "is not a folder; give another place"
    )


@pytest.mark.parametrize(
    ("device", "n_gpus", "said"),
    [
        ("cuda", 0, "--device cuda: no GPU here; leave it out"),
        ("cuda:2", 2, "--device cuda:2: the last GPU here is cuda:1"),
        ("gpu", 2, "--device gpu is unknown; give cpu, cuda or cuda:1"),
        ("meta", 2, "--device meta is unknown"),
    ],
)
def test_device_that_is_not_here_is_refused(device, n_gpus, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: n_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    with pytest.raises(ValueError, match=f"^{said}"):
        check_device(device)
    check_device("cpu")


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (harness, ["CKPT", "--out", "scores"]),
        (sample, ["CKPT"]),
        (scoreboard, ["CKPT", "--own-only"]),
        (bench, ["CKPT"]),
        (bench_decode, []),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_unknown_device_gets_one_line(command, flags, checkpoint, capsys):
    flags = [flag.replace("CKPT", str(checkpoint)) for flag in flags]
    assert command.main([*flags, "--device", "gpu"]) == 2
    assert capsys.readouterr().err == "error: --device gpu is unknown; give cpu, cuda or cuda:1\n"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (harness, "run the same command to go on"),
        (scoreboard, "run the same command again; the benchmarks' answers so far are kept"),
        (sample, "run the same command to start again"),
        (report, "run the same command to start again"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_ctrl_c_ends_a_command_with_one_line(command, said, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", interrupt)
    monkeypatch.setattr("eval.command.leave", sys.exit)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(command.__file__, run_name="__main__")
    assert (end.value.code, capsys.readouterr().err) == (130, f"interrupted; {said}\n")
