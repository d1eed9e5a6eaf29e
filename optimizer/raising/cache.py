"""What an exporter puts between the keys (or values) of a layer and its attention."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.nodes import node_of, operand, optional, users
from optimizer.raising import dims
from optimizer.raising.shapes import Shapes


@dataclass(frozen=True)
class Repeated:
    """Keys or values [B, Hkv, T, c] of which every head serves several query heads.

    Attributes:
        value: Before the repetition.
        heads: Hkv; 0 where it is not known.
        count: How often each head is repeated.
    """

    value: ir.Value
    heads: int
    count: int


def without_repeats(shapes: Shapes, value: ir.Value) -> Repeated:
    """See through ``Reshape(Expand(Unsqueeze(x, 2), [B, Hkv, n, T, c]), [B, Hkv*n, T, c])``."""
    shape = shapes.of(value)
    heads = shape[1] if shape is not None and len(shape) == 4 else None
    plain = Repeated(value, heads if isinstance(heads, int) else 0, 1)
    reshape = node_of(value, "Reshape")
    expand = None if reshape is None else node_of(reshape.inputs[0], "Expand")
    if expand is None or shape is None:
        return plain
    wide, narrow = shapes.of(expand.outputs[0]), shapes.of(expand.inputs[0])
    if wide is None or narrow is None or len(wide) != 5 or len(narrow) != 5:
        return plain
    count, inner = wide[2], wide[1]
    if not isinstance(count, int) or not isinstance(inner, int) or narrow[2] != 1:
        return plain
    if narrow != (*wide[:2], 1, *wide[3:]):
        return plain
    below = node_of(expand.inputs[0], "Unsqueeze", "Reshape")
    if below is None:
        return plain
    source = operand(below)
    expected = (*narrow[:2], *narrow[3:])
    joined = (wide[0], dims.multiply(inner, count), *wide[3:])
    if shapes.of(source) != expected or shape != joined:
        return plain
    return Repeated(source, inner, count)


@dataclass(frozen=True)
class Cache:
    """Keys and values as ``Concat(past, new)`` along the sequence.

    Attributes:
        all_keys, all_values: The results of the two Concats, [B, Hkv, P+S, c].
        read_for_sizes: Whether the mask or the queries depend on the sizes of these.
    """

    past_key: ir.Value
    past_value: ir.Value
    new_key: ir.Value
    new_value: ir.Value
    all_keys: ir.Value
    all_values: ir.Value
    read_for_sizes: bool = False

    def detach(self) -> None:
        """Compute the sizes of the results without them, so that one node may write both."""
        if self.read_for_sizes:
            for value in (self.all_keys, self.all_values):
                _detach_sizes(value)


def find_cache(
    shapes: Shapes, node: ir.Node, keys: ir.Value, values: ir.Value
) -> Cache | str | None:
    """The cache of an Attention; None without one, a reason if it cannot become the operator's."""
    key_pair, value_pair = _concatenated(shapes, keys), _concatenated(shapes, values)
    if key_pair is None and value_pair is None:
        return None
    if key_pair is None or value_pair is None:
        return "only the keys or only the values are concatenated with a cache"
    if node.attributes.get_int("is_causal", 0):
        return "is_causal counts from the first key, with a cache it would count from the last"
    for past, new in (key_pair, value_pair):
        old, added = shapes.of(past), shapes.of(new)
        if old is None or added is None or (old[:2], old[3]) != (added[:2], added[3]):
            return "the cache has another batch, number of heads or head size than the layer"
    (past_key, new_key), (past_value, new_value) = key_pair, value_pair
    producers = {value.producer() for value in (keys, values)}
    sources = [operand(node), new_key, new_value, past_key, past_value, optional(node, 3)]
    if _reach(sources, producers, but_for_sizes_of=(keys, values)):
        return "the mask or the queries depend on the concatenated cache"
    sizes = _reach(sources, producers)
    return Cache(past_key, past_value, new_key, new_value, keys, values, sizes)


def _concatenated(shapes: Shapes, value: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    concat = node_of(value, "Concat")
    shape = shapes.of(value)
    if concat is None or len(concat.inputs) != 2 or shape is None or len(shape) != 4:
        return None
    if concat.attributes["axis"].as_int() not in (2, -2):
        return None
    return operand(concat, 0), operand(concat, 1)


def _detach_sizes(value: ir.Value) -> None:
    """Compute the shape of ``Concat(past, new)`` along axis 2 from the shapes of its two parts."""
    concat = node_of(value, "Concat")
    graph = None if concat is None else concat.graph
    readers = list(users(value, "Shape"))
    if concat is None or not isinstance(graph, ir.Graph) or not readers:
        return
    integers = ir.DataType.INT64

    def sizes(source: ir.Value, start: int, end: int) -> ir.Value:
        attributes = {"start": start, "end": end}
        return graphs.insert(graph, concat, "Shape", [source], attributes, dtype=integers)

    past, new = operand(concat, 0), operand(concat, 1)
    parts = [sizes(past, 2, 3), sizes(new, 2, 3)]
    total = graphs.insert(graph, concat, "Add", parts, dtype=integers)
    whole = graphs.insert(
        graph, concat, "Concat", [sizes(past, 0, 2), total, sizes(past, 3, 4)], {"axis": 0},
        name=f"{value.name}_sizes", dtype=integers,
    )  # fmt: skip
    for reader in readers:
        start, end, _ = slice(
            reader.attributes.get_int("start", 0), reader.attributes.get_int("end", None)
        ).indices(4)
        if (start, end) == (0, 4):
            graphs.replace_value(reader.outputs[0], whole)
            continue
        bounds = [
            graphs.add_initializer(graph, "bound", np.array([number], np.int64))
            for number in (start, end)
        ]
        part = graphs.insert(graph, concat, "Slice", [whole, *bounds], dtype=integers)
        graphs.replace_value(reader.outputs[0], part)


def _reach(
    sources: list[ir.Value | None],
    targets: set[ir.Node | None],
    but_for_sizes_of: tuple[ir.Value, ...] = (),
) -> bool:
    """Whether a source depends on the result of one of the target nodes."""
    seen: set[ir.Node] = set()
    pending = [value for value in sources if value is not None]
    while pending:
        node = pending.pop().producer()
        if node is None or node in seen:
            continue
        if node in targets:
            return True
        seen.add(node)
        if node.op_type == "Shape" and node.domain == "" and node.inputs[0] in but_for_sizes_of:
            continue
        pending.extend(value for value in node.inputs if value is not None)
    return False
