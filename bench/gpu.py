"""Find out all there is to know on a machine with an NVIDIA GPU, the most important first.

    python bench/gpu.py                                   everything
    python bench/gpu.py --only doctor agreement step-char --minutes 9
    python bench/gpu.py --quick                           the same, each part as short as can be: does it all work?

    doctor          whether the backend works here at all
    agreement       losses step by step against the CPU's from the same seed; is a captured step the same to the bit?
    tests           pytest -m gpu
    step-...        training steps against torch's (bench/train_step.py), and ours without a graph
    profile-...     where the time of a step goes, kernel by kernel, by CUDA's events (bench/kernel_profile.py)
    training        a whole run of train.py, to its best validation loss
    generate        tokens per second of sampling, against torch's
    ncu-...         kernel by kernel once more, by Nsight Compute, which also counts the bytes that memory moved

Each is a command of its own, within a limit of time; those that are no script of their own are in bench/gpu_parts.py.
What a part finds stays whatever becomes of the others: its results in --out/*-gpu*.json, for bench/report.py, and all
that it printed in --out/logs/. Where torch has no GPU, our own numbers are measured without it, as with --alone.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from turns import ROOT, torch_problem

TAIL = 12  # lines that are shown of what a part printed


def main() -> None:
    args = parse_arguments()
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
    args = parser.parse_args()
    args.out = (args.out or ROOT / ("runs/gpu-quick" if args.quick else "bench/results")).absolute()
    args.data = args.data and str(Path(args.data).absolute())
    return args


@dataclass(frozen=True)
class Part:
    name: str
    seconds: float  # its limit
    command: list[str]


def all_parts(args: argparse.Namespace) -> list[Part]:
    """Every part, the most important first."""
    char, gpt2, bf16, launched = "shakespeare-char", "gpt2", ("--dtype", "bfloat16"), ("--alone", "--no-graph")
    step, other, profile = (partial(make, args) for make in (step_part, other_part, profile_part))
    parts = [
        Part("doctor", 120, ["-m", "tensorlite.doctor"]),
        other("agreement", 150, "nanogpt-cpu"),
        other("tests", 300),
        step("char", char, *bf16),
        step("char-compile", char, *bf16, "--compile"),
        step("char-tf32", char, "--tf32"),
        step("char-launched", char, *bf16, *launched),
        step("char-tf32-launched", char, "--tf32", *launched),
        profile("profile-char", 120, char),
        step("gpt2", gpt2, *bf16),
        step("gpt2-compile", gpt2, *bf16, "--compile"),
        step("gpt2-launched", gpt2, *bf16, *launched),
        profile("profile-gpt2", 120, gpt2),
        other("training", 400),
        other("generate", 150),
        profile("ncu-char", 200, char, "--ncu"),
        profile("ncu-gpt2", 200, gpt2, "--ncu"),
        step("gpt2-50304", "gpt2-50304", *bf16),
        step("gpt2-50304-compile", "gpt2-50304", *bf16, "--compile"),
    ]
    return [part for part in parts if not (args.alone and "--compile" in part.command)]


def step_part(args: argparse.Namespace, name: str, preset: str, *options: str) -> Part:
    command = [str(ROOT / "bench" / "train_step.py"), "--preset", preset, "--backend", "cupy", *options]
    command += ["--rounds", "1", "--seconds", "0.2"] if args.quick else ["--rounds", "5", "--seconds", "1"]
    command += ["--alone"] if args.alone and "--alone" not in options else []
    return Part(f"step-{name}", 240, [*command, "--json", str(args.out / f"train_step-gpu-{name}.json")])


def other_part(args: argparse.Namespace, name: str, seconds: float, preset: str = "shakespeare-char") -> Part:
    command = [str(ROOT / "bench" / "gpu_parts.py"), name, "--preset", preset, "--out", str(args.out)]
    command += ["--data", args.data] if args.data else []
    return Part(name, seconds, command + ["--quick"] * args.quick + ["--alone"] * args.alone)


def profile_part(args: argparse.Namespace, name: str, seconds: float, preset: str, *options: str) -> Part:
    command = [str(ROOT / "bench" / "kernel_profile.py"), preset, "--out", str(args.out), *options]
    return Part(name, seconds, command + ["--quick"] * args.quick)


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


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part that runs is ended too
    main()
