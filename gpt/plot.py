"""Draw the losses of runs over each other, with their learning rates and gradient norms.

python -m gpt.plot runs/little-shakespeare                loss.svg in that folder
python -m gpt.plot runs/a runs/b --x time --out ab.png    two runs, by the time they took
"""

import io
import math
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from gpt.cli import Parser, run_script
from gpt.errors import MissingLibraryError, UserError
from gpt.files import atomic_write
from gpt.log import read_log
from gpt.terminal import printable, say
from gpt.text.tokenizers import readable

YARDSTICKS = ("uniform", "unigram", "bigram", "trigram")  # losses that counting reaches, if the log has them
PANELS = {"lr": "learning rate", "grad_norm": "gradient norm"}
# Two cycles of different lengths, so that thirty runs can be told apart, and six without colours.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#7B3294", "#E69F00")  # Okabe and Ito's, for any eye
MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚"}
MOST_POINTS, MOST_MARKERS = 1000, 24  # of a line
MOST_NAME = 28  # characters: two runs fit side by side
LOG_FROM = 15  # times the smallest value is the largest one of a logarithmic axis
UNITS = ((180, 1, "seconds"), (10800, 60, "minutes"), (math.inf, 3600, "hours"))  # up to when, how long, and its name
TRAINING = {"linestyle": (0, (4, 2)), "linewidth": 1.1, "markerfacecolor": "white"}
STYLE = {
    "axes.edgecolor": "#888888", "axes.grid": True, "axes.spines.right": False, "axes.spines.top": False,
    "axes.titlesize": "medium", "font.size": 10, "grid.color": "#e4e4e4", "legend.frameon": False,
    "svg.fonttype": "none", "svg.hashsalt": "tensorlite",
}  # fmt: skip


class Run(NamedTuple):
    """What is drawn of a run, and how: columns of equal length, with nan for what is missing."""

    name: str
    columns: dict[str, list[float]]
    best: int | None  # the row of the lowest validation loss
    yardsticks: dict[str, float]
    colour: str
    marker: str


def main() -> int:
    parser = Parser(prog="python -m gpt.plot", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--out", type=Path, metavar="FILE", help="an .svg or .png (default: loss.svg in the first RUN)")
    parser.add_argument("--x", choices=("step", "time"), default="step", help="what to draw over (default: step)")
    args = parser.parse_args()
    out = args.out or args.runs[0] / "loss.svg"
    draw(args.runs, out, args.x)
    say(f"drawn: {out}")
    return 0


def draw_run(folder: Path, out: Path) -> str | None:
    """Draw one run into `out`; None, or a sentence that says why there is no picture."""
    try:
        draw([folder], out)
    except UserError as error:
        return str(error)
    return None


def draw(folders: list[Path], out: Path, x: str = "step") -> None:
    """Draw runs over each other into `out`, an .svg or .png, by "step" or by "time"."""
    kind = out.suffix[1:].lower()
    if kind not in ("svg", "png"):
        raise UserError(f"--out must end in .svg or .png, got {out}")
    try:
        import matplotlib
    except ImportError:
        raise MissingLibraryError("a picture of the losses", "matplotlib", "plot") from None
    runs, picture = [_read(folder, i) for i, folder in enumerate(folders)], io.BytesIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of signs that the font lacks, in a run's name
        matplotlib.rcdefaults()  # whatever the user's are
        matplotlib.rcParams.update(STYLE)
        undated = dict.fromkeys(("Date", "Creator")) if kind == "svg" else None
        _figure(runs, x).savefig(picture, format=kind, dpi=192, metadata=undated)
    atomic_write(out, picture.getvalue())


def _read(folder: Path, i: int) -> Run:
    """The `i`-th run of a picture."""
    rows, _ = read_log(folder / "log.jsonl")
    if not rows:
        raise UserError(f"there is nothing to draw in {folder}: its log.jsonl has no evaluation")
    evaluated = [i for i, row in enumerate(rows) if row.get("val_loss") is not None]
    best = min(evaluated, key=lambda i: rows[i]["val_loss"], default=None)
    every = math.ceil(len(rows) / MOST_POINTS)
    kept = [i for i in range(len(rows)) if i % every == 0 or i in (best, len(rows) - 1)]
    names = ("step", "elapsed", "train_loss", "train_stderr", "val_loss", "val_stderr", *PANELS)
    columns = {name: [math.nan if (v := rows[i].get(name)) is None else v for i in kept] for name in names}
    yardsticks = {name: rows[0][name] for name in YARDSTICKS if rows[0].get(name) is not None}
    name = printable(readable(folder.resolve().name))
    name = name if len(name) <= MOST_NAME else f"…{name[1 - MOST_NAME :]}"
    how = COLOURS[i % len(COLOURS)], [*MARKERS][i % len(MARKERS)]
    return Run(name.replace("$", r"\$"), columns, None if best is None else kept.index(best), yardsticks, *how)


def _figure(runs: list[Run], x: str):
    """The picture: 800 pixels wide as an SVG."""
    from matplotlib.figure import Figure

    panels = [key for key in PANELS if _finite(run.columns[key] for run in runs)]
    figure = Figure(figsize=(800 / 96, (360 + 90 * len(panels) + 9 * len(runs)) / 96), layout="constrained")
    heights = [4.5] + [1] * len(panels)
    losses, *small = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    column, unit, label = "step", 1, "step"
    if x == "time":
        longest = max(_finite(run.columns["elapsed"] for run in runs), default=0)
        column, (_, unit, label) = "elapsed", next(row for row in UNITS if longest < row[0])
    for run in runs:
        xs = [value / unit for value in run.columns[column]]
        _draw_losses(losses, run, xs)
        for axes, key in zip(small, panels, strict=True):
            axes.plot(xs, run.columns[key], **_line(run, size=3))
    for axes, key in zip(small, panels, strict=True):
        axes.set_title(PANELS[key], loc="left", fontsize="small")
        values = _finite(run.columns[key] for run in runs)
        peaks = [max(found) for run in runs if (found := _finite([run.columns[key]]))]
        if not _scale_by(axes, peaks if key == "lr" else values):  # a decay to almost 0 is best seen as it is
            axes.set_ylim(0, 1.2 * max(values) or 1)
    _finish(losses, runs)
    if x == "step":
        losses.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    figure.axes[-1].set_xlabel(label if x == "step" else f"time ({label})")
    return figure


def _draw_losses(axes, run: Run, xs: list[float]) -> None:
    """Both losses with their bands, the best point, and a cross at the top where a loss was not finite."""
    for part, style in (("val", {}), ("train", TRAINING)):
        loss, error = run.columns[f"{part}_loss"], run.columns[f"{part}_stderr"]
        axes.plot(xs, loss, **_line(run) | style)
        low, high = ([a + sign * b for a, b in zip(loss, error, strict=True)] for sign in (-1, 1))
        axes.fill_between(xs, low, high, color=run.colour, alpha=0.25, linewidth=0)
        if len(xs) <= MOST_MARKERS:
            axes.vlines(xs, low, high, color=run.colour, linewidth=0.8, zorder=1.5)  # which a point alone has too
        lost = [at for at, value in zip(xs, loss, strict=True) if not math.isfinite(value)]
        if lost:  # the height is the axes', not the data's
            axes.plot(lost, [1] * len(lost), "x", color=run.colour, transform=axes.get_xaxis_transform(), clip_on=False)
    if run.best is not None:
        at = xs[run.best], run.columns["val_loss"][run.best]
        axes.plot(*at, "o", markersize=11, markerfacecolor="none", markeredgecolor="black")


def _line(run: Run, size: float = 5) -> dict:
    every = math.ceil(len(run.columns["step"]) / MOST_MARKERS)
    return {"color": run.colour, "marker": run.marker, "markersize": size, "markevery": every, "linewidth": 1.4}


def _finish(axes, runs: list[Run]) -> None:
    """The scale; the legend; at the right the values of the yardsticks and of the best points."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    labels, handles = [], []
    if all(run.yardsticks == runs[0].yardsticks for run in runs):  # else they are of different texts
        for name, value in runs[0].yardsticks.items():
            axes.axhline(value, color="#444444", linewidth=1, linestyle=":", zorder=1)
            labels.append((value, f"{name} {value:.3f}", "#444444"))
    for run in runs:
        best = ""
        if run.best is not None:
            value, step = run.columns["val_loss"][run.best], run.columns["step"][run.best]
            labels.append((value, f"{MARKERS[run.marker]} {value:.4f}", run.colour))
            best = f": best {value:.4f} at step {step:,}"
        handles.append(Line2D([], [], color=run.colour, marker=run.marker, label=f" {run.name}{best}"))
    for label, style in (("validation", {}), ("training", TRAINING)):
        handles.append(Line2D([], [], color="black", marker="o", markersize=5, label=label, **style))
    handles.append(Patch(color="black", alpha=0.25, linewidth=0, label="± standard error"))
    drawn = [value for run in runs for part in ("val_loss", "train_loss") for value in run.columns[part]]
    if not all(map(math.isfinite, drawn)):
        handles.append(Line2D([], [], color="black", marker="x", linestyle="none", label="not finite"))
    columns = len(handles) if len(runs) == 1 else 2
    axes.figure.legend(handles=handles, loc="outside upper left", ncols=columns, fontsize="small", columnspacing=1.2)
    axes.set_ylabel("loss (nats per token)")
    _scale_by(axes, _finite([drawn]) + [value for value, _, _ in labels])
    lowest, (bottom, top), scaled = -1.0, axes.get_ylim(), axes.yaxis.get_transform().transform
    for value, text, colour in sorted(labels):  # each at its height, or above the one below it
        lowest = max((scaled(value) - scaled(bottom)) / (scaled(top) - scaled(bottom)), lowest + 0.055)
        axes.text(1.01, lowest, text, color=colour, fontsize="small", va="center", transform=axes.transAxes)


def _finite(columns: Iterable[list[float]]) -> list[float]:
    return [value for column in columns for value in column if math.isfinite(value)]


def _scale_by(axes, values: list[float]) -> bool:
    """Whether the axis is logarithmic now, for its values are of different magnitudes."""
    if not values or not 0 < LOG_FROM * min(values) < max(values):
        return False
    axes.set_yscale("log")
    return True


if __name__ == "__main__":
    run_script(main, "leave out some of the runs")
