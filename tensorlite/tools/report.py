"""A profile as text."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

WIDTH = 112  # columns of a table
FEW = 20  # rows of modules that are readable
MOST = 16  # holders of memory that are shown
OUTSIDE = "outside of the modules"
NO_OP = {  # kinds of spans whose own time is no op's
    "all": "no op: Python, data",
    "module": "no op: Python, data",
    "walk": "no op: the walk back",
    "optimizer": "no op: the optimizer",
}


@dataclass(slots=True)
class Row:
    """What spans come to, forward and backward."""

    calls: int = 0
    backward_calls: int = 0
    forward: float = 0.0
    backward: float = 0.0
    flop: int = 0
    made: int = 0
    gradients: int = 0

    @property
    def seconds(self) -> float:
        return self.forward + self.backward

    def add(self, span, counts: bool) -> None:
        """counts: whether it is a call of what the row is of."""
        self.flop += span.flop
        if span.kind in ("vjp", "walk"):
            self.backward_calls += counts
            self.backward += span.own_seconds
            self.gradients += span.made
        else:
            self.calls += counts
            self.forward += span.own_seconds
            self.made += span.made


def by_op(profile) -> dict[str, Row]:
    """A row for each op, and for each kind of time that is no op's: together all of it."""
    return _rows(profile.spans, lambda span: NO_OP.get(span.kind, span.name), lambda span: span.kind in ("op", "vjp"))


def by_module(profile, depth: int) -> dict[str, Row]:
    """A row for each module at that depth and above, for what is outside of all, and for the walk and the optimizer."""

    def name(span) -> str:
        return NO_OP[span.kind] if span.kind in ("walk", "optimizer") else folded(profile, span.path, depth) or OUTSIDE

    return _rows(profile.spans, name, lambda span: span.kind == "module" and name(span) == span.path)


def folded(profile, path: str, depth: int) -> str:
    """The module at that depth, the model itself being at 0, in which the one at `path` is."""
    chain = profile.chains.get(path, (path,))
    return chain[min(depth, len(chain) - 1)]


def _rows(spans: Iterable, name: Callable, counts: Callable) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for span in spans:
        rows.setdefault(name(span), Row()).add(span, counts(span))
    return dict(sorted(rows.items(), key=lambda item: -item[1].seconds))


def table(profile, depth: int | None) -> str:
    """See `Profile.table`."""
    depth = _readable_depth(profile) if depth is None else depth
    return "\n".join([
        *_summary(profile), "",
        *_table("op", by_op(profile)), "",
        *_table(f"module, to depth {depth}", by_module(profile, depth)), "",
        *_memory(profile),
    ])  # fmt: skip


def _readable_depth(profile) -> int:
    depth, deepest = 1, max(map(len, profile.chains.values()), default=1)
    while depth < deepest and len(by_module(profile, depth + 1)) <= FEW:
        depth += 1
    return depth


def _summary(profile) -> list[str]:
    """What was profiled, how it was timed, and what that cost."""
    spans, cost = profile.spans, profile.cost
    walks, steps = (sum(span.kind == kind and span.name == name for span in spans)
                    for kind, name in (("walk", "backward"), ("optimizer", "step")))  # fmt: skip
    total = spans[0].seconds
    ops = sum(span.own_seconds for span in spans if span.kind in ("op", "vjp"))
    flop = sum(span.flop for span in spans)
    lines = [f"{_count(walks, 'backward pass', 'es')} and {_count(steps, 'optimizer step')} in {_ms(total)} ms, "
             f"{_percent(ops, total)} of it in ops; {_scaled(flop)}FLOP, {_rate(flop, total)}FLOP/s"]  # fmt: skip
    own = f"{_ms(cost.seconds)} ms, {_percent(cost.seconds, total + cost.seconds)} of the time that passed"
    if profile.backend.name == "numpy":
        lines.append(f"The profiler took {own}: left out below as far as it is known.")
    else:
        lines.append("Times are the device's, between events: where it waits for the host, they hold that wait.")
        lines.append(f"The profiler took {_ms(cost.seconds)} ms of the host's time, which may be among those waits.")
    if profile.elsewhere:
        lines.append(f"Ops worked on other arrays than {profile.backend.name}'s: give profile() their backend.")
    lines.append(
        "FLOP are those of matrix products and attention, 2 for a multiplication and an addition, masked or not."
    )
    return lines


def _table(what: str, rows: dict[str, Row]) -> list[str]:
    head = ("calls", "back", "forward ms", "backward ms", "share", "FLOP/s", "made", "gradients")
    total = sum(row.seconds for row in rows.values())
    lines = [_line(what, *head)]
    for name, row in rows.items():
        lines.append(_line(
            name, row.calls or "", row.backward_calls or "", row.forward and _ms(row.forward),
            row.backward and _ms(row.backward), _percent(row.seconds, total),
            row.flop and _rate(row.flop, row.seconds), row.made and _size(row.made),
            row.gradients and _size(row.gradients),
        ))  # fmt: skip
    forward, backward = (sum(getattr(row, side) for row in rows.values()) for side in ("forward", "backward"))
    return [*lines, _line("all", "", "", _ms(forward), _ms(backward), "100.0%", "", "", "")]


def _line(name: str, *columns) -> str:
    widths = (7, 7, 12, 13, 8, 10, 12, 12)
    cells = "".join(f"{cell or '':>{width}}" for cell, width in zip(columns, widths, strict=True))
    room = WIDTH - sum(widths)
    return f"{name if len(name) < room else f'...{name[4 - room :]}':<{room}}{cells}".rstrip()


def _memory(profile) -> list[str]:
    """Who held what when the arrays that ops have made came to the most."""
    live = profile.live
    if not live.peak:
        return ["no memory: no op has made an array"]
    at = live.peak_after
    where = f"{at.op}{' backward' if at.backward else ''}{f' in {at.path}' if at.path else ''}"
    held: dict[tuple, tuple[int, int]] = {}
    for maker, (arrays, nbytes) in live.held_at_peak.items():
        key = maker.op + " backward" * maker.backward, re.sub(r"\b\d+\b", "*", maker.path) or OUTSIDE
        before = held.get(key, (0, 0))
        held[key] = before[0] + arrays, before[1] + nbytes
    rows = sorted(held.items(), key=lambda item: -item[1][1])
    lines = [f"peak memory {_size(live.peak)}, after {where}; then held by"]
    lines.append(_holder("op", "module", "arrays", "bytes", "share"))
    many = sum(nbytes >= live.peak / 1000 for _, (_, nbytes) in rows[:MOST])
    lines += [_holder(*key, n, _size(nbytes), _percent(nbytes, live.peak)) for key, (n, nbytes) in rows[:many]]
    if rest := [figures for _, figures in rows[many:]]:
        n, nbytes = map(sum, zip(*rest, strict=True))
        lines.append(_holder(f"{len(rest)} others", "", n, _size(nbytes), _percent(nbytes, live.peak)))
    weights = f" ({_size(profile.weights)})" if profile.weights else ""
    lines.append(f"Not counted: what an op makes and drops before it is over, and what no op makes: weights{weights},")
    lines.append("gradients and moments in flat arrays, data.")
    return lines


def _holder(op: str, path: str, *columns) -> str:
    arrays, nbytes, share = columns
    return f"  {op:<38}{path:<40}{arrays:>10}{nbytes:>12}{share:>10}"


def _count(n: int, what: str, plural: str = "s") -> str:
    return f"{n:,} {what}{'' if n == 1 else plural}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f}"


def _rate(flop: int, seconds: float) -> str:
    return _scaled(flop / seconds) if seconds else ""


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else ""


def _size(nbytes: float) -> str:
    return f"{_scaled(nbytes)}B"


def _scaled(number: float) -> str:
    """A number with the letter of its thousands, such as "1.2 G"."""
    for unit, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:,.1f} {letter}"
    return f"{number:.0f} "
