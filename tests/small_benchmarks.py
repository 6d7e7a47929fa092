"""A folder with a few made-up questions for every benchmark, in the files and columns that the real ones have."""

import random

from small_run import make_text, write_lines

from eval.task_data import BENCHMARKS, definitions, file_name

LETTERS = "ABCD"


def make_benchmarks(folder, n_items=4):
    """Write n_items questions of each benchmark, and of each subject of MMLU; returns the folder."""
    for name in BENCHMARKS:
        for definition in definitions(name):
            for split in BENCHMARKS[name]["splits"]:
                n = 5 if split == "dev" else n_items
                file = file_name(name, definition, split)
                rows = [ROWS[name](f"{file} {i}", i, definition.get("dataset_name")) for i in range(n)]
                write_lines(folder / file, rows)
    return folder


def texts(seed, n, least=2):
    draw = random.Random(seed)
    return [make_text(f"{seed} {i}", draw.randint(least, least + 4)) for i in range(n)]


def hellaswag(seed, i, _):
    first, second, *endings = texts(seed, 6)
    return {
        "activity_label": "Reading", "ctx_a": f"A model. {first}", "ctx_b": second, "ctx": f"{first} {second}",
        "endings": [endings[0] + " [title] the end.", *endings[1:]], "label": str(i % 4),
    }  # fmt: skip


def arc(seed, i, _):
    question, *choices = texts(seed, 5)
    labels = list("1234" if i == 1 else LETTERS)
    return {"id": seed, "question": question + "?", "choices": {"text": choices, "label": labels},
            "answerKey": labels[i % 4]}  # fmt: skip


def openbookqa(seed, i, _):
    row = arc(seed, 0, None)
    return {"id": seed, "question_stem": row["question"], "choices": row["choices"], "answerKey": LETTERS[i % 4]}


def winogrande(seed, i, _):
    before, after = texts(seed, 2)
    return {"sentence": f"{before} the _ {after}.", "option1": "state", "option2": "small token",
            "answer": str(1 + i % 2)}  # fmt: skip


def piqa(seed, i, _):
    goal, one, two = texts(seed, 3)
    return {"goal": goal, "sol1": one, "sol2": two, "label": i % 2}


def mmlu(seed, i, name):
    question, *choices = texts(seed, 5)
    return {"question": question + "?", "subject": name, "choices": choices, "answer": i % 4}


def truthfulqa(seed, i, _):
    question, *choices = texts(seed, 4 + i % 3)
    return {"question": question + "?",
            "mc1_targets": {"choices": choices, "labels": [1] + [0] * (len(choices) - 1)}}  # fmt: skip


def humaneval(seed, i, _):
    return {"task_id": f"HumanEval/{i}", "prompt": f"def f{i}(x):\n    \"\"\"{make_text(seed, 4)}\"\"\"\n",
            "entry_point": f"f{i}", "canonical_solution": "    return x\n",
            "test": "def check(candidate):\n    assert candidate(1) == 1\n"}  # fmt: skip


ROWS = {
    "hellaswag": hellaswag,
    "lambada": lambda seed, *_: {"text": make_text(seed, 14)},
    "winogrande": winogrande,
    "piqa": piqa,
    "arc_easy": arc,
    "arc_challenge": arc,
    "boolq": lambda seed, i, _: {"question": make_text(seed, 4), "passage": make_text(seed, 12), "answer": i % 2 == 0},
    "mmlu": mmlu,
    "truthfulqa_mc1": truthfulqa,
    "humaneval": humaneval,
    "openbookqa": openbookqa,
}
