"""Whether two models compute the same: within the bound of ``verify``, over all feeds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir
from fuzzing.verdicts import FindingError

from optimizer.deviation import OutputError, wide
from optimizer.errors import OptimizerError
from optimizer.runners.ort import OrtRunner
from optimizer.runners.reference import ReferenceRunner

Arrays = Mapping[str, np.ndarray]

_ROUNDING = frozenset({"QuantizeLinear", "DynamicQuantizeLinear"})

#: ONNX Runtime's Attention takes no batch or sequence of length 0, which its parts do.
_EMPTY = " > 0 was false"

#: Part of the largest number that float64 may be off by: 2^-53, magnified as float32 may be.
_EXACT = 2.0**-36
#: Up to here a ratio of error and bound may be chance, and is measured again.
_UNSURE = 1e6


@dataclass
class Runs:
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


def runs_of(
    path: Path, model: ir.Model, feeds: Callable[[OrtRunner], list[dict[str, np.ndarray]]]
) -> Runs:
    runs = Runs(path=path, model=model, epsilon=_coarsest(model))
    try:
        runner = OrtRunner(path, exact=True)
        mapped = OrtRunner(model, exact=True, rounding=False)  # as the file runs
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


def compare(runs: Runs, result: ir.Model, stage: str) -> None:
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
            if (empty and isinstance(runner, ReferenceRunner)) or _EMPTY in str(error):
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
            # Not silent: ``verify`` refuses such a result, whose function is right.
            rounded = not rounds and _same_function(runs, result)
            raise FindingError("less precise" if rounded else "mismatch", detail)


def _same_function(runs: Runs, result: ir.Model) -> bool:
    """Whether in float64 the result computes what the original does, over all feeds.

    Then what differs are the roundings of a kernel: that of LayerNormalization takes the variance
    as a difference of large numbers, where an exporter's operators do not.
    """
    if any(exact is None for exact in runs.exact):
        return False
    try:
        runner = ReferenceRunner(result, double=True)
        results = [runner.run(feed) for feed in runs.feeds]
    except OptimizerError:
        return False
    return all(
        np.allclose(wide(found), wide(exact[name]), rtol=0, atol=_EXACT * _size(exact[name]))
        for outputs, exact in zip(results, runs.exact, strict=True)
        if exact is not None
        for name, found in outputs.items()
        if exact[name].dtype.kind == "f"
    )


def _size(array: np.ndarray) -> float:
    return float(np.abs(wide(array)).max(initial=0))


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
