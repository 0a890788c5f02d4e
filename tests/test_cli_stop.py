"""train.py stopped from outside: whatever stops a run, its folder stays whole and the run can go on."""

import contextlib
import errno
import io
import math
import os
import pty
import random
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import (
    AGAIN,
    LONG,
    ROOT,
    RUN,
    TEXT,
    assert_complaint,
    assert_same_run,
    log,
    run,
    start,
    start_long,
    train,
    wait_for,
)

import gpt.text.sources
import gpt.training.loop
import gpt.training.report
import gpt.training.workers
from gpt.checkpoint import load_checkpoint, save_checkpoint
from gpt.config import load_preset
from gpt.device import Device
from gpt.errors import UserError
from gpt.files import REMEDIES
from gpt.terminal import OutputError
from gpt.training.cpu_trainer import CPUTrainer
from gpt.training.interrupt import SIGNALS, Interrupted, InterruptOnce, hold_interrupts
from gpt.training.run_folder import RunFolder
from gpt.training.start import resume_session
from gpt.training.trainer import Evaluation

pytestmark = pytest.mark.usefixtures("cwd")


def assert_as_if_undisturbed(cwd: Path, step: int) -> None:
    """Resumed for some more steps, the run in run/ is the one that was never stopped."""
    for how in (["--resume", "--out=run"], [*LONG, "--out=undisturbed"]):
        run("train.py", *how, f"--max-iters={step + 5}", cwd=cwd)
    assert_same_run(cwd / "run", cwd / "undisturbed")
    assert [row["step"] for row in log(cwd / "run")] == [row["step"] for row in log(cwd / "undisturbed")]
    assert {file.name for file in (cwd / "run").iterdir()} == RUN


@pytest.mark.parametrize("number", SIGNALS)
def test_interrupt_saves_and_says_how_to_go_on(cwd, number):
    with start_long(cwd) as process:
        wait_for(process, "step 40:")
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (128 + number, "")
    step = int(AGAIN.search(out)[1])
    assert load_checkpoint(cwd / "run/last.safetensors").progress.step == step >= 40
    assert_as_if_undisturbed(cwd, step)


@pytest.mark.parametrize("second", SIGNALS)
@pytest.mark.parametrize("seconds", [0, 0.01, 0.1])
def test_a_second_signal_does_not_undo_the_first(cwd, second, seconds):
    with start_long(cwd) as process:
        wait_for(process, "step 20:")
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        process.send_signal(second)
        out, err = process.communicate(timeout=60)
    assert len(AGAIN.findall(out)) == 1
    assert err == ""
    either = {128 + signal.SIGTERM, 128 + second if seconds < 0.1 else 128 + signal.SIGTERM}  # if they come at once
    assert process.returncode in either
    assert load_checkpoint(cwd / "run/last.safetensors").progress.step == int(AGAIN.search(out)[1])


def test_a_second_signal_at_every_line_is_nothing():
    """From the one that raises to the end of what is done about it."""

    def stopped(lines: int) -> int:
        """How many of so many lines were not reached."""
        left, handlers, saved = [lines], {number: signal.getsignal(number) for number in SIGNALS}, None

        def second(frame, event, _):
            left[0] -= event == "line"
            if left[0] == 0:
                signal.raise_signal(signal.SIGTERM)
            return second

        outer = sys.gettrace()
        with InterruptOnce():
            try:
                sys.settrace(second)
                signal.raise_signal(signal.SIGINT)
            except Interrupted as reason:
                with hold_interrupts():
                    saved = reason.number
            finally:
                sys.settrace(outer)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        assert saved == (
            signal.SIGTERM if lines < 3 else signal.SIGINT
        )  # at the handler's first lines neither has been
        return left[0]

    lines = 1
    while stopped(lines) <= 0:
        lines += 1
    assert lines > 10


def test_an_interrupt_that_python_lost_stops_the_next_step(session, copy, monkeypatch):
    class Lost:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    step = CPUTrainer.train_step
    monkeypatch.setattr(CPUTrainer, "train_step", lambda trainer: Lost() and step(trainer))
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    assert session.run() == 128 + signal.SIGTERM
    assert load_checkpoint(copy / "last.safetensors").progress.step == 21


def test_printed_commands_can_be_pasted(cwd):
    (cwd / "text.txt").write_text(TEXT)
    with start("train.py", *LONG, "--out=-it's my run", cwd=cwd) as process:
        wait_for(process, "step 20:")
        process.send_signal(signal.SIGINT)
        step, again = re.search(r"after step (\d+); go on with: python train.py (.*)", process.stdout.read()).groups()
    out = run("train.py", *shlex.split(again), f"--max-iters={int(step) + 1}", cwd=cwd).stdout
    more = re.search(r"more text: python sample.py (.*)", out)[1]
    assert "-it's my run/" in run("sample.py", *shlex.split(more), "--max-new-tokens=1", cwd=cwd).stderr


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
@pytest.mark.parametrize("module", ["argparse", "difflib", "threadpoolctl"])  # the last is imported by main
def test_interrupt_while_modules_are_imported(cwd, script, module):
    (cwd / f"{module}.py").write_text(
        "import os, signal\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    threadpool_limits = None\n"
        "except KeyboardInterrupt:\n    raise ImportError('as NumPy would tell it')\n"
    )
    done = run(script, cwd=cwd, env={"PYTHONPATH": str(cwd)}, status=130)
    assert (done.stdout, done.stderr) == ("", f"{script}: interrupted\n")


@pytest.mark.parametrize("name", ["INT", "HUP"])
def test_what_a_shell_or_nohup_has_ignored_stays_ignored(cwd, name):
    with start_long(cwd, shell=f"trap '' {name}; exec \"$@\"") as process:
        for line in ("run: run", "step 20:"):
            wait_for(process, line)
            process.send_signal(getattr(signal, f"SIG{name}"))
        wait_for(process, "step 40:")
        process.terminate()
        assert AGAIN.search(process.stdout.read())


def test_two_processes_in_one_folder(cwd):
    with start_long(cwd) as process:
        wait_for(process, "step 0:")
        for how in (["--resume", "--out=run"], [*LONG, "--overwrite"]):
            err = run("train.py", *how, cwd=cwd, status=2).stderr
            assert_complaint(err, "another process is training in run: wait for it, or give another --out", "train.py")
        process.kill()


def test_killed_at_any_moment(cwd):
    rng, folder = random.Random(4), cwd / "run"
    (cwd / "text.txt").write_text(TEXT)
    dense = [*LONG, "--eval-interval=2"]  # so that most of the time goes into saving
    for attempt in range(6):
        resumable = (folder / "last.safetensors").exists()
        how = ["--resume", "--out=run"] if resumable else [*dense, "--overwrite"]
        with start("train.py", *how, cwd=cwd) as process:
            wait_for(process, "run: run")
            for _ in range(attempt % 3):  # the second of two evaluations begins when the first was saved
                wait_for(process, "step ")
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0, 0.15))
            process.kill()
        for file in folder.glob("*.safetensors"):
            load_checkpoint(file)
    step = load_checkpoint(folder / "last.safetensors").progress.step
    for how in (["--resume", "--out=run"], [*dense, "--out=undisturbed"]):
        run("train.py", *how, f"--max-iters={step + 5}", cwd=cwd)
    assert_same_run(folder, cwd / "undisturbed")
    assert [row["step"] for row in log(folder)] == [row["step"] for row in log(cwd / "undisturbed")]
    assert {file.name for file in folder.iterdir()} == RUN


def test_reader_of_the_output_goes_away(cwd):
    with start_long(cwd) as process:
        wait_for(process, "step 20:")
        process.stdout.close()
        assert AGAIN.fullmatch(process.stderr.read())
    assert process.returncode == 128 + signal.SIGPIPE
    progress = load_checkpoint(cwd / "run/last.safetensors").progress
    assert progress.step == progress.evaluated_step == log(cwd / "run")[-1]["step"]  # saved before it was to be told
    assert_as_if_undisturbed(cwd, progress.step)


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("lines", range(8))
def test_output_that_fails_loses_nothing(session, copy, monkeypatch, capsys, number, lines):
    """After so many lines: six of introduction, then evaluations at steps 24 and 30."""

    class Output(io.StringIO):
        def flush(self):
            if self.getvalue().count("\n") > lines:
                raise OSError(number, os.strerror(number))

    monkeypatch.setattr(sys, "stdout", Output())
    with pytest.raises(OutputError, match="cannot write the output: ") as stop:
        session.run()
    assert stop.value.status == (128 + signal.SIGPIPE if number == errno.EPIPE else 2)
    step = load_checkpoint(copy / "last.safetensors").progress.step
    assert step == log(copy)[-1]["step"] == (20 if lines < 6 else 6 * (lines - 2))
    assert ("stopped and saved after step" in capsys.readouterr().err) == (lines >= 6)


def test_terminal_that_vanishes(cwd):
    ours, terminal = pty.openpty()
    with start_long(cwd, stdout=terminal, stderr=terminal) as process:
        os.close(terminal)
        shown = b""
        while b"step 20:" not in shown:
            shown += os.read(ours, 4096)
        os.close(ours)  # not its controlling terminal: no SIGHUP, only EIO
    assert process.returncode == 2
    assert_as_if_undisturbed(cwd, load_checkpoint(cwd / "run/last.safetensors").progress.step)


@pytest.mark.skipif(not gpt.training.workers.PROCESSES, reason="workers are threads here")
@pytest.mark.parametrize("job", ["_add_gradients", "_evaluate", "_update"])
def test_killed_worker(session, copy, monkeypatch, capsys, job):
    before, calls, real = (copy / "last.safetensors").read_bytes(), [], getattr(CPUTrainer, job)

    def killed(trainer, worker, *args, **kwargs):
        calls.append(None)
        if worker.index == 1 and len(calls) == (1 if job == "_evaluate" else 3):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(trainer, worker, *args, **kwargs)

    monkeypatch.setattr(CPUTrainer, "rehearse", lambda _: (1.0, 1.0))  # which is not to be disturbed
    monkeypatch.setattr(CPUTrainer, job, killed)
    with pytest.raises(UserError, match="a worker process was killed; is the memory full"):
        session.run()
    saved = {"_add_gradients": 22, "_evaluate": 24, "_update": 20}[job]  # a half-done update is no state to save
    assert load_checkpoint(copy / "last.safetensors").progress.step == saved
    assert ((copy / "last.safetensors").read_bytes() == before) == (job == "_update")
    assert (f"stopped and saved after step {saved}" in capsys.readouterr().out) == (job != "_update")


def test_killed_in_an_evaluation_leaves_the_folder_free(cwd):
    with start_long(cwd, shell='exec "$@" --eval-iters=100000000') as process:
        wait_for(process, "run: run")
        process.kill()
    RunFolder(cwd / "run")._lock_file.close()


def test_too_little_memory_to_save_is_one_sentence(session, copy, monkeypatch):
    before, calls = (copy / "last.safetensors").read_bytes(), []

    def save(path, checkpoint):
        calls.append(path)
        raise MemoryError("no more")

    monkeypatch.setattr(gpt.training.loop, "save_checkpoint", save)
    with pytest.raises(UserError, match=r"cannot write run/(best|last).safetensors: out of memory \(no more\)"):
        session.run()
    assert len(calls) == 1
    assert (copy / "last.safetensors").read_bytes() == before


def test_little_memory_for_a_checkpoint_never_aborts(copy):
    """It takes next to none: the arrays are written as they are."""
    resource = pytest.importorskip("resource")
    code = """if True:
        import dataclasses, pathlib, resource, sys
        import numpy as np
        from gpt.checkpoint import load_checkpoint, save_checkpoint
        path = pathlib.Path("run/last.safetensors")
        checkpoint = dataclasses.replace(load_checkpoint(path), optimizer={"m": np.ones(10**7, np.float32)})
        size = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        ends = []
        for megabytes in range(0, 40, 8):
            resource.setrlimit(resource.RLIMIT_AS, (size + megabytes * 2**20, resource.RLIM_INFINITY))
            try:
                save_checkpoint(path, checkpoint)
                ends.append("saved")
            except MemoryError:
                ends.append("too little")
        print(*ends, sep=",")"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.strip().split(",")) <= {"saved", "too little"}
    assert done.stdout.strip().endswith("saved")
    assert resource


def test_output_that_cannot_be_written(cwd):
    err = train(cwd, shell='exec "$@" > /dev/full', status=2).stderr
    assert_complaint(err, "No space left on device", "train.py")


def test_divergence_ends_the_run_and_not_its_checkpoint(copy):
    before = (copy / "last.safetensors").read_bytes()
    options = ["--resume", "--out=run", "--max-iters=100", "--learning-rate=1e8"]
    err = run("train.py", *options, cwd=copy.parent, status=2).stderr
    assert re.search(r"became (nan|inf) at step 2\d, first in [\w. ]+: \w+: lower --learning-rate or set --grad-c", err)
    assert_complaint(err, "the last good state is in run", "train.py")
    assert (copy / "last.safetensors").read_bytes() == before
    run("train.py", "--resume", "--out=run", "--max-iters=22", cwd=copy.parent)


@pytest.fixture
def session(copy):
    """The run, resumed in this process for 20 more steps."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    session = resume_session(Path("run"), None, {"max_iters": 40, "dropout": 0.3}, Device(threads=2))
    yield session
    session.folder._lock_file.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_options_that_may_change_take_effect(session):
    assert session.model.config.dropout == load_preset("run/config.toml").gpt.dropout == 0.3


def test_full_disk_keeps_the_older_checkpoint(session, copy, monkeypatch):
    before = {name: (copy / name).read_bytes() for name in RUN - {"log.jsonl"}}
    monkeypatch.setattr(os, "fsync", _full)
    with pytest.raises(UserError) as error:
        session.run()
    full = f"No space left on device; {REMEDIES['ENOSPC']}; the previous file is untouched"
    assert str(error.value) in (f"cannot write run/{name}.safetensors: {full}" for name in ("best", "last"))
    assert {name: (copy / name).read_bytes() for name in RUN - {"log.jsonl"}} == before
    assert {file.name for file in copy.iterdir()} == RUN


def _full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_file_larger_than_allowed(cwd):
    limited = 'ulimit -f 60; exec "$@"'  # blocks of 512 bytes: enough for the best checkpoint, not for the last
    err = train(cwd, "--out=run", status=2, shell=limited).stderr
    assert_complaint(err, "cannot write run/last.safetensors: File too large", "train.py")
    assert {file.name for file in (cwd / "run").iterdir()} == {".lock", "config.toml", "log.jsonl", "best.safetensors"}
    train(cwd, "--out=run", "--overwrite")


def test_interrupt_while_saving_leaves_files_that_agree(session, copy, monkeypatch):
    """The best checkpoint must not be taken for saved when it was not."""
    saved = []

    def interrupted(path, checkpoint):
        signal.raise_signal(signal.SIGINT)  # each time: an impatient user
        save_checkpoint(path, checkpoint)
        saved.append(path.name)

    monkeypatch.setattr(gpt.training.loop, "save_checkpoint", interrupted)
    assert session.run() == 128 + signal.SIGINT
    assert saved == ["best.safetensors", "last.safetensors"]
    last, best = (load_checkpoint(copy / f"{name}.safetensors") for name in ("last", "best"))
    assert last.progress.step == last.progress.evaluated_step == log(copy)[-1]["step"] == 24
    assert last.progress.best_val_loss == best.progress.best_val_loss == min(row["val_loss"] for row in log(copy))


def test_interrupt_after_divergence_saves_nothing(session, copy, monkeypatch):
    steps = iter([(math.nan, math.nan)])
    before = (copy / "last.safetensors").read_bytes()
    monkeypatch.setattr(CPUTrainer, "train_step", lambda _: next(steps, None) or signal.raise_signal(signal.SIGINT))
    with pytest.raises(UserError, match="the loss became nan at step 21, first in the squares that the norm"):
        session.run()
    assert (copy / "last.safetensors").read_bytes() == before


def test_weights_that_diverged_are_not_saved(session, copy, monkeypatch):
    before = (copy / "last.safetensors").read_bytes()

    def train_step(trainer):
        trainer.flat.data[0] = math.nan
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(CPUTrainer, "train_step", train_step)
    with pytest.raises(UserError, match="the weights became infinite or nan by step 20"):
        session.run()
    assert (copy / "last.safetensors").read_bytes() == before


def test_evaluation_that_diverged_is_not_saved(session, copy, monkeypatch):
    before = (copy / "last.safetensors").read_bytes()
    monkeypatch.setattr(CPUTrainer, "evaluate", lambda *_: Evaluation(1.0, 0.1, math.inf, 0.1))
    with pytest.raises(UserError, match="the loss became inf in the evaluation at step 24: lower"):
        session.run()
    assert (copy / "last.safetensors").read_bytes() == before
