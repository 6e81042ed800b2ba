// What kernels here need of the hardware, under readable names: 16-bit floats in pairs, copies that run while the
// program goes on, 8-by-8 matrices out of shared memory, and the order of kernels in a stream. PTX ISA names the
// instructions; nothing of the CUDA toolkit is included. ELEMENT_BF16 says what a 16-bit float is: 1 bfloat16, 0 float16.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef ELEMENT_BF16
#define ELEMENT_BF16 1
#endif

constexpr int WARP = 32;

// ---- 16-bit floats, two to a register ------------------------------------------------------------------------------

__device__ __forceinline__ float bf16_to_float(u16 h) { return __uint_as_float(u32(h) << 16); }

__device__ __forceinline__ float half_to_float(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}

__device__ __forceinline__ float to_float(u16 h) { return ELEMENT_BF16 ? bf16_to_float(h) : half_to_float(h); }

// Two floats rounded and packed, the first in the low half.
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 pair;
#if ELEMENT_BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#endif
    return pair;
}

__device__ __forceinline__ u16 to_element(float f) { return u16(pack(f, 0.f) & 0xffffu); }

// a · b + c for both halves, rounded once.
__device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c) {
    u32 d;
#if ELEMENT_BF16
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#else
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#endif
    return d;
}

constexpr u32 ONE2 = ELEMENT_BF16 ? 0x3f803f80u : 0x3c003c00u;         // (1, 1)
constexpr u32 MINUS_ZERO2 = 0x80008000u;                                // (−0, −0): added, it changes nothing

__device__ __forceinline__ u32 add2(u32 a, u32 b) { return fma2(a, ONE2, b); }
__device__ __forceinline__ u32 mul2(u32 a, u32 b) { return fma2(a, b, MINUS_ZERO2); }

// Bitwise (a & b) | c in one instruction.
__device__ __forceinline__ u32 and_or(u32 a, u32 b, u32 c) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// ---- shared memory ---------------------------------------------------------------------------------------------------

// A pointer into shared memory as the 32-bit address that instructions take.
__device__ __forceinline__ u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ uint4 load_shared_16(u32 address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
    return v;
}

__device__ __forceinline__ u32 load_shared_4(u32 address) {
    u32 v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
    return v;
}

// Four 8-by-8 matrices of 16-bit floats. Lane 8i + r gives the address of row r of matrix i; each lane receives the two
// neighbours (row lane / 4, columns 2·(lane % 4)) of every matrix.
__device__ __forceinline__ uint4 load_matrices(u32 row_address) {
    uint4 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(row_address));
    return v;
}

// ---- copies from global to shared memory that do not wait --------------------------------------------------------------

__device__ __forceinline__ void copy_16(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ void copy_4(u32 to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}

// Copies belong to the batch that the next call closes. A batch may be empty.
__device__ __forceinline__ void close_batch() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until all but the newest LEFT batches of this thread have arrived.
template <int LEFT>
__device__ __forceinline__ void wait_for_batches() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// ---- the tensor cores ------------------------------------------------------------------------------------------------

// d (16, 8) += a (16, 16) · b (16, 8), sums in float32. In lane 4g + t: a = rows g and g + 8 in turn at columns 2t, then
// both at columns 2t + 8; b = rows 2t and 2t + 8 of column g; d = columns 2t and 2t + 1 of row g, then of row g + 8.
__device__ __forceinline__ void multiply_add(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
#if ELEMENT_BF16
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#else
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#endif
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- kernels in a row: programmatic dependent launch (compute capability 9.0) ---------------------------------------

// Let the next kernel of the stream start now. It may prefetch what never changes, such as weights.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Wait until everything that earlier kernels of the stream wrote can be seen. Needed before the first access to anything
// that they write or read.
__device__ __forceinline__ void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- clusters: blocks that read each other's shared memory (compute capability 9.0) -----------------------------------

// A barrier in two parts: what a thread wrote before it arrived, others read after they waited. Every thread of the
// cluster's blocks must call both; lanes that took different turns before are brought together first.
__device__ __forceinline__ void cluster_arrive() {
    __syncwarp();
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
    __syncwarp();
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_barrier() {
    cluster_arrive();
    cluster_wait();
}

// A float of block ``rank`` of the cluster, at the address that this block has it at.
__device__ __forceinline__ float load_from_cluster(u32 address, int rank) {
    float f = 0.f;
#if __CUDA_ARCH__ >= 900
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(f) : "r"(there) : "memory");
#endif
    return f;
}
