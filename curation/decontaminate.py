"""Decontamination: finds documents that hold items of the evaluation suites, offline and from local files.

    python -m curation.decontaminate build --items FOLDER... --out decontamination.index
    python -m curation.decontaminate check --index decontamination.index --input pages.jsonl.zst

The folders hold the suites' files as they are downloaded (.jsonl, .jsonl.gz, .jsonl.zst, .parquet; .txt with a
passage in each line), below a folder, or under a name, that has the benchmark's in it: `mmlu/...`,
`gsm8k_test.jsonl`. BENCHMARKS says which columns are questions, choices, answers and passages; files of other
benchmarks need the columns stem, choices, answer, passage.

How it works. Text becomes words: letters and digits, lower case, without accents; everything else separates, so that
punctuation, spacing and typography make no difference. Each word has an information in nats: its rarity among the
items (IDF). Each item becomes units of about UNIT_WORDS words, and the index knows where every run of NGRAM words
occurs in them. Where such runs cover c nats of a unit of t nats, within twice its length of a document, the evidence
that it was copied is c * c / t: all of a short question says as much as a half of a longer one. A question that says
little ("What is the capital of France?") is looked for together with the answer, or the choices, that follow it. The
idea of weighing n-gram overlap by IDF, questions and answers apart, is decon's (github.com/allenai/decon).
"""

import argparse
import gzip
import io
import json
import re
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np

from curation.dedup import mixed
from curation.shards import new_file
from curation.words import powers_up_to

FORMAT = 1
NGRAM = 5  # words in a run that is looked up
UNIT_WORDS = 32  # a long passage is cut into units of this length, so that a part of it is found, too
MIN_EVIDENCE = 28.0  # nats; of 26,000 clean documents 0.18 % have as much as 22, 0.09 % 26, 0.07 % 28, 0.03 % 36
MIN_INDEXED = 20.0  # nats; what says less is not looked for, whatever min_evidence is
RAREST = 10.0  # nats in a word that a single item has, however many items there are
MIN_STEM = 0.6  # of a short question has to be there before its answer is looked for
COMMON = """a about after all also an and any are as at be because been before best but by can could did do does each
    first following for from had has have he her him his how i if in into is it its like make many may me more most my
    new no not now of on one only or other our out over s said she should so some such than that the their them then
    there these they this time to two up use was we were what when where which who will with would you your"""
NUMBERS = "one two three four five six seven eight nine ten eleven twelve"  # with those in digits, half a word each
MAX_COMMON = 2.0  # nats in such a word: a few items cannot tell how common it is
TAIL_SLACK = 24  # words between a question and its choices, and among these, beyond twice their own number
MAX_POSTINGS = 64  # a run of words that occurs at more places of the items says nothing: "which of the following is"
CHUNK_CHARACTERS = 1 << 18  # a document is looked through in chunks, which bounds memory
OVERLAP_CHARACTERS = 1 << 13  # what is found across the edge of a chunk is no longer than this
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt")
HEADING = re.compile(r"=.*=")  # of an article of WikiText: no passage

Row = Mapping[str, Any]


# ---- the items of the suites


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Where a benchmark's files have what; a dot leads into a nested column."""

    stem: str | None = None
    choices: tuple[str, ...] = ()  # one column with all of them, as list or dict, or one column for each
    answer: str | None = None  # the right choice: its text, label, letter or number, or a list with a 1 at its place
    labels: str | None = None  # of the choices
    first: int = 0  # the number of the first choice
    blank: str | None = None  # what stands in the stem where the answer belongs
    plain: bool = False  # also as .txt, a passage in each line
    passages: tuple[str, ...] = ()  # found on their own


BENCHMARKS: dict[str, Columns] = {
    "arc": Columns(stem="question", choices=("choices.text",), answer="answerKey", labels="choices.label"),
    "boolq": Columns(stem="question", passages=("passage",)),
    "gsm8k": Columns(stem="question", passages=("answer",)),
    "hellaswag": Columns(stem="ctx", choices=("endings",), answer="label"),
    "humaneval": Columns(stem="prompt"),
    "lambada": Columns(passages=("text",)),
    "medqa": Columns(stem="question", choices=("options",), answer="answer"),
    "mmlu": Columns(stem="question", choices=("choices",), answer="answer"),
    "openbookqa": Columns(stem="question_stem", choices=("choices.text",), answer="answerKey", labels="choices.label"),
    "piqa": Columns(stem="goal", choices=("sol1", "sol2"), answer="label"),
    "truthfulqa": Columns(stem="question", choices=("mc1_targets.choices",), answer="mc1_targets.labels"),
    "wikitext": Columns(passages=("text",), plain=True),
    "winogrande": Columns(stem="sentence", choices=("option1", "option2"), answer="answer", first=1, blank="_"),
}
OTHER = Columns(stem="stem", choices=("choices",), answer="answer", passages=("passage",))


@dataclass(frozen=True, kw_only=True)
class Item:
    benchmark: str
    file: str  # from the name of the folder of items on
    row: int  # in that file, from 0
    stems: tuple[str, ...] = ()  # the question, and with its blank filled in
    answer: str = ""
    choices: tuple[str, ...] = ()
    passages: tuple[str, ...] = ()


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a .jsonl, .jsonl.gz, .jsonl.zst or .parquet file, or the lines of a .txt file as {"text": line}."""
    if path.name.endswith(".parquet"):
        import pyarrow.parquet as pq

        for batch in pq.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
        return
    with open(path, "rb") as raw:
        file: Any = raw
        if path.suffix == ".gz":
            file = gzip.GzipFile(fileobj=raw)
        elif path.suffix == ".zst":
            import zstandard

            file = io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))
        for number, line in enumerate(file):
            try:
                text = line.decode()
                yield {"text": text} if path.suffix == ".txt" else json.loads(text)
            except ValueError as error:
                raise ValueError(f"{path}, line {number + 1}: not one JSON object in UTF-8 ({error})") from None


def benchmark_of(parts: Sequence[str]) -> str:
    """The benchmark that a file holds, by its folders (the first is that of all items) and its name."""
    for part in parts:
        squeezed = re.sub(r"[^a-z0-9]", "", part.lower())
        for benchmark in BENCHMARKS:
            # openai_humaneval, but not search
            if squeezed.startswith(benchmark) or (len(benchmark) > 4 and benchmark in squeezed):
                return benchmark
    return parts[1].split(".")[0]


def item_files(folder: Path) -> list[tuple[str, Path]]:
    """(benchmark, path) of every file of items in a folder, sorted; what is named train is left out."""
    files = []
    for path in sorted(folder.resolve().rglob("*")):
        parts = path.relative_to(folder.resolve().parent).parts
        benchmark = benchmark_of(parts)
        is_note = path.suffix == ".txt" and not BENCHMARKS.get(benchmark, OTHER).plain  # a licence, a README
        is_training = any(part.lower().startswith(("train", "auxiliary_train")) for part in parts[1:])
        if path.name.endswith(SUFFIXES) and not is_note and not is_training:
            files.append((benchmark, path))
    if not files:
        raise FileNotFoundError(f"{folder} holds no files of items; expected {', '.join(SUFFIXES)}")
    return files


def read_items(folders: Iterable[Path]) -> Iterator[Item]:
    """Every item in the folders. Raises ValueError naming the file whose rows lack the benchmark's columns."""
    for folder in folders:
        for benchmark, path in item_files(folder):
            columns = BENCHMARKS.get(benchmark, OTHER)
            file = path.relative_to(folder.resolve().parent).as_posix()
            found = False
            for number, row in enumerate(read_rows(path)):
                item = make_item(benchmark, columns, file, number, row)
                if item.stems or item.passages:
                    found = True
                    yield item
            if not found:
                wanted = " or ".join(filter(None, (columns.stem, *columns.passages)))
                raise ValueError(f"{path} has no item of {benchmark}: no row has text in the column {wanted}")


def make_item(benchmark: str, columns: Columns, file: str, number: int, row: Row) -> Item:
    values = [column(row, name) for name in columns.choices]
    if len(values) == 1:
        values = list(values[0].values()) if isinstance(values[0], dict) else list(values[0] or ())
    choices = tuple(map(str, values))
    stem = str(column(row, columns.stem) or "")
    answer = right_answer(row, columns, choices)
    stems = [stem] if stem.strip() else []
    if columns.blank and answer:
        stems.append(stem.replace(columns.blank, answer))
    texts = (str(column(row, name) or "").strip() for name in columns.passages)
    passages = tuple(text for text in texts if text and not HEADING.fullmatch(text))
    return Item(
        benchmark=benchmark,
        file=file,
        row=number,
        stems=tuple(stems),
        answer=answer,
        choices=choices,
        passages=passages,
    )


def column(row: Row, name: str | None) -> Any:
    """What is in a column, None if there is no such column."""
    value: Any = row
    for part in name.split(".") if name else ():
        value = value.get(part) if isinstance(value, Mapping) else None
    return value if name else None


def right_answer(row: Row, columns: Columns, choices: Sequence[str]) -> str:
    """The text of the right answer, "" where the file does not tell it (test splits without labels)."""
    value, labels = column(row, columns.answer), column(row, columns.labels)
    if isinstance(value, list):
        place = value.index(1) if 1 in value else -1
    elif labels and value in labels:
        place = list(labels).index(value)
    elif not choices or value in choices:
        return str(value or "")
    elif str(value).isdigit():
        place = int(value) - columns.first
    elif isinstance(value, str) and len(value) == 1:
        place = ord(value.upper()) - ord("A")
    else:
        place = -1
    return choices[place] if 0 <= place < len(choices) else ""


# ---- text as numbers


CODE_POINTS = 0x20000  # those above (rare ideographs) count as one and the same letter
MOST_PARTS = 4  # a sign that falls apart into more letters (Arabic phrases in one sign) stays whole
RATIO = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64


@cache
def folding() -> tuple[np.ndarray, np.ndarray, dict[int, list[int]]]:
    """How each code point is read: its letter's number, into how many letters it falls apart, and which, if not one.

    Numbers (CODE_POINTS,) uint64, 0 for what separates words; counts (CODE_POINTS,) uint8, 0 for what is left out
    (accents that stand alone, soft hyphens), more than 1 for ligatures and the like.
    """
    letters = np.zeros(CODE_POINTS, np.uint64)
    counts = np.ones(CODE_POINTS, np.uint8)
    several = {}
    for code in range(CODE_POINTS):
        character = chr(code)
        parts = unicodedata.normalize("NFKD", character).casefold()
        parts = "".join(part for part in parts if unicodedata.category(part)[0] != "M" and part != "\u00ad")
        numbers = [ord(part) if part.isalnum() else 0 for part in parts]
        if len(numbers) > MOST_PARTS:
            numbers = [code]
        counts[code] = len(numbers)
        if len(numbers) == 1:
            letters[code] = numbers[0]
        elif numbers:
            several[code] = numbers
    letters[-1] = CODE_POINTS  # stands for all those above
    return hashed_letters(letters), counts, several


def hashed_letters(letters: np.ndarray) -> np.ndarray:
    return np.where(letters > 0, mixed(letters + np.uint64(RATIO)), np.uint64(0))


@cache
def ascii_letters() -> np.ndarray:
    """folding()'s numbers of the first 128, without the time that the others take."""
    codes = [ord(chr(code).lower()) if chr(code).isalnum() else 0 for code in range(128)]
    return hashed_letters(np.array(codes, np.uint64))


@cache
def powers() -> tuple[np.ndarray, np.ndarray]:
    """RATIO**i and RATIO**-i modulo 2**64 for every place in a chunk, uint64."""
    n = MOST_PARTS * CHUNK_CHARACTERS
    return powers_up_to(n, RATIO), powers_up_to(n, pow(RATIO, -1, 1 << 64))


@dataclass(frozen=True, kw_only=True)
class Words:
    hashes: np.ndarray  # (n,) uint64
    starts: np.ndarray  # (n,) where each begins in the text, in characters
    stops: np.ndarray  # (n,) where each ends


def split_words(text: str) -> Words:
    """The words of a text of up to CHUNK_CHARACTERS characters."""
    origin = None
    if text.isascii():
        letters = ascii_letters()[np.frombuffer(text.encode("ascii"), np.uint8)]
    else:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        codes = np.minimum(codes, CODE_POINTS - 1)
        table, counts, several = folding()
        letters = table[codes]
        n_parts = counts[codes]
        if not (n_parts == 1).all():
            origin = np.repeat(np.arange(len(codes)), n_parts)
            letters = letters[origin]
            first = np.cumsum(n_parts, dtype=np.int64) - n_parts
            for place in np.flatnonzero(n_parts > 1):
                parts = several[int(codes[place])]
                at = first[place]
                letters[at : at + len(parts)] = hashed_letters(np.array(parts, np.uint64))
    up, down = powers()
    n = len(letters)
    is_letter = np.zeros(n + 2, bool)
    np.not_equal(letters, 0, out=is_letter[1:-1])
    edges = np.flatnonzero(is_letter[1:] != is_letter[:-1])
    starts, stops = edges[::2], edges[1::2]
    # a word's hash is the sum of letter * RATIO**(place in the word), read off the sums over the whole text
    sums = np.zeros(n + 1, np.uint64)
    np.cumsum(letters * up[:n], out=sums[1:])
    hashes = mixed((sums[stops] - sums[starts]) * down[starts])
    if origin is not None and len(starts):
        starts, stops = origin[starts], origin[stops - 1] + 1
    return Words(hashes=hashes, starts=starts, stops=stops)


def ngram_hashes(hashes: np.ndarray) -> np.ndarray:
    """One number for each run of NGRAM words: (n,) to (n - NGRAM + 1,), uint64."""
    n = max(len(hashes) - NGRAM + 1, 0)
    keys = np.zeros(n, np.uint64)
    for i in range(NGRAM):
        keys *= np.uint64(RATIO)
        keys += hashes[i : i + n]
    return mixed(keys)


def chunks(text: str) -> Iterator[tuple[int, str]]:
    """(place in the text, chunk), overlapping by OVERLAP_CHARACTERS."""
    step = CHUNK_CHARACTERS - OVERLAP_CHARACTERS
    for start in range(0, max(len(text) - OVERLAP_CHARACTERS, 1), step):
        yield start, text[start : start + CHUNK_CHARACTERS]


def words_of(text: str) -> np.ndarray:
    """The hashes of an item's words, (n,) uint64; only its first CHUNK_CHARACTERS count."""
    return split_words(text[:CHUNK_CHARACTERS]).hashes


# ---- the index


def cut(words: np.ndarray) -> list[np.ndarray]:
    """Units of one length as near to UNIT_WORDS as may be."""
    n = max(round(len(words) / UNIT_WORDS), 1)
    return np.array_split(words, n) if n > 1 else [words]


def build_index(items: Iterable[Item], path: Path) -> dict[str, dict[str, int]]:
    """Write the index of the items; the same items in the same order give the same bytes.

    Returns for each benchmark the number of its `items`, and of those that are `too_short` to be told from ordinary
    text and so are not looked for.
    """
    items = list(items)
    split = [
        (
            [words_of(stem) for stem in item.stems],
            words_of(item.answer),
            words_of("\n".join(item.choices)),
            words_of(
                "\n".join(f"{letter} {choice}" for letter, choice in zip(ascii_lowercase, item.choices, strict=False))
            ),
            [words_of(passage) for passage in item.passages],
        )
        for item in items
    ]
    # the information of a word: among the items, how rare are those that have it
    per_item = [
        np.unique(np.concatenate([*stems, answer, listed, *passages])) for stems, answer, _, listed, passages in split
    ]
    vocabulary, frequency = np.unique(np.concatenate([np.zeros(0, np.uint64), *per_item]), return_counts=True)
    information = np.log((1 + len(items)) / (1 + frequency)) * RAREST / max(np.log((1 + len(items)) / 2), 1e-9)
    information[np.isin(vocabulary, words_of(" ".join([*map(str, range(1000)), *ascii_lowercase, NUMBERS])))] /= 2
    common = np.isin(vocabulary, words_of(COMMON))
    information[common] = np.minimum(information[common], MAX_COMMON)

    information = np.round(information, 3)  # whatever the last bits of this processor's logarithm

    def weigh(words: np.ndarray) -> np.ndarray:
        """The information of each word of a unit; what stands there several times counts once, in equal parts."""
        distinct, place, n_times = np.unique(words, return_inverse=True, return_counts=True)
        return (information[np.searchsorted(vocabulary, distinct)] / n_times)[place].astype(np.float32)

    units: list[np.ndarray] = []
    unit_items: list[int] = []
    unit_tails: list[int] = []  # the number of its first tail, -1 for none
    tails: list[np.ndarray] = []  # of a short question two: the words of its answer, and of all choices
    seen: set[bytes] = set()
    counts: dict[str, dict[str, int]] = defaultdict(lambda: {"items": 0, "too_short": 0})

    def add(words: np.ndarray, item: int, tail: Sequence[np.ndarray] = ()) -> None:
        key = b"|".join(part.tobytes() for part in (words, *tail))
        if key not in seen:
            seen.add(key)
            units.append(words)
            unit_items.append(item)
            unit_tails.append(len(tails) if tail else -1)
            tails.extend(tail)

    for number, (item, (stems, answer, choices, listed, passages)) in enumerate(zip(items, split, strict=True)):
        found = False
        sequences = [*stems, *passages]
        if stems and weigh(stems[-1]).sum() < 1.5 * MIN_EVIDENCE:
            sequences += [np.concatenate([stems[-1], answer]), np.concatenate([stems[-1], listed])]
        for words in sequences:
            for unit in cut(words):
                says = weigh(unit).sum()
                is_short = any(unit is stem for stem in stems) and says < 2 * MIN_EVIDENCE
                tail = [np.unique(answer), np.unique(choices)] if is_short else []
                with_tail = says + max((weigh(part).sum() / 2 for part in tail), default=0)
                if len(unit) >= NGRAM and with_tail >= MIN_INDEXED:
                    add(unit, number, tail)
                    found |= bool(with_tail >= MIN_EVIDENCE)
        counts[item.benchmark]["items"] += 1
        counts[item.benchmark]["too_short"] += not found

    lengths = np.array([len(unit) for unit in units], np.int64)
    unit_starts = np.concatenate([[0], np.cumsum(lengths)])
    words = np.concatenate([np.zeros(0, np.uint64), *units])
    keys = np.concatenate([np.zeros(0, np.uint64), *map(ngram_hashes, units)])
    last = (
        np.repeat(unit_starts[1:], lengths) - np.arange(len(words)) < NGRAM
    )  # too near the end of its unit for a run
    places = np.flatnonzero(~last)
    order = np.argsort(keys, kind="stable")
    distinct, n_places = np.unique(keys, return_counts=True)
    kept = n_places <= MAX_POSTINGS
    places = places[order][np.repeat(kept, n_places)]
    distinct, n_places = distinct[kept], n_places[kept]

    # words that only stand in runs which are too common cannot be found, and do not count
    findable = np.zeros(len(words), bool)
    for i in range(NGRAM):
        findable[places + i] = True
    weights = np.concatenate([np.zeros(0, np.float32), *map(weigh, units)])
    weights[~findable] = 0
    unit_weights = np.add.reduceat(weights, unit_starts[:-1]) if units else weights

    n_bits = 1 << max(int(16 * len(distinct)).bit_length(), 10)
    bits = np.zeros(n_bits // 8, np.uint8)
    at = distinct & np.uint64(n_bits - 1)
    np.bitwise_or.at(bits, at >> np.uint64(3), np.left_shift(1, at & np.uint64(7)).astype(np.uint8))

    tail_words = np.concatenate([np.zeros(0, np.uint64), *tails])
    files = sorted({(item.benchmark, item.file) for item in items})
    numbers = {file: number for number, file in enumerate(files)}
    arrays = {
        "bits": bits,
        "keys": distinct,
        "key_starts": np.concatenate([[0], np.cumsum(n_places)]).astype(np.uint32),
        "places": places.astype(np.uint32),
        "weights": weights,
        "unit_starts": unit_starts.astype(np.uint32),
        "unit_weights": unit_weights,
        "unit_items": np.array(unit_items, np.uint32),
        "unit_tails": np.array(unit_tails, np.int32),
        "tail_starts": np.concatenate([[0], np.cumsum([len(tail) for tail in tails])]).astype(np.uint32),
        "tail_words": tail_words,
        "tail_weights": np.concatenate([np.zeros(0, np.float32), *map(weigh, tails)]),
        "item_files": np.array([numbers[item.benchmark, item.file] for item in items], np.uint32),
        "item_rows": np.array([item.row for item in items], np.uint32),
    }
    write_arrays(path, arrays, {"files": files, "counts": dict(counts)})
    return dict(counts)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """One file: a line of JSON that says what is where, then the arrays, each at a multiple of 64 bytes after it."""
    layout, offset = {}, 0
    for name, array in arrays.items():
        layout[name] = {"dtype": array.dtype.str, "size": array.size, "offset": offset}
        offset += -(-array.nbytes // 64) * 64
    header = json.dumps({"decontamination": FORMAT, "ngram": NGRAM, "arrays": layout, **about}).encode()
    with new_file(path) as file:
        file.write(header + b" " * (-(len(header) + 1) % 64) + b"\n")
        for array in arrays.values():
            file.write(array.tobytes() + bytes(-array.nbytes % 64))


@dataclass(frozen=True, kw_only=True)
class Match:
    """An item that a document holds."""

    benchmark: str
    item: str  # <file of the item>:<row, from 0>
    evidence: float  # nats
    score: float  # how much of the question, or of the unit of a passage, is there, by information: 0 to 1
    start: int  # where it is in the document, in characters
    stop: int


class Index:
    """The index, memory-mapped: all processes of a machine share its pages."""

    def __init__(self, path: str | Path):
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"no decontamination index {path}; make one with `python -m curation.decontaminate build`"
            )
        with open(path, "rb") as file:
            first = file.readline(1 << 26)
        try:
            header = json.loads(first)
            about = header["decontamination"], header["ngram"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path} is not a decontamination index; `python -m curation.decontaminate build` makes one"
            ) from None
        if about != (FORMAT, NGRAM):
            raise ValueError(
                f"{path} is of format {about[0]} with runs of {about[1]} words, expected format {FORMAT} with {NGRAM};"
                " build it again"
            )
        data = np.memmap(path, np.uint8, "r")
        self.files: list[list[str]] = header["files"]
        self.counts: dict[str, dict[str, int]] = header["counts"]
        self.arrays: dict[str, np.ndarray] = {}
        for name, at in header["arrays"].items():
            start = len(first) + at["offset"]
            dtype = np.dtype(at["dtype"])
            stop = start + at["size"] * dtype.itemsize
            if stop > len(data):
                raise ValueError(f"{path} is truncated: {len(data):,} bytes, {name} ends at {stop:,}; build it again")
            self.arrays[name] = np.frombuffer(data[start:stop], dtype)

    def find(self, text: str, min_evidence: float) -> list[Match]:
        """Every item that is in the text, the surest first; one match for each item."""
        best: dict[int, Match] = {}
        for offset, chunk in chunks(text):
            for item, match in self.find_in_chunk(offset, chunk, min_evidence):
                if item not in best or match.evidence > best[item].evidence:
                    best[item] = match
        return sorted(best.values(), key=lambda match: (-match.evidence, match.start, match.item))

    def find_in_chunk(self, offset: int, chunk: str, min_evidence: float) -> Iterator[tuple[int, Match]]:
        a = self.arrays
        words = split_words(chunk)
        keys = ngram_hashes(words.hashes)
        at = keys & np.uint64(8 * len(a["bits"]) - 1)
        maybe = np.flatnonzero((a["bits"][at >> np.uint64(3)] >> (at & np.uint64(7)).astype(np.uint8)) & 1)
        if not len(maybe) or not len(a["keys"]):
            return
        at = np.minimum(np.searchsorted(a["keys"], keys[maybe]), len(a["keys"]) - 1)
        known = a["keys"][at] == keys[maybe]
        at, here = at[known], maybe[known]
        # every place of the items where one of these runs is: `there` in the units, `here` in the document
        first = a["key_starts"][at].astype(np.int64)
        n_places = a["key_starts"][at + 1] - first
        here = np.repeat(here, n_places)
        there = a["places"][np.repeat(first - np.cumsum(n_places) + n_places, n_places) + np.arange(len(here))]
        order = np.argsort(there, kind="stable")  # by unit
        here, there = here[order], there[order].astype(np.int64)
        # what the whole chunk covers of each unit: a bound that leaves few to look at
        covered = np.unique(there[:, None] + np.arange(NGRAM))
        if not len(covered):
            return
        candidates, starts = np.unique(np.searchsorted(a["unit_starts"], covered, "right") - 1, return_index=True)
        information, total = np.add.reduceat(a["weights"][covered], starts), a["unit_weights"][candidates]
        hopeful = information**2 >= min_evidence * total
        hopeful |= (a["unit_tails"][candidates] >= 0) & (information >= MIN_STEM * total)
        for unit in candidates[hopeful]:
            mine = slice(*np.searchsorted(there, a["unit_starts"][unit : unit + 2].astype(np.int64)))
            found = self.locate(int(unit), words.hashes, here[mine], there[mine])
            if found[0] >= min_evidence:
                evidence, score, first_word, last_word = found
                item = int(a["unit_items"][unit])
                benchmark, file = self.files[a["item_files"][item]]
                match = Match(
                    benchmark=benchmark,
                    item=f"{file}:{a['item_rows'][item]}",
                    evidence=round(evidence, 1),
                    score=round(score, 3),
                    start=offset + int(words.starts[first_word]),
                    stop=offset + int(words.stops[last_word]),
                )
                yield item, match

    def locate(
        self, unit: int, hashes: np.ndarray, here: np.ndarray, there: np.ndarray
    ) -> tuple[float, float, int, int]:
        """(evidence, score, first word, last word) of the best place for a unit in a chunk.

        hashes (n,): the chunk's words; here, there (m,): where runs of words are in the chunk and among the units.
        """
        a = self.arrays
        half = int(a["unit_starts"][unit + 1] - a["unit_starts"][unit]) + NGRAM
        total = float(a["unit_weights"][unit])
        places = []
        # windows of twice the unit's length, each beginning in the middle of the one before
        for start in np.unique(here // half) * half:
            inside = (here >= start) & (here < start + 2 * half)
            covered = np.unique(there[inside, None] + np.arange(NGRAM))
            information = float(a["weights"][covered].sum())
            first_word, last_word = int(here[inside].min()), int(here[inside].max()) + NGRAM - 1
            evidence = information**2 / total
            if a["unit_tails"][unit] >= 0 and information >= MIN_STEM * total:
                following = self.following(int(a["unit_tails"][unit]), hashes[last_word + 1 :])
                evidence = max(evidence, *((information + found) ** 2 / (total + whole) for found, whole in following))
            places.append((evidence, information / total, first_word, last_word))
        return max(places)

    def following(self, tail: int, hashes: np.ndarray) -> Iterator[tuple[float, float]]:
        """Of the answer, and of all choices together: (what of it follows a question, all of it), in nats.

        Words in any order say half as much as words in a row.
        """
        a = self.arrays
        for number in (tail, tail + 1):
            start, stop = a["tail_starts"][number : number + 2].astype(np.int64)
            weights = a["tail_weights"][start:stop] / 2
            found = np.isin(a["tail_words"][start:stop], hashes[: 2 * len(weights) + TAIL_SLACK])
            yield float(weights[found].sum()), float(weights.sum())


@cache
def open_index(path: str) -> Index:
    """One index for the whole process."""
    return Index(path)


@lru_cache(maxsize=1)  # the rule's decision and its explanation are asked for one after the other
def find_matches(path: str, text: str, min_evidence: float) -> list[Match]:
    return open_index(path).find(text, min_evidence)


@dataclass(frozen=True, kw_only=True)
class Decontaminate:
    """Drops documents that hold an item of an evaluation suite, or a part of its passage."""

    index_file: str  # from build_index
    min_evidence: float = MIN_EVIDENCE  # nats

    def __post_init__(self) -> None:
        if self.min_evidence < MIN_INDEXED:
            raise ValueError(
                f"min_evidence {self.min_evidence} is below {MIN_INDEXED}, the least that the index holds"
            )

    def check(self, text: str, metadata: Mapping[str, Any]) -> str | None:
        return "contaminated" if find_matches(str(self.index_file), text, self.min_evidence) else None

    def explain(self, text: str) -> dict[str, Any]:
        """The surest match: benchmark, item, evidence, score, start, stop as in Match, and more; {} for a clean text.

        `matched` is the text from start to stop, `n_items` counts all items found.
        """
        matches = find_matches(str(self.index_file), text, self.min_evidence)
        if not matches:
            return {}
        best = matches[0]
        return asdict(best) | {"matched": text[best.start : best.stop], "n_items": len(matches)}


# ---- command line


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m curation.decontaminate", allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", allow_abbrev=False, help="write the index of folders of evaluation items")
    build.add_argument("--items", type=Path, required=True, nargs="+", metavar="FOLDER")
    build.add_argument("--out", type=Path, required=True, metavar="FILE")
    check = commands.add_parser("check", allow_abbrev=False, help="print what files hold of the items, as JSON lines")
    check.add_argument("--index", type=Path, required=True, metavar="FILE")
    check.add_argument("--input", type=Path, required=True, nargs="+", metavar="FILE")
    check.add_argument("--text-column", default="text")
    check.add_argument("--min-evidence", type=float, default=MIN_EVIDENCE, metavar="NATS")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "build":
            counts = build_index(read_items(arguments.items), arguments.out)
            for benchmark, count in sorted(counts.items()):
                print(
                    f"{benchmark:<12} {count['items']:>7,} items, {count['too_short']:,} of them too short to look for"
                )
            print(f"{arguments.out}: {arguments.out.stat().st_size / 1e6:.1f} MB")
        else:
            check_files(Decontaminate(index_file=str(arguments.index), min_evidence=arguments.min_evidence),
                        arguments.input, arguments.text_column)  # fmt: skip
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def check_files(rule: Decontaminate, paths: Iterable[Path], text_column: str) -> None:
    """Print the best match of each document that has one, then how many have."""
    n_documents = n_contaminated = 0
    for path in paths:
        for number, row in enumerate(read_rows(path)):
            text = row.get(text_column)
            if not isinstance(text, str):
                raise ValueError(f"{path}, row {number}: no text in column {text_column}; it has {', '.join(row)}")
            n_documents += 1
            evidence = rule.explain(text)
            if evidence:
                n_contaminated += 1
                print(json.dumps({"file": str(path), "row": number, "id": row.get("id")} | evidence))
    print(f"{n_contaminated:,} of {n_documents:,} documents are contaminated", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
