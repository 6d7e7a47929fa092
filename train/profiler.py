"""Where the time of a step goes, kernel by kernel: --profile-steps of a run, and any trace of torch.profiler.

    python -m train.profiler runs/mine/profile/trace.json.gz

A run leaves in profile/ of its folder trace.json.gz, which chrome://tracing and ui.perfetto.dev show, and times.json:
{"steps", "wall_ms", "busy_ms", "groups": [{"group", "ms", "launches"}], "kernels": [{"name", "group", "ms",
"launches"}]}, milliseconds and launches a step of rank 0. Recording slows Python, and the GPU where it waits for it.
"""

import argparse
import gzip
import json
import sys
import time
from collections import defaultdict
from pathlib import Path

from train.run_dir import write_json

# Kernels by what is in their lower-case names; the first group that fits counts. Without a GPU, PyTorch's operations.
GROUPS = (
    ("communication", ("nccl", "c10d::", "gloo")),
    ("attention", ("sdpa", "flash", "fmha", "attention", "_attn", "varlen")),
    ("scan", ("_scan_", "chunk_scan", "chunk_state", "state_passing", "bmm_chunk", "decays", "ssd")),
    ("convolution", ("conv",)),
    ("cross entropy", ("cross_entropy", "softmax", "nll_loss")),
    ("optimizer", ("adam", "multi_tensor", "foreach", "lpnorm", "normtwo", "muon", "optim")),
    ("norms", ("norm", "gammabeta", "rowwise_moments")),
    ("casts", ("bfloat16_copy", "bfloat16tofloat32", "float8_copy", "_cast", "_quant", "_amax", "_to_copy")),
    (
        "products, fp8",
        ("nvjet_q", "nvjet_sm90_q", "nvjet_sm90_r", "nvjet_sm100_q", "nvjet_sm100_r", "e4m3", "e5m2", "scaled_mm"),
    ),
    ("products", ("nvjet", "gemm", "cutlass", "xmma", "cublas", "splitk", "::mm", "::addmm", "::bmm", "::matmul")),
    ("embedding", ("embedding", "index", "gather", "scatter")),
    ("copies", ("copy", "memcpy", "memset", "fill", "catarray", "::cat", "::clone")),
    ("element-wise", ("elementwise", "swiglu", "silu", "sigmoid", "gating", "rotary", "add", "mul", "div", "triton_")),
)
GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
SHOWN = 40  # kernels in times.json


class Profiler:
    """Records plan.profile_steps on rank 0; on other ranks, and without that flag, it does nothing.

    with Profiler(...) as profiler: each step calls begin(step).
    """

    def __init__(self, plan, run_dir, metrics):
        """metrics: rank 0's, None on the others."""
        self.steps = plan.profile_steps if metrics else None
        self.folder, self.metrics, self.recorder = run_dir.path / "profile", metrics, None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if self.recorder and error is None:
            self._finish()

    def begin(self, step):
        """A step begins, and the one before it is over."""
        if self.recorder and step > self.steps[1]:
            self._finish()
        if self.steps and step == self.steps[0]:
            wait_for_gpu()
            from torch.profiler import profile  # its default: the CPU, and the GPU where there is one

            self.recorder = profile()
            self.recorder.start()
            self.began = time.perf_counter()

    def _finish(self):
        wait_for_gpu()
        seconds = time.perf_counter() - self.began
        self.recorder.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / "trace.json.gz"
        self.recorder.export_chrome_trace(str(trace))
        self.recorder = None
        first, last = self.steps
        times = {"steps": [first, last], **kernel_times(read_trace(trace), seconds * 1e3, last - first + 1)}
        write_json(self.folder / "times.json", times)
        self.metrics.event("profile", last, f"steps {first} to {last} are recorded in {self.folder}\n{lines(times)}")


def wait_for_gpu():
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def read_trace(path):
    """The events of a trace, packed or not. Raises ValueError, naming the file, if it is none."""
    path = Path(path)
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            return json.loads(file.read())["traceEvents"]
    except (ValueError, KeyError, TypeError, EOFError, gzip.BadGzipFile):
        raise ValueError(f"{path} is no trace of torch.profiler, or damaged") from None


def group_of(name):
    name = name.lower()
    return next((group for group, parts in GROUPS if any(part in name for part in parts)), "other")


def kernel_times(events, wall_ms=None, n_steps=1):
    """The times of times.json, a step.

    events: of a trace; wall_ms: of all its steps, if known. Where nothing ran on a GPU, each operation of the CPU
    counts without those that it calls. busy_ms: when at least one kernel ran, so two at a time count once there.
    """
    work = [(e["ts"], e["dur"], e["name"]) for e in events if e.get("cat") in GPU_WORK]
    work = work or list(own_times(e for e in events if e.get("cat") == "cpu_op"))
    by_kernel = defaultdict(lambda: [0.0, 0])
    busy = end = 0.0
    for start, duration, name in sorted(work):
        by_kernel[name][0] += duration
        by_kernel[name][1] += 1
        busy += max(0.0, start + duration - max(end, start))
        end = max(end, start + duration)

    def a_step(microseconds):
        return round(microseconds / 1e3 / n_steps, 3)

    kernels = [
        {"name": name, "group": group_of(name), "ms": a_step(us), "launches": count / n_steps}
        for name, (us, count) in sorted(by_kernel.items(), key=lambda item: -item[1][0])
    ]
    by_group = defaultdict(lambda: [0.0, 0.0])
    for kernel in kernels:
        by_group[kernel["group"]][0] += kernel["ms"]
        by_group[kernel["group"]][1] += kernel["launches"]
    groups = [
        {"group": group, "ms": round(ms, 3), "launches": count}
        for group, (ms, count) in sorted(by_group.items(), key=lambda item: -item[1][0])
    ]
    wall = None if wall_ms is None else round(wall_ms / n_steps, 3)
    return {"wall_ms": wall, "busy_ms": a_step(busy), "groups": groups, "kernels": kernels[:SHOWN]}


def own_times(operations):
    """Yield (start, duration, name) of each operation's own parts: what it spends outside those that it calls."""
    by_thread = defaultdict(list)
    for e in operations:
        by_thread[e["pid"], e["tid"]].append((e["ts"], -e["dur"], e["name"]))
    for thread in by_thread.values():
        inside = []  # the operations that are under way: [end, name, where its next own part begins]
        for start, minus_duration, name in [*sorted(thread), (float("inf"), 0.0, "")]:
            while inside and inside[-1][0] <= start:
                end, ended, since = inside.pop()
                yield since, end - since, ended
                if inside:
                    inside[-1][2] = end
            if inside:
                yield inside[-1][2], start - inside[-1][2], inside[-1][1]
            inside.append([start - minus_duration, name, start])


def lines(times, n_kernels=5):
    """The groups, and the longest kernels, as lines for a terminal."""
    busy = times["busy_ms"] or 1.0
    shown = [
        f"  {g['ms']:10.2f} ms {g['ms'] / busy:6.1%} {g['launches']:8.0f} x  {g['group']}" for g in times["groups"]
    ]
    shown += [f"  {k['ms']:10.2f} ms {k['ms'] / busy:6.1%} {k['launches']:8.0f} x    {k['name'][:80]}"
              for k in times["kernels"][:n_kernels]]  # fmt: skip
    wall = "" if times["wall_ms"] is None else f" of {times['wall_ms']:.1f} ms"
    return "\n".join([f"  busy {times['busy_ms']:.1f} ms{wall} a step:", *shown])


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trace", help="trace.json or trace.json.gz of torch.profiler")
    parser.add_argument("--steps", type=int, default=1, help="steps that it holds (default: 1)")
    parser.add_argument("--kernels", type=int, default=20, help="kernels to show (default: 20)")
    flags = parser.parse_args(argv)
    try:
        if flags.steps < 1:
            raise ValueError(f"--steps {flags.steps} is too small; allowed: 1 or more")
        print(lines(kernel_times(read_trace(flags.trace), n_steps=flags.steps), flags.kernels))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
