"""Gradient checks by finite differences, for the ops here and for anyone's own.

    from tensorlite import gradcheck
    gradcheck(lambda x, w: (x @ w).tanh(), x, w)

The function is evaluated in float64 whatever it is given. Its result is multiplied by fixed random numbers and
summed, so that one scalar L stands for the whole Jacobian. Every element of a small input is checked against the
difference quotient

    D(h) = (L(x + h) - L(x - h)) / 2h,    expected = (4 D(h) - D(2h)) / 3

(Richardson's extrapolation, error O(h^4)). Large inputs are checked along random directions, and when one fails
the direction is halved again and again until the wrong element is found.
"""

import numpy as np

from tensorlite.autograd import no_grad
from tensorlite.backends import get_backend
from tensorlite.gradcheck.report import GradcheckError, KinkError, Report
from tensorlite.tensor import Tensor, grad

RTOL, ATOL = 1e-7, 1e-9  # the quotient itself is good to about 1e-11 for values and slopes of order 1
STEP = 1e-3
MAX_ELEMENTS = 2000  # per input; beyond, directions
DIRECTIONS = 4


def gradcheck(fn, *inputs, **options) -> bool:
    """Check the gradients of `fn` at `inputs`; True, or a GradcheckError that says what is wrong. See `check`."""
    report = check(fn, *inputs, **options)
    if report.error:
        raise report.error
    return True


def check(fn, *inputs, **options) -> Report:
    """As `gradcheck`, but the result is a Report, which holds the error that `gradcheck` raises."""
    report = Report()
    try:
        _check(fn, *inputs, **options)
    except GradcheckError as error:
        error.report, report.error = report, error
    return report


def _check(fn, *inputs, rtol: float = RTOL, atol: float = ATOL, backend: str = "numpy", seed: int = 0) -> bool:
    """Check the gradients of `fn` at `inputs`; True, or a GradcheckError that says what is wrong.

    fn: takes as many Tensors as there are inputs and returns a Tensor of any shape. It must compute the same thing
        each time (put random ops into a `random.scope`) and be smooth within 2e-3 of the inputs.
    inputs: arrays, Tensors or numbers. Floating-point ones are converted to float64 and checked; others are passed
        on as they are, integers for instance.
    rtol, atol: a gradient g passes if |g - expected| <= atol * s + rtol * |expected|, s the larger of 1 and the
        largest gradient of that input.
    backend: where to run it.
    """
    be, rng = get_backend(backend), np.random.default_rng(seed)
    arrays = [_host_array(x) for x in inputs]
    checked = [i for i, a in enumerate(arrays) if a.dtype.kind == "f"]
    if not checked:
        raise TypeError("gradcheck: none of the inputs is floating-point, so there is no gradient to check")
    arrays = [a.astype(np.float64) if i in checked else a for i, a in enumerate(arrays)]

    gradients, cotangent = _analytic(fn, arrays, checked, be, rng)

    @no_grad()
    def loss(i: int, shifted: np.ndarray) -> float:
        tensors = [Tensor(be.asarray(shifted if j == i else a)) for j, a in enumerate(arrays)]
        return float(np.vdot(be.to_numpy(fn(*tensors).data), cotangent))

    base = loss(checked[0], arrays[checked[0]])
    if not np.isfinite(base):
        raise GradcheckError("gradcheck: the result is not finite at these inputs")
    if base != loss(checked[0], arrays[checked[0]]):
        raise GradcheckError("gradcheck: two evaluations differ; wrap random ops in random.scope(seed)")
    for i, gradient in zip(checked, gradients, strict=True):
        check = _InputCheck(i, arrays[i], gradient, base, lambda shifted, i=i: loss(i, shifted), rtol, atol)
        if not np.isfinite(gradient).all():
            check.fail(np.argwhere(~np.isfinite(gradient))[0])
        elif arrays[i].size <= MAX_ELEMENTS:
            check.every_element()
        else:
            check.directions(rng)
    return True


class _InputCheck:
    """The comparison for one input."""

    def __init__(self, index, x, gradient, base, loss, rtol, atol):
        self.index, self.x, self.gradient, self.base, self.loss = index, x, gradient, base, loss
        self.rtol, self.atol = rtol, atol * max(1.0, float(np.abs(gradient).max(initial=0.0)))

    def every_element(self) -> None:
        for element in np.ndindex(self.x.shape):
            if not self.agrees(self.unit(element)):
                self.fail(element)

    def directions(self, rng) -> None:
        for _ in range(DIRECTIONS):
            # Signs, and not normal numbers, so that every element weighs the same.
            direction = rng.choice([-1.0, 1.0], self.x.shape)
            if not self.agrees(direction):
                self.fail(self.find_element(direction))

    def find_element(self, direction) -> tuple[int, ...]:
        """An element whose gradient is wrong, given a direction along which the gradient is."""
        suspects = np.arange(self.x.size)
        while suspects.size > 1:
            half = suspects[: suspects.size // 2]
            part = np.zeros(self.x.size)
            part[half] = direction.reshape(-1)[half]
            suspects = suspects[suspects.size // 2 :] if self.agrees(part.reshape(self.x.shape)) else half
        return np.unravel_index(suspects[0], self.x.shape)

    def unit(self, element):
        direction = np.zeros_like(self.x)
        direction[element] = 1.0
        return direction

    def agrees(self, direction) -> bool:
        """Whether the gradient gives the slope along `direction`. The terms of a long sum may cancel, so the error is
        held against what random signs would leave of them, too."""
        terms, expected = self.gradient * direction, self.slope(direction)
        size = max(abs(expected), float(np.linalg.norm(terms)))
        return abs(float(terms.sum()) - expected) <= self.atol + self.rtol * size

    def slope(self, direction) -> float:
        """The derivative of the loss along `direction`."""
        # Many elements move together: a smaller step for functions of their sum, but not so small that rounding shows.
        h = STEP / max(1.0, float(np.linalg.norm(direction))) ** 0.5
        low2, low, high, high2 = (self.loss(self.x + k * h * direction) for k in (-2, -1, 1, 2))
        self.check_kink(h, low2, low, high, high2, direction)
        near, far = (high - low) / (2 * h), (high2 - low2) / (4 * h)
        return (4 * near - far) / 3

    def check_kink(self, h, low2, low, high, high2, direction) -> None:
        """Where the function is smooth, the jump between the slopes left and right shrinks with the step; at a kink
        it stays."""
        jump = abs(high - 2 * self.base + low) / h
        jump2 = abs(high2 - 2 * self.base + low2) / (2 * h)
        if jump > 1e-3 * max(1.0, abs(high - low) / h) and jump2 < 1.5 * jump:
            where = np.argwhere(direction != 0)
            place = f"element {tuple(int(i) for i in where[0])}" if len(where) == 1 else "a random direction"
            raise KinkError(
                f"gradcheck: input {self.index} has a kink at {place}: the slope is {(self.base - low) / h:.6g} on the"
                f" left and {(high - self.base) / h:.6g} on the right; move the point away from it"
            )

    def fail(self, element) -> None:
        element = tuple(int(i) for i in element)
        expected, got = self.slope(self.unit(element)), float(self.gradient[element])
        raise GradcheckError(
            f"gradcheck: input {self.index} of shape {self.x.shape}, element {element}:"
            f" expected {expected:.12g} by finite differences, got {got:.12g} from the backward pass"
        )


def _analytic(fn, arrays, checked, be, rng):
    """The gradients that backward gives, as host arrays, and the random cotangent they belong to."""
    tensors = [Tensor(be.asarray(a), requires_grad=i in checked) for i, a in enumerate(arrays)]
    before = [be.to_numpy(t.data).copy() for t in tensors]
    out = fn(*tensors)
    if not isinstance(out, Tensor):
        raise TypeError(f"gradcheck: the function must return a Tensor, got {type(out).__name__}")
    if not out.requires_grad:
        raise GradcheckError("gradcheck: the result does not depend on any of the inputs")
    if out.dtype != np.float64:
        raise GradcheckError(f"gradcheck: float64 inputs gave a result of {out.dtype}")
    # Not contiguous, as a gradient may be; writable, so that writing into it is noticed below.
    cotangent = rng.standard_normal((*out.shape, 2))[..., 0]
    sent = be.asarray(np.repeat(cotangent[..., None], 2, axis=-1))[..., 0]
    gradients = grad(out, [tensors[i] for i in checked], sent)
    if not np.array_equal(be.to_numpy(sent), cotangent):
        raise GradcheckError("gradcheck: the backward pass wrote into the gradient it was given")
    for i, (t, a) in enumerate(zip(tensors, before, strict=True)):
        if not np.array_equal(be.to_numpy(t.data), a, equal_nan=a.dtype.kind == "f"):
            raise GradcheckError(f"gradcheck: the function or its backward pass wrote into input {i}")
    return [be.to_numpy(g) for g in gradients], cotangent


def _host_array(x) -> np.ndarray:
    return x.numpy() if isinstance(x, Tensor) else np.asarray(x)
