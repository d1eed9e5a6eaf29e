"""How far outputs are from a reference, measured batch by batch.

Notation: reference r, candidate c, one row per token (or per sample), C values per row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

#: Rows are compared in chunks of about this many values (float64), to bound memory.
_CHUNK = 1 << 21


@dataclass(frozen=True)
class Drift:
    """Measured distance of outputs from reference outputs.

    Attributes:
        relative_l2: ||c - r|| / ||r|| over everything compared.
        cosine: Mean cosine of the rows.
        max_abs: Largest absolute difference.
        top1: Share of rows whose largest entry is the same; None unless rows are class scores.
        kl: Mean KL(softmax(r) || softmax(c)) in nats; None unless rows are class scores.
        perplexity: exp(mean cross-entropy in nats) of the candidate; None without targets.
        perplexity_reference: The same of the reference.
        rows: Number of rows compared.
    """

    relative_l2: float
    cosine: float
    max_abs: float
    top1: float | None = None
    kl: float | None = None
    perplexity: float | None = None
    perplexity_reference: float | None = None
    rows: int = 0

    @property
    def perplexity_ratio(self) -> float | None:
        """Candidate's perplexity divided by the reference's."""
        if self.perplexity is None or not self.perplexity_reference:
            return None
        return self.perplexity / self.perplexity_reference

    def as_dict(self) -> dict[str, float]:
        """The metrics that have a meaning, by name."""
        items = {**self.__dict__, "perplexity_ratio": self.perplexity_ratio}
        return {name: value for name, value in items.items() if value is not None}


#: Metric names that a budget can be set on, and whether more of it is worse.
METRICS: dict[str, bool] = {
    "relative_l2": True,
    "cosine": False,
    "max_abs": True,
    "top1": False,
    "kl": True,
    "perplexity": True,
    "perplexity_ratio": True,
}


class DriftMeter:
    """Accumulates a ``Drift`` over batches; memory does not grow with their number."""

    def __init__(self, *, scores: bool = True) -> None:
        """Start empty.

        Args:
            scores: Rows are class scores (logits); otherwise top-1 and KL are left out.
        """
        self._scores = scores
        self._rows = 0
        self._difference = self._reference = self._cosine = 0.0
        self._max = 0.0
        self._same = 0
        self._kl = 0.0
        self._targets = 0
        self._loss = self._loss_reference = 0.0

    def update(
        self,
        reference: np.ndarray,
        candidate: np.ndarray,
        valid: np.ndarray | None = None,
        targets: np.ndarray | None = None,
    ) -> None:
        """Compare one batch.

        Args:
            reference: [..., C].
            candidate: Same shape.
            valid: [...] bool, rows to compare; None = all.
            targets: [...] integer class that each row should predict, negative = not counted.
                Independent of ``valid``.

        Raises:
            ValueError: The shapes differ.
        """
        if reference.shape != candidate.shape:
            raise ValueError(f"shapes differ: {reference.shape} and {candidate.shape}")
        r, c = as_rows(reference), as_rows(candidate)
        keep = np.ones(len(r), bool) if valid is None else np.asarray(valid, bool).ravel()
        goal = None if targets is None else np.asarray(targets).ravel()
        for part in _chunks(r):
            self._compare(r[part], c[part], keep[part], None if goal is None else goal[part])

    def _compare(
        self, r: np.ndarray, c: np.ndarray, keep: np.ndarray, goal: np.ndarray | None
    ) -> None:
        r, c = r.astype(np.float64), c.astype(np.float64)
        d = c - r
        norm_r = np.einsum("rc,rc->r", r, r)
        self._rows += int(keep.sum())
        self._difference += float(np.einsum("rc,rc->r", d, d)[keep].sum())
        self._reference += float(norm_r[keep].sum())
        if keep.any():
            # np.maximum, unlike max, keeps a NaN.
            largest = np.abs(d).max(axis=1, initial=0.0)
            self._max = float(np.maximum(self._max, largest[keep].max()))
        self._cosine += float(row_cosine(r, c)[keep].sum())
        if self._scores and r.shape[1]:
            self._add_scores(r, c, d, keep, goal)

    def _add_scores(
        self, r: np.ndarray, c: np.ndarray, d: np.ndarray, keep: np.ndarray, goal: np.ndarray | None
    ) -> None:
        """KL = sum p (r - c) - lse(r) + lse(c), with p = softmax(r), lse = log sum exp."""
        self._same += int((r.argmax(-1) == c.argmax(-1))[keep].sum())
        powers, sum_r, lse_r = _exponentials(r)
        lse_c = _exponentials(c)[2]
        mean = np.einsum("rc,rc->r", powers, d) / sum_r
        self._kl += float((lse_c - lse_r - mean)[keep].sum())
        if goal is not None:
            index = np.flatnonzero(goal >= 0)
            self._targets += len(index)
            self._loss += float((lse_c[index] - c[index, goal[index]]).sum())
            self._loss_reference += float((lse_r[index] - r[index, goal[index]]).sum())

    def result(self) -> Drift:
        """The drift over everything seen so far; NaN where outputs were not finite."""
        rows = max(self._rows, 1)
        if self._reference > 0:
            relative = math.sqrt(self._difference / self._reference)
        else:
            relative = math.inf if self._difference > 0 else math.sqrt(self._difference)
        losses: tuple[float | None, float | None] = (None, None)
        if self._targets:
            losses = (
                _exp(self._loss / self._targets),
                _exp(self._loss_reference / self._targets),
            )
        return Drift(
            relative_l2=relative,
            cosine=self._cosine / rows,
            max_abs=self._max,
            top1=self._same / rows if self._scores else None,
            # Rounding may leave a tiny negative sum where both are equal.
            kl=(self._kl if math.isnan(self._kl) else max(self._kl, 0.0)) / rows
            if self._scores
            else None,
            perplexity=losses[0],
            perplexity_reference=losses[1],
            rows=self._rows,
        )


def _exp(x: float) -> float:
    return x if math.isnan(x) else math.exp(min(x, 700.0))


def as_rows(array: np.ndarray) -> np.ndarray:
    """[..., C] -> [rows, C]; arrays of one axis are one row."""
    return array.reshape(-1, array.shape[-1]) if array.ndim > 1 else array.reshape(1, -1)


def _chunks(rows: np.ndarray) -> Iterator[slice]:
    step = max(1, _CHUNK // max(1, rows.shape[1]))
    return (slice(i, i + step) for i in range(0, len(rows), step))


def _exponentials(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the rows of x: exp(x - max), its sum, and log sum exp(x)."""
    peak = x.max(axis=1, keepdims=True)
    powers = np.exp(x - peak)
    total = powers.sum(axis=1)
    return powers, total, np.log(total) + peak[:, 0]


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Logarithm of the softmax over the last axis, without overflow."""
    if x.shape[-1] == 0:
        return x
    shifted = x - x.max(axis=-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def row_cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of the angle between the rows of a and b; 1 for two zero rows, 0 for one.

    Args:
        a: [rows, C].
        b: [rows, C].
    """
    dot = np.einsum("rc,rc->r", a, b, dtype=np.float64)
    norm_a = np.sqrt(np.einsum("rc,rc->r", a, a, dtype=np.float64))
    norm_b = np.sqrt(np.einsum("rc,rc->r", b, b, dtype=np.float64))
    product = norm_a * norm_b
    both_zero = (norm_a == 0) & (norm_b == 0)
    return np.where(both_zero, 1.0, dot / np.where(product == 0, 1.0, product))
