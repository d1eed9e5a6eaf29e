"""Numbers that stand for "never" or "no limit", made to fit.

Exporters fill masks with the lowest float32, which half precision turns into minus infinity: added
up, or multiplied by 0, that is not a number, and a row that masks all of its keys has no maximum
to subtract. Any number that is far enough below all scores means the same. A quarter of the lowest
of the format leaves room for a score and for masks that are added to each other; the exponential of
its distance to any score is 0. What is minus infinity in the model stays so: it means the same in
both types, and its users may rely on it.

A constant is a mask if everything that is computed from it ends in a Softmax, or as the mask of an
attention, and nothing on the way could tell one very low number from another. It is a limit if it
only bounds other numbers (Clip, Max, Min), which the format's largest number does as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.attention_masks import MASK
from optimizer.nodes import dims
from optimizer.precision.constants import Numbers
from optimizer.precision.limits import FLOATS, Format
from optimizer.widening import EXACT

#: Share of the format's lowest number that a mask is filled with.
FILL = 0.25

_MOVES = frozenset(
    {
        "Cast", "Concat", "Expand", "Identity", "Pad", "Reshape", "Slice", "Squeeze", "Tile",
        "Transpose", "Trilu", "Unsqueeze",
    }
)  # fmt: skip
_ADDS = frozenset({"Add", "Max", "Min", "Mul", "Where"})


@dataclass(frozen=True)
class Extremes:
    """Constants beyond the range of a format that need not be.

    Attributes:
        masks: Names of initializers that fill masks, and of results of ConstantOfShape that do.
        limits: Names of initializers that bound numbers.
        masked: All values computed from the masks on the way to a softmax.
    """

    masks: frozenset[str] = frozenset()
    limits: frozenset[str] = frozenset()
    masked: frozenset[ir.Value] = frozenset()

    def fit(self, graph: ir.Graph, format_: Format) -> None:
        """Give them numbers within the range, in ``graph`` or a clone of it."""
        largest = np.float32(format_.largest)

        def filled(array: np.ndarray) -> np.ndarray:
            low = np.isfinite(array) & (array < -largest)
            return np.where(low, -FILL * largest, array).astype(array.dtype)

        def bounded(array: np.ndarray) -> np.ndarray:
            return np.where(np.isfinite(array), np.clip(array, -largest, largest), array)

        for name, constant in list(graph.initializers.items()):
            change = filled if name in self.masks else bounded if name in self.limits else None
            if change is not None:
                constant.const_value = graphs.derived(constant, dims(constant) or (), change)
        for node in graph:
            if _fill(node) is not None and node.outputs[0].name in self.masks:
                array = filled(node.attributes["value"].as_tensor().numpy())
                node.attributes["value"] = ir.AttrTensor("value", ir.tensor(array))


def find_extremes(graph: ir.Graph, numbers: Mapping[str, Numbers], format_: Format) -> Extremes:
    """The masks and limits among constants with numbers that do not fit."""
    masks, limits = set[str](), set[str]()
    masked: set[ir.Value] = set()
    for source, held in overflowing(graph, numbers, format_):
        if source.is_graph_output() or not source.uses():
            continue
        if all(node.graph is graph and _bounds(node, index) for node, index in source.uses()):
            limits.add(str(source.name))
        elif held.highest <= format_.largest:
            values = _way(graph, source)
            if values is not None:
                masks.add(str(source.name))
                masked |= values
    return Extremes(frozenset(masks), frozenset(limits), frozenset(masked))


def overflowing(
    graph: ir.Graph, numbers: Mapping[str, Numbers], format_: Format
) -> Iterator[tuple[ir.Value, Numbers]]:
    """Initializers with numbers that do not fit, and arrays filled with one."""
    for name, held in numbers.items():
        if held.overflowing and name in graph.initializers:
            yield graph.initializers[name], held
    for node in graph:
        number = _fill(node)
        if number is not None and format_.end <= abs(number) < np.inf:
            yield node.outputs[0], Numbers(1, number, number, overflowing=1)


def _fill(node: ir.Node) -> float | None:
    """The floating number that an array of computed shape is filled with."""
    value = node.attributes.get("value")
    if node.op_type != "ConstantOfShape" or node.domain != "" or value is None:
        return None
    tensor = value.as_tensor()
    return float(tensor.numpy().reshape(-1)[0]) if tensor.dtype in FLOATS else None


def _bounds(node: ir.Node, index: int) -> bool:
    """Whether an input of a node only bounds its result."""
    if node.domain != "":
        return False
    return node.op_type in ("Max", "Min") or (node.op_type == "Clip" and index > 0)


def _way(graph: ir.Graph, source: ir.Value) -> set[ir.Value] | None:
    """What is computed from ``source`` up to a softmax; None where it gets elsewhere."""
    seen: set[ir.Value] = set() if source.is_initializer() else {source}
    pending, ends = [source], 0
    while pending:
        value = pending.pop()
        if value.is_graph_output():
            return None
        for node, index in value.uses():
            if _is_end(node, index):
                ends += 1
            elif node.graph is graph and _passes(node, index):
                fresh = [output for output in node.outputs if output not in seen]
                seen.update(fresh)
                pending.extend(fresh)
            else:
                return None
    return seen if ends else None


def _is_end(node: ir.Node, index: int) -> bool:
    if node.domain != "":
        return False
    masks = node.op_type == "Attention" and index == MASK
    return masks or node.op_type == "Softmax"


def reached(graph: ir.Graph, source: ir.Value, *, selected: bool) -> set[ir.Value]:
    """Values that may hold the numbers of ``source``: what reads it, and what passes them on.

    Args:
        graph: The main graph.
        source: An initializer, or an array filled with one number.
        selected: Leave out what is computed with the numbers instead of choosing among them.
    """
    found: set[ir.Value] = set()
    readers = (node for node, _ in source.uses())
    chosen = (node for node in readers if node.op_type in EXACT or not selected)
    pending = [value for node in chosen for value in node.outputs]
    if not source.is_initializer():
        pending = [source]
    while pending:
        value = pending.pop()
        if value in found:
            continue
        found.add(value)
        for node, index in value.uses():
            if node.graph is graph and _passes(node, index):
                pending.extend(node.outputs)
    return found


def _passes(node: ir.Node, index: int) -> bool:
    """Whether a very low input makes a very low result, or none."""
    if node.domain != "":
        return False
    if node.op_type in ("Clip", "Div"):
        return index < (2 if node.op_type == "Clip" else 1)
    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int()).is_floating_point()
    return node.op_type in _MOVES or node.op_type in _ADDS
