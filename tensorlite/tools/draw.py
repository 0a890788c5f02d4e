"""The graph of a forward and a backward pass as a picture: a page that opens and steps, or a still one."""

import math
import sys
from pathlib import Path

from tensorlite.tensor import Tensor
from tensorlite.tools.explain import given, line_of, told, what, why
from tensorlite.tools.graph import Graph, graph_of, rule
from tensorlite.tools.layout import Box, Leaf, boxes_of, is_on_its_op
from tensorlite.tools.page import render, write_whole
from tensorlite.tools.still import still
from tensorlite.tools.watch import Seen, Size, Watch

_TEMPLATE = Path(__file__).with_name("graph.html")


def draw(source: Tensor | Watch, path: str | Path, title: str = "The graph") -> None:
    """Write a picture of the graph to `path`: .html for a page in which modules fold and the backward pass is gone
    through step by step, .svg for a still one.

    source: a loss, whose backward pass is run here, so that its leaves have their gradients afterwards; or what
        `watch()` saw of one, which knows modules, lines and times too.
    """
    path = Path(path)
    if path.suffix not in (".html", ".svg"):
        raise ValueError(f"draw: expected a path that ends in .html or .svg, got {path}")
    items = _items(graph_of(source, sys._getframe(1)))
    write_whole(path, render(_TEMPLATE, title, items) if path.suffix == ".html" else still(items, title))


def _items(graph: Graph) -> list[dict]:
    """Boxes, ops and leaves as the pictures take them, by their places in the list; the first is the outermost box."""
    whole, found, ids = boxes_of(graph), [], {}
    ahead = [whole]
    while ahead:
        found.append(ahead.pop(0))
        ids[found[-1] if isinstance(found[-1], Box) else found[-1].node] = len(found) - 1
        ahead += [child for row in getattr(found[-1], "rows", ()) for child in row]
    describe = {Box: _box, Seen: _op, Leaf: _leaf}
    around = {child: box for box in found if isinstance(box, Box) for child in box.children}
    items = [describe[type(item)](graph, item, around.get(item), ids) for item in found]
    items[0]["summary"] = f"{len(graph.ops)} ops, {len(graph.leaves)} leaves, {len(graph.steps)} steps back."
    return items


def _box(graph: Graph, box: Box, around: Box | None, ids: dict) -> dict:
    rows = [[ids[child if isinstance(child, Box) else child.node] for child in row] for row in box.rows]
    name = _within(box.call.path, around) or box.call.kind
    label = name if name == box.call.kind else f"{name} · {box.call.kind}"
    return {
        "kind": "box",
        "label": label,
        "note": f"{_count(box)} op{'s' * (_count(box) != 1)}",
        "path": box.call.path,
        "type": box.call.kind,
        "rows": rows,
        "open": box.is_open,
    }


def _count(box: Box) -> int:
    return sum(_count(child) if isinstance(child, Box) else isinstance(child, Seen) for child in box.children)


def _op(graph: Graph, seen: Seen, around: Box, ids: dict) -> dict:
    module, name = _within(seen.path, around), graph.names.get(seen.node, "")
    own = [p for p in seen.parents if p and p not in graph.makers and is_on_its_op(graph, p)]
    return {
        "kind": "op",
        "op": seen.op,
        "name": name,
        "label": f"{module} · {seen.op}" if module else f"{name} = {seen.op}" if name else seen.op,
        "note": _note(seen.node.shape, seen.value, seen.incoming),
        "what": what(graph, seen),
        "why": why(graph, seen),
        "rule": rule(seen.module, seen.op),
        "gy": told(seen.incoming) if seen.incoming else "",
        "norm": _finite(seen.incoming),
        "given": [given(graph, seen, i) for i, p in enumerate(seen.parents) if p and seen.outgoing],
        "params": [graph.names.get(p, "") for p in own],
        "shape": f"{seen.node.shape} {seen.node.dtype}",
        "value": "" if seen.value is None else f"{seen.value:.6g}",
        "bytes": seen.nbytes,
        "path": seen.path,
        "where": line_of(seen),
        "ms": 1e3 * seen.seconds,
        "backward_ms": 1e3 * seen.backward_seconds,
        "turn": seen.turn,
        "inputs": [ids.get(p) for p in seen.parents],
    }


def _leaf(graph: Graph, leaf: Leaf, around: Box, ids: dict) -> dict:
    tensor = leaf.node.leaf()
    size = Size.of_gradient(tensor)
    value = None if tensor is None or tensor.shape else tensor.item()
    name = graph.names.get(leaf.node, "leaf")
    return {
        "kind": "leaf",
        "label": _within(name, around),
        "name": name,
        "note": _note(leaf.node.shape, value, size),
        "shape": f"{leaf.node.shape} {leaf.node.dtype}",
        "value": "" if value is None else f"{value:.6g}",
        "gradient": told(size) if size else "",
        "norm": _finite(size),
    }


def _finite(size: Size | None) -> float | None:
    return size.norm if size and math.isfinite(size.norm) else None


def _within(path: str, around: Box | None) -> str:
    """A path as it is called in the box around it."""
    return path.removeprefix(around.call.path).removeprefix(".") if around else path


def _note(shape: tuple[int, ...], value: float | None, size: Size | None) -> str:
    """What stands under a name: a shape, or the value of a single number, and its gradient."""
    what = f"{value:.4g}" if value is not None else " × ".join(map(str, shape))
    gradient = "" if size is None else f"|g| {abs(size.norm):.2g}" if shape else f"g {size.norm:.3g}"
    return "  ".join(filter(None, (what, gradient))) or "scalar"
