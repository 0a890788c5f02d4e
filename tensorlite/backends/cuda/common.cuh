// What every kernel file begins with: types, packs of elements, sums over warps and blocks.
//
// A file is compiled once for each type that arrays are stored in: STORAGE is 64 (double), 32 (float) or 16 (bfloat16).
// Whole numbers come as long long and constants as double, which is how CuPy passes Python's; Real is what is computed.

struct bfloat16 { unsigned short bits; };

#if STORAGE == 64
typedef double Stored;
typedef double Real;
#elif STORAGE == 32
typedef float Stored;
typedef float Real;
#else
typedef bfloat16 Stored;
typedef float Real;
#endif

typedef long long Index;
typedef unsigned long long u64;

#define KERNEL extern "C" __global__ void

#ifndef CUDA_ON_CPU  // where the tests run these files
#define DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) type name[]
#endif

#if STORAGE == 64
constexpr Real LOWEST = -1.7976931348623157e308;  // of all numbers, and still one: LOWEST - LOWEST is not NaN
#else
constexpr Real LOWEST = -3.4028234663852886e38f;
#endif
constexpr int WARP = 32;

__device__ inline Real real(double x) { return (Real)x; }
__device__ inline Real real(float x) { return (Real)x; }
__device__ inline Real real(bfloat16 x) { return __uint_as_float((unsigned)x.bits << 16); }

// To the nearest, ties to even; a NaN stays one.
__device__ inline bfloat16 to_bfloat16(float x) {
#if __CUDA_ARCH__ >= 800
    unsigned short rounded;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(x));
    return {rounded};
#else  // where there is no instruction for it, and on the CPU
    unsigned bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {(unsigned short)(bits >> 16 | 0x40u)};
    return {(unsigned short)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
#endif
}

#if STORAGE == 16
__device__ inline Stored stored(Real x) { return to_bfloat16(x); }
#else
__device__ inline Stored stored(Real x) { return x; }
#endif

// -- packs: what a thread reads or writes at once, 16 bytes of Stored. Arrays that are read so begin at a multiple. --

template <class T, int N> struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Items { T item[N]; };
constexpr int PACK = 16 / sizeof(Stored);
typedef Items<Stored, PACK> Pack;

// Elements [i, i + PACK) of the n of y; what lies beyond them is not touched.
__device__ inline void store_pack(Stored* y, Index i, Index n, const Pack& pack) {
    if (i + PACK <= n) { *(Pack*)(y + i) = pack; return; }
    #pragma unroll
    for (int k = 0; k < PACK; k++) if (i + k < n) y[i + k] = pack.item[k];
}

// y[i + k] = f(k, x[i + k]...) for the elements k of a pack, those below n. No read waits for another, as it would behind
// a test of its own for the end.
template <class F, class... T>
__device__ inline void map_pack(Stored* y, Index i, Index n, F f, const T*... x) {
    if (i + PACK <= n) {
        Pack result;
        auto of_packs = [&](Items<T, PACK>... x) {
            #pragma unroll
            for (int k = 0; k < PACK; k++) result.item[k] = stored(f(k, x.item[k]...));
        };
        of_packs(*(const Items<T, PACK>*)(x + i)...);
        *(Pack*)(y + i) = result;
        return;
    }
    #pragma unroll
    for (int k = 0; k < PACK; k++) if (i + k < n) y[i + k] = stored(f(k, x[i + k]...));
}

// The first element that this thread of the grid is to work on, when each takes `each` in turn.
__device__ inline Index first_element(int each) { return ((Index)blockIdx.x * blockDim.x + threadIdx.x) * each; }

// x * y, which the compiler does not make one operation of with an addition: where the same product is formed twice,
// the difference is to be exactly 0.
__device__ inline float product(float x, float y) { return __fmul_rn(x, y); }
__device__ inline double product(double x, double y) { return __dmul_rn(x, y); }

// -- sums, in an order that depends on nothing but their length --

// A long sum, whose error does not grow with its length: `rest` is what rounding has taken from `total`, and is added with
// the next number (Kahan 1965; Knuth, The Art of Computer Programming 2, 4.2.2, theorem B).
struct Sum {
    Real total = 0, rest = 0;

    __device__ void add(Real x) {
        Real before = total;
        x += rest, total += x;
        Real added = total - before;
        rest = (before - (total - added)) + (x - added);
        if (rest != rest) rest = 0;  // an infinite total stays one
    }

    // Of term(first), term(first + step) and so on, below n: eight at a time, which are read at once. In place of what
    // lies beyond n a term is read again, as a load that depends on a condition would wait for those before it.
    template <class F> __device__ void add(Index first, Index step, Index n, F term) {
        for (Index i = first; i < n; i += 8 * step) {
            Real eight = 0;
            #pragma unroll
            for (int k = 0; k < 8; k++) {
                Index next = i + k * step;
                Real x = term(next < n ? next : i);
                eight += next < n ? x : Real(0);
            }
            add(eight);
        }
    }
};

__device__ inline Real warp_sum(Real x) {
    for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

__device__ inline Real warp_max(Real x) {
    for (int step = WARP / 2; step > 0; step /= 2) x = max(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}

// The sum of x over the threads of the block, for all of them. shared: WARP numbers of the block's own.
__device__ inline Real block_sum(Real x, Real* shared) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    x = warp_sum(x);
    __syncthreads();  // an earlier sum may still be read
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? shared[lane] : Real(0));
}

__device__ inline Real block_max(Real x, Real* shared) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    x = warp_max(x);
    __syncthreads();
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    return warp_max(lane < warps ? shared[lane] : LOWEST);
}
