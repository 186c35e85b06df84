// CUDA for quantization. First version: the sequential part of the column solver (quant.py, `_solve_block`).
// Compiled at run time by leanquant/kernels.py; no headers, plain C++, so that tests can also build it for the host.

// solve_block: GPTQ's loop within one block of B columns, one thread a row.
//
//   for j = 0..B-1:  x = w_j - sum_{i<j} e_i U_ij;  c_j = nearest level(x);  e_j = (x - level[c_j]) / U_jj
//
// w [B, O], levels [G, O, K] ascending, group_of [B]; writes codes [B, O] and errors [B, O]. U points at the block's
// first diagonal element, `ldu` floats a row. A tie at a midpoint goes to the lower level.
// Bytes moved: w, errors and codes once to memory, 9 a weight; the B(B-1)/2 re-reads of errors hit L1/L2, coalesced over
// rows, and U is one broadcast a warp. Rows never meet, so there is nothing to synchronise.
extern "C" __global__ void solve_block(const float* w, const float* U, int ldu, const float* levels, const int* group_of,
                                       unsigned char* codes, float* errors, int B, int O, int K) {
    const int o = blockIdx.x * blockDim.x + threadIdx.x;
    if (o >= O) return;
    for (int j = 0; j < B; ++j) {
        float x = w[(long long)j * O + o];
        for (int i = 0; i < j; ++i) x -= errors[(long long)i * O + o] * U[(long long)i * ldu + j];
        const float* level = levels + ((long long)group_of[j] * O + o) * K;
        int code = 0;
        for (int k = 0; k + 1 < K; ++k) code += x > (level[k] + level[k + 1]) / 2;
        codes[(long long)j * O + o] = (unsigned char)code;
        errors[(long long)j * O + o] = (x - level[code]) / U[(long long)j * ldu + j];
    }
}
