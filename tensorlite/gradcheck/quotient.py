"""The derivative along a line by difference quotients, with an estimate of its own error.

    D(h) = (L(h) - L(-h)) / 2h = L'(0) + a h^2 + b h^4 + ...

The step goes down from a large one, each a quarter of the last, and Richardson's extrapolation takes one power of h^2
after another out of the D(h) so far. An extrapolated value is as far off as it is from the two that it was made of: C.
Ridders, "Accurate computation of F'(x) and F'(x) F''(x)", Advances in Engineering Software 4 (1982); Press et al.,
"Numerical Recipes" (2007), section 5.7. With large steps the values jump about, with small ones they drown in rounding;
both show in the estimate. So neither the size of the inputs nor the curvature of the function has to be known.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

EPS = 2.0**-52
SHRINK = 4.0  # from a step to the next
STEPS = 24  # so the last is 1e-14 of the first
COLUMNS = 4  # powers of h^2 taken out
LATER = 3  # steps that show the noise of those before
TRUST = 8.0  # the true error is taken to be up to so many times the estimated one
SETTLED = 1e-2  # with a larger relative error a value is noise, or of steps too large for this derivative
GOOD = 1e-3  # with a larger one, TRUST times the estimate, it decides nothing
HIDDEN = 100.0  # roundings of the result in which a change of it may be lost
JUMP = 1e6  # by more no power of the step that matters shrinks in one
KINK = 1e-3  # a jump of the slope by this share of it is seen


class Line(NamedTuple):
    """L(t) = cotangent . y(t), y the outputs along a line through the inputs."""

    at: Callable[[float], np.ndarray]  # t -> y(t), flat, float64
    base: np.ndarray  # y(0)
    cotangent: np.ndarray
    weighted: np.ndarray  # cotangent * base
    origin: float = 0.0  # the coordinate that t is added to, if it is one: its rounding decides how far t really goes
    noise: float = 0.0  # of L, besides the rounding of y


class Quotient(NamedTuple):
    """A derivative and its estimated error."""

    value: float
    error: float

    @property
    def relative(self) -> float:
        return self.error / abs(self.value) if self.value else np.inf

    def agrees(self, other: "Quotient") -> bool:
        return abs(self.value - other.value) <= TRUST * (self.error + other.error)


class Search(NamedTuple):
    """What all steps together say.

    quotients: the settled one with the smallest relative error, and those at other steps that contradict it.
    hidden: a derivative below this does not show in the outputs, or None if one shows.
    kink: the slopes on the left and on the right, where they differ.
    """

    quotients: list[Quotient]
    hidden: float | None = None
    kink: tuple[float, float] | None = None


class _Step(NamedTuple):
    h: float
    slope: float
    size: float
    rounding: float
    jump: float  # of the slope, between left and right


def derivative(line: Line, start: float, enough: Callable[[Quotient], bool]) -> Search:
    """The derivative of L at 0, from steps of at most `start`, which end with the first quotient that is `enough`."""
    found, steps, row = [], [], []
    moving = _Moving(line)
    for k in range(STEPS):
        step = _step(line, start * SHRINK**-k, moving)
        if step is None:
            found, steps, row = [], [], []
            continue
        steps.append(step)
        row, errors = _extrapolate(step.slope, row)
        quotients = [Quotient(v, e + step.rounding) for v, e in zip(row, errors, strict=True)]
        for q in quotients:
            if enough(q) and not _bends(steps[-2:]):
                return Search([q])
        found.append(quotients)
    quotients = [q for q in _with_noise(found, steps) if not _jumps(q.value, steps)]
    return Search(distinct(quotients), _hidden(line, steps), _kink(steps))


def power_of_two(x: float) -> float:
    """The largest up to x. A step that is one is added to most numbers without rounding."""
    return math.ldexp(0.5, math.frexp(x)[1])


def distinct(quotients: list[Quotient]) -> list[Quotient]:
    """The settled ones that contradict each other, the most precise first."""
    kept: list[Quotient] = []
    for q in sorted(quotients, key=lambda q: q.relative):
        if TRUST * q.relative <= SETTLED and not any(map(q.agrees, kept)):
            kept.append(q)
    return kept


def together(a: Search, b: Search) -> Search:
    """The result of two searches from different steps: the quotients that both have come to. What they differ by is
    an error, too."""
    quotients = []
    for pair in itertools.product(a.quotients, b.quotients):
        best, other = sorted(pair, key=lambda q: q.error)
        quotients.append(best._replace(error=max(best.error, abs(best.value - other.value))))
    hidden = None if a.hidden is None or b.hidden is None else max(a.hidden, b.hidden)
    return Search(distinct(quotients), hidden, a.kink and b.kink)


class _Moving:
    """Which outputs move along a line, of those only the rounding counts: its size in L, for values as they are."""

    def __init__(self, line: Line):
        self.line, self.outputs, self.count, self.rounding = line, np.zeros(line.base.shape, bool), 0, 0.0

    def add(self, outputs: np.ndarray) -> None:
        self.outputs |= outputs
        count = np.count_nonzero(self.outputs)
        if count != self.count:
            self.count = count
            self.rounding = EPS * float(np.linalg.norm(self.line.weighted[self.outputs]))


def _step(line: Line, h: float, moving: _Moving) -> _Step | None:
    """The quotient at h, or None where the function has no value there. The outputs are subtracted before they are
    added up: what does not move cancels to the bit, however large it is."""
    with np.errstate(all="ignore"):
        try:
            up = line.at(h) - line.base
            down = line.base - line.at(-h)
        except (ArithmeticError, ValueError):  # a function may raise for what it is not defined for
            return None
        up *= line.cotangent  # in place, for they may be many
        down *= line.cotangent
        right, left = float(up.sum()), float(down.sum())
        width = (line.origin + h) - (line.origin - h)
        slope = (right + left) / width
        if not np.isfinite(slope):
            return None
        up += down
        moving.add(up != 0)
        change = float(np.abs(up, out=up).sum())
        rounding = line.noise + moving.rounding + EPS * change
    return _Step(h, slope, change / width, rounding / h, (right - left) / h)


def _extrapolate(slope: float, above: list[float]) -> tuple[list[float], list[float]]:
    """A row of Richardson's table from the one above, and the errors of its values."""
    row, errors = [slope], [abs(slope - above[0]) if above else np.inf]
    for j, old in enumerate(above[:COLUMNS]):
        better = row[j] + (row[j] - old) / (SHRINK ** (2 * j + 2) - 1)
        errors.append(max(abs(better - row[j]), abs(better - old)))
        row.append(better)
    return row, errors


def _with_noise(found: list[list[Quotient]], steps: list[_Step]) -> list[Quotient]:
    """The quotients with the noise of L in their errors: at smaller steps than theirs the slopes should not differ, and
    what they differ by is noise, though two neighbours may agree by chance. Of the last few steps it is not known."""
    noise, quotients = 0.0, []
    for k in reversed(range(len(steps))):
        if k + 1 < len(steps):
            noise = max(noise, abs(steps[k].slope - steps[k + 1].slope) * steps[k + 1].h)
        if k + LATER < len(steps):
            quotients += [q._replace(error=max(q.error, noise / steps[k].h)) for q in found[k]]
    return quotients


def _jumps(value: float, steps: list[_Step]) -> bool:
    """Whether from one step to the next the slope comes from afar to this value at once: of a smooth function it would
    by a power of the step. One that is rounded inside to few digits is a staircase, and flat between two stairs."""
    apart = [abs(s.slope - value) for s in steps]
    first = next((k for k, a in enumerate(apart) if a <= 0.5 * abs(value)), 0)
    return first > 0 and apart[first - 1] > max(abs(value), JUMP * apart[first])


def _hidden(line: Line, steps: list[_Step]) -> float | None:
    """The derivative that rounding may hide, if from an early step on the outputs move by no more than theirs."""
    still = STEPS
    for k in reversed(range(len(steps))):
        if steps[k].size > HIDDEN * steps[k].rounding:
            break
        still = k
    if still > STEPS // 2:
        return None
    return HIDDEN * EPS * float(np.linalg.norm(line.weighted)) / steps[still].h


def _bends(steps: list[_Step]) -> bool:
    """Whether the slope jumps, and no less than it did at the step before: of a smooth function the jump shrinks with
    the step."""
    if len(steps) < 2:
        return False
    last, jump = steps[1], abs(steps[1].jump)
    return jump > max(KINK * last.size, HIDDEN * last.rounding) and jump > 0.5 * abs(steps[0].jump)


def _kink(steps: list[_Step]) -> tuple[float, float] | None:
    """The slopes on both sides, if they differ by the same at the last five steps that rounding leaves to see."""
    seen = [s for s in steps if abs(s.jump) > max(KINK * s.size, HIDDEN * s.rounding)][-5:]
    jumps = [s.jump for s in seen]
    if len(seen) < 5 or max(jumps) * min(jumps) < 0 or min(map(abs, jumps)) < 0.8 * max(map(abs, jumps)):
        return None
    return seen[-1].slope - jumps[-1] / 2, seen[-1].slope + jumps[-1] / 2
