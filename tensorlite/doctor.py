"""Says whether `--backend cupy` works on this machine, and if not, why and what to do: python -m tensorlite.doctor

A check is a function that looks at one thing. It returns a line about it or raises, and notes in `Machine` what later
checks want to know. `run` makes a Result of either: no exception gets past it. `verdict` is drawn from the results. All
of it runs in a process of its own, since a library that does not fit can end that without an exception.

CuPy is looked at even where the backend cannot be loaded, so this is the one place beside the backend that imports it.
"""

import argparse
import contextlib
import ctypes
import importlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import tensorlite

_WHEELS = ("cupy", *(f"cupy-cuda{major}x" for major in range(11, 20)))  # "cupy": built from source, or conda's
_KERNEL = 'extern "C" __global__ void add_one(float* x) { x[threadIdx.x] += 1; }'
_TOLERANCE = 5e-3  # of the largest value: with TF32, which products may use, the gradients here move by 6e-4 to 1.2e-3


@dataclass(frozen=True)
class Result:
    """outcome: ok, missing, failed or skipped. hint: what to do, where that is known."""

    name: str
    outcome: str
    detail: str
    hint: str = ""
    essential: bool = True


@dataclass(frozen=True)
class Check:
    """needs: the checks without which this one is skipped. essential: without it the backend does not work."""

    name: str
    look: Callable[["Machine"], str]
    needs: tuple[str, ...] = ()
    essential: bool = True


@dataclass
class Machine:
    """What the checks have found so far."""

    libcuda: Any = None
    newest_cuda: int = 0  # that the driver supports: 13010 is CUDA 13.1; 0 is not known
    capability: int = 0  # of the first device: 90 is 9.0
    wheels: tuple[str, ...] = ()
    cupy: Any = None
    kernel: Any = None

    def cuda_major(self) -> int:
        """The CUDA version to install CuPy for: the newest one that the driver and the device support."""
        if self.newest_cuda:
            return 12 if self.newest_cuda < 13000 or 0 < self.capability < 75 else 13  # 13 dropped what is below 7.5
        return 12 if self.wheels == ("cupy-cuda12x",) else 13

    def install(self, afresh: bool = False) -> str:
        n = self.cuda_major()
        afresh = afresh or any(wheel != f"cupy-cuda{n}x" for wheel in self.wheels)
        first = f"pip uninstall -y {' '.join(self.wheels)} && " if afresh else ""
        plain = f'"cupy-cuda{n}x[ctk]" nvmath-python "cuda-bindings=={n}.*" ml_dtypes'
        return (
            f'run: {first}pip install -e ".[cuda{n}]" (outside a clone of the repository: {first}pip install {plain})'
        )


class Problem(Exception):  # noqa: N818 - of the machine rather than of the program
    """Something a check found wrong, in words of its own."""

    def __init__(self, detail: str, hint: str = "", outcome: str = "failed"):
        super().__init__(detail)
        self.hint, self.outcome = hint, outcome


# --- the host ---


def check_python(_: Machine) -> str:
    return f"{platform.python_version()} on {platform.platform()}"


def check_tensorlite(_: Machine) -> str:
    return f"{tensorlite.__version__} in {Path(tensorlite.__file__).parent}"


def check_numpy(_: Machine) -> str:
    a, b = _integers((5, 7)), _integers((7, 3))
    _same(a @ b, [[sum(int(x) * int(y) for x, y in zip(row, col, strict=True)) for col in b.T] for row in a])
    return np.__version__


def check_blas(_: Machine) -> str:
    pools = importlib.import_module("threadpoolctl").threadpool_info()
    libraries = [
        f"{pool['internal_api']} {pool['version']}, {pool['num_threads']} threads"
        for pool in pools
        if pool["user_api"] == "blas"
    ]
    return "; ".join(libraries) or "none that threadpoolctl knows"


# --- the driver, by its own library: it can be asked before CuPy is there ---


def check_driver(machine: Machine) -> str:
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        machine.libcuda = ctypes.CDLL(name)
    except OSError as error:
        raise Problem(str(error), outcome="missing") from None
    newest = ctypes.c_int()
    _call(machine.libcuda, "cuDriverGetVersion", ctypes.byref(newest))
    machine.newest_cuda = newest.value
    if newest.value < 12000:
        raise Problem(f"supports CUDA up to {_version(newest.value)} only", "update the NVIDIA driver")
    return f"{_driver_release()}supports CUDA up to {_version(newest.value)}"


def check_gpu(machine: Machine) -> str:
    cuda, count = machine.libcuda, ctypes.c_int()
    _call(cuda, "cuInit", 0)
    _call(cuda, "cuDeviceGetCount", ctypes.byref(count))
    if not count.value:
        raise RuntimeError("CUDA_ERROR_NO_DEVICE")
    devices = [_device(machine, index) for index in range(count.value)]
    context, free, total = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
    _call(cuda, "cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)  # the context that CuPy will use too
    _call(cuda, "cuCtxSetCurrent", context)
    _call(cuda, "cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    devices[0] += f", {free.value / 2**30:.1f} of them free"
    return "; ".join(devices)


def _device(machine: Machine, index: int) -> str:
    cuda, name, memory = machine.libcuda, ctypes.create_string_buffer(256), ctypes.c_size_t()
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    _call(cuda, "cuDeviceGet", ctypes.byref(device), index)
    _call(cuda, "cuDeviceGetName", name, len(name), device)
    _call(cuda, "cuDeviceGetAttribute", ctypes.byref(major), 75, device)  # COMPUTE_CAPABILITY_MAJOR, in cuda.h
    _call(cuda, "cuDeviceGetAttribute", ctypes.byref(minor), 76, device)  # COMPUTE_CAPABILITY_MINOR
    _call(cuda, "cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    machine.capability = machine.capability or 10 * major.value + minor.value
    capability = f"compute capability {major.value}.{minor.value}"
    return f"{name.value.decode(errors='replace')}, {capability}, {memory.value / 2**30:.1f} GiB"


def _call(library, function: str, *args) -> None:
    status = getattr(library, function)(*args)
    if status:
        name = ctypes.c_char_p()
        library.cuGetErrorName(status, ctypes.byref(name))
        raise RuntimeError(f"{function}: {name.value.decode() if name.value else f'error {status}'}")


def _driver_release() -> str:
    release = ctypes.create_string_buffer(96)
    with contextlib.suppress(OSError, AttributeError):  # containers may lack this library
        nvml = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() == 0 and nvml.nvmlSystemGetDriverVersion(release, len(release)) == 0:
            return f"{release.value.decode()}, "
    return ""


# --- the packages ---


def check_cupy(machine: Machine) -> str:
    machine.wheels = wheels = tuple(filter(_installed, _WHEELS))
    if len(wheels) > 1:
        raise Problem(f"{' and '.join(wheels)} are installed over each other", machine.install())
    wheel = wheels[0] if wheels else "no wheel"
    made_for = int((re.findall(r"\d+", wheel) or ["0"])[0])
    if made_for > machine.cuda_major():
        limit, or_else = f"compute capability {machine.capability / 10}", ""
        if machine.newest_cuda < 1000 * made_for:
            limit, or_else = f"a driver for CUDA up to {_version(machine.newest_cuda)}", ", or update the driver"
        raise Problem(f"{wheel} does not work with {limit}", machine.install() + or_else)
    machine.cupy = cupy = importlib.import_module("cupy")
    runtime = cupy.cuda.runtime.runtimeGetVersion()
    return f"{cupy.__version__} ({wheel}), CUDA runtime {_version(runtime)}"


def check_nvrtc(machine: Machine) -> str:
    nvrtc = machine.cupy.cuda.nvrtc
    version = nvrtc.getVersion()
    program = nvrtc.createProgram(_KERNEL, "add_one.cu", (), ())  # past CuPy's cache of what it once compiled
    nvrtc.compileProgram(program, ("-arch=compute_80",))
    return f"{version[0]}.{version[1]}, compiles a kernel"


def check_headers(machine: Machine) -> str:
    folder = importlib.import_module("cuda.pathfinder").find_nvidia_header_directory("cudart")  # as CuPy asks
    if not folder or not Path(folder, "cuda_bf16.h").is_file():
        raise Problem("no cuda_bf16.h, which CuPy needs for bfloat16", machine.install(), "missing")
    return str(folder)


def check_ml_dtypes(_: Machine) -> str:
    return importlib.import_module("ml_dtypes").__version__


def check_nvmath(_: Machine) -> str:
    importlib.import_module("nvmath.bindings.cublas")
    return importlib.metadata.version("nvmath-python")


def check_cublas(_: Machine) -> str:
    cublas = importlib.import_module("nvmath.bindings.cublas")
    return ".".join(str(cublas.get_property(part)) for part in range(3))


# --- what training does, in small ---


def check_kernel(machine: Machine) -> str:
    cupy = machine.cupy
    machine.kernel = cupy.RawKernel(_KERNEL, "add_one")
    x = cupy.asarray(np.arange(32, dtype=np.float32))
    machine.kernel((1,), (32,), (x,))
    _same(cupy.asnumpy(x), np.arange(1, 33))
    return "a RawKernel computes what NumPy does"


def check_backend(_: Machine) -> str:
    tensorlite.get_backend("cupy")
    return "loads"


def check_product(_: Machine) -> str:
    backend, a, b = tensorlite.get_backend("cupy"), _integers((32, 48)), _integers((48, 16))
    _same(backend.to_numpy(backend.gemm(backend.asarray(a), backend.asarray(b))), a.astype(int) @ b.astype(int))
    return "gemm computes what NumPy does"


def check_gradients(_: Machine) -> str:
    expected = _loss_and_gradients(tensorlite.get_backend("numpy"))
    for got, want in zip(_loss_and_gradients(tensorlite.get_backend("cupy")), expected, strict=True):
        _same(got, want, _TOLERANCE)
    return "of cross_entropy(linear(layer_norm(x))) as on the CPU"


def check_bfloat16(machine: Machine) -> str:
    if machine.capability < 80:
        raise Problem("slow or missing below compute capability 8.0; float32 works")
    bfloat16 = np.dtype(importlib.import_module("ml_dtypes").bfloat16)
    x = np.arange(32, dtype=np.float32) / 3
    rounded = machine.cupy.asarray(x).astype(bfloat16)
    _same(machine.cupy.asnumpy((rounded + rounded).astype(np.float32)), 2 * x.astype(bfloat16).astype(np.float32))
    return "CuPy rounds as ml_dtypes does"


def check_graph(machine: Machine) -> str:
    cupy = machine.cupy
    x = cupy.zeros(32, np.float32)
    cupy.cuda.Device().synchronize()  # x is filled on another stream
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        machine.kernel((1,), (32,), (x,))
        graph = stream.end_capture()
        for _ in range(3):
            graph.launch(stream)
        stream.synchronize()
    _same(cupy.asnumpy(x), np.full(32, 3))
    return "captured once, replayed three times"


def _loss_and_gradients(backend) -> list[np.ndarray]:
    B, C, V = 16, 64, 32  # noqa: N806
    shapes = ((B, C), (C,), (C,), (V, C), (V,))
    waves = [np.sin(np.arange(np.prod(shape), dtype=np.float32) ** 2 + i) for i, shape in enumerate(shapes)]
    leaves = [tensorlite.Tensor(backend.asarray(wave.reshape(s) / 4)) for wave, s in zip(waves, shapes, strict=True)]
    for leaf in leaves:
        leaf.requires_grad = True
    x, gain, shift, weight, bias = leaves
    logits = tensorlite.linear(tensorlite.layer_norm(x, gain, shift), weight, bias)
    loss = tensorlite.cross_entropy(logits, backend.asarray(np.arange(B)))
    loss.backward()
    return [backend.to_numpy(loss.data), *(backend.to_numpy(leaf.grad) for leaf in leaves)]


def _integers(shape: tuple[int, int]) -> np.ndarray:
    """Small integers in float32: their products are exact in any precision and order."""
    return (np.arange(shape[0] * shape[1], dtype=np.float32) * 5 % 7 - 3).reshape(shape)


def _same(got, expected, tolerance: float = 0.0) -> None:
    got, expected = np.asarray(got), np.asarray(expected)
    if got.shape != expected.shape:
        raise Problem(f"expected shape {expected.shape}, got {got.shape}")
    wrong = ~(np.abs(got - expected) <= tolerance * np.abs(expected).max())  # true of NaN as well
    if wrong.any():
        at = tuple(int(i[0]) for i in np.nonzero(np.atleast_1d(wrong)))
        pair = f"expected {np.atleast_1d(expected)[at]:.6g}, got {np.atleast_1d(got)[at]:.6g}"
        raise Problem(f"{wrong.sum()} of {wrong.size} values are wrong; at {at} {pair}")


def _installed(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def _version(cuda: int) -> str:
    return f"{cuda // 1000}.{cuda % 1000 // 10}"


CHECKS = (
    Check("Python", check_python),
    Check("tensorlite", check_tensorlite),
    Check("NumPy", check_numpy),
    Check("BLAS", check_blas),
    Check("NVIDIA driver", check_driver),
    Check("GPU", check_gpu, needs=("NVIDIA driver",)),
    Check("CuPy", check_cupy),
    Check("NVRTC", check_nvrtc, needs=("CuPy",)),
    Check("CUDA headers", check_headers, needs=("CuPy",), essential=False),
    Check("ml_dtypes", check_ml_dtypes, essential=False),
    Check("nvmath-python", check_nvmath),
    Check("cuBLAS", check_cublas, needs=("GPU", "nvmath-python")),
    Check("kernel", check_kernel, needs=("NumPy", "GPU", "NVRTC")),
    Check("backend", check_backend, needs=("kernel", "cuBLAS")),
    Check("product", check_product, needs=("backend",)),
    Check("gradients", check_gradients, needs=("product",)),
    Check("bfloat16", check_bfloat16, needs=("kernel", "CUDA headers", "ml_dtypes"), essential=False),
    Check("CUDA graph", check_graph, needs=("kernel",)),
)


# --- running them ---


def run(checks: tuple[Check, ...]) -> Iterator[Result]:
    """The results, each as soon as it is there."""
    machine, good = Machine(), set()
    for check in checks:
        lacking = [name for name in check.needs if name not in good]
        if lacking:
            yield Result(check.name, "skipped", f"needs {' and '.join(lacking)}", "", check.essential)
            continue
        try:
            outcome, detail, hint = "ok", check.look(machine), ""
            good.add(check.name)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a library that calls sys.exit() is no reason to stop
            outcome, hint = "missing" if isinstance(error, ModuleNotFoundError) else "failed", ""
            if isinstance(error, Problem):
                outcome, hint = error.outcome, error.hint
            detail = _first_line(error)
            hint = hint or _hint(f"{check.name}: {type(error).__name__}: {detail}", machine)
        yield Result(check.name, outcome, detail, hint, check.essential)


def _first_line(error: BaseException) -> str:
    """What it says in one line. CuPy's ImportError is a page of general advice; what happened is in its cause."""
    if isinstance(error, ImportError) and error.__cause__ is not None:
        error = error.__cause__
    lines = []
    with contextlib.suppress(Exception):  # its __str__ may be broken too
        lines = [line.strip() for line in str(error).splitlines() if line.strip(" =-")]
    name = [] if lines and isinstance(error, (Problem, ModuleNotFoundError)) else [type(error).__name__]
    return ": ".join(name + lines[:1])


def _hint(problem: str, machine: Machine) -> str:
    """What to do about it: the first of these whose pattern fits."""
    no_driver = (
        "install the NVIDIA driver (a container: start it with --gpus all, which takes the NVIDIA container toolkit; "
        "WSL: update the Windows driver)"
    )
    no_gpu = "start a container with --gpus all; on a machine without an NVIDIA GPU use --backend numpy"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        no_gpu = f"CUDA_VISIBLE_DEVICES is {hidden!r}, which hides the GPUs: run: unset CUDA_VISIBLE_DEVICES"
    hints = {
        r"threadpoolctl": "run, in a clone of the repository: pip install -e .",
        r"NVIDIA driver: |driver is not found": "CUDA is not made for macOS" if sys.platform == "darwin" else no_driver,
        r"Insufficient_?Driver": f"update the NVIDIA driver to one for CUDA {machine.cuda_major()}",
        r"No_?Device": no_gpu,
        r"out_?of_?memory|MemoryAllocation": "end what else uses the GPU's memory: nvidia-smi lists it",
        r"^GPU: ": "restart the machine, or the container with --gpus all: the driver is there and does not start",
        r"CuPy: Attr": machine.install(afresh=True),  # this is left of two wheels when one is uninstalled
        r"ModuleNotFound|not found|cannot open|Failure finding|gpu-architecture|No_?(Binary|KernelImage)": (
            machine.install()
        ),
    }
    return next((hint for pattern, hint in hints.items() if re.search(pattern, problem, re.IGNORECASE)), "")


def verdict(results: list[Result]) -> tuple[bool, str]:
    """Whether the backend works, and the last line to print."""
    bad = [result for result in results if result.outcome in ("missing", "failed")]
    bad = [result for result in bad if result.essential] or bad
    hints = "; then ".join(dict.fromkeys(result.hint for result in bad if result.hint))
    reason = ", ".join(f"{result.name} {result.outcome}" for result in bad)
    if len(bad) == 1:
        reason += f" ({bad[0].detail})"
    if any(result.essential for result in bad):
        return False, f"--backend cupy does not work here: {reason}; {hints or 'use --backend numpy'}"
    if bad:  # what is not essential is there for bfloat16
        return True, f"--backend cupy works here, in float32 only: {reason}" + (f"; {hints}" if hints else "")
    return True, "--backend cupy works here"


def format_result(result: Result) -> str:
    """The line of a result, and one for its hint."""
    width = max(len(check.name) for check in CHECKS)
    line = f"{result.name:{width}}  {result.outcome:7}  {result.detail}"
    return f"{line}\n{'':{width}}  {'':7}  -> {result.hint}" if result.hint else line


def examine() -> int:
    """Print every result and the verdict: 0 if --backend cupy works here, 1 if not."""
    results = []
    for result in run(CHECKS):
        results.append(result)
        print(format_result(result), flush=True)
    works, line = verdict(results)
    print(line, flush=True)
    return 0 if works else 1


def guard() -> int:
    """examine(), in a process that may crash."""
    status = subprocess.run([sys.executable, "-m", "tensorlite.doctor", "--unguarded"]).returncode
    if status in (0, 1, 130):
        return status
    what = f"what comes after the last line crashed with exit status {status}"
    print(f"--backend cupy does not work here: {what}; use --backend numpy", flush=True)
    return 1


def main(argv: list[str] | None = None) -> int:
    """0 if --backend cupy works here, 1 if not."""
    parser = argparse.ArgumentParser("python -m tensorlite.doctor", description=__doc__.partition("\n")[0])
    parser.add_argument("--unguarded", action="store_true", help=argparse.SUPPRESS)
    try:
        if not parser.parse_args(argv).unguarded:
            return guard()
        warnings.simplefilter("ignore")
        sys.unraisablehook = lambda _: None  # CuPy's half-made objects would print a traceback when they go
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal need not have a message's characters
        return examine()
    except KeyboardInterrupt:
        return 130
    except OSError as error:  # most likely of our output: its reader has gone, or its disk is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
