"""Reading pieces: the same documents however files are cut, and bad input that is named without harm to the good."""

import gzip
import json
import random
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from curation import readers
from curation.readers import read_piece
from curation.sources import (
    OWN,
    FilePart,
    InputFile,
    Piece,
    Source,
    alpaca_text,
    list_files,
    make_pieces,
    medqa_text,
    split_piece,
)

GIGANTIC = 1 << 40


def own(folder, **changes):
    return replace(OWN, folder=str(folder), **changes)


def read_all(source, piece_bytes=GIGANTIC, splits=0):
    """Every document of a source, by id."""
    pieces = make_pieces(source, list_files(source), piece_bytes)
    for _ in range(splits):
        pieces = [half for piece in pieces for half in (split_piece(piece) or [piece])]
    documents = [document for piece in pieces for document in read_piece(source, piece)]
    found = {document.id: document for document in documents}
    assert len(found) == len(documents), "an id came twice"
    return found


def problems(documents):
    return sorted(document.problem for document in documents.values() if document.problem)


def good(documents):
    return sorted(document.text for document in documents.values() if document.problem is None)


def rows(n, draw=None):
    draw = draw or random.Random(1)
    return [{"id": f"d{i}", "text": f"text {i} é " * draw.randint(1, 40), "url": f"http://x/{i}"} for i in range(n)]


def lines(records):
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


# ---- the same documents, however files are cut


@pytest.mark.parametrize("piece_bytes", [1, 700, 5_000, 100_000, GIGANTIC])
def test_documents_do_not_depend_on_how_lines_are_cut_into_pieces(tmp_path, piece_bytes):
    records = rows(300)
    (tmp_path / "a.jsonl").write_bytes(lines(records))
    (tmp_path / "b.jsonl").write_bytes(lines(records[:50])[:-1])  # no newline at its end
    (tmp_path / "c.jsonl").write_bytes(b"\n\n" + lines(records[:3]) + b"\r\n\n")
    source = own(tmp_path)
    piece_bytes = max(piece_bytes, 20)  # every byte a piece is a test of patience only
    documents = read_all(source, piece_bytes)
    assert not problems(documents)
    assert good(documents) == sorted(r["text"] for r in records + records[:50] + records[:3])
    assert documents == read_all(source)
    assert "own/a.jsonl@0" in documents and "own/c.jsonl@2" in documents


def test_line_that_begins_where_a_piece_begins_belongs_to_that_piece_alone(tmp_path):
    data = lines(rows(20))
    (tmp_path / "a.jsonl").write_bytes(data)
    source, (file,) = own(tmp_path), list_files(own(tmp_path))
    expected = read_all(source)
    for cut in range(len(data) + 1):
        halves = [FilePart(file=file, start=a, stop=b, size_bytes=b - a) for a, b in ((0, cut), (cut, len(data)))]
        found = [d.id for half in halves for d in read_piece(source, Piece(source="own", parts=(half,)))]
        assert found == list(expected), cut


def test_documents_do_not_depend_on_how_row_groups_are_cut_or_batched(tmp_path):
    records = rows(500)
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet", row_group_size=30)
    source = own(tmp_path, id_column="id", metadata_columns=("url",))
    expected = read_all(source)
    assert good(expected) == sorted(record["text"] for record in records)
    assert expected["own/d7"].metadata == {"url": "http://x/7"}
    assert len(make_pieces(source, list_files(source), 2_000)) > 3
    assert read_all(source, 2_000) == expected
    assert read_all(source, splits=3) == expected
    (piece,) = make_pieces(source, list_files(source), GIGANTIC)
    assert [d.id for d in read_piece(source, piece, batch_rows=7)] == list(expected)
    without_ids = read_all(own(tmp_path), 2_000)
    assert without_ids == read_all(own(tmp_path)) and "own/a.parquet#499" in without_ids


def test_packed_files_of_several_members_and_frames_are_one_stream(tmp_path):
    records = rows(60)
    (tmp_path / "a.jsonl.gz").write_bytes(
        gzip.compress(lines(records[:20])) + gzip.compress(lines(records[20:40])[:-1]) + b"\0" * 512
    )
    frames = [zstandard.compress(lines(records[40:50])), zstandard.compress(lines(records[50:]))]
    (tmp_path / "b.jsonl.zst").write_bytes(b"".join(frames))
    documents = read_all(own(tmp_path))
    assert not problems(documents) and good(documents) == sorted(record["text"] for record in records)


@pytest.mark.parametrize("packed", ["gz", "zst"])
def test_part_of_a_packed_file_gives_the_first_documents_and_no_problem(tmp_path, packed):
    data = lines(rows(4_000))
    data = gzip.compress(data) if packed == "gz" else zstandard.compress(data, level=1)
    (tmp_path / f"a.jsonl.{packed}").write_bytes(data)
    source = own(tmp_path)
    (file,) = list_files(source)
    everything = list(read_all(source).values())
    (piece,) = make_pieces(source, [replace(file, take_bytes=len(data) // 2)], GIGANTIC)
    found = list(read_piece(source, piece))
    assert 0 < len(found) < len(everything) and found == everything[: len(found)]


def test_memory_is_bounded_by_the_batch_not_by_the_row_group(tmp_path):
    texts = ["x" * 1_000_000 + str(i) for i in range(64)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=64)
    group = pq.read_metadata(tmp_path / "a.parquet").row_group(0)
    assert readers.rows_of_batch(group, ("text",), 1000) <= 1000
    assert [document.text for document in read_all(own(tmp_path)).values()] == texts
    plain = pa.table({"text": [random.Random(i).randbytes(500_000).hex() for i in range(64)]})
    pq.write_table(plain, tmp_path / "a.parquet", row_group_size=64, use_dictionary=False)
    group = pq.read_metadata(tmp_path / "a.parquet").row_group(0)
    assert readers.rows_of_batch(group, ("text",), 1000) == 16


# ---- bad input


def test_one_bad_byte_costs_one_document_of_two_thousand(tmp_path):
    data = [json.dumps(record).encode() for record in rows(2_000)]
    data[700] = data[700].replace(b"text", b"\xff\xfe", 1)
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(data))
    documents = read_all(own(tmp_path), 10_000)
    assert len(good(documents)) == 1_999 and problems(documents) == ["invalid_utf8"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "cut', "broken_json"),
        (b'{"text": "\xff"}', "invalid_utf8"),
        (b'{"text": "\\ud800"}', "lone_surrogate"),
        (b'{"body": "other name"}', "wrong_column"),
        (b'{"text": 5}', "wrong_column"),
        (b'["a", "b"]', "wrong_column"),
        (b'{"text": "fine", "score": NaN}', None),
        (b'\xef\xbb\xbf{"text": "fine"}', None),
        (b'{"text": null}', None),  # a document without text, which the rules drop
    ],
)
def test_bad_line_is_a_document_with_its_problem_and_its_neighbours_are_read(tmp_path, line, problem):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n')
    found = list(read_all(own(tmp_path)).values())
    assert [document.problem for document in found] == [None, problem, None]
    assert (found[0].text, found[2].text) == ("before", "after")


@pytest.mark.parametrize(
    ("name", "pack", "cut", "problem"),
    [
        ("a.jsonl.gz", gzip.compress, -20, "truncated_gzip"),
        ("a.jsonl.zst", zstandard.compress, -20, "truncated_zstd"),
        ("a.jsonl.gz", gzip.compress, 9, "truncated_gzip"),
        ("a.jsonl.zst", zstandard.compress, 5, "truncated_zstd"),
    ],
)
def test_cut_packed_file_keeps_what_came_before_the_cut(tmp_path, name, pack, cut, problem):
    draw = random.Random(0)
    records = [{"text": draw.randbytes(200).hex()} for _ in range(3_000)]
    (tmp_path / name).write_bytes(pack(lines(records))[:cut])
    documents = read_all(own(tmp_path))
    assert problems(documents) == [problem]
    kept = [document.text for document in documents.values() if document.problem is None]
    assert kept == [record["text"] for record in records[: len(kept)]]
    assert len(kept) > 2_000 if cut < 0 else not kept


@pytest.mark.parametrize(("packed", "kind"), [("gz", "gzip"), ("zst", "zstd")])
def test_damage_inside_a_packed_file_is_named_and_the_documents_before_it_survive(tmp_path, packed, kind):
    draw = random.Random(0)
    data = lines({"text": draw.randbytes(200).hex()} for _ in range(9_000))
    data = bytearray(gzip.compress(data) if packed == "gz" else zstandard.compress(data))
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(64)
    (tmp_path / f"a.jsonl.{packed}").write_bytes(data)
    (tmp_path / f"b.jsonl.{packed}").write_bytes(b"no such format\n" * 5)
    documents = read_all(own(tmp_path))
    # where the codes still decode, nonsense goes on until a checksum does not agree
    assert f"damaged_{kind}" in problems(documents)
    assert len(good(documents)) > 2_000
    assert documents[f"own/b.jsonl.{packed}@0"].problem == f"damaged_{kind}"


def test_bad_parquet_is_named_by_file_row_group_and_row(tmp_path):
    records = rows(400)
    table = pa.Table.from_pylist(records)
    pq.write_table(table, tmp_path / "good.parquet", row_group_size=100, compression="zstd")
    data = (tmp_path / "good.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(data[:-50])
    (tmp_path / "text.parquet").write_bytes(b"PAR1 is how it should begin")
    (tmp_path / "empty.parquet").write_bytes(b"")
    pq.write_table(table.slice(0, 0), tmp_path / "norows.parquet")
    pq.write_table(table.rename_columns(["id", "body", "url"]), tmp_path / "column.parquet")
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "numbers.parquet")
    group = pq.read_metadata(tmp_path / "good.parquet").row_group(2)
    start = group.column(1).dictionary_page_offset or group.column(1).data_page_offset
    damaged = bytearray(data)
    damaged[start + 30 : start + 200] = bytes(170)
    (tmp_path / "damaged.parquet").write_bytes(damaged)
    documents = read_all(own(tmp_path), 1_000)
    named = {document.id: document.problem for document in documents.values() if document.problem}
    assert {id.split("[")[0].split("#")[0].removeprefix("own/"): problem for id, problem in named.items()} == {
        "cut.parquet": "not_parquet",
        "text.parquet": "not_parquet",
        "empty.parquet": "empty_file",
        "norows.parquet": "empty_file",
        "column.parquet": "wrong_column",
        "numbers.parquet": "wrong_column",
        "damaged.parquet": "damaged_parquet",
    }
    assert "own/damaged.parquet#200-299" in named
    assert good(documents) == sorted([r["text"] for r in records] + [r["text"] for r in records[:200] + records[300:]])


def test_invalid_utf8_in_parquet_costs_its_row_alone(tmp_path):
    texts = [b"one", b"tw\xffo", None, b"four"]
    column = pa.array(texts, pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    found = list(read_all(own(tmp_path)).values())
    assert [(d.text, d.problem) for d in found] == [
        ("one", None),
        ("tw\ufffdo", "invalid_utf8"),
        ("", None),
        ("four", None),
    ]


def test_empty_vanished_and_changed_files_are_named(tmp_path):
    for name in ("empty.jsonl", "empty.txt", "gone.jsonl", "gone.parquet", "gone.txt", "grown.jsonl", "grown.txt"):
        (tmp_path / name).write_bytes(b"" if name.startswith("empty") else b'{"text": "x"}\n')
    source = own(tmp_path)
    files = list_files(source)
    for path in tmp_path.iterdir():
        if path.name.startswith("gone"):
            path.unlink()
        elif path.name.startswith("grown"):
            path.write_bytes(path.read_bytes() * 2)
    found = [d for piece in make_pieces(source, files, GIGANTIC) for d in read_piece(source, piece)]
    by_name = {d.id.removeprefix("own/").split("[")[0]: d.problem for d in found}
    assert by_name == {
        "empty.jsonl": "empty_file",
        "empty.txt": "empty_file",
        "gone.jsonl": "unreadable_file",
        "gone.parquet": "unreadable_file",
        "gone.txt": "unreadable_file",
        "grown.jsonl": "changed_since_listed",
        "grown.txt": "changed_since_listed",
    }


@pytest.mark.parametrize("chunk_bytes", [1_000, 1 << 20])
def test_line_that_never_ends_is_dropped_without_being_held(tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 5_000)
    monkeypatch.setattr(readers, "CHUNK_BYTES", chunk_bytes)
    long, short = json.dumps({"text": "y" * 20_000}), '{"text": "short"}'
    (tmp_path / "a.jsonl").write_text(f"{short}\n{long}\n{short}\n{long}")
    found = list(read_all(own(tmp_path)).values())
    assert [d.problem for d in found] == [None, "huge_line", None, "huge_line"]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "z" * 4_900}))
    assert len(good(read_all(own(tmp_path)))[0]) == 4_900


# ---- texts of rows


def test_text_is_made_of_several_columns_where_a_source_says_so(tmp_path):
    question = {
        "question": "Which one?",
        "options": {"B": "no", "A": "yes"},
        "answer_idx": "A",
        "answer": "yes",
        "meta_info": "step1",
    }
    (tmp_path / "train.jsonl").write_bytes(lines([question, {"question": "no options"}]))
    columns = ("question", "options", "answer_idx", "answer")
    source = own(tmp_path, text_columns=columns, row_text=medqa_text)
    first, second = read_all(source).values()
    assert first.text == "Which one?\n\nA. yes\nB. no\n\nAnswer: A. yes" and first.problem is None
    assert second.problem == "wrong_column"
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert alpaca_text(row) == "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3"
    assert "Input" not in alpaca_text(row | {"input": ""})


def test_nested_metadata_is_taken_from_lines_and_from_parquet_alike(tmp_path):
    record = {"id": "1", "text": "t", "metadata": {"site": "beer", "votes": 3, "other": [1]}, "added": None}
    (tmp_path / "a.jsonl").write_bytes(lines([record]))
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "b.parquet")
    source = own(tmp_path, metadata_columns=("metadata.site", "metadata.votes", "added", "nowhere"))
    documents = read_all(source)
    assert [document.metadata for document in documents.values()] == [
        {"metadata.site": "beer", "metadata.votes": 3}
    ] * 2


def test_only_the_columns_that_are_needed_are_read(tmp_path):
    table = pa.table({"text": ["a"] * 1000, "wikitext": [random.Random(i).randbytes(300).hex() for i in range(1000)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    source = own(tmp_path)
    (piece,) = make_pieces(source, list_files(source), GIGANTIC)
    assert piece.size_bytes < 10_000 < (tmp_path / "a.parquet").stat().st_size


def test_a_source_without_rows_reads_whole_texts(tmp_path):
    (tmp_path / "a.md").write_bytes(b"# Title\r\nText\r\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"packed"))
    assert good(read_all(own(tmp_path))) == ["# Title\nText\n", "packed"]


def test_problem_documents_are_small_however_large_the_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": ' + b"x" * 1_000_000 + b"\n")
    ((_, document),) = read_all(own(tmp_path)).items()
    assert document.problem == "broken_json" and len(document.text) == readers.SHOWN_BYTES


def test_file_that_no_source_lists_twice_keeps_its_own_name():
    source = Source(name="s", kind="own", description="")
    part = FilePart(file=InputFile(name="a/b.txt", path="/nowhere", size_bytes=3), start=0, stop=3, size_bytes=3)
    (document,) = read_piece(source, Piece(source="s", parts=(part,)))
    assert (document.id, document.problem) == ("s/a/b.txt", "unreadable_file")


@pytest.mark.parametrize("n", [1, 60_000])
def test_lines_before_a_wrong_checksum_of_gzip_survive(tmp_path, n):
    """zlib gives nothing of a call that fails, and a small file is one call."""
    lines = [json.dumps({"text": f"line {i} {random.Random(i).random()}"}).encode() + b"\n" for i in range(n)]
    packed = bytearray(gzip.compress(b"".join(lines)))
    packed[-6] ^= 1
    (tmp_path / "a.jsonl.gz").write_bytes(packed)
    source = replace(OWN, folder=str(tmp_path))
    (piece,) = make_pieces(source, list_files(source), 10**9)
    documents = list(read_piece(source, piece))
    assert [document.problem for document in documents] == [None] * n + ["damaged_gzip"]
