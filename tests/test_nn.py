"""Modules: how parameters are found, named, moved and loaded, and the layers, against PyTorch."""

import itertools
import math
from collections import ChainMap, UserDict, UserList, defaultdict, deque, namedtuple
from types import MappingProxyType

import numpy as np
import pytest
import torch
from tolerances import assert_close

import tensorlite as tl
from tensorlite import Tensor, nn
from tensorlite.nn import Module, Parameter
from tensorlite.optim import AdamW

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
    assert [*dict(model.named_parameters(remove_duplicate=False))] == NAMES
    assert dict(model.named_parameters(remove_duplicate=False))["head.weight"] is model.wte.weight
    assert len(model.parameters()) == 7
    assert model.num_parameters() == 24 + 2 * 12
    assert [name for name, _ in model.children()] == ["wte", "h.0", "h.1", "head"]


def test_named_parameters_yields_pairs_as_pytorchs_does():
    pairs = list(Model().named_parameters())
    assert all(isinstance(name, str) and isinstance(p, Parameter) for name, p in pairs)
    assert "head.weight" not in dict(pairs)  # tied, and known by its first name


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
    grad, model.head.weight.grad = model.h[0].scale.grad, None
    model.zero_grad(set_to_none=False)
    assert model.h[0].scale.grad is grad
    assert not grad.any()
    assert model.head.weight.grad is None
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
        assert_close(dict(layer.named_parameters())[key].grad, p.grad.numpy(), key)


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


ACTIVATIONS = [("ReLU", {}), ("GELU", {}), ("GELU", {"approximate": "tanh"}), ("Tanh", {})]


@pytest.mark.parametrize(("name", "options"), ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_activations_against_torch(name, options, dtype):
    data = np.linspace(-3, 3, 12, dtype=dtype).reshape(3, 4)
    x, x2 = Tensor(data, requires_grad=True), torch.tensor(data, requires_grad=True)
    y, y2 = getattr(nn, name)(**options)(x), getattr(torch.nn, name)(**options)(x2)
    assert_close(y.data, y2.detach().numpy())
    tl.sum(y * y).backward()
    (y2 * y2).sum().backward()
    assert_close(x.grad, x2.grad.numpy())


# --- Sequential ---


def test_a_sequential_against_torch():
    layers = [("Linear", (4, 5)), ("LayerNorm", (5,)), ("ReLU", ()), ("Linear", (5, 3)), ("Tanh", ())]
    ours, theirs = (
        Seq(*(getattr(of, name)(*args) for name, args in layers))
        for Seq, of in ((nn.Sequential, nn), (torch.nn.Sequential, torch.nn))
    )
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    y, expected = ours(x), theirs(torch.from_numpy(x))
    assert_close(y.data, expected.detach().numpy())
    tl.sum(y * y).backward()
    (expected * expected).sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(p.grad, q.grad.numpy())
    assert len(ours) == len(theirs)
    for part in (slice(1, None), slice(-2, None), slice(None, None, 3), slice(0, 0)):
        assert type(ours[part]) is nn.Sequential
        assert [*dict(ours[part].named_parameters())] == list(theirs[part].state_dict())
        assert list(ours[part]) == list(ours)[part]
    np.testing.assert_array_equal(ours[3:](ours[:3](x)).data, y.data)


def test_a_sequential_of_functions_and_nested_ones():
    model = nn.Sequential(linear(), tl.tanh, nn.Sequential(linear(), nn.Dropout(0.5)), lambda x: x * 2.0)
    assert [*dict(model.named_parameters(remove_duplicate=False))] == ["0.weight", "2.0.weight"]
    assert (model[0], model[-3], model[2][0]) == (list(model)[0], tl.tanh, list(model[2])[0])
    assert not model.eval()[2][1].training
    x = np.ones((1, 2), np.float32)
    expected = tl.linear(tl.tanh(tl.linear(x, model[0].weight)), model[2][0].weight) * 2.0
    np.testing.assert_array_equal(model(x).data, expected.data)
    assert nn.Sequential()(x) is x
    model.extra = parameter()  # no layer
    assert len(model) == 4
    with pytest.raises(IndexError):
        model[4]


@pytest.mark.parametrize(
    ("layer", "said"),
    [([len], "a list"), (3, "a int"), (None, "a NoneType"), (nn.ReLU, "the class ReLU"), (np.ones(2), "a ndarray")],
)
def test_a_layer_that_cannot_be_called_is_refused(layer, said):
    with pytest.raises(TypeError, match=f"^Sequential: expected a Module .* at position 1, got {said}; give the"):
        nn.Sequential(nn.Tanh(), layer)


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
    named = dict(model.named_parameters(remove_duplicate=False))
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
    assert [*dict(shared.named_parameters(remove_duplicate=False))] == ["a.weight", "b.weight"]
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
    assert [*dict(model.named_parameters(remove_duplicate=False))] == ["y"]


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
    assert [*dict(model.named_parameters(remove_duplicate=False))] == ["table", "layer.scale"]
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
    assert [*dict(model.named_parameters(remove_duplicate=False))] == ["own", "h.0.scale", "h.1.scale"]
    assert len(model.parameters()) == 3
    assert list(model.modules()) == [model, child, other]
    assert [*dict(child.named_parameters())] == ["scale", "parent.own", "parent.h.1.scale"]
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
    model.mask = Tensor(np.ones(4, np.float32))
    tensors = [model.mask, *model.parameters()]
    before = [t.data for t in tensors]

    def asarray(self, data, dtype=None):
        if not left[0]:
            raise MemoryError
        left[0] -= 1
        return np.asarray(data, dtype)

    monkeypatch.setattr(type(tl.get_backend("numpy")), "asarray", asarray)
    with pytest.raises(MemoryError):
        model.to(dtype=np.float64)
    assert left == [0]
    assert all(t.data is data for t, data in zip(tensors, before, strict=True))


def test_a_move_leaves_what_is_frozen_frozen():
    layer = nn.Linear(2, 3)
    layer.weight.requires_grad = False
    layer.to(dtype=np.float64)
    assert [p.requires_grad for p in layer.parameters()] == [False, True]


# Where a Module may have a Tensor that is no Parameter.
TENSORS = {
    "an attribute": lambda t: t,
    "a list": lambda t: [1, t, None],
    "a tuple": lambda t: (parameter, t),
    "a dict": lambda t: {"a": t, (0, 1): [t]},
    "deep": lambda t: [{"a": ({1: t},)}],
    "a child": lambda t: Holder(y=[t]),
    "a list of children": lambda t: [Holder(y=t), {"a": Holder(y=t)}],
    "a list that contains itself": lambda t: [[t, LOOP], LOOP],
}
VALUES = [np.ones(3, np.float32), np.ones((2, 2)), np.arange(4), np.array([True, False]), np.array(2, np.uint8)]


@pytest.mark.parametrize("make", TENSORS.values(), ids=TENSORS)
def test_other_tensors_move_along_and_are_no_parameters(make, cuda):
    for values in VALUES:
        t = Tensor(values)
        model = Holder(first=linear(), x=make(t), again=t)
        names = [*dict(model.named_parameters(remove_duplicate=False))]
        assert model.to("cupy") is model
        assert (tl.backend_of(t.data), t.dtype) == (cuda, values.dtype)
        model.to(dtype=np.float64)
        assert (tl.backend_of(t.data), t.dtype) == (cuda, np.float64 if values.dtype.kind == "f" else values.dtype)
        model.to("numpy", np.float32)
        assert (type(t.data), t.dtype) == (np.ndarray, np.float32 if values.dtype.kind == "f" else values.dtype)
        np.testing.assert_array_equal(t.data, values)
        assert not t.requires_grad
        assert [*dict(model.named_parameters(remove_duplicate=False))] == list(model.state_dict()) == names


def test_a_move_leaves_results_that_are_bound_to_a_graph():
    model = Holder(w=parameter(), x=Tensor(np.ones(2, np.float32), requires_grad=True))
    model.y = [model.w * 2.0]
    with tl.no_grad():
        model.z = model.w * 2.0
    model.to(dtype=np.float64)
    assert [t.dtype.name for t in (model.w, model.x, *model.y, model.z)] == ["float64", "float64", "float32", "float64"]
    tl.sum(model.x * model.z).backward()
    assert model.x.grad.dtype == np.float64
