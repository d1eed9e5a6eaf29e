"""Key and value heads repeated before the rotary embedding are repeated by the Attention instead.

Rewrite:      Attention(q, rotary(repeat(k)), repeat(v)) -> Attention(q, rotary(k), v) with the
              number of key heads before the repetition; repeat(x) is
              Reshape(Expand(Reshape(x, [.., Hkv, 1, c]), [.., Hkv, n, c]), [.., Hkv*n*c]);
              where keys and values were joined from [B, H, T, c] that is repeated or concatenated
              with a cache, the Attention gets its 4-D form back, which ``attention`` then raises
Applies when: keys and values are repeated alike, and there is no cache: a cache holds them repeated
Exactness:    bitwise: the rotary embedding turns every head alike
Source:       Ainslie et al., GQA (2023), figure 2
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.nodes import node_of, operand, optional
from optimizer.raising import dims
from optimizer.raising import heads as layout
from optimizer.raising.base import Miss, RuleReport, site, sweep
from optimizer.raising.shapes import Shapes
from optimizer.special_parts import is_complete_cache


@dataclass(frozen=True)
class Repeated:
    """Heads [B, S, Hkv*c] of which each is used ``count`` times in a row.

    Attributes:
        value: Before the repetition.
        heads: Hkv.
    """

    value: ir.Value
    heads: int
    count: int


def run(model: ir.Model) -> RuleReport:
    """Apply the rule to every Attention in 3-D form."""
    shapes = Shapes()
    narrowed = sweep(model, {"Attention": lambda node: _narrow(shapes, node)})
    opened = sweep(model, {"Attention": lambda node: _open(shapes, node)})
    return RuleReport.total([narrowed, opened])


def repeated(shapes: Shapes, value: ir.Value) -> Repeated | None:
    """See through a repetition of heads that ends in the 3-D form."""
    joined = node_of(value, "Reshape")
    expand = None if joined is None else node_of(joined.inputs[0], "Expand")
    split = None if expand is None else node_of(expand.inputs[0], "Reshape", "Unsqueeze")
    if expand is None or split is None:
        return None
    source, before = operand(split), shapes.of(expand.inputs[0])
    wide, lead = shapes.of(expand.outputs[0]), shapes.of(source)
    if before is None or wide is None or lead is None or (len(before), len(lead)) != (5, 3):
        return None
    heads, size, count = before[2], before[4], wide[3]
    if not (isinstance(heads, int) and isinstance(size, int) and isinstance(count, int)):
        return None
    if before != (*lead[:2], heads, 1, size) or lead[2] != heads * size:
        return None
    if wide != (*lead[:2], heads, count, size):
        return None
    if shapes.of(value) != (*lead[:2], heads * count * size):
        return None
    return Repeated(source, heads, count)


def _narrow(shapes: Shapes, node: ir.Node) -> bool | Miss:
    heads = node.attributes.get_int("kv_num_heads", 0)
    rotary = node_of(node.inputs[1], "RotaryEmbedding")
    keys = repeated(shapes, operand(node, 1) if rotary is None else operand(rotary))
    values = repeated(shapes, operand(node, 2))
    if keys is None or values is None or not heads:
        return False
    if (keys.heads, keys.count) != (values.heads, values.count) or keys.heads * keys.count != heads:
        return Miss(site(node), "keys and values are repeated differently")
    if optional(node, 4) is not None:
        return Miss(
            site(node), "keys and values are repeated before the cache, which holds them so"
        )
    graph, key = node.graph, keys.value
    if not isinstance(graph, ir.Graph):
        return False
    if rotary is not None:
        attributes = {**rotary.attributes, "num_heads": ir.AttrInt64("num_heads", keys.heads)}
        key = graphs.insert(
            graph, rotary, "RotaryEmbedding", [key, *rotary.inputs[1:]], attributes,
            name=f"{rotary.outputs[0].name}_once", dtype=key.dtype,
        )  # fmt: skip
    node.replace_input_with(1, key)
    node.replace_input_with(2, values.value)
    node.attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", keys.heads)
    return True


def _open(shapes: Shapes, node: ir.Node) -> bool:
    """Keys and values by heads, as they were before they were joined."""
    heads = node.attributes.get_int("q_num_heads", 0)
    query, graph = operand(node), node.graph
    width = (shapes.of(query) or (None,))[-1]
    if not heads or optional(node, 4) is not None or not isinstance(graph, ir.Graph):
        return False
    kv_heads = node.attributes.get_int("kv_num_heads", 0)
    sides = [_by_heads(shapes, value, kv_heads) for value in node.inputs[1:3]]
    if None in sides or not isinstance(width, int) or width % heads or len(node.outputs) > 1:
        return False
    attributes = dict(node.attributes)
    for name in ("q_num_heads", "kv_num_heads"):
        attributes.pop(name)
    by_heads = layout.split(graph, node, query, heads, width // heads)
    inputs = [by_heads, *sides, *node.inputs[3:4]]
    y = graphs.insert(graph, node, "Attention", inputs, attributes, dtype=query.dtype)
    graphs.carry_notes(node, y)
    rows = layout.swap(graph, node, y)
    target = graphs.add_initializer(graph, "joined_heads", np.array([0, 0, width], np.int64))
    joined = graphs.insert(graph, node, "Reshape", [rows, target], dtype=query.dtype)
    graphs.replace_value(node.outputs[0], joined, keep_name=True)
    return True


def _by_heads(shapes: Shapes, value: ir.Value | None, heads: int) -> ir.Value | None:
    """The [B, H, T, c] of a cache, or repeated, that ``value`` [B, T, H*c] was joined from."""
    joined = node_of(value, "Reshape")
    source = None if joined is None else layout.swapped(joined.inputs[0])
    shape = shapes.of(source)
    if shape is None or len(shape) != 4 or shape[1] != heads:
        return None
    if shapes.of(value) != (shape[0], shape[2], dims.multiply(heads, shape[3])):
        return None  # tokens and heads are regrouped
    if is_complete_cache(source):
        return source
    made = node_of(source, "Concat", "Reshape")
    if made is None or (made.op_type == "Reshape" and node_of(made.inputs[0], "Expand") is None):
        return None
    return source
