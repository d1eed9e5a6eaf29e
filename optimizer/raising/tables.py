"""The cos and sin tables of rotary embeddings: half as wide, of the full batch, and shared."""

from __future__ import annotations

import enum

import numpy as np
import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.nodes import by_constant, dims, node_of, operand
from optimizer.raising import dims as dims_
from optimizer.raising.dims import Dim, Shape
from optimizer.raising.shape_rules import axes_of
from optimizer.raising.shapes import Shapes

_UNARY = frozenset({"Cast", "Cos", "Identity", "Neg", "Sin"})
_MAX_DEPTH = 12


class Paired(enum.Enum):
    """Where a table has each angle twice: i and i + r/2, or 2i and 2i + 1."""

    HALVES = "halves"
    NEIGHBOURS = "neighbours"


def _two(array: np.ndarray, paired: Paired) -> tuple[np.ndarray, np.ndarray]:
    """The two halves of a table that ought to be equal."""
    half = array.shape[-1] // 2
    if paired is Paired.HALVES:
        return array[..., :half], array[..., half:]
    return array[..., ::2], array[..., 1::2]


class Tables:
    """Derives tables from tables, each only once per graph.

    Sites must come in graph order: a derived table is inserted before the first site that asks for
    it and used by all later ones.
    """

    def __init__(self, graph: ir.Graph, shapes: Shapes) -> None:
        self._graph = graph
        self._shapes = shapes
        self._halves: dict[tuple[ir.Value, Paired], ir.Value] = {}
        self._dropped: dict[tuple[ir.Value, int], ir.Value] = {}
        self._full: dict[tuple[ir.Value, ir.Value | None, Dim], ir.Value] = {}

    def refusal(self, table: ir.Value, shape: Shape, heads_axis: int, paired: Paired) -> str | None:
        """Why ``narrow`` cannot be asked for ``table``; nothing is written to find out."""
        found = self._shapes.of(table)
        if found is None or not 2 <= len(found) <= 4:
            return "rank not known"
        expected = list(shape)
        expected[heads_axis] = 1
        padded = (1,) * (4 - len(found)) + found
        if padded[0] not in (1, shape[0]) or list(padded[1:]) != expected[1:]:
            return "shape is not [batch, 1, sequence, size of the head]"
        if len(found) < 4 and heads_axis != 1:
            return "axis of the heads cannot be removed"
        if not self._is_doubled(table, paired, _MAX_DEPTH):
            return f"{paired.value} are not known to be equal"
        return None

    def narrow(self, table: ir.Value, heads_axis: int, paired: Paired, anchor: ir.Node) -> ir.Value:
        """[B or 1, S, r/2] of a table [B or 1, 1, S, r] that is multiplied with [B, H, S, r].

        Args:
            table: Every angle comes twice along its last axis; ``refusal`` found nothing.
            heads_axis: Where the table has the size 1; 2 beside [B, S, H, r].
            paired: Where the two of each angle are.
            anchor: The first site of the table.
        """
        return self._half(self._without_heads(table, heads_axis, anchor), paired, anchor)

    def _without_heads(self, table: ir.Value, heads_axis: int, anchor: ir.Node) -> ir.Value:
        """[B or 1, S, r] of [B or 1, 1, S, r] (or of a table without leading axes)."""
        rank = len(self._shapes.of(table) or ())
        if rank == 3:  # broadcast against [B, H, S, r], its first axis is the heads'
            return table
        node = node_of(table, "Unsqueeze")
        if node is not None and rank == 4:
            axes = axes_of(node, 1)
            if axes is not None and [axis % 4 for axis in axes] == [heads_axis]:
                return operand(node)
        key = table, heads_axis
        if key not in self._dropped:
            op_type, axis = ("Squeeze", heads_axis) if rank == 4 else ("Unsqueeze", 0)
            axes_value = graphs.add_initializer(
                self._graph, "table_axis", np.array([axis], np.int64)
            )
            name = f"{table.name}_rows"
            self._dropped[key] = graphs.insert(
                self._graph, anchor, op_type, [table, axes_value], name=name, dtype=table.dtype
            )
        return self._dropped[key]

    def _is_doubled(self, value: ir.Value, paired: Paired, depth: int) -> bool:
        """Whether every angle comes twice along the last axis, by construction."""
        shape = self._shapes.of(value)
        if depth == 0 or not shape or not isinstance(shape[-1], int) or shape[-1] % 2:
            return False
        array = graphs.const(value)
        if array is not None:
            return np.array_equal(*_two(array, paired))
        node = value.producer()
        if node is None or node.domain != "":
            return False
        return self._is_doubled_by(node, len(shape), paired, depth)

    def _is_doubled_by(self, node: ir.Node, rank: int, paired: Paired, depth: int) -> bool:
        """Whether this node doubles every angle, or keeps what is doubled."""
        source = self._elementwise(node)
        if source is not None:
            return self._is_doubled(source, paired, depth - 1)
        if node.op_type == "Concat" and paired is Paired.HALVES:
            last = node.attributes["axis"].as_int() in (-1, rank - 1)
            return last and len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]
        if node.op_type == "Reshape" and paired is Paired.NEIGHBOURS:
            return self._repeated(node) is not None
        if self._keeps_last_axis(node, rank):
            return self._is_doubled(operand(node), paired, depth - 1)
        return False

    def _repeated(self, reshape: ir.Node) -> tuple[ir.Value, list[int]] | None:
        """(f, axes) of Reshape(Expand(Unsqueeze(f, -1), [..., n, 2]), [..., 2n]).

        f is [..., n] once the axes of size 1 at ``axes``, which the same Unsqueeze adds, are in it.
        """
        expand = node_of(reshape.inputs[0], "Expand")
        below = None if expand is None else node_of(expand.inputs[0], "Unsqueeze", "Reshape")
        if expand is None or below is None:
            return None
        source, wide = self._shapes.of(below.inputs[0]), self._shapes.of(expand.outputs[0])
        narrow = self._shapes.of(expand.inputs[0])
        if source is None or narrow is None or narrow[-1] != 1 or wide != (*narrow[:-1], 2):
            return None
        result, single = self._shapes.of(reshape.outputs[0]), narrow[:-1]
        if result != (*single[:-1], dims_.multiply(single[-1], 2)):
            return None
        if single == source:
            return operand(below), []
        added = axes_of(below, 1) if below.op_type == "Unsqueeze" else None
        if added is None:
            return None
        return operand(below), sorted({axis % len(narrow) for axis in added} - {len(single)})

    @staticmethod
    def _elementwise(node: ir.Node) -> ir.Value | None:
        """The operand of an element-wise function of one value."""
        if node.op_type in _UNARY:
            return operand(node)
        if node.op_type in ("Add", "Div", "Mul", "Sub"):
            found = by_constant(node)
            return None if found is None else found[0]
        return None

    def _keeps_last_axis(self, node: ir.Node, rank: int) -> bool:
        """Whether the node moves whole rows: a lookup, or a new or dropped leading axis."""
        if node.op_type == "Gather":
            rows = len(self._shapes.of(node.inputs[0]) or ()) > 1
            return rows and node.attributes.get_int("axis", 0) == 0
        if node.op_type in ("Unsqueeze", "Squeeze"):
            axes = axes_of(node, 1)
            full = rank if node.op_type == "Unsqueeze" else rank + len(axes or ())
            return axes is not None and all(axis % full != full - 1 for axis in axes)
        return False

    def _half(self, value: ir.Value, paired: Paired, anchor: ir.Node) -> ir.Value:
        """Each angle of a doubled value once."""
        if (value, paired) in self._halves:
            return self._halves[value, paired]
        name = f"{value.name}_half"
        node = value.producer()
        if graphs.constant(value) is not None:
            shape = dims(value) or ()
            half = shape[-1] // 2
            tensor = graphs.derived(value, [*shape[:-1], half], lambda a: _two(a, paired)[0])
            result = graphs.add_initializer(self._graph, name, tensor)
        elif node is None:
            msg = f"value '{value.name}' is not doubled"
            raise ValueError(msg)
        elif node.op_type == "Concat":
            result = operand(node)
        elif node.op_type == "Reshape" and (repeated := self._repeated(node)) is not None:
            result = self._with_axes(*repeated, anchor)
        else:
            source = self._elementwise(node) or operand(node)
            narrow = self._half(source, paired, anchor)
            inputs = [narrow if v is source else v for v in node.inputs]
            attributes = dict(node.attributes)
            result = graphs.insert(
                self._graph, anchor, node.op_type, inputs, attributes, name=name, dtype=value.dtype
            )
        self._halves[value, paired] = result
        return result

    def _with_axes(self, value: ir.Value, axes: list[int], anchor: ir.Node) -> ir.Value:
        """``value`` with axes of size 1 added."""
        if not axes:
            return value
        where = graphs.add_initializer(self._graph, "table_axes", np.array(axes, np.int64))
        name = f"{value.name}_wide"
        return graphs.insert(
            self._graph, anchor, "Unsqueeze", [value, where], name=name, dtype=value.dtype
        )

    def full(
        self,
        table: ir.Value,
        positions: ir.Value | None,
        x: ir.Value,
        position: tuple[Dim, Dim],
        anchor: ir.Node,
    ) -> ir.Value | str:
        """The table [B, S, r/2] for ``x``.

        Args:
            table: [B or 1, S, r/2]; with ``positions`` [rows, r/2].
            positions: The row of each token [B or 1, S], or None.
            x: [B, S, H*c] or [B, H, S, c].
            position: B and S of ``x``.
            anchor: The first site of the table.

        Returns:
            The table, or why there is none.
        """
        batch, sequence = position
        key = table, positions, batch
        if key in self._full:
            return self._full[key]
        shape = self._shapes.of(table if positions is None else positions)
        if shape is None or shape[1:2] != (sequence,):
            return "the sequence of the rotary tables is not the one of the input"
        result = table
        if positions is not None:
            result = graphs.insert(
                self._graph,
                anchor,
                "Gather",
                [table, positions],
                {"axis": 0},
                name=f"{table.name}_rows",
                dtype=table.dtype,
            )
        if shape[0] != batch:
            result = self._expanded(result, x, anchor)
        self._full[key] = result
        return result

    def _expanded(self, table: ir.Value, x: ir.Value, anchor: ir.Node) -> ir.Value:
        """``table`` with the batch of ``x``; nothing changes where it has that batch already."""
        integers = ir.DataType.INT64
        name = f"{table.name}_batch"
        size = graphs.insert(
            self._graph, anchor, "Shape", [x], {"start": 0, "end": 1}, name=name, dtype=integers
        )
        ones = graphs.add_initializer(self._graph, "ones", np.ones(2, np.int64))
        name = f"{table.name}_target"
        target = graphs.insert(
            self._graph, anchor, "Concat", [size, ones], {"axis": 0}, name=name, dtype=integers
        )
        return graphs.insert(
            self._graph,
            anchor,
            "Expand",
            [table, target],
            name=f"{table.name}_full",
            dtype=table.dtype,
        )
