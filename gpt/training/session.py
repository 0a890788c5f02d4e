"""A training run: introduced, trained, drawn and judged."""

import math
import signal
import sys
from dataclasses import dataclass
from functools import cached_property

import tensorlite as tl
from gpt.advice import argument
from gpt.checkpoint import Checkpoint, Progress, load_checkpoint
from gpt.config import Config
from gpt.device import Device
from gpt.files import atomic_write
from gpt.generate import write_text
from gpt.log import read_log
from gpt.memory import memory_explained
from gpt.models.kinds import MODEL_KINDS
from gpt.models.language_model import LanguageModel
from gpt.needs import SAMPLE_TOKENS
from gpt.plot import draw_run
from gpt.terminal import OutputError, say, show, tell
from gpt.text.dataset import Dataset, on_validation, optima
from gpt.text.tokenizers import readable
from gpt.training.cpu_trainer import CPUTrainer
from gpt.training.evaluate import losses_after
from gpt.training.forecast import forecast
from gpt.training.gpu_trainer import GPUTrainer
from gpt.training.initial import FIXED_INITIALLY
from gpt.training.interrupt import InterruptOnce
from gpt.training.loop import TimeUpError, TrainingLoop
from gpt.training.run_folder import RunFolder
from gpt.training.trainer import Trainer
from gpt.training.verdict import entropy_given, overfit_verdict, verdict

FIXED = FIXED_INITIALLY | {"block_size", "val_fraction"}  # on --resume


@dataclass
class Session:
    """One process's part of a run: everything that `run` needs."""

    config: Config
    dataset: Dataset
    model: LanguageModel
    folder: RunFolder
    device: Device
    checkpoint: Checkpoint | None = None  # where to go on from

    @cached_property
    def counted(self) -> dict:
        """The losses that counting reaches on this text."""
        return optima(self.dataset)

    def run(self, deadline: float = math.inf) -> int:
        """Train, sample, and return the exit status. deadline: see TrainingLoop."""
        text = self.dataset.train.characters + self.dataset.val.characters
        fixed = FIXED | {"data"} if self.checkpoint else FIXED_INITIALLY if self.config.train.init_from else set()
        cpu, cores, dtype = self.device.backend == "numpy", self.device.cores, self.device.dtype
        with memory_explained(self.config, cpu, text, fixed, cores, dtype):
            return self._run(deadline)

    def _run(self, deadline: float) -> int:
        progress = self.checkpoint.progress if self.checkpoint else Progress()
        with InterruptOnce() as interrupts, make_trainer(self.model, self.dataset, self.config, self.device) as trainer:
            self._introduce(trainer)
            if self.checkpoint:
                trainer.restore(self.checkpoint.optimizer, progress.step)
                self.checkpoint = None  # what it held is in the trainer, and need not be held twice
            left = forecast(self.config.train, progress.step, progress.evaluated_step, trainer.rehearse())
            say(f"time: {left.described(self.config.train)}")
            yardsticks = on_validation(self.counted)
            reason = TrainingLoop(trainer, self.folder, self.config, progress, yardsticks, deadline).run(interrupts)
            if not isinstance(reason, (OutputError, MemoryError)):
                self._draw()
            if reason is not None:
                return self._stopped(reason, trainer.step)
            self._sample()
        for sentence in self._verdict(trainer):
            say(sentence)
        say(f"more text: python sample.py {argument('--model', self.folder.path)}")
        return 0

    def _stopped(self, reason: BaseException, step: int) -> int:
        """Say how to go on. The exit status, if it needs no other sentence."""
        again = f"python train.py --resume {argument('--out', self.folder.path)}{self.device.options()}"
        tell(f"stopped and saved after step {step}; go on with: {again}")
        if isinstance(reason, TimeUpError):
            return 0
        if isinstance(reason, KeyboardInterrupt):
            return 128 + getattr(reason, "number", signal.SIGINT)
        raise reason

    def _draw(self) -> None:
        """The picture of the losses, or for a person a word on how to get it."""
        problem = draw_run(self.folder.path, self.folder.picture)
        if problem and sys.stdout.isatty():
            tell(f"no loss.svg: {problem}")

    def _verdict(self, trainer: Trainer) -> list[str]:
        rows, train = read_log(self.folder.log)[0], self.config.train
        if train.overfit:
            context = MODEL_KINDS[train.model].context(self.config.gpt)
            return [overfit_verdict(rows, entropy_given(*trainer.next_batch(), context))]
        sentences = verdict(rows, self.counted, str(self.folder.best))
        if train.data == "ab" and train.tokenizer == "char":
            after = losses_after(self.model.eval(), self.dataset.val)
            after_a = f"loss after an a {after['a']:.4f}, at best ln 2 = 0.6931"
            sentences.append(f"{after_a}; after a b {after['b']:.4f}, at best 0")
        return sentences

    def _introduce(self, trainer: Trainer) -> None:
        data, train = self.dataset, self.config.train
        device = tl.backend_of(self.model.token_table.data).describe()
        if isinstance(trainer, CPUTrainer):
            device += f" on {trainer.threads} core{'s' if trainer.threads > 1 else ''}"
            if trainer.threads < (self.device.threads or 0):
                device += f", for which --threads {self.device.threads} is more than there is work or cores for"
        else:
            device += f" in {self.device.dtype}"
        say(f"text: {data.name}; {len(data.train.tokens):,} tokens to train on, {len(data.val.tokens):,} to validate")
        say(f"model: {train.model}, {self.model.num_parameters():,} parameters; {device}")
        losses = {name: (c,) if isinstance(c, float) else c for name, c in self.counted.items()}
        shown = [f"{name} {' / '.join(f'{loss:.4f}' for loss in pair)}" for name, pair in losses.items()]
        say(f"losses reached by counting (train / val): {', '.join(shown)}")
        on_val = on_validation(self.counted).items()
        bits = [f"{name} {data.val.bits_per_character(loss):.3f}" for name, loss in on_val]
        say(f"in bits per character (val): {', '.join(bits)}")
        say(f"run: {self.folder.path}")

    def _sample(self) -> None:
        """Print a sample of the best model and keep it in the run's folder."""
        best, kind = load_checkpoint(self.folder.best, for_resume=False), self.config.train.model
        model = self.device.place(best.build_model(), kind)
        text = write_text(model, self.dataset.tokenizer, SAMPLE_TOKENS, self.config.train.seed)
        atomic_write(self.folder.sample, text + "\n")
        show(f"--- sample ---\n{readable(text).strip()}\n--------------\n")


def make_trainer(model: LanguageModel, dataset: Dataset, config: Config, device: Device) -> Trainer:
    """What trains on this device."""
    if device.backend == "numpy":
        return CPUTrainer(model, dataset, config.train, device.cores)
    return GPUTrainer(model, dataset, config.train)
