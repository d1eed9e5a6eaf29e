"""The search for a partition, on damages that are known exactly."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizer.fusion.partition import Group, Partition, Search, saved


def candidates(layers: int, largest: int) -> list[Group]:
    return [(s, n) for n in range(2, largest + 1) for s in range(layers - n + 1)]


def partitions(layers: int, groups: list[Group]) -> list[Partition]:
    """All of them, by brute force."""
    found: list[Partition] = []
    for count in range(layers // 2 + 1):
        chosen = itertools.combinations(sorted(groups), count)
        found.extend(p for p in chosen if disjoint(p))
    return found


def disjoint(groups: Partition) -> bool:
    return all(a[0] + a[1] <= b[0] for a, b in itertools.pairwise(groups))


def quadratic(single: dict[Group, float], correlation: float, groups: Partition) -> float:
    """Damage of groups whose changes have one correlation."""
    damages = [single[g] for g in groups]
    crossed = sum(math.sqrt(d) for d in damages) ** 2 - sum(damages)
    return sum(damages) + correlation * crossed


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.lists(st.floats(0.001, 1), min_size=15, max_size=15),
    correlation=st.floats(0, 0.3),
)
def test_finds_the_best_partition_of_every_depth(seed: list[float], correlation: float) -> None:
    groups = candidates(7, 4)
    single = dict(zip(groups, seed, strict=False))

    def measure(chosen: Partition) -> float:
        return quadratic(single, correlation, chosen)

    search = Search(single, measure, measure, beam=4, trials=12)
    everything = partitions(7, groups)
    for count in range(1, 6):
        best = min((measure(p) for p in everything if saved(p) == count), default=None)
        found = search.level(count)
        assert (found is None) == (best is None)
        if found is not None and best is not None:
            assert found.saved == count
            # A beam of 4 and 12 trials of at most 60 partitions: near the optimum, rarely off it.
            assert found.damage <= best * 1.15


def test_confirmed_damage_decides_between_screened_candidates() -> None:
    groups = candidates(4, 2)
    rough = dict.fromkeys(groups, 0.1)
    exact = {(0, 2): 0.3, (1, 2): 0.2, (2, 2): 0.1}
    search = Search(rough, lambda p: sum(rough[g] for g in p), lambda p: sum(exact[g] for g in p))
    found = search.level(1)
    assert found is not None
    assert found.groups == ((2, 2),)


def test_windows_are_always_among_the_candidates() -> None:
    # Interaction makes everything but the plain window of pairs far worse than predicted.
    groups = candidates(8, 3)
    single = {g: 0.1 if g[1] == 3 else 0.2 for g in groups}
    window = tuple((s, 2) for s in (0, 2, 4, 6))

    def measure(chosen: Partition) -> float:
        return 0.5 if chosen == window else 1.0 + sum(single[g] for g in chosen)

    search = Search(single, measure, measure, trials=2)
    found = [search.level(count) for count in (1, 2, 3, 4)][-1]
    assert found is not None
    assert found.groups == window


@pytest.mark.parametrize("count", [3, 9])
def test_depth_that_no_partition_reaches_is_none(count: int) -> None:
    single = {(0, 2): 0.1, (2, 2): 0.1}
    search = Search(single, lambda p: 0.1 * len(p), lambda p: 0.1 * len(p))
    levels = [search.level(i) for i in range(1, count + 1)]
    assert levels[1] is not None
    assert levels[-1] is None


def test_same_measurements_give_the_same_partition() -> None:
    groups = candidates(6, 3)
    single = dict.fromkeys(groups, 0.1)  # all ties
    results = []
    for _ in range(2):
        search = Search(single, lambda p: 0.1 * len(p), lambda p: 0.1 * len(p))
        results.append([search.level(i) for i in (1, 2, 3)])
    assert results[0] == results[1]
