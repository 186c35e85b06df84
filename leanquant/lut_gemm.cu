// CUDA for inference: products with weights that stay codes and levels, and their dequantization. Not here: quantization.
//
// Compiled at run time by kernels.py, without headers. lut_gemm.py has the layout, the torch twins and the checks. The tests
// build the same source for the host, where tests/host_cuda.h provides the functions below that need assembly.
//
// Layout ("tiles", made once at load). A tile is 16 rows x 256 columns, a warp's work. Each bit of the codes is a plane of it, 16 x 256
// bits, 16 bytes a lane: the fragment of A that mma.m16n8k256 of single bits wants. Word 2 h + r of lane 4 g + t is row g + 8 r, columns
// 128 h + 32 s + 8 t + 4 q + j in its bits 16 q + 4 j + s; [bits][32 lanes][4 words].
//
// One token and free levels (lut_gemv), on GPUs whose tensor cores multiply bits (Ampere, Ada, Hopper), and if x's planes fit in shared
// memory. No level is looked up. A row's levels are a function of the code's bits, and so a sum over the parities of its subsets S of
// bits (Walsh and Hadamard):
//   level(c) = sum over S of h_S (-1)^parity(c & S),   hence   y = sum over S of h_S sum over columns of (-1)^parity x.
// x is a sign and an integer of 16 bits, which are bit planes too. The sign joins the parity. With C_S the sum of |x| where the two are
// odd together, an inner sum is that of all |x| less 2 C_S; for the empty S it is that of x. C_S is counts of ones in parity & plane: a
// product of bits. A tile of 4 bits takes a lane 60 instructions of logic, where looking up takes 370, and the warp 30 products of bits,
// one in some 11 clocks on an H200; smaller widths have fewer subsets. All that is not a tile counts as much: until x is there and cut
// into planes, in every block, and from the counts to y. A small weight is looked up.
//
// Up to 64 tokens otherwise (lut_gemm): levels are looked up in registers. A row's levels, 16 bits each, lie as a plane of low and a
// plane of high bytes; a byte permutation picks four bytes by the four nibbles of a selector, which is made of the codes' bit planes. 16
// levels take two permutations a plane and one that chooses between them. Then mma.m16n8k16 multiplies; lane 4 g + t reads token g's
// columns 128 h + 32 s + 8 t and the seven after it, 16 bytes, and a token's four lanes 64 contiguous bytes. Look-ups in shared memory,
// by pairs of codes and in a column of each lane's own, were slower at every width on an H200.
//
// More than 8 tokens on Hopper (lut_wide, free levels): to rebuild a weight of b bits in memory and multiply it with cuBLAS moves 4 + b / 8
// bytes for each; at 512 tokens that takes 0.4 of the product's own time. wgmma takes A from registers, where looking up leaves it, while
// B, x, is in shared memory. When each block permuted x on its way there, the products ran at half their rate on an H200: loads and
// stores took the shared memory's time. Now arrange_x writes x once, as the very bytes that shared memory is to hold, and one instruction
// copies 64 columns of a block's tokens into a ring of slots. A block's 8 warps have 128 rows and up to 256 tokens: 4096 clocks of the
// tensor cores for a tile's 256 columns, in which a scheduler issues some 1400 instructions. The assembler lets products run on across
// a branch only where it stands between two stages of the ring; levels of groups, renewed in branches anywhere, are rebuilt.

#define FULL_WARP 0xffffffffu
typedef unsigned char uint8;
typedef unsigned short uint16;

extern __shared__ __align__(1024) char shared_memory[];

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

// C [16, 8] += the number of ones that rows of A [16, 256] and columns of B [256, 8], single bits, have in common.
__device__ void count_common_ones(int (&c)[4], const unsigned (&a)[4], uint2 b) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
#endif
}

// Copy 16 bytes from global to shared memory, in the background where the GPU can; all but the last LATER calls of
// `end_of_copies` are waited for, by the thread that copied.
__device__ void copy_16_bytes(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((unsigned)__cvta_generic_to_shared(to)), "l"(from) : "memory");
#else
    *(uint4*)to = *(const uint4*)from;
#endif
}

__device__ void copy_8_bytes(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"((unsigned)__cvta_generic_to_shared(to)), "l"(from) : "memory");
#endif
}

__device__ void end_of_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int LATER>
__device__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(LATER) : "memory");
#endif
}

// Until here this kernel may have run while those before it in the stream were at work, if it was launched so (`early` in kernels.py):
// what they write is there from now on. It waits for the one before, which is not done before it has waited in its turn.
__device__ void wait_for_turn() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may begin, as soon as there is room for it beside all blocks of this one.
__device__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// The next one begins when those before are done: while they are not it would be in their way, most of all in lut_gemv's.
__device__ void take_turn() { wait_for_turn(), let_next_begin(); }

// An address within shared memory.
__device__ unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// C [64, 2 SIZE] += A [64, 16] B [16, 2 SIZE] for the four warps of a warpgroup, in the background: A in registers, a row of 16 x 16 a
// warp; B in shared memory, which `matrix` describes. Neither may change, nor C be read, before `wait_for_products`.
#define REGISTERS_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define REGISTERS_16 REGISTERS_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define REGISTERS_32 REGISTERS_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define REGISTERS_64                                                                                                    \
    REGISTERS_32                                                                                                        \
    ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60," \
    "%61,%62,%63"
#define REGISTERS_128                                                                                                   \
    REGISTERS_64                                                                                                        \
    ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,"  \
    "%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,"      \
    "%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define EIGHT(c, i) \
    "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
#define SIXTEEN(c, i) EIGHT(c, i), EIGHT(c, i + 8)
#define THIRTY_TWO(c, i) SIXTEEN(c, i), SIXTEEN(c, i + 16)
#define SIXTY_FOUR(c, i) THIRTY_TWO(c, i), THIRTY_TWO(c, i + 32)
#define WGMMA(TOKENS, TYPE, REGISTERS, A, B, ...)                                                                         \
    asm volatile("{.reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n" #TOKENS "k16.f32." #TYPE "." #TYPE  \
                 " {" REGISTERS "}, {" A "}, " B ", p, 1, 1, 0;}"                                                         \
                 : __VA_ARGS__                                                                                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define MULTIPLY_IN_BACKGROUND(SIZE, TOKENS, A, B, ...)                                                                   \
    template <bool BF16>                                                                                                \
    __device__ void multiply_in_background(float (&c)[SIZE], const unsigned (&a)[4], unsigned long long b) {            \
        if (BF16)                                                                                                       \
            WGMMA(TOKENS, bf16, REGISTERS_##SIZE, A, B, __VA_ARGS__);                                                     \
        else                                                                                                            \
            WGMMA(TOKENS, f16, REGISTERS_##SIZE, A, B, __VA_ARGS__);                                                      \
    }
MULTIPLY_IN_BACKGROUND(8, 16, "%8,%9,%10,%11", "%12", EIGHT(c, 0))
MULTIPLY_IN_BACKGROUND(32, 64, "%32,%33,%34,%35", "%36", THIRTY_TWO(c, 0))
MULTIPLY_IN_BACKGROUND(64, 128, "%64,%65,%66,%67", "%68", SIXTY_FOUR(c, 0))
MULTIPLY_IN_BACKGROUND(128, 256, "%128,%129,%130,%131", "%132", SIXTY_FOUR(c, 0), SIXTY_FOUR(c, 64))

// What registers and shared memory hold is for the products that follow.
__device__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ void end_of_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until all but the last LATER groups of products are done.
template <int LATER>
__device__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LATER) : "memory");
}

// Registers that those products read or wrote, named here so that the compiler leaves them alone until they are done.
__device__ void keep(float& x) { asm volatile("" : "+f"(x)::"memory"); }
__device__ void keep(unsigned& x) { asm volatile("" : "+r"(x)::"memory"); }

// A barrier in shared memory goes from one phase to the next when `arrivals` calls of `arrive` or `expect_bytes` have come, and the bytes
// that were expected.
typedef unsigned long long Barrier;
__device__ void start_barrier(Barrier* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ void arrive(Barrier* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ void expect_bytes(Barrier* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

// Until the barrier's phase `phase`, counted from 0, is over; the next one may not be.
__device__ void wait_for_phase(Barrier* barrier, int phase) {
    asm volatile(
        "{.reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra again;}"
        ::"r"(shared_address(barrier)), "r"(phase & 1)
        : "memory");
}

// Copy from global to shared memory in the background, by one thread: 16-byte units, which `barrier` must have been told to expect.
__device__ void copy_in_background(void* to, const void* from, int bytes, Barrier* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
                 "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

// What this thread knows to be in memory, barriers too, is there for its copies in the background.
__device__ void show_to_copies() { asm volatile("fence.proxy.async;" ::: "memory"); }
#endif
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
#pragma unroll 1  // or else the compiler takes minutes
    for (int pair = 0; pair < 8; ++pair) {
        const int from = pair % 4;
        const bool later = pair >= 4;
        const unsigned b = later ? b1 : b0;
        const unsigned above = __shfl_sync(FULL_WARP, later ? a[2] : a[0], row + from);
        const unsigned below = __shfl_sync(FULL_WARP, later ? a[3] : a[1], row + from);
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

const int TILE_ROWS = 16, TILE_COLUMNS = 256, PIECE = 8, PIECES = 8;  // a piece: consecutive columns of a lane
const int WARPS = 8, GEMV_WARPS = 16;  // of a block that dequantizes; at most, of lut_gemv's
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
const bool BY_SHUFFLES = true;  // products, of some type: they leave registers for less else
#else
const bool BY_SHUFFLES = false;
#endif
const int MOST_ROWS = BY_SHUFFLES ? 1 : 2;  // rows of tiles that a warp takes

// A weight matrix [O, I] in tiles. `levels` [O, K] in its dtype; or, where that is null, scale (float16) and zero [O, G].
struct Weight {
    const uint4* tiles;
    const uint16 *levels, *scale;
    const uint8* zero;
    int O, I, G;

    __device__ int tiles_a_row() const { return (I + TILE_COLUMNS - 1) / TILE_COLUMNS; }
    __device__ int last_tile_row() const { return (O - 1) / TILE_ROWS; }
    // The lane's words of a row of tiles; those beyond the last are the last again, whose results are not used.
    __device__ const uint4* tile_row(int row, int bits) const {
        return tiles + (long long)min(row, last_tile_row()) * tiles_a_row() * bits * 32 + threadIdx.x % 32;
    }
};

// The first column of a lane's piece of tile k.
__device__ int column_of(int k, int piece) { return k * TILE_COLUMNS + TILE_COLUMNS / PIECES * piece + PIECE * (threadIdx.x % 4); }

__device__ unsigned shifted(unsigned x, int left) { return left < 0 ? x >> -left : x << left; }

// One lane's words of a tile.
template <int BITS>
struct Words {
    unsigned planes[BITS][4];

    // From words that lie 32 x 16 bytes apart.
    __device__ void load(const uint4* from) {
#pragma unroll
        for (int b = 0; b < BITS; ++b) {
            const uint4 words = from[b * 32];
            planes[b][0] = words.x, planes[b][1] = words.y, planes[b][2] = words.z, planes[b][3] = words.w;
        }
    }

    // The codes of a piece of row g or, half = 1, g + 8: nibbles for `permute`; and which half of 16 levels they are in.
    __device__ void selectors(int piece, int half, unsigned& codes, unsigned& which) const {
        codes = which = 0;
#pragma unroll
        for (int b = 0; b < BITS; ++b) {
            const unsigned word = planes[b][piece / 4 * 2 + half];
            if (b < 3)
                codes |= shifted(word, b - piece % 4) & (0x11111111 << b);
            else
                which = (shifted(word, 2 - piece % 4) & 0x44444444) | 0x32103210;
        }
    }
};

// The codes of a warp's ROWS rows of tiles, `count` tiles of each from `first` on, on their way through its part of shared memory,
// [STAGES, ROWS, BITS, 32] times 16 bytes. A lane copies what it will read, so that none waits for another.
template <int BITS, int ROWS, int STAGES>
struct Stream {
    static constexpr int STAGE = ROWS * BITS * 32, WORDS = STAGES * STAGE;  // of 16 bytes, a warp
    const uint4* tiles[ROWS];  // to ask for next
    uint4* mine;
    int left, to, at;  // tiles that were not asked for; where the next is copied to and where the next to load is

    __device__ void start(const Weight& weight, int first_row, uint4* all, int first, int count) {
        mine = all + threadIdx.x / 32 * WORDS + threadIdx.x % 32;
        left = count, to = at = 0;
#pragma unroll
        for (int r = 0; r < ROWS; ++r) tiles[r] = weight.tile_row(first_row + r, BITS) + first * BITS * 32;
    }

    __device__ static int after(int place) { return place + STAGE == WORDS ? 0 : place + STAGE; }

    __device__ void ask() {
        if (left-- > 0)
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
#pragma unroll
                for (int b = 0; b < BITS; ++b) copy_16_bytes(mine + to + (r * BITS + b) * 32, tiles[r] + b * 32);
                tiles[r] += BITS * 32;
            }
        to = after(to);
    }

    __device__ void load(Words<BITS> (&words)[ROWS]) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) words[r].load(mine + at + r * BITS * 32);
        at = after(at);
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

    // The levels of four codes, as two pairs: by the low 16 bits of the selectors.
    __device__ void look_up(unsigned codes, unsigned which, unsigned& first, unsigned& second) const {
        const unsigned lows = pick(low, codes, which), highs = pick(high, codes, which);
        first = permute(lows, highs, 0x5140);
        second = permute(lows, highs, 0x7362);
    }
};

// A lane's two tables, of rows g and g + 8; affine: those of a group, renewed where another one begins.
template <int BITS, bool BF16, bool AFFINE>
struct Decoder {
    Table<BITS> first, second;
    int row, group, next, group_size;
    uint16 scale[2];  // of group `next`, which is asked for a piece early
    uint8 zero[2];

    __device__ void start(const Weight& weight, int tile_row) {
        row = tile_row * TILE_ROWS + threadIdx.x % 32 / 4;
        group = next = -1;
        group_size = weight.I / weight.G;
        if (AFFINE) return;
        first.load(weight.levels + (long long)min(row, weight.O - 1) * Table<BITS>::K);
        second.load(weight.levels + (long long)min(row + 8, weight.O - 1) * Table<BITS>::K);
    }

    // The group of `column`. A piece of a lane's columns lies in one: sizes are multiples of 16.
    __device__ void ask(const Weight& weight, int column) {
        if (!AFFINE) return;
        const int number = column < weight.I ? column / group_size : weight.G - 1;
        if (number == next) return;
        next = number;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const long long at = (long long)min(row + 8 * half, weight.O - 1) * weight.G + number;
            scale[half] = weight.scale[at];
            zero[half] = weight.zero[at];
        }
    }

    __device__ void renew() {
        if (!AFFINE || next == group) return;
        group = next;
        first.template compute<BF16>(from_half(scale[0]), zero[0]);
        second.template compute<BF16>(from_half(scale[1]), zero[1]);
    }

    // A's fragments for a piece: its first and its last four columns.
    __device__ void fragments(const Words<BITS>& words, int piece, unsigned (&a)[2][4]) const {
        unsigned codes, which;
        words.selectors(piece, 0, codes, which);
        first.look_up(codes, which, a[0][0], a[0][2]);
        first.look_up(upper_half(codes), upper_half(which), a[1][0], a[1][2]);
        words.selectors(piece, 1, codes, which);
        second.look_up(codes, which, a[0][1], a[0][3]);
        second.look_up(upper_half(codes), upper_half(which), a[1][1], a[1][3]);
    }
};

// --- one token, by counting bits --------------------------------------------------------------------------------------

// x is a sign and an integer of 16 bits, times a unit: two groups of 8 planes, the columns of two B.
const int GROUPS = 2, PLANES_WORDS = GROUPS * 64 + 8;  // of a tile; the 8 are the signs, two words for each t
const float LARGEST = 65535, ROUND = 8388608;  // 2^23: a float from it to twice as much has the integer in its lower bits
// That suffices where x's largest element is not above so many times the mean of all sizes: the integers' error is some crest 2^-18 of a
// y of elements like the mean, as in rows whose weights are small where x is large, and y's own rounding 2^-12.3, or 2^-9.3. Of other x
// what the integers leave is multiplied, too: 5 % of a small model's tokens for q, k and v in float16, 7 % for down, few others.
constexpr __device__ float crest(bool bf16) { return bf16 ? 512 : 64; }
// Tiles whose codes a warp has under way or at work: 8 KB, or a little less.
constexpr __device__ int gemv_stages(int bits) { return bits == 4 ? 4 : bits == 3 ? 5 : 8; }

// words[i], byte b, bit r -> words[r], byte b, bit i.
__device__ void transpose_bits(unsigned (&words)[8]) {
#pragma unroll
    for (int step = 2; step >= 0; --step) {
        const int by = 1 << step;
        const unsigned low = by == 4 ? 0x0f0f0f0f : by == 2 ? 0x33333333 : 0x55555555;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (i & by) continue;
            const unsigned a = words[i], b = words[i + by];
            words[i] = (a & low) | (b << by & ~low);
            words[i + by] = (a >> by & low) | (b & ~low);
        }
    }
}

// A task of a block's threads: 32 columns of x, 128 (task / 4) + 32 s + 8 (task % 4) + 0 .. 7, which are a word of each plane.
struct Task {
    uint4 pieces[4];  // by s

    __device__ void load(const uint16* x, int task) {
#pragma unroll
        for (int s = 0; s < 4; ++s) pieces[s] = ((const uint4*)x)[task / 4 * 16 + 4 * s + task % 4];
    }

    __device__ unsigned pair(int s, int i) const {
        return i == 0 ? pieces[s].x : i == 1 ? pieces[s].y : i == 2 ? pieces[s].z : pieces[s].w;
    }

    // The bits of the largest |x|: NaN is more than infinity.
    __device__ unsigned largest() const {
        unsigned most = 0;
#pragma unroll
        for (int i = 0; i < 16; ++i) most = max(most, max(pair(i / 4, i % 4) & 0x7fff, pair(i / 4, i % 4) >> 16 & 0x7fff));
        return most;
    }

    template <bool BF16>
    __device__ float value(int s, int e) const {
        return from_bits<BF16>((uint16)(pair(s, e / 2) >> 16 * (e % 2)));
    }

    template <bool BF16>
    __device__ float sum_of_sizes() const {
        float sums[4] = {};
#pragma unroll
        for (int i = 0; i < 32; ++i) sums[i / 8] += fabsf(value<BF16>(i / 8, i % 8));
        return sums[0] + sums[1] + (sums[2] + sums[3]);
    }

    // Its word of every plane, from `planes` of its tile on; adds x, in units, and the integers to `sums`. Or, REST, the integers of
    // what they leave, in a finer unit.
    template <bool BF16, bool REST>
    __device__ void write(unsigned* planes, int task, float per_unit, float (&sums)[2]) const {
        unsigned integers[32], signs = 0;  // by the bit that they get in a word
        float parts[2][4] = {};
#pragma unroll
        for (int bit = 31; bit >= 0; --bit) {  // 16 q + 4 j + s
            const float scaled = value<BF16>(bit % 4, bit / 16 * 4 + bit / 4 % 4) * per_unit;
            float left = scaled;
            if (REST) {
                const float size = fabsf(scaled), over = (size - (size + ROUND - ROUND)) * (2 * LARGEST);
                left = scaled < 0 ? -over : over;
            }
            signs = signs << 1 | __float_as_uint(left) >> 31;
            integers[bit] = __float_as_uint(fabsf(left) + ROUND);
            if (!REST) parts[0][bit % 4] += scaled;
            parts[1][bit % 4] += __uint_as_float(integers[bit]) - ROUND;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) sums[i] += parts[i][0] + parts[i][1] + (parts[i][2] + parts[i][3]);
        const int half = task / 4 % 2, t = task % 4;
        planes[GROUPS * 64 + 2 * t + half] = signs;
#pragma unroll
        for (int group = 0; group < GROUPS; ++group) {
            unsigned words[8];
            const unsigned pick = group | (4 + group) << 4;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const unsigned low = permute(integers[i], integers[8 + i], pick), high = permute(integers[16 + i], integers[24 + i], pick);
                words[i] = permute(low, high, 0x5410);
            }
            transpose_bits(words);
#pragma unroll
            for (int plane = 0; plane < 8; ++plane) planes[(group * 32 + 4 * plane + t) * 2 + half] = words[plane];
        }
    }
};

// The sum of what the warps of a block of lut_gemv put there.
__device__ float sum_of_warps(const float* scratch) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < GEMV_WARPS; ++i)
        if (i < (int)blockDim.x / 32) sum += scratch[i];
    return sum;
}

// The unit of x's integers, for x [I], whole tiles of columns; and whether they leave a rest that counts. All threads of a block, which
// get their first task, too; scratch [2, GEMV_WARPS].
template <bool BF16>
__device__ float unit_of(const uint16* x, int tasks, float* scratch, Task& task, bool& rest) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, last = (tasks - 1 - (int)threadIdx.x) / (int)blockDim.x;
    unsigned most = 0;
    float sizes = 0;
#pragma unroll 1
    for (int at = threadIdx.x + last * blockDim.x; at >= 0 && at < tasks; at -= blockDim.x) {
        task.load(x, at);
        most = max(most, task.largest());
        sizes += task.template sum_of_sizes<BF16>();
    }
    most = __reduce_max_sync(FULL_WARP, most);
    for (int by = 16; by; by /= 2) sizes += __shfl_sync(FULL_WARP, sizes, lane ^ by);
    if (lane == 0) scratch[warp] = __uint_as_float(most), scratch[GEMV_WARPS + warp] = sizes;
    __syncthreads();
    most = __reduce_max_sync(FULL_WARP, lane < (int)blockDim.x / 32 ? __float_as_uint(scratch[lane]) : 0);
    const float largest = from_bits<BF16>((uint16)most);
    rest = largest * (32 * tasks) > crest(BF16) * sum_of_warps(scratch + GEMV_WARPS);
    const float finite = largest - largest == 0 ? largest : __uint_as_float(0x7fffffff);  // with NaN or infinity in x all is NaN
    return (largest < 1e-30f ? 1e-30f : finite) / LARGEST;
}

// The planes of x, whose unit is 1 / per_unit, or of the rest: [GROUPS, 32 lanes, 2 words] every PLANES_WORDS, the fragments of B; a
// column is a plane, and the order of bits in a word is that of the codes. Returns in `sums` what this thread's tasks added. All threads
// of a block, which have loaded their first task.
template <bool BF16>
__device__ void write_planes(const uint16* x, unsigned* planes, int tasks, Task& task, float per_unit, bool rest, float (&sums)[2]) {
    sums[0] = sums[1] = 0;
#pragma unroll 1
    for (int at = threadIdx.x; at < tasks; at += blockDim.x) {
        unsigned* to = planes + at / 8 * PLANES_WORDS;
        if (rest)
            task.template write<BF16, true>(to, at, per_unit, sums);
        else
            task.template write<BF16, false>(to, at, per_unit, sums);
        if (at + (int)blockDim.x < tasks) task.load(x, at + blockDim.x);
    }
    __syncthreads();
}

constexpr __device__ int lowest_bit(int i) { return i & 1 ? 0 : i & 2 ? 1 : i & 4 ? 2 : 3; }

// From one row's levels to the next's in shared memory, floats: in 16-byte pieces, on all banks.
constexpr __device__ int levels_apart(int bits) { return (1 << bits) + 4; }

// The levels of a row of tiles in shared memory, [16, APART] floats, each row a lane's: first as they are; then as what the head of this
// file calls h, times -2 but for the first, and after them the sum of the others.
template <int BITS, bool BF16>
struct Expansion {
    static const int K = 1 << BITS, APART = levels_apart(BITS), WORDS = TILE_ROWS * APART;

    static __device__ void ask(const Weight& weight, int tile_row, float* to) {
        const int lane = threadIdx.x % 32;
        const uint16* from = weight.levels + (long long)min(tile_row * TILE_ROWS + lane, weight.O - 1) * K;
        if (lane >= TILE_ROWS) return;
        if (K == 4) copy_8_bytes(to + lane * APART, from);
#pragma unroll
        for (int i = 0; i < K / 8; ++i) copy_16_bytes(to + lane * APART + 4 * i, from + 8 * i);
    }

    static __device__ void expand(float* to) {
        to += threadIdx.x % 32 * APART;
        float h[K];
        if (threadIdx.x % 32 < TILE_ROWS) {
#pragma unroll
            for (int i = 0; i < K; ++i) h[i] = from_bits<BF16>((uint16)(((const unsigned*)to)[i / 2] >> 16 * (i % 2)));
            const float first = h[0];
#pragma unroll
            for (int bit = 0; bit < BITS; ++bit)
#pragma unroll
                for (int i = 0; i < K; ++i) {
                    if (i >> bit & 1) continue;
                    const int other = i | 1 << bit;
                    const float a = h[i], b = h[other];
                    h[i] = a + b, h[other] = a - b;
                }
#pragma unroll
            for (int i = 0; i < K; ++i) to[i] = h[i] * (i ? -2.f / K : 1.f / K);
            to[K] = first - to[0];
        }
        __syncwarp();
    }
};

// Counts of ones in parity & plane, for a row of tiles' part in one warp: rows g and g + 8, planes 2 t and 2 t + 1 of each group. A
// column's parity is that of a subset of its code's bits and its sign.
template <int BITS>
struct Counts {
    static const int K = 1 << BITS;
    int counts[K][GROUPS][4];  // by the subset; those of plane 2 t with ROUND's bits, so that sums are a float's. None of the empty subset

    __device__ void start() {
#pragma unroll
        for (int group = 0; group < GROUPS; ++group)
#pragma unroll
            for (int i = 0; i < K * 4; ++i) counts[i / 4][group][i % 4] = i % 2 ? 0 : __float_as_int(ROUND);
    }

    __device__ void add(const Words<BITS>& words, const unsigned* planes) {
        uint2 b[GROUPS];
#pragma unroll
        for (int group = 0; group < GROUPS; ++group) b[group] = ((const uint2*)planes)[group * 32 + threadIdx.x % 32];
        const uint2 signs = ((const uint2*)planes)[GROUPS * 32 + threadIdx.x % 4];
        unsigned parity[4] = {signs.x, signs.x, signs.y, signs.y};
#pragma unroll
        for (int i = 1; i < K; ++i) {  // subsets in the order of Gray's code: one bit more or less each time
#pragma unroll
            for (int word = 0; word < 4; ++word) parity[word] ^= words.planes[lowest_bit(i)][word];
#pragma unroll
            for (int group = 0; group < GROUPS; ++group) count_common_ones(counts[i ^ i / 2][group], parity, b[group]);
        }
    }

    // For rows g and g + 8, in units and in all four lanes of g: what the sums of all columns lack, from `Expansion`'s h of the rows.
    __device__ void finish(const float* h, float (&y)[2]) const {
        const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float* row = h + (g + 8 * half) * levels_apart(BITS);
            float sums[GROUPS] = {};
#pragma unroll
            for (int i = 0; i < K; i += 4) {
                const uint4 four = *(const uint4*)(row + i);
                const float factors[4] = {
                    __uint_as_float(four.x), __uint_as_float(four.y), __uint_as_float(four.z), __uint_as_float(four.w)};
#pragma unroll
                for (int j = i ? 0 : 1; j < 4; ++j)
#pragma unroll
                    for (int group = 0; group < GROUPS; ++group) {
                        const int* pair = counts[i + j][group] + 2 * half;
                        sums[group] += factors[j] * (__int_as_float(pair[0] + 2 * pair[1]) - ROUND);
                    }
            }
            float sum = (sums[0] + 256 * sums[1]) * (1 << 2 * t);
            sum += __shfl_sync(FULL_WARP, sum, lane ^ 1);
            y[half] = sum + __shfl_sync(FULL_WARP, sum, lane ^ 2);
        }
    }
};

// Of tiles begin .. end - 1 of a row of tiles, the next ones of the stream, with x's planes of all tiles.
template <int BITS, int STAGES>
__device__ Counts<BITS> count_tiles(Stream<BITS, 1, STAGES>& codes, const unsigned* planes, int begin, int end) {
    Counts<BITS> counts;
    counts.start();
    for (int k = begin; k < end; ++k) {
        Words<BITS> words[1];
        codes.ask();
        end_of_copies();
        wait_for_copies<STAGES - 1>();
        codes.load(words);
        counts.add(words[0], planes + k * PLANES_WORDS);
    }
    wait_for_copies<STAGES - 1>();  // for levels, if there are no tiles
    return counts;
}

// y [O] = W x + bias, for x [I] with whole tiles of columns, zeros beyond I. A block has `teams` times `rows` rows of tiles, which share
// the planes of x; the warps of a team share the columns' tiles. Where each has but one, it has `rows` rows of tiles one after the
// other, as they lie in memory, else rows is 1. Shared memory: planes, PLANES_WORDS for each tile of columns; of each warp its stream,
// and levels, sums and results [rows, 16] (floats); and scratch.
template <int BITS, bool BF16>
__device__ void lut_gemv(const Weight& weight, const uint16* x, const uint16* bias, uint16* y, int teams, int rows) {
    using Levels = Expansion<BITS, BF16>;
    const int STAGES = gemv_stages(BITS);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32, members = warps / teams;
    const int count = weight.tiles_a_row(), each = (count + members - 1) / members;
    const int begin = min(warp / teams * each, count), end = min(begin + each, count);
    const int row = (blockIdx.x * teams + warp % teams) * rows, own = min(rows, weight.last_tile_row() + 1 - row);
    const int sums_a_row = warps * TILE_ROWS;
    unsigned* planes = (unsigned*)shared_memory;
    uint4* streams = (uint4*)(planes + count * PLANES_WORDS);
    float* levels = (float*)(streams + warps * Stream<BITS, 1, STAGES>::WORDS);
    float *sums = levels + warps * rows * Levels::WORDS, *results = sums + rows * sums_a_row, *scratch = results + rows * sums_a_row;
    Stream<BITS, 1, STAGES> codes;
#pragma unroll 1
    for (int r = 0; r < own; ++r) Levels::ask(weight, row + r, levels + (warp * rows + r) * Levels::WORDS);
    end_of_copies();
    auto start = [&] {
        codes.start(weight, row, streams, begin, max(own, 0) * (end - begin));
#pragma unroll
        for (int k = 1; k < STAGES; ++k) codes.ask(), end_of_copies();
    };
    start();
    take_turn();
    Task task;
    bool has_rest;
    float unit = unit_of<BF16>(x, 8 * count, scratch, task, has_rest), of_x[2];
#pragma unroll 1
    for (bool rest = false;; rest = true) {
        write_planes<BF16>(x, planes, 8 * count, task, 1 / unit, rest, of_x);
#pragma unroll 1
        for (int r = 0; r < own; ++r) {
            const Counts<BITS> counts = count_tiles<BITS>(codes, planes, begin, end);
            float *h = levels + (warp * rows + r) * Levels::WORDS, *to = sums + r * sums_a_row + warp * TILE_ROWS + lane / 4, part[2];
            if (!rest) Levels::expand(h);
            counts.finish(h, part);
            if (lane % 4 == 0) to[0] = part[0], to[8] = part[1];
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            for (int by = 16; by; by /= 2) of_x[i] += __shfl_sync(FULL_WARP, of_x[i], lane ^ by);
            if (lane == 0) scratch[i * GEMV_WARPS + warp] = of_x[i];
        }
        __syncthreads();
        of_x[0] = sum_of_warps(scratch), of_x[1] = sum_of_warps(scratch + GEMV_WARPS);
        if (rest) unit /= 2 * LARGEST;
#pragma unroll 1
        for (int at = threadIdx.x; at < teams * rows * TILE_ROWS; at += blockDim.x) {
            const int out = blockIdx.x * teams * rows * TILE_ROWS + at, tile = at / TILE_ROWS, team = tile / rows, r = tile % rows;
            if (out >= weight.O) continue;
            const float* h = levels + tile * Levels::WORDS + at % TILE_ROWS * Levels::APART;
            float sum = h[0] * of_x[0] + h[Levels::K] * of_x[1];
            for (int member = 0; member < members; ++member)
                sum += sums[r * sums_a_row + (member * teams + team) * TILE_ROWS + at % TILE_ROWS];
            const float result = unit * sum + (rest ? results[at] : bias ? from_bits<BF16>(bias[out]) : 0);
            if (has_rest && !rest)
                results[at] = result;
            else
                y[out] = to_bits<BF16>(result);
        }
        if (rest || !has_rest) return;
        __syncthreads();
        start();
        task.load(x, min((int)threadIdx.x, 8 * count - 1));
    }
}

// --- more tokens, by looking levels up --------------------------------------------------------------------------------

const int COPIES = BY_SHUFFLES ? 1 : 2;  // of tiles of x in shared memory, and of the codes that go with them
constexpr __device__ int gemm_stages(int tokens) { return tokens > 1 ? COPIES : 3; }
const int SUMS = TILE_ROWS + 4;  // floats from a token's sums to the next, so that a warp stores to all banks

// Where a tile's 16 bytes of x from a column on lie, from a token's first: odd tokens' are exchanged by halves of 128 bytes, so that
// the eight lanes that are served at a time, of two tokens, read from all banks.
__device__ int place_of(int column, int token) { return 2 * column ^ (token & 1) << 6; }

// y [N, O] = x W^T + bias for N <= 8 TOKENS. x [N, whole tiles of columns], zeros beyond I; lanes of other tokens read the last one
// again. A warp takes ROWS rows of tiles, so that x is read once for them; a thread block `teams` times as many. The warps of a team
// share the columns' tiles, and so do gridDim.y blocks. For more than 8 tokens x goes through shared memory, COPIES [8 TOKENS, 256], and
// all warps are of teams of their own; then come the warps' streams. Warps add up in shared memory too, [warps, ROWS, 8 TOKENS, SUMS]
// floats, blocks through partial [gridDim.y, N, O], which add_up reads.
template <int BITS, bool BF16, bool AFFINE, int TOKENS, int ROWS>
__device__ void lut_gemm(const Weight& weight, const uint16* x, const uint16* bias, uint16* y, float* partial, int N, int teams) {
    const bool shared_x = TOKENS > 1, EARLY = !shared_x && !AFFINE;
    const int AHEAD = gemm_stages(TOKENS) - 1, X_BYTES = shared_x ? 8 * TOKENS * 2 * TILE_COLUMNS : 0;  // of a copy
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, warps = blockDim.x / 32;
    const int count = weight.tiles_a_row(), width = count * TILE_COLUMNS;
    const int members = warps / teams, parts = members * gridDim.y, each = (count + parts - 1) / parts;
    const int begin = min((blockIdx.y * members + warp / teams) * each, count), end = min(begin + each, count);
    const int block_row = blockIdx.x * teams * ROWS, first = block_row + warp % teams * ROWS;
    Stream<BITS, ROWS, AHEAD + 1> codes;
    Decoder<BITS, BF16, AFFINE> decoders[ROWS];
    const int CHAINS = shared_x ? 1 : 4;  // of products that do not wait for each other
    float sums[CHAINS][ROWS][TOKENS][4] = {};
    auto ask = [&](int k) {
        codes.ask();
        char* to = shared_memory + (k - begin) % COPIES * X_BYTES;
        for (int i = threadIdx.x; shared_x && k < end && i < 8 * TOKENS * TILE_COLUMNS / PIECE; i += blockDim.x) {
            const int token = i / (TILE_COLUMNS / PIECE), column = i % (TILE_COLUMNS / PIECE) * PIECE;
            const uint16* from = x + (long long)min(token, N - 1) * width + k * TILE_COLUMNS + column;
            copy_16_bytes(to + token * 2 * TILE_COLUMNS + place_of(column, token), from);
        }
        end_of_copies();
    };
    auto read_x = [&](int n, int k, int piece) {
        const int token = 8 * n + g;
        if (!shared_x) return *(const uint4*)(x + (long long)min(token, N - 1) * width + column_of(k, piece));
        const char* copy = shared_memory + (k - begin) % COPIES * X_BYTES;
        return *(const uint4*)(copy + token * 2 * TILE_COLUMNS + place_of(column_of(0, piece), token));
    };
    codes.start(weight, first, (uint4*)(shared_memory + COPIES * X_BYTES), begin, end - begin);
    if (shared_x) take_turn();
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) ask(begin + k);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        decoders[r].start(weight, min(first + r, weight.last_tile_row()));
        decoders[r].ask(weight, column_of(begin, 0));
    }
    auto products = [&](int k, int piece, const unsigned (&a)[ROWS][2][4]) {
#pragma unroll
        for (int n = 0; n < TOKENS; ++n) {
            const uint4 b = read_x(n, k, piece);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                multiply<BF16>(sums[2 * piece % CHAINS][r][n], a[r][0], b.x, b.y);
                multiply<BF16>(sums[(2 * piece + 1) % CHAINS][r][n], a[r][1], b.z, b.w);
            }
        }
    };
    auto next_tile = [&](int k, Words<BITS> (&words)[ROWS]) {
        ask(k + AHEAD);
        wait_for_copies<AHEAD>();
        if (shared_x) __syncthreads();
        codes.load(words);
    };
    if (EARLY) {  // the first tile's levels are looked up while the kernel before is at work
        Words<BITS> words[ROWS];
        unsigned a[PIECES][ROWS][2][4];
        next_tile(begin, words);
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece) decoders[0].fragments(words[0], piece, a[piece][0]);
        let_next_begin();  // what it does before its turn is short, and mostly on other multiprocessors
        wait_for_turn();
#pragma unroll
        for (int piece = 0; piece < PIECES && begin < end; ++piece) products(begin, piece, a[piece]);
    } else if (!shared_x)
        take_turn();
    for (int k = EARLY ? begin + 1 : begin; k < end; ++k) {
        Words<BITS> words[ROWS];
        next_tile(k, words);
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece) {
            unsigned a[ROWS][2][4];
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                decoders[r].renew();
                decoders[r].ask(weight, column_of(k, piece + 1));
                decoders[r].fragments(words[r], piece, a[r]);
            }
            products(k, piece, a);
        }
        if (shared_x) __syncthreads();
    }
    __syncthreads();  // what is added up lies where the streams were
    float* all = (float*)shared_memory;  // [warps, ROWS, 8 TOKENS, SUMS]
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int n = 0; n < TOKENS; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float sum = sums[0][r][n][i];
#pragma unroll
                for (int chain = 1; chain < CHAINS; ++chain) sum += sums[chain][r][n][i];
                all[((warp * ROWS + r) * 8 * TOKENS + 8 * n + 2 * t + i % 2) * SUMS + g + i / 2 * 8] = sum;
            }
    __syncthreads();
    const int block_rows = teams * ROWS * TILE_ROWS;
    for (int at = threadIdx.x; at < 8 * TOKENS * block_rows; at += blockDim.x) {
        const int token = at / block_rows, in_block = at % block_rows, row = block_row * TILE_ROWS + in_block;
        if (token >= N || row >= weight.O) continue;
        float sum = bias && !partial ? from_bits<BF16>(bias[row]) : 0;
        for (int member = 0; member < members; ++member)
            sum += all[((member * teams * ROWS + in_block / TILE_ROWS) * 8 * TOKENS + token) * SUMS + in_block % TILE_ROWS];
        if (partial)
            partial[((long long)blockIdx.y * N + token) * weight.O + row] = sum;
        else
            y[(long long)token * weight.O + row] = to_bits<BF16>(sum);
    }
}

// --- more tokens, on Hopper -------------------------------------------------------------------------------------------

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDACC_RTC__)
const int STAGE_COLUMNS = 64, STAGES = TILE_COLUMNS / STAGE_COLUMNS;  // of x: a token's 128 bytes; in a tile
const int CODE_STAGES = 3;  // tiles of codes that a warp has under way or at work
const int WIDE_WARPS = 8;   // two warpgroups

// B of multiply_in_background: tokens' 128 bytes, one after the other, as the products expect them where 16-byte units are exchanged
// among eight tokens ("128-byte swizzle", groups of eight tokens 1024 bytes apart). `step` of 16 columns.
__device__ unsigned long long matrix(unsigned address, int step) {
    return 1ull << 62 | 64ull << 32 | 1ull << 16 | (address + 32 * step) >> 4;
}

// x [N, I] as lut_wide wants it in shared memory, images [blocks of `tokens`, stages, tokens, 128 bytes], zeros where x has nothing; a
// thread writes 16 bytes. Columns are in the order of the products, which is that of the lanes' fragments: source unit 4 i + t of a
// token's stage is columns 32 i + 8 t and on; its word w becomes word t of unit 4 i + w.
__device__ void arrange_x(const uint16* x, uint16* images, int N, int I, int tokens) {
    const int unit = threadIdx.x % 8, token = blockIdx.y * (blockDim.x / 8) + threadIdx.x / 8, stage = blockIdx.x;
    const int first = stage * STAGE_COLUMNS + unit / 4 * 32 + unit % 4 * 2;
    unsigned words[4] = {};
    take_turn();
    if (token >= (N + tokens - 1) / tokens * tokens) return;
    const uint16* from = x + (long long)token * I + first;
#pragma unroll
    for (int t = 0; t < 4; ++t) {
        const int left = token < N ? I - first - PIECE * t : 0;
        if (left > 1 && I % 2 == 0)
            words[t] = *(const unsigned*)(from + PIECE * t);
        else if (left > 0)
            words[t] = from[PIECE * t] | (left > 1 ? from[PIECE * t + 1] << 16 : 0);
    }
    uint4* image = (uint4*)images + (((long long)(token / tokens) * gridDim.x + stage) * tokens + token % tokens) * 8;
    image[unit ^ token % 8] = make_uint4(words[0], words[1], words[2], words[3]);
}

// Images of x on their way through shared memory, a ring of slots. Thread 0 asks for one AHEAD stages before its use, and so some stages
// after its slot's last: by then all warps should have released it.
template <int TOKENS>
struct Ring {
    static constexpr int BYTES = TOKENS * 2 * STAGE_COLUMNS, SLOTS = TOKENS > 128 ? 5 : 8, AHEAD = 2 * SLOTS / 3;
    Barrier *full, *empty;
    const char* images;
    int stages;

    __device__ void start(Barrier* barriers, const uint16* from, int count) {
        full = barriers, empty = barriers + SLOTS, images = (const char*)from, stages = count;
        if (threadIdx.x == 0)
            for (int slot = 0; slot < SLOTS; ++slot) start_barrier(full + slot, 1), start_barrier(empty + slot, WIDE_WARPS);
    }

    __device__ void ask(int stage) const {
        if (threadIdx.x || stage >= stages) return;
        const int slot = stage % SLOTS, round = stage / SLOTS;
        if (round) wait_for_phase(empty + slot, round - 1);
        expect_bytes(full + slot, BYTES);
        copy_in_background(shared_memory + slot * BYTES, images + (long long)stage * BYTES, BYTES, full + slot);
    }

    __device__ unsigned wait(int stage) const {
        wait_for_phase(full + stage % SLOTS, stage / SLOTS);
        return shared_address(shared_memory) + stage % SLOTS * BYTES;
    }

    __device__ void release(int stage) const {
        if (threadIdx.x % 32 == 0) arrive(empty + stage % SLOTS);
    }
};

// y [N, O] = x W^T + bias, TOKENS of them a block, and 128 rows, for the images of x. A block has two warpgroups, a warp a row of tiles;
// gridDim.y blocks share the columns and then write partial [gridDim.y, N, O] for add_up. Levels are looked up into A's registers while
// the tensor cores are at work on the piece before; warps meet in the ring alone. Shared memory: the ring, the warps' streams, the ring's
// barriers; at the end y [TOKENS, 128 rows and a gap].
template <int BITS, bool BF16, int TOKENS>
__device__ void lut_wide(const Weight& weight, const uint16* images, const uint16* bias, uint16* y, float* partial, int N) {
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, blocks = (N + TOKENS - 1) / TOKENS;
    const int first_token = blockIdx.x % blocks * TOKENS, tile_row = blockIdx.x / blocks * WIDE_WARPS + warp;
    const int count = weight.tiles_a_row(), each = (count + gridDim.y - 1) / gridDim.y;
    const int begin = min(blockIdx.y * each, count), end = min(begin + each, count);
    Stream<BITS, 1, CODE_STAGES> codes;
    Decoder<BITS, BF16, false> decoder;
    Ring<TOKENS> ring;
    float c[TOKENS / 2] = {};
    unsigned a[2][2][4] = {};
    uint4* streams = (uint4*)(shared_memory + ring.SLOTS * ring.BYTES);
    const long long first_stage = ((long long)(blockIdx.x % blocks) * count + begin) * STAGES;
    ring.start((Barrier*)(streams + WIDE_WARPS * codes.WORDS), images + first_stage * (ring.BYTES / 2), (end - begin) * STAGES);
    codes.start(weight, tile_row, streams, begin, end - begin);
#pragma unroll
    for (int k = 0; k < CODE_STAGES - 1; ++k) codes.ask(), end_of_copies();
    decoder.start(weight, min(tile_row, weight.last_tile_row()));
    take_turn();
    __syncthreads();
    show_to_copies();
    for (int stage = 0; stage < ring.SLOTS; ++stage) ring.ask(stage);
    for (int k = begin, stage = 0; k < end; ++k) {
        Words<BITS> words[1];
        codes.ask();
        end_of_copies();
        wait_for_copies<CODE_STAGES - 1>();
        codes.load(words);
#pragma unroll
        for (int quarter = 0; quarter < STAGES; ++quarter, ++stage) {
            unsigned address;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                wait_for_products<1>();
#pragma unroll
                for (int i = 0; i < 8; ++i) keep(a[half][i / 4][i % 4]);
                if (half == 1 && stage > 0) ring.release(stage - 1);  // of which the last products were those waited for
                decoder.fragments(words[0], 2 * quarter + half, a[half]);
                if (half == 0) address = ring.wait(stage);
                if (half == 0 && stage >= ring.SLOTS - ring.AHEAD) ring.ask(stage + ring.AHEAD);  // a branch, which half 1 must not have
                begin_products();
                multiply_in_background<BF16>(c, a[half][0], matrix(address, 2 * half));
                multiply_in_background<BF16>(c, a[half][1], matrix(address, 2 * half + 1));
                end_of_products();
            }
        }
    }
    wait_for_products<0>();
#pragma unroll
    for (int i = 0; i < TOKENS / 2; ++i) keep(c[i]);
    const int row = tile_row * TILE_ROWS + g;
    if (partial) {
#pragma unroll
        for (int i = 0; i < TOKENS / 2; ++i) {
            const int token = first_token + i / 4 * 8 + 2 * t + i % 2, out = row + i % 4 / 2 * 8;
            if (token < N && out < weight.O) partial[((long long)blockIdx.y * N + token) * weight.O + out] = c[i];
        }
        return;
    }
    const int ROWS = WIDE_WARPS * TILE_ROWS, APART = ROWS + PIECE;
    uint16* all = (uint16*)shared_memory;
    float biases[2] = {};
    for (int half = 0; half < 2; ++half)
        if (bias && row + 8 * half < weight.O) biases[half] = from_bits<BF16>(bias[row + 8 * half]);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < TOKENS / 2; ++i)
        all[(i / 4 * 8 + 2 * t + i % 2) * APART + warp * TILE_ROWS + g + i % 4 / 2 * 8] = to_bits<BF16>(c[i] + biases[i % 4 / 2]);
    __syncthreads();
    for (int at = threadIdx.x; at < TOKENS * ROWS / PIECE; at += blockDim.x) {
        const int token = first_token + at / (ROWS / PIECE), in_block = at % (ROWS / PIECE) * PIECE;
        const int out = blockIdx.x / blocks * ROWS + in_block;
        if (token >= N) continue;
        const uint16* piece = all + (token - first_token) * APART + in_block;
        uint16* to = y + (long long)token * weight.O + out;
        if (out + PIECE <= weight.O && weight.O % PIECE == 0)
            *(uint4*)to = *(const uint4*)piece;
        else
            for (int i = 0; i < PIECE && out + i < weight.O; ++i) to[i] = piece[i];
    }
}
#endif

// y [N, O] = the sum of partial [parts, N, O] + bias, an element a thread.
template <bool BF16>
__device__ void add_up(const float* partial, const uint16* bias, uint16* y, int parts, int N, int O) {
    const long long size = (long long)N * O, at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    take_turn();
    if (at >= size) return;
    float sum = bias ? from_bits<BF16>(bias[at % O]) : 0;
    for (int part = 0; part < parts; ++part) sum += partial[part * size + at];
    y[at] = to_bits<BF16>(sum);
}

// A piece of a row of W at `column`, from its fragments; half: of row g or g + 8.
__device__ void store(uint16* row, int column, int I, int half, const unsigned (&a)[2][4]) {
    if (column + PIECE <= I && I % PIECE == 0) {
        *(uint4*)(row + column) = make_uint4(a[0][half], a[0][half + 2], a[1][half], a[1][half + 2]);
        return;
    }
#pragma unroll
    for (int i = 0; i < PIECE; ++i)
        if (column + i < I) row[column + i] = a[i / 4][half + i % 4 / 2 * 2] >> (16 * (i % 2));
}

// Rows of W from `first_row` on, [rows, I]: a tile a warp, in 16-byte pieces where rows allow it.
template <int BITS, bool BF16, bool AFFINE>
__device__ void dequantize(const Weight& weight, uint16* out, int first_row, int rows) {
    const int k = blockIdx.y * WARPS + threadIdx.x / 32, tile_row = first_row / TILE_ROWS + blockIdx.x;
    if (k >= weight.tiles_a_row()) return;
    Words<BITS> words;
    words.load(weight.tile_row(tile_row, BITS) + k * BITS * 32);
    Decoder<BITS, BF16, AFFINE> decoder;
    decoder.start(weight, tile_row);
    decoder.ask(weight, column_of(k, 0));
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
        unsigned a[2][4];
        decoder.renew();
        decoder.ask(weight, column_of(k, piece + 1));
        decoder.fragments(words, piece, a);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = blockIdx.x * TILE_ROWS + threadIdx.x % 32 / 4 + 8 * half;
            if (row < rows) store(out + (long long)row * weight.I, column_of(k, piece), weight.I, half, a);
        }
    }
}

// Most threads of a block. Where products go by shuffles the compiler, told of 128, saves registers and keeps a few bytes in memory.
constexpr __device__ int most_threads(int tokens) { return tokens == 1 ? BY_SHUFFLES ? 256 : 512 : BY_SHUFFLES ? 256 : 128; }

// What kernels take: a weight; a product's vectors, too.
#define WEIGHT const uint4* tiles, const uint16* levels, const uint16* scale, const uint8* zero
#define PRODUCT WEIGHT, const uint16* x, const uint16* bias, uint16* y
#define GEMM(NAME, BITS, BF16, AFFINE, TOKENS, ROWS)                                                                           \
    extern "C" __global__ void __launch_bounds__(most_threads(TOKENS), 1) lut_gemm_##NAME##_##TOKENS(                          \
        PRODUCT, float* partial, int O, int I, int G, int N, int teams) {                                                      \
        lut_gemm<BITS, BF16, AFFINE, TOKENS, ROWS>({tiles, levels, scale, zero, O, I, G}, x, bias, y, partial, N, teams);      \
    }
#define FEW(NAME, BITS, BF16, AFFINE, ROWS)                                                                                    \
    GEMM(NAME, BITS, BF16, AFFINE, 1, 1) GEMM(NAME, BITS, BF16, AFFINE, 2, ROWS)                                               \
    GEMM(NAME, BITS, BF16, AFFINE, 4, ROWS) GEMM(NAME, BITS, BF16, AFFINE, 8, ROWS)                                            \
    extern "C" __global__ void __launch_bounds__(WARPS * 32) dequantize_##NAME(                                                \
        WEIGHT, uint16* out, int O, int I, int G, int first_row, int rows) {                                                   \
        dequantize<BITS, BF16, AFFINE>({tiles, levels, scale, zero, O, I, G}, out, first_row, rows);                           \
    }
#define ADD_UP(NAME, BF16)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) add_up_##NAME(                                                           \
        const float* partial, const uint16* bias, uint16* y, int parts, int N, int O) {                                        \
        add_up<BF16>(partial, bias, y, parts, N, O);                                                                           \
    }
#define ONE(NAME, BITS, BF16)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(BITS == 4 ? 256 : GEMV_WARPS * 32, 1) lut_gemv_##NAME(                        \
        PRODUCT, int O, int I, int G, int teams, int rows) {                                                                   \
        lut_gemv<BITS, BF16>({tiles, levels, scale, zero, O, I, G}, x, bias, y, teams, rows);                                  \
    }
#define WIDE(NAME, BITS, BF16, TOKENS)                                                                                         \
    extern "C" __global__ void __launch_bounds__(WIDE_WARPS * 32, TOKENS > 64 ? 1 : 2) lut_wide_##NAME##_##TOKENS(             \
        PRODUCT, float* partial, int O, int I, int G, int N) {                                                                 \
        lut_wide<BITS, BF16, TOKENS>({tiles, levels, scale, zero, O, I, G}, x, bias, y, partial, N);                           \
    }
#define MANY(LEVELS, SUM, BITS, BF16)                                                                                          \
    WIDE(LEVELS, BITS, BF16, 16) WIDE(LEVELS, BITS, BF16, 64)                                                                  \
    WIDE(LEVELS, BITS, BF16, 128) WIDE(LEVELS, BITS, BF16, 256)                                                                \
    extern "C" __global__ void __launch_bounds__(256) arrange_x_##SUM(                                                         \
        const uint16* x, uint16* images, int N, int I, int tokens) {                                                           \
        arrange_x(x, images, N, I, tokens);                                                                                    \
    }

// What the GPU has a use for: lut_wide, and no other, where the compiler was told of Hopper's own instructions; lut_gemv where tensor
// cores count bits; on the host all.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define KERNELS(LEVELS, AFFINE, SUM, BITS, BF16) MANY(LEVELS, SUM, BITS, BF16)
#else
#define BY_LOOK_UP(LEVELS, AFFINE, SUM, BITS, BF16) \
    FEW(LEVELS, BITS, BF16, false, MOST_ROWS) FEW(AFFINE, BITS, BF16, true, 1) ADD_UP(SUM, BF16)
#if !defined(__CUDACC_RTC__)
#define KERNELS(LEVELS, AFFINE, SUM, BITS, BF16) \
    BY_LOOK_UP(LEVELS, AFFINE, SUM, BITS, BF16) ONE(LEVELS, BITS, BF16) MANY(LEVELS, SUM, BITS, BF16)
#elif __CUDA_ARCH__ >= 800 && __CUDA_ARCH__ < 1000
#define KERNELS(LEVELS, AFFINE, SUM, BITS, BF16) BY_LOOK_UP(LEVELS, AFFINE, SUM, BITS, BF16) ONE(LEVELS, BITS, BF16)
#else
#define KERNELS BY_LOOK_UP
#endif
#endif

// Of one width and type, where ONLY says so: 10 bits + (bfloat16). Compiling takes a while.
#ifndef ONLY
#define ONLY 0
#endif
#define WANTED(BITS, BF16) (ONLY == 0 || ONLY == 10 * BITS + BF16)
#if WANTED(4, 0)
KERNELS(levels_4_half, affine_4_half, 4_half, 4, false)
#endif
#if WANTED(4, 1)
KERNELS(levels_4_bfloat16, affine_4_bfloat16, 4_bfloat16, 4, true)
#endif
#if WANTED(3, 0)
KERNELS(levels_3_half, affine_3_half, 3_half, 3, false)
#endif
#if WANTED(3, 1)
KERNELS(levels_3_bfloat16, affine_3_bfloat16, 3_bfloat16, 3, true)
#endif
#if WANTED(2, 0)
KERNELS(levels_2_half, affine_2_half, 2_half, 2, false)
#endif
#if WANTED(2, 1)
KERNELS(levels_2_bfloat16, affine_2_bfloat16, 2_bfloat16, 2, true)
#endif
