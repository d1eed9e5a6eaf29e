"""Raises attention to one Attention operator in 3-D form, with its KV cache.

Rewrite: ``softmax(scale * q @ k^T + mask) @ v`` on [B, H, S, c] -> Attention(q, k, v, mask);
         Attention on [B, H, S, c] behind Reshape and Transpose -> on [B, S, H*c];
         repeated KV heads (Unsqueeze, Expand, Reshape) -> ``kv_num_heads``;
         ``Concat(past, new)`` of keys and values -> past and present of the operator.
Applies when: head counts and sizes are fixed and batch and sequence provably stay what they are
         through every Reshape; the probabilities are not used elsewhere; the mask does not depend
         on the concatenated cache; a cache is never combined with ``is_causal``, which would count
         from the first key instead of the last.
Exactness: reassociated; rows without any allowed key may differ (see ``masks``), they belong to
         padding that no valid token reads.
Source:  Vaswani et al., Attention Is All You Need (2017), equation 1; Ainslie et al., GQA (2023);
         ONNX Attention-23.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.nodes import operand, optional, users
from optimizer.raising import heads as layout
from optimizer.raising import rotary
from optimizer.raising import scores as spelled
from optimizer.raising.base import Miss, RuleReport, attempt, site
from optimizer.raising.cache import Cache, find_cache, without_repeats
from optimizer.raising.dims import Shape
from optimizer.raising.heads import Heads
from optimizer.raising.masks import Masks
from optimizer.raising.shapes import Shapes
from optimizer.special_parts import WINDOWED, is_complete_cache, windowed


def run(model: ir.Model) -> RuleReport:
    """Raise every attention of the main graph, rotary embeddings on the way included."""
    joined = rotary.join_heads(model)
    state = _State(model.graph)
    for node in list(model.graph):
        if node.domain == "" and node.op_type == "Softmax":
            state.note(node, attempt(node, _raise_decomposed, state, node))
    if state.applied:
        graphs.remove_dead(model)
    for node in list(model.graph):
        if node.graph is not None and node.domain == "" and node.op_type == "Attention":
            state.note(node, attempt(node, _to_canonical, state, node))
    if state.applied:
        graphs.remove_dead(model)
        model.graph.sort()
    return RuleReport.total([joined, RuleReport(state.applied, tuple(state.skipped))])


#: Attention-23: the fourth output is the result of the Softmax.
_PROBABILITIES = 3


@dataclass
class _State:
    graph: ir.Graph
    applied: int = 0
    skipped: list[Miss] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.shapes = Shapes()
        self.masks = Masks(self.graph, self.shapes)

    def note(self, node: ir.Node, outcome: int | str) -> None:
        if isinstance(outcome, str):
            self.skipped.append(Miss(site(node), outcome))
        else:
            self.applied += outcome


def _raise_decomposed(state: _State, softmax: ir.Node) -> int | str:
    """MatMul, Softmax, MatMul -> Attention on [B, H, S, c]."""
    found = spelled.read(state.shapes, softmax)
    if found is None:
        return 0
    if isinstance(found, str):
        return found
    if found.scale <= 0:
        return f"the scores are scaled by {found.scale:g}, the operator takes positive factors only"
    own = found.query.value.dtype
    weighted = spelled.weighted_values(found.result, None if found.precision is None else own)
    if isinstance(weighted, str):
        return weighted
    problem = state.masks.refusal(found.parts, state.shapes.of(found.product)) or _spread(
        state, (found.query, found.keys, spelled.Side(weighted.values))
    )
    if problem is not None:
        scores = found.product.producer()
        return WINDOWED if scores is not None and windowed(scores) else problem
    mask = state.masks.combine(found.parts, softmax)
    anchor, output = weighted.product, weighted.product.outputs[0]
    query, keys = (_in_order(state.graph, anchor, side) for side in (found.query, found.keys))
    made = graphs.insert(
        state.graph,
        anchor,
        "Attention",
        [query, keys, weighted.values, *([] if mask is None else [mask])],
        {"scale": found.scale, "softcap": found.softcap, "is_causal": 0}
        | ({} if found.precision is None else {"softmax_precision": found.precision.value})
        | ({"qk_matmul_output_mode": _PROBABILITIES} if weighted.read_elsewhere else {}),
        dtype=(output.dtype,) * (4 if weighted.read_elsewhere else 1),
        outputs=4 if weighted.read_elsewhere else 1,
    )
    results = made if isinstance(made, tuple) else (made,)
    graphs.carry_notes(softmax, results[0])
    graphs.replace_value(output, results[0], keep_name=True)
    if weighted.read_elsewhere:
        state.graph.remove(anchor, safe=True)
        graphs.replace_value(weighted.probabilities, results[3], keep_name=True)
    return 1


def _spread(state: _State, sides: Sequence[spelled.Side]) -> str | None:
    """Why queries, keys and values do not go together without the broadcasting of MatMul."""
    shapes = [state.shapes.of(side.value) for side in sides]
    known = [shape for shape in shapes if shape is not None and len(shape) == 4]
    if len(known) < len(shapes):
        return "the rank of the keys or values is not known to be 4"
    ordered = [[s[axis] for axis in side.order] for s, side in zip(known, sides, strict=True)]
    batches = [shape[0] for shape in ordered]
    if 1 in batches and len(set(batches)) > 1:
        return "queries, keys and values have different batches"
    query, keys, values = (shape[1] for shape in ordered)
    if keys != values or keys not in (1, query):
        return f"{query} query, {keys} key and {values} value heads"
    return None


def _in_order(graph: ir.Graph, anchor: ir.Node, side: spelled.Side) -> ir.Value:
    if side.order == (0, 1, 2, 3):
        return side.value
    return graphs.insert(
        graph, anchor, "Transpose", [side.value], {"perm": side.order}, dtype=side.value.dtype
    )


@dataclass(frozen=True)
class _Site:
    """A 4-D Attention with everything its 3-D form needs."""

    node: ir.Node
    query: Heads
    keys: Heads
    values: Heads
    cache: Cache | None


def _to_canonical(state: _State, node: ir.Node) -> int | str:
    shape = state.shapes.of(operand(node))
    if shape is None:
        return "the rank of the queries is not known"
    if len(shape) == 3:
        return _unscale_flat(node)
    if len(shape) != 4:
        return 0
    if all(is_complete_cache(value) for value in node.inputs[1:3]):
        return int(_unscale(state, node) + _fit_mask(state, node, shape) > 0)  # one rewrite
    found = _site(state, node)
    if isinstance(found, str):
        return _fit_mask(state, node, shape) or found
    _rewrite(state, found)
    return 1


def _unscale_flat(node: ir.Node) -> int:
    """Move factors of queries and keys into an Attention in 3-D form that says its scale."""
    scale = node.attributes.get_float("scale", 0.0)
    cached = optional(node, 4) is not None
    query, keys, factor = _unscaled(operand(node), operand(node, 1), cached=cached)
    if not scale or (query is node.inputs[0] and keys is node.inputs[1]):
        return 0
    node.replace_input_with(0, query)
    node.replace_input_with(1, keys)
    node.attributes["scale"] = ir.AttrFloat32("scale", scale * factor)
    return 1


def _unscaled(query: ir.Value, keys: ir.Value, *, cached: bool) -> tuple[ir.Value, ir.Value, float]:
    """Queries and keys without constant factors, and their product where it is positive."""
    plain_query, factor = spelled.unscaled(query)
    plain_keys, key_factor = (keys, 1.0) if cached else spelled.unscaled(keys)
    factor *= key_factor  # a cache holds scaled keys
    return (plain_query, plain_keys, factor) if factor > 0 else (query, keys, 1.0)


def _unscale(state: _State, node: ir.Node) -> int:
    """Move a factor of the queries into the Attention, which stays 4-D like its cache."""
    query = layout.find(state.shapes, operand(node))
    if isinstance(query, str) or not query.joined:
        return 0
    source, factor = spelled.unscaled(query.source)
    if source is query.source or factor <= 0:
        return 0
    split = layout.split(state.graph, node, source, query.count, query.size)
    scale = node.attributes.get_float("scale", float(query.size) ** -0.5)
    node.replace_input_with(0, split)
    node.attributes["scale"] = ir.AttrFloat32("scale", scale * factor)
    return 1


def _fit_mask(state: _State, node: ir.Node, shape: Shape) -> int:
    """Give the mask of an Attention that stays 4-D the axis of its queries."""
    mask = optional(node, 3)
    fitted = None if mask is None else state.masks.fitted(mask, operand(node), shape[2], node, 2)
    if fitted is None or fitted is mask:
        return 0
    node.replace_input_with(3, fitted)
    return 1


def _site(state: _State, node: ir.Node) -> _Site | str:
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:3]):
        return "a 4-D Attention whose present keys or values are used"
    if optional(node, 4) is not None or optional(node, 6) is not None:
        return "a 4-D Attention with its own cache"
    query = layout.find(state.shapes, operand(node))
    if isinstance(query, str):
        return f"the queries: {query}"
    keys = without_repeats(state.shapes, operand(node, 1))
    values = without_repeats(state.shapes, operand(node, 2))
    if keys.count != values.count:
        return f"keys are repeated {keys.count} times, values {values.count} times"
    if keys.count > 1 and keys.heads * keys.count != query.count:
        return f"{keys.heads} key heads repeated {keys.count} times for {query.count} query heads"
    cache = find_cache(state.shapes, node, keys.value, values.value)
    if isinstance(cache, str):
        return cache
    if cache is None:
        return _with_sides(state, node, query, (keys.value, values.value), None)
    return _with_sides(state, node, query, (cache.new_key, cache.new_value), cache)


def _with_sides(
    state: _State,
    node: ir.Node,
    query: Heads,
    new: tuple[ir.Value, ir.Value],
    cache: Cache | None,
) -> _Site | str:
    """The site with the keys and values of this step, or why they have no 3-D form."""
    key, value = (layout.find(state.shapes, side) for side in new)
    if isinstance(key, str):
        return f"the keys: {key}"
    if isinstance(value, str):
        return f"the values: {value}"
    if key.count != value.count or query.count % key.count:
        return f"{query.count} query, {key.count} key and {value.count} value heads"
    return _Site(node, query, key, value, cache)


def _rewrite(state: _State, found: _Site) -> None:
    node, graph = found.node, state.graph
    sides = (found.query, found.keys, found.values)
    query, keys, values = (layout.join(graph, node, side) for side in sides)
    query, keys, factor = _unscaled(query, keys, cached=found.cache is not None)
    mask = optional(node, 3)
    if mask is not None:
        rows = (state.shapes.of(operand(node)) or ())[2]
        mask = state.masks.fitted(mask, query, rows, node)
    inputs: list[ir.Value | None] = [query, keys, values, mask]
    if found.cache is not None:
        inputs += [found.cache.past_key, found.cache.past_value]
    elif mask is None:
        inputs.pop()
    attributes = dict(node.attributes)
    scores = node.outputs[3] if len(node.outputs) > 3 else None
    if scores is None or not (scores.uses() or scores.is_graph_output()):
        attributes.pop("qk_matmul_output_mode", None)
        scores = None
    attributes |= {
        "q_num_heads": ir.AttrInt64("q_num_heads", found.query.count),
        "kv_num_heads": ir.AttrInt64("kv_num_heads", found.keys.count),
    }
    scale = node.attributes.get_float("scale", float(found.query.size) ** -0.5)
    attributes["scale"] = ir.AttrFloat32("scale", scale * factor)
    attributes.setdefault("softcap", ir.AttrFloat32("softcap", 0.0))
    attributes.setdefault("is_causal", ir.AttrInt64("is_causal", 0))
    old = node.outputs[0]
    count = 4 if scores is not None else 1 if found.cache is None else 3
    made = graphs.insert(
        graph, node, "Attention", inputs, attributes, name=f"{old.name}_joined", outputs=count
    )
    outputs = made if isinstance(made, tuple) else (made,)
    graphs.carry_notes(node, outputs[0])
    for output in outputs:
        output.type = old.type
    _split_result(state, node, old, outputs[0], found)
    if scores is not None:
        graphs.replace_value(scores, outputs[3], keep_name=True)
    if found.cache is not None:
        found.cache.detach()
        graphs.replace_value(found.cache.all_keys, outputs[1])
        graphs.replace_value(found.cache.all_values, outputs[2])


def _split_result(state: _State, node: ir.Node, old: ir.Value, new: ir.Value, found: _Site) -> None:
    """Let the users of [B, H, S, c] read [B, S, H*c]; a Transpose back is not even built."""
    count, size = found.query.count, found.values.size
    split = layout.split(state.graph, node, new, count, size)
    rows = layout.swapped(split)
    for user in list(users(old, "Transpose")):
        if rows is not None and layout.swapped(user.outputs[0]) is old:
            graphs.replace_value(user.outputs[0], rows, keep_name=True)
    if old.uses() or old.is_graph_output():
        if count == 1:  # nothing to transpose, which a Reshape that follows can tell
            axis = graphs.add_initializer(state.graph, "heads_axis", np.array([1], np.int64))
            split = graphs.insert(state.graph, node, "Unsqueeze", [new, axis], dtype=new.dtype)
        graphs.replace_value(old, split, keep_name=True)
