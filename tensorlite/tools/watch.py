"""Which ops a forward pass records, in which module and on which line, and what their vjps give in the backward pass.

Python calls a profiler whenever a function is entered or left. This one knows an op's function by its file and a module
by `Module.__call__`.
"""

import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tensorlite.autograd import Node
from tensorlite.nn import Module
from tensorlite.tensor import Tensor

_PACKAGE = str(Path(__file__).parents[1])
_OPS = str(Path(_PACKAGE) / "ops")
_CALL = Module.__call__.__code__


@dataclass(slots=True, eq=False)
class Seen:
    """An op that was recorded."""

    node: Node
    op: str
    path: str  # of the module it was called in, such as "transformer.h.0.mlp.c_fc"; "" outside of the model's
    where: str  # "file:line" of the code that is none of tensorlite's
    seconds: float  # of the forward pass
    backward_seconds: float = 0.0
    gradients: tuple | None = None  # what the vjp gave, an array or None for each input, while a callback sees it


class Watch:
    """See `watch`. `ops`: what was Seen, in the order in which it was recorded."""

    def __init__(self, model: Module | None, on_result: Callable | None, on_gradient: Callable | None):
        self.ops: list[Seen] = []
        self._on_result, self._on_gradient = on_result, on_gradient
        self._names = {} if model is None else _names(model)
        self._paths, self._starts, self._nodes = [""], [], set()

    def __enter__(self) -> "Watch":
        self._before = sys.getprofile()
        sys.setprofile(self._see)
        return self

    def __exit__(self, *exc) -> None:
        sys.setprofile(self._before)

    def _see(self, frame, event: str, arg) -> None:
        code = frame.f_code
        if code is _CALL:
            if event == "call":
                self._paths.append(self._names.get(id(frame.f_locals["self"]), self._paths[-1]))
            elif event == "return" and len(self._paths) > 1:
                self._paths.pop()
        elif code.co_filename.startswith(_OPS):
            if event == "call":
                self._starts.append(time.perf_counter())
            elif event == "return" and self._starts:
                seconds = time.perf_counter() - self._starts.pop()
                if isinstance(arg, Tensor) and not arg.is_leaf and arg.node not in self._nodes:
                    self._record(frame, arg, seconds)

    def _record(self, frame, result: Tensor, seconds: float) -> None:
        node = result.node
        seen = Seen(node, node.op, self._paths[-1], _where(frame), seconds)
        self._nodes.add(node)
        self.ops.append(seen)
        node.vjp = self._watched(seen, node.vjp)
        if self._on_result:
            self._on_result(seen, result)

    def _watched(self, seen: Seen, vjp: Callable) -> Callable:
        @functools.wraps(vjp)
        def watched(gy):
            start = time.perf_counter()
            gradients = vjp(gy)
            seen.backward_seconds = time.perf_counter() - start
            if self._on_gradient:
                seen.gradients = gradients
                self._on_gradient(seen)
                seen.gradients = None
            return gradients

        return watched


def watch(model: Module | None = None, on_result: Callable | None = None, on_gradient: Callable | None = None) -> Watch:
    """`with watch(model) as w:` around a forward and a backward pass; then `w.ops` is what was recorded.

    model: whose modules give the ops their paths. on_result(seen, tensor) is called with what each op gave,
    on_gradient(seen) with `seen.gradients` there, when its vjp has run. This thread alone is watched.
    """
    return Watch(model, on_result, on_gradient)


def _names(model: Module) -> dict[int, str]:
    """The way to each module below `model`, by its id; the first one where there are several."""
    names, ahead = {id(model): ""}, [("", model)]
    while ahead:
        prefix, module = ahead.pop()
        for name, child in module.children():
            if id(child) not in names:
                names[id(child)] = prefix + name
                ahead.append((f"{prefix}{name}.", child))
    return names


def _where(frame) -> str:
    """The innermost line that is not of this package."""
    while frame.f_back and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
