import gzip
import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from curation.decontaminate import (
    BENCHMARKS,
    CHUNK_CHARACTERS,
    Decontaminate,
    Index,
    benchmark_of,
    build_index,
    main,
    make_item,
    read_items,
    read_rows,
    split_words,
)

VOCABULARY = """
    lantern copper meadow thistle granite velvet orchard compass barley saddle ember willow cobalt pigeon anvil marble
    tunnel cedar quarry ribbon falcon mortar juniper ladder spindle canyon kettle mustard glacier harbour
"""


def sentence(draw: random.Random, n: int) -> str:
    return " ".join(draw.choice(VOCABULARY.split()) + draw.choice(["", "s", "ing", "ed"]) for _ in range(n))


@pytest.fixture(scope="module")
def suites(tmp_path_factory):
    """A folder of items: 200 questions of a known suite, some passages, and one of a suite that we know nothing of."""
    folder = tmp_path_factory.mktemp("items")
    draw = random.Random(0)
    questions = [
        {
            "question": f"Why did the {sentence(draw, 9)}, and what's the {sentence(draw, 4)}?",
            "choices": [sentence(draw, 3) for _ in range(4)],
            "answer": draw.randrange(4),
        }
        for _ in range(200)
    ]
    questions.append({"question": "What is the best choice?", "choices": ["zeppelin", "gondola", "trireme", "sled"]})
    write_rows(folder / "mmlu/test.jsonl", questions)
    write_rows(folder / "lambada_test.jsonl", [{"text": sentence(draw, 90)} for _ in range(20)])
    write_rows(folder / "ours/items.jsonl", [{"stem": "Which xylophone did Quetzalcoatl play at Ypsilanti?"}])
    (folder / "mmlu/README.txt").write_text("not an item")
    return folder, questions


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def rule(suites):
    path = suites[0].with_suffix(".index")
    build_index(read_items([suites[0]]), path)
    return Decontaminate(index_file=str(path))


def around(text: str) -> str:
    return f"It was a fine day and nothing much had happened so far. {text} Then the rain came, as it does in autumn."


def test_planted_question_is_found_with_its_place(rule, suites):
    for question in suites[1][:200]:
        text = around(question["question"])
        assert rule.check(text, {}) == "contaminated"
        evidence = rule.explain(text)
        assert evidence["benchmark"] == "mmlu"
        assert question["question"].rstrip("?") in text[evidence["start"] : evidence["stop"]]
        assert evidence["matched"] == text[evidence["start"] : evidence["stop"]]
        assert evidence["item"].endswith(f"mmlu/test.jsonl:{suites[1].index(question)}")


def test_other_punctuation_case_and_accents_hide_nothing(rule, suites):
    question = suites[1][0]["question"]
    for changed in (
        question.upper(),
        question.replace(" ", "\n"),
        question.replace(" ", " -- ").replace(",", ";"),
        question.replace("a", "á").replace("'", "\u2019"),
        question.replace("a", "a\u0301"),
        question.replace("f", "\uff46"),
    ):
        assert rule.check(around(changed), {}) == "contaminated", changed


def test_half_of_a_passage_is_found_and_clean_text_is_not(rule, suites):
    passage = json.loads((suites[0] / "lambada_test.jsonl").read_text().splitlines()[7])["text"]
    assert rule.check(around(" ".join(passage.split()[20:65])), {}) == "contaminated"
    draw = random.Random("clean")
    for _ in range(200):
        text = sentence(draw, 300)  # of the same few words as the items
        assert rule.check(text, {}) is None
        assert rule.explain(text) == {}


def test_question_that_says_little_counts_only_with_its_choices(rule):
    question = "What is the best choice?"
    assert rule.check(around(question), {}) is None
    assert rule.check(around(f"{question}\nA. zeppelin\nB. gondola\nC. trireme\nD. sled"), {}) == "contaminated"
    assert rule.check(around(f"{question} Zeppelin, gondola, trireme or sled?"), {}) == "contaminated"
    assert rule.check("zeppelin gondola trireme sled " + around(question), {}) is None


def test_item_far_into_a_long_document_and_across_a_chunk_is_found(rule, suites):
    question = suites[1][3]["question"]
    filler = "so it went on and on for days. " * (CHUNK_CHARACTERS // 31)
    for lead in (filler * 2, filler[: CHUNK_CHARACTERS - 40]):
        text = lead + question + filler
        evidence = rule.explain(text)
        assert text[evidence["start"] : evidence["stop"]].startswith("Why did the")
        assert abs(evidence["start"] - len(lead)) < 100


def test_same_items_give_the_same_bytes_and_other_items_others(suites, tmp_path):
    for name in ("a", "b"):
        build_index(read_items([suites[0]]), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    build_index(list(read_items([suites[0]]))[1:], tmp_path / "c")
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_signs_that_are_whole_phrases_do_not_overflow():
    assert len(split_words("\ufdfa" * CHUNK_CHARACTERS).hashes) == 1
    assert len(split_words("\ufb03" * CHUNK_CHARACTERS).hashes) == 1  # the ligature ffi: three letters each


def test_words_are_the_same_wherever_they_stand():
    first, second = split_words("The Cat's naïve ﬁsh, x²"), split_words("  the—cat s  NAI\u0308VE; fish (x2)")
    assert np.array_equal(first.hashes, second.hashes)
    text = "Ein ﬁnaler Test, ja?"
    words = split_words(text)
    spans = [text[start:stop] for start, stop in zip(words.starts, words.stops, strict=True)]
    assert spans == ["Ein", "ﬁnaler", "Test", "ja"]
    assert len(split_words("").hashes) == 0
    assert (
        len(split_words("\ud800 \U00030000 ok").hashes) == 2
    )  # a lone surrogate separates, a rare ideograph is a word


@pytest.mark.parametrize(
    ("benchmark", "row", "stem", "answer", "n_choices"),
    [
        (
            "arc",
            {"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
            "q",
            "y",
            2,
        ),
        (
            "arc",
            {"question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "1"},
            "q",
            "x",
            2,
        ),
        ("hellaswag", {"ctx": "q", "endings": ["x", "y"], "label": "1"}, "q", "y", 2),
        ("hellaswag", {"ctx": "q", "endings": ["x", "y"], "label": ""}, "q", "", 2),
        ("medqa", {"question": "q", "options": {"A": "x", "B": "y"}, "answer": "y"}, "q", "y", 2),
        ("mmlu", {"question": "q", "choices": ["x", "y"], "answer": 0}, "q", "x", 2),
        ("piqa", {"goal": "q", "sol1": "x", "sol2": "y", "label": -1}, "q", "", 2),
        ("truthfulqa", {"question": "q", "mc1_targets": {"choices": ["x", "y"], "labels": [0, 1]}}, "q", "y", 2),
        ("winogrande", {"sentence": "a _ b", "option1": "x", "option2": "y", "answer": "2"}, "a _ b", "y", 2),
    ],
)
def test_columns_of_the_suites_are_understood(benchmark, row, stem, answer, n_choices):
    item = make_item(benchmark, BENCHMARKS[benchmark], "f", 0, row)
    assert (item.stems[0], item.answer, len(item.choices)) == (stem, answer, n_choices)
    if benchmark == "winogrande":
        assert item.stems[1] == "a y b"


@pytest.mark.parametrize(
    ("path", "benchmark"),
    [
        ("evals/allenai/ai2_arc/ARC-Challenge/test-00000-of-00001.parquet", "arc"),
        ("evals/openai_humaneval/test.parquet", "humaneval"),
        ("evals/truthful_qa/multiple_choice/validation.parquet", "truthfulqa"),
        ("evals/MedQA-USMLE-4-options/phrases_no_exclude_test.jsonl", "medqa"),
        ("evals/gsm8k_test.jsonl", "gsm8k"),
        ("wikitext-2/valid.txt", "wikitext"),
        ("evals/search/items.jsonl", "search"),
        ("evals/ours.jsonl", "ours"),
    ],
)
def test_benchmark_is_known_by_the_names_of_the_folders(path, benchmark):
    assert benchmark_of(path.split("/")) == benchmark


def test_training_splits_and_headings_are_no_items(tmp_path):
    write_rows(tmp_path / "gsm8k/train.jsonl", [{"question": "q", "answer": "a"}])
    write_rows(tmp_path / "gsm8k/test.jsonl", [{"question": "How many?", "answer": "4"}])
    (tmp_path / "wikitext-2").mkdir()
    (tmp_path / "wikitext-2/valid.txt").write_text(" = Heading = \n \n A passage here . \n")
    items = list(read_items([tmp_path]))
    assert [(item.benchmark, item.row) for item in items] == [("gsm8k", 0), ("wikitext", 2)]


def test_rows_are_read_from_every_kind_of_file(tmp_path):
    rows = [
        {"question": "Was it caf\u00e9?", "choices": ["a", "b"], "answer": 1},
        {"question": "?", "choices": [], "answer": 0},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    packed = zstandard.ZstdCompressor()
    (tmp_path / "a.jsonl.zst").write_bytes(packed.compress(lines[:20]) + packed.compress(lines[20:]))  # two frames
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"):
        assert list(read_rows(tmp_path / name)) == rows, name
    (tmp_path / "broken.jsonl").write_bytes(lines + b'{"question": ')
    with pytest.raises(ValueError, match=r"broken\.jsonl, line 3: not one JSON object"):
        list(read_rows(tmp_path / "broken.jsonl"))


def test_items_in_columns_that_are_not_there_are_refused_by_file(tmp_path):
    write_rows(tmp_path / "mmlu/test.jsonl", [{"query": "q"}])
    with pytest.raises(ValueError, match=r"test\.jsonl has no item of mmlu: no row has text in the column question"):
        list(read_items([tmp_path]))


def test_damaged_index_is_refused_by_name(rule, tmp_path):
    data = Path(rule.index_file).read_bytes()
    (tmp_path / "cut").write_bytes(data[:-100_000])
    with pytest.raises(ValueError, match="cut is truncated"):
        Index(tmp_path / "cut")
    (tmp_path / "other").write_bytes(b"{}\n")
    with pytest.raises(ValueError, match="other is not a decontamination index"):
        Index(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="no decontamination index"):
        Decontaminate(index_file=str(tmp_path / "none")).check("text", {})


def test_less_evidence_can_be_asked_for_but_not_less_than_the_index_holds(rule, suites):
    words = suites[1][0]["question"].split()
    lax = Decontaminate(index_file=rule.index_file, min_evidence=20)
    found, found_with_less = (
        sum(bool(each.check(around(" ".join(words[:n])), {})) for n in range(len(words))) for each in (rule, lax)
    )
    assert 0 < found < found_with_less
    with pytest.raises(ValueError, match=r"min_evidence 5 is below 20\.0"):
        Decontaminate(index_file=rule.index_file, min_evidence=5)


def test_index_of_nothing_finds_nothing(tmp_path):
    build_index([], tmp_path / "index")
    assert Index(tmp_path / "index").find("any text at all, of some length and with words in it", 1.0) == []


def test_command_line_builds_and_checks(suites, tmp_path, capsys):
    index, pages = tmp_path / "x.index", tmp_path / "pages.jsonl"
    assert main(["build", "--items", str(suites[0]), "--out", str(index)]) == 0
    assert "mmlu" in capsys.readouterr().out
    write_rows(pages, [{"id": "a", "text": around(suites[1][5]["question"])}, {"id": "b", "text": around("")}])
    assert main(["check", "--index", str(index), "--input", str(pages)]) == 0
    out = capsys.readouterr()
    assert [json.loads(line)["id"] for line in out.out.splitlines()] == ["a"]
    assert "1 of 2 documents are contaminated" in out.err
    assert main(["check", "--index", str(index), "--input", str(pages), "--text-column", "body"]) == 2
    assert "no text in column body; it has id, text" in capsys.readouterr().err
