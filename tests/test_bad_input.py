"""A whole run over a folder in which good files lie beside every kind of damaged one."""

import gzip
import json
import random
import re
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from curation.pipeline import main
from curation.shards import main as shards_main
from curation.shards import read_manifest

SYLLABLES = [a + b for a in "bdfgklmnprstv" for b in ("a", "e", "i", "o", "u")]
# What is wrong in the folder below, as the ledger has to name it: documents that are lost.
PROBLEMS = {
    "invalid_utf8": 3,  # a line, a text file, a row of parquet
    "broken_json": 2,
    "lone_surrogate": 1,
    "wrong_column": 4,  # no such column, no object, a number for the text, a parquet file without it
    "empty_file": 3,  # JSON lines, text, parquet without rows
    "truncated_gzip": 1,
    "damaged_gzip": 1,
    "truncated_zstd": 1,
    "damaged_zstd": 1,
    "not_parquet": 1,
    "damaged_parquet": 1,
    "empty": 1,
}


def text_of(seed, n_words=60):
    draw = random.Random(seed)
    vocabulary = ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 4))) for _ in range(90)]
    return f"document {seed}: " + " ".join(draw.choices(vocabulary, k=n_words)) + "."


def lines_of(seeds):
    return [json.dumps({"text": text_of(seed)}).encode() + b"\n" for seed in seeds]


def dropped_records(out, rule):
    packed = (out / f"dropped/own/{rule}.jsonl.gz").read_bytes()
    return [json.loads(line) for line in gzip.decompress(packed).splitlines()]


def whole_lines(cut, decoder):
    return decoder.decompress(cut).count(b"\n")


def write_parquet(path, texts, **options):
    pq.write_table(pa.table({"text": texts}), path, **options)


def write_damaged_folder(folder):
    """Good and bad input; returns how many good documents there are in it."""
    good = 0

    lines = lines_of(range(200))
    lines[20] = lines[20].replace(b"document", b"d\xffcument")
    lines[40] = lines[40][:-10] + b"\n"
    lines[60] = b'{"text": "half a pair: \\ud83d and on"}\n'
    lines[80] = b'{"body": "another column"}\n'
    lines[100] = b'["no object"]\n'
    lines[120] = b'{"text": 7}\n'
    lines[140] = b'{"text": "  \\n "}\n'
    lines[160] = b"\n"  # nothing at all: no document, no problem
    lines[-1] = lines[-1][:30]  # cut off: the last line is broken too
    (folder / "lines.jsonl").write_bytes(b"".join(lines))
    good += 200 - 9

    packed = gzip.compress(b"".join(lines_of(range(1000, 1200))))
    cut = packed[: len(packed) * 2 // 3]
    (folder / "cut.jsonl.gz").write_bytes(cut)
    good += whole_lines(cut, zlib.decompressobj(wbits=31))
    hurt = bytearray(gzip.compress(b"".join(lines_of(range(2010, 2020)))))
    hurt[10] |= 6  # the second of two members: a kind of block that there is not
    (folder / "hurt.jsonl.gz").write_bytes(gzip.compress(b"".join(lines_of(range(2000, 2010)))) + hurt)
    good += 10

    packed = b"".join(zstandard.compress(b"".join(lines_of(range(n, n + 50)))) for n in (3000, 3050, 3100))
    (folder / "cut.jsonl.zst").write_bytes(packed[:-20])  # of three frames the last is cut
    good += 100
    hurt = bytearray(zstandard.compress(b"".join(lines_of(range(4000, 4050)))))
    second = zstandard.compress(b"".join(lines_of(range(4050, 4100))))
    (folder / "hurt.jsonl.zst").write_bytes(bytes(hurt) + b"\0\0\0\0" + second)  # no frame begins like that
    good += 50

    write_parquet(folder / "good.parquet", [text_of(seed) for seed in range(5000, 5020)])
    good += 20
    bad_row = pa.array([text_of(5100).encode(), b"\xff\xfe", text_of(5101).encode()], pa.binary())
    pq.write_table(pa.table({"text": bad_row.view(pa.string())}), folder / "bytes.parquet")
    good += 2
    write_parquet(folder / "groups.parquet", [text_of(s) for s in range(5200, 5230)], row_group_size=10)
    where = pq.read_metadata(folder / "groups.parquet").row_group(1).column(0)
    data = bytearray((folder / "groups.parquet").read_bytes())
    start = where.dictionary_page_offset or where.data_page_offset
    data[start : start + 12] = b"\xff" * 12  # the header of a page
    (folder / "groups.parquet").write_bytes(data)
    good += 20
    pq.write_table(pa.table({"body": ["a"]}), folder / "column.parquet")
    write_parquet(folder / "none.parquet", pa.array([], pa.string()))
    (folder / "no.parquet").write_bytes(b"PAR1 and then something else")

    (folder / "good.txt").write_text(text_of(6000))
    (folder / "marked.md").write_bytes(b"\xef\xbb\xbf" + text_of(6001).encode())
    good += 2
    (folder / "latin.txt").write_bytes("caf\u00e9 ".encode("latin-1") * 40)
    (folder / "empty.txt").write_bytes(b"")
    (folder / "empty.jsonl").write_bytes(b"")
    (folder / "picture.png").write_bytes(b"\x89PNG")  # not asked for: not read, not counted
    return good


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    good = write_damaged_folder(folder)
    out = tmp_path_factory.mktemp("run") / "data"
    flags = ["--recipe", "own", "--input", str(folder), "--vocab-size", "512", "--workers", "2"]
    assert main([*flags, "--out", str(out)]) == 0
    return out, good, flags


def test_every_kind_of_bad_input_is_counted_by_its_name(made):
    dropped = read_manifest(made[0])["funnel"]["own"]["dropped"]
    assert {rule: entry["documents"] for rule, entry in dropped.items()} == PROBLEMS


def test_good_documents_beside_bad_ones_survive(made):
    out, good, _ = made
    manifest = read_manifest(out)
    assert manifest["funnel"]["own"]["kept"]["documents"] == good
    assert sum(manifest["splits"][split]["documents"] for split in manifest["splits"]) == good
    assert shards_main(["verify", str(out)]) == 0


@pytest.mark.parametrize(
    ("name", "data", "found"),
    [
        (
            "a.jsonl",
            '{"question": "?", "answer": "!"}\n' * 5 + "{\n",
            r"5 dropped as wrong_column \(such as own/a.jsonl@0: columns: question, answer\), 1 .* broken_json",
        ),
        ("a.json", '[\n  {"text": "one"},\n]\n', r"3 dropped as broken_json \(such as own/a.json@0: \["),
    ],
    ids=["other column", "array"],
)
def test_run_that_leaves_no_text_says_which_rules_took_it(tmp_path, capsys, name, data, found):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / name).write_text(data)
    flags = ["--recipe", "own", "--input", str(tmp_path / "texts"), "--vocab-size", "512", "--workers", "1"]
    assert main([*flags, "--out", str(tmp_path / "data")]) == 2
    error = capsys.readouterr().err
    assert re.search(f"no text is left to train on: . documents read, {found}.*need a column `text`", error), error


def test_ledger_adds_up_in_documents_and_bytes(made):
    entry = read_manifest(made[0])["funnel"]["own"]
    for unit in ("documents", "text_bytes"):
        dropped = sum(counts[unit] for counts in entry["dropped"].values())
        removed = entry["removed_by_rewrites"].get(unit, 0)
        assert entry["read"][unit] == entry["kept"][unit] + dropped + removed
        assert entry["kept"][unit] == entry["train"][unit] + entry["heldout"][unit]
    assert entry["read"]["documents"] == made[1] + sum(PROBLEMS.values())


def test_what_was_dropped_is_there_to_look_at(made):
    out, _, _ = made
    for rule, n in PROBLEMS.items():
        records = dropped_records(out, rule)
        assert len(records) == n and all(record["id"].startswith("own/") for record in records)
    (record,) = dropped_records(out, "damaged_parquet")
    assert record["id"] == "own/groups.parquet#10-19"  # the rows that are lost


def test_mended_file_is_read_again_and_the_rest_is_not(made, tmp_path):
    """The user repairs one file: the same command with --update takes up what was lost."""
    out, good, flags = made
    folder = flags[flags.index("--input") + 1]
    before = {path.name for path in (out / "work/read").iterdir()}
    with open(f"{folder}/cut.jsonl.gz", "wb") as file:
        file.write(gzip.compress(b"".join(lines_of(range(1000, 1200)))))
    assert main([*flags, "--out", str(out), "--update"]) == 0
    entry = read_manifest(out)["funnel"]["own"]
    assert "truncated_gzip" not in entry["dropped"]
    assert entry["kept"]["documents"] > good
    assert len({path.name for path in (out / "work/read").iterdir()} - before) == 1
