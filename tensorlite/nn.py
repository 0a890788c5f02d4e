"""Modules: named parameters, and the layers a GPT is made of. Names and orientations are PyTorch's."""

import math
from collections.abc import Iterator

import numpy as np

from tensorlite import ops, random
from tensorlite.backends import backend_of, get_backend
from tensorlite.tensor import Tensor


class Parameter(Tensor):
    """A tensor that a Module trains. Ops treat it as any other leaf."""

    __slots__ = ()

    def __init__(self, data, dtype=None):
        super().__init__(data, requires_grad=True, dtype=dtype)


class Module:
    """Something with parameters. Attributes that are Parameters, Modules, or lists of Modules are found by name.

    `training` tells layers such as Dropout how to behave; `train()` and `eval()` set it for the whole tree.
    """

    training: bool = True

    def __call__(self, *args, **kwargs):
        return self.forward(*args, **kwargs)

    def forward(self, *args, **kwargs):
        raise NotImplementedError(f"{type(self).__name__} defines no forward")

    def children(self) -> Iterator[tuple[str, "Module"]]:
        """The modules one level down, each with its name: "ln_1", or "h.0" for the first of a list `h`."""
        for name, value in vars(self).items():
            if isinstance(value, Module):
                yield name, value
            elif isinstance(value, list):
                for i, item in enumerate(value):
                    if isinstance(item, Module):
                        yield f"{name}.{i}", item

    def modules(self) -> Iterator["Module"]:
        """This module and all below it."""
        yield self
        for _, child in self.children():
            yield from child.modules()

    def named_parameters(self) -> dict[str, Parameter]:
        """Every name a parameter goes by, in order of definition; tied parameters appear once per name."""
        named = {name: value for name, value in vars(self).items() if isinstance(value, Parameter)}
        for prefix, child in self.children():
            named |= {f"{prefix}.{name}": p for name, p in child.named_parameters().items()}
        return named

    def parameters(self) -> list[Parameter]:
        """Every parameter once, in order of definition."""
        return list({id(p): p for p in self.named_parameters().values()}.values())

    def num_parameters(self) -> int:
        """The number of trained values."""
        return sum(p.size for p in self.parameters())

    def train(self, mode: bool = True) -> "Module":
        for module in self.modules():
            module.training = mode
        return self

    def eval(self) -> "Module":
        return self.train(False)

    def zero_grad(self) -> None:
        """Forget all gradients: `.grad` becomes None."""
        for p in self.parameters():
            p.grad = None

    def to(self, backend: str | None = None, dtype=None) -> "Module":
        """Move every parameter to a backend ("numpy" or "cupy") and/or a dtype, in place; gradients are dropped."""
        for p in self.parameters():
            target = get_backend(backend) if backend else backend_of(p.data)
            p.requires_grad = False  # its node knows the old dtype
            p.data, p.grad = target.asarray(p.numpy(), dtype or p.dtype), None
            p.requires_grad = True
        return self

    def state_dict(self) -> dict[str, np.ndarray]:
        """Copies of all parameters as NumPy arrays by name, tied ones under each of their names."""
        return {name: np.array(p.numpy()) for name, p in self.named_parameters().items()}

    def load_state_dict(self, state: dict) -> None:
        """Copy arrays (NumPy, or anything NumPy converts) into the parameters, by name.

        Every parameter must be there, under one of its names at least, with its shape, and nothing else; otherwise
        a ValueError says which are missing, unknown or misshapen, and no parameter is changed.
        """
        named = self.named_parameters()
        arrays = {name: np.asarray(value) for name, value in state.items()}
        given = {id(named[name]) for name in arrays if name in named}
        problems = [f"missing {n}" for n, p in named.items() if id(p) not in given]
        problems += [f"unknown {n}" for n in arrays if n not in named]
        problems += [
            f"{n} has shape {a.shape}, expected {named[n].shape}"
            for n, a in arrays.items()
            if n in named and a.shape != named[n].shape
        ]
        if problems:
            more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise ValueError(f"load_state_dict: {'; '.join(problems[:5])}{more}")
        loaded: dict[int, str] = {}
        for name, array in arrays.items():
            first = loaded.setdefault(id(named[name]), name)
            if not np.array_equal(arrays[first], array, equal_nan=True):
                raise ValueError(f"load_state_dict: {first} and {name} are tied in this model but differ")
        for name in loaded.values():
            p = named[name]
            p.data[...] = backend_of(p.data).asarray(arrays[name], p.dtype)


class Linear(Module):
    """y = x @ weight.T + bias; weight (out_features, in_features), bias (out_features,).

    Initial values are uniform within 1 / sqrt(in_features), as PyTorch's; with `std`, weights from N(0, std) and
    biases 0, as GPT-2's.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, std: float | None = None):
        shape, bound = (out_features, in_features), 1.0 / math.sqrt(in_features)
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

    def __init__(self, num_embeddings: int, embedding_dim: int, std: float = 1.0):
        self.weight = Parameter(_normal((num_embeddings, embedding_dim), std))

    def forward(self, ids) -> Tensor:
        return ops.embedding(ids, self.weight)


class LayerNorm(Module):
    """Layer norm over the last axis, of length `size`; weight (size,) of ones, bias (size,) of zeros or None."""

    def __init__(self, size: int, bias: bool = True, eps: float = 1e-5):
        self.weight = Parameter(np.ones(size, np.float32))
        self.bias = Parameter(np.zeros(size, np.float32)) if bias else None
        self.eps = eps

    def forward(self, x) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class Dropout(Module):
    """Drops with probability p while training; does nothing in eval mode."""

    def __init__(self, p: float = 0.5):
        self.p = p

    def forward(self, x) -> Tensor:
        return ops.dropout(x, self.p, self.training)


def _init_generator() -> "np.random.Generator":
    """The next place in the current scope's initialisation stream."""
    place = random.current().next_place(0)
    return random.generator(place.seed, random.INIT, place.step, place.call)


def _uniform(shape, bound: float) -> np.ndarray:
    return _init_generator().uniform(-bound, bound, shape).astype(np.float32)


def _normal(shape, std: float) -> np.ndarray:
    return _init_generator().standard_normal(shape, dtype=np.float32) * np.float32(std)
