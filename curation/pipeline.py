"""Make a data folder: read a recipe's sources, filter, deduplicate, hold out, tokenize, pack, verify.

    python -m curation.pipeline --recipe local --out data/local

Running it again does nothing when the folder is complete, and goes on where it was when it was stopped.
"""

import argparse
import errno
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from curation.recipe import RECIPES, Settings, key_of
from curation.shards import MANIFEST, read_manifest


def curate(settings: Settings, out: Path, n_workers: int) -> None:
    """Make the data folder `out`, go on making it, or say that it is complete.

    Raises ValueError when it was made with other settings, or is something else.
    """
    if (out / MANIFEST).exists():
        manifest = read_manifest(out)
        refuse_other_settings(manifest, settings, out)
        shutil.rmtree(out / "work", ignore_errors=True)  # a kill may have left some of it
        train = manifest["splits"]["train"]
        made = f"{train['tokens']:,} training tokens of {train['documents']:,} documents, {manifest['created_utc']}"
        print(f"{out} is complete ({made}); nothing to do")
        return
    refuse_foreign_folder(out)
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs the network, so nothing may wait for it
    from curation.stages import build  # datatrove and the rest load only when there is work

    print_funnel(build(settings, out, n_workers))
    print(f"{out} is complete; check it with: python -m curation.shards verify {out}")


def refuse_other_settings(manifest: dict[str, Any], settings: Settings, out: Path) -> None:
    resolved = settings.resolved()
    if manifest.get("key") == key_of(resolved):
        return
    there, asked = flat(manifest.get("settings", {})), flat(resolved)
    differences = [name for name in asked | there if there.get(name) != asked.get(name)]
    shown = "; ".join(f"{name} is {there.get(name)} there, now {asked.get(name)}" for name in differences[:3])
    more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
    raise ValueError(f"{out} was made with other settings ({shown}{more}); choose another --out, or remove the folder")


def flat(values: Any, prefix: str = "") -> dict[str, str]:
    """Nested JSON values by dotted names."""
    if isinstance(values, dict):
        return {k: v for name, value in values.items() for k, v in flat(value, f"{prefix}.{name}").items()}
    return {prefix.lstrip("."): json.dumps(values)}


def refuse_foreign_folder(out: Path) -> None:
    """A folder with something in it is ours only if its work folder says so: parts of it will be replaced."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a new or empty folder")
    others = {path.name for path in out.iterdir()} - {"work"} if out.exists() else set()
    if others and not (out / "work/settings.json").is_file():
        raise ValueError(f"--out {out} holds other things ({min(others)}, ...); give a new or empty folder")


def print_funnel(manifest: dict[str, Any]) -> None:
    """What came in from each source, what each rule dropped, and what came out."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 110)
    funnel = manifest["funnel"]
    columns = [("read", "documents"), ("read", "tokens"), ("kept", "documents"), ("heldout", "documents")]
    columns += [("heldout", "tokens"), ("train", "documents"), ("train", "tokens")]
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("source", no_wrap=True)
    for part, unit in columns:
        table.add_column(f"{part}\n{unit}", justify="right")
    for name, entry in funnel.items():
        table.add_row(name, *[f"{entry[part][unit]:,}" for part, unit in columns])
    totals = [sum(entry[part][unit] for entry in funnel.values()) for part, unit in columns]
    table.add_section()
    table.add_row("all", *[f"{n:,}" for n in totals], style="bold")
    console.print(table)

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("dropped by rule", no_wrap=True)
    table.add_column("documents", justify="right")
    table.add_column("tokens", justify="right")
    table.add_column("of (documents)")
    counts = {rule: {} for entry in funnel.values() for rule in entry["dropped"]}
    for name, entry in funnel.items():
        for rule, count in entry["dropped"].items():
            counts[rule][name] = count
    for rule, by_source in sorted(counts.items(), key=lambda item: -sum(c["tokens"] for c in item[1].values())):
        documents, tokens = (sum(count[unit] for count in by_source.values()) for unit in ("documents", "tokens"))
        shares = ", ".join(f"{name} {count['documents']:,}" for name, count in by_source.items())
        table.add_row(rule, f"{documents:,}", f"{tokens:,}", shares)
    console.print(table)

    train, heldout = manifest["splits"]["train"], manifest["splits"]["heldout"]
    items = ", ".join(f"{task['items']} {name}" for name, task in manifest["tasks"].items())
    print(
        f"train: {train['tokens']:,} tokens, {train['text_bytes'] / 1e6:.1f} MB, "
        f"{train['text_bytes'] / train['tokens']:.2f} bytes a token; held out: {heldout['tokens']:,} tokens; "
        f"evaluation items: {items}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m curation.pipeline",
        description="Make a data folder: token shards, held-out text, evaluation items and a manifest.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", default="local", help=f"which sources and rules: {', '.join(RECIPES)}")
    parser.add_argument("--out", type=Path, default=Path("data/local"), help="the data folder to make")
    parser.add_argument(
        "--limit-mb", type=float, help="read about so much text of each source at most; None: as the recipe says"
    )
    parser.add_argument("--vocab-size", type=int, default=4096, help="pieces of the tokenizer")
    parser.add_argument("--heldout-percent", type=float, default=3.0, help="share of the documents to hold out")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes; the result does not depend on it"
    )
    flags = parser.parse_args(argv)
    try:
        if flags.workers < 1:
            raise ValueError(f"--workers {flags.workers} is not a number of processes; give 1 or more")
        settings = Settings(
            recipe=flags.recipe,
            limit_mb=flags.limit_mb,
            vocab_size=flags.vocab_size,
            heldout_percent=flags.heldout_percent,
        )
        curate(settings, flags.out, flags.workers)
    except (ValueError, OSError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC
        hint = f"; make room for {flags.out} and run the same command to go on" if full else ""
        print(f"error: {error}{hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
