"""The pictures of the pages: the same numbers each time, from fixed seeds and recorded runs.

python docs/figures.py [NAME...]      all of them or these, into docs/img; needs pip install -e ".[plot]"
"""

import io
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

import tensorlite as tl
from gpt import GPT, GPTConfig
from gpt.files import atomic_write
from gpt.log import read_log
from gpt.plot import STYLE, YARDSTICKS

DOCS = Path(__file__).parent
IMAGES = DOCS / "img"
LINES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1.5)), "-")  # to be told apart in print
MARKERS = ("o", "s", "^", "D", "v", "P")
OPS = str(Path(tl.ops.__file__).parent)


def main() -> None:
    for name in sys.argv[1:] or FIGURES:
        FIGURES[name](IMAGES / f"{name}.svg")
        print(f"drawn: {name}.svg")


def memory(path: Path) -> None:
    """Bytes that live over a step of a small GPT: of the whole batch, of micro-batches, and without gradients."""
    model = GPT(GPTConfig(vocab_size=65, block_size=64, n_layer=2, n_head=4, n_embd=64), seed=1)
    ids = np.arange(8 * 64).reshape(8, 64) % 65

    def step(size: int) -> None:
        for rows in (slice(i, i + size) for i in range(0, 8, size)):
            loss = model(ids[rows], ids[rows])[1]
            loss.backward()

    step(8)  # once, so that every .grad is there
    whole, parts = _live_bytes(lambda: step(8)), _live_bytes(lambda: step(2))
    with tl.no_grad():
        without = _live_bytes(lambda: model(ids, ids))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(800 / 96, 340 / 96), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        left.plot(np.linspace(0, 1, len(whole)), whole, color="black", linewidth=1.3, label="recorded")
        left.plot(np.linspace(0, 0.5, len(without)), without, color="black", linewidth=1.3, linestyle=(0, (4, 2)),
                  label="under no_grad")  # fmt: skip
        right.plot(np.linspace(0, 1, len(parts)), parts, color="black", linewidth=1.3)
        left.axvline(0.5, color="#777777", linewidth=0.8, zorder=1)
        right.legend(*left.get_legend_handles_labels(), loc="upper right")
        left.set(xlim=(0, 1), ylim=(0, None), ylabel="MiB held", title="8 rows at once")
        left.set_xticks([0.25, 0.75], ["forward", "backward"])
        right.set(xlim=(0, 1), title="four micro-batches of 2 rows")
        right.set_xticks([0.125, 0.375, 0.625, 0.875], ["rows 0, 1", "2, 3", "4, 5", "6, 7"])
        for axes in (left, right):
            axes.tick_params(length=0)
            axes.grid(visible=False, axis="x")
        save(figure, path)


def _live_bytes(step: Callable[[], object]) -> list[float]:
    """MiB held more than before `step`, each time that it has recorded an op or been through a vjp."""
    held, arrays = [], tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)  # and none of Python's objects

    def look(frame, event, arg):
        code = frame.f_code
        if event == "return" and (code is tl.record.__code__ or _is_vjp(code)):
            traces = tracemalloc.take_snapshot().filter_traces([arrays]).traces
            held.append(sum(trace.size for trace in traces) / 2**20)

    tracemalloc.start()
    sys.setprofile(look)
    step()
    sys.setprofile(None)
    tracemalloc.stop()
    return held


def _is_vjp(code) -> bool:
    return code.co_name in ("vjp", "<lambda>") and code.co_filename.startswith(OPS)


def ladder(path: Path) -> None:
    """Validation losses of the ladder's first six rungs, beside what counting reaches."""
    ideas = ("bigram", "one head", "four heads", "feed-forward", "residual blocks", "layer norm")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(800 / 96, 420 / 96), layout="constrained")
        axes = figure.subplots()
        for i, idea in enumerate(ideas):
            rows, _ = read_log(DOCS / "data" / "ladder" / f"ladder-{i + 1}.jsonl")
            steps, losses = ([row[key] for row in rows[1:]] for key in ("step", "val_loss"))
            (line,) = axes.plot(steps, losses, color="black", linestyle=LINES[i], linewidth=1.1, marker=MARKERS[i],
                                markersize=5, markerfacecolor="white", label=f"{i + 1}  {idea}")  # fmt: skip
            line.set_gid(f"ladder-{i + 1}")
            axes.annotate(f"{i + 1}: {losses[-1]:.2f}", (steps[-1], losses[-1]), (8, (0, 0, 2, -2, 4, -4)[i]),
                          textcoords="offset points", va="center", fontsize="small")  # fmt: skip
        for name in YARDSTICKS[2:]:
            axes.axhline(rows[0][name], color="#777777", linewidth=0.8, linestyle=":", zorder=1)
            axes.text(2700, rows[0][name], f"{name}s counted", fontsize="small", color="#555555", va="bottom")
        axes.set_xlabel("step")
        axes.set_ylabel("validation loss (nats per character)")
        axes.set_xlim(400, 5500)
        axes.set_ylim(2.0, 3.0)  # where they differ: all begin at ln 65 = 4.17
        axes.legend(loc="upper right")
        save(figure, path)


def saturation(path: Path) -> None:
    """What softmax makes of the products of random queries and 16 keys, as they have more channels."""
    widths = 2 ** np.arange(11)
    curves = {name: np.array([_attended(d, scale(d)) for d in widths]) for name, scale in SCALES.items()}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(800 / 96, 320 / 96), layout="constrained")
        left, right = figure.subplots(1, 2)
        for (name, values), style, marker in zip(curves.items(), LINES, MARKERS, strict=False):
            for axes, column in zip((left, right), values.T, strict=True):
                axes.plot(widths, column, color="black", linestyle=style, linewidth=1.1, marker=marker, markersize=4.5,
                          markerfacecolor="white", label=name)  # fmt: skip
        left.axhline(1 / 16, color="#777777", linewidth=0.8, linestyle=":", zorder=1)
        left.text(1024, 1 / 16, "1/16", fontsize="small", color="#555555", va="bottom", ha="right")
        left.set(ylim=(0, 1), title="the largest p of 16 weights")
        right.set(ylim=(0, 0.25), title="its slope p (1 − p)")
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set_xticks(4 ** np.arange(6), [str(n) for n in 4 ** np.arange(6)])
            axes.minorticks_off()
            axes.set_xlabel("channels d of queries and keys")
        left.legend(loc="upper left")
        save(figure, path)


SCALES = {"q · k": lambda d: 1.0, "q · k / √d": lambda d: d**-0.5}


def _attended(d: int, scale: float) -> tuple[float, float]:
    """Means over 500 queries and 60 sets of keys: the largest weight p, and p (1 - p), its slope by its own score."""
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((500, d)), rng.standard_normal((60 * 16, d))
    largest = tl.softmax((q @ k.T * scale).reshape(-1, 16)).numpy().max(axis=-1)
    return largest.mean(), (largest * (1 - largest)).mean()


def save(figure: Figure, path: Path) -> None:
    """As an SVG without a date, so that the same numbers give the same file."""
    picture = io.BytesIO()
    figure.savefig(picture, format="svg", metadata=dict.fromkeys(("Date", "Creator")))
    atomic_write(path, picture.getvalue())


FIGURES = {draw.__name__: draw for draw in (ladder, memory, saturation)}

if __name__ == "__main__":
    main()
