"""Runs CUDA kernels on the CPU, for tests: g++ compiles them after cuda_on_cpu.h, which says what is seen and what not.

    kernel = Module(code, ("-DSTORAGE=32",)).get_function("softmax")
    with thread_order(1):
        kernel((rows,), (256,), (x, y, rows), shared_mem=0)

The call is that of CuPy's RawModule, with NumPy arrays for those on the device. It is stricter: number, kinds and
widths of the arguments must be those of the kernel's parameters. CUDA does not look, and a kernel reads what it gets.
"""

import ctypes
import functools
import hashlib
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np

GXX = shutil.which("g++") if sys.platform == "linux" else None
MISSING = "kernels run on the CPU with g++ on Linux, which is not here" if GXX is None else ""  # a reason to skip

HEADER = Path(__file__).with_name("cuda_on_cpu.h")
# Arrays of known length and the alignment of pointers are checked, and no multiplication is fused with an addition, so
# that the numbers are the same on every machine.
COMPILE = [
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-gnu-unique",
    "-ffp-contract=off",
    "-fsanitize=bounds,alignment",
    "-Werror=frame-larger-than=16384",
    "-fmax-errors=5",
    "-DCUDA_ON_CPU",
]
TRACED = "-DCUDA_ON_CPU_TRACE"  # an option of a Module whose kernels are traced
# Whose calls are caught by cuda_on_cpu.h. Accesses stay one by one, as the kernel has them.
TRACE = ["-fsanitize=thread", "-fno-tree-vectorize"]
GARBAGE = "-ftrivial-auto-var-init=pattern"  # what local variables begin as, where g++ has it: from version 12 on
LINK = ["-shared", "-nostartfiles"]  # without start files there is no zero-initialised memory but the kernels' own

BOUNDS = r"(?:__launch_bounds__\s*(\((?:[^()]|\([^()]*\))*\))\s*)?"
KERNEL = re.compile(rf'extern\s+"C"\s+{BOUNDS}__global__\s+{BOUNDS}void\s+{BOUNDS}(\w+)\s*\(([^()]*)\)')

_order = 0


class KernelError(RuntimeError):
    """Something wrong inside a kernel, or with the shape of its launch: the kernel, the line, the block, the thread."""


@contextmanager
def thread_order(n: int):
    """Within it threads and blocks run in ascending order (0), in descending order (1), or in a random one (seed n)."""
    global _order
    before, _order = _order, n
    try:
        yield
    finally:
        _order = before


class Module:
    """The kernels of a CUDA source. Of the options those count that begin with -D."""

    def __init__(self, code: str, options: tuple[str, ...] = ()):
        library = _library(code, tuple(option for option in options if option.startswith("-D")))
        found = ctypes.c_char_p.in_dll(library, "cuda_on_cpu_kernels").value.decode()
        kernels = [line.split() for line in found.splitlines()]
        self.names = [name for name, *_ in kernels]
        lines = code.splitlines()
        self._functions = {name: Function(library, name, parameters, lines) for name, *parameters in kernels}
        for function in self._functions.values():
            function.source = code, options

    def get_function(self, name: str):
        """The kernel of that name, called as CuPy's: kernel(grid, block, args, *, shared_mem=0)."""
        if name not in self._functions:
            raise KeyError(f"no kernel {name!r}: there are {', '.join(self.names) or 'none'}")
        return self._functions[name]


MOST_REQUESTS = 1 << 27  # of a launch that is traced; the memory is taken as it is filled


class Function:
    """A kernel, to be called. source: the code and the options of its module."""

    source: tuple[str, tuple[str, ...]]

    def __init__(self, library: ctypes.PyDLL, name: str, parameters: list[str], lines: list[str]):
        self.name = name
        self.max_dynamic_shared_size_bytes = 48 << 10  # as in CuPy: for more, one has to ask before
        self._lines = lines
        signature = library[f"signature_{name}"]
        signature.restype = ctypes.c_char_p
        text = signature().decode()
        self._parameters = [_Parameter(*text[3 * i : 3 * i + 3]) for i in range(len(text) // 3)]
        self._names = parameters
        self._pack = struct.Struct("8q" + "".join(p.slot for p in self._parameters)).pack
        self._launch = library[f"launch_{name}"]
        self._launch.restype = ctypes.c_char_p
        self._launch.argtypes = (ctypes.c_char_p,)
        self._trace = (ctypes.c_uint64 * 4).in_dll(library, "cuda_on_cpu_trace")

    def trace(self, *args, **kwargs) -> tuple[np.ndarray, int]:
        """The same call, by a build that notes what it asks of memory: an address in each sector of 32 bytes, once for
        each instruction of a warp, with the highest bit set where it is written. And how many products of tensor cores
        there were, (16, 8) += (16, 16) (16, 8) each."""
        code, options = self.source
        twin = Module(code, (*options, TRACED)).get_function(self.name)
        twin.max_dynamic_shared_size_bytes = self.max_dynamic_shared_size_bytes
        room = np.empty(MOST_REQUESTS, np.uint64)
        twin._trace[:] = room.ctypes.data, 0, len(room), 0
        try:
            twin(*args, **kwargs)
        finally:
            twin._trace[0] = 0
        _, count, _, products = twin._trace
        if count > len(room):
            raise KernelError(f"{self.name}: asks {count} times for memory, more than a trace has room for")
        return room[:count].copy(), products

    def __call__(self, grid: tuple, block: tuple, args: tuple, *, shared_mem: int = 0) -> None:
        if len(args) != len(self._parameters):
            raise TypeError(f"{self.name} takes {len(self._parameters)} arguments, got {len(args)}")
        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise KernelError(
                f"{self.name}: shared_mem={shared_mem} bytes, but max_dynamic_shared_size_bytes is "
                f"{self.max_dynamic_shared_size_bytes}: set it to as much on the function"
            )
        slots, kept = [], []
        for parameter, x in zip(self._parameters, args, strict=True):
            try:
                slots.append(parameter.slot_of(x, kept))
            except TypeError as error:
                i = len(slots)
                name = self._names[i] if len(self._names) == len(args) else ""
                raise TypeError(f"{self.name}, argument {i + 1} {name}: {error}") from None
        message = self._launch(self._pack(*_three(grid), *_three(block), shared_mem, _order, *slots))
        if message is not None:
            line, text = message.decode().split(":", 1)
            if where := int(line):
                text = f"line {line}, {self._lines[where - 1].strip()!r}: {text}"
            raise KernelError(f"{self.name}: {text}")


class _Parameter:
    """One of a kernel's, from its three letters in the signature: '*f4' is a float*, '&f4' to const, '.f4' a float."""

    NAMES = {
        "f4": "float", "f8": "double", "b1": "bool", "i1": "signed char", "u1": "unsigned char", "i2": "short",
        "u2": "unsigned short", "i4": "int", "u4": "unsigned", "i8": "long long", "u8": "unsigned long long",
        "v1": "void", "c2": "bfloat16",
    }  # fmt: skip
    SLOTS = {"f4": "f4x", "f8": "d", "b1": "?7x", "i8": "q", "u8": "Q"}

    def __init__(self, how: str, kind: str, size: str):
        self.how, self.kind, self.size = how, kind, ord(size) - ord("0")
        code = f"{kind}{self.size}"
        self.name = self.NAMES.get(code, f"class of {self.size} bytes")
        self.fits = {}  # dtype: whether it does
        if how == ".":
            self.slot = self.SLOTS.get(code, "q")
            self.slot_of = self._slot_of_value
            # What a Python number is passed as, and what it may be passed for.
            self.python = {"i8": int, "u8": int, "f8": float, "b1": bool}.get(code)
        else:
            self.slot = "Q"
            self.slot_of = self._slot_of_array
            self.name = ("const " if how == "&" else "") + self.name + "*"

    def _slot_of_array(self, x, kept: list) -> int:
        """The address of a capsule that holds the array's; it must be kept until the launch."""
        if x is None:
            return 0
        if not isinstance(x, np.ndarray):
            raise TypeError(f"expected an array for {self.name}, got {x!r} of {type(x).__name__}")
        dtype = x.dtype
        if dtype not in self.fits:
            self.fits[dtype] = self._fits(dtype)
        if not self.fits[dtype]:
            raise TypeError(f"expected an array for {self.name}, got one of {dtype}")
        flags = x.flags
        if not flags.carray:  # contiguous, aligned and writeable
            if not flags.c_contiguous:
                raise TypeError(f"expected a contiguous array, got shape {x.shape}, strides {x.strides}")
            if self.how == "*" and not flags.writeable:
                raise TypeError("expected an array to write to, got a read-only one")
        capsule = x.__array_struct__
        kept.append(capsule)
        return id(capsule)

    def _fits(self, dtype: np.dtype) -> bool:
        kind, size = dtype.kind, dtype.itemsize
        if self.kind == "v":
            return True
        if self.kind == "c" and self.size != 2:  # float4 and the like: several elements
            return self.size % size == 0
        if size != self.size or not dtype.isnative:
            return False
        if self.kind == "f":
            return kind == "f"
        if size == 2:  # bfloat16 is a class in C++, and to NumPy a type that it does not know: kind V
            return kind in "uV" if self.kind == "c" else kind in "iuV"
        return kind in "iub"

    def _slot_of_value(self, x, kept: list):
        kind = type(x)
        if kind is int and self.python is int:
            if not -(2**63) <= x < 2**63:
                raise OverflowError(f"{x} does not fit in a long long")
        elif isinstance(x, np.generic):
            dtype = x.dtype
            if dtype not in self.fits:
                same = dtype.kind == self.kind or {dtype.kind, self.kind} == {"i", "u"}
                self.fits[dtype] = same and dtype.itemsize == self.size
            if not self.fits[dtype]:
                raise TypeError(f"expected {self.name}, got {dtype} {x}")
            x = x.item()
        elif kind is not self.python or kind is int:
            passed = {int: "long long", float: "double", bool: "bool"}.get(kind)
            got = f"{x!r}, which is passed as {passed}" if passed else f"{x!r} of {kind.__name__}"
            raise TypeError(f"expected {self.name}, got {got}")
        if self.slot == "Q":
            return x & (2**64 - 1)
        return x if self.slot != "q" or x < 2**63 else x - 2**64


def _three(size: tuple) -> tuple:
    if type(size) is not tuple or not 1 <= len(size) <= 3:
        raise TypeError(f"expected a grid or block of one to three numbers in a tuple, got {size!r}")
    return (*size, 1, 1)[:3]


@functools.cache
def _library(code: str, defines: tuple[str, ...]) -> ctypes.PyDLL:
    """The compiled source. PyDLL holds Python's lock: no two threads may run the same module's kernels at once."""
    if GXX is None:
        raise RuntimeError(MISSING)
    text = "\0".join((code, HEADER.read_text(), *defines, *_compile_flags(), *TRACE, *LINK, KERNEL.pattern))
    folder = _folder()
    library = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = _compile(code, defines, Path(scratch))
            built.replace(library)  # other processes see all of it or nothing
    return ctypes.PyDLL(str(library))


@functools.cache
def _compile_flags() -> list[str]:
    version = int(_run("-dumpversion").split(".")[0])
    return [*COMPILE, GARBAGE] if version >= 12 else COMPILE


def _folder() -> Path:
    """Where compiled modules are kept: a folder that is this user's alone, as what lies there is run."""
    folder = Path(tempfile.gettempdir()) / f"tensorlite-cuda-on-cpu-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise RuntimeError(f"{folder} can be written by others: remove it")
    return folder


def _compile(code: str, defines: tuple[str, ...], folder: Path) -> Path:
    source, compiled, library = folder / "kernels.cpp", folder / "kernels.o", folder / "kernels.so"
    # What the preprocessor leaves tells which kernels there are: the storage type may decide, or a macro name them.
    plain = _run("-E", "-P", "-x", "c++", "-DCUDA_ON_CPU", *defines, "-", text=code)
    kernels, exports = [], []
    for *bounds, name, parameters in KERNEL.findall(plain):
        kernels.append(" ".join((name, *re.findall(r"(\w+)\s*(?:,|$)", parameters))))
        exports.append(f"CUDA_ON_CPU_EXPORT({name}, {''.join(bounds) or '(1024)'})")
    found = "\\n".join(kernels)
    exports.append(
        f'extern "C" __attribute__((visibility("default"))) const char* const cuda_on_cpu_kernels = "{found}";'
    )
    source.write_text("\n".join((f'#include "{HEADER}"', '#line 1 "kernels.cu"', code, *exports, "")))
    trace = TRACE if TRACED in defines else []
    _run(*_compile_flags(), *trace, *defines, "-c", str(source), "-o", str(compiled))
    _run(*LINK, str(compiled), "-o", str(library))
    return library


def _run(*arguments: str, text: str | None = None) -> str:
    done = subprocess.run([GXX, *arguments], input=text, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"g++ refuses the kernels:\n{done.stderr}")
    return done.stdout
