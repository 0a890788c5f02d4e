"""python -m tensorlite.doctor: what it says of this machine, and of machines played by stand-ins."""

import ctypes
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from strict_cuda import Stream

import tensorlite
from tensorlite import BackendError
from tensorlite.backends.numpy_backend import NumpyBackend
from tensorlite.doctor import __main__, examine
from tensorlite.doctor.checks import CHECKS, Check, Machine

WORKS = "--backend cupy works here"
CUDA12, CUDA13 = (f'run, in a clone of the repository: pip install -e ".[cuda{n}]"' for n in (12, 13))


class Driver:
    """libcuda, with one device."""

    newest, init, capability = 13010, 0, 90

    def cuDriverGetVersion(self, version):  # noqa: N802
        version._obj.value = self.newest
        return 0

    def cuInit(self, flags):  # noqa: N802
        return self.init

    def cuGetErrorName(self, status, name):  # noqa: N802
        name._obj.value = {100: b"CUDA_ERROR_NO_DEVICE", 803: b"CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"}.get(status)
        return 0

    def cuDeviceGetName(self, name, size, device):  # noqa: N802
        name._obj.value = b"NVIDIA H200"
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):  # noqa: N802
        value._obj.value = {75: self.capability // 10, 76: self.capability % 10}[attribute]
        return 0

    def cuDeviceTotalMem_v2(self, memory, device):  # noqa: N802
        memory._obj.value = 140 * 2**30
        return 0

    def cuDeviceGet(self, *_):  # noqa: N802
        return 0


@dataclass
class Backend(NumpyBackend):
    """A GPU's, whose results may be wrong."""

    name = "cupy"
    sum_factor: float = 1.0
    gemm_factor: float = 1.0
    bias_factor: float = 1.0

    def dtype(self, name):
        return np.dtype("float16" if name == "bfloat16" else name)

    def relu(self, x):
        return super().relu(x) * x.dtype.type(self.sum_factor)

    def gemm(self, *args, **kwargs):
        return super().gemm(*args, **kwargs) * np.float32(self.gemm_factor)

    def to_numpy(self, x):
        return x * np.float32(self.bias_factor) if x.shape == (32,) else x


def module(name: str, **members) -> types.ModuleType:
    found = types.ModuleType(name)
    vars(found).update(members)
    return found


@dataclass
class World:
    """A machine on which all is well, until a case has changed it."""

    driver: Driver | None = field(default_factory=Driver)
    wheels: tuple[str, ...] = ("cupy-cuda13x",)
    environ: dict = field(default_factory=dict)
    backend: NumpyBackend = field(default_factory=Backend)
    modules: dict = field(default_factory=dict)

    def __post_init__(self):
        nvrtc = types.SimpleNamespace(
            getVersion=lambda: (13, 2),
            createProgram=lambda *_: 1,
            compileProgram=lambda program, options: None,
        )
        runtime = types.SimpleNamespace(runtimeGetVersion=lambda: 13020)
        self.cupy = module("cupy", __version__="14.2.0", cuda=types.SimpleNamespace(nvrtc=nvrtc, runtime=runtime))
        self.modules |= {
            "cupy": self.cupy,
            "nvmath.bindings.cublas": module("cublas", get_property=lambda part: 13 - part),
        }

    def lack(self, *names):
        self.modules |= dict.fromkeys(names)

    def fail(self, owner, name, error):
        def call(*_, **__):
            raise error

        setattr(owner, name, call)


@pytest.fixture
def world(monkeypatch, tmp_path):
    """Gives the case's machine to what looks at one, once `world.enter()` is called."""
    world, load, real_version = World(), ctypes.CDLL, importlib.metadata.version
    (tmp_path / "cuda_bf16.h").touch()
    world.headers = tmp_path

    def cdll(name, *args, **kwargs):
        if name not in ("libcuda.so.1", "nvcuda.dll"):
            return load(name, *args, **kwargs)
        if world.driver is None:
            raise OSError(f"{name}: cannot open shared object file: No such file or directory")
        return world.driver

    def version(package):
        if not package.startswith("cupy"):
            return "1.0.0" if package == "nvmath-python" else real_version(package)
        if package not in world.wheels:
            raise importlib.metadata.PackageNotFoundError(package)
        return "14.2.0"

    def get_backend(name):
        if name == "cupy" and isinstance(world.backend, BaseException):
            raise world.backend
        return world.backend if name == "cupy" else NumpyBackend()

    def enter():
        pathfinder = module("cuda.pathfinder", find_nvidia_header_directory=lambda library: world.headers)
        for name, stand_in in ({"cuda.pathfinder": pathfinder} | world.modules).items():
            monkeypatch.setitem(sys.modules, name, stand_in)
        for name, value in world.environ.items():
            monkeypatch.setenv(name, value)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(ctypes, "CDLL", cdll)
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(tensorlite, "get_backend", get_backend)
    world.enter = enter
    return world


def results_of(output: str) -> dict[str, str]:
    """The outcome of every check, in the order of the lines."""
    lines = [line for line in output.splitlines() if line[:1] not in (" ", "-")]
    return {line[: examine.WIDTH].rstrip(): line[examine.WIDTH :].split()[0] for line in lines}


def page_of_advice(world):
    """As cupy/__init__.py does when one of its libraries cannot be loaded."""

    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise ImportError("\n=====\nFailed to import CuPy.\n\nIf you ...\n=====\n") from ImportError(
                "libX.so: gone"
            )

    world.modules["cupy"] = Broken("cupy")


class UnprintableError(Exception):
    def __str__(self):
        raise RuntimeError("no message")


CASES = {
    # what is changed, the checks it makes bad, and what the last line then says
    "all is well": (lambda w: None, {}, [WORKS]),
    "no CuPy": (
        lambda w: (w.lack("cupy", "nvmath.bindings.cublas"), setattr(w, "wheels", ())),
        {"CuPy": "missing", "nvmath-python": "missing"},
        ["not work here: CuPy missing, nvmath-python missing; run", CUDA13],
    ),
    "no CuPy, CUDA 12": (
        lambda w: (w.lack("cupy"), setattr(w, "wheels", ()), setattr(w.driver, "newest", 12040)),
        {"CuPy": "missing"},
        [CUDA12],
    ),
    "no driver": (
        lambda w: setattr(w, "driver", None),
        {"NVIDIA driver": "missing"},
        ["NVIDIA driver missing (", "cannot open", "install the NVIDIA driver", "--gpus all", "WSL"],
    ),
    "neither": (
        lambda w: (setattr(w, "driver", None), w.lack("cupy"), setattr(w, "wheels", ())),
        {"NVIDIA driver": "missing", "CuPy": "missing"},
        ["NVIDIA driver missing, CuPy missing; install the NVIDIA driver", "; then run, ", CUDA13],
    ),
    "driver of CUDA 11": (
        lambda w: setattr(w.driver, "newest", 11080),
        {"NVIDIA driver": "failed", "CuPy": "failed"},
        ["update the NVIDIA driver", "cuda12"],
    ),
    "no device": (lambda w: setattr(w.driver, "init", 100), {"GPU": "failed"}, ["NO_DEVICE", "--gpus all"]),
    "hidden devices": (
        lambda w: (setattr(w.driver, "init", 100), w.environ.update(CUDA_VISIBLE_DEVICES="-1")),
        {"GPU": "failed"},
        ["CUDA_VISIBLE_DEVICES is '-1'", "run: unset CUDA_VISIBLE_DEVICES"],
    ),
    "driver updated while running": (
        lambda w: setattr(w.driver, "init", 803), {"GPU": "failed"}, ["SYSTEM_DRIVER_MISMATCH", "restart the machine"]
    ),
    "driver error without a name": (lambda w: setattr(w.driver, "init", 7), {"GPU": "failed"}, ["cuInit: error 7"]),
    "driver older than the wheel": (
        lambda w: setattr(w.driver, "newest", 12040),
        {"CuPy": "failed"},
        ["cupy-cuda13x is too new for this machine: a driver for CUDA up to 12.4",
         'pip uninstall -y cupy-cuda13x && pip install -e ".[cuda12]"'],
    ),
    "driver newer than the wheel": (lambda w: setattr(w, "wheels", ("cupy-cuda12x",)), {}, [WORKS]),
    "device that CUDA 13 dropped": (
        lambda w: setattr(w.driver, "capability", 70),
        {"CuPy": "failed"},
        ["compute capability 7.0", 'pip uninstall -y cupy-cuda13x && pip install -e ".[cuda12]"'],
    ),
    "two wheels": (
        lambda w: setattr(w, "wheels", ("cupy-cuda12x", "cupy-cuda13x")),
        {"CuPy": "failed"},
        ["cupy-cuda12x and cupy-cuda13x are installed over each other",
         'repository: pip uninstall -y cupy-cuda12x cupy-cuda13x && pip install -e ".[cuda13]"'],
    ),
    "remains of a wheel": (
        lambda w: delattr(w.cupy, "__version__"),
        {"CuPy": "failed"},
        ["AttributeError", 'pip uninstall -y cupy-cuda13x && pip install -e ".[cuda13]"'],
    ),
    "CuPy built from source": (lambda w: setattr(w, "wheels", ("cupy",)), {}, [WORKS]),
    "CuPy without a library": (page_of_advice, {"CuPy": "failed"}, ["CuPy failed (ImportError: libX.so: gone); run, "]),
    "no NVRTC": (
        lambda w: w.fail(w.cupy.cuda.nvrtc, "getVersion", RuntimeError('Failure finding "libnvrtc.so.13"\nand so on')),
        {"NVRTC": "failed"},
        ['NVRTC failed (RuntimeError: Failure finding "libnvrtc.so.13"); run', CUDA13],
    ),
    "no CUDA headers": (
        lambda w: setattr(w, "headers", None),
        {"CUDA headers": "missing"},
        [f"{WORKS}, in float32 only: CUDA headers missing (", CUDA13],
    ),
    "no ml_dtypes": (lambda w: w.lack("ml_dtypes"), {"ml_dtypes": "missing"}, ["in float32 only", CUDA13]),
    "no bfloat16": (lambda w: setattr(w.driver, "capability", 75), {"bfloat16": "failed"}, ["in float32 only"]),
    "no nvmath": (
        lambda w: w.lack("nvmath.bindings.cublas"), {"nvmath-python": "missing"}, ["nvmath-python missing (", CUDA13]
    ),
    "no cuBLAS": (
        lambda w: w.fail(w.modules["nvmath.bindings.cublas"], "get_property", OSError("libcublas.so.13: cannot open")),
        {"cuBLAS": "failed"},
        ["cuBLAS failed (OSError: libcublas.so.13: cannot open)", CUDA13],
    ),
    "driver CuPy refuses": (
        lambda w: setattr(w, "backend", BackendError("no usable GPU (cudaErrorInsufficientDriver: CUDA driver ver")),
        {"kernel": "failed"},
        ["kernel failed (BackendError: no usable", "update the NVIDIA driver to one for CUDA 13"],
    ),
    "wrong kernel": (
        lambda w: setattr(w, "backend", Backend(sum_factor=2)),
        {"kernel": "failed"},
        ["kernel failed (expected 4, got 8; 658 of 1536 values are wrong); use --backend numpy"],
    ),
    "wrong product": (
        lambda w: setattr(w, "backend", Backend(gemm_factor=1.01)), {"product": "failed"}, ["values are wrong)"]
    ),
    "product of NaN": (
        lambda w: setattr(w, "backend", Backend(gemm_factor=np.nan)), {"product": "failed"}, ["got nan"]
    ),
    "wrong gradients": (
        lambda w: setattr(w, "backend", Backend(bias_factor=1.01)), {"gradients": "failed"}, ["gradients failed ("]
    ),
    "no graph": (
        lambda w: w.fail(w.backend, "replayable", RuntimeError("cudaErrorStreamCaptureUnsupported")),
        {"CUDA graph": "failed"},
        [f"{WORKS}, with --no-graph only: CUDA graph failed (RuntimeError: cudaErrorStream"],
    ),
    "a graph that does nothing": (
        lambda w: setattr(w.backend, "replayable", lambda function: lambda: None),
        {"CUDA graph": "failed"},
        [f"{WORKS}, with --no-graph only: CUDA graph failed (expected", "got 0"],
    ),
    "no graph and no ml_dtypes": (
        lambda w: (w.lack("ml_dtypes"), setattr(w.backend, "replayable", lambda function: lambda: None)),
        {"CUDA graph": "failed", "ml_dtypes": "missing"},
        [f"{WORKS}, in float32 only and with --no-graph only: ml_dtypes missing, CUDA graph failed; run, "],
    ),
    "a library that exits": (
        lambda w: setattr(w, "backend", SystemExit(3)), {"kernel": "failed"}, ["kernel failed (SystemExit: 3)"]
    ),
    "an error without a message": (
        lambda w: setattr(w, "backend", UnprintableError()), {"kernel": "failed"}, ["(UnprintableError); use"]
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "bad", "said"), CASES.values(), ids=CASES)
def test_what_is_said_of_a_machine(world, capsys, change, bad, said):
    change(world)
    world.enter()
    status = examine.examine()
    out, err = capsys.readouterr()
    *_, last = out.splitlines()
    outcomes = results_of(out)
    assert [*outcomes] == [check.name for check in CHECKS]
    assert {name: outcome for name, outcome in outcomes.items() if outcome in ("missing", "failed")} == bad
    for check in CHECKS:
        needs_are_good = all(outcomes[name] == "ok" for name in check.needs)
        assert (outcomes[check.name] == "skipped") == (not needs_are_good)
    assert last.startswith("--backend cupy ")
    assert [text for text in said if text not in last] == []
    assert status == (0 if last.startswith(WORKS) else 1)
    assert err == ""


def test_what_is_said_of_a_machine_where_all_is_well(world, capsys):
    world.enter()
    assert examine.examine() == 0
    out = capsys.readouterr().out
    for line in (
        f"Python         ok       {sys.version.split()[0]} on ",
        "NVIDIA driver  ok       supports CUDA up to 13.1",
        "GPU            ok       NVIDIA H200, compute capability 9.0, 140.0 GiB",
        "CuPy           ok       14.2.0 (cupy-cuda13x), CUDA runtime 13.2",
        "cuBLAS         ok       13.12.11",
    ):
        assert f"\n{line}" in f"\n{out}"
    assert out.endswith(f"\n{WORKS}\n")


def test_the_checks_pass_on_the_stand_in_for_cupy(world, device, monkeypatch, capsys):
    """Which refuses what CuPy and a recorded graph refuse."""
    recordings, end_capture = [], Stream.end_capture
    monkeypatch.setattr(Stream, "end_capture", lambda stream: recordings.append(end_capture(stream)) or recordings[-1])
    world.backend = device
    world.enter()
    examine.examine()
    assert capsys.readouterr().out.endswith(f"\n{WORKS}\n")
    assert len(recordings) == 1


def test_ctrl_c_is_no_finding():
    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        examine.attempt(Check("stop", stop), Machine())


def doctor_process(path=""):
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(path), os.environ.get("PYTHONPATH"))))}
    command = [sys.executable, "-m", "tensorlite.doctor"]
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert "Traceback" not in result.stdout + result.stderr
    return result


def test_this_machine():
    result = doctor_process()
    *lines, last = result.stdout.splitlines()
    assert [*results_of("\n".join(lines))] == [check.name for check in CHECKS]
    assert last.startswith("--backend cupy ")
    assert result.returncode == (0 if last.startswith(WORKS) else 1)
    if importlib.util.find_spec("cupy") is None:
        assert "CuPy missing" in last
        assert "pip install -e" in last


def test_a_library_that_ends_the_process_gets_a_verdict_too(tmp_path):
    (tmp_path / "ml_dtypes.py").write_text("import os; os._exit(77)")
    result = doctor_process(tmp_path)
    last = "does not work here: what comes after the last line crashed with exit status 77; use --backend numpy"
    assert result.stdout.splitlines()[-1] == f"--backend cupy {last}"
    assert result.returncode == 1


def test_a_reader_that_goes_early_is_no_error():
    command = [sys.executable, "-m", "tensorlite.doctor"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_usage_errors_have_a_status_of_their_own(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["doctor", "--nope"])
    with pytest.raises(SystemExit) as stop:
        __main__.main()
    assert stop.value.code == 2
    assert "unrecognized arguments: --nope" in capsys.readouterr().err


def test_nothing_is_imported_from_the_current_folder(tmp_path):
    """What -m makes of the command's own process is Python's; of those that it starts it is ours."""
    for name in ("cupy", "nvmath", "ml_dtypes", "threadpoolctl"):
        (tmp_path / f"{name}.py").write_text("print('planted')")
    env = os.environ | {"PYTHONPATH": str(Path(tensorlite.__file__).parents[1])}
    command = [sys.executable, "-m", "tensorlite.doctor"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert f"in {Path(tensorlite.__file__).parent}\n" in done.stdout
    assert "planted" not in done.stdout
