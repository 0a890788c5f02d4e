"""The pictures of the pages, of the numbers that these compute and of recorded runs:

python docs/figures.py               all of them, into docs/img; needs pip install -e ".[plot]"
python docs/figures.py adamw         or some
"""

import io
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from outputs import IMAGES, run

import tensorlite as tl
from gpt.files import atomic_write
from gpt.log import read_log
from gpt.plot import STYLE, YARDSTICKS
from gpt.text.dataset import on_validation

DOCS = Path(__file__).parent.absolute()
INK, GREY = "black", "#bbbbbb"
LINES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1.5)), "-")  # to be told apart in print
MARKERS = ("o", "s", "^", "D", "v", "P")
OPS = str(Path(tl.ops.__file__).parent)


def main() -> None:
    for name in sys.argv[1:] or FIGURES:
        draw(name, IMAGES / f"{name}.svg")
        print(f"drawn: {name}.svg")


def draw(name: str, path: Path) -> None:
    """One of the FIGURES, as an SVG without a date: the same numbers give the same file."""
    picture = io.BytesIO()
    with mpl.rc_context():
        mpl.rcdefaults()  # whatever the user's are
        mpl.rcParams.update(STYLE)
        FIGURES[name]().savefig(picture, format="svg", metadata=dict.fromkeys(("Date", "Creator")))
    atomic_write(path, picture.getvalue())


def computed_by(lesson: str, last: str | None = None) -> dict:
    """What the names of a page stand for when its blocks have run, up to the one that makes the `last` of them."""
    names = vars(module := ModuleType(lesson))
    for _ in run(DOCS / "lessons" / f"{lesson}.md", module):
        if last in names:
            break
    return names


def panels(*args, height: int, **how):
    """A figure 800 pixels wide, and its axes."""
    figure = Figure(figsize=(800 / 96, height / 96), layout="constrained")
    return figure, figure.subplots(*args, **how)


def memory() -> Figure:
    """Bytes of arrays over a step of lesson 4's GPT: with its whole batch, without gradients, and in micro-batches."""
    names = computed_by("04-memory")
    model, ids = names["model"], names["ids"]

    def step(size: int) -> None:
        for rows in (slice(i, i + size) for i in range(0, len(ids), size)):
            loss = model(ids[rows], ids[rows])[1]
            loss.backward()

    whole, parts = _held(lambda: step(8)), _held(lambda: step(2))
    with tl.no_grad():
        without = _held(lambda: model(ids, ids))
    figure, (left, right) = panels(1, 2, height=340, sharey=True)
    left.plot(np.linspace(0, 1, len(whole)), whole, color=INK, linewidth=1.3, label="recorded")
    left.plot(np.linspace(0, 0.5, len(without)), without, "--", color=INK, linewidth=1.3, label="under no_grad")
    left.axvline(0.5, color=GREY, linewidth=0.8, zorder=1)
    left.set(ylim=(0, None), ylabel="MiB held", title="8 rows at once")
    left.set_xticks([0.25, 0.75], ["forward", "backward"])
    right.plot(np.linspace(0, 1, len(parts)), parts, color=INK, linewidth=1.3)
    right.set(title="four micro-batches of 2 rows")
    right.set_xticks([0.125, 0.375, 0.625, 0.875], ["rows 0, 1", "2, 3", "4, 5", "6, 7"])
    right.legend(*left.get_legend_handles_labels(), loc="upper right")
    for axes in (left, right):
        axes.set_xlim(0, 1)
        axes.tick_params(length=0)
        axes.grid(visible=False, axis="x")
    return figure


def _held(step: Callable[[], object]) -> list[float]:
    """MiB of arrays made in `step` that live, each time that it has recorded an op or been through a vjp."""
    held, arrays = [], tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)  # and none of Python's objects

    def look(frame, event, arg):
        if event == "return" and (frame.f_code is tl.record.__code__ or _is_vjp(frame.f_code)):
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


def saturation() -> Figure:
    """What softmax makes of the products of random queries and keys, as they have more channels."""
    look, widths = computed_by("07-averaging")["look"], 2 ** np.arange(11)
    figure, both = panels(1, 2, height=320)
    for name, power, style, marker in (("q · k", 0.0, "-", "o"), ("q · k / √d", -0.5, "--", "s")):
        _, largest, slopes = np.transpose([look(d, float(d) ** power) for d in widths])
        for axes, values in zip(both, (largest, slopes), strict=True):
            axes.plot(widths, values, color=INK, linestyle=style, linewidth=1.1, marker=marker, markersize=4.5,
                      markerfacecolor="white", label=name)  # fmt: skip
    for axes in both:
        axes.set_xscale("log", base=2)
        axes.set_xticks(4 ** np.arange(6), [str(n) for n in 4 ** np.arange(6)])
        axes.minorticks_off()
        axes.set_xlabel("channels d of queries and keys")
    left, right = both
    left.set(ylim=(0, 1), title="the largest p of 16 weights")
    left.axhline(1 / 16, color=GREY, linewidth=0.8, zorder=1)
    left.text(1024, 1 / 16, "1/16", fontsize="small", color="#555555", va="bottom", ha="right")
    left.legend(loc="upper left")
    right.set(ylim=(0, 0.25), title="its slope p (1 − p)")
    return figure


def ladder() -> Figure:
    """Validation losses of the ladder's first six rungs, beside what counting reaches."""
    ideas = ("bigram", "one head", "four heads", "feed-forward", "residual blocks", "layer norm")
    figure, axes = panels(height=420)
    for i, idea in enumerate(ideas):
        rows, _ = read_log(DOCS / "data" / "ladder" / f"ladder-{i + 1}.jsonl")
        steps, losses = ([row[key] for row in rows[1:]] for key in ("step", "val_loss"))
        axes.plot(steps, losses, color="black", linestyle=LINES[i], linewidth=1.1, marker=MARKERS[i],
                  markersize=5, markerfacecolor="white", label=f"{i + 1}  {idea}")  # fmt: skip
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
    return figure


def adamw() -> Figure:
    """Walks through a valley by the gradient and by AdamW; losses with and without warm-up."""
    names = computed_by("09-adamw", "warmed")
    figure, (valley, losses) = panels(1, 2, height=330)
    x, y = np.meshgrid(np.linspace(-4.4, 1.2, 40), np.linspace(-1.2, 1.2, 40))
    levels = [0.3, 2, 6, 14, 30, 60]
    valley.contour(x, y, (x**2 + 100 * y**2) / 2, levels, colors=GREY, linewidths=0.8)
    look = {"color": INK, "markersize": 4, "linewidth": 1, "markerfacecolor": "white"}
    for walk, style, name in ((names["sgd_walk"], "s:", "gradient descent"), (names["adamw_walk"], "o-", "AdamW")):
        valley.plot(*np.transpose(walk), style, label=name, **look)
    valley.plot(0, 0, "+", color=INK, markersize=12)
    valley.set(title="a valley, thirty steps", xlabel="x", ylabel="y")
    valley.grid(False)
    for runs, style, name in ((names["without"], ":", "no warm-up"), (names["warmed"], "-", "20 steps of warm-up")):
        losses.plot(np.mean(runs, axis=0), style, color=INK, linewidth=1.6, label=name)
    losses.set(title="two spirals: mean of six runs", xlabel="step", ylabel="loss", ylim=(0, 1.3))
    for axes in (valley, losses):
        axes.legend(loc="upper right", fontsize="small")
    return figure


def sampling() -> Figure:
    """Five probabilities, and what temperature, top-k and top-p make of them."""
    shares = computed_by("11-sampling", "shares")["shares"]
    figure, axes = panels(1, len(shares), height=230, sharey=True)
    before = next(iter(shares.values()))
    for one, (name, after) in zip(axes, shares.items(), strict=True):
        bars = one.bar(list("abcde"), after, color="#999999", width=0.7)
        one.bar(list("abcde"), before, color="none", edgecolor=INK, linewidth=0.9, width=0.7, linestyle=":")
        one.bar_label(bars, [f"{share:.2f}" if share else "–" for share in after], fontsize="x-small", padding=2)
        one.set_title(name, fontsize="small")
        one.grid(False)
    axes[0].set(ylabel="probability", ylim=(0, 0.82))
    return figure


def fitting() -> Figure:
    """The losses of a model that learns its text by heart, beside what counting reaches, and the least there can be."""
    names = computed_by("10-is-it-good", "rows")
    rows, yardsticks = names["rows"], on_validation(names["counted"]) | {"least": names["source"]}
    figure, axes = panels(height=340)
    steps = [row["step"] for row in rows]
    for part, style, name in (("val", "o-", "validation half"), ("train", "s:", "training half")):
        loss, error = (np.array([row[f"{part}_{what}"] for row in rows]) for what in ("loss", "stderr"))
        axes.plot(steps, loss, style, color=INK, markersize=4, linewidth=1.2, markerfacecolor="white", label=name)
        axes.fill_between(steps, loss - error, loss + error, color=GREY, alpha=0.6, linewidth=0)
    sides = {"uniform": "bottom", "unigram": "top"}  # they nearly meet
    for name, loss in yardsticks.items():
        axes.axhline(loss, color="#666666", linewidth=0.8, linestyle="--", zorder=1)
        axes.text(101.5, loss, f"{name} {loss:.2f}", fontsize="small", va=sides.get(name, "center"))
    axes.set(xlabel="step", ylabel="loss (nats per letter)", xlim=(-1, 101))
    axes.legend(loc="lower left", fontsize="small")
    return figure


FIGURES = {figure.__name__: figure for figure in (adamw, fitting, ladder, memory, sampling, saturation)}


if __name__ == "__main__":
    main()
