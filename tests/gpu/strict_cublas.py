"""A stand-in for nvmath.bindings.cublas over NumPy, for machines without a GPU. `MODULE` has the names that
tensorlite uses with their real arguments, and refuses what cuBLAS refuses, and more:

    memory        a matrix that does not lie within one allocation, whole, or a product that overwrites its inputs
    shapes        a leading dimension shorter than a column, a number that does not fit C's int
    dtypes        what is not in the table of cublasGemmEx
    handles       one that was not created; a stream that is not the current one; no workspace set after the stream

The memory and the streams are strict_cuda's. What the stand-in cannot show: speed, the order of cuBLAS's sums, and the
workspace's alignment, since NumPy's memory has none to speak of.
"""

import ctypes
import enum
import types

import numpy as np
import strict_cuda
from strict_cuda import MisuseError


class Operation(enum.IntEnum):
    N, T, C = range(3)


class ComputeType(enum.IntEnum):
    COMPUTE_32F = 68
    COMPUTE_32F_FAST_TF32 = 77
    COMPUTE_64F = 70


class GemmAlgo(enum.IntEnum):
    DFALT = -1


class cuBLASError(Exception):  # noqa: N801, N818 - nvmath's name
    pass


cuBLASError.__module__ = "nvmath.bindings.cublas"


def _dtype(number: int) -> np.dtype:
    if number == 14:
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype({0: np.float32, 1: np.float64}[number])


# (compute type, inputs, result) of cublasGemmEx, of the dtypes above; alpha and beta are of the type computed in.
SINGLE, TF32, DOUBLE = ComputeType.COMPUTE_32F, ComputeType.COMPUTE_32F_FAST_TF32, ComputeType.COMPUTE_64F
PRODUCTS = {(SINGLE, 0, 0), (TF32, 0, 0), (DOUBLE, 1, 1), (SINGLE, 14, 14), (SINGLE, 14, 0)}

_handles: dict[int, types.SimpleNamespace] = {}


def _require(condition, what: str) -> None:
    if not condition:
        raise MisuseError(what)


def _settings(handle: int) -> types.SimpleNamespace:
    _require(handle in _handles, f"the handle {handle!r} was not created")
    return _handles[handle]


def _bytes(pointer: int, size: int, what: str) -> np.ndarray:
    """`size` bytes from an address on."""
    _require(type(pointer) is int, f"{what}: the pointer is a {type(pointer).__name__}")
    memory = strict_cuda.find_allocation(pointer)
    _require(memory is not None, f"{what}: address {pointer:#x} is in no allocation")
    start = pointer - memory.ctypes.data
    _require(start >= 0 and start + size <= memory.size, f"{what}: bytes {start} to {start + size} of {memory.size}")
    return memory[start : start + size]


def create() -> int:
    handle = 4096 + len(_handles)
    _handles[handle] = types.SimpleNamespace(stream=0, workspace=None)
    return handle


def set_stream(handle, stream_id):
    settings = _settings(handle)
    settings.stream, settings.workspace = stream_id, None


def set_workspace(handle, workspace, workspace_size_in_bytes):
    _settings(handle).workspace = workspace, workspace_size_in_bytes
    _bytes(workspace, workspace_size_in_bytes, "workspace")


def gemm_ex(
    handle, transa, transb, m, n, k, alpha, a, atype, lda, b, btype, ldb, beta, c, ctype, ldc, compute_type, algo
):
    arguments = (m, n, k, alpha, a, atype, lda, 0, b, btype, ldb, 0, beta, c, ctype, ldc, 0, 1, compute_type, algo)
    _product("gemm_ex", handle, transa, transb, *arguments)


def gemm_strided_batched_ex(
    handle, transa, transb, m, n, k, alpha, a, atype, lda, stride_a, b, btype, ldb, stride_b, beta, c, ctype, ldc,
    stride_c, batch_count, compute_type, algo,
):  # fmt: skip
    arguments = (m, n, k, alpha, a, atype, lda, stride_a, b, btype, ldb, stride_b, beta, c, ctype, ldc, stride_c)
    _product("gemm_strided_batched_ex", handle, transa, transb, *arguments, batch_count, compute_type, algo)


def _product(
    name, handle, trans_a, trans_b, m, n, k, alpha, a, a_type, lda, stride_a, b, b_type, ldb, stride_b, beta, c, c_type,
    ldc, stride_c, count, compute, algo,
):  # fmt: skip
    """C = alpha op(A) op(B) + beta C for each of `count` matrices, column-major."""
    settings = _settings(handle)
    stream = strict_cuda.get_current_stream().ptr
    _require(settings.stream == stream, f"the handle is set to stream {settings.stream:#x}, the current is {stream:#x}")
    _require(settings.workspace is not None, "no workspace was set since the stream was")
    _bytes(*settings.workspace, "workspace")
    numbers = (trans_a, trans_b, m, n, k, a_type, lda, b_type, ldb, c_type, ldc, count, compute, algo)
    _require(all(-(2**31) <= x < 2**31 for x in numbers), f"{numbers} do not all fit an int")
    _require(min(m, n, k, count) > 0, f"a product of m {m}, n {n}, k {k}, {count} times: nothing to do")
    _require({trans_a, trans_b} <= set(Operation), f"the operations are {trans_a} and {trans_b}")
    _require(a_type == b_type and (compute, a_type, c_type) in PRODUCTS, f"{compute=}, {a_type=}, {b_type=}, {c_type=}")
    _require(algo == GemmAlgo.DFALT, f"the algorithm is {algo}")
    x = _matrices("A", a, a_type, *((m, k) if trans_a == Operation.N else (k, m)), lda, stride_a, count)
    y = _matrices("B", b, b_type, *((k, n) if trans_b == Operation.N else (n, k)), ldb, stride_b, count)
    z = _matrices("C", c, c_type, m, n, ldc, stride_c, count)
    # Matrices C lie `apart` elements from the first: they meet if that is less than m off a multiple of ldc, in range.
    columns, rest = np.divmod(np.arange(1, count) * stride_c, ldc)
    meet = ((rest < m) & (columns < n)) | ((ldc - rest < m) & (columns + 1 < n))
    _require(not meet.any(), f"the results overlap: {count} of {m} by {n}, {ldc=}, {stride_c=}")
    for matrix, label in ((x, "A"), (y, "B")):
        _require(not np.shares_memory(matrix, z), f"C overwrites {label}")
    x, y = (x.mT if trans_a else x), (y.mT if trans_b else y)
    scalar = ctypes.c_double if compute == DOUBLE else ctypes.c_float
    alpha, beta = scalar.from_address(alpha).value, scalar.from_address(beta).value

    def compute_it():
        result = alpha * (_operand(x, compute) @ _operand(y, compute))
        z[...] = result if beta == 0 else result + beta * z.astype(result.dtype)  # with beta 0, C is never read

    ways, flop = "rrw" if beta == 0 else "rrb", 2 * m * n * k * count
    strict_cuda.launch(name, compute_it, [x, y, z], ways=ways, flop=flop)


def _matrices(what, pointer, type_number, rows, columns, ld, stride, count):
    """The views (count, rows, columns) of column-major matrices."""
    dtype = _dtype(type_number)
    _require(ld >= rows, f"{what}: the leading dimension {ld} is less than the {rows} rows")
    _require(stride >= 0, f"{what}: the stride {stride} is negative")
    extent = (count - 1) * stride + (columns - 1) * ld + rows
    memory = _bytes(pointer, extent * dtype.itemsize, what)
    strides = (stride * dtype.itemsize, dtype.itemsize, ld * dtype.itemsize)
    return np.ndarray((count, rows, columns), dtype, memory, 0, strides)


def _operand(x, compute):
    """x in the type that is computed in."""
    if compute == DOUBLE:
        return x
    x = np.asarray(x, np.float32)
    if compute == TF32:  # to the nearest with 10 bits of mantissa, of 23
        x = np.where(np.isfinite(x), ((x.view(np.int32) + 0x1000) & ~0x1FFF).view(np.float32), x)
    return x


MODULE = types.ModuleType("nvmath.bindings.cublas")
for _item in (create, set_stream, set_workspace, gemm_ex, gemm_strided_batched_ex, Operation, ComputeType, GemmAlgo):
    setattr(MODULE, _item.__name__, _item)
