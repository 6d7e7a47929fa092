"""What starts a run on many nodes: rendered, read again by the programs it is for or stand-ins, and run for real."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from launching import ROOT, free_port
from network import network, on

from launch.cluster import main
from launch.run_flags import split_words
from train.exit_codes import BAD_INPUT, DONE, FAILED, HUNG, INTERRUPTED, REQUEUE
from train.run_dir import read_metrics

RUN = ["--size", "tiny", "--steps", "4", "--save-every", "0", "--eval-every", "0"]
TARGETS = {
    "pdsh": ["pdsh", "--hosts", "a,b"],
    "slurm": ["slurm"],
    "torchrun": ["torchrun", "--hosts", "a,b"],
    "kubernetes": ["kubernetes", "--image", "braid:1"],
}
CPU = ["--env", "DS_ACCELERATOR=cpu", "--env", "OMP_NUM_THREADS=1", "--env", "CUDA_VISIBLE_DEVICES="]


def render(target, out, *more, run=(), nodes=2, gpus=1):
    words = [*target, "--nodes", str(nodes), "--gpus-per-node", str(gpus), "--out", str(out), *more]
    assert main([*map(str, words), "--", *map(str, run or [*RUN, "--data", "data/none"])]) == 0
    return out


def run_all(commands, timeout=120, cwd=None):
    """Run them at the same time; their exit codes and what they printed."""
    processes = [
        subprocess.Popen(
            command, env=os.environ | env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for command, env in commands
    ]
    try:
        told = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], told


# ---- rendering


@pytest.mark.parametrize("target", TARGETS)
def test_each_target_has_the_flags_of_the_run_in_scripts_that_bash_reads(target, tmp_path):
    run = [*RUN, "--data", "data/my own"] if target != "pdsh" else [*RUN, "--data", "data/own"]
    render(TARGETS[target], tmp_path, "--preflight", "--env", "NCCL_DEBUG=WARN", run=run)
    for script in [*tmp_path.glob("*.sh"), *tmp_path.glob("*.sbatch")]:
        assert subprocess.run(["bash", "-n", script]).returncode == 0
    text = "".join(path.read_text() for path in tmp_path.iterdir())
    assert f"train/launch.py {shlex.join(run)}" in text
    assert re.search(rf"launch\.doctor .*-- {re.escape(shlex.join(run))}", text)
    assert "NCCL_DEBUG" in text and not list(tmp_path.glob("*.part"))


def test_pdsh_has_a_hostfile_with_slots_and_the_environment_that_the_nodes_get(tmp_path):
    render(TARGETS["pdsh"], tmp_path, "--env", "GLOO_SOCKET_IFNAME=eth0", nodes=2, gpus=4,
           run=[*RUN, "--data", "x", "--micro-batch", "1"])  # fmt: skip
    assert (tmp_path / "hostfile").read_text() == "a slots=4\nb slots=4\n"
    settings = dict(line.split("=", 1) for line in (tmp_path / ".deepspeed_env").read_text().splitlines())
    assert settings["GLOO_SOCKET_IFNAME"] == "eth0"
    assert settings["PATH"].split(":")[0] == str(Path(sys.executable).parent)


def test_slurm_asks_for_a_task_a_gpu_and_for_a_signal_before_the_limit(tmp_path):
    render(["slurm"], tmp_path, "--time", "12:00:00", "--grace-seconds", "300", "--sbatch=--account=lab", gpus=4,
           run=[*RUN, "--data", "x", "--micro-batch", "1"])  # fmt: skip
    options = re.findall(r"^#SBATCH (.*)$", (tmp_path / "run.sbatch").read_text(), re.MULTILINE)
    assert {"--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--time=12:00:00", "--signal=USR1@300",
            "--requeue", "--open-mode=append", "--account=lab"} <= set(options)  # fmt: skip


def test_kubernetes_manifest_is_a_service_and_a_job_that_treats_exit_codes(tmp_path):
    render(TARGETS["kubernetes"], tmp_path, "--volume", "corpus:/data", "--env", "A=1", "--grace-seconds", "300",
           gpus=4, run=[*RUN, "--data", "/data/x", "--run", "/data/My_Run", "--micro-batch", "1"])  # fmt: skip
    service, job = yaml.safe_load_all((tmp_path / "run.yaml").read_text())
    assert (service["kind"], service["metadata"]["name"]) == ("Service", "my-run")
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    assert (pod["restartPolicy"], pod["subdomain"]) == ("Never", "my-run")  # podFailurePolicy asks for Never
    actions = {
        code: rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {}).get("values", [])
    }
    assert actions == {BAD_INPUT: "FailJob", INTERRUPTED: "FailJob", REQUEUE: "Ignore"}
    assert pod["terminationGracePeriodSeconds"] == 300
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 4}
    assert {"name": "A", "value": "1"} in container["env"]
    assert {volume["name"] for volume in pod["volumes"]} == {m["name"] for m in container["volumeMounts"]}
    assert container["command"][2].rstrip().endswith("--resume")
    assert subprocess.run(["bash", "-n", "-c", container["command"][2]]).returncode == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["slurm", "--nodes", "3"], "--batch-tokens 512 is not a multiple of 768 (3 processes x 4 sequences"),
        (["slurm", "--nodes", "0"], "--nodes 0"),
        (["slurm", "--nodes", "2", "--time", "soon"], "--time 'soon'"),
        (["slurm", "--nodes", "2", "--hosts", "a,b"], "--hosts"),
        (["pdsh", "--nodes", "2", "--hosts", "a"], "--hosts a are 1 names, and --nodes is 2"),
        (["pdsh", "--nodes", "2", "--hosts", "a,$b"], "'$b' is not the name"),
        (["pdsh", "--nodes", "1", "--hosts", "a", "--env", "A=b c"], "--env 'A=b c'"),
        (["kubernetes", "--nodes", "2"], "--image"),
        (["kubernetes", "--nodes", "2", "--image", "x", "--volume", "data"], "--volume 'data'"),
        (["kubernetes", "--nodes", "2", "--image", "x", "--max-restarts", "-1"], "--max-restarts -1 is too small"),
        (["ray", "--nodes", "2"], "invalid choice: 'ray'"),
        (["slurm", "--nodes", "2", "--port", "80"], "--port 80"),
        (["slurm", "--nodes", "2", "--", "--sise", "tiny", "--data", "x"], "--sise"),
        (["slurm", "--nodes", "2", "--", "--size", "tiny", "--data", "x", "--ds-config", "none.json"], "none.json"),
    ],
)
def test_wrong_flags_are_one_line_and_nothing_is_written(words, said, tmp_path, capsys):
    own, run = split_words(words)
    own += ["--gpus-per-node", "1", "--out", str(tmp_path / "out")]
    assert main([*own, "--", *(run or [*RUN, "--data", "data/none"])]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err
    assert not (tmp_path / "out").exists()


def test_a_file_where_the_folder_should_be_is_refused_in_one_line(capsys):
    flags = ["slurm", "--nodes", "2", "--gpus-per-node", "1", "--out", __file__, "--", *RUN, "--data", "data/none"]
    assert main(flags) == BAD_INPUT
    assert capsys.readouterr().err == f"error: --out {__file__} cannot be written: File exists; give a folder\n"


def test_without_out_a_single_file_is_printed_as_it_is(capsys):
    assert main(["slurm", "--nodes", "2", "--gpus-per-node", "1", "--", *RUN, "--data", "x"]) == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n")


def test_commands_of_the_readmes_render(tmp_path, monkeypatch, capsys):
    text = "".join((ROOT / name).read_text() for name in ("README.md", "launch/README.md")).replace("\\\n", " ")
    commands = re.findall(r"^(?: {4})?python -m launch\.cluster (.*)$", text, re.MULTILINE)
    assert {command.split()[0] for command in commands} == set(TARGETS)
    monkeypatch.chdir(tmp_path)
    for command in commands:
        assert main(shlex.split(command)) == 0, capsys.readouterr().err


# ---- torchrun


def test_torchrun_script_on_two_nodes_trains(data, tmp_path):
    run = [*RUN, "--data", data, "--run", tmp_path / "run"]
    render(["torchrun", "--hosts", "localhost,other"], tmp_path / "out", "--port", free_port(), *CPU, run=run)
    codes, told = run_all([(["bash", tmp_path / "out/run.sh"], {})] * 2)
    assert codes == [0, 0], told
    assert [row["step"] for row in read_metrics(tmp_path / "run/metrics.jsonl")] == [1, 2, 3, 4]


CHILD = """
import os, signal, sys, time
def leave(number, frame):
    time.sleep(2)  # saves
    os._exit(75)
signal.signal(signal.SIGTERM, leave)
signal.signal(signal.SIGUSR1, leave)
open(sys.argv[1] + os.environ["RANK"], "w").close()
what = sys.argv[2]
if what == "wait":
    time.sleep(60)
if what == "kill" and os.environ["RANK"] == "0":
    os.kill(os.getpid(), 9)
sys.exit(int(what) if what.isdigit() else 0)
"""


def test_pods_of_kubernetes_meet_and_end_with_the_runs_exit_code(tmp_path):
    """With a stand-in for the run; the leader is the pod of index 0, though the other comes first."""
    port = free_port()
    render(TARGETS["kubernetes"], tmp_path / "out", "--port", port, "--workdir", tmp_path, "--name", "x")
    _, job = yaml.safe_load_all((tmp_path / "out/run.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    (tmp_path / "train").mkdir()
    (tmp_path / "train/launch.py").write_text(CHILD.replace("sys.argv[2]", '"75"').replace("sys.argv[1]", '"up"'))
    command = container["command"][:2] + [container["command"][2].replace(f"x-0.x:{port}", f"127.0.0.1:{port}")]
    pod = {"POD_IP": "127.0.0.1", "PYTHONPATH": str(ROOT)}
    codes, told = run_all([(command, pod | {"JOB_COMPLETION_INDEX": i}) for i in ("1", "0")], cwd=tmp_path)
    assert codes == [REQUEUE, REQUEUE], told
    assert {path.name for path in tmp_path.glob("up*")} == {"up0", "up1"}


@pytest.mark.parametrize(
    ("what", "number", "code"),
    [
        ("0", 0, DONE),
        ("2", 0, BAD_INPUT),
        ("kill", 0, 137),
        ("wait", "SIGTERM", REQUEUE),
        ("wait", "SIGUSR1", REQUEUE),
    ],
)
def test_torchrun_of_ours_passes_signals_on_and_ends_with_the_processes_exit_code(what, number, code, tmp_path):
    (tmp_path / "child.py").write_text(CHILD)
    command = [sys.executable, "-m", "launch.torchrun", "--standalone", "--nproc-per-node=2", tmp_path / "child.py",
               tmp_path / "up", what]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        if number:
            while len(list(tmp_path.glob("up*"))) < 2 and process.poll() is None:
                time.sleep(0.1)
            process.send_signal(getattr(signal, number))
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, out


# ---- Slurm

SRUN = """#!/usr/bin/env python3
import os, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
n = int(os.environ["SLURM_NTASKS"])
tasks = [
    subprocess.Popen(words, env=os.environ | {"SLURM_PROCID": str(i), "SLURM_LOCALID": "0", "SLURM_NODEID": str(i)})
    for i in range(n)
]
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'localhost\\nother\\n'; else echo "$@" >> "$LOG"; fi
"""


def sbatch(folder, script, job_id):
    """Run a batch script as Slurm would, on two nodes of one task, with stand-ins for its programs."""
    (folder / "bin").mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    job = {
        "PATH": f"{folder}/bin:{os.environ['PATH']}", "LOG": f"{folder}/scontrol.log", "SLURM_JOB_ID": str(job_id),
        "SLURM_JOB_NODELIST": "nodes[1-2]", "SLURM_NTASKS": "2",
    }  # fmt: skip
    (code,), (told,) = run_all([(["bash", script], job)])
    log = folder / "scontrol.log"
    return code, told, log.read_text() if log.exists() else ""


def test_slurm_script_trains_on_a_task_of_each_node(data, tmp_path):
    run = [*RUN, "--data", data, "--run", tmp_path / "run"]
    render(["slurm"], tmp_path / "out", *CPU, run=run)
    code, told, log = sbatch(tmp_path, tmp_path / "out/run.sbatch", free_port() % 12000)
    assert code == 0, told
    assert len(read_metrics(tmp_path / "run/metrics.jsonl")) == 4
    assert log == ""


@pytest.mark.parametrize(
    ("code", "saves", "again"),
    [(DONE, True, False), (BAD_INPUT, True, False), (INTERRUPTED, True, False), (REQUEUE, False, True),
     (HUNG, True, True), (HUNG, False, False), (FAILED, True, True), (137, False, False)],
)  # fmt: skip
def test_slurm_script_requeues_what_may_go_on(code, saves, again, tmp_path):
    """Asked to leave: always. Broken: if the start that broke has saved, so that no job starts for ever."""
    run = tmp_path / "run"
    (run / "checkpoints/step_0000004").mkdir(parents=True)
    python = tmp_path / "python"
    python.write_text(f"#!/bin/bash\n{f'mkdir -p {run}/checkpoints/step_0000008' if saves else ':'}\nexit {code}\n")
    python.chmod(0o755)
    render(["slurm"], tmp_path / "out", "--python", python, run=[*RUN, "--data", "data/none", "--run", run])
    ended, told, log = sbatch(tmp_path, tmp_path / "out/run.sbatch", 7)
    assert (ended, log) == (code, "requeue 7\n" if again else ""), told


def test_slurm_script_stops_where_the_preflight_finds_a_broken_node(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\ncase "$*" in *launch.doctor*) echo "$@"; exit 1 ;; esac\ntouch "$LOG.started"\n')
    python.chmod(0o755)
    render(["slurm"], tmp_path / "out", "--preflight", "--python", python)
    code, told, log = sbatch(tmp_path, tmp_path / "out/run.sbatch", 7)
    assert (code, log) == (FAILED, ""), told
    assert "-m launch.doctor --hosts=localhost,other -- --size tiny" in told
    assert not (tmp_path / "scontrol.log.started").exists()


# ---- pdsh, on two hosts that are network namespaces of this machine

HOSTS = {"braidC": "10.79.0.1", "braidD": "10.79.0.2"}
SSHD_PORT = 2279


@pytest.fixture
def hosts():
    """Two hosts with sshd; yields what ssh needs to reach them."""
    with network(HOSTS, "pdsh", "sshd", "ssh-keygen"), tempfile.TemporaryDirectory(prefix="hosts") as folder:
        for key in ("host", "id"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{folder}/{key}"], check=True)
        Path("/run/sshd").mkdir(exist_ok=True)
        for name, address in HOSTS.items():
            options = {
                "Port": SSHD_PORT, "ListenAddress": address, "HostKey": f"{folder}/host", "PidFile": "none",
                "AuthorizedKeysFile": f"{folder}/id.pub", "StrictModes": "no", "UsePAM": "no",
            }  # fmt: skip
            words = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
            log = ["-E", f"{folder}/{name}.log"]
            sshd = [shutil.which("sshd"), "-D", "-f", "/dev/null", *words, *log]
            subprocess.Popen([*on(name), *sshd])
        time.sleep(1)
        yield (
            f"-i {folder}/id -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR "
            "-o BatchMode=yes"
        )


def test_pdsh_script_tests_two_hosts_and_trains_across_them(hosts, data, tmp_path):
    run = [*RUN, "--data", data, "--run", tmp_path / "run"]
    target = ["pdsh", "--hosts", ",".join(HOSTS.values()), "--ssh-port", SSHD_PORT, "--preflight", "--env",
              "GLOO_SOCKET_IFNAME=eth0", "--env", f"PYTHONPATH={ROOT}", *CPU]  # fmt: skip
    render(target, tmp_path / "out", run=run)
    script = tmp_path / "out/run.sh"
    # on two cores that others use, the nodes' rates are not alike
    script.write_text(script.read_text().replace("launch.doctor --", "launch.doctor --least-of-median 0.05 --"))
    command = [*on("braidC"), "bash", script]
    (code,), (told,) = run_all([(command, {"PDSH_SSH_ARGS_APPEND": hosts})], timeout=150)
    assert code == 0, told[-4000:]
    assert "preflight: fine (nodes: 2, processes: 2)" in told
    assert "  10.79.0.2  " in told
    assert len(read_metrics(tmp_path / "run/metrics.jsonl")) == 4
