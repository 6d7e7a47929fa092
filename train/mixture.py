"""Which source gives which sample: weights and epoch caps by source, and where a sample's tokens begin.

    --mixture "code=0.5,docs=0.3,web=0.2" --max-epochs "code=4"
    --mixture recipe                                                what the data folder was curated for

Each source is cut into sequences of its own, so that no sample crosses from one source into another, and is shuffled
anew each epoch. The sample at a position is a function of (seed, mixture, position) alone (train/order.py); the order
within a source depends on (seed, source, epoch), and not on the weights. Needs no torch.
"""

from dataclasses import dataclass
from zlib import crc32

import numpy as np

from curation.shards import TokenStream
from train.order import deal, dealt, shuffled

RECIPE = "recipe"  # in the place of weights: those of the data folder's manifest
CAP_SLACK = 1.001  # a run over all of a source draws whole sequences by rounded weights
PARTS = 1_000_000  # weights are whole parts of a million, so that a share is exact arithmetic


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Sources by name, the order of a TokenStream that was opened with them."""

    sources: tuple[str, ...]
    weights: tuple[int, ...]  # in parts of a million
    max_epochs: tuple[float | None, ...]  # None: as often as it takes
    given_total: float  # what the weights added up to as they were given

    def describe(self, epochs):
        """One line: each source's share and its `epochs`, and whether the weights were normalised."""
        rows = zip(self.sources, self.weights, epochs, strict=True)
        shares = ", ".join(f"{source} {weight / PARTS:.2%} ({n:.2f} epochs)" for source, weight, n in rows)
        if abs(self.given_total - 1) < 1e-6:
            return f"mixture: {shares}"
        return f"mixture: {shares}; the weights given add up to {self.given_total:g} and were normalised"


def read_mixture(mixture: str | None, max_epochs: str | None = None, manifest: dict | None = None) -> Mixture | None:
    """The flags --mixture and --max-epochs as a Mixture; None without a mixture. ValueError in one line.

    manifest: of the data folder; --mixture recipe takes the weights and epoch caps that it was curated for.
    """
    if mixture is None:
        if max_epochs is not None:
            raise ValueError(f"--max-epochs {max_epochs!r} needs --mixture, which names the sources and their weights")
        return None
    given, caps = _pairs("--mixture", mixture) if mixture != RECIPE else {}, _pairs("--max-epochs", max_epochs or "")
    if mixture == RECIPE:
        entries = (manifest or {}).get("mixture")
        if not entries:
            raise ValueError("--mixture recipe: the data was curated without token budgets; give source=weight pairs")
        given = {source: entry["weight"] for source, entry in entries.items()}
        caps = {source: entry["max_epochs"] * CAP_SLACK for source, entry in entries.items()} | caps
    if not given:
        raise ValueError("--mixture is empty; expected source=weight pairs such as code=0.5,docs=0.5")
    if unknown := sorted(caps.keys() - given.keys()):
        raise ValueError(f"--max-epochs names {unknown[0]!r}, which is not in --mixture; it has: {', '.join(given)}")
    sources, total = tuple(sorted(given)), sum(given.values())
    return Mixture(
        sources=sources,
        weights=tuple(max(1, round(given[source] / total * PARTS)) for source in sources),
        max_epochs=tuple(caps.get(source) for source in sources),
        given_total=total,
    )


def _pairs(flag, text):
    """ "code=0.5,docs=0.5" -> {"code": 0.5, "docs": 0.5}"""
    pairs = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        source, _, number = pair.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if not source or not 0 < value < float("inf"):
            raise ValueError(f"{flag} {pair!r} is not a pair source=number with a number above 0, such as code=0.5")
        if source in pairs:
            raise ValueError(f"{flag} names {source!r} twice")
        pairs[source] = value
    return pairs


def source_sequences(stream: TokenStream, seq_len):
    """Whole sequences in an epoch of each source; one token more than seq_len is needed for the last target."""
    return (np.diff(stream.source_edges) - 1) // seq_len


def check_epochs(mixture: Mixture, stream: TokenStream, seq_len, seed, n_samples):
    """How many epochs of each source the first n_samples take; ValueError where that is more than its cap."""
    available = source_sequences(stream, seq_len)
    if (available < 1).any():
        short = stream.sources[int(np.argmin(available))]
        raise ValueError(f"source {short!r} of --mixture does not fill one sequence of {seq_len} tokens; leave it out")
    drawn = dealt(n_samples, mixture.weights, seed)
    for source, draws, n, cap in zip(mixture.sources, drawn, available, mixture.max_epochs, strict=True):
        if cap is not None and draws > cap * n:
            raise ValueError(
                f"--mixture takes {draws:,} sequences of {source}, {draws / n:.2f} epochs of its {n:,}, but its cap "
                f"--max-epochs is {cap:g}; lower its share to {cap * n / n_samples:.4f} or train on at most "
                f"{int(n_samples * cap * n / draws) * seq_len:,} tokens"
            )
    return drawn / available


def mixture_starts(places, mixture: Mixture, stream: TokenStream, seq_len, seed):
    """Where in the stream the samples at these places (ints, 0 or more) begin, as int64 of the same shape."""
    available = source_sequences(stream, seq_len)
    sources, draws = deal(places, mixture.weights, seed)
    starts = np.empty_like(sources)
    for number in np.unique(sources):
        n, key = int(available[number]), crc32(stream.sources[number].encode()) << 32
        epochs, within = np.divmod(draws, n)
        for epoch in np.unique(epochs[sources == number]):
            chosen = (sources == number) & (epochs == epoch)
            index = shuffled(within[chosen], n, key ^ ((seed << 20) + int(epoch)))
            starts[chosen] = stream.source_edges[number] + index * seq_len
    return starts
