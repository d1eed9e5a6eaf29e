"""The KV cache of a group: one ``[B, sum of heads, T, c]`` pair under its first member's names.

All other inputs and outputs keep their names, order and dimensions; the pairs of the other members
disappear. What read the length of a cache reads the group's: all members have seen the same tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from optimizer.fusion.writer import Writer
from optimizer.graph import insert, replace_value
from optimizer.structure import Block

#: Model metadata: JSON, one entry per grouped cache input, ``{name: {layers, heads, past,
#: present}}``. ``heads[i]`` is the range [lo, hi) on axis 1 that belongs to ``layers[i]``; ``past``
#: and ``present`` name what the members had before.
KV_GROUPS_KEY = "optimize.kv_groups"


def attention_outputs(
    w: Writer,
    members: Sequence[Block],
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any],
) -> tuple[ir.Value, ...]:
    """The Attention node of a group, with present outputs where its members have them."""
    first = members[0].attention
    cached = first.present_key is not None or first.present_value is not None
    outputs = insert(
        w.graph,
        w.anchor,
        "Attention",
        inputs,
        attributes,
        name=f"{w.prefix}/attention",
        outputs=3 if cached else 1,
        dtype=(first.node.outputs[0].dtype,) * (3 if cached else 1),
    )
    return outputs if isinstance(outputs, tuple) else (outputs,)


def group_outputs(
    model: ir.Model, members: Sequence[Block], node: ir.Node, layers: Sequence[int]
) -> None:
    """Let the group's present values be the outputs, and describe the caches in the metadata.

    Call before the members' nodes are removed, ``group_inputs`` after.
    """
    groups = json.loads(model.metadata_props.get(KV_GROUPS_KEY, "{}"))
    for past, present, output in _pairs(members, node):
        _rewire_lengths(model.graph, members, past, past[0])
        _rewire_lengths(model.graph, members, present, None)
        entry = _Entry([], [], [], [])
        for block, layer, old, new in zip(members, layers, past, present, strict=True):
            entry.add(block, layer, old, new, groups)
        _move_outputs(model.graph, members, present, output)
        if entry.past or entry.present:
            groups[(entry.past or entry.present)[0]] = entry.__dict__
    if groups:
        model.metadata_props[KV_GROUPS_KEY] = json.dumps(groups, sort_keys=True)


def group_inputs(graph: ir.Graph, members: Sequence[Block]) -> None:
    """Widen the first member's cache inputs and remove those of the others."""
    for past, _, _ in _pairs(members, None):
        if past[0] is None:
            continue
        _widen(past[0], members)
        for value in past[1:]:
            if value is not None:
                graph.inputs.remove(value)


_Optional = ir.Value | None


@dataclass
class _Entry:
    """One grouped cache, as the metadata describes it."""

    layers: list[int]
    heads: list[list[int]]
    past: list[str]
    present: list[str]

    def add(
        self, block: Block, layer: int, past: _Optional, present: _Optional, groups: dict[str, Any]
    ) -> None:
        """Append a member; a member that is a group itself brings its own members."""
        present = present if present is not None and present.is_graph_output() else None
        names = [value.name or "" for value in (past, present) if value is not None]
        if not names:
            return
        start = self.heads[-1][1] if self.heads else 0
        inner = groups.pop(names[0], None) or {
            "layers": [layer],
            "heads": [[0, block.attention.kv_heads]],
            "past": [] if past is None else [past.name],
            "present": [] if present is None else [present.name],
        }
        self.layers += inner["layers"]
        self.heads += [[start + lo, start + hi] for lo, hi in inner["heads"]]
        self.past += inner["past"]
        self.present += inner["present"]


def _pairs(
    members: Sequence[Block], node: ir.Node | None
) -> list[tuple[list[_Optional], list[_Optional], _Optional]]:
    """(pasts, presents, the group's present) for the keys and for the values."""
    views = [block.attention for block in members]
    outputs = (None, None, None) if node is None else (*node.outputs, None, None)
    return [
        ([v.past_key for v in views], [v.present_key for v in views], outputs[1]),
        ([v.past_value for v in views], [v.present_value for v in views], outputs[2]),
    ]


def _rewire_lengths(
    graph: ir.Graph,
    members: Sequence[Block],
    values: Sequence[_Optional],
    target: _Optional,
) -> None:
    """Let every ``Shape`` of the members' caches read ``target``, with the head count it saw."""
    for block, value in zip(members, values, strict=True):
        if value is None:
            continue
        for use in list(value.uses()):
            if use.node.op_type != "Shape":
                continue
            _keep_head_count(graph, use.node, block.attention.kv_heads)
        for use in list(value.uses()):
            if use.node.op_type == "Shape" and target is not None:
                use.node.replace_input_with(0, target)


def _keep_head_count(graph: ir.Graph, shape: ir.Node, heads: int) -> None:
    """Put ``heads`` where ``Shape`` would read the head axis of a cache [B, heads, T, c]."""
    start = shape.attributes.get_int("start", 0)
    end = shape.attributes.get_int("end", 4)
    axes = range(4)[start:end]
    if 1 not in axes:
        return
    w = Writer(graph, shape, shape.outputs[0].name or "shape")
    parts = []
    for axis in axes:
        if axis == 1:
            parts.append(w.integers(heads))
        else:
            span = {"start": axis, "end": axis + 1}
            part = w.op("Shape", [shape.inputs[0]], f"axis{axis}", span, like=shape.outputs[0])
            parts.append(part)
    joined = w.op("Concat", parts, "axes", {"axis": 0}) if len(parts) > 1 else parts[0]
    replace_value(shape.outputs[0], joined)


def _move_outputs(
    graph: ir.Graph,
    members: Sequence[Block],
    present: Sequence[_Optional],
    output: _Optional,
) -> None:
    first = present[0]
    if first is None or output is None:
        return
    for value in present[1:]:
        if value is None:
            continue
        if value.is_graph_output():
            graph.outputs.remove(value)
        value.replace_all_uses_with(output)
    replace_value(first, output)
    _widen(output, members)


def _widen(value: ir.Value, members: Sequence[Block]) -> None:
    if value.shape is None:
        return
    dims = list(value.shape)
    dims[1] = sum(block.attention.kv_heads for block in members)
    value.shape = ir.Shape(dims)
