"""copy, deepcopy and pickle of tensors, modules and optimisers: a copy trains itself, as the original would have."""

import copy
import gc
import pickle
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import tensorlite as tl
from gpt import GPT, BigramLanguageModel, GPTConfig
from gpt.models.gpt import _ACTIVATIONS
from tensorlite import Tensor, nn, no_grad, random
from tensorlite.backends import backend_of, get_backend
from tensorlite.nn import Module, Parameter
from tensorlite.optim import SGD, AdamW, FlatBuffer, clip_grad_norm_, decay_groups

DEEP = {
    "deepcopy": copy.deepcopy,
    **{f"pickle {i}": lambda x, i=i: pickle.loads(pickle.dumps(x, i)) for i in range(2, pickle.HIGHEST_PROTOCOL + 1)},
}
deeply = pytest.mark.parametrize("duplicate", DEEP.values(), ids=DEEP)
ALL = DEEP | {"copy": copy.copy}


class Tagged(Tensor):
    """A subclass with a slot and one with a __dict__."""

    __slots__ = ("tag",)


class Noted(Parameter):
    def __init__(self, data, note):
        super().__init__(data)
        self.note = note


class Tied(Module):
    """Two names for one table, parameters in containers, a reference upwards, and what is no parameter."""

    def __init__(self):
        self.table = Parameter(np.arange(6, dtype=np.float32).reshape(2, 3))
        self.layers = [nn.Linear(3, 3), {"a": (nn.LayerNorm(3),)}]
        self.head = nn.Linear(3, 2, bias=False)
        self.head.weight = self.table
        self.mask, self.ids = Tensor(np.ones(3, np.float32)), Tensor([0, 1])
        self.layers[0].parent = self

    def forward(self, x):
        return self.head(self.layers[1]["a"][0](self.layers[0](x) * self.mask))


class Optimizer(AdamW):
    """A subclass with an attribute of its own."""

    def __init__(self, parameters, note, **options):
        super().__init__(parameters, **options)
        self.note = note


def leaf(make=Tensor, dtype=np.float32, **options) -> Tensor:
    x = make(np.arange(6).reshape(2, 3).astype(dtype), **options)
    if x.requires_grad:
        x.grad = np.full((2, 3), 2, dtype)
    return x


def frozen(p):
    p.requires_grad = False
    return p


def tagged():
    x = leaf(Tagged, requires_grad=True)
    x.tag = "t"
    return x


def unrecorded():
    with no_grad():
        return leaf(Parameter) * 2


TENSORS = {
    "Tensor": leaf,
    "Tensor of integers": lambda: leaf(dtype=np.int64),
    "leaf": lambda: leaf(requires_grad=True),
    "leaf of float64": lambda: leaf(requires_grad=True, dtype=np.float64),
    "leaf of bfloat16": lambda: leaf(requires_grad=True, dtype=ml_dtypes.bfloat16),
    "Parameter": lambda: leaf(Parameter),
    "Parameter of a view": lambda: Parameter(np.arange(24, dtype=np.float32).reshape(4, 6)[::2, ::2]),
    "frozen Parameter": lambda: frozen(leaf(Parameter)),
    "scalar": lambda: Tensor(2.5, requires_grad=True),
    "empty": lambda: Parameter(np.ones((0, 3), np.float32)),
    "subclass with a slot": tagged,
    "subclass with a __dict__": lambda: leaf(lambda a: Noted(a, ["n"])),
    "unrecorded result": unrecorded,
}


def backward(x) -> None:
    tl.sum(x * 3.0).backward()


@pytest.mark.parametrize("duplicate", ALL.values(), ids=ALL)
@pytest.mark.parametrize("make", TENSORS.values(), ids=TENSORS)
def test_a_copy_of_a_tensor_is_a_leaf_of_its_own(make, duplicate):
    x = make()
    twin, shallow = duplicate(x), duplicate is copy.copy
    assert type(twin) is type(x)
    assert twin is not x
    assert twin.is_leaf
    assert twin.requires_grad == x.requires_grad
    assert (twin.dtype, twin.shape) == (x.dtype, x.shape)
    np.testing.assert_array_equal(twin.data, x.data)
    assert (twin.data is x.data) == shallow
    assert np.shares_memory(twin.data, x.data) == (shallow and x.size > 0)
    if shallow or x.grad is None:
        assert twin.grad is None
    else:
        np.testing.assert_array_equal(twin.grad, x.grad)
        assert not np.shares_memory(twin.grad, x.grad)
    for name in ("tag", "note"):
        assert getattr(twin, name, None) == getattr(x, name, None)
        if name == "note" and hasattr(x, name):
            assert (twin.note is x.note) == shallow
    if x.requires_grad:
        before, twin.grad = x.grad, None
        backward(twin)
        np.testing.assert_array_equal(twin.grad, np.full(x.shape, 3, x.dtype))
        assert x.grad is before
        twin.grad = x.grad = None
        backward(x)
        assert twin.grad is None
        assert x.grad is not None


@pytest.mark.parametrize("duplicate", ALL.values(), ids=ALL)
def test_a_copy_outlives_its_original(duplicate):
    x = Parameter(np.ones(2, np.float32))
    twin = duplicate(x)
    del x
    gc.collect()
    backward(twin)
    np.testing.assert_array_equal(twin.grad, [3, 3])


@pytest.mark.parametrize("duplicate", ALL.values(), ids=ALL)
def test_an_op_s_result_is_not_copied(duplicate):
    said = r"^copy: an op's result \(mul\) is bound to its graph; detach\(\) it first$"
    y = Parameter(np.ones(2, np.float32)) * 2
    with pytest.raises(RuntimeError, match=said):
        duplicate(y)
    if duplicate is not copy.copy:
        with pytest.raises(RuntimeError, match=said):
            duplicate([y])
    assert not duplicate(y.detach()).requires_grad
    y.backward(np.ones(2, np.float32))


@deeply
def test_what_shared_an_array_or_was_one_tensor_still_does(duplicate):
    x = Parameter(np.ones(2, np.float32))
    a, b, (c,) = duplicate([x, x, (x.detach(),)])
    assert a is b
    assert a.node is b.node
    assert c is not a
    assert c.data is a.data


def test_backends_stay_one():
    backend = get_backend("numpy")
    for duplicate in ALL.values():
        assert duplicate(backend) is backend
        assert duplicate([backend])[0] is backend


def test_another_process_reads_what_was_pickled(tmp_path):
    model = nn.Linear(2, 2)
    path = tmp_path / "model"
    path.write_bytes(pickle.dumps([model, AdamW(model.parameters())]))
    code = (
        f"import pickle; model, opt = pickle.load(open({str(path)!r}, 'rb')); import tensorlite as tl; "
        "tl.sum(model([[1.0, 2.0]])).backward(); opt.step(); assert opt.flat.parameters == model.parameters(); "
        "print(model.weight.data.tolist())"
    )
    root = Path(__file__).parent.parent
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    optimizer = AdamW(model.parameters())
    tl.sum(model([[1.0, 2.0]])).backward()
    optimizer.step()
    assert out.stdout.strip() == str(model.weight.data.tolist())


# --- modules ---

X = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)


@deeply
def test_a_deep_copy_of_a_module_is_whole_and_apart(duplicate):
    model = Tied().eval()
    model.head.weight.grad = np.ones((2, 3), np.float32)
    twin = duplicate(model)
    assert type(twin) is Tied
    assert [*dict(twin.named_parameters())] == [*dict(model.named_parameters())]
    assert twin.head.weight is twin.table
    assert twin.layers[0].parent is twin
    assert not any(m.training for m in twin.modules())
    assert {type(p) for p in twin.parameters()} == {Parameter}
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        np.testing.assert_array_equal(p.data, q.data)
        assert not np.shares_memory(p.data, q.data)
    np.testing.assert_array_equal(twin.table.grad, 1)
    assert (twin.mask.requires_grad, twin.ids.dtype) == (False, np.int64)
    model.zero_grad()
    twin.zero_grad()
    tl.sum(twin(X)).backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in twin.parameters())
    with pytest.raises(TypeError, match="expected a Parameter or None"):
        twin.table = np.ones(2)


def test_a_shallow_copy_of_a_module_shares_its_parameters():
    model = Tied()
    twin = copy.copy(model)
    assert [id(p) for p in twin.parameters()] == [id(p) for p in model.parameters()]
    twin.table = Parameter(np.ones((2, 3), np.float32))
    assert model.table is model.head.weight is not twin.table


def test_a_module_that_keeps_a_result_says_what_to_do():
    model = nn.Linear(3, 3)
    model.last = model(X)
    with pytest.raises(RuntimeError, match=r"detach\(\)"):
        copy.deepcopy(model)
    model.last = model.last.detach()
    copy.deepcopy(model)


def test_a_pickle_from_when_nn_was_one_file_is_read():
    model = Tied()
    pickled = pickle.dumps([model, AdamW(model.parameters())], 2)
    for name in (b"layers", b"module"):
        assert b"ctensorlite.nn." + name in pickled
        pickled = pickled.replace(b"ctensorlite.nn." + name, b"ctensorlite.nn")
    twin, twins = pickle.loads(pickled)
    np.testing.assert_array_equal(twin(X).data, model(X).data)
    assert_bound(twins, twin.parameters())


# --- optimisers ---


def step(model, optimizer, n: int) -> None:
    """One of training, different for each n."""
    optimizer.zero_grad()
    with random.scope(1, step=n):
        tl.sum(model(X + n) ** 2.0).backward()
    clip_grad_norm_(optimizer.flat, 1.0)
    optimizer.lr = 0.1 / (n + 1)
    optimizer.step()


def train(model, optimizer, first: int, last: int) -> None:
    for n in range(first, last):
        step(model, optimizer, n)


def bits(model, optimizer) -> list[bytes]:
    flat = optimizer.flat
    moments = [getattr(optimizer, name) for name in optimizer.moments]
    arrays = [*model.state_dict().values(), flat.data, flat.grad, *moments]
    return [backend_of(a).to_numpy(a).tobytes() for a in arrays] + [optimizer.steps, optimizer.lr]


def make_optimizer(model):
    return AdamW(decay_groups(model.parameters(), 0.3), betas=(0.8, 0.9), eps=1e-6)


def assert_bound(optimizer, parameters) -> None:
    flat = optimizer if isinstance(optimizer, FlatBuffer) else optimizer.flat
    assert {id(p) for p in flat.parameters} == {id(p) for p in parameters}
    for p, data, grad in zip(flat.parameters, flat.data_views, flat.grad_views, strict=True):
        assert p.data is data
        assert p.grad is grad
        assert np.shares_memory(data, flat.data)
        assert np.shares_memory(grad, flat.grad)


def make_sgd(model):
    return SGD(model.parameters(), momentum=0.9, nesterov=True)


@deeply
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["model first", "optimiser first"])
@pytest.mark.parametrize("make", [make_optimizer, make_sgd])
def test_a_copied_pair_goes_on_to_the_bit_and_leaves_the_original_alone(make, duplicate, order):
    model = Tied()
    pair = model, optimizer = model, make(model)
    train(model, optimizer, 0, 3)
    copied = duplicate([pair[i] for i in order])
    twin, twins = copied[order[0]], copied[order[1]]
    before = bits(model, optimizer)
    assert bits(twin, twins) == before
    assert twins.flat.backend is optimizer.flat.backend
    assert twins.steps == 3
    assert_bound(twins, twin.parameters())
    assert_bound(optimizer, model.parameters())
    train(twin, twins, 3, 6)
    assert bits(model, optimizer) == before
    train(model, optimizer, 3, 6)
    assert bits(model, optimizer) == bits(twin, twins) != before


@deeply
def test_an_optimiser_copied_alone_trains_copies_of_its_parameters(duplicate):
    p = Parameter(np.ones(3, np.float32))
    optimizer = AdamW([p], lr=0.5, weight_decay=0.0)
    backward(p)
    twin = duplicate(optimizer)
    (q,) = twin.flat.parameters
    np.testing.assert_array_equal(q.grad, 3)
    twin.step()
    np.testing.assert_allclose(q.data, 0.5, rtol=1e-6)
    np.testing.assert_array_equal(p.data, 1)
    assert (optimizer.steps, twin.steps) == (0, 1)
    assert not optimizer.m.any()


@deeply
def test_a_subclass_of_the_optimiser_keeps_what_it_has(duplicate):
    optimizer = Optimizer([Parameter(np.ones(3, np.float32))], note=["n"], lr=0.5)
    twin = duplicate(optimizer)
    assert type(twin) is Optimizer
    assert (twin.note, twin.lr, twin.pieces) == (["n"], 0.5, optimizer.pieces)


@deeply
def test_a_flat_buffer_is_built_anew_over_copies(duplicate):
    parameters = [Parameter(np.full(n, n, np.float32)) for n in (1, 2, 3)]
    flat = FlatBuffer(parameters)
    flat.grad[...] = np.arange(6)
    twin = duplicate(flat)
    np.testing.assert_array_equal(twin.data, [1, 2, 2, 3, 3, 3])
    np.testing.assert_array_equal(twin.grad, np.arange(6))
    assert_bound(twin, twin.parameters)
    assert_bound(flat, parameters)
    assert not np.shares_memory(twin.data, flat.data)


def test_the_moments_of_a_copy_lie_in_memory_that_forked_processes_share(monkeypatch):
    """As the trainer's workers need them; an ordinary array each of them would have for itself."""
    made, backend = [], get_backend("numpy")
    shared_zeros = type(backend).shared_zeros

    def note(self, *args):
        made.append(shared_zeros(self, *args))
        return made[-1]

    monkeypatch.setattr(type(backend), "shared_zeros", note)
    for duplicate in DEEP.values():
        twin = duplicate(AdamW([Parameter(np.ones(3, np.float32))]))
        for flat in (twin.flat.data, twin.flat.grad, twin.m, twin.v):
            assert any(flat is array for array in made)


@pytest.mark.parametrize("make", [FlatBuffer, AdamW, SGD])
def test_a_shallow_copy_has_the_same_parts_and_breaks_nothing(make):
    p = Parameter(np.ones(3, np.float32))
    original = make([p])
    twin = copy.copy(original)
    assert type(twin) is make
    assert vars(twin) == vars(original)
    assert_bound(original, [p])
    assert_bound(twin, [p])


# --- the models ---

SHAPE = {"vocab_size": 11, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 16, "dropout": 0.2}
MODELS = {
    **{name: lambda name=name: GPT(GPTConfig(**SHAPE, activation=name), seed=1) for name in _ACTIVATIONS},
    "untied": lambda: GPT(GPTConfig(**SHAPE, tie_weights=False), seed=1),
    "bigram": lambda: BigramLanguageModel(11, seed=1),
}
IDS = np.random.default_rng(0).integers(0, 11, (4, 9))


def train_model(model, optimizer, first: int, last: int) -> None:
    for n in range(first, last):
        optimizer.zero_grad()
        with random.scope(1, step=n):
            model(IDS[:, :-1], IDS[:, 1:])[1].backward()
        optimizer.step()


@pytest.mark.parametrize("duplicate", [DEEP["deepcopy"], DEEP["pickle 5"]], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_copied_model_trains_as_the_original_to_the_bit(make, duplicate):
    model = make()
    optimizer = make_optimizer(model)
    train_model(model, optimizer, 0, 2)
    twin, twins = duplicate((model, optimizer))
    assert twin.config == model.config if isinstance(model, GPT) else twin.vocab_size == 11
    assert len(twin.parameters()) == len(model.parameters())
    for pair in ((twin, twins), (model, optimizer)):
        train_model(*pair, 2, 5)
    assert bits(twin, twins) == bits(model, optimizer)
    np.testing.assert_array_equal(twin.generate(IDS[:, :3], 5), model.generate(IDS[:, :3], 5))

    alone, other = duplicate(make()), make()  # without an optimiser yet
    pairs = [(m, make_optimizer(m)) for m in (alone, other)]
    for pair in pairs:
        train_model(*pair, 0, 2)
    assert bits(*pairs[0]) == bits(*pairs[1])


# --- on a device ---


@deeply
def test_copies_stay_on_the_device(cuda, duplicate):
    assert duplicate(cuda) is cuda
    model = Tied().to(cuda.name)
    optimizer = make_optimizer(model)
    x = cuda.asarray(X)
    for n in range(2):
        device_step(model, optimizer, x, n)
    twin, twins = duplicate((model, optimizer))
    assert twins.flat.backend is cuda
    assert twin.table is twin.head.weight
    for flat in (*(p.data for p in twin.parameters()), *(p.grad for p in twin.parameters()), twins.m, twins.v):
        assert backend_of(flat) is cuda
    assert bits(twin, twins) == bits(model, optimizer)
    before = bits(model, optimizer)
    device_step(twin, twins, x, 2)
    assert bits(model, optimizer) == before
    device_step(model, optimizer, x, 2)
    assert bits(model, optimizer) == bits(twin, twins) != before


def device_step(model, optimizer, x, n: int) -> None:
    optimizer.zero_grad()
    tl.sum(model(x + n)).backward()
    optimizer.step()


def test_a_shallow_copy_on_the_device_shares_its_array(cuda):
    x = Parameter(cuda.asarray(np.ones(3, np.float32)))
    twin = copy.copy(x)
    assert twin.data is x.data
    backward(twin)
    assert x.grad is None
    np.testing.assert_array_equal(cuda.to_numpy(twin.grad), [3, 3, 3])


def test_a_pickled_tensor_loads_the_backend_of_its_array(cuda, monkeypatch):
    """In a process that has not asked for it yet."""
    pickled = pickle.dumps(Parameter(cuda.asarray(np.ones(3, np.float32))))
    for registry in ("_by_name", "_by_type"):
        known = dict(getattr(tl.backends, registry))
        known = {key: value for key, value in known.items() if value is not cuda}
        monkeypatch.setattr(tl.backends, registry, known)
    p = pickle.loads(pickled)
    backward(p)
    assert backend_of(p.data).name == cuda.name
