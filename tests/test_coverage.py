"""`python -m tensorlite.gradcheck`: the gradients of every op, and what it says when some are wrong or unchecked."""

import sys
from dataclasses import replace

import numpy as np
import pytest

import tensorlite
from tensorlite import backends, ops, record
from tensorlite.gradcheck import __main__ as coverage
from tensorlite.gradcheck.cases import CASES

NUMPY = ["--backend", "numpy", "--dtype", "float64"]


def lines(capsys) -> list[str]:
    out, err = capsys.readouterr()
    assert err == ""
    return out.splitlines()


def test_float32_gradients_of_every_op(capsys):
    assert coverage.main(["--backend", "numpy", "--dtype", "float32"]) == 0
    head, *rows = lines(capsys)
    assert head.split() == ["cases", "numpy", "float32"]
    assert [row.split()[0] for row in rows] == ops.__all__
    assert sum(int(row.split()[1]) for row in rows) == len(CASES)
    worst = {row.split()[0]: row.split()[2] for row in rows}
    assert worst.pop("cast") == "-"  # its case is of float64
    assert all(0 <= float(error) < 1 for error in worst.values())


def test_bfloat16_gradients_on_a_device(capsys, device):
    """The stand-in's kernels, of one op."""
    assert coverage.main(["--backend", "cupy", "--dtype", "bfloat16", "--op", "tanh"]) == 0
    assert len(lines(capsys)) == 2


@pytest.fixture
def wrong_tanh(monkeypatch):
    def tanh(x):
        y = np.tanh(x.data)
        return record(y, (x,), lambda gy: (gy * (1 - y),))

    monkeypatch.setattr(coverage, "CASES", [replace(c, fn=tanh) if str(c) == "tanh: (2, 3)" else c for c in CASES])


def test_a_wrong_op_is_named(capsys, wrong_tanh):
    assert coverage.main([*NUMPY, "--op", "tanh", "exp"]) == 1
    _, tanh, exp, wrong = lines(capsys)
    assert tanh.split() == ["tanh", "3", "FAILED"]
    assert exp.split()[0] == "exp"
    assert "FAILED" not in exp
    assert wrong.startswith("wrong: tanh, numpy float64, 1 of 3 cases: the first is '(2, 3)': gradcheck: input 0")


def test_an_op_that_stops_is_named(capsys, monkeypatch):
    stops = [replace(c, fn=lambda x: x[7]) for c in CASES if c.op == "exp"]
    monkeypatch.setattr(coverage, "CASES", stops)
    assert coverage.main([*NUMPY, "--op", "exp"]) == 1
    assert "exp, numpy float64, 3 of 3 cases: the first is '(2, 3)': IndexError: getitem: " in lines(capsys)[2]


def test_what_is_missing_is_said(capsys, monkeypatch):
    monkeypatch.setattr(coverage, "CASES", [c for c in CASES if c.op != "tril"])
    monkeypatch.setattr(tensorlite.backends, "_by_name", {"numpy": backends.get_backend("numpy")})
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert coverage.main(["--op", "tril", "triu", "--dtype", "float64", "bfloat16"]) == 0
    head, triu, *missing = lines(capsys)
    assert triu.split()[0] == "triu"
    assert [line.split(" (")[0] for line in missing] == [
        "missing: the numpy backend has no bfloat16: use --backend cupy, or --dtype float32",
        "missing: the cupy backend cannot import CuPy",
        "missing: tril has no case",
    ]
    assert coverage.main(["--op", "triu", "--backend", "cupy"]) == 1  # nothing was checked


def test_progress_is_for_terminals(capsys, monkeypatch):
    assert coverage.main([*NUMPY, "--op", "exp"]) == 0
    plain = capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert coverage.main([*NUMPY, "--op", "exp"]) == 0
    shown = capsys.readouterr().out
    assert "\r" not in plain
    assert "exp, numpy float64: 2 of 3\r" in shown
    assert shown.split("\r\x1b[K")[-1] == plain.splitlines(keepends=True)[-1]


def test_an_interrupt_is_one_line(capsys, monkeypatch):
    def check(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(coverage, "check", check)
    assert coverage.main(NUMPY) == 130
    assert lines(capsys)[1:] == ["interrupted"]


@pytest.mark.parametrize("argument", [["--op", "nope"], ["--dtype", "float16"], ["--backend", "mps"], ["add"]])
def test_wrong_usage(argument, capsys):
    with pytest.raises(SystemExit) as info:
        coverage.main(argument)
    assert info.value.code == 2
    assert argument[-1] in capsys.readouterr().err
