"""Writes reductions into a tower: what is common to all ways of choosing tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import numpy as np
import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.raising.shapes import Shapes
from optimizer.structure import Block
from optimizer.tokens.emit import Emitter, State, read_instead
from optimizer.tokens.flow import MASK, Attend, Flow, Keeps, Need, Reader, Table
from optimizer.tokens.joined import (
    Lengths,
    Reading,
    replace_input,
    shorten,
    whole,
    whole_scores,
)
from optimizer.tokens.merging import size_mask
from optimizer.tokens.towers import SCORE_MODE, WEIGHTS, Tower, reads_scores, walk


class Method(Protocol):
    """A way to choose tokens.

    Attributes:
        keeps: What it keeps of their order and places.
    """

    keeps: ClassVar[Keeps] = Keeps()

    def limit(self, count: int, protected: tuple[int, ...]) -> int:
        """The most tokens that one reduction can take from ``count``."""
        ...

    def fault(self, count: int, protected: tuple[int, ...]) -> str | None:
        """Why a tower with these protected tokens is left alone; none is, unless a way says so."""
        del count, protected
        return None

    def reduce(
        self, pen: Emitter, block: Block, x: ir.Value, state: State, r: int
    ) -> tuple[ir.Value, State]:
        """``x`` [B, N, D] with ``r`` tokens less, and what is known about them."""
        ...


@dataclass(frozen=True)
class Settings:
    """How reductions are written.

    Attributes:
        proportional: Whether later attentions count a token as often as it stands for.
        places: Name of an output [B, N] that tells where each token went; None for none.
        count: N of that output, the first tokens; None: all.
    """

    proportional: bool = True
    places: str | None = None
    count: int | None = None


def write(
    model: ir.Model,
    tower: Tower,
    removed: Sequence[int],
    method: Method,
    settings: Settings,
) -> Flow:
    """Write a reduction by ``removed[i]`` tokens into block i, in place; 0 leaves a block alone.

    Returns:
        Where the tokens go.
    """
    graph, shapes = model.graph, Shapes()
    hidden = [b.hidden for b, r in zip(tower.blocks, removed, strict=True) if r and b.hidden]
    flow = walk(tower, shapes).follow(graph, hidden)
    order = {node: index for index, node in enumerate(graph)}
    followed = bool(flow.tables) or any(len(a.node.inputs) > MASK for a in flow.attends)
    followed = followed or tower.taken is not None
    states = [State(tower.count, tower.protected, followed=followed)]
    after: dict[ir.Value, ir.Value] = {}
    for block, r in zip(tower.blocks, removed, strict=True):
        if not r:
            continue
        pen, before = _pen(graph, block, order), states[-1]
        if len(states) == 1:
            before = _with_padding(pen, before, tower)
        before = _with_taken(pen, before, tower)
        merged, state = _reduce(pen, block, r, before, method, settings)
        after[_hidden(block)] = merged
        states.append(state)
    lengths = Lengths(shapes, tower.count)
    _mask_attentions(tower, flow, states)
    _give_scores_back(graph, tower, flow, states)
    _read_by_position(graph, flow, states, lengths, order)
    for read, rows in flow.rows.items():
        shorten(after.get(read, read), rows, states[rows.stage], lengths)
    _give_back(graph, flow, states, after, lengths)
    if tower.taken is not None:
        graph.sort()  # its position may be computed behind the tower
    if settings.places is not None:
        _output_places(graph, states[-1], tower.count, settings)
    return flow


def _first_user(value: ir.Value, order: dict[ir.Node, int]) -> ir.Node:
    return min((use.node for use in value.uses()), key=order.__getitem__)


def _pen(graph: ir.Graph, block: Block, order: dict[ir.Node, int]) -> Emitter:
    hidden = _hidden(block)
    dtype = hidden.dtype or ir.DataType.FLOAT
    return Emitter(graph, _first_user(hidden, order), f"layers.{block.index}/tokens", dtype)


def _hidden(block: Block) -> ir.Value:
    assert block.hidden is not None  # noqa: S101 - a tower has no parallel blocks
    return block.hidden


def _with_padding(pen: Emitter, state: State, tower: Tower) -> State:
    """Padding has size 0."""
    if tower.padding is None:
        return state
    flag = ir.DataType.BOOL
    real = pen.put("Cast", tower.padding, as_="real", dtype=flag, to=flag)
    column = pen.put("Unsqueeze", real, pen.integers([2], "axes"), dtype=flag)
    return replace(state, sizes=pen.put("Cast", column, as_="sizes", to=pen.dtype), padded=True)


def _with_taken(pen: Emitter, state: State, tower: Tower) -> State:
    """Which token is the one that is taken out behind."""
    if tower.taken is None:
        return state
    integer = ir.DataType.INT64
    position = pen.put("Cast", tower.taken, dtype=integer, to=integer)
    column = pen.put("Reshape", position, pen.integers([-1, 1, 1], "shape"), dtype=integer)
    many = pen.integers([tower.count], "count")  # negative ones count from the end
    column = pen.put("Mod", pen.put("Add", column, many, dtype=integer), many, dtype=integer)
    here = state.origins or pen.integers(np.arange(state.count)[:, None], "positions")
    same = pen.put("Equal", here, column, dtype=ir.DataType.BOOL)
    return replace(state, taken=pen.put("Cast", same, as_="taken", to=pen.dtype))


def _reduce(
    pen: Emitter, block: Block, r: int, state: State, method: Method, settings: Settings
) -> tuple[ir.Value, State]:
    """The fewer tokens, and what is known about them."""
    hidden = _hidden(block)
    uses = list(hidden.uses())
    merged, after = method.reduce(pen, block, hidden, state, r)
    for use in uses:
        use.node.replace_input_with(use.idx, merged)
    mask = size_mask(pen, after, proportional=settings.proportional)
    return merged, replace(after, mask=mask)


def _mask_attentions(tower: Tower, flow: Flow, states: Sequence[State]) -> None:
    for block in tower.blocks:
        node = block.attention.node
        rows = flow.rows.get(node.outputs[0])
        if rows is None:
            continue
        replace_input(node, MASK, states[rows.stage].mask)
        if block.index in tower.causal:
            node.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)


def _give_scores_back(graph: ir.Graph, tower: Tower, flow: Flow, states: Sequence[State]) -> None:
    """Who reads attention scores gets one for each pair of original tokens."""
    for block in tower.blocks:
        node = block.attention.node
        rows = flow.rows.get(node.outputs[0])
        if rows is None or not reads_scores(block):
            continue
        scores, weights = node.outputs[3], node.attributes.get_int(SCORE_MODE, 0) == WEIGHTS
        uses = list(scores.uses())
        following = graph[list(graph).index(node) + 1]
        pen = Emitter(graph, following, f"layers.{block.index}/scores", _hidden(block).dtype)
        whole_ = whole_scores(pen, scores, states[rows.stage], weights=weights)
        for use in uses:
            use.node.replace_input_with(use.idx, whole_)
        if scores.is_graph_output():
            graphs.replace_output(scores, whole_)
            whole_.type, whole_.shape = scores.type, scores.shape
        scores.shape = None


def _read_by_position(
    graph: ir.Graph,
    flow: Flow,
    states: Sequence[State],
    lengths: Lengths,
    order: dict[ir.Node, int],
) -> None:
    """Tables by position and masks outside of the tower, for fewer tokens."""
    found: list[Table | Attend] = [*flow.tables, *flow.attends]
    reading = Reading(graph, lengths, states)
    for one in sorted(found, key=lambda one: order[one.node]):
        if isinstance(one, Table):
            one.node.replace_input_with(one.index, reading.table(one))
        else:
            replace_input(one.node, MASK, reading.mask(one))


def _give_back(
    graph: ir.Graph,
    flow: Flow,
    states: Sequence[State],
    after: dict[ir.Value, ir.Value],
    lengths: Lengths,
) -> None:
    """Give every reader what it needs."""
    given: dict[ir.Value, ir.Value] = {}
    for reader in flow.readers:
        state = states[reader.rows.stage]
        value = reader.value if reader.node is None else after.get(reader.value, reader.value)
        if set(reader.positions) <= set(states[0].protected) and reader.need is Need.SELECT:
            moved = dict(zip(states[0].protected, state.protected, strict=True))
            _select(graph, reader, value, [moved[position] for position in reader.positions])
            continue
        if value not in given:
            dtype = value.dtype or ir.DataType.FLOAT
            pen = Emitter(graph, reader.node, f"{value.name}/tokens", dtype)
            given[value] = whole(pen, value, reader.rows, state, lengths)
        read_instead(reader.node, value, given[value])


def _select(graph: ir.Graph, reader: Reader, value: ir.Value, positions: Sequence[int]) -> None:
    """Let a reader take the tokens at ``positions``, where the protected ones are now."""
    node = reader.node
    ranks = np.array(positions, np.int64)
    if node is None or (np.array_equal(ranks, reader.positions) and node.op_type == "Gather"):
        return
    index = graphs.const(node.inputs[1])
    gather = node.op_type == "Gather" and index is not None
    pen = Emitter(graph, node, f"{value.name}/tokens", value.dtype or ir.DataType.FLOAT)
    where = pen.integers(ranks.reshape(index.shape) if gather and index is not None else ranks)
    found = pen.put("Gather", value, where, as_="selected", axis=1)
    graphs.replace_value(node.outputs[0], found)


def _output_places(graph: ir.Graph, state: State, total: int, settings: Settings) -> None:
    name, count = settings.places, settings.count or total
    assert state.places is not None  # noqa: S101 - asked for after a reduction
    assert name is not None  # noqa: S101
    pen = Emitter(graph, None, name, ir.DataType.INT64)
    told = state.places
    if count < total:
        bounds = [pen.integers([number]) for number in (0, count, 1)]
        told = pen.put("Slice", told, *bounds, as_="told")
    places = pen.put("Squeeze", told, pen.integers([2], "axes"))
    places.name = graphs.unique_name(graph, name)
    first = graph.inputs[0].shape
    places.shape = ir.Shape([None if first is None else first[0], count])
    graph.outputs.append(places)
