"""Decontamination on real text: items of the suites planted into clean documents, against datatrove's n-gram filter.

Beside the corpus lie `evals`, `medqa`, `wikitext-2` (the items) and `decontam` (documents of the corpus that share
runs of 13 words with them). Planted are items as they are, re-punctuated, in part, with words replaced, and questions
alone.
"""

import json
import random
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curation.contests.measure import Contest, measure
from curation.decontaminate import Decontaminate, Item, build_index, read_items, read_rows

SUITES = ("evals", "medqa", "wikitext-2")
N_PLANTED = 3000  # items, each planted once in every form
N_PEER = 200  # of them for datatrove's filter, which splits words with spaCy
HOST_CHARACTERS = 2500  # of the clean document around a planted item
PEER = "datatrove 0.10.1 NGramsDecontFilter"

Texts = list[str]


# ---- what is planted


def whole(item: Item, draw: random.Random) -> str:
    """The item as it stands in a file of questions and answers."""
    lines = [*item.passages, *item.stems[-1:]]
    lines += [
        f"{letter}. {choice}" for letter, choice in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", item.choices, strict=False)
    ]
    return "\n".join(lines + ([f"Answer: {item.answer}"] if item.answer else []))


def stem(item: Item, draw: random.Random) -> str:
    """The question alone; the passage, where there is no question."""
    return (item.stems or item.passages)[0]


def repunctuated(item: Item, draw: random.Random) -> str:
    """Other punctuation, quotes, capitals and line breaks, as other mirrors of the same text have."""
    text = re.sub(
        r"[^\w\s]", lambda sign: draw.choice([sign[0], "", " ", f" {sign[0]} ", ",", "\u2014"]), whole(item, draw)
    )
    words = [word.upper() if draw.random() < 0.1 else word for word in text.split()]
    return "".join(word + draw.choice([" ", " ", " ", "  ", "\n", "\u00a0"]) for word in words)


def part(item: Item, draw: random.Random) -> str:
    """60 % of the question's, or the passage's, words, in one piece."""
    words = stem(item, draw).split()
    n = max(round(0.6 * len(words)), 1)
    start = draw.randrange(len(words) - n + 1)
    return " ".join(words[start : start + n])


def reworded(item: Item, draw: random.Random) -> str:
    """One word in ten replaced."""
    words = whole(item, draw).split(" ")
    return " ".join("something" if draw.random() < 0.1 else word for word in words)


FORMS = {"as they are": whole, "re-punctuated": repunctuated, "question alone": stem, "60 % of the question": part,
         "one word in ten replaced": reworded}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    items: list[Item]  # planted, for each the next text of every form
    planted: dict[str, Texts]
    clean: list[tuple[str, str]]  # (id, text) of the whole corpus


def make_case(corpus: Path) -> Case:
    items = list(read_items([corpus.parent / suite for suite in SUITES]))
    clean = [
        (row["id"], row["text"])
        for path in sorted(corpus.rglob("*.jsonl.zst"))
        for row in read_rows(path)
        if row["text"]
    ]
    draw = random.Random("decontamination")
    items = draw.sample([item for item in items if len(stem(item, draw).split()) > 3], N_PLANTED)
    planted: dict[str, list[Any]] = {form: [] for form in FORMS}
    for form, leak in FORMS.items():
        for item in items:
            host = draw.choice(clean)[1][:HOST_CHARACTERS]
            at = host.find(" ", draw.randrange(len(host)))
            planted[form].append(f"{host[:at]}\n\n{leak(item, draw)}\n\n{host[at:]}")
    return Case(items=items, planted=planted, clean=clean)


# ---- ours


def found_by_us(index_file: str, texts: Texts) -> list[str]:
    """What is found in each text: "<benchmark> <item>", "" for nothing."""
    rule = Decontaminate(index_file=index_file)
    results = []
    for text in texts:
        evidence = rule.explain(text) if rule.check(text, {}) else {}
        results.append(" ".join((evidence["benchmark"], evidence["item"])) if evidence else "")
    return results


# ---- datatrove's


def peer_as_shipped() -> str:
    """What comes of indexing one's own documents with datatrove's indexer."""
    from datatrove.data import Document
    from datatrove.pipeline.decont import NGramsDecontIndexer

    with tempfile.TemporaryDirectory() as folder:
        try:
            NGramsDecontIndexer(folder).run(iter([Document(text="Paris", id="0", metadata={"query": "Which city?"})]))
        except BaseException as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return "works"


def peer_hash(text: str) -> int:
    """datatrove's hash; its own function hands xxhash a string, which xxhash 4 refuses."""
    import xxhash

    return xxhash.xxh64_intdigest(text.encode())


def peer_index(folder: str, items: list[Item], questions: bool) -> None:
    """datatrove's index by its own hashing, without the part of its indexer that needs lighteval."""
    import numpy as np
    from datatrove.pipeline.decont import NGramsDecontConfig, NGramsDecontIndexer

    indexer = object.__new__(NGramsDecontIndexer)  # its own __new__ asks for lighteval
    indexer.__init__(folder, config=NGramsDecontConfig(find_query_ngrams=questions))
    indexer.hash_func = peer_hash
    hashes = {
        number
        for item in items
        for number in [
            *(indexer.compute_hashes(item.answer, item.stems[-1]) if item.stems else []),
            *(number for passage in item.passages for number in indexer.compute_hashes(passage)),
        ]
    }
    np.array(sorted(hashes), np.uint64).tofile(Path(folder) / "suites.index.hashes")


def found_by_peer(folder: str, questions: bool, texts: Texts) -> list[bool]:
    from datatrove.data import Document
    from datatrove.pipeline.decont import NGramsDecontConfig, NGramsDecontFilter

    rule = NGramsDecontFilter(folder, config=NGramsDecontConfig(find_query_ngrams=questions))
    rule.hash_func = peer_hash
    return [rule.filter(Document(text=text, id="0")) is not True for text in texts]


# ---- the contests


def contests(corpus: Path) -> list[Contest]:
    with tempfile.TemporaryDirectory() as folder:
        return list(run_contests(corpus, Path(folder)))


def run_contests(corpus: Path, folder: Path) -> Iterator[Contest]:
    case = make_case(corpus)
    index_file = str(folder / "ours.index")
    built = build_index(read_items([corpus.parent / suite for suite in SUITES]), Path(index_file))
    n_items = sum(count["items"] for count in built.values())
    too_short = sum(count["too_short"] for count in built.values())
    size = Path(index_file).stat().st_size
    peer_folders = {}
    for questions in (False, True):
        peer_folders[questions] = folder / f"peer-{questions}"
        peer_folders[questions].mkdir()
        peer_index(str(peer_folders[questions]), case.items[:N_PEER], questions)

    for form, texts in case.planted.items():
        ours = [bool(match) for match in found_by_us(index_file, texts)]
        theirs = {
            questions: sum(found_by_peer(str(at), questions, texts[:N_PEER])) / N_PEER
            for questions, at in peer_folders.items()
        }
        target = {"as they are": 0.99, "re-punctuated": 0.90}.get(form)
        recall = sum(ours) / len(ours)
        yield Contest(
            step=f"decontamination, items planted {form}",
            metric="% found",
            peer=f"{PEER}, indexer patched, questions indexed",
            ours=100 * recall,
            theirs=100 * theirs[True],
            target=f"at least {target:.0%}" if target else "reported",
            reached=target is None or recall >= target,
            note=f"ours of {len(ours):,}, of the peer's {N_PEER} {sum(ours[:N_PEER]) / N_PEER:.1%}; "
            f"peer with its defaults {theirs[False]:.1%}; missed by us: {missed(case.items, ours)}",
        )

    known = json.loads((corpus.parent / "decontam/train_docs_sharing_13grams_with_evals.json").read_text())
    shared = {
        document for name, documents in known.items() if name not in ("math", "gsm8k_test") for document in documents
    }
    everything = [text for _, text in case.clean]
    n_bytes = sum(len(text.encode()) for text in everything)
    measured = measure(found_by_us, index_file, everything)
    flagged = {case.clean[i][0]: match for i, match in enumerate(measured.result) if match}
    false = sorted(set(flagged) - shared)
    rate = len(false) / (len(everything) - len(shared))
    yield Contest(
        step="decontamination, clean documents",
        metric="% dropped",
        peer=PEER,
        ours=100 * rate,
        theirs=None,
        target="at most 0.1 %",
        reached=rate <= 0.001,
        note=f"{len(false)} of {len(everything):,}, each counted as false: "
        + "; ".join(f"{document} ({flagged[document]})" for document in false)
        + f". Of {len(shared)} that are known to share runs of 13 words, {len(shared & set(flagged))} dropped",
    )

    sample = everything[:: len(everything) // 500]
    sample_bytes = sum(len(text.encode()) for text in sample)
    ours_again = measure(found_by_us, index_file, sample)
    peer = measure(found_by_peer, str(peer_folders[True]), True, sample)
    speed = n_bytes / 1e6 / measured.cpu_s
    yield Contest(
        step="decontamination, speed",
        metric="MB of text per CPU second",
        peer=f"{PEER}, indexer patched",
        ours=speed,
        theirs=sample_bytes / 1e6 / peer.cpu_s,
        target="at least 10",
        reached=speed >= 10,
        note=f"ours on {n_bytes / 1e6:.0f} MB, on the peer's {sample_bytes / 1e6:.1f} MB with the start "
        f"{sample_bytes / 1e6 / ours_again.cpu_s:.1f}; peak memory {ours_again.peak_rss_mb:.0f} MB; "
        f"index {size / 1e6:.1f} MB of {n_items:,} items, {too_short:,} of them too short",
    )
    shipped = peer_as_shipped()
    yield Contest(
        step="decontamination, index of one's own items, as shipped",
        metric="items indexed",
        peer="datatrove 0.10.1 NGramsDecontIndexer",
        ours=float(n_items),
        theirs=None,
        target="works without network",
        reached=True,
        note=f"peer: {shipped}",
    )


def missed(items: list[Item], found: list[bool]) -> str:
    """How many of each benchmark's were missed, those with the most first."""
    counts: dict[str, Any] = {}
    for item, is_found in zip(items, found, strict=True):
        total, lost = counts.get(item.benchmark, (0, 0))
        counts[item.benchmark] = total + 1, lost + (not is_found)
    worst = sorted((-lost, name, total) for name, (total, lost) in counts.items() if lost)
    return ", ".join(f"{name} {-lost} of {total}" for lost, name, total in worst) or "none"
