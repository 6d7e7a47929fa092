"""Take the weights of a Hugging Face folder into our network:  python -m model.import_hf HF_FOLDER CKPT

HF_FOLDER is of GraniteMoeHybrid (dense, as Granite 4.0-H's small ones) or Bamba, or written by model.export. CKPT
becomes a checkpoint folder with weights alone, of step 0: it can be scored, sampled and exported, but not resumed.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from model.config import ModelConfig
from model.hybrid import HybridLM
from model.stock import model_config, parameter_names, turning_first
from model.tokenizer_files import open_processor
from model.weights import TOKENIZER, write_weights


def import_folder(folder, out):
    """Write the checkpoint folder `out`, whole or not at all; returns its ModelConfig.

    Raises FileNotFoundError or ValueError, in one line, for a folder that is none of ours to read, or that has what
    our network has not.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json; give the folder of a Hugging Face model")
    try:
        config, names = read_config(folder)
    except ValueError as error:
        raise ValueError(f"{folder} cannot be imported: {error}") from None
    tensors = read_tensors(folder, config, names)
    write_weights(out, config, tensors, source=folder, tokenizer=our_tokenizer(folder))
    return config


def read_config(folder):
    """(ModelConfig, {name in the folder: the names of ours that make it up})"""
    content = json.loads((folder / "config.json").read_bytes())
    if content.get("model_type") == "braid":
        config = ModelConfig(**content["shape"])
        return config, {f"model.{name}": (name,) for name in parameter_shapes(config)}
    # through transformers, which knows what a field is that the file leaves out, and the older names
    theirs = AutoConfig.from_pretrained(folder, local_files_only=True)
    config = model_config(theirs)
    return config, parameter_names(config, theirs.model_type)


def parameter_shapes(config):
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in HybridLM(config, kernels="torch").named_parameters()}


def read_tensors(folder, config, names):
    """{our name: float32 tensor}; each of the folder's is cut, by rows, into the ones of ours that it holds."""
    files, shapes, tensors = tensor_files(folder), parameter_shapes(config), {}
    allowed = {"lm_head.weight"} if config.tied_embeddings else set()  # the embedding again
    wrong = sorted(set(names) - set(files)) + sorted(set(files) - set(names) - allowed)
    if wrong:
        what = "misses" if wrong[0] in names else "has the unknown"
        raise ValueError(
            f"{folder} {what} parameter {wrong[0]} ({len(wrong)} such); its config.json fits other weights"
        )
    turned = config.rope_dim is not None  # never so in Granite, and ours has the rows in our order already
    for name, ours in names.items():
        with safe_open(files[name], framework="pt") as opened:
            whole = opened.get_tensor(name).float()
        if turned and name.endswith(("q_proj.weight", "k_proj.weight")):
            whole = turning_first(whole, config)
        rows = [shapes[part][0] for part in ours]
        if len(whole) != sum(rows) or whole.numel() != sum(shapes[part].numel() for part in ours):
            raise ValueError(
                f"{folder}: {name} has the shape {list(whole.shape)}, which its config.json does not give"
            )
        for part, piece in zip(ours, whole.split(rows), strict=True):
            tensors[part] = piece.reshape(shapes[part])
    return {name: tensors[name] for name in shapes}


def tensor_files(folder):
    """{parameter name: the safetensors file that holds it}"""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no *.safetensors file; other formats are not read")
    found = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                found |= dict.fromkeys(opened.keys(), file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}") from None
    return found


def our_tokenizer(folder):
    """The folder's tokenizer.model if it is one of ours, else None."""
    path = folder / TOKENIZER
    try:
        open_processor(path)
    except (OSError, ValueError):
        return None
    return path


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m model.import_hf", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", help="a Hugging Face folder with config.json and *.safetensors")
    parser.add_argument("out", help="the checkpoint folder to write; it must not exist")
    flags = parser.parse_args(argv)
    try:
        config = import_folder(flags.folder, flags.out)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{flags.out}: {config.n_parameters:,} parameters, layers {config.layer_pattern}")
    if not (Path(flags.out) / TOKENIZER).is_file():
        print(f"without a tokenizer: {flags.folder} has no {TOKENIZER} of ours, so it cannot be scored as it is")
    return 0


if __name__ == "__main__":
    sys.exit(main())
