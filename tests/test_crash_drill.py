"""The crash drill in its long form: kills, edits and other settings at random for many minutes, byte by byte right.

It runs only when asked: BRAID_LONG_DRILL=5 (minutes) python -m pytest -s tests/test_crash_drill.py
The short form is in test_stages.py.
"""

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import zstandard

MINUTES = float(os.environ.get("BRAID_LONG_DRILL", 0))
SEED = int(os.environ.get("BRAID_DRILL_SEED", 0))
ROOT = Path(__file__).resolve().parents[1]
SYLLABLES = [a + b for a in "bdfgklmnprstv" for b in ("a", "e", "i", "o", "u")]
KILLS = ("group", "parent", "worker")
# Small pieces and shards, so that there are many of them.
LAUNCH = """
import sys
from dataclasses import replace
from curation.pipeline import main
from curation.recipe import RECIPES
RECIPES["own"] = replace(RECIPES["own"], piece_mb=0.05, shard_tokens=20_000)
if __name__ == "__main__":
    sys.exit(main())
"""
pytestmark = pytest.mark.skipif(not MINUTES, reason="takes minutes: BRAID_LONG_DRILL=<minutes>")


def text_of(seed, n_words=150):
    draw = random.Random(seed)
    vocabulary = ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 4))) for _ in range(120)]
    return " ".join(draw.choices(vocabulary, k=n_words)) + "."


def write_file(path, draw):
    """A new file of a random format, a part of its documents copies of those of other files, sometimes damaged."""
    seeds = [draw.randrange(4000) for _ in range(draw.randint(5, 300))]
    data = b"".join(json.dumps({"text": text_of(seed)}).encode() + b"\n" for seed in seeds)
    pack, suffix = draw.choice(
        [(bytes, ".jsonl"), (gzip.compress, ".jsonl.gz"), (zstandard.compress, ".jsonl.zst"), (bytes, ".txt")]
    )
    data = pack(data)
    if draw.random() < 0.2:
        data = data[: draw.randrange(len(data))]
    path.with_name(path.name + suffix).write_bytes(data)


def change_something(texts, options, draw, n_done):
    """A file more, less or other, or another option; says which."""
    change = draw.choice(["add", "add", "remove", "rewrite", "vocab-size", "heldout-percent", "nothing"])
    files = sorted(texts.iterdir())
    if change == "add" or len(files) < 3:
        write_file(texts / f"{draw.randrange(16)}-{n_done}", draw)
    elif change == "remove":
        draw.choice(files).unlink()
    elif change == "rewrite":
        path = draw.choice(files)
        path.unlink()
        write_file(path.with_name(path.name.split(".")[0]), draw)
    elif change == "vocab-size":
        options["--vocab-size"] = draw.choice(["512", "520", "530"])
    elif change == "heldout-percent":
        options["--heldout-percent"] = draw.choice(["3", "7"])
    return change


def start(texts, out, options, workers):
    flags = [flag for option in options.items() for flag in option]
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH, "--recipe", "own", "--input", str(texts), "--out", str(out),
         "--workers", str(workers), "--update", *flags],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def workers_of(process):
    """Processes of the run that do its tasks: children of the fork server."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            _, _, fields = (folder / "stat").read_text().rpartition(")")
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        group, parent = int(fields.split()[2]), int(fields.split()[1])
        if group == process.pid and parent not in (process.pid, os.getpid()) and b"forkserver" in command:
            found.append(int(folder.name))
    return found


def kill(process, how, draw):
    if how == "worker":
        workers = workers_of(process)
        if workers:
            os.kill(draw.choice(workers), signal.SIGKILL)
        return bool(workers)
    (os.killpg if how == "group" else os.kill)(process.pid, signal.SIGKILL)
    process.wait()
    return True


def contents(out):
    """Every file of a data folder and the manifest, without the time in it and its sum."""
    files = {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.relative_to(out).parts[0] != "work"
    }
    manifest = json.loads(files.pop("manifest.json"))
    for name in ("created_utc", "sha256"):
        del manifest[name]
    return files, manifest


def finish(process):
    """Wait for a run to end well; seconds."""
    started = time.monotonic()
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error.decode()
    return time.monotonic() - started


def test_runs_killed_and_changed_for_minutes_end_as_if_nothing_had_been(tmp_path):
    draw = random.Random(SEED)
    texts, out, fresh = tmp_path / "texts", tmp_path / "data", tmp_path / "fresh"
    texts.mkdir()
    for n in range(8):
        write_file(texts / f"{n}", draw)
    options = {"--vocab-size": "512", "--heldout-percent": "3"}
    counts, ends = Counter(), time.monotonic() + 60 * MINUTES
    length = 4.0  # seconds of an undisturbed run
    while time.monotonic() < ends:
        counts[change_something(texts, options, draw, counts["rounds"])] += 1
        kills = [draw.choice(KILLS) for _ in range(draw.randint(1, 6))]
        for n, how in enumerate(kills):
            if how == "worker" and "worker" in kills[:n]:
                continue  # a document over which two workers died is poisonous, as it should be
            process = start(texts, out, options, draw.randint(1, 3))
            time.sleep(draw.uniform(0.3, 1) * length)
            if process.poll() is None:
                counts[how] += kill(process, how, draw)
            if how == "worker" and process.poll() is None:  # the run goes on, for a while
                time.sleep(draw.uniform(0, 0.3) * length)
                kill(process, "group", draw)
            _, error = process.communicate()
            assert process.returncode in (0, -signal.SIGKILL), error.decode()
            if process.returncode == 0:
                break
        finish(start(texts, out, options, draw.randint(1, 3)))
        shutil.rmtree(out / "work/attempts", ignore_errors=True)
        length = finish(start(texts, fresh, options, 2))
        files, manifest = contents(out)
        expected, expected_manifest = contents(fresh)
        assert {name for name in files | expected if files.get(name) != expected.get(name)} == set()
        assert manifest == expected_manifest
        entry = manifest["funnel"]["own"]
        lost = sum(rule["documents"] for rule in entry["dropped"].values())
        assert entry["read"]["documents"] == entry["kept"]["documents"] + lost
        assert not list((out / "work").glob("*/*.part"))
        shutil.rmtree(fresh)
        counts["rounds"] += 1
    print(dict(counts))
    assert counts["rounds"] and sum(counts[how] for how in KILLS)
