"""docs/examples/reverse.py: its gradients are right, padding changes nothing, nothing looks ahead, and it learns; the
lesson about it quotes it as it is."""

import ast
import itertools
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
from examples import reverse
from examples.reverse import PAD, SHAPE, EncoderDecoder, loss_on, to_ids
from outputs import BLOCK
from scripts import ROOT, assert_complaint, run
from threadpoolctl import threadpool_limits
from tolerances import assert_close

SCRIPT, PAGE = "docs/examples/reverse.py", ROOT / "docs/lessons/14-encoder-decoder.md"
PICTURE = ROOT / "docs/img/cross-attention.svg"


@pytest.fixture(autouse=True)
def one_core():
    """For BLAS, as the script has it."""
    with threadpool_limits(1, user_api="blas"):
        yield


@pytest.fixture
def model() -> EncoderDecoder:
    """Small, not trained, in float64."""
    return EncoderDecoder(replace(SHAPE, n_embd=8)).to(dtype="float64")


def test_the_gradients_of_the_whole_are_right(gradcheck):
    tiny = EncoderDecoder(replace(SHAPE, vocab_size=5, block_size=3, n_embd=3))
    gradcheck(loss_on, tiny, ["a", "ab"])


@pytest.mark.parametrize("pad", [0.0, 1000.0])
def test_padding_changes_nothing(model, pad):
    model.symbols.weight.data[PAD] = pad
    source, written = to_ids(["cat>", "elephant>"]), to_ids(["<tac", "<tnahpele"])
    assert (source[0, 4:] == PAD).all()
    assert_close(model(source, written).data[0, :4], model(source[:1, :4], written[:1, :4]).data[0])


def test_padding_gets_no_gradient(model):
    loss_on(model, ["cat", "elephant"]).backward()
    nonzero = model.symbols.weight.grad.any(axis=1)
    assert {reverse.SYMBOLS[i] for i in np.flatnonzero(nonzero)} == set("<>catelephant")


def test_words_of_one_batch_are_reversed_as_they_are_alone(model):
    words = ["cat", "elephant", "a", "horse"]
    assert reverse.reverse(model, words) == [reverse.reverse(model, [word])[0] for word in words]


def test_the_decoder_sees_no_symbol_that_is_to_come_and_all_of_the_source(model):
    source, written = to_ids(["elephant>"]), to_ids(["<tnahpele"])
    before = model(source, written).data
    for t in range(1, written.shape[1]):
        other = written.copy()
        other[0, t] = to_ids(["z"]).item()
        changed = (model(source, other).data != before).any(axis=-1)[0]
        assert not changed[:t].any()
        assert changed[t:].all()
    for s in range(source.shape[1]):
        other = source.copy()
        other[0, s] = to_ids(["z"]).item()
        assert (model(other, written).data != before).any(axis=-1).all()


def test_it_learns(capsys):
    model = EncoderDecoder(replace(SHAPE, n_embd=32))
    words = ["backwards", "cat", "elephant"]
    before = loss_on(model, words).item()
    seen = reverse.train(model, 100)
    assert before == pytest.approx(np.log(SHAPE.vocab_size), abs=0.5)
    assert loss_on(model, words).item() < 0.8 * before
    assert not seen & set(words)
    assert capsys.readouterr().out.startswith("step 100: loss ")


@pytest.mark.parametrize(
    ("text", "right", "of"),
    [("tac", 4, 4), ("", 0, 4), ("ta", 2, 4), ("tack", 3, 5), ("cat", 2, 4)],
)
def test_score(text, right, of):
    assert reverse.score([text, "tac"], ["cat", "cat"]) == (right + 4) / (of + 4)


def test_the_script_draws_what_it_is_asked_for(cwd, monkeypatch, capsys):
    monkeypatch.setattr(reverse, "FRESH", 20)
    for name in ("a.svg", "b.svg"):
        monkeypatch.setattr(sys, "argv", [SCRIPT, "--steps=1", f"--picture={name}"])
        assert reverse.main() == 0
    assert (cwd / "a.svg").read_bytes() == (cwd / "b.svg").read_bytes()
    assert re.search(r"^20 words never seen: \d+\.\d\d% of the symbols right$", capsys.readouterr().out, re.MULTILINE)


def test_the_weights_that_are_drawn_are_those_of_the_decoder(model):
    text, weights = reverse.looks(model, "cat")
    memory, mask = model.encode(to_ids(["cat>"]))
    block, y = model.decoder, model.embed(to_ids(["<" + text[:-1]]), model.write_places)
    y = block.ln_2(y + block.attn(block.ln_1(y)))
    expected = block.cross(y, memory, mask).data[0]
    assert_close(block.cross.out(weights @ block.cross.value(memory).data[0]).data, expected)


def test_the_share_on_the_anti_diagonal(monkeypatch):
    weights = {"cat": ("tac>", np.eye(4)[[2, 1, 0, 3]]), "no": ("o", np.array([[0.25, 0.5, 0.25]]))}
    monkeypatch.setattr(reverse, "looks", lambda model, word: weights[word])
    assert reverse.looks_right(None, ["cat", "no"]) == (3 + 0.5) / 4


def test_the_picture_in_the_docs_has_the_anti_diagonal():
    """In each row of a letter the largest weight is one column further left, and in the last row it is at the end."""
    svg = PICTURE.read_text(encoding="utf-8")
    columns = [float(x) for x, w in re.findall(r' x="([\d.]+)"[^>]*>([01]\.\d\d)</text>', svg) if float(w) > 0.5]
    end, letters = columns[-1], columns[:-1]
    assert len(letters) == len("backwards")
    np.testing.assert_allclose(np.diff(letters), letters[0] - end, rtol=1e-4)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--steps=0"], "--steps must be at least 1, got 0"),
        (["--picture=a.png"], "--picture must end in .svg, got a.png"),
        (["--picture=none/a.svg"], "there is no folder none for the picture"),
        (["--picture=a.svg"], "the picture needs the matplotlib library, which is not installed"),
    ],
)
def test_wrong_options_are_told_before_the_training(cwd, args, said):
    result = run(SCRIPT, *args, cwd=cwd, status=2)
    assert result.stdout == ""
    assert_complaint(result.stderr, said, "reverse.py")


def test_what_the_lesson_quotes_is_in_the_script():
    """Of its blocks that print nothing each statement, with its comments."""
    source = (ROOT / SCRIPT).read_text(encoding="utf-8")
    quotes = [code for code, shown in BLOCK.findall(PAGE.read_text(encoding="utf-8")) if not shown]
    assert "class DecoderBlock" in "".join(quotes)
    for quote in quotes:
        lines, ends = quote.splitlines(), [node.end_lineno for node in ast.parse(quote).body]
        for start, end in itertools.pairwise([0, *ends]):
            assert "\n".join(lines[start:end]).lstrip("\n") + "\n" in source
