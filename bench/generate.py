"""Tokens per second of generation, with the key/value cache and without it, against PyTorch with a cache of its own.

    python bench/generate.py
    python bench/generate.py --preset shakespeare-char --batch 4 --json bench/results/generate.json

Both sides have the same weights, follow the same rule when the context is full, draw each token from the softmax of its
scores, and take turns in processes of their own. A turn is a number of whole cycles, from one cut of the context to the
next, so that short and long contexts count alike. Without the cache there is one turn only: it is slow.
"""

import argparse
import statistics
from itertools import islice

import numpy as np
from machine import write_results
from turns import ask, comparison_parser, preset_config, serve, start_worker, stop, time_calls

SIDES = ("cached", "uncached", "torch")


def main() -> None:
    args = parse_arguments()
    if args.worker:
        serve(make_turn(args))
        return
    rows = [compare(preset, args) for preset in args.preset]
    write_results(args.json, results=rows)


def parse_arguments() -> argparse.Namespace:
    parser = comparison_parser(__doc__, SIDES, ["little-shakespeare", "shakespeare-char"])
    parser.add_argument("--batch", type=int, default=1, help="sequences at a time (default: %(default)s)")
    return parser.parse_args()


def compare(preset: str, args: argparse.Namespace) -> dict:
    """Run the sides in turns and print the table's row."""
    options = ("--preset", preset, "--batch", args.batch, "--threads", args.threads)
    workers = {side: start_worker("--worker", side, *options) for side in SIDES}
    speeds = {side: [] for side in SIDES}
    for _ in range(args.rounds):
        for side in ("cached", "torch"):
            speeds[side].append(ask(workers[side], args.seconds)["tokens_per_s"])
    speeds["uncached"].append(ask(workers["uncached"], args.seconds)["tokens_per_s"])
    for worker in workers.values():
        stop(worker)
    ratios = [ours / torch for ours, torch in zip(speeds["cached"], speeds["torch"], strict=True)]
    row = {"preset": preset, "batch": args.batch, "threads": args.threads}
    row |= {f"{side}_tokens_per_s": round(statistics.median(speeds[side]), 1) for side in SIDES}
    row |= {"ratio": round(statistics.median(ratios), 3), "ratios": [round(r, 3) for r in ratios]}
    print_row(row)
    return row


def print_row(row: dict) -> None:
    cached, uncached, torch = (row[f"{side}_tokens_per_s"] for side in SIDES)
    print(
        f"{row['preset']}, batch {row['batch']}, {row['threads']} threads, tokens per second\n"
        f"  with the cache    {cached:9.1f}\n"
        f"  without           {uncached:9.1f}   the cache makes it {cached / uncached:.1f}x as fast\n"
        f"  torch, its cache  {torch:9.1f}   "
        f"ours has {row['ratio']:.2f}x its speed (rounds: {min(row['ratios']):.2f} to {max(row['ratios']):.2f})",
        flush=True,
    )


def make_turn(args: argparse.Namespace):
    """What a worker does in its turn: whole cycles of generation, for about the seconds it is given."""
    shape = preset_config(args.preset[0]).gpt
    kept = max(shape.block_size // 2, 1)
    cycle = shape.block_size + 1 - kept  # tokens from one cut of the context to the next
    tokens = {"torch": torch_tokens, "cached": our_tokens, "uncached": our_tokens}[args.worker](shape, kept, args)

    def generate_cycle():
        return list(islice(tokens, cycle))

    if args.worker != "uncached":  # warm up; that one takes seconds
        generate_cycle()

    def turn(seconds: float) -> dict:
        times = time_calls(generate_cycle, seconds)
        return {"tokens_per_s": args.batch * cycle * len(times) / sum(times)}

    return turn


def our_tokens(shape, kept: int, args: argparse.Namespace):
    from threadpoolctl import threadpool_limits

    from gpt.generate import sample_tokens
    from gpt.models.kinds import build_model

    threadpool_limits(args.threads, user_api="blas")
    prompt = np.zeros((args.batch, kept), np.int64)
    model = build_model("gpt", shape, seed=0).eval()
    return sample_tokens(model, prompt, 10**9, use_cache=args.worker == "cached")


def torch_tokens(shape, kept: int, args: argparse.Namespace):
    import torch
    from torch_gpt import TorchGPT

    from gpt.models.kinds import build_model

    torch.set_num_threads(args.threads)
    model = TorchGPT(shape).eval()
    weights = build_model("gpt", shape, seed=0).state_dict()
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    return model.sample_tokens(torch.zeros((args.batch, kept), dtype=torch.int64))


if __name__ == "__main__":
    main()
