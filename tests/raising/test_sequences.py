from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_case import apply, graph, only, ops, refuses

from optimizer.raising import sequences

CONSTANTS = (
    "int64[3] sizes = {2, 1, 3}, int64 two = {2}, int64 four = {4}, int64[1] vector = {1}, "
    "int64 i0 = {0}, int64 i1 = {1}, int64 i2 = {2}, int64 last = {-1}, int64 far = {3}"
)
SIZED = "float[B,S,6] x"
SPLITS = {
    "by sizes": ("SplitToSequence<axis = 2>(x, sizes)", [2, 1, 3]),
    "by sizes along the last axis": ("SplitToSequence<axis = -1>(x, sizes)", [2, 1, 3]),
    "by sizes without its axis, which only one size drops": (
        "SplitToSequence<axis = -1, keepdims = 0>(x, sizes)", [2, 1, 3],
    ),
    "evenly": ("SplitToSequence<axis = -1>(x, two)", [2, 2, 2]),
    "into a rest": ("SplitToSequence<axis = 2>(x, four)", [4, 2]),
    "one by one": ("SplitToSequence<axis = 2>(x)", [1] * 6),
}  # fmt: skip


@pytest.mark.parametrize("name", SPLITS)
def test_a_tensor_is_split(name: str) -> None:
    split, sizes = SPLITS[name]
    model = graph(
        f"s = {split}  a = SequenceAt(s, i0)  b = SequenceAt(s, last)  y = Concat<axis = 2>(b, a)",
        inputs=SIZED, output=f"float[B,S,{sizes[0] + sizes[-1]}] y", constants=CONSTANTS,
    )  # fmt: skip
    assert apply(model, sequences.run).applied == 1
    assert ops(model) == {"Split": 1, "Concat": 1}
    np.testing.assert_array_equal(only(model, "Split").inputs[1].const_value.numpy(), sizes)


def test_a_sequence_of_one_part_is_split_too() -> None:
    model = graph("s = SplitToSequence<axis = 2>(x, far)  y = SequenceAt(s, i0)",
                  inputs="float[B,S,3] x", output="float[B,S,3] y",
                  constants=CONSTANTS)  # fmt: skip
    assert apply(model, sequences.run).applied == 1


def test_an_element_that_is_taken_twice() -> None:
    model = graph("s = SplitToSequence<axis = 2>(x, two)  a = SequenceAt(s, i1)"
                  "  b = SequenceAt(s, i1)  y = Add(a, b)",
                  inputs=SIZED, output="float[B,S,2] y", constants=CONSTANTS)  # fmt: skip
    apply(model, sequences.run)


def test_an_element_that_is_a_graph_output_keeps_its_name() -> None:
    model = graph("s = SplitToSequence<axis = 2>(x, two)  y = SequenceAt(s, i1)",
                  inputs=SIZED, output="float[B,S,2] y", constants=CONSTANTS)  # fmt: skip
    apply(model, sequences.run)
    assert only(model, "Split").outputs[1].name == "y"


def test_an_element_taken_in_a_branch() -> None:
    model = graph(
        "s = SplitToSequence<axis = 2>(x, two)"
        "  y = If (p) <then_branch = t () => (float[B,S,2] u) { u = SequenceAt(s, i1) },"
        " else_branch = e () => (float[B,S,2] v) { w = SequenceAt(s, i0)  v = Neg(w) }>",
        inputs=f"{SIZED}, bool p", output="float[B,S,2] y", constants=CONSTANTS,
    )  # fmt: skip
    apply(model, sequences.run)
    assert ops(model) == {"Split": 1, "If": 1}


READ = "its sequence is read by more than SequenceAt at fixed positions"
UNKNOWN = "the sizes of its parts are not known"
REFUSED = {
    "its length is read": ("l = SequenceLength(s)  f = Cast<to = 1>(l)  a = SequenceAt(s, i0)"
                           "  y = Mul(a, f)", SIZED, READ),
    "a position is computed": ("y = SequenceAt(s, p)", f"{SIZED}, int64 p", READ),
    "the axis is not known": ("y = SequenceAt(s, i0)", "float[B,S,W] x", UNKNOWN),
    "a position is outside": ("y = SequenceAt(s, far)", SIZED, "a position outside"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_sequence_stays_where(name: str) -> None:
    nodes, inputs, reason = REFUSED[name]
    model = graph(f"s = SplitToSequence<axis = 2>(x, two)  {nodes}", inputs=inputs,
                  output="float[B,S,2] y", constants=CONSTANTS)  # fmt: skip
    refuses(model, sequences.run, reason)


@pytest.mark.parametrize(
    ("split", "more", "output"),
    [
        ("SplitToSequence<axis = 2, keepdims = 0>(x)", "", "B,S"),  # its parts have an axis less
        ("SplitToSequence<axis = 2>(x, i0)", "", "B,S,N"),  # no valid size
        ("SplitToSequence<axis = 2>(x, n)", ", int64 n", "B,S,N"),
        ("SplitToSequence<axis = 2>(x, n)", ", int64[3] n", "B,S,N"),
    ],
)
def test_a_sequence_of_parts_of_unknown_size_stays(split: str, more: str, output: str) -> None:
    model = graph(f"s = {split}  y = SequenceAt(s, i0)", inputs=SIZED + more,
                  output=f"float[{output}] y", constants=CONSTANTS)  # fmt: skip
    refuses(model, sequences.run, UNKNOWN)


def test_a_sequence_that_is_a_graph_output_stays() -> None:
    model = graph("s = SplitToSequence<axis = 2>(x, two)  y = SequenceAt(s, i0)", inputs=SIZED,
                  output="float[B,S,2] y, seq(float[B,S,2]) s", constants=CONSTANTS)  # fmt: skip
    refuses(model, sequences.run, READ)


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    axis=st.integers(0, 2),
    each=st.integers(1, 5),
    place=st.integers(0, 3),
    negative=st.booleans(),
)
@settings(deadline=None, max_examples=40, derandomize=True)
def test_any_even_split(shape: list[int], axis: int, each: int, place: int, negative: bool) -> None:
    axis %= len(shape)
    count = -(-shape[axis] // each)
    place = place % count - (count if negative else 0)
    size = min(each, shape[axis] - each * (place % count))
    result = [size if a == axis else n for a, n in enumerate(shape)]
    model = graph(
        f"s = SplitToSequence<axis = {axis - len(shape) if negative else axis}>(x, each)"
        "  y = SequenceAt(s, place)",
        inputs=f"float{shape} x", output=f"float{result} y",
        constants=f"int64 each = {{{each}}}, int64 place = {{{place}}}",
    )  # fmt: skip
    assert apply(model, sequences.run).applied == 1
