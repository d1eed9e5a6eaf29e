from __future__ import annotations

import pytest
from rule_case import apply, graph, ops, refuses

from optimizer.raising import cse


def test_equal_nodes_are_computed_once():
    case = graph("a = Tanh(x)  b = Tanh(x)  c = Exp(a)  d = Exp(b)  y = Add(c, d)")
    assert apply(case, cse.run).applied == 2
    assert ops(case) == {"Tanh": 1, "Exp": 1, "Add": 1}


def test_equal_small_constants_are_kept_once():
    case = graph("a = Add(x, c)  y = Mul(a, d)", constants="float[1] c = {2}, float[1] d = {2}")
    assert apply(case, cse.run).applied == 1
    assert list(case.graph.initializers) == ["c"]


def test_an_output_keeps_its_name_when_its_twin_comes_first():
    case = graph("a = Tanh(x)  y = Tanh(x)  z = Exp(a)", output="float[B,S,4] y, float[B,S,4] z")
    apply(case, cse.run)
    assert ops(case) == {"Tanh": 1, "Exp": 1}


DIFFERENT = {
    "attribute": "a = Softmax<axis = 0>(x)  b = Softmax<axis = 1>(x)  y = Add(a, b)",
    "order of inputs": "a = Sub(x, c)  b = Sub(c, x)  y = Add(a, b)",
    "random": "a = RandomNormalLike(x)  b = RandomNormalLike(x)  y = Add(a, b)",
    "type of constant": "a = Cast<to = 7>(x)  b = Add(a, i)  d = Cast<to = 1>(b)  e = Mul(d, x)"
    "  y = Mul(e, c)",
}


@pytest.mark.parametrize("nodes", DIFFERENT.values(), ids=DIFFERENT.keys())
def test_different_computations_stay_apart(nodes):
    case = graph(nodes, constants="float c = {0}, int64 i = {0}")
    refuses(case, cse.run, None)


def test_two_outputs_stay_two_nodes():
    case = graph("y = Tanh(x)  z = Tanh(x)", output="float[B,S,4] y, float[B,S,4] z")
    refuses(case, cse.run, None)


LEFT_OUT = 'a, "", s = LayerNormalization(x, w)'
COMPLETE = "b, m, s2 = LayerNormalization(x, w)"
READ = "t = Add(a, b)  u = Add(m, s)  v = Add(u, s2)  y = Add(t, v)"


@pytest.mark.parametrize(("first", "second", "count"), [
    (LEFT_OUT, COMPLETE, 2), (COMPLETE, LEFT_OUT, 1),
])  # fmt: skip
def test_a_node_that_leaves_an_output_out_does_not_stand_for_one_that_gives_it(
    first: str, second: str, count: int
) -> None:
    model = graph(f"{first}  {second}  {READ}", constants="float[4] w = {1, 2, 3, 4}")
    apply(model, cse.run)
    assert ops(model)["LayerNormalization"] == count
