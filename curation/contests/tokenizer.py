"""Tokenizing on real text against the libraries' own ways: text per CPU second, equal ids, memory of a long text.

The published vocabularies are not needed: vocabularies of the same size and shape are trained on the corpus first.
"""

import gzip
import json
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from sentencepiece import SentencePieceProcessor
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from curation.contests.measure import Contest, Measured, measure
from curation.merges import SPLITS, library_encode, library_tokenizer
from curation.shards import token_dtype
from curation.tokenizer import SEPARATOR, load_tokenizer, train_tokenizer

TRAIN_EVERY, MEASURE_EVERY = 12, 24  # documents of the corpus: about 14 MB to train on, 7 MB of others to tokenize
LONG_BYTES = 20_000_000
ROUNDS = 3

BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
SHAPES: dict[str, tuple[int, Any, Any]] = {  # name: vocabulary, normalizer, pre-tokenizer
    "32k BPE, GPT-2's pattern": (32_768, None, pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "49k BPE as SmolLM's": (
        49_152,
        None,
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
    ),
    "152k BPE as Qwen2.5's": (
        151_643,
        normalizers.NFC(),
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLITS[0]), "isolated"), BYTE_LEVEL]),
    ),
}
OURS = 50_304  # pieces of our own tokenizer

# dolma needs an older numpy, so it has an environment of its own beside this package
DOLMA = Path(__file__).parents[2] / ".venv-dolma/bin/dolma"
TO_INSTALL = "dolma is not installed: make .venv-dolma/ready"


def texts_of(corpus: Path, every: int, first: int) -> list[str]:
    """Every n-th document of each file of the corpus."""
    texts = []
    for path in sorted(corpus.glob("*/*.jsonl.zst")):
        with zstandard.open(path, "rt", encoding="utf-8") as lines:
            texts += [json.loads(line)["text"] for number, line in enumerate(lines) if number % every == first]
    return texts


def long_text(texts: list[str]) -> str:
    """One document of LONG_BYTES: all texts, over and over."""
    joined = "\n\n".join(texts)
    return (joined * (1 + LONG_BYTES // len(joined.encode()))).encode()[:LONG_BYTES].decode(errors="ignore")


def train_json(corpus: Path, shape: str, path: Path) -> None:
    """A tokenizer.json of one of the shapes, with the separator as its only special token."""
    texts = texts_of(corpus, TRAIN_EVERY, 0)
    vocab_size, normalizer, pre_tokenizer = SHAPES[shape]
    library = Tokenizer(models.BPE())
    if normalizer:
        library.normalizer = normalizer
    library.pre_tokenizer, library.decoder = pre_tokenizer, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    library.save(str(path))


def train_ours(corpus: Path, path: Path) -> None:
    train_tokenizer(texts_of(corpus, TRAIN_EVERY, 0), OURS, path)


# ---- both sides, each in a process of its own: tokens of every text, then the separator, into a file

Ready = tuple[Any, list[str]]


def ready_ours(tokenizer_file: Path, texts_file: Path) -> Ready:
    return load_tokenizer(tokenizer_file), json.loads(texts_file.read_bytes())


def run_ours(ready: Ready, out: Path) -> str:
    """Returns what encoded."""
    tokenizer, texts = ready
    dtype = token_dtype(tokenizer.vocab_size)
    separator = np.array([tokenizer.separator_id], dtype).tobytes()
    with open(out, "wb") as file:
        for text in texts:
            file.write(tokenizer.encode_array(text).astype(dtype).tobytes() + separator)
    return tokenizer.engine


def ready_datatrove(tokenizer_file: Path, texts_file: Path) -> Ready:
    from datatrove.data import Document
    from datatrove.pipeline.tokens import DocumentTokenizer

    step = DocumentTokenizer(
        str(texts_file.parent),
        str(tokenizer_file),
        save_filename="theirs",
        eos_token=SEPARATOR,
        shuffle_documents=False,
    )
    step.tokenizer.get_vocab_size()  # loads it
    texts = json.loads(texts_file.read_bytes())
    return step, [Document(text=text, id=str(number)) for number, text in enumerate(texts)]


def run_datatrove(ready: Ready) -> None:
    step, documents = ready
    step.run(iter(documents), 0, 1)  # writes theirs_00000_unshuffled.ds


def ready_sentencepiece(tokenizer_file: Path, texts_file: Path) -> Ready:
    return SentencePieceProcessor(model_file=str(tokenizer_file)), json.loads(texts_file.read_bytes())


def run_sentencepiece(ready: Ready, out: Path) -> None:
    processor, texts = ready
    dtype = token_dtype(processor.get_piece_size())
    separator = np.array([processor.piece_to_id(SEPARATOR)], dtype).tobytes()
    with open(out, "wb") as file:
        for text in texts:
            file.write(np.array(processor.encode(text), dtype).tobytes() + separator)


def run_dolma(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True)


def encode_long(tokenizer_file: Path, text_file: Path) -> str:
    """Everything that a worker does with one long text: returns the sha256 of the ids."""
    return sha256(load_tokenizer(tokenizer_file).encode_array(text_file.read_text()).tobytes()).hexdigest()


def encode_long_by_library(tokenizer_file: Path, text_file: Path) -> str:
    """The same, whole and by the library."""
    if tokenizer_file.suffix == ".json":
        ids = library_encode(library_tokenizer(tokenizer_file))(text_file.read_text())
    else:
        processor = SentencePieceProcessor(model_file=str(tokenizer_file))
        ids = np.array(processor.encode(text_file.read_text()), np.uint32)
    return sha256(ids.tobytes()).hexdigest()


# ---- rows


def alternating(works: list[Callable[[], Measured]]) -> list[Measured]:
    """The median of some rounds of each by CPU seconds; the rounds take turns."""
    rounds = [[work() for work in works] for _ in range(ROUNDS)]
    return [sorted(column, key=lambda m: m.cpu_s)[ROUNDS // 2] for column in zip(*rounds, strict=True)]


def different_documents(ours: Path, theirs: Path, dtype: Any, texts: list[str], separator_id: int) -> list[str]:
    """The texts that got other ids; a separator inside a document shifts the two against each other no further."""
    different = []
    streams = [np.fromfile(path, dtype) for path in (ours, theirs)]
    ends = [iter(np.flatnonzero(stream == separator_id).tolist()) for stream in streams]
    starts = [0, 0]
    for text in texts:
        stops = [next(one) for one in ends]
        if SEPARATOR in text:  # theirs took it for the separator, once for each time that it stands there
            for _ in range(text.count(SEPARATOR)):
                stops[1] = next(ends[1])
        parts = [stream[start:stop] for stream, start, stop in zip(streams, starts, stops, strict=True)]
        if not np.array_equal(parts[0], parts[1]):
            different.append(text)
        starts = [stop + 1 for stop in stops]
    return different


def contests(corpus: Path) -> list[Contest]:
    """corpus: folder of <kind>/*.jsonl.zst with a column "text"."""
    rows = []
    texts = [*texts_of(corpus, MEASURE_EVERY, 1), f"A text may say {SEPARATOR} and go on."]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts_file, long_file = folder / "texts.json", folder / "long.txt"
        texts_file.write_text(json.dumps(texts))
        long_file.write_text(long_text(texts))
        # whatever takes memory runs elsewhere: a new process is said to have needed at least what this one holds
        file = folder / "tokenizer.json"
        for shape in SHAPES:
            measure(train_json, corpus, shape, file)
            rows.append(json_row(shape, file, texts_file, texts))
        rows.append(dolma_row(shape, file, texts_file, texts))  # the last is the largest
        rows.append(memory_row(shape, file, long_file))
        file = folder / "tokenizer.model"
        measure(train_ours, corpus, file)
        rows.append(sentencepiece_row(file, texts_file, texts))
        rows.append(memory_row(f"own sentencepiece BPE of {OURS:,} pieces", file, long_file))
    return rows


def megabytes(texts: list[str]) -> float:
    return sum(len(text.encode()) for text in texts) / 1e6


def json_row(shape: str, file: Path, texts_file: Path, texts: list[str]) -> Contest:
    out = texts_file.with_name("ours.ds")
    mine, peer = alternating(
        [
            lambda: measure(run_ours, out, prepare=partial(ready_ours, file, texts_file)),
            lambda: measure(run_datatrove, prepare=partial(ready_datatrove, file, texts_file)),
        ]
    )
    tokenizer = load_tokenizer(file)
    dtype = token_dtype(tokenizer.vocab_size)
    theirs = texts_file.with_name("theirs_00000_unshuffled.ds")
    different = different_documents(out, theirs, dtype, texts, tokenizer.separator_id)
    injected = [text for text in different if SEPARATOR in text]
    ratio = peer.cpu_s / mine.cpu_s
    return Contest(
        step=f"tokenize and write, {shape}",
        metric="MB of text per CPU second",
        peer=f"datatrove {version('datatrove')} DocumentTokenizer, tokenizers {version('tokenizers')}",
        ours=megabytes(texts) / mine.cpu_s,
        theirs=megabytes(texts) / peer.cpu_s,
        target="at least 4 times, the same ids",
        reached=ratio >= 4 and mine.result == "tiktoken" and different == injected,
        note=(
            f"{ratio:.1f} times; {len(texts):,} documents, {len(different) - len(injected)} with other ids; "
            f"{len(injected)} where datatrove takes text for the separator, ours 0; "
            f"peak {mine.peak_rss_mb:.0f} MB against {peer.peak_rss_mb:.0f} MB"
        ),
    )


def dolma_row(shape: str, file: Path, texts_file: Path, texts: list[str]) -> Contest:
    out = texts_file.with_name("ours.ds")
    mine = measure(run_ours, out, prepare=partial(ready_ours, file, texts_file))
    speed, note = None, TO_INSTALL
    if DOLMA.exists():
        n_theirs, whole = dolma_tokens(file, file.parent / "dolma", texts)
        _, start = dolma_tokens(file, file.parent / "dolma-start", texts[-1:])
        speed = megabytes(texts) / (whole - start)
        note = f"{out.stat().st_size // 4:,} tokens, dolma's {n_theirs:,}; both without their start"
    ours = megabytes(texts) / mine.cpu_s
    return Contest(
        step=f"tokenize and write, {shape}",
        metric="MB of text per CPU second",
        peer="dolma 1.2.1 tokens",
        ours=ours,
        theirs=speed,
        target="at least 4.5 times",
        reached=speed is not None and ours >= 4.5 * speed,
        note=note,
    )


def dolma_tokens(file: Path, folder: Path, texts: list[str]) -> tuple[int, float]:
    """(tokens that `dolma tokens` writes, its CPU seconds)"""
    folder.mkdir()
    settings = json.loads(file.read_bytes())
    settings["model"]["merges"] = [" ".join(pair) for pair in settings["model"]["merges"]]  # the older form
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    with gzip.open(folder / "texts.jsonl.gz", "wt") as lines:
        for number, text in enumerate(texts):
            lines.write(json.dumps({"id": str(number), "text": text, "source": "corpus"}) + "\n")
    options = {
        "documents": folder / "texts.jsonl.gz",
        "destination": folder / "out",
        "tokenizer.name_or_path": folder / "tokenizer.json",
        "tokenizer.eos_token_id": 0,
        "tokenizer.pad_token_id": 0,
        "processes": 1,
        "dtype": "uint32",
    }
    command = [str(DOLMA), "tokens", *chain.from_iterable((f"--{key}", str(value)) for key, value in options.items())]
    cpu_s = measure(run_dolma, command).cpu_s
    return sum(path.stat().st_size for path in folder.glob("out/*.npy")) // 4, cpu_s


def sentencepiece_row(file: Path, texts_file: Path, texts: list[str]) -> Contest:
    out, theirs = texts_file.with_name("ours.ds"), texts_file.with_name("library.ds")
    mine, peer = alternating(
        [
            lambda: measure(run_ours, out, prepare=partial(ready_ours, file, texts_file)),
            lambda: measure(run_sentencepiece, theirs, prepare=partial(ready_sentencepiece, file, texts_file)),
        ]
    )
    tokenizer = load_tokenizer(file)
    dtype = token_dtype(tokenizer.vocab_size)
    # what sentencepiece cannot give back goes in otherwise
    exact = [text for text in texts if tokenizer.decode(tokenizer.encode(text)) == text]
    same = np.array_equal(np.fromfile(out, dtype), np.fromfile(theirs, dtype))
    return Contest(
        step=f"tokenize and write, own sentencepiece BPE of {OURS:,} pieces",
        metric="MB of text per CPU second",
        peer=f"sentencepiece {version('sentencepiece')}",
        ours=megabytes(texts) / mine.cpu_s,
        theirs=megabytes(texts) / peer.cpu_s,
        target="as fast as the library, the same ids",
        reached=mine.cpu_s <= peer.cpu_s and same and len(exact) == len(texts),
        note=(
            f"{peer.cpu_s / mine.cpu_s:.1f} times; ids {'equal' if same else 'different'}; "
            f"{len(exact):,} of {len(texts):,} documents come back exactly"
        ),
    )


def memory_row(shape: str, file: Path, long_file: Path) -> Contest:
    mine, peer = measure(encode_long, file, long_file), measure(encode_long_by_library, file, long_file)
    same = mine.result == peer.result
    return Contest(
        step=f"one document of {LONG_BYTES / 1e6:.0f} MB, {shape}",
        metric="peak MB of the worker, the start with its comparison included",
        peer=f"the library, {'tokenizers' if file.suffix == '.json' else 'sentencepiece'}",
        ours=mine.peak_rss_mb,
        theirs=peer.peak_rss_mb,
        target="below 300 MB, the same ids",
        reached=mine.peak_rss_mb < 300 and same,
        note=f"ids {'equal' if same else 'different'}; {mine.cpu_s:.1f} CPU s against {peer.cpu_s:.1f}",
    )
