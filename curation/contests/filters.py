"""The rules on real text against datatrove's filters: documents per CPU second, and decisions alike, rule by rule.

dolma, which needs older libraries, is a peer where it has an environment of its own (make .venv-dolma/ready).
"""

import hashlib
import json
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import zstandard

from curation.audit import STOCK
from curation.contests.measure import Contest, Measured, measure
from curation.filters import (
    FINEWEB,
    C4Lines,
    C4Quality,
    GopherQuality,
    GopherRepetition,
    Language,
    PersonalData,
    Rewrite,
    Rule,
    Url,
    stock_of,
)

FILE_BYTES = 80_000  # of text from each file of the corpus
MAX_DOCUMENTS = 60  # from each file
EXACT_CHARACTERS = 700_000  # of text for the comparison under one split
REPETITIONS = 3
PEER = f"datatrove {version('datatrove')}"

# datatrove goes on through its examples from document to document, ours begins anew: one of each, to compare texts.
ONE_EXAMPLE = PersonalData(mails=("email@example.com",), ips=("192.0.2.1",))

GOPHER_AND_C4 = (GopherRepetition(), GopherQuality(), C4Lines(), C4Quality())
DOLMA = Path(__file__).parents[2] / ".venv-dolma/bin/python"
# dolma gives every document scores; so all rules are asked here, whatever the first one says.
DOLMA_RUN = """
import json, sys, time
from dolma.core.data_types import Document
from dolma.taggers.c4 import FasterC4Tagger
from dolma.taggers.gopher import GopherTagger
taggers = [GopherTagger(), FasterC4Tagger()]
documents = [Document(source="", version="", id=i, text=text) for i, _, text in json.load(open(sys.argv[1]))]
start = time.process_time()
for document in documents:
    for tagger in taggers:
        tagger.predict(document)
print(time.process_time() - start)
"""

Documents = list[tuple[str, str, str]]  # (id, address, text)
Rules = Sequence[Rule | Rewrite]
Verdict = tuple[str | None, bytes]  # the rule that drops the document, if any, and a digest of the text that goes on

# Nothing in these is a person's: identifiers, sections and versions, private and documentation networks.
NOT_PERSONAL = (
    "The enterprise branch is 1.3.6.1.4.1.311.21.20 in that tree.",
    "See section 12.1.4.3.2 and table 8.8.4.4.1.",
    "As section 12.1.4.3 says, it is so.",
    "Version 8.4.12.1 is the last one.",
    "OID 1.2.840.113549.1.9.1 names a mail address.",
    "The host 192.168.0.17 is behind the router, 10.1.2.3 as well.",
)
PERSONAL = (
    "Write to jane.doe@university.edu, please.",
    "john_smith+lists@mail.company.co.uk wrote:",
    "The server at 8.8.4.4 answered, 91.198.174.192 did not.",
    "ping 151.101.1.140",
)


def sample(corpus: Path, file_bytes: int = FILE_BYTES) -> Documents:
    """Some documents of every file of the corpus, spread over the file; the same ones every time."""
    documents = []
    for path in sorted(corpus.glob("*/*.jsonl.zst")):
        with zstandard.open(path, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        rows.sort(key=lambda row: hashlib.sha256(row["id"].encode()).digest())
        size = 0
        for row in [row for row in rows if len(row["text"]) <= file_bytes][:MAX_DOCUMENTS]:
            documents.append((row["id"], row.get("url") or "https://example.com/", row["text"]))
            size += len(row["text"])
            if size > file_bytes:
                break
    return documents


# ---- both sides, each in a process of its own


def ready_ours(rules: Rules) -> Rules:
    run_ours(rules, [("", "https://example.com/", "A line with a caf\u00e9 in it.\n" * 9)])  # models and tables
    return rules


def run_ours(rules: Rules, documents: Documents) -> list[Verdict]:
    verdicts: list[Verdict] = []
    for _, url, text in documents:
        metadata = {"url": url}
        broken: str | None = None
        for rule in rules:
            if hasattr(rule, "check"):
                broken = rule.check(text, metadata)
            else:
                text = rule.rewrite(text, metadata)
                broken = None if text else "empty"
            if broken:
                break
        verdicts.append((broken, digest_of(text)))
    return verdicts


def ready_stock(rules: Rules) -> list[Any]:
    os.environ["OMP_NUM_THREADS"] = "1"
    steps = stock_of(rules)
    run_stock(steps, [("", "https://example.com/", "A line with a caf\u00e9 in it.\n" * 9)])
    return steps


def run_stock(steps: list[Any], documents: Documents) -> list[Verdict]:
    from datatrove.data import Document

    verdicts: list[Verdict] = []
    for identity, url, text in documents:
        document = Document(text=text, id=identity, metadata={"url": url})
        broken: str | None = None
        for step in steps:
            if hasattr(step, "format"):
                document.text = step.format(document.text)
                continue
            try:
                result = step.filter(document)
            except ZeroDivisionError:  # a text without words or lines
                result = (False, "division by zero")
            if result is not True and not (isinstance(result, tuple) and result[0]):
                broken = result[1] if isinstance(result, tuple) else step.name
                break
        verdicts.append((broken, digest_of(document.text)))
    return verdicts


def digest_of(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()


def ready_domains(folder: str) -> None:
    os.environ["HF_ASSETS_CACHE"] = folder


def load_domains_ours(domains_file: str) -> str | None:
    return Url(domains_file=domains_file).check("", {"url": "http://www.example.com/"})


def load_domains_stock(_: None) -> Any:
    from datatrove.data import Document
    from datatrove.pipeline.filters import URLFilter
    from tldextract import TLDExtract

    step = URLFilter()
    step.tldextractor = TLDExtract(suffix_list_urls=())
    return step.filter(Document(text="", id="", metadata={"url": "http://www.example.com/"}))


# ---- contests


def contests(corpus: Path) -> list[Contest]:
    documents = sample(corpus)
    rows = [chain(documents), *each_rule(documents), exact_split(documents), personal_data(), domains()]
    return rows + ([dolma(documents)] if DOLMA.exists() else [])


def compared(rules: Rules, documents: Documents, repetitions: int) -> tuple[list[Measured], list[Measured]]:
    """Ours and datatrove's in turn; both sorted by CPU time."""
    ours, stock = [], []
    for _ in range(repetitions):
        ours.append(measure(run_ours, documents, prepare=partial(ready_ours, rules)))
        stock.append(measure(run_stock, documents, prepare=partial(ready_stock, rules)))
    return sorted(ours, key=cpu_of), sorted(stock, key=cpu_of)


def cpu_of(run: Measured) -> float:
    return run.cpu_s


def alike(ours: list[Verdict], stock: list[Verdict], of_text: bool = False) -> float:
    """Percentage of the documents that both keep or both drop; of_text: or, if both keep them, with the same text."""
    same = sum(
        (a is None) == (b is None) and (not of_text or a is not None or x == y)
        for (a, x), (b, y) in zip(ours, stock, strict=True)
    )
    return 100 * same / len(ours)


def chain(documents: Documents) -> Contest:
    ours, stock = compared(FINEWEB, documents, REPETITIONS)
    one, other = ours[REPETITIONS // 2], stock[REPETITIONS // 2]
    n = len(documents)
    n_bytes = sum(len(text.encode()) for _, _, text in documents)
    percentage = alike(one.result, other.result)
    kept = [sum(broken is None for broken, _ in run.result) for run in (one, other)]
    return Contest(
        step="rules of FineWeb: addresses, language, Gopher, C4, FineWeb, personal data",
        metric="documents per CPU second",
        peer=f"{PEER} filters",
        ours=n / one.cpu_s,
        theirs=n / other.cpu_s,
        target="at least 10 times, 99 % decided alike",
        reached=other.cpu_s >= 10 * one.cpu_s and percentage >= 99,
        note=f"{n_bytes / one.cpu_s / 1e6:.1f} MB/s; {percentage:.2f} % of {n:,} decided alike, "
        f"kept {kept[0]:,} and {kept[1]:,}; peak {one.peak_rss_mb:.0f} and {other.peak_rss_mb:.0f} MB; "
        f"medians of {REPETITIONS}, ours {n / ours[-1].cpu_s:.0f} to {n / ours[0].cpu_s:.0f}, "
        f"theirs {n / stock[-1].cpu_s:.1f} to {n / stock[0].cpu_s:.1f}",
    )


def each_rule(documents: Documents) -> list[Contest]:
    rows = []
    url, language, repetition, quality, lines, page, fineweb, _ = FINEWEB
    for rules in ((url,), (language,), (repetition,), (quality,), (lines, page), (fineweb,), (ONE_EXAMPLE,)):
        (ours,), (stock,) = compared(rules, documents, repetitions=1)
        of_text = any(hasattr(rule, "rewrite") for rule in rules)
        percentage = alike(ours.result, stock.result, of_text)
        n_dropped = sum(broken is not None for broken, _ in stock.result)
        rows.append(
            Contest(
                step=" and ".join(type(rule).__name__ for rule in rules),
                metric="documents per CPU second",
                peer=f"{PEER} {', '.join(type(step).__name__ for step in stock_of(rules))}",
                ours=len(documents) / ours.cpu_s,
                theirs=len(documents) / stock.cpu_s,
                target="99 % decided alike",
                reached=percentage >= 99,
                note=f"{percentage:.2f} % of {len(documents):,} alike{' in verdict and text' if of_text else ''}, "
                f"datatrove drops {n_dropped:,}",
            )
        )
    return rows


def exact_split(documents: Documents) -> Contest:
    """The rules with datatrove's split have to decide as datatrove's filters do, every time."""
    some = documents[:: max(1, sum(len(text) for _, _, text in documents) // EXACT_CHARACTERS)]
    result = measure(run_exact, some)
    different, asked = result.result
    return Contest(
        step="rules with datatrove's own split (audit)",
        metric="decisions that are not datatrove's",
        peer=f"{PEER} filters",
        ours=different,
        theirs=0,
        target="0",
        reached=different == 0,
        note=f"of {asked:,}",
    )


def run_exact(documents: Documents) -> tuple[int, int]:
    """(decisions with datatrove's split that its own filters do not share, decisions)."""
    rules = [rule for rule in FINEWEB if hasattr(rule, "check") and not isinstance(rule, Url | Language)]
    different = asked = 0
    for rule in rules:
        verdicts = run_stock([rule.stock()], documents)  # type: ignore[union-attr]
        for (_, url, text), (broken, _) in zip(documents, verdicts, strict=True):
            ours = rule.check(text, {"url": url}, split=STOCK)  # type: ignore[union-attr,call-arg]
            different += (ours is None) != (broken is None)
            asked += 1
    return different, asked


def personal_data() -> Contest:
    rule = PersonalData()
    stock = rule.stock()
    wrong = [
        sum(rewritten(text) != text for text in NOT_PERSONAL) + sum(rewritten(text) == text for text in PERSONAL)
        for rewritten in (lambda text: rule.rewrite(text, {}), stock.format)
    ]
    return Contest(
        step="personal data beside identifiers, sections and versions",
        metric=f"wrong of {len(NOT_PERSONAL) + len(PERSONAL)} texts",
        peer=f"{PEER} PIIFormatter",
        ours=wrong[0],
        theirs=wrong[1],
        target="0",
        reached=wrong[0] == 0,
    )


def domains() -> Contest:
    """datatrove's own list of domains in memory."""
    import datatrove

    lists = Path(datatrove.__file__).parent / "assets" / "url_filterblacklistsv0_3_0.tar.gz"
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(lists) as tar:
            tar.extract("domains", folder, filter="data")
        file = f"{folder}/domains"
        with open(file, "rb") as lines:
            n_domains = sum(1 for _ in lines)
        ours = measure(load_domains_ours, file)
        stock = measure(load_domains_stock, prepare=partial(ready_domains, folder))
    return Contest(
        step=f"list of {n_domains:,} domains",
        metric="peak memory of a process in MB",
        peer=f"{PEER} URLFilter",
        ours=ours.peak_rss_mb,
        theirs=stock.peak_rss_mb,
        target="below",
        reached=ours.peak_rss_mb < stock.peak_rss_mb,
        note=f"loaded in {ours.cpu_s:.1f} and {stock.cpu_s:.1f} CPU seconds",
    )


def dolma(documents: Documents) -> Contest:
    """The rules of Gopher and C4 that both have, every one asked about every document."""
    ours = measure(run_all, documents, prepare=partial(ready_ours, GOPHER_AND_C4))
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(documents, file)
        file.flush()
        run = subprocess.run([DOLMA, "-c", DOLMA_RUN, file.name], capture_output=True, text=True, check=True)
    cpu_s = float(run.stdout.split()[-1])
    return Contest(
        step="Gopher's and C4's measures of every document",
        metric="documents per CPU second",
        peer="dolma 1.2.1 gopher_v1, c4_v2",
        ours=len(documents) / ours.cpu_s,
        theirs=len(documents) / cpu_s,
        target="above",
        reached=ours.cpu_s < cpu_s,
    )


def run_all(rules: Rules, documents: Documents) -> int:
    n_broken = 0
    for _, url, text in documents:
        for rule in rules:
            if hasattr(rule, "check"):
                n_broken += rule.check(text, {"url": url}) is not None
            else:
                text = rule.rewrite(text, {"url": url})
    return n_broken
