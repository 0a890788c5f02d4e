// Layer norm over the rows of x (N, C): a warp per row. The weight, the bias and their gradients are never in bfloat16.
// __restrict__ lets the compiler read several elements ahead of the one that it writes.
//
// y = xhat * weight + bias, xhat = (x - mean) * rstd, rstd = 1 / sqrt(variance + eps)

__device__ inline Index row_of_warp() { return (Index)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP; }

KERNEL layer_norm(const Stored* __restrict__ x, const Real* __restrict__ weight, const Real* __restrict__ bias,
                  Stored* __restrict__ y, Real* mean, Real* rstd, Index N, Index C, double eps) {
    Index row = row_of_warp();
    int lane = threadIdx.x % WARP;
    if (row >= N) return;
    x += row * C, y += row * C;
    Real sum = 0, rest = 0, squares = 0;
    for (Index c = lane; c < C; c += WARP) sum += real(x[c]);
    Real mu = warp_sum(sum) / C;
    for (Index c = lane; c < C; c += WARP) {
        Real d = real(x[c]) - mu;
        rest += d;  // what rounding has left of the mean, which counts where it is far from 0
        squares += d * d;
    }
    rest = warp_sum(rest) / C;
    Real r = 1 / sqrt(warp_sum(squares) / C - rest * rest + Real(eps));
    for (Index c = lane; c < C; c += WARP) {
        Real xhat = (real(x[c]) - mu - rest) * r;
        y[c] = stored((weight ? xhat * weight[c] : xhat) + (bias ? bias[c] : Real(0)));
    }
    if (lane == 0) mean[row] = mu + rest, rstd[row] = r;
}

// gx = rstd * (g - mean(g) - xhat * mean(g * xhat)) with g = gy * weight.
KERNEL layer_norm_vjp(const Stored* __restrict__ gy, const Stored* __restrict__ x, const Real* __restrict__ weight,
                      const Real* mean, const Real* rstd, Stored* __restrict__ gx, Index N, Index C) {
    Index row = row_of_warp();
    int lane = threadIdx.x % WARP;
    if (row >= N) return;
    gy += row * C, x += row * C, gx += row * C;
    Real mu = mean[row], r = rstd[row], sum = 0, along = 0;
    for (Index c = lane; c < C; c += WARP) {
        Real g = real(gy[c]) * (weight ? weight[c] : Real(1));
        sum += g;
        along += g * (real(x[c]) - mu) * r;
    }
    sum = warp_sum(sum) / C, along = warp_sum(along) / C;
    for (Index c = lane; c < C; c += WARP) {
        Real g = real(gy[c]) * (weight ? weight[c] : Real(1)), xhat = (real(x[c]) - mu) * r;
        gx[c] = stored(r * (g - sum - xhat * along));
    }
}

// The gradients of weight and bias are sums over rows: gy * xhat and gy. Row j of sums (gridDim.y, 2 C) has those over
// every gridDim.y-th row from row j on; sum_rows_of_sums then adds them up.
KERNEL layer_norm_vjp_weights(const Stored* gy, const Stored* x, const Real* mean, const Real* rstd, Real* sums,
                              Index N, Index C) {
    Index c = first_element(1);
    if (c >= C) return;
    Real gweight = 0, gbias = 0;
    #pragma unroll 8
    for (Index row = blockIdx.y; row < N; row += gridDim.y) {
        Real g = real(gy[row * C + c]);
        gweight += g * (real(x[row * C + c]) - mean[row]) * rstd[row];
        gbias += g;
    }
    sums[blockIdx.y * 2 * C + c] = gweight;
    sums[blockIdx.y * 2 * C + C + c] = gbias;
}

// -- sums over the rows of any matrix, as a bias's gradient is --

template <class T>
__device__ void add_rows(const T* x, Real* sums, Index N, Index C) {
    Index c = first_element(1);
    if (c >= C) return;
    Real sum = 0;
    #pragma unroll 8
    for (Index row = blockIdx.y; row < N; row += gridDim.y) sum += real(x[row * C + c]);
    sums[blockIdx.y * C + c] = sum;
}

// Row j of sums (gridDim.y, C): the sum of every gridDim.y-th row of x (N, C) from row j on.
KERNEL sum_rows(const Stored* x, Real* sums, Index N, Index C) { add_rows(x, sums, N, C); }
KERNEL sum_rows_of_sums(const Real* x, Real* sums, Index N, Index C) { add_rows(x, sums, N, C); }
