"""Counter-based random streams: every draw is a function of (seed, stream, step, call, element).

Nothing here has state that would need saving: the same place in the same stream always gives the same bits, on
every backend and for any number of threads. Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", 2011) as NumPy implements it is the definition. The seed and the stream are its key, and the four words
of its counter are (block, call, step, 0), where each block gives four 64-bit numbers.
"""

import threading
from typing import NamedTuple

import numpy as np

from tensorlite.decorators import Decorator

# One stream per purpose: evaluating more often, say, cannot change which batches are trained on.
INIT, BATCHES, DROPOUT, EVALUATION, SAMPLING = range(5)

MAX_SEED = 2**63 - 1


def check_seed(seed: int) -> int:
    """`seed` itself, if Philox can take it."""
    if not isinstance(seed, int | np.integer):
        raise TypeError(f"seed must be an integer from 0 to 2**63 - 1, got {seed!r}")
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed must be from 0 to 2**63 - 1, got {seed}")
    return seed


# Quoted annotations: NumPy loads np.random, a tenth of its own start-up, when it is first named.
def philox(seed: int, stream: int, step: int = 0, call: int = 0, block: int = 0) -> "np.random.Philox":
    """The bit generator that starts at this place."""
    return np.random.Philox(key=_words(seed, stream), counter=_words(block, call, step, 0))


def _words(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


def generator(seed: int, stream: int, step: int = 0, call: int = 0) -> "np.random.Generator":
    """A NumPy generator at this place, for draws on the host: initial weights, batches, sampled tokens."""
    return np.random.Generator(philox(seed, stream, step, call))


class Place(NamedTuple):
    """Where in a stream an array of random bits starts; `element` counts 16-bit numbers.

    On a GPU the step may be an array (1,) of uint64 there, so that a recorded graph draws anew each time.
    """

    seed: int
    stream: int
    step: int
    call: int
    element: int


def bits16(place: Place, count: int) -> np.ndarray:
    """`count` uniform 16-bit integers (uint16), the elements [place.element, place.element + count)."""
    block, skip = divmod(place.element, 16)  # a block of Philox is 4 words of 64 bits: 16 elements
    raw = philox(place.seed, place.stream, place.step, place.call, block).random_raw(-(-(skip + count) // 4))
    return raw.astype("<u8", copy=False).view("<u2")[skip : skip + count]


class scope(Decorator):  # noqa: N801 - used as `with random.scope(...)`
    """Within `with random.scope(seed, step=..., first_row=...):` the random ops draw from the dropout stream of
    that seed and step, each call in order from its own sub-stream.

    first_row: where the rows (axis 0) of the arrays at hand lie in the whole batch. A batch cut into micro-batches
    therefore sees the masks it would have seen whole.

    seed: None for a scope in which nothing is drawn. Layers that are made in it have zeros for initial values, which
    take no memory and cannot be written to: other arrays are to take their place.

    As a decorator, of functions of any kind, it gives each call a scope that begins anew.
    """

    def __init__(self, seed: int | None, step: int = 0, first_row: int = 0):
        self.seed, self.step, self.first_row = seed if seed is None else check_seed(seed), step, first_row
        self.calls = 0

    def fresh(self) -> "scope":
        return scope(self.seed, self.step, self.first_row)

    def __enter__(self) -> "scope":
        self.calls = 0
        _current.outer = _current.scope, _current.outer
        _current.scope = self
        return self

    def __exit__(self, *exc) -> None:
        _current.scope, _current.outer = _current.outer

    def next_place(self, row_size: int) -> Place:
        """Where the next random op draws for an array of `row_size` elements per row."""
        self.calls += 1
        return Place(self.seed, DROPOUT, self.step, self.calls - 1, self.first_row * row_size)


class _Current(threading.local):
    def __init__(self):
        self.scope = scope(seed=0)
        self.outer = None  # the scope around it, and what `outer` was there


_current = scope.local = _Current()


def current() -> scope:
    """The innermost scope of this thread."""
    return _current.scope


def next_generator() -> "np.random.Generator":
    """A generator for values drawn once, such as initial weights, at the next place of the current scope."""
    place = current().next_place(0)
    return generator(place.seed, INIT, place.step, place.call)


def manual_seed(seed: int) -> None:
    """Start this thread's current scope anew: the default one, outside any `with scope(...)`."""
    _current.scope = scope(seed)
