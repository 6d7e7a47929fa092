"""Checkpoints: every parameter and its optimizer state by name, written by all ranks at once, whole or not at all.

    checkpoints/step_0000400/
        rank00000.safetensors     the pieces of weights and the optimizer's moments that rank 0 owns, float32, flat
        rank00001.safetensors
        tokenizer.model
        checkpoint.json           written last: step, shapes, the run's configuration, sha256 of the files above

A piece is a stretch of one parameter, named "<kind>/<parameter>", with its start in the file's metadata. The pieces of
all ranks make up the parameter, whatever the ZeRO stage and the number of processes were, and a later run takes from
them what its own layout needs. Nothing of ours or of DeepSpeed's is pickled; safetensors and numpy are enough to read
a checkpoint. The folder is written as step_....part and renamed.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from safetensors import SafetensorError
from safetensors.torch import save_file

from curation.shards import file_sha256, sync_folder
from model.weights import FORMAT, MANIFEST, MOMENTS, TOKENIZER, WEIGHT, copy_stretch, load_checkpoint
from train.optim import EightBit, Muon, is_muon
from train.run_dir import note_best, remove_folder, write_json


@dataclass(frozen=True)
class Piece:
    """What this rank owns of a parameter: elements start to start + numel of its flat float32 master copy."""

    name: str
    start: int
    numel: int
    flat: torch.Tensor  # the optimizer's own parameter, in which this piece lies
    offset: int  # where in `flat`
    shape: torch.Size  # of the whole parameter

    def weight(self):
        return self.flat.detach().view(-1)[self.offset : self.offset + self.numel]

    def moment(self, optimizer, kind):
        """This piece of one of the optimizer's moments, as a view; all zeros before the first step.

        Of moments in 8 bits a copy in float32.
        """
        state = optimizer.state[self.flat]
        if isinstance(state.get(kind), EightBit):
            return state[kind].unpack(self.offset, self.offset + self.numel)
        if kind not in state:
            state[kind] = torch.zeros_like(self.flat)
        return state[kind].view(-1)[self.offset : self.offset + self.numel]


def torch_optimizer(engine):
    """The torch optimizer inside DeepSpeed's; in stage 0 there is no other."""
    return engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer


def flat_parameters(engine):
    """This rank's flat float32 parameters, which the torch optimizer steps in ZeRO stages 1 to 3."""
    if engine.zero_optimization_stage() == 3:
        return engine.optimizer.fp32_partitioned_groups_flat
    if isinstance(engine.optimizer, BF16_Optimizer):  # DeepSpeed's choice for stage 1 in bf16
        return engine.optimizer.fp32_groups_flat_partition
    return engine.optimizer.single_partition_of_fp32_groups


def owned_pieces(engine):
    """The pieces that this rank owns. In ZeRO stages 1 to 3 the ranks together own each element once; in stage 0 each
    rank owns everything.

    Reads DeepSpeed 0.19's maps from parameters to flat shards: `_hp_mapping` (stages 1 and 2), `grad_position` (3).
    """
    stage, optimizer, pieces = engine.zero_optimization_stage(), engine.optimizer, []
    for name, parameter in engine.module.named_parameters():
        if stage == 0:
            pieces.append(Piece(name, 0, parameter.numel(), parameter, 0, parameter.shape))
        elif stage == 3:
            group, offset, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = padded * dist.get_rank()
            numel = min(padded, parameter.ds_numel - start)  # the last shards are padded
            if numel > 0:
                flat = flat_parameters(engine)[group]
                pieces.append(Piece(name, start, numel, flat, offset, parameter.ds_shape))
        elif parameter._hp_mapping is not None:
            mapping = parameter._hp_mapping
            flat = flat_parameters(engine)[mapping.param_group_index]
            lp, hp = mapping.lp_fragment_address, mapping.hp_fragment_address
            pieces.append(Piece(name, lp.start, lp.numel, flat, hp.start, parameter.shape))
    return pieces


def moments(optimizer, piece):
    """The kinds of moments that the optimizer keeps of a piece."""
    return MOMENTS["muon" if isinstance(optimizer, Muon) and is_muon(piece.name, piece.shape) else "adamw"]


def tell_muon(engine):
    """Tell the optimizer, if it is Muon, which matrices its flat parameters hold. All ranks call it, once."""
    optimizer, stage = torch_optimizer(engine), engine.zero_optimization_stage()
    if isinstance(optimizer, Muon) and stage:
        optimizer.shard(flat_parameters(engine), owned_pieces(engine), engine.device)


class BackgroundSave:
    pending, written = False, True

    def begin(self, engine, folder, **kw):
        self.args, self.pending = (engine, folder, kw), True

    def finish(self):
        engine, folder, kw = self.args
        self.pending = False
        save_checkpoint(engine, folder, **kw)
        return folder


def save_checkpoint(engine, folder, *, step, tokens, run, tokenizer):
    """Write a checkpoint folder. All ranks call it, with the same `folder`, on a file system that they share.

    run: the resolved configuration (config.json); tokenizer: the path of the tokenizer's file.
    Raises OSError on every rank if any of them could not write; an earlier checkpoint is never touched.
    """
    part = folder.with_name(folder.name + ".part")
    rank = dist.get_rank()
    if rank == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    dist.barrier()
    written, problem = None, None
    try:
        written = _write_rank_file(engine, part / f"rank{rank:05d}.safetensors")
        if rank == 0:
            shutil.copyfile(tokenizer, part / TOKENIZER)
    except (OSError, SafetensorError) as error:
        problem = f"rank {rank} could not write {part}: {error}"
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (written, problem))
    problems = [p for _, p in gathered if p]
    if problems:
        raise OSError(f"checkpoint of step {step} was not saved: {problems[0]}")
    if rank == 0:
        files = {name: entry for entry, _ in gathered for name, entry in [entry]}
        tokenizer_file = part / TOKENIZER
        files[TOKENIZER] = {"bytes": tokenizer_file.stat().st_size, "sha256": file_sha256(tokenizer_file)}
        shapes = {name: list(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}
        manifest = {"format": FORMAT, "step": step, "tokens": tokens, "shapes": shapes, "run": run, "files": files}
        write_json(part / MANIFEST, manifest)
        if folder.exists():  # left by a run that was resumed from an earlier step
            remove_folder(folder.rename(folder.with_name(folder.name + ".old.part")))
        os.replace(part, folder)
        sync_folder(folder.parent)
    dist.barrier()


def _write_rank_file(engine, path):
    """Write this rank's pieces; returns (file name, its entry in the manifest)."""
    optimizer, tensors, starts = torch_optimizer(engine), {}, {}
    copies = engine.zero_optimization_stage() == 0 and dist.get_rank() != 0  # of what rank 0 writes
    for piece in [] if copies else owned_pieces(engine):
        for kind in (WEIGHT, *moments(optimizer, piece)):
            tensor = piece.weight() if kind == WEIGHT else piece.moment(optimizer, kind)
            tensors[f"{kind}/{piece.name}"] = tensor.float().cpu().contiguous()
            starts[f"{kind}/{piece.name}"] = piece.start
    save_file(tensors, path, metadata={"starts": json.dumps(starts)})
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    return path.name, {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def restore_optimizer(engine, checkpoint):
    """Put the checkpoint's float32 weights and moments into an engine whose module has its weights. All ranks.

    Raises ValueError for a checkpoint of weights alone.
    """
    if not checkpoint.has_moments:
        raise ValueError(
            f"checkpoint {checkpoint.path} holds weights alone (imported ones have no optimizer state), so no run can "
            "go on from it; --resume needs a checkpoint that a training run has saved"
        )
    optimizer, stored = torch_optimizer(engine), checkpoint.stored_pieces
    for piece in owned_pieces(engine):
        if moments(optimizer, piece) == MOMENTS["adamw"]:
            step = torch.tensor(
                float(checkpoint.optimizer_steps), device=piece.flat.device if piece.flat.is_cuda else "cpu"
            )
            optimizer.state[piece.flat]["step"] = step
        for kind in (WEIGHT, *moments(optimizer, piece)):
            target = piece.weight() if kind == WEIGHT else piece.moment(optimizer, kind)
            copy_stretch(target, stored[f"{kind}/{piece.name}"], piece.start)


# What may differ between a model and the weights that it starts from: what no weight has learnt.
MAY_DIFFER = {"seq_len", "chunk_size", "rope_scaling", "rope_factor", "rope_original_seq_len"}


def open_weights(path, model_config, tokenizer):
    """The checkpoint of --init-from, whole and of this shape and tokenizer. Raises ValueError or FileNotFoundError.

    tokenizer: the file that the data was made with.
    """
    checkpoint = load_checkpoint(path)
    theirs, ours = asdict(checkpoint.model_config), asdict(model_config)
    differ = [f"{key} {theirs[key]} and not {ours[key]}" for key in ours if theirs[key] != ours[key]]
    differ = [line for line in differ if line.split()[0] not in MAY_DIFFER]
    if differ:
        raise ValueError(f"--init-from {path} is of another shape than --size: it has {', '.join(differ)}")
    if file_sha256(checkpoint.tokenizer_path) != file_sha256(tokenizer):
        raise ValueError(f"--init-from {path} has another tokenizer than --data: its weights know other token ids")
    return checkpoint


def newest_whole(run_dir, say, before=None):
    """The newest checkpoint of a run that is whole, or None; `say` gets a line for each damaged one passed over.

    before: of a step below this one.
    """
    for path in reversed(run_dir.checkpoints()):
        if before is not None and path >= run_dir.checkpoint(before):
            continue
        try:
            return load_checkpoint(path)
        except ValueError as error:
            say(f"skipping {error}")
    return None


def delete_old(run_dir, keep, losses):
    """Note the best checkpoint, and delete all but it and the newest `keep`; 0 keeps all. Rank 0 alone calls it.

    losses: as run_dir.note_best takes them.
    """
    best = note_best(run_dir, losses)
    if keep:
        for path in run_dir.checkpoints()[:-keep]:
            if path.name != best:
                remove_folder(path)
