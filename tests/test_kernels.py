"""fused_kernel.cu is right without a GPU: the same source, built for the host, against its torch twin.

With a GPU (`pytest -m gpu`) the kernel itself is compared with the twin.
"""

import ctypes
import subprocess
import sys

import pytest
import torch

import quant
from leanquant import kernels

# One thread after the other: the kernel's threads never meet, so this is what a GPU computes.
SHIM = """
#define __global__
struct Index { int x; };
static Index blockIdx, blockDim, threadIdx;
#include "{source}"
extern "C" void run(int threads, int total, const float* w, const float* U, int ldu, const float* levels, const int* group_of,
                    unsigned char* codes, float* errors, int B, int O, int K) {
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x * threads < total; ++blockIdx.x)
        for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x)
            solve_block(w, U, ldu, levels, group_of, codes, errors, B, O, K);
}
"""


@pytest.fixture(scope="module")
def host_kernel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("host")
    (folder / "host.cpp").write_text(SHIM.replace("{source}", str(quant.CUDA_SOURCE)))
    flags = ["-O1", "-shared", "-fPIC", "-fsanitize=bounds", "-ffp-contract=off"]
    subprocess.run(["g++", *flags, str(folder / "host.cpp"), "-o", str(folder / "host.so")], check=True)
    return ctypes.CDLL(str(folder / "host.so")).run


def problem(rows: int, columns: int, K: int, groups: int, seed: int):
    """w [B, O], U [B, B + 5], levels [G, O, K], group_of [B]: one block as the solver hands it over."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(columns, rows, generator=generator)
    mixing = torch.randn(columns + 5, columns + 5, generator=generator) / (columns + 5) ** 0.5
    U = quant.inverse_cholesky(mixing @ mixing.T + 0.05 * torch.eye(columns + 5))[:columns].contiguous()
    levels = torch.randn(groups, rows, K, generator=generator).sort(2).values
    return w, U, levels, torch.randint(groups, (columns,), generator=generator, dtype=torch.int32)


SHAPES = [(1, 1, 4, 1), (3, 7, 8, 1), (130, 33, 16, 1), (257, 128, 16, 4), (64, 100, 4, 3)]


def run_on_host(run, w, U, levels, group_of):
    codes, errors = torch.empty(w.shape, dtype=torch.uint8), torch.empty_like(w)
    pointer = lambda t: ctypes.c_void_p(t.data_ptr())  # noqa: E731
    B, O = w.shape
    run(
        128,
        O,
        pointer(w),
        pointer(U),
        U.shape[1],
        pointer(levels),
        pointer(group_of),
        pointer(codes),
        pointer(errors),
        B,
        O,
        levels.shape[2],
    )
    return codes, errors


@pytest.mark.parametrize("shape", SHAPES)
def test_source_built_for_the_host_equals_its_torch_twin(host_kernel, shape):
    w, U, levels, group_of = problem(*shape, seed=0)
    codes, errors = run_on_host(host_kernel, w, U, levels, group_of)
    twin_codes = torch.empty_like(codes)
    twin_errors = quant._solve_block(w.clone(), U, levels, group_of, twin_codes)
    same = (codes == twin_codes).all(0)  # a near-tie that rounds the other way changes the rest of its row
    assert same.float().mean() >= 0.98
    torch.testing.assert_close(errors[:, same], twin_errors[:, same], rtol=1e-3, atol=1e-3)


def test_a_tie_goes_to_the_lower_level(host_kernel):
    w = torch.tensor([[0.5, -0.5, 1.5]])
    levels = torch.tensor([-1.0, 0.0, 1.0, 2.0]).expand(1, 3, 4).contiguous()
    codes, errors = run_on_host(host_kernel, w, torch.ones(1, 1), levels, torch.zeros(1, dtype=torch.int32))
    assert codes.tolist() == [[1, 0, 2]]
    assert errors.tolist() == [[0.5, 0.5, 0.5]]


def test_forcing_torch_gives_no_kernel(monkeypatch):
    monkeypatch.setenv("LEANQUANT_KERNELS", "torch")
    kernels.load.cache_clear()
    assert kernels.load(quant.CUDA_SOURCE, "solve_block", 0) is None


def test_without_cupy_loading_warns_and_gives_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    kernels.load.cache_clear()
    with pytest.warns(UserWarning, match="solve_block runs in torch"):
        assert kernels.load(quant.CUDA_SOURCE, "solve_block", 0) is None
    kernels.load.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_on_the_gpu_equals_its_torch_twin(shape):
    arguments = [t.cuda() for t in problem(*shape, seed=0)]
    kernel = kernels.load(quant.CUDA_SOURCE, "solve_block", 0)
    assert kernel is not None, "the kernel did not compile"
    codes = torch.empty(arguments[0].shape, dtype=torch.uint8, device="cuda")
    errors = quant._solve_block_cuda(kernel, *arguments, codes)
    twin_codes = torch.empty_like(codes)
    twin_errors = quant._solve_block(arguments[0].clone(), *arguments[1:], twin_codes)
    same = (codes == twin_codes).all(0)
    assert same.float().mean() >= 0.98
    torch.testing.assert_close(errors[:, same], twin_errors[:, same], rtol=1e-3, atol=1e-3)
