"""The reference runner: its operators against ONNX Runtime, its float64 against mathematics."""

from __future__ import annotations

import math
from typing import Any

import models
import numpy as np
import onnx_ir as ir
import pytest
import rule_case
from hypothesis import given, settings
from hypothesis import strategies as st
from processor import TOP

from optimizer.errors import ModelError, UnsupportedError
from optimizer.runners.numpy_ops import OPERATORS
from optimizer.runners.operators import find_operator
from optimizer.runners.ort import OrtRunner
from optimizer.runners.reference import ReferenceRunner

# Both sides compute in float32, in another order: some roundings (6e-8) of values up to about 10.
FLOAT32 = 1e-5

STYLES = {
    "llama with cache": {"kv_cache": True},
    "gpt": {
        "norm": "layer",
        "gated": False,
        "activation": "gelu-tanh",
        "bias": True,
        "rotary": False,
    },
    "bert": {
        "style": "post-norm",
        "norm": "layer",
        "activation": "gelu",
        "gated": False,
        "kv_heads": 4,
    },
    "parallel": {"style": "parallel", "activation": "quick-gelu"},
}


def single(
    op: str, inputs: dict[str, Any], outputs: int = 1, opset: int = 23, **attributes: Any
) -> ir.Model:
    """A model of one node; an input whose array is None is left out."""
    values = {
        n: ir.Value(
            name=n, type=ir.TensorType(ir.DataType.from_numpy(a.dtype)), shape=ir.Shape(a.shape)
        )
        for n, a in inputs.items()
        if a is not None
    }
    names = list(inputs)
    node = ir.node(op, [values.get(n) for n in names], attributes=attributes, num_outputs=outputs)
    for i, value in enumerate(node.outputs):
        value.name = f"y{i}"
    graph = ir.Graph(
        list(values.values()), list(node.outputs), nodes=[node], opset_imports={"": opset}, name="g"
    )
    return ir.Model(graph, ir_version=10)


def assert_like_ort(
    op: str, inputs: dict[str, Any], tolerance: float = FLOAT32, **options: Any
) -> None:
    model = single(op, inputs, **options)
    feed = {n: a for n, a in inputs.items() if a is not None}
    expected = OrtRunner(model, optimize=False).run(feed)
    found = ReferenceRunner(model).run(feed)
    double = ReferenceRunner(model, double=True).run(feed)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape == double[name].shape
        wide = array.astype(np.float64)
        scale = max(1.0, float(np.abs(wide).max(initial=0)))
        assert np.abs(found[name] - wide).max(initial=0) <= tolerance * scale
        assert np.abs(double[name] - wide).max(initial=0) <= tolerance * scale


def draw(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(0, 2, shape).astype(np.float32)


@given(
    seed=st.integers(0, 99),
    heads=st.sampled_from([(4, 4), (4, 2), (4, 1)]),
    lengths=st.tuples(st.integers(1, 4), st.sampled_from([0, 1, 3])),
    mask=st.sampled_from([None, "bool", "float", "row"]),
    causal=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
    softcap=st.sampled_from([0.0, 2.0]),
    flat=st.booleans(),
)
@settings(max_examples=60)
def test_attention(seed, heads, lengths, mask, causal, scale, softcap, flat):
    rng = np.random.default_rng(seed)
    (h, kv), (s, past), c, b = heads, lengths, 8, 2
    total = s + past
    q, k, v = draw(rng, b, h, s, c), draw(rng, b, kv, s, c), draw(rng, b, kv, s, c)
    attributes: dict[str, Any] = {"is_causal": int(causal), "softcap": softcap}
    if flat:
        q, k, v = (x.transpose(0, 2, 1, 3).reshape(b, s, -1) for x in (q, k, v))
        attributes |= {"q_num_heads": h, "kv_num_heads": kv}
    if scale is not None:
        attributes["scale"] = scale
    allowed = rng.random((b, 1, s, total)) > 0.3
    allowed[..., 0] = True  # Rows without any key are not compared: runtimes differ there.
    masks = {
        None: None,
        "bool": allowed,
        "float": np.where(allowed, draw(rng, b, 1, s, total), np.float32(-1e4)),
        "row": np.broadcast_to(allowed[:1, :, :1], (1, 1, s, total)).copy(),
    }
    inputs = {"q": q, "k": k, "v": v, "mask": masks[mask]}
    caches = (draw(rng, b, kv, past, c), draw(rng, b, kv, past, c))
    inputs |= {"past_key": caches[0] if past else None, "past_value": caches[1] if past else None}
    while inputs and list(inputs.values())[-1] is None:
        inputs.popitem()
    assert_like_ort("Attention", inputs, outputs=3 if past else 1, **attributes)


def test_a_query_that_may_attend_to_nothing_gets_zero():
    rng = np.random.default_rng(0)
    q = draw(rng, 1, 1, 2, 4)
    mask = np.array([[[[False, False], [True, True]]]])
    (y, *_) = OPERATORS["Attention"]([q, q, q, mask], {})
    assert (y[0, 0, 0] == 0).all()
    assert (y[0, 0, 1] != 0).all()


@given(
    seed=st.integers(0, 99),
    flat=st.booleans(),
    interleaved=st.integers(0, 1),
    rotated=st.sampled_from([0, 4]),
    tables=st.booleans(),
)
@settings(max_examples=30)
def test_rotary_embedding(seed, flat, interleaved, rotated, tables):
    rng = np.random.default_rng(seed)
    b, h, s, c = 2, 3, 4, 8
    x = draw(rng, b, s, h * c) if flat else draw(rng, b, h, s, c)
    half = (rotated or c) // 2
    shape = (16, half) if tables else (b, s, half)
    inputs = {"x": x, "cos": draw(rng, *shape), "sin": draw(rng, *shape)}
    if tables:
        inputs["positions"] = rng.integers(0, 16, (b, s))
    # ONNX Runtime wants the number of heads for partial rotation, in both layouts.
    attributes = {"num_heads": h} if flat or rotated else {}
    assert_like_ort(
        "RotaryEmbedding",
        inputs,
        interleaved=interleaved,
        rotary_embedding_dim=rotated,
        **attributes,
    )


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_normalization(axis, bias):
    rng = np.random.default_rng(0)
    shape = (5,) if axis == -1 else (4, 5)
    inputs = {
        "x": draw(rng, 3, 4, 5),
        "scale": draw(rng, *shape),
        "bias": draw(rng, *shape) if bias else None,
    }
    if not bias:
        inputs.pop("bias")
    assert_like_ort("LayerNormalization", inputs, axis=axis, epsilon=0.01)


def test_rms_normalization():
    rng = np.random.default_rng(0)
    assert_like_ort(
        "RMSNormalization", {"x": draw(rng, 3, 4, 5), "scale": draw(rng, 5)}, epsilon=0.01
    )


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate):
    assert_like_ort(
        "Gelu", {"x": np.linspace(-6, 6, 99, dtype=np.float32)}, approximate=approximate
    )


@pytest.mark.parametrize(
    "options",
    [
        {"strides": [4, 4], "kernel_shape": [4, 4]},
        {"pads": [1, 0, 2, 1], "strides": [2, 1]},
        {"dilations": [2, 1], "group": 2},
        {"auto_pad": "SAME_UPPER", "strides": [2, 3]},
        {"auto_pad": "SAME_LOWER"},
        {"auto_pad": "VALID"},
    ],
    ids=str,
)
def test_conv(options):
    rng = np.random.default_rng(0)
    group = options.get("group", 1)
    kernel = tuple(options.get("kernel_shape", (3, 2)))
    inputs = {"x": draw(rng, 2, 4, 9, 8), "w": draw(rng, 6, 4 // group, *kernel), "b": draw(rng, 6)}
    assert_like_ort("Conv", inputs, **options)


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize(
    "options",
    [
        {"pads": [0, 0, 1, 1]},
        {"strides": [2, 3], "pads": [1, 0, 0, 1]},
        {"dilations": [2, 1]},
        {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
        {"count_include_pad": 1, "pads": [1, 1, 1, 0]},
    ],
    ids=str,
)
def test_pooling(op, options):
    if op == "MaxPool" and "count_include_pad" in options:
        options = {"pads": options["pads"]}
    x = draw(np.random.default_rng(0), 2, 3, 7, 8) - 5  # Padding must not win the maximum.
    # Dilated averages came with opset 19.
    assert_like_ort(op, {"x": x}, kernel_shape=[2, 2], opset=19, **options)


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_quantize_and_dequantize(axis, dtype):
    rng = np.random.default_rng(0)
    x = draw(rng, 4, 6) * 40
    # Halves round to even on both sides.
    x[0, :4] = [0.5, 1.5, 2.5, -0.5]
    size = () if axis is None else (x.shape[axis],)
    scale = (
        np.full(size, 1.0, np.float32)
        if axis is None
        else rng.uniform(0.5, 2, size).astype(np.float32)
    )
    zero = np.asarray(rng.integers(0, 9, size), dtype)
    attributes = {} if axis is None else {"axis": axis}
    assert_like_ort("QuantizeLinear", {"x": x, "s": scale, "z": zero}, tolerance=0, **attributes)
    integers = rng.integers(0, 100, x.shape).astype(dtype)
    assert_like_ort("DequantizeLinear", {"x": integers, "s": scale, "z": zero}, **attributes)


@pytest.mark.parametrize("style", STYLES)
def test_whole_models_agree_with_onnx_runtime(style):
    config = models.Config(**STYLES[style])
    model, feed = models.build(config), models.feed(config, past=3, padded=True)
    expected = OrtRunner(model).run(feed)
    for double in (False, True):
        found = ReferenceRunner(model, double=double).run(feed)
        assert list(found) == list(expected)
        for name, array in found.items():
            assert array.dtype == (np.float64 if double else expected[name].dtype)
            assert np.abs(array - expected[name]).max() <= FLOAT32


def test_double_is_exact_where_float32_is_not():
    # 1 + 1e-9 is 1 in float32: a sum of 64 of them, minus 64, is 0 there and 6.4e-8 in float64.
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[N] x) => (float[1] y)'
        " <float tiny = {1e-9}, float one = {1}, float total = {64}, int64[1] axes = {0}> {"
        " c = Add(one, tiny)  e = Mul(x, c)  s = ReduceSum(e, axes)  y = Sub(s, total) }"
    )
    feed = {"x": np.ones(64, np.float32)}
    assert ReferenceRunner(model).run(feed)["y"] == 0
    tiny = float(np.float32(1e-9))
    assert ReferenceRunner(model, double=True).run(feed)["y"] == pytest.approx(64 * tiny, rel=1e-6)


def test_casts_constants_and_subgraphs_become_double_too():
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 20]> g (bool c, float[2] x) => (float[2] y) {'
        " one = Constant<value_float = 1.0>()"
        " shape = Constant<value_ints = [2]>()"
        " zeros = ConstantOfShape(shape)"
        " y = If (c) <then_branch = t () => (float[2] a) {"
        "   tiny = Constant<value = float {1e-9}>()  p = Add(x, tiny)  n = Cast<to = 1>(one)"
        "   d = Sub(p, n)  a = Add(d, zeros) },"
        " else_branch = e () => (float[2] b) { b = Identity(x) }> }"
    )
    runner = ReferenceRunner(model, double=True)
    x = np.ones(2, np.float32)
    yes = runner.run({"c": np.array(True), "x": x})["y"]
    assert yes == pytest.approx(float(np.float32(1e-9)), rel=1e-6)
    assert runner.run({"c": np.array(False), "x": x})["y"].tolist() == [1, 1]


def test_the_double_run_of_attention_has_no_single_precision_step():
    # onnx.reference takes the square root of the scale in float32; mathematics does not.
    rng = np.random.default_rng(0)
    q, k, v = (draw(rng, 1, 1, 3, 8) for _ in range(3))
    model = single("Attention", {"q": q, "k": k, "v": v})
    found = ReferenceRunner(model, double=True).run({"q": q, "k": k, "v": v})["y0"]
    scores = q.astype(np.float64) @ k.astype(np.float64).swapaxes(2, 3) / math.sqrt(8)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    assert np.abs(found - weights @ v.astype(np.float64)).max() < 1e-14


def test_functions_are_inlined():
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 20, "local" : 1]>'
        " g (float[N] x) => (float[N] y) { y = local.twice(x) }"
        ' <domain: "local", opset_import: ["" : 20]> twice (a) => (b) { b = Add(a, a) }'
    )
    assert ReferenceRunner(model).run({"x": np.ones(2, np.float32)})["y"].tolist() == [2, 2]
    assert len(model.functions) == 1


def test_later_changes_of_the_graph_do_not_reach_the_runner():
    config = models.Config()
    model, feed = models.build(config), models.feed(config)
    runner = ReferenceRunner(model)
    expected = runner.run(feed)["logits"]
    for node in list(model.graph)[::-1]:
        for name in list(node.attributes):
            node.attributes.pop(name)
    for value in model.graph.initializers.values():
        value.const_value = None
    assert np.array_equal(runner.run(feed)["logits"], expected)


def test_intermediate_values_can_be_asked_for():
    config = models.Config()
    model, feed = models.build(config), models.feed(config)
    stream = next(v for n in model.graph for v in n.outputs if v.name == "stream.1")
    found = ReferenceRunner(model, extra_outputs=(stream,)).run(feed)
    assert (
        np.abs(
            found["stream.1"] - OrtRunner(model, extra_outputs=(stream,)).run(feed)["stream.1"]
        ).max()
        < FLOAT32
    )


def test_an_operator_without_implementation_is_named():
    model = models.build()
    node = list(model.graph)[3]
    node.op_type, node.domain = "Foo", "com.example"
    with pytest.raises(UnsupportedError, match=rf"node '{node.name}'.*com\.example\.Foo"):
        ReferenceRunner(model)


def test_a_failing_node_is_named():
    model = single("MatMul", {"a": np.zeros((2, 3), np.float32), "b": np.zeros((2, 3), np.float32)})
    next(iter(model.graph)).name = "the_node"
    with pytest.raises(ModelError, match=r"node 'the_node' \(MatMul\) failed"):
        ReferenceRunner(model).run({"a": np.zeros((2, 3)), "b": np.zeros((2, 3))})


@pytest.mark.parametrize(
    ("op", "attributes", "inputs", "outputs"),
    [
        ("Attention", {}, 7, 1),
        ("Attention", {}, 4, 4),
        ("Attention", {"left_window_size": 3}, 4, 1),
        ("QuantizeLinear", {"block_size": 16}, 3, 1),
        ("MaxPool", {"ceil_mode": 1}, 1, 1),
        ("MaxPool", {}, 1, 2),
        ("Relu", {}, 1, 1),
    ],
)
def test_unusual_forms_are_left_to_onnx_reference(op, attributes, inputs, outputs):
    assert find_operator("", op, attributes, inputs, outputs) is None
    assert find_operator("com.microsoft", "SampleOp", {}, 1, 1) is None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("per_column", [False, True])
def test_an_int8_product_computes_what_the_runtime_computes(bias: bool, per_column: bool) -> None:
    rng = np.random.default_rng(0)
    inputs = {
        "a": rng.integers(0, 256, (2, 3, 16)).astype(np.uint8),
        "b": rng.integers(-TOP, TOP + 1, (16, 5)).astype(np.int8),
        "a_scale": np.float32(0.02),
        "b_scale": rng.uniform(0.01, 0.1, 5).astype(np.float32)[: 5 if per_column else 1],
        "a_zero": np.uint8(128),
        "b_zero": None,
        "bias": rng.normal(size=5).astype(np.float32) if bias else None,
    }
    given = {name: np.asarray(array) for name, array in inputs.items() if array is not None}
    model = single("MatMulIntegerToFloat", {n: given.get(n) for n in inputs})
    (node,) = model.graph
    node.domain = "com.microsoft"
    model.graph.opset_imports["com.microsoft"] = 1
    (expected,) = OrtRunner(model).run(given).values()
    (found,) = ReferenceRunner(model).run(given).values()
    np.testing.assert_allclose(found, expected, atol=FLOAT32)
    (wide,) = ReferenceRunner(model, double=True).run(given).values()
    assert wide.dtype == np.float64


def test_constants_are_seen_from_inside_a_loop() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[2] x) => (float[2] y)'
        " <int64 n = {3}, bool go = {1}, float[2] k = {1, 2}> {"
        " y = Loop (n, go, x) <body = b (int64 i, bool c, float[2] s) => (bool d, float[2] r)"
        " { d = Identity(c)  r = Add(s, k) }> }"
    )
    (found,) = ReferenceRunner(model, double=True).run({"x": np.zeros(2, np.float32)}).values()
    np.testing.assert_array_equal(found, [3, 6])


def test_functions_of_another_opset_are_unsupported() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 20, "own" : 1]> g (float[2] x) => (float[2] y)'
        ' { y = own.f(x) } <domain: "own", opset_import: ["" : 18]> f (v) => (r) { r = Neg(v) }'
    )
    with pytest.raises(UnsupportedError, match="cannot be written out"):
        ReferenceRunner(model)


def test_a_node_that_needs_too_much_memory_is_named() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 20]> g (int64[1] n) => (float[M] y)'
        " { [fill] y = ConstantOfShape(n) }"
    )
    with pytest.raises(UnsupportedError, match=r"'fill' .* more memory"):
        ReferenceRunner(model).run({"n": np.array([2**55])})


def test_strings_are_text_as_those_of_onnx_runtime_are() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 20]> g (string[1] x) => (string[2] y)'
        ' <string[1] k = {"ä"}> { y = Concat <axis = 0> (x, k) }'
    )
    feed = {"x": np.array(["b"], object)}
    for runner in (ReferenceRunner(model), OrtRunner(model)):
        assert runner.run(feed)["y"].tolist() == ["b", "ä"]


BOUNDS = [(-5, -9, -1), (-4, -9, -2), (1, -9, -1), (-1, 0, -1), (-9, 9, 2)]


@pytest.mark.parametrize(("start", "end", "step"), BOUNDS)
def test_slice_is_bounded_as_onnx_says(start: int, end: int, step: int) -> None:
    """Going backwards from before the first element begins at it; numpy gives nothing."""
    case = rule_case.graph(
        "y = Slice(x, s, e, a, t)", inputs="float[3,4] x", output="float[N,4] y",
        constants=f"int64[1] s = {{{start}}}, int64[1] e = {{{end}}}, int64[1] a = {{0}}, "
        f"int64[1] t = {{{step}}}",
    )  # fmt: skip
    feed = {"x": np.arange(12, dtype=np.float32).reshape(3, 4)}
    expected = OrtRunner(case).run(feed)["y"]
    np.testing.assert_array_equal(ReferenceRunner(case).run(feed)["y"], expected)


def test_sequences_hold_tensors_of_different_sizes() -> None:
    case = rule_case.graph(
        "q = SplitToSequence<axis = 0>(x, parts)  y = SequenceAt(q, one)", inputs="float[3,4] x",
        output="float[N,4] y", constants="int64[2] parts = {1, 2}, int64 one = {1}",
    )  # fmt: skip
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_array_equal(ReferenceRunner(case).run({"x": x})["y"], x[1:])
