"""The outliertune pass is exact around the rounding, equals its sources, and errs as expected."""

from __future__ import annotations

from typing import Any

import models
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from outlier_cases import (
    CONFIGS,
    LITERATURE,
    PER_TOKEN,
    STATIC,
    apply,
    calibration,
    constants,
    observed,
    ops,
    samples,
    small,
)
from processor import Int8Runner

from optimizer import graph as graphs
from optimizer.legalize import legalize
from optimizer.runners.ort import OrtRunner

# --- exact around the rounding -------------------------------------------------------------------

ROUTES = [
    {"alpha": 1.0, "shift": True},
    {"alpha": 0.5, "shift": False, **PER_TOKEN},
    {"alpha": 0.7, "shift": True, **STATIC},
    {},
]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("options", ROUTES, ids=str)
def test_without_rounding_the_function_stays_the_same(name: str, options: dict[str, Any]) -> None:
    config = models.Config(**CONFIGS[name])
    before, after = models.build(config), models.build(config)
    apply(after, calibration(after, config), rounding=False, **options)
    feed = models.feed(config)
    expected, found = (OrtRunner(m).run(feed)["logits"] for m in (before, after))
    # Scaling a float32 number costs half a unit in the last place; sums of 32 terms stay below.
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_symmetrization_centres_every_channel(norm: str) -> None:
    model, data = small(norm)
    apply(model, samples(model, data), rounding=False, alpha="off", shift=True)
    (y, _) = observed(model, data, "MatMul")
    assert np.abs(y.max(axis=0) + y.min(axis=0)).max() < 1e-5 * np.abs(y).max()


@pytest.mark.parametrize("bits", [8, 6])
def test_every_channel_spans_all_codes(bits: int) -> None:
    model, data = small()
    options = {"alpha": 1.0, "shift": True, "bits": bits, **LITERATURE}
    apply(model, samples(model, data), **options)
    (y,) = observed(model, data, "QuantizeLinear")
    top = 2 ** (bits - 1) - 1
    np.testing.assert_allclose(np.abs(y).max(axis=0), top, rtol=1e-5)
    codes = observed(model, data, "DequantizeLinear")[0]
    assert np.abs(codes.astype(int)).max() == top
    assert all(
        np.abs(w.astype(int)).max() == top for w in constants(model, "_int8").values() if w.ndim
    )


def test_an_input_that_is_symmetric_already_is_not_shifted() -> None:
    model, data = small("rms")
    symmetric = {"x": np.concatenate([data["x"], -data["x"]])}
    apply(model, samples(model, symmetric), alpha="off", shift=True)
    assert "Add" not in ops(model)


def test_a_layer_without_bias_gets_one_for_the_shift() -> None:
    model, data = small()
    apply(model, samples(model, data), rounding=False, alpha=1.0, shift=True)
    assert ops(model).count("Add") == 2
    assert len(constants(model, "bias")) == 2


def test_silent_channels_do_not_saturate_at_their_first_number() -> None:
    model, data = small()
    gamma = np.array(graphs.const(model.graph.initializers["gamma"]))
    gamma[2] = 0
    model.graph.initializers["gamma"].const_value = ir.tensor(gamma)
    model.graph.initializers["beta"].const_value = ir.tensor(np.zeros(6, np.float32))
    report = apply(model, samples(model, data), alpha=1.0)
    low, high = report.details["sites"][0]["scale"]
    assert low >= 0.9e-3 * high


# --- the same pass is SmoothQuant and Outlier Suppression+ ---------------------------------------


def test_outliertune_is_a_shift_then_smoothquant_1_then_one_static_scale() -> None:
    one, data = small()
    three, _ = small()
    apply(one, samples(one, data), alpha=1.0, shift=True, **LITERATURE)
    base = {**LITERATURE, **STATIC}
    apply(three, samples(three, data), rounding=False, alpha="off", shift=True, **base)
    apply(three, samples(three, data), rounding=False, alpha=1.0, shift=False, **base)
    apply(three, samples(three, data), alpha="off", shift=False, **base)
    codes = [observed(m, data, "DequantizeLinear")[0] for m in (one, three)]
    np.testing.assert_array_equal(*codes)
    weights = [constants(m, "_int8") for m in (one, three)]
    for a, b in zip(*(w.values() for w in weights), strict=True):
        np.testing.assert_array_equal(a, b)
    outputs = [Int8Runner(m).run(data)["y0"] for m in (one, three)]
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-5 * np.abs(outputs[0]).max())


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8])
def test_scales_are_those_of_smoothquant(alpha: float) -> None:
    model, data = small("rms")
    gamma = np.array(graphs.const(model.graph.initializers["gamma"]), np.float64)
    (h, _) = observed(model, data, "MatMul")
    w = np.concatenate([graphs.const(model.graph.initializers[f"w{i}"]) for i in range(2)], axis=1)
    wanted = np.abs(h).max(axis=0) ** alpha / np.abs(w).max(axis=1) ** (1 - alpha)
    apply(model, samples(model, data), alpha=alpha, shift=False, **LITERATURE)
    found = gamma / next(iter(constants(model, "gamma").values()))
    np.testing.assert_allclose(found / found[0], wanted / wanted[0], rtol=1e-5)


# --- the integers ---------------------------------------------------------------------------------


def test_int8_products_equal_integer_arithmetic_bit_by_bit() -> None:
    model, data = small("rms")
    apply(model, samples(model, data), alpha=1.0, shift=False)
    weights, scales = constants(model, "w0_int8"), constants(model, "w0_scale")
    (y,) = observed(model, data, "QuantizeLinear")
    assert legalize(model, "ort-cpu").modified
    found = Int8Runner(model).run(data)["y0"]
    codes = np.clip(np.rint(y), -128, 127).astype(np.int32)  # the scale is 1
    total = codes @ weights["w0_int8"].astype(np.int32)
    np.testing.assert_array_equal(found, total.astype(np.float32) * scales["w0_scale"])


def test_codes_of_fewer_bits_stay_within_them_on_unseen_data() -> None:
    model, data = small()
    apply(model, samples(model, data), bits=5)
    codes = observed(model, {"x": data["x"] * 3 - 7}, "DequantizeLinear")[0]
    assert np.abs(codes.astype(int)).max() <= 15


@pytest.mark.parametrize("name", ["llama", "opt", "bert", "cached"])
def test_every_site_is_lowered_for_the_cpu(name: str) -> None:
    config = models.Config(**CONFIGS[name])
    model = models.build(config)
    report = apply(model, calibration(model, config))
    assert report.applied == 4 * config.layers
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    lowered = legalize(model, "ort-cpu")
    assert not lowered.skipped
    assert ops(model).count("QuantizeLinear") == report.applied
    layers = 7 if config.gated else 6
    assert ops(model).count("MatMulIntegerToFloat") == layers * config.layers


# --- how large the error is ----------------------------------------------------------------------


@given(
    norm=st.sampled_from(["layer", "rms"]),
    width=st.integers(2, 12),
    outputs=st.integers(1, 9),
    seed=st.integers(0, 1000),
    alpha=st.sampled_from(["auto", "off", 0.0, 0.5, 1.0]),
    shift=st.sampled_from(["auto", True, False]),
    after_norm=st.sampled_from(["static", "per-token"]),
    bits=st.integers(4, 8),
)
def test_error_is_what_the_search_expects(seed: int, **choices: Any) -> None:
    sizes = {name: choices.pop(name) for name in ("norm", "width", "outputs")}
    model, data = small(**sizes, seed=seed)
    before = Int8Runner(model).run(data)
    report = apply(model, samples(model, data), **choices, compensate=False)
    after = Int8Runner(model).run(data)
    lost = sum(float(np.square(after[n] - before[n], dtype=np.float64).sum()) for n in before)
    total = sum(float(np.square(before[n], dtype=np.float64).sum()) for n in before)
    # Rounding errors are at most half a step, three times the variance that is expected of them,
    # and those of weights and activations may add up: 6 times; margins make them smaller.
    expected = report.details["sites"][0]["expected_error"]
    assert lost / total <= 6 * expected + 1e-9


@pytest.mark.parametrize("name", ["llama", "opt", "bert"])
def test_error_on_unseen_data_is_below_that_of_the_literature(name: str) -> None:
    config = models.Config(**CONFIGS[name], hidden=64, head_dim=16, ffn=160)
    feed = models.feed(config, 8, 32, seed=5)
    expected = OrtRunner(models.build(config)).run(feed)["logits"]
    error = {}
    for label, options in {
        "ours": {},
        "per-tensor": {"alpha": "off", "shift": False, **STATIC, **LITERATURE},
        "published": {"alpha": 1.0, "shift": True, **LITERATURE},
    }.items():
        model = models.build(config)
        apply(model, calibration(model, config, batch=16, sequence=32), **options)
        found = Int8Runner(model).run(feed)["logits"]
        error[label] = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error["ours"] < min(error["per-tensor"], error["published"])
