"""The pages in docs/ do what they show: their Python runs, prints what stands below it, and draws their pictures."""

import re

import cuda_on_cpu
import figures
import numpy as np
import pytest
from cuda_on_cpu import Module, thread_order
from lines import ROOT
from outputs import BLOCK, run

from tensorlite.backends.cuda.kernels import source

PAGES = [page for page in sorted((ROOT / "docs").rglob("*.md")) if "```text" in page.read_text(encoding="utf-8")]
# What no run repeats: times, and the lines of our files.
PASSING = re.compile(r"(?:[\d.]+ \+ )?[\d.]+ (?:ms|s|MB)\b|(?<=\.py):\d+")
NUMBER = re.compile(r"[-+]?\d+\.?\d*(?:e[-+]?\d+)?")


def assert_alike(printed: str, shown: str) -> None:
    """The same but for the last digits of numbers, which are the processor's."""
    printed, shown = (PASSING.sub("", text) for text in (printed, shown))
    assert NUMBER.sub("#", " ".join(printed.split())) == NUMBER.sub("#", " ".join(shown.split()))
    for ours, theirs in zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True):
        assert float(ours) == pytest.approx(float(theirs), rel=0.02, abs=1e-9), f"{ours} for {theirs}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_does_what_it_shows(page, cwd):
    for block, printed in run(page):
        assert_alike(printed, block[2] or "")
    for picture in re.findall(r"\]\((?:\.\./)?img/(\w+\.svg)\)", page.read_text(encoding="utf-8")):
        assert (ROOT / "docs" / "img" / picture).exists()
        if (cwd / picture).exists():  # one that the page has drawn
            drawn, kept = (re.findall(r">([^<>]+)</text>", (folder / picture).read_text(encoding="utf-8"))
                           for folder in (cwd, ROOT / "docs" / "img"))  # fmt: skip
            assert_alike("\n".join(drawn), "\n".join(kept))


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_is_that_of_its_page(name, tmp_path):
    def drawn(picture):
        svg = picture.read_text(encoding="utf-8")
        places = re.findall(r'\bd="([^"]*)"|<use [^>]*?x="([-\d.]+)" y="([-\d.]+)"', svg)
        return re.findall(r">([^<>]+)</text>", svg), [float(x) for x in NUMBER.findall(" ".join(map(" ".join, places)))]

    figures.draw(name, tmp_path / "again.svg")
    (texts, places), (kept_texts, kept) = drawn(tmp_path / "again.svg"), drawn(ROOT / "docs" / "img" / f"{name}.svg")
    assert_alike("\n".join(texts), "\n".join(kept_texts))
    np.testing.assert_allclose(places, kept, atol=1.0)  # point of 1/72 inch


def test_a_block_that_prints_is_followed_by_what_it_prints():
    assert BLOCK.findall("```python\nprint(1)\n```\n```text\n1\n```\n\n```python\nx\n```\n") == [
        ("print(1)\n", "1\n"), ("x\n", "")
    ]  # fmt: skip


@pytest.mark.skipif(cuda_on_cpu.GXX is None, reason=cuda_on_cpu.MISSING)
def test_the_kernel_of_a_page_computes_what_it_says():
    page = (ROOT / "docs" / "lessons" / "13-own-op.md").read_text(encoding="utf-8")
    kernel = Module(source() + re.search(r"```cpp\n(.*?)```", page, re.DOTALL)[1], ("-DSTORAGE=64",))
    x, weight, eps = np.random.default_rng(0).standard_normal((11, 70)), np.linspace(-1, 2, 70), 1e-5
    rms = np.sqrt((x**2).mean(axis=1) + eps)
    for order in (0, 1, 2, 7):
        y, r = np.full_like(x, np.nan), np.full(11, np.nan)
        with thread_order(order):
            kernel.get_function("rms_norm")((2,), (256,), (x, weight, y, r, *x.shape, eps))
        np.testing.assert_allclose(y, x / rms[:, None] * weight, rtol=1e-12)
        np.testing.assert_allclose(r, 1 / rms, rtol=1e-12)
