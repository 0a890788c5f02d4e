"""Sampling: one token at a time from a model's next-token scores."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gpt.errors import UserError
from tensorlite import Tensor, no_grad, random


def generate(model, ids, max_new_tokens: int, **options) -> np.ndarray:
    """ids (B, T) and what `sample_tokens` adds to it: integers (B, T + max_new_tokens)."""
    ids = _context(ids)
    new = list(sample_tokens(model, ids, max_new_tokens, **options))
    return np.concatenate([ids, *(tokens[:, None] for tokens in new)], axis=1)


def sample_tokens(model, ids, max_new_tokens: int, **options) -> Iterator[np.ndarray]:
    """Continue the sequences ids (B, T), yielding the next token of each, (B,), as it is made; options: see `draw`."""
    for new, _ in draw(model, ids, max_new_tokens, **options):
        yield new


def draw(
    model,
    ids,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    use_cache: bool = True,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Continue the sequences ids (B, T), yielding the next token of each, (B,), and the logits it was drawn by, (B, V).

    A token is drawn given its context, the tokens before it: at first the newest block_size of ids, to which each new
    token is added. A context that outgrows block_size is cut to its newest block_size // 2 tokens (at least 1), and
    grows again from there. A position counts from the start of the context, so a window that moved on by one each time
    would make all cached keys and values useless; this way only one token in block_size // 2 reads more than the last.

    temperature: divides the logits; 0 takes the likeliest token always.
    top_k: draw only from the k likeliest tokens.
    top_p: draw only from the likeliest tokens that together reach this probability.
    seed: the draws are a function of it, of the row and of the position alone.
    use_cache: keep the keys and values of the context. Without, it is read anew for each token: as good, but slower.
    """
    if not temperature >= 0:
        raise ValueError(f"generate: the temperature must be 0 or more, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p must be above 0 and at most 1, got {top_p}")
    context = _context(ids)[:, -model.block_size :]
    cached = model.cached(len(context)) if use_cache else None
    generators = [random.generator(seed, random.SAMPLING, call=row) for row in range(len(context))]
    for _ in range(max_new_tokens):
        if context.shape[1] > model.block_size:
            context = context[:, -max(model.block_size // 2, 1) :]
            if cached:
                cached.length = 0
        logits = cached(context[:, cached.length :]) if cached else _next_logits(model, context)
        if temperature == 0:
            new = logits.argmax(axis=1)
        else:
            weights = _weights(logits.astype(np.float64), temperature, top_k, top_p)
            new = _drawn(weights, [generator.random() for generator in generators])
        yield new, logits
        context = np.concatenate([context, new[:, None]], axis=1)


class Piece(NamedTuple):
    """New text, most often one character or a few, and how likely the model held the last token of it, if asked for."""

    text: str
    probability: float | None = None


def stream_pieces(
    model,
    tokenizer,
    prompt: str,
    max_new_tokens: int,
    num_samples: int = 1,
    stop: Sequence[str] = (),
    probabilities: bool = False,
    through: Callable[[Iterator], Iterator] = iter,
    **options,
) -> Iterator[list[list[Piece]]]:
    """Continue `prompt` num_samples times; yields the new pieces of each as they are made.

    A multi-byte character comes when it is complete. A sample ends before the first of the texts `stop` in it, which
    may span tokens: what may be the beginning of one is held back. The options are those of `draw`.
    through: what the draws pass on their way to the text, such as a generator that keeps them.
    """
    decoders = [tokenizer.stream_decoder() for _ in range(num_samples)]
    endings = [_Ending(stop) for _ in range(num_samples)]
    ids = np.tile(tokenizer.encode(prompt)[-model.block_size :], (num_samples, 1))
    for new, logits in through(draw(model, ids, max_new_tokens, **options)):
        texts = [decode(token[None]) for decode, token in zip(decoders, new, strict=True)]
        chances = _probabilities(logits, new) if probabilities else [None] * num_samples
        yield [ending(Piece(*piece)) for ending, *piece in zip(endings, texts, chances, strict=True)]
        if all(ending.found for ending in endings):
            return
    rest = [Piece(decode([], final=True)) for decode in decoders]
    yield [ending(piece, final=True) for ending, piece in zip(endings, rest, strict=True)]


def stream_text(*args, **options) -> Iterator[list[str]]:
    """The texts of `stream_pieces` alone."""
    for samples in stream_pieces(*args, **options):
        yield ["".join(piece.text for piece in pieces) for pieces in samples]


class _Ending:
    """ending(piece) -> the pieces that can be shown by now: none that may belong to one of the texts `stop`."""

    def __init__(self, stop: Sequence[str]):
        self.found, self._stop, self._held = False, stop, []

    def __call__(self, piece: Piece, final: bool = False) -> list[Piece]:
        if self.found:
            return []
        self._held.append(piece)
        text = "".join(held.text for held in self._held)
        ends = [text.index(stop) for stop in self._stop if stop in text]
        if ends:
            self.found = True
            return self._release(min(ends))
        begun = (n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return self._release(len(text) - (0 if final else max(begun, default=0)))

    def _release(self, length: int) -> list[Piece]:
        """The first `length` characters of what is held."""
        released = []
        while length and self._held:
            text, probability = self._held.pop(0)
            released.append(Piece(text[:length], probability))
            if text[length:]:
                self._held.insert(0, Piece(text[length:], probability))
            length -= len(released[-1].text)
        return released


def write_text(model, tokenizer, max_new_tokens: int, seed: int) -> str:
    """A sample of the model from the default prompt on."""
    prompt = default_prompt(tokenizer)
    return prompt + "".join(text for (text,) in stream_text(model, tokenizer, prompt, max_new_tokens, seed=seed))


def default_prompt(tokenizer) -> str:
    """What to start from if nothing is given: a new line, or the vocabulary's first symbol where there is none, and
    that can stand alone."""
    for text in itertools.chain(["\n"], (tokenizer.decode([token]) for token in range(tokenizer.vocab_size))):
        with contextlib.suppress(UserError):
            if len(tokenizer.encode(text)):
                return text
    raise UserError("the tokenizer has no token for any text: give a --prompt, or train with another")


def _context(ids) -> np.ndarray:
    """ids as a host array (B, T) of at least one token each."""
    ids = ids.numpy() if isinstance(ids, Tensor) else np.asarray(ids)
    if ids.ndim != 2 or not ids.shape[1] or ids.dtype.kind not in "iu":
        raise ValueError(f"generate: expected integers of shape (B, T), T at least 1, got {ids.dtype} {ids.shape}")
    return ids.astype(np.int64)


def _next_logits(model, context):
    """The model's in eval mode. It is left in the mode it was in, for whoever takes the tokens one at a time."""
    was_training = model.training
    try:
        with no_grad():
            return model.eval().next_logits(context)
    finally:
        model.train(was_training)


def _weights(logits, temperature, top_k, top_p):
    """(B, V) float64 logits -> what the probabilities are in proportion to, 0 for tokens outside the top k or top p."""
    with np.errstate(over="ignore"):  # near temperature 0 all but the likeliest may fall to -inf
        logits = (logits - logits.max(axis=1, keepdims=True)) / temperature
    if top_k is not None and top_k < logits.shape[1]:
        kth = np.partition(logits, -top_k, axis=1)[:, -top_k, None]
        logits = np.where(logits < kth, -np.inf, logits)
    weights = np.exp(logits)
    if top_p is not None and top_p < 1:
        weights /= weights.sum(axis=1, keepdims=True)
        order = np.argsort(-weights, axis=1, kind="stable")
        ranked = np.take_along_axis(weights, order, axis=1)
        ranked[np.cumsum(ranked, axis=1) - ranked >= top_p] = 0  # what came before already reaches top_p
        np.put_along_axis(weights, order, ranked, axis=1)
    return weights


def _probabilities(logits, ids):
    """What the model gives each token: logits (B, V), ids (B,) -> (B,)."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    chosen = np.take_along_axis(shifted, ids[:, None], axis=1)[:, 0]
    return np.exp(chosen - np.log(np.exp(shifted).sum(axis=1)))


def _drawn(weights, uniform):
    """The token at which each row's cumulative share of the weights passes its number in [0, 1)."""
    cumulative = weights.cumsum(axis=1)
    passed = cumulative[:, :-1] <= np.multiply(uniform, cumulative[:, -1])[:, None]
    return passed.sum(axis=1)
