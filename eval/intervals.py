"""How sure a score is, and whether two of them differ: every interval and test that our tables show.

All intervals are of 95 %. Shares have Wilson's; a difference of two shares measured apart has Newcombe's, which is
made of Wilson's two; a difference on the same items has McNemar's test and a bootstrap over the items.
"""

import numpy as np
from scipy.stats import binomtest, bootstrap

Z95 = 1.96  # standard errors on each side of a 95 % interval
AHEAD, LEVEL, BEHIND, NOT_COMPARABLE = "ahead", "level", "behind", "not comparable"
RESAMPLES = 9999  # of a bootstrap


def wilson(value, n):
    """Wilson's interval of a share `value` of n items: inside 0 to 1, and not empty where all items are alike."""
    middle, reach = value + Z95**2 / (2 * n), Z95 * np.sqrt(value * (1 - value) / n + (Z95 / (2 * n)) ** 2)
    ends = [float((middle + sign * reach) / (1 + Z95**2 / n)) for sign in (-1, 1)]
    return [max(ends[0], 0.0), min(ends[1], 1.0)]  # which rounding may pass


def share(values):
    """The mean of values between 0 and 1, its standard error (lm-eval's mean_stderr) and 95 % interval (Wilson's).

    One value has neither. Values between 0 and 1 are shared credit; they spread less than 0 and 1 do, so that the
    interval is a little too wide.
    """
    values = np.asarray(values, float)
    n, value = len(values), values.mean()
    if n == 1:
        return {"value": float(value), "stderr": None, "interval": None}
    stderr = float(values.std(ddof=1) / np.sqrt(n))
    return {"value": float(value), "stderr": stderr, "interval": wilson(value, n)}


def ratio(numerators, denominators):
    """sum / sum, its standard error over items by linearisation (survey sampling's ratio estimator), 95 % interval."""
    a, b = np.asarray(numerators, float), np.asarray(denominators, float)
    n, value = len(a), float(a.sum() / b.sum())
    if n == 1:
        return {"value": value, "stderr": None, "interval": None}
    stderr = float(np.sqrt(np.square(a - value * b).sum() * n / (n - 1)) / b.sum())
    return {"value": value, "stderr": stderr, "interval": [value - Z95 * stderr, value + Z95 * stderr]}


def perplexity(nats):
    """exp of the mean loss; its standard error by the delta method, its 95 % interval from that of the mean."""
    loss = ratio(-np.asarray(nats, float), np.ones(len(nats)))
    value = float(np.exp(loss["value"]))
    if loss["stderr"] is None:
        return {"value": value, "stderr": None, "interval": None}
    return {"value": value, "stderr": value * loss["stderr"], "interval": np.exp(loss["interval"]).tolist()}


def difference(value, n, other, other_n):
    """[low, high] of value - other, two shares of n and other_n items that were measured apart.

    Newcombe's hybrid score interval (Statistics in Medicine 17, 1998, method 10). Where both are of the same items,
    as with a published score, it is on the safe side: it cannot know that the same items are easy for both.
    """
    (low, high), (other_low, other_high) = wilson(value, n), wilson(other, other_n)
    gap = value - other
    below = float(np.hypot(value - low, other_high - other))
    above = float(np.hypot(high - value, other - other_low))
    return [gap - below, gap + above]


def verdict_of(interval):
    """Ahead or behind when the interval of a difference leaves 0 out; level when it holds it."""
    low, high = interval
    return AHEAD if low > 0 else BEHIND if high < 0 else LEVEL


def mcnemar(a_right, b_right):
    """McNemar's exact test of two models' right answers (bool, one an item): {"only_a", "only_b", "p"}, two-sided.

    Only the items that one of the two has right count; were the models equally good, each side would be a coin's.
    """
    a, b = np.asarray(a_right, bool), np.asarray(b_right, bool)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    p = float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return {"only_a": only_a, "only_b": only_b, "p": p}


def paired_bootstrap(a, b, seed=0):
    """[low, high] of mean(b - a) over the same items: bias-corrected and accelerated bootstrap of RESAMPLES draws.

    Where every item differs by the same (by nothing, say), that is both ends.
    """
    gaps = np.asarray(b, float) - np.asarray(a, float)
    if np.ptp(gaps) == 0:
        return [float(gaps[0])] * 2
    result = bootstrap((gaps,), np.mean, n_resamples=RESAMPLES, rng=np.random.default_rng(seed), batch=64)
    return [float(end) for end in result.confidence_interval]


def holm(p_values):
    """Holm's adjusted p values: in twenty runs of many tests, one has a test that is below 0.05 by luck alone."""
    order = np.argsort(p_values)
    raised = np.maximum.accumulate(np.asarray(p_values)[order] * (len(order) - np.arange(len(order))))
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(raised, 1.0)
    return adjusted.tolist()
