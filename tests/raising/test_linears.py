from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from rule_case import apply, graph, model, only, ops, refuses

from optimizer.raising import linears

W = "float[4,2] w = {1, 2, 3, 4, 5, 6, 7, 8}"
WT = "float[2,4] wt = {1, 3, 5, 7, 2, 4, 6, 8}"
B = "float[2] b = {0.5, -1}"
PAIR = {"inputs": "float[B,4] x", "output": "float[B,2] y"}


def _layer(case: ir.Model) -> tuple[np.ndarray, np.ndarray]:
    matmul, add = only(case, "MatMul"), only(case, "Add")
    assert add.inputs[0] is matmul.outputs[0]
    weight, bias = matmul.inputs[1], add.inputs[1]
    assert weight.is_initializer()
    assert bias.is_initializer()
    return weight.const_value.numpy(), bias.const_value.numpy()


WEIGHT = np.arange(1, 9, dtype=np.float32).reshape(4, 2)
BIAS = np.array([0.5, -1], np.float32)
GEMMS = {
    "plain": ("y = Gemm(x, w, b)", 1.0, BIAS),
    "transposed": ("y = Gemm<transB = 1>(x, wt, b)", 1.0, BIAS),
    "alpha": ("y = Gemm<alpha = 0.5>(x, w, b)", 0.5, BIAS),
    "beta": ("y = Gemm<beta = 2.0, transB = 1>(x, wt, b)", 1.0, 2 * BIAS),
    "row": ("y = Gemm(x, w, row)", 1.0, BIAS),
    "number": ("y = Gemm(x, w, number)", 1.0, np.array([3, 3], np.float32)),
}


@pytest.mark.parametrize(("nodes", "factor", "bias"), GEMMS.values(), ids=GEMMS.keys())
def test_gemm_becomes_matmul_and_add(nodes, factor, bias):
    constants = f"{W}, {WT}, {B}, float[1,2] row = {{0.5, -1}}, float number = {{3}}"
    case = graph(nodes, constants=constants, **PAIR)
    assert apply(case, linears.run).applied == 1
    weight, held = _layer(case)
    np.testing.assert_array_equal(weight, factor * WEIGHT)
    np.testing.assert_array_equal(held, bias)


def test_gemm_without_bias_becomes_matmul():
    case = graph("y = Gemm(x, w)", constants=W, **PAIR)
    apply(case, linears.run)
    assert ops(case) == {"MatMul": 1}


def test_gemm_adds_an_activation():
    case = graph(
        "y = Gemm(x, w, r)", constants=W, inputs="float[B,4] x, float[B,2] r", output="float[B,2] y"
    )
    apply(case, linears.run)
    assert only(case, "Add").inputs[1] is case.graph.inputs[1]


def test_two_layers_share_one_transposed_weight():
    case = graph(
        "a = Gemm<transB = 1>(x, wt, b)  c = Gemm<transB = 1>(z, wt, b)  y = Mul(a, c)",
        constants=f"{WT}, {B}",
        inputs="float[B,4] x, float[B,4] z",
        output="float[B,2] y",
    )
    apply(case, linears.run)
    weights = {node.inputs[1] for node in case.graph if node.op_type == "MatMul"}
    assert len(weights) == 1


def test_a_dequantized_weight_is_transposed_with_its_axis():
    case = graph(
        "d = DequantizeLinear<axis = 0>(q, s)  y = Gemm<transB = 1>(x, d, b)",
        constants=f"int8[2,4] q = {{1, -3, 5, 7, 2, 4, -6, 8}}, float[2] s = {{0.5, 2}}, {B}",
        **PAIR,
    )
    apply(case, linears.run)
    node = only(case, "DequantizeLinear")
    assert node.attributes["axis"].as_int() == 1
    assert list(node.inputs[0].shape) == [4, 2]


@pytest.mark.parametrize(("axis", "flag", "shape"), [(0, 0, "4,2"), (1, 1, "2,4")])
def test_a_weight_scaled_row_by_row_stays_in_its_gemm(axis, flag, shape):
    case = graph(
        f"d = DequantizeLinear<axis = {axis}>(q, s)  y = Gemm<transB = {flag}>(x, d, b)",
        constants=f"int8[{shape}] q = {{1, -3, 5, 7, 2, 4, -6, 8}}, "
        f"float[4] s = {{0.5, 2, 1, 3}}, {B}",
        **PAIR,
    )
    refuses(case, linears.run, "scaled row by row")


def test_a_row_bias_becomes_a_vector():
    case = graph(
        "m = MatMul(x, w)  y = Add(m, row)",
        constants=f"{W}, float[1,1,2] row = {{0.5, -1}}",
        output="float[B,S,2] y",
    )
    assert apply(case, linears.run).applied == 1
    assert _layer(case)[1].shape == (2,)


def test_a_bias_behind_the_split_into_heads_comes_first():
    case = graph(
        "m = MatMul(x, w)  h = Reshape(m, heads)  y = Add(h, each)",
        constants=f"{W}, int64[4] heads = {{0, 0, 2, 1}}, float[2,1] each = {{0.5, -1}}",
        output="float[B,S,2,1] y",
    )
    assert apply(case, linears.run).applied == 1
    assert [node.op_type for node in case.graph] == ["MatMul", "Add", "Reshape"]
    np.testing.assert_array_equal(_layer(case)[1], BIAS)


def test_a_bias_that_widens_the_product_is_no_bias():
    case = graph(
        "m = MatMul(x, w)  y = Add(m, wide)",
        constants=f"{W}, float[2,1,1,2] wide = {{1, 2, 3, 4}}",
        output="float[2,B,S,2] y",
    )
    refuses(case, linears.run, None)


def test_convolution_of_single_positions_becomes_linear():
    case = graph(
        "t = Transpose<perm = [0, 2, 1]>(x)  c = Conv(t, k, b)  y = Transpose<perm = [0, 2, 1]>(c)",
        constants="float[2,4,1] k = {1, 3, 5, 7, 2, 4, 6, 8}, " + B,
        output="float[B,S,2] y",
    )
    apply(case, linears.run)
    np.testing.assert_array_equal(_layer(case)[0], WEIGHT)
    assert "Transpose" not in ops(case)


def _large(nodes: str, inputs: str, output: str) -> ir.Model:
    case = model(f"g ({inputs}, float[200,100] w) => ({output}) {{ {nodes} }}")
    weight = case.graph.inputs.pop()
    weight.const_value = ir.tensor(np.ones((200, 100), np.float32), name="w")
    case.graph.register_initializer(weight)
    return case


def test_a_large_weight_that_is_also_read_untransposed_is_not_held_twice():
    case = _large("e = Gather(w, i)  y = Gemm<transB = 1>(e, w)", "int64[B] i", "float[B,200] y")
    refuses(case, linears.run, "the weight is also read untransposed")


def test_a_large_weight_is_transposed_when_it_is_read():
    case = _large("y = Gemm<transB = 1>(x, w)", "float[B,100] x", "float[B,200] y")
    apply(case, linears.run)
    assert isinstance(only(case, "MatMul").inputs[1].const_value, ir.LazyTensor)
    assert list(case.graph.initializers) == [only(case, "MatMul").inputs[1].name]


REFUSES = {
    "transposed activation": ("y = Gemm<transA = 1>(x, w)", "transposed activation"),
    "scaled activation": ("y = Gemm<beta = 2.0>(z, w, r)", "beta = 2"),
}


@pytest.mark.parametrize(("nodes", "reason"), REFUSES.values(), ids=REFUSES.keys())
def test_leaves_alone_and_says_why(nodes, reason):
    case = graph(
        nodes,
        constants=W,
        inputs="float[4,3] x, float[3,4] z, float[3,2] r",
        output="float[3,2] y",
    )
    refuses(case, linears.run, reason)


def test_a_weight_that_is_a_constant_and_an_output_keeps_its_name():
    model = graph(
        "w = Constant<value = float[1,4] {1, 2, 3, 4}>()  y = Gemm<transB = 1>(x, w)",
        inputs="float[B,4] x", output="float[B,1] y, float[1,4] w",
    )  # fmt: skip
    apply(model, linears.run)
    names = [value.name for node in model.graph for value in node.outputs]
    assert not set(names) & set(model.graph.initializers)
