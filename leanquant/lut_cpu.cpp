// Products with packed codes on a CPU, as a file holds them: y = x W^T with W = levels[codes], and W itself.
//
// A register (with AVX2 and 4 bits, two) holds a row's levels, another the codes of LANES columns again and again: each lane shifts its own
// to the lowest bits, and a permutation of the levels looks all of them up. Not here: what a file holds, and when which function is called (lut_cpu.py).
//
// Legend: O rows, I columns, V vectors of LANES columns in a row, N tokens, G groups of columns, K = 2**bits levels.

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <utility>
#include <vector>

#define AT_ONCE __attribute__((always_inline))  // before arrays are given registers: GCC gives none to those whose address is passed then

namespace {

constexpr int64_t ROWS = 8;  // that a thread takes at a time
constexpr int64_t IN_CACHE = 1 << 17;  // numbers of x at a time: half a megabyte stays in a core's second cache

// Codes are read as one number, which each lane or pair of lanes gets. In a pair, the lower half of the number holds the code of the even
// lane and the upper half that of the odd one, 8 columns on. `column(lane)`: which of a vector's columns a lane holds. Numbers in memory
// are in the order of columns, x and W where they are read and written; `to_lanes` and `to_columns` bring them from one order to the other.
#if LANES == 16
using Floats = __m512;
using Words = __m512i;
constexpr int rows_at_once(int tokens) { return tokens <= 2 ? 8 : 4; }  // sums enough not to wait for one another, and registers for all
constexpr int column(int lane) { return lane / 2 + lane % 2 * 8; }
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
inline Floats all(float value) { return _mm512_set1_ps(value); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(Floats v) { return _mm512_reduce_add_ps(v); }
inline Words load_words(const int32_t* p) { return _mm512_loadu_si512(p); }
inline Words shifted(Words v, Words by) { return _mm512_srlv_epi32(v, by); }
inline Words again_and_again(const uint8_t* p) {
    long long number;
    memcpy(&number, p, sizeof number);
    return _mm512_set1_epi64(number);
}
inline Floats to_lanes(Floats v) {
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15), v);
}
inline Floats to_columns(Floats v) {
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15), v);
}
inline Floats from_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Floats from_bfloat16(const uint16_t* p) {
    const Words wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

// What 4 bits are looked up in.
struct Table {
    Floats levels;
    template <typename Read> static Table of(const Read& read) { return {read(0)}; }  // read(i): levels from i on
    template <int BITS> Floats at(Words codes) const { return _mm512_permutexvar_ps(codes, levels); }  // by the lowest 4 bits
};
#else
using Floats = __m256;
using Words = __m256i;
constexpr int rows_at_once(int tokens) { return tokens <= 2 ? 4 : 2; }
constexpr int column(int lane) { return lane; }
inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
inline Floats all(float value) { return _mm256_set1_ps(value); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline float sum(Floats v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline Words load_words(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const Words*>(p)); }
inline Words shifted(Words v, Words by) { return _mm256_srlv_epi32(v, by); }
inline Words again_and_again(const uint8_t* p) {
    int number;
    memcpy(&number, p, sizeof number);
    return _mm256_set1_epi32(number);
}
inline Floats to_lanes(Floats v) { return v; }
inline Floats to_columns(Floats v) { return v; }
inline Floats from_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline Floats from_bfloat16(const uint16_t* p) {
    const Words wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

// What 4 bits are looked up in.
struct Table {
    Floats low, high;
    template <typename Read> static Table of(const Read& read) { return {read(0), read(8)}; }  // read(i): levels from i on
    template <int BITS> Floats at(Words codes) const {  // by the lowest 3 bits and, as a sign, the fourth
        if (BITS < 4) return _mm256_permutevar8x32_ps(low, codes);
        const Floats upper = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, codes), _mm256_permutevar8x32_ps(high, codes), upper);
    }
};
#endif

// As in the file. levels: 16 bits each, [O, K]; or scale [O, G] and zero [O, G].
struct Weight {
    const uint8_t* codes;
    const uint16_t* levels;
    const uint16_t* scale;
    const uint8_t* zero;
    int64_t O, I, G, width;  // width: bytes of a row's codes
    int bits, is_bfloat16;

    int64_t vectors() const { return (I + LANES - 1) / LANES; }

    // The K levels again and again: upper bits of a lane, which belong to other codes, then do not matter.
    Table table(int64_t row, int64_t group) const {
        if (levels) {
            uint16_t sixteen[16];
            for (int first = 0; first < 16; first += 1 << bits) copy_levels(sixteen + first, row);
            return Table::of([&](int i) { return is_bfloat16 ? from_bfloat16(sixteen + i) : from_half(sixteen + i); });
        }
        static const float CODES[3][16] = {
            {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3},
            {0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7},
            {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
        };
        const Floats offset = all(zero[row * G + group]), step = all(number(scale[row * G + group]));
        return Table::of([&](int i) { return (load(CODES[bits - 2] + i) - offset) * step; });
    }

    // K of them, in a size that is known when this is compiled.
    void copy_levels(uint16_t* to, int64_t row) const {
        if (bits == 4) memcpy(to, levels + row * 16, 32);
        if (bits == 3) memcpy(to, levels + row * 8, 16);
        if (bits == 2) memcpy(to, levels + row * 4, 8);
    }

    float number(uint16_t stored) const {
        if (!is_bfloat16) return _cvtsh_ss(stored);
        const uint32_t word = uint32_t(stored) << 16;
        float value;
        memcpy(&value, &word, 4);
        return value;
    }
};

// Codes of BITS in memory (4 also where a weight's are fewer, a nibble each), 8 columns in BITS bytes.
template <int BITS>
struct Codes {
    static constexpr int BYTES = LANES * BITS / 8;             // of a vector
    static constexpr int BEFORE = LANES == 16 ? 4 - BITS : 0;  // bytes read before it, so that its second 8 columns begin the upper half
    Words shifts;

    Codes() {
        int32_t its[LANES];
        for (int lane = 0; lane < LANES; ++lane) {
            const int place = column(lane) % 8, before = column(lane) < 8 ? BEFORE : 0;
            its[lane] = 8 * before + BITS * (BITS == 4 ? place ^ 1 : place);  // the upper half of a byte comes first
        }
        shifts = load_words(its);
    }

    // Those of a vector, each in the lowest bits of its lane.
    Words operator()(const uint8_t* p) const { return shifted(again_and_again(p - BEFORE), shifts); }
};

// Codes of a row, around which bytes may be read that are not its own: its own place, or a copy of it at both ends of the weight.
class Row {
    static constexpr int AROUND = 16;
    std::vector<uint8_t> copy;

public:
    const uint8_t* read(const Weight& weight, int64_t row) {
        const uint8_t* codes = weight.codes + row * weight.width;
        if (row * weight.width >= AROUND && (weight.O - row - 1) * weight.width >= AROUND) return codes;
        copy.assign(weight.width + 2 * AROUND, 0);
        return static_cast<const uint8_t*>(memcpy(copy.data() + AROUND, codes, weight.width));
    }
};

// use(0), ..., use(N - 1), each known when this is compiled, as indices of arrays in registers must be.
template <int... I, typename Use>
AT_ONCE inline void each_of(std::integer_sequence<int, I...>, const Use& use) { (use(std::integral_constant<int, I>()), ...); }
template <int N, typename Use>
AT_ONCE inline void each_below(const Use& use) { each_of(std::make_integer_sequence<int, N>(), use); }

// use(vector, r, LANES values) for R rows from `row` on, vector by vector. What the last has beyond the row is of no weight.
template <int BITS, int R, typename Use>
AT_ONCE inline void each_of_rows(const Weight& weight, int64_t row, const Use& use) {
    const int64_t of_group = weight.G == 1 ? weight.vectors() : weight.I / weight.G / LANES;
    const Codes<BITS> codes;
    Row rows[R];
    const uint8_t* at[R];
    Table tables[R];
    const uint8_t* next = weight.codes + (row + R) * weight.width;  // rows that are read in turns are no stream that a CPU sees coming
    for (int r = 0; r < R; ++r) at[r] = rows[r].read(weight, row + r);
    for (int64_t vector = 0, group = 0; group < weight.G; ++group) {
        each_below<R>([&](auto r) AT_ONCE { tables[r] = weight.table(row + r, group); });
        for (; vector < (group + 1) * of_group; ++vector) {
            _mm_prefetch(reinterpret_cast<const char*>(next + vector * R * Codes<BITS>::BYTES), _MM_HINT_T0);
            each_below<R>([&](auto r) AT_ONCE { use(vector, r, tables[r].template at<BITS>(codes(at[r] + vector * Codes<BITS>::BYTES))); });
        }
    }
}

// y [N, O] = x W^T for R rows from `row` on, x [N, V, LANES] in the order of lanes.
template <int BITS, int R, int N>
void block_products(const Weight& weight, int64_t row, const float* x, float* y) {
    const int64_t V = weight.vectors();
    Floats sums[R][N] = {};
    each_of_rows<BITS, R>(weight, row, [&](int64_t vector, auto r, Floats values) AT_ONCE {
        each_below<N>([&](auto n) AT_ONCE { sums[r][n] = multiply_add(values, load(x + (n * V + vector) * LANES), sums[r][n]); });
    });
    each_below<R>([&](auto r) AT_ONCE { each_below<N>([&](auto n) AT_ONCE { y[n * weight.O + row + r] = sum(sums[r][n]); }); });
}

// Rows `row` to `end`, for any number of tokens: four at a time, then the rest at once.
template <int BITS, int N = 4>
void rows_products(const Weight& weight, int64_t row, int64_t end, const float* x, float* y, int64_t tokens) {
    constexpr int R = rows_at_once(N);
    for (; tokens >= N; tokens -= N, x += N * weight.vectors() * LANES, y += N * weight.O) {
        int64_t next = row;
        for (; next + R <= end; next += R) block_products<BITS, R, N>(weight, next, x, y);
        for (; next < end; ++next) block_products<BITS, 1, N>(weight, next, x, y);
    }
    if constexpr (N > 1)
        if (tokens) rows_products<BITS, N - 1>(weight, row, end, x, y, tokens);
}

struct alignas(4 * LANES) Aligned {  // a load that crosses a cache line takes twice as long
    float lanes[LANES];
};

// I numbers in the order of lanes, with zeros beyond I.
void arrange(const float* x, int64_t I, Aligned* to) {
    for (int64_t first = 0; first < I; first += LANES, ++to) {
        float last[LANES] = {};
        const bool is_whole = first + LANES <= I;
        if (!is_whole) memcpy(last, x + first, (I - first) * sizeof(float));
        store(to->lanes, to_lanes(load(is_whole ? x + first : last)));
    }
}

template <int BITS>
void products(const Weight& weight, const float* x, float* y, int64_t N, int threads) {
    const int64_t V = weight.vectors(), O = weight.O, at_a_time = std::min(N, std::max<int64_t>(4, IN_CACHE / (V * LANES) / 4 * 4));
    std::vector<Aligned> arranged(at_a_time * V);
#pragma omp parallel num_threads(threads)
    for (int64_t first = 0; first < N; first += at_a_time) {
        const int64_t tokens = std::min(at_a_time, N - first);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < tokens; ++n) arrange(x + (first + n) * weight.I, weight.I, &arranged[n * V]);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < O; row += ROWS)
            rows_products<BITS>(weight, row, std::min(row + ROWS, O), arranged.data()->lanes, y + first * O, tokens);
    }
}

template <int BITS>
void rebuild(const Weight& weight, float* W, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < weight.O; ++row)
        each_of_rows<BITS, 1>(weight, row, [&](int64_t vector, int, Floats values) AT_ONCE {
            const int64_t first = vector * LANES;
            float* to = W + row * weight.I + first;
            if (first + LANES <= weight.I) return store(to, to_columns(values));
            float last[LANES];
            store(last, to_columns(values));
            memcpy(to, last, (weight.I - first) * sizeof(float));
        });
}

}  // namespace

#define BY_BITS(function, ...)                    \
    if (code_bits == 4) function<4>(__VA_ARGS__); \
    if (code_bits == 3) function<3>(__VA_ARGS__); \
    if (code_bits == 2) function<2>(__VA_ARGS__);

extern "C" {

// y [N, O] = x [N, I] W^T, I > 0.
void lut_products(int code_bits, const Weight* weight, const float* x, float* y, int64_t N, int threads) {
    BY_BITS(products, *weight, x, y, N, threads)
}

// W [O, I].
void lut_rebuild(int code_bits, const Weight* weight, float* W, int threads) { BY_BITS(rebuild, *weight, W, threads) }

int lut_is_amd() { return __builtin_cpu_is("amd") != 0; }
}
