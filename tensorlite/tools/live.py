"""Arrays that are alive: who made them, what they come to, and who held how much when that was most."""

import weakref
from collections.abc import Collection
from dataclasses import dataclass
from time import perf_counter
from types import FunctionType
from typing import NamedTuple

from tensorlite.tensor import Tensor


class Maker(NamedTuple):
    """What an array came from."""

    op: str
    path: str  # of the module
    backward: bool


@dataclass(slots=True)
class Cost:
    """What watching costs: the seconds that it measured of itself, and the calls of a profiler that it only counted."""

    measured: float = 0.0
    events: int = 0
    event_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        return self.measured + self.events * self.event_seconds


class _Alive(weakref.ref):
    """A weak reference that knows what it stands for, when that is gone."""

    __slots__ = ("key", "maker", "nbytes")


class LiveArrays:
    """The memory of arrays that were added, while it is in use.

    kind: the arrays' class. An array that is a view stands for the whole array that it is a view of, and one that is
    added twice counts once, for its first maker.
    """

    def __init__(self, kind: type, cost: Cost):
        self._kind, self._cost = kind, cost
        self._alive: dict[int, _Alive] = {}
        self._held: dict[Maker, tuple[int, int]] = {}  # how many arrays, and their bytes
        self._held_at_peak: dict[Maker, tuple[int, int]] = {}
        self.now = self.peak = 0
        self.peak_after: Maker | None = None

    @property
    def held_at_peak(self) -> dict[Maker, tuple[int, int]]:
        """Of each maker how many arrays, and their bytes."""
        return {maker: figures for maker, figures in self._held_at_peak.items() if figures[0]}

    def owners(self, *values) -> dict:
        """The arrays in these values that own their memory, or what others are views of, by their ids."""
        found = {}
        for array in arrays_in(values, self._kind):
            while isinstance(array.base, self._kind):
                array = array.base
            found[id(array)] = array
        return found

    def add(self, maker: Maker, values, outside: Collection[int] = ()) -> int:
        """The bytes that are new in `values`; the arrays whose ids are in `outside` are not the maker's."""
        made = count = 0
        for key, array in self.owners(values).items():
            if key not in self._alive and key not in outside:
                reference = self._alive[key] = _Alive(array, self._gone)
                reference.key, reference.maker, reference.nbytes = key, maker, array.nbytes
                made, count = made + array.nbytes, count + 1
        if count:
            arrays, nbytes = self._held.get(maker, (0, 0))
            self._held[maker] = arrays + count, nbytes + made
            self.now += made
            if self.now > self.peak:
                self.peak, self.peak_after = self.now, maker
                self._held_at_peak = dict(self._held)
        return made

    def close(self) -> None:
        """Forget them, so that nothing is done any more when they go."""
        self._alive.clear()

    def _gone(self, reference: _Alive) -> None:
        came, held = perf_counter(), self._held
        del self._alive[reference.key]
        arrays, nbytes = held[reference.maker]
        held[reference.maker] = arrays - 1, nbytes - reference.nbytes
        self.now -= reference.nbytes
        self._cost.measured += perf_counter() - came


def arrays_in(value, kind: type) -> list:
    """The arrays that a value is or contains: in containers, in Tensors, and in what functions close over."""
    ahead, seen, found = [value], set(), []
    while ahead:
        value = ahead.pop()
        if isinstance(value, kind):
            found.append(value)
        elif isinstance(value, Tensor):
            ahead.append(value.data)
        elif isinstance(value, (list, tuple, dict, FunctionType)) and id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, FunctionType):
                ahead += [cell.cell_contents for cell in value.__closure__ or () if _is_set(cell)]
            else:
                ahead += value.values() if isinstance(value, dict) else value
    return found


def _is_set(cell) -> bool:
    """Not so where a function closes over a variable that is given a value later."""
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
