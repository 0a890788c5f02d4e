"""What every language model here can do: score the next token, and generate."""

import tensorlite as tl
from gpt.generate import generate
from gpt.models.cached import CachedGPT
from tensorlite import Tensor, nn


class LanguageModel(nn.Module):
    """A model of the next token. A subclass has `vocab_size`, `block_size` (the longest context), `token_table` (the
    parameter that tokens are looked up in) and `logits`.

    compute_dtype: what activations and products are in; None for the parameters' own dtype.
    """

    vocab_size: int
    block_size: int
    token_table: nn.Parameter
    compute_dtype = None

    def logits(self, ids, last_only: bool = False) -> Tensor:
        """Scores of the next token at each position: ids (B, T) on the model's device -> (B, T, vocab_size).

        last_only: of the last position alone, (B, 1, vocab_size).
        """
        raise NotImplementedError

    def forward(self, ids, targets=None) -> tuple[Tensor, Tensor | None]:
        """(logits (B, T, vocab_size), mean loss in nats per token, or None without targets).

        ids, targets: integers of shape (B, T), arrays or Tensors; a target of -100 is not counted.
        """
        ids = self._on_device(ids)
        if ids.ndim != 2:
            raise ValueError(f"{type(self).__name__}: expected token ids of shape (B, T), got {ids.shape}")
        if not 0 < ids.shape[1] <= self.block_size:
            raise ValueError(
                f"{type(self).__name__}: got sequences of {ids.shape[1]} tokens, the model takes 1 to {self.block_size}"
            )
        logits = self.logits(ids)
        return logits, None if targets is None else tl.cross_entropy(logits, self._on_device(targets))

    def generate(self, ids, max_new_tokens: int, **options):
        """ids (B, T) continued by max_new_tokens sampled tokens: a NumPy array (B, T + max_new_tokens).

        The options are those of `gpt.generate.sample_tokens`: temperature, top_k, top_p, seed, use_cache.
        """
        return generate(self, ids, max_new_tokens, **options)

    def next_logits(self, ids):
        """Scores of the token after ids (B, T), from its last block_size tokens: (B, vocab_size) on the host."""
        ids = self._on_device(ids)[:, -self.block_size :]
        return self.logits(ids, last_only=True).numpy()[:, -1]

    def cached(self, batch_size: int) -> CachedGPT | None:
        """What continues batch_size sequences with a key/value cache; None from a model that has nothing to keep."""
        return None

    def _on_device(self, ids):
        return tl.backend_of(self.token_table.data).asarray(ids.data if isinstance(ids, Tensor) else ids)
