"""What is in a data folder, for people: a page that opens anywhere without a network, and a data card.

    python -m curation.report data/eight

Reads the manifest; writes report.html (what came in, what each rule dropped with examples, lengths, scores,
duplicates, contamination, tokens and licences by source) and README.md (a Hugging Face dataset card) into the folder.
Both are functions of the manifest alone, so writing them again changes nothing.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from curation.figures import COLORS, escape, fragment, legend, new_figure, page_style, short, source_colors
from curation.shards import new_file, read_manifest

PAGE, CARD = "report.html", "README.md"
MAX_STEPS = 10  # of the funnel's picture; its table has every rule
MAX_MATCH = 800  # characters of a matched text that are shown
SCORES = {"language_score": "language score", "quality": "quality score"}
CARD_LICENCES = {  # words of our licences -> names that the hub's dataset cards know; where none fits it is "other"
    "ODC-By": "odc-by",
    "ODC-By-1.0": "odc-by",
    "CC-BY": "cc",
    "CC-BY-4.0": "cc-by-4.0",
    "CC-BY-SA": "cc",
    "CC-BY-SA-3.0": "cc-by-sa-3.0",
    "CC-BY-SA-4.0": "cc-by-sa-4.0",
    "CC-BY-NC-4.0": "cc-by-nc-4.0",
    "CC0": "cc0-1.0",
    "CC0-1.0": "cc0-1.0",
    "GFDL": "gfdl",
    "Apache-2.0": "apache-2.0",
    "MIT": "mit",
}
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"),
         (10**8, "10M<n<100M"), (10**9, "100M<n<1B"), (10**10, "1B<n<10B"))  # fmt: skip
LIMITS = (
    "The licences are those of the sources as they were published. The rights in a single document stay with its",
    "author; attribution, where a licence asks for it, goes by the document ids. Filters are heuristics: they let",
    "some bad text through and drop some good text. Personal data is masked only where the recipe has a rule for it,",
    "by patterns that miss some. Near duplicates are found by chance (MinHash), so some remain.",
)


# ---- facts out of the manifest


def dropped_by_rule(funnel: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{rule: {source: {"documents", "text_bytes", "examples"}}}, the rule that took the most text first."""
    weight: Counter[str] = Counter()
    for entry in funnel.values():
        weight.update({rule: counts["text_bytes"] for rule, counts in entry["dropped"].items()})
    return {
        rule: {source: entry["dropped"][rule] for source, entry in funnel.items() if rule in entry["dropped"]}
        for rule, _ in sorted(weight.items(), key=lambda item: (-item[1], item[0]))
    }


def totals(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    """The sum of {"documents", "text_bytes"} entries."""
    counts = list(counts)
    return {unit: sum(entry[unit] for entry in counts) for unit in ("documents", "text_bytes")}


def unaccounted(funnel: dict[str, Any]) -> dict[str, dict[str, int]]:
    """What is neither kept nor dropped, by source; empty where the ledger adds up, documents and bytes alike."""
    missing = {}
    for source, entry in funnel.items():
        out = totals([entry["kept"], *entry["dropped"].values()])
        out["text_bytes"] += entry["removed_by_rewrites"]["text_bytes"]
        missing[source] = {unit: entry["read"][unit] - out[unit] for unit in out}
    return {source: counts for source, counts in missing.items() if any(counts.values())}


def split_counts(manifest: dict[str, Any], split: str) -> dict[str, dict[str, int]]:
    """{source: {"documents", "tokens", "text_bytes"}} of one split."""
    sources = manifest["splits"].get(split, {}).get("sources", {})
    return {
        source: {unit: entry[unit] for unit in ("documents", "tokens", "text_bytes")}
        for source, entry in sources.items()
    }


def non_commercial(licence: str) -> bool:
    return bool(re.search(r"\bNC\b|non-?commercial", licence.partition("(")[0], re.IGNORECASE))


def marked(found: dict[str, Any]) -> tuple[str, str, str]:
    """An example's text before, in and after what was found in it: nothing is marked where there is no evidence.

    Only the beginning of a text is in the manifest; a match further on is put behind it.
    """
    text, evidence = found["text"], found.get("evidence")
    if not isinstance(evidence, dict) or not evidence.get("matched"):
        return text, "", ""
    start, stop, matched = evidence["start"], evidence["stop"], evidence["matched"]
    if len(matched) > MAX_MATCH:
        matched = f"{matched[:MAX_MATCH]} […]"
    if start >= len(text):
        return f"{text}\n[… and from character {start:,} on:]\n", matched, ""
    return text[:start], matched, text[stop:]


# ---- the page


def build_page(manifest: dict[str, Any], name: str) -> str:
    """The page about a data folder called `name`."""
    funnel = manifest["funnel"]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"short": short, "number": "{:,}".format, "marked": marked, "share": share}
    contamination = manifest.get("contamination") or {"benchmarks": {}, "examples": []}
    return environment.get_template("report.html.jinja").render(
        name=name,
        manifest=manifest,
        funnel=funnel,
        read=totals(entry["read"] for entry in funnel.values()),
        kept=totals(entry["kept"] for entry in funnel.values()),
        rules=dropped_by_rule(funnel),
        totals=totals,
        unaccounted=unaccounted(funnel),
        splits={split: split_counts(manifest, split) for split in manifest["splits"]},
        mixture=manifest.get("mixture", {}),
        messages=manifest.get("messages", []),
        duplicates=manifest.get("duplicates"),
        searched=bool(manifest.get("contamination")),
        contamination=dict(sorted(contamination["benchmarks"].items(), key=lambda item: -item[1])),
        matches=contamination["examples"],
        licences=manifest.get("licences", {}),
        non_commercial=non_commercial,
        settings=json.dumps(manifest.get("settings", {}), indent=2),
        figures=make_figures(manifest),
        style=page_style(),
        plotly_js=get_plotlyjs(),
    )


def share(part: float, whole: float) -> str:
    return f"{part / whole:.2%}" if whole else "–"


def make_figures(manifest: dict[str, Any]) -> dict[str, Any]:
    """{name: (legend, HTML fragment)} of every picture whose data is there."""
    funnel = manifest["funnel"]
    figures = {"funnel": funnel_figure(funnel)}
    if train := split_counts(manifest, "train"):
        figures["tokens"] = tokens_figure(train, manifest.get("mixture", {}))
    if any(entry.get("length_histogram") for entry in funnel.values()):
        figures["lengths"] = lengths_figure(funnel)
    for score in SCORES:
        if any(any(entry.get("scores", {}).get(score, [])) for entry in funnel.values()):
            figures[score] = scores_figure(funnel, score)
    if manifest.get("duplicates", {}).get("clusters"):
        figures["clusters"] = clusters_figure(manifest["duplicates"]["clusters"])
    return {name: (legend(figure), fragment(name, figure)) for name, figure in figures.items()}


def funnel_figure(funnel: dict[str, Any]) -> Any:
    """Text left after each rule, stacked by source; the rules that took little are one step."""
    rules = list(dropped_by_rule(funnel))
    steps = {f"− {escape(rule)}": [rule] for rule in rules[:MAX_STEPS]}
    if rest := rules[MAX_STEPS:]:
        steps[f"− {len(rest)} other rules"] = rest
    left = {source: entry["read"]["text_bytes"] for source, entry in funnel.items()}
    stages = [("read", left)]
    for label, rules_of_step in steps.items():
        left = {
            source: left[source] - sum(entry["dropped"].get(rule, {}).get("text_bytes", 0) for rule in rules_of_step)
            for source, entry in funnel.items()
        }
        stages.append((label, left))
    stages.append(("kept", {source: entry["kept"]["text_bytes"] for source, entry in funnel.items()}))
    figure = new_figure(60 + 32 * len(stages), "bytes of text left", barmode="stack", bargap=0.25)
    for source, color in source_colors(funnel).items():
        figure.add_bar(
            orientation="h", name=escape(source), marker_color=color, y=[label for label, _ in stages],
            x=[counts[source] for _, counts in stages], hovertemplate="%{y}: %{x:,} bytes",
        )  # fmt: skip
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def tokens_figure(train: dict[str, Any], mixture: dict[str, Any]) -> Any:
    """Training tokens by source: what is in the folder, and what repetition adds."""
    sources = sorted(train, key=lambda source: -train[source]["tokens"])
    once = [train[source]["tokens"] for source in sources]
    again = [n * (mixture.get(s, {"epochs": 1})["epochs"] - 1) for s, n in zip(sources, once, strict=True)]
    figure = new_figure(70 + 34 * len(sources), "tokens", barmode="stack", bargap=0.3)
    labels = [escape(source) for source in sources]
    figure.add_bar(
        orientation="h", name="in the folder", y=labels, x=once, marker_color=COLORS[0], hovertemplate="%{x:,}"
    )
    if any(again):
        figure.add_bar(
            orientation="h", name="read again, to meet the weight", y=labels, x=again, marker_color=COLORS[1],
            hovertemplate="%{x:,.0f}",
        )  # fmt: skip
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def lengths_figure(funnel: dict[str, Any]) -> Any:
    """Documents by length, as shares of their source. Bucket b is of 2 ** (b - 1) up to 2 ** b - 1 characters."""
    histograms = {
        source: {int(bucket): n for bucket, n in entry.get("length_histogram", {}).items()}
        for source, entry in funnel.items()
    }
    buckets = sorted({bucket for histogram in histograms.values() for bucket in histogram})
    axis = list(range(buckets[0], buckets[-1] + 1))
    figure = new_figure(340, "characters in a document, at least", "documents of the source", hovermode="x unified")
    for source, color in source_colors(funnel).items():
        n = sum(histograms[source].values())
        if n:
            figure.add_scatter(
                x=[short(2**bucket // 2) for bucket in axis],
                y=[histograms[source].get(bucket, 0) / n for bucket in axis],
                name=escape(source), mode="lines+markers", line={"color": color, "width": 1.8}, marker_size=5,
            )  # fmt: skip
    figure.update_yaxes(tickformat=".0%", hoverformat=".1%", rangemode="tozero")
    figure.update_xaxes(type="category")
    return figure


def scores_figure(funnel: dict[str, Any], score: str) -> Any:
    """Documents by score, as shares of their source; the bins split 0 to 1 evenly."""
    figure = new_figure(300, SCORES[score], "documents of the source", hovermode="x unified")
    for source, color in source_colors(funnel).items():
        counts = funnel[source].get("scores", {}).get(score, [])
        if n := sum(counts):
            figure.add_scatter(
                x=[(i + 0.5) / len(counts) for i in range(len(counts))], y=[count / n for count in counts],
                name=escape(source), mode="lines+markers", line={"color": color, "width": 1.8}, marker_size=5,
            )  # fmt: skip
    figure.update_xaxes(range=[0, 1])
    figure.update_yaxes(tickformat=".0%", hoverformat=".1%", rangemode="tozero")
    return figure


def clusters_figure(clusters: dict[str, int]) -> Any:
    """How many groups of duplicates have how many documents."""
    sizes = sorted((int(size), n) for size, n in clusters.items())
    figure = new_figure(300, "documents in a group of duplicates", "groups")
    figure.add_scatter(
        x=[size for size, _ in sizes], y=[n for _, n in sizes], mode="markers", marker={"color": COLORS[0], "size": 8},
        hovertemplate="%{y:,} groups of %{x:,}<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(type="log", dtick=1)
    figure.update_yaxes(type="log", dtick=1)
    return figure


# ---- the card


def data_card(manifest: dict[str, Any], name: str) -> str:
    """A Hugging Face dataset card (https://huggingface.co/docs/hub/datasets-cards): YAML facts, then Markdown."""
    funnel, licences = manifest["funnel"], manifest.get("licences", {})
    train, heldout = split_counts(manifest, "train"), split_counts(manifest, "heldout")
    documents = sum(entry["documents"] for entry in train.values())
    header = {
        "pretty_name": name,
        **licence_facts(licences.values()),
        **({"language": spoken} if (spoken := languages(manifest)) else {}),
        "task_categories": ["text-generation"],
        "size_categories": [next((label for limit, label in SIZES if documents < limit), "10B<n<100B")],
        "tags": ["pretraining", "tokenized"],
        "viewer": False,
    }
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in header.items()), "---", ""]  # JSON is YAML
    recipe, tokenizer = manifest.get("settings", {}).get("recipe", "unknown"), manifest["tokenizer"]
    tokens = sum(entry["tokens"] for entry in train.values())
    text_bytes = sum(entry["text_bytes"] for entry in train.values())
    lines += [
        f"# {plain(name)}",
        "",
        f"{tokens:,} training tokens ({manifest['token_dtype']}) of {documents:,} documents, {text_bytes / 1e9:,.2f} "
        f"GB of text, and {sum(entry['tokens'] for entry in heldout.values()):,} held-out tokens, made by the recipe "
        f"`{recipe}`. [`{PAGE}`]({PAGE}) shows what was dropped and why; `manifest.json` has every setting, count and "
        "checksum.",
        "",
        "## Sources",
        "",
        *sources_table(manifest, train),
        "",
        *notes(manifest, licences),
        "## What was dropped",
        "",
        *dropped_table(funnel),
        "",
        *duplicates_and_contamination(manifest),
        "## How to read it",
        "",
        f"    python -m curation.shards verify {name}      # size and sha256 of every file",
        f"    python -m curation.report {name}             # this card and the page again",
        "",
        f"Tokens lie by source in `train/` and `heldout/`, as safetensors; the tokenizer is `{tokenizer['file']}`, "
        f"{tokenizer['vocab_size']:,} entries. A document begins with the separator, id {tokenizer['separator_id']}.",
        "",
        "## Limits",
        "",
        *LIMITS,
        "",
    ]
    return "\n".join(lines)


def licence_facts(licences: Iterable[str]) -> dict[str, Any]:
    """The licence entries of the header. What the hub has no name for is "other", and the table of sources says it."""
    names = set()
    for licence in licences:
        words = re.findall(r"[A-Za-z][\w.-]*\w", licence)
        names |= {CARD_LICENCES[word] for word in words if word in CARD_LICENCES} or {"other"}
    facts: dict[str, Any] = {"license": sorted(names) or ["unknown"]}
    if "other" in names:
        facts |= {"license_name": "by-source", "license_link": CARD}
    return facts


def languages(manifest: dict[str, Any]) -> list[str]:
    """Those that the rules let through; [] where no rule asks for one."""
    found = set()
    for rules in manifest.get("settings", {}).get("rules", {}).values():
        for rule in rules:
            found |= {"English": {"en"}, "Language": set(rule.get("languages", ()))}.get(rule["rule"], set())
    return sorted(found)


def sources_table(manifest: dict[str, Any], train: dict[str, Any]) -> list[str]:
    licences, mixture = manifest.get("licences", {}), manifest.get("mixture", {})
    lines = ["| source | licence | documents | tokens | weight | epochs |", "|---|---|---:|---:|---:|---:|"]
    total = sum(entry["tokens"] for entry in train.values())
    for source, entry in train.items():
        weight = mixture.get(source, {"weight": entry["tokens"] / total, "epochs": 1})
        lines.append(
            f"| {plain(source)} | {plain(licences.get(source, 'not given'))} | {entry['documents']:,} "
            f"| {entry['tokens']:,} | {weight['weight']:.2%} | {weight['epochs']:.2f} |"
        )
    return lines


def notes(manifest: dict[str, Any], licences: dict[str, str]) -> list[str]:
    """What a user must know first: sources not for commercial use, and how the mixture differs from its plan."""
    lines = [
        f"**{plain(source)} is {plain(licence)}: not for commercial use.**"
        for source, licence in licences.items()
        if non_commercial(licence)
    ]
    if messages := manifest.get("messages"):
        lines.append(
            "\n".join(["How the mixture differs from the budgets:", "", *(f"- {plain(m)}" for m in messages)])
        )
    return [part for line in lines for part in (line, "")]


def dropped_table(funnel: dict[str, Any]) -> list[str]:
    """A row a rule, sums over all sources, and the funnel's ends."""
    read = totals(entry["read"] for entry in funnel.values())
    rows = [("read", read)]
    rows += [(f"− {plain(rule)}", totals(by_source.values())) for rule, by_source in dropped_by_rule(funnel).items()]
    rows.append(("kept", totals(entry["kept"] for entry in funnel.values())))
    rewritten = sum(entry["removed_by_rewrites"]["text_bytes"] for entry in funnel.values())
    lines = ["| | documents | of those read | MB of text |", "|---|---:|---:|---:|"]
    for label, counts in rows:
        part = share(counts["documents"], read["documents"])
        lines.append(f"| {label} | {counts['documents']:,} | {part} | {counts['text_bytes'] / 1e6:,.2f} |")
    lines.insert(-1, f"| − by rewrites, inside of documents | | | {rewritten / 1e6:,.2f} |")
    return lines


def duplicates_and_contamination(manifest: dict[str, Any]) -> list[str]:
    lines = []
    if found := manifest.get("duplicates"):
        lines.append(f"Duplicates removed: {found['exact']:,} exact, {found['near']:,} near (MinHash).")
    if searched := manifest.get("contamination"):
        by_benchmark = ", ".join(f"{plain(name)} {n:,}" for name, n in searched["benchmarks"].items()) or "none"
        lines.append(f"Documents removed because they hold evaluation items: {by_benchmark}.")
    else:
        lines.append("Nobody looked for evaluation items in it.")
    return [part for line in lines for part in (line, "")]


def plain(text: str) -> str:
    """Text that Markdown shows as it is, within a line and within a cell of a table."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(text.split()))


# ---- files


def write_report(folder: Path) -> list[Path]:
    """Write the page and the card into a finished data folder; returns their paths."""
    manifest = read_manifest(folder)
    if not isinstance(manifest.get("funnel"), dict):
        raise ValueError(f"{folder} has no funnel in its manifest: it was not made by curation.pipeline")
    name = folder.resolve().name
    texts = {folder / PAGE: build_page(manifest, name), folder / CARD: data_card(manifest, name)}
    for path, text in texts.items():
        with new_file(path) as file:
            file.write(text.encode("utf-8", "replace"))  # half a surrogate pair has no UTF-8
    return list(texts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m curation.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, help="a data folder, such as data/eight")
    flags = parser.parse_args(argv)
    try:
        paths = write_report(flags.folder)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written: {', '.join(map(str, paths))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
