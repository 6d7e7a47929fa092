"""The look that our report pages share: plotly pictures in one style, legends that wrap, short numbers."""

import html
from pathlib import Path

import plotly.graph_objects as go
import plotly.io

INK, FAINT, GRID = "#1d2733", "#a9b4c0", "#e6eaee"
COLORS = ("#2f6fb0", "#e08a2c", "#3f9a6b", "#b5486b", "#7a63b8", "#8a6d4b", "#2aa1b3", "#6b7683")  # one a source
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'DejaVu Sans', sans-serif"


def page_style():
    """The style sheet of our pages."""
    return f":root {{ --font: {FONT}; }}\n{(Path(__file__).parent / 'page.css').read_text()}"


def new_figure(height, x_title=None, y_title=None, **layout):
    """An empty picture, `height` pixels high."""
    figure = go.Figure(
        layout=dict(
            height=height, margin={"l": 8, "r": 8, "t": 8, "b": 8}, font={"family": FONT, "size": 13, "color": INK},
            paper_bgcolor="white", plot_bgcolor="white", hoverlabel={"font_family": FONT}, dragmode=False,
            showlegend=False, **layout,
        )
    )  # fmt: skip
    axis = {"gridcolor": GRID, "linecolor": FAINT, "zeroline": False, "automargin": True}
    figure.update_xaxes(title=x_title, **axis)
    figure.update_yaxes(title=y_title, **axis)
    return figure


def legend(figure):
    """[(label, color)] of a picture with more than one set of marks. The page writes it: it wraps on any width."""
    marks = [(trace.name, trace.marker.color or trace.line.color) for trace in figure.data]
    return marks if len(marks) > 1 else []


def fragment(name, figure):
    """The picture as a piece of HTML, without plotly's own code."""
    config = {"displayModeBar": False, "responsive": True}
    return plotly.io.to_html(figure, include_plotlyjs=False, full_html=False, div_id=f"figure-{name}", config=config)


def escape(text):
    """Text for a plotly label, which would take some tags in it for its own; it reads no &quot;."""
    return html.escape(text, quote=False)


def source_colors(sources):
    return {source: COLORS[i % len(COLORS)] for i, source in enumerate(sorted(sources))}


def short(n):
    """12_345_678 -> "12.3 M"."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:.3g}"
