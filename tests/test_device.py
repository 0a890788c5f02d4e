"""The options that say where to compute: what they refuse, and that the GPU's reach the backend and the model."""

import sys

import numpy as np
import pytest
import strict_cupy
from test_trainer import DATA

import sample
import train
from gpt.cli import run_script
from gpt.config import GPTConfig
from gpt.device import Device
from gpt.errors import UserError
from gpt.model import build_model
from gpt.run import RunFolder
from tensorlite import BackendError

SHAPE = GPTConfig(vocab_size=DATA.tokenizer.vocab_size, block_size=8, n_layer=1, n_head=2, n_embd=16)
TINY = ["--n-layer", "1", "--n-head", "2", "--n-embd", "8", "--max-iters", "6", "--eval-iters", "2", "--data", "ab"]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"tf32": True}, UserError, "--tf32 has no effect on the CPU: leave it out, or add --backend cupy"),
        ({"tf32": False}, UserError, "--no-tf32 has no effect on the CPU"),
        ({"graph": False}, UserError, "--no-graph has no effect on the CPU"),
        ({"threads": 0}, UserError, "--threads must be at least 1, got 0"),
        (
            {"dtype": "bfloat16"},
            BackendError,
            "the numpy backend has no bfloat16: use --backend cupy, or --dtype float32",
        ),
        ({"backend": "cupy", "threads": 2}, UserError, "--threads has no effect on a GPU: leave it out"),
        ({"backend": "cupy", "dtype": "bfloat16", "tf32": True}, UserError, "are about float32"),
    ],
)
def test_options_without_effect_are_refused(options, error, said, device):
    with pytest.raises(error, match=said):
        Device(**options)


@pytest.mark.parametrize(
    ("options", "tf32", "graph", "dtype"),
    [
        ({}, True, True, None),
        ({"tf32": False, "graph": False}, False, False, None),
        ({"dtype": "bfloat16"}, True, True, "bfloat16"),
    ],
)
def test_options_reach_the_backend_and_the_model(options, tf32, graph, dtype, device):
    model = Device("cupy", **options).place(build_model("gpt", SHAPE, seed=1))
    assert (device.tf32, device.graph) == (tf32, graph)
    assert {type(p.data) for p in model.parameters()} == {strict_cupy.ndarray}
    assert model.compute_dtype == (dtype and np.dtype(dtype))
    logits, loss = model(np.zeros((1, 3), np.int64), np.zeros((1, 3), np.int64))
    assert (logits.dtype.name, loss.dtype.name) == (dtype or "float32", "float32")


def run_main(script, monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """A script with --backend cupy in this process: the exit status, and what it printed."""
    monkeypatch.setattr("gpt.session.interrupt_on_terminate", lambda: None)  # this process is pytest's
    monkeypatch.setattr(sys, "argv", [script.__name__, "--backend", "cupy", *arguments])
    create, folders = RunFolder.create, []
    monkeypatch.setattr(RunFolder, "create", lambda *args: folders.append(create(*args)) or folders[-1])
    with pytest.raises(SystemExit) as exit_info:
        run_script(script.main, script.MEMORY_OPTIONS)
    for folder in folders:
        folder._lock_file.close()
    return exit_info.value.code, *capsys.readouterr()


@pytest.mark.parametrize("arguments", [(), ("--no-graph",), ("--dtype", "bfloat16"), ("--no-tf32",)])
def test_train_py_and_sample_py_run(arguments, device, cwd, monkeypatch, capsys):
    status, out, err = run_main(train, monkeypatch, capsys, *TINY, *arguments)
    assert (status, err) == (0, "")
    dtype = "bfloat16" if "bfloat16" in arguments else "float32"
    assert f"cupy on a stand-in in {dtype}" in out
    assert "best val loss" in out
    options = ["--prompt", "ab", "--max-new-tokens", "20", *arguments]
    status, out, _ = run_main(sample, monkeypatch, capsys, *options)
    assert status == 0
    assert out.startswith("ab")
    assert len(out.strip()) == 22


def test_a_bigram_table_trains_and_has_no_other_dtype(device, cwd, monkeypatch, capsys):
    arguments = ["bigram", "--data", "ab", "--max-iters", "6", "--eval-iters", "2"]
    status, out, err = run_main(train, monkeypatch, capsys, *arguments, "--dtype", "bfloat16")
    assert (status, err) == (2, "train: error: --dtype bfloat16 has no effect on a bigram table: leave it out\n")
    status, out, err = run_main(train, monkeypatch, capsys, *arguments)
    assert (status, err) == (0, "")
    assert "best val loss" in out


def test_too_little_memory_is_one_sentence(device, cwd, monkeypatch, capsys):
    def full(*_):
        raise strict_cupy.OutOfMemoryError("Out of memory allocating 1,234 bytes (allocated so far: 99 bytes).")

    monkeypatch.setattr(type(device), "layer_norm", full)
    status, _, err = run_main(train, monkeypatch, capsys, *TINY)
    assert status == 2
    assert err == (
        "train: error: out of memory (Out of memory allocating 1,234 bytes (allocated so far: 99 bytes); 1.0 of the "
        "GPU's 16.0 GiB are free): lower --batch-size (and raise --gradient-accumulation-steps), --block-size or "
        "--n-embd\n"
    )


def test_a_model_that_cannot_fit_the_gpu_is_refused_at_once(device, cwd, monkeypatch, capsys):
    status, _, err = run_main(train, monkeypatch, capsys, *TINY, "--n-embd", "65536")
    assert status == 2
    assert "parameters and 512 tokens per step need" in err
    assert "GiB and the GPU has 16" in err
