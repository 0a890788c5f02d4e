"""gpt: a language-model library on tensorlite. Data, models, training, checkpoints, sampling."""

from gpt.config import Config, GPTConfig, TrainConfig
from gpt.errors import UserError
from gpt.models.bigram import BigramLanguageModel
from gpt.models.gpt import GPT

__all__ = ["GPT", "BigramLanguageModel", "Config", "GPTConfig", "TrainConfig", "UserError"]
