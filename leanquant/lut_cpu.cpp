// Products with packed codes on a CPU, as a file holds them: y = x W^T with W = levels[codes] for a few tokens, and W itself for many.
//
// A row is read by blocks of LANES words, each with PLACES codes. One register holds the levels: a shift brings code p of every word to
// its lowest bits, and a permutation of the register looks all of them up. So columns come in the order (block, place, word), into which
// x is brought first, and in which W is left. Not here: what a file holds, and when which function is called (lut_cpu.py).
//
// Legend: O rows, I columns, A columns of whole blocks, N tokens, G groups of columns, K = 2**bits levels.

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include <vector>

namespace {

#if LANES == 16
using Floats = __m512;
using Words = __m512i;
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
inline Floats all(float value) { return _mm512_set1_ps(value); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(Floats v) { return _mm512_reduce_add_ps(v); }
inline Words shifted(Words v, int places) { return _mm512_srli_epi32(v, places); }
inline Words words(const uint8_t* p) { return _mm512_loadu_si512(p); }

// Words of 3 bytes each: the first 3/4 of what is read.
inline Words triples(const uint8_t* p) {
    const Words twelve = _mm512_setr_epi32(0, 1, 2, 0, 3, 4, 5, 0, 6, 7, 8, 0, 9, 10, 11, 0);
    const __m128i apart = _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1);
    return _mm512_shuffle_epi8(_mm512_permutexvar_epi32(twelve, words(p)), _mm512_broadcast_i32x4(apart));
}

inline Floats from_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Floats from_bfloat16(const uint16_t* p) {
    const Words wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

// What 4 bits are looked up in.
struct Table {
    Floats levels;
    template <typename Read> explicit Table(const Read& read) : levels(read(0)) {}  // read(i): levels from i on
    Floats operator[](Words codes) const { return _mm512_permutexvar_ps(codes, levels); }  // by the lowest 4 bits
};
#else
using Floats = __m256;
using Words = __m256i;
inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
inline Floats all(float value) { return _mm256_set1_ps(value); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Words shifted(Words v, int places) { return _mm256_srli_epi32(v, places); }
inline Words words(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const Words*>(p)); }

inline float sum(Floats v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

inline Words triples(const uint8_t* p) {
    const Words six = _mm256_setr_epi32(0, 1, 2, 0, 3, 4, 5, 0);
    const __m128i apart = _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1);
    return _mm256_shuffle_epi8(_mm256_permutevar8x32_epi32(words(p), six), _mm256_broadcastsi128_si256(apart));
}

inline Floats from_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline Floats from_bfloat16(const uint16_t* p) {
    const Words wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

// What 4 bits are looked up in.
struct Table {
    Floats low, high;
    template <typename Read> explicit Table(const Read& read) : low(read(0)), high(read(8)) {}  // read(i): levels from i on
    Floats operator[](Words codes) const {  // by the lowest 3 bits and, as a sign, the fourth
        const Floats upper = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, codes), _mm256_permutevar8x32_ps(high, codes), upper);
    }
};
#endif

// How codes lie in words: `column` is which of a word's columns its code `place` belongs to.
struct Nibbles {
    static constexpr int PLACES = 8, SHIFT = 4, BYTES = 4 * LANES;
    static constexpr int column(int place) { return place ^ 1; }  // the upper half of a byte comes first
    static Words read(const uint8_t* p) { return words(p); }
};
struct Triples {
    static constexpr int PLACES = 8, SHIFT = 3, BYTES = 3 * LANES;
    static constexpr int column(int place) { return place; }
    static Words read(const uint8_t* p) { return triples(p); }
};
struct Pairs {
    static constexpr int PLACES = 16, SHIFT = 2, BYTES = 4 * LANES;
    static constexpr int column(int place) { return place; }
    static Words read(const uint8_t* p) { return words(p); }
};

// As in the file. levels: 16 bits each, [O, K]; or scale [O, G] and zero [O, G].
struct Weight {
    const uint8_t* codes;
    const uint16_t* levels;
    const uint16_t* scale;
    const uint8_t* zero;
    int64_t O, I, G, width;  // width: bytes of a row's codes
    int bits, is_bfloat16;

    // The K levels again and again: upper bits of a word, which belong to other codes, then do not matter.
    Table table(int64_t row, int64_t group) const {
        if (levels) {
            uint16_t sixteen[16];
            for (int first = 0; first < 16; first += 1 << bits) copy_levels(sixteen + first, row);
            return Table([&](int i) { return is_bfloat16 ? from_bfloat16(sixteen + i) : from_half(sixteen + i); });
        }
        static const float CODES[3][16] = {
            {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3},
            {0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7},
            {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
        };
        const Floats offset = all(zero[row * G + group]), step = all(number(scale[row * G + group]));
        return Table([&](int i) { return (load(CODES[bits - 2] + i) - offset) * step; });
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

template <typename Layout, int place = 0, typename Use>
inline void each_place(Words codes, const Table& table, const Use& use) {
    if constexpr (place < Layout::PLACES) {
        use(place, table[shifted(codes, place * Layout::SHIFT)]);
        each_place<Layout, place + 1>(codes, table, use);
    }
}

// use(position in the order of columns, place, LANES values) for all of a row. What the last block has beyond the row is of no weight.
template <typename Layout, typename Use>
inline void each_of_row(const Weight& weight, int64_t row, const Use& use) {
    constexpr int COLUMNS = LANES * Layout::PLACES;
    const int64_t blocks = (weight.I + COLUMNS - 1) / COLUMNS, of_group = weight.G == 1 ? blocks : blocks / weight.G;
    const uint8_t *codes = weight.codes + row * weight.width, *end = weight.codes + weight.O * weight.width;
    alignas(64) uint8_t last[sizeof(Words)];
    for (int64_t block = 0, group = 0; group < weight.G; ++group) {
        const Table table = weight.table(row, group);
        for (; block < (group + 1) * of_group; ++block, codes += Layout::BYTES) {
            const uint8_t* read = codes;
            if (end - codes < int64_t(sizeof last)) {
                memset(last, 0, sizeof last);
                memcpy(last, codes, end - codes);
                read = last;
            }
            each_place<Layout>(Layout::read(read), table, [&](int place, Floats values) {
                use(block * COLUMNS + place * LANES, place, values);
            });
        }
    }
}

template <typename Layout, int N>
inline void row_products(const Weight& weight, int64_t row, const float* x, int64_t A, float* y) {
    constexpr int CHAINS = N == 1 ? 4 : 2;  // sums do not wait for one another
    Floats sums[N][CHAINS];
    for (auto& chains : sums)
        for (Floats& chain : chains) chain = all(0);
    each_of_row<Layout>(weight, row, [&](int64_t position, int place, Floats values) {
        for (int n = 0; n < N; ++n) {
            Floats& chain = sums[n][place % CHAINS];
            chain = multiply_add(values, load(x + n * A + position), chain);
        }
    });
    for (int n = 0; n < N; ++n) {
        for (int chain = 1; chain < CHAINS; ++chain) sums[n][0] += sums[n][chain];
        y[n * weight.O + row] = sum(sums[n][0]);
    }
}

// x [N, I] in the order of columns, [N, A], with zeros beyond I.
template <typename Layout>
void arrange(const float* x, float* arranged, int64_t N, int64_t I, int64_t A, int threads) {
    constexpr int COLUMNS = LANES * Layout::PLACES;
#pragma omp parallel for num_threads(threads) schedule(static) if (N > 1)
    for (int64_t n = 0; n < N; ++n)
        for (int64_t first = 0; first < A; first += COLUMNS) {
            const float* from = x + n * I + first;
            float *to = arranged + n * A + first, last[COLUMNS] = {};
            if (first + COLUMNS > I) from = static_cast<float*>(memcpy(last, from, (I - first) * sizeof(float)));
            for (int place = 0; place < Layout::PLACES; ++place)
                for (int word = 0; word < LANES; ++word) to[place * LANES + word] = from[word * Layout::PLACES + Layout::column(place)];
        }
}

template <typename Layout>
void products(const Weight& weight, const float* x, float* y, int64_t N, int64_t A, int threads) {
    std::vector<float> arranged(N * A);
    arrange<Layout>(x, arranged.data(), N, weight.I, A, threads);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < weight.O; ++row) {
        int64_t n = 0;
        for (; n + 4 <= N; n += 4) row_products<Layout, 4>(weight, row, &arranged[n * A], A, y + n * weight.O);
        for (; n < N; ++n) row_products<Layout, 1>(weight, row, &arranged[n * A], A, y + n * weight.O);
    }
}

template <typename Layout>
void rebuild(const Weight& weight, float* W, int64_t A, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < weight.O; ++row)
        each_of_row<Layout>(weight, row, [&](int64_t position, int, Floats values) { store(W + row * A + position, values); });
}

}  // namespace

#define BY_LAYOUT(function, ...)                                          \
    if (layout == 4) function<Nibbles>(__VA_ARGS__);                      \
    if (layout == 3) function<Triples>(__VA_ARGS__);                      \
    if (layout == 2) function<Pairs>(__VA_ARGS__);

extern "C" {

// y [N, O] = x [N, I] W^T.
void lut_products(int layout, const Weight* weight, const float* x, float* y, int64_t N, int64_t A, int threads) {
    BY_LAYOUT(products, *weight, x, y, N, A, threads)
}

void lut_arrange(int layout, const float* x, float* arranged, int64_t N, int64_t I, int64_t A, int threads) {
    BY_LAYOUT(arrange, x, arranged, N, I, A, threads)
}

// W [O, A], columns in the order that `lut_arrange` brings x into.
void lut_rebuild(int layout, const Weight* weight, float* W, int64_t A, int threads) { BY_LAYOUT(rebuild, *weight, W, A, threads) }
}
