"""Steps that would hurt a run are not taken, and a run that does not recover goes back to its last good checkpoint.

A step is skipped when its loss or its gradient's norm is not a number, or lies more than `sigma` standard deviations
above the mean of the last steps that were taken: six of 128, as in OLMo-core's SkipStep optimizers. The weights and
the optimizer's state are then those of before, to the bit.
"""

import math
from collections import deque
from statistics import fmean

WINDOW = 128  # steps that a step is compared with
LEAST = 64  # with fewer, only what is not a number is skipped: the loss falls fast at the start
FLAT = 1e-3  # of the mean: a spread below it is taken for this, so that a loss that hardly moves has no spikes


class Guard:
    """sigma: 0 skips only what is not a number. state: what state() gave, of the checkpoint a run goes on from."""

    def __init__(self, sigma, state=None):
        state = state or {}
        self.sigma = sigma
        self.losses = deque(state.get("losses", ()), WINDOW)
        self.norms = deque(state.get("norms", ()), WINDOW)
        self.skipped_steps = state.get("skipped_steps", 0)
        self.in_a_row = 0
        self.loss = 0.0  # of the step that is being taken
        self.reason = None  # why the last step was skipped, if it was

    def why_not(self, norm):
        """Why the step of this loss and gradient norm must not be taken, in a few words; None if it may be."""
        return self._why_not("loss", self.loss, self.losses) or self._why_not("gradient norm", norm, self.norms)

    def _why_not(self, name, value, before):
        if not math.isfinite(value):
            return f"the {name} is {value}"
        if self.sigma and len(before) >= LEAST:
            mean = fmean(before)
            variance = math.fsum((v - mean) ** 2 for v in before) / len(before)
            spread = max(math.sqrt(variance), FLAT * abs(mean))
            if value > mean + self.sigma * spread:
                above = (value - mean) / spread
                return (
                    f"the {name} {value:.4g} is {above:.1f} sigma above the {mean:.4g} of the last {len(before)} steps"
                )
        return None

    def protect(self, inner, engine_optimizer):
        """Make `inner`, the torch optimizer within DeepSpeed's (or the same), leave out steps that must not be taken.

        engine_optimizer: has the step's `_global_grad_norm` by the time that it calls inner.step().
        """
        take = inner.step

        def step(*args, **kwargs):
            if self.why_not(float(engine_optimizer._global_grad_norm)) is None:
                take(*args, **kwargs)

        inner.step = step

    def note(self, norm):
        """Remember the step that is over; returns why it was skipped, or None."""
        self.reason = self.why_not(norm)
        if self.reason is None:
            self.losses.append(self.loss)
            self.norms.append(norm)
            self.in_a_row = 0
        else:
            self.skipped_steps += 1
            self.in_a_row += 1
        return self.reason

    def state(self):
        """For the checkpoint: a resumed run decides as an unbroken one."""
        return {"losses": list(self.losses), "norms": list(self.norms), "skipped_steps": self.skipped_steps}
