"""The stages of a run, each with the model before and after it, ready to be repeated in part."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import onnx_ir as ir

from optimizer import checks
from optimizer.errors import PassContractError
from optimizer.fingerprint import fingerprint
from optimizer.gate import Choice, Gate, Recorder, Rewrite
from optimizer.legalize import legalize
from optimizer.listener import Listener
from optimizer.pass_base import Context, Exactness, GraphPass, Report
from optimizer.pipeline import Data, all_steps, blame
from optimizer.recipe import Recipe, Settings

logger = logging.getLogger(__name__)

LOWERING = "legalize"


class _Rewriter(Protocol):
    """What a stage does to a model."""

    def __call__(self, model: ir.Model, gate: Gate) -> Report:
        """Rewrite in place what the gate lets through."""

    def check(self, before: ir.Model, after: ir.Model, report: Report) -> None:
        """Check the graph."""


@dataclass(frozen=True)
class _Pass:
    """A step of a recipe."""

    graph_pass: GraphPass[Any]
    context: Context

    def __call__(self, model: ir.Model, gate: Gate) -> Report:
        return self.graph_pass.call(model, replace(self.context, gate=gate))

    def check(self, before: ir.Model, after: ir.Model, report: Report) -> None:
        checks.check_pass(before, after, self.graph_pass, report)


@dataclass(frozen=True)
class _Lowering:
    """To the form of the target."""

    settings: Settings

    def __call__(self, model: ir.Model, gate: Gate) -> Report:
        chosen = self.settings
        return legalize(
            model, chosen.target, kv_cache=chosen.kv_cache, opset=chosen.opset, gate=gate
        )

    def check(self, before: ir.Model, after: ir.Model, report: Report) -> None:
        del report
        # Lowered in part, a model need not be one that the target takes.
        checks.check_graph(after, f"pass '{LOWERING}'", operators=_operators(before, after))


@dataclass(eq=False)
class Stage:
    """One stage.

    Attributes:
        name: Of the pass, or ``LOWERING``.
        exactness: What it declares.
        proven: Whether a run proves it exact, or only measures what it did.
        before: The model as it comes in; never changed.
        after: The model as it goes out; None = the stage failed.
        modified: Whether the two differ.
        rewrites: What asked the gate, in order; of a failed stage, up to the failure.
        error: Why it failed.
    """

    name: str
    exactness: Exactness
    proven: bool
    before: ir.Model
    _rewriter: _Rewriter
    after: ir.Model | None = None
    modified: bool = False
    rewrites: tuple[Rewrite, ...] = ()
    error: str | None = None
    _decisions: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """Run it whole.

        Raises:
            OptimizerError: The fault is not the pass's own.
        """
        recorder = Recorder(decisions=self._decisions)
        try:
            self.after, self.modified = self._run(recorder)
        except PassContractError as error:
            self.error, self.modified = str(error), True
        self.rewrites = tuple(recorder.taken)

    def repeat(self, choose: Choice | None = None) -> tuple[ir.Model, tuple[Rewrite, ...]]:
        """The stage again with only the rewrites that ``choose`` lets through; None = all.

        Returns:
            The model after it, and the rewrites made.

        Raises:
            OptimizerError: The graph is not legal then, or cannot be made.
        """
        recorder = Recorder(choose, self._decisions)
        model, _ = self._run(recorder)
        return model, tuple(recorder.taken)

    def _run(self, recorder: Recorder) -> tuple[ir.Model, bool]:
        """The model after the stage, and whether it changed."""
        model = self.before.clone()
        with blame(self.name):
            report = self._rewriter(model, recorder)
            changed = fingerprint(self.before).difference(fingerprint(model)) is not None
            # A pass that was refused everything may still count what it would have done.
            self._rewriter.check(self.before, model, replace(report, modified=changed))
        return model, changed


def run_stages(
    model: ir.Model, recipe: Recipe, data: Data, listener: Listener, *, lowering: bool
) -> list[Stage]:
    """Run a recipe and keep every state; ends with the first stage that fails.

    The states share all weights that no pass changed.

    Args:
        model: As loaded; stays as it is.
        recipe: Passes and target.
        data: What passes may look at.
        listener: Is told which stage runs.
        lowering: Whether the lowering is a stage too.

    Raises:
        OptimizerError: The recipe does not fit the model or the data.
    """
    context = Context(
        target=recipe.settings.target,
        opset=recipe.settings.opset,
        calibration=data.calibration,
        evaluation=data.measuring,
        listener=listener,
    )
    stages: list[Stage] = []
    exact = True
    for step in all_steps(recipe):
        graph_pass = step.create()
        exactness = graph_pass.exactness
        proven = exactness is not Exactness.APPROXIMATE
        exact = exact and proven
        stage = Stage(step.name, exactness, proven, model, _Pass(graph_pass, context))
        _add(stages, stage, listener)
        if stage.after is None:
            return stages
        model = stage.after
    if lowering:
        _add(stages, lowering_stage(model, recipe.settings, proven=exact), listener)
    return stages


def _add(stages: list[Stage], stage: Stage, listener: Listener) -> None:
    listener.stage(stage.name)
    stage.run()
    logger.info("bisect: %s: %d rewrites", stage.name, len(stage.rewrites))
    stages.append(stage)


def lowering_stage(model: ir.Model, settings: Settings, *, proven: bool = True) -> Stage:
    """The lowering of ``model``, not yet run."""
    return Stage(LOWERING, Exactness.REASSOCIATED, proven, model, _Lowering(settings))


def _operators(*models: ir.Model) -> set[tuple[str, str]]:
    return {(n.domain, n.op_type) for model in models for n in model.graph.all_nodes()}
