"""Shards: written whole, read back across their edges, and refused by name when damaged."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from curation.shards import (
    ShardHeader,
    file_entry,
    file_names,
    id_hash,
    main,
    manifest_sha256,
    new_file,
    open_shard,
    open_stream,
    pack,
    read_manifest,
    token_dtype,
    verify_files,
    write_manifest,
    write_shard,
    write_source,
)

ROOT = Path(__file__).resolve().parents[1]
SEPARATOR_ID = 0
HEADER = ShardHeader(source="x", split="train", vocab_size=16, separator_id=SEPARATOR_ID, tokenizer_sha256="ab" * 32)
DOCUMENTS = {
    "train": {"alpha": [[5, 6, 7], [8], [9, 9]], "beta": [[1, 2, 3, 4]]},
    "heldout": {"alpha": [[3, 3]]},
}


def header(**change):
    return ShardHeader(**{**vars(HEADER), **change})


def make_folder(folder):
    """A data folder of three sources' shards with 9 + 5 training tokens, as the pipeline would write it."""
    (folder / "train").mkdir(parents=True)
    (folder / "tokenizer.model").write_text("a tokenizer")
    tokenizer = file_entry(folder / "tokenizer.model")["sha256"]
    splits = {}
    for split, sources in DOCUMENTS.items():
        splits[split] = {"sources": {}}
        for source, documents in sources.items():
            named = [(f"{source}/{i}", document) for i, document in enumerate(documents)]
            this = header(source=source, split=split, tokenizer_sha256=tokenizer)
            splits[split]["sources"][source] = write_source(folder, this, named, 10, shard_tokens=6)
    write_again(folder, splits, sha256=tokenizer)
    return folder


def write_again(folder, splits, **tokenizer):
    described = {"file": "tokenizer.model", "vocab_size": 16, "separator_id": SEPARATOR_ID} | tokenizer
    write_manifest(folder, {"tokenizer": described, "splits": splits})


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


def one_shard(path, documents, **change):
    this = header(**change)
    lengths, tokens = pack(documents, this.separator_id, np.int64)
    ids = np.array([id_hash(str(i)) for i in range(len(documents))]).reshape(-1, 2)
    return write_shard(path, this, ids, lengths, np.array_split(tokens, 3))


def test_shard_says_what_it_holds_and_where_each_document_is(tmp_path):
    assert one_shard(tmp_path / "x.safetensors", [[7, 8], [], [9]]) == {"documents": 3, "tokens": 6}
    shard = open_shard(tmp_path / "x.safetensors")
    assert shard.header == HEADER
    assert shard.starts.tolist() == [0, 3, 4]
    assert shard.tokens.tolist() == [0, 7, 8, 0, 0, 9]
    assert (shard.ids[2] == id_hash("2")).all()


@pytest.mark.parametrize(("vocab_size", "dtype"), [(16, np.uint16), (151_665, np.uint32)])
def test_shard_is_a_safetensors_file_for_any_reader_of_that_format(tmp_path, vocab_size, dtype):
    one_shard(tmp_path / "x.safetensors", [[7, 8], [], [9]], vocab_size=vocab_size)
    arrays = load_file(tmp_path / "x.safetensors")
    assert arrays["tokens"].dtype == dtype and arrays["tokens"].tolist() == [0, 7, 8, 0, 0, 9]
    assert arrays["starts"].tolist() == [0, 3, 4] and arrays["ids"].shape == (3, 2)


def test_tokens_are_as_narrow_as_the_vocabulary_allows():
    assert token_dtype(65_536) == np.uint16
    assert token_dtype(65_537) == np.uint32


@pytest.mark.parametrize(
    ("documents", "message"),
    [([], "at least one document"), ([[1], [2, 0]], "document 1 contains the separator"), ([[16]], "not below 16")],
)
def test_shard_that_could_not_be_read_back_is_not_written(tmp_path, documents, message):
    with pytest.raises(ValueError, match=message):
        one_shard(tmp_path / "x.safetensors", documents)
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("tokens", [[0, 7], [0, 7, 8, 9], [7, 0, 8]])
def test_tokens_that_do_not_fit_the_lengths_are_refused(tmp_path, tokens):
    with pytest.raises(ValueError, match="x.safetensors"):
        write_shard(tmp_path / "x.safetensors", HEADER, np.zeros((1, 2)), [3], [np.array(tokens)])
    assert not (tmp_path / "x.safetensors").exists()


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


@pytest.mark.parametrize("name", ["train/alpha-00001.safetensors", "heldout/alpha-00000.safetensors"])
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
    assert error.startswith("error: 1 of 5 files are damaged") and name in error and message in error


def test_whole_folder_verifies_with_exit_code_0(folder, capsys):
    verify_files(folder, file_names(read_manifest(folder)))
    assert main(["verify", str(folder)]) == 0
    assert "train 14 tokens in 4 documents" in capsys.readouterr().out


def test_truncated_or_missing_shard_is_refused_by_name_when_opened(folder):
    truncate(folder / "train/alpha-00001.safetensors")
    with pytest.raises(ValueError, match="alpha-00001.safetensors is truncated"):
        open_stream(folder, "train")
    open_stream(folder, "heldout")
    (folder / "train/alpha-00001.safetensors").unlink()
    with pytest.raises(ValueError, match="alpha-00001.safetensors is missing"):
        open_stream(folder, "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 70_000}, "says vocab_size 70000, the manifest 16"),
        ({"separator_id": 5}, "says separator_id 5, the manifest 0"),
        ({"tokenizer_sha256": "cd" * 32}, "says tokenizer_sha256 cd"),
        ({"source": "alpha"}, "says source alpha, the manifest beta"),
        ({"split": "heldout"}, "says split heldout, the manifest train"),
    ],
)
def test_shard_of_something_else_is_refused_by_name(folder, change, message, capsys):
    """As if somebody had copied shards of another run into the folder and mended the manifest's checksums."""
    splits, tokenizer = (read_manifest(folder)[name] for name in ("splits", "tokenizer"))
    this = header(**{"source": "beta", "tokenizer_sha256": tokenizer["sha256"], **change})
    lengths, tokens = pack([[1, 2, 3, 4]], this.separator_id, np.int64)
    write_shard(folder / "train/beta-00000.safetensors", this, np.zeros((1, 2)), lengths, [tokens])
    write_again(folder, splits, **tokenizer)
    with pytest.raises(ValueError, match=rf"beta-00000.safetensors.*{message}"):
        open_stream(folder, "train")
    assert main(["verify", str(folder)]) == 2


def test_wrong_counts_dtype_or_tokenizer_in_the_manifest_are_found(folder, capsys):
    splits, tokenizer = (read_manifest(folder)[name] for name in ("splits", "tokenizer"))
    splits["train"]["sources"]["beta"]["tokens"] = 9
    write_again(folder, splits, **tokenizer)
    with pytest.raises(ValueError, match="beta has 5 tokens in 1 documents, the manifest says 9 in 1"):
        open_stream(folder, "train")
    splits["train"]["sources"]["beta"]["tokens"] = 5
    (folder / "tokenizer.model").write_text("another tokenizer")
    write_again(folder, splits, **tokenizer)
    assert main(["verify", str(folder)]) == 2
    assert "made with another tokenizer" in capsys.readouterr().err


def test_document_table_that_does_not_fit_its_shard_is_refused_by_verify(folder, capsys):
    path = folder / "train/beta-00000.safetensors"
    manifest = read_manifest(folder)
    data = bytearray(path.read_bytes())
    offset = len(data) - 2 * 5  # the last tokens of the file: make one a separator
    data[offset + 4 : offset + 6] = (0).to_bytes(2, "little")
    path.write_bytes(data)
    write_again(folder, manifest["splits"], **manifest["tokenizer"])
    assert main(["verify", str(folder)]) == 2
    assert "train/beta, shard 0: its document table does not fit" in capsys.readouterr().err


def test_every_flipped_bit_of_the_manifest_and_of_a_shard_is_found(folder, capsys):
    for name in ("manifest.json", "train/beta-00000.safetensors"):
        whole = (folder / name).read_bytes()
        for place in range(len(whole)):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << place % 8
            (folder / name).write_bytes(damaged)
            if name == "manifest.json" and is_same_json(damaged, whole):
                continue  # white space became other white space, say
            assert main(["verify", str(folder)]) == 2, (name, place)
        (folder / name).write_bytes(whole)
    assert main(["verify", str(folder)]) == 0


def is_same_json(a, b):
    try:
        return json.loads(a) == json.loads(b)
    except ValueError:
        return False


def test_more_shards_are_open_at_once_than_a_process_may_have_files_at_first(tmp_path):
    documents = ((str(i), [1]) for i in range(120))
    source = write_source(tmp_path / "data", HEADER, documents, 120, shard_tokens=1)
    described = {"file": "none", "sha256": HEADER.tokenizer_sha256, "vocab_size": 16, "separator_id": SEPARATOR_ID}
    write_manifest(tmp_path / "data", {"tokenizer": described, "splits": {"train": {"sources": {"x": source}}}})
    program = (
        "import resource; from curation.shards import open_stream\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (40, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))\n"
        f"print(open_stream({str(tmp_path / 'data')!r}, 'train').n_tokens)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "240\n", done.stderr


def test_inspect_shows_documents_as_text(data, capsys):
    assert main(["inspect", str(data), "--source", "two", "--document", "3", "--n", "1", "--characters", "60"]) == 0
    shown = capsys.readouterr().out
    shard = open_shard(data / "train/two-00000.safetensors")
    assert "train/two-00000.safetensors document 3" in shown and shard.ids[3].tobytes().hex() in shown
    assert main(["inspect", str(data), "--id", "two/3", "--characters", "60"]) == 0
    assert capsys.readouterr().out == shown
    assert main(["inspect", str(data), "--id", "two/99"]) == 2
    assert "no document with the id 'two/99'" in capsys.readouterr().err
    for n in ("0", "-1"):
        assert main(["inspect", str(data), "--n", n]) == 2
        assert capsys.readouterr() == ("", f"error: --n {n} is not a number of documents; give 1 or more\n")


def test_missing_unfinished_and_foreign_folders_are_told_apart(tmp_path, folder, capsys):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_manifest(tmp_path / "nowhere")
    (tmp_path / "begun/work").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"begun is not a data folder.* RECIPE=own INPUT="):
        open_stream(tmp_path / "begun", "train")
    (tmp_path / "begun/work/settings.json").write_text('{"recipe": "eight", "input": null}')
    with pytest.raises(FileNotFoundError, match=r"unfinished.* run the command that began it again \(recipe eight\)"):
        open_stream(tmp_path / "begun", "train")
    for text, message in [
        ("{", "not JSON"),
        ("[]", "not the manifest"),
        ('{"format": 2}', "not the manifest"),
        ((folder / "manifest.json").read_text().replace('"format": 2', '"format": 1'), "format 1"),
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
    flip_a_bit(other / "train/beta-00000.safetensors")
    write_again(other, read_manifest(other)["splits"], **read_manifest(other)["tokenizer"])
    assert manifest_sha256(folder) != manifest_sha256(other)
