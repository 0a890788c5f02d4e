"""The device behind the stand-in for CuPy: memory, streams, captured graphs and kernels, on the CPU.

    pools      hold what was freed, and take it from one device, on which `device.free` bytes are left
    memory     every allocation has guard bytes round it, which a kernel that writes beside its arrays destroys
    launches   everything that would run on the device goes through `launch`, which `logged` lists: its name, and the
               shape, dtype and allocation of each array. Two steps with one log can be captured once and replayed.
    counting   `recorded` lists them with what each reads and writes, and runs no kernel and no product: a step at a
               shape that is too large to be computed here
    streams    an array that was last used on another stream, for whose work this one has not waited, is an error
    copies     from the host read pinned memory, which nobody may write to or give back before they are known to be over
    graphs     what is launched between begin_capture and end_capture is done, so that the code can go on, then undone,
               and done again at each launch of the graph, on the same memory
    kernels    are compiled by g++ and run on the CPU (cuda_on_cpu.py)

While capturing, whatever CUDA or our own rules forbid is an error: reading a value back, bringing one from the host,
memory from the common pool, a launch on another stream, compiling, and arrays of the capture that live on.
"""

import bisect
import collections
import contextlib
import ctypes
import itertools
import math
import time
import types
import weakref
from typing import NamedTuple

import cuda_on_cpu
import numpy as np

GUARD = 64  # bytes before and after each allocation
PATTERN = 0xA5
STRIDED = {  # kernels that are told strides
    "flash_attention", "flash_attention_delta", "flash_attention_vjp", "cross_entropy", "cross_entropy_vjp",
    "fill_rows",
}  # fmt: skip
COMPILER_OPTIONS = ("-DSTORAGE=", "-DHEAD_DIM=", "-std=c++17")


class MisuseError(AssertionError):
    """CUDA or CuPy would fail here, or give something undefined."""


class HostReadError(AssertionError):
    """Something waited for the device where nothing may."""


class CUDARuntimeError(RuntimeError):
    """As cupy.cuda.runtime's."""

    NAMES = {
        2: "cudaErrorMemoryAllocation: out of memory",
        46: "cudaErrorDevicesUnavailable: CUDA-capable device(s) is/are busy or unavailable",
        214: "cudaErrorECCUncorrectable: uncorrectable ECC error encountered",
        700: "cudaErrorIllegalAddress: an illegal memory access was encountered",
        702: "cudaErrorLaunchTimeout: the launch timed out and was terminated",
    }

    def __init__(self, status: int):
        super().__init__(self.NAMES[status])
        self.status = status


class CUDADriverError(RuntimeError):
    """As cupy.cuda.driver's."""


class OutOfMemoryError(MemoryError):
    """As cupy.cuda.memory's."""


CUDADriverError.__module__ = "cupy_backends.cuda.api.driver"
CUDARuntimeError.__module__ = "cupy_backends.cuda.api.runtime"


# -- memory --

_serials = itertools.count()
_memory: dict[int, tuple] = {}  # address, of the first guard -> (weak reference to the owner; serial number; size)
_addresses: list[int] = []  # of the above, in order


def allocate(shape, dtype) -> np.ndarray:
    """New memory for an array: every byte 0xFF, as NaN is in every float. While launches are recorded it is zeros,
    which take none until they are written to."""
    if _capturing is not None and _allocator is None:
        raise MisuseError("memory from the common pool while capturing: it would be given to others between launches")
    dtype, shape = np.dtype(dtype), (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    malloc = _allocator or common_pool.malloc
    raw, block = np.zeros(size + 2 * GUARD + 64, np.uint8), malloc(size)
    weakref.finalize(raw, malloc.__self__.free, block)
    start = -raw.ctypes.data % 64
    owner = raw[start : start + size + 2 * GUARD]
    owner[:GUARD] = owner[GUARD + size :] = PATTERN
    if _recorded is None:
        owner[GUARD : GUARD + size] = 0xFF
    address = owner.ctypes.data
    _memory[address] = weakref.ref(raw, lambda _: _forget(address)), next(_serials), size
    bisect.insort(_addresses, address)
    return owner[GUARD : GUARD + size].view(dtype).reshape(shape)


def _forget(address: int) -> None:
    _memory.pop(address, None)
    _used.pop(address, None)
    i = bisect.bisect_left(_addresses, address)
    if i < len(_addresses) and _addresses[i] == address:
        del _addresses[i]


def _find(pointer: int):
    """(address, serial number, size) of the allocation, guards not included, that a pointer points into, or None."""
    i = bisect.bisect_right(_addresses, pointer) - 1
    if i < 0:
        return None
    _, serial, size = _memory[_addresses[i]]
    start = _addresses[i] + GUARD
    return (start, serial, size) if start <= pointer < start + max(size, 1) else None


def _bytes(address: int, size: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def find_allocation(pointer: int) -> np.ndarray | None:
    """The bytes of the allocation that a pointer points into, which live as long as the view that is given."""
    found = _find(pointer)
    if found is None:
        return None
    address, _, size = found
    raw = _memory[address - GUARD][0]()
    start = address - raw.ctypes.data
    return raw[start : start + size]


def _check_guards(name: str, arrays) -> None:
    for array in arrays:
        if not array.size:
            continue
        start, _, size = _find(array.ctypes.data)
        if not (_bytes(start - GUARD, GUARD) == PATTERN).all() or not (_bytes(start + size, GUARD) == PATTERN).all():
            raise MisuseError(f"{name} wrote beside an array of shape {array.shape}")


# -- launches --

_log: list[tuple] | None = None  # of what is launched, while anyone wants it
_log_start = 0
_forbidden = 0
_capturing: list | None = None  # what is launched while a graph is being captured


@contextlib.contextmanager
def logged():
    """A list of all that is launched within. Arrays made within go by their order, older ones by their number, so that
    two steps which do the same on the same arrays log the same."""
    global _log, _log_start
    _log, _log_start = [], next(_serials)
    try:
        yield _log
    finally:
        _log = None


class Launch(NamedTuple):
    """One that was recorded."""

    name: str
    arrays: list[np.ndarray]
    ways: str  # of each array: r, it is read, w, written, or b, both; of a kernel of ours, a trace tells
    flop: int
    kernel: "tuple[cuda_on_cpu.Function, int, int] | None"  # of ours; threads of a block, bytes of shared memory


_recorded: list[Launch] | None = None


@contextlib.contextmanager
def recorded():
    """A list of all that is launched within, for a count of what it moves. No kernel and no product is run, and what
    they would have made is zeros."""
    global _recorded
    _recorded = []
    try:
        yield _recorded
    finally:
        _recorded = None


_trace = None


@contextlib.contextmanager
def traced(tell):
    """Within it each of our kernels is traced: tell(name, arrays, requests, products) hears what cuda_on_cpu's
    Function.trace gives."""
    global _trace
    _trace = tell
    try:
        yield
    finally:
        _trace = None


def is_recording() -> bool:
    return _recorded is not None


def launch(name: str, function, arrays, done: bool = False, ways: str = "", flop: int = 0, kernel=None) -> None:
    """Do function(), which works on these arrays. done: the caller has; it is for a graph to do it again. ways, flop
    and kernel are a Launch's: unless told otherwise, the last array is written and the others are read."""
    use(name, arrays)
    if _recorded is not None:
        _recorded.append(Launch(name, list(arrays), ways or "r" * (len(arrays) - 1) + "w", flop, kernel))
        done = True
    if _capturing is not None:
        if _current is not _capturing_stream:
            raise MisuseError(f"{name} is launched on another stream than the one captured")
        _capturing.append((function, arrays))
    if _log is not None:
        _log.append((name, *map(_description, arrays)))
    if not done:
        with np.errstate(all="ignore"):  # a GPU warns of nothing
            function()


def _description(array) -> tuple:
    if not array.size:
        return array.shape, array.dtype.name
    start, serial, _ = _find(array.ctypes.data)
    place = ("new", serial - _log_start) if serial > _log_start else ("old", serial)
    return array.shape, array.dtype.name, *place, array.ctypes.data - start


@contextlib.contextmanager
def no_host_reads():
    """Within it a value that is brought back from the device is an error."""
    global _forbidden
    _forbidden += 1
    try:
        yield
    finally:
        _forbidden -= 1


def read(what: str, *arrays) -> None:
    """To be called by what waits for the device, to bring back these arrays."""
    use(what, arrays)
    end_copies(Event().record())
    if _forbidden or _capturing is not None:
        raise HostReadError(f"{what} brings a value back from the device: the step could not be captured as a graph")


def write(what: str, *arrays) -> None:
    """To be called by what brings values from the host, into these arrays."""
    use(what, arrays)
    if _capturing is not None:
        raise MisuseError(f"{what} brings values from the host: a captured graph would bring these ones each time")


# -- streams, events, pools and graphs --


_used: dict[int, tuple[int, int]] = {}  # address -> (stream, how much that stream had done) at its last use
_done: dict[int, int] = {}  # stream -> how much it has done


def use(what: str, arrays) -> None:
    """Note that the current stream works on these arrays."""
    stream = _current.ptr
    _done[stream] = _done.get(stream, 0) + 1
    for array in arrays:
        if not array.size:
            continue
        address = _find(array.ctypes.data)[0] - GUARD
        other, done = _used.get(address, (stream, 0))
        if other != stream and _current.waited.get(other, 0) < done:
            raise MisuseError(f"{what} uses an array of shape {array.shape} that another stream may still work on")
        _used[address] = stream, _done[stream]


_pinned: dict[int, int] = {}  # address -> size
_copies: list[tuple] = []  # that may be going on: (stream, how much it has done after it, address, what was there)


def alloc_pinned_memory(size: int) -> np.ndarray:
    """As cupy.cuda.alloc_pinned_memory: memory of the host's that copies may read while the host goes on."""
    memory = np.full(size, 0xFF, np.uint8)
    _pinned[memory.ctypes.data] = size
    weakref.finalize(memory, _pinned.pop, memory.ctypes.data)
    return memory


def start_copy(values: np.ndarray) -> None:
    """To be called when a copy from the host has been launched, which reads these values."""
    start, size = values.ctypes.data, values.nbytes
    if size and not any(address <= start and start + size <= address + pinned for address, pinned in _pinned.items()):
        raise MisuseError("a copy from pageable memory, which may be gone when it is read")
    if any(start < address + len(held) and address < start + size for _, _, address, held in _copies):
        raise MisuseError("pinned memory is used again for a copy while another may still read it")
    _copies.append((_current.ptr, _done[_current.ptr], start, values.tobytes()))


def end_copies(event: "Event") -> None:
    """Those that are over once the event has come."""
    over = [copy for copy in _copies if copy[1] <= event.reached.get(copy[0], 0)]
    _copies[:] = [copy for copy in _copies if copy not in over]
    for _, _, address, held in over:
        if not any(start <= address < start + size for start, size in _pinned.items()):
            raise MisuseError("pinned memory was given back while a copy could still read it")
        if _bytes(address, len(held)).tobytes() != held:
            raise MisuseError("pinned memory was written to while a copy could still read it")


def forget_copies() -> None:
    """Between tests, each of which has a backend of its own: in a process there is but one, which stays."""
    _copies.clear()


class Event:
    """As cupy.cuda.Event: what a stream had done when it was recorded, and had waited for, and the time then."""

    def __init__(self, block: bool = False, disable_timing: bool = False):
        self.reached: dict[int, int] = {}
        self.stream, self.timing = None, not disable_timing

    def record(self, stream=None) -> "Event":
        stream = stream or _current
        self.reached = stream.waited | {stream.ptr: _done.get(stream.ptr, 0)}
        self.stream, self.time = stream, time.perf_counter()
        return self

    def synchronize(self) -> None:
        if _capturing is not None:
            raise MisuseError("waiting for an event while capturing")
        end_copies(self)
        if self.stream is not None:
            self.stream.finished = max(self.stream.finished, self.time)


def get_elapsed_time(start: Event, end: Event) -> float:
    """As cupy.cuda.get_elapsed_time, in milliseconds, of events that are over."""
    if not (start.timing and end.timing):
        raise MisuseError("the time of an event that was made without one")
    if any(event.time > event.stream.finished for event in (start, end)):
        raise MisuseError("the time of an event that nobody has waited for: CUDA says that it is not ready")
    return 1e3 * (end.time - start.time)


class Stream:
    """As cupy.cuda.Stream."""

    def __init__(self, non_blocking: bool = False, null: bool = False):
        if not (non_blocking or null):
            raise MisuseError("a blocking stream waits for the null stream, which the stand-in does not")
        self.ptr = 0 if null else next(_serials) + 1
        self.waited: dict[int, int] = {}  # stream -> how much of its work is done before ours
        self.finished = -math.inf  # up to when all of its events are over
        self._outer: list[Stream] = []  # a stream may be entered again within itself

    def __enter__(self):
        global _current
        self._outer.append(_current)
        _current = self
        return self

    def __exit__(self, *exc):
        global _current
        _current = self._outer.pop()

    def record(self, event: Event | None = None) -> Event:
        return (event or Event()).record(self)

    def wait_event(self, event: Event) -> None:
        for stream, done in event.reached.items():
            self.waited[stream] = max(self.waited.get(stream, 0), done)

    def synchronize(self) -> None:
        read("Stream.synchronize()")

    def is_capturing(self) -> bool:
        return _capturing is not None and _capturing_stream is self

    def begin_capture(self) -> None:
        global _capturing, _capturing_stream, _capturing_start, _before
        if self.ptr == 0:
            raise MisuseError("the null stream cannot be captured")
        _before = {address: _bytes(address, size + 2 * GUARD).copy() for address, (_, _, size) in list(_memory.items())}
        _capturing, _capturing_stream, _capturing_start = [], self, next(_serials)
        made_while_capturing.clear()

    def end_capture(self):
        global _capturing
        work, _capturing = _capturing, None
        for address, (_, serial, size) in list(_memory.items()):
            if address in _before:
                _bytes(address, size + 2 * GUARD)[:] = _before[address]
            elif serial > _capturing_start:
                _bytes(address + GUARD, size)[:] = 0xFF
        if made_while_capturing:
            shapes = sorted({x.inner.shape for x in made_while_capturing})
            raise MisuseError(f"arrays of the capture are still in use, of shapes {shapes}")
        return Graph(work)


_current = _null = Stream(null=True)
_capturing_stream = None
made_while_capturing = weakref.WeakSet()  # filled by the stand-in for cupy.ndarray


def is_capturing() -> bool:
    return _capturing is not None


def get_current_stream() -> Stream:
    return _current


class Graph:
    """As cupy.cuda.Graph."""

    def __init__(self, work: list):
        self._work = work

    def launch(self, stream=None) -> None:
        if _capturing is not None:
            raise MisuseError("a graph is launched while another is being captured")
        if _log is not None:
            _log.append(("graph", len(self._work)))
        with stream or _current:
            for function, arrays in self._work:
                use("a graph", arrays)
                with np.errstate(all="ignore"):
                    function()


device = types.SimpleNamespace(free=1 << 50)
properties = {"name": b"a stand-in", "major": 9, "minor": 0, "sharedMemPerBlockOptin": 227 << 10}


class Memory:
    """As cupy.cuda.Memory, of which there is so much; the bytes themselves are NumPy's."""

    def __init__(self, size: int):
        if size > device.free:
            raise CUDARuntimeError(2)
        self.size, device.free = size, device.free - size
        weakref.finalize(self, self._give_back, device, size).atexit = False

    @staticmethod
    def _give_back(device, size: int) -> None:
        device.free += size


class MemoryPointer:
    """As cupy.cuda.MemoryPointer."""

    def __init__(self, mem: Memory, offset: int):
        self.mem = mem


class MemoryPool:
    """As cupy.cuda.MemoryPool, whose blocks are used again for that size alone."""

    def __init__(self, allocator=None):
        self._allocator = allocator or (lambda size: MemoryPointer(Memory(size), 0))
        self._idle = collections.defaultdict(list)

    def malloc(self, size: int) -> MemoryPointer:
        if self._idle[size]:
            return self._idle[size].pop()
        for _ in range(2):
            try:
                return self._allocator(size)
            except CUDARuntimeError as error:
                if error.status != 2:
                    raise
                self._idle.clear()  # it looks no further than this pool
        raise OutOfMemoryError(f"Out of memory allocating {size:,} bytes (allocated so far: 0 bytes).")

    def free(self, block: MemoryPointer) -> None:
        self._idle[block.mem.size].append(block)

    def free_all_blocks(self) -> None:
        if _capturing is not None:
            raise MisuseError("memory is freed while capturing")
        self._idle.clear()

    def total_bytes(self) -> int:
        return sum(size for _, _, size in list(_memory.values()))


common_pool = MemoryPool()
_allocator = None  # that of a pool, or None for the common one


@contextlib.contextmanager
def using_allocator(malloc):
    global _allocator
    outer, _allocator = _allocator, malloc
    try:
        yield
    finally:
        _allocator = outer


# -- kernels --


class RawModule:
    """As cupy.RawModule."""

    def __init__(self, *, code: str, options: tuple[str, ...] = ()):
        for option in options:
            if not option.startswith(COMPILER_OPTIONS):
                raise MisuseError(f"NVRTC was given the option {option}: add it to COMPILER_OPTIONS if it is one")
        self._code, self._options, self._module = code, options, None

    def compile(self) -> None:
        write("compiling a module")
        self._module = cuda_on_cpu.Module(self._code, self._options)

    def get_function(self, name: str):
        if self._module is None:
            self.compile()
        return RawKernel(name, self._module.get_function(name))


class RawKernel:
    """As CuPy's kernels: strides are ignored, Python's numbers come as 64 bits, and no None is taken."""

    def __init__(self, name: str, kernel):
        self.name, self._kernel, self._most_shared = name, kernel, 48 << 10

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        return self._most_shared

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size: int) -> None:
        if size > properties["sharedMemPerBlockOptin"]:
            raise CUDADriverError("CUDA_ERROR_INVALID_VALUE: invalid argument")
        self._most_shared = size

    def __call__(self, grid, block, args, *, shared_mem: int = 0) -> None:
        limits = zip(grid, (2**31 - 1, 65535, 65535), strict=False)
        if not all(type(n) is int and 0 < n <= most for n, most in limits):
            raise MisuseError(f"{self.name}: a grid of {grid}")
        values, arrays = [], []
        for i, x in enumerate(args):
            if hasattr(x, "inner"):
                array = x.inner
                if self.name in STRIDED:
                    array = array[(slice(0, 1),) * array.ndim]  # the pointer is what counts
                elif not array.flags.c_contiguous:
                    raise MisuseError(f"{self.name}: argument {i} is not contiguous, and a kernel ignores strides")
                values.append(array)
                arrays.append(x.inner)
            elif x is None or isinstance(x, np.ndarray):
                raise MisuseError(f"{self.name}: argument {i} is {type(x)}, which CuPy does not pass to a kernel")
            elif x == 0 and type(x) is int and self._kernel._parameters[i].how != ".":
                values.append(None)
            else:
                values.append(int(x) if type(x) is bool else x)

        self._kernel.max_dynamic_shared_size_bytes = self.max_dynamic_shared_size_bytes

        def run():
            if _trace is None:
                self._kernel(grid, block, values, shared_mem=shared_mem)
            else:
                _trace(self.name, arrays, *self._kernel.trace(grid, block, values, shared_mem=shared_mem))
            _check_guards(self.name, arrays)

        launch(self.name, run, arrays, kernel=(self._kernel, math.prod(block), shared_mem))
