"""Files that hold either their old content or their new one, never a part of it."""

import contextlib
import os
from pathlib import Path

from gpt.errors import UserError


def atomic_write(path: str | os.PathLike, content: bytes | str) -> None:
    """Replace `path` by bytes, or by a str as UTF-8 with its newlines, and the bytes of "surrogateescape", kept.

    The content goes to `.NAME.PID.tmp` in the same folder, reaches the disk, and is renamed. On any failure,
    Ctrl-C included, the temporary file is removed and the old one stays; an OSError becomes a UserError.
    """
    target = Path(os.path.realpath(path))  # through a symbolic link, whose target may be on another disk
    untouched = ""
    try:
        if target.exists():
            if not target.is_file():  # renaming over /dev/null would destroy it
                raise UserError(f"cannot write {path}: it is not a regular file; give another name")
            untouched = "; the previous file is untouched"
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())  # before the rename, or a power cut could leave an empty file
            temporary.replace(target)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}{untouched}") from error
    _sync_folder(target.parent)


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Delete the temporary files of `atomic_write` that a killed run left in `folder`."""
    for temporary in Path(folder).glob(".*.[0-9]*.tmp"):
        with contextlib.suppress(OSError):  # clutter is no reason to stop
            temporary.unlink()


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where the platform can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
