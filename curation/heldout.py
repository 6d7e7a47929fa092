"""The held-out split: which documents are in it, and the evaluation items that are made from them.

Both kinds of item are exact pieces of held-out text around a single space:
    continuation    context + " " + choices[answer] is in the document, the other choices are from other documents
    last_word       context + " " + target is in the document, and the context has the target already, as in LAMBADA
"""

import random
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, zip_longest
from typing import Any

import numpy as np

CHUNK = re.compile(r"\S+")
CONTEXT_WORDS = (60, 120)
CHOICE_WORDS = (15, 25)
PASSAGE_WORDS = (50, 100)
LONGEST_PASSAGE = 200  # where the line begins far back
ITEMS_PER_DOCUMENT = 4
# A word of four characters or more behind a single space, at the end of a sentence or of a line.
LAST_WORD = re.compile(r"(?<=\S )([A-Za-z_]\w{3,})(?=[.!?][\"')\]]*\s|[.!?,;:\"')\]}]*\n)")
TOO_COMMON = {"also", "from", "have", "into", "self", "than", "that", "them", "then", "they", "this", "when", "with"}

Item = dict[str, Any]


def choose_heldout(numbers: np.ndarray, percent: float, minimum: int) -> np.ndarray:
    """Which documents of one source are held out, as booleans (n,).

    numbers: (n,) uint64, a hash of each text. Those below the percentage's share of all numbers are held out: a
    document keeps its split when others come or go. Where these are fewer than `minimum`, the lowest `minimum` are
    held out, but never more than half of the source.
    """
    chosen = numbers < np.uint64(percent / 100 * 2**64)
    wanted = min(minimum, len(numbers) // 2)
    if chosen.sum() < wanted:
        chosen = np.zeros(len(numbers), bool)
        chosen[np.argsort(numbers)[:wanted]] = True
    return chosen


def continuation_items(documents: Mapping[str, Sequence[tuple[str, str]]], n_items: int) -> list[Item]:
    """Up to n_items, spread over the sources; documents: (id, text) of each source."""
    return spread({source: list(continuations(source, texts)) for source, texts in documents.items()}, n_items)


def continuations(source: str, documents: Sequence[tuple[str, str]]) -> Iterator[Item]:
    for document_id, text in documents:
        chunks = list(CHUNK.finditer(text))
        for region, (first, last) in enumerate(regions(len(chunks), max(CONTEXT_WORDS) + max(CHOICE_WORDS))):
            draw = random.Random(f"continuation {document_id} {region}")
            start = line_start(text, chunks, draw.randrange(first, last))
            n_choice = draw.randint(*CHOICE_WORDS)
            cut = next_single_space(text, chunks, start + draw.randint(*CONTEXT_WORDS))
            others = [other for other in documents if other[0] != document_id]
            draw.shuffle(others)
            pieces = (piece for _, other in others if (piece := passage(other, n_choice, draw)))
            choices = list(islice(pieces, 3))
            if cut is None or cut + n_choice > len(chunks) or len(choices) < 3:
                continue
            truth = text[chunks[cut].start() : chunks[cut + n_choice - 1].end()]
            answer = draw.randrange(4)
            choices.insert(answer, truth)
            yield {
                "id": f"{document_id}@{chunks[cut].start()}",
                "source": source,
                "context": text[chunks[start].start() : chunks[cut - 1].end()],
                "choices": choices,
                "answer": answer,
            }


def last_word_items(documents: Mapping[str, Sequence[tuple[str, str]]], n_items: int) -> list[Item]:
    """Up to n_items, spread over the sources; documents: (id, text) of each source."""
    return spread({source: list(last_words(source, texts)) for source, texts in documents.items()}, n_items)


def last_words(source: str, documents: Sequence[tuple[str, str]]) -> Iterator[Item]:
    for document_id, text in documents:
        chunks = list(CHUNK.finditer(text))
        starts = [chunk.start() for chunk in chunks]
        for region, (first, last) in enumerate(regions(len(chunks), max(PASSAGE_WORDS))):
            draw = random.Random(f"last_word {document_id} {region}")
            found = []
            ends = starts[first + max(PASSAGE_WORDS)], chunks[last + max(PASSAGE_WORDS) - 1].end()
            for match in LAST_WORD.finditer(text, *ends):
                at = bisect_right(starts, match.start()) - 1
                begin = line_start(text, chunks, at - draw.randint(*PASSAGE_WORDS))
                context = text[starts[begin] : match.start() - 1]
                if match[0].lower() in TOO_COMMON or at - begin > LONGEST_PASSAGE:
                    continue
                if re.search(rf"\b{re.escape(match[0])}\b", context):
                    found.append((match, context))
            if found:
                match, context = draw.choice(found)
                yield {
                    "id": f"{document_id}@{match.start()}",
                    "source": source,
                    "context": context,
                    "target": match[0],
                }


def spread(items: Mapping[str, list[Item]], n_items: int) -> list[Item]:
    """The first of each source, then the second of each..., until there are n_items."""
    for source, found in items.items():
        random.Random(f"order {source}").shuffle(found)
    return [item for round_ in zip_longest(*items.values()) for item in round_ if item][:n_items]


def regions(n_chunks: int, margin: int) -> list[tuple[int, int]]:
    """Up to ITEMS_PER_DOCUMENT equal ranges of positions, the last of which ends `margin` before the end."""
    usable = n_chunks - margin
    n = min(ITEMS_PER_DOCUMENT, usable // margin + 1) if usable > 0 else 0
    return [(usable * i // n, max(usable * (i + 1) // n, usable * i // n + 1)) for i in range(n)]


def line_start(text: str, chunks: Sequence[re.Match[str]], position: int) -> int:
    """The nearest position at or before this one where a line begins."""
    while position > 0 and "\n" not in text[chunks[position - 1].end() : chunks[position].start()]:
        position -= 1
    return position


def next_single_space(text: str, chunks: Sequence[re.Match[str]], position: int) -> int | None:
    """The first position from this one on that has exactly one space before it."""
    for at in range(max(position, 1), len(chunks)):
        if text[chunks[at - 1].end() : chunks[at].start()] == " ":
            return at
    return None


def passage(text: str, n_words: int, draw: random.Random) -> str | None:
    """Some n_words of the text, from behind a single space on."""
    chunks = list(CHUNK.finditer(text))
    if len(chunks) <= n_words + 1:
        return None
    start = next_single_space(text, chunks, draw.randrange(1, len(chunks) - n_words))
    if start is None or start + n_words > len(chunks):
        return None
    return text[chunks[start].start() : chunks[start + n_words - 1].end()]
