// Halves (float16) in pairs, whatever the 16-bit type of the activations is: kernels that turn codes into halves by
// setting bits need them, because a half's mantissa holds every 8-bit code and bfloat16's does not.
#pragma once
#include "device.cuh"

// unroll<N>([&](auto i) {...}): i is a constant in each turn, fit to be a template argument.
template <int I>
struct Constant {
    __device__ constexpr operator int() const { return I; }
};
template <int N, int I = 0, typename F>
__device__ __forceinline__ void unroll(F&& f) {
    if constexpr (I < N) {
        f(Constant<I>{});
        unroll<N, I + 1>(f);
    }
}

constexpr u32 HALF_MAGIC = 0x64006400u;  // (1024, 1024): an integer below 1024 set into its mantissa adds to it

// 2^e, twice.
__device__ __forceinline__ constexpr u32 half_power(int e) { return u32(e + 15) * 0x04000400u; }

__device__ __forceinline__ u32 half_multiply(u32 a, u32 b) {
    u32 d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

// a · b + c for both halves, rounded once.
__device__ __forceinline__ u32 half_fma(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// Two floats rounded and packed, the first in the low half.
__device__ __forceinline__ u32 half_pack(float low, float high) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// Two 16-bit activations as halves.
__device__ __forceinline__ u32 to_halves(u32 pair) {
    return ELEMENT_BF16 ? half_pack(bf16_to_float(u16(pair)), bf16_to_float(u16(pair >> 16))) : pair;
}

// Two E4M3 codes in the low 16 bits, as halves. The format's exponent has 4 bits with bias 7, a half's 5 with bias 15.
__device__ __forceinline__ u32 e4m3_to_halves(u32 codes) {
    u32 pair;
#if __CUDA_ARCH__ >= 890
    asm("{.reg .b16 c; cvt.u16.u32 c, %1; cvt.rn.f16x2.e4m3x2 %0, c;}" : "=r"(pair) : "r"(codes));
#else
    u32 high = __byte_perm(codes, 0, 0x1404);
    pair = half_multiply((high & 0x80008000u) | ((high & 0x7f007f00u) >> 1), half_power(8));
#endif
    return pair;
}

// As `multiply_add` of device.cuh, of halves.
__device__ __forceinline__ void half_multiply_add(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// 2^x, with results below 2^−126 as 0.
__device__ __forceinline__ float exp2_fast(float x) {
    float f;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(f) : "f"(x));
    return f;
}

// Bytes that are read once, by this thread alone.
template <int BYTES>
__device__ __forceinline__ void load_once(u32* r, const void* p) {
    if constexpr (BYTES == 16)
        asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "l"(p));
    else if constexpr (BYTES == 8)
        asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "l"(p));
    else if constexpr (BYTES == 4)
        asm volatile("ld.global.nc.L1::no_allocate.L2::128B.u32 %0, [%1];" : "=r"(r[0]) : "l"(p));
    else
        asm volatile("{.reg .u16 h; ld.global.nc.u16 h, [%1]; cvt.u32.u16 %0, h;}" : "=r"(r[0]) : "l"(p));
}
