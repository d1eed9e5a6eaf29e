"""Finds the first value inside of two models that should compute the same and do not.

Values are compared by name. One that differs is of interest only if an output differs because of
it: a rewrite may well scale a value and scale back what reads it. So the search goes back from the
outputs that differ, through values that differ or that only one model has, to where all that is
read is still the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from optimizer.calibration import input_specs
from optimizer.deviation import OutputError, collect
from optimizer.errors import CalibrationError, ModelError, UnsupportedError, VerificationError
from optimizer.probes import Probe, make_probes
from optimizer.proto import names_read
from optimizer.runners.base import Runner
from optimizer.runners.ort import OrtRunner
from optimizer.runners.reference import ReferenceRunner
from optimizer.samples import SampleSet

#: Values looked at in one run of both models; bounds the memory.
_AT_ONCE = 256


@dataclass(frozen=True)
class Difference:
    """Where two models part.

    Attributes:
        value: Name of the value.
        operator: What computes it in the second model, and in the first where that is another.
        text: By how much it differs.
        method: How both were run.
    """

    value: str
    operator: str
    text: str
    method: str


def first_difference(
    before: ir.Model,
    after: ir.Model,
    *,
    samples: SampleSet | None = None,
    custom_ops: Sequence[str | Path] = (),
    threads: int = 1,
) -> Difference | None:
    """Where ``after`` parts from ``before``, or None where no difference reaches an output.

    Args:
        before: The reference.
        after: Its rewrite.
        samples: Data to take the feeds from; None = they are made up.
        custom_ops: Libraries of custom operators.
        threads: Threads of ONNX Runtime.

    Raises:
        CalibrationError: No feed for the models can be made up.
        UnsupportedError: Neither way to run them takes both.
    """
    probes = make_probes(input_specs(before), samples)
    problem, compared = None, False
    # Both in float64 shows what is wrong in the algebra; float32 what only rounds badly. Padding
    # may be treated differently on the way, so it comes last.
    for runs in (_Float64, _Float32):
        for feeds in ([_unpadded(probe) for probe in probes], probes):
            try:
                found = _search(runs(before, after, custom_ops, threads), feeds)
            except (UnsupportedError, ModelError, CalibrationError) as error:
                problem = error
                continue
            if found is not None:
                return found
            compared = True
    if not compared and problem is not None:
        raise UnsupportedError(f"the values of two models cannot be compared: {problem}")
    return None


@dataclass(frozen=True)
class _Sides:
    """Both models and how to run them."""

    before: ir.Model
    after: ir.Model
    custom_ops: Sequence[str | Path]
    threads: int

    method = ""

    def runners(self, names: Sequence[str]) -> Iterator[tuple[str, Runner]]:
        """The reference first, then runs to compare with it: "own" of the original, "found"."""
        raise NotImplementedError


class _Float64(_Sides):
    method = "both in float64"

    def runners(self, names: Sequence[str]) -> Iterator[tuple[str, Runner]]:
        for kind, model in (("reference", self.before), ("found", self.after)):
            yield kind, ReferenceRunner(model, double=True, extra_outputs=_named(model, names))


class _Float32(_Sides):
    method = "in float32"

    def runners(self, names: Sequence[str]) -> Iterator[tuple[str, Runner]]:
        yield "reference", self._reference(names)
        for kind, model in (("own", self.before), ("found", self.after)):
            yield kind, self._ort(model, names, optimize=kind == "found")

    def _reference(self, names: Sequence[str]) -> Runner:
        try:
            extra = _named(self.before, names)
            return ReferenceRunner(self.before, double=True, extra_outputs=extra)
        except UnsupportedError:
            return self._ort(self.before, names, optimize=False)

    def _ort(self, model: ir.Model, names: Sequence[str], *, optimize: bool) -> Runner:
        return OrtRunner(
            model,
            threads=self.threads,
            extra_outputs=_named(model, names),
            optimize=optimize,
            custom_ops=self.custom_ops,
        )


def _search(sides: _Sides, probes: Sequence[Probe]) -> Difference | None:
    first, second = _producers(sides.before), _producers(sides.after)
    shared = [name for name in second if name in first]
    outputs = [str(v.name) for v in sides.after.graph.outputs]
    texts = _differences(sides, probes, [name for name in outputs if name in first])
    broken = [name for name, text in texts.items() if text is not None]
    if not broken:
        return None
    for start in range(0, len(shared), _AT_ONCE):
        texts.update(_differences(sides, probes, shared[start : start + _AT_ONCE]))
    reached = _reached(broken, second, texts)
    name = next(name for name in second if name in reached)
    ops = [producers[name].op_type for producers in (second, first)]
    operator = ops[0] if ops[0] == ops[1] else f"{ops[0]}, before {ops[1]}"
    return Difference(name, operator, str(texts[name]), sides.method)


def _differences(
    sides: _Sides, probes: Sequence[Probe], names: Sequence[str]
) -> dict[str, str | None]:
    """How values differ by more than allowed, in words; None where they do not."""
    result: dict[str, str | None] = dict.fromkeys(names)
    errors: dict[str, OutputError] = {}
    wanted: list[dict[str, np.ndarray]] = []
    for kind, runner in sides.runners(names):
        for index, probe in enumerate(probes):
            arrays = runner.run({n: probe.feed[n] for n in runner.input_names if n in probe.feed})
            if kind == "reference":
                wanted.append(arrays)
                continue
            for name in names:
                try:
                    collect(errors, kind, probe, wanted[index], {name: arrays[name]})
                except VerificationError as error:
                    result[name] = result[name] or str(error).partition("' ")[2]
        del runner  # before the next one takes its memory
    for name, entry in errors.items():
        if not entry.found <= entry.bound:
            result[name] = (
                f"is off by {entry.found:.3g}, its largest number is {entry.scale:.3g}, "
                f"{entry.bound:.3g} would be rounding"
            )
    return result


def _reached(
    broken: Sequence[str], producers: dict[str, ir.Node], texts: dict[str, str | None]
) -> set[str]:
    """The values that differ from which ``broken`` ones follow through nothing that agrees."""
    pending, seen = list(broken), set(broken)
    while pending:
        for name in names_read([producers[pending.pop()]]):
            agrees = name in texts and texts[name] is None
            if name in producers and name not in seen and not agrees:
                seen.add(name)
                pending.append(name)
    return {name for name in seen if name in texts}


def _unpadded(probe: Probe) -> Probe:
    """The same feed with every token valid."""
    if probe.valid is None:
        return probe
    mask = probe.feed["attention_mask"]
    return replace(probe, feed={**probe.feed, "attention_mask": np.ones_like(mask)}, valid=None)


def _producers(model: ir.Model) -> dict[str, ir.Node]:
    return {str(v.name): node for node in model.graph for v in node.outputs if v.name}


def _named(model: ir.Model, names: Sequence[str]) -> list[ir.Value]:
    wanted = set(names)
    return [v for node in model.graph for v in node.outputs if v.name in wanted]
