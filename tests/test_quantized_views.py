"""Where an int8 layer begins and ends: every spelling, and what only looks like one."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from rule_case import graph

from optimizer.quantized_parts import (
    fed_by,
    quantized_at,
    quantized_linear,
    reads,
    rounded,
    rounded_forms,
    stored,
    unrounded,
    weight_of,
)
from optimizer.structure import Linear

CONSTANTS = (
    "int8[4,3] codes = {1, -2, 3, 4, 5, -6, 7, 8, 9, -1, -2, -3}, "
    "float[3] columns = {0.1, 0.2, 0.3}, float step = {0.05}, int8 zero = {0}, "
    "float[3] b = {1, 2, 3}, "
    "float[4] g = {1, 2, 0.5, 1}, float[4] c = {0.1, 0, 0, 1}, int64[1] last = {-1}, "
    "int64[1] middle = {1}, float low = {-3}, float high = {3}, float six = {6}, "
    "float half = {0.5}, float none = {0}, "
    "float[4,4] w = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}, "
    "float[3] lost = {0.1, 0.2, 0.3}, float[4,3] plain = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3}"
)
WEIGHT = "e = DequantizeLinear<axis = 1>(codes, columns)"


def pair(source: str) -> str:
    """The rounding of ``source``, and the product m of it."""
    return (
        f"i = QuantizeLinear({source}, step, zero)  d = DequantizeLinear(i, step, zero)  {WEIGHT}"
        "  m = MatMul(d, e)"
    )


def model(nodes: str, size: int = 3) -> ir.Model:
    return graph(f"{nodes}  z = Neg(y)", output=f"float[B,S,{size}] z",
                 inputs="float[B,S,4] x, float[B,S,1] other, float[B,S,4] x2",
                 constants=CONSTANTS)  # fmt: skip


def value(case: ir.Model, name: str) -> ir.Value:
    values = [v for node in case.graph for v in node.outputs] + list(case.graph.inputs)
    return next(v for v in values if v.name == name)


def layer(case: ir.Model) -> Linear | None:
    product = next(n for n in case.graph if n.outputs[0].name == "m")
    return quantized_at(product)


ROW = "t = Abs(x)  r = ReduceMax<keepdims = 1>(t, last)  x1 = Div(x, r)"
BOTH = (
    "hi = ReduceMax<keepdims = 1>(x, last)  lo = ReduceMin<keepdims = 1>(x, last)"
    "  k0 = Add(hi, lo)  k = Mul(k0, half)  r0 = Sub(hi, k)  r = Max(r0, step)"
    "  x0 = Sub(x, k)  x1 = Div(x0, r)"
)
DYNAMIC = "i, s, n = DynamicQuantizeLinear(x)  m = MatMulInteger(i, codes, n)  f = Cast<to = 1>(m)"
AFTER = "j = QuantizeLinear(m, step, zero)  p = DequantizeLinear(j, step, zero)"
#: nodes, the name of the layer's input
LAYERS = {
    "a rounding": (pair("x"), "x", "m"),
    "a bias": (f"{pair('x')}  y = Add(m, b)", "x", "y"),
    "a bias first": (f"{pair('x')}  y = Add(b, m)", "x", "y"),
    "a rounding of its result": (f"{pair('x')}  {AFTER}", "x", "p"),
    "a rounding of its result before the bias": (f"{pair('x')}  {AFTER}  y = Add(p, b)", "x", "y"),
    "a scale and a shift per channel": (
        f"a = Mul(x, g)  h = Add(a, c)  {pair('h')}  y = Add(m, b)", "x", "y",
    ),
    "a scale per channel": (f"h = Mul(g, x)  {pair('h')}  y = Add(m, b)", "x", "y"),
    "a symmetric clamp": (f"h = Clip(x, low, high)  {pair('h')}  y = Add(m, b)", "x", "y"),
    "the reach of each token": (f"{ROW}  {pair('x1')}  y = Mul(m, r)", "x", "y"),
    "the reach of each token and a bias": (
        f"{ROW}  {pair('x1')}  y0 = Mul(r, m)  y = Add(y0, b)", "x", "y",
    ),
    "the reach of each token, shifted": (
        f"{ROW}  h = Sub(x1, half)  {pair('h')}  m1 = Add(m, lost)  y = Mul(m1, r)", "x", "y",
    ),
    "the middle of each token": (
        f"{BOTH}  {pair('x1')}  m1 = Mul(m, r)  q = Mul(k, lost)  y = Add(m1, q)", "x", "y",
    ),
    "dynamic scales": (f"{DYNAMIC}  q = Mul(s, columns)  y = Mul(f, q)", "x", "y"),
    "a dynamic scale": (f"{DYNAMIC}  y = Mul(s, f)", "x", "y"),
    "dynamic scales and a bias": (
        f"{DYNAMIC}  q = Mul(columns, s)  y0 = Mul(f, q)  y = Add(y0, b)", "x", "y",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_with(name: str) -> None:
    nodes, source, end = LAYERS[name]
    case = model(nodes if end == "y" else f"{nodes}  y = Relu({end})")
    found = layer(case)
    assert found is not None
    assert (found.input.name, found.output.name) == (source, end)
    assert (found.bias is not None) == (", b)" in nodes or "(b, m)" in nodes)
    assert quantized_linear(found.output) == found
    assert fed_by(found.input) == [found]
    assert any(source in [v.name for v in node.inputs if v] for node in reads(found))


def test_a_rounding_behind_the_bias_is_the_end_of_a_layer_as_well() -> None:
    after = AFTER.replace("(m,", "(y0,").replace("p =", "y =")
    case = model(f"{pair('x')}  y0 = Add(m, b)  {after}")
    found = quantized_linear(value(case, "y"))
    assert found is not None
    assert found.output.name == "y"
    assert layer(case).output.name == "y0"


#: What ends or begins a layer earlier than it might seem: (nodes, input, output).
SHORTER = {
    "rows that are not multiplied back": (f"{ROW}  {pair('x1')}  y = Neg(m)", "x1", "m"),
    "rows that others multiply back": (f"{ROW}  {pair('x1')}  y = Mul(m, other)", "x1", "m"),
    "rows divided by what is given": (
        f"x1 = Div(x, other)  {pair('x1')}  y = Mul(m, other)", "x1", "m",
    ),
    "a reach over the tokens": (
        f"{ROW}  {pair('x1')}  y = Mul(m, r)".replace("(t, last)", "(t, middle)"), "x1", "m",
    ),
    "a middle that is not added back": (f"{BOTH}  {pair('x1')}  y = Mul(m, r)", "x1", "m"),
    "a middle of another that is added": (
        f"{BOTH}  {pair('x1')}  m1 = Mul(m, r)  q = Mul(other, lost)  y = Add(m1, q)", "x1", "m",
    ),
    "a shift of each channel of rows that are divided": (
        f"{ROW}  h = Sub(x1, g)  {pair('h')}  y = Mul(m, r)", "h", "m",
    ),
    "a clamp that is an activation": (
        f"h = Clip(x, none, six)  {pair('h')}  y = Add(m, b)", "h", "y",
    ),
    "a shift that is the bias of a layer": (
        f"l = MatMul(x, w)  h = Add(l, c)  {pair('h')}  y = Add(m, b)", "h", "y",
    ),
    "a number that is added": (f"{pair('x')}  y = Add(m, half)", "x", "m"),
    "a rounding that is not alone": (f"{pair('x')}  {AFTER}  y = Add(m, p)", "x", "m"),
    "another function before": (f"h = Relu(x)  {pair('h')}  y = Add(m, b)", "h", "y"),
}  # fmt: skip


@pytest.mark.parametrize("name", SHORTER)
def test_a_layer_ends_before(name: str) -> None:
    nodes, source, end = SHORTER[name]
    found = layer(model(nodes))
    assert found is not None
    assert (found.input.name, found.output.name) == (source, end)


NONE = {
    "a float weight": pair("x").replace(WEIGHT, "e = Identity(plain)") + "  y = Add(m, b)",
    "a float input": f"{WEIGHT}  m = MatMul(x, e)  y = Add(m, b)",
    "integers that are not cast": (
        f"{DYNAMIC}  y = Mul(f, s)".replace(
            "f = Cast<to = 1>(m)", "m2 = Add(m, m)  f = Cast<to = 1>(m2)"
        )
    ),
    "integers with another scale": f"{DYNAMIC}  y = Mul(f, half)",
    "integers with the scale of another": (
        f"i2, s2, n2 = DynamicQuantizeLinear(x2)  {DYNAMIC}  y = Mul(f, s2)"
    ),
    "integers with the scale of another and columns": (
        f"i2, s2, n2 = DynamicQuantizeLinear(x2)  {DYNAMIC}  q = Mul(s2, columns)  y = Mul(f, q)"
    ),
}


@pytest.mark.parametrize("name", NONE)
def test_no_layer_with(name: str) -> None:
    case = model(NONE[name])
    assert layer(case) is None
    assert quantized_linear(value(case, "y")) is None


def test_two_layers_read_one_rounding() -> None:
    case = model(f"{pair('x')}  m2 = MatMul(d, e)  y = Add(m, m2)")
    assert [found.output.name for found in fed_by(value(case, "x"))] == ["m", "m2"]


def test_the_input_of_a_layer_is_not_that_of_what_is_before_it() -> None:
    case = model(f"h = Add(x, x2)  {pair('h')}  y = Add(m, b)")
    assert fed_by(value(case, "x")) == []
    assert len(fed_by(value(case, "h"))) == 1


def test_values_with_and_without_their_rounding() -> None:
    case = model("i = QuantizeLinear(x, step, zero)  d = DequantizeLinear(i, step, zero)"
                 "  e = DequantizeLinear(i, step, zero)  y = Add(d, e)", size=4)  # fmt: skip
    x, d = value(case, "x"), value(case, "d")
    assert [v.name for v in rounded_forms(x)] == ["d", "e"]
    assert rounded(x) is x  # which of the two?
    assert unrounded(d) is x
    assert unrounded(x) is x


def test_weights_are_constant_matrices_and_stored_as_codes() -> None:
    case = model(f"{pair('x')}  y = Add(m, b)")
    e, codes = value(case, "e"), case.graph.initializers["codes"]
    assert weight_of(e) is e
    assert stored(e) is codes
    assert stored(codes) is codes
    assert weight_of(case.graph.initializers["b"]) is None
    assert weight_of(value(case, "x")) is None
