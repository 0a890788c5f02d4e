"""Named arrays in a file of the safetensors format: eight bytes with the length of a header, the header as JSON, the
values. Ours are float32; of other programs' files narrower floats are read as float32 too.

Not by that library: it makes a second copy of everything to write it, ends the process where there is too little memory
for that, and reads by mapping, where a file that is cut short meanwhile would end it too.
"""

import json
import math
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gpt.errors import UserError, shown
from gpt.files import explained, open_regular

FLOAT32 = np.dtype("<f4")
# What values are stored as. BF16 is the upper half of a float32; of integers, such as a mask, only the size is known.
STORED = {"F32": FLOAT32, "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
INTEGERS = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "I32": 4, "I64": 8}
MAX_HEADER = 2**27  # bytes: a tokenizer has up to 2**25, and up to three times as many as a text within a text
MAX_JSON = 2**22  # of them outside of texts: 2,000 layers, and lists and objects that fit any memory
TEXTS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
CHUNK = 2**18  # values to read at a time: they stay in the cache for what is done with them


def make_header(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    """What a file begins with. The values, all FLOAT32, follow in the order of `tensors`."""
    header, end = {"__metadata__": metadata}, 0
    for name, array in tensors.items():
        start, end = end, end + array.nbytes
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@contextmanager
def open_tensors(path: Path) -> Iterator["TensorFile"]:
    """The file at `path`. Within, what is wrong with it becomes a UserError."""
    try:
        with explained("read", path), os.fdopen(open_regular(path, follow=True), "rb") as file:
            yield TensorFile(file)
    except (ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: it is damaged or not a safetensors file ({error}); use another") from None


def parsed(text: bytes) -> object:
    """What a JSON text says. ValueError, or RecursionError, if it is none, or holds more things than any header."""
    if len(text) > MAX_JSON and not holds_little(text):
        raise ValueError("its JSON holds too much")
    return json.loads(text)


def holds_little(text: bytes) -> bool:
    """Whether there are no more than MAX_JSON bytes outside of a JSON's texts, whose quotes count."""
    outside = end = 0
    for found in TEXTS.finditer(text):
        outside, end = outside + found.start() - end + 2, found.end()
        if outside > MAX_JSON:
            return False
    return outside + len(text) - end <= MAX_JSON


class TensorFile:
    """An open file with its `metadata`. ValueError, or RecursionError, wherever it is not of this format."""

    def __init__(self, file: BinaryIO):
        self._file, self._size = file, os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not length <= min(MAX_HEADER, self._size - 8):
            raise ValueError("its header has an impossible length")
        header = parsed(file.read(length))
        self._entries, self._values = header if isinstance(header, dict) else {}, 8 + length
        self.metadata = self._entries.pop("__metadata__", {})
        if not isinstance(self.metadata, dict) or not all(isinstance(text, str) for text in self.metadata.values()):
            raise ValueError("its metadata are no texts")

    def shapes(self, stored: Collection[str] = ("F32",)) -> dict[str, tuple[int, ...]]:
        """By name, of arrays that are all `stored` in one of these ways. The values are what follows the header: no
        shape can ask for more than there is."""
        places, end = {name: _place(name, entry, stored) for name, entry in self._entries.items()}, 0
        for start, stop, _ in sorted(places.values()):
            if start != end:
                raise ValueError("its values overlap, or leave a gap")
            end = stop
        if self._values + end != self._size:
            raise ValueError(f"it has {self._size:,} bytes instead of {self._values + end:,}")
        return {name: shape for name, (_, _, shape) in places.items()}

    def read(self, name: str) -> Iterator[tuple[slice, np.ndarray]]:
        """The values of an array of floats in pieces of float32, each with its place in the flat array; a piece is
        overwritten by the next. For a name in `shapes`."""
        start, stop, _ = _place(name, self._entries[name], STORED)
        kind = self._entries[name]["dtype"]
        buffer = np.empty(CHUNK, STORED[kind])
        count = (stop - start) // buffer.itemsize
        self._file.seek(self._values + start)
        for i in range(0, count, CHUNK):
            part = slice(i, min(i + CHUNK, count))
            piece = buffer[: part.stop - part.start]
            if self._file.readinto(piece) != piece.nbytes:
                raise ValueError("it ends too early")
            yield part, _as_float32(piece, kind)


def _as_float32(piece: np.ndarray, kind: str) -> np.ndarray:
    """The values of a piece that is stored as `kind`."""
    if kind == "BF16":
        return (piece.astype("<u4") << 16).view(FLOAT32)
    return piece.astype(FLOAT32, copy=False)


def _place(name: str, entry: object, stored: Collection[str]) -> tuple[int, int, tuple[int, ...]]:
    """Where in the values an array lies, from start to stop, and its shape."""
    match entry:
        case {"dtype": str(kind), "shape": [*shape], "data_offsets": [int(start), int(stop)]} if (
            kind in stored
            and len(shape) <= 8
            and all(type(n) is int and 0 <= n < 2**63 for n in shape)
            and stop - start == (INTEGERS.get(kind) or STORED[kind].itemsize) * math.prod(shape)
        ):
            return start, stop, tuple(shape)
    raise ValueError(f"its entry of {shown(name)} is no array of {' or '.join(stored)}: {shown(entry)}")
