"""Which weights of a matrix W [K, N] are zero together."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

_GROUPED = re.compile(r"([1-9]\d{0,3}):([1-9]\d{0,3})")


@dataclass(frozen=True)
class Pattern:
    """A share of zeros, in the matrix, in every column, or in every group of a column.

    Attributes:
        share: Of zeros, from 0 to below 1.
        group: M of an N:M pattern; None = unstructured.
        balanced: Unstructured: every column has the same number of zeros. Those of the others
            compete with each other.
    """

    share: float
    group: int | None = None
    balanced: bool = False

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """N:M: N weights are kept of every M that follow each other along K.

        Raises:
            ValueError: It is not of this form, or keeps all.
        """
        found = _GROUPED.fullmatch(text)
        if found is None or int(found[1]) >= int(found[2]):
            msg = "'2:4', another N:M (N kept of every M consecutive weights, N < M)"
            raise ValueError(msg)
        keep, group = int(found[1]), int(found[2])
        return cls((group - keep) / group, group)

    def __str__(self) -> str:
        """As ``parse`` reads it, or the share."""
        if self.group is None:
            return f"{100 * self.share:.4g} % zeros"
        return f"{self.group - self.zeros(self.group)}:{self.group}"

    def zeros(self, rows: int) -> int:
        """Zeros among ``rows`` weights of a column: all K, or those of a group."""
        return round(self.share * rows)

    def pruned(self, scores: np.ndarray) -> np.ndarray:
        """Where zeros belong: at the lowest scores of each column or group, or of all.

        Args:
            scores: [K, N], of equal scores the first are taken; K is a multiple of M.

        Returns:
            [K, N] bool.
        """
        rows, columns = scores.shape
        if self.group is None and not self.balanced:
            return lowest(scores, self.zeros(rows) * columns)
        size = self.group or rows
        groups = np.ascontiguousarray(scores.T).reshape(columns, -1, size)
        order: np.ndarray = np.argsort(groups, axis=2, kind="stable")[:, :, : self.zeros(size)]
        mask = np.zeros(groups.shape, bool)
        np.put_along_axis(mask, order, values=True, axis=2)
        result: np.ndarray = np.ascontiguousarray(mask.reshape(columns, rows).T)
        return result

    def holds(self, weight: np.ndarray) -> bool:
        """Whether a matrix [K, N] has at least so many exact zeros wherever they are counted."""
        rows, columns = weight.shape
        if self.group is None and not self.balanced:
            return bool((weight == 0).sum() >= self.zeros(rows) * columns)
        if self.group is not None and rows % self.group:
            return False
        zero = (weight == 0).reshape(-1, self.group or rows, columns)
        return bool((zero.sum(axis=1) >= self.zeros(self.group or rows)).all())


def lowest(scores: np.ndarray, count: int) -> np.ndarray:
    """The ``count`` lowest of scores [R, N], without the time that sorting them all takes."""
    flat = scores.ravel()
    mask = np.zeros(flat.shape, bool)
    if count:
        limit = np.partition(flat, count - 1)[count - 1]
        mask = flat < limit
        equal = np.flatnonzero(flat == limit)
        mask[equal[: count - int(mask.sum())]] = True
    result: np.ndarray = mask.reshape(scores.shape)
    return result


def lowest_of_columns(scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The ``counts`` [N] lowest of each column of scores [R, N]."""
    order = np.argsort(scores, axis=0, kind="stable")
    mask = np.zeros(scores.shape, bool)
    np.put_along_axis(mask, order, np.arange(len(scores))[:, None] < counts, axis=0)
    return mask
