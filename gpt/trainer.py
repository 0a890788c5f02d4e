"""The training step and the evaluation.

A batch is cut into micro-batches, which a few threads run forward and backward, each with BLAS held to one thread.
NumPy's element-wise work then runs in parallel, and the arrays of a micro-batch fit the caches. The gradients of
the micro-batches are summed in their order, so the numbers do not depend on how many threads there were; gradient
accumulation is nothing but more micro-batches.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from threadpoolctl import threadpool_limits

from gpt.config import TrainConfig
from gpt.data import Dataset, Split, random_blocks
from gpt.errors import UserError
from gpt.interrupt import hold_interrupts
from gpt.language_model import LanguageModel
from tensorlite import grad, no_grad, random
from tensorlite.optim import AdamW, clip_grad_norm_, decay_groups, learning_rate


@dataclass
class Evaluation:
    """Mean losses over the fixed evaluation batches, with their standard errors, in nats per token."""

    train_loss: float
    train_stderr: float
    val_loss: float
    val_stderr: float


class Trainer:
    """Trains `model` on `dataset` as `config` says. A context manager: it holds threads and BLAS's limits.

    Every batch and mask is a function of (config.seed, step), so a trainer whose parameters, moments and `step` are
    restored goes on exactly as the one that was stopped would have.
    """

    def __init__(self, model: LanguageModel, dataset: Dataset, config: TrainConfig, threads: int = 1):
        self.model, self.dataset, self.config, self.threads = model, dataset, config, threads
        self.optimizer = AdamW(
            decay_groups(model.parameters(), config.weight_decay), betas=(config.beta1, config.beta2)
        )
        self.flat = self.optimizer.flat
        self._buffers: list[list] = []  # gradients of the micro-batches under way, made when first needed

    def __enter__(self) -> "Trainer":
        self.flat.backend.tune_allocator()
        self._blas_limit = threadpool_limits(1, user_api="blas")
        # A diverging loss is for the caller to report; NumPy's warnings on the way there say nothing more.
        self._pool = ThreadPoolExecutor(self.threads, initializer=partial(np.seterr, all="ignore"))
        return self

    def __exit__(self, *exc) -> None:
        self._pool.shutdown(cancel_futures=True)
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
    def tokens_per_step(self) -> int:
        config = self.config
        return config.batch_size * config.gradient_accumulation_steps * self.model.block_size

    def learning_rate(self, step: int) -> float:
        """The rate of step 0, 1, ..."""
        c = self.config
        return learning_rate(step, c.learning_rate, c.warmup_iters, c.lr_decay_iters, c.min_lr)

    def train_step(self):
        """One step of AdamW on one batch. (loss before the step, gradient norm before clipping): 0-d arrays that
        are not read back from the device."""
        config = self.config
        rng = random.generator(config.seed, random.BATCHES, self.step)
        x, y = random_blocks(self.dataset.train, config.batch_size * config.gradient_accumulation_steps, rng)
        loss = self._gradients(x, y)
        with np.errstate(all="ignore"), hold_interrupts():  # a half-done update could be neither saved nor repeated
            norm = clip_grad_norm_(self.flat, config.grad_clip)
            self.optimizer.lr = self.learning_rate(self.step)
            self.optimizer.step(self._spread)
        return loss, norm

    def _gradients(self, x, y):
        """Put the gradient of the mean loss over (x, y) into `flat.grad`; returns the loss."""
        parameters, parts = self.flat.parameters, self._micro_batches(len(x))
        buffers = self._gradient_buffers(min(self.threads, len(parts) - 1))

        def run(i: int, rows: slice):
            # The first micro-batch writes into the sum itself. By the time a buffer is used again, it was added.
            views = buffers[i % len(buffers)][1] if i else self.flat.grad_views
            share = (rows.stop - rows.start) / len(x)
            with random.scope(self.config.seed, step=self.step, first_row=rows.start):
                loss = self.model(x[rows], y[rows])[1] * share
                grad(loss, parameters, out=views)
            return loss.data

        total = 0.0
        for i, loss in enumerate(self._in_order(run, parts)):
            total = total + loss
            if i:
                self.flat.grad += buffers[i % len(buffers)][0]
        return total

    def _gradient_buffers(self, count: int) -> list:
        """`count` pairs of a flat array and its views, of the parameters' layout."""
        while len(self._buffers) < count:
            flat = self.flat.zeros()
            self._buffers.append((flat, self.flat.views(flat)))
        return self._buffers[:count]

    def evaluate(self, tell: Callable[[int, int], None] = lambda done, total: None) -> Evaluation:
        """Losses over the same batches each time, from a stream of their own, in eval mode. `tell(done, total)` hears
        how many batches are done."""
        self.model.eval()
        try:
            train = self._split_loss(0, self.dataset.train, tell)
            return Evaluation(*train, *self._split_loss(1, self.dataset.val, tell))
        finally:
            self.model.train()

    def _split_loss(self, index: int, split: Split, tell: Callable) -> tuple[float, float]:
        """(mean, standard error of the mean) over eval_iters batches; `index` tells the splits' batches apart."""
        config = self.config
        losses = np.empty(config.eval_iters)

        def batch_loss(i: int, _) -> float:
            rng = random.generator(config.seed, random.EVALUATION, step=i, call=index)
            x, y = random_blocks(split, config.batch_size, rng)
            with no_grad():
                return sum(
                    self.model(x[rows], y[rows])[1].item() * (rows.stop - rows.start)
                    for rows in self._micro_batches(len(x))
                ) / len(x)

        for i, loss in enumerate(self._in_order(batch_loss, range(config.eval_iters))):
            losses[i] = loss
            tell(index * config.eval_iters + i + 1, 2 * config.eval_iters)
        stderr = losses.std(ddof=1) / math.sqrt(len(losses)) if len(losses) > 1 else math.nan
        return float(losses.mean()), float(stderr)

    def _micro_batches(self, rows: int) -> list[slice]:
        size = self.config.micro_batch_size or self.config.batch_size
        return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]

    def _spread(self, run: Callable, items: list) -> Iterator:
        """`run` on each item, each thread taking its share of them."""
        return self._pool.map(
            lambda share: [run(i) for i in share], [items[k :: self.threads] for k in range(self.threads)]
        )

    def _in_order(self, run: Callable, jobs) -> Iterator:
        """`run(i, job)` for each job on the threads; the results in order. A job starts only once the result of the
        one `threads` before it has been taken."""
        pending: deque = deque()

        def take():
            with hold_interrupts():  # Ctrl-C inside the pool's code could leave a lock taken, and all would hang
                return pending.popleft().result()

        for i, job in enumerate(jobs):
            if len(pending) == self.threads:
                yield take()
            with hold_interrupts():
                pending.append(self._pool.submit(run, i, job))
        while pending:
            yield take()
