"""The search for the place where a row of states turns from good to bad."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from optimizer.halving import narrow


@given(st.data())
def test_a_row_that_turns_once_is_searched_in_log2_questions(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 300))
    turn = data.draw(st.integers(1, length))
    promised: list[int] = []

    def judge(number: int, left: int) -> bool:
        assert all(left < before for before in promised)
        promised.append(left)
        return number < turn

    assert narrow(0, length, judge) == (turn - 1, turn)
    assert len(promised) <= math.ceil(math.log2(length))


@given(st.lists(st.sampled_from([True, False, None]), max_size=60))
def test_what_is_returned_was_judged_whatever_the_row(row: list[bool | None]) -> None:
    states = [True, *row, False]
    good, bad = narrow(0, len(states) - 1, lambda number, _: states[number])
    assert states[good] is True
    assert states[bad] is False
    assert good < bad
    if None not in states:
        assert bad == good + 1
    elif bad - good <= 9:
        assert all(state is None for state in states[good + 1 : bad])


def test_a_gap_in_the_middle_does_not_end_the_search() -> None:
    states = [number < 5 if not 8 <= number <= 56 else None for number in range(65)]
    assert narrow(0, 64, lambda number, _: states[number]) == (4, 5)


def test_no_state_is_asked_about_twice() -> None:
    asked: list[int] = []

    def judge(number: int, _: int) -> None:
        asked.append(number)

    assert narrow(0, 1000, judge) == (0, 1000)
    assert len(asked) == len(set(asked)) <= 9
