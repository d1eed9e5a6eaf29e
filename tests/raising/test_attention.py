from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from attention_text import (
    BACK,
    CACHE,
    CACHE_INPUTS,
    CACHE_OUTPUTS,
    CONSTANTS,
    END,
    GUARDED,
    HEADS,
    INPUTS,
    SCORES,
    TURNED,
)
from onnx.reference import ReferenceEvaluator
from rule_case import apply, graph, only, ops, refuses

from optimizer.raising import attention


def case(*parts: str, inputs: str = "", output: str = "float[B,S,8] y") -> ir.Model:
    nodes, every = "  ".join(parts), f"{INPUTS}, {inputs}" if inputs else INPUTS
    if "diagonal" in nodes or "first" in nodes:  # constants for a sequence of this length
        every, output = (text.replace("S", "3") for text in (every, output))
    return graph(nodes, inputs=every, output=output, constants=CONSTANTS)


def assert_canonical(model: ir.Model, scale: float = 1.0, softcap: float = 0.0) -> ir.Node:
    """One 3-D Attention on the inputs themselves, without any layout change around it."""
    node = only(model, "Attention")
    assert list(node.inputs[:3]) == list(model.graph.inputs[:3])
    assert node.attributes["scale"].as_float() == pytest.approx(scale)
    assert node.attributes["softcap"].as_float() == pytest.approx(softcap)
    assert node.attributes["is_causal"].as_int() == 0
    assert node.attributes["q_num_heads"].as_int() == 2
    assert not {"Transpose", "Softmax", "MatMul", "IsNaN", "Split", "Tanh"} & set(ops(model))
    return node


SCALES = {
    "none": ("s2 = Identity(s)", 1.0),
    "on the scores": ("s2 = Mul(s, half)", 0.5),
    "as a division": ("s2 = Div(s, four)", 0.25),
    "constant first": ("s2 = Mul(half, s)", 0.5),
    "twice": ("s1 = Mul(half, s)  s2 = Div(s1, four)", 0.125),
}


@pytest.mark.parametrize("name", SCALES)
def test_scale_is_read_from(name: str) -> None:
    nodes, scale = SCALES[name]
    nodes = nodes.replace("s2 = Identity(s)", "s2 = Mul(s, one)")
    model = graph(
        f"{HEADS} {TURNED} {SCORES} {nodes} {END}",
        inputs=INPUTS, output="float[B,S,8] y", constants=CONSTANTS + ", float one = {1.0}",
    )  # fmt: skip
    apply(model, attention.run)
    assert_canonical(model, scale)


@pytest.mark.parametrize(
    "scores",
    [
        f"{TURNED} a = Mul(q, half)  b = Mul(kt, half)  s2 = MatMul(a, b)",
        "kk = Mul(k, half)  kt = Transpose<perm = [0, 1, 3, 2]>(kk)  a = Mul(q, half)  "
        "s2 = MatMul(a, kt)",
        "kt = Transpose<perm = [0, 2, 3, 1]>(ur)  a = Div(q, four)  s2 = MatMul(a, kt)",
    ],
    ids=["both after", "keys before", "keys turned at once"],
)
def test_scale_on_queries_and_keys_is_one_product(scores: str) -> None:
    model = case(HEADS, scores, END)
    apply(model, attention.run)
    assert_canonical(model, 0.25)


def test_scale_before_the_heads_are_split_is_absorbed() -> None:
    heads = HEADS.replace("xr = Reshape(x, heads)", "xs = Mul(x, half)  xr = Reshape(xs, heads)")
    model = case(heads, TURNED, "s2 = MatMul(q, kt)", END)
    apply(model, attention.run)
    assert_canonical(model, 0.5)


def test_softcap_is_read() -> None:
    model = case(HEADS, TURNED, SCORES, "a = Mul(s, half)  b = Div(a, cap)  c = Tanh(b)  "
                 "s2 = Mul(c, cap)", END)  # fmt: skip
    apply(model, attention.run)
    assert_canonical(model, 0.5, 3.0)


# ``diagonal`` leaves every query one key; rows without any are tested below.
OPEN = "m = Or(m0, diagonal)  "
FLOAT, BOOL = ir.DataType.FLOAT, ir.DataType.BOOL
ONE, TWO = "bool[B,1,S,S] m0", "bool[B,1,S,S] m0, float[1,2,S,S] n"
MASKS = {
    "float": ("float[B,1,S,S] m", "s2 = Add(s, m)", FLOAT),
    "float, first": ("float[B,1,S,S] m", "s2 = Add(m, s)", FLOAT),
    "two floats": ("float[B,1,S,S] m, float[1,2,S,S] n", "a = Add(s, m)  s2 = Add(a, n)", FLOAT),
    "bool where kept": (ONE, OPEN + "f = Where(m, zero, low)  s2 = Add(s, f)", BOOL),
    "bool where dropped": (
        ONE, OPEN + "d = Not(m)  f = Where(d, low, zero)  s2 = Add(s, f)", BOOL
    ),
    "bool that chooses": (ONE, OPEN + "s2 = Where(m, s, low)", BOOL),
    "bool that chooses the number": (ONE, OPEN + "d = Not(m)  s2 = Where(d, low, s)", BOOL),
    "float of a number a score could outweigh": (
        ONE, OPEN + "f = Where(m, zero, some)  s2 = Add(s, f)", FLOAT
    ),
    "bool of two": (
        ONE + ", bool[S,S] n", OPEN + "o2 = Or(n, diagonal)  a = Where(m, s, low)  "
        "s2 = Where(o2, a, low)", BOOL
    ),
    "float of a bool and a float": (TWO, OPEN + "a = Add(s, n)  s2 = Where(m, a, low)", FLOAT),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("end", [END, GUARDED], ids=["plain", "guarded"])
def test_mask_is(name: str, end: str) -> None:
    inputs, nodes, dtype = MASKS[name]
    model = case(HEADS, TURNED, SCORES, nodes, end, inputs=inputs)
    apply(model, attention.run)
    mask = assert_canonical(model).inputs[3]
    assert mask is not None
    assert mask.dtype == dtype


def test_a_mask_added_twice_counts_twice() -> None:
    model = case(
        HEADS, TURNED, SCORES, "s1 = Add(s, n)  s2 = Add(n, s1)", END, inputs="float[B,1,S,S] n"
    )
    apply(model, attention.run)
    assert_canonical(model)


def test_mask_over_keys_only_is_given_the_axis_of_the_queries() -> None:
    nodes = "m = Or(m0, first)  f = Where(m, zero, low)  s2 = Add(s, f)"
    model = case(HEADS, TURNED, SCORES, nodes, END, inputs="bool[B,1,1,S] m0")
    apply(model, attention.run)
    assert assert_canonical(model).inputs[3].producer().op_type == "Expand"


def test_rows_without_any_key_become_zero() -> None:
    nodes = "f = Where(m, zero, low)  s2 = Add(s, f)"
    model = case(HEADS, TURNED, SCORES, nodes, END, inputs="bool[B,1,S,S] m")
    attention.run(model)
    assert_canonical(model)
    feeds = {name: np.ones((1, 3, 8), np.float32) for name in "xuv"}
    feeds["m"] = np.array([[[[1, 1, 0], [0, 0, 0], [1, 0, 0]]]], bool)
    (result,) = ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)
    np.testing.assert_array_equal(result[0, :, 0], [1, 0, 1])


def test_keys_and_values_repeated_for_groups_are_read_once() -> None:
    heads = (
        "xr = Reshape(x, heads)  q = Transpose<perm = [0, 2, 1, 3]>(xr)  "
        "ur = Reshape(u, group)  k1 = Transpose<perm = [0, 2, 1, 3]>(ur)  "
        "vr = Reshape(v, group)  w1 = Transpose<perm = [0, 2, 1, 3]>(vr)  "
        "k5 = Unsqueeze(k1, two)  ke = Expand(k5, wide)  k = Reshape(ke, many)  "
        "w5 = Unsqueeze(w1, two)  we = Expand(w5, wide)  w = Reshape(we, many)"
    )
    model = graph(
        f"{heads} {TURNED} s2 = MatMul(q, kt) {END}",
        inputs="float[B,S,8] x, float[B,S,4] u, float[B,S,4] v",
        output="float[B,S,8] y", constants=CONSTANTS,
    )  # fmt: skip
    apply(model, attention.run)
    assert assert_canonical(model).attributes["kv_num_heads"].as_int() == 1


def cached(*parts: str, inputs: str = CACHE_INPUTS, output: str = CACHE_OUTPUTS) -> ir.Model:
    return graph("  ".join(parts), inputs=inputs, output=output, constants=CONSTANTS)


def test_concatenated_cache_becomes_past_and_present() -> None:
    attend = "kt = Transpose<perm = [0, 1, 3, 2]>(ka)  s2 = MatMul(q, kt)  p = Softmax(s2)"
    model = cached(HEADS, CACHE, attend, "o = MatMul(p, wa)", BACK)
    apply(model, attention.run)
    node = assert_canonical(model)
    assert list(node.inputs[4:]) == list(model.graph.inputs[3:])
    assert list(node.outputs[1:]) == list(model.graph.outputs[1:])
    assert [v.name for v in node.outputs[1:]] == ["ka", "wa"]


def test_cache_of_an_exported_attention_becomes_past_and_present() -> None:
    model = cached(HEADS, CACHE, "o = Attention<scale = 0.5>(q, ka, wa)", BACK)
    apply(model, attention.run)
    node = assert_canonical(model, 0.5)
    assert [v.name for v in node.outputs[1:]] == ["ka", "wa"]


def test_causal_attention_over_a_concatenated_cache_is_left_alone() -> None:
    model = cached(HEADS, CACHE, "o = Attention<is_causal = 1>(q, ka, wa)", BACK)
    refuses(model, attention.run, "counts from the first key")


def test_mask_made_from_the_concatenated_cache_is_left_alone() -> None:
    mask = "m0 = ReduceMean<keepdims = 1>(ka)  m = Add(n, m0)"
    model = cached(HEADS, CACHE, mask, "o = Attention(q, ka, wa, m)", BACK,
                   inputs=f"{CACHE_INPUTS}, float[B,1,S,T] n")  # fmt: skip
    refuses(model, attention.run, "depend on the concatenated cache")


def test_default_scale_is_written_out() -> None:
    model = case(HEADS, "o = Attention(q, k, w)", BACK)
    apply(model, attention.run)
    assert only(model, "Attention").attributes["scale"].as_float() == 0.5


def test_probabilities_that_are_read_become_an_output_of_the_operator() -> None:
    model = case(
        HEADS, TURNED, "s2 = MatMul(q, kt)", END, output="float[B,S,8] y, float[B,2,S,S] p"
    )
    apply(model, attention.run)
    assert only(model, "Attention").outputs[3] is model.graph.outputs[1]


def test_scores_of_keys_by_queries_are_turned() -> None:
    turned = "qs = Mul(xr, half)  qt = Transpose<perm = [0, 2, 3, 1]>(qs)  s = MatMul(k, qt)"
    end = "p0 = Softmax<axis = 2>(s)  p = Transpose<perm = [0, 1, 3, 2]>(p0)  o = MatMul(p, w)"
    model = case(HEADS, turned, end, BACK)
    apply(model, attention.run)
    assert_canonical(model, 0.5)


def test_result_read_with_heads_apart_keeps_their_layout() -> None:
    model = case(HEADS, TURNED, "s2 = MatMul(q, kt)  p = Softmax(s2)  y = MatMul(p, w)",
                 output="float[B,2,S,4] y")  # fmt: skip
    apply(model, attention.run)
    assert only(model, "Attention").attributes["q_num_heads"].as_int() == 2
    assert ops(model)["Transpose"] == 1


REFUSED = {
    "the probabilities are over the queries": (
        f"{TURNED} {SCORES} p = Softmax<axis = 2>(s)  o = MatMul(p, w)", "not over the keys"),
    "the mask comes before the scale": (
        f"{TURNED} {SCORES} a = Add(s, n)  s2 = Mul(a, half)  p = Softmax(s2)  o = MatMul(p, w)",
        "mask is applied before the scale"),
    "scores are replaced by an ordinary number": (
        f"{TURNED} {SCORES} s2 = Where(m, s, some)  p = Softmax(s2)  o = MatMul(p, w)",
        "something else than the smallest number"),
    "another function shapes the scores": (
        f"{TURNED} {SCORES} a = Relu(s)  b = Add(a, n)  s2 = Mul(b, half)  p = Softmax(b)  "
        "o = MatMul(p, w)", None),
    "the keys are not turned": (
        "k2 = Reshape(k, back)  s = MatMul(q, k2)  p = Softmax(s)  o = MatMul(p, w)",
        "not transposed"),
    "the scale is negative": (
        f"{TURNED} {SCORES} s2 = Mul(s, minus)  p = Softmax(s2)  o = MatMul(p, w)",
        "positive factors only"),
    "the mask is the same for all keys": (
        f"{TURNED} {SCORES} s2 = Add(s, column)  p = Softmax(s2)  o = MatMul(p, w)",
        "does not span the keys"),
    "the mask widens the scores": (
        "q1 = Slice(q, zero1, one1, one1)  k0 = Slice(k, zero1, one1, one1)  "
        "k1 = Transpose<perm = [0, 1, 3, 2]>(k0)  w1 = Slice(w, zero1, one1, one1)  "
        "s = MatMul(q1, k1)  s2 = Add(s, per_head)  "
        "p = Softmax(s2)  o = MatMul(p, w1)", "more rows or heads than the scores"),
    "the mask is for three queries, whatever their number": (
        f"{TURNED} {SCORES} s2 = Add(s, three)  p = Softmax(s2)  o = MatMul(p, w)",
        "more rows or heads than the scores"),
    "every query reads one batch of keys": (
        "k1 = Transpose<perm = [0, 1, 3, 2]>(one_batch)  s = MatMul(q, k1)  p = Softmax(s)  "
        "o = MatMul(p, w)", "different batches"),
    "one head of queries reads many of keys": (
        f"{TURNED} q1 = Slice(q, zero1, one1, one1)  s = MatMul(q1, kt)  p = Softmax(s)  "
        "o = MatMul(p, w)", "1 query, 2 key and 2 value heads"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_leaves_alone_when(name: str) -> None:
    nodes, reason = REFUSED[name]
    model = graph(
        f"{HEADS} {nodes} {BACK}",
        inputs=INPUTS + ", float[B,1,S,S] n, bool[B,1,S,S] m, float[B,1,S,1] column, "
        "float[1,2,1,S] per_head, float[1,1,3,S] three, float[1,2,S,4] one_batch",
        output="float[B,S,8] y",
        constants=CONSTANTS + ", int64[4] back = {0, 0, 4, -1}, float minus = {-0.5}, "
        "int64[1] zero1 = {0}, int64[1] one1 = {1}",
    )  # fmt: skip
    refuses(model, attention.run, reason)


def test_heads_whose_batch_changes_on_the_way_stay_apart() -> None:
    """Windows: the Reshape to heads also moves a part of the sequence into the batch."""
    model = graph(
        "xr = Reshape(x, w)  q = Transpose<perm = [0, 2, 1, 3]>(xr)  o = Attention(q, q, q)  "
        "t = Transpose<perm = [0, 2, 1, 3]>(o)  y = Reshape(t, b)",
        inputs="float[B,6,8] x", output="float[B,6,8] y",
        constants="int64[4] w = {-1, 3, 2, 4}, int64[3] b = {-1, 6, 8}",
    )  # fmt: skip
    attention.run(model)
    node = only(model, "Attention")
    assert node.inputs[0] is not model.graph.inputs[0]
    assert node.inputs[0].producer().inputs[0].producer().op_type == "Reshape"


def test_mask_of_an_attention_that_stays_4d_is_given_the_axis_of_the_queries() -> None:
    model = graph(
        "kt = Transpose<perm = [0, 1, 3, 2]>(k)  s = MatMul(q, kt)  s2 = Add(s, n)  "
        "p = Softmax<axis = -1>(s2)  y = MatMul(p, w)",
        inputs="float[B,2,S,4] q, float[B,2,S,4] k, float[B,2,S,4] w, float[B,1,1,S] n",
        output="float[B,2,S,4] y",
    )
    assert apply(model, attention.run).applied == 2
    assert not attention.run(model).applied
    assert only(model, "Attention").inputs[3].producer().op_type == "Expand"
