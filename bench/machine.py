"""What a result was measured on."""

import datetime
import json
import platform
from importlib import metadata
from pathlib import Path

import numpy as np


def write_results(path: Path | None, gpu: dict | None = None, **results) -> None:
    """Write them into a JSON file, if there is to be one, with what they were measured on; gpu: gpu_facts()."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": machine() | (gpu or {}), **results}, indent=2) + "\n")


def gpu_facts(backend) -> dict:
    """The GPU of a CupyBackend and what drives it."""
    cupy = backend.xp
    runtime = cupy.cuda.runtime
    return {
        "gpu": runtime.getDeviceProperties(runtime.getDevice())["name"].decode(),
        "cupy": cupy.__version__,
        "cuda": runtime.runtimeGetVersion(),
        "driver_cuda": runtime.driverGetVersion(),  # the newest CUDA that the driver supports
    }


def machine() -> dict:
    """Processor, cores, versions and date."""
    from gpt.device import physical_cores

    versions = {}
    for package in ("numpy", "torch"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return {
        "cpu": cpu_name(),
        "cores": physical_cores(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **versions,
        "blas": f"{blas['name']} {blas['version']}",
        "date": datetime.date.today().isoformat(),
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def memory_mb(pid: int) -> float:
    """What a process and its children hold, where memory that several of them share counts once (Linux). The code of
    libraries counts in full, though other programs may share it by chance."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    code = sum(int(line.split()[1]) for line in status if line.startswith("RssFile:")) / 1024
    return code + data_mb(pid)


def data_mb(pid: int) -> float:
    """The same without what is mapped from files."""
    process = Path(f"/proc/{pid}")
    rollup = (process / "smaps_rollup").read_text().splitlines()
    own = sum(int(line.split()[1]) for line in rollup if line.startswith(("Pss_Anon:", "Pss_Shmem:"))) / 1024
    children = (process / f"task/{pid}/children").read_text().split()
    return own + sum(data_mb(int(child)) for child in children)
