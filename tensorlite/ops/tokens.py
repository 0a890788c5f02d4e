"""The two ends of a language model: looking tokens up, and scoring predictions of them."""

from tensorlite.backends import backend_of
from tensorlite.backends.base import as_rows
from tensorlite.ops.elementwise import masked_fill
from tensorlite.ops.normalization import log_softmax
from tensorlite.ops.operands import data, ids_of, number, real_data
from tensorlite.ops.reductions import mean, sum
from tensorlite.tensor import Tensor, needs_grad, record
from tensorlite.words import explained


@explained
def embedding(ids, weight) -> Tensor:
    """The rows of a table: ids, integers of any shape, weight (V, C) -> ids.shape + (C,).

    gweight[i] = sum(gy) over the uses of row i, in a fixed order.

    An id outside [0, V) is an IndexError on the CPU.
    """
    ids, w = ids_of(ids), data(weight)
    be = backend_of(ids, w)
    if w.ndim != 2:
        raise ValueError(f"the table must have shape (V, C), got {w.shape}")
    rows, y = w.shape[0], be.embedding(ids, w)
    ids = ids.copy() if needs_grad(weight) else None
    return record(y, (weight,), lambda gy: (be.embedding_vjp(gy, ids, rows),))


@explained
def cross_entropy(
    logits, targets, ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0
) -> Tensor:
    """-log softmax(logits)[target], in nats: logits (..., V), targets (...) integers.

    glogits = gy * (softmax(logits) - onehot(target)) / n, with n the targets that count for a mean, else 1.

    ignore_index: targets of this value count for nothing, neither in the sum nor in the mean.
    reduction: "mean" over the targets that count (0 if there are none), "sum", or "none" for each: shape (...).
    label_smoothing: the share of each target that is spread evenly over all V (Szegedy et al. 2016, section 7).
    """
    logits_data, targets = real_data(logits), ids_of(targets)
    be = backend_of(logits_data, targets)
    ignore_index, label_smoothing = number(ignore_index, "ignore_index"), number(label_smoothing, "label_smoothing")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'cross_entropy: reduction must be "mean", "sum" or "none", got {reduction!r}')
    if logits_data.ndim == 0 or logits_data.shape[:-1] != targets.shape:
        raise ValueError(f"expected logits (..., V) and targets (...), got {logits_data.shape} and {targets.shape}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be from 0 to 1, got {label_smoothing}")
    if label_smoothing:
        return _smoothed_cross_entropy(logits, targets, ignore_index, reduction, label_smoothing)
    shape = logits_data.shape
    flat = targets.reshape(-1).copy() if needs_grad(logits) else targets.reshape(-1)
    losses, saved = be.cross_entropy(as_rows(logits_data), flat, ignore_index)
    if reduction == "none":
        out, weight = losses.reshape(targets.shape), 1.0
    elif reduction == "sum":
        out, weight = be.sum(losses, (0,)), 1.0
    else:
        counted = (flat != ignore_index).sum()
        weight = 1.0 / be.xp.maximum(counted, 1).astype(losses.dtype)
        out = be.sum(losses, (0,)) * weight

    def vjp(gy):
        return (be.cross_entropy_vjp(gy.reshape(-1) * weight, saved, flat, ignore_index).reshape(shape),)

    return record(out, (logits,), vjp)


def _smoothed_cross_entropy(logits, targets, ignore_index: int, reduction: str, share: float) -> Tensor:
    """(1 - share) * cross entropy - share * mean(log softmax(logits))."""
    ignored = targets == ignore_index
    logits = masked_fill(logits, ignored[..., None], 0.0)  # though they may be NaN
    losses = cross_entropy(logits, targets, ignore_index, "none") * (1.0 - share)
    losses = masked_fill(losses - mean(log_softmax(logits), -1) * share, ignored, 0.0)
    if reduction == "none":
        return losses
    return sum(losses) / (1 if reduction == "sum" else backend_of(targets).xp.maximum((~ignored).sum(), 1))
