"""Special cases beside the general one: lengths of zero and one, infinities and NaN that a mask leaves out or another
sequence holds, long sums, rows of equal numbers. Against PyTorch, exact values, and the portable kernels."""

import itertools
import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name the field knows
from cases import torch_attention
from test_ops import FLOATS, assert_same, run, run_torch
from tolerances import assert_close

import tensorlite as tl
from tensorlite import Tensor, get_backend, grad, random
from tensorlite.backends.base import Backend

INF, NAN = np.inf, np.nan
RNG = np.random.default_rng(0)


def normal(*shape, dtype=np.float64):
    return np.random.default_rng(shape).standard_normal(shape).astype(dtype)


# -- axes of length 0 and 1: every op, forward and backward, as PyTorch has them --


def torch_layer_norm(x, *parameters, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], *parameters, eps=eps)


def split_and_join(x):
    return tl.concatenate(x.split(2)[::-1])


SHAPES = [(0,), (1,), (0, 3), (3, 0), (0, 0), (1, 3), (3, 1), (1, 1), (2, 0, 3), (0, 2, 3), (2, 3, 0), (1, 1, 3)]
UNARY = {
    "exp": (tl.exp, torch.exp), "tanh": (tl.tanh, torch.tanh), "relu": (tl.relu, torch.relu),
    "gelu": (tl.gelu, F.gelu), "gelu tanh": (lambda x: tl.gelu(x, "tanh"), lambda x: F.gelu(x, approximate="tanh")),
    "neg": (lambda x: -x,) * 2, "pow 0": (lambda x: x**0,) * 2, "pow 1": (lambda x: x**1,) * 2,
    "pow 2": (lambda x: x**2,) * 2, "add": (lambda x: x + x,) * 2, "mul": (lambda x: x * x,) * 2,
    "number": (lambda x: 2 / (x * x + 1),) * 2,
    "softmax": (tl.softmax, lambda x: x.softmax(-1)), "softmax 0": (lambda x: x.softmax(0),) * 2,
    "log_softmax": (tl.log_softmax, lambda x: x.log_softmax(-1)),
    "layer_norm": (tl.layer_norm, torch_layer_norm),
    "layer_norm with bias": (lambda x: tl.layer_norm(x, x.sum(tuple(range(x.ndim - 1))), bias=None),
                             lambda x: torch_layer_norm(x, x.reshape(-1, x.shape[-1]).sum(0) if x.numel() else
                                                        x.new_zeros(x.shape[-1]) + x.sum())),
    "sum": (lambda x: x.sum(),) * 2, "sum 0": (lambda x: x.sum(0),) * 2, "sum -1": (lambda x: x.sum(-1),) * 2,
    "mean": (lambda x: x.mean(),) * 2, "mean 0": (lambda x: x.mean(0),) * 2, "mean -1": (lambda x: x.mean(-1),) * 2,
    "transpose": (lambda x: x.transpose(0, -1),) * 2, "reshape": (lambda x: x.reshape(x.shape[::-1]),) * 2,
    "getitem": (lambda x: x[..., :1],) * 2, "ids": (lambda x: x[..., []],) * 2,
    "concatenate": (lambda x: tl.concatenate([x, x], -1), lambda x: torch.cat([x, x], -1)),
    "split": (split_and_join, lambda x: torch.cat(x.split(2)[::-1])),
    "where": (lambda x: tl.where(x > 0, x, 0.0), lambda x: torch.where(x > 0, x, 0.0)),
    "masked_fill": (lambda x: x.masked_fill(x > 0, 2.0),) * 2,
    "dropout": (lambda x: x.dropout(1.0), lambda x: x * 0),
    "sigmoid": (tl.sigmoid, torch.sigmoid), "silu": (tl.silu, F.silu), "sin": (tl.sin, torch.sin),
    "cos": (tl.cos, torch.cos), "abs": (tl.abs, torch.abs), "clip": (lambda x: x.clip(-0.1, 0.1),) * 2,
    "maximum": (lambda x: tl.maximum(x, -x), lambda x: torch.maximum(x, -x)),
    "minimum": (lambda x: tl.minimum(x, x), lambda x: torch.minimum(x, x)),
    "pow of exponents": (lambda x: (x * x) ** x,) * 2, "2 ** x": (lambda x: 2**x,) * 2,
    "var": (lambda x: x.var(correction=0),) * 2, "var 0": (lambda x: x.var(0, correction=0),) * 2,
    "var -1": (lambda x: x.var(-1, correction=0),) * 2, "std": (lambda x: x.std(correction=0),) * 2,
    "std 0": (lambda x: x.std(0, correction=0),) * 2, "cumsum 0": (lambda x: x.cumsum(0),) * 2,
    "cumsum -1": (lambda x: x.cumsum(-1),) * 2, "flatten": (lambda x: x.flatten(),) * 2,
    "flatten -1": (lambda x: x.flatten(-1),) * 2, "squeeze": (lambda x: x.squeeze(),) * 2,
    "squeeze 0": (lambda x: x.squeeze(0),) * 2, "expand_dims": (lambda x: x.expand_dims(-1), lambda x: x.unsqueeze(-1)),
    "broadcast_to": (lambda x: x.broadcast_to(2, *x.shape),) * 2,
    "stack": (lambda x: tl.stack([x, x], -1), lambda x: torch.stack([x, x], -1)),
    "tril": (lambda x: x.expand_dims(0).tril(), lambda x: x[None].tril()),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")  # PyTorch, of a variance of nothing
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", UNARY)
def test_lengths_of_zero_and_one(op, shape, backend):
    ours, theirs = UNARY[op]
    assert_same(run(ours, [normal(*shape)], backend), run_torch(theirs, [normal(*shape)]))


LENGTHS = (0, 1, 3)


@pytest.mark.parametrize(("N", "K", "M"), [*itertools.product(LENGTHS, repeat=3)])
def test_products_of_nothing(N, K, M, backend):  # noqa: N803
    x, w, b = normal(N, K), normal(M, K), normal(M)
    assert_same(run(tl.linear, [x, w, b], backend), run_torch(F.linear, [x, w, b]))
    assert_same(run(tl.linear, [x, w], backend), run_torch(F.linear, [x, w]))
    for shapes in (((N, K), (K, M)), ((2, N, K), (K, M)), ((2, N, K), (2, K, M)), ((K,), (K, M)), ((N, K), (K,))):
        arrays = [normal(*shape) for shape in shapes]
        assert_same(run(lambda a, b: a @ b, arrays, backend), run_torch(lambda a, b: a @ b, arrays))
    stacked = normal(2, N, K)
    assert_same(run(tl.linear, [stacked, w, b], backend), run_torch(F.linear, [stacked, w, b]))


@pytest.mark.parametrize(("T", "S", "D", "E"), [*itertools.product(LENGTHS, repeat=4)])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_of_and_to_nothing(T, S, D, E, causal, backend):  # noqa: N803
    if causal and T > S:
        return
    arrays = [normal(2, T, D), normal(2, S, D), normal(2, S, E)]
    got = run(lambda q, k, v: tl.scaled_dot_product_attention(q, k, v, causal=causal), arrays, backend)
    scale = {} if D else {"scale": 1.0}
    assert_same(got, run_torch(lambda q, k, v: torch_attention(q, k, v, causal=causal, **scale), arrays))


@pytest.mark.parametrize(("B", "T", "H"), [*itertools.product((0, 1, 2), (0, 1, 3), (1, 2))])
def test_self_attention_of_nothing(B, T, H, backend):  # noqa: N803
    y, gx = run(lambda x: tl.self_attention(x, H), [normal(B, T, 12)], backend)
    assert (y.shape, gx.shape) == ((B, T, 4), (B, T, 12))
    assert np.isfinite(gx).all()


@pytest.mark.parametrize(("V", "C", "N"), [*itertools.product((0, 1, 5, 512, 513), (0, 1, 3), (0, 1, 4))])
def test_embedding_of_nothing(V, C, N, backend):  # noqa: N803
    if N and not V:
        return
    arrays = [np.arange(N) % max(V, 1), normal(V, C)]
    assert_same(run(tl.embedding, arrays, backend), run_torch(F.embedding, arrays))


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize(("N", "V"), [(0, 5), (1, 1), (1, 5), (0, 0), (3, 1)])
def test_cross_entropy_of_nothing(N, V, reduction, backend):  # noqa: N803
    arrays = [normal(N, V), np.zeros(N, np.int64)]
    got = run(lambda x, t: tl.cross_entropy(x, t, reduction=reduction), arrays, backend)
    assert_same(got, run_torch(lambda x, t: F.cross_entropy(x, t, reduction=reduction), arrays))


# -- fast paths: the kernels of each backend against the portable ones --

portable = type("Portable", (Backend,), {"name": "portable", "xp": np, "erf": get_backend("numpy").erf})()


def layer_norm(be, gy, x, w, b, eps):
    y, saved = be.layer_norm(x, w, b, eps)
    return [y, *be.layer_norm_vjp(gy, saved, w, b is not None)]


def attention(be, gy, q, k, v, causal):
    y, saved = be.attention(q, k, v, causal, 0.5, None, 1.0)
    return [y, *be.attention_vjp(gy, q, k, v, saved, 0.5, 1.0)]


def embedding_vjp(be, gy, ids, rows):
    return [be.embedding_vjp(gy, ids, rows)]


KERNELS = {}
for n, c in itertools.product((1, 2, 31, 33, 100), (1, 2, 31, 64, 255, 256)):
    x, w, b = normal(n, c), normal(c), normal(c)
    for name, parameters in {"": (w, b), ", no bias": (w, None), ", plain": (None, None)}.items():
        KERNELS[f"layer_norm {n} x {c}{name}"] = (layer_norm, normal(c, n).T, x, *parameters, 1e-5)
    KERNELS[f"linear {n} x {c}"] = (lambda be, *a: [be.linear(*a)], x, normal(3, c), normal(3))
    KERNELS[f"sum_rows {n} x {c}"] = (lambda be, x: [be.sum_rows(x)], x)
    KERNELS[f"sum {n} x {c}"] = (
        lambda be, x: [be.sum(x, (0,)), be.sum(x, (1,)), be.sum(x, (0, 1)), be.sum(x.T, (0,))],
        x,
    )
for rows, n in itertools.product((1, 511, 512, 513), (1, 2, 511, 512, 513, 1500)):
    KERNELS[f"embedding {n} of {rows}"] = (embedding_vjp, normal(n, 3), RNG.integers(0, rows, n), rows)
for t, s, causal in (
    (1, 1, True), (1, 1, False), (1, 33, True), (31, 31, True), (33, 33, True), (65, 70, True), (2, 1, False),
):  # fmt: skip
    arrays = normal(t, 2, 3).swapaxes(0, 1), normal(2, t, 4), normal(2, s, 4), normal(2, s, 3)
    KERNELS[f"attention {t} {s} {causal}"] = (attention, *arrays, causal)
for n in (1, 1023, 1024, 1025, 5000):
    KERNELS[f"l2_norm {n}"] = (lambda be, x: [be.l2_norm(x)], normal(n))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", KERNELS)
def test_a_fast_path_gives_what_the_portable_kernel_does(name, dtype, backend):
    kernel, *args = KERNELS[name]
    cast = [a.astype(dtype) if isinstance(a, np.ndarray) and a.dtype.kind == "f" else a for a in args]
    expected = kernel(portable, *cast)
    got = kernel(backend, *(backend.asarray(a) if isinstance(a, np.ndarray) else a for a in cast))
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(backend.to_numpy(a), b)


# -- infinities and NaN that a mask leaves out --

MASKED = {
    "sqrt of relu": (lambda x: x.relu().sqrt(), [-1.0, 0.0, 4.0], [1.0, 1.0, 1.0], [0.0, NAN, 0.25]),
    "relu": (lambda x: x.relu(), [-1.0, 2.0, -INF], [INF, 1.0, NAN], [0.0, 1.0, 0.0]),
    "relu of NaN": (lambda x: x.relu(), [NAN, -1.0, 2.0], [1.0, 1.0, 1.0], [1.0, 0.0, 1.0]),
    "where": (lambda x: tl.where([True, False, False], x, 0.0), [1.0, 2.0, 3.0], [1.0, INF, NAN], [1.0, 0.0, 0.0]),
    "where, else": (lambda x: tl.where([True, False, True], 0.0, x), [1.0, 2.0, 3.0], [INF, 1.0, NAN], [0.0, 1.0, 0.0]),
    "masked_fill": (lambda x: x.masked_fill([True, False, True], 9.0), [NAN, 2.0, INF], [INF, 1.0, NAN],
                    [0.0, 1.0, 0.0]),
    "max": (lambda x: x.max(), [1.0, 3.0, 2.0], INF, [0.0, INF, 0.0]),
    "max of NaN": (lambda x: x.max(), [1.0, NAN, 2.0], 1.0, [0.0, 1.0, 0.0]),
    "pow 0": (lambda x: x**0, [0.0, INF, NAN], [1.0, INF, NAN], [0.0, 0.0, 0.0]),
    "dropout of all": (lambda x: x.dropout(1.0), [INF, NAN, 1.0], [1.0, INF, NAN], [0.0, 0.0, 0.0]),
    "getitem": (lambda x: x[1:2], [INF, 2.0, NAN], [INF], [0.0, INF, 0.0]),
}  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", MASKED)
def test_what_a_mask_leaves_out_is_zero(name, dtype, backend):
    fn, x, gy, expected = MASKED[name]
    if name == "sqrt of relu":
        x, gy, expected = (a[::2] for a in (x, gy, expected))
    with np.errstate(all="ignore"):
        t = Tensor(backend.asarray(x, dtype), requires_grad=True)
        y = fn(t)
        (gx,) = grad(y, [t], backend.asarray(gy, dtype))
    np.testing.assert_array_equal(backend.to_numpy(gx), np.array(expected, dtype))
    if name == "dropout of all":
        np.testing.assert_array_equal(backend.to_numpy(y.data), np.zeros(3, dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_dropout_selects(dtype, backend):
    x = np.full(64, INF, dtype)
    with random.scope(1):
        y = backend.to_numpy(tl.dropout(backend.asarray(x), 0.5).data)
    with random.scope(1):
        dropped = backend.to_numpy(tl.dropout(backend.asarray(np.ones(64, dtype)), 0.5).data) == 0
    np.testing.assert_array_equal(y, np.where(dropped, 0, INF))


@pytest.mark.parametrize("bad", [INF, NAN])
@pytest.mark.parametrize("rows", [5, 512, 513, 600])
def test_a_bad_gradient_reaches_the_row_of_its_id_alone(rows, bad, backend):
    gy = np.ones((4, 2), np.float32)
    gy[1, 0] = bad
    got = backend.to_numpy(backend.embedding_vjp(backend.asarray(gy), backend.asarray(np.array([0, 3, 3, 4])), rows))
    expected = np.zeros((rows, 2), np.float32)
    expected[[0, 4]], expected[3] = 1, [bad, 2]
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_target_that_is_ignored_is_worth_nothing(reduction, bad, backend):
    logits, targets = np.array([[1.0, 2.0, 3.0], [bad, 1.0, NAN], [0.0, 1.0, 2.0]], np.float32), [2, -100, 0]
    x = Tensor(backend.asarray(logits), requires_grad=True)
    with np.errstate(all="ignore"):
        loss = tl.cross_entropy(x, backend.asarray(np.array(targets)), reduction=reduction)
        gy = [1.0, bad, 1.0] if reduction == "none" else 1.0
        (gx,) = grad(loss, [x], backend.asarray(gy, np.float32))
    good = torch.tensor(logits[::2], requires_grad=True)
    want = F.cross_entropy(good, torch.tensor(targets[::2]), reduction=reduction)
    want.backward(torch.ones_like(want))
    got = backend.to_numpy(loss.data)
    assert_close(got[::2] if reduction == "none" else got, want.detach().numpy())
    assert_close(backend.to_numpy(gx)[::2], good.grad.numpy())
    np.testing.assert_array_equal(backend.to_numpy(gx)[1], [0, 0, 0])


# -- a NaN stays in its sequence --


def cross_entropies(x):
    ids = tl.backend_of(x.data).asarray(np.zeros((3, 4), np.int64))
    return tl.cross_entropy(x, ids, reduction="none")


OF_SEQUENCES = {
    "attention": lambda x: tl.scaled_dot_product_attention(x, x, x),
    "causal attention": lambda x: tl.scaled_dot_product_attention(x, x, x, causal=True),
    "attention, large scores": lambda x: tl.scaled_dot_product_attention(x * 30, x * 30, x),
    "attention, one key": lambda x: tl.scaled_dot_product_attention(x, x[:, :1], x[:, :1]),
    "self_attention": lambda x: tl.self_attention(x, 2),
    "layer_norm": tl.layer_norm,
    "softmax": tl.softmax,
    "log_softmax": tl.log_softmax,
    "gelu": tl.gelu,
    "max": lambda x: x.max(-1),
    "mean": lambda x: x.mean((1, 2)),
    "cross_entropy": cross_entropies,
    "product": lambda x: x @ x.transpose(),
}


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
@pytest.mark.parametrize("name", OF_SEQUENCES)
def test_a_bad_number_stays_in_its_sequence(name, bad, backend):
    """Exactly: the others' bits are those of a batch without it, but where attention's shift rounds them otherwise."""
    fn, x = OF_SEQUENCES[name], normal(3, 4, 6, dtype=np.float32)
    clean, spoilt = x.copy(), x.copy()
    spoilt[1, 2, 3] = bad
    with np.errstate(all="ignore"):
        results = [run(fn, [a], backend) for a in (clean, spoilt)]
    for before, after in zip(*results, strict=True):
        assert_close(after[[0, 2]], before[[0, 2]])
    assert bad == -INF or not all(np.isfinite(after[1]).all() for after in results[1])


@pytest.mark.parametrize("bad", [INF, NAN])
@pytest.mark.parametrize("T", [4, 40])
def test_a_later_key_cannot_spoil_an_earlier_query(T, bad, backend):  # noqa: N803
    q, k, v = (normal(1, T, 3, dtype=np.float32) for _ in range(3))
    k[0, -1] = bad
    with np.errstate(all="ignore"):
        y, *_ = run(lambda q, k, v: tl.scaled_dot_product_attention(q, k, v, causal=True), [q, k, v], backend)
    theirs = torch_attention(*map(torch.tensor, (q[:, :-1], k[:, :-1], v[:, :-1])), causal=True)
    assert_close(y[:, :-1], theirs.numpy())


# -- exact values --


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("causal", [False, True])
def test_attention_to_one_key_is_its_value(causal, dtype, backend):
    q, k, v = (normal(64, 1, 8, dtype=dtype) * s for s in (1, 3, 1))
    y, gq, gk, gv = run(lambda q, k, v: tl.scaled_dot_product_attention(q, k, v, causal=causal), [q, k, v], backend)
    np.testing.assert_array_equal(y, v)
    assert not gq.any()
    assert not gk.any()


def test_the_first_causal_query_sees_one_key(backend):
    q, k, v = (normal(3, 40, 8, dtype=np.float32) + i for i in range(3))
    y, gq, *_ = run(lambda q, k, v: tl.scaled_dot_product_attention(q, k, v, causal=True), [q, k, v], backend)
    np.testing.assert_array_equal(y[:, 0], v[:, 0])
    assert not gq[:, 0].any()
    assert gq[:, 1].any()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("value", [0.1, 10.1, 1000.1, 12345.678, 1e30, -3e38])
def test_layer_norm_of_equal_numbers_is_the_bias(value, rows, backend):
    for width in (1, 2, 7, 64, 384, 768, 1000):
        x, bias = np.full((rows, width), value, np.float32), normal(width, dtype=np.float32)
        y = tl.layer_norm(backend.asarray(x), backend.asarray(bias * 2), backend.asarray(bias))
        np.testing.assert_array_equal(backend.to_numpy(y.data), np.broadcast_to(bias, x.shape))


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_layer_norm_without_eps_of_a_constant_row_is_nan(rows, backend):
    x = normal(rows, 4)
    x[0] = 2.0
    with np.errstate(all="ignore"):
        y = backend.to_numpy(tl.layer_norm(backend.asarray(x), eps=0.0).data)
    assert np.isnan(y[0]).all()
    if rows > 1:
        assert_close(y[1:], torch_layer_norm(torch.tensor(x[1:]), eps=0.0).numpy())


QUANTISED = {
    "one element higher": lambda w: 1000.1 + 0.5 * (np.arange(w) == 0),
    "two values in turns": lambda w: 1000.1 + 0.1 * (np.arange(w) % 2),
    "nearer to zero": lambda w: 10.1 + 0.01 * (np.arange(w) % 2),
    "three values": lambda w: 100 + 0.01 * RNG.integers(0, 3, w),
    "an outlier first": lambda w: np.where(np.arange(w) == 0, 1e4, RNG.standard_normal(w)),
}


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", QUANTISED)
def test_layer_norm_of_nearly_equal_numbers(name, rows, backend):
    x = np.broadcast_to(QUANTISED[name](768), (rows, 768)).astype(np.float32)
    exact = run_torch(torch_layer_norm, [x.astype(np.float64)])
    theirs = run_torch(torch_layer_norm, [x])
    for got, right, reference in zip(run(tl.layer_norm, [x], backend), exact, theirs, strict=True):
        error, allowed = np.abs(got - right).max(), 10 * np.abs(reference - right).max()
        assert error <= max(allowed, 1e-5 * np.abs(right).max()), (error, allowed)


# -- long sums --

VALUES = (0.3, 0.7001, 1.9)


def relative_error(sums, value, rows) -> float:
    exact = float(np.float32(value)) * rows
    return float(np.abs(np.asarray(sums, np.float64) / exact - 1).max())


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("rows", [1000, 1_000_000])
def test_sums_over_first_axes_are_as_good_as_float32(rows, value, backend):
    x = backend.asarray(np.full((rows, 3), value, np.float32))
    w, b, bias = (Tensor(backend.asarray(np.zeros(s, np.float32)), requires_grad=True) for s in ((3, 2), 3, 3))
    sums = {
        "sum": tl.sum(x, 0).data,
        "sum of a transposed": tl.sum(x.T, 1).data,
        "mean": tl.mean(x, 0).data * rows,
        "two axes": tl.sum(x.reshape(rows // 10, 10, 3), (0, 1)).data,
        "middle axis": tl.sum(x.reshape(2, rows // 2, 3), 1).data * 2,
        "all": tl.sum(x).data / 3,
        "a broadcast bias": grad(Tensor(x) + bias, [bias], x)[0],
        "a broadcast factor": grad(Tensor(backend.xp.ones_like(x)) * b, [b], x)[0],
        "linear's bias": grad(tl.linear(x[:, :2], w, b), [b], x)[0],
        "layer_norm's bias": grad(tl.layer_norm(x, None, b), [b], x)[0],
        "sum_rows": backend.sum_rows(x),
    }
    errors = {name: relative_error(backend.to_numpy(total), value, rows) for name, total in sums.items()}
    assert max(errors.values()) < 1e-6, errors
    norm = backend.to_numpy(backend.l2_norm(x.reshape(-1)))
    assert abs(norm / (float(np.float32(value)) * np.sqrt(3 * rows)) - 1) < 1e-6


@pytest.mark.parametrize("rows", [5, 600])
def test_the_gradient_of_an_embedding_used_a_million_times(rows, backend):
    n = 1_000_000
    gy, ids = backend.asarray(np.full((n, 2), 0.3, np.float32)), backend.asarray(np.zeros(n, np.int64))
    assert relative_error(backend.to_numpy(backend.embedding_vjp(gy, ids, rows))[0], 0.3, n) < 1e-5


# -- memory --


def test_the_backward_of_an_embedding_needs_memory_for_gradients_alone():
    gy, ids = np.ones((20_000, 40), np.float32), np.zeros(20_000, np.int64)
    for rows in (512, 513):
        tracemalloc.start()
        get_backend("numpy").embedding_vjp(gy, ids, rows)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 * gy.nbytes


def test_only_what_is_said_to_shares_memory():
    x = Tensor(np.ones((2, 2), np.float32), requires_grad=True)
    shared = {"dropout": x.dropout(0.0), "eval": x.dropout(0.5, False), "reshape": x.reshape(4),
              "permute": x.permute(1, 0), "slice": x[:1], "cast": tl.cast(x, np.float32),
              "detach": x.detach()}  # fmt: skip
    copied = {"pow 1": x**1, "ids": x[[0, 1]], "relu": x.relu(), "sum": x.sum(()), "concatenate": tl.concatenate([x]),
              "where": tl.where(x > 0, x, x), "add": x + 0, "layer_norm": tl.layer_norm(x)}  # fmt: skip
    assert [name for name, y in shared.items() if not np.shares_memory(x.data, y.data)] == []
    assert [name for name, y in copied.items() if np.shares_memory(x.data, y.data)] == []


def spoil(array) -> None:
    array[...] = ~array if array.dtype == bool else 0


KEPT = {  # what is done with an index or a mask, which is then written over
    "getitem": (lambda x, i: x[i], np.array([1, 2, 2])),
    "getitem in a list": (lambda x, i: x[i, None], np.array([1, 2, 2])),
    "getitem of a Tensor": (lambda x, i: x[Tensor(i)], np.array([1, 2, 2])),
    "mask": (lambda x, i: x[i], np.array([False, True, True])),
    "where": (lambda x, i: tl.where(i, x, 0.0), np.array([False, True, True])),
    "masked_fill": (lambda x, i: x.masked_fill(i, 0.0), np.array([False, True, True])),
    "embedding": (lambda x, i: tl.embedding(i, x.reshape(3, 1)), np.array([1, 2, 2])),
    "cross_entropy": (lambda x, i: tl.cross_entropy(x, i), np.array(1)),
    "cross_entropy of rows": (lambda x, i: tl.cross_entropy(x.reshape(1, 3), i), np.array([1])),
}


@pytest.mark.parametrize("name", KEPT)
def test_indices_and_masks_are_kept_as_they_were(name, backend):
    fn, index = KEPT[name]
    gradients = []
    for change in (lambda i: None, spoil):
        x, i = Tensor(backend.asarray([1.0, 2.0, 3.0], np.float64), requires_grad=True), backend.asarray(index.copy())
        y = fn(x, i)
        change(i)
        gradients.append(backend.to_numpy(grad(y, [x], backend.xp.ones_like(y.data))[0]))
    np.testing.assert_array_equal(*gradients)
