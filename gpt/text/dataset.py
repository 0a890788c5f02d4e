"""A text as tokens: its blocks for training and validation, and the losses that mere counting reaches."""

import hashlib
import json
import math
from dataclasses import dataclass
from functools import partial

import numpy as np

from gpt.errors import UserError
from gpt.text.kept import WORTH_IT, kept
from gpt.text.sources import Text
from gpt.text.stored import PIECE, AnyText, part, raw_pieces, raw_size
from gpt.text.tokenizers import Tokenizer

MAX_BIGRAM_VOCAB = 4096  # a table of counts of this width squared takes 128 MiB
MAX_TRIGRAM_VOCAB = 128  # and one of this width to the third 16


@dataclass(frozen=True, eq=False)
class Split:
    """The tokens of one part of a text, and the blocks of block_size inputs and targets in them."""

    tokens: np.ndarray  # 1-D, of the smallest of uint8, uint16, int32 that holds the vocabulary
    block_size: int
    record: int = 0  # n > 0: every n tokens are a record of their own, with one block at its start
    characters: int = 0  # of its text,
    text_bytes: int = 0  # and the bytes of that as UTF-8

    @property
    def num_blocks(self) -> int:
        """How many starts `block` accepts."""
        return len(self.tokens) // self.record if self.record else len(self.tokens) - self.block_size

    def bits_per_character(self, loss: float) -> float:
        """A loss in nats per token, in bits per character of this text: loss x tokens / characters / ln 2. Models with
        other tokenizers can be held against it."""
        return loss * len(self.tokens) / self.characters / math.log(2)

    def bits_per_byte(self, loss: float) -> float:
        """The same per byte of UTF-8: loss x tokens / bytes / ln 2."""
        return loss * len(self.tokens) / self.text_bytes / math.log(2)

    def first_tokens(self, starts: np.ndarray) -> np.ndarray:
        """Where in `tokens` the blocks of these numbers begin."""
        return np.asarray(starts) * (self.record or 1)

    def block(self, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs x and targets y, both int64 (B, block_size), y one token later, for `starts` int (B,)."""
        index = self.first_tokens(starts)[:, None] + np.arange(self.block_size)  # (B, T)
        return self.tokens[index].astype(np.int64), self.tokens[index + 1].astype(np.int64)


def random_starts(split: Split, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """`batch_size` starts for `split.block`, drawn uniformly, with replacement."""
    return rng.integers(split.num_blocks, size=batch_size)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A text as tokens, split for training and validation."""

    train: Split
    val: Split
    tokenizer: Tokenizer
    fingerprint: str  # sha256 of the text and of where it is split
    name: str


def split_at(text: Text, val_fraction: float) -> int:
    """The character at which the last `val_fraction` of `text` begins."""
    unit = text.record or 1
    # Rounded first, because 10 * (1 - 0.9) is 0.9999999999999998.
    return int(round(len(text.text) // unit * (1 - val_fraction), 6)) * unit


def make_dataset(text: Text, tokenizer: Tokenizer, block_size: int, val_fraction: float = 0.1) -> Dataset:
    """Split `text` at a character, its last `val_fraction` for validation, and encode the parts.

    UserError when a part is too short for one block. Records stay whole, with one token per character.
    """
    if text.record and (text.record <= block_size or len(text.text) % text.record):
        raise ValueError(f"expected whole records longer than {block_size}, got record={text.record}")
    if not 0 < val_fraction < 1:
        raise UserError(f"--val-fraction must lie between 0 and 1, got {val_fraction}; 0.1 is usual")
    boundary = split_at(text, val_fraction)
    vocab_size = tokenizer.vocab_size
    dtype = np.uint8 if vocab_size <= 2**8 else np.uint16 if vocab_size <= 2**16 else np.int32

    digest = hashlib.sha256(f"{boundary}\n".encode())
    for piece in raw_pieces(text.text):
        digest.update(piece)

    def make_split(which: str, characters: AnyText) -> Split:
        size, make = raw_size(characters), partial(tokenizer.encode, characters, dtype)
        if size < WORTH_IT:
            tokens = make()
        else:
            name = hashlib.sha256(json.dumps([digest.hexdigest(), which, tokenizer.to_dict()]).encode()).hexdigest()
            tokens = kept(name, np.dtype(dtype), vocab_size, make)
        if len(tokens) <= block_size:
            raise UserError(
                f"the {which} part of {text.name} has {len(tokens)} tokens, but a block of {block_size} needs "
                f"{block_size + 1}; use a smaller --block-size, a larger file or another --val-fraction"
            )
        return Split(tokens, block_size, text.record, len(characters), size)

    train = make_split("training", part(text.text, 0, boundary))
    val = make_split("validation", part(text.text, boundary, len(text.text)))
    return Dataset(train, val, tokenizer, digest.hexdigest(), text.name)


def optima(dataset: Dataset) -> dict[str, float | tuple[float, float]]:
    """Yardsticks for a loss, in nats per token: what one reaches by counting targets alone.

    "uniform" is ln V; "unigram", "bigram" and "trigram" are the (train, val) losses of the frequencies in training of
    tokens, pairs and triples. On train that is the optimum; for val each count is one more, of triples a tenth, lest
    the unseen cost infinity. Left out is what has too large a table: "bigram" above MAX_BIGRAM_VOCAB symbols, "trigram"
    above MAX_TRIGRAM_VOCAB, and in records, of which too much is at the beginning.
    """
    vocab_size = dataset.tokenizer.vocab_size
    result = {"uniform": math.log(vocab_size)}
    order = 3 if vocab_size <= MAX_TRIGRAM_VOCAB and not dataset.train.record else 2
    order = order if vocab_size <= MAX_BIGRAM_VOCAB else 1
    tables = zip(*(_counts_up_to(order, split, vocab_size) for split in (dataset.train, dataset.val)), strict=True)
    for (name, add), (seen, new) in zip((("unigram", 1), ("bigram", 1), ("trigram", 0.1)), tables, strict=False):
        result[name] = _cross_entropy(seen, seen, 0), _cross_entropy(new, seen, add)
    return result


def on_validation(counted: dict[str, float | tuple[float, float]]) -> dict[str, float]:
    """Of `optima` the losses on the validation text alone."""
    return {name: loss if isinstance(loss, float) else loss[1] for name, loss in counted.items()}


def _counts_up_to(order: int, split: Split, vocab_size: int) -> list[np.ndarray]:
    """The tables of `_counts` for one token, for two, ... and for `order` of them: the last is counted, and the others
    are its sums."""
    tables = [_counts(split, (vocab_size,) * order)]
    for n in range(order, 1, -1):
        shorter = tables[0].sum(axis=0)
        if n > 2:  # the first target with so few before it
            shorter[*split.tokens[: n - 1]] += 1
        tables.insert(0, shorter)
    return tables


def _counts(split: Split, shape: tuple[int, ...]) -> np.ndarray:
    """How often each token follows others in its record: shape (V,), (V, V) for how often it follows which, and so on.
    A piece at a time, for as indices of eight bytes the tokens would take many times the text's memory."""
    counts, before = np.zeros(shape, np.int64), max(1, len(shape) - 1)
    for start in range(0, len(split.tokens) - before, PIECE):
        tokens = split.tokens[start : start + PIECE + before].astype(np.int64)
        follows = tokens[before:]
        for distance in range(1, len(shape)):
            follows = follows + tokens[before - distance : -distance] * shape[0] ** distance
        if split.record:
            follows = follows[np.arange(start + 1, start + len(tokens)) % split.record != 0]
        counts += np.bincount(follows, minlength=counts.size).reshape(shape)
    return counts


def _cross_entropy(observed: np.ndarray, counts: np.ndarray, add: float) -> float:
    """Mean -ln p of the `observed` counts under p = (counts + add), normalised over the last axis."""
    seen = observed > 0
    n = observed[seen]
    totals = np.broadcast_to(counts.sum(axis=-1, keepdims=True), counts.shape)[seen] + add * counts.shape[-1]
    return float(n @ (np.log(totals) - np.log(counts[seen] + add)) / n.sum())
