"""fused_kernel.cu is right, with and without a GPU.

Without: the same source built for the host (tests/host.py) gives what the torch twins give, on random and hostile input, and
touches no memory that is not its own; NVRTC compiles it for every supported architecture without spilling. With one
(`pytest -m gpu`): kernels against twins, both against float64, on real streams; and what must be refused is refused.
"""

import ctypes
import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bench_quantize
import hessian
import host
import leanquant_grid
import nvrtc
import quant
from leanquant import kernels, lut_gemm
from modelutils import GroupInput
from quant import CUDA_SOURCE

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
# rows, columns, K, groups
BLOCKS = [(1, 1, 4, 1), (3, 7, 8, 1), (33, 33, 16, 1), (16, 128, 16, 4), (50, 100, 4, 3), (17, 127, 8, 2)]
HOSTILE_BLOCKS = ["constant levels", "zeros", "denormals", "huge range of U"]
# rows, points
ROWS = [(1, 128), (3, 577), (2, 1), (5, 2), (4, 1000)]
HOSTILE_ROWS = ["constant", "zeros", "denormals", "huge sensitivities", "one outlier", "all negative", "tiny range", "huge weights"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return host.library(CUDA_SOURCE, host.kernel_names(CUDA_SOURCE), tmp_path_factory.mktemp("host"))


@pytest.fixture
def launches(built, monkeypatch):
    return host.run_on(monkeypatch, built)


def block_problem(rows: int, columns: int, K: int, groups: int, hostile: str = "", seed: int = 0):
    """w [B, O], U [B, B], levels [G, O, K], group_of [B], codes [B, O]: one block as the solver hands it over."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(columns, rows, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    H = mixing @ mixing.T + 0.05 * torch.eye(columns)
    levels = torch.randn(groups, rows, K, generator=generator).sort(2).values
    if hostile == "constant levels":
        levels = levels[:, :, :1].expand(-1, -1, K).contiguous()
    elif hostile == "zeros":
        w.zero_()
        levels.zero_()
    elif hostile == "denormals":
        w, levels = w * 1e-39, levels * 1e-39
    elif hostile == "huge range of U":
        scale = torch.logspace(-5, 5, columns)
        H = scale[:, None] * H * scale
    square = H.double()
    assert hessian.inverse_cholesky_(square)
    U = square.triu().float()
    group_of = torch.randint(groups, (columns,), generator=generator, dtype=torch.int32)
    return w, U, levels, group_of, torch.empty(columns, rows, dtype=torch.uint8)


def descent_problem(rows: int, columns: int, K: int, groups: int, hostile: str = "", seed: int = 0):
    """q, slope [B, O], H [B, B], levels, group_of, codes."""
    w, U, levels, group_of, codes = block_problem(rows, columns, K, groups, hostile, seed)
    H = torch.cholesky_inverse(U.double(), upper=True).float()
    q = levels[group_of.long(), :, 0].clone()
    return q, H @ (q - w), H, levels, group_of, codes


def float64_twin(twin, args: tuple):
    *inputs, codes = args
    codes = torch.empty_like(codes)
    wide = [t.double() if t.is_floating_point() else t for t in inputs]
    return codes, twin(*(t.clone() for t in wide), codes)


def compare_block(operation, twin, args: tuple) -> None:
    """`operation` decides as `twin` does, except where a near-tie rounds the other way and changes the rest of its row."""
    codes, twin_codes = args[-1].clone(), args[-1].clone()
    out = operation(*(t.clone() for t in args[:-1]), codes)
    expected = twin(*(t.clone() for t in args[:-1]), twin_codes)
    exact_codes, exact = float64_twin(twin, args)
    same = (codes == twin_codes).all(0)
    assert same.float().mean() >= 0.98 or (~same).sum() <= 1
    assert (codes < args[-3].shape[2]).all()
    reliable = same & (codes == exact_codes).all(0)
    error, twin_error = ((t[:, reliable].double() - exact[:, reliable]).norm() for t in (out, expected))
    assert error <= 2 * twin_error + 1e-6 * exact.norm()


@pytest.mark.parametrize(
    "shape, hostile", [*((s, "") for s in BLOCKS), *(((20, 40, 8, 2), h) for h in HOSTILE_BLOCKS)], ids=lambda x: str(x)
)
class TestBlocksOnTheHost:
    def test_solve_block(self, launches, shape, hostile):
        compare_block(quant.solve_block, quant._solve_block, block_problem(*shape, hostile))
        assert [name for name, *_ in launches] == ["solve_block"]

    def test_descend_block(self, launches, shape, hostile):
        compare_block(quant.descend_block, quant._descend_block, descent_problem(*shape, hostile))
        assert [name for name, *_ in launches] == ["descend_block"]


def test_a_tie_goes_to_the_lower_level(launches):
    w = torch.tensor([[0.5, -0.5, 1.5]])
    levels = torch.tensor([-1.0, 0.0, 1.0, 2.0]).expand(1, 3, 4).contiguous()
    codes = torch.empty(1, 3, dtype=torch.uint8)
    errors = quant.solve_block(w, torch.ones(1, 1), levels, torch.zeros(1, dtype=torch.int32), codes)
    assert codes.tolist() == [[1, 0, 2]]
    assert errors.tolist() == [[0.5, 0.5, 0.5]]


@pytest.mark.parametrize("groupsize", [-1, 32])
def test_whole_solver_and_descent_on_kernels(built, monkeypatch, groupsize):
    """Several blocks with products between them, columns out of order, levels of groups: as without a GPU."""
    O, I, K = 20, 192, 8
    generator = torch.Generator().manual_seed(1)
    W, X = torch.randn(O, I, generator=generator), torch.randn(500, I, generator=generator)
    H = X.T @ X / 500
    config = quant.QuantConfig(bits=3, grid="affine", groupsize=groupsize, act_order=True, block_size=80)
    factor = hessian.factorize(H.triu(), 0.01, True)
    grid = quant.learn_grid(W, factor, config)
    expected, refined = quant.quantize(W, grid, factor, config), None
    refined = quant.refine(W, grid, expected, factor, config)[1]
    launches = host.run_on(monkeypatch, built)
    ours = quant.quantize(W, grid, factor, config)
    assert (ours.codes == expected.codes).float().mean() > 0.98
    torch.testing.assert_close(ours.loss, expected.loss, rtol=0.02, atol=0)
    torch.testing.assert_close(quant.refine(W, grid, expected, factor, config)[1].loss, refined.loss, rtol=0.02, atol=0)
    assert {name for name, *_ in launches} == {"solve_block", "descend_block"}
    assert K == grid.levels.shape[2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_on_tensor_cores(launches, dtype):
    """16-bit inputs are multiplied as they are, and give the float32 sums."""
    generator = torch.Generator().manual_seed(2)
    draw = lambda I: torch.randn(3, 50, I, generator=generator).to(dtype)  # noqa: E731
    ours, theirs = (GroupInput(draw(40), draw(24)) for _ in range(2))
    x, difference, lacks = (t.flatten(0, 1).double() for t in (ours.X, theirs.X - ours.X, theirs.residual - ours.residual))
    W = torch.randn(24, 40, generator=generator).to(dtype)
    for rows, residual in ((W, True), (torch.cat([W, W]), False)):
        total = hessian.Statistics([rows], True, residual, torch.device("cpu"))
        total.add(ours, theirs)
        torch.testing.assert_close(total.H.triu().double(), (x.T @ x).triu(), rtol=1e-5, atol=1e-4)
        if residual:
            exact = (difference @ W.double().T + lacks).T @ x
            assert (total.S - exact).norm() <= 2**-8 * exact.norm()
        else:
            torch.testing.assert_close(total.C.double(), difference.T @ x, rtol=1e-4, atol=1e-3)


def test_products_in_three_parts_are_as_exact_as_float32(launches):
    generator = torch.Generator().manual_seed(3)
    H = torch.randn(1500, 300, generator=generator).pow(3)
    H = H.T @ H
    B = torch.randint(0, 16, (64, 300), generator=generator).float()
    exact = B.double() @ H.double()
    error, float32_error = ((product.double() - exact).norm() for product in (hessian.times_whole(B, H), B @ H))
    assert error <= 2 * float32_error


def rows_problem(rows: int, points: int, hostile: str = "", seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, points, generator=generator)
    a = torch.rand(points, generator=generator, dtype=torch.float64).pow(-1.5)
    if hostile == "constant":
        W[:] = torch.tensor([0.7, -0.7, 1e-6])[torch.arange(rows) % 3].unsqueeze(1)
    elif hostile == "zeros":
        W.zero_()
    elif hostile == "denormals":
        W *= 1e-40
    elif hostile == "huge sensitivities":
        a = torch.logspace(-26, 26, points, dtype=torch.float64)[torch.randperm(points, generator=generator)]
    elif hostile == "one outlier":
        W[:, 0] = 1000
    elif hostile == "all negative":
        W = -W.abs() - 3
    elif hostile == "tiny range":
        W = 1 + 1e-6 * W
    elif hostile == "huge weights":
        W *= 1e6
    return W, a


def cost_of(W, a, affine, bits):
    scale, zero = affine.scale.double().unsqueeze(1), affine.zero.double().unsqueeze(1)
    codes = (W.double() / scale + zero).round().clamp(0, 2**bits - 1)
    return (a * (W.double() - scale * (codes - zero)).square()).sum(1)


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("mode", ["coarse to fine", "exhaustive", "few partitions"])
@pytest.mark.parametrize("shape, hostile", [*((s, "") for s in ROWS), *(((3, 60), h) for h in HOSTILE_ROWS)], ids=lambda x: str(x))
def test_affine_search_on_the_host_equals_its_twin(built, monkeypatch, shape, hostile, bits, mode):
    W, a = rows_problem(*shape, hostile)
    T = {"coarse to fine": 1024, "exhaustive": 256, "few partitions": 30}[mode]
    expected = leanquant_grid.affine_search(W, a, bits, T, mode == "exhaustive")
    launches = host.run_on(monkeypatch, built)
    found = leanquant_grid.affine_search(W, a, bits, T, mode == "exhaustive")
    assert torch.equal(found.scale, expected.scale) and torch.equal(found.zero, expected.zero)
    assert [name for name, *_ in launches] == [f"search_affine_{2**bits}"]


def test_brute_force_of_the_benchmark_finds_what_the_exhaustive_search_finds(monkeypatch, tmp_path):
    """The kernel that the benchmark compares with does the whole search: no candidate is better, and none better is missed."""
    W, a = rows_problem(5, 300)
    a = a.clamp(max=100)
    T, scale, zero = 24, torch.empty(5), torch.empty(5, dtype=torch.uint8)
    expected = leanquant_grid.affine_search(W, a, 3, T, exhaustive=True)
    kernel = bench_quantize.BRUTE_FORCE
    host.run_on(monkeypatch, host.library(kernel.source, [kernel.name], tmp_path))
    kernels.launch(kernel, (5, 1), 32, 8 * 2048 + 8 * 32, W, a.float().expand_as(W).contiguous(), scale, zero, 300, T, 8)
    costs = [cost_of(W, a, affine, 3) for affine in (leanquant_grid.Affine(scale, zero), expected)]
    torch.testing.assert_close(costs[0], costs[1], rtol=2e-3, atol=0)  # its scales are not rounded to fp16


def test_kernels_stay_within_their_memory(built, monkeypatch, tmp_path):
    """Each kernel once under AddressSanitizer and UBSan, on odd sizes, with buffers of exactly the tensors' sizes."""
    launches = host.run_on(monkeypatch, built)
    quant.solve_block(*block_problem(17, 45, 16, 3))
    quant.descend_block(*descent_problem(17, 45, 16, 3))
    for bits, points in ((4, 131), (3, 1), (2, 64)):
        leanquant_grid.affine_search(*rows_problem(2, points), bits, 200)
    program = host.executable(CUDA_SOURCE, host.kernel_names(CUDA_SOURCE), tmp_path)
    assert len(launches) == len(host.kernel_names(CUDA_SOURCE))
    for launch in launches:
        ran = host.run_under_asan(program, launch, tmp_path)
        assert ran.returncode == 0, (launch[0], ran.stderr[-3000:])


def test_asan_would_notice(built, monkeypatch, tmp_path):
    """The check above can fail: with too little shared memory, or with a buffer that is too small."""
    launches = host.run_on(monkeypatch, built)
    quant.solve_block(*block_problem(17, 45, 16, 3))
    name, blocks, threads, shared, args = launches[0]
    program = host.executable(CUDA_SOURCE, host.kernel_names(CUDA_SOURCE), tmp_path)
    for broken in ((name, blocks, threads, shared - 1, args), (name, blocks, threads, shared, (args[0][:-1], *args[1:]))):
        assert "AddressSanitizer" in host.run_under_asan(program, broken, tmp_path).stderr


# --- the compiler ----------------------------------------------------------------------------------------------


HOPPERS_OWN = ("lut_wide", "arrange_x")


def kernels_for(source: Path, architecture: int) -> set[str]:
    """Of a CUDA file, those that a GPU has a use for, without Hopper's own."""
    unused = HOPPERS_OWN if architecture // 10 in lut_gemm.COUNT_BITS else (*HOPPERS_OWN, "lut_gemv")
    return {name for name in host.kernel_names(source) if not name.startswith(unused)}


@pytest.mark.parametrize("architecture", nvrtc.ARCHITECTURES)
@pytest.mark.parametrize("source", nvrtc.SOURCES, ids=lambda p: p.name)
def test_compiles_without_spills(source, architecture):
    log = nvrtc.compile_log(source, architecture)
    assert nvrtc.functions(log) == kernels_for(source, architecture)
    assert nvrtc.spills(log) == {}


def test_hoppers_own_kernels_compile_without_spills():
    """Though CuPy names the plain architecture too. The assembler reports products in the background that it has to wait for."""
    log = nvrtc.compile_log(lut_gemm.CUDA_SOURCE, 90, lut_gemm.HOPPER)
    assert nvrtc.functions(log) == {name for name in host.kernel_names(lut_gemm.CUDA_SOURCE) if name.startswith(HOPPERS_OWN)}
    assert nvrtc.spills(log) == {}
    assert "serialized" not in log


def test_a_width_and_type_of_kernels_compile_alone():
    log = nvrtc.compile_log(lut_gemm.CUDA_SOURCE, 90, *lut_gemm._kernel("lut_gemv", 3, torch.bfloat16, False).options)
    assert nvrtc.functions(log) == {name for name in kernels_for(lut_gemm.CUDA_SOURCE, 90) if "3_bfloat16" in name}


def test_a_spill_would_be_noticed(tmp_path):
    (tmp_path / "spill.cu").write_text(
        'extern "C" __global__ void __launch_bounds__(1024, 2) spill(float* x) {\n'
        "    float v[64];\n#pragma unroll\n    for (int i = 0; i < 64; ++i) v[i] = x[i * 7 + threadIdx.x];\n    __syncthreads();\n"
        "#pragma unroll\n    for (int i = 0; i < 64; ++i) x[i * 5 + threadIdx.x] = v[63 - i] * v[i];\n}\n"
    )
    assert nvrtc.spills(nvrtc.compile_log(tmp_path / "spill.cu", 90))


def test_the_benchmark_runs_from_end_to_end(tmp_path):
    script, out = Path(bench_quantize.__file__), tmp_path / "bench.json"
    subprocess.run([sys.executable, script, "--smoke", "--device", "cpu", "--out", out], check=True, capture_output=True)
    results = json.loads(out.read_text())
    assert set(results["matrices"][0]["torch_ms"]) >= {"affine", "affine, exhaustive", "column solver", "k-means"}
    assert [run["recipe"] for run in results["end_to_end"]] == ["best", "published"]
    assert results["promises"] == {}  # nothing is claimed that was not measured at its size, on a GPU


# --- loading, launching, falling back --------------------------------------------------------------------------


def test_forcing_torch_launches_nothing(launches, monkeypatch):
    monkeypatch.setenv("LEANQUANT_KERNELS", "torch")
    quant.solve_block(*block_problem(3, 7, 8, 1))
    assert launches == []


@pytest.fixture
def gpu_without_kernels(monkeypatch):
    monkeypatch.delenv("LEANQUANT_KERNELS", raising=False)
    monkeypatch.setattr(kernels, "on_gpu", lambda tensor: True)
    caches = (kernels._compiled, kernels._warn_once)
    for cache in caches:
        cache.cache_clear()
    yield monkeypatch
    for cache in caches:
        cache.cache_clear()


def test_without_cupy_the_twin_runs_after_one_warning(gpu_without_kernels):
    gpu_without_kernels.setitem(sys.modules, "cupy", None)
    args = block_problem(3, 7, 8, 1)
    with pytest.warns(UserWarning, match="solve_block runs in torch, which is slower: .*pip install cupy-cuda") as caught:
        errors = [quant.solve_block(*(t.clone() for t in args)) for _ in range(3)]
    assert len(caught) == 1
    assert torch.equal(errors[2], quant._solve_block(*(t.clone() for t in args)))


def test_falling_back_keeps_no_tensor_alive(gpu_without_kernels):
    gpu_without_kernels.setitem(sys.modules, "cupy", None)
    args = block_problem(3, 7, 8, 1)
    watched = weakref.ref(args[0])
    with pytest.warns(UserWarning, match="runs in torch"):
        quant.solve_block(*args)
    del args
    gc.collect()
    assert watched() is None


def test_a_missing_tensor_is_refused_unless_it_may_be_missing(launches):
    with pytest.raises(TypeError, match="argument 0 must be a tensor"):
        kernels.launch(KERNEL, (1, 1), 1, 0, None, 1)


def test_a_refused_launch_falls_back_with_its_reason(gpu_without_kernels):
    def refuse(function, kernel, *_):
        raise kernels.KernelError(f"{kernel.name} runs in torch, which is slower: its launch failed: too many resources")

    gpu_without_kernels.setattr(kernels, "_compiled", lambda *_: object())
    gpu_without_kernels.setattr(kernels, "_call", refuse)
    W, a = rows_problem(3, 60)
    with pytest.warns(UserWarning, match="search_affine_16 .*too many resources"):
        found = leanquant_grid.affine_search(W, a, 4)
    gpu_without_kernels.setattr(kernels, "on_gpu", lambda tensor: False)
    assert torch.equal(found.scale, leanquant_grid.affine_search(W, a, 4).scale)


DRIVER = """
#include <cuda.h>
CUlaunchConfig config;
CUlaunchAttribute attribute;
CUfunction function;
int refusals, calls, current;
unsigned long long addresses[2];
int integers[2];
CUresult cuDeviceGet(CUdevice* device, int ordinal) { return *device = 100 + ordinal, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) { return *context = (CUcontext)(long long)device, CUDA_SUCCESS; }
CUresult cuCtxPushCurrent(CUcontext context) { return current = (int)(long long)context, CUDA_SUCCESS; }
CUresult cuCtxPopCurrent(CUcontext* context) { return *context = (CUcontext)(long long)current, current = 0, CUDA_SUCCESS; }
CUresult cuLaunchKernelEx(const CUlaunchConfig* launch, CUfunction f, void** arguments, void** extra) {
    if (current != 101 || refusals-- > 0) return CUDA_ERROR_INVALID_CONTEXT;
    ++calls, function = f, config = *launch;
    if (launch->numAttrs) attribute = *launch->attrs;
    for (int i = 0; i < 2; ++i) addresses[i] = *(unsigned long long*)arguments[i], integers[i] = *(int*)arguments[2 + i];
    return extra ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult error, const char** name) {
    *name = error == CUDA_ERROR_INVALID_CONTEXT ? "CUDA_ERROR_INVALID_CONTEXT" : "another";
    return CUDA_SUCCESS;
}
unsigned config_is(unsigned x, unsigned y, unsigned threads, unsigned shared, unsigned stream) {
    return config.gridDimX == x && config.gridDimY == y && config.gridDimZ == 1 && config.blockDimX == threads && config.blockDimY == 1 &&
           config.blockDimZ == 1 && config.sharedMemBytes == shared && (unsigned long long)config.hStream == stream;
}
unsigned starts_early() {
    return config.numAttrs == 1 && attribute.id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION &&
           attribute.value.programmaticStreamSerializationAllowed == 1;
}
"""


@pytest.fixture(scope="module")
def driver_file(tmp_path_factory):
    """A driver that notes what it is asked, built with the real one's header."""
    folder = tmp_path_factory.mktemp("driver")
    (folder / "driver.c").write_text(DRIVER)
    headers = nvrtc.wheel_file("include/cuda.h").parent
    subprocess.run(["gcc", "-shared", "-fPIC", f"-I{headers}", folder / "driver.c", "-o", folder / "driver.so"], check=True)
    return folder / "driver.so"


@pytest.fixture
def launch_with(driver_file, monkeypatch):
    """Launch for GPU 1 of some architecture, of which the driver refuses `refusals` attempts; returns the driver."""
    kernels._context.cache_clear()

    def launch(early: bool = False, major: int = 9, refusals: int = 0):
        driver = ctypes.CDLL(str(driver_file))
        ctypes.c_int.in_dll(driver, "refusals").value = refusals
        ctypes.c_int.in_dll(driver, "calls").value = 0
        monkeypatch.setattr(kernels, "_driver", lambda: driver)
        monkeypatch.setattr(kernels, "properties", lambda device: host.Gpu(major, 132, 0))
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 70 + index, raising=False)
        kernel = kernels.Kernel(CUDA_SOURCE, "name", (), early=early)
        kernels._call(SimpleNamespace(ptr=5), kernel, torch.device("cuda", 1), (7, 2), 64, 1000, (X, None, -3, 2**31 - 1))
        return driver

    yield launch
    kernels._context.cache_clear()


X = torch.zeros(3)


def test_what_the_driver_is_told(launch_with):
    """Addresses of all arguments in their order, sizes, torch's stream; in the context of the tensors' GPU, which is left again."""
    driver = launch_with()
    assert list((ctypes.c_ulonglong * 2).in_dll(driver, "addresses")) == [X.data_ptr(), 0]
    assert list((ctypes.c_int * 2).in_dll(driver, "integers")) == [-3, 2**31 - 1]
    assert ctypes.c_ulonglong.in_dll(driver, "function").value == 5
    assert ctypes.c_int.in_dll(driver, "calls").value == 1
    assert ctypes.c_int.in_dll(driver, "current").value == 0
    assert driver.config_is(7, 2, 64, 1000, 71)


@pytest.mark.parametrize("early, major, refusals, starts", [(True, 9, 0, 1), (True, 8, 0, 0), (False, 9, 0, 0), (True, 9, 1, 0)])
def test_who_may_start_early(launch_with, early, major, refusals, starts):
    """A kernel that says so, on a GPU that can; not where the driver refuses it."""
    assert launch_with(early=early, major=major, refusals=refusals).starts_early() == starts


@pytest.mark.parametrize("early, refusals", [(True, 2), (False, 1)])
def test_a_launch_that_is_refused_says_why(launch_with, early, refusals):
    with pytest.raises(kernels.KernelError, match="name runs in torch, which is slower: its launch failed: CUDA_ERROR_INVALID_CONTEXT"):
        launch_with(early=early, refusals=refusals)


KERNEL = kernels.Kernel(CUDA_SOURCE, "solve_block", (torch.float32, int))


def test_wrong_arguments_are_refused(launches):
    x = torch.zeros(4, 6)
    for args, error, message in (
        ((x.double(), 1), TypeError, "argument 0 must be a tensor of torch.float32"),
        ((x.T, 1), ValueError, "argument 0 is not contiguous"),
        ((x, 2**31), TypeError, "argument 1 must be a 32-bit integer"),
        ((x, 1.0), TypeError, "argument 1 must be a 32-bit integer"),
        ((3, 1), TypeError, "argument 0 must be a tensor"),
        ((x,), TypeError, "takes 2 arguments, not 1"),
    ):
        with pytest.raises(error, match=message):
            kernels.launch(KERNEL, (1, 1), 1, 0, *args)
    w, U, levels, group_of, codes = block_problem(3, 7, 8, 1)
    for args in ((w[:5], U, levels, group_of, codes), (w, U[:5], levels, group_of, codes), (w, U, levels[:, :2], group_of, codes)):
        with pytest.raises(ValueError, match="sizes do not fit"):
            quant.solve_block(*args)
    with pytest.raises(ValueError, match="up to 128 columns"):
        quant.solve_block(*block_problem(3, 129, 8, 1))
    assert launches == []


def test_a_tensor_off_the_gpu_is_refused():
    with pytest.raises(ValueError, match="argument 0 is on cpu, not on one GPU"):
        kernels.launch(KERNEL, (1, 1), 1, 0, torch.zeros(4), 1)


# --- on a GPU --------------------------------------------------------------------------------------------------

gpu = lambda *tensors: [t.cuda() for t in tensors]  # noqa: E731


@pytest.fixture
def no_fallback(monkeypatch):
    """A kernel that does not run fails its test."""

    def fail(message):
        raise AssertionError(message)

    monkeypatch.setattr(kernels, "_warn_once", fail)


@pytest.mark.usefixtures("no_fallback")
class TestOnTheGpu:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("shape", [*BLOCKS, (4096, 128, 16, 1), (1024, 128, 8, 32)])
    def test_solve_block(self, shape):
        compare_block(quant.solve_block, quant._solve_block, gpu(*block_problem(*shape)))

    @pytest.mark.parametrize("shape", [*BLOCKS, (4096, 128, 16, 1), (1024, 128, 8, 32)])
    def test_descend_block(self, shape):
        compare_block(quant.descend_block, quant._descend_block, gpu(*descent_problem(*shape)))

    @pytest.mark.parametrize("hostile", [h for h in HOSTILE_BLOCKS if h != "denormals"])  # CuPy has them flushed to zero
    def test_hostile_blocks(self, hostile):
        compare_block(quant.solve_block, quant._solve_block, gpu(*block_problem(20, 40, 8, 2, hostile)))
        compare_block(quant.descend_block, quant._descend_block, gpu(*descent_problem(20, 40, 8, 2, hostile)))

    @pytest.mark.parametrize("bits", [4, 3, 2])
    @pytest.mark.parametrize("exhaustive", [False, True])
    @pytest.mark.parametrize(
        "shape, hostile", [*((s, "") for s in ROWS), (((9, 53248), "")), *(((3, 60), h) for h in HOSTILE_ROWS)], ids=lambda x: str(x)
    )
    def test_affine_search(self, shape, hostile, bits, exhaustive):
        """The same choice, or one as good: contraction may tip a tie."""
        W, a = gpu(*rows_problem(*shape, hostile))
        s = leanquant_grid._sort_rows(W, a.expand_as(W), centered=False)
        args = (s.w, s.A, s.B, 2**bits, 2048, exhaustive)
        found, expected = leanquant_grid._search_affine_cuda(*args), leanquant_grid._search_affine(*args)
        costs = [cost_of(W, a, affine, bits) for affine in (found, expected)]
        same = (found.scale == expected.scale) & (found.zero == expected.zero)
        assert (same | ((costs[0] - costs[1]).abs() <= 1e-9 * costs[1])).all()
        assert same.float().mean() >= 0.98 or hostile

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_statistics(self, dtype):
        generator = torch.Generator().manual_seed(2)
        draw = lambda I: torch.randn(2, 500, I, generator=generator).to(dtype)  # noqa: E731
        ours, theirs = (GroupInput(draw(1100), draw(64)) for _ in range(2))
        for rows, residual in ((64, True), (1200, False)):
            W, sums = draw(1100)[0].repeat(3, 1)[:rows], []
            for device, held_on in (("cpu", "cpu"), ("cuda", "cuda"), ("cuda", "cpu")):
                total = hessian.Statistics([W.to(device)], True, residual, torch.device(held_on))
                total.add(*(GroupInput(*(t.to(device) for t in seen)) for seen in (ours, theirs)))
                sums.append([t.cpu() for t in (total.H.triu(), *total.sums()[1:])])
            for other in sums[1:]:
                for expected, found in zip(sums[0], other, strict=True):
                    assert (found - expected).norm() <= 3e-3 * expected.norm()

    def test_a_factor_on_the_host_serves_rows_on_the_gpu(self):
        """As one on the GPU does, but for ties."""
        generator = torch.Generator().manual_seed(6)
        W, X = torch.randn(32, 1500, generator=generator).cuda(), torch.randn(3000, 1500, generator=generator)
        config, found = quant.QuantConfig(bits=3, act_order=True, percdamp=0.1), []
        for device in ("cuda", "cpu"):
            factor = hessian.factorize((X.T @ X / 3000).to(device), 0.1, True)
            grid = quant.learn_grid(W, factor, config)
            found.append(quant.refine(W, grid, quant.quantize(W, grid, factor, config), factor, config)[1].loss)
        assert found[1].is_cuda
        torch.testing.assert_close(found[0].sum(), found[1].sum(), rtol=0.02, atol=0)

    def test_products_in_three_parts(self):
        H = torch.randn(700, 700, device="cuda")
        B = torch.randint(0, 16, (64, 700), device="cuda").float()
        exact = B.double() @ H.double()
        assert (hessian.times_whole(B, H).double() - exact).norm() <= 1e-6 * exact.norm()

    @pytest.mark.parametrize("grid", ["nonuniform", "affine"])
    def test_the_recipe_for_a_stack_of_linears(self, grid, monkeypatch):
        """All steps on the GPU give what the CPU gives, but for ties; and so do the twins there."""
        generator = torch.Generator().manual_seed(5)
        W, X = torch.randn(96, 256, generator=generator), torch.randn(2000, 256, generator=generator)
        config = quant.QuantConfig(bits=4, grid=grid, act_order=True, percdamp=0.1)
        losses = []
        for device, forced in (("cpu", ""), ("cuda", ""), ("cuda", "torch")):
            monkeypatch.setenv("LEANQUANT_KERNELS", forced)
            factor = hessian.factorize((X.T @ X / 2000).to(device), 0.1, True)
            rows = W.to(device)
            grid_found = quant.learn_grid(rows, factor, config)
            solved = quant.quantize(rows, grid_found, factor, config)
            losses.append(quant.refine(rows, grid_found, solved, factor, config)[1].loss.cpu())
        for other in losses[1:]:
            torch.testing.assert_close(other.sum(), losses[0].sum(), rtol=0.02, atol=0)

    def test_two_runs_are_bit_identical(self):
        args = gpu(*block_problem(300, 128, 16, 2))
        runs = [(quant.solve_block(*args[:-1], codes := torch.empty_like(args[-1])), codes) for _ in range(2)]
        assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
        W, a = gpu(*rows_problem(64, 4096))
        found = [leanquant_grid.affine_search(W, a, 4) for _ in range(2)]
        assert torch.equal(found[0].scale, found[1].scale) and torch.equal(found[0].zero, found[1].zero)

    def test_runs_on_the_current_stream(self):
        """On a side stream behind a long copy: a launch on another stream would read the buffer too early."""
        args = gpu(*block_problem(64, 128, 16, 1))
        codes = torch.empty_like(args[-1])
        expected = quant.solve_block(*args[:-1], codes)
        w, side = torch.full_like(args[0], float("nan")), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            busy = torch.randn(8192, 8192, device="cuda")
            for _ in range(5):
                busy = busy @ busy / 8192
            w.copy_(args[0])
            errors = quant.solve_block(w, *args[1:-1], codes)
        side.synchronize()
        assert torch.equal(errors, expected)

    def test_what_does_not_fit_is_refused(self):
        w, U, levels, group_of, codes = gpu(*block_problem(5, 7, 8, 1))
        for bad in (w.double(), torch.empty(5, 7, device="cuda").T, w.cpu()):
            with pytest.raises((TypeError, ValueError)):
                quant._solve_block_cuda(bad, U, levels, group_of, codes)
