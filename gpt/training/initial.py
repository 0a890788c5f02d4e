"""What a new run starts from where that is no random weights: `train.py --init-from`."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from gpt.advice import as_option
from gpt.checkpoint import Checkpoint, Progress, is_checkpoint, load_checkpoint
from gpt.config import Config, GPTConfig, TrainConfig
from gpt.errors import UserError, shown
from gpt.files import check_size
from gpt.models.kinds import MODEL_KINDS, build_model
from gpt.models.language_model import LanguageModel
from gpt.models.pretrained import TOKENIZER, find_pretrained
from gpt.text.bpe import read_tokenizer
from gpt.text.stored import AnyText, symbols_of
from gpt.text.tokenizers import CharTokenizer, Tokenizer, kind_of, located, make_tokenizer
from gpt.training.run_folder import find_checkpoint, load_best

FIXED_INITIALLY = {*GPTConfig.__dataclass_fields__, "tokenizer"} - {"dropout", "block_size"}  # with these weights


@dataclass
class Initial:
    """The weights at `path`, and what comes with them."""

    path: Path
    model: str  # in MODEL_KINDS
    shape: GPTConfig
    named: str  # the tokenizer, as a setting
    tokenizer: Tokenizer | None  # itself; None if it is yet to be made from the text
    weights: Callable[[], dict[str, np.ndarray]]

    def configured(self, train: TrainConfig, options: dict) -> Config:
        """The configuration of a run that starts here and trains as `train` and the options say. UserError for options
        that would change what is here."""
        here = asdict(self.shape) | {"tokenizer": self.named}
        given = options | ({"tokenizer": located(options["tokenizer"])} if "tokenizer" in options else {})
        for key in sorted(FIXED_INITIALLY & given.keys() - MODEL_KINDS[self.model].ignored):
            if given[key] != here[key]:
                raise UserError(f"{as_option(key)} comes from {self.path}, as {shown(here[key])}: leave it out")
        positions = self.shape.block_size
        if options.get("block_size", 1) > positions:
            raise UserError(f"{self.path} has {positions} positions: give a --block-size of at most that, or none")
        train = replace(train, model=self.model, tokenizer=self.named)
        return Config(self.shape, train).updated(given | {"init_from": str(self.path.absolute())})

    def tokenizer_for(self, text: AnyText) -> Tokenizer:
        """The tokenizer of the run: the one here, and for characters those of `text` too. None is dropped that the text
        lacks: a prompt may have it, and so may the next text."""
        if isinstance(self.tokenizer, CharTokenizer):
            return CharTokenizer("".join(sorted({*self.tokenizer.symbols, *symbols_of(text)})))
        tokenizer = self.tokenizer or make_tokenizer(self.named, text)
        made, here = tokenizer.vocab_size, self.shape.vocab_size
        if made > here or (made < here and not self.tokenizer):
            raise UserError(
                f"{self.path} has {here:,} symbols, and the tokenizer {self.named} {made:,}: put its own {TOKENIZER} "
                "beside it, or give the very text as --data that its symbols were made from"
            )
        return tokenizer

    def build_model(self, shape: GPTConfig, tokenizer: Tokenizer) -> LanguageModel:
        """The model of that shape on the CPU, with these weights."""
        origin, weights = self._origin(tokenizer), self.weights()
        model = build_model(self.model, shape, seed=None)
        for name, parameter in model.named_parameters():
            parameter.data = _fitted(weights[name], parameter.shape, origin)
        return model

    def described(self, tokenizer: Tokenizer) -> str:
        """A line about what becomes of the vocabulary."""
        new = self._origin(tokenizer).count(-1)
        carried = tokenizer.vocab_size - new
        padding = self.shape.vocab_size - carried
        left = f"; {padding:,} rows that the tokenizer has no symbols for left out" if padding else ""
        return f"vocabulary: {carried:,} symbols carried over, {new:,} new{left}"

    def _origin(self, tokenizer: Tokenizer) -> list[int]:
        """For each symbol of the new vocabulary its number in the old one, -1 for a new one."""
        if isinstance(self.tokenizer, CharTokenizer):
            return [self.tokenizer.symbols.find(symbol) for symbol in tokenizer.symbols]
        return list(range(tokenizer.vocab_size))


def starting_point(config: Config, options: dict) -> tuple[Config, Initial | None]:
    """The configuration of a new run, and the weights that it starts from, if any.

    Those bring their shape and tokenizer: of a preset the settings for training count. A file that names them itself,
    as a run's config.toml does, also chooses what an option could.
    """
    init_from = options.get("init_from", config.train.init_from)
    if init_from is None:
        return config.updated(options), None
    if "init_from" in options:
        initial = load_initial(Path(init_from), options)
    else:
        initial = load_initial(Path(init_from), {"n_head": config.gpt.n_head, "tokenizer": config.train.tokenizer})
        chosen = {"dropout": config.gpt.dropout, "block_size": min(config.gpt.block_size, initial.shape.block_size)}
        idle = MODEL_KINDS[initial.model].ignored
        options = {key: value for key, value in chosen.items() if key not in idle} | options
    return initial.configured(config.train, options), initial


def load_initial(path: Path, options: dict) -> Initial:
    """What is at `path`: a run or a checkpoint of ours, or a folder or file of another program's, to which the options
    add what it does not tell, n_head and tokenizer."""
    if path.is_dir() and any((path / f"{name}.safetensors").exists() for name in ("best", "last")):
        path = find_checkpoint(path)
    if path.is_file() and is_checkpoint(path):
        check_size(path, 1, "take a smaller model")
        ours = load_checkpoint(path, for_resume=False)
        train = ours.config.train
        return Initial(path, train.model, ours.config.gpt, train.tokenizer, ours.tokenizer, lambda: ours.weights)
    found = find_pretrained(path, options.get("n_head"))
    beside = found.folder / TOKENIZER
    name = located(str(beside) if beside.exists() else options.get("tokenizer", "bpe"))
    if name == "bpe":
        raise UserError(
            f"{path} has no {TOKENIZER} beside it, which tells what its symbols are: put it there, or name one with "
            "--tokenizer, or say --tokenizer byte if they are bytes, or char if they are the characters of --data"
        )
    tokenizer = read_tokenizer(name) if kind_of(name) == "file" else None
    rows = tokenizer.vocab_size if tokenizer else found.shape.vocab_size
    return Initial(path, "gpt", found.shape, name, tokenizer, partial(found.weights, rows))


def load_model(path: Path | None) -> tuple[Path, Checkpoint]:
    """What to sample from: a run's best checkpoint, the newest run's for None, a checkpoint, or a folder of another
    program's; and where it lies."""
    if path is None or not os.path.exists(path / "config.json"):  # noqa: PTH110 - Path's fails for a long name
        return load_best(path, "take a smaller --model")
    initial = load_initial(path, {})
    tokenizer = initial.tokenizer
    if tokenizer is None:
        raise UserError(f"{path} has no {TOKENIZER} beside it, which tells what its symbols are: put it there")
    shape = replace(initial.shape, vocab_size=tokenizer.vocab_size)
    config = Config(shape, TrainConfig(model=initial.model, tokenizer=initial.named))
    named = initial.build_model(config.gpt, tokenizer).named_parameters(remove_duplicate=False)
    return path, Checkpoint(config, tokenizer, {name: p.data for name, p in named}, Progress())


def _fitted(weight: np.ndarray, shape: tuple[int, ...], origin: list[int]) -> np.ndarray:
    """The weight in the new model's shape: the first positions, and for new symbols the mean of the others."""
    for axis, size in enumerate(shape):
        if size < weight.shape[axis]:
            weight = weight[:size]
        elif size > weight.shape[axis]:
            mean = weight.mean(axis, keepdims=True)
            weight = np.concatenate([weight, mean], axis).take(origin, axis)  # -1, a new symbol's, is the mean
    return np.ascontiguousarray(weight)
