from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from rule_case import apply, graph, model, ops, refuses

from optimizer.graph import size_bytes
from optimizer.raising import constants


def _with_weight(nodes: str, shape: tuple[int, ...], output: str, opset: int = 23) -> ir.Model:
    """A model whose input ``w`` was turned into a large initializer."""
    dims = ",".join(map(str, shape))
    inputs = f"float[B,{shape[0]}] x, float[{dims}] w"
    case = model(f"g ({inputs}) => ({output}) {{ {nodes} }}", opset=opset)
    weight = case.graph.inputs.pop()
    numbers = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    weight.const_value = ir.tensor(numbers, name="w")
    case.graph.register_initializer(weight)
    return case


def test_constant_nodes_become_initializers():
    case = graph("c = Constant<value_float = 2.0>()  y = Mul(x, c)")
    apply(case, constants.lift)
    assert list(case.graph.initializers) == ["c"]
    assert ops(case) == {"Mul": 1}


def test_constants_of_branches_move_out_without_clashing():
    case = model(
        """g (bool p, float[2] x) => (float[2] y) {
            y = If (p) <
                then_branch = a () => (float[2] u) { c = Constant<value_float = 2.0>()
                                                     u = Mul(x, c) },
                else_branch = b () => (float[2] v) { c = Constant<value_float = 3.0>()
                                                     v = Mul(x, c) }
            > }"""
    )
    apply(case, constants.lift)
    held = sorted(v.const_value.numpy().item() for v in case.graph.initializers.values())
    assert held == [2.0, 3.0]


def test_what_depends_on_constants_alone_is_computed():
    case = graph(
        "a = Add(c, c)  b = Sqrt(a)  y = Mul(x, b)", constants="float[4] c = {2, 8, 18, 32}"
    )
    assert apply(case, constants.run).applied == 2
    (value,) = (v for v in case.graph.initializers.values() if v.uses())
    np.testing.assert_array_equal(value.const_value.numpy(), np.sqrt([4, 16, 36, 64]))


def test_a_transposed_weight_is_not_read():
    case = _with_weight(
        "t = Transpose<perm = [1, 0]>(w)  y = MatMul(z, t)".replace("z", "x"),
        (300, 300),
        "float[B,300] y",
    )
    apply(case, constants.run)
    value = case.graph[0].inputs[1]
    assert isinstance(value.const_value, ir.LazyTensor)
    original = np.arange(300 * 300, dtype=np.float32).reshape(300, 300)
    np.testing.assert_array_equal(value.const_value.numpy(), original.T)


def test_folding_does_not_make_the_model_larger():
    case = _with_weight(
        "t = Transpose<perm = [1, 0]>(w)  a = MatMul(x, t)  b = MatMul(x, w)  y = Add(a, b)",
        (300, 300),
        "float[B,300] y",
    )
    before = size_bytes(case)
    refuses(case, constants.run, None)
    assert size_bytes(case) == before


def test_a_dequantized_weight_stays_quantized():
    case = graph(
        "d = DequantizeLinear(q, s)  y = Mul(x, d)",
        constants="int8[4] q = {1, 2, 3, 4}, float s = {0.5}",
    )
    refuses(case, constants.run, None)


def test_random_numbers_are_not_drawn():
    case = graph("r = RandomNormalLike(c)  y = Mul(x, r)", constants="float[4] c = {1, 2, 3, 4}")
    refuses(case, constants.run, None)


def test_a_default_that_a_caller_may_override_is_no_constant():
    case = graph("a = Sqrt(c)  y = Mul(x, a)", inputs="float[B,S,4] x, float[4] c = {1, 4, 9, 16}")
    if not case.graph.inputs[1].is_initializer():
        value = case.graph.inputs[1]
        value.const_value = ir.tensor(np.ones(4, np.float32), name="c")
        case.graph.register_initializer(value)
    refuses(case, constants.run, None)


def test_what_is_not_a_number_is_not_made_a_constant():
    case = graph("r = Sqrt(c)  y = Mul(x, r)", constants="float c = {-1.0}")
    refuses(case, constants.run, None)


HUGE = {
    "Expand": "c = Expand(one, size)",
    "a fill whose size is hidden": "a = Abs(size)  c = ConstantOfShape(a)",
    "a Range of floats": "c = Range(f0, f1, step)",
    "a product that broadcasts": "a = Expand(one, tall)  b = Expand(one, wide)  c = Mul(a, b)",
    "OneHot": "c = OneHot(index, many, values)",
    "a text matched by an expression": 'm = RegexFullMatch<pattern = "(a+)+$">(t)  '
    "c = Cast<to = 1>(m)",
}


@pytest.mark.parametrize("name", HUGE)
def test_what_could_fill_the_memory_is_not_tried(name):
    case = graph(
        f"{HUGE[name]}  s = ReduceMax<keepdims = 0>(c)  y = Add(x, s)",
        constants="float[1] one = {1}, int64[1] size = {1000000000000}, float f0 = {0}, "
        "float f1 = {1e12}, float step = {0.001}, int64[2] tall = {60000, 1}, "
        "int64[2] wide = {1, 60000}, int64[1] index = {0}, int64 many = {1000000000000}, "
        f'float[2] values = {{0, 1}}, string[1] t = {{"{"a" * 40}!"}}',
    )
    constants.run(case)
    assert size_bytes(case) < 1 << 20
    assert "ReduceMax" in ops(case)


def test_many_small_results_do_not_make_a_small_model_large(monkeypatch):
    monkeypatch.setattr(constants, "TOTAL_GROWTH", 100_000)
    fills = "  ".join(f"c{i} = Expand(k{i}, size)" for i in range(50))
    case = graph(
        f"{fills}  s = Sum({', '.join(f'c{i}' for i in range(50))})"
        "  m = ReduceMax<keepdims = 0>(s)  y = Add(x, m)",
        constants="int64[1] size = {10000}, "
        + ", ".join(f"float[1] k{i} = {{{i}}}" for i in range(50)),
    )
    for _ in range(3):
        constants.run(case)
    assert size_bytes(case) < 200_000


def test_a_slice_that_numpy_reads_otherwise_is_not_computed():
    """Backwards from before the first element: ONNX takes that one, numpy none."""
    case = graph(
        "c = Slice(t, s, e, a, m)  d = ReduceSum<keepdims = 0>(c)  y = Add(x, d)",
        constants="float[2] t = {1, 2}, int64[1] s = {-3}, int64[1] e = {-9}, int64[1] a = {0}, "
        "int64[1] m = {-1}",
    )
    assert constants.run(case).applied == 0
