"""Runs a conversion to half precision on small graphs, and judges what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import half_types
import numpy as np
import onnx
import onnx_ir as ir
from golden_cases import Case

from optimizer.calibration import Calibration, input_specs
from optimizer.checks import check_pass
from optimizer.pass_base import Context, Report
from optimizer.runners.ort import OrtRunner
from optimizer.samples import load_samples
from passes import get_pass

Feed = Mapping[str, np.ndarray]
TYPES = {"fp16": half_types.FLOAT16, "bf16": half_types.BFLOAT16}


def calibration(model: ir.Model, *feeds: Feed) -> Calibration:
    return Calibration(load_samples([dict(feed) for feed in feeds], input_specs(model)))


def convert(
    model: ir.Model,
    feed: Feed | None = None,
    kind: str = "fp16",
    target: str = "tensorrt-11",
    **options: Any,
) -> Report:
    """Apply the pass; the graph must be typed right throughout and keep its interface.

    Args:
        model: Rewritten in place.
        feed: Calibration data, None = none.
        kind: Name of the pass.
        target: What the result is meant for.
        options: Of the pass.
    """
    before = model.clone()
    pass_class = get_pass(kind)
    graph_pass = pass_class(pass_class.Options(**options))
    data = None if feed is None else calibration(model, feed)
    report = graph_pass.call(model, Context(target=target, calibration=data))
    check_pass(before, model, graph_pass, report)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    assert not twice_cast(model)
    return report


def twice_cast(model: ir.Model) -> list[str]:
    """Casts of casts between floating types, and values cast more than once to one type."""
    casts = [n for n in model.graph if n.op_type == "Cast" and n.inputs[0].dtype is not None]
    floating = [n for n in casts if n.inputs[0].dtype.is_floating_point()]
    chained = [n.outputs[0].name for n in floating if n.inputs[0].producer() in floating]
    seen = [(n.inputs[0], n.outputs[0].dtype) for n in floating]
    repeated = [value.name for value, dtype in seen if seen.count((value, dtype)) > 1]
    return [*chained, *repeated]


def outputs(model: ir.Model, feed: Feed) -> dict[str, np.ndarray]:
    """What a model computes, as float64; its inputs may have become half precision."""
    runner = OrtRunner(model)
    kinds = {spec.name: spec.dtype for spec in runner.inputs}
    return {
        name: array.astype(np.float64) if array.dtype.kind not in "iub" else array
        for name, array in runner.run({k: a.astype(kinds[k]) for k, a in feed.items()}).items()
    }


def naive(model: ir.Model, feed: Feed, kind: str = "fp16") -> dict[str, np.ndarray]:
    """What the same model computes if everything in it is converted."""
    return outputs(half_types.convert(model.clone(), TYPES[kind]), feed)


def error(expected: np.ndarray, found: np.ndarray) -> float:
    """Largest difference relative to the largest number, infinite where one is not finite."""
    finite = np.isfinite(expected)
    if not np.isfinite(found[finite]).all():
        return np.inf
    largest = np.abs(expected[finite]).max(initial=np.finfo(np.float32).tiny)
    return float(np.abs(found - expected)[finite].max(initial=0.0) / largest)


def kept(report: Report) -> dict[str, str]:
    """Reasons by site."""
    return {skip.site: skip.reason for skip in report.skipped}


def computing(model: ir.Model, dtype: ir.DataType) -> set[str]:
    """Results that have a type, without those of casts."""
    values = (v for n in model.graph if n.op_type != "Cast" for v in n.outputs)
    return {str(v.name) for v in values if v.dtype == dtype}


def check_case(case: Case, kind: str) -> None:
    """Both sides of a golden case compute the same up to the roundings of a handful of nodes."""
    before = case.model()
    rng = np.random.default_rng(0)
    feed = {}
    for value in before.graph.inputs:
        shape = [d if isinstance(d, int) else 2 for d in value.shape or ()]
        dtype = value.dtype.numpy()
        floating = value.dtype.is_floating_point()
        drawn = rng.normal(size=shape) if floating else rng.integers(0, 2, shape)
        feed[str(value.name)] = drawn.astype(dtype)
    expected, found = outputs(before, feed), outputs(ir.from_proto(case.after), feed)
    for name, array in expected.items():
        assert error(array, found[name]) < 16 * half_types.roundoff(TYPES[kind]), name
