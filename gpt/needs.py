"""What a run needs of the memory at its peak, part by part, counted before it begins from what the ops keep.

`python bench/memory.py` holds the CPU's figures against whole runs. The GPU's are derived from the code in the same
way, and no GPU has measured them: a test holds them against the arrays that the same code has over its stand-in.
"""

from dataclasses import asdict, dataclass, replace

from gpt.config import Config
from gpt.models.kinds import MODEL_KINDS
from gpt.models.shape import GPTConfig
from gpt.text.dataset import MAX_BIGRAM_VOCAB, MAX_TRIGRAM_VOCAB
from gpt.text.stored import PIECE
from gpt.text.tokenizers import kind_of

# Bytes, measured on Linux: an interpreter with NumPy and this package, about a third of it the libraries' code; what a
# worker writes of its caller's pages, which so become its own; and, not measured, what CUDA itself takes of a GPU.
LIBRARIES, WORKER, CUDA = 46 << 20, 9 << 20, 400 << 20
# Of Python's objects: of a layer, of its graph in each worker, of a micro-batch there, of a sample; of an evaluation's
# batch, two losses and what their mean is made of.
LAYER, GRAPH, MICRO_BATCH, SAMPLE, EVALUATION = 4500, 9000, 150, 1000, 40
SAMPLE_TOKENS = 500  # of the sample that a run ends with
FLASH_HEADS = (32, 64, 128)  # channels of a head for which there are kernels, in bfloat16
# Of a feed-forward layer that is four times as wide inside:
KEPT = {"relu": 4, "gelu": 8, "gelu_tanh": 8}  # arrays (B, T, C) that it keeps for the way back:
# its product's input and, but for relu, of which that is all, the slope or on a GPU gelu's input;
FORWARD = {"relu": 9, "gelu": 17, "gelu_tanh": 25}  # those of its activation at work, with the residual stream;
BACKWARD = {"relu": 9, "gelu": 5, "gelu_tanh": 5}  # and those it takes on the way back beside what is kept


@dataclass(frozen=True)
class Needs:
    """Bytes at the peak of a run. Each of the `workers` has its own activations and indices."""

    libraries: int  # the interpreter's and theirs; or CUDA's
    text: int  # its tokens, and what reading it takes more than all that comes after
    weights: int
    gradients: int
    moments: int
    workers: int
    activations: int  # of a micro-batch, and what else is there with them on the way forward and back
    indices: int  # of the tokens of a step
    objects: int  # Python's
    evaluation: int  # its losses: its activations are fewer than those of a step, and take their place
    between: int  # what the first worker needs between steps, to count the text, save and sample, beyond activations

    @property
    def total(self) -> int:
        parts = asdict(self)
        workers = parts.pop("workers")
        return sum(parts.values()) + (workers - 1) * (self.activations + self.indices)


def run_needs(config: Config, gpu: bool = False, workers: int = 1, text: int = 0, dtype: str = "float32") -> Needs:
    """What training takes of the machine's memory, or of the GPU's, when it begins anew: one that is resumed holds the
    checkpoint too, before its first step.

    workers: at most; each has a micro-batch at least. text: its characters, where they are known. dtype: of
    activations.
    """
    shape, train = config.gpt, config.train
    kind, rows = MODEL_KINDS[train.model], train.batch_size * train.gradient_accumulation_steps
    size = min((0 if gpu else train.micro_batch_size) or train.batch_size, rows)
    micro_batches, layers, tokens = -(-rows // size), kind.num_layers(shape), rows * shape.block_size
    workers = 1 if gpu else min(workers, micro_batches)
    weights, activations = 4 * kind.num_parameters(shape), micro_batch_needs(config, size, gpu, dtype)
    counting = _counting(shape.vocab_size, int((1 - train.val_fraction) * text))
    between = 0 if gpu else max(counting, _saving(config), sampling_needs(config, 1, 1))
    character, token = _character_bytes(config)
    needs = Needs(
        libraries=CUDA if gpu else LIBRARIES + (workers - 1) * WORKER,
        text=token * text,
        weights=weights,
        gradients=weights,
        moments=2 * weights,
        workers=workers,
        activations=activations,
        # x and y, and before there are activations two indices of eight bytes and the tokens as they lie there.
        indices=max(16 * tokens, 33 * tokens - activations),
        objects=0 if gpu else layers * (LAYER + workers * GRAPH) + workers * MICRO_BATCH * micro_batches,
        evaluation=EVALUATION * train.eval_iters,
        between=max(0, between - activations),
    )
    if gpu:
        return needs
    # What is made of a piece of it on the way; sub-words are made of the whole, in two parts.
    reading = 17 * min(PIECE, text)
    if kind_of(train.tokenizer) in ("bpe", "file"):
        reading += int((2 - train.val_fraction) * character * text)
    later = needs.total - needs.libraries - needs.text
    return Needs(**asdict(needs) | {"text": needs.text + max(0, reading - later)})


def sampling_needs(config: Config, samples: int, read: int, tokens: int = SAMPLE_TOKENS) -> int:
    """Bytes to sample from a checkpoint, without the libraries: its weights, a copy of them that is quick to read, keys
    and values, and scores.

    read: tokens that are read at a time, such as the prompt's; tokens: what is kept of each sample.
    """
    kind = MODEL_KINDS[config.train.model]
    shape = kind.shape(config.gpt)
    C, V, layers = shape.n_embd, shape.vocab_size, kind.num_layers(shape)  # noqa: N806
    read = min(read if kind.packed else max(read, tokens), shape.block_size)
    heads, cached = (shape.n_head, layers) if kind.packed else (1, 0)
    width = max(FORWARD[shape.activation] * C, 5 * C + heads * read // 2) if layers else 2 * V
    linears = kind.weights * cached * C * C + V * C if cached else 0
    each = SAMPLE + 8 * cached * shape.block_size * C + 24 * V + 4 * read * width + 8 * tokens
    return 4 * (kind.num_parameters(shape) + linears) + samples * each


def micro_batch_needs(config: Config, rows: int, gpu: bool = False, dtype: str = "float32") -> int:
    """Bytes at the peak of a micro-batch of so many rows, forward and backward, whichever op has it."""
    kind = MODEL_KINDS[config.train.model]
    shape = kind.shape(config.gpt)
    layers = kind.num_layers(shape)
    n, C, V = rows * shape.block_size, shape.n_embd, shape.vocab_size  # noqa: N806
    size = 2 if dtype == "bfloat16" else 4
    logits, table = size * n * V, 4 * V * C
    if not layers:  # logits, or probabilities; their gradient; the table's
        return max(2 * logits, logits + 4 * V * V + (0 if gpu else logits + 8 * min(n, V) * V))
    x = size * n * C  # an array of the residual stream's shape
    scores, block = _attention(shape, rows, gpu, dtype)
    block = block if kind.packed else block // shape.n_head
    copied = 2 if dtype == "bfloat16" else 0  # bytes of a product's weight, which is rounded for it
    # What a layer keeps: two norms' normalised inputs and results, queries, keys and values, what attention gathers,
    # the feed-forward layer's, the masks of two dropouts, and numbers for each row.
    inner, dropped = KEPT[shape.activation] * kind.wide * x // 4, n * C * bool(shape.dropout)
    layer = kind.kept * x + inner + scores + 2 * dropped + 16 * n + copied * kind.weights * C * C
    kept, tied = layers * layer + dropped + copied * V * C, table * shape.tie_weights
    forward = (9 if gpu else FORWARD[shape.activation]) * kind.wide * x // 4
    backward = BACKWARD[shape.activation] * kind.wide * x // 4
    backward = max(backward, 5 * x + 4 * kind.wide * C * C)  # the product's gradient comes first
    peaks = {
        "feed-forward of the last layer": kept - inner + forward,
        "loss: logits and probabilities, or the latter and their gradient": kept + 2 * x + 2 * logits,
        "head, backward": kept + 3 * x + logits + table,
        "feed-forward of the last layer, backward": kept + backward + tied,
        "attention of the last layer, backward": kept - inner + 5 * x + 2 * block + tied,
        "token table, backward": 3 * x + table + 2 * tied,  # the head's gradient, this one's, and their sum
    }
    return max(peaks.values())


def _attention(shape: GPTConfig, rows: int, gpu: bool, dtype: str) -> tuple[int, int]:
    """Bytes of what attention keeps of its scores in a layer, and of the scores of one block of queries."""
    T, heads, dropout = shape.block_size, rows * shape.n_head, bool(shape.dropout)  # noqa: N806
    mask = heads * T * T * dropout  # on the CPU it is gone once it has been used, before there is as much of the rest
    if gpu and dtype == "bfloat16" and shape.n_embd // shape.n_head in FLASH_HEADS:
        return 4 * heads * T + mask, 2 * rows * T * shape.n_embd  # a number per query; half of gq's sums in float32
    if gpu:
        scores = (2 if dtype == "bfloat16" else 4) * heads * T * T
        return scores * (1 + dropout) + mask, scores
    queries = min(T, max(32, T // 8))  # of a block, which has the keys that its last query sees
    seen = sum(min(queries, T - start) * min(T, start + queries) for start in range(0, T, queries))
    return 4 * heads * seen * (1 + dropout), 4 * heads * queries * T


def _counting(vocab_size: int, text: int) -> int:
    """Bytes to count which tokens of a training text follow which: three arrays of indices of a piece of it and two
    tables, or three of these. That holds for texts that people write, in which few of all pairs occur."""
    order = 3 if vocab_size <= MAX_TRIGRAM_VOCAB else 2 if vocab_size <= MAX_BIGRAM_VOCAB else 1
    table = vocab_size**order
    return 8 * max(3 * min(PIECE, text) + 2 * table, 3 * table)


def _saving(config: Config) -> int:
    """Bytes of the copy of the weights that is saved, a tied table twice."""
    return 4 * MODEL_KINDS[config.train.model].num_parameters(replace(config.gpt, tie_weights=False))


def _character_bytes(config: Config) -> tuple[int, int]:
    """Bytes of a character of the text, at the least, and of its tokens: sub-words, of which most have two bytes, are
    taken to have two characters."""
    symbols = config.gpt.vocab_size
    if config.train.tokenizer != "char" or symbols <= 2**8:
        return 1, 1
    return 2, 2 if symbols <= 2**16 else 4
