"""The learning rate of each step, and the flags of optimizer and schedule that do not go together."""

import pytest

from train.config import TrainConfig, make_plan
from train.schedule import learning_rate


def plan(**changes):
    config = TrainConfig(**{"size": "tiny", "data": "data/x", "run": "runs/x", "steps": 100, **changes})
    return make_plan(config, vocab_size=500, n_tokens=100_000, world_size=1)


def test_wsd_warms_up_stays_level_and_falls_by_the_square_root():
    p = plan(schedule="wsd", warmup_steps=10, decay_steps=16, lr=1e-3, min_lr=0.1)
    rates = [learning_rate(step, p) for step in range(1, 102)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9:84] == [1e-3] * 75  # steps 10 to 84
    assert rates[84] == pytest.approx(1e-4 + 9e-4 * (1 - 1 / 4))  # 1 of 16 steps done
    assert rates[87] == pytest.approx(1e-4 + 9e-4 * (1 - 2 / 4))  # 4 of 16
    assert rates[99:] == [pytest.approx(1e-4)] * 2
    assert all(a > b for a, b in zip(rates[83:99], rates[84:100], strict=True))


def test_wsd_may_fall_in_a_straight_line():
    p = plan(schedule="wsd", wsd_shape="linear", warmup_steps=10, decay_steps=20, lr=1e-3, min_lr=0.1)
    assert [learning_rate(step, p) for step in (80, 85, 90, 100)] == pytest.approx([1e-3, 7.75e-4, 5.5e-4, 1e-4])
    assert plan(schedule="wsd", wsd_shape="1-sqrt").wsd_shape == "1-sqrt"


def test_wsd_decays_over_the_last_fifth_by_default():
    assert plan(schedule="wsd").decay_steps == 20
    assert plan(schedule="wsd", steps=3).decay_steps == 1
    assert plan().decay_steps is None


def test_wsd_may_go_from_warm_up_straight_to_decay():
    p = plan(schedule="wsd", steps=10, warmup_steps=4, decay_steps=6, lr=1.0, min_lr=0.0)
    assert [learning_rate(step, p) for step in (4, 10)] == [1.0, 0.0]
    assert learning_rate(5, p) < 1.0


def test_muon_takes_the_rate_of_adamw_unless_it_has_its_own():
    assert plan(lr=1e-3).muon_lr is None
    assert plan(lr=1e-3, optimizer="muon").muon_lr == 1e-3
    assert plan(lr=1e-3, optimizer="muon", muon_lr=2e-2).muon_lr == 2e-2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"schedule": "linear"}, "--schedule 'linear' is unknown; choose one of cosine, wsd"),
        ({"decay_steps": 5}, "--decay-steps acts with --schedule wsd alone"),
        ({"wsd_shape": "linear"}, "--wsd-shape acts with --schedule wsd alone"),
        ({"schedule": "wsd", "wsd_shape": "cubic"}, "--wsd-shape 'cubic' is unknown; choose one of 1-sqrt, linear"),
        ({"schedule": "wsd", "decay_steps": 95, "warmup_steps": 10}, "more than the 100 steps"),
        ({"schedule": "wsd", "decay_steps": 0}, "--decay-steps 0 is too small"),
        ({"optimizer": "sgd"}, "--optimizer 'sgd' is unknown; choose one of adamw, adamw8bit, muon"),
        ({"muon_lr": 0.01}, "--muon-lr acts with --optimizer muon alone"),
        ({"muon_momentum": 0.9}, "--muon-momentum acts with --optimizer muon alone"),
        ({"optimizer": "muon", "muon_lr": -1.0}, "--muon-lr -1.0 is out of range"),
        ({"optimizer": "muon", "muon_momentum": 1.0}, "--muon-momentum 1.0 is out of range"),
    ],
)
def test_flags_that_cannot_be_are_refused(flags, words):
    with pytest.raises(ValueError) as caught:
        plan(**flags)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
