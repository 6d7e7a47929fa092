"""datatrove's own steps inside our tasks: the same documents and tokens where both can give them, all counted."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import zstandard
from datatrove.data import Document
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from curation import pipeline
from curation.dedup import text_digest
from curation.inputs import find_pieces
from curation.recipe import MinHash, Settings
from curation.shards import SHARD, read_manifest
from curation.shards import main as shards_main
from curation.stages import Run
from curation.stock import StockFates, near_duplicates
from curation.tokenizer import SEPARATOR, train_tokenizer
from curation.work import Task, note_death, task_folder


def text_of(seed, n_words=150):
    draw = random.Random(seed)
    words = ["".join(draw.choices("abdefgiklmnoprstu", k=draw.randint(2, 8))) for _ in range(n_words)]
    return "\n".join(" ".join(words[i : i + 11]) + "." for i in range(0, n_words, 11))


def write_rows(path, texts):
    path.write_text("".join(json.dumps({"id": f"{path.stem}{i}", "text": t}) + "\n" for i, t in enumerate(texts)))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """50 texts, six of which come again, one of four words twice, and one with another first and last word."""
    folder = tmp_path_factory.mktemp("texts")
    write_rows(folder / "a.jsonl", [*map(text_of, range(40)), "too short for shingles"])
    edited = "other " + text_of(45) + " words"
    write_rows(folder / "b.jsonl", [*map(text_of, range(40, 50)), *map(text_of, range(6)), "too short for shingles"])
    write_rows(folder / "c.jsonl", [edited])
    return folder


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory):
    """A byte-level BPE of 600 entries, the separator among them."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator([text_of(seed) for seed in range(30)], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    library.save(str(path))
    return path


def command(texts, out, tokenizer, *flags):
    given = {"--recipe": "own", "--input": texts, "--out": out, "--tokenizer": tokenizer, "--workers": "1"}
    return [*(str(part) for pair in given.items() for part in pair), *flags]


def curate(texts, out, tokenizer, *flags):
    assert pipeline.main(command(texts, out, tokenizer, *flags)) == 0
    assert shards_main(["verify", str(out)]) == 0
    assert not list((out / "work").glob("*/*/tmp*")) and not list((out / "work").glob("*/*.part"))
    return read_manifest(out)["funnel"]["own"]


@pytest.fixture(scope="module")
def ours(texts, tokenizer_json, tmp_path_factory):
    out = tmp_path_factory.mktemp("ours") / "data"
    return curate(texts, out, tokenizer_json), out


def shards(out):
    return {path.relative_to(out): path.read_bytes() for path in sorted(out.glob(f"*/*{SHARD}"))}


def test_stock_duplicates_leave_as_many_documents_as_ours(texts, tokenizer_json, ours, tmp_path):
    pytest.importorskip("spacy")
    out = tmp_path / "data"
    entry = curate(texts, out, tokenizer_json, "--stock", "dedup")
    for funnel in (entry, ours[0]):
        assert funnel["read"]["documents"] == 59
        assert funnel["dropped"]["exact_duplicate"]["documents"] == 7
        assert funnel["dropped"]["near_duplicate"]["documents"] == 1
        assert funnel["kept"]["documents"] == 51
    (pair,) = read_manifest(out)["duplicates"]["examples"]
    assert sorted([pair["kept_text"][:9], pair["duplicate_text"][:9]]) == sorted(
        [text_of(45)[:9], "other " + text_of(45)[:3]]
    )


def test_stock_tokenizer_gives_the_same_shards(texts, tokenizer_json, ours, tmp_path):
    out = tmp_path / "data"
    curate(texts, out, tokenizer_json, "--stock", "tokenizer")
    assert len(shards(out)) == 2
    assert shards(out) == shards(ours[1])


def test_stock_tokenizer_drops_documents_in_which_text_becomes_the_separator(tokenizer_json, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    write_rows(folder / "a.jsonl", [*map(text_of, range(20)), f"it ends with {SEPARATOR} here", SEPARATOR])
    assert curate(folder, tmp_path / "ours", tokenizer_json)["kept"]["documents"] == 22
    entry = curate(folder, tmp_path / "stock", tokenizer_json, "--stock", "tokenizer")
    assert entry["dropped"]["separator_in_text"]["documents"] == 2
    assert entry["kept"]["documents"] == 20


def test_all_stock_steps_together_and_again_with_ours(texts, tokenizer_json, ours, tmp_path):
    for package in ("spacy", "nltk"):
        pytest.importorskip(package)
    out = tmp_path / "data"
    entry = curate(texts, out, tokenizer_json, "--stock", "tokenizer,filters,dedup")
    assert entry["kept"]["documents"] == 51
    curate(texts, out, tokenizer_json, "--update")
    assert shards(out) == shards(ours[1])


def test_place_of_the_document_that_stays_for_each(tmp_path):
    pytest.importorskip("spacy")
    documents = [text_of(1), text_of(2), "", text_of(1) + " more", "four words are few", text_of(2)]
    given = (Document(text=text, id=str(i)) for i, text in enumerate(documents))
    stays = near_duplicates(given, len(documents), MinHash(), str(tmp_path))
    assert len(np.unique(stays)) == 4
    assert stays[0] == stays[3] and stays[1] == stays[5] and stays[2] == 2 and stays[4] == 4
    (tmp_path / "none").mkdir()
    assert len(near_duplicates(iter([]), 0, MinHash(), str(tmp_path / "none"))) == 0


@pytest.mark.parametrize("across", [True, False])
def test_duplicates_across_sources_and_within_each(tmp_path, across):
    """Two pieces of a source and one of another, with one text in all of them, a little different in each."""
    pytest.importorskip("spacy")
    pieces = {
        "1" * 64: ("a", ["", text_of(0)]),
        "2" * 64: ("a", ["x " + text_of(0)]),
        "3" * 64: ("b", [text_of(0) + " y", text_of(1)]),
    }
    for key, (_, texts) in pieces.items():
        folder = task_folder(tmp_path, "read", key)
        folder.mkdir(parents=True)
        with zstandard.open(folder / "documents.jsonl.zst", "wb") as file:
            for i, text in enumerate(texts):
                file.write(json.dumps({"id": key[:1] + str(i), "text": text}).encode() + b"\n")
    digests = np.array([text_digest(text) for _, texts in pieces.values() for text in texts])
    task = Task(key="0" * 64, size_bytes=0, values={"pieces": [[source, key] for key, (source, _) in pieces.items()]})
    step = StockFates(tmp_path, Path(), MinHash(), across, 1.0, 1, ("a", "b"))
    of_source, order = np.array([0, 0, 0, 1, 1]), np.arange(5, dtype=np.uint64)
    exact, stays = step.survivors(task, tmp_path, of_source, digests, np.zeros((5, 2), np.uint64), order)
    assert exact.tolist() == [0, 1, 2, 3, 4]
    assert stays[1] == stays[2] and (stays[3] == stays[1]) == across and stays[0] == 0 and stays[4] == 4
    # a text over which two processes died is compared with none
    for _ in range(2):
        note_death(tmp_path, task.key, "20")
    assert step.survivors(task, tmp_path, of_source, digests, digests, order)[1][2] == 2


def test_each_stock_step_is_in_the_keys_of_its_own_stage_alone(texts, tokenizer_json, tmp_path):
    def keys(*stock):
        settings = Settings.chosen("own", input=str(texts), tokenizer=str(tokenizer_json), stock=stock)
        run = Run(settings=settings, work=tmp_path, pieces=find_pieces(settings, None, tmp_path))
        read = run.read_tasks["own"][0]
        run.__dict__["duplicates"] = {"fates": {read.key: "the same fates"}}  # as if that stage were done
        return [read.key, run.duplicates_task.key, run.token_tasks["own"][0].key]

    ours = keys()
    for stock, same in (
        ("filters", [False, None, None]),  # what reads its documents changes with it
        ("dedup", [True, False, True]),
        ("tokenizer", [True, True, False]),
    ):
        for mine, theirs, expected in zip(ours, keys(stock), same, strict=True):
            assert expected is None or (mine == theirs) == expected, stock


def test_what_cannot_be_is_refused_in_one_line(texts, tokenizer_json, tmp_path, monkeypatch, capsys):
    model = tmp_path / "tokenizer.model"
    train_tokenizer([text_of(seed) for seed in range(40)], 512, model)
    refused = [
        (command(texts, tmp_path / "data", model, "--stock", "tokenizer"), "takes no sentencepiece model"),
        (
            ["--recipe", "own", "--input", str(texts), "--stock", "dedup,tokenizer"],
            "sentencepiece model (trained here)",
        ),
        (
            command(texts, tmp_path / "data", tokenizer_json, "--stock", "mixture"),
            "allowed: filters, dedup, tokenizer",
        ),
    ]
    for arguments, message in refused:
        assert pipeline.main(arguments) == 2
        error = capsys.readouterr().err.strip()
        assert message in error and "\n" not in error
    monkeypatch.setattr(pipeline, "find_spec", lambda name: None)
    assert pipeline.main(command(texts, tmp_path / "data", tokenizer_json, "--stock", "dedup")) == 2
    assert "needs spaCy" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()
