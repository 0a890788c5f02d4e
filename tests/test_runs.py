"""python -m gpt.plot, gpt.runs and gpt.inspect: what they show of good runs, and of anything else."""

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import xml.dom.minidom
from dataclasses import replace

import pytest
from make_runs import DATA
from scripts import ROOT, assert_complaint, environment, log, start_long, train, wait_for
from test_old_runs import OLD

import gpt.inspect
import gpt.plot
import gpt.runs
from gpt.checkpoint import load_checkpoint, save_checkpoint
from gpt.errors import UserError
from gpt.log import read_log
from gpt.runs import FILES
from gpt.training.run_folder import Lock, is_training

MODULES = {module.__name__: module for module in (gpt.plot, gpt.runs, gpt.inspect)}


@pytest.fixture
def command(cwd, monkeypatch, capsys):
    """command(module, *args): what it prints, in this process."""

    def call(name: str, *args) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        assert MODULES[name].main() == 0
        return capsys.readouterr().out

    return call


def evaluations(n: int, **changes) -> list[dict]:
    rows = [
        {"step": 10 * i, "train_loss": 3 - i / n, "train_stderr": 0.1, "val_loss": 3.2 - i / n, "val_stderr": 0.1,
         "lr": 0.1, "grad_norm": 1.0 + i if i else None, "tokens_per_second": 9.0, "elapsed": 50.0 * i}
        for i in range(n)
    ]  # fmt: skip
    return [row | changes for row in rows]


def write_log(folder, rows, end: str = ""):
    folder.mkdir(exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    return folder


LOGS = {  # by name: rows, what follows them, and what the picture says
    "one": (evaluations(1), "", ("one: best 3.2000 at step 0",)),
    "many": (evaluations(3000), "", ("best 2.2003 at step 29,990",)),
    "cut": (evaluations(3), '{"step": 30, "val_lo', ("best 2.5333 at step 20",)),
    "lost": (evaluations(3) + [{"step": 30, "train_loss": None, "val_loss": None}], "", ("not finite",)),
    "nothing finite": (evaluations(3, val_loss=None, train_loss=None, lr=None, grad_norm=None), "", ("not finite",)),
    "not JSON's": (evaluations(2) + [{"step": 99, "val_loss": math.inf, "train_loss": math.nan}], "", ("not finite",)),
    "diverging": (
        evaluations(2) + [{"step": 30, "train_loss": 3e37, "val_loss": 1e38, "val_stderr": 1e38}],
        "",
        ("best 2.7000",),
    ),
    "zeros": (evaluations(3, val_loss=0.0, train_loss=0, lr=0.0, grad_norm=0.0), "", ("best 0.0000 at step 0",)),
    "of words": (
        evaluations(2) + [{"step": 50, "val_loss": "x", "lr": [1], "elapsed": {}}],
        "",
        ("best 2.7000", "not finite"),
    ),
    "yardsticks": (evaluations(3, uniform=4.1744, bigram=2.5), "", ("uniform 4.174", "bigram 2.500")),
    "_$x^2$ & <b>": (evaluations(3), "", ("_$x^2$ &amp; &lt;b&gt;: best",)),
    "海\x1b[1m": (evaluations(3), "", ("海\\x1b[1m: best",)),
    "n" * 99: (evaluations(3), "", ("…nnn",)),
}


@pytest.mark.parametrize("name", LOGS)
def test_a_picture_of_a_run(command, cwd, name):
    rows, end, said = LOGS[name]
    folder = write_log(cwd / name, rows, end)
    command("gpt.plot", folder)
    picture = (folder / "loss.svg").read_text()
    xml.dom.minidom.parseString(picture)
    assert [words for words in said if words not in picture] == []
    assert ("not finite" in said) == ("not finite" in picture)
    assert len(picture) < 400_000


def test_a_picture_is_the_same_each_time(command, cwd):
    folder = write_log(cwd / "run", evaluations(3))
    for name in ("a.svg", "b.svg"):
        assert gpt.plot.draw_run(folder, cwd / name) is None
    assert (cwd / "a.svg").read_bytes() == (cwd / "b.svg").read_bytes()
    command("gpt.plot", folder, "--x=time", "--out=a.svg")
    assert "time (seconds)" in (cwd / "a.svg").read_text()


def test_runs_over_each_other(command, cwd):
    folders = [write_log(cwd / f"run-{i}", evaluations(4 + i, uniform=3.0 + (i == 8))) for i in range(9)]
    command("gpt.plot", *folders[:3], "--out", "three.png")
    assert (cwd / "three.png").read_bytes().startswith(b"\x89PNG")
    command("gpt.plot", *folders[:8], "--out", "all.SVG")
    text = (cwd / "all.SVG").read_text()
    assert all(f"run-{i}: best" in text for i in range(8))
    assert "uniform" in text
    command("gpt.plot", *folders, "--out", "all.SVG")  # the last is of another text
    assert "uniform" not in (cwd / "all.SVG").read_text()
    assert sorted(path.name for path in cwd.glob("*.*")) == ["all.SVG", "three.png"]


def test_a_real_run_is_drawn_beside_another(command, copy):
    shutil.copytree(copy, "other")
    command("gpt.plot", copy, "other")
    assert f"best {min(row['val_loss'] for row in log(copy)):.4f}" in (copy / "loss.svg").read_text()


@pytest.mark.parametrize(("args", "said"), [
    (("none",), "cannot read none/log.jsonl: No such file or directory; check the name"),
    (("empty",), "there is nothing to draw in empty: its log.jsonl has no evaluation"),
    (("run", "--out=loss.pdf"), "--out must end in .svg or .png, got loss.pdf"),
    (("run", "--out=none/loss.svg"), "cannot write none/loss.svg: No such file or directory"),
    (("run", "--out=link.svg"), "link.svg is a symbolic link"),
    (("run", "--x=epoch"), "invalid choice: 'epoch'"),
    ((), "the following arguments are required: RUN"),
])  # fmt: skip
def test_what_cannot_be_drawn(command, cwd, args, said):
    write_log(cwd / "run", evaluations(2))
    write_log(cwd / "empty", [], "no row\n")
    (cwd / "link.svg").symlink_to("elsewhere.svg")
    before = sorted(cwd.rglob("*"))
    with pytest.raises(UserError) as info:
        command("gpt.plot", *args)
    assert said in str(info.value)
    assert sorted(cwd.rglob("*")) == before


def test_without_matplotlib(command, cwd, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = write_log(cwd / "run", evaluations(2))
    said = "a picture of the losses needs the matplotlib library, which is not installed: pip install -e '.[plot]'"
    assert gpt.plot.draw_run(folder, folder / "loss.svg") == said
    with pytest.raises(UserError, match=re.escape(said)):
        command("gpt.plot", folder)
    assert [path.name for path in folder.iterdir()] == ["log.jsonl"]


def as_user(cwd, *args) -> subprocess.CompletedProcess:
    env = environment(cwd) | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("module", MODULES)
def test_a_mistake_ends_in_one_sentence(cwd, module):
    done = as_user(cwd, "-m", module, "no\x1bne")
    assert done.returncode == 2
    assert_complaint(
        done.stderr,
        "no checkpoint no\\x1bne" if module == "gpt.inspect" else "cannot read no\\x1bne",
        f"{module.partition('.')[2]}.py",
    )
    assert done.stdout == ""


def test_no_window_and_no_state(cwd):
    """Drawing loads no user interface, and leaves Matplotlib's settings as they were."""
    write_log(cwd / "run", evaluations(2))
    code = """if True:
        import sys
        from pathlib import Path
        import gpt.plot
        assert not {"matplotlib", "tokenizers"} & {*sys.modules}
        import matplotlib
        matplotlib.rcParams["font.size"] = 3
        assert gpt.plot.draw_run(Path("run"), Path("loss.svg")) is None
        assert matplotlib.rcParams["font.size"] == 3
        assert "matplotlib.pyplot" not in sys.modules"""
    assert as_user(cwd, "-c", code).stderr == ""


# --- lists of runs ---


def row_of(out: str, name: str) -> str:
    return next(line for line in out.splitlines() if line.startswith(name))


def change(folder, step: int, **config) -> None:
    """Make it a run of these settings that is at `step`."""
    checkpoint = load_checkpoint(folder / "last.safetensors")
    checkpoint.config = checkpoint.config.updated(config)
    checkpoint.progress = replace(checkpoint.progress, step=step, evaluated_step=step)
    save_checkpoint(folder / "last.safetensors", checkpoint)


def test_a_list(command, copy):
    for name in ("older", "stopped", "half", "a-name-that-is-longer-than-the-table-is-wide" * 4):
        shutil.copytree(copy, f"runs/{name}")
    change(copy.parent / "runs/stopped", 7, learning_rate=0.5)
    write_log(copy.parent / "runs/half", log(copy), '{"step": 30, "val_lo')
    (copy.parent / "runs/no run").mkdir()
    (copy.parent / "runs/text.txt").write_text("no run")
    lines = command("gpt.runs").splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) == 6
    assert lines[1].startswith("stopped ")
    assert lines[1].endswith("stopped")
    best = min(log(copy), key=lambda row: row["val_loss"])
    losses = [f"{best['val_loss']:.4f}", f"{best['val_bits_per_character']:.3f}"]
    name, *cells = row_of("\n".join(lines), "older").split()
    del cells[4]  # the time
    assert cells == ["text.txt", "gpt", "4,184", "20/20", *losses, "finished"]
    assert lines[-1] == "damaged: half: row 6 of log.jsonl is damaged"
    one = command("gpt.runs", copy)
    assert one.count("\n") == 2
    assert one.endswith("finished\n")
    write_log(copy, evaluations(3))  # as version 0.1 wrote it
    assert " bits/char " in lines[0]
    assert " bits/char " not in command("gpt.runs", copy)


def test_a_run_that_lost_patience_is_finished(command, copy):
    for stale, state in ((1, "stopped"), (2, "finished")):
        change(copy, 7, patience=2)
        checkpoint = load_checkpoint(copy / "last.safetensors")
        checkpoint.progress.stale = stale
        save_checkpoint(copy / "last.safetensors", checkpoint)
        assert command("gpt.runs", copy).endswith(f" {state}\n")


def test_a_run_of_sub_words(command, cwd, monkeypatch):
    train(cwd, "--tokenizer=bpe", "--vocab-size=260", "--max-iters=1", "--out=run")
    assert re.search(r"tokenizer      bpe, 260 symbols: '!' '\"' .* '\w+'\n", command("gpt.inspect", "run"))
    listed = command("gpt.runs", cwd)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert command("gpt.runs", cwd) == listed  # without what would read them


@pytest.mark.parametrize("key", ["newest", *gpt.runs.COLUMNS])
def test_sorting(command, copy, key):
    for name, step in (("b", 3), ("a", 9)):
        shutil.copytree(copy, f"runs/{name}")
        change(copy.parent / f"runs/{name}", step, data="text.txt" if name == "a" else None)
    write_log(copy.parent / "runs/c", [])  # of which nothing is known
    names = [line.split()[0] for line in command("gpt.runs", "--sort", key).splitlines()[1:]]
    assert names[-1] == "damaged:"
    expected = {"name": "abc", "steps": "bac", "newest": "cab", "state": "cab"}  # damaged comes before stopped
    assert "".join(names[:3]) == expected.get(key, "abc")


def test_two_runs(command, copy):
    shutil.copytree(copy, "other")
    change(copy.parent / "other", 20, learning_rate=0.5, seed=7)
    write_log(copy.parent / "other", log(copy)[:-1])
    lines = command("gpt.runs", copy, "other").splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["run", "other"], ["learning_rate", "0.001", "0.5"], ["seed", "1337", "7"]]  # fmt: skip
    assert lines[3].startswith("best val loss  ")
    last = log(copy)[-1]
    assert lines[-1].split() == ["step", "20", f"{last['train_loss']:.4f}", "/", f"{last['val_loss']:.4f}", "-"]
    with pytest.raises(UserError, match=r"none cannot be compared: last.safetensors is missing; name another run"):
        command("gpt.runs", copy, "none")
    with pytest.raises(UserError, match="expected a folder of runs"):
        command("gpt.runs", copy, "other", "--sort=loss")


def test_a_run_that_trains_is_left_alone(command, cwd):
    with start_long(cwd) as process:
        wait_for(process, "step 0:")
        for _ in range(20):
            assert is_training(cwd / "run")
        assert row_of(command("gpt.runs", cwd), "run").endswith(" running")
        command("gpt.plot", cwd / "run", "--out=loss.svg")
        wait_for(process, "step ")  # it goes on
        process.terminate()
        wait_for(process, "stopped and saved")
    assert not is_training(cwd / "run")
    assert row_of(command("gpt.runs", cwd), "run").endswith(" stopped")


def test_looking_at_a_lock_keeps_nobody_out(cwd):
    fcntl = pytest.importorskip("fcntl")
    before = sorted(cwd.iterdir())
    assert not is_training(cwd)
    assert sorted(cwd.iterdir()) == before  # no lock file is made
    looking = os.open(cwd, os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    threading.Timer(0.03, os.close, [looking]).start()
    lock = Lock(cwd)
    assert is_training(cwd)
    lock.close()
    assert not is_training(cwd)


DAMAGES = {  # what is done to a file, and what is said of last.safetensors then
    "random": (lambda content, rng: rng.randbytes(rng.randrange(3000)), "its header has an impossible length"),
    "cut": (lambda content, rng: content[: content.rfind(b"\n", 0, len(content) // 2) + 6], "it has "),  # within a line
    "empty": (lambda content, rng: b"", "its header has an impossible length"),
    "deep": (lambda content, rng: b"\x00\x00\x10" + bytes(5) + b"[" * 2**20, "recursion"),
    "binary row": (lambda content, rng: b'{"step": 1' + b"0" * 5000 + b"}\n\xff\xfe\x00\n[]\n", "header"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_told_in_few_words(command, copy, name, damage):
    path, (do, said) = copy / name, DAMAGES[damage]
    path.write_bytes(do(path.read_bytes(), random.Random(f"{name} {damage}")))
    out = command("gpt.runs", copy)
    row, *told = out.splitlines()[1:]
    assert max(map(len, out.splitlines())) <= 100
    if damage != "empty" or name not in ("log.jsonl", "config.toml"):
        assert row.endswith("damaged")
        assert told[0].startswith(f"damaged: run: {name}" if name != "log.jsonl" else "damaged: run: row ")
        assert name != "last.safetensors" or said in told[0]
    assert out.isprintable() or out.replace("\n", "").isprintable()


@pytest.mark.parametrize("name", FILES)
def test_whatever_is_there_instead_of_a_file(command, copy, name):
    path = copy / name
    content = path.read_bytes()
    path.unlink()
    assert f"damaged: run: {name} is missing\n" in command("gpt.runs", copy)
    for make in (path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to(path), lambda: path.symlink_to("/etc")):
        make()
        assert f"damaged: run: {name} is " in command("gpt.runs", copy)
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    for seed in range(30):  # a byte or some are other ones, anywhere
        rng, changed = random.Random(seed), bytearray(content)
        for _ in range(rng.choice((1, 20))):
            changed[rng.randrange(min(len(changed), rng.choice((10, 3000, 10**9))))] = rng.randrange(256)
        path.write_bytes(changed)
        assert command("gpt.runs", copy).startswith("name ")


@pytest.mark.parametrize(("text", "steps", "wrong"), [
    ("", [], ""),
    ('{"step": 3}\n{"step": 1}\n{"step": 3, "lr": 1}', [1, 3], ""),
    ('{"step": 3}\n\n[1]\n{"step": 1', [3], "row 2 of log.jsonl is damaged"),
    ('{"step": -1}\n{"step": true}\n{"step": 1.0}\n{"lr": 1}', [], "row 1 of log.jsonl is damaged"),
])  # fmt: skip
def test_reading_a_log(cwd, text, steps, wrong):
    (cwd / "log.jsonl").write_text(text)
    rows, said = read_log(cwd / "log.jsonl")
    assert ([row["step"] for row in rows], said) == (steps, wrong)


# --- what a checkpoint holds, and old runs ---


def test_inspecting(command, copy):
    best, last = command("gpt.inspect", copy), command("gpt.inspect", copy / "last.safetensors")
    assert best.startswith("run/best.safetensors\n") or best.startswith(f"{copy}/best.safetensors\n")
    checkpoint = load_checkpoint(copy / "last.safetensors")
    symbols = repr(checkpoint.tokenizer.symbols)
    told = ("gpt, 4,184 parameters", symbols, checkpoint.fingerprint, "step 20 of 20", "\n  n_embd ", "its moments")
    for said in told:
        assert said in last
    assert "sampling only" in best
    weight = checkpoint.weights["transformer.wpe.weight"]
    row = row_of(last, "transformer.wpe.weight").split()
    assert row[1:4] == ["8", "x", "16"]
    assert [float(cell) for cell in row[4:]] == pytest.approx([weight.mean(), weight.std(), abs(weight).max()], 1e-3)
    path = copy / "last.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match="is damaged: its contents do not match its checksum"):
        command("gpt.inspect", path)


@pytest.mark.parametrize("name", OLD)
def test_old_runs_are_read(command, cwd, name):
    with tarfile.open(DATA / f"runs/{name}.tar.xz") as archive:
        archive.extractall(cwd, filter="data")
    out = command("gpt.runs", cwd)
    assert row_of(out, "finished").endswith(" finished")
    assert row_of(out, "stopped").endswith(" stopped")
    assert "/" in command("gpt.runs", "finished", "stopped")
    command("gpt.plot", "finished", "stopped")
    for run in ("finished", "stopped/last.safetensors"):
        assert f"tokenizer      {name.rpartition('-')[2]}, " in command("gpt.inspect", run)


# --- every run leaves a picture ---


@pytest.mark.parametrize("options", [[], ["--max-minutes=0"]])
def test_a_run_that_is_over_or_stopped_has_its_picture(cwd, options):
    train(cwd, "--out=run", *options, env={"PYTHONPATH": ""})
    picture = (cwd / "run/loss.svg").read_text()
    assert picture.startswith("<?xml")
    assert log(cwd / "run")[0].keys() >= {"uniform", "unigram", "bigram", "trigram"}
    assert all("uniform" not in row for row in log(cwd / "run")[1:])
    train(cwd, "--out=run", "--overwrite", "--max-iters=0")
    assert not (cwd / "run/loss.svg").exists()  # not that of another run
