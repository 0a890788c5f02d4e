"""What every op does first: take the arrays out of its inputs, in the dtype they meet in, and say clearly what is wrong
with them. `tensorlite.dtypes` holds the rule; the op's decorator, `tensorlite.words.explained`, adds the op's name.
"""

from operator import index

import numpy as np

from tensorlite.backends import as_array, backend_of
from tensorlite.dtypes import BOOLEAN, FLOAT, FLOAT32, FLOAT64, INTEGER, KINDS, common
from tensorlite.tensor import Tensor

_NUMBER_KINDS = {bool: BOOLEAN, int: INTEGER, float: FLOAT}
_USUAL = FLOAT32, FLOAT64  # a Python number leaves arrays of these as they are; one of bfloat16 it would widen


def data(x):
    """The bare array of a Tensor; numbers and lists as arrays."""
    return x.data if isinstance(x, Tensor) else as_array(x)


def real_data(x):
    """As `data`, for a function of real numbers: integers and booleans become float32."""
    array = x.data if isinstance(x, Tensor) else as_array(x)
    return array if array.dtype in _USUAL or KINDS[array.dtype] == FLOAT else array.astype(FLOAT32)


def pair(a, b, real: bool = False):
    """The arrays of two operands in the dtype they meet in, which must be on one device; a Python number stays one
    where the array it meets keeps its dtype. real: integers become float32."""
    if isinstance(a, Tensor):
        x = a.data
        if isinstance(b, Tensor):
            y = b.data
            same = x.dtype is y.dtype or x.dtype == y.dtype  # not identical in arrays that were unpickled
            if same and type(x) is type(y) and (not real or KINDS[x.dtype] == FLOAT):
                return x, y
        elif type(b) in _NUMBER_KINDS and x.dtype in _USUAL:
            return x, b
    elif type(a) in _NUMBER_KINDS and isinstance(b, Tensor) and b.data.dtype in _USUAL:
        return a, b.data
    return align((a, b), real)


def align(operands, real: bool = False) -> list:
    """As `pair`, for any number of operands; lists come to the device of the arrays."""
    values, arrays, kinds = [], [], [FLOAT] if real else []
    for x in operands:
        x = x.data if isinstance(x, Tensor) else x
        if isinstance(x, np.generic):
            x = x.item()
        if type(x) in _NUMBER_KINDS:
            kinds.append(_NUMBER_KINDS[type(x)])
        elif isinstance(x, list | tuple):
            kinds.append(KINDS[as_array(x).dtype])
        else:
            x = as_array(x)
            arrays.append(x)
        values.append(x)
    dtype = common(arrays, kinds)
    be = backend_of(*arrays)

    def in_dtype(x):
        if isinstance(x, list | tuple):
            return be.asarray(x, dtype)
        if type(x) in _NUMBER_KINDS:
            return x if arrays and dtype.name != "bfloat16" else be.xp.full((), x, dtype)
        return x if x.dtype == dtype else x.astype(dtype)

    return [in_dtype(x) for x in values]


def factors(a, b):
    """The arrays of the two operands of a product: `of_one_dtype` for two, quicker."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        x, y = a.data, b.data
        if type(x) is type(y) and (x.dtype is y.dtype or x.dtype == y.dtype):
            return x, y
    return of_one_dtype(("a", "b"), a, b)


def of_one_dtype(names: tuple[str, ...], *operands, optional=(), real: bool = False, mixed: bool = False):
    """A list of the arrays of the operands of a product or a layer, which must share a device and one floating-point
    dtype. Integers take the dtype of the floats beside them.

    optional: names of operands that may be None, which stays. real: where all are integers, they become float32.
    mixed: float32 goes with a first operand in bfloat16.
    """
    arrays, dtype = [], None
    for x in operands:
        if x is not None or names[len(arrays)] not in optional:
            x = x.data if isinstance(x, Tensor) else data(x)
            if dtype is None:
                dtype = x.dtype
            elif x.dtype is not dtype and x.dtype != dtype:
                return _settle(names, operands, real, mixed)
        arrays.append(x)
    backend_of(*arrays)
    return [a if a is None else a.astype(FLOAT32) for a in arrays] if real and KINDS[dtype] != FLOAT else arrays


def _settle(names: tuple[str, ...], operands, real: bool, mixed: bool) -> list:
    """What `of_one_dtype` makes of operands of several dtypes."""
    strict = {n: data(x).dtype for n, x in zip(names, operands, strict=True) if x is not None and not _is_weak(x)}
    floats = {str(dtype) for dtype in strict.values() if KINDS[dtype] == FLOAT}
    if mixed and floats == {"bfloat16", "float32"} and data(operands[0]).dtype.name == "bfloat16":
        arrays = [None if x is None else data(x) for x in operands]
        backend_of(*arrays)
        return arrays
    if len(floats) > 1:
        what = ", ".join(f"{name} is {dtype}" for name, dtype in strict.items())
        raise TypeError(f"{what}; a product or layer takes one floating-point dtype: use cast, or Module.to")
    settled = iter(align([x for x in operands if x is not None], real))
    return [None if x is None else data(next(settled)) for x in operands]


def _is_weak(x) -> bool:
    """Whether x takes the dtype of what it meets: a number, or a list."""
    return isinstance(x, list | tuple | np.generic) or type(x) in _NUMBER_KINDS


def ids_of(x):
    """The integer array in x, which holds token ids or class numbers."""
    ids = data(x)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"expected integers, got {ids.dtype}")
    return ids


def normalize_axes(axis, ndim: int, lenient: bool = False) -> tuple[int, ...]:
    """`axis` (None, an int or a tuple, possibly negative) as a tuple of distinct axes in [0, ndim).

    lenient: what has no axes may be asked for its axis 0 or -1, as in NumPy and PyTorch.
    """
    if type(axis) is int and -ndim <= axis < ndim:  # most often, and quicker
        return (axis % ndim,)
    axes = range(ndim) if axis is None else axis if isinstance(axis, (tuple, list)) else (axis,)
    try:
        axes = [index(a) for a in axes]
    except TypeError:
        raise TypeError(f"axis must be None, an int or a tuple of ints, got {axis!r}") from None
    if lenient and ndim == 0 and axes in ([0], [-1]):
        return ()
    for a in axes:
        if not -ndim <= a < ndim:
            raise ValueError(f"axis {a} is out of range for a tensor of {ndim} axes")
    axes = tuple(a % ndim for a in axes)
    if len(set(axes)) != len(axes):
        raise ValueError(f"an axis is named twice in {axis}")
    return axes


def one_axis(axis, ndim: int) -> int | None:
    """The axis in [0, ndim); None is that of a tensor that has none."""
    if type(axis) is int and -ndim <= axis < ndim:
        return axis % ndim
    if not hasattr(axis, "__index__"):
        raise TypeError(f"axis must be an int, got {axis!r}")
    axes = normalize_axes(axis, ndim, lenient=True)
    return axes[0] if axes else None


def integers(values) -> tuple[int, ...]:
    """The integers of a shape or of axes, given one by one or as a tuple or list."""
    given = values[0] if len(values) == 1 and isinstance(values[0], (tuple, list)) else values
    try:
        return tuple(index(n) for n in given)
    except TypeError:
        raise TypeError(f"expected integers, got {', '.join(map(repr, given))}") from None


def lengths(values) -> tuple[int, ...]:
    """The `integers` of a shape that is to be made."""
    shape = integers(values)
    if min(shape, default=0) < 0:
        raise ValueError(f"lengths must be 0 or more, got {shape}")
    return shape


def number(x, what: str) -> float | int:
    """A setting that has to be a number, and no array of several."""
    if not isinstance(x, int | float | np.number) or isinstance(x, np.complexfloating):
        raise TypeError(f"{what} must be a number, got {x!r}")
    return x


def named(op: str, vjp):
    """The vjp under the name of the op that it belongs to, where several ops share the function that defines it."""
    vjp.__qualname__ = f"{op}.<locals>.vjp"
    return vjp


def along(axis: int, part) -> tuple:
    """The index that takes `part` of an axis and all of those before and after it."""
    return (slice(None),) * axis + (part,)


def mask_of(x, what: str):
    """The array of booleans in x. Python's True and False are none: what came of a comparison that compared nothing."""
    mask = None if isinstance(x, bool) else data(x)
    if mask is None or mask.dtype.kind != "b":
        got = mask.dtype if mask is not None else f"Python's {x}"
        raise TypeError(f"the {what} must be an array of booleans, got {got}")
    return mask
