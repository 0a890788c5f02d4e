"""What a run needs of the memory, counted before it begins, against NumPy's own account; and the advice when there is
too little: options that exist for the model at hand, may still change, and help."""

import re
import tracemalloc
from dataclasses import asdict

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from gpt.config import load_preset
from gpt.errors import UserError
from gpt.memory import check_memory, check_sampling, memory_explained
from gpt.models.kinds import build_model
from gpt.needs import micro_batch_needs, run_needs, sampling_needs
from tensorlite import grad, random

GIB = 2**30
RESUMED = {"n_layer", "n_embd", "block_size", "vocab_size", "tokenizer", "data"}


class Machine:
    """A backend with this much memory."""

    def __init__(self, name: str, gib: float):
        self.name, self.memory_size = name, lambda: int(gib * GIB)


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


# --- what is foreseen ---

# A preset, what is changed in it, and which moment of a micro-batch is then the largest.
SHAPES = {
    "feed-forward, forward": ("nanogpt-cpu", {}),
    "feed-forward, forward, of one layer": ("nanogpt-cpu", {"activation": "gelu_tanh", "n_layer": 1}),
    "feed-forward, backward": ("little-shakespeare", {}),
    "feed-forward, backward, with dropout": ("little-shakespeare", {"dropout": 0.2}),
    "feed-forward, backward, its weights": ("lecture", {"n_layer": 1, "block_size": 64, "dropout": 0.0}),
    "attention, backward, with dropout": (
        "nanogpt-cpu",
        {"n_head": 64, "n_layer": 2, "dropout": 0.1, "activation": "relu"},
    ),
    "attention, backward": ("nanogpt-cpu", {"n_head": 32, "block_size": 96, "n_layer": 1, "activation": "relu"}),
    "loss": ("nanogpt-cpu", {"vocab_size": 3000}),
    "head, backward": ("nanogpt-cpu", {"vocab_size": 9000, "micro_batch_size": 1, "tie_weights": False}),
    "token table, backward": ("nanogpt-cpu", {"vocab_size": 9000, "micro_batch_size": 1}),
    "table of pairs": ("bigram", {"vocab_size": 2000, "batch_size": 4}),
    "attention of heads one by one": ("ladder-3", {"block_size": 256}),
    "a rung's loss": ("ladder-4", {"vocab_size": 3000}),
    "residual blocks": ("ladder-5", {"block_size": 256}),
    "blocks with norms": ("ladder-6", {"n_embd": 256, "block_size": 64}),
}


def peak(work) -> int:
    """Bytes that work() takes at most."""
    with threadpool_limits(1, user_api="blas"):
        tracemalloc.start()
        work()
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return size


@pytest.mark.parametrize("moment", SHAPES)
def test_a_micro_batch_takes_what_is_foreseen(moment):
    preset, changes = SHAPES[moment]
    config = load_preset(preset).updated({"vocab_size": 65} | changes)
    model, size = build_model(config.train.model, config.gpt, 0), config.train.micro_batch_size or 4
    rng = np.random.default_rng(0)
    x, y = rng.integers(config.gpt.vocab_size, size=(2, size, config.gpt.block_size))

    def step():
        with random.scope(0):
            grad(model(x, y)[1] * 0.5, model.parameters(), deposit=lambda k, g: None)

    assert micro_batch_needs(config, size) == pytest.approx(peak(step), rel=0.06)


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        ("float32", {"dropout": 0.2}),
        ("bfloat16", {"dropout": 0.2, "activation": "relu"}),
        ("bfloat16", {"vocab_size": 1000, "tie_weights": False}),
    ],
)
def test_a_micro_batch_takes_what_is_foreseen_of_a_gpu(device, monkeypatch, dtype, changes):
    """By what is there after each kernel: within one the stand-in has arrays that a GPU has not."""
    config = load_preset("nanogpt-cpu").updated({"vocab_size": 64, "n_layer": 2, "n_embd": 64, "n_head": 2} | changes)
    model, sizes = build_model("gpt", config.gpt, 0).to("cupy"), []
    model.compute_dtype = device.dtype(dtype)
    x, y = device.asarray(np.random.default_rng(0).integers(64, size=(2, 4, 64)))

    def watched(launch):
        def call(*args, **options):
            result = launch(*args, **options)
            sizes.append(tracemalloc.get_traced_memory()[0])
            return result

        return call

    for holder, name in ((device, "_launch"), (device, "_gemm"), (device._flash, "_launch")):
        monkeypatch.setattr(holder, name, watched(getattr(holder, name)))

    def step():
        with random.scope(0):
            grad(model(x, y)[1] * 0.5, model.parameters(), deposit=lambda k, g: None)

    step()  # which compiles the kernels
    sizes.clear()
    peak(step)
    assert micro_batch_needs(config, 4, True, dtype) == pytest.approx(max(sizes), rel=0.1)


@pytest.mark.parametrize("preset", ["nanogpt-cpu", "lecture", "bigram", "ladder-5"])
def test_sampling_takes_what_is_foreseen(preset):
    changes = {"bigram": {"vocab_size": 500}, "ladder-5": {"vocab_size": 65, "n_embd": 256}}
    config = load_preset(preset).updated(changes.get(preset, {"vocab_size": 65}))
    ids = np.zeros((4, config.gpt.block_size // 2), np.int64)

    def sample():
        build_model(config.train.model, config.gpt, 0).generate(ids, 3)

    assert sampling_needs(config, *ids.shape, tokens=3) == pytest.approx(peak(sample), rel=0.2)


def test_more_of_anything_takes_more():
    config = load_preset("shakespeare-char").updated({"vocab_size": 65})

    def total(changes=(), **how) -> int:
        return run_needs(config.updated(dict(changes)), **how).total

    assert total() < total(text=10**8) < total(text=10**9)
    assert total() < total(workers=2) < total(workers=8) < total(workers=32) == total(workers=33)
    assert total(gpu=True, dtype="bfloat16") < total(gpu=True)
    assert total(gpu=True) == total(gpu=True, workers=8)
    for gpu in (False, True):
        for changes in ({"dropout": 0.0}, {"n_head": 3}, {"bias": False, "activation": "relu"}, {"block_size": 128}):
            assert total(changes, gpu=gpu) < total({"activation": "gelu_tanh"}, gpu=gpu)
    assert total({"gradient_accumulation_steps": 4}, gpu=True) < 1.1 * total(gpu=True)


def test_the_parts_make_up_the_whole():
    config = load_preset("nanogpt-cpu").updated({"vocab_size": 65})
    parts = asdict(run_needs(config, workers=2, text=10**6))
    assert parts.pop("workers") == 2
    assert run_needs(config, workers=2, text=10**6).total == (
        sum(parts.values()) + parts["activations"] + parts["indices"]
    )
    assert parts["weights"] == parts["gradients"] == parts["moments"] / 2 == 4 * config.gpt.num_parameters()


def test_learning_sub_words_of_a_text_may_take_more_than_training_on_it():
    config = load_preset("little-shakespeare").updated({"vocab_size": 65})
    small, large = (run_needs(config, text=text) for text in (10**6, 10**9))
    assert small.text == 10**6  # a byte a character
    assert large.total - large.libraries == pytest.approx(1e9, rel=0.05)  # which is all that is ever held of it
    words = run_needs(config.updated({"tokenizer": "bpe", "vocab_size": 1024}), text=10**9)
    assert words.total - words.libraries == pytest.approx(2.9e9, rel=0.01)  # and itself, and the part that is encoded
    assert run_needs(config.updated({"vocab_size": 300}), text=10**6).text == 2 * 10**6


@pytest.mark.parametrize("name", ["numpy", "cupy"])
def test_what_may_fit_is_not_refused(name):
    config = load_preset("shakespeare-char").updated({"vocab_size": 65, "n_layer": 100, "n_embd": 768})
    needed = run_needs(config, name != "numpy", workers=2).total / GIB
    check_memory(config, Machine(name, 0.81 * needed), workers=2)
    with pytest.raises(UserError, match="parameters and 16,384 tokens per step need"):
        check_memory(config, Machine(name, 0.79 * needed), workers=2)


def test_samples_that_cannot_fit_are_refused_with_what_helps():
    config = load_preset("shakespeare-char").updated({"vocab_size": 65})
    check_sampling(config, Machine("numpy", 4), 10, 200, 500)
    for args, advice in (
        ((10_000, 200, 500), "lower --num-samples"),
        ((1, 200, 10**9), "lower --max-new-tokens"),
        ((1, 10**9, 500), "shorten the prompt"),
    ):
        with pytest.raises(UserError, match=rf" need [\d,]+ GiB and there are 4: .*{advice}"):
            check_sampling(config, Machine("numpy", 4), *args)
