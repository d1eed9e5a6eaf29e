"""What must hold of every input: refused in one sentence, or rewritten to the same function."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from optimizer import checks
from optimizer.deviation import OutputError, wide
from optimizer.errors import OptimizerError, PassContractError
from optimizer.fingerprint import fingerprint
from optimizer.legalize import legalize
from optimizer.model_io import load_model, save_model
from optimizer.pass_base import Context
from optimizer.runners.ort import OrtRunner
from optimizer.runners.reference import ReferenceRunner
from passes.canonicalize import Canonicalize

Arrays = Mapping[str, np.ndarray]

#: Outcomes that are nobody's fault; all others are findings.
FINE = ("agrees", "refused", "not runnable", "no feed")


_ROUNDING = frozenset({"QuantizeLinear", "DynamicQuantizeLinear"})
#: ONNX Runtime's Attention takes no batch or sequence of length 0, which its parts do.
_EMPTY = " > 0 was false"


#: Up to here a ratio of error and bound may be chance, and is measured again.
_UNSURE = 1e6


class FindingError(Exception):
    """Something that must not happen.

    Attributes:
        kind: "crash", "mismatch", "contract", "message", "refusal", ...
    """

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail


@dataclass
class Verdict:
    """What became of one input.

    Attributes:
        kind: One of ``FINE``, or the kind of a finding.
        detail: The message of a refusal, or what is wrong.
        applied: Rewrites of ``canonicalize``.
        feeds: Feeds on which the numbers were compared.
    """

    kind: str
    detail: str = ""
    applied: int = 0
    feeds: int = 0

    @property
    def fine(self) -> bool:
        return self.kind in FINE


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
        runs = _runs(self.path, original, feeds)
        if not runs.feeds:
            return Verdict(runs.reason, applied=applied)
        self.begin("ours: run")
        if self.shapes:
            _check_shapes(canonical, runs.feeds)
        for stage, result in (("canonicalize", canonical), ("legalize", again)):
            _compare(runs, result, stage)
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


@dataclass
class _Runs:
    """What the original computes.

    Attributes:
        feeds: On which it ran.
        plain: Outputs in ONNX Runtime per feed.
        exact: Outputs in float64 per feed, None where that is not possible.
        reason: Why there is no feed.
    """

    feeds: list[Arrays] = field(default_factory=list)
    plain: list[Arrays] = field(default_factory=list)
    exact: list[Arrays | None] = field(default_factory=list)
    reason: str = "not runnable"
    path: Path = field(default_factory=Path)
    model: ir.Model | None = None
    epsilon: float = 0.0

    def measure_again(self, errors: dict[str, OutputError]) -> None:
        """Take the original's own error as the largest of three ways to round in float32.

        The largest of a few numbers may be small by chance, where it is the error of one run.
        """
        assert self.model is not None
        others: list[OrtRunner | ReferenceRunner] = [OrtRunner(self.path, optimize=False)]
        with contextlib.suppress(OptimizerError):  # operators of ONNX Runtime's own
            others.append(ReferenceRunner(self.model))
        for runner in others:
            for feed, plain, exact in zip(self.feeds, self.plain, self.exact, strict=True):
                try:
                    outputs = runner.run({k: v for k, v in feed.items() if k in runner.input_names})
                except OptimizerError:
                    continue
                for name, entry in errors.items():
                    reference = (plain if exact is None else exact)[name]
                    found = outputs[name]
                    valid = np.isfinite(wide(reference)) & np.isfinite(wide(found))
                    gap = np.abs(wide(found)[valid] - wide(reference)[valid])
                    entry.own = max(entry.own, float(gap.max(initial=0)))


def _runs(
    path: Path, model: ir.Model, feeds: Callable[[OrtRunner], list[dict[str, np.ndarray]]]
) -> _Runs:
    runs = _Runs(path=path, model=model, epsilon=_coarsest(model))
    try:
        runner = OrtRunner(path, exact=True)
        mapped = OrtRunner(model, exact=True)
        bare = OrtRunner(path, optimize=False)
    except OptimizerError:
        return runs
    try:
        reference = ReferenceRunner(model, double=True)
    except OptimizerError:
        reference = None
    runs.reason = "no feed"
    for feed in feeds(runner):
        try:
            bare.run(feed)  # optimized, ONNX Runtime also takes some feeds that do not fit
            outputs = runner.run(feed)
        except OptimizerError:
            continue
        _check_loaded(outputs, mapped.run(feed))
        exact = None
        if reference is not None:
            with contextlib.suppress(Exception):
                exact = reference.run(feed)
        runs.feeds.append(feed)
        runs.plain.append(outputs)
        runs.exact.append(exact)
    return runs


def _check_loaded(theirs: Arrays, ours: Arrays) -> None:
    """The model as loaded computes what the file does."""
    for name, array in theirs.items():
        other = ours[name]
        if array.shape != other.shape or array.dtype != other.dtype:
            raise FindingError("loaded otherwise", f"output '{name}'")
        if array.dtype.kind not in "fiub":
            continue
        bound = 16 * _epsilon(array) * float(np.abs(wide(array)).max(initial=0))
        with np.errstate(all="ignore"):
            difference = np.abs(wide(array) - wide(other))
        if float(np.nan_to_num(difference, nan=0.0).max(initial=0)) > bound:
            raise FindingError("loaded otherwise", f"output '{name}' differs")


def _check_shapes(model: ir.Model, feeds: Sequence[Arrays]) -> None:
    """The shapes that are written down are those of every run."""
    declared = set(model.graph.outputs)  # as the model itself declares them
    values = [
        value
        for node in model.graph
        for value in node.outputs
        if value.name and value.shape is not None and value not in declared
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


def _compare(runs: _Runs, result: ir.Model, stage: str) -> None:
    """The result's error is at most what ``verify`` allows, over all feeds."""
    rounds = any(node.op_type in _ROUNDING for node in result.graph)
    try:
        # Between two quantizers ONNX Runtime takes liberties, which are not those of the graph.
        runner: OrtRunner | ReferenceRunner = (
            ReferenceRunner(result, double=True)
            if rounds and stage == "canonicalize" and runs.exact[0] is not None
            else OrtRunner(result, exact=True)
        )
    except OptimizerError as error:
        if stage != "canonicalize":
            raise FindingError("not runnable after", f"{stage}: {error}") from error
        return  # the dialect is not a form that runs; its lowering is
    errors: dict[str, OutputError] = {}
    for feed, plain, exact in zip(runs.feeds, runs.plain, runs.exact, strict=True):
        try:
            outputs = runner.run({k: v for k, v in feed.items() if k in runner.input_names})
        except OptimizerError as error:
            empty = any(0 in array.shape for array in feed.values())
            if empty and (isinstance(runner, ReferenceRunner) or _EMPTY in str(error)):
                continue
            raise FindingError("fails after", f"{stage}: {error}") from error
        if list(outputs) != list(plain):
            raise FindingError("mismatch", f"{stage}: outputs {list(outputs)}")
        for name, found in outputs.items():
            reference = plain if exact is None else exact
            _collect(errors, name, stage, (reference[name], plain[name], found))
            if name in errors:
                errors[name].epsilon = max(errors[name].epsilon, runs.epsilon)
    worst = max(errors.items(), key=lambda item: item[1].ratio(), default=None)
    if worst is not None and 1 < worst[1].ratio() <= _UNSURE:
        runs.measure_again(errors)
    for name, error in errors.items():
        if not error.found <= error.bound:
            detail = f"{stage}: '{name}' off by {error.found:.3g}, {error.bound:.3g} allowed"
            raise FindingError("mismatch", detail)


def _collect(
    errors: dict[str, OutputError],
    name: str,
    stage: str,
    arrays: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    reference, plain, found = arrays
    doubled = found.dtype == np.float64 and plain.dtype.kind == "f"
    if plain.shape != found.shape or not (doubled or plain.dtype == found.dtype):
        detail = f"{stage}: '{name}' {plain.dtype}{plain.shape} became {found.dtype}{found.shape}"
        raise FindingError("mismatch", detail)
    if plain.dtype.kind not in "fV":
        if not np.array_equal(plain, found):
            raise FindingError("mismatch", f"{stage}: '{name}' holds other integers")
        return
    if reference.shape != plain.shape:
        reference = plain
    entry = errors.setdefault(name, OutputError())
    entry.epsilon = max(entry.epsilon, _epsilon(plain)) * (2 if reference is plain else 1)
    valid = np.isfinite(wide(reference)) & np.isfinite(wide(plain))
    if not np.isfinite(wide(found)[valid]).all():
        raise FindingError("mismatch", f"{stage}: '{name}' is not finite any more")
    expected = wide(reference)[valid]
    entry.scale = max(entry.scale, float(np.abs(expected).max(initial=0)))
    for attribute, array in (("own", plain), ("found", found)):
        worst = float(np.abs(wide(array)[valid] - expected).max(initial=0))
        setattr(entry, attribute, max(getattr(entry, attribute), worst))


def _coarsest(model: ir.Model) -> float:
    """Epsilon of the coarsest type of the model: runtimes round to it where they like."""
    values = (v for node in model.graph.all_nodes() for v in (*node.inputs, *node.outputs))
    types = {value.dtype for value in values if value is not None}
    coarse = {ir.DataType.FLOAT16: 2.0**-10, ir.DataType.BFLOAT16: 2.0**-7}
    return max((coarse[dtype] for dtype in types if dtype in coarse), default=0.0)


def _epsilon(array: np.ndarray) -> float:
    return float(np.finfo(array.dtype).eps) if array.dtype.kind == "f" else 2.0**-7


def feeds_of(case_feeds: Sequence[dict[str, np.ndarray]]) -> Callable[..., list[dict]]:
    """The feeds of a generated case, as far as a session asks for them."""

    def make(runner: OrtRunner) -> list[dict[str, np.ndarray]]:
        wanted = set(runner.input_names)
        return [{k: v for k, v in feed.items() if k in wanted} for feed in case_feeds]

    return make


def element_count(shape: Sequence[int]) -> int:
    """Elements of a shape."""
    return math.prod(shape)
