"""Statistics, scales and rounding of int8 linear layers, each against its formula."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from optimizer.linear_layers import is_head
from optimizer.quantization.scales import TOKEN_FLOOR, Policy, Scheme, choose, token_floor
from optimizer.quantization.sites import MAX_CHANNELS, Kind, Site, lower_bound
from optimizer.quantization.statistics import MAX_ROWS, InputStatistics
from optimizer.quantization.weights import (
    Compensation,
    column_scale,
    round_nearest,
    shrinkage,
    signal_to_noise,
    top_code,
)
from optimizer.runners.ort import OrtRunner

FLOATS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
    elements=st.floats(-1e4, 1e4, width=32),
)


def value(name: str = "x") -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT))


def seen(*batches: np.ndarray) -> InputStatistics:
    stats = InputStatistics(value())
    for batch in batches:
        stats.update((batch,), None)
    return stats


def site(kind: Kind = Kind.NORM, lower: float | None = None) -> Site:
    return Site("x", kind, value(), (), lower=lower)


def correlated(rows: int, width: int, seed: int = 0) -> np.ndarray:
    """Rows with a strong common factor and a channel 20 times the others."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(9).normal(size=(3, width))
    x = rng.normal(size=(rows, 3)) @ mixing + 0.2 * rng.normal(size=(rows, width))
    x[:, 1] *= 20
    return x.astype(np.float32)


# --- weights --------------------------------------------------------------------------------------


@given(weight=FLOATS, bits=st.integers(2, 8))
def test_nearest_rounding_is_off_by_at_most_half_a_step(weight: np.ndarray, bits: int) -> None:
    rounded = round_nearest(weight, bits)
    assert np.abs(rounded.codes.astype(int)).max(initial=0) <= top_code(bits)
    # Half a step, and the float32 error of the division by the scale and the product with it.
    slack = 0.5 * rounded.scale + 4e-7 * np.abs(weight).max(axis=0, initial=0)
    assert (np.abs(weight - rounded.dequantized()) <= slack).all()


@given(weight=FLOATS)
def test_scales_are_positive_and_reach_the_top_code(weight: np.ndarray) -> None:
    scale = column_scale(weight, 8)
    assert (scale > 0).all()
    codes = round_nearest(weight, 8).codes.astype(int)
    used = np.abs(weight).max(axis=0) > 1e-30
    assert (np.abs(codes).max(axis=0)[used] == 127).all()


@pytest.mark.parametrize("width", [5, 200])
def test_compensated_rounding_halves_the_error_of_correlated_inputs(width: int) -> None:
    rows, unseen = correlated(2000, width), correlated(500, width, seed=1)
    weight = np.random.default_rng(2).normal(size=(width, 20)).astype(np.float32)
    plain, better = round_nearest(weight, 4), Compensation(rows).round(weight, 4)
    assert np.abs(better.codes.astype(int)).max() <= 7
    errors = [np.linalg.norm(unseen @ (weight - q.dequantized())) for q in (plain, better)]
    assert errors[1] < 0.5 * errors[0]


def test_uncorrelated_inputs_give_the_nearest_codes() -> None:
    width = 64
    rows = np.eye(width, dtype=np.float32)
    weight = np.random.default_rng(2).normal(size=(width, 8)).astype(np.float32)
    np.testing.assert_array_equal(
        Compensation(rows).round(weight, 8).codes, round_nearest(weight, 8).codes
    )


def test_silent_inputs_give_the_nearest_codes() -> None:
    weight = np.random.default_rng(2).normal(size=(4, 8)).astype(np.float32)
    rounded = Compensation(np.zeros((10, 4), np.float32)).round(weight, 8)
    np.testing.assert_array_equal(rounded.codes, round_nearest(weight, 8).codes)


def test_compensation_matches_the_textbook_recursion() -> None:
    """GPTQ's algorithm by removing one channel after the other from H^-1, without Cholesky."""
    rows = correlated(400, 7).astype(np.float64)
    weight = np.random.default_rng(3).normal(size=(7, 6))
    moments = rows.T @ rows / len(rows)
    diagonal = np.diag(moments).copy()
    moments *= 1 - shrinkage(rows, moments)
    np.fill_diagonal(moments, diagonal + 0.01 * diagonal.mean())
    inverse, left = np.linalg.inv(moments), weight.copy()
    scale, codes = column_scale(weight, 5), np.zeros(weight.shape, int)
    for k in np.argsort(-np.einsum("rk,rk->k", rows, rows), kind="stable"):
        codes[k] = np.clip(np.rint(left[k] / scale), -15, 15)
        error = (left[k] - codes[k] * scale) / inverse[k, k]
        left -= np.outer(inverse[:, k], error)
        inverse -= np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    np.testing.assert_array_equal(Compensation(rows).round(weight, 5).codes, codes)


def test_shrinkage_tells_chance_from_correlation() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(60, 30))
    assert shrinkage(noise, noise.T @ noise / 60) == 1
    related = correlated(5000, 30).astype(np.float64)
    assert shrinkage(related, related.T @ related / 5000) < 0.05


def test_signal_to_noise_of_eight_bits_is_about_six_decibels_a_bit() -> None:
    weight = np.random.default_rng(0).uniform(-1, 1, (500, 4)).astype(np.float32)
    ratios = [signal_to_noise(weight, round_nearest(weight, bits)) for bits in (6, 8)]
    assert ratios[1] - ratios[0] == pytest.approx(20 * np.log10(127 / 31), abs=0.5)
    exact = np.full((3, 2), 127, np.float32)
    assert signal_to_noise(exact, round_nearest(exact, 8)) == float("inf")


# --- statistics ----------------------------------------------------------------------------------


def test_statistics_are_those_of_all_tokens_whatever_the_batches() -> None:
    x = np.random.default_rng(0).normal(size=(50, 8, 5)).astype(np.float32)
    for size in (1, 7, 50):
        stats = seen(*(x[i : i + size] for i in range(0, 50, size)))
        rows = x.reshape(-1, 5)
        np.testing.assert_array_equal(stats.minimum, rows.min(axis=0))
        np.testing.assert_array_equal(stats.maximum, rows.max(axis=0))
        np.testing.assert_allclose(stats.mean, rows.mean(axis=0, dtype=np.float64), rtol=1e-6)
        assert stats.tokens == 400


def test_memory_is_bounded_and_rows_cover_everything_seen() -> None:
    stats = InputStatistics(value())
    for batch in range(300):
        stats.update((np.full((64, 3), batch, np.float32),), None)
    rows = stats.rows[:, 0]
    assert MAX_ROWS / 4 <= len(rows) <= MAX_ROWS
    counts = np.histogram(rows, bins=10, range=(0, 300))[0]
    assert counts.min() > 0.5 * counts.max()
    wide = seen(np.zeros((300, 1 << 16), np.float32))
    assert wide.rows.size <= 1 << 20


def test_padding_is_left_out() -> None:
    x = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    valid = np.array([[1, 1, 0, 0], [1, 1, 1, 0]], bool)
    stats = InputStatistics(value())
    stats.update((np.where(valid[..., None], x, 1e9).astype(np.float32),), valid)
    assert stats.tokens == 5
    np.testing.assert_array_equal(stats.maximum, x[valid].max(axis=0))
    stats.update((x,), np.zeros_like(valid))
    assert stats.tokens == 5


def test_halves_split_every_batch() -> None:
    stats = seen(*(np.full((4, 2), i, np.float32) for i in range(3)))
    assert [half.tokens for half in stats.halves] == [6, 6]
    one_by_one = seen(*(np.ones((1, 2), np.float32) for _ in range(8)))
    assert [half.tokens for half in one_by_one.halves] == [4, 4]


# --- scales --------------------------------------------------------------------------------------

WEIGHT = np.random.default_rng(1).normal(size=(6, 5)).astype(np.float32)


def test_ranges_grow_where_held_out_tokens_leave_them() -> None:
    rng = np.random.default_rng(0)
    few, many = rng.normal(size=(24, 6)), rng.uniform(-1, 1, size=(4000, 6))
    policy = Policy(alpha=1.0, shift=False)
    margins = [
        choose(site(), seen(x.astype(np.float32)), [WEIGHT], policy).margin for x in (few, many)
    ]
    assert margins[0] > margins[1] == 1.0


def test_a_shift_is_taken_where_it_lowers_the_error() -> None:
    x = np.abs(np.random.default_rng(0).normal(size=(500, 6))).astype(np.float32)
    assert choose(site(), seen(x), [WEIGHT], Policy()).shift is not None
    assert choose(site(), seen(x), [WEIGHT], Policy(shift=False)).shift is None
    assert choose(site(Kind.OTHER), seen(x), [WEIGHT], Policy()).shift is None
    both = np.concatenate([x, -x])
    assert choose(site(), seen(both), [WEIGHT], Policy(shift=True)).shift is None


def test_automatic_alpha_is_no_worse_than_any_other() -> None:
    x = correlated(600, 6)
    best = choose(site(), seen(x), [WEIGHT], Policy())
    for alpha in (0.0, 0.3, 0.5, 0.8, 1.0, "off"):
        other = choose(site(), seen(x), [WEIGHT], Policy(alpha=alpha))
        assert best.error <= other.error
    assert best.alpha is not None


@pytest.mark.parametrize("lower", [0.0, -0.17, -0.28])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_bounded_tokens_use_all_codes_and_never_leave_them(lower: float, bits: int) -> None:
    q = top_code(bits)
    rng = np.random.default_rng(0)
    x = np.maximum(rng.normal(size=(400, 6)) * 2, lower).astype(np.float32)
    found = choose(
        site(Kind.MLP, lower), seen(x), [WEIGHT], Policy(bits=bits, static=False, alpha="off")
    )
    assert found.scheme is Scheme.TOKEN_LOW
    extremes = np.array([[lower, 0.0], [lower, found.floor], [lower, 3.0], [0.1, 50.0]])
    gain = np.maximum(extremes.max(axis=1, keepdims=True), found.floor)
    codes = np.rint((extremes / gain - found.offset * found.step) / found.step)
    assert np.abs(codes).max() <= q
    assert codes[2:, 1].tolist() == [q, q]
    assert found.offset >= 0


def test_tokens_that_lean_to_one_side_are_scaled_from_both_ends() -> None:
    x = np.random.default_rng(0).normal(size=(400, 6)).astype(np.float32)
    policy = Policy(static=False, alpha="off")
    assert choose(site(Kind.MLP), seen(x + 4), [WEIGHT], policy).scheme is Scheme.TOKEN_RANGE
    assert choose(site(Kind.OTHER), seen(x + 4), [WEIGHT], policy).scheme is Scheme.TOKEN
    symmetric = Policy(static=False, alpha="off", asymmetric=False)
    assert choose(site(Kind.MLP), seen(x + 4), [WEIGHT], symmetric).scheme is Scheme.TOKEN


@pytest.mark.parametrize("static", [True, False])
def test_an_input_of_zeros_gives_finite_scales(*, static: bool) -> None:
    found = choose(site(), seen(np.zeros((8, 6), np.float32)), [WEIGHT], Policy(static=static))
    assert 0 < found.step < np.inf
    assert found.scale is None or (np.isfinite(found.scale).all() and (found.scale > 0).all())


# --- sites ---------------------------------------------------------------------------------------


def test_the_largest_inner_size_cannot_overflow_int32() -> None:
    assert MAX_CHANNELS * 127 * 127 < 2**31 <= (MAX_CHANNELS + 1) * 127 * 127


def chain(*steps: tuple[str, dict[str, object]]) -> ir.Model:
    """x through unary operators; ``Gate f`` is the product of x and sigmoid(f x)."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n"]))
    nodes, current = [], x
    for op, attributes in steps:
        if op == "Gate":
            factor = ir.node("Constant", [], {"value_float": float(attributes["factor"])})
            scaled = ir.node("Mul", [current, factor.outputs[0]])
            inner = current if attributes["factor"] == 1 else scaled.outputs[0]
            gate = ir.node("Sigmoid", [inner])
            nodes += [factor, scaled, gate] if inner is not current else [gate]
            node = ir.node("Mul", [gate.outputs[0], current])
        else:
            node = ir.node(op, [current], attributes)
        nodes.append(node)
        current = node.outputs[0]
    current.type, current.name = ir.TensorType(ir.DataType.FLOAT), "y"
    graph = ir.Graph([x], [current], nodes=nodes, opset_imports={"": 23})
    return ir.Model(graph, ir_version=10)


BOUNDS = {
    "relu": ("Relu", {}),
    "gelu": ("Gelu", {"approximate": "none"}),
    "gelu-tanh": ("Gelu", {"approximate": "tanh"}),
    "silu": ("Gate", {"factor": 1}),
    "quick-gelu": ("Gate", {"factor": 1.702}),
    "exp": ("Exp", {}),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_proven_bounds_hold_and_are_tight(name: str) -> None:
    model = chain(BOUNDS[name])
    found = lower_bound(model.graph.outputs[0])
    assert found is not None
    x = np.linspace(-20, 5, 200_001, dtype=np.float32)
    lowest = float(OrtRunner(model).run({"x": x})["y"].min())
    assert found <= lowest + 1e-7  # float32 at 0.3 is exact to 3e-8
    assert lowest - found < 1e-5


@pytest.mark.parametrize("step", [("Tanh", {}), ("Neg", {}), ("Gelu", {})])
def test_no_bound_without_proof(step: tuple[str, dict[str, object]]) -> None:
    model = chain(("Relu", {}), step) if step[0] == "Neg" else chain(step)
    assert (lower_bound(model.graph.outputs[0]) is None) == (step[0] != "Gelu")


def test_an_output_is_reached_through_shaping_and_pointwise_steps_only() -> None:
    assert is_head(chain(("Tanh", {}), ("Softmax", {})).graph.inputs[0])
    assert not is_head(chain(("Tanh", {}), ("Gelu", {})).graph.inputs[0])


def test_a_key_that_is_also_returned_is_no_head() -> None:
    model = chain(("Tanh", {}), ("Gelu", {}))
    key = next(iter(model.graph)).outputs[0]
    key.name = "present.0.key"
    model.graph.outputs.append(key)
    assert not is_head(model.graph.inputs[0])


@given(st.floats(1e-3, 1e6))
def test_the_least_range_of_a_token_is_one_number_for_many_layers(top: float) -> None:
    """Compilers write it into their kernels; layers of different ones would not share any."""
    floor = token_floor(top)
    assert TOKEN_FLOOR * top / 16 < floor <= TOKEN_FLOOR * top
    assert np.log2(floor) % 4 == 0
    assert np.float32(floor) == floor
