"""Hold what `gpt/needs.py` foresees of a run's memory against what the run takes (Linux).

    python bench/memory.py
    python bench/memory.py --shape little-shakespeare "long context" --json bench/results/memory.json

Each run is train.py's own, in a process of its own with two workers, on a megabyte of random symbols: two steps, an
evaluation of one batch before and after them, and the sample at the end. The measured figure is the most that its
processes are seen to hold together, where what they share counts once; it is read every few milliseconds.
"""

import argparse
import contextlib
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from machine import memory_mb, write_results

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from gpt.advice import as_option  # noqa: E402
from gpt.config import Config, load_preset  # noqa: E402
from gpt.needs import run_needs  # noqa: E402

CHARACTERS, PAUSE = 1_000_000, 0.005  # of the text; seconds between two readings
LONG = {"block_size": 1024, "batch_size": 2, "micro_batch_size": 1}
SHAPES = {  # a preset, what is changed in it, and the symbols of the text
    "little-shakespeare": ("little-shakespeare", {}, 65),
    "nanogpt-cpu": ("nanogpt-cpu", {}, 65),
    "shakespeare-char": ("shakespeare-char", {}, 65),
    "large vocabulary": ("nanogpt-cpu", {}, 8000),
    "long context": ("nanogpt-cpu", LONG, 65),
    "long context, dropout": ("nanogpt-cpu", LONG | {"dropout": 0.2}, 65),
    "bigram": ("bigram", {}, 2000),
}
SHORT = {"max_iters": 2, "eval_iters": 1}


def main() -> None:
    args = parse_arguments()
    rows = []
    for name in args.shape:
        rows.append(compare(name, args.threads))
        print_row(rows[-1])
    write_results(args.json, results=rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES), help="which runs (default: all)")
    parser.add_argument("--threads", type=int, default=2, help="workers of a run (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    return parser.parse_args()


def config_of(shape: str) -> Config:
    preset, changes, symbols = SHAPES[shape]
    return load_preset(preset).updated(changes | SHORT | {"vocab_size": symbols})


def compare(shape: str, threads: int) -> dict:
    """Run it, and put what was measured beside what is foreseen."""
    preset, changes, symbols = SHAPES[shape]
    needs = run_needs(config_of(shape), workers=threads, text=CHARACTERS)
    measured = measured_mb(preset, changes | SHORT, symbols, threads)
    parts = {name: value if name == "workers" else round(value / 2**20, 1) for name, value in asdict(needs).items()}
    foreseen = needs.total / 2**20
    row = {"shape": shape, "measured_mb": round(measured), "foreseen_mb": round(foreseen)}
    return row | {"ratio": round(foreseen / measured, 3), "parts_mb": parts}


def measured_mb(preset: str, options: dict, symbols: int, threads: int) -> float:
    """The peak of a run of train.py's."""
    first = 32 if symbols < 96 else 0x4E00
    text = "".join(random.Random(0).choices([chr(first + i) for i in range(symbols)], k=CHARACTERS))
    command = [sys.executable, ROOT / "train.py", preset, "--data=text.txt", "--out=run", f"--threads={threads}"]
    command += [f"{as_option(name)}={value}" for name, value in options.items()]
    peak = 0.0
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "text.txt").write_text(text, encoding="utf-8")
        with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None:
                with contextlib.suppress(OSError):  # one of them has ended
                    peak = max(peak, memory_mb(process.pid))
                time.sleep(PAUSE)
            if process.returncode:
                sys.exit(f"train.py ended with status {process.returncode}; its error is above")
    return peak


def print_row(row: dict) -> None:
    print(
        f"{row['shape']:24} measured {row['measured_mb']:6} MB   foreseen {row['foreseen_mb']:6} MB"
        f"   {row['ratio']:.2f} of it",
        flush=True,
    )


if __name__ == "__main__":
    main()
