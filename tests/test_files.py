"""atomic_write leaves the old file or the new one, whatever happens, and nothing beside it."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpt.errors import UserError
from gpt.files import atomic_write, remove_leftovers

OLD, NEW = b"old", b"new\r\n\xff"


@pytest.fixture(params=["over an old file", "fresh"])
def path(request, tmp_path):
    path = tmp_path / "last.safetensors"
    if request.param == "over an old file":
        path.write_bytes(OLD)
    return path


def contents(folder):
    """What lies in a folder: {name: bytes}."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("content", "expected"),
    [(NEW, NEW), (b"", b""), ("é\r\n\n", b"\xc3\xa9\r\n\n")],
    ids=["bytes", "empty", "str"],
)
def test_writes_exactly(path, content, expected):
    atomic_write(path, content)
    assert contents(path.parent) == {path.name: expected}


def test_temporary_file_lies_beside_the_target_under_its_own_name(path, monkeypatch):
    seen, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (seen.append(source), replace(source, target)))
    atomic_write(str(path), NEW)
    assert seen == [path.with_name(f".{path.name}.{os.getpid()}.tmp")]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_leaves_the_old_file(path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = contents(path.parent)
    monkeypatch.setattr(os, call, full)
    with pytest.raises(UserError) as error:
        atomic_write(path, NEW)
    monkeypatch.undo()
    untouched = "; the previous file is untouched" if before else ""
    assert str(error.value) == f"cannot write {path}: {os.strerror(errno.ENOSPC)}{untouched}"
    assert contents(path.parent) == before


@pytest.mark.parametrize("exception", [KeyboardInterrupt, ZeroDivisionError])
def test_interruption_leaves_the_old_file_and_is_passed_on(path, exception, monkeypatch):
    def interrupted(*_):
        raise exception

    before = contents(path.parent)
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(exception):
        atomic_write(path, NEW)
    monkeypatch.undo()
    assert contents(path.parent) == before


def test_data_reach_the_disk_before_the_rename(path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, f=original: (calls.append(n), f(*a)))
    atomic_write(path, NEW)
    assert calls[:2] == ["fsync", "replace"]


def test_a_folder_that_cannot_be_synced_is_no_error(path, monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "open", refuse)  # as Windows does for a folder; nothing else here calls os.open
    atomic_write(path, NEW)
    assert path.read_bytes() == NEW


def test_missing_folder_is_explained(tmp_path):
    with pytest.raises(UserError, match="cannot write .*none.*No such file") as error:
        atomic_write(tmp_path / "none" / "file", NEW)
    assert "untouched" not in str(error.value)


def test_what_is_not_a_regular_file_is_not_replaced(tmp_path):
    for path in (tmp_path, "/", os.devnull):
        with pytest.raises(UserError, match="not a regular file"):
            atomic_write(path, NEW)
    assert contents(tmp_path) == {}
    assert not Path(os.devnull).is_file()


@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links need a privilege there")
def test_symbolic_link_stays_and_its_target_is_written(tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk" / "file")
    atomic_write(link, NEW)
    assert link.is_symlink()
    assert (tmp_path / "disk" / "file").read_bytes() == NEW


def test_killed_writer_leaves_the_old_file_and_a_leftover_that_can_be_removed(tmp_path):
    path = tmp_path / "last.safetensors"
    path.write_bytes(OLD)
    script = (
        "import os, sys; from gpt.files import atomic_write\n"
        "os.fsync = lambda _: os._exit(9)\n"
        "atomic_write(sys.argv[1], b'half')"
    )
    repository = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", script, str(path)], cwd=repository).returncode == 9
    assert sorted(contents(tmp_path).values()) == [b"half", OLD]
    for name in (".hidden.tmp", ".last.safetensors", "notes.1.tmp"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert contents(tmp_path) == {
        path.name: OLD,
        ".hidden.tmp": b"",
        ".last.safetensors": b"",
        "notes.1.tmp": b"",
    }


def test_no_leftovers_in_a_folder_that_does_not_exist(tmp_path):
    remove_leftovers(tmp_path / "none")
