"""From a piece to its documents. Whatever cannot be read as meant is a document that names its problem."""

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from curation.sources import InputFile, Piece, Source


@dataclass(frozen=True, kw_only=True)
class RawDocument:
    """What a reader makes: `problem` is the rule that drops the document when its file could not be read as meant."""

    id: str
    text: str
    metadata: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


def read_piece(source: Source, piece: Piece, batch_rows: int = 1000) -> Iterator[RawDocument]:
    """The documents of a piece. Their ids and texts do not depend on how files are cut into pieces."""
    for part in piece.parts:
        yield from read_whole(source, part.file)


def read_whole(source: Source, file: InputFile) -> Iterator[RawDocument]:
    """The documents of one file that is a text. One that cannot be read gives one document that names its problem."""
    text, problem = read_text(file)
    documents: list[tuple[str, str]] = [("", text)]
    if problem is None and source.extract is not None:
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
