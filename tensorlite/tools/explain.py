"""The walk back through a graph as text, an op or a module at a time."""

import math
import sys
from collections import Counter
from itertools import groupby
from pathlib import PurePath

from tensorlite.autograd import Node
from tensorlite.tensor import Tensor
from tensorlite.tools.graph import Graph, graph_of, rule
from tensorlite.tools.watch import Call, Seen, Size, Watch

READABLE = 40  # lines of which a graph's explanation has no more, unless asked for
CONSTANT = "constant"
FEW = 12  # leaves whose gradients are told one by one


def explain(source: Tensor | Watch, depth: int | None = None, inside: str = "") -> str:
    """The backward pass in the order in which it went: which op and why now, its local rule, and what came and went.

    source: a loss, whose backward pass is run here, so that its leaves have their gradients afterwards; or what
        `watch()` saw of one, which knows modules, lines and times too.
    depth: how many levels of modules are opened; one that lies deeper is a line. None for as many as are READABLE.
    inside: only what is below this module, such as "transformer.h.0".

    A gradient is told by its norm |g|, that of a single number by its value. "#3" is the result of the op that step 3
    goes back through.
    """
    graph = graph_of(source, sys._getframe(1))
    steps = [seen for seen in graph.steps if f"{seen.path}.".startswith(f"{inside}." if inside else "")]
    if not steps:
        where = f" in {inside}" if inside else ""
        return f"no gradient went back{where}: {len(graph.ops)} ops were recorded"
    depth = _readable_depth(steps) if depth is None else depth
    lines = [f"{len(steps)} steps back through {len(graph.ops)} ops; leaves: {len(graph.leaves)}"]
    for call, members in groupby(steps, key=lambda seen: _folded(seen, depth)):
        members = list(members)
        if call and len(members) > 1:
            lines.append(_group(graph, call, members))
        else:
            lines += [line for seen in members for line in _step(graph, seen)]
    return "\n".join([*lines, _totals(graph, steps)])


def _folded(seen: Seen, depth: int) -> Call | None:
    """The call at that depth in which the op lies, whose steps are told together; None if it is not so deep."""
    calls = []
    while (call := calls[-1].parent if calls else seen.call) and call.kind:
        calls.append(call)
    return calls[::-1][depth] if depth < len(calls) else None


def _readable_depth(steps: list[Seen]) -> int:
    """The depth at which the most is open of what is READABLE."""
    depth = 1
    while True:
        folds = [_folded(seen, depth) for seen in steps]
        lines = sum(1 for _ in groupby(folds)) + folds.count(None)
        if lines > READABLE:
            return max(1, depth - 1)
        if not any(folds):
            return depth
        depth += 1


def _step(graph: Graph, seen: Seen) -> list[str]:
    """What is gone through and why now; by which rule, and what that gave to which input."""
    head = f"{seen.turn:>3}  {what(graph, seen)}"
    lines = [f"{head:<36}  {why(graph, seen)}: gy {told(seen.incoming)}"]
    if seen.where:
        times = f"{1e3 * seen.seconds:.3f} + {1e3 * seen.backward_seconds:.3f} ms"
        lines[0] += f"  [{', '.join(filter(None, (seen.path, line_of(seen), times)))}]"
    gives = ", ".join(given(graph, seen, i) for i, parent in enumerate(seen.parents) if parent)
    lines.append(f"     {rule(seen.module, seen.op) or 'gradients'}  ->  {gives}")
    return lines


def line_of(seen: Seen) -> str:
    """The line of code that called an op, without the most of its file's path."""
    return "/".join(PurePath(seen.where).parts[-2:])


def what(graph: Graph, seen: Seen) -> str:
    """An op as a line of code."""
    operands = [_name(graph, parent, seen) for parent in seen.parents]
    while len(operands) > 2 and operands[-1] == CONSTANT:  # most likely a None, such as a bias that is not there
        operands.pop()
    return f"{_name(graph, seen.node, seen)} = {seen.op}({', '.join(operands)})"


def why(graph: Graph, seen: Seen) -> str:
    """Why it is an op's turn: all the uses of its result are done."""
    turns = [use.turn for use in graph.uses.get(seen.node, ()) if use.turn]
    if not turns:
        return "the start"
    if len(turns) == 1:
        return f"its use, step {turns[0]}, is done"
    how_many = "both" if len(turns) == 2 else f"all {len(turns)}"
    return f"{how_many} uses, steps {_listed(sorted(turns))}, are done and added up"


def given(graph: Graph, seen: Seen, i: int) -> str:
    """What one input gets, whether that had to be summed to its shape, and whether more is to come."""
    parent, size = seen.parents[i], seen.outgoing[i]
    name = _name(graph, parent, seen)
    if size is None:
        return f"{name} nothing"
    text, shape = f"{name} {told(size)}", parent.shape
    if size.shape != shape:
        lead = len(size.shape) - len(shape)
        axes = [a for a, n in enumerate(size.shape) if a < lead or shape[a - lead] != n]
        text += f" summed over {'axes' if len(axes) > 1 else 'axis'} {_listed(axes)} to {shape}"
    uses, before = len(graph.uses[parent]), graph.arrived(parent, seen.turn - 1)
    arrived = before + seen.parents[: i + 1].count(parent)
    return text + (f" ({arrived} of {uses})" if uses > 1 else "")


def _name(graph: Graph, node: Node | None, user: Seen) -> str:
    if node is None:
        return CONSTANT
    if name := graph.names.get(node):
        return name.removeprefix(f"{user.path}.")
    maker = graph.makers.get(node)
    return "leaf" if maker is None else f"#{maker.turn}" if maker.turn else maker.op


def told(size: Size) -> str:
    """A gradient in a few words: the value of a single number, else shape and norm."""
    return f"{size.norm:.4g}" if not size.shape else f"{size.shape} |g| {_norm(size):.3g}"


def _norm(size: Size) -> float:
    return abs(size.norm)


def _listed(numbers: list[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last


def _group(graph: Graph, call: Call, members: list[Seen]) -> str:
    """A module's steps in a line: its ops, the gradient that came, and that of its parameters."""
    turns = f"{members[0].turn}-{members[-1].turn}"
    ops = ", ".join(f"{n} {op}" if n > 1 else op for op, n in Counter(seen.op for seen in members).items())
    leaves = [
        _norm(size)
        for seen in members
        for parent, size in zip(seen.parents, seen.outgoing, strict=True)
        if size and parent and parent not in graph.makers
    ]
    weights = f", weights |g| {math.hypot(*leaves):.3g}" if leaves else ""
    milliseconds = 1e3 * sum(seen.backward_seconds for seen in members)
    head = f"{turns:>7}  {call.path or call.kind} ({call.kind})"
    return f"{head:<36}  gy {told(members[0].incoming)}{weights}  [{ops}, {milliseconds:.1f} ms]"


def _totals(graph: Graph, steps: list[Seen]) -> str:
    """The gradients that the leaves have in the end."""
    reached = dict.fromkeys(p for seen in steps for p in seen.parents if p and p not in graph.makers)
    named = [(graph.names.get(node, "leaf"), Size.of_gradient(node.leaf())) for node in reached]
    grads = [(name, size) for name, size in named if size]
    if len(grads) <= FEW:
        return "gradients: " + ", ".join(f"{name} {told(size)}" for name, size in grads)
    name, largest = max(grads, key=lambda pair: _norm(pair[1]))
    total = math.hypot(*(_norm(size) for _, size in grads))
    return f"gradients of {len(grads)} leaves: |g| {total:.3g} in all, the largest {name} {told(largest)}"
