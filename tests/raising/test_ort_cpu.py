"""Forms that are written for ONNX Runtime's CPU kernels; int8 products are in ``legalize``."""

from __future__ import annotations

import numpy as np
import pytest
from contrib_case import apply as apply_in_runtime
from contrib_case import build, constant
from contrib_case import refuses as refuses_in_runtime
from rule_case import apply, graph, only, ops, refuses

from optimizer.raising import ort_cpu

CONSTANTS = (
    "float[4] w = {1, 2, 3, 4}, float far = {80}, float near = {50}, int64[1] last = {-1}, "
    "int64[1] middle = {1}, float step = {0.1}, uint8 mid = {128}, uint8 zero = {0}, "
    "int8 signed = {0}, uint8[4] mids = {128, 128, 128, 128}, float[4] steps = {0.1, 0.2, 0.3, 0.4}"
)
FLOOR = "m = ReduceMax(x, last)  l = Sub(m, far)  f = Max(x, l)  y = Softmax(f)"


def test_a_floor_under_scores_that_is_too_low_to_matter_goes_away() -> None:
    model = graph(FLOOR, constants=CONSTANTS)
    assert apply(model, ort_cpu.run).applied == 1
    assert ops(model) == {"Softmax": 1}


FLOORS = {
    "not low": FLOOR.replace("far", "near"),
    "of other scores": FLOOR.replace("ReduceMax(x", "ReduceMax(x2"),
    "over the tokens": FLOOR.replace("last", "middle"),
    "over all axes": FLOOR.replace("(x, last)", "(x)"),
    "of the rows, under the columns": FLOOR.replace("ReduceMax(", "ReduceMax<keepdims = 0>("),
    "of a Softmax over the tokens": FLOOR.replace("Softmax(", "Softmax<axis = 1>("),
    "of another function": FLOOR.replace("Softmax(", "Relu("),
}


@pytest.mark.parametrize("name", FLOORS)
def test_a_floor_stays(name: str) -> None:
    model = graph(FLOORS[name], inputs="float[4,4,4] x, float[4,4,4] x2", output="float[4,4,4] y",
                  constants=CONSTANTS)  # fmt: skip
    refuses(model, ort_cpu.run, None)


def test_a_sum_of_two_is_an_addition() -> None:
    model = graph("y = Sum(x, w)", constants=CONSTANTS)
    assert apply(model, ort_cpu.run).applied == 1
    assert ops(model) == {"Add": 1}


def test_a_sum_of_three_stays() -> None:
    refuses(graph("y = Sum(x, w, x)", constants=CONSTANTS), ort_cpu.run, None)


PAIR = "q = QuantizeLinear(x, step, mid)  d = DequantizeLinear(q, step, mid)  y = Neg(d)"


@pytest.mark.parametrize(
    "nodes",
    [
        PAIR,
        f"{PAIR[:-12]}  e = DequantizeLinear(q, step, mid)  y = Add(d, e)",
        "p = Mul(x, w)  " + PAIR.replace("(x,", "(p,"),
    ],
)
def test_codes_around_the_middle_become_signed(nodes: str) -> None:
    model = graph(nodes, constants=CONSTANTS)
    apply(model, ort_cpu.run)
    quantize = only(model, "QuantizeLinear")
    assert quantize.inputs[2].dtype.name == quantize.outputs[0].dtype.name == "INT8"


PAIRS = {
    "around another number": PAIR.replace("mid)", "zero)"),
    "that are signed": PAIR.replace("mid)", "signed)"),
    "of each column": PAIR.replace("QuantizeLinear(", "QuantizeLinear<axis = 2>(")
    .replace("DequantizeLinear(", "DequantizeLinear<axis = 2>(")
    .replace("step, mid", "steps, mids"),
    "read by another node": PAIR.replace("y = Neg(d)", "c = Cast<to = 1>(q)  y = Add(d, c)"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_codes_stay(name: str) -> None:
    refuses(graph(PAIRS[name], constants=CONSTANTS), ort_cpu.run, None)


def test_codes_that_are_an_output_stay() -> None:
    model = graph(PAIR, output="float[B,S,4] y, uint8[B,S,4] q", constants=CONSTANTS)
    refuses(model, ort_cpu.run, None)


def test_a_product_with_an_inverse_before_a_rounding_is_a_quotient() -> None:
    nodes = "m = Exp(x)  r = Reciprocal(m)  p = Mul(x, r)  q = QuantizeLinear(p, step, signed)"
    model = graph(f"{nodes}  y = DequantizeLinear(q, step, signed)", constants=CONSTANTS)
    assert apply(model, ort_cpu.run).applied == 1
    assert ops(model)["Div"] == 1
    assert ops(model)["Reciprocal"] == 0


# --- products of integers -------------------------------------------------------------------------

CODES = np.arange(-6, 6).reshape(4, 3)
INTEGERS = (
    f"{CONSTANTS}, int8[4,3] codes = {{{', '.join(map(str, CODES.reshape(-1)))}}}, "
    f"{constant('columns', np.array([0.1, 0.2, 0.3], np.float32))}, "
    f"{constant('b', np.array([1, 2, 3], np.float32))}, int8[3] none = {{0, 0, 0}}, "
    "int8[3] some = {0, 1, 0}, uint8 shifted = {100}, float other = {0.3}"
)
PRODUCT = "com.microsoft.MatMulIntegerToFloat"
LEFT = "q = QuantizeLinear(x, step, mid)"
PRODUCTS = {
    "plain": f"{LEFT}  y = {PRODUCT}(q, codes, step, columns, mid)",
    "a bias": f'{LEFT}  y = {PRODUCT}(q, codes, step, columns, mid, "", b)',
    "middles of the weight that are 0": (
        f"{LEFT}  y = {PRODUCT}(q, codes, step, columns, mid, none)"
    ),
    "a shift in the rounding": (
        f"{LEFT.replace('mid', 'shifted')}  y = {PRODUCT}(q, codes, step, columns, mid)"
    ),
    "two that share a rounding": (
        f"{LEFT}  a = {PRODUCT}(q, codes, step, columns, mid)"
        f'  c = {PRODUCT}(q, codes, step, columns, mid, "", b)  y = Add(a, c)'
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_of_integers_becomes_one_of_what_they_stand_for(name: str) -> None:
    model = build(PRODUCTS[name], inputs="float[B,S,4] x", outputs="float[B,S,3] y",
                  constants=INTEGERS)  # fmt: skip
    apply_in_runtime(model, ort_cpu.run)
    assert not any(node.domain for node in model.graph)
    assert "com.microsoft" not in model.graph.opset_imports
    assert ops(model)["QuantizeLinear"] == 1


FAULTS = {
    "its activation is not quantized by a QuantizeLinear": (
        f"y = {PRODUCT}(u, codes, step, columns, mid)"
    ),
    "its weight is not a constant int8 matrix": f"{LEFT}  y = {PRODUCT}(q, v, step, columns, mid)",
    "the zero point of its weight is not 0": (
        f"{LEFT}  y = {PRODUCT}(q, codes, step, columns, mid, some)"
    ),
    "the zero point of its activation is not 128": (
        f"{LEFT}  y = {PRODUCT}(q, codes, step, columns, zero)"
    ),
    "it does not scale its activation by the scale it was quantized with": (
        f"{LEFT}  y = {PRODUCT}(q, codes, other, columns, mid)"
    ),
    "the zero point of its activation is not one constant uint8": (
        "q = QuantizeLinear(x, step, z)  y = " + f"{PRODUCT}(q, codes, step, columns, mid)"
    ),
}


@pytest.mark.parametrize("reason", FAULTS)
def test_a_product_of_integers_stays_because(reason: str) -> None:
    model = build(FAULTS[reason], outputs="float[B,S,3] y", constants=INTEGERS,
                  inputs="float[B,S,4] x, uint8[B,S,4] u, int8[4,3] v, uint8 z")  # fmt: skip
    refuses_in_runtime(model, ort_cpu.run, reason)


def test_an_attention_with_a_cache_per_row_says_why_it_stays() -> None:
    model = build(
        "y = com.microsoft.GroupQueryAttention<num_heads = 1, kv_num_heads = 1>"
        '(x, x, x, "", "", l, t)', inputs="float[B,S,8] x, int32[B] l, int32 t",
    )  # fmt: skip
    refuses_in_runtime(model, ort_cpu.run, "each row keeps its own cache")
