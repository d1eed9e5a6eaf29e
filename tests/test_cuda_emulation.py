"""The CUDA kernels' own source, run on the CPU by plugins/sparse_matmul/cuda/emulation.

The emulated tensor-core instructions follow the tables of the PTX ISA, so that packing, fragments
and epilogues are proven together. Arrays lie between pages that may not be touched; shared memory,
scratch and outputs begin as NaN.
"""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import cuda_emulated
import cuda_library
import numpy as np
import pytest
from cuda_emulated import Case, in_a_process
from cuda_weights import random_weight

pytestmark = pytest.mark.native

KINDS = [
    (layout, dtype)
    for layout in ("mma16", "mma8", "sp16", "sp8")
    for dtype in ("float16", "bfloat16")
]
#: Rows and columns with every kind of tail: K odd, even, a multiple of 8; N less than a tile.
SHAPES = ((64, 64), (1, 1), (70, 130), (257, 100), (136, 63), (520, 200), (64, 321))
TOKENS = (1, 2, 7, 8, 9, 15, 16, 17, 33)


def density_of(layout: str, density: float) -> float | str:
    return "2:4" if layout.startswith("sp") else density


@pytest.mark.parametrize(("layout", "dtype"), KINDS)
def test_random_shapes_and_tails(layout: str, dtype: str) -> None:
    def work() -> None:
        for shape in SHAPES:
            for number, tokens in enumerate(TOKENS):
                density = density_of(layout, (0.1, 0.3, 0.5)[number % 3])
                weight = random_weight(shape, density, layout, dtype, seed=number)
                activation = (number + shape[0]) % 5
                Case(
                    weight, layout, dtype, seed=number, bias=number % 2 == 0, activation=activation
                ).run(tokens)

    in_a_process(work)


@pytest.mark.parametrize("layout", ["mma16", "mma8", "sp16", "sp8"])
@pytest.mark.parametrize(
    "settings",
    [
        {"ORDER": "down", "COPIES": "early", "PROCESSORS": "1", "SHARED": "228"},
        {"ORDER": "mixed", "COPIES": "late", "PROCESSORS": "64", "SHARED": "228"},
        {"ORDER": "down", "COPIES": "late", "PROCESSORS": "16", "SHARED": "164"},
        {"ORDER": "mixed", "COPIES": "early", "PROCESSORS": "16", "SHARED": "100"},
    ],
    ids=lambda settings: "-".join(settings.values()),
)
def test_any_order_of_threads_and_copies(layout: str, settings: dict[str, str]) -> None:
    """And GPUs of any size: with one multiprocessor nothing is split, with many everything is."""

    def work() -> None:
        for tokens in (1, 16, 40, 130):
            weight = random_weight((1100, 150), density_of(layout, 0.3), layout, "float16")
            Case(weight, layout, "float16", activation=tokens % 5).run(tokens)

    in_a_process(work, **settings)


@pytest.mark.parametrize("activation", range(5))
@pytest.mark.parametrize("layout", ["mma16", "mma8", "sp16", "sp8"])
def test_activations(layout: str, activation: int) -> None:
    def work() -> None:
        weight = random_weight((90, 70), density_of(layout, 0.5), layout, "float16")
        for tokens in (5, 20):
            Case(weight, layout, "float16", activation=activation).run(tokens)

    in_a_process(work)


@pytest.mark.parametrize("tokens", [1, 16, 33])
@pytest.mark.parametrize(("layout", "dtype"), KINDS)
def test_zeros_empty_columns_and_dense_weights(layout: str, dtype: str, tokens: int) -> None:
    def work() -> None:
        shape = (200, 130)
        whole = random_weight(shape, density_of(layout, 1.0), layout, dtype)
        Case(whole, layout, dtype).run(tokens)
        Case(whole, layout, dtype).run(tokens, most=False)
        holes = whole.copy()
        holes[:, 3:70] = 0
        holes[64:128] = 0
        Case(holes, layout, dtype, activation=3).run(tokens)
        nothing = np.zeros(shape, whole.dtype)
        case = Case(nothing, layout, dtype)
        found = case.run(tokens)
        np.testing.assert_array_equal(found, np.broadcast_to(case.bias, found.shape))

    in_a_process(work)


@pytest.mark.parametrize("layout", ["mma16", "mma8", "sp16", "sp8"])
def test_splits_that_are_added_by_the_last_block(layout: str) -> None:
    """The same bits as with a kernel of its own for that."""

    def work() -> None:
        weight = random_weight((900, 150), density_of(layout, 0.4), layout, "float16")
        for tokens in (1, 7, 16, 17):
            apart = Case(weight, layout, "float16", activation=4).run(tokens)
            fused = Case(weight, layout, "float16", activation=4).run(tokens, arrivals=True)
            np.testing.assert_array_equal(fused, apart)

    in_a_process(work, PROCESSORS="16")


@pytest.mark.parametrize("k", [8, 1016, 2050, 8192, 8200, 9000])
@pytest.mark.parametrize("x_scale", [None, 0.03])
def test_codes_of_long_tokens(k: int, x_scale: float | None) -> None:
    """Up to 8192 numbers are kept in registers, if they are a multiple of eight."""

    def work() -> None:
        for dtype in ("float16", "bfloat16"):
            weight = random_weight((k, 5), 0.5, "mma8", dtype)
            Case(weight, "mma8", dtype, x_scale=x_scale).run(3)

    in_a_process(work)


@pytest.mark.parametrize("layout", ["mma8", "sp8"])
def test_a_static_scale_of_x(layout: str) -> None:
    """Numbers beyond it are clipped."""

    def work() -> None:
        for tokens in (3, 16, 20):
            weight = random_weight((150, 70), density_of(layout, 0.4), layout, "float16")
            Case(weight, layout, "float16", x_scale=0.01).run(tokens)

    in_a_process(work)


@pytest.mark.parametrize("layout", ["mma16", "mma8", "sp16", "sp8"])
@pytest.mark.parametrize("tokens", [4, 40])
def test_the_same_bits_whatever_the_order(layout: str, tokens: int, tmp_path: Path) -> None:
    """Sums are taken in a fixed order, not in that in which threads happen to finish."""

    def work(file: Path) -> None:
        weight = random_weight((700, 130), density_of(layout, 0.4), layout, "float16")
        np.save(file, Case(weight, layout, "float16").run(tokens, arrivals=True))

    files = []
    for order in ("up", "down", "mixed"):
        files.append(tmp_path / f"{order}.npy")
        in_a_process(lambda: work(files[-1]), ORDER=order, PROCESSORS="32")
    first, *others = (np.load(file) for file in files)
    for other in others:
        np.testing.assert_array_equal(first, other)


def splits_of(layout: str, shape: tuple[int, int]) -> int:
    """Of one token."""
    weight = cuda_library.weight(shape, layout, "float16", 0, {}, most_values=2200)
    return cuda_emulated.library().optimize_cuda_splits(ctypes.byref(weight), 1)


@pytest.mark.parametrize("layout", ["mma16", "mma8", "sp16", "sp8"])
@pytest.mark.parametrize("shape", [(64, 64), (600, 72), (4096, 4096), (11008, 64), (300, 20000)])
def test_scratch_is_the_same_on_every_machine(layout, shape, monkeypatch) -> None:
    """An engine is built on one machine and runs on another: there must be room for its splits."""
    weight = cuda_library.weight(shape, layout, "float16", 0, {}, most_values=2200)
    lib = cuda_emulated.library()
    for tokens in (1, 8, 9, 16, 17, 64, 130, 1000):
        sizes = set()
        for processors, shared in ((1, 100), (16, 164), (132, 228), (148, 228), (4000, 228)):
            monkeypatch.setenv("OPTIMIZE_EMULATE_PROCESSORS", str(processors))
            monkeypatch.setenv("OPTIMIZE_EMULATE_SHARED", str(shared))
            size = lib.optimize_cuda_workspace(ctypes.byref(weight), tokens)
            splits = lib.optimize_cuda_splits(ctypes.byref(weight), tokens)
            assert splits == 1 or size >= splits * tokens * shape[1] * 4
            sizes.add(size)
        assert len(sizes) == 1


@pytest.mark.parametrize(("layout", "warps"), [("mma16", 8), ("sp16", 4)])
@pytest.mark.parametrize(
    "shape", [(4096, 4096), (4096, 11008), (11008, 4096), (8192, 8192), (4096, 14336)]
)
def test_splits_fill_a_large_gpu(layout, warps, shape, monkeypatch) -> None:
    """132 multiprocessors, as an H100 has: none may have 1.7 times its share of the tiles."""
    monkeypatch.setenv("OPTIMIZE_EMULATE_PROCESSORS", "132")
    monkeypatch.setenv("OPTIMIZE_EMULATE_SHARED", "228")
    splits = splits_of(layout, shape)
    strips, tiles = shape[1] // 64, shape[0] // 64
    assert strips * splits * warps >= 0.8 * 132 * 16, "16 warps for each"
    busiest = math.ceil(strips * splits / 132) * math.ceil(tiles / splits / warps) * warps
    assert busiest <= 1.7 * strips * tiles / 132


@pytest.mark.parametrize("layout", ["mma16", "mma8", "sp16", "sp8"])
@pytest.mark.parametrize("shape", [(4096, 4096), (2048, 64), (300, 20000)])
def test_scratch_is_enough_for_fewer_tokens(layout, shape, monkeypatch) -> None:
    """Fewer are cut into more splits: what is needed for M tokens may be less than for M / 2."""
    monkeypatch.setenv("OPTIMIZE_EMULATE_PROCESSORS", "132")
    monkeypatch.setenv("OPTIMIZE_EMULATE_SHARED", "228")
    weight = cuda_library.weight(shape, layout, "float16", 0, {}, most_values=2200)
    lib, before = cuda_emulated.library(), 0
    for tokens in (*range(1, 300), 1000, 2**19 - 1, 2**19, 2**19 + 5):
        size = lib.optimize_cuda_workspace(ctypes.byref(weight), tokens)
        assert size >= before
        before = size
    if layout.endswith("16"):
        # twice the places of the largest GPU that is planned for, each with 128 x 128 sums
        assert before <= 2 * 4 * 8 * 256 * 128 * 128, "no split of what fills any GPU anyway"


class Zeros:
    """In place of a random generator."""

    def standard_normal(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.zeros(shape)


def test_a_token_of_zeros_has_a_scale() -> None:
    def work() -> None:
        case = Case(random_weight((70, 70), 0.5, "mma8", "float16"), "mma8", "float16")
        case.rng = Zeros()
        found = case.run(2)
        np.testing.assert_array_equal(found, np.broadcast_to(case.bias, found.shape))

    in_a_process(work)


def call(layout: int, dtype: int, tokens: int, **arrays: int) -> bytes | None:
    weight = cuda_library.Weight(64, 64, layout, dtype, 0, 0, **arrays)
    lib = cuda_emulated.library()
    return lib.optimize_cuda_run(ctypes.byref(weight), None, tokens, None, None, None)


@pytest.mark.parametrize(("layout", "dtype"), [(15, 0), (20, 0), (16, 2), (16, -1), (17, 0)])
def test_what_cannot_be_run_is_refused(layout: int, dtype: int) -> None:
    """No such layout, no such type, int8 without scale."""
    assert call(layout, dtype, 4) == b"invalid argument"


@pytest.mark.parametrize("layout", [16, 18])
@pytest.mark.parametrize("tokens", [2, 20])
def test_a_sum_of_nothing_is_the_bias(layout: int, tokens: int) -> None:
    bias, y = np.arange(64, dtype=np.float16), np.full((tokens, 64), np.nan, np.float16)
    weight = cuda_library.Weight(0, 64, layout, 0, 0, 0, bias=bias.ctypes.data)
    lib = cuda_emulated.library()
    arguments = (bias.ctypes.data, tokens, y.ctypes.data, None, None)  # no x: nothing reads it
    assert lib.optimize_cuda_run(ctypes.byref(weight), *arguments) is None
    np.testing.assert_array_equal(y, np.broadcast_to(bias, y.shape))


@pytest.mark.parametrize("numbers", [4, 1028, 4 * 256 * 8 * 4 * 5 + 4])
def test_the_read_of_the_benchmark_stays_inside(numbers: int) -> None:
    def work() -> None:
        array = cuda_emulated.Guarded(np.ones(numbers, np.uint32))
        sink = cuda_emulated.Guarded(np.zeros(1, np.uint32))
        lib = cuda_emulated.library()
        assert lib.optimize_cuda_read(array.address, 4 * numbers, sink.address, None) is None
        assert sink.read()[0] == 0

    in_a_process(work)


def test_no_token_is_no_work() -> None:
    assert call(16, 0, 0) is None
    weight = cuda_library.Weight(64, 64, 16, 0, 0, 0)
    assert cuda_emulated.library().optimize_cuda_workspace(ctypes.byref(weight), 0) == 0
