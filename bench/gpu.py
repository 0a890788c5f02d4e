"""Find out all there is to know on a machine with an NVIDIA GPU, the most important first.

    python bench/gpu.py                                   everything
    python bench/gpu.py --only doctor agreement step-char --minutes 9
    python bench/gpu.py --quick                           the same, each part as short as can be: does it all work?

    doctor          whether the backend works here at all
    agreement       losses step by step against the CPU's from the same seed; is a recorded step the same to the bit?
    tests           pytest -m gpu
    step-...        training steps against torch's (bench/train_step.py), and ours without a graph
    profile-...     where the time of a step goes, kernel by kernel, by CUDA's events
    training        a whole run of train.py, to its best validation loss
    generate        tokens per second of sampling, against torch's
    ncu-...         kernel by kernel once more, by Nsight Compute, which also counts the bytes that memory moved

A part runs in a process of its own, within a limit of time, and what it finds stays whatever becomes of the others: its
results in --out/*-gpu*.json, for bench/report.py, and all that it printed in --out/logs/. Where torch has no GPU, our
own numbers are measured without it, as with --alone.
"""

import argparse
import csv
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from machine import gpu_facts, write_results
from train_step import device_trainer
from turns import ROOT, ask, preset_config, serve, start_worker, stop, time_queued_calls, torch_problem

from gpt.config import Config
from gpt.data import load_text, make_dataset
from gpt.device import Device
from gpt.device_trainer import DeviceTrainer
from gpt.errors import UserError
from gpt.generate import sample_tokens
from gpt.model import build_model
from gpt.tokenizer import make_tokenizer
from gpt.trainer import Trainer
from tensorlite import BackendError, get_backend

TAIL = 12  # lines that are shown of what a part printed


def main() -> None:
    args = parse_arguments()
    if args.inside or args.worker:
        try:
            INSIDE[args.inside](args) if args.inside else serve(sampling_turn(args))
        except (UserError, BackendError) as error:
            sys.exit(str(error))
        return
    problem = None if args.alone else torch_problem()
    if problem:
        print(f"{problem}: only our side is measured")
        args.alone = True
    chosen = [part for part in all_parts(args) if any(part.name.startswith(name) for name in args.only or [""])]
    if not chosen:
        sys.exit(f"--only: no such part; there are {', '.join(part.name for part in all_parts(args))}")
    sys.exit(run_all(chosen, args.out, 60 * args.minutes))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="the parts whose names begin so (default: all)")
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--alone", action="store_true", help="our side only, without torch's")
    parser.add_argument("--minutes", type=float, default=60.0, help="in all, at most (default: %(default)g)")
    parser.add_argument("--data", metavar="FILE", help="text to train on (default: what train.py finds)")
    parser.add_argument("--out", type=Path, help="folder (default: bench/results, with --quick runs/gpu-quick)")
    for name in ("--inside", "--worker", "--preset"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out = (args.out or ROOT / ("runs/gpu-quick" if args.quick else "bench/results")).absolute()
    args.data = args.data and str(Path(args.data).absolute())
    return args


# -- the parts --


@dataclass(frozen=True)
class Part:
    name: str
    seconds: float  # its limit
    command: list[str]


def all_parts(args: argparse.Namespace) -> list[Part]:
    """Every part, the most important first."""
    char, gpt2, bf16, launched = "shakespeare-char", "gpt2", ("--dtype", "bfloat16"), ("--alone", "--no-graph")

    def step(name: str, preset: str, *options: str) -> Part:
        command = [str(ROOT / "bench" / "train_step.py"), "--preset", preset, "--backend", "cupy", *options]
        command += ["--rounds", "1", "--seconds", "0.2"] if args.quick else ["--rounds", "5", "--seconds", "1"]
        command += ["--json", str(args.out / f"train_step-gpu-{name}.json")]
        return Part(f"step-{name}", 240, command + (["--alone"] if args.alone and "--alone" not in options else []))

    def inside(name: str, seconds: float, preset: str | None = None) -> Part:
        command = [__file__, "--inside", name.split("-")[0], "--out", str(args.out)]
        command += ["--preset", preset] if preset else []
        command += ["--data", args.data] if args.data else []
        command += [option for option in ("--quick", "--alone") if getattr(args, option[2:])]
        return Part(name, seconds, command)

    parts = [
        Part("doctor", 120, ["-m", "tensorlite.doctor"]),
        inside("agreement", 150, "nanogpt-cpu"),
        inside("tests", 300),
        step("char", char, *bf16),
        step("char-compile", char, *bf16, "--compile"),
        step("char-tf32", char, "--tf32"),
        step("char-launched", char, *bf16, *launched),
        step("char-tf32-launched", char, "--tf32", *launched),
        inside("profile-char", 120, char),
        step("gpt2", gpt2, *bf16),
        step("gpt2-compile", gpt2, *bf16, "--compile"),
        step("gpt2-launched", gpt2, *bf16, *launched),
        inside("profile-gpt2", 120, gpt2),
        inside("training", 400, char),
        inside("generate", 150, char),
        inside("ncu-char", 200, char),
        inside("ncu-gpt2", 200, gpt2),
        step("gpt2-50304", "gpt2-50304", *bf16),
        step("gpt2-50304-compile", "gpt2-50304", *bf16, "--compile"),
    ]
    return [part for part in parts if not (args.alone and "--compile" in part.command)]


def run_all(parts: list[Part], out: Path, seconds: float) -> int:
    """Run the parts, print a summary, and return the exit status: 0 if all went well."""
    end, summary = time.monotonic() + seconds, []
    (out / "logs").mkdir(parents=True, exist_ok=True)
    for part in parts:
        left = end - time.monotonic()
        if left < 5:
            summary.append((part.name, "not begun", 0.0, "no time was left"))
            continue
        print(f"\n== {part.name}", flush=True)
        summary.append(run_part(part, out / "logs" / f"{part.name}.txt", min(part.seconds, left)))
    print("\n== summary")
    for name, outcome, took, line in summary:
        print(f"{name:24}{outcome:10}{took:7.1f} s  {line}")
    return int(any(outcome != "ok" for _, outcome, _, _ in summary))


def run_part(part: Part, log: Path, limit: float) -> tuple[str, str, float, str]:
    """(name, outcome, seconds, the last line it printed). The end of what it printed is shown."""
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            [sys.executable, *part.command], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, process_group=0,
        )  # fmt: skip
        try:
            outcome = "ok" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            outcome = "too long"
        finally:  # its own workers too, on an interrupt of ours as well
            end_group(process)
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    print("\n".join(line[:200] for line in lines[-TAIL:]), flush=True)
    return part.name, outcome, time.monotonic() - start, lines[-1][:200] if lines else ""


def end_group(process: subprocess.Popen) -> None:
    """End what is left of a process and its children."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


# -- agreement --

GPU_SETTINGS = {
    "float32": {"tf32": False},
    "float32, no graph": {"tf32": False, "graph": False},
    "float32 with TF32": {"tf32": True},
    "bfloat16": {"dtype": "bfloat16"},
}
AGREEMENT = 1e-3  # that float32's losses must have with the CPU's


def agreement_part(args: argparse.Namespace) -> None:
    gpu = get_backend("cupy")
    rows = agreement(preset_config(args.preset), args.data or "pydoc", steps=6 if args.quick else 20)
    for row in rows:
        same = {None: "", True: ", the same bits as recorded", False: ", OTHER BITS than recorded"}[row["same_bits"]]
        print(
            f"{row['preset']}, {row['how']}, {row['steps']} steps: the losses differ from the CPU's by up to"
            f" {row['difference']:.1e}, the gradients' norms by {row['norm_difference']:.1e} of them{same}"
        )
    write_results(args.out / "agreement-gpu.json", gpu_facts(gpu), results=rows)
    if not rows[0]["difference"] < AGREEMENT:
        sys.exit(f"the GPU disagrees with the CPU: expected losses within {AGREEMENT}, got {rows[0]['difference']}")


def agreement(config: Config, source: str, steps: int) -> list[dict]:
    """How far the losses and the gradients' norms of the first steps on that text are from the CPU's, for each setting
    of the GPU."""
    text = load_text(source, block_size=config.gpt.block_size)
    tokenizer = make_tokenizer("char", text.text)
    dataset = make_dataset(text, tokenizer, config.gpt.block_size, config.train.val_fraction)
    config = Config(replace(config.gpt, vocab_size=tokenizer.vocab_size), config.train)
    expected = losses_and_norms(config, dataset, Device(threads=1), steps)
    rows, recorded = [], None
    for how, settings in GPU_SETTINGS.items():
        got = losses_and_norms(config, dataset, Device("cupy", **settings), steps)
        recorded = got if recorded is None else recorded
        rows.append(
            {
                "preset": config.train.preset,
                "how": how,
                "steps": steps,
                "difference": float(np.abs(got - expected)[:, 0].max()),
                "norm_difference": float((np.abs(got - expected) / expected)[:, 1].max()),
                "same_bits": bool((got == recorded).all()) if how == "float32, no graph" else None,
                "losses": got[:, 0].tolist(),
                "cpu_losses": expected[:, 0].tolist(),
            }
        )
    return rows


def losses_and_norms(config: Config, dataset, device: Device, steps: int) -> np.ndarray:
    """Those of the first steps, (steps, 2)."""
    model = device.place(build_model("gpt", config.gpt, config.train.seed))
    on_cpu = device.backend == "numpy"
    trainer = (Trainer if on_cpu else DeviceTrainer)(model, dataset, config.train)
    with trainer:
        return np.array([[float(x) for x in trainer.train_step()] for _ in range(steps)])


# -- tests --


def tests_part(args: argparse.Namespace) -> None:
    get_backend("cupy")  # or all of them would be skipped
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-k", "gelu"] if args.quick else []
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # our tests know of no plugin
    sys.exit(subprocess.run(command, cwd=ROOT, env=environment).returncode)


# -- where the time of a step goes --


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
        backend._launch = self._timed(backend._launch, lambda kernel, dtype, blocks, threads, *args: (kernel, args))
        flash = backend._flash
        flash._launch = self._timed(flash._launch, lambda kernel, head_dim, blocks, shared, *args: (kernel, args))
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


def describe_product(a, b, trans_a=False, trans_b=False, out=None, accumulate=False, dtype=None):
    """Its name and what is read; what is written is its result."""
    (m, k), n = a.shape[-2:][:: -1 if trans_a else 1], b.shape[-2 if trans_b else -1]
    batch = max(a.size // (m * k), b.size // (k * n), 1)
    name = f"product {f'{batch} x ' if batch > 1 else ''}{m} x {k} x {n}"
    return name, (a, b, out if accumulate else None)


def summarize(calls: Iterable[tuple[str, float, float]], steps: int, step_seconds: float | None = None) -> list[dict]:
    """A row for each name, the longest first; what is left of the step, if its time is known, last."""
    groups: dict[str, list[tuple[float, float]]] = {}
    for name, moved, seconds in calls:
        groups.setdefault(name, []).append((moved, seconds))
    times = {name: sum(seconds for _, seconds in group) / steps for name, group in groups.items()}
    total = step_seconds or sum(times.values())
    rows = []
    for name in sorted(times, key=times.get, reverse=True):
        moved = sum(moved for moved, _ in groups[name]) / steps
        row = {"kernel": name, "calls": len(groups[name]) / steps, "us": round(1e6 * times[name], 1)}
        row |= {"share": round(times[name] / total, 4)}
        row |= {"gb_per_s": round(moved / times[name] / 1e9, 1) if times[name] else None}
        rows.append(row)
    if step_seconds:
        rest = step_seconds - sum(times.values())
        row = {"kernel": "CuPy's own kernels, and the gaps", "calls": None, "us": round(1e6 * rest, 1)}
        rows.append(row | {"share": round(rest / total, 4), "gb_per_s": None})
    return rows


def format_profile(title: str, rows: list[dict]) -> str:
    lines = [title, f"{'kernel':60}{'calls':>8}{'us':>12}{'share':>8}{'GB/s':>9}"]
    for row in rows:
        calls, speed = ("" if row[key] is None else f"{row[key]:.0f}" for key in ("calls", "gb_per_s"))
        lines.append(f"{row['kernel'][:59]:60}{calls:>8}{row['us']:12.1f}{row['share']:8.1%}{speed:>9}")
    return "\n".join(lines) + "\n"


def write_profile(args: argparse.Namespace, name: str, title: str, rows: list[dict]) -> None:
    """Write and print it."""
    table = format_profile(title, rows)
    file = args.out / f"profile-gpu-{args.preset}{name}.json"
    write_results(file, gpu_facts(get_backend("cupy")), title=title, results=rows)
    file.with_suffix(".txt").write_text(table, encoding="utf-8")
    print("\n".join(table.splitlines()[: TAIL - 1]))


def step_on_gpu(preset: str):
    """(trainer, backend): a trainer in bfloat16 that has done a few steps without a graph. Its `_train()` is what a
    graph records: the step but for the upload of its batch's places."""
    trainer = device_trainer(preset_config(preset), Device("cupy", "bfloat16", graph=False))
    for _ in range(3):
        trainer.train_step()
    return trainer, trainer.flat.backend


def profile_part(args: argparse.Namespace) -> None:
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
    write_profile(args, "", title, rows)


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


NCU = (
    "--csv", "--page", "raw", "--print-units", "base", "--profile-from-start", "off", "--clock-control", "none",
    "--cache-control", "none", "--metrics", "gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum",
)  # fmt: skip


def ncu_part(args: argparse.Namespace) -> None:
    get_backend("cupy")
    if not shutil.which("ncu"):
        raise UserError("ncu, of NVIDIA's Nsight Compute, is not on the PATH")
    command = ["ncu", *NCU, sys.executable, __file__, "--inside", "one_step", "--preset", args.preset]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    (args.out / "logs" / f"ncu-{args.preset}.csv").write_text(done.stdout, encoding="utf-8")
    rows = summarize(ncu_calls(done.stdout), steps=1)
    if not rows:
        raise UserError(f"ncu, which ended with status {done.returncode}, measured no kernel: see logs/ncu-*.csv")
    title = f"{args.preset}, bfloat16: the kernels of a step, one at a time, by ncu; bytes are those that memory moved"
    write_profile(args, "-ncu", title, rows)


def one_step_part(args: argparse.Namespace) -> None:
    """What ncu watches."""
    trainer, backend = step_on_gpu(args.preset)
    runtime = backend.xp.cuda.runtime
    runtime.deviceSynchronize()
    runtime.profilerStart()
    trainer._train()
    runtime.deviceSynchronize()
    runtime.profilerStop()


def ncu_calls(output: str) -> list[tuple[str, float, float]]:
    """(kernel, bytes, seconds) of each, from what ncu prints: remarks, a line of names, one of units, and the rows."""
    lines = csv.DictReader(line for line in output.splitlines() if line.startswith('"'))
    calls = []
    for row in lines:
        if row["ID"]:  # not the units'
            moved, time_ns = 0.0, float(row["gpu__time_duration.sum"].replace(",", ""))
            for way in ("read", "write"):
                moved += float(row[f"dram__bytes_{way}.sum"].replace(",", ""))
            calls.append((row["Kernel Name"].partition("(")[0].removeprefix("void "), moved, 1e-9 * time_ns))
    return calls


# -- a whole run --


def training_part(args: argparse.Namespace) -> None:
    gpu = get_backend("cupy")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "train.py", args.preset, "--backend", "cupy", "--dtype", "bfloat16", "--out", run]
        command += ["--data", args.data] if args.data else []
        command += ["--max-iters", "20", "--eval-iters", "2"] if args.quick else []
        start = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - start
        print(done.stdout)
        if done.returncode:
            sys.exit(f"train.py ended with status {done.returncode}")
        row = {"preset": args.preset, "precision": "bfloat16", "seconds": round(seconds, 1)}
        row |= run_facts(done.stdout, (run / "log.jsonl").read_text(encoding="utf-8"))
    print(
        f"{row['preset']} in bfloat16 on {row['text']}: {row['steps']} steps in {seconds:.1f} s,"
        f" best val loss {row['best_val_loss']:.4f}"
    )
    write_results(args.out / f"training-gpu-{args.preset}.json", gpu_facts(gpu), results=[row])


def run_facts(output: str, log: str) -> dict:
    """What train.py's output and its log say of a run."""
    rows = [json.loads(line) for line in log.splitlines()]
    speeds = [row["tokens_per_second"] for row in rows if row["tokens_per_second"]]
    return {
        "text": next(line for line in output.splitlines() if line.startswith("text: "))[6:].partition(";")[0],
        "steps": rows[-1]["step"],
        "best_val_loss": min(row["val_loss"] for row in rows),
        "tokens_per_s": round(statistics.median(speeds)),
        "log": rows,
    }


# -- sampling --


def generate_part(args: argparse.Namespace) -> None:
    """Tokens per second, in bfloat16 on either side, over whole cycles from one cut of the context to the next. Ours
    draws on the CPU, from scores that it reads back for each token; torch's waits for the GPU in the end alone."""
    gpu, sides = get_backend("cupy"), ("ours",) if args.alone else ("ours", "torch")
    workers = {side: start_worker("--worker", side, "--preset", args.preset) for side in sides}
    speeds = {side: [] for side in sides}
    for _ in range(1 if args.quick else 5):
        for side, worker in workers.items():
            speeds[side].append(ask(worker, 0.2 if args.quick else 2))
    for worker in workers.values():
        stop(worker)
    row = {"preset": args.preset, "precision": "bfloat16", "batch": 1}
    row |= {f"{side}_tokens_per_s": round(statistics.median(of_side), 1) for side, of_side in speeds.items()}
    row = {"torch_tokens_per_s": None, "ratio": None, "ratios": []} | row
    print(f"{args.preset}, one sequence, tokens per second: ours {row['ours_tokens_per_s']}", end="")
    if not args.alone:
        row["ratios"] = [round(o / t, 3) for o, t in zip(speeds["ours"], speeds["torch"], strict=True)]
        row["ratio"] = round(statistics.median(row["ratios"]), 3)
        print(f", torch {row['torch_tokens_per_s']}; ours has {row['ratio']:.2f}x its speed", end="")
    print()
    write_results(args.out / f"generate-gpu-{args.preset}.json", gpu_facts(gpu), results=[row])


def sampling_turn(args: argparse.Namespace):
    """What a worker does in its turn: whole cycles of generation."""
    shape = preset_config(args.preset).gpt
    kept = max(shape.block_size // 2, 1)
    cycle = shape.block_size + 1 - kept
    model = build_model("gpt", shape, seed=0)
    if args.worker == "ours":
        tokens = sample_tokens(Device("cupy", "bfloat16").place(model).eval(), np.zeros((1, kept), np.int64), 10**9)
        synchronize = get_backend("cupy").xp.cuda.runtime.deviceSynchronize
    else:
        import torch
        from torch_gpt import TorchGPT

        theirs = TorchGPT(shape).eval()
        theirs.load_state_dict({name: torch.from_numpy(array) for name, array in model.state_dict().items()})
        tokens = theirs.to("cuda", torch.bfloat16).sample_tokens(torch.zeros((1, kept), dtype=torch.int64).cuda())
        synchronize = torch.cuda.synchronize
    for _ in range(2):
        list(islice(tokens, cycle))
    return lambda seconds: cycle / time_queued_calls(lambda: list(islice(tokens, cycle)), synchronize, seconds)


INSIDE = {
    "agreement": agreement_part, "tests": tests_part, "profile": profile_part, "ncu": ncu_part,
    "one_step": one_step_part, "training": training_part, "generate": generate_part,
}  # fmt: skip


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part that runs is ended too
    main()
