"""The report: every section, every number where it belongs, nothing from a network, and what is missing is said."""

import json
import re

import pytest
from small_run import make_data, make_model, make_run

from eval import report, sample, scoreboard

SECTIONS = ["headline", "data", "training", "heldout", "tasks", "sample", "configuration", "provenance"]
FIGURES = ["funnel", "loss", "lr", "grad_norm", "tokens_per_s", "heldout", "yardsticks", "tasks", "benchmark_piqa"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder that has been scored, sampled and reported on."""
    root = tmp_path_factory.mktemp("report")
    checkpoint = make_run(root / "runs/demo", make_data(root / "data"), make_model())
    assert scoreboard.main([str(checkpoint)]) == 0
    assert sample.main([str(checkpoint), "--max-tokens", "8", "--prompt", "</pre><script>alert(1)</script>"]) == 0
    assert report.main([str(root / "runs/demo")]) == 0
    return root / "runs/demo"


@pytest.fixture(scope="module")
def page(run):
    """The report without the plotting library's own code."""
    html = (run / "report.html").read_text()
    assert html.count(report.get_plotlyjs()) == 1
    return html.replace(report.get_plotlyjs(), "")


def test_report_holds_every_section_and_picture(page):
    assert re.findall(r'<(?:section|div class="tiles") id="(\w+)"', page) == SECTIONS
    assert sorted(re.findall(r'<div id="figure-(\w+)"', page)) == sorted(FIGURES)
    assert 'id="figure-' in page and "make eval" not in page and "left out" not in page


def test_report_loads_nothing_from_anywhere(page):
    assert not re.findall(r"""(?:src|href|action|data)\s*=\s*["']?\s*(?:https?:)?//""", page)
    assert not re.findall(r"@import|url\(|<link|<iframe|<img", page)


def test_report_shows_the_scores_beside_gzip_and_unigram(run, page):
    overall = json.loads((run / "eval/step_0000007.json").read_text())["bits_per_byte"]["overall"]
    headline = page[page.index("<header>") : page.index("</header>")]
    for key in ("value", "gzip", "unigram"):
        assert f"{overall[key]:.3f}" in headline
    assert (">below gzip<" if overall["below_gzip"] else ">not below gzip<") in headline
    assert scoreboard.verdict(overall) in page


def test_report_escapes_what_the_model_and_the_sources_say(page):
    assert "&lt;/pre&gt;&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script>alert" not in page
    assert "made of &lt;code&gt; words" in page


def test_funnel_table_adds_up(run):
    manifest, note = report.read_data(json.loads((run / "config.json").read_text()))
    assert note == ""
    rows = {label: total for label, _, total in report.funnel_table(manifest)}
    assert list(rows) == ["read", "− too_short", "kept", "heldout", "train"]
    for key in ("documents", "tokens", "text_bytes"):
        assert rows["read"][key] == rows["− too_short"][key] + rows["kept"][key]
        assert rows["kept"][key] == rows["heldout"][key] + rows["train"][key]


def test_what_is_missing_is_said_with_the_command_that_makes_it(run, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    config = json.loads((run / "config.json").read_text())
    config["data"]["path"] = str(tmp_path / "gone")
    (bare / "config.json").write_text(json.dumps(config))
    page = report.build_report(bare)
    for command in ("make curate OUT=", "train/launch.py", "make eval CKPT=", "python -m eval.sample"):
        assert command in page
    assert re.findall(r'<(?:section|div class="tiles") id="(\w+)"', page) == SECTIONS
    assert '<div id="figure-' not in page


def test_data_made_again_since_is_pointed_out(run, tmp_path):
    config = json.loads((run / "config.json").read_text())
    config["data"]["manifest_sha256"] = "0" * 64
    manifest, note = report.read_data(config)
    assert manifest and "made again" in note


def test_folder_that_is_not_a_run_gets_one_line(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.strip() == (
        f"error: {tmp_path} is not a run folder: it has no config.json; give one such as runs/demo"
    )
    assert list(tmp_path.iterdir()) == []


def test_smoothing_keeps_a_straight_line_straight_and_the_length():
    values = [float(i) for i in range(1000)]
    smooth = report.smoothed(values)
    assert len(smooth) == 1000 and smooth[100:900] == pytest.approx(values[100:900])
    assert report.smoothed([3.0]) == [3.0]
    assert report.thin(list(range(5001)))[-1] == 5000 and len(report.thin(list(range(5001)))) <= report.MAX_POINTS
