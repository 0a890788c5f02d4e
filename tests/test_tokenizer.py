"""Tokenizers: exact round trips, streaming, saving, and errors that name the characters."""

import json
import re

import numpy as np
import pytest

from gpt.errors import UserError
from gpt.text.tokenizers import ByteTokenizer, CharTokenizer, make_tokenizer, readable, tokenizer_from_dict

TEXTS = {
    "plain": "First Citizen:\nBefore we proceed",
    "one symbol": "aaaa",
    "emoji": "a👩‍👩‍👧b🇩🇪",
    "combining": "e\u0301 is not \u00e9",
    "NUL": "a\0b\0",
    "newlines": "a\r\nb\rc\n\u2028\x85",
    "ends of Unicode": "\0\U0010ffff\ud7ff\ue000\ufeff",
}


@pytest.mark.parametrize("kind", ["char", "byte"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_round_trip(kind, text):
    tokenizer = make_tokenizer(kind, text)
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.int64
    assert tokens.ndim == 1
    assert tokens.min() >= 0
    assert tokens.max() < tokenizer.vocab_size
    assert tokenizer.decode(tokens) == tokenizer.decode(tokens.tolist()) == text

    saved = tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert saved.kind == kind
    assert saved.vocab_size == tokenizer.vocab_size
    np.testing.assert_array_equal(saved.encode(text), tokens)


def test_tokens_are_the_definition():
    assert CharTokenizer.from_text("cabab").encode("abc").tolist() == [0, 1, 2]
    assert CharTokenizer.from_text("b😀a").vocab_size == 3
    assert ByteTokenizer().encode("aé").tolist() == [0x61, 0xC3, 0xA9]


@pytest.mark.parametrize("kind", ["char", "byte"])
def test_nothing_is_a_text(kind):
    tokenizer = make_tokenizer(kind, "a")
    assert tokenizer.encode("").shape == (0,)
    assert tokenizer.encode("").dtype == np.int64
    assert tokenizer.decode([]) == tokenizer.stream_decoder()([], final=True) == ""


@pytest.mark.parametrize("kind", ["char", "byte"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_streaming_token_by_token_gives_whole_characters(kind, text):
    tokenizer = make_tokenizer(kind, text)
    decode = tokenizer.stream_decoder()
    pieces = [decode([token]) for token in tokenizer.encode(text)]
    assert "".join(pieces) + decode([], final=True) == text
    assert all(len(piece) <= 1 and piece != "\ufffd" for piece in pieces)


def test_byte_stream_holds_back_an_incomplete_character():
    decode = ByteTokenizer().stream_decoder()
    assert decode(np.array([0xF0, 0x9F])) == ""
    assert decode([0x98]) == ""
    assert decode([0x80]) == "😀"
    assert decode([0xC3]) == ""
    assert readable(decode([], final=True)) == "\ufffd"


@pytest.mark.parametrize(
    "raw", [bytes(range(256)), b"a\xffb\xc3", b"\xff\xfea\0b\0", "é".encode() + b"\xe9\xa9", b"\xed\xa0\x80"]
)
def test_bytes_that_are_no_text_come_back_and_can_be_shown(raw):
    tokenizer = ByteTokenizer()
    decode = tokenizer.stream_decoder()
    for text in (tokenizer.decode([*raw]), "".join(map(decode, [[byte] for byte in raw])) + decode([], final=True)):
        assert tokenizer.encode(text, np.uint8).tobytes() == raw
        assert readable(text) == raw.decode(errors="replace")


def test_decode_refuses_tokens_outside_the_vocabulary():
    with pytest.raises(IndexError):
        CharTokenizer("ab").decode([2])
    with pytest.raises(ValueError, match="256"):
        ByteTokenizer().decode([256])


@pytest.mark.parametrize(
    ("text", "said", "unsaid"),
    [
        ("abx", "vocabulary of 2: 'x';", "'a'"),
        ("zazbz!", "'!', 'z';", "more"),
        ("a\n😀\0", r"'\x00', '\n', '😀';", "more"),
        ("\u0301", "'\u0301'", "more"),
        ("".join(map(chr, range(0x4E00, 0x4E00 + 25))), "'一'", "'一', '一'"),
    ],
)
def test_unknown_characters_are_listed(text, said, unsaid):
    with pytest.raises(UserError) as error:
        CharTokenizer("ab").encode(text)
    message = str(error.value)
    assert said in message
    assert unsaid not in message
    assert "--tokenizer byte" in message
    distinct = len(set(text) - set("ab"))
    assert message.count("'") - 1 == 2 * min(distinct, 20)  # and the apostrophe of "model's"
    assert (f" and {distinct - 20} more;" in message) == (distinct > 20)


@pytest.mark.parametrize(
    ("use", "text", "what"),
    [
        (CharTokenizer.from_text, "caf\udce9", "byte 0xE9"),
        (CharTokenizer("ab").encode, "caf\udce9", "byte 0xE9"),
        (CharTokenizer("ab").encode, "caf\ud800", "lone surrogate U+D800"),
        (ByteTokenizer().encode, "caf\udc00", "lone surrogate U+DC00"),
    ],
)
def test_what_is_no_utf8_is_explained(use, text, what):
    with pytest.raises(UserError, match=f"the text is not UTF-8, for it has the {re.escape(what)} at position 3: conv"):
        use(text)


@pytest.mark.parametrize("symbols", ["", "ba", "aa"])
def test_symbols_must_be_sorted_and_distinct(symbols):
    with pytest.raises(ValueError, match="sorted distinct"):
        CharTokenizer(symbols)


@pytest.mark.parametrize(
    "saved",
    [
        None,
        [],
        "char",
        {},
        {"kind": "bpe", "merges": []},
        {"kind": ["char"]},
        {"kind": "char"},
        {"kind": "char", "symbols": None},
        {"kind": "char", "symbols": ["a", "b"]},
        {"kind": "char", "symbols": ""},
        {"kind": "char", "symbols": "ba"},
        {"kind": "char", "symbols": "aab"},
        {"kind": "char", "symbols": "a\ud800"},
        {"kind": "char", "symbols": "b" * 100_000},
    ],
    ids=lambda saved: repr(saved)[:40],
)
def test_damaged_tokenizers_are_refused(saved):
    with pytest.raises(UserError, match="tokenizer is damaged or from a newer version") as error:
        tokenizer_from_dict(saved)
    assert len(str(error.value)) < 400


def test_unknown_kind_names_the_choices():
    with pytest.raises(UserError, match="'word'.*--tokenizer char or byte or bpe"):
        make_tokenizer("word", "text")
