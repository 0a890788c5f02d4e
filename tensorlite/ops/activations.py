"""What a network applies to its activations: the functions that bend them, and dropout."""

import math

from tensorlite import random
from tensorlite.backends import backend_of
from tensorlite.ops.elementwise import add
from tensorlite.ops.operands import data, number, real_data
from tensorlite.tensor import Tensor, needs_grad, record
from tensorlite.words import explained


@explained
def sigmoid(x) -> Tensor:
    """1 / (1 + e ** -x).  gx = gy * y * (1 - y)."""
    x_data = real_data(x)
    y = _logistic(x_data)
    return record(y, (x,), lambda gy: (gy * (y * (1.0 - y)),))


@explained
def silu(x) -> Tensor:
    """x * sigmoid(x), also known as swish (Elfwing et al. 2017).  gx = gy * (s + y * (1 - s)), s = sigmoid(x)."""
    x_data = real_data(x)
    s = _logistic(x_data)
    y = x_data * s
    return record(y, (x,), lambda gy: (gy * (s + y * (1.0 - s)),))


def _logistic(x):
    xp = backend_of(x).xp
    y = xp.exp(xp.minimum(x, 0)) / (1.0 + xp.exp(-xp.abs(x)))  # neither power overflows
    return y.astype(x.dtype, copy=False)


@explained
def tanh(x) -> Tensor:
    """The hyperbolic tangent.  gx = gy * (1 - y^2)."""
    x_data = real_data(x)
    y = backend_of(x_data).xp.tanh(x_data)
    return record(y, (x,), lambda gy: (gy * (1.0 - y * y),))


@explained
def relu(x) -> Tensor:
    """max(x, 0).  gx = gy, but 0 where y is 0, at the kink too, as is usual."""
    x_data = data(x)
    be = backend_of(x_data)
    y = be.relu(x_data)
    return record(y, (x,), lambda gy: (be.relu_vjp(gy, y),))


@explained
def gelu(x, approximate: str = "none") -> Tensor:
    """The Gaussian error linear unit (Hendrycks & Gimpel 2016), x * Phi(x).

    approximate: "none" for the exact form with erf, "tanh" for GPT-2's approximation.
    """
    x_data = real_data(x)
    be = backend_of(x_data)
    kernels = {"none": (be.gelu, be.gelu_vjp), "tanh": (be.gelu_tanh, be.gelu_tanh_vjp)}
    if approximate not in kernels:
        raise ValueError(f'gelu: approximate must be "none" or "tanh", got {approximate!r}')
    gelu_of, gelu_vjp = kernels[approximate]
    y, saved = gelu_of(x_data, needs_grad(x))
    return record(y, (x,), lambda gy: (gelu_vjp(gy, saved),))


@explained
def dropout(x, p: float = 0.5, training: bool = True) -> Tensor:
    """Zero each element with probability p and scale the others by 1 / (1 - p) (Srivastava et al. 2014). Where nothing
    is to be dropped, the result is x itself.

    The mask is a function of the current `random.scope` and of how many draws were made in it before.
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
    """x + dropout(branch, p, training), in one pass if the two are of one shape and dtype."""
    x_data, b = data(x), data(branch)
    if not training or p == 0.0 or x_data.shape != b.shape or x_data.dtype != b.dtype:
        return add(x, dropout(branch, p, training))
    be = backend_of(x_data, b)
    y, keep, scale = be.draw_dropout(b, next_place(b.shape), p, x_data)
    return record(y, (x, branch), lambda gy: (gy, be.dropout(gy, keep, scale)))


def next_place(shape: tuple[int, ...]) -> random.Place:
    """Where in the current scope the next mask of this shape is drawn."""
    return random.current().next_place(math.prod(shape[1:]))
