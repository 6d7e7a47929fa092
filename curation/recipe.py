"""The recipes: which sources, which rules each kind of text has to pass, and the numbers of the later stages.

Everything here is data and goes, resolved, into the manifest of the data folder.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from curation.decontaminate import Decontaminate
from curation.filters import FINEWEB as FINEWEB_RULES
from curation.filters import (
    CodeQuality,
    English,
    GopherQuality,
    GopherRepetition,
    Language,
    MinScore,
    PersonalData,
    Readable,
    Rewrite,
    Rule,
    Shorten,
    Url,
    language_model_file,
)
from curation.quality import Quality
from curation.shards import file_sha256
from curation.sources import ALPACA, COSMOPEDIA, EIGHT, FINEWEB, LOCAL, MEDQA, OWN, WEB_EDU, Source


@dataclass(frozen=True, kw_only=True)
class MinHash:
    """Near duplicates: documents that share all hashes of one band, and look alike when their sketches are compared.

    14 x 8 over 5-grams as in FineWeb: a pair of Jaccard similarity 0.85 shares a band with a probability of 99 %, one
    of 0.75 with 77 %, one of 0.5 with 5 %; the second look leaves 1 % of those.
    """

    ngram_words: int = 5
    bands: int = 14
    rows: int = 8
    min_similarity: float = 0.65  # estimated from the sketches, of a pair that shares a band


@dataclass(frozen=True, kw_only=True)
class Recipe:
    description: str
    sources: tuple[Source, ...]  # of two duplicates, the one from the earlier source is kept
    rules: Mapping[str, tuple[Rule | Rewrite, ...]]  # by kind of text, in the order in which they are asked
    minhash: MinHash = MinHash()
    near_duplicates_across: bool = True  # of the sources, not only within each
    vocab_size: int = 50_304  # of the tokenizer that is trained where none is given; a multiple of 128
    tokenizer: str | None = None  # the published one that the recipe is made for, to be given as a file
    heldout_percent: float = 3.0
    min_heldout_documents: int = 5  # of each source, however few the percentage gives
    on_short: Literal["fail", "renormalise"] = "fail"  # when a source has not enough for its budget and epochs
    purpose: str = "pretraining"
    tokenizer_sample_mb: float = 50  # train the tokenizer on no more text than this
    shard_tokens: int = 1 << 26  # begin a new shard after so many
    task_items: int = 200  # of each kind of evaluation item
    documents_for_items: int = 2000  # of each source, from which the items are made
    piece_mb: float = 64  # of files in a unit of work
    keep_dropped: bool = False  # every document that a rule dropped, in dropped/: for corpora that one person reads


# Reference text repeats its phrases, its headings and the first words of its lines; bare lists still fall.
REFERENCE_REPETITION = GopherRepetition(
    max_duplicate_lines=0.40,
    max_duplicate_line_characters=0.30,
    max_duplicate_paragraphs=0.40,
    max_duplicate_paragraph_characters=0.30,
    max_top_ngram=((2, 0.20), (3, 0.25), (4, 0.25)),
    max_duplicate_ngram=((5, 0.45), (6, 0.43), (7, 0.41), (8, 0.39), (9, 0.37), (10, 0.35)),
)
LOCAL_CODE = (Readable(), English(max_non_ascii_fraction=0.2), CodeQuality())
CODE = (*LOCAL_CODE, PersonalData(ips=None))  # numbers with dots are versions and examples there
WEB = (Readable(), *FINEWEB_RULES)
# Pages that have passed FineWeb's rules where they were published. The lists of addresses may be newer here.
CLEAN_WEB = (Readable(), Url(), Language(), PersonalData())
# Books and papers may be long, and hold formulas, tables and references.
LONG = (
    Readable(),
    Language(minimum=0.5),
    GopherQuality(max_words=None, max_symbol_ratio=0.2, max_ellipsis_lines=None, min_alphabetic_words=0.5),
    REFERENCE_REPETITION,
    PersonalData(),
)
# One language by its folder. A model of languages takes tables and names for others; short articles are articles.
WIKI = (
    Readable(),
    English(max_non_ascii_fraction=0.3),
    GopherQuality(
        min_words=30,
        max_words=None,
        max_symbol_ratio=0.2,
        max_bullet_lines=None,
        max_ellipsis_lines=None,
        min_alphabetic_words=0.4,
    ),
    REFERENCE_REPETITION,
)
# Questions and answers hold code, quotations and lists.
QA = (
    Readable(),
    Language(minimum=0.4),
    GopherQuality(
        min_words=20, max_symbol_ratio=0.3, max_bullet_lines=None, min_alphabetic_words=0.4, min_stop_words=1
    ),
    REFERENCE_REPETITION,
    PersonalData(),
)
# Formulas are signs and numbers, and a worked problem says the same thing again. What is left of Gopher's rules finds
# pages that are menus.
MATH = (
    Readable(),
    Language(minimum=0.3),
    GopherQuality(
        min_words=20,
        min_mean_word_length=2,
        max_symbol_ratio=0.3,
        max_bullet_lines=None,
        min_alphabetic_words=0.3,
        min_stop_words=None,
    ),
    replace(REFERENCE_REPETITION, max_top_ngram=()),
    PersonalData(),
)
WEB_KINDS = {"web", "clean_web"}
JUDGED_KINDS = WEB_KINDS | {"own"}  # by a quality classifier, where one is given
FILES = ("tokenizer", "decontaminate", "language_model", "quality_model")  # settings whose content counts
STOCK = ("filters", "dedup", "tokenizer")  # what datatrove's own steps can do instead of ours
LIGHT = (Readable(),)  # of text of which every document was chosen, or written for the purpose

RECIPES = {
    "local": Recipe(
        description="text that every machine with Python has",
        sources=LOCAL,
        vocab_size=4096,
        piece_mb=2,
        keep_dropped=True,
        rules={
            "code": LOCAL_CODE,
            # Gopher's own limits dropped half of it, good manuals among the first (found by reading).
            "prose": (
                Readable(),
                GopherQuality(min_alphabetic_words=0.4),
                English(max_non_ascii_fraction=0.2, min_stop_words=2),
                REFERENCE_REPETITION,
            ),
        },
    ),
    "eight": Recipe(
        description="eight sources, 100 billion tokens: web, textbooks, encyclopaedia, science, questions, code, math",
        sources=EIGHT,
        rules={
            "clean_web": CLEAN_WEB,
            "web": WEB,
            "long": LONG,
            "wiki": WIKI,
            "qa": QA,
            "code": CODE,
            "math": MATH,
        },
        on_short="renormalise",
        heldout_percent=0.05,
        min_heldout_documents=20,
        tokenizer_sample_mb=500,
    ),
    "fineweb-edu-medqa": Recipe(
        description="educational web pages, and a tenth of medical examination questions as far as their epochs reach",
        sources=(MEDQA, replace(WEB_EDU, budget_tokens=90_000_000_000)),
        rules={"clean_web": CLEAN_WEB, "questions": LIGHT},
        tokenizer="Qwen/Qwen2.5-0.5B",
        on_short="renormalise",
        heldout_percent=0.05,
        min_heldout_documents=20,
    ),
    "cosmopedia": Recipe(
        description="synthetic textbooks and stories, 4,000 characters of each at most, 15 % held out",
        sources=(COSMOPEDIA,),
        rules={"synthetic": (Readable(), Shorten(max_characters=4000))},
        tokenizer="HuggingFaceTB/SmolLM-135M",
        heldout_percent=15.0,
    ),
    "fineweb": Recipe(
        description="web pages, 100 billion tokens",
        sources=(FINEWEB,),
        rules={"clean_web": CLEAN_WEB},
        on_short="renormalise",
        heldout_percent=0.05,
        min_heldout_documents=20,
        tokenizer_sample_mb=500,
    ),
    "alpaca": Recipe(
        description="instructions and responses; not for commercial use",
        sources=(ALPACA,),
        rules={"questions": LIGHT},
        purpose="fine-tuning only: CC-BY-NC-4.0",
    ),
    "own": Recipe(
        description="a folder of your own text: .txt, .md, .rst, and JSON lines or parquet with a column `text`",
        sources=(OWN,),
        rules={"own": LIGHT},
        vocab_size=32_768,
        piece_mb=16,
        keep_dropped=True,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the user chooses; with the recipe it decides every byte of the data folder but the number of workers."""

    recipe: str
    limit_mb: float | None = None  # of text of each source
    vocab_size: int
    heldout_percent: float
    tokens: int | None = None  # scale the token budgets of the sources to this sum
    input: str | None = None  # the folder of the recipe `own`
    tokenizer: str | None = None  # file of a tokenizer to use; None: train one
    stock: tuple[str, ...] = ()  # of STOCK: what datatrove's own steps do instead of ours
    decontaminate: str | None = None  # file of an index of evaluation items; None: documents that hold them stay
    language_model: str | None = None  # lid.176.bin, for the smaller model that is installed
    min_language_score: float | None = None  # of web pages, in their own column
    quality_model: str | None = None  # file of a classifier (quality.py) that web pages and own text have to pass
    quality_label: str | None = None  # which label of it means good, where fastText made it
    min_quality: float | None = None  # None: as the rule says

    def __post_init__(self) -> None:
        recipe = recipe_of(self.recipe)
        if self.limit_mb is not None and not self.limit_mb > 0:
            raise ValueError(f"--limit-mb {self.limit_mb:g} reads nothing; give a number above 0, or leave it out")
        if not 512 <= self.vocab_size <= 1_000_000:
            raise ValueError(f"--vocab-size {self.vocab_size:,} is not between 512 and 1,000,000")
        if not 0 < self.heldout_percent <= 50:
            raise ValueError(f"--heldout-percent {self.heldout_percent:g} is not above 0 and at most 50")
        if self.tokens is not None and all(source.budget_tokens is None for source in recipe.sources):
            raise ValueError(f"--tokens has no effect: recipe {self.recipe} takes all its text; use --limit-mb")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"--tokens {self.tokens:,} is not a number of tokens; give 1 or more, as 250M or 1B")
        if (self.input is not None) != (self.recipe == "own"):
            raise ValueError("--input FOLDER goes with --recipe own, and --recipe own needs it")
        if self.input is not None and not Path(self.input).is_dir():
            raise ValueError(f"--input {self.input} is not a folder")
        if self.tokenizer is None and recipe.tokenizer is not None:
            raise ValueError(
                f"recipe {self.recipe} is made for the tokenizer of {recipe.tokenizer}: give its tokenizer.json "
                "with --tokenizer FILE"
            )
        for name in FILES:
            if (path := getattr(self, name)) is not None and not Path(path).is_file():
                raise ValueError(f"--{name.replace('_', '-')} {path} is not a file")
        if any(isinstance(rule, Language) for source in recipe.sources for rule in recipe.rules[source.kind]):
            language_model_file(self.language_model)  # which raises: no document can be judged without
        if self.min_language_score is not None and not WEB_KINDS & {source.kind for source in recipe.sources}:
            raise ValueError(f"--min-language-score has no effect: recipe {self.recipe} has no web pages")
        if unknown := set(self.stock) - set(STOCK):
            raise ValueError(
                f"--stock {min(unknown)} is not a step that datatrove's own can do here; allowed: {', '.join(STOCK)}"
            )
        if "tokenizer" in self.stock and (self.tokenizer is None or Path(self.tokenizer).read_bytes()[:1] != b"{"):
            given = "trained here" if self.tokenizer is None else self.tokenizer
            raise ValueError(
                f"--stock tokenizer takes no sentencepiece model ({given}); give a tokenizer.json with --tokenizer"
            )
        if self.quality_model is None and (self.min_quality is not None or self.quality_label is not None):
            raise ValueError("--min-quality and --quality-label have no effect without --quality-model FILE")
        if self.quality_model is not None and not JUDGED_KINDS & {source.kind for source in recipe.sources}:
            raise ValueError(f"--quality-model has no effect: recipe {self.recipe} has no web pages")

    def open_files(self) -> None:
        """Open the chosen index, models and tokenizer as a run will, so that a wrong one is refused before it starts.

        Raises ValueError: on a worker it would seem the fault of each document that is judged by it.
        """
        for kind in RECIPES[self.recipe].rules:
            for rule in self.rules_of(kind):
                if isinstance(rule, Decontaminate | Language | Quality):
                    rule.check("", {})
        if self.tokenizer is not None:
            from curation.tokenizer import load_tokenizer

            load_tokenizer(self.tokenizer)

    @classmethod
    def chosen(cls, recipe: str, **given: Any) -> "Settings":
        """Settings in which what is None, or not given, is as the recipe says."""
        defaults = recipe_of(recipe)
        own = {"vocab_size": defaults.vocab_size, "heldout_percent": defaults.heldout_percent}
        return cls(recipe=recipe, **(own | {name: value for name, value in given.items() if value is not None}))

    @property
    def sources(self) -> tuple[Source, ...]:
        """The recipe's sources with the folder, limits and token budgets that were chosen."""
        sources = RECIPES[self.recipe].sources
        total = sum(source.budget_tokens or 0 for source in sources)
        changed = []
        for source in sources:
            budget_mb, budget_tokens = source.budget_mb, source.budget_tokens
            if self.limit_mb is not None:
                budget_mb = min(self.limit_mb, budget_mb or self.limit_mb)
            if self.tokens is not None and budget_tokens is not None:
                budget_tokens = budget_tokens * self.tokens // total
            folder = os.path.abspath(self.input) if source is OWN and self.input is not None else source.folder
            changed.append(replace(source, budget_mb=budget_mb, budget_tokens=budget_tokens, folder=folder))
        return tuple(changed)

    def rules(self, source: Source) -> tuple[Rule | Rewrite, ...]:
        return self.rules_of(source.kind)

    def rules_of(self, kind: str) -> tuple[Rule | Rewrite, ...]:
        """The recipe's rules for a kind of text, with the models and limits that were chosen, and decontamination."""
        rules: list[Rule | Rewrite] = [
            replace(rule, model_file=self.language_model) if isinstance(rule, Language) else rule
            for rule in RECIPES[self.recipe].rules[kind]
        ]
        if self.min_language_score is not None and kind in WEB_KINDS:
            rules.insert(1, MinScore(column="language_score", minimum=self.min_language_score))
        if self.quality_model is not None and kind in JUDGED_KINDS:
            quality = Quality(model_file=self.quality_model, label=self.quality_label)
            rules.append(quality if self.min_quality is None else replace(quality, minimum=self.min_quality))
        if self.decontaminate is not None:
            rules.append(Decontaminate(index_file=self.decontaminate))
        return tuple(rules)

    def resolved(self) -> dict[str, Any]:
        """The settings and the recipe, as they go into the manifest: plain JSON values, the same on every machine."""
        recipe = RECIPES[self.recipe]
        given = asdict(self)
        for name in FILES:
            given[name] = None if given[name] is None else content_of(given[name])
        given.pop("input")  # what is in it counts, not where it is
        values = {
            **given,
            "min_heldout_documents": recipe.min_heldout_documents,
            "on_short": recipe.on_short,
            "near_duplicates_across": recipe.near_duplicates_across,
            "purpose": recipe.purpose,
            "tokenizer_sample_mb": recipe.tokenizer_sample_mb,
            "shard_tokens": recipe.shard_tokens,
            "task_items": recipe.task_items,
            "minhash": asdict(recipe.minhash),
            "sources": {source.name: source_values(source) for source in self.sources},
            "rules": {kind: [rule_values(rule) for rule in self.rules_of(kind)] for kind in recipe.rules},
        }
        return json.loads(json.dumps(values))


def recipe_of(name: str) -> Recipe:
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; allowed: {', '.join(RECIPES)}")
    return RECIPES[name]


def tokens_of(text: str) -> int:
    """A number of tokens as it is written: 1B, 250M, 10K or plain digits. Raises ValueError."""
    scale = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}.get(text[-1:].upper(), 1)
    try:
        return int(float(text[:-1] if scale > 1 else text) * scale)
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is not a number of tokens; write it as 1B, 250M, 10K or in digits") from None


def source_values(source: Source) -> dict[str, Any]:
    """What of a source decides its documents, and its licence."""
    return {
        "kind": source.kind,
        "licence": source.licence,
        "repo": source.repo,
        "revision": source.revision,
        "paths": source.paths,
        "text_columns": source.text_columns,
        "id_column": source.id_column,
        "budget_mb": source.budget_mb,
        "budget_tokens": source.budget_tokens,
        "max_epochs": source.max_epochs,
        "needed_bytes": None if source.needed_bytes == float("inf") else round(source.needed_bytes),
    }


def rule_values(rule: Rule | Rewrite) -> dict[str, Any]:
    """Name and thresholds; of fields that name a file (`..._file`) what is in it, not where it is."""
    fields = asdict(rule)
    if isinstance(rule, Language):
        fields["model_file"] = language_model_file(rule.model_file)
    for name in fields:
        if name.endswith("_file") and fields[name] is not None:
            fields[name] = content_of(fields[name])
    return {"rule": type(rule).__name__} | fields


def content_of(path: str | Path) -> str:
    stat = os.stat(path)
    return sha256_once(str(path), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)
def sha256_once(path: str, size_bytes: int, mtime_ns: int) -> str:
    """sha256 of a file, read once as long as it stays the same."""
    return "sha256:" + file_sha256(Path(path))
