"""What launch.doctor measures and looks up on one node, without the others.

A finding is what the table shows; a problem is one line that says what is wrong with the node.
"""

import hashlib
import os
import platform
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch

from curation.shards import file_names, file_problem, manifest_sha256, open_shard, read_manifest, verify_files
from launch.run_flags import find_manifest, plan_run, run_folder
from train.config import Plan, TrainConfig
from train.run_dir import RunDir

ROOT = Path(__file__).resolve().parents[1]
GIB = 1 << 30
PRODUCT_SECONDS = 1.0
# Xid codes after which a GPU must be drained or reset; others may be a program's own fault (NVIDIA, "XID Errors").
FATAL_XIDS = {48: "double-bit ECC error", 64: "row remapping failed", 74: "NVLink error", 79: "fallen off the bus",
              95: "uncontained ECC error", 119: "GSP time-out", 120: "GSP error"}  # fmt: skip


# ---- versions


def versions() -> dict[str, str]:
    """What must be alike on all nodes."""
    found = {"python": platform.python_version()} | {p: version(p) for p in ("torch", "deepspeed", "numpy")}
    found["source"] = source_hash()
    if torch.cuda.is_available():
        found |= {
            "CUDA": str(torch.version.cuda),
            "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
            "GPU": torch.cuda.get_device_name(),
            "driver": nvidia_smi("driver_version")[0][0],
        }
    return found


def source_hash() -> str:
    """Of every Python and JSON file of ours: a commit would not tell edits that were not committed."""
    digest = hashlib.sha256()
    for folder in ("model", "curation", "train", "launch", "ds_configs"):
        for path in sorted((ROOT / folder).glob("*")):
            if path.suffix in (".py", ".json"):
                digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


# ---- GPUs


def nvidia_smi(*fields: str) -> list[list[str]]:
    """One list of values a GPU; [["?", ...]] where nvidia-smi does not answer."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return [["?"] * len(fields)]
    return [[value.strip() for value in line.split(",")] for line in answer.splitlines()] or [["?"] * len(fields)]


def health_problems(rows: list[list[str]]) -> list[str]:
    """rows: a GPU each, of index, uncorrected ECC errors since the driver started, remapping pending, and failed."""
    problems = []
    for index, errors, pending, failed in rows:
        if errors.isdigit() and int(errors):
            problems.append(f"GPU {index}: {errors} uncorrected ECC errors since its driver started")
        if failed in ("1", "Yes"):
            problems.append(f"GPU {index}: remapping of a broken memory row failed; it must be replaced")
        elif pending in ("1", "Yes"):
            problems.append(f"GPU {index}: a broken memory row waits to be remapped; reset the GPU")
    return problems


def xid_problems(kernel_log: str) -> list[str]:
    """The last of each GPU's fatal errors in the kernel's log."""
    last = {}
    for place, code in re.findall(r"NVRM: Xid \((PCI:[0-9a-fA-F:.]+)\): (\d+)", kernel_log):
        if int(code) in FATAL_XIDS:
            last[place] = f"GPU at {place}: Xid {code} in the kernel's log ({FATAL_XIDS[int(code)]})"
    return list(last.values())


def kernel_log() -> str:
    """Empty where it may not be read."""
    try:
        return subprocess.run(["dmesg"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def memory_problems(device: int) -> list[str]:
    """Write a pattern to nearly all memory of a GPU, then read it: bits that do not hold, and memory that is taken."""
    free, total = torch.cuda.mem_get_info(device)
    problems = []
    if total - free > 2 * GIB:  # a context of ours takes half of one
        problems.append(f"GPU {device}: {(total - free) / GIB:.0f} of {total / GIB:.0f} GiB are taken by a process")
    pattern = torch.arange(GIB // 8, device=device)
    chunks = [pattern ^ seed for seed in range(max(1, int(free / GIB) - 6))]  # the rest is for the comparison
    wrong = sum(int((chunk ^ seed != pattern).sum()) for seed, chunk in enumerate(chunks))
    if wrong:
        problems.append(f"GPU {device}: {wrong:,} of its memory's words did not hold what was written")
    del chunks, pattern
    torch.cuda.empty_cache()
    return problems


def product_tflops(device: torch.device, seconds: float = PRODUCT_SECONDS) -> float:
    """The usual rate of a square matrix product: bf16 on a GPU, float32 on a CPU. The median resists an outlier."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    rates: list[float] = []
    started = time.perf_counter()
    while len(rates) < 3 or time.perf_counter() - started < seconds:
        began = time.perf_counter()
        for _ in range(10):
            torch.matmul(a, b)
        finish(device)
        rates.append(10 * 2 * n**3 / (time.perf_counter() - began) / 1e12)
    return statistics.median(rates[1:])  # the first has the library's start in it


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def to_device_gb_s(device: torch.device) -> float:
    """Rate of copies from pinned host memory to a GPU."""
    host = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=device)
    times = []
    for _ in range(6):
        finish(device)
        began = time.perf_counter()
        there.copy_(host, non_blocking=True)
        finish(device)
        times.append(time.perf_counter() - began)
    return host.numel() / statistics.median(times[1:]) / 1e9


# ---- data and disk


def data_problems(folder: str, verify: bool) -> tuple[str | None, list[str]]:
    """(sha256 of the manifest or None, problems). verify: hash every file too, not only look at its size and end."""
    try:
        manifest = read_manifest(folder)
        names = file_names(manifest)
        if verify:
            verify_files(folder, names)
        problems = [file_problem(Path(folder), name, manifest["files"][name], read=False) for name in names]
        found = [problem for problem in problems if problem]
        if not found:
            for name in names:
                if name.startswith("train/") and name.endswith(".safetensors"):
                    int(open_shard(Path(folder) / name).tokens[-1])  # that it can be read, not only listed
    except (OSError, ValueError) as error:
        return None, [str(error)]
    more = f", and {len(found) - 1} more files are wrong" if len(found) > 1 else ""
    return manifest_sha256(folder), [found[0] + more] if found else []


def checkpoint_bytes(config: TrainConfig, plan: Plan) -> tuple[int, int]:
    """(how many checkpoints will lie in the run's folder at once, bytes of one at the most).

    Float32 weights and two moments: 12 bytes a parameter; less with Muon and 8-bit AdamW.
    """
    saves = 1 + (plan.last_step - 1) // config.save_every if config.save_every else 1
    at_once = min(saves, config.keep + 2) if config.keep else saves  # one of lowest loss, one that is being written
    return at_once, 12 * plan.model.n_parameters


def disk_problems(config: TrainConfig, world_size: int) -> tuple[int, list[str]]:
    """(free bytes where the run's folder is or will be, problems)."""
    try:
        plan = plan_run(config, world_size, find_manifest(config))
    except ValueError as error:  # of data that this node alone has, for the flags were checked
        return 0, [str(error)]
    folder = run_folder(config).absolute()
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    at_once, size = checkpoint_bytes(config, plan)
    present = sum(f.stat().st_size for path in RunDir(folder).checkpoints() for f in path.iterdir() if f.is_file())
    need = at_once * size - present
    if need <= free:
        return free, []
    return free, [
        f"{there} has {free / 1e9:.1f} GB free, and the checkpoints to come need {need / 1e9:.1f} "
        f"({at_once} of {size / 1e9:.1f} GB; --keep {config.keep}, --save-every {config.save_every})"
    ]


@contextmanager
def note_in(config: TrainConfig, name: str) -> Iterator[str | None]:
    """A small file in the run's folder, as long as the context lasts; yields what went wrong, or None."""
    folder, problem = run_folder(config), None
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    except OSError as error:
        problem = f"cannot write to the run's folder {config.run}: {error.strerror}"
    try:
        yield problem
    finally:
        (folder / name).unlink(missing_ok=True)
        if is_new and folder.is_dir():
            folder.rmdir()


def sees_note(config: TrainConfig, name: str, seconds: float = 5.0) -> bool:
    """Whether a file that another node wrote is seen here; some file systems take their time."""
    folder, deadline = run_folder(config), time.monotonic() + seconds
    while True:
        try:
            os.listdir(folder)  # has NFS ask again
            if (folder / name).read_text() == name:
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


# ---- all of it


def own_checks(config: TrainConfig | None, world_size: int, local_rank: int, local_size: int, verify: bool) -> dict:
    """Every test that needs no other process, for one rank: {"findings": {...}, "problems": [...], "able": bool}.

    What is of the node and not of a GPU is done by its first rank alone. able: fit for the tests of the links.
    """
    findings: dict = {"versions": versions()}
    problems: list[str] = []
    first = local_rank == 0
    device = torch.device("cpu")
    if torch.cuda.is_available():
        n = torch.cuda.device_count()
        if local_rank >= n:
            return {"findings": findings, "problems": [f"{n} GPUs for {local_size} processes"], "able": False}
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        if first:
            problems += health_problems(
                nvidia_smi(
                    "index", "ecc.errors.uncorrected.volatile.total", "remapped_rows.pending", "remapped_rows.failure"
                )
            )
            problems += xid_problems(kernel_log())
    else:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), len(os.sched_getaffinity(0)) // local_size)))
    try:
        if device.type == "cuda":
            problems += memory_problems(local_rank)
            findings["to_device_gb_s"] = to_device_gb_s(device)
        findings["product_tflops"] = product_tflops(device)
    except RuntimeError as error:  # what CUDA says; the rest of its message is advice
        problems.append(f"GPU {local_rank} fails: {str(error).splitlines()[0]}")
        return {"findings": findings, "problems": problems, "able": False}
    if first and config is not None:
        if not config.data.startswith("stream:"):  # that is read from elsewhere
            findings["manifest"], found = data_problems(config.data, verify)
            problems += found
        findings["free_bytes"], found = disk_problems(config, world_size)
        problems += found
    return {"findings": findings, "problems": problems, "able": True}
