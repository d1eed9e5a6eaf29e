"""The CUDA kernels' library for Python: how it is built, and its functions through ctypes.

Used by ``gpu.py`` (built by nvcc) and by the tests (built by a C++ compiler, for the emulation).
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
try:
    import onnx_ir  # noqa: F401
except ImportError:
    # The layouts need numpy alone; the operator's declaration next to them needs onnx_ir only when
    # it is asked for the operator's body, and GPU machines for benchmarks may lack it.
    sys.modules["onnx_ir"] = types.ModuleType("onnx_ir")

from optimizer.custom_ops import cuda_layout  # noqa: E402

SOURCES = ROOT / "plugins" / "sparse_matmul" / "cuda"
FILES = ("decode.cu", "sparse24.cu", "quantize.cu", "run.cu", "c_api.cu", "validate.cc")
TYPES = {"float16": 0, "bfloat16": 1}


class Weight(ctypes.Structure):
    """OptimizeCudaWeight of c_api.cu."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("k", "n")),
        *((name, ctypes.c_int32) for name in ("layout", "type", "activation", "most_values")),
        *(
            (name, ctypes.c_void_p)
            for name in ("bitmap", "values", "offsets", "bias", "scale", "x_scale", "arrivals")
        ),
    )


def weight(
    shape: tuple[int, int], layout: str, dtype: str, activation: int, arrays: dict[str, int | None],
    most_values: int = 0,
) -> Weight:  # fmt: skip
    """The structure for a weight [K, N] whose arrays lie at these addresses."""
    return Weight(
        *shape, cuda_layout.LAYOUT_CODES[layout], TYPES[dtype], activation, most_values,
        **arrays,
    )  # fmt: skip


def compile_all(command: list[str], folder: Path, link: list[str]) -> Path:
    """Builds the library: ``command`` compiles one file, ``link`` links the objects.

    Raises:
        RuntimeError: What a command said that failed.
    """
    made = folder / "liboptimize_cuda.so"

    def run(arguments: list[str]) -> None:
        result = subprocess.run(arguments, check=False, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{' '.join(arguments)}\n{result.stdout}{result.stderr}")

    objects = [str(folder / f"{Path(name).stem}.o") for name in FILES]
    jobs = [
        [*command, "-c", str(SOURCES / name), "-o", target]
        for name, target in zip(FILES, objects, strict=True)
    ]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, jobs))
    run([*link, "-o", str(made), *objects])
    return made


#: Checks of the emulation's compiler: shifts, array bounds, alignment of what is read.
CHECKS = "-fsanitize=alignment,shift,bounds"


def cxx() -> str | None:
    """A C++ compiler."""
    return next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)


def build_emulated(folder: Path, compiler: str) -> Path:
    """The kernels for the CPU (plugins/sparse_matmul/cuda/emulation).

    Jumps from one fiber's stack to another's are what fortified ``longjmp`` takes for a mistake.
    """
    flags = [
        "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror",
        "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE", CHECKS, "-fno-sanitize-recover=all",
        f"-I{SOURCES / 'emulation'}", "-x", "c++",
    ]  # fmt: skip
    return compile_all([compiler, *flags], folder, [compiler, "-shared", CHECKS])


def load(path: Path) -> Any:
    """The library's functions with their types."""
    library = ctypes.CDLL(str(path))
    pointer, i64 = ctypes.c_void_p, ctypes.c_int64
    library.optimize_cuda_workspace.restype = i64
    library.optimize_cuda_workspace.argtypes = [ctypes.POINTER(Weight), i64]
    library.optimize_cuda_splits.restype = ctypes.c_int32
    library.optimize_cuda_splits.argtypes = [ctypes.POINTER(Weight), i64]
    library.optimize_cuda_run.restype = ctypes.c_char_p
    library.optimize_cuda_run.argtypes = [
        ctypes.POINTER(Weight), pointer, i64, pointer, pointer, pointer,
    ]  # fmt: skip
    library.optimize_cuda_read.restype = ctypes.c_char_p
    library.optimize_cuda_read.argtypes = [pointer, i64, pointer, pointer]
    library.optimize_cuda_validate.restype = ctypes.c_char_p
    library.optimize_cuda_validate.argtypes = [ctypes.POINTER(Weight), i64, i64, i64]
    return library
