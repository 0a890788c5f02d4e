"""The pictures in docs/img are what docs/figures.py draws."""

import re
from pathlib import Path

import figures
import numpy as np
import pytest


def read(path: Path) -> tuple[list[str], list[list[float]]]:
    """The words of a picture, and the points of each of its lines, in points of 1/72 inch."""
    svg = path.read_text(encoding="utf-8")
    lines = re.findall(r'<path d="([^"]+)"', svg)
    return re.findall(r">([^<>]+)</text>", svg), [[float(x) for x in re.findall(r"-?\d+\.?\d*", d)] for d in lines]


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_picture_is_what_is_drawn(name, tmp_path):
    kept = figures.IMAGES / f"{name}.svg"
    figures.FIGURES[name](tmp_path / "drawn.svg")
    (words, lines), (kept_words, kept_lines) = read(tmp_path / "drawn.svg"), read(kept)
    assert words == kept_words
    assert len(lines) == len(kept_lines) > 5
    for line, kept_line in zip(lines, kept_lines, strict=True):
        np.testing.assert_allclose(line, kept_line, atol=1.0)
    assert kept.stat().st_size < 60_000
