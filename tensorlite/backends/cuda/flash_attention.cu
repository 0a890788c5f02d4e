// Attention without its T x S matrices, forward and backward, on the tensor cores (sm_80 and newer), in bfloat16:
// FlashAttention-2 (Dao 2023, https://arxiv.org/abs/2307.08691).
//
//   y = dropout(softmax(scale q k')) v    of each batch and head: q, y (T, D), k, v (S, D), D = HEAD_DIM: 32, 64, 128
//
// Every tensor comes as a pointer and its strides of batch, head and row, in elements (TENSOR below). The channels of
// a row lie together, and each row begins at a multiple of 16 bytes. keep is dropout's mask, of 0 and 1 and of shape
// (B, H, S, T): keys down, queries across; or null. lse and delta are float32 (B, H, T rounded up to 128s).
// scale > 0; causal, which is query t seeing the keys 0 .. t + S - T, needs S >= T.
//
// Three launches of 128 threads each; gkv comes after gq, whose delta it reads. ROWS and STEP are 128 and 64; for
// D = 128 they are 64 and 32.
//
//   kernel                 grid                     bytes of shared memory                   with dropout, in addition
//   flash_attention        (B H, ceil(T / ROWS))    2 (D + 8) (ROWS + 4 STEP)                2 ROWS (STEP + 16)
//   flash_attention_gq     (B H, ceil(T / ROWS))    2 (D + 8) (2 ROWS + 4 STEP) + 16 STEP    2 ROWS (STEP + 16)
//   flash_attention_gkv    (B H, ceil(S / ROWS))    2 (D + 8) (2 ROWS + 4 STEP) + 16 STEP    2 ROWS (STEP + 16)
//
// These can be more than 48 KB, which CuPy has to be told in max_dynamic_shared_size_bytes, and are less than the 99 KB
// that all such GPUs have. Nothing is summed by atomics: the same inputs give the same bits. For that the backward
// forms the scores twice, for its sums over keys and for those over queries.
#if STORAGE == 16

#ifndef HEAD_DIM
#define HEAD_DIM 64
#endif

#ifndef CUDA_ON_CPU

// d += a @ b: (16, 8) += (16, 16) @ (16, 8). Of d, the lane 4 g + c holds rows g and g + 8 at columns 2 c and 2 c + 1.
__device__ inline void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

// Four (8, 8) matrices of 16-bit items, whose rows the lanes 0-7, 8-15, 16-23 and 24-31 point to. Of each, or of its
// transpose, the lane 4 g + c gets the items 2 c and 2 c + 1 of row g.
__device__ inline void ldmatrix_x4(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

__device__ inline void ldmatrix_x4_trans(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

__device__ inline void cp_async16(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(shared_address(shared)), "l"(global) : "memory");
}

__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all but the last N groups of copies.
template <int N> __device__ inline void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
}

__device__ inline float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ inline unsigned pack_bf16(float low, float high) {
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
#else
inline float power_of_2(float x) { return exp2f(x); }
inline unsigned pack_bf16(float low, float high) { return to_bfloat16(low).bits | to_bfloat16(high).bits << 16; }
#endif

// A block of four warps keeps ROWS rows of the matrix of scores, and its loop takes STEP columns at a time. Rows are
// queries and columns are keys, or, in gkv, the other way round.
constexpr int D = HEAD_DIM;
static_assert(D == 32 || D == 64 || D == 128, "HEAD_DIM is to be 32, 64 or 128");
constexpr int M_TILES = D <= 64 ? 2 : 1;  // of 16 rows to a warp. With one, shared memory is slower than the mma
constexpr int WARP_ROWS = 16 * M_TILES;
constexpr int ROWS = 4 * WARP_ROWS, THREADS = 4 * WARP;
constexpr int STEP = ROWS / 2;
constexpr int SLICES = STEP / 16;
constexpr int CHUNKS = D / PACK;          // of 16 bytes in a row of channels
constexpr int PITCH = D + PACK;           // the odd chunk puts the eight rows that ldmatrix reads into different banks

typedef unsigned char Flag;
typedef bfloat16 TileRow[PITCH];
typedef Flag FlagTile[ROWS * (STEP + 16)];         // keys x (queries + 16), for the banks too
struct ColumnTiles { TileRow a[STEP], b[STEP]; };  // keys and values, in gkv queries and gy
struct alignas(16) Four { float item[4]; };

// -- what the kernels are called with --

#define TENSOR(type, name) type *name##_data, Index name##_batch, Index name##_head, Index name##_row
#define OPTIONS const Flag *keep, double keep_scale, double scale, Index causal, Index H, Index T, Index S

// What a tensor has for this block's batch and head: (rows, D).
template <typename T> struct Matrix { T* row; int stride, rows; };
typedef Matrix<const bfloat16> Source;
typedef Matrix<bfloat16> Target;

#define MATRIX(name, rows) \
    {name##_data + blockIdx.x / (int)H * name##_batch + blockIdx.x % (int)H * name##_head, (int)name##_row, (int)rows}

struct Range {
    int begin, end;
    // Has it any, or all, of the STEP from `first` on?
    __device__ bool meets(int first) const { return first + STEP > begin && first < end; }
    __device__ bool covers(int first) const { return first >= begin && first + STEP <= end; }
};

// The options, for this block's batch and head.
struct Problem {
    int T, S;
    bool causal;
    const Flag* keep;
    float keep_scale, scale, exponent_scale;  // exp(scale * x) is 2 ** (exponent_scale * x), quicker on a GPU
    Index statistics;                         // where lse and delta begin

    __device__ Problem(OPTIONS)
        : T(T), S(S), causal(causal), keep(keep ? keep + blockIdx.x * S * T : nullptr), keep_scale(keep_scale),
          scale(scale), exponent_scale(scale * 1.4426950408889634), statistics(blockIdx.x * ((T + 127) / 128 * 128)) {}

    // How many keys a query sees.
    __device__ int keys(int query) const { return causal ? min(S, query + 1 + (S - T)) : S; }

    // The columns that a row sees. From row to row, neither end goes back.
    template <bool ROWS_ARE_KEYS> __device__ Range seen(int row) const {
        if (ROWS_ARE_KEYS) return {causal ? max(0, row - (S - T)) : 0, T};
        return {0, keys(row)};
    }
};

// The part of the scores that falls to this block and this warp.
template <bool ROWS_ARE_KEYS> struct Share {
    int block_row, warp_row, row;  // the block's first row; the warp's, counted from there; the warp's
    Range steps;                   // of the block's loop
    Range some, all;               // the columns that some of the warp's rows see, and that need no mask

    __device__ Share(const Problem& problem) {
        // The blocks that have most to do come first: if causal, those of the last queries, or of the first keys.
        block_row = (ROWS_ARE_KEYS ? blockIdx.y : gridDim.y - 1 - blockIdx.y) * ROWS;
        warp_row = threadIdx.x / WARP * WARP_ROWS;
        row = block_row + warp_row;
        auto seen = [&](int row) { return problem.seen<ROWS_ARE_KEYS>(row); };
        steps = {seen(block_row).begin / STEP, (seen(block_row + ROWS - 1).end + STEP - 1) / STEP};
        some = {seen(row).begin, seen(row + WARP_ROWS - 1).end};
        all = {seen(row + WARP_ROWS - 1).begin, problem.S == 1 ? 0 : seen(row).end};
    }
};

// -- a warp's parts of matrices, in registers --
//
// Which row of a tile is which row of an mma is ours to choose, and so for columns. Dropout's flags are bytes, of which
// ldmatrix hands out pairs of neighbours, so that of sixteen rows and columns of scores each lane is given a block of
// 2 x 4: in item [m][j][2 h + i] of a slice the lane 4 g + c holds row 16 m + 2 g + h and column 4 c + 2 j + i.

typedef float Slice[M_TILES][2][4];             // (WARP_ROWS, 16), results of two mma side by side
typedef float Sums[M_TILES][D / 8][4];          // (WARP_ROWS, D), results; the columns are in the mma's order
struct Operand { unsigned tile[M_TILES][4]; };  // (WARP_ROWS, 16), to be multiplied from the left
struct Rows { Operand part[D / 16]; };          // (WARP_ROWS, D), likewise

__device__ inline int row_of_mma(int i) { return i % 8 * 2 + i / 8; }                     // i = g + 8 h
__device__ inline int column_of_mma(int i) { return i % 8 / 2 * 4 + i / 8 * 2 + i % 2; }  // i = 8 j + 2 c + i
__device__ inline int my_lane() { return threadIdx.x % WARP; }
__device__ inline int my_row() { return my_lane() / 4 * 2; }
__device__ inline int my_column() { return my_lane() % 4 * 4; }

template <typename Action> __device__ inline void for_each_item(Action action) {
#pragma unroll
    for (int m = 0; m < M_TILES; m++)
        for (int j = 0; j < 2; j++)
            for (int e = 0; e < 4; e++) action(m, j, e);
}

// Channels 16 k .. of a warp's rows, which are in a tile or already in registers.
__device__ inline Operand part(const TileRow* rows, int k) {
    Operand a;
#pragma unroll
    for (int m = 0; m < M_TILES; m++)
        ldmatrix_x4(a.tile[m], &rows[16 * m + my_lane() % 16][16 * k + my_lane() / 16 * 8]);
    return a;
}
__device__ inline const Operand& part(const Rows& rows, int k) { return rows.part[k]; }

__device__ inline void load(Rows& rows, const TileRow* tile) {
#pragma unroll
    for (int k = 0; k < D / 16; k++) rows.part[k] = part(tile, k);
}

// Columns 8 n .. 8 n + 15 of sums += a @ b.
template <int N>
__device__ inline void multiply(float (&sums)[M_TILES][N][4], int n, const Operand& a, const unsigned (&b)[4]) {
    const unsigned left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
    for (int m = 0; m < M_TILES; m++) {
        mma_bf16(sums[m][n], a.tile[m], left);
        mma_bf16(sums[m][n + 1], a.tile[m], right);
    }
}

// slice = rows @ columns.T, for sixteen columns in a tile.
template <typename AnyRows>
__device__ inline void multiply_transposed(Slice& slice, const AnyRows& rows, const TileRow* columns) {
    for_each_item([&](int m, int j, int e) { slice[m][j][e] = 0; });
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        unsigned b[4];
        ldmatrix_x4(b, &columns[my_lane() / 16 * 8 + my_lane() % 8][16 * k + my_lane() / 8 % 2 * 8]);
        multiply(slice, 0, part(rows, k), b);
    }
}

// sums += slice @ columns. Of a result each lane holds what it has to bring as an operand, but for the packing.
__device__ inline void accumulate(Sums& sums, const Slice& slice, const TileRow* columns) {
    Operand a;
    for_each_item([&](int m, int j, int e) {
        if (e % 2 == 0) a.tile[m][2 * j + e / 2] = pack_bf16(slice[m][j][e], slice[m][j][e + 1]);
    });
#pragma unroll
    for (int n = 0; n < D / 16; n++) {
        unsigned b[4];
        ldmatrix_x4_trans(b, &columns[my_lane() % 16][16 * n + my_lane() / 16 * 8]);
        multiply(sums, 2 * n, a, b);
    }
}

// Puts `unseen` where a query does not see a key, and 0 where it sees no other: its weight is 1 and has no gradient,
// whatever the score, and rounding is to make nothing else of it. row, column: where the slice begins in the matrix of
// scores.
template <bool ROWS_ARE_KEYS>
__device__ inline void mask(Slice& slice, float unseen, const Problem& problem, int row, int column) {
    for_each_item([&](int m, int j, int e) {
        const int r = row + 16 * m + my_row() + e / 2, c = column + my_column() + 2 * j + e % 2;
        const Range seen = problem.seen<ROWS_ARE_KEYS>(r);
        float& x = slice[m][j][e];
        if (c < seen.begin || c >= seen.end) x = unseen;
        else if (problem.keys(ROWS_ARE_KEYS ? c : r) == 1) x -= x;  // a NaN stays one
    });
}

// action(m, j, e, whether the weight there is kept). row, column: where the slice begins in what the tile is for.
template <bool ROWS_ARE_KEYS, typename Action>
__device__ inline void for_each_flag(const FlagTile& tile, int row, int column, Action action) {
    const int pitch = (ROWS_ARE_KEYS ? STEP : ROWS) + 16, lane = my_lane(), m_tile = lane / 16 % M_TILES * 16;
    unsigned flags[4];  // four flags in each
    if (ROWS_ARE_KEYS) ldmatrix_x4(flags, &tile[(row + m_tile + row_of_mma(lane % 16)) * pitch + column]);
    else ldmatrix_x4_trans(flags, &tile[(column + column_of_mma(lane % 16)) * pitch + row + m_tile]);
    for_each_item([&](int m, int j, int e) {
        const int h = e / 2, i = e % 2;
        unsigned flag = ROWS_ARE_KEYS ? flags[2 * m + h] >> 8 * (2 * j + i) : flags[2 * m + j] >> 8 * (2 * i + h);
        action(m, j, e, flag & 1);
    });
}

__device__ inline float quad_sum(float x) {  // of the four lanes that share rows
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

__device__ inline float quad_max(float x) {
    x = max(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return max(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// The sum of the products of two pairs of numbers.
__device__ inline float dot_bf16(unsigned x, unsigned y) {
    const unsigned high = 0xffff0000u;
    return __uint_as_float(x << 16) * __uint_as_float(y << 16) + __uint_as_float(x & high) * __uint_as_float(y & high);
}

// -- between tiles and global memory --

// Starts to copy rows `first` .. into a tile; of sixteen, place i is for row order(i). Beyond the last row that one is
// repeated: any finite numbers would do, as nothing sees them.
template <int order(int), int N> __device__ inline void fetch(TileRow (&tile)[N], const Source& x, int first) {
    const int chunk = threadIdx.x % CHUNKS * PACK;
#pragma unroll
    for (int i = 0; i < N; i += THREADS / CHUNKS) {
        int place = i + threadIdx.x / CHUNKS, row = first + place / 16 * 16 + order(place % 16);
        cp_async16(&tile[place][chunk], x.row + (Index)min(row, x.rows - 1) * x.stride + chunk);
    }
}

template <bool ROWS_ARE_KEYS>
__device__ inline void fetch_flags(FlagTile& tile, const Problem& problem, int first_row, int first_column) {
    constexpr int KEYS = ROWS_ARE_KEYS ? ROWS : STEP, QUERIES = ROWS_ARE_KEYS ? STEP : ROWS;
    const int first_key = ROWS_ARE_KEYS ? first_row : first_column;
    const int first_query = ROWS_ARE_KEYS ? first_column : first_row;
    const int each = problem.T % 16 ? 1 : 16;  // a copy of 16 has to begin at a multiple of 16
#pragma unroll 1
    for (int i = threadIdx.x * each; i < KEYS * QUERIES; i += THREADS * each) {
        const int key = first_key + i / QUERIES, query = first_query + i % QUERIES;
        if (key >= problem.S || query >= problem.T) continue;
        Flag* to = &tile[i / QUERIES * (QUERIES + 16) + i % QUERIES];
        const Flag* from = problem.keep + (Index)key * problem.T + query;
        if (each == 16) cp_async16(to, from);
        else *to = *from;
    }
}

// The end of what a step fetches, more in some lanes than in others: mma and ldmatrix want a warp's lanes together.
__device__ inline void commit() {
    cp_async_commit();
    __syncwarp();
}

// The end of a step and the begin of the next.
__device__ inline void arrive() {
    cp_async_wait<0>();
    __syncthreads();  // everyone's copies are there, and everyone is done with what the next ones overwrite
}

// Rows `first` .. of y = sums * factor, by way of a warp's rows of a tile, so that whole chunks are written.
__device__ inline void store(const Target& y, int first, const Sums& sums, float factor, TileRow* tile) {
    __syncwarp();
#pragma unroll
    for (int m = 0; m < M_TILES; m++)
        for (int n = 0; n < D / 8; n++)
            for (int h = 0; h < 2; h++)
                *(unsigned*)&tile[16 * m + 8 * h + my_lane() / 4][8 * n + my_lane() % 4 * 2] =
                    pack_bf16(sums[m][n][2 * h] * factor, sums[m][n][2 * h + 1] * factor);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < WARP_ROWS; i += WARP / CHUNKS) {
        int place = i + my_lane() / CHUNKS, row = first + place / 16 * 16 + row_of_mma(place % 16);
        int chunk = my_lane() % CHUNKS * PACK;
        if (row < y.rows) *(Pack*)(y.row + (Index)row * y.stride + chunk) = *(const Pack*)&tile[place][chunk];
    }
}

// -- forward --

struct ForwardTiles {
    TileRow q[ROWS];
    ColumnTiles kv[2];  // of this step and the next
    FlagTile flags[2];
};

KERNEL flash_attention(
    TENSOR(const bfloat16, q), TENSOR(const bfloat16, k), TENSOR(const bfloat16, v), TENSOR(bfloat16, y), float* lse,
    OPTIONS) {
    DYNAMIC_SHARED(Pack, shared);
    ForwardTiles& tiles = *(ForwardTiles*)shared;
    const Problem problem(keep, keep_scale, scale, causal, H, T, S);
    const Source q = MATRIX(q, T), k = MATRIX(k, S), v = MATRIX(v, S);
    const Target y = MATRIX(y, T);
    const Share<false> own(problem);

    auto fetch_step = [&](int step) {
        fetch<column_of_mma>(tiles.kv[step % 2].a, k, step * STEP);
        fetch<column_of_mma>(tiles.kv[step % 2].b, v, step * STEP);
        if (keep) fetch_flags<false>(tiles.flags[step % 2], problem, own.block_row, step * STEP);
        commit();
    };
    fetch<row_of_mma>(tiles.q, q, own.block_row);
    fetch_step(0);
    arrive();
    Rows q_rows;
    load(q_rows, &tiles.q[own.warp_row]);

    Sums sums = {};                  // of exp(scale (score - row_max)) v
    float row_sum[M_TILES][2] = {};  // of exp(scale (score - row_max)), over this lane's columns
    float row_max[M_TILES][2];
    for (int m = 0; m < M_TILES; m++) row_max[m][0] = row_max[m][1] = LOWEST;

    for (int step = 0; step < own.steps.end; step++, arrive()) {
        if (step + 1 < own.steps.end) fetch_step(step + 1);
        const ColumnTiles& kv = tiles.kv[step % 2];
        const int first_key = step * STEP;
        if (!own.some.meets(first_key)) continue;

        Slice scores[SLICES];
#pragma unroll
        for (int s = 0; s < SLICES; s++) multiply_transposed(scores[s], q_rows, &kv.a[16 * s]);
        if (!own.all.covers(first_key))
#pragma unroll
            for (int s = 0; s < SLICES; s++) mask<false>(scores[s], LOWEST, problem, own.row, first_key + 16 * s);

        // The maximum so far is what the exponentials are taken from; where it rises, earlier ones shrink.
#pragma unroll
        for (int m = 0; m < M_TILES; m++)
            for (int h = 0; h < 2; h++) {
                float peak = row_max[m][h];
                for (int s = 0; s < SLICES; s++)
                    for (int i = 0; i < 4; i++) peak = max(peak, scores[s][m][i / 2][2 * h + i % 2]);
                peak = quad_max(peak);
                const float shrink = power_of_2((row_max[m][h] - peak) * problem.exponent_scale);
                row_max[m][h] = peak;
                row_sum[m][h] *= shrink;
                for (int n = 0; n < D / 8; n++)
                    for (int i = 0; i < 2; i++) sums[m][n][2 * h + i] *= shrink;
                for (int s = 0; s < SLICES; s++)
                    for (int i = 0; i < 4; i++) {
                        float& score = scores[s][m][i / 2][2 * h + i % 2];
                        score = power_of_2(score * problem.exponent_scale - peak * problem.exponent_scale);
                        row_sum[m][h] += score;
                    }
            }

        if (keep)
#pragma unroll
            for (int s = 0; s < SLICES; s++)
                for_each_flag<false>(tiles.flags[step % 2], own.warp_row, 16 * s, [&](int m, int j, int e, bool keep) {
                    if (!keep) scores[s][m][j][e] = 0;  // the others are scaled at the end
                });
#pragma unroll
        for (int s = 0; s < SLICES; s++) accumulate(sums, scores[s], &kv.b[16 * s]);
    }

#pragma unroll
    for (int m = 0; m < M_TILES; m++)
        for (int h = 0; h < 2; h++) {
            const float sum = quad_sum(row_sum[m][h]), factor = (keep ? problem.keep_scale : 1) / sum;
            const int query = own.row + 16 * m + my_row() + h;  // lse has room for those beyond T, which gkv reads
            if (my_lane() % 4 == 0)
                lse[problem.statistics + query] = row_max[m][h] * problem.exponent_scale + log2f(sum);
            for (int n = 0; n < D / 8; n++)
                for (int i = 0; i < 2; i++) sums[m][n][2 * h + i] *= factor;
        }
    store(y, own.row, sums, 1, &tiles.q[own.warp_row]);
}

// -- backward --
//
// With P = softmax(S), S = scale q k', and W = dropout(P):
//   gW = gy v', gv = W' gy, gS = W gW - P delta, delta = rowsum(W gW) = rowsum(y gy), gq = scale gS k, gk = scale gS' q
//
// A block sums over the columns, for its rows: over keys for gq, over queries for gk and gv, which makes two kernels.
// Both have one body, for matrices a and b of which there are rows and columns:
//
//        rows a, b    columns a, b
//   gq   q, gy        k, v            S = scale (rows a) (columns a)', gW = (rows b) (columns b)',
//   gkv  k, v         q, gy           sums a = gS (columns a) and, in gkv, sums b = W (columns b)

struct BackwardTiles {
    TileRow a[ROWS], b[ROWS];
    union {
        ColumnTiles columns[2];
        struct { ColumnTiles first; TileRow y[ROWS]; };  // y is done with before the second step's columns come
    };
    struct { Four lse[STEP / 4], delta[STEP / 4]; } statistics[2];
    FlagTile flags[2];
};

template <bool ROWS_ARE_KEYS>
__device__ inline void backward(
    BackwardTiles& tiles, const Problem& problem, const Source& rows_a, const Source& rows_b, const Source& columns_a,
    const Source& columns_b, const Source* y, const float* lse, float* delta, const Target& ga, const Target* gb) {
    const Share<ROWS_ARE_KEYS> own(problem);
    lse += problem.statistics, delta += problem.statistics;

    auto fetch_step = [&](int step) {
        fetch<column_of_mma>(tiles.columns[step % 2].a, columns_a, step * STEP);
        fetch<column_of_mma>(tiles.columns[step % 2].b, columns_b, step * STEP);
        if (ROWS_ARE_KEYS && threadIdx.x < STEP / 4) {
            cp_async16(&tiles.statistics[step % 2].lse[threadIdx.x], lse + step * STEP + threadIdx.x * 4);
            cp_async16(&tiles.statistics[step % 2].delta[threadIdx.x], delta + step * STEP + threadIdx.x * 4);
        }
        if (problem.keep) fetch_flags<ROWS_ARE_KEYS>(tiles.flags[step % 2], problem, own.block_row, step * STEP);
        commit();
    };
    fetch<row_of_mma>(tiles.a, rows_a, own.block_row);
    fetch<row_of_mma>(tiles.b, rows_b, own.block_row);
    if (!ROWS_ARE_KEYS) fetch<row_of_mma>(tiles.y, *y, own.block_row);
    fetch_step(own.steps.begin);
    arrive();
    Rows a, b;  // in gkv there is no room for b, which is read from its tile again and again
    load(a, &tiles.a[own.warp_row]);
    if (!ROWS_ARE_KEYS) load(b, &tiles.b[own.warp_row]);

    float row_lse[M_TILES][2], row_delta[M_TILES][2] = {};
    if (!ROWS_ARE_KEYS) {
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            const Operand y_part = part(&tiles.y[own.warp_row], k);
            for (int m = 0; m < M_TILES; m++)
                for (int e = 0; e < 4; e++) row_delta[m][e % 2] += dot_bf16(y_part.tile[m][e], b.part[k].tile[m][e]);
        }
#pragma unroll
        for (int m = 0; m < M_TILES; m++)
            for (int h = 0; h < 2; h++) {
                const int query = own.row + 16 * m + my_row() + h;
                row_lse[m][h] = lse[query];
                row_delta[m][h] = quad_sum(row_delta[m][h]);
                if (my_lane() % 4 == 0) delta[query] = row_delta[m][h];
            }
        __syncthreads();  // all are done with y
    }

    Sums sums_a = {}, sums_b = {};
    for (int step = own.steps.begin; step < own.steps.end; step++, arrive()) {
        if (step + 1 < own.steps.end) fetch_step(step + 1);
        const ColumnTiles& columns = tiles.columns[step % 2];
        const int first_column = step * STEP;
        if (!own.some.meets(first_column)) continue;
        const bool edge = !own.all.covers(first_column);

#pragma unroll ROWS_ARE_KEYS ? 1 : SLICES  // of registers, two sums leave less
        for (int s = 0; s < SLICES; s++) {
            Slice probs, weights, gweights, gscores;
            multiply_transposed(probs, a, &columns.a[16 * s]);
            if (ROWS_ARE_KEYS) multiply_transposed(gweights, &tiles.b[own.warp_row], &columns.b[16 * s]);
            else multiply_transposed(gweights, b, &columns.b[16 * s]);

            Four column_lse, column_delta;
            if (ROWS_ARE_KEYS) {
                column_lse = tiles.statistics[step % 2].lse[(16 * s + my_column()) / 4];
                column_delta = tiles.statistics[step % 2].delta[(16 * s + my_column()) / 4];
            }
            for_each_item([&](int m, int j, int e) {
                const float lse = ROWS_ARE_KEYS ? column_lse.item[2 * j + e % 2] : row_lse[m][e / 2];
                probs[m][j][e] = probs[m][j][e] * problem.exponent_scale - lse;
            });
            if (edge) mask<ROWS_ARE_KEYS>(probs, LOWEST, problem, own.row, first_column + 16 * s);
            for_each_item([&](int m, int j, int e) { probs[m][j][e] = weights[m][j][e] = power_of_2(probs[m][j][e]); });
            if (problem.keep)
                for_each_flag<ROWS_ARE_KEYS>(
                    tiles.flags[step % 2], own.warp_row, 16 * s, [&](int m, int j, int e, bool keep) {
                        weights[m][j][e] = keep ? weights[m][j][e] * problem.keep_scale : 0;
                        if (!keep) gweights[m][j][e] = 0;
                    });
            if (ROWS_ARE_KEYS) accumulate(sums_b, weights, &columns.b[16 * s]);
            for_each_item([&](int m, int j, int e) {
                const float delta = ROWS_ARE_KEYS ? column_delta.item[2 * j + e % 2] : row_delta[m][e / 2];
                gscores[m][j][e] = weights[m][j][e] * gweights[m][j][e] - probs[m][j][e] * delta;
            });
            if (edge) mask<ROWS_ARE_KEYS>(gscores, 0, problem, own.row, first_column + 16 * s);
            accumulate(sums_a, gscores, &columns.a[16 * s]);
        }
    }
    store(ga, own.row, sums_a, problem.scale, &tiles.a[own.warp_row]);
    if (ROWS_ARE_KEYS) store(*gb, own.row, sums_b, 1, &tiles.b[own.warp_row]);
}

KERNEL flash_attention_gq(
    TENSOR(const bfloat16, q), TENSOR(const bfloat16, k), TENSOR(const bfloat16, v), TENSOR(const bfloat16, y),
    TENSOR(const bfloat16, gy), TENSOR(bfloat16, gq), const float* lse, float* delta, OPTIONS) {
    DYNAMIC_SHARED(Pack, shared);
    const Source q = MATRIX(q, T), k = MATRIX(k, S), v = MATRIX(v, S), y = MATRIX(y, T), gy = MATRIX(gy, T);
    const Target gq = MATRIX(gq, T);
    const Problem problem(keep, keep_scale, scale, causal, H, T, S);
    backward<false>(*(BackwardTiles*)shared, problem, q, gy, k, v, &y, lse, delta, gq, nullptr);
}

KERNEL flash_attention_gkv(
    TENSOR(const bfloat16, q), TENSOR(const bfloat16, k), TENSOR(const bfloat16, v), TENSOR(const bfloat16, gy),
    TENSOR(bfloat16, gk), TENSOR(bfloat16, gv), const float* lse, float* delta, OPTIONS) {
    DYNAMIC_SHARED(Pack, shared);
    const Source q = MATRIX(q, T), k = MATRIX(k, S), v = MATRIX(v, S), gy = MATRIX(gy, T);
    const Target gk = MATRIX(gk, S), gv = MATRIX(gv, S);
    const Problem problem(keep, keep_scale, scale, causal, H, T, S);
    backward<true>(*(BackwardTiles*)shared, problem, k, v, q, gy, nullptr, lse, delta, gk, &gv);
}

#endif
