"""Shortcuts for the tests of the sparsify pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.calibration import Calibration
from optimizer.linear_layers import linear_at
from optimizer.pass_base import Context, Report
from optimizer.pruning.patterns import Pattern
from optimizer.structure import Linear
from passes.sparsify import Options, Sparsify

TWO_OF_FOUR = Pattern.parse("2:4")


def apply(model: ir.Model, data: Calibration | None = None, **options: Any) -> Report:
    return Sparsify(Options(**options)).call(model, Context(calibration=data))


def matrices(model: ir.Model) -> dict[str, np.ndarray]:
    """Weights of all products, by name."""
    found = {}
    for node in model.graph:
        linear = linear_at(node)
        if isinstance(linear, Linear):
            array = graphs.const(linear.weight)
            assert array is not None
            found[str(linear.weight.name)] = array
    return found
