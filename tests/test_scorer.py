"""Scores of texts that share beginnings: those of reading each alone, with far fewer tokens read."""

import math
import random
from functools import partial

import pytest
import torch
from small_run import make_data, make_model, make_run, make_text

from curation.tokenizer import load_tokenizer
from eval.models import HFModel, OwnModel, load_model
from model.export import export
from model.generate import generate
from model.scorer import Scorer, batches, build_tree, cut_into_jobs, owners, windows
from model.weights import load_checkpoint

LAYERS = {"hybrid": "MAM", "attention": "AA", "mamba": "MM"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def own_model(tokenizer, **change):
    return OwnModel(make_model(**{"seq_len": 128} | change), tokenizer)


def questions(n=12):
    """Requests that share, from the top: nothing, few-shot examples, a question, and the beginning of a choice."""
    requests = []
    for group in range(3):
        shots = "".join(make_text(f"{group} {i}", 5) + "\n\n" for i in range(2))
        for i in range(n):
            context = f"{shots}Question: {make_text(f'{group} question {i}', 3 + i % 4)}\nAnswer:"
            requests += [(context, f" {letter}") for letter in "ABCD"]
            start = make_text(f"{group} choice {i}", 4)
            requests += [(context, f" {start} {make_text(f'{group} {i} {j}', j)}") for j in range(1, 4)]
            requests += [(context, f" {start}")]  # ends where others go on
    return requests


@torch.inference_mode()
def read_alone(model, ids, n):
    """(nats, greedy) of the last n of ids, in one plain forward pass of a HybridLM."""
    scores = model(torch.tensor([ids[:-1]]))[0, -n:].double().log_softmax(-1)
    targets = torch.tensor(ids[-n:])
    return scores.gather(-1, targets[:, None]).sum().item(), bool((scores.argmax(-1) == targets).all())


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_shared_beginnings_are_read_once_and_score_as_if_read_alone(layers, batch_size, tokenizer):
    model = own_model(tokenizer, layer_pattern=LAYERS[layers])
    scorer, requests = Scorer(model, batch_size=batch_size), questions()
    answers = scorer.loglikelihoods(requests)
    for (context, continuation), answer in zip(requests, answers, strict=True):
        before, after = scorer.encode_pair(context, continuation)
        nats, greedy = read_alone(model.model, before + after, len(after))
        assert answer.nats == pytest.approx(nats, abs=1e-4)  # of float32 sums in another order
        assert (answer.greedy, answer.n_tokens) == (greedy, len(after))
    assert scorer.forward_tokens < 0.3 * scorer.forward_tokens_hf


@pytest.mark.parametrize("change", [{"layer_pattern": "MAM"}, {"positions": "alibi"}, {"positions": "none"},
                                    {"qk_norm": True, "attention_gate": True, "chunk_size": 4}])  # fmt: skip
@torch.inference_mode()
def test_rows_of_different_lengths_leave_what_each_leaves_alone(change):
    model = make_model(**{"seq_len": 64} | change)
    tokens = torch.arange(3 * 29).mul(7).remainder(384).view(3, 29)
    first, second, rest = torch.tensor([11, 1, 6]), torch.tensor([2, 9, 13]), 5
    state = None
    for lengths, start in ((first, 0 * first), (second, first)):
        index = start[:, None] + torch.arange(lengths.max())
        state = model.going_on(state, lengths)
        model.hidden(tokens.gather(1, index), state=state)
    index = (first + second)[:, None] + torch.arange(rest)
    hidden = model.hidden(tokens.gather(1, index), state=model.going_on(model.take_rows(state, [0, 1, 2])))
    for row, n in enumerate((first + second).tolist()):
        alone = model.hidden(tokens[row : row + 1, : n + rest])
        torch.testing.assert_close(hidden[row], alone[0, n:], atol=2e-5, rtol=1e-5)  # of float32 sums in another order


def test_every_batch_size_gives_the_same_choices(tokenizer):
    model, requests = own_model(tokenizer), questions()
    scores = {n: [a.nats for a in Scorer(model, batch_size=n).loglikelihoods(requests)] for n in (1, 8, 64)}
    taken = {n: [max(range(4), key=nats[i : i + 4].__getitem__) for i in range(0, len(nats), 4)]
             for n, nats in scores.items()}  # fmt: skip
    assert taken[1] == taken[8] == taken[64]
    assert scores[8] == pytest.approx(scores[1], abs=1e-4)
    assert scores[64] == pytest.approx(scores[1], abs=1e-4)


def test_tree_holds_every_score_once_and_no_stretch_twice():
    draw = random.Random(0)
    for share in (False, True):
        pieces = []
        for _ in range(200):
            stem = [draw.randint(0, 2)] * 20  # one of three
            inputs = (stem + [draw.randint(0, 1) for _ in range(8)])[: draw.randint(1, 28)]
            pieces.append((inputs, [draw.randint(0, 9) for _ in range(draw.randint(1, len(inputs)))]))
        starts = [sum(len(targets) for _, targets in pieces[:i]) for i in range(len(pieces))]
        nodes = build_tree(pieces, starts, share)
        found = {}

        def walk(nodes, before, found):
            for node in nodes:
                for place, target, slot in node.scored:
                    assert slot not in found
                    found[slot] = before + node.tokens[: place + 1], target
                walk(node.children, before + node.tokens, found)

        walk(nodes, [], found)
        for (inputs, targets), start in zip(pieces, starts, strict=True):
            for i, target in enumerate(targets):
                assert found[start + i] == (inputs[: len(inputs) - len(targets) + i + 1], target)
        assert len(found) == sum(len(targets) for _, targets in pieces)
        n_tokens = sum(node.n_tokens for node in nodes)
        texts = {tuple(inputs) for inputs, _ in pieces}
        longest = [text for text in texts if not any(text == other[: len(text)] for other in texts - {text})]
        assert n_tokens < 0.6 * sum(map(len, longest)) if share else n_tokens == sum(map(len, longest))
        for batch_size in (1, 4):
            into_batches = partial(batches, batch_size=batch_size, max_positions=64, max_scored=64, ragged=True)
            jobs = cut_into_jobs(nodes, batch_size, into_batches)
            slots = [slot for job in jobs for slot in job.slots]
            assert sorted(slots) == list(range(len(found)))


def test_a_stretch_is_read_once_only_where_that_pays():
    many = [([1, 2, 3, 4, 5, *range(i, i + 9)], [0]) for i in range(100, 140)]  # 5 of 14: 35 %
    few = [([1, 2, 3, 4, 5, *range(i, i + 90)], [0]) for i in range(1000, 1900, 100)]  # 5 of 95
    [node] = build_tree(many, list(range(40)), True)
    assert (node.tokens, len(node.children)) == ([1, 2, 3, 4, 5], 40)
    assert [len(node.tokens) for node in build_tree(few, list(range(9)), True)] == [95] * 9


def test_jobs_are_the_same_however_many_processes_share_them():
    pieces = [([1, 2, 3, 4, 5, i, i], [9]) for i in range(40)]
    jobs = list(
        cut_into_jobs(build_tree(pieces, list(range(40)), True), 3, lambda part: batches(part, 3, 1000, 1000, True))
    )
    assert len(jobs) == 14 and all(job.trunk for job in jobs)
    assert len({job.sha256 for job in jobs}) == 14
    for n_ranks in (1, 2, 3, 20):
        ranks = owners(jobs, n_ranks)
        assert ranks == sorted(ranks) and set(ranks) <= set(range(n_ranks))  # neighbours share their trunk
    assert [owners(jobs, 2).count(rank) for rank in (0, 1)] == [7, 7]


def test_context_and_continuation_are_parted_by_lm_evals_rule(tokenizer):
    from lm_eval.api.model import TemplateLM

    class Theirs(TemplateLM):
        eot_token_id = tokenizer.separator_id
        loglikelihood_rolling = generate_until = None

        def tok_encode(self, string, add_special_tokens=None, **_):
            ids = tokenizer.encode(string)
            return ids if add_special_tokens is False else [tokenizer.separator_id, *ids]

        def _loglikelihood_tokens(self, requests, **_):
            return [tuple(ids) for _, *ids in requests]

    from lm_eval.api.instance import Instance

    paragraphs = "\n\n".join(["The model, 1", "reads é2 ", " one. ", "token 3"])
    pairs = [("the model", " reads"), ("the  ", "model"), ("", "a model"), ("x\n\n", "\n\ny"), (paragraphs, "4 5"),
             (paragraphs + "\n\n", " a")]  # fmt: skip
    theirs = Theirs().loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs], disable_tqdm=True)
    ours = Scorer(own_model(tokenizer))
    assert [tuple(ours.encode_pair(*pair)) for pair in pairs] == [tuple(ids) for ids in theirs]


def test_text_beyond_the_window_loses_its_beginning_and_is_counted(tokenizer):
    model = own_model(tokenizer, seq_len=16)
    scorer, context = Scorer(model), make_text(5, 40)
    before, after = scorer.encode_pair(context, " state")
    [answer] = scorer.loglikelihoods([(context, " state")])
    nats, _ = read_alone(model.model, (before + after)[-17:], len(after))
    assert answer.nats == pytest.approx(nats, rel=1e-5)
    assert scorer.n_truncated == 1


def test_continuation_longer_than_the_window_is_scored_whole_in_several(tokenizer):
    model = own_model(tokenizer, seq_len=16)
    scorer, request = Scorer(model), ("the", make_text(6, 60))
    before, after = scorer.encode_pair(*request)
    assert len(after) > 32
    [short, answer] = scorer.loglikelihoods([("the", " model"), request])
    nats = [read_alone(model.model, [*inputs, targets[-1]], len(targets))[0]
            for inputs, targets in windows(before + after, len(before), 16)]  # fmt: skip
    assert answer.nats == pytest.approx(sum(nats), rel=1e-5) and answer.n_tokens == len(after)
    assert short.nats == pytest.approx(Scorer(model).loglikelihoods([("the", " model")])[0].nats, rel=1e-5)
    assert scorer.n_truncated == 1


def test_a_score_that_is_not_finite_is_an_error_wherever_it_arises(tokenizer):
    model = make_model(seq_len=128)
    with torch.no_grad():
        model.layers[0].mixer.out_proj.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        Scorer(OwnModel(model, tokenizer)).loglikelihoods(questions(2))


def test_the_head_is_in_float32_under_a_bfloat16_network(tokenizer):
    model = own_model(tokenizer)
    head = model.model.head_weight.detach().clone()
    half = OwnModel(model.model, tokenizer, dtype="bfloat16")
    features, _ = half.read([[1, 2, 3]], None, [1, 2], keep=False)
    logits = half.logits(features)
    assert logits.dtype == torch.float32 and logits.shape == (2, 384)
    hidden = half.model.hidden(torch.tensor([[1, 2, 3]]))
    assert hidden.dtype == torch.bfloat16
    torch.testing.assert_close(logits, hidden[0, 1:].float() @ head.T)


def test_written_text_is_greedy_and_ends_at_the_given_string(tokenizer):
    model = own_model(tokenizer)
    prompts = ["the model", "one", "", "after another small state"]
    expected = []
    for prompt in prompts:
        ids = list(generate(model.model, model.encode(prompt), 12, temperature=0, stop_ids=(model.prefix_id,),
                            vocab_size=tokenizer.vocab_size))  # fmt: skip
        expected.append(tokenizer.decode(ids))
    for batch_size in (1, 4):
        scorer = Scorer(model, batch_size=batch_size)
        assert scorer.generate_until([(prompt, {"max_gen_toks": 12}) for prompt in prompts]) == expected
    stop = expected[0][3:5]
    [text] = Scorer(model).generate_until([(prompts[0], {"until": [stop], "max_gen_toks": 12})])
    assert text == expected[0][: expected[0].find(stop)]


@pytest.mark.parametrize(
    ("change", "kind"),
    [({"layer_pattern": "MM", "d_ff": 0}, HFModel), ({"attention_gate": True}, OwnModel),
     ({"tied_embeddings": True, "logits_scaling": 0.25}, HFModel)],
    ids=["Mamba2ForCausalLM", "own code", "scaled logits"],
)  # fmt: skip
def test_every_kind_of_export_scores_as_its_checkpoint(change, kind, folder, tmp_path):
    checkpoint = make_run(tmp_path / "run", folder, make_model(seq_len=128, **change))
    export(load_checkpoint(checkpoint), tmp_path / "hf")
    (tmp_path / "hf/modeling_braid.py").write_text("raise SystemExit('code that lay beside weights was run')")
    ours, theirs = load_model(checkpoint, device="cpu"), load_model(tmp_path / "hf", device="cpu")
    assert type(theirs) is kind and theirs.shares and ours.sha256 != theirs.sha256
    requests = questions(2)
    for one, other in zip(*(Scorer(model).loglikelihoods(requests) for model in (ours, theirs)), strict=True):
        assert (one.greedy, one.n_tokens) == (other.greedy, other.n_tokens)
        assert one.nats == pytest.approx(other.nats, abs=1e-4)


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory):
    """(our checkpoint, the folder that it was exported to)"""
    path = tmp_path_factory.mktemp("exported")
    checkpoint = make_run(path / "run", folder, make_model(seq_len=128, layer_pattern="MAM"))
    export(load_checkpoint(checkpoint), path / "hf")
    return checkpoint, path / "hf"


def test_a_transformers_model_shares_its_cache_and_scores_as_ours_does(exported):
    ours, theirs = (load_model(path, device="cpu") for path in exported)
    assert isinstance(ours, OwnModel) and isinstance(theirs, HFModel)
    assert theirs.shares and theirs.seq_len == 128
    requests = questions(3)
    scorers = [Scorer(model, batch_size=8) for model in (ours, theirs)]
    answers = [scorer.loglikelihoods(requests) for scorer in scorers]
    for one, other in zip(*answers, strict=True):
        assert (one.greedy, one.n_tokens) == (other.greedy, other.n_tokens)
        assert one.nats == pytest.approx(other.nats, abs=1e-4)
    assert scorers[0].forward_tokens == scorers[1].forward_tokens
    prompts = [ours.encode("a"), ours.encode("the model reads")]
    assert ours.write(prompts, [4, 6], ()) == theirs.write(prompts, [4, 6], ())


def test_a_cache_that_does_not_continue_exactly_is_not_used(exported, monkeypatch):
    _, path = exported
    monkeypatch.setattr(HFModel, "take", lambda self, state, rows: None)  # as one that forgets
    model = load_model(path, device="cpu")
    assert not model.shares
    requests = questions(2)
    scorer = Scorer(model)
    answers = scorer.loglikelihoods(requests)
    monkeypatch.undo()
    sharing = Scorer(load_model(path, device="cpu"))
    for one, other in zip(answers, sharing.loglikelihoods(requests), strict=True):
        assert one.nats == pytest.approx(other.nats, abs=1e-4)
    assert (
        sharing.forward_tokens < scorer.forward_tokens < scorer.forward_tokens_hf
    )  # an end of others is part of them


def test_what_is_no_model_or_of_another_size_gets_one_line(exported, tmp_path):
    checkpoint, path = exported
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/config.json").write_text("{}")
    for spec, size, message in (
        (tmp_path / "none", None, "does not exist; give"),
        (tmp_path, None, "neither a checkpoint of ours"),
        (tmp_path / "bare", None, "cannot be scored: .* to a fast one.$"),  # all that transformers says
        (checkpoint, "1.3B", "parameters, but size 1.3B has"),
        (checkpoint.parents[1], None, f"it has no checkpoint.json; give {checkpoint}"),
        (path, "nano", "parameters, but size nano has"),
        (checkpoint, "9B", "unknown size '9B'; choose one of"),
    ):
        with pytest.raises((FileNotFoundError, ValueError), match=message) as error:
            load_model(spec, device="cpu", size=size)
        assert "\n" not in str(error.value)
