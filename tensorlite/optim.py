"""Optimisation: all parameters in one flat buffer, AdamW and SGD, gradient clipping, learning-rate schedules."""

import math

from tensorlite.backends import backend_of
from tensorlite.nn import Module, Parameter
from tensorlite.tensor import Tensor
from tensorlite.words import OPTIMIZERS, answers, explained


def _as_list(parameters, kinds=Tensor) -> list:
    """What an iterable gives. The rows of a Tensor and the keys of a dict are no parameters; a set has no order."""
    if isinstance(parameters, (Tensor, Module, dict, set, frozenset)) or not hasattr(parameters, "__iter__"):
        kind = type(parameters).__name__
        raise TypeError(f"expected a list of Parameters, as model.parameters() gives, got a {kind}")
    parameters = list(parameters)
    for p in parameters:
        if not isinstance(p, kinds):
            raise TypeError(f"expected Parameters, got a {type(p).__name__}")
    return parameters


def _shallow_copy(self):
    """What `copy.copy` makes: another object with the same parts."""
    twin = object.__new__(type(self))
    vars(twin).update(vars(self))
    return twin


class FlatBuffer:
    """The parameters' values and gradients as views into two flat arrays, `data` and `grad`.

    Zeroing all gradients is then one fill, their norm one dot product, and an optimiser step one kernel per group.
    The parameters must share one dtype and backend. Their `.data` and `.grad` are views from here on. A deep copy, or
    one through pickle, is over copies of the parameters.
    """

    @explained
    def __init__(self, parameters: list[Parameter]):
        self.parameters = _as_list(parameters)
        if not self.parameters:
            raise ValueError("there are no parameters")
        for p in self.parameters:
            if not p.requires_grad or not p.is_leaf:
                what = "an op's result" if p.requires_grad else "a tensor that does not require grad"
                raise ValueError(f"{what} receives no gradient to train it by; leave it out")
        if len({id(p) for p in self.parameters}) != len(self.parameters):
            raise ValueError("a parameter is given twice")
        kinds = {str(p.dtype) for p in self.parameters}
        if len(kinds) > 1:
            raise ValueError(f"the parameters must share one dtype, got {', '.join(sorted(kinds))}")
        self.backend = backend_of(*(p.data for p in self.parameters))
        self._bind()

    def _bind(self) -> None:
        self.data = self.zeros()
        self.grad = self.zeros()
        self.data_views, self.grad_views = self.views(self.data), self.views(self.grad)
        for p, view in zip(self.parameters, self.data_views, strict=True):
            view[...] = p.data
            p.data = view
        self.bind_gradients()

    __copy__ = _shallow_copy

    def __getstate__(self) -> dict:
        flat = {"data", "grad", "data_views", "grad_views"}  # the parameters bring along what these hold
        return {name: value for name, value in vars(self).items() if name not in flat}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._bind()

    def zeros(self):
        """A fresh flat array of the parameters' total size and dtype, which forked processes share."""
        return self.backend.shared_zeros(sum(p.size for p in self.parameters), self.parameters[0].dtype)

    def views(self, flat) -> list:
        """The pieces of a flat array that belong to the parameters, in their shapes."""
        pieces, start = [], 0
        for p in self.parameters:
            pieces.append(flat[start : start + p.size].reshape(p.shape))
            start += p.size
        return pieces

    def bind_gradients(self) -> None:
        """Make every `.grad` a view of `grad` again, taking over gradients that were put elsewhere (None: zero)."""
        for p, data, view in zip(self.parameters, self.data_views, self.grad_views, strict=True):
            if p.data is not data:
                raise RuntimeError("a parameter was moved; make the optimiser after Module.to, not before")
            if p.grad is not view:
                view[...] = 0 if p.grad is None else p.grad
                p.grad = view


class Optimizer:
    """What AdamW and SGD share: groups of parameters in one flat buffer, which a step goes through piece by piece.

    A subclass has `rates` and `update`, as AdamW describes them, and names in `moments` its own flat arrays.
    """

    moments: tuple[str, ...] = ()

    def __init__(self, parameters, lr: float, weight_decay: float):
        groups = _as_list(parameters, (Tensor, dict))
        if not any(isinstance(group, dict) for group in groups):
            groups = [{"params": groups}]
        for group in groups:
            if not isinstance(group, dict) or "params" not in group:
                raise TypeError("expected a list of Parameters, or one of groups that all have params")
        unknown = {key for group in groups for key in group} - {"params", "weight_decay"}
        if unknown:
            raise ValueError(f"a group sets params and weight_decay only, got {', '.join(sorted(unknown))}")
        groups = [{"weight_decay": weight_decay} | group | {"params": _as_list(group["params"])} for group in groups]
        for group in groups:
            self._check_settings(lr=lr, weight_decay=group["weight_decay"])
        self.flat = FlatBuffer([p for group in groups for p in group["params"]])
        self.lr, self.steps = lr, 0
        self.pieces, stop = [], 0  # (slice of the flat arrays, its decay)
        for group in groups:
            start, stop = stop, stop + sum(p.size for p in group["params"])
            size = self.flat.backend.chunk_size or max(1, stop - start)
            self.pieces += [(slice(i, min(i + size, stop)), group["weight_decay"]) for i in range(start, stop, size)]

    def _check_settings(self, **settings: float) -> None:
        """ValueError for settings at which a step would climb, or make NaN."""
        for name, value in settings.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be 0 or more, and finite, got {value}")

    __copy__ = _shallow_copy

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        for name in self.moments:
            shared = self.flat.zeros()
            shared[...] = state[name]
            setattr(self, name, shared)

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Fill all gradients with zeros; with `set_to_none`, forget them: `.grad` becomes None."""
        if set_to_none:
            for p in self.flat.parameters:
                p.grad = None
        else:
            self.flat.bind_gradients()
            self.flat.grad.fill(0)

    def step(self, grad_scale=1.0) -> None:
        """Update every parameter from its gradient.

        grad_scale: multiplies the gradients, such as to clip them without writing them anew.
        """
        self.flat.bind_gradients()
        self.steps += 1
        self.update(self.pieces, self.rates(self.steps), grad_scale)


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019), the same update as torch.optim.AdamW.

    parameters: a list of Parameters, or groups [{"params": [...], "weight_decay": 0.1}, ...] that set their own
        decay; a parameter without a gradient is stepped with a gradient of zero.
    lr, betas, eps, weight_decay: as usual; ValueError for values that cannot work. `lr` may be set anew before every
        step.

    `flat` holds all parameters, group by group; `m` and `v` are the moments, flat arrays in the same order; `steps`
    counts the steps done.
    """

    moments = "m", "v"

    @explained
    def __init__(self, parameters, lr: float = 1e-3, betas=(0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.01):
        self._check_settings(eps=eps)
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be two numbers from 0 to less than 1, got {betas}")
        super().__init__(parameters, lr, weight_decay)
        self.betas, self.eps = betas, eps
        self.m, self.v = self.flat.zeros(), self.flat.zeros()

    def rates(self, step: int) -> tuple[float, float, float]:
        """What step number `step`, from 1 on, needs to know of that number and of `lr`: lr, and the factor a and the
        summand e of the update a * m / (sqrt(v) + e), in which both moments' corrections are."""
        correction1, correction2 = 1 - self.betas[0] ** step, math.sqrt(1 - self.betas[1] ** step)
        return self.lr, self.lr * correction2 / correction1, self.eps * correction2

    def update(self, pieces: list, rates, grad_scale=1.0) -> None:
        """A step at these `rates` of these of the `pieces` alone: workers may each do some at the same time."""
        flat = self.flat
        for part, decay in pieces:
            flat.backend.adamw_step(
                flat.data[part], flat.grad[part], self.m[part], self.v[part], rates, self.betas, decay, grad_scale
            )


class SGD(Optimizer):
    """Stochastic gradient descent, with momentum (Polyak's, or Nesterov's as in Sutskever et al. 2013), the same update
    as torch.optim.SGD.

    parameters, lr: as AdamW's.
    momentum: from 0 to less than 1, above 0 for nesterov; ValueError for others.
    weight_decay: times the parameter, is added to its gradient.

    `flat` and `steps` are as AdamW's; `m` is the sum of past gradients that the momentum keeps, a flat array.
    """

    moments = ("m",)

    @explained
    def __init__(  # what follows momentum by keyword, for PyTorch has its dampening there
        self, parameters, lr: float = 1e-3, momentum: float = 0.0, *, weight_decay: float = 0.0, nesterov: bool = False
    ):
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be from 0 to less than 1, got {momentum}")
        if nesterov and not momentum:
            raise ValueError("nesterov takes a momentum above 0, such as momentum=0.9")
        super().__init__(parameters, lr, weight_decay)
        self.momentum, self.nesterov = momentum, nesterov
        self.m = self.flat.zeros()

    def rates(self, step: int) -> float:
        """As AdamW's: of the two, a step needs to know lr alone."""
        return self.lr

    def update(self, pieces: list, lr: float, grad_scale=1.0) -> None:
        """As AdamW's.  m = momentum * m + g; p -= lr * m, or with nesterov p -= lr * (g + momentum * m)."""
        for part, decay in pieces:
            p, m, g = self.flat.data[part], self.m[part], grad_scale * self.flat.grad[part]
            if decay:
                g += decay * p
            if self.momentum:
                m *= self.momentum
                m += g
                g = g + self.momentum * m if self.nesterov else m
            p -= lr * g


@explained
def decay_groups(parameters: list[Parameter], weight_decay: float) -> list[dict]:
    """Groups for an optimiser in which matrices (and embedding tables) decay, biases and norm weights do not."""
    parameters = _as_list(parameters)
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


@explained
def clip_grad_norm_(parameters, max_norm: float):
    """Scale all gradients in place so that their global Euclidean norm is at most max_norm (0: leave them).

    parameters: a list of Parameters, of which those without a gradient do not count; or a FlatBuffer, such as an
        optimiser's `flat`, which is faster.
    Returns the norm before, as a 0-d array that is not read back from the device.
    """
    if isinstance(parameters, FlatBuffer):
        parameters.bind_gradients()
        grads = [parameters.grad]
    else:
        grads = [p.grad for p in _as_list(parameters) if p.grad is not None]
    backend = backend_of(*grads)
    norms = [backend.l2_norm(g.ravel()) for g in grads] or [backend.xp.zeros(())]
    norm = norms[0] if len(norms) == 1 else backend.l2_norm(backend.xp.stack(norms))
    if max_norm > 0:
        factor = backend.clip_factor(norm, max_norm)
        for g in grads:
            g *= factor
    return norm


@explained
def learning_rate(step: int, peak: float, warmup: int = 0, decay: int = 0, minimum: float = 0.0) -> float:
    """The rate for step 0, 1, 2, ...: linear warm-up, then cosine decay to `minimum` at step `decay`, constant after.

    decay: 0 keeps the rate at `peak` after the warm-up. The same shape as nanoGPT's.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if not decay:
        return peak
    if step >= decay:
        return minimum
    progress = (step - warmup) / (decay - warmup)
    return minimum + 0.5 * (1.0 + math.cos(math.pi * progress)) * (peak - minimum)


__getattr__ = answers("tensorlite.optim", OPTIMIZERS)
