"""What to write instead of a name that is none of ours, and how to write a text in a shell's command."""

import difflib
import shlex
from collections.abc import Collection
from pathlib import PurePath

from gpt.terminal import printable

# What nanoGPT and other programs call a thing: our name for it, or a sentence where one name does not say it.
FOREIGN = {
    "always_save_checkpoint": "leave it out: the best and the last checkpoint are kept always",
    "compile": "leave it out: there is nothing to compile",
    "dataset": "data",
    "decay_lr": "--lr-decay-iters says when the rate has decayed, 0 for a constant one",
    "device": "--backend cupy computes on a GPU, --backend numpy on the CPU",
    "epochs": "max_iters",
    "eval_only": "--max-iters 0 evaluates and stops",
    "init_from": "train.py --init-from starts a run from weights, sample.py --model names a run",
    "log_interval": "leave it out: progress is shown all the time, losses at every --eval-interval",
    "lr": "learning_rate",
    "model": "a model comes with its preset, which needs no option: train.py bigram",
    "out_dir": "a run's folder is --out for train.py and --model for sample.py",
    "start": "prompt",
    "steps": "max_iters",
}
FOREIGN |= {
    f"wandb_{name}": "leave it out: log.jsonl in the run's folder has it" for name in ("log", "project", "run_name")
}
FOREIGN |= {name: f"it is the option --{name} of train.py" for name in ("backend", "dtype", "out", "resume", "threads")}


def instead_of(name: str, names: Collection[str], spell=repr) -> str:
    """What to add to the news that `name` is none of `names`, all with underscores; "" if nothing comes close.

    spell: how the name to write instead is shown.
    """
    ours = FOREIGN.get(name, "")
    if " " in ours:
        return f": {ours}"
    begun = [known for known in names if known.startswith(name)]
    close = [ours] if ours in names else begun or difflib.get_close_matches(name[:100], names, 1)
    return f"; did you mean {spell(close[0])}?" if close else ""


def as_option(name: str) -> str:
    """n_layer -> --n-layer."""
    return "--" + name.replace("_", "-")


def argument(name: str, value: object) -> str:
    """An option with its value as a shell takes them: --out 'my run'."""
    text = value.as_posix() if isinstance(value, PurePath) else str(value)  # a backslash would need quotes
    quoted = shlex.quote(text)
    if printable(text) != text:  # bash's form, in which our escapes are what they stand for
        quoted = "$'" + printable(text.replace("\\", "\\\\").replace("'", "\\'")) + "'"
    return f"{name}{'=' if text.startswith('-') else ' '}{quoted}"
