"""How many tokens each source gives: budgets, weights and epochs, and the cut of a source down to its budget.

A source gives its budget. One that has more is cut: the documents that stay are those with the lowest hash of their
text, so they do not depend on the order of anything, and a smaller budget keeps a part of what a larger one keeps. One
that has less is repeated, up to its cap; where even that is too little the run fails, or the others take up the rest
in proportion to their budgets, as far as their own caps go, and a message says so. What comes out goes into the
manifest; training takes it up with --mixture recipe.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

SHARE_TOLERANCE = 0.001  # how far a share may be off what was planned before a message says so
HIGHEST = np.uint64((1 << 64) - 1)
CHUNK = 1 << 20  # documents that `cut` looks at in one go


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one source gives."""

    tokens: int  # distinct tokens to keep of it
    epochs: float  # how often they are read in one pass over the mixture; 1 or more
    max_epochs: float
    weight: float  # share of the mixture's tokens

    @property
    def given(self) -> float:
        """Tokens of the mixture that come from here, repetitions counted."""
        return self.tokens * self.epochs


@dataclass(frozen=True, kw_only=True)
class Mixture:
    shares: dict[str, Share]
    messages: tuple[str, ...]  # one line each: what differs from what the budgets asked for


def plan_mixture(
    available: Mapping[str, int],
    budgets: Mapping[str, int],
    max_epochs: Mapping[str, float],
    on_short: Literal["fail", "renormalise"],
) -> Mixture:
    """What each source gives, from the tokens it has; all three mappings are by source name.

    on_short: when a source falls short of its budget even when it is repeated as often as its cap allows, "fail"
    raises, "renormalise" lets the others grow in proportion to their budgets; sources without a token are left out.
    Raises ValueError in one line; also for names that differ, a budget below 1 or a cap below 1.
    """
    check_numbers(available, budgets, max_epochs)
    room = {source: available[source] * max_epochs[source] for source in budgets}
    short = [source for source in budgets if room[source] < budgets[source]]
    if short and on_short == "fail":
        raise ValueError(
            f"{'; '.join(shortage(source, available, budgets, max_epochs) for source in short)}; lower the budget, "
            "raise the cap, read more of the source, or let the other sources fill up"
        )
    given = fill(budgets, room)
    if not given:
        raise ValueError(f"no source of the mixture has a token: {', '.join(budgets)}; look at what the rules dropped")
    total = sum(given.values())
    shares = {}
    for source, tokens in given.items():
        distinct = min(available[source], round(tokens))
        shares[source] = Share(
            tokens=distinct, epochs=tokens / distinct, max_epochs=max_epochs[source], weight=tokens / total
        )
    return Mixture(shares=shares, messages=messages(available, budgets, max_epochs, shares, short))


def check_numbers(available: Mapping[str, int], budgets: Mapping[str, int], max_epochs: Mapping[str, float]) -> None:
    if differing := sorted(set(budgets) ^ set(available) | set(budgets) ^ set(max_epochs)):
        raise ValueError(f"source {differing[0]!r} of the mixture lacks its tokens, its budget or its epoch cap")
    for source, budget in budgets.items():
        if budget < 1:
            raise ValueError(f"the budget of {source} is {budget:,} tokens; give at least 1, or leave the source out")
        if not max_epochs[source] >= 1:
            raise ValueError(f"the epoch cap of {source} is {max_epochs[source]:g}; give at least 1")


def fill(budgets: Mapping[str, int], room: Mapping[str, float]) -> dict[str, float]:
    """Tokens by source: the sum of all budgets, split in their proportion as far as each source has room."""
    given: dict[str, float] = {}
    open_sources, left = dict(budgets), float(sum(budgets.values()))
    while open_sources:
        scale = left / sum(open_sources.values())
        full = [source for source, budget in open_sources.items() if budget * scale > room[source]]
        if not full:
            given |= {source: budget * scale for source, budget in open_sources.items()}
            break
        for source in full:
            given[source] = room[source]
            left -= room[source]
            del open_sources[source]
    return {source: given[source] for source in budgets if given[source] >= 1}  # in the order of the budgets


def shortage(
    source: str, available: Mapping[str, int], budgets: Mapping[str, int], max_epochs: Mapping[str, float]
) -> str:
    """ "medqa has 3,000,000 of the 10,000,000,000 tokens of its budget: 3,333.33 epochs, its cap is 4" """
    tokens, budget = available[source], budgets[source]
    epochs = f"{budget / tokens:,.2f} epochs, its cap is {max_epochs[source]:g}" if tokens else "none"
    return f"{source} has {tokens:,} of the {budget:,} tokens of its budget: {epochs}"


def messages(
    available: Mapping[str, int],
    budgets: Mapping[str, int],
    max_epochs: Mapping[str, float],
    shares: Mapping[str, Share],
    short: list[str],
) -> tuple[str, ...]:
    lines, asked = [], sum(budgets.values())
    for source, budget in budgets.items():
        if source not in shares:
            lines.append(f"{source} has no tokens and is left out; its budget was {budget / asked:.2%}")
            continue
        share = shares[source]
        if source in short:
            lines.append(
                f"{shortage(source, available, budgets, max_epochs)}; it gives {share.given:,.0f}, "
                f"{share.weight:.4%} of the mixture instead of {budget / asked:.4%}"
            )
        elif share.given > budget + 1:
            lines.append(
                f"{source} gives {share.given:,.0f} tokens, more than its budget of {budget:,}, for the others"
            )
        if source not in short and share.epochs > 1 + SHARE_TOLERANCE:
            lines.append(
                f"{source} has {share.tokens:,} tokens: repeated {share.epochs:.2f} times (cap {share.max_epochs:g})"
            )
    given = sum(share.given for share in shares.values())
    if given < asked - len(budgets):
        lines.append(f"the mixture has {given:,.0f} tokens, not {asked:,}: every source is at its cap")
    return tuple(lines)


def cut(order: np.ndarray, lengths: np.ndarray, budget: int) -> np.uint64:
    """The threshold below which the documents of one source add up to its budget; keep those with order < threshold.

    order (n,) uint64, a hash of each text; lengths (n,), tokens of each document, at least 1. The sum of what is kept
    is as near to the budget as a whole document allows; at least one document is kept. Documents of equal order stay
    or go together. Needs memory for a few chunks beside its arguments, whatever n is. A budget of everything gives the
    highest uint64, so a document with just that hash would go. Raises ValueError without a document.
    """
    if not len(order):
        raise ValueError("there is no document to cut a budget from")
    per_bucket = np.zeros(1 << 16, np.int64)  # tokens by the top 16 bits of the order
    for begin in range(0, len(order), CHUNK):
        bucket = (order[begin : begin + CHUNK] >> np.uint64(48)).astype(np.int64)
        weights = lengths[begin : begin + CHUNK]
        per_bucket += np.bincount(bucket, weights, minlength=1 << 16).astype(np.int64)
    sums = np.cumsum(per_bucket)
    if sums[-1] <= budget:
        return HIGHEST
    edge = np.uint64(np.searchsorted(sums, budget, side="right"))  # the bucket in which the budget ends
    in_edge = np.concatenate(
        [
            begin + np.flatnonzero(order[begin : begin + CHUNK] >> np.uint64(48) == edge)
            for begin in range(0, len(order), CHUNK)
        ]
    )
    before = int(sums[edge]) - int(per_bucket[edge])
    hashes, first = np.unique(order[in_edge], return_inverse=True)
    ends = before + np.cumsum(np.bincount(first, lengths[in_edge]).astype(np.int64))
    kept = int(np.argmin(np.abs(np.concatenate([[before], ends]) - budget)))  # how many of `hashes`
    if before == 0:
        kept = max(1, kept)
    if kept < len(hashes):
        return hashes[kept]
    return hashes[-1] + np.uint64(hashes[-1] < HIGHEST)


def settle(mixture: Mixture, taken: Mapping[str, int]) -> dict[str, Any]:
    """The manifest's "mixture" and "messages", from the tokens that each source really has after its cut."""
    if missing := [source for source in mixture.shares if not taken.get(source)]:
        raise ValueError(f"source {missing[0]} of the mixture has no tokens after its cut")
    total = sum(taken[source] * share.epochs for source, share in mixture.shares.items())
    entries, lines = {}, list(mixture.messages)
    for source, share in mixture.shares.items():
        weight = taken[source] * share.epochs / total
        entries[source] = {
            "tokens": taken[source], "weight": weight, "epochs": share.epochs, "max_epochs": share.max_epochs
        }  # fmt: skip
        if abs(weight - share.weight) > SHARE_TOLERANCE:
            lines.append(
                f"{source} has {weight:.2%} of the mixture, planned were {share.weight:.2%}: too few documents"
            )
    return {"mixture": entries, "messages": lines}
