"""Sampling: one token at a time from a model's next-token scores."""

import contextlib
import itertools
from collections.abc import Iterator

import numpy as np

from gpt.errors import UserError
from tensorlite import Tensor, no_grad, random


def generate(model, idx, max_new_tokens: int, **options) -> np.ndarray:
    """idx (B, T) and what `sample_tokens` adds to it: integers (B, T + max_new_tokens)."""
    idx = _context(idx)
    new = list(sample_tokens(model, idx, max_new_tokens, **options))
    return np.concatenate([idx, *(tokens[:, None] for tokens in new)], axis=1)


def sample_tokens(
    model,
    idx,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    use_cache: bool = True,
) -> Iterator[np.ndarray]:
    """Continue the sequences idx (B, T), yielding the next token of each, (B,), as it is made.

    A token is drawn given its context, the tokens before it: at first the newest block_size of idx, to which each new
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
    context = _context(idx)[:, -model.block_size :]
    cached = model.cached(len(context)) if use_cache else None
    generators = [random.generator(seed, random.SAMPLING, call=row) for row in range(len(context))]
    for _ in range(max_new_tokens):
        if context.shape[1] > model.block_size:
            context = context[:, -max(model.block_size // 2, 1) :]
            if cached:
                cached.length = 0
        logits = cached(context[:, cached.length :]) if cached else _next_logits(model, context)
        if temperature == 0:
            tokens = logits.argmax(axis=1)
        else:
            weights = _weights(logits.astype(np.float64), temperature, top_k, top_p)
            tokens = _draw(weights, [generator.random() for generator in generators])
        yield tokens
        context = np.concatenate([context, tokens[:, None]], axis=1)


def stream_text(
    model, tokenizer, prompt: str, max_new_tokens: int, num_samples: int = 1, **options
) -> Iterator[list[str]]:
    """Continue `prompt` num_samples times; yields the new text of each as it is made, most often one character.

    A multi-byte character comes when it is complete. The options are those of `sample_tokens`.
    """
    decoders = [tokenizer.stream_decoder() for _ in range(num_samples)]
    idx = np.tile(tokenizer.encode(prompt)[-model.block_size :], (num_samples, 1))
    for tokens in sample_tokens(model, idx, max_new_tokens, **options):
        yield [decode(token[None]) for decode, token in zip(decoders, tokens, strict=True)]
    yield [decode([], final=True) for decode in decoders]


def default_prompt(tokenizer) -> str:
    """What to start from if nothing is given: a new line, or the vocabulary's first symbol where there is none, and
    that can stand alone."""
    for text in itertools.chain(["\n"], (tokenizer.decode([token]) for token in range(tokenizer.vocab_size))):
        with contextlib.suppress(UserError):
            if len(tokenizer.encode(text)):
                return text
    raise UserError("the tokenizer has no token for any text: give a --prompt, or train with another")


def _context(idx) -> np.ndarray:
    """idx as a host array (B, T) of at least one token each."""
    idx = idx.numpy() if isinstance(idx, Tensor) else np.asarray(idx)
    if idx.ndim != 2 or not idx.shape[1] or idx.dtype.kind not in "iu":
        raise ValueError(f"generate: expected integers of shape (B, T), T at least 1, got {idx.dtype} {idx.shape}")
    return idx.astype(np.int64)


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


def _draw(weights, uniform):
    """The token at which each row's cumulative share of the weights passes its number in [0, 1)."""
    cumulative = weights.cumsum(axis=1)
    passed = cumulative[:, :-1] <= np.multiply(uniform, cumulative[:, -1])[:, None]
    return passed.sum(axis=1)
