"""Shards: written whole, read back across their edges, and refused by name when damaged."""

import hashlib
import json

import numpy as np
import pytest

from curation.shards import (
    ShardCounts,
    file_names,
    main,
    manifest_sha256,
    new_file,
    open_stream,
    read_manifest,
    token_dtype,
    verify_files,
    write_shard,
)

SEPARATOR_ID = 0
DOCUMENTS = {
    "train": {"alpha": [[[5, 6, 7], [8]], [[9, 9]]], "beta": [[[1, 2, 3, 4]]]},
    "heldout": {"alpha": [[[3, 3]]]},
}


def make_folder(folder):
    """A data folder of three sources' shards with 9 + 5 training tokens, as the pipeline would write it."""
    splits = {}
    for split, sources in DOCUMENTS.items():
        entries = {}
        for source, shards in sources.items():
            entry = {"documents": 0, "tokens": 0, "text_bytes": 10, "shards": []}
            for number, documents in enumerate(shards):
                stem = f"{split}/{source}-{number:05d}"
                counts = write_shard(folder / stem, documents, SEPARATOR_ID, np.uint16)
                entry["documents"] += counts.documents
                entry["tokens"] += counts.tokens
                entry["shards"].append({"tokens": f"{stem}.npy", "starts": f"{stem}.starts.npy"})
            entries[source] = entry
        splits[split] = {"sources": entries}
    files = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(folder.rglob("*.npy"))
    }
    manifest = {
        "format": 1,
        "tokenizer": {"file": "tokenizer.model", "vocab_size": 16, "separator_id": SEPARATOR_ID},
        "token_dtype": "uint16",
        "splits": splits,
        "files": files,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "data")


# tokens: alpha-0 [0 5 6 7 0 8]  alpha-1 [0 9 9]  beta-0 [0 1 2 3 4]
STREAM = [0, 5, 6, 7, 0, 8, 0, 9, 9, 0, 1, 2, 3, 4]


def test_stream_holds_every_document_in_order_behind_its_separator(folder):
    stream = open_stream(folder, "train")
    tokens, document_ids = stream.read(0, stream.n_tokens)
    assert tokens.tolist() == STREAM
    assert document_ids.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3]
    assert tokens.dtype == document_ids.dtype == np.int64
    assert (stream.n_tokens, stream.n_documents, stream.text_bytes) == (14, 4, 20)


def test_every_slice_across_shard_edges_equals_the_slice_of_the_whole(folder):
    stream = open_stream(folder, "train")
    for start in range(len(STREAM)):
        for n in range(1, len(STREAM) - start + 1):
            tokens, document_ids = stream.read(start, n)
            assert tokens.tolist() == STREAM[start : start + n]
            expected, document = [], 0
            for i, token in enumerate(tokens):
                document += i > 0 and token == SEPARATOR_ID
                expected.append(document)
            assert document_ids.tolist() == expected


@pytest.mark.parametrize(("start", "n"), [(-1, 2), (0, 15), (14, 1), (3, 0)])
def test_slice_outside_the_stream_is_refused(folder, start, n):
    with pytest.raises(ValueError, match="it has 14"):
        open_stream(folder, "train").read(start, n)


def test_stream_can_be_limited_to_some_sources(folder):
    stream = open_stream(folder, "train", ["beta"])
    assert stream.read(0, stream.n_tokens)[0].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="no source 'gamma'; it has: alpha, beta"):
        open_stream(folder, "train", ["gamma"])
    with pytest.raises(ValueError, match="allowed: train, heldout"):
        open_stream(folder, "test")


def test_starts_point_at_the_separators(tmp_path):
    counts = write_shard(tmp_path / "x", [[7, 8], [], [9]], SEPARATOR_ID, np.uint16)
    assert counts == ShardCounts(documents=3, tokens=6)
    assert np.load(tmp_path / "x.starts.npy").tolist() == [0, 3, 4]
    assert np.load(tmp_path / "x.npy").tolist() == [0, 7, 8, 0, 0, 9]


def test_tokens_are_as_narrow_as_the_vocabulary_allows():
    assert token_dtype(65_536) == np.uint16
    assert token_dtype(65_537) == np.uint32


@pytest.mark.parametrize(
    ("documents", "message"),
    [([], "at least one document"), ([[1], [2, 0]], "document 1 contains the separator"), ([[70_000]], "do not fit")],
)
def test_shard_that_could_not_be_read_back_is_not_written(tmp_path, documents, message):
    with pytest.raises(ValueError, match=message):
        write_shard(tmp_path / "x", documents, SEPARATOR_ID, np.uint16)
    assert not list(tmp_path.iterdir())


def test_file_does_not_appear_when_writing_fails(tmp_path):
    (tmp_path / "x").write_text("old")
    with pytest.raises(RuntimeError), new_file(tmp_path / "x") as file:
        file.write(b"half")
        raise RuntimeError
    assert (tmp_path / "x").read_text() == "old"


def truncate(path):
    path.write_bytes(path.read_bytes()[:-2])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["train/alpha-00001.npy", "heldout/alpha-00000.starts.npy"])
@pytest.mark.parametrize(
    ("damage", "message"), [(truncate, "truncated"), (flip_a_bit, "altered"), (lambda path: path.unlink(), "missing")]
)
def test_damaged_file_is_named_by_verify_with_exit_code_2(folder, name, damage, message, capsys):
    damage(folder / name)
    with pytest.raises(ValueError, match=f"{name} .*{message}"):
        verify_files(folder, file_names(read_manifest(folder)))
    assert main(["verify", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: 1 of 8 files are damaged") and name in error and message in error


def test_whole_folder_verifies_with_exit_code_0(folder, capsys):
    verify_files(folder, file_names(read_manifest(folder)))
    assert main(["verify", str(folder)]) == 0
    assert "train 14 tokens in 4 documents" in capsys.readouterr().out


def test_truncated_or_missing_shard_is_refused_by_name_when_opened(folder):
    truncate(folder / "train/alpha-00001.npy")
    with pytest.raises(ValueError, match="alpha-00001.npy is truncated"):
        open_stream(folder, "train")
    open_stream(folder, "heldout")
    (folder / "train/alpha-00001.npy").unlink()
    with pytest.raises(ValueError, match="alpha-00001.npy is missing"):
        open_stream(folder, "train")


def test_shard_of_another_type_or_length_is_refused_by_name_when_opened(folder):
    path = folder / "train/beta-00000.npy"
    manifest = json.loads((folder / "manifest.json").read_text())
    for array, message in [
        (np.zeros(5, np.uint32), "holds uint32"),
        (np.zeros((5, 1), np.uint16), r"shape \(5, 1\)"),
        (np.zeros(9, np.uint16), "beta has 9 tokens, the manifest says 5;"),
    ]:
        np.save(path, array)
        manifest["files"]["train/beta-00000.npy"]["bytes"] = path.stat().st_size
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match=message):
            open_stream(folder, "train")


def test_starts_that_do_not_fit_their_shard_are_refused_by_verify(folder, capsys):
    path = folder / "train/beta-00000.starts.npy"
    manifest = json.loads((folder / "manifest.json").read_text())
    for starts, message in [([0, 5], "beta-00000.starts.npy points outside its shard"), ([0, 3], "has 2 documents")]:
        np.save(path, np.array(starts, np.uint64))
        entry = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        manifest["files"]["train/beta-00000.starts.npy"] = entry
        (folder / "manifest.json").write_text(json.dumps(manifest))
        assert main(["verify", str(folder)]) == 2
        assert message in capsys.readouterr().err


def test_missing_unfinished_and_foreign_folders_are_told_apart(tmp_path, folder, capsys):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_manifest(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="unfinished"):
        open_stream(tmp_path / "empty", "train")
    for text, message in [
        ("{", "not JSON"),
        ("[]", "not the manifest"),
        ('{"format": 1}', "not the manifest"),
        ((folder / "manifest.json").read_text().replace('"format": 1', '"format": 2'), "format 2"),
    ]:
        (folder / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            read_manifest(folder)
        assert "\n" not in str(caught.value)
    assert main(["verify", str(tmp_path / "nowhere")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_identity_of_a_folder_changes_with_any_file(tmp_path, folder):
    assert manifest_sha256(folder) == manifest_sha256(make_folder(tmp_path / "same"))
    other = make_folder(tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["files"]["train/beta-00000.npy"]["sha256"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    assert manifest_sha256(folder) != manifest_sha256(other)
