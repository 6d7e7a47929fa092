"""Samples of benchmarks as they are after scoring, from seeded random answers of a given skill."""

import hashlib
import json
import random

CHOICES = {"hellaswag": 4, "winogrande": 2, "piqa": 2, "arc_easy": 4, "arc_challenge": 4, "boolq": 2, "mmlu": 4,
           "truthfulqa_mc1": 5, "openbookqa": 4}  # fmt: skip
UNCONDITIONAL = ("arc_easy", "arc_challenge", "openbookqa")
NORMALISED = ("hellaswag", "piqa", *UNCONDITIONAL)


def make_items(task, n, skill, seed=0, shots=None):
    """n items; each is right with probability `skill`, by every metric."""
    rng = random.Random(f"{task} {seed}")
    items = []
    for i in range(n):
        question = f"{task} question {i} of <many> words?"
        item = {
            "task": task, "doc_id": i, "item_sha256": hashlib.sha256(question.encode()).hexdigest(),
            "group": f"subject_{i % 3}" if task == "mmlu" else None,
            "shots": shots if shots is not None else 5 * (task == "mmlu"),
            "dropped_shots": 0, "context": f"Question: {question}\nAnswer:", "choices": None, "loglikelihoods": None,
            "unconditional": None, "bytes": None, "tokens": None, "gold": " word", "prediction": None, "greedy": None,
            "generation": None,
        }  # fmt: skip
        right = float(rng.random() < skill)
        if task in CHOICES:
            gold = rng.randrange(CHOICES[task])
            picked = gold if right else (gold + 1) % CHOICES[task]
            nats = [-5.0 - rng.random() - (j != picked) for j in range(CHOICES[task])]
            item |= {
                "choices": [f" choice {j}" for j in range(CHOICES[task])], "loglikelihoods": nats, "gold": gold,
                "prediction": picked, "bytes": [9] * len(nats), "tokens": [2] * len(nats), "metrics": {"acc": right},
            }  # fmt: skip
            if task in NORMALISED:
                item["metrics"]["acc_norm"] = right
            if task in UNCONDITIONAL:
                item["unconditional"] = [-4.0] * len(nats)
                item["metrics"]["acc_uncond"] = right
            item["metrics"]["tie"] = 0.0
        elif task == "humaneval":
            item |= {"generation": "    return 1\n", "gold": "def check(f): pass", "metrics": {"pass@1": right}}
        else:
            item |= {"loglikelihoods": [-1.0], "greedy": bool(right), "metrics": {"acc": right}}
        items.append(item)
    return items


def write_items(folder, tasks):
    """folder/<task>.jsonl of {task: items}."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, items in tasks.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


def result_of(tasks, parameters, name="a model"):
    """What run_tasks returns beside its files."""
    return {
        "tasks": {task: {"n": len(items)} for task, items in tasks.items()},
        "model": {"name": name, "kind": "braid", "sha256": "0" * 64, "parameters": parameters},
        "forward_tokens": 1000, "forward_tokens_hf": 4000, "seconds": 12.5,
    }  # fmt: skip
