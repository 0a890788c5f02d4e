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
// Three launches of 128 threads each, the last two in this order. A block of the first takes ROWS queries and STEP keys
// at a time, one of the last ROWS keys and 32 queries. ROWS and STEP are 128 and 64; for D = 128 they are 64 and 32.
//
//   kernel                   grid                       bytes of shared memory                     and with dropout
//   flash_attention          (B H, ceil(T / ROWS))      2 (D + 8) (ROWS + 4 STEP)                  2 ROWS (STEP + 16)
//   flash_attention_delta    (B H, ceil(T D / 1024))    0
//   flash_attention_vjp      (B H ceil(S / ROWS))       2 (D + 8) (2 ROWS + 128) + 80 ROWS + 512   96 ROWS
//
// These can be more than 48 KB, which CuPy has to be told in max_dynamic_shared_size_bytes, and are less than the 99 KB
// that all such GPUs have. Nothing is summed in an order that changes: the same inputs give the same bits.
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

// A block of four warps keeps ROWS rows of the matrix of scores, and its loop takes some columns at a time. Rows are
// queries and columns are keys, or, on the way back, the other way round.
constexpr int D = HEAD_DIM;
static_assert(D == 32 || D == 64 || D == 128, "HEAD_DIM is to be 32, 64 or 128");
constexpr int M_TILES = D <= 64 ? 2 : 1;  // of 16 rows to a warp. With one, shared memory is slower than the mma
constexpr int WARP_ROWS = 16 * M_TILES;
constexpr int ROWS = 4 * WARP_ROWS, THREADS = 4 * WARP;
constexpr int STEP = ROWS / 2;            // columns of a step, on the way forward
constexpr int BACK = 32;                  // and back. With more, an A100 has room for one block only
constexpr int CHUNKS = D / PACK;          // of 16 bytes in a row of channels
constexpr int PITCH = D + PACK;           // the odd chunk puts the eight rows that ldmatrix reads into different banks

typedef unsigned char Flag;
typedef bfloat16 TileRow[PITCH];
template <int KEYS, int QUERIES> struct alignas(16) FlagTile { Flag key[KEYS][QUERIES + 16]; };  // for the banks too
struct alignas(16) Four { float item[4]; };

// -- what the kernels are called with --

#define TENSOR(type, name) type *name##_data, Index name##_batch, Index name##_head, Index name##_row
#define OPTIONS const Flag *keep, double keep_scale, double scale, Index causal, Index H, Index T, Index S

// What a tensor has for a batch and head, `head` in all: (rows, D).
template <typename T> struct Matrix { T* row; int stride, rows; };
typedef Matrix<const bfloat16> Source;
typedef Matrix<bfloat16> Target;

#define MATRIX(name, rows) \
    {name##_data + head / (int)H * name##_batch + head % (int)H * name##_head, (int)name##_row, (int)rows}

struct Range {
    int begin, end;
    // Has it any, or all, of the n from `first` on?
    __device__ bool meets(int first, int n) const { return first + n > begin && first < end; }
    __device__ bool covers(int first, int n) const { return first >= begin && first + n <= end; }
};

// The options, for a batch and head.
struct Problem {
    int T, S;
    bool causal;
    const Flag* keep;
    float keep_scale, scale, exponent_scale;  // exp(scale * x) is 2 ** (exponent_scale * x), quicker on a GPU
    Index statistics;                         // where lse and delta begin

    __device__ Problem(int head, OPTIONS)
        : T(T), S(S), causal(causal), keep(keep ? keep + head * S * T : nullptr), keep_scale(keep ? keep_scale : 1),
          scale(scale), exponent_scale(scale * 1.4426950408889634), statistics(head * ((T + 127) / 128 * 128)) {}

    // How many keys a query sees.
    __device__ int keys(int query) const { return causal ? min(S, query + 1 + (S - T)) : S; }

    // The columns that a row sees, which a row beyond the last key does not. From row to row, neither end goes back.
    template <bool ROWS_ARE_KEYS> __device__ Range seen(int row) const {
        if (ROWS_ARE_KEYS) return {row >= S ? T : causal ? max(0, row - (S - T)) : 0, T};
        return {0, keys(row)};
    }
};

// The part of the scores that falls to this block and this warp.
template <bool ROWS_ARE_KEYS> struct Share {
    int block_row, warp_row, row;  // the block's first row; the warp's, counted from there; the warp's
    Range steps;                   // of the block's loop
    Range some, all;               // the columns that some of the warp's rows see, and that need no mask

    __device__ Share(const Problem& problem, int block) {
        constexpr int COLUMNS = ROWS_ARE_KEYS ? BACK : STEP;
        block_row = block * ROWS;
        warp_row = threadIdx.x / WARP * WARP_ROWS;
        row = block_row + warp_row;
        auto seen = [&](int row) { return problem.seen<ROWS_ARE_KEYS>(row); };
        steps = {seen(block_row).begin / COLUMNS, (seen(block_row + ROWS - 1).end + COLUMNS - 1) / COLUMNS};
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
template <int M, int N>
__device__ inline void multiply(float (&sums)[M][N][4], int n, const unsigned (&a)[M][4], const unsigned (&b)[4]) {
    const unsigned left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
    for (int m = 0; m < M; m++) {
        mma_bf16(sums[m][n], a[m], left);
        mma_bf16(sums[m][n + 1], a[m], right);
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
        multiply(slice, 0, part(rows, k).tile, b);
    }
}

// Of a result each lane holds what it has to bring as an operand, but for the packing.
__device__ inline Operand pack(const Slice& slice) {
    Operand a;
    for_each_item([&](int m, int j, int e) {
        if (e % 2 == 0) a.tile[m][2 * j + e / 2] = pack_bf16(slice[m][j][e], slice[m][j][e + 1]);
    });
    return a;
}

// sums += a @ columns.
__device__ inline void accumulate(Sums& sums, const Operand& a, const TileRow* columns) {
#pragma unroll
    for (int n = 0; n < D / 16; n++) {
        unsigned b[4];
        ldmatrix_x4_trans(b, &columns[my_lane() % 16][16 * n + my_lane() / 16 * 8]);
        multiply(sums, 2 * n, a.tile, b);
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
template <bool ROWS_ARE_KEYS, typename Tile, typename Action>
__device__ inline void for_each_flag(const Tile& tile, int row, int column, Action action) {
    const int lane = my_lane(), m_tile = lane / 16 % M_TILES * 16;
    unsigned flags[4];  // four flags in each
    if (ROWS_ARE_KEYS) ldmatrix_x4(flags, &tile.key[row + m_tile + row_of_mma(lane % 16)][column]);
    else ldmatrix_x4_trans(flags, &tile.key[column + column_of_mma(lane % 16)][row + m_tile]);
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

template <int KEYS, int QUERIES>
__device__ inline void fetch_flags(
    FlagTile<KEYS, QUERIES>& tile, const Problem& problem, int first_key, int first_query) {
    const int each = problem.T % 16 ? 1 : 16;  // a copy of 16 has to begin at a multiple of 16
#pragma unroll 1
    for (int i = threadIdx.x * each; i < KEYS * QUERIES; i += THREADS * each) {
        const int key = first_key + i / QUERIES, query = first_query + i % QUERIES;
        if (key >= problem.S || query >= problem.T) continue;
        Flag* to = &tile.key[i / QUERIES][i % QUERIES];
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
    struct { TileRow k[STEP], v[STEP]; } kv[2];  // of this step and the next
    FlagTile<STEP, ROWS> flags[2];
};

KERNEL flash_attention(
    TENSOR(const bfloat16, q), TENSOR(const bfloat16, k), TENSOR(const bfloat16, v), TENSOR(bfloat16, y), float* lse,
    OPTIONS) {
    DYNAMIC_SHARED(Pack, shared);
    ForwardTiles& tiles = *(ForwardTiles*)shared;
    const int head = blockIdx.x;
    const Problem problem(head, keep, keep_scale, scale, causal, H, T, S);
    const Source q = MATRIX(q, T), k = MATRIX(k, S), v = MATRIX(v, S);
    const Target y = MATRIX(y, T);
    const Share<false> own(problem, gridDim.y - 1 - blockIdx.y);  // those that have most to do come first, if causal

    auto fetch_step = [&](int step) {
        fetch<column_of_mma>(tiles.kv[step % 2].k, k, step * STEP);
        fetch<column_of_mma>(tiles.kv[step % 2].v, v, step * STEP);
        if (keep) fetch_flags(tiles.flags[step % 2], problem, step * STEP, own.block_row);
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
        const auto& kv = tiles.kv[step % 2];
        const int first_key = step * STEP;
        if (!own.some.meets(first_key, STEP)) continue;

        constexpr int SLICES = STEP / 16;
        Slice scores[SLICES];
#pragma unroll
        for (int s = 0; s < SLICES; s++) multiply_transposed(scores[s], q_rows, &kv.k[16 * s]);
        if (!own.all.covers(first_key, STEP))
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
        for (int s = 0; s < SLICES; s++) accumulate(sums, pack(scores[s]), &kv.v[16 * s]);
    }

#pragma unroll
    for (int m = 0; m < M_TILES; m++)
        for (int h = 0; h < 2; h++) {
            const float sum = quad_sum(row_sum[m][h]), factor = problem.keep_scale / sum;
            const int query = own.row + 16 * m + my_row() + h;  // lse has room for those beyond T
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
// A block has ROWS keys, of which it sums gk and gv over the queries. To gq, a sum over keys, the blocks of a head add
// in the order of their keys, in float32; the last one to add rounds the sum. All of them take the queries from the
// last to the first, one behind the other, as with causal attention the first keys are those that all queries see. A
// block that has come to queries which the one before has not left yet waits for it. It was begun before, as what a
// block is to do is decided by the order in which they begin, and the first one waits for none: so it ends.
//
// Counted for GPT-2 124M with B = 12 (no GPU has timed it): writing such sums for each block and adding them up later
// moves 4.1 GB a step, which takes an H200 longer than the two products that this saves. These are to stay in L2.

constexpr int TURN = 2 * BACK;  // queries that a block leaves to the next at a time

struct BackwardTiles {
    TileRow k[ROWS], v[ROWS];
    struct { TileRow q[BACK], gy[BACK]; Four lse[BACK / 4], delta[BACK / 4]; } step[2];  // this one and the next
    bfloat16 gscores[ROWS][BACK + PACK];  // keys and queries in the order of the tiles
    FlagTile<ROWS, BACK> flags[2];
};

// delta, (B H, T rounded up to 128s). done: what the blocks of flash_attention_vjp agree by, which begins at 0: how
// many have begun, and for each head and TURN queries how many have added their part of gq.
KERNEL flash_attention_delta(
    TENSOR(const bfloat16, y), TENSOR(const bfloat16, gy), float* delta, unsigned* done, Index H, Index T) {
    const int head = blockIdx.x, row = (blockIdx.y * THREADS + threadIdx.x) / CHUNKS;
    const int turns = ((int)T + TURN - 1) / TURN;
    const Source y = MATRIX(y, T), gy = MATRIX(gy, T);
    if (threadIdx.x == 0 && blockIdx.y < turns) done[1 + head * turns + blockIdx.y] = 0;
    if (threadIdx.x == 0 && blockIdx.x == 0 && blockIdx.y == 0) done[0] = 0;

    const int from = min(row, (int)T - 1), chunk = threadIdx.x % CHUNKS * PACK;
    const Pack y_pack = *(const Pack*)(y.row + (Index)from * y.stride + chunk);
    const Pack gy_pack = *(const Pack*)(gy.row + (Index)from * gy.stride + chunk);
    float sum = 0;
    for (int i = 0; i < PACK; i++) sum += real(y_pack.item[i]) * real(gy_pack.item[i]);
    for (int step = 1; step < CHUNKS; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (chunk == 0 && row < T) delta[head * ((T + 127) / 128 * 128) + row] = sum;
}

// Waits for the blocks before to have added their part of gq to these queries. Those of `left`, if any, are then the next
// one's. One fence is for both: what those have added is to be seen from here on, and what this one has, by the next.
__device__ inline void take_turn(volatile unsigned* next, volatile unsigned* left, unsigned block) {
    while (next && *next != block) {
#ifdef CUDA_ON_CPU
        __trap();  // there, blocks run one after another
#endif
    }
    __threadfence();
    if (left) *left = block + 1;
}

// gq of BACK queries: adds what the first `keys` of the block's keys make of it. A warp takes sixteen queries and half
// of the channels, or of 64 at a time. sums: what the blocks before have made of it, in the order of the threads.
__device__ inline void add_gq(
    const BackwardTiles& tiles, const Target& gq, float4* sums, int first_query, int keys, bool first, bool last,
    float scale) {
    constexpr int WIDTH = D < 64 ? D : 64, N = WIDTH / 16;
    const int lane = my_lane(), warp = threadIdx.x / WARP, queries = warp % 2 * 16;
    sums += threadIdx.x;
#pragma unroll 1
    for (int channels = warp / 2 * (WIDTH / 2); channels < D; channels += WIDTH, sums += N * THREADS) {
        float4 before[N] = {};
        if (!first)
#pragma unroll
            for (int n = 0; n < N; n++) before[n] = __ldcg(&sums[n * THREADS]);  // in L1 there may be an older one

        float part[1][N][4] = {};
#pragma unroll D == 128 ? 1 : 4  // there, the sums leave fewest registers
        for (int key = 0; key < keys; key += 16) {
            unsigned a[1][4], b[4];
            ldmatrix_x4_trans(a[0], &tiles.gscores[key + lane / 16 * 8 + lane % 8][queries + lane / 8 % 2 * 8]);
#pragma unroll
            for (int n = 0; n < N; n += 2) {
                ldmatrix_x4_trans(b, &tiles.k[key + lane % 16][channels + 8 * n + lane / 16 * 8]);
                multiply(part, n, a, b);
            }
        }
#pragma unroll
        for (int n = 0; n < N; n++) {
            float4 sum = before[n];
            sum.x += part[0][n][0], sum.y += part[0][n][1], sum.z += part[0][n][2], sum.w += part[0][n][3];
            if (!last) {
                __stcg(&sums[n * THREADS], sum);
                continue;
            }
            for (int h = 0; h < 2; h++) {
                const int query = first_query + queries + column_of_mma(lane / 4 + 8 * h);
                const unsigned pair = pack_bf16((h ? sum.z : sum.x) * scale, (h ? sum.w : sum.y) * scale);
                bfloat16* row = gq.row + (Index)query * gq.stride;
                if (query < gq.rows) *(unsigned*)&row[channels + 8 * n + lane % 4 * 2] = pair;
            }
        }
    }
}

// Sixteen queries, in places 16 s .. of a step: adds their part to the sums, gk and gv but for a factor, and writes gS.
__device__ inline void add_slice(
    Sums& sums_k, Sums& sums_v, BackwardTiles& tiles, const Problem& problem, const Share<true>& own,
    const Rows& k_rows, int step, int s, bool edge) {
    const auto& columns = tiles.step[step % 2];
    const int first_query = step * BACK + 16 * s, four = (16 * s + my_column()) / 4;
    const Four lse = columns.lse[four], delta = columns.delta[four];
    Slice probs, weights, gweights, gscores;
    multiply_transposed(probs, k_rows, &columns.q[16 * s]);
    multiply_transposed(gweights, &tiles.v[own.warp_row], &columns.gy[16 * s]);

    for_each_item([&](int m, int j, int e) {
        probs[m][j][e] = probs[m][j][e] * problem.exponent_scale - lse.item[2 * j + e % 2];
    });
    if (edge) mask<true>(probs, LOWEST, problem, own.row, first_query);
    for_each_item([&](int m, int j, int e) { probs[m][j][e] = weights[m][j][e] = power_of_2(probs[m][j][e]); });
    if (problem.keep)
        for_each_flag<true>(tiles.flags[step % 2], own.warp_row, 16 * s, [&](int m, int j, int e, bool keep) {
            if (!keep) weights[m][j][e] = gweights[m][j][e] = 0;  // the others are scaled later
        });
    accumulate(sums_v, pack(weights), &columns.gy[16 * s]);
    for_each_item([&](int m, int j, int e) {
        gscores[m][j][e] = probs[m][j][e] * (problem.keep_scale * gweights[m][j][e] - delta.item[2 * j + e % 2]);
    });
    if (edge) mask<true>(gscores, 0, problem, own.row, first_query);
    const Operand packed = pack(gscores);
    accumulate(sums_k, packed, &columns.q[16 * s]);
#pragma unroll
    for (int m = 0; m < M_TILES; m++)
        for (int i = 0; i < 4; i++) {
            const int key = own.warp_row + 16 * m + my_lane() / 4 + i % 2 * 8;
            *(unsigned*)&tiles.gscores[key][16 * s + i / 2 * 8 + my_lane() % 4 * 2] = packed.tile[m][i];
        }
}

// sums: float32 (B H, T rounded up to 32s, D), for gq. members: heads whose blocks begin together, so that what these
// read again and again fits in L2; of such heads, the blocks that have most to do, if causal, begin first.
KERNEL flash_attention_vjp(
    TENSOR(const bfloat16, q), TENSOR(const bfloat16, k), TENSOR(const bfloat16, v), TENSOR(const bfloat16, gy),
    TENSOR(bfloat16, gq), TENSOR(bfloat16, gk), TENSOR(bfloat16, gv), const float* lse, const float* delta, float* sums,
    unsigned* done, Index members, OPTIONS) {
    DYNAMIC_SHARED(Pack, shared);
    BackwardTiles& tiles = *(BackwardTiles*)shared;
    if (threadIdx.x == 0) *(unsigned*)tiles.gscores = atomicAdd(done, 1u);
    __syncthreads();
    const unsigned ticket = *(unsigned*)tiles.gscores;
    const int blocks = ((int)S + ROWS - 1) / ROWS, heads = gridDim.x / blocks;
    const int first = ticket / (blocks * (int)members) * (int)members, beside = min((int)members, heads - first);
    const int head = first + (ticket - first * blocks) % beside, block = (ticket - first * blocks) / beside;

    const Problem problem(head, keep, keep_scale, scale, causal, H, T, S);
    const Source q = MATRIX(q, T), k = MATRIX(k, S), v = MATRIX(v, S), gy = MATRIX(gy, T);
    const Target gq = MATRIX(gq, T), gk = MATRIX(gk, S), gv = MATRIX(gv, S);
    const Share<true> own(problem, block);
    lse += problem.statistics, delta += problem.statistics, done += 1 + head * ((problem.T + TURN - 1) / TURN);

    auto fetch_step = [&](int step) {
        auto& to = tiles.step[step % 2];
        fetch<column_of_mma>(to.q, q, step * BACK);
        fetch<column_of_mma>(to.gy, gy, step * BACK);
        if (threadIdx.x < BACK / 4) {
            cp_async16(&to.lse[threadIdx.x], lse + step * BACK + threadIdx.x * 4);
            cp_async16(&to.delta[threadIdx.x], delta + step * BACK + threadIdx.x * 4);
        }
        if (keep) fetch_flags(tiles.flags[step % 2], problem, own.block_row, step * BACK);
        commit();
    };
    fetch<row_of_mma>(tiles.k, k, own.block_row);
    fetch<row_of_mma>(tiles.v, v, own.block_row);
    fetch_step(own.steps.end - 1);
    arrive();
    Rows k_rows;  // there is no room for those of v, which are read from their tile again and again
    load(k_rows, &tiles.k[own.warp_row]);

    sums += (Index)head * own.steps.end * (BACK * D);
    Sums sums_k = {}, sums_v = {};
    for (int step = own.steps.end - 1; step >= own.steps.begin; step--, arrive()) {
        if (step > own.steps.begin) fetch_step(step - 1);
        const int first_query = step * BACK, end = first_query + BACK;
        const bool edge = !own.all.covers(first_query, BACK), newest = step == own.steps.end - 1;
        if (own.some.meets(first_query, BACK))
#pragma unroll 1  // the sums leave few registers
            for (int s = 0; s < BACK / 16; s++) add_slice(sums_k, sums_v, tiles, problem, own, k_rows, step, s, edge);

        unsigned* turn = done + first_query / TURN;
        if (threadIdx.x == 0 && (newest || end % TURN == 0)) take_turn(turn, newest ? nullptr : turn + 1, block);
        __syncthreads();
        const int keys = problem.keys(min(end, problem.T) - 1) - own.block_row, next_row = own.block_row + ROWS;
        const bool last = next_row >= problem.S || problem.seen<true>(next_row).begin >= end;
        float4* to = (float4*)(sums + first_query * D);
        add_gq(tiles, gq, to, first_query, min(keys, ROWS), block == 0, last, problem.scale);
    }
    if (threadIdx.x == 0) take_turn(nullptr, done + own.steps.begin * BACK / TURN, block);
    store(gk, own.row, sums_k, problem.scale, &tiles.k[own.warp_row]);
    store(gv, own.row, sums_v, problem.keep_scale, &tiles.v[own.warp_row]);
}

#endif
