from __future__ import annotations

import models
import numpy as np
import onnx_ir as ir
import pytest
import quantized
from processor import Int8Runner
from rule_case import graph

from optimizer import graph as graphs
from optimizer.errors import UnsupportedError
from optimizer.legalize import legalize
from optimizer.pass_base import Context
from optimizer.runners.ort import OrtRunner
from passes.canonicalize import Canonicalize


def _count(model: ir.Model, kind: str) -> int:
    return [node.op_type for node in model.graph].count(kind)


def _sharpen(model: ir.Model, factor: float) -> None:
    """Multiply all scores, so that attention becomes a choice."""
    for node in model.graph:
        if node.op_type == "Attention":
            scale = node.attributes.get_float("scale") * factor
            node.attributes["scale"] = ir.AttrFloat32("scale", scale)


@pytest.mark.parametrize(
    ("domain", "op_type"), [("com.microsoft", "Gelu"), ("", "SimplifiedLayerNormalization")]
)
def test_operators_of_the_runtime_are_kept_for_it_and_refused_for_others(domain, op_type):
    model = models.build()
    node = next(n for n in model.graph if n.op_type == "Sigmoid")
    node.domain, node.op_type = domain, op_type
    for target in ("ort-cpu", "ort-cuda"):
        legalize(model.clone(), target)
    with pytest.raises(UnsupportedError, match=f"{node.name}.*{op_type}.*tensorrt-11"):
        legalize(model, "tensorrt-11")


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("factor", [1.0, 100.0])
@pytest.mark.parametrize("padded", [False, True])
def test_causal_attention_with_a_floor_is_attention(kv_heads, factor, padded):
    config = models.Config(kv_heads=kv_heads)
    model = models.build(config)
    _sharpen(model, factor)
    feed = models.feed(config, sequence=16, padded=padded)
    before = OrtRunner(model).run(feed)["logits"]
    report = legalize(model, "ort-cpu")
    assert report.details["rewrites"]["causal attention"] == config.layers
    assert _count(model, "Attention") == 0
    after = OrtRunner(model).run(feed)["logits"]
    np.testing.assert_allclose(after, before, atol=2e-6 * np.abs(before).max())


def test_no_probability_of_the_floor_is_a_denormal_number():
    model = models.build(models.Config())
    _sharpen(model, 1000.0)
    legalize(model, "ort-cpu")
    softmax = [n.outputs[0] for n in model.graph if n.op_type == "Softmax"]
    for value in softmax:
        value.type = ir.TensorType(ir.DataType.FLOAT)
    runner = OrtRunner(model, extra_outputs=softmax)
    result = runner.run(models.feed(models.Config(), sequence=32))
    for value in softmax:
        smallest = result[value.name].min()
        assert np.finfo(np.float32).tiny < smallest < 1e-20


@pytest.mark.parametrize(
    "options",
    [{"kv_cache": True}, {"mask": False}, {"style": "post-norm", "norm": "layer"}],
    ids=["cache", "no mask", "post-norm"],
)
def test_attention_that_sees_every_token_or_has_a_cache_stays_one_operator(options):
    model = models.build(**options)
    if "style" in options:  # an encoder: every token sees all tokens that are not padding
        causal = next(n for n in model.graph if n.op_type == "And")
        causal.outputs[0].replace_all_uses_with(causal.inputs[1])
        graphs.remove_dead(model)
    legalize(model, "ort-cpu")
    assert _count(model, "Attention") == 2
    assert _count(model, "Softmax") == 0


def test_canonicalize_finds_the_attention_again():
    model = models.build()
    legalize(model, "ort-cpu")
    Canonicalize().call(model, Context())
    assert _count(model, "Attention") == 2
    assert _count(model, "Max") == 0


def test_a_padding_mask_gets_its_query_rows_once_for_all_layers():
    config = models.Config()
    model = models.build(config)
    causal = next(n for n in model.graph if n.op_type == "And")
    causal.outputs[0].replace_all_uses_with(causal.inputs[1])
    graphs.remove_dead(model)
    report = legalize(model, "ort-cpu")
    assert report.details["rewrites"] == {"attention mask": 1}
    feed = models.feed(config, padded=True)
    padded = OrtRunner(model).run(feed)["logits"]
    feed["input_ids"][0, -2:] = 1
    assert np.array_equal(OrtRunner(model).run(feed)["logits"][0, :-2], padded[0, :-2])


@pytest.mark.parametrize("kv_cache", ["append", "in-place"])
def test_rows_are_scaled_by_multiplication_whatever_the_cache(kv_cache):
    model = models.build(kv_cache=True)
    quantized.quantize(model, per_token=("down", ".o."))
    assert legalize(model, "ort-cpu", kv_cache=kv_cache).details["rewrites"]["row scale"] == 4


@pytest.mark.parametrize("centred", [False, True])
def test_rows_are_scaled_by_multiplication_and_raised_to_division(centred):
    config = models.Config(kv_cache=True, gated=False, activation="relu")
    model = models.build(config)
    quantized.quantize(model, per_token=("down",), centred=centred)
    before = _count(model, "Div"), _count(model, "Sub") + _count(model, "Add")
    report = legalize(model, "ort-cpu")
    assert report.details["rewrites"]["row scale"] == before[0] == 2
    assert _count(model, "Div") == _count(model, "Sub") == 0
    result = Int8Runner(model).run(models.feed(config, past=2))["logits"]
    Canonicalize().call(model, Context())
    assert (_count(model, "Div"), _count(model, "Sub") + _count(model, "Add")) == before
    assert _count(model, "Reciprocal") == 0
    again = Int8Runner(model).run(models.feed(config, past=2))["logits"]
    # A code on the boundary of two may fall on the other side.
    assert np.linalg.norm(again - result) <= 1e-2 * np.linalg.norm(result)


def test_attentions_over_different_sequences_get_a_mask_each():
    model = graph(
        "a = Attention<q_num_heads = 2, kv_num_heads = 2>(x, k, k, m)"
        "  y = Attention<q_num_heads = 2, kv_num_heads = 2>(z, k, k, m)",
        inputs="float[B,S,4] x, float[B,Q,4] z, float[B,T,4] k, bool[B,1,1,T] m",
        output="float[B,Q,4] y, float[B,S,4] a",
    )
    legalize(model, "ort-cpu")
    sizes = {"x": (2, 3, 4), "z": (2, 5, 4), "k": (2, 6, 4)}
    feed = {name: np.ones(shape, np.float32) for name, shape in sizes.items()}
    outputs = OrtRunner(model).run({**feed, "m": np.ones((2, 1, 1, 6), bool)})
    assert {name: array.shape for name, array in outputs.items()} == {
        "y": (2, 5, 4),
        "a": (2, 3, 4),
    }


def test_a_mask_that_depends_on_control_flow_is_left_as_it_is():
    model = graph(
        "h = If(p) <then_branch = t () => (float[B,S,4] u) { u = Relu(x) },"
        " else_branch = e () => (float[B,S,4] v) { v = Tanh(x) }>"
        "  i = Shape(h)  n = Gather<axis = 0>(i, one)  r = Range(zero, n, step)"
        "  a = Unsqueeze(r, zeros)  b = Unsqueeze(r, one)  c = GreaterOrEqual(b, a)"
        "  k = Cast<to = 9>(attention_mask)  d = Unsqueeze(k, one)  m3 = And(c, d)"
        "  m = Unsqueeze(m3, one)"
        "  y = Attention<q_num_heads = 2, kv_num_heads = 2>(h, h, h, m)",
        inputs="float[B,S,4] x, int64[B,S] attention_mask",
        constants="bool p = {1}, int64[1] one = {1}, int64[1] zeros = {0}, int64 zero = {0}, "
        "int64 step = {1}",
    )
    assert "causal attention" not in legalize(model, "ort-cpu").details["rewrites"]


@pytest.mark.parametrize(
    ("target", "rewrite"), [("ort-cpu", "int8 product"), ("ort-cuda", "zero point")]
)
def test_dequantized_values_may_be_transposed(target, rewrite):
    """Left alone, ONNX Runtime makes a model of it that it refuses to load."""
    model = graph(
        "q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)"
        "  y = Transpose<perm = [0, 2, 1]>(d)",
        output="float[B,4,S] y", constants="float s = {0.5}, int8 z = {0}",
    )  # fmt: skip
    assert legalize(model, target).details["rewrites"] == {rewrite: 1}
    x = np.ones((1, 2, 4), np.float32)
    assert OrtRunner(model).run({"x": x})["y"].tolist() == [[[1, 1]] * 4]
    assert not Canonicalize().call(model, Context()).skipped
