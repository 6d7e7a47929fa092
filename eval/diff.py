"""Two scored models on the same items: is one better, and which answers changed?

    python -m eval.diff runs/a/checkpoints/step_0001600 runs/b/checkpoints/step_0001600

Takes scored checkpoints, the score files that `make eval` wrote, or folders of samples. For each task: McNemar's exact
test of the right answers, its p value after Holm's correction for the number of tasks, and the 95 % interval of the
difference by a paired bootstrap over the items. The items are compared by their sha256: other data is refused.
"""

import argparse
import sys
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from eval.command import check_out, run_command
from eval.comparison import BASELINES, choice_scores, read_samples, sample_files
from eval.intervals import LEVEL, holm, mcnemar, paired_bootstrap, verdict_of
from train.run_dir import write_json


def samples_folder(path):
    """Where the samples of a checkpoint, a score file or a folder of scores are."""
    path = Path(path)
    places = [path, path / "samples", path.with_suffix("") / "samples"]
    if path.parent.name == "checkpoints":
        places.append(path.parent.parent / "eval" / path.name / "samples")
    for place in places:
        if place.is_dir() and any(place.glob("*.jsonl")):
            return place
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a scored checkpoint, a score file or a samples folder")
    raise FileNotFoundError(f"{path} has no samples of benchmarks; `make eval CKPT=... DATA=...` writes them")


def pair(task, a_items, b_items):
    """[(item of A, item of B)] of the same question, in A's order. ValueError where a question is another one."""
    by_key = {(item["group"], item["doc_id"]): item for item in b_items}
    pairs = []
    for item in a_items:
        other = by_key.get((item["group"], item["doc_id"]))
        if other is None:
            continue
        if other["item_sha256"] != item["item_sha256"]:
            raise ValueError(
                f"{task}, item {item['doc_id']}: A and B were asked different questions (sha256 "
                f"{item['item_sha256'][:12]} and {other['item_sha256'][:12]}); score both on the same data"
            )
        pairs.append((item, other))
    if not pairs:
        raise ValueError(f"{task}: A and B have no item in common; score both on the same data")
    return pairs


def compare_task(task, a_items, b_items, seed=0):
    """One task's differences, B less A: {"n", "metrics": {metric: ...}, "changed": [items]}."""
    pairs = pair(task, a_items, b_items)
    metrics = {}
    for name in pairs[0][0]["metrics"]:
        a, b = ([item["metrics"].get(name) for item in side] for side in zip(*pairs, strict=True))
        if None in a or None in b:
            continue
        # credit that a tie shares counts as right when it is more than half
        test = mcnemar([value > 0.5 for value in a], [value > 0.5 for value in b])
        interval = paired_bootstrap(a, b, seed)
        # both must say so: of few items the bootstrap's interval is too narrow
        metrics[name] = {
            "a": sum(a) / len(a), "b": sum(b) / len(b), "difference": (sum(b) - sum(a)) / len(a), "interval": interval,
            **test, "verdict": verdict_of(interval) if test["p"] < 0.05 else LEVEL,
        }  # fmt: skip
    about = BASELINES["tasks"].get(task, {})
    headline = about["metric"] if about.get("metric") in metrics else next(iter(metrics))
    changed = [describe(a, b, headline) for a, b in pairs if a["metrics"][headline] != b["metrics"][headline]]
    return {
        "n": len(pairs), "only_in_a": len(a_items) - len(pairs), "only_in_b": len(b_items) - len(pairs),
        "metric": headline, "metrics": metrics, "changed": changed,
    }  # fmt: skip


def describe(a, b, metric):
    """What is needed to look at an item whose score changed."""
    better = "B" if b["metrics"][metric] > a["metrics"][metric] else "A"
    return {
        **{name: a[name] for name in ("doc_id", "group", "context", "choices", "gold")},
        "better": better, "a": said(a, metric), "b": said(b, metric),
    }  # fmt: skip


def said(item, metric):
    """A model's answer by this metric: the number of a choice, what it wrote, or whether it would say the words."""
    if item["choices"]:
        return int(choice_scores(item, metric).argmax())
    return item["greedy"] if item["generation"] is None else item["generation"]


def compare_runs(a, b, seed=0):
    """{"a", "b", "seed", "tasks": {task: ...}} of all tasks that both have."""
    a_files, b_files = sample_files(samples_folder(a)), sample_files(samples_folder(b))
    shared = [task for task in a_files if task in b_files]
    if not shared:
        raise ValueError(f"{a} has {', '.join(a_files)} and {b} has {', '.join(b_files)}: no task in common")
    tasks = {
        task: compare_task(task, read_samples(a_files[task]), read_samples(b_files[task]), seed) for task in shared
    }
    headlines = [entry["metrics"][entry["metric"]] for entry in tasks.values()]
    for entry, p in zip(headlines, holm([entry["p"] for entry in headlines]), strict=True):
        entry["p_holm"] = p
    left_out = sorted(set(a_files) ^ set(b_files))
    return {"a": str(a), "b": str(b), "seed": seed, "left_out": left_out, "tasks": tasks}


def show(result, console, n_items):
    """Print a row a task, and the first n_items that changed of each."""
    console.print(f"A: {result['a']}\nB: {result['b']}")
    table = Table(
        title="B less A, in points, on the same items", title_justify="left", box=SIMPLE_HEAD, pad_edge=False
    )
    for name in (
        "task",
        "metric",
        "items",
        "A",
        "B",
        "B - A",
        "95 % interval",
        "only A",
        "only B",
        "p",
        "p, Holm",
        "B is",
    ):
        table.add_column(name, justify="left" if name in ("task", "metric", "B is") else "right", no_wrap=True)
    for task, entry in result["tasks"].items():
        row = entry["metrics"][entry["metric"]]
        low, high = row["interval"]
        table.add_row(
            task, entry["metric"], f"{entry['n']:,}", f"{row['a']:.1%}", f"{row['b']:.1%}",
            f"{100 * row['difference']:+.1f}", f"{100 * low:+.1f} to {100 * high:+.1f}", f"{row['only_a']:,}",
            f"{row['only_b']:,}", f"{row['p']:.2g}", f"{row['p_holm']:.2g}", row["verdict"],
        )  # fmt: skip
    console.print(table)
    if result["left_out"]:
        console.print(f"left out, since only one of the two has them: {', '.join(result['left_out'])}")
    for task, entry in result["tasks"].items():
        for item in entry["changed"][:n_items]:
            where = f"{item['group']} {item['doc_id']}" if item["group"] else item["doc_id"]
            console.print(f"[bold]{task} {where}[/bold]: only {item['better']} is right", highlight=False)
            console.print(escape(f"  ...{item['context'][-200:]!r}"), highlight=False)
            for name in ("gold", "a", "b"):
                console.print(escape(f"  {name}: {answer(item, item[name])}"), highlight=False)


def answer(item, given):
    """A choice by its text, anything else as it is."""
    return repr(item["choices"][given])[:200] if item["choices"] and isinstance(given, int) else repr(given)[:200]


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m eval.diff", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("a", help="a scored checkpoint, its score file, or a folder of samples")
    parser.add_argument("b", help="what is compared with it")
    parser.add_argument("--out", type=Path, help="write all of it, every changed item too, as JSON")
    parser.add_argument("--items", type=int, default=3, help="print so many changed items of each task")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default %(default)s)")
    flags = parser.parse_args(argv)
    try:
        if flags.out:
            check_out(flags.out)
        result = compare_runs(flags.a, flags.b, flags.seed)
        if flags.out:
            write_json(flags.out, result)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(result, Console(width=None if sys.stdout.isatty() else 150), max(0, flags.items))
    if flags.out:
        print(f"written to {flags.out}")
    return 0


if __name__ == "__main__":
    run_command(main)
