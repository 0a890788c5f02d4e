// Layer norm over the rows of x (N, C): a warp per row. The weight, the bias and their gradients are never in bfloat16.
// __restrict__ lets the compiler read several elements ahead of the one that it writes.
//
// y = xhat * weight + bias, xhat = (x - mean) * rstd, rstd = 1 / sqrt(variance + eps)
//
// All of it is reckoned from the row's first element on, and so is the mean that is kept: the mean of a row far from
// zero, and what lies about it, would be lost in rounding, where the difference of two neighbours is exact.

KERNEL layer_norm(const Stored* __restrict__ x, const Real* __restrict__ weight, const Real* __restrict__ bias,
                  Stored* __restrict__ y, Real* mean, Real* rstd, Index N, Index C, double eps) {
    Index row = (Index)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    int lane = threadIdx.x % WARP;
    if (row >= N) return;
    x += row * C, y += row * C;
    Real first = real(x[0]), sum = 0, rest = 0, squares = 0;
    for (Index c = lane; c < C; c += WARP) sum += real(x[c]) - first;
    Real mu = warp_sum(sum) / C;
    for (Index c = lane; c < C; c += WARP) {
        Real d = real(x[c]) - first - mu;
        rest += d;  // what rounding has left of the mean, which counts where the first element is far from the others
        squares += d * d;
    }
    rest = warp_sum(rest) / C;
    Real r = 1 / sqrt(warp_sum(squares) / C - rest * rest + Real(eps));
    for (Index c = lane; c < C; c += WARP) {
        Real xhat = (real(x[c]) - first - mu - rest) * r;
        y[c] = stored((weight ? xhat * weight[c] : xhat) + (bias ? bias[c] : Real(0)));
    }
    if (lane == 0) mean[row] = mu + rest, rstd[row] = r;
}

// gx = rstd * (g - mean(g) - xhat * mean(g * xhat)) with g = gy * weight.
//
// The gradients of weight and bias are sums over rows, of gy * xhat and of gy. A warp adds up those of its rows, which
// are every so many-th, eight at most; a block adds up its warps into its row of sums (gridDim.x, 2 C), and
// sum_rows_of_sums adds up the blocks. Where sums is null there are none, and no shared memory is needed.
KERNEL layer_norm_vjp(const Stored* gy, const Stored* x, const Real* weight, const Real* mean, const Real* rstd,
                      Stored* gx, Real* sums, Index N, Index C) {
    DYNAMIC_SHARED(Real, shared);  // (warps, 2, C)
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    Real *gweight = shared + warp * 2 * C, *gbias = gweight + C;
    for (Index c = lane; sums && c < C; c += WARP) gweight[c] = gbias[c] = 0;
    for (Index row = (Index)blockIdx.x * warps + warp; row < N; row += (Index)gridDim.x * warps) {
        const Stored *__restrict__ gy_row = gy + row * C, *__restrict__ x_row = x + row * C;
        Stored* __restrict__ gx_row = gx + row * C;
        Real first = real(x_row[0]), mu = mean[row], r = rstd[row], sum = 0, along = 0;
        for (Index c = lane; c < C; c += WARP) {
            Real g = real(gy_row[c]), xhat = (real(x_row[c]) - first - mu) * r;
            if (sums) gweight[c] += g * xhat, gbias[c] += g;
            if (weight) g *= weight[c];
            sum += g;
            along += g * xhat;
        }
        sum = warp_sum(sum) / C, along = warp_sum(along) / C;
        for (Index c = lane; c < C; c += WARP) {
            Real g = real(gy_row[c]) * (weight ? weight[c] : Real(1)), xhat = (real(x_row[c]) - first - mu) * r;
            gx_row[c] = stored(r * (g - sum - xhat * along));
        }
    }
    __syncthreads();
    for (Index c = threadIdx.x; sums && c < 2 * C; c += blockDim.x) {
        Real sum = 0;
        for (int w = 0; w < warps; w++) sum += shared[w * 2 * C + c];
        sums[blockIdx.x * 2 * C + c] = sum;
    }
}

// -- sums over the rows of any matrix, as a bias's gradient is --

// Row j of sums (gridDim.y, C): the sum of the rows of x (N, C) that fall to block (i, j), whose warps take every so
// many-th each, and a lane a column.
template <class T>
__device__ void add_rows(const T* x, Real* sums, Index N, Index C) {
    __shared__ Real shared[WARP][WARP];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    Index c = (Index)blockIdx.x * WARP + lane, first = (Index)blockIdx.y * warps + warp;
    Sum sum, all;
    if (c < C) sum.add(first, (Index)gridDim.y * warps, N, [&](Index row) { return real(x[row * C + c]); });
    shared[warp][lane] = sum.total;
    __syncthreads();
    if (warp > 0 || c >= C) return;
    all.add(0, 1, warps, [&](Index w) { return shared[w][lane]; });
    sums[blockIdx.y * C + c] = all.total;
}

KERNEL sum_rows(const Stored* x, Real* sums, Index N, Index C) { add_rows(x, sums, N, C); }
KERNEL sum_rows_of_sums(const Real* x, Real* sums, Index N, Index C) { add_rows(x, sums, N, C); }
