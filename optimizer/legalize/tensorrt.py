"""Spellings that TensorRT's parsers take: attention has one output, no cache inside, no softcap.

The parser refuses Attention with past or present ("only supports Attention nodes with one output"),
so the cache is put together in front of it. With a softcap, or a mask besides a causal one, it is
spelled out. ``canonicalize`` raises all of it back.
"""

from __future__ import annotations

import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.legalize import decompose
from optimizer.nodes import operand, optional
from optimizer.raising.base import allow


def simplify_attention(model: ir.Model) -> int:
    """Rewrite every Attention with a cache inside, a softcap or two masks; returns how many.

    Attention over Q [B, H, S, c], K and V [B, Hkv, P+S, c], where K and V are past and new tokens,
    concatenated; those are its present too. A causal one is spelled out, because without a past
    inside the operator counts positions from the start of the cache.
    """
    count = 0
    shared: dict[ir.Value, ir.Value] = {}
    for node in list(model.graph):
        if node.domain != "" or node.op_type != "Attention":
            continue
        used = [output for output in node.outputs[1:] if output.name and _is_used(output)]
        plain = not used and optional(node, 4) is None
        if plain and not _softcap(node) and not _masked_twice(node):
            continue
        if not allow(node, "attention"):
            continue
        pen = decompose.Pen(model.graph, node, shared)
        if _stays_attention(node):
            _split(pen)
        else:
            decompose.attention(pen)
        count += 1
    if count:
        graphs.remove_dead(model)
    return count


def _is_used(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _softcap(node: ir.Node) -> bool:
    return bool(node.attributes.get_float("softcap", 0.0))


def _masked_twice(node: ir.Node) -> bool:
    return bool(node.attributes.get_int("is_causal", 0)) and optional(node, 3) is not None


def _stays_attention(node: ir.Node) -> bool:
    causal = bool(node.attributes.get_int("is_causal", 0))
    returns_scores = len(node.outputs) > 3 and bool(node.outputs[3].name)
    return not causal and not _softcap(node) and not returns_scores and len(node.inputs) <= 6


def _split(pen: decompose.Pen) -> None:
    node = pen.node
    heads, kv_heads, flat = decompose.head_counts(node)
    query, key, value = (operand(node, index) for index in range(3))
    if flat:
        query = decompose.by_heads(pen, query, heads)
        key, value = (decompose.by_heads(pen, item, kv_heads) for item in (key, value))
    if optional(node, 4) is not None:
        key = pen.put("Concat", (operand(node, 4), key), {"axis": 2})
        value = pen.put("Concat", (operand(node, 5), value), {"axis": 2})
    kept = ("scale", "softmax_precision")
    attributes = {name: node.attributes[name].value for name in kept if name in node.attributes}
    y = pen.put("Attention", (query, key, value, optional(node, 3)), attributes)
    if flat:
        y = pen.put("Transpose", (y,), {"perm": [0, 2, 1, 3]})
        size = decompose.head_size(node, 2, kv_heads)
        y = pen.put("Reshape", (y, pen.integers(0, 0, heads * size)))
    pen.done(y, key, value)
