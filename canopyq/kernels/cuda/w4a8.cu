// y (rows, n) = x (rows, k) · Wᵀ with weights of 4 bits and codes of 8 bits for x, by the tensor cores' integer warpgroup
// products. W is unpacked in registers as their 64-row operand, x is the other one in shared memory. Compute capability
// 9.0a.
//
// * W lies as fragments.cuh says, its columns in another order: the four codes of a row that a word holds are neighbours, as
//   integer products take them (`ORDER` in w4a8.py).
// * A symmetric weight's code, 8 less than its nibble, is set into the high half of a byte, one instruction for four of them:
//   16 times the code. From a nibble with a zero point that is taken off, in bytes: the difference has 5 bits.
// * A block computes TILE_ROWS rows of W by TOKENS rows of x. A warp starts the copies of codes and scales, another those of
//   x, into a ring of STAGES stages, a step of 128 columns to a stage. Each of WARPGROUPS warpgroups has 64 rows.
// * Sums are int32 and exact within a group of columns, in turn: while the tensor cores are at work on one group, the sums of
//   the one before are multiplied by its scale and added up in float32. Where there are registers for the sums of two groups
//   (PARTS), a warpgroup does that while its next products run; else others have the tensor cores meanwhile. If all columns
//   share a scale, there is one int32 sum.
// * The blocks of a cluster split the columns and add their sums up through shared memory, so that narrow layers fill the
//   GPU too.
//
// Constants: CODE 8, SCALE and OUTPUT (see scales.cuh), ELEMENT_BF16, SCALE_BF16, BITS 4, GROUP, ASYMMETRIC, TOKENS,
// WARPGROUPS, STAGES, CLUSTER, BLOCKS_PER_SM. extra.cuh holds `warpgroup_multiply_add` for TOKENS columns.
#include "scales.cuh"
#include "fragments.cuh"
#include "hopper.cuh"
#include "extra.cuh"

// With so many sums the 168 registers do not suffice that 10 warps can have each; then a whole warpgroup starts the copies
// and hands its registers over. Two of its warps work.
constexpr bool HAND_OVER = TOKENS > 64 && WARPGROUPS > 1;
constexpr int CONSUMERS = WARPGROUPS * 4 * WARP, THREADS = CONSUMERS + (HAND_OVER ? 4 * WARP : 2 * WARP);
constexpr bool ROW_SCALES = GROUP == 0;
constexpr int TURNS = STEP_GROUPS, TURN_PRODUCTS = STEP / 32 / TURNS;     // groups of a step; products of the tensor cores to one
constexpr int PARTS = TOKENS <= 64 && WARPGROUPS * BLOCKS_PER_SM <= 2 && TURNS == 1 && !ROW_SCALES ? 2 : 1;
constexpr int TILE_ROWS = WARPGROUPS * SLAB_ROWS;
constexpr int SLAB_BYTES = SLAB_BLOCKS * STEP_BYTES;                      // of codes, in a step
constexpr int META_BYTES = SLAB_BLOCKS * STEP_GROUPS * GROUP_BYTES;       // of scales or zero points
constexpr int CODES = TOKENS * STEP, SCALES = CODES + WARPGROUPS * SLAB_BYTES, ZEROS = SCALES + WARPGROUPS * META_BYTES;
constexpr int STAGE_BYTES = (ZEROS + ASYMMETRIC * WARPGROUPS * META_BYTES + 1023) / 1024 * 1024;
constexpr int SUM_PITCH = TILE_ROWS + 4;                                  // floats; 4 spread the rows over the banks
constexpr int CHUNKS = TILE_ROWS / 4;                                     // of results of one row of x
constexpr float LIFT = ASYMMETRIC ? 1.f : 16.f;                           // what codes are multiplied by
static_assert(CODES % 1024 == 0, "the swizzle repeats after 8 rows of 128 bytes");
static_assert(CONSUMERS % CHUNKS == 0, "a thread keeps its four rows of W");

// Rows g and g + 8 of a word's nibbles as 8-bit integers; `zero` has their zero points in each byte.
__device__ __forceinline__ void unpack(u32& low, u32& high, u32 word, const u32 (&zero)[2]) {
    if (ASYMMETRIC) {  // the bit beyond the nibble keeps bytes from borrowing of each other
        low = ((word & 0x0f0f0f0fu | 0x80808080u) - zero[0]) ^ 0x80808080u;
        high = ((word >> 4 & 0x0f0f0f0fu | 0x80808080u) - zero[1]) ^ 0x80808080u;
    } else {
        low = (word << 4 & 0xf0f0f0f0u) ^ 0x80808080u;
        high = (word & 0xf0f0f0f0u) ^ 0x80808080u;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
w4a8(const __grid_constant__ TensorMap x, const unsigned char* __restrict__ codes,
             const unsigned char* __restrict__ scales, const unsigned char* __restrict__ zeros,
             const float* __restrict__ x_scales, void* __restrict__ y, int rows, int n, int slabs, int steps, int groups) {
    extern __shared__ unsigned char unaligned[];
    __shared__ __align__(8) u64 barriers[2 * STAGES];
    unsigned char* memory = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;      // as the swizzle needs it
    const u32 ring = shared_address(memory), full = shared_address(barriers), empty = full + 8 * STAGES;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, rank = CLUSTER > 1 ? blockIdx.z : 0;
    const int token = blockIdx.x * TOKENS, slab = blockIdx.y * WARPGROUPS;
    const int begin = steps * rank / CLUSTER, count = steps * (rank + 1) / CLUSTER - begin;

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(full + 8 * s, 2);                                // of x and of W
            barrier_init(empty + 8 * s, CONSUMERS / WARP);
        }
        barrier_init_done();
    }
    __syncthreads();
    let_next_kernel_start();

    if (warp >= CONSUMERS / WARP) {
        if (HAND_OVER) registers_shrink<40>();
        const int here = min(WARPGROUPS, slabs - slab);                   // the last tile may be cut off
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
                arrive_and_expect(at.full, CODES);
                tile_copy(at.stage, &x, token, step * STEP, at.full);
            }
        }
        __syncwarp();
        if (CLUSTER > 1) cluster_barrier();                               // the sums are there
    } else {
        if (HAND_OVER) registers_grow<WARPGROUPS == 2 ? 232 : 152>();
        const int g = lane / 4, t = lane % 4, group = warp / 4, block = warp % 4;
        float sum[TOKENS / 2] = {};
        int part[PARTS][TOKENS / 2] = {};                                 // of a group
        float part_scale[PARTS][2] = {};                                  // of rows g and g + 8
        u32 a[2][TURN_PRODUCTS][4];
        Place<STAGES, STAGE_BYTES> at(ring, full, 0);
        auto add_part = [&](auto which) {
#pragma unroll
            for (int r = 0; r < TOKENS / 2; r++) {
                asm volatile("" : "+r"(part[which][r])::"memory");        // or what follows is moved before the wait
                sum[r] += float(part[which][r]) * part_scale[which][r % 4 / 2];
            }
        };
        auto release = [&]() {                                            // the stage before
            if (lane == 0) arrive(at.empty_before());
        };
        // Group `j` of step i, whose operand goes to a[half].
        auto take = [&](int i, auto j, auto half) {
            constexpr int now = PARTS == 2 ? half : 0;
            const bool first = i == 0 && j == 0;
            if (j == 0) wait(at.full, at.parity);
            const u32 pair = at.stage + group * META_BYTES + ((j * SLAB_BLOCKS + block) * 8 + g) * 4;
            const u32 s = load_shared_4(pair + SCALES), z = ASYMMETRIC ? load_shared_4(pair + ZEROS) : 0;
            const u32 zero[2] = {(z & 0xff) * 0x01010101u, (z >> 16 & 0xff) * 0x01010101u};
            const u32 of_w = at.stage + CODES + group * SLAB_BYTES + block * STEP_BYTES + lane * 16;
            uint4 piece;
#pragma unroll
            for (int q = 0; q < TURN_PRODUCTS; q++) {
                const int product = j * TURN_PRODUCTS + q;
                if (q == 0 || product % 2 == 0) piece = load_shared_16(of_w + product / 2 * PIECE_BYTES);
                unpack(a[half][q][0], a[half][q][1], product % 2 ? piece.z : piece.x, zero);
                unpack(a[half][q][2], a[half][q][3], product % 2 ? piece.w : piece.y, zero);
            }
            if (PARTS == 1 && !ROW_SCALES) {
                products_wait<0>();
                if (j == 0 && !first) release();
                add_part(Constant<0>{});
            }
            part_scale[now][0] = scale_to_float(s & 0xffff), part_scale[now][1] = scale_to_float(s >> 16);
#pragma unroll
            for (int q = 0; q < TURN_PRODUCTS; q++)                       // the operand is there before the products begin
                asm volatile("" : "+r"(a[half][q][0]), "+r"(a[half][q][1]), "+r"(a[half][q][2]), "+r"(a[half][q][3])::"memory");
            products_begin();
#pragma unroll
            for (int q = 0; q < TURN_PRODUCTS; q++) {
                const u64 columns_of_x = describe(at.stage + (j * TURN_PRODUCTS + q) * 32);
                warpgroup_multiply_add(part[now], a[half][q], columns_of_x, q > 0 || (ROW_SCALES && !first));
            }
            products_commit();
            products_wait<1>();                                           // those of the group before are done
            if (PARTS == 2 || ROW_SCALES) {
                if (j == 0 && !first) release();
                if (PARTS == 2) add_part(Constant<PARTS == 2 ? 1 - half : 0>{});
            }
            if (j == TURNS - 1) at.next();
        };
        auto finish = [&](auto half) {
            products_wait<0>();
            add_part(Constant<PARTS == 2 ? half : 0>{});
        };
        if constexpr (TURNS == 1) {
            for (int i = 0; i + 1 < count; i += 2) {
                take(i, Constant<0>{}, Constant<0>{});
                take(i + 1, Constant<0>{}, Constant<1>{});
            }
            if (count % 2) {
                take(count - 1, Constant<0>{}, Constant<0>{});
                finish(Constant<0>{});
            } else {
                finish(Constant<1>{});
            }
        } else {
            for (int i = 0; i < count; i++)
                unroll<TURNS>([&](auto j) { take(i, j, Constant<j % 2>{}); });
            finish(Constant<1>{});
        }
        consumers_barrier(CONSUMERS);                                     // nobody reads the ring any more
        float* sums = reinterpret_cast<float*>(memory);
#pragma unroll
        for (int r = 0; r < TOKENS / 2; r++)
            sums[(r / 4 * 8 + 2 * t + r % 2) * SUM_PITCH + group * SLAB_ROWS + block * 16 + g + r / 2 % 2 * 8] = sum[r];
        if (CLUSTER > 1) cluster_barrier();
        else consumers_barrier(CONSUMERS);
        wait_for_earlier_kernels();                                       // they wrote x's scales

        const int own = threadIdx.x % CHUNKS * 4, out = slab * SLAB_ROWS + own, tokens = min(TOKENS, rows - token);
        constexpr int APART = CONSUMERS / CHUNKS;
        for (int c = threadIdx.x / CHUNKS + rank * APART; c < tokens; c += APART * CLUSTER) {
            const u32 from = ring + (c * SUM_PITCH + own) * 4;
            float all[4] = {};
#pragma unroll
            for (int r = 0; r < CLUSTER; r++) {
                const float4 some = CLUSTER > 1 ? load_floats_from_cluster(from, r) : load_shared_floats(from);
                all[0] += some.x, all[1] += some.y, all[2] += some.z, all[3] += some.w;
            }
            const float x_scale = x_scales[token + c] / LIFT;
#pragma unroll
            for (int j = 0; j < 4; j++) all[j] *= x_scale;
            const size_t to = size_t(token + c) * n + out;
            if (n % 4 == 0) {
                if (out < n) store_four(y, to, all);
            } else {
#pragma unroll
                for (int j = 0; j < 4; j++)
                    if (out + j < n) store(y, to + j, all[j]);
            }
        }
    }
    if (CLUSTER > 1) cluster_barrier();                                   // no block leaves while another reads its sums
}
