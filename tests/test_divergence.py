"""Runs whose loss is no number any more: the step, and where in the model it began, are named."""

import math

import numpy as np
import pytest
from test_trainer import DATA, make

from gpt.training.divergence import History, first_not_finite
from tensorlite import Tensor, record
from tensorlite.tools import profile, watch

FIRST = {
    "transformer.h.0.mlp.c_fc.weight": "transformer.h.0.mlp.c_fc: linear",
    "transformer.h.0.attn.c_attn.weight": "transformer.h.0.attn.c_attn: linear",
    "transformer.wpe.weight": "transformer.drop: dropout",  # which divides by the share that it keeps
}


@pytest.mark.parametrize("name", FIRST)
def test_the_first_op_is_named_by_its_module(name):
    with make(dropout=0.2) as trainer:
        weights = dict(trainer.model.named_parameters())[name].data
        weights[...] = 3e38 * np.sign(weights)
        before = trainer.flat.data.copy()
        assert first_not_finite(trainer) == FIRST[name]
        assert np.array_equal(trainer.flat.data, before)
        weights[0, 0] = math.nan
        assert first_not_finite(trainer) == f"the weights {name}"


def test_a_gradient_is_named_where_the_results_are_finite(monkeypatch):
    with make() as trainer:
        block = trainer.model.transformer.h[0]
        real = block.ln_2.forward

        def wrong(x) -> Tensor:
            y = real(x)
            return record(y.data, (y,), lambda gy: (gy * math.inf,))

        monkeypatch.setattr(block.ln_2, "forward", wrong, raising=False)
        assert first_not_finite(trainer) == "the gradient of transformer.h.0.ln_2: wrong"


def test_a_step_that_is_not_finite_changes_nothing():
    with make(threads=2) as trainer:
        trainer.train_step()
        trainer.model.lm_head.weight.data[...] = 1e30
        before = [a.copy() for a in (trainer.flat.data, trainer.optimizer.m, trainer.optimizer.v)]
        loss, norm = trainer.train_step()
        assert not (math.isfinite(loss) and math.isfinite(norm))
        assert trainer.step == 1
        for was, now in zip(before, (trainer.flat.data, trainer.optimizer.m, trainer.optimizer.v), strict=True):
            np.testing.assert_array_equal(now, was)


def test_a_norm_that_explodes_is_told_once():
    history = History()
    told = [history.add(step, 2.0, norm) for step, norm in enumerate([1.0, 2.0, 1.5] * 10 + [90.0, 300.0, 900.0, 1.0])]
    assert [step for step, warning in enumerate(told) if warning] == [31]
    assert "at step 31 the gradient's norm is 300" in told[31]
    assert [row[0] for row in history.rows] == list(range(24, 34))


def test_no_warning_before_there_is_a_usual_norm():
    history = History()
    assert not any(history.add(step, 2.0, norm) for step, norm in enumerate([1.0, 1e4, 1e-4, 1e5, 0.0, math.inf]))


@pytest.mark.parametrize("look", [watch, profile])
def test_looking_on_changes_no_bit(look):
    with make(dropout=0.2) as trainer, make(dropout=0.2) as watched:
        trainer.train_step()
        with look(watched.model):
            watched.train_step()
        np.testing.assert_array_equal(trainer.flat.data, watched.flat.data)


def test_what_is_watched_knows_its_module_and_its_line():
    with make() as trainer:
        x, y = DATA.train.block(np.arange(2))
        with watch(trainer.model) as seen:
            trainer.model(x, y)[1].backward()
    names = {(op.path, op.op) for op in seen.ops}
    assert {("transformer.h.0.attn.c_attn", "linear"), ("transformer.wte", "embedding"), ("", "cross_entropy")} <= names
    assert all("models/" in op.where for op in seen.ops)
    assert all(op.seconds > 0 and op.backward_seconds > 0 for op in seen.ops)
    with watch() as bare:
        trainer.model(x, y)
    assert [op.op for op in bare.ops] == [op.op for op in seen.ops]
    assert [op.path for op in bare.ops] == [op.path for op in seen.ops]
