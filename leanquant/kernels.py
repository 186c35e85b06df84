"""The one place where CUDA source becomes running kernels: a lazy, cached loader, a checked launcher, the way back to torch.

Nothing here is imported or compiled before a tensor on a GPU asks for it. CuPy compiles what is asked for once per GPU
architecture and keeps the result on disk; launches go to the driver. Not here: the kernels (.cu files) and their torch
twins, which do the same with the same arguments and run wherever the kernels cannot.
"""

import ctypes
import importlib.util
import os
import sys
import warnings
from array import array
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from .errors import first_line

NEEDED = {  # for each CUDA major: CuPy, its compiler, and the headers the compiler may ask for
    "11": "cupy-cuda11x nvidia-cuda-nvrtc-cu11 nvidia-cuda-runtime-cu11",
    "12": "cupy-cuda12x nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12",
    "13": "cupy-cuda13x nvidia-cuda-nvrtc nvidia-cuda-runtime",
}
EARLY_MAJOR = 9  # architecture from which on GPUs have the early start


class Kernel(NamedTuple):
    """A function of a CUDA file.

    parameters: the dtype of each tensor it takes, (dtype, None) for one that may be missing, `int` for a 32-bit integer.
    options: for the compiler, which is asked once for all kernels of a file that share them.
    early: it may begin while kernels before it are at work, since it waits for them before it touches what kernels write, but for
    codes, levels and scales (programmatic dependent launch, on GPUs that have it).
    """

    source: Path
    name: str
    parameters: tuple
    options: tuple[str, ...] = ()
    early: bool = False


class _Attribute(ctypes.Structure):
    """cuda.h's CUlaunchAttribute."""

    _fields_ = [("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int * 16)]


EARLY_START = _Attribute(6, 0, (1,))  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _Launch(ctypes.Structure):
    """cuda.h's CUlaunchConfig. sizes: blocks in three dimensions, threads in three, bytes of shared memory."""

    _fields_ = [("sizes", ctypes.c_uint * 7), ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("count", ctypes.c_uint)]


class KernelError(RuntimeError):
    """A kernel could not be compiled or launched."""


def run(kernel_version: Callable, twin: Callable, *args):
    """`kernel_version(*args)` where the first argument, a tensor, lies on a GPU whose kernels work; else `twin(*args)`.

    LEANQUANT_KERNELS=torch forces the twin. A kernel that does not compile or launch is replaced by the twin, with one
    warning that says why.
    """
    if on_gpu(args[0]) and not torch_is_wanted():
        try:
            return kernel_version(*args)
        except KernelError as error:
            _warn_once(str(error))
    return twin(*args)


def torch_is_wanted() -> bool:
    return os.environ.get("LEANQUANT_KERNELS") == "torch"


def on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda


@cache
def properties(device: torch.device):
    """Of a GPU, as torch reports them: multi_processor_count, major and more."""
    return torch.cuda.get_device_properties(device)


def launch(kernel: Kernel, blocks: tuple[int, int], threads: int, shared_bytes: int, *args: torch.Tensor | int | None) -> None:
    """Run `kernel` on torch's current stream of the tensors' GPU, or raise KernelError. None is a null pointer.

    Raises TypeError or ValueError for arguments that it must not be given: other dtypes than declared, tensors that are
    not contiguous or not all on one GPU, integers beyond 32 bits.
    """
    device = _check(kernel, args)
    function = _compiled(kernel, device.index)
    if isinstance(function, str):
        raise KernelError(function)
    _call(function, kernel, device, blocks, threads, shared_bytes, args)


def _check(kernel: Kernel, args: tuple) -> torch.device:
    """The GPU of the tensors. Once for every product of a model: a microsecond here is a hundredth of a token's time."""
    if len(args) != len(kernel.parameters):
        raise TypeError(f"{kernel.name} takes {len(kernel.parameters)} arguments, not {len(args)}")
    device = index = None
    for number, (arg, wanted) in enumerate(zip(args, kernel.parameters, strict=True)):
        if wanted is int:
            if type(arg) is not int or not -(2**31) <= arg < 2**31:
                raise TypeError(f"{kernel.name}: argument {number} must be a 32-bit integer, not {arg!r}")
            continue
        if type(wanted) is tuple:
            if arg is None:
                continue
            wanted = wanted[0]
        if not isinstance(arg, torch.Tensor) or arg.dtype is not wanted:
            raise TypeError(f"{kernel.name}: argument {number} must be a tensor of {wanted}, not {getattr(arg, 'dtype', type(arg))}")
        if device is None and on_gpu(arg):
            device, index = arg.device, arg.get_device()
        elif arg.get_device() != index:
            raise ValueError(f"{kernel.name}: argument {number} is on {arg.device}, not on one GPU with the others")
        if not arg.is_contiguous():
            raise ValueError(f"{kernel.name}: argument {number} is not contiguous")
    return device


def is_available(kernel: Kernel, device: torch.device) -> bool:
    """Does `run` use it for tensors on this GPU? If it does not compile, one warning says why."""
    if torch_is_wanted():
        return False
    function = _compiled(kernel, device.index)
    if isinstance(function, str):
        _warn_once(function)
    return not isinstance(function, str)


@cache
def _compiled(kernel: Kernel, device_index: int):
    """CuPy's loaded function, or the sentence that says why there is none: compiling is not tried twice."""
    try:
        import cupy

        if int(cupy.__version__.split(".")[0]) < 14:
            _load_compiler()

        with cupy.cuda.Device(device_index):
            function = _module(kernel.source, kernel.options, device_index).get_function(kernel.name)
            most = properties(torch.device("cuda", device_index)).shared_memory_per_block_optin - function.shared_size_bytes
            function.max_dynamic_shared_size_bytes = most  # compiles and loads now, where it can still be caught
            return function.kernel
    except Exception as error:  # a missing wheel, driver or compiler each raise their own kind
        major = (torch.version.cuda or "12").split(".")[0]
        return f"{kernel.name} runs in torch, which is slower: {first_line(error)}; pip install {NEEDED.get(major, NEEDED['13'])}"


@cache
def _module(source: Path, options: tuple[str, ...], device_index: int):
    import cupy

    return cupy.RawModule(code=source.read_text(), options=("--std=c++17", *options))


def _load_compiler() -> None:
    """Load NVRTC from its wheel: CuPy before 14 looks on the system's paths alone, but finds by name what is loaded already."""
    nvidia = importlib.util.find_spec("nvidia")
    for folder in nvidia.submodule_search_locations if nvidia else ():
        for library in Path(folder).glob("cuda_nvrtc/lib/libnvrtc.so.*"):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _call(function, kernel: Kernel, device: torch.device, blocks: tuple[int, int], threads: int, shared_bytes: int, args: tuple) -> None:
    """Launch on torch's current stream, by the driver's own call: a model launches hundreds of kernels a token."""
    values = array("q", [arg if type(arg) is int else _address(arg) for arg in args])  # a 32-bit integer is the lower half of one
    first = values.buffer_info()[0]
    addresses = array("q", range(first, first + 8 * len(args), 8))
    early = kernel.early and properties(device).major >= EARLY_MAJOR
    size, stream, driver = (*blocks, 1, threads, 1, 1, shared_bytes), _stream(device), _driver()
    call = (ctypes.c_void_p(function.ptr), ctypes.c_void_p(addresses.buffer_info()[0]), None)
    driver.cuCtxPushCurrent_v2(_context(device.index))  # a thread may use another GPU, or none yet
    error = driver.cuLaunchKernelEx(_config(size, stream, early), *call)
    if error and early:
        error = driver.cuLaunchKernelEx(_config(size, stream, False), *call)
    driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
    if error:
        raise KernelError(f"{kernel.name} runs in torch, which is slower: its launch failed: {_error_name(error)}")


@lru_cache(1024)
def _config(size: tuple[int, ...], stream: int, early: bool):
    """A `_Launch` by reference, made once: the driver does not write to it."""
    return ctypes.byref(_Launch(size, stream, ctypes.addressof(EARLY_START), early))


def _stream(device: torch.device) -> int:
    """torch's current one, the way its own compiler asks for it: torch.cuda.current_stream makes an object of it first."""
    return torch._C._cuda_getCurrentRawStream(device.index)


@cache
def _context(device_index: int) -> ctypes.c_void_p:
    """The GPU's primary context, which torch and CuPy use."""
    gpu, context = ctypes.c_int(), ctypes.c_void_p()
    _driver().cuDeviceGet(ctypes.byref(gpu), device_index)
    _driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), gpu)
    return context


def _error_name(error: int) -> str:
    name = ctypes.c_char_p()
    _driver().cuGetErrorName(error, ctypes.byref(name))
    return (name.value or b"an unknown error").decode()


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)
