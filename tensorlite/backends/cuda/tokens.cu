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

// -- the gradient of a table (rows, C), whose row r is the sum of the rows of gy (N, C) that have the id r. An id outside
// of the table is passed over, and nothing but the rows of its own id reaches a row. --

// y[c] = the sum of those rows of gy that have this id, in their order, of every gridDim.z-th piece of the ids. By a block
// that looks for them together, a piece at a time; then a thread takes a column.
__device__ void add_rows_of(Index id, const Stored* gy, const Index* ids, Real* y, Index N, Index C) {
    __shared__ Index found[WARP * WARP];
    __shared__ unsigned masks[WARP];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    Index c = (Index)blockIdx.y * blockDim.x + threadIdx.x;
    Sum sum;
    for (Index start = (Index)blockIdx.z * blockDim.x; start < N; start += (Index)gridDim.z * blockDim.x) {
        Index i = start + threadIdx.x;
        unsigned mask = __ballot_sync(0xffffffffu, i < N && ids[i] == id);
        __syncthreads();  // what was found before is done with
        if (lane == 0) masks[warp] = mask;
        __syncthreads();
        int count = 0, place = 0;
        for (int w = 0; w < warps; count += __popc(masks[w++])) if (w == warp) place = count;
        if (count == 0) continue;
        if (mask >> lane & 1) found[place + __popc(mask & ((1u << lane) - 1))] = i;
        __syncthreads();
        if (c < C) sum.add(0, 1, count, [&](Index k) { return real(gy[found[k] * C + c]); });
    }
    if (c < C) y[c] = sum.total;
}

// Of a table with few rows, a block per row, piece of its columns and slab of the ids: sums (slabs, rows, C), which
// sum_rows_of_sums adds up. A few rows alone would keep few blocks busy.
KERNEL embedding_vjp_of_rows(const Stored* gy, const Index* ids, Real* sums, Index N, Index C) {
    add_rows_of(blockIdx.x, gy, ids, sums + ((Index)blockIdx.z * gridDim.x + blockIdx.x) * C, N, C);
}

// Of one with many, whose gradient is zeros to begin with, a block per token and piece of the columns. It works if no
// token before it has the same id.
KERNEL embedding_vjp(const Stored* gy, const Index* ids, Real* gweight, Index N, Index C, Index rows) {
    __shared__ int earlier;
    Index i = blockIdx.x, id = ids[i];
    if (id < 0 || id >= rows) return;
    if (threadIdx.x == 0) earlier = 0;
    __syncthreads();
    for (Index start = 0; start < i; start += blockDim.x) {
        Index j = start + threadIdx.x;
        if (j < i && ids[j] == id) earlier = 1;  // all write the same
        __syncthreads();
        if (earlier) return;
        __syncthreads();  // before one that is ahead writes again
    }
    add_rows_of(id, gy, ids, gweight + id * C, N, C);
}

// -- cross-entropy: a block takes a row of the logits (N, V), which begin `pitch` after one another. A row whose target
// is `ignored` counts for nothing. --

// losses = log(sum(exp(logits))) - logits[target], NaN for a target that is no symbol; lse keeps the logarithm.
KERNEL cross_entropy(const Stored* logits, Index pitch, const Index* targets, Real* losses, Real* lse, Index V,
                     Index ignored) {
    __shared__ Real shared[WARP];
    Index row = blockIdx.x, target = targets[row];
    logits += row * pitch;
    Real highest = LOWEST, sum = 0;
    for (Index c = threadIdx.x; c < V; c += blockDim.x) {
        Real logit = real(logits[c]);
        if (logit > highest) sum *= exp(highest - logit), highest = logit;
        sum += exp(logit - highest);
    }
    Real highest_of_all = block_max(highest, shared);
    Real log_sum = log(block_sum(sum * exp(highest - highest_of_all), shared)) + highest_of_all;
    if (threadIdx.x) return;
    lse[row] = log_sum;
    bool known = target >= 0 && target < V;
    Real loss = known ? log_sum - real(logits[target]) : real(__uint_as_float(0x7fc00000u));
    losses[row] = target == ignored ? Real(0) : loss;
}

// glogits = (softmax(logits) - onehot(target)) * gy; gy has one number for each row, or if gy_step is 0 one for all.
KERNEL cross_entropy_vjp(const Real* gy, Index gy_step, const Stored* __restrict__ logits, Index pitch,
                         const Index* targets, const Real* lse, Stored* __restrict__ glogits, Index gpitch, Index V,
                         Index ignored) {
    Index row = blockIdx.x, target = targets[row];
    Real g = gy[row * gy_step];
    for (Index c = threadIdx.x; c < V; c += blockDim.x) {
        Real p = exp(real(logits[row * pitch + c]) - lse[row]) - (c == target);
        glogits[row * gpitch + c] = stored(target == ignored ? Real(0) : p * g);
    }
}
