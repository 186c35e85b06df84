// The paper's affine search as it is described: every (t_min, t_max), each over every point of the row (section 3.2.2).
// Only the benchmark uses it, to compare with. A thread block a row; each thread judges CANDIDATES ranges at a time, the
// points pass through shared memory. float32; the least error wins, ties go to the smallest t_min + t_max, then t_min.

typedef unsigned char uint8;

extern __shared__ __align__(16) char shared_memory[];

const int CANDIDATES = 4, POINTS = 2048;

// w and a [rows, n]; writes scale and zero [rows]. Shared memory: POINTS * 8 bytes, and 8 a thread.
extern "C" __global__ void __launch_bounds__(256) brute_force(const float* w, const float* a, float* scale, uint8* zero, int n, int T, int K) {
    float* points = (float*)shared_memory;
    float* weights = points + POINTS;
    float* errors = weights + POINTS;
    int* winners = (int*)(errors + blockDim.x);
    w += (long long)blockIdx.x * n;
    a += (long long)blockIdx.x * n;
    float low = 0, high = 0;
    for (int i = 0; i < n; ++i) {
        low = fminf(low, w[i]);
        high = fmaxf(high, w[i]);
    }
    const float step = (high - low) / T;
    const int side = T / 2, count = side * side;
    float least = 3e38f;
    int winner = 0x7fffffff;
    for (int base = 0; base < count; base += blockDim.x * CANDIDATES) {
        float S[CANDIDATES], inverse[CANDIDATES], Z[CANDIDATES], error[CANDIDATES];
#pragma unroll
        for (int k = 0; k < CANDIDATES; ++k) {
            const int c = base + k * blockDim.x + threadIdx.x, t_min = c / side, t_max = c % side;
            S[k] = fmaxf((high - low - (t_min + t_max) * step) / (K - 1), 1e-38f);
            inverse[k] = 1 / S[k];
            Z[k] = fminf(fmaxf(rintf(-(low + t_min * step) * inverse[k]), 0.0f), K - 1.0f);
            error[k] = 0;
        }
        for (int tile = 0; tile < n; tile += POINTS) {
            const int size = n - tile < POINTS ? n - tile : POINTS;
            __syncthreads();
            for (int i = threadIdx.x; i < size; i += blockDim.x) {
                points[i] = w[tile + i];
                weights[i] = a[tile + i];
            }
            __syncthreads();
            for (int i = 0; i < size; ++i) {
#pragma unroll
                for (int k = 0; k < CANDIDATES; ++k) {
                    const float code = fminf(fmaxf(rintf(points[i] * inverse[k] + Z[k]), 0.0f), K - 1.0f);
                    const float e = points[i] - S[k] * (code - Z[k]);
                    error[k] += weights[i] * e * e;
                }
            }
        }
#pragma unroll
        for (int k = 0; k < CANDIDATES; ++k) {
            const int c = base + k * blockDim.x + threadIdx.x;
            // As one number, so that equal errors order by the shrink: t_min + t_max, then t_min.
            const int rank = (c / side + c % side) * side + c / side;
            if (c < count && (error[k] < least || (error[k] == least && rank < winner))) {
                least = error[k];
                winner = rank;
            }
        }
    }
    errors[threadIdx.x] = least;
    winners[threadIdx.x] = winner;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < blockDim.x; ++i)
            if (errors[i] < least || (errors[i] == least && winners[i] < winner)) {
                least = errors[i];
                winner = winners[i];
            }
        const float S = fmaxf((high - low - winner / side * step) / (K - 1), 1e-38f);
        scale[blockIdx.x] = S;
        zero[blockIdx.x] = (uint8)fminf(fmaxf(rintf(-(low + winner % side * step) / S), 0.0f), K - 1.0f);
    }
}
