"""Whole curation runs on a small folder of text: the same bytes whatever is killed, changed, added, run elsewhere."""

import errno
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from datatrove.executor.local import LocalPipelineExecutor

from curation import decontaminate, pipeline, stages, steps, work, workers
from curation.executors import Share, pending, run_local, slurm_scripts
from curation.inputs import find_pieces
from curation.recipe import RECIPES, Settings
from curation.shards import main as shards_main
from curation.shards import read_manifest
from curation.stages import NAMES, Run, build
from curation.work import Progress, committed, note_death, read_attempts
from curation.workers import worker_processes

ROOT = Path(__file__).resolve().parents[1]
SYLLABLES = [a + b for a in "bdfgklmnprstv" for b in ("a", "e", "i", "o", "u")]


def text_of(seed, n_words=180):
    draw = random.Random(seed)
    vocabulary = ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 4))) for _ in range(120)]
    words = draw.choices(vocabulary, k=n_words)
    return "\n".join(" ".join(words[i : i + 11]) + "." for i in range(0, n_words, 11))


def write_rows(path, seeds):
    path.write_text("".join(json.dumps({"id": f"d{seed}", "text": text_of(seed)}) + "\n" for seed in seeds))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A user's folder: JSON lines with duplicates among them, and text files."""
    folder = tmp_path_factory.mktemp("texts")
    write_rows(folder / "a.jsonl", range(60))
    write_rows(folder / "b.jsonl", [*range(60, 100), *range(5)])
    for seed in range(100, 130):
        (folder / f"t{seed}.txt").write_text(text_of(seed))
    return folder


def command(texts, out, *flags):
    return [
        "--recipe", "own", "--input", str(texts), "--out", str(out), "--vocab-size", "512", "--workers", "2", *flags
    ]  # fmt: skip


def curate(texts, out, *flags):
    assert pipeline.main(command(texts, out, *flags)) == 0
    return contents(out)


def contents(out):
    """Every file of a data folder and the manifest, without what may differ: when, and the examples in its report."""
    files = {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.relative_to(out).parts[0] not in ("work", "report.html", "README.md")
    }
    manifest = json.loads(files.pop("manifest.json"))
    for name in ("created_utc", "sha256", "key"):
        del manifest[name]
    for entry in manifest["funnel"].values():
        for rule in entry["dropped"].values():
            del rule["examples"]  # the first of each piece
    del manifest["duplicates"]["examples"]
    return files, manifest


@pytest.fixture(scope="module")
def whole(texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "data"
    return curate(texts, out), out


def tasks_done(out):
    """When each finished task was made, by stage and key."""
    return {path: path.stat().st_mtime_ns for name in NAMES for path in (out / "work" / name).glob("*")}


def stage_counts(before, after):
    new = [path for path, mtime in after.items() if before.get(path) != mtime]
    return {name: sum(path.parent.name == name for path in new) for name in NAMES}


def test_run_finds_the_duplicates_and_leaves_nothing_out(whole):
    (files, manifest), out = whole
    entry = manifest["funnel"]["own"]
    assert entry["read"]["documents"] == 135
    assert entry["dropped"]["exact_duplicate"]["documents"] == 5
    assert entry["kept"]["documents"] == 130
    assert set(files) == set(manifest["files"])
    assert shards_main(["verify", str(out)]) == 0


def test_number_of_workers_and_size_of_pieces_do_not_change_a_byte(texts, whole, tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "own", replace(RECIPES["own"], piece_mb=0.1))
    assert curate(texts, tmp_path / "data", "--workers", "1") == whole[0]
    assert len(list((tmp_path / "data/work/read").iterdir())) > len(list((whole[1] / "work/read").iterdir()))


def test_runs_killed_at_random_moments_end_with_the_same_bytes(texts, whole, tmp_path):
    """The crash drill in short: all processes are killed wherever they are, each time a little further on."""
    out, draw = tmp_path / "data", random.Random(0)
    arguments = [sys.executable, "-m", "curation.pipeline", *command(texts, out)]
    kills = 0
    for progress in range(1, 13, 2):
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
        while process.poll() is None and len(list((out / "work").glob("*/" + "?" * 24 + "*"))) < progress:
            time.sleep(0.002)
        time.sleep(draw.random() * 0.1)
        if process.poll() is not None:
            break
        # sometimes the parent alone: its workers must not live on and write into the next run
        (os.killpg if kills % 2 else os.kill)(process.pid, signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 3
    assert curate(texts, out) == whole[0]


def test_finished_task_is_not_done_again_after_a_kill(texts, tmp_path):
    out = tmp_path / "data"
    arguments = [sys.executable, "-m", "curation.pipeline", *command(texts, out)]
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    while not list((out / "work/tokens").glob("?" * 24)):
        assert process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = tasks_done(out)
    curate(texts, out)
    after = tasks_done(out)
    assert {name: n for name, n in stage_counts(before, after).items() if name in ("read", "tokenizer")} == {
        "read": 0,
        "tokenizer": 0,
    }


def test_added_and_removed_files_and_changed_options_do_again_what_they_change(texts, whole, tmp_path):
    folder, out = tmp_path / "texts", tmp_path / "data"
    shutil.copytree(texts, folder)
    first = curate(folder, out)
    assert first == whole[0]
    before = tasks_done(out)

    write_rows(folder / "c.jsonl", range(200, 230))
    assert pipeline.main(command(folder, out)) == 2  # a finished folder is not changed unasked
    assert tasks_done(out) == before
    more = curate(folder, out, "--update")
    n_read = stage_counts(before, tasks_done(out))["read"]
    assert n_read == 1
    assert more[1]["funnel"]["own"]["read"]["documents"] == 165
    assert more == curate(folder, tmp_path / "fresh")

    (folder / "c.jsonl").unlink()
    before = tasks_done(out)
    assert curate(folder, out, "--update") == first
    assert not any(stage_counts(before, tasks_done(out)).values())  # all of it was done once

    before = tasks_done(out)
    curate(folder, out, "--update", "--vocab-size", "600")
    counts = stage_counts(before, tasks_done(out))
    assert (counts["read"], counts["duplicates"], counts["tokenizer"]) == (0, 0, 1) and counts["tokens"] > 0

    assert curate(folder, out, "--update", "--prune") == first
    fresh = tmp_path / "again"
    curate(folder, fresh)
    assert {p.relative_to(out) for p in tasks_done(out)} == {p.relative_to(fresh) for p in tasks_done(fresh)}


def test_unfinished_folder_goes_on_with_the_text_that_it_was_begun_with(texts, tmp_path, capsys):
    out, other = tmp_path / "data", tmp_path / "other"
    other.mkdir()
    write_rows(other / "a.jsonl", range(200, 240))
    assert pipeline.main(command(texts, out, "--stage", "read")) == 0
    with pytest.raises(FileNotFoundError, match=re.escape(f"(recipe own, input {texts})")):
        read_manifest(out)
    local = ["--recipe", "local", "--out", str(out)]
    for flags in (local, command(other, out), command(other, out, "--stage", "read")):
        assert pipeline.main(flags) == 2
        error = capsys.readouterr().err
        assert f'input is "{texts}" there, now ' in error and "add --update" in error and error.count("\n") == 1
    _, manifest = curate(other, out, "--update")
    assert manifest["funnel"]["own"]["read"]["documents"] == 40


def test_running_again_does_nothing_in_under_two_seconds(texts, whole):
    before = {path: path.stat().st_mtime_ns for path in whole[1].rglob("*")}
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "curation.pipeline", *command(texts, whole[1])],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert time.perf_counter() - started < 2
    assert done.returncode == 0 and "nothing to do" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in whole[1].rglob("*")} == before


# ---- workers that die, hang and break


def run_of(texts, work):
    settings = Settings.chosen("own", input=str(texts), vocab_size=512)
    return Run(settings=settings, work=work, pieces=find_pieces(settings, None, work))


def poison(tmp_path, monkeypatch, body):
    """A rule, in a module that workers can import, that does something bad at the document d7."""
    (tmp_path / "poison.py").write_text(
        "import os, time\nfrom dataclasses import dataclass\n\n@dataclass(frozen=True)\nclass Poison:\n"
        f"    def check(self, text, metadata):\n        if text == {text_of(7)!r}:\n            {body}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    module = importlib.reload(importlib.import_module("poison"))
    rules = {"own": (module.Poison(), *RECIPES["own"].rules["own"])}
    monkeypatch.setitem(RECIPES, "own", replace(RECIPES["own"], rules=rules))


@pytest.mark.parametrize("body", ["os.kill(os.getpid(), 9)", "raise MemoryError", "time.sleep(60)"])
def test_poisonous_document_is_quarantined_after_two_tries_and_counted(texts, tmp_path, monkeypatch, body):
    poison(tmp_path, monkeypatch, body)
    monkeypatch.setattr(workers, "HANGING_S", 2.0)
    work = tmp_path / "out/work"
    run = run_of(texts, work)
    with worker_processes(2, work) as processes:
        manifest = build(run, tmp_path / "out", lambda stage: run_local(stage, work, Share(), processes))
    entry = manifest["funnel"]["own"]
    assert entry["dropped"]["poisonous"]["documents"] == 1
    assert entry["dropped"]["poisonous"]["examples"][0]["text"] == text_of(7)[:500]
    assert entry["kept"]["documents"] == 129
    deaths = [json.loads(path.read_bytes()) for path in (work / "attempts").glob("*")]
    assert [sorted(death["suspects"].values()) for death in deaths] == ([] if "raise" in body else [[2]])


def test_task_that_kills_every_process_ends_the_run_with_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "DEATHS", 2)
    (tmp_path / "dying_step.py").write_text(
        "import os\n\ndef die(data, rank, world_size):\n    os.kill(os.getpid(), 9)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from dying_step import die

    executor = LocalPipelineExecutor([die], tasks=1, logging_dir=str(tmp_path / "log"), skip_completed=False)
    job = workers.Job(executor=executor, rank=0, task=workers.Task(key="0" * 64, size_bytes=1))
    died = pytest.raises(ChildProcessError, match="2 worker processes died over one task of 'read'.*--workers")
    with died as caught, worker_processes(1, tmp_path) as processes:
        workers.run_jobs(processes, tmp_path, [job], "read")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("n_failures", [2, 3])
def test_task_without_network_is_tried_again_after_the_others(tmp_path, monkeypatch, n_failures):
    (tmp_path / "offline_step.py").write_text(
        "def step(data, rank, world_size):\n"
        f"    with open({str(tmp_path / 'tried')!r}, 'a+') as file:\n"
        "        file.write(str(rank))\n        file.seek(0)\n        tries = file.read().count('0')\n"
        f"    if rank == 0 and tries <= {n_failures}:\n        raise ConnectionError('piece 0: no network')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    step = importlib.reload(importlib.import_module("offline_step")).step
    executor = LocalPipelineExecutor([step], tasks=3, logging_dir=str(tmp_path / "log"), skip_completed=False)
    jobs = [workers.Job(executor=executor, rank=i, task=workers.Task(key=str(i) * 64, size_bytes=1)) for i in range(3)]
    with worker_processes(1, tmp_path) as processes:
        if n_failures == 3:
            with pytest.raises(ConnectionError, match="piece 0: no network"):
                workers.run_jobs(processes, tmp_path, jobs, "read")
        else:
            workers.run_jobs(processes, tmp_path, jobs, "read")
    assert (tmp_path / "tried").read_text() == {2: "01200", 3: "01200"}[n_failures]


def test_process_in_the_place_of_a_dead_one_ends_with_the_others(tmp_path):
    with worker_processes(1, tmp_path) as (worker,):
        worker.kill()
        worker.pool.shutdown()
        worker.start()
        successor = worker.pool.submit(os.getpid).result()
    for _ in range(100):  # its fork server waits for it
        try:
            os.kill(successor, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError(f"process {successor} lives on")


def test_nothing_half_written_is_left_when_a_worker_died(tmp_path):
    with stages.only_writer(tmp_path):
        for name in ("read/a.host.1.part", "tokens/b.host.2.part", "tokens/whole"):
            (tmp_path / name).mkdir(parents=True)
            (tmp_path / name / "file").write_text("text")
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*")}
    assert left == {"tokens/whole"}


def test_no_document_is_to_blame_for_what_happens_while_the_next_one_is_read(texts, tmp_path, monkeypatch):
    run = run_of(texts, tmp_path)
    stage = run.stage("read")
    ((group, plan, _),) = pending(stage, tmp_path, Share())
    reader = group.pipeline(plan)[0]
    seen, read = [], steps.read_piece

    def watched(*arguments):
        for document in read(*arguments):
            seen.append(work.Pulse(tmp_path / "pulse").read()[3])
            yield document

    monkeypatch.setattr(steps, "read_piece", watched)
    work.start_pulse(tmp_path / "pulse")
    try:
        documents = reader.run(None, 0, len(group.tasks))
        at = [(document.id, work.Pulse(tmp_path / "pulse").read()[3]) for document in documents]
        assert set(seen) == {""} and len(at) == 135 and all(a == b for a, b in at)
    finally:
        work._pulse = None


def test_after_a_death_less_is_read_at_once(tmp_path):
    assert read_attempts(tmp_path, "0" * 64).smaller(1000) == 1000
    for n, rows in ((1, 125), (2, 15), (3, 1), (4, 1)):
        note_death(tmp_path, "0" * 64, "")
        attempts = read_attempts(tmp_path, "0" * 64)
        assert (attempts.deaths, attempts.smaller(1000), attempts.quarantined) == (n, rows, set())


def test_full_disk_ends_with_one_line_and_the_run_goes_on_when_there_is_room(
    texts, whole, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "data"

    def full(stage, *rest):
        raise OSError(errno.ENOSPC, "No space left on device")

    link = stages.link
    monkeypatch.setattr(stages, "link", full)
    assert pipeline.main(command(texts, out)) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0 and "No space left" in error and "make room" in error
    with pytest.raises(FileNotFoundError, match="unfinished"):
        read_manifest(out)
    monkeypatch.setattr(stages, "link", link)
    assert curate(texts, out) == whole[0]


def test_publishing_cut_off_anywhere_can_be_repeated(texts, whole, tmp_path, monkeypatch):
    out, rename = tmp_path / "data", os.rename
    curate(texts, out)
    for n_done in range(5):
        done = []

        def some(source, target, done=done, n_done=n_done):
            if len(done) == n_done:
                raise KeyboardInterrupt
            rename(source, target)
            done.append(target)

        (out / "manifest.json").unlink()  # so that there is something to publish
        monkeypatch.setattr(stages.os, "rename", some)
        assert pipeline.main(command(texts, out)) == 130
        assert not (out / "manifest.json").exists()
        monkeypatch.setattr(stages.os, "rename", rename)
        assert curate(texts, out) == whole[0]


@pytest.mark.parametrize("n", [1, 2])
def test_folder_with_nothing_held_out_says_so_and_what_to_do(tmp_path, capsys, n):
    (tmp_path / "texts").mkdir()
    for seed in range(n):
        (tmp_path / f"texts/{seed}.txt").write_text(text_of(seed, 600))
    curate(tmp_path / "texts", tmp_path / "data")
    warning = "no document is held out: a source needs two for that; give more text, or train with --eval-every 0\n"
    assert (warning in capsys.readouterr().out) == (n == 1)


def test_documents_that_hold_an_evaluation_item_go_and_are_named(texts, tmp_path):
    """An item of the suite is a passage of one document; a part of it stands in another."""
    (tmp_path / "items").mkdir()
    passage = " ".join(text_of(3).split())
    rows = [{"text": passage}, *({"text": " ".join(text_of(seed).split())} for seed in range(500, 560))]
    (tmp_path / "items/wikitext.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    index = str(tmp_path / "index")
    assert decontaminate.main(["build", "--items", str(tmp_path / "items"), "--out", index]) == 0
    _, manifest = curate(texts, tmp_path / "data", "--decontaminate", index)
    dropped = manifest["funnel"]["own"]["dropped"]
    assert dropped["contaminated"]["documents"] == 2  # the document and its exact copy, before the copies are sought
    assert manifest["contamination"]["benchmarks"] == {"wikitext": 2}
    example = manifest["contamination"]["examples"][0]
    assert example["evidence"]["matched"] in text_of(3) and len(example["evidence"]["matched"]) > 100


# ---- elsewhere


def test_datatroves_own_executor_gives_the_same_bytes(texts, whole, tmp_path):
    out = tmp_path / "data"
    run = run_of(texts, out / "work")

    def execute(stage):
        for group, plan, tasks in pending(stage, run.work, Share()):
            LocalPipelineExecutor(
                group.pipeline(plan),
                tasks=len(tasks),
                workers=1,
                logging_dir=str(run.work / "log" / f"{stage.name}-{group.name}"),
            ).run()

    build(run, out, execute)
    assert contents(out) == whole[0]


def test_shares_of_stages_on_several_hosts_give_the_same_bytes(texts, whole, tmp_path, capsys):
    out = tmp_path / "data"
    for name in NAMES:
        for share in (1, 0):  # in any order
            flags = ["--stage", name, "--share", f"{share}/2", "--workers", "1"]
            assert pipeline.main(command(texts, out, *flags)) == 0, capsys.readouterr().err
    assert pipeline.main(command(texts, out, "--stage", "publish")) == 0
    assert contents(out) == whole[0]


def test_stage_before_its_time_is_refused(texts, tmp_path, capsys):
    assert pipeline.main(command(texts, tmp_path / "data", "--stage", "tokens", "--share", "0/2")) == 2
    assert "stage read has" in capsys.readouterr().err
    assert pipeline.main(command(texts, tmp_path / "data", "--stage", "read", "--share", "2/2")) == 2
    assert "--share 2/2 is not a share" in capsys.readouterr().err


def test_slurm_scripts_run_as_they_are_and_give_the_same_bytes(texts, whole, tmp_path):
    """sbatch is played by a few lines that run a script once for each index of its array."""
    out, scripts = tmp_path / "data", tmp_path / "slurm"
    flags = ["--slurm", str(scripts), "--slurm-jobs", "2", "--slurm-cpus", "1", "--slurm-partition", "cpu"]
    assert pipeline.main(command(texts, out, *flags)) == 0
    assert "#SBATCH --array=0-1" in (scripts / "read.sbatch").read_text()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sbatch").write_text(
        "#!/bin/bash\nscript=${!#}\nlast=$(grep -oP 'array=0-\\K[0-9]+' $script)\n"
        "for i in $(seq 0 $last); do SLURM_ARRAY_TASK_ID=$i bash $script >> "
        f"{tmp_path}/log 2>&1 || exit 1; done\necho 42\n"
    )
    (tmp_path / "bin/sbatch").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    done = subprocess.run(["bash", str(scripts / "submit.sh")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (tmp_path / "log").read_text()[-2000:]
    assert done.stdout.count("job 42") == len(NAMES) + 1
    assert contents(out) == whole[0]


def test_ray_in_its_local_mode_gives_the_same_bytes(texts, whole, tmp_path):
    pytest.importorskip("ray")
    out = tmp_path / "data"
    done = subprocess.run(
        [sys.executable, "-m", "curation.pipeline", *command(texts, out, "--executor", "ray")],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "RAY_DEDUP_LOGS": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(out) == whole[0]


# ---- the parts


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(texts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(workers, "LINE_S", 0.0)
    curate(texts, tmp_path / "data")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("read:")]
    assert "documents=135" in lines[-1] and "B/s" in lines[-1] and "100%" in lines[-1]


def test_folder_of_a_task_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyboardInterrupt), committed(tmp_path / "read/key") as folder:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt
    assert not (tmp_path / "read/key").exists()
    for text in ("first", "second"):  # two processes did the same task: the first one's stays
        with committed(tmp_path / "read/key") as folder:
            (folder / "file").write_text(text)
    assert (tmp_path / "read/key/file").read_text() == "first"
    assert [path.name for path in (tmp_path / "read").iterdir() if path.name == "key"] == ["key"]


def test_shards_end_after_so_many_tokens_and_hold_every_document_once():
    draw = np.random.default_rng(0)
    documents = {
        "order": draw.integers(0, 2**64, 500, dtype=np.uint64),
        "lengths": draw.integers(1, 90, 500),
        "text_bytes": draw.integers(1, 90, 500),
    }
    plan = steps.PlanShards(Path(), Path(), shard_tokens=1000).shards_of(documents)
    edges = np.array([*plan["edges"], plan["last"] + 1], np.uint64)
    counts = [
        int(documents["lengths"][(documents["order"] >= a) & (documents["order"] < b)].sum())
        for a, b in zip(edges[:-1], edges[1:], strict=True)
    ]
    assert sum(counts) == plan["tokens"] == documents["lengths"].sum()
    assert all(910 <= n <= 1090 for n in counts[:-1])


def test_progress_counts_what_is_done_and_names_what_is_at_hand(tmp_path):
    work.start_pulse(tmp_path / "pulse")
    try:
        progress = Progress()
        progress.at("one", 10)
        progress.at("two \u00e9", 20)
        assert work.Pulse(tmp_path / "pulse").read() == (1, 10, 0, "two \u00e9")
        progress.done()
        assert work.Pulse(tmp_path / "pulse").read() == (2, 30, 0, "")
    finally:
        work._pulse = None


def test_slurm_scripts_chain_the_stages(tmp_path):
    files = slurm_scripts("python -m x", {"read": 4, "tokens": 4}, tmp_path, "1:00:00", "cpu", 8, 2)
    assert [file.name for file in files] == ["read.sbatch", "tokens.sbatch", "submit.sh"]
    assert "python -m x --stage read --share $SLURM_ARRAY_TASK_ID/4 --workers 8" in files[0].read_text()
    assert subprocess.run(["bash", "-n", str(files[2])]).returncode == 0
