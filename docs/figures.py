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


def computed_by(lesson: str) -> dict:
    """What the names of a page stand for when its blocks have run."""
    module = ModuleType(lesson)
    for _ in run(LESSONS / f"{lesson}.md", module):
        pass
    return vars(module)


def panels(*args, height: int, **how):
    """A figure 800 pixels wide, and its axes."""
    figure = Figure(figsize=(800 / 96, height / 96), layout="constrained")
    return figure, figure.subplots(*args, **how)


def adamw() -> Figure:
    """Walks through a valley by the gradient and by AdamW; losses with and without warm-up."""
    names = computed_by("09-adamw")
    figure, (valley, losses) = panels(1, 2, height=330)
    x, y = np.meshgrid(np.linspace(-4.4, 1.2, 40), np.linspace(-1.2, 1.2, 40))
    levels = [0.3, 2, 6, 14, 30, 60]
    valley.contour(x, y, (x**2 + 100 * y**2) / 2, levels, colors=GREY, linewidths=0.8)
    for walk, style, name in ((names["sgd_walk"], "s:", "gradient descent"), (names["adamw_walk"], "o-", "AdamW")):
        valley.plot(*np.transpose(walk), style, color=INK, markersize=4, linewidth=1, markerfacecolor="white", label=name)
    valley.plot(0, 0, "+", color=INK, markersize=12)
    valley.set(title="a valley, thirty steps", xlabel="x", ylabel="y")
    valley.grid(False)
    for runs, style, name in ((names["without"], ":", "no warm-up"), (names["warmed"], "-", "20 steps of warm-up")):
        losses.plot(np.mean(runs, axis=0), style, color=INK, linewidth=1.6, label=name)
    losses.set(title="two spirals: mean of six runs", xlabel="step", ylabel="loss", ylim=(0, 1.3))
    for axes in (valley, losses):
        axes.legend(loc="upper right", fontsize="small")
    return figure


FIGURES = {figure.__name__: figure for figure in (adamw,)}


if __name__ == "__main__":
    main()
