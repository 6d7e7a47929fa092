"""A small finished data folder with evaluation items, and a run folder with one checkpoint of a random model."""

import dataclasses
import json
import random

import torch
from safetensors.torch import save_file
from small_data import finish_folder

from curation.shards import file_sha256, manifest_sha256
from curation.tokenizer import load_tokenizer, train_tokenizer
from model.config import ModelConfig
from model.hybrid import HybridLM

WORDS = [
    "the",
    "model",
    "reads",
    "one",
    "token",
    "after",
    "another",
    "and",
    "keeps",
    "what",
    "in",
    "a",
    "small",
    "state",
]
STEP = 7


def make_text(seed, n_words):
    return " ".join(random.Random(seed).choices(WORDS, k=n_words))


def make_data(folder):
    """Two sources with four held-out documents each, twelve four-way items, ten last words, and a funnel."""
    texts = {"code": [make_text(i, 12 + 20 * i) + "\n" for i in range(4)]}
    texts["prose"] = [make_text(10 + i, 20 + 9 * i) + "\n" for i in range(4)]
    train_tokenizer([text for documents in texts.values() for text in documents], 300, folder / "tokenizer.model")
    tokenizer = load_tokenizer(folder)
    funnel = {}
    for source, documents in texts.items():
        n_bytes = sum(len(document.encode()) for document in documents)
        tokens = sum(1 + len(ids) for ids in tokenizer.encode_batch(documents))
        counts = {"documents": len(documents), "tokens": tokens, "text_bytes": n_bytes}
        twice, thrice = ({key: n * value for key, value in counts.items()} for n in (2, 3))
        funnel[source] = {
            "kind": "prose", "description": f"made of <{source}> words", "read": thrice, "kept": twice,
            "removed_by_rewrites": {"text_bytes": 0},
            "dropped": {"too_short": counts}, "heldout": counts, "train": counts,
        }  # fmt: skip
        write_lines(folder / f"heldout/{source}.jsonl", [{"id": str(i), "text": t} for i, t in enumerate(documents)])
    continuation, last_word = [], []
    for i in range(12):
        choices = [make_text(50 + 4 * i + j, 2 + j) for j in range(4)]
        item = {"id": str(i), "source": "code", "context": make_text(i, 1 + i)}
        continuation.append({**item, "choices": choices, "answer": i % 3})
        last_word.append({**item, "target": "model"})
    write_lines(folder / "tasks/continuation.jsonl", continuation)
    write_lines(folder / "tasks/last_word.jsonl", last_word[:10])
    tasks = {
        "continuation": {"file": "tasks/continuation.jsonl", "items": 12},
        "last_word": {"file": "tasks/last_word.jsonl", "items": 10},
    }
    return finish_folder(folder, tokenizer, {"train": texts, "heldout": texts}, tasks=tasks, funnel=funnel)


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_model(seed=0, **change):
    """A random model of two layers with a window of 16 tokens, so that every document needs several windows.

    change: other fields of its ModelConfig.
    """
    torch.manual_seed(seed)
    config = ModelConfig(
        d_model=32, layer_pattern="MA", n_heads=2, n_kv_heads=1, d_ff=32, seq_len=16, vocab_size=384,
        d_state=8, mamba_head_dim=16, chunk_size=8,
    )  # fmt: skip
    model = HybridLM(dataclasses.replace(config, **change))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)  # far from uniform, so that a mistake shows
    return model.eval()


def make_run(run, data, model):
    """A run folder as training leaves it, with config, metrics and one checkpoint; returns the checkpoint."""
    record = {
        "run": {"size": "tiny", "data": str(data), "run": str(run), "seed": 1},
        "model": dataclasses.asdict(model.config),
        "parameters": model.config.n_parameters,
        "deepspeed": {"zero_optimization": {"stage": 2}},
        "data": {"path": str(data), "manifest_sha256": manifest_sha256(data)},
        "world_size": 2,
        "git_commit": None,
        "argv": ["train/launch.py"],
        "versions": {"torch": torch.__version__},
    }
    rows = [
        {
            "step": i,
            "loss": 6 - 0.1 * i,
            "tokens": 100 * i,
            "tokens_per_s": 50.0,
            "lr": 1e-3,
            "grad_norm": 1.0,
            "seconds": i,
        }
        for i in range(1, STEP + 1)
    ]
    by_source = {"code": 3.5, "prose": 4.5}
    rows[-1] |= {"heldout_loss": 5.5, "heldout_bits_per_byte": 4.0, "heldout_bits_per_byte_by_source": by_source}
    rows[-1] |= {"eval": {"piqa": {"n": 100, "acc": 0.5, "acc_norm": 0.52}}, "eval_s": 0.07}
    checkpoint = run / "checkpoints" / f"step_{STEP:07d}"
    checkpoint.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(record))
    write_lines(run / "metrics.jsonl", rows)
    weights = dict(model.named_parameters())
    tensors = {f"weight/{name}": weight.detach().flatten().clone() for name, weight in weights.items()}
    starts = json.dumps(dict.fromkeys(tensors, 0))
    save_file(tensors, checkpoint / "rank00000.safetensors", metadata={"starts": starts})
    (checkpoint / "tokenizer.model").write_bytes((data / "tokenizer.model").read_bytes())
    files = {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in checkpoint.iterdir()}
    shapes = {name: list(weight.shape) for name, weight in weights.items()}
    content = {"format": 1, "step": STEP, "tokens": 100 * STEP, "shapes": shapes, "run": record, "files": files}
    (checkpoint / "checkpoint.json").write_text(json.dumps(content))
    return checkpoint
