"""The array libraries an op can run on. The arrays decide: there is no current backend.

`backend_of(x)` is the backend that x's type belongs to; `get_backend(name)` the one of that name, loaded on demand.
"""

import numpy as np

from tensorlite.backends.base import Backend, BackendError
from tensorlite.backends.numpy_backend import NumpyBackend
from tensorlite.dtypes import FLOAT32, FLOAT64, KINDS, known
from tensorlite.words import explained

__all__ = [
    "BACKENDS",
    "Backend",
    "BackendError",
    "as_array",
    "backend_of",
    "explain_failure",
    "explain_memory_error",
    "get_backend",
    "register_backend",
]

BACKENDS = ("numpy", "cupy")

_by_name: dict[str, Backend] = {}
_by_type: dict[type, Backend] = {}


def register_backend(backend: Backend) -> Backend:
    """Make arrays of `backend.xp.ndarray` known to every op."""
    _by_name[backend.name] = backend
    _by_type[backend.xp.ndarray] = backend
    return backend


register_backend(NumpyBackend())


@explained
def get_backend(name: str) -> Backend:
    """The backend of this name. BackendError says what is missing if it cannot run on this machine."""
    if name not in _by_name:
        if name != "cupy":
            raise ValueError(f"unknown backend {name!r}; the backends are {', '.join(BACKENDS)}")
        from tensorlite.backends.cupy_backend import load  # the only import of cupy, and only when asked for

        register_backend(load())
    return _by_name[name]


def explain_failure(error: BaseException | None) -> str | None:
    """What failed, where, and what to do, for an error of a device's or its libraries'; None for any other."""
    return next(filter(None, (backend.explain_failure(error) for backend in _by_name.values())), None)


def explain_memory_error(error: MemoryError) -> str:
    """What was asked for and, where that is known, what there is."""
    known = (backend.explain_memory_error(error) for backend in _by_name.values())
    return next(filter(None, known), str(error) or "there is no more")


def backend_of(*arrays) -> Backend:
    """The one backend all `arrays` belong to; Python numbers and None belong to any."""
    found = None
    for array in arrays:
        backend = _by_type.get(type(array))
        if backend is None:
            if array is None or isinstance(array, int | float | bool | np.generic):
                continue
            raise TypeError(f"expected an array of a known backend, got {type(array).__name__}")
        if found is not None and backend is not found:
            raise TypeError(
                f"the inputs are on different devices ({found.name} and {backend.name}); "
                "move one with get_backend(name).asarray(x)"
            )
        found = backend
    return found if found is not None else _by_name["numpy"]


def as_array(data, dtype=None):
    """`data` as an array of a known backend, which it stays if it is one. Python's floats become float32, the dtype
    everything here computes in; NumPy's keep theirs, also in lists. TypeError for dtypes that no op computes in."""
    if type(data) not in _by_type:
        if isinstance(data, np.ndarray) and hasattr(data, "mask"):
            raise TypeError("expected numbers, got a masked array, whose mask would be lost: fill it first")
        array = np.asarray(data)
        if dtype is None and array.dtype == FLOAT64 and not _holds_numpy(data):
            dtype = FLOAT32
        data = array
    if dtype is None and data.dtype in KINDS:
        return data
    if data.dtype.kind not in "biuf":
        KINDS[data.dtype]  # noqa: B018 - it refuses what would lose more than digits
    dtype = known(data.dtype if dtype is None else dtype)
    return data if data.dtype == dtype else data.astype(dtype)


def _holds_numpy(data) -> bool:
    """Whether there are NumPy's numbers or arrays in it, and not only Python's."""
    return any(map(_holds_numpy, data)) if isinstance(data, list | tuple) else hasattr(data, "dtype")
