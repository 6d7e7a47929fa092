"""Tokenizers: sentencepiece BPE trained on the recipe's own text, or the tokenizer.json of a published model.

Both kinds are one class, run by byte-pair merges (merges.py). Whenever a tokenizer is loaded, their ids are compared
with those of the library that the file is from; where they differ that library encodes, and a line says so. A document
starts with the separator, the one special token used here. Text never becomes a special token, whatever it contains.

    python -m curation.tokenizer check tokenizer.json       the comparison alone; exit 0 equal, 2 unusable, 3 other ids
"""

import argparse
import functools
import io
import json
import logging
import re
import subprocess
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from curation.merges import (
    CUT,
    TRICKY,
    Encode,
    first_difference,
    library_encode,
    library_tokenizer,
    made_up_texts,
    run_merges,
    tokenizer_json,
    unmerged_token,
)
from curation.shards import file_sha256, new_file

SEPARATOR = "<|endoftext|>"
SEPARATORS = (SEPARATOR, "<|end_of_text|>", "</s>")  # of a tokenizer.json: the first that it has
FILE_NAME = "tokenizer.model"
JSON_NAME = "tokenizer.json"
DIFFERENT = 3  # exit code of the comparison

# A longer text is encoded in parts of about this many characters, so that memory beside the ids stays small.
PART_CHARS = 1 << 16
# Merging takes about 50 bytes for each character of a word; nothing that is written has words like this.
MAX_PART_CHARS = 1 << 21

# sentencepiece writes a space as this character inside a piece.
SPACE = "\u2581"
# What sentencepiece would change or lose (that character itself, and NUL) goes in as its UTF-8 bytes instead.
AS_BYTES = re.compile(f"([{SPACE}\0])")

# Our pieces hold spaces only in front, digits only alone, and ASCII letters never beside other ASCII characters. So
# text can be split there before merging; PIECE_ACROSS finds a piece that is not so.
MARK = r"\x00-\x1f!-/:-@\[-`{-\x7f"
BEYOND = r"[^\x00-\x7f][^ 0-9]*"  # from a character beyond ASCII on
WORDS = rf" *(?:[A-Za-z]+{BEYOND}|[A-Za-z]+|[{MARK}]+{BEYOND}|[{MARK}]+|{BEYOND}|[0-9])| +"
PIECE_ACROSS = re.compile(rf"[A-Za-z][{MARK}]|[{MARK}][A-Za-z]|[^ ][0-9 ]|[0-9].|{CUT.pattern}", re.DOTALL)

# Written into the model file, so it is fixed: the file must not depend on the machine's cores.
TRAINER_THREADS = 4
# A training "sentence" is a run of whole lines of at most this many bytes (sentencepiece skips longer ones).
MAX_SENTENCE_BYTES = 4000
MAX_LINE = MAX_SENTENCE_BYTES // 4  # characters: longer lines are cut


class Tokenizer:
    """Text to ids and back.

    decode(encode(text)) == text for any text that UTF-8 can hold, or its normal form where a tokenizer.json asks for
    it, as Qwen's does.
    """

    def __init__(self, path: Path, token_bytes: list[bytes], separator_id: int, encode_part: Encode, engine: str):
        self.path = path
        self.sha256 = file_sha256(path)
        self.vocab_size = len(token_bytes)
        self.separator_id = separator_id
        self.engine = engine  # "tiktoken", or the library that encodes instead
        self._bytes = token_bytes
        self._encode_part = encode_part

    def encode_array(self, text: str) -> np.ndarray:
        """Ids of the text (n,), uint32, without a separator. A long text takes little memory beside itself and these.

        Raises ValueError for MAX_PART_CHARS without a space, or a letter before something else: no place to cut.
        """
        if len(text) <= PART_CHARS or self.engine != "tiktoken":
            return self._encode_part(text)
        ids = array("I")  # grows in place: no moment needs it twice
        for part in parts(text):
            ids.frombytes(self._encode_part(part).tobytes())
        return np.frombuffer(ids, np.uint32)

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without a separator."""
        return self.encode_array(text).tolist()

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes of one token, perhaps part of a character; empty for the separator and other special tokens."""
        return self._bytes[token_id]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; separators give nothing, an incomplete character gives U+FFFD."""
        return b"".join([self._bytes[i] for i in ids]).decode(errors="replace")


def parts(text: str) -> Iterator[str]:
    """The text in parts of about PART_CHARS, cut only where no token can reach over."""
    start = 0
    while start < len(text):
        found = CUT.search(text, start + PART_CHARS, start + MAX_PART_CHARS + 1)
        end = found.end() if found else len(text)
        if end - start > MAX_PART_CHARS:
            raise ValueError(f"the text has no place to cut in {MAX_PART_CHARS:,} characters from {start:,} on")
        yield text[start:end]
        start = end


def load_tokenizer(path: str | Path, sample: Sequence[str] = ()) -> Tokenizer:
    """Load a tokenizer file of either kind, or the tokenizer.model, else the tokenizer.json, of a folder.

    sample: texts on which, beside those built in, the fast way is compared with the file's own library.
    Raises FileNotFoundError when it is not there, ValueError when it is not a tokenizer that can be used here.
    """
    path = Path(path)
    if path.is_dir():
        path = path / (JSON_NAME if (path / JSON_NAME).exists() and not (path / FILE_NAME).exists() else FILE_NAME)
    if not path.is_file():
        raise FileNotFoundError(
            f"tokenizer {path} does not exist; give its file, or a folder with {FILE_NAME} or {JSON_NAME}"
        )
    return load_json(path, sample) if is_json(path) else load_sentencepiece(path, sample)


def is_json(path: Path) -> bool:
    """By content: a checkpoint keeps either kind under one name."""
    with open(path, "rb") as file:
        return file.read(1) == b"{"


def slower(path: Path, library: str, reason: str) -> None:
    logging.getLogger(__name__).warning(f"{path}: {library} itself encodes, several times slower: {reason}")


# ---- tokenizer.json


def load_json(path: Path, sample: Sequence[str]) -> Tokenizer:
    read = tokenizer_json(path)
    separators = [read.added[name] for name in SEPARATORS if name in read.added]
    if not separators:
        raise ValueError(f"{path} has no token that can separate documents; one of {', '.join(SEPARATORS)} is needed")
    problem = read.problem or difference_elsewhere(path.absolute(), file_sha256(path), tuple(sample))
    if problem or read.encode is None:
        slower(path, "tokenizers", problem)
        encode, engine = library_encode(library_tokenizer(path)), "tokenizers"
    else:
        encode, engine = read.encode, "tiktoken"
    return Tokenizer(path, read.token_bytes, separators[0], encode, engine)


@functools.cache
def difference_elsewhere(path: Path, sha256: str, sample: tuple[str, ...]) -> str:
    """`difference` of a tokenizer.json from its library, found in another process: here both would fill the memory."""
    command = [sys.executable, "-m", "curation.tokenizer", "check", str(path), "--sample"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], input=json.dumps(sample), capture_output=True, text=True
    )
    if done.returncode not in (0, DIFFERENT):
        raise ValueError(f"{path} could not be checked: {done.stderr.strip().removeprefix('error: ')[-300:]}")
    return done.stdout.strip() if done.returncode else ""


def difference(path: Path, sample: Sequence[str]) -> str:
    """How the merges differ from the library of a tokenizer.json, in a line; "" if they do not."""
    library = library_tokenizer(path)
    read = tokenizer_json(path)
    if read.encode is None:
        return read.problem
    if (token := unmerged_token(library, read.token_bytes)) is not None:
        return f"merging the bytes of the token {token!r} does not give it"
    texts = chain(TRICKY, made_up_texts(read.token_bytes), sample)
    text = first_difference(read.encode, library_encode(library), texts)
    return "" if text is None else f"other ids than tokenizers gives for {text[:60]!r}"


# ---- sentencepiece


def load_sentencepiece(path: Path, sample: Sequence[str]) -> Tokenizer:
    processor = SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(path.read_bytes())
    except (RuntimeError, ValueError, OSError):
        raise ValueError(f"{path} is damaged or not a sentencepiece model; give that of a data folder") from None
    separator_id = processor.piece_to_id(SEPARATOR)
    if not processor.is_control(separator_id):
        raise ValueError(f"{path} has no separator piece {SEPARATOR}; give the tokenizer of a data folder")

    byte_ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
    pieces = {
        token_id: processor.id_to_piece(token_id).replace(SPACE, " ")
        for token_id in range(processor.get_piece_size())
        if not (processor.is_byte(token_id) or processor.is_control(token_id) or processor.is_unknown(token_id))
    }
    token_bytes = [pieces.get(token_id, "").encode() for token_id in range(processor.get_piece_size())]
    for byte, token_id in enumerate(byte_ids):
        token_bytes[token_id] = bytes([byte])

    def by_library(text: str) -> np.ndarray:
        ids: list[int] = []
        for part in AS_BYTES.split(text):
            ids += [byte_ids[byte] for byte in part.encode()] if AS_BYTES.match(part) else processor.encode(part)
        return np.array(ids, np.uint32)

    # every character is merged of its bytes before anything else; what stops within one stays the bytes it is made of
    tokens: dict[bytes, tuple[int, ...]] = {bytes([byte]): (token_id,) for byte, token_id in enumerate(byte_ids)}
    for piece in pieces.values():
        for character in map(str.encode, piece):
            for n in range(2, len(character)):
                tokens.setdefault(character[:n], tuple(byte_ids[byte] for byte in character[:n]))
    by_score = sorted(pieces, key=processor.get_score, reverse=True)
    for token_id in [i for i in by_score if len(pieces[i]) == 1] + [i for i in by_score if len(pieces[i]) > 1]:
        tokens[pieces[token_id].encode()] = (token_id,)
    ids_of = list(tokens.values())
    by_merges = run_merges(WORDS, tokens, lambda text, ranks: [i for rank in ranks for i in ids_of[rank]])

    longer = [token_id for token_id, piece in pieces.items() if len(piece) > 1]
    merged = processor.encode([pieces[token_id] for token_id in longer])
    problem = next((pieces[i] for i, ids in zip(longer, merged, strict=True) if ids != [i]), None)
    if problem is None:
        problem = next((piece for piece in pieces.values() if PIECE_ACROSS.search(piece)), None)
    if problem is None:
        problem = first_difference(by_merges, by_library, chain(TRICKY, made_up_texts(token_bytes), sample))
    if problem is not None:
        slower(path, "sentencepiece", f"other ids, or a piece of another form, at {problem[:60]!r}")
    encode, engine = (by_merges, "tiktoken") if problem is None else (by_library, "sentencepiece")
    return Tokenizer(path, token_bytes, separator_id, encode, engine)


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: str | Path) -> None:
    """Train on the texts and write the model file. The same texts give the same file on any number of cores.

    Raises ValueError when the texts hold too little for the vocabulary.
    """
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=sentences(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # code indentation as one piece
            split_digits=True,
            character_coverage=0.9995,  # the rest by bytes
            max_sentence_length=MAX_SENTENCE_BYTES,
            eos_id=0,
            eos_piece=SEPARATOR,
            unk_id=1,  # sentencepiece wants one; with byte fallback it never occurs
            bos_id=-1,
            pad_id=-1,
            num_threads=TRAINER_THREADS,
            minloglevel=2,
        )
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).rpartition("] ")[2].strip() or "no text"  # behind sentencepiece's file and line
        raise ValueError(f"no tokenizer of vocab_size {vocab_size:,} could be trained: {reason}") from None
    with new_file(path) as file:
        file.write(model.getvalue())


def sentences(texts: Iterable[str]) -> Iterator[str]:
    """Runs of whole lines for the trainer; newlines stay inside, so that pieces with them can be learned."""
    for text in texts:
        run: list[str] = []
        n_bytes = 0
        for line in text.splitlines(keepends=True):
            for piece in (line[i : i + MAX_LINE] for i in range(0, len(line), MAX_LINE)):
                size = len(piece.encode())
                if n_bytes + size > MAX_SENTENCE_BYTES:
                    yield "".join(run)
                    run, n_bytes = [], 0
                run.append(piece)
                n_bytes += size
        if run:
            yield "".join(run)


# ---- the comparison alone


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m curation.tokenizer", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="compare the fast way with the file's own library")
    check.add_argument("file", type=Path)
    check.add_argument("--sample", action="store_true", help="read further texts, a JSON list, from standard input")
    flags = parser.parse_args(argv)
    try:
        sample = json.load(sys.stdin) if flags.sample else ()
        if is_json(flags.file):
            problem = difference(flags.file, sample)
        else:
            problem = "" if load_tokenizer(flags.file, sample).engine == "tiktoken" else "see the line above"
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(problem or f"{flags.file}: the same ids as its library")
    return DIFFERENT if problem else 0


if __name__ == "__main__":
    sys.exit(main())
