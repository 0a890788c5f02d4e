"""Text to sub-words and back, by the `tokenizers` library: byte pairs that are learnt here (Sennrich, Haddow and Birch,
2016, over bytes as for GPT-2), or whatever a tokenizer.json of Hugging Face's says.

The library runs in this thread alone: it would warn in every worker that is forked beside its threads.
"""

import contextlib
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from gpt.errors import MissingLibraryError, UserError
from gpt.files import explained, read_regular
from gpt.terminal import shortened
from gpt.text.stored import AnyText, part, with_bar
from gpt.text.utf8 import encoded

MAX_FILE = 2**25  # bytes of a tokenizer.json: the largest in use have 17 to 34 million
MAX_SIZE = 2**20  # sub-words to learn; the library sets aside memory for all of them, and ends the process without it
PIECE = 2**16  # characters that are encoded at a time
WINDOW, TRIES = 100, 20  # characters on each side of a cut that are looked at, and how many places are tried
WORD_END = re.compile(r"\S[ \r\n]")
# What is learnt from at a time: whole words, but for one longer than this, for which the library takes the square of
# its length in time.
LEARNT = re.compile(r".{1,1000}(?<=\S)(?=[ \r\n])|.{1,1000}", re.DOTALL)
SAMPLES, SAMPLE = 8, 1000  # pieces of a text that are tried, and their characters


class SubwordTokenizer:
    """A tokenizer of the library's, from its JSON. kind: "bpe" if it was learnt here, "file" if it came in a file.

    Byte pairs give every text back exactly; a file need not: see `changes`. UserError for a JSON that is none of the
    library's, wherever that shows.
    """

    def __init__(self, kind: str, json: str):
        self.kind = kind
        with _library_errors("this is no tokenizer of Hugging Face's"):
            self._library = _import_library().Tokenizer.from_str(json)
            self._library.no_padding()
            self._library.no_truncation()
            if getattr(self._library.model, "dropout", None):  # which would encode a text otherwise each time
                self._library.model.dropout = None
            self._json = self._library.to_str()
            ids = self._library.get_vocab(with_added_tokens=True).values()
        if not ids:
            raise UserError("this tokenizer has no tokens")
        self.vocab_size = max(ids) + 1  # there may be gaps

    def knows(self, character: str) -> bool:
        """Whether it comes back."""
        with contextlib.suppress(UserError):
            return self.decode(self.encode(character)) == character
        return False

    def encode(self, text: AnyText, dtype=np.int64) -> np.ndarray:
        """Tokens of `text`, without those that a tokenizer would put at its ends; UserError if there are none."""
        text = str(text)
        parts = [np.array(self._ids(piece), dtype) for piece in with_bar(self._pieces(text), len(text))]
        tokens = np.concatenate([np.empty(0, dtype), *parts])
        if text and not len(tokens):
            raise UserError(f"the tokenizer has no token for the text {shortened(repr(text[:50]))}: take another")
        return tokens

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of tokens `ids`, with U+FFFD for bytes that are no UTF-8."""
        with _library_errors("the tokenizer cannot decode its tokens"):
            return self._library.decode(np.asarray(ids, np.int64).ravel().tolist(), skip_special_tokens=False)

    def stream_decoder(self) -> Callable[..., str]:
        """decode(ids, final=False) -> the text that has become complete, as it goes on after a letter: some tokenizers
        leave out a space at the start. A character that could still be half of one waits."""
        shown, waiting = [], []
        with contextlib.suppress(UserError):
            shown = self.encode("a").tolist()

        def decode(ids, final=False):
            nonlocal shown, waiting
            waiting = waiting + np.asarray(ids, np.int64).ravel().tolist()
            text = self.decode(shown + waiting)[len(self.decode(shown)) :]
            if not text or (text.endswith("\ufffd") and not final):
                return ""
            shown, waiting = waiting, []
            return text

        return decode

    def to_dict(self) -> dict:
        """What `tokenizer_from_dict` needs, JSON-able."""
        return {"kind": self.kind, "json": self._json}

    def changes(self, text: AnyText) -> str:
        """What becomes of some piece of `text` that does not come back, in words; "" if all of those that are tried
        do."""
        for start in range(0, len(text), max(1, len(text) // SAMPLES)):
            piece = str(part(text, start, min(len(text), start + SAMPLE)))
            back = self.decode(self._ids(piece))
            if back != piece:
                at = len(os.path.commonprefix([piece, back]))
                there = slice(max(at - 10, 0), at + 20)
                return f"{piece[there]!r} comes back as {back[there]!r}"
        return ""

    def _ids(self, piece: str) -> list[int]:
        with _library_errors(f"the tokenizer cannot encode the text {shortened(repr(piece[:50]))}"):
            return self._library.encode_batch_fast([piece], add_special_tokens=False)[0].ids

    def _pieces(self, text: str) -> Iterator[str]:
        """`text` in pieces of PIECE characters or more, cut so that no token changes.

        A cut lies after a word. There GPT-2's pattern, ours too, always divides: white space begins what it finds and
        never ends it, and its one look ahead goes past white space alone, which no piece before a cut ends with. For
        any other tokenizer the tokens around a place tell, and one that changes what a text begins with leaves the text
        whole.
        """
        start = 0
        while start < len(text):
            ends = itertools.islice(WORD_END.finditer(text, start + PIECE), TRIES)
            end = next((found.start() + 1 for found in ends if self._divides(text, found.start() + 1)), len(text))
            encoded(text[start:end], "utf-8", start=start)  # which says what is wrong
            yield text[start:end]
            start = end

    def _divides(self, text: str, at: int) -> bool:
        left, right = text[max(at - WINDOW, 0) : at], text[at : at + WINDOW]
        return self._ids(left + right) == self._ids(left) + self._ids(right)


def learn_bpe(text: str, vocab_size: int) -> SubwordTokenizer:
    """The 256 bytes, and the `vocab_size` - 256 sub-words that are made by joining the most frequent neighbours in
    `text` one after the other, never over the end of a word. UserError if there are not as many."""
    if not 256 <= vocab_size <= MAX_SIZE:
        raise UserError(f"--vocab-size must be from 256, one for each byte, to {MAX_SIZE:,}, got {vocab_size:,}")
    library = _import_library()
    byte_level = library.pre_tokenizers.ByteLevel
    new = library.Tokenizer(library.models.BPE())
    new.pre_tokenizer = byte_level(add_prefix_space=False)
    new.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=sorted(byte_level.alphabet()), show_progress=False
    )
    pieces = (found[0] for found in LEARNT.finditer(text))
    new.train_from_iterator(with_bar(pieces, len(text)), trainer)
    found = new.get_vocab_size()
    if found < vocab_size:
        raise UserError(
            f"the training text gives {found:,} sub-words and no more: lower --vocab-size to that, "
            "or take a longer --data"
        )
    return SubwordTokenizer("bpe", new.to_str())


def read_tokenizer(path: str) -> SubwordTokenizer:
    """The tokenizer in a file of Hugging Face's. UserError for one that cannot be read, or is none."""
    with explained("read the tokenizer", path):
        raw = read_regular(path, MAX_FILE, follow=True)
    try:
        return SubwordTokenizer("file", raw.decode())
    except MissingLibraryError:
        raise
    except (UserError, UnicodeDecodeError) as error:
        raise UserError(f"cannot use {path}: {error}; give a tokenizer.json of Hugging Face's") from None


@contextlib.contextmanager
def _library_errors(what: str) -> Iterator[None]:
    """Within, whatever the library raises becomes a UserError. A panic of it is no Exception, and tells the standard
    error of the process, which leads nowhere meanwhile."""
    with contextlib.ExitStack() as after:
        with contextlib.suppress(OSError):  # there may be none
            after.callback(os.close, kept := os.dup(2))
            after.callback(os.dup2, kept, 2)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 2)
            os.close(nowhere)
        try:
            yield
        except BaseException as error:
            panic = type(error).__name__ == "PanicException"
            if isinstance(error, (UserError, MemoryError)) or not (panic or isinstance(error, Exception)):
                raise
            raise UserError(f"{what} ({shortened(str(error))})") from None


def _import_library():
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import tokenizers
    except ImportError:
        raise MissingLibraryError("this tokenizer", "tokenizers", "bpe") from None
    return tokenizers
