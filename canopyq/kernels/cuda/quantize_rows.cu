// Rows of 16-bit floats to 8-bit codes and a scale each, in one pass: a block takes a row, finds its largest magnitude
// and divides. What comes before is fused in: nothing (INPUT 0), adding to the residual stream and RMSNorm (1) or
// SiLU(gate) · up (2), with the roundings to 16 bits that the model's own layers make, so that the codes are the same.
//
// Constants: CODE (8 for INT8, 0 for FP8 E4M3), ELEMENT_BF16, INPUT, THREADS, KEPT (vectors that a thread keeps in
// registers; the rest of a longer row is read again).
#include "codes.cuh"

constexpr int VECTOR = 8;  // neighbours that a thread takes together
constexpr int RESIDENT = KEPT < (INPUT ? 3 : 4) ? 1536 : 1024;  // threads of a multiprocessor, without spilling

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

__device__ __forceinline__ float low(u32 pair) { return to_float(u16(pair)); }
__device__ __forceinline__ float high(u32 pair) { return to_float(u16(pair >> 16)); }

// What is quantized of two neighbours x; g beside them is the norm's weight, or up.
__device__ __forceinline__ u32 after(u32 x, u32 g, float factor) {
    if (INPUT == 0) return x;
    if (INPUT == 1) return mul2(g, pack(low(x) * factor, high(x) * factor));
    return mul2(pack(low(x) / (1.f + expf(-low(x))), high(x) / (1.f + expf(-high(x)))), g);
}

// x (rows, k) with `stride` elements from row to row, k a multiple of 8. other: the norm's weight (k), or up as x.
// change: null, or what is added to x first, (rows, k), for the norm. codes (rows, k), scales (rows).
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT / THREADS)
    quantize_rows(u16* x, const u16* other, const u16* change, u8* codes, float* scales, int k, long long stride,
                  long long other_stride, float epsilon) {
    __shared__ float sums[THREADS / WARP];
    __shared__ u32 largest[THREADS / WARP];
    let_next_kernel_start();
    wait_for_earlier_kernels();
    u16* row = x + blockIdx.x * stride;
    const u16* beside = other + (INPUT == 2 ? blockIdx.x * other_stride : 0);
    u8* to = codes + (size_t)blockIdx.x * k;
    uint4 kept[KEPT];
    auto each_kept = [&](auto f) {  // f(where in the row, the eight that are kept from there)
#pragma unroll
        for (int j = 0; j < KEPT; j++)
            if (const int at = (j * THREADS + threadIdx.x) * VECTOR; at < k) f(at, kept[j]);
    };
    auto each_further = [&](auto f) {
        for (int at = (KEPT * THREADS + threadIdx.x) * VECTOR; at < k; at += THREADS * VECTOR) f(at);
    };
    auto load = [](const u16* from) { return *(const uint4*)from; };

    float factor = 1.f;
    if (INPUT == 1) {
        float squares = 0.f;
        auto add = [&](int at) {
            uint4 a = load(row + at);
            if (change != nullptr) {  // this thread alone reads the sum again
                const uint4 b = load(change + (size_t)blockIdx.x * k + at);
                a = make_uint4(add2(a.x, b.x), add2(a.y, b.y), add2(a.z, b.z), add2(a.w, b.w));
                *(uint4*)(row + at) = a;
            }
            const u32 pairs[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
            for (int i = 0; i < 4; i++)
                squares += low(pairs[i]) * low(pairs[i]) + high(pairs[i]) * high(pairs[i]);
            return a;
        };
        each_kept([&](int at, uint4& a) { a = add(at); });
        each_further([&](int at) { add(at); });
        factor = rsqrtf(block_sum(squares, sums) / float(k) + epsilon);
    } else {
        each_kept([&](int at, uint4& a) { a = load(row + at); });
    }

    auto finish = [&](uint4 a, int at) {
        uint4 b = {0, 0, 0, 0};
        if (INPUT) b = load(beside + at);
        return make_uint4(after(a.x, b.x, factor), after(a.y, b.y, factor), after(a.z, b.z, factor),
                          after(a.w, b.w, factor));
    };
    u32 most_bits = 0;  // of the largest magnitudes, two side by side: floats are ordered as their bits are
    auto measure = [&](uint4 a) {
        const u32 pairs[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
        for (int i = 0; i < 4; i++) most_bits = __vmaxu2(most_bits, pairs[i] & 0x7fff7fffu);
    };
    each_kept([&](int at, uint4& a) { a = finish(a, at), measure(a); });
    each_further([&](int at) { measure(finish(load(row + at), at)); });
    most_bits = block_max(max(most_bits & 0xffffu, most_bits >> 16), largest);
    const float most = to_float(u16(most_bits));  // NaN, whose bits are above infinity's, and infinity spoil the row
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
    // Four codes. INT8: the last bit of 1.5 · 2^23 counts 1, so that a number added to it is rounded, and its low byte
    // is the code; −127.5 at the least becomes −128, and only 127.5 has no code.
    auto encode = [&](u32 first, u32 second, auto exact) {
        const float v[4] = {low(first), high(first), low(second), high(second)};
        float q[4];
        u32 integers[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            q[i] = divide(v[i], exact);
            integers[i] = __float_as_uint(fminf(q[i], 127.f) + 0x1.8p23f);
        }
        const u32 front = __byte_perm(integers[0], integers[1], 0x0040);
        const u32 back = __byte_perm(integers[2], integers[3], 0x4000);
        return FP8 ? e4m3_pack(q[0], q[1]) | e4m3_pack(q[2], q[3]) << 16 : __byte_perm(front, back, 0x7610);
    };
    auto write_row = [&](auto exact) {
        auto write = [&](uint4 a, int at) {
            *(uint2*)(to + at) = make_uint2(encode(a.x, a.y, exact), encode(a.z, a.w, exact));
        };
        each_kept([&](int at, uint4& a) { write(a, at); });
        each_further([&](int at) { write(finish(load(row + at), at), at); });
    };
    if (scale < 0x1p-90f) write_row(Constant<1>{});
    else write_row(Constant<0>{});
}
