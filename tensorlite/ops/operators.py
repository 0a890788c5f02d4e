"""What Python's operators do on tensors beside calling an op: comparisons, logic on booleans, and changes in place."""

import operator

from tensorlite.autograd import mode
from tensorlite.backends import as_array
from tensorlite.dtypes import KINDS
from tensorlite.ops.operands import mask_of, pair
from tensorlite.tensor import Tensor, needs_grad, record
from tensorlite.words import explained


def comparison(name: str):
    """The method of a comparison: element by element, a Tensor of booleans without gradient."""
    compare = getattr(operator, name)

    def method(a, b):
        if not isinstance(b, Tensor) and not hasattr(b, "dtype"):
            try:
                as_array(b)
            except (TypeError, ValueError):  # None, a string, any object: not equal to a tensor, and without an order
                return NotImplemented
        return record(compare(*pair(a, b)), (), None)

    method.__qualname__ = name
    return explained(method)


def logic(name: str):
    """The method of a logical operator on booleans."""
    combine = getattr(operator, name)

    def method(*operands):
        return record(combine(*(mask_of(x, "operand") for x in operands)), (), None)

    method.__qualname__ = name
    return explained(method)


def in_place(op):
    """The method of an operator such as `-=`: as in PyTorch the tensor itself changes, unless the change is recorded.

    Recorded on an op's result it gives a new tensor, and on a leaf that requires grad it is an error.
    """

    def method(a, b):
        if mode.recording and a.requires_grad and a.is_leaf:
            raise RuntimeError(
                f"{op.__name__}: a leaf that requires grad cannot be changed in place while ops are recorded: "
                "do it within `with no_grad():`"
            )
        y = op(a, b)
        if needs_grad(a) or needs_grad(b):
            return y
        if y.shape != a.shape or KINDS[y.dtype] > KINDS[a.dtype]:
            raise ValueError(f"a result of {y.dtype} {y.shape} does not fit into a tensor of {a.dtype} {a.shape}")
        a.data[...] = y.data
        return a

    method.__qualname__ = op.__name__
    return explained(method)
