"""Finds the transformer blocks of a canonical graph.

Passes ask ``find_blocks`` and never match subgraphs themselves.

The search starts at each Attention node and follows its output projection to the residual add. The
other operand of that add is the stream, and tells the style: the input of the norm before the
projections (pre-norm), the value the projections read themselves (post-norm), or a sum with an MLP
that reads the same stream (parallel). Between attention and MLP a decoder layer may attend to an
encoder's output.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import onnx_ir as ir

from optimizer import block_parts as parts
from optimizer import special_parts as special
from optimizer.nodes import node_of, operands, other, users
from optimizer.norm_parts import norm, norms_reading
from optimizer.quantized_parts import rounded_forms, unrounded, weight_of
from optimizer.structure import (
    Attention,
    Block,
    CrossAttention,
    Experts,
    Linear,
    Mlp,
    Norm,
    NormKind,
    Structure,
    Style,
)

__all__ = [
    "Attention",
    "Block",
    "CrossAttention",
    "Experts",
    "Linear",
    "Mlp",
    "Norm",
    "NormKind",
    "Structure",
    "Style",
    "find_blocks",
]


def find_blocks(model: ir.Model) -> Structure:
    """Find the transformer blocks of a canonical model.

    Returns:
        The blocks, and what came close with the reason why it is none. Never raises for an
        unfamiliar graph.
    """
    blocks: list[Block] = []
    misses: dict[ir.Node, tuple[str, str]] = {}
    for node in model.graph:
        grouped = node.op_type == parts.GROUPED
        if node.domain != "" and not grouped:
            continue
        if node.op_type == "Attention" or grouped:
            found = _block(node, len(blocks))
            if isinstance(found, Block):
                blocks.append(found)
            elif special.windowed(node):
                misses[node] = (node.name or "Attention", special.WINDOWED)
            else:
                misses[node] = (node.name or "Attention", found)
        elif node.op_type == "Softmax" and _weighs_values(node):
            misses[node] = (node.name or "Softmax", special.unrecognised(node))
    for block in blocks:
        if block.cross is not None:  # it is a part of its layer, and no layer of its own
            misses.pop(block.cross.node, None)
    return Structure(tuple(blocks), tuple(misses.values()))


_AFTER_SOFTMAX = ("Where", "Cast", "QuantizeLinear", "DequantizeLinear")


def _weighs_values(softmax: ir.Node) -> bool:
    """Whether a Softmax looks like the one of an attention: its result is multiplied by values."""
    pending, value = len(_AFTER_SOFTMAX), softmax.outputs[0]
    while pending:
        for matmul in users(value, "MatMul"):
            if matmul.inputs[0] is value and weight_of(operands(matmul)[1]) is None:
                return True
        where = next(users(value, *_AFTER_SOFTMAX), None)
        if where is None:
            return False
        value, pending = where.outputs[0], pending - 1
    return False


@dataclass(frozen=True)
class _Tail:
    """The MLP half of a block."""

    style: Style
    hidden: ir.Value | None
    output: ir.Value
    attention_norm: Norm
    mlp_norm: Norm
    mlp: Mlp | Experts
    attention_add: ir.Node
    mlp_add: ir.Node
    extras: tuple[str, ...]
    cross: CrossAttention | None = None


def _block(node: ir.Node, index: int) -> Block | str:
    attention = parts.attention(node)
    if isinstance(attention, str):
        return attention
    branches = parts.forward_branches(attention.o.output, "attention")
    if not branches:
        return "the attention's result is not added to a residual stream"
    reasons = []
    for branch, add in branches:
        tail = _tail(attention, branch, add)
        if isinstance(tail, _Tail):
            return _assemble(index, attention, branch, tail)
        reasons.append(tail)
    return reasons[0]


def _assemble(index: int, attention: Attention, branch: parts.Branch, tail: _Tail) -> Block:
    extras = _without_casts([*branch.extras, *tail.extras])
    if tail.cross is not None:
        extras.append("cross-attention")
    if attention.node.op_type == parts.GROUPED:
        extras.append("each row of the batch keeps its own cache (GroupQueryAttention)")
    if attention.repeats > 1:
        extras.append("keys and values are repeated before the cache")
    linears = (attention.q, attention.k, attention.v, attention.o, *_linears(tail.mlp))
    output = special.clamped(tail.output)
    ends = [output, *((tail.hidden,) if tail.style is Style.PRE_NORM else ())]
    if any(v is not None and node_of(v, "Clip", "Max", "Min") is not None for v in ends):
        extras.append("the residual stream is clamped")
    if any(_is_quantized(layer) for layer in linears):
        extras.append("quantized weights")
    if len(attention.node.outputs) > 3 and attention.node.outputs[3].uses():
        extras.append("attention scores are read")
    return Block(
        index=index,
        style=tail.style,
        input=attention.q.input if tail.style is Style.POST_NORM else tail.attention_norm.input,
        hidden=tail.hidden,
        output=output,
        attention_norm=tail.attention_norm,
        mlp_norm=tail.mlp_norm,
        attention=attention,
        mlp=tail.mlp,
        attention_add=tail.attention_add,
        mlp_add=tail.mlp_add,
        cross=tail.cross,
        extras=tuple(dict.fromkeys(extras)),
    )


def _is_quantized(layer: Linear) -> bool:
    integers = layer.weight.dtype is not None and not layer.weight.dtype.is_floating_point()
    return integers or node_of(layer.weight, "DequantizeLinear") is not None


def _without_casts(extras: list[str]) -> list[str]:
    """Without the casts around a norm in a wider type, which belong to it."""
    normed = [extra.removeprefix("norm ") for extra in extras if extra.startswith("norm after")]
    return [extra for extra in extras if extra.removeprefix("Cast ") not in normed]


def _linears(mlp: Mlp | Experts) -> tuple[Linear, ...]:
    if isinstance(mlp, Experts):
        return ()
    return (mlp.up, mlp.down) if mlp.gate is None else (mlp.up, mlp.gate, mlp.down)


def _tail(attention: Attention, branch: parts.Branch, add: ir.Node) -> _Tail | str:
    """Everything after the first add that the attention's branch reaches."""
    source = attention.q.input
    rest = other(add, branch.end)
    if rest is source:
        return _post_norm(add, source)
    if unrounded(rest) is source:
        found = _post_norm(add, source)
        return found if isinstance(found, str) else replace(found, extras=(*found.extras, _ROUNDED))
    before = norm(source)
    if before is None:
        return "no norm before the attention, and its input is not the residual stream"
    stream = before.input
    if rest is stream:
        return _sequential(before, add)
    return _joined(before, add, rest)


def _sequential(before: Norm, add: ir.Node) -> _Tail | str:
    """``h = x + a`` came first: pre-norm, or parallel when the MLP reads x."""
    hidden, stream = special.clamped(add.outputs[0]), before.input
    cross = _crossed(hidden)
    if cross is not None:
        found = _sequential_mlp(before, add, cross.output, stream)
        return replace(found, cross=cross) if isinstance(found, _Tail) else found
    return _sequential_mlp(before, add, hidden, stream)


def _sequential_mlp(before: Norm, add: ir.Node, hidden: ir.Value, stream: ir.Value) -> _Tail | str:
    reason = "no MLP adds to the stream after the attention"
    for second in users(hidden, "Add"):
        found = _mlp_branch(other(second, hidden))
        if isinstance(found, str):
            reason = found
            continue
        mlp, after, extras = found
        if after is None:
            reason = "no norm before the MLP"
        elif after.input is hidden:
            output = second.outputs[0]
            return _Tail(Style.PRE_NORM, hidden, output, before, after, mlp, add, second, extras)
        elif after.input is stream:
            output = second.outputs[0]
            return _Tail(Style.PARALLEL, None, output, before, after, mlp, add, second, extras)
        else:
            reason = "the MLP's norm reads neither the block's input nor the attention's sum"
    return reason


_ROUNDED = "the residual stream is rounded"


def _added_to(stream: ir.Value) -> Iterator[tuple[ir.Node, ir.Value]]:
    """The adds to a stream, or to its rounded form, and what each adds."""
    for value in (stream, *rounded_forms(stream)):
        for add in users(value, "Add"):
            yield add, other(add, value)


def _crossed(hidden: ir.Value) -> CrossAttention | None:
    """``h + cross(n(h))``: the attention of a pre-norm layer to an encoder's output."""
    for add in users(hidden, "Add"):
        found = special.crossing_before(other(add, hidden))
        before = None if found is None else norm(found.q.input)
        if found is not None and before is not None and before.input is hidden:
            return _cross_view(found, before, add, special.clamped(add.outputs[0]))
    return None


def _crossed_after(hidden: ir.Value) -> CrossAttention | None:
    """``n(h + cross(h))``: the same of a post-norm layer."""
    for add, end in _added_to(hidden):
        found = special.crossing_before(end)
        if found is None or found.q.input is not hidden:
            continue
        after = next(norms_reading(add.outputs[0]), None)
        if after is not None:
            return _cross_view(found, after, add, after.output)
    return None


def _cross_view(
    found: special.Crossing, norm_: Norm, add: ir.Node, output: ir.Value
) -> CrossAttention:
    return CrossAttention(
        found.node, norm_, found.q, found.k, found.v, found.o,
        heads=found.heads, kv_heads=found.kv_heads, head_dim=found.head_dim,
        add=add, output=output,
    )  # fmt: skip


def _joined(before: Norm, add: ir.Node, rest: ir.Value) -> _Tail | str:
    """Parallel blocks in the other associations: ``(a + m) + x`` and ``a + (x + m)``."""
    stream = before.input
    # Where the MLP's branch ends, the add it reaches first, and the add that closes the block.
    candidates: Iterator[tuple[ir.Value, ir.Node, ir.Node]] = (
        (rest, add, last)
        for last in users(add.outputs[0], "Add")
        if other(last, add.outputs[0]) is stream
    )
    inner = node_of(rest, "Add")
    if inner is not None and stream in operands(inner):
        candidates = iter([(other(inner, stream), inner, add)])
    reason = "the attention's result is added to something that is not the residual stream"
    for end, mlp_add, last in candidates:
        found = _mlp_branch(end)
        if isinstance(found, str):
            reason = found
            continue
        mlp, after, extras = found
        if after is not None and after.input is stream:
            output = last.outputs[0]
            return _Tail(Style.PARALLEL, None, output, before, after, mlp, add, mlp_add, extras)
        reason = "the MLP added to the attention reads another value than the stream"
    return reason


def _post_norm(add: ir.Node, source: ir.Value) -> _Tail | str:
    """``h = n1(x + a)``, ``y = n2(h + mlp(h))``."""
    reason = "no norm after the attention's sum"
    for first in norms_reading(add.outputs[0]):
        cross = _crossed_after(first.output)
        found = _post_norm_mlp(first, add, first.output if cross is None else cross.output)
        if isinstance(found, _Tail):
            return replace(found, cross=cross)
        reason = found
    if reason == "no norm after the attention's sum" and norm(source) is None:
        return "neither a norm before the attention nor one after its sum"
    if any(True for _ in users(add.outputs[0], "Add")):
        return "a norm before the MLP, but none before the attention"
    return reason


def _post_norm_mlp(first: Norm, add: ir.Node, hidden: ir.Value) -> _Tail | str:
    reason = "no MLP adds to the stream after the attention"
    for second, end in _added_to(hidden):
        found = _mlp_branch(end)
        if isinstance(found, str):
            reason = found
            continue
        mlp, _, extras = found
        if _reads(mlp) is not hidden:
            reason = "the MLP reads another value than the stream"
            continue
        last = next(norms_reading(second.outputs[0]), None)
        if last is None:
            reason = "no norm after the MLP's sum"
            continue
        output = last.output
        return _Tail(Style.POST_NORM, hidden, output, first, last, mlp, add, second, extras)
    return reason


def _reads(mlp: Mlp | Experts) -> ir.Value:
    return mlp.input if isinstance(mlp, Experts) else mlp.up.input


def _mlp_branch(end: ir.Value) -> tuple[Mlp | Experts, Norm | None, tuple[str, ...]] | str:
    """The MLP (or mixture of them) whose branch ends in ``end``, and the norm it reads from."""
    found = parts.backward_linear(end, "MLP")
    mlp = None if found is None else parts.mlp(found[0])
    if found is not None and isinstance(mlp, Mlp):
        return mlp, norm(mlp.up.input), found[1]
    routed = special.experts(end)
    if isinstance(routed, Experts):
        return routed, norm(routed.input), ("mixture of experts",)
    return routed or (mlp if isinstance(mlp, str) else "the branch does not end in a linear layer")
