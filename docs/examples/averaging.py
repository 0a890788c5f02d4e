"""The mean of the past, in three ways that give the same numbers, and what attention makes of the third."""

import math

import tensorlite as tl


def by_loop(x):
    """x (B, T, C) -> (B, T, C): position t gets the mean of positions 0 to t."""
    means = [x[:, : t + 1].mean(axis=1) for t in range(x.shape[1])]  # T of (B, C)
    return tl.stack(means, axis=1)


def by_matrix(x):
    """The same as one product: row t of the weights holds 1 / (t + 1) up to t, and 0 after it."""
    T = x.shape[1]
    weights = tl.tril(tl.ones(T, T, dtype=x.dtype))
    weights = weights / weights.sum(axis=1, keepdims=True)
    return weights @ x  # (T, T) @ (B, T, C)


def by_softmax(x):
    """The same once more: the softmax of scores that are 0 for the past, and minus infinity for what comes later."""
    T = x.shape[1]
    return tl.softmax(without_future(tl.zeros(T, T, dtype=x.dtype))) @ x


def attention(q, k, v):
    """No longer the same: the scores are not 0 but what query t and key s make of each other. (B, T, D) each."""
    scores = q @ k.transpose() / math.sqrt(q.shape[-1])  # (B, T, T)
    return tl.softmax(without_future(scores)) @ v


def without_future(scores):
    """scores (..., T, T) with minus infinity wherever column s is later than row t."""
    T = scores.shape[-1]
    later = tl.triu(tl.ones(T, T), 1) > 0
    return tl.masked_fill(scores, later, -math.inf)
