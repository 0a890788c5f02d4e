"""Reductions over any axes."""

import math

from tensorlite.backends import backend_of
from tensorlite.ops.operands import data, normalize_axes
from tensorlite.tensor import Tensor, record


def sum(x, axis=None, keepdims: bool = False) -> Tensor:  # noqa: A001 - the field's name
    """The sum over `axis` (None for all, an int or a tuple).  gx = gy, spread over the summed axes."""
    x_data = data(x)
    axes = normalize_axes(axis, x_data.ndim, "sum")
    spread = _spreader(x_data, axes)

    def vjp(gy):
        return (spread(gy),)

    return record(x_data.sum(axis=axes, keepdims=keepdims), (x,), vjp)


def mean(x, axis=None, keepdims: bool = False) -> Tensor:
    """The mean over `axis`.  gx = gy / n."""
    x_data = data(x)
    axes = normalize_axes(axis, x_data.ndim, "mean")
    n = math.prod(x_data.shape[a] for a in axes)
    if n == 0:
        raise ValueError(f"mean: nothing to average in shape {x_data.shape} over axes {axes}")
    spread = _spreader(x_data, axes)

    def vjp(gy):
        return (spread(gy * (1.0 / n)),)

    return record(x_data.mean(axis=axes, keepdims=keepdims), (x,), vjp)


def max(x, axis=None, keepdims: bool = False) -> Tensor:  # noqa: A001 - the field's name
    """The maximum over `axis`.  gx = gy, shared equally among the elements that attain it."""
    x_data = data(x)
    axes = normalize_axes(axis, x_data.ndim, "max")
    if math.prod(x_data.shape[a] for a in axes) == 0:
        raise ValueError(f"max: nothing to compare in shape {x_data.shape} over axes {axes}")
    y = x_data.max(axis=axes, keepdims=True)
    spread = _spreader(x_data, axes)

    def vjp(gy):
        winners = (x_data == y).astype(gy.dtype)
        return (spread(gy) * winners / winners.sum(axis=axes, keepdims=True),)

    return record(y if keepdims else y.squeeze(axes), (x,), vjp)


def _spreader(x, axes):
    """A function that repeats a gradient along the axes that were reduced, as a view of x's shape."""
    xp, shape = backend_of(x).xp, x.shape
    kept = tuple(1 if a in axes else n for a, n in enumerate(shape))
    return lambda gy: xp.broadcast_to(gy.reshape(kept), shape)
