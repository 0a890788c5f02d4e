"""Scaled dot-product attention (Vaswani et al. 2017, section 3.2)."""

import math

from tensorlite.backends import backend_of
from tensorlite.dtypes import BOOLEAN, FLOAT32, FLOAT64, INTEGER, KINDS
from tensorlite.ops.dropout import next_place
from tensorlite.ops.elementwise import cast, masked_fill, where
from tensorlite.ops.normalization import softmax
from tensorlite.ops.operands import data, number, of_one_dtype, real_data
from tensorlite.ops.products import matmul
from tensorlite.ops.shape import transpose
from tensorlite.tensor import Tensor, needs_grad, record
from tensorlite.words import explained


@explained
def scaled_dot_product_attention(
    q, k, v, *, attn_mask=None, causal: bool = False, dropout: float = 0.0, scale: float | None = None
) -> Tensor:
    """softmax(q @ k.T * scale) @ v: q (..., T, D), k (..., S, D), v (..., S, E) -> (..., T, E).

    With the weights w = softmax(...), gw = gy @ v.T and gs = w * (gw - sum(gw * w)) * scale:

    gq = gs @ k, gk = gs.T @ q, gv = w.T @ gy.

    The leading axes (batch, heads) of the three are equal. Keys and values may be another sequence's (cross
    attention).
    attn_mask: broadcasts to (..., T, S). Booleans, True where a query sees a key, or floats that are added to the
        scores, and have a gradient. It takes the plain way, with all the scores in memory. A query that sees no key
        gets zeros.
    causal: query t sees the keys 0 .. t + S - T, so that the last query sees every key.
    dropout: probability of dropping a weight, drawn from the current `random.scope`.
    scale: 1 / sqrt(D) if None.
    """
    q_data, k_data, v_data = of_one_dtype(("q", "k", "v"), q, k, v, real=True)
    be = backend_of(q_data)
    _check_shapes(q_data.shape, k_data.shape, v_data.shape, causal)
    scale = 1.0 / math.sqrt(max(1, q_data.shape[-1])) if scale is None else number(scale, "scale")
    keep, keep_scale = _draw(be, (*k_data.shape[:-1], q_data.shape[-2]), dropout, causal)
    if attn_mask is not None:
        tensors = [x if needs_grad(x) else Tensor(d) for x, d in ((q, q_data), (k, k_data), (v, v_data))]
        return _masked_attention(*tensors, attn_mask, causal, scale, keep, keep_scale)
    y, saved = be.attention(q_data, k_data, v_data, causal, scale, keep, keep_scale)

    def vjp(gy):
        return be.attention_vjp(gy, q_data, k_data, v_data, saved, scale, keep_scale)

    return record(y, (q, k, v), vjp)


def _masked_attention(q, k, v, mask, causal: bool, scale: float, keep, keep_scale: float) -> Tensor:
    """Attention composed of other ops, in float32 at least, as the fused kernels have it."""
    dtype, wide = q.dtype, q.dtype if q.dtype == FLOAT64 else FLOAT32
    scores = matmul(cast(q, wide) * scale, transpose(cast(k, wide)))  # (..., T, S)
    be = backend_of(scores.data)
    scores = _apply_mask(scores, mask)
    if causal:
        scores = masked_fill(scores, be.future(*scores.shape[-2:]), -math.inf)
    blind = (scores.data == -math.inf).all(axis=-1, keepdims=True)  # queries without a key, whose softmax would be NaN
    weights = masked_fill(softmax(masked_fill(scores, blind, 0.0)), blind, 0.0)
    if keep is not None:
        weights = where(keep.swapaxes(-1, -2), weights, 0.0) * keep_scale
    return cast(matmul(weights, cast(v, wide)), dtype)


def _apply_mask(scores, mask):
    """-inf where a mask of booleans is False; or the scores plus a mask of floats."""
    m = data(mask)
    be = backend_of(scores.data, m)
    if KINDS[m.dtype] == INTEGER:
        raise TypeError(f"attn_mask must be booleans, or floats to add to the scores, got {m.dtype}")
    try:
        be.xp.broadcast_to(m, scores.shape)
    except ValueError:
        raise ValueError(f"attn_mask {m.shape} does not broadcast to the scores {scores.shape}") from None
    return where(m, scores, -math.inf) if KINDS[m.dtype] == BOOLEAN else scores + cast(mask, scores.dtype)


@explained
def self_attention(qkv, n_head: int, causal: bool = True, dropout: float = 0.0) -> Tensor:
    """Multi-head attention of a sequence to itself on packed projections: qkv (B, T, 3 C) -> (B, T, C).

    The last axis holds the queries, keys and values of all heads in turn, each C = n_head * D long. The same as
    splitting, `scaled_dot_product_attention` and joining the heads, without a copy of either.

    gqkv = gq, gk and gv of `scaled_dot_product_attention`, side by side.
    """
    x = real_data(qkv)
    be = backend_of(x)
    if x.ndim != 3 or n_head < 1 or x.shape[-1] % (3 * n_head):
        raise ValueError(f"expected qkv (B, T, 3 C) with C a multiple of {n_head} heads, got {x.shape}")
    B, T, C = x.shape[0], x.shape[1], x.shape[2] // 3

    def heads(packed):  # (B, T, n * C) -> n views (B, n_head, T, D)
        return packed.reshape(B, T, packed.shape[-1] // C, n_head, C // n_head).transpose(2, 0, 3, 1, 4)

    q, k, v = heads(x)
    scale = 1.0 / math.sqrt(C // n_head)
    keep, keep_scale = _draw(be, (B, n_head, T, T), dropout, causal)
    y = be.xp.empty((B, T, C), x.dtype)
    _, saved = be.attention(q, k, v, causal, scale, keep, keep_scale, out=heads(y)[0])

    def vjp(gy):
        gx = be.xp.empty((B, T, 3 * C), gy.dtype)
        be.attention_vjp(heads(gy)[0], q, k, v, saved, scale, keep_scale, out=tuple(heads(gx)))
        return (gx,)

    return record(y, (qkv,), vjp)


def _draw(be, shape, p: float, causal: bool):
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout must be from 0 to 1, got {p}")
    return be.dropout_mask(next_place(shape), shape, p, causal) if p else (None, 1.0)


def _check_shapes(q, k, v, causal: bool) -> None:
    fits = len(q) == len(k) == len(v) >= 2 and q[:-2] == k[:-2] == v[:-2] and q[-1] == k[-1] and k[-2] == v[-2]
    if not fits:
        expected = "q (..., T, D), k (..., S, D) and v (..., S, E)"
        raise ValueError(f"expected {expected}, got {q}, {k} and {v}")
    if causal and q[-2] > k[-2]:
        raise ValueError(f"{q[-2]} causal queries need as many keys, got {k[-2]}")
