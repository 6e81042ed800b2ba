// y (rows, n) = x (rows, k) · Wᵀ for the few rows of a decode step: what counts is to read W once, as fast as the memory
// gives it.
//
// * A block of WARPS warps owns TILE_BLOCKS · 16 rows of W at a time and goes through W tile by tile. Its warps share the
//   columns out, STEP at a time, and add up their sums through shared memory at the end of a tile.
// * Every lane copies its own share of W into a ring in shared memory DEPTH steps ahead, over the borders of tiles, and is
//   the only one to read it back. So many loads are in flight, and no barrier is needed in the loop.
// * x lies in shared memory for as long as the block lives. A cluster of CLUSTER blocks splits the columns, so that each
//   holds a part of x, and adds up over the cluster: the sums of a tile while the products of the next are under way.
// * W is the 16-row operand of the tensor cores and x the one with 8 columns: COLUMN_TILES · 8 rows of x cost hardly more
//   than one. Rows of x that do not exist repeat the last; their sums are never stored.
// * Scales multiply the float32 sums of a group, so that no product is rounded. With 4-bit codes and bfloat16 zero points
//   come off those sums too, Σ (128 + u)·x − (128 + z)·Σ x, where one product more with ones gives Σ x: instructions are
//   what this kernel spends most of its time on. (1024 + u in float16 would lose too many bits that way.)
//
// Constants: ELEMENT_BF16, SCALE_BF16, BITS, GROUP, ASYMMETRIC, COLUMN_TILES, TILE_BLOCKS, WARPS, DEPTH, CLUSTER.
#include "fragments.cuh"

constexpr int THREADS = WARPS * WARP;
constexpr int META_BYTES = STEP_GROUPS * GROUP_BYTES;                                  // scales of a step and 16 rows
constexpr int SLOT_BYTES = STEP_BYTES + META_BYTES * (1 + ASYMMETRIC);                 // a step of one block of 16 rows
constexpr int RING_BYTES = DEPTH * TILE_BLOCKS * SLOT_BYTES;                           // of one warp
constexpr int SUM_COLUMN = 20;      // floats from one column of sums to the next: 16, and 4 to spread over the banks
constexpr int SUMS = TILE_BLOCKS * COLUMN_TILES * 8 * SUM_COLUMN;
constexpr int X_PAD = 8;            // elements between two rows of x, so that 8 rows lie in different banks
constexpr int STEP_APART = WARPS * SLAB_BLOCKS * STEP_BYTES;    // codes between two steps of a warp
constexpr int PAIRS_APART = (GROUP > STEP ? WARPS * STEP / GROUP : GROUP > 0 ? WARPS * STEP_GROUPS : 0) * SLAB_BLOCKS * 8;
static_assert(SLAB_BLOCKS % TILE_BLOCKS == 0 && (GROUP <= STEP || WARPS % (GROUP / STEP) == 0), "as the walk takes it");
constexpr bool SHIFT_SUMS = BITS == 4 && ELEMENT_BF16;
constexpr u32 ONES[4] = {ONE2, ONE2, ONE2, ONE2};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
decode(const unsigned char* __restrict__ codes, const u32* __restrict__ scales, const u32* __restrict__ zeros,
       const u16* __restrict__ x, u16* __restrict__ y, int rows, int n, int k, int row_blocks, int steps, int groups) {
    extern __shared__ __align__(128) unsigned char memory[];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int g = lane / 4, t = lane % 4;
    const int rank = CLUSTER > 1 ? blockIdx.z : 0;
    const int tiles = (row_blocks + TILE_BLOCKS - 1) / TILE_BLOCKS;
    const int begin = steps * rank / CLUSTER, stop = steps * (rank + 1) / CLUSTER;     // this block's steps
    const int first = begin + warp;                                                    // this warp's first
    const int slice = (stop - begin) * STEP, pitch = slice + X_PAD;                    // of x in shared memory

    float* sums = reinterpret_cast<float*>(memory);                                    // two sets, taken in turn
    const u32 ring = shared_address(memory) + 2 * (WARPS + (CLUSTER > 1)) * SUMS * 4 + warp * RING_BYTES;
    unsigned char* x_memory = memory + 2 * (WARPS + (CLUSTER > 1)) * SUMS * 4 + WARPS * RING_BYTES;
    const u32 x_shared = shared_address(x_memory);

    let_next_kernel_start();

    // The walk: through this block's tiles, and in each through this warp's steps. A tile lies within a slab.
    int tile_ahead = first < stop ? int(blockIdx.x) : tiles, step_ahead = first, slot_ahead = 0;
    const unsigned char* codes_from;
    size_t pair_from;
    auto enter_tile = [&]() {
        codes_from = codes + codes_at(tile_ahead * TILE_BLOCKS, first, steps) + lane * 16;
        pair_from = pairs_at(tile_ahead * TILE_BLOCKS, first_group(first) + lane / 8, groups) + lane % 8;
    };
    enter_tile();
    auto fetch = [&]() {
        if (tile_ahead < tiles) {
            const u32 slot = ring + slot_ahead * TILE_BLOCKS * SLOT_BYTES;
#pragma unroll
            for (int b = 0; b < TILE_BLOCKS; b++)
#pragma unroll
                for (int p = 0; p < PIECES; p++)
                    copy_16(slot + b * SLOT_BYTES + p * PIECE_BYTES + lane * 16, codes_from + b * STEP_BYTES + p * PIECE_BYTES);
            if (lane < STEP_GROUPS * 8)
#pragma unroll
                for (int b = 0; b < TILE_BLOCKS; b++) {
                    copy_4(slot + b * SLOT_BYTES + STEP_BYTES + lane * 4, scales + pair_from + b * 8);
                    if (ASYMMETRIC)
                        copy_4(slot + b * SLOT_BYTES + STEP_BYTES + META_BYTES + lane * 4, zeros + pair_from + b * 8);
                }
            step_ahead += WARPS, codes_from += STEP_APART, pair_from += PAIRS_APART;
            if (step_ahead >= stop) {
                step_ahead = first, tile_ahead += gridDim.x;
                enter_tile();
            }
        }
        close_batch();
        slot_ahead = slot_ahead + 1 == DEPTH ? 0 : slot_ahead + 1;
    };
#pragma unroll
    for (int i = 0; i < DEPTH - 1; i++) fetch();

    // W never changes, x was written by an earlier kernel: from here on it must be there.
    wait_for_earlier_kernels();
    const int chunks = slice / 8;                                                      // of 16 bytes, in a row of x
    for (int i = threadIdx.x; i < rows * chunks; i += THREADS) {
        const int row = i / chunks, chunk = i - row * chunks, column = begin * STEP + chunk * 8;
        const u32 to = x_shared + (row * pitch + chunk * 8) * 2;
        if (column < k) copy_16(to, x + size_t(row) * k + column);
        else *reinterpret_cast<uint4*>(x_memory + (row * pitch + chunk * 8) * 2) = make_uint4(0, 0, 0, 0);
    }
    close_batch();
    wait_for_batches<0>();
    __syncthreads();

    // The row of x whose address this lane gives to `load_matrices`, for each 8 columns of the product.
    u32 x_row[COLUMN_TILES];
#pragma unroll
    for (int c = 0; c < COLUMN_TILES; c++)
        x_row[c] = x_shared + (min(c * 8 + lane % 8, rows - 1) * pitch + (lane / 8) * 8) * 2;

    constexpr int COLUMNS = COLUMN_TILES * 8, RESULTS = TILE_BLOCKS * COLUMNS * BLOCK_ROWS;
    constexpr int SET = (WARPS + (CLUSTER > 1)) * SUMS;                                // the last of them the block's own
    // Each block of the cluster stores its share of a tile's results, when all have put their sums in place.
    auto add_over_cluster = [&](int tile, int parity) {
        cluster_wait();
        for (int e = threadIdx.x + rank * THREADS; e < RESULTS; e += THREADS * CLUSTER) {
            const int row = e % BLOCK_ROWS, column = e / BLOCK_ROWS % COLUMNS, b = e / (BLOCK_ROWS * COLUMNS);
            if (column >= rows) continue;
            const u32 at = shared_address(sums + parity * SET + WARPS * SUMS + (b * COLUMNS + column) * SUM_COLUMN + row);
            float sum = 0.f;
#pragma unroll
            for (int r = 0; r < CLUSTER; r++) sum += load_from_cluster(at, r);
            const int out = (tile * TILE_BLOCKS + b) * BLOCK_ROWS + row;
            if (out < n) y[size_t(column) * n + out] = to_element(sum);
        }
    };

    int slot = 0, parity = 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, parity ^= 1) {
        float total[TILE_BLOCKS][COLUMN_TILES][4] = {};
        for (int step = first; step < stop; step += WARPS) {
            fetch();
            wait_for_batches<DEPTH - 1>();
            __syncwarp();
            const u32 here = ring + slot * TILE_BLOCKS * SLOT_BYTES;
            const u32 x_column = (step - begin) * STEP * 2;
            float part[TILE_BLOCKS][COLUMN_TILES][4] = {}, x_sum[COLUMN_TILES][4] = {};   // of a group
            u32 offset[TILE_BLOCKS][2];                                                // for rows g and g + 8
            auto zero_points = [&](int b, int group) {                                       // of both rows, 16 bits each
                return ASYMMETRIC ? load_shared_4(here + b * SLOT_BYTES + STEP_BYTES + META_BYTES + group * GROUP_BYTES + g * 4)
                                  : MIDDLE * 0x10001u;
            };
#pragma unroll
            for (int p = 0; p < PIECES; p++) {
                uint4 piece[TILE_BLOCKS];
#pragma unroll
                for (int b = 0; b < TILE_BLOCKS; b++)
                    piece[b] = load_shared_16(here + b * SLOT_BYTES + p * PIECE_BYTES + lane * 16);
#pragma unroll
                for (int j = 0; j < PRODUCTS; j++) {
                    const int column = p * PIECE_COLUMNS + j * 16;
                    const int group = column * STEP_GROUPS / STEP;
                    if (!SHIFT_SUMS && column * STEP_GROUPS % STEP == 0) {             // a group begins
#pragma unroll
                        for (int b = 0; b < TILE_BLOCKS; b++) {
                            const u32 z = zero_points(b, group);
                            offset[b][0] = offset_of(z & 0xffff);
                            offset[b][1] = offset_of(z >> 16);
                        }
                    }
                    uint4 xs[COLUMN_TILES];                                            // of this product and the next
#pragma unroll
                    for (int c = 0; c < COLUMN_TILES; c++)
                        if (j % 2 == 0) xs[c] = load_matrices(x_row[c] + x_column + column * 2);
                        else xs[c].x = xs[c].z, xs[c].y = xs[c].w;
                    if (SHIFT_SUMS)
#pragma unroll
                        for (int c = 0; c < COLUMN_TILES; c++) multiply_add(x_sum[c], ONES, xs[c].x, xs[c].y);
#pragma unroll
                    for (int b = 0; b < TILE_BLOCKS; b++) {
                        u32 a[4];
                        raw(a, piece[b], j);
                        if (!SHIFT_SUMS && (ASYMMETRIC || !SYMMETRIC_IS_RAW))
#pragma unroll
                            for (int i = 0; i < 4; i++) a[i] = add2(a[i], offset[b][i % 2]);
#pragma unroll
                        for (int c = 0; c < COLUMN_TILES; c++) multiply_add(part[b][c], a, xs[c].x, xs[c].y);
                    }
                    if ((column + 16) * STEP_GROUPS % STEP == 0) {                     // it ends
#pragma unroll
                        for (int b = 0; b < TILE_BLOCKS; b++) {
                            const u32 s = load_shared_4(here + b * SLOT_BYTES + STEP_BYTES + group * GROUP_BYTES + g * 4);
                            const float s0 = scale_to_float(s & 0xffff), s1 = scale_to_float(s >> 16);
                            const u32 z = zero_points(b, group);
                            const float z0 = 128.f + float(z & 0xffff), z1 = 128.f + float(z >> 16);
#pragma unroll
                            for (int c = 0; c < COLUMN_TILES; c++)
#pragma unroll
                                for (int i = 0; i < 4; i++) {
                                    if (SHIFT_SUMS) part[b][c][i] -= x_sum[c][i] * (i < 2 ? z0 : z1);
                                    total[b][c][i] += part[b][c][i] * (i < 2 ? s0 : s1);
                                    part[b][c][i] = 0.f;
                                }
                        }
#pragma unroll
                        for (int c = 0; c < COLUMN_TILES; c++)
#pragma unroll
                            for (int i = 0; i < 4; i++) x_sum[c][i] = 0.f;
                    }
                }
            }
            slot = slot + 1 == DEPTH ? 0 : slot + 1;
            __syncwarp();                                                              // before the slot is filled again
        }

        // Sums of this warp to shared memory: by tile of x, column (row of x), row of W.
        float* set = sums + parity * SET;
#pragma unroll
        for (int b = 0; b < TILE_BLOCKS; b++)
#pragma unroll
            for (int c = 0; c < COLUMN_TILES; c++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (c * 8 + 2 * t + i % 2 < rows)
                        set[warp * SUMS + ((b * COLUMN_TILES + c) * 8 + 2 * t + i % 2) * SUM_COLUMN + g + i / 2 * 8] =
                            total[b][c][i];
        __syncthreads();
        // By then all have read the sums of the tile before the last, whose place is taken next.
        if (CLUSTER > 1 && tile != blockIdx.x) add_over_cluster(tile - gridDim.x, parity ^ 1);

        float* block_sums = set + WARPS * SUMS;
        for (int e = threadIdx.x; e < RESULTS; e += THREADS) {
            const int row = e % BLOCK_ROWS, column = e / BLOCK_ROWS % COLUMNS, b = e / (BLOCK_ROWS * COLUMNS);
            if (column >= rows) continue;
            const int at = (b * COLUMNS + column) * SUM_COLUMN + row;
            float sum = 0.f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += set[w * SUMS + at];
            const int out = (tile * TILE_BLOCKS + b) * BLOCK_ROWS + row;
            if (CLUSTER > 1) block_sums[at] = sum;
            else if (out < n) y[size_t(column) * n + out] = to_element(sum);
        }
        if (CLUSTER > 1) cluster_arrive();                                             // this tile's sums are in place
    }
    if (CLUSTER > 1) {
        const int turns = (tiles - 1 - int(blockIdx.x)) / int(gridDim.x);
        add_over_cluster(blockIdx.x + turns * gridDim.x, parity ^ 1);
        cluster_barrier();                                                             // no block leaves while its sums are read
    }
}
