"""What a training step on a GPU moves and computes, kernel by kernel, counted without one: bench/gpu_parts.py traffic.

launches    all of a step at its real shape, recorded by the tests' stand-in for CuPy, which runs none of them; what one
            call of CuPy's does counts as one
bytes       what a launch reads of its arrays and what it writes, once: what memory must move if no cache misses a thing
            twice, and none has what the launch before left
asked       what its loads and stores ask the caches for, in sectors of 32 bytes: an instruction of a warp asks once for
            each sector that its lanes touch
flop        of products, cuBLAS's and those of the tensor cores

How much of each array a kernel of ours touches, how often, and with how many products of tensor cores, is what the CUDA
emulator sees of a step at a small shape (`traced_shape`): one layer, two heads, 1,024 tokens; the length of a block,
and with it attention, as in the real one. CuPy's functions and cuBLAS's products read and write their arrays once.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import strict_cuda
from report import PRODUCTS
from train_step import make_dataset

from gpt.config import Config
from gpt.device import Device
from gpt.models.kinds import build_model
from gpt.training.gpu_trainer import GPUTrainer

PRESETS = "shakespeare-char", "gpt2"
SECTOR = 32  # bytes, the least that memory and caches move
WRITTEN = np.uint64(1 << 63)  # the bit of a request that writes
MMA_FLOP = 2 * 16 * 8 * 16
HEAD_DIM = 64


class Use(NamedTuple):
    """What a kernel was seen to do."""

    shares: tuple[tuple[float, float], ...]  # of each array's bytes, those read and those written
    passes: float  # bytes asked for, to each of those
    flop: float  # to each byte of its first array


@dataclass
class Row:
    """A step's launches of one name."""

    launches: int = 0
    bytes: float = 0
    asked: float = 0
    flop: float = 0


def results(preset: str, config: Config, launches: list[strict_cuda.Launch], uses: dict) -> dict:
    """The counts of a step, for bench/report.py; the kernels in the order of their bytes."""
    rows = sorted(count(launches, uses).items(), key=lambda item: -item[1].bytes)
    kernels = [{"kernel": name} | {key: round(value) for key, value in vars(row).items()} for name, row in rows]
    shape, train = config.gpt, config.train
    return {
        "preset": preset,
        "shape": f"{train.batch_size} x {shape.block_size} tokens, {shape.n_layer} layers, {shape.n_embd} channels,"
        f" {shape.n_head} heads, {shape.vocab_size:,} symbols, dropout {shape.dropout:g}, bfloat16",
        "kernels": kernels,
        "least": least(config),
    }


def least(config: Config) -> dict[str, int]:
    """The bytes that a step must move outside the products, part by part, if nothing is computed twice but masks.

    What a product or attention takes or gives lies in memory; what comes between two of them is one kernel, which reads
    and writes each of its arrays once. Residual adds are part of the layer norm that follows, or backward of the one
    before; biases and activations are part of the product before, which keeps its result from before the activation as
    well; dropout draws its masks anew. What the forward pass keeps is bfloat16, weights and their gradients float32.
    """
    shape, train = config.gpt, config.train
    N, C, L = train.batch_size * train.gradient_accumulation_steps * shape.block_size, shape.n_embd, shape.n_layer
    V, P = shape.vocab_size, shape.num_parameters()
    stream, statistics = 2 * N * C, (2 * L + 1) * 2 * 4 * N  # (N, C) in bfloat16; mean and rstd
    positions, tables, lse = 4 * shape.block_size * C, 4 * min(N, V) * C, 4 * N * shape.n_head
    return {
        "embedding, and the first layer norm": 4 * N * C + positions + 2 * stream,
        "residual adds and layer norms": 2 * L * 4 * stream + statistics,
        "attention": L * (4 * stream + lse),
        "activations": L * 4 * stream,
        "loss: the logits are read": 2 * N * V,
        "loss, backward: they are read, their gradient written": 2 * 2 * N * V,
        "activations, backward": L * 4 * stream,
        "attention, backward": L * (8 * stream + lse),
        "residual adds and layer norms, backward": (2 * L * 4 + 3) * stream + statistics,
        "embedding, backward: added to its table's gradient": stream + 2 * tables + positions,
        "norm of the gradients": 4 * P,
        "AdamW": 7 * 4 * P,
        "weights in bfloat16, for the next step's products": 2 * (P - positions // 4),
    }


# -- a step at its real shape --


def recorded_step(config: Config) -> list[strict_cuda.Launch]:
    """The launches of a step in bfloat16."""
    with strict_cuda.recorded() as launches:
        trainer = make_trainer(config, seed=None)  # the weights are never read
        launches.clear()
        trainer._train()
    return launches


def make_trainer(config: Config, seed: int | None) -> GPUTrainer:
    model = Device("cupy", "bfloat16", graph=False).place(build_model("gpt", config.gpt, seed), "gpt")
    return GPUTrainer(model, make_dataset(config), config.train)


def count(launches: Iterable[strict_cuda.Launch], uses: dict[tuple[str, int], Use]) -> dict[str, Row]:
    """A row for each name."""
    rows: dict[str, Row] = {}
    for launch in launches:
        if launch.name == "[]" and launch.arrays[-1].size == 1:
            continue  # an element is a view in CuPy, which launches nothing
        row = rows.setdefault(name_of(launch), Row())
        row.launches += 1
        sizes = [extent(array) for array in launch.arrays]
        if launch.kernel:
            use = uses[launch.name, len(sizes)]
            moved = sum(size * (read + written) for size, (read, written) in zip(sizes, use.shares, strict=True))
            row.asked += moved * use.passes
            row.flop += use.flop * sizes[0]
        else:
            if launch.name == "[]":  # of a table, as much is read as is written
                sizes[0] = sizes[-1]
            moved = sum(size * (2 if way == "b" else 1) for size, way in zip(sizes, launch.ways, strict=True))
            row.asked += moved
            row.flop += launch.flop
        row.bytes += moved
    return rows


def name_of(launch: strict_cuda.Launch) -> str:
    """Ours by their own name, CuPy's functions as such."""
    if launch.kernel:
        return launch.name
    return PRODUCTS if launch.flop else f"CuPy {launch.name.strip('._()')}"


def extent(array: np.ndarray) -> int:
    """Its bytes, without those that are repeated."""
    return math.prod(n for n, step in zip(array.shape, array.strides, strict=True) if step) * array.itemsize


# -- the kernels, at a small shape --


def traced_shape(config: Config) -> Config:
    """The vocabulary has to the tokens the relation that it has in the real one, or is as small as that."""
    shape, tokens = config.gpt, 1024
    vocab = max(65, shape.vocab_size * tokens // (config.train.batch_size * shape.block_size))
    small = replace(shape, n_layer=1, n_head=2, n_embd=2 * HEAD_DIM, vocab_size=vocab)
    return Config(small, replace(config.train, batch_size=tokens // shape.block_size))


def traced_uses(config: Config) -> dict[tuple[str, int], Use]:
    """Of each kernel of a step at that shape, by its name and how many arrays it has: some may be left out."""
    seen: dict[tuple[str, int], list] = {}

    def tell(name, arrays, requests, products) -> None:
        sizes = [extent(array) for array in arrays]
        touched, asked = touched_bytes(arrays, requests)
        shares = np.minimum(touched / np.array(sizes)[:, None], np.maximum(SECTOR / np.array(sizes), 1)[:, None])
        seen.setdefault((name, len(arrays)), []).append((shares, asked, touched.sum(), MMA_FLOP * products / sizes[0]))

    trainer = make_trainer(config, seed=0)
    with strict_cuda.traced(tell):
        trainer.train_step()
    uses = {}
    for key, calls in seen.items():
        shares, asked, touched, flop = (np.array(column) for column in zip(*calls, strict=True))
        mean = shares.mean(0).round(4)
        passes = round(float(asked.sum() / touched.sum()), 3)
        uses[key] = Use(tuple(map(tuple, mean.tolist())), passes, float(flop.mean()))
    return uses


def touched_bytes(arrays: list[np.ndarray], requests: np.ndarray) -> tuple[np.ndarray, int]:
    """(bytes of each array that are read, and that are written; bytes asked for), in whole sectors."""
    touched, asked = np.zeros((len(arrays), 2)), 0
    addresses, written = requests & ~WRITTEN, requests >= WRITTEN
    for i, array in enumerate(arrays):
        own = within(array, addresses)
        asked += SECTOR * int(own.sum())
        for way in (0, 1):
            touched[i, way] = SECTOR * len(np.unique(addresses[own & (written == way)] // SECTOR))
        addresses, written = addresses[~own], written[~own]
    return touched, asked


def within(array: np.ndarray, addresses: np.ndarray) -> np.ndarray:
    """Which of these are an element's."""
    rest = addresses.astype(np.int64) - array.ctypes.data
    inside = rest >= 0
    axes = sorted(
        ((step, n) for step, n in zip(array.strides, array.shape, strict=True) if n > 1 and step), reverse=True
    )
    for step, n in axes:
        place, rest = np.divmod(rest, step)
        inside &= place < n
    return inside & (rest < array.itemsize)
