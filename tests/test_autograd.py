"""The engine: what accumulates where, what is freed when, and that threads do not meet."""

import functools
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tolerances import assert_close

from tensorlite import Tensor, grad, needs_grad, no_grad, record


def leaf(*values) -> Tensor:
    return Tensor(np.array(values, np.float64), requires_grad=True)


# --- what adds up ---

GRAPHS = {  # a function of x, and its derivative
    "diamond": (lambda x: (x * 2) * (x + 1), lambda x: 4 * x + 2),
    "diamond in a diamond": (lambda x: (y := x * x) * (z := y + x) + z * y, lambda x: 8 * x**3 + 6 * x**2),
    "x * x": (lambda x: x * x, lambda x: 2 * x),
    "x - x": (lambda x: x - x, lambda x: 0 * x),
    "x / x": (lambda x: x / x, lambda x: 0 * x),
    "many uses": (lambda x: sum([x * k for k in range(10)]), lambda x: 45 + 0 * x),
    "a long and a short way": (lambda x: x + ((x * 2) * 2) * x, lambda x: 1 + 8 * x),
    "a branch without gradient": (lambda x: x * 3 + x**0, lambda x: 3 + 0 * x),
    "a branch that is not used": (lambda x: [x.exp(), x * 2][1], lambda x: 2 + 0 * x),
    "detached": (lambda x: x * x.detach(), lambda x: x),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_gradients_of_all_uses_add_up(name):
    fn, derivative = GRAPHS[name]
    x = leaf(0.5, -1.5, 2.0)
    fn(x).sum().backward()
    assert_close(x.grad, derivative(x.data))


def test_a_broadcast_leaf_used_twice():
    x, y = leaf(2.0), leaf(1.0, 2.0, 3.0)
    (x * y + x).sum().backward()
    assert_close(x.grad, [9.0])
    assert_close(y.grad, [2.0, 2.0, 2.0])


def test_two_backwards_add_up_and_keep_the_array():
    x = leaf(1.0, 2.0)
    (x * 3).sum().backward()
    first = x.grad
    (x * x).sum().backward()
    assert x.grad is first
    assert_close(x.grad, [5.0, 7.0])


def test_only_leaves_get_a_gradient():
    x, constant = leaf(1.0), Tensor([2.0])
    y = x * constant
    (y * y).sum().backward()
    assert x.grad is not None
    assert y.grad is None
    assert constant.grad is None
    assert (x.is_leaf, y.is_leaf, constant.is_leaf) == (True, False, True)


def test_backward_from_a_leaf():
    x = leaf(3.0)
    x.backward()
    x.backward([2.0])
    assert_close(x.grad, [3.0])


def test_the_gradient_of_a_scalar_is_an_array():
    x, y = (Tensor(2.0, requires_grad=True) for _ in range(2))
    (x * y + y * y).backward()
    assert type(x.grad) is type(y.grad) is np.ndarray
    assert_close(y.grad, np.float32(6.0))


@pytest.mark.parametrize("fn", [lambda a, b: a + b, lambda a, b: (a + b).reshape(2) + a * 0], ids=["add", "summed"])
def test_gradients_share_no_memory(fn):
    a, b = leaf(1.0, 2.0), leaf(3.0, 4.0)
    gradient = np.ones(2)
    fn(a, b).backward(gradient)
    a.grad += 10
    gradient += 100
    assert_close(a.grad, [11.0, 11.0])
    assert_close(b.grad, [1.0, 1.0])


def test_gradient_dtypes_follow_the_leaves():
    x, y = Tensor([1.0, 2.0], requires_grad=True), leaf(3.0, 4.0)
    (x * y).sum().backward()
    assert (x.grad.dtype, y.grad.dtype) == (np.float32, np.float64)


# --- no_grad ---


def test_no_grad_nests_and_survives_an_exception():
    x = leaf(1.0)
    with no_grad():
        with no_grad():
            assert not needs_grad(x)
        assert not (x * 2).requires_grad
    assert needs_grad(x)
    with pytest.raises(KeyError), no_grad():
        raise KeyError
    assert (x * 2).requires_grad


def test_no_grad_decorates_a_recursive_function():
    @no_grad()
    def depth(x, n):
        return n if (x * 2).requires_grad else depth(x, n - 1) if n else "never recorded"

    assert depth(leaf(1.0), 3) == "never recorded"
    assert (leaf(1.0) * 2).requires_grad


def test_no_grad_holds_for_its_thread_only():
    x = leaf(1.0)
    with no_grad(), ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: (x * 2).requires_grad).result()
        assert not (x * 2).requires_grad


def test_detach_shares_the_array_and_forgets_the_history():
    x = leaf(1.0, 2.0)
    y = (x * 2).detach()
    assert y.node is None
    assert x.detach().data is x.data


# --- misuse is explained ---


def test_a_graph_is_used_once():
    x = leaf(1.0, 2.0)
    shared = x * x
    shared.sum().backward()
    before = x.grad.copy()
    for again in (shared.sum(), (shared * 2 + x).sum()):
        with pytest.raises(RuntimeError, match="activations are freed; run the forward again"):
            again.backward()
    assert_close(x.grad, before)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda x: (x * 2).backward(), ValueError, r"shape \(2,\) is no scalar; give its gradient"),
        (lambda x: (x * 2).backward(np.ones(3)), ValueError, r"the gradient has shape \(3,\), the tensor \(2,\)"),
        (lambda x: (x * 2).backward(1.0), ValueError, r"the gradient has shape \(\), the tensor \(2,\)"),
        (lambda x: x.detach().sum().backward(), RuntimeError, "does not depend on anything that requires grad"),
        (lambda x: grad(x.sum(), [x * 2]), ValueError, "every input must be a leaf tensor"),
        (lambda x: grad(x.sum(), [x.detach()]), ValueError, "every input must be a leaf tensor"),
        (lambda x: setattr(x * 2, "requires_grad", True), RuntimeError, r"detach\(\) it to make a leaf"),
    ],
)
def test_misuse(call, error, said):
    with pytest.raises(error, match=said):
        call(leaf(1.0, 2.0))


def user_op(vjp, x, y):
    """An op of two inputs whose backward is `vjp`."""
    return record(x.data * 1, (x, y), lambda gy: vjp(gy))


def test_a_vjp_may_return_none():
    x, y = leaf(1.0, 2.0), leaf(3.0)
    (user_op(lambda gy: (None, gy.sum(keepdims=True)), x.exp(), y) + x).sum().backward()
    assert_close(x.grad, [1.0, 1.0])
    assert_close(y.grad, [2.0])


@pytest.mark.parametrize(
    ("vjp", "said"),
    [
        (lambda gy: (gy,), r"^user_op: the vjp gave 1 gradients for 2 inputs"),
        (lambda gy: (gy, gy, gy), r"^user_op: the vjp gave 3 gradients for 2 inputs"),
        (lambda gy: (gy[:1], None), r"^user_op: the vjp gave a gradient of shape \(1,\) for an input of shape \(2,\)"),
        (lambda gy: (gy[0], None), r"^user_op: the vjp gave a gradient of shape \(\) for an input of shape \(2,\)"),
        (lambda gy: (np.ones((2, 3)), None), r"^user_op: the vjp gave a gradient of shape \(2, 3\) for an input"),
    ],
)
def test_a_wrong_vjp_is_named(vjp, said):
    with pytest.raises(ValueError, match=said):
        user_op(vjp, leaf(1.0, 2.0), leaf(3.0)).sum().backward()


# --- data exchanged: `x.data = other` ---

EXCHANGED = [np.float64([1, 2, 3]), np.float32([1, 2, 3, 4]), np.float64([[1], [2]]), np.float32(2)]


@pytest.mark.parametrize("data", EXCHANGED, ids=lambda a: f"{a.dtype} {a.shape}")
def test_a_gradient_is_that_of_the_data_that_was_put_into_a_leaf(data):
    x = Tensor(np.ones(3, np.float32), requires_grad=True)
    x.data = data
    (x * x).sum().backward()
    np.testing.assert_array_equal(x.grad, 2 * data, strict=True)
    (gx,) = grad((x * x).sum(), [x])
    np.testing.assert_array_equal(gx, 2 * data)
    assert gx.dtype == data.dtype


def test_a_gradient_from_before_takes_the_new_dtype():
    x = leaf(1.0, 2.0)
    (x * 3).sum().backward()
    x.data = x.data.astype(np.float32)
    (x * 3).sum().backward()
    np.testing.assert_array_equal(x.grad, np.float32([6, 6]), strict=True)


@pytest.mark.parametrize(
    ("before", "after", "error", "said"),
    [
        (np.ones(3), None, ValueError, r"\.grad has shape \(2,\) and its data \(3,\); set \.grad to None"),
        (None, np.ones(3), ValueError, r"gradient of shape \(2,\) .* \(3,\); or was .* data was exchanged"),
        (np.ones(2, int), None, TypeError, r"a leaf's data is now int64, which has no gradient"),
    ],
)
def test_data_that_cannot_be_exchanged_is_named(before, after, error, said):
    x = leaf(1.0, 2.0)
    x.sum().backward()
    x.data = x.data if before is None else before
    y = (x * 3.0).sum()
    x.data = x.data if after is None else after
    with pytest.raises(error, match=said):
        y.backward()


def test_an_op_is_named_by_the_function_its_vjp_is_defined_in():
    def double(x):
        return record(x.data * 2, (x,), lambda gy: (gy * 2,))

    x = leaf(1.0)
    partial = record(x.data * np.ones((3, 1)), (x,), functools.partial(np.broadcast_arrays, np.ones((3, 1))))
    assert [t.node.op for t in (x, double(x), x.exp(), partial)] == ["leaf", "double", "exp", "op"]
    assert repr(double(x)) == "Tensor([2.], dtype=float64, op=double)"
    assert repr(x) == "Tensor([1.], dtype=float64, requires_grad=True)"


# --- grad ---


def test_grad_touches_no_grad():
    x, y, unused = leaf(1.0, 2.0), leaf(3.0, 4.0), leaf(5.0)
    gx, gunused = grad((x * y).sum(), [x, unused])
    assert_close(gx, [3.0, 4.0])
    assert_close(gunused, [0.0])
    assert x.grad is y.grad is unused.grad is None


def test_grad_deposits_each_gradient_as_it_is_known():
    x, y, unused = leaf(1.0, 2.0), leaf(3.0, 4.0), leaf(5.0)
    deposited = []
    assert grad(x * x * y, [unused, x, y], [1.0, 10.0], lambda i, g: deposited.append((i, g))) is None
    assert [i for i, _ in deposited] == [2, 1, 0]
    assert_close(deposited[0][1], [1.0, 40.0])
    assert_close(deposited[1][1], [6.0, 160.0])
    assert deposited[2][1] is None


def test_grad_of_one_input_twice():
    x = leaf(1.0, 2.0)
    with pytest.raises(ValueError, match="twice"):
        grad(x.sum(), [x, x])


def test_threads_share_leaves():
    rng = np.random.default_rng(0)
    w = Tensor(rng.standard_normal((16, 16)), requires_grad=True)
    inputs = rng.standard_normal((8, 4, 16))
    together = threading.Barrier(8)

    def work(x, wait=together.wait):
        wait()
        return [grad(((Tensor(x) @ w).tanh() @ w).sum(), [w])[0] for _ in range(20)]

    serial = [work(x, wait=lambda: None) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        np.testing.assert_array_equal(list(pool.map(work, inputs)), serial)
    assert w.grad is None


# --- depth ---

DEPTH = 100_000


def chain(x: Tensor) -> Tensor:
    for _ in range(DEPTH):
        x = x + 1.0
    return x


def test_a_graph_may_be_deep():
    x = leaf(0.0)
    y = chain(x)
    assert y.item() == DEPTH
    y.backward()
    assert_close(x.grad, [1.0])


def test_a_deep_graph_may_be_dropped_without_a_backward():
    y = leaf(0.0) + 1.0
    first = weakref.ref(y.node.vjp)
    y = chain(y)
    assert first() is not None
    del y
    assert first() is None


# --- memory: all by reference counting, so that arrays are freed at once ---


@pytest.fixture
def no_gc():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def layers(x: Tensor, n: int, watch: list) -> Tensor:
    """A chain of ops that keep their result; `watch` receives a weak reference to each."""
    for _ in range(n):
        x = x.tanh()
        watch.append(weakref.ref(x.data))
    return x


def alive(refs) -> int:
    return sum(ref() is not None for ref in refs)


def test_a_dropped_graph_frees_every_array(no_gc):
    x, w, refs = leaf(1.0, 2.0), leaf(3.0, 4.0), []
    loss = (layers(x * w, 5, refs) * w).sum()
    assert alive(refs) == 5
    refs += [weakref.ref(loss), weakref.ref(loss.node.vjp), weakref.ref(x), weakref.ref(x.data)]
    del loss
    assert alive(refs) == 2
    del x
    assert alive(refs) == 0


def test_backward_frees_the_graph_although_the_loss_lives(no_gc):
    x, refs = leaf(1.0, 2.0), []
    loss = layers(x, 5, refs).sum()
    loss.backward()
    assert alive(refs) == 0
    assert loss.node.parents == ()


def probe(t, refs, seen):
    """t itself; when its gradient arrives, `seen` is told how many of `refs` are alive."""

    def vjp(gy):
        seen.append(alive(refs))
        return (gy,)

    return record(t.data * 1, (t,), vjp)


def test_activations_are_freed_during_backward(no_gc):
    """When the gradient arrives at layer k, layers above k are gone."""
    x, refs, seen = leaf(1.0, 2.0), [], []

    y = x
    for _ in range(6):
        y = layers(probe(y, refs, seen), 1, refs)
    y = y.sum()
    y.backward()
    assert seen == [5, 4, 3, 2, 1, 0]


def test_gradients_on_the_way_are_freed_too(no_gc):
    """The terms of a sum of gradients are gone when the sum is passed on."""
    x, refs, seen = leaf(1.0, 2.0), [], []

    def double(t):
        def vjp(gy):
            g = gy * 2
            refs.append(weakref.ref(g))
            return (g,)

        return record(t.data * 2, (t,), vjp)

    y = probe(x, refs, seen)
    (double(y) + double(y)).sum().backward()
    assert (len(refs), seen) == (2, [0])


@pytest.mark.parametrize(
    "op", [lambda x: x + 1, lambda x: x * 2, lambda x: x.reshape(2, 1) - 0.5, lambda x: x.sum(0), lambda x: x[[0, 0]]]
)
def test_what_no_vjp_names_dies_in_the_forward(op, no_gc):
    x = leaf(1.0, 2.0)
    y = op(x)
    ref = weakref.ref(y.data)
    y = (y * 3.0 - 1.0).exp()
    assert ref() is None
    assert y.requires_grad


def test_no_grad_keeps_nothing(no_gc):
    x, refs = leaf(1.0, 2.0), []
    with no_grad():
        y = layers(x, 5, refs)
    assert alive(refs) == 1
    assert y.node is None
