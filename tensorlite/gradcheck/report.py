"""What a gradient check has found, and the errors and the warning that say so."""

from typing import NamedTuple


class GradcheckError(AssertionError):
    """A gradient is wrong; the message names the input, the element, what was expected and what came.

    `report`: the Report it comes from, or None.
    """

    report: "Report | None" = None


class KinkError(GradcheckError):
    """The function has a kink at the point of the check, where it has no derivative: move the point."""


class UndecidedWarning(UserWarning):
    """Some gradients are neither right nor wrong as far as differences can tell; the message names one and says why."""


class Element(NamedTuple):
    """One comparison: a gradient that the backward pass gave beside the difference quotient.

    index: where in the input, or None for a random direction in it.
    error: the estimated error of `expected`.
    ratio: |got - expected| in units of what is allowed: above 1 it is wrong.
    undecided: the quotient is not good enough to tell.
    """

    name: str
    index: tuple[int, ...] | None
    expected: float
    error: float
    got: float
    ratio: float
    undecided: bool = False

    @property
    def wrong(self) -> bool:
        return not (self.ratio <= 1 or self.undecided)  # NaN is wrong, too

    @property
    def relative_error(self) -> float:
        return self.error / abs(self.expected) if self.expected else float("inf")

    @property
    def place(self) -> str:
        return f"{self.name}, {'a random direction' if self.index is None else f'element {self.index}'}"

    def __str__(self) -> str:
        return (
            f"{self.place}: expected {self.expected:.12g} by finite differences,"
            f" got {self.got:.12g} from the backward pass"
        )


class Report:
    """The result of a check.

    worst: the comparisons with the largest ratios, at most MAX_WORST, the largest first.
    compared, undecided: how many elements and directions were compared, and of how many nothing can be said.
    doubtful: the undecided one with the largest error, or None.
    error: what `gradcheck` raises, or None.
    """

    MAX_WORST = 10

    def __init__(self):
        self.worst: list[Element] = []
        self.compared = self.undecided = 0
        self.doubtful: Element | None = None
        self.error: GradcheckError | None = None

    @property
    def ratio(self) -> float:
        """The largest disagreement in units of what is allowed; 0 if nothing was compared."""
        return self.worst[0].ratio if self.worst else 0.0

    def add(self, element: Element) -> None:
        self.compared += 1
        if element.undecided:
            self.undecided += 1
            self.doubtful = max(self.doubtful or element, element, key=lambda e: e.relative_error)
        self.worst.append(element)
        self.worst.sort(key=lambda e: -e.ratio)  # a list that is sorted but for one is quick to sort
        del self.worst[self.MAX_WORST :]

    def doubt(self) -> str:
        """The warning that some are undecided."""
        e = self.doubtful
        return (
            f"gradcheck: {self.undecided} of {self.compared} gradients are not checkable here; {e.place}: the quotient"
            f" is {f'only good to {e.relative_error:.0e}' if e.relative_error < 1 else 'noise'}, got {e.got:.6g}; move"
            " the point to where rounding does not hide the slope"
        )
