"""The checker is checked: wrong gradients planted in user-written ops are caught, right ones pass."""

import re

import numpy as np
import pytest

import tensorlite as tl
from tensorlite import GradcheckError, KinkError, Tensor, gradcheck, random, record

RNG = np.random.default_rng(0)
A, B, SQUARE, LARGE = (RNG.standard_normal(shape) for shape in ((3, 4), (4, 2), (3, 3), (100, 60)))


def user_op(forward, vjp, *tensors) -> Tensor:
    """An op with `forward(*arrays)` and `vjp(gy, *arrays)`."""
    arrays = [t.data for t in tensors]
    return record(forward(*arrays), tensors, lambda gy: vjp(gy, *arrays))


def op(forward, vjp):
    return lambda *tensors: user_op(forward, vjp, *tensors)


def square_but(error):
    """x ** 2 of LARGE, with an error in one element of the gradient."""
    wrong = np.zeros(LARGE.shape)
    wrong[71, 13] = error
    return op(np.square, lambda gy, x: (2 * gy * x + wrong,))


def writes_into_gy(gy, x):
    gy *= np.cos(x)
    return (gy,)


def writes_into_input(x):
    x += 1
    return x * 2


def forgets_one_use(x):
    return tl.exp(x) * Tensor(tl.exp(x).data)


def float32_inside(x):
    return user_op(lambda x: np.sin(x.astype(np.float32)), lambda gy, x: (gy * np.cos(x),), x)


# What is wrong, the function, its inputs, and what the message must name: the input and the element.
WRONG = {
    "sign": (op(np.sin, lambda gy, x: (-gy * np.cos(x),)), [A], "input 0 of shape (3, 4), element (0, 0)"),
    "1 % off": (op(np.sin, lambda gy, x: (1.01 * gy * np.cos(x),)), [A], "input 0 of shape (3, 4), element (0, 0)"),
    "0.001 % off": (op(np.sin, lambda gy, x: (1.00001 * gy * np.cos(x),)), [A], "element (0, 0)"),
    "transposed": (
        op(np.matmul, lambda gy, x, y: ((gy @ y.T).T, x.T @ gy)), [SQUARE, SQUARE + 1], "input 0 of shape (3, 3)",
    ),
    "summed over the wrong axis": (
        op(np.add, lambda gy, x, b: (gy, gy.sum(axis=1))), [SQUARE, A[0, :3]], "input 1 of shape (3,), element (0,)",
    ),
    "mean for the sum of a broadcast": (
        op(np.add, lambda gy, x, b: (gy, gy.mean(axis=0))), [A, B[:, 0]], "input 1 of shape (4,), element (0,)",
    ),
    "factor forgotten on the second input": (
        op(lambda x, y: x + 2 * y, lambda gy, x, y: (gy, gy)), [A, A], "input 1 of shape (3, 4), element (0, 0)",
    ),
    "zero": (op(np.sin, lambda gy, x: (0 * x,)), [A], "got 0 from"),
    "none": (op(lambda x, y: x * y, lambda gy, x, y: (gy * y, None)), [A, A], "input 1 of shape (3, 4)", "got 0 from"),
    "nan": (op(np.sin, lambda gy, x: (np.where(x == x[1, 2], np.nan, gy),)), [A], "element (1, 2)", "got nan"),
    "infinite": (op(np.sin, lambda gy, x: (gy * np.inf,)), [A], "element (0, 0)", "inf from the backward pass"),
    "one nan of many": (square_but(np.nan), [LARGE], "element (71, 13)", "got nan"),
    "one infinity of many": (square_but(np.inf), [LARGE], "element (71, 13)", "got inf"),
    "one use forgotten": (forgets_one_use, [A], "input 0 of shape (3, 4), element (0, 0)"),
    "one element of many": (square_but(1e-3), [LARGE], "input 0 of shape (100, 60), element (71, 13)"),
    "all of many": (op(np.square, lambda gy, x: (1.01 * 2 * gy * x,)), [LARGE], "input 0 of shape (100, 60)"),
    "writes into gy": (op(np.sin, writes_into_gy), [A], "the backward pass wrote into the gradient it was given"),
    "writes into its input": (op(writes_into_input, lambda gy, x: (2 * gy,)), [A], "wrote into input 0"),
    "writes into its input on the way back": (
        op(np.sin, lambda gy, x: (np.multiply(gy, np.cos(x), out=x),)), [A], "wrote into input 0",
    ),
    "float32 inside": (float32_inside, [A], "float64 inputs gave a result of float32"),
    "result is a constant": (lambda x: Tensor(x.data), [A], "does not depend on any of the inputs"),
    "result is not finite": (lambda x: x / 0.0, [A], "the result is not finite"),
    "random": (lambda x: x.dropout(0.5), [LARGE], "two evaluations differ; wrap random ops in random.scope(seed)"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_gradient_is_caught(name):
    fn, inputs, *said = WRONG[name]
    with pytest.raises(GradcheckError) as info, np.errstate(all="ignore"):
        gradcheck(fn, *[x.copy() for x in inputs])
    assert not isinstance(info.value, KinkError)
    for words in said:
        assert words in str(info.value)


def test_the_message_gives_both_numbers():
    with pytest.raises(GradcheckError, match="expected .* by finite differences, got .* from the backward") as info:
        gradcheck(op(lambda x: 3 * x, lambda gy, x: (6 * gy,)), np.array([2.0]))
    expected, got = map(float, re.findall(r"(?:expected|got) (\S+)", str(info.value)))
    assert got == pytest.approx(2 * expected, rel=1e-9)


def scoped_dropout(x):
    with random.scope(1):
        return x.dropout(0.5)


RIGHT = {
    "sin": (op(np.sin, lambda gy, x: (gy * np.cos(x),)), [A]),
    "product": (op(np.matmul, lambda gy, x, y: (gy @ y.T, x.T @ gy)), [A, B]),
    "left to the engine to sum": (op(np.multiply, lambda gy, x, y: (gy * y, gy * x)), [A, A[0]]),
    "large": (lambda x, y: (x * y).tanh(), [LARGE, LARGE[0]]),
    "float32 input": (lambda x: x.exp(), [A.astype(np.float32)]),
    "a number": (lambda x: x * x, [1.5]),
    "a Tensor and ids": (lambda w, i: tl.embedding(i, w), [Tensor(A), np.array([0, 2, 2])]),
    "random op in a scope": (scoped_dropout, [A]),
    "zero gradient": (lambda x: x * 0.0, [A]),
    "empty": (lambda x: x * 2, [A[:0]]),
    "steep exponential": (lambda x: (x * 5).exp(), [np.linspace(-1, 1, 9)]),
    "steep tanh": (lambda x: (x * 5).tanh(), [np.linspace(-1, 1, 9)]),
    "power at zero": (lambda x: x**4, [np.linspace(-1, 1, 9)]),
    "sharp minimum": (lambda x: (x * x + 0.01).sqrt(), [np.linspace(-1, 1, 9)]),
    "close to a kink": (lambda x: x.relu(), [np.array([-0.003, 0.003])]),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_gradient_passes(name):
    fn, inputs = RIGHT[name]
    assert gradcheck(fn, *inputs)


def test_rounding_in_a_large_result_is_no_wrong_gradient():
    for seed in range(8):
        assert gradcheck(lambda x: x + 1000.0, LARGE, seed=seed)


KINKS = {
    "relu at 0": (lambda x: x.relu(), [1.0, 0.0], "input 0 has a kink at element (1,)"),
    "relu within a step of 0": (lambda x: x.relu(), [1.0, 1e-4], "element (1,)"),
    "max at a tie": (lambda x: x.max(), [3.0, 1.0, 3.0], "element (0,)"),
    "absolute value": (lambda x: (x * x).sqrt(), [1.0, 1e-4], "element (1,)"),
    "absolute value at 0": (lambda x: (x * x).sqrt(), [1.0, 0.0], "element (1,)"),
    "steep kink": (lambda x: x.relu() * 1000, [0.0], "element (0,)"),
    "small kink": (lambda x: x * x + x.relu() * 0.1, [0.0], "element (0,)"),
    "one kink of many": (lambda x: x.relu(), np.where(np.arange(3000) == 7, 0.0, 1.0), "a random direction"),
}


@pytest.mark.parametrize("name", KINKS)
def test_a_kink_is_reported(name):
    fn, x, said = KINKS[name]
    with pytest.raises(KinkError, match=re.escape(said)), np.errstate(all="ignore"):
        gradcheck(fn, np.array(x))


def test_integers_have_no_gradient_to_check():
    with pytest.raises(TypeError, match="none of the inputs is floating-point"):
        gradcheck(lambda i: i, np.array([1, 2]))


def test_the_function_must_return_a_tensor():
    with pytest.raises(TypeError, match="must return a Tensor, got list"):
        gradcheck(lambda x: [x], A)


@pytest.mark.parametrize("fn", [np.square, np.sin])
def test_a_large_input_takes_few_evaluations(fn):
    calls = []
    slope = {np.square: lambda x: 2 * x, np.sin: np.cos}[fn]

    def counted(x):
        calls.append(1)
        return user_op(fn, lambda gy, x: (gy * slope(x),), x)

    assert gradcheck(counted, LARGE)
    assert len(calls) <= 1 + 2 + 4 * 4  # the backward pass, the repeated one, four points in each of four directions


def test_the_inputs_are_left_alone():
    x = Tensor(A.copy(), requires_grad=True)
    gradcheck(lambda x: x.exp(), x)
    np.testing.assert_array_equal(x.data, A)
    assert x.grad is None
