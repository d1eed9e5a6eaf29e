from __future__ import annotations

import pytest
from rule_case import apply, graph, only, refuses

from optimizer.norm_parts import norm
from optimizer.raising import dynamic_tanh
from optimizer.structure import NormKind

CONSTANTS = (
    "float a = {0.5}, float[1] a1 = {0.5}, float[1,1,1] a3 = {0.5}, float[1,1,1,1] a4 = {0.5}, "
    "float[4] w = {2, 0.5, -1, 3}, float[1,4] w2 = {2, 0.5, -1, 3}, "
    "float[1,1,4] w3 = {2, 0.5, -1, 3}, float[1,1,4] b3 = {1, -2, 0.25, 4}, "
    "float[4] b = {1, -2, 0.25, 4}, float[1,1,1,4] b4 = {1, -2, 0.25, 4}"
)
SPELLINGS = {
    "wide scale and bias": "m = Mul(x, a) t = Tanh(m) s = Mul(t, w3) y = Add(s, b3)",
    "constants first": "m = Mul(a3, x) t = Tanh(m) s = Mul(w2, t) y = Add(b3, s)",
    "alpha [1]": "m = Mul(a1, x) t = Tanh(m) s = Mul(t, w) y = Add(s, b)",
    "no bias": "m = Mul(x, a3) t = Tanh(m) y = Mul(t, w3)",
    "alpha is one": "t = Tanh(x) s = Mul(t, w3) y = Add(s, b)",
}


@pytest.mark.parametrize("nodes", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_constants_get_their_plainest_shapes(nodes: str) -> None:
    case = graph(nodes, constants=CONSTANTS)
    assert apply(case, dynamic_tanh.run).applied == 1
    found = norm(case.graph.outputs[0])
    assert found.kind is NormKind.TANH
    assert found.input is found.source is case.graph.inputs[0]
    assert found.alpha == (0.5 if "m = " in nodes else 1.0)
    assert list(found.scale.shape) == [4]
    assert (found.bias is None) == ("b" not in nodes)
    assert found.node is (only(case, "Tanh") if found.alpha == 1 else found.reads.node)


@pytest.mark.parametrize(
    "nodes",
    [
        "m = Mul(x, a) t = Tanh(m) s = Mul(t, w) y = Add(s, b)",  # is canonical
        "m = Mul(x, a) t = Tanh(m) y = Mul(t, a1)",  # a number, no vector
        "t = Tanh(x) y = Mul(t, x)",
        "y = Tanh(x)",
    ],
)
def test_leaves_alone(nodes: str) -> None:
    refuses(graph(nodes, constants=CONSTANTS), dynamic_tanh.run, None)


@pytest.mark.parametrize(
    "nodes",
    [
        "m = Mul(x, a4) t = Tanh(m) y = Mul(t, w)",
        "m = Mul(x, a) t = Tanh(m) s = Mul(t, w) y = Add(s, b4)",
    ],
)
def test_a_constant_that_adds_an_axis_keeps_it(nodes: str) -> None:
    case = graph(nodes, output="float[1,B,S,4] y", constants=CONSTANTS)
    refuses(case, dynamic_tanh.run, None)
