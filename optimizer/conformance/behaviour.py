"""Checks of what a pass does to models, in this process."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from optimizer import checks
from optimizer.calibration import Calibration, input_specs
from optimizer.conformance.declared import text_of
from optimizer.conformance.models import Sample
from optimizer.conformance.outcomes import Failure, Outcome, Status, run
from optimizer.errors import (
    CalibrationError,
    MissingDependencyError,
    OptimizerError,
    PassContractError,
    VerificationError,
    place_of,
)
from optimizer.fingerprint import fingerprint
from optimizer.gate import Gate
from optimizer.graph import lazy
from optimizer.pass_base import Context, Exactness, GraphPass, PassOptions, Report, Skip
from optimizer.probes import make_probes
from optimizer.samples import is_past, load_samples
from optimizer.verify import verify

#: Elements from which on a tensor is a weight whose reading takes time in a real model.
_WEIGHT = 64
#: Feeds that passes are calibrated on.
_FEEDS = 3


@dataclass
class Subject:
    """One pass with one set of options, tried on one model after the other.

    Attributes:
        pass_class: What is tried.
        options: With these.
        rewritten: Names of the models that it rewrote.
    """

    pass_class: type[GraphPass[Any]]
    options: PassOptions
    rewritten: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        #: One object for all models: what it keeps from one shows in the next.
        self._shared = self.create()

    def create(self) -> GraphPass[Any]:
        """A new object of the pass."""
        return self.pass_class(self.options)

    def on(self, sample: Sample) -> Iterator[Outcome]:
        """Everything there is to check on one model."""
        where = f"options {text_of(self.options)}, model '{sample.name}'"
        trial = _Trial(self, sample)
        first = run("runs", where, trial.rewrite)
        yield first
        if first.status is not Status.PASSED:
            return
        if trial.report.modified:
            self.rewritten.append(sample.name)
        for check, action in (
            ("invariants", trial.check_invariants),
            ("report", trial.check_report),
            ("symbols", trial.check_symbols),
            ("exactness", trial.check_exactness),
            ("deterministic", trial.check_deterministic),
            ("weights", trial.check_reading),
            ("gate", trial.check_gate),
            ("second-run", trial.check_second_run),
        ):
            yield run(check, where, action)

    def share(self, model: ir.Model, context: Context) -> Report:
        """Rewrite with the object that has seen the other models."""
        return self._shared.call(model, context)


class _Closed(Gate):
    """Refuses everything.

    Attributes:
        asked: What the pass wanted to rewrite.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []

    def allow(self, site: str, rule: str = "") -> bool:
        """See ``Gate``."""
        self.asked.append(f"{site} ({rule})" if rule else site)
        return False


class _Trial:
    """One pass on one model."""

    def __init__(self, subject: Subject, sample: Sample) -> None:
        self.subject, self.sample = subject, sample
        self.original = sample.build()
        self.model = sample.build()

    def rewrite(self) -> None:
        """The first run, by an object of its own."""
        graph_pass = self.subject.create()
        self.graph_pass = graph_pass
        self.context = context_for(graph_pass, self.sample)
        try:
            self.report = graph_pass.call(self.model, self.context)
        except OptimizerError as error:
            self._refused(error)
        except Exception as error:
            file = getattr(sys.modules.get(type(graph_pass).__module__), "__file__", None)
            place = place_of(error, None if file is None else Path(file))
            raise Failure(
                f"{type(error).__name__} at {place}: {error}",
                "a site that does not fit is a Skip with a reason, never an exception",
            ) from error
        if not isinstance(self.report, Report):
            raise Failure(
                f"call returned {type(self.report).__name__}",
                "return an optimizer.pass_base.Report",
            )

    def _refused(self, error: OptimizerError) -> None:
        if fingerprint(self.original).difference(fingerprint(self.model)) is not None:
            raise Failure(
                f"it gave up half way and left the graph changed: {error}",
                "decide before the first rewrite",
            ) from error
        raise Failure(f"it refuses the model: {error}", "", Status.NOTE) from error

    def check_invariants(self) -> None:
        """The graph is legal, keeps its interface, and ``modified`` is true."""
        try:
            checks.check_pass(self.original, self.model, self.graph_pass, self.report)
        except PassContractError as error:
            raise Failure(str(error).rstrip("."), "see optimizer.checks.check_pass") from error

    def check_report(self) -> None:
        """Skips have reasons, and the report can be written to a manifest."""
        for skip in self.report.skipped:
            if not isinstance(skip, Skip) or not str(skip.reason).strip() or not skip.site:
                raise Failure(f"{skip!r} says not what and why", "Skip(site, reason)")
        if self.report.applied and not self.report.modified:
            raise Failure(
                f"applied={self.report.applied} with modified=False",
                "count only sites that were rewritten",
            )
        try:
            json.dumps([self.report.details, self.report.sites])
        except (TypeError, ValueError) as error:
            raise Failure(
                f"details or sites are not JSON: {error}", "use numbers, texts, lists and tables"
            ) from error

    def check_symbols(self) -> None:
        """Dynamic axes of inputs and outputs stay dynamic, under the same names."""
        for kind in ("inputs", "outputs"):
            if kind in self.graph_pass.breaks:
                continue
            for old, new in zip(
                getattr(self.original.graph, kind), getattr(self.model.graph, kind), strict=True
            ):
                for axis, (a, b) in enumerate(zip(old.shape or (), new.shape or (), strict=False)):
                    if isinstance(a, ir.SymbolicDim) and a.value is not None and a != b:
                        raise Failure(
                            f"axis {axis} of {kind[:-1]} '{old.name}' was {a} and became {b}",
                            "keep the shape of graph inputs and outputs",
                        )

    def check_deterministic(self) -> None:
        """A copy of the model gives the same bytes, and so does an object that saw others."""
        expected = serialized(self.model)
        for title, call in (
            ("a second run on a copy of the model", self.subject.create().call),
            ("an object that rewrote other models before", self.subject.share),
        ):
            model = self.sample.build().clone()
            call(model, self.context)
            if serialized(model) != expected:
                change = fingerprint(self.model).difference(fingerprint(model))
                raise Failure(
                    f"{title} gives another result: {change or 'other types, shapes or metadata'}",
                    "let nothing depend on sets, ids, time or what an object did before",
                )

    def check_reading(self) -> None:
        """Report only: weights that are read although nothing is rewritten."""
        model, read = watched(self.sample.build())
        report = self.subject.create().call(model, self.context)
        weights = sum(t.size >= _WEIGHT for t in _tensors(model))
        if read and not report.modified:
            raise Failure(
                f"reads {len(read)} of {weights} weights and changes nothing",
                "decide by shapes first: reading takes the time of a large model",
                Status.NOTE,
            )

    def check_gate(self) -> None:
        """Where the pass asks before it rewrites, no means no."""
        gate, model = _Closed(), self.sample.build()
        report = self.subject.create().call(model, replace(self.context, gate=gate))
        change = fingerprint(self.original).difference(fingerprint(model))
        if gate.asked and change is not None:
            raise Failure(
                f"it asked whether to rewrite {gate.asked[0]}, was told no, and still: {change}",
                "make the site a Skip(site, optimizer.gate.LEFT_OUT)",
            )
        if report.modified and not gate.asked:
            raise Failure(
                "it rewrites without asking context.gate.allow(site)",
                "ask before each: optimize bisect can then name the site that breaks a model",
                Status.NOTE,
            )

    def check_second_run(self) -> None:
        """A pass that ran has nothing left to do."""
        if not self.graph_pass.idempotent:
            raise Failure("declared as not idempotent", "", Status.NOTE)
        before = self.model.clone()
        try:
            again = self.subject.create().call(self.model, self.context)
        except OptimizerError as error:
            raise Failure(f"it refuses its own result: {error}", "", Status.NOTE) from error
        change = fingerprint(before).difference(fingerprint(self.model))
        if again.modified or change is not None:
            raise Failure(
                f"a second run changes the graph again: {change or 'modified=True'}",
                "recognise what is rewritten already, or declare idempotent = False",
            )

    def check_exactness(self) -> None:
        """The outputs move no further than declared."""
        if not self.report.modified:
            return
        exactness = self.graph_pass.exactness
        try:
            result = verify(self.original, self.model, exactness)
        except VerificationError as error:
            raise Failure(str(error).rstrip("."), "correct the rewrite, or declare less") from error
        except MissingDependencyError as error:
            raise Failure(str(error).rstrip("."), "", Status.SKIPPED) from error
        if result.status == "not verified":
            raise Failure(result.method, "", Status.SKIPPED)
        numbers = [value for value in result.metrics.values() if value is not None]
        if exactness is Exactness.APPROXIMATE and not np.isfinite(numbers).all():
            raise Failure("the outputs are not finite any more", "refuse such sites")


def context_for(graph_pass: GraphPass[Any], sample: Sample) -> Context:
    """With sample data where the pass asks for it.

    Raises:
        Failure: It asks for data, and the model cannot be run.
    """
    if not graph_pass.needs_calibration():
        return Context()
    if not sample.runs:
        raise Failure("it needs sample data, and nothing runs this model", "", Status.SKIPPED)
    specs = input_specs(sample.build())
    past = {spec.name for spec in specs if is_past(spec)}  # is filled in, as for a user's data
    try:
        probes = [make_probes(specs, seed=seed)[0].feed for seed in range(_FEEDS)]
        feeds = [{name: feed[name] for name in feed if name not in past} for feed in probes]
        calibration = Calibration(load_samples(feeds, specs))
    except (CalibrationError, MissingDependencyError) as error:
        raise Failure(f"no sample data: {error}", "", Status.SKIPPED) from error
    return Context(calibration=calibration, evaluation=calibration)


def serialized(model: ir.Model) -> bytes:
    """All of a model as bytes that only depend on what it holds."""
    content: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return content


def watched(model: ir.Model) -> tuple[ir.Model, set[str]]:
    """The model with weights that note their names when their numbers are read."""
    read: set[str] = set()
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.size < _WEIGHT:
            continue

        def numbers(tensor: ir.TensorProtocol = tensor, name: str = str(value.name)) -> np.ndarray:
            read.add(name)
            return tensor.numpy()

        value.const_value = lazy(value.name, tensor.dtype, tensor.shape.numpy(), numbers)
    return model, read


def _tensors(model: ir.Model) -> list[ir.TensorProtocol]:
    values = model.graph.initializers.values()
    return [value.const_value for value in values if value.const_value is not None]
