"""Where ops stand in a picture: boxes for the calls of modules, rows in each, and which are open at first."""

from dataclasses import dataclass, field
from functools import reduce

from tensorlite.autograd import Node
from tensorlite.tools.graph import Graph
from tensorlite.tools.watch import OUTSIDE, Call, Seen

AT_FIRST = 24  # things that are seen before anything is opened


@dataclass(eq=False)
class Leaf:
    """A leaf that stands by itself. A parameter which only one op uses does not: it is named on that op."""

    node: Node


@dataclass(eq=False)
class Box:
    """A call of a module, or the whole. One that holds a single op and nothing else is shown as that op."""

    call: Call
    children: list = field(default_factory=list)  # boxes, ops and leaves
    rows: list[list] = field(default_factory=list)  # the same, from what comes first to what comes last
    is_open: bool = False


def boxes_of(graph: Graph) -> Box:
    """The outermost box, with everything in it."""
    boxes = {OUTSIDE: Box(OUTSIDE)}

    def box_of(call: Call) -> Box:
        if call not in boxes:
            boxes[call] = Box(call)
            box_of(call.parent).children.append(boxes[call])
        return boxes[call]

    for leaf in graph.leaves:
        if not is_on_its_op(graph, leaf):
            box_of(reduce(_innermost_common, (use.call for use in graph.uses[leaf]))).children.append(Leaf(leaf))
    for seen in graph.ops:
        box_of(seen.call).children.append(seen)
    whole = boxes[OUTSIDE]
    while len(whole.children) == 1 and isinstance(whole.children[0], Box):  # the model's, most likely
        whole = whole.children[0]
    _arrange(graph, whole)
    _open_some(whole)
    return whole


def is_on_its_op(graph: Graph, leaf: Node) -> bool:
    """Whether a leaf is named on the op that uses it: if there is but one, in a module."""
    return len(graph.uses[leaf]) == 1 and bool(graph.uses[leaf][0].call.kind)


def _innermost_common(a: Call, b: Call) -> Call:
    around = set()
    while a:
        around.add(a)
        a = a.parent
    while b not in around:
        b = b.parent
    return b


def _arrange(graph: Graph, box: Box) -> list[Node]:
    """Put what is in a box into rows, and all that is in there in turn. The nodes within it."""
    within = {}  # which child has which node
    for i, child in enumerate(box.children):
        nodes = _arrange(graph, child) if isinstance(child, Box) else [child.node]
        if isinstance(child, Box) and len(child.children) == 1 and isinstance(child.children[0], Seen):
            child = box.children[i] = child.children[0]
        within |= dict.fromkeys(nodes, child)
    inputs = {child: [] for child in box.children}  # of each child those whose results it uses
    for node, child in within.items():
        parents = graph.makers[node].parents if node in graph.makers else ()
        inputs[child] += [within[p] for p in parents if p in within and within[p] is not child]
    box.rows = _rows(box.children, inputs)
    return list(within)


def _rows(children: list, inputs: dict) -> list[list]:
    """Each child below those that it uses, a leaf right above the first that uses it; side by side as their inputs."""
    rank, leaves = {}, [child for child in children if isinstance(child, Leaf)]
    for child in children:  # in the order recorded, so that inputs come first
        if child not in leaves:
            rank[child] = 1 + max((rank[i] for i in inputs[child] if i in rank), default=-1)
    for leaf in leaves:
        rank[leaf] = min(rank[child] for child, used in inputs.items() if leaf in used) - 1
    rows = [[child for child in children if rank[child] == r] for r in sorted(set(rank.values()))]
    place = {}
    for row in rows:
        row.sort(key=lambda child: _mean([place[i] for i in inputs[child] if i in place]))
        place |= {child: i - len(row) / 2 for i, child in enumerate(row)}
    return rows


def _mean(places: list[float]) -> float:
    return sum(places) / len(places) if places else 0.0


def _open_some(whole: Box) -> None:
    """Open boxes level by level, as long as no more than AT_FIRST things are seen."""
    level, seen = [whole], 1
    while level:
        seen += sum(len(box.children) - 1 for box in level)
        if seen > AT_FIRST and whole.is_open:
            return
        for box in level:
            box.is_open = True
        level = [child for box in level for child in box.children if isinstance(child, Box)]
