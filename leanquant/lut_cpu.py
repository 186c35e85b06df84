"""Products with packed weights on a CPU: lut_cpu.cpp, compiled where it runs, and when it is used.

Needs a CPU with AVX2 or AVX-512 and a C++ compiler; without, `can_multiply` says no. What is compiled is kept in the user's cache, for
each kind of CPU. Not here: modules, files, other devices.
Legend: O out_features, I in_features, K = 2**bits levels, G groups, N tokens.
"""

import contextlib
import ctypes
import hashlib
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch

from . import kernels
from .errors import first_line
from .packing import PackedLinear, layout_of

SOURCE = Path(__file__).with_name("lut_cpu.cpp")
FLAGS = {  # for the compiler, by the words of a register
    16: ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
    8: ("-mavx2", "-mfma", "-mf16c"),
}
CAPABILITIES = {"AVX512": (16, 8), "AVX2": (8,)}  # as torch calls them
FEW_TOKENS = {16: 64, 8: 16}  # by the words of a register: for more torch's product with a rebuilt weight may be faster
PIECE_WEIGHTS = 2**20  # at a time: they stay in the CPU's caches


class _Weight(ctypes.Structure):
    """lut_cpu.cpp's."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "levels", "scale", "zero")),
        *((name, ctypes.c_int64) for name in ("O", "I", "G", "width")),
        *((name, ctypes.c_int) for name in ("bits", "is_bfloat16")),
    ]


def can_multiply(packed: PackedLinear, I: int) -> bool:
    """Is there a kernel for this weight on this CPU? Its groups must be whole registers of columns."""
    return not kernels.torch_is_wanted() and _lanes(packed.stored_levels.dtype, packed.groups, I) is not None


@cache
def _lanes(dtype: torch.dtype, groups: int, I: int) -> int | None:
    """Words of a register by which a weight is read, as many as its groups allow; None without a kernel. dtype: of levels or scales."""
    if dtype not in (torch.float16, torch.bfloat16) or I == 0:
        return None
    for lanes in CAPABILITIES.get(torch.backends.cpu.get_cpu_capability(), ()):
        if (groups == 1 or I % (groups * lanes) == 0) and _library(lanes) is not None:
            return lanes
    return None


def packed_linear(x: torch.Tensor, codes: torch.Tensor, grid, scale, zero, bias, bits: int) -> torch.Tensor:
    """x [..., I] W^T + bias [O] for the weight of a `PackedLinear` that `can_multiply` says yes to: in the dtype of x, summed in float32.
    For many tokens in bfloat16 W is rounded to it, where the CPU has units for it.

    An operator of torch either way. The one with a gradient is a layer of Python more, which a product with one token feels.
    """
    watched = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack()
    if torch.is_grad_enabled() or watched:  # what is traced may be given a gradient later
        return torch.ops.leanquant.packed_linear(x, codes, grid, scale, zero, bias, bits)
    return torch.ops.leanquant.packed_product(x, codes, grid, scale, zero, bias, bits)


def _product(x, codes, grid, scale, zero, bias, bits):
    packed, O, I = PackedLinear(*(None if t is None else t.contiguous() for t in (codes, grid, scale, zero))), codes.shape[0], x.shape[-1]
    lanes, levels = _lanes(packed.stored_levels.dtype, packed.groups, I), 2**bits if grid is None else grid.shape[1]
    if lanes is None or bits not in (4, 3, 2) or levels != 2**bits:
        raise ValueError(
            f"no kernel of this CPU reads {bits} bits in {packed.groups} groups of {packed.stored_levels.dtype} of {I} columns"
        )
    library, N = _library(lanes), math.prod(x.shape[:-1])
    in_bfloat16 = x.dtype == torch.bfloat16 and _has_bfloat16()
    if N <= FEW_TOKENS[lanes] or lanes == 16 and library.lut_is_amd() and not in_bfloat16:  # torch has AVX-512 for float32 on Intel's alone
        y = _by_codes(library, x.float().contiguous(), packed, bits)
    else:
        y = _by_torch(library, (x if in_bfloat16 else x.float()).reshape(N, I), packed, bits).view(*x.shape[:-1], O)
    return (y if bias is None else y.add_(bias)).to(x.dtype)


def _has_bfloat16() -> bool:
    """Has the CPU units that multiply bfloat16? torch's library uses them."""
    return torch.cpu._is_avx512_bf16_supported()


def _by_codes(library: ctypes.CDLL, x: torch.Tensor, packed: PackedLinear, bits: int) -> torch.Tensor:
    """x [..., I] W^T [..., O] from codes and levels, in float32."""
    I, y = x.shape[-1], torch.empty(*x.shape[:-1], packed.codes.shape[0], dtype=torch.float32, device="cpu")  # whatever the defaults are
    N, threads = x.numel() // I, torch.get_num_threads()
    library.lut_products(_code_bits(packed, bits, I), _weight(packed, bits, I), x.data_ptr(), y.data_ptr(), N, threads)
    return y


def _by_torch(library: ctypes.CDLL, x: torch.Tensor, packed: PackedLinear, bits: int) -> torch.Tensor:
    """x [N, I] W^T [N, O] in the dtype of x, with W rebuilt by pieces of rows."""
    O, (N, I), threads = packed.codes.shape[0], x.shape, torch.get_num_threads()
    rows, y = max(1, PIECE_WEIGHTS // I), x.new_empty(N, O)
    W = torch.empty(min(rows, O), I, dtype=torch.float32, device="cpu")
    for piece, out in zip(packed.split(rows), y.split(rows, 1), strict=True):
        its = W[: piece.codes.shape[0]]
        library.lut_rebuild(_code_bits(piece, bits, I), _weight(piece, bits, I), its.data_ptr(), threads)
        torch.mm(x, its.to(x.dtype).T, out=out)
    return y


def _code_bits(packed: PackedLinear, bits: int, I: int) -> int:
    """Of a stored code."""
    return 4 if layout_of(packed.codes.shape[1], bits, I) == "nibble" else bits


def _shape_of_product(x, codes, grid, scale, zero, bias, bits):
    return x.new_empty(*x.shape[:-1], codes.shape[0])


for _name in ("packed_linear", "packed_product"):
    _arguments = "Tensor x, Tensor codes, Tensor? grid, Tensor? scale, Tensor? zero, Tensor? bias, int bits"
    torch.library.define(f"leanquant::{_name}", f"({_arguments}) -> Tensor")
    torch.library.impl(f"leanquant::{_name}", "CPU", _product)
    torch.library.register_fake(f"leanquant::{_name}", _shape_of_product)


def _keep_for_backward(ctx, inputs, output) -> None:
    x, *stored, _, bits = inputs
    ctx.save_for_backward(*stored)
    ctx.bits, ctx.columns = bits, x.shape[-1]


def _backward(ctx, grad: torch.Tensor):
    """Of x, so that adapters can be trained on top, and of the bias."""
    back = _back_to_x(grad, PackedLinear(*ctx.saved_tensors), ctx.bits, ctx.columns) if ctx.needs_input_grad[0] else None
    return back, *(None,) * 4, grad.sum_to_size(grad.shape[-1]) if ctx.needs_input_grad[5] else None, None


def _back_to_x(grad: torch.Tensor, packed: PackedLinear, bits: int, I: int) -> torch.Tensor:
    """grad [..., O] W, by pieces of rows."""
    back, rows = 0, max(1, PIECE_WEIGHTS // I)
    for piece, its in zip(packed.split(rows), grad.split(rows, -1), strict=True):
        back = back + its @ piece.dequantize(bits, I, grad.dtype)
    return back


torch.library.register_autograd("leanquant::packed_linear", _backward, setup_context=_keep_for_backward)


def _weight(packed: PackedLinear, bits: int, I: int):
    """By reference. Its tensors are those of `packed`, which must live as long."""
    addresses = [None if t is None else t.data_ptr() for t in packed]
    O, width = packed.codes.shape
    return ctypes.byref(_Weight(*addresses, O, I, packed.groups, width, bits, packed.stored_levels.dtype == torch.bfloat16))


@cache
def _library(lanes: int) -> ctypes.CDLL | None:
    """The kernels for registers of so many words; None, after one warning, where they cannot be had: no compiler, above all."""
    name = hashlib.sha256(SOURCE.read_bytes() + repr((FLAGS[lanes], platform.libc_ver())).encode()).hexdigest()[:16]
    try:
        file = _folder() / f"lut_cpu-{lanes}-{name}.so"
        if file.is_file():
            with contextlib.suppress(OSError, AttributeError):  # damaged: it is made again
                return _typed(ctypes.CDLL(str(file)))
        _compile(lanes, file)
        return _typed(ctypes.CDLL(str(file)))
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        reason = first_line(getattr(error, "stderr", None) or error)
        warnings.warn(f"the CPU's kernels cannot be made, so that products are slower: {reason}", stacklevel=2)
        return None


def _folder() -> Path:
    """For compiled kernels: in the user's cache if nobody else can write there, otherwise a new one."""
    try:
        folder = Path(os.environ.get("LEANQUANT_CACHE") or Path.home() / ".cache" / "leanquant") / "kernels"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
        if state.st_uid == os.getuid() and not state.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # the latter: no home
        pass
    return Path(tempfile.mkdtemp(prefix="leanquant-"))


def _compile(lanes: int, out: Path) -> None:
    """Raises OSError without a compiler, and CalledProcessError if it fails."""
    named = shlex.split(os.environ.get("CXX", ""))
    compiler = named or [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1]
    if not compiler:
        raise OSError("there is no C++ compiler (g++, or what CXX names)")
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        made = Path(folder) / out.name
        options = ["-std=c++17", "-O3", *FLAGS[lanes], f"-DLANES={lanes}", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run([*compiler, *options, str(SOURCE), "-o", str(made)], check=True, capture_output=True, text=True, timeout=300)
        with open(made, "rb") as f:
            os.fsync(f.fileno())
        made.rename(out)


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    """With the types of what its functions take and give back."""
    number, size, address = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    library.lut_products.argtypes = [number, address, address, address, size, number]
    library.lut_rebuild.argtypes = [number, address, address, number]
    library.lut_is_amd.argtypes = []
    library.lut_products.restype = library.lut_rebuild.restype = None
    return library
