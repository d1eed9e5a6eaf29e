from __future__ import annotations

import pytest
from rule_case import apply, graph, only, refuses

from optimizer.raising import open_masks

NODE = "y = Attention<q_num_heads = 2, kv_num_heads = 2>(x, x, x, m)"
CONSTANTS = (
    "bool[1,1,3,1] yes = {1, 1, 1}, bool[1,1,3,3] some = {1, 0, 0, 1, 1, 0, 1, 1, 1}, "
    "float[1,1,3,3] zeros = {0, 0, 0, 0, 0, 0, 0, 0, 0}, float least = {-3.4e38}, "
    "float[1,1,3,3] small = {0, 0, 0, 0, 0, 0, 0, 0, -1e-9}, float zero = {0}, bool on = {1}, "
    "int64[4] whole = {1, 1, 3, 3}, int64[4] short = {1, 1, 3, 2}, int64[1] first = {0}, "
    "bool[1,3] row = {1, 1, 1}"
)


def _case(text: str, inputs: str = "float[B,3,4] x", opset: int = 23):
    return graph(f"{text}  {NODE}", inputs=inputs, output="float[B,3,4] y", constants=CONSTANTS,
                 opset=opset)  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "m = Expand(yes, whole)",
        "m = Identity(zeros)",
        "k = Expand(yes, whole)  m = And(k, k)",
        "k = Expand(yes, whole)  m = Or(k, some)",
        "k = Expand(yes, whole)  m = Where(k, zeros, least)",
        "k = Expand(yes, whole)  m = Where(some, zeros, zeros)",
        "m = Add(zeros, zeros)",
        "m = ConstantOfShape<value = bool[1] {1}>(whole)",
        "k = Unsqueeze(row, first)  l = Unsqueeze(k, first)  m = Expand(l, whole)",
    ],
)
def test_a_mask_that_cuts_nothing_is_left_out(text):
    model = _case(text)
    assert apply(model, open_masks.run).applied == 1
    assert len(only(model, "Attention").inputs) == 3


@pytest.mark.parametrize(
    "text",
    [
        "m = Identity(some)",
        "m = Identity(small)",
        "k = Expand(yes, whole)  m = And(k, some)",
        "k = Expand(yes, whole)  n = Not(k)  m = Or(n, some)",
        "m = Where(some, zeros, least)",
        # Ones that are added, as a Cast makes of True, move no score against another, but are
        # not zeros: the rule does not reason about them.
        "k = Expand(yes, whole)  m = Cast<to = 1>(k)",
        "m = ConstantOfShape<value = float[1] {1}>(whole)",
    ],
)
def test_a_mask_that_cuts_or_adds_stays(text):
    refuses(_case(text), open_masks.run, None)


def test_a_mask_of_data_stays():
    refuses(_case("m = Cast<to = 9>(w)", "float[B,3,4] x, int64[B,1,3,3] w"), open_masks.run, None)


def test_a_mask_that_ends_before_the_keys_cuts_the_rest():
    """Attention-24 cuts off the keys beyond the end of the mask."""
    refuses(_case("m = Expand(yes, short)", opset=24), open_masks.run, None)
