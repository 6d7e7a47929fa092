"""The quality classifier on pages that people have labelled, and its speed, against fastText's supervised mode."""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from curation.contests.measure import Contest, measure
from curation.decontaminate import read_rows
from curation.quality import Quality, evaluate, features_of, read_labelled, score_of, train, train_model

LABELLED = "web_general/commoncrawl_text_samples.jsonl.zst"
FOLDS = 5  # each text is scored by a model that was trained on the other folds
PEER = "fastText 0.9.2, supervised, pairs of words"
MAX_TRIES = 500


def folds_of(texts: list[str]) -> np.ndarray:
    """The texts come in the order of their hash, so every FOLDS-th is a random part."""
    return np.arange(len(texts)) % FOLDS


def cross_validated(
    fit: Callable[[list[str], np.ndarray, list[str]], np.ndarray], texts: list[str], labels: np.ndarray
) -> np.ndarray:
    scores, folds = np.zeros(len(texts)), folds_of(texts)
    for fold in range(FOLDS):
        rest, held = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        scores[held] = fit([texts[i] for i in rest], labels[rest], [texts[i] for i in held])
    return scores


def our_fit(texts: list[str], labels: np.ndarray, held: list[str]) -> np.ndarray:
    weights, bias = train([features_of(text) for text in texts], labels)
    return np.array([score_of(weights, bias, features_of(text)) for text in held])


def peer_line(text: str) -> str:
    return " ".join(re.sub(r"([^\w\s])", r" \1 ", text.lower()).split())


def peer_train(texts: list[str], labels: np.ndarray) -> tuple[Any, int]:
    """(model, number of trainings that ended with NaN before it)."""
    import fasttext

    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        for text, label in zip(texts, labels, strict=True):
            file.write(f"__label__{label} {peer_line(text)}\n")
        file.flush()
        for failed in range(MAX_TRIES):
            try:
                options = {"dim": 16, "epoch": 30, "lr": 0.3, "wordNgrams": 2, "minCount": 2, "bucket": 100_000}
                return fasttext.train_supervised(file.name, thread=1, seed=1, verbose=0, **options), failed
            except RuntimeError:
                continue
    raise RuntimeError(f"fastText's training ended with NaN {MAX_TRIES} times")


def peer_score(model: Any, text: str) -> float:
    return {label: score for score, label in model.f.predict(peer_line(text) + "\n", -1, 0.0, "strict")}["__label__1"]


def score_with_ours(model_file: str, texts: list[str]) -> None:
    rule = Quality(model_file=model_file)
    for text in texts:
        rule.score(text)


def score_with_peer(model_file: str, texts: list[str]) -> None:
    from fasttext.FastText import _FastText

    model = _FastText(model_file)
    for text in texts:
        peer_score(model, text)


def contests(corpus: Path) -> list[Contest]:
    texts, labels = read_labelled([corpus / LABELLED], "text", "quality_label", ["1"])
    ours = evaluate(cross_validated(our_fit, texts, labels), labels)
    failed: list[int] = []
    models: list[Any] = []

    def peer_fit(some: list[str], their_labels: np.ndarray, held: list[str]) -> np.ndarray:
        model, n_failed = peer_train(some, their_labels)
        failed.append(n_failed)
        models.append(model)
        return np.array([peer_score(model, text) for text in held])

    theirs = evaluate(cross_validated(peer_fit, texts, labels), labels)
    best = {
        name: max(result["thresholds"], key=lambda row: row["f1"])
        for name, result in (("ours", ours), ("peer", theirs))
    }
    quality = Contest(
        step="quality classifier",
        metric="AUC on held-out pages",
        peer=PEER,
        ours=ours["auc"],
        theirs=theirs["auc"],
        target="no worse by more than 0.02",
        reached=ours["auc"] >= theirs["auc"] - 0.02,
        note=f"{len(texts):,} pages labelled by people, {FOLDS} folds; at the threshold of the best F1: "
        + "; ".join(
            f"{name} {row['threshold']:.2f}: precision {row['precision']:.3f}, recall {row['recall']:.3f}, "
            f"F1 {row['f1']:.3f}"
            for name, row in best.items()
        )
        + f"; of fastText's trainings {sum(failed)} of {sum(failed) + FOLDS} ended with NaN",
    )
    sample = [row["text"] for path in sorted(corpus.rglob("*.jsonl.zst")) for row in list(read_rows(path))[::20]]
    n_mb = sum(len(text.encode()) for text in sample) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        train_model(texts, labels, 0.2, Path(folder) / "ours.npz")
        models[0].save_model(f"{folder}/theirs.bin")
        our_time = measure(score_with_ours, f"{folder}/ours.npz", sample)
        peer_time = measure(score_with_peer, f"{folder}/theirs.bin", sample)
    speed = Contest(
        step="quality classifier, speed",
        metric="MB of text per CPU second",
        peer=PEER,
        ours=n_mb / our_time.cpu_s,
        theirs=n_mb / peer_time.cpu_s,
        target="at least fastText's",
        reached=our_time.cpu_s <= peer_time.cpu_s,
        note=f"{len(sample):,} documents, {n_mb:.1f} MB; in a chain ours finds the words split already",
    )
    return [quality, speed]
