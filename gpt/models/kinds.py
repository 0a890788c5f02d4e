"""The kinds of models that can be trained. One more is a class, and a row of MODEL_KINDS."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial

from gpt.advice import as_option
from gpt.errors import UserError
from gpt.models.bigram import BigramLanguageModel
from gpt.models.gpt import GPT
from gpt.models.ladder import Heads, LadderModel, Layer, NormBlocks, ResidualBlocks
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
    fixed: dict[str, object] = field(default_factory=dict)  # and what some of them stand at, whatever is set
    weights: int = 12  # of the matrix products of a layer, in n_embd**2
    kept: int = 8  # arrays (B, T, n_embd) of a layer that wait for the way back, beside the feed-forward's inner ones
    wide: int = 4  # the feed-forward layer inside, in n_embd
    packed: bool = True  # whether the heads of a layer are computed at once, and a sample keeps their keys and values

    def shape(self, shape: GPTConfig) -> GPTConfig:
        """`shape` as such a model has it."""
        return replace(shape, **self.fixed)


def _rung(
    noun: str, body: Callable, weights: int, kept: int, wide: int, vectors: int, last: int = 0, stacked: bool = True
) -> ModelKind:
    """A rung of the ladder. vectors, last: biases and norms of a layer, and after the last one, in n_embd. stacked:
    whether there may be several layers."""

    def num_layers(shape: GPTConfig) -> int:
        return shape.n_layer if stacked else 1

    def num_parameters(shape: GPTConfig) -> int:
        V, C = shape.vocab_size, shape.n_embd
        return (2 * V + shape.block_size + last) * C + V + num_layers(shape) * (weights * C * C + vectors * C)

    fixed = {"dropout": 0.0, "activation": "relu", "tie_weights": False}
    ignored = {*fixed, "bias", "qkv_bias", "head_bias", "dtype", *(() if stacked else ("n_layer",))}
    return ModelKind(
        noun, partial(LadderModel, body), num_parameters, num_layers, lambda shape: shape.block_size,
        frozenset(ignored), fixed, weights, kept, wide, packed=False,
    )  # fmt: skip


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
    "heads": _rung("model of heads alone", Heads, weights=3, kept=3, wide=0, vectors=0, stacked=False),
    "feed-forward": _rung("model of one layer", Layer, weights=4, kept=3, wide=1, vectors=1, stacked=False),
    "residual": _rung("stack of residual blocks", ResidualBlocks, weights=12, kept=6, wide=4, vectors=6),
    "layer-norm": _rung("stack of blocks with norms", NormBlocks, weights=12, kept=8, wide=4, vectors=10, last=2),
}


def build_model(kind: str, shape: GPTConfig, seed: int | None) -> LanguageModel:
    """A model of a kind in MODEL_KINDS; seed: see `GPT`."""
    return MODEL_KINDS[kind].build(shape, seed)


def no_effect(setting: str, kind: str) -> UserError:
    """For a setting that this kind of model ignores."""
    return UserError(f"{as_option(setting)} has no effect on a {MODEL_KINDS[kind].noun}: leave it out")
