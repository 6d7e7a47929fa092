"""A small quality classifier: trained on pages that people have labelled, applied as a rule.

    python -m curation.quality train --labelled pages.jsonl.zst --label-column quality_label --out quality.npz
    python -m curation.quality show quality.npz

The model is a logistic regression over a page's words, signs of punctuation and pairs of them, hashed to N_FEATURES
weights, which is what fastText's supervised mode amounts to. The same labels give the same bytes on the same kind of
processor; fastText's own training does not: the pinned build stops at random with "Encountered NaN". A classifier
that somebody else trained with fastText is applied as it is (`Quality(model_file="theirs.bin", label="hq",
minimum=0.02)`).

Some of the labelled texts, chosen by a hash of the text, are never trained on: precision and recall are measured on
them and stand in the model file.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from curation.decontaminate import read_rows
from curation.dedup import mixed, text_digest
from curation.fasttext_model import MAGIC as FASTTEXT_MAGIC
from curation.fasttext_model import load_fasttext
from curation.shards import new_file
from curation.words import words_of

FORMAT = 1
FEATURE_BITS = 18
N_FEATURES = 1 << FEATURE_BITS
MAX_WORDS = 4000  # of a text, signs of punctuation included, that are looked at
PAIR = 0x9E3779B97F4A7C15  # makes a pair of hashes one, in order
EPOCHS = 10
BATCH = 64  # texts for each step of training
RATE = 0.5  # AdaGrad's
DECAY = 1e-4  # L2
THRESHOLDS = tuple(i / 20 for i in range(1, 20))

Features = tuple[np.ndarray, np.ndarray]


def features_of(text: str) -> Features:
    """The features of a text, (n,) int64 below N_FEATURES, each once, and their values, (n,) float64, of length 1."""
    words = words_of(text).hashes[:MAX_WORDS]
    hashes = mixed(np.concatenate([words, words[:-1] * np.uint64(PAIR) + words[1:] + np.uint64(1)]))
    features, counts = np.unique((hashes >> np.uint64(64 - FEATURE_BITS)).astype(np.int64), return_counts=True)
    values = np.log1p(counts)
    return features, values / max(np.sqrt((values**2).sum()), 1e-12)


# ---- training


def train(features: Sequence[Features], labels: np.ndarray) -> tuple[np.ndarray, float]:
    """(weights (N_FEATURES,) float32, bias) of a logistic regression; labels (n,), 1 for good texts, 0 for others."""
    weights, squares = np.zeros(N_FEATURES), np.full(N_FEATURES, 1e-6)
    bias, bias_squares = 0.0, 1e-6
    for epoch in range(EPOCHS):
        order = np.random.default_rng(epoch).permutation(len(features))
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            which = np.concatenate([features[i][0] for i in chosen])
            values = np.concatenate([features[i][1] for i in chosen])
            owner = np.repeat(np.arange(len(chosen)), [len(features[i][0]) for i in chosen])
            scores = sigmoid(np.bincount(owner, values * weights[which], len(chosen)) + bias)
            errors = scores - labels[chosen]
            touched, place = np.unique(which, return_inverse=True)
            gradient = np.bincount(place, values * errors[owner]) / len(chosen) + DECAY * weights[touched]
            squares[touched] += gradient**2
            weights[touched] -= RATE * gradient / np.sqrt(squares[touched])
            bias_squares += errors.mean() ** 2
            bias -= RATE * errors.mean() / np.sqrt(bias_squares)
    return weights.astype(np.float32), float(bias)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-np.clip(x, -500, 500)))


def score_of(weights: np.ndarray, bias: float, features: Features) -> float:
    return float(sigmoid(weights[features[0]] @ features[1] + bias))


def evaluate(scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """How well scores (n,) tell good texts (label 1) from others (0).

    "auc": the probability that a good text scores higher than another; "thresholds": at each, the precision, recall
    and F1 of calling good what reaches it, with the numbers they are made of.
    """
    good, other = np.sort(scores[labels == 1]), np.sort(scores[labels == 0])
    pairs = (np.searchsorted(other, good, "left") + np.searchsorted(other, good, "right")).sum() / 2
    table = []
    for threshold in THRESHOLDS:
        called = scores >= threshold
        true_good, false_good = int((called & (labels == 1)).sum()), int((called & (labels == 0)).sum())
        missed = int((~called & (labels == 1)).sum())
        table.append(
            {
                "threshold": threshold,
                "precision": round(true_good / max(true_good + false_good, 1), 4),
                "recall": round(true_good / max(len(good), 1), 4),
                "f1": round(2 * true_good / max(2 * true_good + false_good + missed, 1), 4),
                "good_kept": true_good,
                "others_kept": false_good,
                "good_dropped": missed,
                "others_dropped": len(other) - false_good,
            }
        )
    auc = round(float(pairs / max(len(good) * len(other), 1)), 4)
    return {"texts": len(labels), "good": len(good), "auc": auc, "thresholds": table}


def read_labelled(
    paths: Iterable[Path], text_column: str, label_column: str, good: Sequence[str]
) -> tuple[list[str], np.ndarray]:
    """The labelled texts in the order of their hash, each once, and (n,) 1 for those whose label is among `good`.

    Rows without a label are passed over; so are texts with labels of both kinds. Raises ValueError if one kind lacks.
    """
    labels: dict[str, set[int]] = {}
    for path in paths:
        for number, row in enumerate(read_rows(path)):
            if label_column not in row or not isinstance(row.get(text_column), str):
                if number == 0:
                    raise ValueError(f"{path} has no columns {text_column} and {label_column}, but {', '.join(row)}")
                continue
            if row[label_column] is not None:
                labels.setdefault(row[text_column], set()).add(int(str(row[label_column]) in good))
    texts = sorted(
        (text for text, found in labels.items() if len(found) == 1), key=lambda text: tuple(text_digest(text))
    )
    result = np.array([labels[text].copy().pop() for text in texts], np.int64)
    if len(set(result.tolist())) < 2:
        raise ValueError(
            f"the {len(texts):,} labelled texts are all of one kind; good ones have in column {label_column}"
            f" one of: {', '.join(good)}"
        )
    return texts, result


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a text belongs to the part that is not trained on: by its hash, whatever other texts there are."""
    return int(text_digest(text)[0]) < fraction * 2**64


def train_model(texts: Sequence[str], labels: np.ndarray, held_out: float, path: Path) -> dict[str, Any]:
    """Train on what is not held out, write the model, and return what `evaluate` says of the held-out part."""
    features = [features_of(text) for text in texts]
    held = np.array([is_held_out(text, held_out) for text in texts])
    if held.all() or len(set(labels[~held].tolist())) < 2:
        raise ValueError(
            f"holding out {held_out:.0%} of {len(texts):,} texts leaves too few to train on; hold out less"
        )
    weights, bias = train([features[i] for i in np.flatnonzero(~held)], labels[~held])
    scores = np.array([score_of(weights, bias, features[i]) for i in np.flatnonzero(held)])
    about = {
        "quality": FORMAT,
        "trained_on": {"texts": int((~held).sum()), "good": int(labels[~held].sum())},
        "held_out": evaluate(scores, labels[held]),
    }
    with new_file(path) as file:
        np.savez(file, weights=weights, bias=bias, about=np.frombuffer(json.dumps(about).encode(), np.uint8))
    return about


# ---- applying


@dataclass(frozen=True, kw_only=True)
class Model:
    """Of ours: weights and bias. Of fastText's: what its library loads."""

    about: dict[str, Any]
    weights: np.ndarray | None = None
    bias: float = 0.0
    fasttext: Any = None


@cache
def load_model(path: str) -> Model:
    """Loaded once in each process. Raises FileNotFoundError, and ValueError for what is no model."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no quality model {path}; make one with `python -m curation.quality train`")
    with open(path, "rb") as file:
        start = file.read(4)
    if start == FASTTEXT_MAGIC:
        return Model(about={}, fasttext=load_fasttext(path))
    try:
        with np.load(path) as data:
            about = json.loads(data["about"].tobytes())
            weights, bias = data["weights"], float(data["bias"])
    except Exception:  # of many kinds: no zip, cut, other contents
        raise ValueError(f"{path} is neither a model of curation.quality nor one of fastText") from None
    if about["quality"] != FORMAT or weights.shape != (N_FEATURES,):
        raise ValueError(f"{path} is of format {about['quality']}, expected {FORMAT}; train it again")
    return Model(about=about, weights=weights, bias=bias)


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Drops texts that the classifier finds less likely to be good than `minimum`."""

    model_file: str
    minimum: float = 0.5
    label: str | None = None  # of a fastText model: which of its labels means good

    def check(self, text: str, metadata: Mapping[str, Any]) -> str | None:
        return "quality" if self.score(text) < self.minimum else None

    def score(self, text: str) -> float:
        """The probability that the text is good; goes into the metadata as `quality`."""
        return judged(str(self.model_file), self.label, text)


@lru_cache(maxsize=1)  # the score and the decision are asked for one after the other
def judged(path: str, label: str | None, text: str) -> float:
    model = load_model(path)
    if model.weights is not None:
        return score_of(model.weights, model.bias, features_of(text))
    line = " ".join(text.split()).encode("utf-8", "replace").decode() + "\n"
    found = model.fasttext.f.predict(line, -1, 0.0, "strict")
    scores = {name.removeprefix("__label__"): score for score, name in found}
    if label not in scores:
        raise ValueError(f"{path} is fastText's: say which label is good, of {', '.join(sorted(scores))}")
    return float(min(scores[label], 1.0))


# ---- command line


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m curation.quality", allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", allow_abbrev=False, help="train a model, and measure it on held-out texts")
    training.add_argument("--labelled", type=Path, required=True, nargs="+", metavar="FILE")
    training.add_argument("--text-column", default="text")
    training.add_argument("--label-column", required=True)
    training.add_argument("--good", nargs="+", default=["1"], metavar="LABEL", help="labels of good texts, default: 1")
    training.add_argument("--held-out", type=float, default=0.2, metavar="FRACTION")
    training.add_argument("--out", type=Path, required=True, metavar="FILE")
    showing = commands.add_parser("show", allow_abbrev=False, help="print what was measured when a model was trained")
    showing.add_argument("model", type=Path)
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "train":
            if not 0 < arguments.held_out < 1:
                raise ValueError(f"--held-out {arguments.held_out} is no fraction between 0 and 1")
            labelled = read_labelled(arguments.labelled, arguments.text_column, arguments.label_column, arguments.good)
            print_report(train_model(*labelled, arguments.held_out, arguments.out))
        else:
            print_report(load_model(str(arguments.model)).about)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def print_report(about: Mapping[str, Any]) -> None:
    if not about:
        raise ValueError("a model of fastText's does not say how it was trained")
    trained, held = about["trained_on"], about["held_out"]
    print(f"trained on {trained['texts']:,} texts, {trained['good']:,} of them good")
    print(f"held out {held['texts']:,}, {held['good']:,} of them good; AUC {held['auc']:.3f}")
    print("minimum  precision  recall     F1   kept: good, others   dropped: good, others")
    for row in held["thresholds"]:
        print(
            f"{row['threshold']:7.2f} {row['precision']:10.3f} {row['recall']:7.3f} {row['f1']:6.3f}"
            f" {row['good_kept']:12,} {row['others_kept']:7,} {row['good_dropped']:15,} {row['others_dropped']:7,}"
        )


if __name__ == "__main__":
    sys.exit(main())
