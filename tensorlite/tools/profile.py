"""Where the time and the memory of a forward and a backward pass go, by op and by module.

As `watch`, this sees from outside which functions of ops are entered and left, and wraps each vjp. It keeps no array
alive and leaves its own time out: its clock stops while it is at work.
"""

import inspect
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import tensorlite.ops
from tensorlite.autograd import Node, backpropagate
from tensorlite.backends import Backend, backend_of, get_backend
from tensorlite.nn import Module
from tensorlite.optim import Optimizer, clip_grad_norm_
from tensorlite.tensor import Tensor, record
from tensorlite.tools.flop import backward_flop, forward_flop
from tensorlite.tools.live import Cost, LiveArrays, Maker
from tensorlite.tools.report import table
from tensorlite.tools.trace import write_trace
from tensorlite.tools.watch import ModulePaths

SUMS = "sums of gradients"


def _code(function):
    return inspect.unwrap(function).__code__


# Code -> the kind of Span that its calls are, and their name; _RECORD is none, but tells of ops that are not listed.
_RECORD = "record"
_ROLES = {_code(getattr(tensorlite.ops, name)): ("op", name) for name in tensorlite.ops.__all__}
_ROLES |= {
    _code(Tensor.__lt__): ("op", "comparison"),
    _code(Tensor.__and__): ("op", "logic"),
    _code(record): (_RECORD, ""),
    _code(Module.__call__): ("module", ""),
    _code(backpropagate): ("walk", "backward"),
    _code(Optimizer.step): ("optimizer", "step"),
    _code(Optimizer.zero_grad): ("optimizer", "zero_grad"),
    _code(clip_grad_norm_): ("optimizer", "clip_grad_norm_"),
}


@dataclass(slots=True, eq=False)
class Span:
    """A stretch of time in which a function ran. Others may lie within it."""

    kind: str  # "all", "module", "op", "vjp", "walk" or "optimizer"
    name: str  # of the op, or the module's class
    path: str  # of the module; "" outside of all
    parent: "Span | None"
    start: float  # seconds after the beginning; a mark of the clock until the profile is over, as is `end`
    end: float = 0.0
    within: float = 0.0  # seconds of the spans that lie in it
    flop: int = 0
    made: int = 0  # bytes of new arrays
    held: int = 0  # bytes in use at its end, that ops have made

    @property
    def seconds(self) -> float:
        return self.end - self.start

    @property
    def own_seconds(self) -> float:
        """Without the spans in it."""
        return self.seconds - self.within


@dataclass(slots=True, eq=False)
class _Open:
    """A span that is not over."""

    span: Span
    code: object = None  # of its function
    operands: dict = field(default_factory=dict)  # those that own their memory by their ids, so that they are not gone
    shapes: dict = field(default_factory=dict)
    composed: bool = False  # of ops whose operations were counted
    op: Span | None = None  # that of a vjp


class Profile:
    """See `profile`. After the block: `spans`, in the order in which they began, the first one the whole block;
    `live`, the memory; `cost`, the profiler's own; `chains`, for each module's path those of the ones around it."""

    def __init__(self, model: Module | None, backend: Backend):
        self.backend = backend
        self.spans: list[Span] = []
        self.chains: dict[str, tuple[str, ...]] = {}
        self.elsewhere = False  # whether there were arrays of another backend
        self.cost = Cost()
        self.live = LiveArrays(backend.xp.ndarray, self.cost)
        self._modules = ModulePaths(model)
        self._roles: dict[int, tuple] = {}  # by the id of the code, whose hash takes long
        self._latest = 0.0
        self._fresh = False
        self._open: list[_Open] = []
        for code, role in _ROLES.items():
            self._add_role(code, *role)

    # -- what is shown --

    def table(self, depth: int | None = None) -> str:
        """By op, by module, and what held the memory at its peak.

        depth: of modules; what lies in deeper ones counts for the one at that depth. None for as many as are readable.
        """
        return table(self, depth)

    def trace(self, path: str | Path) -> None:
        """Write a file in the Chrome trace format, which https://ui.perfetto.dev opens."""
        write_trace(self, path)

    @property
    def weights(self) -> int:
        """Bytes of the parameters of the models that were called."""
        return sum(p.data.nbytes for _, model in self._modules.models for p in model.parameters())

    # -- the block --

    def __enter__(self) -> "Profile":
        self._before = sys.getprofile()
        self.cost.event_seconds = self._seconds_of_an_event()
        self.cost.events = 0
        self._push(_Open(Span("all", "", "", None, self._mark(time.perf_counter()))))
        sys.setprofile(self._see)
        return self

    def __exit__(self, *exc) -> None:
        mark = self._mark(time.perf_counter())
        sys.setprofile(self._before)
        while self._open:
            self._pop(mark)
        self.live.close()
        self._resolve()

    def _resolve(self) -> None:
        """Marks of the clock to seconds; then who spent how much of them within others."""
        first, clock = self.spans[0].start, self._device_clock
        if clock:
            self.spans[0].end.synchronize()
        for span in self.spans:
            if clock:
                span.start, span.end = (clock.get_elapsed_time(first, mark) / 1e3 for mark in (span.start, span.end))
            else:
                span.start, span.end = span.start - first, span.end - first
        for span in self.spans[1:]:
            span.parent.within += span.seconds

    @property
    def _device_clock(self):
        return None if self.backend.name == "numpy" else self.backend.xp.cuda

    def _mark(self, came: float):
        """Now: on a GPU an event, which it comes to when the work before is done; else a number of seconds, those spent
        on watching left out. came: perf_counter() when the watching began that asks."""
        if self._device_clock:
            return self._device_clock.get_current_stream().record()
        self._latest = max(self._latest, came - self.cost.seconds)
        return self._latest

    def _seconds_of_an_event(self) -> float:
        """What it takes to be told of a function that does not matter. Python copies its variables each time, of which
        those of this package have five."""

        def typical(x, y, weight=None, bias=None):
            size = len(x)
            return size, y

        def timed(calls=200):
            start = time.perf_counter()
            for _ in range(calls):
                typical("x", "y")
            return time.perf_counter() - start

        costs = []
        for _ in range(9):
            plain, self.cost.events = timed(), 0
            sys.setprofile(self._see)
            try:
                told = timed()
            finally:
                sys.setprofile(self._before)
            costs.append((told - plain) / self.cost.events)
        return max(0.0, median(costs))

    # -- what is seen --

    def _see(self, frame, event: str, arg) -> None:
        self.cost.events += 1
        role = self._roles.get(id(frame.f_code))
        if role is None or event not in ("call", "return"):  # a call of C's has the frame of its caller
            return
        came = time.perf_counter()
        kind, name, _ = role
        if kind == "deposit":
            self._deposited(frame, event)
        elif kind == _RECORD:
            if event == "return" and self._open[-1].span.kind != "op" and isinstance(arg, Tensor) and arg.node:
                self._learn(frame.f_back, arg)
        elif event == "call":
            self._called(kind, name, frame, came)
        elif any(opened.code is frame.f_code for opened in self._open):  # not so of what was entered before the block
            self._returned(frame.f_code, arg, came)
        self.cost.measured += time.perf_counter() - came

    def _called(self, kind: str, name: str, frame, came: float) -> None:
        outer, values = self._open[-1].span, frame.f_locals
        path = outer.path
        if kind == "vjp":
            name, path = values["op"].name, values["op"].path
            self.live.add(Maker(SUMS, path, False), values["gy"])  # if no vjp has made it
        elif kind == "module":
            name = type(values["self"]).__name__
            path = self._modules.path(values["self"]) or name
            self.chains.setdefault(path, (*self.chains.get(outer.path, ()), path))
        opened = _Open(Span(kind, name, path, outer, 0.0), frame.f_code)
        if kind == "vjp":
            opened.operands, opened.op = self.live.owners(values["gy"], values["vjp"]), values["op"]
        elif kind == "op":
            opened.shapes = {name: x.shape for name, x in values.items() if hasattr(x, "shape")}
            opened.operands = self.live.owners(*values.values())
        elif kind == "walk" and (code := getattr(values["deposit"], "__code__", None)):
            self._add_role(code, "deposit")
        opened.span.start = self._mark(came)
        self._push(opened)

    def _returned(self, code, result, came: float) -> None:
        mark = self._mark(came)
        while self._open[-1].code is not code:  # vjps that failed
            self._pop(mark)
        opened = self._open[-1]
        span = opened.span
        if span.kind == "op":
            self._made(opened, result)
        elif span.kind == "vjp" and result is not None:
            span.made = self.live.add(Maker(span.name, span.path, True), result, opened.operands)
            span.flop = opened.op.flop and backward_flop(span.name, opened.op.flop, result)
        self._pop(mark)

    def _made(self, opened: _Open, result) -> None:
        """What an op has given, and keeps for its vjp."""
        span, results = opened.span, result if isinstance(result, (list, tuple)) else [result]
        results = [y for y in results if isinstance(y, Tensor)]
        if not results:  # it failed
            return
        nodes = [y.node for y in results if y.node and y.node.vjp and not hasattr(y.node.vjp, "__wrapped__")]
        kept = [node.vjp for node in nodes]
        span.made = self.live.add(Maker(span.name, span.path, False), (results, kept), opened.operands)
        self.elsewhere |= type(results[0].data) is not self.backend.xp.ndarray
        flop = forward_flop(span.name, results[0].shape, opened.shapes)
        if not opened.composed:
            span.flop = flop
        self._open[-2].composed |= bool(flop)
        for node in nodes:
            self._watch_vjp(node, span)

    def _learn(self, frame, result: Tensor) -> None:
        """An op that is not of this package: this call of it is seen when it is over, those from now on are timed."""
        name, span = result.node.op, self._open[-1].span
        self._add_role(frame.f_code, "op", name)
        self.live.add(Maker(name, span.path, False), result)
        self._watch_vjp(result.node, Span("op", name, span.path, None, 0.0))

    def _deposited(self, frame, event: str) -> None:
        """A leaf's first gradient, which is then a copy or a sum of what the vjps gave."""
        leaf = frame.f_locals["node"].leaf() if "node" in frame.f_locals else None
        if leaf is None:
            return
        if event == "call":
            self._fresh = leaf.grad is None
        elif self._fresh and leaf.grad is not None:
            self.live.add(Maker(SUMS, "", False), leaf.grad)

    def _watch_vjp(self, node: Node, op: Span) -> None:
        """Put a function in the place of the vjp whose calls are seen, with the op that they belong to."""
        vjp = node.vjp

        def watched(gy, *, op=op):
            return vjp(gy)

        watched.__wrapped__, watched.__qualname__ = vjp, getattr(vjp, "__qualname__", "op")
        self._add_role(watched.__code__, "vjp")
        node.vjp = watched

    def _add_role(self, code, kind: str, name: str = "") -> None:
        self._roles.setdefault(id(code), (kind, name, code))

    def _push(self, opened: _Open) -> None:
        self._open.append(opened)
        self.spans.append(opened.span)

    def _pop(self, mark) -> None:
        span = self._open.pop().span
        span.end, span.held = mark, self.live.now


def profile(model: Module | None = None, backend: str | None = None) -> Profile:
    """`with profile(model) as p:` around forward and backward passes and an optimiser's steps; then `p.table()` says
    where the time and the memory went, and `p.trace("trace.json")` writes it for a viewer.

    model: whose modules give the ops their paths; without it the module that is called first.
    backend: on whose arrays the ops work; the model's, or "numpy". On a GPU times are those between events on its
        stream, which hold the waits for a host that is slower than the device; capture no CUDA graph within.

    This thread alone is seen. The profiler's own time is in no figure but `p.cost`. An op made by `record` outside of
    this package is timed from its second call on.
    """
    if backend is None:
        first = next(iter(model.parameters()), None) if model is not None else None
        return Profile(model, get_backend("numpy") if first is None else backend_of(first.data))
    return Profile(model, get_backend(backend))
