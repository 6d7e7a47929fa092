"""The sources of text, which files of each one are read, and the pieces of work that the files are cut into.

A source is one entry of the lists at the end of this file: where its files are (on the Hub, in a folder, or what a
function of local_text.py lists), which columns hold text and id, its licence, and how much of it is wanted.

    files   list_files          every file of the source
            choose_files        as many of them, in the order of the hash of their names, as its budget needs
            with_digests        and the sha256 of their bytes
            make_pieces         ranges of large files, bundles of small ones
"""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

from curation.hub import HUB, list_repo, open_file
from curation.local_text import (
    code,
    family,
    module_docstrings,
    package_documentation,
    package_modules,
    package_text,
    stdlib_code_files,
    stdlib_documentation,
    stdlib_files,
    system_documentation,
    system_text,
    walk,
)
from curation.shards import file_sha256, new_file

MB = 1_000_000
BILLION = 1_000_000_000
MARGIN = 1.1  # files are chosen by expected numbers; what is too much is cut by the mixture

# Texts of one file: (name, text of the file) -> (what to add to the document's id, text), ...
Extract = Callable[[str, str], Iterable[tuple[str, str]]]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where text is, what of a row is the document, and how much of it is wanted.

    Its files are those of `repo` on the Hub whose names match `paths`, or those of `folder` that do, or what `files`
    lists. `extract` makes documents of a whole file's text; other files are rows (parquet, JSON lines) or plain text.
    """

    name: str
    kind: str  # which rules of the recipe its documents must pass
    description: str
    licence: str = ""
    repo: str | None = None
    revision: str | None = None  # a commit
    folder: str | None = None
    paths: tuple[str, ...] = ("*",)  # patterns of names in the repository or folder; * goes through folders
    files: Callable[[], Iterable[tuple[str, str]]] | None = None  # (name, path) of every file, in any order
    extract: Extract | None = None
    text_columns: tuple[str, ...] = ("text",)
    row_text: Callable[[Mapping[str, Any]], str] | None = None  # of the text columns, where the text is not in one
    id_column: str | None = "id"  # None: documents are known by their file and row
    metadata_columns: tuple[str, ...] = ()  # `a.b` is the field b of the column a
    budget_tokens: int | None = None  # of training, None: all that there is
    budget_mb: float | None = None  # of text that is read, None: no limit
    max_epochs: float = 1
    text_per_byte: float = 1.0  # expected: bytes of text in a byte of file
    bytes_per_token: float = 4.4  # expected: of text
    kept: float = 1.0  # expected: share of the text that all rules and the search for duplicates leave
    refused: str | None = None  # why it cannot be read as it is

    @property
    def needed_bytes(self) -> float:
        """How much of its files must be read for the budget; infinite for a source without one."""
        needed = math.inf
        if self.budget_tokens is not None:
            needed = MARGIN * self.budget_tokens * self.bytes_per_token / (self.kept * self.text_per_byte)
        if self.budget_mb is not None:
            needed = min(needed, self.budget_mb * MB / self.text_per_byte)
        return needed


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One file of a source. `name` is its place in the source, the same on every machine, and part of document ids."""

    name: str
    path: str  # on this machine, or hf://datasets/<repo>@<revision>/<name>
    size_bytes: int
    digest: str = ""  # sha256 of its bytes; of small files on the Hub the git object's name
    take_bytes: int | None = None  # read only what begins in so many first bytes, None: all


@dataclass(frozen=True, kw_only=True)
class FilePart:
    """Of parquet the row groups start <= i < stop; of other files the bytes.

    Of plain JSON lines those that begin in the range; packed files are always read from their beginning.
    """

    file: InputFile
    start: int
    stop: int
    size_bytes: int  # of the file that this part is


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A unit of work: parts of files of one source."""

    source: str
    parts: tuple[FilePart, ...]

    @property
    def size_bytes(self) -> int:
        return sum(part.size_bytes for part in self.parts)

    @cached_property
    def key(self) -> str:
        """sha256 of what it reads: source, names, digests and ranges, wherever the files are."""
        read = [self.source, [[part.file.name, part.file.digest, part.start, part.stop] for part in self.parts]]
        return hashlib.sha256(json.dumps(read).encode()).hexdigest()

    @property
    def name(self) -> str:
        first = self.parts[0]
        if len(self.parts) > 1:
            return f"{self.source}: {len(self.parts):,} files"
        return f"{self.source}: {first.file.name} [{first.start:,}, {first.stop:,})"

    def values(self) -> dict[str, Any]:
        """As plain JSON values, of which piece_of makes the piece again."""
        return asdict(self)


def piece_of(values: Mapping[str, Any]) -> Piece:
    parts = (FilePart(**(part | {"file": InputFile(**part["file"])})) for part in values["parts"])
    return Piece(source=values["source"], parts=tuple(parts))


# ---- listing


def list_files(source: Source, mirror: Path | None = None) -> list[InputFile]:
    """Every file of the source in the order in which they are taken; files of this machine without their digests.

    `mirror` is a folder that holds repositories of the Hub as <repo>/<name>. Raises ValueError for a source that is
    refused, FileNotFoundError where nothing matches, and OSError when the Hub does not answer.
    """
    if source.refused:
        raise ValueError(f"source {source.name}: {source.refused}")
    if source.files is not None:
        return list_inputs(source)
    if source.repo is not None and mirror is None:
        listed = list_repo(source.repo, source.revision, source.paths)
        prefix = f"{HUB}{source.repo}@{source.revision}/"
        files = [InputFile(name=n, path=prefix + n, size_bytes=size, digest=digest) for n, size, digest in listed]
        where = f"{source.repo} on the Hub at {source.revision}"
    else:
        root = Path(source.folder or "") if source.repo is None or mirror is None else mirror / source.repo
        if not root.is_dir():
            raise FileNotFoundError(f"source {source.name}: there is no folder {root}")
        files = [
            InputFile(
                name=os.fsencode(name).decode(errors="replace"), path=str(path), size_bytes=os.stat(path).st_size
            )
            for name, path in walk(root, skip={".git", ".cache"}, links=True)
        ]
        where = str(root)
    files = [file for file in files if any(fnmatch(file.name, pattern) for pattern in source.paths)]
    if not files:
        raise FileNotFoundError(f"source {source.name}: no file of {where} matches {' or '.join(source.paths)}")
    return sorted(files, key=lambda file: (hashlib.sha256(file.name.encode()).digest(), file.path))


def list_inputs(source: Source) -> list[InputFile]:
    """The files that the source's own function lists, in the order in which they are taken.

    Files come in the order of the hash of their names, and in rounds: the first of each family (package, command),
    then the second of each: one family with thousands of files must not fill the budget alone.
    """
    inputs = [
        InputFile(name=os.fsencode(name).decode(errors="replace"), path=str(path), size_bytes=os.stat(path).st_size)
        for name, path in (source.files or tuple)()
    ]
    inputs.sort(key=lambda file: (hashlib.sha256(file.name.encode()).digest(), file.path))
    seen: Counter[str] = Counter()
    rounds = []
    for file in inputs:
        rounds.append(seen[family(file.name)])
        seen[family(file.name)] += 1
    return [inputs[i] for i in sorted(range(len(inputs)), key=lambda i: (rounds[i], i))]


def choose_files(source: Source, files: Sequence[InputFile]) -> list[InputFile]:
    """The first files that the budget needs; of the last one only as much as is needed, if it can be read in part."""
    chosen = []
    room = source.needed_bytes
    for file in files:
        if room <= 0:
            break
        in_part = source.extract is None and is_rows(file.name) and file.size_bytes > room
        chosen.append(replace(file, take_bytes=math.ceil(room)) if in_part else file)
        room -= file.size_bytes
    return chosen


def with_digests(files: Sequence[InputFile], known_file: Path) -> list[InputFile]:
    """The files with the sha256 of their bytes.

    A file is not read again if `known_file`, which this writes, has its path, size, time and inode.
    """
    try:
        known = json.loads(known_file.read_bytes())
    except FileNotFoundError:
        known = {}
    found, new = [], {}
    for file in files:
        if not file.digest:
            stat = os.stat(file.path)
            seen = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
            entry = known.get(file.path)
            if entry is None or entry[:3] != seen:
                entry = new[file.path] = [*seen, file_sha256(Path(file.path))]
            file = replace(file, digest=entry[3])
        found.append(file)
    if new:
        with new_file(known_file) as out:
            out.write(json.dumps(known | new).encode())
    return found


# ---- pieces


PACKED = (".gz", ".zst")
ROWS = (".jsonl", ".ndjson", ".json")


def suffix_of(name: str) -> str:
    """`.jsonl` of a.jsonl.gz, `.parquet` of b.parquet, in small letters."""
    name = name.lower()
    return os.path.splitext(name.removesuffix(".gz").removesuffix(".zst"))[1]


def is_rows(name: str) -> bool:
    return suffix_of(name) in (*ROWS, ".parquet")


def is_packed(name: str) -> bool:
    return name.lower().endswith(PACKED)


MIN_PART = 1 << 16  # bytes of a range: below that, a piece is not split any more


def make_pieces(source: Source, files: Sequence[InputFile], piece_bytes: int) -> list[Piece]:
    """Pieces of about `piece_bytes` of file: every file is in one of them, or in consecutive ones.

    Parquet is cut between row groups, plain JSON lines anywhere; packed files stay whole. Files smaller than half a
    piece go into bundles by the hash of their names; the number of bundles is a power of two, so that one file more
    changes one bundle.
    """
    pieces, small = [], []
    for file in files:
        parts = file_parts(source, file, piece_bytes)
        if len(parts) == 1 and parts[0].size_bytes < piece_bytes / 2:
            small.append(parts[0])
        else:
            pieces += [Piece(source=source.name, parts=(part,)) for part in parts]
    needed = sum(part.size_bytes for part in small) / piece_bytes
    n_bundles = 1 << max(math.ceil(math.log2(needed)), 0) if needed else 1
    bundles: list[list[FilePart]] = [[] for _ in range(n_bundles)]
    for part in small:
        number = int.from_bytes(hashlib.sha256(part.file.name.encode()).digest()[-8:], "big")
        bundles[number % n_bundles].append(part)
    for bundle in filter(None, bundles):
        bundle.sort(key=lambda part: (part.file.name, part.file.path))
        pieces.append(Piece(source=source.name, parts=tuple(bundle)))
    return pieces


def file_parts(source: Source, file: InputFile, piece_bytes: int) -> list[FilePart]:
    size = file.size_bytes if file.take_bytes is None else min(file.size_bytes, file.take_bytes)
    if source.extract is None and suffix_of(file.name) == ".parquet":
        return parquet_parts(source, file, piece_bytes)
    if source.extract is None and is_rows(file.name) and not is_packed(file.name):
        n = max(round(size / piece_bytes), 1)
        cuts = [size * i // n for i in range(n + 1)]
        return [
            FilePart(file=file, start=start, stop=stop, size_bytes=stop - start)
            for start, stop in zip(cuts, cuts[1:], strict=False)
        ]
    return [FilePart(file=file, start=0, stop=size, size_bytes=size)]


def parquet_parts(source: Source, file: InputFile, piece_bytes: int) -> list[FilePart]:
    """Runs of row groups. A file that is no parquet is one part without row groups: reading it says what is wrong."""
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    try:
        with open_file(file.path) as opened:
            footer = pq.read_metadata(opened)
    except (OSError, ArrowException):
        return [FilePart(file=file, start=0, stop=0, size_bytes=file.size_bytes)]
    wanted = {*source.text_columns, source.id_column, *source.metadata_columns}
    tops = {str(name).split(".")[0] for name in wanted}
    parts: list[FilePart] = []
    start = taken = waiting = 0
    for i in range(footer.num_row_groups):
        group = footer.row_group(i)
        columns = [group.column(c) for c in range(group.num_columns)]
        waiting += sum(c.total_compressed_size for c in columns if c.path_in_schema.split(".")[0] in tops)
        taken += sum(column.total_compressed_size for column in columns)
        enough = file.take_bytes is not None and taken >= file.take_bytes
        if waiting >= piece_bytes or enough or i == footer.num_row_groups - 1:
            parts.append(FilePart(file=file, start=start, stop=i + 1, size_bytes=waiting))
            start, waiting = i + 1, 0
        if enough:
            break
    return parts or [FilePart(file=file, start=0, stop=0, size_bytes=file.size_bytes)]


def split_piece(piece: Piece) -> tuple[Piece, Piece] | None:
    """Two pieces that read the same documents, or None where it cannot be cut."""
    if len(piece.parts) > 1:
        middle = len(piece.parts) // 2
        return replace(piece, parts=piece.parts[:middle]), replace(piece, parts=piece.parts[middle:])
    (part,) = piece.parts
    is_parquet = suffix_of(part.file.name) == ".parquet"
    if is_packed(part.file.name) or not is_rows(part.file.name):
        return None
    if part.stop - part.start < (2 if is_parquet else 2 * MIN_PART):
        return None
    middle, half = (part.start + part.stop) // 2, part.size_bytes // 2
    first = replace(part, stop=middle, size_bytes=half)
    second = replace(part, start=middle, size_bytes=part.size_bytes - half)
    return replace(piece, parts=(first,)), replace(piece, parts=(second,))


# ---- the lists: of two duplicates, the one from the earlier source of a recipe is kept

MACHINE_LICENCE = "as the packages of this machine say, mostly free software; the data folder is for this machine"

LOCAL = (
    Source(
        name="stdlib_code",
        kind="code",
        description="the Python standard library's sources, without their docstrings",
        licence=MACHINE_LICENCE,
        budget_mb=12,
        text_per_byte=0.8,
        files=stdlib_code_files,
        extract=code,
    ),
    Source(
        name="stdlib_docs",
        kind="prose",
        description="Python's help topics, and the docstrings of each module of the standard library",
        licence=MACHINE_LICENCE,
        budget_mb=8,
        text_per_byte=0.2,
        files=stdlib_files,
        extract=stdlib_documentation,
    ),
    Source(
        name="package_docs",
        kind="prose",
        description="READMEs, licences and other .md and .rst files of the installed Python packages",
        licence=MACHINE_LICENCE,
        budget_mb=8,
        text_per_byte=0.9,
        files=package_documentation,
        extract=package_text,
    ),
    Source(
        name="package_docstrings",
        kind="prose",
        description="docstrings of the installed Python packages, module by module",
        licence=MACHINE_LICENCE,
        budget_mb=5,
        text_per_byte=0.2,
        files=package_modules,
        extract=module_docstrings,
    ),
    Source(
        name="system_docs",
        kind="prose",
        description="manual pages and package documentation of the operating system",
        licence=MACHINE_LICENCE,
        budget_mb=4.5,
        text_per_byte=1.1,
        files=system_documentation,
        extract=system_text,
    ),
)


def medqa_text(row: Mapping[str, Any]) -> str:
    """A question of the examination with its choices and the right answer."""
    choices = "\n".join(f"{letter}. {row['options'][letter]}" for letter in sorted(row["options"]))
    return f"{row['question']}\n\n{choices}\n\nAnswer: {row['answer_idx']}. {row['answer']}"


def alpaca_text(row: Mapping[str, Any]) -> str:
    """Instruction, input where there is one, and response, under the headings that Alpaca was made with."""
    task = f"### Instruction:\n{row['instruction']}\n\n"
    given = f"### Input:\n{row['input']}\n\n" if row["input"] else ""
    return f"{task}{given}### Response:\n{row['output']}"


# Sizes, columns and licences as the cards of the data sets and footers of their files say (August 2026). What a
# byte of file holds, bytes of text in a token, and what stays are expectations, to be measured again on the way.

WEB_EDU = Source(
    name="web_edu",
    kind="clean_web",
    description="FineWeb-Edu: web pages that a classifier finds educational",
    licence="ODC-By-1.0",
    repo="HuggingFaceFW/fineweb-edu",
    revision="87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
    paths=("sample/100BT/*.parquet",),  # 140 files of 2.15 GB, about 100 billion tokens
    metadata_columns=("url", "dump", "language_score", "score"),
    budget_tokens=40 * BILLION,
    text_per_byte=1.5,
    bytes_per_token=4.5,
    kept=0.8,  # near duplicates were searched for within each dump only
)

WEB = Source(
    name="web",
    kind="web",
    description="DCLM: web pages chosen by a classifier, a sample of 100 billion tokens",
    licence="ODC-By-1.0 (of mlfoundations/dclm-baseline-1.0, CC-BY-4.0)",
    repo="HuggingFaceFW/dclm_100BT",
    revision="01022d378d944de6deeb1c79d08fecb4d27b2c6f",
    paths=("data/*.parquet",),  # 100 files of 3.2 GB, about 115 billion tokens
    metadata_columns=("url", "language_score", "fasttext_score"),
    budget_tokens=20 * BILLION,
    text_per_byte=1.6,
    bytes_per_token=4.4,
    kept=0.7,
)

BOOKS = Source(
    name="books",
    kind="long",
    description="FinePDFs-Edu, English: textbooks and other long educational documents",
    licence="ODC-By-1.0",
    repo="HuggingFaceFW/finepdfs-edu",
    revision="9cfabe2127faca99b3d5c4dc6d1fcb397399ebde",
    paths=("data/eng_Latn/train/*.parquet",),  # 23 million documents, about 136 billion tokens
    metadata_columns=("url", "dump", "language"),
    budget_tokens=12 * BILLION,
    text_per_byte=1.9,
    bytes_per_token=4.3,
    kept=0.8,
)

WIKI = Source(
    name="wiki",
    kind="wiki",
    description="FineWiki, English: Wikipedia of August 2025",
    licence="CC-BY-SA-4.0 and GFDL",
    repo="HuggingFaceFW/finewiki",
    revision="8bd13e72e6a002407649b3e898535f42ceb1aeb9",
    paths=("data/enwiki/*.parquet",),  # about 3.5 billion tokens
    metadata_columns=("url", "title"),
    budget_tokens=4 * BILLION,
    max_epochs=2,
    text_per_byte=0.8,  # the column of wikitext is larger than that of text, and is not read
    bytes_per_token=4.3,
    kept=0.9,
)

SCIENCE = Source(
    name="science",
    kind="long",
    description="peS2o: openly licensed scientific papers",
    licence="CC-BY or CC0, by document",
    repo="common-pile/peS2o_filtered",
    revision="297747513bfb0ff1fbf61ddad3b03319d0f04597",
    paths=("peS2o-*.json.gz",),  # 91 files, about 43 billion tokens
    metadata_columns=("metadata.license", "source"),
    budget_tokens=7 * BILLION,
    text_per_byte=2.8,
    bytes_per_token=4.2,
    kept=0.8,
)

QA = Source(
    name="qa",
    kind="qa",
    description="questions and answers of Stack Exchange",
    licence="CC-BY-SA",
    repo="common-pile/stackexchange_filtered",
    revision="c0ac7373830c688a43fc12d1988c4b19ccd884ab",
    paths=("stackexchange-*.json.gz",),  # about 24 billion tokens
    id_column=None,  # they count within each site
    metadata_columns=("metadata.url", "metadata.site", "metadata.all_licenses"),
    budget_tokens=4 * BILLION,
    text_per_byte=2.6,
    bytes_per_token=3.9,
    kept=0.8,
)

CODE = Source(
    name="code",
    kind="code",
    description="Stack v2, the educational files, permissive licences only",
    licence="permissive (Blue Oak list), by document",
    repo="common-pile/stackv2_edu_filtered",
    revision="c354dbe88469a1153e97c6a63ac50591849654de",
    paths=("stack-edu-*.json.gz",),  # 95 files, 83 GB, about 68 billion tokens
    id_column=None,  # ids are those of contents, which may stand in several repositories
    metadata_columns=("id", "metadata.license", "metadata.gha_language"),
    budget_tokens=8 * BILLION,
    text_per_byte=3.2,
    bytes_per_token=3.4,
    kept=0.8,
)

MATH = Source(
    name="math",
    kind="math",
    description="FineMath: web pages that explain mathematics, of grade 3 and more",
    licence="ODC-By-1.0",
    repo="HuggingFaceTB/finemath",
    revision="e92b25a616738fe95dc186b64dfb19f9c8525594",
    paths=("finemath-3plus/*.parquet",),  # 21 million documents, 65 GB, about 34 billion tokens
    id_column=None,
    metadata_columns=("url", "score"),
    budget_tokens=5 * BILLION,
    max_epochs=2,
    text_per_byte=1.8,
    bytes_per_token=3.6,
    kept=0.8,
)

EIGHT = (WIKI, BOOKS, SCIENCE, MATH, QA, CODE, WEB_EDU, WEB)

MEDQA = Source(
    name="medqa",
    kind="questions",
    description="MedQA: questions of the United States medical licensing examination, the training part",
    licence="CC-BY-4.0",
    repo="GBaker/MedQA-USMLE-4-options",
    revision="0fb93dd23a7339b6dcd27e241cb9b5eca62d4d18",
    paths=("phrases_no_exclude_train.jsonl",),  # 10,178 questions, about 3 million tokens
    text_columns=("question", "options", "answer_idx", "answer"),
    row_text=medqa_text,
    id_column=None,
    budget_tokens=10 * BILLION,  # a tenth, as asked for; it holds a few thousandths of that
    max_epochs=4,  # arXiv:2305.16264: up to four epochs are worth nearly as much as new text
    text_per_byte=0.6,
    bytes_per_token=4.5,
)

FINEWEB = Source(
    name="fineweb",
    kind="clean_web",
    description="FineWeb: web pages, a sample of 100 billion tokens",
    licence="ODC-By-1.0",
    repo="HuggingFaceFW/fineweb",
    revision="9bb295ddab0e05d785b879661af7260fed5140fc",
    paths=("sample/100BT/*.parquet",),
    metadata_columns=("url", "dump", "language_score"),
    budget_tokens=100 * BILLION,
    text_per_byte=1.5,
    bytes_per_token=4.5,
    kept=0.8,
)

COSMOPEDIA = Source(
    name="cosmopedia",
    kind="synthetic",
    description="Cosmopedia v2: textbooks, stories and articles that a language model wrote",
    licence="ODC-By-1.0",
    repo="HuggingFaceTB/smollm-corpus",
    revision="3ba9d605774198c5868892d7a8deda78031a781f",
    paths=("cosmopedia-v2/*.parquet",),  # 39 million documents, about 28 billion tokens
    id_column=None,
    metadata_columns=("audience", "format"),  # never `prompt`: it quotes the page that the text was made from
    budget_tokens=20 * BILLION,
    text_per_byte=1.7,
    bytes_per_token=4.6,
    kept=0.9,
)

ALPACA = Source(
    name="alpaca",
    kind="questions",
    description="Alpaca: 52,002 instructions and responses that a language model wrote, for fine-tuning only",
    licence="CC-BY-NC-4.0",
    repo="tatsu-lab/alpaca",
    revision="dce01c9b08f87459cf36a430d809084718273017",
    paths=("data/*.parquet",),
    text_columns=("instruction", "input", "output"),
    row_text=alpaca_text,
    id_column=None,
    text_per_byte=1.7,
)

OWN = Source(
    name="own",
    kind="own",
    description="text of your own: a folder of text, JSON lines or parquet",
    licence="your own",
    id_column=None,  # nobody knows what is unique there
    paths=tuple(
        f"*{suffix}"
        for suffix in (".txt", ".md", ".rst", ".txt.gz", ".parquet")
        + tuple(rows + packed for rows in (".jsonl", ".ndjson", ".json") for packed in ("", ".gz", ".zst"))
    ),
)

# Named in papers, but not to be read as they are. A recipe that asks for one is refused with the reason.
REFUSED = (
    Source(
        name="stack_v2",
        kind="code",
        description="The Stack v2",
        licence="by document",
        repo="bigcode/the-stack-v2",
        refused="bigcode/the-stack-v2 is gated and holds no text, only names of blobs to fetch from Software Heritage "
        "under an agreement; use the source `code` (common-pile/stackv2_edu_filtered), which holds the text",
    ),
    Source(
        name="starcoder",
        kind="code",
        description="StarCoder data",
        licence="by document",
        repo="bigcode/starcoderdata",
        refused="bigcode/starcoderdata is gated: its terms must be accepted by name; use the source `code`",
    ),
    Source(
        name="stack_edu",
        kind="code",
        description="Stack-Edu",
        licence="by document",
        repo="HuggingFaceTB/stack-edu",
        refused="HuggingFaceTB/stack-edu holds no text, only names of blobs to fetch from Software Heritage (hours, "
        "under an agreement); use the source `code` (common-pile/stackv2_edu_filtered), which holds the text",
    ),
    Source(
        name="python_edu",
        kind="code",
        description="Python-Edu of the SmolLM corpus",
        licence="by document",
        repo="HuggingFaceTB/smollm-corpus",
        paths=("python-edu/*.parquet",),
        refused="python-edu of HuggingFaceTB/smollm-corpus holds no text, only names of blobs to fetch from Software "
        "Heritage; use the source `code` (common-pile/stackv2_edu_filtered), which holds the text",
    ),
    Source(
        name="nemotron_cc",
        kind="web",
        description="Nemotron-CC v2",
        licence="NVIDIA Data Agreement for Model Training",
        repo="nvidia/Nemotron-CC-v2",
        refused="nvidia/Nemotron-CC-v2 is gated, and its licence forbids giving it to others; use the source `web`",
    ),
)
