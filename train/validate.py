"""The held-out loss during training, on the live engine."""

import math

import numpy as np
import torch
import torch.distributed as dist

from curation.shards import open_stream, read_manifest
from train.data import n_sequences, read_sequences


def check_heldout(data, seq_len):
    """ValueError for a data folder whose held-out text fills no sequence: before the run, not when it is measured."""
    if all(entry["tokens"] <= seq_len for entry in read_manifest(data)["splits"]["heldout"]["sources"].values()):
        raise ValueError(f"no held-out source of {data} fills a sequence of {seq_len} tokens; set --eval-every 0")


@torch.no_grad()
def heldout_loss(engine, data, plan, max_tokens, note=lambda: None):
    """Held-out loss over evenly spaced sequences of every source. All ranks call it, and do equally many passes.

    max_tokens: how many tokens to read in all, shared out by the sources' sizes, at least one sequence each; 0: all.
    Returns heldout_loss (nats a token), heldout_bits_per_byte, and the latter by source. Bytes are those of the
    held-out text at each source's own tokens per byte; a document cut by a sequence's edge loses its context there, so
    these are a little higher than the scores of eval/. note: called before each pass, for the watchdog.
    """
    seq_len, rank, world_size = plan.model.seq_len, dist.get_rank(), dist.get_world_size()
    sources = read_manifest(data)["splits"]["heldout"]["sources"]
    all_tokens = sum(entry["tokens"] for entry in sources.values())
    nats, tokens, n_bytes = {}, {}, {}
    engine.eval()
    for source, entry in sources.items():
        if entry["tokens"] <= seq_len:
            continue  # less text than one sequence: eval/ scores it all the same
        stream = open_stream(data, "heldout", [source])
        n = n_sequences(stream, seq_len)
        wanted = n if not max_tokens else min(n, max(1, max_tokens * entry["tokens"] // all_tokens // seq_len))
        chosen = np.linspace(0, n - 1, wanted).astype(np.int64)
        per_pass = world_size * plan.micro_batch
        padded = np.full(-(-wanted // per_pass) * per_pass, -1)  # rows of -1 count for nothing
        padded[:wanted] = chosen
        total = torch.zeros((), dtype=torch.float64)
        for indices in padded.reshape(-1, world_size, plan.micro_batch)[:, rank]:
            note()
            batch = read_sequences(stream, indices, seq_len, engine.device)
            loss = engine(batch.tokens, targets=batch.targets, document_ids=batch.document_ids)
            scored = int((indices >= 0).sum()) * seq_len
            if scored:
                total += loss.item() * scored
        total = total.to(engine.device, torch.float32)
        dist.all_reduce(total)
        nats[source], tokens[source] = total.item(), wanted * seq_len
        n_bytes[source] = tokens[source] * entry["text_bytes"] / entry["tokens"]
    engine.train()
    return {
        "heldout_loss": sum(nats.values()) / sum(tokens.values()),
        "heldout_bits_per_byte": sum(nats.values()) / sum(n_bytes.values()) / math.log(2),
        "heldout_bits_per_byte_by_source": {s: nats[s] / n_bytes[s] / math.log(2) for s in nats},
    }
