"""How large numbers get in a run: outputs of every node, and what is hidden inside of some.

The model measures itself: behind every value stands a reduction to one number, so a run needs
hardly more memory than without, however many values there are. Numbers of padding count, unlike
everywhere else: an infinity in a padded row becomes NaN where its probability 0 meets it.

Inside of a node, partial sums can be larger than the result. Of a product they are at most the
largest norm of a row times that of a column (Cauchy and Schwarz), whatever the order of summation;
of a sum they are at most the sum of magnitudes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.calibration import Calibration, Extreme
from optimizer.nodes import dims, operand, optional
from optimizer.precision.limits import FLOATS
from optimizer.precision.rules import SUMS, sensitive_input

_FLOAT = ir.DataType.FLOAT
_SQUARES = frozenset({"ReduceL2", "ReduceSumSquare"})


@dataclass(frozen=True)
class Ranges:
    """What was seen, by names of values.

    Attributes:
        largest: Largest finite magnitude of every floating value.
        smallest: Smallest magnitude, zero left out, of values whose relative error matters.
        inside: What partial sums of a node can reach, by the name of its first result.
        samples: Number of samples run.
    """

    largest: Mapping[str, float] = field(default_factory=dict)
    smallest: Mapping[str, float] = field(default_factory=dict)
    inside: Mapping[str, float] = field(default_factory=dict)
    samples: int = 0


def measure(model: ir.Model, calibration: Calibration) -> Ranges:
    """Run all samples once; measuring nodes are added to ``model``, a clone to be thrown away."""
    probe = _Probe(model)
    largest: dict[str, Extreme] = {}
    smallest: dict[str, Extreme] = {}
    inside: dict[str, Extreme] = {}
    nodes = list(model.graph)
    for value in model.graph.inputs:
        if value.dtype in FLOATS and not value.is_initializer() and nodes:
            largest[str(value.name)] = probe.largest(value, nodes[0])
    for node, following in zip(nodes, [*nodes[1:], None], strict=False):
        sums = probe.sums(node)
        if sums is not None:
            inside[str(node.outputs[0].name)] = sums
        read = sensitive_input(node)
        if read is not None and read.dtype in FLOATS:
            smallest[str(read.name)] = probe.smallest(read, node)
        for value in node.outputs:
            if value.dtype in FLOATS and value.name:
                largest[value.name] = probe.largest(value, following)
    calibration.observe(model, [*largest.values(), *smallest.values(), *inside.values()])
    samples = calibration.samples.count
    return Ranges(_found(largest), _found(smallest), _found(inside), samples)


def _found(extremes: Mapping[str, Extreme]) -> dict[str, float]:
    """The numbers of those that saw one; an empty array or one of zeros has none."""
    numbers = ((name, extreme.found) for name, extreme in extremes.items())
    return {name: n for name, n in numbers if n is not None and math.isfinite(n)}


class _Probe:
    """Adds measuring nodes to a model."""

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self._opset = model.opset_imports.get("", 1)
        self._constants: dict[str, ir.Value] = {}

    def largest(self, value: ir.Value, anchor: ir.Node | None) -> Extreme:
        """Largest finite magnitude of ``value``."""
        size = self._put(anchor, "Abs", (self._float(value, anchor),))
        finite = self._put(anchor, "Less", (size, self._infinity()), dtype=ir.DataType.BOOL)
        kept = self._put(anchor, "Where", (finite, size, self._number("zero", 0.0)))
        return Extreme(self._reduce(anchor, "ReduceMax", kept), largest=True)

    def smallest(self, value: ir.Value, anchor: ir.Node) -> Extreme:
        """Smallest magnitude of ``value`` but for zeros."""
        size = self._put(anchor, "Abs", (self._float(value, anchor),))
        zero = self._number("zero", 0.0)
        used = self._put(anchor, "Greater", (size, zero), dtype=ir.DataType.BOOL)
        kept = self._put(anchor, "Where", (used, size, self._infinity()))
        return Extreme(self._reduce(anchor, "ReduceMin", kept), largest=False)

    def sums(self, node: ir.Node) -> Extreme | None:
        """What partial sums of ``node`` can reach, None for a node that adds up nothing."""
        if node.domain != "":
            return None
        bound: ir.Value | None = None
        if node.op_type in ("MatMul", "Gemm"):
            turned = [node.attributes.get_int(name, 0) for name in ("transA", "transB")]
            rows = self._norm(node, operand(node), -2 if turned[0] else -1)
            columns = self._norm(node, operand(node, 1), -1 if turned[1] else -2)
            bound = self._put(node, "Mul", (rows, columns))
        elif node.op_type == "Attention":
            bound = self._scores(node)
        elif node.op_type == "Conv" and dims(operand(node, 1)) is not None:
            bound = self._windows(node)
        elif node.op_type in SUMS and node.op_type.startswith("Reduce"):
            how = "ReduceSumSquare" if node.op_type in _SQUARES else "ReduceL1"
            inputs = [self._float(operand(node), node), *node.inputs[1:]]
            terms = self._put(node, how, inputs, node.attributes)
            bound = self._reduce(node, "ReduceMax", terms)
        return None if bound is None else Extreme(bound, largest=True)

    def _scores(self, node: ir.Node) -> ir.Value | None:
        """Query times key before the scale: a runtime may apply that after."""
        heads = (
            node.attributes.get_int("q_num_heads", 0),
            node.attributes.get_int("kv_num_heads", 0),
        )
        sides = []
        for value, count in zip((operand(node), operand(node, 1)), heads, strict=True):
            if count:
                shape = self._vector(f"heads_{count}", 0, 0, count, -1)
                split = self._put(node, "Reshape", (self._float(value, node), shape))
                sides.append(self._norm(node, split, -1))
            else:
                sides.append(self._norm(node, value, -1))
        past = optional(node, 4)
        if past is not None:
            sides[1] = self._put(node, "Max", (sides[1], self._norm(node, past, -1)))
        return self._put(node, "Mul", sides)

    def _windows(self, node: ir.Node) -> ir.Value:
        """Largest input times the largest sum of magnitudes of a kernel."""
        weight = operand(node, 1)
        axes = range(1, len(dims(weight) or ()))
        sums = self._reduce(node, "ReduceL1", self._float(weight, node), *axes)
        size = self._put(node, "Abs", (self._float(operand(node), node),))
        both = [self._reduce(node, "ReduceMax", value) for value in (sums, size)]
        return self._put(node, "Mul", both)

    def _norm(self, node: ir.Node, value: ir.Value, axis: int) -> ir.Value:
        """Largest norm of the vectors along an axis, of which a plain vector has only one."""
        flat = value.shape is not None and len(value.shape) == 1
        norms = self._reduce(node, "ReduceL2", self._float(value, node), -1 if flat else axis)
        return self._reduce(node, "ReduceMax", norms)

    def _reduce(self, anchor: ir.Node | None, how: str, value: ir.Value, *axes: int) -> ir.Value:
        inputs, attributes = [value], {"keepdims": 0}
        if axes and self._opset >= 18:
            inputs.append(self._vector("axes_" + "_".join(map(str, axes)), *axes))
        elif axes:
            return self._put(anchor, how, inputs, {**attributes, "axes": list(axes)})
        return self._put(anchor, how, inputs, attributes)

    def _float(self, value: ir.Value, anchor: ir.Node | None) -> ir.Value:
        """``value`` in float32, where squares have room."""
        if value.dtype == _FLOAT:
            return value
        return self._put(anchor, "Cast", (value,), {"to": _FLOAT.value})

    def _put(
        self,
        anchor: ir.Node | None,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        dtype: ir.DataType = _FLOAT,
    ) -> ir.Value:
        name = f"measured/{op_type}"
        return graphs.insert(
            self._graph, anchor, op_type, inputs, attributes, name=name, dtype=dtype
        )

    def _infinity(self) -> ir.Value:
        return self._number("infinity", math.inf)

    def _number(self, name: str, number: float) -> ir.Value:
        return self._constant(name, np.array(number, np.float32))

    def _vector(self, name: str, *numbers: int) -> ir.Value:
        return self._constant(name, np.array(numbers, np.int64))

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        if name not in self._constants:
            full = f"measured/{name}"
            self._constants[name] = graphs.add_initializer(self._graph, full, array)
        return self._constants[name]
