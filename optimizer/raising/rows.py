"""Computes row-wise functions before a Reshape flattens the batch, not after it.

Rewrite: f(Reshape(x, [-1, D])) -> Reshape(f(x), [-1, N]) for x [B, S, D]: linear layers, norms,
         activations, rounding, additions of two values flattened alike. The Reshape wanders down
         until it meets the one that restores the batch, and both go away (``reshapes``).
Applies when: f treats every row of the last axis alike, by its operator and its constants
Exactness: bitwise in exact row order; a runtime may block a GEMM of another shape differently
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.nodes import dims, node_of, operand, optional
from optimizer.quantized_parts import stored
from optimizer.raising.base import RuleReport, attempt
from optimizer.raising.shapes import Shapes

UNARY = frozenset(
    {
        "Abs", "Cast", "Celu", "Clip", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish",
        "Identity", "LeakyRelu", "Log", "Mish", "Neg", "Reciprocal", "Relu", "Selu", "Sigmoid",
        "Softplus", "Softsign", "Sqrt", "Swish", "Tanh",
    }
)  # fmt: skip
BINARY = frozenset({"Add", "Div", "Max", "Min", "Mul", "Pow", "Sub"})
_NORMS = frozenset({"LayerNormalization", "RMSNormalization"})
_ROUNDING = frozenset({"DequantizeLinear", "QuantizeLinear"})
_PRODUCTS = frozenset({"MatMul", "MatMulInteger"})
_DYNAMIC = "DynamicQuantizeLinear"


def run(model: ir.Model) -> RuleReport:
    """Move every flattening Reshape of the main graph below what it does not matter to."""
    graph = model.graph
    shapes = Shapes()
    applied = 0
    for node in list(graph):
        if node.domain == "" and (len(node.outputs) == 1 or node.op_type == _DYNAMIC):
            applied += attempt(node, _move, graph, shapes, node)
    if applied:
        graphs.remove_dead(graph)
    return RuleReport(applied)


def _flattened(shapes: Shapes, value: ir.Value | None) -> ir.Value | None:
    """X where ``value`` [M, D] is a Reshape of x [..., D] of rank 3 or more."""
    reshape = node_of(value, "Reshape", "Flatten")
    if reshape is None:
        return None
    source = operand(reshape)
    before, after = shapes.of(source), shapes.of(value)
    if before is None or after is None or len(before) < 3 or len(after) != 2:
        return None
    return source if isinstance(after[1], int) and before[-1] == after[1] else None


def _heads_joined(graph: ir.Graph, shapes: Shapes, node: ir.Node) -> list[ir.Value | None] | None:
    """The inputs of a product of [B, S, H, c] as [B*S, H*c], with its heads joined alone."""
    reshape = node_of(node.inputs[0], "Reshape")
    if reshape is None or not _rowwise(shapes, node):
        return None
    source = operand(reshape)
    before, after = shapes.of(source), shapes.of(reshape.outputs[0])
    if before is None or after is None or (len(before), len(after)) != (4, 2):
        return None
    heads, size = before[2:]
    if not isinstance(heads, int) or not isinstance(size, int) or after[1] != heads * size:
        return None
    target = graphs.add_initializer(graph, "joined_heads", np.array([0, 0, after[1]], np.int64))
    joined = graphs.insert(graph, node, "Reshape", [source, target], dtype=source.dtype)
    return [joined, *node.inputs[1:]]


def _move(graph: ir.Graph, shapes: Shapes, node: ir.Node) -> bool:
    output = node.outputs[0]
    result = shapes.of(output)
    if result is None or len(result) != 2 or not isinstance(result[1], int):
        return False
    if node.op_type == "Cast" and output.is_graph_output() and not output.uses():
        return False  # the model's last step; what stores half precision writes it there again
    inputs = _inputs_before(shapes, node)
    if inputs is None and node.op_type in _PRODUCTS:
        inputs = _heads_joined(graph, shapes, node)
    if inputs is None:
        return False
    wide, *rest = _before(graph, node, inputs)
    for old, new in zip(node.outputs[1:], rest, strict=True):
        graphs.replace_value(old, new, keep_name=True)
    target = graphs.add_initializer(graph, "flat", np.array([-1, result[1]], np.int64))
    flat = graphs.insert(
        graph, node, "Reshape", [wide, target], name=f"{output.name}_flat", dtype=output.dtype
    )
    graphs.replace_value(output, flat, keep_name=True)
    return True


def _before(graph: ir.Graph, node: ir.Node, inputs: list[ir.Value | None]) -> tuple[ir.Value, ...]:
    """The outputs of the node on rows that are not flattened."""
    made = graphs.insert(
        graph, node, node.op_type, inputs, dict(node.attributes),
        name=f"{node.outputs[0].name}_rows", outputs=len(node.outputs),
        dtype=[output.dtype for output in node.outputs],
    )  # fmt: skip
    return made if isinstance(made, tuple) else (made,)


def _inputs_before(shapes: Shapes, node: ir.Node) -> list[ir.Value | None] | None:
    """The inputs with which the node gives the same rows before they are flattened."""
    inputs = list(node.inputs)
    if node.op_type in UNARY | _NORMS | _PRODUCTS | _ROUNDING | {_DYNAMIC}:
        source = _flattened(shapes, inputs[0])
        return [source, *inputs[1:]] if source is not None and _rowwise(shapes, node) else None
    if node.op_type not in BINARY or len(inputs) != 2:
        return None
    sources = [_flattened(shapes, value) for value in inputs]
    if sources[0] is not None and sources[1] is not None:
        return list(sources) if shapes.same(sources[0], sources[1]) else None
    for source, rest in ((sources[0], inputs[1]), (sources[1], inputs[0])):
        size = shapes.of(rest)
        if source is not None and size is not None and len(size) <= 1:
            return [source if value is not rest else rest for value in inputs]
    return None


def _rowwise(shapes: Shapes, node: ir.Node) -> bool:
    """Whether the constants and attributes of a node treat all rows alike."""
    if node.op_type in _NORMS:
        scale = dims(operand(node, 1))
        last = node.attributes.get_int("axis", -1) == -1
        return last and scale is not None and len(scale) == 1
    if node.op_type in _PRODUCTS:
        weight, middle = dims(stored(operand(node, 1))), optional(node, 2)
        whole = middle is None or shapes.of(middle) in ((), (1,))
        return whole and weight is not None and len(weight) == 2
    if node.op_type in _ROUNDING:
        return all(value is None or graphs.scalar(value) is not None for value in node.inputs[1:])
    return all(value is None or graphs.constant(value) is not None for value in node.inputs[1:])
