from __future__ import annotations

import onnx_ir as ir
import pytest
from rule_case import apply, graph, only, ops, refuses

from optimizer.raising import rotary
from optimizer.raising.base import RuleReport

# x [B,S,8]: two heads of size 4. f [B,S,2] are the angles.
CONSTANTS = (
    "int64[4] heads = {0, 0, 2, 4}, int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, "
    "int64[1] three = {3}, int64[1] last = {-1}, int64[1] end = {9223372036854775807}"
)
IO = {
    "inputs": "float[B,S,8] x, float[B,S,2] f",
    "output": "float[B,2,S,4] y",
    "constants": CONSTANTS,
}
TABLES = (
    "ff = Concat<axis = -1>(f, f)  c = Cos(ff)  s = Sin(ff)  "
    "c4 = Unsqueeze(c, one)  s4 = Unsqueeze(s, one)"
)
HEADS = "r = Reshape(x, heads)  h = Transpose<perm = [0, 2, 1, 3]>(r)"
HALVES = (
    "a = Slice(h, zero, two, three)  b = Slice(h, two, end, last)  n = Neg(b)  "
    "t = Concat<axis = -1>(n, a)"
)
SUM = "p = Mul(h, c4)  q = Mul(t, s4)  y = Add(p, q)"


def raise_all(model: ir.Model) -> RuleReport:
    return RuleReport.total([rotary.run(model), rotary.join_heads(model)])


def case(*parts: str, **changes: str) -> ir.Model:
    return graph("  ".join(parts), **(IO | changes))


def assert_joined(model: ir.Model, dim: int = 0) -> None:
    """One 3-D RotaryEmbedding on the input itself, with tables of half the width."""
    node = only(model, "RotaryEmbedding")
    assert node.inputs[0] is model.graph.inputs[0]
    assert node.attributes["num_heads"].as_int() == 2
    assert node.attributes["interleaved"].as_int() == 0
    assert node.attributes["rotary_embedding_dim"].as_int() == dim
    assert len(node.inputs) == 3
    assert not ops(model)["Neg"] + ops(model)["Slice"]


def test_rotated_halves_become_the_operator_on_joined_heads() -> None:
    model = case(TABLES, HEADS, HALVES, SUM)
    assert apply(model, raise_all).applied
    assert_joined(model)
    cos, sin = only(model, "RotaryEmbedding").inputs[1:]
    assert cos.producer().op_type == "Cos"
    assert sin.producer().op_type == "Sin"
    assert cos.producer().inputs[0] is model.graph.inputs[1]


@pytest.mark.parametrize(
    "total",
    [
        "p = Mul(c4, h)  q = Mul(s4, t)  y = Add(q, p)",
        "p = Mul(h, c4)  q = Mul(s4, t)  y = Add(q, p)",
    ],
)
def test_operands_come_in_any_order(total: str) -> None:
    model = case(TABLES, HEADS, HALVES, total)
    apply(model, raise_all)
    assert_joined(model)


def test_halves_may_come_from_one_split() -> None:
    halves = "a, b = Split<axis = -1, num_outputs = 2>(h)  n = Neg(b)  t = Concat<axis = 3>(n, a)"
    model = case(TABLES, HEADS, halves, SUM)
    apply(model, raise_all)
    assert_joined(model)


def test_a_scaled_table_is_narrowed_through_the_scale() -> None:
    tables = TABLES.replace("c4 = Unsqueeze(c, one)", "cc = Mul(c, k)  c4 = Unsqueeze(cc, one)")
    model = case(tables, HEADS, HALVES, SUM, constants=CONSTANTS + ", float k = {1.25}")
    apply(model, raise_all)
    assert_joined(model)


def test_a_partial_embedding_sets_its_width() -> None:
    inputs = "float[B,S,8] x, float[B,S,1] f"
    parts = "u = Slice(h, zero, two, three)  v = Slice(h, two, end, three)"
    halves = (
        "a = Slice(u, zero, one, three)  b = Slice(u, one, end, three)  n = Neg(b)  "
        "t = Concat<axis = -1>(n, a)"
    )
    total = "p = Mul(u, c4)  q = Mul(t, s4)  w = Add(p, q)  y = Concat<axis = -1>(w, v)"
    model = case(TABLES, HEADS, parts, halves, total, inputs=inputs)
    apply(model, raise_all)
    assert_joined(model, dim=2)


def test_tables_looked_up_in_a_constant_stay_one_lookup_each() -> None:
    rows = ", ".join(f"{v}" for p in range(3) for v in 2 * (0.5 + p, 2.5 * p))
    tables = (
        "c = Gather(table, ids)  c4 = Unsqueeze(c, one)  s = Gather(more, ids)  "
        "s4 = Unsqueeze(s, one)"
    )
    constants = f"{CONSTANTS}, float[3,4] table = {{{rows}}}, float[3,4] more = {{{rows}}}"
    inputs = "float[B,S,8] x, int64[B,S] ids"
    model = case(tables, HEADS, HALVES, SUM, inputs=inputs, constants=constants)
    apply(model, raise_all)
    assert_joined(model)
    lookups = [node for node in model.graph if node.op_type == "Gather"]
    assert [tuple(node.inputs[0].shape) for node in lookups] == [(3, 2), (3, 2)]


def test_tables_of_batch_one_are_expanded() -> None:
    model = case(TABLES, HEADS, HALVES, SUM, inputs="float[B,S,8] x, float[1,S,2] f")
    apply(model, raise_all)
    assert_joined(model)
    assert ops(model)["Expand"] == 2


def test_two_layers_share_one_cos_and_one_sin() -> None:
    second = (
        "r2 = Reshape(x2, heads)  h2 = Transpose<perm = [0, 2, 1, 3]>(r2)",
        "a2 = Slice(h2, zero, two, three)  b2 = Slice(h2, two, end, three)  n2 = Neg(b2)",
        "t2 = Concat<axis = -1>(n2, a2)  p2 = Mul(h2, c4)  q2 = Mul(t2, s4)  z = Add(p2, q2)",
        "y = Sub(y1, z)",
    )
    inputs = "float[B,S,8] x, float[1,S,2] f, float[B,S,8] x2"
    model = case(TABLES, HEADS, HALVES, SUM.replace("y =", "y1 ="), *second, inputs=inputs)
    apply(model, raise_all)
    first, other = (n for n in model.graph if n.op_type == "RotaryEmbedding")
    assert list(first.inputs[1:]) == list(other.inputs[1:])


def test_an_exported_operator_moves_before_the_transpose() -> None:
    model = case("c = Cos(f)  s = Sin(f)", HEADS, "y = RotaryEmbedding(h, c, s)")
    apply(model, raise_all)
    assert_joined(model)


def test_position_ids_become_one_lookup_for_each_table() -> None:
    model = case(
        HEADS, "y = RotaryEmbedding(h, c, s, ids)",
        inputs="float[B,S,8] x, int64[B,S] ids, float[9,2] c, float[9,2] s",
    )  # fmt: skip
    apply(model, raise_all)
    assert_joined(model)
    assert ops(model)["Gather"] == 2


PAIRS = (
    "o = Slice(h, one, end, three, two)  e = Slice(h, zero, end, three, two)  n = Neg(o)  "
    "n5 = Unsqueeze(n, last)  e5 = Unsqueeze(e, last)  t5 = Concat<axis = -1>(n5, e5)  "
    "t = Reshape(t5, whole)"
)
PAIR_TABLES = (
    "f5 = Unsqueeze(f, last)  ff = Expand(f5, twice)  g = Reshape(ff, flat)  c = Cos(g)  "
    "s = Sin(g)  c4 = Unsqueeze(c, AXIS)  s4 = Unsqueeze(s, AXIS)"
)
PAIR_CONSTANTS = CONSTANTS + (
    ", int64[4] whole = {0, 0, 0, 4}, int64[4] twice = {1, 1, 1, 2}, int64[3] flat = {0, 0, -1}"
)


def test_neighbours_that_turn_together_are_interleaved() -> None:
    tables = PAIR_TABLES.replace("AXIS", "one")
    model = case(tables, HEADS, PAIRS, SUM, constants=PAIR_CONSTANTS)
    apply(model, raise_all)
    node = only(model, "RotaryEmbedding")
    assert node.inputs[0] is model.graph.inputs[0]
    assert node.attributes["interleaved"].as_int() == 1


def test_halves_do_not_match_tables_of_neighbours() -> None:
    tables = PAIR_TABLES.replace("AXIS", "one")
    model = case(tables, HEADS, HALVES, SUM, constants=PAIR_CONSTANTS)
    refuses(model, raise_all, "halves are not known to be equal")


@pytest.mark.parametrize("kind", ["halves", "neighbours"])
def test_heads_after_the_sequence_are_turned_and_back(kind: str) -> None:
    tables = (
        PAIR_TABLES.replace("AXIS", "two")
        if kind == "neighbours"
        else (TABLES.replace("(c, one)", "(c, two)").replace("(s, one)", "(s, two)"))
    )
    model = case(
        tables, "h = Reshape(x, heads)", PAIRS if kind == "neighbours" else HALVES, SUM,
        output="float[B,S,2,4] y", constants=PAIR_CONSTANTS,
    )  # fmt: skip
    apply(model, raise_all)
    node = only(model, "RotaryEmbedding")
    assert node.inputs[0] is model.graph.inputs[0]
    assert node.attributes["interleaved"].as_int() == (kind == "neighbours")


REFUSED = {
    "the second half is not negated": HALVES.replace("(n, a)", "(b, a)"),
    "the halves are exchanged": HALVES.replace("Neg(b)", "Neg(a)").replace("(n, a)", "(n, b)"),
    "the halves overlap": HALVES.replace("Slice(h, two, end", "Slice(h, one, three"),
    "another value is rotated": HALVES.replace("Slice(h,", "Slice(h0,"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_leaves_alone_when(name: str) -> None:
    inputs = "float[B,S,8] x, float[B,S,2] f, float[B,2,S,4] h0"
    refuses(case(TABLES, HEADS, REFUSED[name], SUM, inputs=inputs), raise_all, None)


def test_halves_of_the_table_must_be_equal() -> None:
    tables = TABLES.replace("Concat<axis = -1>(f, f)", "Concat<axis = -1>(f, g)")
    inputs = "float[B,S,8] x, float[B,S,2] f, float[B,S,2] g"
    reason = "halves are not known to be equal"
    refuses(case(tables, HEADS, HALVES, SUM, inputs=inputs), raise_all, reason)


def test_a_value_that_never_had_joined_heads_stays_four_dimensional() -> None:
    model = case("c = Cos(f)  s = Sin(f)", "y = RotaryEmbedding(h, c, s)",
                 inputs="float[B,2,S,4] h, float[B,S,2] f")  # fmt: skip
    refuses(model, raise_all, "does not come from a Transpose")


def test_refused_tables_leave_nothing_behind() -> None:
    tables = "float[B,S,8] x, float[1,1,S,4] c4, float[1,1,S,4] s4"
    model = graph("  ".join((HEADS, HALVES, SUM)), **(IO | {"inputs": tables}))
    refuses(model, raise_all, "halves are not known to be equal")


def test_a_type_that_the_operator_does_not_take_is_left_alone() -> None:
    text = "double[B,2,S,4] h, double[B,S,2] f"
    nodes = "  ".join((TABLES, HALVES, SUM))
    model = graph(nodes, inputs=text, output="double[B,2,S,4] y", constants=CONSTANTS)
    refuses(model, raise_all, "takes no DOUBLE")


def test_a_rotary_embedding_that_stays_4d_is_settled_in_one_run() -> None:
    model = case(
        "ff = Concat<axis = -1>(f, f)  c4 = Unsqueeze(ff, one)  s4 = Unsqueeze(ff, one)",
        HALVES,
        SUM,
        inputs="float[B,2,S,4] h, float[1,S,2] f",
    )
    assert "stays 4-D" in apply(model, raise_all).skipped[-1].reason
    cos = only(model, "RotaryEmbedding").inputs[1]
    assert cos.producer().op_type == "Expand"  # ONNX Runtime wants the tables of the whole batch
