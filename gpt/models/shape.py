"""The shape of a model, checked before anything is allocated."""

from dataclasses import dataclass

from gpt.errors import UserError
from gpt.settings import check_fields, option


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. The defaults are GPT-2's (124M)."""

    vocab_size: int = option(50257, "sub-words to learn with --tokenizer bpe; any other knows how many it has", least=1)
    block_size: int = option(1024, "longest context, in tokens", least=1)
    n_layer: int = option(12, "transformer blocks", least=1)
    n_head: int = option(12, "attention heads per block; divides n_embd", least=1)
    n_embd: int = option(768, "width of the residual stream", least=1)
    dropout: float = option(0.0, "probability of dropping an activation while training", least=0.0, most=1.0)
    bias: bool = option(True, "biases in the linear layers and layer norms")
    qkv_bias: bool | None = option(None, "biases of the query, key and value projections, if not as --bias")
    head_bias: bool = option(False, "a bias on the logits")
    activation: str = option("gelu_tanh", "of the feed-forward layers", choices=("relu", "gelu", "gelu_tanh"))
    tie_weights: bool = option(True, "let the head share the token embedding's table")

    def __post_init__(self):
        check_fields(self)
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd must be a multiple of n_head, got {self.n_embd} and {self.n_head}")

    def num_parameters(self) -> int:
        """Trained values of a GPT of this shape, before there is one."""
        c, bias = self.n_embd, int(self.bias)
        qkv_bias = self.bias if self.qkv_bias is None else self.qkv_bias
        norm = c + bias * c
        block = 2 * norm + 12 * c * c + 3 * c * int(qkv_bias) + bias * (c + 4 * c + c)
        tables = self.vocab_size * c * (1 if self.tie_weights else 2) + self.block_size * c
        return tables + self.n_layer * block + norm + self.vocab_size * int(self.head_bias)
