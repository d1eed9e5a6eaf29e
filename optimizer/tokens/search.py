"""Chooses how many tokens go in which layer, by what it does to the outputs on sample data.

The damage of removing r tokens in one layer alone is measured for a few r, layer by layer; damages
are taken to add up. Tokens are then removed step by step where the damage per multiplication saved
is smallest. What was found is measured as a whole, against the schedule that was asked for, and the
better one is taken; a few exchanges between layers are tried on top.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from optimizer.structure import Block, Mlp

#: Measured points per layer, besides none.
_POINTS = 4
#: Tokens are removed in this many steps per layer, on average, or one by one.
_STEPS = 6
#: Exchanges between layers that are tried at the end, per layer.
_EXCHANGES = 2

#: Damage of a schedule: [tokens removed in each layer] -> a number, 0 for the model as it was.
Damage = Callable[[Sequence[int]], float]


@dataclass(frozen=True)
class Costs:
    """Multiplications of the products of a tower, for one row of the batch.

    Attributes:
        count: Tokens that enter.
        projections: Per token, of each layer's attention.
        mlps: Per token, of each layer's MLP.
        width: Per pair of tokens, of each layer.
    """

    count: int
    projections: tuple[int, ...]
    mlps: tuple[int, ...]
    width: tuple[int, ...]

    @classmethod
    def of(cls, blocks: Sequence[Block], count: int) -> Costs:
        """Those of ``blocks``."""
        projections, mlps, widths = [], [], []
        for block in blocks:
            a, hidden = block.attention, block.hidden_size
            both = (2 * a.heads + 2 * a.kv_heads) * a.head_dim
            projections.append(hidden * both)
            linears = (
                [block.mlp.up, block.mlp.down, *([block.mlp.gate] if block.mlp.gate else [])]
                if isinstance(block.mlp, Mlp)
                else []
            )
            shapes = [linear.weight.shape for linear in linears]
            mlps.append(sum(int(np.prod(shape.numpy())) for shape in shapes if shape is not None))
            widths.append(2 * a.heads * a.head_dim)
        return cls(count, tuple(projections), tuple(mlps), tuple(widths))

    def total(self, removed: Sequence[int]) -> int:
        """With ``removed[i]`` tokens less behind the attention of layer i."""
        count, result = self.count, 0
        for r, projection, mlp, width in zip(
            removed, self.projections, self.mlps, self.width, strict=True
        ):
            result += count * projection + count * count * width
            count -= r
            result += count * mlp
        return result


@dataclass
class Search:
    """One search.

    Attributes:
        costs: Of the tower.
        limit: The most that a layer can remove of so many tokens.
        damage: Measures a schedule.
        measured: What was measured, by schedule.
    """

    costs: Costs
    limit: Callable[[int], int]
    damage: Damage
    measured: dict[tuple[int, ...], float] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        """How many."""
        return len(self.costs.mlps)

    def measure(self, removed: Sequence[int]) -> float:
        """The damage of a schedule."""
        key = tuple(removed)
        if not any(key):
            return 0.0
        if key not in self.measured:
            self.measured[key] = self.damage(key)
        return self.measured[key]

    def fits(self, removed: Sequence[int]) -> bool:
        """Whether each layer can remove that many."""
        count = self.costs.count
        for r in removed:
            if not 0 <= r <= self.limit(count):
                return False
            count -= r
        return True

    def path(self, step: int) -> list[tuple[int, ...]]:
        """Schedules that remove more and more, ``step`` tokens at a time, where it hurts least."""
        curves = [self._curve(layer) for layer in range(self.layers)]
        current = (0,) * self.layers
        result = [current]
        while True:
            cost, best, chosen = self.costs.total(current), np.inf, None
            for layer in range(self.layers):
                trial = (*current[:layer], current[layer] + step, *current[layer + 1 :])
                if not self.fits(trial):
                    continue
                points, damages = curves[layer]
                more = np.interp(trial[layer], points, damages) - np.interp(
                    current[layer], points, damages
                )
                price = more / (cost - self.costs.total(trial))
                if price < best:
                    best, chosen = price, trial
            if chosen is None:
                return result
            current = chosen
            result.append(current)

    def _curve(self, layer: int) -> tuple[list[int], list[float]]:
        """Removed tokens and damage, never falling, of one layer alone."""
        most = self.limit(self.costs.count)
        points = sorted({round(most * (i + 1) / _POINTS) for i in range(_POINTS)} - {0})
        alone = [[r if i == layer else 0 for i in range(self.layers)] for r in points]
        damages = np.maximum.accumulate([self.measure(removed) for removed in alone])
        return [0, *points], [0.0, *damages.tolist()]

    def within_cost(self, wanted: Sequence[int]) -> tuple[int, ...]:
        """The schedule of least damage found that costs no more than ``wanted``."""
        most = self.costs.total(wanted)
        step = max(1, round(sum(wanted) / (_STEPS * self.layers)))
        fitting = [s for s in self.path(step) if self.costs.total(s) <= most]
        best = tuple(wanted)
        if fitting and self.measure(fitting[0]) < self.measure(best):
            best = fitting[0]
        return self._exchanged(best, most, step)

    def within_damage(self, budget: float) -> tuple[int, ...]:
        """The cheapest schedule found whose damage is at most ``budget``."""
        path = self.path(max(1, self.costs.count // (_STEPS * self.layers)))
        low, high = 0, len(path)
        while high - low > 1:  # damage rises along the path, but for noise
            middle = (low + high) // 2
            if self.measure(path[middle]) <= budget:
                low = middle
            else:
                high = middle
        return path[low]

    def _exchanged(self, best: tuple[int, ...], most: int, step: int) -> tuple[int, ...]:
        """``best`` with tokens moved between layers, as long as that is better and no dearer."""
        rng = np.random.default_rng(0)
        for _ in range(_EXCHANGES * self.layers):
            less, more = rng.choice(self.layers, 2, replace=False)
            trial = list(best)
            trial[less] -= min(step, trial[less])
            while self.costs.total(trial) > most and trial[more] < self.limit(self.costs.count):
                trial[more] += 1
            if not self.fits(trial) or self.costs.total(trial) > most:
                continue
            if self.measure(trial) < self.measure(best):
                best = tuple(trial)
        return best
