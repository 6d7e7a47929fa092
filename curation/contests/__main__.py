"""Every step of the pipeline against the field's own tools, on the same real text, in the same run.

    make bench-curation CORPUS=../shared/data/corpus                 # or: python -m curation.contests --corpus DIR
    python -m curation.contests --corpus DIR --only filters dedup

CORPUS holds one folder of .jsonl.zst files for each kind of text. Peers: datatrove's steps (requirements-dev.txt has
what they need), and dolma where .venv-dolma has it. A contest whose target was missed says so.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from curation.contests.measure import Contest

CONTESTS = ("readers", "filters", "quality", "dedup", "decontaminate", "tokenizer", "stages", "scale")


def shown(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def print_contests(name: str, contests: list[Contest], seconds: float) -> None:
    table = Table(box=box.SIMPLE_HEAD, title=f"{name} ({seconds:.0f} s)", title_justify="left")
    for column in ("step", "metric", "ours", "theirs", "ratio", "peer", "target", "reached", "note"):
        table.add_column(column, justify="right" if column in ("ours", "theirs", "ratio") else "left", overflow="fold")
    for c in contests:
        ratio = f"{c.ours / c.theirs:.2f}" if c.theirs else ""
        reached = "yes" if c.reached else "NO"
        table.add_row(c.step, c.metric, shown(c.ours), shown(c.theirs), ratio, c.peer, c.target, reached, c.note)
    Console(width=None if sys.stdout.isatty() else 180).print(table)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m curation.contests",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--corpus", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--only", nargs="+", default=CONTESTS, choices=CONTESTS, metavar="NAME", help=", ".join(CONTESTS)
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    flags = parser.parse_args(argv)
    if not list(flags.corpus.glob("*/*.jsonl.zst")):
        print(f"error: --corpus {flags.corpus} has no <kind>/*.jsonl.zst in it", file=sys.stderr)
        return 2
    rows: dict[str, list[dict[str, object]]] = {}
    missed = 0
    for name in flags.only:
        started = time.perf_counter()
        contests = import_module(f"curation.contests.{name}").contests(flags.corpus)
        print_contests(name, contests, time.perf_counter() - started)
        rows[name] = [asdict(contest) for contest in contests]
        missed += sum(not contest.reached for contest in contests)
    if flags.json is not None:
        flags.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{sum(map(len, rows.values()))} contests, {missed} targets missed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
