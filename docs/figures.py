"""The pictures of the pages, from recorded runs: nothing is trained here.

python docs/figures.py      all of them, into docs/img; needs pip install -e ".[plot]"
"""

import io
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from gpt.files import atomic_write
from gpt.log import read_log
from gpt.plot import STYLE, YARDSTICKS

DOCS = Path(__file__).parent
IMAGES = DOCS / "img"
LINES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1.5)), "-")  # to be told apart in print
MARKERS = ("o", "s", "^", "D", "v", "P")


def main() -> None:
    for draw in (ladder,):
        draw(IMAGES / f"{draw.__name__}.svg")
        print(f"drawn: {draw.__name__}.svg")


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


def save(figure: Figure, path: Path) -> None:
    """As an SVG without a date, so that the same numbers give the same file."""
    picture = io.BytesIO()
    figure.savefig(picture, format="svg", metadata=dict.fromkeys(("Date", "Creator")))
    atomic_write(path, picture.getvalue())


if __name__ == "__main__":
    main()
