"""The ladder: each rung's gradients, its promises, and that it trains, samples and is forecast as any preset; the page
about it says what the files say."""

import inspect
import math
import re
import sys

import numpy as np
import pytest
from scripts import ROOT, TEXT, assert_complaint, assert_same_run, run
from test_cupy import make_trainer
from test_trainer import DATA
from tolerances import assert_close

import gpt.models.bigram as bigram
import gpt.models.ladder as ladder
import tensorlite as tl
from gpt.config import LADDER, load_preset
from gpt.errors import UserError
from gpt.log import read_log
from gpt.models.kinds import MODEL_KINDS, build_model
from tensorlite import Tensor, grad, gradcheck

sys.path.append(str(ROOT / "docs" / "examples"))

import averaging

RUNGS = LADDER[1:-1]  # the first is the bigram table, the last a GPT
every_rung = pytest.mark.parametrize("rung", RUNGS)
PAGE = (ROOT / "docs" / "lessons" / "08-ladder.md").read_text(encoding="utf-8")
TARGETS = (2.5, 2.4, 2.28, 2.24, 2.08, 2.06)


def config_of(rung: str, **changes):
    config = load_preset(rung)
    small = {"vocab_size": 7, "block_size": 5, "n_embd": 4, "n_head": min(2, config.gpt.n_head)} | changes
    if config.train.model in ("residual", "layer-norm"):
        small = {"n_layer": 2} | small
    return config.updated(small)


def model_of(rung: str, **changes):
    config = config_of(rung, **changes)
    return build_model(config.train.model, config.gpt, seed=1)


def batch(T: int = 5, symbols: int = 7):  # noqa: N803
    return np.random.default_rng(0).integers(0, symbols, (2, 3, T))


# --- the models ---


@every_rung
def test_gradients(rung):
    model = model_of(rung, **({"n_layer": 1} if rung in RUNGS[-2:] else {}))
    gradcheck(model, *batch(T=4))


@every_rung
def test_shapes_and_causality(rung):
    model, (x, _) = model_of(rung, n_embd=16), batch()
    before = model(x)[0].numpy()
    assert (before.shape, before.dtype) == ((3, 5, 7), np.float32)
    for t in range(5):
        changed = x.copy()
        changed[:, t] = (x[:, t] + 1) % 7
        after = model(changed)[0].numpy()
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert (after[:, t:] != before[:, t:]).any(axis=-1).all()


@every_rung
@pytest.mark.parametrize("changes", [{}, {"n_embd": 12, "n_head": 3}, {"vocab_size": 1, "block_size": 1, "n_embd": 2}])
def test_parameters_are_counted_before_there_are_any(rung, changes):
    config = config_of(rung, **changes)
    assert MODEL_KINDS[config.train.model].num_parameters(config.gpt) == model_of(rung, **changes).num_parameters()


def test_the_last_rung_is_the_lecture():
    seventh, lecture = load_preset(LADDER[-1]), load_preset("lecture")
    assert seventh.updated({"preset": "lecture"}) == lecture


@pytest.mark.parametrize("rung", LADDER[:-1])
def test_first_loss_is_that_of_a_uniform_guess(rung):
    config = load_preset(rung).updated({"vocab_size": 65})
    x, y = np.random.default_rng(0).integers(0, 65, (2, 64, 8))
    assert abs(build_model(config.train.model, config.gpt, 1337)(x, y)[1].item() - math.log(65)) < 0.1


@every_rung
def test_settings_that_mean_nothing_are_refused(rung):
    config = config_of(rung)
    kind = MODEL_KINDS[config.train.model]
    idle = {"dropout": 0.1, "bias": False, "activation": "gelu", "tie_weights": True, "head_bias": True}
    if config.train.model in ("heads", "feed-forward"):
        idle["n_layer"] = 2
    for name, value in idle.items():
        with pytest.raises(UserError, match=f"^--{name.replace('_', '-')} has no effect on a {kind.noun}: leave it"):
            config.updated({name: value})
    assert not config.to_dict().keys() & idle.keys()


@every_rung
def test_sampling_sees_the_last_block(rung):
    model, ids = model_of(rung), batch()[0]
    assert model.cached(1) is None
    assert model.generate(ids, 9, seed=2).shape == (3, 14)
    assert_close(model.next_logits(np.concatenate([ids[:, ::-1], ids], axis=1)), model(ids)[0].numpy()[:, -1])


# --- as any preset ---


@every_rung
def test_training_gives_the_losses_of_numpy(rung, cuda):
    changes = {"vocab_size": DATA.tokenizer.vocab_size, "block_size": 8, "n_embd": 8}
    config, results = config_of(rung, **changes).updated({"batch_size": 4, "eval_iters": 2}), []
    for backend in ("numpy", "cupy"):
        model = model_of(rung, **changes).to(backend)
        with make_trainer(model, DATA, config.train) as trainer:
            numbers = [float(x) for _ in range(4) for x in trainer.train_step()]
            results.append([*numbers, *vars(trainer.evaluate()).values()])
    np.testing.assert_allclose(results[1], results[0], rtol=1e-5, atol=1e-5)


def test_a_rung_is_a_preset_like_any_other(cwd):
    (cwd / "text.txt").write_text(TEXT)
    tiny = ("ladder-6", "--data=text.txt", "--n-embd=8", "--batch-size=4", "--eval-iters=2", "--eval-interval=4")
    run("train.py", *tiny, "--max-iters=8", "--out=whole", cwd=cwd)
    run("train.py", *tiny, "--max-iters=3", "--out=runs/parts", cwd=cwd)
    out = run("train.py", "--resume", "--max-iters=8", cwd=cwd).stdout
    assert "model: layer-norm, " in out
    assert "best val loss" in out
    assert_same_run(cwd / "whole", cwd / "runs" / "parts")
    assert run("sample.py", "--model=whole", "--prompt=1", "--max-new-tokens=20", cwd=cwd).stdout.startswith("1")
    tuned = run("train.py", "--init-from=whole", *tiny[1:2], "--block-size=4", "--max-iters=1", "--out=tuned", cwd=cwd)
    assert "symbols carried over, 0 new" in tuned.stdout


# --- the page ---


def test_three_ways_to_average_the_past_are_one():
    rng = np.random.default_rng(0)
    x, gy = Tensor(rng.standard_normal((2, 6, 3)), requires_grad=True), rng.standard_normal((2, 6, 3))
    expected = averaging.by_loop(x)
    assert_close(expected.data[:, -1], x.data.mean(axis=1))
    for way in (averaging.by_matrix, averaging.by_softmax):
        y = way(x)
        assert_close(y.data, expected.data)
        assert_close(grad(y, [x], gy)[0], grad(averaging.by_loop(x), [x], gy)[0])


def test_attention_written_out_is_the_op():
    rng = np.random.default_rng(0)
    q, k, v = (Tensor(a, requires_grad=True) for a in rng.standard_normal((3, 2, 6, 4)))
    ours, op = averaging.attention(q, k, v), tl.scaled_dot_product_attention(q, k, v, causal=True)
    assert_close(ours.data, op.data)
    for a, b in zip(grad(ours.sum(), [q, k, v]), grad(op.sum(), [q, k, v]), strict=True):
        assert_close(a, b)
    still = Tensor(np.zeros_like(q.data))  # who asks for nothing takes the mean of all
    assert_close(averaging.attention(still, k, v).data, averaging.by_loop(v).data)


def test_the_page_of_attention_is_of_gpts(cwd):
    (cwd / "text.txt").write_text(TEXT)
    run("train.py", "ladder-2", "--data=text.txt", "--max-iters=1", "--eval-iters=1", "--out=run", cwd=cwd)
    said = run("sample.py", "--model=run", "--attention=page.html", cwd=cwd, status=2).stderr
    assert_complaint(said, "the page reads a GPT's heads, which are computed at once, and not those of a", "sample.py")
    assert not (cwd / "page.html").exists()


def test_the_code_is_quoted():
    modules = (ladder, averaging, bigram)
    members = [m for module in modules for m in vars(module).values() if inspect.getmodule(m) is module]
    sources = [inspect.getsource(m) for m in members if inspect.isclass(m) or inspect.isfunction(m)]
    known = {re.sub(r'\n +"""(.|\n)*?"""\n+', "\n", source).strip() for source in sources}
    quoted = [part for block in re.findall(r"```py\n(.*?)```", PAGE, re.DOTALL) for part in block.split("\n\n\n")]
    assert {part.strip() for part in quoted} <= known
    assert len(quoted) > 7


def test_the_losses_are_those_recorded():
    for rung, target in zip(LADDER, TARGETS, strict=False):
        rows, problem = read_log(ROOT / "docs" / "data" / "ladder" / f"{rung}.jsonl")
        assert (len(rows), problem) == (11, "")
        best = min(rows, key=lambda row: row["val_loss"])
        assert abs(best["val_loss"] - target) <= 0.04
        config = load_preset(rung)
        parameters = MODEL_KINDS[config.train.model].num_parameters(config.updated({"vocab_size": 65}).gpt)
        shown = f"| {parameters:,} | {best['val_loss']:.4f} ± {best['val_stderr']:.4f} | {target:g} |"
        assert re.search(rf"^\| `{rung}` \| .* {re.escape(shown)}", PAGE, re.MULTILINE), shown
