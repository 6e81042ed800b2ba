// New tokens of a quantized KV cache of fixed size: keys and values go into a ring in full precision, and a block of 64
// tokens becomes codes as soon as `residual_length` newer tokens have come. Same ranges and codes as kv_cache/quantized_kv.py.
//
// The number of tokens lies on the device, so that a CUDA graph can hold the launch. The attention of the same pass
// still reads the block from the ring; codes written here are for the next one.
//
// Constants: HEAD_DIM (64 or 128), CODE (8, 4, 2 bits or 0 for FP8 E4M3), ELEMENT_BF16.
#include "codes.cuh"

constexpr int D = HEAD_DIM, BLOCK = 64, THREADS = 128, BITS = FP8 ? 8 : CODE, ROW_BYTES = D * BITS / 8;
constexpr int QUADS = D / 4;  // threads to a token's values, four channels each; 16 of them share a scale
constexpr float LEVELS = FP8 ? 448.f : float((1 << BITS) - 1);

// Beyond float16's range a key or value is cut to it, and stays finite: a kernel cannot refuse it as the CPU does.
__device__ __forceinline__ float to_half_and_back(float x, u16& half) {
    half = u16(half_pack(fminf(fmaxf(x, -65504.f), 65504.f), 0.f));
    return half_to_float(half);
}

// A range that holds lo … hi: float16 offset and scale, rounded outward.
struct Range {
    u16 scale_half, offset_half;
    float scale, offset;
    __device__ __forceinline__ Range(float lo, float hi) {
        offset = FP8 ? 0.f : to_half_and_back(lo - fabsf(lo) * 0x1p-10f, offset_half);
        float span = FP8 ? fmaxf(-lo, hi) : hi - offset;
        scale = to_half_and_back(fmaxf(span * (1.f / LEVELS) * (1.f + 0x1p-10f), 0x1p-14f), scale_half);
    }
    __device__ __forceinline__ u32 code(float x) const {
        if (FP8) return e4m3_pack(x / scale, 0.f);
        return u32(fminf(fmaxf(rintf((x - offset) / scale), 0.f), LEVELS));
    }
};

// keys, values: the new tokens (batch, kv_heads, count, D) by strides. Ring (batch, kv_heads, ring, D), codes and scales
// as in attention.cu. Grid: (kv_heads, batch, 2), the last for keys and values.
extern "C" __global__ void __launch_bounds__(THREADS)
    append(const u16* keys, const u16* values, u16* recent_keys, u16* recent_values, u8* key_codes, u16* key_scale,
           u16* key_offset, u8* value_codes, u16* value_scale, u16* value_offset, const int* before, int count,
           int capacity, int ring, int residual_length, int batch_stride, int head_stride, int token_stride,
           int value_batch_stride, int value_head_stride, int value_token_stride) {
    let_next_kernel_start();
    wait_for_earlier_kernels();
    const bool is_key = blockIdx.z == 0;
    const int pair = blockIdx.y * gridDim.x + blockIdx.x, start = *before;
    if (start < 0 || start + count > capacity) return;  // full: nothing is written beyond what is allocated
    const u16* from = is_key
                          ? keys + size_t(blockIdx.y) * batch_stride + size_t(blockIdx.x) * head_stride
                          : values + size_t(blockIdx.y) * value_batch_stride + size_t(blockIdx.x) * value_head_stride;
    u16* recent = (is_key ? recent_keys : recent_values) + size_t(pair) * ring * D;
    for (int i = threadIdx.x; i < count * D; i += THREADS)
        recent[(start + i / D) % ring * D + i % D] =
            from[size_t(i / D) * (is_key ? token_stride : value_token_stride) + i % D];
    __syncthreads();

    for (int block = max(start - residual_length, 0) / BLOCK; block < max(start + count - residual_length, 0) / BLOCK; block++) {
        const u16* x = recent + block * BLOCK % ring * D;  // a ring is a multiple of a block, so none is cut
        const size_t token = size_t(pair) * capacity + block * BLOCK;
        if (is_key) {
            const int d = threadIdx.x;
            if (d >= D) continue;
            float lo = to_float(x[d]), hi = lo;
            for (int i = 1; i < BLOCK; i++) {
                float v = to_float(x[i * D + d]);
                lo = fminf(lo, v), hi = fmaxf(hi, v);
            }
            const Range range(lo, hi);
            const size_t at = token / BLOCK * D + d;
            key_scale[at] = range.scale_half;
            if (!FP8) key_offset[at] = range.offset_half;
            for (int i = 0; i < BLOCK; i++) {
                u32 code = range.code(to_float(x[i * D + d]));
                if (BITS <= 4) code |= __shfl_down_sync(~0u, code, 1) << BITS;
                if (BITS == 2) code |= __shfl_down_sync(~0u, code, 2) << 4;
                if (d % (8 / BITS) == 0) key_codes[(token + i) * ROW_BYTES + d * BITS / 8] = u8(code);
            }
        } else {
            const int quad = threadIdx.x % QUADS;
            for (int i = threadIdx.x / QUADS; i < BLOCK; i += THREADS / QUADS) {
                const uint2 w = *(const uint2*)(x + i * D + 4 * quad);
                const float v[4] = {to_float(u16(w.x)), to_float(u16(w.x >> 16)), to_float(u16(w.y)),
                                    to_float(u16(w.y >> 16))};
                float lo = fminf(fminf(v[0], v[1]), fminf(v[2], v[3])),
                      hi = fmaxf(fmaxf(v[0], v[1]), fmaxf(v[2], v[3]));
#pragma unroll
                for (int j = 8; j; j /= 2) {
                    lo = fminf(lo, __shfl_xor_sync(~0u, lo, j));
                    hi = fmaxf(hi, __shfl_xor_sync(~0u, hi, j));
                }
                const Range range(lo, hi);
                if (quad % 16 == 0) {
                    const size_t at = (token + i) * (D / 64) + quad / 16;
                    value_scale[at] = range.scale_half;
                    if (!FP8) value_offset[at] = range.offset_half;
                }
                u32 code = 0;
#pragma unroll
                for (int j = 0; j < 4; j++) code |= range.code(v[j]) << (j * BITS);
                u8* to = value_codes + (token + i) * ROW_BYTES + quad * BITS / 2;
                if (BITS == 8) *(u32*)to = code;
                else if (BITS == 4)
                    *(u16*)to = u16(code);
                else
                    *to = u8(code);
            }
        }
    }
}
