"""The fused attention kernels, run by the CUDA emulator: values, gradients and independence of the threads' order."""

import math
import mmap
import os
import shutil
import signal
import subprocess
import warnings
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import cuda_on_cpu
import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

import tensorlite

pytestmark = pytest.mark.skipif(bool(cuda_on_cpu.MISSING), reason=cuda_on_cpu.MISSING)

CUDA = Path(tensorlite.__file__).parent / "backends" / "cuda"
SOURCE = "".join((CUDA / name).read_text() for name in ("common.cuh", "flash_attention.cu"))
NVCC = shutil.which("nvcc")
HALF_ULP = 2.0**-8  # what a number can change by, relatively, when it is rounded to bfloat16, of 8 significant bits
POISON = 0x7FC1  # a NaN


@dataclass(frozen=True)
class Case:
    id: str
    T: int
    S: int
    D: int = 64
    B: int = 1
    H: int = 1
    causal: bool = True
    dropout: float = 0.0
    packed: bool = False  # q, k, v and their gradients lie in one array each, as self_attention has them
    members: int = 2  # heads whose blocks begin together, on the way back
    size: float = 1.0  # of q's numbers: large ones make weights that are nearly 0 and 1


CASES = [
    Case("one tile", T=64, S=64),
    Case("one block", T=128, S=128, dropout=0.2),
    Case("several blocks", T=256, S=256, packed=True, dropout=0.2),
    Case("three blocks of keys", T=290, S=300, H=3, dropout=0.2),
    Case("three blocks of keys, no masks", T=65, S=270, causal=False),
    Case("several heads", T=64, S=64, B=2, H=3, packed=True, dropout=0.5),
    Case("ragged", T=100, S=100, packed=True, H=2),
    Case("ragged, with dropout", T=100, S=100, dropout=0.3),
    Case("short", T=17, S=17, B=2, dropout=0.2),
    Case("one query", T=1, S=70),
    Case("one query and key", T=1, S=1),
    Case("one key", T=130, S=1, causal=False, dropout=0.2),
    Case("more keys", T=48, S=150, dropout=0.1, H=2),
    Case("more keys by one", T=128, S=129),
    Case("all keys", T=130, S=65, causal=False, dropout=0.2),
    Case("all keys of a whole tile", T=64, S=128, causal=False),
    Case("sharp", T=96, S=96, size=30.0),
    Case("32 channels", T=144, S=144, D=32, dropout=0.2, packed=True, H=2),
    Case("128 channels", T=96, S=96, D=128, dropout=0.2, packed=True),
    Case("128 channels, three blocks of keys", T=140, S=150, D=128),
    Case("128 channels, ragged", T=50, S=83, D=128, causal=False, dropout=0.2),
]


def to_bf16(x):
    """Rounded to the nearest, as bit patterns."""
    bits = x.astype(np.float32).view(np.uint32)
    return (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16)


def to_double(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


@cache
def kernels(D, source=SOURCE):  # noqa: N803
    return cuda_on_cpu.Module(source, ("-DSTORAGE=16", f"-DHEAD_DIM={D}"))


def launch(kernel, grid, shared, *arguments):
    kernel.max_dynamic_shared_size_bytes = shared
    kernel(grid, (128,), arguments, shared_mem=shared)


def launch_beside(kernel, grid, *rest):
    """In four processes, each of which takes some of the blocks."""
    children = []
    for i in range(4):
        with warnings.catch_warnings(action="ignore"):  # of forking beside BLAS's threads
            pid = os.fork()
        if not pid:
            signal.alarm(60)  # it would wait forever
            try:
                launch(kernel, (len(range(i, *grid, 4)),), *rest)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4


def tensor(x):
    """The four arguments of a kernel that stand for a view (B, H, T, D): its memory and its strides in elements."""
    strides = [stride // x.itemsize for stride in x.strides]
    assert strides.pop() == 1
    extent = x.shape[-1] + sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=False))
    return (as_strided(x, (extent,), (x.itemsize,)), *strides)


def full(shape, value, dtype):
    """As NumPy's, in memory that forked processes share."""
    array = np.frombuffer(mmap.mmap(-1, math.prod(shape) * np.dtype(dtype).itemsize), dtype).reshape(shape)
    array[...] = value
    return array


def poisoned(case, rows, n):
    """n views (B + 1, H, rows, D) full of NaN: of one packed array, or of arrays of their own.

    The last batch is one that the kernels know nothing of, and must neither read nor write.
    """
    if case.packed:
        array = full((case.B + 1, rows, n, case.H, case.D), POISON, np.uint16)
        return [array[:, :, i].swapaxes(1, 2) for i in range(n)]
    return [full((case.B + 1, case.H, rows, case.D), POISON, np.uint16) for _ in range(n)]


def make_inputs(case):
    """q, k, v, gy as bit patterns, and the mask."""
    rng = np.random.default_rng(3)
    q, k, v = poisoned(case, case.T, 3) if case.packed else poisoned(case, case.T, 1) + poisoned(case, case.S, 2)
    (gy,) = poisoned(case, case.T, 1)
    for x, size in (q, case.size), (k, 1.0), (v, 1.0), (gy, 1.0):
        x = x[: case.B]
        x[...] = to_bf16(size * rng.standard_normal(x.shape))
    keep = rng.random((case.B, case.H, case.S, case.T)) >= case.dropout if case.dropout else None
    return q, k, v, gy, keep


def run_kernels(case, source=SOURCE, launch_vjp=launch):
    """y, lse, gq, gk, gv of the emulated kernels, launched as the head of flash_attention.cu says.

    source: of the last one, which launch_vjp launches.
    """
    q, k, v, gy, keep = make_inputs(case)
    rows, step = (128, 64) if case.D <= 64 else (64, 32)
    pitch = 2 * (case.D + 8)
    options = (keep, 1 / (1 - case.dropout), case.D**-0.5, int(case.causal), case.H, case.T, case.S)
    (y,), (gq, gk, gv) = poisoned(case, case.T, 1), poisoned(case, case.T, 3)
    if not case.packed:
        gk, gv = poisoned(case, case.S, 2)
    lse, delta = np.full((2, case.B + 1, case.H, -(-case.T // 128) * 128), np.nan, np.float32)

    kernel = kernels(case.D).get_function
    inputs = (*tensor(q), *tensor(k), *tensor(v))
    heads, blocks, flags = case.B * case.H, -(-case.S // rows), 0 if keep is None else 2 * rows
    shared = pitch * (rows + 4 * step) + flags * (step + 16)
    launch(kernel("flash_attention"), (heads, -(-case.T // rows)), shared, *inputs, *tensor(y), lse, *options)
    sums = full((case.B + 1, case.H, -(-case.T // 32), 32 * case.D), np.nan, np.float32)
    done = full((2 + heads * -(-case.T // 64),), 77, np.uint32)
    grid = heads, -(-case.T * case.D // 1024)
    launch(kernel("flash_attention_delta"), grid, 0, *tensor(y), *tensor(gy), delta, done, case.H, case.T)
    shared = pitch * (2 * rows + 128) + 80 * rows + 512 + flags * 48
    args = *inputs, *tensor(gy), *tensor(gq), *tensor(gk), *tensor(gv), lse, delta, sums, done, case.members, *options
    kernel = kernels(case.D, source).get_function
    launch_vjp(kernel("flash_attention_vjp"), (heads * blocks,), shared, *args)
    assert done[0] == heads * blocks
    assert (done[1:-1] <= blocks).all()
    assert done[-1] == 77
    for x in (y, lse, gq, gk, gv, delta, sums):
        untouched = np.isnan(x) if x.dtype == np.float32 else x == POISON
        assert untouched[case.B :].all()
    return [x[: case.B] for x in (y, lse, gq, gk, gv)]


def reference(case):
    """Of y, lse, gq, gk, gv the values in float64, each with the error that its roundings to bfloat16 may make.

    Rounded are each result, the weights of the second products (dropout(P) and gS), and the y that delta is made of.
    """
    *arrays, keep = make_inputs(case)
    q, k, v, gy = (to_double(x[: case.B]) for x in arrays)
    scale, dropped = case.D**-0.5, 1.0 if keep is None else keep.swapaxes(-1, -2) / (1 - case.dropout)

    def T(x):  # noqa: N802
        return x.swapaxes(-1, -2)

    scores = q @ T(k) * scale
    if case.causal:
        scores[..., ~np.tri(case.T, case.S, case.S - case.T, dtype=bool)] = -np.inf
    lse = np.log(np.exp(scores - scores.max(-1, keepdims=True)).sum(-1, keepdims=True)) + scores.max(-1, keepdims=True)
    P = np.exp(scores - lse)
    lse[(scores > -np.inf).sum(-1) == 1] = 0.0  # the kernels put 0 for the score of a query's only key
    W = P * dropped
    y, gw = W @ v, gy @ T(v)
    gs = (W * gw - P * (gy * y).sum(-1, keepdims=True)) * scale
    gs_error = np.abs(gs) + P * (np.abs(gy) * (np.abs(y) + W @ np.abs(v))).sum(-1, keepdims=True) * scale
    values = (y, lse[..., 0] / np.log(2), gs @ k, T(gs) @ q, T(W) @ gy)
    errors = (W @ np.abs(v), 0, gs_error @ np.abs(k), T(gs_error) @ np.abs(q), T(W) @ np.abs(gy))
    errors = [HALF_ULP * (np.abs(x) + error) for x, error in zip(values, errors, strict=True)]
    errors[1] = 0.0  # lse is not rounded to bfloat16
    return list(zip(values, errors, strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_values_and_gradients(case):
    y, lse, *gradients = run_kernels(case)
    got = [to_double(y), lse[..., : case.T], *map(to_double, gradients)]
    for name, x, (expected, error) in zip(("y", "lse", "gq", "gk", "gv"), got, reference(case), strict=True):
        # What is computed in float32 adds little: sums of a hundred terms, and exponentials of sums of a hundred.
        excess = np.abs(x - expected) / (error + 1e-5 * max(1.0, np.abs(expected).max()))
        assert excess.max() <= 1, f"{name}: {excess.max():.2f} times the error that its roundings may make"


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[7], CASES[-1]], ids=lambda case: case.id)
def test_the_order_of_threads_changes_no_bit(case, order):
    expected = run_kernels(case)
    with cuda_on_cpu.thread_order(order):
        got = run_kernels(case)
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_array_equal(x, y)


SIDE_BY_SIDE = {  # what the last kernel is to be where blocks do not run one after another
    "__trap();": "sched_yield();",
    "atomicAdd(done, 1u)": "__atomic_fetch_add(done, 1u, __ATOMIC_SEQ_CST)",
    "gridDim.x / blocks": "3",
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no processes that share memory")
@pytest.mark.parametrize("members", [1, 2, 3])
def test_blocks_side_by_side_add_in_their_order(members):
    case, source = replace(CASES[3], members=members), 'extern "C" int sched_yield();\n' + SOURCE
    for alone, beside in SIDE_BY_SIDE.items():
        assert source.count(alone) == 1
        source = source.replace(alone, beside)
    for x, y in zip(run_kernels(case, source, launch_beside), run_kernels(CASES[3]), strict=True):
        np.testing.assert_array_equal(x, y)


def test_other_storage_has_no_such_kernels():
    assert cuda_on_cpu.Module(SOURCE, ("-DSTORAGE=32",)).names == []


@pytest.mark.skipif(NVCC is None, reason="nvcc is not here")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_registers_are_enough(architecture, tmp_path):
    (tmp_path / "kernels.cu").write_text(SOURCE)
    command = (
        f"{NVCC} -cubin -arch={architecture} -std=c++17 -DSTORAGE=16 --ptxas-options=-v kernels.cu -o kernels.cubin"
    )
    done = subprocess.run(command.split(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(" 0 bytes spill stores, 0 bytes spill loads") == 3, done.stderr
    assert "bytes smem" not in done.stderr, "the launcher asks for all 99 KB that a block may have"
