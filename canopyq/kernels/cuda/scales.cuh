// Sums of products of 8-bit codes, and the scales that make numbers of them.
//
// Constants: SCALE and OUTPUT, the dtypes of W's scales and of y: 0 half, 1 bfloat16, 2 float; CODE as in codes.cuh.
#pragma once
#include "codes.cuh"

template <bool FLOAT>
struct Sums {
    typedef float Type;
};
template <>
struct Sums<false> {
    typedef int Type;
};
typedef Sums<FP8>::Type Sum;  // of INT8 products in int32, exactly

__device__ __forceinline__ float load_scale(const void* scales, int i) {
    if (SCALE == 2) return ((const float*)scales)[i];
    u16 scale = ((const u16*)scales)[i];
    return SCALE == 1 ? bf16_to_float(scale) : half_to_float(scale);
}

__device__ __forceinline__ void store(void* y, size_t i, float f) {
    if (OUTPUT == 2) ((float*)y)[i] = f;
    else
        ((u16*)y)[i] = to_element(f);
}

// Four neighbours from element i on, a multiple of 4.
__device__ __forceinline__ void store_four(void* y, size_t i, const float (&f)[4]) {
    if (OUTPUT == 2) ((float4*)y)[i / 4] = make_float4(f[0], f[1], f[2], f[3]);
    else
        ((uint2*)y)[i / 4] = make_uint2(pack(f[0], f[1]), pack(f[2], f[3]));
}
