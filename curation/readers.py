"""From a piece to its documents, with bounded memory.

What cannot be read as meant (a line, a row group, the rest of a file) is a document too: one whose `problem` names
what is wrong. The good documents beside it are read. Ids and texts do not depend on how files are cut into pieces.
"""

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import orjson
import zstandard

from curation.hub import open_file
from curation.sources import FilePart, InputFile, Piece, Source, is_packed, is_rows, suffix_of

CHUNK_BYTES = 1 << 20
ZSTD_BYTES = 1 << 13  # of a zstd file at once: a few bytes may stand for very many, and the library sets no limit
BATCH_BYTES = 1 << 24  # of text in a batch of parquet rows
MAX_LINE_BYTES = 1 << 27  # a longer line, or text file, is no document but a mistake
SHOWN_BYTES = 100_000  # of a line that could not be read


@dataclass(frozen=True, kw_only=True)
class RawDocument:
    """What a reader makes: `problem` is the rule that drops the document when it could not be read as meant."""

    id: str
    text: str
    metadata: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


class DamagedError(Exception):
    """A packed file ends early or is broken; its name says how."""


def read_piece(source: Source, piece: Piece, batch_rows: int = 1000) -> Iterator[RawDocument]:
    """The documents of a piece, part by part.

    Problems of files, or of what is left of one: empty_file, huge_file, changed_since_listed, unreadable_file,
    network, wrong_column, not_parquet, damaged_parquet (a row group, or the rest of one), truncated_gzip,
    damaged_gzip, truncated_zstd, damaged_zstd. Of lines, rows and files of text: invalid_utf8, broken_json,
    lone_surrogate, wrong_column, huge_line. Of Python files: syntax_error.
    """
    for part in piece.parts:
        read = read_part(source, part, batch_rows)
        try:
            yield from read
        except ConnectionError as error:
            yield problem_of(source, part, "network", str(error))
        except OSError as error:
            yield problem_of(source, part, "unreadable_file", str(error))


def problem_of(source: Source, part: FilePart, problem: str, text: str = "", place: str = "") -> RawDocument:
    name = f"{source.name}/{part.file.name}{place or f'[{part.start},{part.stop})'}"
    return RawDocument(id=name, text=text, problem=problem)


def read_part(source: Source, part: FilePart, batch_rows: int) -> Iterator[RawDocument]:
    if source.extract is not None or not is_rows(part.file.name):
        yield from read_whole(source, part.file)
        return
    with open_file(part.file.path) as opened:
        size_bytes = opened.seek(0, 2)
        if size_bytes != part.file.size_bytes:
            yield problem_of(source, part, "changed_since_listed")
        elif not size_bytes:
            yield problem_of(source, part, "empty_file")
        elif suffix_of(part.file.name) == ".parquet":
            yield from read_parquet(source, part, opened, batch_rows)
        else:
            opened.seek(0)
            yield from read_json_lines(source, part, opened)


# ---- packed files


def unpack(opened: BinaryIO, name: str, stop: int) -> Iterator[bytes]:
    """What the first `stop` bytes of a gzip or zstd file hold, in chunks.

    Raises DamagedError behind the last good chunk. Files of several members or frames are one stream. Ending at
    `stop` is no damage where the file goes on.
    """
    is_gzip = name.lower().endswith(".gz")
    kind = "gzip" if is_gzip else "zstd"
    left = stop
    decoder: Any = None
    waiting = b""
    while True:
        if not waiting:
            waiting = opened.read(min(CHUNK_BYTES if is_gzip else ZSTD_BYTES, left))
            left -= len(waiting)
            if not waiting:
                break
        if decoder is None:
            if is_gzip and not waiting.strip(b"\0"):  # some writers pad the end with zeros
                waiting = b""
                continue
            decoder = (
                zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
                if is_gzip
                else zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            )
        before = decoder.copy() if is_gzip else None
        try:
            data = decoder.decompress(waiting, 4 * CHUNK_BYTES) if is_gzip else decoder.decompress(waiting)
        except (zlib.error, zstandard.ZstdError):
            yield from up_to_damage(before, waiting)
            raise DamagedError(f"damaged_{kind}") from None
        waiting = decoder.unconsumed_tail if is_gzip else b""
        if data:
            yield data
        if decoder.eof:
            waiting = decoder.unused_data
            decoder = None
    if decoder is not None and not opened.read(1):
        raise DamagedError(f"truncated_{kind}")


def up_to_damage(decoder: Any, data: bytes) -> Iterator[bytes]:
    """What a gzip decoder gives of data that it cannot read to the end: a call that fails gives nothing."""
    step = 1 << 12
    start = 0
    while decoder is not None and start < len(data):
        before = decoder.copy()
        try:
            yield decoder.decompress(data[start : start + step])
            start += step
        except zlib.error:
            if step == 1:
                return
            decoder, step = before, max(step >> 4, 1)


# ---- JSON lines


def read_json_lines(source: Source, part: FilePart, opened: BinaryIO) -> Iterator[RawDocument]:
    """The documents of a plain file's lines that begin in the part, or of all lines of a packed one."""
    if is_packed(part.file.name):
        chunks, offset, stop = unpack(opened, part.file.name, part.stop), 0, None
    else:
        # a line that begins at `start` belongs here, which the byte before tells
        offset, stop = max(part.start - 1, 0), part.stop
        opened.seek(offset)
        chunks = iter(lambda: opened.read(CHUNK_BYTES), b"")
    in_part = part.stop < part.file.size_bytes
    is_first = part.start > 0
    for start, line, problem in split_lines(chunks, offset):
        if stop is not None and start >= stop:
            break
        if is_first:  # the end of a line of the part before
            is_first = False
            continue
        place = f"{source.name}/{part.file.name}@{start}"
        if problem == "no_newline" and is_packed(part.file.name) and in_part:
            break  # where reading was to stop, in the middle of a line
        if problem in (None, "no_newline"):
            if line.strip():
                yield line_document(source, place, line)
        else:
            yield RawDocument(id=place, text=line.decode(errors="replace"), problem=problem)


def split_lines(chunks: Iterable[bytes], offset: int) -> Iterator[tuple[int, bytes, str | None]]:
    """(offset, line without its end, problem) of a stream that begins at `offset`.

    The problem of a last line without an end is no_newline; of one that damage cut off, or of the place where it
    struck, the damage; of a line that is too long huge_line, and the line is its beginning.
    """
    pending: list[bytes] = []  # of the line that has not ended yet
    n_pending = 0
    is_huge = False
    try:
        for chunk in chunks:
            lines = chunk.split(b"\n")
            for line in lines[:-1]:
                if pending:
                    pending.append(line)
                    n_pending += len(line)
                    line = b"".join(pending)
                    if is_huge or n_pending > MAX_LINE_BYTES:
                        yield offset, line[:SHOWN_BYTES], "huge_line"
                    else:
                        yield offset, line, None
                    offset += n_pending + 1
                    pending, n_pending, is_huge = [], 0, False
                elif len(line) > MAX_LINE_BYTES:
                    yield offset, line[:SHOWN_BYTES], "huge_line"
                    offset += len(line) + 1
                else:
                    yield offset, line, None
                    offset += len(line) + 1
            if lines[-1]:
                n_pending += len(lines[-1])
                if n_pending > MAX_LINE_BYTES:
                    pending, is_huge = [b"".join(pending)[:SHOWN_BYTES] or lines[-1][:SHOWN_BYTES]], True
                else:
                    pending.append(lines[-1])
    except DamagedError as error:
        yield offset, b"".join(pending)[:SHOWN_BYTES], str(error)
        return
    if is_huge:
        yield offset, pending[0], "huge_line"
    elif pending:
        yield offset, b"".join(pending), "no_newline"


def line_document(source: Source, place: str, line: bytes) -> RawDocument:
    line = line.removeprefix(b"\xef\xbb\xbf")  # some programs begin a file with this mark
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        row, problem = reread(line)
        if problem:
            return RawDocument(id=place, text=line[:SHOWN_BYTES].decode(errors="replace"), problem=problem)
    if not isinstance(row, dict):
        return RawDocument(id=place, text=line[:SHOWN_BYTES].decode(errors="replace"), problem="wrong_column")
    return row_document(source, place, row)


def reread(line: bytes) -> tuple[Any, str | None]:
    """What the strict parser refused: NaN and Infinity are fine, the rest has a problem."""
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        return None, "invalid_utf8"
    except UnicodeEncodeError:
        return None, "lone_surrogate"
    except (ValueError, RecursionError):
        return None, "broken_json"
    return row, None


def row_document(source: Source, place: str, row: Mapping[str, Any]) -> RawDocument:
    """The document of a row: its id from the id column, or else from its place."""
    metadata = {name: value for name in source.metadata_columns if (value := value_at(row, name)) is not None}
    given = row.get(source.id_column) if source.id_column else None
    identity = place if given is None else f"{source.name}/{given}"
    try:
        if source.row_text is not None:
            text = source.row_text(row)
        else:
            text = row[source.text_columns[0]]
            text = "" if text is None else text
    except (KeyError, TypeError, AttributeError):
        text = None
    if not isinstance(text, str):
        has = "columns: " + ", ".join(map(str, row))
        return RawDocument(id=identity, text=has[:SHOWN_BYTES], metadata=metadata, problem="wrong_column")
    return RawDocument(id=identity, text=text, metadata=metadata)


def value_at(row: Mapping[str, Any], name: str) -> Any:
    """The value of column a, or of field b of a for `a.b`, as a JSON value; None where there is none."""
    value: Any = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value if isinstance(value, str | int | float | bool | list | dict | None) else str(value)


# ---- parquet


def read_parquet(source: Source, part: FilePart, opened: BinaryIO, batch_rows: int) -> Iterator[RawDocument]:
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    try:
        parquet = pq.ParquetFile(opened)
    except ConnectionError:
        raise
    except (OSError, ArrowException) as error:
        yield problem_of(source, part, "not_parquet", str(error).split("\n")[0])
        return
    schema, footer = parquet.schema_arrow, parquet.metadata
    missing = [name for name in source.text_columns if name not in schema.names]
    if missing or (source.row_text is None and not is_text(schema.field(source.text_columns[0]).type)):
        yield problem_of(source, part, "wrong_column", "columns: " + ", ".join(map(str, schema.names)))
        return
    if not footer.num_rows:
        yield problem_of(source, part, "empty_file")
        return
    id_columns = (source.id_column,) if source.id_column else ()
    columns = [*source.text_columns, *id_columns, *source.metadata_columns]
    first_row = sum(footer.row_group(i).num_rows for i in range(part.start))
    for group in range(part.start, part.stop):
        n_rows = footer.row_group(group).num_rows
        done = 0
        try:
            size = rows_of_batch(footer.row_group(group), source.text_columns, batch_rows)
            for batch in parquet.iter_batches(size, row_groups=[group], columns=columns, use_threads=False):
                yield from batch_documents(source, part, batch, first_row + done)
                done += batch.num_rows
        except ConnectionError:
            raise
        except (OSError, ArrowException) as error:
            lost = f"#{first_row + done}-{first_row + n_rows - 1}"  # the rows that are not read
            yield problem_of(source, part, "damaged_parquet", str(error).split("\n")[0], lost)
        first_row += n_rows


def is_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_null(kind)


def rows_of_batch(group: Any, text_columns: tuple[str, ...], batch_rows: int) -> int:
    """As many rows as hold about BATCH_BYTES of text, at most batch_rows."""
    columns = [group.column(i) for i in range(group.num_columns)]
    size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] in text_columns)
    return max(min(batch_rows, BATCH_BYTES * group.num_rows // max(size, 1)), 1)


def batch_documents(source: Source, part: FilePart, batch: Any, first_row: int) -> Iterator[RawDocument]:
    values = {name: column_values(batch.column(i)) for i, name in enumerate(batch.schema.names)}
    for i in range(batch.num_rows):
        place = f"{source.name}/{part.file.name}#{first_row + i}"
        row = {name: column[i] for name, column in values.items()}
        if any(isinstance(row[name], bytes) for name in source.text_columns):
            text = b" ".join(row[name] for name in source.text_columns if isinstance(row[name], bytes))
            yield RawDocument(id=place, text=text[:SHOWN_BYTES].decode(errors="replace"), problem="invalid_utf8")
        else:
            yield row_document(source, place, row)


def column_values(column: Any) -> list[Any]:
    """The values; of a string column that is not all UTF-8, bytes in the place of those that are not."""
    from pyarrow import large_binary, large_string

    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        if not is_text(column.type):
            return [None] * len(column)  # of metadata nothing else hangs on
        values: list[Any] = column.cast(large_string()).cast(large_binary()).to_pylist()
    return [value if value is None or not is_utf8(value) else value.decode() for value in values]


def is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


# ---- files that are one text


def read_whole(source: Source, file: InputFile) -> Iterator[RawDocument]:
    """The documents of one file that is a text. One that cannot be read gives one document that names its problem."""
    text, problem = read_text(file)
    documents: list[tuple[str, str]] = [("", text)]
    if problem is None and source.extract is None and not file.size_bytes:
        problem = "empty_file"  # an empty Python file is as good as another
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
    """Text of a file, unpacked if its name says so, and the problem with it. Newlines become plain \\n."""
    problem = None
    data = b""
    try:
        with open_file(file.path) as opened:
            size_bytes = opened.seek(0, 2)
            opened.seek(0)
            if size_bytes > MAX_LINE_BYTES:
                return "", "huge_file"
            if size_bytes != file.size_bytes:
                problem = "changed_since_listed"
            if is_packed(file.name):
                for chunk in unpack(opened, file.name, size_bytes):
                    data += chunk
                    if len(data) > MAX_LINE_BYTES:
                        return "", "huge_file"
            else:
                data = opened.read()
    except DamagedError as error:  # what can be read is kept, for whoever looks at what was dropped
        problem = str(error)
    except ConnectionError:
        return "", "network"
    except OSError:
        return "", "unreadable_file"
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text, problem = data.decode(errors="replace"), problem or "invalid_utf8"
    return text.replace("\r\n", "\n").replace("\r", "\n"), problem
