"""The learning rate of each step."""

import math


def learning_rate(step, plan):
    """The rate for step `step`, counted from 1: linear warm-up to plan.lr, then half a cosine down to plan.min_lr.

    The last step, plan.steps, has exactly plan.min_lr; steps after it keep it.
    """
    if step <= plan.warmup_steps:
        return plan.lr * step / plan.warmup_steps
    done = min(1.0, (step - plan.warmup_steps) / (plan.steps - plan.warmup_steps))
    return plan.min_lr + (plan.lr - plan.min_lr) * (1 + math.cos(math.pi * done)) / 2
