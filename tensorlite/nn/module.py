"""Parameter, Module, and what finds the parameters of one, whatever they are kept in."""

from collections import ChainMap, UserDict, UserList, deque
from collections.abc import Iterator, MappingView
from itertools import count, zip_longest
from types import MappingProxyType, MemberDescriptorType

import numpy as np

from tensorlite.backends import backend_of, get_backend
from tensorlite.dtypes import FLOAT, KINDS, known_float
from tensorlite.tensor import Tensor
from tensorlite.words import explained


class Parameter(Tensor):
    """A tensor that a Module trains. Ops treat it as any other leaf."""

    __slots__ = ()

    def __init__(self, data, dtype=None):
        super().__init__(data, requires_grad=True, dtype=dtype)


class Module:
    """Something with parameters: the Parameters and Modules among its attributes, and those in lists, tuples and dicts
    among them, nested as they may be. Their names are the way to them: "weight", "h.0", "heads.a.1".

    In a set, an iterator or another container they would not be found, and are refused; other objects are not looked
    into. A Module may refer to one that contains it.

    Other Tensors in the same places, such as a mask, are moved by `to` along with the parameters. They are no
    parameters, and not in `state_dict`.

    `training` tells layers such as Dropout how to behave; `train()` and `eval()` set it for the whole tree.
    """

    training: bool = True

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for name, value in vars(cls).items():
            if isinstance(value, MemberDescriptorType) or any(_find(name, value)):
                raise TypeError(
                    f"{cls.__name__}.{name}: parameters are not found in the class or in __slots__; set it in __init__"
                )

    def __setattr__(self, name: str, value):
        old, kind = vars(self).get(name), type(value).__name__
        if isinstance(old, Parameter) and not isinstance(value, (Parameter, type(None))):
            raise TypeError(
                f"{type(self).__name__}.{name}: expected a Parameter or None, got {kind}; "
                f"to change its values use load_state_dict, or {name}.data[...] = values"
            )
        if isinstance(old, Module) and not isinstance(value, (Module, type(None))):
            raise TypeError(f"{type(self).__name__}.{name}: expected a Module or None, got {kind}")
        _by_name(_find(name, value))
        super().__setattr__(name, value)

    def __call__(self, *args, **kwargs):
        return self.forward(*args, **kwargs)

    def forward(self, *args, **kwargs):
        raise NotImplementedError(f"{type(self).__name__} defines no forward")

    def children(self) -> Iterator[tuple[str, "Module"]]:
        """The modules one level down, each with its name: "ln_1", or "h.0" for the first of a list `h`."""
        return ((name, value) for name, value in _members(self).items() if isinstance(value, Module))

    def modules(self) -> Iterator["Module"]:
        """This module and all below it, each once."""
        found, ahead = {}, [self]
        while ahead:
            module = ahead.pop()
            if id(module) not in found:
                found[id(module)] = module
                ahead += reversed([child for _, child in module.children()])
        return iter(found.values())

    def named_parameters(self, remove_duplicate: bool = True) -> Iterator[tuple[str, Parameter]]:
        """Pairs (name, parameter): a module's own in order of definition, then its children's. A tied parameter comes
        once, by its first name, or without `remove_duplicate` by each of its names."""
        named = _by_name(_named_parameters(self))
        first = {id(p): name for name, p in reversed(named.items())}
        return ((name, p) for name, p in named.items() if not remove_duplicate or first[id(p)] == name)

    def parameters(self) -> list[Parameter]:
        """Every parameter once, in the order of `named_parameters`."""
        return [p for _, p in self.named_parameters()]

    def num_parameters(self) -> int:
        """The number of trained values."""
        return sum(p.size for p in self.parameters())

    def train(self, mode: bool = True) -> "Module":
        for module in self.modules():
            module.training = mode
        return self

    def eval(self) -> "Module":
        return self.train(False)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients: `.grad` becomes None, or without `set_to_none` zeros where there is one."""
        for p in self.parameters():
            if set_to_none:
                p.grad = None
            elif p.grad is not None:
                p.grad.fill(0)

    @explained
    def to(self, backend: str | None = None, dtype=None) -> "Module":
        """Move every parameter to a backend ("numpy" or "cupy") and/or a dtype (float32, float64, bfloat16), in place;
        gradients are dropped. Where that cannot be, nothing has changed.

        Other Tensors move too, integers and booleans with their own dtype; results bound to a graph stay as they are.
        """
        dtype = dtype if dtype is None else known_float(dtype)
        target = get_backend(backend) if backend else None
        tensors = list({id(t): t for module in self.modules() for t in _leaves(vars(module))}.values())
        moved = []
        for t in tensors:
            new = t.dtype if dtype is None or KINDS[t.dtype] != FLOAT else dtype
            moved.append((target or backend_of(t.data)).asarray(t.numpy(), new))
        for t, data in zip(tensors, moved, strict=True):
            t.data, t.grad = data, None
        return self

    def register_buffer(self, name: str, tensor: Tensor) -> None:
        """PyTorch's way to write `self.name = tensor`, for a tensor that is no parameter, such as a mask."""
        setattr(self, name, tensor)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Copies of all parameters as NumPy arrays by name, tied ones under each of their names."""
        return {name: np.array(p.numpy()) for name, p in self.named_parameters(remove_duplicate=False)}

    @explained
    def load_state_dict(self, state: dict) -> None:
        """Copy arrays (NumPy, or anything NumPy converts) into the parameters, by name.

        Every parameter must be there, under one of its names at least, with its shape, and nothing else; otherwise
        a ValueError says which are missing, unknown or misshapen, and no parameter is changed. What torch.compile and
        torch's data parallelism put before every name is left out.
        """
        if not hasattr(state, "items"):
            raise TypeError(f"expected a dict of arrays by name, got a {type(state).__name__}")
        named = dict(self.named_parameters(remove_duplicate=False))
        arrays = {name: np.asarray(value) for name, value in _unwrapped(state, named).items()}
        given = {id(named[name]) for name in arrays if name in named}
        kinds = (
            [f"missing {n}" for n, p in named.items() if id(p) not in given],
            [f"unknown {n}" for n in arrays if n not in named],
            [
                f"{n} has shape {a.shape}, expected {named[n].shape}"
                for n, a in arrays.items()
                if n in named and a.shape != named[n].shape
            ],
        )
        problems = [p for some in zip_longest(*kinds) for p in some if p]  # in turns, so that each kind is seen
        if problems:
            more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise ValueError(f"{'; '.join(problems[:5])}{more}")
        loaded: dict[int, str] = {}
        for name, array in arrays.items():
            first = loaded.setdefault(id(named[name]), name)
            if not np.array_equal(arrays[first], array, equal_nan=True):
                raise ValueError(f"{first} and {name} are tied in this model but differ")
        for name in loaded.values():
            p = named[name]
            p.data[...] = backend_of(p.data).asarray(arrays[name], p.dtype)


def _unwrapped(state: dict, named: dict) -> dict:
    """`state` without the prefixes that wrappers of a torch module give all its names."""
    for prefix in ("module.", "_orig_mod.", "module."):
        if all(name.startswith(prefix) and name not in named for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


_FOUND = (Parameter, Module)
_PLAIN = frozenset({int, float, bool, str, bytes, type(None)})  # nothing to look into, and most of what there is
_NAMELESS = (set, frozenset, deque, MappingView, UserDict, UserList, ChainMap, MappingProxyType)


def _find(path: str, value, inside: tuple = ()) -> Iterator[tuple[str, Parameter | Module]]:
    """The Parameters and Modules that `value` is or contains, by their paths; a TypeError if they would have none.

    inside: the ids of the containers around it, for one may contain itself.
    """
    if type(value) in _PLAIN or id(value) in inside:
        return
    named, nameless, place = (), (), f"a {type(value).__name__}"
    if isinstance(value, _FOUND):
        yield path, value
    elif isinstance(value, dict):
        named, nameless, place = value.items(), value, "the keys of a dict"
    elif isinstance(value, (list, tuple)):
        named = enumerate(value)
    elif isinstance(value, _NAMELESS):
        nameless = value.values() if hasattr(value, "values") else value
    elif isinstance(value, np.ndarray):
        nameless = value.flat if value.dtype == object else ()
    elif isinstance(value, Iterator) and type(value).__module__ in ("builtins", "itertools"):  # not a file, say
        nameless = () if isinstance(value, count) else (_UNSEEN,)
    inside = (*inside, id(value))
    for key, item in named:
        if type(item) not in _PLAIN:
            for found in _find(f"{path}.{key}", item, inside):
                if not isinstance(key, (str, int)):
                    raise TypeError(f"{path}: expected keys of type str or int, got {type(key).__name__}")
                yield found
    for item in nameless:
        if any(_find(path, item, inside)):
            raise TypeError(f"{path}: parameters and modules are not found in {place}; use a list, tuple or dict")


_UNSEEN = Module()  # stands for what an iterator will give, which cannot be looked at without using it up


def _leaves(value, inside: tuple = ()) -> Iterator[Tensor]:
    """The Tensors that `value` is or contains, Parameters and others, but for those that are bound to a graph."""
    if isinstance(value, Tensor):
        if value.is_leaf:
            yield value
    elif isinstance(value, (list, tuple, dict)) and id(value) not in inside:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item, (*inside, id(value)))


def _by_name(found) -> dict:
    """The pairs (name, value) as a dict; a ValueError if two have the same name."""
    named = {}
    for name, value in found:
        if name in named:
            raise ValueError(f"two parameters or modules have the name {name}; rename one of them")
        named[name] = value
    return named


def _members(module: Module) -> dict[str, Parameter | Module]:
    """What is one level down, by name, in order of definition."""
    return _by_name(found for name, value in vars(module).items() for found in _find(name, value))


def _named_parameters(module: Module, above: tuple = ()) -> Iterator[tuple[str, Parameter]]:
    """As `Module.named_parameters`, but for what is in the modules whose ids are in `above`."""
    members, above = _members(module), (*above, id(module))
    yield from ((name, p) for name, p in members.items() if isinstance(p, Parameter))
    for prefix, child in members.items():
        if isinstance(child, Module) and id(child) not in above:
            yield from ((f"{prefix}.{name}", p) for name, p in _named_parameters(child, above))
