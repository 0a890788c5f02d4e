"""The one place that opens the files of a run: each holds its old content or its new one, never a part of it, and
nothing outside its folder is touched."""

import contextlib
import errno
import os
import re
import stat
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

from gpt.errors import UserError
from tensorlite import get_backend

# Without waiting for the other end of a pipe. Windows lacks most of these: there, links are looked for beforehand only.
OPEN = sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"))
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
REMEDIES = {
    "EACCES": "change its permissions, or choose another place",
    "EDQUOT": "free some of your disk quota, or choose another disk",
    "EFBIG": "raise the limit on the size of files (ulimit -f)",
    "ENAMETOOLONG": "give a shorter name",
    "ENOENT": "check the name",
    "ENOSPC": "free some space there, or choose another disk",
    "EPERM": "change its permissions, or choose another place",
    "EROFS": "choose a place that can be written",
}


@contextlib.contextmanager
def explained(what: str, path: str | os.PathLike, note: str = "") -> Iterator[None]:
    """Within, an OSError becomes a UserError: what cannot be done with `path`, why, and what to do; then the note."""
    try:
        yield
    except OSError as error:
        remedy = REMEDIES.get(errno.errorcode.get(error.errno), "check the path and its disk, or choose another")
        raise UserError(f"cannot {what} {path}: {error.strerror or error}; {remedy}{note}") from error


def open_regular(path: str | os.PathLike, flags: int = os.O_RDONLY, follow: bool = False) -> int:
    """The descriptor of a regular file, which is not emptied. UserError for a pipe or a device, which may have no end,
    and unless `follow` for a symbolic link, which may lead anywhere."""
    if "\0" in str(path):
        raise UserError(f"no file is called {str(path)!r}: leave out the NUL character")
    if not follow:
        refuse_link(path)
    descriptor = os.open(path, flags | OPEN | (0 if follow else NO_FOLLOW), 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path} is not a regular file: give another")
    return descriptor


def refuse_link(path: str | os.PathLike) -> None:
    """UserError for a symbolic link."""
    if Path(path).is_symlink():
        raise UserError(f"{path} is a symbolic link, which may lead out of its folder: put the file itself there")


def read_regular(path: str | os.PathLike, most: int, follow: bool = False) -> bytes:
    """What a regular file holds, `most` bytes at most."""
    with os.fdopen(open_regular(path, follow=follow), "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UserError(f"{path} has more than {most:,} bytes, which cannot be right: give another file")
    return content


def cache_folder() -> Path:
    """Where the platform wants what can be had again. RuntimeError for a user without a name or a home."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "tensorlite"


def check_size(path: Path, times: int, advice: str) -> None:
    """UserError if what is at `path`, or in that folder, takes more than this machine's memory: `times` its size."""
    files = [file for file in path.iterdir() if file.is_file()] if path.is_dir() else [path] if path.exists() else []
    memory, size = get_backend("numpy").memory_size(), sum(file.stat().st_size for file in files)
    if memory is not None and times * size > memory:
        needs = f"which need {times} times as much memory" if times > 1 else "which need as much memory"
        raise UserError(f"{path} has {size:,} bytes, {needs}, and there are {memory:,}: {advice}")


def atomic_write(path: str | os.PathLike, *pieces) -> None:
    """Replace `path` by its new content: bytes, arrays, or texts as UTF-8 with their newlines, and the bytes of
    "surrogateescape", kept.

    It goes to a temporary file in the same folder, reaches the disk, and is renamed. On any failure, Ctrl-C included,
    the temporary file is removed and the old one stays; an OSError becomes a UserError. Permissions stay, and the owner
    where that is permitted. A symbolic link is not followed, and what is read-only or no regular file is not replaced.
    """
    target = Path(path).absolute()
    with explained("write", path):
        old = check_replaceable(path)
    with explained("write", path, "; the previous file is untouched" if old else ""):
        temporary, descriptor = _open_temporary(target, 0o600 if old else 0o666)
        try:
            with os.fdopen(descriptor, "wb") as file:
                if old:
                    _keep_owner_and_mode(descriptor, old)
                for piece in pieces:
                    file.write(piece.encode("utf-8", "surrogateescape") if isinstance(piece, str) else piece)
                file.flush()
                os.fsync(descriptor)  # before the rename, or a power cut could leave an empty file
            temporary.replace(target)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    _sync_folder(target.parent)


def try_write(path: str | os.PathLike) -> None:
    """UserError if `atomic_write` could not even begin."""
    with explained("write", path):
        check_replaceable(path)
        temporary, descriptor = _open_temporary(Path(path).absolute())
        os.close(descriptor)
        temporary.unlink()


def check_replaceable(path: str | os.PathLike) -> os.stat_result | None:
    """What is known of the file at `path`, None if there is none; UserError if it is not to be replaced."""
    refuse_link(path)
    try:
        status = Path(path).lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):  # renaming over /dev/null would destroy it
        raise UserError(f"cannot write {path}: it is not a regular file; give another name")
    if not status.st_mode & 0o222 or not os.access(path, os.W_OK):  # renaming would not ask
        raise UserError(f"cannot write {path}: it is read-only; make it writable, or give another name")
    return status


def remove_leftovers(folder: Path, names: Collection[str]) -> None:
    """Delete the temporary files for files of these names that a killed run left in `folder`."""
    ours = re.compile(rf"\.({'|'.join(map(re.escape, names))})\.([0-9a-f]{{16}}|\d{{1,10}})\.tmp")  # once with a PID
    with contextlib.suppress(OSError):  # clutter is no reason to stop
        for path in folder.iterdir():
            if ours.fullmatch(path.name) and path.is_file():
                path.unlink()


def _open_temporary(target: Path, mode: int = 0o666) -> tuple[Path, int]:
    """A new file beside `target`, under a name that nobody can have put a link at."""
    temporary = target.with_name(f".{target.name}.{os.urandom(8).hex()}.tmp")
    return temporary, os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_FOLLOW | OPEN, mode)


def _keep_owner_and_mode(descriptor: int, old: os.stat_result) -> None:
    """Give a new file those of the one that it replaces. The mode comes last: a change of owner takes from it."""
    if hasattr(os, "fchown"):  # not on Windows
        for change, values in ((os.fchown, (old.st_uid, old.st_gid)), (os.fchmod, (stat.S_IMODE(old.st_mode),))):
            with contextlib.suppress(PermissionError):
                change(descriptor, *values)


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where the platform can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
