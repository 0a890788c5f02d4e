"""Ops that move elements without changing them."""

from tensorlite.backends import backend_of
from tensorlite.ops.operands import align, data, normalize_axes
from tensorlite.tensor import Tensor, record


def reshape(x, *shape) -> Tensor:
    """The same elements in another shape; one length may be -1. `reshape(x, 2, 3)` or `reshape(x, (2, 3))`."""
    if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
        shape = tuple(shape[0])
    x_data = data(x, "reshape")
    try:
        y = x_data.reshape(shape)
    except ValueError:
        raise ValueError(f"reshape: {x_data.size} elements of shape {x_data.shape} do not fit shape {shape}") from None
    x_shape = x_data.shape
    return record(y, (x,), lambda gy: (gy.reshape(x_shape),))


def permute(x, *axes) -> Tensor:
    """The axes in another order: `permute(x, 0, 2, 1)` or `permute(x, (0, 2, 1))`."""
    if len(axes) == 1 and isinstance(axes[0], (tuple, list)):
        axes = tuple(axes[0])
    x_data = data(x, "permute")
    axes = normalize_axes(axes, x_data.ndim, "permute")
    if len(axes) != x_data.ndim:
        raise ValueError(f"permute: all {x_data.ndim} axes must be named once, got {axes}")
    back = tuple(sorted(range(len(axes)), key=axes.__getitem__))
    return record(x_data.transpose(axes), (x,), lambda gy: (gy.transpose(back),))


def transpose(x, axis0: int = -2, axis1: int = -1) -> Tensor:
    """Two axes exchanged, by default the last two."""
    x_data = data(x, "transpose")
    for axis in (axis0, axis1):
        normalize_axes(axis, x_data.ndim, "transpose")
    return record(x_data.swapaxes(axis0, axis1), (x,), lambda gy: (gy.swapaxes(axis0, axis1),))


def getitem(x, index) -> Tensor:
    """x[index] with NumPy's basic and advanced indexing.  gx is gy at the index and 0 elsewhere, summed where an
    element is named more than once."""
    x_data = data(x, "getitem")
    be = backend_of(x_data)
    parts = tuple(_index_part(be, i) for i in (index if isinstance(index, tuple) else (index,)))
    basic = all(i is None or i is Ellipsis or isinstance(i, int | slice) for i in parts)
    shape, dtype = x_data.shape, x_data.dtype
    try:
        y = x_data[parts]
    except IndexError as error:
        raise IndexError(f"getitem: {error} (the tensor has shape {shape})") from None

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
        raise TypeError(f"getitem: Python's {i} is no index: a mask is an array of booleans, as of a comparison")
    if isinstance(i, Tensor):
        i = i.data
    if isinstance(i, list):
        return be.asarray(i, None if i else int)
    return i.copy() if isinstance(i, be.xp.ndarray) else i


def concatenate(tensors, axis: int = 0) -> Tensor:
    """The tensors one after the other along an existing axis.  Each gets its slice of gy."""
    tensors = tuple(tensors)
    if not tensors:
        raise ValueError("concatenate: needs at least one tensor")
    arrays = [data(a, "concatenate") for a in align(tensors, "concatenate")]
    be = backend_of(*arrays, op="concatenate")
    (axis,) = normalize_axes((axis,), arrays[0].ndim, "concatenate")
    try:
        y = be.xp.concatenate(arrays, axis=axis)
    except ValueError:
        shapes = ", ".join(str(a.shape) for a in arrays)
        raise ValueError(f"concatenate: shapes {shapes} differ outside axis {axis}") from None
    spans = _spans([a.shape[axis] for a in arrays])

    def vjp(gy):
        return tuple(gy[_along(axis, span)] for span in spans)

    return record(y, tensors, vjp)


def split(x, sizes, axis: int = 0) -> list[Tensor]:
    """Cut x along an axis into pieces of size `sizes` (an int, the last may be smaller, or a list of all sizes)."""
    x_data = data(x, "split")
    (axis,) = normalize_axes((axis,), x_data.ndim, "split")
    n = x_data.shape[axis]
    if isinstance(sizes, int):
        if sizes < 1:
            raise ValueError(f"split: the size of a piece must be at least 1, got {sizes}")
        sizes = [min(sizes, n - start) for start in range(0, max(1, n), sizes)]
    if min(sizes, default=0) < 0 or sum(sizes) != n:
        raise ValueError(f"split: sizes {list(sizes)} do not add up to {n}, the length of axis {axis}")
    return [getitem(x, _along(axis, span)) for span in _spans(sizes)]


def _spans(sizes):
    start, spans = 0, []
    for size in sizes:
        spans.append(slice(start, start + size))
        start += size
    return spans


def _along(axis: int, span: slice) -> tuple:
    return (slice(None),) * axis + (span,)
