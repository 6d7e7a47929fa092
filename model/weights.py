"""The weights of a checkpoint folder, by name: read, checked against their hashes, and written when they are imported.

How a training run writes such a folder, and what its files are, stands in train/checkpoint.py.
"""

import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from model.config import ModelConfig
from model.hybrid import HybridLM

FORMAT = 1
MANIFEST = "checkpoint.json"
TOKENIZER = "tokenizer.model"
WEIGHT = "weight"
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",)}  # what a step of each leaves behind


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint on disk."""

    path: Path
    step: int
    tokens: int  # training tokens seen
    shapes: dict[str, list[int]]  # of every parameter, by name
    run: dict[str, Any]  # the run's config.json
    files: dict[str, dict[str, Any]]

    @property
    def model_config(self):
        return ModelConfig(**self.run["model"])

    @property
    def data(self):
        """{"path", "manifest_sha256"} of the data folder that it was trained on."""
        return self.run["data"]

    @property
    def tokenizer_path(self):
        """Raises FileNotFoundError where it has none, as imported weights may."""
        if TOKENIZER not in self.files:
            raise FileNotFoundError(
                f"checkpoint {self.path} has no {TOKENIZER}: its weights were imported from {self.data['path']}, "
                "which held none of ours; import a folder that does"
            )
        return self.path / TOKENIZER

    @property
    def optimizer_steps(self):
        """How many steps the optimizer has taken: those of the run but for the skipped ones."""
        return self.step - self.run.get("skipped_steps", 0)

    @property
    def has_moments(self):
        """Whether training can go on from it exactly; imported weights have none."""
        return all(self.moments(name) for name in self.shapes)

    def moments(self, name):
        """The kinds of moments that are stored of a parameter: one of MOMENTS' tuples, or () of imported weights."""
        for kinds in MOMENTS.values():
            if all(f"{kind}/{name}" in self.stored_pieces for kind in kinds):
                return kinds
        return ()

    @cached_property
    def sha256(self):
        """Identity of the checkpoint: of its manifest, which holds the sha256 of every other file."""
        return file_sha256(self.path / MANIFEST)

    @cached_property
    def stored_pieces(self):
        """{"<kind>/<parameter>": [(file, key, start, numel)]}"""
        found: dict[str, list] = {}
        for name in sorted(n for n in self.files if n.endswith(".safetensors")):
            with safe_open(self.path / name, framework="pt") as opened:
                starts = json.loads(opened.metadata()["starts"])
                for key, start in starts.items():
                    numel = opened.get_slice(key).get_shape()[0]
                    found.setdefault(key, []).append((self.path / name, key, start, numel))
        return found

    def tensor(self, name, kind=WEIGHT):
        """One parameter in float32, or one of its `moments`."""
        whole = torch.empty(self.shapes[name])
        copy_stretch(whole.view(-1), self.stored_pieces[f"{kind}/{name}"], 0)
        return whole

    def tensors(self, kind=WEIGHT):
        """{parameter name: float32 tensor} of the weights, or of one kind of moments, where a parameter has it."""
        return {name: self.tensor(name, kind) for name in self.shapes if kind == WEIGHT or kind in self.moments(name)}

    def load_model(self, device="cpu", kernels="auto"):
        """The model with these weights in float32, ready for inference."""
        if kernels == "auto" and torch.device(device).type == "cpu":
            kernels = "torch"  # whatever GPU the machine has
        model = HybridLM(self.model_config, kernels=kernels)
        model.load_state_dict(self.tensors())
        return model.to(device).eval()


def load_checkpoint(path):
    """Open a checkpoint folder and check every file of it against its manifest.

    Raises FileNotFoundError or ValueError, in one line that names the file, for what is not a whole checkpoint.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(
            f"checkpoint {path} does not exist; give a folder such as runs/demo/checkpoints/step_0000400"
        )
    if not (path / MANIFEST).is_file():
        raise ValueError(
            f"{path} is not a checkpoint: it has no {MANIFEST}; give a folder such as .../checkpoints/step_0000400"
        )
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path / MANIFEST} is damaged: not JSON ({error})") from None
    fields = {"format", "step", "tokens", "shapes", "run", "files"}
    if not isinstance(manifest, dict) or set(manifest) != fields or manifest["format"] != FORMAT:
        raise ValueError(
            f"{path / MANIFEST} is not the manifest of a checkpoint that this version reads (format {FORMAT})"
        )
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"checkpoint {path} is damaged: {name} is missing; take another checkpoint")
        if file.stat().st_size != entry["bytes"]:
            raise ValueError(
                f"checkpoint {path} is damaged: {name} has {file.stat().st_size:,} bytes, not {entry['bytes']:,}; "
                "take another checkpoint"
            )
        if file_sha256(file) != entry["sha256"]:
            raise ValueError(
                f"checkpoint {path} is damaged: the content of {name} has changed; take another checkpoint"
            )
    del manifest["format"]
    return Checkpoint(path=path, **manifest)


def copy_stretch(target, pieces, start):
    """Fill `target`, a parameter's elements from `start` on, from its stored pieces [(file, key, start, numel)]."""
    for file, key, piece_start, piece_numel in pieces:
        first, last = max(start, piece_start), min(start + target.numel(), piece_start + piece_numel)
        if first < last:
            with safe_open(file, framework="pt") as opened:
                stretch = opened.get_slice(key)[first - piece_start : last - piece_start]
            target[first - start : last - start].copy_(stretch)


def write_weights(folder, config, tensors, *, source, tokenizer=None):
    """Write a checkpoint folder that has weights alone: of step 0, without moments. Whole or not at all.

    tensors: {parameter name: tensor} of HybridLM(config); source: the folder that they are from; tokenizer: a path.
    Raises ValueError if `folder` exists.
    """
    folder = Path(folder)
    with new_folder(folder) as part:
        flat = {f"{WEIGHT}/{name}": tensor.detach().float().flatten().contiguous() for name, tensor in tensors.items()}
        save_file(flat, part / "rank00000.safetensors", metadata={"starts": json.dumps(dict.fromkeys(flat, 0))})
        if tokenizer is not None:
            shutil.copyfile(tokenizer, part / TOKENIZER)
        files = {f.name: {"bytes": f.stat().st_size, "sha256": file_sha256(f)} for f in sorted(part.iterdir())}
        run = {"model": asdict(config), "data": {"path": str(source), "manifest_sha256": None}}
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        manifest = {"format": FORMAT, "step": 0, "tokens": 0, "shapes": shapes, "run": run, "files": files}
        (part / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


@contextmanager
def new_folder(folder):
    """An empty folder that appears under its name when the block ends without an error, and else not at all.

    Raises ValueError if `folder` exists.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists already; give a new folder")
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        for file in part.iterdir():
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
