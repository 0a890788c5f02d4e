"""What a run needs of the memory, about, and what to change when there is too little of it."""

from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager

from gpt.advice import as_option
from gpt.config import Config, idle_keys
from gpt.errors import UserError
from gpt.tokenizer import ByteTokenizer
from tensorlite import Backend
from tensorlite.backends import explain_memory_error

WORTH_IT = 0.25  # the share of the whole that a change must save to be named


def check_memory(config: Config, backend: Backend) -> None:
    """UserError if the parameters, gradients, moments and tokens alone cannot fit the backend's memory."""
    parameters, tokens = _sizes(config)
    memory, needed = backend.memory_size(), _lasting(config)
    if memory is not None and needed > memory:
        where = "this machine" if backend.name == "numpy" else "the GPU"
        raise UserError(
            f"{parameters:,} parameters and {tokens:,} tokens per step need {needed >> 30:,} GiB and {where}"
            f" has {memory >> 30:,}: {_advice(config, _lasting)}"
        )


@contextmanager
def memory_explained(config: Config, cpu: bool, text: int, fixed: Set[str]) -> Iterator[None]:
    """Within, a MemoryError becomes a UserError that says what to change.

    text: tokens of the text. fixed: keys that cannot be changed any more.
    """
    text *= 24 if cpu else 1  # bytes: to count its pairs takes three int64 each
    try:
        yield
    except MemoryError as error:
        advice = _advice(config, lambda config: _lasting(config) + _passing(config, cpu) + text, fixed, text)
        raise UserError(f"out of memory ({explain_memory_error(error)}): {advice}") from None


def _advice(config: Config, needs: Callable[[Config], int], fixed: Set[str] = frozenset(), text: int = 0) -> str:
    """The options that help: each which alone, at its least, saves a good share of what config `needs`."""
    least = dict.fromkeys(("batch_size", "micro_batch_size", "gradient_accumulation_steps", "block_size"), 1)
    least |= {"n_embd": config.gpt.n_head, "n_layer": 1, "vocab_size": ByteTokenizer.vocab_size}
    now, fixed = vars(config.gpt) | vars(config.train), fixed | idle_keys(config.train.model)
    able = {key: value for key, value in least.items() if key not in fixed and value < now[key]}
    spare = WORTH_IT * needs(config)
    helping = [key for key, value in able.items() if needs(config) - needs(config.updated({key: value})) >= spare]
    lower = [as_option(key) for key in helping if key != "vocab_size"]
    ways = ["use --tokenizer byte"] if "vocab_size" in helping else []
    ways += [f"lower {' or '.join(lower)}"] if lower else []
    ways += ["take a smaller --data"] if "data" not in fixed and text >= spare else []
    return ", or ".join(ways) or "nothing but more memory helps"


def _sizes(config: Config) -> tuple[int, int]:
    """Parameters, and tokens per step."""
    gpt, train = config.gpt, config.train
    parameters = gpt.vocab_size**2 if train.model == "bigram" else gpt.num_parameters()
    return parameters, train.batch_size * train.gradient_accumulation_steps * gpt.block_size


def _lasting(config: Config) -> int:
    """Bytes of the parameters with gradient and two moments, 4 each, and of the tokens with targets, 8 each."""
    return 16 * sum(_sizes(config))


def _passing(config: Config, cpu: bool) -> int:
    """Bytes of the activations of a micro-batch, about: those of the layers, and of logits with probabilities."""
    gpt, train = config.gpt, config.train
    layer = 0 if train.model == "bigram" else 20 * gpt.n_embd + 3 * gpt.n_head * gpt.block_size
    rows = (train.micro_batch_size if cpu else 0) or train.batch_size
    return 4 * rows * gpt.block_size * (gpt.n_layer * layer + 3 * gpt.vocab_size)
