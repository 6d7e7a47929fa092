"""Curation: what becomes text, what each rule drops, which duplicates are found, and killed runs that go on."""

import argparse
import ast
import fcntl
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from curation import pipeline
from curation.dedup import band_keys, components, find_duplicates, text_digest
from curation.extract import docstrings, help_topics, long_description, manual_page, without_docstrings
from curation.fasttext_model import MAGIC as FASTTEXT_MAGIC
from curation.filters import CodeQuality, English, GopherQuality, GopherRepetition, Readable
from curation.heldout import choose_heldout
from curation.pipeline import main
from curation.readers import read_whole
from curation.recipe import RECIPES, Settings
from curation.shards import main as shards_main
from curation.shards import open_stream, read_manifest
from curation.sources import InputFile, Source, code, family, list_inputs
from curation.steps import read_jsonl
from curation.tokenizer import load_tokenizer
from curation.work import key_of

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--limit-mb", "0.2", "--vocab-size", "512", "--heldout-percent", "5"]

# ---- text out of files


def test_docstrings_are_cut_out_and_the_program_stays_the_same():
    source = '''"""Module text."""

import os


class A:
    """Class text."""

    x = "not a docstring"

    def f(self):
        """Only this."""

    def g(self): "one line"; return 1

    async def h(self):
        # a comment stays
        """Two
        lines.\u00e9"""  # and this
        """a plain string statement"""
        return "\u00e9"
'''
    result = without_docstrings(source)
    for text in ("Module text", "Class text", "Only this", "one line", "Two"):
        assert text not in result
    for text in ("not a docstring", "a plain string statement", "# a comment stays", "# and this", "import os"):
        assert text in result
    tree = ast.parse(result)
    definitions = [node.name for node in ast.walk(tree) if isinstance(node, ast.stmt) and hasattr(node, "name")]
    assert definitions == ["A", "f", "g", "h"]
    assert "pass" in result and "return 1" in result


def test_no_text_of_the_library_stands_in_both_its_code_and_its_documentation():
    for module in (argparse, random, subprocess):
        source = Path(module.__file__).read_text()
        stripped = without_docstrings(source)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                line = max(text.splitlines(), key=len)
                assert len(line) < 30 or line not in stripped or stripped.count(line) < source.count(line)


def test_docstrings_stand_under_their_qualified_names():
    source = """class A:
    'About A.'
    def f(self):
        '''About f.

        More.'''
    def g(self): pass
"""
    assert docstrings(source, "package.module") == "package.module\n\nA\n\nAbout A.\n\nA.f\n\nAbout f.\n\nMore."
    assert docstrings("x = 1\n", "package.module") == ""


def test_help_topics_are_read_without_running_the_file():
    assert help_topics("# header\ntopics = {'if': 'The if statement', 'for': 'Loops'}\n") == {
        "if": "The if statement",
        "for": "Loops",
    }


def test_readme_is_taken_from_package_metadata():
    assert long_description("Metadata-Version: 2.4\nName: x\n\n# Title\n\nText\n") == "# Title\n\nText\n"
    assert long_description("Metadata-Version: 1.0\nName: x\nDescription: First\n        second\n") == "First\nsecond"
    assert long_description("Metadata-Version: 2.4\nName: x\n") == ""


def test_manual_page_becomes_paragraphs_without_requests_or_escapes():
    page = r"""'\" t
.\" comment
.TH GREP 1 2024
.de Hidden
text of a macro
..
.SH NAME
grep \- print \fIlines\fP
.SH "SEE ALSO"
.BR sed (1),
and
.B awk .
.TP
.BR \-v ", " \-\-invert
Select the
other lines.
.IP \(bu 2
point
.PP
Quotes \(lqlike\(rq this\&, caf\('e, a\ b.
.nf
  kept   as it is
.fi
.if t \{\
hidden too
.\}
"""
    assert manual_page(page) == (
        "GREP(1)\n\nNAME\n\ngrep - print lines\n\nSEE ALSO\n\nsed(1), and awk .\n\n"
        "-v, --invert\nSelect the other lines.\n\n"
        '* point\n\nQuotes "like" this, caf, a b.\n\n  kept   as it is\n'
    )
    assert manual_page(".so man1/grep.1\n") is None


def test_mdoc_page_becomes_text():
    page = """.Dd May 1
.Dt CAT 1
.Sh NAME
.Nm cat
.Nd join files
.Sh SYNOPSIS
.Nm
.Op Fl bn
.Oo Ar file Oc
.Pp
See
.Xr tac 1 .
"""
    assert manual_page(page) == (
        "CAT(1)\n\nNAME\n\ncat -- join files\n\nSYNOPSIS\n\ncat [-bn] [file]\n\nSee tac(1).\n"
    )


# ---- reading


def source_of(folder, extract=lambda name, text: [("", text)]):
    def files():
        return ((path.relative_to(folder).as_posix(), path) for path in folder.rglob("*") if path.is_file())

    return Source(name="own", kind="prose", description="a folder", budget_mb=1, files=files, extract=extract)


@pytest.mark.parametrize(
    ("name", "data", "problem", "text"),
    [
        ("a.txt", b"plain\r\ntext\r", None, "plain\ntext\n"),
        ("a.txt", b"\xef\xbb\xbfmarked", None, "marked"),
        ("a.txt", b"caf\xe9 au lait", "invalid_utf8", "caf\ufffd au lait"),
        ("a.gz", gzip.compress(b"packed"), None, "packed"),
        ("a.gz", gzip.compress(b"packed", mtime=0)[:-9], "truncated_gzip", "packed"),
        ("a.gz", b"not gzip", "damaged_gzip", ""),
    ],
)
def test_file_that_cannot_be_read_as_meant_gives_a_document_with_its_problem(tmp_path, name, data, problem, text):
    (tmp_path / name).write_bytes(data)
    source = source_of(tmp_path)
    (file,) = list_inputs(source)
    (document,) = read_whole(source, file)
    assert (document.id, document.problem, document.text) == (f"own/{name}", problem, text)


def test_source_that_does_not_parse_vanished_or_changed_is_named_too(tmp_path):
    (tmp_path / "a.py").write_text("def f(:\n")
    source = source_of(tmp_path, code)
    (file,) = list_inputs(source)
    assert [document.problem for document in read_whole(source, file)] == ["syntax_error"]
    (tmp_path / "a.py").write_text("x = 1\n")
    assert [document.problem for document in read_whole(source, file)] == ["changed_since_listed"]
    missing = InputFile(name="b.py", path=str(tmp_path / "b.py"), size_bytes=1)
    assert [document.problem for document in read_whole(source, missing)] == ["unreadable_file"]


def test_half_a_surrogate_pair_in_a_docstring_is_a_problem_not_a_crash(tmp_path):
    (tmp_path / "a.py").write_text("x")
    source = source_of(tmp_path, lambda name, text: [("", "half \ud800")])
    (document,) = read_whole(source, list_inputs(source)[0])
    assert (document.problem, document.text) == ("lone_surrogate", "half ?")


def test_no_family_of_files_comes_before_every_other_had_its_turn(tmp_path):
    for name in [f"big/{i}.txt" for i in range(50)] + ["small/a.txt", "tiny.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    names = [file.name for file in list_inputs(source_of(tmp_path))]
    assert {family(name) for name in names[:3]} == {"big", "small", "tiny"}
    assert names == [file.name for file in list_inputs(source_of(tmp_path))]


# ---- rules

WORDS = [a + b + c for a in ("ka", "lo", "mi", "ne", "tu") for b in ("ra", "so", "vi", "du") for c in ("n", "l", "st")]
GLUE = ["the", "of", "and", "to"]


def prose(n_words, seed=0):
    draw = random.Random(seed)
    words = [draw.choice(GLUE) if i % 6 == 5 else f"{draw.choice(WORDS)}{draw.choice(WORDS)}" for i in range(n_words)]
    return "\n".join(" ".join(words[i : i + 12]) + "." for i in range(0, n_words, 12))


def test_ordinary_prose_and_code_break_no_rule():
    for rule in RECIPES["local"].rules["prose"]:
        assert rule.check(prose(300), {}) is None
    for rule in RECIPES["local"].rules["code"]:
        assert rule.check(Path(ast.__file__).read_text(), {}) is None


REPEATED = prose(40, 1) + "\n"


@pytest.mark.parametrize(
    ("rule", "text", "broken"),
    [
        (Readable(), " \n\t", "empty"),
        (Readable(), "binary \0\1\2", "control_characters"),
        (English(max_non_ascii_fraction=0.2), "\u65e5\u672c\u8a9e " * 9, "non_ascii"),
        (English(max_non_ascii_fraction=0.2, min_stop_words=2), "kein Wort davon, the", "stop_words"),
        (GopherQuality(), prose(49), "few_words"),
        (GopherQuality(max_words=200), prose(300), "many_words"),
        (GopherQuality(), "a of " * 60, "short_words"),
        (GopherQuality(), "incomprehensibilities " * 60, "long_words"),
        (GopherQuality(), prose(60) + " #" * 20, "hashes"),
        (GopherQuality(), "word... other " * 60, "ellipses"),
        (GopherQuality(), "\n".join("- " + line for line in prose(90).splitlines()), "bullet_lines"),
        (GopherQuality(), prose(90).replace(".", "..."), "ellipsis_lines"),
        (GopherQuality(), prose(60) + " 12.5 99 = 7" * 20, "alphabetic_words"),
        (GopherRepetition(), "same line\n" * 9 + prose(200), "duplicate_lines"),
        (GopherRepetition(), REPEATED * 2 + prose(20), "duplicate_lines"),
        (GopherRepetition(max_duplicate_lines=None), REPEATED * 2, "duplicate_line_characters"),
        (
            GopherRepetition(max_duplicate_lines=None, max_duplicate_line_characters=None),
            "\n\n".join([REPEATED] * 3),
            "duplicate_paragraphs",
        ),
        (GopherRepetition(), " ".join(f"going home {word}" for word in WORDS), "top_2gram"),
        (GopherRepetition(), " ".join([prose(30).replace("\n", " ")] * 2), "duplicate_5gram"),
        (CodeQuality(), "x = 1\n", "few_words"),
        (CodeQuality(), "short line here\n" * 20 + "x" * 1001, "long_line"),
        (CodeQuality(), ("word " * 30 + "\n") * 20, "long_lines"),
        (CodeQuality(), "f() # ----------------------------------------\n" * 30, "alphanumeric"),
        (CodeQuality(), "    0x1234: 0x5678, # a b\n" * 30, "digits"),
        (CodeQuality(), "# Automatically generated, do not edit\n" + "value = other\n" * 30, "generated"),
    ],
)
def test_rule_names_what_the_text_breaks(rule, text, broken):
    assert rule.check(text, {}) == broken


def test_threshold_of_none_switches_a_rule_off():
    assert GopherQuality(min_words=None).check(prose(30), {}) is None


# ---- duplicates


def near_copy(text, seed):
    """The text with 2 % of its words replaced: Jaccard similarity of 5-grams about 0.83."""
    draw = random.Random(seed)
    words = text.split(" ")
    for i in draw.sample(range(len(words)), len(words) // 50):
        words[i] = "otherword"
    return " ".join(words)


def fingerprints(documents):
    ids = list(documents)
    keys = np.array([band_keys(documents[i][1], 5, 14, 8) for i in ids])
    digests = np.array([text_digest(documents[i][1]) for i in ids])
    return ids, np.array([documents[i][0] for i in ids]), digests, keys


def test_planted_duplicates_are_found_and_unique_documents_kept_in_any_order():
    documents = {f"b/{i:03d}": (1, prose(600, i)) for i in range(60)}  # id -> (priority of its source, text)
    for i in range(20):
        documents[f"a/exact{i:03d}"] = (2, prose(600, i))
    for i in range(20, 40):
        documents[f"a/near{i:03d}"] = (0, near_copy(prose(600, i), i))
    exact, near = find_duplicates(*fingerprints(documents))
    assert exact == {f"a/exact{i:03d}": f"b/{i:03d}" for i in range(20)}
    # of a pair the one from the source of higher priority stays, whatever its id
    assert set(near) <= {f"b/{i:03d}" for i in range(20, 40)} and len(near) >= 18
    assert all(kept == f"a/near{document[2:]}" for document, kept in near.items())

    for seed in range(3):
        items = list(documents.items())
        random.Random(seed).shuffle(items)
        assert find_duplicates(*fingerprints(dict(items))) == (exact, near)


def test_adding_documents_changes_nothing_for_those_without_a_twin():
    documents = {f"a/{i}": (0, prose(200, i)) for i in range(20)}
    before = find_duplicates(*fingerprints(documents))
    after = find_duplicates(*fingerprints({"0/new": (0, prose(200, 3)), **documents}))
    assert before == ({}, {})
    assert after == ({"a/3": "0/new"}, {})


def test_components_follow_chains_to_the_lowest_node():
    a, b = np.array([9, 7, 5, 3, 8]), np.array([7, 5, 3, 1, 6])
    assert components(10, a, b).tolist() == [0, 1, 2, 1, 4, 1, 6, 1, 6, 1]
    chain = np.random.default_rng(0).permutation(2000)
    assert (components(2000, chain[:-1], chain[1:]) == 0).all()


def test_heldout_share_follows_the_percentage_and_small_sources_get_their_minimum():
    numbers = np.random.default_rng(0).integers(0, 2**64, 20_000, dtype=np.uint64)
    assert 0.025 < choose_heldout(numbers, 3, 5).mean() < 0.035
    assert choose_heldout(numbers[:40], 0.001, 5).sum() == 5
    assert choose_heldout(numbers[:4], 3, 5).sum() == 2
    assert choose_heldout(numbers[:0], 3, 5).sum() == 0
    chosen = choose_heldout(numbers, 3, 5)  # the choice for a document does not depend on the others
    assert (choose_heldout(numbers[:5000], 3, 5) == chosen[:5000]).all()


# ---- whole runs


def run(out, *flags):
    command = [sys.executable, "-m", "curation.pipeline", "--out", str(out), *SMALL, *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A data folder of about 1 MB from an unbroken run of the command, and what it printed."""
    out = tmp_path_factory.mktemp("curation") / "data"
    result = run(out, "--workers", "2")
    assert result.returncode == 0, result.stderr
    return out, result.stdout


def test_finished_folder_is_whole_and_holds_nothing_unlisted(unbroken):
    out, stdout = unbroken
    assert shards_main(["verify", str(out)]) == 0
    paths = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
    names = {path.as_posix() for path in paths if path.parts[0] != "work"}
    assert names == {"manifest.json", "report.html", "README.md", *read_manifest(out)["files"]}
    assert f"{out} is complete" in stdout and "near_duplicate" in stdout


def test_funnel_adds_up_for_every_source_in_documents_tokens_and_bytes(unbroken):
    manifest = read_manifest(unbroken[0])
    for split in ("train", "heldout"):
        for unit in ("documents", "tokens", "text_bytes"):
            by_source = [entry[split][unit] for entry in manifest["funnel"].values()]
            assert sum(by_source) == manifest["splits"][split][unit] > 0
    for entry in manifest["funnel"].values():
        for unit in ("documents", "text_bytes"):
            dropped = sum(count[unit] for count in entry["dropped"].values())
            rewritten = entry["removed_by_rewrites"].get(unit, 0)
            assert entry["read"][unit] == dropped + rewritten + entry["kept"][unit]
        for unit in ("documents", "tokens", "text_bytes"):
            assert entry["kept"][unit] == entry["heldout"][unit] + entry["train"][unit]
    assert sum("near_duplicate" in entry["dropped"] for entry in manifest["funnel"].values()) > 0


def test_what_a_rule_dropped_can_be_read(unbroken):
    out = unbroken[0]
    for source, entry in read_manifest(out)["funnel"].items():
        for rule, count in entry["dropped"].items():
            with gzip.open(out / f"dropped/{source}/{rule}.jsonl.gz", "rt", encoding="utf-8") as file:
                records = [json.loads(line) for line in file]
            assert len(records) == count["documents"]
            assert all(record["id"].startswith(f"{source}/") for record in records)
            assert ("duplicate_of" in records[0]) == rule.endswith("_duplicate")


def test_shards_decode_to_the_heldout_text_and_share_no_document_with_training(unbroken):
    out = unbroken[0]
    tokenizer = load_tokenizer(out)
    for source, entry in read_manifest(out)["splits"]["heldout"]["sources"].items():
        stream = open_stream(out, "heldout", [source])
        tokens, document_ids = stream.read(0, stream.n_tokens)
        texts = [record["text"] for record in read_jsonl(out / entry["text"])]
        assert len(texts) == stream.n_documents
        for i, text in enumerate(texts):
            document = tokens[document_ids == i]
            assert document[0] == tokenizer.separator_id
            assert tokenizer.decode(document[1:].tolist()) == text

        train = open_stream(out, "train", [source])
        tokens, document_ids = train.read(0, train.n_tokens)
        cuts = np.flatnonzero(np.diff(document_ids)) + 1
        training = {tokenizer.decode(document[1:].tolist()) for document in np.split(tokens, cuts)}
        assert training.isdisjoint(texts)


def test_evaluation_items_are_pieces_of_heldout_text(unbroken):
    out = unbroken[0]
    manifest = read_manifest(out)
    texts = {}
    for entry in manifest["splits"]["heldout"]["sources"].values():
        texts |= {record["id"]: record["text"] for record in read_jsonl(out / entry["text"])}
    items = {name: list(read_jsonl(out / task["file"])) for name, task in manifest["tasks"].items()}
    for name, found in items.items():
        assert len(found) == manifest["tasks"][name]["items"]
        assert {item["source"] for item in found} == set(manifest["splits"]["heldout"]["sources"])
    for item in items["continuation"]:
        text = texts[item["id"].rpartition("@")[0]]
        assert f"{item['context']} {item['choices'][item['answer']]}" in text
        assert len(set(item["choices"])) == 4 and len(item["context"].split()) >= 60
    for item in items["last_word"]:
        assert f"{item['context']} {item['target']}" in texts[item["id"].rpartition("@")[0]]
        assert item["target"] in item["context"]
    assert len({item["answer"] for item in items["continuation"]}) == 4


def test_running_again_does_nothing_in_under_two_seconds(unbroken):
    out = unbroken[0]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    started = time.perf_counter()
    result = run(out)
    assert time.perf_counter() - started < 2
    assert result.returncode == 0 and "is complete" in result.stdout and "nothing to do" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_finished_folder_of_other_settings_is_refused(unbroken, capsys):
    assert main(["--out", str(unbroken[0]), *SMALL, "--vocab-size", "600"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "other settings (vocab_size is 512 there, now 600); add --update" in error


def test_interrupted_run_ends_with_one_line_and_goes_on(tmp_path):
    out = tmp_path / "data"
    command = [sys.executable, "-m", "curation.pipeline", "--out", str(out), *SMALL, "--workers", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not list((out / "work/read").glob("*")):
        assert process.poll() is None, "the run ended before it could be interrupted"
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr.strip()) == (130, "interrupted; run the same command to go on")
    with pytest.raises(FileNotFoundError, match="unfinished"):
        read_manifest(out)


def test_folder_with_other_things_in_it_is_not_touched(tmp_path, capsys):
    (tmp_path / "train").mkdir()
    (tmp_path / "train/precious.txt").write_text("mine")
    assert main(["--out", str(tmp_path), *SMALL]) == 2
    assert "holds other things (train, ...)" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["train", "precious.txt"]


def test_second_run_on_the_same_folder_is_refused_while_the_first_lives(tmp_path, capsys):
    (tmp_path / "work").mkdir()
    with open(tmp_path / "work/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["--out", str(tmp_path), *SMALL]) == 2
    assert "another process is making" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--recipe", "nine"], "unknown recipe 'nine'; allowed: local"),
        (["--vocab-size", "100"], "--vocab-size 100 is not between 512 and 1,000,000"),
        (["--heldout-percent", "0"], "--heldout-percent 0 is not above 0 and at most 50"),
        (["--limit-mb", "-1"], "--limit-mb -1 reads nothing"),
        (["--workers", "0"], "--workers 0 is not a number of processes"),
        (["--share", "0/2"], "--share 0/2 needs --stage"),
    ],
)
def test_wrong_flag_gets_one_line_and_exit_code_2(tmp_path, capsys, flags, message):
    assert main(["--out", str(tmp_path / "x"), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("recipe", "flag", "data", "message"),
    [
        ("own", "--decontaminate", b"# Braid\n", "is not a decontamination index; "),
        ("own", "--quality-model", b"# Braid\n", "is neither a model of curation.quality nor one of fastText"),
        ("own", "--quality-model", FASTTEXT_MAGIC + b"cut", "is damaged or not a model of fastText's"),
        ("eight", "--language-model", b"# Braid\n", "is damaged or not a model of fastText's"),
        ("own", "--tokenizer", b"# Braid\n", "is damaged or not a sentencepiece model"),
        ("own", "--tokenizer", b"{}", "is damaged or not a tokenizer.json"),
    ],
)
def test_file_that_is_no_index_model_or_tokenizer_is_refused_before_anything_is_read(
    tmp_path, capsys, recipe, flag, data, message
):
    (tmp_path / "wrong").write_bytes(data)
    own = ["--input", str(tmp_path)] if recipe == "own" else []
    flags = ["--recipe", recipe, *own, "--out", str(tmp_path / "x"), flag, str(tmp_path / "wrong")]
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'wrong'} {message}" in error and error.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_ray_that_is_not_installed_is_named_before_anything_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pipeline, "find_spec", lambda name: None)
    assert main(["--out", str(tmp_path / "x"), "--executor", "ray"]) == 2
    error = capsys.readouterr().err
    assert "--executor ray needs Ray: pip install ray" in error and error.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_every_setting_and_every_threshold_is_part_of_the_key():
    changes = [{}, {"limit_mb": 1.0}, {"vocab_size": 8192}, {"heldout_percent": 5.0}, {"stock": ("filters",)}]
    keys = {key_of(Settings.chosen("local", **change).resolved()) for change in changes}
    assert len(keys) == len(changes)
    resolved = Settings.chosen("local").resolved()
    assert resolved["rules"]["prose"][1]["min_words"] == 50
    assert resolved["minhash"] == {"ngram_words": 5, "bands": 14, "rows": 8, "min_similarity": 0.65}
