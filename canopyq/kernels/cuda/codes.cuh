// Eight-bit codes on both sides of a product: INT8 (CODE 8) or FP8 E4M3 (CODE 0).
#pragma once
#include "halves.cuh"

constexpr bool FP8 = CODE == 0;

// d (16, 8) += a (16, 32) · b (32, 8) of int8, sums in int32. As `multiply_add`, with four neighbouring codes in a
// register: a = rows g and g + 8 in turn at columns 4t … 4t + 3, then both at columns 4t + 16 …; b the
// same rows of column g.
__device__ __forceinline__ void int8_multiply_add(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Two E4M3 codes, the first in the low byte; values beyond ±448 saturate.
__device__ __forceinline__ u32 e4m3_pack(float low, float high) {
    u16 pair = 0;
#if __CUDA_ARCH__ >= 890
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
#endif
    return pair;
}
