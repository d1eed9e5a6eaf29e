"""The float32 kernels of SparseMatMul, each instruction set of this machine against float64."""

from __future__ import annotations

import math
import threading

import native_pack
import numpy as np
import pytest
from native_library import ACTIVATIONS, Kernel, guarded, isas, kernel
from numpy.typing import NDArray

pytestmark = pytest.mark.native

EPS = 2.0**-24
TOKENS = (0, 1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 64, 65, 128, 197)
#: One tile, tails on both sides, several tiles, several blocks of pairs and windows of slices.
SHAPES = ((1, 1), (64, 64), (65, 63), (7, 130), (200, 96), (333, 300))
DENSITIES = (0.0, 0.01, 0.1, 0.3, 0.5, 1.0)


def random_weight(rng: np.random.Generator, shape: tuple[int, int], density: float) -> NDArray:
    weight = rng.standard_normal(shape, dtype=np.float32)
    weight[rng.random(shape) >= density] = 0
    weight[:, :: max(3, shape[1] // 4)] = 0  # some columns are empty
    return weight


def naive(x: NDArray, weight: NDArray) -> NDArray:
    """float32 sums over k, one after the other."""
    total = np.zeros((len(x), weight.shape[1]), np.float32)
    for k in range(weight.shape[0]):
        total += x[:, k : k + 1] * weight[k]
    return total


def relative(y: NDArray, x: NDArray, weight: NDArray) -> NDArray:
    """Errors of the product in units of the sum of its absolute terms."""
    wide = x.astype(np.float64), weight.astype(np.float64)
    size = np.abs(wide[0]) @ np.abs(wide[1])
    return np.abs(y - wide[0] @ wide[1]) / np.where(size > 0, size, 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", DENSITIES)
def test_errors_are_at_most_twice_those_of_a_naive_kernel(shape, density):
    rng = np.random.default_rng(shape[0])
    weight = random_weight(rng, shape, density)
    x = rng.standard_normal((max(TOKENS), shape[0]), dtype=np.float32)
    reference = relative(naive(x, weight), x, weight)
    for isa in isas():
        with kernel(weight, isa) as made:
            for tokens in TOKENS:
                y = made(x[:tokens])
                errors = relative(y, x[:tokens], weight)
                assert (errors <= shape[0] * EPS).all(), (isa, tokens)
                if tokens >= 64 and reference.max() > 4 * EPS:
                    assert errors.max() <= 2 * reference.max(), (isa, tokens)
                    assert np.sqrt((errors**2).mean()) <= 2 * np.sqrt((reference**2).mean()), (
                        isa,
                        tokens,
                    )


@pytest.mark.parametrize("density", [0.05, 0.4])
def test_results_do_not_depend_on_the_number_of_threads(density):
    rng = np.random.default_rng(3)
    weight = random_weight(rng, (150, 333), density)
    bias = rng.standard_normal(333, dtype=np.float32)
    for isa in isas():
        for tokens in (1, 7, 40, 300):
            x = rng.standard_normal((tokens, 150), dtype=np.float32)
            with kernel(weight, isa, bias=bias, activation="gelu") as made:
                one = made(x, threads=1)
                for threads in (2, 3):
                    np.testing.assert_array_equal(made(x, threads=threads), one, err_msg=isa)


def exact(activation: str, v: NDArray) -> tuple[NDArray, NDArray]:
    """float64 values of an activation and the errors that vec_math.h allows."""
    v = v.astype(np.float64)
    u = math.sqrt(8 / math.pi) * (v + 0.044715 * v**3)
    with np.errstate(over="ignore"):
        y, units = {
            "none": (v, 0.0),
            "relu": (np.maximum(v, 0), 0.0),
            "gelu": (v * 0.5 * np.vectorize(math.erfc)(-v * math.sqrt(0.5)), 8.0),
            "gelu_tanh": (v / (1 + np.exp(-u)), 8 + 6 * np.abs(u)),
            "silu": (v / (1 + np.exp(-v)), 6.0),
        }[activation]
    return y, units * EPS * np.abs(y) + 2.0**-139


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_bias(activation):
    magnitudes = np.concatenate([np.geomspace(1e-38, 3e38, 2000), np.linspace(0, 12, 2000)])
    v = np.concatenate([-magnitudes, magnitudes, [0.0, -0.0]]).astype(np.float32)
    wanted, allowed = exact(activation, v)
    one, bias = np.ones((1, 1), np.float32), np.zeros(1, np.float32)
    columns = np.zeros((1, len(v)), np.float32)  # the same numbers as biases of empty columns
    for isa in isas():
        if isa == "scalar":  # the body's own form cancels: an error of the argument's size
            allowed = np.maximum(allowed, 16 * EPS * np.abs(v) if activation != "none" else 0)
        for x in (v[:, None], v[:9, None]):
            with kernel(one, isa, activation=activation, bias=bias) as made:
                y = made(x)[:, 0]
            assert (np.abs(y - wanted[: len(y)]) <= allowed[: len(y)]).all(), isa
        with kernel(columns, isa, activation=activation, bias=v) as made:
            for tokens in (1, 3, 64):
                y = made(np.ones((tokens, 1), np.float32))
                assert (np.abs(y - wanted) <= allowed).all(), isa


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("density", [0.05, 0.5])
@pytest.mark.parametrize("k", [0, 3, 64, 199])
def test_nan_and_infinity_reach_every_output_that_uses_them(tokens, density, k):
    rng = np.random.default_rng(5)
    weight = random_weight(rng, (200, 90), density)
    x = rng.standard_normal((tokens, 200), dtype=np.float32)
    others = x[1:].astype(np.float64) @ weight
    for bad in (np.nan, np.inf, -np.inf):
        x[0, k] = bad
        stored = weight[k] != 0
        assert stored.any()
        for isa in isas():
            with kernel(weight, isa) as made:
                y = made(x)
            np.testing.assert_array_equal(y[0, stored], bad * weight[k, stored], err_msg=isa)
            np.testing.assert_allclose(y[1:], others, atol=1e-4, err_msg=isa)
            with kernel(weight, isa, activation="relu") as made:
                y = made(x)
            np.testing.assert_array_equal(
                y[0, stored], np.maximum(bad * weight[k, stored], 0), err_msg=isa
            )


@pytest.mark.parametrize("tokens", [1, 6, 33, 197])
def test_nothing_outside_of_the_arrays_is_read(tokens):
    """Every array ends where memory that cannot be read begins."""
    rng = np.random.default_rng(6)
    for shape in ((64, 64), (70, 3), (129, 190)):
        for density in (0.03, 0.5):
            weight = random_weight(rng, shape, density)
            bias = rng.standard_normal(shape[1], dtype=np.float32)
            x = rng.standard_normal((tokens, shape[0]), dtype=np.float32)
            wanted = x.astype(np.float64) @ weight + bias
            arrays = [
                guarded(array) for array in (*native_pack.pack(weight, native_pack.N64K1), bias, x)
            ]
            for isa in isas():
                made = Kernel(shape, native_pack.N64K1, *arrays[:3], isa=isa, bias=arrays[3])
                np.testing.assert_allclose(made(arrays[4]), wanted, atol=1e-4, err_msg=isa)
                made.close()


def test_first_calls_at_the_same_time_share_what_is_derived():
    rng = np.random.default_rng(7)
    weight = random_weight(rng, (300, 200), 0.1)
    inputs = [rng.standard_normal((m, 300), dtype=np.float32) for m in (1, 64, 1, 128, 64, 1)]
    for isa in isas():
        with kernel(weight, isa) as made:
            results: list[NDArray | None] = [None] * len(inputs)

            def call(i, made=made, results=results):
                results[i] = made(inputs[i])

            pool = [threading.Thread(target=call, args=(i,)) for i in range(len(inputs))]
            for thread in pool:
                thread.start()
            for thread in pool:
                thread.join()
            for x, y in zip(inputs, results, strict=True):
                assert y is not None
                np.testing.assert_allclose(y, x.astype(np.float64) @ weight, atol=1e-4, err_msg=isa)
