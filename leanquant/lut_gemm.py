"""Products with weights that stay codes and levels: the layout of lut_gemm.cu, its kernels, their torch twins, the operator.

`lut_linear` is a torch operator, so that torch.compile and CUDA graphs take it as it is. Not here: modules, files.
Legend: N tokens, O out_features, I in_features, K = 2**bits levels, G groups; dtype float16 or bfloat16.
"""

import warnings
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch

from . import kernels
from .packing import affine_levels

CUDA_SOURCE = Path(__file__).with_name("lut_gemm.cu")
TILE_ROWS, TILE_COLUMNS, PIECE, THREADS, WARPS, GEMV_WARPS = 16, 256, 8, 256, 8, 16
GEMV_STAGES, GEMM_STAGES = {4: 4, 3: 5, 2: 8}, 3  # tiles whose codes a warp has under way or at work
DRIVER_BYTES = 1024  # of shared memory, in each block
PLANES_BYTES = 544  # of shared memory for x's bits in a tile of columns: lut_gemm.cu's PLANES_WORDS
COUNT_BITS = (8, 9)  # major architectures whose tensor cores do; later ones are slow at it
FEW_TOKENS = 8  # more are multiplied on Hopper by lut_wide, if levels are free
FUSED_TOKENS = 64  # elsewhere more are multiplied by cuBLAS, with weights rebuilt in pieces
WIDE_TOKENS = 1024  # so are more than these on Hopper: rebuilding should then cost less than cuBLAS is ahead (not measured)
WIDE_ROWS, WIDE_SIZES = 128, (16, 64, 128, 256)  # rows of a block, and how many tokens it may have
STAGE_COLUMNS, CODE_STAGES = 64, 3  # of x in a slot of its ring; tiles of codes that a warp has under way or at work
WIDE_CLOCKS = {128: 4270, 256: 6100}  # for a tile of columns and so many tokens, on an H200
TOLERANCE = {torch.float16: 0.001, torch.bfloat16: 0.004}  # of a product, several times its rounding
SMALL = 32  # tiles of a multiprocessor: with fewer a weight is small
HOPPER_MAJOR = 9
HOPPER = "--gpu-architecture=sm_90a"  # has lut_wide's instructions; the compiler prefers it to the sm_90 that CuPy names
PIECE_BYTES = 2**27  # of rebuilt weights at a time
INDICES = 2**24  # codes that torch turns into indices at a time, at 8 bytes each
NAMES = {torch.float16: "half", torch.bfloat16: "bfloat16"}


class Tiles(NamedTuple):
    """A weight [O, I] as lut_gemm.cu reads it.

    codes int32 [O/16, I/256, bits, 32, 4], rounded up; levels [O, K] in the dtype of x, or scale float16 and zero uint8 [O, G], for
    groups of a multiple of 16 columns.
    """

    codes: torch.Tensor
    levels: torch.Tensor | None
    scale: torch.Tensor | None
    zero: torch.Tensor | None
    bits: int
    O: int
    I: int

    @property
    def groups(self) -> int:
        return 1 if self.levels is not None else self.scale.shape[1]


def tile_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes uint8 [O, I] in the layout of lut_gemm.cu: int32 [O/16, I/256, bits, 32, 4], rounded up, padded with zeros."""
    O, I = codes.shape
    codes = torch.nn.functional.pad(codes, (0, -I % TILE_COLUMNS, 0, -O % TILE_ROWS))
    pieces = codes.split(max(TILE_ROWS, INDICES // codes.shape[1] // TILE_ROWS * TILE_ROWS))
    return torch.cat([_tile(piece, bits) for piece in pieces])


def _tile(codes: torch.Tensor, bits: int) -> torch.Tensor:
    # row = 16 R + 8 half + g, column = 256 C + 128 h + 32 s + 8 t + 4 q + j -> bit 16 q + 4 j + s of word 2 h + half of lane 4 g + t
    words = codes.view(len(codes) // 16, 2, 8, -1, 2, 4, 4, 2, 4).permute(0, 3, 2, 6, 4, 1, 7, 8, 5).flatten(6).flatten(4, 5).flatten(2, 3)
    places = torch.arange(32, dtype=torch.int32, device=codes.device)
    planes = [((words >> bit & 1).int() << places).sum(4, dtype=torch.int32) for bit in range(bits)]
    return torch.stack(planes, 2)


def untile_codes(tiles: torch.Tensor, bits: int, O: int, I: int) -> torch.Tensor:
    """Invert `tile_codes`: uint8 [O, I]."""
    pieces = tiles.split(max(1, INDICES // (tiles[0].numel() * 32 // bits)))
    return torch.cat([_untile(piece, bits) for piece in pieces])[:O, :I].contiguous()


def _untile(tiles: torch.Tensor, bits: int) -> torch.Tensor:
    places = torch.arange(32, dtype=torch.int32, device=tiles.device)
    words = sum((tiles[:, :, bit].unsqueeze(4) >> places & 1).to(torch.uint8) << bit for bit in range(bits))
    R, C = words.shape[:2]
    return words.view(R, C, 8, 4, 2, 2, 2, 4, 4).permute(0, 5, 2, 1, 4, 8, 3, 6, 7).reshape(R * 16, C * 256)


# --- the operator ----------------------------------------------------------------------------------------------


# Defined by schema: an empty operator made so takes 3.5 us a call on the host, one made by torch.library.custom_op 11.
torch.library.define(
    "leanquant::lut_linear",
    "(Tensor x, Tensor codes, Tensor? levels, Tensor? scale, Tensor? zero, Tensor? bias, int bits, int rows) -> Tensor",
)
torch.library.define(
    "leanquant::lut_linear_backward",
    "(Tensor grad, Tensor codes, Tensor? levels, Tensor? scale, Tensor? zero, int bits, int columns) -> Tensor",
)


def lut_linear(x: torch.Tensor, codes: torch.Tensor, levels, scale, zero, bias, bits: int, rows: int) -> torch.Tensor:
    """x [..., I] W^T + bias [O] for the weight of a `Tiles`; rows = O. float16 or bfloat16 in and out, summed in float32.

    On a GPU kernels ahead in the stream may still be at work while the weight is read: none that the host did not wait for may write it.
    A plain tensor without a gradient does not go through the operator, which costs more time on the host than the rest.
    """
    is_learned = torch.is_grad_enabled() and (x.requires_grad or bias is not None and bias.requires_grad)
    plain = type(x) is torch.Tensor and not is_learned and not torch.compiler.is_compiling()
    multiply = _lut_linear if plain and not x.is_meta else torch.ops.leanquant.lut_linear
    return multiply(x, codes, levels, scale, zero, bias, bits, rows)


def _lut_linear(x, codes, levels, scale, zero, bias, bits, rows):
    tiles = Tiles(codes, levels, scale, zero, bits, rows, x.shape[-1])
    x = x.contiguous()
    if x.data_ptr() % 16:
        x = x.clone()  # the kernels read 16 bytes at a time
    return kernels.run(_multiply_cuda, _multiply, x, tiles, bias)


torch.library.impl("leanquant::lut_linear", "CompositeExplicitAutograd", _lut_linear)


@torch.library.register_fake("leanquant::lut_linear")
def _(x, codes, levels, scale, zero, bias, bits, rows):
    return x.new_empty(*x.shape[:-1], rows)


@torch.library.impl("leanquant::lut_linear_backward", "CompositeExplicitAutograd")
def _lut_linear_backward(grad, codes, levels, scale, zero, bits, columns):
    """grad [..., O] W, by pieces of rows: what `lut_linear` hands back to x [..., I]; columns = I."""
    tiles = Tiles(codes, levels, scale, zero, bits, grad.shape[-1], columns)
    flat = grad.reshape(-1, grad.shape[-1])
    back = torch.zeros(len(flat), columns, dtype=torch.float32, device=grad.device)
    for first, rows in _pieces(tiles):
        back += flat[:, first : first + rows] @ dequantize(grad, tiles, first, rows)
    return back.to(grad.dtype).view(*grad.shape[:-1], columns)


@torch.library.register_fake("leanquant::lut_linear_backward")
def _(grad, codes, levels, scale, zero, bits, columns):
    return grad.new_empty(*grad.shape[:-1], columns)


def _keep_for_backward(ctx, inputs, output) -> None:
    x, codes, levels, scale, zero, bias, bits, rows = inputs
    ctx.save_for_backward(codes, levels, scale, zero)
    ctx.bits, ctx.columns = bits, x.shape[-1]


def _backward(ctx, grad: torch.Tensor):
    """Of x and the bias, so that adapters can be trained on top: codes and levels are fixed."""
    multiply = torch.ops.leanquant.lut_linear_backward
    back = multiply(grad, *ctx.saved_tensors, ctx.bits, ctx.columns) if ctx.needs_input_grad[0] else None
    return back, *(None,) * 4, grad.sum_to_size(grad.shape[-1]) if ctx.needs_input_grad[5] else None, None, None


torch.library.register_autograd("leanquant::lut_linear", _backward, setup_context=_keep_for_backward)


def _multiply(x: torch.Tensor, tiles: Tiles, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., I] -> [..., O], by pieces of rows that are rebuilt and multiplied."""
    flat = x.view(-1, tiles.I)
    y = x.new_empty(len(flat), tiles.O)
    for first, rows in _pieces(tiles):
        out, W = y[:, first : first + rows], dequantize(x, tiles, first, rows).T
        if bias is None:
            torch.mm(flat, W, out=out)
        else:
            torch.addmm(bias[first : first + rows], flat, W, out=out)
    return y.view(*x.shape[:-1], tiles.O)


def _multiply_cuda(x: torch.Tensor, tiles: Tiles, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., I] -> [..., O]. Up to 64 tokens, on Hopper with free levels 1024, are multiplied with codes and levels; for more, weights
    are rebuilt by a kernel and multiplied by cuBLAS."""
    N = x.numel() // tiles.I
    if _is_wide(N, tiles):
        return _multiply_wide(x, tiles, bias, *_wide_plan(N, tiles.O, tiles.codes.shape[1], tiles.bits, kernels.properties(x.device)))
    if N > FUSED_TOKENS:
        return _multiply(x, tiles, bias)
    if N == 0:
        return _empty(x, tiles)
    if missing := TILE_COLUMNS * tiles.codes.shape[1] - tiles.I:
        x = torch.nn.functional.pad(x, (0, missing))
    if N == 1 and tiles.levels is not None and (plan := _gemv_plan(*tiles.codes.shape[:2], tiles.bits, kernels.properties(x.device))):
        return _multiply_one(x, tiles, bias, *plan)
    return _multiply_fused(x, tiles, bias, *_shares(N, tiles, x.device))


def _is_small(rows: int, columns: int, gpu) -> bool:
    """A weight of so many tiles: x's way to and through a block counts for more than they do."""
    return rows * columns <= SMALL * gpu.multi_processor_count


def _empty(x: torch.Tensor, tiles: Tiles) -> torch.Tensor:
    """y [..., O], not yet written. With its shape from the start, as x keeps its own: to view both as matrices takes 2 us."""
    return x.new_empty(*x.shape[:-1], tiles.O)


@lru_cache
def _gemv_plan(rows: int, columns: int, bits: int, gpu) -> tuple[int, int, int] | None:
    """(teams, warps, each) for `_multiply_one`, by the tiles of a weight; as measured on an H200, where there is a choice. None: to be
    looked up, since its GPU's tensor cores do not count bits, or x's planes take longer than its tiles, or too much memory.

    Every block makes the planes, so they should all be at work at once. With few rows the warps of a team share the columns; with many
    each has rows of tiles of its own, if need be several one after the other, and two blocks share a multiprocessor. Registers suffice
    for 8 warps of 4 bits, and for 16 of fewer: in two blocks, so that the next kernel's begin early, if memory does for both.
    """
    if gpu.major not in COUNT_BITS or _is_small(rows, columns, gpu):
        return None
    for most, blocks in ((8, 1), (4, 1)) if bits == 4 else ((8, 2), (16, 1), (8, 1), (4, 1)):
        teams = -(-rows // gpu.multi_processor_count)
        plan = teams, most // teams * teams, 1
        if teams > 4:
            teams = min(most, 4 if bits == 4 else 8)
            plan = teams, teams, min(4, -(-rows // (2 * teams * gpu.multi_processor_count)))  # more would take too much memory
        if blocks * (_gemv_bytes(*plan[1:], columns, bits) + DRIVER_BYTES) <= gpu.shared_memory_per_block_optin + DRIVER_BYTES:
            return plan
    return None


def _gemv_bytes(warps: int, each: int, columns: int, bits: int) -> int:
    """Of shared memory, as lut_gemv lays it out."""
    levels, sums, results = 4 * TILE_ROWS * (2**bits + 4), 4 * TILE_ROWS, 4 * TILE_ROWS
    return PLANES_BYTES * columns + warps * (_stream_bytes(GEMV_STAGES[bits], bits) + each * (levels + sums + results)) + 8 * GEMV_WARPS


def _stream_bytes(stages: int, bits: int) -> int:
    """Of shared memory, for the codes of a row of tiles that a warp has under way."""
    return stages * bits * TILE_ROWS * TILE_COLUMNS // 8


def _multiply_one(x: torch.Tensor, tiles: Tiles, bias: torch.Tensor | None, teams: int, warps: int, each: int) -> torch.Tensor:
    """x of one token, whole tiles of columns -> [..., O], by blocks of `warps` warps in `teams`, which divide them, and `each` rows of
    tiles for a team: of one warp, if there are several."""
    y, shared = _empty(x, tiles), _gemv_bytes(warps, each, tiles.codes.shape[1], tiles.bits)
    kernel, blocks = _kernel("lut_gemv", tiles.bits, x.dtype, False), (-(-tiles.codes.shape[0] // (teams * each)), 1)
    _launch(kernel, tiles, blocks, 32 * warps, shared, x, bias, y, tiles.O, tiles.I, 1, teams, each)
    return y


def _shares(N: int, tiles: Tiles, device: torch.device) -> tuple[int, int, int]:
    """(teams, warps, parts) for `_multiply_fused`, by the rows of tiles a multiprocessor has.

    The warps of a block share the columns; with many rows there are fewer of them, so that all are busy to the end, with few rows and
    long ones more. More than 8 tokens: four warps with rows of their own share x, and two blocks for each multiprocessor the columns.
    """
    gpu = kernels.properties(device)
    processors = gpu.multi_processor_count
    rows, columns = tiles.codes.shape[:2]
    if N > FEW_TOKENS:
        blocks = -(-rows // (4 * _rows_a_warp(N, tiles, device)))
        return 4, 4, max(1, min(2 * processors // blocks, columns // 2))
    long = 2 * rows <= processors and columns > 16 and gpu.major >= 8  # before, a block has 8 warps at most
    return 1, 4 if rows > 4 * processors else 16 if long else 8, 1


def _rows_a_warp(N: int, tiles: Tiles, device: torch.device) -> int:
    """Of tiles. Registers suffice for two for free levels, where no product goes by shuffles: see MOST_ROWS in lut_gemm.cu."""
    return 2 if N > FEW_TOKENS and tiles.levels is not None and kernels.properties(device).major >= 8 else 1


def _multiply_fused(x: torch.Tensor, tiles: Tiles, bias: torch.Tensor | None, teams: int, warps: int, parts: int) -> torch.Tensor:
    """x [..., whole tiles of columns] -> [..., O], at most 64 tokens.

    A block of `warps` warps has `teams` times the rows of tiles of a warp; `parts` blocks share the columns. For more than 8
    tokens, teams = warps.
    """
    N = x.numel() // x.shape[-1]
    if N > FEW_TOKENS and teams != warps:
        raise ValueError(f"{N} tokens: the {warps} warps of a block are {teams} teams, where each must be one")
    tokens, rows = next(t for t in (1, 2, 4, 8) if N <= 8 * t), _rows_a_warp(N, tiles, x.device)
    y = _empty(x, tiles)
    partial = x.new_empty(parts, N, tiles.O, dtype=torch.float32) if parts > 1 else None
    copies = 0 if tokens == 1 else 1 if kernels.properties(x.device).major < 8 else 2  # of a tile of x, for the whole block
    streams = copies * 8 * tokens * 2 * TILE_COLUMNS + warps * rows * _stream_bytes(copies or GEMM_STAGES, tiles.bits)
    shared = max(streams, warps * rows * 8 * tokens * (TILE_ROWS + 4) * 4)
    kernel = _kernel("lut_gemm", tiles.bits, x.dtype, tiles.levels is None, tokens)
    blocks = (-(-tiles.codes.shape[0] // (teams * rows)), parts)
    _launch(kernel, tiles, blocks, 32 * warps, shared, x, bias, y, partial, tiles.O, tiles.I, tiles.groups, N, teams)
    if partial is not None:
        _add_up(partial, bias, y, tiles.bits)
    return y


def _is_wide(N: int, tiles: Tiles) -> bool:
    """Is it for lut_wide? Its compiler may be too old for it, or the GPU another."""
    if not FEW_TOKENS < N <= WIDE_TOKENS or tiles.levels is None or kernels.properties(tiles.codes.device).major != HOPPER_MAJOR:
        return False
    return kernels.is_available(_kernel("arrange_x", tiles.bits, tiles.levels.dtype), tiles.codes.device)


@lru_cache
def _wide_plan(N: int, O: int, columns: int, bits: int, gpu) -> tuple[int, int]:
    """(tokens a block, parts that share the columns) for `_multiply_wide`.

    Up to 64 tokens, which take about as long as one: two blocks for each multiprocessor, but two tiles of columns for each. More: what
    should take least, by WIDE_CLOCKS; a block takes some time besides, and so does adding up parts.
    """
    if N <= FUSED_TOKENS:
        tokens = 16 if N <= 16 and (bits == 4 or _is_small(-(-O // TILE_ROWS), columns, gpu)) else 64
        return tokens, max(1, min(2 * gpu.multi_processor_count // _wide_blocks(N, O, tokens), columns // 2))

    def cost(plan: tuple[int, int]) -> float:
        tokens, parts = plan
        blocks = -(-_wide_blocks(N, O, tokens) * parts // gpu.multi_processor_count)  # of the multiprocessor that has most
        work = blocks * (-(-columns // parts) * WIDE_CLOCKS[tokens] + 3000)
        return work if parts == 1 else work + 4000 + 8 * parts * N * O / 2000

    return min(((tokens, parts) for tokens in WIDE_CLOCKS for parts in range(1, min(columns, 16) + 1)), key=cost)


def _wide_blocks(N: int, O: int, tokens: int) -> int:
    return -(-O // WIDE_ROWS) * -(-N // tokens)


def _multiply_wide(x: torch.Tensor, tiles: Tiles, bias: torch.Tensor | None, tokens: int, parts: int) -> torch.Tensor:
    """x [..., I] -> [..., O] on Hopper, by blocks of 128 rows and `tokens` tokens, of WIDE_SIZES; `parts` of them share the columns."""
    N, columns = x.numel() // tiles.I, tiles.codes.shape[1]
    images = x.new_empty(-(-N // tokens), columns * TILE_COLUMNS // STAGE_COLUMNS, tokens, STAGE_COLUMNS)
    blocks = (images.shape[1], -(-len(images) * tokens * STAGE_COLUMNS // (PIECE * THREADS)))
    kernels.launch(_kernel("arrange_x", tiles.bits, x.dtype), blocks, THREADS, 0, x, images, N, tiles.I, tokens)
    y = _empty(x, tiles)
    partial = x.new_empty(parts, N, tiles.O, dtype=torch.float32) if parts > 1 else None
    kernel, blocks = _kernel("lut_wide", tiles.bits, x.dtype, False, tokens), (_wide_blocks(N, tiles.O, tokens), parts)
    _launch(kernel, tiles, blocks, THREADS, _wide_bytes(tokens, tiles.bits), images, bias, y, partial, tiles.O, tiles.I, 1, N)
    if partial is not None:
        _add_up(partial, bias, y, tiles.bits)
    return y


def _wide_bytes(tokens: int, bits: int) -> int:
    """Of shared memory, as lut_wide lays it out: slots for x, codes, and two barriers for each slot."""
    slots = 5 if tokens > 128 else 8
    return slots * (tokens * 2 * STAGE_COLUMNS + 16) + WARPS * _stream_bytes(CODE_STAGES, bits)


def _add_up(partial: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor, bits: int) -> None:
    """y [..., O] = the sum of partial [parts, N, O] + bias."""
    kernel = _kernel("add_up", bits, y.dtype)
    kernels.launch(kernel, (-(-y.numel() // THREADS), 1), THREADS, 0, partial, bias, y, *partial.shape)


@lru_cache
def _kernel(name: str, bits: int, dtype: torch.dtype, grouped: bool | None = None, tokens: int | None = None) -> kernels.Kernel:
    """One of lut_gemm.cu's. Compiled with the others of its width and type alone: all of the file takes half a minute."""
    weight, bias, partial = (torch.int32, (dtype, None), (torch.float16, None), (torch.uint8, None)), (dtype, None), (torch.float32, None)
    parameters = {
        "lut_gemv": (*weight, dtype, bias, dtype, *5 * [int]),
        "lut_gemm": (*weight, dtype, bias, dtype, partial, *5 * [int]),
        "lut_wide": (*weight, dtype, bias, dtype, partial, *4 * [int]),
        "arrange_x": (dtype, dtype, *3 * [int]),
        "dequantize": (*weight, dtype, *5 * [int]),
        "add_up": (torch.float32, bias, dtype, *3 * [int]),
    }
    grid = {None: "", False: "levels_", True: "affine_"}[grouped]
    options = (f"-DONLY={10 * bits + (dtype == torch.bfloat16)}", *[HOPPER] * (name in ("lut_wide", "arrange_x")))
    full_name = f"{name}_{grid}{bits}_{NAMES[dtype]}{'' if tokens is None else f'_{tokens}'}"
    return kernels.Kernel(CUDA_SOURCE, full_name, parameters[name], options, early=name != "dequantize")


def _launch(kernel: kernels.Kernel, tiles: Tiles, blocks: tuple[int, int], threads: int, shared_bytes: int, *args) -> None:
    """`kernel` with a weight's tensors before its other arguments; raises ValueError if they do not fit each other."""
    _check_sizes(kernel.name, *[None if t is None else t.shape for t in tiles[:4]], *tiles[4:])
    kernels.launch(kernel, blocks, threads, shared_bytes, tiles.codes, tiles.levels, tiles.scale, tiles.zero, *args)


@lru_cache(1024)
def _check_sizes(name: str, codes: tuple, levels: tuple | None, scale: tuple | None, zero: tuple | None, bits: int, O: int, I: int) -> None:
    """Raise ValueError unless these are the shapes of a weight [O, I]."""
    if codes != (-(-O // TILE_ROWS), -(-I // TILE_COLUMNS), bits, 32, 4) or levels not in (None, (O, 2**bits)):
        raise ValueError(f"{name}: tiles {tuple(codes)} do not hold a weight [{O}, {I}] of {bits} bits")
    if levels is None and (scale[0] != O or zero != scale or I % (16 * scale[1])):
        raise ValueError(f"{name}: scales {tuple(scale)} do not fit a weight [{O}, {I}]: groups hold 16 n columns")


@lru_cache
def kernels_are_right(device: torch.device, bits: int, dtype: torch.dtype, grouped: bool) -> bool:
    """Has this GPU kernels, and do their products of a small weight agree with torch's on the host? If not, one warning.

    They are compiled where they run, and a GPU, driver or compiler on which they go wrong would look like a bad model.
    """
    if not kernels.is_available(_kernel("dequantize", bits, dtype, grouped), device):
        return False
    tiles, generator = _small_weight(bits, dtype, grouped), torch.Generator().manual_seed(1)
    W, x = _dequantized_rows(dtype, tiles, slice(0, tiles.O)), torch.randn(300, tiles.I, generator=generator, device="cpu").to(dtype)
    there, exact = Tiles(*(t.to(device) if isinstance(t, torch.Tensor) else t for t in tiles)), x.float() @ W.float().T

    def by(multiply, **plan):  # what is not planned for so small a weight
        return lambda x: kernels.run(partial(multiply, **plan), _multiply, x, there, None)

    def agrees(multiply, N: int, factor: int = 1) -> bool:  # another x each time: memory may hold the last one's result
        error = multiply(factor * x[-N:].to(device)).cpu().float() - factor * exact[-N:]
        return bool(error.norm() <= abs(factor) * TOLERANCE[dtype] * exact[-N:].norm())

    right = torch.equal(dequantize(x.to(device), there, 0, tiles.O).cpu(), W)
    right = right and all(agrees(lambda x: lut_linear(x, *there[:4], None, bits, tiles.O), N) for N in (1, 8, 16, 32, 64, 300))
    if _is_wide(300, there):
        right = right and all(agrees(by(_multiply_wide, tokens=tokens, parts=2), 300, -n) for n, tokens in enumerate(WIDE_CLOCKS, 1))
    if not grouped and kernels.properties(device).major in COUNT_BITS:
        right = right and agrees(by(_multiply_one, teams=2, warps=8, each=1), 1, -1)
        x[-1, 7] = 1000  # 16 bits do not suffice for
        exact[-1:] = x[-1:].float() @ W.float().T
        right = right and agrees(by(_multiply_one, teams=2, warps=2, each=2), 1, -1)
    if not right:
        kind = f"{bits} bits{' in groups' * grouped} and {dtype}"
        warnings.warn(f"kernels for {kind} give wrong products on {device}: torch does their work, slower; please report it", stacklevel=2)
    return right


def _small_weight(bits: int, dtype: torch.dtype, grouped: bool) -> Tiles:
    generator, O, I, G = torch.Generator().manual_seed(0), 168, 5 * TILE_COLUMNS, 10
    with torch.device("cpu"):  # the generator's, whatever the caller's default is
        codes = tile_codes(torch.randint(2**bits, (O, I), generator=generator, dtype=torch.uint8), bits)
        if not grouped:
            return Tiles(codes, torch.randn(O, 2**bits, generator=generator).to(dtype), None, None, bits, O, I)
        scale, zero = torch.rand(O, G, generator=generator).half(), torch.full((O, G), 2 ** (bits - 1), dtype=torch.uint8)
        return Tiles(codes, None, scale, zero, bits, O, I)


def _pieces(tiles: Tiles):
    """(first row, rows) of pieces of the weight, whole tiles each, that take PIECE_BYTES when rebuilt."""
    rows = max(TILE_ROWS, PIECE_BYTES // (2 * tiles.I) // TILE_ROWS * TILE_ROWS)
    for first in range(0, tiles.O, rows):
        yield first, min(rows, tiles.O - first)


def dequantize(like: torch.Tensor, tiles: Tiles, first: int, rows: int) -> torch.Tensor:
    """Rows first .. first + rows of the weight, [rows, I], in the dtype of `like`; `first` is a multiple of 16."""
    return kernels.run(_dequantize_cuda, _dequantize, like, tiles, first, rows)


def _dequantize_cuda(like: torch.Tensor, tiles: Tiles, first: int, rows: int) -> torch.Tensor:
    W = like.new_empty(rows, tiles.I)
    blocks = (-(-rows // TILE_ROWS), -(-tiles.codes.shape[1] // WARPS))
    kernel = _kernel("dequantize", tiles.bits, like.dtype, tiles.levels is None)
    _launch(kernel, tiles, blocks, THREADS, 0, W, tiles.O, tiles.I, tiles.groups, first, rows)
    return W


def _dequantize(like: torch.Tensor, tiles: Tiles, first: int, rows: int) -> torch.Tensor:
    W = like.new_empty(rows, tiles.I)
    for part in W.split(max(TILE_ROWS, INDICES // tiles.I // TILE_ROWS * TILE_ROWS)):
        part.copy_(_dequantized_rows(like.dtype, tiles, slice(first, first + len(part))))
        first += len(part)
    return W


def _dequantized_rows(dtype: torch.dtype, tiles: Tiles, rows: slice) -> torch.Tensor:
    codes = tiles.codes[rows.start // TILE_ROWS : -(-rows.stop // TILE_ROWS)]
    codes = untile_codes(codes, tiles.bits, rows.stop - rows.start, tiles.I).long()
    if tiles.levels is not None:
        return tiles.levels[rows].to(dtype).gather(1, codes)
    levels = affine_levels(tiles.scale[rows], tiles.zero[rows], tiles.bits).to(dtype)  # [R, G, K]
    return levels.gather(2, codes.view(len(codes), tiles.groups, -1)).view(len(codes), tiles.I)
