"""Element-wise ops. Two operands broadcast as in NumPy; the engine sums gradients back to their shapes."""

import operator

import numpy as np

from tensorlite.backends import backend_of
from tensorlite.dtypes import FLOAT, KINDS, known_float
from tensorlite.ops.operands import data, mask_of, named, pair, real_data
from tensorlite.tensor import Tensor, needs_grad, record
from tensorlite.words import explained


@explained
def add(a, b) -> Tensor:
    """a + b.  ga = gy, gb = gy."""
    x, y = pair(a, b)
    out = x + y

    def vjp(gy):
        return gy, gy

    return record(out, (a, b), vjp)


@explained
def sub(a, b) -> Tensor:
    """a - b.  ga = gy, gb = -gy."""
    x, y = pair(a, b)
    out = x - y
    need_b = needs_grad(b)

    def vjp(gy):
        return gy, -gy if need_b else None

    return record(out, (a, b), vjp)


@explained
def mul(a, b) -> Tensor:
    """a * b.  ga = gy * b, gb = gy * a."""
    x, y = pair(a, b)
    out = x * y
    # Each factor is kept only if the other one's gradient will ask for it.
    x, y = x if needs_grad(b) else None, y if needs_grad(a) else None

    def vjp(gy):
        return None if y is None else gy * y, None if x is None else gy * x

    return record(out, (a, b), vjp)


@explained
def div(a, b) -> Tensor:
    """a / b.  ga = gy / b, gb = -gy * (a / b) / b."""
    x, y = pair(a, b, real=True)
    out = x / y
    need_a, ratio = needs_grad(a), out if needs_grad(b) else None

    def vjp(gy):
        ga = gy / y
        return ga if need_a else None, None if ratio is None else -ga * ratio

    return record(out, (a, b), vjp)


@explained
def neg(x) -> Tensor:
    """-x.  gx = -gy."""
    x_data = data(x)
    if x_data.dtype.kind == "b":
        raise TypeError("booleans have no negative; ~x is the opposite of a mask")
    return record(-x_data, (x,), lambda gy: (-gy,))


@explained
def pow(x, exponent) -> Tensor:  # noqa: A001 - the field's name; Python's own is not used here
    """x ** exponent.  gx = gy * exponent * x ** (exponent - 1), gexponent = gy * y * log(x).

    As PyTorch has it, the exponent 0 gives x the gradient 0, and so does the base 0 its exponent.
    """
    if isinstance(exponent, np.generic):
        exponent = exponent.item()
    if not isinstance(exponent, int | float):
        return _power_of_tensors(x, exponent)
    x_data = (real_data if isinstance(exponent, float) else data)(x)
    if exponent < 0 and KINDS[x_data.dtype] != FLOAT:
        raise ValueError(f"integers have no power of {exponent}: make them floats, or write {float(exponent)}")

    def vjp(gy):
        return (gy * (exponent * _power(x_data, exponent - 1)) if exponent else backend_of(gy).xp.zeros_like(gy),)

    return record(_power(x_data, exponent), (x,), vjp)


def _power_of_tensors(x, exponent) -> Tensor:
    a, b = pair(x, exponent)
    be, dtype = backend_of(a, b), getattr(a, "dtype", None) or b.dtype
    xp, a, b = be.xp, be.asarray(a, dtype), be.asarray(b, dtype)
    if KINDS[dtype] != FLOAT and (b < 0).any():
        raise ValueError("integers have no negative powers: make one of the two floats")
    y, need_exponent = a**b, needs_grad(exponent)

    def vjp(gy):
        gx = gy * (b * a ** xp.where(b == 0, b, b - 1))
        if not need_exponent:
            return gx, None
        return gx, gy * (y * xp.log(xp.where((a == 0) & (b >= 0), xp.ones_like(a), a)))

    return record(y, (x, exponent), named("pow", vjp))


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


@explained
def exp(x) -> Tensor:
    """e ** x.  gx = gy * y."""
    x_data = real_data(x)
    y = backend_of(x_data).xp.exp(x_data)
    return record(y, (x,), lambda gy: (gy * y,))


@explained
def log(x) -> Tensor:
    """The natural logarithm.  gx = gy / x."""
    x_data = real_data(x)
    return record(backend_of(x_data).xp.log(x_data), (x,), lambda gy: (gy / x_data,))


@explained
def sqrt(x) -> Tensor:
    """The square root.  gx = gy / (2 y)."""
    x_data = real_data(x)
    y = backend_of(x_data).xp.sqrt(x_data)
    return record(y, (x,), lambda gy: (gy / (2.0 * y),))


@explained
def sin(x) -> Tensor:
    """The sine, of radians.  gx = gy * cos(x)."""
    x_data = real_data(x)
    xp = backend_of(x_data).xp
    return record(xp.sin(x_data), (x,), lambda gy: (gy * xp.cos(x_data),))


@explained
def cos(x) -> Tensor:
    """The cosine, of radians.  gx = -gy * sin(x)."""
    x_data = real_data(x)
    xp = backend_of(x_data).xp
    return record(xp.cos(x_data), (x,), lambda gy: (-gy * xp.sin(x_data),))


@explained
def abs(x) -> Tensor:  # noqa: A001 - the field's name
    """|x|.  gx = gy * sign(x): 0 at the kink."""
    x_data = data(x)
    xp = backend_of(x_data).xp
    return record(xp.abs(x_data), (x,), lambda gy: (gy * xp.sign(x_data),))


@explained
def maximum(a, b) -> Tensor:
    """The larger of each two elements, a NaN if one is.  gx = gy for it, for both gy / 2 where they tie, else 0."""
    return _extremum("maximum", a, b, operator.lt)


@explained
def minimum(a, b) -> Tensor:
    """The smaller of each two elements, a NaN if one is.  gx = gy for it, for both gy / 2 where they tie, else 0."""
    return _extremum("minimum", a, b, operator.gt)


def _extremum(name: str, a, b, loses) -> Tensor:
    x, y = pair(a, b)
    be = backend_of(x, y)
    out = getattr(be.xp, name)(x, y)

    def vjp(gy):
        shares = be.xp.where(x == y, 0.5 * gy, gy)
        return be.select(shares, ~loses(x, y)), be.select(shares, ~loses(y, x))

    return record(out, (a, b), named(name, vjp))


@explained
def clip(x, min=None, max=None) -> Tensor:  # noqa: A002 - NumPy's and PyTorch's words
    """x kept between the numbers `min` and `max`, either of which may be None.  gx = gy, but 0 beyond them."""
    bounds = [bound.item() if isinstance(bound, np.generic) else bound for bound in (min, max)]
    kinds = {type(bound) for bound in bounds} - {type(None)}
    if not kinds or not kinds <= {int, float}:
        raise TypeError(f"expected numbers, or one and None, got {min!r} and {max!r}; see minimum and maximum")
    x_data = (real_data if float in kinds else data)(x)
    be, (least, most) = backend_of(x_data), bounds
    y = be.xp.clip(x_data, least, most).astype(x_data.dtype, copy=False)

    def vjp(gy):
        beyond = False if least is None else x_data < least
        return (be.select(gy, ~(beyond if most is None else beyond | (x_data > most))),)

    return record(y, (x,), vjp)


@explained
def where(condition, a, b) -> Tensor:
    """a where `condition` holds, else b.  ga = gy where it holds, gb = gy where not, else 0.

    The condition is a constant, an array or Tensor of booleans.
    """
    cond, (x, y) = mask_of(condition, "condition"), pair(a, b)
    be = backend_of(cond, x, y)
    try:
        out = be.xp.where(cond, x, y)
    except ValueError:
        raise ValueError(f"shapes {cond.shape}, {_shape(x)} and {_shape(y)} do not broadcast") from None
    need_a, need_b = needs_grad(a), needs_grad(b)
    cond = cond.copy() if need_a or need_b else None

    def vjp(gy):
        return be.select(gy, cond) if need_a else None, be.select(gy, ~cond) if need_b else None

    return record(out, (a, b), vjp)


@explained
def masked_fill(x, mask, value: float) -> Tensor:
    """x with the constant `value` wherever `mask` (boolean, broadcast to x's shape) holds."""
    x_data, m = data(x), mask_of(mask, "mask")
    be = backend_of(x_data, m)
    if getattr(value, "ndim", 0) or isinstance(value, list | tuple):
        raise TypeError(f"the value must be a number, got {value!r}; where takes an array")
    try:
        be.xp.broadcast_to(m, x_data.shape)
    except ValueError:
        raise ValueError(f"a mask of shape {m.shape} does not broadcast to {x_data.shape}") from None
    return where(mask, value, x)


@explained
def cast(x, dtype) -> Tensor:
    """x in another floating-point dtype.  gx = gy, in x's own dtype."""
    x_data, dtype = data(x), known_float(dtype)
    return record(x_data.astype(dtype, copy=False), (x,), lambda gy: (gy,))


def _shape(x) -> tuple[int, ...]:
    return getattr(x, "shape", ())
