"""The products by cuBLAS: values, which operands are copied, how many calls it takes, and what the stand-in refuses."""

import bisect
import inspect
import itertools
import re
import threading
import types
import warnings

import ml_dtypes
import numpy as np
import pytest
import strict_cublas
from strict_cublas import MisuseError
from tolerances import TOLERANCES, assert_close

from tensorlite import BackendError, get_backend
from tensorlite.backends.cuda.cublas import Gemm

F32, F64, BF16 = np.dtype(np.float32), np.dtype(np.float64), np.dtype(ml_dtypes.bfloat16)
BF16_ROUNDING = 2**-8  # of a result: bfloat16 has 8 bits


class Array:
    """What the products use of cupy.ndarray, over a NumPy array on a `Device`."""

    def __init__(self, device, inner):
        self.device, self.inner = device, inner
        self.shape, self.strides, self.dtype, self.itemsize = inner.shape, inner.strides, inner.dtype, inner.itemsize
        self.data = types.SimpleNamespace(ptr=inner.ctypes.data)

    def astype(self, dtype, copy):
        assert not copy
        return self if self.dtype == dtype else self.device.copy(self.inner.astype(dtype), "astype")

    def swapaxes(self, i, j):
        return Array(self.device, self.inner.swapaxes(i, j))

    def __setitem__(self, index, value):
        self.device.log.append("assign")
        self.inner[index] = value.inner if isinstance(value, Array) else value


class Device:
    """What the products use of the module cupy, and its memory. `log` lists what it is asked to do, and products."""

    def __init__(self):
        self.memory, self.log, self.stream = [], [], 0
        self.cuda = types.SimpleNamespace(get_current_stream=lambda: types.SimpleNamespace(ptr=self.stream))

    def empty(self, shape, dtype):
        """Full of bytes of ones, which are NaN in every float, in an allocation of its own."""
        dtype = np.dtype(dtype)
        memory = np.full(int(np.prod(shape)) * dtype.itemsize, 255, np.uint8)
        if memory.size:
            bisect.insort(self.memory, memory, key=lambda x: x.ctypes.data)
        return Array(self, memory.view(dtype).reshape(shape))

    def put(self, x, layout=None):
        """The values of x on the device, in a layout."""
        layout = layout or contiguous
        return Array(self, layout(lambda shape, dtype: self.empty(shape, dtype).inner, x))

    def find_allocation(self, pointer):
        at = bisect.bisect_right(self.memory, pointer, key=lambda x: x.ctypes.data) - 1
        memory = self.memory[at] if at >= 0 else None
        return memory if memory is not None and pointer < memory.ctypes.data + memory.size else None

    def copy(self, x, what):
        self.log.append(what)
        y = self.empty(x.shape, x.dtype)
        y.inner[...] = x
        return y

    def ascontiguousarray(self, x):
        return x if x.inner.flags.c_contiguous else self.copy(x.inner, "copy")

    def matmul(self, a, b):
        return self.copy(np.matmul(a.inner, b.inner), "matmul")

    def launch(self, name, function, arrays_read, arrays_written):
        self.log.append(name)
        function()

    def take_log(self):
        log, self.log = self.log, []
        return log


@pytest.fixture
def device(monkeypatch):
    device = Device()
    monkeypatch.setattr(strict_cublas, "find_allocation", device.find_allocation)
    monkeypatch.setattr(strict_cublas, "current_stream", lambda: device.stream)
    monkeypatch.setattr(strict_cublas, "launch", device.launch)
    return device


@pytest.fixture
def gemm(device):
    return Gemm(device, strict_cublas.MODULE, tf32=False)


# Layouts: arrays with the values of x, made by slicing and transposing what an array module's `empty` gives.


def filled(empty, x, shape, view):
    """A view of a new array of this shape, with the values of x."""
    y = view(empty(shape, x.dtype))
    y[...] = x
    return y


def contiguous(empty, x):
    return filled(empty, x, x.shape, lambda y: y)


def column_major(empty, x):
    return filled(empty, x, (*x.shape[:-2], *x.shape[:-3:-1]), lambda y: y.swapaxes(-1, -2))


def part_of_columns(empty, x):
    return filled(empty, x, (*x.shape[:-1], x.shape[-1] + 3), lambda y: y[..., 2:-1])


def part_of_rows_column_major(empty, x):
    return filled(
        empty, x, (*x.shape[:-2], x.shape[-1], x.shape[-2] + 3), lambda y: y[..., 1 : 1 + x.shape[-2]].swapaxes(-1, -2)
    )


def packed_heads(empty, x):
    """x (..., T, D) as k in a packed (T, 3, ..., D)."""
    *batch, T, D = x.shape
    axes = (*range(1, 1 + len(batch)), 0, 1 + len(batch))
    return filled(empty, x, (T, 3, *batch, D), lambda y: y[:, 1].transpose(axes))


def every_second_row(empty, x):
    return filled(empty, x, (*x.shape[:-2], 2 * x.shape[-2], x.shape[-1]), lambda y: y[..., ::2, :])


def every_second(empty, x):
    return filled(empty, x, (*x.shape[:-2], 2 * x.shape[-2], 2 * x.shape[-1]), lambda y: y[..., ::2, ::2])


def rows_reversed(empty, x):
    return filled(empty, x, x.shape, lambda y: y[..., ::-1, :])


def batch_reversed(empty, x):
    return filled(empty, x, x.shape, lambda y: y[::-1])


READY = [contiguous, column_major, part_of_columns, part_of_rows_column_major, packed_heads, every_second_row]
TO_COPY = [every_second, rows_reversed, batch_reversed]
LAYOUTS = READY + TO_COPY
M, K, N = 4, 3, 5  # all above 1: an axis of one element has no stride to get in the way
DTYPES = [(F64, F64), (F32, F32), (BF16, BF16), (BF16, F32)]
IDS = [f"{x}-{y}" for x, y in DTYPES]


def numbers(shape, dtype, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def reference(a, b, trans_a, trans_b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a.mT if trans_a else a) @ (b.mT if trans_b else b)


def assert_product(got, expected, what=""):
    """`expected` is in float64."""
    if got.dtype != BF16:
        assert_close(got, expected.astype(got.dtype), what)
        return
    assert got.shape == expected.shape, what
    np.testing.assert_allclose(got.astype(np.float64), expected, BF16_ROUNDING, TOLERANCES[F32][1], err_msg=what)


# How the result is asked for: the layout of out, or none, and accumulate.
OUTPUTS = [(layout, add) for layout in (contiguous, column_major, packed_heads, every_second) for add in (False, True)]


def cases(dtype, out_dtype, trans):
    """(name, x, layout of x, y, layout of y, layout of out or None, accumulate, what out held, the result)."""
    shapes = [(2, *(shape[::-1] if t else shape)) for shape, t in zip([(M, K), (K, N)], trans, strict=True)]
    x, y = (numbers(shape, dtype, seed) for seed, shape in enumerate(shapes))
    expected = reference(x, y, *trans)
    before = numbers(expected.shape, out_dtype, 2)
    result = {False: expected, True: before.astype(F64) + expected}
    for i, (layout_x, layout_y) in enumerate(itertools.product(LAYOUTS, LAYOUTS)):
        for layout, accumulate in [(None, False), OUTPUTS[i % len(OUTPUTS)]]:  # 9 layouts: each meets all 8
            name = f"{layout_x.__name__}, {layout_y.__name__}, {layout and layout.__name__}, {accumulate}"
            yield name, x, layout_x, y, layout_y, layout, accumulate, before, result[accumulate]


TRANSPOSES = list(itertools.product([False, True], repeat=2))


@pytest.mark.parametrize("trans", TRANSPOSES, ids=lambda trans: "".join("NT"[t] for t in trans))
@pytest.mark.parametrize(("dtype", "out_dtype"), DTYPES, ids=IDS)
def test_every_layout(device, gemm, dtype, out_dtype, trans):
    """Operands, results and sums in every layout: the values, which of them are copied, and one call for each."""
    for name, x, layout_x, y, layout_y, layout, accumulate, before, result in cases(dtype, out_dtype, trans):
        out = layout and device.put(before, layout)
        got = gemm(
            device.put(x, layout_x), device.put(y, layout_y), *trans, out=out, accumulate=accumulate, dtype=out_dtype
        )
        assert got.dtype == out_dtype, name
        assert out is None or got is out, name
        assert_product(got.inner, result, name)
        copies = (layout_x in TO_COPY) + (layout_y in TO_COPY) + (layout in TO_COPY and accumulate)
        log = ["copy"] * copies + ["gemm_strided_batched_ex"] + ["assign"] * (layout in TO_COPY)
        assert device.take_log() == log, name


# -- batches --

PLAIN, BATCHED = "gemm_ex", "gemm_strided_batched_ex"


def heads(device, B, T, H, D, dtype=F32):  # noqa: N803
    """Three arrays (B, H, T, D) in one (B, T, 3, H, D), as the model's q, k and v."""
    packed = device.put(numbers((B, T, 3, H, D), dtype)).inner
    return [Array(device, packed[:, :, i].swapaxes(1, 2)) for i in range(3)]


@pytest.mark.parametrize(("B", "H", "calls"), [(2, 5, 2), (5, 2, 2), (1, 4, 1), (4, 1, 1), (1, 1, 1)])
def test_packed_heads(device, gemm, B, H, calls):  # noqa: N803
    """The products of attention and its gradients read and write packed heads in place, in min(B, H) calls."""
    T, D = 6, 4
    q, k, v = heads(device, B, T, H, D)
    gq, gk, gv = heads(device, B, T, H, D)
    call = PLAIN if B * H == 1 else BATCHED

    scores = gemm(q, k, trans_b=True)
    assert_product(scores.inner, reference(q.inner, k.inner, False, True))
    for x, y, trans_x, out in [(scores, v, False, gq), (scores, q, True, gk), (scores, v, True, gv)]:
        assert gemm(x, y, trans_a=trans_x, out=out) is out
        assert_product(out.inner, reference(x.inner, y.inner, trans_x, False))
    assert device.log == [call] * (4 * calls)


BATCHES = {  # shapes, how each is made of contiguous memory, transpositions, calls
    "2-D b": ((2, 3, 4, 5), (5, 6), {}, [PLAIN]),
    "2-D b transposed": ((2, 3, 4, 5), (6, 5), {"trans_b": True}, [PLAIN]),
    "a batch of one b": ((2, 3, 4, 5), (1, 1, 5, 6), {}, [PLAIN]),
    "rows of one, 2-D b": ((7, 1, 5), (5, 6), {}, [PLAIN]),
    "columns of one, 2-D b": ((7, 4, 5), (5, 1), {}, [PLAIN]),
    "inner length one, 2-D b": ((7, 4, 1), (1, 6), {}, [PLAIN]),
    "a transposed, 2-D b": ((7, 5, 4), (5, 6), {"trans_a": True}, [BATCHED]),
    "a transposed of one row, 2-D b": ((7, 5, 1), (5, 6), {"trans_a": True}, [PLAIN]),
    "2-D a": ((4, 5), (2, 3, 5, 6), {}, [BATCHED]),
    "2-D a and b": ((4, 5), (5, 6), {}, [PLAIN]),
    "equal batches": ((2, 3, 4, 5), (2, 3, 5, 6), {}, [BATCHED]),
    "batches of one": ((1, 1, 4, 5), (1, 5, 6), {}, [PLAIN]),
    "b repeats over the outer axis": ((2, 3, 4, 5), (3, 5, 6), {}, [BATCHED] * 2),
    "b repeats over the inner axis": ((2, 3, 4, 5), (2, 1, 5, 6), {}, [BATCHED]),
    "each repeats": ((2, 1, 4, 5), (1, 3, 5, 6), {}, [BATCHED] * 2),
    "each repeats, longer first": ((4, 1, 4, 5), (1, 3, 5, 6), {}, [BATCHED] * 3),
    "three axes": ((2, 1, 3, 4, 5), (1, 4, 1, 5, 6), {}, [BATCHED] * 2),
}


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("case", BATCHES)
def test_batches(device, gemm, case, dtype):
    """Leading axes broadcast, without a copy, in as few calls as strides allow; also into larger elements."""
    a, b, trans, calls = BATCHES[case]
    x, y = numbers(a, dtype), numbers(b, dtype, 1)
    got = gemm(device.put(x), device.put(y), dtype=F32, **trans)
    assert_product(got.inner, reference(x, y, trans.get("trans_a", False), trans.get("trans_b", False)))
    assert got.inner.flags.c_contiguous
    assert device.log == calls


def test_rows_that_are_not_one_matrix(device, gemm):
    """Rows that do not go on in equal steps from one batch to the next stay a batch."""
    a = Array(device, device.put(numbers((3, 6, 5), F32)).inner[:, :4])
    b = device.put(numbers((5, 2), F32))
    assert_product(gemm(a, b).inner, reference(a.inner, b.inner, False, False))
    assert device.log == [BATCHED]


@pytest.mark.parametrize(("shape", "strides", "log"), [
    ((3, 4, 5), (0, 20, 4), [BATCHED]),  # the same matrix three times
    ((3, 1, 5), (0, 20, 4), [BATCHED]),
    ((4, 5), (0, 4), ["copy", PLAIN]),  # the same row
    ((4, 5), (4, 0), ["copy", PLAIN]),
    ((4, 5), (0, 0), ["copy", PLAIN]),
    ((4, 5), (4, 4), ["copy", PLAIN]),  # rows that overlap
    ((3, 4, 5), (0, 0, 4), ["copy", PLAIN]),
    ((4, 5), (20, -4), ["copy", PLAIN]),
])  # fmt: skip
def test_repeated_elements(device, gemm, shape, strides, log):
    """Zero strides are read in place between matrices and copied within them, in either operand."""
    memory = device.put(numbers(40, F32)).inner
    x = np.lib.stride_tricks.as_strided(memory[8:], shape, strides)
    b = numbers((shape[-1], 2), F32)
    assert_product(gemm(Array(device, x), device.put(b)).inner, reference(x, b, False, False))
    assert device.take_log() == log
    a = numbers((2, shape[-2]), F32)
    assert_product(gemm(device.put(a), Array(device, x)).inner, reference(a, x, False, False))
    assert device.log == [*log[:-1], BATCHED if len(shape) == 3 else PLAIN]


@pytest.mark.parametrize("trans", TRANSPOSES)
def test_axes_of_length_one(device, gemm, trans):
    """Whatever their strides say, which is anything."""
    for m, k, n, batch, junk in itertools.product([1, 2], [1, 2], [1, 2], [1, 3], [0, 4, -4, 12, 1000]):
        x, y = numbers((batch, *((k, m) if trans[0] else (m, k))), F32), numbers((n, k) if trans[1] else (k, n), F32, 1)
        a, b, out = device.put(x), device.put(y), device.put(np.ones((batch, m, n), F32))
        for array in (a, b, out):
            array.strides = tuple(
                junk if length == 1 else step for length, step in zip(array.shape, array.strides, strict=True)
            )
        gemm(a, b, *trans, out=out, accumulate=True)
        assert_product(out.inner, reference(x, y, *trans) + 1, f"{m, k, n, batch, junk}")
    assert set(device.log) <= {PLAIN, BATCHED}


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(("a", "b"), [
    ((0, 3), (3, 2)), ((4, 3), (3, 0)), ((4, 0), (0, 2)), ((0, 0), (0, 0)), ((0, 4, 3), (3, 2)), ((2, 4, 0), (2, 0, 5)),
    ((2, 0, 4, 3), (1, 3, 2)),
])  # fmt: skip
def test_empty(device, gemm, a, b, accumulate):
    """Nothing to make is no call; a sum of nothing is zero, or leaves `out` as it is."""
    a, b = device.put(np.ones(a, F32)), device.put(np.ones(b, F32))
    expected = np.matmul(a.inner, b.inner)
    got = gemm(a, b)
    assert got.dtype == F32
    np.testing.assert_array_equal(got.inner, expected)
    out = device.put(np.full(expected.shape, 7, F32))
    assert gemm(a, b, out=out, accumulate=accumulate) is out
    np.testing.assert_array_equal(out.inner, expected + 7 * accumulate)
    assert set(device.log) <= {"assign"}


def test_random_layouts(device, gemm):
    """Arrays cut, turned, repeated and reversed at random."""
    rng = np.random.default_rng(0)

    def any_view(shape):
        """An array of this shape that looks at a larger one in some order, or repeats."""
        repeated = [n > 0 and rng.random() < 0.1 for n in shape]
        order = rng.permutation(len(shape)) if rng.random() < 0.5 else np.arange(len(shape))
        sizes = [(1 if repeated[i] else shape[i]) * rng.choice([1, 1, 2]) + rng.choice([0, 0, 2]) for i in order]
        x = device.put(rng.standard_normal(sizes)).inner.transpose(np.argsort(order))
        for axis, n in enumerate(shape):
            n = 1 if repeated[axis] else n
            step = x.shape[axis] // n if rng.random() < 0.3 else 1
            index = (
                slice(None, n * step, step) if rng.random() < 0.9 else slice(n - 1, None, -1) if n > 1 else slice(0, 1)
            )
            x = x[(slice(None),) * axis + (index,)]
        return Array(device, np.broadcast_to(x, shape))

    for case in range(400):
        batch = tuple(rng.choice([1, 2, 3, 4], rng.integers(0, 4)))
        m, k, n = (int(i) for i in rng.choice([1, 2, 3, 5], 3))
        trans = tuple(bool(i) for i in rng.integers(0, 2, 2))
        shapes = []
        for shape, t in (((m, k), trans[0]), ((k, n), trans[1])):
            own = tuple(int(i) if rng.random() < 0.7 else 1 for i in batch)[rng.integers(0, len(batch) + 1) :]
            shapes.append((*own, *(shape[::-1] if t else shape)))
        a, b = map(any_view, shapes)
        expected = reference(a.inner, b.inner, *trans)
        assert_product(gemm(a, b, *trans).inner, expected, f"{case}: {shapes} {trans}")
        out = Array(device, device.put(np.ones((*expected.shape, 1))).inner[..., 0])
        if rng.random() < 0.5:  # a part of an array with its axes in any order
            order = rng.permutation(expected.ndim)
            wide = device.put(np.ones([expected.shape[i] + int(rng.integers(0, 2)) for i in order])).inner
            out = Array(device, wide.transpose(np.argsort(order))[tuple(map(slice, expected.shape))])
        gemm(a, b, *trans, out=out, accumulate=True)
        assert_product(out.inner, expected + 1, f"{case}: {shapes} {trans} into {out.strides}")


# -- dtypes and arguments --


@pytest.mark.parametrize(("a", "b", "result"), [(F32, F64, F64), (F64, F32, F64), (BF16, F32, F32), (F64, BF16, F64)])
def test_mixed_dtypes(device, gemm, a, b, result):
    x, y = numbers((M, K), a), numbers((K, N), b, 1)
    got = gemm(device.put(x), device.put(y))
    assert got.dtype == result
    assert_product(got.inner, reference(x, y, False, False))
    assert device.log == ["astype", PLAIN]


@pytest.mark.parametrize("dtype", [np.dtype(np.int64), np.dtype(np.float16)])
def test_other_dtypes_are_left_to_cupy(device, gemm, dtype):
    x, y = np.arange(6).reshape(3, 2).astype(dtype), np.arange(12).reshape(4, 3).astype(dtype)
    a, b = device.put(x), device.put(y)
    got = gemm(a, b, trans_a=True, trans_b=True)
    assert_close(got.inner, (y @ x).T)
    out = device.put(np.zeros((2, 4), dtype))
    assert gemm(a, b, trans_a=True, trans_b=True, out=out) is out
    assert_close(out.inner, (y @ x).T)
    assert gemm(a, b, trans_a=True, trans_b=True, dtype=np.float32).dtype == F32
    assert set(device.log) == {"matmul", "assign", "astype"}
    with pytest.raises(TypeError, match=f"cannot add a product of {dtype} to an out of {dtype}"):
        gemm(a, b, trans_a=True, trans_b=True, out=out, accumulate=True)


def test_results_of_other_dtypes(device, gemm):
    """A result in a dtype that cuBLAS does not make of these inputs is converted to it."""
    x, y = numbers((M, K), F32), numbers((K, N), F32, 1)
    expected = reference(x, y, False, False)
    assert_close(gemm(device.put(x), device.put(y), dtype="float64").inner.astype(F32), expected.astype(F32))
    out = device.put(np.zeros((M, N), BF16))
    assert_product(gemm(device.put(x), device.put(y), out=out).inner, expected)
    assert device.log == [PLAIN, "astype", PLAIN, "assign"]


def test_tf32(device, gemm):
    """Float32 products of inputs rounded to 10 bits, while it is set; no others."""
    x, y = numbers((M, 50), F32), numbers((50, N), F32, 1)
    exact = gemm(device.put(x), device.put(y)).inner
    double = gemm(device.put(x.astype(F64)), device.put(y.astype(F64))).inner
    half = gemm(device.put(x.astype(BF16)), device.put(y.astype(BF16))).inner
    gemm.tf32 = True
    rounded = gemm(device.put(x), device.put(y)).inner
    error = np.abs(rounded - exact)
    assert error.max() > 1e-5
    assert (error <= 2**-10 * (np.abs(x) @ np.abs(y))).all()  # two factors, each wrong by 2**-11
    assert (gemm(device.put(x.astype(F64)), device.put(y.astype(F64))).inner == double).all()
    assert (gemm(device.put(x.astype(BF16)), device.put(y.astype(BF16))).inner == half).all()


@pytest.mark.parametrize(("a", "b", "trans", "out", "what"), [
    ((4, 3), (4, 5), (False, False), None, "got a (4, 3), b (4, 5)"),
    ((4, 3), (3, 5), (True, False), None, "got a (4, 3) transposed, b (3, 5)"),
    ((2, 4, 3), (3, 3, 5), (False, False), None, "got a (2, 4, 3), b (3, 3, 5)"),
    ((4, 3), (3, 5), (False, False), (5, 4), "got a (4, 3), b (3, 5) and out (5, 4)"),
    ((2, 4, 3), (3, 5), (False, False), (4, 5), "out (4, 5)"),
    ((3,), (3, 5), (False, False), None, "got a (3,)"),
])  # fmt: skip
def test_wrong_shapes(device, gemm, a, b, trans, out, what):
    out = out and device.put(np.zeros(out, F32))
    with pytest.raises(ValueError, match=re.escape(what)):
        gemm(device.put(np.zeros(a, F32)), device.put(np.zeros(b, F32)), *trans, out=out)
    assert device.log == []


def test_accumulate_needs_out(device, gemm):
    x = device.put(np.zeros((2, 2), F32))
    with pytest.raises(TypeError, match="accumulate adds to out"):
        gemm(x, x, accumulate=True)


# -- the handle, streams and threads --


class Recorder:
    """The stand-in's module; `calls` lists what was called, and with what beside the handle."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        found = getattr(strict_cublas.MODULE, name)
        if not inspect.isfunction(found):
            return found

        def call(*args):
            self.calls.append((name, args[1:]))
            return found(*args)

        return call


def test_nothing_happens_before_the_first_product(device):
    Gemm(device, Recorder(), tf32=False)
    assert device.memory == []


def test_streams(device):
    """A new stream is set together with a workspace, its own; the same one is not set again."""
    recorder = Recorder()
    gemm = Gemm(device, recorder, tf32=False)
    x = device.put(numbers((3, 3), F32))

    def calls(stream):
        recorder.calls.clear()
        device.stream = stream
        gemm(x, x)
        return [name for name, _ in recorder.calls], [args for name, args in recorder.calls if name.startswith("set_")]

    names, (stream, workspace) = calls(0)
    assert names == ["create", "set_stream", "set_workspace", PLAIN]
    assert stream == (0,)
    assert workspace[1] == 32 << 20
    assert calls(0) == ([PLAIN], [])
    names, (stream, other) = calls(512)
    assert names == ["set_stream", "set_workspace", PLAIN]
    assert stream == (512,)
    assert other != workspace
    assert calls(512) == ([PLAIN], [])
    assert calls(0)[1] == [(0,), workspace]


def test_threads(device, monkeypatch):
    """A thread on another stream waits until a product is under way before it sets its own."""
    streams = threading.local()
    device.cuda.get_current_stream = lambda: types.SimpleNamespace(ptr=streams.own)
    monkeypatch.setattr(strict_cublas, "current_stream", lambda: streams.own)
    first_has_set, second_has_set, failures = threading.Event(), threading.Event(), []

    class Slow(Recorder):
        def set_workspace(self, *args):
            strict_cublas.set_workspace(*args)
            if streams.own == 1:
                first_has_set.set()
                second_has_set.wait(0.1)  # not for ever: it should not come
            else:
                second_has_set.set()

    gemm = Gemm(device, Slow(), tf32=False)
    x = device.put(numbers((3, 3), F32))

    def work(stream):
        streams.own = stream
        if stream == 2:
            first_has_set.wait()
        try:
            gemm(x, x)
        except AssertionError as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(stream,)) for stream in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert device.log == [PLAIN, PLAIN]


def test_a_failure_leaves_no_stream_half_set(device):
    """If the workspace cannot be set, the next product sets the stream again."""
    recorder = Recorder()
    gemm = Gemm(device, recorder, tf32=False)
    x = device.put(numbers((3, 3), F32))
    gemm(x, x)
    device.stream = 512
    recorder.set_workspace = lambda *_: [][0]
    with pytest.raises(IndexError):
        gemm(x, x)
    del recorder.set_workspace
    for device.stream in (0, 512):
        gemm(x, x)
    assert device.log == [PLAIN] * 3


def test_a_product_can_be_replayed(device, gemm, monkeypatch):
    """What `launch` is given computes from the memory as it is then: how a captured graph behaves."""
    recorded = []
    monkeypatch.setattr(strict_cublas, "launch", lambda *args: recorded.append(args))
    a, b, out = (
        device.put(numbers((2, M, K), F32)),
        device.put(numbers((K, N), F32)),
        device.put(np.zeros((2, M, N), F32)),
    )
    gemm(a, b, out=out)
    gemm(a, b, out=out, accumulate=True)
    assert not out.inner.any()
    for seed in range(2):
        a.inner[...] = numbers(a.shape, F32, seed)
        for _, function, _, _ in recorded:
            function()
        assert_product(out.inner, 2 * reference(a.inner, b.inner, False, False))
    (_, _, first_read, written), (_, _, second_read, _) = recorded
    assert np.shares_memory(written[0], out.inner)
    assert [any(np.shares_memory(x, y.inner) for x in first_read) for y in (a, b, out)] == [True, True, False]
    assert any(np.shares_memory(x, out.inner) for x in second_read)


# -- the stand-in --


@pytest.fixture
def call(device):
    """A correct batched call of two products, 4 by 3 by 5, with the arguments that are named changed."""
    a, b, c = (device.put(np.ones(size, F32)).data.ptr for size in (2 * 4 * 5, 2 * 5 * 3, 2 * 4 * 3))
    workspace = device.empty(1024, np.uint8)
    handle = strict_cublas.create()
    strict_cublas.set_stream(handle, 0)
    strict_cublas.set_workspace(handle, workspace.data.ptr, 1024)
    scalars = np.array([1, 0], F32)
    one, zero = scalars.ctypes.data, scalars.ctypes.data + 4
    correct = {
        "handle": handle, "transa": 0, "transb": 0, "m": 4, "n": 3, "k": 5, "alpha": one,
        "a": a, "atype": 0, "lda": 4, "stride_a": 20, "b": b, "btype": 0, "ldb": 5, "stride_b": 15, "beta": zero,
        "c": c, "ctype": 0, "ldc": 4, "stride_c": 12, "batch_count": 2, "compute_type": 68, "algo": -1,
    }  # fmt: skip

    def call(scalars=scalars, **changed):
        strict_cublas.MODULE.gemm_strided_batched_ex(**correct | changed)

    call.correct = correct
    return call


def test_the_correct_call(device, call):
    call()
    assert device.log == [BATCHED]
    assert (device.find_allocation(call.correct["c"]).view(F32) == 5).all()


REFUSED = {
    "a wrong handle": ({"handle": 7}, "the handle 7 was not created"),
    "a short leading dimension of A": ({"lda": 3}, "A: the leading dimension 3 is less than the 4 rows"),
    "a short leading dimension of B": ({"ldb": 4}, "B: the leading dimension 4 is less than the 5 rows"),
    "a short leading dimension of C": ({"ldc": 3}, "C: the leading dimension 3 is less than the 4 rows"),
    "A transposed, with the leading dimension of before": ({"transa": 1}, "less than the 5 rows"),
    "A beyond its memory": ({"lda": 5}, "A: bytes 0 to "),
    "the second A beyond its memory": ({"stride_a": 21}, "A: bytes 0 to 164 of 160"),
    "B beyond its memory": ({"stride_b": 16}, "B: bytes 0 to 124 of 120"),
    "C beyond its memory": ({"batch_count": 3, "stride_a": 0, "stride_b": 0}, "C: bytes 0 to 144 of 96"),
    "a null pointer": ({"a": 0}, "A: address 0x0 is in no allocation"),
    "a pointer that is not a number": ({"a": 0.0}, "A: the pointer is a float"),
    "results that overlap": ({"stride_c": 8}, "the results overlap"),
    "one result twice": ({"stride_c": 0}, "the results overlap"),
    "a negative stride": ({"stride_a": -20}, "A: the stride -20 is negative"),
    "two dtypes of inputs": ({"btype": 1}, "b_type=1"),
    "a compute type of another dtype": ({"compute_type": 70}, "compute=70, a_type=0"),
    "an unknown dtype": ({"atype": 5, "btype": 5}, "a_type=5"),
    "a result of another dtype": ({"ctype": 14}, "c_type=14"),
    "bfloat16 by TF32": ({"atype": 14, "btype": 14, "compute_type": 77}, "compute=77, a_type=14"),
    "an unknown operation": ({"transb": 9}, "the operations are 0 and 9"),
    "an unknown algorithm": ({"algo": 24}, "the algorithm is 24"),
    "a number beyond int": ({"ldc": 2**31}, "do not all fit an int"),
    "no rows": ({"m": 0}, "nothing to do"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(device, call, case):
    changed, what = REFUSED[case]
    with pytest.raises(MisuseError, match=re.escape(what)):
        call(**changed)
    assert device.log == []


def test_an_overwritten_input_is_refused(call):
    with pytest.raises(MisuseError, match="C overwrites A"):
        call(c=call.correct["a"])
    with pytest.raises(MisuseError, match="C overwrites B"):
        call(c=call.correct["b"] + 4)


def test_interleaved_results_are_not_refused(device, call):
    """Two results of 4 rows in columns of 8: apart by less than a matrix, and they do not meet."""
    call(c=device.put(np.zeros(32, F32)).data.ptr, ldc=8, stride_c=4)
    with pytest.raises(MisuseError, match="the results overlap"):
        call(c=device.put(np.zeros(32, F32)).data.ptr, ldc=8, stride_c=3)
    with pytest.raises(MisuseError, match="the results overlap"):
        call(c=device.put(np.zeros(32, F32)).data.ptr, ldc=8, stride_c=5)


def test_states_that_are_refused(device, call):
    handle = call.correct["handle"]
    device.stream = 512
    with pytest.raises(MisuseError, match="set to stream 0x0, the current is 0x200"):
        call()
    strict_cublas.set_stream(handle, 512)
    with pytest.raises(MisuseError, match="no workspace was set since the stream was"):
        call()
    workspace = device.empty(64, np.uint8)
    with pytest.raises(MisuseError, match="workspace: bytes 0 to 65 of 64"):
        strict_cublas.set_workspace(handle, workspace.data.ptr, 65)
    strict_cublas.set_workspace(handle, workspace.data.ptr, 64)
    call()
    device.memory = [memory for memory in device.memory if memory.ctypes.data != workspace.data.ptr]
    with pytest.raises(MisuseError, match="workspace: address .* is in no allocation"):
        call()
    with pytest.raises(AttributeError):
        strict_cublas.MODULE.sgemm  # noqa: B018


def test_the_stand_in_has_the_names_and_arguments_of_the_binding():
    """Every function, its arguments in order and every number, where NVIDIA's binding is installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        real = pytest.importorskip("nvmath.bindings.cublas", exc_type=ImportError)
    for name, item in vars(strict_cublas.MODULE).items():
        if inspect.isfunction(item):
            signature = re.match(r"(\w+)\((.*)\)", getattr(real, name).__doc__)
            names = [argument.split()[-1] for argument in signature[2].split(", ") if argument]
            assert names == list(inspect.signature(item).parameters), name
        elif isinstance(item, type):
            for member in item:
                assert int(getattr(real, name)[member.name]) == member, member


# -- a GPU --


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "out_dtype"), DTYPES, ids=IDS)
def test_on_a_gpu(dtype, out_dtype):
    """The same table by cuBLAS itself, and a product in a captured graph."""
    try:
        cupy = get_backend("cupy").xp
    except BackendError as error:
        pytest.skip(str(error))
    from nvmath.bindings import cublas

    gemm = Gemm(cupy, cublas, tf32=False)
    for trans in TRANSPOSES:
        for name, x, layout_x, y, layout_y, layout, accumulate, before, result in cases(dtype, out_dtype, trans):
            a, b = layout_x(cupy.empty, cupy.asarray(x)), layout_y(cupy.empty, cupy.asarray(y))
            out = layout and layout(cupy.empty, cupy.asarray(before))
            got = gemm(a, b, *trans, out=out, accumulate=accumulate, dtype=out_dtype)
            assert_product(cupy.asnumpy(got), result, f"{trans} {name}")

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        a, b = cupy.asarray(numbers((2, M, K), dtype)), cupy.asarray(numbers((K, N), dtype, 1))
        out = gemm(a, b, dtype=out_dtype)
        stream.begin_capture()
        gemm(a, b, out=out)
        graph = stream.end_capture()
        a[...] = cupy.asarray(numbers((2, M, K), dtype, 2))
        graph.launch(stream)
        assert_product(cupy.asnumpy(out), reference(cupy.asnumpy(a), cupy.asnumpy(b), False, False))
