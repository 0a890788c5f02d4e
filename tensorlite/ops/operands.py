"""What every op does first: take the arrays out of its inputs, and say clearly what is wrong with them."""

from operator import index

from tensorlite.backends import as_array, backend_of
from tensorlite.tensor import Tensor


def data(x):
    """The bare array of a Tensor; numbers and lists as arrays; None as it is."""
    if isinstance(x, Tensor):
        return x.data
    return None if x is None else as_array(x)


def is_number(x) -> bool:
    return isinstance(x, (int, float))


def constant(x):
    """As `data`, but a Python number stays one: it takes the dtype of the array it meets."""
    return x if is_number(x) else data(x)


def pair(a, b, op: str):
    """The arrays of two operands, which must be on one device."""
    x = a.data if isinstance(a, Tensor) else constant(a)
    y = b.data if isinstance(b, Tensor) else constant(b)
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
    axes = range(ndim) if axis is None else axis if isinstance(axis, (tuple, list)) else (axis,)
    try:
        axes = [index(a) for a in axes]
    except TypeError:
        raise TypeError(f"{op}: axis must be None, an int or a tuple of ints, got {axis!r}") from None
    for a in axes:
        if not -ndim <= a < ndim:
            raise ValueError(f"{op}: axis {a} is out of range for a tensor of {ndim} axes")
    axes = tuple(a % ndim for a in axes)
    if len(set(axes)) != len(axes):
        raise ValueError(f"{op}: an axis is named twice in {axis}")
    return axes
