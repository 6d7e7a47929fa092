"""Curation on a Ray cluster of two hosts, which are two network namespaces of this machine that share its disk."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from network import network, on

ROOT = Path(__file__).resolve().parents[1]
HOSTS = {"braidA": "10.78.0.1", "braidB": "10.78.0.2"}

DRIVER = """
import sys
from dataclasses import replace
from curation import pipeline
from curation.recipe import RECIPES
from which_host import WhichHost

RECIPES["own"] = replace(RECIPES["own"], piece_mb=0.02, rules={"own": (WhichHost(),)})
if __name__ == "__main__":
    sys.exit(pipeline.main(sys.argv[1:]))
"""

RULE = """
import os, time
from dataclasses import dataclass

@dataclass(frozen=True)
class WhichHost:
    def check(self, text, metadata):
        import ray
        with open(os.environ["WHICH_HOST_FILE"], "a") as file:
            file.write(ray.util.get_node_ip_address() + "\\n")
        time.sleep(0.02)  # long enough for the other host to get its share
        return None
"""


@pytest.fixture
def ray_folder():
    """Short, because sockets with long paths cannot be."""
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        yield folder


@pytest.fixture
def hosts():
    with network(HOSTS):
        yield


def on_host(name, *command, environment):
    return subprocess.run(
        [*on(name), *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )


def test_two_hosts_share_the_work_and_give_the_bytes_of_one(hosts, ray_folder, tmp_path):
    pytest.importorskip("ray")
    from test_stages import contents, write_rows

    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(8):
        write_rows(texts / f"{i}.jsonl", range(20 * i, 20 * i + 20))
    (tmp_path / "which_host.py").write_text(RULE)
    (tmp_path / "driver.py").write_text(DRIVER)
    ray = str(Path(sys.executable).with_name("ray"))
    environment = {
        **{name: value for name, value in os.environ.items() if "proxy" not in name.lower()},
        "PYTHONPATH": f"{ROOT}:{tmp_path}",
        "WHICH_HOST_FILE": str(tmp_path / "hosts"),
        "RAY_ADDRESS": "10.78.0.1:6399",
        "RAY_DEDUP_LOGS": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0" * 64,
    }
    memory = ["--num-cpus", "1", "--object-store-memory", "100000000", "--disable-usage-stats"]
    without = {name: value for name, value in environment.items() if name != "RAY_ADDRESS"}
    head = on_host(
        "braidA", ray, "start", "--head", "--port", "6399", "--node-ip-address", "10.78.0.1",
        "--include-dashboard", "false", "--temp-dir", ray_folder, *memory, environment=without,
    )  # fmt: skip
    assert head.returncode == 0, head.stdout + head.stderr
    worker = on_host(
        "braidB", ray, "start", "--address", "10.78.0.1:6399", "--node-ip-address", "10.78.0.2", *memory,
        environment=without,
    )  # fmt: skip
    assert worker.returncode == 0, worker.stdout + worker.stderr

    def curate(host, out, *flags):
        command = [sys.executable, str(tmp_path / "driver.py"), "--recipe", "own", "--input", str(texts)]
        command += ["--out", str(out), "--vocab-size", "512", "--workers", "2", *flags]
        done = on_host(host, *command, environment=environment)
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
        return contents(out)

    two = curate("braidA", tmp_path / "two", "--executor", "ray")
    seen = (tmp_path / "hosts").read_text().split()
    assert set(seen) == set(HOSTS.values()) and len(seen) == 160
    assert curate("braidA", tmp_path / "one") == two
    assert json.loads((tmp_path / "two/manifest.json").read_text())["funnel"]["own"]["read"]["documents"] == 160
