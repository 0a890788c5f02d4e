"""Print what a checkpoint holds.

python -m gpt.inspect                            the best checkpoint of the newest run in runs/
python -m gpt.inspect runs/mine                  the best one of a run
python -m gpt.inspect runs/mine/last.safetensors
"""

from pathlib import Path

import numpy as np

from gpt.checkpoint import Checkpoint, load_checkpoint
from gpt.cli import Parser, run_script
from gpt.files import check_size
from gpt.models.kinds import MODEL_KINDS
from gpt.terminal import say, shortened
from gpt.text.tokenizers import readable
from gpt.training.run_folder import find_checkpoint


def main() -> int:
    parser = Parser(prog="python -m gpt.inspect", description=__doc__)
    parser.add_argument("path", nargs="?", type=Path, metavar="FILE_OR_RUN", help="(default: the newest run)")
    path = find_checkpoint(parser.parse_args().path)
    check_size(path, 1, "take a machine with more")
    checkpoint = load_checkpoint(path)
    for line in (str(path), *described(checkpoint), "", *parameters(checkpoint.weights)):
        say(line)
    return 0


def described(checkpoint: Checkpoint) -> list[str]:
    """All but the weights."""
    data = checkpoint.config.train.data
    config, tokenizer, progress = checkpoint.config, checkpoint.tokenizer, checkpoint.progress
    count = MODEL_KINDS[config.train.model].num_parameters(config.gpt)
    symbols = shortened(repr(tokenizer.symbols)) if tokenizer.kind == "char" else ""
    if tokenizer.kind in ("bpe", "file"):
        pieces = (repr(readable(tokenizer.decode([i]))) for i in range(tokenizer.vocab_size))
        symbols = shortened(" ".join(pieces))
    best = "none yet" if progress.best_val_loss is None else f"{progress.best_val_loss:.4f}"
    facts = {
        "model": f"{config.train.model}, {count:,} parameters",
        "tokenizer": f"{tokenizer.kind}, {tokenizer.vocab_size:,} symbols{': ' * bool(symbols)}{symbols}",
        "text": ", ".join(data) if isinstance(data, list) else data or "not named",
        "fingerprint": checkpoint.fingerprint,
        "progress": f"step {progress.step:,} of {config.train.max_iters:,}, {progress.seconds:.0f} seconds",
        "best val loss": f"{best}; last evaluated at step {progress.evaluated_step:,}",
        "optimiser": "its moments, to go on training" if checkpoint.optimizer else "nothing: it is for sampling only",
    }
    width = max(map(len, config.to_dict()))
    settings = [f"  {key:{width}}  {value}" for key, value in config.to_dict().items()]
    return [*(f"{key:14} {value}" for key, value in facts.items()), "configuration", *settings]


def parameters(weights: dict[str, np.ndarray]) -> list[str]:
    """A line for each array of weights; one that is another's too has its name instead of numbers."""
    width = max(len(name) for name in weights)
    lines = [f"{'parameter':{width}}  {'shape':>14} {'mean':>11} {'std':>11} {'largest |x|':>11}"]
    first: dict[int, str] = {}
    for name, x in weights.items():
        twin = first.setdefault(id(x), name)
        numbers = (x.mean(dtype=np.float64), x.std(dtype=np.float64), np.abs(x).max())
        values = " ".join(f"{value:11.4g}" for value in numbers) if twin == name else f"is {twin}"
        lines.append(f"{name:{width}}  {' x '.join(map(str, x.shape)):>14} {values}")
    return lines


if __name__ == "__main__":
    run_script(main, "take a smaller checkpoint")
