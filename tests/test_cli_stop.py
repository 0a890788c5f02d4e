"""train.py stopped from outside: whatever stops a run, its folder stays whole and the run can go on."""

import errno
import math
import os
import random
import re
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
from scripts import (
    AGAIN,
    LONG,
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

import gpt.data
import gpt.loop
import gpt.report
from gpt.checkpoint import load_checkpoint, save_checkpoint
from gpt.config import load_preset
from gpt.cpu_trainer import CPUTrainer
from gpt.device import Device
from gpt.errors import UserError
from gpt.files import REMEDIES
from gpt.session import resume_session
from gpt.trainer import Evaluation

pytestmark = pytest.mark.usefixtures("cwd")


def assert_as_if_undisturbed(cwd: Path, step: int) -> None:
    """Resumed for some more steps, the run in run/ is the one that was never stopped."""
    for how in (["--resume", "--out=run"], [*LONG, "--out=undisturbed"]):
        run("train.py", *how, f"--max-iters={step + 5}", cwd=cwd)
    assert_same_run(cwd / "run", cwd / "undisturbed")
    assert [row["step"] for row in log(cwd / "run")] == [row["step"] for row in log(cwd / "undisturbed")]
    assert {file.name for file in (cwd / "run").iterdir()} == RUN


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_saves_and_says_how_to_go_on(cwd, number):
    with start_long(cwd) as process:
        wait_for(process, "step 40:")
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    step = int(AGAIN.search(out)[1])
    assert load_checkpoint(cwd / "run/last.safetensors").progress.step == step >= 40
    assert_as_if_undisturbed(cwd, step)


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


def test_a_background_job_ignores_interrupts(cwd):
    with start_long(cwd, shell="trap '' INT; exec \"$@\"") as process:
        for line in ("run: run", "step 20:"):
            wait_for(process, line)
            process.send_signal(signal.SIGINT)
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
        assert process.stderr.read() == ""
    assert process.returncode == 0
    progress = load_checkpoint(cwd / "run/last.safetensors").progress
    assert progress.step == progress.evaluated_step + 20  # saved when that evaluation could not be told
    assert_as_if_undisturbed(cwd, progress.step)


def test_output_that_cannot_be_written(cwd):
    err = train(cwd, shell='exec "$@" > /dev/full', status=2).stderr
    assert_complaint(err, "No space left on device", "train.py")


def test_divergence_ends_the_run_and_not_its_checkpoint(copy):
    before = (copy / "last.safetensors").read_bytes()
    options = ["--resume", "--out=run", "--max-iters=100", "--learning-rate=1e8"]
    err = run("train.py", *options, cwd=copy.parent, status=2).stderr
    assert re.search("the loss became (nan|inf) by step 24: lower --learning-rate or set --grad-clip 1", err)
    assert_complaint(err, "the last good state is in run", "train.py")
    assert (copy / "last.safetensors").read_bytes() == before
    run("train.py", "--resume", "--out=run", "--max-iters=22", cwd=copy.parent)


@pytest.fixture
def session(copy):
    """The run, resumed in this process for 20 more steps."""
    handler = signal.getsignal(signal.SIGTERM)
    session = resume_session(Path("run"), None, {"max_iters": 40, "dropout": 0.3}, Device(threads=2))
    yield session
    session.folder._lock_file.close()
    signal.signal(signal.SIGTERM, handler)


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
        if len(saved) in (0, 2):  # and once more, impatiently, while the end of the run is saved
            signal.raise_signal(signal.SIGINT)
        save_checkpoint(path, checkpoint)
        saved.append(path.name)

    monkeypatch.setattr(gpt.loop, "save_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.run()
    assert saved == ["best.safetensors", "last.safetensors", "last.safetensors"]
    last, best = (load_checkpoint(copy / f"{name}.safetensors") for name in ("last", "best"))
    assert last.progress.step == last.progress.evaluated_step == log(copy)[-1]["step"] == 24
    assert last.progress.best_val_loss == best.progress.best_val_loss == min(row["val_loss"] for row in log(copy))


def test_interrupt_after_divergence_saves_nothing(session, copy, monkeypatch):
    steps = iter([(math.nan, math.nan)])
    before = (copy / "last.safetensors").read_bytes()
    monkeypatch.setattr(CPUTrainer, "train_step", lambda _: next(steps, None) or signal.raise_signal(signal.SIGINT))
    with pytest.raises(UserError, match="the loss became nan by step 20"):
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
    with pytest.raises(UserError, match="the loss became inf by step 24"):
        session.run()
    assert (copy / "last.safetensors").read_bytes() == before
