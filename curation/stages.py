"""The stages of a curation run, in order; what is done is never done again, and what was cut off begins anew.

    read         a piece of files -> documents that passed the rules, fingerprints, ledger     (1 task a piece)
    duplicates   among all pieces; which documents are held out                                (1 task)
    tokenizer    trained on the training documents, where none is given                        (1 task)
    tokens       of the documents that stay                                                    (1 task a piece)
    mixture      how much of each source, and which documents go into which shard              (1 task)
    shards       gathered from the pieces in the order of a hash of the text                   (1 task a shard)
    texts        held-out text, evaluation items, what was dropped                             (1 task)
    publish      links all of it into the data folder, the manifest last

A task works in `<out>/work/<stage>/<key>/`, and the key covers its settings, its code and the keys of what it reads
(work.py): a changed option, or a file more or less, does again what it changes and nothing else. The final bytes
depend neither on the pieces and workers nor on what was killed on the way.
"""

import fcntl
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter

from curation.executors import Group, Share, Stage, run_local
from curation.filters import stock_of
from curation.inputs import inputs_key
from curation.recipe import RECIPES, Settings, rule_values, source_values
from curation.shards import (
    MANIFEST,
    SHARD,
    SPLITS,
    ShardHeader,
    file_entry,
    read_manifest,
    sync_folder,
    write_manifest,
)
from curation.sources import Piece, Source
from curation.steps import (
    EXAMPLE_CHARACTERS,
    FATES,
    ApplyRules,
    DecideFates,
    FateReader,
    Ledger,
    PieceReader,
    PieceWriter,
    PlanShards,
    ShardWriter,
    TextWriter,
    TokenWriter,
    TrainTokenizer,
    add_counts,
    read_json,
    read_packed,
)
from curation.stock import StockFates, StockTokenWriter
from curation.tokenizer import FILE_NAME, load_tokenizer
from curation.work import Task, code_version, key_of, task_folder, versions
from curation.workers import Worker

PARTS = ("train", "heldout", "tasks", "dropped")  # folders of a data folder, beside the tokenizer and the manifest
READING = (
    "readers",
    "sources",
    "hub",
    "local_text",
    "extract",
    "filters",
    "words",
    "decontaminate",
    "quality",
    "dedup",
)

NAMES = ("read", "duplicates", "tokenizer", "tokens", "mixture", "shards", "texts")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One recipe with its settings, the pieces of its input, and the folder where the work is done."""

    settings: Settings
    work: Path
    pieces: Mapping[str, tuple[Piece, ...]]  # by source, in the order of their priority

    @property
    def recipe(self) -> Any:
        return RECIPES[self.settings.recipe]

    @cached_property
    def sources(self) -> dict[str, Source]:
        return {source.name: source for source in self.settings.sources}

    def stock(self, step: str) -> str | None:
        """For keys: whose code datatrove's own step is and what is around it, None where ours runs."""
        return f"{versions()['datatrove']} {code_version('stock')}" if step in self.settings.stock else None

    # ---- the tasks; each stage may ask for the results of those before it

    @cached_property
    def read_tasks(self) -> dict[str, list[Task]]:
        """By source. What of a source decides its documents is in the key, and what does not (its budget) is not."""
        recipe, tasks = self.recipe, {}
        for name, pieces in self.pieces.items():
            source = self.sources[name]
            described = source_values(source)
            reading = [described[field] for field in ("kind", "text_columns", "id_column")]
            rules = [rule_values(rule) for rule in self.settings.rules(source)]
            m = recipe.minhash
            chosen = [name, reading, source.metadata_columns, rules, m.ngram_words, m.bands, m.rows]
            chosen += [recipe.keep_dropped, "filters" in self.settings.stock, code_version(*READING, "steps")]
            tasks[name] = [
                Task(
                    key=key_of([chosen, piece.key]),
                    size_bytes=piece.size_bytes,
                    values={"piece": piece.values(), "name": piece.name},
                )
                for piece in pieces
            ]
        return tasks

    @cached_property
    def duplicates_task(self) -> Task:
        pieces = [(source, task.key) for source, tasks in self.read_tasks.items() for task in tasks]
        chosen = [self.recipe.minhash.min_similarity, self.recipe.near_duplicates_across]
        chosen += [self.settings.heldout_percent, self.recipe.min_heldout_documents, self.stock("dedup")]
        key = key_of([pieces, chosen, code_version("dedup", "heldout", "steps")])
        size = sum(task.size_bytes for tasks in self.read_tasks.values() for task in tasks)
        return Task(key=key, size_bytes=size, values={"pieces": pieces})

    @cached_property
    def duplicates(self) -> dict[str, Any]:
        """Raises ValueError where nothing is left for the stages that follow."""
        summary: dict[str, Any] = read_json(
            task_folder(self.work, "duplicates", self.duplicates_task.key) / "summary.json"
        )
        if not any(entry["train"]["documents"] for entry in summary["sources"].values()):
            raise ValueError(self.why_nothing_is_left(summary["sources"]))
        return summary

    def why_nothing_is_left(self, fates: Mapping[str, Any]) -> str:
        """What became of all documents, and what the rule that dropped most found in the first of them."""
        read, dropped, examples = 0, Counter[str](), {}
        for ledger in chain.from_iterable(self.ledgers().values()):
            read += ledger["documents_in"]
            for rule, entry in ledger["dropped"].items():
                dropped[rule] += entry["documents"]
                examples[rule] = entry["examples"][0]
        most = dropped.most_common(3)
        counts = [f"{read:,} documents read", *(f"{n:,} dropped as {rule}" for rule, n in most)]
        if held := sum(entry["heldout"]["documents"] for entry in fates.values()):
            counts.append(f"{held:,} held out")
        if most:
            example = examples[most[0][0]]
            found = str(example.get("evidence", example["text"]))
            counts[1] += f" (such as {example['id']}: {' '.join(found.split())[:100]})"
        return (
            f"no text is left to train on: {', '.join(counts)}; "
            "mend the files (rows need a column `text`, JSON an object in each line) or add more"
        )

    @cached_property
    def tokenizer_task(self) -> Task:
        """The sample comes from as many pieces of each source as hold its share, in the order of their keys."""
        wanted = 4 * self.recipe.tokenizer_sample_mb * 1e6  # bytes of files, to be sure of enough text
        total = sum(task.size_bytes for tasks in self.read_tasks.values() for task in tasks)
        keys = []
        for tasks in self.read_tasks.values():
            room = wanted * sum(task.size_bytes for task in tasks) / max(total, 1)
            for task in sorted(tasks, key=lambda task: task.key):
                if room <= 0:
                    break
                keys.append(task.key)
                room -= task.size_bytes
        fates = [self.duplicates["fates"][key] for key in keys]
        chosen = [self.settings.vocab_size, self.recipe.tokenizer_sample_mb]
        chosen.append(code_version("tokenizer", "merges", "steps"))
        values = {"pieces": keys, "fates": self.duplicates_task.key}
        return Task(key=key_of([keys, fates, chosen]), size_bytes=0, values=values)

    @cached_property
    def tokenizer_file(self) -> Path:
        if self.settings.tokenizer is not None:
            return Path(self.settings.tokenizer).absolute()
        return task_folder(self.work, "tokenizer", self.tokenizer_task.key) / FILE_NAME

    @cached_property
    def header(self) -> ShardHeader:
        tokenizer = load_tokenizer(self.tokenizer_file)
        return ShardHeader(
            source="",
            split="",
            vocab_size=tokenizer.vocab_size,
            separator_id=tokenizer.separator_id,
            tokenizer_sha256=file_entry(self.tokenizer_file)["sha256"],
        )

    @cached_property
    def token_tasks(self) -> dict[str, list[Task]]:
        code = [code_version("tokenizer", "merges", "steps"), self.stock("tokenizer")]
        return {
            source: [
                Task(
                    key=key_of([read.key, self.duplicates["fates"][read.key], self.header.tokenizer_sha256, code]),
                    size_bytes=read.size_bytes,
                    values={"read": read.key, "fates": self.duplicates_task.key},
                )
                for read in tasks
            ]
            for source, tasks in self.read_tasks.items()
        }

    @cached_property
    def mixture_task(self) -> Task:
        sources = {
            name: [source.budget_tokens, source.max_epochs]
            for name, source in self.sources.items()
            if source.budget_tokens is not None
        }
        pieces = {source: [task.key for task in tasks] for source, tasks in self.token_tasks.items()}
        values = {"pieces": pieces, "budgets": sources, "on_short": self.recipe.on_short}
        key = key_of([values, self.recipe.shard_tokens, code_version("mixture", "steps")])
        return Task(key=key, size_bytes=0, values=values)

    @cached_property
    def mixture(self) -> dict[str, Any]:
        return read_json(task_folder(self.work, "mixture", self.mixture_task.key) / "mixture.json")

    @cached_property
    def shard_tasks(self) -> dict[tuple[str, str], list[Task]]:
        """By split and source. The keys of a source's shards change only with its own pieces and cut."""
        width = 4 if self.header.vocab_size > 1 << 16 else 2
        result = {}
        for split in SPLITS:
            for source, plan in self.mixture["sources"].items():
                keys = [task.key for task in self.token_tasks[source]]
                firsts = plan[split]["edges"]
                lasts = [first - 1 for first in firsts[1:]] + [plan[split]["last"]] * bool(firsts)
                size = plan[split]["tokens"] * width // max(len(firsts), 1)
                tasks = []
                for first, last in zip(firsts, lasts, strict=True):
                    values = {"source": source, "split": split, "pieces": keys, "from": first, "to": last}
                    key = key_of([values, vars(self.header), code_version("shards", "steps")])
                    tasks.append(Task(key=key, size_bytes=size, values=values))
                result[split, source] = tasks
        return result

    @cached_property
    def texts_task(self) -> Task:
        tokens = {source: [task.key for task in tasks] for source, tasks in self.token_tasks.items()}
        dropped = {source: [task.key for task in tasks] for source, tasks in self.read_tasks.items()}
        values = {
            "tokens": tokens,
            "dropped": dropped if self.recipe.keep_dropped else {},
            "fates": self.duplicates_task.key,
        }
        return Task(
            key=key_of([values, self.recipe.task_items, code_version("heldout", "steps")]), size_bytes=0, values=values
        )

    # ---- the stages

    def tasks(self, name: str) -> dict[str, list[Task]]:
        """The tasks of a stage, in groups that share a pipeline; the stages before it must be done."""
        match name:
            case "read":
                return self.read_tasks
            case "duplicates":
                return {"all": [self.duplicates_task]}
            case "tokenizer":
                return {"all": [self.tokenizer_task] if self.settings.tokenizer is None else []}
            case "tokens":
                return self.token_tasks
            case "mixture":
                return {"all": [self.mixture_task]}
            case "shards":
                return {"all": [task for of_source in self.shard_tasks.values() for task in of_source]}
            case "texts":
                return {"all": [self.texts_task]}
        raise ValueError(f"unknown stage {name!r}; allowed: {', '.join(NAMES)}")

    def pipeline(self, name: str, group: str, plan: Path) -> list[PipelineStep]:
        """The datatrove steps that do the tasks of a plan."""
        recipe, settings, work = self.recipe, self.settings, self.work
        match name:
            case "read":
                return self.read_pipeline(self.sources[group], plan)
            case "duplicates":
                decide = StockFates if "dedup" in settings.stock else DecideFates
                across, least = recipe.near_duplicates_across, recipe.min_heldout_documents
                sources = tuple(self.sources)
                return [decide(work, plan, recipe.minhash, across, settings.heldout_percent, least, sources)]
            case "tokenizer":
                return [TrainTokenizer(work, plan, settings.vocab_size, recipe.tokenizer_sample_mb * 1e6, FILE_NAME)]
            case "tokens":
                if "tokenizer" in settings.stock:
                    return [FateReader(work, plan), StockTokenWriter(work, plan, self.tokenizer_file, self.header)]
                return [FateReader(work, plan), TokenWriter(work, plan, self.tokenizer_file)]
            case "mixture":
                return [PlanShards(work, plan, recipe.shard_tokens)]
            case "shards":
                return [ShardWriter(work, plan, self.header)]
        return [TextWriter(work, plan, recipe.task_items, recipe.documents_for_items)]

    def stage(self, name: str) -> Stage:
        """The stage of this name; those before it must be done."""
        groups = [
            Group(name=group, tasks=tasks, pipeline=partial(self.pipeline, name, group))
            for group, tasks in self.tasks(name).items()
        ]
        return Stage(name=name, groups=groups)

    def read_pipeline(self, source: Source, plan: Path) -> list[PipelineStep]:
        ledger = Ledger(self.recipe.keep_dropped)
        rules = self.settings.rules(source)
        steps: list[PipelineStep] = [ApplyRules(rules, ledger)]
        if "filters" in self.settings.stock:  # each hands what it drops to the ledger, as ours do
            steps = [s if isinstance(s, PipelineStep) else ApplyRules((s,), ledger) for s in stock_of(rules)]
            for step in steps:
                if isinstance(step, BaseFilter):
                    step.exclusion_writer = ledger  # type: ignore[assignment]
        return [
            PieceReader(source, self.work, plan, ledger),
            *steps,
            PieceWriter(self.work, plan, self.recipe.minhash, ledger),
        ]

    # ---- what came out of a stage, in a line

    def report(self, name: str) -> str:
        if name == "read":
            ledgers = [ledger for of_source in self.ledgers().values() for ledger in of_source]
            documents = sum(ledger["documents_in"] for ledger in ledgers)
            n_bytes = sum(ledger["text_bytes_in"] for ledger in ledgers)
            passed = sum(ledger["kept"]["documents"] for ledger in ledgers)
            rules = {rule for ledger in ledgers for rule in ledger["dropped"]}
            return (
                f"{documents:,} documents, {n_bytes / 1e6:.1f} MB; {passed:,} passed, {len(rules)} rules dropped some"
            )
        if name == "duplicates":
            counts = {
                fate: sum(entry[fate]["documents"] for entry in self.duplicates["sources"].values()) for fate in FATES
            }
            return (
                f"{counts['exact_duplicate']:,} exact and {counts['near_duplicate']:,} near duplicates dropped; "
                f"{counts['train']:,} documents to train, {counts['heldout']:,} held out"
            )
        if name == "tokenizer":
            return f"{self.header.vocab_size:,} entries"
        if name == "texts":
            folder = task_folder(self.work, "texts", self.texts_task.key)
            counts = {path.stem: path.read_bytes().count(b"\n") for path in sorted((folder / "tasks").iterdir())}
            return ", ".join(f"{n:,} {kind} items" for kind, n in counts.items())
        if name == "tokens":
            return f"{sum(map(len, self.token_tasks.values())):,} pieces"
        if name == "mixture":
            n = len(self.mixture["messages"])
            return f"{n} messages, printed at the end" if n else "every source as its budget says"
        tokens = {s: sum(entry[s]["tokens"] for entry in self.mixture["sources"].values()) for s in SPLITS}
        n_shards = sum(map(len, self.shard_tasks.values()))
        return f"{tokens['train']:,} tokens to train, {tokens['heldout']:,} held out, in {n_shards} shards"

    def ledgers(self) -> dict[str, list[dict[str, Any]]]:
        return {
            source: [read_json(task_folder(self.work, "read", task.key) / "ledger.json") for task in tasks]
            for source, tasks in self.read_tasks.items()
        }


# ---- running


@contextmanager
def only_writer(work: Path) -> Iterator[None]:
    """Refuse a second run on the same folder while the first one lives; what it left half done goes."""
    with open(work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is making {work.parent}; wait for it or take another --out") from None
        remove_parts(work)
        yield
        remove_parts(work)  # of workers that died on the way


def remove_parts(work: Path) -> None:
    """What dead workers left half written."""
    for part in [*work.glob("*/*.gone"), *work.glob("*/*.part")]:
        # renamed first: a worker of a killed run, in its last moment, must not publish it half removed
        with suppress(FileNotFoundError):  # it has just been published
            shutil.rmtree(part.rename(part.with_suffix(".gone")), ignore_errors=True)


def say(label: str, text: str, started: float) -> None:
    print(f"{label:<11}{text:<88}{time.perf_counter() - started:>7.1f} s", flush=True)


def run_stage(run: Run, name: str, execute: Callable[[Stage], None]) -> None:
    """Do what is left of a stage and say in a line what came out."""
    started = time.perf_counter()
    stage = run.stage(name)
    left = stage.missing(run.work)
    if left:
        execute(stage)
    say(name, run.report(name) + ("" if left else " (done before)"), started)


def build(run: Run, out: Path, execute: Callable[[Stage], None]) -> dict[str, Any]:
    """Make the data folder, or go on making it; returns its manifest. `execute` runs the tasks of a stage."""
    started = time.perf_counter()
    n_pieces, n_bytes = sum(map(len, run.pieces.values())), sum(p.size_bytes for ps in run.pieces.values() for p in ps)
    for name in [name for name, pieces in run.pieces.items() if not pieces]:
        say("inputs", f"{name}: there is no {run.sources[name].description}; going on without", started)
    say("inputs", f"{n_bytes / 1e6:,.1f} MB of files in {n_pieces:,} pieces", started)
    for name in NAMES:
        run_stage(run, name, execute)
    return publish(run, out)


def run_share(run: Run, name: str, share: Share, workers: list[Worker]) -> None:
    """Do our share of one stage, as one of many hosts that see the same folder."""
    for before in NAMES[: NAMES.index(name)]:
        if left := run.stage(before).missing(run.work):
            raise ValueError(f"stage {before} has {left} tasks left; do them first: --stage {before} --share ...")
    started = time.perf_counter()
    run_local(run.stage(name), run.work, share, workers)
    say(name, f"share {share.index} of {share.of} is done", started)


def unused_folders(run: Run) -> list[Path]:
    """Finished tasks in the work folder that this run has no use for: of other settings, files or code."""
    used = {
        task_folder(run.work, name, task.key)
        for name in NAMES
        for of_group in run.tasks(name).values()
        for task in of_group
    }
    return [path for name in NAMES for path in sorted((run.work / name).glob("*")) if path not in used]


# ---- publishing

NOTHING = {"documents": 0, "tokens": 0, "text_bytes": 0}


def add(into: dict[str, int], more: Mapping[str, int]) -> None:
    for name in into:
        into[name] += more.get(name, 0)


def make_funnel(run: Run) -> dict[str, Any]:
    """What came in from each source, what each rule dropped, and what is left. Raises where it does not add up."""
    funnel = {}
    for name, ledgers in run.ledgers().items():
        source = run.sources[name]
        plan = run.mixture["sources"].get(name)
        dropped: dict[str, dict[str, Any]] = {}
        for ledger in ledgers:
            for rule, counts in ledger["dropped"].items():
                entry = dropped.setdefault(rule, {"documents": 0, "text_bytes": 0, "examples": []})
                add_counts(entry, counts)
                entry["examples"] = (entry["examples"] + counts["examples"])[:5]
        fates = run.duplicates["sources"][name]
        drops = [("exact_duplicate", fates["exact_duplicate"]), ("near_duplicate", fates["near_duplicate"])]
        for task in run.token_tasks[name]:
            drops += read_json(task_folder(run.work, "tokens", task.key) / "lost.json").items()
        drops.append(("over_budget", plan["over_budget"] if plan else NOTHING))
        for rule, counts in drops:
            if counts["documents"]:
                add_counts(dropped.setdefault(rule, {"documents": 0, "text_bytes": 0, "examples": []}), counts)
        splits = {split: dict(NOTHING) | ({k: plan[split][k] for k in NOTHING} if plan else {}) for split in SPLITS}
        kept = dict(NOTHING)
        for counts in splits.values():
            add(kept, counts)
        read = {
            "documents": sum(ledger["documents_in"] for ledger in ledgers),
            "text_bytes": sum(ledger["text_bytes_in"] for ledger in ledgers),
        }
        passed = sum(ledger["kept"]["text_bytes"] for ledger in ledgers)
        by_rules = sum(entry["text_bytes"] for ledger in ledgers for entry in ledger["dropped"].values())
        rewritten = read["text_bytes"] - passed - by_rules  # what rewrites took out of documents that stayed
        out = kept["documents"] + sum(entry["documents"] for entry in dropped.values())
        out_bytes = kept["text_bytes"] + sum(entry["text_bytes"] for entry in dropped.values()) + rewritten
        if (out, out_bytes) != (read["documents"], read["text_bytes"]):
            raise RuntimeError(
                f"the ledger of {name} does not add up: {read} came in, {out} and {out_bytes} bytes out"
            )
        funnel[name] = {
            "kind": source.kind,
            "description": source.description,
            "licence": source.licence,
            "read": read,
            "dropped": dict(sorted(dropped.items())),
            "removed_by_rewrites": {"text_bytes": rewritten},
            "kept": kept,
            **splits,
            "length_histogram": add_histograms(ledger["length_histogram"] for ledger in ledgers),
            "scores": add_scores(ledger["scores"] for ledger in ledgers),
        }
    return funnel


def add_histograms(histograms: Any) -> dict[str, int]:
    total: dict[str, int] = {}
    for histogram in histograms:
        for bucket, n in histogram.items():
            total[bucket] = total.get(bucket, 0) + n
    return dict(sorted(total.items(), key=lambda entry: int(entry[0])))


def add_scores(scores: Any) -> dict[str, list[int]]:
    total: dict[str, list[int]] = {}
    for entry in scores:
        for name, counts in entry.items():
            total[name] = [a + b for a, b in zip(total.get(name, [0] * len(counts)), counts, strict=True)]
    return total


def duplicate_examples(run: Run) -> list[dict[str, str]]:
    """A few near duplicates beside what stays for them, as text."""

    def document(place: list[Any]) -> dict[str, str]:
        key, number = place
        records = read_packed(task_folder(run.work, "read", key) / "documents.jsonl.zst")
        record: dict[str, str] = next(islice(records, number, None))
        return record

    examples = []
    for pair in run.duplicates["examples"]:
        kept, duplicate = document(pair["kept"]), document(pair["duplicate"])
        examples.append(
            {
                "kept_id": kept["id"],
                "duplicate_id": duplicate["id"],
                "kept_text": kept["text"][:EXAMPLE_CHARACTERS],
                "duplicate_text": duplicate["text"][:EXAMPLE_CHARACTERS],
            }
        )
    return examples


def contamination(run: Run, funnel: Mapping[str, Any]) -> dict[str, Any]:
    """Documents dropped for an evaluation item in them, by benchmark, and a few of them; {} where nobody looked."""
    if run.settings.decontaminate is None:
        return {}
    counts = [ledger["benchmarks"] for ledgers in run.ledgers().values() for ledger in ledgers]
    names = sorted({name for entry in counts for name in entry})
    examples = [e for entry in funnel.values() for e in entry["dropped"].get("contaminated", {}).get("examples", [])]
    return {"benchmarks": {name: sum(c.get(name, 0) for c in counts) for name in names}, "examples": examples}


def link(made: Path, place: Path) -> None:
    """The same file under another name; a copy where the file system has no links."""
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(made, place)
    except OSError:
        shutil.copyfile(made, place)


def publish(run: Run, out: Path) -> dict[str, Any]:
    """Put everything into the data folder, the manifest last; can be cut off and repeated."""
    final = run.work / "final"
    shutil.rmtree(final, ignore_errors=True)
    final.mkdir()
    files: dict[str, Any] = {}
    splits: dict[str, Any] = {}
    texts = task_folder(run.work, "texts", run.texts_task.key)
    for split in SPLITS:
        (final / split).mkdir()
        entries = {}
        for source, plan in run.mixture["sources"].items():
            if plan[split]["documents"]:
                names = []
                for i, task in enumerate(run.shard_tasks[split, source]):
                    name = f"{split}/{source}-{i:05d}{SHARD}"
                    folder = task_folder(run.work, "shards", task.key)
                    link(folder / f"shard{SHARD}", final / name)
                    files[name] = read_json(folder / "entry.json")
                    names.append(name)
                entries[source] = {k: plan[split][k] for k in NOTHING} | {"shards": names}
                if split == "heldout":
                    entries[source]["text"] = f"heldout/{source}.jsonl"
        totals = dict(NOTHING)
        for entry in entries.values():
            add(totals, entry)
        splits[split] = totals | {"sources": entries}
    for part in PARTS[1:]:
        (final / part).mkdir(exist_ok=True)
        for path in sorted((texts / part).rglob("*")):
            if path.is_file():
                name = path.relative_to(texts).as_posix()
                link(path, final / name)
                files[name] = file_entry(path)
    tokenizer_name = "tokenizer.json" if run.tokenizer_file.suffix == ".json" else FILE_NAME
    shutil.copyfile(run.tokenizer_file, final / tokenizer_name)
    files[tokenizer_name] = file_entry(final / tokenizer_name)

    summary = run.duplicates
    tasks = {}
    for name in ("continuation", "last_word"):
        items = (final / f"tasks/{name}.jsonl").read_bytes().count(b"\n")
        tasks[name] = {"file": f"tasks/{name}.jsonl", "items": items}
    funnel = make_funnel(run)
    content = {
        "recipe": run.settings.recipe,
        "settings": run.settings.resolved(),
        "key": inputs_key(run.settings, run.pieces),
        "created_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "tokenizer": {
            "file": tokenizer_name,
            "sha256": run.header.tokenizer_sha256,
            "vocab_size": run.header.vocab_size,
            "separator_id": run.header.separator_id,
        },
        "splits": splits,
        "tasks": tasks,
        "funnel": funnel,
        "duplicates": {
            "exact": sum(entry["exact_duplicate"]["documents"] for entry in summary["sources"].values()),
            "near": sum(entry["near_duplicate"]["documents"] for entry in summary["sources"].values()),
            "clusters": summary["clusters"],
            "examples": duplicate_examples(run),
        },
        "contamination": contamination(run, funnel),
        "licences": {name: source.licence for name, source in run.sources.items()},
        "mixture": run.mixture["mixture"],
        "messages": run.mixture["messages"],
    }
    (out / MANIFEST).unlink(missing_ok=True)  # from here on the folder is unfinished, until its manifest is back
    sync_folder(out)
    for name in ("tokenizer.json", FILE_NAME):
        (out / name).unlink(missing_ok=True)
    for part in PARTS:
        if (out / part).is_dir():
            shutil.rmtree(out / part)
        os.rename(final / part, out / part)
    os.rename(final / tokenizer_name, out / tokenizer_name)
    write_manifest(out, content, files)
    shutil.rmtree(final)
    return read_manifest(out)
