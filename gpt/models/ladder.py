"""The ladder: from a table of pairs to a GPT, one idea a rung, as the "Let's build GPT" lecture climbs it.

Rung 1 is the table (bigram.py). Rungs 2 to 6 are here, in their order. Rung 7 is the sixth made larger, with dropout,
and with all heads in one product: the GPT of gpt.py. docs/lessons/08-ladder.md tells what each rung is worth.

Initial weights are PyTorch's: N(0, 1) for the embeddings, uniform within 1 / sqrt(n_embd) for the linear layers. The
head alone starts from N(0, 0.02), as the bigram table does, so that the first loss is that of a uniform guess.
"""

from collections.abc import Callable

import tensorlite as tl
from gpt.models.language_model import LanguageModel
from gpt.models.shape import GPTConfig
from tensorlite import Tensor, nn, random


class Head(nn.Module):
    """Attention: a position asks (its query), those up to it say what they have (their keys), and it takes the mean of
    what they tell (their values), weighted by the softmax of query times key / sqrt(D)."""

    def __init__(self, shape: GPTConfig):
        head_size = shape.n_embd // shape.n_head
        self.query = nn.Linear(shape.n_embd, head_size, bias=False)
        self.key = nn.Linear(shape.n_embd, head_size, bias=False)
        self.value = nn.Linear(shape.n_embd, head_size, bias=False)

    def forward(self, x) -> Tensor:
        q, k, v = self.query(x), self.key(x), self.value(x)  # (B, T, D) each
        return tl.scaled_dot_product_attention(q, k, v, causal=True)  # (B, T, D)


class Heads(nn.Module):
    """Rungs 2 and 3: one head as wide as the model, or several narrow ones, each free to look for something else."""

    def __init__(self, shape: GPTConfig):
        self.heads = [Head(shape) for _ in range(shape.n_head)]

    def forward(self, x) -> Tensor:
        return tl.concatenate([head(x) for head in self.heads], axis=-1)  # n_head of (B, T, D) -> (B, T, C)


class Layer(nn.Module):
    """Rung 4: communication, then computation. What was gathered is thought over, at each position by itself."""

    def __init__(self, shape: GPTConfig):
        self.attn = Heads(shape)
        self.mlp = nn.Sequential(nn.Linear(shape.n_embd, shape.n_embd), nn.ReLU())

    def forward(self, x) -> Tensor:
        return self.mlp(self.attn(x))


class ResidualBlock(nn.Module):
    """Rung 5: what is found is added to what came in, so that a gradient reaches the first block as directly as the
    last. A projection puts each half's result onto that stream; the computation is four times as wide inside."""

    def __init__(self, shape: GPTConfig):
        C = shape.n_embd
        self.attn = nn.Sequential(Heads(shape), nn.Linear(C, C))
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.ReLU(), nn.Linear(4 * C, C))

    def forward(self, x) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


class NormBlock(ResidualBlock):
    """Rung 6: each half reads the stream at mean 0 and variance 1, however large it has grown."""

    def __init__(self, shape: GPTConfig):
        super().__init__(shape)
        self.ln_1, self.ln_2 = nn.LayerNorm(shape.n_embd), nn.LayerNorm(shape.n_embd)

    def forward(self, x) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class ResidualBlocks(nn.Module):
    """Rung 5: n_layer blocks, each on the one before."""

    def __init__(self, shape: GPTConfig):
        self.h = [ResidualBlock(shape) for _ in range(shape.n_layer)]

    def forward(self, x) -> Tensor:
        for block in self.h:
            x = block(x)
        return x


class NormBlocks(nn.Module):
    """Rung 6: the same, and a last norm before the head."""

    def __init__(self, shape: GPTConfig):
        self.h = [NormBlock(shape) for _ in range(shape.n_layer)]
        self.ln_f = nn.LayerNorm(shape.n_embd)

    def forward(self, x) -> Tensor:
        for block in self.h:
            x = block(x)
        return self.ln_f(x)


class LadderModel(LanguageModel):
    """What rungs 2 to 6 share: which token stands where goes in, the scores of what follows come out.

    body: what is between, one of the classes above: (B, T, C) -> (B, T, C). seed: of the initial weights; see `GPT`.
    """

    def __init__(self, body: Callable[[GPTConfig], nn.Module], shape: GPTConfig, seed: int | None = 0):
        self.vocab_size, self.block_size = shape.vocab_size, shape.block_size
        with random.scope(seed):
            self.wte = nn.Embedding(shape.vocab_size, shape.n_embd)
            self.wpe = nn.Embedding(shape.block_size, shape.n_embd)
            self.body = body(shape)
            self.lm_head = nn.Linear(shape.n_embd, shape.vocab_size, std=0.02)

    @property
    def token_table(self) -> nn.Parameter:
        return self.wte.weight

    def logits(self, ids, last_only: bool = False) -> Tensor:
        x = self.wte(ids) + self.wpe.weight[: ids.shape[1]]  # (B, T, C) + (T, C)
        x = self.body(x)
        return self.lm_head(x[:, -1:] if last_only else x)
