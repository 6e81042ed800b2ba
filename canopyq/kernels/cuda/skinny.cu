// y (rows, n) = x (rows, k) · Wᵀ with 8-bit codes on both sides and few rows of x: what counts is to read W once, as
// fast as the memory gives it. W stays as the checkpoint has it, (n, k) with rows one after the other, so that cuBLAS can
// take the same weight for many rows.
//
// * A block of WARPS warps goes through tiles of 16 rows of W. Its warps take the columns in turn, 64 at a time, and add
//   up their sums through shared memory at the end of a tile; two sets of sums make one barrier a tile enough.
// * Every lane copies its own share of W into a ring in shared memory DEPTH − 1 pieces ahead, over the borders of tiles,
//   and is the only one to read it back: no barrier in the loop. The copies begin before the kernel that quantizes x ends.
// * Columns may be summed in any order as long as W and x agree. So lane (g, t) = (lane / 4, lane % 4) takes columns
//   16t … 16t + 15 of a piece, of rows g and g + 8 of W and row g of x, each with one 16-byte load.
// * INT8 is multiplied by the tensor cores as it is, with sums in int32. FP8 becomes halves first, which is exact,
//   because the tensor cores' own FP8 products keep only 14 bits of their sums.
//
// Constants: CODE (8 for INT8, 0 for FP8 E4M3), SCALE and OUTPUT (see scales.cuh), COLUMN_TILES (8 rows of x each).
#include "scales.cuh"

constexpr int WARPS = 8, THREADS = WARPS * WARP;
constexpr int PIECE = 64, SLOT = 32 * WARP, DEPTH = 12;  // columns of a piece; its bytes in the ring; pieces in the ring
constexpr int RING_BYTES = WARPS * DEPTH * SLOT;
constexpr int ROWS = COLUMN_TILES * 8, SUM_STRIDE = 17;  // rows of x; numbers from one row of sums to the next
constexpr int SUMS = WARPS * ROWS * SUM_STRIDE;
static_assert(ROWS * 16 <= THREADS, "a thread has at most one result of a tile");
extern __shared__ __align__(16) u8 memory[];  // the ring, then two sets of sums, taken in turn

// The products of one piece: 16 codes of rows g and g + 8 of W with 16 codes of a row of x.
__device__ __forceinline__ void multiply(float (&sum)[4], const u32 (&low)[8], const u32 (&high)[8],
                                         const u32 (&x)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++)
        half_multiply_add(sum, low[2 * i], high[2 * i], low[2 * i + 1], high[2 * i + 1], e4m3_to_halves(x[i]),
                          e4m3_to_halves(x[i] >> 16));
}
__device__ __forceinline__ void multiply(int (&sum)[4], const u32 (&low)[8], const u32 (&high)[8], const u32 (&x)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) int8_multiply_add(sum, low[i], high[i], low[i + 1], high[i + 1], x[i], x[i + 1]);
}

// x (rows, k), x_scales (rows), w (n, k), w_scales (n), y (rows, n); k a multiple of 16.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    skinny(const u8* x, const float* x_scales, const u8* w, const void* w_scales, void* y, int rows, int n, int k) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    const int tiles = (n + 15) / 16, pieces = (k + PIECE - 1) / PIECE;
    const auto ring = shared_address(memory) + warp * DEPTH * SLOT + lane * 16;
    Sum *first_sums = (Sum*)(memory + RING_BYTES), *sums = first_sums;

    let_next_kernel_start();
    int next_tile = warp < pieces ? blockIdx.x : tiles, next_piece = warp, next_slot = 0;
    auto fetch = [&]() {
        if (next_tile < tiles) {
            const int column = next_piece * PIECE + 16 * t;
            if (column < k) {
                const int row = next_tile * 16 + g;
                copy_16(ring + next_slot * SLOT, w + (size_t)min(row, n - 1) * k + column);
                copy_16(ring + next_slot * SLOT + SLOT / 2, w + (size_t)min(row + 8, n - 1) * k + column);
            }
            next_slot = (next_slot + 1) % DEPTH;
            if ((next_piece += WARPS) >= pieces) next_piece = warp, next_tile += gridDim.x;
        }
        close_batch();
    };
#pragma unroll
    for (int i = 0; i < DEPTH - 1; i++) fetch();
    wait_for_earlier_kernels();

    const int out_row = threadIdx.x / 16;
    const float x_scale = out_row < rows ? x_scales[out_row] : 0.f;
    int slot = 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, sums = sums == first_sums ? sums + SUMS : first_sums) {
        const int out_column = tile * 16 + threadIdx.x % 16;
        const bool has_result = out_row < rows && out_column < n;
        const float scale = has_result ? x_scale * load_scale(w_scales, out_column) : 0.f;  // here before it is needed
        Sum sum[COLUMN_TILES][4] = {};
        for (int piece = warp; piece < pieces; piece += WARPS) {
            const int column = piece * PIECE + 16 * t;
            u32 xs[COLUMN_TILES][4] = {};
#pragma unroll
            for (int m = 0; m < COLUMN_TILES; m++)
                if (column < k && 8 * m + g < rows)
                    *(uint4*)xs[m] = *(const uint4*)(x + (size_t)(8 * m + g) * k + column);
            wait_for_batches<DEPTH - 2>();
            uint4 a = make_uint4(0, 0, 0, 0), b = a;
            if (column < k) a = load_shared_16(ring + slot * SLOT), b = load_shared_16(ring + slot * SLOT + SLOT / 2);
            slot = (slot + 1) % DEPTH;
            fetch();
            const u32 as[4] = {a.x, a.y, a.z, a.w}, bs[4] = {b.x, b.y, b.z, b.w};
            u32 low[8], high[8];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if constexpr (FP8) {
                    low[2 * i] = e4m3_to_halves(as[i]), low[2 * i + 1] = e4m3_to_halves(as[i] >> 16);
                    high[2 * i] = e4m3_to_halves(bs[i]), high[2 * i + 1] = e4m3_to_halves(bs[i] >> 16);
                } else {
                    low[i] = as[i], high[i] = bs[i];
                }
            }
#pragma unroll
            for (int m = 0; m < COLUMN_TILES; m++) multiply(sum[m], low, high, xs[m]);
        }
#pragma unroll
        for (int m = 0; m < COLUMN_TILES; m++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                sums[(warp * ROWS + m * 8 + 2 * t + i % 2) * SUM_STRIDE + g + i / 2 * 8] = sum[m][i];
        __syncthreads();  // once for each tile: who writes the other set next has passed, so its readers are done
        if (has_result) {
            Sum all = 0;
#pragma unroll
            for (int j = 0; j < WARPS; j++) all += sums[(j * ROWS + out_row) * SUM_STRIDE + threadIdx.x % 16];
            store(y, (size_t)out_row * n + out_column, float(all) * scale);
        }
    }
}

// The same scales on int32 sums (rows, n) that were formed elsewhere; n a multiple of 4.
extern "C" __global__ void __launch_bounds__(256)
    scale_sums(const int4* sums, const float* x_scales, const void* w_scales, void* y, int n) {
    let_next_kernel_start();
    wait_for_earlier_kernels();
    const int row = blockIdx.y, column = (blockIdx.x * 256 + threadIdx.x) * 4;
    if (column >= n) return;
    const size_t at = (size_t)row * n + column;
    const int4 sum = sums[at / 4];
    const float scale = x_scales[row];
    const float f[4] = {float(sum.x) * scale * load_scale(w_scales, column),
                        float(sum.y) * scale * load_scale(w_scales, column + 1),
                        float(sum.z) * scale * load_scale(w_scales, column + 2),
                        float(sum.w) * scale * load_scale(w_scales, column + 3)};
    store_four(y, at, f);
}
