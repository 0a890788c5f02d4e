"""Show what a model looks at in a text, and what surprises it, as a page for a browser.

python -m gpt.attention --text FILE                              with the newest run in runs/
python -m gpt.attention runs/mine --text FILE --out page.html
python sample.py --attention page.html                           of a sample: the prompt, and what was drawn
"""

import base64
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

import tensorlite as tl
from gpt.checkpoint import Checkpoint
from gpt.cli import Parser, run_script
from gpt.errors import UserError
from gpt.files import atomic_write, explained, read_regular, try_write
from gpt.models.kinds import MODEL_KINDS
from gpt.models.shape import GPTConfig
from gpt.terminal import printable, say
from gpt.text.tokenizers import with_known_line_ends
from gpt.training.initial import load_model
from tensorlite.tools import watch
from tensorlite.tools.page import render

TEMPLATE = Path(__file__).with_name("attention.html")
MOST_TEXT = 2**24  # bytes of a file
MOST_WEIGHTS = 3 * 2**20  # of all heads together: each is a byte, and four thirds of one on the page
LIKELIEST = 5
PLAIN = 0.5  # the share of a head's attention that names its pattern,
EVEN = 2  # which must be so many times what the same attention, spread evenly, would leave there
FEW = 4  # the tokens at the start, which have few places to look at; and as many must remain
Drawn = tuple[int, np.ndarray | None]  # a token, and the logits (V,) that it was drawn by


def main() -> int:
    parser = Parser(prog="python -m gpt.attention", description=__doc__)
    option = parser.add_argument
    option("run", nargs="?", type=Path, metavar="RUN", help="a run's folder, or a checkpoint (default: the newest run)")
    option("--text", type=Path, required=True, metavar="FILE", help="what to read; for a byte model any file")
    option("--out", type=Path, default=Path("attention.html"), metavar="FILE", help="(default: %(default)s)")
    args = parser.parse_args()
    try_write(args.out)
    path, checkpoint = load_model(args.run)
    check_attention(checkpoint)
    ids = checkpoint.tokenizer.encode(_read_text(args.text, checkpoint.tokenizer))
    note = write_page(args.out, checkpoint, checkpoint.build_model(), ids, about=[str(path), args.text.name])
    say(f"written: {args.out}{note and f', {note}'}")
    return 0


def check_attention(checkpoint: Checkpoint) -> None:
    """UserError for a model that looks at nothing, or whose heads do so each by itself."""
    kind = MODEL_KINDS[checkpoint.config.train.model]
    if not kind.packed:
        raise UserError(f"the page reads a GPT's heads, which are computed at once, and not those of a {kind.noun}")
    if not kind.num_layers(checkpoint.config.gpt):
        raise UserError(f"a {kind.noun} has no attention to show: take a run of another preset")


def most_tokens(shape: GPTConfig) -> int:
    """How many tokens a page shows at most: those that the model reads at a time, and whose weights it can hold."""
    weights = MOST_WEIGHTS // (shape.n_layer * shape.n_head)  # T (T + 1) / 2 of each head
    return min(shape.block_size, max(1, (math.isqrt(8 * weights + 1) - 1) // 2))


def remembering(drawn: list[Drawn], checkpoint: Checkpoint) -> Callable[[Iterator], Iterator]:
    """What the draws of `gpt.generate.draw` can pass through: those of the first sequence go to `drawn` too, with the
    logits of as many as a page can show. UserError for a model that has no attention."""
    check_attention(checkpoint)
    most = most_tokens(checkpoint.config.gpt)  # of which one was given; and one comes after them

    def through(draws):
        for new, logits in draws:
            drawn.append((int(new[0]), logits[0].copy() if len(drawn) < most else None))
            yield new, logits

    return through


def write_page(
    out: Path,
    checkpoint: Checkpoint,
    model,
    given: Sequence[int],
    drawn: Sequence[Drawn] = (),
    about: Sequence[str] = (),
) -> str:
    """Write the page of a checkpoint's model, wherever that is computed, about tokens that were given and those that
    were drawn after them: see `remembering`. A sentence if it is about a part of them, else "".

    about: what the page says of where they come from.
    """
    shape, total = checkpoint.config.gpt, len(given) + len(drawn)
    part, note = shown_part(shape, len(given), total), ""
    if len(part) < total:
        whole = len(part) == shape.block_size
        why = f"the model reads {shape.block_size:,} at a time" if whole else "more would make the page too large"
        note = f"tokens {part.start + 1:,} to {part.stop:,} of {total:,}: {why}"
    facts = [printable(text) for text in (*about, note) if text]
    page = render(TEMPLATE, "Attention", page_data(model.eval(), checkpoint.tokenizer, given, drawn) | {"facts": facts})
    atomic_write(out, page)
    return note


def shown_part(shape: GPTConfig, given: int, total: int) -> range:
    """Which of `total` tokens a page is about: the last ones; of a sample the first ones, if as much of it as of the
    prompt can be seen."""
    most = most_tokens(shape)
    stop = min(total, max(most, given + most // 2))
    return range(max(0, stop - most), stop)


def page_data(model, tokenizer, given: Sequence[int], drawn: Sequence[Drawn] = ()) -> dict:
    """All that the page's script needs to know of them: see attention.html."""
    part = shown_part(model.config, len(given), len(given) + len(drawn))
    ids = np.concatenate([given, np.array([token for token, _ in drawn], np.int64)])[part.start : part.stop]  # (T,)
    logits, weights = look(model, ids)
    first = len(given) - part.start  # of those that were drawn: they keep what they were drawn by
    for at, (_, scores) in enumerate(drawn[: len(ids) - first + 1], first - 1):
        logits[at] = scores
    losses, likeliest = guesses(logits, ids)
    n_layer, n_head, T, _ = weights.shape
    lower = weights[:, :, *np.tril_indices(T)]  # row after row
    plain = [[plain_pattern(head, ids) for head in layer] for layer in weights]
    known = {*ids.tolist(), *(token for row in likeliest for token, _ in row)}
    return {
        "layers": n_layer,
        "heads": n_head,
        "symbols": model.vocab_size,
        "ids": ids.tolist(),
        "texts": _texts(tokenizer, ids),
        "names": {token: _name(tokenizer, token) for token in sorted(known)},
        "first": min(first, T),
        "losses": losses,
        "likeliest": likeliest,
        "patterns": plain,
        "plain": PLAIN,
        "weights": base64.b64encode(np.rint(255 * np.sqrt(lower)).astype(np.uint8).tobytes()).decode(),
    }


def look(model, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the model computes when it reads ids (T,), on the host: logits (T, V) in float64, and the attention weights
    (n_layer, n_head, T, T), [..., i, j] from token i to token j. They are of the very pass, whose queries and keys are
    watched. UserError if it comes to no numbers."""
    projections = {}

    def keep(seen, result):
        if seen.path.endswith(".attn.c_attn"):
            projections[seen.path] = result

    with watch(model, on_result=keep), np.errstate(all="ignore"):
        logits = model(ids[None])[0].numpy()[0].astype(np.float64)
        weights = [attention_weights(qkv, model.config.n_head).numpy()[0] for qkv in projections.values()]
    if not np.isfinite(logits).all():
        raise UserError("the model's logits are not finite: take a checkpoint of a run that went well")
    return logits, np.array(weights)


def attention_weights(qkv, n_head: int) -> tl.Tensor:
    """The weights (B, n_head, T, T) in float32 that `tl.self_attention` gathers values by: qkv (B, T, 3 C)."""
    B, T, C = *qkv.shape[:2], qkv.shape[2] // 3
    q, k, _ = tl.cast(qkv.detach(), "float32").reshape(B, T, 3, n_head, C // n_head).permute(2, 0, 3, 1, 4)
    future = ~np.tri(T, dtype=bool)
    scores = (q @ k.transpose(-1, -2)).numpy() / math.sqrt(C // n_head)
    return tl.softmax(np.where(future, -np.inf, scores))


def guesses(logits: np.ndarray, ids: np.ndarray) -> tuple[list, list]:
    """logits (T, V), ids (T,) -> the loss of each token in nats, None for the first, of which there was no guess; and
    the likeliest tokens with their probabilities in its place, and in the place after the last one."""
    log_p = tl.log_softmax(logits).numpy()
    losses = -log_p[np.arange(len(ids) - 1), ids[1:]]
    most = min(LIKELIEST, logits.shape[1])
    top = np.argpartition(-log_p, most - 1)[:, :most]
    rows = [sorted(((int(i), float(f"{np.exp(row[i]):.4g}")) for i in found), key=lambda pair: (-pair[1], pair[0]))
            for row, found in zip(log_p, top, strict=True)]  # fmt: skip
    return [None, *(float(f"{loss:.4g}") for loss in losses)], [[], *rows]


def plain_pattern(weights: np.ndarray, ids: np.ndarray) -> tuple[str, float] | None:
    """What a head looks at, and the share of its attention that goes there, if it is plain: weights (T, T), ids (T,).

    The share is the mean over all tokens but the first FEW that have such a place.
    """
    i, j = np.indices(weights.shape)
    places = {
        "previous token": j == i - 1,
        "first token": j == 0,
        "itself": j == i,
        "same token": (ids[:, None] == ids) & (j < i),
    }
    found = []
    for name, there in places.items():
        rows = np.flatnonzero(there.any(1) & (np.arange(len(ids)) >= FEW))
        if len(rows) >= FEW:
            share = float((weights * there)[rows].sum(1).mean())
            even = float((there.sum(1) / np.arange(1, len(ids) + 1))[rows].mean())
            found += [(round(share, 3), name)] * (share >= max(PLAIN, EVEN * even))
    return max(found)[::-1] if found else None


def _texts(tokenizer, ids) -> list[str]:
    """What each token adds to the text: a character of several tokens stands at its last one, the others have their own
    names."""
    decode = tokenizer.stream_decoder()
    return [_visible(decode([token])) or _name(tokenizer, token) for token in ids]


def _name(tokenizer, token: int) -> str:
    """What a token is by itself: its number if that is no text, for it is a part of a character, say."""
    text = tokenizer.stream_decoder()([token], final=True)
    return _visible(text) if text.strip("\ufffd") else f"#{token}"


def _visible(text: str) -> str:
    """`text` with an escape for each byte that is no UTF-8 and each control character but new lines and tabs."""
    return printable(text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"), keep="\n\t")


def _read_text(path: Path, tokenizer) -> str:
    """The text in a file, with a lone surrogate for each byte that is no UTF-8, which a tokenizer refuses unless it is
    one of bytes."""
    with explained("read the text", path):
        text = read_regular(path, MOST_TEXT, follow=True).decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    if not text:
        raise UserError(f"{path} is empty: give a file with text")
    return with_known_line_ends(text, tokenizer)


if __name__ == "__main__":
    run_script(main, "take a smaller model")
