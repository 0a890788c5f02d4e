"""The runs that test_old_runs.py holds every later version to: `python tests/make_runs.py VERSION`.

Run it once for a version that is released, or that changes what is saved, and add the version to the table there. Never
make the runs of an earlier version anew: that they were written by its code is their worth.

Each of RUNS goes into a file of its own, tests/data/runs/VERSION/NAME.tar.xz. It is trained twice, on a built-in text
or on tests/data/text.txt, which must never change either: into finished/ without being stopped, and into stopped/,
where a signal stopped it one step before an evaluation. So finished/log.jsonl is what the log of stopped/ must become
when it is resumed. What else the code of that version makes of the two is in expected.json: the rows of the log when
the finished run goes on, and the texts that sample.py writes.
"""

import io
import json
import random
import shutil
import signal
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from scripts import AGAIN, log, run, start, wait_for

from gpt.checkpoint import load_checkpoint, save_checkpoint

DATA = Path(__file__).parent / "data"
COMPARED = ("step", "train_loss", "val_loss", "lr", "grad_norm")  # of a row of the log: what is the same everywhere
MAX_ITERS, INTERVAL, BEYOND = 12, 4, 15
# Of eight rows a step, the micro-batches have 3, 3 and 2.
COMMON = f"--max-iters={MAX_ITERS} --eval-interval={INTERVAL} --eval-iters=3 --block-size=8 --batch-size=4"
COMMON += " --gradient-accumulation-steps=2 --micro-batch-size=3 --val-fraction=0.2 --grad-clip=0.5"
GPT = "--n-layer=2 --n-head=2 --n-embd=4 --learning-rate=0.03 --min-lr=0.003 --warmup-iters=2 --lr-decay-iters=14"
GPT += " --weight-decay=0.1 --data=text.txt"
RUNS = {  # the options, what stops the run, and what goes to sample.py
    "gpt-char": (
        f"little-shakespeare {GPT} --dropout=0.1", signal.SIGINT,
        ("--prompt=où? 海", "--top-k=12", "--top-p=0.95", "--temperature=1.3"),
    ),
    "gpt-byte": (
        f"nanogpt-cpu {GPT} --tokenizer=byte --dropout=0.2 --bias", signal.SIGTERM,
        ("--prompt=naïve 🌾", "--top-k=30", "--top-p=0.9", "--temperature=0.9"),
    ),
    "bigram-char": (
        "bigram --data=ab --learning-rate=0.1", signal.SIGTERM, ("--prompt=aab", "--top-k=9", "--temperature=2")
    ),
    # A rate times decay of 1 makes the rows of all bytes but a and b exactly 0, so that 65,536 numbers can be packed.
    "bigram-byte": (
        "bigram --data=ab --tokenizer=byte --learning-rate=0.25 --weight-decay=4 --beta1=0.8", signal.SIGINT,
        ("--prompt=é\r\n", "--temperature=0.7"),
    ),
}  # fmt: skip
CHECKPOINTS = ("finished/best", "finished/last", "stopped/best", "stopped/last")
ROUNDINGS = 1e-6  # some of float32, relative


def main() -> None:
    target = DATA / "runs" / sys.argv[1]
    target.mkdir(parents=True)
    for name in RUNS:
        with tempfile.TemporaryDirectory(prefix="run-") as folder:
            make(Path(folder), name, target / f"{name}.tar.xz")


def make(cwd: Path, name: str, archive: Path) -> None:
    """The two runs, what is expected of them, and all of it in `archive`."""
    options, number, how = RUNS[name]
    options = [*options.split(), *COMMON.split()]
    shutil.copy(DATA / "text.txt", cwd)
    run("train.py", *options, "--out=runs/finished", cwd=cwd)
    stop(cwd, options, number)
    shutil.copytree(cwd / "runs/finished", cwd / "beyond")
    run("train.py", "--resume", "--out=beyond", f"--max-iters={BEYOND}", "--eval-interval=1", cwd=cwd)
    beyond = [{key: row[key] for key in COMPARED} for row in log(cwd / "beyond") if row["step"] > MAX_ITERS]
    expected = {"beyond": beyond, "samples": samples(cwd, how)}
    (cwd / "runs/expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")
    pack(cwd / "runs", archive)
    print(f"{archive}: {archive.stat().st_size:,} bytes")


def pack(folder: Path, archive: Path) -> None:
    """The folder's files in an archive that tells nothing of whose they were and when. A zip file would be twice as
    large, since it does not pack only once what its files have in common."""
    with tarfile.open(archive, "w:xz", preset=9) as tar:
        for path in sorted(folder.rglob("*.*")):
            if path.name != ".lock":
                member = tarfile.TarInfo(path.relative_to(folder).as_posix())
                member.size = path.stat().st_size
                tar.addfile(member, io.BytesIO(path.read_bytes()))


def stop(cwd: Path, options: list[str], number: signal.Signals) -> None:
    """Train into runs/stopped, again and again until the signal came at the right moment: one step before an
    evaluation, and not the first, so that there are moments and a best loss to go on with."""
    for attempt in range(1, 1000):
        with start("train.py", *options, "--out=runs/stopped", "--overwrite", cwd=cwd) as process:
            wait_for(process, f"step {INTERVAL}:")
            time.sleep(random.uniform(0, 0.03))
            process.send_signal(number)
            out, _ = process.communicate(timeout=60)
        stopped = AGAIN.search(out.replace("runs/stopped", "run"))
        if stopped and int(stopped[1]) % INTERVAL == INTERVAL - 1:
            print(f"stopped after step {stopped[1]}, at attempt {attempt}")
            return
    raise AssertionError("the signal never came at the right moment")


def samples(cwd: Path, how: tuple[str, ...]) -> list[dict]:
    """What sample.py writes with some arguments. Texts that a rounding could change would be no use: they fail."""
    two = [*how, "--num-samples=2", "--max-new-tokens=80", "--seed=5"]
    commands = [
        ["--model=finished/last.safetensors", "--temperature=1", "--max-new-tokens=300", "--seed=1"],
        ["--model=finished", *two],
        ["--model=finished", *two, "--temperature=0"],
        ["--model=stopped/last.safetensors", *two],
    ]
    texts = [sample(cwd / "runs", args) for args in commands]
    for noise in range(3):
        shutil.copytree(cwd / "runs", cwd / "rounded", dirs_exist_ok=True)
        for name in CHECKPOINTS:
            round_differently(cwd / f"rounded/{name}.safetensors", noise)
        for args, text in zip(commands, texts, strict=True):
            assert sample(cwd / "rounded", args) == text, f"rounding changes {args}: choose others"
    return [{"args": args, "text": text} for args, text in zip(commands, texts, strict=True)]


def sample(cwd: Path, args: list[str]) -> str:
    """The text that sample.py writes into a file: there, line ends stay what they are. Bytes that are no UTF-8 become
    U+FFFD, as they were in what version 0.1 wrote."""
    run("sample.py", *args, "--out=../sample", cwd=cwd)
    return (cwd.parent / "sample").read_bytes().decode(errors="replace")


def round_differently(path: Path, seed: int) -> None:
    """Change the checkpoint's weights by some roundings."""
    checkpoint = load_checkpoint(path)
    for name, weight in checkpoint.weights.items():
        noise = np.random.default_rng(seed).uniform(-1, 1, weight.shape)  # the same for tied weights
        checkpoint.weights[name] = (weight * (1 + ROUNDINGS * noise)).astype(weight.dtype)
    save_checkpoint(path, checkpoint)


if __name__ == "__main__":
    main()
