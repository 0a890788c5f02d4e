"""Putting a training run together: configuration, then data, then model."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import tensorlite as tl
from gpt.advice import as_option
from gpt.checkpoint import load_checkpoint
from gpt.config import Config
from gpt.device import Device
from gpt.errors import UserError
from gpt.files import atomic_write, check_size
from gpt.memory import check_memory
from gpt.models.kinds import build_model
from gpt.models.language_model import LanguageModel
from gpt.plan import planned
from gpt.terminal import say
from gpt.text.bpe import read_tokenizer
from gpt.text.dataset import Dataset, make_dataset, split_at
from gpt.text.sources import Text, load_text
from gpt.text.tokenizers import Tokenizer, kind_of, located, make_tokenizer
from gpt.training.forecast import forecast
from gpt.training.initial import FIXED_INITIALLY, Initial
from gpt.training.run_folder import RunFolder, remember
from gpt.training.session import FIXED, Session, make_trainer

MOST_OF_A_NAME = 40  # characters of a text's name in that of a run's folder


def start_session(
    config: Config, out: Path | None, overwrite: bool, device: Device, initial: Initial | None = None
) -> Session:
    """A new run, from random weights or the initial ones. Nothing is written before everything has been checked."""
    name = _run_name(config)
    config, dataset, model = prepared(config, device, initial)
    folder = RunFolder.create(out, name, overwrite)
    atomic_write(folder.config, config.to_toml())
    remember(folder.path)
    return Session(config, dataset, model, folder, device)


def dry_run(config: Config, device: Device, initial: Initial | None = None) -> int:
    """Print what such a run would be: its parameters, its memory, its steps and its time. Nothing is written."""
    config, dataset, model = prepared(config, device, initial)
    text = dataset.train.characters + dataset.val.characters
    for line in planned(config, tl.get_backend(device.backend), device.cores, text, device.dtype):
        say(line)
    with make_trainer(model, dataset, config, device) as trainer:
        left = forecast(config.train, 0, -1, trainer.rehearse())
    say("time")
    say(f"  {left.described(config.train)}")
    return 0


def _run_name(config: Config) -> str:
    """By the preset, and by the text if one was asked for."""
    preset, data = Path(config.train.preset).stem or "run", config.train.data
    data = data[0] if isinstance(data, list) else data
    return preset if data is None else f"{preset}-{Path(data).stem[:MOST_OF_A_NAME]}"


def prepared(config: Config, device: Device, initial: Initial | None) -> tuple[Config, Dataset, LanguageModel]:
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
        raise UserError(
            f"the run in {folder.path} stopped after {stale} evaluations without a new best: raise --patience"
        )
    if checkpoint.progress.evaluated_step >= config.train.max_iters:
        raise UserError(
            f"the run in {folder.path} has its {checkpoint.progress.step} steps: raise --max-iters to go on"
        )
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
