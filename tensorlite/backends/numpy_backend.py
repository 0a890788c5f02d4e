"""The CPU backend: NumPy, with the kernels where the portable version would be slow or cannot be written."""

import ctypes
import functools
import math
import os
import sys

import numpy as np

from tensorlite.backends.base import Backend, as_rows

# The upper tail of the normal distribution, 1 - Phi(z) = exp(-z^2 / 2) * Q(1 / (1 + R z)) for z >= 0 with a
# polynomial Q (the form of Abramowitz & Stegun 7.1.26). R and Q, highest power first, were fitted to minimise the
# largest error; it is below float32's own rounding.
_TAIL_R = 0.325
_TAIL_Q = (-0.1241046225, 0.4513605812, -0.2015366106, 0.2763783176, 0.09443150051, 0.003470725299)

# mallopt(3): the largest block not mapped by itself, the free memory at the top that is not given back, and how much
# more than needed to ask for at a time.
_MALLOC_SETTINGS = ((-3, 32 << 20), (-1, 2**31 - 1), (-2, 64 << 20))

# exp of a number this size is far from float32's limits: softmax needs no shift, nor does a sum of thousands.
_EXP_RANGE = 60.0

_SIGN_BIT = np.int32(-(2**31))
_BITS = {np.dtype(np.float32): np.int32, np.dtype(np.float64): np.int64}  # as wide as the numbers

# Rows that a product with ones adds up one after the other: its rounding grows with their number, to some 4e-7.
_ROWS_AT_A_TIME = 32

# Terms of a dot product, and ids of a one-hot product, that are added up in their own precision.
_TERMS_AT_A_TIME = 1024
_IDS_AT_A_TIME = 512


class NumpyBackend(Backend):
    name = "numpy"
    xp = np
    chunk_size = 32768  # parameters, gradients, moments and a temporary of it fit the second-level cache

    def shared_zeros(self, size, dtype):
        import mmap  # a twentieth of the time that `import tensorlite` takes, and for training alone

        dtype = np.dtype(dtype)
        try:
            memory = mmap.mmap(-1, max(1, size * dtype.itemsize))  # anonymous, and shared as it is for processes
        except (OSError, OverflowError):
            raise MemoryError(f"cannot have {size:,} shared numbers of type {dtype}") from None
        return np.frombuffer(memory, dtype, size)

    def memory_size(self):
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError, OSError):  # not on this platform
            return None

    def tune_allocator(self):
        # glibc gives freed memory back to the system and gets it again page by page, each page with a fault and zeroed:
        # a third of a training step. Other allocators either lack these settings or do not need them.
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
        if mallopt:
            for parameter, value in _MALLOC_SETTINGS:
                mallopt(parameter, value)

    def to_numpy(self, x):
        return x

    def check_ids(self, ids, size, op, ignore=None):
        if ignore is not None:
            ids = ids[ids != ignore]
        if ids.size and (ids.min() < 0 or ids.max() >= size):
            wrong = int(ids.min() if ids.min() < 0 else ids.max())
            raise IndexError(f"{op}: id {wrong} is out of range; the {size} ids go from 0 to {size - 1}")

    def gemm(self, a, b, trans_a=False, trans_b=False, out=None):
        return np.matmul(a.mT if trans_a else a, b.mT if trans_b else b, out=out)

    def select(self, x, keep):
        bits = _BITS.get(x.dtype)  # a mask of -1 and 0 over the numbers' bits; np.where takes eight times as long
        if bits is None:
            return super().select(x, keep)
        return np.bitwise_and(x.view(bits), np.negative(keep.view(np.int8))).view(x.dtype)

    def sum(self, x, axes, keepdims=False):
        if x.dtype not in _BITS:
            return super().sum(x, axes, keepdims)
        lead, rest = x.shape[: len(axes)], x.shape[len(axes) :]
        in_pairs = not rest and x.flags.c_contiguous  # so NumPy itself adds up
        if in_pairs or math.prod([x.shape[a] for a in axes]) <= _ROWS_AT_A_TIME:
            return x.sum(axis=axes, keepdims=keepdims)
        if not (axes == tuple(range(len(lead))) and x.flags.c_contiguous):
            return super().sum(x, axes, keepdims)
        total = _column_sums(x.reshape(math.prod(lead), math.prod(rest)))
        return total.reshape((*(1,) * len(lead), *rest) if keepdims else rest)

    def sum_rows(self, x):
        return _column_sums(x)

    def erf(self, x):
        # float64 is for checking, not for speed: the C library's own function, one element at a time.
        return np.asarray(np.frompyfunc(math.erf, 1, 1)(x)).astype(x.dtype)

    def relu(self, x):
        # Against an array: NumPy's maximum with a scalar takes three times as long.
        return np.maximum(x, np.zeros(x.shape[-1:], x.dtype))

    def relu_vjp(self, gy, y):
        bits = _BITS.get(gy.dtype)  # as `select`, with a pass less
        if bits is None:
            return super().relu_vjp(gy, y)
        return np.bitwise_and(gy.view(bits), np.subtract((y <= 0).view(np.int8), 1)).view(gy.dtype)

    def gelu(self, x, need_grad):
        if x.dtype != np.float32 or x.ndim == 0:  # NumPy makes a 0-d product a scalar, which `out` does not take
            return super().gelu(x, need_grad)
        density = x * x
        density *= -0.5
        np.exp(density, out=density)  # sqrt(2 pi) times the density of the normal distribution
        t = np.abs(x)
        t += 1 / _TAIL_R
        np.divide(1 / _TAIL_R, t, out=t)
        cdf = t * _TAIL_Q[0]
        cdf += _TAIL_Q[1]
        for coefficient in _TAIL_Q[2:]:
            cdf *= t
            cdf += coefficient
        cdf *= density  # the tail beyond |x|
        np.subtract(0.5, cdf, out=cdf)
        # x's sign onto the half below it, by its bit: copysign takes six times as long.
        sign = np.bitwise_and(x.view(np.int32), _SIGN_BIT, out=t.view(np.int32))
        np.bitwise_or(cdf.view(np.int32), sign, out=cdf.view(np.int32))
        cdf += 0.5
        slope = None
        if need_grad:
            density *= x
            density *= 1 / math.sqrt(2 * math.pi)
            slope = np.add(density, cdf, out=density)
        return np.multiply(x, cdf, out=cdf), slope

    def softmax_vjp(self, gy, y, axis=-1):
        if axis not in (-1, y.ndim - 1):
            return super().softmax_vjp(gy, y, axis)
        gx = gy - _row_dots(gy, y)
        gx *= y
        return gx

    # Of a single row, as in sampling, these two take half the time. Its mean and deviation are numbers, and need no
    # broadcasting. Its product with a large matrix waits for memory, which one dot product per row of the matrix reads
    # twice as fast as BLAS's own product does; a small matrix is in the cache.

    def linear(self, x, w, b):
        if x.size != w.shape[1] or not x.size:
            return super().linear(x, w, b)
        y = (np.vecdot if w.shape[1] >= 256 else np.dot)(w, x.reshape(-1))
        if b is not None:
            y += b
        return y.reshape(*x.shape[:-1], w.shape[0])

    def layer_norm(self, x, weight, bias, eps):
        C = x.shape[-1]
        if x.size == C > 0:
            row = x.reshape(C)
            xhat = row - row[0]
            xhat -= _ones(C, x.dtype)[0].dot(xhat) / C
            rstd = 1 / np.sqrt(xhat.dot(xhat) / C + eps)
            xhat *= rstd
            y = xhat if weight is None else xhat * weight
            if bias is not None:
                y = y + bias
            return y.reshape(x.shape), (xhat.reshape(x.shape), rstd)
        xhat = x - x[..., :1]
        mean = _row_sums(xhat)
        mean /= max(1, C)
        xhat -= mean
        rstd = _row_dots(xhat, xhat)
        rstd /= max(1, C)
        rstd += eps
        np.sqrt(rstd, out=rstd)
        np.reciprocal(rstd, out=rstd)
        xhat *= rstd
        y = xhat if weight is None else xhat * weight
        if bias is not None:
            y = np.add(y, bias, out=None if y is xhat else y)
        return y, (xhat, rstd)

    def layer_norm_vjp(self, gy, saved, weight, has_bias):
        (xhat, rstd), C = saved, max(1, gy.shape[-1])
        gweight = None if weight is None else _column_sums(as_rows(gy * xhat))
        gbias = _column_sums(as_rows(gy)) if has_bias else None
        gx = gy * (1.0 if weight is None else weight)
        along = _row_dots(gx, xhat)
        along /= C
        gx -= _row_sums(gx) / C
        gx -= xhat * along
        gx *= rstd
        return gx, gweight, gbias

    # The scores lie with the keys down and the queries across, (..., S, T): NumPy reduces over the last axis but one
    # many times faster than over the last. Causal queries go in blocks, each with the keys that its last query sees:
    # little more than half the scores are ever made. The queries and the result's gradients are copied with the
    # channels down, (..., D, T), for BLAS is slow at small products whose inner axis is the last of both.

    def attention(self, q, k, v, causal, scale, keep, keep_scale, out=None):
        y = np.empty((*q.shape[:-1], v.shape[-1]), q.dtype) if out is None else out
        q_down = np.multiply(q.swapaxes(-1, -2), scale, order="C")
        saved = []
        for rows, seen in _query_blocks(q.shape[-2], k.shape[-2], causal):
            probs = np.matmul(k[..., :seen, :], q_down[..., rows])
            in_range = max(probs.max(initial=0.0), -probs.min(initial=0.0)) <= _EXP_RANGE  # and none of them a NaN
            if causal:
                n = rows.stop - rows.start
                latest, later = probs[..., seen - n :, :], _later_keys(n, probs.dtype)
                if in_range:
                    latest += later
                else:
                    latest[...] = np.where(later == 0, latest, later)
            if not in_range:
                probs -= probs.max(axis=-2, keepdims=True, initial=-math.inf)
            np.exp(probs, out=probs)
            probs /= _sum_over_keys(probs)
            kept = probs if keep is None else self.select(probs, keep[..., :seen, rows])
            block = np.matmul(kept.swapaxes(-1, -2), v[..., :seen, :], out=y[..., rows, :])
            if keep is not None:
                block *= keep_scale
            saved.append((rows, seen, probs, kept))
        return y, saved

    def attention_vjp(self, gy, q, k, v, saved, scale, keep_scale, out=(None, None, None)):
        gq, gk, gv = (np.empty_like(x) if g is None else g for x, g in zip((q, k, v), out, strict=True))
        gy = gy if keep_scale == 1.0 else gy * keep_scale
        gy_down = np.multiply(gy.swapaxes(-1, -2), scale, order="C")
        whole = True  # the last block sees every key; the ones before it add to what it wrote
        for rows, seen, probs, kept in reversed(saved):
            gv_block = np.matmul(kept, gy[..., rows, :], out=gv if whole else None)
            gscores = np.matmul(v[..., :seen, :], gy_down[..., rows])
            gscores *= kept
            gscores -= probs * _sum_over_keys(gscores)
            np.matmul(gscores.swapaxes(-1, -2), k[..., :seen, :], out=gq[..., rows, :])
            gk_block = np.matmul(gscores, q[..., rows, :], out=gk if whole else None)
            if not whole:
                gk[..., :seen, :] += gk_block
                gv[..., :seen, :] += gv_block
            whole = False
        return gq, gk, gv

    def embedding_vjp(self, gy, ids, rows):
        ids, gy = ids.reshape(-1), as_rows(gy)
        if rows <= 512:  # products with one-hot matrices are the fastest for a small table
            gweight = _one_hot_sums(gy, ids, rows)
            if np.isfinite(gweight).all():  # or else 0 * inf has spread a NaN
                return gweight
        order = np.argsort(ids, kind="stable")
        used, starts = np.unique(ids[order], return_index=True)
        gweight = np.zeros((rows, gy.shape[-1]), gy.dtype)
        if used.size:
            gweight[used] = np.add.reduceat(gy[order], starts, axis=0, dtype=np.float64)
        return gweight

    def l2_norm(self, x):
        whole = x.size // _TERMS_AT_A_TIME * _TERMS_AT_A_TIME
        parts = x[:whole].reshape(-1, _TERMS_AT_A_TIME)
        squares = np.vecdot(parts, parts).sum(dtype=np.float64) + np.dot(x[whole:], x[whole:])
        return np.sqrt(squares).astype(x.dtype)


def _query_blocks(n_queries: int, n_keys: int, causal: bool):
    """(slice of queries, how many keys the last of them sees), block by block."""
    size = max(32, n_queries // 8) if causal else max(1, n_queries)  # found by measurement
    for start in range(0, max(1, n_queries), size):  # without queries one block without any, so that gradients are 0
        stop = min(start + size, n_queries)
        yield slice(start, stop), stop + n_keys - n_queries if causal else n_keys


@functools.lru_cache(maxsize=16)
def _later_keys(n: int, dtype):
    """(n, n), keys down: -inf where the key comes after the query, else 0."""
    return np.tril(np.full((n, n), -math.inf, dtype), -1)


# Sums over a short axis as products with ones: NumPy's own reductions are several times slower.


@functools.lru_cache(maxsize=64)
def _ones(n: int, dtype):
    ones = np.ones((1, n), dtype)
    ones.flags.writeable = False
    return ones


def _sum_over_keys(e):
    """The sum of e (..., S, T) over S, (..., 1, T)."""
    return np.matmul(_ones(e.shape[-2], e.dtype), e)


def _row_sums(x):
    """The sum of each row, (..., 1)."""
    return np.matmul(x, _ones(x.shape[-1], x.dtype).T)


def _column_sums(x):
    """The sum over the rows of x (N, C), (C,)."""
    if x.shape[0] > _ROWS_AT_A_TIME:
        n, C = x.shape[0] // _ROWS_AT_A_TIME, x.shape[1]
        whole = n * _ROWS_AT_A_TIME
        folded = x[:whole].reshape(_ROWS_AT_A_TIME, n * C)  # n rows beside each other
        sums = _ones(_ROWS_AT_A_TIME, x.dtype)[0].dot(folded).reshape(n, C)
        x = sums if whole == x.shape[0] else np.concatenate((sums, x[whole:]))
    if x.shape[0] > _ROWS_AT_A_TIME:
        return x.sum(axis=0, dtype=np.float64).astype(x.dtype)
    return _ones(x.shape[0], x.dtype)[0].dot(x)


@np.errstate(invalid="ignore")
def _one_hot_sums(gy, ids, rows: int):
    """The sums of the rows of gy (N, C) that belong to each of the ids (N,) below `rows`, (rows, C)."""
    total = np.zeros((rows, gy.shape[1]), np.float64) if len(ids) > _IDS_AT_A_TIME else 0
    for start in range(0, max(1, len(ids)), _IDS_AT_A_TIME):
        part = slice(start, start + _IDS_AT_A_TIME)
        one_hot = (ids[part, None] == np.arange(rows)).astype(gy.dtype)
        total += np.matmul(one_hot.T, gy[part])
    return total.astype(gy.dtype, copy=False)


def _row_dots(x, y):
    """The dot product of each row of x with that of y, (..., 1), without the array of products."""
    return np.vecdot(x, y)[..., None]
