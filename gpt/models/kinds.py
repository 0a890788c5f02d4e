"""The kinds of models that can be trained. One more is a class, and a row of MODEL_KINDS."""

from collections.abc import Callable
from dataclasses import dataclass, fields

from gpt.advice import as_option
from gpt.errors import UserError
from gpt.models.bigram import BigramLanguageModel
from gpt.models.gpt import GPT
from gpt.models.language_model import LanguageModel
from gpt.models.shape import GPTConfig


@dataclass(frozen=True)
class ModelKind:
    """What is known of a kind of model before there is one."""

    noun: str  # for people
    build: Callable[[GPTConfig, int | None], LanguageModel]  # with initial weights from a seed; None: with none yet
    num_parameters: Callable[[GPTConfig], int]  # trained values of a model of that shape
    num_layers: Callable[[GPTConfig], int]
    context: Callable[[GPTConfig], int]  # the most tokens that a guess depends on
    ignored: frozenset[str] = frozenset()  # settings that mean nothing to it


MODEL_KINDS = {
    "gpt": ModelKind("GPT", GPT, GPTConfig.num_parameters, lambda shape: shape.n_layer, lambda shape: shape.block_size),
    "bigram": ModelKind(
        "bigram table",
        lambda shape, seed: BigramLanguageModel(shape.vocab_size, shape.block_size, seed),
        lambda shape: shape.vocab_size**2,
        lambda shape: 0,
        lambda shape: 1,
        frozenset({f.name for f in fields(GPTConfig)} - {"vocab_size", "block_size"} | {"dtype"}),
    ),
}


def build_model(kind: str, shape: GPTConfig, seed: int | None) -> LanguageModel:
    """A model of a kind in MODEL_KINDS; seed: see `GPT`."""
    return MODEL_KINDS[kind].build(shape, seed)


def no_effect(setting: str, kind: str) -> UserError:
    """For a setting that this kind of model ignores."""
    return UserError(f"{as_option(setting)} has no effect on a {MODEL_KINDS[kind].noun}: leave it out")
