"""The training step and the evaluation.

A batch is cut into micro-batches, which a few workers run forward and backward, each with BLAS held to one thread.
NumPy's element-wise work then runs in parallel, and the arrays of a micro-batch fit the caches. The gradients of
the micro-batches are added up in their order, so the numbers do not depend on how many workers there were; gradient
accumulation is nothing but more micro-batches.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from threadpoolctl import threadpool_limits

from gpt.config import TrainConfig
from gpt.data import Dataset, Split, random_starts
from gpt.errors import UserError
from gpt.interrupt import hold_interrupts
from gpt.language_model import LanguageModel
from gpt.workers import Worker, Workers
from tensorlite import grad, no_grad, random
from tensorlite.optim import AdamW, decay_groups, learning_rate


@dataclass
class Evaluation:
    """Mean losses over the fixed evaluation batches, with their standard errors, in nats per token."""

    train_loss: float
    train_stderr: float
    val_loss: float
    val_stderr: float


class Trainer:
    """Trains `model` on `dataset` as `config` says. A context manager: it holds workers and BLAS's limits.

    threads: how many cores to use, at most one for each micro-batch.

    Every batch and mask is a function of (config.seed, step), so a trainer whose parameters, moments and `step` are
    restored goes on exactly as the one that was stopped would have. The workers need to be told nothing but the step.
    """

    def __init__(self, model: LanguageModel, dataset: Dataset, config: TrainConfig, threads: int = 1):
        self.model, self.dataset, self.config = model, dataset, config
        self.optimizer = AdamW(
            decay_groups(model.parameters(), config.weight_decay), betas=(config.beta1, config.beta2)
        )
        self.flat = self.optimizer.flat
        zeros, dtype = self.flat.backend.shared_zeros, self.flat.data.dtype
        self._micro_losses = zeros(len(self._micro_batches(self.rows_per_step)), dtype)
        self.threads = min(threads, len(self._micro_losses))
        self._eval_losses = zeros(2 * config.eval_iters, dtype)
        self._norm = zeros(1, dtype)

    def __enter__(self) -> "Trainer":
        self.flat.backend.tune_allocator()
        self._blas_limit = threadpool_limits(1, user_api="blas")
        jobs = {"gradients": self._add_gradients, "update": self._update, "evaluate": self._evaluate}
        self._workers = Workers(self.threads, jobs)
        return self

    def __exit__(self, *exc) -> None:
        self._workers.close()
        self._blas_limit.restore_original_limits()

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
        are not read back from the device."""
        optimizer = self.optimizer
        self._workers.run("gradients", self.step)
        with np.errstate(all="ignore"), hold_interrupts():  # a half-done update could be neither saved nor repeated
            loss = self._micro_losses.sum()
            self._norm[0] = self.flat.backend.l2_norm(self.flat.grad)
            optimizer.lr = self.learning_rate(self.step)
            self._workers.run("update", self.step)
            optimizer.steps += 1
        return loss, self._norm[0].copy()

    def evaluate(self, tell: Callable[[int, int], None] = lambda done, total: None) -> Evaluation:
        """Losses over the same batches each time, from a stream of their own, in eval mode. `tell(done, total)` hears
        how many batches are done."""
        try:
            self._run_evaluation(tell)
        finally:
            self.model.train()
        losses = self.flat.backend.to_numpy(self._eval_losses).astype(np.float64).reshape(2, -1)
        n = losses.shape[1]
        stderr = losses.std(axis=1, ddof=1) / math.sqrt(n) if n > 1 else np.full(2, math.nan)
        (train, val), (train_stderr, val_stderr) = losses.mean(axis=1), stderr
        return Evaluation(float(train), float(train_stderr), float(val), float(val_stderr))

    def _training_starts(self, step: int) -> np.ndarray:
        """Which blocks of the training split are the batch of step `step`."""
        rng = random.generator(self.config.seed, random.BATCHES, step)
        return random_starts(self.dataset.train, self.rows_per_step, rng)

    def _evaluation_starts(self, i: int) -> tuple[Split, np.ndarray]:
        """Which blocks of which split are evaluation batch number i; those of the training split come first."""
        call, step = divmod(i, self.config.eval_iters)
        split = (self.dataset.train, self.dataset.val)[call]
        rng = random.generator(self.config.seed, random.EVALUATION, step, call)
        return split, random_starts(split, self.config.batch_size, rng)

    def _run_evaluation(self, tell) -> None:
        """Put the losses into `_eval_losses`, the training split's first."""
        self._workers.run("evaluate", tell=tell)

    # -- the workers' jobs; a diverging loss is for the caller to report, NumPy's warnings on the way say no more --

    @np.errstate(all="ignore")
    def _add_gradients(self, worker: Worker, step: int) -> None:
        """Put the gradient of the mean loss over the batch of step `step` into `flat.grad`, and each micro-batch's part
        of the loss into `_micro_losses`."""
        config = self.config
        if not self.model.training:  # since the last evaluation; each process has a mode of its own
            self.model.train()
        x, y = self.dataset.train.block(self._training_starts(step))
        parts = self._micro_batches(len(x))
        for i in worker.share(range(len(parts))):
            rows = parts[i]
            add = partial(self._add_gradient, worker, first=i == 0, last=i == len(parts) - 1)
            with random.scope(config.seed, step=step, first_row=rows.start):
                loss = self.model(x[rows], y[rows])[1] * ((rows.stop - rows.start) / len(x))
                grad(loss, self.flat.parameters, deposit=add)
            self._micro_losses[i] = loss.data

    def _add_gradient(self, worker: Worker, k: int, g, first: bool, last: bool) -> None:
        """Add a micro-batch's gradient of parameter k to the sum, once the micro-batch before it has added its own."""
        total = self.flat.grad_views[k]
        if first:
            total[...] = 0.0 if g is None else g
        else:
            worker.wait_turn()
            if g is not None:
                total += g
        if not last:
            worker.pass_turn()

    @np.errstate(all="ignore")
    def _update(self, worker: Worker, step: int) -> None:
        """AdamW with clipped gradients, on this worker's share of the parameters."""
        clip = self.config.grad_clip
        scale = self.flat.backend.clip_factor(self._norm[0], clip) if clip else 1.0
        rates = self.optimizer.rates(step + 1, self.learning_rate(step))
        self.optimizer.update(worker.share(self.optimizer.pieces), rates, scale)

    @np.errstate(all="ignore")
    def _evaluate(self, worker: Worker, _: int, tell: Callable = lambda done, total: None) -> None:
        """The losses of this worker's share of the evaluation batches, first those of the training split, then those
        of the validation split."""
        total = len(self._eval_losses)
        self.model.eval()
        for i in worker.share(range(total)):
            split, starts = self._evaluation_starts(i)
            x, y = split.block(starts)
            with no_grad():
                self._eval_losses[i] = sum(
                    self.model(x[rows], y[rows])[1].data * ((rows.stop - rows.start) / len(x))
                    for rows in self._micro_batches(len(x))
                )
            tell(min(i + worker.count, total), total)

    @property
    def micro_batch_size(self) -> int:
        """Rows of a batch that are worked on at a time."""
        return self.config.micro_batch_size or self.config.batch_size

    def _micro_batches(self, rows: int) -> list[slice]:
        size = self.micro_batch_size
        return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
