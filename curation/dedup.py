"""Exact and MinHash near-duplicate detection over arrays: documents are known by their ids, never by their position.

A fingerprint is made from each document alone. Then the documents of all sources are put in one order (priority of
the source, then id), and in each group of duplicates the first of that order stays. The result depends neither on the
order in which documents were read nor on how they were divided into tasks.
"""

import hashlib
import re
from collections.abc import Sequence

import numpy as np

SHINGLE_WORD = re.compile(r"\w+")
BLOCK = 2048  # shingles hashed at once: 112 x 2048 x 8 bytes stay in the cache

_word_hashes: dict[str, int] = {}
_WORDS_REMEMBERED = 1 << 20


def text_digest(text: str) -> np.ndarray:
    """The text's identity, (2,) uint64. Its numbers also choose the held-out split and the order in the shards."""
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), "<u8")


def word_hash(word: str) -> int:
    """A 64-bit hash that is the same in every process (Python's own is not)."""
    value = _word_hashes.get(word)
    if value is None:
        if len(_word_hashes) > _WORDS_REMEMBERED:
            _word_hashes.clear()
        value = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        _word_hashes[word] = value
    return value


def mixed(values: np.ndarray) -> np.ndarray:
    """Spread every bit of 64-bit numbers over all others (splitmix64's finisher)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def shingles(text: str, n: int) -> np.ndarray:
    """Hashes of the distinct runs of n words, lower-cased, without punctuation; a shorter text is one shingle."""
    words = SHINGLE_WORD.findall(text.lower())
    hashes = np.fromiter(map(word_hash, words), np.uint64, len(words))
    n = min(n, len(words))
    keys = np.zeros(len(words) - n + 1, np.uint64)
    for i in range(n):
        keys = mixed(keys + hashes[i : i + len(keys)])
    return np.unique(keys)


def permutations(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors (odd) and offsets of n hash functions x -> x * factor + offset mod 2^64, (n, 1) uint64 each; fixed."""
    numbers = mixed(np.arange(1, 2 * n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return (numbers[:n] | np.uint64(1)).reshape(n, 1), numbers[n:].reshape(n, 1)


def band_keys(text: str, ngram_words: int, bands: int, rows: int) -> np.ndarray:
    """MinHash of the text, one key for each band, (bands,) uint64; two texts that share a key are near duplicates."""
    factors, offsets = permutations(bands * rows)
    hashes = shingles(text, ngram_words)
    lowest = np.full(bands * rows, np.iinfo(np.uint64).max)
    for start in range(0, len(hashes), BLOCK):
        values = hashes[start : start + BLOCK] * factors + offsets  # (bands * rows, block)
        np.minimum(lowest, values.min(axis=1), out=lowest)
    keys = np.zeros(bands, np.uint64)
    for column in lowest.reshape(bands, rows).T:
        keys = mixed(keys + column)
    return keys


def first_of_equals(keys: np.ndarray) -> np.ndarray:
    """For each row of (n,) or (n, k), the lowest index of a row equal to it."""
    _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    return first[inverse.reshape(-1)]


def components(n: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Union-find over arrays: for each of n nodes, the lowest node that edges a[i] - b[i] connect it with."""
    label = np.arange(n)
    while True:
        low = np.minimum(label[a], label[b])
        new = label.copy()
        np.minimum.at(new, label[a], low)
        np.minimum.at(new, label[b], low)
        new = new[new]  # labels are nodes, and new <= label: each round halves the paths
        if (new == label).all():
            return label
        label = new


def find_duplicates(
    ids: Sequence[str], priorities: np.ndarray, digests: np.ndarray, keys: np.ndarray
) -> tuple[dict[str, str], dict[str, str]]:
    """Which documents are exact and which are near duplicates: id -> id of the document that stays for it.

    ids: n different ones; priorities (n,), lower stays; digests (n, 2); keys (n, bands). In any order.
    """
    order = sorted(range(len(ids)), key=lambda i: (priorities[i], ids[i]))
    ids = [ids[i] for i in order]
    digests, keys = digests[order], keys[order]

    n = len(ids)
    exact = first_of_equals(digests) if n else np.arange(0)
    firsts = [first_of_equals(keys[:, band]) for band in range(keys.shape[1])] if n else []
    here = np.arange(n)
    a = np.concatenate([exact, *firsts])
    b = np.tile(here, 1 + len(firsts))
    stays = components(n, a[a != b], b[a != b])

    exact_duplicates = {ids[i]: ids[exact[i]] for i in here if exact[i] != i}
    near_duplicates = {ids[i]: ids[stays[i]] for i in here if exact[i] == i and stays[i] != i}
    return exact_duplicates, near_duplicates
