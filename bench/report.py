"""Write README.md's performance section from the committed results, bench/results/*.json.

    python bench/report.py            rewrite the section
    python bench/report.py --check    exit with status 1 if it is not what the results say

The section lies between two comments, `<!-- performance: begin -->` and `<!-- performance: end -->`. A result belongs
to the benchmark that its name begins with: results/train_step-numpy.json is of train_step.py.
"""

import argparse
import json
import sys
import textwrap
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- performance: begin -->", "<!-- performance: end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with status 1 if it would change")
    args = parser.parse_args()
    old = README.read_text(encoding="utf-8")
    new = with_section(old, performance(RESULTS))
    if not args.check:
        README.write_text(new, encoding="utf-8")
    elif new != old:
        sys.exit("README.md differs from bench/results: run python bench/report.py")


def with_section(readme: str, section: str) -> str:
    """The readme with this text between the two comments."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        sys.exit(f"README.md must have the line {BEGIN} and after it {END}")
    return f"{before}{BEGIN}\n{section}\n{END}{after}"


def performance(results: Path) -> str:
    """The section's text: a table for each benchmark that has results, and what they were measured on."""
    parts, machines = [], []
    for benchmark, describe in TABLES.items():
        files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob(f"{benchmark}*.json"))]
        machines += [file["machine"] for file in files]
        parts += [describe(files)] if files else []
    return "\n\n".join([*parts, *measured_on(machines)])


def measured_on(machines: list[dict]) -> list[str]:
    """A line for each machine and set of versions, with the days of its results."""
    days: dict[str, set[str]] = {}
    for m in machines:
        versions = f"Python {m['python']}, NumPy {m['numpy']} with {m['blas']}, PyTorch {m['torch']}"
        days.setdefault(f"{m['cpu']}, {m['cores']} cores; {versions}", set()).add(m["date"])
    return [wrap(f"Measured on {what}; {' and '.join(sorted({min(d), max(d)}))}.") for what, d in days.items()]


def train_step(files: list[dict]) -> str:
    header = "preset | dropout | against | our step | its step | ratio | our memory | its memory | floor"
    runs = middle_runs(files, "rival", "preset", "dropout")
    rows = [
        f"`{r['preset']}` | {r['dropout']:g} | {r['rival']} | {duration(r['ours_ms'])} | {duration(r['torch_ms'])}"
        f" | {speed(r)} | {r['ours_mb']} MB | {r['torch_mb']} MB | {r['floor_share']:.0%}"
        for r in sorted(runs, key=lambda row: (row["rival"], row["ours_ms"]))
    ]
    return table(
        "A training step (`python bench/train_step.py`): forward, backward, clipping and AdamW, on the same weights,"
        " batches and number of threads. The ratio is PyTorch's time over ours: the middle run's, and the range of all"
        " rounds of all runs; the memory is the largest of all processes together; the floor is the share of our step"
        " that its matrix products alone would take at sgemm's full speed.",
        header,
        rows,
    )


def generate(files: list[dict]) -> str:
    header = "preset | batch | threads | tokens/s | without the cache | PyTorch's, with a cache | ratio"
    rows = [
        f"`{r['preset']}` | {r['batch']} | {r['threads']} | {r['cached_tokens_per_s']:,.0f}"
        f" | {r['uncached_tokens_per_s']:,.0f} | {r['torch_tokens_per_s']:,.0f} | {speed(r)}"
        for r in middle_runs(files, "preset", "batch", "threads")
    ]
    return table("Sampling (`python bench/generate.py`):", header, rows)


def ops(files: list[dict]) -> str:
    header = "op on 2 x 2 numbers | NumPy's call | forward | under `no_grad` | backward"
    rows = [
        f"`{op}` | {cost['numpy_us']:.2f} | {cost['forward_us']:+.2f} | {cost['no_grad_us']:+.2f}"
        f" | {cost['backward_us']:+.2f}"
        for file in files
        for op, cost in file["overhead"].items()
    ]
    return table("What recording costs, in microseconds per op (`python bench/ops.py`):", header, rows)


def startup(files: list[dict]) -> str:
    rows = [
        f"{r['what']} | {r['ms']:.0f} ms" + (f", {r['ratio']:.2f} times NumPy's" if "ratio" in r else "")
        for r in rows_of(files)
    ]
    return table("Start-up, from a fresh interpreter (`python bench/startup.py`):", "until | time", rows)


TABLES = {"train_step": train_step, "generate": generate, "ops": ops, "startup": startup}


def rows_of(files: list[dict]) -> list[dict]:
    return [row for file in files for row in file["results"]]


def middle_runs(files: list[dict], *keys: str) -> list[dict]:
    """A row for each value of these keys: of several runs the one with the middle ratio, with the rounds of all."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows_of(files):
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    middle = []
    for rows in groups.values():
        rows.sort(key=lambda row: row["ratio"])
        middle.append(rows[len(rows) // 2] | {"ratios": [ratio for row in rows for ratio in row["ratios"]]})
    return middle


def duration(ms: float) -> str:
    return f"{ms:.1f} ms" if ms < 1000 else f"{ms / 1000:.2f} s"


def speed(row: dict) -> str:
    return f"{row['ratio']:.2f}x ({min(row['ratios']):.2f} to {max(row['ratios']):.2f})"


def table(caption: str, header: str, rows: list[str]) -> str:
    """Markdown; `header` and `rows` are cells joined by bars."""
    rule = "|".join("---" for _ in header.split("|"))
    return "\n".join([wrap(caption), "", f"| {header} |", f"|{rule}|", *(f"| {row} |" for row in rows)])


def wrap(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    main()
