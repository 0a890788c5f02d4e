// Activations and dropout: a thread takes one pack of elements.

// y = f(x...)
template <class F, class... T>
__device__ void map(Stored* y, Index n, F f, const T*... x) {
    map_pack(y, first_element(PACK), n, [=](int, T... x) { return f(real(x)...); }, x...);
}

KERNEL relu(const Stored* x, Stored* y, Index n) {
    map(y, n, [](Real x) { return x <= 0 ? Real(0) : x; }, x);  // a NaN stays one
}

KERNEL relu_vjp(const Stored* gy, const Stored* y, Stored* gx, Index n) {
    map(gx, n, [](Real gy, Real y) { return y <= 0 ? Real(0) : gy; }, gy, y);  // a NaN passes its gradient on
}

// GELU: y = x Phi(x), dy/dx = Phi(x) + x phi(x). Phi is the normal distribution function, phi its density.

__device__ inline Real normal_cdf(Real x) { return Real(0.5) * (1 + erf(x * Real(0.70710678118654752))); }

KERNEL gelu(const Stored* x, Stored* y, Index n) {
    map(y, n, [](Real x) { return x * normal_cdf(x); }, x);
}

KERNEL gelu_vjp(const Stored* gy, const Stored* x, Stored* gx, Index n) {
    auto slope = [](Real gy, Real x) {
        Real density = exp(Real(-0.5) * x * x) * Real(0.39894228040143268);
        return gy * (normal_cdf(x) + x * density);
    };
    map(gx, n, slope, gy, x);
}

// GPT-2's approximation: Phi(x) = (1 + tanh u) / 2, u = sqrt(2 / pi) (x + 0.044715 x^3).

constexpr Real TANH_SCALE = 0.79788456080286536, TANH_CUBIC = 0.044715;

__device__ inline Real tanh_cdf(Real x) {
    return Real(0.5) * (1 + tanh(TANH_SCALE * x * (1 + TANH_CUBIC * x * x)));
}

KERNEL gelu_tanh(const Stored* x, Stored* y, Index n) {
    map(y, n, [](Real x) { return x * tanh_cdf(x); }, x);
}

KERNEL gelu_tanh_vjp(const Stored* gy, const Stored* x, Stored* gx, Index n) {
    auto slope = [](Real gy, Real x) {
        Real cdf = tanh_cdf(x), slope_of_u = TANH_SCALE * (1 + 3 * TANH_CUBIC * x * x);
        return gy * (cdf + 2 * x * cdf * (1 - cdf) * slope_of_u);  // tanh' = 1 - tanh^2 = 4 cdf (1 - cdf)
    };
    map(gx, n, slope, gy, x);
}

// -- dropout --

// The block of four numbers at `counter` under `key`: Philox4x64-10 (Salmon et al. 2011), as NumPy's.
__device__ inline void philox(u64 (&counter)[4], u64 key0, u64 key1) {
    for (int round = 0; round < 10; round++) {
        u64 high0 = __umul64hi(0xD2E7470EE14C6C93ull, counter[0]), low0 = 0xD2E7470EE14C6C93ull * counter[0];
        u64 high1 = __umul64hi(0xCA5A826395121157ull, counter[2]), low1 = 0xCA5A826395121157ull * counter[2];
        counter[0] = high1 ^ counter[1] ^ key0;
        counter[1] = low1;
        counter[2] = high0 ^ counter[3] ^ key1;
        counter[3] = low0;
        key0 += 0x9E3779B97F4A7C15ull;
        key1 += 0xBB67AE8584CAA73Bull;
    }
}

struct alignas(16) Flags { bool item[16]; };

// Whether the 16 elements of this block of the stream reach the threshold, 16 random bits each. The step lies in device
// memory, so that a captured graph draws anew each time.
__device__ inline Flags draw(Index block, Index seed, Index stream, const u64* step, Index call, unsigned threshold) {
    // NumPy counts a block up before it makes it, so the first of a stream is number 1.
    u64 counter[4] = {(u64)block + 1, (u64)call, *step, 0};
    philox(counter, seed, stream);
    Flags keep;
    #pragma unroll
    for (int k = 0; k < 16; k++) keep.item[k] = ((unsigned)(counter[k / 4] >> k % 4 * 16) & 0xffffu) >= threshold;
    return keep;
}

// keep[start + k] = flags.item[k], for those in [0, n).
__device__ inline void store_flags(bool* keep, Index start, Index n, const Flags& flags) {
    if (start >= 0 && start % 16 == 0 && start + 16 <= n) { *(Flags*)(keep + start) = flags; return; }
    #pragma unroll
    for (int k = 0; k < 16; k++) if (start + k >= 0 && start + k < n) keep[start + k] = flags.item[k];
}

// y = x * keep * scale for the pack at i, plus the residual if there is one. kept(k, more...) says it of element k.
template <class F, class... T>
__device__ inline void drop_pack(const Stored* x, const Stored* residual, Stored* y, Index i, Index n, Real scale, F kept,
                                 const T*... more) {
    auto drop = [=](int k, Stored x, T... more) { return kept(k, more...) ? real(x) * scale : Real(0); };
    auto add = [=](int k, Stored r, Stored x, T... more) { return drop(k, x, more...) + real(r); };
    if (residual) map_pack(y, i, n, add, residual, x, more...);
    else map_pack(y, i, n, drop, x, more...);
}

// keep[i]: whether element first + i of the stream is kept. A thread takes the elements of one block. If causal, keep
// is (..., S, T), keys down, and what a query does not see is left as it is.
KERNEL dropout_mask(bool* keep, Index n, Index first, Index seed, Index stream, const u64* step, Index call,
                    Index threshold, Index causal, Index S, Index T) {
    Index block = first / 16 + first_element(1), start = block * 16 - first;
    if (start >= n) return;
    if (causal && start >= 0) {
        Index key = start / T % S, query = start % T;
        if (query + 16 <= T && query + 15 + S - T < key) return;
    }
    store_flags(keep, start, n, draw(block, seed, stream, step, call, threshold));
}

KERNEL dropout(const Stored* x, const bool* keep, const Stored* residual, Stored* y, Index n, double scale) {
    Index i = first_element(PACK);
    if (i < n) drop_pack(x, residual, y, i, n, scale, [](int, bool kept) { return kept; }, keep);
}

// Both at once: `first` is a multiple of 16.
KERNEL draw_dropout(const Stored* __restrict__ x, const Stored* __restrict__ residual, Stored* __restrict__ y,
                    bool* __restrict__ keep, Index n, Index first, Index seed,
                    Index stream, const u64* step, Index call, Index threshold, double scale) {
    Index start = first_element(16);
    if (start >= n) return;
    Flags flags = draw((first + start) / 16, seed, stream, step, call, threshold);
    #pragma unroll
    for (int i = 0; i < 16; i += PACK)
        if (start + i < n) drop_pack(x, residual, y, start + i, n, scale, [&](int k) { return flags.item[i + k]; });
    store_flags(keep, start, n, flags);
}
