"""Matrix products by cuBLAS that a CUDA graph can capture: CuPy refuses to call cuBLAS during a capture."""

import functools
import threading
from typing import NamedTuple

import numpy as np

_WORKSPACE = 32 << 20  # bytes, what cuBLAS takes by itself on Hopper

# (inputs, result): their numbers in cudaDataType, which the binding has no names for, and what the sums are made in.
_PRODUCTS = {
    ("float32", "float32"): (0, 0, "float32"),
    ("float64", "float64"): (1, 1, "float64"),
    ("bfloat16", "bfloat16"): (14, 14, "float32"),
    ("bfloat16", "float32"): (14, 0, "float32"),
}


class Gemm:
    """Matrix products on the GPU by cuBLAS, through NVIDIA's own binding.

    `cupy` and `cublas` are the modules cupy and nvmath.bindings.cublas. With `tf32` the inputs of float32 products are
    rounded to TF32's 10 bits, until it is set otherwise.

    The same call on the same GPU with the same cuBLAS gives the same bits. cuBLAS promises that of one stream, and of
    several if each has its own workspace (its documentation, 2.1.4 "Results Reproducibility"): here each has. It is
    made by the first product on a stream, which therefore comes before a capture of that stream; a captured graph
    writes into it, and is launched on the same stream.
    """

    def __init__(self, cupy, cublas, tf32: bool):
        self.tf32 = tf32
        self._cupy, self._cublas = cupy, cublas
        self._ops = int(cublas.Operation.N), int(cublas.Operation.T)
        self._algo = int(cublas.GemmAlgo.DFALT)
        self._scalars = np.array([0, 1], np.float32), np.array([0, 1], np.float64)  # cuBLAS reads them by their address
        single, double = [(x.ctypes.data, x.ctypes.data + x.itemsize) for x in self._scalars]
        kinds = cublas.ComputeType
        self._compute = {
            "float32": (int(kinds.COMPUTE_32F), *single),
            "tf32": (int(kinds.COMPUTE_32F_FAST_TF32), *single),
            "float64": (int(kinds.COMPUTE_64F), *double),
        }
        self._lock = threading.Lock()  # between setting the stream and the product, no other thread may set it
        self._handle = self._stream = None
        self._workspaces = {}

    def __call__(self, a, b, trans_a=False, trans_b=False, out=None, accumulate=False, dtype=None):
        """a @ b over the last two axes, either one transposed first; leading axes broadcast.

        a (..., M, K), b (..., K, N) as they are after the transposition. The result (..., M, N) goes into `out`, which
        shares no memory with a and b, or with `accumulate` is added to it; without `out` into a new array of `dtype`,
        a's unless given. float64, float32, and bfloat16 with a result of bfloat16 or float32, all but the first summed
        in float32; any other dtype is left to CuPy. Inputs of two dtypes are promoted as NumPy does.

        An operand is copied only if neither of its last two axes is contiguous, or it repeats or reverses elements.
        """
        if a.dtype != b.dtype:
            common = np.promote_types(a.dtype, b.dtype)
            a, b = a.astype(common, copy=False), b.astype(common, copy=False)
        shape, k = _result(a.shape, b.shape, trans_a, trans_b, None if out is None else out.shape)
        if accumulate and out is None:
            raise TypeError("gemm: accumulate adds to out; got no out")
        types = _types(a.dtype, out.dtype if out is not None else np.dtype(dtype) if dtype is not None else a.dtype)
        if types is None:
            return self._convert(a, b, trans_a, trans_b, out, accumulate, dtype)
        if out is None:
            out = self._cupy.empty(shape, dtype if dtype is not None else a.dtype)
        if 0 in shape:
            return out
        if k == 0:
            if not accumulate:
                out[...] = 0
            return out
        size, out_size = a.itemsize, out.itemsize
        if not _fits(shape, out.strides, out_size):
            y = self._cupy.ascontiguousarray(out) if accumulate else self._cupy.empty(shape, out.dtype)
            out[...] = self(a, b, trans_a, trans_b, y, accumulate)
            return out
        if not _fits(a.shape, a.strides, size):
            a = self._cupy.ascontiguousarray(a)
        if not _fits(b.shape, b.strides, size):
            b = self._cupy.ascontiguousarray(b)
        plan = _plan(shape, k, a.shape, a.strides, b.shape, b.strides, out.strides, size, out_size, trans_a, trans_b)
        self._run(plan, types, a.data.ptr, b.data.ptr, out.data.ptr, accumulate)
        return out

    def _run(self, plan, types, a, b, out, accumulate):
        """The cuBLAS calls of a plan, on pointers."""
        if plan.swapped:
            a, b = b, a
        in_type, out_type, compute = types
        if self.tf32 and in_type == 0:
            compute = "tf32"
        compute, zero, one = self._compute[compute]
        beta, ops, algo = one if accumulate else zero, self._ops, self._algo
        # cuBLAS's matrices are column-major, ours their transposes: out.T = b.T @ a.T, so b comes first.
        with self._lock:
            sizes = self._on_current_stream(), ops[plan.trans_b], ops[plan.trans_a], plan.n, plan.m, plan.k, one
            for at_a, at_b, at_c in plan.offsets:
                x, y, z = (b + at_b, in_type, plan.ldb), (a + at_a, in_type, plan.lda), (out + at_c, out_type, plan.ldc)
                if plan.count == 1:
                    self._cublas.gemm_ex(*sizes, *x, *y, beta, *z, compute, algo)
                else:
                    self._cublas.gemm_strided_batched_ex(
                        *sizes, *x, plan.step_b, *y, plan.step_a, beta, *z, plan.step_c, plan.count, compute, algo
                    )

    def _on_current_stream(self):
        """The handle, set to CuPy's current stream."""
        stream = self._cupy.cuda.get_current_stream().ptr
        if self._handle is None:
            self._handle = self._cublas.create()
        if stream != self._stream:
            if stream not in self._workspaces:
                self._workspaces[stream] = self._cupy.empty(_WORKSPACE, np.uint8)
            self._stream = None  # until both calls are through
            self._cublas.set_stream(self._handle, stream)
            # After it, for setting the stream puts cuBLAS's own workspace back.
            self._cublas.set_workspace(self._handle, self._workspaces[stream].data.ptr, _WORKSPACE)
            self._stream = stream
        return self._handle

    def _convert(self, a, b, trans_a, trans_b, out, accumulate, dtype):
        """The product for dtypes that cuBLAS does not take, or does not give."""
        if accumulate:
            raise TypeError(f"gemm: cannot add a product of {a.dtype} to an out of {out.dtype}; convert one of them")
        if _types(a.dtype, a.dtype):
            y = self(a, b, trans_a, trans_b)
        else:
            y = self._cupy.matmul(a.swapaxes(-1, -2) if trans_a else a, b.swapaxes(-1, -2) if trans_b else b)
        if out is None:
            return y if dtype is None else y.astype(dtype, copy=False)
        out[...] = y
        return out


class _Plan(NamedTuple):
    """The products that make up a @ b: where out is column-major, those of out.T = b.T @ a.T, with a and b swapped."""

    swapped: bool
    trans_a: bool
    trans_b: bool
    m: int
    n: int
    k: int
    lda: int
    ldb: int
    ldc: int
    count: int  # of products in a call
    step_a: int  # elements from one to the next
    step_b: int
    step_c: int
    offsets: list[tuple[int, int, int]]  # bytes into a, b and out, for each call


# What follows from shapes, strides and dtypes alone is worked out once for each.


@functools.cache
def _types(dtype, out_dtype):
    """The entry of _PRODUCTS, None if there is no such product."""
    return _PRODUCTS.get((dtype.name, out_dtype.name))


@functools.lru_cache(maxsize=4096)
def _result(a, b, trans_a, trans_b, out):
    """The shape of the product and K. ValueError if the shapes do not go together."""
    if min(len(a), len(b)) >= 2:
        (m, k), (k2, n) = a[-2:][:: -1 if trans_a else 1], b[-2:][:: -1 if trans_b else 1]
        try:
            shape = (*np.broadcast_shapes(a[:-2], b[:-2]), m, n)
        except ValueError:
            shape = None
        if k == k2 and shape is not None and out in (None, shape):
            return shape, k
    raise ValueError(
        f"gemm: expected a (..., M, K), b (..., K, N) and out (..., M, N); got a {a}{' transposed' * trans_a}, "
        f"b {b}{' transposed' * trans_b}" + (f" and out {out}" if out is not None else "")
    )


def _steps(shape, strides, size, trans=False, ndim=2):
    """Strides in elements, for `ndim` axes, 0 along an axis of one element or none, where they mean nothing."""
    steps = [0] * (ndim - len(shape)) + [s // size if n > 1 else 0 for n, s in zip(shape, strides, strict=True)]
    return (*steps[:-2], steps[-1], steps[-2]) if trans else tuple(steps)


def _layout(rows, columns, row_step, column_step):
    """(is it column-major?, the leading dimension) of a matrix, None if it is not one for BLAS."""
    if (columns == 1 or column_step == 1) and (rows == 1 or row_step >= columns):
        return False, row_step if rows > 1 else columns
    if (rows == 1 or row_step == 1) and column_step >= rows:
        return True, column_step
    return None


@functools.lru_cache(maxsize=4096)
def _fits(shape, strides, size):
    """Can BLAS take these matrices as they are?"""
    steps = _steps(shape, strides, size)
    return min(steps) >= 0 and _layout(*shape[-2:], *steps[-2:]) is not None


@functools.lru_cache(maxsize=4096)
def _plan(shape, k, a_shape, a_strides, b_shape, b_strides, strides, size, out_size, trans_a, trans_b):
    """The _Plan of a product into an out of these strides."""
    *batch, m, n = shape
    *a_steps, am, ak = _steps(a_shape, a_strides, size, trans_a, len(shape))
    *b_steps, bk, bn = _steps(b_shape, b_strides, size, trans_b, len(shape))
    *c_steps, cm, cn = _steps(shape, strides, out_size)
    swapped = _layout(m, n, cm, cn)[0]
    if swapped:  # out is column-major, so its transpose is what the rest takes it for
        m, n, am, ak, bk, bn, cm, cn = n, m, bn, bk, ak, am, cn, cm
        a_steps, b_steps = b_steps, a_steps
    axes = []  # (length, steps in a, b, out), with neighbours made one wherever their strides allow
    for length, *steps in zip(batch, a_steps, b_steps, c_steps, strict=True):
        if axes and [length * step for step in steps] == axes[-1][1]:
            axes[-1] = length * axes[-1][0], steps
        elif length > 1:
            axes.append((length, steps))
    if axes and axes[-1][1][1] == 0:  # all by the same b: more rows of a, if they go on in equal steps
        length, (step_a, _, step_c) = axes[-1]
        if m == 1:  # a single row has no step of its own
            am, cm = step_a, step_c
        if (m * am, m * cm) == (step_a, step_c) and _layout(m * length, k, am, ak):
            m *= length
            axes.pop()
    axes.sort(key=lambda axis: axis[0])  # the longest is the batch, a loop goes over the others
    *loops, (count, steps) = axes or [(1, (0, 0, 0))]
    offsets = [(0, 0, 0)]
    for length, (step_a, step_b, step_c) in loops:
        offsets = [
            (at_a + i * step_a * size, at_b + i * step_b * size, at_c + i * step_c * out_size)
            for at_a, at_b, at_c in offsets
            for i in range(length)
        ]
    (col_a, lda), (col_b, ldb), (_, ldc) = _layout(m, k, am, ak), _layout(k, n, bk, bn), _layout(m, n, cm, cn)
    return _Plan(swapped, col_a, col_b, m, n, k, lda, ldb, ldc, count, *steps, offsets)
