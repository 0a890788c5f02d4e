"""gpt: a language-model library on tensorlite. Data, models, training, checkpoints, sampling."""

from gpt.bigram import BigramLanguageModel
from gpt.config import Config, GPTConfig, TrainConfig
from gpt.errors import UserError
from gpt.model import GPT

__all__ = ["GPT", "BigramLanguageModel", "Config", "GPTConfig", "TrainConfig", "UserError"]
