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
from gpt.plot import STYLE

DOCS = Path(__file__).parent
IMAGES = DOCS / "img"
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
    held = []

    def look(frame, event, arg):
        code = frame.f_code
        if event == "return" and (code is tl.record.__code__ or _is_vjp(code)):
            held.append(round(tracemalloc.get_traced_memory()[0] / 2**20, 2))  # without Python's own objects

    tracemalloc.start()
    sys.setprofile(look)
    step()
    sys.setprofile(None)
    tracemalloc.stop()
    return held


def _is_vjp(code) -> bool:
    return code.co_name in ("vjp", "<lambda>") and code.co_filename.startswith(OPS)


def save(figure: Figure, path: Path) -> None:
    """As an SVG without a date, so that the same numbers give the same file."""
    picture = io.BytesIO()
    figure.savefig(picture, format="svg", metadata=dict.fromkeys(("Date", "Creator")))
    atomic_write(path, picture.getvalue())


FIGURES = {draw.__name__: draw for draw in (memory,)}

if __name__ == "__main__":
    main()
