"""Exact and MinHash near-duplicate detection over arrays: documents are known by their ids, never by their position.

A fingerprint is made from each document alone: the digest of its text, one MinHash key for each band and, if wanted, a
sketch. Then all documents are numbered, `rank` puts them in one order (priority of the source, then a hash of the id),
and of each group of duplicates the first in that order stays. The result depends neither on the numbering nor on how
the documents were divided into tasks, and no step needs more memory than a few arrays of the number of documents.

    digest, keys = fingerprint(text, ngram_words=5, bands=14, rows=8)     # of each document
    sketched = sketch(text, ngram_words=5, bands=14, rows=8)
    exact, stays = survivors(digests, keys.T, rank(priorities, id_hashes),  # of all
                             is_near=lambda a, b: similarities(sketches[a], sketches[b], 14 * 8) >= 0.65)
"""

import functools
import hashlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

BLOCK = 1 << 15  # characters that are split into words at once
SHINGLES = 1024  # shingles hashed at once: 112 x 1024 x 4 bytes stay in the cache
BASE = 0x9E3779B97F4A7C15  # of the polynomial hashes; odd
PART = 1 << 22  # keys sorted at once
HEADER = 20_000  # characters at the start of a text among which a licence is looked for
LEADING_COMMENT = re.compile(r"\s*(?:/\*.*?\*/\s*|<!--.*?-->\s*|(?:(?://|#|--|;|%)[^\n]*(?:\n\s*|$))+)", re.DOTALL)
WORD = re.compile(r"\w")
LICENCE = re.compile(r"licen[cs]e|copyright", re.IGNORECASE)
PAIRS = 1 << 16  # pairs joined at once: what a chunk needs stays in the cache


def text_digest(text: str) -> np.ndarray:
    """The text's identity, (2,) uint64. Its numbers also choose the held-out split and the order in the shards."""
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), "<u8")


def mixed(values: np.ndarray) -> np.ndarray:
    """Spread every bit of 64-bit numbers over all others (splitmix64's finisher)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


# ---- the fingerprint of one document


@functools.cache
def letters() -> np.ndarray:
    r"""The lower-case code point of each character if it is part of a word (\w), else 0: (0x110000,) uint32."""
    characters = "".join(map(chr, range(sys.maxunicode + 1)))
    table = np.arange(len(characters), dtype=np.uint32)
    for upper in filter(str.isupper, characters):
        table[ord(upper)] = ord(upper.lower()[0])
    for other in re.finditer(r"\W+", characters):
        table[other.start() : other.end()] = 0
    return table


@functools.cache
def powers() -> tuple[np.ndarray, np.ndarray]:
    """BASE^i and BASE^-i modulo 2^64 for i from 0 to BLOCK, uint64."""
    both = []
    for base in (BASE, pow(BASE, -1, 1 << 64)):
        steps = np.full(BLOCK + 1, base, np.uint64)
        steps[0] = 1
        both.append(np.cumprod(steps, dtype=np.uint64))
    return both[0], both[1]


def spans(values: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """A 64-bit polynomial hash of each values[start:stop]; at most BLOCK values."""
    up, down = powers()
    sums = np.zeros(len(values) + 1, np.uint64)
    np.cumsum(values * up[: len(values)], out=sums[1:])
    return mixed((sums[stops] - sums[starts]) * down[starts])


def word_hashes(text: str) -> Iterator[np.ndarray]:
    r"""Hashes of the text's words (runs of \w, lower-cased) in their order, a block of the text at a time.

    A block ends after its last character that is no letter, so no word is cut unless it is BLOCK characters long.
    """
    start = 0
    while start < len(text):
        codes = letters()[np.frombuffer(text[start : start + BLOCK].encode("utf-32-le"), "<u4")]
        inside = codes != 0
        if start + len(codes) < len(text) and not inside.all():
            inside = inside[: len(codes) - int(np.argmin(inside[::-1]))]
            codes = codes[: len(inside)]
        edges = np.flatnonzero(np.diff(inside, prepend=False, append=False))
        yield spans(codes, edges[::2], edges[1::2])
        start += len(codes)


def shingles(text: str, n: int) -> Iterator[np.ndarray]:
    """Hashes of the runs of n words, (any,) odd uint32, some at a time; a text of fewer words is one shingle.

    Odd, because 0 would be the lowest under every factor of MinHash.
    """

    def hashed(words: np.ndarray, n: int) -> np.ndarray:
        starts = np.arange(len(words) - n + 1)
        return (spans(words, starts, starts + n) >> np.uint64(32)).astype(np.uint32) | np.uint32(1)

    words = np.zeros(0, np.uint64)
    n_words = 0
    for more in word_hashes(text):
        n_words += len(more)
        words = np.concatenate([words, more])
        if len(words) >= n:
            yield hashed(words, n)
            words = words[len(words) - n + 1 :]
    if n_words < n:
        yield hashed(words, n_words)


@functools.cache
def factors(n: int) -> np.ndarray:
    """Fixed odd numbers, (n, 1) uint64; the low halves are the n hash functions x -> x * factor mod 2^32."""
    return mixed(np.arange(1, n + 1, dtype=np.uint64) * np.uint64(BASE)).reshape(n, 1) | np.uint64(1)


def without_licence(text: str) -> str:
    """The text after a comment at its start that speaks of a licence: thousands of files share it, and little else."""
    comment = LEADING_COMMENT.match(text[:HEADER])
    if comment and LICENCE.search(comment.group()) and WORD.search(text, comment.end()):
        return text[comment.end() :]
    return text


@functools.lru_cache(maxsize=1)  # keys and sketch of a text are asked for one after the other
def minima(text: str, ngram_words: int, n: int) -> np.ndarray:
    """MinHash: the lowest hash of the text's n-grams of words under each of n functions, (n,) uint32."""
    by = factors(n).astype(np.uint32)
    lowest = np.full(n, np.iinfo(np.uint32).max, np.uint32)
    for hashes in shingles(without_licence(text), ngram_words):
        for start in range(0, len(hashes), SHINGLES):
            np.minimum(lowest, (hashes[start : start + SHINGLES] * by).min(axis=1), out=lowest)
    return lowest


def band_keys(text: str, ngram_words: int, bands: int, rows: int) -> np.ndarray:
    """One key for each band, (bands,) uint64; two texts that share a key are likely near duplicates.

    Two texts whose sets of n-grams have the Jaccard similarity s share a key with probability 1 - (1 - s^rows)^bands.
    """
    n = bands * rows
    spread = minima(text, ngram_words, n) * factors(n)[:, 0]
    return mixed(spread.reshape(bands, rows).sum(axis=1))


def sketch(text: str, ngram_words: int, bands: int, rows: int) -> np.ndarray:
    """One bit of each minimum, (ceil(bands * rows / 64),) uint64: what `similarities` estimates from (b-bit MinHash).

    Li and Koenig, arXiv:0910.3349.
    """
    bits = (minima(text, ngram_words, bands * rows) >> np.uint32(8) & np.uint32(1)).astype(bool)
    return np.packbits(np.pad(bits, (0, -len(bits) % 64))).view("<u8")


def fingerprint(text: str, ngram_words: int, bands: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """What is kept of a document to find its duplicates: text_digest (2,) and band_keys (bands,), uint64."""
    return text_digest(text), band_keys(text, ngram_words, bands, rows)


# ---- the duplicates among all documents


def number_type(n: int) -> type:
    """The dtype of the numbers of n documents."""
    return np.uint32 if n < 1 << 32 else np.int64


def band_pairs(keys: np.ndarray) -> np.ndarray:
    """Each document that is not the first of its key beside that first one: (m, 2) numbers, in no special order.

    keys: (n,) uint64, well spread. Sorted a part at a time, so that little memory is needed beside keys and pairs.
    """
    pairs: list[np.ndarray] = [np.zeros((0, 2), number_type(len(keys)))]
    bits = (len(keys) // PART).bit_length()
    for part in range(1 << bits):
        numbers = np.flatnonzero(keys >> np.uint64(64 - bits) == part)
        ordered = keys[numbers]
        order = np.argsort(ordered)
        ordered, numbers = ordered[order], numbers[order]
        as_before = np.zeros(len(numbers) + 1, bool)  # [i]: the key of place i is that of place i - 1
        np.equal(ordered[1:], ordered[:-1], out=as_before[1:-1])
        shared = as_before[:-1] | as_before[1:]
        members = numbers[shared]  # group after group
        starts = np.flatnonzero(~as_before[:-1][shared])
        if len(starts):
            firsts = np.repeat(np.minimum.reduceat(members, starts), np.diff(starts, append=len(members)))
            later = members != firsts
            pairs.append(np.stack([firsts[later], members[later]], axis=1).astype(pairs[0].dtype))
    return np.concatenate(pairs)


class Clusters:
    """Union-find over an array: which of n documents are connected, by pairs that come a chunk at a time.

    Holds 4 bytes a document (8 above 2^32 documents), whatever the number of pairs.
    """

    def __init__(self, n: int):
        self._parent: np.ndarray = np.arange(n, dtype=number_type(n))  # never above its document; a root is its own

    def join(self, pairs: np.ndarray) -> None:
        """Connect the two documents of each of (m, 2) pairs; may be a memory map."""
        for start in range(0, len(pairs), PAIRS):
            a, b = pairs[start : start + PAIRS].T
            while len(a):
                a, b = self._roots(a), self._roots(b)
                apart = a != b
                a, b = np.minimum(a, b)[apart], np.maximum(a, b)[apart]
                self._parent[b] = a  # of several for one root, one is written; the others come round again

    def _roots(self, documents: np.ndarray) -> np.ndarray:
        """The root of each document. On the way each is hung onto its grandparent: a path is halved by each round."""
        parents = self._parent[documents]
        while True:
            grandparents = self._parent[parents]
            if np.array_equal(parents, grandparents):
                return parents
            self._parent[documents] = grandparents
            parents = grandparents

    def lowest(self) -> np.ndarray:
        """For each of the n documents the lowest number of its cluster, (n,); a view that later joins change."""
        for start in range(0, len(self._parent), PAIRS):
            self._roots(np.arange(start, min(start + PAIRS, len(self._parent))))
        return self._parent


def rank(priorities: np.ndarray, id_hashes: np.ndarray) -> np.ndarray:
    """The order in which documents are preferred, lowest first, (n,) uint64.

    priorities: (n,) ints below 256, of the source; id_hashes: (n,) uint64, of the document's id.
    """
    return priorities.astype(np.uint64) << np.uint64(56) | id_hashes >> np.uint64(8)


def similarities(a: np.ndarray, b: np.ndarray, n: int) -> np.ndarray:
    """Jaccard similarities estimated from sketches a and b, (m, words) uint64 each, of n bits in use: (m,) floats.

    For n = 112 the standard error is 0.06 at a similarity of 0.7. Two unlike texts agree in half their bits.
    """
    return 1 - 2 * np.bitwise_count(a ^ b).sum(axis=1) / n


def survivors(
    digests: np.ndarray,
    bands: Iterable[np.ndarray],
    rank: np.ndarray,
    sources: np.ndarray | None = None,
    is_near: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """For each of n documents the number of the one with the same text that stays, and of the one that stays at last.

    digests: (n, 2) uint64; bands: one (n,) uint64 of keys a band, taken one after the other (rows of a memory map do);
    rank: (n,) uint64, all different, lower stays. Documents of one text are one document in any case. Near duplicates
    are sought among all documents, or only within each source if `sources` (n,) gives each document's. Documents that
    share a key are near duplicates, or only if is_near(numbers (m,), numbers (m,)) -> (m,) bool says so too.
    Returns exact, stays, (n,) each: document i stays if stays[i] == i; is an exact duplicate if exact[i] != i, else
    a near duplicate. stays[i] may be connected with i only through others of the cluster.
    About 35 bytes a document beside the inputs at the peak.
    """
    n = len(rank)
    # from here on documents are numbered by their place in this order
    order: np.ndarray = np.argsort(rank, kind="stable").astype(number_type(n))
    first = np.arange(n, dtype=order.dtype)
    pairs = band_pairs(digests[:, 0][order])
    pairs = pairs[digests[order[pairs[:, 0]], 1] == digests[order[pairs[:, 1]], 1]]
    first[pairs[:, 1]] = pairs[:, 0]
    exact = np.empty_like(order)
    exact[order] = order[first]

    order = order[first == np.arange(n)]
    clusters = Clusters(len(order))
    for keys in bands:
        keys = keys[order]
        if sources is not None:
            keys = mixed(keys + mixed(sources[order].astype(np.uint64) + np.uint64(1)))
        pairs = band_pairs(keys)
        for start in range(0, len(pairs), PAIRS):
            some = pairs[start : start + PAIRS]
            clusters.join(some if is_near is None else some[is_near(order[some[:, 0]], order[some[:, 1]])])
    stays = np.empty_like(exact)
    stays[order] = order[clusters.lowest()]
    return exact, stays[exact]


# ---- the same for a few documents


def find_duplicates(
    ids: Sequence[str], priorities: np.ndarray, digests: np.ndarray, keys: np.ndarray
) -> tuple[dict[str, str], dict[str, str]]:
    """Which documents are exact and which are near duplicates: id -> id of the document that stays for it.

    ids: n different ones; priorities (n,), lower stays; digests (n, 2); keys (n, bands). In any order.
    """
    by_rank = sorted(range(len(ids)), key=lambda i: (priorities[i], ids[i]))
    ranks = np.empty(len(ids), np.uint64)
    ranks[by_rank] = np.arange(len(ids), dtype=np.uint64)
    exact, stays = survivors(digests, keys.T, ranks)
    exact_duplicates = {ids[i]: ids[exact[i]] for i in range(len(ids)) if exact[i] != i}
    near_duplicates = {ids[i]: ids[stays[i]] for i in range(len(ids)) if exact[i] == i != stays[i]}
    return exact_duplicates, near_duplicates


def components(n: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """For each of n nodes, the lowest node that edges a[i] - b[i] connect it with."""
    clusters = Clusters(n)
    clusters.join(np.stack([a, b], axis=1))
    return clusters.lowest()
