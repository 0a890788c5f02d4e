"""An encoder and a decoder that learn to write words backwards, from the blocks that a GPT is made of.

python docs/examples/reverse.py                                          half a minute on one core, then fresh words
python docs/examples/reverse.py --picture docs/img/cross-attention.svg   and a picture of where the decoder looks

docs/lessons/14-encoder-decoder.md walks through it.
"""

import io
import string
import time
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

import tensorlite as tl
from gpt.cli import Parser, run_script
from gpt.config import GPTConfig
from gpt.errors import MissingLibraryError, UserError
from gpt.files import atomic_write
from gpt.models.gpt import MLP, CausalSelfAttention
from gpt.terminal import say
from tensorlite import Tensor, nn, optim, random

SYMBOLS = "_<>" + string.ascii_lowercase  # padding, start, end; then the letters
PAD = SYMBOLS.index("_")
SHORTEST, LONGEST = 4, 12  # letters of a word
SHAPE = GPTConfig(vocab_size=len(SYMBOLS), block_size=LONGEST + 1, n_layer=1, n_head=1, n_embd=64)
# Of the tables at first: ten times a GPT's, so that a letter stays what is most of its position's features.
STD = 0.2
SEED, BATCH_SIZE, PEAK_RATE = 0, 64, 3e-3
FRESH = 1000  # words to judge by
SHOWN = "backwards"


def draw_words(rng, count: int) -> list[str]:
    """Random letters in words of random lengths, so that nothing but the order can be learned."""
    letters = list(string.ascii_lowercase)
    return ["".join(rng.choice(letters, length)) for length in rng.integers(SHORTEST, LONGEST + 1, count)]


def to_ids(words: list[str]) -> np.ndarray:
    """Ids (B, T): T is the length of the longest word, and shorter ones are filled up with PAD."""
    T = max(map(len, words))
    return np.array([[SYMBOLS.index(symbol) for symbol in word.ljust(T, "_")] for word in words])


class Attention(nn.Module):
    """The positions of x (B, T, C) look at those of memory (B, S, C) that the mask (B, 1, S) shows: (B, T, C)."""

    def __init__(self, config: GPTConfig):
        self.query, self.key, self.value, self.out = (nn.Linear(config.n_embd, config.n_embd) for _ in range(4))

    def forward(self, x, memory, mask) -> Tensor:
        q, k, v = self.query(x), self.key(memory), self.value(memory)
        return self.out(tl.scaled_dot_product_attention(q, k, v, attn_mask=mask))


class EncoderBlock(nn.Module):
    """Reads: every position sees the whole word, to its left and to its right, but no padding."""

    def __init__(self, config: GPTConfig):
        self.ln_1, self.attn = nn.LayerNorm(config.n_embd), Attention(config)
        self.ln_2, self.mlp = nn.LayerNorm(config.n_embd), MLP(config)

    def forward(self, x, mask) -> Tensor:
        h = self.ln_1(x)
        x = x + self.attn(h, h, mask)
        return x + self.mlp(self.ln_2(x))


class DecoderBlock(nn.Module):
    """Writes: every position sees what has been written up to it, and all of what the encoder has read."""

    def __init__(self, config: GPTConfig):
        self.ln_1, self.attn = nn.LayerNorm(config.n_embd), CausalSelfAttention(config)
        self.ln_2, self.cross = nn.LayerNorm(config.n_embd), Attention(config)
        self.ln_3, self.mlp = nn.LayerNorm(config.n_embd), MLP(config)

    def forward(self, y, memory, mask) -> Tensor:
        y = y + self.attn(self.ln_1(y))
        y = y + self.cross(self.ln_2(y), memory, mask)
        return y + self.mlp(self.ln_3(y))


class EncoderDecoder(nn.Module):
    """source ids (B, S), written ids (B, T) -> logits (B, T, V) of the symbol that follows each written one."""

    def __init__(self, config: GPTConfig):
        self.symbols = nn.Embedding(config.vocab_size, config.n_embd, std=STD)
        self.read_places = nn.Embedding(config.block_size, config.n_embd, std=STD)
        self.write_places = nn.Embedding(config.block_size, config.n_embd, std=STD)
        self.encoder, self.ln_memory = EncoderBlock(config), nn.LayerNorm(config.n_embd)
        self.decoder, self.ln_f = DecoderBlock(config), nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size)

    def embed(self, ids, places) -> Tensor:
        return self.symbols(ids) + places.weight[: ids.shape[1]]  # (B, T, C) + (T, C)

    def encode(self, source) -> tuple[Tensor, np.ndarray]:
        mask = (source != PAD)[:, None, :]  # (B, 1, S): the same for each query
        x = self.encoder(self.embed(source, self.read_places), mask)
        return self.ln_memory(x), mask

    def decode(self, written, memory, mask) -> Tensor:
        y = self.decoder(self.embed(written, self.write_places), memory, mask)
        return self.head(self.ln_f(y))

    def forward(self, source, written) -> Tensor:
        return self.decode(written, *self.encode(source))


def loss_on(model: EncoderDecoder, words: list[str]) -> Tensor:
    """The mean over all symbols but the padding, each predicted from the true ones before it (teacher forcing)."""
    source = to_ids([word + ">" for word in words])
    written = to_ids(["<" + word[::-1] for word in words])
    targets = to_ids([word[::-1] + ">" for word in words])  # what follows each of the written
    return tl.cross_entropy(model(source, written), targets, ignore_index=PAD)


@tl.no_grad()
def reverse(model: EncoderDecoder, words: list[str]) -> list[str]:
    """What the model writes by itself, each symbol the likeliest after its own ones before (greedy, free running)."""
    memory, mask = model.encode(to_ids([word + ">" for word in words]))  # once
    written = to_ids(["<"] * len(words))
    for _ in range(LONGEST + 1):
        logits = model.decode(written, memory, mask)[:, -1]  # (B, V)
        written = np.concatenate([written, logits.data.argmax(axis=-1)[:, None]], axis=1)
    texts = ["".join(SYMBOLS[i] for i in row[1:]) for row in written]
    return [text.partition(">")[0] for text in texts]


def train(model: EncoderDecoder, steps: int) -> set[str]:
    """AdamW with warm-up and cosine decay; the words that it has seen."""
    optimizer, seen, start = optim.AdamW(model.parameters()), set(), time.perf_counter()
    for step in range(steps):
        words = draw_words(random.generator(SEED, random.BATCHES, step), BATCH_SIZE)
        loss = loss_on(model, words)
        optimizer.zero_grad()
        loss.backward()
        optim.clip_grad_norm_(optimizer.flat, 1.0)
        optimizer.lr = optim.learning_rate(step, PEAK_RATE, warmup=min(100, steps // 4), decay=steps)
        optimizer.step()
        seen.update(words)
        if (step + 1) % 100 == 0:
            say(f"step {step + 1}: loss {loss:.4f}, {time.perf_counter() - start:.0f} s")
    return seen


def score(texts: list[str], words: list[str]) -> float:
    """The share of right symbols, the end of each word being one; what is written beyond it is wrong."""
    pairs = [(text + ">", word[::-1] + ">") for text, word in zip(texts, words, strict=True)]
    right = sum(ours == theirs for pair in pairs for ours, theirs in zip(*pair, strict=False))
    return right / sum(max(map(len, pair)) for pair in pairs)


@tl.no_grad()
def looks(model: EncoderDecoder, word: str) -> tuple[str, np.ndarray]:
    """What the model writes for a word, T symbols, and how much it looks at each of S symbols to write them: (T, S)."""
    text = (reverse(model, [word])[0] + ">")[: LONGEST + 1]  # one that has learned little may not have come to an end
    memory, mask = model.encode(to_ids([word + ">"]))
    y = model.embed(to_ids(["<" + text[:-1]]), model.write_places)
    block = model.decoder
    y = block.ln_2(y + block.attn(block.ln_1(y)))
    # Attention sums the values by its weights: with the identity for values that is the weights themselves.
    values = np.eye(len(word) + 1, dtype=memory.dtype)[None]
    weights = tl.scaled_dot_product_attention(block.cross.query(y), block.cross.key(memory), values, attn_mask=mask)
    return text, weights.data[0]


def looks_right(model: EncoderDecoder, words: list[str]) -> float:
    """The mean weight on the very letter that is to be written, which is on the anti-diagonal."""
    weights = [looks(model, word)[1][:, : len(word)] for word in words]
    return float(np.concatenate([np.fliplr(w).diagonal() for w in weights]).mean())


def draw(text: str, read: str, weights: np.ndarray, out: Path) -> None:
    """The weights as squares, the larger the darker, with the number in it from 0.05 on."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tensorlite", "font.size": 10}):
        figure = Figure(figsize=(5, 5), layout="constrained")
        axes = figure.subplots()
        axes.pcolormesh(weights, cmap="Greys", vmin=0, vmax=1, edgecolor="#dddddd", linewidth=0.5)
        for (t, s), weight in np.ndenumerate(weights):
            if weight >= 0.05:
                colour = "white" if weight > 0.5 else "black"
                axes.text(s + 0.5, t + 0.5, f"{weight:.2f}", color=colour, size="small", ha="center", va="center")
        axes.set(xticks=np.arange(len(read)) + 0.5, xticklabels=read, xlabel="symbols that were read (keys)")
        axes.set(yticks=np.arange(len(text)) + 0.5, yticklabels=text, ylabel="the symbol to be written (queries)")
        axes.set_aspect("equal")
        axes.invert_yaxis()
        axes.xaxis.tick_top()
        axes.xaxis.set_label_position("top")
        axes.tick_params(length=0)
        picture = io.BytesIO()
        figure.savefig(picture, format="svg", metadata=dict.fromkeys(("Date", "Creator")))
    atomic_write(out, picture.getvalue())


def check_picture(out: Path) -> None:
    """UserError, before there is anything to lose, for what could not be drawn or written."""
    if out.suffix != ".svg":
        raise UserError(f"--picture must end in .svg, got {out}")
    if not out.parent.is_dir():
        raise UserError(f"there is no folder {out.parent} for the picture: make it, or choose another")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingLibraryError("the picture", "matplotlib", "plot") from None


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--steps", type=int, default=800, help="to train for (default: 800)")
    parser.add_argument("--picture", type=Path, metavar="FILE", help=f"an .svg of where it looks to reverse '{SHOWN}'")
    args = parser.parse_args()
    if args.steps < 1:
        raise UserError(f"--steps must be at least 1, got {args.steps}")
    if args.picture:
        check_picture(args.picture)
    with random.scope(SEED):
        model = EncoderDecoder(SHAPE)
    say(f"{model.num_parameters():,} parameters")
    with threadpool_limits(1, user_api="blas"):  # products this small are done before two cores have agreed on them
        seen = train(model, args.steps)
        fresh = [word for word in draw_words(random.generator(SEED, random.EVALUATION), FRESH) if word not in seen]
        texts, looking = reverse(model, fresh), looks_right(model, fresh[:100])
    for word, text in zip(fresh[:4], texts, strict=False):
        say(f"{word} -> {text}")
    say(f"{len(fresh)} words never seen: {score(texts, fresh):.2%} of the symbols right")
    say(f"the share of the attention that is on the letter to be written: {looking:.3f}")
    if args.picture:
        text, weights = looks(model, SHOWN)
        draw(text, SHOWN + ">", weights, args.picture)
    return 0


if __name__ == "__main__":
    run_script(main, "train with fewer words at a time")
