"""The fixture `gradcheck` in the tests of somebody else."""

import importlib.metadata
import tomllib
from pathlib import Path

import tensorlite

pytest_plugins = "pytester"

TESTS = """
import numpy as np
import pytest

import tensorlite as tl


def square(x):
    wrong = np.where(x.data == 3, 0.001, 0)
    return tl.record(x.data**2, (x,), lambda gy: (gy * (2 * x.data + wrong),))


def test_right(gradcheck):
    assert gradcheck(square, np.arange(3.0), rtol=1e-6)


def test_wrong(gradcheck):
    gradcheck(square, np.arange(5.0))


def test_caught(gradcheck):
    with pytest.raises(tl.GradcheckError, match="element"):
        gradcheck(square, np.arange(5.0))


def test_unusable(gradcheck):
    with pytest.raises(TypeError):
        gradcheck(square, np.arange(5))
"""


def run(pytester, monkeypatch, *options):
    """pytest in a process of its own, with this plugin and no other, installed or not."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(tensorlite.__file__).parents[1]))
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    return pytester.runpytest_subprocess("-p", "tensorlite.pytest_plugin", "-W", "error", *options)


def test_a_failure_is_a_table_and_points_to_the_test(pytester, monkeypatch):
    pytester.makepyfile(TESTS)
    result = run(pytester, monkeypatch)
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines([
        ">       gradcheck(square, np.arange(5.0))",
        "E *GradcheckError: *input 0*element (3,)*expected*got*",
        "E *element *expected *got *ratio",
        "E *input 0 *(3,) * ± * 1.*e+*",
        "",
        "*:*: GradcheckError",
    ])  # fmt: skip
    files = [line for line in result.outlines if line.endswith("GradcheckError") and ": " in line]
    assert len(files) == 1, "the traceback goes on into our files"


def test_pytest_says_what_the_fixture_does(pytester, monkeypatch):
    result = run(pytester, monkeypatch, "--fixtures")
    result.stdout.fnmatch_lines(["gradcheck *tensorlite*", "*as a table of the worst elements*"])


def test_the_entry_point_is_declared():
    project = tomllib.loads(Path(tensorlite.__file__).parents[1].joinpath("pyproject.toml").read_text())["project"]
    entry_points = project["entry-points"]["pytest11"]
    assert entry_points == {"tensorlite": "tensorlite.pytest_plugin"}
    entry = importlib.metadata.EntryPoint("tensorlite", entry_points["tensorlite"], "pytest11")
    assert entry.load().gradcheck
