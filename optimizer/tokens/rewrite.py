"""Writes reductions into a tower: what is common to all ways of choosing tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.raising.shapes import Shapes
from optimizer.structure import Block
from optimizer.tokens.emit import Emitter, State
from optimizer.tokens.flow import Flow, Need, Reader, follow
from optimizer.tokens.merging import size_mask, unmerged
from optimizer.tokens.towers import Tower

#: Input of Attention.
_MASK = 3


class Method(Protocol):
    """A way to choose tokens."""

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
    """

    proportional: bool = True
    places: str | None = None


def write(
    model: ir.Model,
    tower: Tower,
    removed: Sequence[int],
    method: Method,
    settings: Settings,
) -> None:
    """Write a reduction by ``removed[i]`` tokens into block i, in place; 0 leaves a block alone."""
    graph = model.graph
    flow = flow_of(graph, tower, removed)
    order = {node: index for index, node in enumerate(graph)}
    states = [State(tower.count, tower.protected)]
    after: dict[ir.Value, ir.Value] = {}
    for block, r in zip(tower.blocks, removed, strict=True):
        if not r:
            continue
        pen, before = _pen(graph, block, order), states[-1]
        if len(states) == 1:
            before = _with_padding(pen, before, tower)
        merged, state = _reduce(pen, block, r, before, method, settings)
        after[_hidden(block)] = merged
        states.append(state)
    _mask_attentions(tower, flow, states)
    _correct_shapes(flow, states, after)
    _give_back(graph, flow, states, after)
    if settings.places is not None:
        _output_places(graph, states[-1], tower.count, settings.places)


def flow_of(graph: ir.Graph, tower: Tower, removed: Sequence[int]) -> Flow:
    """Where tokens go when the blocks with a number other than 0 are reduced."""
    hidden = [b.hidden for b, r in zip(tower.blocks, removed, strict=True) if r and b.hidden]
    nodes = {block.attention.node for block in tower.blocks}
    return follow(graph, hidden, nodes, Shapes())


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
        stage = flow.stages.get(node.outputs[0], 0)
        if not stage:
            continue
        if len(node.inputs) <= _MASK:
            node.resize_inputs(_MASK + 1)
        node.replace_input_with(_MASK, states[stage].mask)


def _correct_shapes(flow: Flow, states: Sequence[State], after: dict[ir.Value, ir.Value]) -> None:
    """Values behind a reduction have fewer tokens than they declare."""
    for read, stage in flow.stages.items():
        value = after.get(read, read)
        shape = value.shape
        if shape is not None and len(shape) == 3 and not value.is_graph_output():
            value.shape = ir.Shape([shape[0], states[stage].count, shape[2]])


def _give_back(
    graph: ir.Graph, flow: Flow, states: Sequence[State], after: dict[ir.Value, ir.Value]
) -> None:
    """Give every reader what it needs."""
    whole: dict[ir.Value, ir.Value] = {}
    for reader in flow.readers:
        state = states[reader.stage]
        value = reader.value if reader.node is None else after.get(reader.value, reader.value)
        if set(reader.positions) <= set(states[0].protected) and reader.need is Need.SELECT:
            moved = dict(zip(states[0].protected, state.protected, strict=True))
            _select(graph, reader, value, [moved[position] for position in reader.positions])
            continue
        if value not in whole:
            dtype = value.dtype or ir.DataType.FLOAT
            pen = Emitter(graph, reader.node, f"{value.name}/tokens", dtype)
            whole[value] = unmerged(pen, value, state)
        if reader.node is None:
            graphs.replace_output(value, whole[value])
            whole[value].type, whole[value].shape = value.type, value.shape
            value.shape = None
            continue
        for position, found in enumerate(reader.node.inputs):
            if found is value:
                reader.node.replace_input_with(position, whole[value])


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


def _output_places(graph: ir.Graph, state: State, count: int, name: str) -> None:
    assert state.places is not None  # noqa: S101 - asked for after a reduction
    pen = Emitter(graph, None, name, ir.DataType.INT64)
    places = pen.put("Squeeze", state.places, pen.integers([2], "axes"))
    places.name = graphs.unique_name(graph, name)
    first = graph.inputs[0].shape
    places.shape = ir.Shape([None if first is None else first[0], count])
    graph.outputs.append(places)
