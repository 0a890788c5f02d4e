"""The CUDA kernels of `cuda/*.cu`, compiled when they are first needed."""

import contextlib
import functools
import os
import sys
import tempfile
import threading
from importlib import resources
from pathlib import Path

# All but flash_attention.cu, which wants constants of its own.
FILES = ("elementwise.cu", "layer_norm.cu", "attention.cu", "tokens.cu", "optimizer.cu")
SLOW = 0.5  # seconds that compiling may take before its user is told; what CuPy finds on disk takes less
CACHE_BYTES = 4 << 20  # more than what CuPy keeps of a run's kernels
STORAGE = {"float64": 64, "float32": 32, "bfloat16": 16}  # dtype name -> what the files are compiled for


def source(*files: str) -> str:
    """The text of these kernel files, as one."""
    folder = Path(str(resources.files("tensorlite.backends.cuda")))
    return "\n".join((folder / name).read_text() for name in ("common.cuh", *files))


class Kernels:
    """`kernels(name, dtype)` is the kernel of that name for arrays of that dtype, to be called as CuPy's kernels are.

    CuPy keeps what it has compiled on disk, so that it takes seconds only the first time on a machine.
    """

    def __init__(self, cupy):
        self._cupy, self._announced = cupy, Announcement()
        self._modules, self._functions = {}, {}

    def __call__(self, name: str, dtype):
        key = name, dtype
        if key not in self._functions:
            self._functions[key] = self._module(dtype.name, FILES).get_function(name)
        return self._functions[key]

    def of_flash_attention(self, name: str, head_dim: int):
        """The kernel of that name in flash_attention.cu, for heads of this size."""
        key = name, head_dim
        if key not in self._functions:
            kernel = self._module("bfloat16", ("flash_attention.cu",), f"-DHEAD_DIM={head_dim}").get_function(name)
            kernel.max_dynamic_shared_size_bytes = 99 << 10  # what every GPU that it is for has
            self._functions[key] = kernel
        return self._functions[key]

    def _module(self, dtype_name: str, files: tuple[str, ...], *options: str):
        key = dtype_name, files, options
        if key not in self._modules:
            every = f"-DSTORAGE={STORAGE[dtype_name]}", "-std=c++17"
            module = self._cupy.RawModule(code=source(*files), options=(*every, *options))
            with self._announced(dtype_name + " attention" * bool(options)):
                module.compile()
            self._modules[key] = module
        return self._modules[key]


def null_pointers(args: tuple) -> tuple:
    """A kernel's arguments as CuPy takes them, which knows no None: a null pointer is a 0."""
    return tuple(0 if a is None else a for a in args)


@functools.cache
def prepare_cache() -> tuple[Path, str]:
    """CuPy's folder for compiled kernels, and why it cannot be used, if so.

    To be called before CuPy is imported, which makes the folder then, writes into it at each new kernel, and stops
    where it cannot. Such a CuPy is told to keep its kernels in memory, and that its folder is one that there is.
    """
    folder = Path(os.environ.get("CUPY_CACHE_DIR") or "~/.cupy/kernel_cache")
    try:
        folder = folder.expanduser()
        place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(CACHE_BYTES))
    except (OSError, RuntimeError) as error:  # RuntimeError: of a user whose home is not known
        os.environ |= {"CUPY_CACHE_IN_MEMORY": "1", "CUPY_CACHE_DIR": os.sep}
        return folder, getattr(error, "strerror", None) or str(error)
    return folder, ""


class Announcement:
    """`with announcement(what):` says that this is being compiled, if it takes long; the first one says how often it
    will be."""

    def __init__(self):
        folder, problem = prepare_cache()
        self._often = ", once on this machine"
        if problem:
            other = "set CUPY_CACHE_DIR to a folder that can"
            self._often = f", in each run anew, as {folder} cannot be written ({problem}; {other})"

    @contextlib.contextmanager
    def __call__(self, what: str):
        timer = threading.Timer(SLOW, self._tell, [what])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _tell(self, what: str) -> None:
        print(f"compiling the GPU's kernels{self._often}: {what} ...", file=sys.stderr, flush=True)
        self._often = ""
