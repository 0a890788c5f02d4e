"""What an earlier version saved loads for ever: its runs sample the same texts, and go on to the same losses.

The runs were written by the code of their version; see make_runs.py. A failure here means that the runs of people who
upgrade are lost: make the code read them, never the runs anew.
"""

import gc
import json
import signal
import sys
import tarfile

import numpy as np
import pytest
from make_runs import BEYOND, CHECKPOINTS, COMPARED, DATA
from safetensors.numpy import load_file
from scripts import RUN, log

import sample
import train
from gpt.checkpoint import load_checkpoint
from gpt.config import load_preset

VERSIONS = {"0.1": ("gpt-char", "gpt-byte", "bigram-char", "bigram-byte")}
OLD = [f"{version}/{name}" for version, names in VERSIONS.items() for name in names]

# Another processor's BLAS adds up in another order: over the kernels of OpenBLAS the numbers differ by 5e-7 at most.
RTOL = 1e-5


@pytest.fixture(params=OLD)
def old(request, cwd):
    """The current folder, with the runs finished/ and stopped/ of an earlier version in it."""
    with tarfile.open(DATA / f"runs/{request.param}.tar.xz") as archive:
        archive.extractall(cwd, filter="data")
    (cwd / "text.txt").write_bytes((DATA / "text.txt").read_bytes())
    handler = signal.getsignal(signal.SIGTERM)
    yield cwd
    signal.signal(signal.SIGTERM, handler)  # which training sets


@pytest.fixture
def script(monkeypatch):
    """script(module, *args): train.py or sample.py in this process, which must end well."""

    def call(module, *args: str) -> None:
        monkeypatch.setattr(sys, "argv", [module.__name__, *args])
        assert module.main() == 0
        gc.collect()  # which lets go of the lock

    return call


def sampled(old) -> str:
    """The text that was sampled, with U+FFFD for bytes that are no UTF-8, as version 0.1 wrote it."""
    return (old / "sample").read_bytes().decode(errors="replace")


def expectations(old) -> dict:
    """What the version of the runs made of them, but for their logs."""
    return json.loads((old / "expected.json").read_bytes())


def data_option(run) -> list[str]:
    """What to train on: a file lies here now, and no longer where the run found it; a built-in text needs no option."""
    data = load_checkpoint(run / "last.safetensors").config.train.data
    return ["--data=text.txt"] if data.endswith("text.txt") else []


def assert_same_rows(run, expected: list[dict]) -> None:
    """The log ends with these rows, up to rounding."""
    rows = log(run)[-len(expected) :]
    for got, row in zip(rows, expected, strict=True):
        got, row = ([np.nan if r[key] is None else r[key] for key in COMPARED] for r in (got, row))
        np.testing.assert_allclose(got, row, RTOL, err_msg=f"{COMPARED} at step {row[0]}")


def assert_whole(run, step: int) -> None:
    """The run is at `step`, with the lowest loss of its log as its best."""
    last, best = (load_checkpoint(run / f"{name}.safetensors") for name in ("last", "best"))
    rows = log(run)
    lowest = min(row["val_loss"] for row in rows)
    assert last.progress.step == rows[-1]["step"] == step
    assert last.progress.best_val_loss == best.progress.best_val_loss == lowest
    assert load_preset(str(run / "config.toml")) == last.config
    assert {file.name for file in run.iterdir()} == RUN


def test_no_run_is_missing_and_none_is_untested():
    found = {path.relative_to(DATA / "runs").as_posix() for path in (DATA / "runs").rglob("*") if path.is_file()}
    assert found == {f"{name}.tar.xz" for name in OLD}


def test_checkpoints_hold_what_was_saved(old):
    for path in (old / f"{name}.safetensors" for name in CHECKPOINTS):
        checkpoint, saved = load_checkpoint(path), load_file(path)
        moments = {f"optimizer.{name}": moment for name, moment in checkpoint.optimizer.items()}
        assert (moments != {}) == (path.stem == "last")
        model = checkpoint.build_model().state_dict()
        for loaded in (checkpoint.weights | moments, model | moments):
            assert {name: (a.dtype, a.shape, a.tobytes()) for name, a in loaded.items()} == {
                name: (a.dtype, a.shape, a.tobytes()) for name, a in saved.items()
            }
        assert load_preset(str(path.parent / "config.toml")) == checkpoint.config


def test_samples_are_the_same(old, script):
    for expected in expectations(old)["samples"]:
        script(sample, *expected["args"], "--out=sample")
        assert sampled(old) == expected["text"], expected["args"]


def test_stopped_run_goes_on_as_if_never_stopped(old, script):
    finished, stopped = old / "finished", old / "stopped"
    rows, seen = log(finished), log(stopped)
    script(train, "--resume", "--out=stopped", *data_option(stopped))
    assert len(seen) < len(log(stopped)) == len(rows)
    assert_same_rows(stopped, rows)
    assert_whole(stopped, rows[-1]["step"])
    expected = expectations(old)["samples"][0]
    script(sample, *expected["args"], "--model=stopped/last.safetensors", "--out=sample")
    assert sampled(old) == expected["text"]


def test_finished_run_goes_on(old, script):
    expected = expectations(old)["beyond"]
    data = data_option(old / "finished")
    script(train, "--resume", "--out=finished", f"--max-iters={BEYOND}", "--eval-interval=1", *data)
    assert_same_rows(old / "finished", expected)
    assert_whole(old / "finished", expected[-1]["step"])


def test_config_is_a_preset(old, script):
    script(train, "finished/config.toml", "--out=new", "--max-iters=1", *data_option(old / "finished"))
    then, now = (load_preset(f"{run}/config.toml").to_dict() for run in ("finished", "new"))
    assert now == then | {"max_iters": 1, "data": now["data"]}
    assert_whole(old / "new", 1)
