"""What is said of a run before it begins."""

import re

import pytest

from gpt.config import PRESETS, load_preset
from gpt.models.kinds import MODEL_KINDS, build_model
from gpt.needs import run_needs
from gpt.plan import WIDTH, parameters_by_part, planned, step_flops


class Machine:
    """A backend with this much memory."""

    def __init__(self, memory: int | None, name: str = "numpy"):
        self.name, self.memory_size = name, lambda: memory


def config_of(preset: str, **changes):
    return load_preset(preset).updated({"vocab_size": 65} | changes)


LADDER = {  # but for the first, a table, and the last, a GPT: of width 32
    preset: {"token table": 65 * 32, "position table": 8 * 32, **parts, "head": 65 * 32 + 65}
    for preset, parts in {
        "ladder-2": {"attention": 3 * 32**2},
        "ladder-3": {"attention": 3 * 32**2},
        "ladder-4": {"attention": 3 * 32**2, "feed-forward": 32**2 + 32},
        "ladder-5": {"attention": 3 * (4 * 32**2 + 32), "feed-forward": 3 * (8 * 32**2 + 5 * 32)},
        "ladder-6": {
            "attention": 3 * (4 * 32**2 + 32), "feed-forward": 3 * (8 * 32**2 + 5 * 32), "layer norms": 14 * 32,
        },
    }.items()
}  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("flip", [None, "tie_weights", "bias", "head_bias"])
def test_the_parts_of_a_model_are_all_of_it(preset, flip):
    config = config_of(preset)
    if flip and flip not in MODEL_KINDS[config.train.model].ignored:
        config = config.updated({flip: not getattr(config.gpt, flip)})
    model, shape = build_model(config.train.model, config.gpt, seed=None), config.gpt
    counts = parameters_by_part(model)
    assert sum(counts.values()) == model.num_parameters()
    if config.train.model != "gpt":
        assert counts == LADDER.get(preset, {"token table": 65**2})
        return
    tied = "token table (shared with the head)"
    names = [tied if shape.tie_weights else "token table", "position table", "attention", "feed-forward", "layer norms"]
    head = (0 if shape.tie_weights else 65 * shape.n_embd) + 65 * shape.head_bias
    assert list(counts) == names + ["head"] * bool(head)
    assert counts[names[0]] == 65 * shape.n_embd
    assert counts["layer norms"] == (2 * shape.n_layer + 1) * shape.n_embd * (1 + shape.bias)
    assert counts.get("head", 0) == head


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("name", "dtype"), [("numpy", "float32"), ("cupy", "bfloat16")])
def test_the_plan_of_each_preset(preset, name, dtype):
    config = config_of(preset)
    lines = planned(config, Machine(8 * 10**9, name), 2, 1_115_394, dtype)
    heads = [line for line in lines if not line.startswith("  ")]
    assert heads == ["parameters", "memory of the GPU, about" if name == "cupy" else "memory, about", "a step"]
    assert {len(line) for line in lines} - set(map(len, heads)) == {WIDTH}
    total = run_needs(config, name == "cupy", 2, 1_115_394, dtype).total
    shown = f"{total / 1e9:.1f} GB" if total >= 1e9 else f"{total / 1e6:.0f} MB"
    assert re.fullmatch(f"  in all +{shown} of 8.0 GB", next(line for line in lines if " of " in line[30:]))


def test_a_plan():
    assert planned(config_of("nanogpt-cpu"), Machine(8 * 10**9), 2, 1_115_394) == [
        "parameters",
        "  token table (shared with the head)           8,320",
        "  position table                               8,192",
        "  attention                                  262,144",
        "  feed-forward                               524,288",
        "  layer norms                                  1,152",
        "  in all                                     804,096",
        "memory, about",
        "  interpreter and libraries                    58 MB",
        "  text                                          1 MB",
        "  weights                                       3 MB",
        "  gradients                                     3 MB",
        "  moments                                       6 MB",
        "  activations, 2 workers x 16 MB               31 MB",
        "  counting, saving, sampling                   13 MB",
        "  in all                            116 MB of 8.0 GB",
        "a step",
        "  tokens                                         768",
        "  matrix products                          4.0 GFLOP",
    ]


def test_a_plan_says_that_memory_is_tight_or_nothing_where_it_is_not_known():
    lines = planned(config_of("nanogpt-cpu"), Machine(100 * 10**6), 2, 1_115_394)
    assert lines[15].endswith("116 MB of 100 MB, which may be too little")
    assert planned(config_of("nanogpt-cpu"), Machine(None), 2, 1_115_394)[15].endswith("  116 MB")


def test_the_work_of_a_step():
    # 6 per weight of a product and token, of 786,432 in the layers and 8,320 in the head, and attention's.
    assert step_flops(config_of("nanogpt-cpu")) == 768 * (6 * (786_432 + 8_320) + 12 * 4 * 128 * 64)
    assert step_flops(config_of("bigram")) == 0
    assert step_flops(config_of("ladder-3")) == 256 * (6 * (3 + 65 / 32) * 32**2 + 12 * 32 * 8)
