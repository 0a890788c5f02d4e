"""What was seen of two passes as a graph: who used whose result, and in which order the gradients met."""

import functools
import inspect
import re
import sys
from dataclasses import dataclass, field

from tensorlite.autograd import Node
from tensorlite.tensor import Tensor
from tensorlite.tools.watch import BackwardPass, Seen, Watch, variables

_RULE = re.compile(r"(?:^|  )(g\w*(?:\[i\])? = .*)")


@dataclass
class Graph:
    """The ops in the order in which they were recorded, and the leaves in the order of their first use."""

    ops: list[Seen]
    names: dict[Node, str]  # of parameters and variables
    makers: dict[Node, Seen] = field(init=False)
    uses: dict[Node, list[Seen]] = field(init=False)  # by which ops a result or a leaf was used, once for each time
    leaves: list[Node] = field(init=False)

    def __post_init__(self):
        self.makers, self.uses = {seen.node: seen for seen in self.ops}, {}
        for seen in self.ops:
            for parent in filter(None, seen.parents):
                self.uses.setdefault(parent, []).append(seen)
        self.leaves = [node for node in self.uses if node not in self.makers]

    @property
    def steps(self) -> list[Seen]:
        """The ops in the order in which the backward pass went through them."""
        return sorted((seen for seen in self.ops if seen.turn), key=lambda seen: seen.turn)

    def arrived(self, node: Node, turn: int) -> int:
        """From how many of its uses the gradient of a result or a leaf has come, after that turn."""
        return sum(bool(use.turn) and use.turn <= turn for use in self.uses.get(node, ()))


def graph_of(source: Watch | Tensor, frame) -> Graph:
    """Of what was watched; or of a loss, whose backward pass is run here. frame: whose variables give names."""
    known = variables(frame)
    names = {x.node: name for name, x in known.items()}
    if isinstance(source, Watch):
        return Graph(source.ops, names | source.names)
    if not isinstance(source, Tensor):
        raise TypeError(f"expected a Tensor, or what watch() gave, got a {type(source).__name__}")
    ops, backward = _recorded(source), BackwardPass()
    values = {x.node: x.item() for x in known.values() if not x.shape}
    for seen in ops:
        seen.value = values.get(seen.node)
        backward.watch(seen)
    source.backward()
    return Graph(ops, names)


def _recorded(loss: Tensor) -> list[Seen]:
    """The ops that a tensor depends on, each after those whose results it uses: the order of the first depth-first
    visit, so that it reads like the expression."""
    ordered, ahead, done = [], [loss.node] if loss.node else [], set()
    while ahead:
        node = ahead[-1]
        missing = [p for p in node.parents if p is not None and p not in done and p.vjp is not None]
        if node in done or not missing:
            ahead.pop()
            if node not in done and node.vjp is not None:
                ordered.append(Seen.of(node))
            done.add(node)
        else:
            ahead.append(missing[0])
    return ordered


@functools.cache
def rule(module: str, op: str) -> str:
    """How an op's gradients come about, in a line of mathematics, from its docstring: what begins there with the name
    of a gradient, such as "gx = gy * y". "" if it has none."""
    text = inspect.getdoc(getattr(sys.modules.get(module), op, None)) or ""
    for paragraph in text.split("\n\n"):
        if found := _RULE.search(paragraph.replace("\n", " ")):
            return found[1].split(".  ")[0].removesuffix(".")
    return ""
