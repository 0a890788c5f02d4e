"""Checkpoints: everything comes back, any damage is noticed, and a failed save leaves the old file."""

import errno
import json
import os
import pickle
import socket
import struct
import tracemalloc
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save
from safetensors.torch import load_file as load_torch_file
from torch_gpt import TorchGPT

import gpt.checkpoint
from gpt.checkpoint import Checkpoint, Progress, load_checkpoint, save_checkpoint
from gpt.config import Config, GPTConfig, TrainConfig, option_fields
from gpt.errors import UserError
from gpt.models.kinds import build_model
from gpt.tensor_file import TensorFile
from gpt.text.tokenizers import ByteTokenizer, CharTokenizer

SHAPE = {"block_size": 4, "n_layer": 1, "n_head": 2, "n_embd": 4}
WEIGHTS = (
    "transformer.wte.weight transformer.wpe.weight transformer.h.0.ln_1.weight transformer.h.0.ln_1.bias "
    "transformer.h.0.attn.c_attn.weight transformer.h.0.attn.c_attn.bias transformer.h.0.attn.c_proj.weight "
    "transformer.h.0.attn.c_proj.bias transformer.h.0.ln_2.weight transformer.h.0.ln_2.bias "
    "transformer.h.0.mlp.c_fc.weight transformer.h.0.mlp.c_fc.bias transformer.h.0.mlp.c_proj.weight "
    "transformer.h.0.mlp.c_proj.bias transformer.ln_f.weight transformer.ln_f.bias lm_head.weight"
)


def make(tokenizer=None, progress=None, for_resume=True, model="gpt", **shape) -> Checkpoint:
    tokenizer = tokenizer or CharTokenizer("\n abé日")
    name = "/a/tokenizer.json" if tokenizer.kind == "file" else tokenizer.kind
    train = {"preset": "my.toml", "model": model, "data": "/a/naïve text", "tokenizer": name}
    config = Config(
        GPTConfig(vocab_size=tokenizer.vocab_size, **SHAPE | shape),
        TrainConfig(**train, learning_rate=1e-5, seed=2**63 - 1),
    )
    built = build_model(model, config.gpt, seed=3)
    size = built.num_parameters()
    moments = {"m": np.linspace(-1, 1, size, dtype=np.float32), "v": np.linspace(0, 1, size, dtype=np.float32)}
    progress = progress or Progress(step=7, best_val_loss=1 / 3, evaluated_step=6, seconds=0.1)
    return Checkpoint(config, tokenizer, built.state_dict(), progress, "0f" * 32, moments if for_resume else {})


@pytest.fixture
def path(tmp_path) -> Path:
    """Where an intact checkpoint lies."""
    save_checkpoint(tmp_path / "last.safetensors", make())
    return tmp_path / "last.safetensors"


def assert_refused(path: Path, *said: str) -> str:
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    message = str(error.value)
    assert all(part in message for part in (str(path), *said)), message
    assert "\n" not in message
    return message


# --- round trips ---


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tokenizer": ByteTokenizer(), "for_resume": False},
        {"progress": Progress()},
        {"tie_weights": False, "head_bias": True, "bias": False, "qkv_bias": True, "activation": "relu"},
        {"model": "bigram"},
    ],
    ids=["characters", "bytes, not to resume", "nothing done", "another shape", "bigram"],
)
def test_everything_comes_back(tmp_path, options):
    saved = make(**options)
    save_checkpoint(tmp_path / "c.safetensors", saved)
    loaded = load_checkpoint(tmp_path / "c.safetensors")
    assert loaded.config.to_dict() == saved.config.to_dict()
    assert loaded.tokenizer.to_dict() == saved.tokenizer.to_dict()
    assert loaded.progress == saved.progress
    assert loaded.fingerprint == saved.fingerprint
    for ours, theirs in ((loaded.weights, saved.weights), (loaded.optimizer, saved.optimizer)):
        assert ours.keys() == theirs.keys()
        for name, array in ours.items():
            assert array.dtype == np.float32
            np.testing.assert_array_equal(array, theirs[name])
    built = loaded.build_model().state_dict()
    assert all(np.array_equal(built[name], saved.weights[name]) for name in saved.weights)


def test_file_is_plain_safetensors_under_nanogpt_names(path):
    tensors = load_file(path)
    assert set(tensors) == {*WEIGHTS.split(), "optimizer.m", "optimizer.v"}
    assert tensors["transformer.h.0.attn.c_attn.weight"].shape == (12, 4)  # (out, in)
    np.testing.assert_array_equal(tensors["lm_head.weight"], tensors["transformer.wte.weight"])


@pytest.mark.parametrize("tie_weights", [True, False])
def test_pytorch_takes_the_weights_by_name(tmp_path, tie_weights):
    checkpoint = make(for_resume=False, tie_weights=tie_weights)
    save_checkpoint(tmp_path / "best.safetensors", checkpoint)
    model = TorchGPT(checkpoint.config.gpt)
    model.load_state_dict(load_torch_file(tmp_path / "best.safetensors"))
    for name, weight in model.state_dict().items():
        np.testing.assert_array_equal(weight.numpy(), checkpoint.weights[name])


# --- damage ---


def test_file_cut_short_anywhere(path):
    raw = path.read_bytes()
    for length in [*range(20), *range(20, len(raw), 61), len(raw) - 1]:
        path.write_bytes(raw[:length])
        assert_refused(path)


def test_any_changed_byte(path):
    raw = path.read_bytes()
    (header,) = struct.unpack("<Q", raw[:8])
    rng = np.random.default_rng(0)
    positions = [*range(8), *rng.integers(8, 8 + header, 120), *rng.integers(8 + header, len(raw), 80)]
    for position in positions:
        for mask in (1 << int(rng.integers(8)), 255):
            damaged = bytearray(raw)
            damaged[position] ^= mask
            path.write_bytes(damaged)
            assert_refused(path)


def foreign(metadata: dict | None = None, dtype: str = "F32") -> bytes:
    """A safetensors file of another program: one tensor of four bytes."""
    header = {"w": {"dtype": dtype, "shape": [4 // {"F32": 4, "BF16": 2, "F8_E4M3": 1}[dtype]], "data_offsets": [0, 4]}}
    text = json.dumps(header | ({"__metadata__": metadata} if metadata else {})).encode()
    return struct.pack("<Q", len(text)) + text + bytes(4)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "damaged or not a safetensors file"),
        (b"\n", "damaged or not a safetensors file"),
        (bytes(1000), "damaged or not a safetensors file"),
        (b"\xff" * 1000, "damaged or not a safetensors file"),
        (np.random.default_rng(0).bytes(5000), "damaged or not a safetensors file"),
        (pickle.dumps({"weights": [1.0] * 100}), "damaged or not a safetensors file"),
        (b"To be, or not to be, that is the question", "damaged or not a safetensors file"),
        (foreign(), "not a checkpoint of this program"),
        (foreign({"format": "pt"}), "not a checkpoint of this program (format 'pt')"),
        (foreign({"format": "tensorlite-gpt/2"}), "(format 'tensorlite-gpt/2')"),
        (foreign({"format": "tensorlite-gpt/1"}), "its config is no JSON object"),
        (foreign(dtype="BF16"), "not a checkpoint of this program"),
        (foreign(dtype="F8_E4M3"), "not a checkpoint of this program"),
        (foreign({"format": "tensorlite-gpt/1"}, "F8_E4M3"), ""),
    ],
    ids="empty newline zeros ones random pickle text foreign pt newer bare bf16 f8 f8-bare".split(),  # noqa: SIM905
)
def test_something_else(tmp_path, content, said):
    (tmp_path / "x.safetensors").write_bytes(content)
    assert_refused(tmp_path / "x.safetensors", said)


def test_no_file(tmp_path):
    assert_refused(tmp_path / "missing.safetensors", "there is no checkpoint")
    assert_refused(tmp_path / "no folder" / "missing.safetensors", "there is no checkpoint")
    assert_refused(tmp_path)


def rewrite(path: Path, drop: str = "", tensors: dict | None = None, **changes: str) -> None:
    """Change the metadata of the checkpoint at `path`, or its tensors, and its checksum accordingly."""
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    tensors = load_file(path) if tensors is None else tensors
    metadata = {key: value for key, value in (metadata | changes).items() if key not in (drop, "sha256")}
    path.write_bytes(save(tensors, metadata | {"sha256": gpt.checkpoint._digest(tensors, metadata)}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "tensorlite-gpt/2"}, "(format 'tensorlite-gpt/2')"),
        ({"drop": "format"}, "(format None)"),
        ({"drop": "config"}, "config"),
        ({"drop": "tokenizer"}, "tokenizer"),
        ({"drop": "progress"}, "progress"),
        ({"drop": "fingerprint"}, "fingerprint"),
        ({"config": '{"n_layr": 1}'}, "'n_layr'; did you mean 'n_layer'?"),
        ({"config": '{"n_layer": "1"}'}, "n_layer must be of type int"),
        ({"config": "[]"}, ""),
        ({"config": "{"}, ""),
        ({"tokenizer": '{"kind": "words"}'}, "kind"),
        ({"tokenizer": f"[{'[],' * 2**21}[]]"}, "its tokenizer is no JSON object"),
        ({"tokenizer": '{"kind": "char", "symbols": "ba"}'}, "sorted"),
        ({"progress": '{"step": 1, "epoch": 2}'}, "epoch"),
        ({"progress": "null"}, ""),
    ],
)
def test_other_metadata_under_a_right_checksum(path, changes, said):
    rewrite(path)
    load_checkpoint(path)
    rewrite(path, **changes)
    assert_refused(path, said)


@pytest.mark.parametrize("part", ["config", "progress"])
def test_a_file_from_before_an_option_was_added(path, part):
    """Whichever is left out has its default, which is to mean what was done before."""
    rewrite(path)
    with safe_open(path, framework="numpy") as file:
        values = json.loads(file.metadata()[part])
    defaults = {name: f.default for name, f in option_fields().items()} if part == "config" else asdict(Progress())
    for key in values.keys() - {*SHAPE, "vocab_size", "step"}:  # whose defaults do not fit the rest
        rewrite(path, **{part: json.dumps({k: v for k, v in values.items() if k != key})})
        checkpoint = load_checkpoint(path)
        config, progress = checkpoint.config, checkpoint.progress
        loaded = vars(config.gpt) | vars(config.train) if part == "config" else asdict(progress)
        assert loaded == defaults | values | {key: defaults[key]}, key


@pytest.mark.parametrize("change", [{"n_embd": 8}, {"n_layer": 2}, {"bias": False}, {"model": "bigram"}])
def test_weights_that_do_not_fit_the_configuration(path, change):
    config = load_checkpoint(path).config.to_dict()
    rewrite(path, config=json.dumps(config | change))
    with pytest.raises(UserError, match="do not fit its configuration"):
        load_checkpoint(path).build_model()


@pytest.mark.parametrize(
    ("model", "change"),
    [
        ("gpt", {"n_layer": 10**9}),
        ("gpt", {"n_head": 1, "n_embd": 2**40}),
        ("gpt", {"block_size": 2**40}),
        ("bigram", {"block_size": 2**62, "vocab_size": 2**31}),
    ],
)
def test_a_shape_is_compared_before_a_model_is_made(tmp_path, model, change):
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, make(model=model))
    rewrite(path, config=json.dumps(load_checkpoint(path).config.to_dict() | change))
    assert peak_of(lambda: assert_refused(path)) < 4e6


def test_as_many_values_as_a_model_has_but_in_one_array(path):
    """Many blocks of next to nothing would be many objects."""
    shape = {"block_size": 1, "n_layer": 10**5, "n_head": 1, "n_embd": 1, "bias": False}
    config = load_checkpoint(path).config.to_dict() | shape
    config = {key: value for key, value in config.items() if key != "qkv_bias"}
    count = GPTConfig(vocab_size=6, **shape).num_parameters() + 6
    rewrite(path, tensors={"w": np.zeros(count, np.float32)}, config=json.dumps(config))
    assert peak_of(lambda: assert_refused(path, "do not fit its configuration")) < 4e6


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":[' + b"[]," * 200_000 + b"[]]}",
        b"[" * 400_000,
        b'{"a":' * 100_000,
        b'{"a":[' + b"[]," * 3_000_000 + b"[]]}",
        b'{"a":[' + b'"b",' * 3_000_000 + b"[]]}",
        b'{"a":"' + b"b" * 2**22 + b'","c":[' + b"[]," * 2_000_000 + b"[]]}",
    ],
    ids=["arrays", "deep", "objects", "more arrays", "texts", "a text and arrays"],
)
def test_a_header_that_would_fill_the_memory(path, header):
    for length, limit in ((len(header), 2e7), (2**62, 1e5)):
        path.write_bytes(struct.pack("<Q", length) + header)
        assert peak_of(lambda: assert_refused(path)) < limit


def test_a_header_that_could_not_be_read_again_is_not_written(path, monkeypatch):
    monkeypatch.setattr(gpt.checkpoint, "MAX_HEADER", 2000)
    before = path.read_bytes()
    with pytest.raises(UserError, match="a model of this many layers or symbols is too much for its header"):
        save_checkpoint(path, make())
    assert path.read_bytes() == before


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name", ["lm_head.weight", "transformer.wte.weight", "transformer.ln_f.bias", "optimizer.m", "optimizer.v"]
)
def test_values_that_have_diverged_are_refused(path, name, value):
    tensors = load_file(path)
    tensors[name].reshape(-1)[-1] = value
    rewrite(path, tensors=tensors)
    for for_resume in (True, False):
        with pytest.raises(UserError, match=r"cannot be used, for .*: take an earlier checkpoint, or train anew$"):
            load_checkpoint(path, for_resume)


def test_tied_weights_that_differ(path):
    tensors = load_file(path)
    tensors["lm_head.weight"][0, 0] += 1
    rewrite(path, tensors=tensors)
    assert_refused(path, "for lm_head.weight and transformer.wte.weight are one in its model and differ")


def test_a_negative_square(path):
    tensors = load_file(path)
    tensors["optimizer.v"][3] = -1e-9
    rewrite(path, tensors=tensors)
    assert_refused(path, "optimizer.v")


@pytest.mark.parametrize(
    ("progress", "said"),
    [
        ({"step": -1}, "step must be at least 0, got -1"),
        ({"step": 2**63}, "step must be less than 2**63, got a larger number"),
        ({"step": True}, "step must be of type int, got True"),
        ({"step": 3}, "evaluated_step must not exceed step, got 6 and 3"),
        ({"evaluated_step": -2}, "evaluated_step must be at least -1, got -2"),
        ({"best_val_loss": float("nan")}, "best_val_loss must be finite, got nan"),
        ({"best_val_loss": "1"}, "best_val_loss must be of type float, got '1'"),
        ({"seconds": -1.0}, "seconds must be at least 0, got -1.0"),
        ({"seconds": None}, "seconds must be of type float, got None"),
    ],
)
def test_progress_that_cannot_be(path, progress, said):
    rewrite(path, progress=json.dumps(asdict(load_checkpoint(path).progress) | progress))
    assert_refused(path, said)


def test_a_tokenizer_of_another_size(path):
    rewrite(path, tokenizer='{"kind": "char", "symbols": "abc"}')
    assert_refused(path, "its tokenizer is char of 3, its configuration's char of 6")


# --- the file system ---


@pytest.mark.parametrize("kind", ["pipe", "socket", "/dev/zero", "/dev/null"])
def test_what_is_no_regular_file(tmp_path, kind):
    path = tmp_path / kind
    if kind == "pipe":
        os.mkfifo(path)
    with socket.socket(socket.AF_UNIX) as ours:
        if kind == "socket":
            ours.bind(str(path))
        assert_refused(path, "give another" if kind != "socket" else "cannot read")


def test_a_link_that_the_user_names_is_followed(path):
    (path.parent / "link").symlink_to(path.name)
    assert load_checkpoint(path.parent / "link").progress.step == 7


def test_cut_short_while_it_is_read(path, monkeypatch):
    """A mapped file would end the process with SIGBUS."""
    shapes, size = TensorFile.shapes, path.stat().st_size
    for left in (0, size // 2, size - 1):
        save_checkpoint(path, make())
        monkeypatch.setattr(TensorFile, "shapes", lambda file, left=left: (shapes(file), os.truncate(path, left))[0])
        assert_refused(path, "it ends too early")


def peak_of(work) -> int:
    """The most bytes that are held during work(), beyond what was held before."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("for_resume", [True, False])
@pytest.mark.parametrize(
    "options",
    [{"n_layer": 3, "n_embd": 256}, {"tokenizer": CharTokenizer("".join(map(chr, range(5000)))), "n_embd": 256},
     {"model": "bigram", "tokenizer": CharTokenizer("".join(map(chr, range(1600))))}],
    ids=["layers", "tables", "bigram"],
)  # fmt: skip
def test_memory_that_a_checkpoint_takes(tmp_path, options, for_resume):
    """To load it: that of the model, with its moments if they are asked for, and at most a fifth of the file. To save
    it: less than that. The model takes the arrays over."""
    path, checkpoint = tmp_path / "c.safetensors", make(**options)
    assert peak_of(lambda: save_checkpoint(path, checkpoint)) < path.stat().st_size / 5
    model = 4 * checkpoint.build_model().num_parameters()
    held = []

    def load():
        held.append(load_checkpoint(path, for_resume))
        held.append(held[0].build_model())

    assert peak_of(load) < model * (3 if for_resume else 1) + path.stat().st_size / 5
    assert held[1].state_dict().keys() == checkpoint.weights.keys()


# --- saving ---


@pytest.mark.parametrize("failing", ["make_header", "fsync", "replace"])
def test_failed_save_leaves_the_old_file_and_nothing_else(path, monkeypatch, failing):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = path.read_bytes()
    monkeypatch.setattr(gpt.checkpoint if failing == "make_header" else os, failing, full)
    with pytest.raises((UserError, OSError)) as error:
        save_checkpoint(path, make(progress=Progress(step=8)))
    monkeypatch.undo()
    assert failing == "make_header" or str(error.value).startswith(f"cannot write {path}: No space left on device")
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    before = os.umask(0o027)
    try:
        save_checkpoint(tmp_path / "c.safetensors", make())
    finally:
        os.umask(before)
    assert (tmp_path / "c.safetensors").stat().st_mode & 0o777 == 0o640
