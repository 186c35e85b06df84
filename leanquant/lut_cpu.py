"""Products with packed weights on a CPU: lut_cpu.cpp, compiled where it runs, and when it is used.

Needs a CPU with AVX2 or AVX-512 and a C++ compiler; without, `can_multiply` says no. What is compiled is kept in the user's cache, for
each kind of CPU. Not here: modules, files, other devices.
Legend: O out_features, I in_features, K = 2**bits levels, G groups, N tokens.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from . import kernels
from .packing import PackedLinear, layout_of

SOURCE = Path(__file__).with_name("lut_cpu.cpp")
FLAGS = {  # for the compiler, by the words of a register
    16: ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
    8: ("-mavx2", "-mfma", "-mf16c"),
}
CAPABILITIES = {"AVX512": (16, 8), "AVX2": (8,)}  # as torch calls them
PLACES = {4: 8, 3: 8, 2: 16}  # codes of a word, by the bits of a code in memory
FEW_TOKENS = 16  # for more the weight is rebuilt, and multiplied by torch
PIECE_WEIGHTS = 2**20  # at a time: they stay in the CPU's caches


class _Weight(ctypes.Structure):
    """lut_cpu.cpp's."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "levels", "scale", "zero")),
        *((name, ctypes.c_int64) for name in ("O", "I", "G", "width")),
        *((name, ctypes.c_int) for name in ("bits", "is_bfloat16")),
    ]


def can_multiply(packed: PackedLinear, bits: int, I: int) -> bool:
    """Is there a kernel for this weight on this CPU? Its groups must be whole blocks."""
    return not kernels.torch_is_wanted() and _lanes(*_kind(packed, bits, I)) is not None


def _kind(packed: PackedLinear, bits: int, I: int) -> tuple:
    """(dtype of levels or scales, bits of a code in memory, columns of a group, is it all of them)."""
    width, levels = packed.codes.shape[1], packed.grid if packed.grid is not None else packed.scale
    G = 1 if packed.grid is not None else levels.shape[1]
    return levels.dtype, 4 if layout_of(width, bits, I) == "nibble" else bits, I // G, G == 1


@cache
def _lanes(dtype: torch.dtype, code_bits: int, columns: int, is_whole: bool) -> int | None:
    """Words of a register by which the weight is read, as many as its groups allow; None if there is no kernel."""
    if dtype not in (torch.float16, torch.bfloat16):
        return None
    for lanes in CAPABILITIES.get(torch.backends.cpu.get_cpu_capability(), ()):
        if (is_whole or columns % (lanes * PLACES[code_bits]) == 0) and _library(lanes) is not None:
            return lanes
    return None


torch.library.define("leanquant::packed_linear", "(Tensor x, Tensor codes, Tensor? grid, Tensor? scale, Tensor? zero, int bits) -> Tensor")


def packed_linear(x: torch.Tensor, codes: torch.Tensor, grid, scale, zero, bits: int) -> torch.Tensor:
    """x [..., I] W^T [..., O] for the weight of a `PackedLinear` that `can_multiply` says yes to: in the dtype of x, summed in float32.

    A plain tensor does not go through the operator, as which torch.compile knows this. No gradient goes through it.
    """
    is_plain = type(x) is torch.Tensor and not torch.compiler.is_compiling()
    multiply = _multiply if is_plain and not x.is_meta else torch.ops.leanquant.packed_linear
    return multiply(x, codes, grid, scale, zero, bits)


@torch.library.register_fake("leanquant::packed_linear")
def _(x, codes, grid, scale, zero, bits):
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _multiply(x, codes, grid, scale, zero, bits):
    packed, I = PackedLinear(codes, grid, scale, zero), x.shape[-1]
    kind, threads = _kind(packed, bits, I), torch.get_num_threads()
    lanes, code_bits = _lanes(*kind), kind[1]
    library, block = _library(lanes), lanes * PLACES[code_bits]
    flat = x.reshape(-1, I).float().contiguous()
    N, A = len(flat), -(-I // block) * block
    y = torch.empty(N, len(codes))
    if N <= FEW_TOKENS:
        library.lut_products(code_bits, _weight(packed, bits, I), flat.data_ptr(), y.data_ptr(), N, A, threads)
    else:
        arranged, rows = torch.empty(N, A), max(1, PIECE_WEIGHTS // A)
        library.lut_arrange(code_bits, flat.data_ptr(), arranged.data_ptr(), N, I, A, threads)
        W = torch.empty(min(rows, len(codes)), A)
        for piece, out in zip(packed.split(rows), y.split(rows, 1), strict=True):
            its = W[: len(piece.codes)]
            library.lut_rebuild(code_bits, _weight(piece, bits, I), its.data_ptr(), A, threads)
            torch.mm(arranged, its.T, out=out)
    return y.to(x.dtype).view(*x.shape[:-1], len(codes))


torch.library.impl("leanquant::packed_linear", "CPU", _multiply)


def _weight(packed: PackedLinear, bits: int, I: int):
    """By reference. Its tensors are those of `packed`, which must live as long."""
    addresses = [None if t is None else t.data_ptr() for t in packed]
    levels = packed.grid if packed.grid is not None else packed.scale
    G = 1 if packed.grid is not None else levels.shape[1]
    return ctypes.byref(_Weight(*addresses, *packed.codes.shape[:1], I, G, packed.codes.shape[1], bits, levels.dtype == torch.bfloat16))


@cache
def _library(lanes: int) -> ctypes.CDLL | None:
    """None where it cannot be compiled or loaded: no compiler, above all."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        return None
    source = SOURCE.read_bytes()
    name = f"lut_cpu-{lanes}-{hashlib.sha256(source + repr(FLAGS[lanes]).encode()).hexdigest()[:16]}.so"
    folder = Path(os.environ.get("LEANQUANT_CACHE") or Path.home() / ".cache" / "leanquant") / "kernels"
    try:
        if not (folder / name).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            _compile(compiler, lanes, folder / name)
        return _typed(ctypes.CDLL(str(folder / name)))
    except (OSError, subprocess.SubprocessError):
        return None


def _compile(compiler: str, lanes: int, out: Path) -> None:
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        made = Path(folder) / out.name
        options = ["-std=c++17", "-O3", *FLAGS[lanes], f"-DLANES={lanes}", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run([compiler, *options, str(SOURCE), "-o", str(made)], check=True, capture_output=True, timeout=300)
        made.rename(out)


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    """With the types of what its functions take, which give back nothing."""
    number, size, address = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    library.lut_products.argtypes = [number, address, address, address, size, size, number]
    library.lut_arrange.argtypes = [number, address, address, size, size, size, number]
    library.lut_rebuild.argtypes = [number, address, address, size, number]
    for function in (library.lut_products, library.lut_arrange, library.lut_rebuild):
        function.restype = None
    return library
