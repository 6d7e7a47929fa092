"""Streaming without staging: local JSON lines and parquet, interleaved, shuffled, packed, saved and resumed."""

import json
import re

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from launching import launch
from test_train import config, plan

from curation.tokenizer import load_tokenizer
from train.run_dir import read_metrics
from train.stream import PackedStream, open_recipe, read_recipe


@pytest.fixture
def recipe_file(tmp_path):
    """Fifty documents of letters as JSON lines in two files, thirty of digits as parquet."""
    for part in range(2):
        rows = [{"body": f"letters {chr(97 + i % 26)} {part} {i}" * (1 + i % 4), "id": i} for i in range(25)]
        (tmp_path / f"letters{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = pyarrow.table({"text": [f"digits {i} " * (1 + i % 3) for i in range(30)]})
    pyarrow.parquet.write_table(table, tmp_path / "digits.parquet")
    sources = {
        "letters": {"weight": 3, "path": "json", "data_files": str(tmp_path / "letters*.jsonl"), "text": "body"},
        "digits": {"weight": 1, "path": "parquet", "data_files": str(tmp_path / "digits.parquet")},
    }
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"buffer": 8, "sources": sources}))
    return path


def open_packed(recipe_file, data, state=None):
    return PackedStream(read_recipe(recipe_file), load_tokenizer(data), 5, state)


def documents(tokenizer, rows):
    tokens = np.concatenate([rows[0], *(row[1:] for row in rows[1:])])
    starts = np.flatnonzero(tokens == tokenizer.separator_id)
    return [tokenizer.decode(tokens[a + 1 : b].tolist()) for a, b in zip(starts, starts[1:], strict=False)]


def test_documents_come_whole_once_an_epoch_shuffled_and_by_weight(recipe_file, data):
    packed = open_packed(recipe_file, data)
    texts = documents(packed.tokenizer, packed.read_rows(60, 64))
    letters = [text for text in texts if text.startswith("letters")]
    digits = [text for text in texts if text.startswith("digits")]
    assert len(letters) + len(digits) == len(texts)
    assert abs(len(letters) - 3 * len(digits)) <= 6
    expected = [f"letters {chr(97 + i % 26)} {part} {i}" * (1 + i % 4) for part in range(2) for i in range(25)]
    assert sorted(letters[:50]) == sorted(expected)
    assert letters[:50] != expected
    assert sorted(letters[50:58]) == sorted(letters[:8])  # a source that ended begins again, shuffled anew
    assert letters[50:58] != letters[:8]


@pytest.mark.parametrize("before", [1, 7, 40, 90])
def test_a_saved_position_goes_on_with_the_very_next_row(recipe_file, data, before):
    packed = open_packed(recipe_file, data)
    packed.read_rows(before, 32)
    state = json.loads(json.dumps(packed.state()))
    expected = packed.read_rows(60, 32)
    assert open_packed(recipe_file, data, state).read_rows(60, 32).tolist() == expected.tolist()


def test_batches_are_the_same_for_every_number_of_processes(recipe_file, data):
    def step(world_size, micro_batch):
        p = plan(world_size=world_size, micro_batch=micro_batch, batch_tokens=8 * 64, steps=30)
        ranks = [open_packed(recipe_file, data).batches(p, rank, world_size, "cpu") for rank in range(world_size)]
        parts = [next(batches) for _ in range(p.grad_accum) for batches in ranks]
        return [(b.tokens.tolist(), b.targets.tolist(), b.document_ids.tolist()) for b in parts], parts

    (alone, parts), (apart, _) = step(1, 2), step(2, 2)
    assert alone == apart
    assert (parts[0].tokens[:, 1:] == parts[0].targets[:, :-1]).all()
    assert step(1, 8)[1][0].tokens.tolist() == [row for tokens, _, _ in alone for row in tokens]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sources": {}}, 'has no "sources"'),
        ({"bufer": 3}, "unknown key 'bufer'; allowed: buffer, heldout, sources"),
        ({"buffer": 0}, '"buffer" 0 is not a number of documents'),
        ({"heldout": 5}, '"heldout" 5 is not the name of a data folder'),
        ({"sources": {"a": {"weight": 1}}}, "source 'a': no \"path\""),
        ({"sources": {"a": {"weight": 0, "path": "json"}}}, "source 'a': \"weight\" 0 is not a number above 0"),
        ({"sources": {"a": {"weight": 1, "path": "json", "files": "x"}}}, "source 'a': unknown key 'files'"),
        ({"sources": {"a": {"weight": 1, "path": 5}}}, "source 'a': \"path\" 5 is not a string"),
        ({"sources": {"a": {"weight": 1, "path": "json", "data_files": 5}}}, '"data_files" 5 is not a string, a list'),
        ({"sources": {"a": {"weight": 1, "path": "json", "data_files": {"train": [5]}}}}, "{'train': [5]} is not a"),
    ],
)
def test_recipes_that_cannot_be_are_refused(recipe_file, change, words):
    recipe_file.write_text(json.dumps(json.loads(recipe_file.read_text()) | change))
    with pytest.raises(ValueError) as caught:
        read_recipe(recipe_file)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_source_without_its_text_column_is_refused(recipe_file, data):
    given = json.loads(recipe_file.read_text())
    given["sources"]["letters"]["text"] = "txt"
    recipe_file.write_text(json.dumps(given))
    with pytest.raises(ValueError, match="source 'letters' has no text in its column 'txt'; it has: body, id"):
        open_packed(recipe_file, data)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"data": "stream:"}, "--data stream: names no recipe; write its file behind the colon"),
        ({"tokenizer": None}, "needs --tokenizer"),
        ({"steps": None}, "has no end; say how long the run is with --steps or --tokens"),
        ({"mixture": "a=1"}, "--mixture and --max-epochs are for data folders"),
        ({"eval_every": 5}, 'names no data folder as "heldout"; add one, or set --eval-every 0'),
    ],
)
def test_flags_that_a_stream_cannot_have_are_refused(recipe_file, data, flags, words):
    given = {"data": f"stream:{recipe_file}", "tokenizer": str(data), "steps": 5, "eval_every": 0} | flags
    with pytest.raises(ValueError, match=re.escape(words)):
        open_recipe(config(**given))


@pytest.mark.parametrize(
    ("path", "files", "words"),
    [
        ("parquet", "nowhere/*.parquet", ""),
        ("json", "nowhere/*.jsonl", "its data_files match no file, or empty ones alone"),
        ("json", __file__, "JSON parse error"),
    ],
)
def test_a_source_that_cannot_be_read_is_refused_in_one_line(recipe_file, data, path, files, words):
    given = json.loads(recipe_file.read_text())
    given["sources"]["digits"] |= {"path": path, "data_files": files}
    recipe_file.write_text(json.dumps(given))
    with pytest.raises(ValueError, match="source 'digits' of the recipe cannot be read: ") as caught:
        open_packed(recipe_file, data)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_source_out_of_reach_is_named(recipe_file, data, monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'json' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(
        OSError, match="source 'digits' of the recipe cannot be read: Couldn't reach 'json' on the Hub"
    ):
        open_packed(recipe_file, data)


def test_a_resumed_run_has_the_losses_of_an_unbroken_one_bit_for_bit(recipe_file, data, tmp_path):
    recipe_file.write_text(json.dumps(json.loads(recipe_file.read_text()) | {"heldout": str(data)}))
    flags = [
        "--size",
        "tiny",
        "--steps",
        6,
        "--eval-every",
        3,
        "--eval-tokens",
        500,
        "--data",
        f"stream:{recipe_file}",
    ]

    def losses(run, *more):
        result = launch(*flags, "--tokenizer", data, "--run", tmp_path / run, *more)
        assert result.returncode == 0, result.stderr[-3000:]
        return [
            (row["loss"], row["grad_norm"], row.get("heldout_loss"))
            for row in read_metrics(tmp_path / run / "metrics.jsonl")
        ]

    whole = losses("whole")
    assert whole[2][2] > 0
    assert len(losses("half", "--stop-after", 3)) == 3
    assert losses("half", "--resume") == whole
