"""Large inputs: the gradient along random directions, and bisection that names the element.

For a direction d the backward pass says g . d and differences say s. A wrong gradient g + e shows as e . d, if that is
more than tau, what the errors of both may be: TRUST times the estimated error of the quotient, and SCREEN |g * d|. The
weights are uniform between -sqrt(3) and sqrt(3). A sum of independent numbers has nowhere a higher density than any of
them alone, so that of e . d is at most 1 / (2 sqrt(3) max|e|), and the chance that it is within tau is at most

    tau / (sqrt(3) max|e|)

in each direction, whatever else of e there is to cancel it. For two exchanged elements max|e| is the difference of
their gradients: with DENSE = 4 directions one of 100 tau is missed with a chance of 1.2e-9. (With signs for weights
every second pair would cancel.) Where the quotient is good to SCREEN tau is some 2e-10 |g|, so that of a million
elements two are found whose gradients differ by 2e-5 of the root mean square, and of three thousand by 1e-6 of it.

SPARSE directions move a few elements alone: functions that saturate, or meet a kink, when all inputs move together have
a derivative there still.
"""

import numpy as np

from tensorlite.gradcheck.quotient import EPS, GOOD, TRUST, Search, derivative, power_of_two
from tensorlite.gradcheck.report import Element

DENSE, SPARSE = 4, 2
SCREEN = 1e-10
FEW = 8  # elements that bisection ends with


def check_directions(compared, rng) -> None:
    """Compare along random directions. Where one disagrees, the elements that bisection leads to are compared."""
    for direction in directions(compared.x.size, rng):
        element, suspicious = _along(compared, direction)
        if suspicious:
            compared.elements(_bisect(compared, direction, element.got - element.expected))
            element = element._replace(undecided=element.undecided or element.ratio > 1)  # and no element is to blame
        compared.report.add(element)


def directions(size: int, rng):
    """Flat float64 arrays of weights: DENSE without zeros, and SPARSE where all but about the root of `size` are."""
    for _ in range(DENSE):
        yield rng.uniform(-(3**0.5), 3**0.5, size)
    for _ in range(SPARSE):
        some = np.zeros(size)
        where = rng.integers(size, size=int(size**0.5))
        some[where] = rng.uniform(-(3**0.5), 3**0.5, where.size)
        yield some


def _along(compared, direction: np.ndarray) -> tuple[Element, bool]:
    """The comparison in a direction, and whether it disagrees by more than the errors of both may be."""
    got, terms, screen = _from_backward(compared, direction)
    search = _search(compared, direction, lambda q: TRUST * q.error <= screen)
    compared.smooth(search, "a random direction")
    if not search.quotients:
        error = np.inf if search.hidden is None else search.hidden / TRUST
        return Element(compared.name, None, 0.0, error, got, 0.0, undecided=search.hidden is None), False
    q = search.quotients[0]
    apart, limits = abs(got - q.value), compared.limits
    margin = limits.relative * terms + limits.absolute * float(np.linalg.norm(direction)) + TRUST * q.error
    ratio = apart / margin if margin else 0.0 if apart == 0 else np.inf
    undecided = TRUST * q.error > max(margin - TRUST * q.error, GOOD * terms)
    return Element(compared.name, None, q.value, q.error, got, ratio, undecided), apart > screen + TRUST * q.error


def _bisect(compared, direction: np.ndarray, apart: float):
    """The indices of the FEW elements at the end of the way along which the disagreement, `apart`, stays largest."""
    suspects = np.flatnonzero(direction)
    while suspects.size > FEW:
        left, right = np.array_split(suspects, 2)
        here = _disagreement(compared, direction, left, abs(apart))
        suspects, apart = (left, here) if abs(here) >= abs(apart - here) else (right, apart - here)
    return [np.unravel_index(k, compared.x.shape) for k in suspects]


def _disagreement(compared, direction: np.ndarray, part: np.ndarray, whole: float) -> float:
    """What these elements contribute to a disagreement of that size, clearly enough to say whether it is most of it."""
    partial = np.zeros_like(direction)
    partial[part] = direction[part]
    got, _, screen = _from_backward(compared, partial)
    search = _search(compared, partial, lambda q: TRUST * q.error <= max(screen, abs(got - q.value) / 4, whole / 4))
    return got - search.quotients[0].value if search.quotients else 0.0


def _from_backward(compared, direction: np.ndarray) -> tuple[float, float, float]:
    """g . d, |g * d| and the size of a disagreement that is looked into."""
    terms = compared.gradient.reshape(-1) * direction
    size = float(np.linalg.norm(terms))
    return float(terms.sum()), size, compared.limits.screen * size


def _search(compared, direction: np.ndarray, enough) -> Search:
    x, shaped = compared.x, direction.reshape(compared.x.shape)

    def at(t: float) -> np.ndarray:
        moved = t * shaped
        moved += x
        return compared.problem.at(compared.i, moved)

    line = compared.line._replace(
        at=at,
        noise=EPS * float(np.linalg.norm(compared.gradient * x)),  # x + t d is rounded, too
    )
    scale = max(1.0, float(np.linalg.norm(x)) / x.size**0.5)
    start = compared.limits.step / 2 if compared.limits.step else power_of_two(scale) / 32  # times a weight
    return derivative(line, start, enough)
