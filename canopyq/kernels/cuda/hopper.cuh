// What compute capability 9.0a adds: copies that a single thread starts and that count their bytes on a barrier, and
// matrix products of four warps together that run while the program goes on.
#pragma once
#include "device.cuh"

// ---- barriers in shared memory ---------------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Make fresh barriers visible to the copy engine.
__device__ __forceinline__ void barrier_init_done() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// The same at a barrier of block ``rank`` of the cluster, at the address that this block has its own at.
__device__ __forceinline__ void arrive_at(u32 barrier, int rank) {
    asm volatile("{\n\t.reg .u32 there;\n\tmapa.shared::cluster.u32 there, %0, %1;\n\t"
                 "mbarrier.arrive.shared::cluster.b64 _, [there];\n\t}" ::"r"(barrier), "r"(rank) : "memory");
}

// Arrive, and let the barrier also wait for so many bytes of copies.
__device__ __forceinline__ void arrive_and_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Wait until the phase with this parity is over.
__device__ __forceinline__ void wait(u32 barrier, int parity) {
    u32 over;
    do {
        asm volatile("{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
                     "selp.u32 %0, 1, 0, p;\n\t}" : "=r"(over) : "r"(barrier), "r"(parity) : "memory");
    } while (!over);
}

// A place in a ring of SIZE stages of BYTES. Its barriers lie side by side: first those that tell a stage to be full, then
// those that tell it to be empty. `parity` is of the phase to wait for: 0 at first for who reads, 1 for who writes, whose
// first waits are over at once. No division: the warps that start copies are alone and wait for every instruction.
template <int SIZE, int BYTES>
struct Place {
    u32 stage, full;                                                      // addresses
    int left = SIZE, parity;

    __device__ __forceinline__ Place(u32 ring, u32 barriers, int parity) : stage(ring), full(barriers), parity(parity) {}
    __device__ __forceinline__ void next() {
        stage += BYTES, full += 8;
        if (--left == 0) stage -= SIZE * BYTES, full -= SIZE * 8, left = SIZE, parity ^= 1;
    }
    __device__ __forceinline__ u32 empty() const { return full + SIZE * 8; }
    __device__ __forceinline__ u32 empty_before() const { return full + (left == SIZE ? 2 * SIZE - 1 : SIZE - 1) * 8; }
};

// ---- bulk copies -------------------------------------------------------------------------------------------------------

// BYTES (a multiple of 16) in a row.
__device__ __forceinline__ void bulk_copy(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

struct alignas(64) TensorMap {
    u64 opaque[16];
};

// The box of x that begins at this row and this half step: rows by two times 64 columns, the second 64 after all rows of
// the first. What lies outside x arrives as zeros.
__device__ __forceinline__ void box_copy(u32 to, const TensorMap* map, int row, int half_step, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {0, %2, %3}], [%4];"
                 ::"r"(to), "l"(map), "r"(row), "r"(half_step), "r"(barrier) : "memory");
}

// The box of a matrix of bytes that begins at this row and column; what lies outside arrives as zeros.
__device__ __forceinline__ void tile_copy(u32 to, const TensorMap* map, int row, int column, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3}], [%4];"
                 ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier) : "memory");
}

// As `box_copy` of a half step, into the shared memory of all blocks of a cluster that `blocks` names by bits, at the same
// place. It counts on the barrier of each.
__device__ __forceinline__ void box_copy_to(u32 blocks, u32 to, const TensorMap* map, int row, int half_step, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {0, %2, %3}], [%4], %5;"
                 ::"r"(to), "l"(map), "r"(row), "r"(half_step), "r"(barrier), "h"(u16(blocks)) : "memory");
}

// The other way: a box from shared memory, as the copy engine swizzles it, into a matrix; what lies outside is left out.
// It runs on while the thread does, as part of the batch that the thread closes next.
__device__ __forceinline__ void tile_store(const TensorMap* map, u32 from, int row, int column) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];"
                 ::"l"(map), "r"(column), "r"(row), "r"(from) : "memory");
}

__device__ __forceinline__ void close_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until all of this thread's stores but the newest LEFT batches have read shared memory; until all are done.
template <int LEFT>
__device__ __forceinline__ void wait_for_stores_to_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(LEFT) : "memory");
}
__device__ __forceinline__ void wait_for_stores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Four 8-by-8 matrices of 16-bit floats, transposed. Lane 8i + r gives the address of column r of matrix i.
__device__ __forceinline__ void store_transposed(u32 column_address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                 ::"r"(column_address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// What this thread wrote to shared memory is there for the copy engine, once a barrier has followed.
__device__ __forceinline__ void show_to_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- products of a warpgroup: four warps, 64 rows ----------------------------------------------------------------------

// Registers and shared memory written so far may be read by the products that follow.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Wait until all but the newest LEFT committed groups of products are done.
template <int LEFT>
__device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// Names a matrix whose rows of 128 bytes lie one after the other in shared memory, swizzled as the copy engine does it:
// 16-byte piece p of row r lies at p XOR (r mod 8). The stride says where the next 8 rows begin: 1024 bytes on.
__device__ __forceinline__ u64 describe(u32 address) {
    constexpr u64 STRIDE = 1024 / 16, SWIZZLE_128 = 1;
    return u64((address & 0x3ffff) >> 4) | (u64(1) << 16) | (STRIDE << 32) | (SWIZZLE_128 << 62);
}

// Registers from one warpgroup to others. Every warp of it must call this.
template <int COUNT>
__device__ __forceinline__ void registers_shrink() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
__device__ __forceinline__ void registers_grow() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Barrier number ``which`` (1 … 15) of a block, among ``threads`` threads, whole warps.
__device__ __forceinline__ void barrier_among(int which, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(which), "r"(threads) : "memory");
}

// A barrier among the first ``threads`` threads of a block.
__device__ __forceinline__ void consumers_barrier(int threads) {
    barrier_among(1, threads);
}

__device__ __forceinline__ float4 load_shared_floats(u32 address) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address) : "memory");
    return v;
}

__device__ __forceinline__ float4 load_floats_from_cluster(u32 address, int rank) {
    u32 there;
    float4 v;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(there) : "memory");
    return v;
}
