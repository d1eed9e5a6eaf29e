"""Values that nodes in the branches of an If read, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from rule_case import apply, graph, ops

from optimizer.raising import activations, constants, cse, linears, norms, packed, rows, simplify

CONSTANTS = (
    "float[4,4] w = {" + ", ".join(map(str, range(16))) + "}, float[4] b = {1, 2, 3, 4}, "
    "int64[1] last = {-1}, float e = {0.01}, int64[2] flat = {-1, 4}"
)
SHAPE = "float[B,S,4]"


def choice(then: str, otherwise: str, shape: str = SHAPE) -> str:
    """Y from one of two branches, of which each gives its last value."""
    ends = [text.rpartition("  ")[2].partition(" = ")[0] for text in (then, otherwise)]
    return (
        f"y = If (p) <then_branch = g1 () => ({shape} {ends[0]}) {{ {then} }}, "
        f"else_branch = g2 () => ({shape} {ends[1]}) {{ {otherwise} }}>"
    )


ROOT = (
    "sq = Mul(x, x)  m = ReduceMean<keepdims = 1>(sq, last)  v = Add(m, e)  s = Sqrt(v)"
    "  n = Div(x, s)  a = Mul(n, b)  "
)
ROWS = "float[N,4]"
#: (rule, nodes, type of y, what is left)
READ: dict[str, tuple[Callable[..., Any], str, str, dict[str, int]]] = {
    "the parts of a packed layer": (
        packed.run, "m = MatMul(x, w)  "
        + choice("q, k = Split<axis = -1, num_outputs = 2>(m)  t = Add(q, k)", "o = Neg(z)",
                 "float[B,S,2]"), "float[B,S,2]", {"MatMul": 2, "If": 1},
    ),
    "a layer": (
        linears.run, "r = Reshape(x, flat)  a = Gemm<transB = 1>(r, w, b)  "
        + choice("t = Neg(a)", "o = Identity(a)", ROWS), ROWS,
        {"Reshape": 1, "MatMul": 1, "Add": 1, "If": 1},
    ),
    "a norm before its scale": (
        norms.run, ROOT + choice("t = Mul(n, a)", "o = Neg(a)"), SHAPE,
        {"RMSNormalization": 1, "Mul": 1, "If": 1},
    ),
    "a norm": (
        norms.run, ROOT + choice("t = Neg(a)", "o = Exp(a)"), SHAPE,
        {"RMSNormalization": 1, "If": 1},
    ),
    "an activation before it ends": (
        activations.run, "s = Sigmoid(x)  a = Mul(s, x)  " + choice("t = Mul(s, a)", "o = Neg(a)"),
        SHAPE, {"Sigmoid": 1, "Mul": 1, "If": 1},
    ),
    "an activation": (
        activations.run, "s = Sigmoid(x)  a = Mul(s, x)  " + choice("t = Exp(a)", "o = Neg(a)"),
        SHAPE, {"Sigmoid": 1, "Mul": 1, "If": 1},
    ),
    "what is another value": (
        simplify.run, "a = Identity(x)  " + choice("t = Identity(a)", "o = Neg(a)"), SHAPE,
        {"If": 1},
    ),
    "rows without their batch": (
        rows.run, "r = Reshape(x, flat)  a = Relu(r)  "
        + choice("t = Neg(a)", "o = Identity(a)", ROWS), ROWS, {"Reshape": 1, "Relu": 1, "If": 1},
    ),
    "one of two equal values": (
        cse.run, "a = Neg(x)  c = Neg(x)  " + choice("t = Identity(c)", "o = Exp(a)"), SHAPE,
        {"Neg": 1, "If": 1},
    ),
    "what is constant": (
        constants.run, "a = Neg(b)  " + choice("t = Identity(a)", "o = Exp(a)", "float[4]"),
        "float[4]", {"If": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_branches_read(name: str) -> None:
    rule, nodes, shape, left = READ[name]
    model = graph(nodes, inputs=f"{SHAPE} x, float[B,S,2] z, bool p", output=f"{shape} y",
                  constants=CONSTANTS)  # fmt: skip
    apply(model, rule)
    assert ops(model) == left
