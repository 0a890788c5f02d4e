"""A stand-in for the `cupy` module over NumPy, for machines without a GPU. It refuses what CuPy refuses, and more:

    mixing        a NumPy array among device arrays, as an operand, an argument or an index
    conversion    a device array where NumPy expects an array; NumPy's functions on device arrays
    names         whatever the module or its arrays lack in CuPy (cupy_names.json holds what dir() says there)
    host reads    in `with no_host_reads():` everything that waits for the device to bring a value back
    duplicates    the same index twice in an assignment, whose result CuPy leaves undefined
    fresh memory  `empty` is full of NaN, or of the largest numbers, as CuPy's pool hands out memory used before
    capturing     what strict_cuda.py says, CuPy's own products among it

Scalar results are 0-d arrays, as CuPy's. What the stand-in cannot show: speed, races between blocks, and memory that a
pool hands out again.
"""

import json
import math
import types
from pathlib import Path

import ml_dtypes  # noqa: F401 - NumPy then knows bfloat16
import numpy as np
import strict_cublas
import strict_cuda
from strict_cuda import CUDARuntimeError, MisuseError, OutOfMemoryError, launch, read, write

NAMES = json.loads(Path(__file__).with_name("cupy_names.json").read_text())
READING = {"nonzero", "argwhere", "flatnonzero", "unique", "allclose", "array_equal", "array2string", "array_repr"}
CUDA = (
    "Event", "Memory", "MemoryPointer", "MemoryPool", "Stream", "alloc_pinned_memory", "get_current_stream",
    "get_elapsed_time", "using_allocator",
)  # fmt: skip
CUBLAS = {"matmul", "dot", "inner", "tensordot", "einsum", "vdot", "kron", "outer", ".dot()", "__matmul__"}


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


def _arrays(x) -> list[np.ndarray]:
    """The NumPy arrays in arguments or an index of any structure."""
    if isinstance(x, np.ndarray):
        return [x]
    if isinstance(x, dict):
        x = tuple(x.values())
    return [a for item in x for a in _arrays(item)] if isinstance(x, (list, tuple)) else []


def _device_arrays(x) -> list:
    """The device arrays in arguments of any structure."""
    if type(x) is ndarray:
        return [x]
    if isinstance(x, dict):
        x = tuple(x.values())
    return [a for item in x for a in _device_arrays(item)] if isinstance(x, (list, tuple)) else []


@np.errstate(all="ignore")  # a GPU warns of nothing
def _do(name: str, function, *args, **kwargs):
    """Call a function of NumPy's on device arrays, as a launch if it computes anything."""
    if name in READING:
        read(name)
    if name in CUBLAS and strict_cuda.is_capturing():
        raise MisuseError(f"{name}: CuPy refuses to call cuBLAS while capturing")
    out, devices = kwargs.get("out"), _device_arrays((args, kwargs))
    args, kwargs = _unwrap(args), _unwrap(kwargs)
    given = _arrays((args, kwargs))
    if out is not None or function in IN_PLACE:
        ways = "" if out is not None or name == ".fill()" else "b" + "r" * (len(given) - 1)
        launch(name, lambda: function(*args, **kwargs), given, ways=ways)
        return out
    result = function(*args, **kwargs)
    if isinstance(result, (list, tuple)):
        return type(result)(
            _place(name, lambda i=i: function(*args, **kwargs)[i], r, given, devices) for i, r in enumerate(result)
        )
    return _place(name, lambda: function(*args, **kwargs), result, given, devices)


def _place(name: str, function, result, given, devices):
    """A result as a device array: in memory of its own, unless it is a view of what was given."""
    if not isinstance(result, (np.ndarray, np.generic)):
        return result
    result = np.asarray(result)
    for x in devices:
        if np.may_share_memory(result, x.inner):
            return ndarray(result, x)
    out = strict_cuda.allocate(result.shape, result.dtype)
    if result.flags.f_contiguous and not result.flags.c_contiguous:
        out = out.reshape(result.shape[::-1]).T

    def compute():
        out[...] = function()

    out[...] = result
    launch(name, compute, [*given, out], done=True)
    return ndarray(out)


class ndarray:  # noqa: N801 - CuPy's name
    """An array on the device."""

    __slots__ = ("base", "inner", "__weakref__")

    def __init__(self, inner: np.ndarray, base: "ndarray | None" = None):
        self.inner = inner
        self.base = base if base is None or base.base is None else base.base  # the array of which it is a view
        if strict_cuda.is_capturing():
            strict_cuda.made_while_capturing.add(self)

    @property
    def data(self):
        return types.SimpleNamespace(ptr=self.inner.ctypes.data)

    def set(self, values, stream=None):
        write(".set()", self.inner)
        if type(values) is not np.ndarray or values.dtype != self.dtype or values.shape != self.shape:
            raise TypeError(f"set: expected a NumPy array {self.dtype} {self.shape}")
        if not self.inner.flags.c_contiguous or not values.flags.c_contiguous:
            raise TypeError("set: both must be contiguous")
        strict_cuda.start_copy(values)
        self.inner[...] = values

    def _refuse(self, *_, **__):
        raise TypeError("a device array where NumPy is to compute: use the backend's module, or to_numpy")

    __array__ = __array_ufunc__ = __array_function__ = _refuse

    def get(self):
        read(".get()", self.inner)
        return self.inner.copy()

    def __copy__(self):
        return self.copy()

    def __deepcopy__(self, memo):
        return self.copy()

    def __reduce__(self):
        return _array, (self.get(),)

    def __len__(self):
        return len(self.inner)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __repr__(self):
        return f"device {self.inner!r}"

    def __getitem__(self, index):
        index = _unwrap(index)
        if any(array.dtype == bool for array in _arrays(index)):
            read("indexing with a mask")  # the result's length is not known to the host
        return _do("[]", lambda x: x[index], self)

    def __setitem__(self, index, value):
        index = _unwrap(index)
        arrays = _arrays(index)
        if arrays and all(i.dtype.kind in "iu" for i in arrays):
            places = np.stack([np.ravel(i) for i in np.broadcast_arrays(*arrays)])
            if len(np.unique(places, axis=1).T) != places.shape[1]:
                raise ValueError("the same index twice in an assignment: CuPy leaves the result undefined")
        inner, values = self.inner, _arrays(value := _unwrap(value))
        where = (slice(None), *index) if isinstance(index, tuple) else (slice(None), index)
        target = inner if arrays else inner[None][where]  # a view, also of a single element
        ways = "w" + "r" * len(values)
        launch("[]=", lambda: inner.__setitem__(index, value), [target, *values], ways=ways)

    def __getattr__(self, name):
        if name not in NAMES["ndarray"]:
            raise AttributeError(f"cupy.ndarray has no attribute {name!r}")
        found = getattr(self.inner, name)
        if callable(found):
            method = getattr(np.ndarray, name)
            return lambda *args, **kwargs: _do(f".{name}()", method, self, *args, **kwargs)
        return ndarray(found, self) if isinstance(found, np.ndarray) else found


def _reading(name: str):
    def brought_back(self, *args):
        read(f"{name}()", self.inner)
        return getattr(self.inner, name)(*args)

    return brought_back


def _operator(name: str):
    function = getattr(np.ndarray, name)

    def in_place(self, other):
        inner, other = self.inner, _unwrap(other)
        others = _arrays(other)
        launch(name, lambda: function(inner, other), [inner, *others], ways="b" + "r" * len(others))
        return self

    def operate(self, *others):
        return _do(name, function, self, *others)

    return in_place if name.startswith("__i") and name != "__invert__" else operate


IN_PLACE = (np.ndarray.fill, np.ndarray.sort, np.ndarray.partition, np.add.at, np.copyto, np.put, np.fill_diagonal)
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

        def call(*args, **kwargs):
            return _do(name, found, *args, **kwargs)

        if isinstance(found, np.ufunc):
            for method in ("at", "reduce", "outer", "accumulate"):
                bound = getattr(found, method)
                setattr(
                    call,
                    method,
                    lambda *args, bound=bound, **kwargs: _do(f"{name}.{bound.__name__}", bound, *args, **kwargs),
                )
        return call


def _asarray(data, dtype=None, **_):
    """From the host, explicitly; or from the device, where an array of that dtype is itself."""
    if type(data) is ndarray:
        return data if dtype is None or data.dtype == dtype else data.astype(dtype)
    write("asarray")
    values = np.asarray(data, dtype)
    array = strict_cuda.allocate(values.shape, values.dtype)
    array[...] = values
    return ndarray(array)


def _array(data, dtype=None, **_):
    return _asarray(data, dtype).copy() if type(data) is ndarray else _asarray(data, dtype)


def _empty(shape, dtype=float, **_):
    array = strict_cuda.allocate(shape, dtype)
    if array.dtype.kind in "iu" and not strict_cuda.is_recording():  # 0xFF would be -1, which indexes
        array[...] = np.iinfo(array.dtype).max
    return ndarray(array)


class NVRTCError(RuntimeError):
    """As cupy.cuda.nvrtc's."""


class CompileException(Exception):  # noqa: N818 - CuPy's name
    """As cupy.cuda.compiler's, of NVRTC's words."""


NVRTCError.__module__ = "cupy_backends.cuda.libs.nvrtc"
CompileException.__module__ = "cupy.cuda.compiler"


runtime = types.SimpleNamespace(
    getDeviceCount=lambda: 1,
    getDevice=lambda: 0,
    getDeviceProperties=lambda device: strict_cuda.properties,
    driverGetVersion=lambda: 13010,
    memGetInfo=lambda: (1 << 30, 1 << 34),
    CUDARuntimeError=CUDARuntimeError,
)
cupy = _Module("cupy", np, NAMES["cupy"])
cupy.__version__ = "stand-in"
cupy.ndarray = ndarray
cupy.linalg = _Module("cupy.linalg", np.linalg, NAMES["linalg"])
cupy.asarray, cupy.array = _asarray, _array
cupy.asnumpy = lambda x: x.get()
cupy.empty = _empty
cupy.empty_like = lambda x, dtype=None, **_: _empty(x.shape, dtype or x.dtype)
cupy.RawModule = strict_cuda.RawModule
cupy.get_default_memory_pool = lambda: strict_cuda.common_pool
cupy.cuda = types.SimpleNamespace(
    runtime=runtime,
    memory=types.SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
    **{name: getattr(strict_cuda, name) for name in CUDA},
)


def _erf(x):
    return _do("erf", lambda a: np.asarray(np.frompyfunc(math.erf, 1, 1)(a)).astype(a.dtype), x)


special = types.ModuleType("cupyx.scipy.special")
special.erf = _erf
MODULES = {
    "cupy": cupy,
    "cupyx": types.ModuleType("cupyx"),
    "cupyx.scipy": types.ModuleType("cupyx.scipy"),
    "cupyx.scipy.special": special,
    "nvmath": types.ModuleType("nvmath"),
    "nvmath.bindings": types.ModuleType("nvmath.bindings"),
    "nvmath.bindings.cublas": strict_cublas.MODULE,
}
MODULES["nvmath"].bindings, MODULES["nvmath.bindings"].cublas = MODULES["nvmath.bindings"], strict_cublas.MODULE
MODULES["cupyx"].scipy, MODULES["cupyx.scipy"].special = MODULES["cupyx.scipy"], special
