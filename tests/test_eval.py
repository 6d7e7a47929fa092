"""Scores: every token once, the same at any batch size, chance for a constant model and none for a broken one."""

import gzip
import hashlib
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import bits_per_byte, mean_stderr
from lm_eval.evaluator import evaluate
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from curation.shards import manifest_sha256, write_shard
from curation.tokenizer import load_tokenizer, train_tokenizer
from eval import sample, scoreboard
from eval.harness import HarnessLM, build_tasks, score_choices, windows
from eval.yardsticks import gzip_bits_per_byte, unigram_bits_per_byte
from model.config import ModelConfig
from model.hybrid import HybridLM

WORDS = [
    "the",
    "model",
    "reads",
    "one",
    "token",
    "after",
    "another",
    "and",
    "keeps",
    "what",
    "in",
    "a",
    "small",
    "state",
]


def make_text(seed, n_words):
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(WORDS, n_words)) + "\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished data folder: two held-out sources, twelve four-way items, ten last words."""
    folder = tmp_path_factory.mktemp("data") / "tiny"
    texts = {
        source: [make_text(i * 7 + j, 12 + 20 * j) for j in range(4)] for i, source in enumerate(("code", "prose"))
    }
    train_tokenizer([text for docs in texts.values() for text in docs], 300, folder / "tokenizer.model")
    tokenizer = load_tokenizer(folder)
    splits = {"train": {"sources": {}}, "heldout": {"sources": {}}}
    for split in splits:
        for source, docs in texts.items():
            stem = f"{split}/{source}-00000"
            counts = write_shard(folder / stem, tokenizer.encode_batch(docs), tokenizer.separator_id, np.uint16)
            splits[split]["sources"][source] = {
                "documents": counts.documents,
                "tokens": counts.tokens,
                "text_bytes": sum(len(doc.encode()) for doc in docs),
                "shards": [{"tokens": f"{stem}.npy", "starts": f"{stem}.starts.npy"}],
                "text": f"heldout/{source}.jsonl",
            }
            lines = [json.dumps({"id": f"{source}/{i}", "text": doc}) for i, doc in enumerate(docs)]
            (folder / f"heldout/{source}.jsonl").parent.mkdir(exist_ok=True)
            (folder / f"heldout/{source}.jsonl").write_text("\n".join(lines) + "\n")
    tasks = {
        "continuation": [
            {
                "id": str(i),
                "source": "code",
                "context": make_text(i, 9).strip(),
                "choices": [" " + make_text(50 + 4 * i + j, 5).strip() for j in range(4)],
                "answer": i % 3,
            }
            for i in range(12)
        ],
        "last_word": [
            {"id": str(i), "source": "prose", "context": make_text(i, 9).strip(), "target": " model"}
            for i in range(10)
        ],
    }
    (folder / "tasks").mkdir()
    for task, items in tasks.items():
        (folder / f"tasks/{task}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    sha256 = {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    manifest = {
        "format": 1,
        "tokenizer": {
            "file": "tokenizer.model",
            "sha256": sha256["tokenizer.model"],
            "vocab_size": tokenizer.vocab_size,
            "separator_id": tokenizer.separator_id,
        },
        "token_dtype": "uint16",
        "splits": splits,
        "tasks": {task: {"file": f"tasks/{task}.jsonl", "items": len(items)} for task, items in tasks.items()},
        "files": {
            name: {"bytes": (folder / name).stat().st_size, "sha256": digest} for name, digest in sha256.items()
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def make_model(seed=0):
    """A random model of two layers and a window of 16 tokens, so that every document needs several windows."""
    torch.manual_seed(seed)
    config = ModelConfig(
        d_model=32, layer_pattern="MA", n_heads=2, n_kv_heads=1, d_ff=32, seq_len=16, vocab_size=384,
        d_state=8, mamba_head_dim=16, chunk_size=8,
    )  # fmt: skip
    model = HybridLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)  # far from uniform, so that a mistake shows
    return model.eval()


def make_checkpoint(folder, model):
    """What train.checkpoint.load_checkpoint returns, as far as scoring looks at it."""
    return SimpleNamespace(
        path=folder.parent / "run" / "checkpoints" / "step_0000007",
        step=7,
        tokens=700,
        sha256="5" * 64,
        data={"path": str(folder), "manifest_sha256": manifest_sha256(folder)},
        tokenizer_path=folder / "tokenizer.model",
        load_model=lambda device: model.to(device),
    )


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
    context, continuation = "the model reads", " one token"
    ids = [tokenizer.separator_id, *tokenizer.encode(context + continuation)]
    n = len(ids) - 1 - len(tokenizer.encode(context))
    expected = log_probs(model, ids)[-n:].sum().item()
    [(score, greedy)] = HarnessLM(model, tokenizer, batch_tokens=64).loglikelihood([request(context, continuation)])
    assert score == pytest.approx(expected, rel=1e-6)
    assert greedy is False


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


def test_scores_are_the_same_at_every_batch_size(folder, tokenizer):
    model = make_model()
    documents = scoreboard.read_documents(folder, scoreboard.read_manifest(folder), None)
    one, many = (
        scoreboard.run_lm_eval(HarnessLM(model, tokenizer, batch_tokens=budget), documents) for budget in (1, 10_000)
    )
    for task in one:
        for a, b in zip(one[task], many[task], strict=True):
            assert [a[m] for m in a["metrics"] if m.startswith(("acc", "tie"))] == [
                b[m] for m in b["metrics"] if m.startswith(("acc", "tie"))
            ]
            scores = [
                np.ravel([pair[0] if isinstance(pair, tuple) else pair for pair in x["filtered_resps"]])
                for x in (a, b)
            ]
            np.testing.assert_allclose(*scores, rtol=1e-5)


def test_constant_model_scores_chance_although_the_first_choice_is_always_right(tokenizer):
    model = make_model()
    with torch.no_grad():
        model.head.weight.zero_()
    lm = HarnessLM(model, tokenizer, batch_tokens=64)
    choices = [" 1", " 2", " 3", " 4"]  # as many tokens each
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


def test_model_with_a_nan_is_refused(folder):
    model = make_model()
    with torch.no_grad():
        model.layers[1].mlp.out_proj.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        scoreboard.score_checkpoint(make_checkpoint(folder, model))


def test_written_text_stops_at_the_given_string(tokenizer, monkeypatch):
    ids = tokenizer.encode("one token after another")
    monkeypatch.setattr("eval.harness.generate", lambda *_, **__: iter(ids))
    lm = HarnessLM(make_model(), tokenizer, batch_tokens=64)
    asked = Instance(request_type="generate_until", doc={}, arguments=("the", {"until": [" after"]}), idx=0)
    assert lm.generate_until([asked], disable_tqdm=True) == ["one token"]


def test_scores_hold_every_task_with_errors_yardsticks_and_lm_evals_own_values(folder, tokenizer):
    model = make_model()
    scores = scoreboard.score_checkpoint(make_checkpoint(folder, model))
    assert scores["data"]["is_training_data"] is True
    documents = scoreboard.read_documents(folder, scoreboard.read_manifest(folder), None)
    theirs = evaluate(HarnessLM(model, tokenizer, batch_tokens=8192), build_tasks(documents), bootstrap_iters=0)[
        "results"
    ]
    sources = scores["bits_per_byte"]["sources"]
    assert sorted(sources) == ["code", "prose"]
    for source, row in sources.items():
        assert row["value"] == pytest.approx(theirs[f"heldout_{source}"]["bits_per_byte,none"], rel=1e-9)
        assert row["text_bytes"] == sum(len(doc["text"].encode()) for doc in documents["heldout", source])
        assert row["stderr"] > 0 and row["gzip"] > 0 and row["unigram"] > 0 and row["below_gzip"] is False
    overall = scores["bits_per_byte"]["overall"]
    bits = sum(row["value"] * row["text_bytes"] for row in sources.values())
    assert overall["value"] == pytest.approx(bits / overall["text_bytes"])
    for task, metric in (
        ("continuation", "acc"),
        ("continuation", "acc_norm"),
        ("last_word", "acc"),
        ("last_word", "perplexity"),
    ):
        assert scores["tasks"][task]["metrics"][metric]["value"] == pytest.approx(
            theirs[task][f"{metric},none"], rel=1e-9
        )
    assert scores["tasks"]["continuation"]["chance"]["acc"] == 0.25
    assert (scores["tasks"]["continuation"]["n"], scores["tasks"]["last_word"]["n"]) == (12, 10)


def test_errors_of_means_and_ratios_are_those_of_resampling():
    values = np.random.default_rng(0).random(40)
    assert scoreboard.mean(values)["stderr"] == pytest.approx(mean_stderr(list(values)))
    rng = np.random.default_rng(1)
    n_bytes = rng.integers(100, 5000, 300)
    bits = n_bytes * rng.normal(2.0, 0.3, 300)
    draws = rng.integers(0, 300, (2000, 300))
    resampled = bits[draws].sum(1) / n_bytes[draws].sum(1)
    score = scoreboard.ratio(bits, n_bytes)
    assert score["value"] == pytest.approx(bits_per_byte(list(zip(-bits * math.log(2), n_bytes, strict=True))))
    assert score["stderr"] == pytest.approx(resampled.std(), rel=0.08)  # 2000 draws: 1.6 % of noise, one sigma
    assert scoreboard.mean([1.0])["stderr"] is None and scoreboard.ratio([1.0], [2.0])["stderr"] is None


def test_yardsticks_equal_hand_computed_values():
    texts = ["abc" * 50, "é" * 40]
    expected = 8 * (len(gzip.compress(texts[0].encode(), 9)) + len(gzip.compress(texts[1].encode(), 9))) / (150 + 80)
    assert gzip_bits_per_byte(texts) == expected
    # frequencies 1/2, 1/4, 1/4: 1.5 bits a token, eight tokens, twelve bytes
    assert unigram_bits_per_byte([[1, 1, 2, 3], [1, 1, 3, 2]], 12) == pytest.approx(1.5 * 8 / 12)
    assert unigram_bits_per_byte([[4, 4, 4]], 5) == 0
