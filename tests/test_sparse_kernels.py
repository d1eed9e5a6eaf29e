"""The int8 kernels of SparseMatMul against integer arithmetic; what validation refuses."""

from __future__ import annotations

import subprocess
from math import erf, exp, pi, sqrt, tanh

import native_pack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from native_library import ISAS, Kernel, guarded, isas, kernel, objects
from numpy.typing import NDArray

pytestmark = pytest.mark.native

TOKENS = (0, 1, 2, 3, 5, 6, 8, 15, 16, 17, 26, 27, 33, 64, 65, 128, 197, 260)
SHAPES = ((1, 1), (64, 64), (65, 63), (7, 130), (200, 96), (333, 300), (1100, 70))
DENSITIES = (0.0, 0.01, 0.1, 0.3, 0.5, 1.0)


def random_weight(rng: np.random.Generator, shape: tuple[int, int], density: float) -> NDArray:
    weight = rng.integers(-128, 128, shape).astype(np.int8)
    weight[rng.random(shape) >= density] = 0
    weight[:, :: max(3, shape[1] // 4)] = 0
    return weight


def expected(
    x: NDArray, weight: NDArray, scale: NDArray, bias: NDArray, x_scale: NDArray | None
) -> NDArray:
    """The operator's body: the same float32 operations around an exact integer product."""
    with np.errstate(divide="ignore"):
        top = np.abs(x).max(1, initial=0).astype(np.float32)
    step = (
        np.full(len(x), x_scale[0])
        if x_scale is not None
        else np.maximum(top, np.float32(1e-12)) / np.float32(127)
    )
    codes = np.clip(np.rint(x * (np.float32(1) / step)[:, None]), -128, 127).astype(np.int64)
    sums = (codes @ weight.astype(np.int64)).astype(np.float32)
    return sums * step[:, None] * scale + bias


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("static", [False, True])
def test_int8_kernels_are_exact(shape, static):
    rng = np.random.default_rng(shape[0])
    scale = rng.random(shape[1], dtype=np.float32) + 0.1
    bias = rng.standard_normal(shape[1], dtype=np.float32)
    x = rng.standard_normal((max(TOKENS), shape[0]), dtype=np.float32)
    x_scale = np.array([0.02], np.float32) if static else None  # 0.02 * 127 clips a few
    for density in DENSITIES:
        weight = random_weight(rng, shape, density)
        wanted = expected(x, weight, scale, bias, x_scale)
        for isa in isas():
            with kernel(weight, isa, scale=scale, bias=bias, x_scale=x_scale) as made:
                for tokens in TOKENS:
                    np.testing.assert_array_equal(
                        made(x[:tokens]), wanted[:tokens], err_msg=f"{isa} {tokens}"
                    )
                    if tokens > 30:
                        np.testing.assert_array_equal(
                            made(x[:tokens], threads=3), wanted[:tokens], err_msg=isa
                        )


@pytest.mark.parametrize("tokens", [1, 2, 3, 40])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu"])
def test_largest_codes_do_not_saturate(tokens, activation):
    """All products have the largest size and one sign."""
    x = np.where(np.arange(256) % 2, -1, 1).astype(np.float32)[None].repeat(tokens, 0)
    weight = np.where(np.arange(256) % 2, -128, 127).astype(np.int8)[:, None].repeat(80, 1)
    scale, x_scale = np.full(80, 2.0**-20, np.float32), np.array([1 / 128], np.float32)
    for isa in isas():
        with kernel(weight, isa, scale=scale, x_scale=x_scale, activation=activation) as made:
            y = made(x)
        v = 128 * (127 * 127 + 128 * 128) * 2.0**-27  # the codes are 127 and -128
        np.testing.assert_allclose(y, activated(activation, v), 2e-6, 0, err_msg=isa)


def activated(activation: str, v: float) -> float:
    return {
        "none": v,
        "relu": max(v, 0.0),
        "gelu": 0.5 * v * (1 + erf(v / sqrt(2))),
        "gelu_tanh": 0.5 * v * (1 + tanh(sqrt(2 / pi) * (v + 0.044715 * v**3))),
        "silu": v / (1 + exp(-v)),
    }[activation]


@pytest.mark.parametrize("tokens", [1, 6, 40])
def test_nothing_outside_of_the_arrays_is_read(tokens):
    rng = np.random.default_rng(6)
    for shape in ((64, 64), (70, 3), (129, 190)):
        for density in (0.03, 0.5):
            weight = random_weight(rng, shape, density)
            scale, bias = (rng.random(shape[1], dtype=np.float32) for _ in range(2))
            x = rng.standard_normal((tokens, shape[0]), dtype=np.float32)
            wanted = expected(x, weight, scale, bias, None)
            arrays = [
                guarded(a) for a in (*native_pack.pack(weight, native_pack.N16K4), scale, bias, x)
            ]
            for isa in isas():
                made = Kernel(
                    shape, native_pack.N16K4, *arrays[:3], isa=isa, scale=arrays[3], bias=arrays[4]
                )
                np.testing.assert_allclose(
                    made(arrays[5]), wanted, rtol=1e-5, atol=1e-5, err_msg=isa
                )
                made.close()


def sound(layout: int) -> dict[str, NDArray | tuple[int, int] | int]:
    rng = np.random.default_rng(8)
    weight = random_weight(rng, (100, 90), 0.3)
    if layout == native_pack.N64K1:
        weight = weight.astype(np.float32)
    bitmap, offsets, values = native_pack.pack(weight, layout)
    scale = np.ones(90, np.float32) if layout == native_pack.N16K4 else None
    return {
        "shape": (100, 90),
        "layout": layout,
        "bitmap": bitmap,
        "offsets": offsets,
        "values": values,
        "scale": scale,
    }


def changed(array: NDArray, at, value) -> NDArray:
    copy = array.copy()
    copy[at] = value
    return copy


CORRUPTIONS = {
    "no rows": (lambda w: {"shape": (0, 90)}, "K and N must be between"),
    "negative columns": (lambda w: {"shape": (100, -5)}, "K and N must be between"),
    "another shape": (lambda w: {"shape": (100, 200)}, "bytes of the bitmap"),
    "short bitmap": (lambda w: {"bitmap": w["bitmap"][:-1]}, "bytes of the bitmap"),
    "cut bitmap": (lambda w: {"bitmap": w["bitmap"].reshape(-1)[:-3]}, "bytes of the bitmap"),
    "missing offset": (lambda w: {"offsets": w["offsets"][:-1]}, "number of offsets"),
    "negative offset": (lambda w: {"offsets": changed(w["offsets"], 0, -1)}, "tile 0 has"),
    "offset outside": (lambda w: {"offsets": changed(w["offsets"], -1, 2**31 - 1)}, "tile 3 has"),
    "falling offsets": (lambda w: {"offsets": changed(w["offsets"], 2, 0)}, "tile 1 has"),
    "missing values": (lambda w: {"values": w["values"][:-1]}, "tile 3 has"),
    "too many bits": (
        lambda w: {"bitmap": changed(w["bitmap"], (0, slice(0, 64)), 255)},
        "tile 0 has",
    ),
}


@pytest.mark.parametrize("layout", [native_pack.N64K1, native_pack.N16K4])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corrupt_weights_are_refused(layout, name):
    change, reason = CORRUPTIONS[name]
    weight = sound(layout)
    weight.update(change(weight))
    for isa in isas():
        with pytest.raises(ValueError, match=reason):
            Kernel(**weight, isa=isa)


@pytest.mark.parametrize("layout", [native_pack.N64K1, native_pack.N16K4])
def test_bits_outside_of_the_weight_are_refused(layout):
    whole = np.ones((128, 128), np.float32 if layout == native_pack.N64K1 else np.int8)
    bitmap, offsets, values = native_pack.pack(whole, layout)
    scale = None if layout == native_pack.N64K1 else np.ones(127, np.float32)
    for shape in ((128, 127), (127, 127)):
        with pytest.raises(ValueError, match="set bits outside of K x N"):
            Kernel(shape, layout, bitmap, offsets, values, isa="scalar", scale=scale)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_bad_scales_are_refused(bad):
    weight = sound(native_pack.N16K4)
    with pytest.raises(ValueError, match="scale 5 is negative or not finite"):
        Kernel(**{**weight, "scale": changed(weight["scale"], 5, bad)}, isa="scalar")
    with pytest.raises(ValueError, match="x_scale must be positive"):
        Kernel(**weight, x_scale=np.array([bad], np.float32), isa="scalar")
    with pytest.raises(ValueError, match="need a scale"):
        Kernel(**{**weight, "scale": None}, isa="scalar")


def test_instruction_sets_that_the_machine_lacks_are_refused():
    weight = sound(native_pack.N64K1)
    for isa in ISAS.keys() - set(isas()):
        with pytest.raises(ValueError, match="lacks the instruction set"):
            Kernel(**weight, isa=isa)


@given(data=st.data(), layout=st.sampled_from([native_pack.N64K1, native_pack.N16K4]))
def test_whatever_the_arrays_hold_is_refused_or_runs(data, layout):
    """Random damage to the arrays, which lie before memory that cannot be read."""
    weight = sound(layout)
    bitmap, offsets = weight["bitmap"].copy(), weight["offsets"].copy()
    for _ in range(data.draw(st.integers(0, 3))):
        bitmap.reshape(-1)[data.draw(st.integers(0, bitmap.size - 1))] = data.draw(
            st.integers(0, 255)
        )
    for _ in range(data.draw(st.integers(0, 2))):
        at = data.draw(st.integers(0, len(offsets) - 1))
        offsets[at] = data.draw(
            st.integers(-(2**31), 2**31 - 1) | st.integers(0, int(offsets[-1]) + 1)
        )
    extra = data.draw(st.integers(0, 5))
    values = np.concatenate([weight["values"], np.ones(extra, weight["values"].dtype)])
    arrays = {"bitmap": guarded(bitmap), "offsets": guarded(offsets), "values": guarded(values)}
    for isa in isas():
        try:
            made = Kernel(**{**weight, **arrays}, isa=isa)
        except ValueError:
            continue
        for tokens in (1, 40):
            assert np.isfinite(made(np.ones((tokens, 100), np.float32))).all()
        made.close()


def test_files_of_one_instruction_set_define_nothing_that_others_could_use():
    """Of a function that several files define weakly, the linker keeps one, perhaps with
    instructions that the machine lacks."""
    for path in objects():
        listing = subprocess.run(
            ["nm", "--defined-only", str(path)], check=True, capture_output=True, text=True
        ).stdout
        kinds = [line.split()[-2] for line in listing.splitlines()]
        assert kinds
        assert not {"W", "V", "u"} & set(kinds), f"{path.name}:\n{listing}"
