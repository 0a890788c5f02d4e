"""The functions that bend what goes through a network."""

from tensorlite.backends import backend_of
from tensorlite.ops.operands import data, real_data
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
    """The Gaussian error linear unit (Hendrycks & Gimpel 2016), x * Phi(x).  gx = gy * (Phi(x) + x * phi(x)).

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
