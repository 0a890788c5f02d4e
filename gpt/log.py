"""log.jsonl, to which a run adds a row at each evaluation. docs/runs.md has its keys."""

import contextlib
import json
from pathlib import Path

from gpt.files import explained, read_regular

MAX_LOG = 2**28  # bytes: a million rows


def read_log(path: Path) -> tuple[list[dict[str, float | None]], str]:
    """The rows by their steps, and in a few words what is wrong with the file, "" if nothing is.

    Only the numbers of a row are taken, with None for one that is infinite, nan, or beyond float32. What is no row, as
    when a crash cut it short, is left out. UserError for what cannot be read.
    """
    with explained("read", path):
        rows = [parse_row(line) for line in read_regular(path, MAX_LOG).splitlines()]
    wrong = [number for number, row in enumerate(rows, 1) if row is None]
    numbers = {row["step"]: {key: _number(value) for key, value in row.items()} for row in rows if row is not None}
    return [numbers[step] for step in sorted(numbers)], f"row {wrong[0]} of {path.name} is damaged" if wrong else ""


def parse_row(line: bytes) -> dict | None:
    """The row with a `step` that a line is; None if it is none."""
    with contextlib.suppress(ValueError, RecursionError):
        row = json.loads(line)
        if isinstance(row, dict) and type(row.get("step")) is int and 0 <= row["step"] < 2**63:
            return row
    return None


def _number(value: object) -> float | None:
    return value if type(value) in (int, float) and abs(value) < 2**127 else None
