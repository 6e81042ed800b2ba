// Attention of a few query rows over a quantized KV cache, read as packed codes: one token's step of generation.
//
// The context is split over CTAs and warps, each with its own running maximum, sum and output (flash decoding, Dao et
// al. 2023); `attention_combine` joins them. A warp takes blocks of 64 tokens, in four steps of 16:
//
//   scores   S (rows × tokens) = q·Kᵀ    A = q times the block's key scales, B = key codes
//   output   Oᵀ (d × rows)    += Vᵀ·Pᵀ   A = value codes times their scales,  B = probabilities
//
// The accumulators of the first product lie in registers exactly as the second product wants its B operand, so that
// probabilities never leave the thread. Tokens and channels may come in any order as long as both sides agree; the
// order here gives every thread whole vectors of the packed rows, with no shuffle and no shared memory:
//
//   * thread (g, t) = (lane / 4, lane % 4) loads, as a key's B operand, part t of the row of token 16(g/2) + g%2 + 2i
//   * and, as a value's A operand, part g of the rows of tokens 16t + 4j … 16t + 4j + 3.
//
// An integer code u becomes the half 1024 + u by setting bits (0x6400 | u), or 1024 + 2^r·u when it stays r bits up.
// The key side subtracts 1024 through the sum of the scaled q, the value side in its multiply:
// (1024 + u)·s − 1024·s rounds once.
//
// Compiled once per variant. HEAD_DIM: 64 or 128. CODE: 8, 4, 2 (bits) or 0 (FP8 E4M3). ELEMENT_BF16: 1 if q
// and recent tokens are bfloat16, 0 if they are half; scales are halves. ROW_TILES: 1 for up to 8 query rows of a key
// head, 2 for up to 16.
#include "halves.cuh"

constexpr int D = HEAD_DIM, WARPS = 4, BLOCK = 64, STEPS = 4, ROWS = 8 * ROW_TILES;
constexpr bool FP8 = CODE == 0;
constexpr int BITS = FP8 ? 8 : CODE;
constexpr int ROW_BYTES = D * BITS / 8;
constexpr int K_BYTES = ROW_BYTES / 4, K_WORDS = K_BYTES / 4;                    // a thread's part of a key
constexpr int K_PIECE = K_BYTES < 16 ? K_BYTES : 16;                             // as wide as one load
constexpr int V_BYTES = ROW_BYTES / 8, V_WORDS = V_BYTES < 4 ? 1 : V_BYTES / 4;  // and of a value
constexpr int PAIRS = D / 8, TILES = D / 16;  // key channels two by two; value channels 16
constexpr int WORD_CODES = 32 / BITS, HALF_WORD = WORD_CODES / 2, PER_BYTE = 8 / BITS;
constexpr int AHEAD = 2;                                                   // buffers of one step; they divide STEPS
constexpr int SCALE_BYTES = 4 * D * 2;                                     // key scale, offset, value scale, offset
constexpr int Q_STRIDE = D + 8;                                            // padded against bank conflicts
constexpr float NEVER = -1e30f;                                            // below every score
constexpr float MASKED = -1e38f;                                           // and that of a hidden token below this

// CTAs to a multiprocessor, without spilling.
#if __CUDA_ARCH__ >= 1000
constexpr int RESIDENT = ROW_TILES == 1 && D == 64 ? 3 : 2;
#else
constexpr int RESIDENT = ROW_TILES == 1 && (D == 64 || BITS < 8) ? 3 : 2;
#endif

typedef u32 SharedAddress;

struct Shared {
    union {
        struct {
            u16 q[ROWS * Q_STRIDE], q_half[ROWS * Q_STRIDE];
            u8 scales[WARPS][2][SCALE_BYTES];
        };
        float out[WARPS][ROWS][D + 4];
    };
    float maximum[WARPS][ROWS], sum[WARPS][ROWS];
    int last[ROWS];  // the newest position that each row sees
};

// ------------------------------------------------------------------------------------------------- codes to halves
// Pair i of a thread's key codes: 8-bit codes lie side by side, narrower ones half a word apart.
template <int I>
__device__ __forceinline__ u32 key_pair(const u32 (&row)[K_WORDS]) {
    u32 word = row[I / HALF_WORD];
    if constexpr (FP8) return e4m3_to_halves(I % 2 ? word >> 16 : word);
    else if constexpr (BITS == 8)
        return __byte_perm(word, HALF_MAGIC, I % 2 ? 0x5352 : 0x5150);
    else {
        constexpr int j = I % HALF_WORD, r = j % PER_BYTE * BITS;
        return and_or(j / PER_BYTE ? word >> 8 : word, ((1u << BITS) - 1) * 0x00010001u << r, HALF_MAGIC);
    }
}

// The same pair of something that is 16 bits wide: q, a scale, an offset. `own` holds CHUNK words of this thread's
// channels in order, a whole number of 16-byte vectors and of code words.
constexpr int CHUNK = BITS == 2 ? 8 : 4;
template <int I>
__device__ __forceinline__ u32 wide_pair(const u32 (&own)[CHUNK]) {
    if constexpr (BITS == 8) return own[I];
    else {
        constexpr int first = I / HALF_WORD * WORD_CODES + I % HALF_WORD, second = first + HALF_WORD;
        return __byte_perm(own[first / 2], own[second / 2], I % 2 ? 0x7632 : 0x5410);
    }
}

// Bits by which pair i (or value channel i) stays up in its half.
template <int I>
__device__ __forceinline__ constexpr int raised() {
    return BITS == 8 ? 0 : I % HALF_WORD % PER_BYTE * BITS;
}

// Value channel e (of this thread's D / 8) of two tokens, as halves with their magic.
template <int E>
__device__ __forceinline__ u32 value_pair(const u32 (&a)[V_WORDS], const u32 (&b)[V_WORDS]) {
    constexpr int w = E / WORD_CODES, i = E % WORD_CODES;
    if constexpr (BITS == 8) {
        u32 both = __byte_perm(a[w], b[w], i / 2 ? 0x7362 : 0x5140);
        if constexpr (FP8) return e4m3_to_halves(i % 2 ? both >> 16 : both);
        else
            return __byte_perm(both, HALF_MAGIC, i % 2 ? 0x5352 : 0x5150);
    } else {
        constexpr int j = i % HALF_WORD, r = j % PER_BYTE * BITS;
        u32 both = __byte_perm(a[w], b[w], i / HALF_WORD ? 0x7632 : 0x5410);
        return and_or(j / PER_BYTE ? both >> 8 : both, ((1u << BITS) - 1) * 0x00010001u << r, HALF_MAGIC);
    }
}

// -------------------------------------------------------------------------------------------------------- the state
struct State {
    float out[ROW_TILES][TILES][4];        // rows 2t, 2t + 1 of each tile of 8; channels 2m, 2m + 1 of the thread's own
    float shift[ROW_TILES][4];             // what value offsets add to each of them
    float top[ROW_TILES], sum[ROW_TILES];  // of row g: largest score so far; sum over this thread's tokens
};

// Scores (rows g and g + 8; tokens 0, 1 of tile 0 and of tile 1) to probabilities, in place; the output is rescaled
// when a row's maximum has grown, which soon stops happening.
__device__ __forceinline__ void soften(State& s, float (&c)[2][4], float log2_scale) {
    bool grown = false;
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++)
        grown |= fmaxf(fmaxf(c[0][2 * n], c[0][2 * n + 1]), fmaxf(c[1][2 * n], c[1][2 * n + 1])) > s.top[n];
    if (__any_sync(~0u, grown)) {
        int t = threadIdx.x % 4;
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++) {
            float top = fmaxf(fmaxf(c[0][2 * n], c[0][2 * n + 1]), fmaxf(c[1][2 * n], c[1][2 * n + 1]));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
            top = fmaxf(fmaxf(top, __shfl_xor_sync(~0u, top, 2)), s.top[n]);
            float shrink = exp2_fast((s.top[n] - top) * log2_scale);
            s.top[n] = top;
            s.sum[n] *= shrink;
            float even = __shfl_sync(~0u, shrink, 8 * t), odd = __shfl_sync(~0u, shrink, 8 * t + 4);
#pragma unroll
            for (int m = 0; m < TILES; m++) {
                s.out[n][m][0] *= even, s.out[n][m][1] *= odd;
                s.out[n][m][2] *= even, s.out[n][m][3] *= odd;
            }
            s.shift[n][0] *= even, s.shift[n][1] *= odd;
        }
    }
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) {
        float base = s.top[n] * log2_scale;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float& p = c[i / 2][2 * n + i % 2];
            p = exp2_fast(fmaf(p, log2_scale, -base));
            s.sum[n] += p;
        }
    }
}

// Hide tokens from rows g and g + 8: padding before `start`, and what comes after the row's own token. `position` is
// that of the first of the thread's four tokens.
__device__ __forceinline__ void hide(float (&c)[2][4], int position, int start, const int* last) {
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) {
        int newest = last[8 * n + threadIdx.x % 32 / 4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (position + i < start || position + i > newest) c[i / 2][2 * n + i % 2] = MASKED;
    }
}

// ------------------------------------------------------------------------------------------------- one step of tokens
// `keys` and `values` point to the block's own; step 4 … 7 is one of the block that this warp takes next.
__device__ __forceinline__ void load_step(u32 (&k)[2][K_WORDS], u32 (&v)[4][V_WORDS], const u8* keys, const u8* values,
                                          int step) {
    const int at = (step / STEPS * WARPS * BLOCK + step % STEPS * 4) * ROW_BYTES;
#pragma unroll
    for (int tile = 0; tile < 2; tile++)
#pragma unroll
        for (int p = 0; p < K_BYTES / K_PIECE; p++)
            load_once<K_PIECE>(&k[tile][p * K_PIECE / 4], keys + at + 2 * tile * ROW_BYTES + p * 4 * K_PIECE);
#pragma unroll
    for (int e = 0; e < 4; e++) load_once<V_BYTES>(v[e], values + at + e * ROW_BYTES);
}

__device__ __forceinline__ void key_products(float (&c)[4], const u32 (&qs)[ROW_TILES][PAIRS],
                                             const u32 (&row)[K_WORDS]) {
    unroll<PAIRS / 2>([&](auto k) {
        half_multiply_add(c, qs[0][2 * k], ROW_TILES > 1 ? qs[ROW_TILES - 1][2 * k] : 0, qs[0][2 * k + 1],
                          ROW_TILES > 1 ? qs[ROW_TILES - 1][2 * k + 1] : 0, key_pair<2 * k>(row),
                          key_pair<2 * k + 1>(row));
    });
}

template <int E>
__device__ __forceinline__ u32 value_half(const u32 (&a)[V_WORDS], const u32 (&b)[V_WORDS], u32 scale) {
    u32 pair = value_pair<E>(a, b);
    if constexpr (FP8) return half_multiply(pair, scale);
    else {
        u32 s = raised<E>() ? half_multiply(scale, half_power(-raised<E>())) : scale;
        return half_fma(pair, s, half_multiply(s, half_power(10) | 0x80008000u));
    }
}

__device__ __forceinline__ void value_products(State& s, const u32 (&v)[4][V_WORDS], u32 first, u32 second,
                                               const u32 (&p)[ROW_TILES][2]) {
    unroll<TILES>([&](auto m) {  // channels 2m and 2m + 1 of every thread
        u32 a0 = value_half<2 * m>(v[0], v[1], first), a1 = value_half<2 * m + 1>(v[0], v[1], first);
        u32 a2 = value_half<2 * m>(v[2], v[3], second), a3 = value_half<2 * m + 1>(v[2], v[3], second);
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++) half_multiply_add(s.out[n][m], a0, a1, a2, a3, p[n][0], p[n][1]);
    });
}

// Scale or offset of this thread's group of channels, for two tokens side by side: 64 channels share one.
__device__ __forceinline__ void value_scales(SharedAddress from, int token, int group, u32& first, u32& second) {
    if constexpr (D == 64) {
        first = load_shared_4(from + 2 * token), second = load_shared_4(from + 2 * token + 4);
    } else {
        uint4 w = load_shared_16(from + 4 * token);
        u32 pick = group ? 0x7632 : 0x5410;
        first = __byte_perm(w.x, w.y, pick), second = __byte_perm(w.z, w.w, pick);
    }
}

// Words i · CHUNK … of the channels of a row that belong to this thread's key codes.
__device__ __forceinline__ void own_channels(u32 (&own)[CHUNK], SharedAddress row, int i, int t) {
    constexpr int PIECE = K_PIECE * PER_BYTE / 2;  // words beside one load of codes
#pragma unroll
    for (int j = i * CHUNK; j < (i + 1) * CHUNK; j += 4)
        *(uint4*)&own[j % CHUNK] = load_shared_16(row + ((j / PIECE * 4 + t) * PIECE + j % PIECE) * 4);
}

// A block's own part of the work: qs, q times the key scales, and what every score of the block begins with,
// Σ q·offset − 1024·Σ qs.
__device__ __forceinline__ void begin_block(u32 (&qs)[ROW_TILES][PAIRS], float (&start)[4], SharedAddress q,
                                            SharedAddress scales, int g, int t) {
    constexpr u32 MINUS = half_power(10) | 0x80008000u;
    float magic[4] = {};
#pragma unroll
    for (int i = 0; i < 4; i++) start[i] = 0;
    unroll<PAIRS / CHUNK>([&](auto i) {
        u32 own[2][CHUNK], scale[CHUNK], offset[CHUNK];
        own_channels(scale, scales, i, t);
        if constexpr (!FP8) own_channels(offset, scales + 2 * D, i, t);
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++) own_channels(own[n], q + (8 * n + g) * Q_STRIDE * 2, i, t);
        unroll<CHUNK>([&](auto j) {
#pragma unroll
            for (int n = 0; n < ROW_TILES; n++) {
                u32& to = qs[n][i * CHUNK + j];
                to = half_multiply(wide_pair<j>(own[n]), wide_pair<j>(scale));
                if constexpr (raised<j>() > 0) to = half_multiply(to, half_power(-raised<j>()));
            }
        });
        if constexpr (!FP8)
            unroll<CHUNK / 2>([&](auto j) {
                constexpr int a = 2 * j, b = 2 * j + 1;
                u32 q1 = ROW_TILES > 1 ? wide_pair<a>(own[1]) : 0, q3 = ROW_TILES > 1 ? wide_pair<b>(own[1]) : 0;
                half_multiply_add(start, wide_pair<a>(own[0]), q1, wide_pair<b>(own[0]), q3, wide_pair<a>(offset),
                                  wide_pair<b>(offset));
                u32 s1 = ROW_TILES > 1 ? qs[ROW_TILES - 1][i * CHUNK + a] : 0,
                    s3 = ROW_TILES > 1 ? qs[ROW_TILES - 1][i * CHUNK + b] : 0;
                half_multiply_add(magic, qs[0][i * CHUNK + a], s1, qs[0][i * CHUNK + b], s3, MINUS, MINUS);
            });
    });
#pragma unroll
    for (int i = 0; i < 4; i++) start[i] += magic[i];
}

// ------------------------------------------------------------------------------------- tokens kept in full precision
__device__ __forceinline__ void recent_step(State& s, const u16* q, const u16* keys, const u16* values, int step,
                                            int count, int first, int capacity, int position, int start,
                                            const int* last, float log2_scale) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float c[2][4] = {};
#pragma unroll
    for (int tile = 0; tile < 2; tile++) {
        int token = min(16 * step + 4 * (g / 2) + 2 * tile + g % 2, count - 1);
        const uint4* row = (const uint4*)(keys + (size_t)((first + token) % capacity) * D) + t;
#pragma unroll
        for (int p = 0; p < D / 32; p++) {
            uint4 k = row[4 * p], a = *((const uint4*)(q + g * Q_STRIDE) + 4 * p + t), b = {0, 0, 0, 0};
            if constexpr (ROW_TILES > 1) b = *((const uint4*)(q + (g + 8) * Q_STRIDE) + 4 * p + t);
            multiply_add(c[tile], {a.x, b.x, a.y, b.y}, k.x, k.y);
            multiply_add(c[tile], {a.z, b.z, a.w, b.w}, k.z, k.w);
        }
    }
    int token = 16 * step + 4 * t;
    hide(c, position + token, start, last);
    u32 v[4][D / 16];
#pragma unroll
    for (int e = 0; e < 4; e++) {
        int slot = (first + min(token + e, count - 1)) % capacity;
#pragma unroll
        for (int i = 0; i < D / 64; i++)
            *(uint4*)&v[e][4 * i] = *((const uint4*)(values + (size_t)slot * D + g * (D / 8)) + i);
    }
    soften(s, c, log2_scale);
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) {
        u32 p0 = pack(c[0][2 * n], c[0][2 * n + 1]), p1 = pack(c[1][2 * n], c[1][2 * n + 1]);
#pragma unroll
        for (int m = 0; m < TILES; m++)
            multiply_add(s.out[n][m],
                         {__byte_perm(v[0][m], v[1][m], 0x5410), __byte_perm(v[0][m], v[1][m], 0x7632),
                          __byte_perm(v[2][m], v[3][m], 0x5410), __byte_perm(v[2][m], v[3][m], 0x7632)},
                         p0, p1);
    }
}

// ------------------------------------------------------------------------------------------------------- the kernels
// q (batch, heads, q_len, D) by strides. Codes (batch, kv_heads, capacity, ROW_BYTES), scales beside them: keys' per
// block and channel, values' per token and 64 channels. recent_*: (batch, kv_heads, recent_capacity, D). How many
// tokens are quantized and how many recent is given either as two numbers, or by `before`, the tokens held before these q_len
// came, and `residual_length`: then the recent tokens lie in a ring, the one at position p in slot p % recent_capacity.
// starts: (batch) first position that is no padding, or null. group: query heads to a key head. tiles: of ROWS rows
// each, to hold group × q_len. Grid: (kv_heads, batch × tiles, splits).
// partial (batch, q_len, heads, splits, D); sums the same with (maximum, sum) in the place of D.
extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT)
    attention_decode(const u16* q, const u8* key_codes, const u16* key_scale, const u16* key_offset,
                     const u8* value_codes, const u16* value_scale, const u16* value_offset, const u16* recent_keys,
                     const u16* recent_values, const int* before, const int* starts, float* partial, float2* sums,
                     int quantized, int recent, int group, int tiles, int q_len, int capacity, int recent_capacity,
                     int residual_length, int q_batch_stride, int q_head_stride, int q_token_stride, float log2_scale) {
    __shared__ __align__(16) Shared shared;
    let_next_kernel_start();
    wait_for_earlier_kernels();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int kv_head = blockIdx.x, batch = blockIdx.y / tiles, row0 = blockIdx.y % tiles * ROWS;
    const int pair = batch * gridDim.x + kv_head, rows = group * q_len;
    const int split = blockIdx.z, splits = gridDim.z;
    if (before) {  // never beyond what is allocated, whatever the number says
        quantized = min(max(*before - residual_length, 0), capacity) / BLOCK * BLOCK;
        recent = min(*before + q_len - quantized, recent_capacity);
    }
    const int total = quantized + recent;

    const int padding = starts ? starts[batch] : 0;
    if (threadIdx.x < ROWS)
        shared.last[threadIdx.x] = min(total - q_len + (row0 + (int)threadIdx.x) / group, total - 1);
    const int seen = total - q_len + row0 / group;  // all rows of this CTA see the tokens up to here

    const int blocks = quantized / BLOCK, skipped = padding / BLOCK;  // blocks of padding are not read
    const int share = (max(blocks - skipped, 0) + splits - 1) / splits;
    const int begin = skipped + split * share, end = min(begin + share, blocks);
    int block = begin + warp;

    const size_t token0 = (size_t)pair * capacity + block * BLOCK;
    const u8* keys = key_codes + (token0 + 16 * (g / 2) + g % 2) * ROW_BYTES + t * K_PIECE;
    const u8* values = value_codes + (token0 + 16 * t) * ROW_BYTES + g * V_BYTES;
    auto fetch_scales = [&](int of, int buffer) {  // four rows of 2 D bytes, whose places are the same in each array
        size_t at = ((size_t)pair * (capacity / BLOCK) + of) * D;
#pragma unroll
        for (int i = 0; i < SCALE_BYTES / 512; i++) {
            int chunk = i * 32 + lane, which = chunk / (D / 8), inner = chunk % (D / 8) * 8;
            const u16* from = which == 0   ? key_scale
                              : which == 1 ? key_offset
                              : which == 2 ? value_scale
                                           : value_offset;
            if (!FP8 || which % 2 == 0)
                copy_16(shared_address(&shared.scales[warp][buffer][chunk * 16]), from + at + inner);
        }
        close_batch();
    };

    u32 k[AHEAD][2][K_WORDS], v[AHEAD][4][V_WORDS];
    if (block < end) {
        fetch_scales(block, 0);
#pragma unroll
        for (int i = 0; i < AHEAD - 1; i++) load_step(k[i], v[i], keys, values, i);
    }
    for (int i = threadIdx.x; i < ROWS * (D / 8); i += WARPS * 32) {
        int row = i / (D / 8), at = i % (D / 8) * 8, r = row0 + row;
        uint4 piece = {0, 0, 0, 0};
        if (r < rows)
            piece = *(const uint4*)(q + (size_t)batch * q_batch_stride +
                                    (size_t)(kv_head * group + r % group) * q_head_stride +
                                    (size_t)(r / group) * q_token_stride + at);
        *(uint4*)&shared.q[row * Q_STRIDE + at] = piece;
        *(uint4*)&shared.q_half[row * Q_STRIDE + at] =
            make_uint4(to_halves(piece.x), to_halves(piece.y), to_halves(piece.z), to_halves(piece.w));
    }
    __syncthreads();

    State s = {};
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) s.top[n] = NEVER;

    // Recent tokens, in steps of 16, go first to the warps that have the fewest blocks: the last of each split.
    const u16* new_keys = recent_keys + (size_t)pair * recent_capacity * D;
    const u16* new_values = recent_values + (size_t)pair * recent_capacity * D;
    for (int step = splits - 1 - split + splits * (WARPS - 1 - warp); 16 * step < recent; step += splits * WARPS)
        recent_step(s, shared.q, new_keys, new_values, step, recent, before ? quantized % recent_capacity : 0,
                    recent_capacity, quantized, padding, shared.last, log2_scale);

    for (int buffer = 0; block < end; block += WARPS, buffer ^= 1) {
        const SharedAddress scales = shared_address(shared.scales[warp][buffer]);
        wait_for_batches<0>();
        __syncwarp();
        u32 qs[ROW_TILES][PAIRS];
        float start[4];
        begin_block(qs, start, shared_address(shared.q_half), scales, g, t);
        const int next = block + WARPS;
        if (next < end) fetch_scales(next, buffer ^ 1);
        unroll<STEPS>([&](auto j) {
            constexpr int later = j + AHEAD - 1, into = later % AHEAD;
            if (later < STEPS || next < end) load_step(k[into], v[into], keys, values, later);
            float c[2][4];
#pragma unroll
            for (int tile = 0; tile < 2; tile++) {
#pragma unroll
                for (int i = 0; i < 4; i++) c[tile][i] = start[i];
                key_products(c[tile], qs, k[j % AHEAD][tile]);
            }
            if (block * BLOCK < padding || block * BLOCK + BLOCK - 1 > seen)
                hide(c, block * BLOCK + 16 * t + 4 * j, padding, shared.last);
            soften(s, c, log2_scale);
            u32 p[ROW_TILES][2], first, second;
#pragma unroll
            for (int n = 0; n < ROW_TILES; n++)
                p[n][0] = half_pack(c[0][2 * n], c[0][2 * n + 1]), p[n][1] = half_pack(c[1][2 * n], c[1][2 * n + 1]);
            if constexpr (!FP8) {
                value_scales(scales + 6 * D, 16 * t + 4 * j, g / 4, first, second);
#pragma unroll
                for (int n = 0; n < ROW_TILES; n++)
                    half_multiply_add(s.shift[n], first, 0, second, 0, p[n][0], p[n][1]);
            }
            value_scales(scales + 4 * D, 16 * t + 4 * j, g / 4, first, second);
            value_products(s, v[j % AHEAD], first, second, p);
        });
        keys += WARPS * BLOCK * ROW_BYTES, values += WARPS * BLOCK * ROW_BYTES;
    }

    // Join the four warps, then leave this split's share for `attention_combine`.
    __syncthreads();
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) {
        s.sum[n] += __shfl_xor_sync(~0u, s.sum[n], 1);
        s.sum[n] += __shfl_xor_sync(~0u, s.sum[n], 2);
        if (t == 0) shared.maximum[warp][8 * n + g] = s.top[n], shared.sum[warp][8 * n + g] = s.sum[n];
#pragma unroll
        for (int m = 0; m < TILES; m++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                *(float2*)&shared.out[warp][8 * n + 2 * t + i][g * (D / 8) + 2 * m] =
                    make_float2(s.out[n][m][i] + s.shift[n][i], s.out[n][m][2 + i] + s.shift[n][i]);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < min(ROWS, rows - row0) * (D / 4); i += WARPS * 32) {
        int row = i / (D / 4), at = i % (D / 4) * 4, r = row0 + row;
        float top = NEVER, sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) top = fmaxf(top, shared.maximum[w][row]);
        float4 out = {0, 0, 0, 0};
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float f = exp2_fast((shared.maximum[w][row] - top) * log2_scale);
            float4 x = *(const float4*)&shared.out[w][row][at];
            sum += f * shared.sum[w][row];
            out.x += f * x.x, out.y += f * x.y, out.z += f * x.z, out.w += f * x.w;
        }
        size_t token = (size_t)batch * q_len + r / group;
        size_t place = ((token * gridDim.x + kv_head) * group + r % group) * gridDim.z + split;
        *(float4*)(partial + place * D + at) = out;
        if (at == 0) sums[place] = make_float2(top * log2_scale, sum);
    }
}

// One CTA a query row: weigh the splits by their maximum and sum. out (batch, q_len, heads, D).
extern "C" __global__ void __launch_bounds__(WARPS * 32)
    attention_combine(const float* partial, const float2* sums, u16* out, int splits) {
    constexpr int LANES = D / 4, TEAMS = WARPS * 32 / LANES;  // a team of threads holds a whole row
    __shared__ float4 outs[TEAMS][LANES];
    __shared__ float tops[TEAMS], team_sums[TEAMS];
    wait_for_earlier_kernels();
    let_next_kernel_start();
    const int team = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const float4* rows = (const float4*)(partial + (size_t)blockIdx.x * splits * D) + lane;
    const float2* of = sums + (size_t)blockIdx.x * splits;
    float top = NEVER, sum = 0;
    float4 o = {0, 0, 0, 0};
#pragma unroll 4
    for (int i = team; i < splits; i += TEAMS) {  // no load waits for another
        float2 w = of[i];
        float4 x = rows[(size_t)i * LANES];
        float higher = fmaxf(top, w.x), keep = exp2_fast(top - higher), f = exp2_fast(w.x - higher);
        top = higher;
        sum = keep * sum + f * w.y;
        o.x = keep * o.x + f * x.x, o.y = keep * o.y + f * x.y, o.z = keep * o.z + f * x.z, o.w = keep * o.w + f * x.w;
    }
    outs[team][lane] = o;
    if (lane == 0) tops[team] = top, team_sums[team] = sum;
    __syncthreads();
    if (threadIdx.x < LANES) {
        float highest = NEVER;
#pragma unroll
        for (int i = 0; i < TEAMS; i++) highest = fmaxf(highest, tops[i]);
        o = {0, 0, 0, 0}, sum = 0;
#pragma unroll
        for (int i = 0; i < TEAMS; i++) {
            float4 x = outs[i][lane];
            float f = exp2_fast(tops[i] - highest);
            o.x += f * x.x, o.y += f * x.y, o.z += f * x.z, o.w += f * x.w;
            sum += f * team_sums[i];
        }
        float f = sum > 0 ? 1 / sum : 0;  // a row that sees no token gives zeros
        *(uint2*)(out + (size_t)blockIdx.x * D + 4 * lane) = make_uint2(pack(o.x * f, o.y * f), pack(o.z * f, o.w * f));
    }
}
