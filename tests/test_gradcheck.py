"""The checker is checked: wrong gradients planted in user-written ops are caught, right ones pass."""

import re

import numpy as np
import pytest

import tensorlite as tl
from tensorlite import GradcheckError, KinkError, Tensor, gradcheck, nn, random, record
from tensorlite.gradcheck import UndecidedWarning, check
from tensorlite.gradcheck.directions import DENSE, directions

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


class Scaled(nn.Module):
    """y = x * weight + bias, with a wrong gradient of the weight's element (1,) if it is `wrong`."""

    def __init__(self, wrong: bool = True, dtype=np.float32):
        self.weight = nn.Parameter(np.array([0.5, -1.0, 2.0], dtype))
        self.bias = nn.Parameter(np.array([0.1, 0.2, 0.3], dtype))
        self.offset = Tensor(np.array([1.0, 2.0, 3.0], dtype))
        self.wrong = wrong

    def forward(self, x):
        factor = np.where(np.arange(3) == 1, 2.0, 1.0)
        weight = self.weight
        if self.wrong:
            weight = record(weight.data, (weight,), lambda gy: (gy * factor.astype(gy.dtype),))
        return x * weight + self.bias + self.offset


def rms_norm(x, weight):
    return x / ((x * x).mean(-1, keepdims=True) + 1e-6).sqrt() * weight


def off_by_2(scales):
    """x * scales, with twice the gradient of the last element."""
    factor = np.where(np.arange(len(scales)) == len(scales) - 1, 2.0, 1.0)
    return op(lambda x: x * scales, lambda gy, x: (gy * scales * factor,))


SMALL = 0.01 * RNG.standard_normal((3, 8))
ROWS = RNG.standard_normal((2, 3))
FLOAT64_MODULE, MODULE = Scaled(wrong=False, dtype=np.float64), Scaled(wrong=False)

# Each was answered otherwise once. The function, its inputs, and the error with the words in it, or None if it passes.
FORMERLY = {
    "a Module with a wrong gradient": (Scaled(), [ROWS], GradcheckError, "weight, element (1,): expected"),
    "parameters that a function does not use": (
        lambda x, *p: FLOAT64_MODULE(x), [ROWS, *FLOAT64_MODULE.parameters()],
        GradcheckError, "input 1: the backward pass never reaches it", "gradcheck(module, x)",
    ),
    "parameters that a function does not use, and a module of float32": (
        lambda x, *p: x @ Tensor(MODULE.weight.data), [ROWS, *MODULE.parameters()],
        GradcheckError, "of which the module it is from knows nothing: write gradcheck(module, x)",
    ),
    "a gradient that is 0": (lambda x, y: x * 0.0 + y, [A, A], None),
    "log near 0": (lambda x: x.log(), [np.array([0.05, 1e-8, 1e8])], None),
    "sqrt near 0": (lambda x: x.sqrt(), [np.array([0.01, 1e-8])], None),
    "steep tanh": (lambda x: (50 * x).tanh(), [np.linspace(-1, 1, 9)], None),
    "layer norm of small inputs": (lambda x: tl.layer_norm(x, eps=1e-6), [SMALL], None),
    "RMSNorm of small inputs": (rms_norm, [SMALL, np.ones(8)], None),
    "steep exponential": (lambda x: (20 * x).exp(), [np.linspace(-1, 1, 9)], None),
    "a small gradient beside large ones": (off_by_2(np.array([1e6, 1e6, 1e-4])), [np.ones(3)], GradcheckError, "(2,)"),
    "the same in one sum": (
        lambda x: off_by_2(np.array([1e6, 1e6, 1e-4]))(x).sum(), [np.ones(3)], GradcheckError, "(2,)",
    ),
    "a slope that is steep at large steps": (
        lambda x: (2e6 * op(np.copy, lambda gy, x: (2 * gy,))(x) + 1) ** 3, [np.array(4e-8)],
        GradcheckError, "element ()",
    ),
    "inputs in brackets": (
        lambda x, w: x @ w, [(A, B)], TypeError, "write gradcheck(fn, a, b), not gradcheck(fn, (a, b))",
    ),
    "a vjp that returns an array": (
        op(np.sin, lambda gy, x: gy * np.cos(x)), [A],
        GradcheckError, "the vjp of user_op returned a bare ndarray", "`return (gx,)`",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMERLY)
def test_what_was_answered_otherwise_once(name):
    fn, inputs, error, *said = FORMERLY[name]
    if error is None:
        assert gradcheck(fn, *inputs)
        return
    with pytest.raises(error) as info:
        gradcheck(fn, *inputs)
    for words in said:
        assert words in str(info.value)


# What is wrong, the function, its inputs, and what the message must name: the input and the element.
WRONG = {
    "sign": (op(np.sin, lambda gy, x: (-gy * np.cos(x),)), [A], "input 0, element (0, 0)"),
    "1 % off": (op(np.sin, lambda gy, x: (1.01 * gy * np.cos(x),)), [A], "input 0, element (0, 0)"),
    "0.001 % off": (op(np.sin, lambda gy, x: (1.00001 * gy * np.cos(x),)), [A], "element (0, 0)"),
    "transposed": (
        op(np.matmul, lambda gy, x, y: ((gy @ y.T).T, x.T @ gy)), [SQUARE, SQUARE + 1], "input 0, element (0, 1)",
    ),
    "summed over the wrong axis": (
        op(np.add, lambda gy, x, b: (gy, gy.sum(axis=1))), [SQUARE, A[0, :3]], "input 1, element (0,)",
    ),
    "mean for the sum of a broadcast": (
        op(np.add, lambda gy, x, b: (gy, gy.mean(axis=0))), [A, B[:, 0]], "input 1, element (0,)",
    ),
    "factor forgotten on the second input": (
        op(lambda x, y: x + 2 * y, lambda gy, x, y: (gy, gy)), [A, A], "input 1, element (0, 0)",
    ),
    "zero": (op(np.sin, lambda gy, x: (0 * x,)), [A], "got 0 from"),
    "none": (
        op(lambda x, y: x * y, lambda gy, x, y: (gy * y, None)), [A, A],
        "input 1, element (0, 0)", "got 0 from", "does a vjp leave it out?",
    ),
    "nan": (
        op(np.sin, lambda gy, x: (np.where(x == x[1, 2], np.nan, gy * np.cos(x)),)), [A], "element (1, 2)", "got nan",
    ),
    "infinite": (op(np.sin, lambda gy, x: (gy * np.inf,)), [A], "element (0, 0)", "inf from the backward pass"),
    "one nan of many": (square_but(np.nan), [LARGE], "element (71, 13)", "got nan"),
    "one infinity of many": (square_but(np.inf), [LARGE], "element (71, 13)", "got inf"),
    "one use forgotten": (forgets_one_use, [A], "input 0, element (0, 0)"),
    "one element of many": (square_but(1e-3), [LARGE], "input 0, element (71, 13)"),
    "all of many": (op(np.square, lambda gy, x: (1.01 * 2 * gy * x,)), [LARGE], "input 0, element"),
    "writes into gy": (op(np.sin, writes_into_gy), [A], "the backward pass wrote into the gradient it was given"),
    "writes into its input": (op(writes_into_input, lambda gy, x: (2 * gy,)), [A], "wrote into input 0"),
    "writes into its input on the way back": (
        op(np.sin, lambda gy, x: (np.multiply(gy, np.cos(x), out=x),)), [A],
        "wrote into a saved array: arrays of user_op's vjp",
    ),
    "float32 inside": (float32_inside, [A], "float64 inputs gave a result of float32"),
    "result is a constant": (lambda x: Tensor(x.data), [A], "never reaches it, but the result moves with it"),
    "cut by detach": (lambda x, y: x.detach() * y, [A, A], "input 0: the backward pass never reaches it, but"),
    "an input is not used": (lambda x, y: x * 2, [A, A], "input 1: the backward pass never reaches it, nor does"),
    "result is not finite": (lambda x: x / (x - x[1, 2]), [A], "output 0, element (1, 2) is inf"),
    "input is not finite": (lambda x: x.sum(), [np.array([1.0, np.nan])], "input 0, element (1,) is nan"),
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
    "max at a tie": (lambda x: x.max(), [3.0, 1.0, 3.0], "element (0,)"),
    "absolute value": (lambda x: abs(x), [1.0, 0.0], "element (1,)"),
    "absolute value at 0": (lambda x: (x * x).sqrt(), [1.0, 0.0], "element (1,)"),
    "steep kink": (lambda x: x.relu() * 1000, [0.0], "element (0,)"),
    "small kink": (lambda x: x * x + x.relu() * 0.1, [0.0], "element (0,)"),
    "one kink of many": (lambda x: x.relu(), np.where(np.arange(3000) == 7, 0.0, 1.0), "element (7,)"),
}


@pytest.mark.parametrize("name", KINKS)
def test_a_kink_is_reported(name):
    fn, x, said = KINKS[name]
    with pytest.raises(KinkError, match=re.escape(said)), np.errstate(all="ignore"):
        gradcheck(fn, np.array(x))


def test_integers_have_no_gradient_to_check():
    with pytest.raises(TypeError, match="none of the inputs is floating-point"):
        gradcheck(lambda i: i, np.array([1, 2]))


def test_the_function_must_return_tensors():
    with pytest.raises(
        TypeError, match="a tuple, list or dict of Tensors, got ndarray; an op's result is made by record"
    ):
        gradcheck(lambda x: x.data, A)
    with pytest.raises(TypeError, match="must return a Tensor of floats"):
        gradcheck(lambda x: [x.argmax(), None], A)


@pytest.mark.parametrize("fn", [np.square, np.sin])
def test_a_large_input_takes_few_evaluations(fn):
    calls = []
    slope = {np.square: lambda x: 2 * x, np.sin: np.cos}[fn]

    def counted(x):
        calls.append(1)
        return user_op(fn, lambda gy, x: (gy * slope(x),), x)

    assert gradcheck(counted, LARGE)
    assert len(calls) <= 4 + 6 * 8  # the backward pass twice, two more, and eight points in each of six directions


def test_the_inputs_are_left_alone():
    x = Tensor(A.copy(), requires_grad=True)
    gradcheck(lambda x: x.exp(), x)
    np.testing.assert_array_equal(x.data, A)
    assert x.grad is None


# --- what a vjp may return ---

RETURNED = {
    "too few": (
        lambda gy, x, y: (gy,),
        "returned 1 gradients for its 2 inputs: return one for each, None for what has none",
    ),
    "a Tensor": (
        lambda gy, x, y: (Tensor(gy), gy),
        "returned for its input 0 a tensorlite.tensor.Tensor, expected a numpy",
    ),
    "a number": (
        lambda gy, x, y: (1.0, gy),
        "returned for its input 0 a builtins.float, expected a numpy.ndarray or None",
    ),
    "another dtype": (lambda gy, x, y: (gy, gy.astype(np.float32)), "input 1 a gradient of float32, expected float64"),
    "another shape": (lambda gy, x, y: (gy.T, gy), "input 0 a gradient of shape (4, 3), expected (3, 4)"),
    "None for all": (lambda gy, x, y: None, "the vjp of user_op returned a bare NoneType"),
}


@pytest.mark.parametrize("name", RETURNED)
def test_what_a_vjp_returns_is_named(name):
    vjp, said = RETURNED[name]
    with pytest.raises(GradcheckError, match=re.escape(said)):
        gradcheck(op(np.add, vjp), A, A)


def counting(x, calls=[]):  # noqa: B006 - state between calls is what it is about
    calls.append(1)
    factor = 1 + 1e-15 * len(calls)
    return record(x.data * 2, (x,), lambda gy: (gy * (2 * factor),))


def test_state_between_calls_is_found():
    with pytest.raises(
        GradcheckError, match="input 0: a second backward pass, over a fresh graph, gives another gradient"
    ):
        gradcheck(counting, A)


def test_an_array_kept_from_the_last_call_is_found():
    kept = {}

    def fn(x):
        kept["x"] = kept.get("later", x.data)
        kept["later"] = x.data
        saved = kept["x"]
        return record(np.sin(x.data), (x,), lambda gy: (gy * np.cos(saved),))

    with pytest.raises(GradcheckError, match="gives another gradient"):
        gradcheck(fn, A)


def test_what_wrong_elements_have_in_common_is_said():
    with pytest.raises(GradcheckError, match=r"; every wrong one is -1 times what is expected$"):
        gradcheck(*WRONG["sign"][:1], A)
    with pytest.raises(GradcheckError, match=r"0.333333 times .*; is the sum over a broadcast axis forgotten\?$"):
        gradcheck(*WRONG["mean for the sum of a broadcast"][:1], A, B[:, 0])
    with pytest.raises(GradcheckError, match=r"; is the sum over a broadcast axis forgotten\?$"):
        gradcheck(op(np.multiply, lambda gy, x, b: (gy * b, (gy * x)[0])), A, B[:, 0])


# --- what it takes ---


def test_inputs_in_tuples_lists_and_dicts():
    def fn(pair, named, n, scale=1.0):
        assert isinstance(n, int)
        return {"y": pair[0] * named["w"][1] * n, "z": (pair[1] * scale, None)}

    inputs = (A, A + 1), {"w": [A, A - 1]}, 3
    with pytest.raises(GradcheckError, match=r"input 1\['w'\]\[0\]: the backward pass never reaches it"):
        gradcheck(fn, *inputs)
    inputs[1]["w"][0] = 0  # passed on as it is
    assert gradcheck(fn, *inputs, kwargs={"scale": 2.5})


@pytest.mark.parametrize("name", ["input 0[1]", "scale"])
def test_nested_inputs_are_named(name):
    wrong = op(np.copy, lambda gy, x: (2 * gy,))

    def fn(pair, scale):
        return (
            pair[0]
            * (wrong(pair[1]) if name == "input 0[1]" else pair[1])
            * (wrong(scale) if name == "scale" else scale)
        )

    with pytest.raises(GradcheckError, match=re.escape(f"{name}, element (")):
        gradcheck(fn, (A, A), kwargs={"scale": 2.5})


def test_options_of_an_op_are_keyword_arguments():
    assert gradcheck(tl.self_attention, RNG.standard_normal((2, 4, 12)), kwargs={"n_head": 2, "causal": True})
    assert gradcheck(lambda x: x.exp(), [1.0, 2.0])  # a list of numbers is an array


def test_every_output_counts():
    wrong = op(np.sin, lambda gy, x: (gy,))
    with pytest.raises(GradcheckError, match="input 0, element"):
        gradcheck(lambda x: (1e9 * x, wrong(x)), A)
    assert gradcheck(lambda x: x.split(2), A[:, :2].T.copy())


class Raises(Scaled):
    def forward(self, x):
        super().forward(x)
        raise RuntimeError("on purpose")


class Tied(nn.Module):
    def __init__(self, wrong: bool = False):
        self.a = Scaled(wrong)
        self.b = self.a
        self.head = nn.Linear(3, 2)
        self.alias = self.head.weight
        self.frozen = nn.Parameter(np.ones(2, np.float32))
        self.frozen.requires_grad = False

    def forward(self, x):
        assert x.dtype == self.head.weight.dtype == self.frozen.dtype == self.a.offset.dtype == np.float64
        return self.head(self.b(self.a(x))) * self.frozen

    def loss(self, x):
        return self(x).sum()


def state_of(module):
    tensors = [t for m in module.modules() for t in vars(m).values() if isinstance(t, Tensor)]
    return [(t, t.data, t.data.dtype, t.data.tobytes(), t.grad, t.requires_grad) for t in tensors], [
        (m, m.training) for m in module.modules()
    ]


def same(before, after) -> bool:
    (tensors, modes), (tensors2, modes2) = before, after
    return modes == modes2 and all(
        a[0] is b[0] and a[1] is b[1] and a[2:4] == b[2:4] and a[4] is b[4] and a[5] == b[5]
        for a, b in zip(tensors, tensors2, strict=True)
    )


@pytest.mark.parametrize(
    ("module", "error"), [(Tied(), None), (Tied(wrong=True), GradcheckError), (Raises(), RuntimeError)],
    ids=["right", "wrong", "raises"],
)  # fmt: skip
def test_a_module_is_left_as_it_was(module, error):
    module.eval()
    for p in module.parameters():
        p.grad = np.full(p.shape, 7, np.float32)
    before = state_of(module)
    if error:
        with pytest.raises(error):
            gradcheck(module, ROWS)
    else:
        assert gradcheck(module, ROWS)
        assert gradcheck(module.loss, ROWS)
        assert gradcheck(lambda m, x: m(x), module, ROWS)
    assert same(before, state_of(module))
    assert {p.grad.max() for p in module.parameters()} == {7}


def test_parameters_go_by_their_names():
    with pytest.raises(GradcheckError, match=r"gradcheck: a\.weight, element \(1,\): "):
        gradcheck(Tied(wrong=True), ROWS)
    with pytest.raises(GradcheckError, match=r"gradcheck: input 0\.weight, element \(1,\): "):
        gradcheck(lambda m, x: m(x), Scaled(), ROWS)


# --- other dtypes ---


@pytest.mark.parametrize("fn", [rms_norm, lambda x, w: (x * w).softmax() @ w, lambda x, w: (x * w).gelu()])
def test_float32_is_checked_against_the_float64_function(fn):
    seen = set()

    def watched(x, w):
        seen.add(x.dtype.name)
        return fn(x, w)

    assert gradcheck(watched, A, A[0] + 2, dtype="float32")
    assert seen == {"float32", "float64"}
    assert gradcheck(Scaled(wrong=False), ROWS, dtype="float32")


def test_a_wrong_float32_gradient_is_caught():
    """Right in float64, where nobody trains."""

    def vjp(gy, x):
        return (gy * np.cos(x) * (1 + 1e-3 * (x.dtype == np.float32)),)

    assert gradcheck(op(np.sin, vjp), A)
    with pytest.raises(GradcheckError, match="input 0, element"):
        gradcheck(op(np.sin, vjp), A, dtype="float32")
    with pytest.raises(GradcheckError, match="float32 inputs gave a result of float64"):
        gradcheck(op(lambda x: x * np.float64(2), lambda gy, x: (gy * 2,)), A, dtype="float32")


def test_bfloat16_only_where_the_backend_has_it():
    with pytest.raises(tl.BackendError, match="the numpy backend has no bfloat16"):
        gradcheck(lambda x: x.exp(), A, dtype="bfloat16")


def test_bfloat16(device):
    assert gradcheck(lambda x, w: (x * w).tanh(), A, A[0], backend="cupy", dtype="bfloat16")
    with pytest.raises(GradcheckError, match="input 0, element"):
        gradcheck(lambda x: x * 2 + Tensor(x.data), A, backend="cupy", dtype="bfloat16")


# --- tolerances, steps, and what cannot be decided ---


def test_a_tolerance_of_ones_own():
    fn = op(np.sin, lambda gy, x: (gy * np.cos(x) * 1.001,))
    assert gradcheck(fn, A, rtol=1e-2)
    assert gradcheck(fn, A, atol=1e-1)


def test_no_step_is_larger_than_asked_for():
    farthest = []

    def fn(x):
        farthest.append(np.abs(x.data - A).max())
        return x.exp()

    assert gradcheck(fn, A, step=1e-3)
    assert max(farthest) == pytest.approx(1e-3)


def test_a_function_may_raise_for_what_it_is_not_defined_for():
    import math

    fn = op(np.vectorize(math.log), lambda gy, x: (gy / x,))
    assert gradcheck(fn, np.array([0.05, 0.2]))


@pytest.mark.parametrize("x", [1.0, 3.0])
def test_what_rounding_hides_is_undecided(x):
    """Sine of a number of which only the first digits are known."""
    with pytest.warns(
        UndecidedWarning, match="1 of 1 gradients are not checkable here; input 0, element .*: the quotient"
    ):
        assert gradcheck(lambda x: (1e15 * x).sin(), x)
    report = check(lambda x: (1e15 * x).sin(), x)
    assert (report.compared, report.undecided, report.error) == (1, 1, None)


def test_a_report_has_the_worst_elements():
    report = check(square_but(np.inf), LARGE)
    assert (report.worst[0].name, report.worst[0].index, report.ratio) == ("input 0", (71, 13), np.inf)
    assert report.error.report is report
    report = check(lambda x: x.exp(), A)
    assert report.compared == 12
    assert len(report.worst) == 10
    assert report.error is None
    assert 0 < report.ratio < 1
    assert report.worst[0].error < 1e-6


# --- directions ---


def test_every_exchanged_pair_is_found():
    n, missed = 3000, 0
    x, c = RNG.standard_normal((2, n))

    def exchanging(i, j):
        wrong = c.copy()
        wrong[[i, j]] = c[[j, i]]
        return op(lambda x: x * c, lambda gy, x: (gy * wrong * (gy != 0),))

    for _ in range(100):
        i, j = RNG.choice(n, 2, replace=False)
        report = check(exchanging(i, j), x)
        missed += report.error is None or report.worst[0].index not in ((i,), (j,))
    assert missed == 0


def test_the_chance_of_missing_a_pair_is_what_the_docstring_says():
    """In units of tau: pairs of a million elements with gradients that differ by 10, which are easy to miss."""
    n, pairs, delta = 1_000_000, 200_000, 10.0
    i, j = RNG.integers(n, size=(2, pairs))
    seen = [np.abs(delta * (d[i] - d[j])) > 1 for d in list(directions(n, np.random.default_rng(0)))[:DENSE]]
    apart = i != j
    for s in seen:
        assert 1 - s[apart].mean() == pytest.approx(1 / 3**0.5 / delta, rel=0.05)
    missed = ~np.any(seen, axis=0)[apart]
    assert missed.mean() <= 3 * (1 / 3**0.5 / delta) ** DENSE


@pytest.mark.parametrize("error", [1e-4, 1e-6])
def test_one_wrong_element_of_many_is_named(error):
    with pytest.raises(GradcheckError, match=r"element \(71, 13\)"):
        gradcheck(square_but(error), LARGE)


def test_an_error_that_cancels_along_signs_is_found():
    """Half of the elements too large, half too small, by the same."""
    error = np.where(np.arange(LARGE.size) % 2, 1e-3, -1e-3).reshape(LARGE.shape)
    with pytest.raises(GradcheckError, match="element"):
        gradcheck(op(np.square, lambda gy, x: (2 * gy * x + error,)), LARGE)
