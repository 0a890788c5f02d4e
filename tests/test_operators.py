"""Python's operators on tensors: comparisons, logic, and changes in place, as in PyTorch."""

import operator

import numpy as np
import pytest
import torch
from test_ops import z
from tolerances import assert_close

import tensorlite as tl
from tensorlite import Tensor, nn, no_grad

COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
X, Y = np.array([[1.0, np.nan, 3.0], [0.0, 2.0, -1.0]]), np.array([1.0, 2.0, 0.0])


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons_are_those_of_pytorch(name, backend):
    compare = getattr(operator, name)
    pairs = [(X, Y), (Y, X), (X, X), (X, 1), (X, 0.5), (X.astype(np.float32), np.float32(2)), (X > 0, True)]
    for x, y in pairs:
        a, b = (Tensor(backend.asarray(v), requires_grad=False) if isinstance(v, np.ndarray) else v for v in (x, y))
        want = compare(*(torch.as_tensor(v) if isinstance(v, np.ndarray) else v for v in (x, y))).numpy()
        assert_close(backend.to_numpy(compare(a, b).data), want)


@pytest.mark.parametrize("name", COMPARISONS)
def test_arrays_lists_and_numbers_may_stand_on_the_left(name):
    compare = getattr(operator, name)
    for left in (Y, Y.tolist(), 2.0, np.float64(2), np.float32(2), np.int64(2), np.array(2)):
        result = compare(left, Tensor(X))
        assert isinstance(result, Tensor)
        np.testing.assert_array_equal(result.data, compare(np.asarray(left), X))


def test_comparisons_have_no_gradient_and_need_shapes_that_fit():
    x = Tensor(Y, requires_grad=True)
    assert not (x > 0).requires_grad
    for name in COMPARISONS:
        with pytest.raises(ValueError, match=rf"^{name}: operands could not be broadcast .* \(3,\) \(2,\)"):
            getattr(operator, name)(x, z(2))


def test_what_is_no_number_is_not_equal_and_has_no_order():
    x = Tensor(Y)
    for other in (None, "text", object(), {}):
        assert (x == other) is False
        assert (x != other) is True
        with pytest.raises(TypeError, match="not supported between"):
            operator.lt(x, other)


def test_a_tensor_is_a_key_and_is_found_in_a_list_of_itself():
    x, y = Tensor(Y), Tensor(Y)
    assert {x: 1, y: 2}[x] == 1
    assert len({x, y, x}) == 2
    assert x in [x, y]
    with pytest.raises(ValueError, match="item: needs a tensor of one element"):
        bool(x == y)


def test_the_mask_of_the_lectures_hides_the_future(backend):
    tril = Tensor(backend.asarray(np.tril(np.ones((4, 4), np.float32))))
    scores = Tensor(backend.asarray(np.arange(16, dtype=np.float32).reshape(4, 4)), requires_grad=True)
    weights = scores.masked_fill(tril == 0, float("-inf")).softmax()
    assert not np.triu(backend.to_numpy(weights.data), 1).any()
    chosen = scores[tril != 0]
    assert chosen.shape == (10,)
    assert tl.where(~(tril == 0), scores, 0.0).shape == (4, 4)


def test_logic_on_booleans():
    a, b = np.array([True, True, False]), np.array([True, False, False])
    for left, right in ((Tensor(a), Tensor(b)), (Tensor(a), b), (a, Tensor(b))):
        for fn in (operator.and_, operator.or_, operator.xor):
            np.testing.assert_array_equal(fn(left, right).data, fn(a, b))
    np.testing.assert_array_equal((~Tensor(a)).data, ~a)
    with pytest.raises(TypeError, match="and_: the operand must be an array of booleans, got float64"):
        Tensor(Y) & Tensor(Y)
    with pytest.raises(ValueError, match=r"and_: operands could not be broadcast together"):
        Tensor(a) & np.array([True, False])


@pytest.mark.parametrize("mask", [True, False, np.array([0, 1, 0]), Tensor([0.0, 1.0, 0.0])], ids=str)
def test_a_mask_that_is_no_array_of_booleans_is_refused(mask):
    x = Tensor([1.0, 2.0, 3.0])
    with pytest.raises(TypeError, match=r"^masked_fill: the mask must be an array of booleans, got "):
        x.masked_fill(mask, 0.0)
    with pytest.raises(TypeError, match=r"^where: the condition must be an array of booleans, got "):
        tl.where(mask, x, 0.0)
    if isinstance(mask, bool):
        with pytest.raises(TypeError, match=rf"^getitem: Python's {mask} is no index"):
            x[mask]


# -- in place --

IN_PLACE = {
    "iadd": 2.0, "isub": np.array([1.0, 2.0, 3.0]), "imul": Tensor([0.5]), "itruediv": 4, "ipow": 2,
    "imatmul": np.eye(3),
}  # fmt: skip


def in_place(name, x, other):
    return getattr(operator, name)(x, other)


@pytest.mark.parametrize("name", IN_PLACE)
def test_under_no_grad_the_tensor_itself_changes(name, backend):
    other = IN_PLACE[name]
    x = np.array([1.0, 2.0, 3.0])
    p = nn.Parameter(backend.asarray(x.copy()))
    array, node = p.data, p.node
    on_device = backend.asarray(np.asarray(other), p.dtype) if isinstance(other, np.ndarray | Tensor) else other
    with no_grad():
        assert in_place(name, p, on_device) is p
    assert p.data is array
    assert p.node is node
    plain = {"imatmul": "matmul"}.get(name, name[1:])
    want = getattr(operator, plain)(x, other.numpy() if isinstance(other, Tensor) else other)
    assert_close(backend.to_numpy(p.data), want)


@pytest.mark.parametrize("name", IN_PLACE)
def test_while_recording_a_leaf_that_requires_grad_is_left_alone(name):
    p = nn.Parameter(np.ones(3))
    with pytest.raises(
        RuntimeError, match="a leaf that requires grad cannot be changed in place while ops are recorded"
    ):
        in_place(name, p, IN_PLACE[name])
    np.testing.assert_array_equal(p.data, 1)


@pytest.mark.parametrize("name", IN_PLACE)
def test_on_a_result_it_gives_a_new_tensor_with_the_right_gradient(name):
    other, x = IN_PLACE[name], Tensor(np.array([1.0, 2.0, 3.0]), requires_grad=True)
    t = torch.tensor(x.data, requires_grad=True)
    first = x * 3
    y = in_place(name, first, other)
    assert y is not first
    y.sum().backward()
    array = torch.tensor(np.asarray(other)) if isinstance(other, np.ndarray | Tensor) else other
    in_place(name, t * 3, array).sum().backward()
    assert_close(x.grad, t.grad.numpy())


def test_a_constant_changes_in_place_but_becomes_a_result_beside_a_leaf():
    total, x = Tensor(np.zeros(2)), Tensor(np.ones(2), requires_grad=True)
    alias = total
    total += 1
    assert alias is total
    total += x
    assert alias is not total
    assert total.requires_grad
    np.testing.assert_array_equal(alias.data, [1, 1])


def test_a_hand_written_training_step_trains():
    w = nn.Parameter(np.ones(1))
    for _ in range(3):
        w.grad = None
        (w * w).sum().backward()
        with no_grad():
            w -= 0.1 * w.grad
    assert w.data[0] == pytest.approx(0.8**3)
    optimizer = tl.optim.AdamW([w])
    with no_grad():
        w *= 0.5
    assert optimizer.flat.data[0] == w.data[0] == pytest.approx(0.5 * 0.8**3)


def test_parameters_are_scaled_at_initialisation_under_no_grad_alone():
    class Scaled(nn.Module):
        def __init__(self, how):
            self.w = nn.Parameter(np.ones(2, np.float32))
            with how:
                self.w *= 0.5

    assert Scaled(no_grad()).parameters()[0].data.tolist() == [0.5, 0.5]
    with pytest.raises(RuntimeError, match="do it within `with no_grad"):
        Scaled(tl.random.scope(0))


@pytest.mark.parametrize(
    ("x", "other"), [(np.ones(3, np.int64), 0.5), (np.ones(3), np.ones((2, 3))), (np.ones(3, bool), 1)]
)
def test_what_does_not_fit_is_refused(x, other):
    t = Tensor(x.copy())
    with pytest.raises(ValueError, match="^add: a result of .* does not fit into a tensor of"):
        t += other
    np.testing.assert_array_equal(t.data, x)


def test_a_wider_float_is_rounded_to_the_tensors():
    t = Tensor(np.ones(2, np.float32))
    t += np.ones(2)
    assert t.dtype == np.float32
    assert t.data.tolist() == [2, 2]


def test_what_cannot_be_written_into_is_refused():
    x = Tensor([1.0, 2.0]).broadcast_to(3, 2)
    with pytest.raises(ValueError, match="^add: .*read-only"):
        x += 1
