"""The weights of a checkpoint folder, by name: read, checked against their hashes, and written when they are imported.

How a training run writes such a folder, and what its files are, stands in train/checkpoint.py.
"""

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from model.config import ModelConfig
from model.hybrid import HybridLM

FORMAT = 2
FIELDS = {"format", "step", "tokens", "shapes", "run", "files"}
FIELDS_BY_FORMAT = {1: FIELDS, 2: FIELDS | {"sha256"}}  # format 1 could not tell that its manifest was altered
MANIFEST = "checkpoint.json"
TOKENIZER = "tokenizer.model"
WEIGHT = "weight"
HASHERS = min(4, os.cpu_count() or 1)  # threads that read and hash; a core does about 1.5 GB/s
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
    def optimizer_steps(self):
        """Steps in which the optimizer changed the weights: all but those that were skipped (a spike, or NaN)."""
        return self.step - self.run.get("skipped_steps", 0)

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


def check_device(device):
    """Raises ValueError, in one line, for a command's --device that this machine has not."""
    try:
        place = torch.device(device)
    except RuntimeError:
        place = None
    if place is None or place.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {device} is unknown; give cpu, cuda or cuda:1")
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if place.type == "cuda" and n_gpus == 0:
        raise ValueError(f"--device {device}: no GPU here; leave it out")
    if place.type == "cuda" and (place.index or 0) >= n_gpus:
        raise ValueError(f"--device {device}: the last GPU here is cuda:{n_gpus - 1}")


def load_checkpoint(path, rank=0, world_size=1):
    """Open a checkpoint folder and check every file of it against its manifest.

    rank, world_size: read only this process's share of the files, where all processes open the folder and tell one
    another what they found (train.checkpoint.newest_whole); presence and size of all files are checked by each.

    Raises FileNotFoundError or ValueError, in one line that names the file, for what is not a whole checkpoint.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(
            f"checkpoint {path} does not exist; give a folder such as runs/demo/checkpoints/step_0000400"
        )
    manifest = _read_manifest(path)
    files = manifest.pop("files")
    for name, entry in files.items():
        if not (path / name).is_file():
            raise ValueError(f"checkpoint {path} is damaged: {name} is missing; take another checkpoint")
        size = (path / name).stat().st_size
        if size != entry["bytes"]:
            raise ValueError(
                f"checkpoint {path} is damaged: {name} has {size:,} bytes, not {entry['bytes']:,}; "
                "take another checkpoint"
            )
    share = sorted(files, key=lambda name: files[name]["bytes"])[rank::world_size]
    with ThreadPoolExecutor(HASHERS) as threads:
        for name, found in zip(share, threads.map(file_sha256, [path / name for name in share]), strict=True):
            if found != files[name]["sha256"]:
                threads.shutdown(wait=False, cancel_futures=True)
                raise ValueError(
                    f"checkpoint {path} is damaged: the content of {name} has changed; take another checkpoint"
                )
    return Checkpoint(path=path, files=files, **manifest)


def newest_checkpoint(run):
    """The folder of a run's last finished checkpoint; None where there is none, as in what is no run."""
    return max((path.parent for path in run.glob(f"checkpoints/step_*[0-9]/{MANIFEST}")), default=None)


def _read_manifest(folder):
    """The manifest's fields, without those that are about itself. Raises ValueError, in one line, if it is damaged."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a checkpoint: it has no {MANIFEST}; give "
            f"{newest_checkpoint(folder) or 'a folder such as .../checkpoints/step_0000400'}"
        )
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: not JSON ({error})") from None
    format_ = manifest.get("format") if isinstance(manifest, dict) else None
    if not isinstance(format_, int) or set(manifest) != FIELDS_BY_FORMAT.get(format_):
        raise ValueError(f"{path} is not the manifest of a checkpoint that this version reads (format {FORMAT})")
    if format_ > 1 and manifest.pop("sha256") != _checksum(manifest):
        raise ValueError(f"{path} is damaged: its content has changed; take another checkpoint")
    del manifest["format"]
    return manifest


def _checksum(manifest):
    """sha256 of a manifest's other fields: a flipped bit in the manifest itself is found too."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


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
        places = {f"{WEIGHT}/{name}": (0, tensor.numel()) for name, tensor in tensors.items()}
        flat = (tensor.detach().float().flatten().cpu().numpy() for tensor in tensors.values())
        files = {"rank00000.safetensors": write_pieces(part / "rank00000.safetensors", places, flat)}
        if tokenizer is not None:
            files[TOKENIZER] = write_file(part / TOKENIZER, [Path(tokenizer).read_bytes()])
        run = {"model": asdict(config), "data": {"path": str(source), "manifest_sha256": None}}
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        write_manifest(part, step=0, tokens=0, shapes=shapes, run=run, files=files)


def write_pieces(path, places, data):
    """Write a safetensors file of flat float32 pieces. Returns its entry in the manifest.

    places: {"<kind>/<parameter>": (start, numel)}; data: buffers that hold them back to back, in that order.
    safetensors' own save_file would want each tensor in one stretch of memory, and the file read again for its hash.
    """
    header: dict[str, Any] = {
        "__metadata__": {"starts": json.dumps({key: start for key, (start, _) in places.items()})}
    }
    end = 0
    for key, (_, numel) in places.items():
        begin, end = end, end + 4 * numel
        header[key] = {"dtype": "F32", "shape": [numel], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned when they are mapped
    return write_file(path, chain([len(text).to_bytes(8, "little"), text], data))


def write_file(path, data):
    """Write a new file from buffers, to the disk, and hash it while it is written. Returns its entry in the manifest.

    Raises FileExistsError rather than write into another process's file.
    """
    sha256 = hashlib.sha256()
    with open(path, "xb") as file:
        for part in data:
            sha256.update(part)
            file.write(part)
        n_bytes = file.tell()
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": n_bytes, "sha256": sha256.hexdigest()}


def write_manifest(folder, *, step, tokens, shapes, run, files):
    """Write checkpoint.json, which makes a checkpoint of the files."""
    manifest = {"format": FORMAT, "step": step, "tokens": tokens, "shapes": shapes, "run": run, "files": files}
    # read back, so that the sum is of what a reader will find, not of tuples or of numbers as keys
    manifest["sha256"] = _checksum(json.loads(json.dumps(manifest)))
    write_file(folder / MANIFEST, [(json.dumps(manifest, indent=2) + "\n").encode()])


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
