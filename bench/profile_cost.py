"""What profiling costs, and whether the times it tells are those of a step that is not profiled.

The plain training step of one process, with and without `tensorlite.tools.profile` in turns, A B A B ...: the time that
passes, and for the profiled step the time that it says it took and what the profiler says that it took itself. The
figures are medians over the turns; a ratio is that of each pair of turns.
"""

import argparse
import sys
import time
from statistics import median

from threadpoolctl import threadpool_limits
from turns import preset_config

from gpt.models.kinds import build_model
from gpt.text.dataset import make_dataset
from gpt.text.sources import load_text
from gpt.text.tokenizers import make_tokenizer
from gpt.training.trainer import Trainer
from tensorlite.tools import profile


def make_trainer(preset: str) -> Trainer:
    text = load_text("pydoc", block_size=1, seed=0)
    tokenizer = make_tokenizer("char", text.text, len(text.text), 256)
    config = preset_config(preset).updated({"vocab_size": tokenizer.vocab_size})
    dataset = make_dataset(text, tokenizer, config.gpt.block_size, config.train.val_fraction)
    model = build_model(config.train.model, config.gpt, seed=0)
    return Trainer(model, dataset, config.train)


def turns(trainer: Trainer, rounds: int) -> list[tuple[float, float, float, float]]:
    """For each round the seconds of a plain step, of a profiled one, as that one tells them, and of the profiler."""
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        trainer.train_step()
        plain = time.perf_counter() - start
        with profile(trainer.model) as p:
            start = time.perf_counter()
            trainer.train_step()
            profiled = time.perf_counter() - start
        found.append((plain, profiled, p.spans[0].seconds, p.cost.seconds))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=["little-shakespeare", "nanogpt-cpu"])
    parser.add_argument("--rounds", type=int, default=100, help="steps of each kind (default: %(default)s)")
    args = parser.parse_args()
    for preset in args.preset:
        trainer = make_trainer(preset)
        trainer.flat.backend.tune_allocator()
        with threadpool_limits(1, user_api="blas"):
            turns(trainer, 2)
            found = turns(trainer, args.rounds)
        plain, profiled, told, cost = (1e3 * median(column) for column in zip(*found, strict=True))
        ratios = [median(row[i] / row[0] for row in found) for i in (1, 2)]
        print(f"{preset}: a step {plain:.2f} ms; profiled {profiled:.2f} ms ({ratios[0]:.2f}x), of which it says that"
              f" {told:.2f} ms ({ratios[1]:.2f}x) are the step's and {cost:.2f} ms its own")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
