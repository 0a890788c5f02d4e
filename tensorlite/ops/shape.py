"""Ops that move elements without changing them."""

import math

from tensorlite.backends import backend_of
from tensorlite.ops.operands import align, along, data, integers, named, normalize_axes, one_axis
from tensorlite.tensor import Tensor, record
from tensorlite.words import explained


@explained
def reshape(x, *shape) -> Tensor:
    """The same elements in another shape; one length may be -1.  gx = gy in x's shape.

    `reshape(x, 2, 3)` or `reshape(x, (2, 3))`.
    """
    if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
        shape = tuple(shape[0])
    x_data = data(x)
    try:
        y = x_data.reshape(shape)
    except (ValueError, TypeError):
        shape = integers(shape)
        raise ValueError(f"{x_data.size} elements of shape {x_data.shape} do not fit shape {shape}") from None
    x_shape = x_data.shape
    return record(y, (x,), lambda gy: (gy.reshape(x_shape),))


@explained
def flatten(x, start_axis: int = 0, end_axis: int = -1) -> Tensor:
    """The axes from `start_axis` to `end_axis`, both included, as one."""
    shape = data(x).shape
    first, last = (one_axis(axis, len(shape)) for axis in (start_axis, end_axis))
    if first is None:
        return reshape(x, 1)
    if first > last:
        raise ValueError(f"axis {start_axis} comes after axis {end_axis} in shape {shape}")
    return reshape(x, *shape[:first], math.prod(shape[first : last + 1]), *shape[last + 1 :])


@explained
def squeeze(x, axis=None) -> Tensor:
    """x without its axes of length 1, or without those of them that `axis` names, an int or a tuple."""
    shape = data(x).shape
    axes = normalize_axes(axis, len(shape), lenient=True)
    return reshape(x, *[n for a, n in enumerate(shape) if n != 1 or a not in axes])


@explained
def expand_dims(x, axis: int) -> Tensor:
    """x with a new axis of length 1 at the place `axis` of the result. PyTorch's unsqueeze."""
    shape = data(x).shape
    (axis,) = normalize_axes(axis, len(shape) + 1)
    return reshape(x, *shape[:axis], 1, *shape[axis:])


@explained
def broadcast_to(x, *shape) -> Tensor:
    """x repeated along axes of length 1, and new ones before the first, to this shape: a view.  gx = gy, summed over
    them."""
    x_data, shape = data(x), integers(shape)
    try:
        y = backend_of(x_data).xp.broadcast_to(x_data, shape)
    except ValueError:
        raise ValueError(f"shape {x_data.shape} does not broadcast to {shape}") from None
    return record(y, (x,), lambda gy: (gy,))


@explained
def permute(x, *axes) -> Tensor:
    """The axes in another order: `permute(x, 0, 2, 1)` or `permute(x, (0, 2, 1))`.  gx = gy with them put back."""
    x_data = data(x)
    axes = normalize_axes(integers(axes), x_data.ndim)
    if len(axes) != x_data.ndim:
        raise ValueError(f"all {x_data.ndim} axes must be named once, got {axes}")
    back = tuple(sorted(range(len(axes)), key=axes.__getitem__))
    return record(x_data.transpose(axes), (x,), lambda gy: (gy.transpose(back),))


@explained
def transpose(x, axis0: int = -2, axis1: int = -1) -> Tensor:
    """Two axes exchanged, by default the last two.  gx = gy with the same two exchanged."""
    x_data = data(x)
    for axis in (axis0, axis1):
        if isinstance(axis, (tuple, list)):
            raise TypeError(f"expected two axes to exchange, got {axis}; permute puts all in another order")
        normalize_axes(axis, x_data.ndim)
    return record(x_data.swapaxes(axis0, axis1), (x,), lambda gy: (gy.swapaxes(axis0, axis1),))


@explained
def tril(x, diagonal: int = 0) -> Tensor:
    """The lower triangle of the last two axes, 0 above the diagonal; a positive `diagonal` keeps that many more.

    gx = the same of gy.
    """
    return _triangle(x, diagonal, "tril")


@explained
def triu(x, diagonal: int = 0) -> Tensor:
    """The upper triangle of the last two axes, 0 below the diagonal; a positive `diagonal` leaves that many more out.

    gx = the same of gy.
    """
    return _triangle(x, diagonal, "triu")


def _triangle(x, diagonal: int, op: str) -> Tensor:
    x_data, (diagonal,) = data(x), integers((diagonal,))
    if x_data.ndim < 2:
        raise ValueError(f"expected a matrix, or several (..., M, N), got shape {x_data.shape}")
    part = getattr(backend_of(x_data).xp, op)
    return record(part(x_data, diagonal), (x,), named(op, lambda gy: (part(gy, diagonal),)))


@explained
def getitem(x, index) -> Tensor:
    """x[index] with NumPy's basic and advanced indexing.  gx = gy at the index and 0 elsewhere, summed where an element
    is named more than once."""
    x_data = data(x)
    be = backend_of(x_data)
    parts = tuple(_index_part(be, i) for i in (index if isinstance(index, tuple) else (index,)))
    basic = all(i is None or i is Ellipsis or isinstance(i, int | slice) for i in parts)
    shape, dtype = x_data.shape, x_data.dtype
    try:
        y = x_data[parts]
    except IndexError as error:
        raise IndexError(f"{error} (the tensor has shape {shape})") from None

    def vjp(gy):
        gx = be.xp.zeros(shape, dtype)
        if basic:
            gx[parts] = gy
        else:
            be.index_add(gx, parts, gy)
        return (gx,)

    return record(y, (x,), vjp)


def _index_part(be, i):
    """One index as the backend takes it; arrays as they are now, whatever is written into them before the backward."""
    if isinstance(i, bool):
        raise TypeError(f"Python's {i} is no index: a mask is an array of booleans, as of a comparison")
    if isinstance(i, Tensor):
        i = i.data
    if isinstance(i, list):
        return be.asarray(i, None if i else int)
    return i.copy() if isinstance(i, be.xp.ndarray) else i


@explained
def concatenate(tensors, axis: int = 0) -> Tensor:
    """The tensors one after the other along an existing axis; one without axes counts as (1,).  gx = its slice
    of gy."""
    be, tensors, arrays = _several(tensors)
    arrays = [a if a.ndim else a.reshape(1) for a in arrays]
    (axis,) = normalize_axes(axis, arrays[0].ndim)
    try:
        y = be.xp.concatenate(arrays, axis=axis)
    except ValueError:
        shapes = ", ".join(str(a.shape) for a in arrays)
        raise ValueError(f"shapes {shapes} differ outside axis {axis}") from None
    spans = _spans([a.shape[axis] for a in arrays])

    def vjp(gy):
        return tuple(gy[along(axis, span)] for span in spans)

    return record(y, tensors, vjp)


@explained
def stack(tensors, axis: int = 0) -> Tensor:
    """Tensors of one shape beside each other along a new axis, at the place `axis` of the result.  gx = its part of
    gy."""
    be, tensors, arrays = _several(tensors)
    if len({a.shape for a in arrays}) > 1:
        raise ValueError(f"expected one shape, got {', '.join(str(a.shape) for a in arrays)}")
    (axis,) = normalize_axes(axis, arrays[0].ndim + 1)

    def vjp(gy):
        return tuple(gy[along(axis, i)] for i in range(len(arrays)))

    return record(be.xp.stack(arrays, axis), tensors, vjp)


def _several(tensors):
    """The backend, what is given as a sequence, and the arrays in it in the dtype in which they meet."""
    if not hasattr(tensors, "__iter__"):
        raise TypeError(f"expected a list or tuple of tensors, got {type(tensors).__name__}")
    tensors = tuple(tensors)
    if not tensors:
        raise ValueError("needs at least one tensor")
    arrays = align(tensors)
    be = backend_of(*[a for a in arrays if hasattr(a, "dtype")])
    dtype = next(a.dtype for a in arrays if hasattr(a, "dtype"))
    return be, tensors, [be.asarray(a, dtype) for a in arrays]


@explained
def split(x, sizes, axis: int = 0) -> list[Tensor]:
    """Cut x along an axis into pieces of size `sizes` (an int, the last may be smaller, or a list of all sizes)."""
    x_data = data(x)
    (axis,) = normalize_axes(axis, x_data.ndim)
    n = x_data.shape[axis]
    if hasattr(sizes, "__index__"):
        if sizes < 1:
            raise ValueError(f"the size of a piece must be at least 1, got {sizes}")
        sizes = [min(sizes, n - start) for start in range(0, max(1, n), sizes)]
    sizes = integers(sizes)
    if min(sizes, default=0) < 0 or sum(sizes) != n:
        raise ValueError(f"sizes {list(sizes)} do not add up to {n}, the length of axis {axis}")
    return [getitem(x, along(axis, span)) for span in _spans(sizes)]


def _spans(sizes):
    start, spans = 0, []
    for size in sizes:
        spans.append(slice(start, start + size))
        start += size
    return spans
