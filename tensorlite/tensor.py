"""Tensor: an array that remembers how it was made. `record` is how an op makes one."""

import numpy as np
from numpy import ndarray

from tensorlite import autograd
from tensorlite.autograd import Node, mode
from tensorlite.backends import as_array, backend_of
from tensorlite.dtypes import FLOAT, KINDS
from tensorlite.words import FUNCTIONS, Foreign, explained


class Tensor:
    """An N-d array of the NumPy or CuPy backend, with a place in the graph if gradients are to flow through it.

    data: what to hold. An array keeps its dtype and is not copied; Python numbers and lists become float32 or
        int64 arrays of NumPy.
    requires_grad: make this a leaf that receives `.grad`; floating-point data only.
    dtype: convert to this dtype.

    `.data` is the bare array, `.grad` a bare array of the same shape and dtype, or None. The operators and the
    methods (`x.sum()`, `x.reshape(...)`, ...) are the functions of `tensorlite.ops`. Comparisons are made element by
    element; a hash is that of the tensor's identity.
    """

    __slots__ = ("data", "grad", "node", "__weakref__")
    __array_ufunc__ = None  # numpy_array * tensor is then our __rmul__, not an array of Tensors

    @explained
    def __init__(self, data, requires_grad: bool = False, dtype=None):
        self.data = as_array(data.data if isinstance(data, Tensor) else data, dtype)
        self.grad = None
        self.node = None
        if requires_grad:
            self.requires_grad = True

    @property
    def requires_grad(self) -> bool:
        return self.node is not None

    @requires_grad.setter
    def requires_grad(self, wanted: bool) -> None:
        if not self.is_leaf:
            raise RuntimeError("requires_grad: this tensor is an op's result; detach() it to make a leaf of it")
        if wanted and KINDS[self.data.dtype] != FLOAT:
            raise TypeError(f"requires_grad: needs a floating-point tensor, got {self.data.dtype}")
        if wanted != self.requires_grad:  # an existing node stays: graphs refer to it
            self.node = Node.for_leaf(self) if wanted else None

    @property
    def is_leaf(self) -> bool:
        """Made by the user rather than by an op that was recorded."""
        return self.node is None or self.node.vjp is None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def size(self) -> int:
        return self.data.size

    @property
    def dtype(self) -> np.dtype:
        return self.data.dtype

    def numel(self) -> int:
        """The number of elements, PyTorch's name for `size`."""
        return self.data.size

    def backward(self, gradient=None) -> None:
        """Add d self / d leaf to the `.grad` of every leaf that `self` depends on, and free the graph.

        The ops kept their arrays, not copies: do not write into a tensor's data, as an optimiser's step does, between
        the forward and the backward pass.

        gradient: an array of self's shape, the gradient of some scalar with respect to `self`; 1 if `self` is a
        scalar itself.
        """
        root, gy = _start(self, gradient)
        autograd.backpropagate(root, gy, _add_to_grad)

    def item(self) -> float | int:
        """The only element, as a Python number."""
        if self.size != 1:
            raise ValueError(f"item: needs a tensor of one element, got shape {self.shape}")
        return self.data.item()

    def tolist(self) -> list | float | int:
        """The elements as Python's numbers, in lists as deep as there are axes."""
        return self.numpy().tolist()

    def numpy(self) -> np.ndarray:
        """The data as a NumPy array: shared with the tensor on the CPU, copied from a device."""
        return backend_of(self.data).to_numpy(self.data)

    def detach(self) -> "Tensor":
        """The same array without its history."""
        return Tensor(self.data)

    def __dir__(self) -> list[str]:
        return [name for name in super().__dir__() if name not in FUNCTIONS]

    def __getstate__(self) -> tuple:
        """What copy and pickle keep of a leaf. Its node is its own: the copy gets another."""
        if not self.is_leaf:
            raise RuntimeError(f"copy: an op's result ({self.node.op}) is bound to its graph; detach() it first")
        attributes, slots = super().__getstate__()  # attributes: of a subclass that has some
        return backend_of(self.data), attributes, slots | {"node": self.requires_grad}

    def __setstate__(self, state: tuple) -> None:
        _, attributes, slots = state  # the backend is there to be loaded before an array of it is used
        for name, value in {**(attributes or {}), **slots}.items():
            setattr(self, name, value)
        self.node = Node.for_leaf(self) if self.node else None

    def __copy__(self) -> "Tensor":
        """A leaf of its own on the same array, without a gradient."""
        twin = object.__new__(type(self))
        twin.__setstate__(self.__getstate__())
        twin.grad = None
        return twin

    def __array__(self, dtype=None, copy=None):
        if self.requires_grad:
            raise TypeError("a tensor that requires grad does not become an array by itself: use .numpy() or .data")
        return np.array(self.numpy(), dtype=dtype, copy=copy)

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __bool__(self) -> bool:
        return bool(self.item())

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len: a scalar tensor has no length")
        return self.shape[0]

    def __iter__(self):
        return (self[i] for i in range(len(self)))  # or a scalar would be an empty sequence

    def __format__(self, spec: str) -> str:
        """Of one element as Python's number, as in f"{loss:.4f}"; of more without a specification only."""
        if spec and self.size != 1:
            raise TypeError(f"format: {spec!r} is for a tensor of one element, got shape {self.shape}")
        return format(self.item(), spec) if spec else str(self)

    def __repr__(self) -> str:
        body = np.array2string(self.numpy(), separator=", ", prefix="Tensor(")
        how = "" if self.node is None else ", requires_grad=True" if self.is_leaf else f", op={self.node.op}"
        return f"Tensor({body}, dtype={self.dtype}{how})"


for _name in FUNCTIONS:
    setattr(Tensor, _name, Foreign("a Tensor", _name, FUNCTIONS))


def record(data, parents: tuple, vjp) -> Tensor:
    """Make the result of an op.

    data: the result's array.
    parents: the op's inputs in the order of the gradients; anything that is not a Tensor counts as a constant.
    vjp: gy -> one gradient per parent, each an array that broadcasts from the parent's shape, or None. It may
        close over arrays and shapes, never over a Tensor, and must not write into `gy` or into any input.
    """
    out = object.__new__(Tensor)
    if type(data) is not ndarray or data.dtype not in KINDS:  # NumPy turns 0-d results into scalars
        data = as_array(data)
    out.data = data
    out.grad = out.node = None
    if mode.recording:
        nodes = []
        for p in parents:  # in a loop: before Python 3.12 a comprehension is a call
            nodes.append(p.node if isinstance(p, Tensor) else None)
        if any(nodes):
            out.node = Node(nodes, vjp, data)
    return out


def needs_grad(x) -> bool:
    """Whether an op's backward will be asked for the gradient of its input x, and so has to keep what that takes."""
    return mode.recording and isinstance(x, Tensor) and x.node is not None


def grad(output: Tensor, inputs, gradient=None, deposit=None) -> list | None:
    """The gradients of `output` with respect to the leaves `inputs`, without touching any `.grad`: a list of arrays.

    gradient: as in `Tensor.backward`.
    deposit: instead of making the list, call deposit(i, g) once for each input, as soon as its gradient g is known, an
        array that must not be written into, or None where `output` does not depend on it. The same graph gives the
        same order.

    Threads may call this at the same time on graphs that share leaves.
    """
    if not isinstance(output, Tensor):
        raise TypeError(f"grad: expected a Tensor to start from, got a {type(output).__name__}")
    try:
        inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    except TypeError:
        raise TypeError(f"grad: expected a list of leaf tensors, got a {type(inputs).__name__}") from None
    if not all(isinstance(x, Tensor) and x.requires_grad and x.is_leaf for x in inputs):
        raise ValueError("grad: every input must be a leaf tensor that requires grad")
    index = {x.node: i for i, x in enumerate(inputs)}
    if len(index) != len(inputs):
        raise ValueError("grad: an input is given twice")
    grads = None
    if deposit is None:
        grads = [backend_of(x.data).xp.zeros_like(x.data) for x in inputs]

        def deposit(i, g):
            if g is not None:
                grads[i][...] = g

    def give(node, g, owned):
        if node in index:
            deposit(index.pop(node), g)

    root, gy = _start(output, gradient)
    autograd.backpropagate(root, gy, give)
    for i in index.values():
        deposit(i, None)
    return grads


def _start(output: Tensor, gradient):
    """The node to start from and the gradient to send, checked."""
    if output.node is None:
        raise RuntimeError("backward: this tensor does not depend on anything that requires grad")
    if gradient is None:
        if output.size != 1:
            raise ValueError(f"backward: a tensor of shape {output.shape} is no scalar; give its gradient")
        return output.node, backend_of(output.data).xp.ones_like(output.data)
    try:
        gy = as_array(gradient.data if isinstance(gradient, Tensor) else gradient, output.dtype)
    except (TypeError, ValueError) as error:
        raise TypeError(f"backward: the gradient: {error}") from None
    if gy.shape != output.shape:
        raise ValueError(f"backward: the gradient has shape {gy.shape}, the tensor {output.shape}")
    return output.node, gy


def _add_to_grad(node: Node, g, owned: bool) -> None:
    leaf = node.leaf()
    if leaf is None:
        return
    old = leaf.grad
    if old is None:
        g = as_array(g)  # a NumPy scalar becomes a 0-d array
        leaf.grad = g if owned else g.copy()
    elif old.shape != g.shape:
        raise ValueError(
            f"backward: a leaf's .grad has shape {old.shape} and its data {g.shape}; "
            "set .grad to None where data of another shape is put into a tensor"
        )
    elif old.dtype != g.dtype:
        leaf.grad = old.astype(g.dtype) + g
    else:
        old += g
