"""Texts that are larger than one likes to hold: they stay in their files, and a piece at a time is read."""

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt.errors import UserError
from gpt.text.utf8 import encoded

PIECE = 2**20  # characters, or bytes, that are handled at a time: what is made on the way is many times their memory
BAR_SECONDS = 3.0  # after which a terminal shows how far a pass over a text has come
MARK = "\ufeff".encode()  # with which some editors begin a file


class _Block(NamedTuple):
    """Some bytes of a file that are whole characters, or a text that is in memory."""

    characters: int
    size: int  # in bytes of UTF-8
    path: Path | None = None
    offset: int = 0
    errors: str = "strict"
    text: str = ""

    def raw(self) -> bytes:
        if self.path is None:
            return _utf8(self.text)
        with self.path.open("rb") as file:
            file.seek(self.offset)
            raw = file.read(self.size)
        if len(raw) != self.size:
            raise self._changed()
        return raw

    def read(self) -> str:
        try:
            text = self.text if self.path is None else self.raw().decode("utf-8", self.errors)
        except UnicodeDecodeError:
            raise self._changed() from None
        if len(text) != self.characters:
            raise self._changed()
        return text

    def cut(self, start: int, stop: int) -> "_Block":
        """The characters from `start` to `stop`."""
        if (start, stop) == (0, self.characters):
            return self
        text = self.read()
        before, size = len(_utf8(text[:start])), len(_utf8(text[start:stop]))
        text = "" if self.path else text[start:stop]
        return self._replace(characters=stop - start, size=size, offset=self.offset + before, text=text)

    def _changed(self) -> UserError:
        return UserError(f"{self.path} has changed while it was read: start again when it is complete")


class StoredText:
    """A text of which one piece is in memory at a time.

    It has a length and parts as a str has; `str(text)` is the whole. Where the files change meanwhile, whatever reads
    them raises UserError.
    """

    def __init__(self, blocks: Sequence[_Block], symbols: frozenset[str]):
        self._blocks, self._starts = list(blocks), [0]
        for block in self._blocks:
            self._starts.append(self._starts[-1] + block.characters)
        self.symbols = symbols  # the distinct characters, for parts those of the whole
        self.size = sum(block.size for block in self._blocks)  # in bytes of UTF-8

    @classmethod
    def of_file(cls, path: Path, errors: str = "strict") -> "StoredText":
        """The UTF-8 in a file, without a byte order mark. UnicodeDecodeError, with the place in the file, for bytes
        that are none; errors="surrogateescape" takes any."""
        blocks, symbols, offset = [], set(), 0
        with path.open("rb") as file, _bar(os.fstat(file.fileno()).st_size, "B") as bar:
            held = file.read(PIECE)
            if held.startswith(MARK):
                held, offset = held[len(MARK) :], len(MARK)
            while held:
                more = file.read(PIECE)
                end = _whole(held) if more else len(held)
                text = _decoded(held[:end], errors, offset)
                blocks.append(_Block(len(text), end, path, offset, errors))
                symbols |= _symbols(text)
                bar.update(end)
                held, offset = held[end:] + more, offset + end
        return cls(blocks, frozenset(symbols))

    @classmethod
    def joined(cls, texts: Sequence["str | StoredText"]) -> "StoredText":
        """One text after the other."""
        blocks, symbols = [], frozenset()
        for text in texts:
            if isinstance(text, str):
                blocks += [_Block(len(piece), len(_utf8(piece)), text=piece) for piece in pieces(text)]
            else:
                blocks += text._blocks
            symbols |= symbols_of(text)
        return cls(blocks, symbols)

    def part(self, start: int, stop: int) -> "StoredText":
        """The characters from `start` to `stop`, of which `start` is not the larger."""
        first, blocks = bisect_right(self._starts, start) - 1, []
        for at, block in zip(self._starts[first:], self._blocks[first:], strict=False):
            if at >= stop:
                break
            blocks.append(block.cut(max(0, start - at), min(block.characters, stop - at)))
        return StoredText(blocks, self.symbols)

    def pieces(self) -> Iterator[str]:
        return (block.read() for block in self._blocks)

    def raw_pieces(self) -> Iterator[bytes]:
        """Its UTF-8, or what stands in the files in its place."""
        return (block.raw() for block in self._blocks)

    def __len__(self) -> int:
        return self._starts[-1]

    def __str__(self) -> str:
        return "".join(self.pieces())

    def __eq__(self, other) -> bool:
        return isinstance(other, str | StoredText) and len(self) == len(other) and str(self) == str(other)

    __hash__ = None


AnyText = str | StoredText


def part(text: AnyText, start: int, stop: int) -> AnyText:
    """Some characters of a text."""
    return text[start:stop] if isinstance(text, str) else text.part(start, stop)


def pieces(text: AnyText) -> Iterator[str]:
    """A text a piece at a time."""
    return (text[i : i + PIECE] for i in range(0, len(text), PIECE)) if isinstance(text, str) else text.pieces()


def with_bar(parts: Iterable[str], total: int) -> Iterator[str]:
    """The parts of a text of `total` characters. A terminal shows a bar if they take long."""
    with _bar(total, "char") as bar:
        for piece in parts:
            yield piece
            bar.update(len(piece))


def raw_pieces(text: AnyText) -> Iterator[bytes]:
    """The bytes of a text as UTF-8."""
    if isinstance(text, StoredText):
        return text.raw_pieces()
    return (encoded(piece, "utf-8", "surrogateescape") for piece in pieces(text))


def raw_size(text: AnyText) -> int:
    """How many bytes these are."""
    return text.size if isinstance(text, StoredText) else sum(map(len, raw_pieces(text)))


def symbols_of(text: AnyText) -> set[str] | frozenset[str]:
    """The distinct characters of a text."""
    return set(text) if isinstance(text, str) else text.symbols


def _bar(total: int, unit: str):
    from tqdm import tqdm

    return tqdm(total=total, delay=BAR_SECONDS, disable=None, unit=unit, unit_scale=True)


def _symbols(text: str) -> set[str]:
    """Its distinct characters. Counting bytes is ten times as fast as a set of a million of them."""
    if not text.isascii():
        return set(text)
    return {chr(code) for code in np.flatnonzero(np.bincount(np.frombuffer(text.encode(), np.uint8)))}


def _whole(raw: bytes) -> int:
    """How many of the bytes are sure to end with a whole character, if they are UTF-8: up to the last one that begins
    one. (Four that all go on are none, and may be cut anywhere.)"""
    for back in range(1, min(4, len(raw) - 1) + 1):
        byte = raw[-back]
        if byte >= 0xC0:
            return len(raw) - back
        if byte < 0x80:
            break
    return len(raw)


def _decoded(raw: bytes, errors: str, offset: int) -> str:
    try:
        return raw.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        error.start += offset
        raise


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
