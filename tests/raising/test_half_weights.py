from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from rule_case import apply, graph, only, ops, refuses

from optimizer.half_weights import Widened
from optimizer.raising import half_weights
from optimizer.widening import write_stored

HALVES = pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16])


def stored(kind: type, size: int = 16) -> ir.Model:
    """x times a weight that is stored in half precision."""
    name = np.dtype(kind).name
    case = graph(
        "w = Cast<to = 1>(h)  y = Mul(x, w)", inputs=f"float[B,{size}] x, {name}[{size}] h",
        output=f"float[B,{size}] y",
    )  # fmt: skip
    weight = case.graph.inputs.pop()
    weight.const_value = ir.tensor(np.linspace(-3, 4, size).astype(kind), name="h")
    case.graph.register_initializer(weight)
    return case


@HALVES
def test_a_stored_weight_becomes_a_float32_one_that_remembers(kind):
    case = stored(kind)
    assert apply(case, half_weights.run).applied == 1
    assert ops(case) == {"Mul": 1}
    weight = only(case, "Mul").inputs[1]
    assert weight.name == "h"
    assert weight.dtype == ir.DataType.FLOAT
    assert isinstance(weight.const_value, Widened)
    assert weight.const_value.stored.dtype.numpy() == kind


@HALVES
def test_what_no_pass_has_changed_is_stored_as_it_was(kind):
    case = stored(kind)
    before = case.graph.initializers["h"].const_value
    half_weights.run(case)
    assert write_stored(case) == 1
    assert ops(case) == {"Cast": 1, "Mul": 1}
    after = case.graph.initializers["h"].const_value
    assert after is before
    assert write_stored(case) == 0
    assert half_weights.run(case).applied == 1


def test_two_readers_share_the_cast_that_comes_first():
    case = graph(
        "w = Cast<to = 1>(h)  a = Add(x, x)  b = Mul(a, w)  y = Add(b, w)",
        inputs="float[B,2] x, float16[2] h", output="float[B,2] y",
    )  # fmt: skip
    weight = case.graph.inputs.pop()
    weight.const_value = ir.tensor(np.array([1, 2], np.float16), name="h")
    case.graph.register_initializer(weight)
    half_weights.run(case)
    write_stored(case)
    assert [node.op_type for node in case.graph] == ["Add", "Cast", "Mul", "Add"]


@pytest.mark.parametrize(
    "nodes",
    [
        "w = Cast<to = 11>(h)  z = Cast<to = 1>(w)  y = Mul(x, z)",  # to float64
        "z = Mul(h, h)  w = Cast<to = 1>(z)  y = Mul(x, w)",  # no constant
    ],
)
def test_other_casts_stay(nodes):
    case = graph(nodes, inputs="float[B,2] x, float16[2] h", output="float[B,2] y")
    refuses(case, half_weights.run, None)
