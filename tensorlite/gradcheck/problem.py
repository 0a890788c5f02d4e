"""A function with its inputs in hand: it can be evaluated with one of them moved, and loaded in another dtype."""

import math

import numpy as np

from tensorlite.autograd import no_grad
from tensorlite.backends import backend_of, get_backend
from tensorlite.gradcheck.report import GradcheckError
from tensorlite.nn.module import Module, Parameter, _leaves
from tensorlite.tensor import Tensor


class Problem:
    """Within `with problem:` the modules it was given hold other arrays; after it, what they held before.

    names, tensors, points: of each floating-point input and each parameter its name, the leaf that the function sees
        and its float64 value on the host.
    shapes: of the outputs, once there are some.
    """

    def __init__(self, fn, inputs: tuple, kwargs: dict, backend: str):
        self.fn, self.be = fn, get_backend(backend)
        self.names, self.tensors, self.points = [], [], []
        self.constants: list[tuple[Tensor, np.ndarray]] = []  # that belong to a module
        self.borrowed: list[tuple[Tensor, object]] = []
        self.given_parameter = any(isinstance(x, Parameter) for x in inputs)
        self.shapes: list[tuple[int, ...]] = []
        _fits(fn, inputs, kwargs)
        self.args = [self._take(f"input {i}", x) for i, x in enumerate(inputs)]
        self.kwargs = {name: self._take(name, x) for name, x in kwargs.items()}
        owner = fn if isinstance(fn, Module) else getattr(fn, "__self__", None)
        if isinstance(owner, Module):
            self._take_module("", owner)
        if not self.tensors:
            raise TypeError("gradcheck: none of the inputs is floating-point, so there is no gradient to check")

    def _take(self, name: str, x):
        """What the function gets for this input: the same, with Tensors of ours for what has a gradient."""
        if isinstance(x, dict):
            return {key: self._take(f"{name}[{key!r}]", value) for key, value in x.items()}
        if isinstance(x, tuple) or (isinstance(x, list) and not _is_numbers(x)):
            items = [self._take(f"{name}[{i}]", value) for i, value in enumerate(x)]
            return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
        if isinstance(x, Module):
            self._take_module(f"{name}.", x)
            return x
        if not isinstance(x, float | list) and not hasattr(x, "dtype"):
            return x
        array = _host_array(x)
        if not _is_float(array):
            return Tensor(self.be.asarray(array))
        tensor = Tensor(self.be.asarray(array, np.float64), requires_grad=True)
        self._add(name, tensor, array)
        return tensor

    def _take_module(self, prefix: str, module: Module) -> None:
        names = {id(p): name for name, p in module.named_parameters()}
        for t in {id(t): t for m in module.modules() for t in _leaves(vars(m))}.values():
            if all(t is not known for known, _ in self.borrowed):
                self.borrowed.append((t, t.data))
                if _is_float(t.data) and t.requires_grad:
                    self._add(prefix + names.get(id(t), "a tensor"), t, t.numpy())
                else:
                    self.constants.append((t, np.array(t.numpy())))

    def _add(self, name: str, tensor: Tensor, array: np.ndarray) -> None:
        self.names.append(name)
        self.tensors.append(tensor)
        self.points.append(np.array(array, np.float64))

    def __enter__(self) -> "Problem":
        return self

    def __exit__(self, *exc) -> None:
        for t, data in self.borrowed:
            t.data = data

    def round_to(self, dtype: np.dtype) -> None:
        """Move the point to one that this dtype can hold."""
        self.points = [p.astype(dtype).astype(np.float64) for p in self.points]

    def load(self, dtype: np.dtype) -> None:
        """Put the point into the tensors, in this dtype."""
        for t, point in zip(self.tensors, self.points, strict=True):
            t.data = self.be.asarray(point.astype(dtype))
        for t, value in self.constants:
            t.data = self.be.asarray(value.astype(dtype) if _is_float(value) else value.copy())

    def outputs(self) -> list[Tensor]:
        """The floating-point Tensors that the function returns."""
        try:
            result = self.fn(*self.args, **self.kwargs)
        except TypeError as error:
            if not self.given_parameter:
                raise
            raise GradcheckError(
                f"gradcheck: the function failed ({error}); a Parameter given as an input is a float64 copy, of which"
                " the module it is from knows nothing: write gradcheck(module, x), which checks its parameters too"
            ) from error
        found = [t for t in _tensors(result) if _is_float(t.data)]
        if not found:
            raise TypeError("gradcheck: the function must return a Tensor of floats, or a tuple, list or dict of some")
        self.shapes = [t.shape for t in found]
        return found

    @no_grad()
    def at(self, i: int | None = None, moved: np.ndarray | None = None) -> np.ndarray:
        """All outputs, with `moved` in the place of input i, in a flat float64 array that the next call may change."""
        if i is None:
            return self.flat(self.outputs())
        kept = self.tensors[i].data
        self.tensors[i].data = self.be.asarray(moved)
        try:
            return self.flat(self.outputs())
        finally:
            self.tensors[i].data = kept

    def split(self, flat: np.ndarray) -> list[np.ndarray]:
        """A view for each output, of its shape."""
        ends = np.cumsum([math.prod(shape) for shape in self.shapes])[:-1]
        return [piece.reshape(shape) for piece, shape in zip(np.split(flat, ends), self.shapes, strict=True)]

    def flat(self, outputs: list[Tensor]) -> np.ndarray:
        arrays = [self.be.to_numpy(t.data).astype(np.float64, copy=False).reshape(-1) for t in outputs]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _fits(fn, inputs: tuple, kwargs: dict) -> None:
    """A TypeError that says what to write if a function of several arguments is given them in brackets."""
    if len(inputs) != 1 or not isinstance(inputs[0], tuple | list):
        return
    import inspect

    def takes(*args) -> bool:
        try:
            inspect.signature(fn.forward if isinstance(fn, Module) else fn).bind(*args, **kwargs)
        except ValueError:  # of a builtin the signature is not known
            return True
        except TypeError:
            return False
        return True

    if not takes(*inputs) and takes(*inputs[0]):
        raise TypeError(
            f"gradcheck: the function takes {len(inputs[0])} arguments and was given one"
            f" {type(inputs[0]).__name__} of {len(inputs[0])}: write gradcheck(fn, a, b), not gradcheck(fn, (a, b))"
        )


def _tensors(result):
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, dict | tuple | list):
        for item in result.values() if isinstance(result, dict) else result:
            yield from _tensors(item)
    elif not isinstance(result, int | float | str | None):
        raise TypeError(
            "gradcheck: the function must return a Tensor, or a tuple, list or dict of Tensors,"
            f" got {type(result).__name__}; an op's result is made by record(data, inputs, vjp)"
        )


def _is_numbers(x: list) -> bool:
    """Whether it is what `Tensor(x)` makes an array of: numbers only, in lists as deep as there are axes."""
    return all(_is_numbers(item) if isinstance(item, list) else isinstance(item, int | float) for item in x)


def _is_float(array) -> bool:
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"


def _host_array(x) -> np.ndarray:
    if isinstance(x, float | list | np.generic | np.ndarray):
        return np.asarray(x)
    return x.numpy() if isinstance(x, Tensor) else backend_of(x).to_numpy(x)
