// y (rows, n) = x (rows, k) · Wᵀ for the few rows of a decode step: what counts is to read W once, as fast as the memory
// gives it.
//
// * A block of WARPS warps owns TILE_BLOCKS · 16 rows of W at a time and goes through W tile by tile. Its warps share the
//   columns out, STEP at a time, and add up their sums through shared memory at the end of a tile.
// * Every lane copies its own share of W into a ring in shared memory DEPTH steps ahead, over the borders of tiles, and is
//   the only one to read it back. So many loads are in flight, and no barrier is needed in the loop.
// * x lies in shared memory for as long as the block lives. A cluster of CLUSTER blocks splits the columns, so that each
//   holds a part of x, and adds up over the cluster.
// * W is the 16-row operand of the tensor cores and x the one with 8 columns: COLUMN_TILES · 8 rows of x cost hardly more
//   than one. Rows of x that do not exist repeat the last; their sums are never stored.
// * Scales multiply the float32 sums of a group, so that no product is rounded.
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

// Where a warp is in its walk through the tiles and, in each, through its own steps.
struct Place {
    int tile, step;
    __device__ __forceinline__ void next(int first, int stop, int tiles_apart) {
        step += WARPS;
        if (step >= stop) {
            step = first;
            tile += tiles_apart;
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS)
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

    Place ahead = {first < stop ? int(blockIdx.x) : tiles, first};
    int slot_ahead = 0;
    auto fetch = [&]() {
        if (ahead.tile < tiles) {
            const int group = first_group(ahead.step);
#pragma unroll
            for (int b = 0; b < TILE_BLOCKS; b++) {
                const int block = min(ahead.tile * TILE_BLOCKS + b, row_blocks - 1);
                const u32 slot = ring + (slot_ahead * TILE_BLOCKS + b) * SLOT_BYTES;
                const unsigned char* from = codes + codes_at(block, ahead.step, steps) + lane * 16;
#pragma unroll
                for (int p = 0; p < PIECES; p++)
                    copy_16(slot + p * PIECE_BYTES + lane * 16, from + p * PIECE_BYTES);
                if (lane < STEP_GROUPS * 8) {
                    const size_t meta = pairs_at(block, group + lane / 8, groups) + lane % 8;
                    copy_4(slot + STEP_BYTES + lane * 4, scales + meta);
                    if (ASYMMETRIC) copy_4(slot + STEP_BYTES + META_BYTES + lane * 4, zeros + meta);
                }
            }
            ahead.next(first, stop, gridDim.x);
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

    int slot = 0, parity = 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, parity ^= 1) {
        float total[TILE_BLOCKS][COLUMN_TILES][4] = {};
        for (int step = first; step < stop; step += WARPS) {
            fetch();
            wait_for_batches<DEPTH - 1>();
            __syncwarp();
            const u32 here = ring + slot * TILE_BLOCKS * SLOT_BYTES;
            const u32 x_column = (step - begin) * STEP * 2;
            float part[TILE_BLOCKS][COLUMN_TILES][4] = {};
            u32 offset[TILE_BLOCKS][2];                                                // for rows g and g + 8
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
                    if (column * STEP_GROUPS % STEP == 0) {                            // a group begins
#pragma unroll
                        for (int b = 0; b < TILE_BLOCKS; b++) {
                            const u32 z = ASYMMETRIC ? load_shared_4(here + b * SLOT_BYTES + STEP_BYTES + META_BYTES
                                                                     + group * GROUP_BYTES + g * 4)
                                                     : MIDDLE * 0x10001u;
                            offset[b][0] = offset_of(z & 0xffff);
                            offset[b][1] = offset_of(z >> 16);
                        }
                    }
                    uint4 xs[COLUMN_TILES];                                            // of this product and the next
#pragma unroll
                    for (int c = 0; c < COLUMN_TILES; c++)
                        if (j % 2 == 0) xs[c] = load_matrices(x_row[c] + x_column + column * 2);
                        else xs[c].x = xs[c].z, xs[c].y = xs[c].w;
#pragma unroll
                    for (int b = 0; b < TILE_BLOCKS; b++) {
                        u32 a[4];
                        raw(a, piece[b], j);
                        if (ASYMMETRIC || !SYMMETRIC_IS_RAW)
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
#pragma unroll
                            for (int c = 0; c < COLUMN_TILES; c++)
#pragma unroll
                                for (int i = 0; i < 4; i++) {
                                    total[b][c][i] += part[b][c][i] * (i < 2 ? s0 : s1);
                                    part[b][c][i] = 0.f;
                                }
                        }
                    }
                }
            }
            slot = slot + 1 == DEPTH ? 0 : slot + 1;
            __syncwarp();                                                              // before the slot is filled again
        }

        // Sums of this warp to shared memory: by tile of x, column (row of x), row of W.
        float* set = sums + parity * (WARPS + (CLUSTER > 1)) * SUMS;
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

        constexpr int COLUMNS = COLUMN_TILES * 8;
        float* block_sums = set + WARPS * SUMS;
        for (int e = threadIdx.x; e < TILE_BLOCKS * rows * BLOCK_ROWS; e += THREADS) {
            const int row = e % BLOCK_ROWS, rest = e / BLOCK_ROWS, b = rest / rows, column = rest - b * rows;
            const int at = (b * COLUMNS + column) * SUM_COLUMN + row;
            float sum = 0.f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += set[w * SUMS + at];
            const int out = (tile * TILE_BLOCKS + b) * BLOCK_ROWS + row;
            if (CLUSTER > 1) block_sums[at] = sum;
            else if (out < n) y[size_t(column) * n + out] = to_element(sum);
        }
        if (CLUSTER > 1) {
            cluster_barrier();
            for (int e = threadIdx.x + rank * THREADS; e < TILE_BLOCKS * rows * BLOCK_ROWS; e += THREADS * CLUSTER) {
                const int row = e % BLOCK_ROWS, rest = e / BLOCK_ROWS, b = rest / rows, column = rest - b * rows;
                const u32 at = shared_address(block_sums + (b * COLUMNS + column) * SUM_COLUMN + row);
                float sum = 0.f;
#pragma unroll
                for (int r = 0; r < CLUSTER; r++) sum += load_from_cluster(at, r);
                const int out = (tile * TILE_BLOCKS + b) * BLOCK_ROWS + row;
                if (out < n) y[size_t(column) * n + out] = to_element(sum);
            }
        }
    }
    if (CLUSTER > 1) cluster_barrier();      // no block leaves while another may read its sums
}
