"""Element-wise ops. Two operands broadcast as in NumPy; the engine sums gradients back to their shapes."""

import math

import numpy as np

from tensorlite import random
from tensorlite.backends import backend_of
from tensorlite.dtypes import FLOAT, KINDS, known_float
from tensorlite.ops.operands import data, mask_of, named, pair, real_data
from tensorlite.tensor import Tensor, needs_grad, record


def add(a, b) -> Tensor:
    """a + b."""
    x, y = pair(a, b, "add")
    try:
        out = x + y
    except (ValueError, TypeError, OverflowError) as error:
        raise named(error, "add", x, y) from None

    def vjp(gy):
        return gy, gy

    return record(out, (a, b), vjp)


def sub(a, b) -> Tensor:
    """a - b."""
    x, y = pair(a, b, "sub")
    try:
        out = x - y
    except (ValueError, TypeError, OverflowError) as error:
        raise named(error, "sub", x, y) from None
    need_b = needs_grad(b)

    def vjp(gy):
        return gy, -gy if need_b else None

    return record(out, (a, b), vjp)


def mul(a, b) -> Tensor:
    """a * b.  ga = gy * b, gb = gy * a."""
    x, y = pair(a, b, "mul")
    try:
        out = x * y
    except (ValueError, TypeError, OverflowError) as error:
        raise named(error, "mul", x, y) from None
    # Each factor is kept only if the other one's gradient will ask for it.
    x, y = x if needs_grad(b) else None, y if needs_grad(a) else None

    def vjp(gy):
        return None if y is None else gy * y, None if x is None else gy * x

    return record(out, (a, b), vjp)


def div(a, b) -> Tensor:
    """a / b.  ga = gy / b, gb = -gy * (a / b) / b."""
    x, y = pair(a, b, "div", real=True)
    try:
        out = x / y
    except (ValueError, TypeError, OverflowError) as error:
        raise named(error, "div", x, y) from None
    need_a, ratio = needs_grad(a), out if needs_grad(b) else None

    def vjp(gy):
        ga = gy / y
        return ga if need_a else None, None if ratio is None else -ga * ratio

    return record(out, (a, b), vjp)


def neg(x) -> Tensor:
    """-x."""
    x_data = data(x, "neg")
    if x_data.dtype.kind == "b":
        raise TypeError("neg: booleans have no negative; ~x is the opposite of a mask")
    return record(-x_data, (x,), lambda gy: (-gy,))


def pow(x, exponent: float) -> Tensor:  # noqa: A001 - the field's name; Python's own is not used here
    """x ** exponent for a constant exponent.  gx = gy * exponent * x ** (exponent - 1)."""
    if isinstance(exponent, np.generic):
        exponent = exponent.item()
    if not isinstance(exponent, int | float):
        raise TypeError(f"pow: the exponent must be a number, got {type(exponent).__name__}")
    x_data = (real_data if isinstance(exponent, float) else data)(x, "pow")
    if exponent < 0 and KINDS[x_data.dtype] != FLOAT:
        raise ValueError(f"pow: integers have no power of {exponent}: make them floats, or write {float(exponent)}")

    def vjp(gy):
        return (gy * (exponent * _power(x_data, exponent - 1)) if exponent else backend_of(gy).xp.zeros_like(gy),)

    return record(_power(x_data, exponent), (x,), vjp)


def _power(x, exponent):
    # NumPy's general power is a hundred times slower than a product. It turns bfloat16 into float32.
    if exponent == 1:
        return x.copy()
    if exponent in (2, 3, 4):
        out = x
        for _ in range(int(exponent) - 1):
            out = out * x
        return out
    return (x**exponent).astype(x.dtype, copy=False)


def exp(x) -> Tensor:
    """e ** x.  gx = gy * y."""
    x_data = real_data(x, "exp")
    y = backend_of(x_data).xp.exp(x_data)
    return record(y, (x,), lambda gy: (gy * y,))


def log(x) -> Tensor:
    """The natural logarithm.  gx = gy / x."""
    x_data = real_data(x, "log")
    return record(backend_of(x_data).xp.log(x_data), (x,), lambda gy: (gy / x_data,))


def sqrt(x) -> Tensor:
    """The square root.  gx = gy / (2 y)."""
    x_data = real_data(x, "sqrt")
    y = backend_of(x_data).xp.sqrt(x_data)
    return record(y, (x,), lambda gy: (gy / (2.0 * y),))


def tanh(x) -> Tensor:
    """The hyperbolic tangent.  gx = gy * (1 - y^2)."""
    x_data = real_data(x, "tanh")
    y = backend_of(x_data).xp.tanh(x_data)
    return record(y, (x,), lambda gy: (gy * (1.0 - y * y),))


def relu(x) -> Tensor:
    """max(x, 0).  gx = gy, but 0 where y is 0, at the kink too, as is usual."""
    x_data = data(x, "relu")
    be = backend_of(x_data)
    y = be.relu(x_data)
    return record(y, (x,), lambda gy: (be.relu_vjp(gy, y),))


def gelu(x, approximate: str = "none") -> Tensor:
    """The Gaussian error linear unit (Hendrycks & Gimpel 2016), x * Phi(x).

    approximate: "none" for the exact form with erf, "tanh" for GPT-2's approximation.
    """
    x_data = real_data(x, "gelu")
    be = backend_of(x_data)
    kernels = {"none": (be.gelu, be.gelu_vjp), "tanh": (be.gelu_tanh, be.gelu_tanh_vjp)}
    if approximate not in kernels:
        raise ValueError(f'gelu: approximate must be "none" or "tanh", got {approximate!r}')
    gelu_of, gelu_vjp = kernels[approximate]
    y, saved = gelu_of(x_data, needs_grad(x))
    return record(y, (x,), lambda gy: (gelu_vjp(gy, saved),))


def where(condition, a, b) -> Tensor:
    """a where `condition` holds, else b. The condition is a constant, an array or Tensor of booleans."""
    cond, (x, y) = mask_of(condition, "where", "condition"), pair(a, b, "where")
    be = backend_of(cond, x, y, op="where")
    try:
        out = be.xp.where(cond, x, y)
    except ValueError:
        raise ValueError(f"where: shapes {cond.shape}, {_shape(x)} and {_shape(y)} do not broadcast") from None
    need_a, need_b = needs_grad(a), needs_grad(b)
    cond = cond.copy() if need_a or need_b else None

    def vjp(gy):
        return be.select(gy, cond) if need_a else None, be.select(gy, ~cond) if need_b else None

    return record(out, (a, b), vjp)


def masked_fill(x, mask, value: float) -> Tensor:
    """x with the constant `value` wherever `mask` (boolean, broadcast to x's shape) holds."""
    x_data, m = data(x, "masked_fill"), mask_of(mask, "masked_fill", "mask")
    be = backend_of(x_data, m, op="masked_fill")
    try:
        be.xp.broadcast_to(m, x_data.shape)
    except ValueError:
        raise ValueError(f"masked_fill: a mask of shape {m.shape} does not broadcast to {x_data.shape}") from None
    return where(mask, value, x)


def dropout(x, p: float = 0.5, training: bool = True) -> Tensor:
    """Zero each element with probability p and scale the others by 1 / (1 - p) (Srivastava et al. 2014). Where nothing
    is to be dropped, the result is x itself.

    The mask is a function of the current `random.scope` and of how many draws were made in it before.
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout: p must be from 0 to 1, got {p}")
    x_data = real_data(x, "dropout")
    if not training or p == 0.0:
        return x if isinstance(x, Tensor) and x.data is x_data else Tensor(x_data)
    be = backend_of(x_data)
    y, keep, scale = be.draw_dropout(x_data, next_place(x_data.shape), p)
    return record(y, (x,), lambda gy: (be.dropout(gy, keep, scale),))


def add_dropout(x, branch, p: float = 0.5, training: bool = True) -> Tensor:
    """x + dropout(branch, p, training), in one pass if the two are of one shape and dtype."""
    x_data, b = data(x, "add_dropout"), data(branch, "add_dropout")
    if not training or p == 0.0 or x_data.shape != b.shape or x_data.dtype != b.dtype:
        return add(x, dropout(branch, p, training))
    be = backend_of(x_data, b, op="add_dropout")
    y, keep, scale = be.draw_dropout(b, next_place(b.shape), p, x_data)
    return record(y, (x, branch), lambda gy: (gy, be.dropout(gy, keep, scale)))


def cast(x, dtype) -> Tensor:
    """x in another floating-point dtype; its gradient comes back in x's own."""
    x_data, dtype = data(x, "cast"), known_float(dtype, "cast")
    return record(x_data.astype(dtype, copy=False), (x,), lambda gy: (gy,))


def next_place(shape: tuple[int, ...]) -> random.Place:
    """Where in the current scope the next mask of this shape is drawn."""
    return random.current().next_place(math.prod(shape[1:]))


def _shape(x) -> tuple[int, ...]:
    return getattr(x, "shape", ())
