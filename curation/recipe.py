"""The recipes: which sources, which rules each kind of text has to pass, and the numbers of the later stages.

Everything here is data and goes, resolved, into the manifest of the data folder.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from curation.filters import CodeQuality, English, GopherQuality, GopherRepetition, Readable, Rule
from curation.sources import LOCAL, Source


@dataclass(frozen=True, kw_only=True)
class MinHash:
    """Near duplicates: documents that share all hashes of one band. 14 x 8 over 5-grams as in FineWeb:
    a pair of Jaccard similarity 0.75 is found with a probability of 77 %, one of 0.85 with 99 %, one of 0.5 with 5 %."""

    ngram_words: int = 5
    bands: int = 14
    rows: int = 8


@dataclass(frozen=True, kw_only=True)
class Recipe:
    description: str
    sources: tuple[Source, ...]
    rules: Mapping[str, tuple[Rule, ...]]  # by kind of text, in the order in which they are asked
    minhash: MinHash = MinHash()
    min_heldout_documents: int = 5  # of each source, however few the percentage gives
    tokenizer_sample_mb: float = 50  # train the tokenizer on no more text than this
    shard_tokens: int = 1 << 26  # begin a new shard after so many
    task_items: int = 200  # of each kind of evaluation item


RECIPES = {
    "local": Recipe(
        description="text that every machine with Python has",
        sources=LOCAL,
        rules={
            "code": (
                Readable(),
                English(max_non_ascii_fraction=0.2),
                CodeQuality(),
            ),
            # Reference documentation, not web pages: tables, signatures and examples are its substance, and a long
            # manual repeats its phrases. Gopher's own limits dropped half of it, good manuals first (read, not guessed);
            # these drop bare lists and boilerplate.
            "prose": (
                Readable(),
                GopherQuality(min_alphabetic_words=0.65),
                English(max_non_ascii_fraction=0.2, min_stop_words=2),
                GopherRepetition(
                    max_duplicate_lines=0.40,
                    max_duplicate_line_characters=0.30,
                    max_duplicate_paragraphs=0.40,
                    max_duplicate_paragraph_characters=0.30,
                    max_top_ngram=((2, 0.20), (3, 0.25), (4, 0.25)),
                    max_duplicate_ngram=((5, 0.45), (6, 0.43), (7, 0.41), (8, 0.39), (9, 0.37), (10, 0.35)),
                ),
            ),
        },
    ),
}
