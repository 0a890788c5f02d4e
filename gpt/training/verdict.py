"""What to make of a run that is over, in two sentences: how good it became, and what kept it from becoming better."""

import math
from collections import Counter, defaultdict

import numpy as np

from gpt.text.dataset import on_validation

APART = 3.0  # standard errors
CLOSE = 0.05  # nats from the least loss: as good as learnt


def verdict(rows: list[dict], counted: dict, where: str) -> list[str]:
    """Sentences about the log's `rows`, each an evaluation; counted: what `gpt.text.dataset.optima` gives; where: the
    best checkpoint's place."""
    rows = [row for row in rows if None not in (row.get("val_loss"), row.get("train_loss"))]
    if not rows:  # of a log that was deleted meanwhile
        return []
    best = min(rows, key=lambda row: row["val_loss"])
    yardsticks = on_validation(counted).items()
    against = ", ".join(_beside(best["val_loss"], name, loss) for name, loss in yardsticks)
    error = best.get("val_stderr")
    error = "" if error is None else f" \u00b1 {error:.4f}"
    first = f"best val loss {best['val_loss']:.4f}{error} at step {best['step']}, {against}: {where}"
    return [first, _about_fitting(rows, best, counted)]


def overfit_verdict(rows: list[dict], floor: float) -> str:
    """Whether the one batch of --overfit was learnt; floor: see `entropy_given`."""
    losses = {row["step"]: row["train_loss"] for row in rows if row["train_loss"] is not None}
    learnt = [step for step, loss in losses.items() if loss <= floor + CLOSE]
    if learnt:
        return f"the batch was learnt: by step {learnt[0]} its loss was within {CLOSE} of the {floor:.4f} it can have"
    least = min(losses.values(), default=math.inf)
    return (
        f"the batch was not learnt: its loss came to {least:.4f}, and could be {floor:.4f}; more --max-iters, another "
        "--learning-rate, or a larger model"
    )


def entropy_given(x: np.ndarray, y: np.ndarray, context: int) -> float:
    """The least mean loss, in nats, of any model that sees at most `context` tokens of a row: that of the frequencies
    in this batch itself.  x, y: integers (B, T), y one token later."""
    seen: dict[bytes, Counter] = defaultdict(Counter)
    for row, targets in zip(x, y, strict=True):
        for t, target in enumerate(targets.tolist()):
            seen[row[max(0, t + 1 - context) : t + 1].tobytes()][target] += 1
    counts = [np.array([*counter.values()], float) for counter in seen.values()]
    return float(sum(n @ np.log(n.sum() / n) for n in counts) / y.size)


def _beside(loss: float, name: str, yardstick: float) -> str:
    difference = yardstick - loss
    return f"{abs(difference):.2f} {'below' if difference >= 0 else 'above'} {name}"


def _about_fitting(rows: list[dict], best: dict, counted: dict) -> str:
    """Whether the losses part ways, and since when."""
    if len(rows) < 3:
        return "for more than that there are too few evaluations: lower --eval-interval"
    errors = [math.hypot(row.get("train_stderr") or 0.0, row.get("val_stderr") or 0.0) for row in rows]
    gaps = [row["val_loss"] - row["train_loss"] - gaps_by_nature(counted) for row in rows]
    apart = [gap > APART * error for gap, error in zip(gaps, errors, strict=True)]
    since = len(apart) - (apart[::-1].index(False) if False in apart else len(apart))
    last = rows[-1]
    risen = last["val_loss"] - best["val_loss"]
    has_risen = risen > APART * (best.get("val_stderr") or 0.0)
    if has_risen and last["train_loss"] >= best["train_loss"]:
        return (
            f"since step {best['step']} both losses have risen, by {risen:.4f}: lower --learning-rate, or --grad-clip 1"
        )
    if has_risen:
        return (
            f"overfitting: since step {best['step']} the val loss has risen by {risen:.4f} while the train loss fell; "
            "try more text, a higher --dropout, a smaller model or fewer steps"
        )
    if since < len(rows):
        return (
            f"train and val loss part since step {rows[since]['step']}, by {gaps[-1]:.4f} in the end: more text or a "
            "higher --dropout would bring them together; the best may still lie ahead"
        )
    return "train and val loss stay together: a larger model or more steps may go lower"


def gaps_by_nature(counted: dict) -> float:
    """By how much the one split is harder to guess than the other for a table of counts, which hardly overfits."""
    train, val = counted.get("bigram") or counted.get("unigram") or (0.0, 0.0)
    return max(0.0, val - train)
