"""Runs an engine that was just built, where a GPU is, and compares it with the original model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from optimizer.budget import Budget
from optimizer.calibration import Calibration
from optimizer.comparison import (
    drift_between,
    fit,
    for_engines,
    made_up,
    reference_of,
    specs_of,
)
from optimizer.engines.loading import why_not_here
from optimizer.errors import BudgetError, VerificationError
from optimizer.export.bundle_samples import tolerance
from optimizer.listener import Listener
from optimizer.model_io import load_model
from optimizer.runners.tensorrt import TensorRTRunner
from optimizer.samples import SampleSpec, load_samples


@dataclass(frozen=True)
class Evaluation:
    """What an engine is compared with, and on what.

    Attributes:
        original: The model as it came; None = the one that the engine was built from.
        data: Samples; None = made up.
        samples: Use only the first.
        threads: Of ONNX Runtime.
        custom_ops: Libraries of custom operators.
        budget: Largest drift.
        keep: Accept an engine that misses the budget.
    """

    original: Path | None = None
    data: SampleSpec | None = None
    samples: int | None = None
    threads: int = 1
    custom_ops: Sequence[Path] = ()
    budget: str | None = None
    keep: bool = False


def check_numbers(
    plan: Path,
    legal: Path,
    manifest: Mapping[str, Any],
    evaluation: Evaluation | None,
    *,
    plugins: Sequence[Path],
    listener: Listener,
) -> dict[str, Any]:
    """Run an engine on the samples, in this process.

    It may be as far from the original as the ONNX model that it was built from, and what rounding
    explains (``export.bundle_samples.tolerance``).

    Args:
        plan: The engine.
        legal: The model that it was built from.
        manifest: Of the engine.
        evaluation: None = do not run it.
        plugins: Libraries that it needs.
        listener: Is told the phase.

    Returns:
        "skipped", why it was not run; or "drift" from the original, "onnx" and "allowed" (relative
        L2 of the ONNX model, and the most of the engine), "samples", "data", "missed" (the budget).

    Raises:
        VerificationError: Its outputs are further from the original's than that.
        BudgetError: It misses the budget.
        EngineError: It cannot be run, although there is a GPU that it was built for.
    """
    if evaluation is None:
        return {"skipped": "verification is off"}
    reason = why_not_here(plan, manifest)
    if reason is not None:
        return {"skipped": reason}
    listener.stage("running the engine on the samples")
    runner = TensorRTRunner(plan, plugins=plugins, manifest=manifest)
    model = load_model(legal, evaluation.custom_ops, check_numbers=False)
    original = model
    if evaluation.original is not None:
        original = load_model(evaluation.original, evaluation.custom_ops, check_numbers=False)
    calibration, source = _samples(original, runner, evaluation, listener)
    reference = reference_of(calibration, original)
    own = 0.0 if original is model else calibration.drift(reference, model).relative_l2
    drift = drift_between(calibration, reference, runner)
    allowed = own + tolerance(model)
    if not drift.relative_l2 <= allowed:
        data = f"relative L2, {calibration.samples.count} samples from {source}"
        msg = (
            f"the engine's output '{reference.output}' differs from the original's by "
            f"{drift.relative_l2:.3g} ({data}), that of the ONNX model by {own:.3g}; rounding "
            f"explains up to {allowed:.3g}; no engine was written"
        )
        raise VerificationError(msg)
    failures = Budget.parse(evaluation.budget).failures(drift)
    missed = "the engine misses the budget: " + "; ".join(failures) if failures else None
    if missed and not evaluation.keep:
        raise BudgetError(f"{missed}; no engine was written")
    return {
        "drift": drift.as_dict(),
        "onnx": own,
        "allowed": allowed,
        "samples": calibration.samples.count,
        "data": source,
        "missed": missed,
    }


def _samples(
    original: ir.Model, runner: TensorRTRunner, evaluation: Evaluation, listener: Listener
) -> tuple[Calibration, str]:
    """The data, where the engine's profiles take it; else made up in their usual shapes."""
    specs, data = specs_of(original), evaluation.data

    def calibration(spec: SampleSpec, limit: int | None = None) -> Calibration:
        made = Calibration(
            load_samples(spec, specs, limit=limit, option="--eval"),
            threads=evaluation.threads,
            custom_ops=evaluation.custom_ops,
            progress=listener.progress,
        )
        return for_engines(made, [runner])

    source = "made-up inputs"
    if data is not None and data != "self":
        given = calibration(data, evaluation.samples)
        if fit(given, [runner]):
            return given, str(data) if isinstance(data, str | Path) else "the data given"
        source = "made-up inputs, as the data is in the range of no optimization profile"
    return calibration(made_up(specs, [runner])), source
