// Rows of 16-bit floats to 8-bit codes and a scale each, in one pass: a block takes a row, finds its largest magnitude
// and divides. What comes before is fused in: nothing (INPUT 0), adding to the residual stream and RMSNorm (1) or
// SiLU(gate) · up (2), with the roundings to 16 bits that the model's own layers make, so that the codes are the same.
//
// Constants: CODE (8 for INT8, 0 for FP8 E4M3), ELEMENT_BF16, INPUT, THREADS.
#include "eight_bits.cuh"

constexpr int VECTOR = 8, KEPT = 4;  // vectors of a row that a thread keeps; longer rows are read twice

// The largest of all threads, and the sum.
__device__ __forceinline__ u32 block_max(u32 x, u32* shared) {
    x = __reduce_max_sync(~0u, x);
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = x;
    __syncthreads();
    x = shared[0];
#pragma unroll
    for (int i = 1; i < THREADS / WARP; i++) x = max(x, shared[i]);
    return x;
}
__device__ __forceinline__ float block_sum(float x, float* shared) {
#pragma unroll
    for (int i = 16; i; i /= 2) x += __shfl_xor_sync(~0u, x, i);
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = x;
    __syncthreads();
    x = shared[0];
#pragma unroll
    for (int i = 1; i < THREADS / WARP; i++) x += shared[i];
    return x;
}

__device__ __forceinline__ float rounded(float x) { return to_float(to_element(x)); }

// Eight neighbours of the row that is quantized.
__device__ __forceinline__ void read(float (&v)[VECTOR], const u16* x, const u16* other, float factor, int at) {
    uint4 a = *(const uint4*)(x + at), b = {0, 0, 0, 0};
    if (INPUT) b = *(const uint4*)(other + at);
    const u32 as[4] = {a.x, a.y, a.z, a.w}, bs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
        float f = to_float(u16(as[i / 2] >> (i % 2 * 16))), g = to_float(u16(bs[i / 2] >> (i % 2 * 16)));
        v[i] = INPUT == 0   ? f
               : INPUT == 1 ? rounded(g * rounded(f * factor))
                            : rounded(rounded(f / (1.f + expf(-f))) * g);
    }
}

// x (rows, k) with `stride` elements from row to row, k a multiple of 8. other: the norm's weight (k), or up as x.
// change: null, or what is added to x first, (rows, k), for the norm. codes (rows, k), scales (rows).
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    quantize_rows(u16* x, const u16* other, const u16* change, u8* codes, float* scales, int k, long long stride,
                  long long other_stride, float epsilon) {
    __shared__ float sums[THREADS / WARP];
    __shared__ u32 largest[THREADS / WARP];
    let_next_kernel_start();
    wait_for_earlier_kernels();
    u16* row = x + blockIdx.x * stride;
    const u16* beside = other + (INPUT == 2 ? blockIdx.x * other_stride : 0);
    u8* to = codes + (size_t)blockIdx.x * k;

    float factor = 1.f;
    if (INPUT == 1) {
        float squares = 0.f;
        for (int at = threadIdx.x * VECTOR; at < k; at += THREADS * VECTOR) {
            uint4 a = *(const uint4*)(row + at);
            u32 as[4] = {a.x, a.y, a.z, a.w};
            if (change != nullptr) {                           // this thread alone reads the sum again
                a = *(const uint4*)(change + (size_t)blockIdx.x * k + at);
                const u32 more[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
                for (int i = 0; i < 4; i++)
                    as[i] = pack(to_float(u16(as[i])) + to_float(u16(more[i])),
                                 to_float(u16(as[i] >> 16)) + to_float(u16(more[i] >> 16)));
                *(uint4*)(row + at) = make_uint4(as[0], as[1], as[2], as[3]);
            }
#pragma unroll
            for (int i = 0; i < VECTOR; i++) {
                float f = to_float(u16(as[i / 2] >> (i % 2 * 16)));
                squares += f * f;
            }
        }
        factor = rsqrtf(block_sum(squares, sums) / float(k) + epsilon);
    }
    float kept[KEPT][VECTOR];
    u32 most_bits = 0;  // of the largest magnitude: floats are ordered as their bits are, and NaN is above infinity
    auto measure = [&](const float (&v)[VECTOR]) {
#pragma unroll
        for (int i = 0; i < VECTOR; i++) most_bits = max(most_bits, __float_as_uint(v[i]) & 0x7fffffffu);
    };
#pragma unroll
    for (int j = 0; j < KEPT; j++) {
        int at = (j * THREADS + threadIdx.x) * VECTOR;
        if (at < k) read(kept[j], row, beside, factor, at), measure(kept[j]);
    }
    for (int at = (KEPT * THREADS + threadIdx.x) * VECTOR; at < k; at += THREADS * VECTOR) {
        float v[VECTOR];
        read(v, row, beside, factor, at), measure(v);
    }
    const float most = __uint_as_float(block_max(most_bits, largest));  // NaN and infinity spoil the whole row
    float scale = most == 0.f ? 1.f : fmaxf(most / (FP8 ? 448.f : 127.5f), 1.17549435e-38f);
    if (!(most < __uint_as_float(0x7f800000u))) scale = __uint_as_float(0x7fc00000u);
    if (threadIdx.x == 0) scales[blockIdx.x] = scale;

    // v / scale as division rounds it, in three instructions: a step of refinement with a reciprocal that is rounded
    // correctly gives just that, if the remainder has all its bits (Markstein 1990), on which `exact` does not rely.
    const float inverse = 1.f / scale;
    auto divide = [&](float v, auto exact) {
        if constexpr (exact != 0) return v / scale;
        const float q = v * inverse;
        return fmaf(fmaf(-q, scale, v), inverse, q);
    };
    auto write = [&](const float (&v)[VECTOR], int at, auto exact) {
        u32 words[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < VECTOR; i += 2) {
            const float a = divide(v[i], exact), b = divide(v[i + 1], exact);
            u32 pair;
            if (FP8) pair = e4m3_pack(a, b);
            else {  // the last bit of 1.5 · 2^23 counts 1: added to it, a number is rounded, and its low byte is the code
                const float low = fminf(fmaxf(a, -128.f), 127.f) + 0x1.8p23f;
                const float high = fminf(fmaxf(b, -128.f), 127.f) + 0x1.8p23f;
                pair = __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x0040) & 0xffffu;
            }
            words[i / 4] |= pair << (i % 4 * 8);
        }
        *(uint2*)(to + at) = make_uint2(words[0], words[1]);
    };
    auto write_row = [&](auto exact) {
#pragma unroll
        for (int j = 0; j < KEPT; j++) {
            int at = (j * THREADS + threadIdx.x) * VECTOR;
            if (at < k) write(kept[j], at, exact);
        }
        for (int at = (KEPT * THREADS + threadIdx.x) * VECTOR; at < k; at += THREADS * VECTOR) {
            float v[VECTOR];
            read(v, row, beside, factor, at), write(v, at, exact);
        }
    };
    if (scale < 0x1p-90f) write_row(Constant<1>{});
    else write_row(Constant<0>{});
}
