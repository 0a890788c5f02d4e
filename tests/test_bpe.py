"""Sub-words: every text comes back, learnt from the training text alone, files of Hugging Face's, and losses that
compare whatever the tokenizer."""

import gc
import io
import json
import math
import os
import random
import sys
import time

import numpy as np
import pytest
from scripts import TEXT, TINY, assert_complaint, log, run, tiny, train
from test_checkpoint import assert_refused, make, rewrite
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

import gpt.tensor_file
import gpt.text.bpe
import train as script
from gpt.checkpoint import load_checkpoint, save_checkpoint
from gpt.cli import run_script
from gpt.config import load_preset
from gpt.errors import UserError
from gpt.generate import default_prompt
from gpt.memory import check_memory
from gpt.text.bpe import SubwordTokenizer, learn_bpe, read_tokenizer
from gpt.text.dataset import make_dataset, optima, split_at
from gpt.text.sources import Text
from gpt.text.tokenizers import ByteTokenizer, located, make_tokenizer, tokenizer_from_dict

PROSE = "The quick brown fox isn't as lazy as the dog; it's 12,345 times\n\n  quicker, naïve — and 日本語 too!\r\n" * 20
NASTY = ["a", "b ", " the", "\n", "\r\n", "\0", "  ", "\t", "'s", "é", "e\u0301", "日本", "مرحبا", "שלום", "\u202e"]
NASTY += [
    "👩‍👩‍👧",
    "🇩🇪",
    "\ufffd",
    "\ufeff",
    "\x1c",
    "\x85",
    "\u2028",
    "\xa0",
    "<|endoftext|>",
    "[UNK]",
    "Ġ",
    "▁",
    "12",
]
NASTY += ["!?", "\U0010ffff"]


@pytest.fixture(scope="module")
def ours() -> SubwordTokenizer:
    return learn_bpe(PROSE, 300)


def nasty_texts(count: int) -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices(NASTY, k=rng.randrange(1, 60))) for _ in range(count)]


# --- files of other tokenizers ---


def byte_level(pattern: str | None = None) -> Tokenizer:
    """GPT-2's kind, or with a pattern that of its successors."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([split, made.pre_tokenizer])
    made.decoder, made.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([PROSE], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    made.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    return made


def sentence_piece() -> Tokenizer:
    """As Llama's first ones: spaces are marked, one is put before the text, and bytes stand for unknown characters."""
    symbols = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(set(PROSE) | {"▁"} - {" "})]
    vocab = {symbol: i for i, symbol in enumerate(dict.fromkeys(symbols))}
    made = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    return made


def bert() -> Tokenizer:
    words = ["[UNK]", "[CLS]", "[SEP]", *"the quick brown fox dog lazy as is it ##s ! ' n t".split()]  # noqa: SIM905
    made = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return made


def only_words() -> Tokenizer:
    """Without a token for what is unknown."""
    made = Tokenizer(models.WordLevel({"the": 0}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


GPT_4 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
FILES = {"gpt2": byte_level, "gpt4": lambda: byte_level(GPT_4), "llama": sentence_piece, "bert": bert}
EXACT = ("ours", "gpt2", "gpt4", "llama")


@pytest.fixture(scope="module")
def every(ours) -> dict[str, SubwordTokenizer]:
    return {"ours": ours} | {name: SubwordTokenizer("file", made().to_str()) for name, made in FILES.items()}


# --- texts and back ---


@pytest.mark.parametrize("name", EXACT)
def test_every_text_comes_back(every, name):
    tokenizer = every[name]
    for text in [PROSE, "", " ", *NASTY, *nasty_texts(50)]:
        if name == "llama":
            text = text.replace("▁", "")  # what it writes for a space
        tokens = tokenizer.encode(text)
        assert (tokens.dtype, tokens.ndim) == (np.int64, 1)
        assert not len(tokens) or 0 <= tokens.min() <= tokens.max() < tokenizer.vocab_size
        assert tokenizer.decode(tokens) == text
        decode = tokenizer.stream_decoder()
        pieces = [decode([token]) for token in tokens] + [decode([], final=True)]
        assert "".join(pieces) == (" " if name == "llama" and text else "") + text  # it puts a space before a text
        assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text
    assert all(map(tokenizer.knows, ["\\", "\r", "\n", "é", "😀"]))
    assert tokenizer.changes(PROSE) == ""


@pytest.mark.parametrize("name", [*EXACT, "bert"])
def test_pieces_have_the_tokens_of_the_whole(every, name, monkeypatch):
    tokenizer, texts = every[name], [PROSE, *nasty_texts(20), "x" * 500 + " y" * 500, " \n" * 300]
    whole = [tokenizer._ids(text) for text in texts]
    for size in (1, 50):
        monkeypatch.setattr(gpt.text.bpe, "PIECE", size)
        pieces = [list(tokenizer._pieces(text)) for text in texts]
        assert ["".join(p) for p in pieces] == texts
        assert len(pieces[0]) == 1 if name == "llama" else len(pieces[0]) > len(PROSE) / 150
        assert [tokenizer._ids(t) if not t.strip() else tokenizer.encode(t).tolist() for t in texts] == whole


def test_what_it_saved_is_the_same_tokenizer(every):
    for tokenizer in every.values():
        again = tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict())))
        assert (again.kind, again.vocab_size) == (tokenizer.kind, tokenizer.vocab_size)
        assert again.to_dict() == tokenizer.to_dict()
        np.testing.assert_array_equal(again.encode(PROSE), tokenizer.encode(PROSE))


def test_bytes_that_are_no_text_wait_and_are_shown_in_the_end(ours):
    alone = [ours.encode("é")[0]]  # the first half
    decode = ours.stream_decoder()
    assert [decode(alone), decode(alone), decode([], final=True)] == ["", "", "\ufffd\ufffd"]
    decode = ours.stream_decoder()
    assert decode(alone) + decode(ours.encode("a")) == "\ufffda"


def test_what_is_no_utf8_is_explained(ours):
    with pytest.raises(UserError, match="byte 0xFF at position 1: convert it to UTF-8, or train .* --tokenizer byte"):
        ours.encode("a\udcff")


def test_special_tokens_are_text_for_ours_and_tokens_for_whose_they_are(every):
    text = "a<|endoftext|>b"
    assert len(every["ours"].encode(text)) > 5
    assert every["gpt2"].encode(text).tolist()[1] == every["gpt2"].vocab_size - 1


# --- learning ---


def test_only_the_training_text_is_learnt_from():
    text = Text("to be or not to be " * 30 + "zyzzyva " * 20, "test", "test")
    split = split_at(text, 0.3)
    tokenizer = make_tokenizer("bpe", text.text, split, 262)
    assert tokenizer.vocab_size == 262
    assert "zy" not in tokenizer.to_dict()["json"]
    assert tokenizer.to_dict() == learn_bpe(text.text[:split], 262).to_dict()


def test_learning_in_pieces_is_learning():
    whole, ours = (
        json.loads(byte_level().to_str())["model"],
        json.loads(learn_bpe(PROSE, 300).to_dict()["json"])["model"],
    )
    assert len(PROSE) > 1000
    assert (ours["merges"], ours["vocab"]) == (whole["merges"], whole["vocab"])


@pytest.mark.parametrize("text", ["acgt" * 50_000, " " * 200_000], ids=["one word", "no word"])
def test_a_word_without_an_end_takes_no_time_without_an_end(text):
    start = time.process_time()
    tokenizer = learn_bpe(text, 260)
    assert time.process_time() - start < 3  # as one word it takes a minute
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_bar_on_a_terminal_if_it_takes_long(ours, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(gpt.text.bpe, "PIECE", 50)
    for seconds, terminal in ((0.0, Terminal()), (60.0, Terminal()), (0.0, io.StringIO())):
        monkeypatch.setattr(gpt.text.stored, "BAR_SECONDS", seconds)
        monkeypatch.setattr(sys, "stderr", terminal)
        ours.encode(PROSE * 20)
        assert ("char/s" in terminal.getvalue()) == (terminal.isatty() and not seconds)


# --- files ---


def test_settings_of_a_file_that_would_change_a_text_are_left_out(every):
    changed = byte_level()
    changed.enable_truncation(5)
    changed.enable_padding(length=10**12)
    changed.model.dropout = 0.5
    tokenizer = SubwordTokenizer("file", changed.to_str())
    assert tokenizer.encode(PROSE).tolist() == every["gpt2"].encode(PROSE).tolist()
    assert tokenizer.to_dict() == every["gpt2"].to_dict()


def test_what_does_not_give_the_text_back_says_so(every):
    assert every["bert"].changes("The fox") == "'The fox' comes back as 'the fox'"
    assert every["bert"].changes("zebras") == "'zebras' comes back as '[UNK]'"
    assert not every["bert"].knows("\\")
    assert default_prompt(every["bert"]) == "[UNK]"
    assert default_prompt(every["gpt2"]) == "\n"


def test_a_text_that_cannot_be_encoded_is_explained():
    table = (
        (only_words(), "a fox", r"cannot encode the text 'a fox' \(.*UNK"),
        (bert(), " ", "no token for the text ' '"),
    )
    for tokenizer, text, said in table:
        with pytest.raises(UserError, match=said):
            SubwordTokenizer("file", tokenizer.to_str()).encode(text)


def changed(**parts) -> str:
    return json.dumps(json.loads(byte_level().to_str()) | parts)


PANICS = changed(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})
DAMAGED = {
    "empty": "",
    "object": "{}",
    "cut short": byte_level().to_str()[:3000],
    "nested": "[" * 10**6,
    "no tokens": changed(model={"type": "BPE", "vocab": {}, "merges": []}, added_tokens=[]),
    "unknown merge": changed(model={"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}),
    "a number too large": changed(model={"type": "BPE", "vocab": {"a": 2**32}, "merges": []}),
    "a panic": PANICS,
}
# What loads, and panics where it is used.
LATE = changed(pre_tokenizer={"type": "FixedLength", "length": 0})


@pytest.mark.parametrize("name", [*DAMAGED, "binary", "folder", "pipe", "missing", "of gigabytes"])
def test_a_file_that_is_none_is_one_sentence(tmp_path, name, capfd):
    path = tmp_path / "tokenizer.json"
    match name:
        case "binary":
            path.write_bytes(b"\xff\0" * 500)
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "of gigabytes":
            with path.open("wb") as file:
                file.truncate(3 * 2**30)
        case _ if name in DAMAGED:
            path.write_text(DAMAGED[name])
    with pytest.raises(UserError, match=r"tokenizer\.json.*(; give|: give another|; check the name)") as error:
        read_tokenizer(str(path))
    assert len(str(error.value)) < 500
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["bpe", "file"])
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_tokenizer_in_a_checkpoint_under_a_right_checksum(tmp_path, damage, kind, capfd):
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, make())
    rewrite(path, tokenizer=json.dumps({"kind": kind, "json": DAMAGED[damage]}))
    assert_refused(path, "tokenizer is damaged or from a newer version")
    assert capfd.readouterr() == ("", "")


def test_a_panic_while_encoding_is_a_sentence(capfd):
    with pytest.raises(UserError, match=r"cannot encode the text 'abc' \(chunk size must be non-zero\)"):
        SubwordTokenizer("file", LATE).encode("abc")
    assert capfd.readouterr() == ("", "")


def test_only_errors_of_the_library_are_explained():
    for error in (KeyboardInterrupt, MemoryError, UserError("x")):
        with pytest.raises(type(error) if isinstance(error, UserError) else error), gpt.text.bpe._library_errors("y"):
            raise error


# --- checkpoints ---


def words(count: int) -> SubwordTokenizer:
    return SubwordTokenizer("file", Tokenizer(models.WordLevel({f"wörd {i:020}": i for i in range(count)})).to_str())


@pytest.mark.parametrize("name", ["ours", "gpt2", "many"])
def test_a_checkpoint_carries_all_of_it(tmp_path, every, name, monkeypatch):
    """Also more of it than there may be of other JSON."""
    monkeypatch.setattr(gpt.tensor_file, "MAX_JSON", 2**16)
    tokenizer = words(4000) if name == "many" else every[name]
    saved = make(tokenizer, for_resume=False, n_embd=2)
    save_checkpoint(tmp_path / "c", saved)
    loaded = load_checkpoint(tmp_path / "c")
    assert loaded.tokenizer.to_dict() == tokenizer.to_dict()
    assert loaded.config == saved.config
    if name == "many":
        assert len(tokenizer.to_dict()["json"]) > 2**16
        return
    rewrite(tmp_path / "c", tokenizer=json.dumps({"kind": tokenizer.kind, "json": words(3).to_dict()["json"]}))
    assert_refused(tmp_path / "c", f"is {tokenizer.kind} of 3, its configuration's {tokenizer.kind} of ")


# --- losses that compare ---


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_bits_are_those_of_the_text_whatever_its_tokens(kind):
    data = make_dataset(Text(PROSE, "test", "test"), make_tokenizer(kind, PROSE, len(PROSE), 300), 8)
    start = split_at(Text(PROSE, "test", "test"), 0.1)
    for split, text in ((data.train, PROSE[:start]), (data.val, PROSE[start:])):
        assert (split.characters, split.text_bytes) == (len(text), len(text.encode()))
        nats = 1.5 * len(split.tokens)  # of the whole text
        assert split.bits_per_character(1.5) == pytest.approx(nats / math.log(2) / len(text))
        assert split.bits_per_byte(1.5) == pytest.approx(nats / math.log(2) / len(text.encode()))
    if kind == "byte":
        assert data.val.bits_per_byte(optima(data)["uniform"]) == pytest.approx(8)


# --- as a user ---


def main(*args: str, capsys) -> tuple[int, str, str]:
    """(status, stdout, stderr) of train.py in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *args])
        with pytest.raises(SystemExit) as stop:
            run_script(script.main, script.MEMORY_ADVICE)
    gc.collect()  # which lets go of the lock
    return stop.value.code, *capsys.readouterr()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which a run of sub-words was made, and one with GPT-2's kind of tokenizer."""
    cwd = tmp_path_factory.mktemp("bpe")
    (cwd / "tokenizer.json").write_text(byte_level().to_str())
    runs = {"bpe": ["bpe", "--vocab-size=300"], "file": ["tokenizer.json"]}
    for name, (tokenizer, *more) in runs.items():
        done = train(cwd, "--tokenizer", tokenizer, *more, f"--out={name}", "--max-iters=6", "--threads=2")
        assert done.stderr == ""  # no warning of a fork beside threads
        (cwd / f"{name}.out").write_text(done.stdout)
    (cwd / "tokenizer.json").unlink()
    return cwd


@pytest.mark.parametrize("name", ["bpe", "file"])
def test_a_run_of_sub_words(trained, name):
    folder, out = trained / name, (trained / f"{name}.out").read_text()
    checkpoint, rows = load_checkpoint(folder / "last.safetensors"), log(folder)
    assert checkpoint.config == load_preset(str(folder / "config.toml"))
    assert checkpoint.config.gpt.vocab_size == checkpoint.tokenizer.vocab_size == {"bpe": 300, "file": 301}[name]
    assert checkpoint.config.train.tokenizer == {"bpe": "bpe", "file": str(trained / "tokenizer.json")}[name]
    assert "warning" not in out
    last = rows[-1]
    names = [f"{split}_bits_per_{unit}" for unit in ("character", "byte") for split in ("train", "val")]
    assert list(last)[-4:] == names
    assert last["val_bits_per_character"] == (bits := last["val_bits_per_byte"])  # ASCII
    assert f"({bits:.3f} bits per character, {bits:.3f} per byte)\n" in out
    assert "in bits per character (val): uniform " in out


@pytest.mark.parametrize("name", ["bpe", "file"])
def test_sampling_and_resuming_need_no_file(trained, name, monkeypatch, capsys):
    for text in ("text.txt", "elsewhere.txt"):  # sampling without the text, then resuming with it
        (trained / text).rename(trained / {"text.txt": "elsewhere.txt", "elsewhere.txt": "text.txt"}[text])
        if text == "text.txt":
            args = ["--model", name, "--max-new-tokens=20", "--prompt=naïve 日本 <|endoftext|>\\"]
            assert run("sample.py", *args, cwd=trained).stdout.startswith("naïve 日本 <|endoftext|>\\")
    tokenizer = {"bpe": ["bpe", "--vocab-size=300"], "file": ["tokenizer.json"]}[name]
    out = run("train.py", "--resume", "--out", name, "--max-iters=7", "--tokenizer", *tokenizer, cwd=trained).stdout
    assert "step 7: " in out
    for option in ("--tokenizer=char", "--vocab-size=302", "--tokenizer=other.json"):
        monkeypatch.chdir(trained)
        status, _, err = main("--resume", "--out", name, "--max-iters=9", option, capsys=capsys)
        assert status == 2
        assert_complaint(err, f"{option.split('=')[0]} cannot change on --resume", "train.py")


def test_a_run_with_a_tokenizer_that_loses_says_so(cwd):
    (cwd / "bert.json").write_text(bert().to_str())
    out = train(cwd, "--tokenizer=bert.json", "--max-iters=1", "--out=run").stdout
    assert out.startswith("warning: bert.json does not give every text back: '0 is the square of 0'"), out
    assert "best val loss" in out
    assert run("sample.py", "--model=run", "--max-new-tokens=5", cwd=cwd).stdout.startswith("[UNK]")


def test_a_config_of_characters_with_sub_words(tmp_path):
    config = load_preset("bigram").updated({"vocab_size": 65})
    assert config.updated({"tokenizer": "bpe"}).gpt.vocab_size == 1024
    assert config.updated({"tokenizer": "bpe", "vocab_size": 300}).updated({"tokenizer": "bpe"}).gpt.vocab_size == 300
    (tmp_path / "mine.toml").write_text('tokenizer = "bpe"\n')
    assert load_preset(str(tmp_path / "mine.toml")).gpt.vocab_size == 1024


def test_too_large_a_vocabulary_is_to_be_lowered():
    class Machine:
        name, memory_size = "numpy", staticmethod(lambda: 2**30)

    config = load_preset("bigram").updated({"tokenizer": "bpe", "vocab_size": 50_000})
    with pytest.raises(UserError, match="has 1: lower --vocab-size$"):
        check_memory(config, Machine)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("bpe --vocab-size 255", "--vocab-size must be from 256, one for each byte, to 1,048,576, got 255"),
        ("bpe --vocab-size 0", "vocab_size must be at least 1, got 0"),
        ("bpe --vocab-size 1048577", "--vocab-size must be from 256, one for each byte, to 1,048,576, got 1,048,577"),
        (f"bpe --vocab-size {10**12}", "--n-embd or --vocab-size"),
        ("bpe --vocab-size 5000", " sub-words and no more: lower --vocab-size to that, or take a longer --data"),
        ("byte --vocab-size 300", "--vocab-size has no effect without --tokenizer bpe: add that, or leave it out"),
        ("gone.json --vocab-size 300", "--vocab-size has no effect without --tokenizer bpe"),
        ("gone.json", "cannot read the tokenizer gone.json: No such file or directory; check the name"),
        ("folder.json", "folder.json is not a regular file: give another"),
        ("panic.json", "cannot use panic.json: this is no tokenizer of Hugging Face's (Precompiled: "),
        ("words.json", "the tokenizer cannot encode the text '0 is the square of"),
        ("bpe --data latin1.txt", "latin1.txt is not UTF-8 text (see the byte at offset 3)"),
        ("bpe --data ab", "the records of a/b strings need a token per character: take --tokenizer char or byte"),
        ("panic.json --data missing.txt", "cannot use panic.json"),
        ("word", "tokenizer must be one of char, byte, bpe, or the name of a tokenizer.json, got 'word'"),
    ],
)
def test_mistake_is_one_sentence_and_leaves_nothing_behind(cwd, capsys, args, said):
    (cwd / "text.txt").write_text(TEXT)
    (cwd / "latin1.txt").write_bytes(b"caf\xe9" * 100)
    (cwd / "panic.json").write_text(PANICS)
    (cwd / "words.json").write_text(only_words().to_str())
    (cwd / "folder.json").mkdir()
    before = sorted(cwd.rglob("*"))
    status, out, err = main(*tiny("--tokenizer", *args.split()), capsys=capsys)
    assert (status, out) == (2, "")
    assert_complaint(err, said, "train.py")
    assert sorted(cwd.rglob("*")) == before


def test_without_the_library(trained, cwd):
    """Characters need none; what does says which command installs it."""
    (cwd / "stub").mkdir()
    (cwd / "stub/tokenizers.py").write_text("raise ImportError")
    missing = {"env": {"PYTHONPATH": str(cwd / "stub")}, "cwd": cwd}
    said = "this tokenizer needs the tokenizers library, which is not installed: pip install -e '.[bpe]'"
    assert "best val loss" in train(cwd, "--max-iters=1", "--out=run", env=missing["env"]).stdout
    run("sample.py", "--model=run", "--max-new-tokens=2", **missing)
    for command in (
        ["train.py", *TINY, "--tokenizer=bpe"],
        ["sample.py", "--model", trained / "bpe"],
        ["train.py", "--resume", "--out", trained / "file"],
    ):
        assert_complaint(run(*command, status=2, **missing).stderr, said, command[0])


def test_where_a_file_lies_is_kept(cwd):
    assert located("a.json") == str(cwd / "a.json")
    assert located("bpe") == "bpe"
    assert isinstance(make_tokenizer("byte", ""), ByteTokenizer)
