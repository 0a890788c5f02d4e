"""Reductions over any axes."""

import math

from tensorlite.backends import backend_of
from tensorlite.ops.operands import data, normalize_axes, real_data
from tensorlite.tensor import Tensor, record


def sum(x, axis=None, keepdims: bool = False) -> Tensor:  # noqa: A001 - the field's name
    """The sum over `axis` (None for all, an int or a tuple).  gx = gy, spread over the summed axes."""
    x_data = data(x, "sum")
    axes = normalize_axes(axis, x_data.ndim, "sum")
    spread = _spreader(x_data, axes)

    def vjp(gy):
        return (spread(gy),)

    return record(backend_of(x_data).sum(x_data, axes, keepdims), (x,), vjp)


def mean(x, axis=None, keepdims: bool = False) -> Tensor:
    """The mean over `axis`; of nothing it is NaN.  gx = gy / n."""
    x_data = real_data(x, "mean")
    axes = normalize_axes(axis, x_data.ndim, "mean")
    n = math.prod(x_data.shape[a] for a in axes)
    spread = _spreader(x_data, axes)

    def vjp(gy):
        return (spread(gy * (1.0 / (n or math.nan))),)

    total = backend_of(x_data).sum(x_data, axes, keepdims)
    return record((total / (n or math.nan)).astype(x_data.dtype, copy=False), (x,), vjp)


def max(x, axis=None, keepdims: bool = False) -> Tensor:  # noqa: A001 - the field's name
    """The maximum over `axis`.  gx = gy, shared equally among the elements that attain it."""
    x_data = data(x, "max")
    axes = normalize_axes(axis, x_data.ndim, "max")
    if math.prod(x_data.shape[a] for a in axes) == 0:
        raise ValueError(f"max: nothing to compare in shape {x_data.shape} over axes {axes}")
    be = backend_of(x_data)
    y = x_data.max(axis=axes, keepdims=True)
    spread = _spreader(x_data, axes)

    def vjp(gy):
        winners = (x_data == y) | (x_data != x_data)  # a NaN is the maximum where there is one
        shares = spread(gy) / winners.sum(axis=axes, keepdims=True).astype(gy.dtype)
        return (be.select(shares, winners),)

    return record(y if keepdims else y.squeeze(axes), (x,), vjp)


def _spreader(x, axes):
    """A function that repeats a gradient along the axes that were reduced, as a view of x's shape."""
    xp, shape = backend_of(x).xp, x.shape
    kept = tuple(1 if a in axes else n for a, n in enumerate(shape))
    return lambda gy: xp.broadcast_to(gy.reshape(kept), shape)
