"""Splits one linear layer that computes several things into one layer for each.

Rewrite: ``Split(x @ [Wq | Wk | Wv] + b)`` -> ``x @ Wq + bq``, ``x @ Wk + bk``, ``x @ Wv + bv``;
         likewise where the columns are interleaved per head ([H, 3, c], with Reshape and Transpose
         before the Split), where Slice or Gather selects, and for packed gate and up.
Applies when: everything that reads the layer selects columns, through Reshapes and Transposes that
         keep batch and sequence; no column is selected twice; and the parts are not joined again,
         as in a rotary embedding that turns only a part of each head.
Exactness: reassociated (a narrower GEMM may sum in another order). Weights are sliced lazily.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.raising import columns as tracking
from optimizer.raising.base import Miss, RuleReport, allow, site
from optimizer.raising.columns import Columns
from optimizer.raising.narrow import Layer, copy, layer_at
from optimizer.raising.shapes import Shapes

_MAX_CHAIN = 6
#: How far to look for the place where parts of a layer are joined again.
_MAX_STEPS = 8
_ELEMENTWISE = frozenset({"Add", "Cast", "Mul", "Neg", "Sub"})
_MOVES = frozenset({"Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze", "RotaryEmbedding"})


def run(model: ir.Model) -> RuleReport:
    """Split every packed linear layer of the main graph."""
    graph = model.graph
    shapes = Shapes()
    applied, skipped = 0, []
    for node in list(graph):
        layer = layer_at(node)
        pieces = None if layer is None else _pieces(shapes, layer)
        if layer is None or pieces is None:
            continue
        reason = _reason_to_skip(shapes, pieces)
        if reason is not None:
            skipped.append(Miss(site(node), reason))
            continue
        if not allow(node):
            continue
        _rewrite(graph, layer, pieces)
        applied += 1
    if applied:
        graphs.remove_dead(graph)
    return RuleReport(applied, tuple(skipped))


def _pieces(shapes: Shapes, layer: Layer) -> list[Columns] | None:
    """The parts into which all users together cut the layer's result; None if they do not."""
    shape = shapes.of(layer.output)
    if shape is None or not isinstance(shape[-1], int):
        return None
    pieces = _cut(shapes, tracking.start(layer.output, len(shape), shape[-1]), _MAX_CHAIN)
    return None if pieces is None else [_laid_out_further(shapes, piece) for piece in pieces]


def _cut(shapes: Shapes, columns: Columns, steps: int) -> list[Columns] | None:
    """What the users of ``columns`` select, at once or after a change of layout."""
    users = list(dict.fromkeys(use.node for use in columns.value.uses()))
    if columns.value.is_graph_output() or not users or steps == 0:
        return None
    result: list[Columns] = []
    for user in users:
        chosen = tracking.parts(shapes, columns, user)
        if chosen is None:
            following = tracking.through(shapes, columns, user)
            chosen = None if following is None else _cut(shapes, following, steps - 1)
        if chosen is None:
            return None
        result += chosen
    return result


def _laid_out_further(shapes: Shapes, piece: Columns) -> Columns:
    """The part after the changes of layout that follow, so that all of them become one.

    An Unsqueeze at the end stays: it begins a repetition of heads, which is recognised by it.
    """
    last = piece
    for _ in range(_MAX_CHAIN):
        user = graphs.only_user(piece.value)
        following = None if user is None else tracking.through(shapes, piece, user)
        if user is None or following is None:
            break
        piece = following
        last = last if user.op_type == "Unsqueeze" else piece
    return last


def _reason_to_skip(shapes: Shapes, pieces: list[Columns]) -> str | None:
    if len(pieces) < 2:
        return "only a part of the layer's result is used"
    taken = np.concatenate([piece.index.reshape(-1) for piece in pieces])
    if len(np.unique(taken)) != len(taken):
        return "parts of a packed layer overlap"
    if any(piece.index.size == 0 for piece in pieces):
        return "a part of a packed layer is empty"
    if any(_longest_step(piece.index) == 1 for piece in pieces):
        return "parts of a layer alternate column by column"
    if _joined_again(shapes, pieces):
        return "parts of a layer are joined again (a rotary embedding not recognised)"
    return None


def _longest_step(index: np.ndarray) -> int:
    """The length of the longest run of neighbouring columns."""
    flat = index.reshape(-1)
    breaks = np.flatnonzero(np.diff(flat) != 1)
    edges = np.concatenate(([-1], breaks, [flat.size - 1]))
    return int(np.diff(edges).max())


def _joined_again(shapes: Shapes, pieces: list[Columns]) -> bool:
    """Whether two parts meet in a Concat along the last axis."""
    meeting: dict[ir.Node, int] = {}
    for number, piece in enumerate(pieces):
        for node in _concats(shapes, piece.value):
            if meeting.setdefault(node, number) != number:
                return True
    return False


def _concats(shapes: Shapes, value: ir.Value) -> Iterable[ir.Node]:
    """The Concats along the last axis that ``value`` reaches through element-wise functions."""
    pending, seen = [(value, 0)], set[ir.Node]()
    while pending:
        current, steps = pending.pop()
        for node in dict.fromkeys(use.node for use in current.uses()):
            if node in seen or node.domain != "" or steps >= _MAX_STEPS:
                continue
            seen.add(node)
            if node.op_type == "Concat":
                shape = shapes.of(node.outputs[0])
                last = -1 if shape is None else len(shape) - 1
                if node.attributes["axis"].as_int() in (-1, last):
                    yield node
            elif node.op_type in _ELEMENTWISE | _MOVES:
                pending.extend((output, steps + 1) for output in node.outputs)


def _rewrite(graph: ir.Graph, layer: Layer, pieces: list[Columns]) -> None:
    for number, piece in enumerate(pieces):
        if not piece.value.uses() and not piece.value.is_graph_output():
            continue
        new = _narrow(graph, layer, piece, number)
        graphs.replace_value(piece.value, new, keep_name=True)


def _narrow(graph: ir.Graph, layer: Layer, piece: Columns, number: int) -> ir.Value:
    """The layer for the columns of one part, in the part's layout."""
    value = copy(graph, layer, piece.index.reshape(-1), number)
    return value if piece.in_place else _laid_out(graph, layer.last, value, piece)


def _laid_out(graph: ir.Graph, anchor: ir.Node, value: ir.Value, piece: Columns) -> ir.Value:
    """Bring [..., columns] to the layout of the part: one Reshape, one Transpose."""
    leads = len([axis for axis in piece.order if axis is not None])
    target = np.array([0] * leads + list(piece.index.shape), np.int64)
    shape = graphs.add_initializer(graph, "part_shape", target)
    value = graphs.insert(
        graph, anchor, "Reshape", [value, shape], name=f"{value.name}_split", dtype=value.dtype
    )
    position = leads
    axes = []
    for lead in piece.order:
        axes.append(position if lead is None else lead)
        position += lead is None
    if axes == list(range(len(axes))):
        return value
    name = f"{value.name}_swapped"
    return graphs.insert(
        graph, anchor, "Transpose", [value], {"perm": axes}, name=name, dtype=value.dtype
    )
