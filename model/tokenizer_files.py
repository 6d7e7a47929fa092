"""Our sentencepiece tokenizer as transformers' tokenizer.json: the same ids, without sentencepiece.

In tokenizer.json a space is a space, not sentencepiece's U+2581, so nothing is normalised: what no piece holds, U+2581
and NUL among it, falls back to bytes on both sides. tokenizer.model goes along, for llama.cpp.
"""

import json
import shutil

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, processors
from tokenizers.models import BPE

SEPARATOR = "<|endoftext|>"
SPACE = "\u2581"


def open_processor(path):
    """The sentencepiece processor of a tokenizer of ours. Raises ValueError, naming the file, for any other."""
    processor = SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(path.read_bytes())
    except (RuntimeError, ValueError, OSError):
        raise ValueError(f"{path} is damaged or not a sentencepiece model") from None
    if not processor.is_control(processor.piece_to_id(SEPARATOR)):
        raise ValueError(f"{path} has no separator piece {SEPARATOR}, so it is not a tokenizer of ours")
    return processor


def fast_tokenizer(processor):
    """The same byte-pair encoding for the tokenizers library; each text gets the separator in front.

    sentencepiece merges the neighbours whose union has the best score, from the left. Here every way to cut a piece
    into two pieces is a merge, in the order of the scores.
    """
    vocab, scores = {}, {}
    for i in range(processor.get_piece_size()):
        piece = processor.id_to_piece(i)
        if not (processor.is_byte(i) or processor.is_control(i) or processor.is_unknown(i)):
            piece = piece.replace(SPACE, " ")
            scores[piece] = processor.get_score(i)
        vocab[piece] = i
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(scores, key=scores.get, reverse=True)
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    tokenizer = Tokenizer(BPE(vocab, merges, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(SEPARATOR, normalized=False, special=True)])
    separator = (SEPARATOR, vocab[SEPARATOR])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SEPARATOR}:0 $A:0", pair=f"{SEPARATOR}:0 $A:0 {SEPARATOR}:1 $B:1", special_tokens=[separator]
    )
    return tokenizer


def write_tokenizer(path, folder, *, seq_len):
    """Write tokenizer.json, tokenizer_config.json and tokenizer.model, from a tokenizer of ours, into an export."""
    fast_tokenizer(open_processor(path)).save(str(folder / "tokenizer.json"))
    shutil.copyfile(path, folder / "tokenizer.model")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SEPARATOR,
        "eos_token": SEPARATOR,
        "pad_token": SEPARATOR,
        "add_bos_token": True,  # as in training, where the separator begins every document
        "split_special_tokens": True,  # text never becomes the separator, whatever it contains
        "clean_up_tokenization_spaces": False,
        "model_max_length": seq_len,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
