"""Which layers to group: search over partitions by measured damage.

A partition is a tuple of disjoint groups (first layer, size), in order; layers of no group stay
alone. It *saves* the sum of (size - 1) layers. Damage is any measured number that is 0 for no
change and grows with it (mean KL of the logits in practice).

The search goes level by level, one saved layer at a time, and keeps the best few partitions of each
level. Candidates of a level are ranked by a prediction from the damage of single groups; the
best-ranked are measured whole on some of the data, and the best of those on all of it, so that
neither interaction between groups nor sampling noise is assumed away. Prediction:
for small perturbations KL is quadratic in the change of the logits, so with ``k_g`` the damage of
group g alone and r the mean correlation between the changes of two groups,
``k = sum_g k_g + 2 r sum_{g<h} sqrt(k_g k_h)``; r is fitted to what has been measured so far.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

#: (first layer, number of layers).
Group = tuple[int, int]
Partition = tuple[Group, ...]


@dataclass(frozen=True, order=True)
class Trial:
    """A partition and its measured damage; orders by damage."""

    damage: float
    groups: Partition

    @property
    def saved(self) -> int:
        """Layers saved."""
        return saved(self.groups)


def saved(groups: Iterable[Group]) -> int:
    """Layers saved by ``groups``."""
    return sum(size - 1 for _, size in groups)


@dataclass
class Search:
    """Level-by-level search.

    Attributes:
        single: Damage of every allowed group on its own, as ``screen`` sees it.
        screen: Damage of a whole partition, quickly.
        confirm: The same, precisely.
        beam: Partitions of a level that are confirmed and that the next levels build on.
        trials: Partitions of a level that are screened.
    """

    single: Mapping[Group, float]
    screen: Callable[[Partition], float]
    confirm: Callable[[Partition], float]
    beam: int = 3
    trials: int = 6
    _screened: dict[Partition, float] = field(default_factory=dict)
    _confirmed: dict[Partition, float] = field(default_factory=dict)
    _levels: dict[int, list[Trial]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._levels[0] = [Trial(0.0, ())]
        for group, damage in self.single.items():
            self._screened[(group,)] = damage
        self._best = _best_sums(self.single, self.trials)

    def level(self, count: int) -> Trial | None:
        """The best partition found that saves ``count`` layers; None if there is none.

        Call with 1, 2, 3, ...: a level builds on those below.
        """
        self._screen(self._proposals(count), self.trials)
        for windows in self._windows(count):
            self._screen(windows, 1)
        self._confirm(count)
        # What is next to the best ones may be better still.
        near = {n for t in self._levels[count] for n in self._moved(t.groups)}
        self._screen(near, self.trials // 2)
        self._confirm(count)
        return next(iter(self._levels[count]), None)

    def _screen(self, proposals: Iterable[Partition], most: int) -> None:
        new = {groups for groups in proposals if groups not in self._screened}
        for groups in self._ranked(new)[:most]:
            self._screened[groups] = self.screen(groups)

    def _confirm(self, count: int) -> None:
        screened = [Trial(d, g) for g, d in self._screened.items() if saved(g) == count]
        for trial in heapq.nsmallest(self.beam, screened):
            if trial.groups not in self._confirmed:
                self._confirmed[trial.groups] = self.confirm(trial.groups)
        confirmed = [Trial(d, g) for g, d in self._confirmed.items() if saved(g) == count]
        self._levels[count] = heapq.nsmallest(self.beam, confirmed)

    def _proposals(self, count: int) -> set[Partition]:
        proposals = set(self._best.get(count, ()))
        for below in range(max(0, count - 8), count):
            for trial in self._levels.get(below, ()):
                proposals.update(self._grown(trial.groups, count - below))
        return proposals

    def _windows(self, count: int) -> Iterable[list[Partition]]:
        """What one would pick by hand: groups of one size, one after the other; per size."""
        for size in sorted({size for _, size in self.single}):
            number, rest = divmod(count, size - 1)
            starts = sorted(start for start, n in self.single if n == size)
            runs = [tuple((s + i * size, size) for i in range(number)) for s in starts]
            if not rest:
                yield [run for run in runs if all(group in self.single for group in run)]

    def _grown(self, groups: Partition, more: int) -> Iterable[Partition]:
        """Partitions that save ``more`` layers more: one group added, or one made larger."""
        for group in self.single:
            if group[1] == more + 1 and not any(_overlap(group, other) for other in groups):
                yield tuple(sorted((*groups, group)))
        for old in groups:
            for shift in range(more + 1):
                new = (old[0] - shift, old[1] + more)
                yield from self._replaced(groups, old, new)
        if more == 1:
            for left, right in pairwise(groups):
                merged = (left[0], left[1] + right[1])
                if left[0] + left[1] == right[0] and merged in self.single:
                    rest = [g for g in groups if g not in (left, right)]
                    yield tuple(sorted((*rest, merged)))

    def _moved(self, groups: Partition) -> Iterable[Partition]:
        """Partitions that save as much: one group one layer further up or down."""
        for old in groups:
            for shift in (-1, 1):
                yield from self._replaced(groups, old, (old[0] + shift, old[1]))

    def _replaced(self, groups: Partition, old: Group, new: Group) -> Iterable[Partition]:
        rest = [g for g in groups if g != old]
        if new in self.single and not any(_overlap(new, other) for other in rest):
            yield tuple(sorted((*rest, new)))

    def _ranked(self, proposals: Iterable[Partition]) -> list[Partition]:
        correlation = self._correlation()
        return sorted(proposals, key=lambda groups: (self._predicted(groups, correlation), groups))

    def _predicted(self, groups: Partition, correlation: float) -> float:
        alone, crossed = self._terms(groups)
        return alone + correlation * crossed

    def _terms(self, groups: Partition) -> tuple[float, float]:
        damages = [max(self.single[g], 0.0) for g in groups]
        alone = sum(damages)
        return alone, sum(math.sqrt(d) for d in damages) ** 2 - alone

    def _correlation(self) -> float:
        """Least-squares r over the partitions of several groups measured so far."""
        above = below = 0.0
        for groups, damage in self._screened.items():
            if len(groups) > 1:
                alone, crossed = self._terms(groups)
                above += (damage - alone) * crossed
                below += crossed * crossed
        return above / below if below else 0.0


def _overlap(a: Group, b: Group) -> bool:
    return a[0] < b[0] + b[1] and b[0] < a[0] + a[1]


def _best_sums(single: Mapping[Group, float], count: int) -> dict[int, list[Partition]]:
    """For every number of saved layers, the ``count`` partitions of smallest summed damage.

    Dynamic programming over the layers, from the first to the last.
    """
    layers = max((start + size for start, size in single), default=0)
    ending: dict[int, list[tuple[Group, float]]] = {}
    for (start, size), damage in sorted(single.items()):
        ending.setdefault(start + size, []).append(((start, size), damage))
    best: list[dict[int, list[tuple[float, Partition]]]] = [{0: [(0.0, ())]}]
    for end in range(1, layers + 1):
        level = {k: list(v) for k, v in best[end - 1].items()}
        for group, damage in ending.get(end, ()):
            for below, partial in best[group[0]].items():
                extended = [(cost + damage, (*groups, group)) for cost, groups in partial]
                level.setdefault(below + group[1] - 1, []).extend(extended)
        best.append({k: heapq.nsmallest(count, v) for k, v in level.items()})
    return {k: [groups for _, groups in v] for k, v in best[-1].items() if k}
