"""The plan of a run: what it says is what the run then reads, and making it starts and writes nothing."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation import pipeline, plan
from curation.inputs import find_pieces
from curation.plan import Host, Work, make_plan, published, schedule, simulate
from curation.recipe import RECIPES, Settings
from curation.sources import COSMOPEDIA, EIGHT, REFUSED


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, n in (("a", 900), ("b", 40), ("c", 40)):
        lines = (json.dumps({"text": f"{name} {i} " * 60}) + "\n" for i in range(n))
        (folder / f"{name}.jsonl").write_text("".join(lines))
    (folder / "d.txt").write_text("a file of text. " * 100)
    return folder


@pytest.fixture
def mirror(tmp_path):
    """A copy of the Hub with three parquet files of the recipe `cosmopedia`, in row groups of their own."""
    draw = random.Random(0)
    folder = tmp_path / "hub" / str(COSMOPEDIA.repo) / "cosmopedia-v2"
    folder.mkdir(parents=True)
    for name, n in (("a", 400), ("b", 50), ("c", 300)):
        rows = [{"text": " ".join(str(draw.random()) for _ in range(60)), "format": "x"} for _ in range(n)]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet", row_group_size=40)
    return tmp_path / "hub"


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def pieces_of(planned):
    return {e.source.name: sorted(e.pieces) for e in planned.expected}


def test_planned_pieces_are_those_that_a_run_reads(texts, tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "own", replace(RECIPES["own"], piece_mb=0.05))
    settings = Settings.chosen("own", input=str(texts))
    planned = make_plan(settings, None)
    read = find_pieces(settings, None, tmp_path / "work")
    assert pieces_of(planned) == {name: sorted(p.size_bytes for p in pieces) for name, pieces in read.items()}
    (e,) = planned.expected
    assert len(e.pieces) > 5
    assert e.files == 4
    assert e.read_bytes == e.hash_bytes == sum(path.stat().st_size for path in texts.iterdir())


def test_planned_pieces_of_a_mirror_are_those_that_a_run_reads(mirror, tmp_path, monkeypatch):
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.touch()
    monkeypatch.setattr(plan, "vocabulary", lambda settings: 50_000)
    monkeypatch.setitem(RECIPES, "cosmopedia", replace(RECIPES["cosmopedia"], piece_mb=0.02))
    for tokens in (20_000, 10**9):
        settings = Settings.chosen("cosmopedia", tokenizer=str(tokenizer), tokens=tokens)
        planned = make_plan(settings, mirror)
        read = find_pieces(settings, mirror, tmp_path / "work")
        assert pieces_of(planned) == {name: sorted(p.size_bytes for p in pieces) for name, pieces in read.items()}
    assert planned.expected[0].files == 3
    assert "lower the budget" in planned.problem  # a billion tokens are not there, and this recipe must not be short


def test_plan_starts_nothing_and_writes_nothing(texts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    out = tmp_path / "data"
    assert pipeline.main(["--recipe", "own", "--input", str(texts), "--out", str(out), "--plan"]) == 0
    assert contents(tmp_path) == before
    assert "nothing was started" in capsys.readouterr().out


def test_sources_that_cannot_be_listed_count_as_published(monkeypatch, capsys):
    monkeypatch.setattr(plan, "hub_answers", lambda: False)
    planned = make_plan(Settings.chosen("eight"), None)
    assert not any(e.listed for e in planned.expected)
    for e in planned.expected:  # as much as the budget needs, or all of it
        assert sum(e.texts) == pytest.approx(e.text_bytes)
        assert e.source.name == "wiki" or e.tokens == pytest.approx(1.1 * e.source.budget_tokens)
    assert sum(share.given for share in planned.mixture.shares.values()) == pytest.approx(100e9, rel=1e-6)
    assert planned.mixture.shares["wiki"].epochs > 1
    assert pipeline.main(["--recipe", "eight", "--tokens", "1B", "--plan"]) == 0
    shown = capsys.readouterr().out
    assert "card" in shown
    for source in EIGHT:
        assert source.licence in shown


def test_a_hub_that_breaks_off_does_not_end_the_plan(monkeypatch):
    asked = []

    def break_off(source, mirror=None):
        asked.append(source.name)
        raise ConnectionError("the Hub does not answer")

    monkeypatch.setattr(plan, "hub_answers", lambda: True)
    monkeypatch.setattr(plan, "list_files", break_off)
    planned = make_plan(Settings.chosen("eight", tokens=10**9), None)
    assert asked == ["wiki"]  # once is enough
    assert not any(e.listed for e in planned.expected)


def test_refused_source_is_refused_by_the_plan_too():
    with pytest.raises(ValueError, match="gated"):
        published(REFUSED[0], 64_000_000)


def test_every_source_of_the_hub_has_a_size_and_every_kind_a_rate():
    for recipe in RECIPES.values():
        for source in recipe.sources:
            assert source.repo is None or source.name in plan.PUBLISHED, source.name
            assert f"rules of {source.kind}" in plan.RATES


def test_longest_first_gives_the_known_makespan():
    assert schedule([4, 3, 3, 2, 2, 2], 2) == 8  # 4 2 2 | 3 3 2
    assert schedule([5, 5, 4, 4, 3, 3, 3], 3) == 11  # Graham's: longest first is 11 where 9 would do
    assert schedule([1] * 10, 3) == 4
    assert schedule([10, 1, 1], 8) == 10


def test_stage_is_bound_by_the_slowest_of_cores_longest_task_network_and_disk():
    host = Host(cores=4, network_mb_s=10, disk_mb_s=100)
    work = [
        Work(name="even", tasks=[10.0] * 8),
        Work(name="long", tasks=[1.0, 1.0, 30.0]),
        Work(name="download", tasks=[1.0] * 4, from_network=500e6),
        Work(name="write", tasks=[1.0] * 4, from_disk=200e6, to_disk=500e6),
    ]
    four = simulate(work, 4, host)
    assert four.seconds == {"even": 20, "long": 30, "download": 50, "write": 7}
    assert list(four.bounds.values()) == ["cores", "longest task", "network", "disk"]
    assert four.used == pytest.approx(120 / (4 * 107))
    eight = simulate(work, 8, host)  # two hosts
    assert eight.seconds == {"even": 10, "long": 30, "download": 25, "write": 3.5}
    assert simulate(work, 1, host).bounds["long"] == "cores"


def test_plan_and_measured_rates_name_the_same_steps():
    shown = Path(plan.__file__).with_name("contests").joinpath("rates.py").read_text()
    for name in ("extract", "fingerprint", "pack", "unpack", "gather", "tables", "hash", "train tokenizer"):
        assert f'"{name}"' in shown
        assert name in plan.RATES
