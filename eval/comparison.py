"""Where a model stands: its benchmark scores with their intervals beside the published ones, and a verdict on each.

baselines.json holds the published numbers, each with its source, protocol, shots, metric and how sure it is. A verdict
is passed only on a model of about the same size, of as many shots, by the same metric under a protocol that lm-eval's
is comparable with; everything else is shown as not comparable, with the reason.
"""

import json
from math import log
from pathlib import Path

import numpy as np

from eval.intervals import AHEAD, BEHIND, LEVEL, NOT_COMPARABLE, difference, share, verdict_of
from model.choices import best_choices

BASELINES = json.loads((Path(__file__).parent / "baselines.json").read_text(encoding="utf-8"))
FAMILIES = ("GPT-3", "OPT", "Pythia", "Mamba-2 hybrid")  # the columns
SAME_SIZE = 1.3  # times more or fewer parameters at most: our 13B has 10.7 billion, our 1.3B 1.45


def read_samples(path):
    """The items of one task, as run_tasks writes them. ValueError names a file that is cut short or empty."""
    items = []
    with Path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                items.append(json.loads(line))
            except ValueError:
                raise ValueError(f"{path}, line {number}: not one JSON object; score the model again") from None
    if not items:
        raise ValueError(f"{path} has no items; score the model again")
    return items


def sample_files(folder):
    """{task: path} of the samples under a folder of scores, in the order of baselines.json, then by name."""
    known = list(BASELINES["tasks"])
    paths = {path.stem: path for path in Path(folder).glob("*.jsonl")}
    return {task: paths[task] for task in sorted(paths, key=lambda t: (known.index(t) if t in known else 99, t))}


# ---- our side


def score_items(items):
    """{"n", "shots", "items_with_dropped_shots", "chance", "tie_rate", "metrics": {name: share}} of a task's items."""
    names = [name for name in items[0]["metrics"] if name != "tie"]
    return {
        "n": len(items),
        "shots": max(item["shots"] + item["dropped_shots"] for item in items),
        "items_with_dropped_shots": sum(item["dropped_shots"] > 0 for item in items),
        "chance": float(np.mean([1 / len(item["choices"]) if item["choices"] else 0.0 for item in items])),
        "tie_rate": {name: rate for name in names if (rate := tie_rate(items, name)) is not None},
        "metrics": {name: share([item["metrics"][name] for item in items]) for name in names},
    }


def tie_rate(items, metric):
    """The share of items whose best choice is not alone, None where there are no choices: what argmax hides."""
    ties = [is_tie(choice_scores(item, metric)) for item in items if item["choices"] and item["loglikelihoods"]]
    return float(np.mean(ties)) if ties else None


def choice_scores(item, metric):
    """What the metric takes the largest of: nats, nats a character, or nats beyond those without the question."""
    nats = np.array(item["loglikelihoods"], float)
    if metric == "acc_norm":
        return nats / [max(len(choice), 1) for choice in item["choices"]]
    if metric == "acc_uncond":
        return nats - np.array(item["unconditional"], float)
    return nats


def is_tie(scores):
    return int(best_choices(scores).sum()) > 1


# ---- the published side


def nearest(family, parameters):
    """(name, is it of about the same size) of the family's model nearest in size; a 175B is nobody's size."""
    sizes = {
        name: abs(log(model["parameters"] / parameters))
        for name, model in BASELINES["models"].items()
        if model["family"] == family and not model.get("never_same_size")
    }
    name = min(sizes, key=sizes.get)
    return name, sizes[name] <= log(SAME_SIZE)


def published(task, model):
    """This model's published numbers for this task."""
    return [row for row in BASELINES["numbers"] if row["task"] == task and row["model"] == model]


def choose(rows, ours, metric):
    """The number that stands in a column: of our shots and one of our metrics, the task's own metric before others."""

    def fitness(row):
        fits = row.get("comparable", True) and row["shots"] == ours["shots"] and row["metric"] in ours["metrics"]
        return fits, row["metric"] == metric, row["shots"] == ours["shots"]

    return max(rows, key=fitness, default=None)


def compare(task, ours, family, parameters):
    """The cell of one family: what is published for its nearest size, and the verdict or why there is none."""
    name, same_size = nearest(family, parameters)
    metric = BASELINES["tasks"][task]["metric"]
    row = choose(published(task, name), ours, metric)
    if row is None:
        note = BASELINES["tasks"][task].get("note") if family == "GPT-3" else None
        why = f"baselines.json has no number of {name}" + (f": {note}" if note else "")
        return {"model": name, "same_size": same_size, "verdict": NOT_COMPARABLE, "why": why}
    cell = {**row, "same_size": same_size, "value": row["value"] / 100, "verdict": NOT_COMPARABLE}
    if not row.get("comparable", True) or row["metric"] not in ours["metrics"]:
        return {**cell, "why": f"another protocol: {BASELINES['protocols'][row['protocol']]}"}
    if row["shots"] != ours["shots"]:
        return {**cell, "why": f"{row['shots']} shots there, {ours['shots']} here"}
    score, items = ours["metrics"][row["metric"]], BASELINES["tasks"][task]["items"]
    interval = difference(score["value"], ours["n"], cell["value"], items)
    cell |= {"ours": score["value"], "difference": score["value"] - cell["value"], "interval": interval}
    if not same_size:
        return {**cell, "why": f"another size: the nearest of {family} is {name}"}
    return {**cell, "verdict": verdict_of(interval), "why": ""}


def score_clean(items, unclean):
    """The scores of the items whose (group, doc_id) is not in `unclean`, and how many those are."""
    clean = [item for item in items if (item["group"], item["doc_id"]) not in unclean]
    scores = score_items(clean) if clean else {"n": 0, "metrics": {}}
    return {"n": scores["n"], "left_out": len(items) - len(clean), "metrics": scores["metrics"]}


def make_row(task, items, parameters, unclean=None):
    """The scoreboard's row of one task: what score_items says, its headline metric, and a cell for each family.

    unclean: {(group, doc_id)} of the items that the training text holds; None: nobody has looked.
    """
    ours = score_items(items)
    about = BASELINES["tasks"].get(task)
    metric = about["metric"] if about and about["metric"] in ours["metrics"] else next(iter(ours["metrics"]))
    return {
        "task": task,
        "title": about["title"] if about else task,
        "metric": metric,
        **ours,
        "partial": bool(about) and ours["n"] < about["items"],
        "groups": score_groups(items, metric),
        "clean": None if unclean is None else score_clean(items, unclean),
        "columns": {family: compare(task, ours, family, parameters) for family in FAMILIES} if about else {},
    }


def score_groups(items, metric):
    """{group: share} of the metric, for a task that has groups: MMLU's subjects."""
    groups = {}
    for item in items:
        if item["group"]:
            groups.setdefault(item["group"], []).append(item["metrics"][metric])
    return {group: {"n": len(values), **share(values)} for group, values in sorted(groups.items())}


def make_board(result, folder, unclean=None):
    """The scoreboard of what run_tasks returned and wrote samples of into `folder`.

    unclean: {task: {(group, doc_id)}} where the training text has been searched for the items.
    """
    parameters = result["model"]["parameters"]
    files = sample_files(folder)
    if missing := [task for task in result["tasks"] if task not in files]:
        raise FileNotFoundError(f"{folder} has no samples of {', '.join(missing)}; score the model again")
    rows = [
        make_row(task, read_samples(files[task]), parameters, None if unclean is None else unclean.get(task, set()))
        for task in files
        if task in result["tasks"]
    ]
    return {
        "model": result["model"],
        "peers": {
            family: dict(zip(("model", "same_size"), nearest(family, parameters), strict=True)) for family in FAMILIES
        },
        "rows": rows,
        "verdicts": {family: count_verdicts(rows, family) for family in FAMILIES},
        "forward_tokens": result.get("forward_tokens"),
        "forward_tokens_hf": result.get("forward_tokens_hf"),
        "seconds": result.get("seconds"),
    }


def count_verdicts(rows, family):
    verdicts = [row["columns"][family]["verdict"] for row in rows if row["columns"]]
    return {verdict: verdicts.count(verdict) for verdict in (AHEAD, LEVEL, BEHIND, NOT_COMPARABLE)}


def headline(board, family="GPT-3"):
    """One sentence: on how many tasks the model is ahead of the family's model of its size."""
    peer, counts = board["peers"][family], board["verdicts"][family]
    if not peer["same_size"]:
        size = f"{board['model']['parameters']:,}"
        return f"There is no {family} of about {size} parameters to compare with; the nearest is {peer['model']}."
    judged = counts[AHEAD] + counts[LEVEL] + counts[BEHIND]
    return (
        f"Against {peer['model']}: ahead on {counts[AHEAD]} of {judged} comparable tasks, level on {counts[LEVEL]}, "
        f"behind on {counts[BEHIND]}; {counts[NOT_COMPARABLE]} not comparable."
    )
