"""Modules: named parameters, and the layers a GPT is made of. Names and orientations are PyTorch's."""

from tensorlite.nn import functional
from tensorlite.nn.layers import Dropout, Embedding, LayerNorm, Linear
from tensorlite.nn.module import Module, Parameter

__all__ = ["Dropout", "Embedding", "LayerNorm", "Linear", "Module", "Parameter", "functional"]
