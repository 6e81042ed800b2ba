// y (rows, n) = x (rows, k) · Wᵀ with 8-bit codes on both sides, by the tensor cores' warpgroup products. W lies as the
// checkpoint has it, (n, k) with rows one after the other. Compute capability 9.0a.
//
// * A block computes TILE_ROWS rows of W by TOKENS rows of x. One thread starts the copies of both into a ring of STAGES
//   stages, a step of 128 columns to a stage. Each of WARPGROUPS warpgroups multiplies M_TILES · 64 rows of W from there.
// * The blocks of a cluster split the columns and add their sums up through shared memory, so that narrow layers fill the
//   GPU too.
// * INT8 sums are int32 and exact. The tensor cores keep only some 14 bits of an FP8 sum, so those of a step are added to
//   the others in float32.
// * Scales multiply the sums at the end, so that no int32 matrix is ever written.
//
// Constants: CODE, SCALE, OUTPUT (see scales.cuh), ELEMENT_BF16, TOKENS, M_TILES, WARPGROUPS, STAGES, CLUSTER,
// BLOCKS_PER_SM. extra.cuh holds `codes_multiply_add` for TOKENS columns.
#include "scales.cuh"
#include "hopper.cuh"
#include "extra.cuh"

constexpr int CONSUMERS = WARPGROUPS * 4 * WARP, THREADS = CONSUMERS + WARP;
constexpr int TILE_ROWS = WARPGROUPS * M_TILES * 64, STEP = 128;
constexpr int X_BYTES = TOKENS * STEP, STAGE_BYTES = X_BYTES + TILE_ROWS * STEP;
constexpr int SUM_PITCH = TILE_ROWS + 4;  // 4 spread the rows over the banks
constexpr int CHUNKS = TILE_ROWS / 4;     // of results of one row of x
static_assert(X_BYTES % 1024 == 0, "the swizzle repeats after 8 rows of 128 bytes");
static_assert(CONSUMERS % CHUNKS == 0, "a thread keeps its four rows of W");

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    w8a8_wgmma(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, const float* x_scales,
                    const void* w_scales, void* y, int rows, int n, int steps) {
    extern __shared__ unsigned char unaligned[];
    __shared__ __align__(8) u64 barriers[2 * STAGES];
    unsigned char* memory = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;  // as the swizzle needs it
    const u32 ring = shared_address(memory), full = shared_address(barriers), empty = full + 8 * STAGES;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, rank = CLUSTER > 1 ? blockIdx.z : 0;
    const int token = blockIdx.x * TOKENS, row = blockIdx.y * TILE_ROWS;
    const int begin = steps * rank / CLUSTER, count = steps * (rank + 1) / CLUSTER - begin;

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, CONSUMERS / WARP);
        }
        barrier_init_done();
    }
    __syncthreads();
    let_next_kernel_start();

    if (warp == CONSUMERS / WARP) {
        if (lane == 0) {
            auto copy_w = [&](int i) {
                const u32 stage = ring + i % STAGES * STAGE_BYTES, barrier = full + 8 * (i % STAGES);
                arrive_and_expect(barrier, STAGE_BYTES);
                tile_copy(stage + X_BYTES, &w, row, (begin + i) * STEP, barrier);
            };
            auto copy_x = [&](int i) {
                const u32 stage = ring + i % STAGES * STAGE_BYTES, barrier = full + 8 * (i % STAGES);
                tile_copy(stage, &x, token, (begin + i) * STEP, barrier);
            };
            const int early = min(STAGES, count);
            for (int i = 0; i < early; i++) copy_w(i);  // W never changes, x was just written
            wait_for_earlier_kernels();
            for (int i = 0; i < early; i++) copy_x(i);
            for (int i = STAGES; i < count; i++) {
                wait(empty + 8 * (i % STAGES), (i / STAGES - 1) % 2);
                copy_w(i);
                copy_x(i);
            }
        }
        if (CLUSTER > 1) cluster_barrier();  // the sums are there
    } else {
        const int g = lane / 4, t = lane % 4, group = warp / 4;
        Sum sum[M_TILES][TOKENS / 2] = {};
        auto release = [&](int i) {
            if (lane == 0) arrive(empty + 8 * (i % STAGES));
        };
        for (int i = 0; i < count; i++) {
            const u32 stage = ring + i % STAGES * STAGE_BYTES;
            wait(full + 8 * (i % STAGES), i / STAGES % 2);
            Sum part[FP8 ? M_TILES : 1][TOKENS / 2];
            products_begin();
#pragma unroll
            for (int column = 0; column < STEP; column += 32)
#pragma unroll
                for (int h = 0; h < M_TILES; h++) {
                    const u64 of_w = describe(stage + X_BYTES + (group * M_TILES + h) * 64 * STEP + column);
                    const u64 of_x = describe(stage + column);
                    if constexpr (FP8) codes_multiply_add(part[h], of_w, of_x, column > 0);
                    else codes_multiply_add(sum[h], of_w, of_x, true);
                }
            products_commit();
            if constexpr (FP8) {
                products_wait<0>();
                release(i);
#pragma unroll
                for (int h = 0; h < M_TILES; h++)
#pragma unroll
                    for (int r = 0; r < TOKENS / 2; r++) sum[h][r] += part[h][r];
            } else {
                products_wait<1>();  // those of the stage before are done
                if (i > 0) release(i - 1);
            }
        }
        products_wait<0>();
        consumers_barrier(CONSUMERS);  // nobody reads the ring any more
        Sum* sums = reinterpret_cast<Sum*>(memory);
#pragma unroll
        for (int h = 0; h < M_TILES; h++)
#pragma unroll
            for (int r = 0; r < TOKENS / 2; r++)
                sums[(r / 4 * 8 + 2 * t + r % 2) * SUM_PITCH + (group * M_TILES + h) * 64 + warp % 4 * 16 + g +
                     r / 2 % 2 * 8] = sum[h][r];
        if (CLUSTER > 1) cluster_barrier();
        else consumers_barrier(CONSUMERS);
        wait_for_earlier_kernels();  // they wrote x's scales

        const int own = threadIdx.x % CHUNKS * 4, out = row + own, tokens = min(TOKENS, rows - token);
        float scale[4];
#pragma unroll
        for (int j = 0; j < 4; j++) scale[j] = out + j < n ? load_scale(w_scales, out + j) : 0.f;
        constexpr int APART = CONSUMERS / CHUNKS;
        for (int c = threadIdx.x / CHUNKS + (CLUSTER > 1 ? rank * APART : 0); c < tokens; c += APART * CLUSTER) {
            const u32 at = ring + (c * SUM_PITCH + own) * 4;
            Sum all[4] = {};
#pragma unroll
            for (int r = 0; r < CLUSTER; r++) {
                const float4 part = CLUSTER > 1 ? load_floats_from_cluster(at, r) : load_shared_floats(at);
                const float f[4] = {part.x, part.y, part.z, part.w};
#pragma unroll
                for (int j = 0; j < 4; j++)
                    if constexpr (FP8) all[j] += f[j];
                    else all[j] += __float_as_int(f[j]);
            }
            const float x_scale = x_scales[token + c];
            float result[4];
#pragma unroll
            for (int j = 0; j < 4; j++) result[j] = float(all[j]) * x_scale * scale[j];
            const size_t to = size_t(token + c) * n + out;
            if (n % 4 == 0) {
                if (out < n) store_four(y, to, result);
            } else {
#pragma unroll
                for (int j = 0; j < 4; j++)
                    if (out + j < n) store(y, to + j, result[j]);
            }
        }
    }
    if (CLUSTER > 1) cluster_barrier();  // no block leaves while another reads its sums
}
