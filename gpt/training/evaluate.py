"""The losses of a checkpoint over whole texts, and not a sample of their blocks: `train.py --eval-only`."""

import math
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gpt.device import Device
from gpt.errors import UserError
from gpt.models.language_model import LanguageModel
from gpt.terminal import say
from gpt.text.dataset import Split, make_dataset, optima
from gpt.text.sources import load_text
from gpt.training.run_folder import load_best
from tensorlite import no_grad


def evaluate_only(path: Path, data: str | list[str] | None, device: Device) -> int:
    """Print the losses over all of the training and all of the validation text, the run's own or those of `data`, with
    the losses reached by counting beside them."""
    path, checkpoint = load_best(path, "take a smaller model")
    gpt, train = checkpoint.config.gpt, checkpoint.config.train
    source, any_bytes = data or train.data, train.tokenizer == "byte"
    text = load_text(source, block_size=gpt.block_size, seed=train.seed, any_bytes=any_bytes)
    dataset = make_dataset(text, checkpoint.tokenizer, gpt.block_size, train.val_fraction)
    model = device.place(checkpoint.build_model(), train.model).eval()
    seen = dataset.fingerprint == checkpoint.fingerprint
    say(f"{path}: step {checkpoint.progress.step}")
    say(f"text: {text.name}, {'which it was trained on' if seen else 'which it was not trained on'}")
    counted = optima(dataset)
    for i, (name, split) in enumerate((("train", dataset.train), ("val", dataset.val))):
        loss, stderr = whole_loss(model, split)
        known = [f"{yardstick} {c if isinstance(c, float) else c[i]:.4f}" for yardstick, c in counted.items()]
        bits = f"{split.bits_per_character(loss):.3f} bits per character"
        say(f"{name} loss {loss:.4f} ± {stderr:.4f} ({bits}) over all {len(split.tokens):,} tokens; {', '.join(known)}")
    return 0


def losses_after(model: LanguageModel, split: Split, blocks: int = 256) -> dict[str, float]:
    """Of strings of a and b: the mean loss after an a, and after a b, in the first blocks of the split."""
    x, y = split.block(np.arange(min(blocks, split.num_blocks)))
    with no_grad():
        return {symbol: model(x, np.where(x == i, y, -100))[1].item() for i, symbol in enumerate("ab")}


def whole_loss(model: LanguageModel, split: Split) -> tuple[float, float]:
    """The mean loss over every target of the split, each in the one block that it lies in, and its standard error, if
    the blocks are independent of one another.

    Blocks follow one another; of the last one only what the others lack counts.
    """
    last = split.num_blocks - 1
    starts = np.arange(last + 1) if split.record else np.arange(0, last + 1, model.block_size)
    covered = (split.record or 1) * int(starts[-1]) + model.block_size
    rest = 0 if split.record else len(split.tokens) - 1 - covered  # targets after the last whole block
    losses, weights = [], []
    with no_grad(), np.errstate(all="ignore"):
        for start in tqdm(starts, unit="block", disable=not sys.stderr.isatty(), leave=False):
            losses.append(float(model(*split.block(np.array([start])))[1].data))
            weights.append(model.block_size)
        if rest:
            x, y = split.block(np.array([last]))
            y[:, :-rest] = -100
            losses.append(float(model(x, y)[1].data))
            weights.append(rest)
    weights = np.array(weights, float) / np.sum(weights)
    mean = float(weights @ losses)
    if not math.isfinite(mean):
        raise UserError(f"the loss is {mean}: take a checkpoint of a run that went well")
    return mean, float(np.sqrt(weights**2 @ (np.array(losses) - mean) ** 2))
