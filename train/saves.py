"""When checkpoints are begun, finished, kept and gone back to; train/checkpoint.py knows what is in them."""

import torch.distributed as dist

from train.checkpoint import BackgroundSave, delete_old, newest_whole
from train.run_dir import heldout_losses, note_best, remove_folder

RETURNS = 3  # to the same checkpoint; a run that comes back again does not recover by other data


class Saves:
    """The checkpoints of a run in the making: one at a time, written while training goes on. All ranks make one.

    metrics: rank 0's, None on the others.
    """

    def __init__(self, engine, run_dir, keep, tokenizer, metrics):
        self.engine, self.run_dir, self.keep, self.tokenizer, self.metrics = engine, run_dir, keep, tokenizer, metrics
        self.writer, self.step, self.heldout_loss = BackgroundSave(), None, None
        if metrics:
            self.losses = heldout_losses(run_dir)
            note_best(run_dir, self.losses)  # one beyond the step that the run goes on from is not it any more

    @property
    def pending(self):
        return self.writer.pending

    @property
    def written(self):
        return self.writer.written

    def begin(self, step, tokens, run, heldout_loss):
        """Copy the state of this step to the host's memory and begin to write it. heldout_loss: None: not measured."""
        if self.pending:
            self.finish()
        self.step, self.heldout_loss = step, heldout_loss
        folder = self.run_dir.checkpoint(step)
        self.writer.begin(self.engine, folder, step=step, tokens=tokens, run=run, tokenizer=self.tokenizer)

    def finish(self, must=False):
        """Wait until every rank has written, and name the checkpoint. All ranks call it.

        One that could not be written is reported, and training goes on: the next may find room. With `must`, OSError.
        """
        try:
            self.writer.finish()
        except OSError as error:
            if must:
                raise
            if self.metrics:
                self.metrics.event("save_failed", self.step, f"{error}; training goes on, and saves again later")
            return
        if self.metrics:
            self.metrics.event("saved", self.step, f"saved {self.run_dir.checkpoint(self.step)}")
            if self.heldout_loss is not None:
                self.losses[self.run_dir.checkpoint(self.step).name] = self.heldout_loss
            try:
                delete_old(self.run_dir, self.keep, self.losses)
            except OSError as error:
                self.metrics.event("save_failed", self.step, f"old checkpoints could not be deleted: {error}")


def go_back(run_dir, step, guard, returns, metrics, say):
    """The checkpoint to go on from when the last guard.in_a_row steps could not be taken. All ranks call it.

    returns: a Counter of the steps that the run has gone back to. Raises FloatingPointError if there is no checkpoint
    from before those steps, or if it did not help before.
    """
    lost = f"{guard.in_a_row} steps in a row, to step {step}, could not be taken ({guard.reason})"
    checkpoint = newest_whole(run_dir, say, before=step - guard.in_a_row + 1)
    if checkpoint is None:
        raise FloatingPointError(f"{lost}, and there is no checkpoint from before them to go back to")
    returns[checkpoint.step] += 1
    if returns[checkpoint.step] > RETURNS:
        raise FloatingPointError(f"{lost}, after going back to step {checkpoint.step} {RETURNS} times")
    if metrics:
        for path in run_dir.checkpoints():
            if path > checkpoint.path:
                remove_folder(path)
        metrics.go_back(checkpoint.step)
        metrics.event(
            "rollback", step,
            f"{lost}: back to step {checkpoint.step}, and past the data of steps {checkpoint.step + 1} to {step}",
            to_step=checkpoint.step,
        )  # fmt: skip
    dist.barrier()
    return checkpoint
