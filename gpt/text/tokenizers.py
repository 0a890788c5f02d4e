"""Text to integer tokens and back: the characters of a text, the bytes of anything, or sub-words (bpe.py)."""

import codecs
import reprlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from gpt.errors import MissingLibraryError, UserError, shown
from gpt.text.bpe import SubwordTokenizer, learn_bpe
from gpt.text.stored import AnyText, part, pieces, raw_pieces, raw_size, symbols_of, with_bar
from gpt.text.utf8 import encoded

TOKENIZERS = ("char", "byte", "bpe")
FILE = ".json"  # how the name of any other tokenizer ends: it is a file of Hugging Face's
BPE_SIZE = 1024  # sub-words to learn if nothing else is said: of English they are some two characters long
MAX_LISTED = 20  # unknown characters named in an error


class CharTokenizer:
    """One token per Unicode code point; token k is the k-th of `symbols`, which are sorted and distinct."""

    kind = "char"

    def __init__(self, symbols: str):
        if not symbols or list(symbols) != sorted(set(symbols)):
            raise ValueError(f"expected sorted distinct symbols, at least one, got {reprlib.repr(symbols)}")
        self.symbols = symbols
        self.vocab_size = len(symbols)
        self._points = _code_points(symbols)
        self._tokens = np.full(self._points[-1] + 2, -1, np.int32)  # by code point; -1 for what is no symbol
        self._tokens[self._points] = np.arange(len(symbols))

    @classmethod
    def from_text(cls, text: AnyText) -> "CharTokenizer":
        """The tokenizer whose symbols are the distinct characters of `text`."""
        return cls("".join(sorted(symbols_of(text))))

    def knows(self, character: str) -> bool:
        """Whether there is a token for it."""
        return character in self.symbols

    def encode(self, text: AnyText, dtype=np.int64) -> np.ndarray:
        """Tokens, one per code point of `text`; UserError lists the characters without a token."""
        tokens, unknown, start = np.empty(len(text), dtype), set(), 0
        for piece in with_bar(pieces(text), len(text)):
            points = np.frombuffer(piece.encode(), np.uint8) if piece.isascii() else _code_points(piece, start)
            found = self._tokens.take(points, mode="clip")  # the last of which is -1
            if found.min() < 0:
                unknown |= set(points[found < 0].tolist())
            tokens[start : start + len(piece)] = found
            start += len(piece)
        if unknown:
            characters = [repr(chr(point)) for point in sorted(unknown)]
            more = f" and {len(characters) - MAX_LISTED} more" if len(characters) > MAX_LISTED else ""
            raise UserError(
                f"the text has characters that are not in the model's vocabulary of {self.vocab_size}: "
                f"{', '.join(characters[:MAX_LISTED])}{more}; "
                "leave them out, or train a model on text that has them or with --tokenizer byte"
            )
        return tokens

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of tokens `ids`."""
        return self._points[np.asarray(ids, dtype=np.int64)].tobytes().decode("utf-32-le")

    def stream_decoder(self) -> Callable[..., str]:
        """decode(ids, final=False) -> the text that has become complete: here, always all of it."""
        return lambda ids, final=False: self.decode(ids)

    def to_dict(self) -> dict:
        """What `tokenizer_from_dict` needs, JSON-able."""
        return {"kind": self.kind, "symbols": self.symbols}


class ByteTokenizer:
    """One token per byte: 256 symbols for any text in any language, as UTF-8, and for what is no text at all.

    A byte that is no UTF-8 is in a str the lone surrogate that Python's "surrogateescape" makes of it, so that every
    byte comes back; `readable` is for showing such a str.
    """

    kind = "byte"
    vocab_size = 256

    def knows(self, character: str) -> bool:
        """True: every character has its bytes."""
        return True

    def encode(self, text: AnyText, dtype=np.int64) -> np.ndarray:
        """Tokens, one per UTF-8 byte of `text`."""
        tokens, start = np.empty(raw_size(text), dtype), 0
        for raw in raw_pieces(text):
            tokens[start : start + len(raw)] = np.frombuffer(raw, np.uint8)
            start += len(raw)
        return tokens

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of tokens `ids`."""
        return self.stream_decoder()(ids, final=True)

    def stream_decoder(self) -> Callable[..., str]:
        """decode(ids, final=False) -> the text that has become complete; `final` gives the rest."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
        return lambda ids, final=False: decoder.decode(bytes(np.asarray(ids).ravel().tolist()), final)

    def to_dict(self) -> dict:
        """What `tokenizer_from_dict` needs, JSON-able."""
        return {"kind": self.kind}


Tokenizer = CharTokenizer | ByteTokenizer | SubwordTokenizer


def readable(text: str) -> str:
    """`text` with U+FFFD for bytes that are no UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def with_known_line_ends(text: str, tokenizer: Tokenizer) -> str:
    """`text` without the CR of its line ends, for a model that knows none."""
    return text if tokenizer.knows("\r") else text.replace("\r\n", "\n")


def kind_of(name: str) -> str:
    """The kind of the tokenizer that the setting `tokenizer` names; UserError if it names none."""
    if name not in TOKENIZERS and not name.endswith(FILE):
        choices = ", ".join(TOKENIZERS)
        raise UserError(f"tokenizer must be one of {choices}, or the name of a tokenizer{FILE}, got {shown(name)}")
    return name if name in TOKENIZERS else "file"


def located(name: str) -> str:
    """The setting `tokenizer` as it is kept: of a file its whole path."""
    return str(Path(name).absolute()) if kind_of(name) == "file" else name


def make_tokenizer(kind: str, text: AnyText, split: int | None = None, vocab_size: int = BPE_SIZE) -> Tokenizer:
    """The tokenizer of a `kind` in TOKENIZERS for training on the first `split` characters of `text`: all of it has
    the characters of "char", the training part the `vocab_size` sub-words of "bpe"."""
    match kind:
        case "char":
            return CharTokenizer.from_text(text)
        case "byte":
            return ByteTokenizer()
        case "bpe":
            return learn_bpe(str(part(text, 0, len(text) if split is None else split)), vocab_size)
    raise UserError(f"unknown tokenizer {kind!r}; choose --tokenizer {' or '.join(TOKENIZERS)}")


def tokenizer_from_dict(d: object) -> Tokenizer:
    """The tokenizer that `to_dict` described; UserError for anything else."""
    try:
        match d:
            case {"kind": "char", "symbols": str(symbols)}:
                return CharTokenizer(symbols)
            case {"kind": "byte"}:
                return ByteTokenizer()
            case {"kind": "bpe" | "file" as kind, "json": str(text)}:
                return SubwordTokenizer(kind, text)
    except MissingLibraryError:
        raise
    except (ValueError, UserError):
        pass
    raise UserError(
        "the file's tokenizer is damaged or from a newer version: expected kind 'byte', 'char' with sorted distinct "
        f"symbols, or 'bpe' or 'file' with a tokenizer's JSON, got {reprlib.repr(d)}; "
        "use an intact file or a newer program"
    )


def _code_points(text: str, start: int = 0) -> np.ndarray:
    """uint32 code points of `text`, which begins at position `start` of a longer one."""
    return np.frombuffer(encoded(text, "utf-32-le", start=start), dtype="<u4")
