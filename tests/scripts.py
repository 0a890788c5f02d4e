"""Running train.py and sample.py as a user does: in processes of their own, with a tiny model, without a network."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from gpt.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[1]
TINY = (  # noqa: SIM905
    "--n-layer=1 --n-head=2 --n-embd=16 --block-size=8 --batch-size=4 --micro-batch-size=2 --eval-iters=2"
    " --dropout=0.1 --max-iters=20 --eval-interval=6 --data=text.txt"
).split()
TEXT = "".join(f"{i * i} is the square of {i},\n" for i in range(120))  # its characters are all ASCII
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background job, whose children would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
NOWHERE = "http://127.0.0.1:9"  # no server listens here: a download fails at once
LONG = [*TINY, "--max-iters=1000000", "--eval-interval=20", "--out=run"]
RUN = {"config.toml", "log.jsonl", "best.safetensors", "last.safetensors", "sample.txt", ".lock"}
AGAIN = re.compile(r"stopped and saved after step (\d+); go on with: python train.py --resume --out run\n")
LOG_KEYS = ["step", "train_loss", "train_stderr", "val_loss", "val_stderr", "lr", "grad_norm", "tokens_per_second"]
LOG_KEYS += ["elapsed", "train_bits_per_character", "val_bits_per_character"]


def environment(folder: Path) -> dict[str, str]:
    """Ours without network, Matplotlib and Python's own variables; warnings are errors."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    quiet = {"XDG_CACHE_HOME": str(folder / "cache"), "PYTHONWARNINGS": "error"}
    quiet["PYTHONPATH"] = str(ROOT / "tests" / "without")  # Matplotlib
    return inherited | quiet | {f"{scheme}_proxy": NOWHERE for scheme in ("http", "https")}


@contextmanager
def start(script: str, *args, cwd: Path, env=(), shell: str = 'exec "$@"', **options) -> Iterator[subprocess.Popen]:
    """The script in a process of its own, its output piped as UTF-8 unless `options` of Popen say otherwise.

    The block ends when the process does; a test that fails in the block kills it.
    shell: the shell's command, in which "$@" stands for the script with its arguments.
    """
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE) | {"stdin": subprocess.DEVNULL, "encoding": "utf-8"}
    command = ["sh", "-c", shell, "sh", sys.executable, ROOT / script, *args]
    with subprocess.Popen(command, cwd=cwd, env=environment(cwd) | dict(env), **pipes | options) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def run(script: str, *args, status: int = 0, input=None, **options) -> subprocess.CompletedProcess:  # noqa: A002
    """The script's output once it has ended, with the status that is expected of it; see `start`."""
    if input is not None:
        options["stdin"] = subprocess.PIPE
    with start(script, *args, **options) as process:
        out, err = process.communicate(input, timeout=60)
    assert process.returncode == status, err
    return subprocess.CompletedProcess(process.args, status, out, err)


def train(cwd: Path, *args, **options) -> subprocess.CompletedProcess:
    """A tiny run on TEXT in `cwd`; `args` come after the tiny ones and so override them."""
    (cwd / "text.txt").write_text(TEXT)
    return run("train.py", *tiny(*args), cwd=cwd, **options)


def tiny(*args) -> list:
    """The options of a tiny run with these after them, whose text is in place of the tiny one."""
    given = any(str(arg).partition("=")[0] == "--data" for arg in args)
    return [option for option in TINY if not (given and option.startswith("--data"))] + [*args]


def assert_complaint(err: str, said: str, script: str) -> None:
    """One line on standard error, and no traceback."""
    assert err.startswith(f"{script}: error: "), err
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    assert said in err, err


def log(folder: Path) -> list[dict]:
    """The rows of a run's log."""
    return [json.loads(row) for row in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_run(a: Path, b: Path) -> None:
    """The runs in two folders have the same weights and moments, to the last bit, and the same losses in the log
    wherever both were evaluated, which is in the end at least."""
    one, two = (load_checkpoint(folder / "last.safetensors") for folder in (a, b))
    assert one.progress.step == two.progress.step
    for ours, theirs in ((one.weights, two.weights), (one.optimizer, two.optimizer)):
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    ours, theirs = ({row["step"]: list(row.values())[1:6] for row in log(folder)} for folder in (a, b))
    common = ours.keys() & theirs.keys()
    assert {0, one.progress.step} <= common
    assert {step: ours[step] for step in common} == {step: theirs[step] for step in common}


def wait_for(process, said: str) -> None:
    """Read the process's output up to a line that has `said` in it."""
    for line in process.stdout:
        if said in line:
            return
    raise AssertionError(f"the process ended without saying {said!r}: {process.stderr.read()}")


def start_long(cwd: Path, **options):
    (cwd / "text.txt").write_text(TEXT)
    return start("train.py", *LONG, cwd=cwd, **options)
