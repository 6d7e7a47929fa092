"""The tokenizer: sentencepiece BPE with byte fallback, trained on the recipe's own text; decoding is exact.

Its one special token, the separator, stands at the start of every document. Text never becomes the separator, whatever
it contains: sentencepiece does not parse control pieces out of text.
"""

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from curation.shards import new_file

SEPARATOR = "<|endoftext|>"
FILE_NAME = "tokenizer.model"

# sentencepiece writes a space as this character inside a piece.
SPACE = "\u2581"
# What sentencepiece would change or lose (that character itself, and NUL) goes in as its UTF-8 bytes instead.
AS_BYTES = re.compile(f"([{SPACE}\0])")

# Written into the model file, so it is fixed: the file must not depend on the machine's cores.
TRAINER_THREADS = 4
# A training "sentence" is a run of whole lines of at most this many bytes (sentencepiece skips longer ones).
MAX_SENTENCE_BYTES = 4000
MAX_LINE = MAX_SENTENCE_BYTES // 4  # characters: longer lines are cut


class Tokenizer:
    """Text to ids and back; decode(encode(text)) == text for any text (that UTF-8 can hold)."""

    def __init__(self, path: Path, processor: SentencePieceProcessor):
        self.path = path
        self._processor = processor
        self.vocab_size: int = processor.get_piece_size()
        self.separator_id: int = processor.piece_to_id(SEPARATOR)
        self._bytes = [self._piece_bytes(i) for i in range(self.vocab_size)]
        self._byte_ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]

    def _piece_bytes(self, token_id: int) -> bytes:
        piece = self._processor.id_to_piece(token_id)
        if self._processor.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])  # "<0x0A>"
        if self._processor.is_control(token_id) or self._processor.is_unknown(token_id):
            return b""
        return piece.replace(SPACE, " ").encode()

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without a separator."""
        if not AS_BYTES.search(text):
            return self._processor.encode(text)
        ids: list[int] = []
        for part in AS_BYTES.split(text):
            if AS_BYTES.match(part):
                ids += [self._byte_ids[byte] for byte in part.encode()]
            else:
                ids += self._processor.encode(part)
        return ids

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes of one token, perhaps part of a character; empty for the separator."""
        return self._bytes[token_id]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; separators give nothing, an incomplete character gives U+FFFD."""
        return b"".join([self._bytes[i] for i in ids]).decode(errors="replace")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a .model file, or the tokenizer.model of a folder.

    Raises FileNotFoundError when it is not there, ValueError when it is not a tokenizer of ours.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer {path} does not exist; give a .model file or a folder with {FILE_NAME}")
    processor = SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(path.read_bytes())
    except (RuntimeError, ValueError, OSError):
        raise ValueError(f"{path} is damaged or not a sentencepiece model; give that of a data folder") from None
    if not processor.is_control(processor.piece_to_id(SEPARATOR)):
        raise ValueError(f"{path} has no separator piece {SEPARATOR}; give the tokenizer of a data folder")
    return Tokenizer(path, processor)


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
