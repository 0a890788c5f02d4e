"""Which dtype comes out: every op on every kind of operand, against PyTorch's rule, on each backend."""

import itertools
import math
import operator
import pickle

import numpy as np
import pytest
import torch

import tensorlite as tl
from tensorlite import Tensor, get_backend, nn
from tensorlite.dtypes import common, known

# What an operand may be, beside its likeness in PyTorch. A list counts there as a number: it brings its kind alone.
DTYPES = ("bool", "uint8", "int8", "int32", "int64", "float32", "float64")
OPERANDS = {
    **{f"{d}, axes": (np.ones(2, d), torch.ones(2, dtype=getattr(torch, d))) for d in DTYPES},
    **{f"{d}, no axes": (np.ones((), d), torch.ones((), dtype=getattr(torch, d))) for d in ("int64", *DTYPES[-2:])},
    "Python's True": (True, True),
    "Python's int": (2, 2),
    "Python's float": (0.5, 0.5),
    **{f"NumPy's {d}": (np.dtype(d).type(1), float(1) if "float" in d else 1) for d in ("int64", "float32", "float64")},
    "NumPy's float16": (np.float16(0.5), 0.5),
    "list of ints": ([2, 3], 2),
    "list of floats": ([0.5, 0.1], 0.5),
    "list of NumPy's float64": ([np.float64(0.5), np.float64(1)], 0.5),
}
PAIRS = [(a, b) for a, b in itertools.product(OPERANDS, OPERANDS) if "axes" in a or "axes" in b]


def default(dtype) -> np.dtype:
    return np.dtype(str(dtype).removeprefix("torch."))


def expected(a: str, b: str, real: bool) -> np.dtype:
    dtype = torch.result_type(OPERANDS[a][1], OPERANDS[b][1])
    return default(dtype if dtype.is_floating_point or not real else torch.float32)


def place(backend, x):
    """An operand as a Tensor on the backend if it is an array, as it is if it is a number or a list."""
    return Tensor(backend.asarray(x)) if isinstance(x, np.ndarray) else x


BINARY = {
    "add": (operator.add, False),
    "mul": (operator.mul, False),
    "div": (operator.truediv, True),
    "where": (lambda a, b: tl.where(mask_for(a, b), a, b), False),
}


def mask_for(a, b):
    tensor = a if isinstance(a, Tensor) else b
    return tl.backend_of(tensor.data).asarray(np.array([True, False]))


@pytest.mark.parametrize("op", BINARY)
def test_two_operands_meet_as_in_pytorch(op, cuda_or_numpy):
    call, real = BINARY[op]
    for a, b in PAIRS:
        x, y = (place(cuda_or_numpy, OPERANDS[name][0]) for name in (a, b))
        assert call(x, y).dtype == expected(a, b, real), f"{op} of {a} and {b}"


@pytest.mark.parametrize("name", ["eq", "ne", "lt", "le", "gt", "ge"])
def test_comparisons_give_booleans(name, cuda_or_numpy):
    compare = getattr(operator, name)
    for a, b in PAIRS:
        x, y = (place(cuda_or_numpy, OPERANDS[n][0]) for n in (a, b))
        result = compare(x, y)
        assert isinstance(result, Tensor)
        assert result.dtype == bool
        theirs = [torch.as_tensor(OPERANDS[n][0]) for n in (a, b)]
        if "Python's float" not in (a, b):  # 0.1 means float32's 0.1 beside float32
            want = np.broadcast_to(compare(*theirs).numpy(), result.shape)
            np.testing.assert_array_equal(cuda_or_numpy.to_numpy(result.data), want)


REAL = {
    "exp": tl.exp, "log": tl.log, "sqrt": tl.sqrt, "tanh": tl.tanh, "gelu": tl.gelu, "softmax": tl.softmax,
    "log_softmax": tl.log_softmax, "layer_norm": tl.layer_norm, "mean": tl.mean,
    "sigmoid": tl.sigmoid, "silu": tl.silu, "sin": tl.sin, "cos": tl.cos, "var": tl.var, "std": tl.std,
    "clip": lambda x: x.clip(0.5), "2.0 ** x": lambda x: 2.0**x, "x ** tensor": lambda x: x ** (x * 0.5),
    "attn_mask": lambda x: tl.scaled_dot_product_attention(x, x, x, attn_mask=(x @ x.T) > 0),
    "label smoothing": lambda x: tl.cross_entropy(x, tl.argmax(x, 1), label_smoothing=0.5),
    "dropout": lambda x: tl.dropout(x, 0.5),
    "dropout of nothing": lambda x: tl.dropout(x, 0.0), "dropout in eval mode": lambda x: tl.dropout(x, 0.5, False),
    "pow": lambda x: x**0.5, "attention": lambda x: tl.scaled_dot_product_attention(x, x, x),
    "cross_entropy": lambda x: tl.cross_entropy(x, tl.backend_of(x.data).asarray(np.array([0, 1]))),
    "self_attention": lambda x: tl.self_attention(tl.reshape(x, 1, 1, 6), 2),
}  # fmt: skip
KEPT = {
    "relu": tl.relu, "neg": lambda x: -x, "sum": tl.sum, "max": tl.max, "reshape": lambda x: x.reshape(-1),
    "getitem": lambda x: x[0], "concatenate": lambda x: tl.concatenate([x, x]), "transpose": tl.transpose,
    "pow": lambda x: x**2, "pow 1": lambda x: x**1, "pow 0": lambda x: x**0,
    "pow by NumPy's": lambda x: x ** np.int64(2),
    "matmul": lambda x: x @ x.T, "linear": lambda x: tl.linear(x, x), "split": lambda x: x.split(1)[0],
    "masked_fill": lambda x: tl.masked_fill(x, x == x, 1), "abs": tl.abs, "min": tl.min, "clip": lambda x: x.clip(1, 2),
    "maximum": lambda x: tl.maximum(x, 1), "minimum": lambda x: tl.minimum(x, x), "stack": lambda x: tl.stack([x, x]),
    "concatenate 0-d": lambda x: tl.concatenate([x[0], 1]), "stack of numbers": lambda x: tl.stack([x[0, 0], 1]),
    "squeeze": tl.squeeze, "flatten": tl.flatten, "expand_dims": lambda x: x.expand_dims(0), "tril": tl.tril,
    "broadcast_to": lambda x: x.broadcast_to(2, 2, 3), "cumsum": lambda x: x.cumsum(0), "2 ** x": lambda x: 2**x,
    "x ** tensor": lambda x: x**x,
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", REAL)
def test_a_function_of_real_numbers_takes_integers_as_float32(op, dtype, cuda_or_numpy):
    y = REAL[op](Tensor(cuda_or_numpy.asarray(np.ones((2, 3), dtype))))
    assert y.dtype == (dtype if "float" in dtype else "float32")
    assert np.isfinite(cuda_or_numpy.to_numpy(y.data)).all()


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("op", KEPT)
def test_other_ops_keep_the_dtype(op, dtype, cuda_or_numpy):
    y = KEPT[op](Tensor(cuda_or_numpy.asarray(np.ones((2, 3), dtype))))
    assert y.dtype == ("int64" if "sum" in op and "int" in dtype else dtype)


def test_lists_are_as_exact_as_the_tensor_they_meet():
    x = Tensor(np.array([1.0]))
    tenth = np.float64(0.1)
    assert (x * [0.1]).item() == tl.where([False], x, [0.1]).item() == (x @ [0.1]).item() == tenth
    assert tl.concatenate([x, [0.1]]).data[1] == tenth
    assert Tensor([np.ones(2), np.ones(2)]).dtype == Tensor([[np.float64(1)]]).dtype == np.float64
    assert Tensor([Tensor(np.ones(2)), Tensor(np.ones(2))]).dtype == np.float64
    assert Tensor([0.1, 1]).dtype == Tensor([]).dtype == np.float32


# -- products and layers --

F32, F64, INTS = (np.ones((2, 2), d) for d in (np.float32, np.float64, np.int64))
MIXED = {
    "matmul": lambda x, y: tl.matmul(x, y),
    "linear": lambda x, y: tl.linear(x, y),
    "linear ": lambda x, y: tl.linear(x, x, y[0]),
    "layer_norm": lambda x, y: tl.layer_norm(x, y[0]),
    "layer_norm ": lambda x, y: tl.layer_norm(x, x[0], y[0]),
    "scaled_dot_product_attention": lambda x, y: tl.scaled_dot_product_attention(x, y, x),
}


@pytest.mark.parametrize("op", MIXED)
def test_products_and_layers_refuse_mixed_floats_by_name(op, cuda_or_numpy):
    x, y, ints = (Tensor(cuda_or_numpy.asarray(a)) for a in (F32, F64, INTS))
    for pair in ((x, y), (y, x)):
        with pytest.raises(TypeError, match=rf"^{op.strip()}: .* is float.*, .* is float.*use cast, or Module.to"):
            MIXED[op](*pair)
    assert MIXED[op](x, ints).dtype == np.float32
    assert MIXED[op](y, ints).dtype == np.float64
    if op == op.strip():
        assert MIXED[op](ints, y).dtype == np.float64


# -- what no tensor may be --

REFUSED = [
    np.ones(2, np.float16), np.float16(1), np.ones(2, np.longdouble), np.ones(2, np.complex64), 1j, "text", ["a"],
    object(), [None], None, np.array(["2020"], "M8[Y]"), b"x", {1: 2},
    np.ma.array([1.0, 2.0], mask=[True, False]),
]  # fmt: skip
MAKERS = {
    "Tensor": Tensor,
    "Parameter": nn.Parameter,
    "an operand": lambda x: Tensor([1.0]) + x,
    "an op": lambda x: tl.relu(x),
    "a product": lambda x: tl.matmul(Tensor([1.0, 2.0]), x),
    "record": lambda x: tl.record(x, (), None),
    "concatenate": lambda x: tl.concatenate([Tensor([1.0]), x]),
}


@pytest.mark.parametrize("data", REFUSED, ids=lambda x: str(getattr(x, "dtype", x))[:20])
@pytest.mark.parametrize("make", MAKERS)
def test_what_is_no_number_or_too_short_is_refused_everywhere(make, data):
    if make in ("an operand", "concatenate") and isinstance(data, np.float16):
        data = np.full(1, data)  # or it is a number, which takes the tensor's dtype
    with pytest.raises(TypeError, match="expected numbers|expected float32 or float64, or bfloat16 on a GPU"):
        MAKERS[make](data)


def test_what_numpy_takes_as_an_array_is_taken():
    class Series:
        def __array__(self, dtype=None, copy=None):
            return np.array([1.0, 2.0], dtype)

        def mask(self):
            """As a data frame's column has one, which is no masked array."""

    assert Tensor(Series()).data.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("dtype", [np.float16, "float16", complex, "longdouble"])
def test_such_a_dtype_is_refused_where_it_is_asked_for(dtype):
    with pytest.raises(TypeError, match="expected float32 or float64"):
        Tensor([1.0], dtype=dtype)
    with pytest.raises(TypeError, match="cast: expected a floating-point dtype"):
        tl.cast(Tensor([1.0]), dtype)


def test_foreign_byte_order_becomes_the_machines():
    swapped = np.arange(3, dtype=np.float32).astype(np.dtype(np.float32).newbyteorder())
    for y in (Tensor(swapped), Tensor(np.ones(3, np.float32)) * swapped, tl.gelu(swapped)):
        assert y.dtype == np.float32
        assert y.dtype.isnative
    np.testing.assert_array_equal(Tensor(swapped).data, [0, 1, 2])


def test_dtypes_are_numpys_own():
    """By identity: ops recognise equal dtypes so, and take a longer way for others."""
    single = np.dtype(np.float32)
    unpickled = pickle.loads(pickle.dumps(np.ones(2, np.float32)))
    assert unpickled.dtype is not single
    for y in (
        Tensor([1.0]),
        Tensor(np.ones(2), dtype=np.float32),
        Tensor(np.ones(2), dtype="<f4"),
        tl.cast([1.0], "f4"),
    ):
        assert y.dtype is single
    x = Tensor(unpickled)
    for y in (x + x, x * np.ones(2), x / [1, 2], tl.linear([x.data], [x.data]), x @ x):
        assert y.dtype in (np.float32, np.float64)


def test_integers_that_nothing_holds_are_refused():
    with pytest.raises(TypeError, match="add: no integers hold both"):
        Tensor(np.ones(2, np.uint64)) + np.ones(2, np.int64)


def test_gradients_have_the_dtype_of_their_tensor():
    x, y = Tensor(F32, requires_grad=True), Tensor(F64, requires_grad=True)
    (x * y * 2 + INTS * x).sum().backward()
    assert (x.grad.dtype, y.grad.dtype) == (np.float32, np.float64)


def test_bfloat16_is_the_narrowest_float():
    bfloat16 = known(pytest.importorskip("ml_dtypes").bfloat16)
    low, single, ints = np.ones(2, bfloat16), np.ones(2, np.float32), np.ones(2, np.int64)
    assert common([low, low]) == common([low, ints]) == common([low], [2]) == bfloat16
    assert common([low, single]) == np.float32
    x = Tensor(low)
    for y in (x * 0.1, 0.1 + x, x * True, x * ints, x**2, x**0.5, x.mean(), x.sum(), x / 3, x.relu()):
        assert y.dtype == bfloat16
    for op in (tl.sigmoid, tl.silu, tl.var, tl.std, tl.min, lambda x: x**x, lambda x: 2**x, lambda x: x.cumsum(0)):
        assert op(x).dtype == bfloat16
    for y in (x.clip(0.1), tl.maximum(x, 0.5)):
        assert y.dtype == bfloat16
    assert math.isclose(Tensor(np.ones(4096, bfloat16)).sum().item(), 4096)


@pytest.fixture(params=["numpy", "stand-in", pytest.param("gpu", marks=pytest.mark.gpu)])
def cuda_or_numpy(request):
    """NumPy's backend, and CuPy's over the stand-in and where there is a GPU."""
    if request.param == "numpy":
        return get_backend("numpy")
    if request.param == "stand-in":
        return request.getfixturevalue("device")
    try:
        return get_backend("cupy")
    except tl.BackendError as error:
        pytest.skip(str(error))
