"""NVRTC without a GPU: compile the project's CUDA files for a given architecture with the compiler from the pip wheel.

Calls the library's public C API. Knows nothing of what the kernels do.
"""

import ctypes
import re
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(file for folder in (ROOT, ROOT / "leanquant", ROOT / "scripts") for file in folder.glob("*.cu"))
ARCHITECTURES = [75, 80, 86, 89, 90, 100, 120]


def wheel_file(file: str) -> Path:
    """A file of the nvidia wheels: those of CUDA 12 that requirements.txt pins, or those of CUDA 13."""
    nvidia = Path(sysconfig.get_paths()["purelib"], "nvidia")
    found = [path for folder in ("cuda_nvrtc", "cuda_runtime", "cu13") for path in sorted(nvidia.glob(f"{folder}/{file}"))]
    assert found, f"no {file} under nvidia: is requirements.txt installed?"
    return found[0]


def compile_log(source: Path, architecture: int, *flags: str) -> str:
    """The assembler's report on `source` built for sm_`architecture`, with what CuPy adds. Raises AssertionError if it does not compile."""
    library = ctypes.CDLL(str(wheel_file("lib/libnvrtc.so.*")))
    include = wheel_file("include/cuda_fp16.h").parent
    options = ["--std=c++17", f"--include-path={include}", "--ptxas-options=-v", *flags]
    options += ["-ftz=true", f"-arch=sm_{architecture}", "--device-as-default-execution-space"]
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    library.nvrtcCreateProgram(ctypes.byref(program), source.read_bytes(), source.name.encode(), 0, None, None)
    array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    failed = library.nvrtcCompileProgram(program, len(options), array)
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    assert not failed, log.value.decode()
    return log.value.decode()


def functions(log: str) -> set[str]:
    return set(re.findall(r"Compiling entry function '(\w+)'", log))


def spills(log: str) -> dict[str, str]:
    """The functions that keep anything in local memory, with the assembler's line about it."""
    reports = re.findall(r"Function properties for (\w+)\s+ptxas[ .]*(\d+ bytes stack frame, .*)", log)
    assert {name for name, _ in reports} >= functions(log)
    return {name: line for name, line in reports if re.sub(r"\D", "", line).strip("0")}
