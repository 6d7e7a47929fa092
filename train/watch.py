"""Watch runs in a terminal, running or finished, any number side by side; reads their files alone and needs no torch.

python -m train.watch runs/demo runs/gated
python -m train.watch runs              every run below a folder
python -m train.watch runs/demo --once  print it once
"""

import argparse
import os
import select
import sys
import termios
import time
import tty
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from train.run_dir import RunDir, read_json
from train.tail import Tail, parse

REFRESH_S = 1
LOOK_AGAIN_S = 20  # for new runs and for checkpoints, which take more file operations than a tail
TAIL_BYTES = 1 << 20  # read at the start from the end of metrics.jsonl: some thousands of steps
MAX_POINTS = 512  # of a loss curve; when there are more, every other is left out
RECENT = 200  # rows that the time left is worked out from
SILENT_S = 30  # a run whose steps are short is called silent after that, others after SILENT_STEPS of their steps
SILENT_STEPS = 20
N_EVENTS, N_CHECKPOINTS = 5, 8
BARS = " ▁▂▃▄▅▆▇█"
ALWAYS = ("run", "state", "step", "loss")
LEFT_OUT_FIRST = ("power", "memory", "held-out", "tokens/s", "temp", "MFU")  # in a window that is too narrow for all
COLORS = {"running": "green", "finished": "cyan", "stopped": "yellow", "hung": "red", "silent": "red"}


class Curve:
    """Points (step, loss) of a run of any length, never more than MAX_POINTS."""

    def __init__(self):
        self.points, self.stride = [], 1

    def add(self, step, loss):
        while self.points and self.points[-1][0] >= step:  # the run went back to a checkpoint
            self.points.pop()
        if self.points and step - self.points[-1][0] < self.stride:
            return
        self.points.append((step, loss))
        if len(self.points) > MAX_POINTS:
            self.points = self.points[::2]
            self.stride = max(2 * self.stride, (step - self.points[0][0]) // MAX_POINTS)


class Rows:
    """metrics.jsonl: the last rows, the last that was measured on held-out text, and the loss curve.

    The file is never read whole: at first its last TAIL_BYTES and single lines spread over the rest, then what is new.
    """

    def __init__(self, path):
        self.path, self.tail = path, None

    def refresh(self):
        if self.tail and self.tail.replaced:
            self.tail.close()
            self.tail = None
        if self.tail is None:
            self.recent, self.heldout, self.curve = [], None, Curve()
            try:
                self._open()
            except FileNotFoundError:  # a run that has made no step
                return
        for row in self.tail.rows():
            self._take(row)

    def _open(self):
        with open(self.path, "rb") as file:
            begin = max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES)
            for i in range(MAX_POINTS // 2 if begin else 0):
                file.seek(i * begin // (MAX_POINTS // 2))
                file.readline()  # the rest of a line
                self._take(parse(file.readline()))
            file.seek(begin)
            if begin:
                file.readline()
            start = file.tell()
        self.tail = Tail(self.path, start)

    def _take(self, row):
        if not row or not isinstance(row.get("step"), int) or not isinstance(row.get("loss"), int | float):
            return
        while self.recent and self.recent[-1]["step"] >= row["step"]:  # the run went back to a checkpoint
            self.recent.pop()
        self.recent.append(row)
        del self.recent[:-RECENT]
        self.curve.add(row["step"], row["loss"])
        if "heldout_loss" in row:
            self.heldout = row

    @property
    def last(self):
        return self.recent[-1] if self.recent else {}

    @property
    def seconds_per_step(self):
        """Of the recent rows, saves and measurements included; None before there are two of one start."""
        rows = [row for row in self.recent if "seconds" in row]
        starts = [i for i in range(1, len(rows)) if rows[i]["seconds"] < rows[i - 1]["seconds"]]
        rows = rows[starts[-1] :] if starts else rows
        steps = rows[-1]["step"] - rows[0]["step"] if len(rows) > 1 else 0
        return (rows[-1]["seconds"] - rows[0]["seconds"]) / steps if steps else None


class Events:
    """The last events of events.jsonl, which is small; a run made before there was one has none."""

    def __init__(self, path):
        self.path, self.tail, self.last = path, None, []

    def refresh(self):
        if self.tail is None or self.tail.replaced:
            try:
                self.tail, self.last = Tail(self.path), []
            except FileNotFoundError:
                return
        self.last = [*self.last, *(row for row in self.tail.rows() if {"time", "event", "text"} <= row.keys())][-50:]


class Run:
    """One run's folder, as it is now."""

    def __init__(self, path, name):
        """name: what it is called on the screen."""
        self.dir, self.name = RunDir(path), name
        self.rows, self.events = Rows(self.dir.metrics), Events(self.dir.events)
        self.checkpoints, self.looked = [], -LOOK_AGAIN_S

    def refresh(self):
        self.config = read_json(self.dir.config)  # a run that goes on may have another last step
        self.rows.refresh()
        self.events.refresh()
        if time.monotonic() - self.looked >= LOOK_AGAIN_S:
            self.checkpoints, self.looked = read_checkpoints(self.dir), time.monotonic()

    @property
    def steps(self):
        return self.config.get("plan", {}).get("steps")

    @property
    def last_step(self):
        return self.config.get("plan", {}).get("last_step")

    @property
    def silent_s(self):
        """Seconds since the run last wrote something; None if it never did."""
        times = [path.stat().st_mtime for path in (self.dir.metrics, self.dir.events) if path.exists()]
        return max(0.0, time.time() - max(times)) if times else None

    @property
    def state(self):
        """(one of COLORS, text)"""
        step, last_event = self.rows.last.get("step", 0), self.events.last[-1] if self.events.last else {}
        if last_event.get("event") == "finished" or (not last_event and self.steps and step >= self.steps):
            return "finished", "finished"
        if last_event.get("event") == "stop" or (not last_event and self.last_step and step >= self.last_step):
            return "stopped", "stopped"
        if last_event.get("event") == "hang" and self.dir.metrics.stat().st_mtime < last_event["time"]:
            return "hung", "hung"
        silent = self.silent_s
        if silent is None:
            return "silent", "no step yet"
        if silent > max(SILENT_S, SILENT_STEPS * (self.rows.seconds_per_step or 0)):
            return "silent", f"silent since {duration(silent)}"
        return "running", "running"

    @property
    def left_s(self):
        """Seconds to the last step at the recent speed; None where that is not known."""
        each, step = self.rows.seconds_per_step, self.rows.last.get("step")
        return each * (self.last_step - step) if each and self.last_step and self.state[0] == "running" else None


def read_checkpoints(run_dir):
    """[(name, bytes, what it is, whether it is the best)], oldest first; unfinished ones last.

    Files are compared with the manifest by name and size, not by content.
    """
    best = None
    if run_dir.best.is_file():
        with suppress(ValueError):
            best = read_json(run_dir.best).get("checkpoint")
    rows = [(path.name, *look_at(path), path.name == best) for path in run_dir.checkpoints()]
    for path in sorted((run_dir.path / "checkpoints").glob("*.part")):
        rows.append((path.name.removesuffix(".part"), folder_bytes(path), "unfinished", False))
    return rows


def look_at(checkpoint):
    """(bytes, "whole" or what is wrong) of a checkpoint's folder."""
    manifest = checkpoint / "checkpoint.json"
    try:
        files = {name: entry["bytes"] for name, entry in read_json(manifest)["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return folder_bytes(checkpoint), f"damaged: {manifest.name}"
    for name, expected in files.items():
        try:
            if (checkpoint / name).stat().st_size != expected:
                return folder_bytes(checkpoint), f"damaged: {name} is cut short or too long"
        except OSError:
            return folder_bytes(checkpoint), f"damaged: {name} is missing"
    return sum(files.values()), "whole"


def folder_bytes(folder):
    total = 0
    for path in folder.glob("*"):
        try:
            total += path.stat().st_size
        except OSError:  # being renamed or deleted right now
            continue
    return total


def find_runs(paths):
    """{folder: short name} of the runs among `paths` and below them. FileNotFoundError where there is none."""
    found = []
    for path in paths:
        runs = list(runs_below(path))
        if not runs:
            problem = "is not a run, and there is none below it" if path.is_dir() else "does not exist"
            raise FileNotFoundError(f"{path} {problem}; give a run's folder such as runs/demo, or a folder of runs")
        found += runs
    above = Path(os.path.commonpath([run.resolve().parent for run in found]))
    return {run: str(run.resolve().relative_to(above)) for run in found}


def runs_below(path):
    for folder, names, files in os.walk(path):
        names.sort()
        if "config.json" in files and is_run(Path(folder)):
            names.clear()  # nothing in a run is a run
            yield Path(folder)


def is_run(folder):
    """Other folders have a config.json too: exported models."""
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and {"run", "model"} <= config.keys()


def draw(runs, height, width):
    """What is shown of runs: a table of all, then of each its curve, checkpoints and events, as far as there is room.

    height, width: of the terminal, in characters; height None: as much as there is.
    """
    parts = [table_of(runs, width)]
    used = 4 + len(runs)
    for run in runs:
        details = details_of(run, width, 6 if len(runs) == 1 else 1)
        used += 1 + len(details)
        if height is not None and used > height:
            parts.append(Text(f"… more of {run.name} in a taller window, or with --once", style="dim"))
            break
        parts += [Text(""), *(Text(line, no_wrap=True) for line in details)]
    return Group(*parts)


def table_of(runs, width):
    """A line a run, of the columns that there is something to say in and room for."""
    columns = {
        "run": [run.name for run in runs],
        "state": [run.state[1] for run in runs],
        "step": [shown(run.rows.last.get("step", 0), ",") + shown(run.steps, ",", before="/") for run in runs],
        "loss": [shown(run.rows.last.get("loss"), ".4f") for run in runs],
        "held-out": [shown((run.rows.heldout or {}).get("heldout_loss"), ".4f") for run in runs],
        "tokens/s": [shown(run.rows.last.get("tokens_per_s"), ",.0f") for run in runs],
        "MFU": [shown(run.rows.last.get("mfu"), ".1%") for run in runs],
        "memory": [shown(run.rows.last.get("memory_gib"), ".1f", " GiB") for run in runs],
        "temp": [shown(run.rows.last.get("gpu_temperature_c"), "", " °C") for run in runs],
        "power": [shown(run.rows.last.get("gpu_power_w"), ",", " W") for run in runs],
        "left": ["" if run.left_s is None else duration(run.left_s) for run in runs],
    }
    columns = {name: cells for name, cells in columns.items() if name in ALWAYS or any(cells)}
    for name in LEFT_OUT_FIRST:
        if row_width(columns) > width:
            columns.pop(name, None)
    event_width = width - row_width(columns) - 3
    if event_width >= 20:
        last = [event_line(run.events.last[-1]) if run.events.last else "" for run in runs]
        columns["last event"] = [line[:event_width] for line in last]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        left = name in ("run", "state", "last event")
        table.add_column(name, justify="left" if left else "right", no_wrap=True, overflow="ellipsis")
    for i, run in enumerate(runs):
        styles = {"state": COLORS[run.state[0]]}
        table.add_row(*(Text(cells[i] or "-", style=styles.get(name, "")) for name, cells in columns.items()))
    return table


def row_width(columns):
    """Characters that a table of these columns takes."""
    return sum(max(map(len, [name, *cells])) + 3 for name, cells in columns.items())


def details_of(run, width, n_rows):
    """Lines of text about one run."""
    low, high, lines = bars(run.rows.curve.points, max(width - 22, 10), n_rows)
    found = [run.name]
    if lines:
        margins = [f"loss {high:.3f}", *[""] * (n_rows - 2), f"{low:.3f}"] if n_rows > 1 else [f"loss {low:.3f}"]
        found += [f"{margin:>13} {line}" for margin, line in zip(margins, lines, strict=True)]
    measured = run.rows.heldout or {}
    if measured.get("eval"):
        scores = [f"{name} {score['acc']:.0%}" for name, score in measured["eval"].items()]
        found.append(f"  step {measured['step']:,}: {', '.join(scores)}"[: width - 1])
    for name, n_bytes, what, best in run.checkpoints[-N_CHECKPOINTS:]:
        found.append(f"  {name:<14} {size(n_bytes):>10}  {what}{', best held-out loss' if best else ''}")
    older = len(run.checkpoints) - N_CHECKPOINTS
    found += [f"  and {older} older checkpoints"] if older > 0 else []
    found += ["  no checkpoint yet"] if not run.checkpoints else []
    found += [f"  {event_line(event)}"[: width - 1] for event in run.events.last[-N_EVENTS:]]
    return found


def bars(points, width, n_rows):
    """A curve as bars: (lowest, highest value, n_rows lines of width characters, the highest row first).

    points: [(step, value)]. The first losses of a run would press the rest flat: values above the highest of its last
    nine tenths are cut off.
    """
    points = [(step, value) for step, value in points if value == value and abs(value) != float("inf")]
    if len(points) < 2:
        return 0.0, 0.0, []
    first, last = points[0][0], points[-1][0]
    width = min(width, len(points))
    cells: list[list[float]] = [[] for _ in range(width)]
    for step, value in points:
        cells[min(width - 1, (step - first) * width // (last - first))].append(value)
    means = [sum(cell) / len(cell) if cell else None for cell in cells]
    low = min(mean for mean in means if mean is not None)
    high = max(value for step, value in points if step >= first + (last - first) / 10)
    eighths = [
        0 if mean is None else 1 + round((min(mean, high) - low) / ((high - low) or 1) * (8 * n_rows - 1))
        for mean in means
    ]
    lines = [
        "".join(BARS[min(8, max(0, eighth - 8 * row))] for eighth in eighths) for row in range(n_rows - 1, -1, -1)
    ]
    return low, high, lines


def event_line(event):
    stamp = time.strftime(
        "%H:%M:%S" if time.time() - event["time"] < 86400 else "%m-%d %H:%M", time.localtime(event["time"])
    )
    return f"{stamp} {event['event']}: {' '.join(str(event['text']).split())}"


def shown(value, form, unit="", before=""):
    """The value as text, or nothing for one that is not there."""
    return "" if value is None else f"{before}{value:{form}}{unit}"


def duration(seconds):
    """75 -> 0:01:15"""
    return str(timedelta(seconds=round(seconds)))


def size(n_bytes):
    return f"{n_bytes / 2**30:,.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:,.1f} MiB"


@contextmanager
def keys():
    """A function that waits some seconds for a key and returns it, or "" without one."""
    if not sys.stdin.isatty():
        yield lambda seconds: time.sleep(seconds) or ""
        return
    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield lambda seconds: os.read(sys.stdin.fileno(), 1).decode(errors="replace") if wait_for_key(seconds) else ""
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def wait_for_key(seconds):
    return bool(select.select([sys.stdin], [], [], seconds)[0])


def watch(paths, console):
    """Show the runs until q or Ctrl-C."""
    runs: dict[Path, Run] = {}
    looked = -LOOK_AGAIN_S
    with keys() as key, Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            if time.monotonic() - looked >= LOOK_AGAIN_S:
                runs = {path: runs.get(path) or Run(path, name) for path, name in find_runs(paths).items()}
                looked = time.monotonic()
            for run in runs.values():
                run.refresh()
            live.update(draw(list(runs.values()), console.height, console.width), refresh=True)
            if key(REFRESH_S) in ("q", "Q"):
                return


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m train.watch", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="a run's folder, or a folder with runs below"
    )
    parser.add_argument("--once", action="store_true", help="print what there is and leave, as without a terminal")
    flags = parser.parse_args(argv)
    console = Console()
    try:
        if flags.once or not console.is_terminal:
            if not console.is_terminal:
                console = Console(width=160)
            runs = [Run(path, name) for path, name in find_runs(flags.runs).items()]
            for run in runs:
                run.refresh()
            console.print(draw(runs, None, console.width))
        else:
            watch(flags.runs, console)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
