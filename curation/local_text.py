"""Text that every machine with Python has: which files the recipe `local` reads, and how each becomes documents.

The functions that list files yield (name, path); the others take (name, text of the file) and yield (what to add to
the document's id, text).
"""

import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from curation.extract import docstrings, help_topics, long_description, manual_page, without_docstrings

# ---- listing


def family(name: str) -> str:
    """`torch` of torch/nn/functional.py and of torch-2.13.0.dist-info/METADATA, `man1/git` of man1/git-add.1.gz."""
    parts = name.split("/")
    depth = 1 if parts[0].startswith("man") or parts[0] == "doc" else 0
    stem = re.split(r"[-_.:]", parts[min(depth, len(parts) - 1)])[0]
    return "/".join([*parts[:depth], stem])


def walk(root: str | Path, skip: Iterable[str] = (), links: bool = False) -> Iterator[tuple[str, str]]:
    """(relative name, path) of every file under `root`; folders named in `skip` are left out.

    Links to folders are not followed, links to files only with `links`.
    """
    skip = {*skip}
    folders = [("", str(root))]
    while folders:
        prefix, folder = folders.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_file(follow_symlinks=links):
                        yield prefix + entry.name, entry.path
                    elif entry.is_dir(follow_symlinks=False) and entry.name not in skip:
                        folders.append((f"{prefix}{entry.name}/", entry.path))
        except OSError:  # no such folder, or none that we may read: its files are not there for us
            continue


def base_name(name: str) -> str:
    return name.rpartition("/")[2]


STDLIB_SKIPS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3"}
HELP_TOPICS = "pydoc_data/topics.py"


def stdlib_files() -> Iterator[tuple[str, str]]:
    """The standard library of the interpreter that is running (inside a virtual environment: of its base)."""
    files = walk(sysconfig.get_path("stdlib"), STDLIB_SKIPS)
    return ((name, path) for name, path in files if name.endswith(".py"))


def stdlib_code_files() -> Iterator[tuple[str, str]]:
    return ((name, path) for name, path in stdlib_files() if name != HELP_TOPICS)  # those are texts, not code


def package_files(skip: Iterable[str] = ()) -> Iterator[tuple[str, str]]:
    for root in sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}):
        yield from walk(root, {"__pycache__", *skip})


DOCUMENTATION = re.compile(r"(?:.*\.(?:md|rst)|METADATA|(?:LICEN[CS]E|COPYING|NOTICE|README).*)", re.IGNORECASE)
NOT_TEXT = re.compile(r".*\.(?:py|pyc|pyi|so|h|hpp|c|cpp|js|css|html|png|json|jinja2?|ipynb)", re.IGNORECASE)


def package_documentation() -> Iterator[tuple[str, str]]:
    for name, path in package_files():
        if DOCUMENTATION.fullmatch(base_name(name)) and not NOT_TEXT.fullmatch(name):
            yield name, path


def package_modules() -> Iterator[tuple[str, str]]:
    return ((name, path) for name, path in package_files(skip={"test", "tests"}) if name.endswith(".py"))


MANUALS, SYSTEM_DOCUMENTATION = Path("/usr/share/man"), Path("/usr/share/doc")
MANUAL_SECTION = re.compile(r"man[1-9]")  # beside them stand the translations, in folders named by language
SYSTEM_TEXT = re.compile(r"(?:(?:README|NEWS|FAQ|copyright|changelog).*|.*\.(?:txt|md|rst))(?:\.gz)?", re.IGNORECASE)


def system_documentation() -> Iterator[tuple[str, str]]:
    """Manual pages in English and the packages' documentation; nothing where the machine has been stripped of them."""
    for section in sorted(MANUALS.glob("man*")):
        if MANUAL_SECTION.fullmatch(section.name):
            yield from ((f"{section.name}/{name}", path) for name, path in walk(section))
    for name, path in walk(SYSTEM_DOCUMENTATION):
        if SYSTEM_TEXT.fullmatch(base_name(name)) and not NOT_TEXT.fullmatch(name):
            yield f"doc/{name}", path


# ---- from a file's text to documents


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
