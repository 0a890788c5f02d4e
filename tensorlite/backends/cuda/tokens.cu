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

// gweight[ids[i]] += the sum of the rows of gy (N, C) whose id it is, in their order. Block i works if no token before
// i has the same id: then it adds up all the rows from i on. An id outside of the table is passed over.
KERNEL embedding_vjp(const Stored* gy, const Index* ids, Real* gweight, Index N, Index C, Index rows) {
    __shared__ Index found[WARP * WARP];
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
    gweight += id * C;
    for (Index start = i; start < N; start += blockDim.x) {
        Index j = start + threadIdx.x;
        __syncthreads();
        found[threadIdx.x] = j < N && ids[j] == id;
        __syncthreads();
        for (int k = 0; k < (int)blockDim.x; k++)
            if (found[k])
                for (Index c = threadIdx.x; c < C; c += blockDim.x) gweight[c] += real(gy[(start + k) * C + c]);
    }
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
