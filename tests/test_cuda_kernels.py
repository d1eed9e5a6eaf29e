"""The CUDA kernels' own sources, run on the CPU: fibers for threads, PTX's tables for tensor cores.

What this proves: packing, the order of fragments, synchronization and every index. What it cannot:
speed, and that the hardware follows its manual (benchmarks/gpu.py does, where there is a GPU).
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from math import erf
from pathlib import Path

import gpu
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from native_library import guarded

from optimizer.custom_ops.cuda_layout import (
    ALIGNMENT,
    MMA8,
    MMA16,
    SP16,
    pack_mma8,
    pack_mma16,
    pack_sp16,
)
from optimizer.custom_ops.packing import Packed, to_tiles

SOURCES = Path(__file__).resolve().parent.parent / "plugins" / "sparse_matmul" / "cuda"
FORMS = {"mma16": 16, "mma8": 17, "sp16": 18}
FLOATS = ("mma16", "sp16")
PACK = {"mma16": pack_mma16, "mma8": pack_mma8, "sp16": pack_sp16}
TYPES = {"float16": (0, np.dtype(np.float16)), "bfloat16": (1, np.dtype(ml_dtypes.bfloat16))}
ACTIVATIONS = (
    lambda v: v,
    lambda v: np.maximum(v, 0),
    lambda v: 0.5 * v * (1 + np.vectorize(erf)(v / np.sqrt(2))),
    lambda v: 0.5 * v * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3))),
    lambda v: v / (1 + np.exp(-v)),
)


pytestmark = pytest.mark.native


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler on the PATH")
    path = tmp_path_factory.mktemp("emulation") / "libkernels.so"
    sources = [SOURCES / "emulation" / "emulation.cc", *sorted(SOURCES.glob("*.cu"))]
    command = [
        compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
        "-fPIC", "-shared", f"-I{SOURCES / 'emulation'}", f"-I{SOURCES}", "-x", "c++",
        *map(str, sources), "-o", str(path),
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    lib = ctypes.CDLL(str(path))
    i64, i32, pointer = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p
    lib.optimize_cuda_workspace.argtypes, lib.optimize_cuda_workspace.restype = (
        [i64, i64, i32, i64],
        i64,
    )
    lib.optimize_cuda_run.restype = ctypes.c_char_p
    lib.optimize_cuda_run.argtypes = [
        i64, i64, i32, i32, i32, *[pointer] * 7, i64, pointer, pointer, pointer,
    ]  # fmt: skip
    return lib


def before_a_guard(array: np.ndarray) -> np.ndarray:
    """A copy aligned to 16 bytes, at most 15 bytes of 0xff before a guard page."""
    raw = np.frombuffer(array.tobytes(), np.uint8)
    padded = guarded(np.concatenate([raw, np.full(-raw.size % 16, 0xFF, np.uint8)]))
    return padded[: raw.size].view(array.dtype).reshape(array.shape)


def run(
    library: ctypes.CDLL, layout: str, weight: np.ndarray, x: np.ndarray, bias: np.ndarray | None,
    activation: int, scale: np.ndarray | None = None, x_scale: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """The kernel's y, with nothing read or written outside of its arrays."""
    (k, n), tokens = weight.shape, len(x)
    packed: Packed = PACK[layout](weight)
    type_number = next(number for number, dtype in TYPES.values() if dtype == x.dtype)
    given_arrays = [packed.bitmap, packed.values, packed.offsets, bias, scale, x_scale, x]
    arrays = [None if a is None else before_a_guard(a) for a in given_arrays]
    size = library.optimize_cuda_workspace(k, n, FORMS[layout], tokens)
    workspace = before_a_guard(np.full(size, 0xFF, np.uint8))
    y = before_a_guard(np.full(tokens * n, 0xFFFF, np.uint16)).view(x.dtype)
    addresses = [None if a is None else a.ctypes.data for a in arrays]
    error = library.optimize_cuda_run(
        k, n, FORMS[layout], type_number, activation, *addresses, tokens,
        y.ctypes.data, workspace.ctypes.data, None,
    )  # fmt: skip
    assert error is None
    return y.reshape(tokens, n)


def random_weight(
    rng: np.random.Generator, layout: str, shape: tuple[int, int], density: float, dtype: np.dtype
) -> np.ndarray:
    """Random numbers; sp16: at most two of four along K."""
    weight = rng.standard_normal(shape) / np.sqrt(max(1.0, shape[0] * density))
    weight[rng.random(shape) >= density] = 0
    weight[:, 1 :: max(3, shape[1] // 4)] = 0
    if layout == "sp16":
        padded = np.pad(weight, ((0, -shape[0] % 4), (0, 0))).reshape(-1, 4, shape[1])
        smallest = np.argsort(np.abs(padded), axis=1)[:, :2]
        np.put_along_axis(padded, smallest, 0, axis=1)
        weight = padded.reshape(-1, shape[1])[: shape[0]]
    return weight.astype(dtype)


@pytest.mark.parametrize("layout", FLOATS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(64, 64), (1, 1), (70, 130), (257, 63), (600, 72)])
def test_kernels_compute_the_product(library, layout, dtype, shape):
    rng = np.random.default_rng(shape[0])
    kind = TYPES[dtype][1]
    eps = float(ml_dtypes.finfo(kind).eps)
    for density, tokens in (
        (0.0, 3),
        (0.3, 1),
        (0.3, 8),
        (0.4, 9),
        (0.5, 16),
        (1.0, 17),
        (0.2, 33),
    ):
        weight = random_weight(rng, layout, shape, density, kind)
        x = rng.standard_normal((tokens, shape[0])).astype(kind)
        bias = rng.standard_normal(shape[1]).astype(kind) if tokens % 2 else None
        activation = (tokens + shape[0]) % 5
        y = run(library, layout, weight, x, bias, activation).astype(np.float64)
        exact = x.astype(np.float64) @ weight.astype(np.float64)
        sizes = np.abs(x.astype(np.float64)) @ np.abs(weight.astype(np.float64))
        if bias is not None:
            exact, sizes = exact + bias.astype(np.float64), sizes + np.abs(bias.astype(np.float64))
        wanted = ACTIVATIONS[activation](exact)
        # One rounding to the type; sums in float32, each activation's slope is below 1.2.
        bound = eps / 2 * np.abs(wanted) + 1.2 * shape[0] * 2.0**-24 * sizes + 1e-6
        assert np.all(np.abs(y - wanted) <= bound), (layout, density, tokens)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(64, 64), (1, 1), (70, 130), (257, 63), (600, 72)])
def test_int8_kernel_is_exact_but_for_the_type_of_y(library, dtype, shape, static):
    """Sums are integers: only the last float32 operations and the rounding to y's type are not."""
    rng = np.random.default_rng(shape[0])
    kind = TYPES[dtype][1]
    eps = float(ml_dtypes.finfo(kind).eps)
    scale = (rng.random(shape[1]) / 100 + 0.001).astype(np.float32)
    bias = rng.standard_normal(shape[1]).astype(kind)
    x_scale = np.array([0.02], np.float32) if static else None
    for density, tokens in ((0.0, 3), (0.3, 1), (0.4, 8), (0.5, 9), (1.0, 17), (0.2, 33)):
        weight = rng.integers(-128, 128, shape).astype(np.int8)
        weight[rng.random(shape) >= density] = 0
        x = rng.standard_normal((tokens, shape[0])).astype(kind)
        y = run(library, "mma8", weight, x, bias, 0, scale, x_scale).astype(np.float64)
        wide = x.astype(np.float32)
        top = np.maximum(np.abs(wide).max(axis=1, keepdims=True), np.float32(1e-12))
        step = x_scale if static else top / np.float32(127)
        codes = np.clip(np.rint(wide * (np.float32(1) / step)), -128, 127).astype(np.int64)
        exact = (codes @ weight.astype(np.int64)) * np.float64(scale) * step.astype(np.float64)
        wanted = exact + bias.astype(np.float64)
        bound = eps / 2 * np.abs(wanted) + 8 * 2.0**-24 * (np.abs(exact) + np.abs(wanted)) + 1e-7
        assert np.all(np.abs(y - wanted) <= bound), (density, tokens)


@pytest.mark.parametrize("layout", FLOATS)
def test_results_do_not_change_from_run_to_run(library, layout):
    rng = np.random.default_rng(5)
    weight = random_weight(rng, layout, (600, 70), 0.5, np.dtype(np.float16))
    x = rng.standard_normal((5, 600)).astype(np.float16)
    first = run(library, layout, weight, x, None, 0)
    np.testing.assert_array_equal(first, run(library, layout, weight, x, None, 0))


@given(
    shape=st.tuples(st.integers(1, 200), st.integers(1, 140)),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    layout=st.sampled_from(list(FORMS)),
)
def test_packing_keeps_the_weight(shape, density, layout):
    rng = np.random.default_rng(1)
    weight = random_weight(rng, layout, shape, density, np.dtype(np.float16))
    if layout == "mma8":
        weight = np.rint(weight * 100).astype(np.int8)
    packed = PACK[layout](weight)
    assert not np.any(packed.offsets.astype(np.int64) * packed.values.itemsize % ALIGNMENT)
    tiles = to_tiles(weight, {"mma16": MMA16, "mma8": MMA8, "sp16": SP16}[layout])
    stored = np.unpackbits(packed.bitmap.view(np.uint8), axis=1, bitorder="little").astype(bool)
    for tile, bits, begin in zip(tiles, stored, packed.offsets[:-1], strict=True):
        np.testing.assert_array_equal(packed.values[begin : begin + bits.sum()], tile[bits])
        assert not tile[~bits].any()
    if layout == "sp16":
        assert np.all(stored.reshape(-1, 4).sum(axis=1) == 2)


def test_a_weight_that_is_not_2_4_is_refused():
    weight = np.zeros((10, 3), np.float16)
    weight[[4, 5, 6], 2] = 1
    with pytest.raises(ValueError, match=r"column 2 has 3 weights .* in rows 4 to 7, at most 2"):
        pack_sp16(weight)


def conflicts(starts: np.ndarray) -> float:
    """Wavefronts of a 16-bit load: the most different words in one of the 32 banks."""
    words = np.unique(starts // 2)
    return float(np.bincount(words % 32, minlength=32).max())


@pytest.mark.parametrize("zeros", [0.5, 0.6, 0.7, 0.8])
def test_lanes_meet_in_few_banks(zeros):
    """The first load of every group of four: one run per lane took 3.3 to 4.5 wavefronts."""
    rng = np.random.default_rng(0)
    stored = rng.random((200, 4096)) >= zeros
    before = np.cumsum(stored, axis=1) - stored
    groups = before[:, ::4].reshape(200, 32, 32)  # [tile, (nb, kb, h), lane]
    found = [conflicts(lanes) for tile in groups for lanes in tile]
    assert np.mean(found) < 1.6


@pytest.mark.parametrize("layout", FLOATS)
def test_gpu_benchmark_packs_the_same(layout):
    """The script needs nothing of the package, so it has a packing of its own."""
    weight = random_weight(np.random.default_rng(3), layout, (150, 70), 0.4, np.dtype(np.float16))
    packed = PACK[layout](weight)
    theirs = gpu.Sparse(None, torch.from_numpy(weight), layout)
    assert theirs.layout == FORMS[layout]
    np.testing.assert_array_equal(theirs.bitmap.numpy().view(np.int8), packed.bitmap)
    np.testing.assert_array_equal(theirs.offsets.numpy(), packed.offsets)
    np.testing.assert_array_equal(theirs.values.numpy(), packed.values)
