"""Finds the linear layers whose weights may be pruned."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from optimizer.blocks import find_blocks
from optimizer.linear_layers import (
    SHAPING,
    SHARED,
    is_embedding,
    is_head,
    is_shared,
    layer_name,
    linear_at,
    matches,
    users_of,
)
from optimizer.nodes import dims
from optimizer.pass_base import Skip
from optimizer.pruning.patterns import Pattern
from optimizer.structure import Block, Experts, Linear, Mlp, Structure

_TYPES = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_CHOICE = frozenset({"Softmax", "TopK", "ArgMax"})
_BEFORE_CHOICE = SHAPING | {"Cast", "Add", "Sigmoid"}
_HEAD = "computes an output of the model (heads=true, or include it by name, to prune it)"
_EMBEDDING = "embeds an input of the model (embeddings=true, or include it by name, to prune it)"
_ROUTER = "chooses the experts of a token (include it by name to prune it)"


@dataclass(frozen=True)
class Choice:
    """Which layers the user wants.

    Attributes:
        include, exclude: Shell patterns over names of weights and nodes.
        heads: Whether layers of a transformer that compute an output are taken.
        embeddings: The same for the first layers that an input meets.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    heads: bool = False
    embeddings: bool = False


@dataclass(frozen=True)
class Layer:
    """One linear layer of the main graph.

    Attributes:
        name: Of its weight.
        linear: The view.
        block: Index of the transformer block it belongs to; None outside of blocks.
    """

    name: str
    linear: Linear
    block: int | None

    @property
    def shape(self) -> tuple[int, int]:
        """K and N."""
        rows, columns = dims(self.linear.weight) or (0, 0)
        return rows, columns


def find_layers(
    model: ir.Model, choice: Choice, pattern: Pattern
) -> tuple[list[Layer], list[Skip]]:
    """The layers to prune, in graph order, and those left alone with the reason.

    In a transformer: all but output heads, embeddings and the routers of experts. Elsewhere: all.
    """
    structure = find_blocks(model)
    members = _members(structure)
    transformer = bool(structure.blocks or structure.misses)
    layers: list[Layer] = []
    skipped: list[Skip] = []
    for node in model.graph:
        found = linear_at(node)
        if found is None:
            continue
        name = layer_name(node)
        reason = found if isinstance(found, str) else _refusal(found, choice, pattern)
        if isinstance(found, Linear) and reason is None and transformer and node not in members:
            reason = _outside(found, choice, structure)
        if reason is not None or isinstance(found, str):
            skipped.append(Skip(name, str(reason)))
        else:
            layers.append(Layer(name, found, members.get(node)))
    return layers, skipped


def _refusal(linear: Linear, choice: Choice, pattern: Pattern) -> str | None:
    if matches(linear, choice.exclude):
        return "excluded by the options"
    dtype = linear.weight.dtype
    if dtype not in _TYPES:
        found = "unknown" if dtype is None else dtype.name
        return f"its weight is {found}, expected FLOAT, FLOAT16 or BFLOAT16"
    if is_shared(linear):
        return SHARED
    channels, width = dims(linear.weight) or (0, 0)
    if not channels or not width:
        return "its weight is empty"
    if pattern.group is not None and channels % pattern.group:
        return (
            f"its K = {channels} is no multiple of {pattern.group}, so that the last group of "
            f"{pattern} would be cut off (pattern=unstructured takes it)"
        )
    if round(pattern.share * channels) == 0:
        return f"{pattern} leaves no zero in a column of {channels}"
    return None


def _outside(linear: Linear, choice: Choice, structure: Structure) -> str | None:
    """Why a layer outside of the projections of all blocks stays dense."""
    if matches(linear, choice.include):
        return None
    if not choice.heads and is_head(linear.output):
        return _HEAD
    if not choice.embeddings and is_embedding(linear):
        return _EMBEDDING
    experts = [b.mlp for b in structure.blocks if isinstance(b.mlp, Experts)]
    if any(linear.matmul in e.nodes for e in experts) and _routes(linear.output):
        return _ROUTER
    return None


def _routes(value: ir.Value) -> bool:
    """Whether what a layer computes is turned into a choice, not into numbers of a token."""
    nodes = list(users_of(value))
    through = [node.outputs[0] for node in nodes if node.op_type in _BEFORE_CHOICE]
    return any(node.op_type in _CHOICE for node in nodes) or any(map(_routes, through))


def _members(structure: Structure) -> dict[ir.Node, int]:
    """The MatMul of every projection of a block, and the block's index."""
    return {
        linear.matmul: block.index for block in structure.blocks for linear in _projections(block)
    }


def _projections(block: Block) -> list[Linear]:
    attention, cross, mlp = block.attention, block.cross, block.mlp
    found = [attention.q, attention.k, attention.v, attention.o]
    if cross is not None:
        found += [x for x in (cross.q, cross.k, cross.v, cross.o) if x is not None]
    if isinstance(mlp, Mlp):
        found += [x for x in (mlp.up, mlp.gate, mlp.down) if x is not None]
    return found
