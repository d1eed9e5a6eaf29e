from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_case import apply, graph, ops, refuses

from optimizer.raising import rows
from optimizer.raising.shapes import Shapes

WEIGHT = "1, 2, 3, 4, 5, 6, -1, 2, -3, 4, -5, 6, 1, 1, 1, 1, 1, 1, 2, 0, 2, 0, 2, 0"
CONSTANTS = (
    "int64[2] flat = {-1, 4}, int64[3] apart = {-1, 3, 4}, int64[3] thirds = {-1, 3, 6}, "
    f"float[4,6] w = {{{WEIGHT}}}, int8[4,6] codes = {{{WEIGHT}}}, "
    "float[4] g = {2, 0.5, -1, 3}, float half = {0.5}, float[1] one = {1.5}, float step = {0.1}, "
    "float[4] steps = {0.1, 0.2, 0.3, 0.4}, int8 zero = {0}, float[1,4] row = {1, 2, 3, 4}, "
    "float[4,6] other = {" + ", ".join("1" * 24) + "}, int64[2] twelve = {-1, 12}, "
    "float low = {-0.3}, float high = {0.4}, uint8 middle = {3}"
)
MOVED = {
    "a layer": "MatMul(m, w)",
    "a layer of int8": "MatMul(m, e)",
    "a product of integers": "MatMulInteger(i, codes, n)",
    "an activation": "Gelu(m)",
    "a clamp": "Clip(m, low, high)",
    "a norm": "LayerNormalization(m, g, g)",
    "a norm without shift": "RMSNormalization<axis = -1>(m, g)",
    "a rounding": "QuantizeLinear(m, step, zero)",
    "a vector": "Add(m, g)",
    "a vector first": "Sub(g, m)",
    "a number": "Mul(m, half)",
    "one number": "Div(m, one)",
    "another that is flat": "Add(m, o)",
}


@pytest.mark.parametrize("name", MOVED)
def test_rows_keep_their_batch_below(name: str) -> None:
    node = MOVED[name]
    integers = "MatMulInteger" in node
    wide = "w)" in node or "e)" in node or integers
    kind = "int8" if "Quantize" in node else "int32" if integers else "float"
    before = "i, s, n = DynamicQuantizeLinear(m)  " if integers else ""
    before += "e = DequantizeLinear(codes, step)  " if "e)" in node else ""
    before += "o = Reshape(z, flat)  " if "o)" in node else ""
    end = f"y = Reshape(r, {'thirds' if wide else 'apart'})"
    model = graph(
        f"m = Reshape(x, flat)  {before}r = {node}  {end}",
        inputs="float[B,3,4] x, float[B,3,4] z", output=f"{kind}[B,3,{6 if wide else 4}] y",
        constants=CONSTANTS,
    )  # fmt: skip
    assert apply(model, rows.run).applied == 1 + integers
    flat = model.graph[-1].inputs[0].producer()
    moved = flat.inputs[0].producer()
    assert (flat.op_type, moved.op_type) == ("Reshape", re.match(r"\w+", node)[0])
    sources = {value.name for value in moved.inputs} | {"x" if integers else ""}
    assert "x" in sources


STAY = {
    "a Softmax": ("m = Reshape(x, flat)  y = Softmax(m)", "N,4"),
    "a norm over all of it": (
        "m = Reshape(x, flat)  y = LayerNormalization<axis = 0>(m, all)", "12,4",
    ),
    "a product of two values": ("m = Reshape(x, flat)  y = MatMul(m, u)", "N,6"),
    "a product from the left": ("m = Reshape(x, flat)  y = MatMul(t, m)", "K,4"),
    "a scale per row": ("m = Reshape(x, flat)  y = QuantizeLinear<axis = 0>(m, t1)", "12,4"),
    "scales per column": ("m = Reshape(x, flat)  y = QuantizeLinear<axis = 1>(m, steps)", "N,4"),
    "a matrix": ("m = Reshape(x, flat)  y = Add(m, row)", "N,4"),
    "rows of another width": ("m = Reshape(x, twelve)  y = Relu(m)", "N,12"),
    "another that is flattened from elsewhere": (
        "m = Reshape(x, flat)  o = Reshape(z, flat)  y = Add(m, o)", "N,4",
    ),
    "a computed limit": ("m = Reshape(x, flat)  y = Clip(m, c)", "N,4"),
    "what was flat before": ("y = Relu(f)", "N,4"),
    "rows that are rows already": ("m = Reshape(f, flat)  y = Relu(m)", "N,4"),
}  # fmt: skip


@pytest.mark.parametrize("name", STAY)
def test_rows_stay_flat_below(name: str) -> None:
    nodes, size = STAY[name]
    batch = "4" if "12" in size and "twelve" not in nodes else "B"
    ones = ", ".join("1" * 48)
    twelve = ", ".join(["0.1"] * 12)
    kind = "uint8" if "Quantize" in nodes else "float"
    model = graph(
        nodes, output=f"{kind}[{size}] y",
        inputs=f"float[{batch},3,4] x, float[3,{batch},4] z, float[4,6] u, float[K,N] t, float c, "
        "float[N,4] f",
        constants=f"{CONSTANTS}, float[12,4] all = {{{ones}}}, float[12] t1 = {{{twelve}}}",
    )  # fmt: skip
    refuses(model, rows.run, None)


def test_middles_per_row_are_not_those_of_rows_with_a_batch() -> None:
    model = graph(
        "m = Reshape(x, flat)  y = MatMulInteger(m, codes, rows)", inputs="uint8[1,3,4] x",
        output="int32[3,6] y", constants=f"{CONSTANTS}, uint8[3] rows = {{1, 2, 3}}",
    )  # fmt: skip
    refuses(model, rows.run, None)


def test_a_middle_of_one_number_belongs_to_all_rows() -> None:
    model = graph("m = Reshape(x, flat)  y = MatMulInteger(m, codes, middle)",
                  inputs="uint8[1,3,4] x", output="int32[3,6] y", constants=CONSTANTS)  # fmt: skip
    assert apply(model, rows.run).applied == 1


def test_a_flatten_of_rows_is_seen_through_and_another_is_not() -> None:
    for axis, applied in ((2, 1), (1, 0)):
        model = graph(f"m = Flatten<axis = {axis}>(x)  y = Relu(m)", inputs="float[B,3,4] x",
                      output=f"float[N,{4 if axis == 2 else 12}] y")  # fmt: skip
        report = apply(model, rows.run)
        assert report.applied == applied


def test_all_outputs_of_a_rounding_keep_their_names() -> None:
    model = graph("m = Reshape(x, flat)  i, s, n = DynamicQuantizeLinear(m)", constants=CONSTANTS,
                  inputs="float[B,3,4] x", output="uint8[N,4] i, float s, uint8 n")  # fmt: skip
    assert apply(model, rows.run).applied == 1
    assert ops(model) == {"DynamicQuantizeLinear": 1, "Reshape": 1}


@given(
    shape=st.lists(st.integers(1, 3), min_size=2, max_size=4),
    op_type=st.sampled_from(["Add", "Sub", "Mul", "Max"]),
    other=st.sampled_from([(), (1,), (2,), (1, 2), (1, 1)]),
    swapped=st.booleans(),
)
@settings(deadline=None, max_examples=60, derandomize=True)
def test_any_operand_of_a_sum(
    shape: list[int], op_type: str, other: tuple[int, ...], swapped: bool
) -> None:
    leading = shape[:-1]
    count, width = 1, 1 if shape[-1] == 1 else 2
    for size in leading:
        count *= size
    result = max(width, other[-1] if other else 1)
    model = graph(
        f"m = Reshape(x, flat)  r = {op_type}({'o, m' if swapped else 'm, o'})  y = Neg(r)",
        inputs=f"float{[*leading, width]} x, float{list(other) if other else ''} o",
        output=f"float[{count},{result}] y",
        constants=f"int64[2] flat = {{{count}, {width}}}",
    )  # fmt: skip
    apply(model, rows.run)


def test_the_models_last_cast_stays_the_last() -> None:
    """Who stores half precision writes it there again, and so on."""
    case = graph("m = Reshape(x, flat)  y = Cast<to = 10>(m)", inputs="float[B,3,4] x",
                 output="float16[N,4] y", constants=CONSTANTS)  # fmt: skip
    refuses(case, rows.run, None)


def test_heads_are_joined_alone_before_a_product() -> None:
    case = graph(
        "m = Reshape(x, flat)  p = MatMul(m, w)  y = Reshape(p, thirds)",
        inputs="float[B,3,2,2] x", output="float[B,3,6] y", constants=CONSTANTS,
    )  # fmt: skip
    assert apply(case, rows.run).applied == 1
    (product,) = [node for node in case.graph if node.op_type == "MatMul"]
    assert len(Shapes().of(product.inputs[0])) == 3


def test_tokens_that_are_joined_with_heads_stay() -> None:
    case = graph(
        "m = Reshape(x, twelve)  y = MatMul(m, tall)",
        inputs="float[B,3,4,1] x", output="float[N,6] y",
        constants=CONSTANTS + ", float[12,6] tall = {" + ", ".join("1" * 72) + "}",
    )  # fmt: skip
    refuses(case, rows.run, None)
