"""What a run will read, make and need: files, text, tokens, disk, memory and time. Starts nothing and writes nothing.

    python -m curation.pipeline --recipe eight --plan

Files are listed where they can be: on this machine, in a mirror, on the Hub. Where the Hub does not answer, a source
counts as large as it was published. The times are those of RATES on cores that have nothing else to do, tasks longest
first, stage after stage; no step has more than the network and disks of HOST to draw on.
"""

import heapq
import math
import socket
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

from curation.decontaminate import Decontaminate
from curation.mixture import Mixture, plan_mixture
from curation.quality import Quality
from curation.recipe import RECIPES, Settings
from curation.shards import token_dtype
from curation.sources import InputFile, Source, choose_files, is_packed, is_rows, list_files, make_pieces, suffix_of

GB = 1e9
MB = 1e6

# ---- what was measured

# MB in a CPU second of one core: of text, of files in `tables` and `hash`, of tokens in `gather`. Measured with
# `python -m curation.contests.rates` on a busy virtual machine (November 2026); its output replaces these lines.
RATES = {
    "read .parquet": 495,
    "read .jsonl": 457,
    "read .jsonl.gz": 183,
    "read .jsonl.zst": 329,
    "extract": 2.3,
    "rules of code": 20.9,
    "rules of prose": 11.7,
    "rules of clean_web": 10.2,
    "rules of web": 2.71,
    "rules of long": 4.51,
    "rules of wiki": 9.27,
    "rules of qa": 2.02,
    "rules of math": 2.09,
    "rules of questions": 367,
    "rules of synthetic": 383,
    "rules of own": 385,
    "decontaminate": 32.4,
    "quality": 8.91,
    "fingerprint": 22.2,
    "pack": 129,
    "unpack": 275,
    "train tokenizer": 5.31,
    "tokenize by a tokenizer.model": 21.6,
    "tokenize by a tokenizer.json": 15.7,
    "gather": 1430,
    "tables": 1670,
    "hash": 1510,
}  # fmt: skip

# Documents in a CPU second, and bytes of memory for each: python -m curation.contests --corpus DIR --only scale
DUPLICATES_PER_S = 500_000
DUPLICATES_BYTES = 150
MIXTURE_PER_S = 3_000_000
MIXTURE_BYTES = 80
PACKED = 0.31  # bytes of documents.jsonl.zst for a byte of text
PRINT_BYTES = 16 + 16 + 16 + 8 + 14 * 8  # a document's ids, digests, sketches, size and keys
FATE_BYTES = 1 + 16
TABLE_BYTES = 1 + 8 + 16 + 8 + 8 + 8  # a document's row in the table of a piece's tokens
SHARD_BYTES = 16 + 8  # a document's row in a shard
WORKER_MB = 300  # of memory at the peak: a process with the rules of `web`; one of the stage tokens has 220
TRAINER_BYTES = 12  # of memory for a byte of the text that a tokenizer is trained on, from 40 MB of it


# ---- what was published


@dataclass(frozen=True, kw_only=True)
class Published:
    """A whole source by its card, or (about) by what is known of its like; for when its files cannot be listed."""

    files: int
    tokens: float
    documents: float


PUBLISHED = {
    "web_edu": Published(files=140, tokens=100e9, documents=97e6),
    "web": Published(files=100, tokens=114.7e9, documents=89.5e6),
    "books": Published(files=150, tokens=136e9, documents=23e6),  # about so many files
    "wiki": Published(files=15, tokens=3.5e9, documents=6.6e6),  # about
    "science": Published(files=91, tokens=43.3e9, documents=6.1e6),
    "qa": Published(files=50, tokens=23.9e9, documents=31e6),  # about so many files
    "code": Published(files=95, tokens=67.8e9, documents=69e6),
    "math": Published(files=128, tokens=34e9, documents=21.4e6),
    "fineweb": Published(files=150, tokens=100e9, documents=145e6),  # about
    "cosmopedia": Published(files=104, tokens=28e9, documents=39e6),
    "medqa": Published(files=1, tokens=3e6, documents=10_178),
    "alpaca": Published(files=1, tokens=9e6, documents=52_002),
}
DOCUMENT_BYTES = 4000  # of text in a document of other sources


# ---- what is assumed


@dataclass(frozen=True, kw_only=True)
class Host:
    """Machines that the work is spread over: more cores than one has come as several, with a file system for all."""

    cores: int = 32
    network_mb_s: float = 1000  # from the Hub or what is nearer, of each host
    disk_mb_s: float = 1500  # read or written, of each host


HOST = Host()
CORES = (1, 32, 512)  # to simulate, beside the workers that were asked for
MARKS = {"longest task": " *", "network": " n", "disk": " d"}  # behind the time of a stage that they bound


# ---- what there is to read


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What one source is expected to give."""

    source: Source
    listed: bool  # its files were, else it counts as published
    files: int
    file_bytes: float  # as much of the files as is taken
    hash_bytes: float  # of files of this machine, whose sha256 is not known
    pieces: tuple[float, ...]  # bytes to read for each task
    read: str  # which of RATES

    @property
    def read_bytes(self) -> float:
        return sum(self.pieces)

    @property
    def text_bytes(self) -> float:
        return self.file_bytes * self.source.text_per_byte

    @property
    def documents(self) -> float:
        of_all = PUBLISHED.get(self.source.name)
        size = of_all.tokens * self.source.bytes_per_token / of_all.documents if of_all else DOCUMENT_BYTES
        return self.text_bytes / size

    @property
    def tokens(self) -> float:
        """Of documents that pass the rules and are no duplicates."""
        return self.text_bytes * self.source.kept / self.source.bytes_per_token

    @property
    def texts(self) -> list[float]:
        """Bytes of text in each piece."""
        return [self.text_bytes * piece / max(self.read_bytes, 1) for piece in self.pieces]


def expect(settings: Settings, mirror: Path | None) -> list[Expected]:
    """What each source has, from its files where they can be listed; raises as list_files does where they must be."""
    answers = None
    found = []
    for source in settings.sources:
        on_hub = source.repo is not None and mirror is None
        if on_hub and answers is None:
            answers = hub_answers()
        files = None
        if not on_hub:
            files = list_files(source, mirror)
        elif answers and not source.refused:
            try:
                files = list_files(source)
            except ConnectionError:
                answers = False
        piece_bytes = int(RECIPES[settings.recipe].piece_mb * MB)
        found.append(published(source, piece_bytes) if files is None else listed(source, files, piece_bytes, on_hub))
    return found


def hub_answers() -> bool:
    """Whether anybody is there: a listing is asked for again and again for half a minute before it gives up."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():
        return True
    address = urlparse(constants.ENDPOINT)
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=5).close()
    except OSError:
        return False
    return True


def listed(source: Source, files: Sequence[InputFile], piece_bytes: int, on_hub: bool) -> Expected:
    """By the files that a run would choose. On the Hub nothing is opened: parquet counts as cut anywhere."""
    chosen = choose_files(source, files)
    sizes = [file.size_bytes if file.take_bytes is None else min(file.size_bytes, file.take_bytes) for file in chosen]
    if on_hub:
        pieces = cut_sizes(source, sizes, piece_bytes)
    else:
        pieces = [float(piece.size_bytes) for piece in make_pieces(source, chosen, piece_bytes)] if chosen else []
    return Expected(
        source=source,
        listed=True,
        files=len(chosen),
        file_bytes=sum(sizes),
        hash_bytes=sum(file.size_bytes for file in chosen if not file.digest),
        pieces=tuple(pieces),
        read=read_rate(source, chosen[0].name if chosen else ""),
    )


def published(source: Source, piece_bytes: int) -> Expected:
    if source.refused:
        raise ValueError(f"source {source.name}: {source.refused}")
    of_all = PUBLISHED[source.name]
    total = of_all.tokens * source.bytes_per_token / source.text_per_byte
    taken, size = min(source.needed_bytes, total), total / of_all.files
    sizes = [size] * int(taken / size) + [taken % size]
    sizes = [size for size in sizes if size >= 1]
    return Expected(
        source=source,
        listed=False,
        files=len(sizes),
        file_bytes=taken,
        hash_bytes=0,
        pieces=tuple(cut_sizes(source, sizes, piece_bytes)),
        read=read_rate(source, source.paths[0]),
    )


def cut_sizes(source: Source, sizes: Iterable[float], piece_bytes: int) -> list[float]:
    """Sizes of the pieces of files of these sizes: packed files stay whole."""
    pieces: list[float] = []
    for size in sizes:
        n = 1 if is_packed(source.paths[0]) else max(round(size / piece_bytes), 1)
        pieces += [size / n] * n
    return pieces


def read_rate(source: Source, name: str) -> str:
    if source.extract is not None:
        return "extract"
    if not is_rows(name):
        return "read .jsonl"  # whole files of text are no slower
    if suffix_of(name) == ".parquet":
        return "read .parquet"
    return "read .jsonl" + (name[name.rindex(".") :].lower() if is_packed(name) else "")


# ---- what there is to do


@dataclass(frozen=True, kw_only=True)
class Work:
    """One stage: CPU seconds of each task, and the bytes that all of them move."""

    name: str
    tasks: Sequence[float]
    from_network: float = 0.0
    from_disk: float = 0.0
    to_disk: float = 0.0

    @property
    def cpu_s(self) -> float:
        return sum(self.tasks)


@dataclass(frozen=True, kw_only=True)
class Plan:
    settings: Settings
    expected: Sequence[Expected]
    mixture: Mixture | None  # None: every source gives all it has
    problem: str  # why a run would stop at its mixture, or ""
    width: int  # bytes of a token
    work: Sequence[Work]

    @property
    def taken(self) -> dict[str, float]:
        """Tokens of the data folder by source, each counted once, those held out among them."""
        shares, share = self.mixture.shares if self.mixture else {}, self.settings.heldout_percent / 100
        budgets = {name: shares[name].tokens for name in shares}
        return {
            e.source.name: min(e.tokens, budgets.get(e.source.name, math.inf) + e.tokens * share)
            for e in self.expected
        }


def make_plan(settings: Settings, mirror: Path | None) -> Plan:
    expected = expect(settings, mirror)
    mixture, problem = None, ""
    budgets = {e.source.name: e.source.budget_tokens for e in expected if e.source.budget_tokens is not None}
    if budgets:
        share = 1 - settings.heldout_percent / 100
        available = {e.source.name: int(e.tokens * share) for e in expected if e.source.name in budgets}
        caps = {e.source.name: e.source.max_epochs for e in expected if e.source.name in budgets}
        try:
            mixture = plan_mixture(available, budgets, caps, RECIPES[settings.recipe].on_short)
        except ValueError as error:
            problem = str(error)
    width = token_dtype(vocabulary(settings)).itemsize
    plan = Plan(settings=settings, expected=expected, mixture=mixture, problem=problem, width=width, work=())
    return Plan(**{**vars(plan), "work": stages(plan)})


def vocabulary(settings: Settings) -> int:
    if settings.tokenizer is None:
        return settings.vocab_size
    from curation.tokenizer import load_tokenizer

    return load_tokenizer(settings.tokenizer).vocab_size


def stages(plan: Plan) -> list[Work]:
    """The stages of stages.py with the tasks that they will have."""
    settings, recipe, expected = plan.settings, RECIPES[plan.settings.recipe], plan.expected
    text = sum(e.text_bytes for e in expected)
    documents = sum(e.documents for e in expected)
    stay = sum(e.documents * e.source.kept for e in expected)
    tokens = sum(e.tokens for e in expected)
    remote = sum(e.read_bytes for e in expected if not e.hash_bytes)
    packed = text * PACKED

    read = [n * read_cost(settings, e) for e in expected for n in e.texts]
    encode = RATES["tokenize by a tokenizer.json" if is_json(settings.tokenizer) else "tokenize by a tokenizer.model"]
    tokenize = [n / MB * (1 / RATES["unpack"] + e.source.kept / encode) for e in expected for n in e.texts]
    sample = min(recipe.tokenizer_sample_mb * MB, text)
    train = (
        sample / MB * (1 / RATES["train tokenizer"] + 8 / RATES["unpack"])
    )  # it looks through more text than it takes
    heldout = text * settings.heldout_percent / 100
    again = text if recipe.keep_dropped else 0.0
    shards, tables = [], 0.0
    for e in expected:
        taken = plan.taken[e.source.name]
        rows = e.documents * e.source.kept * TABLE_BYTES
        n_shards = math.ceil(taken / recipe.shard_tokens)
        tables += n_shards * rows
        size = taken * plan.width / max(n_shards, 1)
        one = rows / MB / RATES["tables"] + size / MB * (1 / RATES["gather"] + 1 / RATES["hash"])
        shards += [one] * n_shards
    output = sum(plan.taken.values()) * plan.width
    hashed = sum(e.hash_bytes for e in expected)
    work = [
        Work(name="digests", tasks=[hashed / MB / RATES["hash"]] if hashed else [], from_disk=hashed),
        Work(
            name="read",
            tasks=read,
            from_network=remote,
            from_disk=sum(e.read_bytes for e in expected) - remote,
            to_disk=packed + documents * PRINT_BYTES,
        ),
        Work(
            name="duplicates",
            tasks=[documents / DUPLICATES_PER_S],
            from_disk=documents * PRINT_BYTES,
            to_disk=documents * FATE_BYTES,
        ),
        Work(name="tokenizer", tasks=[] if settings.tokenizer else [train], from_disk=4 * sample),
        Work(name="tokens", tasks=tokenize, from_disk=packed, to_disk=tokens * plan.width + stay * TABLE_BYTES),
        Work(name="mixture", tasks=[stay / MIXTURE_PER_S], from_disk=stay * TABLE_BYTES),
        Work(name="shards", tasks=shards, from_disk=2 * output, to_disk=output),
        Work(name="texts", tasks=[(heldout + again) / MB / RATES["unpack"]], from_disk=heldout, to_disk=heldout),
    ]
    return [of_stage for of_stage in work if of_stage.tasks]


def is_json(tokenizer: str | None) -> bool:
    return tokenizer is not None and tokenizer.endswith(".json")


def read_cost(settings: Settings, e: Expected) -> float:
    """CPU seconds for a byte of text in the stage `read`, if no rule dropped anything."""
    steps = [e.read, f"rules of {e.source.kind}", "fingerprint", "pack"]
    rules = settings.rules(e.source)
    steps += ["quality"] * any(isinstance(rule, Quality) for rule in rules)
    steps += ["decontaminate"] * any(isinstance(rule, Decontaminate) for rule in rules)
    return sum(1 / RATES[step] for step in steps) / MB


# ---- how long it takes


def schedule(seconds: Iterable[float], cores: int) -> float:
    """Seconds until the last core is done, when each takes the longest task that is left."""
    busy = [0.0] * cores
    for duration in sorted(seconds, reverse=True):
        heapq.heapreplace(busy, busy[0] + duration)
    return max(busy)


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """A run on so many cores: seconds of each stage, and what bounds it."""

    cores: int
    seconds: Mapping[str, float]
    bounds: Mapping[str, str]
    cpu_s: float

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def used(self) -> float:
        """Share of the cores' time in which they work."""
        return self.cpu_s / (self.cores * self.total_s) if self.total_s else 0.0


def simulate(work: Sequence[Work], cores: int, host: Host = HOST) -> Simulated:
    """Stage after stage; a stage lasts as long as its tasks, its network or its disks do, whichever is slowest."""
    n_hosts = math.ceil(cores / host.cores)
    seconds, bounds = {}, {}
    for stage in work:
        at_work = schedule(stage.tasks, cores)
        uneven = at_work > 1.1 * stage.cpu_s / cores
        limits = {
            "longest task" if uneven else "cores": at_work,
            "network": stage.from_network / (n_hosts * host.network_mb_s * MB),
            "disk": (stage.from_disk + stage.to_disk) / (n_hosts * host.disk_mb_s * MB),
        }
        bounds[stage.name] = max(limits, key=lambda limit: limits[limit])
        seconds[stage.name] = max(limits.values())
    return Simulated(cores=cores, seconds=seconds, bounds=bounds, cpu_s=sum(stage.cpu_s for stage in work))


# ---- as text


def amount(n: float) -> str:
    """1.2k, 3.4M, 5.6B: of documents or tokens."""
    for scale, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= scale:
            return f"{n / scale:.3g}{letter}"
    return f"{n:.0f}"


def size(n: float) -> str:
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if n >= scale:
            return f"{n / scale:.3g} {unit}"
    return f"{n / 1e3:.3g} kB"


def duration(seconds: float) -> str:
    for scale, unit in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * scale:
            return f"{seconds / scale:.1f} {unit}"
    return f"{seconds:.1f} s"


def print_plan(settings: Settings, mirror: Path | None, workers: int) -> None:
    """The plan of a run, for people. Raises what listing files raises."""
    import sys

    from rich import box
    from rich.console import Console
    from rich.table import Table

    plan = make_plan(settings, mirror)
    console = Console(width=None if sys.stdout.isatty() else 130)
    shares = plan.mixture.shares if plan.mixture else {}

    table = Table(box=box.SIMPLE_HEAD)
    columns = (
        "source",
        "by",
        "files",
        "tasks",
        "to read",
        "text",
        "documents",
        "tokens",
        "budget",
        "epochs",
    )
    for column in columns:
        table.add_column(column, justify="left" if column in ("source", "by") else "right")
    for e in plan.expected:
        share, budget = shares.get(e.source.name), e.source.budget_tokens
        epochs = f"{share.epochs:.2f} of {e.source.max_epochs:g}" if share else ""
        table.add_row(
            e.source.name, "files" if e.listed else "card", f"{e.files:,}", f"{len(e.pieces):,}", size(e.read_bytes),
            size(e.text_bytes), amount(e.documents), amount(e.tokens), amount(budget) if budget else "all", epochs,
        )  # fmt: skip
    read_bytes, text = sum(e.read_bytes for e in plan.expected), sum(e.text_bytes for e in plan.expected)
    documents, tokens = sum(e.documents for e in plan.expected), sum(e.tokens for e in plan.expected)
    budget = sum(e.source.budget_tokens or 0 for e in plan.expected)
    table.add_section()
    table.add_row(
        "all", "", f"{sum(e.files for e in plan.expected):,}", f"{sum(len(e.pieces) for e in plan.expected):,}",
        size(read_bytes), size(text), amount(documents), amount(tokens),
        amount(budget) if budget else "all", "", style="bold",
    )  # fmt: skip
    console.print(table)
    print("by files: as listed now; by card: as published, the Hub was not asked or does not answer.")
    print("tokens: of what the rules and the search for duplicates are expected to leave (sources.py).")
    for message in plan.mixture.messages if plan.mixture else ():
        print(message)
    if plan.problem:
        print(f"a run would stop: {plan.problem}")

    print()
    for licence in dict.fromkeys(e.source.licence for e in plan.expected):
        print(f"{', '.join(e.source.name for e in plan.expected if e.source.licence == licence)}: {licence}")
    print()
    for kind in dict.fromkeys(e.source.kind for e in plan.expected):
        names = ", ".join(type(rule).__name__ for rule in settings.rules_of(kind))
        print(f"rules of {kind}: {names}")

    simulated = [simulate(plan.work, cores) for cores in sorted({workers, *CORES})]
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("stage", "tasks", "longest", "core time", "network", "disk"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for s in simulated:
        table.add_column(f"{s.cores} core{'s' * (s.cores > 1)}", justify="right")
    for stage in plan.work:
        times = [duration(s.seconds[stage.name]) + MARKS.get(s.bounds[stage.name], "") for s in simulated]
        table.add_row(
            stage.name, f"{len(stage.tasks):,}", duration(max(stage.tasks)), duration(stage.cpu_s),
            size(stage.from_network) if stage.from_network else "", size(stage.from_disk + stage.to_disk), *times,
        )  # fmt: skip
    table.add_section()
    cpu_s = sum(stage.cpu_s for stage in plan.work)
    table.add_row("all", "", "", duration(cpu_s), "", "", *[duration(s.total_s) for s in simulated], style="bold")
    table.add_row("cores at work", *[""] * 5, *[f"{s.used:.0%}" for s in simulated])
    console.print(table)
    print(
        "What bounds a stage if not its cores: * its longest task, n network, d disk. Rates as measured on one core\n"
        f"(RATES in plan.py); {HOST.cores} cores, {HOST.network_mb_s:,.0f} MB/s of network and "
        f"{HOST.disk_mb_s:,.0f} MB/s of disk a host."
    )
    print()
    print_needs(plan, workers)
    print("nothing was started")


def print_needs(plan: Plan, workers: int) -> None:
    """Output, disk and memory."""
    recipe = RECIPES[plan.settings.recipe]
    text, documents = sum(e.text_bytes for e in plan.expected), sum(e.documents for e in plan.expected)
    tokens, taken = sum(e.tokens for e in plan.expected), sum(plan.taken.values())
    stay = sum(e.documents * e.source.kept for e in plan.expected)
    rows = sum(e.documents * e.source.kept * plan.taken[e.source.name] / max(e.tokens, 1) for e in plan.expected)
    output = taken * plan.width + rows * SHARD_BYTES
    shards = sum(math.ceil(n / recipe.shard_tokens) for n in plan.taken.values())
    documents_bytes, prints = text * PACKED, documents * (PRINT_BYTES + FATE_BYTES)
    token_bytes = tokens * plan.width + stay * TABLE_BYTES
    print(
        f"output: {amount(taken)} tokens of {plan.width} bytes and tables of {amount(rows)} documents, {size(output)} "
        f"in {shards:,} shards"
    )
    print(
        f"work folder: {size(documents_bytes + prints + token_bytes)} more (documents {size(documents_bytes)}, "
        f"fingerprints {size(prints)}, tokens {size(token_bytes)})"
    )
    sample = 0 if plan.settings.tokenizer else min(recipe.tokenizer_sample_mb * MB, text)
    print(
        f"memory: {size(WORKER_MB * MB)} a worker, {size(workers * WORKER_MB * MB)} for {workers}; duplicates "
        f"{size(documents * DUPLICATES_BYTES)}, mixture {size(stay * MIXTURE_BYTES)}"
        + (f", tokenizer {size(sample * TRAINER_BYTES)}" if sample else "")
    )
