from __future__ import annotations

import pytest
from rule_case import apply, graph, ops, refuses

from optimizer.raising import simplify

NUMBERS = (
    "float zero = {0}, float one = {1}, float two = {2}, float[1,1,1,1] wide = {1}, "
    "float ratio = {0.5}, bool off = {0}, bool on = {1}"
)
GOES = {
    "identity": "a = Identity(x)  y = Relu(a)",
    "dropout": "a = Dropout(x, ratio)  y = Relu(a)",
    "dropout switched off": "a = Dropout(x, ratio, off)  y = Relu(a)",
    "cast to the same type": "a = Cast<to = 1>(x)  y = Relu(a)",
    "cast like the same type": "a = CastLike(x, one)  y = Relu(a)",
    "cast to a wider type and back": "a = Cast<to = 11>(x)  b = Cast<to = 1>(a)  y = Relu(b)",
    "transpose pair": "a = Transpose<perm = [2, 0, 1]>(x)  b = Transpose<perm = [1, 2, 0]>(a)"
    "  y = Relu(b)",
    "transpose of nothing": "a = Transpose<perm = [0, 1, 2]>(x)  y = Relu(a)",
    "concat of one": "a = Concat<axis = 0>(x)  y = Relu(a)",
    "sum of one": "a = Sum(x)  y = Relu(a)",
    "plus zero": "a = Add(zero, x)  y = Relu(a)",
    "minus zero": "a = Sub(x, zero)  y = Relu(a)",
    "times one": "a = Mul(x, one)  y = Relu(a)",
    "over one": "a = Div(x, one)  y = Relu(a)",
    "chain": "a = Identity(x)  b = Mul(one, a)  c = Identity(b)  y = Relu(c)",
}
STAYS = {
    "zero minus x": "y = Sub(zero, x)",
    "one over x": "y = Div(one, x)",
    "cast to a narrower type and back": "a = Cast<to = 10>(x)  y = Cast<to = 1>(a)",
    "times two": "y = Mul(x, two)",
    "dropout in training": "y = Dropout(x, zero, on)",
    "input straight to output": "y = Identity(x)",
}


@pytest.mark.parametrize("nodes", GOES.values(), ids=GOES.keys())
def test_what_computes_nothing_goes_away(nodes):
    case = graph(nodes, constants=NUMBERS)
    apply(case, simplify.run)
    assert ops(case) == {"Relu": 1}


@pytest.mark.parametrize("nodes", STAYS.values(), ids=STAYS.keys())
def test_what_computes_something_stays(nodes):
    refuses(graph(nodes, constants=NUMBERS), simplify.run, None)


def test_a_constant_that_adds_a_dimension_stays():
    case = graph("y = Mul(x, wide)", output="float[1,B,S,4] y", constants=NUMBERS)
    refuses(case, simplify.run, None)


def test_a_wider_type_on_the_way_is_left_out():
    case = graph(
        "a = Cast<to = 1>(x)  y = Cast<to = 7>(a)",
        inputs="float16[B,S,4] x", output="int64[B,S,4] y",
    )  # fmt: skip
    apply(case, simplify.run)
    assert ops(case) == {"Cast": 1}
    assert case.graph[0].inputs[0].name == "x"


def test_transposes_in_a_row_become_one():
    case = graph(
        "a = Transpose<perm = [2, 0, 1]>(x)  y = Transpose<perm = [2, 0, 1]>(a)",
        output="float[S,4,B] y",
    )
    apply(case, simplify.run)
    assert ops(case) == {"Transpose": 1}


def test_sum_of_two_becomes_add():
    case = graph("a = Tanh(x)  y = Sum(a, x)")
    apply(case, simplify.run)
    assert ops(case) == {"Tanh": 1, "Add": 1}


def test_cast_like_a_known_type_becomes_cast():
    case = graph("y = CastLike(x, d)", inputs="float[B] x, double[B] d", output="double[B] y")
    apply(case, simplify.run)
    assert ops(case) == {"Cast": 1}


def test_constants_come_second():
    case = graph("y = Add(two, x)", constants=NUMBERS)
    apply(case, simplify.run)
    assert case.graph[0].inputs[0] is case.graph.inputs[0]


def test_an_identity_behind_an_output_keeps_both_outputs():
    case = graph("y = Relu(x)  z = Identity(y)", output="float[B,S,4] y, float[B,S,4] z")
    refuses(case, simplify.run, None)


FLOAT, FLOAT16, DOUBLE, BFLOAT16, STRING, INT64 = 1, 10, 11, 16, 8, 7
#: type of x, the type on the way, the type at the end
LOSSLESS = {
    ("float", DOUBLE, FLOAT), ("float16", FLOAT, FLOAT16), ("float16", DOUBLE, FLOAT16),
    ("float16", FLOAT, INT64), ("float", DOUBLE, FLOAT16), ("bfloat16", FLOAT, BFLOAT16),
}  # fmt: skip
LOSSY = {
    ("float", FLOAT16, FLOAT), ("float", BFLOAT16, FLOAT), ("float16", BFLOAT16, FLOAT16),
    ("double", FLOAT, DOUBLE), ("float", INT64, FLOAT), ("int64", FLOAT, INT64),
    ("int64", DOUBLE, INT64), ("float", DOUBLE, STRING), ("float16", FLOAT, STRING),
    ("bfloat16", FLOAT16, BFLOAT16),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "inner", "to"), sorted(LOSSLESS))
def test_a_type_that_holds_every_number_is_left_out(kind, inner, to):
    case = graph(f"a = Cast<to = {inner}>(x)  b = Cast<to = {to}>(a)  y = Identity(b)",
                 inputs=f"{kind}[B] x", output=f"{NAMES[to]}[B] y")  # fmt: skip
    apply(case, simplify.run)
    assert ops(case)["Cast"] <= 1
    assert all(node.inputs[0].name == "x" for node in case.graph)


@pytest.mark.parametrize(("kind", "inner", "to"), sorted(LOSSY))
def test_a_type_that_does_not_stays(kind, inner, to):
    case = graph(f"a = Cast<to = {inner}>(x)  y = Cast<to = {to}>(a)", inputs=f"{kind}[B] x",
                 output=f"{NAMES[to]}[B] y")  # fmt: skip
    refuses(case, simplify.run, None)


NAMES = {
    FLOAT: "float", FLOAT16: "float16", DOUBLE: "double", BFLOAT16: "bfloat16", STRING: "string",
    INT64: "int64",
}  # fmt: skip


def test_a_cast_that_others_read_stays_for_them():
    case = graph("a = Cast<to = 11>(x)  b = Cast<to = 1>(a)  c = Relu(b)  y = Cast<to = 11>(c)"
                 "  z = Add(a, a)", output="double[B,S,4] y, double[B,S,4] z")  # fmt: skip
    apply(case, simplify.run)
    assert ops(case) == {"Cast": 2, "Relu": 1, "Add": 1}


def test_a_cast_that_is_an_output_stays():
    case = graph("a = Cast<to = 11>(x)  b = Cast<to = 1>(a)  y = Relu(b)",
                 output="float[B,S,4] y, double[B,S,4] a")  # fmt: skip
    apply(case, simplify.run)
    assert ops(case) == {"Cast": 1, "Relu": 1}
