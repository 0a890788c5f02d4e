"""Where a model is computed and in which precision: the options that belong to the machine, not to the run."""

import argparse
import math
import os
from dataclasses import dataclass, fields
from pathlib import Path

from gpt.errors import UserError
from gpt.models.kinds import MODEL_KINDS, no_effect
from gpt.models.language_model import LanguageModel
from gpt.terminal import warn
from tensorlite import get_backend
from tensorlite.backends import BACKENDS


@dataclass(frozen=True)
class Device:
    """What those options say; None for one that was left out and has no default here.

    UserError for one that has no effect, BackendError if the backend cannot run here.
    """

    backend: str = "numpy"
    dtype: str = "float32"
    tf32: bool | None = None
    graph: bool | None = None
    threads: int | None = None

    def __post_init__(self):
        gpu_only = {"--tf32": self.tf32, "--graph": self.graph}
        given = [
            name if value else name.replace("--", "--no-") for name, value in gpu_only.items() if value is not None
        ]
        if self.backend == "numpy" and given:
            raise UserError(f"{given[0]} has no effect on the CPU: leave it out, or add --backend cupy")
        if self.backend != "numpy" and self.threads is not None:
            raise UserError("--threads has no effect on a GPU: leave it out")
        if self.threads is not None and self.threads < 1:
            raise UserError(f"--threads must be at least 1, got {self.threads}")
        if self.tf32 is not None and self.dtype == "bfloat16":
            raise UserError("--tf32 and --no-tf32 are about float32: leave them out with bfloat16")
        backend = get_backend(self.backend)
        backend.dtype(self.dtype)
        if self.dtype == "bfloat16" and backend.emulates_bfloat16:
            warn(f"{backend.describe()} has no bfloat16 of its own and is slow in it: --dtype float32 is faster")

    @property
    def cores(self) -> int:
        """How many CPU cores to train on, at most those that there are."""
        return min(self.threads, os.cpu_count() or 1) if self.threads else physical_cores()

    def options(self) -> str:
        """The options that ask for this device, each after a space."""
        given = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        forms = [("--{}" if value else "--no-{}") if isinstance(value, bool) else "--{} {}" for _, value in given]
        return "".join(" " + form.format(*option) for form, option in zip(forms, given, strict=True))

    def place(self, model: LanguageModel, kind: str) -> LanguageModel:
        """Move the model, of that kind, here, to compute as the options say."""
        if self.dtype != "float32" and "dtype" in MODEL_KINDS[kind].ignored:
            raise no_effect("dtype", kind)
        backend = get_backend(self.backend)
        if self.backend != "numpy":
            backend.tf32, backend.graph = self.tf32 is not False, self.graph is not False
        model.to(self.backend)
        model.compute_dtype = None if self.dtype == "float32" else backend.dtype(self.dtype)
        return model


def add_device_options(parser: argparse.ArgumentParser, threads: bool) -> None:
    """The options of a Device; --threads only if it is asked for."""
    option, switch = parser.add_argument_group("device").add_argument, argparse.BooleanOptionalAction
    option("--backend", choices=BACKENDS, default="numpy", help="numpy: the CPU; cupy: a GPU (default: %(default)s)")
    option("--dtype", choices=("float32", "bfloat16"), default="float32",
           help="of activations and products; bfloat16 on a GPU only (default: %(default)s)")  # fmt: skip
    option("--tf32", action=switch, help="on a GPU, round the factors of float32 products to TF32 (default: yes)")
    option("--graph", action=switch, help="on a GPU, capture each step once as a CUDA graph (default: yes)")
    if threads:
        option("--threads", type=int, metavar="N", help="CPU cores to use (default: the physical ones)")


def physical_cores() -> int:
    """The cores this process may run on, hyper-threads not counted, where that can be found out."""
    try:
        cpus = os.sched_getaffinity(0)
        topology = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
        return len({Path(topology.format(cpu)).read_text() for cpu in cpus})
    except (AttributeError, OSError):  # not Linux
        return math.ceil((os.cpu_count() or 1) / 2)
