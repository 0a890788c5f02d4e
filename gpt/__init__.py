"""gpt: a language-model library on tensorlite. Texts, models, training, checkpoints, sampling."""

from pathlib import Path

from gpt.config import Config, TrainConfig
from gpt.errors import UserError
from gpt.models.bigram import BigramLanguageModel
from gpt.models.gpt import GPT
from gpt.models.language_model import LanguageModel
from gpt.models.shape import GPTConfig
from gpt.text.tokenizers import Tokenizer

__all__ = ["GPT", "BigramLanguageModel", "Config", "GPTConfig", "TrainConfig", "UserError", "load"]


def load(path: str | Path | None = None) -> tuple[LanguageModel, Tokenizer]:
    """The model of a run or of a checkpoint, in eval mode on the CPU, and its tokenizer.

    path: a run's folder, whose best checkpoint is taken; a file; a folder with a GPT-2 of Hugging Face's; None for the
    newest run in runs/. UserError for what cannot be read.
    """
    from gpt.training.initial import load_model  # which reads files: not for who has models alone

    _, checkpoint = load_model(None if path is None else Path(path))
    return checkpoint.build_model().eval(), checkpoint.tokenizer
