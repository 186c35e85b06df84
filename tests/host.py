"""fused_kernel.cu (and any other .cu) built for the host, so that its kernels run on CPU tensors without a GPU.

`library` builds the very source with tests/host_cuda.h. `run_on` makes leanquant.kernels launch from it: the Python that
picks grids, sizes and argument order runs as on a GPU. `run_under_asan` runs one recorded launch in an executable of its own.
"""

import ctypes
import os
import re
import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch

from leanquant import kernels

SHARED_BYTES = {7: 64 * 1024, 8: 99 * 1024, 9: 227 * 1024, 12: 99 * 1024}  # a block can have, by the major architecture
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function"]
# Reads a launch from a file, runs it on buffers of exactly the tensors' sizes, and writes the tensors back.
MAIN = """
#include <string>
int main(int, char** argv) {
    FILE* in = fopen(argv[2], "rb");
    int head[5];  // blocks along x and y, threads, shared bytes, arguments
    if (!in || fread(head, 4, 5, in) != 5) return 2;
    const int count = head[4];
    std::vector<void*> values(count), pointers(count);
    std::vector<long long> sizes(count);
    for (int i = 0; i < count; ++i) {  // a size of -1: an integer follows, not a tensor; -2: a null pointer
        if (fread(&sizes[i], 8, 1, in) != 1) return 2;
        const long long bytes = sizes[i] == -1 ? 4 : sizes[i] < 0 ? 0 : sizes[i];
        pointers[i] = sizes[i] == -2 ? nullptr : malloc(bytes);
        if (bytes && fread(pointers[i], 1, bytes, in) != (size_t)bytes) return 2;
        values[i] = sizes[i] == -1 ? pointers[i] : (void*)&pointers[i];
    }
    fclose(in);
    const std::string name = argv[1];
    DISPATCH
    FILE* out = fopen(argv[3], "wb");
    for (int i = 0; i < count; ++i)
        if (sizes[i] > 0) fwrite(pointers[i], 1, sizes[i], out);
    fclose(out);
}
"""


class Gpu(NamedTuple):
    """What torch tells of one."""

    major: int
    multi_processor_count: int
    shared_memory_per_block_optin: int


def source_of(cuda: Path, names: list[str]) -> str:
    exports = "".join(
        f'extern "C" void launch_{name}(int blocks_x, int blocks_y, int threads, int shared, void** values) '
        f"{{ host::launch({name}, blocks_x, blocks_y, threads, shared, values); }}\n"
        for name in names
    )
    return f'#include "{Path(__file__).with_name("host_cuda.h")}"\n#include "{cuda}"\n{exports}'


def build(source: str, out: Path, *flags: str) -> Path:
    out.with_suffix(".cpp").write_text(source)
    subprocess.run(["g++", *FLAGS, *flags, str(out.with_suffix(".cpp")), "-o", str(out)], check=True)
    return out


def library(cuda: Path, names: list[str], folder: Path, *flags: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(build(source_of(cuda, names), folder / "host.so", "-shared", "-fPIC", *flags)))


def executable(cuda: Path, names: list[str], folder: Path) -> Path:
    """The same kernels under AddressSanitizer."""
    dispatch = "".join(f'if (name == "{name}") launch_{name}(head[0], head[1], head[2], head[3], values.data());\n' for name in names)
    source = source_of(cuda, names) + MAIN.replace("DISPATCH", dispatch)
    return build(source, folder / "asan", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def kernel_names(cuda: Path) -> list[str]:
    """Of a CUDA file, as the compiler would list them: macros that make kernels are expanded."""
    made = subprocess.run(["g++", "-E", "-P", "-x", "c++", str(cuda)], check=True, capture_output=True, text=True).stdout
    return re.findall(r'extern "C" __global__ void (?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\(', made)


def run_on(monkeypatch, built: ctypes.CDLL, major: int = 9) -> list[tuple]:
    """For the test: CPU tensors count as a GPU's, of that architecture, and launches go to `built`.

    Returns the list that launches are noted in.
    """
    launches, gpu = [], Gpu(major, 2, SHARED_BYTES[major])

    def call(function, kernel, device, blocks, threads, shared_bytes, args):
        launches.append((kernel.name, blocks, threads, shared_bytes, args))
        pointers = [ctypes.c_int(a) if isinstance(a, int) else ctypes.c_void_p(kernels._address(a)) for a in args]
        values = (ctypes.c_void_p * len(args))(*(ctypes.addressof(pointer) for pointer in pointers))
        function(*blocks, threads, shared_bytes, values)

    def mm(a, b, out_dtype=None, **kwargs):
        """torch.mm, with the float32 output for 16-bit factors that it has on GPUs alone."""
        return product(a, b, **kwargs) if out_dtype is None else product(a.to(out_dtype), b.to(out_dtype))

    product = torch.mm
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.delenv("LEANQUANT_KERNELS", raising=False)
    monkeypatch.setattr(kernels, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(kernels, "properties", lambda device: gpu)
    monkeypatch.setattr(kernels, "_compiled", lambda kernel, index: getattr(built, f"launch_{kernel.name}"))
    monkeypatch.setattr(kernels, "_call", call)
    return launches


def run_under_asan(program: Path, launch: tuple, folder: Path) -> subprocess.CompletedProcess:
    """One noted launch again, with buffers of exactly the tensors' sizes. Afterwards the results are in folder/out."""
    name, blocks, threads, shared_bytes, args = launch
    parts = [struct.pack("5i", *blocks, threads, shared_bytes, len(args))]
    for arg in args:
        if isinstance(arg, torch.Tensor):
            data = arg.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            parts += [struct.pack("q", len(data)), data]
        elif arg is None:
            parts += [struct.pack("q", -2)]
        else:
            parts += [struct.pack("q", -1), struct.pack("i", arg)]
    (folder / "in").write_bytes(b"".join(parts))
    options = {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
    command = [str(program), name, str(folder / "in"), str(folder / "out")]
    return subprocess.run(command, env=os.environ | options, capture_output=True, text=True)
