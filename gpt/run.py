"""A run and its folder: config.toml, log.jsonl, best.safetensors, last.safetensors, sample.txt."""

import json
from pathlib import Path

from gpt.errors import UserError
from gpt.files import atomic_write, remove_leftovers

try:
    import fcntl
except ImportError:  # Windows: no lock, and so no protection from two runs in one folder
    fcntl = None

RUNS = Path("runs")


class RunFolder:
    """The files of one run. While it is open nobody else can train in the same folder."""

    def __init__(self, path: Path):
        self.path = path
        self.config, self.log = path / "config.toml", path / "log.jsonl"
        self.best, self.last = path / "best.safetensors", path / "last.safetensors"
        self.sample = path / "sample.txt"
        self._lock()
        remove_leftovers(path)

    @classmethod
    def create(cls, path: Path | None, name: str, overwrite: bool = False) -> "RunFolder":
        """A new folder at `path`, or runs/NAME, runs/NAME-2, ... whichever is free."""
        try:
            if path is None:
                return cls(_make_first_free(RUNS / name))
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                if not overwrite:
                    raise UserError(f"{path} exists and is not empty: give another --out, or --resume or --overwrite")
                if not (path / "config.toml").exists():
                    raise UserError(f"{path} is no run folder, so --overwrite leaves it alone: give another --out")
                folder = cls(path)  # takes the lock: not while another process trains there
                folder.clear()
                return folder
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the run folder {path or RUNS / name}: {error.strerror}") from None
        return cls(path)

    @classmethod
    def open(cls, path: Path | None) -> "RunFolder":
        """The folder of an earlier run, the newest one if `path` is None."""
        path = path or newest_run()
        if not (path / "last.safetensors").exists():
            raise UserError(f"there is nothing to resume in {path}: it has no last.safetensors")
        return cls(path)

    def clear(self) -> None:
        """Remove what an earlier run left."""
        for file in (self.config, self.log, self.best, self.last, self.sample):
            file.unlink(missing_ok=True)

    def append_log(self, row: dict) -> None:
        """Add one JSON object to the log."""
        try:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.log}: {error.strerror}") from None

    def rewind_log(self, step: int) -> None:
        """Drop the rows after `step`, which a resumed run will write again."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        kept = "".join(row + "\n" for row in text.splitlines() if _step_of(row) <= step)
        if kept != text:
            atomic_write(self.log, kept)

    def _lock(self) -> None:
        if fcntl is None:
            return
        self._lock_file = (self.path / ".lock").open("w")  # held until this object goes, or the process dies
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock_file.close()
            raise UserError(f"another process is training in {self.path}: wait for it, or give another --out") from None


def newest_run(runs: Path = RUNS) -> Path:
    """The run folder whose checkpoint is the newest."""
    checkpoints = list(runs.glob("*/last.safetensors"))
    if not checkpoints:
        raise UserError(f"there is no run in {runs.absolute()}: train one with python train.py, or name its folder")
    return max(checkpoints, key=lambda file: file.stat().st_mtime_ns).parent


def find_checkpoint(path: Path | None) -> Path:
    """The file to sample from: `path` itself, or the best checkpoint of the run folder at `path`, or of the newest."""
    path = path or newest_run()
    if not path.is_dir():
        return path
    for name in ("best.safetensors", "last.safetensors"):
        if (path / name).exists():
            return path / name
    raise UserError(f"{path} holds no checkpoint")


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


def _step_of(row: str) -> float:
    """The step of a log row; infinite for one that a crash cut short."""
    try:
        return json.loads(row)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
