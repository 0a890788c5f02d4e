"""Time one whole training step (forward, backward, clipping, AdamW) against PyTorch on the same model and batches.

    python bench/train_step.py --preset nanogpt-cpu
    python bench/train_step.py --preset little-shakespeare --compile --json bench/results/little.json

Both sides start from the same weights, run in processes of their own with the same number of threads, and take turns,
A B A B ...: each pair of turns gives one ratio. Other work on the machine then slows both alike. The floor is the time
of the step's matrix products alone at the speed of one-thread sgemm, measured in the same run, times the threads. The
memory is the most that a side, its own workers included, is seen to hold in a turn after the timed ones (Linux).
"""

import argparse
import statistics
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from machine import memory_mb, write_results
from turns import VOCAB_SIZE, ask, comparison_parser, preset_config, serve, start_worker, stop, time_calls

from gpt.config import Config
from gpt.tokenizer import ByteTokenizer

SIDES = ("ours", "torch")


def main() -> None:
    args = parse_arguments()
    if args.worker:
        step = {"ours": our_step, "torch": torch_step}[args.worker](
            preset_config(args.preset[0], dropout=args.dropout), args
        )
        for _ in range(2):  # warm up
            step()
        serve(lambda seconds: time_calls(step, seconds))
        return
    rows = [compare(preset, args) for preset in args.preset]
    write_results(args.json, results=rows)


def parse_arguments() -> argparse.Namespace:
    parser = comparison_parser(__doc__, SIDES, ["little-shakespeare", "nanogpt-cpu"])
    parser.add_argument("--dropout", type=float, help="instead of the preset's")
    parser.add_argument("--compile", action="store_true", help="compile the torch model with torch.compile")
    return parser.parse_args()


# -- the parent --


def compare(preset: str, args: argparse.Namespace) -> dict:
    """Run both sides in turns and print the table's row."""
    options = ["--preset", preset, "--threads", args.threads]
    options += ["--compile"] if args.compile else []
    options += [] if args.dropout is None else ["--dropout", args.dropout]
    workers = {side: start_worker("--worker", side, *options) for side in SIDES}
    times = {side: [] for side in SIDES}
    for _ in range(args.rounds):
        for side in SIDES:
            times[side].append(statistics.median(ask(workers[side], args.seconds)))
    memory = {side: peak_memory_mb(workers[side], args.seconds) for side in SIDES}
    for worker in workers.values():
        stop(worker)
    ratios = [t / o for o, t in zip(times["ours"], times["torch"], strict=True)]
    config = preset_config(preset, dropout=args.dropout)
    ours, torch = (1e3 * statistics.median(times[side]) for side in SIDES)
    floor = 1e3 * step_flops(config) / (sgemm_flops_per_second(config) * args.threads)
    row = {
        "preset": preset,
        "dropout": config.gpt.dropout,
        "rival": "torch.compile" if args.compile else "torch eager",
        "threads": args.threads,
        "ours_ms": round(ours, 2),
        "torch_ms": round(torch, 2),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(r, 3) for r in ratios],
        "ours_mb": round(memory["ours"]),
        "torch_mb": round(memory["torch"]),
        "floor_ms": round(floor, 2),
        "floor_share": round(floor / ours, 3),
    }
    print_row(row)
    return row


def print_row(row: dict) -> None:
    print(
        f"{row['preset']}, dropout {row['dropout']}, {row['threads']} threads, against {row['rival']}\n"
        f"  step      ours {row['ours_ms']:9.2f} ms   torch {row['torch_ms']:9.2f} ms   "
        f"{row['ratio']:.2f}x its speed (rounds: {min(row['ratios']):.2f} to {max(row['ratios']):.2f})\n"
        f"  memory    ours {row['ours_mb']:9.0f} MB   torch {row['torch_mb']:9.0f} MB   "
        f"{row['ours_mb'] / row['torch_mb']:.2f} of torch's\n"
        f"  floor     {row['floor_ms']:.2f} ms for the products alone: {row['floor_share']:.0%} of our step",
        flush=True,
    )


def peak_memory_mb(worker: subprocess.Popen, seconds: float) -> float:
    """The most memory that the worker and its own workers are seen to hold during a turn."""
    with ThreadPoolExecutor(1) as pool:
        turn, peak = pool.submit(ask, worker, seconds), 0.0
        while not turn.done():
            peak = max(peak, memory_mb(worker.pid))
            time.sleep(0.005)
    return peak


def step_flops(config: Config) -> float:
    """Floating-point operations of the matrix products of one step: 6 per weight and token (forward, and two products
    backward), and 12 per layer, channel and pair of positions for attention (full, not only its causal half)."""
    shape, train = config.gpt, config.train
    tokens = train.batch_size * train.gradient_accumulation_steps * shape.block_size
    weights = shape.n_layer * 12 * shape.n_embd**2 + shape.vocab_size * shape.n_embd
    attention = 12 * shape.n_layer * shape.n_embd * shape.block_size
    return tokens * (6.0 * weights + attention)


def sgemm_flops_per_second(config: Config) -> float:
    """Speed of one-thread sgemm at the shape of the model's largest product."""
    from threadpoolctl import threadpool_limits

    rows, width = 2048, config.gpt.n_embd
    a, b = np.ones((rows, width), np.float32), np.ones((width, 4 * width), np.float32)
    out = np.empty((rows, 4 * width), np.float32)
    times = []
    with threadpool_limits(1, user_api="blas"):
        for _ in range(30):
            start = time.perf_counter()
            np.matmul(a, b, out=out)
            times.append(time.perf_counter() - start)
    return 2.0 * rows * width * 4 * width / statistics.median(times)


# -- the workers --


def make_dataset(config: Config):
    """Random symbols: the speed does not depend on the text."""
    from gpt.data import Dataset, Split

    tokens = np.random.default_rng(0).integers(VOCAB_SIZE, size=100_000).astype(np.uint8)
    split = Split(tokens, config.gpt.block_size)
    return Dataset(split, split, ByteTokenizer(), "", "random")


def our_step(config: Config, args: argparse.Namespace):
    from gpt.model import build_model
    from gpt.trainer import Trainer

    model = build_model("gpt", config.gpt, config.train.seed)
    trainer = Trainer(model, make_dataset(config), config.train, args.threads).__enter__()
    return lambda: float(trainer.train_step()[0])


def torch_step(config: Config, args: argparse.Namespace):
    import torch
    from torch_gpt import TorchGPT

    from gpt.data import random_blocks
    from gpt.model import build_model
    from tensorlite import random
    from tensorlite.optim import learning_rate

    torch.set_num_threads(args.threads)
    shape, train, dataset = config.gpt, config.train, make_dataset(config)
    model = TorchGPT(shape)
    weights = build_model("gpt", shape, train.seed).state_dict()
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=(train.beta1, train.beta2))
    run, done = torch.compile(model) if args.compile else model, 0

    def step():
        nonlocal done
        rng = random.generator(train.seed, random.BATCHES, done)
        rows = train.batch_size * train.gradient_accumulation_steps
        x, y = (torch.from_numpy(a) for a in random_blocks(dataset.train, rows, rng))
        rate = learning_rate(done, train.learning_rate, train.warmup_iters, train.lr_decay_iters, train.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        _, loss = run(x, y)
        loss.backward()
        if train.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
        optimizer.step()
        done += 1
        return loss.item()

    return step


if __name__ == "__main__":
    main()
