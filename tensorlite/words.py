"""PyTorch's words that are others here, and the answer to whoever writes one: what to write instead.

docs/from-pytorch.md shows these tables.
"""

import functools
import inspect

# Of torch, torch.nn.functional and torch.Tensor: each in the words that follow "write ".
FUNCTIONS = {
    "Generator": "manual_seed(seed), or `with random.scope(seed)`", "add_": "x += y, within no_grad",
    "allclose": "np.allclose(x.data, y.data)", "amax": "max", "amin": "min", "argmin": "argmax(-x)",
    "argsort": "np.argsort(x.data)", "as_tensor": "Tensor(data)", "autograd": "grad, gradcheck or record",
    "bfloat16": "cast(x, dtype) with get_backend('cupy').dtype('bfloat16')",
    "binary_cross_entropy": "-(y * log(p) + (1 - y) * log(1 - p)).mean()",
    "binary_cross_entropy_with_logits": "(maximum(x, 0) - x * y + log(1 + exp(-abs(x)))).mean()", "bmm": "matmul, or @",
    "bool": "x != 0; the dtype is Python's bool", "cat": "concatenate", "chunk": "split(x, size), with a piece's size",
    "clamp": "clip", "clone": "x * 1, or Tensor(x.data.copy())", "compile": "nothing: there is nothing to compile",
    "contiguous": "x: arrays are copied where they must be", "conv1d": "linear on slices: there are no convolutions",
    "conv2d": "linear on patches: there are no convolutions", "copy_": "x.data[...] = y.data",
    "cpu": "Tensor(x.numpy()), or model.to('numpy')", "cuda": "Tensor(get_backend('cupy').asarray(x.data)), or "
    "model.to('cupy')", "device": "'numpy' or 'cupy', as a backend", "dim": "ndim", "dot": "matmul, or @",
    "double": "cast(x, np.float64)", "einsum": "matmul, permute and sum: there is no einsum",
    "empty": "zeros", "enable_grad": "the lines after `with no_grad()`", "eq": "x == y", "equal": "(x == y).data.all()",
    "expand": "broadcast_to", "expand_as": "broadcast_to(x, y.shape)", "eye": "Tensor(np.eye(n))",
    "fill_": "x.data[...] = value", "flip": "x[::-1]", "float": "cast(x, np.float32); the dtype is np.float32",
    "float32": "np.float32", "float64": "np.float64", "from_numpy": "Tensor(array)", "full": "ones(shape) * value",
    "functional": "tensorlite.nn.functional, or the same functions of tensorlite",
    "gather": "x[rows, ids]", "ge": "x >= y", "gt": "x > y", "half": "cast(x, np.float32): there is no float16",
    "index_select": "x[ids], or x[:, ids]", "inference_mode": "no_grad", "int": "Tensor(x.data.astype(np.int32))",
    "int64": "np.int64", "is_tensor": "isinstance(x, Tensor)", "isnan": "x != x",
    "kl_div": "(p * (log(p) - log(q))).sum()", "l1_loss": "abs(x - y).mean()", "le": "x <= y",
    "leaky_relu": "maximum(x, 0.01 * x)", "linspace": "Tensor(np.linspace(start, stop, n))",
    "load": "safetensors.numpy.load_file(path), then model.load_state_dict",
    "logical_and": "x & y", "logical_not": "~x", "logical_or": "x | y",
    "logsumexp": "(x - x.log_softmax(axis)).mean(axis)",
    "long": "Tensor(x.data.astype(np.int64)); the dtype is np.int64", "lt": "x < y", "masked_select": "x[mask]",
    "mm": "matmul, or @", "mse_loss": "((x - y) ** 2).mean()", "mT": "transpose(x)", "mul_": "x *= y, within no_grad",
    "multinomial": "[generator.choice(len(p), p=p) for p in probs], with random.generator(seed, random.SAMPLING)",
    "nelement": "numel", "nll_loss": "cross_entropy, on the logits", "norm": "(x * x).sum().sqrt()",
    "normal_": "x.data[...] = randn(x.shape).data", "one_hot": "Tensor(np.eye(n))[ids], or embedding(ids, table)",
    "ones_like": "ones(x.shape)", "prod": "exp(log(x).sum()), for positive x",
    "rand": "Tensor(generator.random(shape)), with random.generator(seed, random.BATCHES)",
    "randint": "generator.integers(n, size=shape), with random.generator(seed, random.BATCHES)",
    "randn_like": "randn(x.shape)", "randperm": "generator.permutation(n), with random.generator(seed, random.BATCHES)",
    "reciprocal": "1 / x", "register_hook": "grad(output, inputs): there are no hooks",
    "repeat": "concatenate([x] * n), or broadcast_to", "requires_grad_": "x.requires_grad = True", "rsqrt": "x ** -0.5",
    "retain_grad": "grad(output, inputs)", "save": "safetensors.numpy.save_file(model.state_dict(), path)",
    "set_grad_enabled": "no_grad", "softplus": "maximum(x, 0) + log(1 + exp(-abs(x)))", "sort": "np.sort(x.data)",
    "square": "x ** 2", "sub_": "x -= y, within no_grad", "t": "x.T", "tile": "broadcast_to",
    "topk": "np.argpartition(x.data, -k)", "type": "cast(x, dtype)", "unbind": "list(x)", "unsqueeze": "expand_dims",
    "zero_": "x.data[...] = 0, and for a gradient x.grad = None", "zeros_like": "zeros(x.shape)",
}  # fmt: skip
LAYERS = {
    "BCELoss": "-(y * log(p) + (1 - y) * log(1 - p)).mean()", "BatchNorm1d": "LayerNorm, or mean and var over axis 0",
    "Conv1d": "Linear on slices: there are no convolutions", "Conv2d": "Linear on patches: there are no convolutions",
    "CrossEntropyLoss": "cross_entropy", "Flatten": "lambda x: x.flatten(1), which Sequential takes",
    "GRU": "Linear and tanh, in a loop over time", "Identity": "lambda x: x, which Sequential takes",
    "LSTM": "Linear and tanh, in a loop over time",
    "LeakyReLU": "lambda x: maximum(x, 0.01 * x), which Sequential takes",
    "MSELoss": "((x - y) ** 2).mean()", "ModuleDict": "a dict: self.layers = {...}",
    "ModuleList": "a list: self.layers = [...]", "MultiheadAttention": "Linear and scaled_dot_product_attention",
    "ParameterList": "a list: self.weights = [...]", "RNN": "Linear and tanh, in a loop over time",
    "SiLU": "silu, which Sequential takes", "Sigmoid": "sigmoid, which Sequential takes",
    "Softmax": "softmax, which Sequential takes", "TransformerEncoderLayer": "gpt.models.gpt.Block, or its like",
    "init": "parameter.data[...] = values", "utils": "optim.clip_grad_norm_",
}  # fmt: skip
OPTIMIZERS = {
    "Adam": "AdamW(parameters, weight_decay=0)", "Adagrad": "AdamW or SGD", "RMSprop": "AdamW or SGD",
    "lr_scheduler": "optimizer.lr = learning_rate(step, ...)",
}  # fmt: skip
KEYWORDS = {
    "a_max": "max", "a_min": "min", "ddof": "correction", "device": "backend", "dim": "axis", "dim0": "axis0",
    "dim1": "axis1", "dims": "axis", "dropout_p": "dropout", "end_dim": "end_axis", "is_causal": "causal",
    "k": "diagonal", "keepdim": "keepdims", "split_size_or_sections": "sizes",
    "start_dim": "start_axis", "unbiased": "correction",
}  # fmt: skip


def unknown(owner: str, name: str, words: dict) -> AttributeError:
    """The error for a name that `owner` does not have."""
    return AttributeError(f"{owner} has no {name}" + (f": write {words[name]}" if name in words else ""), name=name)


class Foreign:
    """A name of PyTorch's in a class that has it not. (A `__getattr__` would slow every attribute of its objects.)"""

    __slots__ = ("name", "owner", "words")

    def __init__(self, owner: str, name: str, words: dict):
        self.owner, self.name, self.words = owner, name, words

    def __get__(self, instance, cls):
        raise unknown(self.owner, self.name, self.words)


def answers(module: str, words: dict):
    """The `__getattr__` of a module, which is asked for names that are not there."""

    def __getattr__(name: str):  # noqa: N807 - Python's name for it
        raise unknown(module, name, words)

    return __getattr__


REFUSALS = (TypeError, ValueError, IndexError, OverflowError)


def explained(function):
    """`function` with errors that name it, and that answer PyTorch's keywords, such as `dim`, with its own.

    NumPy's own errors say what is wrong, but of which call is lost on the way. Where one explained function calls
    another, the outer one is named: it is what was called.
    """
    code = function.__code__
    count = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)
    wrapped = {("x",): _unary, ("a", "b"): _binary}.get(code.co_varnames[:count], _any_other)(function)
    return functools.update_wrapper(wrapped, function, updated=())


def _any_other(function):
    def call(*args, **keywords):
        try:
            return function(*args, **keywords)
        except REFUSALS as error:
            raise explanation(function, error, keywords) from None

    return call


def _unary(function):  # this and the next take a third of the time of the one above
    def call(x):
        try:
            return function(x)
        except REFUSALS as error:
            raise explanation(function, error, {}) from None

    return call


def _binary(function):
    def call(a, b):
        try:
            return function(a, b)
        except REFUSALS as error:
            raise explanation(function, error, {}) from None

    return call


def explanation(function, error: Exception, keywords: dict) -> Exception:
    """The error to raise for one that came of calling `function` with these keywords."""
    name = function.__qualname__.removesuffix(".__init__").rpartition(".")[2]
    kind = next((k for k in (TypeError, IndexError) if isinstance(error, k)), ValueError)
    said = getattr(error, "said", str(error).removeprefix(f"{name}: "))
    if kind is TypeError and "out" in keywords:  # so NumPy's functions call a method of that name
        said = f"np.{name} takes no Tensor: write x.{name}(), or np.{name}(x.data)"
    for word in keywords:
        if kind is TypeError and KEYWORDS.get(word) in function.__code__.co_varnames:
            said = f"write {KEYWORDS[word]}= instead of {word}="
    explained_error = kind(f"{name}: {said}")
    explained_error.said = said
    return explained_error
