"""Two sides of a comparison, each in a process of its own, that take turns: A B A B ... Other work on the machine then
slows both alike, and each pair of turns gives one ratio.

A worker is the same script started once more. It says "ready" when it has warmed up, and answers each number of seconds
on its standard input with a line of JSON about a turn of that length.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from gpt.config import Config, GPTConfig, TrainConfig, load_preset  # noqa: E402
from gpt.device import physical_cores  # noqa: E402

VOCAB_SIZE = 65  # tinyshakespeare's

# Presets of the benchmarks alone: GPT-2 trained as nanoGPT does, with GPT-2's 50,257 symbols, and with the 50,304 that
# nanoGPT makes of them for speed.
GPT2 = TrainConfig(
    preset="gpt2", batch_size=12, learning_rate=6e-4, min_lr=6e-5, warmup_iters=2000, lr_decay_iters=600_000,
    max_iters=600_000, weight_decay=0.1, beta2=0.95, grad_clip=1.0,
)  # fmt: skip
BENCH_PRESETS = {
    "gpt2": Config(GPTConfig(bias=False), GPT2),
    "gpt2-50304": Config(GPTConfig(bias=False, vocab_size=50304), GPT2),
}


def preset_config(preset: str, **changes) -> Config:
    """The preset with some keys changed (None: not); train.py's are for a text of VOCAB_SIZE symbols."""
    changes = {key: value for key, value in changes.items() if value is not None}
    if preset in BENCH_PRESETS:
        return BENCH_PRESETS[preset].updated(changes)
    config = load_preset(preset).updated(changes)
    return Config(replace(config.gpt, vocab_size=VOCAB_SIZE), config.train)


def comparison_parser(description: str, sides: tuple[str, ...], presets: list[str]) -> argparse.ArgumentParser:
    """The options that every comparison of sides in turns has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = f"presets by name (default: {' '.join(presets)})"
    parser.add_argument("--preset", nargs="+", default=presets, help=default)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a turn (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=physical_cores(), help="of both sides (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--worker", choices=sides, help=argparse.SUPPRESS)
    return parser


def torch_problem() -> str | None:
    """Why torch cannot be compared with on a GPU, if it cannot."""
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported ({error})"
    return None if torch.cuda.is_available() else f"torch {torch.__version__} cannot use a GPU here"


# -- the parent --


def start_worker(*arguments, script: str = sys.argv[0]) -> subprocess.Popen:
    """This script, or another, with these arguments; returns when it is ready."""
    command = [sys.executable, script, *map(str, arguments)]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    if not worker.stdout.readline():
        raise SystemExit(f"the worker {' '.join(command[1:])} stopped; its error is above")
    return worker


def ask(worker: subprocess.Popen, seconds: float):
    """Let it have a turn."""
    worker.stdin.write(f"{seconds}\n")
    worker.stdin.flush()
    answer = worker.stdout.readline()
    if not answer:
        raise SystemExit(f"the worker {' '.join(map(str, worker.args[1:]))} stopped in its turn; its error is above")
    return json.loads(answer)


def stop(worker: subprocess.Popen) -> None:
    worker.stdin.close()
    worker.wait()


# -- the workers --


def serve(turn: Callable) -> None:
    """Answer for as long as anyone asks."""
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(turn(float(line))), flush=True)


def time_calls(work: Callable, seconds: float) -> list[float]:
    """The times of as many calls of work() as begin within the seconds, at least one."""
    times, end = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return times


def time_queued_calls(work: Callable, synchronize: Callable, seconds: float) -> float:
    """Seconds per call of work(), which leaves it to a GPU, over as many calls as take about the seconds. The device is
    waited for before the first and after the last alone: a wait after each would add the launching to the computing."""

    def run(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            work()
        synchronize()
        return (time.perf_counter() - start) / calls

    synchronize()
    return run(max(1, round(seconds / run(3))))
