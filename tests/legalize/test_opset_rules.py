from __future__ import annotations

import models
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import quantized

from optimizer import graph as graphs
from optimizer.errors import OptionError, UnsupportedError
from optimizer.legalize import legalize
from optimizer.pass_base import Context
from optimizer.runners.ort import OrtRunner
from passes.canonicalize import Canonicalize

CASES = {
    "grouped-query with cache": {"kv_cache": True},
    "multi-head": {"kv_heads": 4, "activation": "gelu"},
    "bert": {"style": "post-norm", "norm": "layer", "gated": False, "activation": "gelu-tanh",
             "bias": True, "rotary": False, "kv_heads": 4},
    "no mask": {"mask": False},
}  # fmt: skip


def _close(one: np.ndarray, two: np.ndarray) -> bool:
    return bool(np.abs(one - two).max() <= 1e-5 * np.abs(one).max())


def _outputs(model: ir.Model, config: models.Config) -> dict[str, np.ndarray]:
    return OrtRunner(model).run(models.feed(config, past=3 if config.kv_cache else 0))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("opset", [18, 20, 22])
def test_earlier_opsets_compute_the_same_and_are_valid(case, opset):
    config = models.Config(**CASES[case])
    model = models.build(config)
    before = _outputs(model, config)
    legalize(model, "ort-cpu", opset=opset)
    assert model.graph.opset_imports[""] == opset
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    after = _outputs(model, config)
    assert list(before) == list(after)
    assert all(_close(before[name], after[name]) for name in before)
    kinds = {node.op_type for node in model.graph}
    assert not kinds & {"Attention", "RMSNormalization", "RotaryEmbedding"}
    assert opset >= 20 or "Gelu" not in kinds


@pytest.mark.parametrize("case", CASES)
def test_canonicalize_raises_the_lowered_operators_back(case):
    config = models.Config(**CASES[case])
    model = models.build(config)
    kinds = ("Attention", "RMSNormalization", "RotaryEmbedding", "Gelu", "LayerNormalization")
    before = [[n.op_type for n in model.graph].count(kind) for kind in kinds]
    legalize(model, "ort-cpu", opset=18)
    Canonicalize().call(model, Context())
    assert [[n.op_type for n in model.graph].count(kind) for kind in kinds] == before


def _rotary(**attributes) -> ir.Model:
    def value(name, shape):
        return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))

    width = attributes.get("rotary_embedding_dim", 8) // 2
    inputs = [value("x", ["b", "s", 24]), *(value(n, ["b", "s", width]) for n in ("cos", "sin"))]
    graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": 23}, name="g")
    y = graphs.insert(
        graph, None, "RotaryEmbedding", inputs, {"num_heads": 3, **attributes},
        dtype=ir.DataType.FLOAT, shape=inputs[0].shape,
    )  # fmt: skip
    graph.outputs.append(y)
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("part", [0, 4])
def test_every_form_of_rotary_embedding_is_spelled_out_exactly(interleaved, part):
    extra = {"rotary_embedding_dim": part} if part else {}
    model = _rotary(interleaved=interleaved, **extra)
    rng = np.random.default_rng(0)
    feed = {
        value.name: rng.normal(size=(2, 3, value.shape[2])).astype(np.float32)
        for value in model.graph.inputs
    }
    before = OrtRunner(model).run(feed)
    legalize(model, "ort-cpu", opset=18)
    after = OrtRunner(model).run(feed)
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, atol=1e-6)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("causal", [0, 1])
def test_every_form_of_attention_is_spelled_out(softcap, mask, causal):
    def value(name, shape, dtype=ir.DataType.FLOAT):
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))

    inputs = [value("q", ["b", "s", 32]), value("k", ["b", "s", 16]), value("v", ["b", "s", 16])]
    dtype = ir.DataType.BOOL if mask == "bool" else ir.DataType.FLOAT
    masks = [] if mask == "none" else [value("m", ["b", 1, "s", "s"], dtype)]
    graph = ir.Graph([*inputs, *masks], [], nodes=[], opset_imports={"": 23}, name="g")
    attributes = {"q_num_heads": 4, "kv_num_heads": 2, "is_causal": causal, "softcap": softcap}
    y = graphs.insert(
        graph, None, "Attention", (*inputs, *masks), attributes,
        dtype=ir.DataType.FLOAT, shape=["b", "s", 32],
    )  # fmt: skip
    graph.outputs.append(y)
    model = ir.Model(graph, ir_version=10)
    rng = np.random.default_rng(0)
    feed = {v.name: rng.normal(size=(2, 5, v.shape[2])).astype(np.float32) for v in inputs}
    if masks:
        scores = rng.normal(size=(2, 1, 5, 5)).astype(np.float32)
        feed["m"] = (scores > 0) | np.eye(5, dtype=bool) if mask == "bool" else scores
    before = OrtRunner(model).run(feed)
    legalize(model, "tensorrt-10")
    assert model.graph.opset_imports[""] == 20
    after = OrtRunner(model).run(feed)
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, atol=1e-5)


def _returning_scores(mode):
    config = models.Config(layers=1)
    model = models.build(config)
    node = next(n for n in model.graph if n.op_type == "Attention")
    node.resize_outputs(4)
    node.attributes["qk_matmul_output_mode"] = ir.AttrInt64("qk_matmul_output_mode", mode)
    node.outputs[1].name = node.outputs[2].name = ""  # left out
    scores = node.outputs[3]
    scores.name, scores.type = "scores", ir.TensorType(ir.DataType.FLOAT)
    scores.shape = ir.Shape(["batch", config.heads, "sequence", "sequence"])
    model.graph.outputs.append(scores)
    return model, config


def test_attention_that_returns_its_weights_is_spelled_out_and_raised_back():
    model, config = _returning_scores(3)
    before = _outputs(model, config)
    legalize(model, "tensorrt-10")
    after = _outputs(model, config)
    np.testing.assert_allclose(before["scores"].sum(axis=-1), 1, rtol=1e-5)
    assert list(after) == ["logits", "scores"]
    assert all(_close(before[name], after[name]) for name in before)
    Canonicalize().call(model, Context())
    assert [n.op_type for n in model.graph].count("Attention") == 1


def test_attention_that_returns_other_scores_is_refused():
    model, _ = _returning_scores(0)
    with pytest.raises(UnsupportedError, match="scores from before the softmax"):
        legalize(model, "tensorrt-10")


def test_masks_become_numbers_once_for_all_layers():
    model = models.build(models.Config(layers=4))
    legalize(model, "ort-cpu", opset=20)
    assert [node.op_type for node in model.graph].count("Where") == 1


@pytest.mark.parametrize("target", ["tensorrt-10", "jetson", "tensorrt-11", "tensorrt-rtx"])
def test_tensorrt_gets_symmetric_int8_pairs_and_standard_operators(target):
    model = models.build(models.Config())
    count = quantized.quantize(model)
    legalize(model, target)
    assert {node.domain for node in model.graph} == {""}
    pairs = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    assert pairs
    assert all(graphs.const(node.inputs[2]).dtype == np.int8 for node in pairs)
    assert [n.op_type for n in model.graph].count("MatMul") >= count
    assert (model.graph.opset_imports[""] == 20) == (target in ("tensorrt-10", "jetson"))


def test_an_operator_newer_than_the_opset_is_refused_by_name():
    model = models.build(models.Config())
    sigmoid = next(n for n in model.graph if n.op_type == "Sigmoid")
    model.graph.opset_imports[""] = 24
    sigmoid.op_type = "Swish"
    with pytest.raises(UnsupportedError, match="Swish does not exist in opset 20"):
        legalize(model, "ort-cpu", opset=20)


def _pool(op_type: str, **attributes) -> ir.Model:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, 2, 7, 6]))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 23}, name="g")
    attributes = {"kernel_shape": [2, 3], "strides": [2, 2], **attributes}
    y = graphs.insert(
        graph, None, op_type, [x], attributes, name="y", dtype=ir.DataType.FLOAT,
        shape=[1, 2, "h", "w"],
    )  # fmt: skip
    graph.outputs.append(y)
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("op_type", ["MaxPool", "AveragePool", "LpPool"])
def test_pooling_is_lowered(op_type):
    model = _pool(op_type)
    feed = {"x": np.random.default_rng(0).normal(size=(1, 2, 7, 6)).astype(np.float32)}
    (before,) = OrtRunner(model).run(feed).values()
    legalize(model, "ort-cpu", opset=18)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    (after,) = OrtRunner(model).run(feed).values()
    # Each version has its own kernel: sums of six numbers of size one in another order.
    np.testing.assert_allclose(after, before, atol=1e-6)


@pytest.mark.parametrize(("op_type", "opset"), [("MaxPool", 22), ("AveragePool", 19)])
def test_pooling_that_counts_its_windows_otherwise_is_refused(op_type, opset):
    model = _pool(op_type, ceil_mode=1)
    reason = f"{op_type} with ceil_mode means something else before opset {opset}"
    with pytest.raises(UnsupportedError, match=reason):
        legalize(model, "ort-cpu", opset=18)


def test_an_opset_the_target_does_not_take_is_refused():
    with pytest.raises(OptionError, match="takes 18 to 20"):
        legalize(models.build(), "tensorrt-10", opset=23)
    with pytest.raises(OptionError, match="only ever lowered"):
        legalize(models.build(), "ort-cpu", opset=24)
    with pytest.raises(OptionError, match="did you mean 'ort-cpu'"):
        legalize(models.build(), "ort-cpi")
    with pytest.raises(OptionError, match="in-place"):
        legalize(models.build(), "ort-cpu", kv_cache="inplace")


def test_the_default_opset_is_kept():
    model = models.build(kv_cache=True)
    assert not legalize(model, "ort-cpu").modified
    assert model.graph.opset_imports[""] == 23
