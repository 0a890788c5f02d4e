"""Configuration: the shape of the model and how it is trained, checked before anything is allocated; presets.

Every field is an option of train.py (`n_layer` is `--n-layer`) and a key of the presets' TOML files.
"""

import difflib
import json
import os
import tomllib
from dataclasses import dataclass, fields, replace
from importlib import resources
from pathlib import Path

from gpt.advice import argument, as_option, instead_of
from gpt.errors import UserError, shown
from gpt.files import explained, read_regular
from gpt.models.kinds import MODEL_KINDS, no_effect
from gpt.models.shape import GPTConfig
from gpt.settings import check_fields, option
from gpt.text.tokenizers import BPE_SIZE, kind_of
from tensorlite.random import MAX_SEED

MAX_PRESET = 2**20  # bytes of a TOML file
LADDER = tuple(f"ladder-{rung}" for rung in range(1, 8))
PRESETS = ("little-shakespeare", "bigram", "nanogpt-cpu", "shakespeare-char", "lecture", *LADDER)
SAME = {"ladder-7": "lecture"}  # presets under another name


@dataclass(frozen=True)
class TrainConfig:
    """What is trained, on which data, and how."""

    preset: str = option("", "the preset this configuration started from", flag=False)
    model: str = option(
        "gpt",
        "gpt, bigram for a table of next-symbol logits, or a rung of the ladder",
        choices=tuple(MODEL_KINDS),
        flag=False,
    )
    data: str | list | None = option(
        None,
        "a UTF-8 text file, or a folder of them, or shakespeare, pydoc, ab; given several times, all of them joined in "
        "the order of their names; without it shakespeare if it can be had, else pydoc",
    )
    init_from: str | None = option(
        None, "weights to start from, and their shape: a run, a checkpoint, or a folder or file with a GPT-2"
    )
    tokenizer: str = option(
        "char", "symbols: char, the bytes of any file: byte, sub-words: bpe, or a tokenizer.json of Hugging Face's"
    )
    val_fraction: float = option(0.1, "share of the text, at its end, held out for validation", least=0.001, most=0.9)
    batch_size: int = option(12, "sequences per step", least=1)
    gradient_accumulation_steps: int = option(1, "batches whose gradients are added up for one step", least=1)
    micro_batch_size: int = option(0, "sequences a CPU core works on at a time; 0 for the whole batch", least=0)
    max_iters: int = option(5000, "training steps", least=0)
    learning_rate: float = option(1e-3, "peak learning rate", least=0.0)
    min_lr: float = option(0.0, "rate at the end of the cosine decay", least=0.0)
    warmup_iters: int = option(0, "steps of linear warm-up", least=0)
    lr_decay_iters: int = option(0, "step at which the cosine decay reaches min_lr; 0 for a constant rate", least=0)
    weight_decay: float = option(0.01, "AdamW's decay, on matrices only", least=0.0)
    beta1: float = option(0.9, "AdamW's decay rate of the mean gradient", least=0.0, most=0.9999999)
    beta2: float = option(0.999, "AdamW's decay rate of the mean squared gradient", least=0.0, most=0.9999999)
    grad_clip: float = option(0.0, "largest global norm of the gradient; 0 for no clipping", least=0.0)
    eval_interval: int = option(500, "steps between evaluations, each of which saves a checkpoint", least=1)
    eval_iters: int = option(200, "batches per evaluation, of the training and of the validation text", least=1)
    overfit: bool = option(False, "train on one batch, without dropout: can the model learn that much?")
    patience: int = option(0, "stop after so many evaluations without a new best; 0: never", least=0)
    sample_interval: int = option(0, "steps between samples of what the model writes by then; 0: none", least=0)
    seed: int = option(1337, "of the initial weights, the batches and the dropout masks", least=0, most=MAX_SEED)

    def __post_init__(self):
        check_fields(self)
        kind_of(self.tokenizer)
        if self.lr_decay_iters and self.lr_decay_iters <= self.warmup_iters:
            raise UserError(
                f"lr_decay_iters must be 0 or more than warmup_iters, got {self.lr_decay_iters} and {self.warmup_iters}"
            )
        if self.min_lr and not self.lr_decay_iters:
            raise UserError("min_lr has no effect at a constant rate: set lr_decay_iters too, or leave min_lr at 0")
        if self.min_lr > self.learning_rate:
            raise UserError(f"min_lr must not exceed learning_rate, got {self.min_lr} and {self.learning_rate}")


@dataclass(frozen=True)
class SampleConfig:
    """What is sampled, and how."""

    max_new_tokens: int = option(500, "tokens to write", least=0)
    temperature: float = option(0.8, "below 1 likelier, above 1 more varied, 0 always the likeliest", least=0.0)
    top_k: int | None = option(None, "draw from this many of the likeliest tokens, if not from all", least=1)
    top_p: float | None = option(
        None, "draw from the likeliest tokens that make up this probability, if not from all", above=0.0, most=1.0
    )
    num_samples: int = option(1, "texts to write", least=1, most=2**31 - 1)
    seed: int = option(1337, "the same seed, the same text", least=0, most=MAX_SEED)

    def __post_init__(self):
        check_fields(self, as_option)


@dataclass(frozen=True)
class Config:
    """Both halves, as one flat set of keys."""

    gpt: GPTConfig
    train: TrainConfig

    def to_dict(self) -> dict:
        """All keys with their values, without those that are None or mean nothing to the model."""
        flat = {f.name: getattr(half, f.name) for half in (self.gpt, self.train) for f in fields(half)}
        idle = MODEL_KINDS[self.train.model].ignored
        return {key: value for key, value in flat.items() if value is not None and key not in idle}

    @classmethod
    def from_dict(cls, values: dict, source: str) -> "Config":
        """The configuration with these keys, the rest at their defaults; `source` is named in errors.

        A file from before an option existed lacks it, and one that has None for it does not name it: so a new option's
        default means what was done without it, and a default of None stays.
        """
        return cls(GPTConfig(vocab_size=BPE_SIZE), TrainConfig()).updated(values, source)

    def updated(self, values: dict, source: str | None = None) -> "Config":
        """A copy with some keys changed. UserError, naming `source` if there is one, for a key that does not exist or
        means nothing to the model, and for a value that cannot be. Another tokenizer leaves nothing of the size of the
        last one's vocabulary."""
        known, idle = option_fields(), MODEL_KINDS[self.train.model].ignored
        prefix = f"{source}: " if source else ""
        for key in values:
            if key in idle:
                raise no_effect(key, self.train.model)
            if key not in known:
                hint = instead_of(key, known) or f"; the keys are {', '.join(known)}"
                raise UserError(f"{prefix}unknown key {shown(key)}{hint}")
        model_keys = {f.name for f in fields(GPTConfig)}
        if values.get("tokenizer", self.train.tokenizer) != self.train.tokenizer:
            values = {"vocab_size": BPE_SIZE} | values
        try:
            return Config(
                replace(self.gpt, **{k: v for k, v in values.items() if k in model_keys}),
                replace(self.train, **{k: v for k, v in values.items() if k not in model_keys}),
            )
        except UserError as error:
            raise UserError(f"{prefix}{error}") from None

    def to_toml(self) -> str:
        """A TOML file that `load_preset` reads back."""
        lines = ["# Read back by: python train.py THIS_FILE"]
        lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in self.to_dict().items()]
        # JSON's strings, numbers and booleans are also TOML's, but for one control character.
        return "\n".join(lines).replace("\x7f", "\\u007f") + "\n"


def option_fields() -> dict:
    """Every field of both halves by name."""
    return {f.name: f for half in (GPTConfig, TrainConfig) for f in fields(half)}


def load_preset(name: str) -> Config:
    """The preset of that name, or the TOML file at that path."""
    if name in PRESETS:
        text = resources.files("gpt").joinpath("presets", f"{SAME.get(name, name)}.toml").read_text(encoding="utf-8")
    elif name.endswith(".toml"):
        try:
            with explained("read the preset", name):
                text = read_regular(name, MAX_PRESET, follow=True).decode("utf-8-sig")  # some editors begin with a mark
        except UnicodeDecodeError as error:
            raise UserError(f"cannot read the preset {name}: {error}; save it as UTF-8") from None
    else:
        raise UserError(f"unknown preset {name!r}: {_meant(name)}")
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also for numbers too long and nesting too deep
        raise UserError(f"{name} is not a valid TOML file: {error}") from None
    return Config.from_dict({"preset": name} | values, source=name)


def _meant(name: str) -> str:
    """What to write instead of that for a preset: one of ours that nanoGPT spells so, or a text as the --data."""
    path = Path(name)
    is_text = os.path.isfile(name) and path.suffix != ".py"  # noqa: PTH113 - Path's fails if the name is too long
    close = difflib.get_close_matches(path.stem.replace("_", "-"), PRESETS, 1)
    if is_text or path.suffix not in ("", ".py"):
        return f"to train on a text write {argument('--data', name)}"
    return f"did you mean {close[0]}?" if close else f"expected one of {', '.join(PRESETS)}, or a TOML file"
