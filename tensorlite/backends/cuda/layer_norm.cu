// Layer norm over the rows of x (N, C). The weight, the bias and their gradients are never in bfloat16. W elements are
// read at once: a pack, where every row begins with one, or else one. __restrict__ lets the compiler read several times
// that ahead of what it writes.
//
// y = xhat * weight + bias, xhat = (x - mean) * rstd, rstd = 1 / sqrt(variance + eps)
//
// All of it is reckoned from the row's first element on, and so is the mean that is kept: the mean of a row far from
// zero, and what lies about it, would be lost in rounding, where the difference of two neighbours is exact.

template <int W, class T> __device__ inline Items<T, W> items(const T* x) { return *(const Items<T, W>*)x; }

// Elements of a parameter, all of them `otherwise` where there is none.
template <int W> __device__ inline Items<Real, W> items_or(const Real* x, Index c, Real otherwise) {
    if (x) return items<W>(x + c);
    Items<Real, W> same;
    #pragma unroll
    for (int k = 0; k < W; k++) same.item[k] = otherwise;
    return same;
}

// A warp's row.
template <int W>
__device__ inline void normalize(const Stored* __restrict__ x, const Real* __restrict__ weight,
                                 const Real* __restrict__ bias, Stored* __restrict__ y, Real* mean, Real* rstd, Index C,
                                 Real eps) {
    Index start = threadIdx.x % WARP * W, step = WARP * W;
    Real first = real(x[0]), sum = 0, rest = 0, squares = 0;
    #pragma unroll 3
    for (Index c = start; c < C; c += step) {
        auto some = items<W>(x + c);
        #pragma unroll
        for (int k = 0; k < W; k++) sum += real(some.item[k]) - first;
    }
    Real mu = warp_sum(sum) / C;
    #pragma unroll 1  // what is read again is in the cache
    for (Index c = start; c < C; c += step) {
        auto some = items<W>(x + c);
        #pragma unroll
        for (int k = 0; k < W; k++) {
            Real d = real(some.item[k]) - first - mu;
            rest += d;  // what rounding has left of the mean, which counts where the first element is far from the others
            squares += d * d;
        }
    }
    rest = warp_sum(rest) / C;
    Real r = 1 / sqrt(warp_sum(squares) / C - rest * rest + eps);
    #pragma unroll 1
    for (Index c = start; c < C; c += step) {
        auto some = items<W>(x + c);
        auto w = items_or<W>(weight, c, 1), b = items_or<W>(bias, c, 0);
        #pragma unroll
        for (int k = 0; k < W; k++)
            some.item[k] = stored((real(some.item[k]) - first - mu - rest) * r * w.item[k] + b.item[k]);
        *(Items<Stored, W>*)(y + c) = some;
    }
    if (start == 0) *mean = mu + rest, *rstd = r;
}

KERNEL layer_norm(const Stored* __restrict__ x, const Real* __restrict__ weight, const Real* __restrict__ bias,
                  Stored* __restrict__ y, Real* mean, Real* rstd, Index N, Index C, double eps) {
    Index row = (Index)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (row >= N) return;
    x += row * C, y += row * C, mean += row, rstd += row;
    if (C % PACK == 0) normalize<PACK>(x, weight, bias, y, mean, rstd, C, eps);
    else normalize<1>(x, weight, bias, y, mean, rstd, C, eps);
}

// gx = rstd * (g - mean(g) - xhat * mean(g * xhat)) with g = gy * weight.
//
// The gradients of weight and bias are sums over rows, of gy * xhat and of gy. A warp takes a row for the two means, and
// then a thread the same W columns of each of the rows that the block's warps have taken, so that it adds up its columns
// in registers, over `rounds` times as many rows as there are warps. Block (i, j) takes the i-th of such rows and the
// j-th columns, and writes row i of sums (gridDim.x, 2 C), where that is wanted; sum_rows_of_sums adds up the blocks.

struct alignas(16) Row { Real first, mean, rstd, g, along; };  // the last two are the means, times rstd

template <int W>
__device__ inline Row means_of_row(const Stored* __restrict__ gy, const Stored* __restrict__ x,
                                   const Real* __restrict__ weight, Real mean, Real rstd, Index C) {
    Real first = real(x[0]), sum = 0, along = 0;
    #pragma unroll 3
    for (Index c = threadIdx.x % WARP * W; c < C; c += WARP * W) {
        auto some = items<W>(x + c), gy_some = items<W>(gy + c);
        auto w = items_or<W>(weight, c, 1);
        #pragma unroll
        for (int k = 0; k < W; k++) {
            Real g = real(gy_some.item[k]) * w.item[k];
            sum += g;
            along += g * (real(some.item[k]) - first - mean);
        }
    }
    sum = warp_sum(sum) / C, along = warp_sum(along) / C;
    return {first, mean, rstd, rstd * sum, rstd * (rstd * along)};
}

template <int W>
__device__ inline void normalize_vjp(const Stored* __restrict__ gy, const Stored* __restrict__ x,
                                     const Real* __restrict__ weight, const Real* mean, const Real* rstd,
                                     Stored* __restrict__ gx, Real* sums, Index N, Index C, Index rounds,
                                     Row (&rows)[WARP]) {
    int warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    Index c = ((Index)blockIdx.y * blockDim.x + threadIdx.x) * W, start = blockIdx.x * rounds * warps;
    Items<Real, W> w = {}, gweight = {}, gbias = {};
    if (c < C) w = items_or<W>(weight, c, 1);
    for (Index end = min(N, start + rounds * warps); start < end; start += warps) {
        Index row = start + warp, at = start * C + c;
        if (row < end) {
            Row means = means_of_row<W>(gy + row * C, x + row * C, weight, mean[row], rstd[row], C);
            if (threadIdx.x % WARP == 0) rows[warp] = means;
        }
        __syncthreads();
        for (int i = 0, count = c < C ? (int)min((Index)warps, end - start) : 0; i < count; i++, at += C) {
            Row row = rows[i];
            auto some = items<W>(x + at), gy_some = items<W>(gy + at);
            #pragma unroll
            for (int k = 0; k < W; k++) {
                Real g = real(gy_some.item[k]), xhat = (real(some.item[k]) - row.first - row.mean) * row.rstd;
                gweight.item[k] += g * xhat, gbias.item[k] += g;
                some.item[k] = stored(row.rstd * (g * w.item[k]) - row.g - xhat * row.along);
            }
            *(Items<Stored, W>*)(gx + at) = some;
        }
        __syncthreads();
    }
    if (!sums || c >= C) return;
    sums += blockIdx.x * 2 * C + c;
    *(Items<Real, W>*)sums = gweight, *(Items<Real, W>*)(sums + C) = gbias;
}

KERNEL layer_norm_vjp(const Stored* __restrict__ gy, const Stored* __restrict__ x, const Real* __restrict__ weight,
                      const Real* mean, const Real* rstd, Stored* __restrict__ gx, Real* sums, Index N, Index C,
                      Index rounds) {
    __shared__ Row rows[WARP];
    if (C % PACK == 0) normalize_vjp<PACK>(gy, x, weight, mean, rstd, gx, sums, N, C, rounds, rows);
    else normalize_vjp<1>(gy, x, weight, mean, rstd, gx, sums, N, C, rounds, rows);
}

// -- a bias in every row of a matrix, and sums over the rows, as its gradient is --

// y[row, c] = bias[c] for the rows of y, which begin `pitch` after one another, and what lies between them. A thread takes
// a pack of columns, and every so many-th row.
KERNEL fill_rows(const Real* bias, Stored* y, Index N, Index C, Index pitch) {
    Index c = ((Index)blockIdx.y * blockDim.x + threadIdx.x) * PACK;
    if (c >= pitch) return;
    Pack pack;
    #pragma unroll
    for (int k = 0; k < PACK; k++) pack.item[k] = stored(c + k < C ? bias[c + k] : Real(0));
    for (Index row = blockIdx.x; row < N; row += gridDim.x) *(Pack*)(y + row * pitch + c) = pack;
}

// Row j of sums (gridDim.y, C): the sum of the rows of x (N, C) that fall to block (i, j), whose warps take every so
// many-th each, and a lane W columns. shared: a row for each warp.
template <int W, class T>
__device__ inline void add_rows(const T* x, Real* sums, Index N, Index C, Real (*shared)[WARP * W]) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    Index first = (Index)blockIdx.x * WARP * W, c = first + lane * W, step = (Index)gridDim.y * warps;
    Sum sum[W], all;
    for (Index row = (Index)blockIdx.y * warps + warp; c < C && row < N; row += 8 * step) {
        Real eight[W] = {};
        #pragma unroll
        for (int i = 0; i < 8; i++) {  // as Sum adds up a sequence
            Index next = row + i * step;
            auto some = items<W>(x + (next < N ? next : row) * C + c);
            #pragma unroll
            for (int k = 0; k < W; k++) eight[k] += next < N ? real(some.item[k]) : Real(0);
        }
        #pragma unroll
        for (int k = 0; k < W; k++) sum[k].add(eight[k]);
    }
    #pragma unroll
    for (int k = 0; k < W; k++) shared[warp][lane * W + k] = sum[k].total;
    __syncthreads();
    c = first + threadIdx.x;
    if (threadIdx.x >= WARP * W || c >= C) return;
    all.add(0, 1, warps, [&](Index w) { return shared[w][threadIdx.x]; });
    sums[blockIdx.y * C + c] = all.total;
}

// As many columns to a lane as a pack has, where the launcher says `packs`; for blocks of eight warps.
KERNEL sum_rows(const Stored* x, Real* sums, Index N, Index C, Index packs) {
    __shared__ Real shared[8][WARP * PACK];
    if (packs) add_rows<PACK>(x, sums, N, C, shared);
    else add_rows<1>(x, sums, N, C, (Real(*)[WARP])shared);
}

KERNEL sum_rows_of_sums(const Real* x, Real* sums, Index N, Index C) {
    __shared__ Real shared[WARP][WARP];
    add_rows<1>(x, sums, N, C, shared);
}
