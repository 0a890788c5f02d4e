"""Softmax, log-softmax and layer norm."""

from tensorlite.backends import backend_of
from tensorlite.ops.operands import normalize_axes, number, of_one_dtype, one_axis, real_data
from tensorlite.ops.shape import reshape
from tensorlite.tensor import Tensor, record
from tensorlite.words import explained


@explained
def softmax(x, axis: int = -1) -> Tensor:
    """exp(x) / sum(exp(x)) along `axis`.  gx = y * (gy - sum(gy * y))."""
    x_data = real_data(x)
    axis = one_axis(axis, x_data.ndim)
    if axis is None:
        return reshape(softmax(reshape(x, 1)), ())
    be = backend_of(x_data)
    y = be.softmax(x_data, axis)
    return record(y, (x,), lambda gy: (be.softmax_vjp(gy, y, axis),))


@explained
def log_softmax(x, axis: int = -1) -> Tensor:
    """x - log(sum(exp(x))) along `axis`.  gx = gy - softmax(x) * sum(gy)."""
    x_data = real_data(x)
    axis = one_axis(axis, x_data.ndim)
    if axis is None:
        return reshape(log_softmax(reshape(x, 1)), ())
    be = backend_of(x_data)
    y = be.log_softmax(x_data, axis)
    return record(y, (x,), lambda gy: (be.log_softmax_vjp(gy, y, axis),))


@explained
def layer_norm(x, weight=None, bias=None, eps: float = 1e-5) -> Tensor:
    """y = (x - mean) * rstd * weight + bias over the last axis (Ba et al. 2016); x (..., C), weight and bias (C,).

    rstd = 1 / sqrt(variance + eps) with the biased variance. With n = (x - mean) * rstd and g = gy * weight:

    gx = rstd * (g - mean(g) - n * mean(g * n)), gweight = sum(gy * n), gbias = sum(gy).
    """
    names, optional = ("x", "weight", "bias"), ("weight", "bias")
    x_data, w, b = of_one_dtype(names, x, weight, bias, optional=optional, real=True, mixed=True)
    be, eps = backend_of(x_data), number(eps, "eps")
    normalize_axes(-1, x_data.ndim)
    for name, p in (("weight", w), ("bias", b)):
        if p is not None and p.shape != x_data.shape[-1:]:
            raise ValueError(f"{name} has shape {p.shape}, x {x_data.shape} needs {x_data.shape[-1:]}")
    y, saved = be.layer_norm(x_data, w, b, eps)
    has_bias = b is not None

    def vjp(gy):
        return be.layer_norm_vjp(gy, saved, w, has_bias)

    return record(y, (x, weight, bias), vjp)
