"""The models: against the same architecture in PyTorch, and what they promise about starting, masks and inputs."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name the field knows
from tolerances import assert_close
from torch_gpt import TorchGPT

import tensorlite as tl
from gpt import GPT, BigramLanguageModel, GPTConfig
from gpt.config import load_preset
from tensorlite import Tensor, grad, random
from tensorlite.optim import AdamW, clip_grad_norm_, decay_groups, learning_rate

torch.set_num_threads(1)  # at these sizes more threads only wait for each other

SMALL = {"vocab_size": 11, "block_size": 8, "n_layer": 1, "n_head": 2, "n_embd": 16}
SHAPES = {
    "GPT-2": {"n_layer": 3},
    "nanoGPT": {"activation": "gelu", "bias": False, "n_layer": 3, "n_head": 4},
    "lecture": {"activation": "relu", "qkv_bias": False, "head_bias": True, "tie_weights": False, "n_layer": 3},
    "one head, untied": {"activation": "gelu", "n_head": 1, "tie_weights": False},
    "biases of q, k, v alone": {"activation": "relu", "bias": False, "qkv_bias": True},
    "bias on a tied head": {"bias": False, "head_bias": True},
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)

# The largest relative error; these models show 1.5e-6 and 3e-15.
TOLERANCE = {np.float32: 1e-5, np.float64: 1e-12}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE)


def small(**options) -> GPTConfig:
    return GPTConfig(**SMALL | options)


def twins(shape, dtype) -> tuple[GPT, TorchGPT]:
    """Ours and PyTorch's, with the same weights."""
    reference = TorchGPT(small(**shape)).to(getattr(torch, np.dtype(dtype).name))
    model = GPT(small(**shape)).to(dtype=dtype)
    model.load_state_dict({name: weight.numpy() for name, weight in reference.state_dict().items()})
    return model, reference


def batch(T: int = 8, seed: int = 0):  # noqa: N803
    return np.random.default_rng(seed).integers(0, 11, (2, 4, T))


def assert_near(got, expected, tolerance: float, what: str) -> None:
    got, expected = np.asarray(got), expected.detach().numpy()
    assert got.dtype == expected.dtype, what
    assert got.shape == expected.shape, what
    error = np.abs(got - expected).max() / np.abs(expected).max()
    assert error < tolerance, f"{what}: off by {error:.1e}"


# --- against PyTorch ---


@every_dtype
@every_shape
def test_logits_loss_and_every_gradient(shape, dtype):
    model, reference = twins(shape, dtype)
    for length in (1, 5, 8):
        x, y = batch(length)
        logits, loss = model(x, y)
        expected_logits, expected_loss = reference(torch.tensor(x), torch.tensor(y))
        assert_near(logits.numpy(), expected_logits, TOLERANCE[dtype], "logits")
        assert_near(loss.numpy(), expected_loss, TOLERANCE[dtype], "loss")
        names, parameters = zip(*reference.named_parameters(), strict=True)
        ours = dict(model.named_parameters(remove_duplicate=False))
        gradients = grad(loss, [ours[name] for name in names])
        for name, got, expected in zip(names, gradients, torch.autograd.grad(expected_loss, parameters), strict=True):
            assert_near(got, expected, TOLERANCE[dtype], name)


@every_shape
def test_weights_go_to_pytorch_by_name(shape):
    model, reference = GPT(small(**shape), seed=3), TorchGPT(small(**shape))
    reference.load_state_dict({n: torch.from_numpy(a) for n, a in model.state_dict().items()}, strict=True)
    x, y = batch()
    assert_near(model(x)[0].numpy(), reference(torch.tensor(x), torch.tensor(y))[0], 1e-5, "logits")


@every_dtype
@every_shape
def test_ten_steps_of_training(shape, dtype):
    """AdamW with clipping, decay of matrices alone, warm-up over 3 steps and cosine decay until step 8."""
    model, reference = twins(shape, dtype)
    optimizer = AdamW(decay_groups(model.parameters(), 0.1), betas=(0.9, 0.99))
    parameters = list(reference.parameters())
    matrices, vectors = [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    expected_optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
    rates = [0.0025, 0.005, 0.0075, *(0.001 + 0.0045 * (1 + math.cos(math.pi * i / 5)) for i in range(5)), 0.001, 0.001]
    norms = []
    for step, rate in enumerate(rates):
        x, y = batch(seed=step)
        loss = model(x, y)[1]
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(clip_grad_norm_(optimizer.flat, 1.0)))
        optimizer.lr = learning_rate(step, 0.01, warmup=3, decay=8, minimum=0.001)
        optimizer.step()

        expected_optimizer.zero_grad()
        expected_loss = reference(torch.tensor(x), torch.tensor(y))[1]
        expected_loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in expected_optimizer.param_groups:
            group["lr"] = rate
        expected_optimizer.step()
        assert_near(loss.numpy(), expected_loss, TOLERANCE[dtype], f"loss of step {step}")
    assert max(norms) > 1.0, "nothing was clipped"
    for name, expected in reference.named_parameters():
        got = dict(model.named_parameters())[name].numpy()
        if name.endswith("c_attn.bias"):
            # The same bias on all keys moves all scores alike: its gradient is rounding, which Adam scales up to steps.
            got, expected = np.delete(got, slice(16, 32)), torch.cat([expected[:16], expected[32:]])
        assert_near(got, expected, TOLERANCE[dtype], name)


# --- against finite differences: each option on and off ---

OPTIONS = [
    {}, {"bias": False}, {"qkv_bias": False}, {"bias": False, "qkv_bias": True}, {"head_bias": True}, {"n_head": 1},
    {"activation": "gelu"}, {"activation": "relu"}, {"tie_weights": False}, {"dropout": 0.2},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_parameter_against_finite_differences(options):
    model, rng = GPT(small(n_layer=2, n_embd=8, **options)).to(dtype=np.float64), np.random.default_rng(0)
    for p in model.parameters():  # larger than they start, so that every gradient is large enough to be told from 0
        p.data[...] = 0.3 * rng.standard_normal(p.shape)
    x, y = batch(T=5)

    def loss():
        with random.scope(7):
            return model(x, y)[1]

    def slope(p, direction, h=1e-5):
        start, values = p.data.copy(), []
        for steps in (-2, -1, 1, 2):
            p.data[...] = start + steps * h * direction
            values.append(loss().item())
        p.data[...] = start
        return (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * h)

    names = {p: name for name, p in model.named_parameters()}
    for p, g in zip(names, grad(loss(), names), strict=True):
        everything, largest, some = rng.standard_normal(p.shape), np.zeros(p.shape), np.zeros(p.shape)
        largest.flat[np.abs(g).argmax()] = some.flat[rng.integers(p.size)] = 1.0
        for direction in (everything, largest, some):
            # Losses are near 3 and rounded to 2**-52 of that: 1e-15, in the quotient 1e-10.
            assert slope(p, direction) == pytest.approx(float((g * direction).sum()), rel=1e-7, abs=1e-9), names[p]


def test_targets_of_minus_100_are_not_counted():
    model, reference = twins({}, np.float64)
    x, y = batch()
    y[:, ::3] = -100
    assert_near(model(x, y)[1].numpy(), reference(torch.tensor(x), torch.tensor(y))[1], 1e-12, "loss")


def test_cross_attention():
    """The keys and values of another, longer sequence: what an encoder and a decoder would exchange."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((2, 3, length, 8)) for length in (4, 6, 6)]
    q, k, v = (Tensor(a, requires_grad=True) for a in arrays)
    expected_inputs = [torch.tensor(a, requires_grad=True) for a in arrays]
    y = tl.scaled_dot_product_attention(q, k, v, causal=False)
    expected = F.scaled_dot_product_attention(*expected_inputs)
    gy = rng.standard_normal(y.shape)
    gradients = torch.autograd.grad(expected, expected_inputs, torch.tensor(gy))
    for got, want in zip((y.data, *grad(y, [q, k, v], gy)), (expected, *gradients), strict=True):
        assert_close(got, want.detach().numpy())


# --- size and initial weights ---


@every_shape
def test_configuration_knows_the_number_of_parameters(shape):
    assert small(**shape).num_parameters() == GPT(small(**shape)).num_parameters()


def test_documented_numbers_of_parameters():
    presets = ("little-shakespeare", "nanogpt-cpu", "shakespeare-char", "lecture")
    counts = [replace(load_preset(name).gpt, vocab_size=65).num_parameters() for name in presets]
    assert counts == [209_729, 804_096, 10_745_088, 10_788_929]
    assert GPTConfig().num_parameters() == 124_439_808


@every_shape
def test_initial_weights(shape):
    config = small(**shape, n_embd=64)
    for name, p in GPT(config).named_parameters():
        w = p.numpy()
        assert w.dtype == np.float32
        if w.ndim == 1:
            assert (w == (1.0 if name.endswith("weight") else 0.0)).all(), name
            continue
        std = 0.02 / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 0.02
        assert w.std() == pytest.approx(std, rel=5 / math.sqrt(2 * w.size)), name  # five standard errors
        assert abs(w.mean()) < 5 * std / math.sqrt(w.size), name


@every_shape
def test_first_loss_is_that_of_a_uniform_guess(shape):
    model = GPT(small(**shape, vocab_size=65, block_size=32, n_embd=64))
    x, y = np.random.default_rng(0).integers(0, 65, (2, 64, 32))
    assert 4.17 < model(x, y)[1].item() < 4.23  # ln 65 = 4.174


@pytest.mark.parametrize("make", [lambda seed: GPT(small(), seed), lambda seed: BigramLanguageModel(11, seed=seed)])
def test_weights_are_a_function_of_the_seed(make):
    first, same, other = (make(seed).state_dict() for seed in (1, 1, 2))
    for name, weight in first.items():
        np.testing.assert_array_equal(weight, same[name])
        assert weight.ndim == 1 or not (weight == other[name]).any(), name


# --- time and masks ---


@every_shape
def test_no_position_sees_a_later_one(shape):
    model, _ = twins(shape, np.float32)
    x, _ = batch()
    before = model(x)[0].numpy()
    for t in range(8):
        changed = x.copy()
        changed[:, t] = (x[:, t] + 1) % 11
        after = model(changed)[0].numpy()
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert (after[:, t:] != before[:, t:]).any(axis=-1).all()


def test_dropout_is_a_function_of_seed_and_step():
    model, plain = GPT(small(dropout=0.3)), GPT(small())
    x, y = batch()

    def loss(seed=7, step=0):
        with random.scope(seed, step=step):
            return model(x, y)[1].item()

    assert loss() == loss()
    assert len({loss(), loss(step=1), loss(seed=8), plain(x, y)[1].item()}) == 4
    model.eval()
    assert loss() == loss(step=1) == plain(x, y)[1].item()


def test_masks_do_not_depend_on_how_the_batch_is_cut():
    model, _ = twins({"dropout": 0.3, "n_layer": 3}, np.float32)
    x, _ = batch()

    def logits(rows: slice):
        with random.scope(7, step=5, first_row=rows.start):
            return model(x[rows])[0].numpy()

    whole = logits(slice(0, 4))
    for cuts in ((0, 2, 4), (0, 1, 4), (0, 1, 2, 3, 4)):
        pieces = [logits(slice(start, stop)) for start, stop in zip(cuts, cuts[1:], strict=False)]
        assert_close(np.concatenate(pieces), whole)


# --- inputs ---

MODELS = {"GPT": lambda: GPT(small()), "BigramLanguageModel": lambda: BigramLanguageModel(11)}
every_model = pytest.mark.parametrize("name", MODELS)

IDS = np.zeros((2, 4), dtype=np.int64)
WRONG = {
    "too long": (np.zeros((2, 9), int), None, ValueError, "got sequences of 9 tokens, the model takes 1 to 8"),
    "empty": (np.zeros((2, 0), int), None, ValueError, "got sequences of 0 tokens, the model takes 1 to 8"),
    "one axis": (np.zeros(4, int), None, ValueError, r"expected token ids of shape \(B, T\), got \(4,\)"),
    "three axes": (np.zeros((2, 4, 1), int), None, ValueError, r"\(B, T\), got \(2, 4, 1\)"),
    "id too large": (IDS + 11, None, IndexError, "id 11 is out of range; the 11 ids go from 0 to 10"),
    "negative id": (IDS - 1, None, IndexError, "id -1 is out of range"),
    "ids with a point": (IDS * 1.0, None, TypeError, "expected integers, got float64"),
    "targets with a point": (IDS, IDS * 1.0, TypeError, "cross_entropy: expected integers, got float64"),
    "targets of another shape": (IDS, IDS[:, 1:], ValueError, r"got \(2, 4, 11\) and \(2, 3\)"),
    "target too large": (IDS, IDS + 11, IndexError, "cross_entropy: id 11 is out of range"),
}


@every_model
@pytest.mark.parametrize(("idx", "targets", "error", "message"), WRONG.values(), ids=WRONG)
def test_what_is_no_batch_is_explained(name, idx, targets, error, message):
    with pytest.raises(error, match=message):
        MODELS[name]()(idx, targets)


@every_model
def test_any_integers_are_tokens(name):
    model = MODELS[name]()
    x, y = batch()
    logits, loss = model(x, y)
    assert (logits.shape, logits.dtype, loss.shape, loss.dtype) == ((4, 8, 11), np.float32, (), np.float32)
    for kind in (Tensor, np.int32, np.uint8, np.ndarray.tolist, lambda a: Tensor(a.astype(np.int32))):
        assert model(kind(x), kind(y))[1].item() == loss.item()
    again, nothing = model(x)
    assert nothing is None
    np.testing.assert_array_equal(again.data, logits.data)
    assert_close(model.next_logits(np.concatenate([y, x], axis=1)), logits.numpy()[:, -1])


# --- the bigram model ---


def test_bigram_loss_and_gradient():
    model = BigramLanguageModel(11).to(dtype=np.float64)
    table = torch.tensor(model.token_table.numpy(), requires_grad=True)
    x, y = batch()
    loss = model(x, y)[1]
    expected = F.cross_entropy(F.embedding(torch.tensor(x), table).flatten(0, 1), torch.tensor(y).flatten())
    expected.backward()
    assert_near(loss.numpy(), expected, 1e-12, "loss")
    assert_near(grad(loss, model.parameters())[0], table.grad, 1e-12, "gradient")


def test_bigram_learns_the_counts():
    symbols, tokens = np.unique(list("the cat sat on the mat and ate the hat"), return_inverse=True)
    size = len(symbols)
    x, y = tokens[None, :-1], tokens[None, 1:]
    counts = np.zeros((size, size))
    np.add.at(counts, (x, y), 1)
    optimum = -np.log(counts[x, y] / counts[x].sum(axis=-1)).mean()

    model = BigramLanguageModel(size, block_size=x.size)
    optimizer = AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    for _ in range(300):
        loss = model(x, y)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert 0 < loss.item() - optimum < 0.01
