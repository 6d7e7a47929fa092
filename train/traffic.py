"""What DeepSpeed 0.19.8 moves in memory between two kernels of the network, with fewer copies.

A gradient in bf16 that autograd has just made: stage 1 adds it to a float32 sum of its own process, and processes are
summed once a step; stages 2 and 3 sum it over the processes for every micro-batch, a bucket at a time, and each adds
the part that it owns to a float32 sum. A weight of stage 3, of which each process has a part: gathered for each pass.
"""

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch.nn.functional import pad

ALIGNMENT = 8  # elements: 16 bytes, for the kernels of products


def save_traffic(optimizer):
    """Replace those steps of a DeepSpeed optimizer that copy more than they must. Offloading keeps its own."""
    if isinstance(optimizer, BF16_Optimizer):
        add_up_without_copies(optimizer)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        reduce_without_copies(optimizer)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        scatter_without_copies(optimizer)
        gather_without_copies(optimizer)


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
    whole_buckets = optimizer.contiguous_gradients and optimizer.reduce_scatter and not optimizer.cpu_offload
    groups = range(len(optimizer.bit16_groups))  # in stage 1, and in float32, gradients have other sums
    if not whole_buckets or not all(optimizer._use_compact_grad_partition_buffer(group) for group in groups):
        return
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


def scatter_without_copies(optimizer):
    """Stage 3 in bf16: sum each weight's gradient over the processes where it lies in the bucket, in one call for all.

    DeepSpeed lays the processes' parts of all weights end to end, divides, and cuts its own part out: 32 bytes of
    traffic a parameter and micro-batch with two processes, not 12. The sums differ by their division alone.
    """
    if not optimizer.reduce_scatter or optimizer.offload_optimizer:
        return
    private = f"_{DeepSpeedZeroOptimizer_Stage3.__name__}__"  # how Python spells its __names from outside

    def scatter(parameters, dtype):
        group = optimizer._get_param_partition_group(parameters[0])
        rank, n_processes = dist.get_rank(group), dist.get_world_size(group)
        parts = []
        with dist._coalescing_manager(group):
            for parameter in parameters:
                whole = parameter.grad.view(-1).to(dtype)  # a copy if it is larger than the bucket
                size = -(-whole.numel() // n_processes)
                if size * n_processes > whole.numel():
                    whole = pad(whole, (0, size * n_processes - whole.numel()))
                part = whole[rank * size : (rank + 1) * size]
                dist.reduce_scatter_tensor(part, whole, group=group)
                parts.append(part)
        return parts

    @torch.no_grad()
    def add(parameters, parts):
        n_processes = dist.get_world_size(optimizer._get_param_partition_group(parameters[0]))
        totals = getattr(optimizer, private + "param_id_to_grad_partition")
        own = [totals[parameter.ds_id] for parameter in parameters]
        if optimizer.micro_step_id == 0:
            torch._foreach_zero_(own)
        torch._foreach_add_(own, parts, alpha=1 / n_processes)
        for parameter in parameters:
            if not get_accelerator().is_synchronized_device():
                parameter.grad.record_stream(get_accelerator().current_stream())
            parameter.grad = None

    setattr(optimizer, private + "avg_scatter_grads", scatter)
    optimizer.partition_grads = add


def gather_without_copies(optimizer):
    """Stage 3: gather weights where they will be used, side by side.

    DeepSpeed lays a process's parts end to end, gathers, and puts each weight together from its parts: 4 bytes a
    parameter and pass, and 4 divided by the processes. Weights that lie side by side are also multiplied as one
    (model/layers.py, as_one), where they would else be laid side by side for each product: 4 bytes more.
    """

    def gather(parameters, safe_mode=False, quantize=False):
        parameters = sorted(parameters, key=lambda parameter: parameter.ds_id)  # the same order in all processes
        parts, group = [parameter.ds_tensor for parameter in parameters], parameters[0].ds_process_group
        if parameters[0].ds_secondary_tensor is not None:  # hpZ: of a second copy that the processes of a node share
            parts = [parameter.ds_secondary_tensor for parameter in parameters]
            group = parameters[0].ds_zero_param_process_group
        sizes = [part.numel() * dist.get_world_size(group) for part in parts]
        places = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
        room = parts[0].new_empty(sum(places))
        wholes = [place[:size] for place, size in zip(room.split(places), sizes, strict=True)]
        with dist._coalescing_manager(group, async_ops=True) as work:
            for parameter, part, whole in zip(parameters, parts, wholes, strict=True):
                parameter.ds_status = ZeroParamStatus.INFLIGHT
                dist.all_gather_into_tensor(whole, part, group=group)
        return Gathered(parameters, wholes, work)

    if dist.get_world_size() > 1:  # alone there is nothing to gather
        for parameter in optimizer.module.parameters():
            parameter.all_gather_coalesced = gather


class Gathered:
    """Weights on their way; what DeepSpeed expects of such a thing."""

    def __init__(self, parameters, wholes, work):
        self.parameters, self.wholes, self.work = parameters, wholes, work

    def wait(self, handle_dependency=True):
        if self.work is None:
            return
        self.work.wait()
        for parameter, whole in zip(self.parameters, self.wholes, strict=True):
            parameter.data = whole[: parameter.ds_numel].view(parameter.ds_shape)
            parameter.ds_status = ZeroParamStatus.AVAILABLE
        self.parameters = self.wholes = self.work = None
