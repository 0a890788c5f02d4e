"""Every op, and the operators and methods by which tensors reach them.

An op is a plain function: it computes its result on bare arrays, and hands it to `record` with the function that
turns the result's gradient into its inputs' gradients.
"""

from tensorlite.ops.activations import gelu, relu, sigmoid, silu, tanh
from tensorlite.ops.attention import scaled_dot_product_attention, self_attention
from tensorlite.ops.dropout import add_dropout, dropout
from tensorlite.ops.elementwise import (
    abs,
    add,
    cast,
    clip,
    cos,
    div,
    exp,
    log,
    masked_fill,
    maximum,
    minimum,
    mul,
    neg,
    pow,
    sin,
    sqrt,
    sub,
    where,
)
from tensorlite.ops.normalization import layer_norm, log_softmax, softmax
from tensorlite.ops.operators import comparison, in_place, logic
from tensorlite.ops.products import linear, matmul
from tensorlite.ops.reductions import argmax, cumsum, max, mean, min, std, sum, var
from tensorlite.ops.shape import (
    broadcast_to,
    concatenate,
    expand_dims,
    flatten,
    getitem,
    permute,
    reshape,
    split,
    squeeze,
    stack,
    transpose,
    tril,
    triu,
)
from tensorlite.ops.tokens import cross_entropy, embedding
from tensorlite.tensor import Tensor

__all__ = [
    "abs", "add", "add_dropout", "argmax", "broadcast_to", "cast", "clip", "concatenate", "cos", "cross_entropy",
    "cumsum", "div", "dropout", "embedding", "exp", "expand_dims", "flatten", "gelu", "getitem", "layer_norm", "linear",
    "log", "log_softmax", "masked_fill", "matmul", "max", "maximum", "mean", "min", "minimum", "mul", "neg", "permute",
    "pow", "relu", "reshape", "scaled_dot_product_attention", "self_attention", "sigmoid", "silu", "sin", "softmax",
    "split", "sqrt", "squeeze", "stack", "std", "sub", "sum", "tanh", "transpose", "tril", "triu", "var", "where",
]  # fmt: skip

_METHODS = (
    abs, argmax, broadcast_to, clip, cos, cumsum, dropout, exp, expand_dims, flatten, gelu, log, log_softmax,
    masked_fill, matmul, max, mean, min, permute, pow, relu, reshape, sigmoid, silu, sin, softmax, split, sqrt,
    squeeze, std, sum, tanh, transpose, tril, triu, var,
)  # fmt: skip
_OPERATORS = {
    "__add__": add, "__sub__": sub, "__mul__": mul, "__truediv__": div, "__pow__": pow, "__matmul__": matmul,
    "__neg__": neg, "__getitem__": getitem, "__radd__": lambda a, b: add(b, a), "__rsub__": lambda a, b: sub(b, a),
    "__rmul__": lambda a, b: mul(b, a), "__rtruediv__": lambda a, b: div(b, a),
    "__rmatmul__": lambda a, b: matmul(b, a), "__rpow__": lambda a, b: pow(b, a), "__abs__": abs,
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
Tensor.view = reshape  # PyTorch's name for it
