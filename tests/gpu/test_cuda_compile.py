"""Every kernel file compiled for GPUs by nvcc, or else NVRTC: without a warning, with all variables in registers, and
with no more shared memory of its own than the launcher thinks.

It needs no GPU. What the kernels compute is shown by running them on the CPU (cuda_on_cpu.py).
"""

import itertools
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import tensorlite.backends
from tensorlite.backends.cuda.card import OWN_BYTES

FOLDER = Path(tensorlite.backends.__file__).with_name("cuda")
COMMON = FOLDER / "common.cuh"
SOURCES = sorted(FOLDER.glob("*.cu"))
STORAGES = ("-DSTORAGE=64", "-DSTORAGE=32", "-DSTORAGE=16")
HEAD_DIMS = ("-DHEAD_DIM=32", "-DHEAD_DIM=64", "-DHEAD_DIM=128")  # for the files that ask for one
ARCHITECTURES = (80, 90)  # A100, H100

OPTIONS = ("-std=c++17", "--ptxas-options=-v")
NVCC = shutil.which("nvcc")
# CuPy compiles with NVRTC, where these are missing. nvcc has them without being asked, and so may g++.
OF_HEADERS = re.compile(
    r"#\s*include|\bstd::|\bu?int(8|16|32|64|ptr)_t\b|\b(INFINITY|NAN|FLT_\w+|DBL_\w+|INT_MAX|printf|assert)\b"
)


def nvcc(code: str, defines: tuple[str, ...], folder: Path) -> str:
    """What the compiler says of the code."""
    source = folder / f"{'_'.join(defines)}.cu"
    source.write_text(code)
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    command = [NVCC, "-fatbin", *targets, *OPTIONS, *defines, str(source), "-o", str(source.with_suffix(".fatbin"))]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


def nvrtc(code: str, defines: tuple[str, ...], folder: Path) -> str:
    """The same from the compiler that CuPy uses, through its binding; CuPy's own function would ask for a device."""
    from cupy_backends.cuda.libs import nvrtc as library

    said = ""
    for architecture in ARCHITECTURES:
        program = library.createProgram(code, "kernels.cu", (), ())
        try:
            library.compileProgram(program, (f"-arch=sm_{architecture}", *OPTIONS, *defines))
        except library.NVRTCError as error:
            raise AssertionError(f"{error}: {library.getProgramLog(program)}") from None
        said += library.getProgramLog(program)
        library.destroyProgram(program)
    return said


@pytest.fixture(scope="module")
def compile_():
    """Whichever compiler there is."""
    if NVCC:
        return nvcc
    try:
        from cupy_backends.cuda.libs import nvrtc as library

        library.getVersion()
    except Exception as error:  # whatever is missing, or does not fit the rest
        pytest.skip(f"there is neither nvcc nor CuPy with NVRTC to compile the kernels ({error})")
    return nvrtc


def test_there_are_kernels():
    assert SOURCES


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_compiles_to_registers(source, compile_, tmp_path):
    code = f"{COMMON.read_text()}\n{source.read_text()}"
    variants = [*itertools.product(STORAGES, HEAD_DIMS)] if "HEAD_DIM" in code else [(s,) for s in STORAGES]
    with ThreadPoolExecutor(2) as pool:
        logs = list(pool.map(lambda defines: compile_(code, defines, tmp_path), variants))
    found = 0
    for defines, log in zip(variants, logs, strict=True):
        assert "warning" not in log.lower(), f"{defines}: {log}"
        kernels = re.findall(r"Compiling entry function '(\w+)' for '(\w+)'", log)
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
        assert len(frames) >= len(kernels)
        assert set(sum(frames, ())) <= {"0"}, f"{defines}: {log}"
        assert all(int(own) <= OWN_BYTES for own in re.findall(r"(\d+) bytes smem", log))
        found += len(kernels)
    assert found, "a file without a kernel, for whichever storage"


@pytest.mark.parametrize("source", [COMMON, *SOURCES], ids=lambda path: path.name)
def test_needs_no_headers(source):
    lines = [line.split("//")[0] for line in source.read_text().splitlines()]
    assert not [(i, line) for i, line in enumerate(lines, 1) if OF_HEADERS.search(line)]
