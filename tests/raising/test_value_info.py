from __future__ import annotations

import onnx_ir as ir
from rule_case import graph, model

from optimizer.raising import value_info


def _shapes(case: ir.Model) -> dict[str, list]:
    return {
        output.name: None
        if output.shape is None
        else [d if isinstance(d, int) else d.value for d in output.shape]
        for node in case.graph
        for output in node.outputs
    }


def test_missing_types_and_shapes_are_inferred():
    case = graph("a = Tanh(x)  s = Shape(a)  y = Reshape(a, s)")
    value_info.fill(case)
    assert case.graph[1].outputs[0].dtype == ir.DataType.INT64
    assert _shapes(case)["a"] == [None, None, 4]  # names are written where they are proven
    value_info.refresh(case)
    assert _shapes(case)["a"] == ["B", "S", 4]


def test_names_that_inference_gets_wrong_are_not_taken():
    """ONNX follows sizes through bool, and lengths through a Slice that goes backwards."""
    case = graph(
        "s = Shape(x)  b = Cast<to = 9>(s)  i = Cast<to = 7>(b)  e = Expand(one, i)"
        "  r = Slice(x, zero, low, zero, two)  a = Tanh(r)  y = Add(a, e)",
        output="float[C,S,4] y",
        constants="float[1] one = {1}, int64[1] zero = {0}, int64[1] low = {-100}, "
        "int64[1] two = {-2}",
    )
    value_info.refresh(case)
    shapes = _shapes(case)
    assert shapes["e"] in (None, [None, None, None])
    assert shapes["a"] == [None, "S", 4]


def test_vectors_that_double_do_not_keep_inference_busy():
    steps = "  ".join(f"c{i + 1} = Concat<axis = 0>(c{i}, c{i})" for i in range(60))
    case = graph(
        f"{steps}  m = ReduceMax<keepdims = 0>(c60)  y = Add(x, m)",
        constants="float[2] c0 = {1, 2}",
    )
    value_info.refresh(case)
    assert _shapes(case)["c3"] == [16]


def test_symbolic_sizes_are_written_in_words():
    case = graph(
        "c = Concat<axis = 1>(x, z)  t = Tanh(c)  y = Exp(t)",
        inputs="float[B,S,4] x, float[B,P,4] z",
        output="float[B,T,4] y",
    )
    value_info.refresh(case)
    assert _shapes(case)["t"] == ["B", "P + S", 4]
    assert _shapes(case)["y"] == ["B", "T", 4], "declared outputs are the caller's words"


def test_declarations_that_contradict_the_inputs_are_dropped():
    """The batch was made dynamic by editing the input; everything else still says 1."""
    case = model("g (float[N,4] x) => (float[N,4] y) { a = Tanh(x)  u = Unique(a)  y = Exp(a) }")
    first, second = (node.outputs[0] for node in list(case.graph)[:2])
    first.shape, second.shape = ir.Shape([1, 4]), ir.Shape([4])
    value_info.refresh(case)
    shapes = _shapes(case)
    assert shapes["a"] == ["N", 4]
    assert shapes["u"] != [4]


def test_declarations_that_fit_are_kept():
    case = graph("a = Tanh(x)  n = NonZero(a)  y = Exp(a)", inputs="float[B,S,4] x")
    case.graph[1].outputs[0].shape = ir.Shape([3, "found"])
    value_info.refresh(case)
    assert _shapes(case)["n"] == [3, "found"]


def test_weights_are_not_read():
    case = graph(
        "a = MatMul(x, w)  y = Tanh(a)",
        constants="float[4,4] w = {1}".replace("{1}", "{" + ",".join(["1"] * 16) + "}"),
    )

    def fail():
        raise AssertionError("read")

    weight = case.graph.initializers["w"]
    lazy = ir.LazyTensor(fail, dtype=ir.DataType.FLOAT, shape=ir.Shape([400, 400]), name="w")
    weight.const_value = lazy
    for value in (case.graph[0].outputs[0], case.graph[1].outputs[0]):
        value.shape = None
    value_info.refresh(case)
