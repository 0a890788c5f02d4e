"""Where there is no fork, no fcntl and no SIGHUP: everything is imported, trains, stops saved, and samples."""

import subprocess
import sys

import pytest
from scripts import ROOT, TEXT, TINY, environment

from gpt.checkpoint import load_checkpoint

# What Windows lacks, taken away before anything of ours is imported. sys.platform stays: the standard library asks it.
LACKING = """if True:
    import os, select, signal, sys
    for module in ("fcntl", "resource", "termios", "pty", "tty", "grp", "pwd"):
        sys.modules[module] = None
    for module, names in {
        os: "fork register_at_fork sched_getaffinity sysconf geteuid getuid fchmod fchown O_NOFOLLOW O_NONBLOCK",
        select: "poll",
        signal: "SIGHUP SIGKILL SIGPIPE SIGALRM SIGQUIT pthread_sigmask",
    }.items():
        for name in names.split():
            if hasattr(module, name):
                delattr(module, name)
    import pathlib, runpy
    root, script, stop, *arguments = sys.argv[1:]
    sys.path.insert(0, root)
    sys.argv = [script, *arguments]
    for file in pathlib.Path(root, "gpt").glob("*.py"):
        __import__(f"gpt.{file.stem}")
    if stop == "stop":
        from gpt.training.cpu_trainer import CPUTrainer
        step = CPUTrainer.train_step
        def train_step(trainer):
            if trainer.step == 3:
                signal.raise_signal(signal.SIGTERM)
            return step(trainer)
        CPUTrainer.train_step = train_step
    runpy.run_path(str(pathlib.Path(root, script)), run_name="__main__")
"""


@pytest.mark.parametrize("stop", ["stop", "go"])
def test_without_what_windows_lacks(cwd, stop):
    def run(script, *arguments):
        command = [sys.executable, "-c", LACKING, ROOT, script, stop, *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment(cwd), timeout=120)

    (cwd / "text.txt").write_text(TEXT)
    done = run("train.py", *TINY, "--out=run", "--threads=2")
    warned = "warning: run cannot be locked here: start no second run in it\n"
    assert (done.returncode, done.stderr) == (143 if stop == "stop" else 0, warned)
    assert load_checkpoint(cwd / "run/last.safetensors").progress.step == (3 if stop == "stop" else 20)
    assert len(run("sample.py", "--model=run", "--max-new-tokens=9").stdout) == 11
