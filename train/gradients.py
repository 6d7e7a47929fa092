"""What becomes of a gradient in bf16 that autograd has just made, with less memory traffic than DeepSpeed 0.19.8 has.

Stage 1 adds it to a float32 sum of its own process, and processes are summed once a step. Stage 2 sums it over the
processes for every micro-batch, a bucket at a time, and each adds the part that it owns to a float32 sum.
"""

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer


def save_traffic(optimizer):
    """Replace those steps of a DeepSpeed optimizer that copy more than they must."""
    if isinstance(optimizer, BF16_Optimizer):
        add_up_without_copies(optimizer)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer) and optimizer.partition_gradients and not optimizer.cpu_offload:
        whole_buckets = optimizer.contiguous_gradients and optimizer.reduce_scatter
        groups = range(len(optimizer.bit16_groups))
        if whole_buckets and all(optimizer._use_compact_grad_partition_buffer(group) for group in groups):
            reduce_without_copies(optimizer)


def add_up_without_copies(optimizer):
    """Stage 1 in bf16: add a gradient to its float32 sum in one kernel, as soon as autograd has it.

    DeepSpeed first makes a float32 copy of it: 18 bytes of traffic a parameter and micro-batch, not 10. What calls
    this, its hook of immediate_grad_update, then frees the gradient. The sums are the same bit for bit.
    """

    @torch.no_grad()
    def add(parameter, group, index, clear_lp_grads):
        total = optimizer.fp32_groups_gradients[group][index]
        total.add_(parameter.grad.view_as(total))
        parameter._hp_grad = total
        optimizer.fp32_groups_has_gradients[group][index] = True

    optimizer._update_hp_grad = add


def reduce_without_copies(optimizer):
    """Stage 2 in bf16: fill buckets in the dtype of communication, sum them over the processes where they lie.

    DeepSpeed fills them in bf16, divides there (which rounds, unless the processes are a power of two), lays them end
    to end, makes a float32 copy to send, and writes the sums back in bf16 for nobody: 33 bytes of traffic a parameter
    and micro-batch with two processes, not 12. Where it does not round, the sums are the same bit for bit.
    """
    accelerator, group = get_accelerator(), optimizer.dp_process_group
    rank, n_processes = dist.get_rank(group), dist.get_world_size(group)
    on_streams = not accelerator.resolves_data_dependency()

    def average_tensor(tensor, dtype):
        bucket, stream = optimizer.ipg_buckets[dtype], accelerator.current_stream()
        if optimizer.overlap_comm:
            stream = optimizer.reduction_stream
            if on_streams:  # the bucket is full before it is read; the other is read before it is filled again
                for producer in bucket.copy_streams or {accelerator.current_stream()}:
                    stream.wait_stream(producer)
                accelerator.current_stream().wait_stream(stream)
        with accelerator.stream(stream), torch.no_grad():
            parts = list(parts_of_owners(optimizer, bucket))
            if optimizer.use_multi_rank_bucket_allreduce:
                dist.all_reduce(tensor, group=group)
            else:
                for owner, start, stop in neighbours(parts):
                    dist.reduce(tensor[start:stop], dist.get_global_rank(group, owner), group=group)
            own = [(total, tensor[start:stop]) for owner, start, stop, total in parts if owner == rank]
            if own:
                totals, sums = zip(*own, strict=True)
                torch._foreach_add_(totals, sums, alpha=1 / n_processes)

    optimizer.average_tensor = average_tensor
    optimizer._gradient_reduction_buffer_dtype = lambda: optimizer.communication_data_type


def parts_of_owners(optimizer, bucket):
    """Yield (process, start, stop, its float32 sum or None in others) of what processes own in a full bucket."""
    at = 0
    for group, index, parameter in bucket.params:
        starts = optimizer.grad_start_offset[group]
        owners = sorted(optimizer.param_to_partition_ids[group][parameter])
        ends = [*(starts[owner][parameter] for owner in owners[1:]), optimizer.bit16_groups[group][index].numel()]
        for owner, end in zip(owners, ends, strict=True):
            size = end - starts[owner][parameter]
            yield owner, at, at + size, optimizer._get_compact_grad_partition_slice(group, owner, parameter, size)
            at += size


def neighbours(parts):
    """[process, start, stop] of what the same process owns without a gap."""
    joined = []
    for owner, start, stop, _ in parts:
        if joined and joined[-1][0] == owner:
            joined[-1][2] = stop
        else:
            joined.append([owner, start, stop])
    return joined
