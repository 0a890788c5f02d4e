"""Time what a user waits for at the start: the imports, the first training step, the first sampled character.

    python bench/startup.py
    python bench/startup.py --rounds 15 --json bench/results/startup.json

Every reading is of a fresh interpreter, and they take turns: A B C A B C ... An import's time is that of the statement
alone. The scripts' times are from the command: train.py's until the first step is done, evaluated and saved, on a
megabyte of text and with evaluations of one batch; sample.py's until the first character is written.
"""

import argparse
import os
import random
import re
import statistics
import string
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from machine import write_results

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or every reading would compile what a user's Python compiles once


def main() -> None:
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        readings = measure(Path(folder), args.rounds)
    numpy = readings["import numpy"]
    rows = []
    for name, times in readings.items():
        row = {"what": name, "ms": round(1e3 * statistics.median(times), 1)}
        if name == "import tensorlite":
            row["ratio"] = round(statistics.median(t / n for t, n in zip(times, numpy, strict=True)), 3)
        print_row(row)
        rows.append(row)
    write_results(args.json, results=rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, help="readings of each (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    return parser.parse_args()


def print_row(row: dict) -> None:
    print(f"{row['what']:36}{row['ms']:8.1f} ms" + (f"   {row['ratio']:.2f} times NumPy's" if "ratio" in row else ""))


def measure(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds, `rounds` of each; `folder` is for the text and the run."""
    text = "".join(random.Random(0).choices(string.ascii_letters + " \n.,:;!?", k=1_000_000))
    (folder / "text.txt").write_text(text)
    readings = {
        "import numpy": partial(import_seconds, "numpy"),
        "import tensorlite": partial(import_seconds, "tensorlite"),
        "import torch": partial(import_seconds, "torch"),
        "train.py to its first step": partial(first_step_seconds, folder),
        "sample.py to its first character": partial(first_character_seconds, folder),
    }
    for read in readings.values():
        read()  # compiles what Python has not yet, brings the files into memory, and makes the run to sample from
    times = {name: [] for name in readings}
    for _ in range(rounds):
        for name, read in readings.items():
            times[name].append(read())
    return times


def import_seconds(module: str) -> float:
    code = f"import time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"
    return float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout)


def first_step_seconds(folder: Path) -> float:
    options = ["--data", "text.txt", "--max-iters", "1", "--eval-iters", "1", "--out", "run", "--overwrite"]
    return seconds_until(b"step 1: ", folder, "train.py", "little-shakespeare", *options)


def first_character_seconds(folder: Path) -> float:
    options = ["--model", "run", "--prompt", "a", "--max-new-tokens", "1"]
    return seconds_until(b"a.", folder, "sample.py", *options)


def seconds_until(pattern: bytes, folder: Path, script: str, *options: str) -> float:
    """From the command until its standard output matches the pattern, in which a dot stands for any character."""
    start, output, seconds = time.perf_counter(), b"", None
    command = [sys.executable, ROOT / script, *options]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0) as process:
        while seconds is None:
            byte = process.stdout.read(1)
            if not byte:
                sys.exit(f"{script} ended before it had written {pattern}; it wrote {output}")
            output += byte
            if re.search(pattern, output, re.DOTALL):
                seconds = time.perf_counter() - start
        process.stdout.read()  # let it end by itself
    return seconds


if __name__ == "__main__":
    main()
