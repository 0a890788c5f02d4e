"""Modules: named parameters, and the layers a GPT is made of. Names and orientations are PyTorch's."""

from tensorlite.nn import functional
from tensorlite.nn.layers import GELU, Dropout, Embedding, LayerNorm, Linear, ReLU, Sequential, Tanh
from tensorlite.nn.module import Module, Parameter
from tensorlite.words import LAYERS, answers

__all__ = [
    "Dropout", "Embedding", "GELU", "LayerNorm", "Linear", "Module", "Parameter", "ReLU", "Sequential", "Tanh",
    "functional",
]  # fmt: skip

__getattr__ = answers("tensorlite.nn", LAYERS)
