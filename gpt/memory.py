"""What to say when there is too little memory for a run, before it begins or when it shows."""

from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from functools import partial

from gpt.advice import as_option
from gpt.config import Config
from gpt.errors import UserError
from gpt.models.kinds import MODEL_KINDS
from gpt.needs import CUDA, LIBRARIES, Needs, run_needs, sampling_needs
from gpt.text.tokenizers import ByteTokenizer
from tensorlite import Backend
from tensorlite.backends import explain_memory_error

SURE = 0.8  # the share of what is foreseen that a run takes at the least: `python bench/memory.py` says how near it is
WORTH_IT = 0.25  # the share of the whole that a change must save to be named
_COUNTS = ("batch_size", "micro_batch_size", "gradient_accumulation_steps", "block_size", "eval_iters")


def check_memory(
    config: Config,
    backend: Backend,
    workers: int = 1,
    text: int = 0,
    fixed: Set[str] = frozenset(),
    dtype: str = "float32",
) -> None:
    """UserError if a run cannot fit the backend's memory; the arguments are those of `run_needs`, and the keys that
    cannot be changed any more."""
    cpu, memory = backend.name == "numpy", backend.memory_size()
    needs = partial(run_needs, gpu=not cpu, workers=workers, text=text, dtype=dtype)
    needed = needs(config)
    if memory is not None and SURE * needed.total > memory:
        rows = config.train.batch_size * config.train.gradient_accumulation_steps
        where = "this machine" if cpu else "the GPU"
        also = f" and a text of {text:,} characters" if needed.text >= WORTH_IT * needed.total else ""
        raise UserError(
            f"{MODEL_KINDS[config.train.model].num_parameters(config.gpt):,} parameters and"
            f" {rows * config.gpt.block_size:,} tokens per step{also} need {needed.total >> 30:,} GiB and {where}"
            f" has {memory >> 30:,}: {_advice(config, needs, fixed)}"
        )


def check_sampling(config: Config, backend: Backend, samples: int, prompt: int, tokens: int) -> None:
    """UserError if `samples` at a time cannot fit the backend's memory, of which so many tokens of the prompt and after
    it are kept."""
    memory = backend.memory_size()
    needed = sampling_needs(config, samples, prompt, prompt + tokens)
    needed += LIBRARIES if backend.name == "numpy" else CUDA
    if memory is not None and SURE * needed > memory:
        ways = ["lower --num-samples"] if samples > 1 else []
        ways += ["lower --max-new-tokens"] if 8 * samples * tokens >= WORTH_IT * needed else []
        ways += ["shorten the prompt"] if 8 * samples * prompt >= WORTH_IT * needed else []
        raise UserError(
            f"{samples:,} samples of {prompt:,} characters and {tokens:,} tokens need {needed >> 30:,} GiB and there"
            f" are {memory >> 30:,}: {', or '.join(ways) or 'take a smaller --model'}"
        )


@contextmanager
def memory_explained(
    config: Config, cpu: bool, text: int, fixed: Set[str], workers: int = 1, dtype: str = "float32"
) -> Iterator[None]:
    """Within, a MemoryError becomes a UserError that says what to change.

    text: its characters. fixed: keys that cannot be changed any more.
    """
    try:
        yield
    except MemoryError as error:
        advice = _advice(config, partial(run_needs, gpu=not cpu, workers=workers, text=text, dtype=dtype), fixed)
        raise UserError(f"out of memory ({explain_memory_error(error)}): {advice}") from None


def _advice(config: Config, needs: Callable[[Config], Needs], fixed: Set[str] = frozenset()) -> str:
    """The options that help: each which alone, at its least, saves a good share of what config `needs` beside the
    libraries."""
    least = dict.fromkeys(_COUNTS, 1)
    least |= {"n_embd": config.gpt.n_head, "n_layer": 1, "vocab_size": ByteTokenizer.vocab_size}
    now, fixed = vars(config.gpt) | vars(config.train), fixed | MODEL_KINDS[config.train.model].ignored
    able = {key: value for key, value in least.items() if key not in fixed and value < now[key]}
    whole, learnt = needs(config), config.train.tokenizer == "bpe"
    spare = WORTH_IT * (whole.total - whole.libraries)
    helping = [key for key, value in able.items() if whole.total - needs(config.updated({key: value})).total >= spare]
    lower = [as_option(key) for key in helping if key != "vocab_size" or learnt]
    ways = ["use --tokenizer byte"] if "vocab_size" in helping and not learnt else []
    ways += [f"lower {' or '.join(lower)}"] if lower else []
    ways += ["take a smaller --data"] if "data" not in fixed and whole.text >= spare else []
    return ", or ".join(ways) or "nothing but more memory helps"
