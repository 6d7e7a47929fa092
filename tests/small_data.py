"""A finished data folder of texts that a test gives."""

from curation.shards import ShardHeader, file_sha256, write_manifest, write_source


def finish_folder(folder, tokenizer, texts, **content):
    """Tokenize {split: {source: [text, ...]}} into `folder`, which has its tokenizer, and write the manifest.

    content: what else the manifest says.
    """
    sha256 = file_sha256(tokenizer.path)
    splits = {}
    for split, sources in texts.items():
        entries = {}
        for source, documents in sources.items():
            header = ShardHeader(
                source=source,
                split=split,
                vocab_size=tokenizer.vocab_size,
                separator_id=tokenizer.separator_id,
                tokenizer_sha256=sha256,
            )
            encoded = ((f"{source}/{i}", tokenizer.encode(text)) for i, text in enumerate(documents))
            entries[source] = write_source(folder, header, encoded, sum(len(text.encode()) for text in documents))
            if (folder / f"{split}/{source}.jsonl").is_file():
                entries[source]["text"] = f"{split}/{source}.jsonl"
        totals = {
            name: sum(entry[name] for entry in entries.values()) for name in ("documents", "tokens", "text_bytes")
        }
        splits[split] = {**totals, "sources": entries}
    described = {
        "file": tokenizer.path.name,
        "sha256": sha256,
        "vocab_size": tokenizer.vocab_size,
        "separator_id": tokenizer.separator_id,
    }
    write_manifest(folder, {"tokenizer": described, "splits": splits, **content})
    return folder
