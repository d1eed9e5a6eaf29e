from __future__ import annotations

from collections import Counter

import models
import numpy as np
import onnx_ir as ir
import pytest
import quantized
import rule_case
from processor import TOP, Int8Runner

from optimizer import graph as graphs
from optimizer.legalize import legalize
from optimizer.pass_base import Context
from optimizer.raising import ort_cpu as raising
from optimizer.runners.ort import OrtRunner
from optimizer.runners.reference import ReferenceRunner
from passes.canonicalize import Canonicalize

CASES = {
    "llama": {},
    "bert": {"style": "post-norm", "norm": "layer", "gated": False, "activation": "gelu",
             "bias": True, "rotary": False},
    "cache": {"kv_cache": True},
}  # fmt: skip


def _quantized(case: str, **options) -> tuple[ir.Model, models.Config]:
    config = models.Config(**CASES[case])
    model = models.build(config)
    quantized.quantize(model, **options)
    return model, config


def _ops(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def _logits(model: ir.Model, config: models.Config) -> np.ndarray:
    return Int8Runner(model).run(models.feed(config, past=3 if config.kv_cache else 0))["logits"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("per_token", [(), ("down", "o.")])
def test_lowering_changes_no_code_so_outputs_agree_to_rounding(case, per_token):
    model, config = _quantized(case, per_token=per_token)
    before = _logits(model, config)
    legalize(model, "ort-cpu")
    after = _logits(model, config)
    # Codes are equal; what remains is the order of two float multiplications and one addition,
    # but a neighbouring code may be chosen further on where a number lies on the boundary.
    assert np.linalg.norm(after - before) <= 1e-2 * np.linalg.norm(before)
    assert np.quantile(np.abs(after - before), 0.5) <= 1e-5 * np.abs(before).max()


def test_one_product_is_bit_equal_to_integer_arithmetic():
    rng = np.random.default_rng(0)
    x = rng.normal(0, 3, (4, 16)).astype(np.float32)  # half of it saturates
    w = rng.integers(-TOP, TOP + 1, (16, 8)).astype(np.int8)
    s, ws = np.float32(0.0173), rng.uniform(0.01, 0.02, 8).astype(np.float32)
    model = _product(s, w, ws)
    legalize(model, "ort-cpu")
    got = OrtRunner(model).run({"x": x})["y"]
    codes = np.clip(np.rint(x / s), -128, 127).astype(np.int32)
    assert (codes == -128).any()
    assert (codes == 127).any()
    np.testing.assert_array_equal(got, (codes @ w.astype(np.int32)).astype(np.float32) * (s * ws))


def _product(s: np.ndarray, w: np.ndarray, ws: np.ndarray, **more) -> ir.Model:
    """x -> [shift] -> Q -> DQ -> MatMul(DQ(w)) -> y."""
    axis, zero = more.get("axis", 1), more.get("zero", np.int8(0))
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", len(w)]))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 23}, name="g")
    scale = graphs.add_initializer(graph, "s", np.asarray(s))
    zero = graphs.add_initializer(graph, "z", np.asarray(zero))
    source = x
    if "shift" in more:
        shift = graphs.add_initializer(graph, "shift", np.float32(more["shift"]))
        source = graphs.insert(graph, None, "Sub", (x, shift))
    codes = graphs.insert(graph, None, "QuantizeLinear", (source, scale, zero), dtype=zero.dtype)
    left = graphs.insert(graph, None, "DequantizeLinear", (codes, scale, zero))
    w8, w_scale = (graphs.add_initializer(graph, n, a) for n, a in (("w", w), ("ws", ws)))
    right = graphs.insert(graph, None, "DequantizeLinear", (w8, w_scale), {"axis": axis})
    y = graphs.insert(graph, None, "MatMul", (left, right), dtype=ir.DataType.FLOAT)
    y.name, y.shape = "y", ir.Shape(["n", w.shape[1]])
    graph.outputs.append(y)
    return ir.Model(graph, ir_version=10)


def test_every_linear_becomes_one_product_with_its_bias_and_activations_are_quantized_once():
    model, config = _quantized("bert")
    linears = _ops(model)["MatMul"]
    report = legalize(model, "ort-cpu")
    ops = _ops(model)
    assert report.details["rewrites"]["int8 product"] == linears == ops["MatMulIntegerToFloat"]
    assert not [n for n in model.graph if n.op_type == "MatMul" and graphs.constant(n.inputs[1])]
    assert ops["DequantizeLinear"] == 0
    # q, k and v share one, and so on: four activations per layer, one for the head.
    assert ops["QuantizeLinear"] == 4 * config.layers + 1
    biased = [n for n in model.graph if n.op_type == "MatMulIntegerToFloat" and len(n.inputs) == 7]
    assert len(biased) == linears - 1


def test_names_of_values_survive():
    model, _ = _quantized("bert")
    stream = {f"stream.{i}" for i in range(3)}
    legalize(model, "ort-cpu")
    assert stream <= {value.name for node in model.graph for value in node.outputs}
    assert [value.name for value in model.graph.outputs] == ["logits"]


@pytest.mark.parametrize("case", CASES)
def test_canonicalize_raises_the_lowered_form_back_without_loss(case):
    model, config = _quantized(case, per_token=("down",))
    Canonicalize().call(model, Context())
    canonical_ops, before = _ops(model), _logits(model, config)
    legalize(model, "ort-cpu")
    report = Canonicalize().call(model, Context())
    assert not report.skipped
    assert "com.microsoft" not in model.graph.opset_imports
    # One DequantizeLinear per weight and one pair per activation, as it was; and one Attention.
    assert _ops(model) == canonical_ops
    np.testing.assert_allclose(_logits(model, config), before, atol=1e-6)


def test_a_shift_of_whole_steps_moves_into_the_zero_point_and_back():
    rng = np.random.default_rng(1)
    w = rng.integers(-TOP, TOP + 1, (16, 8)).astype(np.int8)
    s, ws = np.float32(0.5 / 127), rng.uniform(0.01, 0.02, 8).astype(np.float32)
    x = rng.uniform(0, 1, (5, 16)).astype(np.float32)
    model = _product(s, w, ws, shift=0.5)
    before = OrtRunner(model).run({"x": x})["y"]
    legalize(model, "ort-cpu")
    assert [n.op_type for n in model.graph] == ["QuantizeLinear", "MatMulIntegerToFloat"]
    assert graphs.scalar(next(iter(model.graph)).inputs[2]) == 1
    step = np.abs(w.astype(np.float32) * ws * s).max()  # one code may round to its neighbour
    np.testing.assert_allclose(OrtRunner(model).run({"x": x})["y"], before, atol=1.01 * step)
    raising.run(model)
    assert _ops(model)["Add"] == 1
    np.testing.assert_allclose(OrtRunner(model).run({"x": x})["y"], before, atol=1.01 * step)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"zero": np.int8(3)}, "zero point of its activation is not 0"),
        ({"zero": np.uint8(0)}, "not int8"),
        ({"axis": 0}, "not scaled per output channel"),
    ],
)
def test_products_of_another_scheme_stay_with_a_reason(change, reason):
    w = np.ones((8, 8), np.int8)
    model = _product(np.float32(0.1), w, np.ones(8, np.float32), **change)
    before = OrtRunner(model).run(feed := {"x": rng_input()})
    report = legalize(model, "ort-cpu")
    assert _ops(model)["MatMul"] == 1
    assert reason in report.skipped[0].reason
    np.testing.assert_array_equal(OrtRunner(model).run(feed)["y"], before["y"])


def rng_input() -> np.ndarray:
    return np.random.default_rng(2).uniform(-20, 20, (5, 8)).astype(np.float32)


def _zero_points(model: ir.Model) -> set[ir.DataType]:
    return {n.inputs[2].dtype for n in model.graph if n.op_type.endswith("quantizeLinear")} | {
        n.inputs[2].dtype for n in model.graph if n.op_type == "QuantizeLinear"
    }


def test_int8_pairs_beside_products_become_uint8_and_come_back():
    model = rule_case.graph(
        "c = QuantizeLinear(x, s, z) d = DequantizeLinear(c, s, z) y = Reshape(d, shape)",
        output="float[B,T] y",
        constants="float s = {0.05}, int8 z = {0}, int64[2] shape = {0, -1}",
    )
    feed = rule_case.feed(model)
    before = ReferenceRunner(model).run(feed)["y"]
    legalize(model, "ort-cpu")
    assert _zero_points(model) == {ir.DataType.UINT8}
    np.testing.assert_array_equal(OrtRunner(model).run(feed)["y"], before)
    raising.run(model)
    assert _zero_points(model) == {ir.DataType.INT8}
    np.testing.assert_array_equal(ReferenceRunner(model).run(feed)["y"], before)


def test_activation_scaled_per_channel_stays_with_a_reason():
    model = _product(np.ones(8, np.float32), np.ones((8, 8), np.int8), np.ones(8, np.float32))
    assert "not one constant number" in legalize(model, "ort-cpu").skipped[0].reason


def test_residual_before_layer_norm_is_not_fused_into_the_slow_kernel(tmp_path):
    model = models.build(models.Config(**CASES["bert"]))
    report = legalize(model, "ort-cpu")
    assert report.details["rewrites"]["residual add"] == 4
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    kinds = {node.op_type for node in ir.load(tmp_path / "optimized.onnx").graph}
    assert "LayerNormalization" in kinds
    assert "SkipLayerNormalization" not in kinds


def test_lowering_twice_changes_nothing():
    model, _ = _quantized("llama")
    legalize(model, "ort-cpu")
    assert not legalize(model, "ort-cpu").modified


def test_a_product_that_onnx_runtime_cannot_run_as_uint8_keeps_its_int8_codes() -> None:
    """The weight has a scale for each row; another reader of the codes keeps them from fusing."""
    model = rule_case.graph(
        "q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  "
        "w = DequantizeLinear<axis = 0>(c, r)  m = MatMul(d, w)  l = Less(d, s)  "
        "k = Cast<to = 1>(l)  y = Add(m, k)",
        constants="float s = {0.1}, int8 z = {0}, float[4] r = {0.1, 0.2, 0.3, 0.4}, "
        "int8[4,1] c = {3, -5, 7, 9}",
    )
    feed = {"x": np.linspace(-3, 3, 24, dtype=np.float32).reshape(2, 3, 4)}
    expected = ReferenceRunner(model, double=True).run(feed)["y"]
    legalize(model, "ort-cpu")
    np.testing.assert_allclose(OrtRunner(model).run(feed)["y"], expected, atol=1e-5)
