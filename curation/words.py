"""The one word split that every rule shares: array operations over a text's characters, no loop over its words.

It imitates the English tokenizer of spaCy, which datatrove's filters use: punctuation at the edges of what stands
between white space is split off sign by sign; inside, hyphens, commas, colons, slashes and full stops between letters
part words, and so do the endings n't, 's, 'll, 're, 've, 'd, 'm. Its lists of abbreviations, emoticons and units are
left out: `python -m curation.audit` counts what that changes.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np

PIECE_CHARACTERS = 1 << 18  # split so many at a time: the arrays of a piece stay small, however long the text
SPACE_BEFORE_CUT = re.compile(r"\s")

# What a character is, one bit each.
SPACE, LETTER, LOWER, UPPER, DIGIT = 1, 2, 4, 8, 16
OPENS, CLOSES = 32, 64  # a token of its own at the start, at the end of what stands between white space
QUOTE, ICON, SPECIAL = 128, 256, 512  # SPECIAL: needs a look at its neighbours
WORDLIKE = 1024  # no sign of punctuation: a token with none of these is no word for Gopher's counts

OPENS_ASCII = frozenset("%=,:;!?()[]{}<>_#*&'\"`$+")
CLOSES_ASCII = frozenset(",:;!?()[]{}<>_#*&'\"`")
QUOTES_ASCII = frozenset("'\"`")
OTHER_EDGES = frozenset("§—–…¿؟¡·।،۔؛٪。？！，、；：～")
# Signs that datatrove does not count as words, beside those of ASCII and control characters.
NO_WORD = frozenset(
    "—–”“„’´»«›‹…►∶１〈〉《》【】（）「」、，。．：；？！～％━"
    "؞؟۔։܀܁܂߹।॥၊။።፧፨᙮᜵᜶᠃᠉᥄᥅᪨᪩᪪᪫᭚᭛᭞᭟᰻᰼᱾᱿‼‽⁇⁈⁉⸮⸼꓿꘎꘏꛳꛷꡶꡷꣎꣏꤯꧈꧉꩝꩞꩟꫰꫱꯫﹒﹖﹗｡។៕៖៙៚"
)
FACES = (":)", "):", ":(", "(:", ":*", ";)", "(;", "''", ":]", "[:", ":}")  # and the end of a Python header
N_CHARACTERS = 0x20000  # characters above are rare ideographs: letters


@dataclass(frozen=True, eq=False)
class Words:
    """The words of a text in order, punctuation included, as arrays with an entry a word."""

    lengths: np.ndarray  # (n,) int64, characters
    flags: np.ndarray  # (n,) uint16, the bits above of all characters of the word together
    hashes: np.ndarray  # (n,) uint64, polynomial in RADIX of the characters' numbers

    def __len__(self) -> int:
        return len(self.lengths)


@lru_cache(maxsize=2)  # all rules of a document ask for the same split
def words_of(text: str) -> Words:
    """The split of a text; memory beside the result is bounded, however long the text is."""
    return joined([split_piece(piece) for piece in pieces(text)])


def words_of_list(words: list[str]) -> Words:
    """The same arrays for words that somebody else has split."""
    found = []
    for first in range(0, len(words), PIECE_CHARACTERS // 8):
        some = words[first : first + PIECE_CHARACTERS // 8]
        ends = np.cumsum(np.fromiter(map(len, some), np.int64, len(some)))
        codes = codes_of("".join(some))
        found.append(measured(codes, flags_of(codes), np.concatenate([[0], ends])))
    return joined(found)


def joined(parts: list[Words]) -> Words:
    if len(parts) == 1:
        return parts[0]
    empty = Words(np.zeros(0, np.int64), np.zeros(0, np.uint16), np.zeros(0, np.uint64))
    parts = parts or [empty]
    return Words(
        np.concatenate([part.lengths for part in parts]),
        np.concatenate([part.flags for part in parts]),
        np.concatenate([part.hashes for part in parts]),
    )


def pieces(text: str) -> Iterator[str]:
    """The text in pieces that end before white space; a longer run without any is cut."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        stop = start + PIECE_CHARACTERS
        space = SPACE_BEFORE_CUT.search(text, stop, stop + PIECE_CHARACTERS)
        stop = space.start() if space else stop
        yield text[start:stop]
        start = stop
    if start < len(text):
        yield text[start:]


# ---- characters


def codes_of(text: str) -> np.ndarray:
    """(n,) numbers of the characters: uint8 if all are ASCII, else uint32."""
    if text.isascii():
        return np.frombuffer(text.encode("ascii"), np.uint8)
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def flags_of(codes: np.ndarray) -> np.ndarray:
    """(n,) uint16, the bits of each character."""
    if codes.dtype == np.uint8:
        return ascii_table()[codes]
    return table()[np.minimum(codes, N_CHARACTERS - 1)]


@cache
def ascii_table() -> np.ndarray:
    return np.array([flags_of_character(chr(code)) for code in range(256)], np.uint16)


@cache
def table() -> np.ndarray:
    bits = np.fromiter(map(flags_of_character, map(chr, range(N_CHARACTERS))), np.uint16, N_CHARACTERS)
    bits[-1] = LETTER | LOWER | UPPER | WORDLIKE
    return bits


def flags_of_character(character: str) -> int:
    code = ord(character)
    if character.isspace():
        return SPACE
    wordlike = WORDLIKE if code >= 160 or character.isalnum() else 0
    if character in NO_WORD:
        wordlike = 0
    if character.isalpha():
        upper, lower = character.isupper(), character.islower()
        cased = upper or lower
        return LETTER | wordlike | (LOWER if lower or not cased else 0) | (UPPER if upper or not cased else 0)
    if "0" <= character <= "9":
        return DIGIT | wordlike
    if code < 128:
        opens, closes, quote = character in OPENS_ASCII, character in CLOSES_ASCII, character in QUOTES_ASCII
        icon = False
    else:
        category = unicodedata.category(character)
        quote = category in ("Pi", "Pf", "Ps", "Pe") or character == "´"
        icon = category == "So"
        edge = quote or icon or category == "Sc" or character in OTHER_EDGES
        opens, closes = edge, edge and category != "Sc" and character != "§"
        if not edge and character not in "‐‑−²³":
            return wordlike
    return (
        SPECIAL
        | wordlike
        | (OPENS if opens else 0)
        | (CLOSES if closes else 0)
        | (QUOTE if quote else 0)
        | (ICON if icon else 0)
    )


# ---- words


def split_piece(text: str) -> Words:
    codes = codes_of(text)
    flags = flags_of(codes)
    return measured(codes, flags, bounds_of(codes, flags))


def texts_of(text: str) -> list[str]:
    """The words themselves, for whoever wants to read them."""
    words = []
    for piece in pieces(text):
        codes = codes_of(piece)
        bounds = bounds_of(codes, flags_of(codes)).tolist()
        words += [piece[i:j] for i, j in zip(bounds, bounds[1:], strict=False) if not piece[i].isspace()]
    return words


def bounds_of(codes: np.ndarray, flags: np.ndarray) -> np.ndarray:
    """(m,) where each word, and each stretch of white space, begins: from 0 on, and last the number of characters."""
    n = len(codes)
    inside = np.zeros(n + 2, bool)  # one white space on either side
    np.equal(flags & SPACE, 0, out=inside[1:-1])
    bounds = np.zeros(n + 1, bool)  # bounds[i]: a word, or white space, begins at character i
    np.not_equal(inside[1:], inside[:-1], out=bounds)
    cut_signs(codes, flags, inside, bounds)
    bounds[0] = bounds[n] = True
    return np.flatnonzero(bounds)


@dataclass(frozen=True, eq=False)
class Signs:
    """The signs of punctuation in a piece, a tenth of its characters, and what stands beside them; arrays (k,)."""

    at: np.ndarray  # which character
    codes: np.ndarray
    flags: np.ndarray
    before: np.ndarray  # flags of the character before
    after: np.ndarray
    joins: np.ndarray  # (k + 1,) bool: sign i touches sign i - 1
    first: np.ndarray  # where the run of signs that touch one another begins
    last: np.ndarray

    def are(self, characters: str) -> np.ndarray:
        found = self.codes == ord(characters[0])
        for character in characters[1:]:
            found |= self.codes == ord(character)
        return found

    def previous(self) -> np.ndarray:
        """The sign that touches from before, or 0."""
        codes = np.zeros_like(self.codes)
        codes[1:] = np.where(self.joins[1:-1], self.codes[:-1], 0)
        return codes

    def following(self) -> np.ndarray:
        codes = np.zeros_like(self.codes)
        codes[:-1] = np.where(self.joins[1:-1], self.codes[1:], 0)
        return codes


def signs_of(codes: np.ndarray, flags: np.ndarray) -> Signs:
    at = np.flatnonzero(flags & SPECIAL)
    k, last = len(at), len(flags) - 1
    order = np.arange(k)
    joins = np.zeros(k + 1, bool)
    np.equal(at[1:] - at[:-1], 1, out=joins[1:-1])
    return Signs(
        at=at,
        codes=codes[at],
        flags=flags[at],
        before=np.where(at > 0, flags[at - 1], SPACE),
        after=np.where(at < last, flags[np.minimum(at + 1, last)], SPACE),
        joins=joins,
        first=np.maximum.accumulate(np.where(joins[:-1], 0, order)),
        last=np.minimum.accumulate(np.where(joins[1:], k - 1, order)[::-1])[::-1],
    )


def cut_signs(codes: np.ndarray, flags: np.ndarray, inside: np.ndarray, bounds: np.ndarray) -> None:
    """Set the bounds that signs of punctuation make."""
    signs = signs_of(codes, flags)
    k = len(signs.at)
    if not k:
        return
    dots = signs.are(".")
    same = np.zeros(k + 1, bool)  # full stops in a row are one token
    np.logical_and(signs.joins[1:-1], dots[1:] & dots[:-1], out=same[1:-1])
    ellipses = same[:-1] | same[1:]
    leading = leading_signs(signs, ellipses)
    trailing = trailing_signs(signs, ellipses, codes, flags)
    infixes = infix_signs(signs)
    dashes, dash_ends = dash_runs(signs, ~(leading | trailing))
    addresses = url_signs(signs, leading, np.flatnonzero(bounds[:-1] & inside[1:-1]))
    if addresses is not None:
        infixes &= ~addresses
        keep = ~addresses[dashes]
        dashes, dash_ends = dashes[keep], dash_ends[keep]

    alone = leading | trailing | infixes | ellipses | ((signs.flags & ICON) != 0)
    face = face_table()[np.minimum(signs.codes[:-1], 127), np.minimum(signs.codes[1:], 127)]
    face &= signs.joins[1:-1] & alone[1:] & alone[:-1]
    face[1:] &= ~face[:-1]
    same[1:-1] |= face
    bounds[signs.at[alone & ~same[:-1]]] = True
    bounds[signs.at[alone & ~same[1:]] + 1] = True
    bounds[signs.at[dashes]] = True
    bounds[signs.at[dash_ends] + 1] = True
    cut_contractions(codes, flags, signs.at[signs.are("'\u2019")], bounds)


def leading_signs(signs: Signs, ellipses: np.ndarray) -> np.ndarray:
    """(k,) bool: split off at the start of a chunk, for all signs before it are as well."""
    opens = (signs.flags & OPENS) != 0
    opens &= (signs.codes != ord("+")) | ((signs.after & DIGIT) == 0)
    opens |= ellipses
    barrier = np.maximum.accumulate(np.where(opens, -1, np.arange(len(opens))))  # the last sign that is not
    return opens & (barrier < signs.first) & ((signs.before[signs.first] & SPACE) != 0)


def trailing_signs(signs: Signs, ellipses: np.ndarray, codes: np.ndarray, flags: np.ndarray) -> np.ndarray:
    """(k,) bool: split off at the end of a chunk, for all signs behind it are as well."""
    two_before = np.where(signs.at > 1, flags[signs.at - 2], SPACE)
    initial = (two_before & (SPACE | QUOTE)) != 0  # the letter of "p.", and the last one of "e.g."
    initial |= (codes[signs.at - 2] == ord(".")) | (codes[signs.at - 2] == ord("("))
    full_stop = (signs.before & (DIGIT | CLOSES)) != 0
    full_stop |= ((signs.before & LOWER) != 0) & ~initial
    full_stop |= ((signs.before & UPPER) != 0) & ((two_before & UPPER) != 0)
    previous = signs.previous()
    full_stop |= (previous == ord("%")) | (previous == ord("+")) | (previous == ord("-"))
    closes = (signs.flags & CLOSES) != 0
    closes |= ((signs.before & DIGIT) != 0) & signs.are("%+$")
    closes |= (signs.are(".") & full_stop) | ellipses
    k = len(closes)
    barrier = np.minimum.accumulate(np.where(closes, k, np.arange(k))[::-1])[::-1]  # the next sign that is not
    return closes & (barrier > signs.last) & ((signs.after[signs.last] & SPACE) != 0)


def infix_signs(signs: Signs) -> np.ndarray:
    """(k,) bool: parts what stands on either side, inside a chunk."""
    letter_after = (signs.after & LETTER) != 0
    infixes = signs.are(",") & ((signs.before & LETTER) != 0) & letter_after
    infixes |= signs.are(".") & ((signs.before & (LOWER | QUOTE)) != 0) & ((signs.after & (UPPER | QUOTE)) != 0)
    infixes |= signs.are(":/=<>") & ((signs.before & (LETTER | DIGIT)) != 0) & letter_after
    number_after = ((signs.after & DIGIT) != 0) | (signs.following() == ord("-"))
    infixes |= signs.are("-+*^") & ((signs.before & DIGIT) != 0) & number_after
    return infixes


def dash_runs(signs: Signs, inner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last sign of the runs of one to three hyphens between letters: each is a token."""
    hyphens = signs.are("-\u2013\u2014~")
    order = np.arange(len(hyphens))
    starts = np.flatnonzero(hyphens & inner & (signs.first == order) & (signs.last - order < 3))
    ends = signs.last[starts]
    between = hyphens[ends] & ((signs.before[starts] & (LETTER | DIGIT)) != 0) & ((signs.after[ends] & LETTER) != 0)
    return starts[between], ends[between]


@cache
def face_table() -> np.ndarray:
    """(128, 128) bool: pairs of signs that are one token."""
    table = np.zeros((128, 128), bool)
    for face in FACES:
        table[ord(face[0]), ord(face[1])] = True
    return table


def url_signs(signs: Signs, leading: np.ndarray, chunk_starts: np.ndarray) -> np.ndarray | None:
    """(k,) whether a sign stands in a chunk that begins as an address does, which stays whole; None if none does."""
    at, codes = signs.at, signs.codes
    colons = np.flatnonzero(signs.are(":"))
    colons = colons[colons < len(at) - 2]
    colons = colons[(codes[colons + 1] == ord("/")) & (codes[colons + 2] == ord("/"))]
    colons = colons[at[colons + 2] - at[colons] == 2]
    if not len(colons):
        return None
    chunk = np.searchsorted(chunk_starts, at, "right")
    opened = np.concatenate([[True], leading])[colons]  # the sign before it is split off, or stands in another chunk
    colons = colons[(colons == 0) | opened | (chunk[colons - 1] != chunk[colons])]
    return np.isin(chunk, chunk[colons])


def cut_contractions(codes: np.ndarray, flags: np.ndarray, quotes: np.ndarray, bounds: np.ndarray) -> None:
    """Bounds before n't, 's, 'll, 're, 've, 'd and 'm at the end of a word."""
    n = len(codes)
    quotes = quotes[(quotes > 0) & (quotes < n - 1)]
    quotes = quotes[(flags[quotes - 1] & LETTER) != 0]
    if not len(quotes):
        return
    one = codes[quotes + 1] | 0x20
    two = np.where(quotes + 2 < n, codes[np.minimum(quotes + 2, n - 1)] | 0x20, 0)
    letter = np.concatenate([flags & (LETTER | DIGIT), np.zeros(2, flags.dtype)]) != 0
    ends_after_one = ~letter[quotes + 2]
    ends_after_two = ~letter[np.minimum(quotes + 3, n)]
    short = ends_after_one & ((one == ord("s")) | (one == ord("d")) | (one == ord("m")))
    long = ends_after_two & (
        ((one == ord("l")) & (two == ord("l"))) | ((two == ord("e")) & ((one == ord("r")) | (one == ord("v"))))
    )
    bounds[quotes[short | long]] = True
    negation = ends_after_one & (one == ord("t")) & ((codes[quotes - 1] | 0x20) == ord("n"))
    bounds[quotes[negation] - 1] = True


# ---- hashes of characters and of runs of words

RADIX = 0x9E3779B97F4A7C15  # odd: it has an inverse, so that a hash does not depend on where a word stands
INVERSE = pow(RADIX, -1, 1 << 64)
LOW_BITS = 12


def measured(codes: np.ndarray, flags: np.ndarray, bounds: np.ndarray) -> Words:
    """Words from each bound to the next one; those of white space are left out. bounds (m,): first 0, last n."""
    starts = bounds[:-1]
    if not len(starts):
        return Words(np.zeros(0, np.int64), np.zeros(0, np.uint16), np.zeros(0, np.uint64))
    word = (flags[starts] & SPACE) == 0
    kinds = np.bitwise_or.reduceat(flags, starts)[word]
    powers, inverses = piece_powers()
    if len(codes) > len(powers):  # words of somebody else's split, longer than any piece
        powers, inverses = powers_up_to(len(codes), RADIX), powers_up_to(len(codes), INVERSE)
    sums = np.add.reduceat(codes * powers[: len(codes)], starts)[word]
    return Words(np.diff(bounds)[word].astype(np.int64), kinds, sums * inverses[starts[word]])


@cache
def piece_powers() -> tuple[np.ndarray, np.ndarray]:
    return powers_up_to(2 * PIECE_CHARACTERS, RADIX), powers_up_to(2 * PIECE_CHARACTERS, INVERSE)


def powers_up_to(n: int, base: int) -> np.ndarray:
    """(n,) uint64: base to the power of 0 to n-1, modulo 2^64."""
    powers = np.full(n, base, np.uint64)
    powers[:1] = 1
    return np.cumprod(powers, dtype=np.uint64)


@cache
def short_powers(base: int) -> tuple[np.ndarray, np.ndarray]:
    """base to the power of i, and of i * 2^LOW_BITS, for i below 2^LOW_BITS and 2^14."""
    return powers_up_to(1 << LOW_BITS, base), powers_up_to(1 << 14, pow(base, 1 << LOW_BITS, 1 << 64))


def power(base: int, exponents: np.ndarray) -> np.ndarray:
    """uint64: base to the power of the exponents (below 2^26), modulo 2^64."""
    low, high = short_powers(base)
    if not len(exponents) or exponents[-1] < len(low):  # they grow
        return low[exponents]
    return low[exponents & (len(low) - 1)] * high[exponents >> LOW_BITS]


@dataclass(frozen=True, eq=False)
class WordSums:
    """Hashes of runs of words, equal where the words put together with `gap` characters between them are equal."""

    offsets: np.ndarray  # (n + 1,) int64: characters before each word, gaps included
    sums: np.ndarray  # (n + 1,) uint64
    inverses: np.ndarray  # (n + 1,) uint64

    def keys(self, n: int) -> np.ndarray:
        """(len(words) - n + 1,) uint64, one for each run of n words."""
        return (self.sums[n:] - self.sums[:-n]) * self.inverses[:-n]

    def characters(self, n: int) -> np.ndarray:
        """(len(words) - n + 1,) int64: characters of each run of n words, with the gap after the last one."""
        return self.offsets[n:] - self.offsets[:-n]


def word_sums(words: Words, gap: int) -> WordSums:
    n = len(words)
    offsets = np.zeros(n + 1, np.int64)
    np.cumsum(words.lengths + gap, out=offsets[1:])
    sums = np.zeros(n + 1, np.uint64)
    inverses = np.ones(n + 1, np.uint64)
    for first in range(0, n, PIECE_CHARACTERS):
        some = slice(first, first + PIECE_CHARACTERS)
        sums[1:][some] = words.hashes[some] * power(RADIX, offsets[:-1][some])
        inverses[1:][some] = power(INVERSE, offsets[1:][some])
    return WordSums(offsets, np.cumsum(sums, out=sums), inverses)
