"""The products by cuBLAS: values, which operands are copied, how many calls it takes, and what the stand-in refuses."""

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
import strict_cuda
from strict_cuda import MisuseError
from strict_cupy import cupy, ndarray
from tolerances import TOLERANCES, assert_close

from tensorlite.backends.cuda.cublas import Gemm

F32, F64, BF16 = np.dtype(np.float32), np.dtype(np.float64), np.dtype(ml_dtypes.bfloat16)
BF16_ROUNDING = 2**-8  # of a result: bfloat16 has 8 bits
PLAIN, BATCHED, COPY, ASSIGN = "gemm_ex", "gemm_strided_batched_ex", "ascontiguousarray", "[]="  # as the log has them


@pytest.fixture(scope="module")
def gemm():
    """On the stand-ins' null stream."""
    return Gemm(cupy, strict_cublas.MODULE, tf32=False)


@pytest.fixture(scope="module", params=["stand-in", pytest.param("gpu", marks=pytest.mark.gpu)])
def either(request, gemm):
    """(cupy, products): of the stand-ins, and of the real ones where there is a GPU."""
    if request.param == "stand-in":
        return cupy, gemm
    xp = request.getfixturevalue("gpu").xp
    from nvmath.bindings import cublas

    return xp, Gemm(xp, cublas, tf32=False)


def multiply(gemm, *args, **options):
    """The product, and the names of what was launched for it."""
    with strict_cuda.logged() as log:
        product = gemm(*args, **options)
    return product, [name for name, *_ in log]


# name: the shape of a larger array for an x (*b, m, n), and the view of it that holds x
READY = {
    "contiguous": (lambda b, m, n: (*b, m, n), lambda y: y),
    "column_major": (lambda b, m, n: (*b, n, m), lambda y: y.swapaxes(-1, -2)),
    "part_of_columns": (lambda b, m, n: (*b, m, n + 3), lambda y: y[..., 2:-1]),
    "part_of_rows_column_major": (lambda b, m, n: (*b, n, m + 3), lambda y: y[..., 1:-2].swapaxes(-1, -2)),
    "packed_heads": (  # x (*b, T, D) as k in a packed (T, 3, *b, D)
        lambda b, m, n: (m, 3, *b, n),
        lambda y: y[:, 1].transpose(*range(1, y.ndim - 2), 0, y.ndim - 2),
    ),
    "every_second_row": (lambda b, m, n: (*b, 2 * m, n), lambda y: y[..., ::2, :]),
}
TO_COPY = {
    "every_second": (lambda b, m, n: (*b, 2 * m, 2 * n), lambda y: y[..., ::2, ::2]),
    "rows_reversed": (lambda b, m, n: (*b, m, n), lambda y: y[..., ::-1, :]),
    "batch_reversed": (lambda b, m, n: (*b, m, n), lambda y: y[::-1]),
}
LAYOUTS = READY | TO_COPY


def put(x, layout=None, cupy=cupy):
    """The values of x on the device, in a layout."""
    if layout is None:
        return cupy.asarray(x)
    shape, view = LAYOUTS[layout]
    y = view(cupy.empty(shape(x.shape[:-2], *x.shape[-2:]), x.dtype))
    y[...] = cupy.asarray(x)
    return y


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


# How the result is asked for: the layout of out, and accumulate.
OUTPUTS = list(itertools.product(["contiguous", "column_major", "packed_heads", "every_second"], [False, True]))
TRANSPOSES = list(itertools.product([False, True], repeat=2))


@pytest.mark.parametrize("trans", TRANSPOSES, ids=lambda trans: "".join("NT"[t] for t in trans))
@pytest.mark.parametrize(("dtype", "out_dtype"), DTYPES, ids=IDS)
def test_every_layout(either, dtype, out_dtype, trans):
    """Operands, results and sums in every layout: the values, which of them are copied, and one call for each."""
    xp, gemm = either
    shapes = [(2, *(shape[::-1] if t else shape)) for shape, t in zip([(M, K), (K, N)], trans, strict=True)]
    x, y = (numbers(shape, dtype, seed) for seed, shape in enumerate(shapes))
    expected, before = reference(x, y, *trans), numbers((2, M, N), out_dtype, 2)
    for i, (layout_x, layout_y) in enumerate(itertools.product(LAYOUTS, LAYOUTS)):
        for layout, accumulate in [(None, False), OUTPUTS[i % len(OUTPUTS)]]:  # 9 layouts: each meets all 8
            name = f"{layout_x}, {layout_y}, {layout}, {accumulate}"
            a, b, out = put(x, layout_x, xp), put(y, layout_y, xp), layout and put(before, layout, xp)
            got, log = multiply(gemm, a, b, *trans, out=out, accumulate=accumulate, dtype=out_dtype)
            assert got.dtype == out_dtype, name
            assert out is None or got is out, name
            assert_product(xp.asnumpy(got), expected + accumulate * before.astype(F64), name)
            copies = (layout_x in TO_COPY) + (layout_y in TO_COPY) + (layout in TO_COPY and accumulate)
            assert xp is not cupy or log == [COPY] * copies + [BATCHED] + [ASSIGN] * (layout in TO_COPY), name


def test_a_captured_graph_computes_from_the_memory_as_it_is_then(either):
    xp, gemm = either
    stream = xp.cuda.Stream(non_blocking=True)
    with stream:
        products = []
        for dtype, out_dtype in DTYPES:
            a, b = put(numbers((2, M, K), dtype), cupy=xp), put(numbers((K, N), dtype), cupy=xp)
            products.append((a, b, gemm(a, b, dtype=out_dtype)))
        stream.begin_capture()
        for a, b, out in products:
            gemm(a, b, out=out)
            gemm(a, b, out=out, accumulate=True)
        graph = stream.end_capture()
        for seed, (a, b, out) in itertools.product((1, 2), products):
            a[...] = put(numbers((2, M, K), a.dtype, seed), cupy=xp)
            graph.launch(stream)
            assert_product(xp.asnumpy(out), 2 * reference(xp.asnumpy(a), xp.asnumpy(b), False, False))


# -- batches --


def heads(B, T, H, D):  # noqa: N803
    """Three arrays (B, H, T, D) in one (B, T, 3, H, D), as the model's q, k and v."""
    packed = put(numbers((B, T, 3, H, D), F32))
    return [packed[:, :, i].swapaxes(1, 2) for i in range(3)]


@pytest.mark.parametrize(("B", "H", "calls"), [(2, 5, 2), (5, 2, 2), (1, 4, 1), (4, 1, 1), (1, 1, 1)])
def test_packed_heads(gemm, B, H, calls):  # noqa: N803
    """The products of attention and its gradients read and write packed heads in place, in min(B, H) calls."""
    q, k, v = heads(B, 6, H, 4)
    gq, gk, gv = heads(B, 6, H, 4)
    log = [PLAIN if B * H == 1 else BATCHED] * calls
    scores, launched = multiply(gemm, q, k, trans_b=True)
    assert launched == log
    assert_product(scores.inner, reference(q.inner, k.inner, False, True))
    for x, y, trans_x, out in [(scores, v, False, gq), (scores, q, True, gk), (scores, v, True, gv)]:
        got, launched = multiply(gemm, x, y, trans_a=trans_x, out=out)
        assert (got is out, launched) == (True, log)
        assert_product(out.inner, reference(x.inner, y.inner, trans_x, False))


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
@pytest.mark.parametrize(("a", "b", "trans", "calls"), BATCHES.values(), ids=BATCHES)
def test_batches(gemm, a, b, trans, calls, dtype):
    """Leading axes broadcast, without a copy, in as few calls as strides allow; also into larger elements."""
    x, y = numbers(a, dtype), numbers(b, dtype, 1)
    got, log = multiply(gemm, put(x), put(y), dtype=F32, **trans)
    assert_product(got.inner, reference(x, y, trans.get("trans_a", False), trans.get("trans_b", False)))
    assert got.inner.flags.c_contiguous
    assert log == calls


def test_rows_that_are_not_one_matrix(gemm):
    """Rows that do not go on in equal steps from one batch to the next stay a batch."""
    a, b = put(numbers((3, 6, 5), F32))[:, :4], put(numbers((5, 2), F32))
    got, log = multiply(gemm, a, b)
    assert_product(got.inner, reference(a.inner, b.inner, False, False))
    assert log == [BATCHED]


@pytest.mark.parametrize(("shape", "strides", "log"), [
    ((3, 4, 5), (0, 20, 4), [BATCHED]),  # the same matrix three times
    ((3, 1, 5), (0, 20, 4), [BATCHED]),
    ((4, 5), (0, 4), [COPY, PLAIN]),  # the same row
    ((4, 5), (4, 0), [COPY, PLAIN]),
    ((4, 5), (0, 0), [COPY, PLAIN]),
    ((4, 5), (4, 4), [COPY, PLAIN]),  # rows that overlap
    ((3, 4, 5), (0, 0, 4), [COPY, PLAIN]),
    ((4, 5), (20, -4), [COPY, PLAIN]),
])  # fmt: skip
def test_repeated_elements(gemm, shape, strides, log):
    """Zero strides are read in place between matrices and copied within them, in either operand."""
    x = np.lib.stride_tricks.as_strided(put(numbers(40, F32)).inner[8:], shape, strides)
    a, b = numbers((2, shape[-2]), F32), numbers((shape[-1], 2), F32)
    got, launched = multiply(gemm, ndarray(x), put(b))
    assert_product(got.inner, reference(x, b, False, False))
    assert launched == log
    got, launched = multiply(gemm, put(a), ndarray(x))
    assert_product(got.inner, reference(a, x, False, False))
    assert launched == [*log[:-1], BATCHED if len(shape) == 3 else PLAIN]


@pytest.mark.parametrize("trans", TRANSPOSES)
def test_axes_of_length_one(gemm, trans):
    """Whatever their strides say, which is anything."""
    for m, k, n, batch, junk in itertools.product([1, 2], [1, 2], [1, 2], [1, 3], [0, 4, -4, 12, 1000]):
        x, y = numbers((batch, *((k, m) if trans[0] else (m, k))), F32), numbers((n, k) if trans[1] else (k, n), F32, 1)
        arrays = [put(array).inner for array in (x, y, np.ones((batch, m, n), F32))]
        strides = [[junk if n == 1 else step for n, step in zip(z.shape, z.strides, strict=True)] for z in arrays]
        a, b, out = map(ndarray, map(np.lib.stride_tricks.as_strided, arrays, [z.shape for z in arrays], strides))
        assert [list(z.strides) for z in (a, b, out)] == strides
        _, log = multiply(gemm, a, b, *trans, out=out, accumulate=True)
        assert_product(out.inner, reference(x, y, *trans) + 1, f"{m, k, n, batch, junk}")
        assert set(log) <= {PLAIN, BATCHED}


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(("a", "b"), [
    ((0, 3), (3, 2)), ((4, 3), (3, 0)), ((4, 0), (0, 2)), ((0, 0), (0, 0)), ((0, 4, 3), (3, 2)), ((2, 4, 0), (2, 0, 5)),
    ((2, 0, 4, 3), (1, 3, 2)),
])  # fmt: skip
def test_empty(gemm, a, b, accumulate):
    """Nothing to make is no call; a sum of nothing is zero, or leaves `out` as it is."""
    a, b = put(np.ones(a, F32)), put(np.ones(b, F32))
    expected = np.matmul(a.inner, b.inner)
    got, log = multiply(gemm, a, b)
    assert got.dtype == F32
    np.testing.assert_array_equal(got.inner, expected)
    out = put(np.full(expected.shape, 7, F32))
    got, more = multiply(gemm, a, b, out=out, accumulate=accumulate)
    assert got is out
    np.testing.assert_array_equal(out.inner, expected + 7 * accumulate)
    assert {*log, *more} <= {ASSIGN}


def test_random_layouts(gemm):
    """Arrays cut, turned, repeated and reversed at random."""
    rng = np.random.default_rng(0)

    def any_view(shape):
        """An array of this shape that looks at a larger one in some order, or repeats."""
        repeated = [n > 0 and rng.random() < 0.1 for n in shape]
        order = rng.permutation(len(shape)) if rng.random() < 0.5 else np.arange(len(shape))
        sizes = [(1 if repeated[i] else shape[i]) * rng.choice([1, 1, 2]) + rng.choice([0, 0, 2]) for i in order]
        x = put(rng.standard_normal(sizes)).inner.transpose(np.argsort(order))
        for axis, n in enumerate(shape):
            n = 1 if repeated[axis] else n
            step = x.shape[axis] // n if rng.random() < 0.3 else 1
            turned = slice(n - 1, None, -1) if n > 1 else slice(0, 1)
            x = x[(slice(None),) * axis + (slice(None, n * step, step) if rng.random() < 0.9 else turned,)]
        return ndarray(np.broadcast_to(x, shape))

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
        out = put(np.ones((*expected.shape, 1)))[..., 0]
        if rng.random() < 0.5:  # a part of an array with its axes in any order
            order = rng.permutation(expected.ndim)
            wide = put(np.ones([expected.shape[i] + int(rng.integers(0, 2)) for i in order]))
            out = wide.transpose(*np.argsort(order))[tuple(map(slice, expected.shape))]
        gemm(a, b, *trans, out=out, accumulate=True)
        assert_product(out.inner, expected + 1, f"{case}: {shapes} {trans} into {out.strides}")


# -- dtypes and arguments --


@pytest.mark.parametrize(("a", "b", "result"), [(F32, F64, F64), (F64, F32, F64), (BF16, F32, F32), (F64, BF16, F64)])
def test_mixed_dtypes(gemm, a, b, result):
    x, y = numbers((M, K), a), numbers((K, N), b, 1)
    got, log = multiply(gemm, put(x), put(y))
    assert got.dtype == result
    assert_product(got.inner, reference(x, y, False, False))
    assert log == [".astype()", PLAIN]


@pytest.mark.parametrize("dtype", [np.dtype(np.int64), np.dtype(np.float16)])
def test_other_dtypes_are_left_to_cupy(gemm, dtype):
    x, y = np.arange(6).reshape(3, 2).astype(dtype), np.arange(12).reshape(4, 3).astype(dtype)
    out, options = put(np.zeros((2, 4), dtype)), {"trans_a": True, "trans_b": True}
    for asked, log in [({}, ["matmul"]), ({"out": out}, ["matmul", ASSIGN]), ({"dtype": F32}, ["matmul", ".astype()"])]:
        got, launched = multiply(gemm, put(x), put(y), **options, **asked)
        assert got is out or "out" not in asked
        assert got.dtype == asked.get("dtype", dtype)
        assert_close(got.inner, (y @ x).T.astype(got.dtype))
        assert launched == log
    with pytest.raises(TypeError, match=f"cannot add a product of {dtype} to an out of {dtype}"):
        gemm(put(x), put(y), **options, out=out, accumulate=True)


def test_results_of_other_dtypes(gemm):
    """A result in a dtype that cuBLAS does not make of these inputs is converted to it."""
    x, y = numbers((M, K), F32), numbers((K, N), F32, 1)
    expected = reference(x, y, False, False)
    got, log = multiply(gemm, put(x), put(y), dtype="float64")
    assert_close(got.inner.astype(F32), expected.astype(F32))
    assert log == [PLAIN, ".astype()"]
    out = put(np.zeros((M, N), BF16))
    got, log = multiply(gemm, put(x), put(y), out=out)
    assert_product(out.inner, expected)
    assert log == [PLAIN, ASSIGN]


def test_tf32():
    """Float32 products of inputs rounded to 10 bits, while it is set; no others."""
    gemm = Gemm(cupy, strict_cublas.MODULE, tf32=False)
    x, y = numbers((M, 50), F32), numbers((50, N), F32, 1)
    exact, *others = (gemm(put(x.astype(dtype)), put(y.astype(dtype))).inner for dtype in (F32, F64, BF16))
    gemm.tf32 = True
    rounded, *same = (gemm(put(x.astype(dtype)), put(y.astype(dtype))).inner for dtype in (F32, F64, BF16))
    error = np.abs(rounded - exact)
    assert error.max() > 1e-5
    assert (error <= 2**-10 * (np.abs(x) @ np.abs(y))).all()  # two factors, each wrong by 2**-11
    assert all((one == other).all() for one, other in zip(others, same, strict=True))


@pytest.mark.parametrize(("a", "b", "options", "error", "what"), [
    ((4, 3), (4, 5), {}, ValueError, "got a (4, 3), b (4, 5)"),
    ((4, 3), (3, 5), {"trans_a": True}, ValueError, "got a (4, 3) transposed, b (3, 5)"),
    ((2, 4, 3), (3, 3, 5), {}, ValueError, "got a (2, 4, 3), b (3, 3, 5)"),
    ((4, 3), (3, 5), {"out": np.zeros((5, 4), F32)}, ValueError, "got a (4, 3), b (3, 5) and out (5, 4)"),
    ((2, 4, 3), (3, 5), {"out": np.zeros((4, 5), F32)}, ValueError, "out (4, 5)"),
    ((3,), (3, 5), {}, ValueError, "got a (3,)"),
    ((2, 2), (2, 2), {"accumulate": True}, TypeError, "accumulate adds to out"),
])  # fmt: skip
def test_wrong_calls(gemm, a, b, options, error, what):
    options = {name: put(value) if name == "out" else value for name, value in options.items()}
    with strict_cuda.logged() as log, pytest.raises(error, match=re.escape(what)):
        gemm(put(np.zeros(a, F32)), put(np.zeros(b, F32)), **options)
    assert log == []


# -- the handle, streams and threads --


class CallLog:
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


def square(gemm, stream):
    """A product on this stream, of an array that is new on it."""
    with stream:
        x = put(numbers((3, 3), F32))
        return multiply(gemm, x, x)


@pytest.fixture
def streams():
    return strict_cuda.get_current_stream(), strict_cuda.Stream(non_blocking=True)


def test_streams(streams):
    """A new stream is set together with a workspace, its own; the same one is not set again."""
    cublas, memory = CallLog(), strict_cuda.MemoryPool().total_bytes()
    gemm = Gemm(cupy, cublas, tf32=False)
    assert (cublas.calls, strict_cuda.MemoryPool().total_bytes()) == ([], memory)  # before the first product
    workspaces = []
    for stream, first in zip(streams, (["create"], []), strict=True):
        square(gemm, stream)
        assert [name for name, _ in cublas.calls] == [*first, "set_stream", "set_workspace", PLAIN]
        (set_stream, (workspace, size)) = (args for name, args in cublas.calls if name.startswith("set_"))
        assert (set_stream, size) == ((stream.ptr,), 32 << 20)
        workspaces.append(workspace)
        cublas.calls.clear()
        square(gemm, stream)
        assert [name for name, _ in cublas.calls] == [PLAIN]
        cublas.calls.clear()
    assert workspaces[0] != workspaces[1]
    square(gemm, streams[0])
    assert cublas.calls[:2] == [("set_stream", (0,)), ("set_workspace", (workspaces[0], 32 << 20))]


def test_threads(monkeypatch):
    """A thread on another stream waits until a product is under way before it sets its own."""
    own = threading.local()
    for module in (cupy.cuda, strict_cuda):
        monkeypatch.setattr(module, "get_current_stream", lambda: types.SimpleNamespace(ptr=own.stream))
    first_has_set, second_has_set, failures = threading.Event(), threading.Event(), []

    class Slow(CallLog):
        def set_workspace(self, *args):
            strict_cublas.set_workspace(*args)
            if own.stream == 1:
                first_has_set.set()
                second_has_set.wait(0.1)  # not for ever: it should not come
            else:
                second_has_set.set()

    gemm = Gemm(cupy, Slow(), tf32=False)
    x = put(numbers((3, 3), F32))

    def work(stream):
        own.stream = stream
        if stream == 2:
            first_has_set.wait()
        try:
            gemm(x, x)
        except AssertionError as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(stream,)) for stream in (1, 2)]
    with strict_cuda.logged() as log:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
    assert [name for name, *_ in log] == [PLAIN, PLAIN]


@pytest.mark.parametrize("order", [1, -1])
def test_a_failure_leaves_no_stream_half_set(streams, order):
    """If the workspace cannot be set, the next product sets the stream again, whichever it is."""
    cublas = CallLog()
    gemm = Gemm(cupy, cublas, tf32=False)
    square(gemm, streams[0])
    cublas.set_workspace = lambda *_: [][0]
    with pytest.raises(IndexError):
        square(gemm, streams[1])
    del cublas.set_workspace
    assert [square(gemm, stream)[1] for stream in streams[::order]] == [[PLAIN], [PLAIN]]


# -- the stand-in --


@pytest.fixture
def call():
    """A correct batched call of two products, 4 by 3 by 5, with the arguments that are named changed."""
    arrays = [put(np.ones(size, F32)) for size in (2 * 4 * 5, 2 * 5 * 3, 2 * 4 * 3, 256)]
    a, b, c, workspace = (array.data.ptr for array in arrays)
    handle = strict_cublas.create()
    strict_cublas.set_stream(handle, 0)
    strict_cublas.set_workspace(handle, workspace, 1024)
    scalars = np.array([1, 0], F32)
    one, zero = scalars.ctypes.data, scalars.ctypes.data + 4
    correct = {
        "handle": handle, "transa": 0, "transb": 0, "m": 4, "n": 3, "k": 5, "alpha": one,
        "a": a, "atype": 0, "lda": 4, "stride_a": 20, "b": b, "btype": 0, "ldb": 5, "stride_b": 15, "beta": zero,
        "c": c, "ctype": 0, "ldc": 4, "stride_c": 12, "batch_count": 2, "compute_type": 68, "algo": -1,
    }  # fmt: skip

    def call(**changed):
        strict_cublas.MODULE.gemm_strided_batched_ex(**correct | changed)

    call.correct, call.memory = correct, (*arrays, scalars)
    return call


def test_the_correct_call(call):
    with strict_cuda.logged() as log:
        call()
    assert [name for name, *_ in log] == [BATCHED]
    assert (call.memory[2].inner == 5).all()


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


@pytest.mark.parametrize(("changed", "what"), REFUSED.values(), ids=REFUSED)
def test_refused(call, changed, what):
    with strict_cuda.logged() as log, pytest.raises(MisuseError, match=re.escape(what)):
        call(**changed)
    assert log == []


def test_an_overwritten_input_is_refused(call):
    with pytest.raises(MisuseError, match="C overwrites A"):
        call(c=call.correct["a"])
    with pytest.raises(MisuseError, match="C overwrites B"):
        call(c=call.correct["b"] + 4)


def test_interleaved_results_are_not_refused(call):
    """Two results of 4 rows in columns of 8: apart by less than a matrix, and they do not meet."""
    c = put(np.zeros(32, F32))
    call(c=c.data.ptr, ldc=8, stride_c=4)
    for stride in (3, 5):
        with pytest.raises(MisuseError, match="the results overlap"):
            call(c=c.data.ptr, ldc=8, stride_c=stride)


def test_states_that_are_refused(call, streams):
    handle, stream = call.correct["handle"], streams[1]
    with stream:
        with pytest.raises(MisuseError, match=f"set to stream 0x0, the current is {stream.ptr:#x}"):
            call()
        strict_cublas.set_stream(handle, stream.ptr)
        with pytest.raises(MisuseError, match="no workspace was set since the stream was"):
            call()
        workspace = cupy.empty(64, np.uint8)
        with pytest.raises(MisuseError, match="workspace: bytes 0 to 65 of 64"):
            strict_cublas.set_workspace(handle, workspace.data.ptr, 65)
        strict_cublas.set_workspace(handle, workspace.data.ptr, 64)
        call()
        del workspace
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
