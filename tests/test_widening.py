"""Half-precision models in float32: what the runners show of them, and the stored form."""

from __future__ import annotations

import half_types
import models
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from rule_case import graph, ops

from optimizer import widening
from optimizer.runners.ort import OrtRunner
from optimizer.runners.reference import ReferenceRunner

CONFIG = models.Config(kv_cache=True)
BOTH = pytest.mark.parametrize("dtype", half_types.HALVES, ids=str)
RUNNERS = pytest.mark.parametrize("runner", [OrtRunner, ReferenceRunner])


def half(dtype: ir.DataType) -> ir.Model:
    return half_types.convert(models.build(CONFIG), dtype)


def feed(dtype: ir.DataType) -> dict[str, np.ndarray]:
    return half_types.narrowed(models.feed(CONFIG, past=3, padded=True), dtype)


def names(model: ir.Model) -> list[str]:
    return [str(v.name) for v in (*model.graph.inputs, *model.graph.outputs)]


@BOTH
def test_the_rounded_form_keeps_all_names_and_has_no_half_precision_between_nodes(dtype):
    model = half(dtype)
    text = ir.to_proto(model).SerializeToString()
    result = widening.rounded(model)
    onnx.checker.check_model(ir.to_proto(result.model), full_check=True)
    assert names(result.model) == names(model)
    known = {v.name: v for n in result.model.graph for v in n.outputs}
    for value in (v for n in model.graph for v in n.outputs if v.dtype == dtype):
        assert known[value.name].dtype == half_types.FLOAT
        assert result.types[value.name] == dtype
    assert ir.to_proto(model).SerializeToString() == text


def test_a_model_without_half_precision_is_its_own_rounded_form():
    model = models.build(CONFIG)
    assert widening.rounded(model).model is model


@BOTH
@RUNNERS
def test_runners_take_and_return_half_precision_and_round_every_value(runner, dtype):
    model = half(dtype)
    inner = [v for n in model.graph for v in n.outputs if v.dtype == dtype][:6]
    result = runner(model, extra_outputs=inner).run(feed(dtype))
    for value in (*inner, *model.graph.outputs):
        assert result[value.name].dtype == dtype.numpy(), value.name
    exact = ReferenceRunner(model, double=True).run(feed(dtype))["logits"]
    found = result["logits"].astype(np.float64)
    error = np.abs(found - exact).max() / np.abs(exact).max()
    # Some 20 roundings of independent sign lie on the longest path: sqrt(20) < 5, twice that.
    assert half_types.roundoff(dtype) / 4 < error < 10 * half_types.roundoff(dtype)


@RUNNERS
def test_an_overflow_between_two_nodes_is_seen(runner):
    """ONNX Runtime alone keeps such a value in float32, where nothing overflows."""
    model = graph(
        "a = Mul(x, x)  y = Mul(a, s)", inputs="float16[4] x, float16 s", output="float16[4] y"
    )
    arrays = {"x": np.full(4, 500, np.float16), "s": np.array(1e-3, np.float16)}
    assert np.isinf(runner(model).run(arrays)["y"]).all()
    assert np.isfinite(OrtRunner(model, rounding=False).run(arrays)["y"]).all()


@pytest.mark.parametrize("optimize", [True, False])
@BOTH
def test_onnx_runtime_leaves_the_roundings_in_place(dtype, optimize):
    name = str(dtype).lower()
    model = graph(
        "a = Add(x, w)  b = Sub(a, w)  y = Mul(b, b)",
        inputs=f"{name}[4] x, {name} w", output=f"{name}[4] y",
    )  # fmt: skip
    x, w = np.array([1, 3, 5, 9], dtype.numpy()), np.array(1 / half_types.roundoff(dtype))
    found = OrtRunner(model, optimize=optimize).run({"x": x, "w": w.astype(dtype.numpy())})["y"]
    # x + 1/u is rounded to an even number: 1 and 5 fall, 3 rises, 9 falls.
    assert found.astype(np.float32).tolist() == [0, 16, 16, 64]


@BOTH
def test_the_stored_form_computes_in_float32_behind_the_same_interface(dtype):
    model = half(dtype)
    stored = model.clone()
    assert widening.store(stored, {dtype})
    assert widening.write_stored(stored)
    onnx.checker.check_model(ir.to_proto(stored), full_check=True)
    text = ir.to_proto(stored).SerializeToString()
    assert not widening.store(stored, {dtype}), "a second run must change nothing"
    assert ir.to_proto(stored).SerializeToString() == text
    assert names(stored) == names(model)
    assert [v.dtype for v in stored.graph.outputs] == [v.dtype for v in model.graph.outputs]
    assert [v.dtype for v in stored.graph.inputs] == [v.dtype for v in model.graph.inputs]
    kept = {v.name for v in stored.graph.initializers.values() if v.dtype == dtype}
    assert {"layers.0.q.weight", "embedding.weight", "lm_head.weight"} <= kept
    inner = {n.op_type for n in stored.graph for v in n.outputs if v.dtype == dtype}
    assert inner == {"Cast"}, "only the casts of outputs"
    exact = ReferenceRunner(model, double=True).run(feed(dtype))["logits"]
    found = OrtRunner(stored, rounding=dtype == half_types.BFLOAT16).run(feed(dtype))["logits"]
    # Float32 but for the last rounding of the logits.
    bound = 1.01 * half_types.roundoff(dtype) * np.abs(exact).max()
    assert np.abs(found.astype(np.float64) - exact).max() <= bound


def test_a_value_that_is_an_output_and_read_inside_is_cast_for_the_output_alone():
    model = graph("a = Mul(x, x)  y = Add(a, a)", inputs="bfloat16[2] x", output="bfloat16[2] y")
    model.graph.outputs.append(next(iter(model.graph)).outputs[0])
    assert widening.store(model, widening.HALF_TYPES)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert ops(model) == {"Cast": 3, "Mul": 1, "Add": 1}
    assert [v.name for v in model.graph.outputs] == ["y", "a"]


def test_casts_to_half_precision_round_in_one_form_and_vanish_in_the_other():
    def build() -> ir.Model:
        nodes = "h = Cast<to = 10>(x)  w = Cast<to = 1>(h)  y = Mul(w, w)"
        return graph(nodes, inputs="float[2] x", output="float[2] y")

    array = np.array([2049, 1e-9], np.float32)
    assert OrtRunner(build()).run({"x": array})["y"].tolist() == [2048.0**2, 0]
    model = build()
    widening.store(model, widening.HALF_TYPES)
    assert ops(model) == {"Mul": 1}


def test_half_precision_in_the_body_of_a_branch_keeps_the_model_as_it_is():
    model = graph(
        "y = If<then_branch = a () => (float16[2] t) { t = Identity(x) },"
        " else_branch = b () => (float16[2] e) { e = Neg(x) }>(c)",
        inputs="float16[2] x, bool c", output="float16[2] y",
    )  # fmt: skip
    assert widening.rounded(model).model is model
    assert not widening.store(model, widening.HALF_TYPES)


def test_types_named_by_attributes_follow():
    model = graph(
        "s = Shape(x)  z = ConstantOfShape<value = float16[1] {15360}>(s)  y = Add(x, z)",
        inputs="float16[2] x", output="float16[2] y",
    )  # fmt: skip
    found = OrtRunner(model).run({"x": np.array([1, 2], np.float16)})["y"]
    assert found.tolist() == [2, 3]


def test_half_precision_in_a_sequence_keeps_the_model_as_it_is():
    model = graph(
        "q = SplitToSequence<axis = 1, keepdims = 0>(x)  y = SequenceAt(q, first)",
        inputs="float16[B,3,4] x", output="float16[B,4] y", constants="int64 first = {0}",
    )  # fmt: skip
    assert widening.rounded(model).model is model
    assert widening.store(model, {ir.DataType.FLOAT16}) == 0
    array = np.arange(24, dtype=np.float16).reshape(2, 3, 4)
    np.testing.assert_array_equal(OrtRunner(model).run({"x": array})["y"], array[:, 0])
