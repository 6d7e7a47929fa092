"""Batches from a data folder, in an order that depends on the seed, the mixture and the step alone.

The training split is one long stream of tokens, cut into sequences of seq_len whose targets are the tokens one place
on. An epoch is every sequence once, shuffled anew each time; the tail that fills no sequence (at most seq_len tokens)
is left out. Step s takes the next batch_sequences of the endless row of epochs, whatever the number of processes, so
a run goes on at any step on any machine. With a mixture each source is such a stream, and train/mixture.py says which
of them comes when.
"""

from dataclasses import dataclass

import numpy as np
import torch

from curation.shards import TokenStream
from model.reference import IGNORED_TARGET
from train.mixture import mixture_starts
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
    indices = np.asarray(indices)
    batch = read_rows(stream, np.maximum(indices, 0) * seq_len, seq_len, "cpu")
    batch.targets[torch.from_numpy(indices < 0)] = IGNORED_TARGET
    return Batch(batch.tokens.to(device), batch.targets.to(device), batch.document_ids.to(device))


def read_rows(stream: TokenStream, starts, seq_len, device):
    """The sequences that begin at these places of the stream as a Batch on `device`."""
    rows = stream.read_rows(starts, seq_len + 1)
    tokens, targets = rows[:, :-1], rows[:, 1:]
    # targets are not masked at document ends: the separator there is predicted from its own document alone
    parts = (tokens.astype(np.int64, order="C"), targets.astype(np.int64, order="C"), stream.document_ids(tokens))
    return Batch(*(torch.from_numpy(part).to(device) for part in parts))


def step_places(step, plan, rank, world_size):
    """Places (grad_accum, micro_batch), in the endless row of samples, of process `rank` in step `step`, from 1."""
    places = np.arange(plan.batch_sequences).reshape(plan.grad_accum, world_size, plan.micro_batch)[:, rank]
    return places + (step - 1) * plan.batch_sequences


def sequence_indices(step, n, plan, seed, rank, world_size):
    """Indices (grad_accum, micro_batch) of the sequences that process `rank` reads in step `step`, without a mixture.

    n: sequences in an epoch.
    """
    places = step_places(step, plan, rank, world_size)
    epochs, within = places // n, places % n
    indices = np.empty_like(places)
    for epoch in np.unique(epochs):  # a step may straddle two epochs
        chosen = epochs == epoch
        indices[chosen] = shuffled(within[chosen], n, (seed << 20) + int(epoch))
    return indices


def training_batches(stream, plan, seed, rank, world_size, first_step, device, mixture=None):
    """Yield process `rank`'s micro-batches from step first_step on, without end.

    mixture: a Mixture of exactly the stream's sources, or None for all of the stream, in proportion to its parts.
    """
    seq_len, step = plan.model.seq_len, first_step
    while True:
        if mixture:
            starts = mixture_starts(step_places(step, plan, rank, world_size), mixture, stream, seq_len, seed)
        else:
            starts = seq_len * sequence_indices(step, n_sequences(stream, seq_len), plan, seed, rank, world_size)
        for micro_batch in starts:
            yield read_rows(stream, micro_batch, seq_len, device)
        step += 1
