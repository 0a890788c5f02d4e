"""Texts to train on: a file, a download, or what is built in."""

import contextlib
import hashlib
import os
import platform
import queue
import stat
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt.errors import UserError
from gpt.files import atomic_write, cache_folder, check_size
from gpt.terminal import shortened
from gpt.text.stored import AnyText, StoredText

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
DEADLINE_DEFAULT = 5.0  # seconds that a download may take when nobody asked for it,
DEADLINE_ASKED = 60.0  # and when somebody did
SHAKESPEARE_MOST = 2**21  # bytes that are read of what should be 1.1 MB
AB_CHARACTERS = 1_000_000
BYTES_PER_BYTE = 2  # of memory that a byte of a text needs, as tokens; sub-words need the text beside them


@dataclass(frozen=True)
class Text:
    """A text to train on and where it came from."""

    text: AnyText
    name: str  # for people
    source: str | list[str]  # what to pass as --data to get it again
    record: int = 0  # n > 0: independent records of n characters each, which no block may cross
    note: str = ""  # one line for the user when the default had to be replaced


def short_name(source: str | list[str]) -> str:
    """What a text is called by what was given as --data."""
    if isinstance(source, list):
        return f"{Path(source[0]).name} and {len(source) - 1} more"
    return Path(source).name


def load_text(source: str | list[str] | None, *, block_size: int, seed: int = 0, any_bytes: bool = False) -> Text:
    """The text that `source` names.

    - "shakespeare": tinyshakespeare, downloaded once and cached.
    - "pydoc": the language reference inside every Python, so no download.
    - "ab": strings of block_size + 1 characters that start with a, go a -> a or a -> b with equal weight and
      b -> b always, drawn from `seed`: the best possible loss is ln 2 after an a and 0 after a b.
    - None: shakespeare if it is cached or downloads within seconds, else pydoc and a note.
    - any other: a UTF-8 file, decoded exactly but for a byte order mark, or a folder, whose files are joined in the
      order of their names; write ./ab for a file named ab.
    - a list: all of these, joined in the order of their names.

    any_bytes: a file need not be UTF-8; see `gpt.text.tokenizers.ByteTokenizer`.

    Whatever cannot be had raises UserError.
    """
    match source:
        case None:
            return _default()
        case "shakespeare":
            return _shakespeare(DEADLINE_ASKED)
        case "pydoc":
            return _pydoc()
        case "ab":
            return _ab_strings(block_size + 1, seed)
    if isinstance(source, list):
        if "ab" in source:
            raise UserError(
                "--data ab has records of its own and no other text beside it: give it alone, or write ./ab"
            )
        texts = [load_text(part, block_size=block_size, any_bytes=any_bytes) for part in source]
        name = " + ".join(sorted(text.name for text in texts)[:3]) + ", ..." * (len(texts) > 3)
        return _joined(texts, name, [text.source for text in texts], f"{len(texts)} texts")
    errors = "surrogateescape" if any_bytes else "strict"
    return _read_folder(source, errors) if os.path.isdir(source) else _read_file(source, errors)  # noqa: PTH112 - as long


def _read_file(source: str, errors: str) -> Text:
    try:
        text = StoredText.of_file(Path(source), errors) if _holds_text(Path(source)) else ""
    except OSError as error:
        raise UserError(
            f"cannot read {source}: {error.strerror or error}; give a UTF-8 file, shakespeare, pydoc or ab"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{source} is not UTF-8 text (see the byte at offset {error.start}); convert it to UTF-8 first, "
            "or take its bytes as they are with --tokenizer byte"
        ) from error
    if not len(text):
        raise UserError(f"{source} is empty; --data needs a file with text to train on")
    return Text(text, name=Path(source).name, source=str(Path(source).absolute()))


def _read_folder(source: str, errors: str) -> Text:
    """The files right in a folder, but for hidden and empty ones, one after the other."""
    try:
        files = [path for path in Path(source).iterdir() if path.is_file() and not path.name.startswith(".")]
        files = [path for path in files if path.stat().st_size]
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror or error}; give a folder that can be listed") from error
    if not files:
        raise UserError(f"the folder {source} holds no files with text; --data needs some to train on")
    check_size(Path(source), BYTES_PER_BYTE, "take fewer files")
    folder = Path(source).absolute()
    texts = [_read_file(str(file), errors) for file in files]
    return _joined(texts, folder.name, str(folder), f"{folder.name}: {len(files)} files")


def _joined(texts: list[Text], name: str, source: str | list[str], what: str) -> Text:
    texts = sorted(texts, key=lambda text: text.name)
    names = ", ".join(text.name for text in texts[:5]) + (", ..." if len(texts) > 5 else "")
    note = f"{what}, joined in this order: {names}"
    return Text(StoredText.joined([text.text for text in texts]), name=name, source=source, note=note)


def _holds_text(path: Path) -> bool:
    """Whether there is something in a file. UserError for what may have no end, and for what is too large for this
    machine."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) and not path.is_dir():
        raise UserError(f"{path} is a pipe or a device, which may have no end: write its text into a file first")
    check_size(path, BYTES_PER_BYTE, "take a part of it")
    return path.is_dir() or status.st_size > 0  # what claims to be empty, as /proc's files do, may have no end


def _ab_strings(record: int, seed: int) -> Text:
    rng = np.random.Generator(np.random.Philox(seed))
    # The leading a, and one more for each fair coin that says so: a geometric number of a's, then b's.
    a_run = rng.geometric(0.5, size=(max(1, AB_CHARACTERS // record), 1))
    is_b = np.arange(record) >= a_run  # (records, record)
    text = (is_b + np.uint8(ord("a"))).tobytes().decode("ascii")
    return Text(text, name="a/b strings", source="ab", record=record)


def _pydoc(note: str = "") -> Text:
    from pydoc_data.topics import topics  # most of a megabyte, so only when asked for

    text = "\n\n".join(topics[key] for key in sorted(topics))
    return Text(text, f"language reference of Python {platform.python_version()}", source="pydoc", note=note)


def _default() -> Text:
    try:
        return _shakespeare(DEADLINE_DEFAULT)
    except UserError:
        return _pydoc(
            "tinyshakespeare is not cached and could not be downloaded: using Python's language reference "
            "instead; choose a text with --data FILE, shakespeare, pydoc or ab"
        )


def _shakespeare(seconds: float) -> Text:
    """tinyshakespeare, cached or downloaded within `seconds`; UserError when it is neither."""
    try:
        cached = cache_folder() / "tinyshakespeare.txt"
    except RuntimeError:  # of a user without a name or a home
        raise UserError("there is no home folder to keep tinyshakespeare in: set HOME, or give --data FILE") from None
    raw = b""
    with contextlib.suppress(OSError, UserError):
        raw = cached.read_bytes() if _holds_text(cached) else b""
    if not _is_shakespeare(raw):
        raw = _download(SHAKESPEARE_URL, seconds)
        with contextlib.suppress(OSError, UserError):  # without a cache one can still train
            cached.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(cached, raw)
    return Text(raw.decode(), name="tinyshakespeare", source="shakespeare")


def _is_shakespeare(raw: bytes) -> bool:
    return hashlib.sha256(raw).hexdigest() == SHAKESPEARE_SHA256


def _download(url: str, seconds: float) -> bytes:
    """tinyshakespeare from `url`, its hash checked; UserError when it is not here after `seconds`."""
    import urllib.request  # slow to import and seldom needed

    answers: queue.SimpleQueue = queue.SimpleQueue()

    def fetch() -> None:
        try:
            deadline, raw = time.monotonic() + seconds, b""
            with urllib.request.urlopen(url, timeout=seconds) as response:
                while len(raw) < SHAKESPEARE_MOST and time.monotonic() < deadline:  # whatever keeps coming
                    piece = response.read1(2**16)
                    if not piece:
                        break
                    raw += piece
            answers.put(raw)
        except Exception as error:  # of any kind: the caller reports it
            answers.put(getattr(error, "reason", error))

    # In a thread: urllib's timeout bounds each socket operation, but neither the name look-up nor the whole.
    threading.Thread(target=fetch, daemon=True).start()
    try:
        answer = answers.get(timeout=seconds)
    except queue.Empty:
        answer = f"not complete after {seconds:g} seconds"
    if isinstance(answer, bytes):
        if _is_shakespeare(answer):
            return answer
        answer = f"the {len(answer)} bytes that came are not the expected text (wrong sha256)"
    raise UserError(
        f"cannot download tinyshakespeare from {url}: {shortened(str(answer))}; "
        "try again later, or train on your own text with --data FILE or offline with --data pydoc"
    )
