"""Floating-point operations of the ops that are matrix products. A multiplication and an addition are two of them, and
causal attention counts in full, though half of its scores are masked."""

from math import prod

# Op -> the operations of its forward pass, by the shape of its result y and those of its operands.
_FORWARD = {
    "linear": lambda y, x, weight, **_: 2 * prod(y) * weight[1],
    "matmul": lambda y, a, b: 2 * prod(y) * a[-1],
    "scaled_dot_product_attention": lambda y, q, k, v, **_: 2 * prod(q[:-1]) * k[-2] * (q[-1] + v[-1]),
    "self_attention": lambda y, qkv: 2 * 2 * prod(y) * qkv[1],
}


def forward_flop(op: str, y: tuple[int, ...], shapes: dict[str, tuple[int, ...]]) -> int:
    """Of an op with a result of shape y and operands of `shapes`, by their names; 0 where that is not known."""
    count = _FORWARD.get(op)
    try:
        return count(y, **shapes) if count else 0
    except TypeError:  # an operand is a list, which has no shape
        return 0


def backward_flop(op: str, forward: int, gradients) -> int:
    """Of its vjp: a product as large as the forward pass for the gradient of each factor that was wanted, and for
    attention, of two products, four."""
    if not op.endswith("attention"):
        return forward * sum(g is not None for g in gradients[:2])
    return 2 * forward
