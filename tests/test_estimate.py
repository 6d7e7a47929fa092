"""The planner as a program: from any folder, without torch, in one JSON object."""

import json
import subprocess
import sys

from launching import ROOT

from launch.estimate import main
from model.config import PRESETS


def test_estimate_prints_json_from_another_folder(tmp_path):
    command = [sys.executable, str(ROOT / "launch/estimate.py"), "--size", "nano", "--json"]
    result = json.loads(subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout)
    assert result["parameters"] == PRESETS["nano"].n_parameters
    assert result["parameters"] == sum(result["parameters_by_part"].values())


def test_table_shows_every_part(capsys):
    assert main(["--size", "6.7B"]) == 0
    printed = capsys.readouterr().out
    for part in PRESETS["6.7B"].parameters_by_part:
        assert part in printed


def test_unknown_size_gets_one_line_and_exit_code_2(capsys):
    assert main(["--size", "7B"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown size '7B'; choose one of ")
