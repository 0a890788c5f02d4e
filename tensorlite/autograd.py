"""Reverse-mode differentiation: the graph of recorded ops and the walk back through it.

A `Node` remembers which nodes an op's inputs came from and the op's vector-Jacobian product (vjp): the function
that turns the gradient of the op's result into the gradients of its inputs. `backpropagate` calls the vjps in
reverse order and adds up what reaches each node. Nothing here knows what any op computes, or on which device.

First order only: vjps run on bare arrays and are not themselves recorded.
"""

import threading
import weakref

from tensorlite.backends import backend_of
from tensorlite.decorators import Decorator
from tensorlite.dtypes import FLOAT, KINDS


class Node:
    """One vertex of the graph: a recorded op, or a leaf (`vjp` is None) whose tensor is to receive a gradient.

    Node and Tensor are two classes so that an intermediate array dies as soon as no vjp names it, and a leaf is
    referred to weakly so that there is never a reference cycle.
    """

    __slots__ = ("parents", "vjp", "shape", "dtype", "leaf")

    def __init__(self, parents, vjp, data):
        self.parents = parents  # a Node per input of the op, or None where no gradient is wanted
        self.vjp = vjp
        self.shape = data.shape
        self.dtype = data.dtype

    @classmethod
    def for_leaf(cls, tensor) -> "Node":
        node = cls((), None, tensor.data)
        node.leaf = weakref.ref(tensor)
        return node

    def follow(self, data) -> None:
        """Take over the shape and dtype of a leaf's data, which was exchanged since."""
        if KINDS[data.dtype] != FLOAT:
            raise TypeError(f"backward: a leaf's data is now {data.dtype}, which has no gradient")
        self.shape, self.dtype = data.shape, data.dtype

    @property
    def op(self) -> str:
        """The name of the op, read off the function its vjp was defined in."""
        return "leaf" if self.vjp is None else op_name(self.vjp)


class _Mode(threading.local):
    recording = True
    outer = None  # what `recording` was outside the innermost `no_grad`, and what `outer` was


mode = _Mode()  # per thread: one thread may evaluate while another trains


class no_grad(Decorator):  # noqa: N801 - the name the field knows
    """Within `with no_grad():` (or a function of any kind decorated by it: generators and coroutines too) ops record
    nothing and keep nothing alive."""

    local = mode

    def __enter__(self):
        mode.outer = mode.recording, mode.outer
        mode.recording = False

    def __exit__(self, *exc):
        mode.recording, mode.outer = mode.outer


def spent(gy):
    """Takes the place of a vjp that has run. Its arrays are gone, so it cannot run again."""
    raise RuntimeError("backward: this graph was used before and its activations are freed; run the forward again")


def backpropagate(root: Node, gy, deposit) -> None:
    """Send the gradient `gy` of `root` back through the graph, calling `deposit(leaf_node, gradient, owned)` once
    for each leaf it reaches. `owned` says that nothing else refers to that array.

    Each vjp is dropped as soon as it has run, so that activations are freed on the way back.
    """
    uses = _count_uses(root)
    grads = {root: gy}
    owned = set()  # nodes whose gradient is a sum made here: the only arrays that may be written into
    ready = [root]
    while ready:
        node = ready.pop()
        gy = grads.pop(node, None)  # None: every op that used this value had no gradient for it
        if node.vjp is None:
            if gy is not None:
                deposit(node, gy, node in owned)
            continue
        vjp, parents = node.vjp, node.parents
        node.vjp, node.parents = spent, ()
        gparents = (None,) * len(parents) if gy is None else vjp(gy)
        if len(gparents) != len(parents):
            raise ValueError(f"{op_name(vjp)}: the vjp gave {len(gparents)} gradients for {len(parents)} inputs")
        for parent, g in zip(parents, gparents, strict=True):
            if parent is None:
                continue
            if g is not None:
                if g.shape != parent.shape:
                    g = unbroadcast(g, parent.shape, op_name(vjp))
                if g.dtype != parent.dtype:
                    g = g.astype(parent.dtype)
                if parent not in grads:
                    grads[parent] = g
                elif parent in owned:
                    grads[parent] += g
                else:
                    grads[parent] = grads[parent] + g
                    owned.add(parent)
            uses[parent] -= 1
            if uses[parent] == 0:
                ready.append(parent)
        del gy, g, gparents, vjp  # or they would outlive the next vjp's peak


def op_name(vjp) -> str:
    """The function that `vjp` was defined in: "add" for "add.<locals>.vjp"."""
    return getattr(vjp, "__qualname__", "op").split(".<locals>.")[-2:][0]


def _count_uses(root: Node) -> dict[Node, int]:
    """How many times each node that `root` depends on is used: when that many gradients have come in, its own is
    complete. Iterative, so that a graph may be deeper than Python's stack."""
    uses = {root: 0}
    stack = [root]
    while stack:
        node = stack.pop()
        if node.vjp is None:
            leaf = node.leaf()
            if leaf is not None:
                data = leaf.data
                if data.dtype is not node.dtype or data.shape != node.shape:
                    node.follow(data)
        elif node.vjp is spent:
            spent(None)
        for parent in node.parents:
            if parent in uses:
                uses[parent] += 1
            elif parent is not None:
                uses[parent] = 1
                stack.append(parent)
    return uses


def unbroadcast(g, shape: tuple[int, ...], op: str = "unbroadcast"):
    """Sum `g` over the axes along which an input of `shape` was broadcast. The transpose of broadcasting."""
    lead = g.ndim - len(shape)
    stretched = [axis for axis, n in enumerate(shape, lead) if n == 1 and lead >= 0 and g.shape[axis] != 1]
    axes = (*range(lead), *stretched)
    summed = backend_of(g).sum(g, axes, keepdims=True) if axes else g
    if summed.shape[max(lead, 0) :] != shape:
        raise ValueError(
            f"{op}: the vjp gave a gradient of shape {g.shape} for an input of shape {shape}; "
            "or was the input a leaf whose data was exchanged after the forward pass?"
        )
    return summed.reshape(shape)
