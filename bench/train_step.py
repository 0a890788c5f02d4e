"""Time one whole training step (forward, backward, clipping, AdamW) against PyTorch on the same model and batches.

    python bench/train_step.py --preset nanogpt-cpu
    python bench/train_step.py --preset little-shakespeare --compile --json bench/results/little.json
    python bench/train_step.py --preset shakespeare-char gpt2 --backend cupy --dtype bfloat16

Both sides start from the same weights, run in processes of their own, and take turns, A B A B ...: each pair of turns
gives one ratio. Other work on the machine then slows both alike.

On the CPU both have the same number of threads. The floor is the time of the step's matrix products alone at the speed
of one-thread sgemm, measured in the same run, times the threads. The memory is the most that a side, its own workers
included, is seen to hold in a turn after the timed ones (Linux).

On a GPU (--backend cupy) torch's side is nanoGPT's: autocast to bfloat16, or float32 with the same TF32 as ours, flash
attention, fused AdamW. On both sides the text lies on the device and a step is sent where its blocks begin, from which
it gathers them: nanoGPT's copy of whole batches from pinned memory would be a cost of torch's side alone. Neither side
reads a loss back: a turn is many steps between two waits for the device. The floor is the time of the step's matrix
products at the speed of a large square product of ours in the same precision, in turns with the rest; its share of our
step is the utilisation of the GPU by what the model needs. The memory is what the driver says a side took of the GPU
from its start to the end of its warm-up, without CUDA's own context: both sides keep what they ever took.
"""

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from machine import gpu_facts, memory_mb, write_results
from turns import (
    ask,
    comparison_parser,
    preset_config,
    serve,
    start_worker,
    stop,
    time_calls,
    time_queued_calls,
    torch_problem,
)

from gpt.config import Config
from gpt.device import Device, add_device_options
from gpt.errors import UserError
from gpt.plan import step_flops, step_tokens
from gpt.text.tokenizers import ByteTokenizer
from tensorlite import BackendError, get_backend
from tensorlite.optim import learning_rate

SIDES = ("ours", "torch", "product")
GPU_WARM_UP = 8  # steps: ours captures the fourth
PRODUCT = 8192  # rows and columns of the factors whose product is timed on a GPU


def main() -> None:
    args = parse_arguments()
    if args.worker:
        serve(make_turn(preset_config(args.preset[0], dropout=args.dropout), args))
        return
    try:
        device = Device(args.backend, args.dtype, args.tf32, args.graph)
        require_rival(args)
    except (UserError, BackendError) as error:
        sys.exit(f"train_step.py: error: {error}")
    compare = compare_on_gpu if on_gpu(args) else compare_on_cpu
    rows = [compare(preset, args) for preset in args.preset]
    write_results(args.json, gpu_facts(get_backend(device.backend)) if on_gpu(args) else None, results=rows)


def parse_arguments() -> argparse.Namespace:
    parser = comparison_parser(__doc__, SIDES, ["little-shakespeare", "nanogpt-cpu"])
    parser.add_argument("--dropout", type=float, help="instead of the preset's")
    parser.add_argument("--compile", action="store_true", help="compile the torch model with torch.compile")
    parser.add_argument("--alone", action="store_true", help="on a GPU, time our side without torch's")
    add_device_options(parser, threads=False)
    return parser.parse_args()


def on_gpu(args: argparse.Namespace) -> bool:
    return args.backend == "cupy"


def require_rival(args: argparse.Namespace) -> None:
    """UserError if torch cannot run where it is to run."""
    if args.alone and not on_gpu(args):
        raise UserError("--alone is for a GPU: leave it out, or add --backend cupy")
    problem = torch_problem() if on_gpu(args) and not args.alone else None
    if problem:
        raise UserError(f"{problem}; --alone times our side without it")


# -- the parent --


def start_sides(preset: str, args: argparse.Namespace, sides: tuple[str, ...]) -> dict[str, subprocess.Popen]:
    """A worker for each side, with the options that were given here."""
    options = ["--preset", preset, "--threads", args.threads, "--backend", args.backend, "--dtype", args.dtype]
    options += ["--compile"] if args.compile else []
    options += [] if args.dropout is None else ["--dropout", args.dropout]
    for name, value in (("tf32", args.tf32), ("graph", args.graph)):
        options += [] if value is None else [f"--{name}" if value else f"--no-{name}"]
    return {side: start_worker("--worker", side, *options) for side in sides}


def take_turns(workers: dict[str, subprocess.Popen], args: argparse.Namespace) -> dict[str, list[float]]:
    """The median seconds of each side's turns."""
    times = {side: [] for side in workers}
    for _ in range(args.rounds):
        for side, worker in workers.items():
            times[side].append(statistics.median(ask(worker, args.seconds)["times"]))
    return times


def compare_on_cpu(preset: str, args: argparse.Namespace) -> dict:
    """Run both sides in turns and print the table's row."""
    workers = start_sides(preset, args, ("ours", "torch"))
    times = take_turns(workers, args)
    memory = {side: peak_memory_mb(worker, args.seconds) for side, worker in workers.items()}
    for worker in workers.values():
        stop(worker)
    config = preset_config(preset, dropout=args.dropout)
    floor = step_flops(config) / (sgemm_flops_per_second(config) * args.threads)
    row = {"preset": preset, "dropout": config.gpt.dropout, "rival": rival(args), "threads": args.threads}
    row |= measured(times, memory, floor)
    print_row(row, f"{row['threads']} threads")
    return row


def compare_on_gpu(preset: str, args: argparse.Namespace) -> dict:
    """Run the sides in turns and print the table's row."""
    workers = start_sides(preset, args, ("ours", "product") if args.alone else SIDES)
    times = take_turns(workers, args)
    memory = {side: ask(worker, 0)["mb"] for side, worker in workers.items()}
    for worker in workers.values():
        stop(worker)
    config = preset_config(preset, dropout=args.dropout)
    flops_per_second = 2.0 * PRODUCT**3 / statistics.median(times["product"])
    precision = "float32 with TF32" if args.dtype == "float32" and args.tf32 is not False else args.dtype
    row = {"preset": preset, "dropout": config.gpt.dropout, "rival": rival(args), "precision": precision}
    row |= {"graph": args.graph is not False} | measured(times, memory, step_flops(config) / flops_per_second)
    row["product_tflops"] = round(flops_per_second / 1e12, 1)
    row["tokens_per_s"] = round(step_tokens(config) / statistics.median(times["ours"]))
    print_row(row, row["precision"] + ("" if row["graph"] else ", no graph"))
    return row


def rival(args: argparse.Namespace) -> str | None:
    return None if args.alone else "torch.compile" if args.compile else "torch eager"


def measured(times: dict, memory: dict, floor: float) -> dict:
    """A row's times, ratios and memory; None for torch's where it did not run."""
    ours = statistics.median(times["ours"])
    row = {"ours_ms": round(1e3 * ours, 3), "torch_ms": None, "ratio": None, "ratios": []}
    row |= {"ours_mb": round(memory["ours"]), "torch_mb": None}
    if "torch" in times:
        ratios = [t / o for o, t in zip(times["ours"], times["torch"], strict=True)]
        row |= {"torch_ms": round(1e3 * statistics.median(times["torch"]), 3), "torch_mb": round(memory["torch"])}
        row |= {"ratio": round(statistics.median(ratios), 3), "ratios": [round(r, 3) for r in ratios]}
    return row | {"floor_ms": round(1e3 * floor, 3), "floor_share": round(floor / ours, 3)}


def print_row(row: dict, how: str) -> None:
    against = f", against {row['rival']}" if row["rival"] else ""
    step, memory = f"ours {row['ours_ms']:9.2f} ms", f"ours {row['ours_mb']:9.0f} MB"
    if row["rival"]:
        step += f"   torch {row['torch_ms']:9.2f} ms   {row['ratio']:.2f}x its speed"
        step += f" (rounds: {min(row['ratios']):.2f} to {max(row['ratios']):.2f})"
        memory += f"   torch {row['torch_mb']:9.0f} MB   {row['ours_mb'] / row['torch_mb']:.2f} of torch's"
    print(
        f"{row['preset']}, dropout {row['dropout']}, {how}{against}\n  step      {step}\n  memory    {memory}\n"
        f"  floor     {row['floor_ms']:.2f} ms for the products alone: {row['floor_share']:.0%} of our step"
    )
    if "tokens_per_s" in row:
        print(f"  speed     {row['tokens_per_s']:,} tokens/s; a large product {row['product_tflops']:.0f} TFLOP/s")
    sys.stdout.flush()


def peak_memory_mb(worker: subprocess.Popen, seconds: float) -> float:
    """The most memory that the worker and its own workers are seen to hold during a turn."""
    with ThreadPoolExecutor(1) as pool:
        turn, peak = pool.submit(ask, worker, seconds), 0.0
        while not turn.done():
            peak = max(peak, memory_mb(worker.pid))
            time.sleep(0.005)
    return peak


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


def make_turn(config: Config, args: argparse.Namespace):
    """What a worker does in its turn. It has warmed up."""
    if on_gpu(args):
        return make_gpu_turn(config, args)
    step = {"ours": our_step, "torch": torch_step}[args.worker](config, args)
    for _ in range(2):
        step()
    return lambda seconds: {"times": time_calls(step, seconds)}


def make_gpu_turn(config: Config, args: argparse.Namespace):
    if args.worker == "torch":
        import torch

        synchronize, free_memory = torch.cuda.synchronize, lambda: torch.cuda.mem_get_info()[0]
    else:
        runtime = get_backend("cupy").xp.cuda.runtime
        synchronize, free_memory = runtime.deviceSynchronize, lambda: runtime.memGetInfo()[0]
    free = free_memory()
    step = {"ours": our_gpu_step, "torch": torch_gpu_step, "product": product}[args.worker](config, args)
    for _ in range(GPU_WARM_UP):
        step()
    synchronize()
    taken = (free - free_memory()) / 2**20  # the other sides are not there yet, or have stopped growing
    return lambda seconds: {"times": [time_queued_calls(step, synchronize, seconds)], "mb": taken}


def make_dataset(config: Config):
    """Random symbols: the speed does not depend on the text."""
    from gpt.text.dataset import Dataset, Split

    symbols = config.gpt.vocab_size
    tokens = np.random.default_rng(0).integers(symbols, size=100_000).astype(np.min_scalar_type(symbols - 1))
    split = Split(tokens, config.gpt.block_size)
    return Dataset(split, split, ByteTokenizer(), "", "random")


def our_step(config: Config, args: argparse.Namespace):
    from gpt.models.kinds import build_model
    from gpt.training.cpu_trainer import CPUTrainer

    model = build_model("gpt", config.gpt, config.train.seed)
    trainer = CPUTrainer(model, make_dataset(config), config.train, args.threads).__enter__()
    return lambda: float(trainer.train_step()[0])


def our_gpu_step(config: Config, args: argparse.Namespace):
    device = Device(args.backend, args.dtype, args.tf32, args.graph)
    return device_trainer(config, device).train_step


def device_trainer(config: Config, device: Device):
    """A GPUTrainer on random symbols."""
    from gpt.models.kinds import build_model
    from gpt.training.gpu_trainer import GPUTrainer

    model = device.place(build_model("gpt", config.gpt, config.train.seed), "gpt")
    return GPUTrainer(model, make_dataset(config), config.train)


def product(config: Config, args: argparse.Namespace):
    """A large square product in the step's precision, on random numbers: of zeros it would be faster."""
    backend = get_backend(args.backend)
    backend.tf32 = args.tf32 is not False
    rng, dtype = np.random.default_rng(0), backend.dtype(args.dtype)
    a, b, out = (backend.asarray(rng.standard_normal((PRODUCT, PRODUCT), np.float32).astype(dtype)) for _ in range(3))
    return lambda: backend.gemm(a, b, out=out)


def torch_step(config: Config, args: argparse.Namespace):
    import torch

    from gpt.text.dataset import random_starts
    from tensorlite import random

    torch.set_num_threads(args.threads)
    train, dataset = config.train, make_dataset(config)
    rows = train.batch_size * train.gradient_accumulation_steps
    update = TorchUpdate(config, args, "cpu")

    def step():
        rng = random.generator(train.seed, random.BATCHES, update.done)
        x, y = dataset.train.block(random_starts(dataset.train, rows, rng))
        return update(torch.from_numpy(x), torch.from_numpy(y)).item()

    return step


def torch_gpu_step(config: Config, args: argparse.Namespace, device: str = "cuda"):
    import torch

    from gpt.text.dataset import random_starts
    from tensorlite import random

    torch.set_float32_matmul_precision("highest" if args.tf32 is False else "high")  # high: with TF32
    train, split = config.train, make_dataset(config).train
    rows, offsets = train.batch_size * train.gradient_accumulation_steps, torch.arange(split.block_size).to(device)
    tokens = torch.from_numpy(split.tokens.astype(np.int64)).to(device)
    update = TorchUpdate(config, args, device)

    def step():
        starts = random_starts(split, rows, random.generator(train.seed, random.BATCHES, update.done))
        # From pinned memory, or the copy would wait for the device.
        index = torch.from_numpy(starts).pin_memory().to(device, non_blocking=True)[:, None] + offsets
        return update(tokens[index], tokens[index + 1])

    return step


class TorchUpdate:
    """nanoGPT's training step, from our weights: `update(x, y)` returns the loss, on the device. `done` counts them."""

    def __init__(self, config: Config, args: argparse.Namespace, device: str):
        import torch
        from torch_gpt import TorchGPT

        from gpt.models.kinds import build_model

        self.train, self.done, self.clip = config.train, 0, torch.nn.utils.clip_grad_norm_
        self.model = TorchGPT(config.gpt)
        weights = build_model("gpt", config.gpt, config.train.seed).state_dict()
        self.model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
        self.model.to(device)
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.train.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]],
            betas=(config.train.beta1, config.train.beta2),
            fused=device == "cuda" or None,
        )
        self.run = torch.compile(self.model) if args.compile else self.model
        half = args.dtype == "bfloat16"
        self.precision = torch.autocast(device, torch.bfloat16) if half else contextlib.nullcontext()

    def __call__(self, x, y):
        train, optimizer = self.train, self.optimizer
        rate = learning_rate(self.done, train.learning_rate, train.warmup_iters, train.lr_decay_iters, train.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        with self.precision:
            _, loss = self.run(x, y)
        loss.backward()
        if train.grad_clip:
            self.clip(self.model.parameters(), train.grad_clip)
        optimizer.step()
        self.done += 1
        return loss.detach()


if __name__ == "__main__":
    main()
