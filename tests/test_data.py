"""Mixtures of sources: exact shares, every token of an epoch once, any position at once; and fast reading of rows."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from small_data import finish_folder
from test_train import config, plan

from curation.shards import open_stream
from curation.tokenizer import load_tokenizer
from train.bench_data import make_sparse_folder, start_up_alone
from train.checkpoint import delete_old
from train.data import n_sequences, read_rows, read_sequences, sequence_indices, training_batches
from train.mixture import PARTS, check_epochs, mixture_starts, read_mixture, source_sequences
from train.order import deal, dealt
from train.run_dir import RunDir, heldout_losses, note_best, read_json
from train.training_data import open_training_data
from train.validate import heldout_loss

WEIGHTS = {
    "two": [500_000, 500_000],
    "three": [500_000, 300_000, 200_000],
    "skewed": [1, 999_000, 999],
    "many": [round(PARTS * (i + 1) / 528) for i in range(32)],
}
FIRST_DEALT = [0, 2, 0, 1, 0, 2, 0, 1]  # an order is a promise to runs under way


# ---- dealing places to sources


def test_mixture_of_the_recipe_comes_from_the_manifest():
    entries = {"web": {"weight": 0.75, "max_epochs": 1}, "wiki": {"weight": 0.25, "max_epochs": 2}}
    read = read_mixture("recipe", None, {"mixture": entries})
    assert (read.sources, read.weights) == (("web", "wiki"), (PARTS * 3 // 4, PARTS // 4))
    assert read.max_epochs == pytest.approx((1.001, 2.002))
    assert read_mixture("recipe", "wiki=4", {"mixture": entries}).max_epochs[1] == 4
    with pytest.raises(ValueError, match="curated without token budgets"):
        read_mixture("recipe", None, {"mixture": {}})


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_shares_hold_to_a_thousandth_in_any_window_of_ten_thousand(weights):
    source, _ = deal(np.arange(200_000), weights, 7)
    share = np.array(weights) / sum(weights)
    for number in range(len(weights)):
        so_far = np.concatenate([[0], np.cumsum(source == number)])
        in_window = so_far[10_000:] - so_far[:-10_000]
        assert abs(in_window - 10_000 * share[number]).max() <= 10


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_draws_of_a_source_are_numbered_without_a_gap(weights):
    source, draw = deal(np.arange(50_001), weights, 3)
    for number, count in enumerate(dealt(50_001, weights, 3)):
        assert draw[source == number].tolist() == list(range(count))


def test_any_place_is_dealt_at_once_as_in_the_whole_row():
    whole = deal(np.arange(1000), WEIGHTS["three"], 5)
    for place in (0, 7, 8, 500, 999):
        assert [int(a[0]) for a in deal(np.array([place]), WEIGHTS["three"], 5)] == [int(a[place]) for a in whole]
    far_off = 10**12  # sequences: more than any run
    near = deal(np.arange(far_off, far_off + 10_000), WEIGHTS["three"], 5)
    assert abs(np.bincount(near[0]) - [5000, 3000, 2000]).max() <= 10
    assert whole[0][:8].tolist() == FIRST_DEALT


def test_equal_weights_do_not_give_each_process_its_own_source():
    source, _ = deal(np.arange(10_000), WEIGHTS["two"], 1)
    assert 0.4 < source[::2].mean() < 0.6


# ---- samples of a mixture


def starts_of(data, text, n, seq_len=16, seed=1):
    mixture = read_mixture(text)
    stream = open_stream(data, "train", mixture.sources)
    return stream, mixture_starts(np.arange(n), mixture, stream, seq_len, seed)


def test_every_sequence_of_an_epoch_of_a_source_comes_once_and_none_crosses_sources(data):
    stream, starts = starts_of(data, "one=0.7,two=0.3", 40_000)
    edge = int(stream.source_edges[1])
    epochs_seen = []
    for first, last in pairwise(stream.source_edges.tolist()):
        mine = starts[(starts >= first) & (starts < last)]
        n = (last - first - 1) // 16
        whole_epochs = mine[: len(mine) // n * n].reshape(-1, n)
        assert (np.sort(whole_epochs) == first + 16 * np.arange(n)).all()
        assert (mine + 17 <= last).all()
        epochs_seen.append(len(whole_epochs))
    assert min(epochs_seen) > 1
    assert not ((starts < edge) & (starts + 17 > edge)).any()


def test_order_within_a_source_does_not_depend_on_the_weights(data):
    stream, even = starts_of(data, "one=1,two=1", 4000)
    _, skewed = starts_of(data, "one=3,two=1", 4000)
    edge = stream.source_edges[1]
    a, b = even[even >= edge], skewed[skewed >= edge]
    n = min(len(a), len(b))
    assert a[:n].tolist() == b[:n].tolist()


@pytest.mark.parametrize(("world_size", "micro_batch"), [(2, 2), (4, 1)])
def test_mixed_batches_are_the_same_for_every_number_of_processes_and_from_any_step(data, world_size, micro_batch):
    mixture = read_mixture("one=0.5,two=0.5")
    stream = open_stream(data, "train", mixture.sources)

    def step_tokens(world_size, micro_batch, first_step):
        p = plan(world_size=world_size, micro_batch=micro_batch, batch_tokens=8 * 64, steps=30)
        ranks = [
            training_batches(stream, p, 3, rank, world_size, first_step, "cpu", mixture) for rank in range(world_size)
        ]
        rows = [next(batches).tokens for _ in range(p.grad_accum) for batches in ranks]
        return [row.tolist() for part in rows for row in part]

    for first_step in (1, 1_000_000):
        assert step_tokens(world_size, micro_batch, first_step) == step_tokens(1, 8, first_step)


def test_without_a_mixture_batches_are_read_in_the_order_of_sequence_indices(data):
    stream, p = open_stream(data, "train"), plan(micro_batch=8, batch_tokens=8 * 64, steps=30)
    batch = next(training_batches(stream, p, 3, 0, 1, 5, "cpu"))
    indices = sequence_indices(5, n_sequences(stream, 64), p, 3, 0, 1)[0]
    assert batch.tokens.equal(read_sequences(stream, indices, 64, "cpu").tokens)
    assert [row.tolist() for row in batch.tokens] == [stream.read(64 * int(i), 64)[0].tolist() for i in indices]


@pytest.mark.parametrize(
    ("mixture", "max_epochs", "words"),
    [
        ("one", None, "--mixture 'one' is not a pair source=number"),
        ("one=0", None, "with a number above 0"),
        ("one=nan", None, "with a number above 0"),
        ("one=1,one=2", None, "--mixture names 'one' twice"),
        ("", None, "--mixture is empty"),
        (None, "one=2", "--max-epochs 'one=2' needs --mixture"),
        ("one=1", "two=2", "--max-epochs names 'two', which is not in --mixture; it has: one"),
    ],
)
def test_mixtures_that_cannot_be_are_refused(mixture, max_epochs, words):
    with pytest.raises(ValueError) as caught:
        read_mixture(mixture, max_epochs)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_are_normalised_and_that_is_said():
    mixture = read_mixture("b=3, a=1")
    assert (mixture.sources, mixture.weights) == (("a", "b"), (250_000, 750_000))
    said = mixture.describe([0.5, 2.0])
    assert said == (
        "mixture: a 25.00% (0.50 epochs), b 75.00% (2.00 epochs); "
        "the weights given add up to 4 and were normalised"
    )  # fmt: skip
    assert "normalised" not in read_mixture("a=0.1,b=0.2,c=0.7").describe([1, 1, 1])


def test_a_cap_is_exact_and_its_refusal_names_the_numbers(data):
    stream = open_stream(data, "train")
    n = int(source_sequences(stream, 16)[0])
    text, seed = "one=0.5,two=0.5", 9
    mixture = read_mixture(text, "one=1")
    draws = np.array([dealt(samples, mixture.weights, seed)[0] for samples in range(2 * n - 20, 2 * n + 20)])
    most = 2 * n - 20 + int((draws <= n).nonzero()[0][-1])
    assert check_epochs(mixture, stream, 16, seed, most)[0] <= 1
    with pytest.raises(ValueError, match=f"of one, 2.00 epochs of its {n:,}, but its cap --max-epochs is 1; lower"):
        check_epochs(mixture, stream, 16, seed, 4 * n)
    with pytest.raises(ValueError, match="'one' of --mixture does not fill one sequence of 1000000 tokens"):
        check_epochs(mixture, stream, 10**6, seed, 10)


def test_a_source_that_the_data_lacks_is_refused(data):
    with pytest.raises(ValueError, match="has no source 'three'; it has: one, two"):
        open_stream(data, "train", read_mixture("one=1,three=1").sources)


# ---- reading


def test_rows_read_at_once_are_the_rows_read_alone(data):
    stream = open_stream(data, "train")
    edge = int(stream.edges[1])
    starts = [0, 5, edge - 30, edge - 1, edge, stream.n_tokens - 40]  # some across the edge of two shards
    tokens = stream.read_rows(starts, 40)
    document_ids = stream.document_ids(tokens)
    whole = np.concatenate(stream.shards)
    for row, ids, start in zip(tokens, document_ids, starts, strict=True):
        assert row.tolist() == whole[start : start + 40].tolist()
        begins = (row == stream.separator_id).cumsum()
        assert ids.tolist() == (begins - begins[0]).tolist()
    batch = read_rows(stream, starts, 39, "cpu")
    assert batch.targets.tolist() == tokens[:, 1:].tolist()


@pytest.mark.parametrize("mixture", [None, "books=0.2,code=0.5,web=0.3"])
def test_a_hundred_billion_tokens_open_in_a_second_and_little_memory_at_any_position(tmp_path, mixture):
    make_sparse_folder(tmp_path / "sparse", 10**11, 10**8)
    found = start_up_alone(tmp_path / "sparse", mixture, 10**7)
    assert found["open_s"] < 1
    assert found["peak_mib"] < 100


# ---- the best checkpoint


def run_with(path, heldout):
    """A run's folder with an empty checkpoint for each step of `heldout`: {step: held-out loss, or None}."""
    run_dir = RunDir(path)
    rows = [{"step": step, "loss": 1.0} | ({"heldout_loss": x} if x else {}) for step, x in heldout.items()]
    path.mkdir(exist_ok=True)
    run_dir.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in heldout:
        run_dir.checkpoint(step).mkdir(parents=True)
    return run_dir


def names(run_dir):
    return [int(path.name.removeprefix("step_")) for path in run_dir.checkpoints()]


def test_the_best_checkpoint_stays_beside_the_last_ones(tmp_path):
    run_dir = run_with(tmp_path / "run", {10: 3.0, 20: 2.0, 30: None, 40: 2.5, 50: 2.2, 60: float("nan")})
    delete_old(run_dir, 2, heldout_losses(run_dir))
    assert names(run_dir) == [20, 50, 60]
    assert read_json(run_dir.best) == {"checkpoint": "step_0000020", "heldout_loss": 2.0}
    delete_old(run_dir, 1, heldout_losses(run_dir))
    assert names(run_dir) == [20, 60]


def test_a_better_one_takes_its_place_and_the_earlier_goes(tmp_path):
    run_dir = run_with(tmp_path / "run", {10: 2.0, 20: 3.0, 30: 1.5, 40: 1.8})
    delete_old(run_dir, 1, heldout_losses(run_dir))
    assert names(run_dir) == [30, 40]
    assert read_json(run_dir.best)["checkpoint"] == "step_0000030"


def test_a_best_beyond_the_step_that_a_run_goes_on_from_is_forgotten(tmp_path):
    run_dir = run_with(tmp_path / "run", {10: 3.0, 20: 2.0})
    assert note_best(run_dir, heldout_losses(run_dir)) == "step_0000020"
    run_dir.metrics.write_text(json.dumps({"step": 10, "loss": 1.0, "heldout_loss": 3.0}) + "\n")  # as cut_metrics
    assert note_best(run_dir, heldout_losses(run_dir)) == "step_0000010"
    run_dir.metrics.write_text("")
    assert note_best(run_dir, heldout_losses(run_dir)) is None
    assert not run_dir.best.exists()


# ---- held-out text


def held_out(data, folder, heldout):
    """A data folder with the tokenizer of another and {source: held-out texts}."""
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes((data / "tokenizer.model").read_bytes())
    tokenizer = load_tokenizer(folder)
    return finish_folder(folder, tokenizer, {"train": {"one": ["text enough " * 1000]}, "heldout": heldout})


@pytest.mark.parametrize("texts", [{}, {"one": []}, {"one": ["a b c"], "two": []}])
def test_held_out_text_that_fills_no_sequence_is_refused_before_the_run(data, tmp_path, texts):
    folder = str(held_out(data, tmp_path / "data", texts))
    open_training_data(config(data=folder, eval_every=0), 0, 1, verify=False).check(plan())
    opened = open_training_data(config(data=folder, eval_every=5), 0, 1, verify=False)
    with pytest.raises(ValueError, match="no held-out source of .* fills a sequence of 64 tokens; set --eval-every 0"):
        opened.check(plan())


def test_a_source_with_nothing_held_out_is_left_out_of_the_loss(data, tmp_path, monkeypatch):
    class Engine:
        device = "cpu"
        eval = train = staticmethod(lambda: None)

        def __call__(self, tokens, targets, document_ids):
            return torch.tensor(2.0)

    folder = held_out(data, tmp_path / "data", {"one": [], "two": ["enough to fill a sequence " * 50]})
    for name, value in (("get_rank", 0), ("get_world_size", 1), ("all_reduce", None)):
        monkeypatch.setattr(f"torch.distributed.{name}", lambda *args, value=value: value)
    measured = heldout_loss(Engine(), folder, plan(), 0)
    assert measured["heldout_loss"] == pytest.approx(2.0)
    assert measured["heldout_bits_per_byte_by_source"].keys() == {"two"}
