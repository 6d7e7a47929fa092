"""The page and the card about a data folder: complete, escaped, without a network, and the same every time."""

import json
import re

import pytest
import yaml

from curation import report
from curation.shards import FORMAT, KEYS, manifest_checksum

HOSTILE = "</pre><script>alert('x')</script><img src=x onerror=alert(1)>"
SECTIONS = [
    "headline",
    "sources",
    "funnel",
    "dropped",
    "lengths",
    "scores",
    "duplicates",
    "contamination",
    "provenance",
]
FIGURES = ["clusters", "funnel", "language_score", "lengths", "quality", "tokens"]


def make_manifest():
    """A manifest with everything in it; one source and one rule are named by somebody hostile."""
    web = {
        "kind": "web",
        "description": "pages",
        "read": {"documents": 100, "text_bytes": 50_010},
        "removed_by_rewrites": {"text_bytes": 10},
        "dropped": {
            "gopher_short": {
                "documents": 30,
                "text_bytes": 3_000,
                "examples": [{"id": "web/1@0", "text": "Click here. " + HOSTILE}],
            },
            "near_duplicate": {"documents": 5, "text_bytes": 2_500, "examples": []},
            "contaminated": {
                "documents": 1,
                "text_bytes": 900,
                "examples": [
                    {
                        "id": "web/2@9",
                        "text": "Before. The leaked question <b>here</b>. After.",
                        "evidence": {
                            "benchmark": "mmlu",
                            "item": "mmlu/17",
                            "evidence": 41.5,
                            "score": 0.97,
                            "start": 8,
                            "stop": 39,
                            "matched": "The leaked question <b>here</b>",
                            "n_items": 1,
                        },  # fmt: skip
                    }
                ],
            },
        },
        "kept": {"documents": 64, "tokens": 10_700, "text_bytes": 43_600},
        "length_histogram": {"8": 20, "9": 40, "11": 4},
        "scores": {"language_score": [0] * 18 + [4, 60], "quality": [3] * 20},
    }
    own = {
        "kind": "own",
        "description": "hostile " + HOSTILE,
        "read": {"documents": 10, "text_bytes": 1_000},
        "removed_by_rewrites": {"text_bytes": 0},
        "dropped": {
            HOSTILE: {"documents": 1, "text_bytes": 100, "examples": [{"id": HOSTILE, "text": "half \ud800"}]}
        },
        "kept": {"documents": 9, "tokens": 225, "text_bytes": 900},
        "length_histogram": {"6": 9},
        "scores": {},
    }
    counts = {
        "train": {
            "web": {"documents": 60, "tokens": 10_000, "text_bytes": 41_000},
            HOSTILE: {"documents": 8, "tokens": 200, "text_bytes": 800},
        },
        "heldout": {
            "web": {"documents": 4, "tokens": 700, "text_bytes": 2_600},
            HOSTILE: {"documents": 1, "tokens": 25, "text_bytes": 100},
        },
    }
    leaked = web["dropped"]["contaminated"]["examples"]
    return dict.fromkeys(KEYS, {}) | {
        "format": FORMAT,
        "token_dtype": "uint16",
        "created_utc": "2026-01-01T00:00:00Z",
        "key": "ab12",
        "settings": {"recipe": "own", "note": HOSTILE},
        "versions": {"numpy": "2.0"},
        "tokenizer": {"file": "tokenizer.model", "vocab_size": 4096, "separator_id": 1},
        "splits": {split: {"sources": sources} for split, sources in counts.items()},
        "funnel": {"web": web, HOSTILE: own},
        "duplicates": {
            "exact": 2,
            "near": 3,
            "clusters": {"2": 2, "3": 1},
            "examples": [{"kept_id": "a", "duplicate_id": "b", "kept_text": HOSTILE, "duplicate_text": HOSTILE}],
        },
        "contamination": {"benchmarks": {"mmlu": 1, "gsm8k": 0}, "examples": leaked},
        "licences": {"web": "ODC-By", HOSTILE: "CC-BY-NC-4.0"},
        "mixture": {
            "web": {"tokens": 10_000, "weight": 0.9, "epochs": 1.0, "max_epochs": 1},
            HOSTILE: {"tokens": 200, "weight": 0.1, "epochs": 3.5, "max_epochs": 4},
        },
        "messages": ["own has 200 tokens: repeated 3.50 times (cap 4)"],
    }


@pytest.fixture(scope="module")
def page():
    """The page without the plotting library's own code."""
    html = report.build_page(make_manifest(), "eight")
    assert html.count(report.get_plotlyjs()) == 1
    return html.replace(report.get_plotlyjs(), "")


def test_page_holds_every_section_and_picture(page):
    assert re.findall(r'<(?:section|div class="tiles") id="(\w+)"', page) == SECTIONS
    assert sorted(re.findall(r'<div id="figure-(\w+)"', page)) == FIGURES


def test_page_loads_nothing_from_anywhere(page):
    assert not re.findall(r"""(?:src|href|action|data)\s*=\s*["']?\s*(?:https?:)?//""", page)
    assert not re.findall(r"@import|url\(|<link|<iframe|<img", page)


def test_texts_ids_rules_and_sources_are_escaped_everywhere(page):
    assert "<script>alert" not in page and "<img" not in page
    assert page.count("&lt;/pre&gt;&lt;script&gt;") >= 8  # rule, source, id, texts, settings
    pictures = "".join(re.findall(r"<script>(.*?)</script>", page, re.DOTALL))
    assert "onerror" in pictures and "</pre>" not in pictures  # plotly reads a few tags in labels: they are escaped


def test_matched_span_is_marked_and_the_rest_is_not(page):
    contamination = page[page.index('id="contamination"') :]
    assert 'Before. <mark class="leak">The leaked question &lt;b&gt;here&lt;/b&gt;</mark>. After.' in contamination
    assert "benchmark: mmlu · item: mmlu/17 · evidence: 41.5 · score: 0.97" in contamination


def test_a_span_outside_the_shown_text_is_put_behind_it():
    evidence = {"benchmark": "mmlu", "start": 100, "stop": 104, "matched": "leak"}
    shown = report.marked({"text": "short", "evidence": evidence})
    assert shown == ("short\n[… and from character 100 on:]\n", "leak", "")
    assert report.marked({"text": "short"}) == ("short", "", "")


def test_a_ledger_that_does_not_add_up_is_said(page):
    assert "Every document and every byte is accounted for" in page
    manifest = make_manifest()
    manifest["funnel"]["web"]["read"]["documents"] += 7
    broken = report.build_page(manifest, "eight")
    assert "7 documents and 0 bytes of web are neither kept nor dropped" in broken and "accounted for" not in broken


def test_rules_come_by_the_text_they_took():
    assert list(report.dropped_by_rule(make_manifest()["funnel"])) == [
        "gopher_short",
        "near_duplicate",
        "contaminated",
        HOSTILE,
    ]


def test_a_manifest_with_a_funnel_alone_gives_a_page_and_a_card():
    full = make_manifest()
    bare = {name: full[name] for name in KEYS | {"funnel"}} | {"splits": {}}
    for entry in bare["funnel"].values():
        del entry["length_histogram"], entry["scores"]
    html = report.build_page(bare, "bare").replace(report.get_plotlyjs(), "")
    assert re.findall(r'<div id="figure-(\w+)"', html) == ["funnel"]
    assert "not given" not in report.data_card(bare, "bare")


# ---- the card


def test_card_is_one_that_the_hub_reads():
    card = report.data_card(make_manifest(), "eight: a sample")
    _, header, body = card.split("---\n", 2)
    facts = yaml.safe_load(header)
    assert facts["license"] == ["cc-by-nc-4.0", "odc-by"] and facts["size_categories"] == ["n<1K"]
    assert facts["pretty_name"] == "eight: a sample"
    hub = pytest.importorskip("huggingface_hub")
    assert hub.DatasetCard(card).data.license == facts["license"]
    assert "| read | 110 | 100.00% |" in body and "| kept | 73 | 66.36% |" in body


def test_card_says_what_may_not_be_sold_and_how_the_mixture_differs():
    card = report.data_card(make_manifest(), "eight")
    assert "CC-BY-NC-4.0: not for commercial use" in card
    assert "- own has 200 tokens: repeated 3.50 times (cap 4)" in card
    assert "2 exact, 3 near" in card and "mmlu 1" in card


def test_card_keeps_foreign_names_inside_their_cells():
    card = report.data_card(make_manifest(), "eight")
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {7, 5}
    assert "<script>" not in card.replace("\\<script\\>", "")
    assert report.plain("a|b\nc <i>") == r"a\|b c \<i\>"


# ---- files


def write(folder, manifest):
    (folder / "manifest.json").write_text(json.dumps(manifest | {"sha256": manifest_checksum(manifest)}))


def test_files_are_written_and_the_same_again(tmp_path, capsys):
    write(tmp_path, make_manifest())
    assert report.main([str(tmp_path)]) == 0
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(first) == {"manifest.json", report.PAGE, report.CARD}
    assert report.main([str(tmp_path)]) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


def test_folder_without_a_funnel_gets_one_line(tmp_path, capsys):
    write(tmp_path, dict.fromkeys(KEYS, {}) | {"format": FORMAT})
    assert report.main([str(tmp_path)]) == 2
    assert "has no funnel in its manifest" in capsys.readouterr().err
