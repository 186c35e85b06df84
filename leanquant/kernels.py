"""The one place where CUDA source becomes running kernels: a lazy, cached loader, a checked launcher, the way back to torch.

Nothing here is imported or compiled before a tensor on a GPU asks for it. CuPy compiles each file once per GPU architecture
and keeps the result on disk. Not here: the kernels (.cu files) and their torch twins, which do the same with the same
arguments and run wherever the kernels cannot.
"""

import ctypes
import importlib.util
import os
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from .errors import first_line

NEEDED = {  # for each CUDA major: CuPy, its compiler, and the headers the compiler may ask for
    "11": "cupy-cuda11x nvidia-cuda-nvrtc-cu11 nvidia-cuda-runtime-cu11",
    "12": "cupy-cuda12x nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12",
    "13": "cupy-cuda13x nvidia-cuda-nvrtc nvidia-cuda-runtime",
}
FREE_SHARED_BYTES = 48 * 1024  # a block gets more only if its kernel asks for it


class Kernel(NamedTuple):
    """A function of a CUDA file.

    parameters: the dtype of each tensor it takes, (dtype, None) for one that may be missing, `int` for a 32-bit integer.
    options: for the compiler, which is asked once for all kernels of a file that share them.
    """

    source: Path
    name: str
    parameters: tuple
    options: tuple[str, ...] = ()


class KernelError(RuntimeError):
    """A kernel could not be compiled or launched."""


def run(kernel_version: Callable, twin: Callable, *args):
    """`kernel_version(*args)` where the first argument, a tensor, lies on a GPU whose kernels work; else `twin(*args)`.

    LEANQUANT_KERNELS=torch forces the twin. A kernel that does not compile or launch is replaced by the twin, with one
    warning that says why.
    """
    if on_gpu(args[0]) and os.environ.get("LEANQUANT_KERNELS") != "torch":
        try:
            return kernel_version(*args)
        except KernelError as error:
            _warn_once(str(error))
    return twin(*args)


def on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda


@lru_cache
def properties(device: torch.device):
    """Of a GPU, as torch reports them: multi_processor_count, major and more."""
    return torch.cuda.get_device_properties(device)


def launch(kernel: Kernel, blocks: tuple[int, int], threads: int, shared_bytes: int, *args: torch.Tensor | int | None) -> None:
    """Run `kernel` on torch's current stream of the tensors' GPU, or raise KernelError. None is a null pointer.

    Raises TypeError or ValueError for arguments that it must not be given: other dtypes than declared, tensors that are
    not contiguous or not all on one GPU, integers beyond 32 bits.
    """
    device = _check(kernel, args)
    function = _compiled(kernel.source, kernel.name, kernel.options, device.index)
    if isinstance(function, str):
        raise KernelError(function)
    _call(function, kernel.name, device, blocks, threads, shared_bytes, args)


def _check(kernel: Kernel, args: tuple) -> torch.device:
    if len(args) != len(kernel.parameters):
        raise TypeError(f"{kernel.name} takes {len(kernel.parameters)} arguments, not {len(args)}")
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    for number, (arg, wanted) in enumerate(zip(args, kernel.parameters, strict=True)):
        if wanted is int:
            if not isinstance(arg, int) or not -(2**31) <= arg < 2**31:
                raise TypeError(f"{kernel.name}: argument {number} must be a 32-bit integer, not {arg!r}")
        elif arg is None and isinstance(wanted, tuple):
            continue
        elif not isinstance(arg, torch.Tensor) or arg.dtype != (wanted[0] if isinstance(wanted, tuple) else wanted):
            raise TypeError(f"{kernel.name}: argument {number} must be a tensor of {wanted}, not {getattr(arg, 'dtype', type(arg))}")
        elif not on_gpu(arg) or arg.device != tensors[0].device:
            raise ValueError(f"{kernel.name}: argument {number} is on {arg.device}, not on one GPU with the others")
        elif not arg.is_contiguous():
            raise ValueError(f"{kernel.name}: argument {number} is not contiguous")
    return tensors[0].device


@lru_cache
def _compiled(source: Path, name: str, options: tuple[str, ...], device_index: int):
    """The CuPy function, or the sentence that says why there is none: compiling is not tried twice."""
    try:
        import cupy

        if int(cupy.__version__.split(".")[0]) < 14:
            _load_compiler()

        with cupy.cuda.Device(device_index):
            function = _module(source, options, device_index).get_function(name)
            function.attributes  # noqa: B018 - compiles and loads now, where it can still be caught
            return function
    except Exception as error:  # a missing wheel, driver or compiler each raise their own kind
        major = (torch.version.cuda or "12").split(".")[0]
        return f"{name} runs in torch, which is slower: {first_line(error)}; pip install {NEEDED.get(major, NEEDED['13'])}"


@lru_cache
def _module(source: Path, options: tuple[str, ...], device_index: int):
    import cupy

    return cupy.RawModule(code=source.read_text(), options=("--std=c++17", *options))


def _load_compiler() -> None:
    """Load NVRTC from its wheel: CuPy before 14 looks on the system's paths alone, but finds by name what is loaded already."""
    nvidia = importlib.util.find_spec("nvidia")
    for folder in nvidia.submodule_search_locations if nvidia else ():
        for library in Path(folder).glob("cuda_nvrtc/lib/libnvrtc.so.*"):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _call(function, name: str, device: torch.device, blocks: tuple[int, int], threads: int, shared_bytes: int, args: tuple) -> None:
    import cupy

    values = tuple(cupy.int32(arg) if isinstance(arg, int) else _address(arg) for arg in args)
    try:
        with cupy.cuda.Device(device.index), _current_stream(device):
            if shared_bytes > FREE_SHARED_BYTES:
                function.max_dynamic_shared_size_bytes = shared_bytes
            function(blocks, (threads,), values, shared_mem=shared_bytes)  # raises if the launch is refused
    except Exception as error:
        raise KernelError(f"{name} runs in torch, which is slower: its launch failed: {first_line(error)}") from error


def _current_stream(device: torch.device):
    """torch's current stream as CuPy's."""
    import cupy

    stream = torch.cuda.current_stream(device)
    if hasattr(cupy.cuda.Stream, "from_external") and hasattr(stream, "__cuda_stream__"):
        return cupy.cuda.Stream.from_external(stream)
    return cupy.cuda.ExternalStream(stream.cuda_stream, device.index)  # CuPy before 14


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@lru_cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)
