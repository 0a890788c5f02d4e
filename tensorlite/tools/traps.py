"""Broadcasting that is legal and seldom meant."""

import math

import numpy as np

LARGE = 2**30  # bytes that a broadcast may make of a quarter of them without a word


def trap(op: str, shapes: tuple[tuple[int, ...], ...], result: tuple[int, ...], itemsize: int) -> str | None:
    """What to say of an op on operands of these shapes if it is likely a mistake: a column against a row, as of a
    prediction (N, 1) and a target (N,), or a result above LARGE bytes of operands that are a quarter of it at most."""
    if len(shapes) != 2 or not _broadcast(*shapes, result):
        return None
    for column, row in (shapes, shapes[::-1]):
        if column == (*row, 1) and row[-1:] > (1,):
            return (
                f"{op}: {column} against {row} broadcasts to {result}, each element with every other: if they should "
                f"go in pairs, give them one shape, as by reshape{row} on the one of {column}"
            )
    nbytes = math.prod(result) * itemsize
    if nbytes > max(LARGE, 4 * itemsize * sum(math.prod(shape) for shape in shapes)):
        return (
            f"{op}: {shapes[0]} against {shapes[1]} broadcasts to {result}, {nbytes / 2**30:.1f} GiB: "
            "select or sum before, if that can be"
        )
    return None


def _broadcast(a: tuple[int, ...], b: tuple[int, ...], result: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(a, b) == result != ()
    except ValueError:
        return False
