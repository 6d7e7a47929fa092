"""The recipes: which sources, which rules each kind of text has to pass, and the numbers of the later stages.

Everything here is data and goes, resolved, into the manifest of the data folder.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from curation.filters import CodeQuality, English, GopherQuality, GopherRepetition, Readable, Rule
from curation.sources import LOCAL, MB, Source


@dataclass(frozen=True, kw_only=True)
class MinHash:
    """Near duplicates: documents that share all hashes of one band. 14 x 8 over 5-grams as in FineWeb.

    A pair of Jaccard similarity 0.85 is found with a probability of 99 %, one of 0.75 with 77 %, one of 0.5 with 5 %.
    """

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
            # manual repeats its phrases. Gopher's own limits dropped half of it, good manuals among the first (found
            # by reading); these drop bare lists and boilerplate.
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


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the user chooses; with the recipe it decides every byte of the data folder but the number of workers."""

    recipe: str
    limit_mb: float | None
    vocab_size: int
    heldout_percent: float

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise ValueError(f"unknown recipe {self.recipe!r}; allowed: {', '.join(RECIPES)}")
        if self.limit_mb is not None and not self.limit_mb > 0:
            raise ValueError(f"--limit-mb {self.limit_mb:g} reads nothing; give a number above 0, or leave it out")
        if not 512 <= self.vocab_size <= 1_000_000:
            raise ValueError(f"--vocab-size {self.vocab_size:,} is not between 512 and 1,000,000")
        if not 0 < self.heldout_percent <= 50:
            raise ValueError(f"--heldout-percent {self.heldout_percent:g} is not above 0 and at most 50")

    def budget_bytes(self, source: Source) -> float:
        return MB * min(source.budget_mb, self.limit_mb or source.budget_mb)

    def resolved(self) -> dict[str, Any]:
        """The settings and the recipe, as they go into the manifest: plain JSON values."""
        recipe = RECIPES[self.recipe]
        values = {
            **asdict(self),
            "min_heldout_documents": recipe.min_heldout_documents,
            "tokenizer_sample_mb": recipe.tokenizer_sample_mb,
            "shard_tokens": recipe.shard_tokens,
            "task_items": recipe.task_items,
            "minhash": asdict(recipe.minhash),
            "sources": {
                source.name: {"kind": source.kind, "budget_mb": self.budget_bytes(source) / MB}
                for source in recipe.sources
            },
            "rules": {
                kind: [{"rule": type(rule).__name__} | asdict(rule) for rule in rules]
                for kind, rules in recipe.rules.items()
            },
        }
        return json.loads(json.dumps(values))


def key_of(values: Any) -> str:
    """sha256 of plain JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
