"""What a step on a GPU moves, as it is counted without one (bench/traffic.py): the figures are those committed, so that
none changes unseen, and the counting itself is right."""

import json
from dataclasses import replace

import cuda_on_cpu
import numpy as np
import occupancy
import pytest
import report
import strict_cuda
import traffic
from turns import preset_config

from gpt.config import Config, GPTConfig, TrainConfig

pytestmark = pytest.mark.skipif(bool(cuda_on_cpu.MISSING), reason=cuda_on_cpu.MISSING)

CHANGED = (
    "what a step moves has changed: run python bench/gpu_parts.py traffic --out bench/results, see whether it is for"
    " the better, run python bench/report.py and commit both"
)
COPY = """
extern "C" __global__ void copy(const float* x, float* y, const float* scale, long long n) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = x[i] * *scale;
}
extern "C" __global__ void twice(const float* x, float* y, long long n) {
    float sum = 0;
    for (long long i = threadIdx.x; i < n; i += blockDim.x) sum += x[i];
    __syncthreads();
    for (long long i = threadIdx.x; i < n; i += blockDim.x) y[i] = x[i] - sum;
}
extern "C" __global__ void strided(const float* x, float* y) { y[threadIdx.x] += x[8 * threadIdx.x]; }
struct alignas(16) Four { float item[4]; };
extern "C" __global__ void packs(const float* x, float* y) {
    Four four = *(const Four*)(x + 4 * threadIdx.x);
    for (int k = 0; k < 4; k++) four.item[k] += 1;
    *(Four*)(y + 4 * threadIdx.x) = four;
}
extern "C" __global__ void shared(const float* x, float* y) {
    __shared__ float kept[64];
    kept[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = kept[63 - threadIdx.x] + kept[0];
}
"""


def zeros(n: int) -> np.ndarray:
    """That begin at a multiple of 64 bytes, as a GPU's do."""
    return strict_cuda.allocate(n, np.float32)


def traced(name: str, blocks: int, threads: int, *args) -> tuple[list, int]:
    """([bytes read, bytes written] of each array, bytes asked for)."""
    requests, products = cuda_on_cpu.Module(COPY).get_function(name).trace((blocks,), (threads,), args)
    assert products == 0
    touched, asked = traffic.touched_bytes([x for x in args if isinstance(x, np.ndarray)], requests)
    return touched.tolist(), asked


def test_a_trace_sees_what_is_read_and_written_and_how_often():
    x, y, one = zeros(1024), zeros(1024), zeros(1)
    x[:] = y[:] = 0
    each, warps = 4 * 1000, 32  # in sectors: 1,000 numbers are 125 of them
    assert traced("copy", 4, 256, x[:1000], y[:1000], one, 1000) == (
        [[each, 0], [0, each], [32, 0]],
        2 * each + warps * 32,  # the factor, once for each warp
    )
    assert traced("twice", 1, 256, x[:1000], y[:1000], 1000) == ([[each, 0], [0, each]], 3 * each)
    assert traced("strided", 1, 128, x, y[:128]) == ([[4096, 0], [512, 512]], 4096 + 2 * 512)  # an eighth is of use
    assert traced("packs", 1, 64, x[:256], y[:256]) == ([[1024, 0], [0, 1024]], 2048)
    assert traced("shared", 1, 64, x[:64], y[:64]) == ([[256, 0], [0, 256]], 512)


def test_views_of_one_array_are_told_apart():
    packed = strict_cuda.allocate((2, 4, 3, 16), np.float32)  # q, k and v of 2 sequences, 4 long
    q, k, _ = packed.transpose(2, 0, 1, 3)
    addresses = np.array([packed[b, t, i].ctypes.data + 32 for b in range(2) for t in range(4) for i in range(3)])
    for i, view in enumerate((q, k)):
        assert traffic.within(view, addresses.astype(np.uint64)).tolist() == [j % 3 == i for j in range(24)]


TINY = Config(
    GPTConfig(vocab_size=65, block_size=64, n_layer=1, n_head=1, n_embd=64),
    TrainConfig(preset="tiny", batch_size=4, grad_clip=0.5),
)


def test_a_recorded_step_launches_what_a_real_one_does(device):
    """The same on the same arrays, and nothing is written."""
    with strict_cuda.logged() as log:
        traffic.make_trainer(TINY, seed=None)
        del log[:]
    trainer = traffic.make_trainer(TINY, seed=0)
    trainer.train_step()
    with strict_cuda.logged() as log:
        trainer._train()
    launches = traffic.recorded_step(TINY)
    assert [entry[0] for entry in log] == [launch.name for launch in launches]
    real, recorded = ([tuple(array[:2] for array in entry[1:]) for entry in log], launches)
    assert real == [tuple((a.shape, a.dtype.name) for a in launch.arrays) for launch in recorded]
    flop = sum(launch.flop for launch in launches)
    weights = 12 * 64 * 64 + 65 * 64
    assert flop == 6 * weights * 4 * 64


def test_an_array_that_is_repeated_counts_once():
    row = np.zeros((1, 8), np.float32)
    assert traffic.extent(np.broadcast_to(row, (5, 8))) == 32
    assert traffic.extent(np.zeros((3, 10), np.float32)[:, :7]) == 84


@pytest.fixture(scope="module")
def committed():
    rows = json.loads((report.RESULTS / "traffic.json").read_text(encoding="utf-8"))["results"]
    return {row["preset"]: row for row in rows}


@pytest.mark.parametrize("preset", traffic.PRESETS)
def test_a_step_moves_what_is_committed(preset, device, committed):
    """Counted for one layer and for two, from which follows what all layers move: each does the same."""
    config = preset_config(preset)
    uses = traffic.traced_uses(traffic.traced_shape(config))
    one, two = (
        traffic.count(traffic.recorded_step(Config(replace(config.gpt, n_layer=n), config.train)), uses) for n in (1, 2)
    )
    expected = {row["kernel"]: row for row in committed[preset]["kernels"]}
    assert one.keys() == two.keys() == expected.keys(), CHANGED
    for name in one:
        for what in ("launches", "bytes", "asked", "flop"):
            first, second = getattr(one[name], what), getattr(two[name], what)
            all_layers = first + (config.gpt.n_layer - 1) * (second - first)
            close = 0.02 if what == "asked" else 1e-6  # what a compiler loads twice is its choice
            assert expected[name][what] == pytest.approx(all_layers, rel=close, abs=1), (name, what, CHANGED)
    assert committed[preset]["least"] == traffic.least(config)


def test_what_is_seen_of_a_small_step_holds_for_a_larger_one(device):
    """Of its arrays a kernel touches the same share, but of those that tokens are looked up in, and attention does for
    each of three heads as much as for one alone."""
    small, large = (traffic.traced_uses(wider(n)) for n in (1, 3))
    assert small.keys() == large.keys()
    for (name, arrays), use in small.items():
        other = large[name, arrays]
        if name not in ("gather_blocks", "embedding_vjp"):
            seen, again = (np.minimum(u.shares, 1) for u in (use, other))  # more is of arrays shorter than a sector
            assert np.allclose(seen, again, rtol=0.01), name
        if name.startswith("flash_attention"):
            assert use.passes == pytest.approx(other.passes, rel=1e-3), name
            assert use.flop == other.flop, name


def wider(n: int) -> Config:
    """One layer of so many heads, on as many sequences."""
    shape = replace(TINY.gpt, vocab_size=1000, block_size=256, n_head=n, n_embd=traffic.HEAD_DIM * n)
    return Config(shape, replace(TINY.train, batch_size=n))


def test_the_least_possible_is_less_than_what_is_moved(committed):
    for preset, result in committed.items():
        moved = sum(row["bytes"] for row in result["kernels"] if row["kernel"] != report.PRODUCTS)
        assert sum(result["least"].values()) < moved, preset


def test_the_occupancy_of_known_kernels():
    """As NVIDIA's own calculator has it (Nsight Compute's, CUDA 13)."""
    a100, ada, hopper = occupancy.MULTIPROCESSORS.values()
    assert a100.occupancy(256, 32, 0) == 1
    assert a100.occupancy(256, 33, 0) == 0.75  # 40 registers are taken: 48 warps
    assert a100.occupancy(128, 255, 0) == 0.125
    assert ada.occupancy(1024, 16, 0) == pytest.approx(2 / 3)  # one block of 32 warps, of 48
    assert a100.occupancy(32, 16, 0) == 0.5  # 32 blocks
    assert (hopper.occupancy(128, 32, 100 << 10), ada.occupancy(128, 32, 50 << 10)) == (8 / 64, 4 / 48)


def test_what_nvcc_says_is_read():
    said = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'f' for 'sm_80'
ptxas info    : Function properties for f
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 21 registers, used 1 barriers, 128 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function 'g' for 'sm_80'
ptxas info    : Used 8 registers, used 0 barriers, 360 bytes cmem[0]
"""
    assert occupancy.parsed(said) == {"f": {"80": (21, 128)}, "g": {"80": (8, 0)}}


def test_the_table_of_occupancy_has_every_kernel_of_the_steps(committed):
    rows = json.loads((report.RESULTS / "occupancy.json").read_text(encoding="utf-8"))["results"]
    ours = {row["kernel"] for result in committed.values() for row in result["kernels"]}
    ours = {name for name in ours if not name.startswith(("CuPy", report.PRODUCTS))}
    assert {row["kernel"] for row in rows} == ours, "run python bench/gpu_parts.py occupancy --out bench/results"
