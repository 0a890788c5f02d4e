"""atomic_write leaves the old file or the new one, whatever happens, and nothing beside it."""

import errno
import os
import re
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from gpt.errors import UserError
from gpt.files import REMEDIES, atomic_write, explained, open_regular, read_regular, remove_leftovers, try_write

OLD, NEW = b"old", b"new\r\n\xff"
NOBODY = 65534
ROOT = Path(__file__).parents[1]


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


def test_temporary_file_lies_beside_the_target_under_a_name_that_nobody_can_guess(path, monkeypatch):
    seen, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (seen.append(source), replace(source, target)))
    for _ in range(2):
        atomic_write(str(path), NEW)
    assert len(set(seen)) == 2
    for source in seen:
        assert source.parent == path.parent
        assert re.fullmatch(r"\.last\.safetensors\.[0-9a-f]{16}\.tmp", source.name)


MOUNTED = """
mount -t tmpfs -o size=64k none disk || exit 77
echo old > disk/file
if [ "$1" = full ]; then :; else mount -o remount,ro disk || exit 77; fi
exec "$2" -c 'import sys; sys.path.insert(0, sys.argv[1])
from gpt.errors import UserError
from gpt.files import atomic_write
from pathlib import Path
try: atomic_write("disk/file", bytes(10**6))
except UserError as error: print(error)
print(Path("disk/file").read_text().strip(), len(list(Path("disk").iterdir())))' "$3"
"""


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (
            "full",
            "No space left on device; free some space there, or choose another disk; the previous file is untouched",
        ),
        ("read-only", "it is read-only; make it writable, or give another name"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="needs a mount of its own, as Linux has them")
def test_a_disk_that_takes_no_more(tmp_path, kind, said):
    (tmp_path / "disk").mkdir()
    command = ["unshare", "--mount", "sh", "-c", MOUNTED, "sh", kind, sys.executable, ROOT]
    try:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
    assert done.stdout == f"cannot write disk/file: {said}\nold 1\n"


def test_a_name_that_is_taken_is_not_written_to(path, monkeypatch):
    """Though it be a link, planted by who has guessed it."""
    monkeypatch.setattr(os, "urandom", bytes)
    precious, before = path.with_name("precious"), path.read_bytes() if path.exists() else None
    precious.write_bytes(OLD)
    path.with_name(f".{path.name}.{'00' * 8}.tmp").symlink_to(precious)
    with pytest.raises(UserError, match="cannot write .*: File exists"):
        atomic_write(path, NEW)
    assert precious.read_bytes() == OLD
    assert (path.read_bytes() if path.exists() else None) == before


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_leaves_the_old_file(path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = contents(path.parent)
    monkeypatch.setattr(os, call, full)
    with pytest.raises(UserError) as error:
        atomic_write(path, NEW)
    monkeypatch.undo()
    remedy, untouched = REMEDIES["ENOSPC"], "; the previous file is untouched" if before else ""
    assert str(error.value) == f"cannot write {path}: {os.strerror(errno.ENOSPC)}; {remedy}{untouched}"
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
    def refuse(name, *args, opened=os.open):
        if Path(name).is_dir():  # as Windows does
            raise PermissionError
        return opened(name, *args)

    monkeypatch.setattr(os, "open", refuse)
    atomic_write(path, NEW)
    assert path.read_bytes() == NEW


def test_missing_folder_is_explained(tmp_path):
    with pytest.raises(UserError, match="cannot write .*none.*No such file or directory; check the name") as error:
        atomic_write(tmp_path / "none" / "file", NEW)
    assert "untouched" not in str(error.value)


def test_what_is_not_a_regular_file_is_not_replaced(tmp_path):
    for path in (tmp_path, "/", os.devnull):
        with pytest.raises(UserError, match="not a regular file"):
            atomic_write(path, NEW)
    assert contents(tmp_path) == {}
    assert not Path(os.devnull).is_file()


@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links need a privilege there")
@pytest.mark.parametrize("use", [lambda p: atomic_write(p, NEW), try_write, open_regular, lambda p: read_regular(p, 9)])
@pytest.mark.parametrize("target", ["file", "missing", "link", "/dev/zero", "."])
def test_a_symbolic_link_is_not_followed(tmp_path, use, target):
    (tmp_path / "file").write_bytes(OLD)
    link = tmp_path / "link"
    link.symlink_to(target)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="link is a symbolic link, which may lead out of its folder: put the file itse"):
        use(link)
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "file").read_bytes() == OLD


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="this system looks for links beforehand only")
def test_a_link_that_comes_just_before_the_opening_is_not_followed(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(OLD)
    (tmp_path / "link").symlink_to("file")
    monkeypatch.setattr(Path, "is_symlink", lambda _: False)
    with pytest.raises(OSError, match="symbolic links"):
        open_regular(tmp_path / "link", os.O_RDWR)


@pytest.mark.parametrize("kind", ["pipe", "socket", "folder", "/dev/zero"])
def test_what_is_no_regular_file_is_not_read(tmp_path, kind):
    """At once: a pipe would make one wait, and a device has no end."""
    path = tmp_path / kind
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "socket":
            with socket.socket(socket.AF_UNIX) as ours:
                ours.bind(str(path))
        case "folder":
            path.mkdir()
    said = "is not a regular file: give another|No such device or address; check the path"
    with pytest.raises(UserError, match=said), explained("read", path):
        read_regular(path, 9)


def test_a_file_is_read_up_to_a_size(path):
    path.write_bytes(b"123")
    assert read_regular(path, 3) == b"123"
    with pytest.raises(UserError, match="has more than 2 bytes, which cannot be right"):
        read_regular(path, 2)
    with pytest.raises(UserError, match="no file is called 'a.x00': leave out the NUL character"):
        read_regular("a\0", 3)


# --- permissions ---


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o666, 0o755, 0o200])
def test_permissions_of_what_is_replaced_stay(tmp_path, mode):
    path = tmp_path / "file"
    path.write_bytes(OLD)
    path.chmod(mode)
    atomic_write(path, NEW)
    assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file to another user")
def test_the_owner_of_what_is_replaced_stays(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(OLD)
    os.chown(path, NOBODY, NOBODY)
    path.chmod(0o2640)
    atomic_write(path, NEW)
    status = path.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (NOBODY, NOBODY, 0o2640)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_replaces_what_may_be_written_and_nothing_else(tmp_path):
    for name, mode in {"ours": 0o644, "open": 0o666}.items():
        (tmp_path / name).write_bytes(OLD)
        (tmp_path / name).chmod(mode)
    for folder in (tmp_path, *list(tmp_path.parents)[:-2]):
        folder.chmod(folder.stat().st_mode | 0o011)
    tmp_path.chmod(0o777)
    script = (
        "import os, sys; from gpt.errors import UserError; from gpt.files import atomic_write\n"
        f"os.setgid({NOBODY}); os.setuid({NOBODY}); os.chdir(sys.argv[1])\n"
        "for name in ('open', 'ours'):\n"
        "    try: atomic_write(name, b'new')\n"
        "    except UserError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "cannot write ours: it is read-only; make it writable, or give another name\n", done.stderr
    assert contents(tmp_path) == {"ours": OLD, "open": b"new"}
    assert stat.S_IMODE((tmp_path / "open").stat().st_mode) == 0o666


@pytest.mark.parametrize("write", [lambda path: atomic_write(path, NEW), try_write])
def test_a_read_only_file_is_not_replaced(tmp_path, write):
    path = tmp_path / "file"
    path.write_bytes(OLD)
    path.chmod(0o444)
    with pytest.raises(UserError, match="cannot write .*file: it is read-only; make it writable, or give another name"):
        write(path)
    assert contents(tmp_path) == {"file": OLD}


def test_trying_leaves_no_trace(path):
    before = contents(path.parent)
    try_write(path)
    assert contents(path.parent) == before


# --- what a killed process leaves ---


def test_killed_writer_leaves_the_old_file_and_a_leftover_that_can_be_removed(tmp_path):
    path = tmp_path / "last.safetensors"
    path.write_bytes(OLD)
    script = (
        "import os, sys; from gpt.files import atomic_write\n"
        "os.fsync = lambda _: os._exit(9)\n"
        "atomic_write(sys.argv[1], b'half')"
    )
    assert subprocess.run([sys.executable, "-c", script, str(path)], cwd=ROOT).returncode == 9
    assert sorted(contents(tmp_path).values()) == [b"half", OLD]
    (tmp_path / f".last.safetensors.{os.getpid()}.tmp").touch()  # as before names were random
    others = [".hidden.tmp", ".last.safetensors", "notes.1.tmp", ".notes.1.tmp", ".last.safetensors.12345678901.tmp"]
    others += [".last.safetensors.old.tmp", ".last.safetensors.0123456789ABCDEF.tmp", ".lastxsafetensors.1.tmp"]
    others += [".last.safetensors.1.tmp.tmp", "x.last.safetensors.1.tmp", ".log.jsonl.1.tmp"]
    for name in others:
        (tmp_path / name).touch()
    (tmp_path / ".last.safetensors.7.tmp").mkdir()
    remove_leftovers(tmp_path, [path.name])
    (tmp_path / ".last.safetensors.7.tmp").rmdir()
    assert contents(tmp_path) == {path.name: OLD} | dict.fromkeys(others, b"")


def test_no_leftovers_in_a_folder_that_does_not_exist(tmp_path):
    remove_leftovers(tmp_path / "none", ["file"])
