"""Write bench/README.md's performance sections from the committed results, bench/results/*.json.

    python bench/report.py            rewrite the sections
    python bench/report.py --check    exit with status 1 if they are not what the results say

The section lies between two comments, `<!-- performance: begin -->` and `<!-- performance: end -->`; that of a GPU
comes after it, between two of its own, if there are results of one, and what is counted rather than measured, by
`python bench/gpu_parts.py traffic`, between two others. A result belongs to the benchmark that its name
begins with: results/train_step-numpy.json is of train_step.py, results/train_step-gpu-NAME.json the same on a GPU.
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path

README = Path(__file__).with_name("README.md")
RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- performance: begin -->", "<!-- performance: end -->"
NOT_MEASURED = "–"  # torch's, where ours ran alone
GPU_BEGIN, GPU_END = "<!-- gpu: begin -->", "<!-- gpu: end -->"
COUNTED_BEGIN, COUNTED_END = "<!-- counted: begin -->", "<!-- counted: end -->"
# Bytes per second of a card's memory, and FLOP per second of dense bfloat16 products summed in float32: NVIDIA's data
# sheet of the H200 SXM (which says 1,979 TFLOP/s with sparsity), and its white paper on the Ada GPU architecture, 2.02,
# appendix A, of the GeForce RTX 4090.
CARDS = {"H200": (4.8e12, 989e12), "RTX 4090": (1.008e12, 165.2e12)}
PRODUCTS = "products (cuBLAS)"
SMALL = 1e-3  # of all bytes: kernels that move less are put together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with status 1 if it would change")
    args = parser.parse_args()
    old = README.read_text(encoding="utf-8")
    new = rewritten(old, RESULTS)
    if not args.check:
        README.write_text(new, encoding="utf-8")
    elif new != old:
        sys.exit("bench/README.md differs from bench/results: run python bench/report.py")


def rewritten(readme: str, results: Path) -> str:
    """The readme with the sections that these results make."""
    readme = with_gpu_section(with_section(readme, performance(results)), gpu_performance(results))
    return with_section(readme, counted(results), COUNTED_BEGIN, COUNTED_END)


def with_section(readme: str, section: str, begin: str = BEGIN, end: str = END) -> str:
    """The readme with this text between the two comments."""
    before, found, rest = readme.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found and found_end):
        sys.exit(f"bench/README.md must have the line {begin} and after it {end}")
    return f"{before}{begin}\n{section}\n{end}{after}"


def with_gpu_section(readme: str, section: str) -> str:
    """The readme with this text after the performance section, or without any if it is empty."""
    before, end, after = readme.partition(END)
    if GPU_BEGIN in after:
        after = after.partition(GPU_END)[2]
    section = f"\n\n{GPU_BEGIN}\n{section}\n{GPU_END}" if section else ""
    return before + end + section + after


def performance(results: Path) -> str:
    """The section's text: a table for each benchmark that has results, and what they were measured on."""
    return tables(TABLES, lambda benchmark: set(results.glob(f"{benchmark}*.json")) - set(results.glob("*-gpu*")))


def gpu_performance(results: Path) -> str:
    """As `performance`, for the results of a GPU; empty if there are none."""
    text = tables(GPU_TABLES, lambda benchmark: results.glob(f"{benchmark}-gpu*.json"))
    return f"On a GPU (`python bench/gpu.py`):\n\n{text}" if text else ""


def tables(described: dict[str, Callable], files_of: Callable[[str], Iterable[Path]]) -> str:
    """A table for each benchmark that has results, and what they were measured on."""
    parts, machines = [], []
    for benchmark, describe in described.items():
        files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(files_of(benchmark))]
        machines += [file["machine"] for file in files]
        parts += [describe(files)] if files else []
    return "\n\n".join([*parts, *measured_on(machines)])


def measured_on(machines: list[dict]) -> list[str]:
    """A line for each machine and set of versions, with the days of its results."""
    days: dict[str, set[str]] = {}
    for m in machines:
        where = f"{m['cpu']}, {m['cores']} cores"
        versions = f"Python {m['python']}, NumPy {m['numpy']} with {m['blas']}, PyTorch {m['torch']}"
        if "gpu" in m:
            where, versions = f"{m['gpu']} with {where}", f"{versions}, CuPy {m['cupy']}, CUDA {m['cuda'] // 1000}"
            versions += f".{m['cuda'] % 1000 // 10}"
        days.setdefault(f"{where}; {versions}", set()).add(m["date"])
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


def memory(files: list[dict]) -> str:
    rows = [f"{r['shape']} | {r['measured_mb']} MB | {r['foreseen_mb']} MB | {r['ratio']:.2f}" for r in rows_of(files)]
    return table(
        "The memory of a run of `train.py` on two cores (`python bench/memory.py`): what its processes held at their"
        " peak, and what was foreseen from its configuration.",
        "shape | measured | foreseen | ratio",
        rows,
    )


def gpu_train_step(files: list[dict]) -> str:
    header = (
        "preset | precision | CUDA graph | against | our step | its step | ratio | tokens/s | our memory | its memory"
        " | floor"
    )
    runs = middle_runs(files, "preset", "dropout", "precision", "graph", "rival")
    rows = [
        f"`{r['preset']}` | {r['precision']} | {'yes' if r['graph'] else 'no'} | {r['rival'] or NOT_MEASURED}"
        f" | {duration(r['ours_ms'], 2)} | {duration(r['torch_ms'], 2)} | {speed(r)}"
        f" | {r['tokens_per_s']:,} | {megabytes(r['ours_mb'])} | {megabytes(r['torch_mb'])}"
        f" | {r['floor_share']:.0%}"
        for r in sorted(runs, key=lambda r: (r["preset"], r["precision"], r["rival"] or "z", not r["graph"]))
    ]
    return table(
        "A training step (`python bench/train_step.py --backend cupy`), with PyTorch as nanoGPT uses it: autocast,"
        " flash attention, fused AdamW. The memory is what the driver says each took; the floor is the share of our"
        " step that its matrix products alone would take at the speed of a large square product.",
        header,
        rows,
    )


def gpu_generate(files: list[dict]) -> str:
    header = "preset | precision | batch | tokens/s | PyTorch's, with a cache | ratio"
    rows = [
        f"`{r['preset']}` | {r['precision']} | {r['batch']} | {count(r['ours_tokens_per_s'])}"
        f" | {count(r['torch_tokens_per_s'])} | {speed(r)}"
        for r in middle_runs(files, "preset", "precision", "batch")
    ]
    return table("Sampling:", header, rows)


def gpu_agreement(files: list[dict]) -> str:
    header = "preset | on the GPU | steps | largest difference of a loss"
    rows = [f"`{r['preset']}` | {r['how']} | {r['steps']} | {r['difference']:.1e}" for r in rows_of(files)]
    return table("Losses step by step, against the CPU's from the same seed, in nats:", header, rows)


def gpu_training(files: list[dict]) -> str:
    header = "preset | text | precision | steps | time | best val loss"
    rows = [
        f"`{r['preset']}` | {r['text']} | {r['precision']} | {r['steps']} | {r['seconds']:.0f} s"
        f" | {r['best_val_loss']:.4f}"
        for r in rows_of(files)
    ]
    return table("Whole runs of `train.py`, evaluations and checkpoints included:", header, rows)


def counted(results: Path) -> str:
    """What is counted, not measured."""
    parts = []
    for name, describe in COUNTED_TABLES.items():
        path = results / f"{name}.json"
        parts += [describe([json.loads(path.read_text(encoding="utf-8"))])] if path.exists() else []
    return "\n\n".join(parts)


def traffic(files: list[dict]) -> str:
    caption = (
        "What a step moves, kernel by kernel (`python bench/gpu_parts.py traffic`; `traffic.py` says how one knows)."
        " Moved: the bytes that memory must move if no cache misses anything twice. Asked: what a kernel's loads and"
        " stores ask the caches for, to each of those bytes, in a step of 1,024 tokens; a kernel that goes through all"
        " tokens for each asks for more of more. The times are bounds, no prediction: a kernel's bytes at the card's"
        " bandwidth or its FLOP at the card's peak, whichever takes longer, with "
    )
    caption += ", and ".join(f"{b / 1e12:g} TB/s and {p / 1e12:g} TFLOP/s for the {c}" for c, (b, p) in CARDS.items())
    return "\n\n".join([wrap(f"{caption}."), *(traffic_of(row) for row in rows_of(files))])


def traffic_of(result: dict, before: dict | None = None) -> str:
    """The tables of one shape; before: an earlier result of it."""
    rows, was = summed(result["kernels"]), {row["kernel"]: row for row in summed(before["kernels"])} if before else None
    header = "kernel | launches | moved | asked | FLOP" + "".join(f" | {card}" for card in CARDS)
    outside, least = rows[-2]["bytes"], sum(result["least"].values())
    caption = (
        f"The least possible outside the products of `{result['preset']}`, of which a step moves {outside / least:.2f}"
        " times as much:"
    )
    parts = [
        f"{part} | {millions(size)} MB" for part, size in (result["least"] | {"all but the products": least}).items()
    ]
    if was is not None:
        header += " | moved before"
    cells = [traffic_row(row) + ("" if was is None else f" | {moved(was.get(row['kernel']))}") for row in rows]
    shape = f"`{result['preset']}`: {result['shape']}."
    return "\n\n".join([table(shape, header, cells), table(caption, "part | bytes", parts)])


def traffic_row(row: dict) -> str:
    ours = not row["kernel"].startswith(("CuPy", PRODUCTS, "a step"))
    asked = f"{row['asked'] / row['bytes']:.1f}x" if ours and row["bytes"] else NOT_MEASURED
    flop = f"{row['flop'] / 1e9:,.0f} G" if row["flop"] else NOT_MEASURED
    times = " | ".join(f"{1e6 * row[card]:,.0f} us" for card in CARDS)
    return f"{row['kernel']} | {row['launches']} | {moved(row)} | {asked} | {flop} | {times}"


def summed(kernels: list[dict]) -> list[dict]:
    """The rows of a table: those that move least as one, the last two what there is in all."""
    every = sum(row["bytes"] for row in kernels)
    large, small = ([row for row in kernels if (row["bytes"] < SMALL * every) == few] for few in (False, True))
    groups = {"others, together": small, "all but the products": [r for r in kernels if r["kernel"] != PRODUCTS]}
    groups |= {"a step": kernels}
    return [added(row["kernel"], [row]) for row in large] + [added(name, rows) for name, rows in groups.items()]


def added(name: str, rows: list[dict]) -> dict:
    """The sum of these rows, and the seconds that each card needs for them one after the other."""
    total = {"kernel": name} | {key: sum(row[key] for row in rows) for key in ("launches", "bytes", "asked", "flop")}
    for card, (bandwidth, peak) in CARDS.items():
        total[card] = sum(max(row["bytes"] / bandwidth, row["flop"] / peak) for row in rows)
    return total


def moved(row: dict | None) -> str:
    return f"{millions(row['bytes'])} MB" if row else NOT_MEASURED


def millions(size: float) -> str:
    return f"{size / 1e6:,.1f}"


def occupancy(files: list[dict]) -> str:
    rows = []
    for row in rows_of(files):
        cells = [f"`{row['kernel']}`", row["threads"]]
        for sm in ("80", "89", "90"):
            found = row[sm]
            cells += [found["registers"], f"{found['shared']:,}", f"{found['occupancy']:.0%}"]
        rows.append(" | ".join(map(str, cells)))
    header = "kernel | threads" + "".join(f" | sm_{sm}: registers | shared bytes | occupancy" for sm in (80, 89, 90))
    return table(
        "Registers of a thread and shared memory of a block, as nvcc compiles the kernels of both steps, and the share"
        " of a multiprocessor's warps that they allow (`python bench/gpu_parts.py occupancy`):",
        header,
        rows,
    )


def text(files: list[dict]) -> str:
    rows = [
        f"{r['megabytes']:,} MB | {r['tokenizer']} | {r['read_s']:.2f} s, {r['megabytes'] / r['read_s']:.0f} MB/s"
        f" | {r['again_s']:.2f} s | {r['megabytes'] / r['counted_s']:.0f} MB/s | {r['peak_per_byte']:.2f}"
        for file in files
        for r in file["results"]
    ]
    return table(
        "Reading a text (`python bench/text.py`) as tokens, and once more, and counting its yardsticks; memory at the"
        " peak, beyond the libraries', in bytes per byte of text:",
        "size | tokens | read and encoded | again | counted | memory",
        rows,
    )


TABLES = {
    "train_step": train_step,
    "memory": memory,
    "generate": generate,
    "ops": ops,
    "startup": startup,
    "text": text,
}
COUNTED_TABLES = {"traffic": traffic, "occupancy": occupancy}
GPU_TABLES = {
    "train_step": gpu_train_step, "generate": gpu_generate, "agreement": gpu_agreement, "training": gpu_training
}  # fmt: skip


def rows_of(files: list[dict]) -> list[dict]:
    return [row for file in files for row in file["results"]]


def middle_runs(files: list[dict], *keys: str) -> list[dict]:
    """A row for each value of these keys: of several runs the one with the middle ratio, with the rounds of all."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows_of(files):
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    middle = []
    for rows in groups.values():
        rows.sort(key=lambda row: row["ratio"] or 0)
        middle.append(rows[len(rows) // 2] | {"ratios": [ratio for row in rows for ratio in row["ratios"]]})
    return middle


def duration(ms: float | None, digits: int = 1) -> str:
    if ms is None:
        return NOT_MEASURED
    return f"{ms:.{digits}f} ms" if ms < 1000 else f"{ms / 1000:.2f} s"


def megabytes(mb: int | None) -> str:
    return NOT_MEASURED if mb is None else f"{mb} MB"


def count(number: float | None) -> str:
    return NOT_MEASURED if number is None else f"{number:,.0f}"


def speed(row: dict) -> str:
    if row["ratio"] is None:
        return NOT_MEASURED
    return f"{row['ratio']:.2f}x ({min(row['ratios']):.2f} to {max(row['ratios']):.2f})"


def table(caption: str, header: str, rows: list[str]) -> str:
    """Markdown; `header` and `rows` are cells joined by bars."""
    rule = "|".join("---" for _ in header.split("|"))
    return "\n".join([wrap(caption), "", f"| {header} |", f"|{rule}|", *(f"| {row} |" for row in rows)])


def wrap(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    main()
