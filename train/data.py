"""Batches from a data folder, in an order that depends on the seed and the step alone.

The training split is one long stream of tokens, cut into sequences of seq_len whose targets are the tokens one place
on. An epoch is every sequence once, shuffled anew each time; the tail that fills no sequence (at most seq_len tokens)
is left out. Step s takes the next batch_sequences of the endless row of epochs, whatever the number of processes, so
a run goes on at any step on any machine.
"""

from dataclasses import dataclass

import numpy as np
import torch

from curation.shards import TokenStream
from model.reference import IGNORED_TARGET
from train.order import shuffled


@dataclass(frozen=True)
class Batch:
    """tokens, targets, document_ids: int64 tensors (sequences, seq_len)."""

    tokens: torch.Tensor
    targets: torch.Tensor
    document_ids: torch.Tensor


def n_sequences(stream: TokenStream, seq_len):
    """Whole sequences in one pass; one token more than seq_len is needed for the last target."""
    return (stream.n_tokens - 1) // seq_len


def read_sequences(stream: TokenStream, indices, seq_len, device):
    """The sequences of these indices as a Batch on `device`; index -1 gives a row that counts for nothing."""
    rows = np.zeros((len(indices), seq_len + 1), np.int64)
    document_ids = np.zeros((len(indices), seq_len + 1), np.int64)
    for row, index in enumerate(indices):
        if index >= 0:
            rows[row], document_ids[row] = stream.read(int(index) * seq_len, seq_len + 1)
    targets = np.where(np.asarray(indices)[:, None] >= 0, rows[:, 1:], IGNORED_TARGET)
    # targets are not masked at document ends: the separator there is predicted from its own document alone
    return Batch(
        *(torch.from_numpy(a).to(device) for a in (rows[:, :-1].copy(), targets, document_ids[:, :-1].copy()))
    )


def sequence_indices(step, n, plan, seed, rank, world_size):
    """Indices (grad_accum, micro_batch) of the sequences that process `rank` reads in step `step`, counted from 1.

    n: sequences in an epoch.
    """
    places = np.arange(plan.batch_sequences).reshape(plan.grad_accum, world_size, plan.micro_batch)[:, rank]
    places = places + (step - 1) * plan.batch_sequences
    epochs, within = places // n, places % n
    indices = np.empty_like(places)
    for epoch in np.unique(epochs):  # a step may straddle two epochs
        chosen = epochs == epoch
        indices[chosen] = shuffled(within[chosen], n, (seed << 20) + int(epoch))
    return indices


def training_batches(stream, plan, seed, rank, world_size, first_step, device):
    """Yield process `rank`'s micro-batches from step first_step on, without end."""
    n, step = n_sequences(stream, plan.model.seq_len), first_step
    while True:
        for indices in sequence_indices(step, n, plan, seed, rank, world_size):
            yield read_sequences(stream, indices, plan.model.seq_len, device)
        step += 1
