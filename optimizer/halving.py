"""Finds where a row of states turns from good to bad, asking about as few of them as possible."""

from __future__ import annotations

from collections.abc import Callable

#: Where to ask next between a good and a bad state, and where else if that cannot be judged.
_PLACES = (1 / 2, 1 / 4, 3 / 4, 1 / 8, 7 / 8, 3 / 8, 5 / 8, 1 / 16, 15 / 16)


def narrow(good: int, bad: int, judge: Callable[[int, int], bool | None]) -> tuple[int, int]:
    """Halve the distance between a good and a bad state until they are neighbours.

    Both states returned were judged, or are those given. Where the row turns only once, that is the
    place; where it turns back and forth, it is one of the places.

    Args:
        good: Number of a state known to be good.
        bad: Number of a later one known to be bad.
        judge: Given a number and how many more questions there will be at most: whether that state
            is good, None where that cannot be told.

    Returns:
        (good, bad): neighbours, unless too many states between cannot be judged.
    """
    unknown: set[int] = set()
    in_a_row = 0
    while in_a_row < len(_PLACES):
        between = [number for number in range(good + 1, bad) if number not in unknown]
        if not between:
            break
        chosen = _closest(between, good + (bad - good) * _PLACES[in_a_row])
        verdict = judge(chosen, len(between).bit_length() - 1)
        if verdict is None:
            unknown.add(chosen)
            in_a_row += 1
            continue
        in_a_row = 0
        good, bad = (chosen, bad) if verdict else (good, chosen)
    return good, bad


def _closest(numbers: list[int], place: float) -> int:
    return min(numbers, key=lambda number: abs(number - place))
