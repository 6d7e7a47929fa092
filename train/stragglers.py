"""Which rank holds the others up: by the time of its own forward pass and its own wait for data."""

import time
from statistics import median

import torch

STEPS = 20  # a rank is slow if it is over this many steps
FACTOR = 1.2  # times the median rank
LEAST_SECONDS = 0.01  # a step: less than this holds nobody up


class Clock:
    """Adds up the seconds of stretches of work, as the GPU sees them where there is one.

    with clock: loss = model(...)
    """

    def __init__(self):
        self.seconds, self.events = 0.0, []

    def __enter__(self):
        if torch.cuda.is_available():
            self.events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self.events[-1][0].record()
        else:
            self.began = time.perf_counter()

    def __exit__(self, *_):
        if torch.cuda.is_available():
            self.events[-1][1].record()
        else:
            self.seconds += time.perf_counter() - self.began

    def take(self):
        """The seconds since the last call. On a GPU it counts what is finished, and leaves the rest for the next."""
        finished = [pair for pair in self.events if pair[1].query()]
        self.events = self.events[len(finished) :]
        seconds = self.seconds + sum(start.elapsed_time(end) for start, end in finished) / 1000
        self.seconds = 0.0
        return seconds


class Stragglers:
    """Names the slow ranks, from what all ranks tell one another each step (train.processes.Told).

    In stages 0 to 2 the forward pass waits for nobody, so its time is the rank's own. In stage 3 it gathers weights,
    all ranks are as slow as the slowest, and only a rank that waits for data stands out.
    """

    def __init__(self):
        self.forward, self.data, self.named = [], [], {}

    def note(self, told):
        """Returns {rank: why} of the ranks that have just become slow; one that stays slow is named once."""
        self.forward.append(told.forward_seconds)
        self.data.append(told.data_seconds)
        if len(self.forward) < STEPS:
            return {}
        found = self._slow("forward pass", self.forward) | self._slow("wait for data", self.data)
        self.forward, self.data = [], []
        new = {rank: why for rank, why in found.items() if rank not in self.named}
        self.named = found
        return new

    def _slow(self, what, rows):
        per_rank = [median(column) for column in zip(*rows, strict=True)]
        usual = median(per_rank)
        return {
            rank: f"its {what} takes {seconds * 1000:,.0f} ms a step, {usual * 1000:,.0f} ms is usual"
            for rank, seconds in enumerate(per_rank)
            if seconds > FACTOR * usual and seconds - usual > LEAST_SECONDS
        }
