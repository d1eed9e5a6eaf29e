from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_case import apply, graph, only, ops, refuses

from optimizer.raising import batches

#: x [B, 2, S, 4] -> m [B*2, S, 4]; what the rule makes of them is [B, 2, ..] again.
FLAT = "int64[3] flat = {-1, 3, 4}, int64[3] wide = {-1, 3, 3}, int64[3] odd = {-1, 6, 2}"
INPUTS = "float[B,2,3,4] x, float[B,2,3,4] z, float[B,2,3,3] w"
MERGED = "m = Reshape(x, flat)"
OTHER = "n = Reshape(z, flat)"

MOVED = {
    "an activation": (f"{MERGED}  y = Relu(m)", "3,4"),
    "a clamp": (f"{MERGED}  y = Clip(m, low, high)", "3,4"),
    "a transpose of the last axes": (f"{MERGED}  y = Transpose<perm = [0, 2, 1]>(m)", "4,3"),
    "a Softmax over the last axis": (f"{MERGED}  y = Softmax(m)", "3,4"),
    "a Softmax over axis 2": (f"{MERGED}  y = Softmax<axis = 2>(m)", "3,4"),
    "a Softmax over the rows": (f"{MERGED}  y = Softmax<axis = 1>(m)", "3,4"),
    "a Softmax over axis -2": (f"{MERGED}  y = Softmax<axis = -2>(m)", "3,4"),
    "a product of two": (f"{MERGED}  {OTHER}  t = Reshape(w, wide)  y = MatMul(t, n)", "3,4"),
    "a sum of two": (f"{MERGED}  {OTHER}  y = Add(m, n)", "3,4"),
    "a sum with a number": (f"{MERGED}  y = Sub(half, m)", "3,4"),
    "a sum with a vector": (f"{MERGED}  y = Add(m, vector)", "3,4"),
    "a sum with a matrix": (f"{MERGED}  y = Mul(m, matrix)", "3,4"),
    "a sum with one for all heads": (f"{MERGED}  y = Add(m, single)", "3,4"),
    "a choice": (f"{MERGED}  k = Greater(m, single)  y = Where(k, m, half)", "3,4"),
    "the largest of three": (f"{MERGED}  {OTHER}  y = Max(m, vector, n)", "3,4"),
}


@pytest.mark.parametrize("name", MOVED)
def test_the_heads_come_apart_before(name: str) -> None:
    nodes, size = MOVED[name]
    # The Reshape that follows stands for the one that restores the heads.
    model = graph(
        f"{nodes.replace('y = ', 'r = ')}  y = Reshape(r, heads)",
        inputs=INPUTS, output=f"float[B,2,{size}] y",
        constants=f"{FLAT}, int64[4] heads = {{-1, 2, {size}}}, float half = {{0.5}}, "
        "float low = {-0.4}, float high = {0.3}, float[4] vector = {1, -2, 3, 0.5}, "
        "float[3,4] matrix = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3}, "
        "float[1,3,1] single = {1, 0.1, -1}",
    )  # fmt: skip
    assert apply(model, batches.run).applied >= 1
    flat = model.graph[-1].inputs[0].producer()
    moved = flat.inputs[0].producer()
    assert (flat.op_type, moved.op_type) == ("Reshape", re.findall(r"= ([A-Z]\w+)", nodes)[-1])


def test_what_is_merged_by_itself_is_taken_apart() -> None:
    model = graph(f"{MERGED}  r = Add(mask, m)  y = Reshape(r, heads)",
                  inputs="float[3,2,3,4] x, float[6,3,4] mask", output="float[3,2,3,4] y",
                  constants=f"{FLAT}, int64[4] heads = {{3, 2, 3, 4}}")  # fmt: skip
    assert apply(model, batches.run).applied == 1
    assert {"Div", "Shape"} <= set(ops(model))


STAY = {
    "a transpose of the merged axis": (f"{MERGED}  r = Transpose<perm = [1, 0, 2]>(m)", "3,N,4"),
    "a Softmax over the merged axis": (f"{MERGED}  r = Softmax<axis = 0>(m)", "N,3,4"),
    "a Softmax over axis -3": (f"{MERGED}  r = Softmax<axis = -3>(m)", "N,3,4"),
    "a product by a weight": (f"{MERGED}  r = MatMul(m, weight)", "N,3,4"),
    "a merge that takes rows along": ("m = Reshape(x, odd)  r = Relu(m)", "N,6,2"),
    "a sum with another merge": (f"{MERGED}  t = Reshape(u, flat)  r = Add(m, t)", "N,3,4"),
    "a product with another merge": (
        f"{MERGED}  t = Reshape(k, tall)  r = MatMul(m, t)",
        "N,3,3",
    ),
    "a sum with another batch": (f"{MERGED}  r = Add(m, v)", "N,3,4"),
    "a merge of three axes into two": ("m = Reshape(x, two)  r = Relu(m)", "N,4"),
}


@pytest.mark.parametrize("name", STAY)
def test_the_heads_stay_merged_before(name: str) -> None:
    nodes, size = STAY[name]
    others = "float[2,B,3,4] u, float[2,B,4,3] k, float[N,3,4] v"
    model = graph(f"{nodes}  y = Neg(r)", inputs=f"{INPUTS}, {others}", output=f"float[{size}] y",
                  constants=f"{FLAT}, float[4,4] weight = {{{', '.join('1' * 16)}}}, "
                  "int64[2] two = {-1, 4}, int64[3] tall = {-1, 4, 3}")  # fmt: skip
    refuses(model, batches.run, None)


def test_a_graph_output_stays_where_it_is() -> None:
    model = graph(f"{MERGED}  y = Relu(m)", inputs=INPUTS, output="float[N,3,4] y", constants=FLAT)
    refuses(model, batches.run, None)


def test_sizes_that_are_not_known_are_computed() -> None:
    model = graph(
        "s = Shape(x)  a = Gather(s, i0)  h = Gather(s, i1)  n = Mul(a, h)  l = Slice(s, i2, i4)"
        "  t = Concat<axis = 0>(n, l)  m = Reshape(x, t)  r = Relu(m)  y = Reshape(r, s)",
        inputs="float[B,H,S,C] x", output="float[B,H,S,C] y",
        constants="int64[1] i0 = {0}, int64[1] i1 = {1}, int64[1] i2 = {2}, int64[1] i4 = {4}",
    )  # fmt: skip
    apply(model, batches.run)
    assert only(model, "Relu").inputs[0].name == "x"


@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    rows=st.integers(1, 3),
    size=st.integers(1, 3),
    op_type=st.sampled_from(["Add", "Sub", "Mul", "Max"]),
    widened=st.tuples(*[st.booleans()] * 3),
    rank=st.integers(0, 3),
    swapped=st.booleans(),
)
@settings(deadline=None, max_examples=60, derandomize=True)
def test_any_operand_that_broadcasts(
    batch: int, heads: int, rows: int, size: int, op_type: str, widened: tuple[bool, ...],
    rank: int, swapped: bool,
) -> None:  # fmt: skip
    whole = (batch * heads, rows, size)
    other = [n if wide else 1 for n, wide in zip(whole, widened, strict=True)][3 - rank :]
    sides = "o, m" if swapped else "m, o"
    size_of_other = other if rank else ""
    model = graph(
        f"m = Reshape(x, flat)  r = {op_type}({sides})  y = Reshape(r, apart)",
        inputs=f"float[{batch},{heads},{rows},{size}] x, float{size_of_other} o",
        output=f"float[{batch},{heads},{rows},{size}] y",
        constants=f"int64[3] flat = {{{', '.join(map(str, whole))}}}, "
        f"int64[4] apart = {{{batch}, {heads}, {rows}, {size}}}",
    )  # fmt: skip
    assert apply(model, batches.run).applied == (heads != 1)
