from __future__ import annotations

import pytest
from rule_case import apply, graph, ops, refuses

from optimizer.raising import rows

CONSTANTS = (
    "int64[2] flat = {-1, 4}, float[4] b = {1, 2, 3, 4}, "
    "float[4,4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7}"
)
FLAT = "f = Reshape(x, flat)"


@pytest.mark.parametrize(
    "nodes",
    [f"{FLAT}  y = Add(f, b)", f"{FLAT}  m = MatMul(f, w)  y = Relu(m)",
     f"{FLAT}  h = Cast<to = 10>(f)  y = Cast<to = 1>(h)"],
    ids=["a vector", "a product", "a rounding"],
)  # fmt: skip
def test_what_treats_all_rows_alike_comes_before_they_are_flattened(nodes):
    case = graph(nodes, constants=CONSTANTS, output="float[N,4] y")
    assert apply(case, rows.run).applied >= 1
    assert case.graph.outputs[0].producer().op_type in ("Reshape", "Cast")
    assert ops(case)["Reshape"] == 1


@pytest.mark.parametrize(
    ("nodes", "output"),
    [
        (f"{FLAT}  y = Cast<to = 10>(f)", "float16[N,4] y"),
        (f"{FLAT}  y = Softmax<axis = 0>(f)", "float[N,4] y"),
        (f"{FLAT}  y = Transpose(f)", "float[4,N] y"),
    ],
    ids=["the model's last cast", "along the rows", "rows become columns"],
)
def test_leaves_alone(nodes, output):
    refuses(graph(nodes, constants=CONSTANTS, output=output), rows.run, None)
