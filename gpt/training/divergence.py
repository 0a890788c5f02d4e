"""What to say of a run whose loss is no number any more: since which step, and where in the model it began."""

import math
from collections import deque
from pathlib import Path

import numpy as np

from gpt.checkpoint import load_checkpoint
from gpt.training.trainer import Trainer, is_finite
from tensorlite import backend_of, random
from tensorlite.tools import watch

EXPLODES = 100.0  # times the running median: a gradient's norm that is worth a warning
SETTLED = 20  # steps after which there is a median to speak of
REMEMBERED = 10  # steps


class History:
    """The last steps' losses and gradient norms, and whether a norm explodes."""

    def __init__(self):
        self.rows: deque[tuple[int, float, float]] = deque(maxlen=REMEMBERED)
        self._median, self._steps, self._warned = 0.0, 0, False

    def add(self, step: int, loss: float, norm: float) -> str | None:
        """Take in a step. A warning, if this is the first whose norm is far above the usual one."""
        self.rows.append((step, loss, norm))
        usual, self._steps = self._median, self._steps + 1
        self._median = max(norm, 1e-30) if self._steps == 1 else usual * (1.05 if norm > usual else 1 / 1.05)
        if self._warned or self._steps <= SETTLED or not EXPLODES * usual < norm < math.inf:
            return None
        self._warned = True
        return (
            f"warning: at step {step} the gradient's norm is {norm:.3g}, where {usual:.3g} is usual: should the loss "
            "rise from here on, lower --learning-rate, raise --warmup-iters, or set --grad-clip 1"
        )

    def described(self) -> list[str]:
        """A line for each step."""
        return [f"step {step}: loss {loss:.4f}, gradient norm {norm:.4g}" for step, loss, norm in self.rows]


def replay(trainer: Trainer, last: Path) -> History:
    """Take a trainer on a device, where no step's loss is read, back to before the step that gave no finite loss or
    gradient: every draw is a function of the step, so that the steps since the last checkpoint can be done again."""
    history, steps = History(), None
    while True:
        checkpoint = load_checkpoint(last)
        trainer.model.load_state_dict(checkpoint.weights)
        trainer.restore(checkpoint.optimizer, checkpoint.progress.step)
        while trainer.step != steps:
            step = trainer.step
            loss, norm = map(float, trainer.train_step())
            if steps is None:
                history.add(step + 1, loss, norm)
                if not is_finite(loss, norm):
                    break
        if trainer.step == steps:
            return history
        steps = step


def first_not_finite(trainer: Trainer) -> str:
    """The first op whose result, or else whose gradient, is not finite in the next step, as "module: op"; the step is
    computed plainly, in this process, and changes nothing."""
    for name, parameter in trainer.model.named_parameters():
        if not _finite(parameter.data):
            return f"the weights {name}"
    found, config = [], trainer.config

    def look(kind: str, seen, arrays) -> None:
        if not found and not all(a is None or _finite(a) for a in arrays):
            found.append(f"{kind}{seen.path or type(trainer.model).__name__}: {seen.op}")

    x, y = trainer.next_batch()
    trainer.model.train()
    for rows in trainer.micro_batches(len(x)):
        with (
            np.errstate(all="ignore"),
            random.scope(config.seed, step=trainer.step, first_row=rows.start),
            watch(
                trainer.model,
                lambda seen, result: look("", seen, [result.data]),
                lambda seen: look("the gradient of ", seen, seen.gradients),
                sizes=False,
            ),
        ):
            _, loss = trainer.model(x[rows], y[rows])
            if not found:
                loss.backward()
        if found:
            return found[0]
    return "the squares that the norm adds up"


def _finite(array) -> bool:
    return bool(np.isfinite(backend_of(array).to_numpy(array)).all())
