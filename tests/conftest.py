"""A small finished data folder, shared by the tests; no GPU unless asked for, no network, one thread a process."""

import json
import os

import pytest

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="let the tests see the GPUs; without it all run on the CPU")


def pytest_configure(config):
    if not config.getoption("--gpu"):
        os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A finished data folder of the standard library's documentation topics: two sources, vocabulary 512."""
    from pydoc_data.topics import topics

    from curation.shards import file_sha256, write_shard
    from curation.tokenizer import load_tokenizer, train_tokenizer

    folder = tmp_path_factory.mktemp("data") / "topics"
    texts = [topics[name] for name in sorted(topics)][:60]
    train_tokenizer(texts, 512, folder / "tokenizer.model")
    tokenizer = load_tokenizer(folder)
    shares = {"train": {"one": texts[:30], "two": texts[30:52]}, "heldout": {"one": texts[52:56], "two": texts[56:]}}
    splits = {}
    for split, sources in shares.items():
        entries = {}
        for source, documents in sources.items():
            stem = f"{split}/{source}-00000"
            counts = write_shard(folder / stem, tokenizer.encode_batch(documents), tokenizer.separator_id, "uint16")
            entries[source] = {
                "documents": counts.documents,
                "tokens": counts.tokens,
                "text_bytes": sum(len(document.encode()) for document in documents),
                "shards": [{"tokens": f"{stem}.npy", "starts": f"{stem}.starts.npy"}],
            }
        splits[split] = {"sources": entries}
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    vocabulary = {"file": "tokenizer.model", "vocab_size": 512, "separator_id": tokenizer.separator_id}
    manifest = {"format": 1, "tokenizer": vocabulary, "token_dtype": "uint16", "splits": splits, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
