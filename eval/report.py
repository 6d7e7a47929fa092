"""One page about a run that opens anywhere without a network:

    python -m eval.report runs/demo

Reads config.json, metrics.jsonl, eval/*.json and the manifest of the run's data; writes runs/demo/report.html. A part
whose files are not there is left out, and the page says which command makes them.
"""

import argparse
import json
import re
import sys
from collections import Counter
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path

import jinja2
from plotly.offline import get_plotlyjs

from curation.figures import (
    COLORS,
    FAINT,
    INK,
    escape,
    fragment,
    legend,
    new_figure,
    page_style,
    short,
    source_colors,
)
from curation.shards import manifest_sha256, new_file, read_manifest
from eval.command import run_command
from eval.comparison import BASELINES, headline
from eval.intervals import wilson
from eval.scoreboard import shown, verdict, with_error
from train.run_dir import RunDir, read_json, read_metrics

MAX_STEPS = 8  # of the funnel's picture; its table has every rule
MAX_POINTS = 2000  # of a curve; more than the page has pixels


# ---- what the page is made of


def build_report(path):
    """The page, as a string, about the run folder at `path`. Raises FileNotFoundError where there is no run."""
    run = RunDir(Path(path))
    if not run.config.is_file():
        raise FileNotFoundError(f"{run.path} is not a run folder: it has no config.json; give one such as runs/demo")
    config = read_json(run.config)
    metrics = read_metrics(run.metrics) if run.metrics.is_file() else []
    history = [read_json(file) for file in eval_files(run, r"step_\d+\.json")]
    samples = [read_json(file) for file in eval_files(run, r"sample_\d+\.json")]
    manifest, data_note = read_data(config)
    asked = read_json(run.questions)["tasks"] if run.questions.is_file() else {}
    newest = (run.checkpoints() or [run.checkpoint(0)])[-1]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "short": short,
        "number": "{:,}".format,
        "shown": shown,
        "with_error": with_error,
        "verdict": verdict,
        "headline": headline,
    }
    return environment.get_template("report.html.jinja").render(
        name=run.path.resolve().name,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        config=config,
        config_parts={k: json.dumps(v, indent=2) for k, v in config.items() if isinstance(v, dict)},
        metrics=metrics,
        last=metrics[-1] if metrics else None,
        scores=history[-1] if history else None,
        page_of_scores=f"step_{history[-1]['checkpoint']['step']:07d}.html" if history else None,
        sample=samples[-1] if samples else None,
        manifest=manifest,
        funnel=funnel_table(manifest) if manifest else None,
        data_note=data_note,
        checkpoint=newest,
        figures=make_figures(manifest, metrics, history),
        benchmarks=benchmark_figures(metrics, asked),
        measuring=share_of_measuring(metrics),
        plotly_js=get_plotlyjs(),
        style=page_style(),
    )


def eval_files(run, pattern):
    """Files of eval/ whose whole name matches, oldest step first; limited scores have longer names."""
    return sorted(path for path in (run.path / "eval").glob("*.json") if re.fullmatch(pattern, path.name))


def read_data(config):
    """(manifest or None, a sentence where it is missing or not the one that the run was trained on)."""
    folder = config["data"]["path"]
    try:
        manifest = read_manifest(folder)
    except (FileNotFoundError, ValueError) as error:
        return None, f"The data funnel is left out: {error}."
    if manifest_sha256(folder) != config["data"]["manifest_sha256"]:
        return (
            manifest,
            f"{folder} was made again since this run was trained on it; what follows describes it as it is now.",
        )
    return manifest, ""


def funnel_table(manifest):
    """[(label, {source: counts}, counts of all sources)], from what was read down to what is trained on.

    Only what was kept has tokens: the rest was never tokenized.
    """
    funnel = manifest["funnel"]
    rows = [("read", {source: entry["read"] for source, entry in funnel.items()})]
    for rule in rules_by_weight(funnel):
        rows.append((f"− {rule}", {source: entry["dropped"].get(rule) for source, entry in funnel.items()}))
    rewritten = {source: entry["removed_by_rewrites"] for source, entry in funnel.items()}
    if any(counts["text_bytes"] for counts in rewritten.values()):
        rows.append(("− removed by rewrites", rewritten))
    rows += [(part, {s: entry[part] for s, entry in funnel.items()}) for part in ("kept", "heldout", "train")]
    return [(label, by_source, add(by_source.values())) for label, by_source in rows]


def rules_by_weight(funnel):
    """Every rule that some source went through, the one that dropped the most text first."""
    weight = Counter()
    for entry in funnel.values():
        weight.update({rule: counts["text_bytes"] for rule, counts in entry["dropped"].items()})
    return [rule for rule, _ in weight.most_common()]


def add(counts):
    counts = [c for c in counts if c]
    return {key: sum(c.get(key, 0) for c in counts) for key in ("documents", "tokens", "text_bytes")}


# ---- pictures


def make_figures(manifest, metrics, history):
    """{name: (legend, HTML fragment)} of every picture whose data is there."""
    figures = {}
    if manifest:
        figures["funnel"] = funnel_figure(manifest["funnel"])
    if metrics:
        figures["loss"] = loss_figure(metrics)
        figures["lr"] = curve_figure(metrics, "lr", COLORS[4])
        figures["grad_norm"] = curve_figure(metrics, "grad_norm", COLORS[3])
        figures["tokens_per_s"] = curve_figure(metrics, "tokens_per_s", COLORS[2])
    if any("heldout_bits_per_byte" in row for row in metrics):
        figures["heldout"] = heldout_figure(metrics, history)
    if history:
        figures["yardsticks"] = yardstick_figure(history[-1]["bits_per_byte"])
        figures["tasks"] = tasks_figure(history[-1]["tasks"])
    return {name: (legend(figure), fragment(name, figure)) for name, figure in figures.items()}


def thin(rows):
    """At most MAX_POINTS of the rows, evenly spaced, the last one among them."""
    return rows[::-1][:: -(-len(rows) // MAX_POINTS)][::-1]


def funnel_figure(funnel):
    """What is left after each rule, in MB of text, stacked by source; the rules that dropped little are one step."""
    rules = rules_by_weight(funnel)
    steps = {f"− {escape(rule)}": [rule] for rule in rules[:MAX_STEPS]}
    if rest := rules[MAX_STEPS:]:
        steps[f"− {len(rest)} other rules"] = rest
    left = {source: entry["read"]["text_bytes"] for source, entry in funnel.items()}
    stages = [("read", left)]
    for label, dropped_by in steps.items():
        lost = {
            s: sum(e["dropped"][r]["text_bytes"] for r in dropped_by if r in e["dropped"]) for s, e in funnel.items()
        }
        left = {source: left[source] - lost[source] for source in left}
        stages.append((label, left))
    stages.append(("trained on", {source: entry["train"]["text_bytes"] for source, entry in funnel.items()}))
    figure = new_figure(60 + 32 * len(stages), "MB of text left", barmode="stack", bargap=0.25)
    for source, color in source_colors(funnel).items():
        figure.add_bar(
            orientation="h", name=escape(source), marker_color=color, y=[label for label, _ in stages],
            x=[counts[source] / 1e6 for _, counts in stages], hovertemplate="%{y}: %{x:,.1f} MB",
        )  # fmt: skip
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def loss_figure(metrics):
    """Training loss, raw and smoothed, and the held-out loss, against tokens."""
    x = [row["tokens"] for row in metrics]
    smooth = smoothed([row["loss"] for row in metrics])
    rows = thin(list(zip(x, [row["loss"] for row in metrics], smooth, strict=True)))
    x, raw, smooth = zip(*rows, strict=True)
    heldout = [row for row in metrics if "heldout_loss" in row]
    figure = new_figure(360, "training tokens", "nats per token", hovermode="x unified")
    figure.add_scatter(x=x, y=raw, name="train, each step", line={"color": "#c9d6e4", "width": 1})
    figure.add_scatter(x=x, y=smooth, name="train, smoothed", line={"color": COLORS[0], "width": 2.2})
    figure.add_scatter(
        x=[row["tokens"] for row in heldout], y=[row["heldout_loss"] for row in heldout], name="held-out",
        mode="lines+markers", line={"color": COLORS[1], "width": 2}, marker_size=7,
    )  # fmt: skip
    # the first steps start at ln(vocabulary) and would press the rest flat
    top, low = smooth[min(len(smooth) - 1, len(smooth) // 50)], min(raw)
    figure.update_yaxes(range=[low - 0.04 * (top - low), top + 0.04 * (top - low)], hoverformat=".3f")
    return figure


def smoothed(values):
    """The mean around each value over a fiftieth of the curve (less at its two ends)."""
    sums, reach, n = [0.0, *accumulate(values)], len(values) // 100, len(values)
    edges = [(max(0, i - reach), min(n, i + reach + 1)) for i in range(n)]
    return [(sums[end] - sums[start]) / (end - start) for start, end in edges]


def curve_figure(metrics, key, color):
    rows = thin(metrics)
    figure = new_figure(240, "training tokens", hovermode="x")
    figure.add_scatter(
        x=[row["tokens"] for row in rows], y=[row[key] for row in rows], line={"color": color, "width": 1.6}
    )
    figure.update_yaxes(rangemode="tozero")
    return figure


def heldout_figure(metrics, history):
    """Held-out bits per byte by source while training ran, and the full scores of the checkpoints that have them."""
    rows = [row for row in metrics if "heldout_bits_per_byte" in row]
    tokens = [row["tokens"] for row in rows]
    figure = new_figure(340, "training tokens", "bits per byte", hovermode="x unified")
    for source, color in source_colors(rows[0]["heldout_bits_per_byte_by_source"]).items():
        y = [row["heldout_bits_per_byte_by_source"].get(source) for row in rows]
        figure.add_scatter(
            x=tokens,
            y=y,
            name=escape(source),
            mode="lines+markers",
            line={"color": color, "width": 1.6},
            marker_size=5,
        )
    y = [row["heldout_bits_per_byte"] for row in rows]
    figure.add_scatter(x=tokens, y=y, name="all", mode="lines+markers", line={"color": INK, "width": 3}, marker_size=6)
    if history:
        figure.add_scatter(
            x=[scores["checkpoint"]["tokens_seen"] for scores in history],
            y=[scores["bits_per_byte"]["overall"]["value"] for scores in history],
            name="all, full evaluation (diamond)", mode="markers",
            marker={"symbol": "diamond-open", "size": 13, "color": INK, "line_width": 2},
        )  # fmt: skip
    figure.update_yaxes(hoverformat=".3f")
    return figure


def benchmark_figures(metrics, asked):
    """[(title, HTML fragment)] of each benchmark's curve while training ran, by the metric of the scoreboard.

    asked: the tasks of eval/questions.json, for chance.
    """
    rows, found = [row for row in metrics if row.get("eval")], []
    for name in dict.fromkeys(name for row in rows for name in row["eval"]):
        metric = BASELINES["tasks"][name]["metric"]
        points = [(row["tokens"], row["eval"][name]) for row in rows if name in row["eval"]]
        scores = [
            {"value": score[metric], "interval": wilson(score[metric], score["n"])} for _, score in points
        ]  # fmt: skip
        figure = new_figure(210, "training tokens", hovermode="x")
        figure.add_scatter(
            x=[tokens for tokens, _ in points], y=[score["value"] for score in scores], name="model",
            mode="lines+markers", line={"color": COLORS[0], "width": 1.8}, marker_size=6,
            error_y={**intervals(scores), "color": "#9db8d6", "thickness": 1.4, "width": 3},
            hovertemplate="%{y:.1%}",
        )  # fmt: skip
        chance = asked.get(name, {}).get("chance")
        if chance:
            figure.add_hline(chance, line={"color": COLORS[3], "width": 1.4, "dash": "dash"})
        figure.update_yaxes(tickformat=".0%")
        title = f"{BASELINES['tasks'][name]['title']}, {metric}, {points[-1][1]['n']:,} questions"
        found.append((title, fragment(f"benchmark_{name}", figure)))
    return found


def share_of_measuring(metrics):
    """The part of the time that measuring took of steps and measuring, or None where it was not written down."""
    before = [{"tokens": 0}, *metrics]
    steps_s = sum(
        (row["tokens"] - last["tokens"]) / row["tokens_per_s"] for last, row in zip(before, metrics, strict=False)
    )
    measuring_s = sum(row.get("eval_s", 0) for row in metrics)
    return measuring_s / (steps_s + measuring_s) if measuring_s else None


def yardstick_figure(held_out):
    """Bars of bits per byte for all and for each source: the model (with 95 % interval), gzip -9, unigram."""
    rows = {"all": held_out["overall"], **held_out["sources"]}
    names = [f"<b>{name}</b>" if name == "all" else escape(name) for name in rows]
    figure = new_figure(50 + 72 * len(rows), "bits per byte", barmode="group", bargap=0.25)
    strokes = {**intervals(rows.values()), "color": INK, "thickness": 1.4, "width": 4}
    for key, name, color, text_color in (
        ("value", "model", COLORS[0], "white"),
        ("gzip", "gzip -9", COLORS[1], INK),
        ("unigram", "unigram", FAINT, INK),
    ):
        values = [row[key] for row in rows.values()]
        figure.add_bar(
            orientation="h", y=names, x=values, name=name, marker_color=color, hovertemplate="%{x:.3f}",
            text=[f"{value:.2f}" for value in values], textposition="inside", insidetextanchor="start",
            constraintext="none", textfont={"size": 11, "color": text_color},
            error_x=strokes if key == "value" else None,
        )  # fmt: skip
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def intervals(scores):
    """The 95 % intervals as plotly's error bars."""
    ends = [(score["value"], *(score["interval"] or [score["value"]] * 2)) for score in scores]
    return {"array": [high - value for value, _, high in ends], "arrayminus": [value - low for value, low, _ in ends]}


def tasks_figure(tasks):
    """Accuracies with 95 % intervals, and a stroke where guessing lands."""
    rows = [
        (f"{task}, {metric}", score, result["chance"].get(metric))
        for task, result in tasks.items()
        for metric, score in result["metrics"].items()
        if metric.startswith("acc")
    ]
    labels = [label for label, _, _ in rows]
    figure = new_figure(60 + 46 * len(rows), "accuracy")
    figure.add_scatter(
        x=[score["value"] for _, score, _ in rows], y=labels, name="model, 95 % interval", mode="markers",
        marker={"size": 11, "color": COLORS[0]}, hovertemplate="%{x:.1%}",
        error_x={**intervals([score for _, score, _ in rows]), "thickness": 2, "width": 6},
    )  # fmt: skip
    figure.add_scatter(
        x=[chance for _, _, chance in rows], y=labels, name="chance", mode="markers", hovertemplate="%{x:.0%}",
        marker={"symbol": "line-ns-open", "size": 24, "color": COLORS[3], "line_width": 3},
    )  # fmt: skip
    highest = max(max((score["interval"] or [score["value"]])[-1], chance or 0) for _, score, chance in rows)
    figure.update_xaxes(tickformat=".0%", range=[-0.01, min(1.01, 1.1 * highest + 0.02)])
    figure.update_yaxes(autorange="reversed", showgrid=True)
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m eval.report", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", type=Path, help="a run folder, such as runs/demo")
    flags = parser.parse_args(argv)
    try:
        page = build_report(flags.run)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with new_file(RunDir(flags.run).report) as file:
        file.write(page.encode())
    print(f"written to {RunDir(flags.run).report} ({len(page) / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    run_command(main)
