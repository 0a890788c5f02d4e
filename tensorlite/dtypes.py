"""Which dtypes a tensor may have, and the one in which operands of different dtypes meet: PyTorch's rule.

    a number or a list       takes the dtype of the array it meets, or its own kind's default where that kind is higher
    an array without axes    the same, but it brings its own dtype where its kind is higher
    arrays with axes         the highest kind decides, and within a kind the wider dtype

The kinds, from low to high: booleans, integers, floats. Functions of real numbers take integers as float32.
"""

import functools

import numpy as np

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
BOOLEAN, INTEGER, FLOAT = range(3)
DEFAULTS = np.dtype(bool), np.dtype(np.int64), FLOAT32  # of each kind
_WIDTHS = {"bfloat16": 0, "float32": 1, "float64": 2}


class _Kinds(dict):
    """dtype -> its kind, for the dtypes a tensor may have. Every op asks, so the answers are kept."""

    def __missing__(self, dtype) -> int:
        if dtype.kind in "fc" and dtype.name not in _WIDTHS:
            raise TypeError(f"expected float32 or float64, or bfloat16 on a GPU, got {dtype}: convert it first")
        if dtype.kind not in "biu" and dtype.name not in _WIDTHS:
            raise TypeError(f"expected numbers, got data of type {dtype}")
        self[dtype] = kind = {"b": BOOLEAN, "i": INTEGER, "u": INTEGER}.get(dtype.kind, FLOAT)
        return kind


KINDS = _Kinds()


def known(dtype) -> np.dtype:
    """`dtype` as one that a tensor may have, in the machine's byte order; TypeError if there is none."""
    if dtype is None:  # which NumPy takes for float64
        raise TypeError("expected a dtype, got None")
    dtype = np.dtype(dtype).newbyteorder("=")
    KINDS[dtype]  # noqa: B018 - it refuses
    return np.dtype(dtype.type)  # NumPy's own one of that name, which ops recognise by identity


def known_float(dtype) -> np.dtype:
    """As `known`, for an op that takes floating-point dtypes alone."""
    if dtype is not None and np.dtype(dtype).name not in _WIDTHS:
        raise TypeError(f"expected a floating-point dtype, got {np.dtype(dtype)}: float32, float64 or bfloat16")
    return known(dtype)


@functools.cache
def _wider(a: np.dtype, b: np.dtype) -> np.dtype:
    if KINDS[a] != KINDS[b]:
        return max(a, b, key=KINDS.__getitem__)
    if KINDS[a] == FLOAT:
        return max(a, b, key=lambda dtype: _WIDTHS[dtype.name])
    dtype = np.result_type(a, b)
    if KINDS[dtype] == FLOAT:
        raise TypeError(f"no integers hold both {a} and {b}: convert one of them first")
    return dtype


def common(arrays, kinds=()) -> np.dtype:
    """The dtype in which `arrays` meet, and numbers and lists of these `kinds` among them."""
    dtype = None
    for axes in (True, False):
        dtypes = [a.dtype for a in arrays if (a.ndim > 0) is axes]
        group = functools.reduce(_wider, dtypes) if dtypes else None
        if dtype is None or (group is not None and KINDS[group] > KINDS[dtype]):
            dtype = group
    kind = max(kinds, default=BOOLEAN)
    return DEFAULTS[kind] if dtype is None or kind > KINDS[dtype] else dtype
