"""Says whether a model is still good: by proof against the model before it, or by its drift."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx_ir as ir

from optimizer import verify
from optimizer.budget import Budget
from optimizer.calibration import Calibration, Reference
from optimizer.errors import (
    CalibrationError,
    MissingDependencyError,
    ModelError,
    UnsupportedError,
    VerificationError,
)
from optimizer.metrics import Drift
from optimizer.pass_base import Exactness


class Outcome(enum.Enum):
    """What a check says of a model."""

    GOOD = "good"
    BAD = "bad"
    UNKNOWN = "cannot be judged"


@dataclass(frozen=True)
class Verdict:
    """One answer of a judge.

    Attributes:
        outcome: The answer.
        reason: Why, or what was measured, as a sentence fragment; may be empty.
        output: What a command printed last, line by line.
    """

    outcome: Outcome
    reason: str = ""
    output: tuple[str, ...] = ()

    def is_good(self) -> bool | None:
        """None where it cannot be judged."""
        return None if self.outcome is Outcome.UNKNOWN else self.outcome is Outcome.GOOD

    def __str__(self) -> str:
        """For a message."""
        return f"{self.outcome.value}: {self.reason}" if self.reason else self.outcome.value


@dataclass(frozen=True)
class Candidate:
    """A model to judge.

    Attributes:
        model: In canonical form, or lowered if the judge asks for it.
        before: What the stage that made it started from.
        exactness: What that stage has to keep.
    """

    model: ir.Model
    before: ir.Model
    exactness: Exactness


class Judge(Protocol):
    """Judges models.

    Attributes:
        title: What it checks, for the report.
        stepwise: It compares each stage with the one before, not with the original.
        lowered: Candidates must be in the form of the target, as a run would write them.
    """

    title: str
    stepwise: bool
    lowered: bool

    def original(self) -> Verdict | None:
        """Judge the original model; None where there is nothing to compare it with."""

    def judge(self, candidate: Candidate) -> Verdict:
        """Judge another."""


@dataclass
class DriftJudge:
    """A model is good while its drift from the original is within a budget."""

    model: ir.Model
    data: Calibration
    budget: Budget
    title: str = field(init=False)
    stepwise: bool = field(default=False, init=False)
    lowered: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        limits = ", ".join(limit.text for limit in self.budget.limits)
        self.title = f"{limits} on {self.data.samples.count} samples"
        self._reference: Reference = self.data.reference(self.model)

    def original(self) -> Verdict:
        """A limit may be one that the original itself misses."""
        return self._measure(self.model)

    def judge(self, candidate: Candidate) -> Verdict:
        """Measure the drift from the original."""
        return self._measure(candidate.model)

    def _measure(self, model: ir.Model) -> Verdict:
        drift = measured(self.data, self._reference, model)
        if isinstance(drift, Verdict):
            return drift
        failures = self.budget.failures(drift)
        if failures:
            return Verdict(Outcome.BAD, "; ".join(failures))
        return Verdict(
            Outcome.GOOD, "; ".join(limit.measured(drift) for limit in self.budget.limits)
        )


@dataclass
class ProofJudge:
    """What a run checks after each pass: exact ones are proven, others must stay finite."""

    model: ir.Model
    data: Calibration | None
    custom_ops: Sequence[Path] = ()
    threads: int = 1
    max_memory: int | None = None
    title: str = "each exact stage is proven against the one before, as in a run"
    stepwise: bool = field(default=True, init=False)
    lowered: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._reference = None if self.data is None else self.data.reference(self.model)

    def original(self) -> Verdict | None:
        """Nothing to compare with."""
        return None

    def judge(self, candidate: Candidate) -> Verdict:
        """Compare with the model before the stage."""
        if candidate.exactness is Exactness.APPROXIMATE:
            return self._finite(candidate.model)
        try:
            proof = verify.verify(
                candidate.before,
                candidate.model,
                candidate.exactness,
                samples=None if self.data is None else self.data.samples,
                custom_ops=self.custom_ops,
                threads=self.threads,
                max_memory=self.max_memory,
            )
        except (VerificationError, ModelError) as error:
            return Verdict(Outcome.BAD, str(error))
        except UnsupportedError as error:
            return Verdict(Outcome.UNKNOWN, str(error))
        return Verdict(Outcome.GOOD, str(proof))

    def _finite(self, model: ir.Model) -> Verdict:
        if self.data is None or self._reference is None:
            return Verdict(Outcome.GOOD, "approximate, not measured without data")
        drift = measured(self.data, self._reference, model)
        if isinstance(drift, Verdict):
            return drift
        return Verdict(Outcome.GOOD, f"approximate, relative L2 {drift.relative_l2:.3g}")


def measured(data: Calibration, reference: Reference, model: ir.Model) -> Drift | Verdict:
    """The drift of ``model``; a verdict where it has none."""
    try:
        # A model that overflows is reported below, not by numpy's warnings.
        with np.errstate(all="ignore"):
            drift = data.drift(reference, model)
    except MissingDependencyError:
        raise
    except UnsupportedError as error:
        return Verdict(Outcome.UNKNOWN, str(error))
    except (ModelError, CalibrationError) as error:
        return Verdict(Outcome.BAD, str(error))
    if not math.isfinite(drift.relative_l2):
        return Verdict(Outcome.BAD, "the outputs are not finite")
    return drift
