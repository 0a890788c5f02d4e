"""The training step on the CPU, on several cores.

A batch is cut into micro-batches, which a few workers run forward and backward, each with BLAS held to one thread.
NumPy's element-wise work then runs in parallel, and the arrays of a micro-batch fit the caches. The gradients of
the micro-batches are added up in their order, so the numbers do not depend on how many workers there were.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from threadpoolctl import threadpool_limits

from gpt.config import TrainConfig
from gpt.models.language_model import LanguageModel
from gpt.text.dataset import Dataset
from gpt.training.trainer import Trainer, is_finite, seconds_of
from gpt.training.workers import Worker, Workers
from tensorlite import grad, random


class CPUTrainer(Trainer):
    """A Trainer that holds workers and BLAS's limits.

    threads: how many cores to use, at most one for each micro-batch. The workers need to be told nothing but the step.
    """

    def __init__(self, model: LanguageModel, dataset: Dataset, config: TrainConfig, threads: int = 1):
        super().__init__(model, dataset, config)
        self.threads = min(threads, len(self._micro_losses))

    def __enter__(self) -> "CPUTrainer":
        self.flat.backend.tune_allocator()
        self._blas_limit = threadpool_limits(1, user_api="blas")
        jobs = {"gradients": self._add_gradients, "update": self._update, "evaluate": self._evaluate}
        self._workers = Workers(self.threads, jobs)
        return self

    def __exit__(self, *exc) -> None:
        self._workers.close()
        self._blas_limit.restore_original_limits()

    @np.errstate(all="ignore")
    def train_step(self):
        """As of every trainer, but that nothing is changed by a step whose loss or gradient is not finite."""
        optimizer = self.optimizer
        self._workers.run("gradients", self.step)
        loss = self._micro_losses.sum()
        self._norm[0] = self.flat.backend.l2_norm(self.flat.grad)
        if not is_finite(loss, self._norm[0]):
            return loss, self._norm[0].copy()
        with self._updating():
            self._workers.run("update", self.step)
            optimizer.steps += 1
        return loss, self._norm[0].copy()

    def _run_evaluation(self, tell) -> None:
        self._workers.run("evaluate", tell=tell)

    def rehearse(self) -> tuple[float, float]:
        step = seconds_of(lambda: self._workers.run("gradients", self.step))
        return step, super().rehearse()[1] / self.threads

    # -- the workers' jobs; a diverging loss is for the caller to report, NumPy's warnings on the way say no more --

    @np.errstate(all="ignore")
    def _add_gradients(self, worker: Worker, step: int) -> None:
        """Put the gradient of the mean loss over the batch of step `step` into `flat.grad`, and each micro-batch's part
        of the loss into `_micro_losses`."""
        config = self.config
        if not self.model.training:  # since the last evaluation; each process has a mode of its own
            self.model.train()
        x, y = self.dataset.train.block(self._training_starts(step))
        parts = self.micro_batches(len(x))
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
        optimizer = self.optimizer
        optimizer.lr = self.learning_rate(step)  # in each process
        optimizer.update(worker.share(optimizer.pieces), optimizer.rates(step + 1), self._clip_factor(self._norm[0]))

    @np.errstate(all="ignore")
    def _evaluate(self, worker: Worker, _: int, tell: Callable = lambda done, total: None) -> None:
        """The losses of this worker's share of the evaluation batches, first those of the training split, then those
        of the validation split."""
        total = len(self._eval_losses)
        self.model.eval()
        for i in worker.share(range(total)):
            self._eval_losses[i] = self._evaluation_loss(i)
            tell(min(i + worker.count, total), total)
