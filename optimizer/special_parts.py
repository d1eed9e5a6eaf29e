"""Recognises what only some transformer blocks have: attention to an encoder, and experts.

An Attention whose keys and values lie complete in a cache keeps its 4-D form, because that is the
form of the cache; its query and result then pass a Reshape and a Transpose.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from optimizer import block_parts as parts
from optimizer import graph as graphs
from optimizer.nodes import node_of, operand, reader, users
from optimizer.norm_parts import norm
from optimizer.structure import Experts, Linear

#: Why attention within windows belongs to no block.
WINDOWED = "attention within windows of the tokens"
_ELEMENTWISE = ("Add", "Cast", "Clip", "Div", "Max", "Min", "Mul", "Sub", "Tanh", "Where")
_LAYOUT = (
    "Concat", "Expand", "Flatten", "Gather", "GatherElements", "Pad", "Reshape", "Slice", "Split",
    "Squeeze", "Tile", "Transpose", "Unsqueeze",
)  # fmt: skip
_ROUNDING = ("DequantizeLinear", "QuantizeLinear")
#: Steps between the Softmax and the products its scores are made of, relative positions included.
_MAX_SCORES = 60
#: Steps between a norm and the windows cut out of its result.
_MAX_WINDOW = 16
#: A mixture written out has about thirty nodes per expert or some dozens in all.
_MAX_ROUTED = 2000


@dataclass(frozen=True)
class Crossing:
    """An Attention to another sequence with its projections; fields as in ``CrossAttention``."""

    node: ir.Node
    q: Linear
    k: Linear | None
    v: Linear | None
    o: Linear
    heads: int
    kv_heads: int
    head_dim: int


def crossing(node: ir.Node) -> Crossing | str:
    """The view of an Attention to another sequence, or why it is none."""
    flat = node.attributes.get_int("q_num_heads", 0) > 0
    q = _projection(node.inputs[0], flat=flat)
    k, v = (_projection(value, flat=flat) for value in node.inputs[1:3])
    if q is None:
        return "the query is not a linear projection"
    if k is not None and k.input is q.input:
        return "query and keys read the same value"
    if (k is None) != (v is None):
        return "only one of keys and values is a linear projection"
    if k is not None and v is not None and k.input is not v.input:
        return "keys and values read different values"
    if k is None and not all(is_complete_cache(value) for value in node.inputs[1:3]):
        return "keys and values are neither linear projections nor a complete cache"
    o = _result(node, flat=flat)
    if o is None:
        return "the output is not read by exactly one linear projection"
    heads, kv_heads = _heads(node, flat=flat)
    if not heads or not kv_heads or parts.width(q) % heads:
        return "the number of heads is not known"
    return Crossing(node, q, k, v, o, heads, kv_heads, parts.width(q) // heads)


def _projection(value: ir.Value | None, *, flat: bool) -> Linear | None:
    if value is not None and not flat:
        turned = node_of(value, "Transpose")
        split = None if turned is None else node_of(turned.inputs[0], "Reshape")
        value = None if split is None else split.inputs[0]
    return None if value is None else parts.linear(value)


def clamped(value: ir.Value) -> ir.Value:
    """``value`` after a clamp that keeps it finite, ``value`` itself without one.

    A layer of a half-precision model may end with one: a Clip, or Max and Min, whose bounds are
    single numbers, perhaps computed.
    """
    for node in users(value, "Clip"):
        if node.inputs[0] is value and all(map(_is_number, node.inputs[1:])):
            return node.outputs[0]
    for first, second in (("Max", "Min"), ("Min", "Max")):
        for node in users(value, first):
            last = reader(node.outputs[0], second)
            if last is None:
                continue
            bounds = [v for v in (*node.inputs, *last.inputs) if v not in (value, node.outputs[0])]
            if len(bounds) == 2 and all(map(_is_number, bounds)):
                return last.outputs[0]
    return value


def _is_number(value: ir.Value | None) -> bool:
    return value is not None and value.shape is not None and value.shape.dims in ((), (1,))


def is_complete_cache(value: ir.Value | None) -> bool:
    """Keys or values that the model is given as they are, [B, H, T, c]: nothing is appended."""
    cast = node_of(value, "Cast")
    value = value if cast is None else cast.inputs[0]
    return value is not None and value.is_graph_input()


def _result(node: ir.Node, *, flat: bool) -> Linear | None:
    value: ir.Value | None = node.outputs[0]
    if not flat:
        turned = graphs.only_user(node.outputs[0])
        joined = None
        if turned is not None and turned.op_type == "Transpose":
            joined = graphs.only_user(turned.outputs[0])
        value = joined.outputs[0] if joined is not None and joined.op_type == "Reshape" else None
    return None if value is None else parts.projection_of(value)


def _heads(node: ir.Node, *, flat: bool) -> tuple[int, int]:
    if flat:
        found = (node.attributes.get_int(name, 0) for name in ("q_num_heads", "kv_num_heads"))
        heads, kv_heads = found
        return heads, kv_heads
    shapes = [value.shape for value in node.inputs[:2] if value is not None]
    sizes = [shape[1] for shape in shapes if shape is not None and len(shape) == 4]
    first, second = (*(size if isinstance(size, int) else 0 for size in sizes), 0, 0)[:2]
    return first, second


def crossing_before(end: ir.Value) -> Crossing | None:
    """The attention to another sequence whose result is the branch that ends in ``end``."""
    found = parts.backward_linear(end, "cross-attention")
    if found is None or found[1]:
        return None
    node = _attention_under(found[0].input)
    crossed = None if node is None else crossing(node)
    return crossed if isinstance(crossed, Crossing) else None


def _attention_under(value: ir.Value) -> ir.Node | None:
    """The Attention that computes ``value``, through the layout of its 4-D form."""
    for op_type in ("Reshape", "Transpose"):
        node = node_of(value, op_type)
        value = value if node is None else operand(node)
    return node_of(value, "Attention")


def experts(end: ir.Value) -> Experts | str | None:
    """The mixture of experts that ends in ``end``; None where nothing routes tokens."""
    nodes: dict[ir.Node, None] = {}
    inputs: dict[ir.Value, None] = {}
    pending, routed = [end], False
    while pending:
        value = pending.pop()
        node = value.producer()
        if node is None or graphs.constant(value) is not None or node in nodes:
            continue
        if node.op_type == "Shape":  # which values have it, layers share
            continue
        if norm(value) is not None:
            inputs[value] = None
            continue
        if len(nodes) >= _MAX_ROUTED or _is_stream(node):
            return "mixture of experts whose input is not one norm" if routed else None
        nodes[node] = None
        routed = routed or _chooses(node)
        pending.extend(v for v in node.inputs if v is not None)
    if not routed:
        return None
    if len(inputs) != 1:
        return "mixture of experts whose input is not one norm"
    return Experts(next(iter(inputs)), end, frozenset(nodes))


def _chooses(node: ir.Node) -> bool:
    """A TopK that is asked which, not only how much."""
    return node.op_type == "TopK" and node.domain == "" and bool(node.outputs[1].uses())


def _is_stream(node: ir.Node) -> bool:
    """A residual add: its result is normalized."""
    return node.op_type == "Add" and any(
        users(node.outputs[0], "LayerNormalization", "RMSNormalization")
    )


def products_under(value: ir.Value) -> tuple[ir.Node, ...]:
    """The products that scores, or what is added to them, are made of."""
    products: dict[ir.Node, None] = {}
    seen: set[ir.Node] = set()
    pending = [value]
    while pending and len(seen) < _MAX_SCORES:
        current = pending.pop()
        node = current.producer()
        if node is None or node in seen or node.domain != "":
            continue
        seen.add(node)
        if node.op_type == "MatMul":
            products[node] = None
        elif node.op_type in (*_LAYOUT, *_ROUNDING) and node.op_type != "Concat":
            pending.append(operand(node))  # what else they read are shapes and positions
        elif node.op_type in _ELEMENTWISE or node.op_type == "Concat":
            pending.extend(v for v in node.inputs if v is not None)
    return tuple(products)


def unrecognised(softmax: ir.Node) -> str:
    """Why the attention around a Softmax was left spelled out."""
    if node_of(operand(softmax), "DequantizeLinear") is not None:
        return "the scores of the attention are quantized"
    count = len(products_under(operand(softmax)))
    return disentangled(count) if count > 1 else "the attention was not recognised"


def disentangled(count: int) -> str:
    """The reason where scores come from more than queries and keys."""
    return f"disentangled attention: its scores are the sum of {count} products"


def windowed(node: ir.Node) -> bool:
    """Whether the queries of an Attention (or product) come from windows cut out of a norm."""
    value, cut, projected = operand(node), 0, False
    for _ in range(_MAX_WINDOW):
        layer = parts.linear(value)
        if layer is not None and not projected:
            value, projected, cut = layer.input, True, 0
            continue
        if projected and norm(value) is not None:
            return cut > 1
        step = value.producer()
        if step is None or step.op_type not in (*_LAYOUT, "Mul", "Div"):
            return False
        cut += step.op_type in ("Reshape", "Transpose")
        value = operand(step)
    return False
