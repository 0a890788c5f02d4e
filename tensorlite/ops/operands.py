"""What every op does first: take the arrays out of its inputs, and say clearly what is wrong with them."""

from tensorlite.backends import as_array, backend_of
from tensorlite.tensor import Tensor


def data(x):
    """The bare array of a Tensor; None, Python numbers and arrays as they are; lists as arrays."""
    if isinstance(x, Tensor):
        return x.data
    if x is None or isinstance(x, int | float):
        return x  # a Python number takes the dtype of the array it meets
    return as_array(x)


def pair(a, b, op: str):
    """The arrays of two operands, which must be on one device."""
    x, y = data(a), data(b)
    if type(x) is not type(y):
        backend_of(x, y, op=op)
    return x, y


def broadcast_error(op: str, x, y) -> ValueError:
    """Why an element-wise op on x and y failed: wrong shapes."""
    shapes = " and ".join(str(getattr(a, "shape", ())) for a in (x, y))
    return ValueError(f"{op}: shapes {shapes} do not broadcast")


def ids_of(x, op: str):
    """The integer array in x, which holds token ids or class numbers."""
    ids = data(x)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"{op}: expected integers, got {ids.dtype}")
    return ids


def normalize_axes(axis, ndim: int, op: str) -> tuple[int, ...]:
    """`axis` (None, an int or a tuple, possibly negative) as a tuple of distinct axes in [0, ndim)."""
    axes = tuple(range(ndim)) if axis is None else (axis,) if isinstance(axis, int) else tuple(axis)
    for a in axes:
        if not -ndim <= a < ndim:
            raise ValueError(f"{op}: axis {a} is out of range for a tensor of {ndim} axes")
    axes = tuple(a % ndim for a in axes)
    if len(set(axes)) != len(axes):
        raise ValueError(f"{op}: an axis is named twice in {axis}")
    return axes
