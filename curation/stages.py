"""The stages of a curation run, in order, and how each survives a kill at any moment.

    inputs      the list of files, fixed at the first start
    read        files -> documents, quality rules, fingerprints                (8 tasks a source)
    split       duplicates among all sources; which documents are held out     (1 task)
    tokenizer   trained on the training documents                              (1 task)
    pack        tokens, shards, held-out text, dropped documents               (1 task a source)
    tasks       evaluation items from the held-out text                        (1 task)
    publish     the manifest, then every part is renamed into its place

A stage works in `<out>/work/<stage>-<key>/`, where the key covers its settings, the code, the input list and the
stages before it, so nothing made from other settings is ever taken up. datatrove marks each finished task there, the
file `done` each finished stage; what a killed task had written is written again.
"""

import fcntl
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datatrove.pipeline.base import PipelineStep

from curation.recipe import RECIPES, Recipe, Settings, key_of
from curation.shards import FORMAT, MANIFEST, SPLITS, file_sha256, new_file, sync_folder, token_dtype
from curation.sources import list_inputs
from curation.steps import DecideFates, FateReader, Packer, TaskWriter, TrainTokenizer, read_jsonl, read_steps
from curation.tokenizer import FILE_NAME, load_tokenizer
from curation.workers import PoolPipelineExecutor, run_executors, worker_pool

READ_TASKS = 8  # for each source: fixed, because it decides which files a budget covers
PARTS = ("train", "heldout", "tasks", "dropped", FILE_NAME)  # of a data folder, beside the manifest
SETTINGS_FILE = "settings.json"  # in the work folder: says that the folder is ours
PACKAGES = ("datatrove", "sentencepiece", "numpy")


def build(settings: Settings, out: Path, n_workers: int) -> dict[str, Any]:
    """Make the data folder, or go on making it; returns its manifest. `out` is empty, or was begun by this."""
    recipe = RECIPES[settings.recipe]
    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    with only_writer(work), worker_pool(n_workers, work / "log.txt") as pool:
        with new_file(work / SETTINGS_FILE) as file:
            file.write(json.dumps(settings.resolved(), indent=1).encode())

        inputs = work / f"inputs-{settings.recipe}"
        list_files(recipe, inputs)
        resolved = settings.resolved()
        chosen = {name: resolved[name] for name in ("sources", "rules", "minhash")}
        lists = [file_sha256(inputs / f"{source.name}.json") for source in recipe.sources]
        read_key = key_of([chosen, code_version(), lists])
        split_key = key_of([read_key, settings.heldout_percent, recipe.min_heldout_documents])
        tokenizer_key = key_of([split_key, settings.vocab_size, recipe.tokenizer_sample_mb])
        final_key = key_of([tokenizer_key, recipe.shard_tokens, recipe.task_items])

        read = work / f"read-{read_key[:12]}"
        split = work / f"split-{split_key[:12]}"
        tokenizer = work / f"tokenizer-{tokenizer_key[:12]}"
        final = work / f"final-{final_key[:12]}"
        for other in set(work.glob("final-*")) - {final}:
            shutil.rmtree(other)  # made with other settings, and perhaps half published already

        fates = split / "fates.json"
        sources = [source.name for source in recipe.sources]

        def fate_reader() -> FateReader:
            return FateReader(sources, read, fates)

        if not (final / MANIFEST).exists():
            stage("read", read, pool, read_pipelines(settings, inputs, read), READ_TASKS, report_read)
            decide = DecideFates(recipe, settings.heldout_percent, read / "fingerprints", fates)
            stage("split", split, pool, {"all": [decide]}, 1, report_split)
            train = TrainTokenizer(settings.vocab_size, recipe.tokenizer_sample_mb * 1e6, tokenizer / FILE_NAME)
            stage("tokenizer", tokenizer, pool, {"all": [fate_reader(), train]}, 1, report_tokenizer)
            pack = Packer(tokenizer / FILE_NAME, recipe.shard_tokens, final)
            stage("pack", final / "pack", pool, {"all": [fate_reader(), pack]}, len(sources), report_pack)
            items = TaskWriter(recipe.task_items, final)
            stage("tasks", final / "items", pool, {"all": [items]}, 1, report_tasks)
            shutil.copyfile(tokenizer / FILE_NAME, final / FILE_NAME)
            manifest = make_manifest(settings, read, final)
            with new_file(final / MANIFEST) as file:
                file.write(json.dumps(manifest, indent=1).encode() + b"\n")
    return publish(final, out)


@contextmanager
def only_writer(work: Path) -> Iterator[None]:
    """Refuse a second run on the same folder while the first one lives."""
    with open(work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is making {work.parent}; wait for it or take another --out") from None
        yield


def code_version() -> str:
    """Changes with any line of this package and with the versions of what it stands on."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return key_of([hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest(), versions()])


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}


def say(label: str, text: str, started: float) -> None:
    print(f"{label:<10}{text:<88}{time.perf_counter() - started:>7.1f} s", flush=True)


def stage(
    label: str,
    folder: Path,
    pool: ProcessPoolExecutor,
    pipelines: dict[str, list[PipelineStep]],
    n_tasks: int,
    report: Callable[[Path], str],
) -> None:
    """Run pipelines, by name, unless this stage is done; report(folder) says in a line what came out."""
    started = time.perf_counter()
    done = folder / "done"
    if done.exists():
        say(label, done.read_text() + " (done before)", started)
        return
    executors = [
        PoolPipelineExecutor(pipeline, tasks=n_tasks, logging_dir=str(folder / "log" / name))
        for name, pipeline in pipelines.items()
    ]
    run_executors(pool, executors, label)
    summary = report(folder)
    with new_file(done) as file:
        file.write(summary.encode())
    say(label, summary, started)


# ---- the stages


def list_files(recipe: Recipe, inputs: Path) -> None:
    """Fix which files are read, a list for each source: a run that goes on after a kill must see the same ones."""
    started = time.perf_counter()
    n_files = []
    for source in recipe.sources:
        path = inputs / f"{source.name}.json"
        if not path.exists():
            with new_file(path) as file:
                listed = [(file.name, file.path, file.size_bytes) for file in list_inputs(source)]
                file.write(json.dumps(listed).encode())
        n_files.append(len(json.loads(path.read_bytes())))
        if not n_files[-1]:
            say("inputs", f"{source.name}: this machine has no {source.description}; going on without", started)
    say("inputs", f"{sum(n_files):,} files of {sum(map(bool, n_files))} sources", started)


def read_pipelines(settings: Settings, inputs: Path, out: Path) -> dict[str, list[PipelineStep]]:
    recipe = RECIPES[settings.recipe]
    return {
        source.name: read_steps(recipe, source, inputs / f"{source.name}.json", settings.budget_bytes(source), out)
        for source in recipe.sources
    }


def read_totals(read: Path, source: str) -> tuple[int, int]:
    """Documents and UTF-8 bytes that the source's reader made, from datatrove's statistics of each task."""
    documents = text_bytes = 0
    for path in (read / "log" / source / "stats").glob("*.json"):
        reader = json.loads(path.read_bytes())[0]["stats"]
        documents += stat_total(reader.get("documents", 0))
        text_bytes += stat_total(reader.get("text_bytes", 0))
    return documents, text_bytes


def stat_total(stat: Any) -> int:
    return int(stat["total"] if isinstance(stat, dict) else stat)


def report_read(read: Path) -> str:
    totals = [read_totals(read, path.name) for path in (read / "log").iterdir()]
    rules = {path.stem for path in read.glob("dropped/*/*/*.jsonl")}
    documents, text_bytes = map(sum, zip(*totals, strict=True))
    passed = sum(1 for path in read.glob("documents/*/*.jsonl") for _ in read_jsonl(path))
    return f"{documents:,} documents, {text_bytes / 1e6:.1f} MB; {passed:,} passed, {len(rules)} rules dropped some"


def report_split(split: Path) -> str:
    by_source = json.loads((split / "fates.json").read_bytes())
    fates = [entry["fate"] for entries in by_source.values() for entry in entries.values()]
    return (
        f"{fates.count('exact_duplicate'):,} exact and {fates.count('near_duplicate'):,} near duplicates dropped; "
        f"{fates.count('train'):,} documents to train, {fates.count('heldout'):,} held out"
    )


def report_tokenizer(folder: Path) -> str:
    return f"{load_tokenizer(folder).vocab_size:,} pieces"


def pack_counts(final: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_bytes()) for path in sorted((final / "counts").glob("*.json"))}


def report_pack(pack: Path) -> str:
    packed = pack_counts(pack.parent)
    tokens = {split: sum(p["counts"].get(split, {}).get("tokens", 0) for p in packed.values()) for split in SPLITS}
    n_shards = sum(len(shards) for p in packed.values() for shards in p["shards"].values())
    return f"{tokens['train']:,} tokens to train, {tokens['heldout']:,} held out, in {n_shards} shards"


def report_tasks(items: Path) -> str:
    counts = {path.stem: sum(1 for _ in read_jsonl(path)) for path in sorted((items.parent / "tasks").glob("*.jsonl"))}
    return ", ".join(f"{n:,} {name} items" for name, n in counts.items())


NOTHING = {"documents": 0, "tokens": 0, "text_bytes": 0}


def total(counts: Any) -> dict[str, int]:
    counts = list(counts)
    return {name: sum(count[name] for count in counts) for name in NOTHING}


def make_manifest(settings: Settings, read: Path, final: Path) -> dict[str, Any]:
    """Counts, settings and checksums of the finished parts in `final`."""
    packed = pack_counts(final)
    funnel = {}
    for source in RECIPES[settings.recipe].sources:
        counts = packed.get(source.name, {"counts": {}})["counts"]
        dropped = {rule: count for rule, count in sorted(counts.items()) if rule not in SPLITS}
        kept = {split: counts.get(split, NOTHING) for split in SPLITS}
        funnel[source.name] = {
            "kind": source.kind,
            "description": source.description,
            "read": total(counts.values()),
            "dropped": dropped,
            "kept": total(kept.values()),
            **kept,
        }
        # what the reader made was counted on its own: no document may be lost on the way
        counted = funnel[source.name]["read"]
        assert read_totals(read, source.name) == (counted["documents"], counted["text_bytes"]), source.name

    splits: dict[str, Any] = {}
    for split in SPLITS:
        sources = {}
        for source, entry in packed.items():
            if split in entry["counts"]:
                text = {"text": f"heldout/{source}.jsonl"} if split == "heldout" else {}
                sources[source] = entry["counts"][split] | {"shards": entry["shards"][split]} | text
        splits[split] = total(sources.values()) | {"sources": sources}

    tokenizer = load_tokenizer(final)
    files = {}
    for part in PARTS:
        (final / part).mkdir(exist_ok=True) if "." not in part else None
        paths = [final / part] if (final / part).is_file() else sorted((final / part).rglob("*"))
        for path in filter(Path.is_file, paths):
            name = path.relative_to(final).as_posix()
            files[name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    return {
        "format": FORMAT,
        "recipe": settings.recipe,
        "settings": settings.resolved(),
        "key": key_of(settings.resolved()),
        "created_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "tokenizer": {
            "file": FILE_NAME,
            "sha256": files[FILE_NAME]["sha256"],
            "vocab_size": tokenizer.vocab_size,
            "separator_id": tokenizer.separator_id,
        },
        "token_dtype": token_dtype(tokenizer.vocab_size).name,
        "splits": splits,
        "tasks": {
            name: {"file": f"tasks/{name}.jsonl", "items": sum(1 for _ in read_jsonl(final / f"tasks/{name}.jsonl"))}
            for name in ("continuation", "last_word")
        },
        "funnel": funnel,
        "files": files,
    }


def publish(final: Path, out: Path) -> dict[str, Any]:
    """Rename every part into its place, the manifest last, and remove the work folder; can be cut off and repeated."""
    manifest = json.loads((final / MANIFEST).read_bytes())
    for part in PARTS:
        made, place = final / part, out / part
        if made.exists():
            if place.is_dir():
                shutil.rmtree(place)
            os.rename(made, place)
    sync_folder(out)
    os.rename(final / MANIFEST, out / MANIFEST)
    sync_folder(out)
    shutil.rmtree(out / "work")
    return manifest
