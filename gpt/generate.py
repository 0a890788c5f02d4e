"""Sampling: one token at a time from a model's next-token scores."""

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
) -> Iterator[np.ndarray]:
    """Continue the sequences idx (B, T), yielding the next token of each, (B,), as it is made.

    temperature: divides the logits; 0 takes the likeliest token always.
    top_k: draw only from the k likeliest tokens.
    top_p: draw only from the likeliest tokens that together reach this probability.
    seed: the draws are a function of it and of the position alone.
    """
    if not temperature >= 0:
        raise ValueError(f"generate: the temperature must be 0 or more, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p must be above 0 and at most 1, got {top_p}")
    context = _context(idx)[:, -model.block_size :]
    was_training = model.training
    for step in range(max_new_tokens):
        try:
            with no_grad():
                logits = model.eval().next_logits(context)
        finally:
            model.train(was_training)
        if temperature == 0:
            tokens = logits.argmax(axis=1)
        else:
            probs = _probabilities(logits.astype(np.float64), temperature, top_k, top_p)
            tokens = _draw(probs, random.generator(seed, random.SAMPLING, step).random(len(probs)))
        yield tokens
        context = np.concatenate([context, tokens[:, None]], axis=1)[:, -model.block_size :]


def stream_text(
    model, tokenizer, prompt: str, max_new_tokens: int, num_samples: int = 1, **options
) -> Iterator[list[str]]:
    """Continue `prompt` num_samples times; yields the new text of each as it is made, most often one character.

    A multi-byte character comes when it is complete. The options are those of `sample_tokens`.
    """
    decoders = [tokenizer.stream_decoder() for _ in range(num_samples)]
    idx = np.tile(tokenizer.encode(prompt), (num_samples, 1))
    for tokens in sample_tokens(model, idx, max_new_tokens, **options):
        yield [decode(token[None]) for decode, token in zip(decoders, tokens, strict=True)]
    yield [decode([], final=True) for decode in decoders]


def default_prompt(tokenizer) -> str:
    """What to start from if nothing is given: a new line, or the vocabulary's first symbol where there is none."""
    try:
        tokenizer.encode("\n")
    except UserError:
        return tokenizer.decode([0])
    return "\n"


def _context(idx) -> np.ndarray:
    """idx as a host array (B, T) of at least one token each."""
    idx = idx.numpy() if isinstance(idx, Tensor) else np.asarray(idx)
    if idx.ndim != 2 or not idx.shape[1] or idx.dtype.kind not in "iu":
        raise ValueError(f"generate: expected integers of shape (B, T), T at least 1, got {idx.dtype} {idx.shape}")
    return idx.astype(np.int64)


def _probabilities(logits, temperature, top_k, top_p):
    """(B, V) float64 logits -> probabilities, zero for tokens outside the top k or the top p."""
    with np.errstate(over="ignore"):  # near temperature 0 all but the likeliest may fall to -inf
        logits = (logits - logits.max(axis=1, keepdims=True)) / temperature
    if top_k is not None and top_k < logits.shape[1]:
        kth = np.partition(logits, -top_k, axis=1)[:, -top_k, None]
        logits = np.where(logits < kth, -np.inf, logits)
    probs = np.exp(logits)
    probs /= probs.sum(axis=1, keepdims=True)
    if top_p is not None and top_p < 1:
        order = np.argsort(-probs, axis=1, kind="stable")
        ranked = np.take_along_axis(probs, order, axis=1)
        ranked[np.cumsum(ranked, axis=1) - ranked >= top_p] = 0  # what came before already reaches top_p
        np.put_along_axis(probs, order, ranked, axis=1)
        probs /= probs.sum(axis=1, keepdims=True)
    return probs


def _draw(probs, uniform):
    """The token at which each row's cumulative probability passes its uniform number."""
    cumulative = probs.cumsum(axis=1)
    chosen = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(axis=1)
    return np.minimum(chosen, probs.shape[1] - 1)
