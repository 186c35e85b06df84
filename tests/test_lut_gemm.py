"""Products with codes and levels: layout, operator, and the kernels of lut_gemm.cu against their torch twins.

Without a GPU the same source runs on the host (tests/host.py); with one (`pytest -m gpu`) the kernels themselves.
"""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench_inference
import host
import llama
from conftest import signed
from leanquant import LeanQuantModelForCausalLM, kernels, lut_gemm
from leanquant.linear import QuantizedLinear, prepare_linears
from leanquant.lut_gemm import CUDA_SOURCE, Tiles, lut_linear
from leanquant.packing import PackedLinear, affine_levels, pack_codes

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
DTYPES = [torch.float16, torch.bfloat16]
# rows, columns, groups (0: free levels)
SHAPES = [(1, 1, 0), (16, 256, 0), (37, 200, 0), (20, 77, 0), (33, 520, 0), (18, 96, 1), (35, 192, 3), (16, 32, 2), (17, 512, 4)]
TOKENS = [1, 2, 3, 5, 8, 9, 17, 40, 64]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return host.library(CUDA_SOURCE, host.kernel_names(CUDA_SOURCE), tmp_path_factory.mktemp("host"))


def make_tiles(O: int, I: int, groups: int, bits: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tiles, torch.Tensor]:
    """A weight in tiles, and its values [O, I] in `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (O, I), dtype=torch.uint8, generator=generator)
    tiled = lut_gemm.tile_codes(codes, bits)
    if not groups:
        levels = torch.randn(O, 2**bits, generator=generator).to(dtype)  # unsorted, as in the published files
        return Tiles(tiled, levels, None, None, bits, O, I), levels.gather(1, codes.long())
    scale = signed(torch.rand(O, groups, generator=generator) + 0.1).half()
    zero = torch.randint(0, 2**bits, (O, groups), dtype=torch.uint8, generator=generator)
    levels = affine_levels(scale, zero, bits).to(dtype)
    W = levels.gather(2, codes.view(O, groups, -1).long()).view(O, I)
    return Tiles(tiled, None, scale, zero, bits, O, I), W


def draw(*shape: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pad(x: torch.Tensor, tiles: Tiles) -> torch.Tensor:
    """x with whole tiles of columns, as the kernels want it."""
    return torch.nn.functional.pad(x, (0, lut_gemm.TILE_COLUMNS * tiles.codes.shape[1] - tiles.I))


def assert_like(y: torch.Tensor, x: torch.Tensor, W: torch.Tensor, bias: torch.Tensor | None) -> None:
    """As exact as torch's product of the same 16-bit numbers: at most twice its error, both against float64."""
    exact = x.double() @ W.double().T + (0 if bias is None else bias.double())
    theirs = torch.nn.functional.linear(x, W, bias)
    error, their_error = ((t.double() - exact).norm() for t in (y, theirs))
    assert error <= 2 * their_error + 1e-6 * exact.norm()


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("shape", [(1, 1), (16, 256), (17, 257), (40, 600)])
def test_tiles_hold_the_codes(bits, shape):
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tiles = lut_gemm.tile_codes(codes, bits)
    assert tiles.shape == (-(-shape[0] // 16), -(-shape[1] // 256), bits, 32, 4)
    assert torch.equal(lut_gemm.untile_codes(tiles, bits, *shape), codes)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_tiles_of_whole_tiles_take_exactly_the_bits(bits):
    tiles = lut_gemm.tile_codes(torch.zeros(64, 256, dtype=torch.uint8), bits)
    assert tiles.numel() * tiles.element_size() * 8 == 64 * 256 * bits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_on_the_host(built, monkeypatch, shape, bits, dtype):
    O, I, groups = shape
    tiles, W = make_tiles(O, I, groups, bits, dtype)
    assert torch.equal(lut_gemm._dequantize(W, tiles, 0, O), W)
    bias = draw(O, dtype=dtype, seed=2)
    launches = host.run_on(monkeypatch, built)
    assert torch.equal(lut_gemm.dequantize(W, tiles, 0, O), W)
    if O > 16:
        assert torch.equal(lut_gemm.dequantize(W, tiles, 16, O - 16), W[16:])
    for N in TOKENS if I < 300 and O < 36 else (1, 8):
        x = draw(N, I, dtype=dtype)
        assert_like(lut_gemm._multiply_cuda(x, tiles, bias), x, W, bias)
    x = pad(draw(5, I, dtype=dtype), tiles)
    for split in ((1, 4, 2), (2, 4, 1), (4, 8, 3)):
        assert_like(lut_gemm._multiply_fused(x, tiles, bias, *split), x[:, :I], W, bias)
    for plan in ((1, 4, 1), (2, 8, 1), (8, 8, 1), (2, 2, 2)) if not groups else ():
        assert_like(lut_gemm._multiply_one(x[:1], tiles, bias, *plan), x[:1, :I], W, bias)
    kind = f"{'affine' if groups else 'levels'}_{bits}_{lut_gemm.NAMES[dtype]}"
    one = f"lut_gemm_{kind}_1" if groups else f"lut_gemv_{kind}"
    assert {name for name, *_ in launches} >= {f"dequantize_{kind}", f"lut_gemm_{kind}_1", one}


@pytest.mark.parametrize("batch", [(), (1, 1), (2, 3), (3, 1, 4), (2, 50), (0, 5), (13, 100)], ids=str)
def test_tokens_may_have_any_shape(built, monkeypatch, batch):
    """By the kernel for one token, those for few, for many on Hopper, and by rebuilding."""
    tiles, W = make_tiles(35, 130, 0, 3, torch.float16)
    host.run_on(monkeypatch, built)
    x = draw(130, *batch, dtype=torch.float16).movedim(0, -1)  # not contiguous
    y = lut_linear(x, *tiles[:4], None, 3, 35)
    assert y.shape == (*batch, 35)
    assert_like(y.reshape(-1, 35), x.reshape(-1, 130), W, None)


@pytest.fixture(scope="module")
def built_without_tensor_cores(tmp_path_factory):
    flags = ["-DNO_TENSOR_CORES", "-D__CUDA_ARCH__=750"]
    return host.library(CUDA_SOURCE, host.kernel_names(CUDA_SOURCE), tmp_path_factory.mktemp("shuffles"), *flags)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("shape", [(20, 77, 0), (18, 96, 1)], ids=str)
def test_kernels_of_older_gpus_on_the_host(built_without_tensor_cores, monkeypatch, shape, bits, dtype):
    tiles, W = make_tiles(*shape, bits, dtype)
    host.run_on(monkeypatch, built_without_tensor_cores, major=7)
    for N in (1, 3, 8, 11, 17, 40):
        x = draw(N, tiles.I, dtype=dtype)
        assert_like(lut_gemm._multiply_cuda(x, tiles, None), x, W, None)


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("groups", [0, 5])
def test_many_tiles_on_the_host(built, monkeypatch, groups, bits):
    """Rings of shared memory turn over, and blocks and warps share the columns, evenly or not."""
    tiles, W = make_tiles(40, 2480, groups, bits, torch.float16)
    host.run_on(monkeypatch, built)
    x = pad(draw(33, 2480, dtype=torch.float16) / 8, tiles)
    for N, *split in ((2, 1, 4, 1), (8, 4, 8, 2), (9, 4, 4, 1), (17, 4, 4, 2), (33, 2, 2, 3), (20, 1, 1, 1)):
        y = lut_gemm._multiply_fused(x[:N], tiles, None, *split)
        assert_like(y, x[:N, :2480], W, None)
    assert_like(lut_gemm._multiply_fused(x[:3], tiles, None, 1, 16, 1), x[:3, :2480], W, None)
    wide = ((4, 16, 1), (16, 16, 1)) if bits < 4 else ()  # whose registers suffice
    for plan in ((1, 8, 1), (2, 4, 1), (7, 7, 1), (8, 8, 1), (1, 1, 3), (2, 2, 2), *wide) if not groups else ():
        assert_like(lut_gemm._multiply_one(x[:1], tiles, None, *plan), x[:1, :2480], W, None)
    with pytest.raises(ValueError, match="each must be one"):
        lut_gemm._multiply_fused(x[:9], tiles, None, 2, 4, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("shape", [(16, 256), (37, 201), (136, 780)], ids=str)
def test_more_tokens_on_hopper_on_the_host(built, monkeypatch, shape, bits, dtype):
    """Each size of blocks, tails of tokens, rows and columns, parts of columns, the last of them empty. What products in the background
    read stays as it is until they are waited for, which the host sees to."""
    tiles, W = make_tiles(*shape, 0, bits, dtype)
    bias, launches = draw(tiles.O, dtype=dtype, seed=2), host.run_on(monkeypatch, built)
    few, many = ((9, 16, 1), (40, 64, 3)), ((65, 128, 1), (130, 256, 1), (140, 128, 3))
    for N, tokens, parts in (*few, *many) if tiles.O > 128 else ((17, 64, 1), (70, 256, 1), (3, 128, 1), (30, 16, 2)):
        x = draw(N, tiles.I, dtype=dtype)
        assert_like(lut_gemm._multiply_wide(x, tiles, bias, tokens, parts), x, W, bias)
    kind = f"levels_{bits}_{lut_gemm.NAMES[dtype]}"
    assert {name for name, *_ in launches} >= {f"lut_wide_{kind}_{tokens}" for tokens in lut_gemm.WIDE_SIZES}


@pytest.mark.parametrize("N", [9, 16, 17, 40, 64, 65, 200, 300, 512])
def test_any_number_of_tokens_on_hopper_on_the_host(built, monkeypatch, N):
    tiles, W = make_tiles(20, 300, 0, 3, torch.bfloat16)
    launches, x = host.run_on(monkeypatch, built), draw(N, 300, dtype=torch.bfloat16)
    assert_like(lut_gemm._multiply_cuda(x, tiles, None), x, W, None)
    assert [name.split("_3_")[0] for name, *_ in launches][:2] == ["arrange_x", "lut_wide_levels"]


@pytest.mark.parametrize("tokens", lut_gemm.WIDE_SIZES)
def test_rings_of_x_turn_over_on_the_host(built, monkeypatch, tokens):
    """More stages than slots, several times: each slot is asked for again once all warps are through with it."""
    tiles, W = make_tiles(24, 256 * 9 + 40, 0, 4, torch.float16)
    host.run_on(monkeypatch, built)
    x = draw(tokens + 5, tiles.I, dtype=torch.float16) / 8
    assert_like(lut_gemm._multiply_wide(x, tiles, None, tokens, 1), x, W, None)


def test_x_is_arranged_as_products_expect_it(built, monkeypatch):
    """Unit 4 i + t of a token's 64 columns, eight of them, gives its word w to unit 4 i + w; units are exchanged among eight tokens."""
    tiles, _ = make_tiles(16, 300, 0, 4, torch.float16)
    launches, x = host.run_on(monkeypatch, built), draw(21, 300, dtype=torch.float16)
    lut_gemm._multiply_wide(x, tiles, None, 16, 1)
    images = next(args[1] for name, *_, args in launches if name == "arrange_x_4_half")
    assert images.shape == (2, 8, 16, 64)
    expected = torch.zeros(32, 512, dtype=torch.float16)
    expected[:21, :300] = x
    units = expected.view(2, 16, 8, 2, 4, 4, 2).transpose(4, 5).reshape(2, 16, 8, 8, 8).transpose(1, 2)
    for token in range(16):
        exchanged = [unit ^ token % 8 for unit in range(8)]
        assert torch.equal(images[:, :, token].view(2, 8, 8, 8)[:, :, exchanged], units[:, :, token])


@pytest.mark.parametrize(
    "major, N, groups, kernels_used",
    [
        (9, 9, 0, ["arrange_x", "lut_wide_levels"]),
        (9, 65, 0, ["arrange_x", "lut_wide_levels"]),
        (9, 9, 3, ["lut_gemm_affine"]),
        (8, 9, 0, ["lut_gemm_levels"]),
        (9, 2000, 0, ["dequantize_levels"]),
        (9, 65, 3, ["dequantize_affine"]),
        (8, 65, 0, ["dequantize_levels"]),
    ],
)
def test_who_multiplies_more_tokens(built, monkeypatch, major, N, groups, kernels_used):
    tiles, W = make_tiles(17, 96, groups, 3, torch.bfloat16)
    launches = host.run_on(monkeypatch, built, major)
    x = draw(N, 96, dtype=torch.bfloat16)
    assert_like(lut_gemm._multiply_cuda(x, tiles, None), x, W, None)
    assert [name.split("_3_")[0] for name, *_ in launches] == kernels_used


def test_hopper_where_the_compiler_is_too_old(built, monkeypatch):
    """Without lut_wide all goes as on other GPUs, after one warning."""
    tiles, W = make_tiles(17, 96, 0, 4, torch.float16)
    launches = host.run_on(monkeypatch, built)
    compiled = kernels._compiled
    refuse = lambda kernel, index: f"no {kernel.name}" if lut_gemm.HOPPER in kernel.options else compiled(kernel, index)  # noqa: E731
    monkeypatch.setattr(kernels, "_compiled", refuse)
    kernels._warn_once.cache_clear()
    x = draw(65, 96, dtype=torch.float16)
    with pytest.warns(UserWarning, match="no arrange_x_4_half") as caught:
        for N in (9, 65):
            assert_like(lut_linear(x[:N], *tiles[:4], None, 4, 17), x[:N], W, None)
    assert len(caught) == 1
    assert [name for name, *_ in launches] == ["lut_gemm_levels_4_half_2", "dequantize_levels_4_half"]


@pytest.mark.parametrize("N", [9, 16, 33, 64, 65, 512, 1000])
@pytest.mark.parametrize("O, I", [(4096, 4096), (1024, 4096), (28672, 8192), (1024, 8192), (64, 64)])
def test_plans_for_more_tokens_keep_a_gpu_busy(O, I, N):
    gpu = host.Gpu(9, 132, host.SHARED_BYTES[9])
    columns = -(-I // 256)
    tokens, parts = lut_gemm._wide_plan(N, O, columns, 4, gpu)
    blocks = -(-O // 128) * -(-N // tokens) * parts
    assert tokens in lut_gemm.WIDE_SIZES and 1 <= parts <= columns and tokens < 2 * max(N, 128)
    assert blocks >= 96 or parts >= min(columns, 16) // 2


@pytest.mark.parametrize(
    "N, O, I, plan",
    [
        (16, 8192, 8192, (16, 4)),
        (64, 1024, 4096, (64, 8)),
        (64, 4096, 4096, (64, 8)),
        (64, 14336, 4096, (64, 2)),
        (64, 4096, 14336, (64, 8)),
        (64, 28672, 8192, (64, 1)),
        (512, 1024, 4096, (128, 4)),
        (512, 1024, 8192, (256, 8)),
        (512, 4096, 4096, (128, 1)),
        (512, 4096, 14336, (256, 2)),
        (512, 8192, 8192, (256, 1)),
        (512, 28672, 8192, (256, 1)),
    ],
)
def test_plans_that_were_fastest_where_measured(N, O, I, plan):
    assert lut_gemm._wide_plan(N, O, I // 256, 4, host.Gpu(9, 132, host.SHARED_BYTES[9])) == plan


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("tokens", lut_gemm.WIDE_SIZES)
def test_blocks_for_few_tokens_fit_twice(tokens, bits):
    """1 KB of a multiprocessor's 228 is the driver's, of each block."""
    assert (2 if tokens <= 64 else 1) * (lut_gemm._wide_bytes(tokens, bits) + 1024) <= 228 * 1024


def outlier(x: torch.Tensor, size: float = 1000) -> torch.Tensor:
    x[0, 100] = size
    return x


def codes_with_zeros(tiles: Tiles) -> torch.Tensor:
    codes = lut_gemm.untile_codes(tiles.codes, tiles.bits, tiles.O, tiles.I)
    codes[:, :8] = 0
    return codes


ONE_TOKEN = {
    "one outlier": outlier,
    "one that is not yet an outlier": lambda x: outlier(x, 50),
    "some where weights are small": lambda x: x.index_fill_(1, torch.arange(8), 1000),
    "far from zero": lambda x: x + 3,
    "all equal": lambda x: torch.full_like(x, -0.37),
    "denormals": lambda x: x * 2e-6,
    "huge": lambda x: x * 1e4,
    "zeros": torch.zeros_like,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("kind", ONE_TOKEN)
@pytest.mark.parametrize("mean", [0, 3])
def test_one_token_loses_nothing_whatever_it_looks_like(built, monkeypatch, mean, kind, bits, dtype):
    """Its integers, and sums of them in floats, are exact enough: for wide rows, one warp for all columns, and levels that lie apart."""
    tiles, _ = make_tiles(16, 8192, 0, bits, dtype)
    launches = host.run_on(monkeypatch, built)
    levels = (tiles.levels + mean) / 128
    if "weights" in kind:
        levels[:, 0] = 0
        tiles = tiles._replace(codes=lut_gemm.tile_codes(codes_with_zeros(tiles), bits))
    x = ONE_TOKEN[kind](draw(1, tiles.I, dtype=dtype)).to(dtype)
    y = lut_gemm._multiply_one(x, tiles._replace(levels=levels), None, 4, 4, 1)
    codes = lut_gemm.untile_codes(tiles.codes, bits, tiles.O, tiles.I)
    assert y.isfinite().all()
    assert_like(y, x, levels.gather(1, codes.long()), None)
    assert {name for name, *_ in launches} == {f"lut_gemv_levels_{bits}_{lut_gemm.NAMES[dtype]}"}


@pytest.mark.parametrize("major, I", [(7, 256 * 40), (12, 256 * 40), (8, 256 * 190)])
def test_one_token_where_bits_cannot_be_counted(built, monkeypatch, major, I):
    """GPUs whose tensor cores do not count bits, and weights too wide for the shared memory, look levels up."""
    tiles, W = make_tiles(17, I, 0, 2, torch.float16)
    launches = host.run_on(monkeypatch, built, major)
    x = draw(1, I, dtype=torch.float16)
    assert_like(lut_gemm._multiply_cuda(x, tiles, None), x, W, None)
    assert [name for name, *_ in launches] == ["lut_gemm_levels_2_half_1"]


@pytest.mark.parametrize(
    "O, I, plans",  # at 4, 3 and 2 bits; None: looked up
    [
        (1024, 8192, (None, None, None)),
        (4096, 4096, (None, None, None)),
        (14336, 4096, ((4, 4, 1), (8, 8, 1), (8, 8, 1))),
        (4096, 14336, ((2, 8, 1), (2, 8, 1), (2, 8, 1))),
        (8192, 8192, ((4, 8, 1), (4, 8, 1), (4, 8, 1))),
        (28672, 8192, ((4, 4, 2), (8, 8, 1), (8, 8, 1))),
        (8192, 28672, ((4, 8, 1), (4, 16, 1), (4, 16, 1))),
        (16, 256 * 500, (None, None, None)),
    ],
)
def test_plans_for_one_token_that_were_among_the_fastest_where_measured(O, I, plans):
    gpu = host.Gpu(9, 132, host.SHARED_BYTES[9])
    assert tuple(lut_gemm._gemv_plan(O // 16, I // 256, bits, gpu) for bits in (4, 3, 2)) == plans


@pytest.mark.parametrize(
    "gpu", [host.Gpu(7, 40, 65536), host.Gpu(7, 80, 98304), host.Gpu(8, 108, 166912), host.Gpu(8, 142, 101376), host.Gpu(9, 132, 232448)]
)
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_plans_are_valid_for_any_shape(monkeypatch, bits, gpu):
    """Blocks of no more threads and shared memory than kernels and GPUs allow; only teams of one warp have several rows of tiles."""
    monkeypatch.setattr(kernels, "properties", lambda device: gpu)
    for rows, columns in itertools.product((1, 20, 36, 64, 256, 896, 1792, 8016, 16000), (1, 2, 16, 17, 28, 32, 56, 112, 200)):
        if plan := lut_gemm._gemv_plan(rows, columns, bits, gpu):
            teams, warps, each = plan
            assert warps % teams == 0 and warps <= (8 if bits == 4 else 16) and (each == 1 or warps == teams)
            assert lut_gemm._gemv_bytes(warps, each, columns, bits) <= gpu.shared_memory_per_block_optin
        codes = torch.empty(rows, columns, bits, 32, 4, dtype=torch.int32, device="meta")
        tiles = Tiles(codes, None, None, None, bits, 16 * rows, 256 * columns)
        teams, warps, parts = lut_gemm._shares(2, tiles, codes.device)
        assert warps <= (16 if gpu.major >= 8 else 8) and teams == parts == 1
        assert warps * lut_gemm._stream_bytes(lut_gemm.GEMM_STAGES, bits) <= gpu.shared_memory_per_block_optin


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_hostile_levels_on_the_host(built, monkeypatch, bits):
    """Denormals, zeros, the largest numbers, equal levels: every bit pattern comes through the tables."""
    codes = torch.arange(20 * 64).view(20, 64).remainder(2**bits).to(torch.uint8)
    patterns = torch.tensor([0, 1, 0x3FF, 0x400, 0x8001, 0x7BFF, -0x401, -0x8000, 0x3C00, 0x00FF, 0x7F00, 0x0100, 5, 5, 5, -1025])
    levels = patterns[: 2**bits].to(torch.int16).view(torch.float16).expand(20, -1).contiguous()
    tiles = Tiles(lut_gemm.tile_codes(codes, bits), levels, None, None, bits, 20, 64)
    host.run_on(monkeypatch, built)
    W = lut_gemm.dequantize(levels, tiles, 0, 20)
    assert torch.equal(W.view(torch.int16), levels.gather(1, codes.long()).view(torch.int16))


def test_kernels_stay_within_their_memory(built, monkeypatch, tmp_path):
    """Every kernel once under AddressSanitizer and UBSan, on odd sizes, with buffers of exactly the tensors' sizes."""
    launches = host.run_on(monkeypatch, built)
    for bits, dtype, shape in itertools.product((4, 3, 2), DTYPES, ((17, 70, 0), (35, 192, 3))):
        tiles, W = make_tiles(*shape, bits, dtype)
        bias = draw(tiles.O, dtype=dtype)
        if tiles.levels is not None:
            for plan in ((1, 2, 1), (4, 8, 1), (2, 2, 2)):
                lut_gemm._multiply_one(outlier(pad(draw(1, tiles.I, dtype=dtype), tiles)), tiles, None, *plan)
        for N in (1, 2, 11, 19, 33):
            x = pad(draw(N, tiles.I, dtype=dtype), tiles)
            lut_gemm._multiply_fused(x, tiles, bias, *lut_gemm._shares(N, tiles, x.device))
        lut_gemm._multiply_fused(x[:3], tiles, None, 1, 4, 2)
        for tokens in lut_gemm.WIDE_SIZES if tiles.levels is not None else ():
            lut_gemm._multiply_wide(draw(tokens + 1, tiles.I, dtype=dtype), tiles, bias, tokens, tokens // 16 % 2 + 1)
        lut_gemm.dequantize(W, tiles, 0, tiles.O)
    names = host.kernel_names(CUDA_SOURCE)
    assert {name for name, *_ in launches} == set(names)
    program = host.executable(CUDA_SOURCE, names, tmp_path)
    for launch in launches:
        ran = host.run_under_asan(program, launch, tmp_path)
        assert ran.returncode == 0, (launch[0], ran.stderr[-3000:])


@pytest.fixture
def unchecked():
    """No verdict on kernels from another test, and none for it."""
    lut_gemm.kernels_are_right.cache_clear()
    yield
    lut_gemm.kernels_are_right.cache_clear()


@pytest.mark.parametrize("bits, dtype, grouped", [(4, torch.float16, False), (3, torch.bfloat16, True)])
def test_right_kernels_pass_their_check(built, monkeypatch, unchecked, bits, dtype, grouped):
    launches = host.run_on(monkeypatch, built)
    assert lut_gemm.kernels_are_right(torch.device("cpu"), bits, dtype, grouped)
    kind = f"{'affine' if grouped else 'levels'}_{bits}_{lut_gemm.NAMES[dtype]}"
    unused = () if grouped else tuple(f"lut_gemm_{kind}_{tokens}" for tokens in (2, 4, 8))  # lut_wide takes more than 8 tokens
    used = {name for name in host.kernel_names(CUDA_SOURCE) if kind in name and name not in unused}
    assert {name for name, *_ in launches} - {f"add_up_{kind[7:]}", f"arrange_x_{kind[7:]}"} == used


def assert_stays_packed(warning: str) -> None:
    """A model keeps its packed codes, and says so once."""
    model = torch.nn.Sequential(make_linear(4, 0), make_linear(4, 0))
    with pytest.warns(UserWarning, match=warning) as caught:
        prepare_linears(model, torch.float16, "never")
    assert len(caught) == 1
    assert [linear.form for linear in model] == ["packed", "packed"]


@pytest.mark.parametrize(
    "wrong, major",
    [
        ("lut_gemm_levels_4_half_1", 9),
        ("lut_gemm_levels_4_half_8", 8),
        ("lut_gemv", 9),
        ("arrange_x", 9),
        ("lut_wide_levels_4_half_16", 9),
        ("lut_wide_levels_4_half_256", 9),
        ("dequantize", 9),
    ],
)
def test_wrong_kernels_are_not_used(built, monkeypatch, unchecked, wrong, major):
    host.run_on(monkeypatch, built, major)
    right = kernels._call

    def call(function, kernel, device, blocks, threads, shared_bytes, args):
        right(function, kernel, device, blocks, threads, shared_bytes, args)
        if kernel.name.startswith(wrong):  # memory it does not write might hold an earlier check's results: those are right
            [arg for arg in args if isinstance(arg, torch.Tensor)][-1].zero_()  # what it writes comes last

    monkeypatch.setattr(kernels, "_call", call)
    assert_stays_packed("kernels for 4 bits and torch.float16 give wrong products on cpu")


def test_without_a_compiler_codes_stay_packed_after_one_warning(built, monkeypatch, unchecked):
    host.run_on(monkeypatch, built)
    monkeypatch.setattr(kernels, "_compiled", lambda kernel, index: f"{kernel.name} runs in torch: no CuPy")
    kernels._warn_once.cache_clear()
    assert_stays_packed("no CuPy")


def test_the_check_is_made_whatever_the_default_device(built, monkeypatch, unchecked):
    host.run_on(monkeypatch, built)
    with torch.device("meta"):
        assert lut_gemm.kernels_are_right(torch.device("cpu"), 2, torch.float16, True)


def test_right_kernels_are_used(built, monkeypatch, unchecked):
    host.run_on(monkeypatch, built)
    model = torch.nn.Sequential(make_linear(4, 0), make_linear(2, 12))
    prepare_linears(model, torch.float16, "never")
    assert [linear.form for linear in model] == ["tiles", "packed"]  # groups of 8 columns: no kernel reads them


# --- the operator ----------------------------------------------------------------------------------------------


def operator_arguments(N: int = 3, dtype: torch.dtype = torch.float16) -> tuple:
    tiles, _ = make_tiles(37, 200, 0, 3, dtype)
    return draw(2, N, 200, dtype=dtype), tiles.codes, tiles.levels, None, None, draw(37, dtype=dtype, seed=3), 3, 37


def test_operator_is_well_formed():
    torch.library.opcheck(torch.ops.leanquant.lut_linear.default, operator_arguments())


def test_operator_in_torch_compile_without_graph_breaks():
    args = operator_arguments()
    compiled = torch.compile(lambda x: lut_linear(x, *args[1:]).relu(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(args[0]), lut_linear(*args).relu(), rtol=0, atol=0)


def test_gradients_reach_the_input_and_the_bias():
    tiles, W = make_tiles(35, 192, 3, 4, torch.bfloat16)
    x, bias = draw(4, 192, dtype=torch.bfloat16), draw(35, dtype=torch.bfloat16).requires_grad_()
    lut_linear(x, *tiles[:4], bias, 4, 35).sum().backward()
    lut_linear(x.requires_grad_(), *tiles[:4], bias, 4, 35).sum().backward()
    torch.testing.assert_close(x.grad, W.sum(0).expand(4, -1), rtol=0.02, atol=0.1)
    torch.testing.assert_close(bias.grad, torch.full_like(bias, 8), rtol=0, atol=0)


def test_gradients_under_torch_compile():
    tiles, W = make_tiles(35, 192, 0, 3, torch.float16)
    multiply = torch.compile(lambda x: lut_linear(x, *tiles[:4], None, 3, 35) * 2, backend="aot_eager", fullgraph=True)
    x = draw(4, 192, dtype=torch.float16).requires_grad_()
    multiply(x).sum().backward()
    torch.testing.assert_close(x.grad, 2 * W.sum(0).expand(4, -1), rtol=0.01, atol=0.05)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_come_through(built, monkeypatch, dtype):
    """A model that overflows must not look sane: every NaN stays one, whatever its bits; where bits are counted, infinity is one."""
    tiles, W = make_tiles(16, 64, 0, 4, dtype)
    host.run_on(monkeypatch, built)
    for value in (float("inf"), float("-inf"), float("nan")):
        x = draw(1, 64, dtype=dtype)
        x[0, 5] = value
        assert lut_gemm._multiply_one(pad(x, tiles), tiles, None, 1, 2, 1).isnan().all()
        assert not lut_gemm._multiply_cuda(x, tiles, None).isfinite().any()
        assert not lut_gemm._multiply_cuda(x.expand(2, -1).contiguous(), tiles, None).isfinite().any()
    for bits in (0x7FFF, -1, 0x7FC0 if dtype == torch.bfloat16 else 0x7E00):
        x = draw(2, 64, dtype=dtype)
        x.view(torch.int16)[1, 3] = bits
        y = lut_gemm._multiply_cuda(x, tiles, None)
        assert y[1].isnan().all() and y[0].isfinite().all()


@pytest.mark.parametrize("limit, size", [("PIECE_BYTES", 2 * 16 * 200), ("INDICES", 16 * 200)])
def test_no_tokens_and_many_tokens(monkeypatch, limit, size):
    monkeypatch.setattr(lut_gemm, limit, size)  # several pieces
    tiles, W = make_tiles(50, 200, 0, 4, torch.float16)
    for N in (0, 1, 100):
        x = draw(N, 200, dtype=torch.float16)
        y = lut_linear(x, *tiles[:4], None, 4, 50)
        assert y.shape == (N, 50)
        assert_like(y, x, W, None)


def test_tiles_that_do_not_fit_are_refused(built, monkeypatch):
    host.run_on(monkeypatch, built)
    tiles, _ = make_tiles(37, 200, 0, 4, torch.float16)
    x = draw(2, 200, dtype=torch.float16)
    for wrong in (tiles._replace(O=60), tiles._replace(bits=3), tiles._replace(I=300), tiles._replace(levels=tiles.levels[:5])):
        with pytest.raises(ValueError, match="do not hold a weight"):
            lut_gemm._multiply_cuda(x, wrong, None)
    grouped, _ = make_tiles(35, 192, 3, 4, torch.float16)
    with pytest.raises(ValueError, match="groups hold 16 n columns"):
        lut_gemm._multiply_cuda(draw(2, 192, dtype=torch.float16), grouped._replace(scale=grouped.scale[:, :2]), None)


def test_the_benchmark_runs_from_end_to_end(tmp_path):
    script, out = Path(bench_inference.__file__), tmp_path / "bench.json"
    subprocess.run([sys.executable, script, "--smoke", "--device", "cpu", "--bits", "3", "--out", out], check=True, capture_output=True)
    results = json.loads(out.read_text())
    assert {row["tokens"] for row in results["products"]} == set(bench_inference.TOKENS)
    assert [row["bits"] for row in results["host"]] == [16, 3]
    assert [(row["bits"], row["vocab_bits"]) for row in results["model"]] == [(16, 16), (3, 16), (3, 8), (3, 4)]
    assert results["promises"] == {}  # nothing is claimed that was not measured at its size, on a GPU


def test_other_plans_are_timed_too(built, monkeypatch, capsys):
    launches = host.run_on(monkeypatch, built)
    monkeypatch.setattr(lut_gemm, "_is_small", lambda *_: False)
    lut_gemm._gemv_plan.cache_clear()
    monkeypatch.setattr(bench_inference, "PLANNED_TOKENS", (1, 2, 9, 65))
    rows = bench_inference.bench_plans(20, 300, 2, torch.device("cpu"))
    assert [sum(row["planned"] for row in rows if row["tokens"] == N) for N in (1, 2, 9, 65)] == [1, 1, 1, 1]
    assert len(rows) > 30 and all(row["ms"] > 0 for row in rows)
    assert {name.split("_levels")[0] for name, *_ in launches} == {"lut_gemv", "lut_gemm", "arrange_x_2_half", "lut_wide", "add_up_2_half"}
    assert capsys.readouterr().out.count("best") == 4
    lut_gemm._gemv_plan.cache_clear()


# --- the module ------------------------------------------------------------------------------------------------


def make_linear(bits: int, groups: int, layout: str = "dense", bias: bool = True) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(4)
    codes = pack_codes(torch.randint(0, 2**bits, (37, 96), dtype=torch.uint8, generator=generator), bits, layout)
    b = draw(37, dtype=torch.float16, seed=5) if bias else None
    if not groups:
        return QuantizedLinear(PackedLinear(codes, torch.randn(37, 2**bits, generator=generator).half()), bits, 96, b)
    scale = signed(torch.rand(37, groups, generator=generator) + 0.1).half()
    zero = torch.randint(0, 2**bits, (37, groups), dtype=torch.uint8, generator=generator)
    return QuantizedLinear(PackedLinear(codes, None, scale, zero), bits, 96, b)


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("groups, layout", [(0, "dense"), (0, "nibble"), (1, "dense"), (3, "dense"), (6, "nibble")])
def test_forms_agree_and_save_the_same_state(bits, groups, layout):
    linear = make_linear(bits, groups, layout)
    x = draw(5, 96, dtype=torch.float16)
    expected, state = linear(x), {name: t.clone() for name, t in linear.state_dict().items()}
    for form in ("dense", "tiles", "packed"):
        linear.prepare(form, torch.float16)
        assert linear.form == form
        torch.testing.assert_close(linear(x), expected, rtol=2e-3, atol=2e-2)
        saved = linear.state_dict()
        assert saved.keys() == state.keys()
        assert all(torch.equal(saved[name], state[name]) for name in state)


def test_tiles_take_the_place_of_the_codes():
    linear = make_linear(4, 0)
    linear.prepare("tiles", torch.float16)
    assert linear.weight_codes is None
    assert linear.tiles.numel() * 4 == 48 * 256 // 2  # padded to whole tiles


def test_groups_that_kernels_cannot_read_stay_packed():
    linear = make_linear(4, 12)  # of 8 columns
    linear.prepare("tiles", torch.float16)
    assert linear.form == "packed"
    linear.prepare("tiles", torch.float32)
    assert linear.form == "packed"


def test_another_dtype_than_prepared_for_is_still_right():
    linear = make_linear(3, 0)
    weight, bias = linear.packed().dequantize(3, 96, torch.float32), linear.bias.float()
    linear.prepare("tiles", torch.float16)
    for dtype in (torch.bfloat16, torch.float32):
        x = draw(5, 96, dtype=dtype)
        torch.testing.assert_close(linear(x).float(), x.float() @ weight.T + bias, rtol=0.02, atol=0.1)


def test_casting_the_module_keeps_what_is_stored():
    linear = make_linear(4, 3)
    state = {name: t.clone() for name, t in linear.state_dict().items()}
    linear.to(torch.bfloat16).float().to("cpu")
    assert all(torch.equal(linear.state_dict()[name], state[name]) for name in ("weight_codes", "scale", "zero"))
    assert linear.bias.dtype == torch.float32


def test_packed_products_go_by_pieces(monkeypatch):
    linear = make_linear(4, 0)
    x = draw(5, 96, dtype=torch.float32)
    whole = linear.float()(x)
    monkeypatch.setattr("leanquant.linear.PIECE_WEIGHTS", 96 * 10)
    torch.testing.assert_close(linear(x), whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", [["--wbits", "3", "--exponent", "4"], ["--wbits", "4", "--grid", "minmax", "--groupsize", "32"]], ids=str)
def test_logits_of_a_whole_model_on_kernels(built, monkeypatch, tiny_model, text_file, tmp_path, flags, dtype):
    """Logits in 16 bits stray from float32's at most twice as far as those of the same weights, dequantized, in 16 bits."""
    out, base = tmp_path / "q.safetensors", tiny_model()
    command = [str(base), str(text_file), "--nsamples", "2", "--seqlen", "32", "--eval", "none", "--save_path", str(out), *flags]
    assert llama.main(command) == 0
    ids = torch.arange(8).view(1, -1) + 5

    def logits(dtype, form):
        model = LeanQuantModelForCausalLM.from_pretrained(base, out, torch_dtype=dtype, dequantize="never")
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                module.prepare(form, dtype)
                assert module.form == form
        with torch.no_grad():
            return model(ids).logits.double()

    exact, plain = logits(torch.float32, "dense"), logits(dtype, "dense")
    monkeypatch.setattr(lut_gemm, "kernels_are_right", lambda *_: True)  # which launches more
    launches = host.run_on(monkeypatch, built)
    found = logits(dtype, "tiles")
    assert len(launches) == 14
    assert (found - exact).norm() <= 2 * (plain - exact).norm()


# --- on a GPU --------------------------------------------------------------------------------------------------


@pytest.fixture
def no_fallback(monkeypatch):
    """A kernel that does not run fails its test."""

    def fail(message):
        raise AssertionError(message)

    monkeypatch.setattr(kernels, "_warn_once", fail)


def to_gpu(tiles: Tiles) -> Tiles:
    return Tiles(*(t.cuda() if isinstance(t, torch.Tensor) else t for t in tiles))


@pytest.mark.usefixtures("no_fallback")
class TestOnTheGpu:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("bits", [4, 3, 2])
    @pytest.mark.parametrize("shape", [*SHAPES, (4096, 4096, 0), (1024, 4096, 32)], ids=str)
    def test_kernels(self, shape, bits, dtype):
        O, I, groups = shape
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        tiles, W = make_tiles(O, I, groups, bits, dtype)
        tiles, W, bias = to_gpu(tiles), W.cuda(), draw(O, dtype=dtype, seed=2).cuda()
        assert torch.equal(lut_gemm.dequantize(W, tiles, 0, O), W)
        for N in (*TOKENS, 65, 200, 512, 1100):
            x = draw(N, I, dtype=dtype).cuda()
            y = lut_linear(x, *tiles[:4], bias, bits, O)
            assert_like(y, x, W, bias)
            assert torch.equal(y, lut_linear(x, *tiles[:4], bias, bits, O))
        for plan in ((1, 8, 1), (4, 8, 1), (2, 2, 2), *[(4, 16, 1)] * (bits < 4)) if not groups else ():
            for x in (draw(1, I, dtype=dtype).cuda(), outlier(draw(1, I + 101, dtype=dtype))[:, -I:].cuda().contiguous()):
                assert_like(lut_gemm._multiply_one(pad(x, tiles), tiles, bias, *plan), x, W, bias)

    def test_in_a_cuda_graph(self):
        tiles = to_gpu(make_tiles(256, 512, 0, 4, torch.float16)[0])
        x = draw(1, 512, dtype=torch.float16).cuda()
        expected = lut_linear(x, *tiles[:4], None, 4, 256)
        graph, seen = torch.cuda.CUDAGraph(), torch.zeros_like(x)
        with torch.cuda.graph(graph):
            y = lut_linear(seen, *tiles[:4], None, 4, 256)
        seen.copy_(x)
        graph.replay()
        assert torch.equal(y, expected)

    @pytest.mark.parametrize("captured", [False, True])
    @pytest.mark.parametrize("sizes", [(1024,), (5120,), (1024, 5120, 5120)], ids=str)  # the last: counted and looked up in turn
    @pytest.mark.parametrize("N", [1, 4, 40, 300])
    def test_each_of_a_chain_waits_for_the_one_before(self, N, sizes, captured):
        """They may begin early, but not read early."""
        links = []
        for I, O in zip(sizes, sizes[1:] + sizes[:1], strict=True):
            tiles = to_gpu(make_tiles(O, I, 0, 4, torch.float16)[0])
            links.append(tiles._replace(levels=tiles.levels / I**0.5))

        def chain(x: torch.Tensor, after_each) -> torch.Tensor:
            for tiles in links * (48 // len(links)):
                x = lut_linear(x, *tiles[:4], None, 4, tiles.O)
                after_each()
                if tiles is links[-1] and len(links) > 1:
                    x = torch.nn.functional.layer_norm(x, x.shape[-1:])  # a kernel of torch's among ours
                    after_each()
            return x

        x = draw(N, sizes[0], dtype=torch.float16).cuda()
        expected, run = chain(x, torch.cuda.synchronize), lambda: chain(x, lambda: None)
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = run()
            run = lambda: graph.replay() or y  # noqa: E731
        for _ in range(20):
            assert torch.equal(run(), expected)

    def test_compiled_with_reduced_overhead(self):
        tiles = to_gpu(make_tiles(256, 512, 0, 4, torch.float16)[0])
        multiply = lambda x: lut_linear(x, *tiles[:4], None, 4, 256).relu()  # noqa: E731
        compiled = torch.compile(multiply, mode="reduce-overhead", fullgraph=True)
        for seed in range(4):
            x = draw(1, 512, dtype=torch.float16, seed=seed).cuda()
            assert torch.equal(compiled(x).clone(), multiply(x))

    def test_on_a_side_stream(self):
        tiles = to_gpu(make_tiles(256, 512, 0, 4, torch.float16)[0])
        x = draw(1, 512, dtype=torch.float16).cuda()
        expected, side = lut_linear(x, *tiles[:4], None, 4, 256), torch.cuda.Stream()
        late = torch.full_like(x, float("nan"))
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            busy = torch.randn(8192, 8192, device="cuda")
            for _ in range(5):
                busy = busy @ busy / 8192
            late.copy_(x)
            y = lut_linear(late, *tiles[:4], None, 4, 256)
        side.synchronize()
        assert torch.equal(y, expected)
