"""Time each op of a model's training step against PyTorch and against its floor, and the cost of recording an op.

    python bench/ops.py
    python bench/ops.py --preset shakespeare-char --dropout 0 --json bench/results/ops.json

Both sides run in this process on one thread each, on arrays of one micro-batch, and take turns, A B A B ...; a ratio is
the median over the pairs of turns of torch's time over ours. They share the C library's allocator, tuned as for
training. Backward is the engine's walk back from the op's result to its inputs, on either side.

The floor of a matrix product is its floating-point operations at the speed of sgemm; attention's is that of its
products, full and not only their causal half. The floor of any other op is the time of np.copyto for as many bytes as
the op must read and write. Both speeds are measured in the same run.

The overhead is what one op on a tiny array takes beyond the NumPy call that does its work: forward when it is recorded,
forward under no_grad, and backward, per op of a long chain.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name the field knows
from machine import write_results
from threadpoolctl import threadpool_limits
from train_step import sgemm_flops_per_second
from turns import preset_config

import tensorlite as tl
from gpt.config import Config
from tensorlite import Tensor, no_grad
from tensorlite.autograd import backpropagate

CHAIN = 1000  # ops between two readings of the clock, where one op takes microseconds


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    tl.get_backend("numpy").tune_allocator()
    with threadpool_limits(1, user_api="blas"):
        rows = [row for preset in args.preset for row in compare(preset, args)]
        costs = overhead(args.rounds)
    write_results(args.json, results=rows, overhead=costs)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=["nanogpt-cpu"], help="presets by name (default: nanogpt-cpu)")
    parser.add_argument("--dropout", type=float, help="instead of the preset's")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each side (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.05, help="length of a turn (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    return parser.parse_args()


# -- ops at a model's shapes --


@dataclass(frozen=True)
class Op:
    """One op on both sides. Floating-point inputs get gradients. The work is that of forward and of backward."""

    name: str
    ours: Callable
    theirs: Callable
    inputs: tuple
    flops: tuple[float, float] = (0, 0)  # of the matrix products
    moved: tuple[int, int] = (0, 0)  # elements read and written, where no product dominates


def hot_path(config: Config) -> list[Op]:
    """The ops of one training step, each once for each shape it runs at."""
    shape, rng = config.gpt, np.random.default_rng(0)
    B, T = config.train.micro_batch_size or config.train.batch_size, shape.block_size
    C, V = shape.n_embd, shape.vocab_size
    n, p = B * T * C, shape.dropout

    def normal(*lengths):
        return rng.standard_normal(lengths, dtype=np.float32)

    def optional(present: bool, array):
        return (array,) if present else ()

    def linear(name: str, inputs: int, outputs: int, bias: bool) -> Op:
        arrays = (normal(B, T, inputs), normal(outputs, inputs), *optional(bias, normal(outputs)))
        flops = 2.0 * B * T * inputs * outputs
        return Op(f"linear, {name}", tl.linear, F.linear, arrays, flops=(flops, 2 * flops))

    def torch_attention(qkv):
        q, k, v = (x.view(B, T, shape.n_head, C // shape.n_head).transpose(1, 2) for x in qkv.split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        return y.transpose(1, 2).reshape(B, T, C)

    def torch_cross_entropy(logits, targets):
        return F.cross_entropy(logits.view(-1, V), targets.view(-1))

    activations = {
        "relu": (tl.relu, F.relu),
        "gelu": (tl.gelu, F.gelu),
        "gelu_tanh": (lambda x: tl.gelu(x, "tanh"), lambda x: F.gelu(x, approximate="tanh")),
    }
    ids, targets = rng.integers(V, size=(2, B, T))
    norm = (normal(B, T, C), normal(C), *optional(shape.bias, normal(C)))
    qkv_bias = shape.bias if shape.qkv_bias is None else shape.qkv_bias
    ops = [
        Op("embedding", tl.embedding, F.embedding, (ids, normal(V, C)), moved=(2 * n, n)),
        Op("add", tl.add, torch.add, (normal(B, T, C), normal(B, T, C)), moved=(3 * n, 0)),
        Op("layer_norm", tl.layer_norm, lambda x, *wb: F.layer_norm(x, (C,), *wb), norm, moved=(2 * n, 3 * n)),
        linear("C to 3C", C, 3 * C, qkv_bias),
        Op(
            "self_attention", lambda x: tl.self_attention(x, shape.n_head, dropout=p), torch_attention,
            (normal(B, T, 3 * C),), flops=(4.0 * n * T, 8.0 * n * T),
        ),
        linear("C to C", C, C, shape.bias),
        linear("C to 4C", C, 4 * C, shape.bias),
        Op(shape.activation, *activations[shape.activation], (normal(B, T, 4 * C),), moved=(8 * n, 12 * n)),
        linear("4C to C", 4 * C, C, shape.bias),
        linear("C to V", C, V, shape.head_bias),
        Op(
            "cross_entropy", tl.cross_entropy, torch_cross_entropy, (normal(B, T, V), targets),
            moved=(B * T * V, 2 * B * T * V),
        ),
    ]  # fmt: skip
    if p:
        dropout = (lambda x: tl.dropout(x, p), lambda x: F.dropout(x, p))
        ops.append(Op("dropout", *dropout, (normal(B, T, C),), moved=(2 * n, 2 * n)))
    return ops


def compare(preset: str, args: argparse.Namespace) -> list[dict]:
    """Time every op in turns, print the table and return its rows."""
    config = preset_config(preset, dropout=args.dropout)
    flops_per_second = sgemm_flops_per_second(config)
    print(f"{preset}, dropout {config.gpt.dropout}; sgemm {flops_per_second / 1e9:.0f} GFLOP/s; times in us")
    columns = "".join(f"{name:>9}" for name in ("ours", "torch", "ratio", "floor"))
    print(f"{'':30}{'forward':>36}{'backward':>36}\n{'op':18}{'input':>12}{columns}{columns}     ratio of both")
    rows = []
    for op in hot_path(config):
        sides = our_op(op), torch_op(op)
        for side in sides:
            turn(side, 0)  # warm up
        turns = [[turn(side, args.seconds) for side in sides] for _ in range(args.rounds)]
        data = next(x for x in op.inputs if x.dtype.kind == "f")
        row = {"preset": preset, "dropout": config.gpt.dropout, "op": op.name, "input": list(data.shape)}
        for i, direction in enumerate(("forward", "backward")):
            floor = op.flops[i] / flops_per_second + copy_seconds(op.moved[i] // 2)
            row[direction] = {
                "ours_us": round(1e6 * statistics.median(ours[i] for ours, _ in turns), 1),
                "torch_us": round(1e6 * statistics.median(theirs[i] for _, theirs in turns), 1),
                "ratio": round(statistics.median(theirs[i] / ours[i] for ours, theirs in turns), 3),
                "floor_us": round(1e6 * floor, 1),
            }
        row["ratio"] = round(statistics.median(sum(theirs) / sum(ours) for ours, theirs in turns), 3)
        print_row(row)
        rows.append(row)
    return rows


def print_row(row: dict) -> None:
    cells = "".join(
        f"{t['ours_us']:9.0f}{t['torch_us']:9.0f}{t['ratio']:8.2f}x{t['floor_us']:9.0f}"
        for t in (row["forward"], row["backward"])
    )
    print(f"{row['op']:18}{'x'.join(map(str, row['input'])):>12}{cells}{row['ratio']:17.2f}x", flush=True)


def our_op(op: Op):
    """(forward, backward) on our side."""
    inputs = [Tensor(x, requires_grad=x.dtype.kind == "f") for x in op.inputs]
    gy = np.ones_like(op.ours(*inputs).data)
    return lambda: op.ours(*inputs), lambda out: backpropagate(out.node, gy, lambda *_: None)


def torch_op(op: Op):
    """(forward, backward) on PyTorch's."""
    inputs = [torch.tensor(x, requires_grad=x.dtype.kind == "f") for x in op.inputs]
    leaves = [x for x in inputs if x.requires_grad]
    gy = torch.ones_like(op.theirs(*inputs))
    return lambda: op.theirs(*inputs), lambda out: torch.autograd.grad(out, leaves, gy)


def turn(side, seconds: float) -> tuple[float, float]:
    """The median seconds of forward and of backward in a turn of that length."""
    (forward, backward), times, stop = side, [], time.perf_counter() + seconds
    while not times or time.perf_counter() < stop:
        start = time.perf_counter()
        out = forward()
        middle = time.perf_counter()
        backward(out)
        times.append((middle - start, time.perf_counter() - middle))
        del out  # or the next forward's time would hold its release
    forward_times, backward_times = zip(*times, strict=True)
    return statistics.median(forward_times), statistics.median(backward_times)


def copy_seconds(size: int) -> float:
    """The time to copy an array of so many numbers."""
    x, y, times = np.ones(size, np.float32), np.ones(size, np.float32), []
    for _ in range(101 if size else 0):
        start = time.perf_counter()
        np.copyto(y, x)
        times.append(time.perf_counter() - start)
    return statistics.median(times) if size else 0.0


# -- the cost of recording --

TINY = {  # what to do on our side and on NumPy's, and what NumPy does of it in backward
    "add": (lambda xp, x, c: x + c, lambda gy, c: gy),
    "mul": (lambda xp, x, c: x * c, lambda gy, c: gy * c),
    "tanh": (lambda xp, x, c: xp.tanh(x), lambda gy, c: gy * (1.0 - c * c)),
    "matmul": (lambda xp, x, c: x @ c, lambda gy, c: gy @ c.T),
}


def overhead(rounds: int) -> dict:
    """Microseconds per op beyond NumPy's own, op by op."""
    print("overhead in us  NumPy alone   forward   no_grad  backward")
    costs = {}
    for name, op in TINY.items():
        measured = [measure_overhead(*op) for _ in range(rounds)]
        costs[name] = {key: round(statistics.median(m[key] for m in measured), 2) for key in measured[0]}
        cost = costs[name]
        print(f"{name:14}{cost['numpy_us']:13.2f}{cost['forward_us']:+10.2f}", end="")
        print(f"{cost['no_grad_us']:+10.2f}{cost['backward_us']:+10.2f}", flush=True)
    return costs


def measure_overhead(op: Callable, numpy_vjp: Callable) -> dict[str, float]:
    """What `numpy_us` is for the NumPy call, the others are beyond it. The cost of calling a function cancels out."""
    array = np.eye(2, dtype=np.float32)  # whatever the op, a long chain of it stays finite
    x, c = Tensor(array, requires_grad=True), Tensor(array)
    numpy = time_calls(op, np, array, array)
    recorded = time_calls(op, tl, x, c)
    with no_grad():
        unrecorded = time_calls(op, tl, x, c)
    out = x
    for _ in range(CHAIN):
        out = op(tl, out, c)
    start = time.perf_counter()
    backpropagate(out.node, array, lambda *_: None)
    walk = 1e6 * (time.perf_counter() - start) / CHAIN
    return {
        "numpy_us": numpy - time_calls(lambda xp, x, c: None, np, array, array),
        "forward_us": recorded - numpy,
        "no_grad_us": unrecorded - numpy,
        "backward_us": walk - time_calls(numpy_vjp, array, array) + time_calls(lambda gy, c: gy, array, array),
    }


def time_calls(function: Callable, *args) -> float:
    """Microseconds per call."""
    start = time.perf_counter()
    for _ in range(CHAIN):
        function(*args)
    return 1e6 * (time.perf_counter() - start) / CHAIN


if __name__ == "__main__":
    main()
