"""How a model is trained and evaluated, as one reads it. cpu_trainer.py and gpu_trainer.py compute the same numbers,
faster, and are tested against this."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from gpt.config import TrainConfig
from gpt.errors import UserError
from gpt.models.language_model import LanguageModel
from gpt.text.dataset import Dataset, Split, random_starts
from gpt.training.interrupt import hold_interrupts
from tensorlite import no_grad, random
from tensorlite.optim import AdamW, decay_groups, learning_rate


@dataclass
class Evaluation:
    """Mean losses over the fixed evaluation batches, with their standard errors, in nats per token."""

    train_loss: float
    train_stderr: float
    val_loss: float
    val_stderr: float


class Trainer:
    """Trains `model` on `dataset` as `config` says; a context manager.

    Every batch and mask is a function of (config.seed, step), so a trainer whose parameters, moments and `step` are
    restored goes on exactly as the one that was stopped would have.

    A batch is cut into micro-batches, whose gradients are added up in order: gradient accumulation is nothing but more
    of them.
    """

    def __init__(self, model: LanguageModel, dataset: Dataset, config: TrainConfig):
        self.model, self.dataset, self.config = model, dataset, config
        self.micro_batch_size = config.micro_batch_size or config.batch_size
        self.optimizer = AdamW(
            decay_groups(model.parameters(), config.weight_decay), betas=(config.beta1, config.beta2)
        )
        self.flat = self.optimizer.flat
        zeros, dtype = self.flat.backend.shared_zeros, self.flat.data.dtype
        self._micro_losses = zeros(len(self.micro_batches(self.rows_per_step)), dtype)
        self._eval_losses = zeros(2 * config.eval_iters, dtype)
        self._norm = zeros(1, dtype)
        self.on_host = self.flat.backend.name == "numpy"  # where to read a loss costs nothing
        self.whole = True  # not while a step changes the parameters: then they are no state to save

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *exc) -> None:
        """Give back what training takes."""

    def restore(self, moments: dict, step: int) -> None:
        """Go on from step `step` with the optimiser's moments "m" and "v" (flat host arrays)."""
        optimizer = self.optimizer
        for name, flat in (("m", optimizer.m), ("v", optimizer.v)):
            if name not in moments or moments[name].shape != flat.shape:
                raise UserError("the checkpoint does not hold the optimiser's state: resume from last.safetensors")
            flat[...] = self.flat.backend.asarray(moments[name])
        optimizer.steps = step

    @property
    def step(self) -> int:
        """Training steps done."""
        return self.optimizer.steps

    @property
    def rows_per_step(self) -> int:
        return self.config.batch_size * self.config.gradient_accumulation_steps

    @property
    def tokens_per_step(self) -> int:
        return self.rows_per_step * self.model.block_size

    def learning_rate(self, step: int) -> float:
        """The rate of step 0, 1, ..."""
        c = self.config
        return learning_rate(step, c.learning_rate, c.warmup_iters, c.lr_decay_iters, c.min_lr)

    def train_step(self):
        """One step of AdamW on one batch. (loss before the step, gradient norm before clipping): 0-d arrays that
        are not read back from the device, and are to be read before the next step."""
        config, optimizer, losses = self.config, self.optimizer, self._micro_losses
        x, y = self.next_batch()  # (B, T) each, y one token later
        self.model.train()
        optimizer.zero_grad()
        for i, rows in enumerate(self.micro_batches(len(x))):
            with random.scope(config.seed, step=self.step, first_row=rows.start):  # of the dropout masks
                _, loss = self.model(x[rows], y[rows])
                loss = loss * ((rows.stop - rows.start) / len(x))  # their share of the batch's mean
                loss.backward()  # adds to what the micro-batches before have left in optimizer.flat.grad
            losses[i] = loss.data
        norm = self.flat.backend.l2_norm(self.flat.grad)
        optimizer.lr = self.learning_rate(self.step)
        with self._updating():
            optimizer.step(grad_scale=self._clip_factor(norm))
        return losses.sum(), norm

    def _clip_factor(self, norm):
        """What the gradients, of this norm, are to be multiplied by."""
        return self.flat.backend.clip_factor(norm, self.config.grad_clip) if self.config.grad_clip else 1.0

    @contextmanager
    def _updating(self) -> Iterator[None]:
        """Within, the parameters change: a half-done update could be neither saved nor repeated."""
        with hold_interrupts():
            self.whole = False
            yield
            self.whole = True

    def evaluate(self, tell: Callable[[int, int], None] = lambda done, total: None) -> Evaluation:
        """Losses over the same batches each time, from a stream of their own, in eval mode. `tell(done, total)` hears
        how many batches are done."""
        try:
            self.model.eval()
            self._run_evaluation(tell)
        finally:
            self.model.train()
        losses = self.flat.backend.to_numpy(self._eval_losses).astype(np.float64).reshape(2, -1)
        n = losses.shape[1]
        stderr = losses.std(axis=1, ddof=1) / math.sqrt(n) if n > 1 else np.full(2, math.nan)
        (train, val), (train_stderr, val_stderr) = losses.mean(axis=1), stderr
        return Evaluation(float(train), float(train_stderr), float(val), float(val_stderr))

    def _run_evaluation(self, tell) -> None:
        """Put the losses of all evaluation batches into `_eval_losses`."""
        for i in range(len(self._eval_losses)):
            self._eval_losses[i] = self._evaluation_loss(i)
            tell(i + 1, len(self._eval_losses))

    def _evaluation_loss(self, i: int) -> float:
        """The loss of evaluation batch number i."""
        split, starts = self._evaluation_starts(i)
        x, y = split.block(starts)
        with no_grad():
            return sum(
                self.model(x[rows], y[rows])[1].data * ((rows.stop - rows.start) / len(x))
                for rows in self.micro_batches(len(x))
            )

    def rehearse(self) -> tuple[float, float]:
        """The seconds that a step and an evaluation take, about: work like theirs is timed, which changes nothing."""
        self.model.eval()
        try:
            batch = seconds_of(lambda: float(self._evaluation_loss(0)))
        finally:
            self.model.train()
        # Two products backward for each one forward.
        return 3 * batch * self.rows_per_step / self.config.batch_size, batch * len(self._eval_losses)

    def next_batch(self) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of the step that comes next."""
        return self.dataset.train.block(self._training_starts(self.step))

    def _training_starts(self, step: int) -> np.ndarray:
        """Which blocks of the training split are the batch of step `step`."""
        rng = random.generator(self.config.seed, random.BATCHES, 0 if self.config.overfit else step)
        return random_starts(self.dataset.train, self.rows_per_step, rng)

    def _evaluation_starts(self, i: int) -> tuple[Split, np.ndarray]:
        """Which blocks of which split are evaluation batch number i; those of the training split come first."""
        call, step = divmod(i, self.config.eval_iters)
        if self.config.overfit and call == 0:
            return self.dataset.train, self._training_starts(0)
        split = (self.dataset.train, self.dataset.val)[call]
        rng = random.generator(self.config.seed, random.EVALUATION, step, call)
        return split, random_starts(split, self.config.batch_size, rng)

    def micro_batches(self, rows: int) -> list[slice]:
        """The rows of each."""
        size = self.micro_batch_size
        return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def seconds_of(work: Callable) -> float:
    """What work() takes when it is not the first time, unless that already took long."""
    times = []
    while sum(times) < 0.02 or (len(times) < 2 and sum(times) < 0.5):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def is_finite(loss, norm) -> bool:
    """Whether both of a step are numbers."""
    return math.isfinite(loss) and math.isfinite(norm)
