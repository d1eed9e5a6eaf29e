"""The stacks of blocks in which tokens can be merged, or why they cannot.

A tower is a run of blocks in which each reads what the one before gave. A model of images and text
has two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.nodes import dims, node_of, operands, users
from optimizer.pass_base import Skip
from optimizer.raising.dims import Dim
from optimizer.raising.shapes import Shapes
from optimizer.structure import Attention, Block, Style
from optimizer.tokens.ends import taken_position
from optimizer.tokens.flow import Flow, Keeps, Need, Rows, Walk
from optimizer.tokens.masks import Padding, read_mask

_UNORDERED = "the attention is causal, and merging changes the order of the tokens"
#: Attribute of Attention: what its output of scores is, the products or what softmax gives.
SCORE_MODE, RAW, WEIGHTS = "qk_matmul_output_mode", 0, 3
#: A reader that takes out more than this share of the tokens needs all of them.
_FEW = 8


@dataclass(frozen=True)
class Tower:
    """Blocks whose tokens can be merged.

    Attributes:
        blocks: In order.
        count: N, how many tokens enter.
        protected: Their positions that stay as they are, rising.
        padding: The graph input that tells padding, or None.
        dense: Who needs all tokens afterwards; empty where they need not be given back.
        keeps: What the reduction keeps.
        apart: Why other tokens are not joined to fewer of them; None where they are, or none are.
        cross: Position of a token that becomes another in front of each layer, or None.
        causal: Blocks whose masks hide what comes later, by index.
        taken: int64 [B], the position of a token that is taken out behind, or None.
    """

    blocks: tuple[Block, ...]
    count: int
    protected: tuple[int, ...]
    padding: ir.Value | None
    dense: tuple[str, ...]
    keeps: Keeps
    apart: str | None = None
    cross: int | None = None
    causal: frozenset[int] = frozenset()
    taken: ir.Value | None = None

    def guide(self, guidance: str | int) -> int | None:
        """Which of the protected tokens is meant: that of a position, the first, or none.

        Args:
            guidance: A position; "auto" is a cross token, or else the first protected token;
                anything else is none.
        """
        if guidance == "auto" and self.cross is not None:
            return self.protected.index(self.cross)
        if isinstance(guidance, int) and -self.count <= guidance < self.count:
            return self.protected.index(guidance % self.count)
        return 0 if guidance == "auto" and self.protected else None


def find_towers(
    model: ir.Model, blocks: Sequence[Block], protect: Sequence[int], keeps: Keeps
) -> tuple[list[Tower], list[Skip]]:
    """All towers, and the blocks of those that cannot be reduced, with the reason.

    Args:
        model: Canonical.
        blocks: As ``find_blocks`` gives them.
        protect: Positions to protect besides those found; negative ones count from the end.
        keeps: What the reduction keeps, such as the order that causal attention needs.
    """
    shapes, towers, skipped = Shapes(), list[Tower](), list[Skip]()
    for chain in chains(blocks):
        found = _tower(model, chain, shapes, protect, keeps)
        if isinstance(found, Tower):
            towers.append(found)
        else:
            where, reason = found
            skipped.extend(Skip(f"layer {b.index}", _told(b, where, reason)) for b in chain)
    return towers, skipped


def _told(block: Block, where: Block | None, reason: str) -> str:
    return reason if where is None or where is block else f"layer {where.index}: {reason}"


def chains(blocks: Sequence[Block]) -> Iterator[tuple[Block, ...]]:
    """Runs of blocks in which each reads the result of the one before, perhaps with other ends."""
    by_input = {block.input: block for block in blocks}
    next_of = {block: _following(block, by_input) for block in blocks}
    follows = set(next_of.values())
    for first in blocks:
        if first in follows:
            continue
        chain, following = [first], next_of[first]
        while following is not None:
            chain.append(following)
            following = next_of[following]
        yield tuple(chain)


def _following(block: Block, by_input: dict[ir.Value, Block]) -> Block | None:
    """The block that reads the result of ``block``, perhaps with other tokens at the ends."""
    found = by_input.get(block.output)
    if found is not None:
        return found
    for part in users(block.output, "Slice"):
        for joined in users(part.outputs[0], "Concat"):
            if joined.outputs[0] in by_input:
                return by_input[joined.outputs[0]]
    return None


def _cross(chain: Sequence[Block], count: int) -> int | None:
    """The last token, if it becomes another between all layers."""
    links = [
        before.output is not after.input
        and (concat := node_of(after.input, "Concat")) is not None
        and node_of(concat.inputs[0], "Slice") is not None
        for before, after in pairwise(chain)
    ]
    return count - 1 if links and all(links) else None


def _tower(
    model: ir.Model,
    chain: tuple[Block, ...],
    shapes: Shapes,
    protect: Sequence[int],
    keeps: Keeps,
) -> Tower | tuple[Block | None, str]:
    for block in chain:
        reason = fault(block, ordered=keeps.ordered)
        if reason is not None:
            return block, reason
    count = tokens_of(chain[0], shapes)
    if not isinstance(count, int):
        return None, (
            "the number of tokens is not the same for every input; option tokens=N makes it N for "
            "all"
        )
    paddings: dict[ir.Value | None, Padding | str] = {}
    for block in chain:
        mask = block.attention.mask
        paddings.setdefault(mask, read_mask(model, mask, count))
        found = paddings[mask]
        if isinstance(found, str):
            return block, found
        if found.causal and not keeps.ordered:
            return block, _UNORDERED
    sources = {p.source for p in paddings.values() if isinstance(p, Padding)}
    if sources != {None} and any(map(reads_scores, chain)):
        return None, "attention scores are read where there is padding, which they would go to"
    if len(sources) > 1:
        return None, "some layers mask padding and others do not"
    fixed = {position % count for position in protect if -count <= position < count}
    fixed |= _special(chain[0], shapes, count)
    cross = _cross(chain, count)
    fixed.update(() if cross is None else (cross,))
    masks = {b.index: paddings[b.attention.mask] for b in chain}
    causal = {i for i, mask in masks.items() if isinstance(mask, Padding) and mask.causal}
    tower = Tower(
        chain, count, tuple(sorted(fixed)), sources.pop(), (), keeps, cross=cross,
        causal=frozenset(causal),
    )  # fmt: skip
    flow = _flow(model.graph, tower, shapes)
    tower = replace(tower, protected=_protected(flow, count, fixed))
    flow = _flow(model.graph, tower, shapes)
    if flow.lost is not None:
        tower = replace(tower, apart=flow.lost)
        flow = _flow(model.graph, tower, shapes)
    reason = broken(chain, flow)
    taken = taken_position(flow) if keeps.ordered else None
    tower = replace(tower, dense=_dense(flow, tower.protected), taken=taken)
    return (None, reason) if reason else tower


def walk(tower: Tower, shapes: Shapes) -> Walk:
    """The way to follow the tokens of a tower."""
    nodes = {block.attention.node for block in tower.blocks}
    protected, join = frozenset(tower.protected), tower.apart is None
    return Walk(shapes, nodes, tower.count, protected, tower.keeps, join)


def _flow(graph: ir.Graph, tower: Tower, shapes: Shapes) -> Flow:
    hidden = [block.hidden for block in tower.blocks if block.hidden is not None]
    return walk(tower, shapes).follow(graph, hidden)


def fault(block: Block, *, ordered: bool) -> str | None:
    """Why the tokens of a block cannot be merged."""
    attention = block.attention
    node = attention.node
    if block.style is Style.PARALLEL or block.hidden is None:
        return "attention and MLP run side by side, so there is no place between them"
    if block.cross is not None:
        return "cross-attention lies between attention and MLP"
    if node.op_type != "Attention" or _is_cached(attention):
        return "keys and values are cached"
    if attention.is_causal and not ordered:
        return _UNORDERED
    if attention.q_rotary is not None or attention.k_rotary is not None:
        return "rotary embeddings turn each token by its position, which a merged one has not"
    if "quantized weights" in block.extras:
        return "its weights are quantized; merge tokens before that"
    if reads_scores(block) and node.attributes.get_int(SCORE_MODE, 0) not in (RAW, WEIGHTS):
        return "the attention scores are read after a mask was added to them"
    return None


def reads_scores(block: Block) -> bool:
    """Whether the scores of its attention are read, or an output."""
    outputs = block.attention.node.outputs
    return len(outputs) > 3 and bool(outputs[3].uses() or outputs[3].is_graph_output())


def _is_cached(attention: Attention) -> bool:
    presents = [v for v in (attention.present_key, attention.present_value) if v is not None]
    if any(value.uses() or value.is_graph_output() for value in presents):
        return True
    return attention.past_key is not None or attention.past_value is not None


def tokens_of(block: Block, shapes: Shapes) -> Dim | None:
    """How many tokens a block has, perhaps symbolic; None: not even that is known."""
    shape = shapes.of(block.hidden) or shapes.of(block.input)
    return shape[1] if shape is not None and len(shape) == 3 else None


def broken(blocks: Sequence[Block], flow: Flow) -> str | None:
    """Why merged tokens do not arrive at a later block; None where they do."""
    if flow.captured is not None:
        return f"{flow.captured.op_type} inside of a branch or loop reads the tokens"
    for stage, block in enumerate(blocks):
        expected = Rows(stage) if stage else None
        if block.hidden is not None and flow.entered.get(block.hidden) != expected:
            before = [r for r in flow.readers if r.rows.stage == stage and r.node is not None]
            name = before[0].node.op_type if before and before[0].node is not None else "something"
            return f"{name} between layers {block.index - 1} and {block.index} needs every token"
    return None


def _protected(flow: Flow, count: int, fixed: set[int]) -> tuple[int, ...]:
    """``fixed`` and the tokens that a reader takes out."""
    found = set(fixed)
    for reader in flow.readers:
        if reader.need is Need.SELECT and len(reader.positions) * _FEW <= count:
            found.update(reader.positions)
    return tuple(sorted(found))


def _dense(flow: Flow, protected: tuple[int, ...]) -> tuple[str, ...]:
    """Who has to be given all tokens back."""
    names = []
    for reader in flow.readers:
        if reader.need is Need.ALL or not set(reader.positions) <= set(protected):
            name = f"output '{reader.value.name}'" if reader.node is None else reader.node.op_type
            names.append(name)
    return tuple(dict.fromkeys(names))


def _special(first: Block, shapes: Shapes, count: int) -> set[int]:
    """Positions of class, distillation and register tokens: concatenated constants."""
    value: ir.Value | None = first.input
    for _ in range(8):
        node = None if value is None else value.producer()
        if value is None or node is None:
            return set()
        if node.op_type == "Concat" and node.attributes.get_int("axis", 0) in (1, -2):
            found = _constant_parts(node, shapes, count)
            if found or node.inputs[0] is None:
                return found
            value = node.inputs[0]
            size = shapes.of(value)
            count = size[1] if size is not None and isinstance(size[1], int) else 0
            continue
        if node.op_type == "Add":
            value = _data_operand(node)
        elif node.op_type in ("LayerNormalization", "RMSNormalization", "Identity", "Cast"):
            value = node.inputs[0]
        else:
            return set()
    return set()


def _data_operand(node: ir.Node) -> ir.Value:
    first, second = operands(node)
    return second if dims(first) is not None or node_of(first, "Expand") is not None else first


def _constant_parts(concat: ir.Node, shapes: Shapes, count: int) -> set[int]:
    found: set[int] = set()
    start = 0
    for value in concat.inputs:
        shape = shapes.of(value)
        size = None if shape is None or len(shape) != 3 else shape[1]
        if not isinstance(size, int):
            return set()
        expand = None if value is None else node_of(value, "Expand")
        if graphs.constant(value if expand is None else expand.inputs[0]) is not None:
            found.update(range(start, start + size))
        start += size
    return found if start == count else set()
