// y (rows, n) = x (rows, k) · Wᵀ for many rows of x: what counts is that the tensor cores never wait, at any shape. W is
// dequantized in registers as the 64-row operand of the tensor cores' warpgroup products, x is the other one in shared
// memory. Compute capability 9.0a.
//
// * The work is cut into tiles, rows of W by TOKENS rows of x. Blocks first share the last tiles, one to two for each of
//   them, which are cut into parts of their columns: every block takes as many as every other, in a row: stream-K (Osama
//   et al. 2023). So no multiprocessor idles while others do a last tile. The tiles before those they take whole, in turn,
//   so that neighbours read the same x and W at a time, from the cache.
// * A block walks its shared tiles from the last to the first. Of the last it may have the first parts only: those sums go
//   to memory, at once. Whoever has a tile's last part adds what others have of it, which come through the ring of x behind
//   its own columns, and stores the tile. It waits only for blocks before it, which have started before it and write what it
//   needs first: none waits for long, and never in a ring.
// * CLUSTER blocks have the same rows of x: each copies its share of them into the shared memory of all. Reading x from the
//   cache is what takes longest otherwise.
// * Two warps start the copies, on into the next tile while the results of this one are stored: one of x, into a ring of
//   STAGES stages, 64 columns to a stage; one of W, into a ring of W_STAGES, a step of 128 columns to a stage, since a copy
//   costs its start, however small. Each of WARPGROUPS warpgroups has M_TILES · 64 rows of W, dequantizes BATCH products ahead
//   while the tensor cores are at work on those before, and goes on without waiting for the others.
// * A scale per row multiplies the sums, in float32; scales of groups multiply the weights, and each is rounded once, like x.
// * Results are turned around on their way through shared memory (they come by rows of W and go by rows of x), and stored by
//   the copy engine while the next products run.
//
// Constants: ELEMENT_BF16, SCALE_BF16, BITS, GROUP, ASYMMETRIC, TOKENS, M_TILES, WARPGROUPS, STAGES, BATCH, CLUSTER,
// BLOCKS_PER_SM.
// extra.cuh holds `warpgroup_multiply_add` for TOKENS columns.
#include "fragments.cuh"
#include "hopper.cuh"
#include "extra.cuh"

// With so many sums the 168 registers do not suffice that 10 warps can have each; then a whole warpgroup starts the copies
// and hands its registers over. Two of its warps work.
constexpr bool REALLOCATE_REGISTERS = M_TILES * TOKENS > 192 && WARPGROUPS > 1;
constexpr int GROUP_THREADS = 4 * WARP, CONSUMERS = WARPGROUPS * GROUP_THREADS;
constexpr int THREADS = CONSUMERS + (REALLOCATE_REGISTERS ? GROUP_THREADS : 2 * WARP);
constexpr int TILE_SLABS = WARPGROUPS * M_TILES;
constexpr int SLAB_BYTES = SLAB_BLOCKS * STEP_BYTES;                      // of codes, in a step
constexpr bool ROW_SCALES = GROUP == 0;
constexpr int META_BYTES = ROW_SCALES ? 0 : SLAB_BLOCKS * STEP_GROUPS * GROUP_BYTES;     // of scales or zero points
constexpr int SCALES = TILE_SLABS * SLAB_BYTES, ZEROS = SCALES + TILE_SLABS * META_BYTES;
constexpr int W_BYTES = ZEROS + ASYMMETRIC * TILE_SLABS * META_BYTES, W_STAGES = (STAGES + 1) / 2;
constexpr int HALF_STEP = 64, X_BYTES = TOKENS * HALF_STEP * 2;           // columns of a stage of x
constexpr int HALF_PRODUCTS = HALF_STEP / 16, SHARE = TOKENS / CLUSTER;   // rows of x that a block copies
constexpr int BOX_TOKENS = 32, BOX_BYTES = BOX_TOKENS * SLAB_ROWS * 2; // of results
constexpr int RESULTS = STAGES * X_BYTES;                                 // where they are staged: two boxes a warpgroup
constexpr int WEIGHTS = RESULTS + WARPGROUPS * 2 * BOX_BYTES;             // where the ring of W begins
constexpr int SUMS = TOKENS / 2;                                          // of a thread, for a slab
static_assert(TOKENS % BOX_TOKENS == 0 && TILE_SLABS <= WARP, "a lane starts the copies of each slab");
static_assert(BATCH <= HALF_PRODUCTS, "a batch lies in one stage of x, and a step has an even number of batches");
// A block's sums, 16 bytes of each thread after the other, are cut so that a piece of every warpgroup makes up a stage of x.
constexpr int PIECE_SUMS = TOKENS / 16 / WARPGROUPS, SUM_PIECES = M_TILES * SUMS / 4 / PIECE_SUMS;
constexpr int SUM_PIECE_BYTES = PIECE_SUMS * GROUP_THREADS * 16;
static_assert(TOKENS % (16 * WARPGROUPS) == 0 && WARPGROUPS * SUM_PIECE_BYTES == X_BYTES, "as sums are copied");
constexpr int GROUP_PRODUCTS = STEP / 16 / STEP_GROUPS;                   // of the tensor cores to a group of a step
constexpr int BATCH_PRODUCTS = BATCH < GROUP_PRODUCTS ? BATCH : GROUP_PRODUCTS; // products of a batch: they share a scale
// Weights in float16 are multiplied by a power of two, and sums divided by it, to keep small ones off the subnormals.
constexpr float LIFT = ELEMENT_BF16 || ROW_SCALES ? 1.f : 64.f;

// The scale of a row, twice in a register.
__device__ __forceinline__ u32 scale_pair(u16 s) {
    if (ELEMENT_BF16 && SCALE_BF16) return s * 0x10001u;
    const float f = scale_to_float(s) * LIFT;
    return pack(f, f);
}

__device__ __forceinline__ void set_flag(u64* flag, u64 value) {          // after all that its block wrote before a barrier
    asm volatile("st.release.gpu.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
}

__device__ __forceinline__ void wait_for_flag(const u64* flag, u64 value) {
    u64 found;
    do asm volatile("ld.acquire.gpu.u64 %0, [%1];" : "=l"(found) : "l"(flag) : "memory");
    while (found != value);
}

// Memory that threads write is read by the copy engine, here or there.
__device__ __forceinline__ void show_memory_to_copies() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// What a block does: parts `first` to `stop` of the shared tiles, from the last of these tiles to the first, then whole tiles.
struct Walk {
    int first, stop, parts, steps, whole;                                 // steps to a tile; tiles that are not shared
    int tile, from, to, begin, end;                                       // where it is: which parts of a tile, which steps

    __device__ __forceinline__ Walk(int first, int stop, int parts, int steps, int whole)
        : first(first), stop(stop), parts(parts), steps(steps), whole(whole) {
        tile = whole + (stop > first ? (stop - 1) / parts : int(blockIdx.x) - int(gridDim.x));
        enter();
    }
    __device__ __forceinline__ void enter() {
        from = tile < whole ? 0 : max(first - (tile - whole) * parts, 0);
        to = tile < whole ? parts : min(stop - (tile - whole) * parts, parts);
        begin = steps * from / parts, end = steps * to / parts;
    }
    __device__ __forceinline__ bool more() const { return tile >= 0; }
    __device__ __forceinline__ void next() {
        if (tile < whole) tile -= gridDim.x;
        else if ((tile - whole) * parts > first) tile--;
        else tile = whole + blockIdx.x - gridDim.x;
        enter();
    }
};

// whole, shared: tiles (of a cluster) that are taken whole, a multiple of the blocks, and those that are shared. partials: a
// tile of float32 sums for each block. flags: WARPGROUPS to a block, none of which is `mark`, a number that no other launch
// has. Neither is used if no tile has two parts.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
stream_k(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap y, const unsigned char* __restrict__ codes,
         const unsigned char* __restrict__ scales, const unsigned char* __restrict__ zeros, unsigned char* partials, u64* flags,
         u64 mark, int rows, int slabs, int steps, int groups, int token_tiles, int whole, int shared, int parts) {
    extern __shared__ unsigned char unaligned[];
    __shared__ __align__(8) u64 barriers[2 * STAGES + 2 * W_STAGES];
    const u32 memory = (shared_address(unaligned) + 1023) / 1024 * 1024;  // as the swizzle needs it
    const u32 x_full = shared_address(barriers), w_full = x_full + 2 * STAGES * 8;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int rank = CLUSTER > 1 ? blockIdx.z : 0;                        // blocks of a cluster have the same blockIdx.x
    auto first_part = [&](int block) { return int((long long)shared * parts * block / gridDim.x); };
    Walk walk(first_part(blockIdx.x), first_part(blockIdx.x + 1), parts, steps, whole);
    auto group_of = [&](int block, int group) { return (block * CLUSTER + rank) * WARPGROUPS + group; };
    // The first of the blocks that have parts of the tile which this block ends; those from it to this one have some.
    auto first_of_tile = [&]() {
        int block = blockIdx.x;
        while (walk.from > 0 && first_part(block) > (walk.tile - whole) * parts) block--;
        return block;
    };

    if (threadIdx.x == 0) {
        for (int s = 0; s < 2 * STAGES; s++) barrier_init(x_full + 8 * s, s < STAGES ? 1 : CLUSTER * CONSUMERS / WARP);
        for (int s = 0; s < 2 * W_STAGES; s++) barrier_init(w_full + 8 * s, s < W_STAGES ? 1 : CONSUMERS / WARP);
        barrier_init_done();
    }
    if (CLUSTER > 1) cluster_barrier();                                   // before others arrive at them
    else __syncthreads();
    let_next_kernel_start();

    if (warp >= CONSUMERS / WARP) {
        if (REALLOCATE_REGISTERS) registers_shrink<40>();
        if (warp == CONSUMERS / WARP) {                                   // W never changes: no need to wait for other kernels
            Place<W_STAGES, W_BYTES> at(memory + WEIGHTS, w_full, 1);
            for (; walk.more(); walk.next()) {
                const int slab = (walk.tile / token_tiles * CLUSTER + rank) * TILE_SLABS;
                const int here = max(min(TILE_SLABS, slabs - slab), 0);   // the last tile may be cut off
                const u32 bytes = here * (SLAB_BYTES + META_BYTES * (1 + ASYMMETRIC));
                const unsigned char* from = codes + (size_t(slab + lane) * steps + walk.begin) * SLAB_BYTES;
                const size_t meta = size_t(slab + lane) * groups * SLAB_BLOCKS * GROUP_BYTES;
                const unsigned char *from_scales = scales + meta, *from_zeros = zeros + meta;
                for (int step = walk.begin; step < walk.end; step++, from += SLAB_BYTES, at.next()) {
                    wait(at.empty(), at.parity);
                    if (lane == 0) arrive_and_expect(at.full, bytes);
                    __syncwarp();
                    if (lane < here) {                                    // a lane for each slab
                        const int group = first_group(step) * SLAB_BLOCKS * GROUP_BYTES;
                        bulk_copy(at.stage + lane * SLAB_BYTES, from, SLAB_BYTES, at.full);
                        if (!ROW_SCALES)
                            bulk_copy(at.stage + SCALES + lane * META_BYTES, from_scales + group, META_BYTES, at.full);
                        if (!ROW_SCALES && ASYMMETRIC)
                            bulk_copy(at.stage + ZEROS + lane * META_BYTES, from_zeros + group, META_BYTES, at.full);
                    }
                }
            }
        } else if (warp == CONSUMERS / WARP + 1 && lane == 0) {
            Place<STAGES, X_BYTES> at(memory, x_full, 1);
            wait_for_earlier_kernels();                                   // x was just written
            for (; walk.more(); walk.next()) {
                const int token = walk.tile % token_tiles * TOKENS + rank * SHARE;
                for (int half = 2 * walk.begin; half < 2 * walk.end; half++, at.next()) {
                    wait(at.empty(), at.parity);
                    arrive_and_expect(at.full, X_BYTES);
                    const u32 to = at.stage + rank * (X_BYTES / CLUSTER);
                    if (CLUSTER > 1) box_copy_to((1 << CLUSTER) - 1, to, &x, token, half, at.full);
                    else box_copy(to, &x, token, half, at.full);
                }
                if (walk.to < parts) continue;
                for (int block = first_of_tile(); block < blockIdx.x; block++) {
                    for (int group = 0; group < WARPGROUPS; group++) {
                        wait_for_flag(flags + group_of(block, group), mark);
                        flags[group_of(block, group)] = 0;                // a graph's next run has the same mark
                    }
                    show_memory_to_copies();
                    for (int piece = 0; piece < SUM_PIECES; piece++, at.next()) {
                        wait(at.empty(), at.parity);
                        arrive_and_expect(at.full, X_BYTES);
                        for (int group = 0; group < WARPGROUPS; group++)
                            bulk_copy(at.stage + group * SUM_PIECE_BYTES,
                                      partials + (size_t(group_of(block, group)) * SUM_PIECES + piece) * SUM_PIECE_BYTES,
                                      SUM_PIECE_BYTES, at.full);
                    }
                }
            }
        }
        __syncwarp();
        if (CLUSTER > 1) cluster_barrier();                               // no block leaves while others copy into it
        return;
    }
    if (REALLOCATE_REGISTERS) registers_grow<232>();
    const int g = lane / 4, group = warp / 4, own = threadIdx.x % GROUP_THREADS;
    const u32 results = memory + RESULTS + group * 2 * BOX_BYTES;
    const int of_matrix = lane / 8 / 2 * 8 + lane % 8;                    // the row of x whose address this lane gives
    const u32 column_of_matrix = u32((warp % 4 * 2 + lane / 8 % 2) ^ (lane % 8)) * 16;       // swizzled
    float sum[M_TILES][SUMS];
    u32 a[2][M_TILES][BATCH_PRODUCTS][4];
    Place<W_STAGES, W_BYTES> w_at(memory + WEIGHTS, w_full, 0);
    Place<STAGES, X_BYTES> x_at(memory, x_full, 0);
    auto release_w = [&]() {                                              // the stage before
        if (lane == 0) arrive(w_at.empty_before());
    };
    auto release_x = [&]() {                                              // in all blocks that copy into it
        if (CLUSTER > 1 ? lane < CLUSTER : lane == 0) {
            if (CLUSTER > 1) arrive_at(x_at.empty_before(), lane);
            else arrive(x_at.empty_before());
        }
    };
    wait_for_earlier_kernels();                                           // they may use the memory of sums and results
    for (; walk.more(); walk.next()) {
        const int token = walk.tile % token_tiles * TOKENS;
        const int slab = (walk.tile / token_tiles * CLUSTER + rank) * TILE_SLABS + group * M_TILES;
        float row_scale[M_TILES][2];                                         // of rows g and g + 8
        u32 scale[M_TILES][2], offset[M_TILES][2];
        if (ROW_SCALES)
#pragma unroll
            for (int h = 0; h < M_TILES; h++) {
                const size_t pair = (size_t(min(slab + h, slabs - 1)) * SLAB_BLOCKS + warp % 4) * 8 + g;
                const u32 s = reinterpret_cast<const u32*>(scales)[pair];
                const u32 z = ASYMMETRIC ? reinterpret_cast<const u32*>(zeros)[pair] : MIDDLE * 0x10001u;
                row_scale[h][0] = scale_to_float(s & 0xffff), row_scale[h][1] = scale_to_float(s >> 16);
                offset[h][0] = offset_of(z & 0xffff), offset[h][1] = offset_of(z >> 16);
            }
        for (int step = walk.begin; step < walk.end; step++, w_at.next()) {
            const u32 of_w = w_at.stage;
            wait(w_at.full, w_at.parity);
            uint4 piece[M_TILES];
#pragma unroll
            for (int batch = 0; batch < STEP / 16 / BATCH_PRODUCTS; batch++) {
                const bool starts_half = batch * BATCH_PRODUCTS % HALF_PRODUCTS == 0;
#pragma unroll
                for (int q = 0; q < BATCH_PRODUCTS; q++) {
                    const int column = (batch * BATCH_PRODUCTS + q) * 16, j = column % PIECE_COLUMNS / 16;
#pragma unroll
                    for (int h = 0; h < M_TILES; h++) {
                        const int own_slab = group * M_TILES + h;
                        if (j == 0)
                            piece[h] = load_shared_16(of_w + own_slab * SLAB_BYTES + warp % 4 * STEP_BYTES
                                                      + column / PIECE_COLUMNS * PIECE_BYTES + lane * 16);
                        if (!ROW_SCALES && column / 16 % GROUP_PRODUCTS == 0) {
                            const int pair = (column * STEP_GROUPS / STEP * SLAB_BLOCKS + warp % 4) * 8 + g;
                            const u32 meta = of_w + own_slab * META_BYTES + pair * 4;
                            const u32 s = load_shared_4(meta + SCALES);
                            const u32 z = ASYMMETRIC ? load_shared_4(meta + ZEROS) : MIDDLE * 0x10001u;
                            scale[h][0] = scale_pair(s & 0xffff), scale[h][1] = scale_pair(s >> 16);
                            offset[h][0] = offset_of(z & 0xffff), offset[h][1] = offset_of(z >> 16);
                        }
                        u32(&operand)[4] = a[batch % 2][h][q];
                        raw(operand, piece[h], j);
#pragma unroll
                        for (int r = 0; r < 4; r++) {
                            if (ASYMMETRIC || !SYMMETRIC_IS_RAW) operand[r] = add2(operand[r], offset[h][r % 2]);
                            if (!ROW_SCALES) operand[r] = mul2(operand[r], scale[h][r % 2]);
                        }
                    }
                }
                if (starts_half && batch > 0) x_at.next();
                if (starts_half) wait(x_at.full, x_at.parity);
                products_begin();
#pragma unroll
                for (int q = 0; q < BATCH_PRODUCTS; q++) {
                    const int column = (batch * BATCH_PRODUCTS + q) * 16;
                    const u64 of_x = describe(x_at.stage + column % HALF_STEP * 2);
#pragma unroll
                    for (int h = 0; h < M_TILES; h++)
                        warpgroup_multiply_add(sum[h], a[batch % 2][h][q], of_x, column > 0 || step > walk.begin);
                }
                products_commit();
                products_wait<1>();                                       // the other half of `a` is free again
                // With it the products of the stage before are done. Every lane's loads had returned when a product took
                // them, and lane 0 gets here only after all lanes of its warp: `wait` above is an instruction of the whole
                // warp.
                if (starts_half && (batch > 0 || step > walk.begin)) release_x();
                if (batch == 0 && step > walk.begin) release_w();
            }
            x_at.next();
        }
        products_wait<0>();
        release_x();
        release_w();

        if (walk.to < parts) {                                            // four sums at a time: a warp's lie side by side
            float4* own_sums = reinterpret_cast<float4*>(
                partials + size_t(group_of(blockIdx.x, group)) * SUM_PIECES * SUM_PIECE_BYTES) + own;
#pragma unroll
            for (int h = 0; h < M_TILES; h++)
#pragma unroll
                for (int r = 0; r < SUMS; r += 4) {
                    const float* s = &sum[h][r];
                    own_sums[(h * SUMS + r) / 4 * GROUP_THREADS] = make_float4(s[0], s[1], s[2], s[3]);
                }
            show_memory_to_copies();
            barrier_among(1 + group, GROUP_THREADS);
            if (own == 0) set_flag(flags + group_of(blockIdx.x, group), mark);
            continue;
        }
        for (int block = first_of_tile(); block < blockIdx.x; block++)
#pragma unroll
            for (int piece = 0; piece < SUM_PIECES; piece++) {
                wait(x_at.full, x_at.parity);
#pragma unroll
                for (int i = 0; i < PIECE_SUMS; i++) {
                    const int r = (piece * PIECE_SUMS + i) * 4;
                    const u32 at = x_at.stage + group * SUM_PIECE_BYTES + (i * GROUP_THREADS + own) * 16;
                    const uint4 more = load_shared_16(at);
                    float* s = &sum[r / SUMS][r % SUMS];
                    s[0] += __uint_as_float(more.x), s[1] += __uint_as_float(more.y);
                    s[2] += __uint_as_float(more.z), s[3] += __uint_as_float(more.w);
                }
                __syncwarp();
                x_at.next();
                release_x();
            }
#pragma unroll
        for (int box = 0; box < TOKENS / BOX_TOKENS * M_TILES; box++) {
            const int h = box % M_TILES, start = box / M_TILES * BOX_TOKENS;
            if (token + start >= rows) break;
            const u32 staged = results + box % 2 * BOX_BYTES;
            if (own == 0) wait_for_stores_to_read<1>();                   // the box before the last has left
            barrier_among(1 + group, GROUP_THREADS);
            const float low = ROW_SCALES ? row_scale[h][0] : 1.f / LIFT;
            const float high = ROW_SCALES ? row_scale[h][1] : 1.f / LIFT;
#pragma unroll
            for (int c = 0; c < BOX_TOKENS; c += 16) {                    // two matrices' rows of x; two of W
                const float* s = &sum[h][(start + c) / 2];
                store_transposed(staged + (c + of_matrix) * 128 + column_of_matrix, pack(s[0] * low, s[1] * low),
                                 pack(s[2] * high, s[3] * high), pack(s[4] * low, s[5] * low),
                                 pack(s[6] * high, s[7] * high));
            }
            show_to_copies();
            barrier_among(1 + group, GROUP_THREADS);
            if (own == 0) {
                tile_store(&y, staged, token + start, (slab + h) * SLAB_ROWS);
                close_stores();
            }
        }
    }
    if (own == 0) wait_for_stores();
    if (CLUSTER > 1) cluster_barrier();
}
