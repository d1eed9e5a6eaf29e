"""The error of a model's outputs against a reference, and how much of it is allowed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import ml_dtypes
import numpy as np

from optimizer.errors import VerificationError
from optimizer.probes import Probe

Outputs: TypeAlias = dict[str, np.ndarray]

#: Error allowed relative to the original's own.
OWN_ERROR_FACTOR = 2.0
#: Error allowed in units of eps * max|y|, however small the original's own is.
EPSILON_FACTOR = 16.0


@dataclass
class OutputError:
    """Largest absolute errors of one output, over all probes."""

    own: float = 0.0
    found: float = 0.0
    scale: float = 0.0
    epsilon: float = float(np.finfo(np.float32).eps)

    @property
    def bound(self) -> float:
        """Largest error allowed."""
        return max(OWN_ERROR_FACTOR * self.own, EPSILON_FACTOR * self.epsilon * self.scale)

    def ratio(self) -> float:
        """Error in units of what is allowed."""
        if self.found == 0:
            return 0.0
        return self.found / self.bound if self.bound > 0 else math.inf


def is_floating(array: np.ndarray) -> bool:
    """Whether small differences are roundings: not of integers, nor of strings."""
    return array.dtype.kind in "fcV"


def wide(array: np.ndarray) -> np.ndarray:
    """As float64."""
    return array.astype(np.float64)


def collect(
    errors: dict[str, OutputError],
    attribute: str,
    probe: Probe,
    reference: Outputs,
    outputs: Outputs,
) -> None:
    """Enlarge the errors by those of one run.

    Raises:
        VerificationError: An integer output differs, or a number stopped being finite.
    """
    for name, raw in outputs.items():
        if name not in reference:
            continue
        expected, found = _aligned(reference[name], raw, name)
        expected, found = probe.rows(expected), probe.rows(found)
        if not is_floating(raw):
            if attribute == "found" and not np.array_equal(expected, found):
                what = "integers" if raw.dtype.kind in "iub" else "values"
                raise VerificationError(f"output '{name}' holds other {what}")
            continue
        entry = errors.setdefault(name, OutputError())
        finite = np.isfinite(expected)
        if attribute == "found" and not np.isfinite(found[finite]).all():
            raise VerificationError(f"output '{name}' is not finite where the original's is")
        difference = np.abs(wide(found)[finite] - wide(expected)[finite])
        entry.epsilon = max(entry.epsilon, float(ml_dtypes.finfo(raw.dtype).eps))
        entry.scale = max(entry.scale, float(np.abs(expected[finite]).max(initial=0.0)))
        largest = float(difference.max(initial=0.0))
        setattr(entry, attribute, max(getattr(entry, attribute), largest))


def _aligned(expected: np.ndarray, found: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Equal shapes; a cache that is filled in place may be longer than what it holds."""
    if expected.shape == found.shape:
        return expected, found
    if expected.ndim == 4 and found.ndim == 4 and found.shape[2] > expected.shape[2]:
        found = found[:, :, : expected.shape[2]]
    if expected.shape != found.shape:
        raise VerificationError(
            f"output '{name}' has shape {list(found.shape)}, it was {list(expected.shape)}"
        )
    return expected, found
