"""The cos and sin tables of rotary embeddings: half as wide, of the full batch, and shared."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.nodes import by_constant, dims, node_of, operand
from optimizer.raising.dims import Dim, Shape
from optimizer.raising.shape_rules import axes_of
from optimizer.raising.shapes import Shapes

_UNARY = frozenset({"Cast", "Cos", "Identity", "Neg", "Sin"})
_MAX_DEPTH = 12


class Tables:
    """Derives tables from tables, each only once per graph.

    Sites must come in graph order: a derived table is inserted before the first site that asks for
    it and used by all later ones.
    """

    def __init__(self, graph: ir.Graph, shapes: Shapes) -> None:
        self._graph = graph
        self._shapes = shapes
        self._halves: dict[ir.Value, ir.Value] = {}
        self._dropped: dict[ir.Value, ir.Value] = {}
        self._full: dict[tuple[ir.Value, ir.Value | None, Dim], ir.Value] = {}

    def narrow(self, table: ir.Value, shape: Shape, anchor: ir.Node) -> ir.Value | str:
        """[B or 1, S, r/2] of a table [B or 1, 1, S, r] that is multiplied with ``shape``.

        Args:
            table: Its two halves along the last axis must be equal.
            shape: [B, H, S, r].
            anchor: The first site of the table.

        Returns:
            The table, or what is wrong with ``table``.
        """
        found = self._shapes.of(table)
        if found is None or not 2 <= len(found) <= 4:
            return "rank not known"
        padded = (1,) * (4 - len(found)) + found
        if padded[0] not in (1, shape[0]) or padded[1:] != (1, *shape[2:]):
            return "shape is not [batch, 1, sequence, size of the head]"
        rows = self._without_heads(table, anchor)
        if rows is None:
            return "axis of the heads cannot be removed"
        if not self._is_doubled(rows, _MAX_DEPTH):
            return "halves are not known to be equal"
        return self._half(rows, anchor)

    def _without_heads(self, table: ir.Value, anchor: ir.Node) -> ir.Value | None:
        """[B or 1, S, r] of [B or 1, 1, S, r] (or of a table without leading axes)."""
        rank = len(self._shapes.of(table) or ())
        if rank == 3:  # broadcast against [B, H, S, r], its first axis is the heads'
            return table
        node = node_of(table, "Unsqueeze")
        if node is not None and rank == 4:
            axes = axes_of(node, 1)
            if axes is not None and [axis % 4 for axis in axes] == [1]:
                return operand(node)
        if table not in self._dropped:
            op_type, axis = ("Squeeze", 1) if rank == 4 else ("Unsqueeze", 0)
            axes_value = graphs.add_initializer(
                self._graph, "table_axis", np.array([axis], np.int64)
            )
            self._dropped[table] = graphs.insert(
                self._graph,
                anchor,
                op_type,
                [table, axes_value],
                name=f"{table.name}_rows",
                dtype=table.dtype,
            )
        return self._dropped[table]

    def _is_doubled(self, value: ir.Value, depth: int) -> bool:
        """Whether the two halves of the last axis are equal, by construction."""
        shape = self._shapes.of(value)
        if depth == 0 or shape is None or not shape or not isinstance(shape[-1], int):
            return False
        if shape[-1] % 2:
            return False
        if graphs.constant(value) is not None:
            array = graphs.const(value)
            half = shape[-1] // 2
            return array is not None and np.array_equal(array[..., :half], array[..., half:])
        node = value.producer()
        if node is None or node.domain != "":
            return False
        source = self._elementwise(node)
        if source is not None:
            return self._is_doubled(source, depth - 1)
        if node.op_type == "Concat":
            last = node.attributes["axis"].as_int() in (-1, len(shape) - 1)
            return last and len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]
        if self._keeps_last_axis(node, len(shape)):
            return self._is_doubled(operand(node), depth - 1)
        return False

    @staticmethod
    def _elementwise(node: ir.Node) -> ir.Value | None:
        """The operand of an element-wise function of one value."""
        if node.op_type in _UNARY:
            return operand(node)
        if node.op_type in ("Add", "Div", "Mul", "Sub"):
            found = by_constant(node)
            return None if found is None else found[0]
        return None

    @staticmethod
    def _keeps_last_axis(node: ir.Node, rank: int) -> bool:
        """Whether the node moves whole rows: a lookup, or a new or dropped leading axis."""
        if node.op_type == "Gather":
            return node.attributes.get_int("axis", 0) == 0
        if node.op_type in ("Unsqueeze", "Squeeze"):
            axes = axes_of(node, 1)
            full = rank if node.op_type == "Unsqueeze" else rank + len(axes or ())
            return axes is not None and all(axis % full != full - 1 for axis in axes)
        return False

    def _half(self, value: ir.Value, anchor: ir.Node) -> ir.Value:
        """The first half of the last axis of a doubled value."""
        if value in self._halves:
            return self._halves[value]
        name = f"{value.name}_half"
        node = value.producer()
        if graphs.constant(value) is not None:
            shape = dims(value) or ()
            half = shape[-1] // 2
            tensor = graphs.derived(value, [*shape[:-1], half], lambda a: a[..., :half])
            result = graphs.add_initializer(self._graph, name, tensor)
        elif node is None:
            msg = f"value '{value.name}' is not doubled"
            raise ValueError(msg)
        elif node.op_type == "Concat":
            result = operand(node)
        else:
            source = self._elementwise(node) or operand(node)
            narrow = self._half(source, anchor)
            inputs = [narrow if v is source else v for v in node.inputs]
            attributes = dict(node.attributes)
            result = graphs.insert(
                self._graph, anchor, node.op_type, inputs, attributes, name=name, dtype=value.dtype
            )
        self._halves[value] = result
        return result

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
