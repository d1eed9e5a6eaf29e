"""What must hold of every input: refused in one sentence, or rewritten to the same function."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir
from fuzzing.compare import Arrays, compare, runs_of
from fuzzing.verdicts import FindingError, Verdict

from optimizer import checks
from optimizer.errors import OptimizerError, PassContractError
from optimizer.fingerprint import fingerprint
from optimizer.legalize import legalize
from optimizer.model_io import load_model, save_model
from optimizer.pass_base import Context
from optimizer.runners.ort import OrtRunner
from optimizer.runners.reference import ReferenceRunner
from passes.canonicalize import Canonicalize


@dataclass
class Judge:
    """Follows one model file through the tool.

    Attributes:
        path: Of the model.
        output: Where the result is written.
        begin: Told what is done next: "ours" for the tool itself, "theirs" for what the original
            does in ONNX Runtime, for which nobody here answers.
        shapes: Also compare the shapes that are written down with those of the runs.
    """

    path: Path
    output: Path
    begin: Callable[[str], None] = field(default=lambda _: None)
    shapes: bool = True

    def run(self, feeds: Callable[[OrtRunner], list[dict[str, np.ndarray]]]) -> Verdict:
        """The verdict; never raises but for exhausted memory.

        Args:
            feeds: Makes feeds for a session of the original.
        """
        try:
            return self._run(feeds)
        except FindingError as found:
            return Verdict(found.kind, found.detail)

    def _run(self, feeds: Callable[[OrtRunner], list[dict[str, np.ndarray]]]) -> Verdict:
        self.begin("ours: load")
        try:
            with watched("load_model"):
                model = load_model(self.path)
        except OptimizerError as error:
            check_message(error, self.path)
            return self._refused(error, feeds)
        original = model.clone()
        self.begin("ours: canonicalize")
        with watched("canonicalize"):
            applied = _canonicalized(model)
            canonical = model.clone()
        self.begin("ours: legalize")
        with watched("legalize"):
            legalize(model, "ort-cpu")
            checks.check_model(model, "ort-cpu", canonical)
        self.begin("ours: write")
        with watched("save_model"):
            save_model(model, self.output, force=True)
            again = load_model(self.output)
        self.begin("theirs")
        runs = runs_of(self.path, original, feeds)
        if not runs.feeds:
            return Verdict(runs.reason, applied=applied)
        self.begin("ours: run")
        if self.shapes:
            _check_shapes(canonical, runs.feeds)
        for stage, result in (("canonicalize", canonical), ("legalize", again)):
            compare(runs, result, stage)
        return Verdict("agrees", applied=applied, feeds=len(runs.feeds))

    def _refused(
        self,
        error: OptimizerError,
        feeds: Callable[[OrtRunner], list[dict[str, np.ndarray]]],
    ) -> Verdict:
        """A refusal is right unless ONNX Runtime would have run the model."""
        self.begin("theirs")
        try:
            runner = OrtRunner(self.path, exact=True)
            for feed in feeds(runner):
                runner.run(feed)
                return Verdict("strict", str(error).removeprefix(f"{self.path}: "))
        except OptimizerError:
            pass
        return Verdict("refused", str(error).removeprefix(f"{self.path}: "))


@contextlib.contextmanager
def watched(what: str) -> Iterator[None]:
    """Whatever the tool raises on a model that it accepted is a defect."""
    try:
        yield
    except (FindingError, MemoryError):
        raise
    except (PassContractError, AssertionError) as error:
        raise FindingError("contract", f"{what}: {error}") from error
    except OptimizerError as error:
        if what == "load_model":
            raise
        raise FindingError("late refusal", f"{what}: {type(error).__name__}: {error}") from error
    except Exception as error:
        raise FindingError("crash", f"{what}: {type(error).__name__}: {error}") from error


def check_message(error: OptimizerError, path: Path) -> None:
    """At most four lines that start with the file's name and hold nothing a terminal obeys."""
    text = str(error)
    if not text.startswith(str(path)):
        raise FindingError("message", f"does not name the file: {text!r}")
    if len(text.splitlines()) > 4 or len(text) > 2000:
        raise FindingError("message", f"too long: {text!r}")
    if not all(c.isprintable() or c == "\n" for c in text):
        raise FindingError("message", f"control characters: {text!r}")
    if error.exit_code not in (2, 6):
        raise FindingError("message", f"exit code {error.exit_code}: {text!r}")


def _canonicalized(model: ir.Model) -> int:
    """Rewrite; what every pass promises must hold. Returns the number of rewrites."""
    before, other = model.clone(), model.clone()
    report = Canonicalize().call(model, Context())
    checks.check_pass(before, model, Canonicalize, report)
    _check_interface(before, model)
    first = fingerprint(model)
    Canonicalize().call(other, Context())
    difference = first.difference(fingerprint(other))
    if difference is not None:
        raise FindingError("nondeterminism", difference)
    twice = Canonicalize().call(other, Context())
    if twice.modified:
        difference = first.difference(fingerprint(other))
        detail = f"{twice.details.get('steps')}: {difference}"
        raise FindingError("not idempotent", detail)
    return report.applied


def _check_interface(before: ir.Model, after: ir.Model) -> None:
    """Names and types of inputs and outputs stay, and every length and name of an axis."""
    sides = ((before.graph.inputs, after.graph.inputs), (before.graph.outputs, after.graph.outputs))
    for old_values, new_values in sides:
        for old, new in zip(old_values, new_values, strict=True):
            if old.name != new.name or old.dtype not in (None, new.dtype):
                raise FindingError("interface", f"{old} became {new}")
            kept = old.shape is None or (
                new.shape is not None
                and len(old.shape) == len(new.shape)
                and all(
                    a == b or (not isinstance(a, int) and a.value is None)
                    for a, b in zip(old.shape, new.shape, strict=True)
                )
            )
            if not kept:
                raise FindingError("interface", f"'{old.name}' {old.shape} became {new.shape}")


def _check_shapes(model: ir.Model, feeds: Sequence[Arrays]) -> None:
    """The shapes that are written down are those of every run."""
    declared = set(model.graph.outputs)  # as the model itself declares them
    values = [
        value
        for node in model.graph
        for value in node.outputs
        if value.name
        and value.shape is not None
        and value not in declared
        and not isinstance(value.type, ir.SequenceType)
    ]
    try:
        runner = ReferenceRunner(model, extra_outputs=values)
    except OptimizerError:
        return
    for feed in feeds:
        sizes: dict[str, int] = {}
        for value in model.graph.inputs:
            for axis, dim in enumerate(value.shape or ()):
                if not isinstance(dim, int) and dim.value and value.name in feed:
                    sizes[dim.value] = feed[value.name].shape[axis]
        try:
            outputs = runner.run({name: feed[name] for name in runner.input_names})
        except (OptimizerError, KeyError):
            continue
        for value in values:
            _check_shape(value, outputs[str(value.name)].shape, sizes)


def _check_shape(value: ir.Value, found: tuple[int, ...], sizes: Mapping[str, int]) -> None:
    declared = [d if isinstance(d, int) else d.value for d in value.shape or ()]
    for axis, dim in enumerate(declared):
        size: int | None = dim if isinstance(dim, int) else None
        if isinstance(dim, str):
            with contextlib.suppress(NameError, SyntaxError):  # a name of its own
                size = eval(dim, {"__builtins__": {}}, dict(sizes))
        if len(declared) != len(found) or (size is not None and size != found[axis]):
            detail = f"'{value.name}' is written as {declared}, it is {found} for {dict(sizes)}"
            raise FindingError("shape", detail)


def feeds_of(case_feeds: Sequence[dict[str, np.ndarray]]) -> Callable[..., list[dict]]:
    """The feeds of a generated case, as far as a session asks for them."""

    def make(runner: OrtRunner) -> list[dict[str, np.ndarray]]:
        wanted = set(runner.input_names)
        return [{k: v for k, v in feed.items() if k in wanted} for feed in case_feeds]

    return make
