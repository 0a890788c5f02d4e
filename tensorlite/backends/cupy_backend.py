"""The GPU backend: CuPy for arrays, cuBLAS for products, and kernels of our own (`cuda/*.cu`) for what a training step
consists of besides. This is the only module that imports cupy.

A kernel computes in the precision of the dtype it is given, but for bfloat16 in float32. For other dtypes the portable
version serves.
"""

import contextlib
import functools
import math

import numpy as np

from tensorlite.backends.base import Backend, BackendError, as_rows, dropout_scale
from tensorlite.backends.cuda.card import Card
from tensorlite.backends.cuda.cublas import Gemm
from tensorlite.backends.cuda.failures import explain_failure
from tensorlite.backends.cuda.flash import FlashAttention, Saved
from tensorlite.backends.cuda.kernels import STORAGE, Kernels, null_pointers, prepare_cache
from tensorlite.backends.cuda.replay import GraphStream, Replay
from tensorlite.backends.cuda.uploads import Uploads

THREADS = 256  # of a block, where nothing speaks for another number
WARP = 32


def kernel_method(method):
    """`method` for arrays that there are kernels for, by its first argument, and the portable version for others."""
    portable = getattr(Backend, method.__name__)

    @functools.wraps(method)
    def choose(self, x, *args, **kwargs):
        chosen = method if _has_kernels(x.dtype) else portable
        return chosen(self, x, *args, **kwargs)

    return choose


@functools.cache  # a dtype takes a microsecond to say its name
def _has_kernels(dtype) -> bool:
    return dtype.name in STORAGE


class CupyBackend(Backend):
    name = "cupy"
    graph = True

    def __init__(self, cupy, special, cublas):
        self.xp = cupy
        self._special = special
        self._gemm = Gemm(cupy, cublas, tf32=False)
        self._card, self._kernels, self._uploads = Card.of(cupy), Kernels(cupy), Uploads(cupy)
        self._graph_stream = None
        self.emulates_bfloat16 = self._card.capability < 80
        self._flash = FlashAttention(cupy, self._kernels, capable=not self.emulates_bfloat16)

    # -- arrays and the host --

    def to_numpy(self, x):
        return self.xp.asnumpy(x)

    def upload(self, x, values):
        self._uploads(x, values)

    def dtype(self, name):
        if name != "bfloat16":
            return super().dtype(name)
        try:
            from ml_dtypes import bfloat16
        except ImportError:
            raise BackendError("bfloat16 needs the package ml_dtypes: pip install ml_dtypes") from None
        return np.dtype(bfloat16)

    @property
    def tf32(self) -> bool:
        """Whether float32 products may round their factors to TF32, several times as fast."""
        return self._gemm.tf32

    @tf32.setter
    def tf32(self, allowed: bool) -> None:
        self._gemm.tf32 = allowed

    def replayable(self, function):
        if self.graph and self._graph_stream is None:
            self._graph_stream = GraphStream(self.xp)
        return Replay(self._graph_stream if self.graph else None, function)

    def memory_size(self):
        return self.xp.cuda.runtime.memGetInfo()[1]

    def describe(self):
        return f"{self.name} on {self._card.name}"

    def explain_memory_error(self, error):
        if not isinstance(error, self.xp.cuda.memory.OutOfMemoryError):
            return None
        free, total = self.xp.cuda.runtime.memGetInfo()
        return f"{str(error).rstrip('.')}; {free / 2**30:.1f} of the GPU's {total / 2**30:.1f} GiB are free"

    def explain_failure(self, error):
        return explain_failure(error, self._card.machine)

    # -- products --

    def gemm(self, a, b, trans_a=False, trans_b=False, out=None):
        return self._gemm(a, b, trans_a, trans_b, out)

    @kernel_method
    def linear(self, x, w, b):
        x2 = as_rows(x)
        y = self._empty_rows(x2.shape[0], w.shape[0], x.dtype)
        if b is not None:
            packs, threads = y.strides[0] // 16, _row_threads(y.strides[0] // 16)
            args = (min(len(y), 2048), -(-packs // threads)), threads, self._contiguous(b, _real(x.dtype))
            self._launch("fill_rows", x.dtype, *args, y, *y.shape, _pitch(y))
        self._gemm(x2, w, trans_b=True, out=y, accumulate=b is not None)
        return y.reshape(*x.shape[:-1], w.shape[0])

    @kernel_method
    def linear_vjp(self, gy, x, w, has_bias, need_gx):
        gy2 = as_rows(gy)
        gx = self._gemm(gy2, w).reshape(x.shape) if need_gx else None
        gw = self._gemm(gy2, as_rows(x), trans_a=True, dtype=_real(x.dtype))
        return gx, gw, self.sum_rows(gy2) if has_bias else None

    @kernel_method
    def sum_rows(self, x):
        (N, C), x, at_once = x.shape, self._contiguous(x), _at_once(x)
        slabs = max(1, min(64, N // 64))
        sums, blocks = self.xp.empty((slabs, C), _real(x.dtype)), (-(-C // (at_once * WARP)), slabs)
        self._launch("sum_rows", x.dtype, blocks, THREADS, x, sums, N, C, int(at_once > 1))
        return self._sum_of_sums(sums, x.dtype)

    def _sum_of_sums(self, sums, dtype):
        """The sum over the rows of sums that a kernel for arrays of this dtype has made side by side."""
        total = self.xp.empty(sums.shape[1], sums.dtype)
        self._launch("sum_rows_of_sums", dtype, (-(-total.size // WARP),), 1024, sums, total, *sums.shape)
        return total

    # -- activations --

    def erf(self, x):
        return self._special.erf(x)

    @kernel_method
    def relu(self, x):
        return self._elementwise("relu", x)

    @kernel_method
    def relu_vjp(self, gy, y):
        return self._elementwise("relu_vjp", gy, y)

    @kernel_method
    def gelu(self, x, need_grad):
        return self._elementwise("gelu", x), x if need_grad else None

    @kernel_method
    def gelu_vjp(self, gy, saved):
        return self._elementwise("gelu_vjp", gy, saved)

    @kernel_method
    def gelu_tanh(self, x, need_grad):
        return self._elementwise("gelu_tanh", x), x if need_grad else None

    @kernel_method
    def gelu_tanh_vjp(self, gy, saved):
        return self._elementwise("gelu_tanh_vjp", gy, saved)

    def dropout_mask(self, place, shape, p, causal=False):
        n, threshold = math.prod(shape), round(p * 65536)
        keep = self.xp.empty(shape, bool)
        if n:
            blocks = -(-(place.element % 16 + n) // 16)  # of Philox's numbers, one to a thread
            args = keep, n, *self._place(place), threshold, int(causal), *(shape[-2:] if causal else (1, 1))
            self._launch("dropout_mask", np.dtype(np.float32), (-(-blocks // THREADS),), THREADS, *args)
        return keep, dropout_scale(threshold)

    @kernel_method
    def draw_dropout(self, x, place, p, residual=None):
        if place.element % 16:
            return super().draw_dropout(x, place, p, residual)
        n, threshold, residual = x.size, round(p * 65536), self._contiguous(residual)
        scale, y, keep = dropout_scale(threshold), self.xp.empty(x.shape, x.dtype), self.xp.empty(x.shape, bool)
        args = self._contiguous(x), residual, y, keep, n, *self._place(place), threshold, scale
        self._launch("draw_dropout", x.dtype, (-(-n // (16 * THREADS)),), THREADS, *args)
        return y, keep, scale

    def _place(self, place):
        """A place in a random stream, as the kernels take it."""
        step = place.step if isinstance(place.step, self.xp.ndarray) else self.asarray([place.step], np.uint64)
        return place.element, place.seed, place.stream, step, place.call

    @kernel_method
    def dropout(self, x, keep, scale, residual=None):
        keep, residual = self._contiguous(keep), self._contiguous(residual)
        y = self.xp.empty(x.shape, x.dtype)
        self._launch_packed("dropout", self._contiguous(x), keep, residual, y, x.size, float(scale))
        return y

    # -- normalisation --

    @kernel_method
    def layer_norm(self, x, weight, bias, eps):
        x, C = self._contiguous(x), x.shape[-1]
        N = x.size // max(C, 1)
        y, (mean, rstd) = self.xp.empty(x.shape, x.dtype), (self.xp.empty(N, _real(x.dtype)) for _ in range(2))
        weight, bias = (self._contiguous(p, mean.dtype) for p in (weight, bias))
        args = x, weight, bias, y, mean, rstd, N, C, float(eps)
        self._launch("layer_norm", x.dtype, (-(-N // (THREADS // WARP)),), THREADS, *args)
        return y, (x, mean, rstd)

    @kernel_method
    def layer_norm_vjp(self, gy, saved, weight, has_bias):
        (x, mean, rstd), C = saved, gy.shape[-1]
        N, gx, at_once = gy.size // max(C, 1), self.xp.empty(gy.shape, gy.dtype), _at_once(gy)
        warps = min(16, max(1, -(-C // (at_once * WARP))))  # of a block, where each thread has its columns
        rounds = max(1, min(16 // warps, N // (128 * warps)))  # few sums, but precise, and blocks to fill a GPU
        blocks = -(-N // (rounds * warps)), -(-C // (at_once * warps * WARP))
        sums = None if weight is None and not has_bias else self.xp.empty((blocks[0], 2 * C), mean.dtype)
        args = self._contiguous(gy), x, self._contiguous(weight, mean.dtype), mean, rstd, gx, sums, N, C, rounds
        self._launch("layer_norm_vjp", gy.dtype, blocks, warps * WARP, *args)
        if sums is not None:
            gweight, gbias = self._sum_of_sums(sums, gy.dtype).reshape(2, C)
        return gx, None if weight is None else gweight, gbias if has_bias else None

    # -- tables and losses --

    @kernel_method
    def embedding_vjp(self, gy, ids, rows):
        gy, ids, N, C = self._contiguous(gy), self._contiguous(ids, np.int64), ids.size, gy.shape[-1]
        threads, slabs = max(THREADS, _row_threads(C)), max(1, min(32, N // (4 * max(rows, 1))))
        shift = max(min(9, rows.bit_length() - 1), (rows - 1 >> 7).bit_length())  # a block has 128 rows at most
        grid, counters = (1 << shift, -(-C // threads), slabs), (1 + threads // WARP) * ((rows - 1 >> shift) + 1)
        order = self.xp.empty((grid[1], N), np.int32)
        sums = self.xp.empty((slabs, rows * C), _real(gy.dtype))  # of several slabs no more than a quarter of gy
        args = gy, ids, order, sums, N, C, rows, shift
        self._launch("embedding_vjp", gy.dtype, grid, threads, *args, shared=4 * counters)
        return (sums if slabs == 1 else self._sum_of_sums(sums, gy.dtype)).reshape(rows, C)

    @kernel_method
    def cross_entropy(self, logits, targets, ignore_index):
        (N, V), targets = logits.shape, self._contiguous(targets, np.int64)
        if logits.strides[1] != logits.itemsize:
            logits = self._contiguous(logits)
        losses, lse = (self.xp.empty(N, _real(logits.dtype)) for _ in range(2))
        args = logits, _pitch(logits), targets, losses, lse, V, int(ignore_index)
        self._launch("cross_entropy", logits.dtype, (N,), _row_threads(V * logits.itemsize // 16, THREADS), *args)
        return losses, (logits, lse)

    def cross_entropy_vjp(self, gy, saved, targets, ignore_index):
        if not isinstance(saved, tuple):
            return super().cross_entropy_vjp(gy, saved, targets, ignore_index)
        (logits, lse), targets = saved, self._contiguous(targets, np.int64)
        (N, V), glogits = logits.shape, self._empty_rows(*logits.shape, logits.dtype)
        gy, gy_step = self._contiguous(gy, lse.dtype), 0 if gy.size == 1 else 1
        args = gy, gy_step, logits, _pitch(logits), targets, lse, glogits, _pitch(glogits), V, int(ignore_index)
        self._launch("cross_entropy_vjp", logits.dtype, (N,), _row_threads(V * logits.itemsize // 16, THREADS), *args)
        return glogits

    def gather_blocks(self, tokens, starts, length):
        x, y = (self.xp.empty((len(starts), length), np.int64) for _ in range(2))
        args = tokens.view(np.uint8), tokens.itemsize, starts, x, y, len(starts), length
        self._launch("gather_blocks", np.dtype(np.float32), (-(-x.size // THREADS),), THREADS, *args)
        return x, y

    # -- attention --

    @kernel_method
    def attention(self, q, k, v, causal, scale, keep, keep_scale, out=None):
        if scale > 0 and self._flash.fits(q, k, v, q if out is None else out):
            return self._flash.attention(q, k, v, causal, scale, keep, keep_scale, out)
        probs = self._gemm(k, q, trans_b=True)  # the scores at first, keys down: (..., S, T)
        keep = self._contiguous(keep)
        kept = probs if keep is None else self.xp.empty(probs.shape, probs.dtype)
        self._launch_columns("attention_softmax", probs, keep, kept, causal, scale, keep_scale)
        return self._gemm(kept, v, trans_a=True, out=out), (probs, kept, keep, causal)

    @kernel_method
    def attention_vjp(self, gy, q, k, v, saved, scale, keep_scale, out=(None, None, None)):
        if isinstance(saved, Saved):
            return self._flash.attention_vjp(gy, q, k, v, saved, scale, keep_scale, out)
        (probs, kept, keep, causal), (gq, gk, gv) = saved, out
        g = self._gemm(v, gy, trans_b=True)
        self._launch_columns("attention_softmax_vjp", g, probs, keep, causal, scale, keep_scale)
        gv = self._gemm(kept, gy, out=gv)
        return self._gemm(g, k, trans_a=True, out=gq), self._gemm(g, q, out=gk), gv

    @kernel_method
    def attention_of_next(self, qkv, cache, position, scale):
        _, B, H, L, D = cache.shape
        y = self.xp.empty((B, 1, H * D), qkv.dtype)
        args = self._contiguous(qkv), cache, y, position, H, L, D, float(scale)
        self._launch("attention_of_next", qkv.dtype, (B * H,), 512, *args, shared=L * _real(qkv.dtype).itemsize)
        return y

    # -- the optimiser, on flat buffers --

    @kernel_method
    def l2_norm(self, x):
        blocks = min(1024, -(-x.size // THREADS))
        sums, norm = (self.xp.empty(shape, _real(x.dtype)) for shape in (blocks, ()))
        self._launch("sum_squares", x.dtype, (blocks,), THREADS, x, sums, x.size)
        self._launch("root_of_sum", x.dtype, (1,), THREADS, sums, norm, blocks)
        return norm

    @kernel_method
    def adamw_step(self, p, g, m, v, rates, betas, decay, grad_scale=1.0):
        dtype = _real(p.dtype)
        rates = self.asarray(rates, dtype)
        unscaled = not isinstance(grad_scale, self.xp.ndarray) and grad_scale == 1.0
        grad_scale = None if unscaled else self.asarray(grad_scale, dtype)
        args = p, g, m, v, rates, grad_scale, *map(float, (*betas, decay)), p.size
        self._launch("adamw_step", p.dtype, (-(-p.size // THREADS),), THREADS, *args)

    # -- launching --

    def _launch(self, kernel: str, dtype, blocks: tuple[int, ...], threads: int, *args, shared: int = 0) -> None:
        if 0 in blocks:  # there is nothing to do, and CUDA takes no such grid
            return
        function, args = self._kernels(kernel, dtype), null_pointers(args)
        self._card.share(kernel, function, shared)
        function(blocks, (threads,), args, shared_mem=shared)

    def _launch_packed(self, kernel: str, x, *args) -> None:
        """A kernel whose threads take 16 bytes of x each."""
        self._launch(kernel, x.dtype, (-(-x.nbytes // (16 * THREADS)),), THREADS, x, *args)

    def _elementwise(self, kernel: str, x, *others):
        """A kernel that makes y of x and others of its shape."""
        y = self.xp.empty(x.shape, x.dtype)
        self._launch_packed(kernel, self._contiguous(x), *map(self._contiguous, others), y, x.size)
        return y

    def _launch_columns(self, kernel: str, scores, *args) -> None:
        """A kernel whose threads take a column of the scores (..., S, T) each; the last three of the arguments are
        whether attention is causal, and the two scales."""
        (*arrays, causal, scale, keep_scale), (S, T) = args, scores.shape[-2:]
        args = scores, *arrays, S, T, int(causal), float(scale), float(keep_scale)
        self._launch(kernel, scores.dtype, (math.prod(scores.shape[:-2]), -(-T // THREADS)), THREADS, *args)

    def _empty_rows(self, rows: int, columns: int, dtype):
        """A matrix whose rows begin at multiples of 16 bytes, without which cuBLAS cannot use the fast ways to load."""
        multiple = 16 // dtype.itemsize
        return self.xp.empty((rows, -(-columns // multiple) * multiple), dtype)[:, :columns]

    def _contiguous(self, x, dtype=None):
        """x as a kernel needs it, which knows nothing of strides and reads 16 bytes at a time; None stays."""
        if x is None:
            return None
        x = self.xp.ascontiguousarray(x, dtype)
        return x if x.data.ptr % 16 == 0 else x.copy()


@functools.cache
def _real(dtype):
    """What a kernel computes in, and makes sums and weights' gradients of, for arrays of this dtype."""
    return np.dtype(np.float32) if dtype.name == "bfloat16" else dtype


def _pitch(x) -> int:
    """From row to row of a matrix, in elements."""
    return x.strides[0] // x.itemsize


def _at_once(x) -> int:
    """How many elements of a row are read at once: 16 bytes of them, where every row begins at a multiple of that."""
    return 1 if x.shape[-1] * x.itemsize % 16 else 16 // x.itemsize


def _row_threads(length: int, most: int = 1024) -> int:
    """Threads of a block that takes a row of this length."""
    return max(WARP, min(most, -(-length // WARP) * WARP))


def load() -> CupyBackend:
    """The backend, if there is a CuPy with a device to run on. BackendError says what is missing."""
    doctor = "python -m tensorlite.doctor says what to install"
    prepare_cache()
    try:
        import cupy
        from cupyx.scipy import special
    except ImportError as error:
        raise BackendError(f"the cupy backend cannot import CuPy ({error}): {doctor}") from None
    try:
        devices = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise BackendError(
            f"the cupy backend found CuPy {cupy.__version__} but no usable GPU ({error}): "
            f"install or update the NVIDIA driver, or use --backend numpy; {doctor}"
        ) from None
    if devices == 0:
        raise BackendError("the cupy backend found no NVIDIA GPU on this machine: use --backend numpy")
    try:
        from nvmath.bindings import cublas
    except ImportError as error:
        raise BackendError(f"the cupy backend cannot import nvmath-python ({error}): {doctor}") from None
    with contextlib.suppress(ImportError):
        import ml_dtypes  # noqa: F401 - CuPy knows bfloat16 from here on
    return CupyBackend(cupy, special, cublas)
