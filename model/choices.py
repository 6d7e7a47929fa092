"""Which choice a model takes, from its log-probabilities: lm-eval's rules, but for ties, which are at chance."""

import numpy as np

TIE = 1e-6  # of the best score; float32 sums move by this much with the shape of the batch


def best_choices(scores):
    """Which scores are the largest, as booleans: several where they are too close to be told apart."""
    return scores >= scores.max() - TIE * np.abs(scores).max()


def credit(scores, gold):
    """(what an item is worth, whether several choices were best). Right with k best is 1/k.

    So a model that cannot tell choices apart scores chance. lm-eval takes the first of them, which is 100 % where the
    first is always right.
    """
    best = best_choices(scores)
    return float(best[gold] / best.sum()), best.sum() > 1


def choose(nats, alone, choices, gold):
    """(the choice taken, {metric: credit}).

    acc: the likeliest; acc_norm: the likeliest for each of its characters; acc_uncond, GPT-3's rule: the one that
    gains most on its likelihood after "Answer:" alone (`alone`). tie: whether the first or second rule had several
    best.
    """
    nats = np.array(nats)
    acc, tied = credit(nats, gold)
    acc_norm, tied_norm = credit(nats / [len(choice) for choice in choices], gold)
    metrics = {"acc": acc, "acc_norm": acc_norm, "tie": float(tied or tied_norm)}
    if alone:
        metrics["acc_uncond"], _ = credit(nats - alone, gold)
    return int(best_choices(nats).argmax()), metrics


def mean_scores(items):
    """{"n", the mean of every metric, "perplexity" of whole words} of items, (metrics, nats of each choice) each.

    Items without choices are words: right, or not, and as likely as their nats say.
    """
    values = {"n": len(items)}
    for metric in items[0][0]:
        values[metric] = float(np.mean([metrics[metric] for metrics, _ in items]))
    if "tie" not in values and "acc" in values:
        values["perplexity"] = float(np.exp(-np.mean([nats[0] for _, nats in items])))
    return values
