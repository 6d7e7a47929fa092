"""The tokenizer: exact round trip, and a separator that no text can produce."""

import random

import pytest

from curation.tokenizer import SEPARATOR, Tokenizer, load_tokenizer, sentences, train_tokenizer

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
