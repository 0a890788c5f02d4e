"""bench/faults.py: a few of its draws, and that it would notice."""

from types import SimpleNamespace

import faults
import pytest

from gpt.checkpoint import load_checkpoint
from gpt.config import load_preset


def test_nothing_malformed_is_taken_or_ends_in_more_than_a_sentence():
    results = faults.soak(draws=600, seconds=None)
    assert results["wrong"] == []
    assert all(results[kind]["refused"] > 20 for kind in faults.KINDS)
    taken = {kind: results[kind]["tried"] - results[kind]["refused"] for kind in faults.KINDS}
    assert taken["damaged_bytes"] == 0
    assert min(taken[kind] for kind in ("damaged_metadata", "damaged_arrays", "configuration", "options")) > 5, taken


def raises(*_, **__):
    raise KeyError("n_layer")


def forgets_the_step(path, *args, **kwargs):
    checkpoint = load_checkpoint(path, *args, **kwargs)
    checkpoint.progress.step += 1
    return checkpoint


@pytest.mark.parametrize(
    ("name", "fault", "said"),
    [
        ("load_checkpoint", raises, "KeyError"),
        ("load_checkpoint", forgets_the_step, "WrongError: progress is not "),
        ("load_checkpoint", lambda *_, **__: SimpleNamespace(optimizer={}), "WrongError: a damaged file was taken"),
        ("load_preset", raises, "KeyError"),
        ("load_preset", lambda name: load_preset("bigram").updated({"seed": len(name)}), "not what it writes"),
        ("CPU_SECONDS", -1, "WrongError: it took 0.0 seconds"),
    ],
)
def test_a_fault_of_ours_is_wrong(monkeypatch, name, fault, said):
    monkeypatch.setattr(faults, name, fault)
    results = faults.soak(draws=60, seconds=None)
    assert any(said in wrong for wrong in results["wrong"]), results


def test_a_killed_run_goes_on():
    results = faults.soak(draws=1, seconds=None, kill_every=1, seed=1)
    assert results["wrong"] == []
    assert results["killed"]["tried"] == 1
