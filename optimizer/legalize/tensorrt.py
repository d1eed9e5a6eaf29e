"""Spellings that TensorRT's parsers take: attention has one output, no cache inside, no softcap.

The parser refuses Attention with past or present ("only supports Attention nodes with one
output"), so the cache is put together in front of it; with a softcap, or causal and with a mask,
it is spelled out. TensorRT for RTX 1.7 runs Attention in 16-bit types and for some sizes of heads
only, and ends the process (SIGSEGV) where two of its queries and keys are one value in other
shapes: these are spelled out too. ``canonicalize`` raises all of it back.
"""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.half_weights import HALF_TYPES
from optimizer.legalize import decompose
from optimizer.nodes import operand, optional
from optimizer.raising.base import allow

#: What stands between a query or key and the value that the library scales in its place.
_SAME_NUMBERS = frozenset(("Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"))


def simplify_attention(model: ir.Model, kernels: tuple[int, int] | None = None) -> int:
    """Rewrite every Attention that the parser or the builder does not take.

    Attention over Q [B, H, S, c], K and V [B, Hkv, P+S, c], where K and V are past and new tokens,
    concatenated; those are its present too. A causal one with a cache is spelled out, because
    without a past inside the operator counts positions from the start of the cache.

    Args:
        model: Canonical.
        kernels: ``Target.attention_kernels``.

    Returns:
        How many were rewritten.

    Raises:
        UnsupportedError: An Attention in a form that is not lowered.
    """
    found = [n for n in model.graph if n.domain == "" and n.op_type == "Attention"]
    scaled = Counter(_origin(operand(node, index)) for node in found for index in (0, 1))
    count = 0
    shared: dict[ir.Value, ir.Value] = {}
    for node in found:
        spelled = not _stays_attention(node) or (
            kernels is not None
            and decompose.has_known_heads(node)
            and (not _has_kernel(node, kernels) or _is_scaled_twice(node, scaled))
        )
        if not (spelled or _has_cache(node)) or not allow(node, "attention"):
            continue
        pen = decompose.Pen(model.graph, node, shared)
        if spelled:
            decompose.attention(pen)
        else:
            _split(pen)
        count += 1
    if count:
        graphs.remove_dead(model)
    return count


def _has_cache(node: ir.Node) -> bool:
    used = [v for v in node.outputs[1:] if v.name and (v.uses() or v.is_graph_output())]
    return bool(used) or optional(node, 4) is not None


def _stays_attention(node: ir.Node) -> bool:
    """Whether it is one once its cache is in front of it."""
    causal = bool(node.attributes.get_int("is_causal", 0))
    returns_scores = len(node.outputs) > 3 and bool(node.outputs[3].name)
    if causal and (_has_cache(node) or optional(node, 3) is not None):
        return False
    if optional(node, 6) is not None and _has_cache(node):
        return False
    return not node.attributes.get_float("softcap", 0.0) and not returns_scores


def _has_kernel(node: ir.Node, kernels: tuple[int, int]) -> bool:
    """Keys and values must have one size too, or the parser refuses them."""
    if operand(node).dtype not in HALF_TYPES:
        return False
    heads, kv_heads, _ = decompose.head_counts(node)
    sizes = [
        decompose.head_size(node, index, count)
        for index, count in ((0, heads), (1, kv_heads), (2, kv_heads))
    ]
    return len(set(sizes)) == 1 and kernels[0] <= sizes[0] <= kernels[1]


def _origin(value: ir.Value) -> ir.Value:
    """The value that a query or key is in another shape or type."""
    producer = value.producer()
    while producer is not None and producer.op_type in _SAME_NUMBERS:
        value = operand(producer)
        producer = value.producer()
    return value


def _is_scaled_twice(node: ir.Node, scaled: Counter[ir.Value]) -> bool:
    return any(scaled[_origin(operand(node, index))] > 1 for index in (0, 1))


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
