"""One group of consecutive layers that all read the same stream, as a wide graph.

With ``a_j`` the attention of member j, ``m_j`` its MLP, ``n`` the normalization without scale and
bias, and x the stream before the group:

* symmetric: ``h = x + sum a_j``, ``y = h + sum m_j(h)``: one wide pre-norm layer;
* distance d: ``h_j = x + sum of a_i, max(0, j - d) <= i <= j``, ``y = x + sum (a_j + m_j(h_j))``:
  attention and last projection are wide, the output projections and the first two MLP projections
  stay apart (one MatMul per member: as fast as one batched MatMul at one token, and 5 to 25 %
  faster at 16 and more, because ONNX Runtime packs only two-dimensional weights beforehand);
* parallel blocks: ``y = x + sum (a_j + m_j)``: one wide parallel layer, whatever d.

Heads are ordered by layer, then by head, so the query heads of a member keep their own key heads.

Source: CQIL (arXiv 2404.06709) for distance d, with every ``a_i`` added once; Layer Parallelism
(arXiv 2502.02790) for the symmetric form, with each member's own norm scales.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from optimizer.fusion import cache
from optimizer.fusion.legality import GROUP_KEY, constant_gain, gain_after
from optimizer.fusion.shapes import mask_heads
from optimizer.fusion.weights import Affine, beside, stacked, unit_scale
from optimizer.fusion.writer import Writer
from optimizer.graph import const, constant, remove_dead, replace_value
from optimizer.structure import Attention, Block, Linear, Norm, Style

#: "symmetric", or how many earlier members feed a member's MLP.
Bypass = Literal["symmetric"] | int


@dataclass(frozen=True)
class FusedGroup:
    """What ``fuse_group`` wrote.

    Attributes:
        name: Prefix of its names, for example "layers.4-5".
        layers: Indices of the members.
        output: The stream after the group.
    """

    name: str
    layers: tuple[int, ...]
    output: ir.Value


def fuse_group(
    model: ir.Model, members: Sequence[Block], bypass: Bypass, layers: Sequence[int] | None = None
) -> FusedGroup:
    """Replace ``members`` by one group, in place.

    The views of the members are stale afterwards. Other blocks' views stay good enough to fuse
    them, too, so a whole partition can be applied with one set of views.

    Args:
        model: The model.
        members: Two or more blocks that ``refusal`` accepts.
        bypass: The variant.
        layers: Original layer numbers of the members, for names and metadata.
    """
    numbers = tuple(layers) if layers is not None else tuple(block.index for block in members)
    name = f"layers.{numbers[0]}-{numbers[-1]}"
    graph = model.graph
    last = members[-1].output.producer()
    assert last is not None  # noqa: S101  (the output of a block is a residual add)
    early = Writer(graph, members[0].attention.node, name)
    late = Writer(graph, last, name)
    attention_norm = members[0].attention_norm
    x = _stream(members)
    normalized = early.norm(attention_norm, x, unit_scale(graph, attention_norm.scale), "norm1")
    context, node = _attention(early, members, normalized)
    node.metadata_props[GROUP_KEY] = ",".join(str(number) for number in numbers)
    if members[0].style is Style.PARALLEL:
        output = _parallel(late, members, normalized, context)
    elif bypass == "symmetric" or len(members) == 1:
        output = _symmetric(late, members, context)
    else:
        output = _bypassed(early, late, members, context, int(bypass))
    cache.group_outputs(model, members, node, numbers)
    replace_value(members[-1].output, output, keep_name=True)
    remove_dead(graph)
    cache.group_inputs(graph, members)
    return FusedGroup(name, numbers, output)


def _stream(members: Sequence[Block]) -> ir.Value:
    """The stream before the group, read from the graph: the group before may have replaced it."""
    return members[0].attention_norm.source


def _gain(linear: Linear, add: ir.Node) -> np.ndarray | None:
    found = gain_after(linear, add)
    assert found is not None  # noqa: S101  (legality)
    gain = constant_gain(found[0], linear.output)
    return None if gain is None else np.asarray(gain)


def _attention_out(block: Block) -> Affine:
    return Affine.of(block.attention.o, gain=_gain(block.attention.o, block.attention_add))


def _mlp_out(block: Block) -> Affine:
    return Affine.of(block.dense.down, gain=_gain(block.dense.down, block.mlp_add))


def _attention(w: Writer, members: Sequence[Block], x: ir.Value) -> tuple[ir.Value, ir.Node]:
    """One attention with the heads of all members; x is normalized without scale and bias."""
    views = [block.attention for block in members]
    first = views[0]
    heads = sum(view.heads for view in views)
    kv_heads = sum(view.kv_heads for view in views)
    normed = first.q_norm is not None
    ratios = [1.0 if normed or v.scale == first.scale else v.scale / first.scale for v in views]

    def project(
        pick: Callable[[Attention], Linear], name: str, *, scaled: bool = False
    ) -> ir.Value:
        parts = [
            Affine.of(pick(b.attention), b.attention_norm, r if scaled and r != 1.0 else None)
            for b, r in zip(members, ratios, strict=True)
        ]
        return w.linear(x, beside(parts, name), name)

    q = project(lambda a: a.q, "q", scaled=True)
    k = project(lambda a: a.k, "k")
    v = project(lambda a: a.v, "v")
    q_norms = [
        _HeadNorm(a.q_norm, a.heads * a.head_dim, a.scale / first.scale) for a in views if a.q_norm
    ]
    k_norms = [_HeadNorm(a.k_norm, a.kv_heads * a.head_dim) for a in views if a.k_norm]
    q = _head_norm(w, q, q_norms, "q") if q_norms else q
    k = _head_norm(w, k, k_norms, "k") if k_norms else k
    q = _rotary(w, q, first.q_rotary, heads, "q")
    k = _rotary(w, k, first.k_rotary, kv_heads, "k")
    mask = first.mask
    if mask is not None and mask_heads(mask) != 1:
        mask = w.op("Concat", [mask] * len(members), "mask", {"axis": -3})
    attributes: dict[str, Any] = dict(first.node.attributes.items())
    inputs = [q, k, v, mask, *first.node.inputs[4:]]
    while inputs[-1] is None:
        inputs.pop()
    attributes.update(q_num_heads=heads, kv_num_heads=kv_heads, scale=float(first.scale))
    outputs = cache.attention_outputs(w, members, inputs, attributes)
    node = outputs[0].producer()
    assert node is not None  # noqa: S101
    return outputs[0], node


def _rotary(w: Writer, x: ir.Value, node: ir.Node | None, heads: int, name: str) -> ir.Value:
    if node is None:
        return x
    attributes = {**dict(node.attributes.items()), "num_heads": heads}
    return w.op("RotaryEmbedding", [x, *node.inputs[1:]], f"{name}.rotary", attributes, like=x)


@dataclass(frozen=True)
class _HeadNorm:
    """One member's query or key norm: over each head, or over all ``width`` channels at once."""

    norm: Norm
    width: int
    gain: float = 1.0


def _head_norm(w: Writer, x: ir.Value, parts: Sequence[_HeadNorm], name: str) -> ir.Value:
    """The plain norm of every head, then the scales of all members, head by head."""
    like = parts[0].norm
    tensor = constant(like.scale)
    assert tensor is not None  # noqa: S101  (a norm's scale is an initializer)
    size, dtype = tensor.size, tensor.dtype.numpy()
    width = sum(part.width for part in parts)

    def table(pick: Callable[[Norm], ir.Value | None]) -> np.ndarray:
        rows = [
            np.tile(np.asarray(const(pick(p.norm)), np.float64) * p.gain, (p.width // size, 1))
            for p in parts
        ]
        return np.concatenate(rows).astype(dtype)

    y = w.op("Reshape", [x, w.integers(0, 0, width // size, size)], f"{name}.heads")
    y = w.norm(like, y, unit_scale(w.graph, like.scale), f"{name}.norm")
    scale = w.constant(f"{name}.norm.weight", table(lambda norm: norm.scale))
    y = w.op("Mul", [y, scale], f"{name}.scaled")
    if like.bias is not None:
        bias = w.constant(f"{name}.norm.bias", table(lambda norm: norm.bias))
        y = w.op("Add", [y, bias], f"{name}.shifted")
    return w.op("Reshape", [y, w.integers(0, 0, width)], f"{name}.joined")


def _symmetric(w: Writer, members: Sequence[Block], context: ir.Value) -> ir.Value:
    a = w.linear(context, stacked([_attention_out(b) for b in members], "o"), "o")
    h = w.op("Add", [_stream(members), a], "hidden")
    norm = members[0].mlp_norm
    inner = _mlp(w, members, w.norm(norm, h, unit_scale(w.graph, norm.scale), "norm2"))
    return w.op("Add", [h, _down(w, members, inner)], "output")


def _parallel(
    w: Writer, members: Sequence[Block], normalized: ir.Value, context: ir.Value
) -> ir.Value:
    x, first = _stream(members), members[0]
    one = (first.attention_norm.kind, first.attention_norm.epsilon)
    if (first.mlp_norm.kind, first.mlp_norm.epsilon) != one:
        norm = first.mlp_norm
        normalized = w.norm(norm, x, unit_scale(w.graph, norm.scale), "norm2")
    inner = _mlp(w, members, normalized)
    a = w.linear(context, stacked([_attention_out(b) for b in members], "o"), "o")
    h = w.op("Add", [x, a], "attended")
    return w.op("Add", [h, _down(w, members, inner)], "output")


def _mlp(w: Writer, members: Sequence[Block], x: ir.Value) -> ir.Value:
    """The wide MLP up to the input of its last projection."""
    first = members[0].dense
    up = [Affine.of(b.dense.up, b.mlp_norm) for b in members]
    mapping = {first.up.output: w.linear(x, beside(up, "up"), "up")}
    if first.gate is not None:
        gate = [Affine.of(b.dense.gate, b.mlp_norm) for b in members if b.dense.gate is not None]
        mapping[first.gate.output] = w.linear(x, beside(gate, "gate"), "gate")
    w.copy(first.inner, mapping)
    return mapping[first.down.input]


def _down(w: Writer, members: Sequence[Block], inner: ir.Value) -> ir.Value:
    return w.linear(inner, stacked([_mlp_out(b) for b in members], "down"), "down")


def _bypassed(
    early: Writer, late: Writer, members: Sequence[Block], context: ir.Value, distance: int
) -> ir.Value:
    """Distance d: the members keep their own norms and first projections (their nodes stay)."""
    x = _stream(members)
    widths = [block.attention.heads * block.attention.head_dim for block in members]
    parts = early.split(context, widths, "context")
    attended = [
        early.linear(part, stacked([_attention_out(block)], f"o.{j}"), f"o.{j}")
        for j, (part, block) in enumerate(zip(parts, members, strict=True))
    ]
    hidden, total = _streams(early, x, attended, distance)
    for h, block in zip(hidden, members, strict=True):
        block.mlp_norm.node.replace_input_with(0, h)
    inner = late.op("Concat", [block.dense.down.input for block in members], "inner", {"axis": -1})
    return late.op("Add", [total, _down(late, members, inner)], "output")


def _streams(
    w: Writer, x: ir.Value, attended: Sequence[ir.Value], distance: int
) -> tuple[list[ir.Value], ir.Value]:
    """``h_j`` for every member, and ``x + sum a_j``."""
    if distance >= len(attended) - 1:  # every earlier member: running sums
        hidden = []
        for j, a in enumerate(attended):
            x = w.op("Add", [x, a], f"hidden.{j}")
            hidden.append(x)
        return hidden, x
    hidden = [
        _total(w, [x, *attended[max(0, j - distance) : j + 1]], f"hidden.{j}")
        for j in range(len(attended))
    ]
    return hidden, _total(w, [x, *attended], "attended")


def _total(w: Writer, values: Sequence[ir.Value], name: str) -> ir.Value:
    return w.op("Add" if len(values) == 2 else "Sum", values, name)
