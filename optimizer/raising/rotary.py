"""Raises rotary position embeddings to RotaryEmbedding in 3-D form.

Rewrite: ``x * cos + rotate_half(x) * sin``, with ``rotate_half(x) = [-x2, x1]`` of the two halves
         x1, x2 of the last axis and cos, sin [B, 1, S, r] whose halves are equal
         -> RotaryEmbedding(x, cos', sin') with cos', sin' [B, S, r/2];
         ``rotate`` of neighbours, (-x1, x0, -x3, x2, ...), with each angle twice in a row
         -> ``interleaved``; either on [B, S, H, c] too, with tables [B, S, 1, r];
         ``Concat(RotaryEmbedding(x[..., :r]), x[..., r:])`` -> ``rotary_embedding_dim = r``;
         RotaryEmbedding on [B, H, S, c] behind Reshape and Transpose -> on [B, S, H*c];
         tables looked up through ``position_ids`` -> Gather once, shared by all layers.
Applies when: the halves of cos and sin are equal by construction (Concat(f, f), equal constants);
         batch and sequence agree. Tables of batch 1 are expanded to the batch of x, because ONNX
         Runtime refuses them otherwise although the exporter writes them.
Exactness: bitwise, but for a fused multiply-add a runtime may use.
Source:  Su et al., RoFormer (2021), section 3.4.2; ONNX RotaryEmbedding-23.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.nodes import node_of, operand, operands, optional, users
from optimizer.raising import heads as layout
from optimizer.raising.base import Miss, RuleReport, attempt, site
from optimizer.raising.dims import Dim, Shape
from optimizer.raising.shape_rules import slice_bounds
from optimizer.raising.shapes import Shapes
from optimizer.raising.tables import Paired, Tables

_END = 2**31 - 1
#: What the operator takes.
_TYPES = (None, ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def run(model: ir.Model) -> RuleReport:
    """Raise every rotary embedding of the main graph, whole or partial, to the operator."""
    state = _State(model.graph)
    for node in list(model.graph):
        if node.domain == "" and node.op_type == "Add":
            attempt(node, state.counted, _raise_decomposed, node)
    for node in list(model.graph):
        if node.domain == "" and node.op_type == "Concat":
            attempt(node, state.counted, _raise_partial, node)
    return state.report()


def join_heads(model: ir.Model) -> RuleReport:
    """Bring every RotaryEmbedding to the 3-D form; packed projections must be split before."""
    state = _State(model.graph)
    for node in list(model.graph):
        if node.domain == "" and node.op_type == "RotaryEmbedding":
            attempt(node, state.counted, _join_heads, node)
    return state.report()


@dataclass
class _State:
    graph: ir.Graph
    applied: int = 0
    skipped: list[Miss] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.shapes = Shapes()
        self.tables = Tables(self.graph, self.shapes)

    def counted(self, rule: Callable[[_State, ir.Node], None], node: ir.Node) -> int:
        """Run a rule at a node; returns how many rewrites that were."""
        before = self.applied
        rule(self, node)
        return self.applied - before

    def report(self) -> RuleReport:
        if self.applied:
            graphs.remove_dead(self.graph)
        return RuleReport(self.applied, tuple(self.skipped))

    def skip(self, node: ir.Node, reason: str) -> None:
        self.skipped.append(Miss(site(node), reason))


def last_axis_part(node: ir.Node, rank: int) -> tuple[int, int] | None:
    """(start, end) of a Slice of the last axis only; end is at least 2**31 - 1 for "the rest"."""
    bounds = slice_bounds(node, rank)
    if bounds is None or len(bounds) != 1:
        return None
    axis, part = bounds[0]
    if axis != rank - 1 or part.step != 1:
        return None
    return part.start, min(part.stop, _END)


def _rotated_half(shapes: Shapes, value: ir.Value) -> ir.Value | None:
    """X where ``value`` is ``Concat(-x[..., h:], x[..., :h])`` of halves of size h."""
    concat = node_of(value, "Concat")
    shape = shapes.of(value)
    if concat is None or len(concat.inputs) != 2 or shape is None:
        return None
    size, axis = shape[-1], concat.attributes["axis"].as_int()
    if axis not in (-1, len(shape) - 1) or not isinstance(size, int) or size % 2:
        return None
    negated = node_of(concat.inputs[0], "Neg")
    if negated is None:
        return None
    second, first = (_part(shapes, v) for v in (negated.inputs[0], concat.inputs[1]))
    if first is None or second is None or first[0] is not second[0]:
        return None
    expected = (0, size // 2), (size // 2, size)
    if (first[1], second[1]) != expected or not shapes.same(first[0], value):
        return None
    return first[0]


def _part(shapes: Shapes, value: ir.Value | None) -> tuple[ir.Value, tuple[int, int]] | None:
    """(x, (start, end)) where ``value`` is a part of the last axis of x."""
    node = node_of(value, "Slice", "Split")
    source = None if node is None else operand(node)
    shape = shapes.of(source)
    if node is None or source is None or shape is None or not isinstance(shape[-1], int):
        return None
    if node.op_type == "Slice":
        found = last_axis_part(node, len(shape))
        if found is None:
            return None
        start, end, _ = slice(*found).indices(shape[-1])
        return source, (start, end)
    if node.attributes.get_int("axis", 0) % len(shape) != len(shape) - 1:
        return None
    sizes = [(shapes.of(output) or (None,))[-1] for output in node.outputs]
    if value is None or not all(isinstance(size, int) for size in sizes):
        return None
    start = sum(size for size in sizes[: value.index()] if isinstance(size, int))
    width = sizes[value.index() or 0]
    return (source, (start, start + width)) if isinstance(width, int) else None


def _raise_decomposed(state: _State, node: ir.Node) -> None:
    """``x*cos + rotate(x)*sin``, in any order of operands, on [B, H, S, r] or [B, S, H, r]."""
    for straight, crossed in (operands(node), operands(node)[::-1]):
        match = _match_products(state.shapes, straight, crossed)
        if match is None:
            continue
        x, cos, sin, paired = match
        shape = state.shapes.of(x)
        if shape is None or len(shape) != 4:
            state.skip(node, "the rotary embedding is not on a 4-D value")
            return
        axis = _heads_axis(state.shapes, cos, sin, shape)
        if x.dtype not in _TYPES:
            state.skip(node, f"RotaryEmbedding takes no {x.dtype}")
            return
        reasons = [state.tables.refusal(t, shape, axis, paired) for t in (cos, sin)]
        reason = next((reason for reason in reasons if reason is not None), None)
        if reason is not None:
            state.skip(node, f"the tables of the rotary embedding: {reason}")
            return
        inputs = [state.tables.narrow(t, axis, paired, node) for t in (cos, sin)]
        attributes = {"interleaved": int(paired is Paired.NEIGHBOURS)}
        if axis == 2:
            x = layout.swap(state.graph, node, x)
        raised = graphs.insert(
            state.graph, node, "RotaryEmbedding", [x, *inputs], attributes, dtype=x.dtype
        )
        result = raised if axis == 1 else layout.swap(state.graph, node, raised)
        graphs.replace_value(node.outputs[0], result, keep_name=True)
        state.applied += 1
        return


def _heads_axis(shapes: Shapes, cos: ir.Value, sin: ir.Value, shape: Shape) -> int:
    """2 where both tables are [B, S, 1, r] for x [B, S, H, r], else 1."""
    tables = [shapes.of(table) for table in (cos, sin)]
    turned = [t is not None and len(t) == 4 and t[1:3] == (shape[1], 1) for t in tables]
    return 2 if all(turned) and shape[1] != 1 else 1


def _match_products(
    shapes: Shapes, straight: ir.Value, crossed: ir.Value
) -> tuple[ir.Value, ir.Value, ir.Value, Paired] | None:
    """(x, cos, sin, kind) of ``straight = x*cos`` and ``crossed = rotate(x)*sin``."""
    first, second = node_of(straight, "Mul"), node_of(crossed, "Mul")
    if first is None or second is None:
        return None
    for rotated, sin in (operands(second), operands(second)[::-1]):
        x, paired = _rotated_half(shapes, rotated), Paired.HALVES
        if x is None:
            x, paired = _rotated_pairs(shapes, rotated), Paired.NEIGHBOURS
        if x is None:
            continue
        for value, cos in (operands(first), operands(first)[::-1]):
            if value is x:
                return x, cos, sin, paired
    return None


def _rotated_pairs(shapes: Shapes, value: ir.Value) -> ir.Value | None:
    """The x where ``value`` is (-x1, x0, -x3, x2, ...): the stacked parts, flattened."""
    reshape = node_of(value, "Reshape")
    concat = None if reshape is None else node_of(reshape.inputs[0], "Concat")
    shape = shapes.of(value)
    if concat is None or len(concat.inputs) != 2 or shape is None:
        return None
    rank = len(shape)
    stacked = shapes.of(concat.outputs[0])
    if stacked is None or len(stacked) != rank + 1 or stacked[-1] != 2:
        return None
    if concat.attributes["axis"].as_int() not in (-1, rank):
        return None
    odd, even = (_under_new_axis(shapes, v) for v in concat.inputs)
    negated = node_of(odd, "Neg")
    if negated is None:
        return None
    sources = [_every_second(negated.inputs[0], 1, rank), _every_second(even, 0, rank)]
    x = sources[0]
    return x if x is not None and x is sources[1] and shapes.same(x, value) else None


def _under_new_axis(shapes: Shapes, value: ir.Value | None) -> ir.Value | None:
    """The v where ``value`` is v with a last axis of size 1 added."""
    node = node_of(value, "Unsqueeze", "Reshape")
    source = None if node is None else operand(node)
    shape = shapes.of(source)
    return source if shape is not None and shapes.of(value) == (*shape, 1) else None


def _every_second(value: ir.Value | None, first: int, rank: int) -> ir.Value | None:
    """The x where ``value`` is x[..., first::2]."""
    node = node_of(value, "Slice")
    bounds = None if node is None else slice_bounds(node, rank)
    if node is None or bounds is None or len(bounds) != 1:
        return None
    axis, part = bounds[0]
    taken = (axis, part.start, part.step) == (rank - 1, first, 2) and part.stop >= _END
    return operand(node) if taken else None


def _raise_partial(state: _State, node: ir.Node) -> None:
    """``Concat(RotaryEmbedding(x[..., :r]), x[..., r:])`` -> rotary_embedding_dim."""
    if len(node.inputs) != 2:
        return
    rotary = node_of(node.inputs[0], "RotaryEmbedding")
    turned = rotary is None  # then both parts may be [B, S, H, c], around Transposes
    if turned:
        rotary = node_of(layout.swapped(node.inputs[0]), "RotaryEmbedding")
    if rotary is None or rotary.attributes.get_int("rotary_embedding_dim", 0) != 0:
        return
    shapes = state.shapes
    part = layout.swapped(rotary.inputs[0]) if turned else rotary.inputs[0]
    rotated, rest = (
        _part(shapes, value) or _part_turned(shapes, value) for value in (part, node.inputs[1])
    )
    if rotated is None or rest is None or rotated[0] is not rest[0]:
        state.skip(node, "the two parts of a partial rotary embedding have different sources")
        return
    x = rotated[0]
    (start, middle), (other_start, end) = rotated[1], rest[1]
    shape = shapes.of(x)
    axis = node.attributes["axis"].as_int()
    # In 3-D form, a part of the last axis is some of the heads, or some and a part of one.
    whole = shape is not None and len(shape) == 4 and end == shape[-1] and axis in (-1, 3)
    if start != 0 or other_start != middle or not whole:
        state.skip(node, "the two parts of a partial rotary embedding are not the whole head")
        return
    attributes = {"rotary_embedding_dim": middle, **_kept(rotary)}
    inputs = [layout.swap(state.graph, node, x) if turned else x, *rotary.inputs[1:]]
    raised = graphs.insert(state.graph, node, "RotaryEmbedding", inputs, attributes, dtype=x.dtype)
    result = layout.swap(state.graph, node, raised) if turned else raised
    graphs.replace_value(node.outputs[0], result, keep_name=True)
    state.applied += 1


def _part_turned(shapes: Shapes, value: ir.Value | None) -> tuple[ir.Value, tuple[int, int]] | None:
    """The same for a part that was cut out before, and the whole after, axes 1 and 2 changed."""
    found = _part(shapes, layout.swapped(value))
    if found is None:
        return None
    for node in users(found[0], "Transpose"):
        if layout.swapped(node.outputs[0]) is found[0]:
            return node.outputs[0], found[1]
    return None


def _kept(node: ir.Node) -> dict[str, int]:
    return {"interleaved": node.attributes.get_int("interleaved", 0)}


def _join_heads(state: _State, node: ir.Node) -> None:
    """4-D RotaryEmbedding -> 3-D, with tables of the full batch and without position_ids."""
    x = operand(node)
    shape = state.shapes.of(x)
    looked_up = optional(node, 3) is not None
    if shape is None or len(shape) not in (3, 4):
        state.skip(node, "the shape of the rotary embedding's input is not known")
        return
    position = shape[0], shape[2] if len(shape) == 4 else shape[1]
    tables = _tables(state, node, x, position)
    if isinstance(tables, str):
        state.skip(node, tables)
        return
    found = layout.find(state.shapes, x) if len(shape) == 4 else None
    if found is None or isinstance(found, str):
        if looked_up or list(node.inputs[1:3]) != tables:
            inputs = [x, *tables]
            raised = graphs.insert(
                state.graph, node, "RotaryEmbedding", inputs, dict(node.attributes), dtype=x.dtype
            )
            graphs.replace_value(node.outputs[0], raised, keep_name=True)
            state.applied += 1
        if found is not None:
            state.skip(node, f"the rotary embedding stays 4-D: {found}")
        return
    joined = layout.join(state.graph, node, found)
    attributes = {
        "num_heads": found.count,
        "rotary_embedding_dim": node.attributes.get_int("rotary_embedding_dim", 0),
        **_kept(node),
    }
    raised = graphs.insert(
        state.graph,
        node,
        "RotaryEmbedding",
        [joined, *tables],
        attributes,
        name=f"{node.outputs[0].name}_joined",
        dtype=x.dtype,
    )
    result = layout.split(state.graph, node, raised, found.count, found.size)
    graphs.replace_value(node.outputs[0], result, keep_name=True)
    state.applied += 1


def _tables(
    state: _State, node: ir.Node, x: ir.Value, position: tuple[Dim, Dim]
) -> list[ir.Value] | str:
    """Cos and sin [B, S, r/2] for a RotaryEmbedding."""
    result = []
    for table in (operand(node, 1), operand(node, 2)):
        full = state.tables.full(table, optional(node, 3), x, position, node)
        if isinstance(full, str):
            return full
        result.append(full)
    return result
