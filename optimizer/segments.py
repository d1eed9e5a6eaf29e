"""Cuts a model at named values into parts that can be run one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from optimizer.proto import Part, names_read


@dataclass(frozen=True)
class Segment:
    """What lies between two cuts.

    Attributes:
        nodes: Sorted; shared preparation (masks, rotary tables) is in every segment that needs it.
        inputs: Values read from outside: cuts and graph inputs.
        outputs: Names of the cut at its end and of the graph outputs computed in it.
    """

    nodes: tuple[ir.Node, ...]
    inputs: tuple[ir.Value, ...]
    outputs: tuple[str, ...]

    def part(self, model: ir.Model, ranks: Mapping[str, int]) -> Part:
        """The segment as something a runner takes.

        Args:
            model: The model that was cut.
            ranks: Number of axes of each input value.
        """
        float32 = ir.DataType.FLOAT
        known = {str(v.name): v.dtype for v in model.graph.inputs}
        inputs = [
            (name, known.get(name) or v.dtype or float32, ranks[name])
            for v, name in ((v, str(v.name)) for v in self.inputs)
        ]
        return Part(self.nodes, inputs, self.outputs)


def segments(model: ir.Model, cuts: Sequence[str]) -> list[Segment]:
    """Cut ``model``; segment i ends at cut i, the last one at the outputs.

    Args:
        model: Sorted.
        cuts: Names of values, in the order in which they are computed.
    """
    produced = {str(v.name): node for node in model.graph for v in node.outputs if v.name}
    order = {node: i for i, node in enumerate(model.graph)}
    stops = set(cuts)
    targets: list[list[str]] = [[cut] for cut in cuts] + [[]]
    for value in model.graph.outputs:
        name = str(value.name)
        if name in stops or name not in produced:
            continue
        _, read = _slice(name, produced, stops)
        last = max((cuts.index(r) for r in read if r in stops), default=-1)
        targets[last + 1].append(name)
    result = []
    for names in targets:
        nodes: set[ir.Node] = set()
        outside: dict[str, ir.Value] = {}
        for name in names:
            more, read = _slice(name, produced, stops)
            nodes |= more
            outside.update(read)
        result.append(
            Segment(
                tuple(sorted(nodes, key=order.__getitem__)), tuple(outside.values()), tuple(names)
            )
        )
    return result


def _slice(
    target: str, produced: Mapping[str, ir.Node], stops: set[str]
) -> tuple[set[ir.Node], dict[str, ir.Value]]:
    """Nodes that ``target`` needs, and the cuts and graph inputs they read."""
    nodes: set[ir.Node] = set()
    outside: dict[str, ir.Value] = {}
    pending = [produced[target]]
    while pending:
        node = pending.pop()
        if node in nodes:
            continue
        nodes.add(node)
        direct = {str(v.name): v for v in node.inputs if v is not None}
        for name in sorted(names_read([node])):
            if name in produced and name not in stops:
                pending.append(produced[name])
                continue
            value = direct.get(name)
            if value is None and name in produced:
                value = next(v for v in produced[name].outputs if v.name == name)
            if value is not None and (name in stops or value.is_graph_input()):
                outside[name] = value
    return nodes, outside
