"""The Python in README.md and docs/ does what it says there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(section: str) -> list[str]:
    """The code blocks of a section of README.md."""
    return re.findall(r"```\w*\n(.*?)```", README.split(f"## {section}\n")[1].split("\n## ")[0], re.DOTALL)


def test_the_first_example_prints_what_is_shown(capsys):
    code, shown = re.findall(r"```(?:python)?\n(.*?)```", README.split("## Set up")[0], re.DOTALL)[1:3]
    exec(code, {})
    assert capsys.readouterr().out == shown


def test_the_engines_example_learns(capsys):
    exec(blocks("Use the engine by itself")[0], {})
    assert float(capsys.readouterr().out) < 0.1


def test_the_planted_errors_are_found_in_the_words_shown():
    names, (first, said, second, also_said, *_) = {}, blocks("Check your own gradients")
    for code, shown in ((first, said), (second, also_said)):
        with pytest.raises(AssertionError) as info:
            exec(code, names)
        assert f"{info.typename}: {info.value}" == shown.strip()


def test_the_answers_shown_are_those_given():
    text = (ROOT / "docs" / "from-pytorch.md").read_text(encoding="utf-8")
    setup, *lines = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1].strip().splitlines()
    for line in filter(None, lines):
        names = {}
        exec(setup, names)
        with pytest.raises((TypeError, AttributeError)) as info:
            exec(line, names)
        assert line.endswith(f"# {info.typename}: {info.value}")
