"""The fp16 pass: what becomes half precision, what stays and why, and that the numbers hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import golden_cases
import half_types
import models
import numpy as np
import onnx_ir as ir
import pydantic
import pytest
import quantized
from golden_cases import Case
from half_cases import (
    TYPES,
    calibration,
    check_case,
    computing,
    convert,
    error,
    kept,
    naive,
    outputs,
    twice_cast,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_case import graph, only, ops
from rule_case import model as text_model

from optimizer.api import optimize
from optimizer.errors import OptionError
from optimizer.graph import constant
from optimizer.legalize import legalize
from optimizer.runners.ort import OrtRunner
from passes.fp16 import Fp16, Options

U = half_types.roundoff(half_types.FLOAT16)
SHIPPED = Path(__file__).parents[2] / "benchmarks" / "models" / "stories12l"

#: A norm over two axes, as an exporter spells it; ``canonicalize`` raises those over one.
NORM = (
    "m = ReduceMean(x, axes)  d = Sub(x, m)  p = Pow(d, two)  v = ReduceMean(p, axes)"
    "  e = Add(v, eps)  s = Sqrt(e)  n = Div(d, s)  y = MatMul(n, w)"
)
NORM_CONSTANTS = (
    "int64[2] axes = {-2, -1}, float two = {2}, float eps = {0.0001}, "
    "float[4,2] w = {0.5, -1, 2, 0.25, 1, -0.5, 0.125, 3}"
)


def norm(epsilon: str = "0.0001") -> ir.Model:
    constants = NORM_CONSTANTS.replace("0.0001", epsilon)
    return graph(NORM, inputs="float[B,2,4] x", output="float[B,2,2] y", constants=constants)


def activations(size: float) -> dict[str, np.ndarray]:
    """Numbers of both signs, the largest of magnitude ``size``."""
    x = np.array([[1, -1, 0.5, -0.5], [0.9, -0.9, 0.1, -0.1]], np.float32)
    return {"x": np.stack([x, -x]) * np.float32(size)}


# --- the range -----------------------------------------------------------------------------------


def test_the_square_of_500_overflows_and_its_norm_stays_in_float32():
    """What collapses vision transformers exported with their norms spelled out."""
    feed = activations(500)
    model = norm()
    expected = outputs(model, feed)["y"]
    everything = half_types.convert(norm(), half_types.FLOAT16)
    square = next(v for n in everything.graph for v in n.outputs if v.name == "p")
    ran = OrtRunner(everything, extra_outputs=[square]).run(
        half_types.narrowed(feed, half_types.FLOAT16)
    )
    assert np.isinf(ran["p"]).any()
    assert error(expected, ran["y"].astype(float)) > 0.9  # all that is divided by infinity is 0
    report = convert(model, feed)
    where = "on the calibration data; the limit is 16376, 0.25 of what fp16 holds"
    assert kept(report)["p"] == f"'p' reaches 2.5e+05 {where}"
    assert kept(report)["v"] == f"'v' reaches 1.294e+05 {where}"
    assert report.details["out_of_range"][0] == {"node": "p", "found": 250000.0, "limit": 16376.0}
    assert only(model, "MatMul").outputs[0].dtype == half_types.FLOAT16
    # One rounding of the normalized number and one of each weight, added up over four channels.
    assert error(expected, outputs(model, feed)["y"]) < 8 * U


def test_the_same_norm_of_small_numbers_becomes_half_precision():
    feed = activations(50)
    model = norm()
    expected = outputs(model, feed)["y"]
    report = convert(model, feed)
    assert not report.skipped
    assert computing(model, half_types.FLOAT) == set()
    assert error(expected, outputs(model, feed)["y"]) < 16 * U  # some eight roundings in a row


def test_the_margin_says_how_near_to_the_end_numbers_may_come():
    feed = activations(100)  # squares to 10,000, three fifths of a quarter of 65504
    for margin, stays in ((0.25, False), (0.1, True), (1.0, False)):
        report = convert(norm(), feed, margin=margin)
        assert ("p" in kept(report)) == stays, margin


def test_without_data_what_could_overflow_stays_and_the_report_says_so():
    model = norm()
    feed = activations(500)
    expected = outputs(model, feed)["y"]
    report = convert(model)
    assert kept(report)["p"] == "its result may exceed 65504, and there is no data to tell"
    assert kept(report)["s"] == "its input may be below 6.1e-05, and there is no data to tell"
    assert report.notes[0].startswith("no data was looked at")
    assert error(expected, outputs(model, feed)["y"]) < 8 * U


@pytest.mark.parametrize("squared", ["Mul(h, h)", "Pow(h, two)"])
def test_squares_of_unknown_numbers_stay(squared):
    model = graph(
        f"h = MatMul(x, w)  p = {squared}  y = MatMul(p, w)", inputs="float[B,2] x",
        output="float[B,2] y", constants="float[2,2] w = {1, 0, 0, 1}, float two = {2}",
    )  # fmt: skip
    assert kept(convert(model)) == {
        "p": "its result may exceed 65504, and there is no data to tell"
    }


def test_norms_compute_their_statistics_in_float32():
    model = graph(
        "y = LayerNormalization<stash_type = 16>(x, w)", inputs="float[B,2] x",
        output="float[B,2] y", constants="float[2] w = {1, 1}",
    )  # fmt: skip
    convert(model, io="half")
    assert only(model, "LayerNormalization").attributes["stash_type"].as_int() == 1


def test_sums_inside_of_a_product_are_looked_at():
    constants = "float[4,2] w = {300, 1, -300, 1, 300, 1, -300, 1}"
    feed = {"x": np.full((1, 4), 200, np.float32)}
    model = graph("y = MatMul(x, w)", inputs="float[B,4] x", output="float[B,2] y",
                  constants=constants)  # fmt: skip
    report = convert(model, feed)
    assert kept(report) == {"y": "sums inside can reach 2.4e+05, fp16 ends at 65504"}
    assert not report.modified


def test_scores_inside_of_an_attention_are_looked_at_before_they_are_scaled():
    nodes = "y = Attention<q_num_heads = 1, kv_num_heads = 1, scale = 0.001>(x, x, x)"
    feed = {"x": np.full((1, 2, 4), 200, np.float32)}
    report = convert(graph(nodes, inputs="float[1,2,4] x", output="float[1,2,4] y"), feed)
    assert kept(report) == {"y": "sums inside can reach 1.6e+05, fp16 ends at 65504"}


def test_numbers_too_small_to_be_precise_stay_in_float32():
    feed = activations(1e-6)
    report = convert(norm("1e-12"), feed)
    assert kept(report)["d"].startswith("'d' stays below")
    assert kept(report)["e"].startswith("constant 'eps' is 1e-12")


def test_what_is_divided_by_must_be_precise():
    """2e-5 has lost bits in half precision, which a sum does not mind, but a quotient does."""
    nodes = "h = MatMul(x, w)  a = Abs(h)  q = Div(h, a)  b = Add(h, a)  c = Add(q, b)"
    constants = "float[2,2] w = {1, 0, 0, 1}"
    for small, stays in ((2e-5, {"a", "q"}), (1e-3, set())):
        model = graph(f"{nodes}  y = MatMul(c, w)", inputs="float[B,2] x", output="float[B,2] y",
                      constants=constants)  # fmt: skip
        report = convert(model, {"x": np.array([[small, 1]], np.float32)})
        reason = f"'a' falls to {small:.3g} and is divided by or the like; fp16 is precise from"
        assert {s.site for s in report.skipped if s.reason.startswith(reason)} == stays


def test_integers_of_unknown_size_stay_in_float32_without_data():
    nodes = "f = Cast<to = 1>(i)  u = Unsqueeze(f, last)  h = Mul(x, u)  y = MatMul(h, w)"
    signature = {
        "inputs": "float[B,2] x, int64[B] i", "output": "float[B,2] y",
        "constants": "int64[1] last = {-1}, float[2,2] w = {1, 0, 0, 1}",
    }  # fmt: skip
    report = convert(graph(nodes, **signature))
    reason = "it reads integers, and there is no data to tell how large they are"
    assert kept(report)["h"] == reason
    feed = {"x": np.ones((1, 2), np.float32), "i": np.array([3])}
    model = graph(nodes, **signature)
    assert not convert(model, feed).skipped
    assert ops(model)["Cast"] == 3  # of the integers, to half precision at once
    assert convert(graph(nodes, **signature), {**feed, "i": np.array([70000])}).skipped


def test_what_the_model_widens_only_to_move_it_is_not_widened():
    model = graph(
        "h = MatMul(x, w)  f = Cast<to = 1>(h)  t = Transpose<perm = [1, 0]>(f)"
        "  k = Cast<to = 10>(t)  y = MatMul(k, w)",
        inputs="float16[2,2] x, float16[2,2] w", output="float16[2,2] y",
    )  # fmt: skip
    assert convert(model).modified
    assert ops(model) == {"MatMul": 2, "Transpose": 1}


def test_an_epsilon_that_would_vanish_keeps_its_node():
    """0 / (0 + 1e-12) is 0; in half precision it is 0 / 0."""
    model = norm("1e-12")
    feed = activations(0)
    expected = outputs(model, feed)["y"]
    assert np.isnan(naive(model, feed)["y"]).all()
    report = convert(model, feed)
    assert kept(report)["e"] == "constant 'eps' is 1e-12, fp16 is precise from 6.1e-05 on"
    assert np.array_equal(outputs(model, feed)["y"], expected)


def test_a_weight_beyond_the_range_keeps_its_product():
    constants = "float[2,2] w = {100000, 1, 2, 3}, float s = {0.0001}"
    model = graph("a = MatMul(x, w)  t = Mul(a, s)  y = MatMul(t, t)", inputs="float[2,2] x",
                  output="float[2,2] y", constants=constants)  # fmt: skip
    feed = {"x": np.array([[0, 2], [1, -1]], np.float32)}
    expected = outputs(model, feed)["y"]
    assert not np.isfinite(naive(model, feed)["y"]).all()
    report = convert(model, feed)
    assert kept(report)["a"] == "constant 'w' holds 1e+05, fp16 ends at 65504"
    assert only(model, "Mul").inputs[0].dtype == half_types.FLOAT
    assert error(expected, outputs(model, feed)["y"]) < 4 * U


# --- masks ---------------------------------------------------------------------------------------

MASKS = {
    "added": "z = Where(c, zero, low)  a = Add(s, z)  p = Softmax(a)",
    "chosen": "a = Where(c, s, low)  p = Softmax(a)",
    "twice": "z = Where(c, zero, low)  a = Add(s, z)  b = Add(a, z)  p = Softmax(b)",
}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("data", [True, False], ids=["data", "no data"])
@pytest.mark.parametrize("name", MASKS)
def test_masks_hide_what_they_hid_and_rows_without_keys_stay_finite(name, data, kind):
    rng = np.random.default_rng(3)
    model = graph(
        f"s = MatMul(x, w)  {MASKS[name]}  y = MatMul(p, x)",
        inputs="float[B,4,4] x, bool[B,4,4] c", output="float[B,4,4] y",
        constants="float zero = {0}, float low = {-3.4028235e38}, float[4,4] w = {"
        + ", ".join(f"{v:.3f}" for v in rng.normal(size=16)) + "}",
    )  # fmt: skip
    seen = rng.random((8, 4, 4)) < 0.5
    seen[:, 0] = False  # a row without keys
    feed = {"x": rng.normal(0, 8, (8, 4, 4)).astype(np.float32), "c": seen}
    expected = outputs(model, feed)["y"]
    assert np.isnan(naive(model, feed, kind)["y"]).any()
    convert(model, feed if data else None, kind)
    found = outputs(model, feed)["y"]
    assert np.isfinite(found).all()
    assert {"s", "a", "p"} <= computing(model, TYPES[kind]) | (
        {"p"} if kind == "bf16" else set()
    ), "a mask is no activation: its numbers keep nothing in float32"
    rows = seen.any(axis=-1)
    u = half_types.roundoff(TYPES[kind])
    # Scores up to 100 are rounded by up to 100 u, which the exponential turns into a share.
    assert error(expected[rows], found[rows]) < 100 * 4 * u
    weights = _weights(model, feed)
    assert (weights[rows][~seen[rows]] == 0).all()


def _weights(model: ir.Model, feed: dict[str, np.ndarray]) -> np.ndarray:
    softmax = only(model, "Softmax").outputs[0]
    return OrtRunner(model, extra_outputs=[softmax]).run(feed)[str(softmax.name)]


def test_a_very_low_number_that_gets_elsewhere_keeps_all_it_gets_to():
    model = graph(
        "z = Where(c, zero, low)  s = MatMul(x, w)  a = Add(s, z)  p = Softmax(a)"
        "  y = MatMul(p, x)  u = Identity(z)",
        inputs="float[B,2,2] x, bool[B,2,2] c", output="float[B,2,2] y, float[B,2,2] u",
        constants="float zero = {0}, float low = {-3.4028235e38}, float[2,2] w = {1, 2, -1, 1}",
    )  # fmt: skip
    feed = {"x": np.ones((1, 2, 2), np.float32), "c": np.array([[[True, False], [False, False]]])}
    expected = outputs(model, feed)
    seen_all = {**feed, "c": np.ones((1, 2, 2), bool)}
    for data in (None, seen_all):  # data that never shows the number proves nothing
        converted = model.clone()
        report = convert(converted, data)
        assert {"z", "u", "a"} <= kept(report).keys()
        found = outputs(converted, feed)
        assert np.array_equal(found["u"], expected["u"])
        assert error(expected["y"], found["y"]) < 4 * U


# --- types ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("io", ["keep", "cache", "half"])
@pytest.mark.parametrize("kind", TYPES)
def test_inputs_and_outputs_have_the_types_that_io_says(kind, io):
    config = models.Config(kv_cache=True, layers=1)
    model = models.build(config)
    feed = models.feed(config, past=3)
    expected = outputs(model, feed)
    names = [v.name for v in (*model.graph.inputs, *model.graph.outputs)]
    convert(model, kind=kind, io=io)
    assert [v.name for v in (*model.graph.inputs, *model.graph.outputs)] == names
    values = (*model.graph.inputs, *model.graph.outputs)
    narrow = {str(v.name) for v in values if v.dtype == TYPES[kind]}
    caches = {str(name) for name in names if "key" in str(name) or "value" in str(name)}
    assert narrow == {"keep": set(), "cache": caches, "half": {*caches, "logits"}}[io]
    found = outputs(model, feed)
    for name, array in expected.items():
        # Some twenty roundings of independent sign on the longest path: below 10 of them.
        assert error(array, found[name]) < 10 * half_types.roundoff(TYPES[kind]), name


def test_only_the_options_that_change_types_break_the_interface():
    assert Fp16(Options()).breaks == frozenset()
    assert Fp16(Options(io="half")).breaks == {"input types", "output types"}


def test_a_cache_out_of_range_stays_as_a_whole():
    config = models.Config(kv_cache=True, layers=2)
    model = models.build(config)
    weight = model.graph.initializers["layers.1.v.weight"]
    weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(3e4), name=weight.name)
    feed = models.feed(config, 1, 4, 0)
    report = convert(model, feed, io="cache")
    reason = kept(report)["past_key_values.0.key"]
    assert reason.startswith("the cache stays of one type, and 'present.1.value' reaches")
    assert all(v.dtype != half_types.FLOAT16 for v in (*model.graph.inputs, *model.graph.outputs))


def test_a_value_is_cast_once_for_all_who_read_it():
    model = graph(
        "a = MatMul(x, w)  b = MatMul(x, w)  d = Add(a, b)  y = MatMul(d, w)",
        inputs="float[B,2] x", output="float[B,2] y", constants="float[2,2] w = {1, 2, 3, 4}",
    )  # fmt: skip
    convert(model)
    assert ops(model)["Cast"] == 2
    assert not twice_cast(model)


def test_branches_read_the_types_of_before():
    model = text_model(
        "g (float[2,2] x, bool c) => (float[2,2] y) <float[2,2] w = {1, 2, 3, 4}> {"
        " h = MatMul(x, w)"
        " t = If<then_branch = a () => (float[2,2] p) { p = Add(h, h) },"
        " else_branch = b () => (float[2,2] q) { q = Neg(h) }>(c)"
        " y = MatMul(t, w) }"
    )
    feed = {"x": np.eye(2, dtype=np.float32), "c": np.array(True)}
    expected = outputs(model, feed)["y"]
    report = convert(model)
    assert kept(report)["t"] == "it holds a subgraph, whose values keep their types"
    assert np.array_equal(outputs(model, feed)["y"], expected)  # small integers
    assert computing(model, half_types.FLOAT16) == {"h", "y_float"}


def test_positions_and_tables_stay_in_float32():
    config = models.Config(layers=1)
    model = models.build(config)
    report = convert(model, models.feed(config))
    reason = "it computes with integers alone, such as positions and masks"
    wide = [n.op_type for n in model.graph if n.outputs[0].dtype == half_types.FLOAT]
    assert wide[:4] == ["Cast", "Unsqueeze", "Mul", "Cos"]
    assert list(kept(report).values()).count(reason) == 3
    cast = [node for node in model.graph if node.op_type == "Cast"]
    assert sum(n.inputs[0].name in ("cos", "sin") for n in cast) == 2


def test_weights_are_converted_when_they_are_written():
    model = models.build(layers=1)
    before = model.graph.initializers["lm_head.weight"].const_value.numpy()
    report = convert(model)
    weight = constant(model.graph.initializers["lm_head.weight"])
    assert isinstance(weight, ir.LazyTensor)
    assert weight.dtype == half_types.FLOAT16
    assert np.array_equal(weight.numpy(), before.astype(np.float16))
    assert report.details["constants"]["tensors"] > 8


def test_numbers_that_vanish_are_counted():
    model = graph("y = MatMul(x, w)", inputs="float[B,2] x", output="float[B,2] y",
                  constants="float[2,2] w = {1, 1e-8, 2e-6, -1e-9}")  # fmt: skip
    report = convert(model)
    expected = {"tensors": 1, "numbers": 4, "vanishing": 2, "shortened": 1}
    assert report.details["constants"] == expected
    assert "2 of 4 stored numbers became 0" in report.notes[1]
    assert json.loads(json.dumps(report.details)) == report.details


# --- models that are half precision already -------------------------------------------------------


def test_a_bfloat16_model_is_looked_at_as_well():
    feed = activations(500)
    model = half_types.convert(norm(), half_types.BFLOAT16)
    expected = outputs(model, feed)["y"]
    report = convert(model, half_types.narrowed(feed, half_types.BFLOAT16))
    assert kept(report)["p"].startswith("'p' reaches 2.499e+05")
    assert report.notes == ("what was bfloat16 and becomes float16 is rounded a second time",)
    assert (
        only(model, "Pow").outputs[0].dtype == half_types.BFLOAT16
    )  # it keeps the type that it had
    assert only(model, "MatMul").outputs[0].dtype == half_types.FLOAT16
    # Both round: the model before to 8 bits, in some eight steps in a row.
    assert error(expected, outputs(model, feed)["y"]) < 16 * half_types.roundoff(
        half_types.BFLOAT16
    )


def test_a_model_without_float32_has_nothing_to_say():
    model = graph("y = Add(x, x)", inputs="double[2] x", output="double[2] y")
    report = convert(model)
    assert not report.modified
    assert not report.notes
    assert kept(report) == {"model": "it has no values in float32"}


def test_a_float16_model_stays_as_it_is():
    model = half_types.convert(models.build(layers=1), half_types.FLOAT16)
    text = golden_cases.text(model)
    report = convert(model)
    assert not report.modified
    assert kept(report)["model"] == "it is FLOAT16 already"
    assert golden_cases.text(model) == text


# --- int8 ----------------------------------------------------------------------------------------


def int8_model() -> tuple[ir.Model, dict[str, np.ndarray]]:
    config = models.Config(layers=1)
    model = models.build(config)
    quantized.quantize(model, per_token=("down", "o.weight"))
    return model, models.feed(config)


@pytest.mark.parametrize("kind", TYPES)
def test_int8_products_take_and_give_half_precision_where_the_target_computes_in_it(kind):
    model, feed = int8_model()
    expected = outputs(model, feed)["logits"]
    convert(model, feed, kind)
    pairs = [n for n in model.graph if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert {n.inputs[1].dtype for n in pairs} == {TYPES[kind]}
    kinds = {n.outputs[0].dtype for n in pairs if n.op_type == "DequantizeLinear"}
    assert kinds == {TYPES[kind]}
    # A rounding may tip a code: 1 of 127 steps, in each of some layers.
    assert error(expected, outputs(model, feed)["logits"]) < 0.1


def test_int8_products_stay_as_they_are_where_the_target_has_its_own_form():
    model, feed = int8_model()
    products = ops(model)["DequantizeLinear"]
    report = convert(model, feed, target="ort-cpu")
    reason = "int8 products of target 'ort-cpu' take and give float32"
    assert list(kept(report).values()).count(reason) >= products
    legalize(model, "ort-cpu")
    assert ops(model)["MatMulIntegerToFloat"] == 8
    assert not ops(model)["DequantizeLinear"]


def test_both_sides_of_a_pair_use_one_number_where_only_one_is_converted():
    model = graph(
        "q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  v = DequantizeLinear(w8, ws)"
        "  p = MatMul(d, v)  y = MatMul(x, w)",
        inputs="float[B,2] x", output="float[B,2] y, float[B,2] p",
        constants="float s = {0.1}, int8 z = {0}, int8[2,2] w8 = {1, 2, 3, 4},"
        " float ws = {1e-6}, float[2,2] w = {1, 2, 3, 4}",
    )  # fmt: skip
    report = convert(model)
    assert kept(report)["v"] == "constant 'ws' is 1e-06, fp16 is precise from 6.1e-05 on"
    scales = {n.op_type: n.inputs[1] for n in model.graph if n.outputs[0].name in "qd"}
    numbers = {float(v.const_value.numpy()) for v in scales.values()}
    assert numbers == {float(np.float16(0.1))}


# --- options --------------------------------------------------------------------------------------

KEEP = [
    ("MatMul", {"MatMul"}),
    ("layers.1.mlp", {"MatMul", "Mul", "Sigmoid", "Add", "RMSNormalization"}),
    ("layers.*.attention", {"Attention", "MatMul", "RMSNormalization", "RotaryEmbedding", "Add"}),
    ("lm_head.weight", {"MatMul"}),
    ("attention.0", {"Attention"}),
]


@pytest.mark.parametrize(("pattern", "operators"), KEEP)
def test_what_the_user_names_stays(pattern, operators):
    model = models.build()
    report = convert(model, keep=pattern)
    reason = f"kept by option keep={pattern}"
    sites = {skip.site for skip in report.skipped if skip.reason == reason}
    assert {n.op_type for n in model.graph if n.name in sites} == operators
    assert not {n.op_type for n in model.graph if n.name in sites for v in n.outputs
                if v.dtype == half_types.FLOAT16}  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [("lm_haed.weight", "did you mean 'lm_head.weight'?"), ("zzz*", "expected names or patterns")],
)
def test_a_name_that_matches_nothing_is_refused(pattern, hint):
    with pytest.raises(OptionError, match=r"'keep'.*matches nothing") as caught:
        convert(models.build(layers=1), keep=[pattern])
    assert hint in str(caught.value)


@pytest.mark.parametrize("options", [{"margin": 0}, {"margin": 2}, {"io": "float"}, {"bits": 16}])
def test_rejects_bad_options(options: dict[str, Any]):
    with pytest.raises(pydantic.ValidationError):
        Options(**options)


# --- contracts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", golden_cases.cases("fp16"), ids=lambda case: case.name)
def test_golden_case(case: Case):
    model = case.model()
    report = convert(model, **case.options)
    assert report.modified
    assert golden_cases.text(model) == golden_cases.text(case.after)
    check_case(case, "fp16")
    assert not convert(model, **case.options).modified, "a second run must change nothing"


# --- whole models ---------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data(), kind=st.sampled_from(sorted(TYPES)))
def test_random_stacks_of_layers_stay_finite_typed_and_near(data: st.DataObject, kind: str):
    config = models.Config(
        layers=data.draw(st.integers(1, 3)),
        hidden=data.draw(st.sampled_from([8, 20])),
        heads=2,
        kv_heads=data.draw(st.sampled_from([1, 2])),
        head_dim=2 * data.draw(st.integers(1, 4)),
        ffn=data.draw(st.integers(1, 20)),
        norm=data.draw(st.sampled_from(["rms", "layer", "tanh"])),
        style=data.draw(st.sampled_from(["pre-norm", "parallel", "post-norm"])),
        activation=data.draw(st.sampled_from(["silu", "gelu", "relu", "quick-gelu"])),
        bias=data.draw(st.booleans()),
        gated=data.draw(st.booleans()),
        kv_cache=data.draw(st.booleans()),
        rotary=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 5)),
    )
    model = models.build(config)
    table = model.graph.initializers["embedding.weight"]
    scale = np.float32(data.draw(st.sampled_from([1e-3, 1, 1e2, 3e4])))
    table.const_value = ir.tensor(table.const_value.numpy() * scale, name=table.name)
    feed = models.feed(config, padded=True)
    expected = outputs(model, feed)
    measured = data.draw(st.booleans()) or scale > 1e3  # beyond, rules alone do not know
    report = convert(model, feed if measured else None, kind)
    found = outputs(model, feed)
    # Every converted node rounds its result, and what it reads may have been rounded: at worst
    # these add up. A norm of numbers near its epsilon magnifies them.
    bound = 2 * report.applied * half_types.roundoff(TYPES[kind])
    for name, array in expected.items():
        assert error(array, found[name]) <= bound, name
    assert not convert(model, feed if measured else None, kind).modified


def test_the_shipped_model_keeps_its_perplexity(tmp_path: Path):
    result = optimize(
        SHIPPED / "stories12l.onnx", ["fp16"], target="tensorrt-11", samples=6,
        output=tmp_path / "half.onnx",
        calibration=SHIPPED / "stories12l.calibration.npz",
        evaluation=SHIPPED / "stories12l.eval.npz",
    )  # fmt: skip
    drift = result.report.drift
    assert drift is not None
    # 12 layers of some 17 roundings each, of independent sign: sqrt(200) u = 14 u.
    assert drift.relative_l2 < 14 * U
    assert drift.perplexity_ratio == pytest.approx(1, abs=1e-3)
    size = sum(file.stat().st_size for file in result.files if file.suffix == ".data")
    assert size < 0.51 * (SHIPPED / "stories12l.data").stat().st_size


def test_overflow_that_a_run_shows_is_reported_by_the_drift():
    """ONNX Runtime computes float16 in float32; what is measured must not hide that."""
    feed = activations(500)
    model = norm()
    data = calibration(model, feed)
    broken = half_types.convert(norm(), half_types.FLOAT16)
    drift = data.drift(data.reference(model), broken)
    assert drift.relative_l2 > 0.9
