"""Pictures of an estimate: memory by part as stacked bars, and cost against time over numbers of GPUs, as one page."""

from dataclasses import replace

import plotly.graph_objects as go
import plotly.io
from plotly.offline import get_plotlyjs

from launch.plan import price_of, rank, search
from train.hardware import get_gpu, load_gpus
from train.memory import GIB

COLORS = {
    "weights": "#2f6fb0", "float32 weights": "#7fb2e0", "optimizer states": "#e08a2c", "gradients": "#3f9a6b",
    "activations": "#b5486b", "logits and loss": "#7a63b8", "gathered weights": "#2aa1b3", "buckets": "#8a6d4b",
    "workspace": "#6b7683", "step": "#c9a227", "slack, CUDA, NCCL": "#c8d0d8",
}  # fmt: skip
LAYOUT = {"template": "plotly_white", "height": 460, "margin": {"l": 60, "r": 20, "t": 50, "b": 60}}


def memory_figure(request, gpu, n_gpus):
    """A bar for each DeepSpeed file and kind of recomputation, at its fastest micro-batch; a line for the memory."""
    fitting, rest = rank(request, gpu, n_gpus)
    bars = {}
    for choice in fitting + rest:
        bars.setdefault(f"{choice.zero_file}<br>recompute {choice.setup.recompute}", choice)
    labels = [f"{label}<br>{c.setup.micro_batch} rows" for label, c in bars.items()]
    title = f"{request.size}, {n_gpus} x {gpu.title}: GiB on each GPU"
    figure = go.Figure(layout=LAYOUT | {"barmode": "stack", "title": title})
    parts = [dict(c.parts) | {"slack, CUDA, NCCL": c.needed - sum(c.parts.values())} for c in bars.values()]
    for part, color in COLORS.items():
        sizes = [p.get(part, 0) / GIB for p in parts]
        if any(sizes):
            figure.add_bar(x=labels, y=sizes, name=part, marker_color=color)
    figure.add_hline(y=gpu.memory_gib, line_dash="dash", annotation_text=f"{gpu.memory_gib} GiB")
    figure.update_yaxes(title="GiB")
    return figure


def cost_figure(request):
    """Dollars against days, a line a GPU, a point a number of GPUs."""
    title = f"{request.size}, {request.tokens / 1e9:,.4g}B tokens: cost against time, over numbers of GPUs"
    figure = go.Figure(layout=LAYOUT | {"title": title})
    for gpu in load_gpus().values():
        if not price_of(gpu, spot=request.spot, provider=request.provider):
            continue
        found = search(replace(request, gpu=gpu, n_gpus=None, budget=None, days=None, batch_tokens=None))
        found = sorted((c for c in found if c.dollars is not None), key=lambda c: c.setup.n_gpus)
        if found:
            figure.add_scatter(
                x=[c.days for c in found], y=[c.dollars for c in found], text=[c.setup.n_gpus for c in found],
                mode="lines+markers+text", textposition="top center", name=gpu.name,
            )  # fmt: skip
    days = [x for trace in figure.data for x in trace.x]
    dollars = [y for trace in figure.data for y in trace.y]
    line = {"mode": "lines", "line": {"dash": "dash", "color": "#6b7683"}}
    if days and request.days is not None:
        figure.add_scatter(x=[request.days] * 2, y=[min(dollars), max(dollars)], name=f"{request.days:g} days", **line)
    if days and request.budget is not None:
        figure.add_scatter(
            x=[min(days), max(days)], y=[request.budget] * 2, name=f"{request.budget:,.0f} dollars", **line
        )
    figure.update_xaxes(title="days", type="log")
    figure.update_yaxes(title="dollars", type="log")
    return figure


def write_page(path, request, result):
    """One HTML page that opens without a network. Raises ValueError for a name that is not .html."""
    if path.suffix != ".html":
        raise ValueError(f"--plot {path}: the pictures are a page; give a name that ends in .html")
    figures = [memory_figure(request, get_gpu(result["gpu"]), result["gpus"]), cost_figure(request)]
    pieces = [plotly.io.to_html(f, include_plotlyjs=False, full_html=False) for f in figures]
    path.write_text(
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{request.size}: estimate</title>"
        f"<script>{get_plotlyjs()}</script></head><body>{''.join(pieces)}</body></html>\n"
    )
