"""A run's folder: which one it is, who may write there, and a log without gaps or repetitions."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_checkpoint import make, rewrite

import gpt.training.run_folder
from gpt.checkpoint import save_checkpoint
from gpt.errors import UserError
from gpt.files import atomic_write
from gpt.training.run_folder import RunFolder, find_checkpoint, newest_run

FILES = ("config.toml", "log.jsonl", "best.safetensors", "last.safetensors", "sample.txt")

ROWS = [{"step": step, "val_loss": 1 / (step + 1)} for step in (0, 5, 10, 15)]
HOLD = """
import sys, time
from pathlib import Path
from gpt.training.run_folder import RunFolder
folder = RunFolder(Path(sys.argv[1]))
print("open", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def create():
    """RunFolder.create, whose folders are let go of after the test."""
    folders = []

    def make(*args, **options) -> RunFolder:
        folders.append(RunFolder.create(*args, **options))
        return folders[-1]

    yield make
    for folder in folders:
        folder._lock_file.close()


@pytest.fixture
def folder(create) -> RunFolder:
    return create(Path("run"), "name")


def let_go(folder: RunFolder) -> Path:
    folder._lock_file.close()
    return folder.path


def make_run(path: str, *files: str, age: float = 0) -> Path:
    """A folder with these files, `age` seconds old."""
    Path(path).mkdir(parents=True, exist_ok=True)
    for name in files:
        file = Path(path, name)
        file.write_text("content")
        os.utime(file, (time.time() - age,) * 2)
    return Path(path)


def contents(path) -> set[str]:
    return {file.name for file in Path(path).iterdir()}


# --- making one ---


def test_names_are_numbered(create):
    make_run("runs/other")
    Path("runs/name-3").write_text("a file")
    paths = [create(None, "name").path for _ in range(4)]
    assert paths == [Path("runs", name) for name in ("name", "name-2", "name-4", "name-5")]


def test_given_folder_may_be_new_nested_or_empty(create):
    make_run("empty")
    make_run("locked", ".lock")  # of a run that ended before it had written anything
    for path in ("new", "a/b/c", "empty", "locked"):
        assert create(Path(path), "name").path == Path(path)
        assert contents(path) == {".lock"}


@pytest.mark.parametrize(
    ("path", "overwrite", "said"),
    [
        ("full", False, "full exists and is not empty: give another --out, or --resume or --overwrite"),
        ("full", True, "full is no run folder, so --overwrite leaves it alone: give another --out"),
        ("a file", False, "a file exists and is not empty"),
        ("a file", True, "a file is no run folder"),
        ("a file/below", False, "cannot make the run folder a file/below: Not a directory"),
        ("x" * 300, False, "File name too long"),
        (".", False, "exists and is not empty"),
    ],
)
def test_refused_folder_is_left_alone(path, overwrite, said):
    make_run("full", "holiday.jpg")
    Path("a file").write_text("content")
    with pytest.raises(UserError) as error:
        RunFolder.create(Path(path), "name", overwrite)
    assert said in str(error.value)
    assert contents(".") == {"full", "a file"}
    assert contents("full") == {"holiday.jpg"}
    assert Path("a file").read_text() == "content"


def test_file_where_runs_should_be():
    Path("runs").write_text("a file")
    with pytest.raises(UserError, match="cannot make the run folder runs/name: File exists"):
        RunFolder.create(None, "name")


def test_overwriting_removes_the_earlier_run_and_nothing_else(create):
    make_run("run", *FILES, "notes.md", ".last.safetensors.77.tmp")
    create(Path("run"), "name", overwrite=True)
    assert contents("run") == {".lock", "notes.md"}


# --- reaching out of it ---


OPENINGS = {"resume": RunFolder.open, "overwrite": lambda path: RunFolder.create(path, "name", overwrite=True)}


@pytest.fixture(params=OPENINGS)
def opening(request):
    """A way to use an earlier run in run/, which is to be refused."""
    make_run("run", *FILES)
    return OPENINGS[request.param]


@pytest.mark.parametrize("name", [*FILES, ".lock"])
@pytest.mark.parametrize("target", ["../precious", "notes.md", "/dev/zero"])
def test_links_in_a_run_folder_are_refused_by_name(opening, name, target):
    Path("precious").write_text("content")
    make_run("run", "notes.md")
    Path("run", name).unlink(missing_ok=True)
    Path("run", name).symlink_to(target)
    with pytest.raises(UserError, match=f"^run/{name} is a symbolic link, which may lead out of its folder: put the"):
        opening(Path("run"))
    assert Path("precious").read_text() == Path("run/notes.md").read_text() == "content"
    assert contents("run") == {*FILES, "notes.md", name} - ({".lock"} - {name})


@pytest.mark.parametrize("name", ["config.toml", "log.jsonl", "last.safetensors", ".lock"])
def test_a_pipe_in_a_run_folder_does_not_hang(opening, name):
    Path("run", name).unlink(missing_ok=True)
    os.mkfifo(Path("run", name))
    with pytest.raises(UserError, match=f"run/{name}.* is not a regular file"):
        opening(Path("run"))


@pytest.mark.parametrize("name", FILES)
def test_a_read_only_file_of_an_earlier_run_stays(opening, name):
    Path("run", name).chmod(0o444)
    with pytest.raises(UserError, match=f"cannot write run/{name}: it is read-only; make it writable"):
        opening(Path("run"))
    assert {Path("run", name).read_text() for name in FILES} == {"content"}


def test_a_link_that_is_put_there_meanwhile_is_not_followed(folder):
    Path("precious").write_text("content")
    for path in (folder.log, folder.sample, folder.best):
        path.symlink_to("../precious")
    for write in (lambda: folder.append(folder.log, {}), lambda: atomic_write(folder.sample, "text"),
                  lambda: save_checkpoint(folder.best, make()), lambda: folder.rewind(1)):  # fmt: skip
        with pytest.raises(UserError, match="is a symbolic link"):
            write()
    assert Path("precious").read_text() == "content"


def test_a_hard_link_to_the_log_is_not_appended_to(folder):
    """As of a copy by cp -l, or of an archive that was made for it."""
    write_log(folder)
    os.link(folder.log, "precious")
    before = Path("precious").read_bytes()
    folder.rewind(100)
    folder.append(folder.log, {"step": 20})
    assert Path("precious").read_bytes() == before
    assert read_log(folder) == [*ROWS, {"step": 20}]


def test_a_link_is_not_sampled_from():
    make_run("run", "last.safetensors")
    Path("run/best.safetensors").symlink_to("last.safetensors")
    with pytest.raises(UserError, match=r"^run/best.safetensors is a symbolic link"):
        find_checkpoint(Path("run"))


# --- one at a time ---


@pytest.fixture
def holder(folder):
    """Another process, which has `folder` open."""
    command = [sys.executable, "-c", HOLD, let_go(folder).absolute()]
    root = Path(__file__).parents[1]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "open\n"
        yield process
        process.kill()


def test_second_process_is_refused_until_the_first_is_killed(holder, create):
    make_run("run", "config.toml", "last.safetensors")
    for attempt in (lambda: RunFolder.open(Path("run")), lambda: RunFolder.create(Path("run"), "x", overwrite=True)):
        with pytest.raises(UserError, match="another process is training in run: wait for it, or give another --out"):
            attempt()
    assert contents("run") == {".lock", "config.toml", "last.safetensors"}
    holder.kill()
    holder.wait()
    let_go(RunFolder.open(Path("run")))
    create(Path("run"), "x", overwrite=True)


def test_second_process_is_refused_though_the_lock_file_was_deleted(holder):
    make_run("run", "config.toml", "last.safetensors")
    for _ in range(2):
        Path("run/.lock").unlink()
        with pytest.raises(UserError, match="another process is training in run: wait for it, or give another --out"):
            RunFolder.open(Path("run"))


def without_locks(*kinds: str):
    """What fcntl does where files of these kinds cannot be locked."""

    def flock(descriptor, operation):
        if ("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file") in kinds:  # noqa: PTH112
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    return SimpleNamespace(flock=flock, LOCK_EX=0, LOCK_NB=0)


@pytest.mark.parametrize(
    ("fcntl", "warned"),
    [
        (None, True),
        (without_locks("folder", "file"), True),
        (without_locks("folder"), False),
        (without_locks("file"), False),
    ],
    ids=["Windows", "nothing", "files", "folders"],
)
def test_where_there_are_no_locks_a_warning_says_so(fcntl, warned, monkeypatch, capsys):
    monkeypatch.setattr(gpt.training.run_folder, "fcntl", fcntl)
    let_go(RunFolder.create(Path("run"), "name"))
    said = "warning: run cannot be locked here: start no second run in it\n" if warned else ""
    assert capsys.readouterr() == ("", said)


def test_opening_removes_the_leftovers_of_a_killed_run():
    make_run("run", "last.safetensors", ".last.safetensors.123.tmp", ".log.jsonl.4.tmp", ".mine.tmp", "a.1.tmp")
    let_go(RunFolder.open(Path("run")))
    assert contents("run") == {".lock", "last.safetensors", ".mine.tmp", "a.1.tmp"}


# --- the log ---


def write_log(folder: RunFolder, tail: bytes = b"") -> None:
    for row in ROWS:
        folder.append(folder.log, row)
    with folder.log.open("ab") as file:
        file.write(tail)


def read_log(folder: RunFolder) -> list:
    return [json.loads(row) for row in folder.log.read_text().splitlines()]


@pytest.mark.parametrize(("step", "kept"), [(-1, 0), (0, 1), (9, 2), (10, 3), (12, 3), (15, 4), (100, 4)])
def test_rows_after_the_checkpoint_are_dropped(folder, step, kept):
    write_log(folder)
    folder.rewind(step)
    assert read_log(folder) == ROWS[:kept]


@pytest.mark.parametrize(
    "tail",
    [
        *(
            b'{"step": 16, "val_lo',
            b'{"step"',
            b"{",
            b"\0\0\0\0",
            b"\xff\xfe",
            b"7",
            b"[]\n",
            b'{"loss": 1}\n',
            b"\n\n",
        ),
        *(b'{"step": "1"}\n', b'{"step": true}', b'{"step": -1}', b'{"step": 1.5}', b'{"step": NaN}', b'{"step": [1]}'),
        *(b'{"step": null}', b'{"step": ' + b"9" * 5000 + b"}", b"[" * 100_000, b'{"step": {}}', b'"step"', b"\r\n"),
    ],
    ids=lambda tail: repr(tail[:20]),
)
def test_torn_last_line_is_dropped(folder, tail):
    write_log(folder, tail)
    folder.rewind(15)
    folder.append(folder.log, {"step": 20})
    assert read_log(folder) == [*ROWS, {"step": 20}]


def test_last_line_torn_just_before_its_end(folder):
    write_log(folder)
    folder.log.write_bytes(folder.log.read_bytes().removesuffix(b"\n"))
    folder.rewind(15)
    folder.append(folder.log, {"step": 20})
    assert read_log(folder) == [*ROWS, {"step": 20}]


def test_log_that_is_not_there_or_cannot_be_written(folder):
    folder.rewind(3)
    assert not folder.log.exists()
    folder.log.mkdir()
    with pytest.raises(UserError, match="cannot write run/log.jsonl: Is a directory"):
        folder.append(folder.log, ROWS[0])


# --- finding one ---


def test_newest_run_is_the_one_saved_last():
    make_run("runs/a", "last.safetensors", age=20)
    make_run("runs/b", "last.safetensors", age=10)
    make_run("runs/c", "best.safetensors", age=5)  # killed before it could be resumed
    make_run("runs/d", "config.toml")
    assert newest_run() == Path("runs/b")
    os.utime("runs/a/last.safetensors")
    assert newest_run() == Path("runs/a")


def test_newest_run_is_newest_by_its_own_record(monkeypatch):
    """Copying, unpacking and touching change the times of files."""
    clock = iter([1e9, 3e9, 2e9])
    monkeypatch.setattr(time, "time", lambda: next(clock))
    for name in "abc":
        make_run(f"runs/{name}")
        save_checkpoint(Path(f"runs/{name}/last.safetensors"), make())
        shutil.copy(f"runs/{name}/last.safetensors", f"runs/{name}/last")
        os.replace(f"runs/{name}/last", f"runs/{name}/last.safetensors")  # noqa: PTH105
    assert newest_run() == Path("runs/b")
    for saved in ("NaN", "1e999", '"4e9"', "[" * 100_000, "4000000000", ""):  # no record at all: the file's time counts
        rewrite(Path("runs/b/last.safetensors"), saved=saved)
        os.utime("runs/b/last.safetensors", (4e9, 4e9))
        assert newest_run() == Path("runs/b")
        os.utime("runs/b/last.safetensors", (0, 0))
        assert newest_run() == Path("runs/c")


@pytest.mark.parametrize("runs", [None, "runs", "runs/empty"])
def test_there_is_no_run(runs):
    if runs:
        make_run(runs)
    for call in (newest_run, lambda: find_checkpoint(None), lambda: RunFolder.open(None)):
        with pytest.raises(UserError, match=f"there is no run in {Path('runs').absolute()}: train one"):
            call()


def test_find_checkpoint():
    make_run("runs/both", "best.safetensors", "last.safetensors", age=10)
    make_run("runs/last", "last.safetensors", age=20)
    make_run("runs/none", "config.toml")
    assert find_checkpoint(None) == Path("runs/both/best.safetensors")
    assert find_checkpoint(Path("runs/both")) == Path("runs/both/best.safetensors")
    assert find_checkpoint(Path("runs/last")) == Path("runs/last/last.safetensors")
    assert find_checkpoint(Path("runs/both/last.safetensors")) == Path("runs/both/last.safetensors")
    assert find_checkpoint(Path("missing")) == Path("missing")  # load_checkpoint will say so
    with pytest.raises(UserError, match="runs/none holds no checkpoint"):
        find_checkpoint(Path("runs/none"))


@pytest.mark.parametrize("path", ["missing", "empty", "only the best"])
def test_nothing_to_resume(path):
    make_run("empty")
    make_run("only the best", "best.safetensors")
    with pytest.raises(UserError, match=f"there is nothing to resume in {path}: it has no last.safetensors"):
        RunFolder.open(Path(path))
    assert contents("empty") == set()
