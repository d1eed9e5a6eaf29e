from __future__ import annotations

import math

import pytest
from rule_case import apply, graph, only, ops, refuses

from optimizer.raising import activations

NUMBERS = (
    f"float half = {{0.5}}, float one = {{1}}, float two = {{2}}, float three = {{3}}, "
    f"float root = {{{math.sqrt(2):.9f}}}, float inverse = {{{math.sqrt(0.5):.9f}}}, "
    f"float minus = {{-0.707106781}}, float c = {{0.044715}}, "
    f"float f = {{{math.sqrt(2 / math.pi):.9f}}}, float q = {{1.702}}"
)
ERF = {
    "halved x": "a = Div(x, root)  e = Erf(a)  b = Add(e, one)  h = Mul(x, half)  y = Mul(h, b)",
    "halved last": "a = Mul(x, inverse)  e = Erf(a)  b = Add(one, e)  h = Mul(x, b)"
    "  y = Mul(half, h)",
    "halved factor": "a = Div(x, root)  e = Erf(a)  b = Add(e, one)  h = Mul(b, half)"
    "  y = Mul(x, h)",
    "divided by two": "a = Div(x, root)  e = Erf(a)  b = Add(e, one)  h = Mul(x, b)"
    "  y = Div(h, two)",
    "erfc": "a = Mul(x, minus)  e = Erf(a)  b = Sub(one, e)  h = Mul(x, half)  y = Mul(h, b)",
}
INNER = "p = Pow(x, three)  k = Mul(p, c)  s = Add(x, k)  z = Mul(s, f)"
TANH = {
    "power": f"{INNER}  t = Tanh(z)  b = Add(t, one)  h = Mul(x, half)  y = Mul(h, b)",
    "products": "x2 = Mul(x, x)  p = Mul(x2, x)  k = Mul(p, c)  s = Add(x, k)  z = Mul(s, f)"
    "  t = Tanh(z)  b = Add(one, t)  h = Mul(half, x)  y = Mul(b, h)",
    "factored": "x2 = Mul(x, x)  k = Mul(x2, c)  s = Add(one, k)  xf = Mul(x, f)"
    "  z = Mul(xf, s)  t = Tanh(z)  b = Add(t, one)  g = Mul(b, half)  y = Mul(x, g)",
}
SILU = {
    "gate first": "s = Sigmoid(x)  y = Mul(s, x)",
    "quotient": "n = Neg(x)  e = Exp(n)  d = Add(e, one)  y = Div(x, d)",
}
QUICK = {
    "gate first": "z = Mul(x, q)  s = Sigmoid(z)  y = Mul(s, x)",
    "factor first": "z = Mul(q, x)  s = Sigmoid(z)  y = Mul(x, s)",
}


@pytest.mark.parametrize("nodes", ERF.values(), ids=ERF.keys())
def test_every_spelling_with_erf_becomes_gelu(nodes):
    case = graph(nodes, constants=NUMBERS)
    apply(case, activations.run)
    assert only(case, "Gelu").attributes["approximate"].as_string() == "none"
    assert ops(case) == {"Gelu": 1}


@pytest.mark.parametrize("nodes", TANH.values(), ids=TANH.keys())
def test_every_spelling_with_tanh_becomes_gelu(nodes):
    case = graph(nodes, constants=NUMBERS)
    apply(case, activations.run)
    assert only(case, "Gelu").attributes["approximate"].as_string() == "tanh"
    assert ops(case) == {"Gelu": 1}


@pytest.mark.parametrize("nodes", SILU.values(), ids=SILU.keys())
def test_silu_becomes_x_times_its_sigmoid(nodes):
    case = graph(nodes, constants=NUMBERS)
    apply(case, activations.run)
    assert ops(case) == {"Mul": 1, "Sigmoid": 1}
    assert only(case, "Mul").inputs[0] is case.graph.inputs[0]


@pytest.mark.parametrize("nodes", QUICK.values(), ids=QUICK.keys())
def test_quick_gelu_keeps_its_factor_inside(nodes):
    case = graph(nodes, constants=NUMBERS)
    apply(case, activations.run)
    assert ops(case) == {"Mul": 2, "Sigmoid": 1}
    assert only(case, "Sigmoid").inputs[0].producer().inputs[0] is case.graph.inputs[0]


def test_x_is_found_below_a_projection_and_a_scale():
    case = graph(
        "z = Mul(x, three)  a = Div(z, root)  e = Erf(a)  b = Add(e, one)  h = Mul(z, half)"
        "  y = Mul(h, b)",
        constants=NUMBERS,
    )
    apply(case, activations.run)
    assert ops(case) == {"Mul": 1, "Gelu": 1}


REFUSES = {
    "plain tanh": ("y = Tanh(x)", None),
    "gate of another value": ("s = Sigmoid(x)  t = Tanh(x)  u = Exp(t)  y = Mul(s, u)", None),
    "half missing": ("a = Div(x, root)  e = Erf(a)  b = Add(e, one)  y = Mul(x, b)", None),
    "silu already": ("s = Sigmoid(x)  y = Mul(x, s)", None),
    "rounded constant": (
        "a = Mul(x, rough)  e = Erf(a)  b = Add(e, one)  h = Mul(x, half)  y = Mul(h, b)",
        "constants are rounded too much",
    ),
}


@pytest.mark.parametrize(("nodes", "reason"), REFUSES.values(), ids=REFUSES.keys())
def test_leaves_alone_what_is_no_activation(nodes, reason):
    constants = NUMBERS + ", float rough = {0.707}"
    refuses(graph(nodes, constants=constants), activations.run, reason)


def test_keeps_an_inner_value_that_is_an_output():
    nodes = "s = Sigmoid(x)  e = Erf(x)  y = Mul(s, x)"
    case = graph(nodes, output="float[B,S,4] y, float[B,S,4] s", constants=NUMBERS)
    refuses(case, activations.run, None)


ADDS_AN_AXIS = {
    "the half": "a = Div(x, root)  e = Erf(a)  b = Add(e, one)  h = Mul(x, b)  y = Mul(h, half4)",
    "the root": "a = Div(x, root4)  e = Erf(a)  b = Add(e, one)  h = Mul(x, b)  y = Mul(h, half)",
    "the one": "n = Neg(x)  e = Exp(n)  d = Add(e, one4)  y = Div(x, d)",
    "the factor": "z = Mul(x, q4)  s = Sigmoid(z)  y = Mul(s, x)",
}


@pytest.mark.parametrize("nodes", ADDS_AN_AXIS.values(), ids=ADDS_AN_AXIS.keys())
def test_a_number_that_adds_an_axis_is_no_part_of_an_activation(nodes):
    constants = (
        f"{NUMBERS}, float[1,1,1,1] half4 = {{0.5}}, float[1,1,1,1] one4 = {{1}}, "
        f"float[1,1,1,1] root4 = {{{math.sqrt(2):.9f}}}, float[1,1,1,1] q4 = {{1.702}}"
    )
    case = graph(nodes, output="float[1,B,S,4] y", constants=constants)
    assert not apply(case, activations.run).applied


def test_numbers_may_have_as_many_axes_as_x():
    nodes = "z = Mul(x, q3)  s = Sigmoid(z)  y = Mul(s, x)"
    case = graph(nodes, constants="float[1,1,1] q3 = {1.702}")
    assert apply(case, activations.run).applied == 1


def test_an_activation_over_other_numbers_than_floats_stays():
    """The curve is that of SiLU only where the quotient is not rounded."""
    case = graph(
        "f = Cast<to = 7>(x)  g = Cast<to = 1>(f)  s = Sigmoid(g)  h = Cast<to = 7>(s)"
        "  y = Mul(f, h)", output="int64[B,S,4] y",
    )  # fmt: skip
    refuses(case, activations.run, None)


def test_casts_between_floats_are_seen_through():
    nodes = "f = Cast<to = 11>(x)  s = Sigmoid(f)  g = Cast<to = 1>(s)  y = Mul(g, x)"
    case = graph(nodes)
    assert apply(case, activations.run).applied == 1
    assert ops(case) == {"Sigmoid": 1, "Mul": 1}


@pytest.mark.parametrize(("attributes", "count"), [("", 1), ("<alpha = 0.5>", 2)])
def test_swish_is_written_out(attributes, count):
    case = graph(f"y = Swish{attributes}(x)", opset=24)
    assert apply(case, activations.run).applied == 1
    assert ops(case) == {"Sigmoid": 1, "Mul": count}
