// y (rows, n) = x (rows, k) · Wᵀ for more rows than a decode step has: the tensor cores' warpgroup products, with W
// dequantized in registers as their 64-row operand and x in shared memory as the other one. Compute capability 9.0a.
//
// * A block computes TILE_ROWS rows of W by TOKENS rows of x. A warp starts the copies of codes and scales, another those of
//   x, into a ring of STAGES stages, a step of 128 columns to a stage; warpgroups dequantize what arrives and multiply.
//   WARPGROUPS_M of them take different rows of a stage, WARPGROUPS_K of them take different stages.
// * A warpgroup dequantizes BATCH products ahead while the tensor cores are at work on the batch before.
// * A cluster of CLUSTER blocks splits the columns and adds its sums up through shared memory, so that narrow layers fill
//   the GPU too.
// * With few TOKENS, scales multiply the float32 sums of a group (SCALE_SUMS). With many there are more sums than weights:
//   then scales multiply the weights, and each weight is rounded once, like x.
//
// Constants: ELEMENT_BF16, SCALE_BF16, BITS, GROUP, ASYMMETRIC, TOKENS, M_TILES (64-row products to a warpgroup),
// WARPGROUPS_M, WARPGROUPS_K, STAGES, BATCH, CLUSTER, BLOCKS_PER_SM. extra.cuh holds `warpgroup_multiply_add` for TOKENS columns.
#include "fragments.cuh"
#include "hopper.cuh"
#include "extra.cuh"

// With so many sums the 168 registers do not suffice that 10 warps can have each; then a whole warpgroup starts the copies
// and hands its registers over. Two of its warps work.
constexpr bool REALLOCATE_REGISTERS = M_TILES * TOKENS > 192 && WARPGROUPS_M * WARPGROUPS_K > 1;
constexpr int CONSUMERS = WARPGROUPS_M * WARPGROUPS_K * 4 * WARP;
constexpr int THREADS = CONSUMERS + (REALLOCATE_REGISTERS ? 4 * WARP : 2 * WARP);
constexpr bool SCALE_SUMS = TOKENS <= 32;
constexpr int GROUP_PRODUCTS = STEP / 16 / STEP_GROUPS;                   // of the tensor cores to a group of a step
constexpr int BATCH_PRODUCTS = BATCH < GROUP_PRODUCTS ? BATCH : GROUP_PRODUCTS;
constexpr int TILE_SLABS = WARPGROUPS_M * M_TILES, TILE_ROWS = TILE_SLABS * SLAB_ROWS;
constexpr int SLAB_BYTES = SLAB_BLOCKS * STEP_BYTES;                      // of codes, in a step
constexpr int META_BYTES = SLAB_BLOCKS * STEP_GROUPS * GROUP_BYTES;       // of scales or zero points
constexpr int HALF_BYTES = TOKENS * 128;                                  // 64 columns of x
constexpr int CODES = 2 * HALF_BYTES, SCALES = CODES + TILE_SLABS * SLAB_BYTES, ZEROS = SCALES + TILE_SLABS * META_BYTES;
constexpr int STAGE_BYTES = (ZEROS + ASYMMETRIC * TILE_SLABS * META_BYTES + 1023) / 1024 * 1024;
constexpr int SUM_PITCH = TILE_ROWS + 4;                                  // floats; 4 spread the rows over the banks
static_assert(STAGES % WARPGROUPS_K == 0 && STAGES > WARPGROUPS_K,
              "a stage belongs to one of the warpgroups that take turns");
// Weights in float16 are multiplied by a power of two, and sums divided by it, to keep small ones off the subnormals.
constexpr float LIFT = ELEMENT_BF16 || SCALE_SUMS ? 1.f : 64.f;

// The scale of a row, twice in a register.
__device__ __forceinline__ u32 scale_pair(u16 s) {
    if (ELEMENT_BF16 && SCALE_BF16) return s * 0x10001u;
    const float f = scale_to_float(s) * LIFT;
    return pack(f, f);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
warpgroup(const __grid_constant__ TensorMap x, const unsigned char* __restrict__ codes,
          const unsigned char* __restrict__ scales, const unsigned char* __restrict__ zeros, u16* __restrict__ y, int rows,
          int n, int slabs, int steps, int groups) {
    extern __shared__ unsigned char unaligned[];
    __shared__ __align__(8) u64 barriers[2 * STAGES];
    unsigned char* memory = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;      // as the swizzle needs it
    const u32 ring = shared_address(memory), full = shared_address(barriers), empty = full + 8 * STAGES;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int rank = CLUSTER > 1 ? blockIdx.z : 0;
    const int token = blockIdx.x * TOKENS, slab = blockIdx.y * TILE_SLABS;
    const int begin = steps * rank / CLUSTER, count = steps * (rank + 1) / CLUSTER - begin;

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(full + 8 * s, 2);                                // of x and of W
            barrier_init(empty + 8 * s, WARPGROUPS_M * 4);
        }
        barrier_init_done();
    }
    __syncthreads();
    let_next_kernel_start();

    if (warp >= CONSUMERS / WARP) {
        if (REALLOCATE_REGISTERS) registers_shrink<40>();
        const int here = min(TILE_SLABS, slabs - slab);                   // the last tile may be cut off
        Place<STAGES, STAGE_BYTES> at(ring, full, 1);
        if (warp == CONSUMERS / WARP) {                                   // W never changes: no need to wait for other kernels
            const unsigned char* from = codes + (size_t(slab + lane) * steps + begin) * SLAB_BYTES;
            const size_t meta = size_t(slab + lane) * groups * SLAB_BLOCKS * GROUP_BYTES;
            const unsigned char *from_scales = scales + meta, *from_zeros = zeros + meta;
            for (int step = begin; step < begin + count; step++, from += SLAB_BYTES, at.next()) {
                wait(at.empty(), at.parity);
                if (lane == 0) arrive_and_expect(at.full, here * (SLAB_BYTES + META_BYTES * (1 + ASYMMETRIC)));
                __syncwarp();
                if (lane < here) {                                        // a lane for each slab
                    const int group = first_group(step) * SLAB_BLOCKS * GROUP_BYTES;
                    bulk_copy(at.stage + CODES + lane * SLAB_BYTES, from, SLAB_BYTES, at.full);
                    bulk_copy(at.stage + SCALES + lane * META_BYTES, from_scales + group, META_BYTES, at.full);
                    if (ASYMMETRIC) bulk_copy(at.stage + ZEROS + lane * META_BYTES, from_zeros + group, META_BYTES, at.full);
                }
            }
        } else if (warp == CONSUMERS / WARP + 1 && lane == 0) {
            wait_for_earlier_kernels();                                   // x was just written
            for (int step = begin; step < begin + count; step++, at.next()) {
                wait(at.empty(), at.parity);
                arrive_and_expect(at.full, 2 * HALF_BYTES);
                box_copy(at.stage, &x, token, step * (STEP / 64), at.full);
            }
        }
        __syncwarp();
        if (CLUSTER > 1) {
            cluster_barrier();                                            // the sums are there
            cluster_barrier();                                            // and read
        }
    } else {
        if (REALLOCATE_REGISTERS) registers_grow<232>();
        const int g = lane / 4, t = lane % 4, group_warp = warp % 4;
        const int group_m = warp / 4 % WARPGROUPS_M, group_k = warp / 4 / WARPGROUPS_M;
        float sum[M_TILES][TOKENS / 2] = {};
        float part[M_TILES][TOKENS / 2] = {};                                // of a group
        float part_scale[M_TILES][2] = {};                                   // of rows g and g + 8
        u32 a[2][M_TILES][BATCH_PRODUCTS][4];
        auto add_part = [&]() {
#pragma unroll
            for (int h = 0; h < M_TILES; h++)
#pragma unroll
                for (int r = 0; r < TOKENS / 2; r++) sum[h][r] += part[h][r] * part_scale[h][r % 4 / 2];
        };
        for (int i = group_k; i < count; i += WARPGROUPS_K) {
            const u32 stage = ring + i % STAGES * STAGE_BYTES;
            wait(full + 8 * (i % STAGES), i / STAGES % 2);
            uint4 piece[M_TILES];
            u32 scale[M_TILES][2], offset[M_TILES][2];                          // of rows g and g + 8
            float next_scale[M_TILES][2];
#pragma unroll
            for (int batch = 0; batch < STEP / 16 / BATCH_PRODUCTS; batch++) {
                const bool starts = batch * BATCH_PRODUCTS % GROUP_PRODUCTS == 0;
#pragma unroll
                for (int q = 0; q < BATCH_PRODUCTS; q++) {
                    const int column = (batch * BATCH_PRODUCTS + q) * 16;
                    const int piece_number = column / PIECE_COLUMNS, j = column % PIECE_COLUMNS / 16;
#pragma unroll
                    for (int h = 0; h < M_TILES; h++) {
                        const int own_slab = group_m * M_TILES + h;
                        if (j == 0)
                            piece[h] = load_shared_16(stage + CODES + own_slab * SLAB_BYTES + group_warp * STEP_BYTES
                                                      + piece_number * PIECE_BYTES + lane * 16);
                        if (starts && q == 0) {
                            const int pair = (column * STEP_GROUPS / STEP * SLAB_BLOCKS + group_warp) * 8 + g;
                            const u32 at = stage + own_slab * META_BYTES + pair * 4;
                            const u32 s = load_shared_4(at + SCALES);
                            const u32 z = ASYMMETRIC ? load_shared_4(at + ZEROS) : MIDDLE * 0x10001u;
                            offset[h][0] = offset_of(z & 0xffff), offset[h][1] = offset_of(z >> 16);
                            if (SCALE_SUMS) next_scale[h][0] = scale_to_float(s & 0xffff), next_scale[h][1] = scale_to_float(s >> 16);
                            else scale[h][0] = scale_pair(s & 0xffff), scale[h][1] = scale_pair(s >> 16);
                        }
                        u32(&operand)[4] = a[batch % 2][h][q];
                        raw(operand, piece[h], j);
#pragma unroll
                        for (int r = 0; r < 4; r++) {
                            if (ASYMMETRIC || !SYMMETRIC_IS_RAW) operand[r] = add2(operand[r], offset[h][r % 2]);
                            if (!SCALE_SUMS) operand[r] = mul2(operand[r], scale[h][r % 2]);
                        }
                    }
                }
                if (SCALE_SUMS && starts) {
                    products_wait<0>();
                    add_part();
#pragma unroll
                    for (int h = 0; h < M_TILES; h++)
                        part_scale[h][0] = next_scale[h][0], part_scale[h][1] = next_scale[h][1];
                }
                products_begin();
#pragma unroll
                for (int q = 0; q < BATCH_PRODUCTS; q++) {
                    const int column = (batch * BATCH_PRODUCTS + q) * 16;
                    const u64 columns_of_x = describe(stage + column / 64 * HALF_BYTES + column % 64 * 2);
#pragma unroll
                    for (int h = 0; h < M_TILES; h++) {
                        float(&to)[TOKENS / 2] = SCALE_SUMS ? part[h] : sum[h];
                        warpgroup_multiply_add(to, a[batch % 2][h][q], columns_of_x, !SCALE_SUMS || !starts || q > 0);
                    }
                }
                products_commit();
                products_wait<1>();                                       // the other half of `a` is free again
                // The products before these are done, and with them all reads of the stage before. Every lane's loads from
                // it had returned when a product took them, and lane 0 gets here only after all lanes of its warp: `wait`
                // above is an instruction of the whole warp. (compute-sanitizer's racecheck does not see that and reports
                // write-after-read hazards between `load_shared_16` and `bulk_copy`; a __syncwarp, which it would see,
                // makes the compiler wait for every product.)
                if (batch == 0 && i >= WARPGROUPS_K && lane == 0) arrive(empty + 8 * ((i - WARPGROUPS_K) % STAGES));
            }
        }
        products_wait<0>();
        if (SCALE_SUMS) add_part();
        consumers_barrier(CONSUMERS);                                     // nobody reads the ring any more
        float* sums = reinterpret_cast<float*>(memory);
#pragma unroll
        for (int turn = 0; turn < WARPGROUPS_K; turn++) {
            if (turn > 0) consumers_barrier(CONSUMERS);
            if (group_k == turn)
#pragma unroll
                for (int h = 0; h < M_TILES; h++)
#pragma unroll
                    for (int r = 0; r < TOKENS / 2; r++) {
                        const int column = r / 4 * 8 + 2 * t + r % 2, row = group_warp * 16 + g + r / 2 % 2 * 8;
                        float& at = sums[column * SUM_PITCH + (group_m * M_TILES + h) * SLAB_ROWS + row];
                        at = turn > 0 ? at + sum[h][r] : sum[h][r];
                    }
        }
        if (CLUSTER > 1) cluster_barrier();
        else consumers_barrier(CONSUMERS);
        wait_for_earlier_kernels();

        const int tokens = min(TOKENS, rows - token);
        for (int e = threadIdx.x + rank * CONSUMERS; e < tokens * (TILE_ROWS / 4); e += CONSUMERS * CLUSTER) {
            const int column = e / (TILE_ROWS / 4), row = e % (TILE_ROWS / 4) * 4, out = slab * SLAB_ROWS + row;
            const u32 at = ring + (column * SUM_PITCH + row) * 4;
            float4 v = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
            for (int r = 0; r < CLUSTER; r++) {
                const float4 part = CLUSTER > 1 ? load_floats_from_cluster(at, r) : load_shared_floats(at);
                v.x += part.x, v.y += part.y, v.z += part.z, v.w += part.w;
            }
            const u32 low = pack(v.x / LIFT, v.y / LIFT), high = pack(v.z / LIFT, v.w / LIFT);
            u16* to = y + size_t(token + column) * n + out;
            if (n % 4 == 0) {
                if (out < n) *reinterpret_cast<uint2*>(to) = make_uint2(low, high);
            } else {
                if (out < n) to[0] = u16(low);
                if (out + 1 < n) to[1] = u16(low >> 16);
                if (out + 2 < n) to[2] = u16(high);
                if (out + 3 < n) to[3] = u16(high >> 16);
            }
        }
        if (CLUSTER > 1) cluster_barrier();                                   // no block leaves while another reads its sums
    }
}
