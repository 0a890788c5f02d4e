"""The bigram model: the next symbol guessed from the last one alone. The baseline every GPT must beat."""

from gpt.models.language_model import LanguageModel
from tensorlite import Tensor, nn, random


class BigramLanguageModel(LanguageModel):
    """A table whose row i holds the logits of what follows symbol i.

    block_size only sets how many positions are trained on at a time. Its optimum is the table of counts.
    """

    def __init__(self, vocab_size: int, block_size: int = 8, seed: int | None = 0):
        self.vocab_size, self.block_size = vocab_size, block_size
        with random.scope(seed):
            self.token_embedding_table = nn.Embedding(vocab_size, vocab_size, std=0.02)

    @property
    def token_table(self) -> nn.Parameter:
        return self.token_embedding_table.weight

    def logits(self, ids, last_only: bool = False) -> Tensor:
        return self.token_embedding_table(ids[:, -1:] if last_only else ids)
