"""Runs the passes of a recipe over a model, and proves after each what it did.

For each pass: rewrite -> invariants -> numbers. The model is rewritten in place; a failure names
the pass and leaves nothing on disk, because writing comes last and is not done here.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from optimizer import checks, graph, memory, verify
from optimizer.calibration import Calibration, Reference
from optimizer.errors import (
    BudgetError,
    CalibrationError,
    NoopError,
    OptimizerError,
    PassContractError,
    VerificationError,
    place_of,
)
from optimizer.legalize import legalize
from optimizer.listener import Listener, Silent
from optimizer.metrics import Drift
from optimizer.pass_base import Context, Exactness, Report
from optimizer.provenance import stamp
from optimizer.recipe import FIRST_PASS, Recipe, Step
from optimizer.report import Row, RunReport, Size
from passes import get_pass

logger = logging.getLogger(__name__)


@dataclass
class Data:
    """Sample data of a run.

    Attributes:
        calibration: What passes may look at.
        evaluation: What drift is measured on; None = the calibration data.
    """

    calibration: Calibration | None = None
    evaluation: Calibration | None = None

    @property
    def measuring(self) -> Calibration | None:
        """The data that drift is measured on."""
        return self.evaluation or self.calibration


@dataclass
class Run:
    """One run of the pipeline; ``execute`` does it."""

    model: ir.Model
    recipe: Recipe
    data: Data = field(default_factory=Data)
    listener: Listener = field(default_factory=Silent)
    source: str = "model"
    custom_ops: tuple[Path, ...] = ()
    threads: int = 1
    max_memory: int | None = None
    fail_on_noop: bool = False
    keep_missed: bool = False
    plan_only: bool = False

    def execute(self) -> RunReport:
        """Rewrite the model.

        Returns:
            The report; the model is ``self.model``.

        Raises:
            VerificationError: A pass moved the numbers more than it may.
            BudgetError: The drift misses the budget, unless ``keep_missed`` is set.
            NoopError: Nothing matched and ``fail_on_noop`` is set.
            OptimizerError: See the passes.
        """
        require_data(
            self.recipe,
            calibrated=self.data.calibration is not None,
            measured=self.data.measuring is not None,
        )
        self.report = RunReport(self.source, opset_of(self.model), size_of(self.model))
        self._reference = self._measure_original()
        self._original = self.model.clone() if self._verifies("final") else None
        self._exact = True
        self._measured = False
        for step in all_steps(self.recipe):
            self._run_pass(step)
        if self.fail_on_noop and not self.report.matched():
            raise NoopError(noop_message(self.report))
        if not self.plan_only:
            self._lower()
            self._judge()
        stamp(self.model, self.recipe)
        return self.report

    def _verifies(self, *when: str) -> bool:
        return self.recipe.settings.verify in when and not self.plan_only

    def _measure_original(self) -> Reference | None:
        data = self.data.measuring
        if data is None or not self._verifies("each", "final"):
            return None
        self.listener.stage("running the original model")
        self.report.samples = data.samples.count
        return data.reference(self.model)

    def _run_pass(self, step: Step) -> None:
        self.listener.stage(step.name)
        graph_pass = step.create()
        exactness = graph_pass.exactness
        size, before = size_of(self.model), self.model.clone()
        with memory.Peak() as peak:
            started = time.perf_counter()
            with blame(step.name):
                result = graph_pass.call(self.model, self._context())
                rewritten = time.perf_counter()
                checks.check_pass(before, self.model, graph_pass, result)
            self._exact = self._exact and exactness is not Exactness.APPROXIMATE
            self._measured = self._measured and not result.modified
            verdict = drift = None
            if result.modified and self._verifies("each"):
                verdict, drift = self._verify(step.name, before, exactness)
        for skip in result.skipped:
            logger.debug("%s: left %s alone: %s", step.name, skip.site, skip.reason)
        times = (rewritten - started, time.perf_counter() - rewritten)
        row = _row(step.name, exactness, result, (size, size_of(self.model)), times)
        self.report.rows.append(replace(row, peak_bytes=peak.bytes, drift=drift, verdict=verdict))

    def _context(self) -> Context:
        return Context(
            target=self.recipe.settings.target,
            opset=self.recipe.settings.opset,
            calibration=self.data.calibration,
            evaluation=self.data.measuring,
            listener=self.listener,
        )

    def _verify(
        self, name: str, before: ir.Model, exactness: Exactness
    ) -> tuple[str | None, Drift | None]:
        """Prove an exact pass, measure an approximate one."""
        if exactness is not Exactness.APPROXIMATE:
            return self._prove(name, before, exactness), None
        return None, self._measure(name)

    def _prove(self, name: str, before: ir.Model, exactness: Exactness) -> str:
        self.listener.stage(f"{name}: verifying")
        with blame(name):
            verdict = verify.verify(
                before,
                self.model,
                exactness,
                samples=None if self.data.measuring is None else self.data.measuring.samples,
                custom_ops=self.custom_ops,
                threads=self.threads,
                max_memory=self.max_memory,
            )
        return str(verdict)

    def _measure(self, name: str) -> Drift | None:
        if self._reference is None or self.data.measuring is None:
            return None
        self.listener.stage(f"{name}: measuring drift")
        # A model that overflows is reported below, not by numpy's warnings.
        with blame(name), np.errstate(all="ignore"):
            drift = self.data.measuring.drift(self._reference, self.model)
        if not math.isfinite(drift.relative_l2):
            msg = (
                f"pass '{name}': the outputs are not finite any more on the sample data, those of "
                "the original are; nothing was written"
            )
            raise VerificationError(msg)
        self._measured, self.report.drift = True, drift
        return drift

    def _lower(self) -> None:
        settings = self.recipe.settings
        self.listener.stage(f"legalize for {settings.target}")
        size, before = size_of(self.model), self.model.clone()
        with memory.Peak() as peak:
            started = time.perf_counter()
            with blame("legalize"):
                result = legalize(
                    self.model, settings.target, kv_cache=settings.kv_cache, opset=settings.opset
                )
                rewritten = time.perf_counter()
                checks.check_model(self.model, settings.target, before)
            verdict, drift = self._verify_lowered(before, modified=result.modified)
        times = (rewritten - started, time.perf_counter() - rewritten)
        sizes = (size, size_of(self.model))
        row = _row("legalize", Exactness.REASSOCIATED, result, sizes, times)
        self.report.rows.append(replace(row, peak_bytes=peak.bytes, drift=drift, verdict=verdict))

    def _verify_lowered(
        self, before: ir.Model, *, modified: bool
    ) -> tuple[str | None, Drift | None]:
        """Prove the lowering, or with ``--verify final`` the whole run; measure the result."""
        if not self._verifies("each", "final"):
            return None, None
        verdict = None
        # Rounding in a quantized graph can flip a number to its neighbour, which no bound on
        # floating-point error covers: after an approximate pass the measured drift decides.
        if self._exact and self._original is not None:
            verdict = self._prove("legalize", self._original, Exactness.REASSOCIATED)
        elif self._exact and modified:
            verdict = self._prove("legalize", before, Exactness.REASSOCIATED)
        unseen = self.data.measuring is None and self.max_memory is None
        if not self._exact and unseen:
            # There is nothing to measure on, but what is written has run.
            verdict = self._prove("legalize", before, Exactness.APPROXIMATE)
        if self._measured and not modified:
            return verdict, self.report.drift
        return verdict, self._measure("legalize")

    def _judge(self) -> None:
        limits = self.recipe.limits()
        if not limits.limits or self.report.drift is None:
            return
        failures = limits.failures(self.report.drift)
        if failures:
            self.report.missed = "the result misses the budget: " + "; ".join(failures)
            if not self.keep_missed:
                raise BudgetError(f"{self.report.missed}; nothing was written")


def _row(
    name: str,
    exactness: Exactness,
    result: Report,
    sizes: tuple[Size, Size],
    times: tuple[float, float],
) -> Row:
    return Row(
        name=name,
        exactness=exactness,
        modified=result.modified,
        applied=result.applied,
        skipped=result.skipped,
        sites=result.sites,
        details=result.details,
        notes=result.notes,
        before=sizes[0],
        after=sizes[1],
        seconds=times[0],
        seconds_checking=times[1],
        peak_bytes=0,
    )


def require_data(recipe: Recipe, *, calibrated: bool = False, measured: bool = False) -> None:
    """Refuse a recipe that needs sample data where there is none.

    Raises:
        CalibrationError: Names the pass and the option to add.
    """
    for step in recipe.steps:
        if not calibrated and step.create().needs_calibration():
            msg = (
                f"pass '{step.name}' needs sample data; add --calibration FILE.npz (one array per "
                "model input), or --calibration self for a language model"
            )
            raise CalibrationError(msg)
    settings = recipe.settings
    if settings.budget and (not (measured or calibrated) or settings.verify == "off"):
        missing = "--verify final" if settings.verify == "off" else "--eval FILE.npz"
        msg = f"--budget needs a measured drift; add {missing}"
        raise CalibrationError(msg)


@contextmanager
def blame(name: str) -> Iterator[None]:
    """Put the name of the pass in front of what went wrong in it."""
    try:
        yield
    except OptimizerError as error:
        if str(error).startswith(f"pass '{name}'"):
            raise
        raise type(error)(f"pass '{name}': {error}") from error
    except MemoryError:
        raise
    except (Exception, SystemExit) as error:
        msg = (
            f"pass '{name}' failed at {place_of(error)}: {type(error).__name__}: {error}; this is "
            "a defect of the pass"
        )
        raise PassContractError(msg) from error


def all_steps(recipe: Recipe) -> tuple[Step, ...]:
    """The steps of a recipe and ``canonicalize``, which is named only where others come before."""
    if any(step.name == FIRST_PASS for step in recipe.steps):
        return recipe.steps
    pass_class = get_pass(FIRST_PASS)
    return (Step(pass_class, pass_class.Options(), FIRST_PASS), *recipe.steps)


def size_of(model: ir.Model) -> Size:
    """Nodes of the main graph and bytes of all initializers."""
    return Size(sum(1 for _ in model.graph), graph.size_bytes(model))


def opset_of(model: ir.Model) -> int:
    """Version of the standard operators."""
    imports = model.graph.opset_imports
    return imports.get("", imports.get("ai.onnx", 0))


def noop_message(report: RunReport) -> str:
    """Why nothing matched, from the first reasons given."""
    rows = [row for row in report.rows if row.name != FIRST_PASS]
    if not rows:
        return "--fail-on-noop: no pass was named, so none matched"
    reasons = [f"{row.name}: {row.skipped[0].reason}" for row in rows if row.skipped]
    named = ", ".join(row.name for row in rows)
    return f"--fail-on-noop: {named} matched nothing" + (
        f" ({'; '.join(reasons)})" if reasons else ""
    )
