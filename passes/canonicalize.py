"""Raises every exporter's spelling to the canonical dialect that all other passes are written for.

Rewrite:      graph as exported -> graph in the dialect of ``optimizer/DESIGN.md``
              half precision -> float32 with weights stored as they are, for a target that does not
              compute in it
Applies when: a rule of ``STEPS`` proves that its rewrite computes the same; what it does not
              recognise it leaves alone, and says why where it came close
Exactness:    reassociated: sums and products may be ordered differently
Cost:         time linear in the number of nodes; weights are transposed when they are written
Source:       definitions of the operators in the ONNX standard, opset 23
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from optimizer import gate, widening
from optimizer.pass_base import Context, Exactness, GraphPass, PassOptions, Report, Skip
from optimizer.raising import (
    activations,
    attention,
    batches,
    broadcasts,
    constants,
    contrib,
    contrib_attention,
    cse,
    dynamic_tanh,
    grouped,
    half_weights,
    inline,
    linears,
    norms,
    open_masks,
    opset,
    ort_cpu,
    packed,
    reshapes,
    rotary,
    rows,
    sequences,
    simplify,
    stored_weights,
    value_info,
)
from optimizer.raising.base import Miss, RuleReport, opset_of
from optimizer.targets import get_target

Rule = Callable[[ir.Model], RuleReport]


@dataclass(frozen=True)
class Step:
    """One rule of the pass.

    Attributes:
        name: What a report calls it.
        run: Rewrites in place.
        opset: Version of the standard operators from which on what it writes exists.
    """

    name: str
    run: Rule
    opset: int = 1


#: Repeated until none of them finds anything, because each makes room for the others.
_CLEANING: tuple[Rule, ...] = (
    constants.run, reshapes.run, simplify.run, broadcasts.run, cse.run,
)  # fmt: skip
_MAX_ROUNDS = 8


def _part(rule: Rule, model: ir.Model) -> RuleReport:
    """Run a rule that is part of a step, under its name or that of its module."""
    name = rule.__name__ if rule.__name__ != "run" else rule.__module__.rpartition(".")[2]
    with gate.labelled(name):
        return rule(model)


def clean(model: ir.Model) -> RuleReport:
    """Fold, simplify and merge until nothing changes."""
    reports: list[RuleReport] = []
    for _ in range(_MAX_ROUNDS):
        round_report = RuleReport.total([_part(rule, model) for rule in _CLEANING])
        reports.append(round_report)
        if not round_report.applied:
            break
    return RuleReport.total(reports)


def fused(model: ir.Model) -> RuleReport:
    """Raise what ONNX Runtime's tools, and ``legalize``, fuse."""
    rules = (contrib.run, contrib_attention.run, ort_cpu.run)
    return RuleReport.total([_part(rule, model) for rule in rules])


def heads(model: ir.Model) -> RuleReport:
    """Raise attention and split packed projections until nothing changes.

    Some projections can be told apart only once their attention is one node, some attentions are
    recognised only once their projections are apart.
    """
    applied, report = 0, RuleReport()
    for _ in range(_MAX_ROUNDS):
        rules = (
            rotary.run, attention.run, grouped.run, clean, linears.run, rows.run, batches.run,
            packed.run,
        )  # fmt: skip
        reports = [_part(rule, model) for rule in rules]
        applied += sum(each.applied for each in reports)
        report = RuleReport.total(reports)
        if not clean(model).applied and not report.applied:
            break
    return RuleReport(applied, report.skipped)


#: The steps at which inference may fail, which the user is told.
_TYPES = "types"
STEPS: tuple[Step, ...] = (
    Step("stored weights", stored_weights.run),
    Step("inline", inline.run),
    Step("constants", constants.lift),
    Step("half-precision weights", half_weights.run),
    Step("merge", cse.run),
    Step(_TYPES, value_info.fill),
    Step("clean", clean),
    Step("opset", opset.run),
    Step("clean", clean),
    Step("sequences", sequences.run),
    Step("runtime forms", fused, opset=23),
    Step("types", value_info.fill),
    Step("linears", linears.run),
    Step("rows", rows.run),
    Step("clean", clean),
    Step("norms", norms.run, opset=23),
    Step("activations", activations.run, opset=20),
    Step("dynamic tanh", dynamic_tanh.run),
    Step("clean", clean),
    Step("heads", heads, opset=23),
    Step("open masks", open_masks.run),
    Step(_TYPES, value_info.refresh),
)


def steps_for(target: str) -> tuple[Step, ...]:
    """``STEPS``, and before the last one what ``target`` does not compute in becomes float32.

    Not earlier: the rules know how far constants may be off that are stored in half precision.
    """
    chosen = get_target(target)

    def widen(model: ir.Model) -> RuleReport:
        return RuleReport(widening.store_for(model, chosen))

    return (*STEPS[:-1], Step("half precision", widen), STEPS[-1])


class CanonicalizeOptions(PassOptions):
    """None: there is one canonical form."""


class Canonicalize(GraphPass[CanonicalizeOptions]):
    """Raise to the canonical dialect."""

    name = "canonicalize"
    exactness = Exactness.REASSOCIATED
    Options = CanonicalizeOptions

    def call(self, model: ir.Model, context: Context) -> Report:
        """Run ``STEPS`` in order, and again until the types found at the end show nothing more."""
        with gate.using(context.gate):
            return self._run(model, context)

    def _run(self, model: ir.Model, context: Context) -> Report:
        steps = steps_for(context.target)
        counts: Counter[str] = Counter()
        skipped: dict[str, tuple[Miss, ...]] = {}
        warned: dict[Miss, None] = {}
        for number in range(_MAX_ROUNDS):
            before = counts.total()
            for step in steps:
                if opset_of(model) < step.opset:
                    continue
                with gate.labelled(step.name):
                    report = step.run(model)
                counts[step.name] += report.applied
                skipped[step.name] = report.skipped  # what the last run still left alone
                if step.name == _TYPES:
                    warned |= dict.fromkeys(report.skipped)
            if number and counts.total() == before:
                break
        for miss in warned:
            context.listener.note(f"{self.name}: {miss.site}: {miss.reason}")
        applied = counts.total()
        return Report(
            modified=applied > 0,
            applied=applied,
            skipped=tuple(
                dict.fromkeys(
                    Skip(miss.site, miss.reason) for misses in skipped.values() for miss in misses
                )
            ),
            details={"steps": {name: count for name, count in counts.items() if count}},
        )
