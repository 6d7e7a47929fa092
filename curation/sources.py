"""The sources of text: which files each one reads, and how a file becomes documents.

A source is one entry of the list at the end of this file. To add one: write a function that lists its files, one that
makes texts of one file's text (or take one that is here), and an entry.
"""

import gzip
import hashlib
import os
import re
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from curation.extract import docstrings, help_topics, long_description, manual_page, without_docstrings

MB = 1_000_000


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One file of a source. `name` is its place in the source, the same on every machine, and part of document ids."""

    name: str
    path: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class RawDocument:
    """What a reader makes: `problem` is the rule that drops the document when its file could not be read as meant."""

    id: str
    text: str
    problem: str | None = None


# Texts of one file: (name, text of the file) -> (what to add to the document's id, text), ...
Extract = Callable[[str, str], Iterable[tuple[str, str]]]


@dataclass(frozen=True, kw_only=True)
class Source:
    name: str
    kind: str  # which rules of the recipe its documents must pass
    description: str
    budget_mb: float  # read no more raw text than about this
    files: Callable[[], Iterable[tuple[str, Path]]]  # (name, path) of every file, in any order
    extract: Extract


# ---- listing


def list_inputs(source: Source) -> list[InputFile]:
    """The source's files in the order in which they are read until its budget is full.

    Files come in the order of the hash of their names, and in rounds: the first of each family (package, command),
    then the second of each: one family with thousands of files must not fill the budget alone.
    """
    inputs = [
        InputFile(name=os.fsencode(name).decode(errors="replace"), path=str(path), size_bytes=path.stat().st_size)
        for name, path in source.files()
    ]
    inputs.sort(key=lambda file: (hashlib.sha256(file.name.encode()).digest(), file.path))
    seen: Counter[str] = Counter()
    rounds = []
    for file in inputs:
        rounds.append(seen[family(file.name)])
        seen[family(file.name)] += 1
    return [inputs[i] for i in sorted(range(len(inputs)), key=lambda i: (rounds[i], i))]


def family(name: str) -> str:
    """`torch` of torch/nn/functional.py and of torch-2.13.0.dist-info/METADATA, `man1/git` of man1/git-add.1.gz."""
    parts = name.split("/")
    depth = 1 if parts[0].startswith("man") or parts[0] == "doc" else 0
    stem = re.split(r"[-_.:]", parts[min(depth, len(parts) - 1)])[0]
    return "/".join([*parts[:depth], stem])


def walk(root: Path, skip: Iterable[str] = ()) -> Iterator[tuple[str, Path]]:
    """Every file under `root` with its relative name; folders named in `skip` are left out, links not followed."""
    skip = set(skip)
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in skip]
        for file in files:
            path = Path(folder, file)
            if not path.is_symlink():
                yield path.relative_to(root).as_posix(), path


STDLIB_SKIPS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3"}
HELP_TOPICS = "pydoc_data/topics.py"


def stdlib_files() -> Iterator[tuple[str, Path]]:
    """The standard library of the interpreter that is running (inside a virtual environment: of its base)."""
    root = Path(sysconfig.get_path("stdlib"))
    return ((name, path) for name, path in walk(root, STDLIB_SKIPS) if name.endswith(".py"))


def stdlib_code_files() -> Iterator[tuple[str, Path]]:
    return ((name, path) for name, path in stdlib_files() if name != HELP_TOPICS)  # those are texts, not code


def package_files(skip: Iterable[str] = ()) -> Iterator[tuple[str, Path]]:
    for root in sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}):
        yield from walk(Path(root), {"__pycache__", *skip})


DOCUMENTATION = re.compile(r"(?:.*\.(?:md|rst)|METADATA|(?:LICEN[CS]E|COPYING|NOTICE|README).*)", re.IGNORECASE)
NOT_TEXT = re.compile(r".*\.(?:py|pyc|pyi|so|h|hpp|c|cpp|js|css|html|png|json|jinja2?|ipynb)", re.IGNORECASE)


def package_documentation() -> Iterator[tuple[str, Path]]:
    for name, path in package_files():
        if DOCUMENTATION.fullmatch(path.name) and not NOT_TEXT.fullmatch(path.name):
            yield name, path


def package_modules() -> Iterator[tuple[str, Path]]:
    return ((name, path) for name, path in package_files(skip={"test", "tests"}) if name.endswith(".py"))


MANUALS, SYSTEM_DOCUMENTATION = Path("/usr/share/man"), Path("/usr/share/doc")
MANUAL_SECTION = re.compile(r"man[1-9]")  # beside them stand the translations, in folders named by language
SYSTEM_TEXT = re.compile(r"(?:(?:README|NEWS|FAQ|copyright|changelog).*|.*\.(?:txt|md|rst))(?:\.gz)?", re.IGNORECASE)


def system_documentation() -> Iterator[tuple[str, Path]]:
    """Manual pages in English and the packages' documentation; nothing where the machine has been stripped of them."""
    for section in sorted(MANUALS.glob("man*")):
        if MANUAL_SECTION.fullmatch(section.name):
            yield from ((f"{section.name}/{name}", path) for name, path in walk(section))
    for name, path in walk(SYSTEM_DOCUMENTATION):
        if SYSTEM_TEXT.fullmatch(path.name) and not NOT_TEXT.fullmatch(path.name):
            yield f"doc/{name}", path


# ---- reading


def read_documents(source: Source, file: InputFile) -> Iterator[RawDocument]:
    """The documents of one file. A file that cannot be read as meant gives one document that names its problem."""
    text, problem = read_text(file)
    documents: list[tuple[str, str]] = [("", text)]
    if problem is None:
        try:
            documents = list(source.extract(file.name, text))
        except (SyntaxError, RecursionError):
            problem = "syntax_error"
    for part, part_text in documents:
        identity = f"{source.name}/{file.name}" + (f"#{part}" if part else "")
        clean = part_text.encode(errors="replace").decode()  # a string literal may hold half a surrogate pair
        yield RawDocument(id=identity, text=clean, problem=problem if clean == part_text else "lone_surrogate")


def read_text(file: InputFile) -> tuple[str, str | None]:
    """Text of a file, gunzipped if its name says so, and the problem with it. Newlines become plain \\n."""
    problem = None
    try:
        data = Path(file.path).read_bytes()
    except OSError:
        return "", "unreadable_file"
    if len(data) != file.size_bytes:
        problem = "changed_since_listed"
    if file.path.endswith(".gz"):
        try:
            data = gzip.decompress(data)
        except EOFError:  # cut short: keep what can be read, for whoever looks at what was dropped
            data, problem = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS).decompress(data), "truncated_gzip"
        except (OSError, zlib.error):
            return "", "damaged_gzip"
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text, problem = data.decode(errors="replace"), problem or "invalid_utf8"
    return text.replace("\r\n", "\n").replace("\r", "\n"), problem


def code(name: str, text: str) -> Iterator[tuple[str, str]]:
    yield "", without_docstrings(text)


def module_docstrings(name: str, text: str) -> Iterator[tuple[str, str]]:
    """One document a module; none for a module without docstrings."""
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    if found := docstrings(text, module):
        yield "", found


def stdlib_documentation(name: str, text: str) -> Iterable[tuple[str, str]]:
    return help_topics(text).items() if name == HELP_TOPICS else module_docstrings(name, text)


def package_text(name: str, text: str) -> Iterator[tuple[str, str]]:
    text = long_description(text) if name.endswith("METADATA") else text
    if text.strip():
        yield "", text


MAX_CHANGELOG = 20_000  # characters: the newest entries; the rest is more of the same


def system_text(name: str, text: str) -> Iterator[tuple[str, str]]:
    if not name.startswith("doc/"):
        page = manual_page(text)
        if page is not None:  # a page that only points to another is no document of its own
            yield "", page
    elif "changelog" in name.lower() and len(text) > MAX_CHANGELOG:
        yield "", text[: text.rfind("\n", 0, MAX_CHANGELOG) + 1]
    else:
        yield "", text


# ---- the list: of two duplicates, the one from the earlier source is kept

LOCAL = (
    Source(
        name="stdlib_code",
        kind="code",
        description="the Python standard library's sources, without their docstrings",
        budget_mb=12,
        files=stdlib_code_files,
        extract=code,
    ),
    Source(
        name="stdlib_docs",
        kind="prose",
        description="Python's help topics, and the docstrings of each module of the standard library",
        budget_mb=8,
        files=stdlib_files,
        extract=stdlib_documentation,
    ),
    Source(
        name="package_docs",
        kind="prose",
        description="READMEs, licences and other .md and .rst files of the installed Python packages",
        budget_mb=8,
        files=package_documentation,
        extract=package_text,
    ),
    Source(
        name="package_docstrings",
        kind="prose",
        description="docstrings of the installed Python packages, module by module",
        budget_mb=5,
        files=package_modules,
        extract=module_docstrings,
    ),
    Source(
        name="system_docs",
        kind="prose",
        description="manual pages and package documentation of the operating system",
        budget_mb=4.5,
        files=system_documentation,
        extract=system_text,
    ),
)
