"""Every command of the README, run as it stands there, in a copy of the repository, with less text and fewer steps."""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from launching import ROOT, free_port

from model.config import PRESETS
from train.config import TrainConfig, add_flags, make_config

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]
ONLY_LOOKED_AT = ("make test", "make check", "make drill")  # they would run these tests, or take minutes
NEEDS_GPUS = ("--num_gpus=8", "--hostfile")


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The files of this checkout in a new folder, with this environment as its .venv."""
    folder = tmp_path_factory.mktemp("clone") / "braid"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in names:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def run(command, folder):
    """Run one line of the README; smaller: 0.4 MB a source, six steps."""
    small = {
        "STEPS": "6", "CURATE_ARGS": "--limit-mb 0.4 --vocab-size 1024",
        "SAMPLE_ARGS": "--max-tokens 8", "PATH": f"{folder}/.venv/bin:{os.environ['PATH']}",
    }  # fmt: skip
    command = re.sub(r"--stop-after (\d)0\b", r"--stop-after \1", command)
    command = re.sub(r"step_(\d+)(\d)0\b", r"step_0\1\2", command)  # the step that the shorter run reaches
    command = command.replace("deepspeed ", f"deepspeed --master_port={free_port()} ")
    result = subprocess.run(
        command, shell=True, cwd=folder, env=os.environ | small, capture_output=True, text=True, timeout=400
    )
    assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}"
    return result.stdout


def test_readme_opens_with_the_two_commands():
    assert COMMANDS[:2] == ["make demo", "make test"]


def test_every_command_of_the_readme_works(clone):
    for command in COMMANDS:
        if command in ONLY_LOOKED_AT:
            run(command.replace("make", "make -n"), clone)
        elif any(mark in command for mark in NEEDS_GPUS):
            check_flags(command)
        else:
            run(command, clone)
    assert (clone / "data/local/manifest.json").is_file()
    for name in ("config.json", "metrics.jsonl", "checkpoints/step_0000006", "eval/step_0000006.json", "report.html"):
        assert (clone / "runs/demo" / name).exists(), name
    assert (clone / "runs/gated/report.html").is_file()


def check_flags(command):
    """A command for a cluster: the script is there and takes these flags; its data are not a few files of text."""
    words = shlex.split(command)
    script = words.index("train/launch.py")
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_flags(parser, TrainConfig)
    config, _ = make_config(vars(parser.parse_args(words[script + 1 :])))
    assert config.size in PRESETS
    assert re.search(rf"^make curate RECIPE=eight .*OUT={config.data}\b", README, re.MULTILINE), config.data
    assert config.ds_config is None or (ROOT / config.ds_config).is_file()


def test_demo_trains_on_the_folder_that_it_curates(tmp_path):
    command = ["make", "-n", "demo", "RECIPE=own", "INPUT=texts", f"OUT={tmp_path}/data", f"RUN={tmp_path}/run"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert f"--recipe own --out {tmp_path}/data " in shown and f"--data {tmp_path}/data " in shown


def test_every_make_target_named_in_the_readme_exists_and_is_listed():
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in set(re.findall(r"(?:`|^)make ([a-z-]+)", README, re.MULTILINE)):
        assert re.search(rf"^  make {target} ", listed, re.MULTILINE), target


def test_size_table_shows_the_true_counts():
    for size in ("1.3B", "2.7B", "6.7B", "13B"):
        config = PRESETS[size]
        row = next(line for line in README.splitlines() if line.startswith(f"| {size} |"))
        assert f"{config.n_parameters / 1e9:.2f}B" in row
        assert f"{config.flops_per_token / 1e9:.1f} GFLOP" in row
        assert config.layer_pattern in row


def test_every_file_that_the_readme_links_to_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
