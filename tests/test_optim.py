"""The optimisers, clipping and schedules: against PyTorch and hand-made numbers."""

import math

import numpy as np
import pytest
import torch
from test_nn import FLOATS, IDS, Model
from tolerances import assert_close

import tensorlite as tl
from tensorlite import Tensor, nn
from tensorlite.nn import Parameter
from tensorlite.optim import SGD, AdamW, FlatBuffer, clip_grad_norm_, decay_groups, learning_rate


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
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (AdamW, {}),
        (AdamW, {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3}),
        (SGD, {}),
        (SGD, {"weight_decay": 0.3}),
        (SGD, {"momentum": 0.9}),
        (SGD, {"momentum": 0.9, "weight_decay": 0.3}),
        (SGD, {"momentum": 0.8, "weight_decay": 0.3, "nesterov": True}),
    ],
)
def test_ten_steps_against_torch(make, dtype, options):
    ours = parameters(dtype)
    theirs = as_torch(ours)
    optimizer, reference = (
        make([{"params": p[:2]}, {"params": p[2:], "weight_decay": 0.0}], **options)
        for make, p in ((make, ours), (getattr(torch.optim, make.__name__), theirs))
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


def test_sgd_on_a_device(cuda):
    """A few steps, whose gradients are scaled by what lies there, as on the CPU."""
    host, there = (parameters(np.float32) for _ in range(2))
    for p in there:
        p.data = cuda.asarray(p.data)
    optimizers = [SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True) for p in (host, there)]
    for step in range(3):
        values = np.random.default_rng(step).standard_normal(optimizers[0].flat.data.size).astype(np.float32)
        for optimizer in optimizers:
            asarray = optimizer.flat.backend.asarray
            optimizer.flat.grad[...] = asarray(values)
            optimizer.update(optimizer.pieces, optimizer.rates(step + 1), asarray(np.float32(0.5)))
    assert_close(cuda.to_numpy(optimizers[1].flat.data), optimizers[0].flat.data)
    assert optimizers[1].flat.backend is cuda


@pytest.mark.parametrize("make", [AdamW, SGD])
def test_zero_grad_fills_or_forgets(make):
    model = Model()
    optimizer = make(model.parameters())
    for set_to_none in (False, True, False):
        tl.cross_entropy(model(IDS), IDS).backward()
        optimizer.zero_grad(set_to_none=set_to_none)
        assert all((p.grad is None) == set_to_none for p in model.parameters())
        before = optimizer.flat.data.copy()
        if make is SGD:  # and what was forgotten does not come back
            optimizer.step()
            np.testing.assert_array_equal(optimizer.flat.data, before)
        assert set_to_none or not optimizer.flat.grad.any()


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
@pytest.mark.parametrize("given", [FlatBuffer, list, iter])
@pytest.mark.parametrize(("scale", "limit"), [(1.0, 1.0), (1e-3, 1.0), (100.0, 0.5), (0.0, 1.0), (1.0, 0)])
def test_clipping_against_torch(scale, limit, given, dtype):
    ours = parameters(dtype)
    theirs = as_torch(ours)
    set_gradients(ours, theirs, np.random.default_rng(1), scale)
    norm = clip_grad_norm_(given(ours), limit)
    assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, limit or math.inf).numpy())
    for p, q in zip(ours, theirs, strict=True):
        assert_close(p.grad, q.grad.numpy())


@pytest.mark.parametrize("count", [0, 1, 4])
def test_clipping_gradients_of_any_arrays(count, cuda):
    """Where some are None, and the others lie in all sorts of ways."""
    ours = parameters(np.float32)
    theirs = as_torch(ours)
    set_gradients(ours, theirs, np.random.default_rng(1))
    ours[0].grad, ours[1].grad = np.asfortranarray(ours[0].grad), np.repeat(ours[1].grad, 2)[::2]
    for p, q in zip(ours[count:], theirs[count:], strict=True):
        p.grad = q.grad = None
    there = [Parameter(cuda.asarray(p.data)) for p in ours]
    for p, q in zip(there, ours, strict=True):
        p.grad = None if q.grad is None else cuda.asarray(q.grad)
    expected = torch.nn.utils.clip_grad_norm_(theirs, 0.5).numpy()
    for given, to_numpy in ((ours, np.asarray), (there, cuda.to_numpy if count else np.asarray)):
        assert float(to_numpy(clip_grad_norm_(given, 0.5))) == pytest.approx(float(expected), rel=1e-6)
        for p, q in zip(given, theirs, strict=True):
            if q.grad is None:
                assert p.grad is None
            else:
                assert_close(to_numpy(p.grad), q.grad.numpy())


def test_clipping_without_an_optimiser_reaches_its_buffer():
    model = Model()
    optimizer = SGD(model.parameters())
    tl.cross_entropy(model(IDS), IDS).backward()
    before = clip_grad_norm_(model.parameters(), 0.01)
    assert before > 0.01
    assert np.linalg.norm(optimizer.flat.grad) == pytest.approx(0.01, rel=1e-4)


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


# --- what is refused, and what parameters may be given in ---


@pytest.mark.parametrize(
    ("make", "settings", "said"),
    [
        *(
            (make, *row)
            for make in (AdamW, SGD)
            for row in (
                ({"lr": -0.1}, "lr must be 0 or more, and finite, got -0.1"),
                ({"lr": math.nan}, "lr must be 0 or more, and finite, got nan"),
                ({"lr": math.inf}, "lr must be 0 or more, and finite, got inf"),
                ({"weight_decay": -1.0}, "weight_decay must be 0 or more, and finite, got -1.0"),
            )
        ),
        (AdamW, {"eps": -1.0}, "eps must be 0 or more, and finite, got -1.0"),
        (AdamW, {"betas": (0.9, 1.0)}, r"betas must be two numbers from 0 to less than 1, got \(0.9, 1.0\)"),
        (AdamW, {"betas": (1.5, 0.9)}, "betas must be two numbers"),
        (AdamW, {"betas": (0.9,)}, "betas must be two numbers"),
        (SGD, {"momentum": -0.1}, "momentum must be from 0 to less than 1, got -0.1"),
        (SGD, {"momentum": 1.0}, "momentum must be from 0 to less than 1, got 1.0"),
        (SGD, {"momentum": math.nan}, "momentum must be from 0 to less than 1, got nan"),
        (SGD, {"nesterov": True}, "nesterov takes a momentum above 0, such as momentum=0.9"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, settings, said):
    p = nn.Parameter(np.ones(2, np.float32))
    with pytest.raises(ValueError, match=f"^{make.__name__}: {said}"):
        make([p], **settings)
    if "weight_decay" in settings:
        with pytest.raises(ValueError, match=f"^{make.__name__}: {said}"):
            make([{"params": [p]} | settings])
    assert p.grad is None


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
        lambda model: (p for _, p in model.named_parameters()),
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


ITERABLE = r"^\w+: expected a list of Parameters, as model.parameters\(\) gives, got a {}$"
GROUPS = "^AdamW: expected a list of Parameters, or one of groups that all have params$"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda model: AdamW(model), ITERABLE.format("Linear")),
        (lambda model: AdamW(model.weight), ITERABLE.format("Parameter")),
        (lambda model: AdamW(dict(model.named_parameters())), ITERABLE.format("dict")),
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
        (lambda model: SGD([{"weight_decay": 0.1}]), GROUPS.replace("AdamW", "SGD")),
        (lambda model: clip_grad_norm_(model, 1.0), ITERABLE.format("Linear")),
        (lambda model: clip_grad_norm_(3, 1.0), ITERABLE.format("int")),
        (lambda model: AdamW(3), ITERABLE.format("int")),
        (lambda model: AdamW(["weight"]), "^AdamW: expected Parameters, got a str$"),
        (lambda model: AdamW([model]), "^AdamW: expected Parameters, got a Linear$"),
        (lambda model: AdamW([model.weight.data]), "^AdamW: expected Parameters, got a ndarray$"),
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
