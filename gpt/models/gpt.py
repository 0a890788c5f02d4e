"""GPT: nanoGPT's architecture, names and initialisation (Radford et al. 2019, "Language models are unsupervised
multitask learners")."""

import math

import tensorlite as tl
from gpt.models.cached import CachedGPT
from gpt.models.language_model import LanguageModel
from gpt.models.shape import GPTConfig
from tensorlite import Tensor, nn, random

STD = 0.02  # of all initial weights but the residual projections'


class CausalSelfAttention(nn.Module):
    """Each position gathers from itself and the ones before it, in n_head independent ways."""

    def __init__(self, config: GPTConfig):
        qkv_bias = config.bias if config.qkv_bias is None else config.qkv_bias
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, qkv_bias, std=STD)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, config.bias, std=_residual_std(config))
        self.n_head, self.dropout = config.n_head, config.dropout

    def forward(self, x) -> Tensor:
        y = tl.self_attention(self.c_attn(x), self.n_head, dropout=self.dropout if self.training else 0.0)
        return self.c_proj(y)


class MLP(nn.Module):
    """The feed-forward layer: each position by itself, four times as wide inside."""

    def __init__(self, config: GPTConfig):
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, config.bias, std=STD)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, config.bias, std=_residual_std(config))
        self.activation = _ACTIVATIONS[config.activation]

    def forward(self, x) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))


class Block(nn.Module):
    """Communication, then computation, each added to the residual stream."""

    def __init__(self, config: GPTConfig):
        self.ln_1 = nn.LayerNorm(config.n_embd, config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.bias)
        self.mlp = MLP(config)
        self.dropout = config.dropout

    def forward(self, x) -> Tensor:
        x = tl.add_dropout(x, self.attn(self.ln_1(x)), self.dropout, self.training)
        return tl.add_dropout(x, self.mlp(self.ln_2(x)), self.dropout, self.training)


class Transformer(nn.Module):
    """Everything but the head: token ids (B, T) -> features (B, T, n_embd), in `dtype` if given."""

    def __init__(self, config: GPTConfig):
        self.wte = nn.Embedding(config.vocab_size, config.n_embd, std=STD)
        self.wpe = nn.Embedding(config.block_size, config.n_embd, std=STD)
        self.drop = nn.Dropout(config.dropout)
        self.h = [Block(config) for _ in range(config.n_layer)]
        self.ln_f = nn.LayerNorm(config.n_embd, config.bias)

    def forward(self, ids, dtype=None) -> Tensor:
        x = self.wte(ids) + self.wpe.weight[: ids.shape[1]]  # (B, T, C) + (T, C)
        x = self.drop(tl.cast(x, dtype) if dtype else x)
        for block in self.h:
            x = block(x)
        return self.ln_f(x)


class GPT(LanguageModel):
    """`logits, loss = model(ids, targets)`.

    config: see GPTConfig. seed: of the initial weights, N(0, 0.02), for the projections onto the residual stream
    N(0, 0.02 / sqrt(2 n_layer)), as GPT-2's; None for a model that waits for its weights (see `random.scope`).
    """

    def __init__(self, config: GPTConfig, seed: int | None = 0):
        self.config = config
        self.vocab_size, self.block_size = config.vocab_size, config.block_size
        with random.scope(seed):
            self.transformer = Transformer(config)
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, config.head_bias, std=STD)
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight

    @property
    def token_table(self) -> nn.Parameter:
        return self.transformer.wte.weight

    def logits(self, ids, last_only: bool = False) -> Tensor:
        x = self.transformer(ids, self.compute_dtype)
        return self.lm_head(x[:, -1:] if last_only else x)

    def cached(self, batch_size: int) -> CachedGPT:
        return CachedGPT(self, batch_size)


def _residual_std(config: GPTConfig) -> float:
    # Two projections per layer add to the stream; this keeps its variance independent of the depth.
    return STD / math.sqrt(2 * config.n_layer)


def _gelu_tanh(x) -> Tensor:  # not a lambda: a model is pickled with a reference to it, by its name
    return tl.gelu(x, "tanh")


_ACTIVATIONS = {"relu": tl.relu, "gelu": tl.gelu, "gelu_tanh": _gelu_tanh}
