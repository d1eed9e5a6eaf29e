"""The tables of rotary embeddings, and embeddings of a part of each head."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from rule_case import apply, graph, only, ops, refuses

from optimizer.raising import rotary
from optimizer.raising.base import RuleReport

CONSTANTS = (
    "int64[4] heads = {0, 0, 2, 4}, int64[4] eight = {0, 0, 2, 8}, int64[1] zero = {0}, "
    "int64[1] one = {1}, int64[1] two = {2}, int64[1] three = {3}, int64[1] four = {4}, "
    "int64[1] last = {-1}, int64[1] end = {9223372036854775807}, int64[1] six = {6}, "
    "int64[2] lead = {1, 4}, int64[2] turned = {4, 1}, int64[2] negative = {-1, 1}, "
    "int64[5] twice = {1, 1, 1, 1, 2}, int64[4] flat = {0, 0, 0, 4}, "
    "int64[4] four_axes = {0, 0, 2, 1}, int64[4] twice4 = {1, 1, 1, 2}, "
    "int64[3] flat3 = {0, 0, 4}, "
    "int64[2] sizes = {4, 4}, float[4] row = {0.1, 0.7, 0.1, 0.7}, int64 place = {1}, "
    "float[4] odd = {0.1, 0.7, 0.3, 0.7}, float ratio = {0.5}, float[1,1,1,1] ratio4 = {0.5}, "
    "float[9,4] known = {"
    + ", ".join(f"{n % 9}.5, {n % 9}.25" for n in range(9) for _ in "ab")
    + "}"
)
HEADS = "r = Reshape(x, heads)  h = Transpose<perm = [0, 2, 1, 3]>(r)"
HALVES = (
    "a = Slice(h, zero, two, three)  b = Slice(h, two, end, last)  n = Neg(b)"
    "  t = Concat<axis = -1>(n, a)"
)
PAIRS = (
    "e0 = Slice(h, zero, end, last, two)  o0 = Slice(h, one, end, last, two)  n = Neg(o0)"
    "  n1 = Unsqueeze(n, last)  e1 = Unsqueeze(e0, last)  m = Concat<axis = -1>(n1, e1)"
    "  t = Reshape(m, flat)"
)
SUM = "p = Mul(h, c)  q = Mul(t, s)  y = Add(p, q)"


def run(model: ir.Model) -> RuleReport:
    return RuleReport.total([rotary.run(model), rotary.join_heads(model)])


def case(*parts: str, inputs: str = "float[B,S,2] f", output: str = "float[B,2,S,4] y") -> ir.Model:
    return graph("  ".join(parts), inputs=f"float[B,S,8] x, {inputs}", output=output,
                 constants=CONSTANTS)  # fmt: skip


#: what gives the angles g [B, 1, S, 4], each twice in a row
REPEATED = {
    "both axes at once": (
        "u = Unsqueeze(f, lead)  w = Expand(u, twice)  g = Reshape(w, flat)", "float[B,S,2] f",
    ),
    "both axes, the last one first": (
        "u = Unsqueeze(f, turned)  w = Expand(u, twice)  g = Reshape(w, flat)", "float[B,S,2] f",
    ),
    "both axes, one from the end": (
        "u = Unsqueeze(f, negative)  w = Expand(u, twice)  g = Reshape(w, flat)", "float[B,S,2] f",
    ),
    "the axis of heads after": (
        "u = Unsqueeze(f, last)  w = Expand(u, twice4)  k = Reshape(w, flat3)"
        "  g = Unsqueeze(k, one)", "float[B,S,2] f",
    ),
    "the axis of heads before": (
        "k = Unsqueeze(f, one)  u = Unsqueeze(k, last)  w = Expand(u, twice)  g = Reshape(w, flat)",
        "float[B,S,2] f",
    ),
    "a Reshape in the place of an Unsqueeze": (
        "u = Reshape(f, four_axes)  w = Expand(u, twice4)  k = Reshape(w, flat3)"
        "  g = Unsqueeze(k, one)", "float[B,S,2] f",
    ),
    "one batch for all": (
        "u = Unsqueeze(f, lead)  w = Expand(u, twice)  g = Reshape(w, flat)", "float[1,S,2] f",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REPEATED)
def test_angles_are_repeated_with(name: str) -> None:
    angles, inputs = REPEATED[name]
    model = case(angles, "c = Cos(g)  s = Sin(g)", HEADS, PAIRS, SUM, inputs=inputs)
    assert apply(model, run).applied
    node = only(model, "RotaryEmbedding")
    assert node.attributes["interleaved"].as_int() == 1
    assert [len(table.shape or "...") for table in node.inputs[1:]] == [3, 3]
    assert not ops(model)["Slice"] + ops(model)["Concat"] * (name != "one batch for all")


@pytest.mark.parametrize("layout", [HALVES, PAIRS])
def test_angles_in_the_other_order_are_others(layout: str) -> None:
    together = "u = Unsqueeze(f, lead)  w = Expand(u, twice)  g = Reshape(w, flat)"
    apart = "k = Concat<axis = -1>(f, f)  g = Unsqueeze(k, one)"
    angles = apart if layout is PAIRS else together
    model = case(angles, "c = Cos(g)  s = Sin(g)", HEADS, layout, SUM)
    refuses(model, run, "are not known to be equal")


SAME = "k = Concat<axis = -1>(f, f)"
TABLES = {
    "a scale": f"{SAME}  k2 = Mul(k, ratio)  g = Unsqueeze(k2, one)  c = Cos(g)  s = Sin(g)",
    "a scale behind": f"{SAME}  g = Unsqueeze(k, one)  c0 = Cos(g)  s0 = Sin(g)"
    "  c = Mul(ratio, c0)  s = Div(s0, ratio)",
    "a scale that adds the axis of the heads": (
        f"{SAME}  k1 = Gather(k, place)  k2 = Mul(k1, ratio4)  c = Cos(k2)  s = Sin(k2)"
    ),
    "casts": f"{SAME}  d = Cast<to = 11>(k)  c0 = Cos(d)  s0 = Sin(d)  c1 = Cast<to = 1>(c0)"
    "  s1 = Cast<to = 1>(s0)  c = Unsqueeze(c1, one)  s = Unsqueeze(s1, one)",
    "a lookup in a constant": "c0 = Gather(known, i)  s0 = Gather(known, i)"
    "  c = Unsqueeze(c0, one)  s = Unsqueeze(s0, one)",
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_narrowed_through(name: str) -> None:
    model = case(TABLES[name], HEADS, HALVES, SUM, inputs="float[B,S,2] f, int64[B,S] i")
    apply(model, run)
    assert ops(model)["RotaryEmbedding"] == 1


UNKNOWN = {
    "a row of numbers that is looked up one by one": (
        "c = Gather(row, i)  s = Gather(row, i)", "int64[B,1,S,4] i", "not known to be equal",
    ),
    "a number for each angle": (
        "k = Unsqueeze(f, one)  g = Mul(k, odd)  c = Cos(g)  s = Sin(g)", "float[B,S,4] f",
        "not known to be equal",
    ),
    "halves joined along another axis": (
        "k = Concat<axis = 1>(f, f)  g = Unsqueeze(k, one)  c = Cos(g)  s = Sin(g)",
        "float[B,1,4] f", "shape is not [batch, 1, sequence, size of the head]",
    ),
    "three parts": (
        "k = Concat<axis = -1>(f, f, z)  g = Unsqueeze(k, one)  c = Cos(g)  s = Sin(g)",
        "float[B,S,1] f, float[B,S,2] z", "not known to be equal",
    ),
    "a table for each head": (
        "k = Concat<axis = -1>(f, f)  c = Cos(k)  s = Sin(k)", "float[B,2,S,2] f",
        "shape is not [batch, 1, sequence, size of the head]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_table_stays_that_is(name: str) -> None:
    nodes, inputs, reason = UNKNOWN[name]
    model = case(nodes, HEADS, HALVES, SUM, inputs=inputs)
    refuses(model, run, reason)


# --- a part of each head --------------------------------------------------------------------------

PART = "RotaryEmbedding(a, f, f)"
WIDE = "r = Reshape(x, eight)  h = Transpose<perm = [0, 2, 1, 3]>(r)"
PARTS = {
    "slices": f"{WIDE}  a = Slice(h, zero, four, last)  b = Slice(h, four, end, last)  t = {PART}"
    "  y = Concat<axis = -1>(t, b)",
    "a split": f"{WIDE}  a, b = Split<axis = 3>(h, sizes)  t = {PART}  y = Concat<axis = 3>(t, b)",
    "a cut before the heads are turned": (
        "h = Reshape(x, eight)  a0 = Slice(h, zero, four, last)  b0 = Slice(h, four, end, last)"
        f"  a = Transpose<perm = [0, 2, 1, 3]>(a0)  t = {PART}"
        "  k = Transpose<perm = [0, 2, 1, 3]>(t)  z = Concat<axis = -1>(k, b0)"
        "  y = Transpose<perm = [0, 2, 1, 3]>(z)"
    ),
    "a cut on one side of the turn": (
        f"r = Reshape(x, eight)  h = Transpose<perm = [0, 2, 1, 3]>(r)"
        f"  a0 = Slice(r, zero, four, last)  b = Slice(h, four, end, last)"
        f"  a = Transpose<perm = [0, 2, 1, 3]>(a0)  t = {PART}  y = Concat<axis = -1>(t, b)"
    ),
}  # fmt: skip


def partial(nodes: str, output: str = "float[B,2,S,8] y") -> ir.Model:
    return graph(nodes, inputs="float[B,S,16] x, float[B,S,2] f", output=output,
                 constants=CONSTANTS)  # fmt: skip


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("name", PARTS)
def test_the_rest_of_a_head_is_part_of_the_operator(name: str, interleaved: int) -> None:
    attributes = f"RotaryEmbedding<interleaved = {interleaved}>"
    model = partial(PARTS[name].replace("RotaryEmbedding", attributes))
    apply(model, run)
    node = only(model, "RotaryEmbedding")
    assert node.attributes["rotary_embedding_dim"].as_int() == 4
    assert node.attributes["interleaved"].as_int() == interleaved
    assert node.inputs[0].name == "x"
    assert not ops(model)["Slice"] + ops(model)["Split"] + ops(model)["Concat"]


SOURCES = "the two parts of a partial rotary embedding have different sources"
WHOLE = "the two parts of a partial rotary embedding are not the whole head"
CUTS = "a = Slice(h, zero, four, last)  b = Slice(h, four, end, last)"
REFUSED = {
    "the rest comes from another value": (
        CUTS.replace("b = Slice(h,", "o = Neg(h)  b = Slice(o,"), "(t, b)", SOURCES, 8,
    ),
    "the rest is no part": (CUTS.replace("b = Slice(h, four, end, last)", "b = Neg(a)"), "(t, b)",
                            SOURCES, 8),
    "numbers are left out": (CUTS.replace("four, end", "six, end"), "(t, b)", WHOLE, 6),
    "numbers come twice": (CUTS.replace("four, end", "two, end"), "(t, b)", WHOLE, 10),
    "the end is turned": ("b = Slice(h, zero, four, last)  a = Slice(h, four, end, last)", "(t, b)",
                          WHOLE, 8),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_part_stays_apart_where(name: str) -> None:
    cuts, order, reason, size = REFUSED[name]
    model = partial(f"{WIDE}  {cuts}  t = {PART}  y = Concat<axis = -1>{order}",
                    output=f"float[B,2,S,{size}] y")  # fmt: skip
    refuses(model, rotary.run, reason)


def test_rows_that_come_twice_are_no_halves() -> None:
    """As many rows as half of the angles: joined along the sequence they look like them."""
    model = graph(
        f"k = Concat<axis = 1>(f, f)  g = Unsqueeze(k, one)  c = Cos(g)  s = Sin(g)  {HEADS}"
        f"  {HALVES}  {SUM}", inputs="float[B,4,8] x, float[B,2,4] f",
        output="float[B,2,4,4] y", constants=CONSTANTS,
    )  # fmt: skip
    refuses(model, run, "halves are not known to be equal")


def test_a_part_of_flat_heads_is_no_part_of_each_head() -> None:
    """Two heads of size 4 in the first 8 columns; as one head of 16, they would turn together."""
    model = graph(
        "a = Slice(x, zero, eight0, last)  b = Slice(x, eight0, end, last)"
        "  t = RotaryEmbedding<num_heads = 2>(a, f, f)  y = Concat<axis = -1>(t, b)",
        inputs="float[B,S,16] x, float[B,S,2] f", output="float[B,S,16] y",
        constants=CONSTANTS + ", int64[1] eight0 = {8}",
    )  # fmt: skip
    refuses(model, rotary.run, WHOLE)
