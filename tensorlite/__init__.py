"""tensorlite: reverse-mode automatic differentiation over NumPy and CuPy arrays."""

from tensorlite import nn, ops, optim, random
from tensorlite.autograd import no_grad
from tensorlite.backends import Backend, BackendError, backend_of, get_backend
from tensorlite.creation import arange, ones, randn, tensor, zeros  # the function: its namesake is the module
from tensorlite.gradcheck import GradcheckError, KinkError, gradcheck
from tensorlite.ops import *  # noqa: F403 - every op is public
from tensorlite.random import manual_seed
from tensorlite.tensor import Tensor, grad, needs_grad, record
from tensorlite.words import FUNCTIONS, answers

__version__ = "0.1.0"

__all__ = [
    "Backend", "BackendError", "GradcheckError", "KinkError", "Tensor", "arange", "backend_of", "get_backend", "grad",
    "gradcheck", "manual_seed", "needs_grad", "nn", "no_grad", "ones", "ops", "optim", "randn", "random", "record",
    "tensor", "zeros", *ops.__all__,
]  # fmt: skip

__getattr__ = answers("tensorlite", FUNCTIONS)
