"""A stand-in for the `cupy` module over NumPy, for machines without a GPU. It refuses what CuPy refuses, and more.

    mixing        a NumPy array among device arrays, as an operand, an argument or an index
    conversion    a device array where NumPy expects an array; NumPy's functions on device arrays
    names         whatever the module or its arrays lack in CuPy (cupy_names.json holds what dir() says there)
    host reads    in `with no_host_reads():` everything that waits for the device to bring a value back
    duplicates    the same index twice in an assignment, whose result CuPy leaves undefined
    fresh memory  `empty` is full of NaN, or of the largest numbers, as CuPy's pool hands out memory used before

Scalar results are 0-d arrays, as CuPy's. `launches` lists what was called on arrays of which shapes and dtypes: two
steps that list the same can be captured as one graph. What the stand-in cannot show: speed, and races between kernels.
"""

import contextlib
import json
import math
import types
from pathlib import Path

import numpy as np

NAMES = json.loads(Path(__file__).with_name("cupy_names.json").read_text())
READING = {"nonzero", "argwhere", "flatnonzero", "unique", "allclose", "array_equal", "array2string", "array_repr"}


class HostReadError(AssertionError):
    """Something waited for the device where nothing may."""


launches: list[tuple] = []
_forbidden = 0


@contextlib.contextmanager
def no_host_reads():
    """Within it a value that is brought back from the device is an error."""
    global _forbidden
    _forbidden += 1
    try:
        yield
    finally:
        _forbidden -= 1


def _read(what: str) -> None:
    if _forbidden:
        raise HostReadError(f"{what} brings a value back from the device: the step could not be captured as a graph")


def _unwrap(x):
    """The NumPy arrays inside device arrays, in arguments and indices of any structure."""
    if type(x) is ndarray:
        return x.inner
    if isinstance(x, np.ndarray):
        raise TypeError(f"a NumPy array of shape {x.shape} among device arrays: CuPy refuses {type(x)}")
    if isinstance(x, slice):
        return slice(*map(_unwrap, (x.start, x.stop, x.step)))
    if isinstance(x, (list, tuple)):
        return type(x)(map(_unwrap, x))
    return {key: _unwrap(value) for key, value in x.items()} if isinstance(x, dict) else x


def _wrap(result):
    if isinstance(result, (np.ndarray, np.generic)):
        return ndarray(np.asarray(result))
    return type(result)(map(_wrap, result)) if isinstance(result, (list, tuple)) else result


def _arrays(index) -> list[np.ndarray]:
    return [i for i in (index if isinstance(index, tuple) else (index,)) if isinstance(i, np.ndarray)]


class ndarray:  # noqa: N801 - CuPy's name
    """An array on the device."""

    __slots__ = ("inner",)
    __hash__ = None

    def __init__(self, inner: np.ndarray):
        self.inner = inner

    def _refuse(self, *_, **__):
        raise TypeError("a device array where NumPy is to compute: use the backend's module, or to_numpy")

    __array__ = __array_ufunc__ = __array_function__ = _refuse

    def get(self):
        _read(".get()")
        return self.inner.copy()

    def __len__(self):
        return len(self.inner)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __repr__(self):
        return f"device {self.inner!r}"

    def __getitem__(self, index):
        index = _unwrap(index)
        if any(array.dtype == bool for array in _arrays(index)):
            _read("indexing with a mask")  # the result's length is not known to the host
        return ndarray(np.asarray(self.inner[index]))

    def __setitem__(self, index, value):
        index = _unwrap(index)
        arrays = _arrays(index)
        if arrays and all(i.dtype.kind in "iu" for i in arrays):
            places = np.stack([np.ravel(i) for i in np.broadcast_arrays(*arrays)])
            if len(np.unique(places, axis=1).T) != places.shape[1]:
                raise ValueError("the same index twice in an assignment: CuPy leaves the result undefined")
        self.inner[index] = _unwrap(value)

    def __getattr__(self, name):
        if name not in NAMES["ndarray"]:
            raise AttributeError(f"cupy.ndarray has no attribute {name!r}")
        found = getattr(self.inner, name)
        return _function(found, f".{name}()") if callable(found) else _wrap(found)


def _launch(function, name: str, *args, **kwargs):
    args, kwargs = _unwrap(args), _unwrap(kwargs)
    arrays = [x for x in (*args, *kwargs.values()) if isinstance(x, np.ndarray)]
    launches.append((name, *((a.shape, a.dtype.str) for a in arrays)))
    return _wrap(function(*args, **kwargs))


def _function(function, name: str):
    def call(*args, **kwargs):
        if name.strip(".()") in READING:
            _read(name)
        return _launch(function, name, *args, **kwargs)

    return call


def _reading(name: str):
    def read(self, *args):
        _read(f"{name}()")
        return getattr(self.inner, name)(*args)

    return read


def _operator(name: str):
    function = getattr(np.ndarray, name)

    def in_place(self, other):
        _launch(function, name, self, other)
        return self

    def operate(self, *others):
        return _launch(function, name, self, *others)

    return in_place if name.startswith("__i") and name != "__invert__" else operate


READINGS = ("item", "tolist", "__float__", "__int__", "__bool__", "__index__")
BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift")
OTHERS = ("lt", "le", "gt", "ge", "eq", "ne", "neg", "pos", "abs", "invert")
for _name in READINGS:
    setattr(ndarray, _name, _reading(_name))
for _name in [f"__{kind}{name}__" for name in BINARY for kind in ("", "r", "i")] + [f"__{name}__" for name in OTHERS]:
    setattr(ndarray, _name, _operator(_name))


class _Module(types.ModuleType):
    """NumPy's module of the same name, with CuPy's names alone."""

    def __init__(self, name: str, numpy_module, names: list[str]):
        super().__init__(name)
        self._numpy, self._names = numpy_module, set(names)

    def __getattr__(self, name):
        if name.startswith("__") or name not in self._names:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        found = getattr(self._numpy, name)
        if isinstance(found, (type, np.dtype)) or not callable(found):
            return found
        call = _function(found, name)
        if isinstance(found, np.ufunc):
            for method in ("at", "reduce", "outer", "accumulate"):
                setattr(call, method, _function(getattr(found, method), f"{name}.{method}"))
        return call


def _asarray(data, dtype=None, **_):
    """From the host, explicitly."""
    return ndarray(np.array(data.inner if type(data) is ndarray else data, dtype))


def _empty(shape, dtype=float, **_):
    array = np.empty(shape, dtype)
    array[...] = np.nan if array.dtype.kind == "f" else np.iinfo(array.dtype).max if array.dtype.kind in "iu" else True
    return ndarray(array)


class CUDARuntimeError(RuntimeError):
    """As cupy.cuda.runtime's."""


cupy = _Module("cupy", np, NAMES["cupy"])
cupy.__version__ = "stand-in"
cupy.ndarray = ndarray
cupy.linalg = _Module("cupy.linalg", np.linalg, NAMES["linalg"])
cupy.asarray = cupy.array = _asarray
cupy.asnumpy = lambda x: x.get()
cupy.empty = _empty
cupy.empty_like = lambda x, dtype=None, **_: _empty(x.shape, dtype or x.dtype)
cupy.cuda = types.SimpleNamespace(
    runtime=types.SimpleNamespace(getDeviceCount=lambda: 1, CUDARuntimeError=CUDARuntimeError)
)


def _erf(x):
    return ndarray(np.asarray(np.frompyfunc(math.erf, 1, 1)(x.inner)).astype(x.dtype))


special = types.ModuleType("cupyx.scipy.special")
special.erf = _erf
MODULES = {
    "cupy": cupy,
    "cupyx": types.ModuleType("cupyx"),
    "cupyx.scipy": types.ModuleType("cupyx.scipy"),
    "cupyx.scipy.special": special,
}
MODULES["cupyx"].scipy, MODULES["cupyx.scipy"].special = MODULES["cupyx.scipy"], special
