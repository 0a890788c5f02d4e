"""How full a step's kernels let a GPU be: their registers and shared memory, as nvcc compiles them, and what those
allow. Counted without a GPU: bench/gpu_parts.py occupancy."""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import strict_cuda

from gpt.errors import UserError

WARP = 32
COMPILED = re.compile(
    r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?Used (\d+) registers(?:.*?(\d+) bytes smem)?", re.S
)


class Multiprocessor(NamedTuple):
    """What one has: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability". Each has 65,536
    registers, in four parts, from which a warp takes 256 at a time; of shared memory, in steps of 128 bytes, a block
    takes 1 KiB for itself."""

    warps: int
    blocks: int
    shared: int

    def occupancy(self, threads: int, registers: int, shared: int) -> float:
        """The share of its warps that blocks of so many threads, with so many registers each and so much shared memory
        in all, can fill."""
        warps = -(-threads // WARP)
        by_registers = 4 * (16384 // (-(-registers * WARP // 256) * 256)) // warps
        by_shared = self.shared // (1024 + -(-shared // 128) * 128)
        return min(self.blocks, self.warps // warps, by_registers, by_shared) * warps / self.warps


MULTIPROCESSORS = {
    "80": Multiprocessor(64, 32, 164 << 10),
    "89": Multiprocessor(48, 24, 100 << 10),
    "90": Multiprocessor(64, 32, 228 << 10),
}


def occupancies(launches: Iterable[strict_cuda.Launch]) -> list[dict]:
    """A row for each of our kernels and each size of its blocks, by name."""
    if not (nvcc := shutil.which("nvcc")):
        raise UserError("nvcc, of the CUDA toolkit, is not on the PATH: it tells how many registers a kernel takes")
    compiled, rows = {}, {}
    for launch in launches:
        if launch.kernel is None:
            continue
        function, threads, dynamic = launch.kernel
        if function.source not in compiled:
            compiled[function.source] = resources(nvcc, *function.source)
        row = {"kernel": launch.name, "threads": threads, "dynamic": dynamic}
        for sm, (registers, own) in compiled[function.source][launch.name].items():
            share = MULTIPROCESSORS[sm].occupancy(threads, registers, own + dynamic)
            row[sm] = {"registers": registers, "shared": own + dynamic, "occupancy": round(share, 3)}
        rows[launch.name, threads, dynamic] = row
    return [rows[key] for key in sorted(rows)]


def resources(nvcc: str, code: str, options: tuple[str, ...]) -> dict[str, dict[str, tuple[int, int]]]:
    """Kernel -> compute capability -> (registers of a thread, bytes of the shared memory that it declares)."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernels.cu"
        source.write_text(code)
        targets = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in MULTIPROCESSORS]
        command = [nvcc, "-fatbin", *targets, "--ptxas-options=-v", *options, str(source), "-o", f"{source}.fatbin"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise UserError(f"nvcc refuses the kernels: {done.stdout}")
    return parsed(done.stdout)


def parsed(said: str) -> dict[str, dict[str, tuple[int, int]]]:
    """The same from what nvcc says."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for part in re.split("(?=Compiling entry function)", said):
        if match := COMPILED.search(part):
            name, sm, registers, own = match.groups()
            found.setdefault(name, {})[sm] = int(registers), int(own or 0)
    return found
