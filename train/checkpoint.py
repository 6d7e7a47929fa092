"""Checkpoints: every parameter and its optimizer state by name, written by all ranks at once, whole or not at all.

    checkpoints/step_0000400/
        rank00000.safetensors     the pieces of weights and the optimizer's moments that rank 0 owns, float32, flat
        rank00001.safetensors
        tokenizer.model
        checkpoint.json           written last: step, shapes, the run's configuration, sha256 of the files above

A piece is a stretch of one parameter, named "<kind>/<parameter>", with its start in the file's metadata. The pieces of
all ranks make up the parameter, whatever the ZeRO stage and the number of processes were, and a later run takes from
them what its own layout needs. Nothing of ours or of DeepSpeed's is pickled; safetensors and numpy are enough to read
a checkpoint. The folder is written as step_....part and renamed; training goes on while it is written.
"""

import copy
import errno
import os
import shutil
import socket
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

from curation.shards import file_sha256, sync_folder
from model.weights import (
    MANIFEST,
    MOMENTS,
    TOKENIZER,
    WEIGHT,
    copy_stretch,
    load_checkpoint,
    write_file,
    write_manifest,
    write_pieces,
)
from train.optim import AdamW8bit, EightBit, Muon, is_muon
from train.run_dir import best_checkpoint, note_best, put_aside, remove_folder

HOST_BLOCK = 1 << 24  # elements: 64 MiB; pinned memory comes in powers of two, so one large buffer could waste half
WHAT_TO_DO = {  # by the error's number
    errno.ENOSPC: "make room there, or keep fewer checkpoints (--keep)",
    errno.EDQUOT: "make room there, or keep fewer checkpoints (--keep)",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "make that folder writable",
    errno.EACCES: "make that folder writable",
    errno.EPERM: "make that folder writable",
    errno.ENOENT: "the run's folder must lie on a file system that all hosts share",
}


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
        """This piece of one of the optimizer's moments, as a view; of moments in 8 bits a copy in float32."""
        found = optimizer.state[self.flat].get(kind)
        if found is None:  # before the first step
            return torch.zeros(self.numel)
        if isinstance(found, EightBit):
            return found.unpack(self.offset, self.offset + self.numel)
        return found.view(-1)[self.offset : self.offset + self.numel]


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


def tell_optimizer(engine):
    """Tell an optimizer that asks for it which matrices its flat parameters hold. All ranks call it, once."""
    optimizer = torch_optimizer(engine)
    if not engine.zero_optimization_stage():  # its parameters are the matrices themselves
        return
    if isinstance(optimizer, Muon):
        optimizer.shard(flat_parameters(engine), owned_pieces(engine), engine.device)
    elif isinstance(optimizer, AdamW8bit):
        optimizer.shard(flat_parameters(engine), owned_pieces(engine))


def written_pieces(engine):
    """The pieces that this rank writes: what it owns; in stage 0, where each owns everything, an even share of it."""
    pieces = owned_pieces(engine)
    if engine.zero_optimization_stage():
        return pieces
    rank, world_size = dist.get_rank(), dist.get_world_size()
    shares = []
    for piece in pieces:
        first, last = (piece.numel * r // world_size for r in (rank, rank + 1))
        if first < last:
            shares.append(replace(piece, start=first, numel=last - first, offset=piece.offset + first))
    return shares


class HostCopy:
    """A copy of a rank's pieces in host memory, float32, back to back; on GPUs in pinned memory, which is kept."""

    def __init__(self):
        self.blocks = []
        self.clear()

    def clear(self):
        self.places = {}  # {"<kind>/<parameter>": (start, numel)}
        self.numel = 0

    def add(self, key, start, values):
        """values: flat float32, on whatever device; torch.cuda.synchronize() must follow the last one."""
        self.places[key] = (start, values.numel())
        while values.numel():
            block, begin = divmod(self.numel, HOST_BLOCK)
            if block == len(self.blocks):
                self.blocks.append(torch.empty(HOST_BLOCK, pin_memory=torch.cuda.is_available()))
            part, values = values[: HOST_BLOCK - begin], values[HOST_BLOCK - begin :]
            self.blocks[block][begin : begin + part.numel()].copy_(part, non_blocking=True)
            self.numel += part.numel()

    def data(self):
        """The pieces' bytes, as buffers one after another."""
        for block, first in zip(self.blocks, range(0, self.numel, HOST_BLOCK), strict=False):
            yield block[: self.numel - first].numpy()


class BackgroundSave:
    """Saves checkpoints while training goes on: begin() copies to host memory, a thread writes, finish() seals.

    All ranks call begin() and finish(), with the same folder, on a file system that they share. The loop trains on
    between the two, and calls finish() when every rank's `written` is true, so that none has to wait. Until finish()
    has returned, the folder is named .part and does not count. The host memory (with AdamW 12 bytes a parameter,
    divided by the number of ranks) is kept for the next save.
    """

    def __init__(self):
        self.host_copy = HostCopy()
        self.folder = self.thread = self.problem = None
        self.fields: dict[str, Any] = {}  # of the manifest
        self.files: dict[str, Any] = {}  # that this rank wrote: their entries in the manifest

    @property
    def pending(self):
        """Whether a save is begun and not finished; the same on all ranks."""
        return self.folder is not None

    @property
    def written(self):
        """Whether this rank has nothing left to write: done, failed, or nothing pending."""
        return self.thread is None or not self.thread.is_alive()

    def begin(self, engine, folder, *, step, tokens, run, tokenizer):
        """Copy what is to be saved and start to write it. All ranks call it.

        run: the resolved configuration (config.json); tokenizer: the path of the tokenizer's file. What goes wrong
        with the disk, finish() says.
        """
        assert not self.pending, "the save before this one is not finished"
        self.folder, self.thread, self.problem, self.files = folder, None, None, {}
        part = self._part()
        if dist.get_rank() == 0:
            try:
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir(parents=True)
            except OSError as error:
                self.problem = self._could_not_write(part, error)
        dist.barrier()  # the folder is there
        optimizer = torch_optimizer(engine)
        self.host_copy.clear()
        for piece in written_pieces(engine):
            for kind in (WEIGHT, *moments(optimizer, piece)):
                values = piece.weight() if kind == WEIGHT else piece.moment(optimizer, kind)
                self.host_copy.add(f"{kind}/{piece.name}", piece.start, values)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        shapes = {name: list(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}
        # the loop may change `run` (the position in streamed data, say) before it is written
        self.fields = {"step": step, "tokens": tokens, "shapes": shapes, "run": copy.deepcopy(run)}
        if not self.problem:
            # a daemon: a process that ends leaves what it has not written unfinished
            self.thread = Thread(target=self._write, args=(tokenizer,), name="save", daemon=True)
            self.thread.start()

    def finish(self):
        """Wait for this rank's write and make the checkpoint whole; returns its folder. All ranks call it.

        Raises OSError on every rank, with the same line, if any of them could not write; earlier checkpoints are
        untouched, and the next save may begin.
        """
        assert self.pending, "no save has begun"
        if self.thread:
            self.thread.join()
        found = gather((self.files, self.problem))
        problems = [problem for _, problem in found if problem]
        if dist.get_rank() == 0:
            if not problems:
                problems = self._make_whole({name: entry for files, _ in found for name, entry in files.items()})
            if problems:
                shutil.rmtree(self._part(), ignore_errors=True)  # a full disk needs the room
        problems = gather(problems)[0]
        folder, self.folder, self.thread = self.folder, None, None
        if problems:
            others = f" (and {len(problems) - 1} more ranks)" if len(problems) > 1 else ""
            raise OSError(f"checkpoint of step {self.fields['step']} was not saved: {problems[0]}{others}")
        return folder

    def _part(self):
        return self.folder.with_name(self.folder.name + ".part")

    def _write(self, tokenizer):
        """The thread: write this rank's file, and rank 0 the tokenizer, into the folder."""
        rank = dist.get_rank()
        path = self._part() / f"rank{rank:05d}.safetensors"
        try:
            self.files[path.name] = write_pieces(path, self.host_copy.places, self.host_copy.data())
            if rank == 0:
                path = self._part() / TOKENIZER
                self.files[TOKENIZER] = write_file(path, [Path(tokenizer).read_bytes()])
        except Exception as error:  # whatever it is, finish() must say it on every rank, or the others would wait
            self.problem = self._could_not_write(path, error)

    def _make_whole(self, files):
        """Rank 0: write the manifest and give the folder its name. Returns what went wrong, as a list."""
        part, old = self._part(), self.folder.with_name(self.folder.name + ".old.part")
        try:
            write_manifest(part, files=files, **self.fields)
            sync_folder(part)
            if self.folder.exists():  # left by a run that was resumed from an earlier step
                os.replace(self.folder, old)
            os.replace(part, self.folder)
            sync_folder(self.folder.parent)
        except OSError as error:
            return [self._could_not_write(part / MANIFEST, error)]
        shutil.rmtree(old, ignore_errors=True)
        return []

    def _could_not_write(self, path, error):
        """One line: which rank on which host, which file, why, how much room there is, what to do."""
        path = Path(getattr(error, "filename", None) or path)
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        there = next(folder for folder in path.absolute().parents if folder.exists())
        what_to_do = WHAT_TO_DO.get(getattr(error, "errno", None), "see to that file system")
        return (
            f"rank {dist.get_rank()} on {socket.gethostname()} could not write {path}: {reason} "
            f"({shutil.disk_usage(there).free / 1e9:,.2f} GB free, {4 * self.host_copy.numel / 1e9:,.2f} GB needed); "
            f"{what_to_do}; earlier checkpoints are whole"
        )


def save_checkpoint(engine, folder, *, step, tokens, run, tokenizer):
    """Write a checkpoint folder and wait for it. All ranks call it; arguments and errors as in BackgroundSave."""
    save = BackgroundSave()
    save.begin(engine, folder, step=step, tokens=tokens, run=run, tokenizer=tokenizer)
    save.finish()


def gather(value):
    """Every rank's value, in a list. All ranks call it."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


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
        state = optimizer.state[piece.flat]
        copy_stretch(piece.weight(), stored[f"{WEIGHT}/{piece.name}"], piece.start)
        for kind in moments(optimizer, piece):
            if not isinstance(state.get(kind), torch.Tensor):  # before the first step; or in 8 bits, which it makes
                state[kind] = torch.zeros_like(piece.flat)
            copy_stretch(piece.moment(optimizer, kind), stored[f"{kind}/{piece.name}"], piece.start)
        if moments(optimizer, piece) == MOMENTS["adamw"]:
            device = piece.flat.device if piece.flat.is_cuda else "cpu"
            state["step"] = torch.tensor(float(checkpoint.optimizer_steps), device=device)


# What may differ between a model and the weights that it starts from: what no weight has learnt.
MAY_DIFFER = {"seq_len", "chunk_size", "rope_scaling", "rope_factor", "rope_original_seq_len"}


def open_weights(path, model_config, tokenizer, rank=0, world_size=1):
    """The checkpoint of --init-from, whole and of this shape and tokenizer. Raises ValueError or FileNotFoundError.

    tokenizer: the file that the data was made with; rank, world_size: as load_checkpoint takes them.
    """
    checkpoint = load_checkpoint(path, rank, world_size)
    theirs, ours = asdict(checkpoint.model_config), asdict(model_config)
    differ = [f"{key} {theirs[key]} and not {ours[key]}" for key in ours if theirs[key] != ours[key]]
    differ = [line for line in differ if line.split()[0] not in MAY_DIFFER]
    if differ:
        raise ValueError(f"--init-from {path} is of another shape than --size: it has {', '.join(differ)}")
    if file_sha256(checkpoint.tokenizer_path) != file_sha256(tokenizer):
        raise ValueError(f"--init-from {path} has another tokenizer than --data: its weights know other token ids")
    return checkpoint


def newest_whole(run_dir, say, before=None):
    """The newest checkpoint of a run that is whole, or None; `say` gets a line for each that is passed over.

    before: of a step below this one. What is damaged is renamed to step_....damaged, or --keep would count it among
    the newest. All ranks call it: each reads its share of the files, and all come to the same answer.
    """
    alone = not dist.is_initialized()
    rank, world_size = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
    for path in run_dir.unfinished():
        say(f"skipping {path}: unfinished{'' if (path / MANIFEST).exists() else f', it has no {MANIFEST}'}")
    paths = [path for path in run_dir.checkpoints() if before is None or path < run_dir.checkpoint(before)]
    for path in reversed(paths if alone else gather(paths)[0]):  # a host may see a folder later than another
        checkpoint, problem = None, None
        try:
            checkpoint = load_checkpoint(path, rank, world_size)
        except (ValueError, OSError) as error:
            problem = str(error)
        problems = [p for p in ([problem] if alone else gather(problem)) if p]
        if not problems:
            return checkpoint
        say(f"skipping {problems[0]}")
        if rank == 0:
            put_aside(path)
    return None


def delete_old(run_dir, keep, losses):
    """Note the best checkpoint, and delete all but it and the newest `keep`; 0 keeps all. Rank 0 alone calls it.

    losses: as run_dir.heldout_losses gives them.
    """
    best = best_checkpoint(run_dir, losses)
    if keep:
        for path in run_dir.checkpoints()[:-keep]:
            if path.name != best:
                remove_folder(path)
    note_best(run_dir, losses)  # last: on a full disk there is room for it now
