"""python -m tensorlite.doctor: what it says of this machine, and of machines played by stand-ins."""

import ctypes
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from strict_cuda import Stream

import tensorlite
from tensorlite import BackendError
from tensorlite.backends.numpy_backend import NumpyBackend
from tensorlite.doctor import __main__, checks, examine
from tensorlite.doctor.checks import CHECKS, Check, Machine

WORKS = "--backend cupy works here"
CUDA12, CUDA13 = (f'run, in a clone of the repository: pip install -e ".[cuda{n}]"' for n in (12, 13))


class Driver:
    """libcuda, with one device."""

    def __init__(self, newest=13010, init=0, capability=90):
        self.init = init
        self.answers = {"cuDriverGetVersion": newest, "cuDeviceGet": 0, "cuDeviceTotalMem_v2": 140 * 2**30}
        self.answers |= {"cuDeviceGetName": b"NVIDIA H200", 75: capability // 10, 76: capability % 10}

    def __getattr__(self, name):
        def call(*args):
            if name == "cuInit":
                return self.init
            if name == "cuGetErrorName":
                names = {100: b"CUDA_ERROR_NO_DEVICE", 803: b"CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"}
                args[1]._obj.value = names.get(args[0])
            else:  # what it answers goes where its first argument points
                args[0]._obj.value = self.answers[args[1] if name == "cuDeviceGetAttribute" else name]
            return 0

        return call


class Backend(NumpyBackend):
    """A GPU's, with some methods exchanged."""

    name = "cupy"

    def __init__(self, **methods):
        vars(self).update(methods)

    def dtype(self, name):
        return np.dtype("float32" if name == "bfloat16" else name)


def wrong(method: str, factor: float, of: tuple | None = None) -> dict:
    """The change by which this method's results, or those of one shape, are wrong by the factor."""
    right = getattr(NumpyBackend(), method)

    def compute(*args, **options):
        y = right(*args, **options)
        return y * np.float32(factor) if of in (None, y.shape) else y

    return {"backend": Backend(**{method: compute})}


def stop(error: BaseException):
    """A function that raises it."""

    def call(*_, **__):
        raise error

    return call


def module(name: str, **members) -> types.ModuleType:
    found = types.ModuleType(name)
    vars(found).update(members)
    return found


@pytest.fixture
def play(monkeypatch, tmp_path):
    """play(**changes): to what looks at the machine it is one on which all is well, but for the changes."""
    load, real_version = ctypes.CDLL, importlib.metadata.version
    (tmp_path / "cuda_bf16.h").touch()

    def play(
        driver=True, wheels=("cupy-cuda13x",), nvrtc=lambda: (13, 2), cublas=lambda part: 13 - part, headers=tmp_path,
        backend=None, hidden=None, modules=(), cache="", **device,
    ):  # fmt: skip
        monkeypatch.setattr(checks, "prepare_cache", lambda: (Path("/home/me/.cupy"), cache))

        def cdll(name, *args, **kwargs):
            if name not in ("libcuda.so.1", "nvcuda.dll"):
                return load(name, *args, **kwargs)
            if not driver:
                raise OSError(f"{name}: cannot open shared object file: No such file or directory")
            return Driver(**device)

        def version(package):
            if not package.startswith("cupy"):
                return "1.0.0" if package == "nvmath-python" else real_version(package)
            if package not in wheels:
                raise importlib.metadata.PackageNotFoundError(package)
            return "14.2.0"

        def get_backend(name):
            if name == "cupy" and isinstance(backend, BaseException):
                raise backend
            return (backend or Backend()) if name == "cupy" else NumpyBackend()

        compiler = module("nvrtc", getVersion=nvrtc, createProgram=lambda *_: 1, compileProgram=lambda program, how: 0)
        cuda = types.SimpleNamespace(nvrtc=compiler, runtime=module("runtime", runtimeGetVersion=lambda: 13020))
        found = {
            "cupy": module("cupy", __version__="14.2.0", cuda=cuda),
            "nvmath.bindings.cublas": module("cublas", get_property=cublas),
            "cuda.pathfinder": module("cuda.pathfinder", find_nvidia_header_directory=lambda library: headers),
        }
        for name, stand_in in (found | dict(modules)).items():
            monkeypatch.setitem(sys.modules, name, stand_in)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if hidden is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        monkeypatch.setattr(ctypes, "CDLL", cdll)
        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setattr(tensorlite, "get_backend", get_backend)

    return play


def results_of(output: str) -> dict[str, str]:
    """The outcome of every check, in the order of the lines."""
    lines = [line for line in output.splitlines() if line[:1] not in (" ", "-")]
    return {line[: examine.WIDTH].rstrip(): line[examine.WIDTH :].split()[0] for line in lines}


class BrokenCuPy(types.ModuleType):
    """Does as cupy/__init__.py does when one of its libraries cannot be loaded."""

    def __getattr__(self, name):
        raise ImportError("\n=====\nFailed to import CuPy.\n\nIf you ...\n=====\n") from ImportError("libX.so: gone")


class UnprintableError(Exception):
    def __str__(self):
        raise RuntimeError("no message")


NO_HEADERS = (  # CuPy 14's words
    "Failed to find CUDA headers. Please install CUDA toolkit headers (e.g., pip install cupy-cuda12x[ctk]) or specify "
    "CUDA_PATH environment variable."
)
NO_CUPY = {"wheels": (), "modules": {"cupy": None}}
DROPPED = ["compute capability 7.0", 'pip uninstall -y cupy-cuda13x && pip install -e ".[cuda12]"']
IDLE = Backend(replayable=lambda function: lambda: None)
CASES = {
    # what is changed, the checks it makes bad, and what the last line then says
    "all is well": ({}, "", [WORKS]),
    "no CuPy": (
        NO_CUPY | {"modules": {"cupy": None, "nvmath.bindings.cublas": None}},
        "CuPy missing, nvmath-python missing",
        ["not work here: CuPy missing, nvmath-python missing; run", CUDA13],
    ),
    "no CuPy, CUDA 12": (NO_CUPY | {"newest": 12040}, "CuPy missing", [CUDA12]),
    "no driver": (
        {"driver": False},
        "NVIDIA driver missing",
        ["NVIDIA driver missing (", "cannot open", "install the NVIDIA driver", "--gpus all", "WSL"],
    ),
    "neither": (
        NO_CUPY | {"driver": False},
        "NVIDIA driver missing, CuPy missing",
        ["NVIDIA driver missing, CuPy missing; install the NVIDIA driver", "; then run, ", CUDA13],
    ),
    "no driver, and no ml_dtypes, which is not needed": (
        {"driver": False, "modules": {"ml_dtypes": None}},
        "NVIDIA driver missing, ml_dtypes missing",
        ["does not work here: NVIDIA driver missing ("],
    ),
    "driver of CUDA 11": (
        {"newest": 11080}, "NVIDIA driver failed, CuPy failed", ["update the NVIDIA driver", "cuda12"]
    ),
    "no device": ({"init": 100}, "GPU failed", ["NO_DEVICE", "--gpus all"]),
    "driver updated while running": ({"init": 803}, "GPU failed", ["SYSTEM_DRIVER_MISMATCH", "restart the machine"]),
    "hidden devices": (
        {"init": 100, "hidden": "-1"}, "GPU failed", ["CUDA_VISIBLE_DEVICES is '-1'", "run: unset CUDA_VISIBLE_DEVICES"]
    ),
    "driver error without a name": ({"init": 7}, "GPU failed", ["cuInit: error 7"]),
    "driver older than the wheel": (
        {"newest": 12040},
        "CuPy failed",
        ["cupy-cuda13x is too new for this machine: a driver for CUDA up to 12.4", DROPPED[1]],
    ),
    "driver newer than the wheel": ({"wheels": ("cupy-cuda12x",)}, "", [WORKS]),
    "device that CUDA 13 dropped": ({"capability": 70}, "CuPy failed", DROPPED),
    "two wheels": (
        {"wheels": ("cupy-cuda12x", "cupy-cuda13x")},
        "CuPy failed",
        ["cupy-cuda12x and cupy-cuda13x are installed over each other",
         'repository: pip uninstall -y cupy-cuda12x cupy-cuda13x && pip install -e ".[cuda13]"'],
    ),
    "remains of a wheel": (
        {"modules": {"cupy": module("cupy")}},
        "CuPy failed",
        ["AttributeError", 'pip uninstall -y cupy-cuda13x && pip install -e ".[cuda13]"'],
    ),
    "CuPy built from source": ({"wheels": ("cupy",)}, "", [WORKS]),
    "CuPy without a library": (
        {"modules": {"cupy": BrokenCuPy("cupy")}}, "CuPy failed", ["CuPy failed (ImportError: libX.so: gone); run, "]
    ),
    "no NVRTC": (
        {"nvrtc": stop(RuntimeError('Failure finding "libnvrtc.so.13"\nand so on'))},
        "NVRTC failed",
        ['NVRTC failed (RuntimeError: Failure finding "libnvrtc.so.13"); run', CUDA13],
    ),
    "no CUDA headers": (
        {"headers": None}, "CUDA headers missing", ["not work here: CUDA headers missing (", "no kernel", CUDA13]
    ),
    "headers that CuPy does not find": (
        {"backend": Backend(relu=stop(RuntimeError(NO_HEADERS)))}, "kernel failed", ["kernel failed (", CUDA13]
    ),
    "headers that NVRTC does not find": (
        {"backend": Backend(relu=stop(Exception('k.cu(1): catastrophic error: could not open source file "x.h"')))},
        "kernel failed",
        ["kernel failed (", CUDA13],
    ),
    "a cache that is full": (
        {"cache": "No space left on device"},
        "kernel cache failed",
        [
            f"{WORKS}, compiling its kernels in each run: kernel cache failed (/home/me/.cupy: No space left on",
            "set CUPY_CACHE_DIR to a folder that can be written",
        ],
    ),
    "no ml_dtypes": ({"modules": {"ml_dtypes": None}}, "ml_dtypes missing", ["in float32 only", CUDA13]),
    "no bfloat16": ({"capability": 75}, "bfloat16 failed", ["in float32 only"]),
    "no nvmath": (
        {"modules": {"nvmath.bindings.cublas": None}}, "nvmath-python missing", ["nvmath-python missing (", CUDA13]
    ),
    "no cuBLAS": (
        {"cublas": stop(OSError("libcublas.so.13: cannot open"))},
        "cuBLAS failed",
        ["cuBLAS failed (OSError: libcublas.so.13: cannot open)", CUDA13],
    ),
    "driver CuPy refuses": (
        {"backend": BackendError("no usable GPU (cudaErrorInsufficientDriver: CUDA driver ver")},
        "kernel failed",
        ["kernel failed (BackendError: no usable", "update the NVIDIA driver to one for CUDA 13"],
    ),
    "wrong kernel": (
        wrong("relu", 2),
        "kernel failed",
        ["kernel failed (expected 4, got 8; 658 of 1536 values are wrong); use --backend numpy"],
    ),
    "wrong product": (wrong("gemm", 1.01), "product failed", ["values are wrong)"]),
    "product of NaN": (wrong("gemm", np.nan), "product failed", ["got nan"]),
    "wrong gradients": (wrong("to_numpy", 1.01, of=(192,)), "training failed", ["training failed ("]),
    "no sampling": (wrong("attention_of_next", 1.01), "training failed", ["training failed ("]),
    "no update": ({"backend": Backend(adamw_step=lambda *_: None)}, "training failed", ["training failed ("]),
    "no graph": (
        {"backend": Backend(replayable=stop(RuntimeError("cudaErrorStreamCaptureUnsupported")))},
        "CUDA graph failed",
        [f"{WORKS}, with --no-graph only: CUDA graph failed (RuntimeError: cudaErrorStream"],
    ),
    "a graph that does nothing": (
        {"backend": IDLE}, "CUDA graph failed", [f"{WORKS}, with --no-graph only: CUDA graph failed (expected", "got 0"]
    ),
    "no graph and no ml_dtypes": (
        {"backend": IDLE, "modules": {"ml_dtypes": None}},
        "ml_dtypes missing, CUDA graph failed",
        [f"{WORKS}, in float32 only and with --no-graph only: ml_dtypes missing, CUDA graph failed; run, "],
    ),
    "a library that exits": ({"backend": SystemExit(3)}, "kernel failed", ["kernel failed (SystemExit: 3)"]),
    "an error without a message": ({"backend": UnprintableError()}, "kernel failed", ["(UnprintableError); use"]),
}  # fmt: skip


def examined(capsys) -> tuple[int, str]:
    """The status of an examination, and what it printed."""
    status = examine.examine()
    out, err = capsys.readouterr()
    assert err == ""
    return status, out


@pytest.mark.parametrize(("changes", "bad", "said"), CASES.values(), ids=CASES)
def test_what_is_said_of_a_machine(play, capsys, changes, bad, said):
    play(**changes)
    status, out = examined(capsys)
    *_, last = out.splitlines()
    outcomes = results_of(out)
    assert [*outcomes] == [check.name for check in CHECKS]
    assert ", ".join(" ".join(item) for item in outcomes.items() if item[1] in ("missing", "failed")) == bad
    for check in CHECKS:
        needs_are_good = all(outcomes[name] == "ok" for name in check.needs)
        assert (outcomes[check.name] == "skipped") == (not needs_are_good)
    assert last.startswith("--backend cupy ")
    assert [text for text in said if text not in last] == []
    assert status == (0 if last.startswith(WORKS) else 1)


def test_what_is_said_of_a_machine_where_all_is_well(play, capsys):
    play()
    status, out = examined(capsys)
    assert status == 0
    for line in (
        f"Python         ok       {sys.version.split()[0]} on ",
        "NVIDIA driver  ok       supports CUDA up to 13.1",
        "GPU            ok       NVIDIA H200, compute capability 9.0, 140.0 GiB",
        "CuPy           ok       14.2.0 (cupy-cuda13x), CUDA runtime 13.2",
        "cuBLAS         ok       13.12.11",
    ):
        assert f"\n{line}" in f"\n{out}"
    assert out.endswith(f"\n{WORKS}\n")


def test_the_checks_pass_on_the_stand_in_for_cupy(play, device, monkeypatch, capsys):
    """Which refuses what CuPy and a captured graph refuse."""
    graphs, end_capture = [], Stream.end_capture
    monkeypatch.setattr(Stream, "end_capture", lambda stream: graphs.append(end_capture(stream)) or graphs[-1])
    play(backend=device)
    assert examined(capsys)[1].endswith(f"\n{WORKS}\n")
    assert len(graphs) == 1


def test_ctrl_c_is_no_finding():
    with pytest.raises(KeyboardInterrupt):
        examine.attempt(Check("stop", stop(KeyboardInterrupt())), Machine())


COMMAND = [sys.executable, "-m", "tensorlite.doctor"]


def doctor_process(**options):
    result = subprocess.run(COMMAND, capture_output=True, text=True, timeout=300, **options)
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
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    result = doctor_process(env=os.environ | {"PYTHONPATH": path})
    last = "does not work here: what comes after the last line crashed with exit status 77; use --backend numpy"
    assert result.stdout.splitlines()[-1] == f"--backend cupy {last}"
    assert result.returncode == 1


def test_a_reader_that_goes_early_is_no_error():
    with subprocess.Popen(COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
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
    package = Path(tensorlite.__file__).parent
    done = doctor_process(cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(package.parent)})
    assert f"in {package}\n" in done.stdout
    assert "planted" not in done.stdout
