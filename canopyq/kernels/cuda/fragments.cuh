// How a quantized weight lies in memory for the tensor cores, and how its codes become 16-bit floats.
//
// The weight (N, K) is cut into slabs of 64 rows, and a slab into steps of 128 columns, which lie one after the other. In a
// step lie 4 blocks of 16 rows, and in a block pieces of 512 bytes: 64 columns of 4-bit codes or 32 of 8-bit codes. In a
// piece each of a warp's 32 lanes finds 16 bytes, its share of the operand `a` of m16n8k16 (16 rows, 16 columns) for 4 or
// 2 products in a row. So a warp reads a piece with one 16-byte load per lane, and no lane needs anything from another.
// Scales lie in the same order: for each slab, group and block 8 pairs (row g, row g + 8). Zero points, as 16-bit
// integers, likewise.
//
// A code u is unsigned: the weight is (u − z) · s with z = 8 or 128 if symmetric. To make it a float without a
// conversion, its bits are set into the mantissa of a number so large that its last bit counts 1: 128 + u in bfloat16 is
// 0x4300 | u, 1024 + u in float16 is 0x6400 | u. Subtracting (128 + z) or (1024 + z) is exact.
#pragma once
#include "device.cuh"

constexpr int BLOCK_ROWS = 16, SLAB_BLOCKS = 4, SLAB_ROWS = SLAB_BLOCKS * BLOCK_ROWS;
constexpr int PIECE_BYTES = 512;
constexpr int STEP = 128;                                    // columns that a warp takes at a time
constexpr int PIECE_COLUMNS = PIECE_BYTES * 8 / BITS / BLOCK_ROWS;
constexpr int PIECES = STEP / PIECE_COLUMNS;                 // to a step
constexpr int PRODUCTS = PIECE_COLUMNS / 16;                 // of the tensor cores to a piece
constexpr int STEP_BYTES = PIECES * PIECE_BYTES;             // of codes for 16 rows and one step
// GROUP is the number of columns that share a scale, 0 for all of them.
constexpr int STEP_GROUPS = GROUP > 0 && GROUP < STEP ? STEP / GROUP : 1;
constexpr int GROUP_BYTES = BLOCK_ROWS * 2;                  // of scales, or of zero points, for 16 rows and one group

constexpr u32 MAGIC = ELEMENT_BF16 ? 0x43004300u : 0x64006400u;        // (128, 128) or (1024, 1024)
constexpr u32 SIGN2 = 0x80008000u;

// Where the step of a block of 16 rows begins, in bytes of codes; and a group of it, in pairs of scales or zero points.
__device__ __forceinline__ size_t codes_at(int block, int step, int steps) {
    return ((size_t(block / SLAB_BLOCKS) * steps + step) * SLAB_BLOCKS + block % SLAB_BLOCKS) * STEP_BYTES;
}

__device__ __forceinline__ size_t pairs_at(int block, int group, int groups) {
    return ((size_t(block / SLAB_BLOCKS) * groups + group) * SLAB_BLOCKS + block % SLAB_BLOCKS) * 8;
}

// Where the groups of a step begin.
__device__ __forceinline__ int first_group(int step) {
    return GROUP == 0 ? 0 : GROUP > STEP ? step / (GROUP / STEP) : step * STEP_GROUPS;
}

__device__ __forceinline__ float scale_to_float(u16 s) { return SCALE_BF16 ? bf16_to_float(s) : half_to_float(s); }

// What has to be added to the raw floats of one row, twice in a register: −(128 + z) or −(1024 + z) for 4-bit codes.
// 8-bit codes in bfloat16 come out of `raw` as u − 128 and need −(z − 128).
__device__ __forceinline__ u32 offset_of(int z) {
    const float base = BITS == 8 && ELEMENT_BF16 ? -128.f : ELEMENT_BF16 ? 128.f : 1024.f;
    return pack(-(base + float(z)), -(base + float(z)));
}

constexpr int MIDDLE = BITS == 4 ? 8 : 128;                  // z of a symmetric weight

// The four registers of `a` for product number ``j`` of a piece, before the zero point is taken off.
__device__ __forceinline__ void raw(u32 (&a)[4], const uint4& piece, int j) {
    const u32 words[4] = {piece.x, piece.y, piece.z, piece.w};
#if BITS == 4
    // A word holds all four registers: nibble i of each half belongs to a[i].
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = and_or(words[j] >> (4 * i), 0x000f000fu, MAGIC);
#else
    // Two words hold two registers each, as two bytes that are spread over the halves of one.
#pragma unroll
    for (int i = 0; i < 4; i++) {
#if ELEMENT_BF16
        const u32 spread = __byte_perm(words[2 * j + i / 2], 0, i % 2 ? 0x4342 : 0x4140);
        // 128 + u does not fit in 8 bits of mantissa. So take 7 bits of it, 128 + u % 128, and subtract 256, or 128 if the
        // eighth is set: u − 128, exactly.
        u32 minus;
        asm("lop3.b32 %0, %1, %2, %3, 0xae;" : "=r"(minus) : "r"(spread), "r"(0x00800080u), "r"(0xc300c300u));
        a[i] = add2(and_or(spread, 0x007f007fu, MAGIC), minus);
#else
        a[i] = __byte_perm(words[2 * j + i / 2], MAGIC, i % 2 ? 0x5352 : 0x5150);
#endif
    }
#endif
}

constexpr bool SYMMETRIC_IS_RAW = BITS == 8 && ELEMENT_BF16;  // then the symmetric weight needs nothing added
