"""What the doctor looks at. A check returns a line about one thing or raises, and notes in `Machine` what later checks
want to know.

CuPy is looked at even where the backend cannot be loaded, so this is the one place beside the backend that imports it.
"""

import contextlib
import ctypes
import importlib
import importlib.metadata
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import tensorlite
from tensorlite.backends.cuda.kernels import prepare_cache

TOLERANCE = 2e-3  # of the largest value: these gradients move by 3e-7 in another order of sums, by 5e-4 in TF32,
ROUGH = 0.05  # and by 0.012 in bfloat16
INTEGERS = (np.arange(32 * 48, dtype=np.float32) * 5 % 7 - 3).reshape(32, 48)  # from -3 to 3


class Problem(Exception):  # noqa: N818 - of the machine rather than of the program
    """Something a check found wrong, in words of its own; outcome: failed or missing."""

    def __init__(self, detail: str, hint: str = "", outcome: str = "failed"):
        super().__init__(detail)
        self.hint, self.outcome = hint, outcome


@dataclass
class Machine:
    """What the checks have found so far."""

    libcuda: ctypes.CDLL | None = None
    newest_cuda: int = 0  # that the driver supports: 13010 is CUDA 13.1; 0 is not known
    capability: int = 0  # of the first device: 90 is 9.0
    wheels: list[str] = field(default_factory=list)

    def cuda_major(self) -> int:
        """The CUDA version to install CuPy for: the newest one that the driver and the device support."""
        if self.newest_cuda:
            return 12 if self.newest_cuda < 13000 or 0 < self.capability < 75 else 13  # 13 dropped what is below 7.5
        return 12 if self.wheels == ["cupy-cuda12x"] else 13

    def install(self, afresh: bool = False) -> str:
        """The command that installs all the backend needs; afresh: even a CuPy that fits."""
        n = self.cuda_major()
        unfit = self.wheels if afresh or self.wheels != [f"cupy-cuda{n}x"] else []
        first = f"pip uninstall -y {' '.join(unfit)} && " if unfit else ""
        return f'run, in a clone of the repository: {first}pip install -e ".[cuda{n}]"'


def check_python(_: Machine) -> str:
    version = f"{platform.python_version()} on {platform.platform()}"
    return f"{version}, tensorlite {tensorlite.__version__} in {Path(tensorlite.__file__).parent}"


def check_numpy(_: Machine) -> str:
    pools = importlib.import_module("threadpoolctl").threadpool_info()
    blas = [f"{p['internal_api']} {p['version']}, {p['num_threads']} threads" for p in pools if p["user_api"] == "blas"]
    return f"{np.__version__} with {'; '.join(blas) or 'a BLAS that threadpoolctl does not know'}"


# --- the driver, by its own library: it can be asked before CuPy is there ---


def check_driver(machine: Machine) -> str:
    try:
        machine.libcuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as error:
        hint = (
            "install the NVIDIA driver (a container: start it with --gpus all, which takes the NVIDIA container "
            "toolkit; WSL: update the Windows driver; macOS: there is none)"
        )
        raise Problem(str(error), hint, "missing") from None
    machine.newest_cuda = _ask(machine, "cuDriverGetVersion", ctypes.c_int)
    if machine.newest_cuda < 12000:
        raise Problem(f"supports CUDA up to {_version(machine.newest_cuda)} only", "update the NVIDIA driver")
    return f"supports CUDA up to {_version(machine.newest_cuda)}"


def check_gpu(machine: Machine) -> str:
    _call(machine, "cuInit", 0)
    device = _ask(machine, "cuDeviceGet", ctypes.c_int, 0)
    name = _ask(machine, "cuDeviceGetName", ctypes.c_char * 256, 256, device).decode(errors="replace")
    memory = _ask(machine, "cuDeviceTotalMem_v2", ctypes.c_size_t, device)
    major = _ask(machine, "cuDeviceGetAttribute", ctypes.c_int, 75, device)  # COMPUTE_CAPABILITY_MAJOR, in cuda.h
    minor = _ask(machine, "cuDeviceGetAttribute", ctypes.c_int, 76, device)  # COMPUTE_CAPABILITY_MINOR
    machine.capability = 10 * major + minor
    return f"{name}, compute capability {major}.{minor}, {memory / 2**30:.1f} GiB"


def _call(machine: Machine, function: str, *args) -> None:
    status = getattr(machine.libcuda, function)(*args)
    if status:
        name = ctypes.c_char_p()
        machine.libcuda.cuGetErrorName(status, ctypes.byref(name))
        raise RuntimeError(f"{function}: {name.value.decode() if name.value else f'error {status}'}")


def _ask(machine: Machine, function: str, kind: type, *args):
    """What a function of the driver's writes where its first argument points."""
    answer = kind()
    _call(machine, function, ctypes.byref(answer), *args)
    return answer.value


def _version(cuda: int) -> str:
    return f"{cuda // 1000}.{cuda % 1000 // 10}"


# --- the packages ---


def check_cupy(machine: Machine) -> str:
    for wheel in ("cupy", *(f"cupy-cuda{major}x" for major in range(11, 20))):  # "cupy": from source, or conda's
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(wheel)
            machine.wheels.append(wheel)
    if len(machine.wheels) > 1:
        raise Problem(f"{' and '.join(machine.wheels)} are installed over each other", machine.install())
    wheel = machine.wheels[0] if machine.wheels else "no wheel"
    made_for = int("".join(filter(str.isdigit, wheel)) or 0)
    if made_for > machine.cuda_major():
        limits = f"CUDA up to {_version(machine.newest_cuda)}, a GPU of compute capability {machine.capability / 10}"
        raise Problem(f"{wheel} is too new for this machine: a driver for {limits}", machine.install())
    prepare_cache()
    cupy = importlib.import_module("cupy")
    return f"{cupy.__version__} ({wheel}), CUDA runtime {_version(cupy.cuda.runtime.runtimeGetVersion())}"


def check_cache(_: Machine) -> str:
    folder, problem = prepare_cache()
    if problem:
        raise Problem(f"{folder}: {problem}", "set CUPY_CACHE_DIR to a folder that can be written")
    return str(folder)


def check_nvrtc(_: Machine) -> str:
    nvrtc = importlib.import_module("cupy").cuda.nvrtc
    version = nvrtc.getVersion()
    program = nvrtc.createProgram('extern "C" __global__ void nothing() {}', "nothing.cu", (), ())
    nvrtc.compileProgram(program, ("-arch=compute_80",))  # past CuPy's cache of what it once compiled
    return f"{version[0]}.{version[1]}, compiles a kernel"


def check_headers(machine: Machine) -> str:
    folder = importlib.import_module("cuda.pathfinder").find_nvidia_header_directory("cudart")  # as CuPy asks
    if not folder or not Path(folder, "cuda_bf16.h").is_file():
        raise Problem("no cuda_bf16.h: without these headers CuPy compiles no kernel", machine.install(), "missing")
    return str(folder)


def check_nvmath(_: Machine) -> str:
    importlib.import_module("nvmath.bindings.cublas")
    return importlib.metadata.version("nvmath-python")


def check_cublas(_: Machine) -> str:
    cublas = importlib.import_module("nvmath.bindings.cublas")
    return ".".join(str(cublas.get_property(part)) for part in range(3))


# --- what training does, in small: the same on the GPU as on the CPU ---


def relu_of_sum(backend, dtype: str = "float32") -> list[np.ndarray]:
    """By a kernel of CuPy's and one of ours. On the CPU in float32: the numbers are exact in any precision."""
    x = backend.asarray(INTEGERS, backend.dtype(dtype if backend.name == "cupy" else "float32"))
    return [backend.to_numpy(backend.relu(x + x)).astype(np.float32)]


def product(backend) -> list[np.ndarray]:
    x = backend.asarray(INTEGERS)
    return [backend.to_numpy(backend.gemm(x, x, trans_b=True))]


def replayed_products(backend) -> list[np.ndarray]:
    """Their sum, by work that is done again and again, as a training step is."""
    x, total = backend.asarray(INTEGERS), backend.asarray(np.zeros((32, 32), np.float32))

    @backend.replayable
    def add_product() -> None:
        total[...] += backend.gemm(x, x, trans_b=True)

    for _ in range(6):  # the first few are calls, the others launches of one graph
        add_product()
    return [backend.to_numpy(total)]


def step_of_training(backend, dtype: str = "float32") -> list[np.ndarray]:
    """The loss, the gradients and the update of a small GPT's block, and one more token read: each kind of kernel that
    training and sampling launch, on the CPU in float32."""
    rng, dtype = np.random.default_rng(0), backend.dtype(dtype if backend.name == "cupy" else "float32")
    shapes = (19, 64), (64,), (64,), (192, 64), (192,), (64, 64)
    values = [rng.standard_normal(shape, np.float32) / 4 for shape in shapes]
    leaves = [tensorlite.Tensor(backend.asarray(value), requires_grad=True) for value in values]
    table, gain, shift, weight, bias, projection = leaves
    tokens = backend.asarray((np.arange(99) * 7 % 19).astype(np.uint8))
    ids, targets = backend.gather_blocks(tokens, backend.asarray([0, 50]), 32)
    with tensorlite.random.scope(1):
        x = tensorlite.cast(tensorlite.embedding(ids, table), dtype)  # (2, 32, 64)
        weight, bias = (tensorlite.cast(w, dtype) for w in (weight, bias))
        qkv = tensorlite.linear(tensorlite.layer_norm(x, gain, shift), weight, bias)
        y = tensorlite.self_attention(qkv, 2, dropout=0.25)
        y = tensorlite.gelu(tensorlite.linear(y, tensorlite.cast(projection, dtype)))
        logits = tensorlite.linear(tensorlite.add_dropout(x, y, 0.25), tensorlite.cast(table, dtype))
    loss = tensorlite.cross_entropy(logits.reshape(64, 19), targets.reshape(64))
    loss.backward()
    p, m, v = (backend.asarray(values[0].ravel() ** power) for power in (1, 2, 4))
    norm = backend.l2_norm(p)
    backend.adamw_step(p, leaves[0].grad.ravel(), m, v, (0.1, 0.1, 1e-3), (0.9, 0.99), 0.1, 1 / norm)
    cache = backend.asarray(np.zeros((2, 2, 2, 4, 32), np.float32)).astype(dtype)
    token = backend.attention_of_next(qkv.data[:, :1], cache, backend.asarray([0]), 1.0)
    results = loss.data, *(leaf.grad for leaf in leaves), p, m, norm, token
    return [backend.to_numpy(array).astype(np.float32) for array in results]


def agree(compute: Callable, tolerance: float = 0.0) -> str:
    """Problem unless compute(backend) gives the same arrays on both."""
    on_gpu, on_cpu = (compute(tensorlite.get_backend(name)) for name in ("cupy", "numpy"))
    for got, expected in zip(on_gpu, on_cpu, strict=True):
        wrong = ~(np.abs(got - expected) <= tolerance * np.abs(expected).max())  # true of NaN as well
        if wrong.any():
            i = int(np.argmax(wrong))
            pair = f"expected {expected.flat[i]:.6g}, got {got.flat[i]:.6g}"
            raise Problem(f"{pair}; {wrong.sum()} of {wrong.size} values are wrong")
    return "as on the CPU"


def check_bfloat16(machine: Machine) -> str:
    if machine.capability < 80:
        raise Problem("slow or missing below compute capability 8.0; float32 works")
    agree(lambda backend: relu_of_sum(backend, "bfloat16"))
    return agree(lambda backend: step_of_training(backend, "bfloat16"), ROUGH)


@dataclass(frozen=True)
class Check:
    """needs: the checks without which this one is skipped. without: how the backend works without this one, or "" if
    it does not."""

    name: str
    look: Callable[[Machine], str]
    needs: tuple[str, ...] = ()
    without: str = ""


FLOAT32 = "in float32 only"
CHECKS = (
    Check("Python", check_python),
    Check("NumPy", check_numpy),
    Check("NVIDIA driver", check_driver),
    Check("GPU", check_gpu, needs=("NVIDIA driver",)),
    Check("CuPy", check_cupy),
    Check("kernel cache", check_cache, needs=("CuPy",), without="compiling its kernels in each run"),
    Check("NVRTC", check_nvrtc, needs=("CuPy",)),
    Check("CUDA headers", check_headers, needs=("CuPy",)),
    Check("ml_dtypes", lambda _: importlib.import_module("ml_dtypes").__version__, without=FLOAT32),
    Check("nvmath-python", check_nvmath),
    Check("cuBLAS", check_cublas, needs=("GPU", "nvmath-python")),
    Check("kernel", lambda _: agree(relu_of_sum), needs=("GPU", "NVRTC", "CUDA headers", "nvmath-python")),
    Check("product", lambda _: agree(product), needs=("kernel", "cuBLAS")),
    Check("training", lambda _: agree(step_of_training, TOLERANCE), needs=("product",)),
    Check("bfloat16", check_bfloat16, needs=("training", "ml_dtypes"), without=FLOAT32),
    Check("CUDA graph", lambda _: agree(replayed_products), needs=("product",), without="with --no-graph only"),
)
