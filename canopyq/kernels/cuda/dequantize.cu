// W (n, k) in 16 bits or float32 from its fragments, for products that a library does. One warp writes a step: 16 rows by
// 128 columns, row by row through shared memory, so that a warp's stores lie side by side.
//
// Constants: ELEMENT_BF16, SCALE_BF16, BITS, GROUP, ASYMMETRIC, WIDE (write float32).
#include "fragments.cuh"

constexpr int WARPS = 8;
constexpr int PITCH = STEP + 4;                      // floats

extern "C" __global__ void __launch_bounds__(WARPS * WARP)
dequantize(const unsigned char* __restrict__ codes, const u32* __restrict__ scales, const u32* __restrict__ zeros,
           void* __restrict__ weight, int n, int k, int row_blocks, int steps, int groups) {
    __shared__ float values[WARPS][8][PITCH];        // 8 rows at a time
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    const long long at = (long long)blockIdx.x * WARPS + warp;
    const int block = int(at / steps), step = int(at % steps);
    wait_for_earlier_kernels();
    if (block >= row_blocks) return;
    uint4 pieces[PIECES];
#pragma unroll
    for (int p = 0; p < PIECES; p++)
        pieces[p] = reinterpret_cast<const uint4*>(codes + codes_at(block, step, steps) + p * PIECE_BYTES)[lane];
    float (&tile)[8][PITCH] = values[warp];
#pragma unroll
    for (int half = 0; half < 2; half++) {           // rows g, then rows g + 8
#pragma unroll
        for (int column = 0; column < STEP; column += 16) {
            const size_t meta = pairs_at(block, first_group(step) + column * STEP_GROUPS / STEP, groups) + g;
            const u32 s = scales[meta] >> (16 * half), z = ASYMMETRIC ? zeros[meta] >> (16 * half) : MIDDLE;
            const float scale = scale_to_float(s & 0xffff);
            u32 a[4];
            raw(a, pieces[column / PIECE_COLUMNS], column % PIECE_COLUMNS / 16);
#pragma unroll
            for (int i = 0; i < 2; i++) {            // columns 2t and 2t + 1, then 8 on
                const u32 pair = add2(a[half + 2 * i], offset_of(z & 0xffff));
                tile[g][column + 8 * i + 2 * t] = to_float(pair & 0xffff) * scale;
                tile[g][column + 8 * i + 2 * t + 1] = to_float(pair >> 16) * scale;
            }
        }
        __syncwarp();
        for (int row = 0; row < 8; row++) {
            const int out = block * BLOCK_ROWS + half * 8 + row, in = step * STEP + lane * 4;
            const float4 v = *reinterpret_cast<float4*>(&tile[row][lane * 4]);
            const float each[4] = {v.x, v.y, v.z, v.w};
            const size_t to = size_t(out) * k + in;
            if (out >= n) continue;
            if (k % 4 == 0 && in < k) {
                if (WIDE) reinterpret_cast<float4*>(weight)[to / 4] = v;
                else reinterpret_cast<uint2*>(weight)[to / 4] = make_uint2(pack(v.x, v.y), pack(v.z, v.w));
            } else {
                for (int i = 0; i < 4; i++)
                    if (in + i < k) {
                        if (WIDE) reinterpret_cast<float*>(weight)[to + i] = each[i];
                        else reinterpret_cast<u16*>(weight)[to + i] = to_element(each[i]);
                    }
            }
        }
        __syncwarp();
    }
}
