// Tokens: cutting blocks out of a text, the gradient of a table that tokens are looked up in, and the loss.

// Row i of x and y (rows, T): tokens starts[i] + t and starts[i] + t + 1. A token is `width` bytes.
KERNEL gather_blocks(const unsigned char* tokens, Index width, const Index* starts, Index* x, Index* y, Index rows,
                     Index T) {
    Index i = first_element(1);
    if (i >= rows * T) return;
    Index at = starts[i / T] + i % T;
    for (int next = 0; next < 2; next++, at++) {
        Index token = width == 1 ? tokens[at] : width == 2 ? ((const unsigned short*)tokens)[at]
                                                           : ((const int*)tokens)[at];
        (next ? y : x)[i] = token;
    }
}

// -- the gradient of a table --

// Row r of sums (slabs, rows, C), for each slab of the ids: the sum of the rows of gy (N, C) that have the id r, in
// their order. An id outside of the table is passed over, and nothing but the rows of its own id reaches a row.
//
// A block takes a slab, a piece of the columns and every 2^shift-th row of the table: frequent ids are neighbours in
// many a vocabulary, and fall to different blocks. It sorts its tokens by their ids, by counting (Knuth, The Art of
// Computer Programming 3, 5.2, algorithm D). Each warp counts those of its part of the slab. Each row gets a stretch of
// `order` (pieces, N), in which the warps follow one another, and each warp writes its tokens there as they come. Then
// a thread takes a column. Which stretch is a row's is left to chance, as no sum depends on it.
KERNEL embedding_vjp(const Stored* __restrict__ gy, const Index* __restrict__ ids, int* order, Real* __restrict__ sums,
                     Index N, Index C, Index rows, Index shift) {
    DYNAMIC_SHARED(int, starts);  // (1 + warps, own): of the rows' stretches; behind it, of what a warp writes in each
    __shared__ int unused;        // where the part of order begins that no row has yet
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    int own = (int)((rows - 1) >> shift) + 1, *written = starts + (1 + warp) * own;
    int block = blockIdx.x, blocks = gridDim.x, n = (int)N;
    int slab = (n - 1) / (int)gridDim.z + 1, first = blockIdx.z * slab;
    int part = ((slab - 1) / (int)blockDim.x + 1) * WARP, begin = first + warp * part;
    int end = min(begin + part, min(first + slab, n));
    auto block_of = [&](Index id) { return id >= 0 && id < rows ? (int)id & (blocks - 1) : blocks; };

    for (int k = threadIdx.x; k < (1 + warps) * own; k += blockDim.x) starts[k] = 0;
    if (threadIdx.x == 0) unused = blockIdx.y * n + first;
    __syncthreads();
    int before = 0;  // tokens of the blocks before this one, for whom the first places are
    for (int i = begin + lane; i < end; i += WARP) {
        Index id = ids[i];
        before += block_of(id) < block;
        if (block_of(id) == block) atomicAdd(&written[id >> shift], 1);
    }
    if (before) atomicAdd(&unused, before);
    __syncthreads();
    for (int row = threadIdx.x; row < own; row += blockDim.x) {
        int tokens = 0;
        for (int w = 1; w <= warps; w++) {
            int count = starts[w * own + row];
            starts[w * own + row] = tokens;
            tokens += count;
        }
        starts[row] = atomicAdd(&unused, tokens);
    }
    __syncthreads();
    for (int start = begin; start < end; start += WARP) {
        int i = start + lane;
        Index id = i < end ? ids[i] : -1;
        for (unsigned left = __ballot_sync(0xffffffffu, block_of(id) == block); left; left &= left - 1) {
            if (lane == __ffs(left) - 1) order[starts[id >> shift] + written[id >> shift]++] = i;
            __syncwarp();
        }
    }
    __syncthreads();
    Index c = (Index)blockIdx.y * blockDim.x + threadIdx.x;
    const Stored* column = gy + min(c, C - 1);
    for (Index row = block; row < rows; row += blocks) {
        int from = starts[row >> shift], to = from + starts[warps * own + (row >> shift)];  // which the last warp knows
        Sum sum;
        for (; from < to; from += WARP) {
            int mine = order[min(from + lane, to - 1)];
            auto token = [&](int k) { return __shfl_sync(0xffffffffu, mine, k); };
            sum.add(0, 1, min(WARP, to - from), [&](int k) { return real(column[token(k) * C]); });
        }
        if (c < C) sums[(blockIdx.z * rows + row) * C + c] = sum.total;
    }
}

// -- cross-entropy: a block takes a row of the logits (N, V), which begin `pitch` after one another. A row whose target
// is `ignored` counts for nothing. --

#if STORAGE == 16 && !defined(CUDA_ON_CPU)
// Less exact than what exp does, in a third of the instructions: with exp they would take longer than memory does.
__device__ inline float exponential(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
    return y;
}
#else
__device__ inline Real exponential(Real x) { return exp(x); }
#endif

// x = elements [i, i + PACK) of a row of n that may begin anywhere; -inf in place of what lies beyond it.
__device__ inline void load_reals(Real (&x)[PACK], const Stored* row, int i, int n) {
    if (i + PACK <= n && (u64)row % 16 == 0) {
        Pack pack = *(const Pack*)(row + i);
        #pragma unroll
        for (int k = 0; k < PACK; k++) x[k] = real(pack.item[k]);
        return;
    }
    #pragma unroll
    for (int k = 0; k < PACK; k++) x[k] = i + k < n ? real(row[i + k]) : real(__uint_as_float(0xff800000u));
}

// losses = log(sum(exp(logits))) - logits[target], NaN for a target that is no symbol; lse keeps the logarithm. One
// pass: a thread's sum is in units of exp(highest), of the logits that it has met (Milakov and Gimelshein 2018).
KERNEL cross_entropy(const Stored* __restrict__ logits, Index pitch, const Index* targets, Real* losses, Real* lse,
                     Index V, Index ignored) {
    __shared__ Real shared[WARP];
    Index row = blockIdx.x, target = targets[row];
    logits += row * pitch;
    bool known = target >= 0 && target < V;
    Real wanted = known ? real(logits[target]) : real(__uint_as_float(0x7fc00000u));
    Real highest = LOWEST, sum = 0, x[PACK];
    for (int i = threadIdx.x * PACK, n = (int)V; i < n; i += blockDim.x * PACK) {
        load_reals(x, logits, i, n);
        Real before = highest;
        #pragma unroll
        for (int k = 0; k < PACK; k++) highest = max(highest, x[k]);
        sum *= exponential(before - highest);
        #pragma unroll
        for (int k = 0; k < PACK; k++) sum += exponential(x[k] - highest);
    }
    Real highest_of_all = block_max(highest, shared);
    Real log_sum = log(block_sum(sum * exponential(highest - highest_of_all), shared)) + highest_of_all;
    if (threadIdx.x) return;
    lse[row] = log_sum;
    losses[row] = target == ignored ? Real(0) : log_sum - wanted;
}

// glogits = (softmax(logits) - onehot(target)) * gy; gy has one number for each row, or if gy_step is 0 one for all.
KERNEL cross_entropy_vjp(const Real* gy, Index gy_step, const Stored* __restrict__ logits, Index pitch,
                         const Index* targets, const Real* lse, Stored* __restrict__ glogits, Index gpitch, Index V,
                         Index ignored) {
    Index row = blockIdx.x, target = targets[row];
    Real g = gy[row * gy_step], log_sum = lse[row], x[PACK];
    logits += row * pitch, glogits += row * gpitch;
    bool counts = target != ignored;
    for (int i = threadIdx.x * PACK, n = (int)V; i < n; i += blockDim.x * PACK) {
        Pack pack = {};
        if (counts) {
            load_reals(x, logits, i, n);
            #pragma unroll
            for (int k = 0; k < PACK; k++) pack.item[k] = stored(exponential(x[k] - log_sum) * g);
        }
        store_pack(glogits, i, n, pack);
    }
    if (counts && target >= 0 && target < V && (int)target / PACK % blockDim.x == threadIdx.x)  // it wrote that pack
        glogits[target] = stored((exponential(real(logits[target]) - log_sum) - 1) * g);
}
