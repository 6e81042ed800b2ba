// y (rows, n) = x (rows, k) · Wᵀ with INT8 on both sides and many rows of x: what counts is that the tensor cores never
// wait. W lies as the checkpoint has it, (n, k) with rows one after the other. Compute capability 9.0a.
//
// * A block stays on its multiprocessor and goes from tile to tile, TILE_ROWS rows of W by TOKENS rows of x. One thread
//   starts the copies of both, a step of 128 columns to a stage of the ring, on into the next tile while the results of
//   this one are stored.
// * Two warpgroups multiply M_TILES · 64 rows of W each, with sums in int32, which are exact.
// * Results are scaled in registers, rounded, turned around on their way through shared memory (they come by rows of W
//   and go by rows of x), and stored by the copy engine while the next products run. No int32 matrix is ever written.
//
// Constants: CODE (8), SCALE, OUTPUT (16 bits) and ELEMENT_BF16 (see scales.cuh), TOKENS, M_TILES, STAGES. extra.cuh holds
// `codes_multiply_add` for TOKENS columns.
#include "scales.cuh"
#include "hopper.cuh"
#include "extra.cuh"

constexpr int WARPGROUPS = 2, GROUP_THREADS = 4 * WARP, CONSUMERS = WARPGROUPS * GROUP_THREADS, THREADS = CONSUMERS + WARP;
constexpr int GROUP_ROWS = M_TILES * 64, TILE_ROWS = WARPGROUPS * GROUP_ROWS, STEP = 128;
constexpr int X_BYTES = TOKENS * STEP, STAGE_BYTES = X_BYTES + TILE_ROWS * STEP;
constexpr int BOX_TOKENS = 64, BOX_BYTES = BOX_TOKENS * 128;           // of results: by 64 rows of W, 16 bits each
constexpr int RESULTS = STAGES * STAGE_BYTES;                          // where they are staged: two boxes a warpgroup
static_assert(OUTPUT < 2 && TOKENS % BOX_TOKENS == 0 && TOKENS % GROUP_THREADS == 0, "as the results are stored");

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    wide_int8(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap y,
              const float* x_scales, const void* w_scales, int rows, int n, int steps, int token_tiles, int tiles) {
    extern __shared__ unsigned char unaligned[];
    __shared__ __align__(8) u64 barriers[2 * STAGES];
    __shared__ __align__(16) float token_scales[WARPGROUPS][BOX_TOKENS];
    const u32 ring = shared_address(unaligned) + (1024 - shared_address(unaligned) % 1024) % 1024;
    const u32 full = shared_address(barriers), empty = full + 8 * STAGES;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, CONSUMERS / WARP);
        }
        barrier_init_done();
    }
    __syncthreads();
    let_next_kernel_start();
    wait_for_earlier_kernels();

    if (warp == CONSUMERS / WARP) {
        int i = 0;                                                     // copies so far
        if (lane == 0)
            for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x)
                for (int step = 0; step < steps; step++, i++) {
                    const u32 stage = ring + i % STAGES * STAGE_BYTES, barrier = full + 8 * (i % STAGES);
                    if (i >= STAGES) wait(empty + 8 * (i % STAGES), (i / STAGES - 1) % 2);
                    arrive_and_expect(barrier, STAGE_BYTES);
                    tile_copy(stage + X_BYTES, &w, tile / token_tiles * TILE_ROWS, step * STEP, barrier);
                    tile_copy(stage, &x, tile % token_tiles * TOKENS, step * STEP, barrier);
                }
        return;
    }
    const int g = lane / 4, t = lane % 4, group = warp / 4, own = threadIdx.x % GROUP_THREADS;
    const u32 results = ring + RESULTS + group * 2 * BOX_BYTES;
    const int of_matrix = lane / 8 / 2 * 8 + lane % 8;                 // the row of x whose address this lane gives
    const u32 column_of_matrix = u32((warp % 4 * 2 + lane / 8 % 2) ^ (lane % 8)) * 16;     // swizzled
    Sum sum[M_TILES][TOKENS / 2];
    int i = 0;                                                         // steps so far
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int token = tile % token_tiles * TOKENS, row = tile / token_tiles * TILE_ROWS + group * GROUP_ROWS;
        float scale_of_token[TOKENS / GROUP_THREADS], scale[M_TILES][2];  // here before they are needed
#pragma unroll
        for (int j = 0; j < TOKENS / GROUP_THREADS; j++)
            scale_of_token[j] = x_scales[min(token + j * GROUP_THREADS + own, rows - 1)];
#pragma unroll
        for (int h = 0; h < M_TILES; h++)
#pragma unroll
            for (int j = 0; j < 2; j++) scale[h][j] = load_scale(w_scales, min(row + h * 64 + warp % 4 * 16 + j * 8 + g, n - 1));
        for (int step = 0; step < steps; step++, i++) {
            const u32 stage = ring + i % STAGES * STAGE_BYTES;
            wait(full + 8 * (i % STAGES), i / STAGES % 2);
            products_begin();
#pragma unroll
            for (int column = 0; column < STEP; column += 32)
#pragma unroll
                for (int h = 0; h < M_TILES; h++)
                    codes_multiply_add(sum[h], describe(stage + X_BYTES + (group * M_TILES + h) * 64 * STEP + column),
                                       describe(stage + column), step > 0 || column > 0);
            products_commit();
            products_wait<1>();                                        // those of the step before are done
            if (step > 0 && lane == 0) arrive(empty + 8 * ((i - 1) % STAGES));
        }
        products_wait<0>();
        if (lane == 0) arrive(empty + 8 * ((i - 1) % STAGES));

#pragma unroll
        for (int box = 0; box < TOKENS / BOX_TOKENS * M_TILES; box++) {
            const int h = box % M_TILES, start = box / M_TILES * BOX_TOKENS;
            const u32 staged = results + box % 2 * BOX_BYTES;
            if (own == 0) wait_for_stores_to_read<1>();                // the box before the last has left
            if (own / BOX_TOKENS == start / BOX_TOKENS % (GROUP_THREADS / BOX_TOKENS))
                token_scales[group][own % BOX_TOKENS] = scale_of_token[start / GROUP_THREADS];
            barrier_among(1 + group, GROUP_THREADS);
#pragma unroll
            for (int c = 0; c < BOX_TOKENS; c += 16) {                 // two matrices' rows of x; two of W
                const float2 first = *reinterpret_cast<const float2*>(&token_scales[group][c + 2 * t]);
                const float2 second = *reinterpret_cast<const float2*>(&token_scales[group][c + 8 + 2 * t]);
                const Sum* s = &sum[h][(start + c) / 2];
                const float a = scale[h][0], b = scale[h][1];
                store_transposed(staged + (c + of_matrix) * 128 + column_of_matrix,
                                 pack(float(s[0]) * first.x * a, float(s[1]) * first.y * a),
                                 pack(float(s[2]) * first.x * b, float(s[3]) * first.y * b),
                                 pack(float(s[4]) * second.x * a, float(s[5]) * second.y * a),
                                 pack(float(s[6]) * second.x * b, float(s[7]) * second.y * b));
            }
            show_to_copies();
            barrier_among(1 + group, GROUP_THREADS);
            if (own == 0) {
                tile_store(&y, staged, token + start, row + h * 64);
                close_stores();
            }
        }
    }
    if (own == 0) wait_for_stores();
}
