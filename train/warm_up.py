"""Kernels before the first step: compiled once on each machine, by one rank, while the others wait.

Triton compiles a kernel when it is first called, and keeps it (in ~/.triton/cache, or where TRITON_CACHE_DIR says).
Left to the first step, every rank of a machine would compile the same kernels at the same time.
"""

import os
import time
from dataclasses import replace

import torch
import torch.distributed as dist

from model.ops import load_ops
from train.engine import make_network
from train.watchdog import LostContact


def warm_up(plan, config, ds_config, device, metrics):
    """Compile what a step will call, and say how long it took. All ranks call it; PyTorch's own kernels need nothing.

    metrics: rank 0's, None on the others.
    """
    if not load_ops(config.kernels).__name__.endswith("fused"):
        return
    began = time.perf_counter()
    dtype = torch.bfloat16 if ds_config.get("bf16", {}).get("enabled") else torch.float32
    first_on_each_host(lambda: run_a_layer_of_each_kind(plan, config, dtype, device), device)
    if metrics:
        metrics.event("kernels", 0, f"kernels ready in {time.perf_counter() - began:.1f} s")


def run_a_layer_of_each_kind(plan, config, dtype, device):
    """Forward and backward, with the run's own widths, rows and dtype: other sizes may be other kernels to Triton."""
    shape = replace(plan.model, layer_pattern="".join(dict.fromkeys(plan.model.layer_pattern)))
    network = make_network(shape, config, device).to(dtype)
    tokens = torch.zeros(plan.micro_batch, shape.seq_len, dtype=torch.int64, device=device)
    document_ids = (torch.arange(shape.seq_len, device=device) >= shape.seq_len // 2).expand_as(tokens).long()
    network(tokens, targets=tokens, document_ids=document_ids).backward()
    if tokens.is_cuda:
        torch.cuda.synchronize()
        del network
        torch.cuda.empty_cache()


def first_on_each_host(work, device):
    """Local rank 0 of each host calls work(), and every other rank waits until all of them are done.

    All ranks call it. What work() raises is raised where it was called; the ranks that wait then raise LostContact.
    """
    error = None
    if os.environ["LOCAL_RANK"] == "0":
        try:
            work()
        except Exception as caught:  # told first, and raised below: else the others would wait for ever
            error = caught
    failed = torch.tensor(float(error is not None), device=device)
    dist.all_reduce(failed)
    if error:
        raise error
    if failed:
        raise LostContact("the first rank of a host could not run the kernels; its own message says why")
