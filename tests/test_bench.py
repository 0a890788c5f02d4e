"""The benchmarks: that README.md says what the results say, and that both sides of a comparison do the same thing."""

import json

import ops
import pytest
import report
import torch
from tolerances import assert_close
from turns import preset_config

from tensorlite import Tensor

MACHINE = {"cpu": "CPU", "cores": 2, "python": "3.11.7", "numpy": "2.4", "blas": "openblas 0.3", "torch": "2.13"}
STEP = {
    "preset": "tiny",
    "dropout": 0.2,
    "rival": "torch eager",
    "ours_ms": 12.34,
    "torch_ms": 24.68,
    "floor_share": 0.5,
}
STEP |= {"ratio": 2.0, "ratios": [1.9, 2.0, 2.2], "ours_mb": 50, "torch_mb": 300}
SAMPLING = {"preset": "tiny", "batch": 1, "threads": 2, "cached_tokens_per_s": 1234.5, "uncached_tokens_per_s": 99.6}
SAMPLING |= {"torch_tokens_per_s": 617.0, "ratio": 2.0, "ratios": [2.0, 2.0]}
RESULTS = {
    "train_step-a.json": {"results": [STEP], "date": "2026-01-03"},
    "train_step-b.json": {
        "results": [STEP | {"rival": "torch.compile"}, STEP | {"ratio": 1.5, "ratios": [1.4, 1.5], "ours_ms": 16.0}],
        "date": "2026-01-02",
    },
    "train_step-c.json": {
        "results": [STEP | {"ratio": 2.5, "ratios": [2.4, 2.6], "ours_ms": 10.0}],
        "date": "2026-01-02",
    },
    "generate.json": {"results": [SAMPLING], "date": "2026-01-02"},
    "ops.json": {
        "results": [],
        "overhead": {"add": {"numpy_us": 0.3, "forward_us": 1.2, "no_grad_us": 0.7, "backward_us": 1.05}},
        "date": "2026-01-02",
    },
    "startup.json": {
        "results": [{"what": "import numpy", "ms": 100.4}, {"what": "import tensorlite", "ms": 110.2, "ratio": 1.1}],
        "date": "2026-01-02",
    },
}


@pytest.fixture
def results(tmp_path):
    """A folder with a result of every kind."""
    for name, result in RESULTS.items():
        machine = MACHINE | {"date": result["date"]}
        (tmp_path / name).write_text(json.dumps({"machine": machine} | result))
    return tmp_path


def test_readme_says_what_the_committed_results_say():
    readme = report.README.read_text(encoding="utf-8")
    assert readme == report.with_section(readme, report.performance(report.RESULTS))


def test_every_committed_result_is_reported():
    known = [path for kind in report.TABLES for path in report.RESULTS.glob(f"{kind}*.json")]
    assert sorted(known) == sorted(report.RESULTS.iterdir())


def test_every_kind_of_result_is_shown(results):
    section = report.performance(results)
    for row in (
        "| `tiny` | 0.2 | torch eager | 12.3 ms | 24.7 ms | 2.00x (1.40 to 2.60) | 50 MB | 300 MB | 50% |",
        "| `tiny` | 0.2 | torch.compile | 12.3 ms | 24.7 ms | 2.00x (1.90 to 2.20) | 50 MB | 300 MB | 50% |",
        "| `tiny` | 1 | 2 | 1,234 | 100 | 617 | 2.00x (2.00 to 2.00) |",
        "| `add` | 0.30 | +1.20 | +0.70 | +1.05 |",
        "| import numpy | 100 ms |",
        "| import tensorlite | 110 ms, 1.10 times NumPy's |",
    ):
        assert row in section.splitlines()
    versions = "CPU, 2 cores; Python 3.11.7, NumPy 2.4 with openblas 0.3, PyTorch 2.13"
    assert section.endswith(f"\n\nMeasured on {versions}; 2026-01-02 and 2026-01-03.")


def test_rows_of_a_table_are_as_wide_as_its_header(results):
    tables = [part.splitlines() for part in report.performance(results).split("\n\n") if part.startswith("|")]
    assert len(tables) == len(report.TABLES)
    assert all(len({line.count("|") for line in lines}) == 1 for lines in tables)


def test_a_result_may_be_absent(results):
    for path in results.glob("[!s]*.json"):
        path.unlink()
    assert report.performance(results).count("\n|---|") == 1


def test_the_command_checks_and_rewrites(results, monkeypatch, capsys):
    readme = results / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    monkeypatch.setattr(report, "README", readme)
    monkeypatch.setattr(report, "RESULTS", results)
    check, write = ["report.py", "--check"], ["report.py"]
    monkeypatch.setattr("sys.argv", check)
    with pytest.raises(SystemExit, match="run python bench/report.py"):
        report.main()
    monkeypatch.setattr("sys.argv", write)
    report.main()
    written = readme.read_text()
    assert written == f"before\n{report.BEGIN}\n{report.performance(results)}\n{report.END}\nafter\n"
    monkeypatch.setattr("sys.argv", check)
    report.main()
    assert readme.read_text() == written


@pytest.mark.parametrize("readme", ["", report.BEGIN, f"{report.END}\n{report.BEGIN}"])
def test_a_readme_without_the_comments_is_refused(readme):
    with pytest.raises(SystemExit, match="must have the line <!-- performance: begin -->"):
        report.with_section(readme, "text")


@pytest.mark.parametrize("preset", ["little-shakespeare", "nanogpt-cpu"])
def test_both_sides_of_the_op_benchmark_compute_the_same(preset):
    for op in ops.hot_path(preset_config(preset, dropout=0.0)):
        ours = op.ours(*(Tensor(x) for x in op.inputs)).numpy()
        theirs = op.theirs(*(torch.tensor(x) for x in op.inputs)).numpy()
        assert_close(ours, theirs, op.name)
