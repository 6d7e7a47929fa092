"""Sources: which files are listed and chosen, pieces and their keys, the Hub, and the recipes."""

import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.filters import Shorten
from curation.recipe import RECIPES, Settings, content_of, recipe_of, rule_values, tokens_of
from curation.sources import (
    EIGHT,
    OWN,
    REFUSED,
    WEB_EDU,
    InputFile,
    Source,
    choose_files,
    list_files,
    make_pieces,
    piece_of,
    split_piece,
    with_digests,
)

ROOT = Path(__file__).resolve().parents[1]


def own(folder, **changes):
    return replace(OWN, folder=str(folder), **changes)


def fill(folder, sizes):
    for name, size in sizes.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((name.encode() + b"\n" + b"x" * size)[:size])
    return folder


# ---- listing and choosing


def test_files_come_in_the_order_of_the_hash_of_their_names_and_only_those_that_match(tmp_path):
    fill(tmp_path, {"a.txt": 1, "b/c.jsonl": 2, "b/d.parquet": 3, "e.png": 4, ".git/f.txt": 5, "g.md": 6})
    (tmp_path / "l.txt").symlink_to(tmp_path / "g.md")
    (tmp_path / "nowhere.txt").symlink_to(tmp_path / "gone")
    files = list_files(own(tmp_path))
    sizes = {"a.txt": 1, "b/c.jsonl": 2, "b/d.parquet": 3, "g.md": 6, "l.txt": 6}
    assert {file.name: file.size_bytes for file in files} == sizes
    assert files == sorted(files, key=lambda file: hashlib.sha256(file.name.encode()).digest())


def test_mirror_of_the_hub_is_listed_by_the_same_names_as_the_hub(tmp_path):
    fill(tmp_path, {f"{WEB_EDU.repo}/sample/100BT/{i:03d}_00000.parquet": 10 for i in range(3)})
    fill(tmp_path, {f"{WEB_EDU.repo}/README.md": 5, f"{WEB_EDU.repo}/sample/10BT/000_00000.parquet": 7})
    names = [file.name for file in list_files(WEB_EDU, tmp_path)]
    assert sorted(names) == [f"sample/100BT/{i:03d}_00000.parquet" for i in range(3)]


def test_listing_says_in_one_line_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"there is no folder {tmp_path}/HuggingFaceFW/fineweb-edu"):
        list_files(WEB_EDU, tmp_path)
    (tmp_path / WEB_EDU.repo).mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no file of .* matches sample/100BT/\*.parquet"):
        list_files(WEB_EDU, tmp_path)


@pytest.mark.parametrize("source", REFUSED, ids=lambda source: source.name)
def test_gated_and_second_download_sets_are_refused_with_the_reason(source):
    with pytest.raises(ValueError, match=re.escape(source.repo)) as caught:
        list_files(source)
    assert "\n" not in str(caught.value)
    assert re.search("gated|no text", str(caught.value)) and "use the source" in str(caught.value)


def test_no_more_files_are_chosen_than_the_budget_needs(tmp_path):
    fill(tmp_path, {f"{i}.jsonl": 1000 for i in range(20)})
    source = own(tmp_path, budget_tokens=1000, bytes_per_token=4.0, text_per_byte=2.0, kept=0.5)
    assert source.needed_bytes == pytest.approx(4400)  # 4,000 bytes of text make 1,000 tokens; a tenth more
    files = list_files(source)
    chosen = choose_files(source, files)
    assert [file.name for file in chosen] == [file.name for file in files[:5]]
    assert [file.take_bytes for file in chosen] == [None] * 4 + [400]
    more = choose_files(replace(source, budget_tokens=1500), files)
    assert [file.name for file in more[:4]] == [file.name for file in chosen[:4]]  # what was chosen stays
    assert choose_files(replace(source, budget_tokens=None), files) == files
    assert choose_files(replace(source, budget_mb=0.002), files)[-1].take_bytes is None


def test_budget_that_covers_a_part_of_a_parquet_file_reads_its_first_row_groups(tmp_path):
    pq.write_table(
        pa.table({"text": [os.urandom(500).hex() for _ in range(200)]}), tmp_path / "a.parquet", row_group_size=10
    )
    (file,) = list_files(own(tmp_path))
    pieces = make_pieces(own(tmp_path), [replace(file, take_bytes=file.size_bytes // 4)], 1 << 30)
    assert [(part.start, part.stop) for piece in pieces for part in piece.parts] in ([(0, 5)], [(0, 6)])


def test_digests_are_of_the_content_and_are_not_computed_twice(tmp_path, monkeypatch):
    folder = fill(tmp_path / "in", {"a.txt": 10, "b.txt": 20})
    known = tmp_path / "digests.json"
    files = with_digests(list_files(own(folder)), known)
    assert {file.digest for file in files} == {
        hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("a.txt", "b.txt")
    }
    monkeypatch.setattr("curation.sources.file_sha256", lambda path: f"read {Path(path).name}")
    assert with_digests(list_files(own(folder)), known) == files
    (folder / "b.txt").write_bytes(b"other")
    assert sorted(file.digest for file in with_digests(list_files(own(folder)), known))[1] == "read b.txt"
    remote = InputFile(name="n", path="hf://datasets/a/b@c/n", size_bytes=1, digest="given")
    assert with_digests([remote], known) == [remote]


# ---- pieces


def keys(source, folder, piece_bytes):
    files = [replace(file, digest=f"sha of {file.name}") for file in list_files(source)]
    return {piece.key: piece for piece in make_pieces(source, files, piece_bytes)}


def test_pieces_cover_every_byte_once_and_are_about_as_large_as_asked_for(tmp_path):
    fill(tmp_path, {"big.jsonl": 10_000, "mid.jsonl": 900} | {f"s/{i}.txt": 30 + i for i in range(100)})
    pieces = make_pieces(own(tmp_path), list_files(own(tmp_path)), 1000)
    ranges = sorted((p.file.name, p.start, p.stop) for piece in pieces for p in piece.parts)
    assert [r for r in ranges if r[0] == "big.jsonl"] == [("big.jsonl", i * 1000, (i + 1) * 1000) for i in range(10)]
    assert len(ranges) == 10 + 1 + 100 and sum(piece.size_bytes for piece in pieces) == 10_000 + 900 + 3000 + 4950
    bundles = [piece for piece in pieces if len(piece.parts) > 1]
    assert len(bundles) == 8 and max(piece.size_bytes for piece in pieces) < 2_000


def test_one_added_file_changes_one_piece(tmp_path):
    fill(tmp_path, {"big.jsonl": 10_000} | {f"s/{i}.txt": 50 for i in range(50)})
    before = keys(own(tmp_path), tmp_path, 1000)
    fill(tmp_path, {"s/new.txt": 50})
    after = keys(own(tmp_path), tmp_path, 1000)
    assert len(before) == len(after) and len(before.keys() - after.keys()) == 1


def test_key_of_a_piece_is_of_what_it_reads_not_of_where_it_is(tmp_path):
    sizes = {"a.jsonl": 3000, "b.txt": 10}
    one, two = fill(tmp_path / "one", sizes), fill(tmp_path / "two", sizes)
    assert keys(own(one), one, 1000).keys() == keys(own(two), two, 1000).keys()
    file = InputFile(name="a.jsonl", path="/x/a.jsonl", size_bytes=3000, digest="1")
    changes = [{}, {"digest": "2"}, {"name": "c.jsonl"}, {"take_bytes": 500}]
    found = {make_pieces(own(one), [replace(file, **change)], 10_000)[0].key for change in changes}
    found.add(make_pieces(own(one, name="other"), [file], 10_000)[0].key)
    assert len(found) == 5


def test_piece_survives_json_and_pickling(tmp_path):
    fill(tmp_path, {"a.txt": 10, "b.txt": 20})
    (piece,) = make_pieces(own(tmp_path), list_files(own(tmp_path)), 1000)
    again = piece_of(json.loads(json.dumps(piece.values())))
    assert again == piece and again.key == piece.key == pickle.loads(pickle.dumps(piece)).key
    assert piece.name == "own: 2 files"


def test_pieces_are_split_until_nothing_can_be_cut(tmp_path):
    fill(tmp_path, {"a.jsonl": 1 << 20, "b.txt": 10, "c.txt": 10, "d.jsonl.gz": 1 << 20})
    source = own(tmp_path)
    by_name = {piece.parts[0].file.name: piece for piece in make_pieces(source, list_files(source), 1 << 20)}
    assert split_piece(by_name["d.jsonl.gz"]) is None
    halves = split_piece(by_name["a.jsonl"])
    assert [(half.parts[0].start, half.parts[0].stop) for half in halves] == [(0, 1 << 19), (1 << 19, 1 << 20)]
    (bundle,) = [piece for piece in by_name.values() if len(piece.parts) == 2]
    one, other = split_piece(bundle)
    assert one.parts + other.parts == bundle.parts and split_piece(one) is None
    leaves = [by_name["a.jsonl"]]
    while any(split_piece(leaf) for leaf in leaves):
        leaves = [half for leaf in leaves for half in (split_piece(leaf) or [leaf])]
    assert len(leaves) == 16 and sum(leaf.size_bytes for leaf in leaves) == 1 << 20


# ---- the Hub, played by a server of ours

REPO, COMMIT = "someone/some-set", "0123456789abcdef0123456789abcdef01234567"


class FakeHub(BaseHTTPRequestHandler):
    """The Hub's list of files and its redirects, and a store behind it that answers ranges, with faults on order."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes] = {}
    faults: list[str] = []
    requests: list[str] = []

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.requests.append(f"{self.command} {self.path}")
        path = self.path.split("?")[0]
        tree = f"/api/datasets/{REPO}/tree/{COMMIT}"
        if path.startswith(tree):
            folder = path.removeprefix(tree).strip("/")
            found = [
                {"type": "file", "path": name, "size": len(data), "oid": f"git of {name}"}
                | ({"lfs": lfs(data)} if len(data) > 100 else {})
                for name, data in self.files.items()
                if name.startswith(f"{folder}/" if folder else "")
            ]
            return self.answer(200, json.dumps(found).encode(), Content_Type="application/json")
        resolve = f"/datasets/{REPO}/resolve/{COMMIT}/"
        if path.startswith(resolve):
            name = path.removeprefix(resolve)
            if name not in self.files:
                return self.answer(404, X_Error_Code="EntryNotFound")
            data = self.files[name]
            sha = hashlib.sha256(data).hexdigest()
            return self.answer(
                302,
                Location=f"http://localhost:{self.server.server_port}/store/{name}",  # another host, as the Hub's is
                X_Repo_Commit=COMMIT,
                X_Linked_Size=len(data),
                X_Linked_Etag=f'"{sha}"',
            )
        if path.startswith("/store/"):
            if self.faults:
                fault = self.faults.pop(0)
                if fault == "drop":
                    self.close_connection = True
                    return self.wfile.write(b"HTTP/1.1 206 Partial Content\r\nContent-Length: 999\r\n\r\nonly this")
                return self.answer(int(fault))
            data = self.files[path.removeprefix("/store/")]
            if len(data) < 100:
                return self.answer(200, data)  # a server that knows no ranges
            start, stop = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
            return self.answer(206, data[start : stop + 1])
        return self.answer(404, X_Error_Code="RepoNotFound")


def lfs(data):
    return {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}


READ = """
import json, sys
from dataclasses import replace
from curation.sources import OWN, list_files, make_pieces
from curation.readers import read_piece
import curation.hub
curation.hub.RETRIES = int(sys.argv[4])
source = replace(OWN, repo=sys.argv[1], revision=sys.argv[2], paths=tuple(sys.argv[3].split()))
try:
    files = list_files(source)
    documents = [d for piece in make_pieces(source, files, 20_000) for d in read_piece(source, piece)]
    print(json.dumps([[f.name, f.digest, f.path] for f in files]))
    print(json.dumps([[d.id, d.text, d.problem] for d in documents]))
except (ValueError, OSError) as error:
    print(type(error).__name__, error)
"""


@pytest.fixture
def hub(tmp_path):
    """Runs READ against the server; gives its lines."""
    FakeHub.files, FakeHub.faults, FakeHub.requests = {}, [], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1", "no_proxy": "*"}

    def run(repo=REPO, paths="*.jsonl *.parquet *.json.gz", retries=2, **variables):
        variables["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
        command = [sys.executable, "-c", READ, repo, COMMIT, paths, str(retries)]
        done = subprocess.run(
            command, cwd=ROOT, env=environment | variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    yield run
    server.shutdown()
    server.server_close()


def test_files_of_the_hub_are_listed_with_their_digests_and_read_in_ranges_through_faults(hub, tmp_path):
    texts = [f"document {i} " * 20 for i in range(300)]
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
    table = pa.table({"text": texts, "unread": [os.urandom(100).hex() for _ in texts]})
    pq.write_table(table, tmp_path / "b.parquet", row_group_size=50)
    FakeHub.files = {"data/a.jsonl": lines, "data/b.parquet": (tmp_path / "b.parquet").read_bytes(), "README.md": b"#"}
    FakeHub.faults = ["503", "drop", "403"]
    listed, read = map(json.loads, hub(paths="data/*.jsonl data/*.parquet"))
    assert {name: digest for name, digest, _ in listed} == {
        name: hashlib.sha256(data).hexdigest() for name, data in FakeHub.files.items() if name != "README.md"
    }
    assert all(path == f"hf://datasets/{REPO}@{COMMIT}/{name}" for name, _, path in listed)
    assert sorted(text for _, text, _ in read) == sorted(texts * 2) and not any(problem for *_, problem in read)
    assert not FakeHub.faults
    # the list is asked for in the folder of the pattern, and every file once (once more after the address was refused)
    assert sum("/tree/" in request for request in FakeHub.requests) == 1
    assert sum("/resolve/" in request for request in FakeHub.requests) <= 4


def test_network_that_stays_away_is_a_problem_of_the_file_and_the_others_are_read(hub):
    FakeHub.files = {"a.jsonl": b'{"text": "' + b"a" * 200 + b'"}\n', "b.jsonl": b'{"text": "b"}\n'}
    FakeHub.faults = ["500"] * 2
    _, read = map(json.loads, hub(retries=1))
    assert sorted((text[:1], problem) for _, text, problem in read if problem is None) in (
        [("a", None)],
        [("b", None)],
    )
    assert [problem for *_, problem in read if problem] == ["network"]


def test_forbidden_network_and_sets_that_are_not_there_get_one_line(hub):
    (line,) = hub(repo="no/such-set")
    assert line.startswith("FileNotFoundError data set no/such-set at")
    FakeHub.files = {"README.md": b"#"}
    (line,) = hub()
    assert line.startswith("FileNotFoundError source own: no file of")
    (line,) = hub(HF_HUB_OFFLINE="1")
    assert line.startswith("ConnectionError data set someone/some-set") and "offline" in line


# ---- recipes


def test_eight_sources_have_a_hundred_billion_tokens_a_commit_and_a_licence_each():
    assert len(EIGHT) == 8 and sum(source.budget_tokens for source in EIGHT) == 100_000_000_000
    for source in EIGHT:
        assert re.fullmatch("[0-9a-f]{40}", source.revision) and source.licence and source.repo.count("/") == 1
        assert source.kind in RECIPES["eight"].rules


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_rules_for_its_kinds_and_sources_that_pickle(name):
    recipe = recipe_of(name)
    assert {source.kind for source in recipe.sources} == set(recipe.rules)
    assert len({source.name for source in recipe.sources}) == len(recipe.sources)
    assert pickle.loads(pickle.dumps(recipe.sources)) == recipe.sources
    assert not any(source.refused for source in recipe.sources)


def test_tokens_scale_every_budget_in_proportion():
    settings = Settings.chosen("eight", tokens=tokens_of("1B"))
    budgets = {source.name: source.budget_tokens for source in settings.sources}
    assert sum(budgets.values()) == 1_000_000_000 and budgets["web_edu"] == 400_000_000
    assert Settings.chosen("eight").resolved() != settings.resolved()
    limited = Settings.chosen("eight", limit_mb=1.5).sources[0]
    assert limited.needed_bytes == 1_500_000 / limited.text_per_byte


@pytest.mark.parametrize(
    ("text", "tokens"), [("1B", 10**9), ("0.5b", 5 * 10**8), ("250M", 250_000_000), ("10k", 10_000), ("777", 777)]
)
def test_numbers_of_tokens_are_read_as_they_are_written(text, tokens):
    assert tokens_of(text) == tokens


@pytest.mark.parametrize(
    ("recipe", "given", "message"),
    [
        ("eight", {"tokens": 0}, "--tokens 0 is not a number of tokens"),
        ("local", {"tokens": 5}, "--tokens has no effect: recipe local takes all its text"),
        ("own", {}, "--recipe own needs it"),
        ("local", {"input": "."}, "--input FOLDER goes with --recipe own"),
        ("own", {"input": "/no/such"}, "--input /no/such is not a folder"),
        ("cosmopedia", {}, "made for the tokenizer of HuggingFaceTB/SmolLM-135M"),
        ("local", {"tokenizer": "/no/such"}, "--tokenizer /no/such is not a file"),
        ("local", {"decontaminate": "/no/such"}, "--decontaminate /no/such is not a file"),
        ("eight", {"min_quality": 0.5}, "--min-quality and --quality-label have no effect without --quality-model"),
        ("alpaca", {"quality_model": __file__}, "--quality-model has no effect: recipe alpaca has no web pages"),
        ("local", {"min_language_score": 0.9}, "--min-language-score has no effect: recipe local has no web pages"),
        ("nine", {}, "unknown recipe 'nine'; allowed: local, eight"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(recipe, given, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        Settings.chosen(recipe, **given)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="is not a number of tokens"):
        tokens_of("many")


def test_cosmopedia_and_medqa_are_as_their_systems_want_them(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    settings = Settings.chosen("cosmopedia", tokenizer=str(tmp_path / "tokenizer.json"))
    resolved = settings.resolved()
    assert resolved["heldout_percent"] == 15.0
    assert resolved["rules"]["synthetic"][1] == {"rule": "Shorten", "max_characters": 4000}
    assert Shorten(max_characters=9).rewrite("four five six", {}) == "four five"
    assert Shorten(max_characters=8).rewrite("four five six", {}) == "four"
    assert Shorten(max_characters=4).rewrite("fourfive", {}) == "four"
    assert Shorten(max_characters=4).rewrite("four", {}) == "four"
    medqa, web = recipe_of("fineweb-edu-medqa").sources
    assert medqa.budget_tokens * 9 == web.budget_tokens and medqa.max_epochs == 4
    assert recipe_of("alpaca").sources[0].licence == "CC-BY-NC-4.0" and "only" in recipe_of("alpaca").purpose


def test_settings_name_files_by_content_not_by_place(tmp_path):
    for place in ("one", "two"):
        fill(tmp_path, {f"{place}/text.txt": 5, f"{place}/tokenizer.json": 9})
        (tmp_path / place / "tokenizer.json").write_text("same")
    settings = [
        Settings.chosen("own", input=str(tmp_path / place), tokenizer=str(tmp_path / place / "tokenizer.json"))
        for place in ("one", "two")
    ]
    assert settings[0].resolved() == settings[1].resolved()
    assert settings[0].resolved()["tokenizer"] == "sha256:" + hashlib.sha256(b"same").hexdigest()
    assert settings[0].sources[0].folder == str(tmp_path / "one")


def test_chosen_models_and_limits_are_among_the_rules_and_the_key(tmp_path):
    (tmp_path / "index").write_text("items")
    (tmp_path / "lid.bin").write_text("model")
    (tmp_path / "quality.npz").write_text("weights")
    plain = Settings.chosen("eight")
    settings = Settings.chosen(
        "eight",
        decontaminate=str(tmp_path / "index"),
        language_model=str(tmp_path / "lid.bin"),
        min_language_score=0.9,
        quality_model=str(tmp_path / "quality.npz"),
        min_quality=0.2,
    )
    rules = {kind: [type(rule).__name__ for rule in settings.rules_of(kind)] for kind in RECIPES["eight"].rules}
    assert all(names[-1] == "Decontaminate" for names in rules.values())
    assert rules["clean_web"][1] == rules["web"][1] == "MinScore" and "MinScore" not in rules["code"]
    assert "Quality" in rules["web"] and "Quality" not in rules["math"] and settings.rules_of("web")[-2].minimum == 0.2
    values = settings.resolved()["rules"]["long"]
    assert values[1]["rule"] == "Language" and values[1]["model_file"] == content_of(tmp_path / "lid.bin")
    assert plain.resolved() != settings.resolved() and str(tmp_path) not in json.dumps(settings.resolved())


def test_rule_with_a_file_is_keyed_by_what_is_in_it(tmp_path):
    from dataclasses import dataclass

    @dataclass(frozen=True, kw_only=True)
    class Listed:
        words_file: str
        limit: int = 3

    (tmp_path / "words.txt").write_text("a")
    before = rule_values(Listed(words_file=str(tmp_path / "words.txt")))
    assert before == {"rule": "Listed", "words_file": content_of(tmp_path / "words.txt"), "limit": 3}
    (tmp_path / "words.txt").write_text("other")
    assert rule_values(Listed(words_file=str(tmp_path / "words.txt"))) != before


def test_source_that_is_made_for_a_test_needs_three_fields():
    assert Source(name="s", kind="k", description="d").needed_bytes == float("inf")
