"""Where the fast word split decides otherwise than datatrove's own (spaCy's), document by document, and why.

    python -m curation.audit --rules web --input FOLDER [--recipe eight] [--limit-mb 10]

Every rule that splits words or sentences is asked twice about every document, once with each split; rewrites of the
chain are applied on the way. Needs spaCy: pip install spacy.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from inspect import signature
from pathlib import Path
from typing import Any

from curation.filters import FINEWEB, LETTER, OURS, WORDLIKE, Rewrite, Rule, Split
from curation.readers import RawDocument, read_piece
from curation.recipe import RECIPES
from curation.sources import MB, OWN, list_files, make_pieces
from curation.words import Words, texts_of, words_of, words_of_list

PIECE_BYTES = 1 << 26


@lru_cache(maxsize=2)
def stock_texts(text: str) -> list[str]:
    from datatrove.utils.text import split_into_words

    return split_into_words(text, "eng")


@lru_cache(maxsize=2)
def stock_words(text: str) -> Words:
    return words_of_list(stock_texts(text))


def stock_sentences(line: str, most: int) -> int:
    from datatrove.utils.text import split_into_sentences

    return len(split_into_sentences(line, "eng"))


STOCK = Split(stock_words, stock_sentences)


@dataclass(frozen=True, kw_only=True)
class Difference:
    document: str
    rule: str
    ours: str | None  # what the rule says with our split
    stock: str | None
    why: str


@dataclass(kw_only=True)
class Audit:
    n_documents: int = 0
    asked: Counter[str] = field(default_factory=Counter)  # rule: documents
    dropped: Counter[str] = field(default_factory=Counter)  # rule: documents, with our split
    differences: list[Difference] = field(default_factory=list)  # kept by one and dropped by the other
    other_reason: Counter[str] = field(default_factory=Counter)  # rule: dropped by both, for different reasons


def audit(rules: Iterable[Rule | Rewrite], documents: Iterable[RawDocument]) -> Audit:
    """Ask the rules about the documents with both splits."""
    rules = list(rules)
    found = Audit()
    for document in documents:
        found.n_documents += 1
        text = document.text
        for rule in rules:
            if not hasattr(rule, "check"):
                text = rule.rewrite(text, document.metadata)
                continue
            if not text:
                break
            if "split" not in signature(rule.check).parameters:
                continue
            name = type(rule).__name__
            found.asked[name] += 1
            ours = rule.check(text, document.metadata, split=OURS)  # type: ignore[call-arg]
            stock = rule.check(text, document.metadata, split=STOCK)  # type: ignore[call-arg]
            found.dropped[name] += ours is not None
            if (ours is None) != (stock is None):
                why = reason(text, "sentences" in (ours or stock or ""))
                found.differences.append(Difference(document=document.id, rule=name, ours=ours, stock=stock, why=why))
            elif ours != stock:
                found.other_reason[name] += 1
    return found


def reason(text: str, of_sentences: bool) -> str:
    """What the two splits count in a text, and what they take for different words most often."""
    if of_sentences:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        counts = [sum(split.sentences(line, 1 << 30) for line in lines) for split in (OURS, STOCK)]
        return f"sentences {counts[0]} : {counts[1]}"
    measures = []
    for words in (words_of(text), stock_words(text)):
        n_wordlike = int(((words.flags & WORDLIKE) != 0).sum())
        alphabetic = int(((words.flags & LETTER) != 0).sum()) / max(len(words), 1)
        measures.append((len(words), n_wordlike, f"{alphabetic:.4f}"))
    common = Counter(different_words(texts_of(text), stock_texts(text))).most_common(3)
    return "; ".join(
        [
            *(
                f"{name} {a} : {b}"
                for name, a, b in zip(("tokens", "words", "alphabetic"), *measures, strict=True)
                if a != b
            ),
            *(f"{n} x {ours} : {stock}" for (ours, stock), n in common),
        ]
    )


def different_words(ours: list[str], stock: list[str]) -> Iterator[tuple[str, str]]:
    """The stretches that two splits of one text part otherwise, as (ours, stock) with spaces between the words."""
    i = j = 0
    while i < len(ours) and j < len(stock):
        one, two = [ours[i]], [stock[j]]
        i, j = i + 1, j + 1
        if one == two:
            continue
        length = len(one[0]) - len(two[0])
        while length and i < len(ours) and j < len(stock):
            if length < 0:
                one.append(ours[i])
                length += len(ours[i])
                i += 1
            else:
                two.append(stock[j])
                length -= len(stock[j])
                j += 1
        yield " ".join(one)[:60], " ".join(two)[:60]


def rules_of(recipe: str, kind: str) -> tuple[Any, ...]:
    """The chain of a kind of text in a recipe, or FineWeb's. Raises ValueError."""
    if kind == "fineweb":
        return FINEWEB
    if recipe not in RECIPES:
        raise ValueError(f"unknown recipe {recipe!r}; allowed: {', '.join(RECIPES)}")
    rules = RECIPES[recipe].rules
    if kind not in rules:
        raise ValueError(f"recipe {recipe} has no rules {kind!r}; allowed: fineweb, {', '.join(rules)}")
    return rules[kind]


def documents_of(folder: Path, limit_bytes: float) -> Iterator[RawDocument]:
    """The documents of a folder that can be read, in the order of the files' names, up to so many bytes of text."""
    source = replace(OWN, folder=str(folder), metadata_columns=("url", "language_score", "score"))
    read = 0
    for piece in make_pieces(source, list_files(source), PIECE_BYTES):
        for document in read_piece(source, piece):
            if document.problem is not None or not document.text:
                continue
            yield document
            read += len(document.text.encode())
            if read > limit_bytes:
                return


def print_audit(found: Audit) -> None:
    print(f"{found.n_documents:,} documents")
    for name, n in found.asked.items():
        different = sum(difference.rule == name for difference in found.differences)
        print(
            f"{name}: {found.dropped[name]:,} of {n:,} dropped; decided alike {100 * (1 - different / n):.2f} % "
            f"({different:,} otherwise; for another reason: {found.other_reason[name]:,})"
        )
    for difference in found.differences:
        print(f"\n{difference.rule} {difference.document}")
        print(f"  {difference.ours or 'kept'}; with datatrove's split {difference.stock or 'kept'}")
        print(f"  {difference.why}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m curation.audit", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--rules", required=True, help="a kind of text in the recipe, or fineweb")
    parser.add_argument("--input", type=Path, required=True, help="folder of text, JSON lines or parquet")
    parser.add_argument("--recipe", default="eight")
    parser.add_argument("--limit-mb", type=float, default=10, help="stop after so much text (default 10)")
    flags = parser.parse_args(argv)
    try:
        rules = rules_of(flags.recipe, flags.rules)
        if not flags.input.is_dir():
            raise FileNotFoundError(f"--input {flags.input} is not a folder")
        print_audit(audit(rules, documents_of(flags.input, flags.limit_mb * MB)))
    except (ValueError, FileNotFoundError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
