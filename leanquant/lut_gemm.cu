// CUDA for inference: products with weights that stay codes and levels, and their dequantization. Not here: quantization.
//
// Compiled at run time by kernels.py, without headers. lut_gemm.py has the layout, the torch twins and the checks. The tests
// build the same source for the host, where tests/host_cuda.h provides the functions below that need assembly.
//
// Layout ("tiles", made once at load). A tile is 16 rows x 64 columns, a warp's work; lane 4 g + t holds rows g and g + 8, of
// each two pieces of 8 columns: 8 t .. 8 t + 7 and 32 + 8 t .. 32 + 8 t + 7, in two steps of 4 columns each. A step is 8 codes in
// the 8 nibbles of a word: row g in the low half, row g + 8 in the high half. That is the fragment of A that mma.m16n8k16 wants,
// but for the order of the columns within the tile, which is free as long as x is read in the same order: lane 4 g + t reads
// token g's columns of the same numbers, 16 bytes twice, and a token's four lanes read 64 contiguous bytes at a time. Words of a
// tile: [bits][32 lanes].
//   4 bits: word s is step s.
//   3 bits: words 0 to 2 are steps 0 to 2; their nibbles' spare bits are the three bits of step 3's codes.
//   2 bits: word s is step 2 s in the low two bits of each nibble, step 2 s + 1 in the high two.
//
// Levels are looked up in registers: a row's levels, 16 bits each, lie as a plane of low and a plane of high bytes; a byte
// permutation picks four bytes by four nibbles. 16 levels take two permutations a plane and one that chooses between them by
// the nibbles' top bits. Per 4 weights that is 8 permutations (4 for up to 8 levels) and 2.5 other instructions. Look-ups in
// shared memory, by pairs of codes and in a column of each lane's own, were slower at every width on an H200.

#define FULL_WARP 0xffffffffu
typedef unsigned char uint8;
typedef unsigned short uint16;

extern __shared__ __align__(16) char shared_memory[];

#ifdef __CUDACC_RTC__
// Four bytes of (low, high), by the selector's low four nibbles, each below 8.
__device__ unsigned permute(unsigned low, unsigned high, unsigned selector) {
    unsigned bytes;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(selector));
    return bytes;
}

// x >> 16, by the unit that multiplies: the one that shifts is the bottleneck here.
__device__ unsigned upper_half(unsigned x) {
    unsigned half;
    asm("mul.hi.u32 %0, %1, 0x10000;" : "=r"(half) : "r"(x));
    return half;
}

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

const int TILE_ROWS = 16, TILE_COLUMNS = 64, PIECE = 8, STEPS = 4;
const int WARPS = 8;  // of a thread block that dequantizes
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
const bool BY_SHUFFLES = true;  // products, of some type: they leave registers for less else
#else
const bool BY_SHUFFLES = false;
#endif
// Rows of tiles that a warp takes; tiles whose codes are under way, for up to 8 and up to 16 tokens.
const int MOST_ROWS = BY_SHUFFLES ? 1 : 2, FEW_AHEAD = BY_SHUFFLES ? 1 : 3, MORE_AHEAD = BY_SHUFFLES ? 1 : 2;

// Most threads of a block, so that registers suffice; and for which kernels the compiler is to aim at one block a multiprocessor,
// because with its usual aim it keeps a few bytes in memory.
constexpr __device__ int most_threads(int tokens, bool affine) {
    return BY_SHUFFLES || affine || tokens == 8 ? 256 : tokens == 4 ? 384 : 512;
}
constexpr __device__ int least_blocks(bool affine) { return BY_SHUFFLES || affine ? 1 : 0; }

// A weight matrix [O, I] in tiles. `levels` [O, K] in its dtype; or, where that is null, scale (float16) and zero [O, G].
struct Weight {
    const unsigned* tiles;
    const uint16 *levels, *scale;
    const uint8* zero;
    int O, I, G;

    __device__ int tiles_a_row() const { return (I + TILE_COLUMNS - 1) / TILE_COLUMNS; }
    __device__ int last_tile_row() const { return (O - 1) / TILE_ROWS; }
    // The lane's words of a row of tiles.
    __device__ const unsigned* tile_row(int row, int bits) const {
        return tiles + (long long)row * tiles_a_row() * bits * 32 + threadIdx.x % 32;
    }
};

// The first column of a lane's piece of tile k.
__device__ int column_of(int k, int piece) { return k * TILE_COLUMNS + TILE_COLUMNS / 2 * piece + PIECE * (threadIdx.x % 4); }

// One lane's words of a tile.
template <int BITS>
struct Words {
    unsigned words[BITS];

    // Of tile k of a row of tiles, whose words for the lane begin at `row`.
    __device__ void load(const unsigned* row, int k) {
#pragma unroll
        for (int i = 0; i < BITS; ++i) words[i] = row[(k * BITS + i) * 32];
    }

    // The four steps that they hold.
    __device__ void unpack(unsigned (&steps)[STEPS]) const {
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
};

// The levels of one row, for one lane. Of a group where the weight has groups.
template <int BITS>
struct Table {
    static const int K = 1 << BITS, WORDS = K / 4;
    unsigned low[WORDS], high[WORDS];

    __device__ void load(const uint16* levels) {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
            const unsigned a = ((const unsigned*)levels)[2 * i], b = ((const unsigned*)levels)[2 * i + 1];
            low[i] = permute(a, b, 0x6420);
            high[i] = permute(a, b, 0x7531);
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
        if (WORDS == 1) return permute(plane[0], plane[0], codes);
        const unsigned lower = permute(plane[0], plane[WORDS > 1 ? 1 : 0], codes);
        if (WORDS == 2) return lower;
        const unsigned upper = permute(plane[WORDS > 2 ? 2 : 0], plane[WORDS > 2 ? 3 : 0], codes);
        return permute(lower, upper, which);
    }

    // The levels of four codes, as two pairs: by the low 16 bits of `codes` and, with 16 levels, of `which` half they are in.
    __device__ void look_up(unsigned codes, unsigned which, unsigned& first, unsigned& second) const {
        const unsigned lows = pick(low, codes, which), highs = pick(high, codes, which);
        first = permute(lows, highs, 0x5140);
        second = permute(lows, highs, 0x7362);
    }
};

// A lane's two tables, of rows g and g + 8; affine: those of a group, renewed where another one begins.
template <int BITS, bool BF16, bool AFFINE>
struct Decoder {
    struct Group {  // asked for with the codes, so that it is there in time
        int number;
        uint16 scale[2];
        uint8 zero[2];
    };
    Table<BITS> first, second;
    int row, group, group_size;

    __device__ void start(const Weight& weight, int tile_row) {
        row = tile_row * TILE_ROWS + threadIdx.x % 32 / 4;
        group = -1;
        group_size = weight.I / weight.G;
        if (AFFINE) return;
        first.load(weight.levels + (long long)min(row, weight.O - 1) * Table<BITS>::K);
        second.load(weight.levels + (long long)min(row + 8, weight.O - 1) * Table<BITS>::K);
    }

    // The group of `column`. A piece of a lane's columns lies in one: sizes are multiples of 16.
    __device__ void ask(const Weight& weight, int column, Group& asked) const {
        if (!AFFINE) return;
        asked.number = column < weight.I ? column / group_size : weight.G - 1;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const long long at = (long long)min(row + 8 * half, weight.O - 1) * weight.G + asked.number;
            asked.scale[half] = weight.scale[at];
            asked.zero[half] = weight.zero[at];
        }
    }

    __device__ void renew(const Group& wanted) {
        if (!AFFINE || wanted.number == group) return;
        group = wanted.number;
        first.template compute<BF16>(from_half(wanted.scale[0]), wanted.zero[0]);
        second.template compute<BF16>(from_half(wanted.scale[1]), wanted.zero[1]);
    }

    // A's fragments for the two steps of a piece.
    __device__ void fragments(const unsigned (&steps)[STEPS], int piece, unsigned (&a)[2][4]) const {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const unsigned step = steps[2 * piece + i], codes = BITS == 4 ? step & 0x77777777 : step;
            const unsigned which = BITS == 4 ? ((step & 0x88888888) >> 1) + 0x32103210 : 0;
            first.look_up(codes, which, a[i][0], a[i][2]);
            second.look_up(upper_half(codes), upper_half(which), a[i][1], a[i][3]);
        }
    }
};

// `work(k, loaded)` for k = begin .. end - 1, with what `load(k, loaded)` filled in, called AHEAD of them early. The bulk of them
// has no condition in it, and loads where it has just read, so that nothing is copied.
template <class Loaded, int AHEAD, class Load, class Work>
__device__ void for_tiles(int begin, int end, Load load, Work work) {
    Loaded ahead[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
        if (begin + i < end) load(begin + i, ahead[i]);
    int k = begin;
    for (; AHEAD > 1 && k + 2 * AHEAD <= end; k += AHEAD)
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            work(k + i, ahead[i]);
            load(k + AHEAD + i, ahead[i]);
        }
    for (; k < end; k += AHEAD)
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (k + i >= end) break;
            work(k + i, ahead[i]);
            if (k + AHEAD + i < end) load(k + AHEAD + i, ahead[i]);
        }
}

// y [N, O] = x W^T + bias for N <= 8 TOKENS. x has whole tiles of columns, zeros beyond I, and, for TOKENS > 1, 8 TOKENS rows; for
// TOKENS = 1 it has N, and lanes of the others read the last one again. A warp takes ROWS rows of tiles, so that x is read once
// for them; a thread block `teams` times as many. The warps of a team share the columns' tiles, and so do gridDim.y blocks. Warps
// add up in shared memory, warps x ROWS x 8 TOKENS x 16 floats, blocks through partial [gridDim.y, N, O], which add_up reads.
template <int BITS, bool BF16, bool AFFINE, int TOKENS, int ROWS>
__device__ void lut_gemm(const Weight& weight, const uint16* x, const uint16* bias, uint16* y, float* partial, int N, int teams) {
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, warps = blockDim.x / 32;
    const int count = weight.tiles_a_row(), width = count * TILE_COLUMNS, last = weight.last_tile_row();
    const int members = warps / teams, parts = members * gridDim.y, each = (count + parts - 1) / parts;
    const int begin = min((blockIdx.y * members + warp / teams) * each, count), end = min(begin + each, count);
    const int block_row = blockIdx.x * teams * ROWS, first = block_row + warp % teams * ROWS;
    const unsigned* tiles = weight.tile_row(min(first, last), BITS);
    const int next_row = first < last ? count * BITS * 32 : 0;  // words to the second row of tiles, if there is one
    Decoder<BITS, BF16, AFFINE> decoders[ROWS];
    float sums[ROWS][TOKENS][4] = {};
#pragma unroll
    for (int r = 0; r < ROWS; ++r) decoders[r].start(weight, min(first + r, last));
    struct Loaded {
        Words<BITS> words[ROWS];
        typename Decoder<BITS, BF16, AFFINE>::Group groups[ROWS][2];
        uint4 x[2];  // of the only token, where there is one
    };
    auto load_codes = [&](int k, Loaded& loaded) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            loaded.words[r].load(tiles + r * next_row, k);
            decoders[r].ask(weight, column_of(k, 0), loaded.groups[r][0]);
            decoders[r].ask(weight, column_of(k, 1), loaded.groups[r][1]);
        }
    };
    // `with(piece, a)` for the fragments of both pieces.
    auto decode = [&](const Loaded& loaded, auto with) {
        unsigned steps[ROWS][STEPS], a[ROWS][2][4];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) loaded.words[r].unpack(steps[r]);
#pragma unroll
        for (int piece = 0; piece < 2; ++piece) {
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                decoders[r].renew(loaded.groups[r][piece]);
                decoders[r].fragments(steps[r], piece, a[r]);
            }
            with(piece, a);
        }
    };
    auto multiply_rows = [&](int n, const unsigned(&a)[ROWS][2][4], const uint4& b) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            multiply<BF16>(sums[r][n], a[r][0], b.x, b.y);
            multiply<BF16>(sums[r][n], a[r][1], b.z, b.w);
        }
    };
    if constexpr (TOKENS == 1) {
        const uint16* token = x + (long long)min(g, N - 1) * width + column_of(0, 0);
        auto load = [&](int k, Loaded& loaded) {
            load_codes(k, loaded);
            loaded.x[0] = *(const uint4*)(token + k * TILE_COLUMNS);
            loaded.x[1] = *(const uint4*)(token + k * TILE_COLUMNS + TILE_COLUMNS / 2);
        };
        for_tiles<Loaded, AFFINE ? 1 : FEW_AHEAD>(begin, end, load, [&](int, const Loaded& loaded) {
            decode(loaded, [&](int piece, const unsigned(&a)[ROWS][2][4]) { multiply_rows(0, a, loaded.x[piece]); });
        });
    } else {
        const uint16* token = x + (long long)g * width + column_of(0, 0);
        auto load_x = [&](int n, int k, int piece) {
            return *(const uint4*)(token + 8 * n * width + k * TILE_COLUMNS + TILE_COLUMNS / 2 * piece);
        };
        const bool early = TOKENS == 8 || (TOKENS == 2 && !AFFINE);  // x is asked for one product early, where registers suffice
        uint4 next;
        if (early && begin < end) next = load_x(0, begin, 0);
        for_tiles<Loaded, TOKENS == 2 && !AFFINE ? MORE_AHEAD : 1>(begin, end, load_codes, [&](int k, const Loaded& loaded) {
            decode(loaded, [&](int piece, const unsigned(&a)[ROWS][2][4]) {
#pragma unroll
                for (int n = 0; n < TOKENS; ++n) {
                    const uint4 b = early ? next : load_x(n, k, piece);
                    if (early) next = n + 1 < TOKENS ? load_x(n + 1, k, piece) : load_x(0, min(k + piece, count - 1), 1 - piece);
                    multiply_rows(n, a, b);
                }
            });
        });
    }
    float* all = (float*)shared_memory;  // [warps, ROWS, 8 TOKENS, 16]
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int n = 0; n < TOKENS; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                all[((warp * ROWS + r) * 8 * TOKENS + 8 * n + 2 * t + i % 2) * TILE_ROWS + g + i / 2 * 8] = sums[r][n][i];
    __syncthreads();
    const int block_rows = teams * ROWS * TILE_ROWS;
    for (int at = threadIdx.x; at < 8 * TOKENS * block_rows; at += blockDim.x) {
        const int token = at / block_rows, in_block = at % block_rows, row = block_row * TILE_ROWS + in_block;
        if (token >= N || row >= weight.O) continue;
        float sum = bias && !partial ? from_bits<BF16>(bias[row]) : 0;
        for (int member = 0; member < members; ++member)
            sum += all[((member * teams * ROWS + in_block / TILE_ROWS) * 8 * TOKENS + token) * TILE_ROWS + in_block % TILE_ROWS];
        if (partial)
            partial[((long long)blockIdx.y * N + token) * weight.O + row] = sum;
        else
            y[(long long)token * weight.O + row] = to_bits<BF16>(sum);
    }
}

// y [N, O] = the sum of partial [parts, N, O] + bias, an element a thread.
template <bool BF16>
__device__ void add_up(const float* partial, const uint16* bias, uint16* y, int parts, int N, int O) {
    const long long size = (long long)N * O, at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= size) return;
    float sum = bias ? from_bits<BF16>(bias[at % O]) : 0;
    for (int part = 0; part < parts; ++part) sum += partial[part * size + at];
    y[at] = to_bits<BF16>(sum);
}

// A piece of a row of W at `column`, from the fragments of its two steps; half: of row g or g + 8.
__device__ void store(uint16* row, int column, int I, int half, const unsigned (&a)[2][4]) {
    if (column + PIECE <= I && I % PIECE == 0) {
        *(uint4*)(row + column) = make_uint4(a[0][half], a[0][half + 2], a[1][half], a[1][half + 2]);
        return;
    }
#pragma unroll
    for (int i = 0; i < PIECE; ++i)
        if (column + i < I) row[column + i] = a[i / 4][half + i % 4 / 2 * 2] >> (16 * (i % 2));
}

// Rows of W from `first_row` on, [rows, I]: a warp some tiles, in 16-byte pieces where rows allow it.
template <int BITS, bool BF16, bool AFFINE>
__device__ void dequantize(const Weight& weight, uint16* out, int first_row, int rows) {
    const int warp = threadIdx.x / 32, count = weight.tiles_a_row(), tile_row = first_row / TILE_ROWS + blockIdx.x;
    const int parts = gridDim.y * WARPS, each = (count + parts - 1) / parts, begin = min((blockIdx.y * WARPS + warp) * each, count);
    Decoder<BITS, BF16, AFFINE> decoder;
    decoder.start(weight, tile_row);
    const unsigned* tiles = weight.tile_row(tile_row, BITS);
    struct Loaded {
        Words<BITS> words;
        typename Decoder<BITS, BF16, AFFINE>::Group groups[2];
    };
    auto load = [&](int k, Loaded& loaded) {
        loaded.words.load(tiles, k);
        decoder.ask(weight, column_of(k, 0), loaded.groups[0]);
        decoder.ask(weight, column_of(k, 1), loaded.groups[1]);
    };
    for_tiles<Loaded, AFFINE ? 1 : 4>(begin, min(begin + each, count), load, [&](int k, const Loaded& loaded) {
        unsigned steps[STEPS], a[2][4];
        loaded.words.unpack(steps);
#pragma unroll
        for (int piece = 0; piece < 2; ++piece) {
            decoder.renew(loaded.groups[piece]);
            decoder.fragments(steps, piece, a);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = blockIdx.x * TILE_ROWS + threadIdx.x % 32 / 4 + 8 * half;
                if (row < rows) store(out + (long long)row * weight.I, column_of(k, piece), weight.I, half, a);
            }
        }
    });
}

#define GEMM(NAME, BITS, BF16, AFFINE, TOKENS, ROWS)                                                                     \
    extern "C" __global__ void __launch_bounds__(most_threads(TOKENS, AFFINE), least_blocks(AFFINE))                   \
        lut_gemm_##NAME##_##TOKENS(                                                                                    \
            const unsigned* tiles, const uint16* levels, const uint16* scale, const uint8* zero, const uint16* x,      \
            const uint16* bias, uint16* y, float* partial, int O, int I, int G, int N, int teams) {                    \
        lut_gemm<BITS, BF16, AFFINE, TOKENS, ROWS>({tiles, levels, scale, zero, O, I, G}, x, bias, y, partial, N, teams); \
    }
#define KERNELS(NAME, BITS, BF16, AFFINE, ROWS)                                                                         \
    GEMM(NAME, BITS, BF16, AFFINE, 1, 1) GEMM(NAME, BITS, BF16, AFFINE, 2, 1) GEMM(NAME, BITS, BF16, AFFINE, 4, ROWS)  \
    GEMM(NAME, BITS, BF16, AFFINE, 8, ROWS)                                                                            \
    extern "C" __global__ void __launch_bounds__(WARPS * 32) dequantize_##NAME(                                        \
        const unsigned* tiles, const uint16* levels, const uint16* scale, const uint8* zero, uint16* out, int O, int I, int G, \
        int first_row, int rows) {                                                                                     \
        dequantize<BITS, BF16, AFFINE>({tiles, levels, scale, zero, O, I, G}, out, first_row, rows);                   \
    }
#define WIDTHS(TYPE, BF16)                                                                                              \
    KERNELS(levels_4_##TYPE, 4, BF16, false, MOST_ROWS)                                                                \
    KERNELS(levels_3_##TYPE, 3, BF16, false, MOST_ROWS)                                                                \
    KERNELS(levels_2_##TYPE, 2, BF16, false, MOST_ROWS)                                                                \
    KERNELS(affine_4_##TYPE, 4, BF16, true, 1)                                                                         \
    KERNELS(affine_3_##TYPE, 3, BF16, true, 1)                                                                         \
    KERNELS(affine_2_##TYPE, 2, BF16, true, 1)                                                                         \
    extern "C" __global__ void __launch_bounds__(256) add_up_##TYPE(const float* partial, const uint16* bias, uint16* y, \
                                                                    int parts, int N, int O) {                         \
        add_up<BF16>(partial, bias, y, parts, N, O);                                                                   \
    }
WIDTHS(half, false)
WIDTHS(bfloat16, true)
