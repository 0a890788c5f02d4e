"""The runner of CUDA kernels on the CPU: known answers, and planted bugs of which each must be noticed."""

import concurrent.futures
import re
import tempfile

import cuda_on_cpu
import numpy as np
import pytest
from cuda_on_cpu import GXX, KernelError, Module, thread_order

pytestmark = pytest.mark.skipif(GXX is None, reason=cuda_on_cpu.MISSING)

ORDERS = (0, 1, 2, 3, 7)
RNG = np.random.default_rng(0)

# --- known answers ---

CODE = """
#define KERNEL extern "C" __global__ void
struct bfloat16 { unsigned short bits; };
constexpr unsigned ALL = 0xffffffffu;

KERNEL arguments(const float* x, double* y, const bfloat16* z, unsigned char* mask, const void* any, long long n,
                 double a, bool flag, int i, float b, unsigned long long seed) {
    y[0] = double(x[0]) + (z ? z[0].bits : -1) + mask[0] + n + a + flag + i + b + (any != nullptr) + double(seed >> 60);
}

KERNEL __launch_bounds__(64) indices(unsigned* out) {
    unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    out[block * (blockDim.x * blockDim.y * blockDim.z) + thread] = block * 1000 + thread;
}

#define ROTATED(T, name)                                                                       \\
    KERNEL name(const T* x, T* y) {                                                            \\
        DYNAMIC_SHARED(T, shared);                                                             \\
        shared[threadIdx.x] = x[threadIdx.x];                                                  \\
        __syncthreads();                                                                       \\
        y[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];                               \\
    }
ROTATED(float, rotate_floats)
ROTATED(double, rotate_doubles)

KERNEL block_sum(const float* x, float* sums, int* count, long long n) {
    __shared__ float part[32];
    float sum = 0;
    for (long long i = threadIdx.x; i < n; i += blockDim.x) sum += x[blockIdx.x * n + i];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(ALL, sum, step);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    sum = threadIdx.x < blockDim.x / 32 ? part[threadIdx.x] : 0;
    for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(ALL, sum, step);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum, atomicAdd(count, 1);
}

KERNEL shuffles(const long long* x, long long* out) {
    unsigned lane = threadIdx.x;
    long long v = x[lane];
    out[lane] = __shfl_sync(ALL, v, 5);
    out[32 + lane] = __shfl_sync(ALL, v, int(lane + 1), 8);
    out[64 + lane] = __shfl_up_sync(ALL, v, 3);
    out[96 + lane] = __shfl_down_sync(ALL, v, 3, 16);
    out[128 + lane] = __shfl_xor_sync(ALL, v, 9);
    out[160 + lane] = __ballot_sync(ALL, lane % 3 == 0);
    out[192 + lane] = __any_sync(ALL, lane == 7) * 100 + __any_sync(ALL, lane > 31) * 10 + __all_sync(ALL, lane < 32);
    if (lane < 16) {  // each half apart, and one of them more often
        for (int i = 0; i < 5; i++) v = __shfl_xor_sync(0xffffu, v, 1);
    } else {
        v = __shfl_xor_sync(0xffff0000u, v, 2);
    }
    out[224 + lane] = v;
}

template <class T> __device__ T sum_of_two(T x, T y) {
    __shared__ T shared[2][32];  // one for each T
    shared[0][threadIdx.x] = x;
    shared[1][threadIdx.x] = y;
    __syncwarp();
    return shared[0][31 - threadIdx.x] + shared[1][31 - threadIdx.x];
}
KERNEL sums_of_two(double* out) {
    out[threadIdx.x] = sum_of_two(threadIdx.x, 1u) + sum_of_two(0.5 * threadIdx.x, 1.0);
}

KERNEL maths(float x, double y, float* f, double* d) {
    int i = 0, j = 0;
    f[i++] = exp(x), f[i++] = expf(x), f[i++] = __expf(x), f[i++] = max(x, __uint_as_float(0x7fc00000u));
    f[i++] = rsqrt(x), f[i++] = tanh(x), f[i++] = fmaxf(x, 2.f), f[i++] = min(1, 2), f[i++] = abs(-3);
    d[j++] = exp(y), d[j++] = erf(y), d[j++] = max(x, 0.1), d[j++] = pow(y, 3), d[j++] = rsqrt(y), d[j++] = abs(-y);
    d[j++] = max(-1LL, 2LL), d[j++] = max(-1, 1u), d[j++] = __float2int_rn(2.5f), d[j++] = __float2uint_rz(-7.f);
    d[j++] = __umulhi(0x80000000u, 6u), d[j++] = double(__umul64hi(1ull << 63, 6ull)), d[j++] = __double2int_rn(1e10);
    d[j++] = sizeof(exp(x)) + sizeof(max(x, y)) + sizeof(float4) + alignof(uint2);
}

// 16 rows of a times 8 columns of b, given as 8 rows: the numbers straight from global memory.
KERNEL product(const bfloat16* a, const bfloat16* b, float* c, int k) {
    const unsigned *pairs_of_a = (const unsigned*)a, *pairs_of_b = (const unsigned*)b;
    int g = threadIdx.x / 4, t = threadIdx.x % 4, width = k / 2;
    float d[4] = {};
    for (int at = t; at < width; at += 8) {
        unsigned x[4] = {pairs_of_a[g * width + at], pairs_of_a[(g + 8) * width + at], pairs_of_a[g * width + at + 4],
                         pairs_of_a[(g + 8) * width + at + 4]};
        unsigned y[2] = {pairs_of_b[g * width + at], pairs_of_b[g * width + at + 4]};
        mma_bf16(d, x, y);
    }
    for (int i = 0; i < 4; i++) c[(g + i / 2 * 8) * 8 + t * 2 + i % 2] = d[i];
}

// The same of matrices with the whole k, through shared memory, in two stages: b has k rows here.
KERNEL staged_product(const bfloat16* a, const bfloat16* b, float* c, int k) {
    __shared__ alignas(16) bfloat16 tile_a[2][16][16], tile_b[2][16][8];
    int lane = threadIdx.x;
    float d[4] = {};
    for (int stage = 0; stage <= k / 16; stage++) {
        if (stage < k / 16) {
            cp_async16(&tile_a[stage % 2][lane / 2][lane % 2 * 8], a + lane / 2 * k + stage * 16 + lane % 2 * 8);
            if (lane < 16) cp_async16(tile_b[stage % 2][lane], b + (stage * 16 + lane) * 8);
        }
        cp_async_commit();
        if (stage == 0) continue;
        cp_async_wait<1>();
        __syncwarp();
        unsigned x[4], y[4], z[2];
        int last = (stage - 1) % 2;
        ldmatrix_x4(x, &tile_a[last][lane % 16][lane / 16 * 8]);
        ldmatrix_x4_trans(y, tile_b[last][lane % 16]);
        z[0] = y[0], z[1] = y[1];
        mma_bf16(d, x, z);
        __syncwarp();
    }
    for (int i = 0; i < 4; i++) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

#if STORAGE == 16
KERNEL only_for_16(float* x) { x[0] = 16; }
#endif
"""
OPTIONS = ("-DSTORAGE=16", "--use_fast_math")


@pytest.fixture(scope="module", params=["assembler", "ucontext"])
def run(request):
    """Calls a kernel of CODE, with either way to switch between threads."""
    fallback = ("-DCUDA_ON_CPU_UCONTEXT",) if request.param == "ucontext" else ()
    module = Module(CODE, OPTIONS + fallback)
    return lambda name, *launch, **options: module.get_function(name)(*launch, **options)


def bfloat16(x) -> np.ndarray:
    """Numbers cut to the upper half of their bits, and those bits."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32) >> 16
    return (bits << 16).view(np.float32), bits.astype(np.uint16)


def test_arguments_arrive(run):
    x, y, z, mask = np.full(1, 0.5, np.float32), np.zeros(1), np.full(1, 3, np.uint16), np.ones(1, bool)
    scalars = (np.int32(-20), np.float32(0.25), np.uint64(15 << 60))
    run("arguments", (1,), (1,), (x, y, z, mask, None, 2**40, 0.125, True, *scalars))
    assert y[0] == 0.5 + 3 + 1 + 2**40 + 0.125 + 1 - 20 + 0.25 + 15
    run("arguments", (1,), (1,), (x, y, None, mask, x, np.int64(-7), np.float64(1), np.False_, *scalars))
    assert y[0] == 0.5 - 1 + 1 - 7 + 1 - 20 + 0.25 + 1 + 15


def test_names_are_those_the_preprocessor_leaves():
    names = ["arguments", "indices", "rotate_floats", "rotate_doubles", "block_sum", "shuffles", "sums_of_two", "maths"]
    assert Module(CODE, OPTIONS).names == [*names, "product", "staged_product", "only_for_16"]
    assert "only_for_16" not in Module(CODE, ("-DSTORAGE=32",)).names
    with pytest.raises(KeyError, match="only_for_16"):
        Module(CODE, ("-DSTORAGE=32",)).get_function("only_for_16")


@pytest.mark.parametrize("order", ORDERS)
def test_indices(run, order):
    out = np.zeros((3 * 2 * 4, 5 * 2 * 3), np.uint32)
    with thread_order(order):
        run("indices", (3, 2, 4), (5, 2, 3), (out,))
    np.testing.assert_array_equal(out, np.arange(24)[:, None] * 1000 + np.arange(30))


@pytest.mark.parametrize("order", ORDERS)
def test_reductions_and_barriers(run, order):
    x, sums, count = RNG.standard_normal((7, 500)).astype(np.float32), np.empty(7, np.float32), np.zeros(1, np.int32)
    with thread_order(order):
        for block in (32, 256, 1024):
            run("block_sum", (7,), (block,), (x, sums, count, 500))
            np.testing.assert_allclose(sums, x.astype(float).sum(1), atol=1e-4)
        out = np.empty(32)
        run("sums_of_two", (1,), (32,), (out,))
        np.testing.assert_array_equal(out, 1.5 * (31 - np.arange(32)) + 2)
        for name, dtype in (("rotate_floats", np.float32), ("rotate_doubles", np.float64)):
            y = np.arange(100, dtype=dtype)
            run(name, (1,), (100,), (y.copy(), y), shared_mem=y.nbytes)
            np.testing.assert_array_equal(y, (np.arange(100) + 1) % 100)
    assert count == 21


@pytest.mark.parametrize("order", ORDERS)
def test_shuffles_and_votes(run, order):
    x, out, lane = RNG.integers(-(2**60), 2**60, 32), np.empty((8, 32), np.int64), np.arange(32)
    with thread_order(order):
        run("shuffles", (1,), (32,), (x, out))
    expected = [
        np.full(32, x[5]),
        x[lane // 8 * 8 + (lane + 1) % 8],
        x[np.where(lane < 3, lane, lane - 3)],
        x[np.where(lane % 16 + 3 < 16, lane + 3, lane) % 32],
        x[lane ^ 9],
        np.full(32, sum(1 << i for i in range(0, 32, 3))),
        np.full(32, 101),
        x[np.where(lane < 16, lane ^ 1, lane ^ 2)],
    ]
    np.testing.assert_array_equal(out, expected)


def test_maths(run):
    x, y = np.float32(0.7), 1.3
    f, d = np.zeros(9, np.float32), np.zeros(14)
    run("maths", (1,), (1,), (x, y, f, d))
    np.testing.assert_allclose(f, [*[np.exp(x)] * 3, x, x**-0.5, np.tanh(x), 2, 1, 3], rtol=1e-6)
    expected = [np.exp(y), 0.9340079449406524, x, y**3, y**-0.5, y, 2, 2**32 - 1, 2, 0, 3, 3, 2**31 - 1, 4 + 8 + 16 + 8]
    np.testing.assert_allclose(d, expected, rtol=1e-14)


@pytest.mark.parametrize("order", ORDERS)
def test_tensor_cores(run, order):
    (a, bits_a), (b, bits_b) = bfloat16(RNG.standard_normal((16, 64))), bfloat16(RNG.standard_normal((64, 8)))
    with thread_order(order):
        for name, columns in (("product", np.ascontiguousarray(bits_b.T)), ("staged_product", bits_b)):
            c = np.full((16, 8), np.nan, np.float32)
            run(name, (1,), (32,), (bits_a, columns, c, np.int32(64)))
            np.testing.assert_allclose(c, a.astype(float) @ b, rtol=1e-5, atol=1e-5)


# --- planted bugs ---

# The rows of x, of 384 numbers, less their mean and divided by their deviation. _N is a number for each variant.
CLEAN = """
__device__ inline float block_sum_N(float v, float* shared) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
    __syncthreads();  // before
    if (lane == 0) shared[warp] = v;
    __syncthreads();  // after
    v = lane < 8 ? shared[lane] : 0;
    for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
    return v;
}
extern "C" __global__ void __launch_bounds__(256) normalize_N(const float* x, float* y, long long C, double eps) {
    __shared__ float shared[32], other[8];
    __shared__ __align__(16) float row[384];
    DYNAMIC_SHARED(float, extra);
    float mean = 0, square = 0, end;
    int zero = C - 384;  // which the compiler does not know
    for (int i = threadIdx.x; i < C / 4; i += blockDim.x) cp_async16(row + 4 * i, x + blockIdx.x * C + 4 * i);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    for (int i = threadIdx.x; i < C; i += blockDim.x) mean += row[i] / C;
    mean = block_sum_N(mean, shared);
    for (int i = threadIdx.x; i < C; i += blockDim.x) square += (row[i] - mean) * (row[i] - mean);
    float scale = rsqrtf(block_sum_N(square, shared) / C + eps);
    // here
    for (int i = threadIdx.x; i < C; i += blockDim.x) y[blockIdx.x * C + i] = (row[i] - mean) * scale;
}
"""
WRONG = "wrong numbers"  # in some order of the threads
BUGS = {  # name: (what is replaced, by what, how it must be noticed: WRONG, or the error's text)
    "no barrier before": ("__syncthreads();  // before", "", WRONG),
    "no barrier after": ("__syncthreads();  // after", "", WRONG),
    "no barrier after the copy": ("cp_async_wait<0>();\n    __syncthreads();", "cp_async_wait<0>();", WRONG),
    "no wait for the copy": ("cp_async_wait<0>();", "", WRONG),
    "no commit of the copy": ("cp_async_commit();", "", WRONG),
    "wait that does not cover the copy": ("cp_async_wait<0>();", "cp_async_wait<1>();", WRONG),
    "shared memory read beyond what was written": ("lane < 8 ? shared[lane] : 0", "shared[lane]", WRONG),
    "shared memory never written": ("// here", "scale += other[0];", WRONG),
    "dynamic shared memory never written": ("// here", "scale += extra[0];", WRONG),
    "local variable never written": ("// here", "scale += end;", WRONG),
    "barrier under a condition": (
        "// here", "if (threadIdx.x < 100) __syncthreads();\n    __syncthreads();", "divergent"
    ),
    "barrier without those that have ended": (
        "// here", "if (threadIdx.x < 100) return;\n    __syncthreads();", "divergent"
    ),
    "barrier under a condition, and the end": ("// here", "if (threadIdx.x < 100) __syncthreads();", "divergent"),
    "shuffle under a condition": ("// here", "if (threadIdx.x < 16) scale = __shfl_sync(~0u, scale, 0);", "ended"),
    "shuffle without those that have ended": (
        "// here", "if (threadIdx.x % 32 == 3) return;\n    scale = __shfl_sync(~0u, scale, 0);", "ended"
    ),
    "shuffle for some, barrier for others": (
        "// here", "if (threadIdx.x < 16) scale = __shfl_sync(~0u, scale, 0);\n    __syncthreads();", "deadlock"
    ),
    "shuffles at two places": (
        "// here", "if (threadIdx.x % 2) __shfl_sync(~0u, scale, 0);\n    else __shfl_sync(~0u, scale, 0);", "another"
    ),
    "shuffle from a lane outside the mask": ("// here", "scale = __shfl_sync(~1u << 0 | 1u << 9, scale, 0);", "mask"),
    "shuffle that reads outside the mask": (
        "// here", "if (threadIdx.x % 32) scale = __shfl_sync(~1u, scale, 0);", "not in the mask"
    ),
    "two masks": ("// here", "scale = __shfl_sync(threadIdx.x % 2 ? ~0u : ~2u, scale, 0);", "mask"),
    "tensor cores with half a warp": (
        "// here",
        "float d[4] = {}; unsigned a[4] = {}, b[2] = {}; if (threadIdx.x % 32 < 16) return; mma_bf16(d, a, b);",
        "ended",
    ),
    "matrix loaded by lanes that have gone apart": (
        "// here",
        "unsigned r[4]; if (threadIdx.x % 32 < 8) cp_async16(row, x); ldmatrix_x4(r, row);",
        "without a __syncwarp",
    ),
    "row of a matrix at an odd address": ("// here", "unsigned r[4]; ldmatrix_x4(r, row + 1);", "modulo 16"),
    "row of a matrix in global memory": ("// here", "unsigned r[4]; ldmatrix_x4(r, x);", "shared memory"),
    "copy to an odd address": ("row + 4 * i, x", "row + 4 * i + 1, x", "modulo 16"),
    "copy to global memory": ("row + 4 * i, x", "y, x", "shared memory"),
    "index of shared memory out of range": ("// here", "other[threadIdx.x / 28] = 1;", "index [89] of an array 'float"),
    "index of a local array out of range": ("// here", "float a[3] = {}; a[threadIdx.x % 4] = scale;", "index 3 of"),
    "dynamic shared memory too small": ("// here", "extra[threadIdx.x] = extra[threadIdx.x + 16 * 1024];", "dynamic"),
    "vector at an odd address": ("// here", "scale += ((const float4*)(x + 1))->x;", "modulo 16"),
    "null pointer": ("// here", "scale += *(const float*)(long long)zero;", "null pointer"),
    "division by zero": ("// here", "scale += threadIdx.x / zero;", "division by zero"),
    "trap": ("// here", "if (threadIdx.x == 70) __trap();", "__trap"),
}  # fmt: skip


@pytest.fixture(scope="module")
def normalize():
    """Launches the variant of that number: number 0 is the clean one."""
    variants = [CLEAN, *(CLEAN.replace(old, new) for old, new, _ in BUGS.values())]
    assert len(set(variants)) == len(variants)
    module = Module("".join(variant.replace("_N", f"_{i}") for i, variant in enumerate(variants)))

    def launch(number: int, order: int) -> float:
        """How wrong the numbers are."""
        x = np.random.default_rng(1).standard_normal((3, 384)).astype(np.float32) * 3 + 1
        y = np.full_like(x, np.nan)
        with thread_order(order):
            module.get_function(f"normalize_{number}")((3,), (256,), (x, y, 384, 1e-5), shared_mem=1024)
        wide = x.astype(float)
        expected = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + 1e-5)
        return np.abs(y - expected).max()

    return launch


def test_the_clean_kernel_passes(normalize):
    assert max(normalize(0, order) for order in ORDERS) < 1e-5


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_noticed(normalize, bug):
    number, noticed = list(BUGS).index(bug) + 1, BUGS[bug][2]
    if "local variable" in bug and cuda_on_cpu.GARBAGE not in cuda_on_cpu._compile_flags():
        pytest.skip("g++ before version 12 does not fill local variables")
    if noticed == WRONG:
        assert not all(normalize(number, order) < 1e-3 for order in ORDERS)
        return
    for order in ORDERS:
        with pytest.raises(KernelError, match=rf"(?s)normalize_{number}: .*{noticed}.*block .*thread"):
            normalize(number, order)
        assert normalize(0, order) < 1e-5  # nothing is left of the launch that failed


def test_warps_that_are_not_whole():
    module = Module(CODE, OPTIONS)
    with pytest.raises(KernelError, match="shuffles: .*reads lane .*, which is beyond the block"):
        module.get_function("shuffles")((1,), (20,), (np.zeros(32, np.int64), np.zeros(300, np.int64)))
    bits = np.zeros(16 * 16, np.uint16)
    with pytest.raises(KernelError, match="product: .*mma in a warp of 20 lanes"):
        module.get_function("product")((1,), (20,), (bits, bits, np.zeros(128, np.float32), np.int32(16)))


def test_an_error_shows_the_line(normalize):
    number = list(BUGS).index("trap") + 1
    with pytest.raises(KernelError) as error:
        normalize(number, 0)
    at = "block (0, 0, 0), thread (70, 0, 0)"
    assert re.fullmatch(
        rf"normalize_{number}: line \d+, 'if \(threadIdx.x == 70\) __trap\(\);': .*; {re.escape(at)}", str(error.value)
    )


# --- wrong calls ---

X, Y = np.zeros(4, np.float32), np.zeros(4, np.float64)
RIGHT = (X, Y, np.zeros(1, np.uint16), np.zeros(1, bool), None, 3, 1.0, True, np.int32(1), np.float32(1), 7)
READ_ONLY = np.zeros(4)
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, Y, "x: expected an array for const float*, got one of float64"),
        (0, np.zeros(4, np.int32), "int32"),
        (0, X.astype(">f4"), ">f4"),
        (0, 3, "expected an array"),
        (0, X.tolist(), "expected an array"),
        (0, np.zeros((4, 4), np.float32).T, "contiguous"),
        (0, np.zeros(8, np.float32)[::2], "contiguous"),
        (1, READ_ONLY, "read-only"),
        (2, np.zeros(1, np.float16), "bfloat16"),
        (2, np.zeros(1, np.int64), "bfloat16"),
        (3, np.zeros(1, np.float32), "unsigned char"),
        (5, 3.0, "n: expected long long, got 3.0, which is passed as double"),
        (5, True, "passed as bool"),
        (5, np.int32(3), "int32"),
        (5, X, "long long"),
        (5, None, "long long"),
        (6, 1, "passed as long long"),
        (6, np.float32(1), "float32"),
        (7, 1, "bool"),
        (8, 1, "expected int, got 1, which is passed as long long"),
        (8, np.int64(1), "int64"),
        (9, 1.0, "passed as double"),
        (10, np.float64(1), "seed"),
    ],
)
def test_arguments_must_fit_the_parameters(position, wrong, message):
    kernel = Module(CODE, OPTIONS).get_function("arguments")
    kernel((1,), (1,), RIGHT)
    args = (*RIGHT[:position], wrong, *RIGHT[position + 1 :])
    with pytest.raises(TypeError, match=rf"^arguments, argument {position + 1} .*{re.escape(message)}"):
        kernel((1,), (1,), args)


@pytest.mark.parametrize("count", [0, 10, 12])
def test_their_number_must_be_right(count):
    with pytest.raises(TypeError, match=f"arguments takes 11 arguments, got {count}"):
        Module(CODE, OPTIONS).get_function("arguments")((1,), (1,), (RIGHT + (1,))[:count])


@pytest.mark.parametrize(
    ("grid", "block", "shared_mem", "message"),
    [
        ((0,), (32,), 0, "bad grid: 0 along x"),
        ((1, 70000), (32,), 0, "bad grid: 70000 along y"),
        ((1,), (0,), 0, "bad block: 0 along x"),
        ((1,), (1, 1, 65), 0, "bad block: 65 along z"),
        ((1,), (8, 9), 0, "72 threads, at most 64 can be"),
        ((1,), (32,), 50_000, "max_dynamic_shared_size_bytes"),
    ],
)
def test_launches_must_be_possible(grid, block, shared_mem, message):
    with pytest.raises(KernelError, match=f"indices: .*{message}"):
        Module(CODE, OPTIONS).get_function("indices")(grid, block, (np.zeros(1, np.uint32),), shared_mem=shared_mem)


def test_more_shared_memory_must_be_asked_for():
    kernel = Module(CODE, OPTIONS).get_function("rotate_floats")
    kernel.max_dynamic_shared_size_bytes = 100_000
    y = np.arange(1024, dtype=np.float32)
    kernel((1,), (1024,), (y.copy(), y), shared_mem=100_000)
    assert y[-1] == 0


# --- compiling ---


def test_what_the_compiler_refuses_is_shown():
    with pytest.raises(RuntimeError, match=r"kernels.cu:2:.*undeclared|kernels.cu:2:.*not declared"):
        Module('extern "C" __global__ void f(float* x) {\n    x[0] = missing;\n}')


def test_several_may_compile_the_same_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = 'extern "C" __global__ void f(float* x) { x[0] = 7; }'
    load = cuda_on_cpu._library.__wrapped__
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: load(code, ()), range(4)))
    (folder,) = tmp_path.iterdir()
    assert [path.suffix for path in folder.iterdir()] == [".so"]
    folder.chmod(0o777)
    with pytest.raises(RuntimeError, match="others"):
        load(code, ())
