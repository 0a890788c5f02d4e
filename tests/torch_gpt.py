"""The oracle for gpt.models: the same architecture in PyTorch under nanoGPT's names, generating with a cache."""

import torch
import torch.nn.functional as F  # noqa: N812 - the name the field knows
from torch import nn

from gpt import GPTConfig

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


class KeyValueCache:
    """The keys and values of one layer, (B, H, length, D), in arrays with room for block_size tokens."""

    def __init__(self, config: GPTConfig, batch_size: int, like: torch.Tensor):
        """like: a weight, whose dtype and device are the cache's."""
        shape = (batch_size, config.n_head, config.block_size, config.n_embd // config.n_head)
        self.keys, self.values = like.new_empty(shape), like.new_empty(shape)
        self.length = 0

    def append(self, k, v):
        start, self.length = self.length, self.length + k.shape[2]
        self.keys[:, :, start : self.length], self.values[:, :, start : self.length] = k, v
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class Attention(nn.Module):
    """Multi-head causal attention."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        qkv_bias = config.bias if config.qkv_bias is None else config.qkv_bias
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=qkv_bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head = config.n_head
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None):
        # x (B, T, C); q, k, v (B, H, T, D)
        q, k, v = (a.unflatten(2, (self.n_head, -1)).transpose(1, 2) for a in self.c_attn(x).chunk(3, dim=2))
        if cache is not None:  # empty, or T is 1
            k, v = cache.append(k, v)
        dropout = self.dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=x.shape[1] > 1, dropout_p=dropout)
        return self.dropout(self.c_proj(y.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.activation(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = FeedForward(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class TorchGPT(nn.Module):
    """idx (B, T), targets (B, T) -> logits (B, T, V), mean loss or None without targets.

    Weights are random and large enough for every part of the model to matter; norms are near one.
    """

    def __init__(self, config: GPTConfig, seed: int = 0):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=config.head_bias)
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            mean = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
            nn.init.normal_(p, mean, 0.2, generator=generator)

    def forward(self, idx, targets=None, caches=None):
        parts, start = self.transformer, caches[0].length if caches else 0
        x = parts.drop(parts.wte(idx) + parts.wpe.weight[start : start + idx.shape[1]])
        for block, cache in zip(parts.h, caches or [None] * len(parts.h), strict=True):
            x = block(x, cache)
        logits = self.lm_head(parts.ln_f(x))
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.inference_mode()
    def sample_tokens(self, idx, greedy: bool = False):
        """Continue idx (B, T) without end, yielding the next tokens (B, 1): gpt.generate.sample_tokens' rule, with a
        cache, and a token drawn by torch.multinomial or the likeliest."""
        size, weight = self.config.block_size, self.lm_head.weight
        caches = [KeyValueCache(self.config, len(idx), weight) for _ in self.transformer.h]
        context = new = idx[:, -size:]
        while True:
            logits = self(new, caches=caches)[0][:, -1]
            new = logits.argmax(-1, keepdim=True) if greedy else torch.multinomial(F.softmax(logits, dim=-1), 1)
            yield new
            context = torch.cat([context, new], dim=1)
            if context.shape[1] > size:
                context = new = context[:, -max(size // 2, 1) :]
                for cache in caches:
                    cache.length = 0
