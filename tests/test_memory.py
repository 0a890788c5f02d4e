"""Advice when the memory is too small: options that exist for the model at hand, may still change, and help."""

import re

import pytest

from gpt.config import load_preset
from gpt.errors import UserError
from gpt.memory import check_memory, memory_explained

GIB = 2**30
RESUMED = {"n_layer", "n_embd", "block_size", "vocab_size", "tokenizer", "data"}


class Machine:
    """A backend with this much memory."""

    def __init__(self, name: str, gib: int):
        self.name, self.memory_size = name, lambda: gib * GIB


@pytest.mark.parametrize(
    ("preset", "changes", "advice"),
    [
        ("bigram", {"vocab_size": 60_000}, "use --tokenizer byte"),
        ("bigram", {"vocab_size": 65, "batch_size": 10**10}, "lower --batch-size or --block-size"),
        ("bigram", {"vocab_size": 65, "eval_iters": 10**9}, "lower --eval-iters"),
        ("lecture", {"vocab_size": 10**7}, "use --tokenizer byte, or lower .*"),
        ("lecture", {"vocab_size": 256, "n_layer": 10**5}, "lower (--.*)?--n-embd or --n-layer"),
        ("lecture", {"vocab_size": 65, "gradient_accumulation_steps": 10**8},
         "lower --batch-size or --gradient-accumulation-steps or --block-size"),
    ],
)  # fmt: skip
def test_what_cannot_fit_is_refused_with_what_helps(preset, changes, advice):
    config = load_preset(preset).updated(changes)
    for machine, where in ((Machine("numpy", 4), "this machine"), (Machine("cupy", 4), "the GPU")):
        with pytest.raises(UserError, match=rf" per step need [\d,]+ GiB and {where} has 4: {advice}$"):
            check_memory(config, machine)
    check_memory(config, Machine("numpy", 10**9))


@pytest.mark.parametrize(
    ("preset", "changes", "how", "advice"),
    [
        ("lecture", {"vocab_size": 65, "micro_batch_size": 0}, {}, "lower --batch-size or --block-size or --n-embd"),
        (
            "lecture",
            {"vocab_size": 65, "micro_batch_size": 32},
            {},
            "lower --batch-size or --micro-batch-size or --block-size",
        ),
        ("lecture", {"vocab_size": 65, "micro_batch_size": 32}, {"cpu": False}, "lower --batch-size or --block-size"),
        ("lecture", {"vocab_size": 65, "batch_size": 512}, {"fixed": RESUMED, "cpu": False}, "lower --batch-size"),
        ("lecture", {"vocab_size": 65, "micro_batch_size": 1}, {"fixed": RESUMED}, "nothing but more memory helps"),
        ("bigram", {"vocab_size": 9000}, {}, "use --tokenizer byte"),
        ("bigram", {"vocab_size": 9000}, {"fixed": RESUMED}, "nothing but more memory helps"),
        ("bigram", {"vocab_size": 65}, {"text": 10**9}, "take a smaller --data"),
        ("bigram", {"vocab_size": 65}, {"text": 10**9, "fixed": RESUMED}, "nothing but more memory helps"),
    ],
)
def test_memory_that_runs_out_is_explained(preset, changes, how, advice):
    config = load_preset(preset).updated(changes)
    with (
        pytest.raises(
            UserError, match=f"{re.escape('out of memory (no more): ' + advice)}( or --n-layer| or --n-embd)*$"
        ),
        memory_explained(config, **{"cpu": True, "text": 0, "fixed": set()} | how),
    ):
        raise MemoryError("no more")
