"""Texts, splits and blocks: exact sizes, no leaks between records, every failure explained; no network."""

import hashlib
import math
import os
import socket
import sys
import time

import numpy as np
import pytest

import gpt.text.dataset
import gpt.text.kept
import gpt.text.sources
from gpt.errors import UserError
from gpt.files import cache_folder
from gpt.text import stored
from gpt.text.dataset import Split, _counts, make_dataset, optima, random_starts
from gpt.text.sources import Text, load_text
from gpt.text.stored import StoredText
from gpt.text.tokenizers import ByteTokenizer, CharTokenizer, make_tokenizer

PLAY = b"Enter two clowns.\nExeunt.\n"  # stands in for tinyshakespeare


def dataset(text, kind="char", block_size=4, **options):
    text = text if isinstance(text, Text) else Text(text, name="test", source="test")
    return make_dataset(text, make_tokenizer(kind, text.text), block_size, **options)


# --- files ---


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"abc", "abc"),
        (b"a\r\nb\rc\n", "a\r\nb\rc\n"),
        (b"\xef\xbb\xbfabc", "abc"),
        (b"a\xef\xbb\xbfb", "a\ufeffb"),
        ("naïve 😀 e\u0301\0".encode(), "naïve 😀 e\u0301\0"),
    ],
    ids=["plain", "newlines", "byte order mark", "mark inside", "unicode"],
)
def test_file_is_read_exactly(tmp_path, monkeypatch, raw, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_bytes(raw)
    loaded = load_text("my.txt", block_size=8)
    assert loaded == Text(text, name="my.txt", source=str(tmp_path / "my.txt"))
    assert load_text(loaded.source, block_size=8) == loaded


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "empty"),
        (b"\xef\xbb\xbf", "empty"),
        (b"\xff\xfea\0", "not UTF-8.*offset 0"),
        (b"\xef\xbb\xbfab\xe9c", "not UTF-8.*offset 5.*convert.*--tokenizer byte"),
        (b"ab\xed\xa0\x80", "not UTF-8.*offset 2"),
        (b"abc\xc3", "not UTF-8.*offset 3"),
    ],
    ids=["empty", "only a mark", "UTF-16", "Latin-1 after a mark", "surrogate", "cut short"],
)
def test_unusable_file_is_explained(tmp_path, raw, said):
    (tmp_path / "my.txt").write_bytes(raw)
    with pytest.raises(UserError, match=rf"my\.txt is {said}"):
        load_text(str(tmp_path / "my.txt"), block_size=8)


@pytest.mark.parametrize("raw", [bytes(range(256)) * 3, "née".encode("utf-16"), b"caf\xe9\r\n" * 9, b"abc\xc3"])
def test_any_file_is_its_bytes(tmp_path, raw):
    (tmp_path / "song.mid").write_bytes(raw)
    text = load_text(str(tmp_path / "song.mid"), block_size=1, any_bytes=True)
    data = dataset(text, "byte", block_size=1, val_fraction=0.4)
    assert data.train.tokens.tobytes() + data.val.tokens.tobytes() == raw
    assert data.train.tokens.dtype == np.uint8
    assert dataset(text, "byte", block_size=1, val_fraction=0.4).fingerprint == data.fingerprint


def test_a_text_is_the_same_text_though_any_bytes_would_do(tmp_path):
    (tmp_path / "my.txt").write_bytes("\ufeffnaïve\r\n😀".encode())
    strict, lax = (load_text(str(tmp_path / "my.txt"), block_size=1, any_bytes=lax) for lax in (False, True))
    assert strict == lax


@pytest.mark.parametrize("source", ["none.txt", ""])
def test_what_cannot_be_read_is_explained(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"cannot read {source}: .*give a UTF-8 file"):
        load_text(source, block_size=8)


def test_a_path_makes_a_file_of_a_built_in_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ab").write_text("my own")
    assert load_text("./ab", block_size=8).text == "my own"
    assert load_text("ab", block_size=8).record == 9


# --- built-in texts ---


@pytest.mark.parametrize("block_size", [1, 8, 33])
def test_ab_strings(block_size):
    ab = load_text("ab", block_size=block_size, seed=5)
    assert ab.source == "ab"
    assert ab.record == block_size + 1
    assert len(ab.text) % ab.record == 0
    assert abs(len(ab.text) - 1_000_000) < ab.record
    records = np.frombuffer(ab.text.encode(), np.uint8).reshape(-1, ab.record) == ord("b")
    assert not records[:, 0].any()
    assert (records[:, 1:] >= records[:, :-1]).all()  # b is absorbing
    after_a = records[:, 1:][~records[:, :-1]]
    assert abs(after_a.mean() - 0.5) < 4 * 0.5 / math.sqrt(after_a.size)


def test_ab_strings_depend_on_the_seed_alone():
    first, again, other = (load_text("ab", block_size=8, seed=seed).text for seed in (1, 1, 2))
    assert first == again != other


def test_pydoc_needs_no_network():
    text = load_text("pydoc", block_size=8)
    assert text.source == "pydoc"
    assert text.note == ""
    assert "reference" in text.name
    assert len(text.text) > 100_000
    assert "statement" in text.text


# --- tinyshakespeare: a cache in tmp_path, a server in a file ---


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """The path of the cached file; the text to be had is PLAY, and nothing serves it yet."""
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA", "HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(gpt.text.sources, "SHAKESPEARE_SHA256", hashlib.sha256(PLAY).hexdigest())
    monkeypatch.setattr(gpt.text.sources, "SHAKESPEARE_URL", (tmp_path / "server").as_uri())
    return cache_folder() / "tinyshakespeare.txt"


def serve(tmp_path, raw=PLAY):
    (tmp_path / "server").write_bytes(raw)


@pytest.mark.parametrize("source", ["shakespeare", None])
def test_download_once(tmp_path, cached, source):
    serve(tmp_path)
    first = load_text(source, block_size=8)
    assert first == Text(PLAY.decode(), name="tinyshakespeare", source="shakespeare")
    assert cached.read_bytes() == PLAY
    assert list(cached.parent.iterdir()) == [cached]
    (tmp_path / "server").unlink()
    assert load_text(source, block_size=8) == first


def test_damaged_cache_is_downloaded_again(tmp_path, cached):
    cached.parent.mkdir(parents=True)
    cached.write_bytes(PLAY[:-1])
    serve(tmp_path)
    assert load_text("shakespeare", block_size=8).text == PLAY.decode()
    assert cached.read_bytes() == PLAY


def test_wrong_hash_is_refused_and_not_cached(tmp_path, cached):
    serve(tmp_path, b"<html>Please log in</html>")
    with pytest.raises(UserError, match="26 bytes.*not the expected text.*--data FILE.*--data pydoc"):
        load_text("shakespeare", block_size=8)
    assert not cached.exists()
    assert load_text(None, block_size=8).source == "pydoc"


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="there the user's name is not looked up so")
def test_a_user_without_home_and_name(cached, monkeypatch):
    import pwd

    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    with pytest.raises(UserError, match="there is no home folder to keep tinyshakespeare in: set HOME, or give --data"):
        load_text("shakespeare", block_size=8)
    assert load_text(None, block_size=8).source == "pydoc"


def test_unwritable_cache_does_not_prevent_training(tmp_path, cached):
    cached.parent.parent.mkdir(parents=True, exist_ok=True)
    cached.parent.write_text("a file where the folder should be")
    serve(tmp_path)
    assert load_text("shakespeare", block_size=8).text == PLAY.decode()


def test_full_disk_does_not_prevent_training(tmp_path, cached, monkeypatch):
    def full(*_):
        raise OSError("full")

    serve(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    assert load_text("shakespeare", block_size=8).text == PLAY.decode()
    assert list(cached.parent.iterdir()) == []


def test_no_network_is_an_error_when_asked_for_and_a_note_otherwise(cached):
    with pytest.raises(UserError, match="cannot download .* from file:.*--data FILE.*--data pydoc"):
        load_text("shakespeare", block_size=8)
    text = load_text(None, block_size=8)
    assert text.source == "pydoc"
    assert text.text == load_text("pydoc", block_size=8).text
    assert "tinyshakespeare" in text.note
    assert "--data FILE" in text.note
    assert "\n" not in text.note


def test_silent_server_is_given_up_in_time(cached, monkeypatch):
    monkeypatch.setattr(gpt.text.sources, "DEADLINE_ASKED", 0.2)
    monkeypatch.setattr(gpt.text.sources, "DEADLINE_DEFAULT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, and never answers
        monkeypatch.setattr(gpt.text.sources, "SHAKESPEARE_URL", f"http://127.0.0.1:{server.getsockname()[1]}/")
        start = time.monotonic()
        with pytest.raises(UserError, match="0.2 seconds|timed out"):
            load_text("shakespeare", block_size=8)
        assert load_text(None, block_size=8).source == "pydoc"
        assert time.monotonic() - start < 3


# --- splits and blocks ---


@pytest.mark.parametrize(
    ("length", "val_fraction", "train"),
    [(1_115_394, 0.1, 1_003_854), (10, 0.5, 5), (100, 0.9, 10), (1000, 0.7, 300), (30, 0.1, 27)],
)
@pytest.mark.parametrize("kind", ["char", "byte"])
def test_split_sizes(kind, length, val_fraction, train):
    data = dataset("ab" * (length // 2), kind, block_size=1, val_fraction=val_fraction)
    assert (len(data.train.tokens), len(data.val.tokens)) == (train, length - train)


def test_both_tokenizers_see_the_same_texts():
    text = "ä" * 50 + "a" * 40 + "😀" * 10  # characters of 2, 1 and 4 bytes
    for kind in ("char", "byte"):
        data = dataset(text, kind)
        assert data.tokenizer.decode(data.train.tokens) == text[:90]
        assert data.tokenizer.decode(data.val.tokens) == text[90:]


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(2, np.uint8), (256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.int32)],
)
def test_tokens_take_the_smallest_dtype(vocab_size, dtype):
    text = "".join(map(chr, range(0x10000, 0x10000 + vocab_size)))  # where there are no surrogates
    data = dataset(text * 10, block_size=1)
    assert data.train.tokens.dtype == data.val.tokens.dtype == dtype
    assert data.tokenizer.decode(data.val.tokens) == text


def test_blocks_of_running_text():
    split = Split(np.arange(10, dtype=np.uint8), block_size=4)
    assert split.num_blocks == 6
    x, y = split.block(np.array([0, 5, 2]))
    assert x.tolist() == [[0, 1, 2, 3], [5, 6, 7, 8], [2, 3, 4, 5]]
    assert y.tolist() == [[1, 2, 3, 4], [6, 7, 8, 9], [3, 4, 5, 6]]
    for array in (x, y):
        assert array.dtype == np.int64
        assert array.flags.c_contiguous
        assert array.flags.owndata
    with pytest.raises(IndexError):
        split.block([6])


@pytest.mark.parametrize("kind", ["char", "byte"])
def test_blocks_never_cross_records(kind):
    data = dataset(load_text("ab", block_size=8), kind, block_size=8, val_fraction=0.123)
    assert data.train.num_blocks + data.val.num_blocks == 1_000_000 // 9
    for split in (data.train, data.val):
        x, y = split.block(np.arange(split.num_blocks))
        np.testing.assert_array_equal(np.c_[x, y[:, -1:]].ravel(), split.tokens)
        assert (x[:, 0] == data.tokenizer.encode("a")).all()


def test_random_starts_reach_every_start_and_repeat_with_the_generator():
    split = Split(np.arange(10, dtype=np.uint8), block_size=4)
    starts = random_starts(split, 500, np.random.default_rng(0))
    x, y = split.block(starts)
    assert x.shape == y.shape == (500, 4)
    assert (y == x + 1).all()
    assert set(x[:, 0]) == set(range(split.num_blocks))
    np.testing.assert_array_equal(random_starts(split, 500, np.random.default_rng(0)), starts)


@pytest.mark.parametrize(
    ("length", "val_fraction", "said"),
    [
        (49, 0.1, "validation part of test has 5 tokens, but .* of 5 needs 6.*--block-size.*--val-fraction"),
        (20, 0.9, "training part of test has 2 tokens, but a block of 5 needs 6.*larger file"),
        (1, 0.1, "training part of test has 0 tokens"),
        (100, 0, "--val-fraction must lie between 0 and 1, got 0"),
        (100, 1.0, "--val-fraction must lie between 0 and 1, got 1.0"),
        (100, math.nan, "--val-fraction .* got nan"),
    ],
)
def test_impossible_splits_are_explained(length, val_fraction, said):
    with pytest.raises(UserError, match=said):
        dataset("a" * length, block_size=5, val_fraction=val_fraction)


def test_the_shortest_possible_text():
    data = dataset("abcdef", block_size=2, val_fraction=0.5)
    assert data.train.num_blocks == data.val.num_blocks == 1


@pytest.mark.parametrize(("text", "block_size"), [("ab" * 20, 2), ("ab" * 20 + "a", 1)])
def test_records_that_cannot_hold_a_block_are_refused(text, block_size):
    with pytest.raises(ValueError, match="records"):
        dataset(Text(text, name="test", source="test", record=2), block_size=block_size)


def test_fingerprint_tells_text_and_split_but_not_tokenizer():
    text = "to be or not to be, that is the question"
    same = {dataset(text, kind, block_size).fingerprint for kind, block_size in [("char", 2), ("byte", 3)]}
    others = {dataset(text + "s").fingerprint, dataset(text, val_fraction=0.2).fingerprint}
    assert len(same) == 1
    assert len(same | others) == 3
    assert all(len(fingerprint) == 64 for fingerprint in same | others)


# --- yardsticks ---


def test_optima_by_hand():
    # train aabab: targets a b a b, pairs aa ab ba ab.  val bbaab: targets b a a b, pairs bb ba aa ab.
    result = optima(dataset("aababbbaab", val_fraction=0.5))
    assert result["uniform"] == pytest.approx(math.log(2))
    assert result["unigram"] == pytest.approx((math.log(2), math.log(2)))
    train = (math.log(3) + 2 * math.log(3 / 2) + math.log(1)) / 4
    # One more each: from a, (2, 3) of 5; from b, (2, 1) of 3.
    val = (math.log(3 / 1) + math.log(3 / 2) + math.log(5 / 2) + math.log(5 / 3)) / 4
    assert result["bigram"] == pytest.approx((train, val))


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("piece", [1, 5, 1000])
def test_counts_are_those_of_a_loop(order, piece, monkeypatch):
    monkeypatch.setattr(gpt.text.dataset, "PIECE", piece)
    data = dataset("abcabcaabbccabacab" * 3, val_fraction=0.5)
    ids = data.train.tokens.tolist()
    expected = np.zeros((3,) * order, int)
    for i in range(max(1, order - 1), len(ids)):
        expected[tuple(ids[i - order + 1 : i + 1])] += 1
    np.testing.assert_array_equal(_counts(data.train, (3,) * order), expected)


def test_a_trigram_knows_what_a_bigram_cannot():
    counted = optima(dataset("aabb" * 50))  # after an a comes either, after two comes b
    assert counted["trigram"][0] == pytest.approx(0, abs=1e-9)
    assert counted["bigram"][0] == pytest.approx(np.log(2), rel=0.01)


def test_optima_of_ab_strings_are_the_theory():
    result = optima(dataset(load_text("ab", block_size=8), block_size=8))
    # Of the 8 targets of a record, 2 - 2**-7 on average follow an a and cost ln 2; the others cost nothing.
    expected = math.log(2) * (2 - 2**-7) / 8
    assert result["bigram"] == pytest.approx((expected, expected), rel=0.02)
    assert result["unigram"][0] < result["uniform"]


def test_symbols_unseen_in_training_cost_a_finite_loss():
    result = optima(dataset("ab" * 50 + "z" * 12))
    assert math.isfinite(result["unigram"][1])
    assert math.isfinite(result["bigram"][1])
    assert result["bigram"][0] == pytest.approx(0, abs=1e-12)


def test_bytes_have_the_optima_of_characters_on_ascii():
    by_char, by_byte = (optima(dataset("hello world " * 20, kind)) for kind in ("char", "byte"))
    assert by_byte["uniform"] == pytest.approx(math.log(ByteTokenizer.vocab_size))
    for name in ("unigram", "bigram"):
        assert by_byte[name][0] == pytest.approx(by_char[name][0])


def test_large_vocabulary_has_no_bigram(monkeypatch):
    monkeypatch.setattr(gpt.text.dataset, "MAX_BIGRAM_VOCAB", 2)
    assert "bigram" in optima(dataset("ab" * 50))
    assert "bigram" not in optima(dataset("abc" * 50))


MIXED = "aé日😀\n" * 7 + "plain\r\n"


@pytest.mark.parametrize("size", [2, 3, 4, 5, 7, 64, 1000])
@pytest.mark.parametrize("raw", [MIXED.encode(), b"\xef\xbb\xbf" + MIXED.encode(), bytes(range(256)) * 2], ids=str)
def test_a_text_stays_in_its_file(tmp_path, monkeypatch, size, raw):
    """Whatever the pieces, it is the text that a str would be, and so are its parts."""
    monkeypatch.setattr(stored, "PIECE", max(size, 4))
    (tmp_path / "text").write_bytes(raw)
    text = StoredText.of_file(tmp_path / "text", "surrogateescape")
    whole = raw.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    assert text == whole
    assert (len(text), text.symbols) == (len(whole), set(whole))
    for start in range(0, len(whole), size):
        for stop in {start, min(len(whole), start + 2 * size), len(whole)}:
            part = text.part(start, stop)
            assert part == whole[start:stop]
            assert b"".join(part.raw_pieces()) == whole[start:stop].encode("utf-8", "surrogateescape")
    both = StoredText.joined([whole, text, "end"])
    assert both == whole + whole + "end"
    assert both.part(len(whole) - 1, len(whole) + 1) == whole[-1] + whole[0]


@pytest.mark.parametrize("now", [b"", b"longer than before", b"\xff" * 10, "é".encode() * 5])
def test_a_file_that_changes_while_it_is_read_is_told(tmp_path, now):
    (tmp_path / "text").write_bytes(b"0123456789")
    text = StoredText.of_file(tmp_path / "text")
    (tmp_path / "text").write_bytes(now)
    if now == b"longer than before":  # whose first ten characters could be anything
        assert str(text) == "longer tha"
    else:
        with pytest.raises(UserError, match="text has changed while it was read: start again when it is complete"):
            str(text)


def test_tokens_of_a_large_text_are_kept(cwd, monkeypatch):
    """And made only once, whatever becomes of the files meanwhile."""
    monkeypatch.setattr(gpt.text.dataset, "WORTH_IT", 100)
    folder, made = cwd / "cache/tensorlite/tokens", []
    encode = CharTokenizer.encode
    monkeypatch.setattr(CharTokenizer, "encode", lambda self, *args: made.append(1) or encode(self, *args))

    def tokens(text="abcab" * 200):
        made.clear()
        data = dataset(text, val_fraction=0.5)
        return data.train.tokens.tolist() + data.val.tokens.tolist(), len(made)

    plain = [*map("abc".index, "abcab" * 200)]
    assert tokens() == (plain, 2)
    assert tokens() == (plain, 0)
    assert isinstance(dataset("abcab" * 200, val_fraction=0.5).train.tokens, np.memmap)
    first, second = sorted(folder.iterdir())
    whole = first.read_bytes()
    for damaged in (whole[:-1], whole[:20], b"", whole[:-1] + b"\xff", b"\x93NUMPY\x01\x00garbage"):
        first.write_bytes(damaged)
        assert tokens() == (plain, 1)
    second.unlink()
    second.mkdir()
    assert tokens() == (plain, 1)  # which cannot be kept
    second.rmdir()
    for text in ("abcba", "abccc", "bbcba"):
        assert tokens(text * 100)[1] == 2
    assert len([*folder.iterdir()]) == 4
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(gpt.text.kept, "cache_folder", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert tokens() == (plain, 2)
