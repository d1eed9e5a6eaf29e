"""Proves that an exact pass is exact, and measures what an approximate one does.

BITWISE: the arrays are equal. REASSOCIATED: measured against the original in float64, the error
of the rewritten model is at most twice the original's own, or 16 units in the last place of the
largest output where the original happens to be luckier than that (two sums of n terms in another
order differ by a small multiple of one rounding; the factors allow for that and no more). The
criterion is applied per output, over all probes. APPROXIMATE: the drift is measured.

A quantized model rounds to integers inside: there, the smallest difference in float32 may end in
another code, a whole step away, in either model and by chance. So the rewritten model is run in
float64 as well, where such a chance is 2^-29 of that. So is one in half precision: how many
roundings it takes to compute the same is not what a rewrite promises.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from optimizer import attention_masks, footprint
from optimizer.calibration import input_specs, primary_output
from optimizer.deviation import OutputError, Outputs, collect, is_floating, wide
from optimizer.errors import CalibrationError, ModelError, UnsupportedError, VerificationError
from optimizer.metrics import DriftMeter
from optimizer.pass_base import Exactness
from optimizer.probes import Probe, make_probes
from optimizer.runners.base import Runner
from optimizer.runners.ort import OrtRunner
from optimizer.runners.reference import ReferenceRunner
from optimizer.samples import SampleSet
from optimizer.segments import Segment, segments
from optimizer.widening import half_types, rounded

#: Both factors where only float32 can be compared with float32: then the difference holds the
#: errors of both sides, and the original's own error is only estimated.
_FLOAT32_FACTOR = 2.0

#: Own error, relative to the largest output, beyond which the reference is doubted: a thousand
#: times what float32 models of any depth show.
DOUBTFUL_ERROR = 1e-3
_ROUNDING = frozenset({"QuantizeLinear", "DynamicQuantizeLinear", "Round", "Floor", "Ceil"})


@dataclass(frozen=True)
class Verification:
    """What was found, and how.

    Attributes:
        status: "equal", "within bound", "measured" or "not verified".
        metrics: Numbers by name: "error", "bound", "own_error" (relative to the largest output)
            for exact passes, those of ``Drift`` for approximate ones.
        method: How it was verified, for the report.
        probes: Number of feeds.
        tokens: Number of tokens (or rows) compared.
        seconds: Time taken.
    """

    status: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    method: str = ""
    probes: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        """One cell of a table."""
        if self.status == "within bound":
            error, bound = self.metrics["error"], self.metrics["bound"]
            return f"exact: {error:.1e} (bound {bound:.1e})"
        if self.status == "not verified":
            return f"not verified: {self.method}"
        if self.status == "measured":
            return "runs, on made-up inputs"
        return "exact: bit by bit" if self.status == "equal" else self.status


def verify(
    before: ir.Model,
    after: ir.Model,
    exactness: Exactness,
    *,
    samples: SampleSet | None = None,
    custom_ops: Sequence[str | Path] = (),
    threads: int = 1,
    max_memory: int | None = None,
    seed: int = 0,
) -> Verification:
    """Compare two models on a few short feeds.

    Args:
        before: The model as it was (a clone: weights are shared).
        after: The model as it is.
        exactness: What the pass declares.
        samples: Data to take the feeds from; None = they are made up.
        custom_ops: Libraries of custom operators.
        threads: Threads of ONNX Runtime.
        max_memory: Bytes of resident memory for the proof of an exact pass; see ``footprint``.
        seed: Of what is made up.

    Raises:
        VerificationError: The models differ by more than ``exactness`` allows; says in which
            output, by how much and how much is allowed.
    """
    started = time.perf_counter()
    comparison = _Comparison(before, after, custom_ops, threads)
    try:
        probes = make_probes(input_specs(before), samples, seed=seed)
        result = comparison.run(probes, exactness, max_memory)
    except CalibrationError as error:
        result = Verification("not verified", method=str(error).rstrip("."))
    return Verification(
        **{**result.__dict__, "seconds": time.perf_counter() - started},
    )


@dataclass
class _Comparison:
    """Two models and how to run them."""

    before: ir.Model
    after: ir.Model
    custom_ops: Sequence[str | Path]
    threads: int
    _widened: dict[ir.Model, ir.Model] = field(default_factory=dict)
    _plan: footprint.Plan = field(default_factory=footprint.Plan)

    def run(
        self, probes: Sequence[Probe], exactness: Exactness, max_memory: int | None
    ) -> Verification:
        counts = {"probes": len(probes), "tokens": sum(p.tokens for p in probes)}
        if exactness is not Exactness.APPROXIMATE:
            self._plan = footprint.plan(self.before, self.after, max_memory)
        if exactness is Exactness.APPROXIMATE:
            return Verification("measured", self._drift(probes), "on probes", **counts)
        if exactness is Exactness.BITWISE:
            return self._bitwise(probes, counts)
        errors, method = self._against_float64(probes)
        doubt = self._doubt(errors)
        if doubt is not None:
            errors, method = self._against_float32(probes, doubt)
        return self._judge(errors, method, counts)

    def _doubt(self, errors: Mapping[str, OutputError]) -> str | None:
        """Why the float64 reference is not to be trusted, or None.

        A bound of twice the original's own error means nothing where that error comes from an
        operator that the reference computes differently. Only rounding to integers or to half
        precision makes a model differ from float64 by this much legitimately.
        """
        if self._rounds() or self._is_half():
            return None
        for name, error in errors.items():
            if error.own > DOUBTFUL_ERROR * error.scale:
                return (
                    f"output '{name}' of the original is {error.own / error.scale:.1e} off the "
                    "float64 reference, more than rounding explains"
                )
        return None

    def _rounds(self) -> bool:
        """Whether the original rounds to integers somewhere."""
        return any(node.op_type in _ROUNDING for node in self.before.graph)

    def _is_half(self) -> bool:
        """Whether either model computes in half precision."""
        return bool(half_types(self.before) or half_types(self.after))

    def _ort(self, model: ir.Model, *, optimize: bool = True) -> Runner:
        return OrtRunner(
            model,
            threads=self.threads,
            optimize=optimize,
            exact=True,
            custom_ops=self.custom_ops,
        )

    def _runner(self, model: ir.Model, *, optimize: bool = True) -> Runner:
        """What runs a whole model within the limit of memory."""
        if self._plan.by_operator:
            return ReferenceRunner(model)
        return self._ort(model, optimize=optimize)

    def _wide(self, model: ir.Model) -> ir.Model:
        """``model`` as ONNX Runtime runs it in parts: float32, rounded where it is half."""
        if model not in self._widened:
            self._widened[model] = attention_masks.runnable(rounded(model).model)
        return self._widened[model]

    def _drift(self, probes: Sequence[Probe]) -> dict[str, float]:
        name = primary_output(self.before)
        meter = DriftMeter(scores=name == "logits")
        old, new = self._ort(self.before), self._ort(self.after)
        for probe in probes:
            found = new.run(_fitting(probe.feed, new))[name]
            meter.update(probe.rows(old.run(probe.feed)[name]), probe.rows(found))
        return meter.result().as_dict()

    def _bitwise(self, probes: Sequence[Probe], counts: dict[str, int]) -> Verification:
        # ONNX Runtime's own optimizations may treat two equal graphs differently.
        old = self._runner(self.before, optimize=False)
        wanted = [old.run(probe.feed) for probe in probes]
        del old
        new = self._runner(self.after, optimize=False)
        for probe, expected in zip(probes, wanted, strict=True):
            found = new.run(_fitting(probe.feed, new))
            for name in _common(expected, found):
                if not np.array_equal(
                    expected[name], found[name], equal_nan=is_floating(found[name])
                ):
                    worst = float(np.abs(wide(expected[name]) - wide(found[name])).max())
                    raise VerificationError(
                        f"output '{name}' is not the same bit by bit (largest difference "
                        f"{worst:.3g}); the pass declares itself bitwise exact"
                    )
        by = "numpy" if self._plan.by_operator else "ONNX Runtime"
        return Verification("equal", {"error": 0.0}, f"{by}, bit by bit", **counts)

    def _against_float64(self, probes: Sequence[Probe]) -> tuple[dict[str, OutputError], str]:
        cuts = self._plan.cuts
        try:
            exact = ReferenceRunner(
                self.before, double=True, extra_outputs=_named(self.before, cuts)
            )
            wanted = [exact.run(probe.feed) for probe in probes]
        except (UnsupportedError, ModelError) as error:
            return self._against_float32(probes, str(error))
        method = "float64 reference"
        errors: dict[str, OutputError] = {}
        if (self._rounds() or self._is_half()) and not cuts:
            try:
                self._both(
                    probes, wanted, errors, reference=ReferenceRunner(self.after, double=True)
                )
            except UnsupportedError:
                pass  # ONNX Runtime can still tell whether the two are far apart
            else:
                half = self._is_half()
                for found in errors.values():
                    # Neither side's numbers have the errors of ONNX Runtime, nor the roundings of
                    # the outputs; but what is folded is rounded to half precision once more.
                    found.own = found.own if half else 0.0
                    found.epsilon = OutputError.epsilon
                steps = "half precision rounds every step"
                integers = "rounding to integers magnifies roundings"
                return errors, f"both in float64, because {steps if half else integers}"
        if cuts:
            method += f", block by block ({len(cuts) + 1} parts)"
            for old_part, new_part in zip(
                segments(self._wide(self.before), cuts),
                segments(self._wide(self.after), cuts),
                strict=True,
            ):
                self._segment(old_part, new_part, probes, wanted, errors)
            return errors, method
        self._both(probes, wanted, errors)
        return errors, f"{method}, operator by operator" if self._plan.by_operator else method

    def _both(
        self,
        probes: Sequence[Probe],
        wanted: Sequence[Outputs],
        errors: dict[str, OutputError],
        reference: Runner | None = None,
    ) -> None:
        """Run both models whole, one session at a time, and collect their errors.

        Args:
            probes: What to feed.
            wanted: What to compare with.
            errors: Are enlarged.
            reference: Runs the rewritten model instead of a runtime.
        """
        for model, attribute in ((self.before, "own"), (self.after, "found")):
            runner = reference if reference and model is self.after else self._runner(model)
            for probe, expected in zip(probes, wanted, strict=True):
                outputs = runner.run(_fitting(probe.feed, runner))
                collect(errors, attribute, probe, expected, outputs)
            del runner

    def _segment(
        self,
        old: Segment,
        new: Segment,
        probes: Sequence[Probe],
        wanted: Sequence[Outputs],
        errors: dict[str, OutputError],
    ) -> None:
        sides = ((self._wide(self.before), old, "own"), (self._wide(self.after), new, "found"))
        for model, segment, attribute in sides:
            runner: OrtRunner | None = None
            for probe, reference in zip(probes, wanted, strict=True):
                known = {**reference, **probe.feed}
                if runner is None:
                    part = segment.part(model, {n: a.ndim for n, a in known.items()})
                    if not part.outputs:
                        break
                    runner = OrtRunner(
                        model,
                        part=part,
                        threads=self.threads,
                        exact=True,
                        rounding=False,
                        custom_ops=self.custom_ops,
                    )
                types = {spec.name: spec.dtype for spec in runner.inputs}
                feed = {n: known[n].astype(t) for n, t in types.items()}
                collect(errors, attribute, probe, reference, runner.run(feed))

    def _against_float32(
        self, probes: Sequence[Probe], reason: str
    ) -> tuple[dict[str, OutputError], str]:
        """Where float64 is not possible: how far do two float32 runs of the original differ?"""
        plain = self._ort(self.before, optimize=False)
        references = [plain.run(probe.feed) for probe in probes]
        errors: dict[str, OutputError] = {}
        del plain
        self._both(probes, references, errors)
        for error in errors.values():
            error.own *= _FLOAT32_FACTOR
            error.epsilon *= _FLOAT32_FACTOR
        return errors, f"float32 against float32, bound doubled ({reason.rstrip('.')})"

    def _judge(
        self, errors: Mapping[str, OutputError], method: str, counts: dict[str, int]
    ) -> Verification:
        if not errors:
            raise CalibrationError("the two models have no output in common")
        name, worst = max(errors.items(), key=lambda item: item[1].ratio())
        if not worst.found <= worst.bound:
            raise VerificationError(
                f"output '{name}' is off by {worst.found:.3g} (its largest value is "
                f"{worst.scale:.3g}); {worst.bound:.3g} is allowed, twice the original's own "
                f"error or 16 roundings; {method}"
            )
        scale = worst.scale or 1.0
        metrics = {
            "error": worst.found / scale,
            "bound": worst.bound / scale,
            "own_error": worst.own / scale,
        }
        return Verification("within bound", metrics, method, **counts)


def _named(model: ir.Model, names: Sequence[str]) -> list[ir.Value]:
    values = {str(v.name): v for node in model.graph for v in node.outputs}
    return [values[name] for name in names]


def _common(expected: Outputs, found: Outputs) -> list[str]:
    return [name for name in expected if name in found]


def _fitting(feed: Mapping[str, np.ndarray], runner: Runner) -> dict[str, np.ndarray]:
    """The part of a feed that a model still asks for, in the types in which it does."""
    types = {spec.name: spec.dtype for spec in getattr(runner, "inputs", ())}
    return {
        name: feed[name].astype(types[name]) if is_floating(feed[name]) and types else feed[name]
        for name in runner.input_names
        if name in feed
    }
