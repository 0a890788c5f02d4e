"""A GPT's forward pass for generation: it keeps the keys and values of what it has read, and so reads each token once.

It is written a second time here, on bare arrays: for a single token, what the ops do for the sake of gradients adds
half to the time of what they compute.
"""

import math

import tensorlite as tl


class CachedGPT:
    """`cached(ids)` reads ids (B, T), T more tokens of B = batch_size sequences, and returns the scores of what follows
    them, (B, vocab_size), on the host: those of the model in eval mode for all tokens read so far.

    `length` tokens were read of each sequence, at most block_size; set it to 0 to begin new ones. The weights are those
    that the model has now: after a training step, make another one.
    """

    def __init__(self, model, batch_size: int):
        self.batch_size, self.block_size, self.length = batch_size, model.block_size, 0
        self._reader = reader = _Reader(model, batch_size)
        self._read_one = reader.backend.replayable(lambda: reader(reader.ids, reader.position))

    def __call__(self, ids):
        reader, (B, T), start = self._reader, ids.shape, self.length
        if self.batch_size != B or not 0 < T <= self.block_size - start:
            expected = f"({self.batch_size}, T) with {start} + T at most {self.block_size}"
            raise ValueError(f"CachedGPT: expected ids of shape {expected}, T at least 1, got {ids.shape}")
        be = reader.backend
        if T == 1:
            be.upload(reader.ids, ids)
            be.upload(reader.position, start)
            self._read_one()
        else:
            reader(be.asarray(ids), slice(start, start + T))
        self.length = start + T
        return be.to_numpy(reader.scores).copy()


class _Reader:
    """The forward pass, which puts the scores of what follows into `scores`. A single token is read from `ids` (B, 1)
    at `position` (1,). These are arrays that stay, so that a GPU can capture what is done with them."""

    def __init__(self, model, batch_size: int):
        config, parts = model.config, model.transformer
        self.backend = be = tl.backend_of(model.token_table.data)
        self.wte, self.wpe = parts.wte.weight.data, parts.wpe.weight.data
        self.dtype = model.compute_dtype or self.wte.dtype
        self.ids, self.position = (be.xp.zeros(shape, "int64") for shape in ((batch_size, 1), 1))
        self.scores = be.xp.zeros((batch_size, config.vocab_size), self.wte.dtype)
        shape = (2, batch_size, config.n_head, config.block_size, config.n_embd // config.n_head)
        layers = [layer for h in parts.h for layer in (h.attn.c_attn, h.attn.c_proj, h.mlp.c_fc, h.mlp.c_proj)]
        *linears, self.lm_head = _linears(be, [*layers, model.lm_head], self.dtype)
        self.blocks = [
            _CachedBlock(be, block, linears[4 * i : 4 * i + 4], be.xp.empty(shape, self.dtype))
            for i, block in enumerate(parts.h)
        ]
        self.ln_f = _norm(be, parts.ln_f)

    def __call__(self, ids, positions) -> None:
        """Read ids (B, T). positions: a slice, or an array of the only one."""
        x = self.backend.embedding(ids, self.wte) + self.wpe[positions]  # (B, T, C) + (T, C)
        x = x.astype(self.dtype, copy=False)
        for block in self.blocks:
            x = block(x, positions)
        self.scores[...] = self.lm_head(self.ln_f(x[:, -1]))


class _CachedBlock:
    """A Block in eval mode, with the keys and values that it made: cache (2, B, n_head, block_size, D)."""

    def __init__(self, be, block, linears, cache):
        self.be, self.cache = be, cache
        self.ln_1, self.ln_2 = _norm(be, block.ln_1), _norm(be, block.ln_2)
        self.c_attn, self.c_proj, self.c_fc, self.mlp_proj = linears
        self.activation = block.mlp.activation

    def __call__(self, x, positions):
        x = x + self.c_proj(self.attention(self.c_attn(self.ln_1(x)), positions))
        return x + self.mlp_proj(self.activation(self.c_fc(self.ln_2(x))).data)

    def attention(self, qkv, positions):
        """Of T tokens, qkv (B, T, 3 C), to the ones before them and to each other: (B, T, C)."""
        _, B, n_head, _, D = self.cache.shape
        T, scale = qkv.shape[1], 1.0 / math.sqrt(D)
        if T == 1:  # a single query sees every key, and its scores need no order that suits many
            return self.be.attention_of_next(qkv, self.cache, positions, scale)
        qkv = qkv.reshape(B, T, 3, n_head, D).transpose(2, 0, 3, 1, 4)
        self.cache[:, :, :, positions] = qkv[1:]
        q, (k, v) = qkv[0], self.cache[:, :, :, : positions.stop]
        y, _ = self.be.attention(q, k, v, True, scale, None, 1.0)
        return y.swapaxes(1, 2).reshape(B, T, n_head * D)


def _linears(be, layers, dtype) -> list:
    """A function for each linear layer, on a copy of its weight. The products of a single row wait for memory, and all
    in one piece, for which NumPy asks for large pages, the weights are read half as fast again."""
    weights = [layer.weight.data for layer in layers]
    memory, start, linears = be.xp.empty(sum(w.size for w in weights), dtype), 0, []
    for layer, weight in zip(layers, weights, strict=True):
        copy = memory[start : start + weight.size].reshape(weight.shape)
        copy[...] = weight
        start += weight.size
        bias = None if layer.bias is None else layer.bias.data
        linears.append(lambda x, w=copy, b=bias: be.linear(x, w, b))
    return linears


def _norm(be, layer):
    weight, bias = layer.weight.data, None if layer.bias is None else layer.bias.data
    return lambda x: be.layer_norm(x, weight, bias, layer.eps)[0]
