"""Fingerprints, pairs, clusters and survivors against the plain definitions of each."""

import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from curation.dedup import (
    BLOCK,
    Clusters,
    band_keys,
    band_pairs,
    factors,
    fingerprint,
    mixed,
    rank,
    shingles,
    similarities,
    sketch,
    survivors,
    without_licence,
    word_hashes,
)

MINHASH = {"ngram_words": 5, "bands": 14, "rows": 8}


def words(n, seed):
    draw = random.Random(seed)
    return [f"w{draw.randrange(50_000)}" for _ in range(n)]


def edited(words, n_edits, seed):
    """The words with n_edits of them replaced."""
    words = list(words)
    for i in random.Random(seed).sample(range(len(words)), n_edits):
        words[i] = f"edit{seed}x{i}"
    return words


def jaccard(a, b):
    a, b = ({tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (a, b))
    return len(a & b) / len(a | b)


def n_shared(a, b):
    return int((band_keys(a, **MINHASH) == band_keys(b, **MINHASH)).sum())


# ---- fingerprints


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n",
        "one",
        "Tabs\tand new\nlines, a_b x2 \u00c9tude na\u00efve \u4e2d\u6587 \U0001f600 \u00df\u0130 \u03a3\u03c2 -",
        " ".join(words(20_000, 0)),  # of several blocks
        "a" * (BLOCK - 1) + " " + "b" * 10 + " c",
        ("long " * BLOCK)[: BLOCK + 2] + "tail",
    ],
)
def test_words_are_the_runs_of_word_characters(text):
    found = [int(hashed) for block in word_hashes(text) for hashed in block]
    expected = re.findall(r"\w+", text)
    assert len(found) == len(expected)
    lowered = ["".join(c.lower()[0] for c in word) for word in expected]
    assert len(set(zip(found, lowered, strict=True))) == len(set(found)) == len(set(lowered))


def test_fingerprint_of_case_punctuation_and_white_space_is_one():
    plain = " ".join(words(300, 1))
    noisy = plain.upper().replace(" ", " ,\n", 100).replace(" ", "\u2014", 50) + "!"
    assert n_shared(plain, noisy) == 14
    assert (fingerprint(plain, **MINHASH)[0] != fingerprint(noisy, **MINHASH)[0]).any()  # but not one text


def test_order_of_words_and_every_word_of_a_short_text_count():
    assert (
        n_shared("a b", "b a") == n_shared("ab c", "a bc") == n_shared("a b c", "a b") == n_shared("ac b", "ab c") == 0
    )


def test_keys_are_the_same_in_every_process_and_version():
    """Or fingerprints that lie on disk would no longer be found again."""
    text = "The quick brown fox jumps over the lazy d\u00f6g. " + " ".join(map(str, range(9000)))
    assert band_keys(text, **MINHASH)[[0, 13]].tolist() == [11544295358124722373, 18150870283281598150]


def lowest(text):
    """The lowest hash of the text's 5-grams under each of the 112 functions."""
    return np.min([(hashes * factors(112).astype(np.uint32)).min(axis=1) for hashes in shingles(text, 5)], axis=0)


def test_fingerprint_does_not_depend_on_where_blocks_end():
    some = words(12_000, 2)
    seam = some[-4:] + some[:4]
    # the 5-grams of a text that stands twice are its own and those over the seam
    assert (lowest(" ".join(some + some)) == np.minimum(lowest(" ".join(some)), lowest(" ".join(seam)))).all()


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.8, 0.9])
def test_near_duplicates_are_found_as_often_as_theory_says(similarity):
    n, trials = 300, 400
    n_edits = round((n - 4) * (1 - similarity) / (1 + similarity) / 5)
    found, expected = 0, 0.0
    for seed in range(trials):
        a = words(n, seed)
        b = edited(a, n_edits, seed)
        found += n_shared(" ".join(a), " ".join(b)) > 0
        expected += 1 - (1 - jaccard(a, b) ** 8) ** 14
    spread = max(1.0, (expected * (1 - expected / trials)) ** 0.5)
    assert abs(found - expected) < 4 * spread, (found, expected)


@pytest.mark.parametrize("similarity", [0.3, 0.6, 0.8, 1.0])
def test_sketches_estimate_the_similarity(similarity):
    n_edits = round(996 * (1 - similarity) / (1 + similarity) / 5)
    pairs = [(words(1000, seed), edited(words(1000, seed), n_edits, seed)) for seed in range(40)]
    a, b = (np.stack([sketch(" ".join(text), **MINHASH) for text in texts]) for texts in zip(*pairs, strict=True))
    assert a.shape == (40, 2) and a.dtype == np.uint64
    errors = similarities(a, b, 112) - [jaccard(*pair) for pair in pairs]
    assert abs(errors.mean()) < 4 * 0.1 / 40**0.5 and errors.std() < 0.13  # of one: 2 sqrt(p (1 - p) / 112) < 0.095


@pytest.mark.parametrize(
    "header",
    [
        "/*\n * Copyright 2020 Someone\n */\n",
        "#!/usr/bin/env python\n# Copyright (c) Some Company.\n\n# SPDX-License-Identifier: MIT\n\n",
        "// Licensed under the Apache License\n//\n",
        "<!-- licence: CC-BY -->",
    ],
)
def test_licence_at_the_start_of_a_file_does_not_make_it_a_duplicate(header):
    assert without_licence(header + "the code") == "the code"
    assert without_licence(header) == header  # nothing else there
    assert n_shared(header + " ".join(words(50, 0)), " ".join(words(50, 0))) == 14


@pytest.mark.parametrize(
    "text", ["", "# Title\n\nText of licences", "/* what it does */ code", "Copyright 2020\ncode"]
)
def test_other_beginnings_count(text):
    assert without_licence(text) == text


def test_memory_does_not_grow_with_the_document():
    code = """
import resource
from curation.dedup import fingerprint
text = "many words of a long book " * 800_000
fingerprint(text[:100_000], 5, 14, 8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fingerprint(text, 5, 14, 8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    command = [sys.executable, "-c", code]
    root = Path(__file__).parents[1]
    grown_kb = int(subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout)
    assert grown_kb < 30_000  # the text of 20.8 MB once more, as UTF-8


# ---- pairs and clusters


@pytest.mark.parametrize("part", [1 << 22, 100, 7])
def test_pairs_join_every_document_with_the_first_of_its_key(part, monkeypatch):
    monkeypatch.setattr("curation.dedup.PART", part)
    keys = mixed(np.random.default_rng(0).integers(0, 400, 1000).astype(np.uint64))
    first = {}
    expected = {(first[key], i) for i, key in enumerate(keys.tolist()) if first.setdefault(key, i) != i}
    pairs = band_pairs(keys)
    assert pairs.dtype == np.uint32
    assert sorted(map(tuple, pairs.tolist())) == sorted(expected)


@pytest.mark.parametrize("n", [0, 1, 5])
def test_different_keys_give_no_pair(n):
    assert band_pairs(np.arange(n, dtype=np.uint64)).shape == (0, 2)


def plain_clusters(n, pairs):
    lowest = list(range(n))
    for a, b in pairs:
        old, new = max(lowest[a], lowest[b]), min(lowest[a], lowest[b])
        lowest = [new if x == old else x for x in lowest]
    return lowest


@pytest.mark.parametrize("chunk", [1, 10, 1 << 16])
def test_clusters_are_those_of_the_plain_union_find(chunk, monkeypatch):
    monkeypatch.setattr("curation.dedup.PAIRS", chunk)
    draw = np.random.default_rng(chunk)
    for n_pairs in (0, 20, 60, 300):
        pairs = draw.integers(0, 100, (n_pairs, 2)).astype(np.uint32)
        clusters = Clusters(100)
        for start in range(0, n_pairs, 33):
            clusters.join(pairs[start : start + 33])
        assert clusters.lowest().tolist() == plain_clusters(100, pairs.tolist())


def test_a_long_chain_is_one_cluster_in_any_order():
    chain = np.random.default_rng(0).permutation(30_000).astype(np.uint32)
    pairs = np.stack([chain[:-1], chain[1:]], axis=1)
    for order in (slice(None), slice(None, None, -1)):
        clusters = Clusters(30_000)
        clusters.join(pairs[order])
        assert (clusters.lowest() == 0).all()


# ---- survivors


def corpus():
    """id -> (priority of its source, text): 200 texts, exact copies, near copies, and a chain of near copies."""
    documents = {f"b/{i}": (1, " ".join(words(300, i))) for i in range(200)}
    documents |= {f"c/{i}": (2, documents[f"b/{i}"][1]) for i in range(20)}  # loses to b
    documents |= {f"a/{i}": (0, " ".join(edited(words(300, i), 2, i))) for i in range(20, 40)}  # wins over b
    documents |= {f"b/{i}again": (1, documents[f"b/{i}"][1]) for i in range(30, 50)}  # equal priority
    return documents


def stays_by_id(documents, sources=False):
    ids = list(documents)
    prints = [fingerprint(text, **MINHASH) for _, text in documents.values()]
    priorities = np.array([priority for priority, _ in documents.values()])
    id_hashes = np.array([fingerprint(i, **MINHASH)[0][0] for i in ids])
    digests, keys = (np.stack(part) for part in zip(*prints, strict=True))
    exact, stays = survivors(digests, keys.T, rank(priorities, id_hashes), priorities if sources else None)
    return {i: (ids[exact[n]], ids[stays[n]]) for n, i in enumerate(ids)}


def test_planted_duplicates_are_found_and_the_preferred_document_stays():
    documents = corpus()
    stays = stays_by_id(documents)
    for i in range(20):
        assert stays[f"c/{i}"] == (f"b/{i}", f"b/{i}") == stays[f"b/{i}"]
    for i in range(20, 40):
        assert stays[f"a/{i}"] == (f"a/{i}", f"a/{i}") and stays[f"b/{i}"][1] == f"a/{i}"
    for i in range(30, 40):  # an exact duplicate of what is itself a near duplicate
        assert stays[f"b/{i}again"] == (stays[f"b/{i}"][0], f"a/{i}")
    assert all(stays[f"b/{i}"] == (f"b/{i}", f"b/{i}") for i in range(50, 200))


def test_survivors_do_not_depend_on_the_order_of_the_documents():
    documents = corpus()
    for sources in (False, True):
        stays = stays_by_id(documents, sources)
        for seed in range(3):
            shuffled = list(documents.items())
            random.Random(seed).shuffle(shuffled)
            assert stays_by_id(dict(shuffled), sources) == stays


def test_adding_a_document_changes_nothing_for_those_without_a_twin():
    documents = corpus()
    before = stays_by_id(documents)
    after = stays_by_id({"0/new": (0, documents["b/60"][1]), **documents})
    assert after["b/60"] == ("0/new", "0/new")
    assert {i: stays for i, stays in after.items() if i not in ("0/new", "b/60")} == {
        i: stays for i, stays in before.items() if i != "b/60"
    }


def test_near_duplicates_can_be_sought_within_each_source_alone():
    documents = corpus()
    documents["b/near"] = (1, " ".join(edited(words(300, 199), 2, 0)))
    stays = stays_by_id(documents, sources=True)
    assert stays["b/near"][1] == stays["b/199"][1]  # one source
    assert all(stays[f"b/{i}"][1].startswith("b/") for i in range(20, 40))  # its near copy is of another
    assert all(stays[f"c/{i}"] == (f"b/{i}", f"b/{i}") for i in range(20))  # equal texts are found across sources


def test_pairs_that_are_not_near_on_a_second_look_are_not_joined():
    digests = np.arange(12, dtype=np.uint64).reshape(6, 2)
    keys, order = np.array([1, 1, 1, 2, 2, 3], np.uint64), np.array([5, 4, 3, 2, 1, 0], np.uint64)
    asked = []

    def is_near(a, b):
        asked.extend(zip(a.tolist(), b.tolist(), strict=True))
        return b != 1

    assert survivors(digests, [keys], order)[1].tolist() == [2, 2, 2, 4, 4, 5]
    assert survivors(digests, [keys], order, is_near=is_near)[1].tolist() == [2, 1, 2, 4, 4, 5]
    assert sorted(asked) == [(2, 0), (2, 1), (4, 3)]  # numbers of documents; the one that would stay comes first


def test_texts_of_equal_first_digest_alone_are_not_taken_for_one():
    digests = np.array([[7, 1], [7, 2], [7, 1]], np.uint64)
    exact, stays = survivors(digests, [np.arange(3, dtype=np.uint64)], np.arange(3, dtype=np.uint64))
    assert exact.tolist() == stays.tolist() == [0, 1, 0]


def test_no_documents_have_no_survivors():
    exact, stays = survivors(np.zeros((0, 2), np.uint64), np.zeros((14, 0), np.uint64), np.zeros(0, np.uint64))
    assert len(exact) == len(stays) == 0
