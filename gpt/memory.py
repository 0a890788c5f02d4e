"""What a run needs of the memory, about, and what to change when there is too little of it."""

from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from functools import partial

from gpt.advice import as_option
from gpt.config import Config
from gpt.errors import UserError
from gpt.models.kinds import MODEL_KINDS
from gpt.text.sources import BYTES_PER_CHARACTER
from gpt.text.tokenizers import ByteTokenizer
from tensorlite import Backend
from tensorlite.backends import explain_memory_error

WORTH_IT = 0.25  # the share of the whole that a change must save to be named
BYTES_PER_TOKEN = 40  # of a step: input, target and two indices, eight bytes each, and what is made on the way
_COUNTS = ("batch_size", "micro_batch_size", "gradient_accumulation_steps", "block_size", "eval_iters")
LAYER, MICRO_BATCH, ROW = 8000, 150, 1000  # bytes of Python's objects


def check_memory(
    config: Config, backend: Backend, workers: int = 1, text: int = 0, fixed: Set[str] = frozenset()
) -> None:
    """UserError if a run cannot fit the backend's memory. text: its characters, where they are known."""
    cpu, (parameters, tokens) = backend.name == "numpy", _sizes(config)
    needs = partial(_needs, cpu=cpu, workers=workers, text=_text_bytes(text, cpu))
    memory, needed = backend.memory_size(), needs(config)
    if memory is not None and needed > memory:
        where = "this machine" if cpu else "the GPU"
        also = f" and a text of {text:,} characters" if _text_bytes(text, cpu) >= WORTH_IT * needed else ""
        raise UserError(
            f"{parameters:,} parameters and {tokens:,} tokens per step{also} need {needed >> 30:,} GiB and {where}"
            f" has {memory >> 30:,}: {_advice(config, needs, fixed, _text_bytes(text, cpu))}"
        )


def check_sampling(config: Config, backend: Backend, samples: int, prompt: int, tokens: int) -> None:
    """UserError if `samples` at a time cannot fit the backend's memory, of which so many tokens of the prompt and after
    it are kept."""
    gpt, memory = config.gpt, backend.memory_size()
    layers = MODEL_KINDS[config.train.model].num_layers(gpt)
    read = min(prompt, gpt.block_size)
    activations = 4 * read * (4 * gpt.n_embd + gpt.n_head * read if layers else gpt.vocab_size)
    each = ROW + 8 * layers * gpt.block_size * gpt.n_embd + 24 * gpt.vocab_size + activations
    needed = 8 * _sizes(config)[0] + samples * (each + 8 * (prompt + tokens))
    if memory is not None and needed > memory:
        ways = ["lower --num-samples"] if samples > 1 else []
        ways += ["lower --max-new-tokens"] if 8 * samples * tokens >= WORTH_IT * needed else []
        ways += ["shorten the prompt"] if 8 * samples * prompt >= WORTH_IT * needed else []
        raise UserError(
            f"{samples:,} samples of {prompt:,} characters and {tokens:,} tokens need {needed >> 30:,} GiB and there"
            f" are {memory >> 30:,}: {', or '.join(ways) or 'take a smaller --model'}"
        )


@contextmanager
def memory_explained(config: Config, cpu: bool, text: int, fixed: Set[str], workers: int = 1) -> Iterator[None]:
    """Within, a MemoryError becomes a UserError that says what to change.

    text: its characters. fixed: keys that cannot be changed any more.
    """
    text = _text_bytes(text, cpu)
    try:
        yield
    except MemoryError as error:
        advice = _advice(config, partial(_needs, cpu=cpu, workers=workers, text=text), fixed, text)
        raise UserError(f"out of memory ({explain_memory_error(error)}): {advice}") from None


def _advice(config: Config, needs: Callable[[Config], int], fixed: Set[str] = frozenset(), text: int = 0) -> str:
    """The options that help: each which alone, at its least, saves a good share of what config `needs`."""
    least = dict.fromkeys(_COUNTS, 1)
    least |= {"n_embd": config.gpt.n_head, "n_layer": 1, "vocab_size": ByteTokenizer.vocab_size}
    now, fixed = vars(config.gpt) | vars(config.train), fixed | MODEL_KINDS[config.train.model].ignored
    able = {key: value for key, value in least.items() if key not in fixed and value < now[key]}
    spare = WORTH_IT * needs(config)
    helping = [key for key, value in able.items() if needs(config) - needs(config.updated({key: value})) >= spare]
    learnt = config.train.tokenizer == "bpe"
    lower = [as_option(key) for key in helping if key != "vocab_size" or learnt]
    ways = ["use --tokenizer byte"] if "vocab_size" in helping and not learnt else []
    ways += [f"lower {' or '.join(lower)}"] if lower else []
    ways += ["take a smaller --data"] if "data" not in fixed and text >= spare else []
    return ", or ".join(ways) or "nothing but more memory helps"


def _sizes(config: Config) -> tuple[int, int]:
    """Parameters, and tokens per step."""
    gpt, train = config.gpt, config.train
    parameters = MODEL_KINDS[train.model].num_parameters(gpt)
    return parameters, train.batch_size * train.gradient_accumulation_steps * gpt.block_size


def _text_bytes(text: int, cpu: bool) -> int:
    return text * (BYTES_PER_CHARACTER if cpu else 1)


def _needs(config: Config, cpu: bool, workers: int, text: int) -> int:
    """Bytes, about, and rather too few: the parameters with gradient and two moments, 4 each; what each worker makes of
    a batch; the evaluation's losses; and the text."""
    gpt, train = config.gpt, config.train
    parameters, tokens = _sizes(config)
    rows = train.batch_size * train.gradient_accumulation_steps
    size = min((train.micro_batch_size if cpu else 0) or train.batch_size, rows)
    workers, layers = min(workers, -(-rows // size)), MODEL_KINDS[train.model].num_layers(gpt)
    layer = 12 * gpt.n_embd + 2 * gpt.n_head * gpt.block_size
    activations = 4 * size * gpt.block_size * (layers * layer + 2 * gpt.vocab_size)
    each = BYTES_PER_TOKEN * tokens + MICRO_BATCH * (rows // size) + activations
    return 16 * parameters + LAYER * layers + workers * each + BYTES_PER_TOKEN * train.eval_iters + text
