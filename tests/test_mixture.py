"""Budgets by token: what is cut, what is repeated, what fails and what is filled up; and the cut by hash."""

import numpy as np
import pytest

from curation.mixture import cut, plan_mixture, settle
from train.mixture import read_mixture

BILLION = 10**9


def mixed(available, budgets, caps=None, on_short="fail"):
    return plan_mixture(available, budgets, caps or dict.fromkeys(budgets, 1), on_short)


def test_a_source_with_more_than_its_budget_gives_exactly_the_budget():
    mixture = mixed({"web": 90, "code": 1000}, {"web": 60, "code": 40})
    assert {name: (share.tokens, share.epochs, share.weight) for name, share in mixture.shares.items()} == {
        "web": (60, 1.0, 0.6),
        "code": (40, 1.0, 0.4),
    }
    assert mixture.messages == ()


def test_a_short_source_is_repeated_within_its_cap_and_that_is_said():
    mixture = mixed({"wiki": 3_500, "web": 99_000}, {"wiki": 4_000, "web": 96_000}, {"wiki": 2, "web": 1})
    wiki = mixture.shares["wiki"]
    assert (wiki.tokens, round(wiki.epochs, 4), wiki.weight) == (3_500, 1.1429, 0.04)
    assert mixture.messages == ("wiki has 3,500 tokens: repeated 1.14 times (cap 2)",)


def test_a_source_below_its_cap_fails_in_one_line_that_names_it():
    with pytest.raises(
        ValueError, match=r"^medqa has 3,000,000 of the 10,000,000,000 .* 3,333.33 epochs, its cap is 4"
    ) as e:
        mixed(
            {"web": 91 * BILLION, "medqa": 3_000_000},
            {"web": 90 * BILLION, "medqa": 10 * BILLION},
            {"web": 1, "medqa": 4},
        )
    assert "\n" not in str(e.value)


def test_renormalised_the_others_take_the_rest_in_proportion():
    mixture = mixed(
        {"a": 100, "b": 10_000, "c": 10_000},
        {"a": 1_000, "b": 600, "c": 300},
        {"a": 2, "b": 1, "c": 1},
        "renormalise",
    )
    assert {name: share.tokens for name, share in mixture.shares.items()} == {"a": 100, "b": 1_133, "c": 567}
    assert mixture.shares["a"].epochs == 2
    assert sum(share.weight for share in mixture.shares.values()) == pytest.approx(1)
    assert mixture.shares["b"].weight / mixture.shares["c"].weight == pytest.approx(2)
    assert len(mixture.messages) == 3 and "instead of 52.6316%" in mixture.messages[0]


def test_a_source_that_fills_up_stops_at_its_own_cap_and_a_smaller_total_is_said():
    mixture = mixed({"a": 100, "b": 1_000}, {"a": 1_000, "b": 1_000}, {"a": 1, "b": 1.5}, "renormalise")
    assert [(share.tokens, share.epochs) for share in mixture.shares.values()] == [(100, 1), (1_000, 1.5)]
    assert mixture.messages[-1] == "the mixture has 1,600 tokens, not 2,000: every source is at its cap"


def test_a_source_without_tokens_is_left_out_or_fails():
    mixture = mixed({"a": 0, "b": 500}, {"a": 100, "b": 100}, on_short="renormalise")
    assert list(mixture.shares) == ["b"] and mixture.shares["b"].tokens == 200
    with pytest.raises(ValueError, match="^a has 0 of the 100 tokens of its budget: none"):
        mixed({"a": 0, "b": 500}, {"a": 100, "b": 100})
    with pytest.raises(ValueError, match="no source of the mixture has a token"):
        mixed({"a": 0}, {"a": 100}, on_short="renormalise")


@pytest.mark.parametrize(
    "available, budgets, caps, words",
    [
        ({"a": 1}, {"a": 1, "b": 1}, {"a": 1, "b": 1}, "source 'b' of the mixture lacks"),
        ({"a": 1}, {"a": 0}, {"a": 1}, "budget of a is 0"),
        ({"a": 1}, {"a": 1}, {"a": 0.5}, "cap of a is 0.5"),
    ],
)
def test_numbers_that_cannot_be_are_refused(available, budgets, caps, words):
    with pytest.raises(ValueError, match=words):
        plan_mixture(available, budgets, caps, "fail")


# ---- the cut


def documents(n, seed=0):
    random = np.random.default_rng(seed)
    return random.integers(0, 1 << 64, n, dtype=np.uint64), random.integers(1, 5_000, n)


@pytest.mark.parametrize("share", [0.001, 0.3, 0.77, 0.9999])
def test_cut_meets_the_budget_within_one_document(share):
    order, lengths = documents(50_000)
    budget = int(lengths.sum() * share)
    kept = order < cut(order, lengths, budget)
    assert abs(int(lengths[kept].sum()) - budget) <= 2_500  # half the longest


def test_cut_does_not_depend_on_the_order_and_a_smaller_one_is_part_of_a_larger():
    order, lengths = documents(10_000)
    shuffle = np.random.default_rng(1).permutation(10_000)
    assert cut(order, lengths, 10**7) == cut(order[shuffle], lengths[shuffle], 10**7)
    assert cut(order, lengths, 10**7) < cut(order, lengths, 2 * 10**7)


def test_cut_agrees_with_sorting_and_adding_up_on_hashes_of_any_spread():
    random = np.random.default_rng(2)
    for bits in (4, 16, 40, 64):
        order = random.integers(0, 1 << 64, 300, dtype=np.uint64) >> np.uint64(64 - bits)
        lengths = random.integers(1, 50, 300)
        for budget in (1, 100, 3_000, int(lengths.sum()) - 1):
            sums = [int(lengths[order <= value].sum()) for value in np.unique(order)]
            best = min(abs(kept - budget) for kept in sums)
            assert abs(int(lengths[order < cut(order, lengths, budget)].sum()) - budget) == best


def test_cut_keeps_everything_when_the_budget_is_enough_and_something_always():
    order, lengths = documents(100)
    assert (order < cut(order, lengths, int(lengths.sum()))).all()
    assert (order < cut(order, lengths, 1)).sum() == 1
    with pytest.raises(ValueError, match="no document"):
        cut(order[:0], lengths[:0], 5)


def test_shares_of_a_cut_mixture_are_within_a_thousandth_of_the_budgets():
    budgets = {"web": 20_000_000, "code": 8_000_000, "wiki": 4_000_000}
    sources = {name: documents(15_000, seed) for seed, name in enumerate(budgets)}
    mixture = mixed({name: int(lengths.sum()) for name, (_, lengths) in sources.items()}, budgets)
    taken = {
        name: int(lengths[order < cut(order, lengths, mixture.shares[name].tokens)].sum())
        for name, (order, lengths) in sources.items()
    }
    settled = settle(mixture, taken)
    for name, budget in budgets.items():
        assert abs(settled["mixture"][name]["weight"] / (budget / 32_000_000) - 1) < 0.001
    assert settled["messages"] == []


def test_a_share_that_the_documents_cannot_give_is_said():
    mixture = mixed({"a": 1_000, "b": 1_000}, {"a": 500, "b": 500})
    assert settle(mixture, {"a": 400, "b": 500})["messages"] == [
        "a has 44.44% of the mixture, planned were 50.00%: too few documents",
        "b has 55.56% of the mixture, planned were 50.00%: too few documents",
    ]
    with pytest.raises(ValueError, match="source b of the mixture has no tokens"):
        settle(mixture, {"a": 400})


def test_training_takes_up_the_mixture_of_the_manifest():
    mixture = mixed({"wiki": 3_500, "web": 99_000}, {"wiki": 4_000, "web": 96_000}, {"wiki": 2, "web": 1})
    settled = settle(mixture, {"wiki": 3_500, "web": 96_000})
    read = read_mixture("recipe", None, settled)
    assert (read.sources, read.weights, read.max_epochs) == (("web", "wiki"), (960_000, 40_000), (1.001, 2.002))
