"""The configuration: what the presets say, that files are read back as written, and errors that name the key."""

import re
from dataclasses import fields

import pytest

from gpt import Config, GPTConfig, TrainConfig, UserError
from gpt.config import PRESETS, load_preset, option_fields
from gpt.text.tokenizers import BPE_SIZE
from tensorlite.random import MAX_SEED

DEFAULT = Config(GPTConfig(), TrainConfig())

# --- presets ---

CONSTANT = {"min_lr": 0.0, "warmup_iters": 0, "lr_decay_iters": 0}
PLAIN_ADAM = {"beta1": 0.9, "beta2": 0.999, "grad_clip": 0.0}
LECTURE = {"activation": "relu", "bias": True, "qkv_bias": False, "head_bias": True, "tie_weights": False}
NANOGPT = {"activation": "gelu", "bias": False, "qkv_bias": None, "head_bias": False, "tie_weights": True}
NANOGPT_TRAINING = {
    "learning_rate": 1e-3, "min_lr": 1e-4, "warmup_iters": 100, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.99,
    "grad_clip": 1.0, "eval_interval": 250, "eval_iters": 200,
}  # fmt: skip
LARGE = {"block_size": 256, "n_layer": 6, "n_head": 6, "n_embd": 384, "dropout": 0.2, "batch_size": 64}

DOCUMENTED = {
    "bigram": CONSTANT | PLAIN_ADAM | {
        "model": "bigram", "batch_size": 32, "block_size": 8, "max_iters": 3000, "learning_rate": 1e-2,
        "weight_decay": 0.0, "eval_interval": 300, "eval_iters": 200, "seed": 3007,
    },
    "little-shakespeare": LECTURE | CONSTANT | PLAIN_ADAM | {
        "block_size": 32, "n_layer": 4, "n_head": 4, "n_embd": 64, "dropout": 0.0, "batch_size": 16,
        "max_iters": 5000, "learning_rate": 1e-3, "weight_decay": 0.01, "eval_interval": 500, "eval_iters": 200,
    },
    "nanogpt-cpu": NANOGPT | NANOGPT_TRAINING | {
        "block_size": 64, "n_layer": 4, "n_head": 4, "n_embd": 128, "dropout": 0.0, "batch_size": 12,
        "max_iters": 2000, "lr_decay_iters": 2000,
    },
    "shakespeare-char": LARGE | NANOGPT | NANOGPT_TRAINING | {"max_iters": 5000, "lr_decay_iters": 5000},
    "lecture": LARGE | LECTURE | CONSTANT | PLAIN_ADAM | {
        "max_iters": 5000, "learning_rate": 3e-4, "weight_decay": 0.01, "eval_interval": 500, "eval_iters": 200,
    },
}  # fmt: skip
LADDER = CONSTANT | PLAIN_ADAM | {
    "batch_size": 32, "block_size": 8, "max_iters": 5000, "learning_rate": 1e-3, "weight_decay": 0.01,
    "eval_interval": 500, "eval_iters": 200,
}  # fmt: skip
DOCUMENTED |= {
    "ladder-1": LADDER | {"model": "bigram", "weight_decay": 0.0},
    "ladder-2": LADDER | {"model": "heads", "n_embd": 32, "n_head": 1},
    "ladder-3": LADDER | {"model": "heads", "n_embd": 32, "n_head": 4},
    "ladder-4": LADDER | {"model": "feed-forward", "n_embd": 32, "n_head": 4},
    "ladder-5": LADDER | {"model": "residual", "n_embd": 32, "n_head": 4, "n_layer": 3},
    "ladder-6": LADDER | {"model": "layer-norm", "n_embd": 32, "n_head": 4, "n_layer": 3},
    "ladder-7": DOCUMENTED["lecture"],
}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_as_documented(name):
    documented = {"preset": name, "model": "gpt", "tokenizer": "char", "val_fraction": 0.1, "data": None}
    documented |= {"gradient_accumulation_steps": 1} | DOCUMENTED[name]
    config = load_preset(name)
    values = vars(config.gpt) | vars(config.train)
    assert {key: values[key] for key in documented} == documented


def test_defaults_are_gpt_2s():
    shape = {"vocab_size": 50257, "block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768, "dropout": 0.0}
    options = {"bias": True, "qkv_bias": None, "head_bias": False, "activation": "gelu_tanh", "tie_weights": True}
    assert vars(GPTConfig()) == shape | options


# --- files ---


def saved(config: Config, tmp_path) -> str:
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", PRESETS)
def test_written_presets_are_read_back(name, tmp_path):
    assert load_preset(saved(load_preset(name), tmp_path)) == load_preset(name)


@pytest.mark.parametrize(
    "values",
    [
        *(
            {"data": text}
            for text in ('"', "\\", r"C:\new\text", "a\nb\tc\r", "\x1f\x7f", "é €\u2028😀", "", "'''", "#")
        ),
        {"learning_rate": 1e-05, "weight_decay": 1e16, "beta2": 0.1 + 0.2},
        {"seed": MAX_SEED, "max_iters": 0, "qkv_bias": True, "bias": False, "dropout": 1, "val_fraction": 0.5},
    ],
    ids=str,
)
def test_any_values_are_read_back(values, tmp_path):
    config = DEFAULT.updated({"preset": "mine"} | values)
    assert load_preset(saved(config, tmp_path)) == config


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])  # the latter as Windows' editor writes it
def test_a_file_sets_its_keys_and_is_the_preset(encoding, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("n_layer = 3\nlearning_rate = 1\n", encoding)
    values = {"n_layer": 3, "learning_rate": 1.0, "preset": str(path), "vocab_size": BPE_SIZE}
    assert load_preset(str(path)) == DEFAULT.updated(values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"^cannot read the preset .*mine\.toml: No such file or directory; check the name$"),
        (b"data = '\xff'", r"^cannot read the preset .*mine\.toml: .*invalid start byte; save it as UTF-8$"),
        (b"#" * 2**20 + b"#", r"mine\.toml has more than 1,048,576 bytes, which cannot be right: give another file$"),
        (b"n_layer = 0x1" + b"0" * 5000, r"mine\.toml: n_layer must be less than 2\*\*63, got a larger number$"),
        (b"seed = 0x1" + b"0" * 5000, r"seed must be at most \d+, got an integer of thousands of digits$"),
        (b"dropout = 0x1" + b"0" * 5000, r"dropout must be of type float, got an integer of thousands of digits$"),
        (b"data = [0x1" + b"0" * 5000 + b"]", r"data must be of type str, got an integer of thousands of digits$"),
        (b"data = " + b"[" * 5000, r"mine\.toml is not a valid TOML file: "),
        (b"x" * 100_000 + b" = 3", r"mine\.toml: unknown key 'x+\.\.\.x+'; the keys are "),
        (b'data = "\\u0000"', r"data must be without NUL, which no file's name has, got '\\x00'$"),
        (b'preset = "a\\u0000"', r"preset must be without NUL, "),
        (b"n_layer 3", r"mine\.toml is not a valid TOML file: .*line 1"),
        (b"n_layer = 3\nn_layer = 4", r"mine\.toml is not a valid TOML file: Cannot overwrite"),
        (b"[model]\nn_layer = 3", r"mine\.toml: model must be of type str, got \{'n_layer': 3\}"),
        (b"n_layr = 3", r"mine\.toml: unknown key 'n_layr'; did you mean 'n_layer'\?"),
        (b"learning_rate = nan", r"mine\.toml: learning_rate must be finite, got nan"),
        (b"eval_iters = [200]", r"mine\.toml: eval_iters must be of type int, got \[200\]"),
    ],
)
def test_a_bad_file_is_explained(content, message, tmp_path):
    path = tmp_path / "mine.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_preset(str(path))


def test_a_preset_there_is_not_is_explained():
    with pytest.raises(UserError, match=re.escape(f"'gpt-5': expected one of {', '.join(PRESETS)}, or a TOML file")):
        load_preset("gpt-5")


# --- values ---


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_layr": 3}, "unknown key 'n_layr'; did you mean 'n_layer'?"),
        ({"zzz": 1e-3}, f"unknown key 'zzz'; the keys are {', '.join(option_fields())}"),
        ({"lr": 1e-3}, "unknown key 'lr'; did you mean 'learning_rate'?"),
        ({"dataset": "x"}, "unknown key 'dataset'; did you mean 'data'?"),
        ({"device": "cpu"}, "unknown key 'device': --backend cupy computes on a GPU, --backend numpy on the CPU"),
        ({"dtype": "bfloat16"}, "unknown key 'dtype': it is the option --dtype of train.py"),
        ({"compile": False}, "unknown key 'compile': leave it out: there is nothing to compile"),
        ({"n_layer": "3"}, "n_layer must be of type int, got '3'"),
        ({"n_layer": 3.0}, "n_layer must be of type int, got 3.0"),
        ({"n_layer": True}, "n_layer must be of type int, got True"),
        ({"n_layer": None}, "n_layer must be of type int, got None"),
        ({"learning_rate": "1e-3"}, "learning_rate must be of type float, got '1e-3'"),
        ({"learning_rate": True}, "learning_rate must be of type float, got True"),
        ({"bias": 1}, "bias must be of type bool, got 1"),
        ({"qkv_bias": 0}, "qkv_bias must be of type bool, got 0"),
        ({"data": 3}, "data must be of type str, got 3"),
        ({"data": "\udcff"}, "data must be UTF-8, so that it can be saved, got '\\udcff': rename the file"),
        ({"activation": "tanh"}, "activation must be one of relu, gelu, gelu_tanh, got 'tanh'"),
        (
            {"tokenizer": "word"},
            "tokenizer must be one of char, byte, bpe, or the name of a tokenizer.json, got 'word'",
        ),
        ({"model": "rnn"}, "model must be one of gpt, bigram, heads, feed-forward, residual, layer-norm, got 'rnn'"),
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"dropout": -0.1}, "dropout must be at least 0, got -0.1"),
        ({"dropout": 1.1}, "dropout must be at most 1, got 1.1"),
        ({"val_fraction": 1}, "val_fraction must be at most 0.9, got 1.0"),
        (
            {"learning_rate": 10**400},
            "learning_rate must be of type float, got 100000000000000000...0000000000000000000",
        ),
        ({"warmup_iters": 10**400}, "warmup_iters must be less than 2**63, got a larger number"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_iters": -1}, "max_iters must be at least 0, got -1"),
        ({"beta2": 1.0}, "beta2 must be at most 0.9999999, got 1.0"),
        ({"grad_clip": float("inf")}, "grad_clip must be finite, got inf"),
        ({"learning_rate": float("nan")}, "learning_rate must be finite, got nan"),
        ({"dropout": float("-inf")}, "dropout must be finite, got -inf"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"seed": MAX_SEED + 1}, f"seed must be at most {MAX_SEED}, got {MAX_SEED + 1}"),
        ({"n_embd": 100}, "n_embd must be a multiple of n_head, got 100 and 12"),
        ({"n_head": 5}, "n_embd must be a multiple of n_head, got 768 and 5"),
        ({"min_lr": 0.1}, "min_lr has no effect at a constant rate: set lr_decay_iters too, or leave min_lr at 0"),
        ({"min_lr": 0.1, "lr_decay_iters": 9}, "min_lr must not exceed learning_rate, got 0.1 and 0.001"),
        (
            {"warmup_iters": 100, "lr_decay_iters": 100},
            "lr_decay_iters must be 0 or more than warmup_iters, got 100 and 100",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_explained(values, message):
    with pytest.raises(UserError) as error:
        DEFAULT.updated(values, source="here")
    assert str(error.value) == f"here: {message}"


def test_an_int_may_stand_for_a_float():
    config = DEFAULT.updated({"dropout": 0, "learning_rate": 1, "weight_decay": 2})
    values = (config.gpt.dropout, config.train.learning_rate, config.train.weight_decay)
    assert values == (0.0, 1.0, 2.0)
    assert all(type(value) is float for value in values)


def test_every_option_says_what_it_is():
    assert set(option_fields()) == {f.name for half in (GPTConfig, TrainConfig) for f in fields(half)}
    for name, f in option_fields().items():
        assert f.metadata["help"].strip(" .") == f.metadata["help"] != "", name
