"""Time and memory to read a text, encode it and count its yardsticks, at several sizes.

    python bench/text.py
    python bench/text.py --megabytes 1 10 100 1000 --json bench/results/text.json

Each size is read in a process of its own, as train.py does it before its first step: characters, then bytes. The text
is Python's language reference, over and over; with --symbols "€" that sign stands at its end, so that a str of it would
take twice the memory. The memory is what the process held at its peak beyond what it had when the libraries were there,
and when all was read; per byte of text. "Again" is a second run over the same text, which finds the tokens of a large
one in the cache.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import write_results

READ = """
import json, resource, sys, time
from pathlib import Path
from gpt.text.dataset import make_dataset, optima
from gpt.text.sources import load_text
from gpt.text.tokenizers import make_tokenizer
import tqdm

def held():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()

path, kind = sys.argv[1:]
optima(make_dataset(load_text("ab", block_size=8), make_tokenizer("char", "ab"), 8))
before, start = held(), time.perf_counter()
text = load_text(path, block_size=8, any_bytes=kind == "byte")
dataset = make_dataset(text, make_tokenizer(kind, text.text), 8)
read = time.perf_counter()
optima(dataset)
counted = time.perf_counter()
peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
del text
print(json.dumps({"read": read - start, "counted": counted - read, "peak": peak - before, "held": held() - before}))
"""


def main() -> None:
    args = parse_arguments()
    rows = []
    print(
        f"{'size':>8} {'tokens':7} {'read':>9} {'MB/s':>7} {'again':>9} {'counted':>9} {'MB/s':>7} "
        f" {'peak':>6} {'after':>6} bytes per byte"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        for megabytes in args.megabytes:
            write_text(path, megabytes * 10**6, args.symbols)
            for kind in ("char", "byte"):
                first, again = measured(path, kind), measured(path, kind)
                rows.append({"megabytes": megabytes, "tokenizer": kind, **first, "again_s": again["read_s"]})
                show(rows[-1])
    write_results(args.json, results=rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", nargs="+", type=int, default=[1, 10, 100], help="sizes (default: 1 10 100)")
    parser.add_argument("--symbols", default="", help="what to add at the end (default: nothing)")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    return parser.parse_args()


def write_text(path: Path, size: int, symbols: str) -> None:
    from pydoc_data.topics import topics

    piece = "\n\n".join(topics.values()).encode("ascii", "replace")
    with path.open("wb") as file:
        for start in range(0, size, len(piece)):
            file.write(piece[: size - start])
        file.write(symbols.encode())


def measured(path: Path, kind: str) -> dict:
    """Seconds, and bytes of memory per byte of text."""
    command, cache = [sys.executable, "-c", READ, path, kind], {"XDG_CACHE_HOME": str(path.parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | cache)
    row, size = json.loads(done.stdout), path.stat().st_size
    return {
        "read_s": round(row["read"], 3),
        "counted_s": round(row["counted"], 3),
        "peak_per_byte": round(row["peak"] / size, 2),
        "held_per_byte": round(row["held"] / size, 2),
    }


def show(row: dict) -> None:
    read, counted = (row["megabytes"] / row[key] for key in ("read_s", "counted_s"))
    print(
        f"{row['megabytes']:>5} MB {row['tokenizer']:7} {row['read_s']:>7.2f} s {read:>7.0f} {row['again_s']:>7.2f} s "
        f"{row['counted_s']:>7.2f} s {counted:>7.0f}  {row['peak_per_byte']:>6.2f} {row['held_per_byte']:>6.2f}"
    )


if __name__ == "__main__":
    main()
