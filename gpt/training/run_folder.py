"""A run and its folder: config.toml, log.jsonl, best.safetensors, last.safetensors, samples.jsonl, sample.txt,
loss.svg."""

import contextlib
import json
import os
import time
from pathlib import Path

from gpt.checkpoint import Checkpoint, load_checkpoint, saved_at
from gpt.errors import UserError
from gpt.files import (
    atomic_write,
    cache_folder,
    check_replaceable,
    check_size,
    explained,
    open_regular,
    read_regular,
    refuse_link,
    remove_leftovers,
)
from gpt.log import MAX_LOG, parse_row
from gpt.terminal import warn

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

RUNS = Path("runs")
KNOWN = "runs.json"  # of the runs that lie elsewhere, in the cache
MOST_KNOWN = 20  # of them, from one folder
LOOKING_SECONDS = 0.1  # in which `is_training` has looked


class Lock:
    """Keeps every other process from training in a folder, until `close` or the end of this process.

    The folder itself is locked, for a file in it could be deleted meanwhile; and `.lock`, for there are network file
    systems that lock nothing but files. Where neither can be locked a warning says so.
    """

    def __init__(self, folder: Path):
        self._descriptors = []
        with explained("lock", folder):
            if fcntl:
                self._descriptors.append(os.open(folder, os.O_RDONLY))
            self._descriptors.append(open_regular(folder / ".lock", os.O_RDWR | os.O_CREAT))
        locked = False
        for descriptor in self._descriptors if fcntl else ():
            try:
                _lock(descriptor)
                locked = True
            except BlockingIOError:
                self.close()
                how = "wait for it, or give another --out"
                raise UserError(f"another process is training in {folder}: {how}") from None
            except OSError:  # the file system has no such lock
                continue
        if not locked:
            warn(f"{folder} cannot be locked here: start no second run in it")

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    __del__ = close


def _lock(descriptor: int) -> None:
    """Lock it; BlockingIOError if it is locked, and not for the instant that `is_training` takes."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(LOOKING_SECONDS)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_training(folder: Path) -> bool:
    """Whether a process trains in `folder`, as far as its lock tells. Nothing is written there, and nothing kept."""
    for path in (folder, folder / ".lock") if fcntl else ():
        with contextlib.suppress(OSError, UserError):  # no lock, or none that can be asked
            descriptor = os.open(path, os.O_RDONLY) if path == folder else open_regular(path)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            finally:
                os.close(descriptor)
    return False


class RunFolder:
    """The files of one run. While it is open nobody else can train in the same folder.

    The folder may come from anywhere: none of its files is followed to another place, nor replaced against its
    permissions.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config, self.log = path / "config.toml", path / "log.jsonl"
        self.best, self.last = path / "best.safetensors", path / "last.safetensors"
        self.sample, self.samples = path / "sample.txt", path / "samples.jsonl"
        self.picture = path / "loss.svg"
        self._files = (self.config, self.log, self.best, self.last, self.sample, self.samples, self.picture)
        with explained("use", path):
            for file in self._files:
                check_replaceable(file)
            self._lock_file = Lock(path)
            remove_leftovers(path, [file.name for file in self._files])

    @classmethod
    def create(cls, path: Path | None, name: str, overwrite: bool = False) -> "RunFolder":
        """A new folder at `path`, or runs/NAME, runs/NAME-2, ... whichever is free."""
        with explained("make the run folder", path or RUNS / name):
            if path is None:
                return cls(_make_first_free(RUNS / name))
            if path.exists() and (not path.is_dir() or any(entry.name != ".lock" for entry in path.iterdir())):
                if not overwrite:
                    raise UserError(f"{path} exists and is not empty: give another --out, or --resume or --overwrite")
                if not (path / "config.toml").exists():
                    raise UserError(f"{path} is no run folder, so --overwrite leaves it alone: give another --out")
                folder = cls(path)  # takes the lock: not while another process trains there
                folder.clear()
                return folder
            path.mkdir(parents=True, exist_ok=True)
            return cls(path)

    @classmethod
    def open(cls, path: Path | None) -> "RunFolder":
        """The folder of an earlier run, which may be named as in runs/; the newest one if `path` is None."""
        path = named_run(path) if path else newest_run()
        with explained("read", path):
            if not (path / "last.safetensors").exists():
                raise UserError(f"there is nothing to resume in {path}: it has no last.safetensors")
        return cls(path)

    def clear(self) -> None:
        """Remove what an earlier run left."""
        for file in self._files:
            file.unlink(missing_ok=True)

    def append(self, path: Path, row: dict) -> None:
        """Add one JSON object to the log, or to the samples."""
        with explained("write", path):
            descriptor = open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            with os.fdopen(descriptor, "ab") as file:
                file.write(json.dumps(row).encode() + b"\n")

    def rewind(self, step: int) -> None:
        """Drop what a run resumed at `step` will write again: the log's rows after it, the samples' from it on. They
        become files of their own, for a hard link would lead what is appended to it out of the folder."""
        for path, last in ((self.log, step), (self.samples, step - 1)):
            with explained("read", path):
                if path.exists():
                    rows = read_regular(path, MAX_LOG).splitlines()
                    atomic_write(path, b"".join(row + b"\n" for row in rows if _step_of(row) <= last))


def remember(path: Path) -> None:
    """Let `newest_run` find a run that is not in runs/, from this folder on, if that can be noted down."""
    here, known = str(Path.cwd()), _known_runs()
    if path.absolute().parent != RUNS.absolute():
        others = [other for other in known.get(here, []) if other != str(path.absolute())]
        known[here] = [*others, str(path.absolute())][-MOST_KNOWN:]
        with contextlib.suppress(OSError, UserError, RuntimeError):
            cache_folder().mkdir(parents=True, exist_ok=True)
            atomic_write(cache_folder() / KNOWN, json.dumps(known))


def _known_runs() -> dict[str, list[str]]:
    """The runs beside those in runs/, by the folder they were begun from."""
    with contextlib.suppress(OSError, UserError, RuntimeError, ValueError, RecursionError):
        known = json.loads(read_regular(cache_folder() / KNOWN, 2**20))
        if isinstance(known, dict):
            lists = {key: value for key, value in known.items() if isinstance(value, list)}
            return {key: [path for path in value if isinstance(path, str)] for key, value in lists.items()}
    return {}


def newest_run(runs: Path = RUNS) -> Path:
    """The run folder whose checkpoint is the newest, of those in runs/ and those begun from here."""
    with explained("read", runs):
        others = [Path(path) for path in _known_runs().get(str(Path.cwd()), []) if "\0" not in path]
        here = [path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path for path in others]
        checkpoints = list(runs.glob("*/last.safetensors"))
        checkpoints += [path / "last.safetensors" for path in here if os.path.isfile(path / "last.safetensors")]  # noqa: PTH113
        if checkpoints:
            return max(checkpoints, key=saved_at).parent
    raise no_run_in(runs)


def no_run_in(folder: Path) -> UserError:
    """For a folder that should hold one."""
    return UserError(f"there is no run in {folder.absolute()}: train one with python train.py, or name its folder")


def named_run(path: Path) -> Path:
    """`path`, or what is called so in runs/ if nothing is at `path` itself."""
    here, there = os.path.exists(path), os.path.isdir(RUNS / path)  # noqa: PTH110, PTH112 - Path's fail for long names
    return RUNS / path if there and not here else path


def find_checkpoint(path: Path | None) -> Path:
    """The file to sample from: `path` itself, or the best checkpoint of the run folder at `path`, which may be named as
    in runs/, or of the newest."""
    path = named_run(path) if path else newest_run()
    with explained("read", path):
        if not path.is_dir():
            return path
        for name in ("best.safetensors", "last.safetensors"):
            refuse_link(path / name)
            if (path / name).exists():
                return path / name
    raise UserError(f"{path} holds no checkpoint")


def load_best(path: Path | None, advice: str) -> tuple[Path, Checkpoint]:
    """Where `find_checkpoint` finds one, and what it holds but for the optimiser's moments. advice: what to do where
    memory is too small for it."""
    path = find_checkpoint(path)
    check_size(path, 1, advice)
    return path, load_checkpoint(path, for_resume=False)


def _make_first_free(path: Path) -> Path:
    candidate, n = path, 1
    while True:
        candidate.parent.mkdir(parents=True, exist_ok=True)
        try:
            candidate.mkdir()
            return candidate
        except FileExistsError:
            n += 1
            candidate = path.with_name(f"{path.name}-{n}")


def _step_of(line: bytes) -> float:
    """The step of a log row; infinite for what is none."""
    row = parse_row(line)
    return float("inf") if row is None else row["step"]
