// CUDA for inference: products with weights that stay codes and levels, and their dequantization. Not here: quantization.
//
// Compiled at run time by kernels.py, without headers. lut_gemm.py has the layout, the torch twins and the checks. The tests
// build the same source for the host, where tests/host_cuda.h provides the three functions below that need assembly.
//
// Layout ("tiles", made once at load). A tile is 16 rows x 64 columns, a warp's work; lane 4 g + t holds rows g and g + 8 and
// columns 16 t .. 16 t + 15, in four steps of 4 columns. A step is 8 codes in the 8 nibbles of a word: row g in the low half,
// row g + 8 in the high half. That is the fragment of A that mma.m16n8k16 wants, but for the order of the columns within
// the tile, which is free as long as x is read in the same order: lane 4 g + t reads token g's columns 16 t .. 16 t + 15, 32
// contiguous bytes. Words of a tile: [bits][32 lanes].
//   4 bits: word s is step s.
//   3 bits: words 0 to 2 are steps 0 to 2; their nibbles' spare bits are the three bits of step 3's codes.
//   2 bits: word s is step 2 s in the low two bits of each nibble, step 2 s + 1 in the high two.
//
// Levels are looked up in registers: a row's levels, 16 bits each, lie as a plane of low and a plane of high bytes; a byte
// permutation picks four bytes by four nibbles. 16 levels take two permutations a plane and one that chooses between them by
// the nibbles' top bits. Per 4 weights that is 8 permutations (4 for up to 8 levels) and 3 other instructions.

#define FULL_WARP 0xffffffffu
typedef unsigned char uint8;
typedef unsigned short uint16;

extern __shared__ __align__(16) char shared_memory[];

#ifdef __CUDACC_RTC__
__device__ uint16 to_half(float x) {
    uint16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

__device__ float from_half(uint16 bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

// C [16, 8] += A [16, 16] B [16, 8], the warp's fragments, on tensor cores. False: this GPU has none for the type.
template <bool BF16>
__device__ bool multiply_on_tensor_cores(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if __CUDA_ARCH__ >= 800
    if (BF16)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    return true;
#elif __CUDA_ARCH__ >= 750
    if (BF16) return false;
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[2]), "r"(a[3]), "r"(b1));
    return true;
#else
    return false;
#endif
}
#endif

template <bool BF16>
__device__ uint16 to_bits(float x) {
    if (!BF16) return to_half(x);
    const unsigned bits = __float_as_uint(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;  // NaN, which the rounding below might carry over into a number
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

template <bool BF16>
__device__ float from_bits(uint16 bits) {
    return BF16 ? __uint_as_float((unsigned)bits << 16) : from_half(bits);
}

// The same on any GPU, from the fragments' definition: lane 4 g + t has row g (and g + 8) of A at k = 2 t, 2 t + 1 (and 8 more),
// token g of B at the same k, and C's rows g and g + 8 for tokens 2 t and 2 t + 1.
template <bool BF16>
__device__ void multiply_by_shuffles(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    const int lane = threadIdx.x % 32, row = lane / 4 * 4, token = lane % 4 * 8;
#pragma unroll
    for (int pair = 0; pair < 8; ++pair) {
        const int from = pair % 4, later = pair / 4;
        const unsigned b = later ? b1 : b0;
        const unsigned above = __shfl_sync(FULL_WARP, a[2 * later], row + from), below = __shfl_sync(FULL_WARP, a[2 * later + 1], row + from);
        const unsigned first = __shfl_sync(FULL_WARP, b, token + from), second = __shfl_sync(FULL_WARP, b, token + 4 + from);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float x = from_bits<BF16>((uint16)(first >> 16 * half)), y = from_bits<BF16>((uint16)(second >> 16 * half));
            const float u = from_bits<BF16>((uint16)(above >> 16 * half)), v = from_bits<BF16>((uint16)(below >> 16 * half));
            c[0] += u * x, c[1] += u * y, c[2] += v * x, c[3] += v * y;
        }
    }
}

template <bool BF16>
__device__ void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    if (!multiply_on_tensor_cores<BF16>(c, a, b0, b1)) multiply_by_shuffles<BF16>(c, a, b0, b1);
}

const int TILE_ROWS = 16, TILE_COLUMNS = 64, STEPS = 4, LANE_COLUMNS = 16, WARPS = 8;

// A weight matrix [O, I] in tiles. Levels: `planes` [O, 2, K] bytes; or, where that is null, scale (float16) and zero [O, G].
struct Weight {
    const unsigned* tiles;
    const uint8* planes;
    const uint16* scale;
    const uint8* zero;
    int O, I, G;

    __device__ int tiles_a_row() const { return (I + TILE_COLUMNS - 1) / TILE_COLUMNS; }
};

// The levels of one row, for one lane. Of a group where the weight has groups.
template <int BITS>
struct Table {
    static const int K = 1 << BITS, WORDS = K / 4;
    unsigned low[WORDS], high[WORDS];

    __device__ void load(const uint8* planes, int row) {
        const unsigned* words = (const unsigned*)planes + (long long)row * 2 * WORDS;
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
            low[i] = words[i];
            high[i] = words[WORDS + i];
        }
    }

    template <bool BF16>
    __device__ void compute(float scale, float zero) {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
            low[i] = high[i] = 0;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const unsigned bits = to_bits<BF16>(scale * (4 * i + j - zero));
                low[i] |= (bits & 255) << (8 * j);
                high[i] |= (bits >> 8) << (8 * j);
            }
        }
    }

    __device__ unsigned pick(const unsigned (&plane)[WORDS], unsigned codes, unsigned which) const {
        if (WORDS == 1) return __byte_perm(plane[0], plane[0], codes);
        const unsigned lower = __byte_perm(plane[0], plane[WORDS > 1 ? 1 : 0], codes);
        if (WORDS == 2) return lower;
        const unsigned upper = __byte_perm(plane[WORDS > 2 ? 2 : 0], plane[WORDS > 2 ? 3 : 0], codes);
        return __byte_perm(lower, upper, which);
    }

    // The levels of four codes, the low 16 bits of `nibbles`, as two pairs.
    __device__ void look_up(unsigned nibbles, unsigned& first, unsigned& second) const {
        const unsigned codes = nibbles & 0x7777, which = (nibbles & 0x8888) >> 1 | 0x3210;
        const unsigned lows = pick(low, codes, which), highs = pick(high, codes, which);
        first = __byte_perm(lows, highs, 0x5140);
        second = __byte_perm(lows, highs, 0x7362);
    }
};

// The words of one lane's four steps, from those stored.
template <int BITS>
__device__ void load_steps(const unsigned* tile, int lane, unsigned (&steps)[STEPS]) {
    unsigned words[BITS];
#pragma unroll
    for (int i = 0; i < BITS; ++i) words[i] = tile[32 * i + lane];
    if (BITS == 4) {
#pragma unroll
        for (int s = 0; s < STEPS; ++s) steps[s] = words[s < BITS ? s : 0];
    } else if (BITS == 3) {
#pragma unroll
        for (int s = 0; s < 3; ++s) steps[s] = words[s < BITS ? s : 0] & 0x77777777;
        steps[3] = (words[0] >> 3 & 0x11111111) | (words[1] >> 2 & 0x22222222) | (words[BITS > 2 ? 2 : 0] >> 1 & 0x44444444);
    } else {
#pragma unroll
        for (int s = 0; s < STEPS; ++s) steps[s] = words[s / 2] >> (2 * (s % 2)) & 0x33333333;
    }
}

// A lane's two tables, and when to renew them. A lane's 16 columns lie in one group: group sizes are multiples of 16.
template <int BITS, bool BF16>
struct Tables {
    Table<BITS> first, second;  // of rows g and g + 8
    int row, group;

    __device__ void start(const Weight& weight, int row_of_lane) {
        row = row_of_lane;
        group = -1;
        if (weight.planes) {
            first.load(weight.planes, row < weight.O ? row : 0);
            second.load(weight.planes, row + 8 < weight.O ? row + 8 : 0);
        }
    }

    __device__ void renew(const Weight& weight, int column) {
        if (weight.planes) return;
        const int wanted = column < weight.I ? column / (weight.I / weight.G) : weight.G - 1;
        if (wanted == group) return;
        group = wanted;
        compute(first, weight, row < weight.O ? row : 0);
        compute(second, weight, row + 8 < weight.O ? row + 8 : 0);
    }

    __device__ void compute(Table<BITS>& table, const Weight& weight, int of_row) {
        const long long at = (long long)of_row * weight.G + group;
        table.template compute<BF16>(from_half(weight.scale[at]), weight.zero[at]);
    }

    // The four words of A's fragment for one step.
    __device__ void fragment(unsigned step, unsigned (&a)[4]) const {
        first.look_up(step, a[0], a[2]);
        second.look_up(step >> 16, a[1], a[3]);
    }
};

// 16 numbers of x, from `column` on, as 8 pairs; zeros beyond the row's end. Two 16-byte loads where rows allow it.
__device__ void load_x(const uint16* x, int column, int I, unsigned (&pairs)[8]) {
    if (column + LANE_COLUMNS <= I && I % 8 == 0) {
        const uint4 a = *(const uint4*)(x + column), b = *(const uint4*)(x + column + 8);
        pairs[0] = a.x, pairs[1] = a.y, pairs[2] = a.z, pairs[3] = a.w;
        pairs[4] = b.x, pairs[5] = b.y, pairs[6] = b.z, pairs[7] = b.w;
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int c = column + 2 * i;
        pairs[i] = (c < I ? x[c] : 0) | (c + 1 < I ? (unsigned)x[c + 1] << 16 : 0);
    }
}

// y [N, O] = x [N, I] W^T + bias for N <= 8 TOKENS. A thread block takes 16 rows; its warps share the columns' tiles and add up
// in shared memory: 8 TOKENS x 16 x WARPS floats.
template <int BITS, bool BF16, int TOKENS>
__device__ void lut_gemm(const Weight& weight, const uint16* x, const uint16* bias, uint16* y, int N) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int first_row = blockIdx.x * TILE_ROWS, count = weight.tiles_a_row();
    float sums[TOKENS][4] = {};
    Tables<BITS, BF16> tables;
    tables.start(weight, first_row + g);
    const unsigned* tile = weight.tiles + (long long)blockIdx.x * count * BITS * 32;
    unsigned steps[STEPS], next[STEPS];
    if (warp < count) load_steps<BITS>(tile + (long long)warp * BITS * 32, lane, next);
    for (int k = warp; k < count; k += WARPS) {
#pragma unroll
        for (int s = 0; s < STEPS; ++s) steps[s] = next[s];
        if (k + WARPS < count) load_steps<BITS>(tile + (long long)(k + WARPS) * BITS * 32, lane, next);
        const int column = k * TILE_COLUMNS + t * LANE_COLUMNS;
        tables.renew(weight, column);
        unsigned a[STEPS][4];
#pragma unroll
        for (int s = 0; s < STEPS; ++s) tables.fragment(steps[s], a[s]);
#pragma unroll
        for (int n = 0; n < TOKENS; ++n) {
            unsigned b[8] = {};
            if (8 * n + g < N) load_x(x + (long long)(8 * n + g) * weight.I, column, weight.I, b);
#pragma unroll
            for (int s = 0; s < STEPS; ++s) multiply<BF16>(sums[n], a[s], b[2 * s], b[2 * s + 1]);
        }
    }
    float* all = (float*)shared_memory;  // [WARPS, 8 TOKENS, 16]
#pragma unroll
    for (int n = 0; n < TOKENS; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) all[(warp * 8 * TOKENS + 8 * n + 2 * t + i % 2) * TILE_ROWS + g + i / 2 * 8] = sums[n][i];
    __syncthreads();
    for (int at = threadIdx.x; at < 8 * TOKENS * TILE_ROWS; at += blockDim.x) {
        const int token = at / TILE_ROWS, row = first_row + at % TILE_ROWS;
        if (token >= N || row >= weight.O) continue;
        float sum = bias ? from_bits<BF16>(bias[row]) : 0;
        for (int w = 0; w < WARPS; ++w) sum += all[w * 8 * TOKENS * TILE_ROWS + at];
        y[(long long)token * weight.O + row] = to_bits<BF16>(sum);
    }
}

// Rows of W from `first_row` on, [rows, I]: a warp a tile, in 32-byte pieces where rows allow it.
template <int BITS, bool BF16>
__device__ void dequantize(const Weight& weight, uint16* out, int first_row, int rows) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int count = weight.tiles_a_row(), k = blockIdx.y * WARPS + warp;
    if (k >= count) return;
    const int tile_row = first_row / TILE_ROWS + blockIdx.x, column = k * TILE_COLUMNS + t * LANE_COLUMNS;
    Tables<BITS, BF16> tables;
    tables.start(weight, tile_row * TILE_ROWS + g);
    tables.renew(weight, column);
    unsigned steps[STEPS], a[STEPS][4];
    load_steps<BITS>(weight.tiles + ((long long)tile_row * count + k) * BITS * 32, lane, steps);
#pragma unroll
    for (int s = 0; s < STEPS; ++s) tables.fragment(steps[s], a[s]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = tile_row * TILE_ROWS + g + 8 * half - first_row;
        if (row >= rows || column >= weight.I) continue;
        uint16* to = out + (long long)row * weight.I + column;
        if (column + LANE_COLUMNS <= weight.I && weight.I % 8 == 0) {
            *(uint4*)to = make_uint4(a[0][half], a[0][half + 2], a[1][half], a[1][half + 2]);
            *(uint4*)(to + 8) = make_uint4(a[2][half], a[2][half + 2], a[3][half], a[3][half + 2]);
        } else {
#pragma unroll
            for (int i = 0; i < LANE_COLUMNS; ++i)
                if (column + i < weight.I) to[i] = a[i / 4][half + i % 4 / 2 * 2] >> (16 * (i % 2));
        }
    }
}

#define KERNELS(BITS, TYPE, BF16)                                                                                       \
    GEMM(BITS, TYPE, BF16, 1) GEMM(BITS, TYPE, BF16, 2) GEMM(BITS, TYPE, BF16, 4) GEMM(BITS, TYPE, BF16, 8)             \
    extern "C" __global__ void __launch_bounds__(WARPS * 32) dequantize_##BITS##_##TYPE(                               \
        const unsigned* tiles, const uint8* planes, const uint16* scale, const uint8* zero, uint16* out, int O, int I, int G, \
        int first_row, int rows) {                                                                                     \
        dequantize<BITS, BF16>({tiles, planes, scale, zero, O, I, G}, out, first_row, rows);                           \
    }
#define GEMM(BITS, TYPE, BF16, TOKENS)                                                                                  \
    extern "C" __global__ void __launch_bounds__(WARPS * 32) lut_gemm_##BITS##_##TYPE##_##TOKENS(                      \
        const unsigned* tiles, const uint8* planes, const uint16* scale, const uint8* zero, const uint16* x,           \
        const uint16* bias, uint16* y, int O, int I, int G, int N) {                                                   \
        lut_gemm<BITS, BF16, TOKENS>({tiles, planes, scale, zero, O, I, G}, x, bias, y, N);                            \
    }
KERNELS(4, half, false)
KERNELS(3, half, false)
KERNELS(2, half, false)
KERNELS(4, bfloat16, true)
KERNELS(3, bfloat16, true)
KERNELS(2, bfloat16, true)
