"""Tables by position, masks and all tokens back, also where other tokens stand beside the merged.

Rows of a joined sequence are [before, tokens, behind], of which only the tokens are fewer. A token
that others went into is where it was: tables with one row per position, and masks, are read there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from optimizer.nodes import optional
from optimizer.raising.shapes import Shapes
from optimizer.tokens.emit import Emitter, State
from optimizer.tokens.flow import MASK, Attend, Rows, Table
from optimizer.tokens.merging import CUT

_INTEGER = ir.DataType.INT64


@dataclass
class Lengths:
    """How many rows stand in front and behind, constant where it is known, else as the run has it.

    ``count``: tokens that enter the tower. Shapes are those of the graph before it was rewritten.
    """

    shapes: Shapes
    count: int

    def of(self, pen: Emitter, values: Sequence[ir.Value]) -> ir.Value:
        """int64 [1]: the rows of ``values`` together."""
        fixed, parts = 0, list[ir.Value]()
        for value in values:
            shape = self.shapes.of(value)
            size = None if shape is None else shape[1]
            if isinstance(size, int):
                fixed += size
            else:
                parts.append(pen.put("Shape", value, dtype=_INTEGER, start=1, end=2))
        if fixed or not parts:
            parts.append(pen.integers([fixed], "rows"))
        total = parts[0]
        for part in parts[1:]:
            total = pen.put("Add", total, part, as_="rows", dtype=_INTEGER)
        return total

    def span(self, pen: Emitter, rows: Rows, state: State) -> tuple[ir.Value, ir.Value]:
        """int64 [1] each: where the tokens of joined rows begin, and end."""
        start = self.of(pen, rows.before)
        many = pen.integers([state.count - rows.skip - rows.cut], "many")
        return start, pen.put("Add", start, many, as_="end", dtype=_INTEGER)

    def static(self, rows: Rows, state: State) -> int | None:
        """How many rows there are, if that is known."""
        total = state.count - rows.skip - rows.cut
        for value in (*rows.before, *rows.behind):
            shape = self.shapes.of(value)
            size = None if shape is None else shape[1]
            if not isinstance(size, int):
                return None
            total += size
        return total


def span(pen: Emitter, value: ir.Value, start: ir.Value, end: ir.Value, axis: int = 1) -> ir.Value:
    """Rows ``start`` to ``end``, int64 [1] each, of ``value``."""
    axes = pen.integers([axis], "axis")
    return pen.put("Slice", value, start, end, axes, as_="part", dtype=value.dtype)


def _end(pen: Emitter) -> ir.Value:
    return pen.integers([np.iinfo(np.int64).max], "last")


@dataclass
class Reading:
    """Inputs for those who read by position, made once each and shared.

    Attributes:
        graph: Where they are written.
        lengths: Of what is beside the tokens.
        states: By stage.
    """

    graph: ir.Graph
    lengths: Lengths
    states: Sequence[State]
    _index: dict[Rows, ir.Value] = field(default_factory=dict)
    _logs: dict[Rows, ir.Value | None] = field(default_factory=dict)
    _made: dict[tuple[object, ...], ir.Value] = field(default_factory=dict)

    def _pen(self, node: ir.Node, value: ir.Value | None) -> Emitter:
        dtype = None if value is None else value.dtype
        return Emitter(self.graph, node, f"{node.name}/tokens", dtype or ir.DataType.FLOAT)

    def table(self, table: Table) -> ir.Value:
        """[B, rows', .] of the table [B or 1, rows, .] or [rows, .] that a node reads."""
        value = table.node.inputs[table.index]
        assert value is not None  # noqa: S101 - the flow has looked at it
        key = (value, table.rows)
        if key not in self._made:
            pen = self._pen(table.node, value)
            index, shape = self._rows(pen, table.rows), self.lengths.shapes.of(value)
            if shape is not None and (len(shape) == 2 or shape[0] == 1):
                if len(shape) == 3:
                    value = pen.put("Squeeze", value, pen.integers([0], "axes"), as_="table")
                flat = pen.put("Squeeze", index, pen.integers([2], "axes"), dtype=_INTEGER)
                made = pen.put("Gather", value, flat, as_="positions", axis=0)
            else:
                made = pen.rows(value, index, "positions")
            self._made[key] = made
        return self._made[key]

    def mask(self, attend: Attend) -> ir.Value | None:
        """[B, H or 1, queries, keys]: the mask of an attention outside of the tower, with sizes."""
        node = attend.node
        value = optional(node, MASK)
        key = (value, attend.queries, attend.keys, "mask")
        if key in self._made:
            return self._made[key]
        pen = self._pen(node, node.inputs[0])
        logs = None if attend.keys is None else self._sizes(pen, attend.keys)
        made = logs
        if value is not None:
            made = self._at_positions(pen, value, attend)
            if logs is not None and value.dtype == ir.DataType.BOOL:
                made = pen.put("Where", made, logs, pen.numbers(CUT, "cut"), as_="mask")
            elif logs is not None:
                made = pen.put("Add", made, logs, as_="mask")
        if made is not None:
            self._made[key] = made
        return made

    def _at_positions(self, pen: Emitter, mask: ir.Value, attend: Attend) -> ir.Value:
        shape = self.lengths.shapes.of(mask)
        assert shape is not None  # noqa: S101 - the flow has looked at it
        dtype = mask.dtype
        keys = attend.keys if shape[-1] != 1 else None
        queries = attend.queries if shape[-2] != 1 else None
        if keys is None and queries is None:
            return mask
        if len(shape) < 4:
            axes = pen.integers(range(4 - len(shape)), "axes")
            mask = pen.put("Unsqueeze", mask, axes, as_="mask", dtype=dtype)
        # Rows by index lie behind the batch: [B, T, H, S], then [B, S, H, T].
        perm, back = (0, 3, 1, 2), (0, 2, 3, 1)
        if keys is not None:
            index = self._rows(pen, keys)
            mask = self._batched(pen, pen.put("Transpose", mask, dtype=dtype, perm=perm), index)
            mask = pen.rows(mask, index, "keys")
        if queries is not None:
            turn = (0, 3, 2, 1) if keys is not None else (0, 2, 1, 3)
            index = self._rows(pen, queries)
            mask = self._batched(pen, pen.put("Transpose", mask, dtype=dtype, perm=turn), index)
            mask = pen.rows(mask, index, "queries")
            back = (0, 2, 1, 3)
        return pen.put("Transpose", mask, as_="mask", dtype=dtype, perm=back)

    def _batched(self, pen: Emitter, value: ir.Value, like: ir.Value) -> ir.Value:
        """``value`` [B or 1, ...] with the batch of ``like``."""
        batch = pen.put("Shape", like, as_="batch", dtype=_INTEGER, start=0, end=1)
        shape = pen.put("Concat", batch, pen.integers([1, 1, 1], "ones"), dtype=_INTEGER, axis=0)
        return pen.put("Expand", value, shape, dtype=value.dtype)

    def _rows(self, pen: Emitter, rows: Rows) -> ir.Value:
        """int64 [B, rows', 1]: the original position of each row."""
        if rows in self._index:
            return self._index[rows]
        state = self.states[rows.stage]
        assert state.origins is not None  # noqa: S101 - asked for
        found = state.origins
        if rows.skip or rows.cut:
            bounds = [pen.integers([n]) for n in (rows.skip, state.count - rows.cut)]
            found = span(pen, found, bounds[0], bounds[1])
        start = self.lengths.of(pen, rows.before)
        shift = pen.integers([-rows.skip], "skip")
        if rows.before:
            shift = pen.put("Add", start, shift, dtype=_INTEGER)
        if rows.skip or rows.before:
            found = pen.put("Add", found, shift, as_="positions", dtype=_INTEGER)
        if rows.joined:
            many = pen.integers([self.lengths.count - rows.skip - rows.cut], "many")
            first = pen.put("Add", start, many, as_="first", dtype=_INTEGER)
            last = pen.put("Add", first, self.lengths.of(pen, rows.behind), dtype=_INTEGER)
            zero = pen.everywhere(found, [0])
            parts = [found]
            if rows.before:
                parts.insert(0, self._range(pen, pen.integers([0], "zero"), start, zero))
            if rows.behind:
                parts.append(self._range(pen, first, last, zero))
            found = pen.put("Concat", *parts, as_="positions", dtype=_INTEGER, axis=1)
        self._index[rows] = found
        return found

    @staticmethod
    def _range(pen: Emitter, start: ir.Value, end: ir.Value, zero: ir.Value) -> ir.Value:
        """int64 [B, end - start, 1]."""
        none = pen.integers(np.zeros(0), "scalar")
        bounds = [pen.put("Reshape", v, none, dtype=_INTEGER) for v in (start, end)]
        numbers = pen.put("Range", *bounds, pen.integers(np.array(1), "step"), dtype=_INTEGER)
        column = pen.put("Unsqueeze", numbers, pen.integers([1], "axes"), dtype=_INTEGER)
        return pen.put("Add", zero, column, as_="fixed", dtype=_INTEGER)

    def _sizes(self, pen: Emitter, rows: Rows) -> ir.Value | None:
        """[B, 1, 1, rows']: what attentions add to scores of the keys; None: nothing."""
        if rows in self._logs:
            return self._logs[rows]
        found = self.states[rows.stage].mask
        if found is not None and found.dtype != pen.dtype:
            found = pen.put("Cast", found, to=pen.dtype)
        state = self.states[rows.stage]
        if found is not None and (rows.skip or rows.cut):
            bounds = [pen.integers([n]) for n in (rows.skip, state.count - rows.cut)]
            found = span(pen, found, bounds[0], bounds[1], axis=3)
        if found is not None and rows.joined:
            ends = [self.lengths.of(pen, values) for values in (rows.before, rows.behind)]
            zeros = pen.integers([0, 0, 0], "zeros")
            pads = pen.put("Concat", zeros, ends[0], zeros, ends[1], dtype=_INTEGER, axis=0)
            found = pen.put("Pad", found, pads, as_="log_sizes")
        self._logs[rows] = found
        return found


def whole(pen: Emitter, x: ir.Value, rows: Rows, state: State, lengths: Lengths) -> ir.Value:
    """``x`` [B, rows', D] with every original token as the one it was merged into."""
    places = state.places
    assert places is not None  # noqa: S101 - asked for after a reduction
    if rows.skip or rows.cut:
        bounds = [pen.integers([n]) for n in (rows.skip, lengths.count - rows.cut)]
        places = span(pen, places, bounds[0], bounds[1])
        places = pen.put("Sub", places, pen.integers([rows.skip], "skip"), dtype=_INTEGER)
    if not rows.joined:
        return pen.rows(x, places, "unmerged")
    start, end = lengths.span(pen, rows, state)
    parts = [pen.rows(span(pen, x, start, end), places, "unmerged")]
    if rows.before:
        parts.insert(0, span(pen, x, pen.integers([0], "zero"), start))
    if rows.behind:
        parts.append(span(pen, x, end, _end(pen)))
    return pen.put("Concat", *parts, as_="whole", axis=1)


def whole_scores(pen: Emitter, scores: ir.Value, state: State, *, weights: bool) -> ir.Value:
    """[B, H, N, N] of attention scores [B, H, M, M] between the tokens that are left.

    ``weights``: they are what softmax gives, of which each original token gets its share: attention
    to a token of size s is attention to s equal ones (ToMe, arXiv 2210.09461, Section 3).
    """
    assert state.places is not None  # noqa: S101 - asked for after a reduction
    if weights and state.sizes is not None:
        turned = pen.put("Transpose", state.sizes, perm=(0, 2, 1))
        shares = pen.put("Unsqueeze", turned, pen.integers([1], "axes"), as_="sizes")
        scores = pen.put("Div", scores, shares, as_="shares")
    columns = pen.put("Transpose", scores, perm=(0, 3, 2, 1))
    columns = pen.rows(columns, state.places, "columns")
    rows = pen.rows(pen.put("Transpose", columns, perm=(0, 2, 1, 3)), state.places, "rows")
    return pen.put("Transpose", rows, as_="scores", perm=(0, 3, 1, 2))


def shorten(value: ir.Value, rows: Rows, state: State, lengths: Lengths) -> None:
    """Declare that ``value`` has fewer rows."""
    shape = value.shape
    if shape is not None and len(shape) == 3 and not value.is_graph_output():
        value.shape = ir.Shape([shape[0], lengths.static(rows, state), shape[2]])


def replace_input(node: ir.Node, index: int, value: ir.Value | None) -> None:
    """Set an input that the node may lack."""
    if len(node.inputs) <= index:
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)
