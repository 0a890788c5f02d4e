"""Reductions over any axes, and sums along one. Of a tensor without axes, axis 0 or -1 is all there is."""

import math

from tensorlite.backends import backend_of
from tensorlite.ops.operands import along, data, named, normalize_axes, number, one_axis, real_data
from tensorlite.tensor import Tensor, record
from tensorlite.words import explained


@explained
def sum(x, axis=None, keepdims: bool = False) -> Tensor:  # noqa: A001 - the field's name
    """The sum over `axis` (None for all, an int or a tuple).  gx = gy, spread over the summed axes."""
    x_data = data(x)
    axes = normalize_axes(axis, x_data.ndim, lenient=True)
    spread = _spreader(x_data, axes)

    def vjp(gy):
        return (spread(gy),)

    return record(backend_of(x_data).sum(x_data, axes, keepdims), (x,), vjp)


@explained
def mean(x, axis=None, keepdims: bool = False) -> Tensor:
    """The mean over `axis`; of nothing it is NaN.  gx = gy / n."""
    x_data = real_data(x)
    axes = normalize_axes(axis, x_data.ndim, lenient=True)
    n = _count(x_data, axes)
    spread = _spreader(x_data, axes)

    def vjp(gy):
        return (spread(gy * (1.0 / (n or math.nan))),)

    total = backend_of(x_data).sum(x_data, axes, keepdims)
    return record((total / (n or math.nan)).astype(x_data.dtype, copy=False), (x,), vjp)


@explained
def var(x, axis=None, correction: float = 1, keepdims: bool = False) -> Tensor:
    """The variance over `axis`: sum((x - mean)^2) / (n - correction), 1 as in PyTorch, where NumPy's default is 0. NaN
    where that would divide by nothing.  gx = gy * 2 (x - mean) / (n - correction).
    """
    x_data = real_data(x)
    axes = normalize_axes(axis, x_data.ndim, lenient=True)
    y, deviation, scale = _variance(x_data, axes, correction)
    spread = _spreader(x_data, axes)

    def vjp(gy):
        return (spread(gy * (2.0 * scale)) * deviation,)

    return record(y if keepdims else y.squeeze(axes), (x,), vjp)


@explained
def std(x, axis=None, correction: float = 1, keepdims: bool = False) -> Tensor:
    """The standard deviation, the square root of `var`.  gx = gy * (x - mean) / ((n - correction) y), 0 where y is."""
    x_data = real_data(x)
    axes = normalize_axes(axis, x_data.ndim, lenient=True)
    squares, deviation, scale = _variance(x_data, axes, correction)
    y = backend_of(x_data).xp.sqrt(squares)
    spread = _spreader(x_data, axes)

    def vjp(gy):
        return (spread(gy) * (deviation * (scale / (y + (y == 0)))),)

    return record(y if keepdims else y.squeeze(axes), (x,), vjp)


def _variance(x, axes, correction: float):
    """The variance with its axes kept, x - mean, and 1 / (n - correction)."""
    be, n, correction = backend_of(x), _count(x, axes), number(correction, "correction")
    # Counted from the first element: exact where the numbers are near each other, however far from 0.
    deviation = x - x[tuple(slice(1) if a in axes else slice(None) for a in range(x.ndim))] if n else x
    deviation = deviation - be.sum(deviation, axes, keepdims=True) * (1.0 / (n or math.nan))
    scale = 1.0 / (n - correction) if n > correction else math.nan
    squares = be.sum(deviation * deviation, axes, keepdims=True) * scale
    return squares.astype(x.dtype, copy=False), deviation, scale


@explained
def max(x, axis=None, keepdims: bool = False) -> Tensor:  # noqa: A001 - the field's name
    """The maximum over `axis`.  gx = gy, shared equally among the elements that attain it."""
    return _extreme(x, axis, keepdims, "max")


@explained
def min(x, axis=None, keepdims: bool = False) -> Tensor:  # noqa: A001 - the field's name
    """The minimum over `axis`.  gx = gy, shared equally among the elements that attain it."""
    return _extreme(x, axis, keepdims, "min")


def _extreme(x, axis, keepdims: bool, op: str) -> Tensor:
    x_data = data(x)
    axes = normalize_axes(axis, x_data.ndim, lenient=True)
    if _count(x_data, axes) == 0:
        raise ValueError(f"nothing to compare in shape {x_data.shape} over axes {axes}")
    be = backend_of(x_data)
    y = getattr(x_data, op)(axis=axes, keepdims=True)
    spread = _spreader(x_data, axes)

    def vjp(gy):
        winners = (x_data == y) | (x_data != x_data)  # a NaN is the maximum, or the minimum, where there is one
        shares = spread(gy) / winners.sum(axis=axes, keepdims=True).astype(gy.dtype)
        return (be.select(shares, winners),)

    return record(y if keepdims else y.squeeze(axes), (x,), named(op, vjp))


@explained
def argmax(x, axis: int | None = None, keepdims: bool = False) -> Tensor:
    """Where the maximum is along `axis`, or in the flattened x: int64, the first of several. It has no gradient."""
    x_data = data(x)
    axis = axis if axis is None else one_axis(axis, x_data.ndim)
    if _count(x_data, range(x_data.ndim) if axis is None else (axis,)) == 0:
        raise ValueError(f"nothing to compare in shape {x_data.shape} over axis {axis}")
    return record(x_data.argmax(axis=axis, keepdims=keepdims), (), None)


@explained
def cumsum(x, axis: int) -> Tensor:
    """The sum of the elements up to each one along `axis`.  gx = the same of gy, from the other end."""
    x_data = data(x)
    axis = one_axis(axis, x_data.ndim)
    if axis is None:
        return sum(x)
    be, backwards = backend_of(x_data), along(axis, slice(None, None, -1))

    def vjp(gy):
        return (be.cumsum(gy[backwards], axis)[backwards],)

    return record(be.cumsum(x_data, axis), (x,), vjp)


def _count(x, axes) -> int:
    """How many elements come together in each one of the result."""
    return math.prod(x.shape[a] for a in axes)


def _spreader(x, axes):
    """A function that repeats a gradient along the axes that were reduced, as a view of x's shape."""
    xp, shape = backend_of(x).xp, x.shape
    kept = tuple(1 if a in axes else n for a, n in enumerate(shape))
    return lambda gy: xp.broadcast_to(gy.reshape(kept), shape)
