"""Backend: the array module and the portable version of every kernel an op calls.

The methods here are the readable reference, written in the part of NumPy's interface that CuPy shares. A backend
overrides one where it has a faster way, with the same arguments, values and side effects. Arrays in, arrays out;
inputs are never written into unless the docstring says so.

`gy` is the gradient of the result y; `gx` that of the input x, and so on.
"""

import math
from types import ModuleType

import numpy as np

from tensorlite import random
from tensorlite.dtypes import FLOAT, FLOAT32, FLOAT64, KINDS


class BackendError(RuntimeError):
    """A backend was asked for that cannot run here; the message says what is missing and what to do."""


def dropout_scale(threshold: int) -> float:
    """What keeps the mean when one in 65536 / threshold elements is dropped."""
    return 65536 / (65536 - threshold) if threshold < 65536 else 0.0


def as_rows(x):
    """x (..., C) as a matrix (N, C), also where C is 0."""
    C = x.shape[-1]
    return x.reshape(-1, C) if C else x.reshape(math.prod(x.shape[:-1]), 0)


class Backend:
    """The arrays of one library on one kind of device, and every kernel that an op calls, in its portable version."""

    name: str
    xp: ModuleType
    chunk_size: int | None = None  # elements of a flat array best worked on at a time; None for all
    tf32 = False  # whether a GPU may round the factors of float32 products to TF32, for all models in the process
    emulates_bfloat16 = False  # whether the device has no arithmetic for it, so that it is slower than float32
    graph = False  # whether a GPU captures `replayable` work as CUDA graphs

    def __reduce__(self):
        """There is one of each in a process, which a copy or an unpickled one is."""
        from tensorlite.backends import get_backend

        return get_backend, (self.name,)

    # -- arrays and the host --

    def asarray(self, data, dtype=None):
        """`data` (a host array or nested lists) as an array of this backend."""
        return self.xp.asarray(data, dtype)

    def to_numpy(self, x):
        """x as a NumPy array on the host."""
        raise NotImplementedError

    def shared_zeros(self, size: int, dtype):
        """A flat array of zeros, on the CPU in memory that processes forked from this one share with it."""
        return self.xp.zeros(size, dtype)

    def upload(self, x, values) -> None:
        """Copy host values into the array x, without waiting for the device."""
        x[...] = values

    def dtype(self, name: str):
        """The dtype of that name: "float32", "float64", or on a GPU "bfloat16"."""
        if name == "bfloat16":
            raise BackendError(f"the {self.name} backend has no bfloat16: use --backend cupy, or --dtype float32")
        return np.dtype(name)

    def replayable(self, function):
        """`function`, which takes and returns nothing, in a form that is quick to call again and again. A GPU's backend
        captures it as a CUDA graph: `tensorlite.backends.cuda.replay` says what that demands of it."""
        return function

    def memory_size(self) -> int | None:
        """Bytes of the device's memory, where that is known."""
        return None

    def describe(self) -> str:
        """The backend and its device, for people."""
        return self.name

    def explain_memory_error(self, error: MemoryError) -> str | None:
        """What was asked for and what there is, if it is this backend's memory that was too small."""
        return None

    def explain_failure(self, error: BaseException | None) -> str | None:
        """What failed, where, and what to do, if it is this backend's device or its libraries that led to the error."""
        return None

    def tune_allocator(self) -> None:
        """Prepare the process's memory allocator for making and dropping large arrays all the time."""

    def check_ids(self, ids, size: int, op: str, ignore: int | None = None) -> None:
        """IndexError if an integer of `ids` lies outside [0, size) and is not `ignore`.

        Only where reading the values back is free. On a device an id that is none gives any row, or a loss of NaN.
        """

    def select(self, x, keep):
        """x where the booleans `keep` hold, else 0, whatever x is there: infinity times 0 would be NaN."""
        return self.xp.where(keep, x, 0).astype(x.dtype, copy=False)

    # -- products --

    def gemm(self, a, b, trans_a: bool = False, trans_b: bool = False, out=None):
        """a @ b over the last two axes, either one transposed first; leading axes broadcast."""
        a = a.swapaxes(-1, -2) if trans_a else a
        b = b.swapaxes(-1, -2) if trans_b else b
        return self.xp.matmul(a, b, out=out)

    def linear(self, x, w, b):
        """x (..., K) @ w.T + b for w (N, K) and b (N,) or None, as one product: (..., N)."""
        y = self.gemm(as_rows(x), w, trans_b=True)
        if b is not None:
            y += b
        return y.reshape(*x.shape[:-1], w.shape[0])

    def linear_vjp(self, gy, x, w, has_bias: bool, need_gx: bool):
        """gx = gy @ w, gw = gy.T @ x, gb = the sum of gy over all rows."""
        gy2, x2 = as_rows(gy), as_rows(x)
        gx = self.gemm(gy2, w).reshape(x.shape) if need_gx else None
        return gx, self.gemm(gy2, x2, trans_a=True), self.sum_rows(gy2) if has_bias else None

    def sum_rows(self, x):
        """The sum over the rows of x (N, C): (C,)."""
        return self.sum(x, (0,))

    def sum(self, x, axes: tuple[int, ...], keepdims: bool = False):
        """The sum over these axes, rounded once: a dtype's rounding would add up with the number of terms. Of integers
        and booleans it is an int64."""
        if KINDS[x.dtype] != FLOAT:
            return x.sum(axis=axes, dtype=np.int64, keepdims=keepdims)
        wide = FLOAT64 if x.dtype in (FLOAT32, FLOAT64) else FLOAT32
        return x.sum(axis=axes, dtype=wide, keepdims=keepdims).astype(x.dtype, copy=False)

    def cumsum(self, x, axis: int):
        """The sums up to each element along the axis, added up as in `sum`."""
        if KINDS[x.dtype] != FLOAT:
            return x.cumsum(axis=axis, dtype=np.int64)
        wide = FLOAT64 if x.dtype in (FLOAT32, FLOAT64) else FLOAT32
        return x.cumsum(axis=axis, dtype=wide).astype(x.dtype, copy=False)

    # -- activations --

    def erf(self, x):
        """The error function, to the precision of x's dtype."""
        raise NotImplementedError

    def relu(self, x):
        """max(x, 0)."""
        return self.xp.maximum(x, 0)

    def relu_vjp(self, gy, y):
        """gx = gy, but 0 where y is 0; a NaN passes its gradient on."""
        return self.select(gy, ~(y <= 0))

    def gelu(self, x, need_grad: bool):
        """(y, saved) of y = x * Phi(x), Phi the normal distribution function; saved is None without `need_grad`.

        Saved here is dy/dx = Phi(x) + x * phi(x): made on the way it costs little, and x need not be kept.
        """
        cdf = 0.5 * (1.0 + self.erf(x * math.sqrt(0.5)))
        slope = None
        if need_grad:
            slope = cdf + x * (self.xp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi))
        return x * cdf, slope

    def gelu_vjp(self, gy, saved):
        """gx = gy * dy/dx."""
        return gy * saved

    def gelu_tanh(self, x, need_grad: bool):
        """As `gelu`, of GPT-2's approximation y = x * (1 + tanh u) / 2, u = sqrt(2/pi) (x + 0.044715 x^3)."""
        c = math.sqrt(2 / math.pi)
        x2 = x * x
        cdf = 0.5 * (1.0 + self.xp.tanh(c * x * (1.0 + 0.044715 * x2)))
        slope = None
        if need_grad:  # tanh' = 1 - tanh^2 = 4 cdf (1 - cdf)
            slope = cdf + 2.0 * x * cdf * (1.0 - cdf) * (c * (1.0 + 3 * 0.044715 * x2))
        return x * cdf, slope

    def gelu_tanh_vjp(self, gy, saved):
        """gx = gy * dy/dx."""
        return gy * saved

    def dropout_mask(self, place: random.Place, shape: tuple[int, ...], p: float, causal: bool = False):
        """Booleans, True where an element is kept, and the factor 1 / (1 - p) that keeps the mean.

        An element is dropped if its 16 random bits are below p * 65536, so p is rounded to a multiple of 2**-16.
        causal: the mask is for attention's weights, (..., S, T) with the keys down, and may hold anything for what a
        query does not see.
        """
        threshold = round(p * 65536)
        bits = random.bits16(place, math.prod(shape)).reshape(shape)
        keep = self.asarray(bits >= threshold)
        return keep, dropout_scale(threshold)

    def dropout(self, x, keep, scale: float, residual=None):
        """x * scale where it is kept and else 0, plus the residual if there is one."""
        y = self.select(x, keep)
        y *= scale
        if residual is not None:
            y += residual
        return y

    def draw_dropout(self, x, place: random.Place, p: float, residual=None):
        """(y, keep, scale): a mask for x, and what `dropout` makes of x by it."""
        keep, scale = self.dropout_mask(place, x.shape, p)
        return self.dropout(x, keep, scale, residual), keep, scale

    # -- normalisation --

    def softmax(self, x, axis: int = -1):
        """exp(x) / sum(exp(x)) along `axis`, shifted by the maximum so that nothing overflows."""
        if not x.size:
            return x.copy()
        y = self.xp.exp(x - x.max(axis=axis, keepdims=True))
        y /= y.sum(axis=axis, keepdims=True)
        return y

    def softmax_vjp(self, gy, y, axis: int = -1):
        """gx = y * (gy - sum(gy * y))."""
        gx = gy * y
        gx -= y * gx.sum(axis=axis, keepdims=True)
        return gx

    def log_softmax(self, x, axis: int = -1):
        """x - log(sum(exp(x))) along `axis`."""
        if not x.size:
            return x.copy()
        y = x - x.max(axis=axis, keepdims=True)
        y -= self.xp.log(self.xp.exp(y).sum(axis=axis, keepdims=True))
        return y

    def log_softmax_vjp(self, gy, y, axis: int = -1):
        """gx = gy - softmax(x) * sum(gy)."""
        return gy - self.xp.exp(y) * gy.sum(axis=axis, keepdims=True)

    def layer_norm(self, x, weight, bias, eps: float):
        """(y, saved) of y = xhat * weight + bias, xhat = (x - mean) * rstd over the last axis; saved: xhat, rstd.

        Counted from the row's first element: that difference is exact where the numbers are near each other, however
        far from 0, and a row of equal numbers gives 0.
        """
        xhat = x - x[..., :1]
        xhat -= _row_means(xhat)
        rstd = 1.0 / self.xp.sqrt(_row_means(xhat * xhat) + eps)
        xhat *= rstd
        y = xhat if weight is None else xhat * weight
        return y if bias is None else y + bias, (xhat, rstd)

    def layer_norm_vjp(self, gy, saved, weight, has_bias: bool):
        """With g = gy * weight:
        gx = rstd * (g - mean(g) - xhat * mean(g * xhat)), gweight = sum(gy * xhat), gbias = sum(gy)."""
        xhat, rstd = saved
        gweight = self.sum_rows(as_rows(gy * xhat)) if weight is not None else None
        gbias = self.sum_rows(as_rows(gy)) if has_bias else None
        g = gy if weight is None else gy * weight
        gx = g - _row_means(g)
        gx -= xhat * _row_means(g * xhat)
        gx *= rstd
        return gx, gweight, gbias

    # -- tables and losses --

    def embedding(self, ids, weight):
        """The rows `ids` (any shape) of weight (V, C): ids.shape + (C,)."""
        self.check_ids(ids, weight.shape[0], "embedding")
        return weight[ids]

    def embedding_vjp(self, gy, ids, rows: int):
        """gweight (rows, C): the sum of the rows of gy that used each row of the table."""
        gweight = self.xp.zeros((rows, gy.shape[-1]), gy.dtype)
        self.index_add(gweight, ids, gy)
        return gweight

    def gather_blocks(self, tokens, starts, length: int):
        """tokens[start : start + length] and the same one token later, for each of `starts` (B,): int64 (B, length)."""
        index = starts[:, None] + self.xp.arange(length)
        return tokens[index].astype(np.int64), tokens[index + 1].astype(np.int64)

    def index_add(self, x, index, values) -> None:
        """x[index] += values in place, where an element may be named more than once."""
        self.xp.add.at(x, index, values)

    def cross_entropy(self, logits, targets, ignore_index: int):
        """(losses (N,), saved) of -log softmax(logits)[targets], logits (N, V); saved: the probabilities (N, V).

        A row whose target is `ignore_index` has loss 0.
        """
        self.check_ids(targets, logits.shape[1], "cross_entropy", ignore_index)
        if not logits.size:
            return self.xp.zeros(len(targets), logits.dtype), logits
        valid = targets != ignore_index
        rows, at = self.xp.arange(len(targets)), self.xp.where(valid, targets, 0)
        shifted = logits - logits.max(axis=1, keepdims=True)
        picked = shifted[rows, at]
        probs = self.xp.exp(shifted, out=shifted)
        total = probs.sum(axis=1, keepdims=True)
        probs /= total
        return self.xp.where(valid, self.xp.log(total[:, 0]) - picked, 0.0), probs

    def cross_entropy_vjp(self, gy, saved, targets, ignore_index: int):
        """glogits = (softmax(logits) - onehot(targets)) * gy for gy (N,) or (1,), zero in the rows that are ignored."""
        probs, valid = saved, targets != ignore_index
        if not probs.size:
            return probs
        gy = self.select(gy.astype(probs.dtype, copy=False), valid)
        glogits = probs * gy[:, None]
        glogits[~valid] = 0  # though their logits may be NaN
        glogits[self.xp.arange(len(targets)), self.xp.where(valid, targets, 0)] -= gy
        return glogits

    # -- attention --

    def attention(self, q, k, v, causal: bool, scale: float, keep, keep_scale: float, out=None):
        """(y, saved) of y = dropout(softmax(q @ k.T * scale)) @ v.

        q (..., T, D); k (..., S, D); v (..., S, E); y (..., T, E), written into `out` if given.
        causal: query t sees keys 0 .. t + S - T. keep: dropout's booleans (..., S, T), or None.
        saved: what attention_vjp needs beside its other arguments; here the probabilities, before and after dropout.
        """
        scores = self.gemm(q, k, trans_b=True)
        scores *= scale
        if causal:
            scores = self.xp.where(self.future(*scores.shape[-2:]), -math.inf, scores).astype(scores.dtype, copy=False)
        probs = self.softmax(scores)
        kept = probs
        if keep is not None:
            kept = self.select(probs, keep.swapaxes(-1, -2))
            kept *= keep_scale
        return self.gemm(kept, v, out=out), (probs, kept)

    def attention_vjp(self, gy, q, k, v, saved, scale: float, keep_scale: float, out=(None, None, None)):
        """gq, gk, gv, written into the three arrays of `out` if given.

        With P = softmax(S), S = q @ k.T * scale, and D = dropout(P):
        gD = gy @ v.T, gv = D.T @ gy, gS = gD * D - P * sum(gD * D), gq = gS @ k * scale, gk = gS.T @ q * scale."""
        (probs, kept), (gq, gk, gv) = saved, out
        gv = self.gemm(kept, gy, trans_a=True, out=gv)
        gscores = self.gemm(gy, v, trans_b=True)
        gscores *= kept
        gscores -= probs * gscores.sum(axis=-1, keepdims=True)
        gscores *= scale
        return self.gemm(gscores, k, out=gq), self.gemm(gscores, q, trans_a=True, out=gk), gv

    def attention_of_next(self, qkv, cache, position, scale: float):
        """Causal self-attention of one more token: qkv (B, 1, 3 H D) -> (B, 1, H D). Its keys and values go into
        cache (2, B, H, L, D) at `position`, an integer array (1,), up to which it then attends."""
        (_, B, H, _, D), position = cache.shape, int(position[0])
        qkv = qkv.reshape(B, 3, H, 1, D).swapaxes(0, 1)
        cache[:, :, :, position : position + 1] = qkv[1:]
        q, (keys, values) = qkv[0], cache[:, :, :, : position + 1]
        weights = self.softmax(self.gemm(q * scale, keys, trans_b=True))  # (B, H, 1, position + 1)
        return self.gemm(weights, values).reshape(B, 1, H * D)

    def future(self, n_queries: int, n_keys: int):
        """(T, S): whether a query would see a later key; the last query sees the last key."""
        queries = self.xp.arange(n_queries)[:, None] + (n_keys - n_queries)
        return self.xp.arange(n_keys)[None, :] > queries

    # -- the optimiser, on flat buffers --

    def l2_norm(self, x):
        """The Euclidean norm of a flat array, as a 0-d array that stays on the device."""
        return self.xp.sqrt(self.sum(x * x, (0,)))

    def clip_factor(self, norm, max_norm: float):
        """min(1, max_norm / norm), which gradients of this norm are to be multiplied by: 0-d, stays on the device."""
        return self.xp.minimum(max_norm / (norm + 1e-6), 1.0)

    def adamw_step(self, p, g, m, v, rates, betas: tuple, decay: float, grad_scale=1.0) -> None:
        """One step of AdamW (Loshchilov & Hutter 2019, algorithm 2) on flat arrays; p, m and v are updated in place.

        rates: what `AdamW.rates` says of this step, three numbers, or an array of three on the device.
        grad_scale: a number, or a 0-d array, that multiplies the gradients.
        """
        (beta1, beta2), (lr, scaled_lr, scaled_eps) = betas, rates
        m *= beta1
        m += ((1 - beta1) * grad_scale) * g
        v *= beta2
        square = g * g
        square *= (1 - beta2) * grad_scale**2
        v += square
        update = self.xp.sqrt(v, out=square)
        update += scaled_eps
        self.xp.divide(m, update, out=update)
        update *= scaled_lr
        p *= 1 - lr * decay
        p -= update


def _row_means(x):
    """The mean of each row, (..., 1); of a row without elements 0."""
    return x.sum(axis=-1, keepdims=True) / max(1, x.shape[-1])
