from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from rule_case import apply, model, ops, refuses

from optimizer.raising import broadcasts

CONSTANTS = (
    "int64 zero = {0}, int64 one = {1}, int64 two = {2}, int64[1] last = {-1}, "
    "int64[1] first = {0}, int64[3] beside = {0, 1, 3}, "
    "int64[3] behind = {1, 2, 3}, int64[3] before = {0, 1, 2}, int64[3] middle = {0, 2, 3}, "
    "int64[1] three = {3}, int64[2] inner = {1, 2}, bool on = {1}, bool off = {0}, "
    "bool[1,1,1,1,1] deep = {1}"
)
SIZES = (
    "b1 = Shape<start = 0, end = 1>(m)  b = Squeeze(b1)  t1 = Shape<start = 0, end = 1>(k)"
    "  t = Squeeze(t1)  "
)


def _grid(
    *, start: str = "zero", second: str = "before", columns: str = "i5, j5", wide: str = "j"
) -> ir.Model:
    """m[i, j] for all i < B, j < T, as [B, 1, 1, T]."""
    expanded = "i4 = Expand(i, e)  j4 = Expand(j, e)  "
    nodes = SIZES + (
        f"ri = Range({start}, b, one)  i = Unsqueeze(ri, behind)  rj = Range(zero, t, one)"
        f"  j = Unsqueeze(rj, {second})  w = Unsqueeze(rj, beside)  o = Max(i, j, {wide})"
        f"  e = Shape(o)  {expanded}"
        f"i5 = Unsqueeze(i4, last)  j5 = Unsqueeze(j4, last)  g = Concat<axis = -1>({columns})"
        "  l = GatherND(m, g)  y = Not(l)"
    )
    return model(
        f"g (bool[B,L] m, int64[T] k) => (bool[A,C,D,E] y) <{CONSTANTS}> {{ {nodes} }}",
    )


@pytest.mark.parametrize("second", ["before", "middle"])
def test_a_lookup_of_all_indices_becomes_a_cut_and_two_axes(second):
    case = _grid(second=second)
    apply(case, broadcasts.run)
    assert ops(case)["GatherND"] == ops(case)["Expand"] == ops(case)["Concat"] == 0
    assert ops(case)["Slice"] == 1  # only along the axis whose length is not m's own


def test_the_cut_takes_what_the_grid_took():
    case = _grid()
    before = ir.to_proto(case)
    broadcasts.run(case)
    feed = {"m": np.random.default_rng(0).random((2, 7)) > 0.5, "k": np.zeros(4, np.int64)}
    results = [ReferenceEvaluator(p).run(None, feed)[0] for p in (before, ir.to_proto(case))]
    assert results[0].shape == (2, 1, 1, 4)
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize(
    "changes",
    [
        {"start": "one"},  # not all indices
        {"wide": "w"},  # repeated along an axis that the mask has not
        {"columns": "j5, i5"},  # a transposed lookup
    ],
    ids=["from the second on", "repeated", "transposed"],
)
def test_other_lookups_stay(changes):
    refuses(_grid(**changes), broadcasts.run, None)


@pytest.mark.parametrize(
    ("first", "second", "rank"),
    [("first", "last", 4), ("inner", "first", 5), ("inner", "three", 5), ("last", "first", 4)],
)
def test_axes_added_twice_are_added_at_once(first, second, rank):
    dims = ",".join("abcdefg"[:rank])
    case = model(
        f"g (float[B,4] x) => (float[{dims}] y) <{CONSTANTS}> "
        f"{{ a = Unsqueeze(x, {first})  b = Unsqueeze(a, {second})  y = Relu(b) }}"
    )
    apply(case, broadcasts.run)
    assert ops(case) == {"Unsqueeze": 1, "Relu": 1}


def test_and_with_true_goes_away_and_other_constants_stay():
    body = "g (bool[B,4] x) => (bool[{dims}] y) <{constants}> {{ a = And({c}, x)  y = Not(a) }}"
    gone = model(body.format(dims="B,4", constants=CONSTANTS, c="on"))
    apply(gone, broadcasts.run)
    assert ops(gone) == {"Not": 1}
    for dims, constant in (("B,4", "off"), ("1,1,1,B,4", "deep")):
        stays = model(body.format(dims=dims, constants=CONSTANTS, c=constant))
        refuses(stays, broadcasts.run, None)


def test_older_opsets_keep_their_form_of_unsqueeze():
    nodes = "u = Unsqueeze<axes = [1]>(x)  y = Unsqueeze<axes = [0]>(u)"
    case = model(f"g (float[B,4] x) => (float[1,B,1,4] y) {{ {nodes} }}", opset=11)
    refuses(case, broadcasts.run, None)


TILES = {
    "one axis": ("float[B,1,4] x", "{1, 3, 1}", "float[B,3,4] y"),
    "two axes": ("float[1,1,4] x", "{2, 3, 1}", "float[2,3,4] y"),
    "to nothing": ("float[B,1,4] x", "{1, 0, 1}", "float[B,0,4] y"),
    "not at all": ("float[B,1,4] x", "{1, 1, 1}", "float[B,1,4] y"),
}


@pytest.mark.parametrize(("inputs", "counts", "output"), TILES.values(), ids=TILES.keys())
def test_repeats_of_one_element_are_a_broadcast(inputs: str, counts: str, output: str) -> None:
    case = model(f"g ({inputs}) => ({output}) <int64[3] r = {counts}> {{ y = Tile(x, r) }}")
    assert apply(case, broadcasts.run).applied == 1
    assert ops(case) == {"Expand": 1}


@pytest.mark.parametrize(
    ("inputs", "counts"),
    [
        ("float[B,2,4] x", "{1, 3, 1}"),  # two elements, one after the other
        ("float[B,N,4] x", "{1, 3, 1}"),  # perhaps one, perhaps more
        ("float[B,2,4] x", "{1, 0, 1}"),  # a broadcast makes none of two
    ],
)
def test_other_repeats_stay(inputs: str, counts: str) -> None:
    case = model(f"g ({inputs}) => (float[B,M,4] y) <int64[3] r = {counts}> {{ y = Tile(x, r) }}")
    refuses(case, broadcasts.run, None)


def test_repeats_that_are_computed_from_shapes_are_known() -> None:
    case = model(
        "g (float[B,1,4] x, float[S] z) => (float[B,S,4] y) <int64[1] one = {1}> {"
        " s = Shape(z)  r = Concat<axis = 0>(one, s, one)  y = Tile(x, r) }"
    )
    assert apply(case, broadcasts.run).applied == 1


def test_repeats_that_are_given_are_not() -> None:
    case = model("g (float[B,1,4] x, int64[3] r) => (float[C,S,D] y) { y = Tile(x, r) }")
    refuses(case, broadcasts.run, None)
