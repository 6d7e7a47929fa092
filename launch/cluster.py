"""What starts a run on many nodes, for four ways to start one, from the same flags. Needs no torch.

python -m launch.cluster slurm --nodes 4 --gpus-per-node 8 --out launch/13B -- --size 13B --data data/eight
    pdsh        hostfile, .deepspeed_env and run.sh: DeepSpeed's own launcher, over ssh from one of the nodes
    slurm       run.sbatch: one task a GPU; requeues itself when the run was asked to leave, or broke after saving
    torchrun    run.sh, to be started on every node: rendezvous (c10d) at the first
    kubernetes  run.yaml: an indexed Job with a headless Service, torchrun in each pod

What stands behind `--` are the flags of train/launch.py. They are checked before anything is written. Without --out
the files are printed. With --preflight, launch.doctor tests the nodes first, and a broken one stops the start.
"""

import argparse
import json
import re
import shlex
import sys
from pathlib import Path

from curation.shards import new_file
from launch.run_flags import OneLineParser, find_manifest, parse_run, plan_run, run_folder, split_words
from train.config import flag
from train.exit_codes import BAD_INPUT, DONE, INTERRUPTED, REQUEUE

TRAIN = "train/launch.py"


# ---- what every target has


def check(flags: argparse.Namespace, words: list[str]) -> None:
    """Fill in what was left open. Raises ValueError, in one line, for a cluster or a run that cannot be."""
    if flags.nodes < 1 or flags.gpus_per_node < 1:
        raise ValueError(f"--nodes {flags.nodes} and --gpus-per-node {flags.gpus_per_node}: allowed are 1 or more")
    if not 1024 <= flags.port < 65535:
        raise ValueError(f"--port {flags.port} is out of range; allowed: 1024 to 65534, and the next one is used too")
    for setting in flags.env:
        if not re.fullmatch(r"[A-Za-z_]\w*=[\w@%+=:,./-]*", setting):
            raise ValueError(f"--env {setting!r} is not NAME=VALUE without blanks, quotes and signs of a shell")
    config = parse_run(words)
    manifest = find_manifest(config)
    plan_run(config, flags.nodes * flags.gpus_per_node, manifest)
    least = {"grace_seconds": 1, "max_restarts": 0, "ssh_port": 1}
    for option in least.keys() & vars(flags).keys():
        value = getattr(flags, option)
        if value is not None and value < least[option]:
            raise ValueError(f"{flag(option)} {value} is too small; allowed: {least[option]} or more")
    name = re.sub(r"[^a-z0-9]+", "-", (flags.name or run_folder(config).name).lower()).strip("-")
    if not name or len(name) > 50:
        raise ValueError(
            f"--name {flags.name or str(config.run)!r} gives no name; use up to 50 letters, digits and dashes"
        )
    flags.name, flags.run, flags.size, flags.data_is_here = name, config.run, config.size, manifest is not None


def host_names(flags: argparse.Namespace) -> list[str]:
    names = flags.hosts.split(",")
    if len(names) != flags.nodes or len(set(names)) != len(names):
        raise ValueError(f"--hosts {flags.hosts} are {len(set(names))} names, and --nodes is {flags.nodes}")
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.:-]*", name):
            raise ValueError(f"--hosts: {name!r} is not the name or address of a host")
    return names


def heading(flags: argparse.Namespace) -> str:
    data = "" if flags.data_is_here else "; its data is not on the machine that wrote this, so --data was not checked"
    return (
        f"# {flags.size} on {flags.nodes} nodes x {flags.gpus_per_node} GPUs, by launch.cluster {flags.target}{data}"
    )


def exports(flags: argparse.Namespace) -> list[str]:
    return [f"export {setting}" for setting in flags.env]


def program(words: list[str], resume: bool) -> str:
    """train/launch.py with its flags, as a shell reads them."""
    return shlex.join([TRAIN, *words, *(["--resume"] if resume and "--resume" not in words else [])])


def doctor(words: list[str], hosts: str | None = None) -> str:
    """The preflight with its flags, as a shell reads them.

    hosts: the nodes' names in the order of ranks, or a shell's way to them; under torchrun there is no such order.
    """
    return f"launch.doctor {f'--hosts={hosts} ' if hosts else ''}-- {shlex.join(words)}"


def shell_script(lines: list[str]) -> str:
    return "\n".join(["#!/bin/bash", *lines]) + "\n"


# ---- targets: each returns {file name: text}


def pdsh(flags: argparse.Namespace, words: list[str]) -> dict[str, str]:
    hosts = host_names(flags)
    for word in words:
        if re.search(r"[\"'`$\\;&|<>()*?!#~]", word):
            raise ValueError(f"{word!r} would reach a shell on each node through pdsh; use none of its signs")
    bin_folder = Path(flags.python).parent
    settings = {"PATH": f"{bin_folder}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    settings |= dict(setting.split("=", 1) for setting in flags.env)
    ssh_port = f" --ssh_port={flags.ssh_port}" if flags.ssh_port else ""
    launcher = (
        f'{shlex.quote(str(bin_folder / "deepspeed"))} --hostfile="$here/hostfile" --launcher=pdsh --force_multi'
        f"{ssh_port} --no_ssh_check --master_addr={hosts[0]} --master_port={flags.port}"
    )
    lines = [
        heading(flags),
        "# Start it on the first node, which reaches the others, and itself, by ssh without a password. More flags of",
        f"# {TRAIN} may follow, such as --resume. The exit code is the run's.",
        "set -eu",
        'here=$(cd "$(dirname "$0")" && pwd)',
        f"cd {shlex.quote(flags.workdir)}",
        'export DS_ENV_FILE="$here/.deepspeed_env"  # by pdsh alone the nodes would have an empty environment',
        *exports(flags),
    ]
    if flags.preflight:
        lines.append(f"{launcher} --module {doctor(words, flags.hosts)}")
    lines.append(f'exec {launcher} {program(words, resume=False)} "$@"')
    return {
        "hostfile": "".join(f"{host} slots={flags.gpus_per_node}\n" for host in hosts),
        ".deepspeed_env": "".join(f"{key}={value}\n" for key, value in settings.items()),
        "run.sh": shell_script(lines),
    }


def slurm(flags: argparse.Namespace, words: list[str]) -> dict[str, str]:
    if any("\n" in option or not option.startswith("--") for option in flags.sbatch):
        raise ValueError(f"--sbatch {flags.sbatch}: options of sbatch begin with two dashes, such as --account=x")
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", flags.time):
        raise ValueError(f"--time {flags.time!r} is not a time limit of Slurm, such as 24:00:00 or 7-00:00:00")
    options = [
        f"--job-name={flags.name}",
        f"--nodes={flags.nodes}",
        f"--ntasks-per-node={flags.gpus_per_node}",
        f"--gpus-per-node={flags.gpus_per_node}",
        f"--time={flags.time}",
        f"--signal=USR1@{flags.grace_seconds}",
        "--requeue",
        "--open-mode=append",
        f"--output={shlex.quote(f'{flags.workdir}/{flags.name}-%j.log')}",
        *flags.sbatch,
    ]
    python, run = shlex.quote(flags.python), shlex.quote(str(Path(flags.run)))
    hosts = '"$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd, -)"'
    lines = [
        heading(flags),
        *(f"#SBATCH {option}" for option in options),
        f"# SIGUSR1, {flags.grace_seconds} seconds before the limit: the run finishes its step, saves and leaves.",
        "# To stop it for good: scancel --signal=INT JOB. A plain scancel is a preemption: save, leave.",
        "set -u",
        "trap : TERM USR1  # they are for the run, whose exit code we wait for",
        f"cd {shlex.quote(flags.workdir)} || exit {BAD_INPUT}",
        *exports(flags),
        'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))",
        "export MASTER_ADDR MASTER_PORT",
        "# A task is a process with a GPU. Slurm's words for its place become those that the programs read.",
        "place='export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID'",
        f"place+=' GROUP_RANK=$SLURM_NODEID LOCAL_WORLD_SIZE={flags.gpus_per_node}; exec \"$@\"'",
        "# --wait: when one task has ended, the others have so many seconds to",
        'on_every_gpu() { srun --kill-on-bad-exit=0 --wait=120 bash -c "$place" task "$@"; }',
        f"newest() {{ ls -d {run}/checkpoints/step_*[0-9] 2>/dev/null | tail -n 1; }}",
        "",
    ]
    if flags.preflight:
        lines += [f"on_every_gpu {python} -u -m {doctor(words, hosts)} || exit", ""]
    lines += [
        "before=$(newest)",
        "code=0",
        f"on_every_gpu {python} -u {program(words, resume=True)} || code=$?",
        "case $code in",
        f"    {DONE} | {BAD_INPUT} | {INTERRUPTED}) ;;  # done, wrong flags, or a person's Ctrl-C: it stays stopped",
        f"    {REQUEUE})  # saved, and asked to leave",
        '        echo "requeued: it was asked to leave, and saved"',
        '        scontrol requeue "$SLURM_JOB_ID" ;;',
        "    *)  # broken or hung: again, but not for ever without a new checkpoint",
        '        if [ "$(newest)" != "$before" ]; then',
        '            echo "requeued: it ended with exit code $code, after $(newest)"',
        '            scontrol requeue "$SLURM_JOB_ID"',
        "        fi ;;",
        "esac",
        "exit $code",
    ]
    return {"run.sbatch": shell_script(lines)}


def torchrun_command(
    flags: argparse.Namespace, host: str, port: int, run_id: str, more: str = "", module: bool = False
) -> str:
    # the last `--`: else torchrun takes flags of the run, such as --run, for short forms of its own
    end = " -m --" if module else " --"
    return (
        f"{shlex.quote(flags.python)} -m launch.torchrun --nnodes={flags.nodes} --nproc-per-node={flags.gpus_per_node}"
        f" --rdzv-backend=c10d --rdzv-endpoint={host}:{port} --rdzv-id={run_id}{more} --max-restarts=0{end}"
    )


def torchrun(flags: argparse.Namespace, words: list[str]) -> dict[str, str]:
    first = host_names(flags)[0]
    lines = [
        heading(flags),
        f"# Start it on every node; they meet at {first}, one of them. More flags of {TRAIN} may follow, such as",
        "# --resume. The exit code is the run's.",
        "set -eu",
        f"cd {shlex.quote(flags.workdir)}",
        *exports(flags),
    ]
    if flags.preflight:  # at the next port: a late node must not meet the nodes of the run at their doctor's
        command = torchrun_command(flags, first, flags.port + 1, f"{flags.name}-preflight", module=True)
        lines.append(f"{command} {doctor(words)}")
    lines.append(f'exec {torchrun_command(flags, first, flags.port, flags.name)} {program(words, resume=False)} "$@"')
    return {"run.sh": shell_script(lines)}


def kubernetes(flags: argparse.Namespace, words: list[str]) -> dict[str, str]:
    name, mounts, volumes = flags.name, [("shm", "/dev/shm")], ["shm"]
    for volume in flags.volume:
        claim, colon, path = volume.partition(":")
        if not re.fullmatch(r"[a-z0-9.-]+", claim) or not colon or not re.fullmatch(r"/[\w./-]*", path):
            raise ValueError(
                f"--volume {volume!r} is not CLAIM:/PATH, a PersistentVolumeClaim and where it is mounted"
            )
        mounts.append((claim, path))
        volumes += [claim] if claim not in volumes else []
    more = ' --local-addr="$POD_IP" --rdzv-conf=is_host="$([ "$JOB_COMPLETION_INDEX" = 0 ] && echo 1 || echo 0)"'
    script = []
    if flags.preflight:
        command = torchrun_command(flags, f"{name}-0.{name}", flags.port + 1, f"{name}-preflight", more, module=True)
        script.append(f"{command} {doctor(words)} || exit")
    command = torchrun_command(flags, f"{name}-0.{name}", flags.port, name, more)
    script.append(f"exec {command} {program(words, resume=True)}")
    text = json.dumps  # a string of JSON is one of YAML
    settings = [setting.split("=", 1) for setting in flags.env]
    lines = [
        heading(flags),
        "# kubectl apply -f run.yaml. Each pod is a node; they find the first by the Service. An evicted node, and a",
        "# run that was asked to leave and saved, begin anew without limit; after failures backoffLimit counts.",
        "# Kubernetes 1.31 or newer (podFailurePolicy).",
        "apiVersion: v1",
        "kind: Service",
        f"metadata: {{name: {name}}}",
        "spec:",
        "  clusterIP: None",
        "  publishNotReadyAddresses: true",
        f"  selector: {{batch.kubernetes.io/job-name: {name}}}",
        "---",
        "apiVersion: batch/v1",
        "kind: Job",
        f"metadata: {{name: {name}}}",
        "spec:",
        "  completionMode: Indexed",
        f"  completions: {flags.nodes}",
        f"  parallelism: {flags.nodes}",
        f"  backoffLimit: {flags.max_restarts * flags.nodes}  # {flags.max_restarts} times every pod",
        "  podFailurePolicy:",
        "    rules:",
        "    - action: FailJob  # wrong flags, or a person's Ctrl-C: starting again would end the same way",
        f"      onExitCodes: {{containerName: train, operator: In, values: [{BAD_INPUT}, {INTERRUPTED}]}}",
        "    - action: Ignore  # asked to leave, and saved",
        f"      onExitCodes: {{containerName: train, operator: In, values: [{REQUEUE}]}}",
        "    - action: Ignore  # evicted or preempted",
        "      onPodConditions: [{type: DisruptionTarget}]",
        "  template:",
        "    spec:",
        f"      subdomain: {name}",
        "      restartPolicy: Never",
        f"      terminationGracePeriodSeconds: {flags.grace_seconds}",
        "      containers:",
        "      - name: train",
        f"        image: {text(flags.image)}",
        f"        workingDir: {text(flags.workdir)}",
        "        command:",
        "        - bash",
        "        - -c",
        "        - |",
        *(f"          {line}" for line in script),
        "        env:",
        "        - {name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}",
        *(f"        - {{name: {key}, value: {text(value)}}}" for key, value in settings),
        f"        resources: {{limits: {{nvidia.com/gpu: {flags.gpus_per_node}}}}}",
        "        volumeMounts:",
        *(f"        - {{name: {volume}, mountPath: {text(path)}}}" for volume, path in mounts),
        "      volumes:",
        "      - {name: shm, emptyDir: {medium: Memory}}  # NCCL's, and larger than the 64 MiB that a pod has",
        *(f"      - {{name: {claim}, persistentVolumeClaim: {{claimName: {claim}}}}}" for claim in volumes[1:]),
    ]
    return {"run.yaml": "\n".join(lines) + "\n"}


# ---- command line


def make_parser() -> argparse.ArgumentParser:
    every = argparse.ArgumentParser(add_help=False)
    every.add_argument("--nodes", type=int, required=True)
    every.add_argument("--gpus-per-node", type=int, required=True, help="processes on a node, one a GPU")
    every.add_argument("--name", help="of the job (default: the run folder's)")
    every.add_argument("--port", type=int, default=29500, help="where the processes meet (default: 29500)")
    every.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="set on every node; repeatable"
    )
    every.add_argument("--workdir", default=str(Path.cwd()), help="this repository on the nodes (default: here)")
    every.add_argument("--python", default=sys.executable, help="Python on the nodes (default: the one at work)")
    every.add_argument("--preflight", action="store_true", help="run launch.doctor first")
    every.add_argument("--out", help="a folder to write to (default: print)")
    hosts = argparse.ArgumentParser(add_help=False)
    hosts.add_argument("--hosts", required=True, metavar="NAME,NAME", help="the nodes, the first of which leads")
    grace = argparse.ArgumentParser(add_help=False)
    grace.add_argument(
        "--grace-seconds", type=int, default=600, help="time to finish a step and save when asked to leave (600)"
    )

    parser = OneLineParser(
        prog="launch.cluster", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    targets = parser.add_subparsers(dest="target", required=True, metavar="pdsh|slurm|torchrun|kubernetes")

    def add(render, *parents):
        target = targets.add_parser(render.__name__, parents=[every, *parents], allow_abbrev=False)
        target.set_defaults(render=render)
        return target

    add(pdsh, hosts).add_argument("--ssh-port", type=int, help="of sshd on the nodes (default: ssh's own)")
    add(torchrun, hosts)
    target = add(slurm, grace)
    target.add_argument("--time", default="24:00:00", help="limit of one start (default: 24:00:00)")
    target.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="another of sbatch's, such as --account=x"
    )
    target = add(kubernetes, grace)
    target.add_argument("--image", required=True, help="of a container that has --python")
    target.add_argument(
        "--volume", action="append", default=[], metavar="CLAIM:/PATH", help="a PersistentVolumeClaim; repeatable"
    )
    target.add_argument("--max-restarts", type=int, default=3, help="after failures (default: 3)")
    return parser


def main(argv: list[str] | None = None) -> int:
    own, words = split_words(sys.argv[1:] if argv is None else argv)
    try:
        flags = make_parser().parse_args(own)
        check(flags, words)
        files: dict[str, str] = flags.render(flags, words)
        if flags.out is None:
            for name, text in files.items():
                print(text if len(files) == 1 else f"# ---- {name}\n{text}", end="")
            return 0
        for name, text in files.items():
            try:
                with new_file(Path(flags.out) / name) as file:
                    file.write(text.encode())
            except OSError as error:
                raise ValueError(f"--out {flags.out} cannot be written: {error.strerror}; give a folder") from None
            print(Path(flags.out) / name)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
