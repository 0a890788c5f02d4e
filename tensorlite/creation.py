"""Tensors out of nothing, and of copies. A shape is given as numbers or as one tuple: `zeros(2, 3)`, `zeros((2, 3))`.

dtype: float32 by default, int64 for an `arange` of integers, its own for a `tensor`.
requires_grad: make it a leaf that receives `.grad`.
backend: "numpy" or "cupy", whose device it is on.
"""

import numpy as np

from tensorlite import random
from tensorlite.backends import as_array, backend_of, get_backend
from tensorlite.dtypes import FLOAT32, known, known_float
from tensorlite.ops.operands import lengths, number
from tensorlite.tensor import Tensor
from tensorlite.words import explained


@explained
def tensor(data, *, dtype=None, requires_grad: bool = False, backend: str | None = None) -> Tensor:
    """A tensor of a copy of `data`, where `Tensor(data)` shares an array; on its device unless `backend` names one."""
    array = as_array(data.data if isinstance(data, Tensor) else data, dtype)
    copied = get_backend(backend).asarray(backend_of(array).to_numpy(array)) if backend else array
    return Tensor(copied.copy() if copied is array else copied, requires_grad)


@explained
def zeros(*shape, dtype=FLOAT32, requires_grad: bool = False, backend: str = "numpy") -> Tensor:
    """All elements 0."""
    array = get_backend(backend).xp.zeros(lengths(shape), known(dtype))
    return Tensor(array, requires_grad)


@explained
def ones(*shape, dtype=FLOAT32, requires_grad: bool = False, backend: str = "numpy") -> Tensor:
    """All elements 1."""
    array = get_backend(backend).xp.ones(lengths(shape), known(dtype))
    return Tensor(array, requires_grad)


@explained
def randn(*shape, dtype=FLOAT32, requires_grad: bool = False, backend: str = "numpy") -> Tensor:
    """Draws from the normal distribution of mean 0 and variance 1: a function of the current `random.scope`, or of
    `manual_seed`, and of how many draws were made in it before; on the host, so that every backend has the same."""
    drawn = random.next_generator().standard_normal(lengths(shape), np.float32)
    return Tensor(get_backend(backend).asarray(drawn, known_float(dtype)), requires_grad)


@explained
def arange(start, stop=None, step=1, *, dtype=None, requires_grad: bool = False, backend: str = "numpy") -> Tensor:
    """start, start + step, ... up to but without `stop`; with one number those from 0 to below it."""
    start, stop = (0, start) if stop is None else (start, stop)
    for name, value in (("start", start), ("stop", stop), ("step", step)):
        number(value, name)
    if not step:
        raise ValueError("the step must not be 0")
    array = np.arange(start, stop, step)
    default = FLOAT32 if array.dtype.kind == "f" else np.int64
    return Tensor(get_backend(backend).asarray(array, known(dtype or default)), requires_grad)
