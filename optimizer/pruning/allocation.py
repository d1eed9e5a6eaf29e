"""Shares the zeros out among layers, so that the whole model is damaged least.

The damage of pruning a unit (layers of one input) to share s is modelled as D_u e_u(s) / e_u(s0):
D_u is measured, the drift of the whole model with that unit alone at the mean share s0 (Wanda,
KL divergence or squared relative L2), and e_u(s) is the energy of the weights that Wanda would
remove, the sum of W_kn^2 ||X_k||^2 over them. e_u is convex, as weights go in order of their
energy, so that taking the least marginal damage per zero, step by step, minimises the sum of the
damages.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: No unit gets more or less than the mean by this much (a measured slope does not reach further).
REACH = 0.15
#: Of a share, from one step to the next.
STEP = 0.01


@dataclass(frozen=True)
class Unit:
    """Layers that are pruned to one share.

    Attributes:
        size: Number of weights.
        damage: D_u, measured at the mean share.
        energies: e_u at each of ``shares(mean)``.
    """

    size: int
    damage: float
    energies: np.ndarray


def shares(mean: float) -> np.ndarray:
    """The shares that a unit may have, rising, [steps + 1]; ``mean`` is one of them."""
    below = int(min(REACH, mean) / STEP + 1e-9)
    above = int(min(REACH, 0.99 - mean) / STEP + 1e-9)
    result: np.ndarray = mean + STEP * np.arange(-below, above + 1)
    return result.clip(0.0, 0.99)


def energies(scores: Sequence[np.ndarray], at: np.ndarray, *, balanced: bool) -> np.ndarray:
    """e_u at the shares ``at``, for the Wanda scores [K, N] of the layers of a unit.

    With ``balanced``, each column loses the same number of weights.
    """
    total = np.zeros(len(at))
    for score in scores:
        ordered = np.sort(score, axis=0) if balanced else np.sort(score, axis=None)[:, None]
        energy = np.square(ordered).sum(axis=1, dtype=np.float64)
        lost = np.concatenate([[0.0], np.cumsum(energy)])
        total += lost[np.rint(at * len(energy)).astype(int)]
    return total


def allocate(units: Sequence[Unit], mean: float) -> list[float]:
    """A share for each unit, whose mean over all weights is ``mean``."""
    at = shares(mean)
    middle = int(np.abs(at - mean).argmin())
    costs = [_costs(unit, middle) for unit in units]
    level = [0] * len(units)
    left = sum(unit.size * (mean - at[0]) for unit in units)
    queue = [(cost[0], u) for u, cost in enumerate(costs) if len(cost)]
    heapq.heapify(queue)
    result = [float(at[0])] * len(units)
    while queue and left > 0:
        _, u = heapq.heappop(queue)
        step = min(float(at[level[u] + 1] - at[level[u]]), left / units[u].size)
        result[u] += step
        left -= step * units[u].size
        level[u] += 1
        if level[u] < len(costs[u]):
            heapq.heappush(queue, (costs[u][level[u]], u))
    return result


def _costs(unit: Unit, middle: int) -> np.ndarray:
    """Damage of each step, per weight."""
    scale = unit.damage / max(float(unit.energies[middle]), 1e-300)
    result: np.ndarray = np.diff(unit.energies) * scale / unit.size
    return result
