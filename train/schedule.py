"""The learning rate of each step."""

import math


def learning_rate(step, plan):
    """The rate for step `step`, counted from 1: linear warm-up to plan.lr, then down to plan.min_lr.

    Half a cosine; or, where plan.decay_steps is set, plan.lr until so many steps before the end and then one minus the
    square root of the part done (wsd, arXiv:2404.06395; the shape, which beat linear, arXiv:2405.18392, section 4), or
    one minus the part done where plan.wsd_shape is "linear".
    The last step, plan.steps, has plan.min_lr; steps after it keep it.
    """
    if step <= plan.warmup_steps:
        return plan.lr * step / plan.warmup_steps
    if plan.decay_steps is not None:
        done = min(1.0, max(0, step - (plan.steps - plan.decay_steps)) / plan.decay_steps)
        fallen = done if plan.wsd_shape == "linear" else math.sqrt(done)
        return plan.min_lr + (plan.lr - plan.min_lr) * (1 - fallen)
    done = min(1.0, (step - plan.warmup_steps) / (plan.steps - plan.warmup_steps))
    return plan.min_lr + (plan.lr - plan.min_lr) * (1 + math.cos(math.pi * done)) / 2
