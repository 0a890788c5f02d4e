"""Weights of other programs: transformers' GPT-2 gives the same numbers here, and a file is taken whole or refused."""

import json
import re
import shlex
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save
from safetensors.torch import save as save_torch

from gpt import GPT, GPTConfig
from gpt.errors import UserError
from gpt.models.pretrained import MATRICES, find_pretrained

# --- the reference ---

SHAPES = {
    "tied": {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 64},
    "untied": {"n_layer": 1, "n_head": 3, "n_embd": 12, "vocab_size": 50, "tie_word_embeddings": False},
    "gelu": {"n_layer": 3, "n_head": 1, "n_embd": 8, "vocab_size": 300, "activation_function": "gelu"},
    "relu": {"n_layer": 1, "n_head": 8, "n_embd": 32, "vocab_size": 20, "activation_function": "relu"},
}


@pytest.fixture(scope="module")
def references(tmp_path_factory) -> dict:
    """By the names of SHAPES, a model of transformers with random weights and the folder that it saved itself in."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import GPT2Config, GPT2LMHeadModel

        made = {}
        for seed, (name, shape) in enumerate(SHAPES.items()):
            model = GPT2LMHeadModel(GPT2Config(n_positions=128, bos_token_id=0, eos_token_id=0, **shape)).eval()
            generator = torch.Generator().manual_seed(seed)
            for parameter in model.parameters():  # the biases and norms too, and large enough to matter
                parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
            model.transformer.wpe.weight.data *= 5  # or it would say the same for ever
            made[name] = model, tmp_path_factory.mktemp(name)
            model.save_pretrained(made[name][1])
    return made


def loaded(path: Path, n_head: int | None = None, vocab_size: int | None = None) -> GPT:
    found = find_pretrained(path, n_head)
    weights = found.weights(vocab_size or found.shape.vocab_size)
    model = GPT(found.shape, seed=None)
    for name, parameter in model.named_parameters():
        parameter.data = weights.pop(name)
        assert parameter.data.dtype == np.float32
        assert parameter.data.flags.c_contiguous
    assert not weights
    return model


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_model_computes_the_same_here(references, name):
    reference, folder = references[name]
    model = loaded(folder).eval()
    assert model.config.tie_weights == (name != "untied")
    assert model.num_parameters() == sum(p.numel() for p in reference.parameters())
    ids = np.random.default_rng(0).integers(model.vocab_size, size=(3, 128))
    with torch.inference_mode():
        expected = reference(torch.tensor(ids), labels=torch.tensor(ids))
    logits, loss = model(ids[:, :-1], ids[:, 1:])
    np.testing.assert_allclose(logits.numpy(), expected.logits[:, :-1].numpy(), rtol=0, atol=1e-4)
    assert abs(loss.item() - expected.loss.item()) < 1e-5


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_greedy_continuation_is_transformers(references, name, use_cache):
    """Of 100 tokens each is the reference's likeliest after those before it, or within 1e-5 of it."""
    reference, folder = references[name]
    model = loaded(folder)
    start = np.random.default_rng(1).integers(model.vocab_size, size=(2, 7))
    ids = model.generate(start, 100, temperature=0, use_cache=use_cache)
    with torch.inference_mode():
        logits = reference(torch.tensor(ids)).logits[:, 6:-1].numpy()  # (2, 100, V), of what follows
    chosen = np.take_along_axis(logits, ids[:, 7:, None], axis=2)[..., 0]
    assert (chosen >= logits.max(axis=2) - 1e-5).all()
    assert len(np.unique(ids[:, 7:])) > 5


# --- files as they are found ---

CONFIG = GPTConfig(vocab_size=11, block_size=6, n_layer=2, n_head=2, n_embd=8)
SETTINGS = {"model_type": "gpt2", "n_positions": 6, "n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": 11}


def tensors(config: GPTConfig = CONFIG, head: bool = False) -> dict[str, np.ndarray]:
    """Of a model of ours under nanoGPT's names; the norms and biases are made random too."""
    rng = np.random.default_rng(2)
    named = GPT(config, seed=1).named_parameters(remove_duplicate=not head)
    weights = {name: rng.normal(size=parameter.shape).astype(np.float32) for name, parameter in named}
    if head and config.tie_weights:
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    return weights


def conv1d(weights: dict) -> dict:
    """GPT-2's tensors of nanoGPT's."""
    return {n: np.ascontiguousarray(w.T) if MATRICES.search(n) else w for n, w in weights.items()}


def renamed(weights: dict, old: str, new: str) -> dict:
    return {re.sub(old, new, name): weight for name, weight in weights.items()}


def write(folder: Path, weights: dict | bytes, settings: dict | bytes | None, name: str = "model.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(weights if isinstance(weights, bytes) else save(weights, {"format": "pt"}))
    if settings is not None:
        text = settings if isinstance(settings, bytes) else json.dumps(settings).encode()
        (folder / "config.json").write_bytes(text)
    return folder


def sharded(folder: Path, weights: dict, **changes: str) -> Path:
    """Two shards and their index, in which shards are renamed."""
    names = sorted(weights)
    shards = {"a-1.safetensors": names[::2], "a-2.safetensors": names[1::2]}
    for shard, part in shards.items():
        write(folder, {name: weights[name] for name in part}, SETTINGS, shard)
    index = {name: changes.get(shard[:3], shard) for shard, part in shards.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def masks(dtype) -> dict:
    mask = np.tril(np.ones((6, 6), dtype))[None, None]
    return {"transformer.h.0.attn.bias": mask, "transformer.h.1.attn.masked_bias": np.array(-1e4, np.float32)}


PLAIN = tensors()
GPT2 = conv1d(PLAIN)
TIED = tensors(head=True)
UNTIED = tensors(GPTConfig(**vars(CONFIG) | {"tie_weights": False}))
BIASLESS = tensors(GPTConfig(**vars(CONFIG) | {"bias": False}))
NO_LENGTH = {key: value for key, value in SETTINGS.items() if key != "n_positions"}
ALL = slice(None)
TAKEN = {  # weights, config.json, and the weights that are expected if not PLAIN
    "names in full": (GPT2, SETTINGS),
    "names without transformer.": (renamed(GPT2, r"^transformer\.", ""), SETTINGS),
    "integer masks": (GPT2 | masks(np.uint8), SETTINGS),
    "boolean masks": (renamed(GPT2 | masks(np.bool_), r"^transformer\.", ""), SETTINGS),
    "float masks": (GPT2 | masks(np.float32), SETTINGS),
    "a head that is the table": (conv1d(TIED), SETTINGS),
    "a head that is the table, and it is said": (conv1d(TIED), SETTINGS | {"tie_word_embeddings": True}),
    "a head of its own": (conv1d(UNTIED), SETTINGS | {"tie_word_embeddings": False}, UNTIED),
    "a head of its own with the same values": (conv1d(TIED), SETTINGS | {"tie_word_embeddings": False}, TIED),
    "n_ctx": (GPT2, NO_LENGTH | {"n_ctx": 6}),
    "n_inner": (GPT2, SETTINGS | {"n_inner": 32}),
    "no n_inner": (GPT2, SETTINGS | {"n_inner": None, "activation_function": "gelu_pytorch_tanh"}),
    "what is no matter": (GPT2, SETTINGS | {"resid_pdrop": 0.3, "summary_type": "x", "layer_norm_epsilon": 0.00001}),
    "nanoGPT": (PLAIN, {"n_head": 2, "bias": True, "dropout": 0.0, "block_size": 6}),
    "nanoGPT with its head": (TIED, {"n_head": 2}),
    "nanoGPT with a head of its own": (UNTIED, {"n_head": 2}, UNTIED),
    "nanoGPT without biases": (BIASLESS, {"n_head": 2}, BIASLESS),
    "nanoGPT compiled": (renamed(PLAIN, "^", "_orig_mod."), {"n_head": 2}),
    "nanoGPT in parallel": (renamed(PLAIN, "^", "module."), {"n_head": 2}),
    "nanoGPT compiled in parallel": (renamed(PLAIN, "^", "_orig_mod.module."), {"n_head": 2}),
}


def assert_same(model: GPT, expected: dict) -> None:
    ours = dict(model.named_parameters())
    assert ours.keys() == expected.keys()
    for name, weight in expected.items():
        np.testing.assert_array_equal(ours[name].data, weight, err_msg=name)


@pytest.mark.parametrize("case", TAKEN)
def test_files_as_they_are_found(tmp_path, case):
    weights, settings, expected = (*TAKEN[case], PLAIN)[:3]
    model = loaded(write(tmp_path, weights, settings))
    assert_same(model, expected)
    assert model.config.activation == ("gelu" if "nanoGPT" in case else "gelu_tanh")
    assert_same(loaded(tmp_path / "model.safetensors"), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_floats_become_float32(tmp_path, dtype):
    narrow = {name: torch.tensor(weight).to(dtype) for name, weight in GPT2.items()}
    model = loaded(write(tmp_path, save_torch(narrow), SETTINGS))
    assert_same(model, {name: torch.tensor(weight).to(dtype).float().numpy() for name, weight in PLAIN.items()})


def test_shards_and_links(tmp_path):
    """A folder of Hugging Face's cache holds links."""
    sharded(tmp_path / "model", GPT2)
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "model").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    for path in ("model", "snapshot", "model/model.safetensors.index.json"):
        assert_same(loaded(tmp_path / path), PLAIN)


def test_a_padded_vocabulary_loses_its_last_rows(tmp_path):
    write(tmp_path, conv1d(UNTIED), SETTINGS | {"tie_word_embeddings": False})
    cut = {name: weight[:7] if weight.shape == (11, 8) else weight for name, weight in UNTIED.items()}
    weights = find_pretrained(tmp_path).weights(7)
    for name, weight in cut.items():
        np.testing.assert_array_equal(weights[name], weight)


def test_the_number_of_heads_can_be_given(tmp_path):
    write(tmp_path, PLAIN, None)
    with pytest.raises(UserError, match="does not tell its number of attention heads: give it with --n-head"):
        loaded(tmp_path / "model.safetensors")
    assert loaded(tmp_path, 4).config.n_head == 4
    with pytest.raises(UserError, match="n_embd must be a multiple of n_head, got 8 and 3"):
        loaded(tmp_path, 3)


def without(weights: dict, name: str) -> dict:
    return {key: value for key, value in weights.items() if key != name}


NAN = GPT2 | {"transformer.ln_f.bias": np.full(8, np.nan, np.float32)}
REFUSED = {
    "another model": (GPT2, {"model_type": "llama"}, "config.json has model_type 'llama', and only gpt2 is computed"),
    "another epsilon": (GPT2, SETTINGS | {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon 1e-06, and only 1e-05"),
    "scaled by layer": (GPT2, SETTINGS | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    "upcast": (GPT2, SETTINGS | {"reorder_and_upcast_attn": True}, "has reorder_and_upcast_attn True"),
    "unscaled": (GPT2, SETTINGS | {"scale_attn_weights": False}, "scale_attn_weights False, and only True"),
    "cross attention": (GPT2, SETTINGS | {"add_cross_attention": True}, "has add_cross_attention True"),
    "another activation": (GPT2, SETTINGS | {"activation_function": "silu"}, "activation_function is 'silu', and only"),
    "no activation": (GPT2, SETTINGS | {"activation_function": ["gelu"]}, "activation_function is ['gelu'], and only"),
    "another width inside": (GPT2, SETTINGS | {"n_inner": 16}, "says n_inner 16 where the weights need 32"),
    "more layers said": (GPT2, SETTINGS | {"n_layer": 3}, "its config.json says n_layer 3 where the weights need 2"),
    "another vocabulary said": (GPT2, SETTINGS | {"vocab_size": "11"}, "says vocab_size '11' where the weights"),
    "another length said": (GPT2, SETTINGS | {"n_positions": 7}, "says n_positions 7 where the weights need 6"),
    "another width said": (GPT2, SETTINGS | {"n_embd": 10**400}, "says n_embd 1000000"),
    "heads that do not divide": (GPT2, SETTINGS | {"n_head": 3}, "n_embd must be a multiple of n_head, got 8 and 3"),
    "heads that are none": (GPT2, SETTINGS | {"n_head": "2"}, "n_head must be of type int, got '2'"),
    "no config.json": (GPT2, None, "has the weights of a GPT-2 and no config.json beside it: put that there too"),
    "no JSON": (GPT2, b"{", "config.json: it is damaged or no JSON"),
    "binary config.json": (GPT2, b"\xff\xfe", "config.json: it is damaged or no JSON"),
    "deep JSON": (GPT2, b"[" * 10**5, "config.json: it is damaged or no JSON"),
    "a list": (GPT2, b"[1]", "config.json: expected a JSON object, got [1]"),
    "two heads": (conv1d(UNTIED), SETTINGS, "lm_head.weight and transformer.wte.weight differ, and its config"),
    "no head": (GPT2, SETTINGS | {"tie_word_embeddings": False}, "has no lm_head.weight, and tie_word_embeddings is"),
    "a tensor is missing": (without(GPT2, "transformer.ln_f.weight"), SETTINGS, "it has no ln_f.weight"),
    "foreign tensors": (GPT2 | {"transformer.h.0.attn.rotary": np.ones(3, np.float32)}, SETTINGS,
                        "it has unknown transformer.h.0.attn.rotary"),
    "foreign names": ({"model.embed_tokens.weight": np.ones((3, 4), np.float32)}, None,
                      "it has unknown model.embed_tokens.weight; no wte.weight; no wpe.weight; no h.0.attn.c_attn"),
    "many foreign names": ({f"layer.{i}": np.ones(1, np.float32) for i in range(2000)}, None, "; and 1997 more"),
    "raw names": ({"\x1b[2J\n": np.ones(1, np.float32)}, None, r"it has unknown \x1b[2J\n; no"),
    "a misshapen tensor": (GPT2 | {"transformer.ln_f.bias": np.ones(9, np.float32)}, SETTINGS,
                           "it has transformer.ln_f.bias of shape (9,), expected (8,)"),
    "a flat table": (GPT2 | {"transformer.wte.weight": np.ones(88, np.float32)}, SETTINGS,
                     "transformer.wte.weight of shape (88,), expected a matrix"),
    "an empty table": (GPT2 | {"transformer.wpe.weight": np.ones((0, 8), np.float32)}, NO_LENGTH,
                       "block_size must be at least 1, got 0"),
    "turned matrices": (GPT2 | {"transformer.h.1.mlp.c_fc.weight": np.ones((32, 8), np.float32)}, SETTINGS,
                        "transformer.h.1.mlp.c_fc.weight of shape (32, 8), expected (8, 32)"),
    "a layer left out": (renamed(GPT2, r"h\.1", "h.7"), SETTINGS, "unknown transformer.h.7."),
    "twice the same": (GPT2 | {"ln_f.bias": np.ones(8, np.float32)}, SETTINGS,
                       "has ln_f.bias twice, also as transformer.ln_f.bias"),
    "integers": (GPT2 | {"transformer.ln_f.bias": np.ones(8, np.int64)}, SETTINGS, "is no array of F32 or F16 or BF16"),
    "doubles": (GPT2 | {"transformer.ln_f.bias": np.ones(8)}, SETTINGS, "'transformer.ln_f.bias' is no array of F32"),
    "nan": (NAN, SETTINGS, "transformer.ln_f.bias has values that are nan or infinite"),
    "no safetensors": (b"version https://git-lfs.github.com/spec/v1\n", SETTINGS, "is damaged or not a safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_by_name(tmp_path, case):
    weights, settings, said = REFUSED[case]
    write(tmp_path, weights, settings)
    with pytest.raises(UserError) as error:
        loaded(tmp_path)
    assert said in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 900


def test_a_file_cut_short_anywhere(tmp_path):
    raw = save(GPT2)
    for length in (0, 7, 8, 100, 2000, len(raw) // 2, len(raw) - 1):
        write(tmp_path, raw[:length], SETTINGS)
        with pytest.raises(
            UserError, match=r"cannot read .*model.safetensors: it is damaged or not a safetensors file"
        ):
            loaded(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"a-1": "../a-1.safetensors"}, "names the file '../a-1.safetensors': expected one of safetensors in the same"),
        ({"a-1": "/etc/passwd"}, "names the file '/etc/passwd'"),
        ({"a-1": "..\\a.safetensors"}, "names the file"),
        ({"a-1": ".."}, "names the file"),
        ({"a-2": "b.safetensors"}, "b.safetensors: No such file or directory; check the name"),
        ({"a-2": "a-1.safetensors"}, "no h.0.attn.c_attn.weight"),
    ],
)
def test_shards_lie_beside_their_index(tmp_path, changes, said):
    sharded(tmp_path / "m", GPT2, **changes)
    (tmp_path / "a-1.safetensors").write_bytes((tmp_path / "m/a-1.safetensors").read_bytes())
    with pytest.raises(UserError) as error:
        loaded(tmp_path / "m")
    assert said in str(error.value)
    (tmp_path / "m/model.safetensors.index.json").write_text('{"weight_map": []}')
    with pytest.raises(UserError, match="names no files in its weight_map"):
        loaded(tmp_path / "m")


def test_a_pickle_is_not_opened_but_can_be_converted(tmp_path):
    """By the command that is named, with the weights of nanoGPT's ckpt.pt."""
    (tmp_path / "a b").mkdir()
    torch.save({"model": {n: torch.tensor(w) for n, w in PLAIN.items()}, "iter_num": 3}, tmp_path / "a b/ckpt.pt")
    for path in (tmp_path / "a b", tmp_path / "a b/ckpt.pt"):
        with pytest.raises(UserError, match="ckpt.pt is a pickle, which can run code when it is opened") as error:
            loaded(path)
    command = shlex.split(str(error.value).partition("convert it safely with: ")[2])
    assert command[:2] == ["python", "-c"]
    subprocess.run([sys.executable, *command[1:]], check=True, timeout=60)
    assert_same(loaded(tmp_path / "a b", 2), PLAIN)


def test_memory_that_weights_take(tmp_path):
    """The model's and a fifth, though half of it is stored as half as wide and turned."""
    config = GPTConfig(vocab_size=4000, block_size=64, n_layer=6, n_head=2, n_embd=256)
    narrow = {name: weight.astype(np.float16) for name, weight in conv1d(tensors(config)).items()}
    write(tmp_path, narrow, {"model_type": "gpt2", "n_head": 2})
    tracemalloc.start()
    try:
        model = loaded(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.2 * 4 * model.num_parameters() + 2**20
