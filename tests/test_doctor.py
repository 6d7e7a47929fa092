"""The preflight: nodes played by processes, each with something wrong that has to be named."""

import argparse
import json
import os
import random
import shutil
import socket
import subprocess
import sys

import pytest
from launching import ROOT
from network import network, on

from curation.shards import manifest_checksum
from launch.checks import FATAL_XIDS, checkpoint_bytes, disk_problems, health_problems, xid_problems
from launch.doctor import Findings, exchange_rounds, find_odd, find_slow, judge, main
from launch.run_flags import parse_run, plan_run

RUN = ["--size", "tiny", "--steps", "4"]
LIMITS = argparse.Namespace(least_of_median=0.85, least_of_peak=0.6, least_of_link=0.3, network_gb_s=0.0)


def start(ranks, *flags, faults=None, run=(), world_size=None, address="127.0.0.1", hosts=None):
    """Start a process for each rank, each a node of its own. faults: {rank: what is wrong with it}.

    hosts: network namespaces, one a rank.
    """
    processes, port, faults = {}, free_pair(), faults or {}
    for rank in ranks:
        place = {
            "RANK": rank, "WORLD_SIZE": world_size or len(ranks), "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1,
            "GROUP_RANK": rank, "MASTER_ADDR": address, "MASTER_PORT": port,
        }  # fmt: skip
        if hosts:
            place["GLOO_SOCKET_IFNAME"] = "eth0"
        command = on(hosts[rank]) if hosts else []
        command += [sys.executable, "tests/doctor_worker.py", faults.get(rank, "none"), *map(str, flags)]
        processes[rank] = subprocess.Popen(
            [*command, "--", *map(str, run[rank])] if run else command,
            cwd=ROOT, env=os.environ | {name: str(value) for name, value in place.items()},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    return processes


def free_pair():
    """A port that is free together with the next, below those that the system hands out to others."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as one, socket.socket() as two:
            try:
                one.bind(("127.0.0.1", port))
                two.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


def finish(processes, timeout=90):
    """{rank: (exit code, stdout, stderr)}; a rank that does not end by itself is killed."""
    ended = {}
    try:
        for rank, process in processes.items():
            out, err = process.communicate(timeout=timeout)
            ended[rank] = process.returncode, out, err
    finally:
        for process in processes.values():
            process.kill()
    return ended


def test_two_good_nodes_are_fine_and_nothing_is_left_behind(data, tmp_path):
    words = [*RUN, "--data", data, "--run", tmp_path / "run"]
    # two cores that others use too: their shares are not alike
    ended = finish(start([0, 1], "--hosts", "left,right", "--least-of-median", 0.1, run=[words, words]))
    assert [ended[rank][0] for rank in (0, 1)] == [0, 0], ended
    out = ended[0][1]
    assert "preflight: fine (nodes: 2, processes: 2)" in out
    assert "an all-reduce over 2 processes" in out
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip().startswith(("left", "right"))}
    assert all(rows[name].rstrip().endswith("fine") for name in ("left", "right"))
    assert ended[1][1] == ""
    assert not (tmp_path / "run").exists()


def test_every_broken_node_is_named_with_what_is_wrong(data, tmp_path):
    other, cut = tmp_path / "other", tmp_path / "cut"
    for folder in (other, cut):
        shutil.copytree(data, folder)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest |= {"recipe": "another"}
    (other / "manifest.json").write_text(json.dumps(manifest | {"sha256": manifest_checksum(manifest)}))
    (cut / "train/two-00000.safetensors").unlink()
    run = tmp_path / "run"
    run.mkdir()
    words = [[*RUN, "--batch-tokens", 1024, "--data", d, "--run", run] for d in (data, data, other, cut)]
    flags = ["--hosts", "good,slow,other,cut", "--least-of-median", 0.2]
    ended = finish(start(range(4), *flags, faults={1: "slow"}, run=words))
    assert [ended[rank][0] for rank in range(4)] == [1] * 4, ended
    lines = ended[0][1].splitlines()
    assert lines[-1] == "preflight: 3 of 4 nodes broken or slow: slow, other, cut"
    told = {name: [line for line in lines if line.startswith(f"{name}: ")] for name in ("slow", "other", "cut")}
    assert "slow: a matrix product runs at" in told["slow"][0] and "of the median" in told["slow"][0]
    assert told["other"][0].startswith("other: the data's manifest is ") and "on good and others" in told["other"][0]
    assert told["cut"] == [f"cut: {cut}/train/two-00000.safetensors is missing"]
    assert list(run.iterdir()) == []


def test_frozen_nodes_other_versions_and_a_wrong_clock_are_named_and_the_others_are_not():
    """Two nodes freeze: one in its own tests, one among the links, where the good ones wait for it."""
    flags = ["--hosts", "good,old,frozen,halted", "--test-seconds", 5, "--least-of-median", 0.1]
    started = start(range(4), *flags, faults={1: "neglected", 2: "frozen", 3: "frozen_link"})
    frozen = [started.pop(2), started.pop(3)]
    try:
        ended = finish(started)
    finally:
        for process in frozen:
            process.kill()
    assert [ended[rank][0] for rank in range(2)] == [1, 1], ended
    out = ended[0][1]
    assert "old: torch 1.0.0 here, " in out
    assert "old: its clock is +60" in out
    assert "frozen: rank 2 joined and then fell silent for 5 s" in out
    assert "halted: rank 3 fell silent in the tests of the links" in out
    assert out.splitlines()[-1] == "preflight: 3 of 4 nodes broken or slow: old, frozen, halted"


@pytest.fixture
def three_hosts():
    hosts = {f"braidE{i}": f"10.80.0.{i + 1}" for i in range(3)}
    with network(hosts, "tc"):
        yield list(hosts)


def test_host_with_a_slow_network_is_named_and_its_neighbours_are_not(three_hosts):
    limit = ["tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "200mbit", "burst", "64kb", "latency", "50ms"]
    limited = subprocess.run([*on(three_hosts[1]), *limit], capture_output=True, text=True)
    if limited.returncode:
        pytest.skip(f"the kernel cannot limit a rate: {limited.stderr.strip()}")
    flags = ["--hosts", "left,slow,right", "--least-of-median", 0.2]
    code, out, err = finish(start(range(3), *flags, address="10.80.0.1", hosts=three_hosts))[0]
    assert code == 1, err
    assert "slow: rank 1: the best link to another node runs at 0.02" in out  # 200 Mbit/s are 0.025 GB/s
    assert out.splitlines()[-1] == "preflight: 1 of 3 nodes broken or slow: slow"


def test_node_that_never_joins_is_named():
    code, out, _ = finish(start([0], "--hosts", "here,absent", "--join-seconds", 2, world_size=2))[0]
    assert code == 1
    assert out.splitlines()[-2:] == [
        "absent: rank 1 did not join within 2 s",
        "preflight: 1 of 2 nodes broken or slow: absent",
    ]


def test_rank_without_its_leader_ends_with_one_line():
    ended = finish(start([1], "--join-seconds", 2, world_size=2))
    code, _, err = ended[1]
    assert code == 1
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "does not answer within 2 s" in line and "rank 1 on " in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--fast"], "unrecognized arguments: --fast"),
        (["--", "--size", "tiny"], "required: --data"),
        (["--", "--size", "tiny", "--data", "x", "--batch-tokens", "500"], "--batch-tokens 500 is not a multiple"),
    ],
)
def test_wrong_flags_are_one_line_and_exit_code_2(words, said, capsys):
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and said in err


# ---- the parts


def findings(n=3, **more):
    return Findings(names={i: f"n{i}" for i in range(n)}, nodes={i: i for i in range(n)}, problems={}, **more)


def test_value_of_the_minority_is_odd_and_of_two_the_second():
    found = findings()
    find_odd(found, "torch", {0: "2", 1: "1", 2: "1"})
    assert found.problems == {0: ["torch 2 here, 1 on n1 and others"]}
    found = findings(2)
    find_odd(found, "torch", {0: "2", 1: "1"})
    assert found.problems == {1: ["torch 1 here, 2 on n0"]}


def test_slow_is_below_a_part_of_the_median_and_of_two_of_the_faster():
    found = findings()
    find_slow(found, "it runs at", "GB/s", [(0, "a: ", 10.0), (1, "b: ", 8.4), (2, "", 10.2)], 0.85)
    assert found.problems == {1: ["b: it runs at 8.4 GB/s, 84% of the median 10 (85%)"]}
    found = findings(2)
    find_slow(found, "it runs at", "GB/s", [(0, "", 10.0), (1, "", 5.0)], 0.85)
    assert list(found.problems) == [1]


def own(**more):
    return {"problems": [], "able": True, "findings": {"versions": {"GPU": "NVIDIA H200"}, **more}}


def test_gpu_below_its_peak_is_slow_though_all_are():
    found = findings(2)
    found.own = {0: own(product_tflops=400.0), 1: own(product_tflops=401.0)}
    judge(found, LIMITS)
    assert found.problems[0] == [
        "rank 0: a matrix product runs at 400 TFLOP/s, 40% of the H200 SXM 141 GB's 989 (60%)"
    ]


def test_cores_of_a_node_without_gpus_count_together():
    found = Findings(names={0: "a", 1: "b"}, nodes={0: 0, 1: 0, 2: 1, 3: 1}, problems={})
    rates = (0.9, 0.2, 0.5, 0.55)
    found.own = {
        r: {"problems": [], "findings": {"versions": {"torch": "2"}, "product_tflops": rates[r]}} for r in range(4)
    }
    judge(found, LIMITS)
    assert found.problems == {}


def test_node_with_slow_links_is_blamed_and_its_neighbours_are_not():
    found = findings(4)
    found.own = {rank: own(product_tflops=800.0) for rank in range(4)}
    found.asked = [0, 1, 2, 3]
    found.links = {  # a ring, of which node 1 is slow
        0: {"exchanges": [[1, 5.0], [3, 40.0]]}, 1: {"exchanges": [[0, 5.0], [2, 5.0]]},
        2: {"exchanges": [[3, 40.0], [1, 5.0]]}, 3: {"exchanges": [[2, 40.0], [0, 40.0]]},
    }  # fmt: skip
    judge(found, LIMITS)
    assert found.problems == {1: ["rank 1: the best link to another node runs at 5 GB/s, 12% of the median 40 (85%)"]}


def test_slow_links_within_a_node_are_named_against_the_others_and_the_peak():
    found = findings(2)
    found.own = {rank: own(product_tflops=800.0) for rank in range(2)}
    found.links = {0: {"exchanges": [], "node_gb_s": 300.0}, 1: {"exchanges": [], "node_gb_s": 20.0}}
    judge(found, LIMITS)
    assert list(found.problems) == [1]
    assert "7% of the median 300" in found.problems[1][0] and "4% of NVLink 4's 450" in found.problems[1][1]


def test_of_those_that_hang_the_first_in_line_are_blamed():
    found = findings()
    found.own = {rank: own(product_tflops=800.0) for rank in range(3)}
    found.asked = [0, 1, 2]
    found.links = {
        0: {"stuck": [2, "an exchange with node 1", "timed out"]},
        1: {"stuck": [2, "an exchange with node 0", "timed out"]},
        2: {"stuck": [3, "an exchange with node 1", "timed out"]},
    }
    judge(found, LIMITS)
    assert found.problems == {
        0: ["rank 0: an exchange with n1 did not end: timed out"],
        1: ["rank 1: an exchange with n0 did not end: timed out"],
    }


@pytest.mark.parametrize("n", range(2, 9))
def test_exchanges_take_each_pair_of_neighbours_once_and_no_node_twice_at_a_time(n):
    rounds = exchange_rounds(n)
    pairs = [frozenset(pair) for pairs in rounds for pair in pairs]
    assert len(pairs) == len(set(pairs)) == (1 if n == 2 else n)
    for pairs in rounds:
        nodes = [node for pair in pairs for node in pair]
        assert len(nodes) == len(set(nodes))


def test_gpus_with_memory_errors_are_named():
    rows = [["0", "0", "No", "No"], ["1", "3", "No", "No"], ["2", "0", "Yes", "No"], ["3", "0", "Yes", "Yes"]]
    rows.append(["4", "[N/A]", "[N/A]", "[N/A]"])
    named = health_problems(rows)
    assert [line.split(":")[0] for line in named] == ["GPU 1", "GPU 2", "GPU 3"]
    assert "must be replaced" in named[2]


def test_fatal_xids_of_the_kernel_log_are_named_and_a_programs_own_are_not():
    log = (
        "[1] NVRM: Xid (PCI:0000:1b:00): 31, pid=77, name=python, MMU Fault\n"
        "[2] NVRM: Xid (PCI:0000:3d:00): 79, pid='<unknown>', GPU has fallen off the bus.\n"
    )
    assert xid_problems(log) == ["GPU at PCI:0000:3d:00: Xid 79 in the kernel's log (fallen off the bus)"]
    assert 31 not in FATAL_XIDS


def test_disk_must_hold_the_checkpoints_to_come(data, tmp_path):
    config = parse_run(["--size", "6.7B", "--data", str(data), "--run", str(tmp_path), "--steps", "10", "--keep", "3",
                        "--save-every", "2", "--batch-tokens", "8192", "--seq-len", "512"])  # fmt: skip
    plan = plan_run(config, 1, None)
    n, size = checkpoint_bytes(config, plan)
    assert n == 5 and size == 12 * plan.model.n_parameters
    huge = parse_run(["--size", "13B", "--data", str(data), "--run", str(tmp_path / "new/run"), "--steps", "100000",
                      "--save-every", "1", "--keep", "0", "--batch-tokens", "4096", "--seq-len", "512"])  # fmt: skip
    _, problems = disk_problems(huge, 1)
    assert len(problems) == 1 and "--keep 0" in problems[0] and str(tmp_path) in problems[0]
    assert disk_problems(parse_run([*RUN, "--data", str(data), "--run", str(tmp_path)]), 1)[1] == []
