"""One backward pass, with every vjp on the way watched: what it gives back, and what it writes into."""

import functools

import numpy as np

from tensorlite.autograd import Node, op_name
from tensorlite.gradcheck.problem import Problem
from tensorlite.gradcheck.report import GradcheckError
from tensorlite.tensor import grad, record


def differentiate(problem: Problem, dtype: np.dtype, cotangent: np.ndarray) -> tuple[np.ndarray, list, list[bool]]:
    """The outputs and the gradients of cotangent . outputs in `dtype`, on the host, and which inputs were reached.

    cotangent: as long as all outputs together.
    """
    be = problem.be
    problem.load(dtype)
    outputs = problem.outputs()
    flat = problem.flat(outputs).copy()
    for out in outputs:
        if out.dtype != dtype:
            raise GradcheckError(f"gradcheck: {dtype} inputs gave a result of {out.dtype}")
    _unwritten(problem, dtype, "the function")
    nodes = _graph([out.node for out in outputs if out.node])
    for node in nodes:
        if node.vjp:
            node.vjp = _watched(node, be)
    # Not contiguous, as a gradient may be.
    sent = [be.asarray(np.repeat(c[..., None], 2, axis=-1).astype(dtype))[..., 0] for c in problem.split(cotangent)]
    gradients = [np.zeros(p.shape) for p in problem.points]
    reached = [t.node in nodes for t in problem.tensors]
    if nodes:
        root = record(be.asarray(np.zeros((), dtype)), tuple(outputs), lambda gy: sent)
        gradients = [be.to_numpy(g).astype(np.float64) for g in grad(root, problem.tensors)]
    _unwritten(problem, dtype, "the backward pass")
    return flat, gradients, reached


def _unwritten(problem: Problem, dtype: np.dtype, who: str) -> None:
    for name, t, point in zip(problem.names, problem.tensors, problem.points, strict=True):
        if _bits(problem.be, t.data) != point.astype(dtype).tobytes():
            raise GradcheckError(f"gradcheck: {who} wrote into {name}; it must leave its inputs as they are")


def _graph(roots: list[Node]) -> set[Node]:
    """Every node that these depend on."""
    found, ahead = set(), list(roots)
    while ahead:
        node = ahead.pop()
        if node not in found:
            found.add(node)
            ahead += [parent for parent in node.parents if parent]
    return found


def _watched(node: Node, be):
    """The node's vjp, with a look at all that the engine trusts it with."""
    vjp, parents, op = node.vjp, node.parents, op_name(node.vjp)
    saved = [(name, array, _bits(be, array)) for name, array in _saved(vjp, be.xp.ndarray)]

    @functools.wraps(vjp)  # errors are in the name of the op
    def watched(gy):
        before = _bits(be, gy)
        gparents = vjp(gy)
        if _bits(be, gy) != before:
            raise GradcheckError(
                f"gradcheck: the backward pass wrote into the gradient it was given: in the vjp of {op}"
            )
        for name, array, bits in saved:
            if _bits(be, array) != bits:
                raise GradcheckError(f"gradcheck: the backward pass wrote into a saved array: {name} of {op}'s vjp")
        _well_formed(gparents, parents, op, be.xp.ndarray)
        return gparents

    return watched


def _well_formed(gparents, parents, op: str, array_type: type) -> None:
    """A GradcheckError that says what is wrong with what a vjp returned."""
    if not isinstance(gparents, tuple | list):
        raise GradcheckError(
            f"gradcheck: the vjp of {op} returned a bare {type(gparents).__name__}: return a tuple with a gradient for"
            f" each of its {len(parents)} inputs, `return (gx,)` if it is one"
        )
    if len(gparents) != len(parents):
        raise GradcheckError(
            f"gradcheck: the vjp of {op} returned {len(gparents)} gradients for its {len(parents)} inputs: return one"
            " for each, None for what has none"
        )
    for i, (g, parent) in enumerate(zip(gparents, parents, strict=True)):
        if parent is None or g is None:
            continue
        what = f"gradcheck: the vjp of {op} returned for its input {i}"
        if not isinstance(g, array_type | np.generic):
            raise GradcheckError(
                f"{what} a {type(g).__module__}.{type(g).__name__}, expected a {array_type.__module__}.ndarray or None"
            )
        if g.dtype != parent.dtype and parent.dtype.kind == "f":  # beside bfloat16 the engine takes float32, too
            raise GradcheckError(f"{what} a gradient of {g.dtype}, expected {parent.dtype}")
        if not stretches(parent.shape, g.shape):
            raise GradcheckError(f"{what} a gradient of shape {g.shape}, expected {parent.shape}")


def stretches(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether an array of `shape` broadcasts to the other shape."""
    lead = len(to) - len(shape)
    return lead >= 0 and all(n in (1, m) for n, m in zip(shape, to[lead:], strict=True))


def _saved(vjp, array_type: type):
    """The arrays that a vjp closes over, with their names."""
    names = getattr(getattr(vjp, "__code__", None), "co_freevars", ())
    for name, cell in zip(names, getattr(vjp, "__closure__", None) or (), strict=True):
        try:
            held = cell.cell_contents
        except ValueError:  # a variable that has no value yet
            continue
        for array in held if isinstance(held, tuple | list) else (held,):
            if isinstance(array, array_type):
                yield name, array


def _bits(be, array) -> bytes:
    return be.to_numpy(array).tobytes()
