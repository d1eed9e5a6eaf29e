"""What every pass that rewrites the weights of linear layers asks about them.

``linear_at`` says whether a node is one, and why not; ``is_shared``, ``is_head`` and
``is_embedding`` say what else hangs on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

import onnx_ir as ir

from optimizer import block_parts as parts
from optimizer import graph as graphs
from optimizer.nodes import dims, node_of, operands
from optimizer.norm_parts import norm
from optimizer.structure import Linear

#: Operators that only move numbers around.
SHAPING = frozenset({"Reshape", "Transpose", "Split", "Slice", "Squeeze", "Unsqueeze", "Flatten"})
_AFTER_HEAD = SHAPING | {
    "Cast", "Tanh", "Softmax", "LogSoftmax", "Sigmoid", "Mul", "Div", "Clip", "ArgMax", "TopK",
}  # fmt: skip
#: Operators behind which a value is no embedding any more.
_LAYERS = frozenset(
    {"Attention", "Conv", "Gemm", "MatMul", "MatMulInteger", "LSTM", "GRU", "RNN", "Einsum"}
)

#: Why a layer that shares its weight is left alone.
SHARED = "its weight is used elsewhere too"


def layer_name(node: ir.Node) -> str:
    """The name of a layer for users: that of its weight, else of its node."""
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    named = weight is not None and graphs.constant(weight) is not None
    return str(weight.name if named and weight is not None else node.name or node.op_type)


def linear_at(node: ir.Node) -> Linear | str | None:
    """The float linear layer of a node; why it is none; None for a product of two activations."""
    if node.domain != "":
        return None
    if node.op_type == "Gemm" and graphs.constant(node.inputs[1]) is not None:
        return "a Gemm that is not in the canonical form MatMul + Add"
    if node.op_type != "MatMul":
        return None
    left, right = operands(node)
    if node_of(right, "DequantizeLinear") or node_of(left, "DequantizeLinear"):
        return "already quantized"
    if right.is_initializer() and right.is_graph_input():
        return "its weight is a graph input, which the caller may override"
    shape = dims(right)
    if shape is None:
        return _constant_elsewhere(left, right)
    if len(shape) != 2:
        return f"its weight has {len(shape)} dimensions, expected a matrix"
    return next((x for x in parts.linear_reading(left) if x.matmul is node), None)


def _constant_elsewhere(left: ir.Value, right: ir.Value) -> str | None:
    if graphs.constant(left) is not None:
        return "its constant is the first factor"
    transpose = node_of(right, "Transpose")
    if transpose is not None and graphs.constant(transpose.inputs[0]) is not None:
        return "its weight is used elsewhere too, and transposed for this layer"
    return None


def matches(linear: Linear, patterns: tuple[str, ...]) -> bool:
    """Whether a shell pattern fits the name of the layer's weight or node."""
    names = (str(linear.weight.name), str(linear.matmul.name))
    return any(fnmatchcase(n, pattern) for n in names for pattern in patterns)


def is_shared(linear: Linear) -> bool:
    """Whether another node, or the caller of the model, reads the layer's weight too."""
    readers = {use.node for use in linear.weight.uses()}
    return len(readers) > 1 or linear.weight.is_graph_output()


def is_head(value: ir.Value) -> bool:
    """Whether outputs of the model are all that ``value`` is for, but for simple steps after it.

    A key that is returned for a cache and read by the attention too is no head.
    """
    pending, seen, reached = [value], {value}, False
    while pending:
        current = pending.pop()
        reached = reached or current.is_graph_output()
        for node in users_of(current):
            by_constant_term = node.op_type in {"Add", "Sub"} and any(
                graphs.constant(operand) is not None for operand in node.inputs
            )
            if node.op_type not in _AFTER_HEAD and not by_constant_term:
                return False
            fresh = [v for v in node.outputs if v not in seen]
            pending.extend(fresh)
            seen.update(fresh)
    return reached


def is_embedding(linear: Linear) -> bool:
    """Whether the layer is the first on the way of its input: no other layer or norm before it."""
    pending, seen = [linear.input], {linear.input}
    while pending:
        node = pending.pop().producer()
        if node is None:
            continue
        if node.domain != "" or node.op_type in _LAYERS or norm(node.outputs[0]) is not None:
            return False
        fresh = [v for v in node.inputs if v is not None and v not in seen]
        pending.extend(fresh)
        seen.update(fresh)
    return True


def users_of(value: ir.Value) -> Iterator[ir.Node]:
    """The standard nodes that read ``value``, each once."""
    nodes = dict.fromkeys(use.node for use in value.uses())
    return (node for node in nodes if node.domain == "")
