"""Programs as a reader of the usual lectures types them, with `tensorlite` in the place of `torch`, learn something."""

import math

import numpy as np
import pytest
import torch as pytorch

import tensorlite
import tensorlite as torch
import tensorlite.nn.functional as F  # noqa: N812 - the name the field knows
from tensorlite import Tensor, nn, words

TEXT = "the quick brown fox jumps over the lazy dog and runs away " * 20
CHARS = sorted(set(TEXT))
IDS = torch.tensor([CHARS.index(c) for c in TEXT])
BLOCK, BATCH = 8, 16


def get_batch(rng, block_size: int = BLOCK):
    starts = rng.integers(len(IDS) - block_size, size=BATCH)
    x = torch.stack([IDS[i : i + block_size] for i in starts])
    return x, torch.stack([IDS[i + 1 : i + block_size + 1] for i in starts])


def generate(model, idx, max_new_tokens: int, rng):
    for _ in range(max_new_tokens):
        logits, _ = model(idx[:, -BLOCK:])
        probs = F.softmax(logits[:, -1, :], axis=-1)
        chosen = [[rng.choice(len(p), p=np.float64(p) / np.float64(p).sum())] for p in probs.tolist()]
        idx = torch.concatenate((idx, torch.tensor(chosen)), axis=1)
    return idx


class Bigram(nn.Module):
    def __init__(self, vocab_size: int):
        super().__init__()
        self.table = nn.Embedding(vocab_size, vocab_size)

    def forward(self, idx, targets=None):
        return scored(self.table(idx), targets)


def scored(logits, targets):
    if targets is None:
        return logits, None
    B, T, C = logits.shape
    return logits, F.cross_entropy(logits.view(B * T, C), targets.view(B * T))


class Head(nn.Module):
    """One head of causal self-attention."""

    def __init__(self, n_embd: int, head_size: int):
        super().__init__()
        self.key = nn.Linear(n_embd, head_size, bias=False)
        self.query = nn.Linear(n_embd, head_size, bias=False)
        self.value = nn.Linear(n_embd, head_size, bias=False)
        self.register_buffer("tril", torch.tril(torch.ones(BLOCK, BLOCK)))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        _, T, C = x.shape
        k, q = self.key(x), self.query(x)
        wei = q @ k.transpose(-2, -1) * C**-0.5
        wei = wei.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        wei = self.dropout(F.softmax(wei, axis=-1))
        return wei @ self.value(x)


class Transformer(nn.Module):
    def __init__(self, vocab_size: int, n_embd: int = 16, n_head: int = 2):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, n_embd)
        self.positions = nn.Embedding(BLOCK, n_embd)
        self.heads = [Head(n_embd, n_embd // n_head) for _ in range(n_head)]
        self.feed_forward = nn.Sequential(nn.Linear(n_embd, 4 * n_embd), nn.ReLU(), nn.Linear(4 * n_embd, n_embd))
        self.ln1, self.ln2, self.ln3 = (nn.LayerNorm(n_embd) for _ in range(3))
        self.lm_head = nn.Linear(n_embd, vocab_size)

    def forward(self, idx, targets=None):
        _, T = idx.shape
        x = self.tokens(idx) + self.positions(torch.arange(T))
        y = self.ln1(x)
        x = x + torch.concatenate([head(y) for head in self.heads], axis=-1)
        x = x + self.feed_forward(self.ln2(x))
        return scored(self.lm_head(self.ln3(x)), targets)


@pytest.mark.parametrize(("make", "steps", "least"), [(Bigram, 150, 1.5), (Transformer, 150, 1.2)])
def test_language_models_of_the_lectures(make, steps, least):
    torch.manual_seed(1337)
    rng = np.random.default_rng(0)
    model = make(len(CHARS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2 if make is Transformer else 1e-1)
    for _ in range(steps):
        xb, yb = get_batch(rng)
        _, loss = model(xb, yb)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    assert loss.item() < least < math.log(len(CHARS))
    assert f"{loss:.2f}" == f"{loss.item():.2f}"
    model.eval()
    with torch.no_grad():
        idx = generate(model, torch.zeros((1, 1), dtype=np.int64), 40, rng)
    text = "".join(CHARS[i] for i in idx[0].tolist())
    assert len(text) == 41
    assert any(word in TEXT.split() for word in text.split())


def scalar_expression(a, b):
    c = a * b - 3
    d = (c**2 + b) / 2.0
    d += 1 + d.relu() - (-a)
    e = 10.0 / d
    e *= a
    return e + c * 2**b


def test_an_expression_of_scalars():
    results = []
    for make in (Tensor, pytorch.tensor):
        a, b = make(-4.0, requires_grad=True), make(2.0, requires_grad=True)
        y = scalar_expression(a, b)
        y.backward()
        results.append([f"{value:.4f}" for value in (y, a.grad, b.grad)])
    assert results[0] == results[1]


def two_moons(n: int, rng):
    angle = math.pi * torch.tensor(rng.random(n).astype(np.float32))
    upper = torch.stack([angle.cos(), angle.sin()], axis=1)
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], axis=1)
    x = torch.concatenate([upper, lower])
    return x + 0.1 * torch.randn(x.shape), np.repeat([0, 1], n)


@pytest.mark.parametrize(
    ("make", "how"), [(torch.optim.AdamW, {"lr": 0.05}), (torch.optim.SGD, {"lr": 0.3, "momentum": 0.9})]
)
def test_a_perceptron_tells_two_moons_apart(make, how):
    x, y = two_moons(100, np.random.default_rng(0))
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    optimizer = make(model.parameters(), **how)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y, label_smoothing=0.01).backward()
        optimizer.step()
    accuracy = (model(x).argmax(axis=1) == y).mean()
    assert accuracy > 0.97


def test_a_recurrent_cell_remembers_the_first_bit():
    rng = np.random.default_rng(0)
    cell, out = nn.Linear(1 + 8, 8), nn.Linear(8, 1)
    optimizer = torch.optim.AdamW([*cell.parameters(), *out.parameters()], lr=0.02)
    for _ in range(120):
        bits = torch.tensor(rng.integers(0, 2, (32, 5)), dtype=np.float32)
        h = torch.zeros(32, 8)
        for t in range(5):
            h = torch.tanh(cell(torch.concatenate([bits[:, t : t + 1], h], axis=1)))
        p, y = torch.sigmoid(out(h)).squeeze(1), bits[:, 0]
        loss = -(y * torch.log(p) + (1 - y) * torch.log(1 - p)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_a_variational_autoencoder_learns():
    rng = np.random.default_rng(0)
    data = torch.tensor(rng.standard_normal((64, 2)) @ rng.standard_normal((2, 8)), dtype=np.float32)
    encoder, decoder = nn.Linear(8, 2 * 2), nn.Sequential(nn.Linear(2, 16), torch.silu, nn.Linear(16, 8))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *decoder.parameters()], lr=0.02)
    losses = []
    for _ in range(150):
        mu, logvar = encoder(data).split(2, axis=1)
        logvar = logvar.clip(-10, 10)
        z = mu + torch.exp(0.5 * logvar) * torch.randn(mu.shape)
        kl = -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(axis=1).mean()
        loss = ((decoder(z) - data) ** 2).sum(axis=1).mean() + 0.1 * kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.3 * losses[0]


def test_cross_attention_finds_what_the_mask_leaves():
    rng = np.random.default_rng(0)
    query, key, value = (nn.Linear(4, 8) for _ in range(3))
    head = nn.Linear(8, 4)
    layers = nn.Sequential(query, key, value, head)
    optimizer = torch.optim.AdamW(layers.parameters(), lr=0.02)
    for _ in range(100):
        memory, asked = torch.tensor(rng.standard_normal((16, 5, 4)), dtype=np.float32), torch.zeros(16, 1, 4)
        seen = np.arange(5) == rng.integers(0, 5, (16, 1, 1))  # one key each
        y = F.scaled_dot_product_attention(query(asked), key(memory), value(memory), attn_mask=seen)
        target = memory[np.arange(16), seen[:, 0].argmax(1)]
        loss = ((head(y).squeeze(1) - target) ** 2).mean()
        layers.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    assert loss < 0.05


# -- what cannot run as it stands answers with the word to write --

X = Tensor(np.ones((2, 3), np.float32))
ANSWERS = [
    (lambda: X.sum(dim=1), TypeError, "sum: write axis= instead of dim="),
    (lambda: X.mean(1, keepdim=True), TypeError, "mean: write keepdims= instead of keepdim="),
    (lambda: X.var(unbiased=False), TypeError, "var: write correction= instead of unbiased="),
    (lambda: F.softmax(X, dim=-1), TypeError, "softmax: write axis= instead of dim="),
    (lambda: torch.concatenate([X, X], dim=1), TypeError, "concatenate: write axis= instead of dim="),
    (lambda: X.clip(a_min=1), TypeError, "clip: write min= instead of a_min="),
    (lambda: torch.zeros(2, device="cuda"), TypeError, "zeros: write backend= instead of device="),
    (lambda: F.scaled_dot_product_attention(X, X, X, is_causal=True), TypeError, "write causal= instead of is_causal="),
    (lambda: torch.cat([X, X]), AttributeError, "tensorlite has no cat: write concatenate"),
    (lambda: X.unsqueeze(0), AttributeError, "a Tensor has no unsqueeze: write expand_dims"),
    (lambda: torch.long, AttributeError, "tensorlite has no long: write .* the dtype is np.int64"),
    (lambda: F.one_hot(X), AttributeError, "tensorlite.nn.functional has no one_hot: write .*embedding"),
    (
        lambda: nn.ModuleList([]),
        AttributeError,
        r"tensorlite.nn has no ModuleList: write a list: self.layers = \[...\]",
    ),
    (lambda: torch.optim.Adam([]), AttributeError, "tensorlite.optim has no Adam: write AdamW"),
    (lambda: torch.nothing_like_it, AttributeError, "^tensorlite has no nothing_like_it$"),
    (lambda: X.nothing_like_it, AttributeError, "'Tensor' object has no attribute 'nothing_like_it'"),
    (lambda: np.sum(X), TypeError, r"sum: np.sum takes no Tensor: write x.sum\(\), or np.sum\(x.data\)"),
    (lambda: np.mean(X, axis=1), TypeError, "mean: np.mean takes no Tensor"),
    (lambda: X.sum(nothing=1), TypeError, "unexpected keyword argument 'nothing'"),
    (lambda: X.sum("a", keepdims=True), TypeError, "sum: axis must be"),
]


@pytest.mark.parametrize(("call", "error", "said"), ANSWERS)
def test_pytorchs_words_are_answered_with_ours(call, error, said):
    with pytest.raises(error, match=said):
        call()


def test_no_word_is_answered_that_is_known():
    for place, table in (
        (tensorlite, words.FUNCTIONS),
        (Tensor, words.FUNCTIONS),
        (F, words.FUNCTIONS),
        (nn, words.LAYERS),
        (torch.optim, words.OPTIMIZERS),
    ):
        assert not {name for name in table if hasattr(place, name)} - {"functional", "autograd"}
    assert not set(dir(X)) & set(words.FUNCTIONS)
