"""Where casts go: never more of them than in the best of all divisions."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from optimizer.precision.cut import divide


def casts(kinds, values):
    """Values that are read by the other kind than they are computed by."""
    return sum(any(kinds[r] != kinds[producer] for r in readers) for producer, readers in values)


def best(fixed, values):
    """The smallest number of casts, by trying all divisions."""
    nodes = {n for producer, readers in values for n in (producer, *readers)}
    free = sorted(nodes - fixed.keys())
    tried = itertools.product((False, True), repeat=len(free))
    return min(casts({**fixed, **dict(zip(free, kinds, strict=True))}, values) for kinds in tried)


@st.composite
def problems(draw):
    count = draw(st.integers(2, 9))
    values = [
        (node, draw(st.lists(st.integers(node + 1, count), max_size=4, unique=True)))
        for node in range(count)
    ]
    kinds = st.dictionaries(st.integers(0, count), st.booleans(), max_size=4)
    return draw(kinds), values


@given(problem=problems())
def test_no_division_needs_fewer_casts(problem):
    fixed, values = problem
    kinds = divide(fixed, values)
    assert all(kinds[node] == kind for node, kind in fixed.items())
    assert casts(kinds, values) == best(fixed, values)


def test_a_value_read_by_many_is_cast_once():
    # One kept node feeds three free ones, each of which feeds a converted one: casting the one
    # value is cheaper than casting three results.
    values = [("kept", ["a", "b", "c"]), ("a", ["x"]), ("b", ["x"]), ("c", ["x"])]
    kinds = divide({"kept": False, "x": True}, values)
    assert [kinds[node] for node in "abc"] == [True, True, True]


def test_what_lies_between_kept_nodes_stays():
    values = [("p", ["a"]), ("a", ["b"]), ("b", ["q"])]
    kinds = divide({"p": False, "q": False}, values)
    assert not kinds["a"]
    assert not kinds["b"]


def test_where_both_cost_the_same_the_node_is_converted():
    kinds = divide({"p": False, "q": True}, [("p", ["a"]), ("a", ["q"])])
    assert kinds["a"]


def test_nodes_without_kept_neighbours_are_converted():
    assert divide({}, [("a", ["b"]), ("b", [])]) == {"a": True, "b": True}
