"""The CUDA kernels' source on the CPU: the emulated library, guarded arrays, and the oracle."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import math
import mmap
import multiprocessing
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cuda_library
import ml_dtypes
import numpy as np
import pytest
from cuda_weights import DTYPES

from optimizer.custom_ops.cuda_layout import most_values, pack_cuda

ROOT = Path(__file__).resolve().parent.parent
PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)


def compiler() -> str:
    """A C++ compiler; the test is skipped where there is none."""
    found = cuda_library.cxx()
    if found is None:
        pytest.skip("needs a C++ compiler to build the CUDA kernels for the emulation")
    return found


@functools.cache
def library() -> Any:
    """Built once for a state of the sources."""
    state = hashlib.sha256()
    for path in sorted(cuda_library.SOURCES.rglob("*.*")):
        state.update(path.read_bytes())
    folder = ROOT / ".pytest_cache" / "cuda" / state.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test sessions may run side by side
        made = folder / "liboptimize_cuda.so"
        if not made.exists():
            cuda_library.build_emulated(folder, compiler())
    return cuda_library.load(made)


class Guarded:
    """An array that ends at a page which may not be touched, and begins after one.

    Between its end and that page are up to 15 bytes (it begins at a multiple of 16), filled with
    0xff: NaN in every float type.
    """

    def __init__(self, array: np.ndarray) -> None:
        inner = -(-max(array.nbytes, 1) // 16) * 16
        pages = -(-inner // PAGE)
        self.map = mmap.mmap(-1, (pages + 2) * PAGE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.address = base + (pages + 1) * PAGE - inner
        ctypes.memset(base + PAGE, 0xFF, pages * PAGE)
        ctypes.memmove(self.address, array.tobytes(), array.nbytes)
        for page in (base, base + (pages + 1) * PAGE):
            assert LIBC.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 0) == 0
        self.dtype, self.shape, self.nbytes, self.slack = (
            array.dtype, array.shape, array.nbytes, inner - array.nbytes,
        )  # fmt: skip

    def read(self) -> np.ndarray:
        """What it holds now; nothing may have been written behind it."""
        data = ctypes.string_at(self.address, self.nbytes + self.slack)
        assert data[self.nbytes :] == b"\xff" * self.slack, "something was written behind the end"
        return np.frombuffer(data[: self.nbytes], self.dtype).reshape(self.shape)


def apply(activation: int, v: np.ndarray) -> np.ndarray:
    """The activation of this number, in float64."""
    if activation == 1:
        return np.maximum(v, 0)
    if activation == 2:
        return 0.5 * v * (1 + np.vectorize(math.erf, otypes=[float])(v / math.sqrt(2)))
    if activation == 3:
        return 0.5 * v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
    if activation == 4:
        return v / (1 + np.exp(-v))
    return v


def codes_of(x: np.ndarray, x_scale: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Int8 codes of float32 x [M, K] and their steps [M], as the operator's body rounds them."""
    if x_scale is None:
        top = np.max(np.abs(x), axis=1, initial=0)
        steps = np.maximum(top, np.float32(1e-12)) / np.float32(127)
    else:
        steps = np.full(len(x), x_scale, np.float32)
    codes = np.clip(np.rint(x * (np.float32(1) / steps)[:, None]), -128, 127)
    return codes.astype(np.int8), steps


class Case:
    """A weight with all that belongs to it, and its product with random tokens."""

    def __init__(
        self, weight: np.ndarray, layout: str, dtype: str, *, seed: int = 0, bias: bool = True,
        activation: int = 0, x_scale: float | None = None,
    ) -> None:  # fmt: skip
        self.weight, self.layout, self.dtype, self.activation = weight, layout, dtype, activation
        self.x_scale, self.int8 = x_scale, layout in ("mma8", "sp8")
        self.rng = np.random.default_rng(seed)
        self.k, self.n = weight.shape
        self.bias = self.rng.standard_normal(self.n).astype(DTYPES[dtype]) if bias else None
        self.scale = self.rng.uniform(0.5, 2, self.n).astype(np.float32) / 127
        self.packed = pack_cuda(weight, layout)

    def exact(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """y in float64, and what an error may be: sums in float32, one rounding to the type of y.

        Between the product and y are some ten float32 operations; an activation's slope is at most
        1.13. The sum of K products has an error of at most K units in the last place of the sum of
        absolute products; sums of int8 products are exact.
        """
        weight, wide = self.weight.astype(np.float64), x.astype(np.float64)
        eps = float(np.finfo(np.float32).eps)
        if self.int8:
            codes, steps = codes_of(x.astype(np.float32), self.x_scale)
            y = codes.astype(np.float64) @ weight * steps[:, None].astype(np.float64) * self.scale
            error = 10 * eps * np.abs(y)
        else:
            y = wide @ weight
            error = (self.k + 10) * eps * (np.abs(wide) @ np.abs(weight))
        if self.bias is not None:
            y = y + self.bias.astype(np.float64)
            error = error + 10 * eps * np.abs(self.bias.astype(np.float64))
        y = apply(self.activation, y)
        unit = float(ml_dtypes.finfo(DTYPES[self.dtype]).eps)
        return y, 1.13 * error + 10 * eps * (np.abs(y) + 1) + (0.5 + 1e-3) * unit * np.abs(y)

    def run(self, tokens: int, *, most: bool = True, arrivals: bool = False) -> np.ndarray:
        """Y [tokens, N] of the emulated kernels for random x, checked against the oracle."""
        dtype = DTYPES[self.dtype]
        x = self.rng.standard_normal((tokens, self.k)).astype(dtype)
        packed, memory = self.packed, {}
        memory["bitmap"] = Guarded(packed.bitmap)
        memory["values"] = Guarded(packed.values)
        memory["offsets"] = Guarded(packed.offsets)
        if self.bias is not None:
            memory["bias"] = Guarded(self.bias)
        if self.int8:
            memory["scale"] = Guarded(self.scale)
        if self.x_scale is not None:
            memory["x_scale"] = Guarded(np.array([self.x_scale], np.float32))
        if arrivals:
            memory["arrivals"] = Guarded(np.zeros(-(-self.n // 64), np.uint32))
        weight = cuda_library.weight(
            (self.k, self.n), self.layout, self.dtype, self.activation,
            {name: array.address for name, array in memory.items()},
            most_values(packed) if most else 0,
        )  # fmt: skip
        lib = library()
        given = Guarded(x)
        y = Guarded(np.full((tokens, self.n), np.nan, dtype))
        size = lib.optimize_cuda_workspace(ctypes.byref(weight), tokens)
        assert size % 256 == 0
        scratch = Guarded(np.full(size, 0xFF, np.uint8))
        error = lib.optimize_cuda_run(
            ctypes.byref(weight), given.address, tokens, y.address, scratch.address, None
        )
        assert error is None, error
        found = y.read()
        if arrivals:
            assert not memory["arrivals"].read().any(), "counts must be left as zeros"
        exact, allowed = self.exact(x)
        wrong = ~(np.abs(found.astype(np.float64) - exact) <= allowed)  # NaN is wrong
        assert not wrong.any(), (
            f"{self.layout} {self.dtype} [{self.k}, {self.n}], {tokens} tokens: "
            f"{wrong.sum()} of {wrong.size} wrong, first at {np.argwhere(wrong)[0]}: "
            f"{found[wrong][0]}, expected {exact[wrong][0]} +- {allowed[wrong][0]:.2g}"
        )
        return found


def in_a_process(work: Callable[[], None], **settings: str) -> None:
    """Runs it in a process of its own, so that a forbidden read fails this test and no other."""
    library()  # built here, once

    def child() -> None:
        os.environ.update({f"OPTIMIZE_EMULATE_{name}": value for name, value in settings.items()})
        work()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(300)
    if process.is_alive():
        process.kill()
        pytest.fail("took more than 300 s")
    assert process.exitcode == 0, (
        f"exit code {process.exitcode} with {settings}: -11 is a read or write outside of an "
        "array, -6 a check of the emulation; the output says more"
    )


def program(text: str, folder: Path) -> Path:
    """A program against the emulation, compiled."""
    source, made = folder / "program.cc", folder / "program"
    source.write_text(text, "utf-8")
    sources = cuda_library.SOURCES
    command = [compiler(), "-std=c++17", "-O1", "-U_FORTIFY_SOURCE"]
    command += [f"-I{sources}", f"-I{sources / 'emulation'}"]
    subprocess.run([*command, "-o", str(made), str(source)], check=True)
    return made
