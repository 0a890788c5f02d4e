"""The cases of tensorlite.gradcheck, each with the same in PyTorch."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812 - the name the field knows

from tensorlite.gradcheck.cases import CASES, Case, attention_twin, by_heads, dropped

__all__ = ["CASES", "torch_attention", "torch_function"]


def torch_layer_norm(x, weight=None, bias=None, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def torch_cross_entropy(logits, targets, ignore_index=-100, reduction="mean", label_smoothing=0.0):
    loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), None, ignore_index=ignore_index,
                           reduction=reduction, label_smoothing=label_smoothing)  # fmt: skip
    return loss.reshape(targets.shape) if reduction == "none" else loss


def torch_attention(q, k, v, attn_mask=None, causal=False, dropout=0.0, scale=None):
    if dropout or causal and attn_mask is not None:
        return attention_twin(q, k, v, attn_mask, causal, dropout, scale)
    if attn_mask is not None:
        return F.scaled_dot_product_attention(q, k, v, torch.as_tensor(attn_mask), scale=scale)
    seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool)
    seen = seen.tril(k.shape[-2] - q.shape[-2]) if causal else seen
    return F.scaled_dot_product_attention(q, k, v, seen, scale=scale)


# What takes the inputs and options of an op's cases, or of the one case (op, id). For what is not here a case's own
# function reads the same in PyTorch.
TORCH = {
    "add_dropout": lambda x, b, **how: x + dropped(b, **how),
    "argmax": lambda x, axis=None, keepdims=False: x.sum() * x.argmax(axis, keepdims),
    "cast": lambda x: x.double(),
    "concatenate": lambda *x, axis=0: torch.cat(x, axis),
    "cross_entropy": torch_cross_entropy,
    "dropout": dropped,
    "embedding": F.embedding,
    "expand_dims": torch.unsqueeze,
    "gelu": F.gelu,
    "layer_norm": torch_layer_norm,
    "linear": F.linear,
    "max": lambda x, axis=(), keepdims=False: x.amax(() if axis is None else axis, keepdims),
    "maximum": torch.maximum,
    "min": lambda x, axis=(), keepdims=False: x.amin(() if axis is None else axis, keepdims),
    "minimum": torch.minimum,
    "scaled_dot_product_attention": torch_attention,
    "self_attention": partial(by_heads, torch_attention),
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "stack": lambda *x, axis=0: torch.stack(x, axis),
    "std": torch.std,
    "var": torch.var,
    "where": torch.where,
    ("concatenate", "0-d"): lambda a, b, c: torch.cat([a[None], b, c[None]]),
    ("concatenate", "the same twice"): lambda x: torch.cat([x, x], 1),
    ("cross_entropy", "far apart"): lambda x, t: torch_cross_entropy(x * 1000, t),
    ("dropout", "twice"): lambda x: dropped(dropped(x), call=1),
    ("getitem", "backwards"): lambda x: x.flip(0, 1)[:, :3:2],
    ("layer_norm", "bias only"): lambda x, b: torch_layer_norm(x, bias=b),
    # In float64, for in float32 PyTorch is 50 times as far off as we are.
    ("layer_norm", "far from zero"): lambda x: torch_layer_norm((x + 50).double()).to(x.dtype),
    ("log_softmax", "far apart"): lambda x: (x * 1000).log_softmax(-1),
    ("maximum", "with a number"): lambda x: x.clamp(min=0.1) ** 2,
    ("minimum", "with a number"): lambda x: x.clamp(max=0.1) ** 2,
    ("scaled_dot_product_attention", "q = k = v"): lambda x, **how: torch_attention(x, x, x, **how),
    ("softmax", "large values"): lambda x: (x + 1000).softmax(-1),
    ("stack", "the same twice"): lambda x: torch.stack([x, x]),
    ("std", "far from zero"): lambda x: (x + 50).double().std(-1).to(x.dtype),
    ("transpose", "last two"): lambda x: x.mT,
    ("var", "far from zero"): lambda x: (x + 50).double().var(-1).to(x.dtype),
    ("where", "numbers"): lambda m, x: torch.where(m, x, 0.5) * torch.where(m, 2, x),
}


def torch_function(case: Case) -> Callable:
    """What computes the case on PyTorch's tensors."""
    found = TORCH.get((case.op, case.id)) or TORCH.get(case.op)
    return partial(found, **case.options) if found else case.fn
