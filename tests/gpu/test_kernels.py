"""Every CUDA kernel against the portable version in float64: on the CPU, in several thread orders, and on a GPU."""

import math

import numpy as np
import pytest
from cuda_on_cpu import thread_order
from ml_dtypes import bfloat16
from strict_cuda import logged
from tolerances import TOLERANCES

from tensorlite import BackendError, get_backend, random

DTYPES = (np.float64, np.float32, bfloat16)
ORDERS = (0, 1, 2, 7)  # ascending, descending, two shuffled ones
# A result is rounded to 8 bits, once; what a kernel sums is in float32. Attention also rounds its weights.
TOLERANCE = TOLERANCES | {np.dtype(bfloat16): (2**-8, 1e-5)}
ROUNDED_TWICE = {np.dtype(bfloat16): (2**-7, 2**-7)}


def normal(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).standard_normal(shape)


def ids(size, *shape):
    return np.random.default_rng((size, *shape)).integers(0, size, shape)


def keep(*shape):
    return normal(*shape, seed=5) > -0.5


CASES = {}


def case(name, call, *arrays, tolerance=TOLERANCE):
    """call(backend, *arrays) gives arrays; the floating-point ones among the inputs come in each dtype."""
    assert name not in CASES
    CASES[name] = call, arrays, tolerance


for n in (0, 1, 7, 33, 1000):
    for kernel in ("relu", "gelu", "gelu_tanh"):
        case(f"{kernel} {n}", lambda be, x, kernel=kernel: activation(be, kernel, x), 3 * normal(n))
    for kernel in ("relu_vjp", "gelu_vjp", "gelu_tanh_vjp"):
        case(
            f"{kernel} {n}", lambda be, gy, x, k=kernel: activation_vjp(be, k, gy, x), normal(n), 3 * normal(n, seed=1)
        )
    case(f"dropout {n}", lambda be, x, k: [be.dropout(x, k, 1.25)], normal(n), keep(n))
    case(
        f"dropout {n}, residual", lambda be, x, r, k: [be.dropout(x, k, 1.25, r)], normal(n), normal(n, seed=1), keep(n)
    )


def activation(be, kernel, x):
    y = getattr(be, kernel)(x) if kernel == "relu" else getattr(be, kernel)(x, False)[0]
    return [y]


def activation_vjp(be, kernel, gy, x):
    saved = be.relu(x) if kernel == "relu_vjp" else getattr(be, kernel.removesuffix("_vjp"))(x, True)[1]
    return [getattr(be, kernel)(gy, saved)]


def layer_norm(be, gy, x, weight, bias):
    y, saved = be.layer_norm(x, weight, bias, 1e-5)
    gradients = be.layer_norm_vjp(gy, saved, weight, bias is not None)
    return [y, *(g for g in gradients if g is not None)]


for shape in (
    (0, 8),
    (1, 1),
    (1, 31),
    (1, 32),
    (5, 7),
    (2, 3, 96),
    (300, 40),
    (3, 1000),
    (5000, 10),
    (2, 1031),
    (2, 7000),
    (2, 30_000),
):
    x, gy, parameters = normal(*shape) + 2, normal(*shape, seed=1), (normal(shape[-1]) + 1, normal(shape[-1], seed=1))
    case(f"layer_norm {shape}", layer_norm, gy, x, *parameters)
case("layer_norm, far from zero", lambda be, x: [be.layer_norm(x, None, None, 1e-5)[0]], normal(20, 100) + 300)
case("layer_norm, no bias", lambda be, gy, x, w: layer_norm(be, gy, x, w, None), normal(4, 9), normal(4, 9), normal(9))
case("layer_norm, bare", lambda be, gy, x: layer_norm(be, gy, x, None, None), normal(4, 9), normal(4, 9))

for shape in ((0, 33), (4, 0), (1, 3), (1, 31), (300, 70), (513, 32), (700, 264), (3000, 100)):
    case(f"sum_rows {shape}", lambda be, x: [be.sum_rows(x)], normal(*shape))

for rows, C in ((1, 1), (33, 65), (2100, 40), (3, 2300)):
    case(f"linear {rows} {C}", lambda be, *a: [be.linear(*a)], normal(rows, 9), normal(C, 9), normal(C))


def cross_entropy(be, logits, targets, gy):
    losses, saved = be.cross_entropy(logits, targets, -100)
    return [losses, be.cross_entropy_vjp(gy, saved, targets, -100)]


def among_others(be, x, before):
    """x as columns of a matrix of NaN whose rows begin at multiples of 16 bytes, so many of them before it."""
    (N, V), pack = x.shape, 16 // x.itemsize
    wide = be.xp.full((N, -(-(before + V) // pack) * pack), math.nan, x.dtype)
    wide[:, before : before + V] = x
    return wide[:, before : before + V]


for N, V in ((0, 3), (1, 1), (1, 3), (40, 65), (3, 1500), (2, 50_257)):
    targets = ids(V, N)
    targets[1::3] = -100
    arrays = 4 * normal(N, V), targets
    for rows in {1, N or 1}:
        case(f"cross_entropy {N} x {V}, {rows} gy", cross_entropy, *arrays, normal(rows))
    for before in (0, 1):
        case(f"cross_entropy {N} x {V}, {before} columns before",
             lambda be, x, *a, b=before: cross_entropy(be, among_others(be, x, b), *a), *arrays, normal(N))  # fmt: skip

for rows, N, C in (
    (600, 300, 40), (513, 1, 3), (600, 700, 300), (5, 300, 40), (1, 1, 1), (1, 40, 33), (512, 2, 31), (7, 0, 3),
    (3, 70, 1030), (600, 5, 1030), (40, 320, 32), (1, 700, 3), (65, 3000, 5), (1024, 90, 3), (50_257, 300, 3),
    (66_000, 50, 2),
):  # fmt: skip
    used = ids(min(rows, 30), N) * (rows // 30 or 1)
    used[::3] = ids(rows, len(used[::3])) // 512 * 512  # which of a large table are a block's
    case(f"embedding_vjp {rows} {N} {C}", lambda be, gy, i, n=rows: [be.embedding_vjp(gy, i, n)], normal(N, C), used)

for dtype in (np.uint8, np.uint16, np.int32):
    tokens, starts = ids(200, 500).astype(dtype), np.array([0, 483, 7, 7])
    case(f"gather_blocks {np.dtype(dtype)}", lambda be, t, s: be.gather_blocks(t, s, 16), tokens, starts)


def attention(be, gy, q, k, v, mask, causal):
    y, saved = be.attention(q, k, v, causal, 0.3, mask, 1.25 if mask is not None else 1.0)
    return [y, *be.attention_vjp(gy, q, k, v, saved, 0.3, 1.25 if mask is not None else 1.0)]


for causal in (False, True):
    for T, S, D, E in ((1, 1, 1, 1), (1, 33, 4, 4), (5, 9, 4, 3), (40, 300, 8, 8), (300, 300, 4, 4)):
        arrays = normal(2, 3, T, E), normal(2, 3, T, D), normal(2, 3, S, D, seed=1), normal(2, 3, S, E, seed=2)
        case(f"attention {T} {S} {D} {E} {causal}",
             lambda be, gy, q, k, v, causal=causal: attention(be, gy, q, k, v, None, causal),
             *arrays, tolerance=TOLERANCE | ROUNDED_TWICE)  # fmt: skip
        case(f"attention {T} {S} {D} {E} {causal}, dropout",
             lambda be, *arrays, causal=causal: attention(be, *arrays, causal),
             *arrays, keep(2, 3, S, T), tolerance=TOLERANCE | ROUNDED_TWICE)  # fmt: skip


def attention_of_next(be, qkv, cache, position):
    cache = cache.copy()
    return [be.attention_of_next(qkv, cache, position, 0.4), cache]


for position in (0, 1, 37, 39):
    for D in (5, 64):
        arrays = normal(2, 1, 3 * 3 * D), normal(2, 2, 3, 40, D)
        case(f"attention_of_next {position} {D}", attention_of_next, *arrays, np.array([position]))


def adamw(be, p, g, m, v, rates, scale):
    p, m, v = p.copy(), m.copy(), v.copy()
    be.adamw_step(p, g, m, v, rates, (0.9, 0.99), 0.1, scale)
    return [p, m, v]


for n in (0, 1, 1000):
    state = *(normal(n, seed=i) for i in range(3)), normal(n, seed=3) ** 2
    rates = np.array([1e-2, 3e-2, 1e-8])
    case(f"adamw_step {n}", adamw, *state, rates, np.array(0.5))
    case(f"adamw_step {n}, unscaled", lambda be, *a: adamw(be, *a, 1.0), *state, rates)
    case(f"adamw_step {n}, numbers", lambda be, *a: adamw(be, *a, (1e-2, 3e-2, 1e-8), 0.5), *state)
for n in (0, 1, 1000, 300_000):
    case(f"l2_norm {n}", lambda be, x: [be.l2_norm(x)], normal(n))

# Which results are in float32 where the arrays are in bfloat16: sums, and the gradients of parameters.
REAL = {"sum_rows": (0,), "embedding_vjp": (0,), "layer_norm": (2, 3), "cross_entropy": (0,), "l2_norm": (0,)}
EVERY = [(name, d) for name in CASES for d in DTYPES]


@pytest.mark.parametrize(("name", "dtype"), EVERY, ids=lambda x: x if isinstance(x, str) else np.dtype(x).name)
def test_a_kernel_computes_what_the_portable_version_does(name, dtype, cuda):
    call, arrays, tolerance = CASES[name]
    dtype, real = np.dtype(dtype), np.dtype(np.float32 if dtype == bfloat16 else dtype)
    rounded = [a.astype(dtype) if a.dtype.kind == "f" else a for a in arrays]
    if name.startswith(("layer_norm", "cross_entropy")):  # parameters, and gradients of losses, are never in bfloat16
        rounded = [
            a.astype(real) if r.dtype == dtype and r.ndim == 1 else r for a, r in zip(arrays, rounded, strict=True)
        ]
    exact = [a.astype(np.float64) if a.dtype == dtype or a.dtype == real else a for a in rounded]
    expected = call(get_backend("numpy"), *exact)
    results = []
    for order in ORDERS:
        with thread_order(order):
            results.append([cuda.to_numpy(a) for a in call(cuda, *map(cuda.asarray, rounded))])
    for again in results[1:]:
        for first, other in zip(results[0], again, strict=True):
            assert first.tobytes() == other.tobytes(), "the order of the threads makes a difference"
    for i, (got, want) in enumerate(zip(results[0], expected, strict=True)):
        kernel = name.replace(",", " ").split()[0]
        assert got.shape == want.shape
        assert got.dtype == (want.dtype if want.dtype.kind != "f" else real if i in REAL.get(kernel, ()) else dtype)
        got = got.astype(np.float64)
        assert np.isfinite(got).all(), "something was never written"
        rtol, atol = tolerance.get(dtype, TOLERANCE[dtype])
        np.testing.assert_allclose(got, want, rtol, atol * max(1.0, np.abs(want).max(initial=0.0)))


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize(
    ("element", "shape"), [(0, (3, 50)), (0, (16,)), (48, (4, 16)), (5, (1000,)), (17, (1,)), (0, ())]
)
def test_dropout_masks_are_numpys_bit_for_bit(p, element, shape, cuda):
    for place in (
        random.Place(0, random.DROPOUT, 0, 0, element),
        random.Place(random.MAX_SEED, random.DROPOUT, 2**40 + 3, 12, element + 16 * 2**20),
    ):
        expected, scale = get_backend("numpy").dropout_mask(place, shape, p)
        for order in ORDERS:
            with thread_order(order):
                got, got_scale = cuda.dropout_mask(place, shape, p)
            np.testing.assert_array_equal(cuda.to_numpy(got), expected)
            assert got_scale == scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("element", "n"), [(0, 1), (0, 16), (32, 1000), (5, 40)])
def test_drawing_and_dropping_at_once(element, n, residual, dtype, cuda):
    place = random.Place(3, random.DROPOUT, 7, 2, element)
    arrays = [cuda.asarray(normal(n, seed=i).astype(dtype)) for i in range(1 + residual)]
    expected_keep, expected_scale = get_backend("numpy").dropout_mask(place, (n,), 0.3)
    expected = cuda.dropout(arrays[0], cuda.asarray(expected_keep), expected_scale, *arrays[1:])
    for order in ORDERS:
        with thread_order(order):
            y, keep, scale = cuda.draw_dropout(arrays[0], place, 0.3, *arrays[1:])
        np.testing.assert_array_equal(cuda.to_numpy(keep), expected_keep)
        assert scale == expected_scale
        rtol, atol = TOLERANCE[np.dtype(dtype)]  # a GPU may round the product and the sum once or twice
        got, want = (cuda.to_numpy(a).astype(np.float64) for a in (y, expected))
        np.testing.assert_allclose(got, want, rtol, atol)


@pytest.mark.parametrize(("S", "T"), [(48, 48), (40, 20), (100, 64)])
def test_a_causal_mask_is_drawn_where_it_is_seen(S, T, cuda):  # noqa: N803
    place, shape = random.Place(3, random.DROPOUT, 7, 2, 0), (2, 3, S, T)
    expected, _ = get_backend("numpy").dropout_mask(place, shape, 0.3)
    got = cuda.to_numpy(cuda.dropout_mask(place, shape, 0.3, causal=True)[0])
    seen = np.arange(S)[:, None] <= np.arange(T) + S - T
    np.testing.assert_array_equal(got[..., seen], expected[..., seen])


def test_the_step_of_a_mask_may_lie_on_the_device(cuda):
    step = cuda.asarray(np.array([7], np.uint64))
    got, _ = cuda.dropout_mask(random.Place(3, random.DROPOUT, step, 2, 0), (40,), 0.5)
    expected, _ = get_backend("numpy").dropout_mask(random.Place(3, random.DROPOUT, 7, 2, 0), (40,), 0.5)
    np.testing.assert_array_equal(cuda.to_numpy(got), expected)


def test_large_scores_do_not_overflow(cuda):
    q = cuda.asarray(np.array([[[1e3], [-1e3]]], np.float32))
    y, _ = cuda.attention(q, q, q, True, 1.0, None, 1.0)
    np.testing.assert_array_equal(cuda.to_numpy(y), [[[1e3], [-1e3]]])
    losses, _ = cuda.cross_entropy(cuda.asarray(np.array([[1e4, -1e4, -math.inf]], np.float32)), cuda.asarray([0]), -1)
    np.testing.assert_array_equal(cuda.to_numpy(losses), [0.0])


def test_arrays_may_begin_anywhere_and_leave_gaps(cuda):
    x = cuda.asarray(normal(8, 34).astype(np.float32))
    np.testing.assert_array_equal(cuda.to_numpy(cuda.relu(x[0, 1:])), cuda.to_numpy(cuda.relu(x))[0, 1:])
    targets = cuda.asarray(ids(16, 8))
    losses = [cuda.cross_entropy(logits, targets, -1)[0] for logits in (x[:, ::2], x[:, ::2].copy(), x[:, 1:33:2])]
    np.testing.assert_array_equal(cuda.to_numpy(losses[0]), cuda.to_numpy(losses[1]))
    assert (cuda.to_numpy(losses[0]) != cuda.to_numpy(losses[2])).any()


def test_what_is_no_symbol_spoils_nothing_but_its_own_row(cuda):
    logits, targets = cuda.asarray(np.zeros((3, 4), np.float32)), cuda.asarray(np.array([4, 1, -1]))
    losses, saved = cuda.cross_entropy(logits, targets, -100)
    np.testing.assert_allclose(cuda.to_numpy(losses), [math.nan, math.log(4), math.nan], rtol=1e-6)
    glogits = cuda.cross_entropy_vjp(cuda.asarray(np.ones(3, np.float32)), saved, targets, -100)
    np.testing.assert_allclose(cuda.to_numpy(glogits), 0.25 - (np.arange(12) == 5).reshape(3, 4), rtol=1e-6)
    for rows, N in ((600, 3), (4, 90)):
        used = np.full(N, -1)
        used[:3] = rows, 3, rows + 512
        gweight = cuda.embedding_vjp(cuda.asarray(np.ones((N, 2), np.float32)), cuda.asarray(used), rows)
        np.testing.assert_array_equal(cuda.to_numpy(gweight), np.repeat([np.arange(rows) == 3], 2, 0).T)


# -- what a card has no room for --


def test_so_many_tokens_that_no_block_has_room_for_their_weights_are_refused(device):
    cache = device.xp.zeros((2, 1, 1, 60_000, 1), np.float32)
    with pytest.raises(
        BackendError, match=r"attention_of_next needs 240,000 bytes of shared memory .* 223,232 on a st"
    ):
        device.attention_of_next(device.xp.zeros((1, 1, 3), np.float32), cache, device.asarray([0]), 1.0)


# -- what has an axis of length 0 --


def linear(be, x, w, b, gy):
    return [be.linear(x, w, b), *be.linear_vjp(gy, x, w, True, True)]


EMPTY = {  # name -> call, the shapes that it takes, the shapes of the zeros that it gives; "ids" are of integers
    "relu_vjp": (lambda be, gy, y: [be.relu_vjp(gy, y)], ((2, 0), (2, 0)), ((2, 0),)),
    "dropout": (lambda be, x, r: [be.dropout(x, be.xp.ones((0,), bool), 2.0, r)], ((0,), (0,)), ((0,),)),
    "linear, no rows": (linear, ((2, 0, 3), (4, 3), (4,), (2, 0, 4)), ((2, 0, 4), (2, 0, 3), (4, 3), (4,))),
    "linear, no inputs": (linear, ((2, 3, 0), (4, 0), (4,), (2, 3, 4)), ((2, 3, 4), (2, 3, 0), (4, 0), (4,))),
    "linear, no outputs": (linear, ((2, 3, 4), (0, 4), (0,), (2, 3, 0)), ((2, 3, 0), (2, 3, 4), (0, 4), (0,))),
    "sum_rows": (lambda be, x: [be.sum_rows(x)], ((0, 3),), ((3,),)),
    "layer_norm, no rows": (layer_norm, ((2, 0, 3), (2, 0, 3), (3,), (3,)), ((2, 0, 3), (2, 0, 3), (3,), (3,))),
    "layer_norm, no columns": (layer_norm, ((2, 3, 0), (2, 3, 0), (0,), (0,)), ((2, 3, 0), (2, 3, 0), (0,), (0,))),
    "embedding_vjp, no ids": (lambda be, gy, i: [be.embedding_vjp(gy, i, 5)], ((2, 0, 3), "ids"), ((5, 3),)),
    "embedding_vjp, no columns": (lambda be, gy, i: [be.embedding_vjp(gy, i, 5)], ((2, 90, 0), "ids"), ((5, 0),)),
    "embedding_vjp, no table": (lambda be, gy, i: [be.embedding_vjp(gy, i, 0)], ((2, 0, 3), "ids"), ((0, 3),)),
    "cross_entropy": (cross_entropy, ((0, 5), "ids", (1,)), ((0,), (0, 5))),
    "l2_norm": (lambda be, x: [be.l2_norm(x)], ((0,),), ((),)),
    "adamw_step": (lambda be, *a: adamw(be, *a, (1e-2, 3e-2, 1e-8), 0.5), ((0,),) * 4, ((0,),) * 3),
}
for what, (B, H, T, S, D, E) in {
    "no queries": (2, 3, 0, 5, 4, 4),
    "no keys": (2, 3, 5, 0, 4, 4),
    "neither": (2, 3, 0, 0, 4, 4),
    "no batch": (0, 3, 5, 5, 4, 4),
    "no heads": (2, 0, 5, 5, 32, 32),
    "no values": (2, 3, 1, 5, 4, 0),
    "no queries for flash attention": (2, 3, 0, 5, 32, 32),
    "no keys for flash attention": (2, 3, 5, 0, 32, 32),
}.items():
    q, k, v, y = ((B, H, *rest) for rest in ((T, D), (S, D), (S, E), (T, E)))
    for dropped in (False, True):
        EMPTY[f"attention, {what}" + ", dropout" * dropped] = (
            lambda be, gy, q, k, v, d=dropped: attention(
                be, gy, q, k, v, be.xp.ones((*k.shape[:-1], q.shape[-2]), bool) if d else None, False
            ),
            (y, q, k, v),
            (y, q, k, v),
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EMPTY)
def test_an_axis_of_length_0_gives_zeros(name, dtype, cuda):
    call, taken, given = EMPTY[name]
    arrays = [ids(5, *taken[0][:-1]) if shape == "ids" else normal(*shape).astype(dtype) for shape in taken]
    if "linear" in name:
        arrays[2] *= 0  # the bias
        arrays[3] *= 0 if name == "linear, no inputs" else 1  # gy, whose sum is the bias's gradient
    results = [cuda.to_numpy(x) for x in call(cuda, *map(cuda.asarray, arrays))]
    assert [x.shape for x in results] == list(given)
    assert not any(x.astype(np.float64).any() for x in results)


def test_without_channels_every_key_weighs_the_same(cuda):
    q, k, v = (cuda.asarray(normal(2, n, 0 if n < 5 else 3, seed=n)) for n in (2, 4, 5))
    k, v = k[:, :4], v[:, :4]
    gy = cuda.asarray(normal(2, 2, 3))
    y, gq, gk, gv = (cuda.to_numpy(a) for a in attention(cuda, gy, q, k, v, None, False))
    np.testing.assert_allclose(y, cuda.to_numpy(v).mean(1, keepdims=True) + np.zeros((2, 2, 1)), 1e-12)
    np.testing.assert_allclose(gv, cuda.to_numpy(gy).sum(1, keepdims=True) / 4 + np.zeros((2, 4, 1)), 1e-12, 1e-15)
    assert (gq.shape, gk.shape) == (q.shape, k.shape)


# -- rows far from zero, and long sums --


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [1, 7, 64, 384, 768, 1000])
def test_layer_norm_sees_what_differs_and_nothing_else(C, dtype, cuda):  # noqa: N803
    dtype, real = np.dtype(dtype), np.dtype(np.float32 if dtype == bfloat16 else dtype)
    c, ones = np.arange(C), np.ones(C)
    equal = [level * ones for level in (0.0, 10.1, -1000.1, 12345.678, 1e30)]
    near = [1000.1 + 0.5 * (c == C // 2), 1000.1 + 0.5 * (c == 0), 1000.1 + 0.1 * (c % 2), 10.1 + 0.01 * (c % 2),
            100 + 0.01 * (c % 3), 1e6 * (c == 0) + 0.1 * c / C]  # fmt: skip
    x = np.array(equal + near).astype(dtype)
    gy, weight = normal(*x.shape).astype(dtype), (normal(C, seed=1) + 1).astype(real)
    exact = x.astype(np.float64) - x[:, :1].astype(np.float64)  # of which the layer norm is the same
    expected = layer_norm(get_backend("numpy"), gy.astype(np.float64), exact, weight.astype(np.float64), None)
    results = []
    for order in ORDERS:
        with thread_order(order):
            got = layer_norm(cuda, *(cuda.asarray(a) for a in (gy, x, weight)), None)
            results.append([cuda.to_numpy(a) for a in got])
    assert len({b"".join(a.tobytes() for a in result) for result in results}) == 1
    rtol, atol = TOLERANCE[dtype]
    for got, want in zip(results[0], expected, strict=True):
        got, want = got.astype(np.float64).reshape(-1, C), want.reshape(-1, C)
        scale = np.maximum(1.0, np.abs(want).max(1, keepdims=True))  # of each row by itself
        np.testing.assert_allclose(got / scale, want / scale, rtol, atol)
    y = results[0][0].astype(np.float64)
    assert not y[: len(equal)].any()


def test_layer_norm_of_equal_numbers_without_eps_is_undefined_there_alone(cuda):
    gy, x, weight = normal(3, 40), normal(3, 40), normal(40)
    x[1] = 10.1
    results = []
    for rows in ([0, 1, 2], [0, 2]):
        y, saved = cuda.layer_norm(cuda.asarray(x[rows]), cuda.asarray(weight), None, 0.0)
        gx, _, _ = cuda.layer_norm_vjp(cuda.asarray(gy[rows]), saved, cuda.asarray(weight), False)
        results.append((cuda.to_numpy(y), cuda.to_numpy(gx)))
    for got, want in zip(*results, strict=True):
        assert np.isnan(got[1]).all()
        np.testing.assert_array_equal(got[[0, 2]], want)


LONG = {  # name -> call, rows
    "sum_rows": (lambda be, x: be.sum_rows(x), 1_000_000),
    "l2_norm": (lambda be, x: be.l2_norm(x.reshape(-1)), 1_000_000),
    "linear_vjp": (lambda be, x: be.linear_vjp(x, x, be.xp.zeros((1, 1), x.dtype), True, False)[2], 1_000_000),
    "layer_norm_vjp": (lambda be, x: be.layer_norm_vjp(x, be.layer_norm(x, None, None, 1.0)[1], None, True)[2], 70_000),
    "embedding_vjp": (lambda be, x: be.embedding_vjp(x, be.xp.zeros(len(x), np.int64), 3), 100_000),
    "embedding_vjp, many rows": (lambda be, x: be.embedding_vjp(x, be.xp.zeros(len(x), np.int64), 9_000), 30_000),
}


@pytest.mark.parametrize("dtype", [np.float32, bfloat16])
@pytest.mark.parametrize("name", LONG)
def test_long_sums_are_precise(name, dtype, cuda):
    call, rows = LONG[name]
    x = np.full((rows, 1), 0.3, dtype)
    got = cuda.to_numpy(call(cuda, cuda.asarray(x))).reshape(-1)[0]
    want = float(x[0, 0]) * (math.sqrt(rows) if name == "l2_norm" else rows)
    assert got.dtype == np.float32
    assert abs(got - want) < 5e-7 * want  # and 1e-3 of it where each is added to the sum of all before


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_sum_with_an_infinite_term_is_infinite(value, cuda):
    x = normal(700, 3).astype(np.float32)
    x[40, 1] = value
    np.testing.assert_array_equal(np.isfinite(cuda.to_numpy(cuda.sum_rows(cuda.asarray(x)))), [True, False, True])
    np.testing.assert_equal(cuda.to_numpy(cuda.sum_rows(cuda.asarray(x)))[1], np.float32(value))
    np.testing.assert_equal(cuda.to_numpy(cuda.l2_norm(cuda.asarray(x.reshape(-1)))), np.abs(np.float32(value)))


# -- what masks hide, and what is to stay in its row --

BAD = (math.nan, math.inf)
ATTENTION = [(np.float64, 4), (np.float32, 4), (bfloat16, 4), (bfloat16, 32), (bfloat16, 64), (bfloat16, 128)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", BAD)
def test_what_a_mask_hides_may_be_anything(bad, dtype, cuda):
    real = np.float32 if dtype == bfloat16 else dtype

    def same(call, hidden, *arrays):
        """Whether call gives the same, and numbers, when the first array has `bad` where `hidden`."""
        spoilt = arrays[0].copy()
        spoilt[hidden] = bad
        got, want = (call(cuda.asarray(a), *map(cuda.asarray, arrays[1:])) for a in (spoilt, arrays[0]))
        for x, y in zip(got, want, strict=True):
            assert np.isfinite(cuda.to_numpy(y).astype(np.float64)).all()
            np.testing.assert_array_equal(cuda.to_numpy(x), cuda.to_numpy(y))

    x, y, kept = normal(50).astype(dtype), normal(50, seed=1).astype(dtype), keep(50)
    same(lambda gy, y: [cuda.relu_vjp(gy, y)], y <= 0, x, y)
    same(lambda x, k, r: [cuda.dropout(x, k, 1.25, r)], ~kept, x, kept, y)
    place = random.Place(3, random.DROPOUT, 7, 2, 0)
    drawn = get_backend("numpy").dropout_mask(place, (50,), 0.3)[0]
    same(lambda x, r: [cuda.draw_dropout(x, place, 0.3, r)[0]], ~drawn, x, y)

    logits, targets, gy = normal(4, 9).astype(dtype), np.array([3, -100, 0, -100]), normal(4).astype(real)
    same(lambda *a: cross_entropy(cuda, *a), targets < 0, logits, targets, gy)
    same(lambda gy, *a: cross_entropy(cuda, *a, gy)[1:], targets < 0, gy, logits, targets)

    T, S = 5, 9
    unseen, kept = np.arange(S)[:, None] > np.arange(T) + S - T, keep(S, T)
    scores, probs = (normal(S, T, seed=i).astype(dtype) for i in range(2))

    def softmax(scores):
        cuda._launch_columns("attention_softmax", scores, None, scores, True, 0.3, 1.0)
        return [scores]

    def softmax_vjp(g, probs, kept):
        cuda._launch_columns("attention_softmax_vjp", g, probs, kept, True, 0.3, 1.25)
        return [g]

    same(softmax, unseen, scores)
    same(softmax_vjp, unseen | ~kept, scores, probs, kept)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("T", [5, 70])
@pytest.mark.parametrize(("dtype", "D"), ATTENTION)
def test_no_query_meets_a_key_that_it_does_not_see(dtype, D, T, bad, cuda):  # noqa: N803
    S = T + 1
    gy, q, k, v = (normal(2, 1, n, D, seed=i).astype(dtype) for i, n in enumerate((T, T, S, S)))
    kept = np.ones((2, 1, S, T), bool)
    kept[:, :, 2] = False  # a key that all have dropped
    device = [cuda.asarray(a) for a in (gy, q, k, v, kept)]
    y, *gradients = (cuda.to_numpy(a) for a in attention(cuda, *device, True))
    gy, q, k, v, kept = device
    _, saved = cuda.attention(q, k, v, True, 0.3, kept, 1.25)

    spoilt = cuda.to_numpy(k)
    spoilt[:, :, -1] = bad  # that only the last query sees
    got = cuda.to_numpy(cuda.attention(q, cuda.asarray(spoilt), v, True, 0.3, kept, 1.25)[0])
    np.testing.assert_array_equal(got[:, :, :-1], y[:, :, :-1])
    spoilt = cuda.to_numpy(v)
    spoilt[:, :, 2] = bad
    got = cuda.attention_vjp(gy, q, k, cuda.asarray(spoilt), saved, 0.3, 1.25)
    for a, want in zip(got, gradients, strict=True):
        np.testing.assert_array_equal(cuda.to_numpy(a), want)
    spoilt = cuda.to_numpy(v)
    spoilt[:, :, -1] = bad
    got = cuda.attention_vjp(gy, q, k, cuda.asarray(spoilt), saved, 0.3, 1.25)
    np.testing.assert_array_equal(cuda.to_numpy(got[0])[:, :, :-1], gradients[0][:, :, :-1])
    spoilt = cuda.to_numpy(q)
    spoilt[:, :, 0] = bad  # it sees two keys
    _, saved = cuda.attention(cuda.asarray(spoilt), k, v, True, 0.3, kept, 1.25)
    got = cuda.to_numpy(cuda.attention_vjp(gy, cuda.asarray(spoilt), k, v, saved, 0.3, 1.25)[2])
    np.testing.assert_array_equal(got[:, :, 2:], gradients[2][:, :, 2:])


def token(be, qkv, cache):
    return attention_of_next(be, qkv, cache, be.asarray(np.array([7])))


ALONE = {  # name -> call, shapes of the arrays, of which each sequence or row is to stay by itself
    "layer_norm": (lambda be, gy, x: layer_norm(be, gy, x, None, None), ((3, 40), (3, 40))),
    "cross_entropy": (lambda be, x: cross_entropy(be, x, be.asarray(ids(9, 3)), be.xp.ones(1, x.dtype)), ((3, 9),)),
    "attention_of_next": (lambda be, x, c: token(be, x, c.swapaxes(0, 1))[:1], ((3, 1, 36), (3, 2, 2, 10, 6))),
    **{
        f"attention {T} {S} {D}{', dropout' * dropped}": (
            lambda be, *a, d=dropped: attention(be, *a, be.asarray(keep(3, 2, a[2].shape[2], a[1].shape[2]))
                                                if d else None, True),
            ((3, 2, T, D), (3, 2, T, D), (3, 2, S, D), (3, 2, S, D)),
        )
        for T, S, D in ((5, 9, 4), (5, 9, 32), (70, 100, 64), (40, 40, 128))
        for dropped in (False, True)
    },
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", ALONE)
def test_a_spoilt_sequence_spoils_no_other(name, bad, cuda):
    call, shapes = ALONE[name]
    for dtype in DTYPES if "attention" not in name or " 4" in name else (bfloat16,):
        arrays = [normal(*shape, seed=i).astype(dtype) for i, shape in enumerate(shapes)]
        clean = [cuda.to_numpy(a) for a in call(cuda, *map(cuda.asarray, arrays))]
        for i in range(len(arrays)):
            spoilt = [a.copy() for a in arrays]
            spoilt[i][1] = bad
            results = [cuda.to_numpy(a) for a in call(cuda, *map(cuda.asarray, spoilt))]
            for got, want in zip(results, clean, strict=True):
                np.testing.assert_array_equal(got[[0, 2]], want[[0, 2]])
            assert not all(np.isfinite(got.astype(np.float64)).all() for got in results), "the error is hidden"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "N"), [(3, 90), (600, 90)])
def test_a_gradient_reaches_no_row_but_its_own(rows, N, dtype, cuda):  # noqa: N803
    for bad in BAD:
        used, gy = ids(3, N), normal(N, 5).astype(dtype)
        gy[used == 1] = bad
        gweight = cuda.to_numpy(cuda.embedding_vjp(cuda.asarray(gy), cuda.asarray(used), rows))
        assert np.isfinite(np.delete(gweight, 1, axis=0)).all()
        np.testing.assert_array_equal(gweight[1], np.full(5, bad))


def test_a_table_s_gradient_is_made_in_little_memory(device):
    gy, used = device.asarray(normal(3000, 2)), device.asarray(ids(500, 3000))
    for rows, number in ((10, 2), (500, 1), (700, 1)):
        with logged() as launches:
            device.embedding_vjp(gy, used, rows)
        assert len(launches) == number
        assert max(math.prod(shape) for _, *arrays in launches for shape, *_ in arrays) <= gy.size


@pytest.mark.parametrize(("rows", "N", "C"), [(600, 300, 2), (65, 3000, 2), (600, 90, 1030), (3, 700, 1030)])
def test_blocks_that_sort_tokens_share_no_place(rows, N, C, cuda, monkeypatch):  # noqa: N803
    gy, used, launch, seen = np.ones((N, C), np.float32), ids(rows, N), cuda._launch, []
    monkeypatch.setattr(cuda, "_launch", lambda *args, **options: (seen.append(args), launch(*args, **options)))
    cuda.embedding_vjp(cuda.asarray(gy), cuda.asarray(used), rows)
    _, _, (_, pieces, _), _, _, _, order, *_ = seen[0]
    np.testing.assert_array_equal(np.sort(cuda.to_numpy(order)), np.tile(np.arange(N), (pieces, 1)))


# -- a query's only key --


@pytest.mark.parametrize("size", [1.0, 100.0])
@pytest.mark.parametrize(("dtype", "D"), ATTENTION)
def test_a_query_s_only_key_gives_its_value_and_takes_no_gradient(dtype, D, size, cuda):  # noqa: N803
    for T, S, causal in ((1, 1, True), (1, 1, False), (130, 1, False), (9, 9, True), (70, 70, True)):
        gy, q, k, v = (normal(2, 2, n, D, seed=i) for i, n in enumerate((T, T, S, S)))
        arrays = [a.astype(dtype) for a in (gy, size * q, size * k, v)]
        for kept in (None, keep(2, 2, S, T)):
            kept = None if kept is None else cuda.asarray(kept)
            y, gq, gk, gv = (cuda.to_numpy(a) for a in attention(cuda, *map(cuda.asarray, arrays), kept, causal))
            alone = slice(0, 1) if causal else slice(None)
            if kept is None:
                np.testing.assert_array_equal(y[:, :, alone], np.broadcast_to(arrays[3], y.shape)[:, :, alone]
                                              if S == 1 else arrays[3][:, :, :1])  # fmt: skip
            assert not gq[:, :, alone].astype(np.float64).any()
            if S == 1:
                assert not gk.astype(np.float64).any()
            if T == 1 and kept is None:
                np.testing.assert_array_equal(gv, arrays[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_token_gathers_its_own_value(dtype, cuda):
    qkv, cache = (100 * normal(2, 1, 3 * 3 * 5)).astype(dtype), np.full((2, 2, 3, 4, 5), math.nan).astype(dtype)
    y = cuda.attention_of_next(cuda.asarray(qkv), cuda.asarray(cache), cuda.asarray(np.array([0])), 0.4)
    np.testing.assert_array_equal(cuda.to_numpy(y), qkv[:, :, -15:])
