"""Tokenizers of both kinds: exact round trip, the libraries' ids, and a separator that no text can produce."""

import hashlib
import json
import random
import unicodedata

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from curation.merges import BYTE_OF, CUT, DIGITS_GPT_2, GPT_2, NORMAL, SPLITS, TRICKY, run_merges
from curation.tokenizer import (
    MAX_PART_CHARS,
    PART_CHARS,
    SEPARATOR,
    Tokenizer,
    load_tokenizer,
    main,
    parts,
    sentences,
    train_tokenizer,
)

LINES = [
    "def forward(self, x):",
    "    return self.out_proj(x) + 12345",
    "The quick brown fox jumps over the lazy dog.",
    "\tif (value == 0) { continue; }  // tab-indented",
    "        deeply.indented(call)",
]
TEXTS = [f"{line} {i}\n{LINES[(i + 1) % 5]}\n" for i, line in enumerate(LINES * 20)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(TEXTS, 400, path)
    return load_tokenizer(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "plain words",
        "  leading, trailing  ",
        "tabs\tand\t\ttabs",
        "line\nline\r\n\n\n    indented\n",
        "emoji \U0001f600 family \U0001f469\u200d\U0001f467, CJK \u65e5\u672c\u8a9e, accents e\u0301 \u00e9",
        "\ufeffmark, no-break\u00a0space, wide\u3000space, line\u2028separator",
        "block \u2581 and \u2581\u2581, NUL \0 and \0\0",
        "control \x01\x7f\x85 \u2047 \u2585",
        "<unk> <0x0A> <s> <|endoftext|>",
        "digits 00120034",
    ],
)
def test_decoding_gives_back_the_text_exactly(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decoding_gives_back_random_unicode(tokenizer):
    draw = random.Random(0)
    pieces = [" ", "\n", "\t", "\u2581", "\0", "a", "def", "<", "|", SEPARATOR, "\u00e9", "\u65e5", "\U0001f600"]
    for _ in range(300):
        text = "".join(draw.choice(pieces) for _ in range(draw.randrange(30)))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_never_becomes_the_separator(tokenizer):
    for text in [SEPARATOR, f"a{SEPARATOR}b", f"{SEPARATOR}\u2581{SEPARATOR}", f" {SEPARATOR} "]:
        assert tokenizer.separator_id not in tokenizer.encode(text)
    assert tokenizer.decode([tokenizer.separator_id]) == ""


def test_every_byte_has_a_token_so_nothing_is_unknown(tokenizer):
    ids = tokenizer.encode("\u65e5\u2581")
    assert len(ids) == 6
    assert b"".join(map(tokenizer.token_bytes, ids)) == "\u65e5\u2581".encode()
    assert {tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)} >= {bytes([b]) for b in range(256)}


def test_part_of_a_character_decodes_to_a_replacement_not_an_error(tokenizer):
    assert tokenizer.decode(tokenizer.encode("\u65e5")[:2]) == "\ufffd"


def test_indentation_is_one_token_and_digits_are_split(tokenizer):
    assert len(tokenizer.encode("        ")) == 1
    assert len(tokenizer.encode("2024")) == 4


def test_batch_equals_one_by_one(tokenizer):
    assert tokenizer.encode_batch(TEXTS[:5]) == [tokenizer.encode(text) for text in TEXTS[:5]]


def test_training_twice_gives_the_same_file(tokenizer, tmp_path):
    train_tokenizer(iter(TEXTS), 400, tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == tokenizer.path.read_bytes()


def test_training_sentences_lose_no_text_and_are_short():
    texts = ["one\ntwo\n", "x" * 30_000 + "\nend", "\u65e5" * 9_000, "a line\n" * 3_000]
    for text in texts:
        runs = list(sentences([text]))
        assert "".join(runs) == text
        assert max(len(run.encode()) for run in runs) <= 8000


def test_tokenizer_is_found_in_a_folder(tokenizer):
    again = load_tokenizer(tokenizer.path.parent)
    assert isinstance(again, Tokenizer) and again.path == tokenizer.path
    assert (again.vocab_size, again.separator_id) == (400, 0)


def test_missing_damaged_and_foreign_models_are_refused_in_one_line(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_tokenizer(tmp_path / "none.model")
    with pytest.raises(FileNotFoundError, match="tokenizer.model does not exist"):
        load_tokenizer(tmp_path)
    for data in (b"", b"junk", tokenizer.path.read_bytes()[:-100], tokenizer.path.read_bytes()[:2000]):
        (tmp_path / "bad.model").write_bytes(data)
        with pytest.raises(ValueError, match="bad.model") as caught:
            load_tokenizer(tmp_path / "bad.model")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("vocab_size", [10, 60_000])
def test_vocabulary_that_the_text_cannot_fill_is_refused_in_one_line(tmp_path, vocab_size):
    with pytest.raises(ValueError, match=f"vocab_size {vocab_size:,}.*smaller|vocab_size") as caught:
        train_tokenizer(TEXTS, vocab_size, tmp_path / "x.model")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x.model").exists()


# ---- sentencepiece by merges


def test_merges_give_the_ids_of_sentencepiece(tokenizer):
    assert tokenizer.engine == "tiktoken"
    library = SentencePieceProcessor(model_file=str(tokenizer.path))
    for text in TEXTS + [text for text in TRICKY if "\u2581" not in text]:  # those go in as bytes: tested above
        assert tokenizer.encode(text) == library.encode(text)


def test_vocabulary_whose_pieces_reach_over_words_is_left_to_sentencepiece(tmp_path, caplog):
    from sentencepiece import SentencePieceTrainer

    with open(tmp_path / "tokenizer.model", "wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_writer=file, model_type="bpe", vocab_size=400, byte_fallback=True,
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
            split_by_whitespace=False, eos_id=0, eos_piece=SEPARATOR, unk_id=1, bos_id=-1, pad_id=-1, minloglevel=2,
        )  # fmt: skip
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.engine == "sentencepiece"
    assert "sentencepiece itself encodes" in caplog.text and "\n" not in caplog.messages[0]
    library = SentencePieceProcessor(model_file=str(tokenizer.path))
    text = "".join(TEXTS) * 20
    assert len(text) > PART_CHARS
    assert tokenizer.encode(text) == library.encode(text)


def test_check_takes_both_kinds(tokenizer, tmp_path, capsys):
    folder = train_json(tmp_path / "checked", "gpt-2")
    for path in (tokenizer.path, folder / "tokenizer.json"):
        assert main(["check", str(path)]) == 0
        assert capsys.readouterr().out == f"{path}: the same ids as its library\n"
    assert main(["check", str(tmp_path / "none.json")]) == 2


# ---- tokenizer.json

SPLIT = pre_tokenizers.Split
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT_2_STEP = pre_tokenizers.ByteLevel(add_prefix_space=False)
SHAPES = {
    "gpt-2": (None, GPT_2_STEP),
    "smollm": (None, pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT_2_STEP])),
    "qwen": (normalizers.NFC(), pre_tokenizers.Sequence([SPLIT(Regex(SPLITS[0]), "isolated"), BYTE_LEVEL])),
    "llama-3": (None, pre_tokenizers.Sequence([SPLIT(Regex(SPLITS[1]), "isolated"), BYTE_LEVEL])),
}  # fmt: skip
MARKS = ["<|endoftext|>", "<|im_start|>"]


def train_json(folder, shape, vocab_size=600, alphabet=None, texts=TEXTS):
    """A small tokenizer.json of the given shape, with two special tokens and one mark that is not special."""
    library = Library(models.BPE())
    library.normalizer, library.pre_tokenizer = SHAPES[shape]
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if alphabet is None else alphabet
    marks = [AddedToken(mark, special=True, normalized=False) for mark in MARKS]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=marks, initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator([*texts, *TRICKY], trainer)
    library.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    folder.mkdir(exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module", params=SHAPES)
def from_json(request, tmp_path_factory):
    """(a loaded tokenizer.json, the library's own with the added tokens taken out)"""
    folder = train_json(tmp_path_factory.mktemp("json") / request.param, request.param)
    settings = json.loads((folder / "tokenizer.json").read_text())
    return load_tokenizer(folder), Library.from_str(json.dumps(settings | {"added_tokens": []}))


def test_json_gives_the_ids_of_its_library(from_json):
    tokenizer, library = from_json
    assert tokenizer.engine == "tiktoken"
    assert tokenizer.sha256 == hashlib.sha256(tokenizer.path.read_bytes()).hexdigest()
    draw = random.Random(1)
    scraps = [
        *TEXTS[:5],
        *TRICKY,
        " ",
        "  ",
        "\n",
        "\t",
        "1",
        "23",
        "'s",
        "'LL",
        "\u0301",
        "\u00e9",
        "!",
        "\u4f60",
        "\u0660",
    ]
    mixed = ["".join(draw.choices(scraps, k=8)) for _ in range(200)]
    for text in TEXTS + TRICKY + mixed:
        assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False).ids


def test_json_decodes_to_the_text_or_its_normal_form(from_json):
    tokenizer, library = from_json
    for text in TRICKY:
        expected = library.normalizer.normalize_str(text) if library.normalizer else text
        assert tokenizer.decode(tokenizer.encode(text)) == expected


def test_json_text_never_becomes_an_added_token(from_json):
    tokenizer, _ = from_json
    marks = {tokenizer.separator_id, *range(2), tokenizer.vocab_size - 1}
    for text in [*MARKS, "<tool_call>", f"a{SEPARATOR}b", f" {SEPARATOR}{SEPARATOR}"]:
        assert not marks & set(tokenizer.encode(text))
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.separator_id == 0 and tokenizer.token_bytes(0) == b"" and tokenizer.decode([0]) == ""


@pytest.mark.parametrize("shape", SHAPES)
def test_splits_agree_with_the_library_for_every_kind_of_character(shape):
    """Each character beside letters, digits, spaces and itself; with every pair of bytes a token, each split shows."""
    vocab = {piece: i for i, piece in enumerate([*BYTE_OF, *[a + b for a in BYTE_OF for b in BYTE_OF]])}
    library = Library(models.BPE(vocab, [(a, b) for a in BYTE_OF for b in BYTE_OF]))
    library.pre_tokenizer = SHAPES[shape][1]
    tokens = {bytes(BYTE_OF[char] for char in piece): (i,) for piece, i in vocab.items()}
    pattern = {"gpt-2": GPT_2, "smollm": DIGITS_GPT_2, "qwen": SPLITS[0], "llama-3": SPLITS[1]}[shape]
    merge = run_merges(pattern, tokens, lambda text, ranks: [])
    characters = [chr(c) for c in [*range(0x3100), *range(0x3100, 0x110000, 97)] if not 0xD800 <= c < 0xE000]
    for start in range(0, len(characters), 64):
        text = "|".join(f"a{c}b 1{c}2 {c}{c}. '{c}x\n{c}  {c}" for c in characters[start : start + 64])
        assert np.array_equal(merge(text), library.encode(text).ids), text


def test_text_taken_as_normal_is_normal():
    nfc = normalizers.NFC()
    characters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000 and NORMAL.fullmatch(chr(c))]
    assert len(characters) > 20_000
    assert not [c for c in characters if unicodedata.combining(c)]
    text = "".join(characters)
    assert nfc.normalize_str(text) == text == nfc.normalize_str(text[::-1])[::-1]


def test_missing_bytes_are_dropped_as_the_library_drops_them(tmp_path):
    folder = train_json(tmp_path / "few", "smollm", alphabet=[])
    settings = json.loads((folder / "tokenizer.json").read_text())
    library = Library.from_str(json.dumps(settings | {"added_tokens": []}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.engine == "tiktoken"
    text = "the \U00040000quick br\U00080000own fox"  # lead bytes that no text above holds
    assert tokenizer.decode(tokenizer.encode(text)) != text
    assert tokenizer.encode(text) == library.encode(text).ids


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s.update(normalizer={"type": "Lowercase"}), "its normalizer is Lowercase"),
        (lambda s: s["pre_tokenizer"].update(add_prefix_space=True), "ByteLevel"),
        (lambda s: s.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": r"\\S+|\\s+"}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}), "none of"),
        (lambda s: s["model"]["merges"].reverse(), "merged before they are made"),
        (lambda s: s["added_tokens"][-1].update(content="    "), "adds tokens for text"),
    ],
)  # fmt: skip
def test_json_of_another_shape_is_left_to_its_library_and_says_so(tmp_path, caplog, change, reason):
    folder = train_json(tmp_path / "other", "gpt-2")
    settings = json.loads((folder / "tokenizer.json").read_text())
    change(settings)
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.engine == "tokenizers"
    assert [reason in message and "\n" not in message for message in caplog.messages] == [True]
    assert tokenizer.separator_id not in tokenizer.encode(SEPARATOR)
    assert tokenizer.encode("the quick 12") == Library.from_file(str(tokenizer.path)).encode("the quick 12").ids


def test_start_finds_a_vocabulary_that_merges_otherwise(tmp_path, capsys):
    """abc is a token that its own merges never reach: "ab" is made first, so "bc" is not; tiktoken would give it."""
    folder = train_json(tmp_path / "odd", "gpt-2", vocab_size=258)
    settings = json.loads((folder / "tokenizer.json").read_text())
    model = settings["model"]
    for left, right in (("a", "b"), ("b", "c"), ("a", "bc")):
        model["vocab"][left + right] = 1000 + len(model["merges"])
        model["merges"].append([left, right])
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.engine == "tokenizers"
    assert len(tokenizer.encode("abc")) == 2
    assert main(["check", str(folder / "tokenizer.json")]) == 3
    assert "'abc' does not give it" in capsys.readouterr().out


def test_sample_is_compared_too(tmp_path):
    folder = train_json(tmp_path / "sampled", "gpt-2")
    assert load_tokenizer(folder, ["a sample", "of texts"]).engine == "tiktoken"


def test_long_text_is_encoded_in_parts_with_the_same_ids(tokenizer, from_json):
    text = "".join(f"{line} {i} 1,5 \u4f60\u597d\uff0c cafe\u0301\n\n  x" for i, line in enumerate(TEXTS * 40))
    assert len(text) > 3 * PART_CHARS
    for one in (tokenizer, from_json[0]):
        ids = one.encode_array(text)
        assert ids.dtype == np.uint32
        assert np.array_equal(ids, one._encode_part(text))
    library = from_json[1]
    assert from_json[0].encode(text) == library.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    "scraps", [["1.5", "22", "\n", ", ", "7e"], ["-", "=", " ", "\n", "\u2603", " \u0301"], LINES]
)
def test_every_sure_place_is_a_place_where_the_splits_cut(tokenizer, from_json, scraps):
    draw = random.Random(2)
    texts = TRICKY + ["".join(draw.choices([*scraps, *TRICKY[1:8]], k=20)) for _ in range(20)]
    for one in (tokenizer, from_json[0]):
        for text in texts:
            ids = one.encode(text)
            for cut in list(CUT.finditer(text))[:30]:
                assert one.encode(text[: cut.end()]) + one.encode(text[cut.end() :]) == ids


def test_text_without_a_place_to_cut_is_refused(tokenizer):
    for text in ("a" * (MAX_PART_CHARS + 1), "a b" * PART_CHARS + "-" * (MAX_PART_CHARS + PART_CHARS)):
        with pytest.raises(ValueError, match="no place to cut in 2,097,152 characters"):
            tokenizer.encode(text)
    text = "a b" * PART_CHARS + "-" * PART_CHARS
    assert "".join(parts(text)) == text
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_run_of_spaces_too_long_for_tiktoken_is_encoded(from_json):
    tokenizer, library = from_json
    text = "a" + " " * 400_000 + "b"
    assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False).ids


def test_file_without_a_name_of_its_own_is_known_by_its_content(tmp_path):
    path = train_json(tmp_path / "named", "gpt-2") / "tokenizer.json"
    assert load_tokenizer(path.rename(tmp_path / "tokenizer.model")).decode([0]) == ""


@pytest.mark.parametrize(
    "content", ["{", "{}", '{"model": 1}', '{"model": {"type": "WordPiece", "vocab": {"a": 0}}, "added_tokens": []}']
)
def test_other_json_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="tokenizer.json") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    assert main(["check", str(tmp_path / "tokenizer.json")]) == 2
