"""The comparison of what the backward pass gives with what differences say, element by element or along directions."""

import numpy as np

from tensorlite.gradcheck.backward import differentiate
from tensorlite.gradcheck.directions import SCREEN, check_directions
from tensorlite.gradcheck.problem import Problem
from tensorlite.gradcheck.quotient import GOOD, TRUST, Line, Quotient, Search, derivative, together
from tensorlite.gradcheck.report import Element, GradcheckError, KinkError, Report

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
    problem.load(np.dtype(np.float64))
    base = problem.at().copy()
    _finite(problem, base)
    # No weight near zero: every output counts.
    cotangent = (rng.choice([-1.0, 1.0], base.size) * rng.uniform(0.5, 2.0, base.size)).astype(dtype).astype(np.float64)
    gradients, reached = _repeatable(problem, dtype, cotangent, rng)
    problem.load(np.dtype(np.float64))
    # Sums of so many terms are rounded on the way, in the dtype that is checked.
    terms = max(base.size, *(p.size for p in problem.points))
    roundings = 16 * (float(np.finfo(dtype).eps) if dtype.kind == "f" else 2.0**-7)
    for i, gradient in enumerate(gradients):
        largest = float(np.abs(gradient[np.isfinite(gradient)]).max(initial=0.0))
        tolerance = max(rtol, roundings * terms**0.5), atol + roundings * terms**0.5 * largest
        compared = Comparison(problem, i, gradient, Line(None, base, cotangent, cotangent * base), tolerance, step, report)
        compared.screen = max(SCREEN, roundings)
        if not reached[i]:
            compared.unreached(rng)
        elif compared.x.size <= MAX_ELEMENTS:
            compared.every_element()
        else:
            broken = np.argwhere(~np.isfinite(gradient))
            compared.elements(tuple(map(int, index)) for index in broken)
            check_directions(compared, rng)


def _finite(problem: Problem, base: np.ndarray) -> None:
    for name, point in zip(problem.names, problem.points, strict=True):
        for index in np.argwhere(~np.isfinite(point)):
            raise GradcheckError(f"gradcheck: {name}, element {tuple(map(int, index))} is {point[tuple(index)]}")
    start = 0
    for n, shape in enumerate(problem.shapes):
        values = base[start : start + int(np.prod(shape))].reshape(shape)
        start += values.size
        for index in np.argwhere(~np.isfinite(values)):
            raise GradcheckError(
                f"gradcheck: the result is not finite at these inputs: {f'output {n}, ' if len(problem.shapes) > 1 else ''}"
                f"element {tuple(map(int, index))} is {values[tuple(index)]}"
            )


def _repeatable(problem: Problem, dtype: np.dtype, cotangent: np.ndarray, rng) -> tuple[list, list[bool]]:
    """The gradients, and which inputs were reached, if a second time gives the same to the bit."""
    out, gradients, reached = differentiate(problem, dtype, cotangent)
    with np.errstate(all="ignore"):  # elsewhere in between, so that what was kept from there would show
        problem.load(np.dtype(np.float64))
        problem.at(0, problem.points[0] * (1 + 2.0**-20))
    again, gradients2, _ = differentiate(problem, dtype, cotangent)
    if out.tobytes() != again.tobytes():
        raise GradcheckError(
            "gradcheck: two evaluations differ; wrap random ops in random.scope(seed), and keep no state between calls"
        )
    for name, a, b in zip(problem.names, gradients, gradients2, strict=True):
        if a.tobytes() != b.tobytes():
            raise GradcheckError(
                f"gradcheck: {name}: a second backward pass, over a fresh graph, gives another gradient;"
                " the function or its vjp keeps state between calls"
            )
    return gradients, reached


class Comparison:
    """The gradient of one input beside the difference quotients, which go into the report.

    line: the base and the cotangent of every line.
    tolerance: (relative, absolute).
    """

    def __init__(self, problem, i, gradient, line, tolerance, step, report):
        self.problem, self.i, self.gradient, self.report = problem, i, gradient, report
        self.name, self.x = problem.names[i], problem.points[i]
        self.shared, self.tolerance, self.step = line, tolerance, step
        self.warm = None  # the step to start from, where the last element's quotient was good
        self.wrong: list[Element] = []

    def every_element(self) -> None:
        self.elements(np.ndindex(self.x.shape))

    def elements(self, indices) -> None:
        """Compare these; a GradcheckError if some are wrong."""
        for index in indices:
            element = self.element(index)
            self.report.add(element)
            if element.wrong:
                self.wrong.append(element)
                if len(self.wrong) == ENOUGH:
                    break
        if self.wrong:
            raise GradcheckError(f"gradcheck: {self.wrong[0]}{self.hint()}")

    def element(self, index: tuple[int, ...]) -> Element:
        def at(t: float) -> np.ndarray:
            moved = self.x.copy()
            moved[index] += t
            return self.problem.at(self.i, moved)

        x = float(self.x[index])
        return self.judge(index, float(self.gradient[index]), self.shared._replace(at=at, origin=x), x, self.allowed)

    def allowed(self, q: Quotient) -> float:
        return self.tolerance[1] + self.tolerance[0] * max(abs(q.value), q.size)

    def no_kink(self, search: Search, index: tuple[int, ...] | None) -> None:
        if search.kink:
            where = "a random direction" if index is None else f"element {index}"
            raise KinkError(
                f"gradcheck: {self.name} has a kink at {where}: the slope is {search.kink[0]:.6g} on the left and"
                f" {search.kink[1]:.6g} on the right; move the point away from it"
            )

    def judge(self, index, got: float, line: Line, scale: float, allowed) -> Element:
        """The verdict on one derivative. It is wrong if no steps that come to an answer come to this one, and others,
        tried before anything is accused, neither."""

        def ratio(q: Quotient) -> float:
            excess, margin = abs(got - q.value), allowed(q) + TRUST * q.error
            return float(excess / margin) if margin else 0.0 if excess == 0 else np.inf  # NaN stays one

        start = self.step or 2.0 ** np.floor(np.log2(max(abs(scale), 1.0)) - 2)
        search = derivative(line, start, lambda q: TRUST * q.error <= allowed(q) and ratio(q) <= 1)
        if not any(ratio(q) <= 1 for q in search.quotients):
            search = together(search, derivative(line, 0.75 * start, lambda q: False))
        self.no_kink(search, index)
        hidden = search.hidden
        q = min(search.quotients, key=ratio, default=Quotient(0.0, np.inf if hidden is None else hidden / TRUST))
        good = TRUST * q.error <= max(allowed(q), GOOD * max(abs(q.value), q.size))
        undecided = not good and ratio(q) <= 1 and (hidden is None or abs(got) > hidden)
        return Element(self.name, index, float(q.value), float(q.error), got, ratio(q), undecided)

    def unreached(self, rng) -> None:
        moved = self.problem.at(self.i, self.x + 2.0**-10 * np.maximum(1, np.abs(self.x)) * rng.uniform(1, 2, self.x.shape))
        if np.array_equal(moved, self.shared.base):
            raise GradcheckError(
                f"gradcheck: {self.name}: the backward pass never reaches it, and the result does not depend on it:"
                " leave it out, or is it a copy that the function does not use?"
            )
        raise GradcheckError(
            f"gradcheck: {self.name}: the backward pass never reaches it, but the result moves with it: it is cut off"
            " by .data, detach() or no_grad()"
        )

    def hint(self) -> str:
        """What the wrong elements have in common, for the end of the message."""
        if all(e.got == 0 for e in self.wrong):
            return "; is the gradient cut by .data or detach(), or does a vjp leave it out?"
        factors = [e.got / e.expected for e in self.wrong if e.expected]
        said = ""
        if len(factors) == len(self.wrong) > 1 and max(factors) - min(factors) <= 1e-3 * abs(factors[0]):
            said = f"; every wrong one is {factors[0]:.6g} times what is expected"
        wider = [s for s in self.problem.shapes if len(s) >= self.x.ndim and s != self.x.shape]
        if any(_stretches(self.x.shape, s) for s in wider):
            said += "; is the sum over a broadcast axis forgotten?"
        return said


def _stretches(shape: tuple, to: tuple) -> bool:
    return all(n in (1, m) for n, m in zip(reversed(shape), reversed(to), strict=False))
