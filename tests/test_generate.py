"""Sampling: what is drawn, from which context, and that the model is left as it was."""

import math
import re
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from tolerances import assert_close
from torch_gpt import TorchGPT

import tensorlite as tl
from gpt import GPT, BigramLanguageModel, GPTConfig
from gpt.generate import Piece, _Ending, default_prompt, generate, sample_tokens, stream_pieces, stream_text
from gpt.models.language_model import LanguageModel
from gpt.text.tokenizers import ByteTokenizer, CharTokenizer
from tensorlite import Tensor

CONFIG = GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=16, dropout=0.5, tie_weights=False)
PROMPT = np.array([[1, 2, 3], [4, 5, 6]])


def lively_gpt(**options) -> GPT:
    """A GPT whose guesses depend on the context: its initial matrices, twenty times as large."""
    model = GPT(replace(CONFIG, **options), seed=3)
    for p in model.parameters():
        p.data *= 20 if p.ndim == 2 else 1
    return model


def bigram(probs) -> BigramLanguageModel:
    """A table whose every row holds these probabilities."""
    model = BigramLanguageModel(len(probs))
    model.token_table.data[...] = np.log(probs)
    return model


class Watched(BigramLanguageModel):
    """Notes what it is called with."""

    def __init__(self):
        super().__init__(11, block_size=4)
        self.calls = []

    def next_logits(self, idx):
        self.calls.append((idx.copy(), self.training, tl.needs_grad(self.token_table)))
        return super().next_logits(idx)


class Scripted(LanguageModel):
    """Says the bytes of `script`, whatever it is asked; each sequence of a batch is another byte ahead."""

    vocab_size, block_size = 256, 4

    def __init__(self, script: bytes):
        self.script, self.said = script, 0

    def next_logits(self, idx):
        at = self.said + np.arange(len(idx))
        self.said += 1
        return np.eye(256)[np.frombuffer(self.script, dtype=np.uint8)[at % len(self.script)]]


# block size, length of the prompt, and how many tokens each new token is drawn from
CONTEXTS = [
    (8, 3, [3, 4, 5, 6, 7, 8, 4, 5, 6, 7, 8, 4, 5]),
    (8, 8, [8, 4, 5, 6, 7, 8, 4]),
    (8, 12, [8, 4, 5, 6, 7, 8, 4]),
    (5, 1, [1, 2, 3, 4, 5, 2, 3, 4, 5, 2]),
    (2, 3, [2, 1, 2, 1, 2]),
    (1, 2, [1, 1, 1]),
]
every_way = pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])


# --- which token ---


@every_way
@pytest.mark.parametrize(("block_size", "length", "contexts"), CONTEXTS)
def test_temperature_zero_takes_the_likeliest(block_size, length, contexts, use_cache):
    model = lively_gpt(block_size=block_size).eval()
    expected = prompt = np.random.default_rng(0).integers(0, 11, (16, length))
    for size in contexts:
        logits, _ = model(expected[:, -size:])
        expected = np.concatenate([expected, logits.numpy()[:, -1:].argmax(axis=-1)], axis=1)
    assert len(np.unique(expected[:, length:])) > 1, "a dull model shows nothing"
    text = model.generate(prompt, len(contexts), temperature=0.0, use_cache=use_cache)
    np.testing.assert_array_equal(text, expected)


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({"top_k": 1}, {"temperature": 0.0}),
        ({"top_p": 1e-9}, {"temperature": 0.0}),
        ({"temperature": 1e-6}, {"temperature": 0.0}),
        ({"temperature": 5e-324}, {"temperature": 0.0}),
        ({"temperature": 0.0, "top_k": 3, "top_p": 0.5, "seed": 9}, {"temperature": 0.0}),
        ({"top_k": 11}, {}),
        ({"top_k": 1000}, {}),
        ({"top_p": 1.0}, {}),
    ],
    ids=str,
)
def test_options_at_their_ends(options, same):
    model = lively_gpt()
    np.testing.assert_array_equal(model.generate(PROMPT, 30, **options), model.generate(PROMPT, 30, **same))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.1, 0.4, 0.05, 0.3, 0.15]),
        ({"temperature": 0.5}, [0.01 / 0.285, 0.16 / 0.285, 0.0025 / 0.285, 0.09 / 0.285, 0.0225 / 0.285]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"top_k": 4}, [0.1 / 0.95, 0.4 / 0.95, 0, 0.3 / 0.95, 0.15 / 0.95]),
        ({"top_p": 0.39}, [0, 1, 0, 0, 0]),
        ({"top_p": 0.41}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"top_p": 0.71}, [0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85]),
        ({"top_k": 3, "top_p": 0.8}, [0, 4 / 7, 0, 3 / 7, 0]),  # top_p counts among the top k: 0.7 / 0.85 > 0.8
        ({"temperature": 0.5, "top_p": 0.5}, [0, 1, 0, 0, 0]),  # and after the temperature: 0.16 / 0.285 > 0.5
    ],
    ids=str,
)
def test_frequencies_are_the_probabilities(options, expected):
    model, expected = bigram([0.1, 0.4, 0.05, 0.3, 0.15]), np.array(expected)
    drawn = model.generate(np.zeros((500, 1), int), 40, seed=3, **options)[:, 1:]
    frequencies = np.bincount(drawn.ravel(), minlength=5) / drawn.size
    sigma = np.sqrt(expected * (1 - expected) / drawn.size)
    assert (np.abs(frequencies - expected) <= 5 * sigma).all(), frequencies


def test_a_token_that_cannot_be_is_never_drawn():
    model = bigram([0.5, 0.5, 0.5])
    model.token_table.data[:, 1] = -np.inf
    for options in ({}, {"temperature": 1e-320}, {"top_k": 2}, {"top_p": 0.9}):
        assert 1 not in model.generate(np.zeros((100, 1), int), 10, **options)


def test_text_is_a_function_of_the_seed():
    model = lively_gpt()
    text = model.generate(PROMPT, 20, seed=1)
    np.testing.assert_array_equal(text, model.generate(PROMPT, 20, seed=1))
    np.testing.assert_array_equal(text[:, :13], model.generate(PROMPT, 10, seed=1))  # of the position, not the length
    np.testing.assert_array_equal(text[:1], model.generate(PROMPT[:1], 20, seed=1))  # and of the row, not the others
    for row, other in zip(text, model.generate(PROMPT, 20, seed=2), strict=True):
        assert (row != other).any()
    same = model.generate(PROMPT[[0, 0]], 20, seed=1)
    assert (same[0] != same[1]).any()  # samples of one prompt differ


# --- what goes in and out ---


@pytest.mark.parametrize("kind", [np.asarray, np.ndarray.tolist, Tensor, np.int32, np.uint8])
def test_shape_and_dtype(kind):
    model = lively_gpt()
    text = model.generate(kind(PROMPT), 5)
    assert (text.shape, text.dtype) == ((2, 8), np.int64)
    np.testing.assert_array_equal(text[:, :3], PROMPT)
    np.testing.assert_array_equal(text, model.generate(PROMPT, 5))
    nothing = model.generate(kind(PROMPT), 0)
    assert nothing.dtype == np.int64
    np.testing.assert_array_equal(nothing, PROMPT)


def test_context_is_cut_to_its_newest_half_when_it_outgrows_the_block():
    model = Watched()
    text = generate(model, np.arange(12).reshape(2, 6) % 11, 8)
    assert len(model.calls) == 8
    for i, (size, (context, training, recorded)) in enumerate(zip([4, 2, 3, 4, 2, 3, 4, 2], model.calls, strict=True)):
        np.testing.assert_array_equal(context, text[:, 6 + i - size : 6 + i])
        assert not training
        assert not recorded


@pytest.mark.parametrize("training", [True, False])
def test_model_is_left_as_it_was(training):
    model = lively_gpt().train(training)
    tokens = sample_tokens(model, PROMPT, 10)
    for _ in range(3):
        next(tokens)
        assert all(module.training == training for module in model.modules())
        assert all(tl.needs_grad(p) for p in model.parameters())
    tokens.close()
    with pytest.raises(IndexError, match="id 99"):
        model.generate([[99]], 1)
    assert all(module.training == training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_dropout_is_off_while_sampling():
    model = lively_gpt()
    np.testing.assert_array_equal(model.generate(PROMPT, 20), model.eval().generate(PROMPT, 20))


@pytest.mark.parametrize(
    ("idx", "options", "message"),
    [
        (PROMPT, {"temperature": -0.1}, "temperature must be 0 or more, got -0.1"),
        (PROMPT, {"temperature": math.nan}, "temperature must be 0 or more, got nan"),
        (PROMPT, {"top_k": 0}, "top_k must be at least 1, got 0"),
        (PROMPT, {"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        (PROMPT, {"top_p": 1.1}, "top_p must be above 0 and at most 1, got 1.1"),
        (PROMPT, {"top_p": math.nan}, "top_p must be above 0 and at most 1, got nan"),
        (PROMPT[0], {}, r"expected integers of shape \(B, T\), T at least 1, got int64 \(3,\)"),
        (PROMPT[:, :0], {}, r"got int64 \(2, 0\)"),
        (PROMPT * 1.0, {}, r"got float64 \(2, 3\)"),
        (PROMPT > 2, {}, r"got bool \(2, 3\)"),
    ],
)
def test_what_cannot_be_is_explained(idx, options, message):
    with pytest.raises(ValueError, match=f"generate: .*{message}"):
        lively_gpt().generate(idx, 1, **options)


# --- the key/value cache ---

SHAPES = {
    "tied": {"tie_weights": True},
    "untied": {},
    "no biases": {"bias": False, "activation": "gelu", "tie_weights": True},
    "lecture": {"activation": "relu", "qkv_bias": False, "head_bias": True, "n_head": 1},
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_cached_scores_are_the_models(shape, dtype):
    model = GPT(replace(CONFIG, **shape), seed=3).to(dtype=dtype).eval()
    for B, pieces in ((1, [1] * 8), (3, [5, 1, 1, 1]), (2, [8]), (2, [3, 4, 1])):
        idx = np.random.default_rng(B).integers(0, 11, (B, 8))
        expected = model(idx)[0].numpy()
        cached, read = model.cached(B), 0
        for size in pieces * 2:
            if read == 8:
                cached.length = read = 0
            got = cached(idx[:, read : read + size])
            read += size
            assert_close(got, expected[:, read - 1], f"{pieces}, {read} tokens")


@pytest.mark.parametrize("shape", [{}, {"tie_weights": True}], ids=["untied", "tied"])
@pytest.mark.parametrize("block_size", [1, 2, 5, 8])
def test_cache_changes_no_token(block_size, shape):
    model = lively_gpt(block_size=block_size, **shape).to(dtype=np.float64)
    for B in (1, 3):
        for length in {1, block_size - 1, block_size, block_size + 3} - {0}:
            prompt = np.random.default_rng(length).integers(0, 11, (B, length))
            for options in ({"temperature": 0.0}, {"seed": 5}):
                text = model.generate(prompt, 2 * block_size + 2, **options)
                without = model.generate(prompt, 2 * block_size + 2, **options, use_cache=False)
                np.testing.assert_array_equal(text, without)


@pytest.mark.parametrize("block_size", [1, 5, 8])
def test_pytorch_with_a_cache_takes_the_same_tokens(block_size):
    config = replace(CONFIG, block_size=block_size)
    reference = TorchGPT(config).double().eval()
    model = GPT(config).to(dtype=np.float64)
    model.load_state_dict({name: weight.numpy() for name, weight in reference.state_dict().items()})
    prompt = np.random.default_rng(0).integers(0, 11, (4, 6))
    expected = torch.cat(list(islice(reference.sample_tokens(torch.tensor(prompt), greedy=True), 20)), dim=1)
    assert len(expected.unique()) > 2, "a dull model shows nothing"
    np.testing.assert_array_equal(model.generate(prompt, 20, temperature=0.0)[:, 6:], expected)


def test_new_weights_mean_new_text():
    model = lively_gpt()
    before = model.generate(PROMPT, 20)
    for p in model.parameters():
        p.data[...] = p.data[..., ::-1]
    after = model.generate(PROMPT, 20)
    assert (before != after).any()
    np.testing.assert_array_equal(after, model.generate(PROMPT, 20, use_cache=False))


@pytest.mark.parametrize(
    ("read", "shape"), [(0, (2, 9)), (6, (2, 3)), (8, (2, 1)), (3, (2, 0)), (0, (1, 3)), (3, (4, 1))], ids=str
)
def test_what_a_cache_cannot_read_is_explained(read, shape):
    cached = lively_gpt().cached(2)
    if read:
        cached(np.zeros((2, read), int))
    message = f"CachedGPT: expected ids of shape (2, T) with {read} + T at most 8, T at least 1, got {shape}"
    with pytest.raises(ValueError, match=re.escape(message)):
        cached(np.zeros(shape, int))
    assert cached.length == read


# --- text ---


def test_stream_gives_whole_characters_that_join_to_the_text():
    text = "né 😀!"
    script = text.encode()
    pieces = list(stream_text(Scripted(script), ByteTokenizer(), "é", len(script), temperature=0.0))
    assert [piece for (piece,) in pieces] == ["n", "", "é", " ", "", "", "", "😀", "!", ""]


def test_stream_keeps_samples_apart_and_gives_what_is_cut_short():
    script = "a😀".encode()
    pieces = list(stream_text(Scripted(script), ByteTokenizer(), "?", 7, num_samples=2, temperature=0.0))
    assert ["".join(sample) for sample in zip(*pieces, strict=True)] == ["a😀a\udcf0", "😀a\udcf0\udc9f"]


def test_stream_draws_what_generate_draws():
    model, tokenizer = lively_gpt(), CharTokenizer("abcdefghijk")
    pieces = list(stream_text(model, tokenizer, "bad", 20, num_samples=2, top_k=5, seed=4))
    expected = generate(model, np.tile(tokenizer.encode("bad"), (2, 1)), 20, top_k=5, seed=4)
    for sample, tokens in zip(zip(*pieces, strict=True), expected, strict=True):
        assert "bad" + "".join(sample) == tokenizer.decode(tokens)


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [(CharTokenizer.from_text("b\na"), "\n"), (CharTokenizer.from_text("ba"), "a"), (ByteTokenizer(), "\n")],
)
def test_default_prompt(tokenizer, expected):
    assert default_prompt(tokenizer) == expected


# --- what was likely, and where to stop ---


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 2, "temperature": 3.0}])
def test_a_piece_knows_how_likely_its_token_was_to_the_model(options):
    probs = {"a": 0.5, "b": 0.25, "c": 0.125, "d": 0.125}
    model, tokenizer = bigram(list(probs.values())), CharTokenizer("abcd")
    pieces = [*stream_pieces(model, tokenizer, "a", 40, 2, probabilities=True, **options)]
    made = [piece for samples in pieces[:-1] for sample in samples for piece in sample]
    assert [piece.probability for piece in made] == pytest.approx([probs[piece.text] for piece in made], rel=1e-6)
    assert len(made) == 80


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("script", "stop", "expected"), [
    ("abcabd", ["abd"], "abc"),
    ("aaab", ["aab"], "a"),
    ("abab", ["abac", "b"], "a"),
    ("ab", ["abc"], "ab"),  # only begun: shown in the end
    ("xé日y", ["日"], "xé"),
    ("xé日y", ["é", "x"], ""),
])  # fmt: skip
def test_what_may_begin_a_stop_is_held_back(script, stop, expected, size):
    """Whatever the pieces are in which the text comes."""
    ending, shown = _Ending(stop), ""
    parts = [script[i : i + size] for i in range(0, len(script), size)]
    for part in parts:
        shown += "".join(piece.text for piece in ending(Piece(part)))
        assert expected.startswith(shown)
    shown += "".join(piece.text for piece in ending(Piece(""), final=True))
    assert shown == expected


def test_a_stop_spans_tokens_and_ends_the_work():
    model = Scripted("xé日y and more".encode())
    pieces = [*stream_text(model, ByteTokenizer(), "-", 15, stop=["日y"], temperature=0)]
    assert "".join(text for (text,) in pieces) == "xé"
    assert model.said == len("xé日y".encode())
