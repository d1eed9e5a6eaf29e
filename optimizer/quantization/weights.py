"""Rounding a weight matrix to integers with one scale per output channel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

#: Share of the mean diagonal added to a covariance before it is inverted (as in GPTQ): keeps it
#: positive definite where there are fewer sample rows than channels.
DAMPING = 0.01
#: Tokens of one sample are alike: this many count as one that was drawn by itself.
ALIKE = 4
_BLOCK = 128


def top_code(bits: int) -> int:
    """Return q = 2^(bits-1) - 1, the largest symmetric code."""
    return int(2 ** (bits - 1)) - 1


@dataclass(frozen=True)
class QuantizedWeight:
    """W [K, N] as ``codes * scale``.

    Attributes:
        codes: [K, N] int8, within [-q, q].
        scale: [N] float32, positive.
    """

    codes: np.ndarray
    scale: np.ndarray

    @property
    def column_sums(self) -> np.ndarray:
        """[N] float64: sum over K of the numbers that the codes stand for."""
        total = self.codes.sum(axis=0, dtype=np.int64)
        result: np.ndarray = total * self.scale.astype(np.float64)
        return result

    def dequantized(self) -> np.ndarray:
        """[K, N] float32."""
        result: np.ndarray = self.codes * self.scale
        return result


def column_scale(weight: np.ndarray, bits: int) -> np.ndarray:
    """Give every column max |W| / q, [N] float32; 1 for a column of zeros."""
    top = np.abs(weight).max(axis=0, initial=0.0) / top_code(bits)
    scale = np.where(top > np.finfo(np.float32).tiny, top, 1.0)
    return scale.astype(np.float32)


def round_nearest(weight: np.ndarray, bits: int) -> QuantizedWeight:
    """Every entry to its nearest code, halves to even."""
    scale = column_scale(weight, bits)
    top = top_code(bits)
    codes = np.clip(np.rint(weight / scale.astype(weight.dtype)), -top, top)
    return QuantizedWeight(codes.astype(np.int8), scale)


class Compensation:
    """How channels not yet rounded make up for those that are, for layers that share an input.

    Minimises ``|| rows (W - codes * scale) ||`` greedily (GPTQ, arXiv 2210.17323, algorithm 1:
    with H = X'X + damping, and U the upper Cholesky factor of H^-1, the error of channel k divided
    by U_kk is subtracted from channels j > k with factor U_kj). Channels come in order of falling
    energy. Entries that are exactly 0 have the code 0, whatever the others leave them, so that a
    sparse weight stays as sparse as it is.
    """

    def __init__(self, rows: np.ndarray) -> None:
        """Factorize the covariance of ``rows`` [R, K], the inputs that the product will see."""
        energy = np.einsum("rk,rk->k", rows, rows)
        self._order = np.argsort(-energy, kind="stable")
        self._factor = _inverse_factor(rows[:, self._order]) if energy.any() else None

    def round(self, weight: np.ndarray, bits: int) -> QuantizedWeight:
        """Round one input channel of ``weight`` [K, N] after the other."""
        if self._factor is None:
            return round_nearest(weight, bits)
        factor, scale = self._factor, column_scale(weight, bits)
        left = weight[self._order].astype(np.float32) / scale
        kept = left != 0  # a pruned weight stays pruned: what it would take over goes to others
        top = np.float32(top_code(bits))
        codes = np.empty(left.shape, np.int8)
        for start in range(0, len(left), _BLOCK):
            stop = min(start + _BLOCK, len(left))
            errors = np.empty((stop - start, left.shape[1]), np.float32)
            for k in range(start, stop):
                code = np.clip(np.rint(left[k]), -top, top) * kept[k]
                error = (left[k] - code) / factor[k, k]
                codes[k], errors[k - start] = code, error
                left[k + 1 : stop] -= factor[k, k + 1 : stop, None] * error
            left[stop:] -= factor[start:stop, stop:].T @ errors
        result = np.empty_like(codes)
        result[self._order] = codes
        return QuantizedWeight(result, scale)


def _inverse_factor(rows: np.ndarray) -> np.ndarray:
    """U, upper triangular float32, with U'U = H^-1 and H the shrunk second moments of ``rows``."""
    moments = rows.T @ rows / len(rows)
    diagonal = np.diag(moments).copy()
    moments *= 1 - shrinkage(rows, moments)
    moments[np.diag_indices_from(moments)] = diagonal + DAMPING * diagonal.mean()
    return inverse_factor(moments, rows.dtype)


def inverse_factor(moments: np.ndarray, dtype: npt.DTypeLike = np.float32) -> np.ndarray:
    """U [K, K], upper triangular float32, with U'U = H^-1.

    Args:
        moments: H [K, K], symmetric and positive definite (damped).
        dtype: What the triangular factor is inverted in.

    Raises:
        numpy.linalg.LinAlgError: H is not positive definite.
    """
    # H = LL' of the channels in reversed order gives H^-1 = U'U without a second factorization.
    # In float64: the damping makes H positive definite, but not always in float32.
    lower = np.linalg.cholesky(moments[::-1, ::-1].astype(np.float64))
    inverse = _invert_lower(lower.astype(dtype))
    result: np.ndarray = inverse[::-1, ::-1].astype(np.float32)
    return result


def shrinkage(rows: np.ndarray, moments: np.ndarray) -> float:
    """How much of what is off the diagonal of X'X / R is chance, from 0 to 1.

    Ledoit and Wolf (2004), A well-conditioned estimator for large-dimensional covariance matrices,
    lemma 3.3 and 3.4, with the diagonal as target: the variance of the entries over the rows, over
    their squared distance to the target.
    """
    total = float(np.square(moments).sum())
    chance = float(np.square(np.einsum("rk,rk->r", rows, rows)).mean()) - total
    distance = total - float(np.square(np.diag(moments)).sum())
    return 1.0 if distance <= 0 else min(1.0, max(0.0, chance) * ALIKE / len(rows) / distance)


def _invert_lower(lower: np.ndarray) -> np.ndarray:
    """Inverse of a lower triangular matrix, by halves: a sixth of the work of a general one."""
    size = len(lower)
    if size <= _BLOCK:
        return np.linalg.inv(lower)
    half = size // 2
    top, bottom = _invert_lower(lower[:half, :half]), _invert_lower(lower[half:, half:])
    result = np.zeros_like(lower)
    result[:half, :half], result[half:, half:] = top, bottom
    result[half:, :half] = -bottom @ (lower[half:, :half] @ top)
    return result


def signal_to_noise(weight: np.ndarray, rounded: QuantizedWeight) -> float:
    """10 log10 (sum W^2 / sum (W - rounded)^2) in dB; infinite where rounding changed nothing."""
    noise = float(np.square(weight - rounded.dequantized(), dtype=np.float64).sum())
    signal = float(np.square(weight, dtype=np.float64).sum())
    return float("inf") if noise == 0 else 10 * float(np.log10(max(signal, 1e-300) / noise))
