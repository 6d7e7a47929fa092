"""What a run says while it goes: a progress line for people, metrics.jsonl for programs. Used by rank 0 alone."""

import json
import sys
import time

from tqdm import tqdm

from train.run_dir import cut_metrics


class Metrics:
    """Appends an object a step to a file; keeps a progress line: step, loss, tokens/s, rate, gradient, time left."""

    def __init__(self, run_dir, first_step, last_step):
        self.run_dir = run_dir
        run_dir.path.mkdir(parents=True, exist_ok=True)
        cut_metrics(run_dir.metrics, first_step - 1)
        self.file = open(run_dir.metrics, "a")  # noqa: SIM115 - closed by close()
        self.started = time.monotonic()
        self.bar = tqdm(
            initial=first_step - 1, total=last_step, unit="step", dynamic_ncols=True, smoothing=0.05,
            mininterval=0.2 if sys.stderr.isatty() else 10,  # a log file gets a line now and then
            bar_format="{desc} {percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
        )  # fmt: skip

    def log(self, row):
        """row: one step's values, held-out ones included."""
        row = {**row, "seconds": round(time.monotonic() - self.started, 3)}
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        speed, rate, norm = f"{row['tokens_per_s']:,.0f} tok/s", f"lr {row['lr']:.2e}", f"grad {row['grad_norm']:.2f}"
        self.bar.set_postfix_str(f"loss {row['loss']:.4f}, {speed}, {rate}, {norm}", refresh=False)
        self.bar.update()

    def go_back(self, step):
        """Forget the steps after this one: they will come again, with other data."""
        self.file.close()
        cut_metrics(self.run_dir.metrics, step)
        self.file = open(self.run_dir.metrics, "a")  # noqa: SIM115
        self.bar.n = step

    def event(self, kind, step, text, **more):
        """Say one line, and add it to events.jsonl."""
        self.say(text)
        with open(self.run_dir.events, "a") as file:
            file.write(json.dumps({"time": time.time(), "step": step, "event": kind, "text": text, **more}) + "\n")

    def say(self, line):
        """A line of its own above the progress line."""
        tqdm.write(line, file=sys.stderr)

    def close(self):
        self.bar.close()
        self.file.close()
