"""The pictures of the lessons, of the numbers that their pages compute:

    python docs/figures.py               all of them, into docs/img; needs pip install -e ".[plot]"
    python docs/figures.py adamw         or some
"""

import io
import sys
from pathlib import Path
from types import ModuleType

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from outputs import IMAGES, run

from gpt.files import atomic_write
from gpt.plot import STYLE
from gpt.text.dataset import on_validation

LESSONS = Path(__file__).parent.absolute() / "lessons"
INK, GREY = "black", "#bbbbbb"


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


def computed_by(lesson: str, last: str) -> dict:
    """What the names of a page stand for after the block that makes the `last` of them."""
    names = vars(module := ModuleType(lesson))
    for _ in run(LESSONS / f"{lesson}.md", module):
        if last in names:
            return names
    raise KeyError(f"no block of {lesson} makes {last}")


def panels(*args, height: int, **how):
    """A figure 800 pixels wide, and its axes."""
    figure = Figure(figsize=(800 / 96, height / 96), layout="constrained")
    return figure, figure.subplots(*args, **how)


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


FIGURES = {figure.__name__: figure for figure in (adamw, fitting, sampling)}


if __name__ == "__main__":
    main()
