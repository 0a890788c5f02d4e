"""Wrong arguments, one at a time, in every public function: each is refused by an error that names the function, or is
one that the function has a meaning for."""

import math
import warnings

import numpy as np
import pytest

import tensorlite as tl
from tensorlite import Tensor, nn, optim, random
from tensorlite.nn.module import Module


def x(*shape, grad=True):
    return Tensor(np.full(shape or (2, 3), 0.5, np.float32), requires_grad=grad)


IDS, MASK = np.array([0, 1]), np.array([True, False, True])
UNARY = ["neg", "exp", "log", "sqrt", "sin", "cos", "abs", "tanh", "relu", "sigmoid", "silu", "squeeze", "flatten"]
ALONG_AN_AXIS = ["softmax", "log_softmax", "cumsum", "squeeze", "expand_dims"]
SDPA, MAKE = "scaled_dot_product_attention", {"dtype": np.float32, "requires_grad": True, "backend": "numpy"}

# The name, what is called, and arguments that are right. Keywords are by name.
CALLS = [
    *[(name, getattr(tl, name), (x(), x()), {}) for name in ["add", "sub", "mul", "div", "maximum", "minimum", "pow"]],
    *[(name, getattr(tl, name), (x(),), {}) for name in UNARY],
    *[(name, getattr(tl, name), (x(), 1, True), {}) for name in ["sum", "mean", "max", "min", "argmax"]],
    *[(name, getattr(tl, name), (x(), 1, 0, True), {}) for name in ("var", "std")],
    *[(name, getattr(tl, name), (x(), 1), {}) for name in ALONG_AN_AXIS],
    *[(name, getattr(tl, name), (x(), 0), {}) for name in ("tril", "triu", "getitem")],
    *[(name, getattr(tl, name), (2, 3), MAKE) for name in ("zeros", "ones", "randn")],
    *[(name, getattr(tl, name), ([x(), x()], 1), {}) for name in ("concatenate", "stack")],
    ("pow", tl.pow, (x(), 2), {}),
    ("gelu", tl.gelu, (x(), "tanh"), {}),
    ("clip", tl.clip, (x(), 0.1, 0.9), {}),
    ("where", tl.where, (MASK, x(), x()), {}),
    ("masked_fill", tl.masked_fill, (x(), MASK, 0.0), {}),
    ("dropout", tl.dropout, (x(), 0.3, True), {}),
    ("add_dropout", tl.add_dropout, (x(), x(), 0.3, True), {}),
    ("cast", tl.cast, (x(), np.float64), {}),
    ("reshape", tl.reshape, (x(), 3, 2), {}),
    ("reshape", tl.reshape, (x(), (3, 2)), {}),
    ("flatten", tl.flatten, (x(), 0, 1), {}),
    ("broadcast_to", tl.broadcast_to, (x(), (2, 2, 3)), {}),
    ("permute", tl.permute, (x(), 1, 0), {}),
    ("permute", tl.permute, (x(), (1, 0)), {}),
    ("transpose", tl.transpose, (x(), 0, 1), {}),
    ("getitem", tl.getitem, (x(), (0, slice(1))), {}),
    ("split", tl.split, (x(), 2, 1), {}),
    ("split", tl.split, (x(), [1, 2], 1), {}),
    ("matmul", tl.matmul, (x(3, 3), x(3, 3)), {}),
    ("linear", tl.linear, (x(), x(3, 3), x(3)), {}),
    ("layer_norm", tl.layer_norm, (x(), x(3), x(3), 1e-5), {}),
    ("embedding", tl.embedding, (IDS, x()), {}),
    ("cross_entropy", tl.cross_entropy, (x(), IDS, -100, "mean", 0.1), {}),
    (SDPA, tl.scaled_dot_product_attention, (x(), x(), x()), {"attn_mask": np.ones((2, 2), bool), "causal": True}),
    (SDPA, tl.scaled_dot_product_attention, (x(), x(), x()), {"causal": True, "dropout": 0.1, "scale": 0.5}),
    ("self_attention", tl.self_attention, (x(1, 2, 6), 1, True, 0.1), {}),
    ("tensor", tl.tensor, ([1.0],), MAKE),
    ("arange", tl.arange, (0, 5, 2), MAKE),
    ("Tensor", Tensor, ([1.0], True, np.float32), {}),
    ("grad", lambda inputs: tl.grad((x() * x()).sum(), inputs), ([],), {}),
    ("grad", lambda output: tl.grad(output, []), ((x() * x()).sum(),), {}),
    ("backward", lambda gradient: (x() * x()).backward(gradient), (np.ones((2, 3), np.float32),), {}),
    ("seed", tl.manual_seed, (3,), {}),
    ("seed", lambda seed: random.scope(seed), (3,), {}),
    ("get_backend", tl.get_backend, ("numpy",), {}),
    ("Linear", nn.Linear, (2, 3, True, 0.1), {}),
    ("Embedding", nn.Embedding, (2, 3, 0.1), {}),
    ("LayerNorm", nn.LayerNorm, (2, True, 1e-5), {}),
    ("dropout", lambda p: nn.Dropout(p)(x()), (0.5,), {}),
    ("gelu", lambda approximate: nn.GELU(approximate)(x()), ("none",), {}),
    ("Sequential", nn.Sequential, (nn.Linear(2, 3), nn.ReLU()), {}),
    ("Tensor", nn.Parameter, ([1.0], np.float32), {}),
    ("to", lambda *args: nn.Linear(2, 3).to(*args), ("numpy", np.float32), {}),
    ("load_state_dict", nn.Linear(1, 1).load_state_dict, ({"weight": [[1.0]], "bias": [1.0]},), {}),
    ("AdamW", optim.AdamW, ([x(2)], 1e-3, (0.9, 0.99), 1e-8, 0.1), {}),
    ("SGD", optim.SGD, ([x(2)], 1e-3, 0.9), {"weight_decay": 0.1, "nesterov": True}),
    ("decay_groups", optim.decay_groups, ([x(2)],), {"weight_decay": 0.1}),
    ("clip_grad_norm_", optim.clip_grad_norm_, ([x(2)], 1.0), {}),
    ("learning_rate", optim.learning_rate, (1, 1e-3, 2, 10, 1e-4), {}),
    ("FlatBuffer", optim.FlatBuffer, ([x(2)],), {}),
]  # fmt: skip

# What no function has a meaning for, and what some have.
NEVER = {
    "str": "a", "object": object(), "complex": np.ones(2, complex), "1j": 1j, "datetime": np.datetime64("2020-01-01"),
    "array of objects": np.array([None, 1]), "ragged": [[1], [1, 2]], "class": int, "lambda": lambda: 1,
    "tuple of str": ("a",), "bytes": b"x",
}  # fmt: skip
SOMETIMES = {
    "None": None, "dict": {}, "set": {1, 2}, "list": [], "masked": np.ma.array([1.0], mask=[True]), "-1": -1, "5": 5,
    "1.5": 1.5, "nan": math.nan, "inf": math.inf, "10**30": 10**30, "True": True, "float16": np.ones(2, np.float16),
    "np.float32": np.float32(1), "np.int64": np.int64(1), "0-d": np.array(1.0, np.float32), "ints": np.arange(3),
    "float64": np.ones((2, 3)), "uint64": np.array([2**63], np.uint64), "bools": np.array([True, False]),
    "tensor": Tensor(1.0), "empty tensor": Tensor([]), "longer tensor": Tensor(np.ones(7, np.float32)),
    "tensor of 5 axes": Tensor(np.ones((1, 2, 2, 2, 2), np.float32)), "tuple": (1, 0), "1-tuple": (5,),
    "range": range(3), "slice": slice(1),
}  # fmt: skip

# Flags are true or false, as everywhere in Python, whatever they are; and what is called with any callable.
FLAGS = {"requires_grad", "causal", "nesterov"} | {
    *((name, 2) for name in ["sum", "mean", "max", "min", "argmax", "dropout", "self_attention", "Linear"]),
    *((name, 3) for name in ("var", "std", "add_dropout")), ("Tensor", 1), ("LayerNorm", 1),
    *(("Sequential", i) for i in range(2)),
}  # fmt: skip
UNCHECKED = {("decay_groups", "weight_decay"), *(("learning_rate", i) for i in range(1, 5))}
PLACES = [(call, place) for call in CALLS for place in (*range(len(call[2])), *call[3])]


def attempt(call, place, value):
    """What comes of the call with `value` in this place: a result or an exception."""
    name, function, args, keywords = call
    args = [value if i == place else a for i, a in enumerate(args)]
    keywords = {key: value if key == place else a for key, a in keywords.items()}
    tl.manual_seed(0)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            return function(*args, **keywords)
        except Exception as error:  # noqa: BLE001 - it is looked at below
            return error


@pytest.mark.parametrize(("call", "place"), PLACES, ids=lambda x: x[0] if isinstance(x, tuple) else str(x))
def test_a_wrong_argument_is_refused_by_name(call, place):
    name = call[0]
    right = attempt(call, None, None)
    assert not isinstance(right, Exception), right
    for what, value in (NEVER | SOMETIMES).items():
        result = attempt(call, place, value)
        if isinstance(result, Exception):
            if isinstance(result, RuntimeError) and name == "grad":
                continue  # the right kind of argument, but it depends on nothing
            known = (TypeError, ValueError, IndexError, tl.BackendError)
            assert isinstance(result, known), f"{name} with {what} as {place}: {result!r}"
            assert name in str(result), f"{name} with {what} as {place}: {result!r}"
        elif what in NEVER:
            assert place in FLAGS or (name, place) in FLAGS | UNCHECKED, f"{name} takes {what} as {place}: {result!r}"
        for y in result if isinstance(result, list) else [result]:
            if isinstance(y, Tensor):
                assert isinstance(y.data, np.ndarray)
                assert y.dtype in (np.float32, np.float64) or y.dtype.kind in "biu"


def test_every_public_function_is_called():
    named = {name for name, *_ in CALLS}
    public = {name for name in tl.__all__ if callable(getattr(tl, name)) and name[0].islower()}
    taking_anything = {"backend_of", "gradcheck", "needs_grad", "no_grad", "record"}
    assert public - named == {*taking_anything, "manual_seed"}
    layers = {n for n in nn.__all__ if isinstance(getattr(nn, n), type) and issubclass(getattr(nn, n), Module)}
    assert layers - named == {"Module", "Dropout", "GELU", "ReLU", "Tanh"}  # which check when they are called
