"""The cases every op is checked on, one row for each way to call it.

`fn` calls the op, on the inputs and with the options of its row. `twin` takes the same; it composes the op out of
simpler ones, and so says in one line what it computes. Where the methods of a Tensor are also PyTorch's, a row holds
for the tensors of both.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

import tensorlite as tl

SEED = 7
seeded = tl.random.scope(SEED)  # each call draws the same masks


@dataclass(frozen=True)
class Case:
    """One way to call an op: `fn(*arrays)`, with the options in it."""

    op: str
    id: str
    fn: Callable
    inputs: tuple  # for each an array, or a function of a random generator that makes one
    options: dict
    twin: Callable | None = None
    dtypes: tuple[str, ...] = ("float64", "float32", "bfloat16")  # in which rounding leaves something to check

    def arrays(self) -> list[np.ndarray]:
        """The inputs, the same each time: float64, or integers and booleans, which are passed on as they are."""
        rng = np.random.default_rng(zlib.crc32(f"{self.op} {self.id}".encode()))
        return [np.asarray(make(rng) if callable(make) else make) for make in self.inputs]

    def __str__(self) -> str:
        return f"{self.op}: {self.id}"


CASES: list[Case] = []


def case(op: str, id: str, fn, *inputs, twin=None, dtypes=Case.dtypes, **options) -> None:  # noqa: A002 - pytest's word
    CASES.append(Case(op, id, partial(fn, **options), inputs, options, twin and partial(twin, **options), dtypes))


# --- inputs ---


def normal(*shape):
    return lambda rng: rng.standard_normal(shape)


def positive(*shape):
    return lambda rng: rng.uniform(0.5, 2.0, shape)


def spaced(*shape):
    """Values 0.1 apart, the nearest 0.05 from zero: no ties, no kinks."""
    n = math.prod(shape)
    return lambda rng: (rng.permutation(n).reshape(shape) - n // 2 + 0.5) * 0.1


def like(array, x):
    """A host array as a constant that goes with x, a Tensor or one of PyTorch's."""
    if isinstance(x, tl.Tensor):
        return tl.backend_of(x.data).asarray(np.asarray(array, x.dtype))
    return x.new_tensor(array)


def onehot(ids, size: int) -> np.ndarray:
    return ids.numpy()[..., None] == np.arange(size)


# --- element-wise ---

BINARY = {
    "add": (lambda a, b: a + b, None),
    "sub": (lambda a, b: a - b, lambda a, b: a + -b),
    "mul": (lambda a, b: a * b, None),
    "div": (lambda a, b: a / b, lambda a, b: a * b**-1),
}
SHAPES = {
    "same shape": ((2, 3), (2, 3)),
    "row": ((2, 3), (3,)),
    "row on the left": ((3,), (2, 3)),
    "both stretched": ((2, 1, 3), (4, 1)),
    "0-d": ((2, 3), ()),
    "0-d on the left": ((), (2, 3)),
    "two 0-d": ((), ()),
    "empty": ((0, 3), (3,)),
}
for op, (fn, twin) in BINARY.items():
    for name, (a, b) in SHAPES.items():
        case(op, name, fn, normal(*a), positive(*b), twin=twin)
    case(op, "same operand", lambda x, fn=fn: fn(x, x), positive(2, 3))
    for number in (2.5, 3):
        case(op, f"with {number}", lambda x, fn=fn, c=number: fn(x, c), normal(2, 3))
        case(op, f"with {number} on the left", lambda x, fn=fn, c=number: fn(c, x), positive(2, 3))

UNARY = {
    "sigmoid": (lambda x: tl.sigmoid(x), normal, lambda x: 0.5 + 0.5 * (0.5 * x).tanh()),
    "silu": (lambda x: tl.silu(x), normal, lambda x: x * x.sigmoid()),
    "sin": (lambda x: x.sin(), normal, lambda x: (x - math.pi / 2).cos()),
    "cos": (lambda x: x.cos(), normal, lambda x: 1 - 2 * (x / 2).sin() ** 2),
    "abs": (lambda x: abs(x), spaced, lambda x: tl.maximum(x, -x)),
    "exp": (lambda x: x.exp(), normal, None),
    "log": (lambda x: x.log(), positive, None),
    "sqrt": (lambda x: x.sqrt(), positive, lambda x: x**0.5),
    "tanh": (lambda x: x.tanh(), normal, lambda x: 1 - 2 / ((2 * x).exp() + 1)),
    "relu": (lambda x: x.relu(), spaced, lambda x: (x + (x * x).sqrt()) / 2),
    "neg": (lambda x: -x, normal, lambda x: 0 - x),
}
for op, (fn, values, twin) in UNARY.items():
    for shape in ((2, 3), (), (0, 3)):
        case(op, f"{shape}", fn, values(*shape), twin=twin)
case("sigmoid", "both tails", lambda x: x.sigmoid(), np.linspace(-40, 40, 17))
case("silu", "both tails", lambda x: x.silu(), np.linspace(-40, 40, 17))

POWERS = {0: None, 1: lambda x: x * 1, 2: lambda x: x * x, 3: lambda x: x * x * x, 4: lambda x: (x * x) * (x * x)}
for exponent, twin in POWERS.items():
    case("pow", f"{exponent}", lambda x, e=exponent: x**e, normal(2, 3), twin=twin)
case("pow", "-1", lambda x: x**-1, positive(2, 3), twin=lambda x: 1 / x)
case("pow", "0.5", lambda x: x**0.5, positive(2, 3), twin=lambda x: x.sqrt())
case("pow", "2.5", lambda x: x**2.5, positive(2, 3), twin=lambda x: x * x * x.sqrt())
case("pow", "0 at 0", lambda x: x**0, np.zeros(2))
case("pow", "0-d", lambda x: x**2, normal())
for name, (a, b) in SHAPES.items():
    case(
        "pow", f"exponents, {name}", lambda a, b: a**b, positive(*a), normal(*b), twin=lambda a, b: (a.log() * b).exp()
    )
case("pow", "2 ** x", lambda x: 2**x, normal(2, 3), twin=lambda x: (x * math.log(2)).exp())
case("pow", "0.5 ** x", lambda x: 0.5**x, normal(2, 3), twin=lambda x: 2**-x)
case("pow", "exponents 0 and 1", lambda a, b: a ** (b * like([0, 1], b)), positive(3, 2), np.ones(2))
case("pow", "whole exponents", lambda a, b: a**b, normal(2, 4), np.arange(4))
case("pow", "same operand", lambda x: x**x, positive(2, 3), twin=lambda x: (x.log() * x).exp())


def apart(*shapes):
    """Operands of which no two elements tie: even and odd multiples of 0.1."""
    return [lambda rng, n=n, shape=shape: rng.permutation(math.prod(shape)).reshape(shape) * 0.2 - 0.5 + n * 0.1
            for n, shape in enumerate(shapes)]  # fmt: skip


for name, (a, b) in SHAPES.items():
    case("maximum", name, tl.maximum, *apart(a, b), twin=lambda a, b: (a - b).relu() + b)
    case("minimum", name, tl.minimum, *apart(a, b), twin=lambda a, b: a - (a - b).relu())
case("maximum", "with a number", lambda x: tl.maximum(x, 0.1) * tl.maximum(0.1, x), spaced(2, 3),
     twin=lambda x: x.clip(0.1) ** 2)  # fmt: skip
case("minimum", "with a number", lambda x: tl.minimum(x, 0.1) * tl.minimum(0.1, x), spaced(2, 3),
     twin=lambda x: x.clip(max=0.1) ** 2)  # fmt: skip
for least, most in ((-0.22, 0.14), (None, 0.02), (0, None), (0.2, -0.2)):
    case("clip", f"{least} to {most}", lambda x, how=(least, most): x.clip(*how), spaced(3, 4))
case("clip", "0-d", lambda x: x.clip(-9, max=9), normal())


def gelu_tanh_twin(x, approximate):
    return 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())


for shape in ((4, 5), (), (0, 3)):  # the form with erf has no twin: there is no such op
    case("gelu", f"none {shape}", tl.gelu, normal(*shape))
    case("gelu", f"tanh {shape}", tl.gelu, normal(*shape), twin=gelu_tanh_twin, approximate="tanh")
case("gelu", "both tails", tl.gelu, np.linspace(-9, 9, 25))

case("cast", "to float64", lambda x: tl.cast(x, np.float64), normal(2, 3), dtypes=("float64",))

MASK = np.array([[True, False, True], [False, False, True]])


def where_twin(mask, a, b):
    return mask * a + (1 - mask) * b


for name, (a, b) in {"same shape": ((2, 3), (2, 3)), "stretched": ((4, 1, 3), ()), "rows": ((3,), (2, 1))}.items():
    case("where", name, tl.where, MASK, normal(*a), normal(*b), twin=where_twin)
case("where", "numbers", lambda m, x: tl.where(m, x, 0.5) * tl.where(m, 2, x), MASK, normal(2, 3))
for name, mask in {"same shape": MASK, "row": MASK[0], "0-d": np.array(True), "none": MASK & False}.items():
    case(
        "masked_fill", name, lambda x, m: x.masked_fill(m, -2.5), normal(2, 3), mask,
        twin=lambda x, m: tl.where(m, -2.5, x),
    )  # fmt: skip


# --- dropout: the mask is made here once more, from its place in the random stream ---


def kept(p: float, *shape, call: int = 0) -> np.ndarray:
    """What the elements are multiplied by: 0 or 1 / (1 - p)."""
    place = tl.random.Place(SEED, tl.random.DROPOUT, 0, call, 0)
    keep, scale = tl.get_backend("numpy").dropout_mask(place, shape, p)
    return keep * scale


def dropped(x, p=0.5, training=True, call=0):
    return x * like(kept(p, *x.shape, call=call), x) if training else x


for p in (0.3, 1.0):
    for shape in ((4, 5), (2, 3, 4), ()):
        case("dropout", f"{p} {shape}", seeded(lambda x, p: x.dropout(p)), normal(*shape), twin=dropped, p=p)
case("dropout", "twice", seeded(lambda x: x.dropout().dropout()), normal(4, 5),
     twin=lambda x: dropped(dropped(x), call=1))  # fmt: skip
case("add_dropout", "0.3", seeded(tl.add_dropout), normal(4, 5), normal(4, 5),
     twin=seeded(lambda x, b, p: x + b.dropout(p)), p=0.3)  # fmt: skip
case("add_dropout", "broadcast", seeded(tl.add_dropout), normal(5), normal(4, 5), p=0.3)
case("add_dropout", "eval", tl.add_dropout, normal(2, 3), normal(2, 3), p=0.5, training=False)
case("dropout", "eval", tl.dropout, normal(2, 3), p=0.5, training=False)

# --- reductions ---

AXES = {"all": None, "first": 0, "middle": 1, "last": -1, "two": (0, -1), "three": (2, 0, 1), "1-tuple": (1,)}
for name, axis in AXES.items():
    for keepdims in (False, True):
        how = {"axis": axis, "keepdims": keepdims}
        id = f"{name}{' kept' * keepdims}"  # noqa: A001
        n = 24 // np.zeros((2, 3, 4)).sum(axis).size  # elements that come together
        case("sum", id, lambda x, **how: x.sum(**how), normal(2, 3, 4), **how)
        case("mean", id, lambda x, **how: x.mean(**how), normal(2, 3, 4),
             twin=lambda x, n=n, **how: x.sum(**how) * (1 / n), **how)  # fmt: skip
        case("max", id, lambda x, **how: x.max(**how), spaced(2, 3, 4), **how)
        case("min", id, lambda x, **how: x.min(**how), spaced(2, 3, 4), twin=lambda x, **how: -(-x).max(**how), **how)
        for correction in (0, 1):
            case("var", f"{id} {correction}", lambda x, **how: x.var(**how), normal(2, 3, 4),
                 twin=lambda x, axis, correction, keepdims, n=n:
                     ((x - x.mean(axis, keepdims=True)) ** 2).sum(axis, keepdims) / (n - correction),
                 correction=correction, **how)  # fmt: skip
            case("std", f"{id} {correction}", lambda x, **how: x.std(**how), spaced(2, 3, 4),
                 twin=lambda x, **how: x.var(**how).sqrt(), correction=correction, **how)  # fmt: skip
for op in ("sum", "mean", "max", "min"):
    for axis in (0, -1):
        case(op, f"0-d on {axis}", lambda x, axis, op=op: getattr(x, op)(axis), normal(), axis=axis)
for op in ("var", "std"):
    case(op, "default", lambda x, op=op: getattr(x, op)(), normal(2, 3))
    case(op, "far from zero", lambda x, op=op: getattr(x + 50, op)(-1), spaced(4, 5), dtypes=Case.dtypes[:2])
case("var", "0-d on 0, correction 0", lambda x, **how: x.var(**how), normal(), axis=0, correction=0)
for axis, keepdims in ((None, False), (0, False), (-1, True), (1, False)):
    # Integers have no gradient: a product with them has one.
    case("argmax", f"{axis}{' kept' * keepdims}", lambda x, **how: x.sum() * x.argmax(**how), spaced(2, 3, 4),
         axis=axis, keepdims=keepdims)  # fmt: skip
case("argmax", "0-d on 0", lambda x, axis: x * x.argmax(axis), normal(), axis=0)
for shape, axis in (((2, 3, 4), 0), ((2, 3, 4), 1), ((2, 3, 4), -1), ((5,), 0), ((0, 3), 0), ((0, 3), 1), ((), 0)):
    case("cumsum", f"{shape} on {axis}", lambda x, axis: x.cumsum(axis), normal(*shape), axis=axis)
case("cumsum", "matrix", lambda x: x.cumsum(1), normal(3, 4),
     twin=lambda x: x @ like(np.triu(np.ones((4, 4))), x))  # fmt: skip
case("sum", "0-d", lambda x: x.sum(), normal())
case("sum", "empty", lambda x: x.sum(0), normal(0, 3))
case("mean", "0-d", lambda x: x.mean(), normal())
case("max", "0-d", lambda x: x.max(), normal())

# --- shape ---

for shape in ((3, 2), (6,), (1, 6, 1), (-1,), (3, -1)):
    case("reshape", f"{shape}", lambda x, shape: x.reshape(shape), normal(2, 3), shape=shape)
case("reshape", "numbers", lambda x: x.reshape(3, -1), normal(2, 3))
case("reshape", "0-d", lambda x: x.reshape(()), normal(1, 1))
case("reshape", "moved axes", lambda x: x.transpose(0, 1).reshape(6), normal(2, 3))
for start, end in ((0, -1), (1, 2), (0, 1), (-1, -1)):
    case("flatten", f"{start} to {end}", lambda x, how=(start, end): x.flatten(*how), normal(2, 3, 4))
case("flatten", "the rest", lambda x: x.flatten(1), normal(2, 3, 4), twin=lambda x: x.reshape(2, 12))
for shape in ((), (2, 0)):
    case("flatten", f"{shape}", lambda x: x.flatten(), normal(*shape), twin=lambda x: x.reshape(-1))
for axis in (0, -1, (0, 2), 1):
    case("squeeze", f"{axis}", lambda x, axis: x.squeeze(axis), normal(1, 3, 1), axis=axis)
case("squeeze", "all", lambda x: x.squeeze(), normal(1, 3, 1), twin=lambda x: x.reshape(3))
case("squeeze", "0-d", lambda x: x.squeeze(0), normal())
for axis in (0, 1, -1):
    case("expand_dims", f"{axis}", lambda x, axis: x.expand_dims(axis), normal(2, 3),
         twin=lambda x, axis: tl.stack([x], axis), axis=axis)  # fmt: skip
WIDER = {"rows": ((3,), (2, 3)), "columns": ((2, 1), (2, 3)), "0-d": ((), (2, 3)), "none": ((1, 3), (0, 3))}
for name, (shape, wider) in WIDER.items():
    case("broadcast_to", name, lambda x, shape: x.broadcast_to(shape), normal(*shape),
         twin=lambda x, shape: x + like(np.zeros(shape), x), shape=wider)  # fmt: skip
case("broadcast_to", "numbers", lambda x: x.broadcast_to(2, 3), normal(2, 3))
for op in ("tril", "triu"):
    for shape, diagonal in (((3, 4), 0), ((4, 3), 1), ((2, 3, 3), -1), ((2, 2), 5)):
        case(op, f"{shape} {diagonal}", lambda x, op=op, d=diagonal: getattr(x, op)(d), normal(*shape))
case("tril", "triu's rest", lambda x: x.tril(-1), normal(3, 3), twin=lambda x: x - x.triu())
for axes in ((0, 2, 1), (2, 0, 1), (1, 2, 0), (-1, 0, -2)):
    case("permute", f"{axes}", lambda x, axes=axes: x.permute(axes), normal(2, 3, 4))
case("permute", "numbers", lambda x: x.permute(2, 1, 0), normal(2, 3, 4), twin=lambda x: x.transpose(0, 2))
case("transpose", "last two", tl.transpose, normal(2, 3, 4), twin=lambda x: x.permute(0, 2, 1))
case("transpose", "T", lambda x: x.T, normal(2, 3))
for axes in ((0, 2), (-3, 1), (1, 1)):
    case("transpose", f"{axes}", lambda x, axes=axes: x.transpose(*axes), normal(2, 3, 4))

IDS = np.array([2, 0, 2, 2, 1])
case("getitem", "int", lambda x: x[1], normal(3, 4))
case("getitem", "ints", lambda x: x[-1, 2], normal(3, 4))
case("getitem", "slice", lambda x: x[:, 1:3], normal(3, 4))
case("getitem", "steps", lambda x: x[::2, 1::2], normal(3, 4))
case("getitem", "backwards", lambda x: x[::-1, 3:0:-2], normal(3, 4))
case("getitem", "None", lambda x: x[:, None, 1], normal(3, 4))
case("getitem", "Ellipsis", lambda x: x[..., 0], normal(2, 3, 4))
case("getitem", "everything", lambda x: x[...], normal())
case("getitem", "nothing", lambda x: x[2:2], normal(3, 4))
case("getitem", "ids", lambda x, i: x[i], normal(3, 4), IDS)
case("getitem", "list", lambda x: x[[0, 0, -1]], normal(3, 4))
case("getitem", "ids on an axis", lambda x, i: x[:, i], normal(2, 3, 2), IDS)
case("getitem", "ids and None", lambda x, i: x[None, i], normal(3, 4), IDS)
case("getitem", "pairs of ids", lambda x, i, j: x[i, j], normal(3, 4), IDS, IDS[::-1])
case("getitem", "outer product of ids", lambda x, i, j: x[i, j], normal(3, 4), IDS[:, None], IDS)
case("getitem", "ids on both sides of a slice", lambda x, i: x[i, :, i], normal(3, 2, 3), IDS)
case("getitem", "mask", lambda x, m: x[m], normal(2, 3), MASK)
case("getitem", "mask of rows", lambda x, m: x[m], normal(3, 2), MASK[0])
case("concatenate", "three", lambda *x: tl.concatenate(x), normal(1, 3), normal(2, 3), normal(4, 3))
case("concatenate", "last axis", lambda *x, axis: tl.concatenate(x, axis), normal(2, 3), normal(2, 1), normal(2, 0),
     axis=-1)  # fmt: skip
case("concatenate", "the same twice", lambda x: tl.concatenate([x, x], 1), normal(2, 3))
case("concatenate", "0-d", lambda *x: tl.concatenate(x), normal(), normal(2), normal())
for axis in (0, 1, -1):
    case("stack", f"on {axis}", lambda *x, axis: tl.stack(x, axis), normal(2, 3), normal(2, 3), normal(2, 3),
         twin=lambda *x, axis: tl.concatenate([a.expand_dims(axis) for a in x], axis), axis=axis)  # fmt: skip
case("stack", "0-d", lambda *x: tl.stack(x), normal(), normal())
case("stack", "the same twice", lambda x: tl.stack([x, x]), normal(2))


def weighted(pieces):
    """One tensor out of pieces of any sizes, to which each contributes differently."""
    return sum(k * (piece * piece).sum() for k, piece in enumerate(pieces, 1))


for sizes, axis in ((2, 0), (3, 1), ([1, 3], -1), ([4, 0], 1)):
    case("split", f"{sizes} on {axis}", lambda x, how=(sizes, axis): weighted(x.split(*how)), normal(3, 4))

# --- products ---


def matmul_twin(a, b):
    return (a[..., None] * b[..., None, :, :]).sum(-2)


MATRICES = {
    "matrices": ((2, 3), (3, 4)),
    "batches": ((5, 2, 3), (5, 3, 4)),
    "batch and matrix": ((5, 2, 3), (3, 4)),
    "matrix and batch": ((2, 3), (5, 3, 4)),
    "batches stretched": ((5, 1, 2, 3), (4, 3, 2)),
    "batches of 1": ((1, 2, 3), (5, 3, 4)),
    "empty batch": ((0, 2, 3), (3, 4)),
    "no rows": ((0, 3), (3, 4)),
}
for name, (a, b) in MATRICES.items():
    case("matmul", name, lambda a, b: a @ b, normal(*a), normal(*b), twin=matmul_twin)
VECTORS = {
    "vectors": ((3,), (3,)),
    "vector and matrix": ((3,), (3, 4)),
    "matrix and vector": ((2, 3), (3,)),
    "vector and batch": ((3,), (5, 3, 4)),
    "batch and vector": ((5, 2, 3), (3,)),
}
for name, (a, b) in VECTORS.items():
    case("matmul", name, lambda a, b: a @ b, normal(*a), normal(*b))
case("matmul", "same operand", lambda x: x @ x, normal(3, 3))


def linear_twin(x, w, b=0):
    return x @ w.T + b


for shape in ((4, 3), (2, 4, 3), (3,), (0, 3)):
    case("linear", f"{shape}", tl.linear, normal(*shape), normal(5, 3), normal(5), twin=linear_twin)
    case("linear", f"{shape} no bias", tl.linear, normal(*shape), normal(5, 3), twin=linear_twin)
case("linear", "a single long row", tl.linear, normal(1, 300), normal(2, 300), normal(2), twin=linear_twin)

# --- normalisation ---


def softmax_twin(x, axis):
    e = x.exp()
    return e / e.sum(axis, keepdims=True)


for shape, axis in (((2, 3, 4), -1), ((2, 3, 4), 1), ((2, 3, 4), -3), ((5,), 0), ((0, 3), 1), ((3, 1), 1)):
    case("softmax", f"{shape} on {axis}", lambda x, axis: x.softmax(axis), normal(*shape), twin=softmax_twin, axis=axis)
    case("log_softmax", f"{shape} on {axis}", lambda x, axis: x.log_softmax(axis), normal(*shape),
         twin=lambda x, axis: softmax_twin(x, axis).log(), axis=axis)  # fmt: skip
case("softmax", "large values", lambda x: (x + 1000).softmax(), spaced(3, 4), dtypes=("float64",))
case("log_softmax", "far apart", lambda x: (x * 1000).log_softmax(), spaced(3, 4))


def layer_norm_twin(x, weight=1, bias=0, eps=1e-5):
    deviation = x - x.mean(-1, keepdims=True)
    return deviation / ((deviation * deviation).mean(-1, keepdims=True) + eps) ** 0.5 * weight + bias


for shape in ((4, 5), (2, 3, 4), (6,), (0, 3)):
    for name, count in {"plain": 0, "weight": 1, "weight and bias": 2}.items():
        case("layer_norm", f"{shape} {name}", tl.layer_norm, normal(*shape), *[normal(shape[-1])] * count,
             twin=layer_norm_twin)  # fmt: skip
case("layer_norm", "bias only", lambda x, b: tl.layer_norm(x, bias=b), normal(4, 5), normal(5),
     twin=lambda x, b: layer_norm_twin(x, bias=b))  # fmt: skip
case("layer_norm", "large eps", tl.layer_norm, normal(4, 5), twin=layer_norm_twin, eps=0.5)
case("layer_norm", "far from zero", lambda x: tl.layer_norm(x + 50), spaced(4, 5), dtypes=Case.dtypes[:2])

# --- tokens; a table of more than 512 rows takes another path through the backward ---


def embedding_twin(ids, weight):
    return like(onehot(ids, weight.shape[0]), weight) @ weight


for rows in (5, 600):
    some = np.array([[rows - 1, 0, 3, 3], [3, 2, 0, rows - 1]])
    for name, ids in {"repeated": some, "0-d": some[0, 0], "none": some[:0], "uint16": some.astype(np.uint16)}.items():
        case("embedding", f"{name} of {rows}", tl.embedding, ids, normal(rows, 3), twin=embedding_twin)


def cross_entropy_twin(logits, targets, ignore_index, reduction, label_smoothing):
    aim = onehot(targets, logits.shape[-1]) * (1 - label_smoothing) + label_smoothing / logits.shape[-1]
    losses = -(logits.log_softmax() * like(aim, logits)).sum(-1)
    counted = targets.numpy() != ignore_index
    losses = losses * like(counted, logits)
    return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / int(counted.sum())}[reduction]


TARGETS = np.array([[4, 0, 2], [2, 2, 1]])
for reduction in ("mean", "sum", "none"):
    for name, targets, ignore in (
        ("all count", TARGETS, -100),
        ("flat", TARGETS[0], -100),
        ("one row", TARGETS[0, 0], -100),
        ("ignore -100", np.where(TARGETS == 2, -100, TARGETS), -100),
        ("ignore 2", TARGETS, 2),
    ):
        for share in (0.0, 0.1, 1.0):
            case("cross_entropy", f"{reduction} {name}" + f" smoothed {share}" * (share > 0), tl.cross_entropy,
                 normal(*targets.shape, 5), targets, twin=cross_entropy_twin,
                 ignore_index=ignore, reduction=reduction, label_smoothing=share)  # fmt: skip
case("cross_entropy", "far apart", lambda x, t: tl.cross_entropy(x * 1000, t), spaced(2, 3, 5), TARGETS)

# --- attention ---


@seeded
def attention(q, k, v, attn_mask=None, **how):
    if isinstance(attn_mask, np.ndarray):
        attn_mask = tl.backend_of(q.data).asarray(attn_mask)
    return tl.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, **how)


def attention_twin(q, k, v, attn_mask=None, causal=False, dropout=0.0, scale=None):
    scores = q @ k.transpose(-2, -1) * (scale or 1 / math.sqrt(q.shape[-1]))
    if isinstance(attn_mask, np.ndarray):
        attn_mask = like(np.where(attn_mask, 0, -np.inf), q)
    if attn_mask is not None:
        scores = scores + attn_mask
    if causal:
        T, S = scores.shape[-2:]
        scores = scores + like(np.where(np.tri(T, S, S - T), 0.0, -np.inf), scores)
    probs = scores.softmax(-1)
    if dropout:
        keys_down = (*probs.shape[:-2], *probs.shape[:-3:-1])
        probs = probs * like(kept(dropout, *keys_down).swapaxes(-1, -2), probs)
    return probs @ v


# The name, the leading axes, (T, S, D, E) and the options.
ATTENTIONS = (
    ("plain", (2, 3), (4, 4, 5, 5), {}),
    ("causal", (2, 3), (4, 4, 5, 5), {"causal": True}),
    ("no leading axes", (), (4, 4, 2, 2), {"causal": True}),
    ("cross attention, E != D", (2, 1), (2, 5, 3, 4), {}),
    ("more queries than keys", (2,), (5, 2, 3, 3), {}),
    ("causal, one query", (2, 2), (1, 5, 3, 3), {"causal": True}),
    ("causal, last queries, E != D", (2,), (2, 5, 3, 4), {"causal": True}),
    ("one query, one key, huge scores", (2,), (1, 1, 3, 3), {"scale": 1e4}),
    ("scale", (2,), (3, 3, 2, 2), {"scale": 0.3, "causal": True}),
    ("empty batch", (0, 2), (3, 3, 2, 2), {"causal": True}),
    ("dropout", (2, 3), (4, 4, 5, 5), {"dropout": 0.3}),
    ("dropout, causal, last queries", (2, 2), (3, 5, 2, 4), {"dropout": 0.5, "causal": True}),
    ("causal, two blocks of queries", (1,), (40, 40, 1, 2), {"causal": True}),
    ("causal, two blocks of queries, dropout", (), (40, 43, 2, 1), {"dropout": 0.3, "causal": True}),
)
for name, lead, (T, S, D, E), how in ATTENTIONS:
    case("scaled_dot_product_attention", name, attention, normal(*lead, T, D), normal(*lead, S, D), normal(*lead, S, E),
         twin=attention_twin, **how)  # fmt: skip
case("scaled_dot_product_attention", "q = k = v", lambda x, **how: tl.scaled_dot_product_attention(x, x, x, **how),
     normal(2, 3, 4), causal=True)  # fmt: skip
SEEN = np.random.default_rng(0).random((2, 1, 3, 4)) < 0.6
SEEN[..., 0] = True  # by every query, also under a causal mask
for name, mask, how in (
    ("mask", SEEN, {}),
    ("mask, one for all", SEEN[0, 0], {"scale": 0.3}),
    ("mask of keys", SEEN[:, :, :1], {}),
    ("mask, causal", SEEN, {"causal": True}),
    ("mask, dropout", SEEN, {"dropout": 0.3}),
    ("mask, causal, dropout", SEEN, {"causal": True, "dropout": 0.5}),
):
    case("scaled_dot_product_attention", name, attention, normal(2, 2, 3, 5), normal(2, 2, 4, 5), normal(2, 2, 4, 3),
         twin=attention_twin, attn_mask=mask, **how)  # fmt: skip
for name, shape in {"mask to add": (2, 3, 4), "mask to add, one for all": (4,)}.items():
    case("scaled_dot_product_attention", name, attention, normal(2, 3, 5), normal(2, 4, 5), normal(2, 4, 3),
         normal(*shape), twin=attention_twin)  # fmt: skip


def by_heads(attention, qkv, n_head, **how):
    """Self-attention with `attention` on separate q, k, v, and copies on the way in and out."""
    B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    q, k, v = qkv.reshape(B, T, 3, n_head, C // n_head).permute(2, 0, 3, 1, 4)
    return attention(q, k, v, **how).permute(0, 2, 1, 3).reshape(B, T, C)


for shape, n_head, how in (
    ((2, 4, 18), 3, {"causal": True}),
    ((2, 4, 18), 2, {"causal": False}),
    ((1, 3, 12), 1, {"causal": True}),
    ((3, 1, 12), 4, {"causal": True}),
    ((0, 3, 12), 2, {"causal": True}),
    ((2, 5, 12), 2, {"causal": True, "dropout": 0.3}),
):
    case("self_attention", f"{shape}, {n_head} heads, {how}", seeded(tl.self_attention), normal(*shape),
         twin=partial(by_heads, attention), n_head=n_head, **how)  # fmt: skip
