// Attention on scores that are written out, and for a single query against the keys kept of the tokens before it.
//
// The scores of a head lie with the keys down and the queries across, (S, T): a thread goes down the column of its
// query, and its neighbours read beside it.

struct Column {
    Index query, start, seen;  // the query; its column's first element in the scores; how many keys it sees
};

// The column of this thread, block (i, j) working on head i. Causal query t sees the keys 0 .. t + S - T.
__device__ inline Column column_of_thread(Index S, Index T, Index causal) {
    Index t = (Index)blockIdx.y * blockDim.x + threadIdx.x;
    return {t, blockIdx.x * S * T + t, causal ? t + S - T + 1 : S};
}

// The scores become probabilities P = softmax(scores * scale), 0 where unseen and 1 of a query's only key, and kept =
// P * keep * keep_scale if there is dropout.
KERNEL attention_softmax(Stored* scores, const bool* keep, Stored* kept, Index S, Index T, Index causal, double scale_,
                         double keep_scale_) {
    Column column = column_of_thread(S, T, causal);
    if (column.query >= T) return;
    Real scale = scale_, keep_scale = keep_scale_, highest = LOWEST, sum = 0;
    for (Index s = 0, i = column.start; s < column.seen; s++, i += T) {
        Real score = product(real(scores[i]), scale);
        if (score > highest) sum *= exp(highest - score), highest = score;
        sum += exp(score - highest);
    }
    for (Index s = 0, i = column.start; s < S; s++, i += T) {
        Real p = s < column.seen ? exp(product(real(scores[i]), scale) - highest) / sum : Real(0);
        scores[i] = stored(p);
        if (keep) kept[i] = stored(keep[i] ? p * keep_scale : Real(0));
    }
}

// g holds the gradient of the weights that met the values, and becomes that of the scores:
// gP = g * keep * keep_scale, gS = P * (gP - sum(gP * P)) * scale.
KERNEL attention_softmax_vjp(Stored* g, const Stored* probs, const bool* keep, Index S, Index T, Index causal,
                             double scale_, double keep_scale_) {
    Column column = column_of_thread(S, T, causal);
    if (column.query >= T) return;
    Real scale = scale_, keep_scale = keep_scale_, along = 0;
    auto gp = [&](Index i) { return !keep || keep[i] ? product(real(g[i]), keep_scale) : Real(0); };
    for (Index s = 0, i = column.start; s < column.seen; s++, i += T) along += gp(i) * real(probs[i]);
    for (Index s = 0, i = column.start; s < S; s++, i += T)
        g[i] = stored(s < column.seen ? real(probs[i]) * (gp(i) - along) * scale : Real(0));
}

// One more token of each sequence: qkv (B, 3 C) with C = H * D, its keys and values put into cache (2, B, H, L, D) at
// *position, and y (B, C) what it gathers from all tokens up to there. A block per sequence and head; the position lies
// in device memory, so that a captured graph can go on from token to token.
KERNEL attention_of_next(const Stored* qkv, Stored* cache, Stored* y, const Index* position, Index H, Index L, Index D,
                         double scale_) {
    DYNAMIC_SHARED(Real, weights);  // L
    __shared__ Real shared[WARP];
    Index B = gridDim.x / H, b = blockIdx.x / H, h = blockIdx.x % H, C = H * D, seen = *position + 1;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const Stored *q = qkv + b * 3 * C + h * D, *k_new = q + C, *v_new = q + 2 * C;
    Stored *k = cache + (b * H + h) * L * D, *v = k + B * H * L * D;
    for (Index d = threadIdx.x; d < D; d += blockDim.x) {
        k[(seen - 1) * D + d] = k_new[d];
        v[(seen - 1) * D + d] = v_new[d];
    }
    __syncthreads();
    for (Index s = warp; s < seen; s += warps) {
        Real dot = 0;
        for (Index d = lane; d < D; d += WARP) dot += real(q[d]) * real(k[s * D + d]);
        dot = warp_sum(dot);
        if (lane == 0) weights[s] = dot * Real(scale_);
    }
    __syncthreads();
    Real highest = LOWEST, sum = 0;
    for (Index s = threadIdx.x; s < seen; s += blockDim.x) highest = max(highest, weights[s]);
    highest = block_max(highest, shared);
    for (Index s = threadIdx.x; s < seen; s += blockDim.x) sum += weights[s] = exp(weights[s] - highest);
    sum = block_sum(sum, shared);  // and all weights are written when it is known
    // Each warp adds up every so many-th key, for a channel per lane, and the first adds up the warps.
    __shared__ Real totals[WARP][WARP];
    for (Index d = lane; d - lane < D; d += WARP) {
        Real total = 0;
        if (d < D) for (Index s = warp; s < seen; s += warps) total += weights[s] * real(v[s * D + d]);
        totals[warp][lane] = total;
        __syncthreads();
        for (int other = 1; warp == 0 && other < warps; other++) total += totals[other][lane];
        if (warp == 0 && d < D) y[b * C + h * D + d] = stored(total / sum);
        __syncthreads();  // before the next channels' totals
    }
}
