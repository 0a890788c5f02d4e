"""The training step on a GPU, in which nothing is read back: it can be captured once and replayed as one CUDA graph."""

from dataclasses import replace

import numpy as np

from gpt.config import TrainConfig
from gpt.models.language_model import LanguageModel
from gpt.text.dataset import Dataset
from gpt.training.trainer import Trainer
from tensorlite import grad, no_grad, random


class GPUTrainer(Trainer):
    """A Trainer for a GPU, with the batches and masks, and up to rounding the numbers, of one for the CPU.

    A micro-batch is a whole batch: config.micro_batch_size is about the caches of a CPU. The text lies on the device.
    A step is told where its blocks begin, its number and its rates, in arrays; all else is the same from step to step,
    so that it can be captured as a CUDA graph.
    """

    def __init__(self, model: LanguageModel, dataset: Dataset, config: TrainConfig):
        super().__init__(model, dataset, replace(config, micro_batch_size=0))
        backend, dtype = self.flat.backend, self.flat.data.dtype
        zeros = backend.shared_zeros
        self._tokens = backend.asarray(np.concatenate([dataset.train.tokens, dataset.val.tokens]))
        self._starts, self._eval_starts = zeros(self.rows_per_step, np.int64), zeros(config.batch_size, np.int64)
        self._step_number, self._rates = zeros(1, np.uint64), zeros(3, dtype)
        self._loss, self._eval_loss = zeros(1, dtype), zeros(1, dtype)
        self._train_on_device = backend.replayable(self._train)
        self._evaluate_on_device = backend.replayable(self._evaluate_batch)

    def __exit__(self, *exc) -> None:
        self._train_on_device = self._evaluate_on_device = None  # the graphs, and a cycle of references through them

    def train_step(self):
        optimizer, upload = self.optimizer, self.flat.backend.upload
        upload(self._starts, self.dataset.train.first_tokens(self._training_starts(self.step)))
        upload(self._step_number, self.step)
        optimizer.lr = self.learning_rate(self.step)
        upload(self._rates, optimizer.rates(self.step + 1))
        with self._updating():
            self._train_on_device()
            optimizer.steps += 1
        return self._loss[0], self._norm[0]

    def _run_evaluation(self, tell) -> None:
        total = len(self._eval_losses)
        for i in range(total):
            split, starts = self._evaluation_starts(i)
            before = 0 if split is self.dataset.train else len(self.dataset.train.tokens)  # in `_tokens`
            self.flat.backend.upload(self._eval_starts, before + split.first_tokens(starts))
            self._evaluate_on_device()
            self._eval_losses[i] = self._eval_loss[0]
            tell(i + 1, total)

    # -- what is captured --

    def _train(self) -> None:
        config, backend, parts = self.config, self.flat.backend, self.micro_batches(self.rows_per_step)
        if not self.model.training:
            self.model.train()
        for i, rows in enumerate(parts):
            x, y = backend.gather_blocks(self._tokens, self._starts[rows], self.model.block_size)
            with random.scope(config.seed, step=self._step_number, first_row=rows.start):
                loss = self.model(x, y)[1] * (1 / len(parts))
                grad(loss, self.flat.parameters, deposit=self._put_gradient if i == 0 else self._sum_gradient)
            self._micro_losses[i] = loss.data
        self._loss[0] = self._micro_losses.sum()
        self._norm[0] = backend.l2_norm(self.flat.grad)
        self.optimizer.update(self.optimizer.pieces, self._rates, self._clip_factor(self._norm[0]))

    def _put_gradient(self, k: int, g) -> None:
        self.flat.grad_views[k][...] = 0.0 if g is None else g

    def _sum_gradient(self, k: int, g) -> None:
        if g is not None:
            self.flat.grad_views[k][...] += g

    def _evaluate_batch(self) -> None:
        with no_grad():
            x, y = self.flat.backend.gather_blocks(self._tokens, self._eval_starts, self.model.block_size)
            self._eval_loss[0] = self.model(x, y)[1].data
