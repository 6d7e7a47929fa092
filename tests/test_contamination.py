"""Contamination: every planted item is found, whatever its dress; clean items are left alone."""

import json
import random

import numpy as np
import pytest
from small_data import finish_folder

from curation.decontaminate import Item
from curation.tokenizer import load_tokenizer, train_tokenizer
from eval.contamination import MAX_ITEMS, WORDS, check_contamination, make_table, run_hashes, unclean_items, words_of

SYLLABLES = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "an", "er", "ol")]


def words(rng, n):
    """n made-up words out of 9,216, so that no two passages share a run by chance."""
    return " ".join(rng.choice(SYLLABLES) + rng.choice(SYLLABLES) for _ in range(n))


def make_rows(task, n, rng):
    if task == "lambada":
        return [{"text": words(rng, 60)} for _ in range(n)]
    if task == "humaneval":
        return [{"prompt": f"def {words(rng, 1)}(x):\n    '''{words(rng, 25)}'''\n"} for _ in range(n)]
    if task == "winogrande":
        return [{"sentence": f"{words(rng, 8)} _ {words(rng, 8)}", "option1": words(rng, 1), "option2": words(rng, 1),
                 "answer": str(rng.choice((1, 2)))} for _ in range(n)]  # fmt: skip
    if task == "mmlu":
        return [{"question": words(rng, 12) + "?", "choices": [words(rng, 3) for _ in range(4)],
                 "answer": rng.randrange(4)} for _ in range(n)]  # fmt: skip
    return [{"question": words(rng, 6) + "?",
             "choices": {"text": [words(rng, 2) for _ in range(4)], "label": list("ABCD")},
             "answerKey": rng.choice("ABCD")} for _ in range(n)]  # fmt: skip


def dressed(task, row, number):
    """An item as it may stand on a page: with other case and punctuation, with its answer or with all its choices."""
    if task == "lambada":
        return row["text"].upper().replace(" ", ",  ")
    if task == "humaneval":
        return row["prompt"]
    if task == "winogrande":
        return row["sentence"].replace("_", row[f"option{row['answer']}"])
    choices = row["choices"]["text"] if isinstance(row["choices"], dict) else row["choices"]
    answer = row["answer"] if task == "mmlu" else "ABCD".index(row["answerKey"])
    listed = " ".join(f"({letter}) {choice}" for letter, choice in zip("ABCD", choices, strict=True))
    return f"{row['question']} {listed if number % 2 else choices[answer]}."


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A data folder with every third item of six benchmarks in it; {(task, group): file}; {(task, group, doc_id)}."""
    rng = random.Random(0)
    root = tmp_path_factory.mktemp("contamination")
    pages = {source: [words(rng, 200) for _ in range(30)] for source in ("books", "web")}
    files, hidden = {}, set()
    tasks = [("lambada", None), ("humaneval", None), ("winogrande", None), ("arc_easy", None), ("mmlu", "law"),
             ("mmlu", "art")]  # fmt: skip
    for task, group in tasks:
        rows = make_rows(task, 24, rng)
        rows.append(rows[0])  # the same question twice
        path = root / "evals" / task / (group or "") / "test.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files[task, group] = path
        for number in range(0, 24, 3):
            page = pages[rng.choice(("books", "web"))]
            at = rng.randrange(len(page))
            page[at] = f"{page[at][:400]} {dressed(task, rows[number], number)} {page[at][400:]}"
            hidden.add((task, group, number))
        hidden.add((task, group, 24))
    train_tokenizer(pages["web"], 600, root / "data/tokenizer.model")
    texts = {"train": pages, "heldout": {"web": [words(rng, 50)]}}
    return finish_folder(root / "data", load_tokenizer(root / "data"), texts), files, hidden


def contaminated(report):
    return {
        (task, item["group"], item["doc_id"])
        for task, items in report["items"].items()
        for item in items
        if item["contaminated"]
    }


def test_every_planted_item_is_found_and_no_other(planted):
    data, files, hidden = planted
    report = check_contamination(data, files, workers=1)
    assert contaminated(report) == hidden
    assert report["tasks"]["mmlu"] == {"items": 50, "contaminated": 18, "too_short": 0}
    [found] = [item for item in report["items"]["lambada"] if item["doc_id"] == 3]
    assert found["overlap"] == 1.0 and found["evidence"] > 28 and found["shard"].startswith("train/")


def test_several_processes_find_the_same(planted):
    data, files, _ = planted
    assert check_contamination(data, files, workers=2) == check_contamination(data, files, workers=1)


def test_unclean_items_are_named_as_the_samples_are(planted):
    data, files, hidden = planted
    report = check_contamination(data, {key: files[key] for key in files if key[0] == "mmlu"}, workers=1)
    assert unclean_items(report, "mmlu") == {(group, number) for task, group, number in hidden if task == "mmlu"}
    assert unclean_items(report, "piqa") == set()


def test_thirteen_words_in_a_row_are_enough_and_twelve_are_not():
    rng = random.Random(3)
    passage = words(rng, 40)
    item = Item(benchmark="lambada", file="x", row=0, passages=(passage,))
    table = make_table([item])
    part = passage.split()[5:]
    assert table.find(f"{words(rng, 30)} {' '.join(part[:WORDS])} {words(rng, 30)}")[WORDS].size == 1
    assert table.find(f"{words(rng, 30)} {' '.join(part[: WORDS - 1])} {words(rng, 30)}") == {}


def test_short_item_is_found_with_its_answer_and_one_of_two_words_is_too_short(planted, tmp_path):
    rng = random.Random(4)
    question = words(rng, 3)
    item = Item(
        benchmark="arc", file="x", row=0, stems=(question,), answer="energy", choices=("energy", "time", "a song")
    )
    table = make_table([item])
    assert list(table.find(f"{words(rng, 5)} {question.upper()}: Energy. {words(rng, 5)}")) == [4]
    assert table.find(f"{question} time") == {} == table.find(f"{question} {words(rng, 1)} energy")
    path = tmp_path / "arc_easy.jsonl"
    path.write_text(json.dumps({"question": "why", "choices": {"text": [""], "label": ["A"]}, "answerKey": "A"}))
    report = check_contamination(planted[0], {("arc_easy", None): path}, workers=1)
    assert report["tasks"]["arc_easy"] == {"items": 1, "contaminated": 0, "too_short": 1}
    assert unclean_items(report, "arc_easy") == {(None, 0)}


def test_form_that_many_items_share_makes_none_of_them_contaminated():
    rng = random.Random(6)
    form = words(rng, 20)
    items = [Item(benchmark="x", file="x", row=i, stems=(f"{form} {words(rng, 15)}",)) for i in range(MAX_ITEMS + 1)]
    table = make_table(items)
    assert table.find(f"{words(rng, 9)} {form} {words(rng, 9)}") == {}
    found = {n: np.zeros(len(keys), bool) for n, keys in table.keys.items()}
    for n, places in table.find(items[3].stems[0]).items():
        found[n][places] = True
    assert table.overlaps(found, len(items)).tolist() == [float(i == 3) for i in range(len(items))]
    assert make_table(items[:2]).find(form) != {}


def test_run_hashes_tell_order_and_length():
    hashes = words_of("one two three four five six seven eight nine")
    runs = run_hashes(hashes, {8, 9, 13})
    assert sorted(runs) == [8, 9] and len(runs[8]) == 2
    assert not np.isin(runs[8], run_hashes(hashes[::-1], {8})[8]).any()
    assert run_hashes(hashes[:3], {8}) == {}


def test_long_document_is_searched_to_its_end(planted):
    rng = random.Random(5)
    passage = words(rng, 30)
    table = make_table([Item(benchmark="lambada", file="x", row=0, passages=(passage,))])
    text = words(rng, 60_000)  # more characters than are looked at in one piece
    assert len(text) > 1 << 18
    assert len(table.find(f"{text} {passage}")[WORDS]) == 30 - WORDS + 1


def test_file_without_the_columns_of_its_benchmark_gets_one_line(planted, tmp_path):
    path = tmp_path / "lambada.jsonl"
    path.write_text('{"body": "x"}\n')
    with pytest.raises(ValueError, match="lambada.jsonl, row 0: no text of lambada"):
        check_contamination(planted[0], {("lambada", None): path})
