"""Byte-pair merges run by tiktoken: several times faster than the libraries that the vocabularies come from.

Both sentencepiece's BPE and that of a tokenizer.json merge the two neighbours whose union has the best rank, from the
left, until no union is a token. tiktoken does the same over bytes. Its ids are equal when three things hold:
- the text is split into the same words first, or only where no token could reach over (the patterns below);
- every token is what merging its own bytes gives, because tiktoken takes a word that is a token without merging;
- every token has one merge, of two parts that come earlier, because tiktoken merges any two parts whose union is one.
The last two are checked of the whole vocabulary (`tokenizer_json`, and tokenizer.py for sentencepiece); the first is
checked on text, together with all the rest (`first_difference`).
"""

import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from tokenizers import Tokenizer as Library
from tokenizers.normalizers import NFC

Encode = Callable[[str], np.ndarray]  # text -> (n,) uint32

# What GPT-2 and its successors split text into before merging. None looks behind itself, and none goes on with another
# kind of character behind a letter or a number, or with a space: there a long text can be cut (CUT).
GPT_2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same behind a step that makes every digit a word: a run of spaces ends before a digit as at the end of the text.
# The step knows thirteen digits of Unicode 17 that the others do not know yet.
DIGIT = r"\p{N}\x{11de0}-\x{11de9}\x{16ff4}-\x{16ff6}"
DIGITS_GPT_2 = rf"'(?:[sdmt]|ll|ve|re)| ?\p{{L}}+|[{DIGIT}]| ?[^\s\p{{L}}{DIGIT}]+|\s+(?![^\s{DIGIT}])|\s+"
SPLITS = [  # Qwen 2 and later, Llama 3: the patterns that their files spell out
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in ("", "{1,3}")
]
# Before a space; between letters, of scripts where they are letters in every version of Unicode, and what is none in
# any; behind a number.
CUT = re.compile(
    r"\S(?= )|[A-Za-z\u0410-\u044f\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5](?=[\0-@\u3001\u3002\uff01\uff0c])"
    r"|[0-9](?=[\0-/:-@])"
)

# A run of white space this long exhausts tiktoken's regular expressions, which try where it ends.
LONG_RUN = 100_000
LONG_SPACE = re.compile(rf"\s{{{LONG_RUN}}}")

# Text of nothing else is in normal form C already, in every version of Unicode.
NORMAL = re.compile(
    "[\0-\u02ff\u0400-\u0482\u2010-\u20cf\u2190-\u2328\u3000-\u3029\u3041-\u3096\u4e00-\u9fa5\U0001f300-\U0001f64f]*"
)


def run_merges(
    pattern: str, tokens: dict[bytes, tuple[int, ...]], otherwise: Callable[[str, Sequence[int]], Sequence[int]]
) -> Encode:
    """Function from text to ids that splits text by `pattern` and merges within each word.

    tokens: in the order in which they merge, each with its id. Where one has none or several, `otherwise(text, ranks)`
    gives the ids of the whole text from their numbers in `tokens`.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    encoding = tiktoken.Encoding("merges", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    merge = encoding._core_bpe.encode_ordinary  # its core alone: the rest would keep all ranks a second time
    id_of = np.array([ids[0] if len(ids) == 1 else -1 for ids in tokens.values()])

    def encode(text: str) -> np.ndarray:
        merged = merge(text)
        ids = id_of[np.array(merged, np.int64)]
        if ids.size and ids.min() < 0:
            return np.array(otherwise(text, merged), np.uint32)
        return ids.astype(np.uint32)

    return encode


# ---- tokenizer.json


@dataclass(frozen=True, kw_only=True)
class TokenizerJson:
    """A tokenizer.json as far as it is needed here."""

    token_bytes: list[bytes]  # of each id; empty for those that text must not become
    added: dict[str, int]
    encode: Encode | None  # by merges
    problem: str  # why `encode` is None


# GPT-2's alphabet: a printable character for every byte.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_OF = {chr(byte): byte for byte in PRINTABLE} | {
    chr(256 + i): byte for i, byte in enumerate(sorted(set(range(256)) - set(PRINTABLE)))
}


def is_text(added: dict[str, Any]) -> bool:
    """Whether an added token stands for text, as a run of spaces does: it is not special, and no <tag>."""
    return not added["special"] and not (added["content"].startswith("<") and added["content"].endswith(">"))


def library_tokenizer(path: Path) -> Library:
    """The file's tokenizer in its own library, without the added tokens that text must not become.

    Raises ValueError in one line when the library refuses the file.
    """
    try:
        settings = json.loads(path.read_bytes())
        words = [token for token in settings["added_tokens"] if is_text(token)]
        library = Library.from_str(json.dumps(settings | {"added_tokens": words, "truncation": None, "padding": None}))
    except Exception as error:  # it raises nothing narrower
        raise ValueError(f"{path} cannot be loaded by tokenizers: {error}") from None
    if any(library.token_to_id(token["content"]) != token["id"] for token in words):
        raise ValueError(f"{path} adds tokens to its vocabulary that get other ids without its special tokens")
    return library


def library_encode(library: Library) -> Encode:
    return lambda text: np.array(library.encode(text, add_special_tokens=False).ids, np.uint32)


def tokenizer_json(path: Path) -> TokenizerJson:
    """Read a tokenizer.json whose model is a byte-level BPE. Raises ValueError in one line for anything else."""
    try:
        settings = json.loads(path.read_bytes())
        model, words = settings["model"], [token for token in settings["added_tokens"] if is_text(token)]
        added = {token["content"]: token["id"] for token in settings["added_tokens"]}
        kind, vocab, merges = model.get("type", "BPE"), model["vocab"], model.get("merges", [])
        if kind != "BPE" or model.get("dropout") or not BYTE_OF.keys() >= set().union(*vocab.keys() - added.keys()):
            raise ValueError(f"{path} is not a byte-level BPE without dropout; its model is {kind}")
        token_bytes = [b""] * (1 + max([*vocab.values(), *added.values()]))
        for piece in vocab.keys() - added.keys():
            token_bytes[vocab[piece]] = bytes(map(BYTE_OF.__getitem__, piece))
        for token in words:
            token_bytes[token["id"]] = token["content"].encode()
        tokens, problem = merge_order(vocab, merges, token_bytes)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError(f"{path} is damaged or not a tokenizer.json") from None
    pattern, unknown = split_pattern(settings)
    problem = problem or unknown
    if words:
        problem = f"it adds tokens for text, such as {words[0]['content']!r}"
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        problem = "its tokens are marked at the ends of words"
    if problem:
        return TokenizerJson(token_bytes=token_bytes, added=added, encode=None, problem=problem)

    library: list[Encode] = []  # loaded once, at the first text that needs it

    def by_library(text: str) -> np.ndarray:
        if not library:
            library.append(library_encode(library_tokenizer(path)))
        return library[0](text)

    # a byte that the vocabulary lacks is dropped by the library, and its neighbours merge
    by_merges = run_merges(pattern, tokens, lambda text, ranks: by_library(text).tolist())
    normalize = NFC().normalize_str if settings.get("normalizer") else None

    def encode(text: str) -> np.ndarray:
        if len(text) > LONG_RUN and LONG_SPACE.search(text):
            return by_library(text)
        if normalize and not text.isascii() and not NORMAL.fullmatch(text):
            text = normalize(text)
        return by_merges(text)

    return TokenizerJson(token_bytes=token_bytes, added=added, encode=encode, problem="")


def merge_order(
    vocab: dict[str, int], merges: Sequence[Any], token_bytes: Sequence[bytes]
) -> tuple[dict[bytes, tuple[int, ...]], str]:
    """(single bytes, then tokens in the order in which they are made, each with its id; why that fails or "")."""
    problem = ""
    tokens: dict[bytes, tuple[int, ...]] = {
        bytes([byte]): (vocab[char],) if char in vocab else () for char, byte in BYTE_OF.items()
    }
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge  # joined by a space in older files
        parts, made = [token_bytes[vocab[part]] for part in (left, right)], token_bytes[vocab[left + right]]
        if not all(part in tokens for part in parts) or made in tokens or made != b"".join(parts):
            problem = f"{left!r} and {right!r} are merged before they are made, or to what is made already"
        tokens[made] = (vocab[left + right],)
    return tokens, problem


def split_pattern(settings: dict[str, Any]) -> tuple[str, str]:
    """(pattern that splits as the file's normalizer and pre-tokenizer do, ""), or ("", why there is none)."""
    normalizer, pre = settings.get("normalizer"), settings.get("pre_tokenizer") or {}
    if normalizer and normalizer != {"type": "NFC"}:
        return "", f"its normalizer is {normalizer.get('type')}"
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return "", "its last pre-tokenizer is not ByteLevel without a space in front"
    by_pattern = last.get("use_regex", True)
    if by_pattern and len(steps) == 1:
        return GPT_2, ""
    if by_pattern and steps[:-1] == [{"type": "Digits", "individual_digits": True}]:
        return DIGITS_GPT_2, ""
    if not by_pattern and len(steps) == 2 and steps[0].get("type") == "Split":
        split = steps[0]
        if split["pattern"].get("Regex") in SPLITS and split["behavior"] == "Isolated" and not split["invert"]:
            return split["pattern"]["Regex"], ""
    return "", "its pre-tokenizers are none of those known here"


def unmerged_token(library: Library, token_bytes: Sequence[bytes]) -> str | None:
    """A token of the vocabulary that merging its own bytes does not give, or None: see the top of this file."""
    model = library.model
    for token_id in range(len(token_bytes)):
        if token_bytes[token_id] and [token.id for token in model.tokenize(model.id_to_token(token_id))] != [token_id]:
            return model.id_to_token(token_id)
    return None


# ---- the self test

TRICKY = [
    "",
    " ",
    "  two before,   three  and two behind  ",
    "tabs\t\tand\tlines\r\n\r\n\n \n  \n\tindented\n\n   end\n",
    "it's I'LL they'Re we'd 'tis ''s o'clock \u2019s \u017f '\u017f 'S",
    "0 00 12345 3.14159 1e-5 x2 2x \u0661\u0662 \u00bd \u2167 \u00b2 \U00011de0\U00011de1 \U00016ff4",
    "caf\u00e9 cafe\u0301 \u212b \u2126 \u1e9b\u0323 \uac01 \u1100\u1161\u11a8 \u0958 \u2adc \u0344",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u65e5\u672c\u8a9e\u30c6\u30ad \ud55c\uad6d\uc5b4 \u0e44\u0e17\u0e22",
    "\u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u0639\u0631\u0628\u064a \u05e2\u05d1\u05e8\u05d9\u05ea",
    "\u0939\u093f\u0928\u094d\u0926\u0940 \U0001f1e9\U0001f1ea \u270c\ufe0f \U000e0001 \U000f0000 \U0010fffd",
    "\U0001f600 \U0001f469\u200d\U0001f469\u200d\U0001f467",
    "\ufeff\u00a0\u2003\u3000\u2028\u2029\u0085\x0b\x0c\x1c\x7f\0\x01 \u2581\u2581a \ufffd",
    "<|endoftext|> <|im_start|>user <s></s> <unk> <0x0A> [INST] <tool_call>{}</tool_call> <|fim_prefix|>",
    "def f(x):\n    return {**x, 'a': [1, 2]}  # why?!\n\n\n\tif (a == b) { c->d; }  // \u2014\n",
    "https://example.org/a_b?c=d&e=%20#f user@example.org ----- ===== ...... \\frac{1}{2} $x^2$",
    "a" * 300 + "!" * 300 + " " * 300 + "\n" * 300 + "ab" * 300 + "\u00e9" * 300,
]


def made_up_texts(token_bytes: Sequence[bytes], n_texts: int = 40, n_tokens: int = 200) -> list[str]:
    """Tokens of the vocabulary in random order, always the same: every rare one may turn up beside every other."""
    draw = random.Random(0)
    return [
        b"".join(draw.choices(token_bytes, k=n_tokens)).decode(errors="ignore") for _ in range(n_texts) if token_bytes
    ]


def first_difference(encode: Encode, reference: Encode, texts: Iterable[str]) -> str | None:
    """The first of the texts that the two give different ids for, or None."""
    return next((text for text in texts if not np.array_equal(encode(text), reference(text))), None)
