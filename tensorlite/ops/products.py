"""Matrix products."""

from tensorlite.backends import backend_of
from tensorlite.backends.base import as_rows
from tensorlite.ops.operands import factors, of_one_dtype
from tensorlite.ops.shape import reshape
from tensorlite.tensor import Tensor, needs_grad, record
from tensorlite.words import explained


@explained
def matmul(a, b) -> Tensor:
    """a @ b: (..., M, K) @ (..., K, N) -> (..., M, N); leading axes broadcast, a vector is a row or a column.

    ga = gy @ b.T, gb = a.T @ gy.
    """
    x, y = factors(a, b)
    be = backend_of(x)
    if x.ndim == 0 or y.ndim == 0 or x.shape[-1] != y.shape[-2 if y.ndim > 1 else -1]:
        raise ValueError(f"shapes {x.shape} and {y.shape} do not fit; the inner lengths must be equal")
    a, b = a if isinstance(a, Tensor) else x, b if isinstance(b, Tensor) else y  # lists as they were read here
    if x.ndim == 1:
        out = matmul(reshape(a, 1, -1), b)
        return reshape(out, *out.shape[:-2], *out.shape[-1:] if y.ndim > 1 else ())
    if y.ndim == 1:
        out = matmul(a, reshape(b, -1, 1))
        return reshape(out, out.shape[:-1])
    try:
        out = be.gemm(x, y)
    except ValueError:
        raise ValueError(f"the leading axes of {x.shape} and {y.shape} do not broadcast") from None
    need_a, need_b = needs_grad(a), needs_grad(b)

    def vjp(gy):
        ga = be.gemm(gy, y, trans_b=True) if need_a else None
        if not need_b:
            return ga, None
        if x.ndim > y.ndim == 2:  # one product over all rows, instead of one per leading index and a sum
            return ga, be.gemm(as_rows(x), as_rows(gy), trans_a=True)
        return ga, be.gemm(x, gy, trans_a=True)

    return record(out, (a, b), vjp)


@explained
def linear(x, weight, bias=None) -> Tensor:
    """x @ weight.T + bias: x (..., K), weight (N, K), bias (N,) or None -> (..., N).

    gx = gy @ weight, gweight = gy.T @ x, gbias = sum(gy) over the rows.

    With x in bfloat16 the weight is rounded to it, and its gradient comes in float32.
    """
    x_data, w, b = of_one_dtype(("x", "weight", "bias"), x, weight, bias, optional=("bias",), mixed=True)
    be = backend_of(x_data)
    if w.ndim != 2 or x_data.ndim == 0 or x_data.shape[-1] != w.shape[1] or (b is not None and b.shape != w.shape[:1]):
        raise ValueError(
            f"expected x (..., K), weight (N, K) and bias (N,), got {x_data.shape}, {w.shape}"
            f" and {None if b is None else b.shape}"
        )
    if w.dtype != x_data.dtype:
        w = w.astype(x_data.dtype)
    need_x, has_bias = needs_grad(x), b is not None

    def vjp(gy):
        return be.linear_vjp(gy, x_data, w, has_bias, need_x)

    return record(be.linear(x_data, w, b), (x, weight, bias), vjp)
