"""Check the gradients of every op: python -m tensorlite.gradcheck

One line an op: how many cases it has, and for each backend and dtype the worst error in units of what is allowed, the
number of gradients that cannot be decided after a "?", or FAILED. Then what is wrong, and what is missing.
"""

import argparse
import sys
from typing import NamedTuple

import numpy as np

import tensorlite as tl
from tensorlite.backends import BACKENDS
from tensorlite.gradcheck import Report, check
from tensorlite.gradcheck.cases import CASES, Case

DTYPES = ("float64", "float32", "bfloat16")


class Column(NamedTuple):
    """A backend and a dtype that the ops are checked in."""

    backend: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.backend} {self.dtype}"


def main(argv: list[str] | None = None) -> int:
    """0 if no gradient is wrong, 1 if one is, or nothing could be checked; 130 if interrupted."""
    args = _parser().parse_args(argv)
    columns, missing = _columns(args.backend, args.dtype)
    failures: list[str] = []
    try:
        if columns:
            print(f"{'':28} cases", *[f"{str(column):>18}" for column in columns])
        for op in args.op:
            count = sum(case.op == op for case in CASES)
            if not count:
                missing.append(f"{op} has no case")
            elif columns:
                row = [_cell(op, column, failures) for column in columns]
                _show(f"{op:28} {count:5}", *[f"{cell:>18}" for cell in row], end="\n")
    except KeyboardInterrupt:
        _show("interrupted", end="\n")
        return 130
    for title, lines in (("wrong", failures), ("missing", missing)):
        print(*[f"{title}: {line}" for line in lines], sep="\n", end="\n" * bool(lines))
    return 1 if failures or not columns else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m tensorlite.gradcheck", description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--backend", nargs="+", choices=BACKENDS, default=BACKENDS, help="all that can run here if none"
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES, help="all that the backend has if none")
    parser.add_argument("--op", nargs="+", choices=tl.ops.__all__, default=tl.ops.__all__, metavar="NAME",
                        help="names of tensorlite.ops, all if none")  # fmt: skip
    return parser


def _columns(backends, dtypes) -> tuple[list[Column], list[str]]:
    """What can run here, and what cannot with the reason."""
    columns, missing = [], []
    for backend in backends:
        try:
            be = tl.get_backend(backend)
        except tl.BackendError as error:
            missing.append(str(error))
            continue
        for dtype in dtypes:
            try:
                be.dtype(dtype)
            except tl.BackendError as error:
                missing.append(str(error))
            else:
                columns.append(Column(backend, dtype))
    return columns, missing


def _cell(op: str, column: Column, failures: list[str]) -> str:
    """What the table says of one op; what is wrong with it is added to `failures`."""
    cases = [case for case in CASES if case.op == op and column.dtype in case.dtypes]
    worst, undecided, wrong = 0.0, 0, []
    for number, case in enumerate(cases, 1):
        if sys.stdout.isatty():
            _show(f"{op}, {column}: {number} of {len(cases)}", end="\r")
        report, error = _check(case, column)
        if error:
            wrong.append(f"{case.id!r}: {error}")
        if report:
            worst, undecided = max(worst, report.ratio), undecided + report.undecided
    if wrong:
        failures.append(f"{op}, {column}, {len(wrong)} of {len(cases)} cases: the first is {wrong[0]}")
        return "FAILED"
    return f"{worst:.2g}" + f" ?{undecided}" * bool(undecided) if cases else "-"


def _check(case: Case, column: Column) -> tuple[Report | None, str]:
    """The report, if it came to one, and what is wrong."""
    try:
        with np.errstate(all="ignore"):
            report = check(case.fn, *case.arrays(), backend=column.backend, dtype=column.dtype)
    except Exception as error:  # whatever one op stops with, the others are still to be checked
        return None, f"{type(error).__name__}: {error}"
    return report, str(report.error or "")


def _show(*words: str, end: str) -> None:
    """A line, over the one that shows the progress on a terminal."""
    print("\r\x1b[K" * sys.stdout.isatty() + " ".join(words), end=end, flush=True)


if __name__ == "__main__":
    sys.exit(main())
