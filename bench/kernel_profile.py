"""Where the time of a training step on a GPU goes, kernel by kernel: python bench/kernel_profile.py gpt2

A step in bfloat16 is launched without a graph, each of our kernels and products between two of CUDA's events. With
--ncu Nsight Compute runs every kernel by itself instead, and also counts the bytes that memory moved. All rows go to
--out/profile-gpu-*.json; the longest are printed.
"""

import argparse
import csv
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from machine import gpu_facts, write_results
from train_step import device_trainer
from turns import ROOT, preset_config

from gpt.device import Device
from gpt.errors import UserError
from tensorlite import BackendError, get_backend

SHOWN = 9  # rows that are printed
METRICS = "gpu__time_duration.sum", "dram__bytes_read.sum", "dram__bytes_write.sum"
NCU = (
    "ncu", "--csv", "--page", "raw", "--print-units", "base", "--profile-from-start", "off", "--clock-control", "none",
    "--cache-control", "none", "--metrics", ",".join(METRICS),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset")
    parser.add_argument("--ncu", action="store_true", help="by Nsight Compute instead of CUDA's events")
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="folder (default: runs/gpu)")
    parser.add_argument("--one-step", action="store_true", help=argparse.SUPPRESS)  # what ncu watches
    args = parser.parse_args()
    try:
        backend = get_backend("cupy")
        if args.one_step:
            one_step(args.preset)
            return
        name, title, rows = profile_by_ncu(args) if args.ncu else profile_by_events(args)
    except (UserError, BackendError) as error:
        sys.exit(str(error))
    print(format_profile(title, rows[:SHOWN]))
    write_results(args.out / f"profile-gpu-{name}.json", gpu_facts(backend), title=title, results=rows)


def step_on_gpu(preset: str):
    """(trainer, backend): a trainer in bfloat16 that has done a few steps without a graph. Its `_train()` is what a
    graph captures: the step but for the upload of its batch's places."""
    trainer = device_trainer(preset_config(preset), Device("cupy", "bfloat16", graph=False))
    for _ in range(3):
        trainer.train_step()
    return trainer, trainer.flat.backend


# -- by events --


def profile_by_events(args: argparse.Namespace) -> tuple[str, str, list[dict]]:
    """(name of the results, title, rows)."""
    trainer, backend = step_on_gpu(args.preset)
    cuda, gemm = backend.xp.cuda, backend._gemm
    rng, backend.tf32 = np.random.default_rng(0), False
    a, b, out = (backend.asarray(rng.standard_normal((8192, 8192), np.float32)) for _ in range(3))

    def mark():
        event = cuda.Event()
        event.record()
        return event

    def elapsed(start, end) -> float:
        end.synchronize()
        return 1e-3 * cuda.get_elapsed_time(start, end)

    def keep_busy() -> None:
        for _ in range(8):  # some 20 ms each
            gemm(a, b, out=out)

    rows, seconds = profile(trainer, mark, elapsed, keep_busy, 1 if args.quick else 5)
    title = (
        f"{args.preset}, bfloat16: the kernels of a step, which takes {1e3 * seconds:.2f} ms on the device; an event on"
        " either side makes each a little longer; bytes are those of the arrays"
    )
    return args.preset, title, rows


def profile(trainer, mark: Callable, elapsed: Callable, keep_busy: Callable, steps: int) -> tuple[list[dict], float]:
    """The summary of a step, kernel by kernel, and the seconds that it takes when nothing inside it is timed.

    keep_busy: gives the device work to begin with, so that it does not wait for the launching of the step.
    """

    def run() -> list[tuple]:
        marks = []
        for _ in range(steps):
            keep_busy()
            start = mark()
            trainer._train()
            marks.append((start, mark()))
        return marks

    plain = run()
    with LaunchTimes(trainer.flat.backend, mark, elapsed) as times:
        timed = run()
    step_seconds = sum(elapsed(*pair) for pair in timed) / steps
    return summarize(times.calls(), steps, step_seconds), sum(elapsed(*pair) for pair in plain) / steps


class LaunchTimes:
    """While it is entered, times every kernel of a CupyBackend's and every product, each between two marks in the
    stream. CuPy's own kernels are not seen.

    mark: sets a mark. elapsed: the seconds between two marks, once both have been passed.
    """

    def __init__(self, backend, mark: Callable, elapsed: Callable):
        self.backend, self.mark, self.elapsed = backend, mark, elapsed
        self._calls = []

    def __enter__(self) -> "LaunchTimes":
        backend, self._gemm = self.backend, self.backend._gemm
        backend._launch = self._timed(backend._launch, describe_launch)
        flash = backend._flash
        flash._launch = self._timed(flash._launch, describe_launch)
        backend._gemm = self._timed(self._gemm, describe_product)
        return self

    def __exit__(self, *exc) -> None:
        del self.backend._launch, self.backend._flash._launch
        self.backend._gemm = self._gemm

    def _timed(self, function: Callable, describe: Callable) -> Callable:
        def call(*args, **kwargs):
            name, arrays = describe(*args, **kwargs)
            start = self.mark()
            result = function(*args, **kwargs)
            moved = sum(x.nbytes for x in (*arrays, result) if isinstance(x, self.backend.xp.ndarray))
            self._calls.append((name, moved, start, self.mark()))
            return result

        return call

    def calls(self) -> list[tuple[str, int, float]]:
        """(name, bytes of the arrays it was given, seconds) of each."""
        return [(name, moved, self.elapsed(start, end)) for name, moved, start, end in self._calls]


def describe_launch(kernel, _, blocks, threads, *args, **options):
    """As of CupyBackend._launch and FlashAttention._launch: its name and the arrays among what it is given."""
    return kernel, args


def describe_product(a, b, trans_a=False, trans_b=False, out=None, accumulate=False, **_):
    """Its name and what is read; what is written is its result."""
    (m, k), n = a.shape[-2:][:: -1 if trans_a else 1], b.shape[-2 if trans_b else -1]
    batch = max(a.size // (m * k), b.size // (k * n), 1)
    name = f"product {f'{batch} x ' if batch > 1 else ''}{m} x {k} x {n}"
    return name, (a, b, out if accumulate else None)


# -- by Nsight Compute --


def profile_by_ncu(args: argparse.Namespace) -> tuple[str, str, list[dict]]:
    """(name of the results, title, rows)."""
    if not shutil.which("ncu"):
        raise UserError("ncu, of NVIDIA's Nsight Compute, is not on the PATH")
    command = [*NCU, sys.executable, __file__, args.preset, "--one-step"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    rows = summarize(ncu_calls(done.stdout), steps=1)
    if not rows:
        raise UserError(f"ncu ended with status {done.returncode} and measured no kernel; what it said is above")
    title = f"{args.preset}, bfloat16: the kernels of a step, one at a time, by ncu; bytes are those that memory moved"
    return f"{args.preset}-ncu", title, rows


def one_step(preset: str) -> None:
    """What ncu watches."""
    trainer, backend = step_on_gpu(preset)
    runtime = backend.xp.cuda.runtime
    runtime.deviceSynchronize()
    runtime.profilerStart()
    trainer._train()
    runtime.deviceSynchronize()
    runtime.profilerStop()


def ncu_calls(output: str) -> list[tuple[str, float, float]]:
    """(kernel, bytes, seconds) of each, from what ncu prints: remarks, a line of names, one of units, and the rows."""
    calls = []
    for row in csv.DictReader(line for line in output.splitlines() if line.startswith('"')):
        if row["ID"]:  # not the units'
            time_ns, read, written = (float(row[metric].replace(",", "")) for metric in METRICS)
            calls.append((row["Kernel Name"].partition("(")[0].removeprefix("void "), read + written, 1e-9 * time_ns))
    return calls


# -- the table --


def summarize(calls: Iterable[tuple[str, float, float]], steps: int, step_seconds: float | None = None) -> list[dict]:
    """A row for each name, the longest first; what is left of the step, if its time is known, last."""
    groups = defaultdict(lambda: np.zeros(3))
    for name, moved, seconds in calls:
        groups[name] += np.array((1, seconds, moved)) / steps
    measured = sum(seconds for _, seconds, _ in groups.values())

    def row(kernel: str, calls: float | None, seconds: float, moved: float | None) -> dict:
        return {
            "kernel": kernel,
            "calls": calls,
            "us": round(1e6 * seconds, 1),
            "share": round(seconds / (step_seconds or measured), 4),
            "gb_per_s": round(moved / seconds / 1e9, 1) if moved and seconds else None,
        }

    rows = [row(name, *group) for name, group in sorted(groups.items(), key=lambda item: -item[1][1])]
    rest = [row("CuPy's own kernels, and the gaps", None, step_seconds - measured, None)] if step_seconds else []
    return rows + rest


def format_profile(title: str, rows: list[dict]) -> str:
    lines = [title, f"{'kernel':60}{'calls':>8}{'us':>12}{'share':>8}{'GB/s':>9}"]
    for row in rows:
        calls, speed = ("" if row[key] is None else f"{row[key]:.0f}" for key in ("calls", "gb_per_s"))
        lines.append(f"{row['kernel'][:59]:60}{calls:>8}{row['us']:12.1f}{row['share']:8.1%}{speed:>9}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
