"""The options that say where to compute: what they refuse, and that the GPU's reach the backend and the model."""

import errno
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import strict_cublas
import strict_cuda
import strict_cupy
from test_trainer import DATA

import sample
import train
from gpt.checkpoint import load_checkpoint
from gpt.cli import run_script
from gpt.config import GPTConfig
from gpt.device import Device
from gpt.errors import UserError
from gpt.models.kinds import build_model
from gpt.training.gpu_trainer import GPUTrainer
from gpt.training.run_folder import RunFolder
from gpt.training.start import resume_session
from tensorlite import BackendError
from tensorlite.backends.cuda import kernels

SHAPE = GPTConfig(vocab_size=DATA.tokenizer.vocab_size, block_size=8, n_layer=1, n_head=2, n_embd=16)
TINY = ["--n-layer", "1", "--n-head", "2", "--n-embd", "8", "--max-iters", "6", "--eval-iters", "2", "--data", "ab"]
SMALL = ["--batch-size", "4", "--micro-batch-size", "2", "--block-size", "16"]  # for the stand-in's kernels, one by one


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
    model = Device("cupy", **options).place(build_model("gpt", SHAPE, seed=1), "gpt")
    assert (device.tf32, device.graph) == (tf32, graph)
    assert {type(p.data) for p in model.parameters()} == {strict_cupy.ndarray}
    assert model.compute_dtype == (dtype and np.dtype(dtype))
    logits, loss = model(np.zeros((1, 3), np.int64), np.zeros((1, 3), np.int64))
    assert (logits.dtype.name, loss.dtype.name) == (dtype or "float32", "float32")


def test_bfloat16_is_emulated_by_older_cards_which_is_said_once(cwd, monkeypatch, capsys, request):
    monkeypatch.setitem(strict_cuda.properties, "major", 7)
    request.getfixturevalue("device")
    shape = ["--n-embd", "64"]  # with heads of 32, as flash attention has on newer ones
    status, _, err = run_main(train, monkeypatch, capsys, *TINY, *SMALL, *shape, "--dtype", "bfloat16")
    slow = "cupy on a stand-in has no bfloat16 of its own and is slow in it: --dtype float32 is faster"
    assert (status, err) == (0, f"warning: {slow}\n")


def run_main(script, monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """A script with --backend cupy in this process: the exit status, and what it printed."""
    monkeypatch.setattr(sys, "argv", [script.__name__, "--backend", "cupy", *arguments])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    folders = []
    with monkeypatch.context() as patch:
        for name in ("create", "open"):
            make = getattr(RunFolder, name)
            patch.setattr(RunFolder, name, lambda *args, make=make: folders.append(make(*args)) or folders[-1])
        try:
            with pytest.raises(SystemExit) as exit_info:
                run_script(script.main, script.MEMORY_ADVICE)
        finally:
            for folder in folders:
                folder._lock_file.close()
    return exit_info.value.code, *capsys.readouterr()


@pytest.mark.parametrize("arguments", [(), ("--no-graph",), ("--dtype", "bfloat16"), ("--no-tf32",)])
def test_train_py_and_sample_py_run(arguments, device, cwd, monkeypatch, capsys):
    status, out, err = run_main(train, monkeypatch, capsys, *TINY, *SMALL, *arguments)
    assert (status, err) == (0, "")
    dtype = "bfloat16" if "bfloat16" in arguments else "float32"
    assert f"cupy on a stand-in in {dtype}" in out
    assert "best val loss" in out
    options = ["--prompt", "ab", "--max-new-tokens", "20", "--attention", "page.html", *arguments]
    status, out, _ = run_main(sample, monkeypatch, capsys, *options)
    assert status == 0
    assert out.startswith("ab")
    assert len(out.strip()) == 22
    assert '"layers":' in (cwd / "page.html").read_text()


def test_a_bigram_table_trains_and_has_no_other_dtype(device, cwd, monkeypatch, capsys):
    arguments = ["bigram", "--data", "ab", "--max-iters", "6", "--eval-iters", "2"]
    status, out, err = run_main(train, monkeypatch, capsys, *arguments, "--dtype", "bfloat16")
    assert (status, err) == (2, "train: error: --dtype has no effect on a bigram table: leave it out\n")
    status, out, err = run_main(train, monkeypatch, capsys, *arguments)
    assert (status, err) == (0, "")
    assert "best val loss" in out


def test_a_stopped_run_says_how_to_go_on_and_goes_on_to_the_bit(device, cwd, monkeypatch, capsys):
    arguments = [*TINY, *SMALL, "--dtype", "bfloat16", "--no-graph", "--n-embd", "64", "--dropout", "0.2"]
    assert run_main(train, monkeypatch, capsys, *arguments, "--out", "whole")[0] == 0
    step, steps = GPUTrainer.train_step, []

    def stop_at_the_fifth(trainer):
        steps.append(None)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(GPUTrainer, "train_step", stop_at_the_fifth)
        status, out, err = run_main(train, monkeypatch, capsys, *arguments, "--out", "parts")
    hint = "go on with: python train.py --resume --out parts --backend cupy --dtype bfloat16 --no-graph"
    assert (status, err) == (128 + signal.SIGINT, "")
    assert out.splitlines()[-1] == f"stopped and saved after step 4; {hint}"
    shutil.copytree("parts", "cpu")
    assert run_main(train, monkeypatch, capsys, *hint.split()[5:])[0] == 0
    whole, parts = (load_checkpoint(cwd / run / "last.safetensors") for run in ("whole", "parts"))
    for name, weight in (whole.weights | whole.optimizer).items():
        np.testing.assert_array_equal((parts.weights | parts.optimizer)[name], weight)
    resumed = resume_session(cwd / "cpu", None, {}, Device())
    assert resumed.run() == 0
    resumed.folder._lock_file.close()
    best = load_checkpoint(cwd / "cpu" / "last.safetensors").progress.best_val_loss
    assert best == pytest.approx(whole.progress.best_val_loss, abs=0.01)


def test_a_run_that_diverges_ends_in_one_sentence(device, cwd, monkeypatch, capsys):
    arguments = [*TINY, "--learning-rate", "1e30", "--max-iters", "30"]
    status, _, err = run_main(train, monkeypatch, capsys, *arguments)
    assert status == 2
    what = r"(the loss|the gradient's norm) became (nan|inf) at step \d+, first in [\w. :]+"
    assert re.fullmatch(rf"train: error: {what}: lower --learning-rate .*\n", err)


def test_slow_compilation_is_announced_once_and_each_part_told(device, monkeypatch, capsys):
    compile_module = strict_cuda.RawModule.compile
    monkeypatch.setattr(kernels, "SLOW", 0.0)
    monkeypatch.setattr(kernels, "prepare_cache", lambda: (Path("here"), ""))
    monkeypatch.setattr(device, "_kernels", kernels.Kernels(device.xp))
    monkeypatch.setattr(strict_cuda.RawModule, "compile", lambda module: time.sleep(0.05) or compile_module(module))
    for dtype in (np.float32, np.float32, np.float64, np.float64):
        device.relu(device.asarray(np.ones(3, dtype)))
    told = "compiling the GPU's kernels, once on this machine: float32 ...\ncompiling the GPU's kernels: float64 ...\n"
    assert capsys.readouterr().err == told


def full_disk(**_):
    raise OSError(errno.ENOSPC, "No space left on device")


CACHES = {  # what is where CuPy's folder would be, and why it cannot be one
    "new": (lambda home, patch: None, ""),
    "a file": (lambda home, patch: (home / ".cupy").write_text(""), "Not a directory"),
    "no home": (lambda home, patch: patch.setenv("HOME", str(home / ".cupy" / "file" / "x")), "Not a directory"),
    "read-only": (lambda home, patch: patch.setenv("HOME", "/proc"), "No such file or directory"),
    "full": (
        lambda home, patch: patch.setattr(kernels.tempfile, "TemporaryFile", full_disk),
        "No space left on device",
    ),
}


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="the folder /proc, which takes no files, is Linux's")
@pytest.mark.parametrize("cache", CACHES)
def test_kernels_are_kept_in_memory_where_cupys_folder_cannot_be_written(cache, device, tmp_path, monkeypatch, capsys):
    make, problem = CACHES[cache]
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("CUPY_CACHE_DIR", "CUPY_CACHE_IN_MEMORY"):
        monkeypatch.setenv(name, "")
    if cache == "no home":
        (tmp_path / ".cupy").mkdir()
        (tmp_path / ".cupy" / "file").write_text("")
    make(tmp_path, monkeypatch)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(kernels, "prepare_cache", kernels.prepare_cache.__wrapped__)
    folder, why = kernels.prepare_cache()
    assert (folder, why) == (Path.home() / ".cupy" / "kernel_cache", problem)
    assert (os.environ["CUPY_CACHE_IN_MEMORY"], os.environ["CUPY_CACHE_DIR"]) == (("1", os.sep) if why else ("", ""))
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.setattr(kernels, "prepare_cache", lambda: (folder, why))
    kernels.Announcement()._tell("float32")
    again = f"in each run anew, as {folder} cannot be written ({why}; set CUPY_CACHE_DIR to a folder that can)"
    told = again if why else "once on this machine"
    assert capsys.readouterr().err == f"compiling the GPU's kernels, {told}: float32 ...\n"


def test_too_little_memory_is_one_sentence(device, cwd, monkeypatch, capsys):
    def full(*_):
        raise strict_cupy.OutOfMemoryError("Out of memory allocating 1,234 bytes (allocated so far: 99 bytes).")

    monkeypatch.setattr(type(device), "layer_norm", full)
    status, _, err = run_main(train, monkeypatch, capsys, *TINY)
    assert status == 2
    assert err == (
        "train: error: out of memory (Out of memory allocating 1,234 bytes (allocated so far: 99 bytes); 1.0 of the "
        "GPU's 16.0 GiB are free): lower --batch-size or --block-size, or take a smaller --data\n"
    )


def no_header(log: str) -> Exception:
    """As CuPy raises it, of an error that has no more than a number."""
    error = strict_cupy.CompileException(log)
    error.__context__ = strict_cupy.NVRTCError("NVRTC_ERROR_COMPILATION (6)")
    return error


CARD = "(a stand-in, compute capability 9.0, driver for CUDA 13.1, CuPy stand-in): "
FAILURES = {
    "illegal address": (strict_cupy.CUDARuntimeError(700), "cudaErrorIllegalAddress: an illegal", "please report it"),
    "ECC": (strict_cupy.CUDARuntimeError(214), "cudaErrorECCUncorrectable", "nvidia-smi"),
    "timeout": (strict_cupy.CUDARuntimeError(702), "cudaErrorLaunchTimeout", "lower --batch-size"),
    "busy": (strict_cupy.CUDARuntimeError(46), "cudaErrorDevicesUnavailable", "nvidia-smi"),
    "driver": (strict_cuda.CUDADriverError("CUDA_ERROR_INVALID_VALUE: invalid argument"), "INVALID_VALUE", "report"),
    "cuBLAS": (strict_cublas.cuBLASError("ALLOC_FAILED (3)"), "cuBLASError: ALLOC_FAILED (3)", "end what else uses"),
    "NVRTC": (
        no_header('\nk.cu(1): catastrophic error: could not open source file "x.h"\n  ^\n'),
        "CompileException: k.cu(1): catastrophic error: could not open",
        "tensorlite.doctor says what to install",
    ),
    "headers": (RuntimeError("Failed to find CUDA headers. Please"), "Failed to find CUDA headers", "says what to"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_of_the_gpu_is_one_sentence_and_a_report(failure, device, cwd, monkeypatch, capsys):
    error, what, remedy = FAILURES[failure]

    class Handle:  # as CuPy's streams and events, whose end fails as all else does then
        def __del__(self):
            raise strict_cupy.CUDARuntimeError(700)

    def fail(*_):
        handle = Handle()
        try:
            raise error
        finally:
            del handle  # which Python would print

    monkeypatch.setattr(type(device), "upload", fail)
    status, _, err = run_main(train, monkeypatch, capsys, *TINY, *SMALL)
    assert status == 2
    report = cwd / "cache" / "tensorlite" / "gpu-failure.txt"
    assert re.fullmatch(r"train: error: the GPU failed with .*\n", err)
    assert [text for text in (what, CARD, remedy, f"; the full report is in {report}\n") if text not in err] == []
    kept = report.read_text()
    assert kept.startswith("the GPU failed with")
    assert "Traceback" in kept
    assert "gpu_trainer.py" in kept


def test_what_failed_first_is_told_also_where_no_report_can_be_kept(device, cwd, monkeypatch, capsys):
    def fail(*_):
        try:
            raise strict_cupy.CUDARuntimeError(702)
        finally:
            raise strict_cupy.CUDARuntimeError(700)

    (cwd / "cache").write_text("no folder")
    monkeypatch.setattr(type(device), "upload", fail)
    status, _, err = run_main(train, monkeypatch, capsys, *TINY, *SMALL)
    assert (status, err.count("\n")) == (2, 1)
    assert "cudaErrorLaunchTimeout" in err
    assert "report" not in err


def test_a_fault_of_ours_keeps_its_traceback(device, cwd, monkeypatch, capsys):
    monkeypatch.setattr(type(device), "upload", lambda *_: {}["no such key"])
    with pytest.raises(KeyError):
        run_main(train, monkeypatch, capsys, *TINY, *SMALL)


def test_a_model_that_cannot_fit_the_gpu_is_refused_at_once(device, cwd, monkeypatch, capsys):
    status, _, err = run_main(train, monkeypatch, capsys, *TINY, "--n-embd", "65536")
    assert status == 2
    assert "parameters and 512 tokens per step need" in err
    assert "GiB and the GPU has 16" in err
