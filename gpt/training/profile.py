"""Where the time and the memory of training steps go: `train.py --profile STEPS`."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from gpt.config import Config
from gpt.device import Device
from gpt.errors import UserError
from gpt.files import atomic_write, explained, open_regular, try_write
from gpt.terminal import say
from gpt.training.initial import Initial
from gpt.training.start import prepared
from gpt.training.trainer import Trainer
from tensorlite import backend_of
from tensorlite.tools import profile
from tensorlite.tools.trace import OURS, trace_text

TRACE = Path("trace.json")
WARM_UP = 2  # steps before, of which the first ones make what the others find


def profile_steps(config: Config, device: Device, initial: Initial | None, steps: int) -> int:
    """Print a profile of the plain steps that such a run would begin with, and write TRACE. Nothing else is written."""
    check_trace(TRACE)
    cpu = device.backend == "numpy"
    config, dataset, model = prepared(config, replace(device, threads=1 if cpu else None), initial)
    # On a GPU a batch is not cut, as in GPUTrainer.
    train = config.train if cpu else replace(config.train, micro_batch_size=0)
    backend = backend_of(model.token_table.data)
    backend.tune_allocator()
    how = "with one thread of BLAS" if cpu else "without a CUDA graph"
    counted = f"{steps} plain step{'s' if steps > 1 else ''}"
    say(f"profile of {counted} in one process, {how}, after {WARM_UP} to warm up; {backend.describe()}")
    with threadpool_limits(1, user_api="blas"), np.errstate(all="ignore"), Trainer(model, dataset, train) as trainer:
        for _ in range(WARM_UP):
            trainer.train_step()
        with profile(model) as p:
            for _ in range(steps):
                trainer.train_step()
    for line in p.table().splitlines():
        say(line)
    atomic_write(TRACE, trace_text(p))
    say(f"trace: {TRACE}, to be opened in https://ui.perfetto.dev")
    return 0


def check_trace(path: Path) -> None:
    """UserError for a file that is no trace of ours, or one that could not be written."""
    try_write(path)
    if path.exists():
        with explained("read", path), os.fdopen(open_regular(path), "rb") as file:
            if file.read(len(OURS)) != OURS.encode():
                raise UserError(f"{path} is there and no trace of ours: move it, or go to another folder")
