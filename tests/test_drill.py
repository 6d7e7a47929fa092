"""The drill in its short form, on two hosts that are network namespaces; without root it is left out."""

import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT

from launch.drill import FAULTS, check_machine, main


def test_the_short_drill_ends_as_expected_and_leaves_nothing_behind():
    try:
        check_machine()
    except ValueError as error:
        pytest.skip(str(error))
    probe = subprocess.run(
        ["unshare", "--net", "--pid", "--fork", "--mount-proc", "true"], capture_output=True, text=True
    )
    if probe.returncode:
        pytest.skip(f"no namespaces here: {probe.stderr.strip()}")
    done = subprocess.run(
        [sys.executable, "-m", "launch.drill", "--short"], cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")][2:]
    assert len(rows) == sum(fault.short for fault in FAULTS)
    assert all("as expected" in row for row in rows)
    assert "drill" not in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert "drill" not in Path("/proc/mounts").read_text()


def test_a_machine_that_cannot_play_two_hosts_is_told_so(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert main(["--short"]) == 2
    assert "needs root" in capsys.readouterr().err
