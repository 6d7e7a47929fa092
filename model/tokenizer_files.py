"""A checkpoint's tokenizer as transformers' tokenizer.json: the same ids, without sentencepiece.

In tokenizer.json a space is a space, not sentencepiece's U+2581, so nothing is normalised: what no piece holds, U+2581
and NUL among it, falls back to bytes on both sides. tokenizer.model goes along, for llama.cpp.
What was trained with a tokenizer.json gets that one back, with the separator in front of each text.
"""

import json
import shutil

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, processors
from tokenizers.models import BPE

SEPARATOR = "<|endoftext|>"
SEPARATORS = (SEPARATOR, "<|end_of_text|>", "</s>")  # of a tokenizer.json: the first that it has
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
    """The same byte-pair encoding for the tokenizers library.

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
    return tokenizer


def open_tokenizer(path):
    """(the file's tokenizer in the tokenizers library, its separator, whether the file is a sentencepiece model).

    Each text gets the separator in front. Raises ValueError, naming the file, if it is of neither kind.
    """
    data = path.read_bytes()
    of_sentencepiece = not data.startswith(b"{")  # a checkpoint keeps either kind under one name
    if of_sentencepiece:
        tokenizer, separator = fast_tokenizer(open_processor(path)), SEPARATOR
    else:
        settings = json.loads(data)
        for token in settings[
            "added_tokens"
        ]:  # in training no text becomes one; the configuration sees to the special
            token["special"] |= token["content"].startswith("<") and token["content"].endswith(">")
        tokenizer = Tokenizer.from_str(json.dumps(settings))
        separator = next((name for name in SEPARATORS if tokenizer.token_to_id(name) is not None), None)
        if separator is None:
            raise ValueError(f"{path} has none of the separators {', '.join(SEPARATORS)}")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{separator}:0 $A:0",
        pair=f"{separator}:0 $A:0 {separator}:1 $B:1",
        special_tokens=[(separator, tokenizer.token_to_id(separator))],
    )
    return tokenizer, separator, of_sentencepiece


def write_tokenizer(path, folder, *, seq_len):
    """Write tokenizer.json, tokenizer_config.json and, of ours, tokenizer.model into an export."""
    tokenizer, separator, of_sentencepiece = open_tokenizer(path)
    tokenizer.save(str(folder / "tokenizer.json"))
    if of_sentencepiece:
        shutil.copyfile(path, folder / "tokenizer.model")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": separator,
        "eos_token": separator,
        "pad_token": separator,
        "add_bos_token": True,  # as in training, where the separator begins every document
        "split_special_tokens": True,  # text never becomes the separator, whatever it contains
        "clean_up_tokenization_spaces": False,
        "model_max_length": seq_len,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
