// What stands between the matrix products of one decoding step: norms, rotary embedding, attention over a 16-bit cache
// of fixed size, gating. Each moves kilobytes (attention: the cache, once) and costs a launch, so each does all it can.
// Where the newest token stands is read from memory, so that a recorded graph serves every step.
//
// Constants: ELEMENT_BF16; WIDTH (of the residual stream) for the norm; HEAD_DIM, GROUP_HEADS (query heads that a block
// serves, which share a key head) and CLUSTER for attention.
#include "device.cuh"

// Eight 16-bit floats of one 16-byte load.
struct Eight {
    float v[8];
};

__device__ __forceinline__ Eight unpack(const uint4& raw) {
    const u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
    Eight e;
#pragma unroll
    for (int i = 0; i < 4; i++) e.v[2 * i] = to_float(words[i] & 0xffff), e.v[2 * i + 1] = to_float(words[i] >> 16);
    return e;
}

__device__ __forceinline__ uint4 repack(const Eight& e) {
    return make_uint4(pack(e.v[0], e.v[1]), pack(e.v[2], e.v[3]), pack(e.v[4], e.v[5]), pack(e.v[6], e.v[7]));
}

__device__ __forceinline__ float rounded(float f) { return to_float(to_element(f)); }

// ---- residual += change; y = weight · residual / rms(residual). One block a row. ---------------------------------------
#ifdef WIDTH
constexpr int NORM_THREADS = WIDTH / 8 < 512 ? (WIDTH / 8 + 31) / 32 * 32 : 512;
constexpr int CHUNKS = (WIDTH / 8 + NORM_THREADS - 1) / NORM_THREADS;                  // of eight values, to a thread

extern "C" __global__ void __launch_bounds__(NORM_THREADS)
add_rms_norm(uint4* __restrict__ residual, const uint4* __restrict__ change, const uint4* __restrict__ weight,
             uint4* __restrict__ y, float epsilon) {
    __shared__ float sums[NORM_THREADS / WARP];
    let_next_kernel_start();
    Eight gain[CHUNKS], x[CHUNKS];
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        const int at = threadIdx.x + c * NORM_THREADS;
        if (at < WIDTH / 8) gain[c] = unpack(weight[at]);                              // never changes: before the wait
    }
    wait_for_earlier_kernels();
    const size_t row = size_t(blockIdx.x) * (WIDTH / 8);
    float sum = 0.f;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        const int at = threadIdx.x + c * NORM_THREADS;
        if (at >= WIDTH / 8) continue;
        x[c] = unpack(residual[row + at]);
        if (change != nullptr) {
            const Eight more = unpack(change[row + at]);
#pragma unroll
            for (int i = 0; i < 8; i++) x[c].v[i] = rounded(x[c].v[i] + more.v[i]);
            residual[row + at] = repack(x[c]);
        }
#pragma unroll
        for (int i = 0; i < 8; i++) sum += x[c].v[i] * x[c].v[i];
    }
#pragma unroll
    for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
    if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = sum;
    __syncthreads();
    float all = 0.f;
#pragma unroll
    for (int w = 0; w < NORM_THREADS / WARP; w++) all += sums[w];
    const float factor = rsqrtf(all / WIDTH + epsilon);
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        const int at = threadIdx.x + c * NORM_THREADS;
        if (at >= WIDTH / 8) continue;
#pragma unroll
        for (int i = 0; i < 8; i++) x[c].v[i] = gain[c].v[i] * rounded(x[c].v[i] * factor);
        y[row + at] = repack(x[c]);
    }
}
#endif

// ---- silu(gate) · up, eight values a thread ---------------------------------------------------------------------------
extern "C" __global__ void __launch_bounds__(256)
silu_mul(const uint4* __restrict__ gate_up, uint4* __restrict__ y, int chunks, int all_chunks) {
    let_next_kernel_start();
    wait_for_earlier_kernels();
    const int i = blockIdx.x * 256 + threadIdx.x;
    if (i >= all_chunks) return;
    const int row = i / chunks, at = i - row * chunks;
    Eight gate = unpack(gate_up[size_t(row) * 2 * chunks + at]);
    const Eight up = unpack(gate_up[size_t(row) * 2 * chunks + chunks + at]);
#pragma unroll
    for (int j = 0; j < 8; j++) gate.v[j] = rounded(gate.v[j] / (1.f + __expf(-gate.v[j]))) * up.v[j];
    y[i] = repack(gate);
}

#ifdef HEAD_DIM
// ---- rotary embedding and the cache. One warp a head: first queries, then keys, then values. ----------------------------
extern "C" __global__ void __launch_bounds__(128)
rotate_and_append(const u16* __restrict__ qkv, const float* __restrict__ cosines, const float* __restrict__ sines,
                  const long long* __restrict__ position, u16* __restrict__ q, u16* __restrict__ keys,
                  u16* __restrict__ values, int batch, int heads, int kv_heads, int length) {
    constexpr int HALF = HEAD_DIM / 2;
    let_next_kernel_start();
    wait_for_earlier_kernels();
    const int all = heads + 2 * kv_heads, i = blockIdx.x * 4 + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (i >= batch * all) return;
    const int row = i / all, head = i - row * all;
    const size_t place = position[0];
    const u16* from = qkv + size_t(i) * HEAD_DIM;
    u16* to;
    if (head < heads) to = q + (size_t(row) * heads + head) * HEAD_DIM;
    else {
        const int kv = (head - heads) % kv_heads;
        to = (head < heads + kv_heads ? keys : values) + ((size_t(row) * kv_heads + kv) * length + place % length) * HEAD_DIM;
    }
    const bool turns = head < heads + kv_heads;
#pragma unroll
    for (int d = lane; d < HALF; d += WARP) {
        const float a = to_float(from[d]), b = to_float(from[d + HALF]);
        const float c = turns ? cosines[place * HALF + d] : 1.f, s = turns ? sines[place * HALF + d] : 0.f;
        to[d] = to_element(a * c - b * s);
        to[d + HALF] = to_element(b * c + a * s);
    }
}

// ---- attention of one token over keys and values (B, Hkv, length, D), up to and including its own place ------------------
//
// A block serves GROUP_HEADS query heads of one key head. LANES lanes share a token's row, 16 bytes each, so a warp reads
// several tokens at a time, UNROLL times ahead. Each set of lanes keeps its own maximum, sum and output (online softmax);
// they are joined over the warp, then the block, then the cluster, which has split the context.
#ifdef GROUP_HEADS
constexpr int LANES = HEAD_DIM / 8, TOKENS = WARP / LANES, WARPS = 4, UNROLL = GROUP_HEADS > 4 ? 2 : 4;
constexpr float NEVER = -1e30f;                                                        // below every score

// Two partial softmaxes become one.
__device__ __forceinline__ void merge(float& top, float& sum, float (&out)[8], float other_top, float other_sum,
                                      const float (&other)[8]) {
    const float highest = fmaxf(top, other_top);
    const float mine = exp2f(top - highest), theirs = exp2f(other_top - highest);
    top = highest, sum = sum * mine + other_sum * theirs;
#pragma unroll
    for (int i = 0; i < 8; i++) out[i] = out[i] * mine + other[i] * theirs;
}

struct Part {
    float top[GROUP_HEADS], sum[GROUP_HEADS];
    float out[GROUP_HEADS][HEAD_DIM];
};

extern "C" __global__ void __launch_bounds__(WARPS * WARP)
attend(const u16* __restrict__ q, const u16* __restrict__ keys, const u16* __restrict__ values,
       const long long* __restrict__ position, u16* __restrict__ y, int heads, int kv_heads, int length, float scale) {
    __shared__ Part parts[WARPS], joined;
    let_next_kernel_start();
    wait_for_earlier_kernels();
    const int rank = CLUSTER > 1 ? blockIdx.z : 0, row = blockIdx.y, first_head = blockIdx.x * GROUP_HEADS;
    const int kv = first_head / (heads / kv_heads);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, slot = lane / LANES, piece = lane % LANES;
    const int total = int(position[0]) + 1;

    float query[GROUP_HEADS][8], top[GROUP_HEADS], sum[GROUP_HEADS], out[GROUP_HEADS][8];
#pragma unroll
    for (int h = 0; h < GROUP_HEADS; h++) {
        const Eight e = unpack(reinterpret_cast<const uint4*>(q + (size_t(row) * heads + first_head + h) * HEAD_DIM)[piece]);
#pragma unroll
        for (int i = 0; i < 8; i++) query[h][i] = e.v[i] * scale, out[h][i] = 0.f;     // scale has log2(e) in it
        top[h] = NEVER, sum[h] = 0.f;
    }
    const size_t base = (size_t(row) * kv_heads + kv) * length * LANES + piece;
    const uint4* k_rows = reinterpret_cast<const uint4*>(keys) + base;
    const uint4* v_rows = reinterpret_cast<const uint4*>(values) + base;
    constexpr int STRIDE = WARPS * CLUSTER * TOKENS;
    for (int token = (rank * WARPS + warp) * TOKENS + slot; token - slot < total; token += STRIDE * UNROLL) {
        uint4 k[UNROLL], v[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const int at = min(token + u * STRIDE, total - 1);
            k[u] = k_rows[size_t(at) * LANES], v[u] = v_rows[size_t(at) * LANES];
        }
#pragma unroll
        for (int h = 0; h < GROUP_HEADS; h++) {
            float score[UNROLL], highest = top[h];
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                const Eight key = unpack(k[u]);
                float s = 0.f;
#pragma unroll
                for (int i = 0; i < 8; i++) s += query[h][i] * key.v[i];
#pragma unroll
                for (int o = LANES / 2; o; o >>= 1) s += __shfl_xor_sync(~0u, s, o);
                score[u] = token + u * STRIDE < total ? s : NEVER;
                highest = fmaxf(highest, score[u]);
            }
            const float keep = exp2f(top[h] - highest);
            top[h] = highest, sum[h] *= keep;
#pragma unroll
            for (int i = 0; i < 8; i++) out[h][i] *= keep;
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                const float p = score[u] == NEVER ? 0.f : exp2f(score[u] - highest);
                const Eight value = unpack(v[u]);
                sum[h] += p;
#pragma unroll
                for (int i = 0; i < 8; i++) out[h][i] += p * value.v[i];
            }
        }
    }
#pragma unroll
    for (int h = 0; h < GROUP_HEADS; h++) {
#pragma unroll
        for (int o = LANES; o < WARP; o <<= 1) {
            float other[8];
            const float other_top = __shfl_xor_sync(~0u, top[h], o), other_sum = __shfl_xor_sync(~0u, sum[h], o);
#pragma unroll
            for (int i = 0; i < 8; i++) other[i] = __shfl_xor_sync(~0u, out[h][i], o);
            merge(top[h], sum[h], out[h], other_top, other_sum, other);
        }
        if (slot == 0) {
            parts[warp].top[h] = top[h], parts[warp].sum[h] = sum[h];
#pragma unroll
            for (int i = 0; i < 8; i++) parts[warp].out[h][piece * 8 + i] = out[h][i];
        }
    }
    __syncthreads();
    // The block's four parts become one, and those of the cluster the result; each block finishes its share of it.
    for (int e = threadIdx.x; e < GROUP_HEADS * HEAD_DIM; e += WARPS * WARP) {
        const int h = e / HEAD_DIM, d = e % HEAD_DIM;
        float highest = NEVER, all = 0.f, out_sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) highest = fmaxf(highest, parts[w].top[h]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float weight = exp2f(parts[w].top[h] - highest);
            all += parts[w].sum[h] * weight, out_sum += parts[w].out[h][d] * weight;
        }
        joined.out[h][d] = out_sum;
        if (d == 0) joined.top[h] = highest, joined.sum[h] = all;
    }
    if (CLUSTER > 1) cluster_barrier();
    else __syncthreads();
    for (int e = threadIdx.x + rank * WARPS * WARP; e < GROUP_HEADS * HEAD_DIM; e += WARPS * WARP * CLUSTER) {
        const int h = e / HEAD_DIM, d = e % HEAD_DIM;
        float tops[CLUSTER], sums[CLUSTER], outs[CLUSTER], highest = NEVER, all = 0.f, out_sum = 0.f;
#pragma unroll
        for (int r = 0; r < CLUSTER; r++) {
            tops[r] = CLUSTER > 1 ? load_from_cluster(shared_address(&joined.top[h]), r) : joined.top[h];
            sums[r] = CLUSTER > 1 ? load_from_cluster(shared_address(&joined.sum[h]), r) : joined.sum[h];
            outs[r] = CLUSTER > 1 ? load_from_cluster(shared_address(&joined.out[h][d]), r) : joined.out[h][d];
            highest = fmaxf(highest, tops[r]);
        }
#pragma unroll
        for (int r = 0; r < CLUSTER; r++) {
            const float weight = exp2f(tops[r] - highest);
            all += sums[r] * weight, out_sum += outs[r] * weight;
        }
        y[(size_t(row) * heads + first_head + h) * HEAD_DIM + d] = to_element(out_sum / all);
    }
    if (CLUSTER > 1) cluster_barrier();                                                // no block leaves while it is read
}
#endif
#endif
