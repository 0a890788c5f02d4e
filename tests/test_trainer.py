"""The trainer: its numbers do not depend on threads, cuts or evaluations, and are those of the formulas."""

import math
import os
import signal
import threading

import numpy as np
import pytest
from test_workers import needs_fork
from threadpoolctl import threadpool_limits

import gpt.training.trainer
import gpt.training.workers
from gpt.config import GPTConfig, TrainConfig
from gpt.models.kinds import build_model
from gpt.text.dataset import make_dataset, random_starts
from gpt.text.sources import Text
from gpt.text.tokenizers import make_tokenizer
from gpt.training.cpu_trainer import CPUTrainer
from gpt.training.interrupt import SIGNALS, hold_interrupts
from gpt.training.trainer import Trainer
from tensorlite import no_grad, random

SOURCE = "".join(f"{i} and {i * i}\n" for i in range(200))
TEXT = Text(SOURCE, name="squares", source="squares")
DATA = make_dataset(TEXT, make_tokenizer("char", SOURCE), block_size=8)


def make(threads: int = 1, dtype=np.float32, dropout: float = 0.0, plain: bool = False, **options) -> Trainer:
    """A trainer of a tiny GPT; to be entered."""
    shape = {"block_size": 8, "n_layer": 1, "n_head": 2, "n_embd": 16, "dropout": dropout}
    model = build_model("gpt", GPTConfig(vocab_size=DATA.tokenizer.vocab_size, **shape), seed=1).to(dtype=dtype)
    settings = {"batch_size": 4, "micro_batch_size": 1, "eval_iters": 3, "learning_rate": 1e-2, "seed": 5}
    config = TrainConfig(**settings | options)
    return Trainer(model, DATA, config) if plain else CPUTrainer(model, DATA, config, threads)


def trained(steps: int = 4, evaluate_every: int = 0, **options) -> list[bytes]:
    """The bits of every step's loss and norm, and of the weights and moments in the end."""
    bits = []
    with make(**options) as trainer:
        for step in range(steps):
            if evaluate_every and step % evaluate_every == 0:
                trainer.evaluate()
            bits += [np.asarray(x).tobytes() for x in trainer.train_step()]
        optimizer = trainer.optimizer
        return bits + [a.tobytes() for a in (trainer.flat.data, optimizer.m, optimizer.v)]


def first_gradient(**options) -> np.ndarray:
    with make(dtype=np.float64, **options) as trainer:
        trainer.train_step()
        return trainer.flat.grad.copy()


# --- what the numbers depend on ---


@pytest.mark.parametrize("processes", [False, pytest.param(True, marks=needs_fork)])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_same_bits_for_any_number_of_threads_and_evaluations(dropout, micro_batch_size, processes, monkeypatch):
    monkeypatch.setattr(gpt.training.workers, "PROCESSES", processes)
    options = {"dropout": dropout, "micro_batch_size": micro_batch_size, "batch_size": 7, "grad_clip": 0.5}
    expected = trained(threads=1, **options)
    for threads, evaluate_every in ((2, 0), (3, 2), (8, 1), (1, 1)):
        assert trained(threads=threads, evaluate_every=evaluate_every, **options) == expected


@needs_fork
@pytest.mark.parametrize("options", [
    {},
    {"dropout": 0.2, "grad_clip": 0.5},
    {"dropout": 0.2, "micro_batch_size": 3, "batch_size": 7, "gradient_accumulation_steps": 2},
    {"micro_batch_size": 0, "min_lr": 1e-3, "warmup_iters": 2, "lr_decay_iters": 4, "weight_decay": 0.5},
])  # fmt: skip
def test_the_plain_step_has_the_same_bits(options):
    with threadpool_limits(1, user_api="blas"):
        expected = trained(plain=True, evaluate_every=2, **options)
        losses = [make(plain=True, **options).evaluate()]
    for threads in (1, 2, 5):
        assert trained(threads=threads, evaluate_every=2, **options) == expected
        with make(threads=threads, **options) as trainer:
            losses.append(trainer.evaluate())
    assert all(loss == losses[0] for loss in losses)


def test_no_more_workers_than_micro_batches():
    assert make(threads=99).threads == 4
    assert make(threads=3).threads == 3
    assert make(threads=99, gradient_accumulation_steps=2).threads == 8


def test_seed_and_dropout_change_the_numbers():  # or the tests above would prove nothing
    runs = [trained(), trained(seed=6), trained(dropout=0.2), trained(dropout=0.2, seed=6)]
    assert len({run[0] for run in runs[::2]}) == 2
    assert len({run[-1] for run in runs}) == 4


def test_every_step_has_its_own_batch_and_masks(monkeypatch):
    def distinct_losses(**options) -> int:
        with make(learning_rate=0.0, **options) as trainer:
            return len({float(trainer.train_step()[0]) for _ in range(4)})

    assert distinct_losses() == 4
    monkeypatch.setattr(gpt.training.trainer, "random_starts", lambda *_: np.arange(4))
    assert distinct_losses() == 1
    assert distinct_losses(dropout=0.3) == 4


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("micro_batch_size", [1, 3, 4])
def test_gradient_of_the_micro_batches_is_that_of_the_batch(micro_batch_size, dropout):
    whole = first_gradient(micro_batch_size=0, dropout=dropout)
    cut = first_gradient(micro_batch_size=micro_batch_size, dropout=dropout, threads=2)
    assert np.abs(cut - whole).max() < 1e-12 * np.abs(whole).max()
    assert np.abs(whole).max() > 0.01


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_accumulated_batches_are_one_larger_batch(dropout):
    expected = trained(batch_size=6, micro_batch_size=2, dropout=dropout)
    for micro_batch_size in (2, 0):  # 0: the batches one by one, or accumulation would save no memory
        options = {"batch_size": 2, "gradient_accumulation_steps": 3, "micro_batch_size": micro_batch_size}
        assert trained(**options, dropout=dropout) == expected


def test_restored_trainer_goes_on_to_the_bit():
    expected = trained(steps=4, dropout=0.2)
    with make(dropout=0.2) as first, make(dropout=0.2) as second:
        for _ in range(2):
            first.train_step()
        second.model.load_state_dict(first.model.state_dict())
        second.restore({"m": first.optimizer.m, "v": first.optimizer.v}, step=2)
        losses = [np.asarray(x).tobytes() for _ in range(2) for x in second.train_step()]
        assert [*losses, second.flat.data.tobytes()] == expected[4:9]


# --- a step ---


def test_gradients_land_in_the_flat_buffer():
    with make(threads=2) as trainer:
        trainer.train_step()
        assert all(np.shares_memory(p.grad, trainer.flat.grad) for p in trainer.model.parameters())
        assert all(np.abs(p.grad).max() > 0 for p in trainer.model.parameters())


def test_learning_rate_of_each_step():
    with make(learning_rate=0.4, min_lr=0.1, warmup_iters=3, lr_decay_iters=7) as trainer:
        rates = []
        for _ in range(9):
            expected = trainer.learning_rate(trainer.step)
            trainer.train_step()
            assert trainer.optimizer.lr == expected
            rates.append(expected)
    decay = [0.1 + 0.3 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, *decay, 0.1, 0.1])


def test_gradients_are_clipped_and_the_norm_before_is_returned():
    def applied(**options) -> np.ndarray:
        """The gradient that the first step was made with: its first moment is (1 - beta1) times it."""
        with make(dtype=np.float64, threads=2, **options) as trainer:
            trainer.train_step()
            return trainer.optimizer.m / (1 - trainer.config.beta1)

    free, clipped = applied(), applied(grad_clip=0.01)
    np.testing.assert_allclose(free, first_gradient(), rtol=1e-12)
    with make(dtype=np.float64, grad_clip=0.01) as trainer:
        _, norm = trainer.train_step()
    assert norm == pytest.approx(np.linalg.norm(free), rel=1e-12)
    assert np.linalg.norm(clipped) == pytest.approx(0.01, rel=1e-4)
    np.testing.assert_allclose(clipped / np.linalg.norm(clipped), free / np.linalg.norm(free), atol=1e-12)
    np.testing.assert_array_equal(applied(grad_clip=1e6), free)


def test_divergence_is_a_loss_that_is_not_finite_and_no_warning():
    with make(learning_rate=1e30, threads=2) as trainer:
        losses = [float(trainer.train_step()[0]) for _ in range(3)]
    assert math.isfinite(losses[0])
    assert not math.isfinite(losses[-1])


# --- evaluation ---


def test_evaluation_is_the_mean_over_fixed_batches_with_its_standard_error():
    with make(dtype=np.float64, threads=3, dropout=0.5, batch_size=5, micro_batch_size=2) as trainer:
        before = trainer.flat.data.copy()
        result = trainer.evaluate()
        told = []
        assert trainer.evaluate(lambda *progress: told.append(progress)) == result
        batches = 2 * trainer.config.eval_iters
        assert told == [(3, batches), (6, batches)]  # by threes, as there are three workers
        np.testing.assert_array_equal(trainer.flat.data, before)
        trainer.model.eval()
        for call, (name, split) in enumerate((("train", DATA.train), ("val", DATA.val))):
            losses = []
            for i in range(3):
                x, y = split.block(random_starts(split, 5, random.generator(5, random.EVALUATION, step=i, call=call)))
                with no_grad():
                    losses.append(trainer.model(x, y)[1].item())
            mean = sum(losses) / 3
            stderr = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / 2 / 3)
            assert getattr(result, f"{name}_loss") == pytest.approx(mean, rel=1e-12)
            assert getattr(result, f"{name}_stderr") == pytest.approx(stderr, rel=1e-9)
        trainer.model.train()
        trainer.train_step()
        assert trainer.evaluate().train_loss != result.train_loss
    with make(eval_iters=1) as trainer:
        assert math.isnan(trainer.evaluate().val_stderr)


def test_training_mode_comes_back(monkeypatch):
    modes = set()

    def fail(*_):
        modes.update(m.training for m in trainer.model.modules())
        raise ZeroDivisionError

    with make(threads=2) as trainer:
        trainer.evaluate()
        assert all(m.training for m in trainer.model.modules())
        monkeypatch.setattr(trainer.model, "logits", fail)
        with pytest.raises(ZeroDivisionError):
            trainer.evaluate()
        assert all(m.training for m in trainer.model.modules())
    assert False in modes


# --- interrupts ---


@pytest.fixture(autouse=True)
def handlers():
    """All signals raise, before every test and after."""
    original = {s: signal.signal(s, signal.default_int_handler) for s in SIGNALS}
    yield
    after = {signal.getsignal(s) for s in original}
    for s, handler in original.items():
        signal.signal(s, handler)
    assert after == {signal.default_int_handler}


@pytest.mark.parametrize("number", SIGNALS)
def test_interrupt_waits_for_the_end_of_the_block(number):
    done = []

    def interrupted():
        with hold_interrupts():
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # an impatient user
            done.append("all of it")
        done.append("too much")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done == ["all of it"]


def test_ignored_interrupt_stays_ignored():  # as a shell's background job wants it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with hold_interrupts():
        os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_block_without_interrupt_or_with_an_exception():
    with hold_interrupts():
        pass
    with pytest.raises(ZeroDivisionError), hold_interrupts():
        raise ZeroDivisionError


def test_in_a_thread_the_handlers_are_left_alone():
    seen = []

    def in_thread():
        with hold_interrupts():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]


def test_interrupted_step_is_done_whole(monkeypatch):
    with make() as trainer, make() as undisturbed:
        update = trainer.optimizer.update
        monkeypatch.setattr(trainer.optimizer, "update", lambda *a: (os.kill(os.getpid(), signal.SIGINT), update(*a)))
        with pytest.raises(KeyboardInterrupt):
            trainer.train_step()
        undisturbed.train_step()
        assert trainer.step == 1
        np.testing.assert_array_equal(trainer.flat.data, undisturbed.flat.data)
