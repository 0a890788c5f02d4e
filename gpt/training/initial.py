"""What a new run starts from where that is no random weights: `train.py --init-from`."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from gpt.advice import as_option
from gpt.checkpoint import is_checkpoint, load_checkpoint
from gpt.config import Config, GPTConfig, TrainConfig
from gpt.errors import UserError, shown
from gpt.files import check_size
from gpt.models.kinds import MODEL_KINDS, build_model
from gpt.models.language_model import LanguageModel
from gpt.models.pretrained import TOKENIZER, find_pretrained
from gpt.text.tokenizers import CharTokenizer, Tokenizer, make_tokenizer
from gpt.training.run_folder import find_checkpoint

FIXED = {*GPTConfig.__dataclass_fields__, "tokenizer"} - {"dropout", "block_size", "vocab_size"}


@dataclass
class Initial:
    """The weights at `path`, and what comes with them."""

    path: Path
    model: str  # in MODEL_KINDS
    shape: GPTConfig
    tokenizer: Tokenizer | None  # None of foreign weights that have none beside them
    weights: Callable[[], dict[str, np.ndarray]]

    def configured(self, train: TrainConfig, options: dict) -> Config:
        """The configuration of a run that starts here and trains as `train` and the options say. UserError for options
        that would change what is here."""
        kind = self.tokenizer.kind if self.tokenizer else options.get("tokenizer")
        if kind is None:
            raise UserError(
                f"{self.path} has no {TOKENIZER} beside it, which tells what its symbols are: put it there, or "
                "say --tokenizer byte if they are bytes, or char if they are the characters of --data in order"
            )
        here = asdict(self.shape) | {"tokenizer": kind}
        for key in sorted(FIXED & options.keys() - MODEL_KINDS[self.model].ignored):
            if options[key] != here[key]:
                raise UserError(f"{as_option(key)} comes from {self.path}, as {shown(here[key])}: leave it out")
        positions = self.shape.block_size
        if options.get("block_size", 1) > positions:
            raise UserError(f"{self.path} has {positions} positions: give a --block-size of at most that, or none")
        train = replace(train, model=self.model, tokenizer=kind, init_from=str(self.path.absolute()))
        return Config(self.shape, train).updated({key: options[key] for key in options.keys() - {"init_from"}})

    def tokenizer_for(self, kind: str, text: str) -> Tokenizer:
        """The tokenizer of the run: the one here, and for characters those of `text` too. None is dropped that the text
        lacks: a prompt may have it, and so may the next text."""
        if isinstance(self.tokenizer, CharTokenizer):
            return CharTokenizer("".join(sorted({*self.tokenizer.symbols, *set(text)})))
        tokenizer = self.tokenizer or make_tokenizer(kind, text)
        if not self.tokenizer and tokenizer.vocab_size != self.shape.vocab_size:
            made, here = tokenizer.vocab_size, self.shape.vocab_size
            raise UserError(
                f"{self.path} has {here:,} symbols, and --tokenizer {kind} makes {made:,} of --data: "
                f"give the text that it was trained on, or put its {TOKENIZER} beside it"
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
        initial = load_initial(Path(init_from), options.get("n_head"))
    else:
        initial = load_initial(Path(init_from), options.get("n_head", config.gpt.n_head))
        chosen = {"dropout": config.gpt.dropout, "block_size": min(config.gpt.block_size, initial.shape.block_size)}
        idle = MODEL_KINDS[initial.model].ignored
        options = {key: value for key, value in chosen.items() if key not in idle} | options
    return initial.configured(config.train, options), initial


def load_initial(path: Path, n_head: int | None) -> Initial:
    """What is at `path`: a run or a checkpoint of ours, or a folder or file of another program's."""
    if path.is_dir() and any((path / f"{name}.safetensors").exists() for name in ("best", "last")):
        path = find_checkpoint(path)
    if path.is_file() and is_checkpoint(path):
        check_size(path, 1, "take a smaller model")
        ours = load_checkpoint(path, for_resume=False)
        return Initial(path, ours.config.train.model, ours.config.gpt, ours.tokenizer, lambda: ours.weights)
    found = find_pretrained(path, n_head)
    tokenizer = None
    rows = found.shape.vocab_size if tokenizer is None else tokenizer.vocab_size
    return Initial(path, "gpt", found.shape, tokenizer, partial(found.weights, rows))


def _fitted(weight: np.ndarray, shape: tuple[int, ...], origin: list[int]) -> np.ndarray:
    """The weight in the new model's shape: the first positions, and for new symbols the mean of the others."""
    for axis, size in enumerate(shape):
        if size < weight.shape[axis]:
            weight = weight[:size]
        elif size > weight.shape[axis]:
            mean = weight.mean(axis, keepdims=True)
            weight = np.concatenate([weight, mean], axis).take(origin, axis)  # -1, a new symbol's, is the mean
    return np.ascontiguousarray(weight)
