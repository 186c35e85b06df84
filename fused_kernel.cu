// CUDA for quantization: the column solver, coordinate descent, and the affine search. Not here: inference (leanquant/).
//
// Compiled at run time by leanquant/kernels.py, without headers. Each kernel has a torch twin of the same name, arguments
// and results in quant.py or leanquant_grid.py, which says what is computed; the comments here say how. The same source is
// built for the host by the tests (tests/host_cuda.h), so it uses one block of dynamic shared memory and no inline assembly.
// Every thread of a warp takes part in each shuffle and ballot.

#define FULL_WARP 0xffffffffu
typedef unsigned char uint8;

extern __shared__ __align__(16) char shared_memory[];

// --- a block of columns --------------------------------------------------------------------------------------------
//
// Columns are solved one after the other, rows never meet: a warp takes ROWS rows and lane l keeps columns l, l + 32,
// l + 64 and l + 96 of each in registers. For column j the row's value is broadcast from its lane; lane k holds the border
// between levels k and k + 1, so that the code is the number of lanes whose border lies below the value, one ballot; the
// level comes by a shuffle from the lane of that number; then every lane subtracts its share of the error from its columns
// after j. Two rows a warp hide each other's latency. Per column and row: about 20 instructions, no barrier.
//
// Memory: what is read of w (q, slope) and written of errors and codes passes through a tile in shared memory, so that
// reads run along rows; U is kept there as a packed triangle. At 128 columns that is 43.8 KB, below the 48 KB that every
// GPU grants without asking.

const int MAX_COLUMNS = 128, CHUNKS = MAX_COLUMNS / 32, ROWS = 2, WARPS = 8, TILE = ROWS * WARPS, PITCH = TILE + 1;

struct Block {  // of B columns, in shared memory
    float* triangle;  // element (i, j), i <= j, at row(i)[j]
    float* tile;      // [B, PITCH]
    uint8* codes;     // [B, TILE]
    int B;

    __device__ explicit Block(int B)
        : triangle((float*)shared_memory), tile(triangle + B * (B + 1) / 2), codes((uint8*)(tile + B * PITCH)), B(B) {}
    __device__ float* row(int i) const { return triangle + i * B - i * (i + 1) / 2; }
};

// The upper triangle of U [B, B].
__device__ void load_triangle(const Block& block, const float* U) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int i = warp; i < block.B; i += WARPS)
        for (int j = i + lane; j < block.B; j += 32) block.row(i)[j] = U[i * block.B + j];
}

// The tile of rows first.. of `source` [B, O] into registers: v[k][c] is row k of the warp, column 32 c + lane.
__device__ void load_rows(const Block& block, const float* source, int first, int O, float (&v)[ROWS][CHUNKS]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int at = threadIdx.x; at < block.B * TILE; at += blockDim.x) {
        const int j = at / TILE, r = at % TILE;
        block.tile[j * PITCH + r] = first + r < O ? source[(long long)j * O + first + r] : 0.0f;
    }
    __syncthreads();
    for (int k = 0; k < ROWS; ++k)
        for (int c = 0; c < CHUNKS; ++c) {
            const int j = 32 * c + lane;
            v[k][c] = j < block.B ? block.tile[j * PITCH + warp * ROWS + k] : 0.0f;
        }
    __syncthreads();
}

__device__ void store_rows(const Block& block, float* errors, uint8* codes, int first, int O) {
    __syncthreads();
    for (int at = threadIdx.x; at < block.B * TILE; at += blockDim.x) {
        const int j = at / TILE, r = at % TILE;
        if (first + r >= O) continue;
        errors[(long long)j * O + first + r] = block.tile[j * PITCH + r];
        codes[(long long)j * O + first + r] = block.codes[at];
    }
}

// A row's level for each lane below K, and the border above it; beyond the last border, one that nothing exceeds.
struct Levels {
    float level, border;

    __device__ void load(const float* levels, long long row, int K) {
        const int lane = threadIdx.x % 32;
        level = levels[row * K + (lane < K ? lane : K - 1)];
        const float above = __shfl_down_sync(FULL_WARP, level, 1);
        border = lane < K - 1 ? (level + above) / 2 : __int_as_float(0x7f800000);
    }
    __device__ int nearest(float x) const { return __popc(__ballot_sync(FULL_WARP, x > border)); }
    __device__ float at(int code) const { return __shfl_sync(FULL_WARP, level, code); }
};

// DESCEND: v is the slope, q what is stored now; else v is the weight, and q is not used.
template <bool DESCEND>
__device__ void run_block(const Block& block, float (&v)[ROWS][CHUNKS], const float (&q)[ROWS][CHUNKS], const float* levels,
                          const int* group_of, int first, int O, int K) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Levels grid[ROWS];
    int group = -1;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        for (int l = 0; l < 32 && 32 * c + l < block.B; ++l) {
            const int j = 32 * c + l;
            const float* u = block.row(j);
            if (group_of[j] != group) {
                group = group_of[j];
#pragma unroll
                for (int k = 0; k < ROWS; ++k) {
                    const int o = first + warp * ROWS + k;
                    grid[k].load(levels, (long long)group * O + (o < O ? o : O - 1), K);
                }
            }
#pragma unroll
            for (int k = 0; k < ROWS; ++k) {
                float x = __shfl_sync(FULL_WARP, v[k][c], l), old = 0;
                if (DESCEND) {
                    old = __shfl_sync(FULL_WARP, q[k][c], l);
                    x = old - x / u[j];
                }
                const int code = grid[k].nearest(x);
                const float level = grid[k].at(code);
                const float step = DESCEND ? level - old : (x - level) / u[j];
#pragma unroll
                for (int d = c; d < CHUNKS; ++d) {
                    const int later = 32 * d + lane;
                    if (later > j && later < block.B) v[k][d] += (DESCEND ? step : -step) * u[later];
                }
                if (lane == 0) {
                    block.tile[j * PITCH + warp * ROWS + k] = step;
                    block.codes[j * TILE + warp * ROWS + k] = (uint8)code;
                }
            }
        }
    }
}

// GPTQ's loop within a block. w [B, O], U [B, B], levels [G, O, K], group_of [B]; writes codes and errors [B, O].
extern "C" __global__ void __launch_bounds__(WARPS * 32)
    solve_block(const float* w, const float* U, const float* levels, const int* group_of, uint8* codes, float* errors,
                int B, int O, int K) {
    const Block block(B);
    const int first = blockIdx.x * TILE;
    float v[ROWS][CHUNKS];
    load_triangle(block, U);
    load_rows(block, w, first, O, v);
    run_block<false>(block, v, v, levels, group_of, first, O, K);
    store_rows(block, errors, codes, first, O);
}

// Coordinate descent within a block. q, slope [B, O], H [B, B]; the rest as above. Writes codes and changes [B, O].
extern "C" __global__ void __launch_bounds__(WARPS * 32)
    descend_block(const float* q, const float* slope, const float* H, const float* levels, const int* group_of,
                  uint8* codes, float* changes, int B, int O, int K) {
    const Block block(B);
    const int first = blockIdx.x * TILE;
    float old[ROWS][CHUNKS], v[ROWS][CHUNKS];
    load_triangle(block, H);
    load_rows(block, q, first, O, old);
    load_rows(block, slope, first, O, v);
    run_block<true>(block, v, old, levels, group_of, first, O, K);
    store_rows(block, changes, codes, first, O);
}

// --- affine search -------------------------------------------------------------------------------------------------
//
// A block of threads takes a row or group, a thread a shrink t at a time. The points are sorted, so a level's run of points
// is found by a binary search for its borders and costs nothing more: 2K - 2 searches judge all K zeros of a t, instead of
// K passes over the points. The row is read from the caches, whatever its length; nothing but the gains is kept in shared
// memory. float64 throughout, as in the twin, so that both choose alike; a GPU with few float64 units does these 0.3 G
// operations (4096 x 4096, coarse to fine) in a few milliseconds all the same.

// float -> fp16 -> float, to nearest even, for 0 <= x <= 65504.
__device__ float rounded_to_half(float x) {
    if (x < 6.103515625e-5f) return rintf(x * 16777216.0f) / 16777216.0f;
    const int bits = __float_as_int(x);
    return __int_as_float((bits + 0xfff + ((bits >> 13) & 1)) & ~0x1fff);
}

struct Found {
    double gain;
    int t, zero;

    __device__ bool beats(const Found& other) const { return gain > other.gain || (gain == other.gain && t < other.t); }
};

template <int K>
struct Search {
    const float* w;      // [n], ascending
    const double *A, *B; // [n + 1], sums of a and of a w
    int n, T;
    double low, high, step, inverse_step;  // the range, a T-th of it, and 1 / step

    __device__ double scale(int t) const {
        const double S = (high - low) * (1 - (double)t / T) / (K - 1);
        return rounded_to_half((float)fmin(fmax(S, 5.9604644775390625e-08), 65504.0));
    }

    __device__ double zero_of(double t_min, double inverse) const {
        return fmin(fmax(rint(-(low + t_min * step) * inverse), 0.0), K - 1.0);
    }

    // Does some split t = t_min + t_max lead to zero point Z? See _reachable_zeros.
    __device__ bool reachable(int Z, int t, double S, double inverse) const {
        const double first = t - T / 2 + 1 > 0 ? t - T / 2 + 1 : 0, last = t < T / 2 - 1 ? t : T / 2 - 1;
        const double nearest = rint((-Z * S - low) * inverse_step);
        return zero_of(fmin(fmax(nearest, first), last), inverse) == Z || zero_of(first, inverse) == Z || zero_of(last, inverse) == Z;
    }

    // The first point at or above `border`, not before `from`.
    __device__ int position(float border, int from) const {
        int to = n;
        while (from < to) {
            const int middle = (from + to) / 2;
            if (w[middle] < border)
                from = middle + 1;
            else
                to = middle;
        }
        return from;
    }

    // The best zero of one t, the smallest of equals. See _gains for the sums.
    __device__ Found judge(int t) const {
        const double S = scale(t), inverse = 1 / S, all_A = A[n], all_B = B[n];
        double begin[K], sum = 0;  // begin[k]: the sum where the window of zero K - 1 - k begins
        Found best = {-1e308, t, 0};
        int at = 0;
#pragma unroll
        for (int i = 0; i < 2 * K - 1; ++i) {
            if (i < K) begin[i] = sum;
            if (i >= K - 1) {
                const int k = i - (K - 1), Z = K - 1 - k;
                const double top = S * k, gain = (2 * all_B - top * all_A) * top - 2 * S * (sum - begin[k]);
                if (gain >= best.gain && reachable(Z, t, S, inverse)) best.gain = gain, best.zero = Z;
            }
            if (i < 2 * K - 2) {
                const double border = S * (i + 1 - K + 0.5);
                at = position((float)border, at);
                sum += B[at] - border * A[at];
            }
        }
        return best;
    }
};

// The best of all threads' candidates, known to each of them. `scratch` holds one a thread; blockDim.x is a power of two.
__device__ Found best_of_block(Found mine, Found* scratch) {
    scratch[threadIdx.x] = mine;
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half && scratch[threadIdx.x + half].beats(scratch[threadIdx.x])) scratch[threadIdx.x] = scratch[threadIdx.x + half];
    }
    __syncthreads();
    const Found best = scratch[0];
    __syncthreads();
    return best;
}

// Coarse to fine: every STRIDE-th t, then those within STRIDE - 1 of the PEAKS best of them; as in leanquant_grid.py.
const int STRIDE = 16, PEAKS = 2;

template <int K>
__device__ void search_row(const Search<K>& search, bool exhaustive, float* scale, uint8* zero) {
    Found* scratch = (Found*)shared_memory;
    double* coarse = (double*)(scratch + blockDim.x);  // [count]
    const int last = search.T - 2, count = last / STRIDE + 1, width = 2 * STRIDE - 1;
    int* peaks = (int*)(coarse + count);  // [PEAKS]
    Found mine = {-1e308, 0, 0};
    if (!exhaustive) {
        for (int i = threadIdx.x; i < count; i += blockDim.x) coarse[i] = search.judge(i * STRIDE).gain;
        __syncthreads();
        for (int k = 0; k < PEAKS; ++k) {
            Found peak = {-1e308, 0, 0};
            for (int i = threadIdx.x; i < count; i += blockDim.x)
                if (coarse[i] > peak.gain) peak = {coarse[i], i, 0};
            peak = best_of_block(peak, scratch);
            if (threadIdx.x == 0) {
                peaks[k] = peak.t;
                coarse[peak.t] = -1e308;
            }
            __syncthreads();
        }
    }
    for (int i = threadIdx.x; i < (exhaustive ? last + 1 : PEAKS * width); i += blockDim.x) {
        const int t = exhaustive ? i : peaks[i / width] * STRIDE + i % width - (STRIDE - 1);
        if (t < 0 || t > last) continue;
        const Found found = search.judge(t);
        if (found.beats(mine)) mine = found;
    }
    const Found best = best_of_block(mine, scratch);
    if (threadIdx.x == 0) {
        *scale = (float)search.scale(best.t);
        *zero = (uint8)best.zero;
    }
}

// w [R, n] ascending in each row, A and B [R, n + 1]; writes scale and zero [R]. A thread block a row.
template <int K>
__device__ void search_affine(const float* w, const double* A, const double* B, float* scale, uint8* zero, int n, int T, int exhaustive) {
    const long long row = blockIdx.x;
    w += row * n;
    const double low = w[0] < 0 ? w[0] : 0, high = w[n - 1] > 0 ? w[n - 1] : 0;
    const double step = (high - low) / T;
    const Search<K> search = {w, A + row * (n + 1), B + row * (n + 1), n, T, low, high, step, 1 / fmax(step, 1e-300)};
    search_row(search, exhaustive, scale + row, zero + row);
}

#define AFFINE_SEARCH(K)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128, 3) search_affine_##K(const float* w, const double* A, const double* B, \
                                                                        float* scale, uint8* zero, int n, int T, int exhaustive) { \
        search_affine<K>(w, A, B, scale, zero, n, T, exhaustive);                                                         \
    }
AFFINE_SEARCH(4)
AFFINE_SEARCH(8)
AFFINE_SEARCH(16)
