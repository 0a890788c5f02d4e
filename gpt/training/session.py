"""Putting a training run together: configuration, then data, then model, then the loop."""

import math
import signal
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import tensorlite as tl
from gpt.advice import argument, as_option
from gpt.checkpoint import Checkpoint, Progress, load_checkpoint
from gpt.config import Config, GPTConfig
from gpt.device import Device
from gpt.errors import UserError
from gpt.files import atomic_write, check_size
from gpt.generate import write_text
from gpt.memory import check_memory, memory_explained
from gpt.models.kinds import MODEL_KINDS, build_model
from gpt.models.language_model import LanguageModel
from gpt.plan import planned
from gpt.terminal import say, show, tell
from gpt.text.bpe import read_tokenizer
from gpt.text.dataset import Dataset, make_dataset, optima, split_at
from gpt.text.sources import Text, load_text
from gpt.text.tokenizers import Tokenizer, kind_of, located, make_tokenizer, readable
from gpt.training.cpu_trainer import CPUTrainer
from gpt.training.forecast import forecast
from gpt.training.gpu_trainer import GPUTrainer
from gpt.training.initial import Initial
from gpt.training.interrupt import InterruptOnce
from gpt.training.loop import TimeUpError, TrainingLoop
from gpt.training.run_folder import RunFolder
from gpt.training.trainer import Trainer
from gpt.training.verdict import entropy_given, overfit_verdict, verdict

SAMPLE_TOKENS = 500
FIXED = {*GPTConfig.__dataclass_fields__, "tokenizer", "val_fraction"} - {"dropout"}  # on --resume
FIXED_INITIALLY = FIXED - {"block_size", "val_fraction"}  # with --init-from


@dataclass
class Session:
    """One process's part of a run: everything that `run` needs."""

    config: Config
    dataset: Dataset
    model: LanguageModel
    folder: RunFolder
    device: Device
    checkpoint: Checkpoint | None = None  # where to go on from

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
            reason = TrainingLoop(trainer, self.folder, self.config, progress, deadline).run(interrupts)
            if reason is not None:
                return self._stopped(reason, trainer.step)
            self._sample()
        for sentence in self._verdict():
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

    def _verdict(self) -> list[str]:
        rows, train = self.folder.rows(), self.config.train
        if not train.overfit:
            return verdict(rows, self.counted, str(self.folder.best))
        batch = Trainer(self.model, self.dataset, train).next_batch()
        return [overfit_verdict(rows, entropy_given(*batch, MODEL_KINDS[train.model].context(self.config.gpt)))]

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
        self.counted = counted = optima(data)
        uniform = counted["uniform"]
        shown = [f"uniform {uniform:.4f}"]
        shown += [f"{name} {on_train:.4f} / {on_val:.4f}" for name, (on_train, on_val) in [*counted.items()][1:]]
        say(f"losses reached by counting (train / val): {', '.join(shown)}")
        on_val = {"uniform": uniform} | {name: on_val for name, (_, on_val) in [*counted.items()][1:]}
        bits = [f"{name} {data.val.bits_per_character(loss):.3f}" for name, loss in on_val.items()]
        say(f"in bits per character (val): {', '.join(bits)}")
        say(f"run: {self.folder.path}")

    def _sample(self) -> None:
        """Print a sample of the best model and keep it in the run's folder."""
        best, kind = load_checkpoint(self.folder.best, for_resume=False), self.config.train.model
        model = self.device.place(best.build_model(), kind)
        text = write_text(model, self.dataset.tokenizer, SAMPLE_TOKENS, self.config.train.seed)
        atomic_write(self.folder.sample, text + "\n")
        show(f"--- sample ---\n{readable(text).strip()}\n--------------\n")


def start_session(
    config: Config, out: Path | None, overwrite: bool, device: Device, initial: Initial | None = None
) -> Session:
    """A new run, from random weights or the initial ones. Nothing is written before everything has been checked."""
    config, dataset, model = _prepared(config, device, initial)
    name = Path(config.train.preset).stem or "run"
    folder = RunFolder.create(out, name, overwrite)
    atomic_write(folder.config, config.to_toml())
    return Session(config, dataset, model, folder, device)


def dry_run(config: Config, device: Device, initial: Initial | None = None) -> int:
    """Print what such a run would be: its parameters, its memory, its steps and its time. Nothing is written."""
    config, dataset, model = _prepared(config, device, initial)
    text = dataset.train.characters + dataset.val.characters
    for line in planned(config, tl.get_backend(device.backend), device.cores, text, device.dtype):
        say(line)
    with make_trainer(model, dataset, config, device) as trainer:
        left = forecast(config.train, 0, -1, trainer.rehearse())
    say("time")
    say(f"  {left.described(config.train)}")
    return 0


def make_trainer(model: LanguageModel, dataset: Dataset, config: Config, device: Device) -> Trainer:
    """What trains on this device."""
    if device.backend == "numpy":
        return CPUTrainer(model, dataset, config.train, device.cores)
    return GPUTrainer(model, dataset, config.train)


def _prepared(config: Config, device: Device, initial: Initial | None) -> tuple[Config, Dataset, LanguageModel]:
    """A new run's configuration, with what its text says of it, its data and its model."""
    if config.train.overfit:
        config = Config(replace(config.gpt, dropout=0.0), replace(config.train, eval_iters=1))
    _check_dropout(config.gpt.dropout)
    backend, fixed = tl.get_backend(device.backend), FIXED_INITIALLY if initial else set()
    check = partial(check_memory, backend=backend, workers=device.cores, fixed=fixed, dtype=device.dtype)
    ready = _ready_tokenizer(config, initial)
    known = ready.vocab_size if ready else config.gpt.vocab_size if initial or config.train.tokenizer == "bpe" else 1
    check(config.updated({"vocab_size": known}))  # before a text is made for it
    text = _load_text(config)
    tokenizer = initial.tokenizer_for(text.text) if initial else ready or _make_tokenizer(config, text)
    if tokenizer.kind == "file" and (changes := tokenizer.changes(text.text)):
        say(f"warning: {config.train.tokenizer} does not give every text back: {changes}")
    settings = {"data": text.source, "tokenizer": located(config.train.tokenizer)}
    config = Config(replace(config.gpt, vocab_size=tokenizer.vocab_size), replace(config.train, **settings))
    check(config, text=len(text.text))
    dataset = make_dataset(text, tokenizer, config.gpt.block_size, config.train.val_fraction)
    return config, dataset, device.place(_make_model(config, tokenizer, initial), config.train.model)


def resume_session(out: Path | None, preset: str | None, options: dict, device: Device) -> Session:
    """Go on with an earlier run, with its configuration but for `options`."""
    folder = RunFolder.open(out)
    check_size(folder.last, 1, "take a machine with more")
    checkpoint = load_checkpoint(folder.last)
    old = checkpoint.config
    if preset not in (None, old.train.preset):
        raise UserError(f"the run in {folder.path} was started from {old.train.preset}, not {preset}")
    if "tokenizer" in options:
        options = options | {"tokenizer": located(options["tokenizer"])}
    config = old.updated(options)
    for key in sorted(FIXED):
        if config.to_dict().get(key) != old.to_dict().get(key):
            raise UserError(f"{as_option(key)} cannot change on --resume: start a new run for it")
    if "dropout" in options:
        _check_dropout(options["dropout"])
    text = _load_text(config)
    backend, fixed = tl.get_backend(device.backend), FIXED | {"data"}
    check_memory(config, backend, device.cores, len(text.text), fixed, device.dtype)
    try:
        dataset = make_dataset(text, checkpoint.tokenizer, config.gpt.block_size, config.train.val_fraction)
    except UserError:  # too short, or with other characters
        dataset = None
    if dataset is None or dataset.fingerprint != checkpoint.fingerprint:
        raise UserError(f"{text.name} is not the text that the run in {folder.path} was trained on")
    stale, patience = checkpoint.progress.stale, config.train.patience
    if 0 < patience <= stale:
        raise UserError(f"the run has stopped for want of a new best in {stale} evaluations: raise --patience to go on")
    if checkpoint.progress.evaluated_step >= config.train.max_iters:
        raise UserError(f"the run has its {checkpoint.progress.step} steps: raise --max-iters to go on")
    folder.rewind(checkpoint.progress.step)
    atomic_write(folder.config, config.to_toml())
    checkpoint = replace(checkpoint, config=config)
    model = device.place(checkpoint.build_model(), config.train.model)
    return Session(config, dataset, model, folder, device, checkpoint)


def _load_text(config: Config) -> Text:
    train = config.train
    any_bytes = train.tokenizer == "byte"
    text = load_text(train.data, block_size=config.gpt.block_size, seed=train.seed, any_bytes=any_bytes)
    if text.record and kind_of(train.tokenizer) in ("bpe", "file"):
        raise UserError(
            f"the records of {text.name} need a token per character: take --tokenizer char or byte for them"
        )
    if text.note:
        say(text.note)
    return text


def _ready_tokenizer(config: Config, initial: Initial | None) -> Tokenizer | None:
    """The tokenizer, if there is one before there is a text."""
    if initial:
        return initial.tokenizer
    return read_tokenizer(config.train.tokenizer) if kind_of(config.train.tokenizer) == "file" else None


def _make_tokenizer(config: Config, text: Text) -> Tokenizer:
    split = split_at(text, config.train.val_fraction)
    return make_tokenizer(config.train.tokenizer, text.text, split, config.gpt.vocab_size)


def _make_model(config: Config, tokenizer: Tokenizer, initial: Initial | None) -> LanguageModel:
    if not initial:
        return build_model(config.train.model, config.gpt, config.train.seed)
    model = initial.build_model(config.gpt, tokenizer)
    say(f"weights: {initial.path}")
    say(initial.described(tokenizer))
    return model


def _check_dropout(p: float) -> None:
    if p and not round(p * 65536):
        raise UserError(f"--dropout {p} rounds to 0, for it comes in steps of 2**-16: give 0, or at least {2**-16:.0e}")
