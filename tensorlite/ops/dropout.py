"""Dropout (Srivastava et al. 2014), alone and with the sum of a residual connection."""

import math

from tensorlite import random
from tensorlite.backends import backend_of
from tensorlite.ops.elementwise import add
from tensorlite.ops.operands import data, number, real_data
from tensorlite.tensor import Tensor, record
from tensorlite.words import explained


@explained
def dropout(x, p: float = 0.5, training: bool = True) -> Tensor:
    """Zero each element with probability p and scale the others by 1 / (1 - p).  gx = gy * mask / (1 - p).

    Where nothing is to be dropped, the result is x itself. The mask is a function of the current `random.scope` and of
    how many draws were made in it before.
    """
    if not 0.0 <= number(p, "p") <= 1.0:
        raise ValueError(f"p must be from 0 to 1, got {p}")
    x_data = real_data(x)
    if not training or p == 0.0:
        return x if isinstance(x, Tensor) and x.data is x_data else Tensor(x_data)
    be = backend_of(x_data)
    y, keep, scale = be.draw_dropout(x_data, next_place(x_data.shape), p)
    return record(y, (x,), lambda gy: (be.dropout(gy, keep, scale),))


@explained
def add_dropout(x, branch, p: float = 0.5, training: bool = True) -> Tensor:
    """x + dropout(branch, p, training), in one pass if they share shape and dtype.  gx = gy, gbranch = dropout's."""
    x_data, b = data(x), data(branch)
    if not training or p == 0.0 or x_data.shape != b.shape or x_data.dtype != b.dtype:
        return add(x, dropout(branch, p, training))
    be = backend_of(x_data, b)
    y, keep, scale = be.draw_dropout(b, next_place(b.shape), p, x_data)
    return record(y, (x, branch), lambda gy: (gy, be.dropout(gy, keep, scale)))


def next_place(shape: tuple[int, ...]) -> random.Place:
    """Where in the current scope the next mask of this shape is drawn."""
    return random.current().next_place(math.prod(shape[1:]))
