from __future__ import annotations

import pytest
from rule_case import apply, graph, only, ops, refuses

from optimizer.raising import reshapes

NUMBERS = (
    "int64[1] zero = {0}, int64[1] first = {1}, int64[1] two = {2}, int64[1] infer = {-1}, "
    "int64[1] end = {9223372036854775807}, int64[3] flat = {0, 0, 4}, int64[2] rows = {-1, 4}, "
    "int64 index = {1}"
)
DIMS = "s = Shape(x)  b = Slice(s, zero, first)  t = Slice(s, first, two)"


def _target(case):
    return only(case, "Reshape").inputs[1].const_value.numpy().tolist()


def test_a_target_from_shape_arithmetic_becomes_constant():
    nodes = f"{DIMS}  c = Concat<axis = 0>(b, t, two, two)  y = Reshape(x, c)"
    case = graph(nodes, output="float[B,S,2,2] y", constants=NUMBERS)
    apply(case, reshapes.run)
    assert ops(case) == {"Reshape": 1}
    assert _target(case) == [0, 0, 2, 2]


def test_merged_dimensions_are_inferred():
    nodes = f"{DIMS}  n = Mul(b, t)  f = Concat<axis = 0>(n, first, two, two)  y = Reshape(x, f)"
    case = graph(nodes, output="float[M,1,2,2] y", constants=NUMBERS)
    apply(case, reshapes.run)
    assert _target(case) == [-1, 1, 2, 2]


def test_torch_script_scalars_are_followed():
    nodes = (
        "s = Shape(x)  d = Gather<axis = 0>(s, index)  u = Unsqueeze(d, zero)"
        "  c = Concat<axis = 0>(infer, u, two, two)  y = Reshape(x, c)"
    )
    case = graph(nodes, output="float[B,S,2,2] y", constants=NUMBERS)
    apply(case, reshapes.run)
    assert _target(case) == [0, 0, 2, 2]


def test_a_reshape_and_its_inverse_go_away():
    nodes = "f = Reshape(x, rows)  s = Shape(x)  r = Reshape(f, s)  y = Relu(r)"
    case = graph(nodes, constants=NUMBERS)
    apply(case, reshapes.run)
    assert ops(case) == {"Relu": 1}


def test_reshapes_in_a_row_become_one():
    nodes = f"f = Reshape(x, rows)  {DIMS}  c = Concat<axis = 0>(b, t, two, two)  y = Reshape(f, c)"
    case = graph(nodes, output="float[B,S,2,2] y", constants=NUMBERS)
    apply(case, reshapes.run)
    assert ops(case) == {"Reshape": 1}
    assert only(case, "Reshape").inputs[0] is case.graph.inputs[0]


def test_two_unknown_dimensions_keep_the_target():
    nodes = f"{DIMS}  c = Concat<axis = 0>(t, b, two, two)  y = Reshape(x, c)"
    case = graph(nodes, output="float[S,B,2,2] y", constants=NUMBERS)
    apply_report = reshapes.run(case)
    assert not apply_report.applied
    assert ops(case)["Concat"] == 1


def test_an_expand_to_the_same_shape_goes_away():
    case = graph("s = Shape(x)  e = Expand(x, s)  y = Relu(e)", constants=NUMBERS)
    apply(case, reshapes.run)
    assert ops(case) == {"Relu": 1}


def test_repeated_heads_expand_by_a_constant():
    nodes = (
        f"{DIMS}  u = Unsqueeze(x, two)  w = Shape<start = 2>(x)"
        "  c = Concat<axis = 0>(b, t, two, w)  y = Expand(u, c)"
    )
    case = graph(nodes, output="float[B,S,2,4] y", constants=NUMBERS)
    apply(case, reshapes.run)
    assert only(case, "Expand").inputs[1].const_value.numpy().tolist() == [1, 1, 2, 1]


def test_torch_script_expand_loses_its_test_for_minus_one():
    nodes = (
        "s = Shape(x)  k = Equal(s, infer)  o = Mul(s, infer)  c = Where(k, o, s)"
        "  e = Expand(x, c)  y = Relu(e)"
    )
    case = graph(nodes, constants=NUMBERS)
    reshapes.run(case)
    apply(case, reshapes.run)
    assert ops(case) == {"Relu": 1}


def test_a_slice_of_everything_goes_away():
    case = graph(f"{DIMS}  p = Slice(x, zero, t, first)  y = Relu(p)", constants=NUMBERS)
    apply(case, reshapes.run)
    assert ops(case) == {"Relu": 1}


def test_a_transpose_of_merged_heads_is_one_transpose():
    nodes = (
        "s = Shape(x)  b = Slice(s, zero, first)  t = Slice(s, two, three)"
        "  m = Concat<axis = 0>(infer, t, four)  r = Reshape(x, m)"
        "  k = Transpose<perm = [0, 2, 1]>(r)"
        "  back = Concat<axis = 0>(b, two, four, t)  y = Reshape(k, back)"
    )
    case = graph(
        nodes,
        inputs="float[B,2,S,4] x",
        output="float[B,2,4,S] y",
        constants=NUMBERS + ", int64[1] three = {3}, int64[1] four = {4}",
    )
    reshapes.run(case)
    apply(case, reshapes.run)
    assert ops(case) == {"Transpose": 1}
    assert list(only(case, "Transpose").attributes["perm"].as_ints()) == [0, 1, 3, 2]


def test_equal_arithmetic_on_different_inputs_is_computed_once():
    nodes = (
        "s = Shape<start = 0, end = 1>(x)  t = Shape<start = 0, end = 1>(z)"
        "  a = ConstantOfShape(s)  c = ConstantOfShape(t)  y = Add(a, c)"
    )
    case = graph(nodes, inputs="float[B,4] x, float[B,7] z", output="float[B] y")
    apply(case, reshapes.run)
    assert ops(case)["Shape"] == 1


@pytest.mark.parametrize("nodes", ["y = Reshape(x, flat)", "y = Reshape(x, rows)"])
def test_outputs_keep_their_names(nodes):
    output = "float[B,S,4] y" if "flat" in nodes else "float[M,4] y"
    case = graph(f"t = Relu(x)  {nodes.replace('(x', '(t')}", output=output, constants=NUMBERS)
    reshapes.run(case)
    assert case.graph.outputs[0].name == "y"


def test_a_reshape_from_input_to_output_stays():
    case = graph("y = Reshape(x, flat)", constants=NUMBERS)
    refuses(case, reshapes.run, None)


def test_torch_script_keeps_minus_one_where_a_size_is_given():
    """Expand(x, [B, -1, 6]): -1 means the size of x, here 1."""
    nodes = (
        "s = Shape<end = 1>(z)  c = Concat<axis = 0>(s, infer, six)  k = Equal(c, minus)"
        "  w = Where(k, ones, c)  e = Expand(x, w)  f = Flatten<axis = 1>(e)  y = Relu(f)"
    )
    case = graph(
        nodes,
        inputs="float[1,1,6] x, float[B,7] z",
        output="float[B,6] y",
        constants=NUMBERS + ", int64[3] ones = {1, 1, 1}, int64[3] minus = {-1, -1, -1},"
        " int64[1] six = {6}",
    )
    apply(case, reshapes.run)
    assert _target(case) == [0, 6]


def test_a_comparison_that_may_go_either_way_stays():
    nodes = "s = Shape(x)  k = Equal(s, two)  w = Where(k, minus, s)  y = ConstantOfShape(w)"
    case = graph(
        nodes,
        inputs="float[B,S] x",
        output="float[M,N] y",
        constants=NUMBERS + ", int64[1] minus = {1}",
    )
    reshapes.run(case)
    assert ops(case)["Where"] == 1


@pytest.mark.parametrize("to", [3, 9, 10])  # int8, bool, float16
def test_a_cast_that_cannot_hold_a_size_is_not_followed(to):
    nodes = f"s = Shape(x)  n = Cast<to = {to}>(s)  y = Cast<to = 7>(n)"
    refuses(graph(nodes, output="int64[3] y"), reshapes.run, None)


def test_a_slice_that_reverses_stays():
    nodes = "y = Slice(x, last, first, two, last)"
    constants = "int64[1] last = {-1}, int64[1] first = {-100}, int64[1] two = {2}"
    refuses(graph(nodes, constants=constants), reshapes.run, None)


def test_no_size_is_inferred_beside_one_that_is_copied_and_may_be_zero():
    nodes = "y = Flatten<axis = 1>(x)"
    refuses(graph(nodes, output="float[B,M] y"), reshapes.run, None)
    case = graph("y = Reshape(x, keep)", output="float[B,M] y", constants="int64[2] keep = {0, -1}")
    refuses(case, reshapes.run, None)


EMPTY = "float[B,S,4] x, float[B,0,4] e"
JOINED = {
    "in the middle": ("a = Concat<axis = 1>(x, e, x)  y = Neg(a)", "float[B,T,4] y",
                      {"Concat": 1, "Neg": 1}),
    "along an axis from the end": ("a = Concat<axis = -2>(e, x)  y = Neg(a)", "float[B,S,4] y",
                                   {"Neg": 1}),
    "straight to an output": ("t = Neg(x)  y = Concat<axis = 1>(e, t)", "float[B,S,4] y",
                              {"Neg": 1}),
}  # fmt: skip


@pytest.mark.parametrize(("nodes", "output", "left"), JOINED.values(), ids=JOINED.keys())
def test_what_has_no_elements_is_not_joined(nodes, output, left):
    case = graph(nodes, inputs=EMPTY, output=output)
    assert apply(case, reshapes.run).applied == 1
    assert ops(case) == left


WHOLE = {
    "all are empty": ("a = Concat<axis = 1>(e, e)  y = Neg(a)", "float[B,0,4] y"),
    "empty along another axis": ("a = Concat<axis = 2>(e, e)  y = Neg(a)", "float[B,0,8] y"),
    "perhaps empty": ("a = Concat<axis = 1>(x, x)  y = Neg(a)", "float[B,T,4] y"),
    "an input straight to an output": ("y = Concat<axis = 1>(x, e)", "float[B,S,4] y"),
}


@pytest.mark.parametrize(("nodes", "output"), WHOLE.values(), ids=WHOLE.keys())
def test_other_values_are_joined(nodes, output):
    refuses(graph(nodes, inputs=EMPTY, output=output), reshapes.run, None)
