"""The compiled operators, for tests: the installed library, or one built once for this session."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import mmap
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import native_pack
import numpy as np
import pytest
from numpy.typing import NDArray

from optimizer.custom_ops import library_path
from optimizer.errors import MissingDependencyError

ROOT = Path(__file__).resolve().parent.parent
NAME = "liboptimize_ops.so"
#: Numbers of the enum Isa, by its names.
ISAS = {"scalar": 0, "neon": 1, "avx2": 2, "avx512": 3, "amx": 4}
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}


def _installed() -> Path | None:
    try:
        return library_path()
    except MissingDependencyError:
        return None


def _built() -> Path:
    if shutil.which("cmake") is None or not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no installed native library, and no cmake with a C++ compiler to build one")
    build = ROOT / ".pytest_cache" / "native"
    build.mkdir(parents=True, exist_ok=True)
    options = ["-DOPTIMIZE_WERROR=ON"]
    with (build / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test sessions may run side by side
        for command in (
            ["cmake", "-S", str(ROOT / "plugins"), "-B", str(build), *options],
            ["cmake", "--build", str(build), "--parallel", "2", "--target", "optimize_ops"],
        ):
            result = subprocess.run(command, check=False, capture_output=True, text=True)
            assert result.returncode == 0, f"{command} failed:\n{result.stdout}{result.stderr}"
    return next(build.rglob(NAME))


def objects() -> list[Path]:
    """The object files that are compiled for one instruction set."""
    library()
    build = ROOT / ".pytest_cache" / "native"
    found = [p for p in build.rglob("*.o") if p.name.split(".")[0].rpartition("_")[2] in ISAS]
    if not found or shutil.which("nm") is None:
        pytest.skip("needs nm and a library that this session has built, not an installed one")
    return found


@functools.cache
def path() -> Path:
    """The installed library, or one built now."""
    return _installed() or _built()


@functools.cache
def library() -> ctypes.CDLL:
    """The library with the types of its functions (plugins/sparse_matmul/c_api.cc)."""
    lib = ctypes.CDLL(str(path()))
    i32, i64, pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
    lib.optimize_has_isa.argtypes, lib.optimize_has_isa.restype = [i32], i32
    create = lib.optimize_sparse_matmul_create
    create.restype = pointer
    create.argtypes = [i64, i64, i32, i32, i32, pointer, i64, pointer, i64, pointer, i64]
    create.argtypes += [pointer, pointer, pointer, ctypes.c_char_p, i64]
    lib.optimize_sparse_matmul_run.argtypes = [pointer, pointer, i64, pointer, i64]
    lib.optimize_sparse_matmul_run.restype = i32
    lib.optimize_sparse_matmul_destroy.argtypes, lib.optimize_sparse_matmul_destroy.restype = (
        [pointer],
        None,
    )
    return lib


def isas() -> list[str]:
    """The instruction sets of this machine that have kernels."""
    return [name for name, number in ISAS.items() if library().optimize_has_isa(number)]


def address(array: NDArray | None) -> int | None:
    return None if array is None else array.ctypes.data


class Kernel:
    """One weight in a kernel. The arrays are kept alive as long as this object."""

    def __init__(
        self,
        shape: tuple[int, int],
        layout: int,
        bitmap: NDArray,
        offsets: NDArray,
        values: NDArray,
        *,
        isa: str,
        activation: str = "none",
        bias: NDArray | None = None,
        scale: NDArray | None = None,
        x_scale: NDArray | None = None,
    ) -> None:
        """Raises ValueError with the library's sentence where it refuses the weight."""
        self.shape, self.arrays = shape, (bitmap, offsets, values, bias, scale, x_scale)
        error = ctypes.create_string_buffer(300)
        self.handle = library().optimize_sparse_matmul_create(
            *shape, layout, ACTIVATIONS[activation], ISAS[isa],
            address(bitmap), bitmap.nbytes, address(values), values.size,
            address(offsets), offsets.size,
            address(bias), address(scale), address(x_scale), error, len(error),
        )  # fmt: skip
        if not self.handle:
            raise ValueError(error.value.decode())

    def __call__(self, x: NDArray, threads: int = 1) -> NDArray:
        """y [M, N] of x [M, K]; checks that every output is written and nothing around them is."""
        rows, guard = len(x), 64
        x = np.ascontiguousarray(x, np.float32)
        assert x.shape == (rows, self.shape[0])
        poison = np.uint32(0x7FBADBAD)  # a NaN that arithmetic does not make
        memory = np.full(rows * self.shape[1] + 2 * guard, poison, np.uint32)
        y = memory[guard : len(memory) - guard]
        code = library().optimize_sparse_matmul_run(
            self.handle, address(x), rows, address(y), threads
        )
        assert code == 0
        assert (memory[:guard] == poison).all()
        assert (memory[len(memory) - guard :] == poison).all()
        assert not (y == poison).any()
        return y.view(np.float32).reshape(rows, self.shape[1])

    def close(self) -> None:
        library().optimize_sparse_matmul_destroy(self.handle)


def guarded(array: NDArray) -> NDArray:
    """A copy whose end is the end of a page, with a page after it that cannot be read."""
    page = mmap.PAGESIZE
    room = -(-max(array.nbytes, 1) // page) * page
    memory = mmap.mmap(-1, room + page)
    view = np.frombuffer(memory, np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    no_access = 0
    assert (
        libc.mprotect(ctypes.c_void_p(view.ctypes.data + room), ctypes.c_size_t(page), no_access)
        == 0
    )
    copy = view[room - array.nbytes : room].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@contextmanager
def kernel(weight: NDArray, isa: str, **options) -> Iterator[Kernel]:
    """A kernel of the dense `weight` [K, N], float32 or int8."""
    layout = native_pack.N64K1 if weight.dtype == np.float32 else native_pack.N16K4
    made = Kernel(weight.shape, layout, *native_pack.pack(weight, layout), isa=isa, **options)
    try:
        yield made
    finally:
        made.close()
