"""Shards out to Megatron's and datatrove's formats, read there by their own classes, and back again."""

from types import SimpleNamespace

import numpy as np
import pytest
from small_data import finish_folder

from curation.interchange import export_datatrove, export_megatron, import_tokens, main
from curation.shards import open_shard, open_stream, read_manifest
from curation.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def documents(data):
    """{source: the tokens of each training document, without separator}"""
    found = {}
    for source, entry in read_manifest(data)["splits"]["train"]["sources"].items():
        found[source] = []
        for name in entry["shards"]:
            shard = open_shard(data / name)
            found[source] += [part[1:].tolist() for part in np.split(shard.tokens, shard.starts[1:].astype(int))]
    return found


@pytest.fixture(scope="module")
def separator_id(data):
    return read_manifest(data)["tokenizer"]["separator_id"]


def same_as(data, imported):
    """Whether two folders hold the same training documents of the same sources, in the same order."""
    ours, theirs = open_stream(data, "train"), open_stream(imported, "train")
    counts = [(stream.sources, stream.n_documents, stream.n_tokens, stream.text_bytes) for stream in (ours, theirs)]
    rows = [stream.read(0, stream.n_tokens)[0] for stream in (ours, theirs)]
    return counts[0] == counts[1] and np.array_equal(*rows)


def test_megatron_reads_what_is_exported(data, documents, separator_id, tmp_path):
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    export_megatron(data, "train", tmp_path)
    for source, texts in documents.items():
        dataset = indexed.IndexedDataset(str(tmp_path / source))
        assert [dataset[i].tolist() for i in range(len(dataset))] == [[*text, separator_id] for text in texts]
        assert dataset.document_indices.tolist() == list(range(len(texts) + 1))


def test_datatrove_reads_what_is_exported(data, documents, separator_id, tmp_path):
    from datatrove.utils.dataset import DatatroveFolderDataset

    paths = export_datatrove(data, "train", tmp_path)
    stream = [token for source in sorted(documents) for text in documents[source] for token in [*text, separator_id]]
    n = 32
    dataset = DatatroveFolderDataset(str(tmp_path), n - 1, "*.ds", token_size=2, return_positions=True,
                                     positions_from_eos_token_id=separator_id)  # fmt: skip
    assert len(paths) == len(dataset.files) == len(documents)
    start = 0
    for source, part in zip(sorted(documents), dataset.files, strict=True):
        n_tokens = sum(len(text) + 1 for text in documents[source])
        windows = [part[i]["input_ids"].tolist() for i in range(len(part))]
        assert windows == [stream[start + i : start + i + n] for i in range(0, n_tokens - n + 1, n)]
        start += n_tokens


def test_datatrove_files_are_those_that_datatrove_writes(data, documents, separator_id, tmp_path):
    """Byte for byte, but for the name of the tokenizer."""
    from datatrove.pipeline.tokens.tokenizer import TokenizedFile

    (ours, *_) = export_datatrove(data, "train", tmp_path / "ours")
    theirs = TokenizedFile(
        str(tmp_path), ours.name, save_final_metadata=True, tokenizer_name_or_path="tokenizer.model"
    )
    for text in documents["one"]:
        theirs.write([*text, separator_id], None)
    theirs.close()
    for name in (ours.name, f"{ours.name}.index", f"{ours.name}.metadata"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize(("to", "pattern"), [("megatron", "{}.idx"), ("datatrove", "{}_*.ds")])
def test_out_and_in_again_gives_the_same_documents(data, documents, tmp_path, capsys, to, pattern):
    assert main(["export", str(data), "--to", to, "--out", str(tmp_path / to)]) == 0
    sources = [f"--source={source}={tmp_path / to / pattern.format(source)}" for source in documents]
    command = ["import", *sources, "--tokenizer", str(data), "--out", str(tmp_path / "back")]
    assert main(command) == 0
    assert same_as(data, tmp_path / "back")
    assert load_tokenizer(tmp_path / "back").sha256 == load_tokenizer(data).sha256
    assert main(command) == 2
    assert "holds a data folder already" in capsys.readouterr().err


def test_large_vocabulary_is_exported_as_four_bytes(tmp_path):
    """More ids than 2 bytes hold: int32 for Megatron, which has no uint32, and uint32 for datatrove."""
    ids = {"a": [1, 70_000, 2], "b": [], "c": [99_998]}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tokenizer.json").write_bytes(b"")
    large = SimpleNamespace(
        path=tmp_path / "data" / "tokenizer.json", vocab_size=100_000, separator_id=99_999, encode=ids.__getitem__
    )
    data = finish_folder(tmp_path / "data", large, {"train": {"one": list(ids)}, "heldout": {}})
    export_megatron(data, "train", tmp_path)
    export_datatrove(data, "train", tmp_path)
    expected = [1, 70_000, 2, 99_999, 99_999, 99_998, 99_999]
    assert np.fromfile(tmp_path / "one.bin", "<i4").tolist() == expected
    assert np.fromfile(tmp_path / "one_00000.ds", "<u4").tolist() == expected
    assert np.fromfile(tmp_path / "one_00000.ds.index", "<u8").tolist() == [4, 5, 7]


def test_what_megatron_and_datatrove_write_is_imported(data, documents, separator_id, tmp_path):
    """Several sequences to a document from Megatron, and no separators at all from datatrove."""
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    import torch
    from datatrove.pipeline.tokens.tokenizer import TokenizedFile

    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "one.bin"), dtype=np.uint16)
    for text in documents["one"]:
        for part in (text[:10], text[10:]):
            builder.add_item(torch.tensor(part, dtype=torch.int32))
        builder.end_document()
    builder.finalize(str(tmp_path / "one.idx"))
    file = TokenizedFile(str(tmp_path), "two_00000.ds")
    for text in documents["two"]:
        file.write(text, None)
    file.close()
    sources = {"one": [tmp_path / "one.idx"], "two": [tmp_path / "two_00000.ds"]}
    import_tokens(sources, data, tmp_path / "back", shard_tokens=2000)
    assert same_as(data, tmp_path / "back")
    assert len(read_manifest(tmp_path / "back")["splits"]["train"]["sources"]["one"]["shards"]) > 5


def test_damaged_and_foreign_files_are_refused_by_name(data, documents, separator_id, tmp_path):
    export_megatron(data, "train", tmp_path)
    export_datatrove(data, "train", tmp_path)
    idx, ds = tmp_path / "one.idx", tmp_path / "one_00000.ds"
    whole = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def refused(path, name, error=ValueError):
        with pytest.raises(error, match=name) as caught:
            import_tokens({"one": [path]}, data, tmp_path / "never")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "never" / "manifest.json").exists()
        for kept, content in whole.items():
            kept.write_bytes(content)

    for path, damaged in ((idx, idx), (idx, tmp_path / "one.bin"), (ds, ds), (ds, tmp_path / "one_00000.ds.index")):
        damaged.write_bytes(whole[damaged][:-3])
        refused(path, path.stem)
        damaged.unlink()
        refused(path, path.stem, (FileNotFoundError, ValueError))
    idx.write_bytes(b"")
    refused(idx, "one.idx")
    tokens = np.frombuffer(whole[ds], "<u2").copy()
    tokens[5] = 60_000
    ds.write_bytes(tokens.tobytes())
    refused(ds, "holds the token 60000")
    tokens[5] = separator_id
    ds.write_bytes(tokens.tobytes())
    refused(ds, "document 0 contains the separator")
    (tmp_path / "one.txt").write_text("text")
    whole[tmp_path / "one.txt"] = b""
    refused(tmp_path / "one.txt", "neither an .idx nor a .ds")


def test_pattern_without_a_file_is_refused_in_one_line(data, tmp_path, capsys):
    command = ["import", "--tokenizer", str(data), "--out", str(tmp_path / "out")]
    for source in ("one", "one=", f"one={tmp_path}/*.ds", f"={data}/*.json"):
        assert main([*command, "--source", source]) == 2
        assert capsys.readouterr().err.startswith(f"error: --source {source} names no file")
