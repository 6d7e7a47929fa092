"""What a run says while it goes. Used by rank 0 alone.

A progress line for people; metrics.jsonl and metrics.csv, an object and a row a step, for programs; events.jsonl, what
happened beside the steps; and the trackers that were asked for (train/trackers.py). train/watch.py reads these files.
"""

import csv
import io
import json
import os
import resource
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from curation.shards import new_file
from train.gpu_readings import GpuReadings
from train.hardware import gpu_of
from train.processes import processes_on_this_host
from train.run_dir import cut_metrics
from train.tail import Tail, flat_row
from train.trackers import start_trackers


class Metrics:
    """Writes down the steps and events of a run that goes on from first_step, and adds what this machine measures.

    To each row: `mfu` (where the GPU is known), `memory_gib`, the peak of what rank 0's GPU had allocated, and
    `memory_reserved_gib`; without a GPU the process's resident memory; and the GPUs' own readings, the worst or the
    sum over the run's GPUs on rank 0's machine.
    """

    def __init__(self, run_dir, config, plan, first_step, world_size, record):
        """record: what config.json says of the run."""
        run_dir.path.mkdir(parents=True, exist_ok=True)
        self.run_dir = run_dir
        self.rows = open(run_dir.metrics, "a")  # noqa: SIM115 - closed by close()
        self.events = open_lines(run_dir.events)
        self.table = Table(run_dir.metrics_csv, run_dir.metrics)
        self.started = time.monotonic()
        self.bar = tqdm(
            initial=first_step - 1, total=plan.last_step, unit="step", dynamic_ncols=True, smoothing=0.05,
            mininterval=0.2 if sys.stderr.isatty() else 10,  # a log file gets a line now and then
            bar_format="{desc} {percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
        )  # fmt: skip
        self.gpus = GpuReadings(processes_on_this_host())
        self.flops_per_token = plan.model.flops_per_token
        self.peak_flops = self._peak_flops(world_size, config, record)
        self.trackers = start_trackers(run_dir, config, first_step)

    def _peak_flops(self, world_size, config, record):
        """Floating-point operations a second of all GPUs together; None, and a line why, where there is no MFU."""
        if not torch.cuda.is_available():
            return None
        if not record["deepspeed"].get("bf16", {}).get("enabled"):
            self.say("MFU is left out: it is a part of the GPU's bf16 peak, and this run computes in float32")
            return None
        name = torch.cuda.get_device_name()
        gpu = gpu_of(name)
        if gpu is None:
            self.say(f"MFU is left out: the peak of {name} is not known; add it to train/gpus.json")
            return None
        peak = gpu.dense_tflops["bf16"]
        self.say(
            f"MFU: tokens/s x {self.flops_per_token / 1e9:.4g} GFLOP a token, forward and backward (model/config.py) "
            f"/ ({world_size} x {peak:g} TFLOP/s, the dense bf16 peak of {name}"
            + ("; of that peak with --fp8, too)" if config.fp8 else ")")
        )
        return world_size * peak * 1e12

    def log(self, row):
        """row: one step's values, held-out ones included."""
        row = {**row, **self._measured(row), "seconds": round(time.monotonic() - self.started, 3)}
        self.rows.write(json.dumps(row) + "\n")
        self.rows.flush()
        self.table.add(flat_row(row, "."))
        shown = [f"loss {row['loss']:.4f}", f"{row['tokens_per_s']:,.0f} tok/s"]
        if "mfu" in row:
            shown += [f"MFU {row['mfu']:.1%}", f"{row['memory_gib']:.1f} GiB"]
        shown += [f"lr {row['lr']:.2e}", f"grad {row['grad_norm']:.2f}"]
        self.bar.set_postfix_str(", ".join(shown), refresh=False)
        self.bar.update()
        for tracker in list(self.trackers):
            problem = tracker.problem()
            if problem:
                self.trackers.remove(tracker)
                self.say(problem)

    def _measured(self, row):
        values = {}
        if self.peak_flops:
            values["mfu"] = round(row["tokens_per_s"] * self.flops_per_token / self.peak_flops, 5)
        if torch.cuda.is_available():
            values["memory_gib"] = gib(torch.cuda.max_memory_allocated())
            values["memory_reserved_gib"] = gib(torch.cuda.max_memory_reserved())
        else:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            values["memory_gib"] = gib(pages * resource.getpagesize())
        return values | self.gpus.latest

    def say(self, line):
        """A line of its own above the progress line."""
        tqdm.write(line, file=sys.stderr)

    def event(self, kind, step, text, **more):
        """Say what happened beside the steps, and keep it in events.jsonl; kind: one word, such as "saved"."""
        self.events.write(json.dumps({"time": time.time(), "step": step, "event": kind, "text": text, **more}) + "\n")
        self.events.flush()
        self.say(text)

    def go_back(self, step):
        """The run has gone back to the checkpoint of `step`: forget the rows after it."""
        self.rows.close()
        self.table.close()
        cut_metrics(self.run_dir.metrics, step)
        self.rows = open(self.run_dir.metrics, "a")  # noqa: SIM115 - closed by close()
        self.table = Table(self.run_dir.metrics_csv, self.run_dir.metrics)
        self.bar.n = step
        self.bar.refresh()
        for tracker in self.trackers:
            tracker.go_back(step + 1)

    def close(self):
        self.bar.close()
        self.gpus.close()
        self.rows.close()
        for tracker in self.trackers:
            problem = tracker.close()
            if problem:
                self.say(problem)
        self.events.close()
        self.table.close()


class Table:
    """metrics.csv: the rows of metrics.jsonl for spreadsheets; what a step did not measure is empty.

    It is written anew, whole, when a run goes on, from a metrics.jsonl that has been cut back to where that is; and at
    the first row with a column that no row before it had, such as the first held-out loss.
    """

    def __init__(self, path, rows_path):
        """path: of the CSV; rows_path: of metrics.jsonl."""
        self.path, self.rows_path, self.columns, self.file = path, rows_path, [], None
        if rows_path.stat().st_size:
            self._write_anew()
        else:
            path.unlink(missing_ok=True)

    def add(self, row):
        """row: flat, and in metrics.jsonl already."""
        if self.file is None or not row.keys() <= set(self.columns):
            self._write_anew()
        else:
            self._writer(self.file).writerow(row)
            self.file.flush()

    def _writer(self, file):
        return csv.DictWriter(file, self.columns, restval="", lineterminator="\n")

    def _flat_rows(self):
        tail = Tail(self.rows_path)
        yield from (flat_row(row, ".") for row in tail.rows())
        tail.close()

    def _write_anew(self):
        self.columns = list(dict.fromkeys(key for row in self._flat_rows() for key in row))
        self.close()
        with new_file(self.path) as binary:
            text = io.TextIOWrapper(binary, newline="", write_through=True)
            writer = self._writer(text)
            writer.writeheader()
            writer.writerows(self._flat_rows())
            text.detach()
        self.file = open(self.path, "a", newline="")  # noqa: SIM115 - closed by close()

    def close(self):
        if self.file is not None:
            self.file.close()


def gib(n_bytes):
    return round(n_bytes / 2**30, 3)


def open_lines(path):
    """A file of lines to add to; a last line that a crash has cut short is ended first."""
    file = open(path, "ab+")  # noqa: SIM115 - for as long as the run goes
    if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
        file.write(b"\n")
    return io.TextIOWrapper(file)
