"""Tokens of large texts, kept in the cache folder: the next run over the same text maps them instead of making them."""

import contextlib
import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gpt.errors import UserError
from gpt.files import atomic_write, cache_folder

WORTH_IT = 2**26  # bytes of a text; smaller ones are encoded in a second or two
MOST_KEPT = 4  # files; those that were used last


def kept(name: str, dtype: np.dtype, vocab_size: int, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The tokens under this name, which stands for text and tokenizer: those that are kept, or what make() gives, which
    is kept if that can be. They are mapped, and not to be written into."""
    try:
        folder = cache_folder() / "tokens"
    except RuntimeError:  # of a user without a name or a home
        return make()
    path = folder / f"{name}.npy"
    if (found := _mapped(path, dtype, vocab_size)) is not None:
        with contextlib.suppress(OSError):
            os.utime(path)  # so that it is not the next to go
        return found
    tokens, header = make(), io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(tokens))
    with contextlib.suppress(OSError, UserError):  # no room for it, say
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(path, header.getvalue(), tokens)
        _drop_oldest(folder)
        return _mapped(path, dtype, vocab_size)
    return tokens


def _mapped(path: Path, dtype: np.dtype, vocab_size: int) -> np.ndarray | None:
    """What a file holds; None if there is none, or it is not what was written there."""
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    fits = isinstance(tokens, np.ndarray) and tokens.ndim == 1 and tokens.dtype == dtype
    return tokens if fits and len(tokens) and tokens.min() >= 0 and tokens.max() < vocab_size else None


def _drop_oldest(folder: Path) -> None:
    files = sorted(folder.glob("*.npy"), key=lambda path: path.stat().st_mtime)
    for path in files[:-MOST_KEPT]:
        path.unlink()
