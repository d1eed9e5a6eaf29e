from __future__ import annotations

import functools

import models
import onnx_ir as ir
import pytest
from rule_case import graph

from optimizer.raising import dims
from optimizer.raising.shapes import Shapes

B, S, P = (dims.symbol(name) for name in "BSP")


def shape_of(model: ir.Model) -> dims.Shape | None:
    return Shapes().of(model.graph.outputs[0])


def test_polynomials_have_one_form() -> None:
    assert dims.add(B, S) == dims.add(S, B)
    assert dims.multiply(dims.add(B, 1), S) == dims.add(dims.multiply(S, B), S)
    assert dims.subtract(dims.add(B, S), S) == B
    assert dims.subtract(B, B) == 0
    assert dims.product([2, B, 3]) == dims.multiply(6, B)


def test_what_is_no_size_any_more_is_not_followed() -> None:
    for start in (dims.add(B, 1), B, 3):
        with pytest.raises(ValueError, match="without bounds"):
            functools.reduce(lambda size, _: dims.multiply(size, size), range(40), start)


def test_sums_are_taken_out_of_a_product_whole() -> None:
    length = dims.add(P, S)
    assert dims.left_over((B, length, 4, 16), (B, length)) == 64
    assert dims.left_over((B, length, 4), (B, S)) is None


def test_quotients_are_exact_or_unknown() -> None:
    assert dims.divide(dims.product([B, S, 64]), dims.product([B, 16])) == dims.multiply(4, S)
    assert dims.divide(dims.multiply(B, 7), 2) is None
    assert dims.divide(B, S) is None
    assert dims.divide(B, dims.add(B, 1)) is None


CASES = {
    "flattened and restored": (
        "a = Reshape(x, flat)  b = Shape<start = 0, end = 2>(x)  c = Concat<axis = 0>(b, last)  "
        "y = Reshape(a, c)", (B, S, 4),
    ),
    "heads": ("a = Reshape(x, heads)  y = Transpose<perm = [0, 2, 1, 3]>(a)", (B, 2, S, 2)),
    "concatenated": ("y = Concat<axis = 1>(p, x)", (B, dims.add(P, S), 4)),
    "broadcast": ("a = Add(x, row)  y = Mul(a, one)", (B, S, 4)),
    "two names may differ": ("y = Add(x, p)", (B, dims.symbol("?y.1"), 4)),
    "first rows of a table": (
        "n = Shape<start = 1, end = 2>(x)  t = Slice(table, zero, n, zero)  y = Add(x, t)",
        (B, S, 4),
    ),
    "cut by a constant": ("y = Slice(x, zero, two, axis)", (B, S, 2)),
    "split": ("y, z = Split<axis = -1, num_outputs = 2>(x)", (B, S, 2)),
    "uneven split": ("y, z = Split<axis = -1>(x, three_one)", (B, S, 3)),
    "split by an attribute": ("y, z = Split<axis = -1, split = [3, 1]>(x)", (B, S, 3)),
    "split by a computed vector": (
        "n = Shape(z0)  y, z = Split<axis = -1>(x, n)", (B, S, dims.symbol("?y.2"))
    ),
    "mean": ("y = ReduceMean(x, axis)", (B, S, 1)),
    "expanded to chosen sizes": (
        "n = Shape(x)  c = Constant<value = bool[3] {0, 0, 0}>()  o = Shape(p)  "
        "t = Where(c, o, n)  z = ReduceMean(x, axis)  y = Expand(z, t)", (B, S, 4)
    ),
    "one size computed, the others known": (
        "n = Shape<start = 1, end = 2>(x)  m = Min(n, cap)  b = Shape<end = 1>(x)  "
        "t = Concat<axis = 0>(b, m, pair)  y = Reshape(x, t)", (B, S, 2, 2)
    ),
    "two sizes computed": (
        "n = Shape<start = 1, end = 2>(x)  m = Min(n, cap)  b = Shape<end = 1>(p)  "
        "k = Max(b, cap)  t = Concat<axis = 0>(k, m, pair)  y = Reshape(x, t)",
        (dims.fresh("k.0"), dims.fresh("m.0"), 2, 2),
    ),
    "of everything": ("m = ReduceMax<keepdims = 0>(x)  y = Max(x, m)", (B, S, 4)),
    "of everything, by an empty vector": (
        "e = Constant<value_ints: ints = []>()  y = ReduceMax(x, e)", (1, 1, 1)
    ),
    "of nothing": (
        "e = Constant<value_ints: ints = []>()  y = ReduceMax<noop_with_empty_axes = 1>(x, e)",
        (B, S, 4),
    ),
    "range": (
        "n = Shape<start = 1, end = 2>(x)  s = Squeeze(n)  r = Range(n0, s, n1)  "
        "y = Unsqueeze(r, zero)", (1, S),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_shape_is_known(name: str) -> None:
    nodes, expected = CASES[name]
    rank = ", ".join(f"D{i}" for i in range(len(expected)))
    dtype = "int64" if name == "range" else "float"
    model = graph(
        nodes,
        inputs="float[B,S,4] x, float[B,P,4] p, float[C,D] z0",
        output=f"{dtype}[{rank}] y",
        opset=12 if name == "split by an attribute" else 23,
        constants=(
            "int64[2] flat = {-1, 4}, int64[1] last = {-1}, int64[4] heads = {0, 0, 2, 2}, "
            "float[4] row = {1, 2, 3, 4}, float one = {1}, int64[1] zero = {0}, "
            "int64[1] two = {2}, int64[1] axis = {2}, int64[2] three_one = {3, 1}, "
            "int64[1] cap = {64}, int64[2] pair = {2, 2}, int64 n0 = {0}, int64 n1 = {1}, "
            "float[2,4] table = {1, 2, 3, 4, 5, 6, 7, 8}"
        ),
    )
    assert shape_of(model) == expected


@pytest.mark.parametrize(
    "nodes", ["y = Compress(x, c)", "n = Shape<end = 1>(x)  y = ReduceMax(x, n)"]
)
def test_what_is_not_known_is_not_guessed(nodes: str) -> None:
    model = graph(nodes, inputs="float[B,S] x, bool[N] c", output="float[M] y")
    assert shape_of(model) is None


def test_deep_graphs_need_no_deep_recursion() -> None:
    model = models.build(layers=150)
    shape = Shapes().of(model.graph.outputs[0])
    assert shape == (dims.symbol("batch"), dims.symbol("sequence"), 50)


def test_long_arithmetic_needs_no_deep_recursion() -> None:
    """The shape is asked for first, so nothing of the chain is known yet."""
    steps = "  ".join(f"n{i + 1} = Add(n{i}, n0)" for i in range(2000))
    model = graph(
        f"n0 = Shape<start = 0, end = 1>(x)  {steps}  z = Mul(n2000, zero)  "
        "t = Concat<axis = 0>(z, rest)  y = Reshape(x, t)",
        output="float[C,D] y",
        constants="int64[1] zero = {0}, int64[1] rest = {-1}",
    )
    assert shape_of(model) == (B, dims.multiply(S, 4))
