"""The one place where CUDA source becomes running kernels: a lazy, cached loader and a checked launcher.

Nothing here is imported or compiled before a CUDA tensor asks for it. Where CuPy or its compiler is missing, or
LEANQUANT_KERNELS=torch is set, `load` gives None and the caller uses its torch twin.
"""

import os
import warnings
from functools import lru_cache
from pathlib import Path

import torch


@lru_cache
def load(source: Path, name: str, device_index: int):
    """Kernel `name` of the CUDA file `source`, compiled for that GPU, or None, with one warning that says why."""
    if os.environ.get("LEANQUANT_KERNELS") == "torch":
        return None
    try:
        import cupy

        with cupy.cuda.Device(device_index):
            return cupy.RawModule(code=source.read_text(), options=("--std=c++14",)).get_function(name)
    except Exception as error:  # a missing wheel, driver or compiler each raise their own kind
        reason = (str(error) or type(error).__name__).splitlines()[0]
        remedy = "pip install cupy-cuda12x nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12"
        warnings.warn(f"{name} runs in torch, which is slower: no CUDA kernel ({reason}); {remedy}", stacklevel=2)
        return None


def launch(kernel, threads: int, total: int, *args: torch.Tensor | int) -> None:
    """Run `kernel` with one thread for each of `total` items, on torch's current stream of the tensors' GPU.

    Tensors must be contiguous and on one GPU; ints are passed as 32-bit. CuPy raises on a failed launch.
    """
    import cupy

    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    device = tensors[0].device
    for tensor in tensors:
        assert tensor.is_cuda and tensor.device == device and tensor.is_contiguous(), "kernel arguments must be contiguous, on one GPU"
    values = [a.data_ptr() if isinstance(a, torch.Tensor) else cupy.int32(a) for a in args]
    with cupy.cuda.Device(device.index), cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream):
        kernel((-(-total // threads),), (threads,), tuple(values))
