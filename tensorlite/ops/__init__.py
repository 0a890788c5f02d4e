"""Every op, and the operators and methods by which tensors reach them.

An op is a plain function: it computes its result on bare arrays, and hands it to `record` with the function that
turns the result's gradient into its inputs' gradients.
"""

from tensorlite.ops.attention import scaled_dot_product_attention, self_attention
from tensorlite.ops.elementwise import (
    add,
    add_dropout,
    cast,
    div,
    dropout,
    exp,
    gelu,
    log,
    masked_fill,
    mul,
    neg,
    pow,
    relu,
    sqrt,
    sub,
    tanh,
    where,
)
from tensorlite.ops.normalization import layer_norm, log_softmax, softmax
from tensorlite.ops.operators import comparison, in_place, logic
from tensorlite.ops.products import linear, matmul
from tensorlite.ops.reductions import max, mean, sum
from tensorlite.ops.shape import concatenate, getitem, permute, reshape, split, transpose
from tensorlite.ops.tokens import cross_entropy, embedding
from tensorlite.tensor import Tensor

__all__ = [
    "add", "add_dropout", "cast", "concatenate", "cross_entropy", "div", "dropout", "embedding", "exp", "gelu",
    "getitem", "layer_norm", "linear", "log", "log_softmax", "masked_fill", "matmul", "max", "mean", "mul", "neg",
    "permute", "pow", "relu", "reshape", "scaled_dot_product_attention", "self_attention", "softmax", "split", "sqrt",
    "sub", "sum", "tanh", "transpose", "where",
]  # fmt: skip

_METHODS = (
    dropout, exp, gelu, log, log_softmax, masked_fill, matmul, max, mean, permute, pow, relu, reshape,
    softmax, split, sqrt, sum, tanh, transpose,
)  # fmt: skip
_OPERATORS = {
    "__add__": add, "__sub__": sub, "__mul__": mul, "__truediv__": div, "__pow__": pow, "__matmul__": matmul,
    "__neg__": neg, "__getitem__": getitem, "__radd__": lambda a, b: add(b, a), "__rsub__": lambda a, b: sub(b, a),
    "__rmul__": lambda a, b: mul(b, a), "__rtruediv__": lambda a, b: div(b, a),
    "__rmatmul__": lambda a, b: matmul(b, a),
}  # fmt: skip

_IN_PLACE = {
    "__iadd__": add, "__isub__": sub, "__imul__": mul, "__itruediv__": div, "__ipow__": pow, "__imatmul__": matmul,
}  # fmt: skip

for _op in _METHODS:
    setattr(Tensor, _op.__name__, _op)
for _name, _op in _OPERATORS.items():
    setattr(Tensor, _name, _op)
for _name, _op in _IN_PLACE.items():
    setattr(Tensor, _name, in_place(_op))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):  # a tensor's hash stays that of its identity
    setattr(Tensor, f"__{_name}__", comparison(_name))
for _name in ("and_", "or_", "xor"):
    for _side in ("", "r"):
        setattr(Tensor, f"__{_side}{_name.strip('_')}__", logic(_name))
Tensor.__invert__ = logic("invert")
Tensor.T = property(transpose)
