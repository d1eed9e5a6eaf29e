"""Measures what each rewrite of an approximate pass does alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from optimizer.calibration import Calibration
from optimizer.errors import OptimizerError
from optimizer.gate import Rewrite, only
from optimizer.judges import Verdict, measured
from optimizer.listener import Listener
from optimizer.metrics import Drift
from optimizer.stages import Stage


@dataclass(frozen=True)
class Share:
    """What one rewrite does alone.

    Attributes:
        stage: Name of the pass.
        rewrite: The one.
        drift: From the model before the pass; None where it could not be measured.
        problem: Why not.
    """

    stage: str
    rewrite: Rewrite
    drift: Drift | None
    problem: str = ""

    @property
    def damage(self) -> float:
        """KL where there is one, else relative L2; what could not be measured comes first."""
        if self.drift is None:
            return float("inf")
        return self.drift.relative_l2 if self.drift.kl is None else self.drift.kl

    @property
    def measure(self) -> str:
        """What ``damage`` is."""
        return "relative L2" if self.drift is None or self.drift.kl is None else "KL"


def measure_shares(
    stages: Sequence[Stage], data: Calibration, listener: Listener
) -> tuple[Share, ...]:
    """Repeat each pass with one rewrite at a time.

    Returns:
        One entry per rewrite, the most harmful first.
    """
    shares = []
    for stage in stages:
        reference = data.reference(stage.before)
        rewrites = list(dict.fromkeys(stage.rewrites))
        for number, rewrite in enumerate(rewrites):
            listener.stage(f"{stage.name}: {rewrite} alone, {number + 1} of {len(rewrites)}")
            try:
                found: Drift | Verdict | str = measured(data, reference, _alone(stage, rewrite))
            except OptimizerError as error:
                found = str(error)
            drift = found if isinstance(found, Drift) else None
            shares.append(Share(stage.name, rewrite, drift, "" if drift else str(found)))
    return tuple(sorted(shares, key=lambda share: -share.damage))


def _alone(stage: Stage, rewrite: Rewrite) -> ir.Model:
    return stage.repeat(only(rewrite))[0]
