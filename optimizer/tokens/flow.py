"""Who reads the tokens after some were merged, and what each reader needs.

Starting at the places where tokens are merged, values are followed that still hold one row per
token, through everything that treats each token by itself. What is reached otherwise is a reader:
it takes tokens at constant positions out, which are protected, or needs every token and is given
them back. (The mean over tokens given back is the mean weighted by their sizes.)
"""

from __future__ import annotations

import enum
from collections.abc import Sequence, Set
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.raising.dims import Shape
from optimizer.raising.shapes import Shapes

_ELEMENTWISE = frozenset(
    {
        "Abs", "Add", "Cast", "Celu", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid",
        "HardSwish", "Identity", "LeakyRelu", "Max", "Min", "Mish", "Mul", "Neg", "Pow", "Relu",
        "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Sub", "Swish", "Tanh",
    }
)  # fmt: skip
_BY_TOKEN = frozenset({"LayerNormalization", "RMSNormalization", "Softmax", "LogSoftmax"})


class Need(enum.Enum):
    """What a reader does with the tokens.

    SELECT: takes tokens at constant positions out.
    ALL: anything else.
    """

    SELECT = "selects tokens"
    ALL = "needs every token"


@dataclass(frozen=True)
class Reader:
    """One input of a node that reads tokens and is not computed token by token.

    Attributes:
        value: The tokens [B, N, D].
        node: Who reads them; None: they are an output of the model.
        need: What for.
        stage: How many reductions lie before.
        positions: Of the tokens that are taken out, for SELECT.
    """

    value: ir.Value
    node: ir.Node | None
    need: Need
    stage: int
    positions: tuple[int, ...] = ()


@dataclass
class Flow:
    """Where tokens go.

    Attributes:
        stages: Values that hold one row per token, and how many reductions lie before them.
        readers: Nodes in graph order, then outputs.
        entered: The stage of each value that is reduced, before that.
    """

    stages: dict[ir.Value, int] = field(default_factory=dict)
    readers: list[Reader] = field(default_factory=list)
    entered: dict[ir.Value, int] = field(default_factory=dict)


def follow(
    graph: ir.Graph, reduced: Sequence[ir.Value], attentions: Set[ir.Node], shapes: Shapes
) -> Flow:
    """Follow the tokens behind the first reduction.

    Args:
        graph: The main graph.
        reduced: Values [B, N, D] whose users read fewer tokens from now on, in graph order; the
            users of the first are in stage 1.
        attentions: Nodes that attend to merged tokens correctly.
        shapes: Of this graph.
    """
    flow = Flow()
    begins = {value: index + 1 for index, value in enumerate(reduced)}
    outputs = set(graph.outputs)
    for node in graph:
        carried = [v for v in node.inputs if v is not None and v in flow.stages]
        if carried:
            _visit(node, carried, flow, shapes, attentions)
        for output in node.outputs:
            stage = flow.stages.get(output, 0)
            if output in outputs and stage:
                flow.readers.append(Reader(output, None, Need.ALL, stage))
            if output in begins:
                flow.entered[output], flow.stages[output] = stage, begins[output]
    flow.readers.sort(key=lambda reader: reader.node is None)
    return flow


def _visit(
    node: ir.Node, carried: list[ir.Value], flow: Flow, shapes: Shapes, attentions: Set[ir.Node]
) -> None:
    stages = {flow.stages[value] for value in carried}
    if len(stages) == 1 and _token_by_token(node, carried, shapes, attentions):
        flow.stages[node.outputs[0]] = stages.pop()
        return
    for value in dict.fromkeys(carried):
        flow.readers.append(_reader(node, value, flow.stages[value], shapes))


def _token_by_token(
    node: ir.Node, carried: list[ir.Value], shapes: Shapes, attentions: Set[ir.Node]
) -> bool:
    if node in attentions:
        return all(value in carried for value in node.inputs[:3])
    if node.domain != "":
        return False
    others = [v for v in node.inputs if v is not None and v not in carried]
    if node.op_type in _BY_TOKEN:
        axis = node.attributes.get_int("axis", -1)
        return node.inputs[0] in carried and axis in (-1, 2)
    if node.op_type == "MatMul":
        tensor = graphs.constant(node.inputs[1])
        return tensor is not None and len(tensor.shape) == 2
    if node.op_type in _ELEMENTWISE:
        return all(_same_for_all_tokens(shapes.of(value)) for value in others)
    return False


def _same_for_all_tokens(shape: Shape | None) -> bool:
    return shape is not None and (len(shape) < 2 or (len(shape) <= 3 and shape[-2] == 1))


def _reader(node: ir.Node, value: ir.Value, stage: int, shapes: Shapes) -> Reader:
    shape = shapes.of(value)
    count = None if shape is None or len(shape) != 3 else shape[1]
    if node.domain == "" and isinstance(count, int) and node.inputs[0] is value:
        positions = selected(node, count)
        if positions is not None:
            return Reader(value, node, Need.SELECT, stage, positions)
    return Reader(value, node, Need.ALL, stage)


def selected(node: ir.Node, count: int) -> tuple[int, ...] | None:
    """The tokens of ``count`` that a Gather or Slice with constant positions takes out."""
    if node.op_type == "Gather" and node.attributes.get_int("axis", 0) in (1, -2):
        index = graphs.const(node.inputs[1])
        if index is None or (index.size and (index.max() >= count or index.min() < -count)):
            return None
        return tuple(int(i) % count for i in index.reshape(-1))
    if node.op_type == "Slice" and len(node.inputs) >= 4:
        numbers = [graphs.const(v) for v in node.inputs[1:]]
        if any(n is None or n.size != 1 for n in numbers):
            return None
        start, end, axis, *step = (int(n.reshape(-1)[0]) for n in numbers if n is not None)
        if axis in (1, -2):
            return tuple(np.arange(count)[start : end : step[0] if step else 1].tolist())
    return None
