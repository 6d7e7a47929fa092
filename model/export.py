"""Write a checkpoint as a Hugging Face folder, which transformers, vLLM, llama.cpp and lm-eval load.

python -m model.export runs/demo/checkpoints/step_0000520 exports/demo

The folder is of a stock class wherever one has what the shape needs: GraniteMoeHybridForCausalLM (dense), and for
Mamba-2 mixers alone Mamba2ForCausalLM. Other shapes come with the network's own source files and load with
trust_remote_code=True. The command says which it was, and why.
"""

import argparse
import ast
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from model.stock import CLASSES, parameter_names, stock_class, stock_config
from model.tokenizer_files import open_tokenizer, write_tokenizer
from model.weights import load_checkpoint, new_folder

SHARD_GB = 5.0  # what the hub's own exports have
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HERE = Path(__file__).parent
OWN_CLASS = "BraidForCausalLM"
# In an export there is one kind of kernels; the rest of the network's files go along as they are.
OPS = '''"""Which kernels run: here, plain PyTorch whatever is asked for."""

import sys

from .reference import attention


def load_ops(name):
    return sys.modules[attention.__module__]
'''


def export(checkpoint, out, *, dtype="float32", shard_gb=SHARD_GB):
    """Write the folder `out`, whole or not at all. Returns (stock class, None), or (None, why it could not be one).

    Raises ValueError if `out` exists or the checkpoint's tokenizer is of no kind that we train with.
    """
    config, (tokenizer, separator, _) = checkpoint.model_config, open_tokenizer(checkpoint.tokenizer_path)
    separator_id = tokenizer.token_to_id(separator)
    family, why_not = stock_class(config)
    if family:
        content, names = stock_config(config, family), parameter_names(config, family)
    else:
        content, names = own_content(config), {f"model.{name}": (name,) for name in checkpoint.shapes}
    content |= {"dtype": dtype, "bos_token_id": separator_id, "eos_token_id": separator_id}
    with new_folder(Path(out)) as folder:
        write_tensors(checkpoint, names, folder, DTYPES[dtype], shard_gb)
        write_json(folder / "config.json", content)
        write_json(folder / "generation_config.json", generation_content(config, tokenizer, separator_id))
        write_tokenizer(checkpoint.tokenizer_path, folder, seq_len=config.seq_len)
        if not family:
            for name, source in own_sources().items():
                (folder / name).write_text(source)
        (folder / "README.md").write_text(model_card(checkpoint, separator, dtype, family, why_not))
    return CLASSES.get(family), why_not


def own_content(config):
    """config.json of a shape that comes with its own code."""
    return {
        "architectures": [OWN_CLASS],
        "model_type": "braid",
        "auto_map": {
            "AutoConfig": "configuration_braid.BraidConfig",
            "AutoModelForCausalLM": f"modeling_braid.{OWN_CLASS}",
        },
        "shape": asdict(config),
    }


def generation_content(config, tokenizer, separator_id):
    n_pieces = 1 + max(tokenizer.get_vocab().values())
    content = {"bos_token_id": separator_id, "eos_token_id": separator_id, "pad_token_id": separator_id}
    padding = list(range(n_pieces, config.vocab_size))
    return content | ({"suppress_tokens": padding} if padding else {})  # ids that only pad the head


def write_tensors(checkpoint, names, folder, dtype, shard_gb):
    """Write the weights in shards of at most shard_gb, one parameter alone excepted, and the index if there are many.

    names: {name in the folder: the names of ours that make it up}. One shard is held in memory at a time.
    """
    shards, room = [[]], shard_gb * 1e9
    total = 0
    for name, ours in names.items():
        size = dtype.itemsize * sum(torch.Size(checkpoint.shapes[part]).numel() for part in ours)
        if shards[-1] and size > room:
            shards.append([])
            room = shard_gb * 1e9
        shards[-1].append(name)
        room -= size
        total += size
    where = {}
    for i, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: join(name, [checkpoint.tensor(part) for part in names[name]]).to(dtype) for name in shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors writes for the owner alone, but a server may be another user
        where |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def join(name, parts):
    """Our parameters as the stock class's one."""
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    return whole.unsqueeze(1) if name.endswith("conv1d.weight") else whole


def own_sources():
    """{file name: source} of modeling_braid.py and of every file of ours that it imports, with relative imports."""
    sources, waiting = {}, ["modeling_braid"]
    while waiting:
        stem = waiting.pop()
        if f"{stem}.py" in sources:
            continue
        source = OPS if stem == "ops" else (HERE / f"{stem}.py").read_text()
        sources[f"{stem}.py"] = re.sub(r"^from model\.", "from .", source, flags=re.MULTILINE)
        imported = [node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
        waiting += [module.removeprefix("model.") for module in imported if module.startswith("model.")]
        waiting += ["reference"] if stem == "ops" else []
    return sources


def model_card(checkpoint, separator, dtype, family, why_not):
    """README.md of the folder."""
    config = checkpoint.model_config
    remote = "" if family else ", trust_remote_code=True"
    kind = (
        f"It is of transformers' own class `{CLASSES[family]}`, and needs no other code."
        if family
        else f"It comes with its own code (`modeling_braid.py`), because {why_not}."
    )
    rows = "\n".join(f"| `{name}` | {json.dumps(value)} |" for name, value in asdict(config).items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

A causal language model of {config.n_parameters:,} parameters in {dtype}: {config.layer_pattern.count("M")} Mamba-2 and
{config.layer_pattern.count("A")} attention layers, trained with Braid on {checkpoint.tokens:,} tokens (step
{checkpoint.step:,}). {kind}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("this folder"{remote})
model = AutoModelForCausalLM.from_pretrained("this folder"{remote})
print(tokenizer.decode(model.generate(**tokenizer("def main(", return_tensors="pt"), max_new_tokens=40)[0]))
```

The tokenizer puts the separator `{separator}` in front of a text, as in training. That string inside a text stays
text; with `split_special_tokens=False` it becomes the separator. The model has seen contexts of {config.seq_len:,}
tokens.

| shape | |
|---|---|
{rows}
"""


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2) + "\n")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m model.export", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("checkpoint", help="a checkpoint folder: runs/<run>/checkpoints/step_...")
    parser.add_argument("out", help="the folder to write; it must not exist")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: as trained)")
    parser.add_argument(
        "--shard-gb", type=float, default=SHARD_GB, help="size of a file, at most (default %(default)s)"
    )
    flags = parser.parse_args(argv)
    try:
        if not flags.shard_gb > 0:
            raise ValueError(f"--shard-gb {flags.shard_gb}: it must be positive")
        checkpoint = load_checkpoint(flags.checkpoint)
        name, why_not = export(checkpoint, flags.out, dtype=flags.dtype, shard_gb=flags.shard_gb)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if name:
        print(f"{flags.out}: stock class {name}, which has all that this shape needs")
    else:
        print(f"{flags.out}: own code, load with trust_remote_code=True, because {why_not}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
