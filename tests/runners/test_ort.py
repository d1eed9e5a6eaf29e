"""The ONNX Runtime runner: same numbers as from a file, weights by reference, clear errors."""

from __future__ import annotations

import sys

import ml_dtypes
import models
import numpy as np
import onnx_ir as ir
import pytest
import rule_case

from optimizer.errors import (
    CalibrationError,
    MissingDependencyError,
    ModelError,
    UnsupportedError,
)
from optimizer.graph import lazy
from optimizer.runners import ort
from optimizer.runners.reference import ReferenceRunner

CONFIG = models.Config(kv_cache=True)


def build() -> ir.Model:
    return models.build(CONFIG)


def last_node(model: ir.Model) -> ir.Node:
    return list(model.graph)[-1]


def text(
    body: str, signature: str = "(float[N,2] x) => (float[N,2] y)", opset: int = 20
) -> ir.Model:
    return ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["" : {opset}, "com.example" : 1]>\ng {signature} {body}'
    )


def test_a_model_in_memory_runs_like_the_same_model_from_a_file(tmp_path):
    feed = models.feed(CONFIG, past=3, padded=True)
    ir.save(build(), tmp_path / "model.onnx")
    from_file = ort.OrtRunner(tmp_path / "model.onnx").run(feed)
    in_memory = ort.OrtRunner(build()).run(feed)
    assert list(from_file) == list(in_memory)
    for name, array in from_file.items():
        assert np.array_equal(array, in_memory[name]), name


def test_external_weights_are_used_from_where_they_lie(tmp_path):
    feed = models.feed(CONFIG)
    ir.save(build(), tmp_path / "model.onnx", external_data="model.data")
    loaded = ir.load(tmp_path / "model.onnx")
    assert any(
        isinstance(v.const_value, ir.ExternalTensor) for v in loaded.graph.initializers.values()
    )
    expected = ort.OrtRunner(build()).run(feed)["logits"]
    assert np.array_equal(ort.OrtRunner(loaded).run(feed)["logits"], expected)


def test_weights_are_found_through_links_and_when_their_file_is_gone(tmp_path):
    feed = models.feed(CONFIG)
    expected = ort.OrtRunner(build()).run(feed)["logits"]
    real, linked = tmp_path / "real", tmp_path / "linked"
    real.mkdir()
    linked.mkdir()
    ir.save(build(), real / "model.onnx", external_data="blob")
    for name in ("model.onnx", "blob"):
        (linked / name).symlink_to(real / name)
    loaded = ir.load(real / "model.onnx")
    for value in loaded.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                str(linked / "blob"), tensor.offset, tensor.length, tensor.dtype,
                shape=tensor.shape, name=tensor.name, base_dir="",
            )  # fmt: skip
    assert np.array_equal(ort.OrtRunner(loaded).run(feed)["logits"], expected)
    for value in loaded.graph.initializers.values():
        value.const_value.numpy()
    (real / "blob").unlink()
    assert np.array_equal(ort.OrtRunner(loaded).run(feed)["logits"], expected)


def test_the_protobuf_holds_no_large_weights():
    from optimizer.proto import skeleton

    model = models.build(hidden=64, vocab=500)
    proto, large = skeleton(model)
    assert "embedding.weight" in large
    assert proto.ByteSize() < 0.2 * sum(t.nbytes for t in large.values())


def test_a_session_outlives_the_model_it_was_made_from():
    model, feed = build(), models.feed(CONFIG)
    runner = ort.OrtRunner(model)
    expected = runner.run(feed)["logits"]
    for value in model.graph.initializers.values():
        zeros = np.zeros_like(value.const_value.numpy())
        value.const_value = ir.tensor(zeros)
    del model
    noise = [np.random.default_rng(i).normal(size=40000) for i in range(50)]
    assert np.array_equal(runner.run(feed)["logits"], expected)
    assert len(noise) == 50


def test_lazy_weights_are_read_when_the_session_is_made():
    model = text("<float[2,2] w = {1, 2, 3, 4}> { y = MatMul(x, w) }")
    weight = model.graph.initializers["w"]
    array = np.arange(512, dtype=np.float32).reshape(2, 256)
    weight.const_value = lazy("w", ir.DataType.FLOAT, (2, 256), lambda: array[:, ::-1])
    weight.shape = ir.Shape((2, 256))
    model.graph.outputs[0].shape = ir.Shape(("N", 256))
    x = np.ones((1, 2), np.float32)
    assert np.array_equal(ort.OrtRunner(model).run({"x": x})["y"], x @ array[:, ::-1])


def test_weights_that_numpy_has_no_type_for_pass_by_their_bits():
    model = text(
        "<bfloat16[2] w = {1, 2}> { z = Cast<to = 1>(w)  y = MatMul(x, z) }",
        "(float[N,1024] x) => (float[N] y)",
    )
    array = np.arange(1024).astype(ml_dtypes.bfloat16)
    weight = model.graph.initializers["w"]
    weight.const_value, weight.shape = ir.Tensor(array), ir.Shape((1024,))
    found = ort.OrtRunner(model).run({"x": np.ones((1, 1024), np.float32)})["y"]
    assert found == pytest.approx(array.astype(np.float64).sum(), rel=1e-6)


def test_any_value_of_the_graph_can_be_an_extra_output():
    model, feed = build(), models.feed(CONFIG)
    stream = next(v for n in model.graph for v in n.outputs if v.name == "stream.1")
    ids = model.graph.inputs[0]
    runner = ort.OrtRunner(model, extra_outputs=(stream, ids, model.graph.outputs[0]))
    outputs = runner.run(feed)
    assert list(outputs) == list(runner.output_names)
    assert outputs["stream.1"].shape == (2, 5, CONFIG.hidden)
    assert np.array_equal(outputs["input_ids"], feed["input_ids"])
    assert [v.name for v in model.graph.outputs] == [
        "logits",
        *(n for n in outputs if "present" in n),
    ]


def test_optimizations_can_be_off():
    model, feed = build(), models.feed(CONFIG)
    plain = ort.OrtRunner(model, optimize=False).run(feed)["logits"]
    fast = ort.OrtRunner(model).run(feed)["logits"]
    # Both are float32: they differ by roundings of values near 5.
    assert np.abs(plain - fast).max() < 1e-5


def test_a_feed_that_does_not_fit_is_refused_before_the_run():
    runner = ort.OrtRunner(build())
    feed = models.feed(CONFIG)
    with pytest.raises(CalibrationError, match="'input_ids' is int32, the model expects int64"):
        runner.run({**feed, "input_ids": feed["input_ids"].astype(np.int32)})
    with pytest.raises(CalibrationError, match="did you mean 'input_ids'"):
        runner.run({**feed, "input_idz": feed["input_ids"]})


def rename(op_type: str, domain: str = ""):
    def change(model: ir.Model) -> None:
        node = last_node(model)
        node.op_type, node.domain = op_type, domain
        if domain:
            model.opset_imports[domain] = 1

    return change


def test_an_operator_of_an_unknown_domain_asks_for_its_library():
    model = build()
    rename("Foo", "com.example")(model)
    with pytest.raises(MissingDependencyError, match=r"com\.example\.Foo.*--custom-ops LIB"):
        ort.OrtRunner(model)


def test_an_operator_newer_than_the_runtime_is_unsupported():
    model = build()
    rename("Foo")(model)
    with pytest.raises(UnsupportedError, match="operator Foo of opset 23"):
        ort.OrtRunner(model)


def test_an_element_type_without_kernel_names_the_node():
    model = text("{ y = Conv(x, x) }", "(bfloat16[1,1,2] x) => (bfloat16[1,1,1] y)", 22)
    last_node(model).name = "the_node"
    with pytest.raises(UnsupportedError, match=r"node 'the_node'.*Conv"):
        ort.OrtRunner(model, rounding=False)


def test_a_weight_that_nothing_reads_is_left_out():
    model = build()
    unread = ir.tensor(np.ones((40, 40), np.float32), name="unread")
    value = ir.Value(
        name="unread", const_value=unread, type=ir.TensorType(unread.dtype), shape=unread.shape
    )
    model.graph.initializers.add(value)
    feed = models.feed(CONFIG)
    expected = ort.OrtRunner(build()).run(feed)["logits"]
    assert np.array_equal(ort.OrtRunner(model).run(feed)["logits"], expected)


def test_a_node_with_too_few_inputs_is_named():
    model = text("{ y = MatMul(x) }")
    last_node(model).name = "the_node"
    with pytest.raises(ModelError, match=r"node 'the_node' \(MatMul\)"):
        ort.OrtRunner(model)


def test_a_failing_run_names_the_node():
    model = text("<int64[2] s = {3, 5}> { y = Reshape(x, s) }", "(float[N,2] x) => (float[A,B] y)")
    last_node(model).name = "the_node"
    with pytest.raises(ModelError, match=r"node 'the_node' \(Reshape\) failed"):
        ort.OrtRunner(model, optimize=False).run({"x": np.zeros((1, 2), np.float32)})


def test_a_missing_runtime_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"pip install optimize-onnx\[cpu\]"):
        ort.OrtRunner(build())


def test_a_missing_custom_op_library_is_named(tmp_path):
    with pytest.raises(MissingDependencyError, match=r"libnothing\.so cannot be loaded"):
        ort.OrtRunner(build(), custom_ops=[tmp_path / "libnothing.so"])


def test_a_junk_file_is_a_model_error(tmp_path):
    path = tmp_path / "junk.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(ModelError, match=r"junk\.onnx"):
        ort.OrtRunner(path)


def test_attention_runs_where_inference_does_not_know_the_width_of_the_values():
    model = text(
        "<float[4,2] w = {1, 0, 0, 1, 1, 0, 0, 1}, int64[1] two = {2}> {"
        " s = Shape<end = 2>(k)  t = Concat<axis = 0>(s, two)  v = Reshape(f, t)"
        " a = Attention<q_num_heads = 2, kv_num_heads = 1>(q, k, v)"
        " b = Attention<q_num_heads = 2, kv_num_heads = 1>(a, k, v)  y = MatMul(b, w) }",
        "(float[B,S,4] q, float[B,S,2] k, float[M] f) => (float[B,S,2] y)",
        opset=23,
    )
    (values,) = (v for node in model.graph for v in node.outputs if v.name == "v")
    values.type, values.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["B", "S", 2])
    ones = {"q": (1, 3, 4), "k": (1, 3, 2), "f": (6,)}
    feed = {name: np.ones(shape, np.float32) for name, shape in ones.items()}
    assert ort.OrtRunner(model).run(feed)["y"].tolist() == [[[2, 2]] * 3]


def test_messages_of_onnx_runtime_are_told_without_its_own_code() -> None:
    text = (
        "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running "
        "Attention node. Name:'a' Status Message: /build/core/helper.h:41 onnxruntime::common::"
        "Status onnxruntime::attention_helper::Check(const onnxruntime::Tensor*, int, float, "
        "onnxruntime::TensorShape&, bool) parameters.batch_size > 0 was false. "
    )
    message = str(ort.translate_error(RuntimeError(text), "model"))
    assert message == "model: node 'a' (Attention) failed: parameters.batch_size > 0 was false."
    void = text.replace("onnxruntime::common::Status ", "void ").replace(", bool)", ") const")
    assert str(ort.translate_error(RuntimeError(void), "model")) == message


def test_a_mask_with_one_row_for_all_queries_is_written_out():
    """ONNX Runtime refuses it; the model stays as it is."""
    model = rule_case.model(
        "g (float[B,S,8] x, bool[B,1,1,S] m) => (float[B,S,8] y) "
        "{ y = Attention<q_num_heads = 2, kv_num_heads = 2>(x, x, x, m) }"
    )
    before = ir.to_proto(model).SerializeToString()
    rng = np.random.default_rng(0)
    feed = {
        "x": rng.normal(size=(2, 5, 8)).astype(np.float32),
        "m": rng.random((2, 1, 1, 5)) < 0.7,
    }
    feed["m"][..., 0] = True  # no row without any key
    found, expected = ort.OrtRunner(model).run(feed), ReferenceRunner(model).run(feed)
    np.testing.assert_allclose(found["y"], expected["y"], rtol=1e-5, atol=1e-6)
    assert ir.to_proto(model).SerializeToString() == before
