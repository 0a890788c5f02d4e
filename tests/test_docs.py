"""The pages in docs/ do what they show: their Python runs, prints what stands below it, and draws their pictures."""

import re
import shutil

import pytest
from lines import ROOT

PAGES = ["microscope"]
BLOCK = re.compile(r"```python\n(.*?)```(?:\n```text\n(.*?)```)?", re.DOTALL)
PASSING = re.compile(r"(?:[\d.]+ \+ )?[\d.]+ (?:ms|s|MB)\b|(?<=\.py):\d+")  # times, and numbers of lines of our own
NUMBER = re.compile(r"[-+]?\d+\.?\d*(?:e[-+]?\d+)?")


def assert_alike(printed: str, shown: str) -> None:
    """The same but for the last digits of numbers, which are the processor's, and for times, which are its mood."""
    printed, shown = (PASSING.sub("", text) for text in (printed, shown))
    assert NUMBER.sub("#", " ".join(printed.split())) == NUMBER.sub("#", " ".join(shown.split()))
    for ours, theirs in zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True):
        assert float(ours) == pytest.approx(float(theirs), rel=0.02), f"{ours} for {theirs}"


@pytest.mark.parametrize("page", PAGES)
def test_a_page_does_what_it_shows(page, cwd, capsys):
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    names = {"__name__": page}
    for code, shown in BLOCK.findall(text):
        exec(compile(code, f"docs/{page}.md", "exec"), names)
        assert_alike(capsys.readouterr().out, shown)
    for picture in re.findall(r"\]\(img/(\w+\.svg)\)", text):
        if (cwd / picture).exists():
            drawn, kept = (re.findall(r">([^<>]+)</text>", (folder / picture).read_text(encoding="utf-8"))
                           for folder in (cwd, ROOT / "docs" / "img"))  # fmt: skip
            assert_alike("\n".join(drawn), "\n".join(kept))
    shutil.rmtree(cwd / "cache", ignore_errors=True)
