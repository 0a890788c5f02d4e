"""Attention that never writes its scores out, by the kernels of cuda/flash_attention.cu."""

from typing import NamedTuple

import numpy as np

from tensorlite.backends.cuda.kernels import Kernels, null_pointers

HEAD_DIMS = (32, 64, 128)
LSE_MULTIPLE = 128  # to which the queries are rounded up in what is kept for the backward pass
THREADS = 128
QUERIES, TURN = 32, 64  # that the backward pass takes at a time, and that a block leaves to the next at a time
BLOCKS = 1024  # that begin together: at 128 keys each, what they read again and again takes about 64 MiB


class Saved(NamedTuple):
    """What the backward pass needs."""

    y: object
    lse: object  # base-2 logarithms of the sums of exponentials, float32
    keep: object
    causal: bool


class FlashAttention:
    """`attention` and `attention_vjp` of a Backend, for bfloat16 on tensor cores.

    cupy: the module, or what stands for it. capable: whether the device has such (compute capability 8.0).
    """

    def __init__(self, cupy, kernels: Kernels, capable: bool):
        self._cupy, self._kernels, self._capable = cupy, kernels, capable

    def fits(self, *arrays) -> bool:
        """Whether there are kernels for these q, k, v, and y or gradients."""
        first = arrays[0]
        return (
            first.dtype.name == "bfloat16"
            and first.ndim == 4
            and all(x.size for x in arrays)
            and first.shape[-1] in HEAD_DIMS
            and all(x.dtype == first.dtype and _aligned(x, first.shape[-1]) for x in arrays)
            and self._capable
        )

    def attention(self, q, k, v, causal: bool, scale: float, keep, keep_scale: float, out=None):
        (B, H, T, D), S = q.shape, k.shape[2]
        y = self._cupy.empty(q.shape, q.dtype) if out is None else out
        lse = self._cupy.empty((B, H, _rounded(T)), np.float32)
        rows, step = _tile(D)
        shared = 2 * (D + 8) * (rows + 4 * step) + _mask_bytes(keep, rows, step)
        tensors = [part for x in (q, k, v, y) for part in _tensor(x)]
        settings = _settings(keep, keep_scale, scale, causal, H, T, S)
        self._launch("flash_attention", D, (B * H, -(-T // rows)), shared, *tensors, lse, *settings)
        return y, Saved(y, lse, keep, causal)

    def attention_vjp(self, gy, q, k, v, saved: Saved, scale: float, keep_scale: float, out=(None, None, None)):
        (B, H, T, D), S = q.shape, k.shape[2]
        y, lse, keep, causal = saved
        if not _aligned(gy, D):
            gy = gy.copy()
        gq, gk, gv = (
            self._cupy.empty(x.shape, x.dtype) if g is None else g for x, g in zip((q, k, v), out, strict=True)
        )
        rows, heads = _tile(D)[0], B * H
        blocks = -(-S // rows)
        delta = self._cupy.empty(lse.shape, np.float32)
        sums = self._cupy.empty((heads, -(-T // QUERIES) * QUERIES, D), np.float32)
        done = self._cupy.empty(1 + heads * -(-T // TURN), np.uint32)
        tensors = [part for x in (y, gy) for part in _tensor(x)]
        self._launch("flash_attention_delta", D, (heads, -(-T * D // 1024)), 0, *tensors, delta, done, H, T)
        members = -(-heads // max(1, heads * blocks // BLOCKS))
        settings = _settings(keep, keep_scale, scale, causal, H, T, S)
        shared = 2 * (D + 8) * (2 * rows + 4 * QUERIES) + 2 * rows * (QUERIES + 8) + 16 * QUERIES
        shared += _mask_bytes(keep, rows, QUERIES)
        tensors = [part for x in (q, k, v, gy, gq, gk, gv) for part in _tensor(x)]
        args = *tensors, lse, delta, sums, done, members, *settings
        self._launch("flash_attention_vjp", D, (heads * blocks,), shared, *args)
        return gq, gk, gv

    def _launch(self, name: str, head_dim: int, blocks: tuple[int, ...], shared: int, *args) -> None:
        kernel = self._kernels.of_flash_attention(name, head_dim)
        kernel(blocks, (THREADS,), null_pointers(args), shared_mem=shared)


def _aligned(x, head_dim: int) -> bool:
    """Whether the rows of x (B, H, rows, head_dim) are contiguous and begin at multiples of 16 bytes."""
    return (
        x.shape[-1] == head_dim
        and x.strides[-1] == x.itemsize
        and x.data.ptr % 16 == 0
        and all(stride % 16 == 0 for stride in x.strides[:-1])
    )


def _tile(head_dim: int) -> tuple[int, int]:
    """ROWS and STEP of the kernels."""
    return (64, 32) if head_dim == 128 else (128, 64)


def _mask_bytes(keep, rows: int, step: int) -> int:
    """Shared memory for two tiles of the mask."""
    return 0 if keep is None else 2 * rows * (step + 16)


def _rounded(queries: int) -> int:
    return -(-queries // LSE_MULTIPLE) * LSE_MULTIPLE


def _tensor(x) -> tuple:
    """An array as the kernels take it: itself, and its strides of batch, head and row in elements."""
    return (x, *(stride // x.itemsize for stride in x.strides[:3]))


def _settings(keep, keep_scale, scale, causal, *sizes) -> tuple:
    return (keep, float(keep_scale), float(scale), int(causal), *sizes)
