// AdamW and the norm of the gradients, on flat arrays. What changes from step to step lies in device memory.

// AdamW (Loshchilov & Hutter 2019): rates = {learning rate, that times sqrt(1 - beta2^t) / (1 - beta1^t), eps times
// sqrt(1 - beta2^t)}; grad_scale, if there is one, multiplies the gradients.
KERNEL adamw_step(Stored* p, const Stored* g, Stored* m, Stored* v, const Real* rates, const Real* grad_scale,
                  double beta1_, double beta2_, double decay_, Index n) {
    Index i = first_element(1);
    if (i >= n) return;
    Real beta1 = beta1_, beta2 = beta2_, rest1 = 1 - beta1_, rest2 = 1 - beta2_, decay = decay_;
    Real gradient = real(g[i]) * (grad_scale ? *grad_scale : Real(1));
    Real mean = beta1 * real(m[i]) + rest1 * gradient, square = beta2 * real(v[i]) + rest2 * gradient * gradient;
    m[i] = stored(mean);
    v[i] = stored(square);
    p[i] = stored(real(p[i]) * (1 - rates[0] * decay) - rates[1] * mean / (sqrt(square) + rates[2]));
}

// sums[i] = the sum of the squares that block i of the grid has met, which takes every gridDim.x-th piece of x.
KERNEL sum_squares(const Stored* x, Real* sums, Index n) {
    __shared__ Real shared[WARP];
    Sum sum;
    sum.add(first_element(1), (Index)gridDim.x * blockDim.x, n, [&](Index i) { return real(x[i]) * real(x[i]); });
    Real total = block_sum(sum.total, shared);
    if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

// norm = sqrt(sum(sums)), by one block.
KERNEL root_of_sum(const Real* sums, Real* norm, Index n) {
    __shared__ Real shared[WARP];
    Real sum = 0;
    for (Index i = threadIdx.x; i < n; i += blockDim.x) sum += sums[i];
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) *norm = sqrt(sum);
}
