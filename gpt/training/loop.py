"""The training loop: step, and at every eval_interval evaluate, log and save."""

import math
import time
from pathlib import Path

from gpt.checkpoint import Checkpoint, Progress, save_checkpoint
from gpt.config import Config
from gpt.errors import UserError
from gpt.generate import write_text
from gpt.terminal import OutputError
from gpt.text.tokenizers import readable
from gpt.training.divergence import History, first_not_finite, replay
from gpt.training.interrupt import InterruptOnce, hold_interrupts
from gpt.training.report import Reporter
from gpt.training.run_folder import RunFolder
from gpt.training.trainer import Trainer, is_finite
from gpt.training.workers import WorkerLostError
from tensorlite import backend_of
from tensorlite.backends import explain_memory_error

SAVE_SECONDS = 600.0  # a checkpoint at least this often, however far apart the evaluations are
SAMPLE_TOKENS = 200  # of what is written on the way


class TimeUpError(Exception):
    """The time that this invocation was given is over."""


class TrainingLoop:
    """Takes `trainer` from where it is to max_iters, writing into `folder`.

    yardsticks: losses on the validation text that the log's first row has beside its own.
    deadline: of time.monotonic(), after which it stops at the next step.
    """

    def __init__(
        self,
        trainer: Trainer,
        folder: RunFolder,
        config: Config,
        progress: Progress,
        yardsticks: dict[str, float],
        deadline: float = math.inf,
    ):
        self.trainer, self.folder, self.config, self.progress = trainer, folder, config, progress
        self.max_iters, self.eval_interval = config.train.max_iters, config.train.eval_interval
        self.yardsticks, self.deadline = yardsticks, deadline
        self.report = Reporter(trainer.step, self.max_iters)
        self.started = time.monotonic() - progress.seconds
        self.saved, self.saved_step = time.monotonic(), None
        self.training_seconds, self.training_steps = 0.0, 0  # since the last evaluation
        self.loss = self.grad_norm = None  # of the last step, on the device
        self.history = History()  # of the steps that were read

    def run(self, interrupts: InterruptOnce) -> BaseException | None:
        """Train to the end: None. What stops it before is returned once the state is saved: a signal, the deadline, an
        output that takes nothing more, a worker that was killed, too little memory."""
        try:
            self._run(interrupts)
            return None
        except (KeyboardInterrupt, TimeUpError, OutputError, WorkerLostError, MemoryError) as reason:
            if not self.trainer.whole:
                raise
            with hold_interrupts():
                if self.saved_step != self.trainer.step:
                    self._save_last()
            return reason
        finally:
            self.report.close(self.trainer.step)

    def _run(self, interrupts: InterruptOnce) -> None:
        while True:
            interrupts.check()
            step = self.trainer.step
            if (step % self.eval_interval == 0 or step >= self.max_iters) and step != self.progress.evaluated_step:
                self._evaluate()
            elif time.monotonic() - self.saved > SAVE_SECONDS:
                self._save_last()
            if self.config.train.sample_interval and step % self.config.train.sample_interval == 0:
                self._sample()
            if step >= self.max_iters or self._is_over():
                return
            if time.monotonic() >= self.deadline:
                raise TimeUpError
            start = time.monotonic()
            self.loss, self.grad_norm = self.trainer.train_step()
            due = self.report.due()
            if due or self.trainer.on_host:
                self._read_step()
            if due:
                self.report.step(self.trainer.step, float(self.loss))
            self.training_seconds += time.monotonic() - start
            self.training_steps += 1

    def _evaluate(self) -> None:
        """Evaluate, log, save, and print, which may fail; the best checkpoint too if this is the best so far."""
        trainer, progress = self.trainer, self.progress
        if self.loss is not None:  # a GPU may have steps to do that were told it; they count as training
            start = time.monotonic()
            self._require_finite_loss()
            self.training_seconds += time.monotonic() - start
        result = trainer.evaluate(self.report.evaluating)
        if not math.isfinite(result.val_loss):
            raise self._diverged(f"the loss became {result.val_loss} in the evaluation at step {trainer.step}")
        with hold_interrupts():  # or the log, the progress and the two checkpoints could disagree
            progress.evaluated_step = trainer.step
            self.folder.append(self.folder.log, self._log_row(result))
            if progress.loss_to_beat is None or result.val_loss < progress.loss_to_beat - _or_0(result.val_stderr):
                progress.loss_to_beat, progress.stale = result.val_loss, 0
            else:
                progress.stale += 1
            if progress.best_val_loss is None or result.val_loss < progress.best_val_loss:
                progress.best_val_loss = result.val_loss
                self._save(self.folder.best, for_resume=False)
            self._save_last()
        self.training_seconds, self.training_steps = 0.0, 0
        losses = f"train loss {result.train_loss:.4f}, val loss {result.val_loss:.4f}"
        self.report.line(f"step {trainer.step}: {losses} ({self._in_bits(result.val_loss)})")

    def _in_bits(self, val_loss: float) -> str:
        data = self.trainer.dataset
        per_byte = "" if data.tokenizer.kind == "char" else f", {data.val.bits_per_byte(val_loss):.3f} per byte"
        return f"{data.val.bits_per_character(val_loss):.3f} bits per character{per_byte}"

    def _is_over(self) -> bool:
        """Whether patience has run out."""
        patience = self.config.train.patience
        if not 0 < patience <= self.progress.stale:
            return False
        worse = f"no evaluation of the last {self.progress.stale} was better than {self.progress.loss_to_beat:.4f}"
        self.report.line(f"stopped at step {self.trainer.step}: {worse} by its standard error (--patience {patience})")
        return True

    def _sample(self) -> None:
        trainer, step = self.trainer, self.trainer.step
        text = write_text(trainer.model, trainer.dataset.tokenizer, SAMPLE_TOKENS, self.config.train.seed)
        self.folder.append(self.folder.samples, {"step": step, "text": text})
        self.report.text(f"--- sample at step {step} ---\n{readable(text).strip()}\n--------------\n")

    def _log_row(self, result) -> dict:
        trainer, data = self.trainer, self.trainer.dataset
        rate = self.training_steps * trainer.tokens_per_step / self.training_seconds if self.training_steps else None
        row = {
            "step": trainer.step,
            "train_loss": result.train_loss,
            "train_stderr": result.train_stderr,
            "val_loss": result.val_loss,
            "val_stderr": result.val_stderr,
            "lr": trainer.learning_rate(max(trainer.step - 1, 0)),  # as the norm, of the last step
            "grad_norm": None if self.grad_norm is None else float(self.grad_norm),
            "tokens_per_second": rate,
            "elapsed": time.monotonic() - self.started,
            "train_bits_per_character": data.train.bits_per_character(result.train_loss),
            "val_bits_per_character": data.val.bits_per_character(result.val_loss),
        }
        if data.tokenizer.kind != "char":
            row["train_bits_per_byte"] = data.train.bits_per_byte(result.train_loss)
            row["val_bits_per_byte"] = data.val.bits_per_byte(result.val_loss)
        if self.progress.best_val_loss is None:
            row |= self.yardsticks
        return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}

    def _save_last(self) -> None:
        """Save the state to resume from; UserError instead of replacing a good one by one that has diverged."""
        flat = self.trainer.flat
        if self.loss is not None:
            self._require_finite_loss()
        if not math.isfinite(float(flat.backend.l2_norm(flat.data))):
            raise self._diverged(f"the weights became infinite or nan by step {self.trainer.step}")
        self._save(self.folder.last, for_resume=True)
        self.saved, self.saved_step = time.monotonic(), self.trainer.step

    def _save(self, path: Path, for_resume: bool) -> None:
        try:
            save_checkpoint(path, self._checkpoint(for_resume))
        except MemoryError as error:
            raise UserError(f"cannot write {path}: out of memory ({explain_memory_error(error)})") from None

    def _checkpoint(self, for_resume: bool) -> Checkpoint:
        trainer, optimizer = self.trainer, self.trainer.optimizer
        self.progress.step, self.progress.seconds = trainer.step, time.monotonic() - self.started
        host = backend_of(optimizer.m).to_numpy
        return Checkpoint(
            config=self.config,
            tokenizer=trainer.dataset.tokenizer,
            weights=trainer.model.state_dict(),
            progress=self.progress,
            fingerprint=trainer.dataset.fingerprint,
            optimizer={"m": host(optimizer.m), "v": host(optimizer.v)} if for_resume else {},
        )

    def _read_step(self) -> None:
        """Read back the last step's loss and norm. UserError if they are not finite."""
        loss, norm = float(self.loss), float(self.grad_norm)
        good = is_finite(loss, norm)
        warning = self.history.add(self.trainer.step + (not good and self.trainer.on_host), loss, norm)
        if warning:
            self.report.line(warning)
        if not good:
            raise self._diverged_in_a_step()

    def _require_finite_loss(self) -> None:
        if not math.isfinite(float(self.loss)):
            raise self._diverged_in_a_step()

    def _diverged_in_a_step(self) -> UserError:
        """Say what the last steps were like. The error names the step, and where in the model it began."""
        trainer, history = self.trainer, self.history
        if not trainer.on_host:
            history = replay(trainer, self.folder.last)
        for line in history.described():
            self.report.line(line)
        step, loss, norm = history.rows[-1]
        what = f"the loss became {loss}" if not math.isfinite(loss) else f"the gradient's norm became {norm}"
        return self._diverged(f"{what} at step {step}, first in {first_not_finite(trainer)}")

    def _diverged(self, what: str) -> UserError:
        return UserError(
            f"{what}: lower --learning-rate or set --grad-clip 1; the last good state is in {self.folder.path}"
        )


def _or_0(stderr: float) -> float:
    """0 for that of a single batch, which is not known."""
    return stderr if math.isfinite(stderr) else 0.0
