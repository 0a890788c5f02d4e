"""Modules, the optimiser, schedules and random streams: against PyTorch, NumPy's Philox and hand-made numbers."""

import itertools
import math
from collections import ChainMap, UserDict, UserList, defaultdict, deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType

import numpy as np
import pytest
import torch
from tolerances import assert_close

import tensorlite as tl
from tensorlite import Tensor, nn, random
from tensorlite.nn import Module, Parameter
from tensorlite.optim import AdamW, FlatBuffer, clip_grad_norm_, decay_groups, learning_rate

FLOATS = (np.float32, np.float64)


class Block(Module):
    def __init__(self):
        self.ln = nn.LayerNorm(4)
        self.scale = Parameter(np.ones(4, np.float32))
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.ln(x) * self.scale)


class Model(Module):
    """A table tied to the output, as in a GPT, and two blocks in a list."""

    def __init__(self):
        self.wte = nn.Embedding(6, 4)
        self.h = [Block(), Block()]
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.wte.weight
        self.note = ["not a module"]

    def forward(self, ids):
        x = self.wte(ids)
        for block in self.h:
            x = block(x)
        return self.head(x)


BLOCK = ["scale", "ln.weight", "ln.bias"]
NAMES = ["wte.weight", *(f"h.{i}.{name}" for i in range(2) for name in BLOCK), "head.weight"]
IDS = np.array([[0, 1, 2], [5, 5, 3]])


# --- modules ---


def test_parameters_are_found_by_name_and_counted_once():
    model = Model()
    assert list(model.named_parameters()) == NAMES
    assert model.named_parameters()["head.weight"] is model.wte.weight
    assert len(model.parameters()) == 7
    assert model.num_parameters() == 24 + 2 * 12
    assert [name for name, _ in model.children()] == ["wte", "h.0", "h.1", "head"]


def test_train_and_eval_reach_every_module():
    model, x = Model(), Tensor(np.ones((64, 4), np.float32))
    assert model.eval() is model
    assert not any(m.training for m in model.modules())
    assert model.h[0].drop(x) is x
    assert model.train() is model
    assert all(m.training for m in model.modules())
    assert 0 < (model.h[0].drop(x).data == 0).mean() < 1


def test_zero_grad_forgets():
    model = Model()
    tl.cross_entropy(model(IDS), IDS).backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_state_dict_round_trip():
    tl.manual_seed(1)
    source, target = Model(), Model()
    state = source.state_dict()
    assert list(state) == NAMES
    state["wte.weight"][0, 0] += 1  # a copy, and so no longer equal to what it is tied to
    assert state["wte.weight"][0, 0] != source.wte.weight.data[0, 0]
    target.load_state_dict(source.state_dict())
    for name, array in target.state_dict().items():
        np.testing.assert_array_equal(array, source.state_dict()[name])
    assert target.head.weight is target.wte.weight


def test_a_tied_parameter_loads_by_one_of_its_names_and_from_torch():
    model, state = Model(), Model().state_dict()
    del state["wte.weight"]
    model.load_state_dict({name: torch.tensor(array, dtype=torch.float64) for name, array in state.items()})
    np.testing.assert_array_equal(model.wte.weight.data, state["head.weight"])
    assert model.wte.weight.dtype == np.float32


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_the_prefix_of_a_wrapped_torch_module_is_left_out(prefix):
    model, state = Model(), Model().state_dict()
    model.load_state_dict({prefix + name: array + 1 for name, array in state.items()})
    np.testing.assert_array_equal(model.h[0].scale.data, state["h.0.scale"] + 1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr": -0.1}, "lr must be 0 or more, and finite, got -0.1"),
        ({"lr": math.nan}, "lr must be 0 or more, and finite, got nan"),
        ({"lr": math.inf}, "lr must be 0 or more, and finite, got inf"),
        ({"eps": -1.0}, "eps must be 0 or more, and finite, got -1.0"),
        ({"weight_decay": -1.0}, "weight_decay must be 0 or more, and finite, got -1.0"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers from 0 to less than 1, got \(0.9, 1.0\)"),
        ({"betas": (1.5, 0.9)}, "betas must be two numbers"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
    ],
)
def test_adamw_refuses_settings_that_cannot_work(settings, said):
    p = nn.Parameter(np.ones(2, np.float32))
    with pytest.raises(ValueError, match=f"^AdamW: {said}"):
        AdamW([p], **settings)
    if "weight_decay" in settings:
        with pytest.raises(ValueError, match=f"^AdamW: {said}"):
            AdamW([{"params": [p]} | settings])
    assert p.grad is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"h.0.scale": None}, "^load_state_dict: missing h.0.scale$"),
        ({"wte.weight": None, "head.weight": None}, "missing wte.weight; missing head.weight"),
        ({"bias": np.ones(1)}, "unknown bias"),
        ({"h.0.scale": np.ones(5)}, r"h.0.scale has shape \(5,\), expected \(4,\)"),
        ({"wte.weight": np.ones((6, 4))}, "wte.weight and head.weight are tied in this model but differ"),
        ({f"x{i}": np.ones(1) for i in range(7)}, "unknown x4 and 2 more"),
        (
            dict.fromkeys(NAMES) | {"mine": np.ones(1)},
            "^load_state_dict: missing wte.weight; unknown mine; missing h.0",
        ),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, said):
    model = Model()
    before = model.state_dict()
    state = {name: array + 1 for name, array in before.items()} | change
    with pytest.raises(ValueError, match=said):
        model.load_state_dict({name: array for name, array in state.items() if array is not None})
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


def torch_layer(layer, name, **options):
    """PyTorch's layer of the same sizes with the same weights."""
    other = getattr(torch.nn, name)(*layer.weight.shape[::-1] if name == "Linear" else layer.weight.shape, **options)
    other.load_state_dict({k: torch.from_numpy(v) for k, v in layer.state_dict().items()})
    return other


@pytest.mark.parametrize(
    ("name", "make", "options"),
    [
        ("Linear", lambda: nn.Linear(4, 3), {}),
        ("Linear", lambda: nn.Linear(4, 3, bias=False, std=0.02), {"bias": False}),
        ("LayerNorm", lambda: nn.LayerNorm(4), {}),
        ("LayerNorm", lambda: nn.LayerNorm(4, bias=False, eps=0.1), {"bias": False, "eps": 0.1}),
        ("Embedding", lambda: nn.Embedding(6, 4), {}),
    ],
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_layers_against_torch(name, make, options, dtype):
    layer = make().to(dtype=dtype)
    other = torch_layer(layer, name, dtype=torch.float64 if dtype == np.float64 else torch.float32, **options)
    x = IDS if name == "Embedding" else np.random.default_rng(0).standard_normal((5, 4)).astype(dtype)
    y, expected = layer(x), other(torch.from_numpy(x))
    gy = np.random.default_rng(1).standard_normal(y.shape).astype(dtype)
    y.backward(gy)
    expected.backward(torch.from_numpy(gy))
    assert_close(y.data, expected.detach().numpy())
    for key, p in other.named_parameters():
        assert_close(layer.named_parameters()[key].grad, p.grad.numpy(), key)


def test_initial_values():
    layer = nn.Linear(400, 300)
    assert layer.weight.dtype == layer.bias.dtype == np.float32
    assert 0.049 < np.abs(layer.weight.data).max() <= 0.05
    assert layer.weight.data.std() == pytest.approx(0.05 / math.sqrt(3), rel=0.01)
    gpt = nn.Linear(400, 300, std=0.02)
    assert gpt.weight.data.std() == pytest.approx(0.02, rel=0.01)
    assert not gpt.bias.data.any()
    tl.manual_seed(0)
    np.testing.assert_array_equal(nn.Linear(400, 300).weight.data, layer.weight.data)
    assert (nn.Linear(400, 300).weight.data != layer.weight.data).any()


def test_to_keeps_ties_and_gives_gradients_of_the_new_dtype():
    model = Model()
    assert model.to(dtype=np.float64) is model
    assert {p.dtype for p in model.parameters()} == {np.dtype(np.float64)}
    tl.cross_entropy(model(IDS), IDS).backward()
    assert {p.grad.dtype for p in model.parameters()} == {np.dtype(np.float64)}
    assert model.head.weight is model.wte.weight


def test_a_module_without_forward_says_so():
    with pytest.raises(NotImplementedError, match="Module defines no forward"):
        Module()(1)


# --- what is in containers ---


def parameter() -> Parameter:
    return Parameter(np.ones(2, np.float32))


def linear() -> nn.Linear:
    return nn.Linear(2, 2, bias=False)


class Holder(Module):
    def __init__(self, **attributes):
        for name, value in attributes.items():
            setattr(self, name, value)


Pair = namedtuple("Pair", ["left", "right"])
LOOP = [linear()]
LOOP.append(LOOP)

# What an attribute `x` holds, the names of the Parameters in it, and of those in its Modules.
FOUND = {
    "a list of Parameters": (lambda: [parameter(), parameter()], ["x.0", "x.1"], []),
    "a list of Modules": (lambda: [linear(), linear()], [], ["x.0.weight", "x.1.weight"]),
    "a tuple": (lambda: (linear(), None, parameter()), ["x.2"], ["x.0.weight"]),
    "a dict": (lambda: {"a": linear(), "b": parameter(), 3: parameter()}, ["x.b", "x.3"], ["x.a.weight"]),
    "a subclass of dict": (lambda: defaultdict(list, a=[parameter()]), ["x.a.0"], []),
    "a named tuple": (lambda: Pair(linear(), parameter()), ["x.1"], ["x.0.weight"]),
    "lists in a list": (lambda: [[linear()], [], [linear(), parameter()]], ["x.2.1"], ["x.0.0.weight", "x.2.0.weight"]),
    "a tuple in a dict in a list": (lambda: [{"a": (linear(), parameter())}], ["x.0.a.1"], ["x.0.a.0.weight"]),
    "a module in a module's dict": (lambda: Holder(y={"k": Holder(z=(parameter(),))}), [], ["x.y.k.z.0"]),
    "a list that contains itself": (lambda: LOOP, [], ["x.0.weight"]),
    "beside other things": (lambda: [1, "a", None, np.ones(2), Tensor(1.0), {2: 3}, parameter()], ["x.6"], []),
    "nothing": (lambda: [{}, (), {1, 2}, deque("ab"), np.array([None, 1], object)], [], []),
}


@pytest.mark.parametrize(("make", "own", "in_modules"), FOUND.values(), ids=FOUND)
def test_parameters_in_containers_are_found_and_trained(make, own, in_modules):
    model = Holder(first=linear(), x=make(), own=parameter())
    named = model.named_parameters()
    assert list(named) == [*own, "own", "first.weight", *in_modules]
    assert all(a is b for a, b in zip(model.parameters(), named.values(), strict=True))

    model.to(dtype=np.float64)
    assert {p.dtype for p in named.values()} == {np.dtype(np.float64)}
    state = model.state_dict()
    assert list(state) == list(named)
    model.load_state_dict({name: array * 0 + i for i, (name, array) in enumerate(state.items())})
    for i, p in enumerate(named.values()):
        np.testing.assert_array_equal(p.data, i)

    optimizer = AdamW(model.parameters(), lr=0.5, weight_decay=0.0)
    for p in named.values():
        tl.sum(p * 2.0).backward()
    optimizer.step()
    for i, p in enumerate(named.values()):
        np.testing.assert_allclose(p.data, i - 0.5, rtol=1e-6, atol=1e-6)
    model.zero_grad()
    assert all(p.grad is None for p in named.values())


def test_children_and_modules_are_found_in_containers():
    model = Holder(a=linear(), x=[{"k": (linear(),)}, Holder(y=[linear()])], b=linear())
    assert [name for name, _ in model.children()] == ["a", "x.0.k.0", "x.1", "b"]
    assert [type(m) for m in model.modules()] == [Holder, nn.Linear, nn.Linear, Holder, nn.Linear, nn.Linear]
    shared = Holder(a=model.a, b=model.a)
    assert list(shared.named_parameters()) == ["a.weight", "b.weight"]
    assert len(list(shared.modules())) == 2


def object_array(item):
    array = np.empty(1, object)
    array[0] = item
    return array


HIDDEN = {
    "set": lambda x: {x},
    "frozenset": lambda x: frozenset([x]),
    "deque": lambda x: deque([x]),
    "dict_values": lambda x: {"a": x}.values(),
    "dict_items": lambda x: {"a": x}.items(),
    "dict_keys": lambda x: {x: "a"}.keys(),
    "the keys of a dict": lambda x: {x: 0.1},
    "generator": lambda x: (y for y in [x]),
    "list_iterator": lambda x: iter([x]),
    "map": lambda x: map(type(x), [x]),
    "zip": lambda x: zip([x], [1], strict=True),
    "chain": lambda x: itertools.chain([x]),
    "ndarray": object_array,
    "UserList": lambda x: UserList([x]),
    "UserDict": lambda x: UserDict(a=x),
    "mappingproxy": lambda x: MappingProxyType({"a": x}),
    "ChainMap": lambda x: ChainMap({"a": x}),
}


@pytest.mark.parametrize("within", [lambda x: x, lambda x: [x], lambda x: {"k": (1, x)}], ids=["bare", "list", "deep"])
@pytest.mark.parametrize("item", [parameter, linear, lambda: (linear(),)], ids=["Parameter", "Module", "tuple"])
@pytest.mark.parametrize(("kind", "make"), HIDDEN.items(), ids=HIDDEN)
def test_parameters_where_they_would_not_be_found_are_refused(kind, make, item, within):
    value = within(make(item()))
    place = kind if kind.startswith("the") else f"a {kind}"
    said = rf"^x[.\w]*: parameters and modules are not found in {place}; use a list, tuple or dict$"
    model = Holder()
    with pytest.raises(TypeError, match=said):
        model.x = value
    assert not hasattr(model, "x")
    model.x = late = []  # and if they are put there later, when they are looked for
    late.append(value)
    for look in (model.parameters, model.state_dict, model.eval, model.zero_grad, lambda: model.to(dtype=np.float64)):
        with pytest.raises(TypeError, match="are not found in"):
            look()


@pytest.mark.parametrize(
    "value", [set("ab"), deque([1]), {1: 2}.values(), itertools.count(), np.array([{}, []], object), UserDict(a=1)]
)
def test_such_containers_of_other_things_are_fine(value):
    model = Holder(x=value, y=parameter())
    assert model.x is value
    assert list(model.named_parameters()) == ["y"]


def test_a_file_is_not_looked_into(tmp_path):
    with (tmp_path / "log").open("w") as file:
        assert not Holder(log=file, lines=[file]).parameters()


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: {1: parameter(), "1": parameter()}, "1"),
        (lambda: {1: linear(), "1": nn.LayerNorm(2)}, "1"),
        (lambda: {"a.b": parameter(), "a": {"b": parameter()}}, "a.b"),
        (lambda: [{"0.a": linear(), 0: {"a": linear()}}], "0.0.a"),
    ],
)
def test_names_that_collide_are_refused(make, name):
    said = "two parameters or modules have the name {}; rename one of them"
    with pytest.raises(ValueError, match=said.format(f"x.{name}")):
        Holder(x=make())
    model = Holder(x={})
    model.x["late"] = make()
    with pytest.raises(ValueError, match=said.format(f"x.late.{name}")):
        model.parameters()


def test_names_that_collide_across_modules_are_refused():
    model = Holder(x=Holder(y=parameter()))
    setattr(model, "x.y", parameter())
    for look in (model.parameters, model.named_parameters, model.state_dict):
        with pytest.raises(ValueError, match="two parameters or modules have the name x.y; rename one of them"):
            look()


@pytest.mark.parametrize("key", [None, (0, 1), 1.5, b"a"])
def test_keys_that_are_no_names_are_refused(key):
    with pytest.raises(TypeError, match=f"^x: expected keys of type str or int, got {type(key).__name__}$"):
        Holder(x={key: linear()})
    assert not Holder(x={key: 1}).parameters()


def test_parameters_of_the_class_are_refused():
    """They would be one for all its instances, and not found."""
    for value in (parameter(), linear(), [linear()], {"a": parameter()}):
        with pytest.raises(TypeError, match=r"^Model.table: parameters are not found in the class.*in __init__$"):
            type("Model", (Module,), {"table": value})
    with pytest.raises(TypeError, match=r"^Model.table: parameters are not found in .*__slots__"):
        type("Model", (Module,), {"__slots__": ("table",)})


OTHERS = {"ndarray": np.ones((2, 2)), "Tensor": Tensor(np.ones((2, 2))), "list": [1.0], "float": 0.5}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_parameter_or_module_is_not_replaced_by_something_else(kind):
    model = Holder(layer=linear())
    layer, weight = model.layer, model.layer.weight
    with pytest.raises(TypeError, match=f"^Linear.weight: expected a Parameter or None, got {kind}; .*load_state_dict"):
        layer.weight = OTHERS[kind]
    with pytest.raises(TypeError, match=f"^Holder.layer: expected a Module or None, got {kind}$"):
        model.layer = OTHERS[kind]
    assert model.layer is layer
    assert layer.weight is weight


def test_a_parameter_or_module_is_replaced_by_another_or_none():
    model = Holder(layer=linear(), table=parameter())
    model.table = new = parameter()
    model.layer = Holder(scale=parameter())
    assert list(model.named_parameters()) == ["table", "layer.scale"]
    assert model.parameters()[0] is new
    with pytest.raises(TypeError, match="Linear"):
        model.table = linear()
    model.layer = model.table = None
    assert not model.parameters()
    model.table = parameter()
    del model.table
    assert not model.parameters()


def test_modules_may_refer_to_each_other():
    child, other = Holder(scale=parameter()), Holder(scale=parameter())
    model = Holder(h=[child, other], own=parameter())
    child.parent = other.parent = model
    model.me = model
    assert list(model.named_parameters()) == ["own", "h.0.scale", "h.1.scale"]
    assert len(model.parameters()) == 3
    assert list(model.modules()) == [model, child, other]
    assert list(child.named_parameters()) == ["scale", "parent.own", "parent.h.1.scale"]
    model.eval()
    assert not other.training
    state = model.state_dict()
    model.load_state_dict(state)
    model.to(dtype=np.float64)
    assert child.scale.dtype == np.float64


@pytest.mark.parametrize("dtype", [int, np.float16, "int32", bool, complex, "longdouble", object, str])
def test_a_dtype_that_parameters_cannot_have_changes_nothing(dtype):
    model = Model()
    tl.cross_entropy(model(IDS), IDS).backward()
    before = [(p.data, p.grad, p.node) for p in model.parameters()]
    with pytest.raises(TypeError, match="^to: expected a floating-point dtype, got "):
        model.to(dtype=dtype)
    for p, (data, grad, node) in zip(model.parameters(), before, strict=True):
        assert p.data is data
        assert p.grad is grad
        assert p.node is node


def test_a_move_that_fails_half_way_changes_nothing(monkeypatch):
    model, left = Model(), [3]

    def asarray(self, data, dtype=None):
        if not left[0]:
            raise MemoryError
        left[0] -= 1
        return np.asarray(data, dtype)

    monkeypatch.setattr(type(tl.get_backend("numpy")), "asarray", asarray)
    with pytest.raises(MemoryError):
        model.to(dtype=np.float64)
    assert {p.dtype for p in model.parameters()} == {np.dtype(np.float32)}


def test_a_move_leaves_what_is_frozen_frozen():
    layer = nn.Linear(2, 3)
    layer.weight.requires_grad = False
    layer.to(dtype=np.float64)
    assert [p.requires_grad for p in layer.parameters()] == [False, True]


# --- the optimiser ---


def parameters(dtype, seed=0):
    rng = np.random.default_rng(seed)
    return [Parameter(rng.standard_normal(shape).astype(dtype)) for shape in ((3, 4), (4,), (), (2, 2), (3,))]


def set_gradients(ours, theirs, rng, scale=1.0):
    for p, q in zip(ours, theirs, strict=True):
        g = (rng.standard_normal(p.shape) * scale).astype(p.dtype)
        p.grad, q.grad = np.array(g), torch.tensor(g)


def as_torch(parameters):
    return [torch.nn.Parameter(torch.tensor(p.data)) for p in parameters]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", [{}, {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3}])
def test_adamw_against_torch(dtype, options):
    ours = parameters(dtype)
    theirs = as_torch(ours)
    optimizer, reference = (
        make([{"params": p[:2]}, {"params": p[2:], "weight_decay": 0.0}], **options)
        for make, p in ((AdamW, ours), (torch.optim.AdamW, theirs))
    )
    rng = np.random.default_rng(1)
    for step in range(10):
        set_gradients(ours, theirs, rng)
        optimizer.lr = 1e-2 / (step + 1)
        for group in reference.param_groups:
            group["lr"] = optimizer.lr
        optimizer.step()
        reference.step()
        for p, q in zip(ours, theirs, strict=True):
            assert_close(p.data, q.detach().numpy(), f"step {step}")
    assert optimizer.steps == 10


def test_decay_groups_are_by_the_number_of_axes():
    p = parameters(np.float32)
    decayed, plain = decay_groups(p, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert [q.shape for q in decayed["params"]] == [(3, 4), (2, 2)]
    assert [q.shape for q in plain["params"]] == [(4,), (), (3,)]
    assert AdamW(decay_groups(p[:1], 0.1)).flat.data.size == 12  # also where a group is empty


def test_values_and_gradients_are_views_of_flat_arrays():
    model = Model()
    expected = [p.data.copy() for p in model.parameters()]
    optimizer = AdamW(model.parameters(), lr=0.1)
    flat = optimizer.flat
    for p, before in zip(model.parameters(), expected, strict=True):
        assert np.shares_memory(p.data, flat.data)
        assert np.shares_memory(p.grad, flat.grad)
        np.testing.assert_array_equal(p.data, before)
    tl.cross_entropy(model(IDS), IDS).backward()
    np.testing.assert_array_equal(np.concatenate([p.grad.ravel() for p in model.parameters()]), flat.grad)
    assert flat.grad.any()
    optimizer.zero_grad()
    assert not flat.grad.any()


def test_gradients_from_anywhere_are_taken_over():
    model = Model().eval()
    optimizer = AdamW(model.parameters(), weight_decay=0.0)
    tl.cross_entropy(model(IDS), IDS).backward()
    expected = optimizer.flat.grad.copy()
    model.zero_grad()
    tl.cross_entropy(model(IDS), IDS).backward()
    optimizer.step()
    np.testing.assert_array_equal(optimizer.flat.grad, expected)
    a, b, *_ = model.parameters()
    a.grad, b.grad = np.full_like(a.data, 2.0), None
    optimizer.flat.bind_gradients()
    np.testing.assert_array_equal(optimizer.flat.grad[: a.size + b.size], [2.0] * a.size + [0.0] * b.size)
    assert np.shares_memory(a.grad, optimizer.flat.grad)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: AdamW([]), "there are no parameters"),
        (lambda p: AdamW([p, p]), "given twice"),
        (lambda p: AdamW([{"params": [p]}, {"params": [p]}]), "given twice"),
        (lambda p: AdamW([p, Parameter(np.ones(2))]), "must share one dtype, got float32, float64"),
        (lambda p: AdamW([p * 2.0]), "an op's result receives no gradient"),
        (lambda p: AdamW([*p]), "an op's result receives no gradient"),
        (lambda p: AdamW([p, Tensor(np.ones(2, np.float32))]), "does not require grad receives no gradient"),
        (lambda p: AdamW([{"params": [Tensor([1.0])]}]), "does not require grad receives no gradient.*; leave it out"),
    ],
)
def test_parameters_that_do_not_fit_one_buffer(make, said):
    with pytest.raises(ValueError, match=said):
        make(Parameter(np.ones(2, np.float32)))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("scale", "limit"), [(1.0, 1.0), (1e-3, 1.0), (100.0, 0.5), (0.0, 1.0), (1.0, 0)])
def test_clipping_against_torch(scale, limit, dtype):
    ours = parameters(dtype)
    theirs = as_torch(ours)
    set_gradients(ours, theirs, np.random.default_rng(1), scale)
    norm = clip_grad_norm_(FlatBuffer(ours), limit)
    assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, limit or math.inf).numpy())
    for p, q in zip(ours, theirs, strict=True):
        assert_close(p.grad, q.grad.numpy())


# nanoGPT's formula by hand: (step + 1) / (warmup + 1) of the peak in the warm-up, then the minimum and
# (1 + cos(pi * (step - warmup) / (decay - warmup))) / 2 of what the peak is above it.
@pytest.mark.parametrize(
    ("step", "warmup", "decay", "minimum", "expected"),
    [
        (0, 4, 12, 0, 2 / 10), (3, 4, 12, 0, 8 / 10), (4, 4, 12, 0, 1), (6, 4, 12, 0, 0.5 + 0.5 * math.sqrt(0.5)),
        (8, 4, 12, 0, 0.5), (10, 4, 12, 0, 0.5 - 0.5 * math.sqrt(0.5)), (12, 4, 12, 0, 0), (99, 4, 12, 0, 0),
        (0, 4, 12, 0.1, 0.2), (4, 4, 12, 0.1, 1), (8, 4, 12, 0.1, 0.55), (12, 4, 12, 0.1, 0.1), (99, 4, 12, 0.1, 0.1),
        (0, 0, 0, 0, 1), (99, 0, 0, 0.1, 1), (0, 1, 0, 0, 0.5), (99, 1, 0, 0, 1), (0, 0, 10, 0, 1),
        (5, 0, 10, 0, 0.5), (4, 5, 5, 0.1, 5 / 6), (5, 5, 5, 0.1, 0.1),
    ],
)  # fmt: skip
def test_learning_rate(step, warmup, decay, minimum, expected):
    assert learning_rate(step, 3.0, warmup, decay, 3.0 * minimum) == pytest.approx(3.0 * expected)


# --- random streams ---


def philox4x64(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10 as in the paper (Salmon et al. 2011, section 3.3), in Python's integers."""
    low = 2**64 - 1
    for _ in range(10):
        p, q = counter[0] * 0xD2E7470EE14C6C93, counter[2] * 0xCA5A826395121157
        counter = [(q >> 64) ^ counter[1] ^ key[0], q & low, (p >> 64) ^ counter[3] ^ key[1], p & low]
        key = [(key[0] + 0x9E3779B97F4A7C15) & low, (key[1] + 0xBB67AE8584CAA73B) & low]
    return counter


def test_the_words_are_philox():
    """The published answer for zeros, and the mapping of a place to counter and key."""
    answer = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert philox4x64([0, 0, 0, 0], [0, 0]) == answer
    seed, stream, step, call, block = 2**62 + 11, 2, 5, 7, 3
    expected = philox4x64([block + 1, call, step, 0], [seed, stream])  # NumPy counts up before it draws
    assert random.philox(seed, stream, step, call, block).random_raw(4).tolist() == expected
    words = np.array(expected, "<u8").view("<u2")
    np.testing.assert_array_equal(random.bits16(random.Place(seed, stream, step, call, 16 * block), 16), words)


@pytest.mark.parametrize(("start", "count"), [(0, 1), (1, 16), (15, 2), (16, 16), (37, 60), (63, 1), (99, 1), (5, 0)])
def test_bits_at_an_offset_are_a_slice_of_the_whole(start, count):
    whole = random.bits16(random.Place(1, random.DROPOUT, 2, 3, 0), 100)
    part = random.bits16(random.Place(1, random.DROPOUT, 2, 3, start), count)
    assert part.dtype == np.uint16
    np.testing.assert_array_equal(part, whole[start : start + count])


def mask(x, **scope):
    with random.scope(**{"seed": 0} | scope):
        return tl.dropout(x, 0.5).numpy()


def test_micro_batches_see_the_mask_of_the_whole_batch(backend):
    x = Tensor(backend.asarray(np.ones((8, 3, 7), np.float32)))
    whole = mask(x)
    for start, stop in ((0, 8), (0, 3), (3, 4), (5, 8)):
        np.testing.assert_array_equal(mask(x[start:stop], first_row=start), whole[start:stop])


def test_masks_differ_between_seeds_steps_and_calls():
    x = Tensor(np.ones((8, 8), np.float32))
    with random.scope(0):
        calls = [x.dropout(0.5).numpy() for _ in range(2)]
    masks = [*calls, mask(x, seed=1), mask(x, step=1)]
    np.testing.assert_array_equal(calls[0], mask(x))
    assert len({m.tobytes() for m in masks}) == len(masks)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_right_share(p):
    n = 100_000
    y = tl.dropout(np.ones(n), p).numpy()
    assert abs((y != 0).mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n)
    assert y.max() == pytest.approx(1 / (1 - p), rel=2**-16 / (1 - p))  # p is rounded to a multiple of 2**-16


def test_manual_seed_repeats():
    x = Tensor(np.ones(64, np.float32))
    tl.manual_seed(3)
    first, second = (x.dropout(0.5).numpy() for _ in range(2))
    tl.manual_seed(3)
    np.testing.assert_array_equal(x.dropout(0.5).numpy(), first)
    np.testing.assert_array_equal(x.dropout(0.5).numpy(), second)
    assert (first != second).any()


def test_scopes_nest_and_survive_an_exception():
    default = random.current()
    with random.scope(1) as outer:
        x = Tensor(np.ones(4))
        x.dropout()
        with pytest.raises(KeyError), random.scope(2):
            raise KeyError
        assert random.current() is outer
        assert outer.calls == 1
    assert random.current() is default


def test_a_scope_holds_for_its_thread_only():
    x = Tensor(np.ones(64))
    with random.scope(1) as scope, ThreadPoolExecutor(1) as pool:
        assert pool.submit(random.current).result() is not scope
        np.testing.assert_array_equal(pool.submit(mask, x, seed=5).result(), mask(x, seed=5))


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_philox_cannot_take_is_refused(seed):
    with pytest.raises(ValueError, match=f"seed must be from 0 to 2\\*\\*63 - 1, got {seed}"):
        tl.manual_seed(seed)


@pytest.mark.parametrize("wrap", [list, tuple, iter])
def test_groups_take_any_iterable(wrap):
    p = nn.Parameter(np.ones(3, np.float32))
    p.grad = np.ones(3, np.float32)
    AdamW([{"params": wrap([p]), "weight_decay": 0.0}], lr=0.5).step()
    np.testing.assert_allclose(p.data, 0.5, rtol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda model: (p for p in model.parameters()),
        lambda model: model.named_parameters().values(),
        lambda model: tuple(model.parameters()),
        lambda model: ({"params": (p for p in [q])} for q in model.parameters()),
        lambda model: decay_groups((p for p in model.parameters()), 0.0),
        lambda model: [Tensor(p.data, requires_grad=True) for p in model.parameters()],
    ],
)
def test_every_parameter_is_trained_whatever_it_is_given_in(make):
    model = nn.Linear(3, 2)
    optimizer = AdamW(make(model), lr=0.5, weight_decay=0.0)
    assert optimizer.flat.data.size == 8
    before = optimizer.flat.data.copy()
    for p in optimizer.flat.parameters:
        tl.sum(p).backward()
    optimizer.step()
    np.testing.assert_allclose(optimizer.flat.data, before - 0.5, rtol=1e-5)


ITERABLE = r"^expected a list of Parameters, as model.parameters\(\) gives, got a {}$"
GROUPS = "^AdamW: expected a list of Parameters, or one of groups that all have params$"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda model: AdamW(model), ITERABLE.format("Linear")),
        (lambda model: AdamW(model.weight), ITERABLE.format("Parameter")),
        (lambda model: AdamW(model.named_parameters()), ITERABLE.format("dict")),
        (lambda model: AdamW({"params": model.parameters()}), ITERABLE.format("dict")),
        (lambda model: AdamW(set(model.parameters())), ITERABLE.format("set")),
        (lambda model: AdamW([{"params": model.weight}]), ITERABLE.format("Parameter")),
        (lambda model: AdamW([{"params": model}]), ITERABLE.format("Linear")),
        (lambda model: FlatBuffer(model), ITERABLE.format("Linear")),
        (lambda model: decay_groups(model, 0.1), ITERABLE.format("Linear")),
        (lambda model: decay_groups(model.weight, 0.1), ITERABLE.format("Parameter")),
        (lambda model: AdamW([model.weight, {"params": [model.bias]}]), GROUPS),
        (lambda model: AdamW([{"params": [model.bias]}, model.weight]), GROUPS),
        (lambda model: AdamW([{"weight_decay": 0.1}]), GROUPS),
        (lambda model: AdamW(["weight"]), "^FlatBuffer: expected Parameters, got a str$"),
        (lambda model: AdamW([model]), "^FlatBuffer: expected Parameters, got a Linear$"),
        (lambda model: AdamW([model.weight.data]), "^FlatBuffer: expected Parameters, got a ndarray$"),
    ],
)
def test_what_is_no_list_of_parameters_is_refused(make, said):
    model = nn.Linear(3, 2)
    before = model.weight.data
    with pytest.raises(TypeError, match=said):
        make(model)
    assert model.weight.data is before


def test_group_keys_that_would_be_ignored_are_refused():
    with pytest.raises(ValueError, match="a group sets params and weight_decay only, got lr"):
        AdamW([{"params": [nn.Parameter(np.ones(3))], "lr": 0.1}])


def test_parameters_moved_away_from_their_buffer_are_noticed():
    layer = nn.Linear(2, 3)
    optimizer = AdamW(layer.parameters())
    layer.to(dtype=np.float64)
    with pytest.raises(RuntimeError, match=r"make the optimiser after Module\.to"):
        optimizer.step()
