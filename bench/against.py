"""Compare this checkout's speed with another's, in turns: is a change slower?

    git worktree add ../before HEAD~1
    python bench/against.py ../before train_step --preset nanogpt-cpu
    python bench/against.py ../before generate --preset little-shakespeare --rounds 15

Each side is the script of its own checkout, which times our side alone. A ratio below 1: this checkout is faster.
"""

import statistics
from pathlib import Path

from turns import ROOT, ask, comparison_parser, start_worker, stop

SCRIPTS = {  # our side, and milliseconds of an answer
    "train_step": ("ours", lambda answer: 1e3 * statistics.median(answer["times"])),
    "generate": ("cached", lambda answer: 1e3 / answer["tokens_per_s"]),
}


def main() -> None:
    parser = comparison_parser(__doc__, (), ["little-shakespeare", "nanogpt-cpu"])
    parser.add_argument("before", type=Path, help="the other checkout")
    parser.add_argument("script", choices=SCRIPTS, help="what is timed: a training step, or a token")
    args = parser.parse_args()
    side, milliseconds = SCRIPTS[args.script]
    for preset in args.preset:
        options = ["--worker", side, "--preset", preset, "--threads", args.threads]
        roots = (args.before.resolve(), ROOT)
        workers = [start_worker(*options, script=f"{root}/bench/{args.script}.py") for root in roots]
        times = [[milliseconds(ask(worker, args.seconds)) for worker in workers] for _ in range(args.rounds)]
        for worker in workers:
            stop(worker)
        before, now = (statistics.median(side) for side in zip(*times, strict=True))
        ratios = [now / before for before, now in times]
        print(f"{args.script} {preset}: {before:.3f} ms before, {now:.3f} ms now", end="; ")
        print(f"{statistics.median(ratios):.3f} of it (rounds: {min(ratios):.3f} to {max(ratios):.3f})", flush=True)


if __name__ == "__main__":
    main()
