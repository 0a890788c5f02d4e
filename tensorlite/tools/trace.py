"""A profile in the Chrome trace format (Google, "Trace Event Format"), which Perfetto opens."""

import json
from pathlib import Path

from tensorlite.tools.page import write_whole

FORWARD, BACKWARD = 1, 2  # numbers of the rows
_PROCESS = {"name": "process_name", "ph": "M", "pid": 1, "tid": 0, "args": {"name": "tensorlite.tools.profile"}}


def _json(value) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


OURS = _json({"traceEvents": [_PROCESS]})[:-2]  # what a file of this module begins with


def trace_text(profile) -> str:
    """Two rows, forward and backward, of spans that lie in one another, and how much memory was in use."""
    events = [_PROCESS]
    for row, name in ((FORWARD, "forward"), (BACKWARD, "backward")):
        events.append({"ph": "M", "pid": 1, "tid": row, "name": "thread_name", "args": {"name": name}})
        events.append({"ph": "M", "pid": 1, "tid": row, "name": "thread_sort_index", "args": {"sort_index": row}})
    for span in profile.spans[1:]:
        events.append(_complete(span))
        if span.kind in ("op", "vjp"):
            held = {"bytes made by ops": span.held}
            events.append({"ph": "C", "pid": 1, "tid": 0, "name": "memory", "ts": _micro(span.end), "args": held})
    return _json({"traceEvents": events})  # and nothing else: displayTimeUnit has viewers disagree on what ts is in


def _complete(span) -> dict:
    start, end = _micro(span.start), _micro(span.end)
    args = {"module": span.path, "FLOP": span.flop, "bytes made": span.made}
    return {
        "ph": "X", "pid": 1, "tid": BACKWARD if span.kind in ("vjp", "walk") else FORWARD, "cat": span.kind,
        "name": (span.path if span.kind == "module" else span.name), "ts": start, "dur": round(end - start, 3),
        "args": {name: value for name, value in args.items() if value},
    }  # fmt: skip


def _micro(seconds: float) -> float:
    """In microseconds, to the nanosecond."""
    return round(1e6 * seconds, 3)


def write_trace(profile, path: str | Path) -> None:
    """The file is there as a whole, or as it was."""
    write_whole(Path(path), trace_text(profile))
