"""The comparison of what the backward pass gives with what differences say, element by element or along directions."""

from typing import NamedTuple

import numpy as np

from tensorlite.gradcheck.backward import differentiate, stretches
from tensorlite.gradcheck.directions import SCREEN, check_directions
from tensorlite.gradcheck.problem import Problem
from tensorlite.gradcheck.quotient import GOOD, TRUST, Line, Quotient, Search, derivative, power_of_two, together
from tensorlite.gradcheck.report import Element, GradcheckError, KinkError, Report

FLOAT64 = np.dtype(np.float64)
MAX_ELEMENTS = 2000  # per input; beyond, directions
ENOUGH = Report.MAX_WORST  # wrong elements of one input


def check(
    fn, *inputs, kwargs: dict | None = None, rtol: float = 1e-7, atol: float = 0.0, step: float | None = None,
    dtype: str = "float64", backend: str = "numpy", seed: int = 0,
) -> Report:  # fmt: skip
    """As `gradcheck`, which says what the arguments are; the result is a Report, with the error that it would raise."""
    report = Report()
    with Problem(fn, inputs, kwargs or {}, backend) as problem:
        try:
            _check(problem, problem.be.dtype(dtype), report, rtol, atol, step, np.random.default_rng(seed))
        except GradcheckError as error:
            error.report, report.error = report, error
    return report


def _check(problem: Problem, dtype: np.dtype, report: Report, rtol, atol, step, rng) -> None:
    problem.round_to(dtype)
    problem.load(FLOAT64)
    base = problem.at().copy()
    _finite(problem, base)
    cotangent = _weights(problem, base, rng).astype(dtype).astype(FLOAT64)
    gradients, reached = _repeatable(problem, dtype, cotangent)
    problem.load(FLOAT64)
    line = Line(None, base, cotangent, cotangent * base)
    eps = float(np.finfo(dtype).eps) if dtype.kind == "f" else 2.0**-7
    roundings = eps * (16 if dtype == FLOAT64 else 4)  # in float64 there is room, in bfloat16 not
    sums = roundings * max(base.size, *(p.size for p in problem.points)) ** 0.5  # of so many terms, each rounded
    for i, gradient in enumerate(gradients):
        largest = float(np.abs(gradient[np.isfinite(gradient)]).max(initial=0.0))
        limits = Limits(max(rtol, sums), atol + sums * largest, max(SCREEN, roundings), step)
        compared = Comparison(problem, i, gradient, line, limits, report)
        if not reached[i]:
            compared.unreached(rng)
        elif gradient.size <= MAX_ELEMENTS:
            compared.elements(np.ndindex(gradient.shape))
        else:
            compared.elements(tuple(map(int, index)) for index in np.argwhere(~np.isfinite(gradient)))
            check_directions(compared, rng)


def _weights(problem: Problem, base: np.ndarray, rng) -> np.ndarray:
    """A random cotangent without numbers near 0, so that every element counts; of several outputs the large ones get
    small weights, or they would hide the others."""
    weights = rng.choice([-1.0, 1.0], base.size) * rng.uniform(0.5, 2.0, base.size)
    if len(problem.shapes) > 1:
        for piece, values in zip(problem.split(weights), problem.split(base), strict=True):
            largest = float(np.abs(values).max(initial=0.0))
            piece /= power_of_two(largest) if largest else 1.0
    return weights


def _finite(problem: Problem, base: np.ndarray) -> None:
    values = [(f"output {n}", piece) for n, piece in enumerate(problem.split(base))]
    for name, array in [*zip(problem.names, problem.points, strict=True), *values]:
        for index in np.argwhere(~np.isfinite(array)):
            where = f"{name}, element {tuple(map(int, index))}"
            raise GradcheckError(
                f"gradcheck: not finite at these inputs: {where} is {array[tuple(index)]}; move the point"
            )


def _repeatable(problem: Problem, dtype: np.dtype, cotangent: np.ndarray) -> tuple[list, list[bool]]:
    """The gradients, and which inputs were reached, if a second time gives the same to the bit."""
    out, gradients, reached = differentiate(problem, dtype, cotangent)
    problem.load(FLOAT64)
    with np.errstate(all="ignore"):  # elsewhere in between: what is kept from there would show
        problem.at(0, problem.points[0] * (1 + 2.0**-20))
    again, others, _ = differentiate(problem, dtype, cotangent)
    if out.tobytes() != again.tobytes():
        raise GradcheckError(
            "gradcheck: two evaluations differ; wrap random ops in random.scope(seed), and keep no state between calls"
        )
    for name, a, b in zip(problem.names, gradients, others, strict=True):
        if a.tobytes() != b.tobytes():
            raise GradcheckError(
                f"gradcheck: {name}: a second backward pass, over a fresh graph, gives another gradient;"
                " the function or a vjp keeps state between calls"
            )
    return gradients, reached


class Limits(NamedTuple):
    """What is allowed."""

    relative: float  # error of an element, relative to it
    absolute: float
    screen: float  # disagreement along a direction, relative to the terms it is the sum of, that is not looked into
    step: float | None  # the largest


class Comparison:
    """The gradient of one input beside the difference quotients, which go into the report.

    line: the base and the cotangent of every line.
    """

    def __init__(self, problem: Problem, i: int, gradient: np.ndarray, line: Line, limits: Limits, report: Report):
        self.problem, self.i, self.gradient, self.report = problem, i, gradient, report
        self.line, self.limits = line, limits
        self.name, self.x = problem.names[i], problem.points[i]

    def elements(self, indices) -> None:
        """Compare these; a GradcheckError if some are wrong."""
        wrong = []
        for index in indices:
            element = self._element(tuple(map(int, index)))
            self.report.add(element)
            if element.wrong:
                wrong.append(element)
                if len(wrong) == ENOUGH:
                    break
        if wrong:
            raise GradcheckError(f"gradcheck: {wrong[0]}{_hint(wrong, self.x.shape, self.problem.shapes)}")

    def _element(self, index: tuple[int, ...]) -> Element:
        """The verdict on one derivative. It is wrong if no steps that come to an answer come to this one, and others,
        tried before anything is accused, neither."""
        x, got = float(self.x[index]), float(self.gradient[index])

        def at(t: float) -> np.ndarray:
            moved = self.x.copy()
            moved[index] += t
            return self.problem.at(self.i, moved)

        def allowed(q: Quotient) -> float:
            return self.limits.absolute + self.limits.relative * abs(q.value)

        def ratio(q: Quotient) -> float:
            excess, margin = abs(got - q.value), allowed(q) + TRUST * q.error
            return np.inf if not np.isfinite(got) else excess / margin if margin else np.inf if excess else 0.0

        line = self.line._replace(at=at, origin=x)
        start = self.limits.step or power_of_two(max(abs(x), 1.0)) / 4
        search = derivative(line, start, lambda q: TRUST * q.error <= allowed(q) and ratio(q) <= 1)
        if not any(ratio(q) <= 1 for q in search.quotients):
            search = together(search, derivative(line, 0.75 * start, lambda q: False))
        self.smooth(search, f"element {index}")
        hidden = search.hidden
        q = min(search.quotients, key=ratio, default=Quotient(0.0, np.inf if hidden is None else hidden / TRUST))
        good = TRUST * q.error <= max(allowed(q), GOOD * abs(q.value))
        undecided = not good and ratio(q) <= 1 and (hidden is None or abs(got) > hidden)
        return Element(self.name, index, q.value, q.error, got, ratio(q), undecided)

    def smooth(self, search: Search, where: str) -> None:
        if search.kink:
            raise KinkError(
                f"gradcheck: {self.name} has a kink at {where}: the slope is {search.kink[0]:.6g} on the left and"
                f" {search.kink[1]:.6g} on the right; move the point away from it"
            )

    def unreached(self, rng) -> None:
        """The GradcheckError for an input that the backward pass does not reach."""
        far = 2.0**-10 * np.maximum(1.0, np.abs(self.x)) * rng.uniform(1, 2, self.x.shape)
        if np.array_equal(self.problem.at(self.i, self.x + far), self.line.base):
            raise GradcheckError(
                f"gradcheck: {self.name}: the backward pass never reaches it, nor does the result depend on it: leave"
                " it out; or is it a parameter, and the function uses its module? Then write gradcheck(module, x)"
            )
        raise GradcheckError(
            f"gradcheck: {self.name}: the backward pass never reaches it, but the result moves with it: it is cut off"
            " by .data, detach() or no_grad()"
        )


def _hint(wrong: list[Element], shape: tuple, outputs: list[tuple]) -> str:
    """What the wrong elements have in common, for the end of the message."""
    if all(e.got == 0 for e in wrong):
        return "; is it cut off by .data or detach(), or does a vjp leave it out?"
    said = ""
    factors = [e.got / e.expected for e in wrong if e.expected]
    if len(factors) == len(wrong) > 1 and max(factors) - min(factors) <= 1e-3 * abs(factors[0]):
        said = f"; every wrong one is {factors[0]:.6g} times what is expected"
    if any(out != shape and stretches(shape, out) for out in outputs):
        said += "; is the sum over a broadcast axis forgotten?"
    return said
