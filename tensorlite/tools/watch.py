"""Which ops a forward pass records, in which module and on which line, and what their vjps give in the backward pass.

Python calls a profiler whenever a function is entered or left. This one knows an op's function by its file, one of the
user's own by its call of `record`, and a module by `Module.__call__`.
"""

import functools
import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tensorlite.autograd import Node
from tensorlite.backends import backend_of
from tensorlite.nn import Module
from tensorlite.tensor import Tensor, record
from tensorlite.tools.traps import trap

_PACKAGE = str(Path(__file__).parents[1])
_OPS = str(Path(_PACKAGE) / "ops")
_CALL = Module.__call__.__code__
_RECORD = record.__code__


@dataclass(frozen=True, eq=False)
class Call:
    """A call of a module: ops are grouped by it, so that one called twice is two groups."""

    path: str  # such as "transformer.h.0.mlp"; "" for the model itself, and outside of it
    kind: str  # the module's class
    parent: "Call | None"


OUTSIDE = Call("", "", None)


@dataclass(frozen=True)
class Size:
    """What is told of a gradient."""

    shape: tuple[int, ...]
    norm: float  # of a single element its value, sign and all

    @classmethod
    def of(cls, array) -> "Size":
        if array.size == 1:
            return cls(array.shape, float(array.item()))
        be = backend_of(array)
        return cls(array.shape, float(be.l2_norm(be.xp.ascontiguousarray(array).reshape(-1))))

    @classmethod
    def of_gradient(cls, tensor: Tensor | None) -> "Size | None":
        """Of what a leaf has got, if it is there and has got any."""
        return None if tensor is None or tensor.grad is None else cls.of(tensor.grad)


@dataclass(slots=True, eq=False)
class Seen:
    """An op that was recorded. What only the backward pass can tell is there after it."""

    node: Node
    parents: tuple[Node | None, ...]  # of the inputs, None for a constant
    op: str
    module: str  # Python's, in which the op is defined
    call: Call = OUTSIDE  # the module's that it was called in
    where: str = ""  # "file:line" of the code that is none of tensorlite's
    seconds: float = 0.0  # of the forward pass
    value: float | None = None  # of its result, if that is a single number
    shapes: tuple[tuple[int, ...], ...] = ()  # of the operands, constants too
    turn: int | None = None  # its place in the backward pass, from 1
    backward_seconds: float = 0.0
    incoming: Size | None = None  # the gradient of its result
    outgoing: tuple[Size | None, ...] = ()  # what its vjp gave for each input, before sums over broadcast axes
    gradients: tuple | None = None  # the same as arrays, while a callback sees them

    @classmethod
    def of(cls, node: Node, *args) -> "Seen":
        return cls(node, tuple(node.parents), node.op, node.vjp.__module__, *args)

    @property
    def path(self) -> str:
        """Of its module, such as "transformer.h.0.mlp.c_fc"; "" outside of the model's."""
        return self.call.path

    @property
    def nbytes(self) -> int:
        """Of its result."""
        return math.prod(self.node.shape) * self.node.dtype.itemsize


@dataclass
class BackwardPass:
    """Watches the vjps of ops run, one after the other."""

    on_gradient: Callable | None = None
    sizes: bool = True  # whether to measure the gradients
    turns: int = 0
    last: Seen | None = field(default=None, repr=False)

    def watch(self, seen: Seen) -> None:
        """Let the op's vjp tell when it runs, and what it is given and gives."""
        vjp = seen.node.vjp

        @functools.wraps(vjp)
        def watched(gy):
            self.turns += 1
            self.last, seen.turn = seen, self.turns
            start = time.perf_counter()
            gradients = vjp(gy)
            seen.backward_seconds = time.perf_counter() - start
            if self.sizes:
                seen.incoming = Size.of(gy)
                seen.outgoing = tuple(None if g is None else Size.of(g) for g in gradients)
            if self.on_gradient:
                seen.gradients = gradients
                self.on_gradient(seen)
                seen.gradients = None
            return gradients

        seen.node.vjp = watched


class ModulePaths:
    """The ways to modules. The first model is what they begin in; those within another one begin with its class."""

    def __init__(self, model: Module | None = None):
        self.models: list[tuple[str, Module]] = []  # each with what its paths begin with
        self._paths: dict[int, str] = {}
        if model is not None:
            self._add(model)

    def path(self, module: Module) -> str:
        """Such as "transformer.h.0.mlp"; of one that is in no model known, which is one itself from now on."""
        if id(module) not in self._paths:
            self._add(module)
        return self._paths[id(module)]

    def _add(self, model: Module) -> None:
        prefix = f"{type(model).__name__}." if self.models else ""
        self.models.append((prefix, model))
        for key, path in _paths(model).items():
            self._paths.setdefault(key, (prefix + path).removesuffix("."))


class Watch:
    """See `watch`. `ops`: what was Seen, in the order in which it was recorded. `names`: of leaves and results by their
    nodes, as far as parameters or the caller's variables have them."""

    def __init__(
        self,
        model: Module | None = None,
        on_result: Callable | None = None,
        on_gradient: Callable | None = None,
        sizes: bool = True,
    ):
        self.ops: list[Seen] = []
        self.names: dict[Node, str] = {}
        self.backward = BackwardPass(on_gradient, sizes)
        self._on_result = on_result
        self._modules = ModulePaths(model)
        self._calls, self._starts, self._nodes = [OUTSIDE], [], set()
        self._others: dict[int, float] = {}  # since when the functions that are not tensorlite's run, by their frames

    def __enter__(self) -> "Watch":
        self._before = sys.getprofile()
        sys.setprofile(self._see)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        sys.setprofile(self._before)
        self.names |= {x.node: name for name, x in variables(sys._getframe(1)).items()}
        for prefix, model in self._modules.models:
            self.names |= {p.node: prefix + name for name, p in model.named_parameters() if p.node}
        last = self.backward.last
        if error is not None and last is not None and _passes_through(traceback, "backpropagate"):
            error.add_note(f"in the backward pass of {last.op}{last.path and f' in {last.path}'}, made at {last.where}")

    def _see(self, frame, event: str, arg) -> None:
        code = frame.f_code
        if code is _CALL:
            if event == "call":
                module = frame.f_locals["self"]
                self._calls.append(Call(self._modules.path(module), type(module).__name__, self._calls[-1]))
            elif event == "return" and len(self._calls) > 1:
                self._calls.pop()
        elif code.co_filename.startswith(_OPS):
            if event == "call":
                self._starts.append(time.perf_counter())
            elif event == "return" and self._starts:
                seconds = time.perf_counter() - self._starts.pop()
                if isinstance(arg, Tensor) and not arg.is_leaf and arg.node not in self._nodes:
                    self._record(frame, arg, seconds)
        elif code is _RECORD:
            if event == "return" and arg is not None and arg.node and id(frame.f_back) in self._others:
                self._record(frame.f_back, arg, time.perf_counter() - self._others[id(frame.f_back)])
        elif event == "call" and not code.co_filename.startswith(_PACKAGE):
            self._others[id(frame)] = time.perf_counter()
        elif event == "return":
            self._others.pop(id(frame), None)

    def _record(self, frame, result: Tensor, seconds: float) -> None:
        node = result.node
        code, values, caller = frame.f_code, frame.f_locals, _caller(frame)
        operands = (values[name] for name in code.co_varnames[: code.co_argcount])
        shapes = tuple(x.shape for x in operands if hasattr(x, "shape"))
        file, line = caller.f_code.co_filename, caller.f_lineno
        value = float(result.item()) if self.backward.sizes and not node.shape else None
        seen = Seen.of(node, self._calls[-1], f"{file}:{line}", seconds, value, shapes)
        self._nodes.add(node)
        self.ops.append(seen)
        self.backward.watch(seen)
        if warning := trap(seen.op, shapes, node.shape, node.dtype.itemsize):
            warnings.warn_explicit(warning, UserWarning, file, line)
        if self._on_result:
            self._on_result(seen, result)


def watch(
    model: Module | None = None,
    on_result: Callable | None = None,
    on_gradient: Callable | None = None,
    sizes: bool = True,
) -> Watch:
    """`with watch(model) as w:` around a forward and a backward pass; then `w.ops` is what was recorded.

    model: whose modules give the ops their paths; without it the module that is called first.
    on_result(seen, tensor) is called with what each op gave, on_gradient(seen) with `seen.gradients` there when its
        vjp has run.
    sizes: measure every gradient, which takes a pass over it.

    This thread alone is watched.

    An operand that broadcasts where that is seldom meant is warned of, with its line; see `tensorlite.tools.traps`. An
    error in the backward pass says which op it was in, and on which line that was called.
    """
    return Watch(model, on_result, on_gradient, sizes)


def variables(frame) -> dict[str, Tensor]:
    """The tensors in a function's variables that have a place in a graph."""
    found = frame.f_globals | frame.f_locals
    return {name: x for name, x in found.items() if isinstance(x, Tensor) and x.node and name != "_"}


def _paths(model: Module) -> dict[int, str]:
    """The way to each module below `model`, by its id; the first one where there are several."""
    paths, ahead = {id(model): ""}, [("", model)]
    while ahead:
        prefix, module = ahead.pop()
        for name, child in module.children():
            if id(child) not in paths:
                paths[id(child)] = prefix + name
                ahead.append((f"{prefix}{name}.", child))
    return paths


def _caller(frame):
    """The innermost frame that is not of this package."""
    while frame.f_back and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    return frame


def _passes_through(traceback, function: str) -> bool:
    while traceback:
        if traceback.tb_frame.f_code.co_name == function:
            return True
        traceback = traceback.tb_next
    return False
