"""The layers a GPT is made of."""

import math
from collections.abc import Callable, Iterator

import numpy as np

from tensorlite import ops, random
from tensorlite.nn.module import Module, Parameter
from tensorlite.ops.operands import lengths, number
from tensorlite.tensor import Tensor
from tensorlite.words import explained


class Linear(Module):
    """y = x @ weight.T + bias; weight (out_features, in_features), bias (out_features,).

    Initial values are uniform within 1 / sqrt(in_features), as PyTorch's; with `std`, weights from N(0, std) and
    biases 0, as GPT-2's.
    """

    @explained
    def __init__(self, in_features: int, out_features: int, bias: bool = True, std: float | None = None):
        shape = lengths((out_features, in_features))
        bound = 1.0 / math.sqrt(max(1, in_features))
        if std is None:
            self.weight = Parameter(_uniform(shape, bound))
            self.bias = Parameter(_uniform(shape[:1], bound)) if bias else None
        else:
            self.weight = Parameter(_normal(shape, std))
            self.bias = Parameter(np.zeros(out_features, np.float32)) if bias else None

    def forward(self, x) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class Embedding(Module):
    """A table of num_embeddings rows; weight (num_embeddings, embedding_dim), initially N(0, std)."""

    @explained
    def __init__(self, num_embeddings: int, embedding_dim: int, std: float = 1.0):
        self.weight = Parameter(_normal(lengths((num_embeddings, embedding_dim)), std))

    def forward(self, ids) -> Tensor:
        return ops.embedding(ids, self.weight)


class LayerNorm(Module):
    """Layer norm over the last axis, of length `size`; weight (size,) of ones, bias (size,) of zeros or None."""

    @explained
    def __init__(self, size: int, bias: bool = True, eps: float = 1e-5):
        size = lengths((size,))
        self.weight = Parameter(np.ones(size, np.float32))
        self.bias = Parameter(np.zeros(size, np.float32)) if bias else None
        self.eps = number(eps, "eps")

    def forward(self, x) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class Dropout(Module):
    """Drops with probability p while training; does nothing in eval mode."""

    def __init__(self, p: float = 0.5):
        self.p = p

    def forward(self, x) -> Tensor:
        return ops.dropout(x, self.p, self.training)


class ReLU(Module):
    """max(x, 0)."""

    def forward(self, x) -> Tensor:
        return ops.relu(x)


class GELU(Module):
    """x * Phi(x); approximate: "none" for the exact form, "tanh" for GPT-2's."""

    def __init__(self, approximate: str = "none"):
        self.approximate = approximate

    def forward(self, x) -> Tensor:
        return ops.gelu(x, self.approximate)


class Tanh(Module):
    """The hyperbolic tangent."""

    def forward(self, x) -> Tensor:
        return ops.tanh(x)


class Sequential(Module):
    """Each layer on what the one before it gives. A layer is a Module or any other callable, such as `tl.tanh`; a
    TypeError names one that is neither.

    A parameter's name begins with its layer's position: "0.weight". `model[0]` is a layer, `model[1:]` a Sequential of
    the same layers under the same names.
    """

    @explained
    def __init__(self, *layers):
        for i, layer in enumerate(layers):
            if isinstance(layer, type) or not callable(layer):
                what = f"the class {layer.__name__}" if isinstance(layer, type) else f"a {type(layer).__name__}"
                raise TypeError(
                    f"expected a Module or another callable at position {i}, got {what}; "
                    "give the layers one by one, as in Sequential(Linear(2, 3), ReLU())"
                )
            setattr(self, str(i), layer)

    def forward(self, x) -> Tensor:
        for layer in self:
            x = layer(x)
        return x

    def __iter__(self) -> Iterator:
        return iter(self._layers().values())

    def __len__(self) -> int:
        return len(self._layers())

    def __getitem__(self, index: int | slice):
        if not isinstance(index, slice):
            return list(self)[index]
        part = Sequential()
        vars(part).update(list(self._layers().items())[index])
        return part

    def _layers(self) -> dict:
        return {name: layer for name, layer in vars(self).items() if name.isdecimal()}


def _uniform(shape, bound: float) -> np.ndarray:
    return _drawn(shape, lambda rng: rng.uniform(-bound, bound, shape).astype(np.float32))


def _normal(shape, std: float) -> np.ndarray:
    std = np.float32(number(std, "std"))
    return _drawn(shape, lambda rng: rng.standard_normal(shape, dtype=np.float32) * std)


def _drawn(shape, draw: Callable) -> np.ndarray:
    if random.current().seed is None:
        return np.broadcast_to(np.float32(0), shape)
    return draw(random.next_generator())
