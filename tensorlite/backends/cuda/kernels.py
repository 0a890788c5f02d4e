"""The CUDA kernels of `cuda/*.cu`, compiled when they are first needed."""

import contextlib
import sys
import threading
from importlib import resources
from pathlib import Path

# All but flash_attention.cu, which wants constants of its own.
FILES = ("elementwise.cu", "layer_norm.cu", "attention.cu", "tokens.cu", "optimizer.cu")
SLOW = 0.5  # seconds that compiling may take before its user is told; what CuPy finds on disk takes less
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
        self._cupy = cupy
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
            options = (f"-DSTORAGE={STORAGE[dtype_name]}", "-std=c++17", *options)
            module = self._cupy.RawModule(code=source(*files), options=options)
            with announce_compilation():
                module.compile()
            self._modules[key] = module
        return self._modules[key]


def null_pointers(args: tuple) -> tuple:
    """A kernel's arguments as CuPy takes them, which knows no None: a null pointer is a 0."""
    return tuple(0 if a is None else a for a in args)


@contextlib.contextmanager
def announce_compilation():
    """Within it, say what takes so long if it does."""
    text = "compiling the GPU's kernels, once on this machine ..."
    timer = threading.Timer(SLOW, lambda: print(text, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
