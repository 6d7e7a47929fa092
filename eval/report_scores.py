"""The scoreboard as one page that opens anywhere without a network: verdicts, pictures, samples to look through."""

import json
import random
from datetime import UTC, datetime
from pathlib import Path

import jinja2
from plotly.offline import get_plotlyjs

from curation.figures import COLORS, FAINT, INK, escape, fragment, legend, new_figure, page_style, short
from eval.comparison import BASELINES, FAMILIES, choice_scores, headline, published, read_samples, sample_files
from eval.intervals import AHEAD, BEHIND, LEVEL, NOT_COMPARABLE, wilson

VERDICT_COLORS = {AHEAD: "#2b7a50", LEVEL: "#6b7683", BEHIND: "#a8392f", NOT_COMPARABLE: FAINT}
FAMILY_COLORS = dict(zip(FAMILIES, (COLORS[1], COLORS[2], COLORS[4], COLORS[3]), strict=True))
SHOWN = 24  # samples of each task, half of them right where there are as many
MAX_CONTEXT = 3000  # characters of a prompt, its end
SEED = 0


def build_page(board, samples, scores=None):
    """The page, as a string, about a board (eval.comparison.make_board) and its folder of samples.

    scores: what else the score file says, for where it comes from.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"short": short, "number": "{:,}".format, "percent": percent}
    return environment.get_template("scores.html.jinja").render(
        board=board,
        scores=scores or {},
        baselines=BASELINES,
        families=FAMILIES,
        headline=headline(board),
        numbers={row["task"]: all_published(row["task"]) for row in board["rows"]},
        figures={name: (legend(figure), fragment(name, figure)) for name, figure in make_figures(board).items()},
        samples=embedded(pick_samples(board, samples)),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        plotly_js=get_plotlyjs(),
        style=page_style(),
    )


def percent(share):
    return f"{100 * share:.1f}"


def all_published(task):
    """Every published number of a task, by size: [(row, parameters)]."""
    models = BASELINES["models"]
    rows = [(row, model["parameters"]) for name, model in models.items() for row in published(task, name)]
    return sorted(rows, key=lambda pair: (pair[1], pair[0]["model"], pair[0]["shots"]))


# ---- pictures


def make_figures(board):
    """{name: picture}: all scores, the differences to GPT-3 of the same size where there are any, groups of tasks."""
    figures = {"scores": scores_figure(board)}
    if any(row["columns"] and row["columns"]["GPT-3"]["verdict"] != NOT_COMPARABLE for row in board["rows"]):
        figures["differences"] = differences_figure(board)
    for row in board["rows"]:
        if row["groups"]:
            figures[f"groups_{row['task']}"] = groups_figure(row)
    return figures


def scores_figure(board):
    """Ours with its interval, the published ones, and a stroke at chance, a line a task."""
    rows = board["rows"]
    titles = [f"{escape(row['title'])}, {row['metric']}" for row in rows]
    figure = new_figure(80 + 44 * len(rows), "percent right")
    score = [row["metrics"][row["metric"]] for row in rows]
    figure.add_scatter(
        x=[100 * row["chance"] for row in rows], y=titles, name="chance", mode="markers", hovertemplate="%{x:.0f}",
        marker={"symbol": "line-ns-open", "size": 24, "color": FAINT, "line_width": 3},
    )  # fmt: skip
    for family in FAMILIES:
        cells = [
            (title, row["columns"][family]["value"], row["task"])
            for title, row in zip(titles, rows, strict=True)
            # by another metric than ours its place on this axis would mislead
            if row["columns"] and row["columns"][family].get("metric") == row["metric"]
        ]
        if cells:
            peer = board["peers"][family]
            ends = [wilson(value, BASELINES["tasks"][task]["items"]) for _, value, task in cells]
            figure.add_scatter(
                x=[100 * value for _, value, _ in cells], y=[title for title, _, _ in cells], mode="markers",
                name=peer["model"] + ("" if peer["same_size"] else " (another size)"), hovertemplate="%{x:.1f}",
                marker={"size": 10, "color": FAMILY_COLORS[family], "line_width": 2,
                        "symbol": "diamond" if family == "GPT-3" else "circle-open"},
                error_x=bars([value for _, value, _ in cells], ends) if family == "GPT-3" else None,
            )  # fmt: skip
    figure.add_scatter(
        x=[100 * s["value"] for s in score], y=titles, name="this model, 95 % interval", mode="markers",
        marker={"size": 12, "color": COLORS[0]}, hovertemplate="%{x:.1f}",
        error_x=bars([s["value"] for s in score], [s["interval"] or [s["value"]] * 2 for s in score]),
    )  # fmt: skip
    figure.update_xaxes(range=[-2, 102])
    figure.update_yaxes(autorange="reversed", showgrid=True)
    return figure


def bars(values, intervals):
    """95 % intervals as plotly's error bars, in points."""
    return {
        "array": [100 * (high - value) for value, (_, high) in zip(values, intervals, strict=True)],
        "arrayminus": [100 * (value - low) for value, (low, _) in zip(values, intervals, strict=True)],
        "thickness": 1.6, "width": 5,
    }  # fmt: skip


def differences_figure(board):
    """Ours less GPT-3's of the same size, in points, with the interval that the verdict goes by."""
    cells = [(row["title"], row["columns"]["GPT-3"]) for row in board["rows"] if row["columns"]]
    cells = [(title, cell) for title, cell in cells if cell["verdict"] != NOT_COMPARABLE]
    figure = new_figure(80 + 40 * len(cells), f"points above {board['peers']['GPT-3']['model']}")
    for verdict in (AHEAD, LEVEL, BEHIND):
        mine = [(title, cell) for title, cell in cells if cell["verdict"] == verdict]
        if mine:
            figure.add_scatter(
                x=[100 * cell["difference"] for _, cell in mine], y=[escape(title) for title, _ in mine], name=verdict,
                mode="markers", marker={"size": 12, "color": VERDICT_COLORS[verdict]}, hovertemplate="%{x:+.1f}",
                error_x=bars([c["difference"] for _, c in mine], [c["interval"] for _, c in mine]),
            )  # fmt: skip
    figure.add_vline(x=0, line={"color": INK, "width": 1.5})
    figure.update_yaxes(
        autorange="reversed", showgrid=True, categoryorder="array", categoryarray=[escape(t) for t, _ in cells]
    )
    return figure


def groups_figure(row):
    """The score of each group (MMLU: subject) with its interval, the best first, and a stroke at chance."""
    groups = sorted(row["groups"].items(), key=lambda pair: -pair[1]["value"])
    names = [escape(name.replace("_", " ")) for name, _ in groups]
    figure = new_figure(80 + 20 * len(groups), "percent right")
    values = [group["value"] for _, group in groups]
    figure.add_scatter(
        x=[100 * value for value in values], y=names, mode="markers", name="this model, 95 % interval",
        marker={"size": 8, "color": COLORS[0]}, hovertemplate="%{x:.1f}",
        error_x=bars(values, [group["interval"] or [group["value"]] * 2 for _, group in groups]),
    )  # fmt: skip
    figure.add_vline(x=100 * row["chance"], line={"color": FAINT, "width": 2, "dash": "dot"})
    figure.update_yaxes(autorange="reversed", tickfont={"size": 11})
    return figure


# ---- samples


def pick_samples(board, folder):
    """{task: [what the browser shows of an item]}: SHOWN of each task by a fixed seed, right and wrong ones."""
    files = sample_files(folder)
    picked = {}
    for row in board["rows"]:
        items = read_samples(files[row["task"]])
        rng = random.Random(SEED)
        right = [item for item in items if item["metrics"][row["metric"]] > 0.5]
        wrong = [item for item in items if item["metrics"][row["metric"]] <= 0.5]
        n_right = min(len(right), max(SHOWN // 2, SHOWN - len(wrong)))
        chosen = rng.sample(right, n_right) + rng.sample(wrong, min(len(wrong), SHOWN - n_right))
        chosen.sort(key=lambda item: (item["group"] or "", item["doc_id"]))
        picked[row["title"]] = [shown_item(item, row["metric"]) for item in chosen]
    return picked


def shown_item(item, metric):
    """What the browser shows: the end of the prompt, the choices with their scores, what is right, what was said."""
    context = item["context"]
    entry = {
        "id": f"{item['group']} {item['doc_id']}" if item["group"] else str(item["doc_id"]),
        "right": item["metrics"][metric],
        "context": ("… " if len(context) > MAX_CONTEXT else "") + context[-MAX_CONTEXT:],
        "metrics": item["metrics"],
    }
    if item["choices"]:
        scores = choice_scores(item, metric).tolist()
        best = max(range(len(scores)), key=scores.__getitem__)
        entry["choices"] = [
            {"text": text, "score": round(score, 3), "gold": i == item["gold"], "said": i == best}
            for i, (text, score) in enumerate(zip(item["choices"], scores, strict=True))
        ]
    elif item["generation"] is not None:
        entry |= {"said": item["generation"], "gold": item["gold"], "outcome": item.get("outcome", "")}
    else:
        entry |= {"gold": item["gold"], "nats": item["loglikelihoods"]}
    return entry


def embedded(samples):
    """JSON that can stand inside a script element, whatever the texts are."""
    return json.dumps(samples, ensure_ascii=False).replace("<", "\\u003c").replace("\u2028", "\\u2028")
