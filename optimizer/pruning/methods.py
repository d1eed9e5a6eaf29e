"""How a matrix W [K, N] is pruned: magnitude, Wanda, SparseGPT.

``moments`` is what is known of the inputs x of x W: H = X'X [K, K] over calibration tokens, or its
diagonal [K] (the squared norms ||X_k||^2 of the channels). The damage of new weights V is
||X (W - V)||^2 = trace (W - V)' H (W - V), given relative to ||X W||^2.
"""

from __future__ import annotations

import numpy as np

from optimizer.pruning.patterns import Pattern, lowest, lowest_of_columns
from optimizer.quantization.weights import inverse_factor

#: Share of the smallest norm seen (SparseGPT: of the square root of the damping) that a channel
#: counts with which was silent on the calibration data: its weights go first, and the smallest of
#: them before the others.
_SILENT = 1e-3
#: Input channels whose effect on those far behind is computed in one product.
_BATCH = 128


def magnitude(weight: np.ndarray) -> np.ndarray:
    """Scores |W|, [K, N] float32."""
    result: np.ndarray = np.abs(weight.astype(np.float32, copy=False))
    return result


def wanda(weight: np.ndarray, diagonal: np.ndarray) -> np.ndarray:
    """Scores |W_kn| ||X_k||_2 (Sun et al., 2023, Wanda, arXiv 2306.11695, eq. 1), [K, N] float32.

    Args:
        weight: [K, N].
        diagonal: [K], ||X_k||^2.
    """
    norms = np.sqrt(np.asarray(diagonal, np.float64))
    seen = norms[norms > 0]
    norms[norms == 0] = _SILENT * seen.min() if len(seen) else 1.0
    norms /= norms.max()
    return magnitude(weight) * norms[:, None].astype(np.float32)


def zeroed(weight: np.ndarray, pruned: np.ndarray) -> np.ndarray:
    """``weight`` with exact zeros, never -0, where ``pruned`` is True."""
    result: np.ndarray = np.where(pruned, weight.dtype.type(0), weight)
    return result


class SparseGpt:
    """Prunes one input channel after the other; those after it make up for what it loses.

    Frantar and Alistarh, 2023, SparseGPT, arXiv 2301.00774, algorithm 1. With U the upper Cholesky
    factor of (H + damping * mean(diag H) I)^-1: scores w_k^2 / U_kk^2, where U_kk^2 is the k-th
    diagonal entry of the inverse of H without the channels already done; a pruned w_k is subtracted
    from all j > k as (w_k / U_kk) U_kj.

    N:M masks are chosen for every group when it is reached, unstructured ones for ``block``
    channels when these are. How many zeros a block gets is what it would have if the scores before
    all updates decided. (The paper gives each of its blocks the same share, which needs large
    ones; small blocks, whose masks know of more updates, are better with shares of their own.)

    Where a weight is zero already it stays zero and counts.
    """

    def __init__(self, moments: np.ndarray, *, damping: float = 0.01, block: int = 16) -> None:
        """Factorize.

        Args:
            moments: H [K, K], symmetric and not all zero.
            damping: Relative to the mean of the diagonal; as many times 10 of it as it takes to
                make H positive definite in spite of float32 roundings.
            block: Channels whose masks are chosen at a time.
        """
        self._factor = _factor(moments, damping)
        self._spread = np.square(np.diag(self._factor))[:, None]
        self._block = block

    def prune(self, weight: np.ndarray, pattern: Pattern) -> np.ndarray:
        """New weights [K, N] float32."""
        left = np.array(weight, np.float32)
        taken = left == 0
        quota = None if pattern.group else pattern.pruned(self._scores(left, taken, 0))
        size = pattern.group or self._block
        step = -(-_BATCH // size) * size
        for start in range(0, len(left), step):
            stop = min(start + step, len(left))
            errors = np.zeros((stop - start, left.shape[1]), np.float32)
            for first in range(start, stop, size):
                last = min(first + size, stop)
                scores = self._scores(left[first:last], taken[first:last], first)
                if quota is None:
                    pruned = pattern.pruned(scores)
                elif pattern.balanced:
                    pruned = lowest_of_columns(scores, quota[first:last].sum(axis=0))
                else:
                    pruned = lowest(scores, int(quota[first:last].sum()))
                pruned |= taken[first:last]
                self._remove(left[start:stop], pruned, errors, (start, first))
            left[stop:] -= self._factor[start:stop, stop:].T @ errors
        return left

    def _scores(self, left: np.ndarray, taken: np.ndarray, first: int) -> np.ndarray:
        scores: np.ndarray = np.square(left) / self._spread[first : first + len(left)]
        scores[taken] = -1
        return scores

    def _remove(
        self, left: np.ndarray, pruned: np.ndarray, errors: np.ndarray, at: tuple[int, int]
    ) -> None:
        """Set channels to zero one by one, and update the rest of the batch.

        Args:
            left: The batch [B, N], which begins at channel ``at[0]``.
            pruned: [R, N], for the channels from ``at[1]`` on.
            errors: [B, N], is filled in for these.
            at: See above.
        """
        start, first = at
        for k, lost in enumerate(pruned, first - start):
            row = self._factor[start + k, start + k : start + len(left)]
            errors[k] = np.where(lost, left[k] / row[0], 0)
            left[k, lost] = 0
            left[k + 1 :] -= row[1:, None] * errors[k]


def _factor(moments: np.ndarray, damping: float) -> np.ndarray:
    """U of the damped H."""
    scaled = np.array(moments, np.float32)
    diagonal = np.diag(scaled).copy()
    # The factor of H and of c H differ by a number that cancels everywhere; 1 is in range.
    scaled /= np.float32(diagonal.mean(dtype=np.float64))
    while True:
        damped = scaled.copy()
        damped[np.diag_indices_from(damped)] += np.float32(damping)
        silent = diagonal == 0
        damped[silent, silent] *= np.float32(_SILENT**2)
        try:
            return inverse_factor(damped)
        except np.linalg.LinAlgError:
            damping *= 10


def relative_damage(weight: np.ndarray, new: np.ndarray, moments: np.ndarray | None) -> float:
    """||X (W - V)||^2 / ||X W||^2; with the diagonal [K] of H as if channels were uncorrelated.

    Args:
        weight: W [K, N].
        new: V [K, N].
        moments: H [K, K], its diagonal [K], or None for the identity.
    """
    before = _energy(np.asarray(weight, np.float32), moments)
    lost = _energy(np.asarray(weight, np.float32) - np.asarray(new, np.float32), moments)
    return lost / before if before > 0 else 0.0


def _energy(weight: np.ndarray, moments: np.ndarray | None) -> float:
    if moments is not None and moments.ndim == 2:
        return float(np.einsum("kn,kn->", weight, moments @ weight, dtype=np.float64))
    by_channel = np.einsum("kn,kn->k", weight, weight, dtype=np.float64)
    return float(by_channel.sum() if moments is None else by_channel @ moments)
